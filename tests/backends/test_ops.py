"""Each op of each backend alone: the norm, clipped gradients, GradScaler's numbers, the sums."""

import pytest
import torch
from support.cases import DTYPES, OPTIONS, SCALE_PER, SUM_RTOL, assert_same, snapshot
from support.kernels import GPU_ONLY, KERNELS, READ_ON_DEVICE, Kernels, kernels_of
from support.ready_bucket import (
    CHUNK,
    CUDA_CHUNK,
    LAYOUTS,
    ReadyBucket,
    absent_or,
    bad_elements,
)

from mechanic_fused.backends import layout, reference
from mechanic_fused.backends.layout import GD, GG, XD, XX

HALF = (4.0, (2.0 + 1e-6) / 2)
"""√N² is 2, and (2 + 1e-6)/2 over 2 + 1e-6 is 0.5, with no rounding."""

SOME = (7.3, 1.1)
"""Some numbers whose root and quotient must be rounded."""

LOSS_SCALE = 3.0
"""Not a power of two: the multiplier is rounded too."""

FAR = 1 << 33
"""More elements than 32 bits count, signed or not."""


@pytest.fixture(params=["reference", *KERNELS])
def kernels(request, monkeypatch):
    found = kernels_of(request.param, monkeypatch)
    found.set_chunk(monkeypatch, CUDA_CHUNK if request.param == "cuda" else CHUNK)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_per", ["model", "parameter"])
def test_norm_is_the_sum_of_squares_of_finite_elements(kernels, scale_per, dtype):
    ready = ReadyBucket(
        kernels, "adamw", dtype, bad_elements, HALF, maximize=True, scale_per=scale_per
    )
    ready.ops.norm(ready.bucket)
    grads = [p.grad for p in ready.params]
    squares = [0.0 if g is None else float(g.double()[g.isfinite()].square().sum()) for g in grads]
    expected = [sum(squares)] if scale_per == "model" else squares
    assert max(expected) > 0
    assert ready.sums[:, GG].tolist() == pytest.approx(expected, rel=ready.rtol, abs=0)


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_of_a_norm_neither_overflow_nor_vanish(kernels, size):
    ready = ReadyBucket(kernels, "sgd", torch.float32, lambda i, g: g.fill_(size))
    ready.ops.norm(ready.bucket)
    count = sum(p.numel() for p in ready.params)
    expected = count * float(torch.tensor(size)) ** 2
    assert float(ready.sums[0, GG]) == pytest.approx(expected, rel=ready.rtol, abs=0)


