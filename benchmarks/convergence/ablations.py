"""What each part of Mechanic is worth: the default, with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

from mechanic_fused import tuner

Change = Callable[[], AbstractContextManager[Any]]


def _constants(variant: str, **constants: Any) -> Change:
    """Another row of constants under a variant's name, for as long as a run lasts."""
    row = replace(tuner.VARIANTS[variant], **constants)
    return partial(patch.dict, tuner.VARIANTS, {variant: row})


def _start(c: float) -> Change:
    return partial(patch.object, tuner, "START", c)


ARMS: dict[str, tuple[dict[str, Any], Change | None]] = {
    "optax": ({"variant": "optax", "s_init": 1e-6}, None),
    **{
        f"c={c:g}": ({"variant": "scaled"}, _start(c)) for c in (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    },
}
