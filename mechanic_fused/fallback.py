"""The general road: Mechanic around any optimizer, by watching what its own step does.

Slower than the fused road, with temporaries of the weights' size, but it asks nothing of the base
except that its step reads ``p.grad`` and moves ``p``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends import reference
from .bucket import Bucket
from .distributed import local, wrap
from .state import OURS

SCALER = ("grad_scale", "found_inf")
"""What GradScaler sets on an optimizer for the time of a step."""


def accumulate(
    optimizer: Optimizer, buckets: list[Bucket], base_step: Callable[[Optimizer], Any]
) -> None:
    """Take the sums with the old Δ, let the base step on lent weights, and add its moves to Δ.

    u = x' − x, where x' is a copy of x in float32 (float64 for float64) that the base has moved.
    Its gradients are lent too: unscaled, and 0 where they are not finite.
    """
    for bucket in buckets:
        reference.inner_products(bucket)
    with float32_copies(optimizer, buckets) as lent:
        base_step(optimizer)
        moved = [[local(p.detach()) for p in lent_weights] for lent_weights in lent]
    for bucket, parts in zip(buckets, moved, strict=True):
        for i, x in enumerate(bucket.weights):
            if bucket.grads[i] is not None:
                reference.add_to_delta(bucket, i, parts[i] - x.to(bucket.compute_dtype))


def dry_run(
    optimizer: Optimizer, buckets: list[Bucket], base_step: Callable[[Optimizer], Any]
) -> None:
    """Let the base step on copies that are thrown away, so that its state has all its entries.

    What it counts in its param groups is put back.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    with float32_copies(optimizer, buckets):
        base_step(optimizer)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(before)


@contextmanager
def float32_copies(optimizer: Optimizer, buckets: list[Bucket]) -> Iterator[list[list[Tensor]]]:
    """Give the base copies of weights and gradients, and a state of only its own entries.

    A plain weight is lent by its ``data``. A DTensor keeps its part whatever its ``data`` is set
    to, so another parameter stands in for it.
    """
    # The base would apply GradScaler's scale a second time, to gradients that are unscaled here.
    entries = vars(optimizer)
    scaler = {name: entries.pop(name) for name in SCALER if name in entries}
    grads = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    members = [group["params"] for group in optimizer.param_groups]
    stand_ins: dict[Tensor, Tensor] = {}
    lent: list[list[Tensor]] = [[] for _ in buckets]
    stored = {p for p in grads if OURS[0] in optimizer.state.get(p, ())}
    try:
        for p in grads:
            # A frozen weight may still carry a gradient; torch's optimizers would move it.
            p.grad = None
        for k, bucket in enumerate(buckets):
            by = reference.gradient_multipliers(bucket)
            for i, p in enumerate(bucket.parameters):
                for name in OURS:
                    optimizer.state.get(p, {}).pop(name, None)
                x, g = bucket.weights[i].to(bucket.compute_dtype, copy=True), _finite(bucket, i, by[i])
                if bucket.wrapped:
                    stand_ins[p] = torch.nn.Parameter(wrap(x, p))
                    _move(optimizer, p, stand_ins[p])
                else:
                    p.data = x
                q = stand_ins.get(p, p)
                q.grad = g if g is None else wrap(g, p)
                lent[k].append(q)
        for group, params in zip(optimizer.param_groups, members, strict=True):
            group["params"] = [stand_ins.get(p, p) for p in params]
        yield lent
    finally:
        for group, params in zip(optimizer.param_groups, members, strict=True):
            group["params"] = params
        for bucket in buckets:
            for i, p in enumerate(bucket.parameters):
                p.grad = None
                if p in stand_ins:
                    _move(optimizer, stand_ins[p], p)
                elif not bucket.wrapped:
                    p.data = bucket.weights[i]
                # Not for a weight that has never had a gradient: an entry without the base's own
                # beside it would look to the base like a state that it has made already.
                if p in stored or bucket.grads[i] is not None:
                    optimizer.state[p].update(bucket.ours[i])
        for p, g in grads.items():
            p.grad = g
        entries.update(scaler)


def _move(optimizer: Optimizer, source: Tensor, target: Tensor) -> None:
    """Hand the state of one parameter on to another."""
    if source in optimizer.state:
        optimizer.state[target] = optimizer.state.pop(source)


def _finite(bucket: Bucket, i: int, by: float) -> Tensor | None:
    g = bucket.grads[i]
    if g is None:
        return None
    # The base maximizes by itself.
    g = g.to(bucket.compute_dtype) * abs(by)
    return torch.where(g.isfinite(), g, 0.0)
