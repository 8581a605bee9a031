"""Muon for the matrices and AdamW for the rest: Mechanic beside a grid of both learning rates."""

from __future__ import annotations

from typing import Any

from mechanic_fused import MechanicMuon, Muon, muon_groups

from .methods import Trainer
from .problem import Problem
from .schedules import schedule
from .tasks import Task

TASKS = ("char", "seq2seq", "masked", "vit")
"""Those of transformers in which matrices have most of the weights."""

RATES = tuple(2.0**k for k in range(-9, -2))
"""Learning rates of Muon."""

RATIOS = (0.25, 1.0, 4.0)
"""AdamW's learning rate in units of Muon's."""

OURS = "Mechanic Muon"

OTHER_LRS = {"lr x 0.1": 0.1, "lr x 10": 10.0}
"""Arm → what Mechanic's lr is multiplied by, which must not matter."""


def arm(ratio: float) -> str:
    """Return the name of the arm with this ratio."""
    return f"AdamW x {ratio:g}"


ARMS = {arm(ratio): ratio for ratio in RATIOS}


def groups(problem: Problem, task: Task, lr: float, ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return the param groups of a problem's weights."""
    found = muon_groups(problem.model, lr=lr, weight_decay=task.decay)
    for group in found[1:]:
        group.update(lr=ratio * lr, weight_decay=task.decay)
    return list(found)


def plain(lr: float, ratio: float, problem: Problem, task: Task, steps: int) -> Trainer:
    """Train with Muon and AdamW at these learning rates."""
    opt = Muon(groups(problem, task, lr, ratio))
    return Trainer(problem.model, opt, schedule(opt, task, steps))


def mechanic(lr: float, problem: Problem, task: Task, steps: int) -> Trainer:
    """Train with Mechanic around both, with its defaults."""
    opt = MechanicMuon(groups(problem, task, lr))
    return Trainer(
        problem.model,
        opt,
        schedule(opt, task, steps),
        learned=lambda opt: max(opt.learned_lr()),
        gives_loss=True,
    )
