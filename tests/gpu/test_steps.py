"""A step on a GPU: few launches, on the current stream, over weights of several devices."""

import pytest
import torch
from support.cases import (
    EXACT,
    FEW,
    FUSED,
    QUICK,
    RUNNING,
    SIZES,
    STEPS,
    SUM_RTOL,
    assert_same,
    snapshot,
)
from support.kernels import FLOAT_SUM_RTOL, READ_ON_DEVICE, gpu_kernels
from support.lockstep import give_gradients, random_gradient, written

from mechanic_fused.plan import StepPlan

GPU = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(params=READ_ON_DEVICE)
def backend(request, monkeypatch):
    return gpu_kernels(request.param, monkeypatch).name


def model(devices, backend, sizes=SIZES, **options):
    """An optimizer over weights that lie on these devices by turns, and the weights."""
    rng = torch.Generator().manual_seed(0)
    places = [devices[i % len(devices)] for i in range(len(sizes))]
    drawn = [torch.randn(n, generator=rng).to(to) for n, to in zip(sizes, places, strict=True)]
    params = [torch.nn.Parameter(x) for x in drawn]
    options = {"variant": EXACT, **QUICK, **options}
    return FUSED["adamw"](params, weight_decay=0.1, backend=backend, **options), params


def step(opt, params, t):
    give_gradients(params, t)
    opt.step()


def test_the_current_stream_is_used(backend):
    (opt, params), (other, others) = (model([GPU], backend) for _ in range(2))
    step(opt, params, 0)
    step(other, others, 0)
    for t in range(1, FEW):
        step(other, others, t)
        fresh = [random_gradient(p, t, i).to(GPU) for i, p in enumerate(params)]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            # A step on any other stream would be done before its gradients are there.
            torch.cuda._sleep(20_000_000)
            for p, g in zip(params, fresh, strict=True):
                p.grad.copy_(g)
            opt.step()
        torch.cuda.synchronize()
        assert_same(snapshot(opt), snapshot(other))


LAUNCHES = {
    EXACT: ["accumulate_kernel", "tune_kernel", "apply_kernel"],
    RUNNING: ["step_kernel", "log_tune_kernel"],
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("variant", LAUNCHES)
def test_few_launches_a_step(backend, variant):
    opt, params = model([GPU], backend, SIZES * 20, variant=variant)
    for t in range(2):
        step(opt, params, t)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in names if not name.lower().startswith(("memcpy", "memset"))]
    if not kernels:
        pytest.skip("the profiler sees no kernels here")
    ops = LAUNCHES[variant]
    assert len(kernels) == len(ops), kernels
    assert all(sum(op in kernel for kernel in kernels) == 1 for op in ops), kernels


@pytest.fixture
def meeting(monkeypatch):
    """Sums of a first and a second optimizer agree; then the second goes on with the first's."""
    accumulate_of, tune_of = StepPlan.accumulate, StepPlan.tune
    recorded = []

    def accumulate(plan, shared):
        [(groups, found)] = accumulate_of(plan, shared).items()
        assert found.device == plan.tuner.device
        if not recorded:
            recorded.append(found.clone())
            return {groups: found}
        expected = recorded[0].to(found.device)
        # gΔ and xΔ cancel; by Cauchy and Schwarz their terms are no larger than this. The C++ code
        # of one of the two takes sums of float32 within its blocks.
        largest = expected.abs().max(0).values.sum() + 1
        assert ((found - expected).abs() <= FLOAT_SUM_RTOL * largest).all()
        return {groups: expected}

    def tune(plan, total):
        tune_of(plan, total)
        if len(recorded) == 1:
            recorded.append(plan.tuner.state.clone())
        else:
            expected = recorded[1].to(plan.tuner.device)
            torch.testing.assert_close(plan.tuner.state, expected, rtol=SUM_RTOL, atol=0)
            plan.tuner.state.copy_(expected)
            recorded.clear()

    monkeypatch.setattr(StepPlan, "accumulate", accumulate)
    monkeypatch.setattr(StepPlan, "tune", tune)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")


@pytest.mark.parametrize("scale_per", ["model", "parameter"])
@pytest.mark.parametrize(
    "devices",
    [
        ("cpu", GPU),
        (GPU, "cpu"),
        pytest.param(("cuda:0", "cuda:1"), marks=two_gpus),
        pytest.param(("cuda:1", "cpu", "cuda:0"), marks=two_gpus),
    ],
    ids=str,
)
def test_weights_on_several_devices_share_their_scale(meeting, devices, scale_per):
    """As all of them on the CPU; the sums meet on the first weight's device."""
    opt, params = model(["cpu"], "auto", scale_per=scale_per)
    other, others = model(devices, "auto", scale_per=scale_per)
    for t in range(STEPS):
        step(opt, params, t)
        step(other, others, t)
        assert other.scale.device == others[0].device
        assert_same(other.scale.cpu(), opt.scale)
        assert_same(written(other, others), written(opt, params))
    assert len({p.device for p in others}) == len(devices)


@two_gpus
def test_the_right_device_is_set_before_a_launch(backend):
    """Weights on a GPU that is not the current one."""
    opt, params = model(["cuda:1"], backend)
    other, others = model(["cuda:0"], backend)
    with torch.cuda.device("cuda:0"):
        for t in range(FEW):
            step(opt, params, t)
            step(other, others, t)
    for p, q in zip(params, others, strict=True):
        assert_same(p.detach().cpu(), q.detach().cpu())
