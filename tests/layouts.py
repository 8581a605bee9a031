"""A small model under every layout of its weights over ranks, trained with one optimizer.

The functions run on every rank of a pool; ``single`` runs in one process.
"""

import functools

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, mechanize

TOKENS, WIDTH, LENGTH, BATCH = 7, 8, 4, 4

BASES = {
    "adamw": functools.partial(MechanicAdamW, lr=1.0, weight_decay=0.1),
    "sgd": functools.partial(MechanicSGD, lr=1.0, momentum=0.9),
    "lion": functools.partial(MechanicLion, lr=1.0, weight_decay=0.1),
    "radam": functools.partial(mechanize(torch.optim.RAdam), lr=1.0),
}
OPTIONS = {"s_init": 1e-3}
"""A scale that moves the weights of such a small model within a few steps."""


class Gain(nn.Module):
    """One row, which leaves all ranks but one with nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, WIDTH))

    def forward(self, x):
        return self.weight * x


class Tiny(nn.Module):
    """A residual block; the embedding has 7 rows, which no even number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.gain = Gain()
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.gain(self.down(self.up(self.norm(x)).relu())))


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return Tiny().to(dtype)


def batch(t, rank=0):
    """Tokens of step t; every rank's own, or rank 0's for all."""
    generator = torch.Generator().manual_seed(1000 * rank + t)
    return torch.randint(TOKENS, (BATCH, LENGTH), generator=generator)


def loss_of(net, tokens):
    logits = net(tokens).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten())


def flat_mesh():
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("dp",))


def square_mesh(first="dp", second="tp"):
    half = torch.distributed.get_world_size() // 2
    return init_device_mesh("cpu", (half, 2), mesh_dim_names=(first, second))


def fsdp2(net):
    """The block's halves as units of their own, as large models are wrapped."""
    mesh = flat_mesh()
    for part in (net.up, net.down, net):
        fully_shard(part, mesh=mesh)
    return net, {}


def fsdp2_with_plain_weights(net):
    """The gain stays plain: the loop averages its gradients."""
    fully_shard(net, mesh=flat_mesh(), ignored_params={net.gain.weight, net.norm.weight})
    return net, {}


def hsdp(net):
    fully_shard(net, mesh=square_mesh("replicate", "shard"))
    return net, {}


