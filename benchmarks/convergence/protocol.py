"""The runs that are still missing, as a function of the rows so far.

A protocol that was killed therefore resumes, and a complete one asks for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas

from . import muon, narrow_state, precision
from .ablations import ARMS
from .methods import BASES, OTHERS
from .runs import NO_LOSS, Spec
from .schedules import FALLS
from .tasks import TASKS

Rows = pandas.DataFrame

KEY = ["task", "horizon", "method", "lr", "arm", "seed"]

FRESH = (4961, 5298, 6451, 7125, 8269)
"""Drawn after the defaults are fixed, and used once: new defaults need new ones."""


@dataclass(frozen=True)
class Protocol:
    """The size of the comparison.

    Args:
        choosing: the seeds of the grid, on which the best learning rate is chosen.
        fresh: the seeds of the comparison.
        points: points of the first grid, in factors of 2; it grows until its best is not at an end.
        points_later: points of the grid of a longer horizon, around the best of the shorter one.
        points_shaped: points of the grid of another shape, around the best of the cosine.
        widest: the number of points at which a grid stops growing.
        horizons: the longest horizon, in multiples of T.
        shorter: divides the steps of every run.
    """

    choosing: tuple[int, ...] = (0, 1)
    fresh: tuple[int, ...] = FRESH
    points: int = 7
    points_later: int = 5
    points_shaped: int = 3
    widest: int = 15
    horizons: int = 4
    shorter: int = 1


QUICK = Protocol(choosing=(0,), fresh=FRESH[:2], points=5, widest=9, horizons=1, shorter=10)


def cells(tasks: list[str], protocol: Protocol) -> Iterator[tuple[str, int]]:
    """Yield (task, horizon) of each comparison."""
    for task in tasks:
        for horizon in TASKS[task].horizons:
            if horizon <= protocol.horizons:
                yield task, horizon


def missing(rows: Rows, specs: list[Spec]) -> list[Spec]:
    """Return the specs that have no row yet."""
    there = set(rows[KEY].itertuples(index=False, name=None))
    return [s for s in specs if (s.task, s.horizon, s.method, s.lr, s.arm, s.seed) not in there]


def grid_runs(rows: Rows, tasks: list[str], protocol: Protocol) -> list[Spec]:
    """Return the next runs of the grids; none once every best is inside its grid."""
    specs = [
        Spec(task, horizon, base, lr, "", seed)
        for task, horizon in cells(tasks, protocol)
        for base in TASKS[task].bases
        for lr in grid(rows, task, horizon, base, protocol)
        for seed in protocol.choosing
    ]
    return missing(rows, specs)


def comparison_runs(rows: Rows, tasks: list[str], protocol: Protocol) -> list[Spec]:
    """Return the next runs on fresh seeds; a grid's best is among them once it is known."""
    specs = []
    for task, horizon in cells(tasks, protocol):
        for base in TASKS[task].bases:
            compared = [(f"Mechanic {base}", 0.0)]
            rates = grid(rows, task, horizon, base, protocol)
            chosen = best(rows, task, horizon, base, rates, protocol)
            if chosen is not None:
                compared.append((base, chosen))
            specs += [
                Spec(task, horizon, method, lr, "", seed)
                for method, lr in compared
                for seed in protocol.fresh
            ]
    return missing(rows, specs)


def other_runs(rows: Rows, tasks: list[str], protocol: Protocol) -> list[Spec]:
    """Return the missing runs of other packages, on fresh seeds."""
    specs = [
        Spec(task, horizon, method, 0.0, "", seed)
        for task, horizon in cells(tasks, protocol)
        if not TASKS[task].on_request
        for method in OTHERS
        for seed in protocol.fresh
    ]
    return missing(rows, specs)


def no_loss_runs(rows: Rows, tasks: list[str], protocol: Protocol) -> list[Spec]:
    """Return the missing runs of Mechanic without the loss, on fresh seeds."""
    specs = [
        Spec(task, horizon, f"Mechanic {base}", 0.0, NO_LOSS, seed)
        for task, horizon in cells(tasks, protocol)
        for base in TASKS[task].bases
        for seed in protocol.fresh
    ]
    return missing(rows, specs)


