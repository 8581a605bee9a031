"""The tuner's state, and how it lies in ``param_groups``."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .options import AUTO, CHECKED, OPTIONS, UNCALIBRATED, VARIANTS, checked_options

KEY = "mechanic"
"""The entry of every param group that holds the tuner's state (or the group's rows of it)."""

SCALES = ("global", "group", "parameter")

PACE = 7
"""The place of the pace among Tuner.constants."""

LIVE = -1.0
"""Stands for a pace that only the device knows."""

STALE_IN_CAPTURE = (
    "hyperparameters changed since the last step outside the graph: call "
    "opt.refresh_hyperparameters() before the capture"
)


def check_scale(scale: str) -> None:
    """Raise ValueError unless ``scale`` is one of SCALES."""
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")


def scale_keys(param_groups: list[dict[str, Any]], scale: str) -> list[Hashable]:
    """Return what each scale belongs to: everything, a group's number, or a weight's id."""
    if scale == "global":
        return ["global"]
    if scale == "group":
        return list(range(len(param_groups)))
    return [id(p) for group in param_groups for p in group["params"]]


def check_saved(
    saved: list[dict[str, Any]], param_groups: list[dict[str, Any]], scale: str
) -> None:
    """Raise ValueError if saved groups hold another kind of scale than the optimizer has."""
    tensors = [group[KEY] for group in saved if KEY in group]
    for found in tensors:
        if not torch.is_tensor(found):
            raise ValueError(
                f"the tuner's state must be a tensor, got a {type(found).__name__}: with FSDP1 and "
                "broadcast_from_rank0 torch hands the other ranks a description of it; load the "
                "full state dict on every rank instead"
            )
    for theirs, group in zip(tensors, param_groups, strict=False):
        rows = len(group["params"]) if scale == "parameter" else 1
        if len(theirs) != rows:
            raise ValueError(
                f"the checkpoint must be of an optimizer with scale={scale!r}: expected {rows} "
                f"scales for a group of {len(group['params'])} parameters, got {len(theirs)}"
            )
    if scale == "global" and not all(torch.equal(t, tensors[0]) for t in tensors):
        raise ValueError(
            "the checkpoint must be of an optimizer with scale='global', got groups that have "
            "learned different scales"
        )


class Tuner:
    """The numbers that learn S: one row a scale, float64, on one device.

    ``state`` has a row for each scale and the columns s, r, v, m (n betas each), then the counters
    ``steps`` and ``nonfinite``. ``constants`` is what a kernel reads beside it:
    (s_decay, s_init, ε, ε in m, clamp, floor, learning, pace, β₁ … βₙ), where pace is the part of
    its move that s takes.

    Args:
        keys: what each row belongs to: one constant for a global scale, a group's number, or a
            weight's id. Rows are found again by their key when the list changes.
        options: the entries named in OPTIONS.
        device: where the state lives: the device of the sums.
    """

    def __init__(self, keys: list[Hashable], options: dict[str, Any], device: torch.device) -> None:
        self.keys = keys
        self.device = device
        self.options: tuple[Any, ...] = ()
        self._betas: tuple[float, ...] = ()
        self.constants = torch.empty(0)
        self._numbers: list[float] = []
        self._sent: list[float] = []
        self.set_options(options)
        self.state = self._initial(len(keys))
        self.found_inf: Tensor | None = None
        self._views: list[Tensor] = []

    @property
    def betas(self) -> tuple[float, ...]:
        return self._betas

    @property
    def counters(self) -> Tensor:
        """(scales, 2): steps taken, and (in the first row) steps with non-finite sums."""
        return self.state[:, 4 * len(self._betas) :]

    def _block(self, index: int) -> Tensor:
        n = len(self._betas)
        return self.state[:, index * n : (index + 1) * n]

    @property
    def s(self) -> Tensor:
        return self._block(0)

    @property
    def r(self) -> Tensor:
        return self._block(1)

    @property
    def v(self) -> Tensor:
        return self._block(2)

    @property
    def m(self) -> Tensor:
        return self._block(3)

    def scale(self, rows: Tensor | None = None) -> Tensor:
        """Return S = Σ s of all scales or of some rows, (scales,), a new tensor.

        Added in the order of the betas, as the kernels add them.
        """
        s = (self.state if rows is None else rows)[:, : len(self._betas)]
        return reduce(torch.add, s.unbind(1)).clone()

    def set_options(self, options: dict[str, Any]) -> None:
        """Take the options as they stand in a param group; writes to the device if they changed.

        Raises:
            ValueError: for a bad option, or another number of betas than the state has.
        """
        now = tuple(options[name] for name in OPTIONS)
        if now == self.options:
            self._send()
            return
        checked_options(**{name: options[name] for name in CHECKED})
        if self._betas and len(options["tuner_betas"]) != len(self._betas):
            raise ValueError(
                f"tuner_betas must stay {len(self._betas)} numbers in the course of a run, "
                f"got {options['tuner_betas']}"
            )
        variant = VARIANTS[options["variant"]]
        self.options = now
        self._variant = variant
        self._s_init = UNCALIBRATED if options["s_init"] == AUTO else options["s_init"]
        # A base that knows no lr, or an lr of 0 so far, leaves λ and ε as they are.
        rate = (options["rate"] if variant.per_rate else 1.0) or 1.0
        self._betas = tuple(options["tuner_betas"])
        numbers = (
            options["s_decay"] * rate,
            self._s_init,
            options["tuner_eps"] * rate,
            variant.eps_in_m,
            variant.clamps_h,
            variant.floors_r,
            options["learning"],
            1.0,
            *self._betas,
        )
        self._numbers = [float(number) for number in numbers]
        self._send()

    def set_pace(self, pace: float | Tensor) -> None:
        """Let s take this part of its moves; writes to the device if it changed."""
        if torch.is_tensor(pace):
            self.constants[PACE].copy_(pace, non_blocking=True)
            # Whatever number comes next differs from what the device has.
            self._numbers[PACE] = self._sent[PACE] = LIVE
        else:
            self._numbers[PACE] = float(pace)
            self._send()

    def begin(self) -> None:
        """Put s to s_init where the variant starts there: s_init is known only now."""
        if self._variant.s_starts_at_init:
            self.s.fill_(self._s_init / len(self._betas))

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
        """Return this tuner, or a copy of what ``apply`` reads of it on another device."""
        if device == self.device:
            return self
        there = copy.copy(self)
        there.device = device
        there.state, there.constants = self.state.to(device), self.constants.to(device)
        if self.found_inf is not None:
            there.found_inf = self.found_inf.to(device, non_blocking=True)
        return there

    def reset(self) -> None:
        """Put every row back to where the variant starts."""
        self.state.copy_(self._initial(len(self.keys)))

    def follow(self, param_groups: list[dict[str, Any]], scale: str) -> None:
        """Take over what stands in the groups, then keep in step with their number and members.

        ``param_groups`` is where checkpoints and sharding wrappers look, so what they have put
        there in place of our own tensor is the truth. Rows move with their group or weight, and a
        new one starts at the beginning. The state keeps its address unless its size changes.
        """
        theirs = [group.get(KEY) for group in param_groups]
        keys = scale_keys(param_groups, scale)
        same = keys == self.keys and len(theirs) == len(self._views)
        if same and all(mine is other for mine, other in zip(self._views, theirs, strict=True)):
            return
        width = self.state.shape[1]
        if scale == "global":
            for other in theirs:
                if other is not None and other is not self.state and other.shape[1] == width:
                    self.state.copy_(other)
                    break
            spans = [(0, 1)] * len(param_groups)
        else:
            sizes = [1 if scale == "group" else len(group["params"]) for group in param_groups]
            ends = list(accumulate(sizes))
            spans = list(zip([0, *ends[:-1]], ends, strict=True))
            self._rearrange(keys, spans, theirs, scale)
        # One tensor for all with a global scale: wrappers and checkpoints keep it one.
        self._views = [self.state if scale == "global" else self.state[a:b] for a, b in spans]
        for group, view in zip(param_groups, self._views, strict=True):
            group[KEY] = view

    def _rearrange(
        self,
        keys: list[Hashable],
        spans: list[tuple[int, int]],
        theirs: list[Tensor | None],
        scale: str,
    ) -> None:
        """Lay the rows out anew: a group's as they stand in it, or else by weight."""
        old = {key: row for row, key in enumerate(self.keys)}
        state = self._initial(len(keys))
        for (a, b), rows in zip(spans, theirs, strict=True):
            if rows is not None and rows.shape == state[a:b].shape:
                state[a:b] = rows
            elif scale == "parameter":
                for row in range(a, b):
                    if keys[row] in old:
                        state[row] = self.state[old[keys[row]]]
        if self._views:
            # The run's own counters stand in the first row, whichever that is.
            state[:1, 4 * len(self._betas) :] = self.counters[:1]
        if keys == self.keys:
            self.state.copy_(state)
        else:
            self.keys, self.state = keys, state

    def _initial(self, rows: int) -> Tensor:
        n = len(self._betas)
        state = torch.zeros(rows, 4 * n + 2, dtype=torch.float64)
        if self._variant.s_starts_at_init:
            # Where all of s moves in the first step, that takes it from s_init to s_init/n.
            state[:, :n] = self._s_init / (n if self._variant.anneals else 1)
        state[:, 3 * n : 4 * n] = self._variant.m_start
        return state.to(self.device)
