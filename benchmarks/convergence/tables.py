"""Tables of the rows: the comparisons with their intervals, the ranking, the ablations."""

from __future__ import annotations

import math
from typing import Any

import pandas
from scipy import stats
from tabulate import tabulate

from . import muon, narrow_state, precision
from .ablations import ARMS
from .methods import BASES, OTHERS
from .protocol import (
    KEY,
    Protocol,
    Rows,
    best_of_muon,
    best_shape,
    cells,
    grid,
    grid_means,
    shapes,
)
from .runs import steps_of
from .tasks import TASKS

WITHIN = {"loss": 0.01, "accuracy": 0.005}
"""How far Mechanic may be behind the best of the grid: 1 % of a loss, 0.5 points of accuracy."""


def score(task: str) -> str:
    """Return the column that is compared."""
    return "validation_loss" if TASKS[task].metric == "loss" else "accuracy"


def select(rows: Rows, task: str, horizon: int, method: str, **more: Any) -> Rows:
    """Return the rows of one method in one comparison, indexed by seed."""
    chosen = (rows.task == task) & (rows.horizon == horizon) & (rows.method == method)
    more.setdefault("arm", "")
    for name, value in more.items():
        chosen &= rows[name].isin(value) if isinstance(value, tuple) else rows[name] == value
    return rows[chosen].set_index("seed").sort_index()


def comparisons(
    rows: Rows, tasks: list[str], protocol: Protocol, arm: str = "", shaped: bool = False
) -> Rows:
    """Return a row for each task, horizon and base whose runs are complete.

    Args:
        arm: of Mechanic.
        shaped: beside the grid that chose its schedule too, where there is a choice.
    """
    lines = []
    for task, horizon in cells(tasks, protocol):
        among = shapes(task) if shaped else ("",)
        for base in TASKS[task].bases if len(among) > shaped else ():
            line = _comparison(rows, task, horizon, base, protocol, arm, among)
            if line is not None:
                lines.append(line)
    return pandas.DataFrame(lines)


def _comparison(
    rows: Rows,
    task: str,
    horizon: int,
    base: str,
    protocol: Protocol,
    arm: str,
    among: tuple[str, ...],
) -> dict[str, Any] | None:
    chosen = best_shape(rows, task, horizon, base, protocol, among)
    if chosen is None:
        return None
    shape, lr = chosen
    tuned = select(rows, task, horizon, base, lr=lr, arm=shape, seed=protocol.fresh)
    ours = select(rows, task, horizon, f"Mechanic {base}", arm=arm, seed=protocol.fresh)
    if not len(tuned) == len(ours) == len(protocol.fresh):
        return None
    metric = TASKS[task].metric
    behind, half = gap(tuned[score(task)], ours[score(task)], metric)
    grids = {name: grid(rows, task, horizon, base, protocol, name) for name in among}
    return {
        "task": task,
        "horizon": horizon,
        "steps": steps_of(task, horizon, protocol.shorter),
        "base": base,
        "metric": metric,
        **({"shape": shape or TASKS[task].schedule} if len(among) > 1 else {}),
        "best lr": lr,
        "inside": grids[shape][0] < lr < grids[shape][-1],
        "grid runs": sum(map(len, grids.values())) * len(protocol.choosing),
        "grid": tuned[score(task)].mean(),
        "Mechanic": ours[score(task)].mean(),
        "behind": behind,
        "±": half,
        "met": bool(behind <= WITHIN[metric]),
        "by seed": by_seed(tuned[score(task)], ours[score(task)], metric),
        "grid train": tuned.train_loss.mean(),
        "Mechanic train": ours.train_loss.mean(),
        "learned lr": ours.rate.mean(),
    }


