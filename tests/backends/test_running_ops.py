"""What every backend promises of the running form: the reference's bits of x, low bits and state.

Each backend steps in lockstep with the reference, see support/lockstep.py; its sums and its tuner
must agree within a derived tolerance.
"""

import copy

import pytest
import torch
from support.cases import (
    CASES,
    DTYPES,
    FULL,
    FUSED,
    OPTIONS,
    RUNNING,
    SCALE_PER,
    assert_same,
    differs,
)
from support.kernels import KERNELS, READ_ON_DEVICE, Kernels, kernels_of
from support.lockstep import (
    assert_sums_agree,
    copied,
    distance,
    drawn,
    give_gradients,
    joined,
    optimizer,
    random_gradient,
)
from support.ready_bucket import CHUNK, CUDA_CHUNK, ReadyBucket, bad_elements

from mechanic_fused.backends import formulas, layout, reference
from mechanic_fused.kept_blocks import WHOLE
from mechanic_fused.log_tuner import LogTuner
from mechanic_fused.options import LOG_TUNING, tuner_options

NARROW = layout.HALF_DTYPES

LOWS = (0, 1, -1, 8, -8, 1000, -1000, 32767, -32767)
"""Low bits beside every 16-bit number; -32768 is that of a tie, which may round either way."""

SOME = (7.3, 1.1)
"""N² and max_norm: their root and quotient must be rounded."""

LOSS_SCALE = 3.0
"""Not a power of two: the multiplier is rounded too."""

FAR = 1 << 33
"""More elements than 32 bits count, signed or not."""

ROWS = 40
"""Scales: more than a block of Triton's has."""

