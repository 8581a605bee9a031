"""What every backend promises: the reference's bits of x, Δ and state, and its sums.

Each backend steps in lockstep with the reference, see support/lockstep.py.
"""

import inspect

import pytest
import torch
from support.cases import (
    CASES,
    DTYPES,
    FEW,
    FULL,
    OPTIONS,
    QUICK,
    SCALE_PER,
    SIZES,
    STEPS,
    WIDE,
    WIDTHS,
    assert_same,
    assert_within,
    differs,
    ulp,
)
from support.lockstep import (
    copied,
    drawn,
    give_gradients,
    optimizer,
    random_gradient,
    storage_of,
    written,
)

from mechanic_fused import backends, fused_bases
from mechanic_fused.backends import layout

GUARD = 7.0
"""What is beside a misaligned weight: a kernel that writes too far would write there."""

CANCELS = 10
"""How many times larger than a sum its terms are in these runs, and so its error beside it."""

OPS = ("norm", "accumulate", "tune", "apply", "measure", "step", "log_tune")
MUON_OPS = ("muon_momentum", "muon_update")

NARROW = (torch.bfloat16, torch.float16)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def dtypes(*quick, among=DTYPES):
    """The dtypes, of which all but some are slow."""
    values = [dtype if dtype in quick else slow(dtype) for dtype in among]
    return pytest.mark.parametrize("dtype", values, ids=str)


