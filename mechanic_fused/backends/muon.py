"""The step of Muon's matrices in the running form: torch's products of matrices, between our sums.

    buf = μ·buf + (1−μ)·g;  n = μ·buf + (1−μ)·g (or buf);  O = NewtonSchulz(n)
    u = −lr·(ratio·O + weight_decay·x);  x += S·u

Matrices of one shape are orthogonalized together, in float32 on a CPU and in bfloat16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import increment_version

from . import Backend, formulas, reference
from .orthogonalize import Group, matrix_shape, orthogonalized, product_dtype

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
    """Yield the indices of weights with a gradient that have one shape and one param group."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, g in enumerate(bucket.grads):
        if g is not None and g.numel():
            alike.setdefault((bucket.groups[i], tuple(g.shape)), []).append(i)
    for indices in alike.values():
        most = max(1, BATCH_ELEMENTS // bucket.sizes[indices[0]])
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
    shape = matrix_shape(bucket.weights[indices[0]].shape)
    dtype = product_dtype(bucket.device, bucket.compute_dtype)
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
        matrix.copy_(direction.reshape(shape))
        xs.append(x)
    directions = orthogonalized(n, group, bucket.compute_dtype)
    for i, x, direction in zip(indices, xs, directions, strict=True):
        u = formulas.muon(direction.reshape(x.shape), x, c)
        reference.move_weight(bucket, i, x, u, tuner)
