"""The tuners' options: the variants, their defaults, range checks, and names that were renamed."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

from .backends.layout import MOST_SCALE, REFERENCE_EVERY

BETAS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)

S_DECAY, TUNER_EPS = 0.01, 1e-8

SCALE_PER = ("model", "group", "parameter")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Variant:
    """One exact form of Mechanic, as the constants of its tuner.

    Args:
        s_init: the initial scale where the user gives none.
        s_starts_at_init: s starts at s_init for each tuner beta instead of 0.
        m_start: the initial running maximum of |h|.
        eps_in_m: m = max(β·m, |h| + ε) instead of max(β·m, |h|).
        clamps_h: the reward uses clamp(h, −m_prev, +m_prev) instead of h.
        floors_r: r is stored as max(0, r).
        per_peak_lr: λ and ε are per unit of the peak lr, so that the base's lr does not matter.
        anneals: s moves by lr/(peak lr) of its update, so that weights come to rest with the
            schedule.
    """

    s_init: float | str
    s_starts_at_init: bool
    m_start: float
    eps_in_m: bool
    clamps_h: bool
    floors_r: bool
    per_peak_lr: bool = False
    anneals: bool = False


AUTO = "auto"
"""The s_init that is calibrated from norms at the first step that changes Δ."""

ANNEALED = "annealed"
"""The default of 0.1."""

VARIANTS = {
    "optax": Variant(1e-6, True, 0.0, True, True, False),
    "paper": Variant(1e-8, False, 0.0, False, False, True),
    "pytorch": Variant(1e-8, False, 1e-6, False, False, True),
    # optax's constants, independent of the unit of lr, with S annealed by the schedule.
    ANNEALED: Variant(AUTO, True, 0.0, True, True, False, per_peak_lr=True, anneals=True),
}

RUNNING = "running"
"""The variant without a bettor: x ← x + S·u, with ln S moved by the log tuner."""

LOG_TUNING: dict[str, float] = {
    "norm_share": 0.46,
    "anchor_share": 1 / 13,
    "loss_range": 30.0,
    "least_rms": 0.02,
    "average": 10,
    "held": 10,
    "gain": 3.0,
    "max_move": 0.03,
    "bias": 0.25,
    "outlier": 10.0,
    "memory": 4,
    "ceiling": 6.0,
    "norm_ceiling": 2.0,
    "regrowth": 2.0,
}
"""The constants of the log tuner, see ``formulas.log_tune_row``; docs/decisions.md says how they
were chosen."""

FIRST_UPDATE_NORM = 1e-4
"""With s_init="auto": ‖S·u‖ of the first update at the peak lr, as a fraction of ‖x‖."""

ZERO_WEIGHT_RMS = 1e-2
"""The root mean square assumed for weights that are all 0, whose norm says nothing."""

UNCALIBRATED = 1e-6
"""The s_init used until "auto" has been calibrated; no scale is learned before."""

USER_OPTIONS = ("variant", "s_init", "s_decay", "tuner_betas", "tuner_eps")
"""The tuner's options that users give."""

GROUP_OPTIONS = (*USER_OPTIONS, "tune_scale", "max_peak_lr")
"""The tuner's options in every param group, where checkpoints find them. ``tune_scale`` is False
while the scale is frozen; ``max_peak_lr`` is the largest peak lr of all groups."""

CALIBRATED = ("s_init", "max_peak_lr")
"""The options that the start of a run replaces."""

OPTIM_BITS = "optim_bits"
"""The option in param groups that says in how many bits the base's state is kept; without it 32."""

X_REF_EVERY = "x_ref_every"
"""The option in the param groups of the running form, where checkpoints find it."""

STATE_DTYPES = (None, "param")
DELTA_DTYPES = (None, torch.bfloat16)
X_REF_SHARES = (1, REFERENCE_EVERY)
BITS = (32, 16, 8)


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """Return an option as a float.

    Args:
        name: the option's name.
        value: what was given.
        low, high: the range; infinite bounds are no bounds.
        above, below: exclude ``low``, ``high``.

    Raises:
        ValueError: unless the value is a finite number in the range.
    """
    if isinstance(value, int | float) and math.isfinite(value):
        fits_low = value > low if above else value >= low
        fits_high = value < high if below else value <= high
        if fits_low and fits_high:
            return float(value)
    bounds = []
    if low > -math.inf:
        bounds.append(f"above {low:g}" if above else f"of {low:g} or more")
    if high < math.inf:
        bounds.append(f"below {high:g}" if below else f"of {high:g} or less")
    range_text = "".join(f" {text}" for text in (" and ".join(bounds),) if text)
    raise ValueError(f"{name} must be a finite number{range_text}, got {value!r}")


