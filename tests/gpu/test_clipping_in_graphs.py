"""Clipping on a GPU: to the norm of the gradients of the day, in one launch, without waiting."""

import pytest
import torch
from support.cases import FUSED, QUICK, SUM_RTOL
from support.kernels import READ_ON_DEVICE, gpu_kernels

from mechanic_fused.backends.layout import GG

pytestmark = [
    pytest.mark.gpu,
    # torch says of its own prototypes that they are: sync debug mode, the profiler.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(params=READ_ON_DEVICE)
def clipped(request, monkeypatch):
    """A bucket of 20 weights whose gradients are 3, to be clipped to a norm of 1."""
    gpu_kernels(request.param, monkeypatch)
    params = [torch.nn.Parameter(torch.ones(5003, device="cuda")) for _ in range(20)]
    opt = FUSED["adamw"](params, lr=1.0, backend=request.param, **QUICK)
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    opt.step()
    [found] = opt._plan.buckets
    found.collect_gradients()
    found.write_tables(found.hyper_rows, {}, None, None)
    found.clip = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cuda")
    found.backend.prepare(found)
    found.backend.norm(found)  # Triton compiles it the first time
    return found


def clip_and_accumulate(found):
    found.backend.norm(found)
    found.clip[:1].copy_(found.sums[:, GG])
    found.backend.accumulate(found)


def test_the_gradients_are_clipped_to_the_norm(clipped):
    clip_and_accumulate(clipped)
    squares = 9.0 * 5003 * 20
    assert float(clipped.clip[0]) == pytest.approx(squares, rel=SUM_RTOL)
    norm = squares**0.5
    # The coefficient is rounded to float32.
    expected = (norm / (norm + 1e-6)) ** 2
    assert float(clipped.sums[0, GG]) == pytest.approx(expected, rel=2 * 2.0**-23)


def test_the_host_never_waits(clipped):
    clip_and_accumulate(clipped)
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip_and_accumulate(clipped)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_norm_is_one_launch(clipped):
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        clipped.backend.norm(clipped)
        torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.name.startswith(("Mem", "mem"))
    ]
    if not kernels:
        pytest.skip("the profiler sees no kernels here")
    assert len(kernels) == 1
    assert "norm_kernel" in kernels[0]


def test_a_captured_norm_replays_with_the_gradients_of_the_day(clipped):
    clip_and_accumulate(clipped)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clip_and_accumulate(clipped)
    for g in clipped.grads:
        g.fill_(0.5)
    graph.replay()
    assert float(clipped.clip[0]) == pytest.approx(0.25 * 5003 * 20, rel=SUM_RTOL)
