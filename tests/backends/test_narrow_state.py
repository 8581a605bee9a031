"""The base's state in 16 and 8 bits: every backend has the reference's bits, and it can fall."""

import math
from unittest.mock import MagicMock

import pytest
import torch
from support.cases import CASES, RUNNING, assert_same, skip_unless_available
from support.kernels import INTERPRETED
from support.lockstep import drawn, give_gradients, optimizer, random_gradient

from mechanic_fused import MechanicAdamW, backends
from mechanic_fused.backends import quantize
from mechanic_fused.state_formats import decode, has_codes

SHAPES = ((64, 128), (3, 96 * 50), (130, 32), (100, 41), (8, 16, 64), (5000,), (3,), (4096, 0))
"""Blocks of 64, 64, 32, none, and 64 within two dimensions; one dimension, a small one, none."""

BASES = ("adamw", "adam l2", "nesterov", "lion")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def drawn_in(dtype, shapes=SHAPES):
    flat = drawn(dtype, [math.prod(shape) for shape in shapes])
    return lambda: [x.view(shape) for x, shape in zip(flat(), shapes, strict=True)]


def uneven_gradient(p, t, i):
    """Rows apart by orders of magnitude, zeros, and in the third step what is not finite."""
    g = random_gradient(p, t, i)
    flat = g.view(-1)
    flat *= torch.logspace(-3, 3, max(len(flat), 1))[: len(flat)].to(g.dtype)
    flat[::7] = 0
    if t == 2:
        flat[3::1000] = torch.inf
        flat[4::1000] = torch.nan
        flat[5::1000] = 3e38
    return g


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize("case", BASES)
def test_the_running_form_has_the_bits_of_the_reference(running, case, dtype, bits):
    base, options = CASES[case]
    running.run(base, drawn_in(dtype), 4, uneven_gradient, optim_bits=bits, **options)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, slow(torch.float16)], ids=str)
