"""Matrices that are sharded by rows: each goes whole to one rank, its owner, and comes back.

Owners take turns over the matrices of a batch, so that each rank has as many as the others. One
all-to-all takes a batch there, and one takes it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.orthogonalize import Group, adjusted_ratio, matrix_shape, orthogonalized
from .distributed import shards, wrap
from .torch_internals import dtensor


def row_counts(rows: int, ranks: int) -> list[int]:
    """Return how many rows each rank has of a tensor in Shard(0)."""
    most = -(-rows // ranks)
    return [max(0, min(most, rows - rank * most)) for rank in range(ranks)]


class Owners:
    """Who owns which matrices of a batch.

    Args:
        count: matrices in the batch.
        rows: of each, on all ranks together.
        group: the process group over which the rows are sharded.
    """

    def __init__(self, count: int, rows: int, group: Any) -> None:
        self._group, self._ranks = group, group.size()
        self._rank = torch.distributed.get_rank(group)
        self._rows = row_counts(rows, self._ranks)
        self._counts = [len(range(rank, count, self._ranks)) for rank in range(self._ranks)]

    def gather(self, mine: Tensor) -> Tensor:
        """Return the matrices that this rank owns, (owned, rows, …), of everybody's shards.

        Args:
            mine: this rank's shards of all matrices, (count, rows of this rank, …).
        """
        owned, inner = self._counts[self._rank], mine.shape[2:]
        parts = [mine[rank :: self._ranks] for rank in range(self._ranks)]
        shapes = [(owned, rows, *inner) for rows in self._rows]
        return torch.cat(self._exchange(parts, shapes), 1)

    def scatter(self, owned: Tensor, like: Tensor) -> Tensor:
        """Return this rank's shards of all matrices, of what :meth:`gather` has given the owners.

        Args:
            owned: (owned, rows, …).
            like: of the shape of the result.
        """
        rows, inner = self._rows[self._rank], owned.shape[2:]
        shapes = [(count, rows, *inner) for count in self._counts]
        found = torch.empty_like(like, dtype=owned.dtype)
        for rank, part in enumerate(self._exchange(owned.split(self._rows, 1), shapes)):
            found[rank :: self._ranks] = part
        return found

    def _exchange(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send a part to each rank; return what each has sent, in these shapes."""
        sent = torch.cat([part.reshape(-1) for part in parts])
        sizes = [torch.Size(shape).numel() for shape in shapes]
        received = sent.new_empty(sum(sizes))
        sent_sizes = [part.numel() for part in parts]
        torch.distributed.all_to_all_single(received, sent, sizes, sent_sizes, group=self._group)
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def owners_of(count: int, weight: Any) -> Owners | None:
    """Return the owners of matrices of a weight's shape; None where not rows alone are sharded.

    Args:
        count: how many.
        weight: one of them, a DTensor.
    """
    sharded = [
        placement
        for i, placement in enumerate(weight.placements)
        if not placement.is_replicate() and weight.device_mesh.size(i) > 1
    ]
    if len(sharded) != 1 or not sharded[0].is_shard(0):
        return None
    return Owners(count, weight.shape[0], shards(weight, None)[0])


def gathered(mine: Tensor, weight: Any) -> Tensor:
    """Return a whole tensor of every rank's shards of it, on every rank.

    Args:
        mine: this rank's shard.
        weight: of the same shape and sharding.
    """
    return wrap(mine, weight, weight.shape).full_tensor()  # type: ignore[attr-defined]


def shard_of(whole: Tensor, weight: Any) -> Tensor:
    """Return this rank's shard of a tensor that all ranks have, sharded as a weight is."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, weight.placements).to_local()


def is_exchanged(weight: Any) -> bool:
    """Return whether ranks have to exchange shards before a weight can be orthogonalized.

    Those of experts, by their first dimension, are whole matrices.
    """
    if not isinstance(weight, dtensor()) or not shards(weight, None):
        return False
    by_rows = (each.is_replicate() or each.is_shard(0) for each in weight.placements)
    return not (weight.dim() == 3 and all(by_rows))


def orthogonalized_shards(n: Tensor, weight: Any, group: Group) -> tuple[Tensor, float]:
    """Return O of weights of one shape, of this rank's shards of them, and the ratio.

    Args:
        n: (weights, …), shards as of the weight; overwritten.
        weight: one of them.
        group: see ``orthogonalized``.
    """
    if not is_exchanged(weight):
        return orthogonalized(n, group)
    owners = owners_of(len(n), weight)
    if owners is not None:
        made, _ = orthogonalized(owners.gather(n), group)
        found = owners.scatter(made, n)
    else:
        whole = torch.stack([gathered(each, weight) for each in n])
        made, _ = orthogonalized(whole, group)
        found = torch.stack([shard_of(each, weight) for each in made])
    # Who owns none has no matrix to tell the ratio by.
    _, rows, columns = matrix_shape(weight.shape)
    split = bool(group.get("split_sizes"))
    return found, 1.0 if split else adjusted_ratio(group["adjust_lr_fn"], rows, columns)
