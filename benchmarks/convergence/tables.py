"""What the rows say: each comparison with its interval, the ranking, the ablations."""

from __future__ import annotations

from typing import Any

import numpy
import pandas
from scipy import stats
from tabulate import tabulate

from . import precision
from .ablations import ARMS
from .methods import BASES, OTHERS
from .protocol import KEY, Protocol, Rows, best, cells, grid, grid_means
from .tasks import TASKS

WITHIN = {"loss": 0.02, "accuracy": 0.005}
"""How far behind the best of the grid Mechanic may be: 2 % of a loss, 0.5 points of an accuracy."""

STRICT = {"char": 0.01}
"""The tasks for which less is allowed."""


def score(task: str) -> str:
    """Return the column that a task is compared by."""
    return "validation_loss" if TASKS[task].metric == "loss" else "accuracy"


def of(rows: Rows, task: str, horizon: int, method: str, **more: Any) -> Rows:
    """Return the rows of one method in one comparison, by seed."""
    chosen = (rows.task == task) & (rows.horizon == horizon) & (rows.method == method)
    more.setdefault("arm", "")
    for name, value in more.items():
        chosen &= rows[name].isin(value) if isinstance(value, tuple) else rows[name] == value
    return rows[chosen].set_index("seed").sort_index()


def comparisons(rows: Rows, tasks: list[str], protocol: Protocol) -> Rows:
    """Return a line for each task, horizon and base whose runs are complete."""
    lines = []
    for task, horizon in cells(tasks, protocol):
        for base in BASES:
            line = _comparison(rows, task, horizon, base, protocol)
            if line is not None:
                lines.append(line)
    return pandas.DataFrame(lines)


def _comparison(
    rows: Rows, task: str, horizon: int, base: str, protocol: Protocol
) -> dict[str, Any] | None:
    rates = grid(rows, task, horizon, base, protocol)
    chosen = best(rows, task, horizon, base, rates, protocol)
    if chosen is None:
        return None
    fresh = {"seed": protocol.fresh, "arm": ""}
    tuned = of(rows, task, horizon, base, lr=chosen, **fresh)
    ours = of(rows, task, horizon, f"Mechanic {base}", **fresh)
    if not len(tuned) == len(ours) == len(protocol.fresh):
        return None
    metric = TASKS[task].metric
    behind, half = gap(tuned[score(task)], ours[score(task)], metric)
    means = grid_means(rows, task, horizon, base, rates, protocol)
    inside = rates[0] < chosen < rates[-1]
    return {
        "task": task,
        "steps": int(ours.steps.iloc[0]),
        "base": base,
        "metric": metric,
        "best lr": chosen,
        "inside": inside,
        "grid runs": len(means) * len(protocol.choosing),
        "grid": tuned[score(task)].mean(),
        "Mechanic": ours[score(task)].mean(),
        "behind": behind,
        "±": half,
        "met": bool(behind <= STRICT.get(task, WITHIN[metric])),
        "grid train": tuned.train_loss.mean(),
        "Mechanic train": ours.train_loss.mean(),
        "learned lr": ours.rate.mean(),
    }


def gap(tuned: pandas.Series, ours: pandas.Series, metric: str) -> tuple[float, float]:
    """Return by how much ours is worse, and half of the 95 % interval over the seeds, paired.

    Of a loss the ratio of the means less 1, of an accuracy the difference of the means.
    """
    differences = (ours - tuned) / tuned.mean() if metric == "loss" else tuned - ours
    n = len(differences)
    spread = differences.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(differences.mean()), float(stats.t.ppf(0.975, n - 1) * spread)


def ranking(rows: Rows, tasks: list[str], protocol: Protocol) -> Rows:
    """Return each method's score in each comparison, and its mean rank, the best first."""
    methods = [*(f"Mechanic {base}" for base in BASES), *OTHERS]
    scores, ranks = {}, {}
    for task, horizon in cells(tasks, protocol):
        found = {
            method: of(rows, task, horizon, method, arm="", seed=protocol.fresh)[score(task)]
            for method in methods
        }
        if any(len(values) < len(protocol.fresh) for values in found.values()):
            continue
        means = pandas.Series({method: values.mean() for method, values in found.items()})
        name = f"{task} ×{horizon}"
        scores[name] = means
        # Mechanic's three bases stand in turn for it against the others, so that no method has
        # more places in the ranking than another.
        for base in BASES:
            ours = f"Mechanic {base}"
            order = means[[ours, *OTHERS]].round(6)
            if TASKS[task].metric == "accuracy":
                order = -order
            ranks[name, base] = order.rename({ours: "Mechanic"}).rank()
    if not scores:
        return pandas.DataFrame()
    table = pandas.DataFrame(scores)
    places = pandas.DataFrame(ranks)
    for base in BASES:
        column = places.loc[:, [key for key in places.columns if key[1] == base]].mean(axis=1)
        column = column.rename({"Mechanic": f"Mechanic {base}"})
        table[f"rank with {base}"] = column
    return table


def ablations(rows: Rows, tasks: list[str], protocol: Protocol) -> Rows:
    """Return for each arm and base how far behind the best of the grid it is, task by task.

    On the seeds that the grid's best was chosen on, which favours the grid.
    """
    lines = []
    for base in BASES:
        for arm in (arm for arm, (bases, _) in ARMS.items() if base in bases):
            line: dict[str, Any] = {"base": base, "arm": arm}
            for task in tasks:
                rates = grid(rows, task, 1, base, protocol)
                means = grid_means(rows, task, 1, base, rates, protocol)
                found = of(rows, task, 1, f"Mechanic {base}", arm=arm, seed=protocol.choosing)
                if means is None or len(found) < len(protocol.choosing):
                    continue
                tuned, ours = means.iloc[0][score(task)], found[score(task)].mean()
                loss = TASKS[task].metric == "loss"
                line[task] = 100 * (ours / tuned - 1 if loss else tuned - ours)
            if len(line) > 2:
                lines.append(line)
    return pandas.DataFrame(lines)


def precisions(rows: Rows, protocol: Protocol) -> Rows:
    """Return the losses and the bytes a parameter of the runs in low precision."""
    lines = []
    for method, arms in precision.COMPARED.items():
        for arm in arms:
            found = of(rows, precision.TASK, 1, method, arm=arm, seed=protocol.fresh)
            if len(found):
                lines.append(
                    {
                        "method": method,
                        "precision": arm,
                        "seeds": len(found),
                        "train loss": found.train_loss.mean(),
                        "validation loss": found.validation_loss.mean(),
                        "spread over seeds": found.validation_loss.std(ddof=1),
                        "bytes a parameter": precision.bytes_of(method, arm),
                    }
                )
    return pandas.DataFrame(lines)


def check(rows: Rows) -> None:
    """Raise ValueError if any run is there twice: two programs wrote into one file."""
    twice = rows[rows.duplicated(KEY)]
    if len(twice):
        raise ValueError(f"runs must be there once, got {len(twice)} of them twice")


def lines(table: Rows) -> list[dict[str, Any]]:
    """Return a table's lines for JSON, without the cells that hold no number."""
    return [{k: v for k, v in line.items() if v == v} for line in table.to_dict("records")]


def shown(table: Rows) -> str:
    """Return a table as Markdown."""
    return tabulate(
        table.replace({numpy.nan: None}),
        headers="keys",
        tablefmt="github",
        floatfmt=".4g",
        showindex=not isinstance(table.index, pandas.RangeIndex),
    )