def integer(name: str, value: Any, low: int) -> int:
    """Return an option as an int.

    Raises:
        ValueError: unless the value is an int, not a bool, of ``low`` or more.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of {low} or more, got {value!r}")
    return value


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Return an option that must be one of a few values.

    Raises:
        ValueError: for any other value.
    """
    if not any(value is each or (isinstance(value, str) and value == each) for each in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def resolve_variant(variant: str | None, *exact_options: Any) -> str:
    """Return the variant that None stands for: the running form, or 0.1's where it is meant.

    Args:
        exact_options: what was given for options that only the exact forms have.
    """
    if variant is not None:
        return variant
    return RUNNING if all(option is None for option in exact_options) else ANNEALED


def tuner_options(
    variant: str | None,
    s_init: float | str | None = None,
    s_decay: float | None = None,
    tuner_betas: Sequence[float] | None = None,
    tuner_eps: float | None = None,
) -> dict[str, Any]:
    """Return the entries that the tuner adds to a param group; None: the variant's own.

    Raises:
        ValueError: for the first option that is out of range, or that the variant does not have.
    """
    variant = resolve_variant(variant, s_decay, tuner_betas, tuner_eps)
    one_of("variant", variant, (*VARIANTS, RUNNING))
    if variant == RUNNING:
        given = {"s_decay": s_decay, "tuner_betas": tuner_betas, "tuner_eps": tuner_eps}
        for name, value in given.items():
            if value is not None:
                exact = ", ".join(map(repr, VARIANTS))
                raise ValueError(
                    f"{name} belongs to the exact forms: expected None with variant={variant!r}, "
                    f"or a variant out of {exact}, got {value!r}"
                )
    else:
        s_decay = S_DECAY if s_decay is None else s_decay
        tuner_betas = BETAS if tuner_betas is None else tuner_betas
        tuner_eps = TUNER_EPS if tuner_eps is None else tuner_eps
    if s_init is None:
        s_init = AUTO if variant == RUNNING else VARIANTS[variant].s_init
    if s_init != AUTO:
        try:
            s_init = number("s_init", s_init, 0, MOST_SCALE, above=True)
        except ValueError:
            raise ValueError(
                f's_init must be "auto" or a finite number above 0, at most {MOST_SCALE:g}, '
                f"got {s_init!r}"
            ) from None
    return {
        "variant": variant,
        "s_init": s_init,
        "s_decay": s_decay if s_decay is None else number("s_decay", s_decay, 0),
        "tuner_betas": tuner_betas if tuner_betas is None else _betas(tuner_betas),
        "tuner_eps": tuner_eps
        if tuner_eps is None
        else number("tuner_eps", tuner_eps, 0, above=True),
        "tune_scale": True,
        "max_peak_lr": 0.0,
    }


def _betas(given: Sequence[float]) -> tuple[float, ...]:
    try:
        betas = tuple(float(beta) for beta in given)
    except (TypeError, ValueError):
        betas = ()
    if not betas or not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"tuner_betas must be a list of numbers in (0, 1), got {given!r}")
    return betas


def options_of_groups(params: Any) -> dict[str, Any]:
    """Return the tuner's options that param groups carry, as ``opt.param_groups`` do; or none.

    Wrappers construct optimizers by ``type(opt)(opt.param_groups)``, as torch's own allow.
    """
    groups = [] if torch.is_tensor(params) else params
    groups = [with_new_group_keys(group) for group in groups if isinstance(group, dict)]
    first: dict[str, Any] = next((g for g in groups if "variant" in g), {})
    return {name: first[name] for name in USER_OPTIONS if first.get(name) is not None}


def checked_x_ref_every(value: Any, variant: str) -> int:
    """Return ``x_ref_every``, or raise ValueError."""
    one_of(X_REF_EVERY, value, X_REF_SHARES)
    if value != 1 and variant != RUNNING:
        raise ValueError(
            f"{X_REF_EVERY} must be 1 with variant={variant!r}, where x = x_ref + S·Δ needs all "
            f"of x_ref; expected variant='running', got {value!r}"
        )
    return int(value)


def checked_optim_bits(value: Any, state_dtype: str | None, fallback_reason: str | None) -> int:
    """Return ``optim_bits``, or raise ValueError."""
    one_of(OPTIM_BITS, value, BITS)
    if value != 32 and state_dtype is not None:
        raise ValueError(
            f"{OPTIM_BITS} says how the base's state is kept: expected state_dtype=None beside "
            f"{OPTIM_BITS}={value}, got {state_dtype!r}"
        )
    if value != 32 and fallback_reason:
        raise ValueError(
            f"{OPTIM_BITS}={value} needs a fused update, since a base keeps its own state as it "
            f"likes: expected {OPTIM_BITS}=32, got {fallback_reason}"
        )
    return int(value)


def checked_stochastic_round(value: Any, variant: str, optim_bits: int) -> bool:
    """Return ``bf16_stochastic_round``, or raise ValueError."""
    one_of("bf16_stochastic_round", value, (True, False))
    if value and variant != RUNNING:
        raise ValueError(
            f"bf16_stochastic_round must be False with variant={variant!r}, where x is made of "
            f"x_ref + S·Δ, which lose nothing; expected variant='running', got {value!r}"
        )
    if value and optim_bits == 32:
        raise ValueError(
            "bf16_stochastic_round rounds weights whose state is narrow: expected optim_bits=16 or "
            f"8 beside it, got {optim_bits}"
        )
    return bool(value)


