"""What clipping asks of a backend: `norm`, and `accumulate` of gradients that are clipped.

Every backend that runs here is held against the reference, verb by verb; Triton runs in its
interpreter where there is no GPU, in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch
from cases import FUSED, QUICK, SUM_RTOL, assert_same, build, snapshot
from clip_cases import (
    CASES,
    CHUNK,
    DEVICES,
    INTERPRETED,
    LAYOUTS,
    Ready,
    absent_or,
    bad_elements,
    numbers,
)
from conftest import skip_unless_available

from mechanic_fused import backends, fallback
from mechanic_fused.backends import formulas
from mechanic_fused.backends.layout import GD, GG, XD, XX

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CONTENDERS = [
    "reference",
    "cpp",
    pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu]),
    pytest.param("triton", marks=[] if INTERPRETED else [pytest.mark.gpu, no_gpu]),
]
# Of the interpreter's numpy, which says so where it makes a NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# √N² is 2, and 2 + 1e-6 over twice that is 0.5, with no rounding.
HALF = (4.0, (2.0 + 1e-6) / 2)
# Some number whose root and quotient must be rounded.
SOME = (7.3, 1.1)
# Not a power of two: the multiplier is rounded too.
LOSS_SCALE = 3.0


@pytest.fixture(params=CONTENDERS)
def contender(request, monkeypatch):
    """The name of a backend."""
    skip_unless_available(request.param)
    monkeypatch.setitem(backends.load(request.param).CHUNK, "cpu", CHUNK)
    if request.param == "cuda":
        # Of as many chunks as a GPU folds in more than one group of them.
        monkeypatch.setitem(backends.load("cuda").CHUNK, "cuda", 8)
    if INTERPRETED:
        # It takes milliseconds a block, whatever its size: fewer and larger ones.
        monkeypatch.setattr(backends.load("triton").storage, "THREADS", CHUNK // 4)
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "[triton", __file__]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        # A plugin that happens to be installed may warn of another one, and warnings are errors.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_the_coefficient_is_that_of_clip_grad_norm_():
    # Powers of two: what is left of one tells the coefficient exactly.
    for size in (2.0**-30, 1.0, 4.0, 2.0**80):
        for max_norm in (0.0, 1e-9, 0.3, 1.0, 5.0, float("inf")):
            p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
            p.grad = torch.full_like(p, size)
            torch.nn.utils.clip_grad_norm_([p], max_norm)
            # A division here, a reciprocal and a product there: three roundings.
            expected = pytest.approx(float(p.grad) / size, rel=3 * 2.0**-53, abs=0)
            assert formulas.clip_coefficient(size * size, max_norm) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", ["global", "parameter"])
def test_norm_is_the_sum_of_squares_of_finite_elements(contender, scale, dtype):
    ready = Ready(contender, "adamw", dtype, bad_elements, maximize=True, scale=scale, clip=HALF)
    ready.verbs.norm(ready.bucket)
    expected = [0.0] * len(ready.params)
    for i, p in enumerate(ready.params):
        if p.grad is not None:
            g = p.grad.double()[p.grad.isfinite()]
            expected[i] = float(g.square().sum())
    expected = [sum(expected)] if scale == "global" else expected
    assert max(expected) > 0
    assert ready.sums[:, GG].tolist() == pytest.approx(expected, rel=ready.rtol, abs=0)


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_neither_overflow_nor_vanish(contender, size):
    ready = Ready(contender, "sgd", torch.float32, lambda i, g: g.fill_(size))
    ready.verbs.norm(ready.bucket)
    count = sum(p.numel() for p in ready.params)
    expected = count * float(torch.tensor(size)) ** 2
    assert float(ready.sums[0, GG]) == pytest.approx(expected, rel=ready.rtol, abs=0)


def test_norm_divides_by_the_loss_scale_and_leaves_out_what_overflows_then(contender):
    def spoil(i, g):
        return g.fill_(torch.finfo(g.dtype).max if i % 2 else LOSS_SCALE)

    ready = Ready(contender, "sgd", torch.float32, spoil, loss_scale=LOSS_SCALE / 4)
    ready.verbs.norm(ready.bucket)
    count = sum(p.numel() for p in ready.params[::2])
    assert float(ready.sums[0, GG]) == pytest.approx(16 * count, rel=SUM_RTOL, abs=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_writes_one_column_and_repeats_to_the_bit(contender, dtype):
    ready = Ready(contender, "adamw", dtype, bad_elements, scale="parameter")
    others = [GD, XD, XX]
    before, kept = snapshot(ready.opt), ready.sums[:, others].clone()
    found = []
    for _ in range(2):
        ready.sums[:, GG] = torch.nan
        ready.verbs.norm(ready.bucket)
        found.append(ready.sums[:, GG].clone())
    assert_same(found[1], found[0])
    assert_same(ready.sums[:, others], kept)
    assert_same(snapshot(ready.opt), before)


@pytest.mark.parametrize("layouts", [LAYOUTS[:1], LAYOUTS[:3]], ids=["empty", "absent"])
def test_norm_of_nothing_is_zero(contender, layouts):
    ready = Ready(contender, "sgd", torch.float32, lambda i, g: None, layouts=layouts)
    ready.verbs.norm(ready.bucket)
    assert ready.sums[:, GG].tolist() == [0.0]


def test_threads_change_no_bit_of_a_norm(cpp):
    g = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros_like(g))
    p.grad = torch.ones_like(p)
    opt = FUSED["sgd"]([p], lr=0.1, backend=cpp)
    opt.step()
    [found] = opt._plan.buckets
    p.grad = g
    found.collect_gradients()
    found.load(found.hyper_rows, {}, None, None)
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.backend.norm(found)
        sums.append(float(found.sums[0, GG]))
    assert len(found.chunks) > 3 and sums[0] > 0
    assert sums[1] == sums[0] and sums[2] == sums[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_coefficient_of_a_half_is_a_half_of_the_gradients(contender, dtype):
    found = []
    for clip, factor in ((None, 0.5), (HALF, 1.0)):
        ready = Ready(contender, "adamw", dtype, lambda i, g, f=factor: absent_or(i, g * f), clip)
        found.append(ready.accumulated())
    assert_same(found[1], found[0])


# Not float64 Adam, since torch's float64 square root is not always the nearest number.
@pytest.mark.parametrize(
    ("base", "dtype"),
    [(b, d) for b in CASES for d in DTYPES if (b, d) != ("adamw", torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("contender", CONTENDERS[1:], indirect=True)
def test_any_coefficient_gives_the_bits_of_the_reference(contender, base, dtype):
    """Of a loss scale too, to maximize, with elements that are not finite."""
    options = {"clip": SOME, "loss_scale": LOSS_SCALE, "maximize": True, "scale": "parameter"}
    if base == "lion":
        del options["maximize"]
    one, two = (
        Ready(name, base, dtype, bad_elements, **options) for name in ("reference", contender)
    )
    norms = [float(one.opt.state[p]["delta"].double().norm()) for p in one.params]
    expected, actual = one.accumulated(), two.accumulated()
    assert_same(actual["weights"], expected["weights"])
    for own, row, norm in zip(actual["sums"], expected["sums"], norms, strict=True):
        assert own[XD] == row[XD] and own[XX] == row[XX]
        assert own.isfinite().equal(row.isfinite())
        if row.isfinite().all():
            # g·Δ cancels; by Cauchy and Schwarz its terms are no larger than this.
            largest = float(row[GG]) ** 0.5 * norm
            assert float(own[GD] - row[GD]) == pytest.approx(0, abs=two.rtol * largest)
            assert float(own[GG]) == pytest.approx(float(row[GG]), rel=two.rtol, abs=0)


@pytest.mark.parametrize("clip", [(0.0, 1e-3), (4.0, 2.1), (4.0, float("inf"))])
def test_a_small_norm_changes_no_bit(contender, clip):
    plain, clipped = (
        Ready(contender, "adamw", torch.float32, clip=c).accumulated() for c in (None, clip)
    )
    assert_same(clipped, plain)


@pytest.mark.parametrize("contender", CONTENDERS[1:3], indirect=True)
def test_a_wrong_dtype_is_refused(contender):
    ready = Ready(contender, "sgd", torch.float32, clip=HALF)
    ready.bucket.clip = ready.bucket.clip.float()
    with pytest.raises(TypeError, match="clip must be torch.float64, got torch.float32"):
        ready.verbs.accumulate(ready.bucket)


def test_the_general_road_lends_clipped_gradients():
    found = []
    for clip, factor in ((None, 0.5), (HALF, 1.0)):
        p = torch.nn.Parameter(numbers(0, 0, (5, 13), torch.float32))
        opt = build("general", "adamw", [p], **QUICK)
        for t in range(2):
            p.grad = numbers(t + 1, 0, p.shape, p.dtype) * (factor if t else 1.0)
            if t == 0:
                opt.step()
        [own] = opt._plan.buckets
        own.collect_gradients()
        own.load(own.hyper_rows, {}, None, None, clip and torch.tensor(clip).double())
        fallback.accumulate(opt, [own], opt._base_step())
        found.append([opt.state[p], own.sums])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("contender", CONTENDERS[2:], indirect=True)
def test_found_inf_stops_a_norm(contender):
    ready = Ready(contender, "sgd", torch.float32)
    before = ready.sums.clone()
    ready.bucket.found_inf = torch.ones(1, device=DEVICES[contender])
    ready.verbs.norm(ready.bucket)
    assert_same(ready.sums, before)
    ready.bucket.found_inf.zero_()
    ready.verbs.norm(ready.bucket)
    assert (ready.sums[:, GG] != before[:, GG]).all()
