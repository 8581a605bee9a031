"""Which base optimizers have a fused update: class → its formula, its state, its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .backends.layout import MUON, STATES
from .lion import Lion
from .muon import Muon, hyper_of_group
from .options import RUNNING

Group = dict[str, Any]


@dataclass(frozen=True)
class FusedBase:
    """A base optimizer with a fused update.

    Args:
        kind: group → the name of its fused update, one of ``layout.KINDS``, or ``layout.MUON``.
        hyper: group → the first seven numbers of ``layout.HYPER``; lr may be a tensor.
        allowed: option → the values for which the fused update is right.
        state_names: the names of the base's own state.
    """

    kind: Callable[[Group], str]
    hyper: Callable[[Group], tuple[Any, ...]]
    allowed: dict[str, tuple[Any, ...]]
    state_names: tuple[str, ...]

    def unsupported_option(self, group: Group) -> str | None:
        """Return which option of a group has no fused update, or None."""
        for option, values in self.allowed.items():
            value = group.get(option)
            if value not in values:
                return f"{option}={value} has no fused update"
        return None


def _adam(group: Group) -> tuple[Any, ...]:
    beta1, beta2 = group["betas"]
    decay = group["weight_decay"]
    l2 = 0.0 if group.get("decoupled_weight_decay") else decay
    return group["lr"], beta1, beta2, group["eps"], l2, decay - l2, False


def _sgd(group: Group) -> tuple[Any, ...]:
    momentum, dampening = group["momentum"], group["dampening"]
    return group["lr"], momentum, dampening, 0.0, group["weight_decay"], 0.0, group["nesterov"]


def _lion(group: Group) -> tuple[Any, ...]:
    beta1, beta2 = group["betas"]
    return group["lr"], beta1, beta2, 0.0, 0.0, group["weight_decay"], False


_ADAM_STATE = ("step", *STATES["adam"])

TABLE: dict[type, FusedBase] = {
    torch.optim.AdamW: FusedBase(lambda group: "adam", _adam, {"amsgrad": (False,)}, _ADAM_STATE),
    torch.optim.Adam: FusedBase(lambda group: "adam", _adam, {"amsgrad": (False,)}, _ADAM_STATE),
    torch.optim.SGD: FusedBase(
        lambda group: "momentum" if group["momentum"] else "sgd", _sgd, {}, STATES["momentum"]
    ),
    Lion: FusedBase(lambda group: "lion", _lion, {}, STATES["lion"]),
    Muon: FusedBase(
        lambda group: MUON if group["use_muon"] else "adam",
        hyper_of_group,
        {"variant": (RUNNING, None)},
        (*_ADAM_STATE, *STATES[MUON]),
    ),
}
"""Exact classes only: a subclass may step otherwise."""


def fallback_reason(base: type, param_groups: list[Group]) -> str | None:
    """Return why a base has no fused update for these groups, or None if it has."""
    fused = TABLE.get(base)
    if fused is None:
        return f"{base.__name__} has no fused update"
    return next(filter(None, map(fused.unsupported_option, param_groups)), None)
