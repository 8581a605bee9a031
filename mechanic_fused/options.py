"""The tuner's options: the variants as rows of constants, and s_init as a run finds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)


@dataclass(frozen=True)
class Variant:
    """One published form of Mechanic, as a row of constants.

    Args:
        s_init: the variant's own initial scale, used when the user gives none.
        s_starts_at_init: s is s_init for each beta at the start, otherwise 0.
        m_start: the running maximum of |h| at the start.
        eps_in_m: m = max(β·m, |h| + ε) instead of max(β·m, |h|).
        clamps_h: the reward sees clamp(h, −m_prev, +m_prev) instead of h.
        floors_r: r is stored as max(0, r).
        per_rate: λ and ε are per unit of the peak lr, so that the lr does not matter at all.
        anneals: s takes lr/(peak lr) of each move, so that weights come to rest with the schedule.
    """

    s_init: float | str
    s_starts_at_init: bool
    m_start: float
    eps_in_m: bool
    clamps_h: bool
    floors_r: bool
    per_rate: bool = False
    anneals: bool = False


AUTO = "auto"
"""The s_init that is taken from norms at the first step that moves Δ."""

VARIANTS = {
    "optax": Variant(1e-6, True, 0.0, True, True, False),
    "paper": Variant(1e-8, False, 0.0, False, False, True),
    "pytorch": Variant(1e-8, False, 1e-6, False, False, True),
    # Ours: optax's constants, but the lr's units do not matter, and its schedule tames S too.
    "scaled": Variant(AUTO, True, 0.0, True, True, False, per_rate=True, anneals=True),
}

START = 1e-4
"""What s_init="auto" lets the first update at the peak lr be, in norms of the weights."""

ZERO_WEIGHT = 1e-2
"""The root mean square that stands for the weights' where they are all 0."""

UNCALIBRATED = 1e-6
"""The s_init until there is a Δ to take it from; nothing has been learned by then."""

CHECKED = ("variant", "s_init", "s_decay", "tuner_betas", "tuner_eps")
"""The options that users give."""

OPTIONS = (*CHECKED, "learning", "rate")
"""The tuner's options as they stand in every param group, so that a checkpoint carries them.
``rate`` is the largest lr of the run, as far as it is known; only a variant that is per_rate reads
it."""

STARTED = ("s_init", "rate")
"""The options that a run's start replaces."""


def checked_options(
    variant: str,
    s_init: float | str | None,
    s_decay: float,
    tuner_betas: Sequence[float],
    tuner_eps: float,
) -> dict[str, Any]:
    """Return the tuner's options as plain numbers, or raise ValueError for the first bad one."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    s_init = VARIANTS[variant].s_init if s_init is None else s_init
    try:
        betas = tuple(float(beta) for beta in tuner_betas)
    except (TypeError, ValueError):
        betas = ()
    if not betas or not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"tuner_betas must be a list of numbers in (0, 1), got {tuner_betas!r}")
    if s_init != AUTO and not (_is_number(s_init) and float(s_init) > 0):
        raise ValueError(f's_init must be "auto" or a finite number above 0, got {s_init!r}')
    if not (_is_number(tuner_eps) and tuner_eps > 0):
        raise ValueError(f"tuner_eps must be a finite number above 0, got {tuner_eps!r}")
    if not (_is_number(s_decay) and s_decay >= 0):
        raise ValueError(f"s_decay must be a finite number, 0 or more, got {s_decay!r}")
    return {
        "variant": variant,
        "s_init": s_init if s_init == AUTO else float(s_init),
        "s_decay": float(s_decay),
        "tuner_betas": betas,
        "tuner_eps": float(tuner_eps),
        "learning": True,
        "rate": 0.0,
    }


def needs_start(param_groups: list[dict[str, Any]]) -> bool:
    """Return whether ``start`` has still to be called: no step has moved Δ so far."""
    return any(group["s_init"] == AUTO for group in param_groups)


def start(param_groups: list[dict[str, Any]], x_norm: float, d_norm: float) -> None:
    """Set s_init = c·‖x‖/‖lr₀·d₁‖ in every group.

    Args:
        param_groups: the optimizer's own.
        x_norm: of all weights.
        d_norm: of what the base adds to Δ in a step at the peak lr, at S = 1.
    """
    for group in param_groups:
        group["s_init"] = START * x_norm / d_norm


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
