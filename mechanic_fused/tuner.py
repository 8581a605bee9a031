"""The tuner's state: s, r, v, m of every scale, and how they are kept in ``param_groups``."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .backends import formulas
from .backends.layout import CONSTANTS, TUNER, tuner_width
from .options import AUTO, GROUP_OPTIONS, UNCALIBRATED, USER_OPTIONS, VARIANTS, tuner_options

KEY = "mechanic_state"
"""The entry of every param group that holds the tuner's state, or the group's rows of it."""

ANNEALING_FACTOR = CONSTANTS.index("annealing_factor")

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


def check_saved(
    saved: list[dict[str, Any]], param_groups: list[dict[str, Any]], scale_per: str
) -> None:
    """Raise ValueError if saved groups have scales for other parts of the model."""
    tensors = [group[KEY] for group in saved if KEY in group]
    for found in tensors:
        if not torch.is_tensor(found):
            raise ValueError(
                f"the tuner's state must be a tensor, got a {type(found).__name__}: with FSDP1 and "
                "broadcast_from_rank0 torch hands the other ranks a description of it; load the "
                "full state dict on every rank instead"
            )
    for theirs, group in zip(tensors, param_groups, strict=False):
        rows = len(group["params"]) if scale_per == "parameter" else 1
        if len(theirs) != rows:
            raise ValueError(
                f"the checkpoint must be of an optimizer with scale_per={scale_per!r}: expected "
                f"{rows} scales for a group of {len(group['params'])} parameters, got {len(theirs)}"
            )
    if scale_per == "model" and not all(torch.equal(t, tensors[0]) for t in tensors):
        raise ValueError(
            "the checkpoint must be of an optimizer with scale_per='model', got groups that have "
            "learned different scales"
        )


class Tuner:
    """The numbers from which S is computed: one row per scale, float64, on one device.

    Attributes:
        state: (scales, 4·betas + 2) float64: the blocks of ``layout.TUNER``, then
            ``layout.COUNTERS``.
        constants: (8 + betas,) float64: ``layout.CONSTANTS``, then the tuner betas.
        betas: the tuner betas.
        keys: what each row belongs to.

    Args:
        keys: see :func:`scale_keys`; rows are found again by their key when the list changes.
        options: a param group, with the entries named in GROUP_OPTIONS.
        device: where the state is kept: the device of the sums.
    """

    def __init__(self, keys: list[Hashable], options: dict[str, Any], device: torch.device) -> None:
        self.keys = keys
        self.device = device
        self.options: tuple[Any, ...] = ()
        self.betas: tuple[float, ...] = ()
        self.constants = torch.empty(0)
        self._numbers: list[float] = []
        self._sent: list[float] = []
        self.set_options(options)
        self.state = self._initial(len(keys))
        self.found_inf: Tensor | None = None
        self._views: list[Tensor] = []

    @property
    def s(self) -> Tensor:
        """(scales, betas), a view of the state."""
        return self._block("s")

    @property
    def r(self) -> Tensor:
        """(scales, betas), a view of the state."""
        return self._block("r")

    @property
    def v(self) -> Tensor:
        """(scales, betas), a view of the state."""
        return self._block("v")

    @property
    def m(self) -> Tensor:
        """(scales, betas), a view of the state."""
        return self._block("m")

    @property
    def counters(self) -> Tensor:
        """(scales, 2), a view of the state: steps, and steps with sums that were not finite."""
        return self.state[:, len(TUNER) * len(self.betas) :]

    def _block(self, name: str) -> Tensor:
        n = len(self.betas)
        first = TUNER.index(name) * n
        return self.state[:, first : first + n]

    def scale(self, rows: Tensor | None = None) -> Tensor:
        """Return S of all scales, or of some rows of a state, (scales,), a new tensor."""
        return formulas.total_scale((self.state if rows is None else rows)[:, : len(self.betas)])

    def set_options(self, group: dict[str, Any]) -> None:
        """Take the options of a param group; writes to the device if they changed.

        Raises:
            ValueError: for an option out of range, or another number of tuner betas than the state
                has.
        """
        now = tuple(group[name] for name in GROUP_OPTIONS)
        if now == self.options:
            self._send()
            return
        tuner_options(**{name: group[name] for name in USER_OPTIONS})
        if self.betas and len(group["tuner_betas"]) != len(self.betas):
            raise ValueError(
                f"tuner_betas must stay {len(self.betas)} numbers in the course of a run, "
                f"got {group['tuner_betas']}"
            )
        variant = VARIANTS[group["variant"]]
        self.options = now
        self._variant = variant
        self._s_init = UNCALIBRATED if group["s_init"] == AUTO else group["s_init"]
        # A base without lr, or an lr that has been 0 so far, leaves λ and ε unscaled.
        peak_lr = (group["max_peak_lr"] if variant.per_peak_lr else 1.0) or 1.0
        self.betas = tuple(group["tuner_betas"])
        constants = {
            "decay": group["s_decay"] * peak_lr,
            "s_init": self._s_init,
            "eps": group["tuner_eps"] * peak_lr,
            "eps_in_m": variant.eps_in_m,
            "clamps_h": variant.clamps_h,
            "floors_r": variant.floors_r,
            "tunes_scale": group["tune_scale"],
            "annealing_factor": 1.0,
        }
        self._numbers = [float(constants[name]) for name in CONSTANTS] + list(self.betas)
        self._send()

    def set_annealing_factor(self, factor: float | Tensor) -> None:
        """Multiply each update of s by this factor; writes to the device if it changed."""
        if torch.is_tensor(factor):
            self.constants[ANNEALING_FACTOR].copy_(factor, non_blocking=True)
            # Any number that comes next differs from the one on the device.
            self._numbers[ANNEALING_FACTOR] = self._sent[ANNEALING_FACTOR] = ON_DEVICE
        else:
            self._numbers[ANNEALING_FACTOR] = float(factor)
            self._send()

    def start_at_s_init(self) -> None:
        """Set s to s_init where the variant starts there: s_init has just been calibrated."""
        if self._variant.s_starts_at_init:
            self.s.fill_(self._s_init / len(self.betas))

    def _send(self) -> None:
        """Write the constants to where kernels read them, if they have changed; never waits."""
        if self._numbers == self._sent:
            return
        numbers = torch.tensor(self._numbers, dtype=torch.float64)
        if self.constants.shape != numbers.shape:
            self.constants = numbers.to(self.device)
        else:
            if self.device.type == "cuda":
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(STALE_IN_CAPTURE)
                numbers = numbers.pin_memory()
            self.constants.copy_(numbers, non_blocking=True)
        self._sent = list(self._numbers)

    def to(self, device: torch.device) -> Tuner:
        """Return this tuner, or what ``apply`` reads of it as a copy on another device."""
        if device == self.device:
            return self
        there = copy.copy(self)
        there.device = device
        there.state, there.constants = self.state.to(device), self.constants.to(device)
        if self.found_inf is not None:
            there.found_inf = self.found_inf.to(device, non_blocking=True)
        return there

    def reset(self) -> None:
        """Set every row to the variant's initial state."""
        self.state.copy_(self._initial(len(self.keys)))

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
            for other in theirs:
                if other is not None and other is not self.state and other.shape[1] == width:
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
        state = self._initial(len(keys))
        for (a, b), rows in zip(spans, theirs, strict=True):
            if rows is not None and rows.shape == state[a:b].shape:
                state[a:b] = rows
            elif scale_per == "parameter":
                for row in range(a, b):
                    if keys[row] in old:
                        state[row] = self.state[old[keys[row]]]
        if self._views:
            # The counters of the run are in the first row, whichever that is.
            state[:1, len(TUNER) * len(self.betas) :] = self.counters[:1]
        if keys == self.keys:
            self.state.copy_(state)
        else:
            self.keys, self.state = keys, state

    def _initial(self, rows: int) -> Tensor:
        n = len(self.betas)
        state = torch.zeros(rows, tuner_width(n), dtype=torch.float64)
        if self._variant.s_starts_at_init:
            # Where s is not annealed, the first step takes it from s_init to s_init/n.
            state[:, :n] = self._s_init / (n if self._variant.anneals else 1)
        m = TUNER.index("m") * n
        state[:, m : m + n] = self._variant.m_start
        return state.to(self.device)
