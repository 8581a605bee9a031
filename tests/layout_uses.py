"""Uses of a sharded optimizer beyond the plain loop: scalers, containers, stages, clipping.

The functions run on every rank of a pool; those with ``layout="single"`` also in one process.
"""

import functools

import torch
from layouts import (
    BASES,
    CHANGES,
    LAYOUTS,
    OPTIONS,
    average_plain_gradients,
    batch,
    flat_mesh,
    full_weights,
    loss_of,
    model,
    optimizer,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mechanic_fused import MechanicAdamW, step_together


def make(layout, base="adamw", **options):
    net, needed = (model(), {}) if layout == "single" else LAYOUTS[layout](model())
    return net, optimizer(base, layout, net.parameters(), **needed, **options)


def result(net, opt):
    opt = getattr(opt, "optim", opt)
    return {
        "weights": full_weights(net),
        "scale": opt.scale,
        "nonfinite": opt.nonfinite_steps,
    }


def set_one(net, name, value):
    """Set one element of a gradient on the ranks that have it: the last one, in the last shard."""
    for found, p in net.named_parameters():
        if name in found:
            if isinstance(p.grad, DTensor):
                g = p.grad.redistribute(p.device_mesh, p.placements)
                whole = g.full_tensor()
                whole.view(-1)[-1] = value
                p.grad = distribute_tensor(whole, g.device_mesh, g.placements, src_data_rank=None)
            elif p.grad is not None and p.grad.numel():
                p.grad.view(-1)[-1] = value


def scaled_run(layout, steps, sharded_scaler=False, **options):
    """Train with GradScaler; in step 3 one element of one gradient overflows."""
    net, opt = make(layout, **options)
    if sharded_scaler:
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        scaler = ShardedGradScaler(device="cpu", init_scale=1024.0)
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(steps):
        opt.zero_grad()
        scaler.scale(loss_of(net, batch(t))).backward()
        average_plain_gradients(net)
        if t == 3:
            set_one(net, "up.weight", float("inf"))
        scaler.step(opt)
        scaler.update()
    return {**result(net, opt), "factor": scaler.get_scale()}


def clipped_run(layout, steps, max_norm, inside, change=None, **options):
    """Train with gradients clipped by the optimizer, or before it by torch."""
    net, opt = make(layout, max_grad_norm=max_norm if inside else None, **options)
    norms = []
    for t in range(steps):
        opt.zero_grad()
        loss_of(net, batch(t)).backward()
        average_plain_gradients(net)
        if change:
            CHANGES[change](net, t)
        if not inside:
            norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), max_norm)))
        opt.step()
        if inside:
            norms.append(float(getattr(opt, "optim", opt).grad_norm))
    return {**result(net, opt), "norms": norms}


def accumulated_run(layout, steps, passes=2):
    """Train on the gradients of several passes, which are reduced over ranks after the last."""
    net, opt = make(layout)
    for t in range(steps):
        opt.zero_grad()
        for k in range(passes):
            last = k == passes - 1
            loss = functools.partial(loss_of, net, batch(passes * t + k))
            if layout == "ddp" and not last:
                with net.no_sync():
                    (loss() / passes).backward()
            else:
                if layout in ("fsdp2", "hsdp"):
                    net.set_requires_gradient_sync(last)
                (loss() / passes).backward()
        opt.step()
    return result(net, opt)


def pipeline_stage(steps, **options):
    """Each rank trains its half of the weights; the other half is the other rank's stage."""
    net = model()
    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    mine = [p for i, p in enumerate(net.parameters()) if i % 2 == rank]
    opt = BASES["adamw"](mine, extra_groups=[world], **OPTIONS, **options)
    for t in range(steps):
        net.zero_grad()
        loss_of(net, batch(t)).backward()
        opt.step()
        # A real pipeline keeps them apart; here both halves are wanted for the next forward.
        for i, p in enumerate(net.parameters()):
            torch.distributed.broadcast(p.detach(), i % 2)
    return result(net, opt)


def idle_stage():
    """One stage is frozen; the other one's steps must not wait for it."""
    rank, world = torch.distributed.get_rank(), torch.distributed.group.WORLD
    weight = nn.Parameter(torch.ones(3), requires_grad=rank == 1)
    opt = MechanicAdamW([weight], lr=1.0, extra_groups=[world], **OPTIONS)
    for _ in range(4):
        if rank == 1:
            weight.grad = torch.full((3,), 2.0)
        opt.step()
    moved = bool((weight != 1).any())
    assert moved == (rank == 1)
    assert float(opt.scale) > 0


def lose_groups():
    """A copy of an optimizer cannot have its process groups."""
    import copy

    net, opt = make("fsdp1")
    other = copy.deepcopy(opt)
    try:
        other.step()
    except RuntimeError as error:
        assert "set reduce_group" in str(error)
    else:
        raise AssertionError("a copy without its group took a step")
    other.reduce_group = torch.distributed.group.WORLD
    other.step()


def forget_the_group():
    """FSDP1 without reduce_group would learn from this rank's sums alone."""
    net, _ = LAYOUTS["fsdp1"](model())
    opt = MechanicAdamW(net.parameters())
    loss_of(net, batch(0)).backward()
    try:
        opt.step()
    except ValueError as error:
        assert "need reduce_group=" in str(error)
    else:
        raise AssertionError("weights of FSDP1 were taken for whole ones")


class Container(torch.optim.Optimizer):
    """An optimizer for each part of a model, as torchtitan builds them: options for kernels in
    every group, one state dict of flat names, and here one scale for all parts.

    Args:
        parts: modules.
        make: params → optimizer.
    """

    def __init__(self, parts, make):
        self.parts = parts
        self.optimizers = [
            make([{"params": list(part.parameters()), "fused": False, "foreach": False}])
            for part in parts
        ]
        super().__init__([p for part in parts for p in part.parameters()], {})

    def step(self, closure=None):
        step_together(self.optimizers)

    def zero_grad(self, set_to_none=True):
        for opt in self.optimizers:
            opt.zero_grad(set_to_none)

    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self):
        pairs = zip(self.parts, self.optimizers, strict=True)
        states = [get_optimizer_state_dict(*pair, options=self.flat) for pair in pairs]
        return {name: value for state in states for name, value in state.items()}

    def load_state_dict(self, state_dict):
        for part, opt in zip(self.parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, opt, state_dict, options=self.flat)


def contained_run(steps, saved_at=None, sharded=True):
    """Train a model in two parts; with ``saved_at`` go on in fresh objects from there."""

    def make_all():
        net = model()
        parts = [nn.ModuleDict({"a": net.embedding, "b": net.norm})]
        parts.append(nn.ModuleDict({"c": net.up, "d": net.down, "e": net.gain, "f": net.head}))
        if sharded:
            for part in (net.embedding, net.norm, net.up, net.down, net.gain, net.head):
                fully_shard(part, mesh=flat_mesh())
        return net, Container(parts, functools.partial(BASES["adamw"], **OPTIONS))

    net, opt = make_all()
    for t in range(steps):
        if t == saved_at:
            state = opt.state_dict()
            old, (net, opt) = net, make_all()
            with torch.no_grad():
                for p, q in zip(net.parameters(), old.parameters(), strict=True):
                    p.copy_(q)
            opt.load_state_dict(state)
        opt.zero_grad()
        loss_of(net, batch(t)).backward()
        opt.step()
    return result(net, opt.optimizers[0])
