"""Every private name of torch that we use still exists and means what we need; no other is used."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, SequentialLR

import mechanic_fused
from mechanic_fused import MechanicAdamW, torch_internals

PACKAGE = Path(mechanic_fused.__file__).parent
PRIVATE = re.compile(
    r"\b(_local_tensor|_spec|_version|_fsdp_flattened|__wrapped__|_step_supports_amp_scaling"
    r"|_warned_capturable_if_run_uncaptured|_opt_called|_schedulers|_buffers)\b"
)


def test_no_other_file_names_a_private_attribute_of_torch():
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "triton_kernels").glob("*.py")]:
        names = set(PRIVATE.findall(path.read_text()))
        if names and path.name != "torch_internals.py":
            found[path.name] = names
    # A copy must set again what torch's constructor has set.
    assert found == {"optimizer.py": {"_step_supports_amp_scaling"}}


def test_an_in_place_write_advances_the_version():
    x = torch.zeros(3)
    before = torch_internals.read_version(x)
    x.add_(1)
    assert torch_internals.read_version(x) > before
    assert torch_internals.read_version(x.detach()) == torch_internals.read_version(x)
    torch.autograd.graph.increment_version([x])
    assert torch_internals.read_version(x) > before + 1


def test_a_plain_tensor_is_its_own_shard():
    x = torch.zeros(3)
    assert torch_internals.local(x) is x
    assert torch_internals.plain_local_gradients([nn.Parameter(x)]) is None


def test_a_dtensor_has_a_local_tensor_and_a_spec(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        assert torch_internals.dtensor() is DTensor
        shard = torch_internals.local(weight)
        assert type(shard) is torch.Tensor and shard.shape == (4,)
        assert torch_internals.local_tensors([weight])[0].data_ptr() == shard.data_ptr()
        weight.grad = distribute_tensor(torch.full((4,), 2.0), mesh, [Shard(0)])
        (gradient,) = torch_internals.plain_local_gradients([weight])
        assert gradient.tolist() == [2.0] * 4
    finally:
        torch.distributed.destroy_process_group()


def test_fsdp1_marks_its_flat_weights():
    from torch.distributed.fsdp import FlatParameter

    assert not torch_internals.is_fsdp1_flat(nn.Parameter(torch.ones(2)))
    # FSDP1's constructor of flat weights sets the mark: distributed tests see a real one.
    source = Path(torch.distributed.fsdp._flat_param.__file__).read_text()
    assert "_fsdp_flattened" in source and FlatParameter is not None


def test_a_step_can_be_taken_without_its_hooks():
    weight = nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([weight], lr=1.0)
    called = []
    opt.register_step_post_hook(lambda *_: called.append(1))
    weight.grad = torch.ones(2)
    torch_internals.unhooked_step(torch.optim.SGD)(opt)
    assert weight.tolist() == [0.0, 0.0]
    assert not called


def test_a_copy_does_not_ask_its_groups_whether_they_are_capturable():
    opt = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    torch_internals.mute_capturable_warning(opt)
    assert opt._warned_capturable_if_run_uncaptured is True
    source = inspect.getsource(sys.modules[torch.optim.Optimizer.__module__])
    assert "_warned_capturable_if_run_uncaptured" in source


def test_a_scheduler_marks_that_step_was_called():
    weight = nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([weight], lr=1.0)
    ConstantLR(opt)
    assert not torch_internals.get_step_called(opt)
    opt.step()
    assert torch_internals.get_step_called(opt)
    torch_internals.set_step_called(opt, False)
    assert not torch_internals.get_step_called(opt)


def test_a_sequential_scheduler_lists_its_parts():
    opt = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    parts = [ConstantLR(opt), ConstantLR(opt)]
    whole = SequentialLR(opt, parts, milestones=[3])
    assert list(torch_internals.inner_schedulers(whole)) == parts
    assert torch_internals.inner_schedulers(parts[0]) == ()


def test_buffers_are_found_under_each_of_their_names():
    module = nn.BatchNorm1d(2)
    module.register_buffer("again", module.running_mean)
    found = {name: buffer for _, name, buffer in torch_internals.own_buffers(module)}
    assert found["again"] is found["running_mean"] is module.running_mean


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_asks_whether_the_optimizer_unscales(fused):
    opt = MechanicAdamW([nn.Parameter(torch.ones(2))], fused=fused)
    assert opt._step_supports_amp_scaling is fused
    opt.reduce_group = object()
    assert opt._step_supports_amp_scaling is False
    assert "_step_supports_amp_scaling" in Path(torch.amp.grad_scaler.__file__).read_text()
