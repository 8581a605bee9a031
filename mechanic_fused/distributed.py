"""Sharded weights: what shards them, and sums over ranks with one all-reduce per process group.

A scale is learned from sums over all weights. A rank adds its shares to one row for each set of
process groups that shards weights; each row is all-reduced over each of its groups once, and then
the rows are added. All ranks get the same bits, so their scales cannot diverge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_internals import (
    dtensor,
    global_offset,
    is_fsdp1_flat,
    local,
    plain_local_gradients,
)

Groups = tuple[Any, ...]
"""The process groups that shard a weight; the empty tuple if every rank has all of it."""

Rows = dict[Groups, Tensor]
"""This rank's sums, one tensor for each set of process groups."""


def like(t: Tensor, weight: Tensor) -> Tensor:
    """Return t sharded as the weight is; a collective where a DTensor's placements differ.

    Raises:
        ValueError: if only one of the two is a DTensor.
    """
    kind = dtensor()
    if isinstance(t, kind) != isinstance(weight, kind):
        raise ValueError(
            "a tensor must be sharded as its weight is, expected "
            f"{_placement(weight)}, got {_placement(t)} of shape {tuple(t.shape)}"
        )
    there: Any = weight
    here: Any = t
    if isinstance(t, kind) and (
        here.placements != there.placements or here.device_mesh != there.device_mesh
    ):
        return here.redistribute(there.device_mesh, there.placements)
    return t


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def local_gradients(weights: list[Any]) -> list[Tensor | None]:
    """Return this rank's shards of the gradients, sharded as their weights are."""
    plain = plain_local_gradients(weights)
    if plain is not None:
        return list(plain)
    return [
        g if g is None else local(like(g, weight))
        for g, weight in zip([w.grad for w in weights], weights, strict=True)
    ]