@pytest.mark.parametrize("case", BASES)
def test_the_exact_forms_have_the_bits_of_the_reference(lockstep, case, dtype, bits):
    base, options = CASES[case]
    lockstep.run(base, drawn_in(dtype), 4, uneven_gradient, optim_bits=bits, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_gradients_may_be_anywhere_in_memory(running, dtype):
    """Where packets do not fit, codes are still taken by whole blocks."""

    def shifted(make):
        def moved():
            out = []
            for x in make():
                storage = torch.zeros(x.numel() + 3, dtype=x.dtype)
                out.append(storage[3:].view(x.shape).copy_(x))
            return out

        return moved

    shapes = ((64, 128), (130, 32), (40, 64))
    running.run(
        "adamw", shifted(drawn_in(dtype, shapes)), 3, optim_bits=8, **CASES["adamw"].options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_beside_an_x_ref_in_part(running, dtype):
    shapes = ((80, 128), (300, 32))
    options = {**CASES["adamw"].options, "optim_bits": 8, "x_ref_every": 8}
    running.run("adamw", drawn_in(dtype, shapes), 3, **options)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("case", ["adamw", "nesterov", slow("lion"), "sgd"])
def test_weights_rounded_stochastically_have_the_bits_of_the_reference(running, case, bits):
    base, options = CASES[case]
    options = {**options, "optim_bits": bits, "bf16_stochastic_round": True}
    running.run(base, drawn_in(torch.bfloat16), 4, uneven_gradient, **options)


@pytest.mark.parametrize("bits", [8, 16])
def test_updates_below_a_last_place_add_up_in_weights_without_low_bits(any_kernels, bits):
    """An eighth of a last place each: in each step a weight in eight moves, and then all have."""

    def make():
        return [torch.full((64, 128), 1.5, dtype=torch.bfloat16)]

    options = {"lr": 2.0**-10, "variant": RUNNING, "s_init": 1.0, "momentum": 0.5}
    rounding = {"optim_bits": bits, "bf16_stochastic_round": True, "dampening": 0.5}
    opt, [p] = optimizer(any_kernels, "sgd", make, **options, **rounding)
    opt.freeze_scale()
    assert "x_low" not in opt.state[p]
    for _ in range(16):
        p.grad = torch.full_like(p, -1.0)
        opt.step()
    moved = (p.detach().double() - 1.5).cpu()
    assert float(moved.mean()) == pytest.approx(16 * 2.0**-10, rel=0.05)
    # Evenly: no weight is more than two last places from where exact arithmetic would have it.
    assert (moved - 16 * 2.0**-10).abs().max() <= 2.0**-6


@pytest.mark.parametrize("variant", [RUNNING, "optax"])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_step_without_gradients_in_them_moves_no_state(any_kernels, bits, variant):
    make = drawn_in(torch.float32, ((64, 128),))
    opt, [p] = optimizer(any_kernels, "adamw", make, variant=variant, optim_bits=bits)
    rows = torch.arange(64)[:, None] < 8
    for t in range(4 if INTERPRETED else 40):
        p.grad = torch.where(rows, random_gradient(p, t, 0), 0.0).to(p.device)
        opt.step()
        for name in ("exp_avg", "exp_avg_sq"):
            assert (opt.state[p][name][8:] == 0).all()
            assert (opt.state[p][name][:8] != 0).any()


# What rounding to nearest could not do

OPTIONS = {"lr": 0.0, "betas": (0.9, 0.999), "weight_decay": 0.0}
"""The base's state alone moves."""


def mean_v(opt, p):
    state = opt.state[p]
    v = state["exp_avg_sq"]
    v = decode(v, state["exp_avg_sq_scale"]) if has_codes("exp_avg_sq", v) else v
    return float(v.double().mean())


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [
        (torch.float32, {"optim_bits": 8}),
        (torch.float32, {"optim_bits": 16}),
        (torch.bfloat16, {"optim_bits": 16}),
        (torch.bfloat16, {"state_dtype": "param"}),
    ],
    ids=str,
)
def test_v_falls_after_gradients_that_shrink_tenfold(kernels, dtype, narrow):
    """At beta2 = 0.999 it falls by 0.1 % a step, which is less than half a last place."""
    if kernels.name == "triton" and INTERPRETED:
        pytest.skip("minutes in the interpreter; its bits are those of the reference")
    make = drawn_in(dtype, ((64, 128),))
    same = {"variant": RUNNING, "s_init": 1.0, **OPTIONS}
    pairs = [optimizer(kernels, "adamw", make, **same, **own) for own in (narrow, {})]
    for t in range(2500):
        size = 1.0 if t < 1000 else 0.1
        for opt, params in pairs:
            for p in params:
                p.grad = (size * random_gradient(p, t % 7, 0)).to(p.device)
            opt.step()
    found, expected = (mean_v(opt, p) for opt, [p] in pairs)
    assert found == pytest.approx(expected, rel=0.02)


def test_the_momentum_of_an_element_that_gets_no_gradient_any_more_dies_out(kernels):
    """To nearest, ±9 of 127 codes would stay for ever, and over a v that falls they are large."""
    if kernels.name == "triton" and INTERPRETED:
        pytest.skip("minutes in the interpreter; its bits are those of the reference")
    options = {**OPTIONS, "betas": (0.9, 0.95), "variant": RUNNING, "s_init": 1.0}
    make = drawn_in(torch.float32, ((64, 128),))
    opt, [p] = optimizer(kernels, "adamw", make, optim_bits=8, **options)
    dead = torch.arange(128) % 16 != 0
    for t in range(800):
        g = random_gradient(p, t % 7, 0)
        p.grad = (torch.where(dead, 0.0, g) if t >= 20 else g).to(p.device)
        opt.step()
    state = {name: value.cpu() for name, value in opt.state[p].items()}
    m = decode(state["exp_avg"], state["exp_avg_scale"])[:, dead]
    assert (m == 0).all()
    assert (decode(state["exp_avg_sq"], state["exp_avg_sq_scale"]) > 0).all()


# What decides about random bits


def test_weights_of_the_same_numbers_are_rounded_apart_and_runs_alike(any_kernels):
    def run():
        def twins():
            return [x.clone() for x in drawn_in(torch.float32, ((32, 128),))() for _ in range(2)]

        opt, params = optimizer(any_kernels, "adamw", twins, variant=RUNNING, optim_bits=8)
        for t in range(3):
            give_gradients(params, t, lambda p, t, i: random_gradient(p, t, 0))
            opt.step()
        return [opt.state[p]["exp_avg_sq"].clone() for p in params]

    one, other = run()
    assert not torch.equal(one, other)
    assert (one.int() - other.int()).abs().max() <= 3  # one in each step
    assert_same(run(), [one, other])


def test_numbers_beyond_the_ranges_of_codes_stay_usable(any_kernels):
    """v overflows, as in torch; a NaN weight with L2 spoils itself alone."""
    make = drawn_in(torch.float32, ((32, 128),))
    opt, [p] = optimizer(any_kernels, "adam", make, variant=RUNNING, optim_bits=8, weight_decay=0.1)
    with torch.no_grad():
        p[3, 5] = math.nan
    for t in range(3):
        g = random_gradient(p, t, 0)
        g[2, 7] = 1e20
        p.grad = g.to(p.device)
        opt.step()
    state = {name: value.cpu() for name, value in opt.state[p].items()}
    m = decode(state["exp_avg"], state["exp_avg_scale"])
    assert int(state["exp_avg"][3, 5]) == quantize.SIGNED.not_a_number
    assert m.isnan().sum() == 1
    assert decode(state["exp_avg_sq"], state["exp_avg_sq_scale"]).isfinite().all()
    assert p.isnan().sum() == 1


@pytest.mark.parametrize(("op", "variant"), [("step", RUNNING), ("accumulate", "optax")])
def test_kernels_of_a_gpu_are_told_the_step_by_which_they_round(monkeypatch, op, variant):
    """Without a GPU: what the ops hand to the compiled module."""
    skip_unless_available("cpp")
    cuda = backends.load("cuda")
    told = []
    for name in ("_launch", "describe_log_tuner", "increment_version"):
        monkeypatch.setattr(cuda, name, lambda *_: None)
    monkeypatch.setattr(cuda, "_native", MagicMock())
    monkeypatch.setattr(cuda, "_scalars", lambda *scalars: told.append(scalars))
    p = torch.nn.Parameter(torch.ones(64, 128))
    opt = MechanicAdamW([p], optim_bits=8, variant=variant, backend="cpp")
    p.grad = torch.ones_like(p)
    opt.step()
    [bucket] = opt._plan.buckets
    bucket.handle = MagicMock()
    getattr(cuda, op)(*[bucket, opt._tuner][: 1 + (op == "step")])
    assert told[0][-1] is bucket.step_count is not None
