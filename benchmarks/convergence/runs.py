"""One run: a task, a horizon, a method and a seed, from the first step to its row of figures."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from .ablations import ARMS
from .methods import OTHERS, Make, mechanic, plain
from .precision import PRECISIONS, narrowed
from .problem import Problem
from .tasks import TASKS, Task
from .tuned import TUNED

DIVERGED = {"train_loss": math.inf, "validation_loss": math.inf, "accuracy": 0.0}
LOOKS = 50
"""How often a run's learning rate is looked at."""


@dataclass(frozen=True)
class Spec:
    """What to run.

    Args:
        horizon: in multiples of the task's T.
        method: a base ("AdamW"), Mechanic around one ("Mechanic AdamW"), or a name in OTHERS or
            in TUNED.
        lr: of a plain base, and where a tuner starts; 0 for the rest.
        arm: a name in ablations.ARMS or in precision.PRECISIONS, or "" for the defaults.
    """

    task: str
    horizon: int
    method: str
    lr: float
    arm: str
    seed: int

    @property
    def steps(self) -> int:
        return self.horizon * TASKS[self.task].steps


def run(spec: Spec, shorter: int = 1) -> dict[str, Any]:
    """Train, and return the row: the spec, scores, the largest learning rate, seconds.

    Args:
        shorter: divides the number of steps.
    """
    task = TASKS[spec.task]
    with ExitStack() as arm:
        make = _make(spec, arm)
        problem = task.build(spec.seed)
        steps = max(20, spec.steps // shorter)
        began = time.perf_counter()
        figures = _train(problem, task, make, steps)
    return {**asdict(spec), "steps": steps, **figures, "seconds": time.perf_counter() - began}


def _make(spec: Spec, arm: ExitStack) -> Make:
    if spec.method in OTHERS:
        return OTHERS[spec.method]
    if spec.method in TUNED:
        return TUNED[spec.method].make(spec.lr)
    name, _, base = spec.method.rpartition(" ")
    options: dict[str, Any] = {}
    if spec.arm in ARMS:
        options, change = ARMS[spec.arm][1]
        arm.enter_context(change)
    precision = PRECISIONS.get(spec.arm)
    if precision:
        options = precision.options
    make = mechanic(base, **options) if name else plain(base, spec.lr)
    return narrowed(make, precision) if precision else make


def _train(problem: Problem, task: Task, make: Make, steps: int) -> dict[str, float]:
    rate = 0.0
    with warnings.catch_warnings():
        # The packages call torch in ways that it warns of; nothing here can be done about that.
        warnings.simplefilter("ignore")
        trainer = make(problem, task, steps)
        for t in range(steps):
            loss = trainer.train_step(problem, problem.batch(), task.clip)
            if t % max(1, steps // LOOKS) == 0:
                if not math.isfinite(loss.item()):
                    return {**DIVERGED, "rate": rate}
                rate = max(rate, trainer.rate())
        with trainer.judged() as model:
            model.eval()
            scores = problem.scores(model)
    if not all(map(math.isfinite, scores.values())):
        return {**DIVERGED, "rate": rate}
    return {**scores, "rate": rate}
