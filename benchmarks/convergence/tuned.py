"""Who tunes the lr beside a plain optimizer, or is one: mechanic_fused.tuners.

Each is used as its documentation says. Where a tuner takes the place of the schedule there is none;
where it goes beside one it is the task's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, MultiStepLR

from mechanic_fused import tuners

from .methods import DECAY, Make, Trainer, optimizer
from .problem import Problem
from .schedules import schedule
from .tasks import Task

WINDOWS = 500
"""Windows of AutoDrop in a run: its paper has about 1,200, which a run of 500 steps cannot have."""

LARGER = 4
"""Batches that LRTuner takes a loss of."""


class Method(NamedTuple):
    """A row of the table.

    Args:
        start: where its lr begins: a number, or "grid" for the best of its base's grid.
        base: whose grid it is held against.
        make: starting lr → how it is made.
    """

    start: float | str
    base: str
    make: Callable[[float], Make]


class Several:
    """Schedulers that step together."""

    def __init__(self, *schedulers: Any) -> None:
        self.schedulers = schedulers

    def step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()


class Looking(Trainer):
    """Lets a tuner look along the step between the backward pass and the step.

    Args:
        looks_at: (problem, batch of the step) → the batches that it takes its losses of.
    """

    def __init__(self, model: Any, opt: Any, rate: Any, tuner: Any, looks_at: Any) -> None:
        super().__init__(model, opt, None, rate)
        self.tuner, self.looks_at = tuner, looks_at

    def train_step(self, problem: Problem, batch: Any, clip: float | None) -> Tensor:
        loss = problem.loss(batch)
        self.backward(loss, clip)
        batches = self.looks_at(problem, batch) if self.tuner.due else []
        self.tuner.step(lambda: torch.stack([problem.loss(b) for b in batches]).mean())
        self.step()
        return loss


class Closed(Trainer):
    """Steps with a closure."""

    def train_step(self, problem: Problem, batch: Any, clip: float | None) -> Tensor:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = problem.loss(batch)
            if loss.requires_grad:
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            return loss

        loss = self.optimizer.step(closure)
        if self.scheduler is not None:
            self.scheduler.step()
        return loss


class Unclipped(Closed):
    """For methods that need the loss's own gradients."""

    def train_step(self, problem: Problem, batch: Any, clip: float | None) -> Tensor:
        return super().train_step(problem, batch, None)


class Whole(Closed):
    """Steps on all training rows: for methods whose objective must be the same at each step."""

    def train_step(self, problem: Any, batch: Any, clip: float | None) -> Tensor:
        return super().train_step(problem, problem.train, clip)


def _rate(opt: Any) -> Callable[[], float]:
    return lambda: float(opt.param_groups[0]["lr"])


def _scheduled(base: str, scheduler: Callable[[Any, Task, int], Any]) -> Callable[[float], Make]:
    """A base under a scheduler of (optimizer, task, steps)."""

    def start(lr: float) -> Make:
        def make(problem: Problem, task: Task, steps: int) -> Trainer:
            opt = optimizer(base, lr, problem, task)
            return Trainer(problem.model, opt, scheduler(opt, task, steps), _rate(opt))

        return make

    return start


