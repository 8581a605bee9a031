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

from ..owners import is_exchanged, orthogonalized_shards
from . import Backend, formulas, reference
from .layout import GG, HYPER, UU
from .orthogonalize import Group, product_dtype

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
        self._twins: WeakKeyDictionary[Bucket, dict[tuple[int, ...], Bucket]] = WeakKeyDictionary()
        self.CHUNK: Mapping[str, int] = inner.CHUNK
        self.COPIES_TABLES: bool = inner.COPIES_TABLES
        self.prepare, self.norm = inner.prepare, inner.norm
        self.tune, self.log_tune = inner.tune, inner.log_tune
        self.accumulate, self.apply, self.measure = inner.accumulate, inner.apply, inner.measure

    @torch.no_grad()
    def step(self, bucket: Bucket, tuner: LogTuner) -> None:
        """Take the sums with the x before the step, move the momentum, and x += S·u."""
        if bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step of Muon reads hyperparameters on the host: it cannot be captured"
            )
        hyper, factors = bucket.hyper_rows, reference.gradient_multipliers(bucket)
        still = [[0.0, *rest[:3], 0.0, 0.0, *rest[5:]] for _, *rest in hyper]
        sums = self._sgd(
            bucket, range(len(bucket.weights)), bucket.grads, still, bucket.clip, tuner
        )
        # Elsewhere the host does not wait for the answer.
        finite = bucket.device.type == "cpu" and bool(sums[:, GG].isfinite().all())
        for indices in batches(bucket):
            group = self._param_groups()[bucket.groups[indices[0]]]
            n = moved_momenta(bucket, indices, factors, group, finite)
            found, ratio = orthogonalized_shards(n, bucket.parameters[indices[0]], group)
            directions = [
                None if bucket.grads[i] is None else laid_out(direction, bucket.weights[i])
                for i, direction in zip(indices, found, strict=True)
            ]
            del n, found
            rows = decayed(hyper, ratio)
            sums[:, UU] += self._sgd(bucket, indices, directions, rows, None, tuner)[:, UU]
        bucket.sums.copy_(sums)

    def _sgd(
        self,
        bucket: Bucket,
        indices: Sequence[int],
        grads: Sequence[Tensor | None],
        hyper_rows: list[list[float]],
        clip: Tensor | None,
        tuner: LogTuner,
    ) -> Tensor:
        """Take a step of SGD of some weights with these gradients; return its sums."""
        twins = self._twins.setdefault(bucket, {})
        twin = twins.get(tuple(indices))
        if twin is None:
            twin = twins[tuple(indices)] = bucket.stateless("sgd", self._inner, indices)
        twin.grads = list(grads)
        twin.with_gradient = [
            p for p, g in zip(twin.parameters, grads, strict=True) if g is not None
        ]
        try:
            twin.write_tables(hyper_rows, {}, None, None, bucket.step_count)
            twin.clip = clip
            if twin.handle is None or self._inner.COPIES_TABLES:
                self._inner.prepare(twin)
            self._inner.step(twin, tuner)
        finally:
            twin.grads, twin.with_gradient, twin.clip = [None] * len(grads), [], None
        return twin.sums.clone()


def laid_out(direction: Tensor, x: Tensor) -> Tensor:
    """Return a direction in the dtype and layout of its weight."""
    if x.is_contiguous() and direction.is_contiguous():
        return direction.to(x.dtype)
    return torch.empty_like(x).copy_(direction)


def decayed(hyper_rows: list[list[float]], ratio: float) -> list[list[float]]:
    """Return the rows of SGD that makes u = −lr·(ratio·O + weight_decay·x) of O."""
    decay, l2, gradient = (HYPER.index(name) for name in ("decay", "l2", "gradient"))
    rows = [list(row) for row in hyper_rows]
    for row in rows:
        row[l2], row[decay], row[gradient] = row[decay], 0.0, ratio
    return rows


def batches(bucket: Bucket) -> Iterator[list[int]]:
    """Yield the indices of weights with a gradient of one shape, sharding and param group.

    Ranks with shards make the same batches: shapes are those of whole weights, and one whose shards
    are exchanged takes part without a gradient too, since others may have one.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (p, g) in enumerate(zip(bucket.parameters, bucket.grads, strict=True)):
        if p.numel() and (g is not None or is_exchanged(p)):
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
        if g is None:
            matrix.zero_()
            continue
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
