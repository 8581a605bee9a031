"""After the first informative step nobody on the host reads a number from the device.

In Triton's interpreter a CPU's tensors stand for the device's: whatever the step would read of them
on a GPU shows in the same operations.
"""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from support.cases import EXACT, FUSED, QUICK, RUNNING, STEPS, assert_same
from support.kernels import INTERPRETED, READ_ON_DEVICE, kernels_of
from support.lockstep import distance, drawn, moved, random_gradient, written
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mechanic_fused import mechanize
from mechanic_fused.plan import StepPlan

# What torch says of its own prototype, the sync debug mode.
pytestmark = pytest.mark.filterwarnings("ignore:.*Synchronization debug mode:UserWarning")

SKIPPED = 7  # the step that GradScaler skips
LOSS_SCALE = 1024.0


class HostRead(Exception):
    """The host has asked for what is on the device."""


class NoReadingOperations(TorchDispatchMode):
    """Fails for operations whose result the host must wait for, and for copies to the CPU."""

    READS = (
        "aten::_local_scalar_dense",
        "aten::equal",
        "aten::is_nonzero",
        "aten::item",
        "aten::masked_select",
        "aten::nonzero",
        "aten::_unique2",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in self.READS or fetches(name, args, kwargs) or counts_a_mask(name, args):
            raise HostRead(name)
        return func(*args, **kwargs)


def fetches(name, args, kwargs):
    """Whether the result is on the CPU and the source is not."""
    if name == "aten::copy_":
        return place(args[0]) == "cpu" != place(args[1])
    to = kwargs.get("device") if name == "aten::_to_copy" else None
    return to is not None and torch.device(to).type == "cpu" != place(args[0])


def counts_a_mask(name, args):
    """Whether the number of elements that a mask picks must be known."""
    masks = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else ()
    return any(mask is not None and mask.dtype is torch.bool for mask in masks)


def place(x):
    """The type of the device that x is on, whatever its class says."""
    return torch.Tensor.device.__get__(x).type


class NoLists(TorchFunctionMode):
    """Fails for the reads that are no operation where the tensor is on the CPU."""

    READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.READS:
            raise HostRead(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads():
    """Raise HostRead where the host reads a tensor; on a GPU also torch's own error for waiting."""
    with ExitStack() as modes:
        modes.enter_context(NoReadingOperations())
        modes.enter_context(NoLists())
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
            modes.callback(torch.cuda.set_sync_debug_mode, "default")
        yield


class PretendedlyOnTheGpu(torch.Tensor):
    """A number of the CPU that passes for one of the device, so that nobody may read it."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: int(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: torch.equal(x, x + 1),
        lambda x: x[0].is_nonzero(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.to("meta").cpu(),
        lambda x: x.copy_(x.to("meta")),
    ],
)
def test_the_guard_sees_a_read(read):
    x = torch.ones(3)
    with pytest.raises(HostRead), no_host_reads():
        read(x)


def test_the_guard_lets_work_on_the_device_pass():
    x, y = torch.ones(3), torch.zeros(3)
    with no_host_reads():
        y.copy_(x).mul_(2)
        assert y.double().sum().shape == ()
    assert y.tolist() == [2.0] * 3


@pytest.fixture(params=READ_ON_DEVICE)
def train(request, monkeypatch):
    """Gives a function that makes one step, then STEPS of them under a guard.

    With ``on_device`` kernels get the lr and GradScaler's numbers as tensors on the device;
    otherwise the host reads them, as it does for weights on a CPU.
    """
    kernels = kernels_of(request.param, monkeypatch)

    def run(make, guard, on_device=True, **options):
        monkeypatch.setattr(StepPlan, "_reads_on_device", lambda plan: on_device)
        starts = drawn(torch.float32, (3, 0, 1025))() + drawn(torch.bfloat16, (5,))()
        params = [torch.nn.Parameter(moved(x, kernels.device)) for x in starts]
        numbers = [torch.full((), x, device=kernels.device) for x in (1.0, LOSS_SCALE, 0.0)]
        lr, grad_scale, found_inf = numbers
        given = lr.as_subclass(PretendedlyOnTheGpu) if on_device and INTERPRETED else lr
        opt = make(
            params, backend=kernels.name, **{"lr": given, "variant": EXACT, **QUICK, **options}
        )
        opt.grad_scale, opt.found_inf = grad_scale, found_inf
        for t in range(1 + STEPS):
            lr.fill_(1.0 + t / 16)
            found_inf.fill_(float(t == SKIPPED))
            for i, p in enumerate(params):
                p.grad = moved(LOSS_SCALE * random_gradient(p, t, i), kernels.device)
            with guard() if t else ExitStack():
                opt.step()
        return opt, params

    return run


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("adamw", {"weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9, "scale_per": "group"}),
        ("lion", {"scale_per": "parameter"}),
        ("adamw", {"delta_dtype": torch.bfloat16}),
        ("adamw", {"variant": RUNNING, "weight_decay": 0.1}),
        ("lion", {"variant": RUNNING, "scale_per": "parameter"}),
    ],
    ids=str,
)
def test_twenty_steps_read_nothing_and_follow_the_numbers_on_the_device(train, base, options):
    opt, params = train(FUSED[base], no_host_reads, **options)
    twin, others = train(FUSED[base], ExitStack, on_device=False, **options)
    assert_same(written(opt, params), written(twin, others))
    assert_same(opt.scale.cpu(), twin.scale.cpu())
    assert distance(opt) > 0


def test_a_step_that_reads_is_caught(train):
    logging = mechanize(torch.optim.AdamW, log_every=1, log_func=lambda values: None)
    with pytest.raises(HostRead, match="_local_scalar_dense"):
        train(logging, no_host_reads)


def test_a_step_whose_host_reads_the_scaler_is_caught(train):
    with pytest.raises(HostRead, match="_local_scalar_dense"):
        train(FUSED["adamw"], no_host_reads, on_device=False)