def _window(steps: int) -> int:
    return max(1, steps // WINDOWS)


def _autodrop(opt: Any, task: Task, steps: int) -> Any:
    return tuners.AutoDrop(opt, k=_window(steps))


def _as_autodrop(opt: Any, task: Task, steps: int) -> Any:
    """A drop by 0.95 every 11 windows, as AutoDrop does where the angles only fluctuate."""
    return ExponentialLR(opt, 0.95 ** (1 / (11 * _window(steps))))


def _drops(opt: Any, task: Task, steps: int) -> Any:
    return MultiStepLR(opt, [round(at * steps) for at in (0.6, 0.8, 0.95)], gamma=0.1)


def _flatter(opt: Any, task: Task, steps: int) -> Any:
    return Several(schedule(opt, task, steps), tuners.FlatterFaster(opt))


def _looking(
    base: str, tuner: Callable[[Any, Any, int], Any], looks_at: Any
) -> Callable[[float], Make]:
    def start(lr: float) -> Make:
        def make(problem: Problem, task: Task, steps: int) -> Trainer:
            # LQA's direction is the gradient: no momentum and no decay.
            plain = torch.optim.SGD(problem.weights(), lr=lr) if base == "plain SGD" else None
            opt = plain or optimizer(base, lr, problem, task)
            looks = tuner(opt, problem.model, steps)
            return Looking(problem.model, opt, _rate(opt), looks, looks_at)

        return make

    return start


def _closed(
    kind: type[Closed], new: Callable[[Problem, float, float], Any], scheduled: bool
) -> Callable[[float], Make]:
    """An optimizer that is a method itself: new(problem, lr, weight_decay)."""

    def start(lr: float) -> Make:
        def make(problem: Problem, task: Task, steps: int) -> Trainer:
            opt = new(problem, lr, DECAY["SGD"] * task.decay)
            scheduler = schedule(opt, task, steps) if scheduled else None
            return kind(problem.model, opt, scheduler, _rate(opt))

        return make

    return start


def _cgq(problem: Problem, lr: float, decay: float) -> Any:
    return tuners.CGQ(problem.weights(), lr=lr, weight_decay=decay, model=problem.model)


def _extrapolated(problem: Problem, lr: float, decay: float) -> Any:
    return tuners.ExtrapolatedSGD(problem.weights(), lr=lr, momentum=0.9, weight_decay=decay)


def _adarem(problem: Problem, lr: float, decay: float) -> Any:
    return tuners.AdaRem(problem.weights(), lr=lr, weight_decay=decay)


def _autogd(problem: Problem, lr: float, _: float) -> Any:
    return tuners.AutoGD(problem.weights(), lr=lr, model=problem.model)


TUNED: dict[str, Method] = {
    "AutoDrop AdamW": Method("grid", "AdamW", _scheduled("AdamW", _autodrop)),
    "exponential AdamW": Method("grid", "AdamW", _scheduled("AdamW", _as_autodrop)),
    "drops AdamW": Method("grid", "AdamW", _scheduled("AdamW", _drops)),
    "AutoDrop SGD": Method("grid", "SGD", _scheduled("SGD", _autodrop)),
    "exponential SGD": Method("grid", "SGD", _scheduled("SGD", _as_autodrop)),
    "drops SGD": Method("grid", "SGD", _scheduled("SGD", _drops)),
    "GeN AdamW": Method(
        1e-3,
        "AdamW",
        _looking("AdamW", lambda opt, model, _: tuners.GeN(opt, model), lambda p, _: [p.batch()]),
    ),
    "LRTuner AdamW": Method(
        1e-3,
        "AdamW",
        _looking(
            "AdamW",
            lambda opt, model, steps: tuners.LRTuner(opt, model, steps=steps),
            lambda p, _: [p.batch() for _ in range(LARGER)],
        ),
    ),
    "LQA": Method(
        1e-2,
        "SGD",
        _looking("plain SGD", lambda opt, model, _: tuners.LQA(opt, model), lambda _, b: [b]),
    ),
    "CGQ": Method(1e-2, "SGD", _closed(Unclipped, _cgq, False)),
    "extrapolated SGD": Method("grid", "SGD", _closed(Closed, _extrapolated, True)),
    "AdaRem": Method(0.4, "SGD", _closed(Closed, _adarem, True)),
    "Flatter, faster SGD": Method("grid", "SGD", _scheduled("SGD", _flatter)),
    "AutoGD": Method(1.0, "SGD", _closed(Whole, _autogd, False)),
}
"""What only drops starts at the best of the grid, what searches where nobody chose."""

DETERMINISTIC = ("AutoGD",)
"""The methods that are for objectives without noise."""
