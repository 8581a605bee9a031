"""The methods of mechanic_fused.tuners, used as documented.

A tuner that replaces the schedule runs without one; the others run with the task's schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from mechanic_fused import tuners

from . import schedules
from .methods import DECAY, Trainer, optimizer
from .problem import Problem
from .tasks import Task

WINDOWS = 500
"""AutoDrop's windows in a run. Its paper has about 1,200: too many for runs of 500 steps."""

LARGER = 4
"""Batches in each of LRTuner's losses."""


class Method(NamedTuple):
    """A row of the table.

    Args:
        start: the first lr: a number, or "grid" for the best of its base's grid.
        base: the base whose grid it is compared with.
        make: (first lr, problem, task, steps) → trainer.
    """

    start: float | str
    base: str
    make: Callable[[float, Problem, Task, int], Trainer]


class Several:
    """Schedulers that step together."""

    def __init__(self, *schedulers: Any) -> None:
        self.schedulers = schedulers

    def step(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()


class Probing(Trainer):
    """Let a tuner probe the loss along the step, between the backward pass and the step.

    Args:
        probe_batches: (problem, batch of the step) → the batches of the probed losses.
    """

    def __init__(self, model: Any, opt: Any, tuner: Any, probe_batches: Any) -> None:
        super().__init__(model, opt)
        self.tuner, self.probe_batches = tuner, probe_batches

    def train_step(self, problem: Problem, batch: Any, clip: float | None) -> Tensor:
        loss = problem.loss(batch)
        self.backward(loss, clip)
        batches = self.probe_batches(problem, batch) if self.tuner.due else []
        self.tuner.step(lambda: torch.stack([problem.loss(b) for b in batches]).mean())
        self.step()
        return loss


class WithClosure(Trainer):
    """Step with a closure."""

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


class Unclipped(WithClosure):
    """Step with a closure that never clips: line searches need the gradients of the loss."""

    def train_step(self, problem: Problem, batch: Any, clip: float | None) -> Tensor:
        return super().train_step(problem, batch, None)


class FullBatch(WithClosure):
    """Step on all training rows, for methods that need the same objective in every step."""

    def train_step(self, problem: Any, batch: Any, clip: float | None) -> Tensor:
        return super().train_step(problem, problem.train, clip)


def _scheduled(
    base: str, scheduler: Any, lr: float, problem: Problem, task: Task, steps: int
) -> Trainer:
    """Train a base with the scheduler (optimizer, task, steps)."""
    opt = optimizer(base, lr, problem, task)
    return Trainer(problem.model, opt, scheduler(opt, task, steps))


def _window(steps: int) -> int:
    return max(1, steps // WINDOWS)


def _autodrop(opt: Any, task: Task, steps: int) -> Any:
    return tuners.AutoDrop(opt, k=_window(steps))


def _as_autodrop(opt: Any, task: Task, steps: int) -> Any:
    """Drop by 0.95 every 11 windows, as AutoDrop does if the angles only fluctuate."""
    return ExponentialLR(opt, 0.95 ** (1 / (11 * _window(steps))))


def _drops(opt: Any, task: Task, steps: int) -> Any:
    return schedules.drops(opt, steps)


def _flatter(opt: Any, task: Task, steps: int) -> Any:
    return Several(schedules.schedule(opt, task, steps), tuners.FlatterFaster(opt))


def _probing(
    base: str, tuner: Any, batches: Any, lr: float, problem: Problem, task: Task, steps: int
) -> Trainer:
    """Train a base with the tuner (optimizer, model, steps)."""
    # LQA's direction must be the gradient: no momentum and no decay.
    plain = torch.optim.SGD(problem.weights(), lr=lr) if base == "plain SGD" else None
    opt = plain or optimizer(base, lr, problem, task)
    return Probing(problem.model, opt, tuner(opt, problem.model, steps), batches)


def _with_closure(
    kind: Any, new: Any, scheduled: bool, lr: float, problem: Problem, task: Task, steps: int
) -> Trainer:
    """Train with a method that is an optimizer itself: new(problem, lr, weight_decay)."""
    opt = new(problem, lr, DECAY["SGD"] * task.decay)
    return kind(problem.model, opt, schedules.schedule(opt, task, steps) if scheduled else None)


def _cgq(problem: Problem, lr: float, decay: float) -> Any:
    return tuners.CGQ(problem.weights(), lr=lr, weight_decay=decay, model=problem.model)


def _extrapolated(problem: Problem, lr: float, decay: float) -> Any:
    return tuners.ExtrapolatedSGD(problem.weights(), lr=lr, momentum=0.9, weight_decay=decay)


def _adarem(problem: Problem, lr: float, decay: float) -> Any:
    return tuners.AdaRem(problem.weights(), lr=lr, weight_decay=decay)


def _autogd(problem: Problem, lr: float, _: float) -> Any:
    return tuners.AutoGD(problem.weights(), lr=lr, model=problem.model)


def _gen(opt: Any, model: Any, steps: int) -> Any:
    return tuners.GeN(opt, model)


def _lrtuner(opt: Any, model: Any, steps: int) -> Any:
    return tuners.LRTuner(opt, model, steps=steps)


def _lqa(opt: Any, model: Any, steps: int) -> Any:
    return tuners.LQA(opt, model)


TUNED: dict[str, Method] = {
    "AutoDrop AdamW": Method("grid", "AdamW", partial(_scheduled, "AdamW", _autodrop)),
    "exponential AdamW": Method("grid", "AdamW", partial(_scheduled, "AdamW", _as_autodrop)),
    "drops AdamW": Method("grid", "AdamW", partial(_scheduled, "AdamW", _drops)),
    "AutoDrop SGD": Method("grid", "SGD", partial(_scheduled, "SGD", _autodrop)),
    "exponential SGD": Method("grid", "SGD", partial(_scheduled, "SGD", _as_autodrop)),
    "drops SGD": Method("grid", "SGD", partial(_scheduled, "SGD", _drops)),
    "GeN AdamW": Method(1e-3, "AdamW", partial(_probing, "AdamW", _gen, lambda p, _: [p.batch()])),
    "LRTuner AdamW": Method(
        1e-3,
        "AdamW",
        partial(_probing, "AdamW", _lrtuner, lambda p, _: [p.batch() for _ in range(LARGER)]),
    ),
    "LQA": Method(1e-2, "SGD", partial(_probing, "plain SGD", _lqa, lambda _, b: [b])),
    "CGQ": Method(1e-2, "SGD", partial(_with_closure, Unclipped, _cgq, False)),
    "extrapolated SGD": Method(
        "grid", "SGD", partial(_with_closure, WithClosure, _extrapolated, True)
    ),
    "AdaRem": Method(0.4, "SGD", partial(_with_closure, WithClosure, _adarem, True)),
    "Flatter, faster SGD": Method("grid", "SGD", partial(_scheduled, "SGD", _flatter)),
    "AutoGD": Method(1.0, "SGD", partial(_with_closure, FullBatch, _autogd, False)),
}
"""A method that only lowers the lr starts at the best of the grid; one that searches does not."""

DETERMINISTIC = ("AutoGD",)
"""The methods for objectives without noise."""
