"""Which weights cannot be trained at all: errors before anything has changed."""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_internals import dtensor, is_fsdp1_flat


def is_dense(x: Tensor) -> bool:
    """Return whether x fills its range of memory exactly once, in any order of its axes."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True


def is_trained(weight: Tensor) -> bool:
    """Return whether steps move a weight: as in torch, also one that is only given gradients."""
    return weight.requires_grad or (may_be_given(weight) and weight.grad is not None)


def may_be_given(weight: Tensor) -> bool:
    """Return whether a weight that requires no gradient is trained once it has one.

    Not a sharded one: plans must be made on all ranks alike, and gradients may be on some of them.
    """
    return not isinstance(weight, dtensor()) and not is_fsdp1_flat(weight)


def check_weights(weights: list[Tensor]) -> None:
    """Raise ValueError for weights that are complex, sparse, without storage, or overlapping."""
    spans = []
    for p in weights:
        if p.is_complex():
            raise ValueError(f"weights must be real, got dtype {p.dtype}, shape {tuple(p.shape)}")
        if p.layout is not torch.strided:
            raise ValueError(f"weights must be dense, got layout {p.layout}")
        if p.device.type == "meta":
            raise ValueError(f"weights must have storage, got device meta, shape {tuple(p.shape)}")
        if not has_storage(p):
            raise ValueError(
                f"weights must be plain tensors with storage of their own, got a "
                f"{type(p.data).__name__} of shape {tuple(p.shape)} whose storage is missing, cut "
                "or misaligned"
            )
        if p.is_neg():
            raise ValueError(
                "weights must be materialized, got a lazily negated view: call resolve_neg()"
            )
        if p.numel():
            last = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
            start = p.data_ptr()
            spans.append((str(p.device), start, start + (last + 1) * p.element_size(), p))
    spans.sort(key=lambda span: span[:2])
    # Only weights whose spans of addresses intersect can share an element.
    neighbours: list[Tensor] = []
    end = 0
    for i, (device, start, stop, p) in enumerate(spans):
        if i == 0 or device != spans[i - 1][0] or start >= end:
            check_disjoint(neighbours)
            neighbours, end = [], 0
        neighbours.append(p)
        end = max(end, stop)
    check_disjoint(neighbours)


def has_storage(t: Tensor) -> bool:
    """Return whether all elements of a plain strided tensor are in memory of its own.

    Not those of a wrapper subclass, a fake or meta tensor, or one whose storage has been freed or
    cut; not those at an odd address, where kernels may not read them.
    """
    if t.layout is not torch.strided or t.device.type == "meta":
        return False
    if t.numel() == 0:
        return True
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    try:
        address, stored = t.data_ptr(), t.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # a wrapper's, a fake tensor's
        return False
    size = t.element_size()
    within = (t.storage_offset() + last + 1) * size <= stored
    return address != 0 and address % size == 0 and within


def check_readable(t: Tensor, x: Tensor) -> None:
    """Raise ValueError unless a tensor has its weight's shape and device, and readable memory."""
    if t.shape != x.shape or t.device != x.device:
        raise ValueError(
            "expected tensors of the shape and on the device of their weight, "
            f"{tuple(x.shape)} on {x.device}, got {tuple(t.shape)} on {t.device}"
        )
    if not has_storage(t):
        raise ValueError(f"expected plain tensors {_not_stored(t)}")


def check_gradient(g: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Raise ValueError unless a gradient has its weight's shape and device.

    Torch compares them when a gradient is assigned, but ``g.data``, ``g.set_`` and ``g.resize_``
    change them later.
    """
    if g.shape != shape or g.device != device:
        raise ValueError(
            f"a gradient must have its weight's shape and device, expected {tuple(shape)} on "
            f"{device}, got {tuple(g.shape)} on {g.device}"
        )


def check_stored(g: Tensor) -> None:
    """Raise ValueError for a gradient whose elements are not all in memory of its own."""
    if not has_storage(g):
        raise ValueError(f"gradients must be plain tensors {_not_stored(g)}")


def _not_stored(t: Tensor) -> str:
    return (
        f"with storage of their own for plain weights, got a {type(t).__name__} of shape "
        f"{tuple(t.shape)} whose storage is missing, cut or misaligned"
    )


def check_disjoint(weights: list[Tensor]) -> None:
    """Raise ValueError if two elements of weights with intersecting spans share an address."""
    if not weights or (len(weights) == 1 and is_dense(weights[0])):
        return
    if not all(is_dense(p) for p in weights):
        # Interleaved views may be disjoint all the same; only their elements' addresses can tell.
        addresses = []
        for p in weights:
            offsets = torch.zeros((), dtype=torch.int64, device="cpu")
            for size, stride in zip(p.shape, p.stride(), strict=True):
                offsets = offsets[..., None] + torch.arange(size, device="cpu") * stride
            addresses.append(offsets.flatten() * p.element_size() + p.data_ptr())
        if len(torch.cat(addresses).unique()) == sum(map(len, addresses)):
            return
    shapes = " and ".join(str(tuple(p.shape)) for p in weights[:2])
    raise ValueError(
        f"parameters must not share memory with each other or with themselves, got shapes {shapes} "
        f"with strides {' and '.join(str(p.stride()) for p in weights[:2])}"
    )
