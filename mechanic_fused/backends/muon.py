"""The step of Muon's matrices in the running form: torch's products between two kernels.

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
from ..param_checks import is_dense
from . import Backend
from .orthogonalize import Group, product_dtype

if TYPE_CHECKING:
    from ..bucket import Bucket
    from ..log_tuner import LogTuner

BATCH_ELEMENTS = {"cpu": 1 << 22}
"""Device → elements that are orthogonalized together at most, if a weight has no more itself: on a
CPU as many as stay in its caches between the products."""

MOST_BATCH_ELEMENTS = 1 << 26
"""The same of other devices. A step holds about five times as many at once: n, O and what
NewtonSchulz makes of them."""


class Muon:
    """The ops of another backend, with a ``step`` of its own for buckets of matrices.

    Args:
        inner: the other backend.
        param_groups: returns the optimizer's groups, whose options are read in every step.
    """

    def __init__(self, inner: Backend, param_groups: Callable[[], list[Group]]) -> None:
        self._inner, self._param_groups = inner, param_groups
        self._parts: WeakKeyDictionary[Bucket, dict[tuple[int, ...], Bucket]] = WeakKeyDictionary()
        self.CHUNK: Mapping[str, int] = inner.CHUNK
        self.COPIES_TABLES: bool = inner.COPIES_TABLES
        self.prepare, self.norm = inner.prepare, inner.norm
        self.tune, self.log_tune = inner.tune, inner.log_tune
        self.accumulate, self.apply, self.measure = inner.accumulate, inner.apply, inner.measure
        self.muon_momentum, self.muon_update = inner.muon_momentum, inner.muon_update

    @torch.no_grad()
    def step(self, bucket: Bucket, tuner: LogTuner) -> None:
        """Take the sums with the x before the step, move the momentum, and x += S·u."""
        if bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a step of Muon reads hyperparameters on the host: it cannot be captured"
            )
        bucket.sums.zero_()
        for indices in batches(bucket):
            part = self._part(bucket, indices)
            try:
                self._step_part(part, self._param_groups()[part.groups[0]], tuner)
            finally:
                part.grads, part.with_gradient = [None] * len(indices), []
                part.clip = part.grad_scale = part.found_inf = None
            bucket.sums += part.sums

    def _step_part(self, part: Bucket, group: Group, tuner: LogTuner) -> None:
        """Take a step of matrices of one shape."""
        n = empty_directions(part, product_dtype(part.device, part.compute_dtype, group))
        self._inner.muon_momentum(part, n)
        found, ratio = orthogonalized_shards(n, part.parameters[0], group)
        if found.stride() != n.stride():
            found = torch.empty_like(n, dtype=found.dtype).copy_(found)
        self._inner.muon_update(part, found, ratio, tuner)

    def _part(self, bucket: Bucket, indices: Sequence[int]) -> Bucket:
        """Return some of the weights of a bucket, ready for the ops of the other backend."""
        parts = self._parts.setdefault(bucket, {})
        part = parts.get(tuple(indices))
        if part is None:
            part = parts[tuple(indices)] = bucket.part(indices, self._inner)
        part.grads = [bucket.grads[i] for i in indices]
        given = zip(part.parameters, part.grads, strict=True)
        part.with_gradient = [p for p, g in given if g is not None]
        part.write_tables(
            bucket.hyper_rows, {}, bucket.grad_scale, bucket.found_inf, bucket.step_count
        )
        part.clip = bucket.clip
        part.sums.zero_()
        if part.handle is None or self._inner.COPIES_TABLES:
            self._inner.prepare(part)
        return part


def empty_directions(bucket: Bucket, dtype: torch.dtype) -> Tensor:
    """Return space for a matrix beside each weight of a bucket, all of one shape and layout.

    Returns:
        (weights, …), each laid out as its weight, one after the other; 0 where no gradient is.
    """
    x = bucket.weights[0]
    flat = torch.empty(len(bucket.weights) * x.numel(), dtype=dtype, device=bucket.device)
    strides = x.stride() if is_dense(x) else torch.empty_like(x, device="meta").stride()
    n = flat.as_strided((len(bucket.weights), *x.shape), (x.numel(), *strides))
    for matrix, g in zip(n, bucket.grads, strict=True):
        if g is None:
            matrix.zero_()
    return n


def batches(bucket: Bucket) -> Iterator[list[int]]:
    """Yield the indices of weights with a gradient of one shape, layout, sharding and param group.

    Ranks with shards make the same batches: shapes are those of whole weights, and one whose shards
    are exchanged takes part without a gradient too, since others may have one.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (p, g) in enumerate(zip(bucket.parameters, bucket.grads, strict=True)):
        if p.numel() and (g is not None or is_exchanged(p)):
            placements = getattr(p, "placements", ())
            alike.setdefault((bucket.groups[i], p.shape, p.stride(), placements), []).append(i)
    together = BATCH_ELEMENTS.get(bucket.device.type, MOST_BATCH_ELEMENTS)
    for indices in alike.values():
        most = max(1, together // bucket.parameters[indices[0]].numel())
        for first in range(0, len(indices), most):
            yield indices[first : first + most]
