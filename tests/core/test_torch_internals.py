"""Every private name of torch that the package touches is there, and means what we need of it."""

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
from support.cases import make_weights
from torch import nn

import mechanic_fused
from mechanic_fused import MechanicAdamW, torch_internals
from mechanic_fused.torch_internals import local

schedulers = torch.optim.lr_scheduler


@pytest.fixture(scope="module")
def mesh():
    """A mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def sharded(mesh):
    """A DTensor, as a parameter."""
    from torch.distributed.tensor import Shard, distribute_tensor

    return nn.Parameter(distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)]))


def test_local_tensor(sharded, mesh):
    """The shard itself, without a view and without autograd; waited for where it is on its way."""
    shard = local(sharded)
    assert type(shard) is torch.Tensor
    assert shard.data_ptr() == sharded.to_local().data_ptr()
    assert torch_internals.local_tensors([sharded])[0] is shard
    plain = torch.ones(2)
    assert local(plain) is plain
    from torch.distributed import _functional_collectives as collectives
    from torch.distributed.tensor import DTensor, Replicate

    running = collectives.all_reduce(plain, "sum", mesh.get_group())
    pending = DTensor.from_local(running, mesh, [Replicate()], run_check=False)
    assert hasattr(pending._local_tensor, "wait")
    assert type(local(pending)) is torch.Tensor


def test_is_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert torch_internals.is_fake(nn.Parameter(torch.ones(2)))
        assert torch_internals.in_fake_mode()
    assert not torch_internals.in_fake_mode()
    assert not torch_internals.is_fake(torch.ones(2))


def test_global_offset(sharded):
    """Where the shard begins; tests/distributed/test_x_ref_in_shards.py has more than one."""
    assert torch_internals.global_offset(sharded) == (0, 0)


def test_spec(sharded):
    """It tells mesh and placements; a gradient has that of its weight."""
    sharded.square().backward(torch.ones_like(sharded))
    for tensor in (sharded, sharded.grad):
        assert tensor._spec.mesh is sharded.device_mesh
        assert tensor._spec.placements == sharded.placements
    (shard,) = torch_internals.plain_local_gradients([sharded])
    assert shard is sharded.grad._local_tensor
    assert torch_internals.plain_local_gradients(make_weights()) is None


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fsdp_flattened(mesh):
    """FSDP1 marks the weights that it has flattened."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    assert all(torch_internals.is_fsdp1_flat(p) for p in net.parameters())
    assert not any(map(torch_internals.is_fsdp1_flat, make_weights()))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_shard_numel_padded(mesh):
    """Of a flat weight whose elements do not fill the shards of all ranks; here there is one."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    cpu = torch.device("cpu")
    net = FullyShardedDataParallel(nn.Linear(2, 2), device_id=cpu, use_orig_params=False)
    (flat,) = net.parameters()
    assert flat._shard_numel_padded == torch_internals.padding_of(flat) == 0
    assert not any(map(torch_internals.padding_of, make_weights()))


def test_version():
    """Every write through torch advances it, and reading does not."""
    x = torch.zeros(3)
    seen = [torch_internals.read_version(x)]
    for write in (
        lambda: x.add_(1),
        lambda: x[:1].fill_(2),
        lambda: torch.autograd.graph.increment_version(x),
    ):
        write()
        seen.append(torch_internals.read_version(x))
    assert seen == sorted(set(seen))
    x.sum()
    assert torch_internals.read_version(x) == seen[-1]


@pytest.mark.parametrize("base", [torch.optim.RAdam, torch.optim.Adagrad])
def test_wrapped(base):
    """A class whose step torch has wrapped to run hooks keeps the original."""

    class Fresh(base):
        def step(self, closure=None):
            return "stepped"

    original = Fresh.step
    assert torch_internals.unhooked_step(Fresh) is original
    opt = Fresh(make_weights())
    assert Fresh.step is not original
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("hook"))
    assert torch_internals.unhooked_step(Fresh)(opt) == "stepped"
    assert calls == []


def test_warned_capturable_if_run_uncaptured():
    """Set in a constructor and lost in a copy; once it is set, a step no longer asks."""
    name = "_warned_capturable_if_run_uncaptured"
    opt = torch.optim.Adafactor(make_weights())
    assert getattr(opt, name) is True
    twin = copy.deepcopy(opt)
    assert not hasattr(twin, name)
    torch_internals.mute_capturable_warning(twin)
    assert getattr(twin, name) is True


def test_opt_called():
    """A scheduler warns of a step of its own before one of the optimizer, and goes by this."""
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1)
    scheduler = schedulers.ExponentialLR(opt, 0.9)
    assert not torch_internals.get_step_called(opt)
    opt.step()
    assert torch_internals.get_step_called(opt)
    torch_internals.set_step_called(opt, False)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_schedulers():
    """Those that a scheduler is made of, in their order."""
    opt = torch.optim.SGD(make_weights(), lr=0.1)
    parts = [schedulers.ConstantLR(opt), schedulers.ExponentialLR(opt, 0.9)]
    assert torch_internals.inner_schedulers(parts[0]) == ()
    sequence = schedulers.SequentialLR(opt, parts, [3])
    assert torch_internals.inner_schedulers(sequence) == tuple(parts)
    chain = schedulers.ChainedScheduler(parts)
    assert torch_internals.inner_schedulers(chain) == tuple(parts)


def test_buffers():
    """A module's own, under each of their names, and to be replaced there."""
    net = nn.Sequential(nn.BatchNorm1d(2))
    unit = torch.ones(2)
    for name in ("unit", "again"):
        net.register_buffer(name, unit)
    net.register_buffer("nothing", None)
    found = list(torch_internals.own_buffers(net))
    assert [name for _, name, _ in found] == ["unit", "again"]
    mapping, name, _ = found[1]
    mapping[name] = torch.zeros(2)
    assert not net.again.any()


