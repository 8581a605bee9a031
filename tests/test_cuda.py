"""The CUDA backend on a GPU: the reference's own bits, and what a step must not do.

Sums add in another order than the reference's; so once they have been compared, the GPU goes on
with the reference's numbers, and Δ, state and x must be equal to the bit.
"""

import pytest
import torch
from cases import FEW, FUSED, QUICK, SIZES, SUM_RTOL, assert_same, differs, noise, snapshot
from conftest import skip_unless_available

from mechanic_fused import backends
from mechanic_fused.backends import reference

GPU = "cuda"
CASES = {
    "sgd": ("sgd", {"lr": 0.05}),
    "momentum": ("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam l2": ("adam", {"lr": 0.7, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw": ("adamw", {"lr": 1.0, "weight_decay": 0.1}),
    "adamw without decay": ("adamw", {"lr": 1.0, "weight_decay": 0.0, "maximize": True}),
    "lion": ("lion", {"lr": 0.5, "weight_decay": 0.1}),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# ulps of float64: torch's square root there is not the nearest number on CPUs.
DOUBLE_RTOL = 1e-12


def on_gpu(test):
    there = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    return pytest.mark.gpu(there(pytest.mark.usefixtures("built")(test)))


@pytest.fixture
def built():
    skip_unless_available("cuda")


@pytest.fixture
def lockstep(built, monkeypatch):
    """The GPU's sums must be the reference's; then it learns from the same numbers."""
    native = backends.load("cuda")
    tune_reference, tune_native = reference.tune, native.tune
    recorded = []

    def record(sums, tuner):
        tune_reference(sums, tuner)
        recorded.append((sums.clone(), tuner.state.clone()))

    def compare(sums, tuner):
        if not recorded:  # the reference has read found_inf on the host and skipped the step
            return tune_native(sums, tuner)
        expected_sums, expected = recorded.pop()
        # gΔ and xΔ cancel; by Cauchy and Schwarz their terms are no larger than this.
        largest = expected_sums.nan_to_num().abs().max(0).values.sum() + 1
        error = (sums.cpu() - expected_sums).abs()
        assert (error <= SUM_RTOL * largest)[expected_sums.isfinite()].all(), error
        sums.copy_(expected_sums)
        tune_native(sums, tuner)
        torch.testing.assert_close(tuner.state.cpu(), expected, rtol=SUM_RTOL, atol=0)
        tuner.state.copy_(expected)

    monkeypatch.setattr(reference, "tune", record)
    monkeypatch.setattr(native, "tune", compare)


def weights(sizes, dtype, device, offset=0):
    rng = torch.Generator().manual_seed(0)
    stores = [torch.randn(n + offset, generator=rng, dtype=torch.float64) for n in sizes]
    return [torch.nn.Parameter(x.to(device, dtype)[offset:]) for x in stores]


def gradient(p, t, i):
    rng = torch.Generator().manual_seed(1000 * t + i)
    return (noise(p, rng) + 0.5).to(p.dtype)


def twins(base, sizes, dtype, offset=0, devices=("cpu", GPU), groups=1, **options):
    """The same optimizer twice: the reference on the CPU, then the GPU."""
    pairs = []
    for device in devices:
        params = weights(sizes, dtype, device, offset)
        cuts = [{"params": params[k::groups]} for k in range(groups)]
        backend = "reference" if device == "cpu" else "cuda"
        pairs.append((FUSED[base](cuts, backend=backend, **QUICK, **options), params))
    return pairs


def step_all(pairs, t, of=gradient):
    for opt, params in pairs:
        for i, p in enumerate(params):
            g = of(p, t, i)
            p.grad = g if g is None else g.to(p.device)
        opt.step()


def assert_equal(pairs):
    (one, one_params), (two, two_params) = pairs
    for p, q in zip(one_params, two_params, strict=True):
        expected = {**one.state[p], "x": p.detach()}
        actual = {k: v.cpu() for k, v in {**two.state[q], "x": q.detach()}.items()}
        if p.dtype is not torch.float64:
            assert_same(actual, expected)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=DOUBLE_RTOL, atol=DOUBLE_RTOL)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_the_reference(lockstep, case, dtype):
    base, options = CASES[case]
    pairs = twins(base, SIZES, dtype, **options)
    for t in range(FEW):
        step_all(pairs, t)
        assert_equal(pairs)


@on_gpu
@pytest.mark.parametrize("narrow", ["narrow_state", "narrow_delta"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["sgd", "momentum", "adamw", "lion"])
def test_narrow_state_and_delta(lockstep, case, dtype, narrow):
    base, options = CASES[case]
    pairs = twins(base, SIZES, dtype, **{narrow: True}, **options)
    for t in range(FEW):
        step_all(pairs, t)
        assert_equal(pairs)


@on_gpu
@pytest.mark.parametrize("narrow_delta", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_weights(lockstep, dtype, narrow_delta):
    options = {"weight_decay": 0.1, "narrow_delta": narrow_delta}
    pairs = twins("adamw", SIZES, dtype, offset=1, **options)
    for t in range(FEW):
        step_all(pairs, t)
        assert_equal(pairs)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_gradients(lockstep, dtype):
    """Beside weights that are aligned: NaN before and after would show in the sums."""

    def shifted(p, t, i):
        room = torch.full((p.numel() + 2,), torch.nan, dtype=dtype, device=p.device)
        room[1:-1].copy_(gradient(p, t, i))
        return room[1:-1]

    pairs = twins("adamw", SIZES, dtype, weight_decay=0.1)
    for t in range(FEW):
        step_all(pairs, t, shifted)
        assert_equal(pairs)


@on_gpu
@pytest.mark.parametrize("chunk", [1 << 8, 1 << 13])
@pytest.mark.parametrize("scale", ["global", "group", "parameter"])
def test_scales(lockstep, monkeypatch, scale, chunk):
    """Of no chunk, of one, and (in chunks of 256 elements) of more than one group of chunks."""
    monkeypatch.setitem(backends.load("cuda").CHUNK, GPU, chunk)
    pairs = twins("adamw", (*SIZES, 0, 1 << 17), torch.float32, scale=scale, groups=3)
    for t in range(FEW):
        step_all(pairs, t)
        assert_equal(pairs)


@on_gpu
def test_absent_and_nonfinite_gradients(lockstep):
    def hard(p, t, i):
        g = gradient(p, t, i)
        if g.numel() and t == 2:
            g.view(-1)[-1] = float("nan") if i % 2 else float("inf")
        return None if (t + i) % 3 == 0 else g

    pairs = twins("adamw", SIZES, torch.float32)
    for t in range(FEW):
        step_all(pairs, t, hard)
        assert_equal(pairs)
    assert pairs[1][0].nonfinite_steps == 1


@on_gpu
def test_products_beyond_the_range_of_float32(built):
    for size in (1e20, 1e-25):
        [(opt, _)] = pairs = twins("sgd", (1000,), torch.float32, devices=(GPU,), lr=1.0)
        step_all(pairs, 0, lambda p, t, i, size=size: torch.full(p.shape, size))
        expected = 1000 * float(torch.tensor(size)) ** 2
        assert float(opt._plan.buckets[0].sums[0, 2]) == pytest.approx(expected, rel=SUM_RTOL)


@on_gpu
def test_grad_scaler(lockstep):
    """The scale is divided out on the device, and an overflow leaves everything as it is."""
    pairs = twins("adamw", SIZES, torch.float16, weight_decay=0.1)
    step_all(pairs, 0)
    for t in range(1, FEW):
        before = snapshot(pairs[1][0])
        for found in (1.0, 0.0):
            for opt, params in pairs:
                opt.grad_scale = torch.tensor(1024.0, device=params[0].device)
                opt.found_inf = torch.tensor(found, device=params[0].device)
            step_all(pairs, t, lambda p, t, i: 16 * gradient(p, t, i))
            assert differs(snapshot(pairs[1][0]), before) == (found == 0.0)
            assert_equal(pairs)


@on_gpu
@pytest.mark.parametrize("scale", ["global", "parameter"])
def test_a_run_repeats_bit_for_bit(built, scale):
    pairs = twins("adamw", SIZES * 3, torch.float32, devices=(GPU, GPU), scale=scale)
    for t in range(FEW):
        step_all(pairs, t)
        assert_same(snapshot(pairs[1][0]), snapshot(pairs[0][0]))
