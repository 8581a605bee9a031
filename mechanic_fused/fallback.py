"""The fallback: Mechanic around any optimizer, from what the base's own step does to the weights.

It is slower than the fused path and needs temporaries of the weights' size. Of the base it requires
only that step() reads ``p.grad`` and changes ``p``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends import formulas, reference
from .backends.layout import OWN_STATE
from .base_code import base_code
from .bucket import Bucket
from .distributed import wrap
from .fused_bases import TABLE
from .log_tuner import LogTuner
from .torch_internals import local, unhooked_step

FALLBACK = "fallback"
"""The kind of a bucket whose update the base optimizer computes itself."""

GRAD_SCALER_ATTRIBUTES = ("grad_scale", "found_inf")
"""The attributes that GradScaler sets on an optimizer for the duration of a step."""


class Fallback:
    """The base's own step, run on copies.

    Args:
        optimizer: a mechanized optimizer; referenced weakly.
        base: its base class.
        reason: why it has no fused update.

    Attributes:
        chooses_dtypes: whether the base may keep its state in other dtypes than the weights'.
    """

    def __init__(self, optimizer: Optimizer, base: type[Optimizer], reason: str) -> None:
        self.reason = reason
        self.chooses_dtypes = base not in TABLE
        self._optimizer = weakref.ref(optimizer)
        self._step: Callable[[Optimizer], Any] = unhooked_step(base)

    def accumulate(self, buckets: list[Bucket]) -> None:
        """Take the sums with the old Δ, let the base step on copies, and add its updates to Δ.

        u = x' − x, where x' is a copy of x in float32 (float64 for float64) that the base has
        updated. Its gradients are copies too: unscaled, and 0 where they are not finite.
        """
        for bucket in buckets:
            reference.inner_products(bucket)
        with self._float32_copies(buckets) as copies:
            self._let_base_step()
            updated = [[local(p.detach()) for p in of_bucket] for of_bucket in copies]
        for bucket, of_bucket in zip(buckets, updated, strict=True):
            for i, x in enumerate(bucket.weights):
                if bucket.grads[i] is not None:
                    u = of_bucket[i] - x.to(bucket.compute_dtype)
                    reference.add_to_delta(bucket, i, u)

    def step(self, buckets: list[Bucket], tuner: LogTuner) -> None:
        """Take the sums of the running form, let the base step on copies, and x += S·u.

        u = x' − x, where x' is a copy of x that the base has updated, as for ``accumulate``.
        """
        with self._float32_copies(buckets) as copies:
            self._let_base_step()
            updated = [[local(p.detach()) for p in of_bucket] for of_bucket in copies]
        for bucket, of_bucket in zip(buckets, updated, strict=True):
            bucket.sums.zero_()
            factors = reference.gradient_multipliers(bucket)
            scale = reference.scale_near(bucket, tuner.scale())
            for i, g in enumerate(bucket.grads):
                if g is not None:
                    x = reference.read_weight(bucket, i)
                    g = g.to(bucket.compute_dtype) * factors[i]
                    reference.add_gradient_sums(bucket, i, g, x)
                    reference.move_weight(bucket, i, x, of_bucket[i] - x, scale)

    def dry_run(self, buckets: list[Bucket]) -> None:
        """Let the base step on copies that are discarded, so that it creates its state.

        What the base changes in its param groups is restored.
        """
        optimizer = self.optimizer
        groups = [dict(group) for group in optimizer.param_groups]
        with self._float32_copies(buckets):
            self._let_base_step()
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)

    def _let_base_step(self) -> None:
        # Bases make counts without naming a device, and read them on the host.
        on_cpu = torch.get_default_device().type == "cpu"
        optimizer = self.optimizer
        try:
            with base_code(optimizer), nullcontext() if on_cpu else torch.device("cpu"):
                self._step(optimizer)
        except Exception:
            with suppress(Warning):  # where warnings are errors: the base's is the one to see
                warnings.warn(
                    "the base's step() raised an error: weights and gradients are as they were, "
                    "but the base's own state may have moved for some of the weights",
                    stacklevel=2,
                )
            raise

    @property
    def optimizer(self) -> Optimizer:
        """The mechanized optimizer."""
        optimizer = self._optimizer()
        assert optimizer is not None, "a plan outlived its optimizer"
        return optimizer

    @contextmanager
    def _float32_copies(self, buckets: list[Bucket]) -> Iterator[list[list[Tensor]]]:
        """Give the base copies of weights and gradients, and only its own entries of the state.

        A plain float32 or float64 weight gets the copy as its ``data``. Another parameter takes the
        place of a DTensor, which ignores writes to ``data``, and of a weight of lower precision,
        which would lose the hooks on its gradient: torch drops a weight's gradient accumulator when
        the dtype of ``data`` changes, and DistributedDataParallel's reduction with it.
        """
        optimizer = self.optimizer
        # The base would unscale a second time: these gradients are unscaled already.
        attributes = vars(optimizer)
        scaler = {n: attributes.pop(n) for n in GRAD_SCALER_ATTRIBUTES if n in attributes}
        grads = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
        members = [group["params"] for group in optimizer.param_groups]
        substitutes: dict[Tensor, Tensor] = {}
        copies: list[list[Tensor]] = [[] for _ in buckets]
        had_state = {p for p in grads if OWN_STATE[0] in optimizer.state.get(p, ())}
        try:
            for p in grads:
                p.grad = None  # those in buckets get a copy below
            for bucket, of_bucket in zip(buckets, copies, strict=True):
                factors = reference.gradient_multipliers(bucket)
                for i, p in enumerate(bucket.parameters):
                    for name in OWN_STATE:
                        optimizer.state.get(p, {}).pop(name, None)
                    x = reference.read_weight(bucket, i).to(bucket.compute_dtype, copy=True)
                    g = _finite_gradient(bucket, i, factors[i])
                    if bucket.is_sharded or x.dtype is not p.dtype:
                        substitutes[p] = torch.nn.Parameter(wrap(x, p))
                        _move_state(optimizer, p, substitutes[p])
                    else:
                        p.data = x
                    q = substitutes.get(p, p)
                    q.grad = g if g is None else wrap(g, p)
                    of_bucket.append(q)
            for group, params in zip(optimizer.param_groups, members, strict=True):
                group["params"] = [substitutes.get(p, p) for p in params]
            yield copies
        finally:
            for group, params in zip(optimizer.param_groups, members, strict=True):
                group["params"] = params
            for bucket in buckets:
                for i, p in enumerate(bucket.parameters):
                    p.grad = None
                    if p in substitutes:
                        _move_state(optimizer, substitutes[p], p)
                    elif not bucket.is_sharded:
                        p.data = bucket.weights[i]
                    # Not for a weight that has never had a gradient: the base would take an entry
                    # without its own beside it for a state that it has already created.
                    if p in had_state or bucket.grads[i] is not None:
                        optimizer.state[p].update(bucket.own_state[i])
            for p, g in grads.items():
                p.grad = g
            attributes.update(scaler)


def _move_state(optimizer: Optimizer, source: Tensor, target: Tensor) -> None:
    if source in optimizer.state:
        optimizer.state[target] = optimizer.state.pop(source)


def _finite_gradient(bucket: Bucket, i: int, factor: float) -> Tensor | None:
    g = bucket.grads[i]
    if g is None:
        return None
    # abs(): the base applies the sign of maximize itself.
    return formulas.finite_or_zero(g.to(bucket.compute_dtype) * abs(factor))
