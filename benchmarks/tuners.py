"""The methods of mechanic_fused.tuners beside the best of a grid with the task's own schedule.

    python -m benchmarks.tuners                 # a quarter of an hour; run again, it resumes
    python -m benchmarks.tuners --report        # only the table

The grids are those of benchmarks.convergence and must be complete for these tasks. A method that
needs a learning rate starts at the best of its base's grid; the others start at the same number on
all tasks. The seeds are three on which the best of the grids has rows there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pandas

from ._harness import options, records
from .convergence import protocol, tables
from .convergence.__main__ import run_all
from .convergence.protocol import Rows
from .convergence.runs import Spec
from .convergence.store import Store
from .convergence.tasks import TASKS
from .convergence.tuned import DETERMINISTIC, TUNED

NOISY = ("digits_mlp", "digits_conv", "char")
FULL_BATCH = ("wine", "breast_cancer", "digits_mlp")
"""Tasks small enough to use all rows in each step."""

CHOSEN = protocol.Protocol()
SEEDS = (100, 101, 102)


def best(grids: Rows, task: str, base: str) -> float:
    """Return the best learning rate of a base's grid."""
    rates = protocol.grid(grids, task, 1, base, CHOSEN)
    found = protocol.best(grids, task, 1, base, rates, CHOSEN)
    if found is None:
        raise SystemExit(f"the grid of {base} on {task} is not complete: make convergence first")
    return found


def first_lr(grids: Rows, task: str, name: str) -> float:
    start = TUNED[name].start
    return best(grids, task, TUNED[name].base) if isinstance(start, str) else start


def tasks_of(name: str) -> tuple[str, ...]:
    return FULL_BATCH if name in DETERMINISTIC else NOISY


def specs(grids: Rows, methods: list[str]) -> list[Spec]:
    """Return all runs of these methods."""
    return [
        Spec(task, 1, name, first_lr(grids, task, name), "", seed)
        for name in methods
        for task in tasks_of(name)
        for seed in SEEDS
    ]


def table(grids: Rows, rows: Rows, methods: list[str]) -> Rows:
    """Return a row for each method and task: its score, and how far it is behind the grid."""
    lines = []
    for name, task in [(method, task) for method in methods for task in tasks_of(method)]:
        base, lr = TUNED[name].base, first_lr(grids, task, name)
        found = tables.select(rows, task, 1, name, lr=lr, seed=SEEDS)
        tuned = tables.select(grids, task, 1, base, lr=best(grids, task, base), seed=SEEDS)
        if not len(found) == len(tuned) == len(SEEDS):
            continue
        metric, score = TASKS[task].metric, tables.score(task)
        behind, half = tables.gap(tuned[score], found[score], metric)
        lines.append(
            {
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
        )
    return pandas.DataFrame(lines)


def main() -> None:
    parser = options.parser("tuners", __doc__)
    parser.add_argument("--methods", nargs="+", choices=TUNED, default=list(TUNED), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, into out/")
    parser.add_argument("--report", action="store_true", help="run nothing, print what is there")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=options.at_least(1), default=cores)
    parser.add_argument("--out", type=Path, help="the CSV file")
    chosen = parser.parse_args()
    folder = records.ROOT / "out" if chosen.quick else records.RESULTS
    out = (chosen.out or folder / "tuners").with_suffix(".csv")
    environment = records.environment()
    grids = Store(records.RESULTS / "convergence.csv", environment).rows()
    store = Store(out, environment)
    if not chosen.report:
        wanted = specs(grids, chosen.methods)
        shorter = 10 if chosen.quick else 1
        run_all(store, lambda: protocol.missing(store.rows(), wanted), shorter, chosen.jobs)
    print(f"\n{tables.markdown(table(grids, store.rows(), chosen.methods))}\n{out}")


if __name__ == "__main__":
    main()
