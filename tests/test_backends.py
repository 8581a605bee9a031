"""cpp against reference: the same bits of x, Δ and state at all sizes, dtypes and options."""

import inspect

import pytest
import torch
from cases import (
    FEW,
    FUSED,
    QUICK,
    SIZES,
    STEPS,
    WIDE,
    assert_same,
    assert_within,
    ulp,
)
from lockstep import FLOAT_SUM_RTOL, assert_lockstep, random_gradient, share_scale, state_of, twins

from mechanic_fused import backends
from mechanic_fused.backends import formulas, layout

VERBS = ("prepare", "norm", "accumulate", "tune", "apply", "measure")

CASES = {
    "sgd": ("sgd", {"lr": 0.05}),
    "sgd l2": ("sgd", {"lr": 0.05, "weight_decay": 0.1}),
    "momentum": ("sgd", {"lr": 0.05, "momentum": 0.9}),
    "dampening": ("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": ("adam", {"lr": 1.0}),
    "adam l2": ("adam", {"lr": 0.7, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw": ("adamw", {"lr": 1.0, "weight_decay": 0.1}),
    "adamw without decay": ("adamw", {"lr": 1.0, "weight_decay": 0.0}),
    "adamw maximize": ("adamw", {"lr": 1.0, "weight_decay": 0.1, "maximize": True}),
    "lion": ("lion", {"lr": 0.5}),
    "lion decay": ("lion", {"lr": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.1}),
}
FULL = ("dampening", "adam l2", "adamw", "lion decay")  # every stream of every kernel
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)

# How far a sum may cancel in these runs: its error is that much larger beside it.
CANCELS = 10
# Neighbours of a misaligned weight: a kernel that writes too far would write here.
GUARD = 7.0
# Beyond it cpp writes past the caches, with another kind of store; odd, so that a tail remains.
STREAMED = (1 << 22) + 13


def main_combinations(cases):
    """Each case in float32, one in each dtype; every other combination is slow."""
    for case in cases:
        for dtype in DTYPES:
            main = dtype is torch.float32 or case == "adamw"
            marks = [] if main else [pytest.mark.slow]
            yield pytest.param(case, dtype, id=f"{case}-{dtype}", marks=marks)


@pytest.fixture
def shared_scale(cpp, monkeypatch):
    return share_scale(monkeypatch)


def of_sizes(dtype, sizes=SIZES):
    def make():
        rng = torch.Generator().manual_seed(0)
        return [
            torch.nn.Parameter(torch.randn(n, generator=rng, dtype=torch.float64).to(dtype))
            for n in sizes
        ]

    return make


def test_backends_have_the_same_functions():
    modules = {row.name: backends.load(row.name) for row in backends.table() if row.available}
    signatures = {
        name: {verb: list(inspect.signature(getattr(module, verb)).parameters) for verb in VERBS}
        for name, module in modules.items()
    }
    for name, signature in signatures.items():
        assert signature == signatures["reference"], name


def test_memory_that_nobody_wrote_is_nan():
    """Or these tests would not see a kernel that reads it."""
    assert torch.empty(SIZES[-1]).isnan().all()


def test_there_is_an_update_for_every_kind():
    assert tuple(formulas.UPDATES) == layout.KINDS == tuple(layout.STATES)


@pytest.mark.parametrize(("case", "dtype"), [*main_combinations(CASES)])
def test_every_base_and_dtype_gives_the_bits_of_the_reference(shared_scale, case, dtype):
    base, options = CASES[case]
    assert_lockstep(shared_scale, twins(base, of_sizes(dtype), **QUICK, **options), STEPS)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", FULL)
def test_narrow_state_gives_the_bits_of_the_reference(shared_scale, case, dtype):
    base, options = CASES[case]
    pairs = twins(base, of_sizes(dtype), narrow_state=True, **QUICK, **options)
    assert_lockstep(shared_scale, pairs, STEPS)
    for opt, params in pairs:
        kept = layout.STATES[fused_bases.TABLE[opt._base].kind(opt.param_groups[0])]
        assert kept
        for p in params:
            assert all(opt.state[p][name].dtype is dtype for name in kept)
            assert opt.state[p]["delta"].dtype is WIDE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["sgd", *FULL])
def test_narrow_delta_gives_the_bits_of_the_reference(shared_scale, case, dtype):
    base, options = CASES[case]
    pairs = twins(base, of_sizes(dtype), narrow_delta=True, **QUICK, **options)
    assert_lockstep(shared_scale, pairs, STEPS)
    kept = torch.float64 if dtype is torch.float64 else torch.bfloat16
    assert all(opt.state[p]["delta"].dtype is kept for opt, params in pairs for p in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_whole_run_agrees_without_help(cpp, dtype):
    """Here S is each one's own."""
    found = []
    for backend in ("reference", cpp):
        params = of_sizes(dtype, SIZES[:-1])()
        opt = FUSED["adamw"](params, backend=backend, **QUICK, **CASES["adamw"][1])
        for t in range(STEPS):
            for i, p in enumerate(params):
                p.grad = random_gradient(p, t, i)
            opt.step()
        found.append([opt.scale, *params])
    (scale, *weights), (own_scale, *own_weights) = found
    rtol = STEPS * CANCELS * FLOAT_SUM_RTOL
    torch.testing.assert_close(own_scale, scale, rtol=rtol, atol=0)
    for own, x in zip(own_weights, weights, strict=True):
        assert_within(own, x, max(ulp(x), rtol * float(x.detach().abs().max())) if len(x) else 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_weight_of_every_size(shared_scale, size, dtype):
    sizes = (size, 1)  # one more, so that there is always something to learn from
    pairs = twins("adamw", of_sizes(dtype, sizes), **QUICK, **CASES["adamw"][1])
    assert_lockstep(shared_scale, pairs, FEW)


def test_many_weights_beside_a_few_large_ones(shared_scale):
    sizes = [1 + i % 17 for i in range(300)] + [20000, 16384, 16385]
    assert_lockstep(shared_scale, twins("adamw", of_sizes(torch.float32, sizes), **QUICK), FEW)


@pytest.mark.parametrize("offset", [1, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_weights_and_gradients(shared_scale, dtype, offset):
    buffers = []

    def make():
        params = []
        for n in SIZES:
            buffer = torch.full((n + 2 * offset,), GUARD, dtype=dtype)
            buffer[offset : offset + n] = of_sizes(dtype, (n,))()[0].detach()
            buffers.append(buffer)
            params.append(torch.nn.Parameter(buffer[offset : offset + n]))
        return params

    def gradient(p, t, i):
        room = torch.empty(p.numel() + offset, dtype=dtype)
        room[offset:] = random_gradient(p, t, i)
        return room[offset:]

    pairs = twins("adamw", make, **QUICK, **CASES["adamw"][1])
    assert all(p.data_ptr() % 16 for _, params in pairs for p in params if p.numel() > 1)
    assert_lockstep(shared_scale, pairs, FEW, gradient)
    for buffer in buffers:
        assert (buffer[:offset] == GUARD).all()
        assert (buffer[len(buffer) - offset :] == GUARD).all()


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "with gaps": lambda x: torch.cat([x, x], dim=3)[..., ::2],
    "0-d": lambda x: x[0, 0, 0, 0].clone(),
    "no elements": lambda x: x[:0].clone(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(shared_scale, dtype):
    def make():
        rng = torch.Generator().manual_seed(0)
        weights = []
        for lay in LAYOUTS.values():
            x = torch.randn(4, 3, 5, 7, generator=rng, dtype=torch.float64).to(dtype)
            weights.append(torch.nn.Parameter(lay(x)))
        return weights

    assert_lockstep(shared_scale, twins("adamw", make, **QUICK, **CASES["adamw"][1]), FEW)


@pytest.mark.parametrize("scale", ["global", "group", "parameter"])
def test_scales(shared_scale, scale):
    def groups(params):
        return [
            {"params": params[:2], "lr": 1.0, "weight_decay": 0.1},
            {"params": params[2:], "lr": 0.5, "betas": (0.7, 0.9), "eps": 1e-6},
        ]

    pairs = twins("adamw", of_sizes(torch.float32), groups=groups, scale=scale, **QUICK)
    assert_lockstep(shared_scale, pairs, STEPS)
    rows = {"global": 1, "group": 2, "parameter": len(SIZES)}[scale]
    assert all(opt.scale.shape == (rows,) for opt, _ in pairs)


@pytest.mark.parametrize(
    "tuner_betas", [(0.5,), (0.9, 0.99), (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 0.9999, 0.99999)]
)
@pytest.mark.parametrize("variant", ["optax", "paper", "pytorch"])
def test_tuner_variants_and_betas(shared_scale, variant, tuner_betas):
    options = {"variant": variant, "tuner_betas": tuner_betas, "s_decay": 0.1, "tuner_eps": 1e-4}
    assert_lockstep(
        shared_scale,
        twins("sgd", of_sizes(torch.float64, SIZES[:-1]), lr=0.05, **QUICK, **options),
        STEPS,
    )


@pytest.mark.parametrize("case", FULL)
def test_gradients_that_come_and_go(shared_scale, case):
    def gradient(p, t, i):
        return None if (t + i) % 3 == 0 else random_gradient(p, t, i)

    base, options = CASES[case]
    assert_lockstep(
        shared_scale, twins(base, of_sizes(torch.float32), **QUICK, **options), STEPS, gradient
    )


@pytest.mark.parametrize(("case", "dtype"), [*main_combinations(FULL)])
def test_elements_that_are_not_finite(shared_scale, case, dtype):
    bad = {1: torch.nan, 3: torch.inf, 4: -torch.inf}

    def gradient(p, t, i):
        g = random_gradient(p, t, i)
        if t in bad:
            g[:: 1 + i] = bad[t]
        return g

    base, options = CASES[case]
    pairs = twins(base, of_sizes(dtype), **QUICK, **options)
    assert_lockstep(shared_scale, pairs, STEPS, gradient)
    for opt, params in pairs:
        assert opt.nonfinite_steps == len(bad)
        assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_16_bit_weight_and_gradient_is_read_and_rounded_alike(shared_scale, dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.where(every.isfinite(), every, torch.zeros((), dtype=dtype))

    def gradient(p, t, i):
        return (every if i == 0 else every.flip(0)).clone()

    def make():
        # Opposite orders: Δ of every exponent meets weights of every exponent.
        return [torch.nn.Parameter(finite.clone()), torch.nn.Parameter(finite.clone())]

    assert_lockstep(shared_scale, twins("sgd", make, lr=1.0, s_init=1.0), FEW, gradient)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_weight_that_has_not_been_trained_keeps_its_bits(backend, dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    still = torch.nn.Parameter(every[every.isfinite()])
    before = still.detach().clone()
    trained = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    opt = FUSED["sgd"]([still, trained], backend=backend, lr=1.0, **QUICK)
    for t in range(FEW):
        trained.grad = random_gradient(trained, t, 0)
        opt.step()
    assert (trained != 1).all()
    assert_same(still.detach(), before)


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.float32, 1),
        (torch.bfloat16, 0),
        pytest.param(torch.float32, 0, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_that_are_written_past_the_caches(shared_scale, dtype, offset):
    start = torch.randn(STREAMED + offset, generator=torch.Generator().manual_seed(0)).to(dtype)
    pattern = torch.randn(STREAMED, generator=torch.Generator().manual_seed(1)).to(dtype)

    def make():
        return [torch.nn.Parameter(start.clone()[offset:])]

    assert_lockstep(
        shared_scale, twins("sgd", make, lr=0.1, **QUICK), 2, lambda p, t, i: pattern * (t + 1)
    )


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("base", FUSED)
def test_threads_do_not_change_a_bit(cpp, base, dtype):
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        params = of_sizes(dtype)()
        opt = FUSED[base](params, backend=cpp, **QUICK)
        for t in range(FEW):
            for i, p in enumerate(params):
                p.grad = random_gradient(p, t, i)
            opt.step()
        found.append([*state_of(opt, params), opt.scale])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_a_run_repeats_to_the_bit(backend):
    found = []
    for _ in range(2):
        params = of_sizes(torch.float32)()
        opt = FUSED["adamw"](params, backend=backend, **QUICK)
        for t in range(FEW):
            for i, p in enumerate(params):
                p.grad = random_gradient(p, t, i)
            opt.step()
        found.append([*state_of(opt, params), opt.scale])
    assert_same(found[1], found[0])
