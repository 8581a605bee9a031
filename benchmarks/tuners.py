"""The other tuners beside the best of a grid of learning rates with the task's own schedule.

    python -m benchmarks.tuners                 # a quarter of an hour; goes on where it was
    python -m benchmarks.tuners --report        # the table of what is there

The grids are those of benchmarks.convergence, which must be complete for these tasks: each method
that needs a learning rate starts at the best of its base's grid, the others at one number for all
tasks. Seeds are the first of the fresh ones there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pandas

from . import records
from .convergence import protocol, tables
from .convergence.__main__ import run_all
from .convergence.runs import Spec
from .convergence.store import Store
from .convergence.tasks import TASKS
from .convergence.tuned import DETERMINISTIC, TUNED

NOISY = ("digits_mlp", "digits_conv", "char")
WHOLE = ("wine", "breast_cancer", "digits_mlp")
"""Tasks small enough to take all rows in each step."""

CHOSEN = protocol.Protocol()
SEEDS = CHOSEN.fresh[:3]


def best(grids: pandas.DataFrame, task: str, base: str) -> float:
    """Return the best learning rate of a base's grid."""
    rates = protocol.grid(grids, task, 1, base, CHOSEN)
    found = protocol.best(grids, task, 1, base, rates, CHOSEN)
    if found is None:
        raise SystemExit(f"the grid of {base} on {task} is not complete: make convergence first")
    return found


def specs(grids: pandas.DataFrame, methods: list[str]) -> list[Spec]:
    """Return all runs of these methods."""
    return [
        Spec(task, 1, name, started(grids, task, name), "", seed)
        for name in methods
        for task in (WHOLE if name in DETERMINISTIC else NOISY)
        for seed in SEEDS
    ]


def started(grids: pandas.DataFrame, task: str, name: str) -> float:
    start = TUNED[name].start
    return best(grids, task, TUNED[name].base) if isinstance(start, str) else start


def table(grids: pandas.DataFrame, rows: pandas.DataFrame, methods: list[str]) -> pandas.DataFrame:
    """Return a line for each method and task: its score, and how far behind the grid it is."""
    lines = []
    for name in methods:
        base = TUNED[name].base
        for task in WHOLE if name in DETERMINISTIC else NOISY:
            lr = started(grids, task, name)
            found = tables.of(rows, task, 1, name, lr=lr, seed=SEEDS)
            tuned = tables.of(grids, task, 1, base, lr=best(grids, task, base), seed=SEEDS)
            if len(found) == len(tuned) == len(SEEDS):
                lines.append(_line(name, base, task, lr, found, tuned))
    return pandas.DataFrame(lines)


def _line(
    name: str, base: str, task: str, lr: float, found: pandas.DataFrame, tuned: pandas.DataFrame
) -> dict[str, Any]:
    metric, score = TASKS[task].metric, tables.score(task)
    behind, half = tables.gap(tuned[score], found[score], metric)
    return {
        "method": name,
        "task": task,
        "metric": metric,
        "starts at": lr,
        "score": found[score].mean(),
        "grid with schedule": tuned[score].mean(),
        "grid of": base,
        "behind, %": 100 * behind,
        "± %": 100 * half,
        "largest lr": found.rate.mean(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuners",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", choices=TUNED, default=list(TUNED), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, into out/")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="without suffix; .csv and .json are written")
    arguments = parser.parse_args()
    folder = records.ROOT / "out" if arguments.quick else records.RESULTS
    out = arguments.out or folder / "tuners"
    conditions = records.conditions()
    grids = Store(records.RESULTS / "convergence.csv", "").rows()
    store = Store(out.with_suffix(".csv"), conditions["commit"])
    if not arguments.report:
        shorter = 10 if arguments.quick else 1
        wanted = specs(grids, arguments.methods)
        run_all(store, lambda: protocol.missing(store.rows(), wanted), shorter, arguments.jobs)
    found = table(grids, store.rows(), arguments.methods)
    print(f"\n{tables.shown(found)}")
    record = {
        "conditions": conditions,
        "commits of the runs": sorted(set(store.rows().commit)),
        "seeds": SEEDS,
        "table": tables.lines(found),
    }
    records.write(out.with_suffix(".json"), record)
    print(f"{out}.csv, .json")


if __name__ == "__main__":
    main()
