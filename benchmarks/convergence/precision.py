"""Low precision without master weights: Mechanic beside AdamW, the character model, T steps.

Mechanic's learning rate is learned; AdamW's is the best of its float32 grid, in every precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .methods import BASES, Make, Trainer
from .problem import Problem
from .tasks import Task


@dataclass(frozen=True)
class Precision:
    """How weights, products and Δ are kept.

    Args:
        weights: the dtype of the model's weights and gradients.
        autocast: products in bfloat16 from wider weights.
        scaled: a GradScaler, whose factor the optimizer's kernels take away.
        state: Mechanic's base keeps its state in the weights' dtype, as torch's AdamW does.
        delta: None, or how Δ is rounded to bfloat16 at each step: "stochastic", by the option
            ``narrow_delta``, or "nearest", a trial of what the kernels do not do, in float32.
    """

    weights: torch.dtype = torch.float32
    autocast: bool = False
    scaled: bool = False
    state: bool = False
    delta: str | None = None

    @property
    def options(self) -> dict[str, bool]:
        """What a mechanized optimizer is made with; fused lets kernels take away the factor."""
        wanted = {
            "fused": self.scaled,
            "narrow_state": self.state,
            "narrow_delta": self.delta == "stochastic",
        }
        return {name: True for name, is_wanted in wanted.items() if is_wanted}


PRECISIONS = {
    "float32": Precision(),
    "bfloat16 products, float32 weights": Precision(autocast=True),
    "bfloat16 weights": Precision(torch.bfloat16),
    "bfloat16 weights, Δ to nearest": Precision(torch.bfloat16, delta="nearest"),
    "bfloat16 weights, Δ stochastic": Precision(torch.bfloat16, delta="stochastic"),
    "bfloat16 weights and state, Δ stochastic": Precision(
        torch.bfloat16, state=True, delta="stochastic"
    ),
    "float16 weights, GradScaler": Precision(torch.float16, scaled=True),
}

COMPARED = {
    "Mechanic AdamW": tuple(PRECISIONS),
    "AdamW": tuple(name for name, p in PRECISIONS.items() if not p.scaled and p.delta is None),
}
"""The precisions of each method. torch's own AdamW refuses GradScaler over float16 weights."""

TASK = "char"


class Rounded(Trainer):
    """Rounds Δ to the nearest bfloat16 after each step."""

    def step(self) -> None:
        super().step()
        for state in self.optimizer.state.values():
            state["delta"].copy_(state["delta"].bfloat16())


class Scaled(Trainer):
    """Scales the loss; the optimizer unscales, skips and clips in its own kernels."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scaler = torch.amp.GradScaler("cpu")

    def backward(self, loss: Tensor, clip: float | None) -> None:
        self.optimizer.zero_grad()
        self.optimizer.max_grad_norm = clip
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()


def narrowed(make: Make, precision: Precision) -> Make:
    """Return the same method over a problem in another precision."""

    def made(problem: Problem, task: Task, steps: int) -> Trainer:
        model, forward = problem.model.to(precision.weights), problem.model.forward
        if precision.autocast:
            forward = torch.autocast("cpu", torch.bfloat16)(forward)
        # The cross-entropy is taken in float32, as is usual.
        model.forward = lambda x: forward(x).float()
        trainer = make(problem, task, steps)
        parts = (trainer.model, trainer.optimizer, trainer.scheduler, trainer.rate)
        if precision.scaled:
            return Scaled(*parts)
        return Rounded(*parts) if precision.delta == "nearest" else trainer

    return made


def bytes_of(method: str, name: str) -> float:
    """Return the bytes a parameter of the weights and of all that the optimizer keeps.

    A Δ that is rounded by way of trial counts as the bfloat16 that it stands for. Gradients, in the
    weights' dtype, come on top.
    """
    precision = PRECISIONS[name]
    base, ours, _ = BASES["AdamW"]
    weight = nn.Parameter(torch.ones(8, 8, dtype=precision.weights))
    is_ours = method.startswith("Mechanic")
    optimizer = ours([weight], **precision.options) if is_ours else base([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = {"weight": weight, **optimizer.state[weight]}
    sizes = {k: t.element_size() for k, t in kept.items() if torch.is_tensor(t) and t.dim()}
    if precision.delta == "nearest":
        sizes["delta"] = 2
    return sum(sizes.values())
