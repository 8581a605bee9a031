"""Who is measured: ours, torch's own, and the packages that people use for the same end."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import mechanic_fused

from .cases import counted_bytes, plan_bytes

Make = Callable[[list[Any]], Any]

DECAY = 0.01


@dataclass(frozen=True)
class Contender:
    """An optimizer to measure.

    Args:
        name: what the tables call it.
        make: weights → optimizer.
        ours: its bytes are read from its plan; all others' are counted by operation.
        shares_gradients: whether it only reads gradients, so that they need not be its own.
        compiled: wrap its step in torch.compile with this compiler backend.
        moves: what is counted in its place, where its own operations will not be what runs.
    """

    name: str
    make: Make
    ours: bool = False
    shares_gradients: bool = True
    compiled: str = ""
    moves: Make | None = None

    def bytes_per_parameter(self, optimizer: Any, parameters: int, dtype: torch.dtype) -> float:
        if self.ours:
            return plan_bytes(optimizer) / parameters
        return counted_bytes(self.moves or self.make, dtype)


def torch_adamw(form: str, decay: float = DECAY, **options: Any) -> Contender:
    """Return torch's AdamW; ``form`` is "fused" or "foreach"."""
    return Contender(
        f"torch AdamW {form}, wd={decay:g}",
        lambda weights: torch.optim.AdamW(
            weights, lr=1e-6, weight_decay=decay, **{form: True}, **options
        ),
    )


def torch_sgd(form: str) -> Contender:
    return Contender(
        f"torch SGD {form}, momentum",
        lambda weights: torch.optim.SGD(weights, lr=1e-6, momentum=0.9, **{form: True}),
    )


def adamw(backend: str = "auto", decay: float = DECAY, narrow_delta: bool = False) -> Contender:
    """Return our AdamW, named after its backend where that is chosen."""
    suffix = "" if backend == "auto" else f", {backend}"
    suffix += ", narrow Δ" if narrow_delta else ""
    return Contender(
        f"MechanicAdamW wd={decay:g}{suffix}",
        lambda weights: mechanic_fused.MechanicAdamW(
            weights, lr=1.0, weight_decay=decay, backend=backend, narrow_delta=narrow_delta
        ),
        ours=True,
    )


def sgd(backend: str = "auto") -> Contender:
    return Contender(
        "MechanicSGD momentum",
        lambda weights: mechanic_fused.MechanicSGD(weights, lr=1.0, momentum=0.9, backend=backend),
        ours=True,
    )


def lion(backend: str = "auto", decay: float = DECAY) -> Contender:
    return Contender(
        f"MechanicLion wd={decay:g}",
        lambda weights: mechanic_fused.MechanicLion(
            weights, lr=1.0, weight_decay=decay, backend=backend
        ),
        ours=True,
    )


def mechanic_pytorch(fused: bool = False) -> Contender:
    """Return the authors' package around AdamW, as its README has it."""

    def make(weights: list[Any]) -> Any:
        package = importlib.import_module("mechanic_pytorch")
        options = {"fused": True} if fused else {}
        return package.mechanize(torch.optim.AdamW)(weights, lr=1.0, weight_decay=DECAY, **options)

    name = f"mechanic-pytorch AdamW{' fused' if fused else ''}"
    return Contender(name, make, shares_gradients=False)


def other_tuners() -> list[Contender]:
    """Return the other optimizers that need no learning rate. Some write into their gradients."""

    def schedulefree(weights: list[Any]) -> Any:
        package = importlib.import_module("schedulefree")
        optimizer = package.AdamWScheduleFree(weights, lr=1e-6, weight_decay=DECAY)
        optimizer.train()
        return optimizer

    makes: dict[str, Make] = {
        "prodigyopt Prodigy": lambda weights: importlib.import_module("prodigyopt").Prodigy(
            weights, weight_decay=DECAY
        ),
        "schedulefree AdamW": schedulefree,
        "dadaptation Adam": lambda weights: importlib.import_module("dadaptation").DAdaptAdam(
            weights, weight_decay=DECAY, decouple=True
        ),
    }
    return [Contender(name, make, shares_gradients=False) for name, make in makes.items()]


def compiled(contender: Contender, compiler: str) -> Contender:
    """Return a contender whose step goes through torch.compile; the fused one's bytes are its."""
    return Contender(
        f"{contender.name}, compiled",
        contender.make,
        compiled=compiler,
        moves=torch_adamw("fused").make,
    )