def shape_runs(rows: Rows, tasks: list[str], protocol: Protocol) -> list[Spec]:
    """Return the next runs of the grids over shapes, then of each best on fresh seeds."""
    specs = []
    for task, horizon in cells(tasks, protocol):
        for base in TASKS[task].bases:
            specs += [
                Spec(task, horizon, base, lr, shape, seed)
                for shape in shapes(task)
                for lr in grid(rows, task, horizon, base, protocol, shape)
                for seed in protocol.choosing
            ]
            chosen = best_shape(rows, task, horizon, base, protocol, shapes(task))
            if chosen is not None:
                shape, lr = chosen
                specs += [Spec(task, horizon, base, lr, shape, seed) for seed in protocol.fresh]
    return missing(rows, specs)


def ablation_runs(rows: Rows, tasks: list[str], protocol: Protocol) -> list[Spec]:
    """Return the missing runs of the ablations, at T and on the seeds of the grid."""
    specs = [
        Spec(task, 1, f"Mechanic {base}", 0.0, arm, seed)
        for task in tasks
        for arm, (bases, _) in ARMS.items()
        for base in bases
        for seed in protocol.choosing
    ]
    return missing(rows, specs)


def narrow_runs(rows: Rows, tasks: list[str], protocol: Protocol) -> list[Spec]:
    """Return the missing runs with the base's state in 32, 16 and 8 bits, on fresh seeds.

    And those of AdamW in other packages, where the best of its grid is known.
    """
    tasks = [task for task in tasks if task in narrow_state.TASKS]
    compared = [(task, "Mechanic AdamW", 0.0, arm) for task in tasks for arm in narrow_state.NARROW]
    for task in tasks:
        chosen = best(rows, task, 1, "AdamW", grid(rows, task, 1, "AdamW", protocol), protocol)
        if chosen is not None:
            compared += [(task, "AdamW", chosen, arm) for arm in ("", *narrow_state.installed())]
    specs = [
        Spec(task, 1, method, lr, arm, seed)
        for task, method, lr, arm in compared
        for seed in protocol.fresh
    ]
    return missing(rows, specs)


def muon_runs(rows: Rows, tasks: list[str], protocol: Protocol) -> list[Spec]:
    """Return the next runs of the grids of Muon and AdamW, then of the best and of Mechanic."""
    specs = []
    for task, horizon in cells([task for task in tasks if task in muon.TASKS], protocol):
        specs += [
            Spec(task, horizon, "Muon", lr, arm, seed)
            for lr in muon.RATES
            for arm in muon.ARMS
            for seed in protocol.choosing
        ]
        compared = [(muon.OURS, 0.0, arm) for arm in ("", *muon.OTHER_LRS)]
        found = best_of_muon(rows, task, horizon, protocol)
        compared += [] if found is None else [("Muon", *found)]
        specs += [
            Spec(task, horizon, method, lr, arm, seed)
            for method, lr, arm in compared
            for seed in protocol.fresh
        ]
    return missing(rows, specs)


def best_of_muon(
    rows: Rows, task: str, horizon: int, protocol: Protocol
) -> tuple[float, str] | None:
    """Return the best (lr, arm) of the grid of both rates; None while a run is missing."""
    these = rows[
        (rows.task == task)
        & (rows.horizon == horizon)
        & (rows.method == "Muon")
        & rows.seed.isin(protocol.choosing)
    ]
    if len(these) < len(muon.RATES) * len(muon.ARMS) * len(protocol.choosing):
        return None
    means = these.groupby(["lr", "arm"])[["train_loss", "validation_loss", "accuracy"]].mean()
    lr, arm = _ranked(means, task).index[0]
    return float(lr), str(arm)


