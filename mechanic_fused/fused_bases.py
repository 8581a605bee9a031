"""Which optimizers have a fused update: base class → its formula, its state, its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .backends.layout import STATES
from .lion import Lion

Group = dict[str, Any]

@dataclass(frozen=True)
class Base:
    """A base optimizer that the fused road knows.

    Args:
        kind: group → the name of its fused update, one of KINDS.
        hyper: group → the first seven numbers of HYPER; lr may be a tensor.
        allowed: option → the values with which the fused update is right.
        keeps: the names of the state that the base itself has.
    """

    kind: Callable[[Group], str]
    hyper: Callable[[Group], tuple[Any, ...]]
    allowed: dict[str, tuple[Any, ...]]
    keeps: tuple[str, ...]

    def refusal(self, group: Group) -> str | None:
        """Return why the fused update does not fit this group, or None."""
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


_ADAM = ("step", *STATES["adam"])

TABLE: dict[type, Base] = {
    torch.optim.AdamW: Base(lambda group: "adam", _adam, {"amsgrad": (False,)}, _ADAM),
    torch.optim.Adam: Base(lambda group: "adam", _adam, {"amsgrad": (False,)}, _ADAM),
    torch.optim.SGD: Base(
        lambda group: "momentum" if group["momentum"] else "sgd", _sgd, {}, STATES["momentum"]
    ),
    Lion: Base(lambda group: "lion", _lion, {}, STATES["lion"]),
}
"""Base class → Base. Only the exact class is fused: a subclass may step otherwise."""