def tensor_parallel(net):
    """With gradients that are placed otherwise than their weights: embedding, norm and gain."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "gain": SequenceParallel(use_local_output=True),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(net, flat_mesh(), plan), {}


def fsdp2_and_tensor_parallel(net):
    mesh = square_mesh()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(net, mesh["tp"], plan)
    fully_shard(net, mesh=mesh["dp"])
    return net, {}


def ddp(net):
    return DistributedDataParallel(net), {}


def fsdp1(net):
    net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    return net, {"reduce_group": torch.distributed.group.WORLD}


def fsdp1_flat(net):
    net = FullyShardedDataParallel(net, use_orig_params=False, device_id=torch.device("cpu"))
    return net, {"reduce_group": torch.distributed.group.WORLD}


LAYOUTS = {
    "fsdp2": fsdp2,
    "fsdp2 with plain weights": fsdp2_with_plain_weights,
    "hsdp": hsdp,
    "tp": tensor_parallel,
    "fsdp2 x tp": fsdp2_and_tensor_parallel,
    "ddp": ddp,
    "zero1": ddp,
    "fsdp1": fsdp1,
    "fsdp1 flat": fsdp1_flat,
}


def optimizer(base, layout, params, **options):
    make = BASES[base]
    if layout == "zero1":
        # Importing it warns of torch.jit, which would be an error in the tests' own process.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        group = torch.distributed.group.WORLD
        return ZeroRedundancyOptimizer(
            params, functools.partial(make, reduce_group=group, **{**OPTIONS, **options})
        )
    return make(params, **{**OPTIONS, **options})


def average_plain_gradients(net):
    """What DDP does for weights that FSDP2 was told to leave alone."""
    if any(isinstance(p, DTensor) for p in net.parameters()):
        for p in net.parameters():
            if not isinstance(p, DTensor) and p.grad is not None:
                torch.distributed.all_reduce(p.grad)
                p.grad /= torch.distributed.get_world_size()


def full_weights(net):
    """Whole weights by name, from whatever layout."""
    if isinstance(net, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(net, writeback=False):
            return {clean(name): p.detach().clone() for name, p in net.named_parameters()}
    return {clean(name): whole(p) for name, p in net.named_parameters()}


def clean(name):
    return name.replace("_fsdp_wrapped_module.", "").replace("module.", "")


def whole(p):
    p = p.detach()
    return p.full_tensor() if isinstance(p, DTensor) else p.clone()


def train(net, opt, first, steps, own_batches=False, change=None):
    """Take steps; ``change(net, t)`` may meddle with the gradients first."""
    rank = torch.distributed.get_rank() if own_batches else 0
    for t in range(first, first + steps):
        opt.zero_grad()
        loss_of(net, batch(t, rank)).backward()
        average_plain_gradients(net)
        if change:
            change(net, t)
        opt.step()


def run(
    layout,
    base,
    steps,
    own_batches=False,
    change=None,
    dtype=torch.float32,
    released=False,
    **options,
):
    """Train on this rank; return whole weights, S and the number of steps with NaNs."""
    net, needed = LAYOUTS[layout](model(dtype))
    opt = optimizer(base, layout, net.parameters(), **needed, **options)
    if released:
        opt.release_gradients()
    train(net, opt, 0, steps, own_batches, CHANGES[change])
    inner = getattr(opt, "optim", opt)
    return {
        "weights": full_weights(net),
        "scale": inner.scale,
        "nonfinite": inner.nonfinite_steps,
    }


def single(base, steps, ranks=1, change=None, dtype=torch.float32, **options):
    """The same run in one process; with ``ranks``, on the batches of so many ranks."""
    net = model(dtype)
    opt = BASES[base](net.parameters(), **{**OPTIONS, **options})
    for t in range(steps):
        opt.zero_grad()
        for rank in range(ranks):
            (loss_of(net, batch(t, rank)) / ranks).backward()
        if change:
            CHANGES[change](net, t)
        opt.step()
    return {
        "weights": full_weights(net),
        "scale": opt.scale,
        "nonfinite": opt.nonfinite_steps,
    }


def refuse_release():
    net, _ = ddp(model())
    opt = optimizer("adamw", "ddp", net.parameters())
    try:
        opt.release_gradients()
    except ValueError as error:
        assert "plain weights in a world of 2 ranks" in str(error)
    else:
        raise AssertionError("plain weights were taken")
    opt.release_gradients(reduced=True)


def count_collectives(layout, **options):
    """Return how many collectives one step of the optimizer calls."""
    from torch.distributed.tensor.debug import CommDebugMode

    net, needed = LAYOUTS[layout](model())
    opt = optimizer("adamw", layout, net.parameters(), **needed, **options)
    train(net, opt, 0, 2)
    # The gradients of this backward pass are placed as their weights are.
    loss_of(net, batch(2)).backward()
    for p in net.parameters():
        if isinstance(p.grad, DTensor):
            p.grad = p.grad.redistribute(p.device_mesh, p.placements)
    with CommDebugMode() as counter:
        opt.step()
    return counter.get_total_counts()


def drop_gradients(net, t):
    """In every third step, some weights have no gradient on any rank."""
    if t % 3 == 2:
        for name, p in net.named_parameters():
            if "down" in name or "gain" in name:
                p.grad = None


def drop_all_gradients(net, t):
    if t % 3 == 2:
        for p in net.parameters():
            p.grad = None


def spoil(net, t):
    """In step 3 the first element of the first weight gets a NaN, on the ranks that have it."""
    if t != 3:
        return
    p = next(net.parameters())
    g = p.grad
    if isinstance(g, DTensor):
        whole_gradient = g.full_tensor()
        whole_gradient.view(-1)[0] = float("nan")
        p.grad = distribute_tensor(whole_gradient, g.device_mesh, g.placements, src_data_rank=None)
    elif not getattr(p, "_fsdp_flattened", False) or torch.distributed.get_rank() == 0:
        g.view(-1)[0] = float("nan")


CHANGES = {
    None: None,
    "some": drop_gradients,
    "all": drop_all_gradients,
    "nan": spoil,
}


def rounded_shards():
    """Δ after a step that is the same everywhere: this rank's part, then of a replicated weight."""
    mesh = flat_mesh()
    found = []
    for placement in (Shard(0), Replicate()):
        whole = distribute_tensor(torch.zeros(8, 64), mesh, [placement])
        weight = nn.Parameter(whole)
        weight.grad = torch.full_like(weight, -1.001)
        opt = MechanicSGD([weight], lr=1.0, narrow_delta=True, **OPTIONS)
        opt.step()
        found.append(opt.state[weight]["delta"].to_local())
    return found