def gap(tuned: pandas.Series, ours: pandas.Series, metric: str) -> tuple[float, float]:
    """Return how much worse ours is, and half of the paired 95 % interval over the seeds.

    For a loss it is the ratio of the means minus 1, for an accuracy the difference of the means.
    """
    differences = (ours - tuned) / tuned.mean() if metric == "loss" else tuned - ours
    n = len(differences)
    spread = differences.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return float(differences.mean()), float(stats.t.ppf(0.975, n - 1) * spread)


def by_seed(tuned: pandas.Series, ours: pandas.Series, metric: str) -> tuple[float, ...]:
    """Return how much worse each run of ours is than that on the same seed."""
    return tuple(ours / tuned - 1 if metric == "loss" else tuned - ours)


def ranking(rows: Rows, tasks: list[str], protocol: Protocol) -> Rows:
    """Return each method's score in each comparison, and its mean rank with each base."""
    methods = [*(f"Mechanic {base}" for base in BASES), *OTHERS]
    scores, ranks = {}, {}
    for task, horizon in cells(tasks, protocol):
        found = {
            method: select(rows, task, horizon, method, arm="", seed=protocol.fresh)[score(task)]
            for method in methods
        }
        if any(len(values) < len(protocol.fresh) for values in found.values()):
            continue
        means = pandas.Series({method: values.mean() for method, values in found.items()})
        name = f"{task} ×{horizon}"
        scores[name] = means
        # Each base of Mechanic is ranked against the others alone, so that every method has one
        # place in a ranking.
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
    """Return how far each arm and base is behind the best of the grid, for each task.

    Both are on the seeds on which the grid's best was chosen, which favours the grid.
    """
    lines = []
    for base in BASES:
        for arm in (arm for arm, (bases, _) in ARMS.items() if base in bases):
            line: dict[str, Any] = {"base": base, "arm": arm}
            for task in tasks:
                rates = grid(rows, task, 1, base, protocol)
                means = grid_means(rows, task, 1, base, rates, protocol)
                found = select(rows, task, 1, f"Mechanic {base}", arm=arm, seed=protocol.choosing)
                if means is None or len(found) < len(protocol.choosing):
                    continue
                tuned, ours = means.iloc[0][score(task)], found[score(task)].mean()
                loss = TASKS[task].metric == "loss"
                line[task] = 100 * (ours / tuned - 1 if loss else tuned - ours)
            if len(line) > 2:
                lines.append(line)
    return pandas.DataFrame(lines)


def narrow_states(rows: Rows, tasks: list[str], protocol: Protocol) -> Rows:
    """Return how far Mechanic with a narrow state is behind its twins with a wide one.

    Mean and worst of the seeds of a task, and of all tasks with the same β₂, each task once. The
    control is as wide as they are, and differs in nothing but roundings.
    """
    lines = []
    for beta2 in narrow_state.BETAS2:
        wide, *narrow = [narrow_state.arm(beta2, bits) for bits in narrow_state.BITS]
        named = {
            arm: f"{bits} bits" for arm, bits in zip(narrow, narrow_state.BITS[1:], strict=True)
        }
        named[narrow_state.control(beta2)] = "control"
        found = _behind(rows, tasks, protocol, "Mechanic AdamW", wide, named)
        lines += [{"task": line.pop("task"), "beta2": beta2, **line} for line in found]
    return pandas.DataFrame(lines)


def narrow_rivals(rows: Rows, tasks: list[str], protocol: Protocol) -> Rows:
    """Return the same of AdamW with a narrow state, at the best rate of its grid in 32 bits."""
    named = {arm: arm for arm in narrow_state.RIVALS}
    return pandas.DataFrame(_behind(rows, tasks, protocol, "AdamW", "", named))


