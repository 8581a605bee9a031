"""The tuner of the exact forms: s, r, v, m of every scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import formulas
from .backends.layout import CONSTANTS, TUNER, tuner_width
from .options import AUTO, GROUP_OPTIONS, UNCALIBRATED, USER_OPTIONS, VARIANTS, tuner_options
from .scale_rows import ScaleRows


class Tuner(ScaleRows):
    """The bettor of arXiv 2306.00144, Algorithm 1.

    Attributes:
        state: (scales, 4·betas + 2) float64: the blocks of ``layout.TUNER``, then
            ``layout.COUNTERS``.
        constants: (8 + betas,) float64: ``layout.CONSTANTS``, then the tuner betas.
        betas: the tuner betas.
    """

    FACTOR = CONSTANTS.index("annealing_factor")

    betas: tuple[float, ...] = ()

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

    def _counters_of(self, state: Tensor) -> Tensor:
        return state[:, len(TUNER) * len(self.betas) :]

    def _block(self, name: str) -> Tensor:
        n = len(self.betas)
        first = TUNER.index(name) * n
        return self.state[:, first : first + n]

    def scale(self, rows: Tensor | None = None) -> Tensor:
        """Return S of all scales, or of some rows of a state, (scales,), a new tensor."""
        return formulas.total_scale((self.state if rows is None else rows)[:, : len(self.betas)])

    def set_options(self, group: dict[str, Any]) -> None:
        """Take the options of a param group; see the base class.

        Raises:
            ValueError: also for another number of tuner betas than the state has.
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

    def start_at_s_init(self) -> None:
        """Set s to s_init where the variant starts there: s_init has just been calibrated."""
        if self._variant.s_starts_at_init:
            self.s.fill_(self._s_init / len(self.betas))

    def _initial(self, rows: int) -> Tensor:
        n = len(self.betas)
        state = torch.zeros(rows, tuner_width(n), dtype=torch.float64, device="cpu")
        if self._variant.s_starts_at_init:
            # Where s is not annealed, the first step takes it from s_init to s_init/n.
            state[:, :n] = self._s_init / (n if self._variant.anneals else 1)
        m = TUNER.index("m") * n
        state[:, m : m + n] = self._variant.m_start
        return state