def wrap(shard: Tensor, weight: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return this rank's shard as a tensor of the weight's type, sharded as the weight is.

    Args:
        shape: of the whole tensor, in row-major order; None: as the weight.
    """
    if not isinstance(weight, dtensor()):
        return shard
    there: Any = weight
    return dtensor().from_local(
        shard,
        there.device_mesh,
        there.placements,
        run_check=False,
        shape=weight.shape if shape is None else torch.Size(shape),
        stride=weight.stride() if shape is None else _row_major(shape),
    )


def _placement(t: Any) -> str:
    return f"a DTensor of {t.placements}" if isinstance(t, dtensor()) else "a plain tensor"


def shards(weight: Tensor, reduce_group: Any) -> Groups:
    """Return the process groups over which a weight's elements are sharded.

    Args:
        weight: a parameter; a DTensor knows its own process groups.
        reduce_group: the process group over which plain tensors are sharded, or None.

    Raises:
        ValueError: for a flat weight of FSDP1 without ``reduce_group``.
    """
    if not isinstance(weight, dtensor()):
        if reduce_group is None and is_fsdp1_flat(weight):
            raise ValueError(
                "weights sharded by FullyShardedDataParallel (FSDP1) need reduce_group=, the "
                "process group over which they are sharded (torch.distributed.group.WORLD where "
                "no process_group was given to FSDP); fully_shard (FSDP2) needs none"
            )
        return () if reduce_group is None else (reduce_group,)
    mesh, placements = weight.device_mesh, weight.placements
    # Not isinstance(placement, Shard): a dimension sharded twice has a placement that is not one.
    return tuple(
        mesh.get_group(i)
        for i, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(i) > 1
    )


def mesh_groups(weight: Tensor) -> Groups:
    """Return the process groups of a DTensor's mesh, replicas included; none for a plain tensor."""
    if not isinstance(weight, dtensor()):
        return ()
    mesh: Any = weight.device_mesh
    return tuple(mesh.get_group(i) for i in range(mesh.ndim) if mesh.size(i) > 1)


def element_range(weight: Tensor) -> tuple[int, int]:
    """Return the index of this rank's first element in the whole weight, and that one's size.

    Args:
        weight: a DTensor, or a weight that this rank has whole.

    Raises:
        ValueError: for a shard that is not one range of the weight's elements, on all ranks alike.
    """
    first = first_element(weight)
    if first is None:
        there: Any = weight
        outer = _outer_dim(weight)
        raise ValueError(
            "x_ref_every above 1 needs shards that are one range of a weight's elements: expected "
            f"Shard(dim={outer}) of a contiguous weight, or x_ref_every=1 in its param group, got "
            f"{tuple(there.placements)} for a weight of shape {tuple(weight.shape)}"
        )
    return first, weight.numel()


def _outer_dim(weight: Tensor) -> int:
    """Return the first dimension that has more than one index."""
    return next((d for d, size in enumerate(weight.shape) if size > 1), 0)


def first_element(weight: Tensor) -> int | None:
    """Return the index of this rank's first element in the whole weight.

    None for a shard that is not one range of the weight's elements, on all ranks alike.

    Args:
        weight: a DTensor, or a weight that this rank has whole.
    """
    if not isinstance(weight, dtensor()):
        return 0
    placements, mesh = weight.placements, weight.device_mesh
    sharded = [
        (i, placement)
        for i, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(i) > 1
    ]
    if not sharded:
        return 0
    # All dimensions after this one must be whole.
    outer = _outer_dim(weight)
    inner = 1
    is_range = weight.is_contiguous()
    for i, placement in reversed(sharded):
        is_range &= getattr(placement, "dim", None) == outer
        # A dimension that is sharded twice, from the right: torch's _StridedShard.
        if not placement.is_shard():
            ranks = math.prod(mesh.size(k) for k, _ in sharded)
            is_range &= getattr(placement, "split_factor", 0) == inner
            is_range &= weight.shape[outer] % ranks == 0
        inner *= mesh.size(i)
    if not is_range:
        return None
    return global_offset(weight)[outer] * math.prod(weight.shape[outer + 1 :])


def element_ranges(weights: Sequence[Tensor], group: Any) -> list[tuple[int, int]]:
    """Return what :func:`element_range` does, of plain shards in the order of a group's ranks.

    A collective: every rank must call it with shards of the same weights.
    """
    sizes = torch.zeros(group.size(), len(weights), dtype=torch.int64, device=weights[0].device)
    rank = torch.distributed.get_rank(group)
    sizes[rank] = torch.tensor([p.numel() for p in weights], dtype=torch.int64, device=sizes.device)
    torch.distributed.all_reduce(sizes, group=group)
    starts = sizes[:rank].sum(0).tolist()
    return list(zip(starts, sizes.sum(0).tolist(), strict=True))


def shard_index(groups: Groups) -> int:
    """Return this rank's index among the ranks that hold different shards of a weight."""
    index = 0
    for group in groups:
        index = index * group.size() + torch.distributed.get_rank(group)
    return index


def merge(rows_of_each: Iterable[Rows]) -> Rows:
    """Return rows added up by their process groups."""
    merged: Rows = {}
    for rows in rows_of_each:
        for groups, row in rows.items():
            merged[groups] = merged[groups] + row if groups in merged else row
    return merged


class Reduction:
    """The sum over all ranks: one all-reduce for each process group that shards weights.

    The last of them runs while the caller goes on. Every rank must make it, also with sums of 0.

    Args:
        rows_of_each: this rank's rows, of each optimizer that steps; all of one shape, with the
            same process groups in the same order on every rank of a group. They are not changed.
        extra_groups: process groups whose ranks hold other weights of the model: pipeline stages.
        device: where the groups reduce; None: where the rows are.
    """

    def __init__(
        self,
        rows_of_each: Sequence[Rows],
        extra_groups: Sequence[Any] = (),
        device: torch.device | None = None,
    ) -> None:
        self._device = device
        rows = rows_of_each[0] if len(rows_of_each) == 1 else merge(rows_of_each)
        self._parts = list(rows.values())
        if any(rows) or extra_groups:
            self._parts = [part.clone() for part in self._parts]
        self._work: Any = None
        self._finish: Callable[[], None] | None = None
        for group in dict.fromkeys(group for groups in rows for group in groups):
            self._wait()
            self._start(group, [i for i, groups in enumerate(rows) if group in groups])
        for group in extra_groups:
            self._wait()
            self._parts = [self._total()]
            self._start(group, [0])

    def wait(self) -> Tensor:
        """Return the sum; on a GPU the current stream waits, not the host."""
        self._wait()
        return self._total()

    def _total(self) -> Tensor:
        return self._parts[0] if len(self._parts) == 1 else torch.stack(self._parts).sum(0)

    def _start(self, group: Any, chosen: list[int]) -> None:
        """All-reduce some of the parts over a group."""
        # Stacked and unbound, because an index tensor would have to be uploaded.
        parts = torch.stack([self._parts[i] for i in chosen])
        stacked = parts.to(self._device or parts.device)
        self._work = torch.distributed.all_reduce(stacked, group=group, async_op=True)

        def finish() -> None:
            for i, part in zip(chosen, stacked.to(parts.device).unbind(), strict=True):
                self._parts[i] = part

        self._finish = finish

    def _wait(self) -> None:
        work, finish = self._work, self._finish
        self._work = self._finish = None
        if work is not None:
            work.wait()
        if finish is not None:
            finish()


def all_reduce(
    rows_of_each: Sequence[Rows],
    extra_groups: Sequence[Any] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Return the sum over all ranks at once; see :class:`Reduction`."""
    return Reduction(rows_of_each, extra_groups, device).wait()
