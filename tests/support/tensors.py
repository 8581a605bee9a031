"""Tensors that no kernel can read."""

import torch
from torch.utils._pytree import tree_map


class WithoutStorage(torch.Tensor):
    """A wrapper subclass: arithmetic works on what it wraps, its own address is 0."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(a):
            return a.inner if isinstance(a, WithoutStorage) else a

        out = func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
        return WithoutStorage(out) if isinstance(out, torch.Tensor) else out


def freed(t):
    """Return a copy whose storage has been given back, as sharding wrappers do."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def cut(t):
    """Return a copy whose storage ends before its last element does."""
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


def at_an_odd_address(t):
    """Return a copy that is no multiple of its elements' size away from 0."""
    memory = bytearray(t.numel() * t.element_size() + 1)
    there = torch.frombuffer(memory, dtype=torch.uint8)[1:].view(torch.uint8)
    return _reinterpreted(there, t)


def _reinterpreted(raw, t):
    # view(dtype) refuses such an offset, numpy does not.
    numbers = raw.numpy().view(t.numpy().dtype).reshape(t.shape)
    return torch.from_numpy(numbers).copy_(t)