STEP_RTOL = 8 * 2.0**-52
"""Of a step of the tuner: an exponential, a logarithm and a sum of 40 numbers in another order."""


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def every_bit_pattern(dtype):
    """Return all numbers of a 16-bit dtype."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_numbers_in_two_parts_survive_a_round_trip(dtype, low):
    every = every_bit_pattern(dtype)
    every = every[every.abs() < torch.finfo(dtype).max]
    wide = formulas.join(every, torch.full(every.shape, low, dtype=torch.int16))
    nearest, bits = formulas.split(wide, dtype)
    assert_same(formulas.join(nearest, bits), wide)
    # Beside a half the last of them may round to a tie.
    if dtype is torch.bfloat16 or abs(low) < 32767:
        assert_same(nearest, every)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_zero_that_is_written_stays_zero(dtype):
    lows = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    wide = formulas.join(torch.zeros(len(lows), dtype=dtype), lows)
    assert (formulas.split(wide, dtype)[0] == 0).all()
    if dtype is torch.bfloat16:
        assert (wide == 0).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_two_parts_lose_nothing_of_a_float(dtype):
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(1 << 16, generator=rng)
    wide = torch.cat([wide, 1 + wide.sign() * 2.0**-24, 2 - wide.abs() * 2.0**-23])
    assert_same(formulas.join(*formulas.split(wide, dtype)), wide)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) if case in FULL else slow(case, dtype) for case in CASES for dtype in DTYPES],
    ids=str,
)
def test_every_case_and_dtype_has_the_bits_of_the_reference(running, case, dtype):
    base, options = CASES[case]
    running.run(base, drawn(dtype, running.kernels.sizes), **options)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", FULL)
def test_state_in_the_dtype_of_weights_has_the_bits_of_the_reference(running, case, dtype):
    base, options = CASES[case]
    make = drawn(dtype, running.kernels.sizes)
    running.run(base, make, 3, state_dtype="param", **options)


# x_ref of one block in eight

ROUND_A_BLOCK = (127, 128, 129, 1023, 1024, 1025, 1152)
"""Elements around the ends of a kept block and of a period."""
PHASES = (0, 8, 128, slow(896), slow(1016), 1, 127, slow(129), 1023, slow(514))
"""Those of a shard that packets of 16 bytes fit, and those that they do not."""


def kept_sizes(kernels):
    return (0, 1, *(ROUND_A_BLOCK if kernels.name == "cpp" else ()), *kernels.sizes[-2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, slow(torch.float64)], ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_kept_blocks_have_the_bits_of_the_reference(running, set_phases, phase, dtype):
    set_phases(phase)
    make = drawn(dtype, kept_sizes(running.kernels))
    running.run("adamw", make, 3, x_ref_every=8, **OPTIONS["adamw"])


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) if d is torch.float16 else slow(c, d) for c in FULL for d in DTYPES],
    ids=str,
)
def test_every_base_keeps_blocks_of_some_weights_and_all_of_others(
    running, set_phases, case, dtype
):
    """Also where chunks begin within a period, as they do not outside of tests."""
    set_phases(4, WHOLE, 1000)
    base, options = CASES[case]
    make = drawn(dtype, (1025, 700, 3000, max(running.kernels.sizes)))
    running.run(base, make, 3, x_ref_every=8, **options)


@pytest.mark.parametrize("chunk", [8, 200])
@pytest.mark.parametrize("ops", KERNELS, indirect=True)
def test_kept_blocks_of_chunks_of_any_size(ops, set_phases, monkeypatch, chunk):
    set_phases(0, 1, 136)
    ops.set_chunk(monkeypatch, chunk)
    kept = {"variant": RUNNING, "x_ref_every": 8}
    one, two = (
        ReadyBucket(of_one, "lion", torch.float32, **kept)
        for of_one in (Kernels("reference", reference, "cpu"), ops)
    )
    far = distance(one.opt)
    expected, actual = one.accumulated(), two.accumulated()
    assert_same(actual["weights"], expected["weights"])
    for of_one in (expected, actual):
        of_one["sums"][:, layout.XD] = 0  # which the running form has not
    assert_sums_agree(actual["sums"], expected["sums"], far, two.rtol)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_x_ref_that_is_not_kept_is_not_read(any_kernels, set_phases, bad):
    """What is beside the kept elements in memory must not matter, to any lane of a packet."""
    set_phases(100)
    found = []
    for beside in (0.0, bad):
        make = drawn(torch.float32, (5000,))
        opt, [p] = optimizer(any_kernels, "adamw", make, variant=RUNNING, x_ref_every=8)
        for t in range(3):
            give_gradients([p], t)
            opt.step()
            if t == 0:
                x_ref = opt.state[p]["x_ref"]
                room = torch.full((len(x_ref) + 64,), beside, device=x_ref.device)
                room[32:-32] = x_ref
                opt.state[p]["x_ref"] = room[32:-32]
        found.append(copied(opt, [p]))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, slow(4)])
def test_misaligned_weights_and_gradients(running, dtype, offset):
    """NaN before and after them would show in the sums."""

    def inside(x):
        room = torch.full((len(x) + 2 * offset,), torch.nan, dtype=dtype)
        room[offset : len(room) - offset] = x
        return room[offset : len(room) - offset]

    running.run(
        "adamw",
        lambda: [inside(x) for x in drawn(dtype, running.kernels.sizes)()],
        gradient=lambda p, t, i: inside(random_gradient(p, t, i)),
        **OPTIONS["adamw"],
    )


@pytest.mark.parametrize("scale_per", SCALE_PER)
def test_scales_of_no_chunk_of_one_and_of_many_whose_gradients_come_and_go(running, scale_per):
    def groups(params):
        return [
            {"params": params[:3], "lr": 1.0, "weight_decay": 0.1},
            {"params": params[3:4], "lr": 2.0},
            {"params": params[4:], "lr": 0.5, "betas": (0.7, 0.9), "eps": 1e-6},
        ]

    def gradient(p, t, i):
        return None if (t + i) % 3 == 0 else random_gradient(p, t, i)

    sizes = (5, 1025, 4100, 0, 3, 0, max(running.kernels.sizes))
    make = drawn(torch.bfloat16, sizes)
    pairs = running.run("adamw", make, gradient=gradient, groups=groups, scale_per=scale_per)
    opt, params = pairs[1]
    [bucket] = opt._plan.buckets
    assert bucket.sums[:, layout.COUNT].sum() == sum(
        p.numel() for p in params if p.grad is not None
    )
    tickets = getattr(bucket.handle, "tickets", None)
    assert tickets is None or not tickets.any()


@pytest.mark.parametrize("case", FULL)
def test_gradient_elements_that_are_not_finite(running, case):
    bad = {1: torch.nan, 3: torch.inf}

    def gradient(p, t, i):
        g = random_gradient(p, t, i)
        if t in bad:
            g[:: 1 + i] = bad[t]
        return g

    base, options = CASES[case]
    make = drawn(torch.bfloat16, running.kernels.sizes)
    for opt, params in running.run(base, make, gradient=gradient, **options):
        assert opt.nonfinite_steps == len(bad)
        assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_16_bit_weight_is_read_and_rounded_alike(running, dtype):
    every = every_bit_pattern(dtype)
    finite = torch.where(every.isfinite(), every, torch.zeros((), dtype=dtype))
    lows = torch.randint(-(1 << 15), 1 << 15, (1 << 16,), generator=torch.Generator())

    def gradient(p, t, i):
        return (finite if i == 0 else finite.flip(0)).clone()

    # Opposite orders: updates of every exponent meet weights of every exponent.
    pairs = running.twins("sgd", lambda: [finite.clone(), finite.clone()], lr=1.0)
    for t in range(3):
        running.step(pairs, t, gradient)
        for opt, params in pairs:
            for p in params:
                # In each step other low bits meet them.
                opt.state[p]["x_low"].copy_(lows.roll(t))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_weights_that_are_not_finite_stay_so_and_zeros_without_an_update_stay_zero(
    any_kernels, dtype
):
    values = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0]).to(dtype)
    start = values.repeat(40)
    opt, [p] = optimizer(any_kernels, "sgd", lambda: [start.clone()], lr=1.0, variant=RUNNING)
    for t in range(2):
        p.grad = torch.zeros_like(p)
        opt.step()
        opt.state[p]["x_low"].fill_(1 - 2 * t)
    assert_same(p.detach().cpu(), start)


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_neither_overflow_nor_vanish(running, size):
    pairs = running.twins("sgd", drawn(torch.float32, running.kernels.sizes), lr=1.0)
    running.step(pairs, 0, lambda p, t, i: size * random_gradient(p, t, i))
    squares = pairs[1][0]._plan.buckets[0].sums[:, [layout.GG, layout.UU]]
    assert squares.isfinite().all()
    assert (squares > 0).all()


def test_the_update_is_summed_as_at_the_peak_lr(running):
    """Also where lr is 0, as at the end of a schedule: there is nothing to sum."""
    pairs = running.twins("adamw", drawn(torch.float32, (1025,)), **OPTIONS["adamw"])
    found = []
    for t, lr in enumerate((1.0, 0.25, 0.0, 1.0)):
        for opt, _ in pairs:
            opt.param_groups[0]["lr"] = lr
        running.step(pairs, t, lambda p, t, i: random_gradient(p, 0, i))
        found.append(float(pairs[1][0]._plan.buckets[0].sums[0, layout.UU]))
    assert found[2] == 0
    assert found[1] == pytest.approx(found[0], rel=0.5)


def test_grad_scaler_divides_the_gradients_and_skips_a_step_that_overflows(running):
    make = drawn(torch.float16, running.kernels.sizes)
    pairs = running.twins("adamw", make, **OPTIONS["adamw"])
    running.step(pairs, 0, random_gradient)
    for t in (1, 2):
        for found in (1.0, 0.0):
            before = copied(*pairs[1])
            for opt, params in pairs:
                opt.grad_scale = torch.tensor(96.0, device=params[0].device)
                opt.found_inf = torch.tensor(found, device=params[0].device)
            running.step(pairs, t, lambda p, t, i: 16 * random_gradient(p, t, i))
            assert differs(copied(*pairs[1]), before) == (found == 0.0)


@pytest.mark.parametrize("scale_per", ["model", "parameter"])
def test_a_run_repeats_to_the_bit(any_kernels, scale_per):
    found = []
    for _ in range(2):
        make = drawn(torch.bfloat16, any_kernels.sizes)
        opt, params = optimizer(
            any_kernels, "adamw", make, scale_per=scale_per, variant=RUNNING, s_init=None
        )
        for t in range(3):
            give_gradients(params, t)
            opt.step(loss=2.0)
        assert distance(opt) > 0
        found.append(copied(opt, params))
    assert_same(found[1], found[0])


def test_small_updates_add_up_beside_16_bit_weights(any_kernels):
    """Each is lost in bfloat16; so are they to a reader, until they make a last place."""
    make = lambda: [torch.ones(300, dtype=torch.bfloat16)]  # noqa: E731
    opt, [p] = optimizer(any_kernels, "sgd", make, lr=2.0**-10, variant=RUNNING, s_init=1.0)
    opt.freeze_scale()
    for _ in range(8):
        p.grad = torch.full_like(p, 0.25)
        opt.step()
    assert (joined(p, opt.state[p]) == 1 - 2.0**-9).all()


# One op of each backend alone.


@pytest.fixture
def ops(request, monkeypatch):
    """A backend with chunks of a size for ready buckets."""
    found = kernels_of(request.param, monkeypatch)
    found.set_chunk(monkeypatch, CUDA_CHUNK if request.param == "cuda" else CHUNK)
    return found


# Not float64 Adam, since torch's float64 square root is not always the nearest number.
@pytest.mark.parametrize(
    ("base", "dtype"),
    [(b, d) for b in OPTIONS for d in DTYPES if not (b.startswith("adam") and d is torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("ops", KERNELS, indirect=True)
def test_any_clip_coefficient_and_loss_scale_give_the_bits_of_the_reference(ops, base, dtype):
    """To maximize, with absent gradients and elements that are not finite."""
    options = {"clip": SOME, "loss_scale": LOSS_SCALE, "scale_per": "parameter", "maximize": True}
    one, two = (
        ReadyBucket(of_one, base, dtype, bad_elements, variant=RUNNING, **options)
        for of_one in (Kernels("reference", reference, "cpu"), ops)
    )
    far = distance(one.opt)
    expected, actual = one.accumulated(), two.accumulated()
    assert_same(actual["weights"], expected["weights"])
    checked = [layout.GG, layout.XX, layout.UU, layout.COUNT]
    for own, row in zip(actual["sums"], expected["sums"], strict=True):
        assert own[checked].tolist() == pytest.approx(
            row[checked].tolist(), rel=two.rtol, abs=0, nan_ok=True
        )
        assert own.isfinite().equal(row.isfinite()) or ops.name != "cpp"
        if row.isfinite().all():
            largest = float(row[layout.GG]) ** 0.5 * far
            difference = float(own[layout.GD] - row[layout.GD])
            assert difference == pytest.approx(0, abs=two.rtol * largest)


@pytest.mark.parametrize("ops", READ_ON_DEVICE, indirect=True)
def test_found_inf_stops_both_ops(ops):
    """The losses of that step are forgotten with it."""
    ready = ReadyBucket(ops, "adamw", torch.bfloat16, variant=RUNNING)
    found_inf = ready.bucket.found_inf = ready.tuner.found_inf = torch.ones(1, device=ops.device)
    ready.tuner.losses.fill_(3.0)

    def state():
        return copy.deepcopy({**ready.written(), "tuner": ready.tuner.state.cpu()})

    before = state()
    ready.ops.step(ready.bucket, ready.tuner)
    ready.ops.log_tune(ready.sums, ready.tuner)
    assert_same(state(), before)
    assert not ready.tuner.losses.any()
    found_inf.zero_()
    ready.ops.step(ready.bucket, ready.tuner)
    after = state()
    assert differs(after["weights"], before["weights"])
    ready.ops.log_tune(ready.sums, ready.tuner)
    assert differs(state()["tuner"], after["tuner"])


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ops", KERNELS, indirect=True)
def test_elements_beyond_the_range_of_32_bits(ops, set_phases, dtype, every):
    """Addresses are lowered and offsets raised by as much: the elements are where they were."""
    set_phases(1000)
    results = []
    for far in (0, FAR):
        ready = ReadyBucket(ops, "adamw", dtype, variant=RUNNING, x_ref_every=every)
        tables, bucket = ready.tables(), ready.bucket
        tables.chunks[:, layout.CHUNK.index("offset")] += far
        streams = {
            **dict.fromkeys(("gradient", "weight", "x_ref"), dtype),
            "x_low": torch.int16,
            "state0": bucket.states[0][0].dtype,
            "state1": bucket.states[0][1].dtype,
        }
        for name, of_stream in streams.items():
            column = tables.tensors[:, layout.TENSOR.index(name)]
            moved = far // every if name == "x_ref" else far
            column -= torch.where(column == 0, 0, moved * of_stream.itemsize)
        results.append(ready.accumulated())
    assert_same(results[1], results[0])


class TunerPair:
    """The log tuner of the reference and that of a backend, given the same sums and losses."""

    def __init__(self, kernels):
        self.ops = kernels.ops
        self.options = {**tuner_options(RUNNING), "max_peak_lr": 1.0}
        devices = ("cpu", kernels.device)
        self.tuners = [LogTuner(list(range(ROWS)), self.options, torch.device(d)) for d in devices]
        self.steps = 0
        self.rng = torch.Generator().manual_seed(0)

    def column(self, name):
        """Return a copy of a column of the reference's state."""
        return self.tuners[0].state[:, layout.LOG_TUNER.index(name)].clone()

    def set(self, tune_scale=True, factor=1.0):
        for tuner in self.tuners:
            tuner.set_options({**self.options, "tune_scale": tune_scale})
            tuner.set_annealing_factor(factor)

    def sums(self, h=None):
        """Return sums with h of any sign, or this one; row 7 has no gradient, row 9 only zeros."""
        found = torch.rand(ROWS, len(layout.SUMS), generator=self.rng, dtype=torch.float64) + 0.5
        signs = torch.randn(ROWS, generator=self.rng, dtype=torch.float64)
        found[:, layout.GD] = signs if h is None else h
        found[:, layout.COUNT] = 64
        found[7, [layout.GG, layout.UU]] = 0
        found[9, layout.XX] = 0
        return found

    def step(self, sums, losses=(0.0, 0.0)):
        for tuner, tune in zip(self.tuners, (reference.log_tune, self.ops.log_tune), strict=True):
            tuner.losses.copy_(torch.tensor(losses, dtype=torch.float64))
            tune(sums.to(tuner.device), tuner)
            assert not tuner.losses.any()
        self.steps += 1
        expected, own = (tuner.state.cpu() for tuner in self.tuners)
        # One absolute too, for the mean of logarithms, which may be close to 0.
        allowed = self.steps * STEP_RTOL
        torch.testing.assert_close(own, expected, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("losses", [(0.0, 0.0), (5.0, 2.0), (torch.nan, 1.0)], ids=str)
def test_the_log_tuner_follows_the_reference_through_a_run(kernels, losses):
    pair = TunerPair(kernels)
    anchored = losses[0] > 0
    for factor in (0.1, 0.5, *[1.0] * 12):  # a warmup, then held
        pair.set(factor=factor)
        pair.step(pair.sums(), losses)
    assert pair.column("scale")[:7].gt(0).all()
    assert pair.column("scale")[7] == 0
    assert bool(pair.column("anchors")[0] > 0) == anchored
    still = pair.sums()
    for h, steps in ((1.0, 60), (-1.0, 250)):  # it learns, at last up to the ceiling
        still[:, layout.GD] = h
        for _ in range(steps):
            pair.step(still)
    size = still[:, layout.COUNT].sum()
    norm = LOG_TUNING["norm_share"] * (still[0, layout.XX] ** 3 / size**2) ** (1 / 6)
    by_norms = LOG_TUNING["norm_ceiling"] * norm / pair.column("ln_update")[0].exp()
    shrunk = (pair.column("start_ratio") - pair.column("ln_ratio"))[0].clamp(min=0).exp()
    by_start = LOG_TUNING["ceiling"] * pair.column("start")[0] * shrunk
    ceiling = by_start if anchored else by_norms
    torch.testing.assert_close(pair.column("scale")[0], ceiling, rtol=1e-2, atol=0)
    for factor in (0.5, 0.1, 0.5, 1.0):  # a schedule that falls, and rises again
        pair.set(factor=factor)
        pair.step(pair.sums())
    pair.step(pair.sums(1e6))  # an outlier
    bad = pair.sums()
    bad[0, layout.GD], bad[1, layout.UU], bad[2, layout.GD] = torch.nan, torch.inf, 1e200
    before = pair.column("scale")
    pair.step(bad)
    assert pair.column("nonfinite")[0] == 1
    assert_same(pair.column("scale")[:3], before[:3])
    pair.set(tune_scale=False)
    before = pair.column("scale")
    pair.step(pair.sums())
    assert_same(pair.column("scale"), before)


def test_a_scale_that_the_user_gave_stays_until_it_learns(kernels):
    pair = TunerPair(kernels)
    for tuner in pair.tuners:
        tuner.state[:, layout.LOG_TUNER.index("scale")] = 0.25
    for _ in range(10):
        pair.step(pair.sums(), (3.0, 1.0))
    assert (pair.column("scale") == 0.25).all()
    for factor in (1.0, 0.5, 1.0):
        pair.set(factor=factor)
        pair.step(pair.sums(), (3.0, 1.0))
    assert (pair.column("scale")[:7] != 0.25).any()


@pytest.mark.parametrize("base", FUSED)
def test_an_infinite_weight_is_not_made_nan_by_a_decay_of_0(running, base, request):
    """0 times it would be NaN; torch's optimizers leave it out."""
    if running.kernels.name == "triton":
        reason = "selects and branches there break the bounds of registers in test_codegen.py"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    make = drawn(torch.float32, (300,))

    def with_infinity():
        [x] = make()
        x[7] = torch.inf
        return [x]

    pairs = running.twins(base, with_infinity, weight_decay=0.0)
    for t in range(3):
        running.step(pairs, t, random_gradient)
        for _, [p] in pairs:
            assert torch.equal(p.detach().isinf().nonzero().cpu(), torch.tensor([[7]]))