def test_step_supports_amp_scaling(monkeypatch):
    """GradScaler leaves unscaling to the optimizers that have it set: torch's fused ones do."""
    name = "_step_supports_amp_scaling"
    assert getattr(torch.optim.AdamW(make_weights(), fused=True), name)
    for fused, hands_over in ((None, False), (True, True)):
        opt = MechanicAdamW(make_weights(), fused=fused)
        for each in (opt, copy.deepcopy(opt)):
            assert getattr(each, name, False) is hands_over
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        seen = {}
        monkeypatch.setattr(opt, "step", lambda opt=opt, seen=seen: seen.update(vars(opt)))
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        scaler.step(opt)
        assert {"grad_scale", "found_inf"} & seen.keys() == (
            {"grad_scale", "found_inf"} if hands_over else set()
        )
        opt.reduce_group = object()
        assert not getattr(opt, name, False)


# Where the names may stand


def private_names():
    """Return the private names of torch in torch_internals.py."""
    tree = ast.parse(Path(torch_internals.__file__).read_text())
    found = set()
    for node in ast.walk(tree):
        names = [getattr(node, "attr", None), getattr(node, "value", None)]
        if isinstance(node, ast.FunctionDef):
            names = [node.name]
        found |= {n for n in names if isinstance(n, str) and re.fullmatch(r"_\w+", n)}
    return found - {"_reads_grad_scaler"}


ALLOWED = {"optimizer.py": {"_step_supports_amp_scaling"}}
"""__setstate__ sets it again, since copies forget it."""


def test_each_private_name_has_a_test():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {name.strip("_") for name in private_names()} <= tests
    assert {"_version", "_local_tensor", "__wrapped__"} <= private_names()


def test_no_other_file_names_one():
    root = Path(mechanic_fused.__file__).parents[1]
    pattern = re.compile(rf"(?<!\w)({'|'.join(private_names())})(?!\w)")
    found = []
    for path in [*root.glob("mechanic_fused/**/*.py"), *root.glob("triton_kernels/*.py")]:
        if path.name != "torch_internals.py":
            names = set(pattern.findall(path.read_text())) - ALLOWED.get(path.name, set())
            found += [f"{path.relative_to(root)}: {name}" for name in sorted(names)]
    assert found == []
