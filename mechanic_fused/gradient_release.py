"""Gradient release: a weight's part of a step in the backward pass; then its gradient is freed.

In the running form S is known before the step, so a hook takes the whole step of its weight, and
``step()`` only moves S. In the exact forms the sums need Δ from before the step and the update u
needs no S, so a hook takes both, and ``step()`` tunes S and writes the weights.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .bucket import Bucket
from .plan import Run, StepPlan
from .step import follow_settings
from .torch_internals import dtensor


class GradientRelease:
    """Hooks on the weights of a mechanized optimizer.

    A hook runs ``step`` or ``accumulate`` over a bucket of its weight alone, which shares its state
    with the plan's bucket. In the exact forms gradients are kept until the run has started, and
    ``step()`` is the ordinary one.

    Args:
        plan_step: the optimizer's method; referenced weakly.
        run: the optimizer's own.
        param_groups: the optimizer's own.
        reduced: whether gradients of plain weights need no reduction after the backward pass.
    """

    def __init__(
        self,
        plan_step: Callable[[], StepPlan],
        run: Run,
        param_groups: list[dict[str, Any]],
        reduced: bool,
    ) -> None:
        self.reduced = reduced
        self._lock = threading.Lock()
        self.taken: set[Tensor] = set()
        self._plan_step = weakref.WeakMethod(plan_step)
        self._run = run
        self._plan: StepPlan | None = None
        self._places: dict[Tensor, tuple[Bucket, int]] = {}
        self._singles: dict[Tensor, Bucket] = {}
        self._streams: dict[Any, Any] = {}
        for group in param_groups:
            self.watch(group["params"])

    def watch(self, weights: list[Tensor]) -> None:
        """Take the gradients of these weights too."""
        # Weights that outlive the optimizer must not keep its state.
        take = weakref.WeakMethod(self._take)

        def hook(weight: Tensor) -> None:
            found = take()
            if found is not None:
                found(weight)

        for p in weights:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(hook)

    @torch.no_grad()
    def _take(self, weight: Tensor) -> None:
        """Take what a complete gradient allows of its weight's step, and free it."""
        # Autograd has a thread for each GPU.
        with self._lock:
            self._take_alone(weight)

    def _take_alone(self, weight: Tensor) -> None:
        plan_step = self._plan_step()
        if plan_step is None:
            return
        if weight in self.taken:
            raise RuntimeError(
                "gradients that are released must be complete after one backward pass: expected "
                f"step() before the next one, got a second gradient of shape {tuple(weight.shape)}"
            )
        if not self.taken and not self._begin_backward(plan_step()):
            return
        bucket, i = self._places[weight]
        single = self._singles.get(weight)
        if single is None:
            single = self._singles[weight] = bucket.part([i])
        single.collect_gradients()
        if single.copies:
            single.fetch_gradients()
        single.write_tables(bucket.hyper_rows, bucket.live_lr, None, None, bucket.step_count)
        if single.handle is None or single.backend.COPIES_TABLES:
            single.backend.prepare(single)
        plan = self._plan
        assert plan is not None
        self.taken.add(weight)
        weight.grad = None
        if plan.run.offload is not None:
            # The copy is written later, but what still needs the weight must raise now.
            increment_version([weight])
            plan.run.offload.submit(partial(_step_copy, plan, single))
            plan.run.offload.hold_back(single.copies[0])
            return
        if plan.options.is_running:
            plan.step_bucket(single)
        else:
            single.backend.accumulate(single)
        single.grads = [None]
        if single.device.type == "cuda":
            # FSDP reduces gradients, and calls this hook, on a stream of its own.
            stream = torch.cuda.current_stream(single.device)
            self._streams[stream] = stream.record_event()

    def _begin_backward(self, plan: StepPlan) -> bool:
        """Prepare for the first gradient of a backward pass; return whether the run has started."""
        if plan.options.is_running:
            self._run.settle()
            started = plan.has_started()
            if plan.settings_changed or not started:
                follow_settings([plan], started)
            if not started:
                plan.start()
        elif not plan.has_started():
            return False
        # Options may have changed since the hooks were registered.
        reason = plan.fallback.reason if plan.fallback else None
        check_releasable(reason, plan.max_grad_norm, plan.param_groups, self.reduced)
        if plan is not self._plan:
            self._plan, self._singles = plan, {}
            self._places = {p: (b, i) for b in plan.buckets for i, p in enumerate(b.parameters)}
        for bucket in plan.buckets:
            bucket.grads = [None] * len(bucket.weights)
        plan.write_tables(None, None)
        if not plan.options.is_running:
            plan.reconcile()
        return True

    def check(self, plan: StepPlan, has_grad_scaler: bool) -> None:
        """Raise RuntimeError where ``step()`` does not fit what the backward pass has done.

        Args:
            plan: the plan of the step.
            has_grad_scaler: whether GradScaler takes the step.
        """
        self.check_unmodified(plan)
        if has_grad_scaler:
            raise RuntimeError(
                "GradScaler needs all gradients at once, and release_gradients() frees them: "
                "use one or the other"
            )

    def check_unmodified(self, plan: StepPlan) -> None:
        """Raise RuntimeError where something has changed since the first gradient was taken."""
        if not self.taken:
            return
        modified = not plan.options.is_running and any(
            bucket.externally_modified() for bucket in plan.buckets
        )
        if plan is not self._plan or modified:
            self.taken.clear()
            raise RuntimeError(
                "weights, groups and state must not change between backward() and step() where "
                "gradients are released: this step's gradients are lost"
            )

    def add_sums(self, bucket: Bucket, columns: slice) -> None:
        """Add columns of the sums of weights taken during the backward pass to their bucket's."""
        sums = [self._singles[p].sums for p in bucket.parameters if p in self.taken]
        for stream, event in self._streams.items():
            if stream.device == bucket.device:
                torch.cuda.current_stream(bucket.device).wait_event(event)
        if sums:
            total = torch.stack(sums).sum(0)
            bucket.sums[:, columns] += total[:, columns]

    def end_step(self) -> None:
        """Prepare for the next backward pass."""
        self.taken.clear()
        self._streams.clear()


@torch.no_grad()
def _step_copy(plan: StepPlan, single: Bucket) -> None:
    """Take a weight's step on its copy, in the thread of the offload."""
    plan.step_bucket(single)
    single.grads = [None]


def check_releasable(
    fallback_reason: str | None,
    max_grad_norm: float | None,
    param_groups: list[dict[str, Any]],
    reduced: bool,
) -> None:
    """Raise ValueError where gradients cannot be taken one by one during the backward pass."""
    if fallback_reason:
        raise ValueError(f"release_gradients() needs a fused update, got {fallback_reason}")
    if max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm needs the norm of all gradients before any is used: expected None with "
            f"release_gradients(), got {max_grad_norm}"
        )
    has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if has_ranks else 1
    weights = [p for group in param_groups for p in group["params"]]
    plain = [p for p in weights if p.requires_grad and not isinstance(p, dtensor())]
    if ranks > 1 and plain and not reduced:
        raise ValueError(
            f"{len(plain)} plain weights in a world of {ranks} ranks: a hook sees their gradients "
            "before DistributedDataParallel or FSDP1 has reduced them. Use fully_shard, or pass "
            "release_gradients(reduced=True) where they are reduced already or need not be"
        )
