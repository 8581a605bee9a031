"""Ablations: Mechanic's defaults with one thing changed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

from mechanic_fused import options

from .methods import BASES

Arm = tuple[dict[str, Any], AbstractContextManager[Any]]
"""(options of the optimizer, what else to change while it trains)."""


def _given(**chosen: Any) -> Arm:
    """The default with other options."""
    return chosen, nullcontext()


def _constants(**constants: float) -> Arm:
    """The default with other constants of the log tuner during a run."""
    return {}, patch.dict(options.LOG_TUNING, constants)


ALL, ONE = tuple(BASES), ("AdamW",)

ARMS: dict[str, tuple[tuple[str, ...], Arm]] = {
    "default": (ALL, _given()),
    "variant annealed": (ALL, _given(variant="annealed")),
    "variant optax": (ONE, _given(variant="optax")),
    "variant paper": (ONE, _given(variant="paper")),
    "variant pytorch": (ONE, _given(variant="pytorch")),
    "bias 0": (ALL, _constants(bias=0.0)),
    "bias 0.5": (ALL, _constants(bias=0.5)),
    "bias 0.5, gain 1.3": (ALL, _constants(bias=0.5, gain=1.3)),
    "gain 2": (ALL, _constants(gain=2.0)),
    "gain 4": (ALL, _constants(gain=4.0)),
    "max_move 0.01": (ALL, _constants(max_move=0.01)),
    "anchor 1/26": (ALL, _constants(anchor_share=1 / 26)),
    "anchor 2/13": (ALL, _constants(anchor_share=2 / 13)),
    "loss_range 1": (ALL, _constants(loss_range=1.0)),
    "no ceiling": (ALL, _constants(ceiling=1e9, norm_ceiling=1e9)),
    "held 1": (ALL, _constants(held=1)),
    "x_ref of one block in 8": (ALL, _given(x_ref_every=8)),
    "scale a group": (ONE, _given(scale_per="group")),
    "scale a parameter": (ONE, _given(scale_per="parameter")),
}
"""Each arm with the bases that it is run with."""
