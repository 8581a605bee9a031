"""What each part of Mechanic is worth: the default, with one thing changed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from .methods import BASES

Arm = tuple[dict[str, Any], AbstractContextManager[Any]]
"""(options of the optimizer, what else is changed while it trains)."""

DEFAULT = "scaled"


def _options(**options: Any) -> Arm:
    return options, nullcontext()


def _constants(**constants: Any) -> Arm:
    """The default with other constants, for as long as a run lasts."""
    row = replace(options.VARIANTS[DEFAULT], **constants)
    return {}, patch.dict(options.VARIANTS, {DEFAULT: row})


def _start(c: float) -> Arm:
    return {}, patch.object(options, "START", c)


ALL, ONE = tuple(BASES), ("AdamW",)

ARMS: dict[str, tuple[tuple[str, ...], Arm]] = {
    "default": (ALL, _options()),
    "variant optax": (ALL, _options(variant="optax")),
    "not annealed": (ALL, _constants(anneals=False)),
    "c=1e-5": (ALL, _start(1e-5)),
    "c=1e-3": (ALL, _start(1e-3)),
    "variant paper": (ONE, _options(variant="paper")),
    "variant pytorch": (ONE, _options(variant="pytorch")),
    "λ=0": (ONE, _options(s_decay=0.0)),
    "λ=0.1": (ONE, _options(s_decay=0.1)),
    "h not clamped": (ONE, _constants(clamps_h=False)),
    "r floored": (ONE, _constants(floors_r=True)),
    "3 betas": (ONE, _options(tuner_betas=(0.9, 0.999, 0.99999))),
    "1 beta": (ONE, _options(tuner_betas=(0.999999,))),
    "scale a group": (ONE, _options(scale="group")),
    "scale a parameter": (ONE, _options(scale="parameter")),
}
"""Each arm with the bases that it is tried on."""
