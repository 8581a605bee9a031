"""What the tuner takes from the learning rates: their peaks and the annealing factor."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import RUNNING, VARIANTS, number
from .param_checks import is_trained

PEAK = "peak_lr"
"""The entry of a param group that holds the largest lr it has had or a scheduler announces."""

MAX_PEAK = "max_peak_lr"
"""The entry of every param group that holds the largest PEAK of all groups."""

LARGEST_LR = 1e30
"""Updates at a larger lr would leave the range of float32."""

LEAST_SLIP = 100.0
"""A peak that grows so many times in one step, and is not held in the next, was no schedule's."""


class Slip(NamedTuple):
    """A peak that has just grown beyond what schedules do.

    Attributes:
        step: the number of the step that found it.
        peaks, grown: of all groups, before and since.
        growth: see :func:`track_peak_lr`.
    """

    step: int
    peaks: list[float]
    grown: list[float]
    growth: float


def lr_of(group: dict[str, Any]) -> Any:
    """Return a group's lr, or 1 where the base has no lr or computes its own.

    Transformers' Adafactor computes its own where lr is None.
    """
    lr = group.get("lr")
    return 1.0 if lr is None else lr


def check_lrs(param_groups: list[dict[str, Any]], fused: bool) -> None:
    """Raise ValueError for an lr below 0, too large or not finite; one on a device is not read.

    Args:
        param_groups: the optimizer's own.
        fused: whether the update needs a number, which a base may do without.
    """
    for i, group in enumerate(param_groups):
        lr: Any = group.get("lr") if fused else lr_of(group)
        lr = _without_device_read(lr)
        if not torch.is_tensor(lr):
            number(f"lr of param group {i}", lr, 0, LARGEST_LR)


def track_peak_lr(param_groups: list[dict[str, Any]], started: bool) -> float:
    """Update each group's peak lr, and store the maximum over all groups in ``max_peak_lr``.

    Returns:
        By how much the peaks have grown, the least of all groups that had one.

    The peak is the lr that a scheduler announces (``max_lr``, ``initial_lr``), or else the lr that
    the group was made with; during a run it only grows. An lr that is a tensor is read before the
    start only.
    """
    growths = []
    for group in param_groups:
        announced = [group[name] for name in ("max_lr", "initial_lr") if name in group][:1]
        lrs = [*announced, lr_of(group)]
        if started and PEAK in group:
            lrs = [lr for lr in lrs if not torch.is_tensor(lr)]
        if PEAK in group and (started or not announced):
            lrs.append(group[PEAK])
        before, group[PEAK] = group.get(PEAK, 0.0), max(map(float, lrs))
        if before > 0:
            growths.append(group[PEAK] / before)
    _note_largest(param_groups)
    return min(growths, default=1.0)


def forget_slip(param_groups: list[dict[str, Any]], slip: Slip) -> bool:
    """Take back a growth of the peaks if every lr is below its former peak again.

    Not if something else has set the peaks since, as a checkpoint does: S is then not what it was.

    Returns:
        Whether it was taken back.
    """
    if [group.get(PEAK) for group in param_groups] != slip.grown:
        return False
    pairs = list(zip(param_groups, slip.peaks, strict=True))
    if any(torch.is_tensor(lr_of(group)) or lr_of(group) > peak for group, peak in pairs):
        return False
    for group, peak in pairs:
        group[PEAK] = peak
    _note_largest(param_groups)
    return True


def _note_largest(param_groups: list[dict[str, Any]]) -> None:
    largest = max((group[PEAK] for group in param_groups), default=0.0)
    for group in param_groups:
        group[MAX_PEAK] = largest


def annealing_factor(param_groups: list[dict[str, Any]]) -> float | Tensor:
    """Return lr/(peak lr) in [0, 1], of the group that is nearest to its peak.

    1 for the variants that do not look at it.
    """
    variant = param_groups[0]["variant"]
    if variant != RUNNING and not VARIANTS[variant].anneals:
        return 1.0
    factors = [
        _without_device_read(lr_of(group)) / group[PEAK]
        for group in param_groups
        if group.get(PEAK) and any(is_trained(p) for p in group["params"])
    ]
    if not factors:
        return 1.0
    factor = reduce(_maximum, factors)
    return factor.clamp(max=1.0) if torch.is_tensor(factor) else min(1.0, factor)


def _without_device_read(lr: float | Tensor) -> float | Tensor:
    """Return a float, or a 0-dim tensor on a device that the host must not read."""
    if not torch.is_tensor(lr):
        return lr
    return float(lr) if lr.device.type == "cpu" else lr.reshape(())


def _maximum(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """Return the larger of two without a device read."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.maximum(a, b)
    if torch.is_tensor(b):
        a, b = b, a
    return a.clamp(min=b) if torch.is_tensor(a) else max(a, b)
