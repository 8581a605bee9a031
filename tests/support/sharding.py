"""A small model under every layout of its weights over ranks, and one training loop for them all.

``run`` is called on every rank of a pool, and for the layout "single" in one process.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from support.cases import EXACT
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
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
from torch.utils._python_dispatch import TorchDispatchMode

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, mechanize
from mechanic_fused.backends.layout import SUMS

TOKENS, WIDTH, LENGTH, BATCH = 7, 8, 4, 4

BASES = {
    "adamw": functools.partial(MechanicAdamW, lr=1.0, weight_decay=0.1),
    "sgd": functools.partial(MechanicSGD, lr=1.0, momentum=0.9),
    "lion": functools.partial(MechanicLion, lr=1.0, weight_decay=0.1),
    "radam": functools.partial(mechanize(torch.optim.RAdam), lr=1.0),
}
OPTIONS = {"s_init": 1e-3, "variant": EXACT}
"""A scale that moves the weights of such a small model within a few steps."""

SUMS_BYTES, NORMS_BYTES = 2 * len(SUMS) * 8, 2 * 8
"""What a step all-reduces for one scale: a row of sums and one that tells whether there is any
gradient; in a clipped or a first step, N² and whether any gradient is not 0."""

STEPS = 8
SPOILT_STEP = 3
LOSS_SCALE = 1024.0

TOLERANCE = 1e-6
"""Of weights of size 1 in float32: gradients are averaged in another order, 8 ulps of it."""


# The model


class Gain(nn.Module):
    """A weight of one row, which leaves every rank but one with an empty shard."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, width))

    def forward(self, x):
        return self.weight * x


class Tiny(nn.Module):
    """A residual block; the embedding has 7 rows, which no even number of ranks divides."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gain = Gain(width)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.gain(self.down(self.up(self.norm(x)).relu())))


def model(dtype=torch.float32, width=WIDTH):
    torch.manual_seed(0)
    return Tiny(width).to(dtype)


def batch(t, rank=0):
    """Return the tokens of step t; each rank has a stream of its own."""
    generator = torch.Generator().manual_seed(1000 * rank + t)
    return torch.randint(TOKENS, (BATCH, LENGTH), generator=generator)


def loss_of(net, tokens):
    logits = net(tokens).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten())


# The layouts: each takes a model and returns it wrapped, with the options that its optimizer needs


def flat_mesh():
    return init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("dp",))


def square_mesh(first="dp", second="tp"):
    half = distributed.get_world_size() // 2
    return init_device_mesh("cpu", (half, 2), mesh_dim_names=(first, second))


def fsdp2(net):
    """The block's halves are units of their own, as large models are wrapped."""
    mesh = flat_mesh()
    for part in (net.up, net.down, net):
        fully_shard(part, mesh=mesh)
    return net, {}


def fsdp2_with_plain_weights(net):
    """The loop averages the gradients of the weights that stay plain."""
    fully_shard(net, mesh=flat_mesh(), ignored_params={net.gain.weight, net.norm.weight})
    return net, {}


def hsdp(net):
    fully_shard(net, mesh=square_mesh("replicate", "shard"))
    return net, {}


def tensor_parallel(net):
    """The gradients of embedding, norm and gain are placed otherwise than their weights."""
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
    parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    return net, {}


def fsdp1(net, use_orig_params=True):
    cpu = torch.device("cpu")
    net = FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=cpu)
    return net, {"reduce_group": distributed.group.WORLD}


class Layout(NamedTuple):
    ranks: int
    wrap: Callable


LAYOUTS = {
    "single": Layout(1, lambda net: (net, {})),
    "fsdp2": Layout(2, fsdp2),
    "fsdp2 with plain weights": Layout(2, fsdp2_with_plain_weights),
    "hsdp": Layout(4, hsdp),
    "tp": Layout(2, tensor_parallel),
    "fsdp2 x tp": Layout(4, fsdp2_and_tensor_parallel),
    "ddp": Layout(2, lambda net: (DistributedDataParallel(net), {})),
    "zero1": Layout(2, lambda net: (DistributedDataParallel(net), {})),
    "fsdp1": Layout(2, fsdp1),
    "fsdp1 flat": Layout(2, functools.partial(fsdp1, use_orig_params=False)),
}
SHARDED = tuple(name for name in LAYOUTS if name != "single")


