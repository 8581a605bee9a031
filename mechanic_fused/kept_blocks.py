"""x_ref of one block of elements in eight: which elements those are, and where each is kept.

With ``x_ref_every=8`` the running form keeps x_ref for the first of every eight blocks of 128
elements, next to each other in a one-dimensional tensor. A block counts by its place in the whole
weight, whoever holds it; so all that a shard needs is its phase: the index of its first element in
the weight, modulo the 1,024 elements of eight blocks. Elements are numbered in storage order, which
is row-major order for a contiguous weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends.layout import REFERENCE_BLOCK, REFERENCE_EVERY, REFERENCE_PERIOD
from .distributed import element_range, element_ranges
from .param_checks import is_dense
from .torch_internals import is_fsdp1_flat

WHOLE = -1
"""The phase of a weight whose x_ref is kept whole."""

LEAST_ELEMENTS = 8 * REFERENCE_PERIOD
"""Elements of the whole weight from which on x_ref is kept in part: below, the part would be a
handful of blocks, and there is little to save."""


class KeptBlocks:
    """The phases of an optimizer's weights.

    Args:
        reduce_group: the process group over which plain weights are sharded, or None.
    """

    def __init__(self, reduce_group: Any = None) -> None:
        self.reduce_group = reduce_group
        self._flat_ranges: dict[Tensor, tuple[int, int]] = {}

    def phases(self, weights: list[tuple[Tensor, int]]) -> list[int]:
        """Return the phase of each weight, or WHOLE; one all-reduce where FSDP1's are new.

        Args:
            weights: (a weight, ``x_ref_every``).

        Raises:
            ValueError: for a shard that is not one range of the weight's elements.
        """
        if all(every == 1 for _, every in weights):
            return [WHOLE] * len(weights)
        if self.reduce_group is not None:
            known = self._flat_ranges
            new = [p for p, every in weights if every > 1 and is_fsdp1_flat(p) and p not in known]
            if new:
                # FSDP1 does not tell a weight where its shard begins; its ranks are in order.
                known.update(zip(new, element_ranges(new, self.reduce_group), strict=True))
        return [self._phase(p) if every > 1 else WHOLE for p, every in weights]

    def _phase(self, p: Tensor) -> int:
        if p.numel() < LEAST_ELEMENTS and p not in self._flat_ranges:
            return WHOLE
        start, size = self._flat_ranges.get(p) or element_range(p)
        return start % REFERENCE_PERIOD if size >= LEAST_ELEMENTS else WHOLE


def kept_count(size: int, phase: int) -> int:
    """Return how many of a shard's elements have an x_ref."""
    return _kept_before(phase + size) - _kept_before(phase)


def may_be_kept(count: int, size: int) -> bool:
    """Return whether so many of a shard's elements may have an x_ref, whatever its phase."""
    return abs(REFERENCE_EVERY * count - size) < REFERENCE_PERIOD


def keep(t: Tensor, weight: Tensor, phase: int) -> Tensor:
    """Return a copy of the elements of t, of the weight's shape, that have an x_ref, (count,)."""
    return _flat(t, weight).index_select(0, _kept_elements(t.numel(), phase, t.device))


def spread(kept: Tensor, weight: Tensor, phase: int) -> Tensor:
    """Return a tensor laid out as the weight with the kept elements, and NaN elsewhere.

    NaN and not a number, which would be taken for one.
    """
    if weight.is_contiguous() or not is_dense(weight):
        whole = torch.full(weight.shape, torch.nan, dtype=kept.dtype, device=kept.device)
    else:
        whole = torch.empty_like(weight, dtype=kept.dtype, device=kept.device).fill_(torch.nan)
    elements = _kept_elements(weight.numel(), phase, kept.device)
    _flat(whole, weight).index_copy_(0, elements, kept)
    return whole


def _flat(t: Tensor, weight: Tensor) -> Tensor:
    """Return t flattened in the storage order of the weight.

    Where the weight's storage has gaps, t is flattened in row-major order. The result is a view if
    t has the weight's strides.
    """
    if weight.is_contiguous() or not is_dense(weight):
        return t.reshape(-1)
    if t.stride() != weight.stride():
        t = torch.empty_like(weight, dtype=t.dtype).copy_(t)
    return t.as_strided((t.numel(),), (1,))


def _kept_before(element: int) -> int:
    """Return how many elements below this one of the weight have an x_ref."""
    periods, rest = divmod(element, REFERENCE_PERIOD)
    return periods * REFERENCE_BLOCK + min(rest, REFERENCE_BLOCK)


def _kept_elements(size: int, phase: int, device: torch.device) -> Tensor:
    """Return the indices of the kept elements in a shard, int64."""
    first = _kept_before(phase)
    place = torch.arange(first, first + kept_count(size, phase), device=device)
    skipped = (REFERENCE_EVERY - 1) * REFERENCE_BLOCK
    return place + place.div(REFERENCE_BLOCK, rounding_mode="floor") * skipped - phase
