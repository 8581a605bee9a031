"""The step of Muon's matrices in the running form: torch's products of matrices, between our sums.

    buf = μ·buf + (1−μ)·g;  n = μ·buf + (1−μ)·g (or buf);  O = NewtonSchulz(n)
    u = −lr·(ratio·O + weight_decay·x);  x += S·u

Matrices of one shape are orthogonalized together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..distributed import shards
from ..owners import gathered, owners_of, shard_of
from . import Backend, formulas, reference
from .orthogonalize import Group, orthogonalized, product_dtype

if TYPE_CHECKING:
    from ..bucket import Bucket
    from ..log_tuner import LogTuner

BATCH_ELEMENTS = 1 << 26
"""Elements that are orthogonalized together at most, if a weight has no more itself. Beside them a
step holds about six times as many: x, n and what NewtonSchulz makes of it."""


class Muon:
    """The ops of another backend, with a ``step`` of its own for buckets of matrices.

    Args:
        inner: the backend that takes norms and tunes.
        param_groups: returns the optimizer's groups, whose options are read in every step.
    """

    def __init__(self, inner: Backend, param_groups: Callable[[], list[Group]]) -> None:
        self._param_groups = param_groups
        self.CHUNK: Mapping[str, int] = inner.CHUNK
        self.COPIES_TABLES: bool = inner.COPIES_TABLES
        self.prepare, self.norm = inner.prepare, inner.norm
        self.tune, self.log_tune = inner.tune, inner.log_tune
        self.accumulate, self.apply, self.measure = inner.accumulate, inner.apply, inner.measure

    @torch.no_grad()
    def step(self, bucket: Bucket, tuner: LogTuner) -> None:
        """Take the sums with the x before the step, move the momentum, and x += S·u."""
        bucket.sums.zero_()
        factors = reference.gradient_multipliers(bucket)
        for indices in batches(bucket):
            step_batch(bucket, indices, self._param_groups(), factors, tuner)
        # Autograd has not seen the writes; a backward through the old weights must raise.
        increment_version(bucket.with_gradient)


def batches(bucket: Bucket) -> Iterator[list[int]]:
    """Yield the indices of weights with a gradient of one shape, sharding and param group.

    Shapes are those of whole weights, so that ranks with shards of them make the same batches.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (p, g) in enumerate(zip(bucket.parameters, bucket.grads, strict=True)):
        if g is not None and p.numel():
            placements = getattr(p, "placements", ())
            alike.setdefault((bucket.groups[i], p.shape, placements), []).append(i)
    for indices in alike.values():
        most = max(1, BATCH_ELEMENTS // bucket.parameters[indices[0]].numel())
        for first in range(0, len(indices), most):
            yield indices[first : first + most]


def step_batch(
    bucket: Bucket,
    indices: Sequence[int],
    param_groups: Sequence[Group],
    factors: Sequence[float],
    tuner: LogTuner,
) -> None:
    """Take the step of weights that :func:`batches` puts together."""
    group = param_groups[bucket.groups[indices[0]]]
    c = formulas.coefficients(bucket.hyper_rows[bucket.groups[indices[0]]], 0.0)
    dtype = product_dtype(bucket.device, bucket.compute_dtype, group)
    shape = bucket.weights[indices[0]].shape
    n = torch.empty((len(indices), *shape), dtype=dtype, device=bucket.device)
    xs = []
    for i, matrix in zip(indices, n, strict=True):
        g, x = bucket.grads[i], reference.read_weight(bucket, i)
        assert g is not None
        g = g.to(bucket.compute_dtype) * factors[i]
        reference.add_gradient_sums(bucket, i, g, x)
        [buffer] = reference.read_states(bucket, i)
        direction, buffer = formulas.muon_momentum(formulas.finite_or_zero(g), buffer, c)
        reference.write_states(bucket, i, [buffer])
        matrix.copy_(direction)
        xs.append(x)
    directions = orthogonalized_shards(n, bucket.parameters[indices[0]], group)
    for i, x, direction in zip(indices, xs, directions.to(bucket.compute_dtype), strict=True):
        reference.move_weight(bucket, i, x, formulas.muon(direction, x, c), tuner)


def orthogonalized_shards(n: Tensor, weight: Any, group: Group) -> Tensor:
    """Return ratio·O of weights of one shape, of this rank's shards of them.

    Args:
        n: (weights, …), shards as of the weight; overwritten.
        weight: one of them.
        group: see ``orthogonalized``.
    """
    if not shards(weight, None) or are_whole(weight):
        return orthogonalized(n, group)
    owners = owners_of(len(n), weight)
    if owners is not None:
        return owners.scatter(orthogonalized(owners.gather(n), group), n)
    whole = torch.stack([gathered(each, weight) for each in n])
    made = orthogonalized(whole, group)
    return torch.stack([shard_of(each, weight) for each in made])


def are_whole(weight: Any) -> bool:
    """Return whether shards hold whole matrices: those of experts, by their first dimension."""
    return weight.dim() == 3 and all(
        placement.is_replicate() or placement.is_shard(0) for placement in weight.placements
    )