def optimizer(layout, base, params, **options):
    make = functools.partial(BASES[base], **{**OPTIONS, **options})
    if layout == "zero1":
        # Importing it warns of torch.jit, which would be an error in the tests' own process.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        group = distributed.group.WORLD
        return ZeroRedundancyOptimizer(params, functools.partial(make, reduce_group=group))
    return make(params)


def average_plain_gradients(net):
    """Average what FSDP2 was told to leave alone, as DDP would."""
    weights = list(net.parameters())
    if any(isinstance(p, DTensor) for p in weights):
        for p in weights:
            if not isinstance(p, DTensor) and p.grad is not None:
                distributed.all_reduce(p.grad)
                p.grad /= distributed.get_world_size()


def full_weights(net):
    """Return whole weights by the names that they have in one process."""
    summon = contextlib.nullcontext()
    if isinstance(net, FullyShardedDataParallel):
        summon = FullyShardedDataParallel.summon_full_params(net, writeback=False)
    found = {}
    with summon:
        for name, p in net.named_parameters():
            x = p.detach()
            name = name.replace("_fsdp_wrapped_module.", "").replace("module.", "")
            found[name] = x.full_tensor() if isinstance(x, DTensor) else x.clone()
    return found


# What may happen to gradients before a step


def drop(net, t, names=("",)):
    """In every third step some weights have no gradient on any rank."""
    if t % 3 == 2:
        for found, p in net.named_parameters():
            if any(name in found for name in names):
                p.grad = None


def spoil(net, t, name, index, value):
    """In one step an element of a gradient is not finite, on the ranks that have it."""
    if t != SPOILT_STEP:
        return
    p = next(p for found, p in net.named_parameters() if name in found)
    if isinstance(p, DTensor):
        whole = p.grad.full_tensor()
        whole.view(-1)[index] = value
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    elif p.grad is not None and p.grad.numel():
        p.grad.view(-1)[index] = value


CHANGES = {
    None: lambda net, t: None,
    "some": functools.partial(drop, names=("down", "gain")),
    "all": drop,
    # On the first rank, and on the last one of a weight that tensor parallelism shards too.
    "nan": functools.partial(spoil, name="embedding.weight", index=0, value=float("nan")),
    "inf": functools.partial(spoil, name="up.weight", index=-1, value=float("inf")),
}


# Training


