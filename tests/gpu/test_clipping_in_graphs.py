"""Clipping on a GPU: to the norm of the gradients of the day, in one launch, without waiting."""

import pytest
import torch
from support.cases import EXACT, FUSED, QUICK, RUNNING, SUM_RTOL
from support.kernels import READ_ON_DEVICE, gpu_kernels

from mechanic_fused.backends.layout import GG

pytestmark = [
    pytest.mark.gpu,
    # torch says of its own prototypes that they are: sync debug mode, the profiler.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(params=READ_ON_DEVICE)
def backend(request, monkeypatch):
    gpu_kernels(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=[EXACT, RUNNING])
def clipped(request, backend):
    """A bucket of 20 weights whose gradients are 3, to be clipped to a norm of 1."""
    params = [torch.nn.Parameter(torch.ones(5003, device="cuda")) for _ in range(20)]
    opt = FUSED["adamw"](params, lr=1.0, backend=backend, variant=request.param, **QUICK)
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    opt.step()
    [found] = opt._plan.buckets
    found.collect_gradients()
    found.write_tables(found.hyper_rows, {}, None, None)
    found.clip = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cuda")
    found.backend.prepare(found)
    found.backend.norm(found)  # Triton compiles it the first time
    return Clipped(found, opt._plan.tuner if request.param == RUNNING else None)


class Clipped:
    """A bucket with the op that reads its clipped gradients: of the running form with its tuner."""

    def __init__(self, bucket, tuner):
        self.bucket, self.tuner = bucket, tuner

    def norm(self):
        self.bucket.backend.norm(self.bucket)

    def clip_and_use(self):
        self.norm()
        self.bucket.clip[:1].copy_(self.bucket.sums[:, GG])
        if self.tuner is None:
            self.bucket.backend.accumulate(self.bucket)
        else:
            self.bucket.backend.step(self.bucket, self.tuner)


def test_the_gradients_are_clipped_to_the_norm(clipped):
    clipped.clip_and_use()
    squares = 9.0 * 5003 * 20
    assert float(clipped.bucket.clip[0]) == pytest.approx(squares, rel=SUM_RTOL)
    norm = squares**0.5
    # The coefficient is rounded to float32.
    expected = (norm / (norm + 1e-6)) ** 2
    assert float(clipped.bucket.sums[0, GG]) == pytest.approx(expected, rel=2 * 2.0**-23)


def test_the_host_never_waits(clipped):
    clipped.clip_and_use()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clipped.clip_and_use()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_norm_is_one_launch(clipped):
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        clipped.norm()
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
    clipped.clip_and_use()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clipped.clip_and_use()
    for g in clipped.bucket.grads:
        g.fill_(0.5)
    graph.replay()
    assert float(clipped.bucket.clip[0]) == pytest.approx(0.25 * 5003 * 20, rel=SUM_RTOL)
