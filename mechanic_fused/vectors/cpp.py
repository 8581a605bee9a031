"""The vector ops as calls into the compiled module on the CPU.

Same functions as ``reference.py``; elementwise results agree with it to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _native  # type: ignore[attr-defined]
from ..backends.layout import CPU_CHUNK, KERNEL_DTYPES
from .reference import AdaRemOptions, Stream

if TYPE_CHECKING:
    from .space import VectorBucket

CHUNK = {"cpu": CPU_CHUNK}


def step_along(bucket: VectorBucket, x: Stream, w: Stream, d: Stream, c: Tensor) -> None:
    """x = round(w − c·d)."""
    _native.cpu.step_along(_describe(bucket, x, w, d), c.data_ptr(), torch.get_num_threads())


def axpby(bucket: VectorBucket, s: Stream, x: Stream, a: float, c: float) -> None:
    """s = a·s + c·x; with a = 0, s is not read."""
    _native.cpu.axpby(_describe(bucket, s, x), a, c, torch.get_num_threads())


def difference_dots(bucket: VectorBucket, s: Stream, a: Stream, b: Stream) -> Tensor:
    """Return s'·s and s'·s' for s' = a − b, which then replaces s."""
    _native.cpu.difference_dots(_describe(bucket, s, a, b), torch.get_num_threads())
    return bucket.folded()[:2]


def dots(bucket: VectorBucket, g: Stream, l: Stream, p: Stream) -> Tensor:  # noqa: E741
    """Return g·g, g·l, l·l and g·p."""
    _native.cpu.dots(_describe(bucket, g, l, p), torch.get_num_threads())
    return bucket.folded()


def abs_max(bucket: VectorBucket, a: Stream) -> Tensor:
    """Return max|a| of each weight."""
    _native.cpu.abs_max(_describe(bucket, a, dtype=a[0].dtype), torch.get_num_threads())
    return bucket.peaks()


def adarem(
    bucket: VectorBucket, x: Stream, g: Stream, m: Stream, peaks: Tensor, options: AdaRemOptions
) -> Tensor:
    """Take one step of AdaRem; return max|m| of the new m."""
    numbers = _native.AdaRemOptions(
        lr=options.lr,
        beta=options.beta,
        boost=options.lam_t,
        decay=options.weight_decay,
        eps=options.eps,
    )
    vectors = _describe(bucket, x, g, m)
    _native.cpu.adarem(vectors, numbers, peaks.data_ptr(), torch.get_num_threads())
    return bucket.peaks()


def _describe(bucket: VectorBucket, *streams: Stream, dtype: torch.dtype | None = None) -> Any:
    return _native.Vectors(
        streams=bucket.addresses(streams).data_ptr(),
        chunks=bucket.chunks.data_ptr(),
        partials=bucket.partials.data_ptr(),
        chunk_count=len(bucket.chunks),
        elements=bucket.elements,
        dtype=KERNEL_DTYPES.index(dtype or bucket.dtype),
    )
