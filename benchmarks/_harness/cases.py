"""What is measured: lists of weight shapes, and the bytes that a step must read and write."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mechanic_fused.backends.layout import HYPER

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A list of weights.

    Args:
        name: its name in tables and options.
        shapes: the shape of each weight.
        dtype: the dtype of weights and gradients.
    """

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def shrunk(self) -> Case:
        """Return a miniature with the same name; it only shows that the code runs."""
        small = [
            tuple(min(d // 16, 4096) if d >= 64 else d for d in shape) for shape in self.shapes[:16]
        ]
        return replace(self, shapes=tuple(small))

    def draw(self, device: torch.device, spread: float, seed: int) -> list[Tensor]:
        """Return normally distributed tensors, determined by the seed and the device."""
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.empty(shape, dtype=self.dtype, device=device).normal_(
                0, spread, generator=generator
            )
            for shape in self.shapes
        ]


def gpt(layers: int, width: int, vocabulary: int, context: int) -> tuple[Shape, ...]:
    """Return the weight shapes of a GPT-2 with these sizes and a tied head."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    blocks = (norm + attention + norm + mlp) * layers
    return ((vocabulary, width), (context, width), *blocks, *norm)


GPT_35M = gpt(layers=6, width=512, vocabulary=31_000, context=512)
GPT_125M = gpt(layers=12, width=768, vocabulary=50_304, context=1_024)
GPT2_124M = gpt(layers=12, width=768, vocabulary=50_257, context=1_024)
GPT_39M_DEEP = gpt(layers=12, width=512, vocabulary=1_024, context=512)
GPT_1500M = gpt(layers=48, width=1_600, vocabulary=50_257, context=1_024)

MUON = "39M-muon"
"""Twelve layers of width 512, whose matrices are for Muon."""

CPU = (
    Case("35M", GPT_35M),
    Case("125M", GPT_125M),
    Case("35M-bf16", GPT_35M, torch.bfloat16),
    Case("125M-bf16", GPT_125M, torch.bfloat16),
    Case("1000x1000", ((1_000,),) * 1_000),
    Case("1000x16", ((16,),) * 1_000),
    Case("one-35M", ((35_000_000,),)),
    Case(MUON, GPT_39M_DEEP),
)

GPU = (
    Case("1.5B", GPT_1500M),
    Case("1000x1000", ((1_000,),) * 1_000),
    Case("124M", GPT2_124M),
    Case("1000x16", ((16,),) * 1_000),
    Case("1.5B-bf16", GPT_1500M, torch.bfloat16),
    Case("124M-bf16", GPT2_124M, torch.bfloat16),
    Case("1000x1000-bf16", ((1_000,),) * 1_000, torch.bfloat16),
    Case("1000x16-bf16", ((16,),) * 1_000, torch.bfloat16),
)
"""Cases with a requirement come first, so that a run that is cut short has measured them."""


def plan_bytes(optimizer: Any) -> int:
    """Return the bytes that a step of ours must read and write, from the tables of its plan.

    norm reads g, if gradients are clipped. step reads g, what is kept of x_ref, x with its low bits
    and the base's state, and writes x and the state. In the exact forms accumulate reads g, Δ, the
    base's state and, for weight decay, x; it writes Δ and the state. apply reads x_ref and Δ, and
    writes x.

    Args:
        optimizer: must have taken a step.
    """
    total = 0
    l2, decay = HYPER.index("l2"), HYPER.index("decay")
    for bucket in optimizer._plan.buckets:
        for i, x in enumerate(bucket.weights):
            hyper = bucket.hyper[bucket.groups[i]]
            moved = sum(t.nbytes for t in (*bucket.states[i], *bucket.scales[i]))
            clips = optimizer.max_grad_norm is not None
            if not bucket.delta:
                moved += x.nbytes + sum(low.nbytes for low in bucket.x_low[i : i + 1])
                reads = (1 + clips) * x.nbytes + bucket.x_ref[i].nbytes
                total += bool(bucket.tensors[i, 0]) * (reads + 2 * moved)
                continue
            delta = sum(t.nbytes for t in (bucket.delta[i], *bucket.delta_scales[i : i + 1]))
            moved += delta
            reads_x = bool(hyper[l2] or hyper[decay])
            if bucket.tensors[i, 0]:
                total += (1 + clips) * x.nbytes + 2 * moved + reads_x * x.nbytes
            total += bucket.x_ref[i].nbytes + delta + x.nbytes
    return total


class CountBytes(TorchDispatchMode):
    """Count the bytes that each torch operation reads (its inputs) and writes (its outputs).

    For an optimizer made of such operations the sum is its memory traffic, caches aside.
    """

    WRITE_ONLY = ("copy_", "_foreach_copy_", "zero_", "_foreach_zero_", "fill_")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        name = schema.name.removeprefix("aten::")
        aliases = [a.alias_info for a in schema.arguments]
        writes = [a is not None and a.is_write for a in aliases]
        is_view = any(aliases) and not any(writes)
        if is_view or name.startswith("empty"):
            return out
        given = [*args, *((kwargs or {}).get(a.name) for a in schema.arguments[len(args) :])]
        for i, value in enumerate(given):
            # Fused optimizers declare their gradients as written, but only write for GradScaler.
            written = writes[i] and not (name.startswith("_fused") and i == 1)
            read = not (written and name in self.WRITE_ONLY)
            self.bytes += _nbytes(value) * (written + read)
        if not any(writes):
            self.bytes += _nbytes(out)
        return out


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_nbytes, value)) if isinstance(value, (list, tuple)) else 0


def counted_bytes(make: Any, dtype: torch.dtype) -> float:
    """Return the bytes per parameter that a step of ``make(weights)`` moves, by its operations."""
    weight = torch.nn.Parameter(torch.randn(1 << 16).to(dtype))
    weight.grad = torch.randn(1 << 16).to(dtype)
    optimizer = make([weight])
    for _ in range(2):
        optimizer.step()
    with CountBytes() as counter:
        optimizer.step()
    return counter.bytes / weight.numel()
