"""take_step: the order of one step. Each phase runs for all plans before the next one begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import distributed
from .lr_schedule import (
    LEAST_SLIP,
    PEAK,
    Slip,
    annealing_factor,
    check_lrs,
    forget_slip,
    track_peak_lr,
)
from .options import GROUP_OPTIONS, ZERO_WEIGHT_RMS, awaits_calibration, calibrate
from .plan import Pending, Run, StepPlan
from .torch_internals import set_step_called

if TYPE_CHECKING:
    from .optimizer import Mechanized


def step_together(optimizers: Sequence[Mechanized]) -> None:
    """Let several optimizers over parts of one model take one step with one scale.

    For containers that have an optimizer for each part of a model, such as the stages of a
    pipeline: sums are taken over all parts and reduced once, and the parts learn the same S.

    Args:
        optimizers: mechanized optimizers with the same tuner options; every rank must call this
            with parts that are sharded over the same process groups in the same order.

    Raises:
        ValueError: for gradients or weights that cannot be used, or optimizers whose options
            differ; nothing has changed then.

    Example:
        >>> import torch
        >>> from mechanic_fused import MechanicSGD
        >>> parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]
        >>> optimizers = [MechanicSGD(part.parameters(), lr=1.0) for part in parts]
        >>> parts[1](parts[0](torch.ones(1, 2))).sum().backward()
        >>> step_together(optimizers)
    """
    take_step([optimizer.plan_step() for optimizer in optimizers])
    for optimizer in optimizers:
        set_step_called(optimizer, True)  # schedulers look for it


@torch.no_grad()
def take_step(plans: Sequence[StepPlan]) -> None:
    """Take one step of all plans with sums over all of them, in the running form or an exact one.

    Until the first step with a gradient element that is not 0, only state is created.
    """
    for plan in plans:
        if plan.continues:
            continue
        plan.run.settle()
        plan.run.step_number += 1
    # Lists, not generators: they are faster, and every plan is asked.
    started = any([plan.has_started() for plan in plans])
    is_running = plans[0].options.is_running
    if any([plan.settings_changed for plan in plans]):
        if started or is_running:
            follow_settings(plans, started)
        else:  # that comes after the first update, too late for an error
            check_lrs_of(plans)
    if len(plans) > 1:
        check_alike(plans)
    if any([plan.given is not None for plan in plans]):
        check_parts(plans)
    extra_groups = tuple(dict.fromkeys(group for plan in plans for group in plan.extra_groups))
    shared = len(plans) > 1 or bool(extra_groups) or any([plan.reduces for plan in plans])
    try:
        for plan in plans:
            plan.collect_gradients()  # every error is raised here, before anything changes
        active = [plan for plan in plans if plan.load(shared)]
        if not active:
            # No gradients, or GradScaler found an overflow: the observed losses go with them.
            for plan in plans:
                plan.forget_losses()
            return
        max_grad_norm = plans[0].max_grad_norm
        if not started or max_grad_norm is not None:
            norms = [plan.gradient_norms(started) for plan in active]
            informative, squared_norm = distributed.all_reduce(
                norms, extra_groups, plans[0].reduce_device
            )
            if not started and not start(active, informative):
                return
            if max_grad_norm is not None:
                for plan in active:
                    plan.clip(squared_norm, max_grad_norm)
        if is_running:
            running_form(active, shared, extra_groups)
        else:
            exact_form(active, started, shared, extra_groups)
    finally:
        for plan in plans:
            plan.finish()
    for plan in active:
        plan.run.last_part = None if plan.given is None else plan
        if plan.on_step is not None and plan.given is None:
            plan.on_step()


def exact_form(
    plans: Sequence[StepPlan], started: bool, shared: bool, extra_groups: Sequence[Any]
) -> None:
    """Δ += u, then S, then x = x_ref + S·Δ."""
    for plan in plans:
        plan.reconcile()  # with what others have written to the weights
    sums = [plan.accumulate(shared) for plan in plans]  # g·Δ, g·g; base state, Δ += u
    if not started:
        follow_settings(plans, started)
    if any([plan.awaits_calibration for plan in plans]):
        calibrate_s_init(plans, extra_groups)
    total = next(iter(sums[0].values()))
    if shared:
        total = distributed.all_reduce(sums, extra_groups)
    for plan in plans:
        plan.tune(total)  # h → s, r, v, m
    for plan in plans:
        plan.apply()  # x = x_ref + S·Δ; x·Δ, x·x for the next step


def running_form(plans: Sequence[StepPlan], shared: bool, extra_groups: Sequence[Any]) -> None:
    """x += S·u with the S that the steps before have learned, and the sums for the next S.

    Where the sums have to be reduced over ranks, that runs on until the next step begins.
    """
    for plan in plans:
        plan.step()  # g·(x − x_ref), g·g, x·x, u·u; base state, x += S·u
    if not shared and plans[0].given is None:
        plans[0].log_tune(plans[0].sums())
        return
    first = plans[0]
    pending = first.run.pending if first.continues else None
    pending = pending or Pending()
    if shared:
        rows = [plan.rows_to_reduce() for plan in plans]
        pending.add(distributed.Reduction(rows, extra_groups, first.reduce_device), plans)
    else:
        pending.add(first.sums().clone(), plans)
    for plan in plans:
        plan.run.pending = pending


def follow_settings(plans: Sequence[StepPlan], started: bool) -> None:
    """Take the options of all param groups: peak lrs, the tuner's options, the annealing factor.

    Raises:
        ValueError: for an lr that is below 0 or not finite; nothing has changed then.
    """
    check_lrs_of(plans)
    groups = [group for plan in plans for group in plan.param_groups]
    if plans[0].continues:  # whose first part has followed
        track_peak_lr(groups, started)
        growth = 1.0
    else:
        growth = follow_peaks(plans[0].run, groups, started)
    factor = annealing_factor(groups)
    for plan in plans:
        if started and growth != 1:
            plan.rescale(1 / growth)
        plan.tuner.set_options(plan.param_groups[0])
        plan.tuner.set_annealing_factor(factor)
        plan.awaits_calibration = awaits_calibration(plan.param_groups)
        plan.note_settings()


def follow_peaks(run: Run, groups: list[dict[str, Any]], started: bool) -> float:
    """Return by how much the peak lrs have grown since the last step, below 1 after a slip.

    An lr of 1e10 for a single step would else keep S as small as it had to be in that step. Once a
    run: a second one is a schedule's.
    """
    slip, run.slip = run.slip, None
    back = 1.0
    if slip and run.step_number <= slip.step + 1 and forget_slip(groups, slip):
        run.has_slipped = True
        back = 1 / slip.growth
    peaks = [group.get(PEAK, 0.0) for group in groups]
    growth = track_peak_lr(groups, started)
    grows = any(
        group[PEAK] >= LEAST_SLIP * peak > 0 for group, peak in zip(groups, peaks, strict=True)
    )
    if started and grows and not run.has_slipped:
        run.slip = Slip(run.step_number, peaks, [group[PEAK] for group in groups], growth)
    return back * growth


def check_lrs_of(plans: Sequence[StepPlan]) -> None:
    """Raise ValueError for an lr that is below 0 or not finite."""
    for plan in plans:
        check_lrs(plan.param_groups, plan.fused is not None)


def start(plans: Sequence[StepPlan], informative: Tensor) -> bool:
    """Begin the run if any gradient element is not 0; otherwise only create state."""
    if not informative:
        for plan in plans:
            plan.dry_run()
        return False
    for plan in plans:
        plan.start()
    return True


def calibrate_s_init(plans: Sequence[StepPlan], extra_groups: Sequence[Any]) -> None:
    """Set s_init = c·‖x‖/‖lr₀·d₁‖ from the first update; reads the device.

    Until a step has changed Δ (a warm-up may begin with lr = 0) there is nothing to calibrate from.
    """
    norms = distributed.all_reduce([plan.calibration_norms() for plan in plans], extra_groups)
    x_norm, d_norm = norms[:2].sqrt().tolist()
    if not (0 < d_norm < math.inf and x_norm < math.inf):
        return
    x_norm = x_norm or ZERO_WEIGHT_RMS * math.sqrt(norms[2].item())
    factor = annealing_factor([group for plan in plans for group in plan.param_groups])
    for plan in plans:
        calibrate(plan.param_groups, x_norm, d_norm)
        plan.start_at_s_init(factor)


def check_parts(plans: Sequence[StepPlan]) -> None:
    """Raise ValueError for a part of a step where all of it must be known."""
    for plan in plans:
        last = plan.run.last_part
        follows = last is not None and last is not plan and not last.has_any(plan.members)
        if not (plan.continues or (follows and not plan.options.is_running)):
            continue
        if plan.max_grad_norm is not None:
            raise ValueError(
                "max_grad_norm needs all gradients at once: expected None where step() is called "
                "for one part of the weights after the other, and clipping by the engine, got "
                f"{plan.max_grad_norm}"
            )
        if not plan.options.is_running:
            raise ValueError(
                "the exact forms need all weights at once: expected variant='running' where "
                "step() is called for one part of the weights after the other, got "
                f"{plan.param_groups[0]['variant']!r}"
            )


def check_alike(plans: Sequence[StepPlan]) -> None:
    """Raise ValueError unless plans that step together learn one scale by the same rules."""
    first = plans[0]
    for plan in plans:
        if plan.options.scale_per != "model":
            raise ValueError(
                "optimizers that step together must have one scale: expected scale_per='model', "
                f"got {plan.options.scale_per!r}"
            )
        if plan.max_grad_norm != first.max_grad_norm:
            raise ValueError(
                "optimizers that step together must have the same max_grad_norm, expected "
                f"{first.max_grad_norm}, got {plan.max_grad_norm}"
            )
        if plan.options.offload != first.options.offload:
            raise ValueError(
                "optimizers that step together must all have offload=True or none, got both"
            )
        if plan.has_started() != first.has_started():
            raise ValueError(
                "optimizers that step together must have started together: reset_scale() of all "
                "starts a new run"
            )
    for plan in plans:
        for name in GROUP_OPTIONS:
            mine, expected = plan.param_groups[0][name], first.param_groups[0][name]
            if mine != expected:
                raise ValueError(
                    f"optimizers that step together must have the same {name}, expected "
                    f"{expected}, got {mine}"
                )
