"""How the base's state of a weight is stored: wide, in 16 bits, or in block-wise 8-bit codes.

Options and the shape of the whole weight decide, never the shape of a shard: so the same weights
are narrow on one rank and on a hundred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import quantize
from .backends.layout import compute_dtype
from .distributed import wrap
from .param_checks import has_storage
from .torch_internals import dtensor, is_fake, local

SCALE_SUFFIX = "_scale"
"""Appended to the name of the codes, it names their block scales."""

BLOCKS = (64, 32)
"""Elements that may share a scale: the largest of these that divides a row is taken. With 128 the
error of an update is a tenth larger (benchmarks/state_formats.py)."""

LEAST_ELEMENTS = 4096
"""Elements of the whole weight from which on its state is narrow: smaller ones hold few bytes, and
embeddings, norms and biases of one dimension need every digit."""


@dataclass(frozen=True)
class StateFormat:
    """How the base's state of a weight is stored.

    Args:
        dtype: of its entries; int8 stands for codes, int8 or uint8.
        block: elements that share a scale of codes; 0 without codes.
    """

    dtype: torch.dtype
    block: int = 0


def state_format(
    p: Tensor, optim_bits: int, state_dtype: str | None, reduce_group: Any
) -> StateFormat:
    """Return how the base's state of a weight is stored.

    Args:
        p: the weight, perhaps a DTensor.
        optim_bits: 32, 16 or 8.
        state_dtype: "param" for the weight's own dtype where ``optim_bits`` is 32.
        reduce_group: the process group over which plain weights are sharded, or None.

    Raises:
        ValueError: for shards that would cut a block.
    """
    wide = StateFormat(compute_dtype(p.dtype))
    if optim_bits == 32:
        return StateFormat(p.dtype) if state_dtype == "param" else wide
    if wide.dtype is torch.float64:
        return wide
    if reduce_group is not None and not isinstance(p, dtensor()):
        # Of a plain shard nothing tells the shape of the weight.
        if optim_bits == 8:
            raise ValueError(
                "optim_bits=8 needs weights that are whole or DTensors (fully_shard), since blocks "
                "of codes must not cross ranks: expected optim_bits=16 with reduce_group (FSDP1, "
                "ZeRO), got 8"
            )
        return StateFormat(torch.bfloat16)
    if p.dim() < 2 or p.numel() < LEAST_ELEMENTS:
        return wide
    block = _block_of(p) if optim_bits == 8 else 0
    if not block:
        return StateFormat(torch.bfloat16)
    _check_shards(p, block)
    return StateFormat(torch.int8, block)


def _block_of(p: Tensor) -> int:
    """Return how many elements may share a scale: they are in one row, and next to each other."""
    row = math.prod(p.shape[1:])
    fitting = (block for block in BLOCKS if row % block == 0)
    return next(fitting, 0) if p.is_contiguous() else 0


def _check_shards(p: Any, block: int) -> None:
    """Raise ValueError unless a DTensor's shards hold whole blocks."""
    if not isinstance(p, dtensor()):
        return
    ranks = 1
    for i, placement in enumerate(p.placements):
        if placement.is_replicate() or p.device_mesh.size(i) == 1:
            continue
        dim = getattr(placement, "dim", None)
        ranks *= 1 if dim == 0 else p.device_mesh.size(i)
        if dim != 0 and not (dim == 1 and p.dim() == 2 and p.shape[1] % (block * ranks) == 0):
            raise ValueError(
                f"optim_bits=8 needs shards of whole blocks of {block} elements of a row: expected "
                f"Shard(dim=0), or Shard(dim=1) of a matrix whose rows {ranks} ranks can share so, "
                f"or optim_bits=16 in its param group, got {tuple(p.placements)} for a weight of "
                f"shape {tuple(p.shape)}"
            )


def scale_shape(x: Tensor, block: int) -> tuple[int, int]:
    """Return the shape of the scales of a weight's codes: a row of them for each of its rows."""
    return x.shape[0], math.prod(x.shape[1:]) // block


