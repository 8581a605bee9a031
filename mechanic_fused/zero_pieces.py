"""DeepSpeed's flat pieces of weights, and which of their elements are none.

ZeRO-3 cuts each weight into as many partitions as there are ranks, all of one size, and puts
those of a rank behind each other. The last ones are padded, with whatever was there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int]
"""Begin and end of some elements."""


MARKS = ("_hp_mapping", "_z3_optimizer", "ds_id")
"""Attributes of weights whose pieces an engine steps."""

LOST_REFERENCE = (
    "the checkpoint has S and the base's state but no x_ref, from which S learns: the distance "
    "from the start is forgotten and S learns on from here. Universal checkpoints keep it by "
    "to_universal and load_universal of mechanic_fused.integrations.deepspeed"
)


def are_pieces(weights: Iterable[Tensor], given: Iterable[Tensor]) -> bool:
    """Return whether what an optimizer steps are flat pieces of the weights that it was given.

    Args:
        weights: what it steps.
        given: what it was given.
    """
    weights, given = list(weights), list(given)
    if not weights or not any(hasattr(p, mark) for p in given for mark in MARKS):
        return False
    known = set(given)
    return all(p.dim() == 1 and p not in known for p in weights)


def elements_of(given: Iterable[Any]) -> int:
    """Return how many elements weights have; ZeRO-3 leaves no more of them than that number."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in given)


def padding_of_pieces(
    pieces: Iterable[Tensor], given: Iterable[Tensor]
) -> dict[Tensor, list[Span]]:
    """Return the spans of flat pieces that are padding; without those that have none.

    Args:
        pieces: what the optimizer steps.
        given: the weights of the model, which know of the engine that has made the pieces.
    """
    engines = {id(e): e for p in given if (e := getattr(p, "_z3_optimizer", None)) is not None}
    weights_of: dict[int, list[Any]] = {}
    for engine in engines.values():
        names = ("fp32_partitioned_groups_flat", "fp16_groups")
        flat, groups = (getattr(engine, name, ()) for name in names)
        weights_of.update({id(piece): group for piece, group in zip(flat, groups, strict=False)})
    found = {piece: list(_padding(weights_of.get(id(piece), ()))) for piece in pieces}
    return {piece: spans for piece, spans in found.items() if spans}


def _padding(weights: Iterable[Any]) -> Iterable[Span]:
    first = 0
    for p in weights:
        size = p.ds_tensor.ds_numel
        rank = torch.distributed.get_rank(p.ds_process_group)
        own = max(0, min(size, p.ds_numel - rank * size))
        if own < size:
            yield first + own, first + size
        first += size


def clear(t: Tensor | None, spans: Iterable[Span]) -> None:
    """Set spans of a flat tensor to 0."""
    if t is not None:
        for begin, end in spans:
            t.detach()[begin:end].zero_()
