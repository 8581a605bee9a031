"""The model of support.sharding in torchtitan's own container, with its schedulers and metrics.

Functions here are called on ranks, so torchtitan is imported when they are.
"""

import re
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

from mechanic_fused import MechanicAdamW

from . import sharding
from .sharding import STEPS, batch, loss_of

HALF = STEPS // 2
OPTIONS = {"lr": 1.0, "weight_decay": 0.1, **sharding.OPTIONS}
MATRICES = r"(embedding|up|down|head)\.weight"
"""A pattern that finds a weight in every part, as torchtitan asks of one."""

PARTS = (("embedding", "norm"), ("up", "down", "gain", "head"))


def groups_of(optimizer_name="MechanicAdamW", **options):
    """Return the configuration of two groups: matrices by their names, and the rest."""
    from torchtitan.components.optimizer import ParamGroupConfig

    entries = {"optimizer_name": optimizer_name, "optimizer_kwargs": options}
    patterns = (MATRICES, ".*")
    return [ParamGroupConfig(pattern=pattern, **entries) for pattern in patterns]


def container(parts, implementation="fused", param_groups=None, of_tuner=None):
    from mechanic_fused.integrations.torchtitan import MechanicContainer

    config = MechanicContainer.Config(
        param_groups=param_groups or groups_of(lr=1.0, weight_decay=0.1),
        implementation=implementation,
        optimizer_factory_kwargs_by_name={"MechanicAdamW": of_tuner or sharding.OPTIONS},
    )
    return config.build(model_parts=parts)


def model_parts(net, sharded):
    parts = [nn.ModuleDict({name: getattr(net, name) for name in names}) for names in PARTS]
    if sharded:
        for module in net.children():
            fully_shard(module, mesh=sharding.flat_mesh())
    return parts


def make(sharded, **options):
    from torchtitan.components.optimizer import LRSchedulersContainer

    net = sharding.model()
    parts = model_parts(net, sharded)
    optimizers = container(parts, **options)
    config = LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.5)
    return net, parts, optimizers, config.build(optimizers=optimizers, training_steps=STEPS)


def train(net, optimizers, schedulers, first, steps):
    for t in range(first, first + steps):
        optimizers.zero_grad()
        loss_of(net, batch(t)).backward()
        optimizers.step()
        schedulers.step()


def result(net, optimizers):
    scales = [opt.scale for opt in optimizers]
    assert all(torch.equal(scale, scales[0]) for scale in scales)
    counts = [opt.nonfinite_steps for opt in optimizers]
    weights = sharding.full_weights(net)
    return {"weights": weights, "scale": scales[0], "nonfinite": counts[0], "norms": []}


def plain_loop(**options):
    """The same groups and schedule in a plain loop with one optimizer: what must come out."""
    schedulers = make(sharded=False)[-1]
    net = sharding.model()
    pattern = re.compile(MATRICES)
    named = list(net.named_parameters())
    groups = [
        {"params": [p for name, p in named if bool(pattern.search(name)) is matrices]}
        for matrices in (True, False)
    ]
    opt = MechanicAdamW(groups, **{**OPTIONS, **options})
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, schedulers.schedulers[0].lr_lambdas[0])
    train(net, opt, schedule, 0, STEPS)
    return result(net, [opt])


def run(folder=None, sharded=True, reads_state=False, **options):
    """Train; with a folder, save by DCP half way and go on in fresh objects."""
    net, parts, optimizers, schedulers = make(sharded, **options)
    if reads_state:
        before = sharding.full_weights(net)
        optimizers.state_dict()
        assert all(torch.equal(x, before[n]) for n, x in sharding.full_weights(net).items())
    train(net, optimizers, schedulers, 0, HALF)
    if folder:
        dcp.save(states(parts, optimizers, schedulers), checkpoint_id=folder)
        net, parts, optimizers, schedulers = make(sharded, **options)
        dcp.load(states(parts, optimizers, schedulers), checkpoint_id=folder)
    train(net, optimizers, schedulers, HALF, STEPS - HALF)
    return result(net, optimizers)


def states(parts, optimizers, schedulers):
    """Return what torchtitan's checkpoint manager gives to DCP."""
    from torchtitan.components.checkpoint import ModelWrapper

    model = ModelWrapper(parts)
    return {**model.state_dict(), "optimizer": optimizers, "lr_scheduler": schedulers}


def pipeline_run(reduced):
    """Step a part of the model on each rank, with the gradients of the whole, as stages have."""
    net = sharding.model()
    optimizers = container(model_parts(net, sharded=False)[dist.get_rank() : dist.get_rank() + 1])
    if reduced:
        for opt in optimizers:
            opt.extra_groups = (dist.group.WORLD,)
    for t in range(STEPS):
        net.zero_grad()
        loss_of(net, batch(t)).backward()
        optimizers.step()
        for name, p in net.named_parameters():
            dist.broadcast(p.detach(), 0 if name.split(".")[0] in PARTS[0] else 1)
    return result(net, optimizers)


def metrics_run(folder):
    """Return what torchtitan's processor of metrics writes after a step, and S·lr of that step.

    Its monitor of a GPU's memory is replaced.
    """
    from torchtitan.components import metrics
    from torchtitan.distributed import ParallelDims

    from mechanic_fused.integrations.torchtitan import MechanicMetrics

    net, _, optimizers, schedulers = make(sharded=True)
    degrees = dict.fromkeys(("dp_replicate", "cp", "tp", "pp", "ep"), 1)
    dims = ParallelDims(dp_shard=dist.get_world_size(), world_size=dist.get_world_size(), **degrees)
    peak = dict.fromkeys(metrics.DeviceMemStats._fields, 0)
    metrics.build_device_memory_monitor = lambda: SimpleNamespace(
        device_name="A100",
        get_peak_stats=lambda: metrics.DeviceMemStats(**peak),
        reset_peak_stats=lambda: None,
    )
    config = MechanicMetrics.Config(enable_tensorboard=False)
    processor = config.build(parallel_dims=dims, dump_folder=folder)
    processor.optimizers, processor.num_flops_per_token = optimizers, 1
    processor.data_loading_times.append(0.0)
    written = []
    processor.logger.log = lambda metrics, step: written.append(metrics)
    train(net, optimizers, schedulers, 0, 1)
    processor.log(1, 1.0, 1.0, 1.0, extra_metrics=schedulers.get_metrics())
    lr = 0.5  # of a warm-up of two steps
    return written[0], lr * optimizers.optimizers[0].scale.item()