def precision_runs(rows: Rows, tasks: list[str], protocol: Protocol) -> list[Spec]:
    """Return the missing runs in low precision; none before AdamW's grid is complete."""
    if precision.TASK not in tasks:
        return []
    rates = grid(rows, precision.TASK, 1, "AdamW", protocol)
    chosen = best(rows, precision.TASK, 1, "AdamW", rates, protocol)
    if chosen is None:
        return []
    specs = [
        Spec(precision.TASK, 1, method, chosen if method == "AdamW" else 0.0, arm, seed)
        for method, arms in precision.COMPARED.items()
        for arm in arms
        for seed in protocol.fresh
    ]
    return missing(rows, specs)


def shapes(task: str) -> tuple[str, ...]:
    """Return the shapes that a schedule may have, the task's own first, as arms of a base."""
    return ("", *FALLS) if TASKS[task].schedule == "cosine" else ("",)


def grid(
    rows: Rows, task: str, horizon: int, base: str, protocol: Protocol, shape: str = ""
) -> list[float]:
    """Return the learning rates of a grid, which gets one more whenever its best is at an end.

    For a longer horizon, or another shape than the task's own, it is empty until the best of the
    shorter one, or of the task's own, is known.
    """
    middle, half = BASES[base][2] / TASKS[task].smaller_lr, protocol.points // 2
    shorter = [h for h in TASKS[task].horizons if h < horizon]
    if shape or shorter:
        before = horizon if shape else shorter[-1]
        rates = grid(rows, task, before, base, protocol)
        found = best(rows, task, before, base, rates, protocol)
        if found is None:
            return []
        middle = found
        half = (protocol.points_shaped if shape else protocol.points_later) // 2
    rates = [middle * 2.0**k for k in range(-half, half + 1)]
    while len(rates) < protocol.widest:
        means = grid_means(rows, task, horizon, base, rates, protocol, shape)
        if means is None:
            break
        if means.index[0] == rates[0]:
            rates.insert(0, rates[0] / 2)
        elif means.index[0] == rates[-1]:
            rates.append(rates[-1] * 2)
        else:
            break
    return rates


def best(
    rows: Rows, task: str, horizon: int, base: str, rates: list[float], protocol: Protocol
) -> float | None:
    """Return the grid's best learning rate, or None while some of its runs are missing."""
    means = grid_means(rows, task, horizon, base, rates, protocol) if rates else None
    return None if means is None else float(means.index[0])


def best_shape(
    rows: Rows, task: str, horizon: int, base: str, protocol: Protocol, among: tuple[str, ...]
) -> tuple[str, float] | None:
    """Return the best (shape, lr) of the grids of these shapes; None while a run is missing."""
    bests = {}
    for shape in among:
        rates = grid(rows, task, horizon, base, protocol, shape)
        means = grid_means(rows, task, horizon, base, rates, protocol, shape) if rates else None
        if means is None:
            return None
        bests[shape, float(means.index[0])] = means.iloc[0]
    return _ranked(pandas.DataFrame(bests).T, task).index[0]


def grid_means(
    rows: Rows,
    task: str,
    horizon: int,
    base: str,
    rates: list[float],
    protocol: Protocol,
    shape: str = "",
) -> Any:
    """Return the grid's mean scores by learning rate, the best first; None if a run is missing.

    The best has the best mean metric; ties are broken by the validation loss.
    """
    these = rows[
        (rows.task == task)
        & (rows.horizon == horizon)
        & (rows.method == base)
        & rows.seed.isin(protocol.choosing)
        & rows.lr.isin(rates)
        & (rows.arm == shape)
    ]
    if len(these) < len(rates) * len(protocol.choosing):
        return None
    means = these.groupby("lr")[["train_loss", "validation_loss", "accuracy"]].mean()
    return _ranked(means, task)


def _ranked(means: Rows, task: str) -> Rows:
    """Return mean scores, the best first."""
    if TASKS[task].metric == "accuracy":
        # Accuracies are counts divided by rows: rounding errors must not break ties.
        means["accuracy"] = means["accuracy"].round(6)
        order = {"by": ["accuracy", "validation_loss"], "ascending": [False, True]}
    else:
        order = {"by": "validation_loss"}
    return means.sort_values(**order, kind="stable")