def test_norm_divides_by_the_loss_scale_and_leaves_out_what_overflows_then(kernels):
    def spoil(i, g):
        return g.fill_(torch.finfo(g.dtype).max if i % 2 else LOSS_SCALE)

    ready = ReadyBucket(kernels, "sgd", torch.float32, spoil, loss_scale=LOSS_SCALE / 4)
    ready.ops.norm(ready.bucket)
    count = sum(p.numel() for p in ready.params[::2])
    assert float(ready.sums[0, GG]) == pytest.approx(16 * count, rel=SUM_RTOL, abs=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_writes_one_column_and_repeats_to_the_bit(kernels, dtype):
    ready = ReadyBucket(kernels, "adamw", dtype, bad_elements, scale_per="parameter")
    others = [GD, XD, XX]
    before, kept = snapshot(ready.opt), ready.sums[:, others].clone()
    found = []
    for _ in range(2):
        ready.sums[:, GG] = torch.nan
        ready.ops.norm(ready.bucket)
        found.append(ready.sums[:, GG].clone())
    assert_same(found[1], found[0])
    assert_same(ready.sums[:, others], kept)
    assert_same(snapshot(ready.opt), before)


@pytest.mark.parametrize("layouts", [LAYOUTS[:1], LAYOUTS[:3]], ids=["empty", "absent"])
def test_norm_of_nothing_is_zero(kernels, layouts):
    ready = ReadyBucket(kernels, "sgd", torch.float32, lambda i, g: None, layouts=layouts)
    ready.ops.norm(ready.bucket)
    assert ready.sums[:, GG].tolist() == [0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_clip_coefficient_of_a_half_halves_the_gradients(kernels, dtype):
    halved = ReadyBucket(kernels, "adamw", dtype, lambda i, g: absent_or(i, g * 0.5))
    clipped = ReadyBucket(kernels, "adamw", dtype, clip=HALF)
    assert_same(clipped.accumulated(), halved.accumulated())


# Not float64 Adam, since torch's float64 square root is not always the nearest number.
@pytest.mark.parametrize(
    ("base", "dtype"),
    [(b, d) for b in OPTIONS for d in DTYPES if not (b.startswith("adam") and d is torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
def test_any_clip_coefficient_and_loss_scale_give_the_bits_of_the_reference(kernels, base, dtype):
    """To maximize, with elements that are not finite."""
    options = {"clip": SOME, "loss_scale": LOSS_SCALE, "scale_per": "parameter", "maximize": True}
    one, two = (
        ReadyBucket(of_one, base, dtype, bad_elements, **options)
        for of_one in (Kernels("reference", reference, "cpu"), kernels)
    )
    norms = [float(one.opt.state[p]["delta"].double().norm()) for p in one.params]
    expected, actual = one.accumulated(), two.accumulated()
    assert_same(actual["weights"], expected["weights"])
    for own, row, norm in zip(actual["sums"], expected["sums"], norms, strict=True):
        assert_same(own[[XD, XX]], row[[XD, XX]])
        assert own.isfinite().equal(row.isfinite())
        if row.isfinite().all():
            # g·Δ cancels; by Cauchy and Schwarz its terms are no larger than this.
            largest = float(row[GG]) ** 0.5 * norm
            assert float(own[GD] - row[GD]) == pytest.approx(0, abs=two.rtol * largest)
            assert float(own[GG]) == pytest.approx(float(row[GG]), rel=two.rtol, abs=0)


@pytest.mark.parametrize("clip", [(0.0, 1e-3), (4.0, 2.1), (4.0, float("inf"))])
def test_clipping_a_small_norm_changes_no_bit(kernels, clip):
    plain, clipped = (
        ReadyBucket(kernels, "adamw", torch.float32, clip=c).accumulated() for c in (None, clip)
    )
    assert_same(clipped, plain)


@pytest.mark.parametrize("kernels", ["cpp", GPU_ONLY], indirect=True)
def test_a_clip_of_another_dtype_is_refused(kernels):
    ready = ReadyBucket(kernels, "sgd", torch.float32, clip=HALF)
    ready.bucket.clip = ready.bucket.clip.float()
    with pytest.raises(TypeError, match=r"clip must be torch\.float64, got torch\.float32"):
        ready.ops.accumulate(ready.bucket)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measure_has_the_bits_of_apply_and_writes_no_weight(kernels, dtype):
    ready = ReadyBucket(kernels, "adamw", dtype, scale_per="parameter")
    ready.ops.apply(ready.bucket, ready.tuner)
    applied = ready.written()
    ready.sums[:, [XD, XX]] = torch.nan
    ready.ops.measure(ready.bucket)
    assert_same(ready.written(), applied)


@pytest.mark.parametrize("kernels", READ_ON_DEVICE, indirect=True)
def test_found_inf_stops_every_op(kernels):
    ready = ReadyBucket(kernels, "adamw", torch.float32, clip=HALF)
    found_inf = ready.bucket.found_inf = ready.tuner.found_inf = torch.ones(
        1, device=kernels.device
    )

    def state():
        return {**ready.written(), "tuner": ready.tuner.state.cpu().clone()}

    ops = {
        "norm": lambda: ready.ops.norm(ready.bucket),
        "accumulate": lambda: ready.ops.accumulate(ready.bucket),
        "tune": lambda: ready.ops.tune(ready.sums, ready.tuner),
        "apply": lambda: ready.ops.apply(ready.bucket, ready.tuner),
    }
    before = state()
    for op in ops.values():
        op()
    assert_same(state(), before)
    found_inf.zero_()
    for name, op in ops.items():
        op()
        now = state()
        changed = "tuner" if name == "tune" else "sums"
        assert (now[changed] != before[changed]).any(), name
        before = now


@pytest.mark.parametrize("scale_per", SCALE_PER[::2])
def test_a_loss_scale_divides_the_gradients(kernels, scale_per):
    plain = ReadyBucket(kernels, "adamw", torch.float32, scale_per=scale_per)
    # A power of two, so that the division is exact.
    scaled = ReadyBucket(
        kernels,
        "adamw",
        torch.float32,
        lambda i, g: absent_or(i, g * 1024.0),
        loss_scale=1024.0,
        scale_per=scale_per,
    )
    assert_same(scaled.accumulated(), plain.accumulated())


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"state_dtype": "param"}),
        (torch.bfloat16, {"delta_dtype": torch.bfloat16}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernels", KERNELS, indirect=True)
def test_elements_beyond_the_range_of_32_bits(kernels, dtype, narrow):
    """Addresses are lowered and offsets raised by as much: the elements are where they were."""
    results = []
    for far in (0, FAR):
        ready = ReadyBucket(kernels, "adamw", dtype, **narrow)
        tables, bucket = ready.tables(), ready.bucket
        tables.chunks[:, layout.CHUNK.index("offset")] += far
        streams = {
            "gradient": dtype,
            "weight": dtype,
            "x_ref": dtype,
            "delta": bucket.delta[0].dtype,
            "state0": bucket.states[0][0].dtype,
            "state1": bucket.states[0][1].dtype,
        }
        for name, of_stream in streams.items():
            column = tables.tensors[:, layout.TENSOR.index(name)]
            column -= torch.where(column == 0, 0, far * of_stream.itemsize)
        ready.ops.accumulate(bucket)
        ready.ops.apply(bucket, ready.tuner)
        applied = ready.written()
        ready.sums[:, [XD, XX]] = torch.nan
        ready.ops.measure(bucket)
        assert_same(ready.written(), applied)
        results.append(applied)
    assert_same(results[1], results[0])
