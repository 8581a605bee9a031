"""What the steps have come to: a Recorder on the device, and S that is read where it is used."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .backends.layout import GD, GG, UU, XX
from .log_tuner import LogTuner
from .options import integer
from .scale_rows import ScaleRows

Array = np.ndarray[Any, np.dtype[np.float64]]


class Recording(NamedTuple):
    """Arrays with an element for each recorded step, the oldest first.

    Attributes:
        step: the number of the step, from 1 on.
        effective_lr: S·lr of the first param group.
        scale: the S of the step, before it moved; with several scales the first.
        h: ⟨g, x − x_ref⟩, of an exact form ⟨g, Δ⟩, over all scales.
        loss: as observed; NaN where none was.
        grad_norm: ‖g‖ as it was stepped with, after clipping.
        weight_norm: ‖x‖ before the step.
        update_norm: ‖u‖ at the peak lr; NaN in an exact form.
    """

    step: Array
    effective_lr: Array
    scale: Array
    h: Array
    loss: Array
    grad_norm: Array
    weight_norm: Array
    update_norm: Array


class Recorder:
    """A ring of rows on the device; writing to it does not wait.

    Args:
        every: record every so many steps, the first one first.
        capacity: rows; the newest are kept.
        device: of the tuner.
    """

    def __init__(self, every: int, capacity: int, device: torch.device) -> None:
        self._every = integer("every", every, 1)
        self._capacity = integer("capacity", capacity, 1)
        columns = len(Recording._fields)
        self._rows = torch.zeros(self._capacity, columns, dtype=torch.float64, device=device)
        self._seen = self._kept = 0

    def note(self, total: Tensor, tuner: ScaleRows, lr: float | Tensor) -> None:
        """Take the numbers of a step, before its sums move the tuner.

        Args:
            total: the sums, (scales, 6).
            tuner: before it moves.
            lr: of the first param group in that step.
        """
        self._seen += 1
        if (self._seen - 1) % self._every:
            return
        sums, scale = total.sum(0), tuner.scale()[0]
        nan = sums.new_full((), torch.nan)
        loss = update = nan
        if isinstance(tuner, LogTuner):
            loss, update = tuner.losses[0] / tuner.losses[1], sums[UU].sqrt()
        row = (
            tuner.counters[0, 0] + 1,
            (scale * lr).reshape(()),
            scale,
            sums[GD],
            loss,
            sums[GG].sqrt(),
            sums[XX].sqrt(),
            update,
        )
        self._rows[self._kept % self._capacity] = torch.stack(row)
        self._kept += 1

    def read(self) -> Recording:
        """Return what was recorded; reads the device."""
        first = self._kept % self._capacity if self._kept > self._capacity else 0
        rows = self._rows[: self._kept].roll(-first, 0).cpu().numpy()
        return Recording(*rows.T.copy())


def drawn(recording: Recording) -> Any:
    """Return a matplotlib figure of the loss and the learned rate over the steps."""
    import matplotlib.pyplot as plt

    figure, (losses, rates) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    known = np.isfinite(recording.loss)
    losses.plot(recording.step[known], recording.loss[known], color="tab:red")
    moves = recording.effective_lr > 0
    rates.plot(recording.step[moves], recording.effective_lr[moves], color="tab:red")
    losses.set_ylabel("loss")
    rates.set(ylabel="learned rate S·lr", xlabel="step", yscale="log")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


class LearnedScale:
    """S of a param group, which is read when it is used as a number: ``group["d"] * group["lr"]``.

    Args:
        optimizer: the mechanized one, referenced weakly; without it the number is 0.
        group: the number of the param group.
    """

    def __init__(self, optimizer: Any, group: int) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._group = group

    def __float__(self) -> float:
        optimizer = self._optimizer()
        known = [s for s in optimizer.group_scales()[self._group] if s] if optimizer else []
        return sum(known) / len(known) if known else 0.0

    def __mul__(self, other: Any) -> Any:
        return float(self) * other

    __rmul__ = __mul__

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __repr__(self) -> str:
        return repr(float(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)