def _behind(
    rows: Rows,
    tasks: list[str],
    protocol: Protocol,
    method: str,
    wide: str,
    named: dict[str, str],
) -> list[dict[str, Any]]:
    """Return a line for each task, and one of all, with the mean and the worst of each arm."""
    lines: list[dict[str, Any]] = []
    for task in (task for task in tasks if task in narrow_state.TASKS):
        loss = TASKS[task].metric == "loss"
        twins = select(rows, task, 1, method, arm=wide, seed=protocol.fresh)[score(task)]
        line: dict[str, Any] = {"task": task, "seeds": len(twins)}
        for arm, name in named.items():
            found = select(rows, task, 1, method, arm=arm, seed=protocol.fresh)[score(task)]
            found = found[found.index.isin(twins.index)]
            behind = found / twins[found.index] - 1 if loss else twins[found.index] - found
            line[f"{name}, mean"] = 100 * behind.mean()
            line[f"{name}, worst"] = 100 * behind.max()
        if any(map(math.isfinite, list(line.values())[2:])):
            lines.append(line)
    if lines:
        each = pandas.DataFrame(lines)
        ends = {name: "max" if name.endswith("worst") else "mean" for name in each.columns[2:]}
        lines.append({"task": "all", "seeds": each.seeds.sum(), **each.agg(ends).to_dict()})
    return lines


def muons(rows: Rows, tasks: list[str], protocol: Protocol) -> Rows:
    """Return Mechanic around Muon beside the best of its grid, and both around AdamW.

    Behind: the mean over fresh seeds, and its 95 % interval over seeds.
    """
    lines = []
    for task, horizon in cells([task for task in tasks if task in muon.TASKS], protocol):
        found = best_of_muon(rows, task, horizon, protocol)
        if found is None:
            continue
        loss, column, fresh = TASKS[task].metric == "loss", score(task), protocol.fresh

        def of(method: str, *, lr: float | None = None, arm: str = "") -> Any:
            more = {} if lr is None else {"lr": lr}
            picked = select(rows, task, horizon, method, arm=arm, seed=fresh, **more)  # noqa: B023
            return picked[column]  # noqa: B023

        lr, arm = found
        tuned = of("Muon", lr=lr, arm=arm)
        line: dict[str, Any] = {
            "task": task,
            "steps": steps_of(task, horizon),
            "lr": lr,
            "of AdamW": lr * muon.ARMS[arm],
            "tuned Muon": tuned.mean(),
            muon.OURS: of(muon.OURS).mean(),
        }
        for name, other in (("behind", ""), *((each, each) for each in muon.OTHER_LRS)):
            ours = of(muon.OURS, arm=other)
            behind = 100 * (ours / tuned - 1 if loss else tuned - ours)
            line[name] = behind.mean()
            if not other:
                line["±"] = behind.sem() * stats.t.ppf(0.975, max(1, len(behind) - 1))
        rates = grid(rows, task, horizon, "AdamW", protocol)
        means = grid_means(rows, task, horizon, "AdamW", rates, protocol)
        if means is not None:
            line["tuned AdamW"] = of("AdamW", lr=float(means.index[0])).mean()
        line["Mechanic AdamW"] = of("Mechanic AdamW").mean()
        lines.append(line)
    return pandas.DataFrame(lines)


def precisions(rows: Rows, protocol: Protocol) -> Rows:
    """Return the losses and the bytes per parameter of the runs in low precision."""
    lines = []
    for method, arms in precision.COMPARED.items():
        for arm in arms:
            found = select(rows, precision.TASK, 1, method, arm=arm, seed=protocol.fresh)
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


def check_unique(rows: Rows) -> None:
    """Raise ValueError if a run has two rows, because two programs wrote to one file."""
    twice = rows[rows.duplicated(KEY)]
    if len(twice):
        raise ValueError(f"each run must have one row, got {len(twice)} runs with two")


def markdown(table: Rows) -> str:
    """Return a table as Markdown; tuples are in per cent or points."""

    def cell(value: Any) -> Any:
        if isinstance(value, tuple):
            return " ".join(f"{100 * part:+.1f}" for part in value)
        return value

    return tabulate(
        table.astype(object).where(table.notna(), None).map(cell),
        headers="keys",
        tablefmt="github",
        floatfmt=".4g",
        showindex=not isinstance(table.index, pandas.RangeIndex),
    )
