"""Training methods: a base at a given learning rate, Mechanic around it, and other packages.

Each package is used as its authors recommend: Prodigy and D-Adaptation with lr=1 and the recipe's
schedule (Prodigy with safeguard_warmup if there is a warm-up), schedule-free without a schedule but
with its own warm-up and evaluation mode, DoG without a schedule but with its averager, and Prodigy
plus schedule-free with lr=1 and its evaluation mode, without a schedule and without clipping.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import mechanic_fused

from .problem import Problem
from .schedules import schedule
from .tasks import Task

BASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
    "SGD": (torch.optim.SGD, mechanic_fused.MechanicSGD, 2**-2),
    "AdamW": (torch.optim.AdamW, mechanic_fused.MechanicAdamW, 2**-7),
    "Lion": (mechanic_fused.Lion, mechanic_fused.MechanicLion, 2**-10),
}
"""Each base optimizer, Mechanic around it, and the middle of the first grid of learning rates."""

DECAY = {"SGD": 0.0, "AdamW": 1.0, "Lion": 10.0}
"""Multiples of the recipe's weight decay; Lion's paper uses ten times as much as AdamW."""


class Trainer:
    """An optimizer with its schedule, and the weights that it is evaluated with.

    Args:
        learned: optimizer → the current learning rate; by default its first group's lr.
        gives_loss: give the loss to the optimizer's step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any = None,
        learned: Callable[[Any], float] = lambda opt: opt.param_groups[0]["lr"],
        gives_loss: bool = False,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.learned, self.gives_loss = learned, gives_loss

    def rate(self) -> float:
        """Return the current learning rate."""
        return float(self.learned(self.optimizer))

    def backward(self, loss: Tensor, clip: float | None) -> None:
        """Compute gradients, and clip them to this norm unless it is None."""
        self.optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)

    def step(self, **given: Tensor) -> None:
        """Step the optimizer, with what its step is given, and the schedule."""
        self.optimizer.step(**given)
        if self.scheduler is not None:
            self.scheduler.step()

    def train_step(self, problem: Problem, batch: Any, clip: float | None) -> Tensor:
        """Take one step on a batch; return the loss before it."""
        loss = problem.loss(batch)
        self.backward(loss, clip)
        self.step(**({"loss": loss.detach()} if self.gives_loss else {}))
        return loss

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model to evaluate."""
        yield self.model


class ScheduleFree(Trainer):
    """Gradients are computed at one point, and the model is evaluated at another."""

    def __init__(self, problem: Problem, *rest: Any) -> None:
        super().__init__(problem.model, *rest)
        self.problem = problem

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        self.optimizer.eval()
        if any(isinstance(part, nn.BatchNorm2d) for part in self.model.modules()):
            # Its running statistics are of the other point.
            with torch.no_grad():
                for _ in range(50):
                    self.problem.loss(self.problem.batch())
        yield self.model
        self.optimizer.train()


class Unclipped(ScheduleFree):
    """Its optimizer bounds its own steps."""

    def backward(self, loss: Tensor, clip: float | None) -> None:
        super().backward(loss, None)


class Averaged(Trainer):
    """The model is evaluated with DoG's average of its weights."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.averager = importlib.import_module("dog").PolynomialDecayAverager(self.model)

    def step(self, **given: Tensor) -> None:
        super().step(**given)
        self.averager.step()

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        yield self.averager.averaged_model


Make = Callable[[Problem, Task, int], Trainer]
"""(problem, task, steps) → trainer."""


def _options(base: str, task: Task) -> dict[str, Any]:
    options: dict[str, Any] = {"weight_decay": DECAY[base] * task.decay}
    if base == "SGD":
        options["momentum"] = 0.9
    return options


def optimizer(base: str, lr: float, problem: Problem, task: Task) -> Any:
    """Return the base optimizer with the options of the recipe."""
    fused = {} if base == "Lion" else {"fused": True}
    return BASES[base][0](problem.weights(), lr=lr, **fused, **_options(base, task))


def plain(
    base: str, lr: float, problem: Problem, task: Task, steps: int, shape: str = ""
) -> Trainer:
    """Train with a base optimizer at this learning rate, of this shape."""
    opt = optimizer(base, lr, problem, task)
    return Trainer(problem.model, opt, schedule(opt, task, steps, shape))


def mechanic(
    base: str,
    options: dict[str, Any],
    problem: Problem,
    task: Task,
    steps: int,
    gives_loss: bool = True,
) -> Trainer:
    """Train with Mechanic around a base, with these options of its own."""
    weights = problem.weights()
    if options.get("scale_per") == "group":
        # Matrices and vectors, as is usual for weight decay.
        weights = [
            {"params": [w for w in weights if (w.dim() > 1) == matrix]} for matrix in (True, False)
        ]
    opt = BASES[base][1](weights, lr=1.0, **_options(base, task), **options)
    return Trainer(
        problem.model,
        opt,
        schedule(opt, task, steps),
        learned=lambda opt: max(opt.learned_lr()),
        gives_loss=gives_loss,
    )


def _estimated(opt: Any) -> float:
    """Return the learning rate of Prodigy and D-Adaptation: their estimate d times lr."""
    return opt.param_groups[0]["d"] * opt.param_groups[0]["lr"]


def _prodigy(problem: Problem, task: Task, steps: int) -> Trainer:
    opt = importlib.import_module("prodigyopt").Prodigy(
        problem.weights(),
        lr=1.0,
        weight_decay=task.decay,
        safeguard_warmup=task.schedule == "cosine",
    )
    return Trainer(problem.model, opt, schedule(opt, task, steps), _estimated)


def _d_adaptation(problem: Problem, task: Task, steps: int) -> Trainer:
    opt = importlib.import_module("dadaptation").DAdaptAdam(
        problem.weights(), lr=1.0, weight_decay=task.decay, decouple=True
    )
    return Trainer(problem.model, opt, schedule(opt, task, steps), _estimated)


def _schedule_free(problem: Problem, task: Task, steps: int) -> Trainer:
    opt = importlib.import_module("schedulefree").AdamWScheduleFree(
        problem.weights(), weight_decay=task.decay, warmup_steps=max(1, steps // 20)
    )
    opt.train()
    return ScheduleFree(problem, opt)


def _prodigy_plus(problem: Problem, task: Task, steps: int) -> Trainer:
    package = importlib.import_module("prodigyplus")
    # With one group split_groups has no effect, but the package prints that.
    opt = package.ProdigyPlusScheduleFree(
        problem.weights(), weight_decay=task.decay, split_groups=False
    )
    opt.train()
    return Unclipped(problem, opt, None, _estimated)


def _dog(problem: Problem, task: Task, steps: int) -> Trainer:
    opt = importlib.import_module("dog").DoG(problem.weights())
    return Averaged(problem.model, opt, None, lambda opt: opt.param_groups[0]["eta"][0])


OTHERS: dict[str, Make] = {
    "Prodigy": _prodigy,
    "D-Adapt Adam": _d_adaptation,
    "schedule-free AdamW": _schedule_free,
    "DoG": _dog,
    "Prodigy + schedule-free": _prodigy_plus,
}
"""schedule-free has a learning rate, left at the package's default of 0.0025."""
