"""Ablations: Mechanic's defaults with one thing changed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from mechanic_fused import options

from .methods import BASES

Arm = tuple[dict[str, Any], AbstractContextManager[Any]]
"""(options of the optimizer, what else to change while it trains)."""

DEFAULT = "annealed"


def _given(**chosen: Any) -> Arm:
    """The default with other options."""
    return chosen, nullcontext()


def _constants(**constants: Any) -> Arm:
    """The default with other constants during a run."""
    row = replace(options.VARIANTS[DEFAULT], **constants)
    return {}, patch.dict(options.VARIANTS, {DEFAULT: row})


def _start(c: float) -> Arm:
    """The default with another factor in s_init."""
    return {}, patch.object(options, "FIRST_UPDATE_NORM", c)


ALL, ONE = tuple(BASES), ("AdamW",)

ARMS: dict[str, tuple[tuple[str, ...], Arm]] = {
    "default": (ALL, _given()),
    "variant optax": (ALL, _given(variant="optax")),
    "not annealed": (ALL, _constants(anneals=False)),
    "c=1e-5": (ALL, _start(1e-5)),
    "c=1e-3": (ALL, _start(1e-3)),
    "variant paper": (ONE, _given(variant="paper")),
    "variant pytorch": (ONE, _given(variant="pytorch")),
    "λ=0": (ONE, _given(s_decay=0.0)),
    "λ=0.1": (ONE, _given(s_decay=0.1)),
    "h not clamped": (ONE, _constants(clamps_h=False)),
    "r floored": (ONE, _constants(floors_r=True)),
    "3 betas": (ONE, _given(tuner_betas=(0.9, 0.999, 0.99999))),
    "1 beta": (ONE, _given(tuner_betas=(0.999999,))),
    "scale a group": (ONE, _given(scale_per="group")),
    "scale a parameter": (ONE, _given(scale_per="parameter")),
}
"""Each arm with the bases that it is run with."""
