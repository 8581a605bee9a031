"""What only the CPU's kernels do: threads, and stores past the caches."""

import pytest
import torch
from support.cases import FUSED, assert_same
from support.kernels import kernels_of
from support.lockstep import Lockstep, copied, drawn, give_gradients, optimizer

from mechanic_fused.backends.layout import CPU_CHUNK, GG

STREAMED = (1 << 22) + 13
"""Beyond it cpp writes past the caches, with another kind of store; odd, so that a tail remains."""


@pytest.fixture
def kernels(monkeypatch):
    return kernels_of("cpp", monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.bfloat16, 0),
        pytest.param(torch.float32, 1, marks=pytest.mark.slow),
        pytest.param(torch.float32, 0, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_that_are_written_past_the_caches(kernels, monkeypatch, dtype, offset):
    kernels.set_chunk(monkeypatch, CPU_CHUNK)
    [start] = drawn(dtype, (STREAMED + offset,))()
    pattern = torch.arange(STREAMED).remainder(1021).sub(400).to(dtype)
    Lockstep(kernels, monkeypatch).run(
        "sgd", lambda: [start.clone()[offset:]], 2, lambda p, t, i: pattern * (t + 1), lr=0.1
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("base", FUSED)
def test_threads_change_no_bit_of_a_step(kernels, base, dtype):
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        opt, params = optimizer(kernels, base, drawn(dtype, kernels.sizes))
        for t in range(3):
            give_gradients(params, t)
            opt.step()
        found.append(copied(opt, params))
    assert len(opt._plan.buckets[0].chunks) > 4
    assert_same(*found)


def test_subnormal_float16_numbers_are_no_zeros_where_subnormal_floats_are(kernels, monkeypatch):
    """Of every finite float16 number, as a weight and as a gradient."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        Lockstep(kernels, monkeypatch).run(
            "sgd", lambda: [finite.clone()], 2, lambda p, t, i: finite.roll(t), lr=0.1
        )
    finally:
        torch.set_flush_denormal(False)


def test_threads_change_no_bit_of_a_norm(kernels):
    opt, [p] = optimizer(kernels, "sgd", drawn(torch.float32, (1 << 17,)), lr=0.1)
    give_gradients([p], 0)
    opt.step()
    [bucket] = opt._plan.buckets
    norms = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        kernels.ops.norm(bucket)
        norms.append(float(bucket.sums[0, GG]))
    assert len(bucket.chunks) > 3
    assert norms[0] > 0
    assert norms == norms[:1] * 3
