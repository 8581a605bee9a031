"""Gradient release: each weight's part of a step is taken in the backward pass, and its gradient
let go of.

The sums need Δ from before the step and the update needs no S, so both can be had as soon as a
gradient is complete; what is left for ``step()`` is to learn S and to write the weights.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .backends.layout import GD, GG
from .bucket import Bucket
from .distributed import dtensor
from .plan import StepPlan

GRADIENT_COLUMNS = slice(GD, GG + 1, GG - GD)


class GradientRelease:
    """Hooks on the weights of a mechanized optimizer.

    A weight's part is taken by ``accumulate`` over a bucket of this weight alone, which shares its
    state with the plan's bucket. Until the run has started gradients are left where they are, and
    ``step()`` is the ordinary one.

    Args:
        optimizer: a mechanized optimizer on the fused road.
        reduced: that gradients of plain weights need no reduction after the backward pass.
    """

    def __init__(self, optimizer: Any, reduced: bool) -> None:
        self.reduced = reduced
        self.optimizer = weakref.ref(optimizer)
        self.plan: StepPlan | None = None
        self.places: dict[Tensor, tuple[Bucket, int]] = {}
        self.parts: dict[Tensor, Bucket] = {}
        self.taken: set[Tensor] = set()
        self.streams: dict[Any, Any] = {}
        for group in optimizer.param_groups:
            self.watch(group["params"])

    def watch(self, weights: list[Tensor]) -> None:
        """Take the gradients of these weights too."""
        for p in weights:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._take)

    @torch.no_grad()
    def _take(self, weight: Tensor) -> None:
        """Take the sums of a complete gradient, move its state and Δ on, and drop it."""
        optimizer = self.optimizer()
        if optimizer is None or not optimizer._started:
            return
        if weight in self.taken:
            raise RuntimeError(
                "gradients that are released must be complete after one backward pass: expected "
                f"step() before the next one, got a second gradient of shape {tuple(weight.shape)}"
            )
        if not self.taken:
            self._follow(optimizer)
        bucket, i = self.places[weight]
        part = self.parts.get(weight)
        if part is None:
            part = self.parts[weight] = bucket.part(i)
        part.collect_gradients()
        part.load(bucket.hyper_rows, bucket.live_lr, None, None, step_count=bucket.step_count)
        part.backend.prepare(part)
        part.backend.accumulate(part)
        part.grads = [None]
        weight.grad = None
        self.taken.add(weight)
        if part.device.type == "cuda":
            # FSDP reduces gradients, and calls this, on a stream of its own.
            stream = torch.cuda.current_stream(part.device)
            self.streams[stream] = stream.record_event()

    def _follow(self, optimizer: Any) -> None:
        """Make ready for the first gradient of a backward pass."""
        # Options may have changed since they were last looked at.
        check_releasable(optimizer, self.reduced)
        plan = optimizer._current_plan()
        if plan is not self.plan:
            self.plan, self.parts = plan, {}
            self.places = {p: (b, i) for b in plan.buckets for i, p in enumerate(b.parameters)}
        for bucket in plan.buckets:
            bucket.grads = [None] * len(bucket.weights)
        plan.load(optimizer.param_groups, None, None)
        plan.reconcile()

    def check(self, plan: StepPlan, scaled: bool) -> None:
        """Raise where the plan of ``step()`` is not the one of the backward pass.

        Raises:
            RuntimeError: for weights that were changed in between, or a GradScaler.
        """
        self.check_unwritten(plan)
        if scaled:
            raise RuntimeError(
                "GradScaler needs all gradients at once, and release_gradients() lets go of them: "
                "use one or the other"
            )

    def check_unwritten(self, plan: StepPlan) -> None:
        """Raise RuntimeError where something was changed since the first gradient was taken."""
        if not self.taken:
            return
        if plan is not self.plan or any(bucket.externally_modified() for bucket in plan.buckets):
            self.taken.clear()
            raise RuntimeError(
                "weights, groups and state must stay as they are between backward() and step() "
                "where gradients are released: what was taken of them is lost"
            )

    def add(self, bucket: Bucket) -> None:
        """Add the sums of the weights taken in the backward pass to their bucket's."""
        sums = [self.parts[p].sums for p in bucket.parameters if p in self.taken]
        for stream, event in self.streams.items():
            if stream.device == bucket.device:
                torch.cuda.current_stream(bucket.device).wait_event(event)
        if sums:
            total = torch.stack(sums).sum(0)
            bucket.sums[:, GRADIENT_COLUMNS] += total[:, GRADIENT_COLUMNS]

    def done(self) -> None:
        """Make ready for the next backward pass."""
        self.taken.clear()
        self.streams.clear()


def check_releasable(optimizer: Any, reduced: bool) -> None:
    """Raise ValueError where gradients cannot be taken one by one in the backward pass."""
    refusal = optimizer._refusal()
    if refusal:
        raise ValueError(f"release_gradients() needs a fused update, got {refusal}")
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm needs the norm of all gradients before any is used: expected None with "
            f"release_gradients(), got {optimizer.max_grad_norm}"
        )
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if there else 1
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    plain = [p for p in weights if p.requires_grad and not isinstance(p, dtensor())]
    if ranks > 1 and plain and not reduced:
        raise ValueError(
            f"{len(plain)} plain weights in a world of {ranks} ranks: a hook sees their gradients "
            "before DistributedDataParallel or FSDP1 has reduced them. Use fully_shard, or say "
            "release_gradients(reduced=True) where they are reduced already or need not be"
        )
