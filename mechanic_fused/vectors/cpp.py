"""The vector verbs as calls into the compiled module, on the processor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native  # type: ignore[attr-defined]
from ..backends.layout import CPU_CHUNK, KERNEL_DTYPES
from .reference import AdaRemOptions, Stream

CHUNK = {"cpu": CPU_CHUNK}


def step_along(part: Any, x: Stream, w: Stream, d: Stream, c: Tensor) -> None:
    """x = round(w − c·d)."""
    _native.cpu.step_along(_table(part, x, w, d), c.data_ptr(), torch.get_num_threads())


def axpby(part: Any, s: Stream, x: Stream, a: float, c: float) -> None:
    """s = a·s + c·x; where a = 0 s is not read."""
    _native.cpu.axpby(_table(part, s, x), a, c, torch.get_num_threads())


def difference_dots(part: Any, s: Stream, a: Stream, b: Stream) -> Tensor:
    """s' = a − b; returns s'·s and s'·s', and s takes s'."""
    _native.cpu.difference_dots(_table(part, s, a, b), torch.get_num_threads())
    return part.folded()[:2]


def dots(part: Any, g: Stream, l: Stream, p: Stream) -> Tensor:  # noqa: E741
    """Return g·g, g·l, l·l and g·p."""
    _native.cpu.dots(_table(part, g, l, p), torch.get_num_threads())
    return part.folded()


def abs_max(part: Any, a: Stream) -> Tensor:
    """Return max|a| of each weight."""
    _native.cpu.abs_max(_table(part, a, dtype=a[0].dtype), torch.get_num_threads())
    return part.peaks()


def adarem(
    part: Any, x: Stream, g: Stream, m: Stream, peaks: Tensor, options: AdaRemOptions
) -> Tensor:
    """One step of AdaRem; returns max|m| of the new m."""
    numbers = _native.AdaRemOptions(**options._asdict())
    _native.cpu.adarem(_table(part, x, g, m), numbers, peaks.data_ptr(), torch.get_num_threads())
    return part.peaks()


def _table(part: Any, *streams: Stream, dtype: torch.dtype | None = None) -> Any:
    return _native.Vectors(
        streams=part.addresses(streams).data_ptr(),
        chunks=part.chunks.data_ptr(),
        partials=part.partials.data_ptr(),
        chunk_count=len(part.chunks),
        elements=part.elements,
        dtype=KERNEL_DTYPES.index(dtype or part.dtype),
    )
