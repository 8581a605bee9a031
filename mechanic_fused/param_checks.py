"""Which weights cannot be trained at all: errors before anything has changed."""

from __future__ import annotations

import torch
from torch import Tensor

from .bucket import is_dense


def check_weights(weights: list[Tensor]) -> None:
    """Raise ValueError for weights that are complex, not dense in layout, or overlap."""
    spans = []
    for p in weights:
        if p.is_complex():
            raise ValueError(f"weights must be real, got dtype {p.dtype}, shape {tuple(p.shape)}")
        if p.layout is not torch.strided:
            raise ValueError(f"weights must be dense, got layout {p.layout}")
        if p.device.type == "meta":
            raise ValueError(f"weights must have storage, got device meta, shape {tuple(p.shape)}")
        if p.numel() and p.data_ptr() == 0:
            raise ValueError(
                f"weights must be plain tensors with storage of their own, got a "
                f"{type(p.data).__name__} of shape {tuple(p.shape)}"
            )
        if p.is_neg():
            raise ValueError("weights must not be lazily negated views: call resolve_neg()")
        if p.numel():
            last = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
            start = p.data_ptr()
            spans.append((str(p.device), start, start + (last + 1) * p.element_size(), p))
    spans.sort(key=lambda span: span[:2])
    neighbours: list[Tensor] = []
    end = 0
    for i, (device, start, stop, p) in enumerate(spans):
        if i == 0 or device != spans[i - 1][0] or start >= end:
            check_apart(neighbours)
            neighbours, end = [], 0
        neighbours.append(p)
        end = max(end, stop)
    check_apart(neighbours)


def check_apart(weights: list[Tensor]) -> None:
    """Raise ValueError if any byte belongs to two elements of weights whose spans overlap."""
    if not weights or (len(weights) == 1 and is_dense(weights[0])):
        return
    if not all(is_dense(p) for p in weights):
        # Interleaved views may be apart all the same; only their elements' addresses tell.
        addresses = []
        for p in weights:
            offsets = torch.zeros((), dtype=torch.int64)
            for size, stride in zip(p.shape, p.stride(), strict=True):
                offsets = offsets[..., None] + torch.arange(size) * stride
            addresses.append(offsets.flatten() * p.element_size() + p.data_ptr())
        if len(torch.cat(addresses).unique()) == sum(map(len, addresses)):
            return
    shapes = " and ".join(str(tuple(p.shape)) for p in weights[:2])
    raise ValueError(
        f"parameters must not share memory with each other or with themselves, got {shapes}, "
        f"strides {' and '.join(str(p.stride()) for p in weights[:2])}, that do"
    )
