"""What the tuner takes from the learning rates: their peak, and the pace of a schedule."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .options import VARIANTS

PEAK = "peak_lr"
"""The entry of every param group with the largest lr that it has been seen to have."""


def track_peak_lr(param_groups: list[dict[str, Any]], started: bool) -> None:
    """Note the largest lr of each group, and in every group's ``rate`` that of them all.

    It is what a scheduler names, or else what the group was made with; from then on it only grows.
    An lr that is a tensor is read before the start only.
    """
    for group in param_groups:
        named = [group[name] for name in ("max_lr", "initial_lr") if name in group][:1]
        rates = [*named, group.get("lr", 1.0)]
        if started and PEAK in group:
            rates = [rate for rate in rates if not torch.is_tensor(rate)]
        if PEAK in group and (started or not named):
            rates.append(group[PEAK])
        group[PEAK] = max(map(float, rates))
    rate = max((group[PEAK] for group in param_groups), default=0.0)
    for group in param_groups:
        group["rate"] = rate


def pace(param_groups: list[dict[str, Any]]) -> float | Tensor:
    """Return the part of its move that s takes at this step: 1, or lr/(peak lr) where S anneals, of
    the group that is nearest to its peak."""
    if not VARIANTS[param_groups[0]["variant"]].anneals:
        return 1.0
    parts = [
        _host_or_device(group.get("lr", 1.0)) / group[PEAK]
        for group in param_groups
        if group.get(PEAK) and any(p.requires_grad for p in group["params"])
    ]
    if not parts:
        return 1.0
    part = reduce(_larger, parts)
    return part.clamp(max=1.0) if torch.is_tensor(part) else min(1.0, part)


def _host_or_device(lr: float | Tensor) -> float | Tensor:
    """Return a number, or a 0-dim tensor of a device that the host is not to read."""
    if not torch.is_tensor(lr):
        return lr
    return float(lr) if lr.device.type == "cpu" else lr.reshape(())


def _larger(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """Return the larger one without reading a device."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.maximum(a, b)
    if torch.is_tensor(b):
        a, b = b, a
    return a.clamp(min=b) if torch.is_tensor(a) else max(a, b)
