"""The tuner of the running form: ln S, moved by h = g·(x − x_ref), from a start by the loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backends import formulas
from .backends.layout import COUNTERS, LOG_CONSTANTS, LOG_TUNER, LOSSES
from .options import AUTO, GROUP_OPTIONS, LOG_TUNING, RUNNING, USER_OPTIONS, tuner_options
from .scale_rows import KEY, ScaleRows

SCALE = LOG_TUNER.index("scale")


class LogTuner(ScaleRows):
    """The log tuner; ``formulas.log_tune_row`` says what it computes.

    Attributes:
        state: (scales, 16) float64: ``layout.LOG_TUNER``.
        constants: (16,) float64: ``layout.LOG_CONSTANTS``.
        losses: (2,) float64: ``layout.LOSSES``.
    """

    FACTOR = LOG_CONSTANTS.index("factor")

    def __init__(self, keys: list[Any], options: dict[str, Any], device: torch.device) -> None:
        self._start = 0.0
        self.losses = torch.zeros(len(LOSSES), dtype=torch.float64, device=device)
        super().__init__(keys, options, device)

    def _counters_of(self, state: Tensor) -> Tensor:
        first = LOG_TUNER.index(COUNTERS[0])
        return state[:, first : first + len(COUNTERS)]

    def scale(self, rows: Tensor | None = None) -> Tensor:
        """Return S of all scales, or of some rows of a state, (scales,), a new tensor."""
        return (self.state if rows is None else rows)[:, SCALE].clone()

    def anchored(self) -> Tensor:
        """Return whether S of each scale started from the loss, (scales,)."""
        return self.state[:, LOG_TUNER.index("anchors")] > 0

    def given(self) -> Tensor:
        """Return whether S of each scale was there before any estimate, (scales,)."""
        estimated = self.state[:, LOG_TUNER.index("weight")] > 0
        return (self.state[:, SCALE] > 0) & ~estimated

    def set_options(self, group: dict[str, Any]) -> None:
        """Take the options of a param group; see the base class."""
        now = tuple(group[name] for name in GROUP_OPTIONS)
        if now != self.options:
            tuner_options(**{name: group[name] for name in USER_OPTIONS})
            self.options = now
            self._start = 0.0 if group["s_init"] == AUTO else group["s_init"]
            factor = self._numbers[self.FACTOR] if self._numbers else 1.0
            numbers = {**LOG_TUNING, "tunes_scale": group["tune_scale"], "factor": factor}
            self._numbers = [float(numbers[name]) for name in LOG_CONSTANTS]
        self._send()

    def rescale(self, factor: float) -> None:
        """Multiply all that is per unit of the peak lr."""
        for name in ("scale", "start", "peak_rate"):
            self.state[:, LOG_TUNER.index(name)] *= factor
        self.state[:, LOG_TUNER.index("ln_anchor")] += math.log(factor)
        for name in ("ln_update", "ln_ratio", "start_ratio"):
            self.state[:, LOG_TUNER.index(name)] -= math.log(factor)

    def observe(self, loss: Tensor | float) -> None:
        """Add a loss to those of the next step."""
        if torch.is_tensor(loss):
            # To the host torch copies without waiting if it is asked to, and this would read junk.
            loss = loss.to(self.device, non_blocking=self.device.type != "cpu")
        self.losses[0] += loss
        self.losses[1] += 1

    def _initial(self, rows: int) -> Tensor:
        state = torch.zeros(rows, len(LOG_TUNER), dtype=torch.float64, device="cpu")
        state[:, SCALE] = self._start
        return state


def in_running_form(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of an exact form's checkpoint for the running form.

    S goes on from where it was, as if it had always been learned so; what the bettor knew beside it
    has no meaning here. A group without a tuner's state, of a plain base, stays as it is.
    """
    return [_in_running_form(group) if KEY in group else group for group in groups]


def _in_running_form(group: dict[str, Any]) -> dict[str, Any]:
    theirs: Tensor = group[KEY]
    state = torch.zeros(len(theirs), len(LOG_TUNER), dtype=torch.float64, device=theirs.device)
    steps = theirs[:, -len(COUNTERS)]
    column = LOG_TUNER.index
    state[:, column("steps")] = state[:, column("informed")] = steps
    state[:, column("nonfinite")] = theirs[:, -1]
    learned = formulas.total_scale(theirs[:, : len(group["tuner_betas"])])
    state[:, SCALE] = torch.where(steps > 0, learned, 0.0)
    state[:, column("learns")] = state[:, column("factor")] = (steps > 0).double()
    options = {name: None for name in ("s_decay", "tuner_betas", "tuner_eps")}
    return {**group, **options, "variant": RUNNING, "s_init": AUTO, KEY: state}
