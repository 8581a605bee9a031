"""ScaleRows: what every tuner has, a row of numbers per scale that lives in ``param_groups``."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable
from itertools import accumulate
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .backends.layout import has_float64

R = TypeVar("R", bound="ScaleRows")

KEY = "mechanic_state"
"""The entry of every param group that holds the tuner's state, or the group's rows of it."""

ON_DEVICE = -1.0
"""Marks an annealing factor that only the device knows, among numbers the host has sent."""

STALE_IN_CAPTURE = (
    "hyperparameters changed since the last step outside the graph: call "
    "opt.refresh_hyperparameters() before the capture"
)


def scale_keys(param_groups: list[dict[str, Any]], scale_per: str) -> list[Hashable]:
    """Return what each scale belongs to: the model, a group's number, or a parameter's id."""
    if scale_per == "model":
        return ["model"]
    if scale_per == "group":
        return list(range(len(param_groups)))
    return [id(p) for group in param_groups for p in group["params"]]


class ScaleRows(ABC):
    """A tuner's numbers: one row per scale, float64, on one device.

    Attributes:
        state: (scales, columns) float64.
        constants: float64, what the kernels read beside it.
        keys: what each row belongs to.
        options: the values of a param group that the constants were made from.
        found_inf: GradScaler's, of the step that is tuned, or None.

    Args:
        keys: see :func:`scale_keys`; rows are found again by their key when the list changes.
        options: a param group, with the entries named in GROUP_OPTIONS.
        device: where the state is kept: the device of the sums.
    """

    FACTOR: ClassVar[int]
    """The column of the constants that holds lr/(peak lr)."""

    def __init__(self, keys: list[Hashable], options: dict[str, Any], device: torch.device) -> None:
        self.keys = keys
        self.device = device
        self.options: tuple[Any, ...] = ()
        self.constants = torch.empty(0, device="cpu")
        self._numbers: list[float] = []
        self._sent: list[float] = []
        self.set_options(options)
        self.state = self._initial(len(keys)).to(device)
        self.found_inf: Tensor | None = None
        self._views: list[Tensor] = []

    @abstractmethod
    def set_options(self, group: dict[str, Any]) -> None:
        """Take the options of a param group; writes to the device if they changed.

        Raises:
            ValueError: for an option out of range.
        """

    @abstractmethod
    def scale(self, rows: Tensor | None = None) -> Tensor:
        """Return S of all scales, or of some rows of a state, (scales,), a new tensor."""

    @property
    def counters(self) -> Tensor:
        """(scales, 2), a view of the state: steps, and steps with sums that were not finite."""
        return self._counters_of(self.state)

    @abstractmethod
    def _counters_of(self, state: Tensor) -> Tensor:
        """Return the counters, (scales, 2), as a view of a state."""

    @abstractmethod
    def _initial(self, rows: int) -> Tensor:
        """Return the state at the start of a run, on the CPU."""

    def set_annealing_factor(self, factor: float | Tensor) -> None:
        """Take lr/(peak lr); writes to the device if it changed."""
        if torch.is_tensor(factor) and not has_float64(factor.device):
            factor = float(factor)
        if torch.is_tensor(factor):
            self.constants[self.FACTOR].copy_(factor, non_blocking=True)
            # Any number that comes next differs from the one on the device.
            self._numbers[self.FACTOR] = self._sent[self.FACTOR] = ON_DEVICE
        else:
            self._numbers[self.FACTOR] = float(factor)
            self._send()

    def _send(self) -> None:
        """Write the constants to where kernels read them, if they have changed; never waits."""
        if self._numbers == self._sent:
            return
        numbers = torch.tensor(self._numbers, dtype=torch.float64, device="cpu")
        if self.constants.shape != numbers.shape:
            self.constants = numbers.to(self.device)
        else:
            if self.device.type == "cuda":
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(STALE_IN_CAPTURE)
                numbers = numbers.pin_memory()
            self.constants.copy_(numbers, non_blocking=True)
        self._sent = list(self._numbers)

    def to(self: R, device: torch.device) -> R:
        """Return this tuner, or what writes of weights read of it as a copy on another device."""
        if device == self.device:
            return self
        there = copy.copy(self)
        there.device = device
        there.state, there.constants = self.state.to(device), self.constants.to(device)
        if self.found_inf is not None:
            there.found_inf = self.found_inf.to(device, non_blocking=True)
        return there

    def reset(self) -> None:
        """Set every row to the state at the start of a run."""
        self.state.copy_(self._initial(len(self.keys)).to(self.device))

    def follow(self, param_groups: list[dict[str, Any]], scale_per: str) -> None:
        """Adopt the state found in the groups, and follow changes of groups and members.

        Checkpoints and sharding wrappers read and write ``param_groups``, so a tensor that they
        have put there replaces our own. Rows move with their group or parameter; a new one starts
        at the initial state. The state keeps its address unless its size changes.
        """
        theirs = [group.get(KEY) for group in param_groups]
        keys = scale_keys(param_groups, scale_per)
        same = keys == self.keys and len(theirs) == len(self._views)
        if same and all(mine is other for mine, other in zip(self._views, theirs, strict=True)):
            return
        width = self.state.shape[1]
        if scale_per == "model":
            # Where one is ours already, the others are of groups that were left out meanwhile.
            for other in () if any(other is self.state for other in theirs) else theirs:
                if other is not None and other.shape[1] == width:
                    self.state.copy_(other)
                    break
            spans = [(0, 1)] * len(param_groups)
        else:
            sizes = [1 if scale_per == "group" else len(group["params"]) for group in param_groups]
            ends = list(accumulate(sizes))
            spans = list(zip([0, *ends[:-1]], ends, strict=True))
            self._rearrange(keys, spans, theirs, scale_per)
        # One tensor for all groups: wrappers and checkpoints then keep it one.
        self._views = [self.state if scale_per == "model" else self.state[a:b] for a, b in spans]
        for group, view in zip(param_groups, self._views, strict=True):
            group[KEY] = view

    def _rearrange(
        self,
        keys: list[Hashable],
        spans: list[tuple[int, int]],
        theirs: list[Tensor | None],
        scale_per: str,
    ) -> None:
        """Rebuild the rows: from the group where it has them, otherwise by parameter."""
        old = {key: row for row, key in enumerate(self.keys)}
        state = self._initial(len(keys)).to(self.device)
        for (a, b), rows in zip(spans, theirs, strict=True):
            if rows is not None and rows.shape == state[a:b].shape:
                state[a:b] = rows
            elif scale_per == "parameter":
                for row in range(a, b):
                    if keys[row] in old:
                        state[row] = self.state[old[keys[row]]]
        if self._views:
            # The counters of the run are in the first row, whichever that is.
            self._counters_of(state)[:1] = self.counters[:1]
        if keys == self.keys:
            self.state.copy_(state)
        else:
            self.keys, self.state = keys, state