def new_codes(x: Tensor, block: int, codes: quantize.Codes) -> tuple[Tensor, Tensor]:
    """Return the codes of zeros in x's shape and sharding, and their scales."""
    zeros = torch.zeros_like(x, dtype=codes.dtype, memory_format=torch.preserve_format)
    mine = local(x)
    scales = torch.zeros(scale_shape(mine, block), dtype=torch.float32, device=mine.device)
    return zeros, wrap(scales, x, scale_shape(x, block))


def encode(value: Tensor, x: Tensor, block: int, codes: quantize.Codes) -> tuple[Tensor, Tensor]:
    """Return the nearest codes of a state in x's shape and sharding, and their scales."""
    mine = local(value).detach().to(torch.float32)
    q, scales = quantize.quantize(mine.reshape(-1, block), quantize.FRACTION // 2, codes)
    shape = scale_shape(mine, block)
    return wrap(q.view(mine.shape), x), wrap(scales.view(shape), x, scale_shape(x, block))


def decode(value: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 state of codes and their scales, in the codes' shape and sharding."""
    q, of_blocks = local(value), local(scales)
    codes = quantize.FORMATS[q.dtype]
    block = q.numel() // of_blocks.numel() if of_blocks.numel() else 1
    wide = quantize.dequantize(q.reshape(-1, block), of_blocks.reshape(-1), codes)
    return wrap(wide.view(q.shape), value)


def has_codes(name: str, value: Any) -> bool:
    """Return whether an entry of the state holds codes; low bits are integers too."""
    return torch.is_tensor(value) and value.dtype in quantize.FORMATS and name != "x_low"


def codes_of(name: str) -> quantize.Codes:
    """Return the format of an entry's codes: Δ has 16 bits, Adam's second moment no sign."""
    formats = {"exp_avg_sq": quantize.UNSIGNED, "delta": quantize.LINEAR}
    return formats.get(name, quantize.SIGNED)


def check_codes(name: str, entries: dict[str, Any], x: Tensor, what: str) -> None:
    """Raise ValueError unless codes and their block scales can be those of a weight.

    Args:
        name: of the entry that holds codes.
        entries: the weight's state, or that of a checkpoint.
        x: the weight.
        what: how the error begins: the entry and its weight.
    """
    codes: Any = entries[name]
    scales: Any = entries.get(name + SCALE_SUFFIX)
    if codes.dtype is not codes_of(name).dtype:
        raise ValueError(f"{what} holds codes: expected {codes_of(name).dtype}, got {codes.dtype}")
    if codes.shape != x.shape:
        raise ValueError(f"{what} must have its shape, got {tuple(codes.shape)}")
    row = math.prod(x.shape[1:])
    shapes = [scale_shape(x, block) for block in BLOCKS if x.dim() and row % block == 0]
    is_scales = torch.is_tensor(scales) and tuple(scales.shape) in shapes
    if not is_scales or scales.dtype is not torch.float32:
        found = f"{scales.dtype} {tuple(scales.shape)}" if torch.is_tensor(scales) else repr(scales)
        raise ValueError(
            f"{what} holds codes: expected {name}{SCALE_SUFFIX}, their block scales, as "
            f"torch.float32 of a shape out of {shapes}, got {found}"
        )
    if isinstance(codes, dtensor()) != isinstance(scales, dtensor()):
        raise ValueError(
            f"{what} holds codes: expected {name}{SCALE_SUFFIX} sharded as they are, got a "
            f"{type(scales).__name__} beside a {type(codes).__name__}"
        )
    for called, t in ((name, codes), (name + SCALE_SUFFIX, scales)):
        if not (is_fake(x) or has_storage(local(t))):
            raise ValueError(
                f"{what} holds codes: expected {called} to be a plain tensor with storage of "
                f"its own, got a {type(t).__name__} on {t.device}"
            )
