"""One run: a task, a horizon, a method and a seed, from the first step to its row."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from . import muon
from .ablations import ARMS
from .methods import OTHERS, Make, mechanic, plain
from .narrow_state import NARROW, RIVALS, rival
from .precision import PRECISIONS, in_precision
from .problem import Problem
from .schedules import FALLS
from .tasks import TASKS, Task
from .tuned import TUNED

NO_LOSS = "no loss"
"""The arm of Mechanic whose step is not given the loss."""

READS = 50
"""How often the loss and the learning rate are read during a run."""


@dataclass(frozen=True)
class Spec:
    """What to run.

    Args:
        horizon: in multiples of the task's T.
        method: a base ("AdamW", "Muon"), Mechanic around one ("Mechanic AdamW"), or a name in
            OTHERS or in TUNED.
        lr: of a plain base, or where a tuner starts; 0 for the rest.
        arm: "" for the defaults; of Mechanic a name in ablations.ARMS, narrow_state.NARROW or
            precision.PRECISIONS, or NO_LOSS; of a base one in precision.PRECISIONS, in
            schedules.FALLS or in narrow_state.RIVALS. Of Muon a name in muon.ARMS, of Mechanic
            around it one in muon.OTHER_LRS.
    """

    task: str
    horizon: int
    method: str
    lr: float
    arm: str
    seed: int


def steps_of(task: str, horizon: int, shorter: int = 1) -> int:
    """Return the steps of a run; ``shorter`` divides their number."""
    return max(20, horizon * TASKS[task].steps // shorter)


def run(spec: Spec, shorter: int = 1) -> dict[str, Any]:
    """Train, and return the row: the spec, the scores and the largest learning rate."""
    task = TASKS[spec.task]
    with ExitStack() as stack:
        make = _make(spec, stack)
        problem = task.build(spec.seed)
        scores = _train(problem, task, make, steps_of(spec.task, spec.horizon, shorter))
    return {**asdict(spec), **scores}


def _make(spec: Spec, stack: ExitStack) -> Make:
    if spec.method in OTHERS:
        return OTHERS[spec.method]
    if spec.method in TUNED:
        return partial(TUNED[spec.method].make, spec.lr)
    if spec.method == "Muon":
        return partial(muon.plain, spec.lr, muon.ARMS[spec.arm])
    if spec.method == muon.OURS:
        return partial(muon.mechanic, muon.OTHER_LRS.get(spec.arm, 1.0))
    if spec.arm in RIVALS:
        return partial(rival, spec.arm, spec.lr)
    name, _, base = spec.method.rpartition(" ")
    chosen: dict[str, Any] = {}
    if spec.arm in ARMS:
        chosen, change = ARMS[spec.arm][1]
        stack.enter_context(change)
    chosen = NARROW.get(spec.arm, chosen)
    precision = PRECISIONS.get(spec.arm)
    if precision:
        chosen = precision.options
    if name:
        make = partial(mechanic, base, chosen, gives_loss=spec.arm != NO_LOSS)
    else:
        make = partial(plain, base, spec.lr, shape=spec.arm if spec.arm in FALLS else "")
    return in_precision(make, precision) if precision else make


def _train(problem: Problem, task: Task, make: Make, steps: int) -> dict[str, float]:
    rate = 0.0
    diverged = {"train_loss": math.inf, "validation_loss": math.inf}
    diverged |= {"accuracy": 0.0} if task.metric == "accuracy" else {}
    with warnings.catch_warnings():
        # Other packages use torch in ways that it warns of.
        warnings.simplefilter("ignore")
        trainer = make(problem, task, steps)
        for t in range(steps):
            loss = trainer.train_step(problem, problem.batch(), task.clip)
            if t % max(1, steps // READS) == 0:
                if not math.isfinite(loss.item()):
                    return {**diverged, "rate": rate}
                rate = max(rate, trainer.rate())
        with trainer.evaluated() as model:
            model.eval()
            scores = problem.scores(model)
    if not all(map(math.isfinite, scores.values())):
        scores = diverged
    return {**scores, "rate": rate}
