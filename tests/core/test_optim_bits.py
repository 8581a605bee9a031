"""optim_bits: which weights' state is narrow; that it is saved, loaded, copied and handed on."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from support.cases import RUNNING, assert_same
from support.tensors import freed
from torch import nn

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, mechanize
from mechanic_fused.backends import quantize
from mechanic_fused.state_formats import SCALE_SUFFIX, decode

BASES = {
    "adamw": (MechanicAdamW, {}),
    "momentum": (MechanicSGD, {"momentum": 0.9}),
    "lion": (MechanicLion, {}),
}


def made(bits=8, base="adamw", shapes=((64, 128), (300,)), dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    cls, own = BASES[base]
    return params, cls(params, lr=1e-2, optim_bits=bits, **own, **options)


def train(params, opt, steps, first=0):
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step(loss=2.0)


def everything(params, opt):
    state = [dict(opt.state[p]) for p in params]
    return copy.deepcopy(([p.detach() for p in params], state))


# Which weights

EXPECTED = {
    (64, 128): (torch.int8, 64),
    (130, 32): (torch.int8, 32),
    (4096, 1): (torch.bfloat16, 0),
    (64, 3, 7, 7): (torch.bfloat16, 0),
    (64, 16, 3, 3): (torch.bfloat16, 0),
    (64, 32, 3, 3): (torch.int8, 32),
    (50, 96): (torch.int8, 32),
    (63, 64): (torch.float32, 0),
    (8192,): (torch.float32, 0),
    (): (torch.float32, 0),
    (0, 128): (torch.float32, 0),
}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_the_format_goes_by_the_shape_of_the_weight(bits, backend):
    params, opt = made(bits, shapes=tuple(EXPECTED), backend=backend)
    train(params, opt, 2)
    for p, (dtype, block) in zip(params, EXPECTED.values(), strict=True):
        state = opt.state[p]
        narrow = bits != 32 and dtype is not torch.float32
        expected = torch.float32 if not narrow else dtype if bits == 8 else torch.bfloat16
        assert state["exp_avg"].dtype is expected
        second = torch.uint8 if expected is torch.int8 else expected
        assert state["exp_avg_sq"].dtype is second
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            assert (name in state) == (expected is torch.int8)
            if name in state:
                assert state[name].shape == (p.shape[0], math.prod(p.shape[1:]) // block)


def test_float64_weights_keep_a_float64_state_and_transposed_ones_no_codes():
    params, opt = made(8, dtype=torch.float64)
    train(params, opt, 1)
    assert opt.state[params[0]]["exp_avg"].dtype is torch.float64
    p = nn.Parameter(torch.randn(128, 64).t())
    opt = MechanicAdamW([p], optim_bits=8)
    train([p], opt, 1)
    assert opt.state[p]["exp_avg"].dtype is torch.bfloat16
    assert opt.state[p]["exp_avg"].stride() == p.stride()


@pytest.mark.parametrize(
    ("dtype", "bits", "more", "most"),
    [
        (torch.float32, 8, {}, 10.2),
        (torch.float32, 8, {"x_ref_every": 8}, 6.7),
        (torch.float32, 16, {}, 12),
        (torch.bfloat16, 8, {}, 8.2),
        (torch.bfloat16, 16, {}, 10),
        (torch.bfloat16, 8, {"bf16_stochastic_round": True}, 6.2),
    ],
    ids=str,
)
def test_bytes_a_weight_are_those_of_the_docs(dtype, bits, more, most):
    [p], opt = made(bits, shapes=((512, 512),), dtype=dtype, **more)
    train([p], opt, 1)
    kept = [p, *(t for t in opt.state[p].values() if t.dim())]
    assert sum(t.numel() * t.element_size() for t in kept) / p.numel() <= most


@pytest.mark.parametrize(
    "options", [{"optim_bits": 8}, {"optim_bits": 16}, {"state_dtype": "param"}]
)
def test_weights_whose_storage_has_gaps_are_trained(options):
    bits = options.get("optim_bits", 32)
    p = nn.Parameter(torch.randn(64, 256).bfloat16()[:, :128])
    rounding = {"bf16_stochastic_round": True} if bits == 16 else {}
    opt = MechanicAdamW([p], lr=1e-2, **options, **rounding)
    train([p], opt, 3)
    assert p.isfinite().all()
    assert opt.state[p]["exp_avg"].dtype is torch.bfloat16
    assert opt.state[p]["step"] == 3


def test_a_fallback_takes_a_checkpoint_of_codes():
    class Own(torch.optim.AdamW):
        pass

    params, opt = made(8, shapes=((64, 128),))
    train(params, opt, 3)
    expected = wide(opt.state[params[0]], "exp_avg")
    for base in (Own, torch.optim.RAdam):
        p = nn.Parameter(torch.randn(64, 128))
        other = mechanize(base)([p], lr=1e-2)
        other.load_state_dict(opt.state_dict())
        other.plan_step()
        assert_same(other.state[p]["exp_avg"], expected)
        assert not any(name.endswith(SCALE_SUFFIX) for name in other.state[p])
        train([p], other, 2, 3)
        assert p.isfinite().all()
        other.param_groups[0]["optim_bits"] = 8
        with pytest.raises(ValueError, match="needs a fused update"):
            other.step()


@pytest.mark.parametrize("variant", [RUNNING, "optax"])
def test_a_base_without_a_state_has_nothing_to_narrow(variant):
    p = nn.Parameter(torch.ones(64, 128))
    opt = MechanicSGD([p], lr=0.1, optim_bits=8, variant=variant)
    train([p], opt, 2)
    assert all(t.dtype is torch.float32 for t in opt.state[p].values())


def test_a_group_may_have_bits_of_its_own_and_change_them():
    params, opt = made(8, shapes=((64, 128),))
    embedding = nn.Parameter(torch.randn(64, 128))
    opt.add_param_group({"params": [embedding], "optim_bits": 32})
    both = [*params, embedding]
    train(both, opt, 2)
    assert [opt.state[p]["exp_avg"].dtype for p in both] == [torch.int8, torch.float32]
    before = decode(opt.state[both[0]]["exp_avg"], opt.state[both[0]]["exp_avg_scale"])
    opt.param_groups[0]["optim_bits"] = 32
    opt.plan_step()
    assert_same(opt.state[both[0]]["exp_avg"], before)
    assert "exp_avg_scale" not in opt.state[both[0]]
    train(both, opt, 1, 2)
    opt.param_groups[0]["optim_bits"] = 7
    with pytest.raises(ValueError, match="optim_bits must be one of"):
        opt.step()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda ps: MechanicAdamW(ps, optim_bits=8, amsgrad=True), "amsgrad=True has no fused"),
        (lambda ps: mechanize(torch.optim.RAdam)(ps, optim_bits=16), "RAdam has no fused update"),
        (lambda ps: MechanicAdamW(ps, optim_bits=8, state_dtype="param"), "state_dtype=None"),
        (lambda ps: MechanicAdamW(ps, bf16_stochastic_round=True), "optim_bits=16 or 8 beside it"),
        (
            lambda ps: MechanicAdamW(ps, optim_bits=8, bf16_stochastic_round=True, variant="optax"),
            "expected variant='running'",
        ),
        (lambda ps: MechanicAdamW([{"params": ps, "optim_bits": 3}]), "one of 32, 16, 8, got 3"),
    ],
)
def test_what_cannot_be_is_refused_at_the_constructor(make, text):
    with pytest.raises(ValueError, match=text):
        make([nn.Parameter(torch.ones(64, 64))])


# Saved and loaded

FORMS = list(itertools.product(["adamw", "momentum", "lion"], [RUNNING, "optax"], [8, 16]))


@pytest.mark.parametrize(("base", "variant", "bits"), FORMS)
@pytest.mark.parametrize("how", ["state_dict", "file", "copy", "pickle"])
def test_a_run_resumes_to_the_bit(base, variant, bits, how):
    params, opt = made(bits, base, variant=variant, dtype=torch.bfloat16)
    train(params, opt, 5)
    if how in ("copy", "pickle"):
        through = copy.deepcopy if how == "copy" else lambda x: pickle.loads(pickle.dumps(x))
        others, other = through((params, opt))
    else:
        others, other = made(bits, base, variant=variant, dtype=torch.bfloat16)
        with torch.no_grad():
            for p, q in zip(others, params, strict=True):
                p.copy_(q)
        saved = opt.state_dict()
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other.load_state_dict(saved)
    for of_one in ((params, opt), (others, other)):
        train(*of_one, 5, 5)
    assert_same(everything(others, other), everything(params, opt))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations([32, 16, 8], 2)))
@pytest.mark.parametrize("variant", [RUNNING, "optax"])
def test_a_checkpoint_loads_into_other_bits(base, first, second, variant):
    """To more bits nothing is lost; to fewer, half a code."""
    params, opt = made(first, base, variant=variant)
    train(params, opt, 5)
    others, other = made(second, base, variant=variant)
    other.load_state_dict(opt.state_dict())
    other.plan_step()
    assert other.param_groups[0].get("optim_bits", 32) == second
    name = {"momentum": "momentum_buffer"}.get(base, "exp_avg")
    for entry in (name, "exp_avg_sq") if base == "adamw" else (name,):
        before, after = (wide(o.state[p[0]], entry) for o, p in ((opt, params), (other, others)))
        if second == 32:
            assert_same(after, before)
        else:
            code = 2.0**-8 if second == 16 else 16 / 127
            largest = before.abs().view(-1, 64).amax(1, keepdim=True)
            assert ((after - before).view(-1, 64).abs() <= code * largest).all()
    if variant == "optax":
        before, after = (wide(o.state[p[0]], "delta") for o, p in ((opt, params), (other, others)))
        last_place = {32: 0.0, 16: 2.0**-8, 8: 2.0**-14}[second]
        largest = before.abs().view(-1, 64).amax(1, keepdim=True)
        assert ((after - before).view(-1, 64).abs() <= last_place * largest).all()
        assert opt.state[params[1]]["delta"].dtype is torch.float32
    for entry in (name, "exp_avg_sq") if base == "adamw" else (name,):
        # As at the start of a run the small one is in float32.
        assert_same(other.state[others[1]][entry], opt.state[params[1]][entry])
    train(others, other, 2, 5)
    assert all(p.isfinite().all() for p in others)


def wide(state, name):
    scales = state.get(name + SCALE_SUFFIX)
    return state[name].float() if scales is None else decode(state[name], scales)


def test_a_plain_checkpoint_of_adamw_loads_and_the_base_takes_the_state_back():
    params, _ = made()
    plain = torch.optim.AdamW(params, lr=1e-3)
    for p in params:
        p.grad = torch.randn_like(p)
    plain.step()
    opt = MechanicAdamW(params, lr=1.0, optim_bits=8)
    opt.load_state_dict(plain.state_dict())
    train(params, opt, 1)
    state = opt.state[params[0]]
    assert state["exp_avg"].dtype is torch.int8
    assert state["step"] == 2
    base = opt.to_base()
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same(base.state[params[0]][name], wide(state, name))
    assert set(base.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    base.step()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_delta_has_16_bits_beside_codes(weights):
    params, opt = made(8, variant="annealed", dtype=weights)
    train(params, opt, 2)
    state, small = opt.state[params[0]], opt.state[params[1]]
    assert (state["delta"].dtype, state["delta_scale"].dtype) == (torch.int16, torch.float32)
    assert state["delta_scale"].shape == state["exp_avg_scale"].shape
    assert small["delta"].dtype is torch.float32
    assert "delta_scale" not in small
    moved = wide(state, "delta")
    train(params, opt, 1, 2)
    assert not torch.equal(wide(state, "delta"), moved)
    opt.reset_scale()
    assert (wide(state, "delta") == 0).all()


def test_an_exact_form_in_8_bits_goes_on_in_the_running_form():
    params, opt = made(8, variant="annealed")
    train(params, opt, 3)
    others, other = made(8)
    other.load_state_dict(opt.state_dict())
    train(others, other, 1, 3)
    assert not {"delta", "delta_scale"} & other.state[others[0]].keys()


def test_low_bits_come_and_go_with_the_option():
    """Who drops them rounds to the weights that everybody sees; who has none starts them at 0."""
    rounding = {"dtype": torch.bfloat16, "bf16_stochastic_round": True}
    params, opt = made(8, **rounding)
    train(params, opt, 3)
    assert "x_low" not in opt.state[params[0]]
    assert "x_low" in opt.state[params[1]]
    others, other = made(8, dtype=torch.bfloat16)
    other.load_state_dict(opt.state_dict())
    other.plan_step()
    assert (other.state[others[0]]["x_low"] == 0).all()
    train(others, other, 1, 3)
    params, opt = made(8, **rounding)
    opt.load_state_dict(other.state_dict())
    train(params, opt, 1, 4)
    assert "x_low" not in opt.state[params[0]]


def test_rows_that_are_replaced_keep_their_codes():
    params, opt = made(8, shapes=((64, 128),))
    train(params, opt, 3)
    [old] = params
    before = {name: value.clone() for name, value in opt.state[old].items()}
    kept = torch.tensor([3, 3, -1, *range(60)])
    new = nn.Parameter(old.detach()[kept].clone())
    opt.replace_parameter(old, new, kept)
    for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"):
        assert_same(opt.state[new][name][3:], before[name][:60])
        assert (opt.state[new][name][2] == 0).all()
    train([new], opt, 1, 3)
    assert new.isfinite().all()


REPLACED = {
    "removed": None,
    "of another shape": torch.ones(3),
    "in another dtype": torch.ones(64, 2, dtype=torch.float64),
    "without storage": torch.ones(64, 2, device="meta"),
    "freed": freed(torch.ones(64, 2)),
}


@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_scales_that_no_kernel_can_read_are_refused_before_a_step(backend, how):
    params, opt = made(8, backend=backend)
    train(params, opt, 2)
    before = everything(params, opt)
    kept = opt.state[params[0]].pop("exp_avg_scale")
    if REPLACED[how] is not None:
        opt.state[params[0]]["exp_avg_scale"] = REPLACED[how]
    for p in params:
        p.grad = torch.ones_like(p)
    reason = r"exp_avg of a weight .* holds codes: expected exp_avg_scale"
    with pytest.raises(ValueError, match=reason):
        opt.step()
    opt.state[params[0]]["exp_avg_scale"] = kept
    assert_same(everything(params, opt), before)
    train(params, opt, 1, 2)


def test_state_that_was_replaced_is_taken():
    """As after a load by hand, or in shared memory: at another address, the same numbers."""
    pairs = [made(8) for _ in range(2)]
    for t in range(3):
        for params, opt in pairs:
            train(params, opt, 1, t)
        opt.state[params[0]]["exp_avg_scale"] = opt.state[params[0]]["exp_avg_scale"].clone()
        opt.state[params[0]]["exp_avg"].share_memory_()
    assert_same(*(everything(*pair) for pair in pairs))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_released_gradients_leave_the_same_codes(backend):
    found = []
    for released in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
        opt = MechanicAdamW(net.parameters(), lr=1e-2, optim_bits=8, s_init=0.1, backend=backend)
        opt.freeze_scale()
        if released:
            opt.release_gradients()
        for t in range(4):
            x = torch.randn(8, 128, generator=torch.Generator().manual_seed(t))
            net(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        found.append(everything(list(net.parameters()), opt))
    assert_same(*found)


def test_a_small_update_of_v_is_not_lost_in_mean():
    """Of many elements with the same v and gradient some are rounded up, as many as due."""
    p = nn.Parameter(torch.zeros(64, 128))
    opt = MechanicAdamW([p], lr=0.0, betas=(0.9, 0.999), optim_bits=8, s_init=1.0)
    g = torch.ones(64, 128)
    g[:, 0] = 10.0  # of each block the scale
    g[:, 64] = 10.0
    for _ in range(200):
        p.grad = g.clone()
        opt.step()
    v = wide(opt.state[p], "exp_avg_sq")
    rest = torch.ones(128, dtype=torch.bool)
    rest[[0, 64]] = False
    assert float(v[:, rest].mean()) == pytest.approx(1 - 0.999**200, rel=0.02)
    assert quantize.UNSIGNED.top == 255