class Run:
    """A model under a layout, and its optimizer.

    Args:
        layout: a key of LAYOUTS.
        base: a key of BASES.
        released: whether gradients are released.
        reads_state: whether to ask for the optimizer's state first, for which torch takes a dry
            step.
        width: of the model.
        whole: parts of names of weights that keep x_ref whole, in a param group of their own.
        options: of the optimizer.
    """

    def __init__(
        self,
        layout,
        base="adamw",
        dtype=torch.float32,
        released=False,
        reads_state=False,
        width=WIDTH,
        whole=(),
        **options,
    ):
        self.layout = layout
        self.net, needed = LAYOUTS[layout].wrap(model(dtype, width))
        if layout == "ddp":
            needed["loss_group"] = distributed.group.WORLD
        params = self.net.parameters()
        if whole:
            named = list(self.net.named_parameters())
            apart = [p for name, p in named if any(part in name for part in whole)]
            others = [p for _, p in named if not any(p is q for q in apart)]
            params = [{"params": others}, {"params": apart, "x_ref_every": 1}]
        self.opt = optimizer(layout, base, params, **{**needed, **options})
        # The one that ZeroRedundancyOptimizer wraps.
        self.inner = getattr(self.opt, "optim", self.opt)
        self.norms, self.factor = [], None
        if released:
            self.opt.release_gradients()
        if reads_state:
            state = get_optimizer_state_dict(self.net, self.opt)["state"]
            assert all("exp_avg" in entries for entries in state.values())

    def backward(self, t, own_batches=0, passes=1, scaled=lambda loss: loss, observed=False):
        """Compute the gradients of step t.

        Args:
            own_batches: the number of ranks if each trains on its own batches; 0: on the same.
            passes: backward passes; gradients are reduced over ranks after the last.
            scaled: what GradScaler makes of a loss.
            observed: whether the optimizer observes the losses.
        """
        self.opt.zero_grad()
        streams = range(own_batches or 1)
        if self.layout != "single":
            streams = [distributed.get_rank() if own_batches else 0]
        for k in range(passes):
            last, waiting = k == passes - 1, contextlib.nullcontext()
            if self.layout in ("fsdp2", "hsdp"):
                self.net.set_requires_gradient_sync(last)
            elif self.layout == "ddp" and not last:
                waiting = self.net.no_sync()
            with waiting:
                for rank in streams:
                    loss = loss_of(self.net, batch(passes * t + k, rank))
                    if observed:
                        self.inner.observe(loss)
                    scaled(loss / (passes * len(streams))).backward()
        average_plain_gradients(self.net)

    def train(self, first, steps, change=None, loss_scale=None, clip_by_torch=None, **backward):
        """Take steps.

        Args:
            change: a key of CHANGES.
            loss_scale: the initial factor of a GradScaler, or None.
            clip_by_torch: the bound for clip_grad_norm_, or None.
            backward: as for ``backward``.
        """
        scaler = torch.amp.GradScaler
        if self.layout.startswith("fsdp1"):
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as scaler
        scaler = scaler("cpu", loss_scale or 1.0, enabled=loss_scale is not None)
        for t in range(first, first + steps):
            self.backward(t, scaled=scaler.scale, **backward)
            CHANGES[change](self.net, t)
            if clip_by_torch:
                nn.utils.clip_grad_norm_(self.net.parameters(), clip_by_torch)
            scaler.step(self.opt)
            scaler.update()
            if clip_by_torch or self.inner.max_grad_norm:
                self.norms.append(float(self.inner.grad_norm))
        self.factor = scaler.get_scale()

    def result(self):
        return {
            "weights": full_weights(self.net),
            "scale": self.inner.scale,
            "source": self.inner.scale_source,
            "nonfinite": self.inner.nonfinite_steps,
            "norms": self.norms,
            "factor": self.factor,
        }


class Collectives(TorchDispatchMode):
    """Notes the bytes of each all-reduce, and the names of other collectives."""

    def __init__(self):
        super().__init__()
        self.reductions, self.others = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d.allreduce_.default:
            self.reductions.append(sum(t.nbytes for t in args[0]))
        elif "c10d" in function.namespace:
            self.others.append(str(function))
        return function(*args, **(kwargs or {}))


def run(layout, steps=STEPS, **options):
    """Train under a layout and return whole weights, S and what else all ranks must agree on.

    Args:
        options: of Run, and of its ``train``.
    """
    names = ("change", "loss_scale", "clip_by_torch", "own_batches", "passes", "observed")
    of_train = {name: options.pop(name) for name in names if name in options}
    trained = Run(layout, **options)
    trained.train(0, steps, **of_train)
    return trained.result()


def assert_agrees(results, expected, tolerance=TOLERANCE):
    """Check the ranks' results: bitwise the same S on all, the weights of ``expected``."""
    for result in results:
        assert torch.equal(result["scale"], results[0]["scale"])
        assert result["norms"] == results[0]["norms"]
        torch.testing.assert_close(result["scale"], expected["scale"], rtol=1e-4, atol=0)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert result["nonfinite"] == expected["nonfinite"]
        for name, x in expected["weights"].items():
            if name in result["weights"]:
                error = (result["weights"][name].reshape(x.shape) - x).abs().max()
                assert error <= tolerance, (name, float(error))


def assert_equals_single_process(ranks, layout, **options):
    """Check a run under a layout against the run of a single process with the same options.

    Returns:
        the results of the ranks, and the single process's.
    """
    results = ranks(LAYOUTS[layout].ranks).run(run, layout, **options)
    expected = run("single", **options)
    assert_agrees(results, expected)
    return results, expected