def with_own_optim_bits(
    saved: list[dict[str, Any]], own: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return a checkpoint's groups with the optimizer's own ``optim_bits``."""
    found = [{k: v for k, v in theirs.items() if k != OPTIM_BITS} for theirs in saved]
    for theirs, mine in zip(found, own, strict=False):
        if OPTIM_BITS in mine:
            theirs[OPTIM_BITS] = mine[OPTIM_BITS]
    return found


def with_own_x_ref_every(
    saved: list[dict[str, Any]], own: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return a checkpoint's groups with the optimizer's own ``x_ref_every``.

    Raises:
        ValueError: where x_ref was kept in part and is to be whole.
    """
    found = list(saved)
    for i, (theirs, mine) in enumerate(zip(saved, own, strict=False)):
        was, wanted = theirs.get(X_REF_EVERY, 1), mine.get(X_REF_EVERY, 1)
        if was > wanted:
            raise ValueError(
                f"the checkpoint lacks most of x_ref: expected {X_REF_EVERY}={was} for param group "
                f"{i}, got {wanted}"
            )
        found[i] = {**theirs, X_REF_EVERY: wanted}
    return found


def max_norm(value: float | None) -> float | None:
    """Return ``max_grad_norm``, or raise ValueError."""
    if value is None:
        return None
    try:
        number("max_grad_norm", value, 0, above=True)
    except ValueError:
        raise ValueError(
            f"max_grad_norm must be None or a finite number above 0, got {value!r}"
        ) from None
    return value


def awaits_calibration(param_groups: list[dict[str, Any]]) -> bool:
    """Return whether s_init is "auto", in an exact form, and no step has changed Δ so far."""
    return any(g["s_init"] == AUTO and g["variant"] != RUNNING for g in param_groups)


def calibrate(param_groups: list[dict[str, Any]], x_norm: float, d_norm: float) -> None:
    """Set s_init = c·‖x‖/‖lr₀·d₁‖ in every group, c = FIRST_UPDATE_NORM.

    Args:
        param_groups: the optimizer's own.
        x_norm: ‖x‖ over all weights.
        d_norm: ‖lr₀·d₁‖, the norm of the base's first update at the peak lr, for S = 1.
    """
    for group in param_groups:
        group["s_init"] = min(FIRST_UPDATE_NORM * x_norm / d_norm, MOST_SCALE)


RENAMED_KEYWORDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "scale": ("scale_per", lambda value: "model" if value == "global" else value),
    "narrow_state": ("state_dtype", lambda value: "param" if value else None),
    "narrow_delta": ("delta_dtype", lambda value: torch.bfloat16 if value else None),
}
"""Keyword of 0.1 → the keyword of today, and how its value translates."""

RENAMED_VARIANTS = {"scaled": "annealed"}

RENAMED_GROUP_KEYS = {
    "mechanic": "mechanic_state",
    "rate": "max_peak_lr",
    "learning": "tune_scale",
}
"""Entry of a param group of 0.1 → its name today."""


def accepts_old_names(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function take the keywords of 0.1, with a warning that names the new ones."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **_with_new_names(kwargs))

    return wrapper


def _with_new_names(given: dict[str, Any]) -> dict[str, Any]:
    if given.keys().isdisjoint(RENAMED_KEYWORDS) and given.get("variant") not in RENAMED_VARIANTS:
        return given
    named = dict(given)
    for old, (new, translate) in RENAMED_KEYWORDS.items():
        if old not in named:
            continue
        value = named.pop(old)
        if new in named:
            raise TypeError(f"{old} is the former name of {new}: expected one of them, got both")
        if old.startswith("narrow") and not isinstance(value, bool):
            raise ValueError(f"{old} must be True or False, got {value!r}")
        named[new] = translate(value)
        warn_renamed(f"{old}={value!r}", f"{new}={named[new]!r}")
    if named.get("variant") in RENAMED_VARIANTS:
        new = RENAMED_VARIANTS[named["variant"]]
        warn_renamed(f"variant={named['variant']!r}", f"variant={new!r}")
        named["variant"] = new
    return named


def warn_renamed(old: str, new: str, stacklevel: int = 4) -> None:
    """Warn that an old spelling will be removed in the next release.

    Args:
        old, new: the spellings.
        stacklevel: as of ``warnings.warn``; the warning is shown for the line of the caller.
    """
    warnings.warn(
        f"{old} is deprecated and will be removed in the next release: use {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def with_new_group_keys(group: dict[str, Any]) -> dict[str, Any]:
    """Return a param group, of a checkpoint perhaps, under today's names; a new dict if renamed."""
    variant = group.get("variant")
    if group.keys().isdisjoint(RENAMED_GROUP_KEYS) and variant not in RENAMED_VARIANTS:
        return group
    named = {RENAMED_GROUP_KEYS.get(key, key): value for key, value in group.items()}
    if variant in RENAMED_VARIANTS:
        named["variant"] = RENAMED_VARIANTS[variant]
    return named
