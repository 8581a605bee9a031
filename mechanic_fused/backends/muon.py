"""The step of Muon's matrices in the running form: torch's products of matrices, between our sums.

    buf = μ·buf + (1−μ)·g;  n = μ·buf + (1−μ)·g (or buf);  O = NewtonSchulz(n)
    u = −lr·(ratio·O + weight_decay·x);  x += S·u

Matrices of one shape are orthogonalized together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..distributed import shards
from ..owners import gathered, owners_of, shard_of
from . import Backend, formulas, reference
from .layout import GG, HYPER, UU
from .orthogonalize import Group, orthogonalized, product_dtype

if TYPE_CHECKING:
    from ..bucket import Bucket
    from ..log_tuner import LogTuner

BATCH_ELEMENTS = 1 << 26
"""Elements that are orthogonalized together at most, if a weight has no more itself. A step holds
about five times as many at once: n, O and what NewtonSchulz makes of them."""


class Muon:
    """The ops of another backend, with a ``step`` of its own for buckets of matrices.

    The sums and the writes are those of its step of SGD: first with the gradients at lr = 0, which
    leaves x alone, then with ratio·O for gradients and the decay for an L2 term.

    Args:
        inner: the other backend.
        param_groups: returns the optimizer's groups, whose options are read in every step.
    """

    def __init__(self, inner: Backend, param_groups: Callable[[], list[Group]]) -> None:
        self._inner, self._param_groups = inner, param_groups
        self._twins: WeakKeyDictionary[Bucket, Bucket] = WeakKeyDictionary()
        self.CHUNK: Mapping[str, int] = inner.CHUNK
        self.COPIES_TABLES: bool = inner.COPIES_TABLES
        self.prepare, self.norm = inner.prepare, inner.norm
        self.tune, self.log_tune = inner.tune, inner.log_tune
        self.accumulate, self.apply, self.measure = inner.accumulate, inner.apply, inner.measure

    @torch.no_grad()
    def step(self, bucket: Bucket, tuner: LogTuner) -> None:
        """Take the sums with the x before the step, move the momentum, and x += S·u."""
        twin = self._twins.get(bucket)
        if twin is None:
            twin = self._twins[bucket] = bucket.stateless("sgd", self._inner)
        twin.with_gradient, hyper = bucket.with_gradient, bucket.hyper_rows
        still = [[0.0, *rest[:3], 0.0, 0.0, *rest[5:]] for _, *rest in hyper]
        self._step_twin(twin, bucket, bucket.grads, still, bucket.clip, tuner)
        sums = twin.sums.clone()
        # Elsewhere the host does not wait for the answer.
        finite = bucket.device.type == "cpu" and bool(sums[:, GG].isfinite().all())
        rows = decayed(hyper)
        for indices in batches(bucket):
            directions = self._directions(bucket, indices, finite)
            self._step_twin(twin, bucket, directions, rows, None, tuner)
            sums[:, UU] += twin.sums[:, UU]
        bucket.sums.copy_(sums)

    def _step_twin(
        self,
        twin: Bucket,
        bucket: Bucket,
        grads: list[Tensor | None],
        hyper_rows: list[list[float]],
        clip: Tensor | None,
        tuner: LogTuner,
    ) -> None:
        """Take a step of SGD with these gradients."""
        twin.grads = grads
        twin.write_tables(hyper_rows, {}, None, None, bucket.step_count)
        twin.clip = clip
        if twin.handle is None or self._inner.COPIES_TABLES:
            self._inner.prepare(twin)
        self._inner.step(twin, tuner)

    def _directions(
        self, bucket: Bucket, indices: Sequence[int], finite: bool
    ) -> list[Tensor | None]:
        """Move the momenta of these weights; return their ratio·O, laid out as they are.

        Args:
            indices: of weights that :func:`batches` puts together.
            finite: no gradient has an element that is not.
        """
        group = self._param_groups()[bucket.groups[indices[0]]]
        factors = reference.gradient_multipliers(bucket)
        n = moved_momenta(bucket, indices, factors, group, finite)
        directions: list[Tensor | None] = [None] * len(bucket.weights)
        found = orthogonalized_shards(n, bucket.parameters[indices[0]], group)
        for i, direction in zip(indices, found, strict=True):
            x = bucket.weights[i]
            if x.is_contiguous() and direction.is_contiguous():
                directions[i] = direction.to(x.dtype)
            else:
                directions[i] = torch.empty_like(x).copy_(direction)
        return directions


def decayed(hyper_rows: list[list[float]]) -> list[list[float]]:
    """Return the rows of SGD that makes u = −lr·(ratio·O + weight_decay·x) of ratio·O."""
    decay, l2, gradient = (HYPER.index(name) for name in ("decay", "l2", "gradient"))
    rows = [list(row) for row in hyper_rows]
    for row in rows:
        row[l2], row[decay], row[gradient] = row[decay], 0.0, 1.0
    return rows


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


def moved_momenta(
    bucket: Bucket,
    indices: Sequence[int],
    factors: Sequence[float],
    group: Group,
    finite: bool,
) -> Tensor:
    """Move the momenta of weights of one shape; return their n, (weights, …)."""
    c = formulas.coefficients(bucket.hyper_rows[bucket.groups[indices[0]]], 0.0)
    dtype = product_dtype(bucket.device, bucket.compute_dtype, group)
    shape = bucket.weights[indices[0]].shape
    n = torch.empty((len(indices), *shape), dtype=dtype, device=bucket.device)
    for i, matrix in zip(indices, n, strict=True):
        g = bucket.grads[i]
        assert g is not None
        g = g.to(bucket.compute_dtype)
        g = g if factors[i] == 1.0 else g * factors[i]
        g = g if finite else formulas.finite_or_zero(g)
        [buffer] = bucket.states[i]
        if buffer.dtype is bucket.compute_dtype:
            matrix.copy_(formulas.muon_momentum_(g, buffer, c))
        else:
            [wide] = reference.read_states(bucket, i)
            matrix.copy_(formulas.muon_momentum_(g, wide, c))
            reference.write_states(bucket, i, [wide])
    return n


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
