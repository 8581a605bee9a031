"""Low precision without master weights: Mechanic beside AdamW on the character model, T steps.

AdamW runs at the best rate of its float32 grid in every precision.
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
    """The dtypes of weights, matrix products, optimizer state and Δ.

    Args:
        weights: the dtype of the model's weights and gradients.
        autocast: compute matrix products in bfloat16 from wider weights.
        scaled: use a GradScaler; the optimizer's kernels unscale the gradients.
        state: Mechanic's base keeps its state in the weights' dtype, like torch's AdamW.
        delta: whether the exact form with a bfloat16 Δ, rounded stochastically, takes the place of
            the running one.
    """

    weights: torch.dtype = torch.float32
    autocast: bool = False
    scaled: bool = False
    state: bool = False
    delta: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options of a mechanized optimizer; with fused=True its kernels unscale."""
        return {
            **({"fused": True} if self.scaled else {}),
            **({"state_dtype": "param"} if self.state else {}),
            **({"delta_dtype": torch.bfloat16} if self.delta else {}),
        }


PRECISIONS = {
    "float32": Precision(),
    "bfloat16 products, float32 weights": Precision(autocast=True),
    "bfloat16 weights": Precision(torch.bfloat16),
    "bfloat16 weights and state": Precision(torch.bfloat16, state=True),
    "bfloat16 weights, Δ stochastic": Precision(torch.bfloat16, delta=True),
    "float16 weights, GradScaler": Precision(torch.float16, scaled=True),
}

COMPARED = {
    "Mechanic AdamW": tuple(PRECISIONS),
    "AdamW": tuple(name for name, p in PRECISIONS.items() if not p.scaled and not p.delta),
}
"""The precisions of each method. GradScaler refuses torch's AdamW with float16 weights."""

TASK = "char"


class WithGradScaler(Trainer):
    """Scale the loss; the optimizer's kernels unscale, skip and clip."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scaler = torch.amp.GradScaler("cpu")

    def backward(self, loss: Tensor, clip: float | None) -> None:
        self.optimizer.zero_grad()
        self.optimizer.max_grad_norm = clip
        self.scaler.scale(loss).backward()

    def step(self, **given: Tensor) -> None:
        self.scaler.step(self.optimizer, **given)
        self.scaler.update()
        self.scheduler.step()


def in_precision(make: Make, precision: Precision) -> Make:
    """Return the same method in another precision."""

    def made(problem: Problem, task: Task, steps: int) -> Trainer:
        model, forward = problem.model.to(precision.weights), problem.model.forward
        if precision.autocast:
            forward = torch.autocast("cpu", torch.bfloat16)(forward)
        # The cross-entropy is computed in float32, as is usual.
        model.forward = lambda x: forward(x).float()
        trainer = make(problem, task, steps)
        kind = WithGradScaler if precision.scaled else Trainer
        parts = (trainer.model, trainer.optimizer, trainer.scheduler, trainer.learned)
        return kind(*parts, trainer.gives_loss)

    return made


def bytes_of(method: str, name: str) -> float:
    """Return the bytes per parameter of the weights and the optimizer state, without gradients."""
    precision = PRECISIONS[name]
    base, ours, _ = BASES["AdamW"]
    weight = nn.Parameter(torch.ones(8, 8, dtype=precision.weights))
    is_ours = method.startswith("Mechanic")
    optimizer = ours([weight], **precision.options) if is_ours else base([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = {"weight": weight, **optimizer.state[weight]}
    sizes = {k: t.element_size() for k, t in kept.items() if torch.is_tensor(t) and t.dim()}
    return sum(sizes.values())