def every_bit_pattern(dtype):
    """Return all numbers of a 16-bit dtype."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def test_every_backend_has_the_signatures_of_the_protocol():
    protocol = {
        name: list(inspect.signature(op).parameters)[1:]
        for name, op in vars(backends.Backend).items()
        if inspect.isfunction(op) and not name.startswith("_")
    }
    assert {"prepare", *OPS, *MUON_OPS} == protocol.keys()
    for row in backends.table():
        if row.available:
            module = backends.load(row.name)
            for name, parameters in protocol.items():
                assert list(inspect.signature(getattr(module, name)).parameters) == parameters
            assert all(chunk > 0 for chunk in module.CHUNK.values())
            assert isinstance(module.COPIES_TABLES, bool)


def test_memory_that_nobody_wrote_is_nan():
    """Or these tests would not see a kernel that reads it."""
    assert torch.empty(SIZES[-1]).isnan().all()


@pytest.mark.parametrize("base", ["adamw", "lion"])
def test_a_decay_at_an_lr_of_0_leaves_delta_as_it_is(lockstep, base):
    """Of an infinite weight, too: 0 times it would be NaN."""

    def make():
        return [torch.ones(7), torch.tensor([1.0, torch.inf])]

    def groups(params):
        return [{"params": params[:1]}, {"params": params[1:], "lr": 0.0}]

    for opt, params in lockstep.run(base, make, groups=groups, weight_decay=0.1):
        assert not opt.state[params[1]]["delta"].any()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype) if dtype is torch.float32 or case in FULL else slow(case, dtype)
        for case in CASES
        for dtype in DTYPES
    ],
    ids=str,
)
def test_every_case_and_dtype_has_the_bits_of_the_reference(lockstep, case, dtype):
    base, options = CASES[case]
    lockstep.run(base, drawn(dtype, lockstep.kernels.sizes), **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_stay_those_of_the_reference_over_many_steps(lockstep, case, dtype):
    base, options = CASES[case]
    lockstep.run(base, drawn(dtype, lockstep.kernels.sizes), STEPS, **options)


@dtypes(torch.bfloat16, among=NARROW)
@pytest.mark.parametrize("case", FULL)
def test_state_in_the_dtype_of_weights_has_the_bits_of_the_reference(lockstep, case, dtype):
    base, options = CASES[case]
    make = drawn(dtype, lockstep.kernels.sizes)
    for opt, params in lockstep.run(base, make, state_dtype="param", **options):
        names = layout.STATES[fused_bases.TABLE[opt._base].kind(opt.param_groups[0])]
        assert names
        for p in params:
            assert all(opt.state[p][name].dtype is dtype for name in names)
            assert opt.state[p]["delta"].dtype is WIDE[dtype]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype) if case == "sgd" or dtype is torch.bfloat16 else slow(case, dtype)
        for case in ("sgd", *FULL)
        for dtype in DTYPES
    ],
    ids=str,
)
def test_a_bfloat16_delta_has_the_bits_of_the_reference(lockstep, case, dtype):
    base, options = CASES[case]
    make = drawn(dtype, lockstep.kernels.sizes)
    kept = torch.float64 if dtype is torch.float64 else torch.bfloat16
    for opt, params in lockstep.run(base, make, delta_dtype=torch.bfloat16, **options):
        assert all(opt.state[p]["delta"].dtype is kept for p in params)


@dtypes(torch.bfloat16, among=NARROW)
def test_narrow_state_beside_a_narrow_delta_has_the_bits_of_the_reference(lockstep, dtype):
    narrow = {"state_dtype": "param", "delta_dtype": torch.bfloat16}
    lockstep.run("adamw", drawn(dtype, lockstep.kernels.sizes), **narrow, **OPTIONS["adamw"])


@dtypes(torch.float32, among=[d for d in DTYPES if d is not torch.float64])
def test_a_whole_run_agrees_where_each_learns_from_its_own_sums(kernels, monkeypatch, dtype):
    reference = kernels._replace(name="reference", device="cpu")
    found = []
    for of_one in (reference, kernels):
        opt, params = optimizer(of_one, "adamw", drawn(dtype, (3, 1025)), **OPTIONS["adamw"])
        for t in range(STEPS):
            give_gradients(params, t)
            opt.step()
        found.append([opt.scale.cpu(), *(p.detach().cpu() for p in params)])
    (scale, *weights), (own_scale, *own_weights) = found
    rtol = STEPS * CANCELS * kernels.sum_rtol(dtype)
    torch.testing.assert_close(own_scale, scale, rtol=rtol, atol=0)
    for own, x in zip(own_weights, weights, strict=True):
        assert_within(own, x, max(ulp(x), rtol * float(x.abs().max())))


@pytest.mark.parametrize("size", SIZES)
@dtypes(torch.float32)
def test_a_weight_of_any_size_has_the_bits_of_the_reference(lockstep, size, dtype):
    sizes = (min(size, max(lockstep.kernels.sizes)), 1)  # one more, so that something is learned
    lockstep.run("adamw", drawn(dtype, sizes), **OPTIONS["adamw"])


def test_many_small_weights_beside_a_few_large_ones(lockstep):
    chunk = lockstep.kernels.chunk
    count = 20 if chunk < 1 << 13 else 300
    sizes = [1 + i % 17 for i in range(count)] + [chunk, chunk + 1]
    lockstep.run("adamw", drawn(torch.float32, sizes), 3, **OPTIONS["adamw"])


@dtypes(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("offset", [1, slow(3), slow(4), slow(5)])
@pytest.mark.parametrize("delta", [None, slow(torch.bfloat16)], ids=str)
def test_misaligned_weights_and_gradients(lockstep, dtype, offset, delta):
    def inside(x):
        room = torch.full((len(x) + 2 * offset,), GUARD, dtype=dtype)
        room[offset : len(room) - offset] = x
        return room[offset : len(room) - offset]

    sizes = lockstep.kernels.sizes
    pairs = lockstep.run(
        "adamw",
        lambda: [inside(x) for x in drawn(dtype, sizes)()],
        gradient=lambda p, t, i: inside(random_gradient(p, t, i)),
        delta_dtype=delta,
        **OPTIONS["adamw"],
    )
    for p in (p for _, params in pairs for p in params):
        room = storage_of(p.detach())
        assert p.data_ptr() - room.data_ptr() == offset * p.element_size() or not len(p)
        assert (room[:offset] == GUARD).all()
        assert (room[len(room) - offset :] == GUARD).all()


@dtypes(torch.float32, torch.bfloat16)
def test_misaligned_gradients_of_aligned_weights(lockstep, dtype):
    """NaN before and after them would show in the sums."""

    def shifted(p, t, i):
        room = torch.full((p.numel() + 2,), torch.nan, dtype=dtype)
        room[1:-1] = random_gradient(p, t, i)
        return room[1:-1]

    make = drawn(dtype, lockstep.kernels.sizes)
    lockstep.run("adamw", make, gradient=shifted, **OPTIONS["adamw"])


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "with gaps": lambda x: torch.cat([x, x], dim=3)[..., ::2],
    "0-d": lambda x: x[0, 0, 0, 0].clone(),
    "no elements": lambda x: x[:0].clone(),
}


@dtypes(torch.float32, torch.bfloat16, among=WIDTHS)
@pytest.mark.parametrize("delta", [None, torch.bfloat16], ids=str)
def test_weights_of_any_strides(lockstep, dtype, delta):
    """Random bits go by the place in memory, whatever the axes."""

    def make():
        rng = torch.Generator().manual_seed(0)
        drawn_now = [
            torch.randn(4, 3, 5, 7, generator=rng, dtype=torch.float64).to(dtype) for _ in LAYOUTS
        ]
        return [lay(x) for lay, x in zip(LAYOUTS.values(), drawn_now, strict=True)]

    for opt, params in lockstep.run("adamw", make, delta_dtype=delta, **OPTIONS["adamw"]):
        dense = [p for name, p in zip(LAYOUTS, params, strict=True) if name != "with gaps"]
        assert all(opt.state[p]["delta"].stride() == p.stride() for p in dense)


@pytest.mark.parametrize("few_chunks", [True, slow(False)])
@pytest.mark.parametrize("scale_per", SCALE_PER)
def test_scales_of_no_chunk_of_one_and_of_many(lockstep, monkeypatch, scale_per, few_chunks):
    """Their sums are reduced in one level or two; and by themselves where no chunk does it."""

    def groups(params):
        return [
            {"params": params[:3], "lr": 1.0, "weight_decay": 0.1},
            {"params": params[3:4], "lr": 2.0},
            {"params": params[4:], "lr": 0.5, "betas": (0.7, 0.9), "eps": 1e-6},
        ]

    largest = max(lockstep.kernels.sizes)
    sizes = (5, 1025, 4100, 0, 3, 0, largest)
    if not few_chunks:
        # On a GPU more than one group of chunks: a block reduces 256.
        lockstep.kernels.set_chunk(monkeypatch, 1 << 8)
    make = drawn(torch.float32, sizes)
    pairs = lockstep.run("adamw", make, groups=groups, scale_per=scale_per)
    rows = {"model": 1, "group": 3, "parameter": len(sizes)}[scale_per]
    assert all(opt.scale.shape == (rows,) for opt, _ in pairs)
    for bucket in pairs[1][0]._plan.buckets:
        tickets = getattr(bucket.handle, "tickets", None)
        assert tickets is None or not tickets.any()


@pytest.mark.parametrize("variant", ["optax", "paper", "pytorch", "annealed"])
@pytest.mark.parametrize("betas", [(0.5,), tuple(1 - 0.5**i for i in range(1, 10))], ids=len)
def test_tuner_variants_and_betas(lockstep, variant, betas):
    """Also with a falling lr, which anneals S in one of them."""
    options = {"variant": variant, "tuner_betas": betas, "s_decay": 0.1, "tuner_eps": 1e-4}
    make = drawn(torch.float64, (63,) * 3)
    pairs = lockstep.twins("sgd", make, lr=0.05, scale_per="parameter", **options)
    for t in range(STEPS):
        for opt, _ in pairs:
            opt.param_groups[0]["lr"] = 0.05 * (1 - t / STEPS)
        lockstep.step(pairs, t, random_gradient)
    assert (pairs[1][0].scale != pairs[1][0].scale[0]).any()


def test_a_frozen_scale_stays_while_the_weights_move(lockstep):
    pairs = lockstep.run("adamw", drawn(torch.float32, (63,)), 3)
    (opt, [p]) = pairs[1]
    scale, x = opt.scale.clone(), p.detach().clone()
    for one, _ in pairs:
        one.freeze_scale()
    lockstep.step(pairs, 3, random_gradient)
    assert_same(opt.scale, scale)
    assert (p != x).any()


@pytest.mark.parametrize("case", FULL)
def test_gradients_that_come_and_go(lockstep, case):
    def gradient(p, t, i):
        return None if (t + i) % 3 == 0 else random_gradient(p, t, i)

    base, options = CASES[case]
    make = drawn(torch.float32, lockstep.kernels.sizes)
    lockstep.run(base, make, gradient=gradient, **options)


@pytest.mark.parametrize("case", FULL)
@dtypes(torch.bfloat16)
def test_gradient_elements_that_are_not_finite(lockstep, case, dtype):
    bad = {1: torch.nan, 3: torch.inf, 4: -torch.inf}

    def gradient(p, t, i):
        g = random_gradient(p, t, i)
        if t in bad:
            g[:: 1 + i] = bad[t]
        return g

    base, options = CASES[case]
    make = drawn(dtype, lockstep.kernels.sizes)
    for opt, params in lockstep.run(base, make, gradient=gradient, **options):
        assert opt.nonfinite_steps == len(bad)
        assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_neither_overflow_nor_vanish(lockstep, size):
    make = drawn(torch.float32, lockstep.kernels.sizes)
    pairs = lockstep.run("adam", make, gradient=lambda p, t, i: size * random_gradient(p, t, i))
    squares = pairs[1][0]._plan.buckets[0].sums[:, layout.GG]
    assert squares.isfinite().all()
    assert (squares > 0).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_16_bit_weight_and_gradient_is_read_and_rounded_alike(lockstep, dtype):
    every = every_bit_pattern(dtype)
    finite = torch.where(every.isfinite(), every, torch.zeros((), dtype=dtype))

    def gradient(p, t, i):
        return (every if i == 0 else every.flip(0)).clone()

    # Opposite orders: Δ of every exponent meets weights of every exponent.
    make = lambda: [finite.clone(), finite.clone()]  # noqa: E731
    lockstep.run("sgd", make, 2, gradient, lr=1.0, s_init=1.0)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_weight_that_has_not_been_trained_keeps_its_bits(any_kernels, dtype):
    every = every_bit_pattern(dtype)
    start = every[every.isfinite()]
    make = lambda: [start.clone(), torch.ones(3, dtype=dtype)]  # noqa: E731
    opt, (still, trained) = optimizer(any_kernels, "sgd", make, lr=1.0)
    for t in range(2):
        give_gradients([trained], t)
        opt.step()
    assert (trained != 1).all()
    assert_same(still.detach().cpu(), start)


def test_grad_scaler_divides_the_gradients_and_skips_a_step_that_overflows(lockstep):
    pairs = lockstep.twins(
        "adamw", drawn(torch.float16, lockstep.kernels.sizes), **OPTIONS["adamw"]
    )
    lockstep.step(pairs, 0, random_gradient)
    for t in (1, 2):
        for found in (1.0, 0.0):
            before = copied(*pairs[1])
            for opt, params in pairs:
                # Not a power of two: the multiplier is rounded too.
                opt.grad_scale = torch.tensor(96.0, device=params[0].device)
                opt.found_inf = torch.tensor(found, device=params[0].device)
            lockstep.step(pairs, t, lambda p, t, i: 16 * random_gradient(p, t, i))
            assert differs(copied(*pairs[1]), before) == (found == 0.0)


@pytest.mark.parametrize("scale_per", ["model", "parameter"])
def test_a_run_repeats_to_the_bit(any_kernels, scale_per):
    found = []
    for _ in range(2):
        make = drawn(torch.float32, any_kernels.sizes)
        opt, params = optimizer(any_kernels, "adamw", make, scale_per=scale_per)
        for t in range(3):
            give_gradients(params, t)
            opt.step()
        found.append(copied(opt, params))
    assert_same(found[1], found[0])


def test_a_delta_that_is_not_finite_stays_so_in_bfloat16(any_kernels):
    """Adding random bits to a NaN that an operation gave must not make a number."""
    values = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 1.0]).repeat(40)
    make = drawn(torch.float32, (len(values),))
    options = {"weight_decay": 0.0, "delta_dtype": torch.bfloat16, **QUICK}
    opt, [p] = optimizer(any_kernels, "adamw", make, **options)
    for t in range(FEW):
        if t:
            opt.state[p]["delta"].copy_(values)
        give_gradients([p], t)
        opt.step()
        if t:
            after = written(opt, [p])[0]["delta"].float()
            assert after.isnan().equal(values.isnan())
            assert after[values.isinf()].equal(values[values.isinf()])
            assert after[values == 1].isfinite().all()
