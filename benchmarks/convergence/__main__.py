"""See the package: `python -m benchmarks.convergence --help`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from .. import records
from . import __doc__ as explained
from . import picture, protocol, tables
from .runs import Spec, run
from .store import Store
from .tasks import TASKS

PARTS: dict[str, Callable[..., list[Spec]]] = {
    "grid": protocol.searched,
    "compare": protocol.compared,
    "ablate": protocol.ablated,
    "precision": protocol.narrowed,
}

SMALLER = {
    "points": (int, "points of the first grid, an odd number"),
    "choosing": (tuple, "seeds of the grid"),
    "fresh": (tuple, "seeds of the comparison"),
    "horizons": (int, "the longest horizon, in multiples of T"),
}
"""What can be asked for in place of a protocol's own: the type and what it is."""


def main() -> None:
    arguments = _arguments()
    chosen = protocol.QUICK if arguments.quick else protocol.Protocol()
    given = {name: getattr(arguments, name) for name in SMALLER}
    chosen = replace(
        chosen,
        **{name: SMALLER[name][0](value) for name, value in given.items() if value is not None},
    )
    tasks = arguments.tasks
    conditions = records.conditions(arguments.commit)
    store = Store(arguments.out.with_suffix(".csv"), conditions["commit"])
    parts = [] if arguments.report else arguments.parts

    def asked() -> list[Spec]:
        rows = store.rows()
        return [spec for part in parts for spec in PARTS[part](rows, tasks, chosen)]

    run_all(store, asked, chosen.shorter, arguments.jobs)
    report(store, tasks, chosen, conditions, arguments.out)


def run_all(store: Store, asked: Callable[[], list[Spec]], shorter: int, jobs: int) -> None:
    """Run what is asked for, and what is asked for then, in so many processes of one thread."""
    spawned = multiprocessing.get_context("spawn")
    pause = 0.5 if sys.stderr.isatty() else 60
    with (
        ProcessPoolExecutor(
            jobs, mp_context=spawned, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
        tqdm(unit="run", mininterval=pause) as bar,
    ):
        running: dict[Future, Spec] = {}
        begun: set[Spec] = set()
        while True:
            # The longest come first, so that no process is left alone with one at the end.
            specs = sorted(set(asked()) - begun, key=_length, reverse=True)
            bar.total = bar.n + len(specs) + len(running)
            for spec in specs[: 2 * jobs - len(running)]:
                running[pool.submit(run, spec, shorter)] = spec
                begun.add(spec)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                spec = running.pop(future)
                bar.set_postfix_str(f"{spec.task} ×{spec.horizon} {spec.method}", refresh=False)
                store.add(future.result())
                bar.update()


def _length(spec: Spec) -> float:
    return spec.horizon * TASKS[spec.task].seconds


def report(
    store: Store,
    tasks: list[str],
    chosen: protocol.Protocol,
    conditions: records.Row,
    out: Path,
) -> None:
    """Print the tables of the rows that are there, and write the JSON and the picture."""
    rows = store.rows()
    tables.check(rows)
    compared = tables.comparisons(rows, tasks, chosen)
    ranked = tables.ranking(rows, tasks, chosen)
    ablated = tables.ablations(rows, tasks, chosen)
    narrowed = tables.precisions(rows, chosen)
    for title, table in (
        ("Mechanic beside the best of the grid, on fresh seeds", compared),
        ("Beside other optimizers without a learning rate", ranked),
        ("Ablations: per cent of loss, or points of accuracy, behind the grid's best", ablated),
        ("Low precision, the character model", narrowed),
    ):
        if len(table):
            print(f"\n{title}\n\n{tables.shown(table)}")
    if len(compared):
        print(f"\n{int(compared.met.sum())} of {len(compared)} comparisons met")
    commits = sorted(set(rows.commit))
    record = {
        "conditions": conditions,
        "protocol": asdict(chosen),
        "commits of the runs": commits,
        "seconds of all runs": round(float(rows.seconds.sum())),
        "comparisons": tables.lines(compared),
        "ranking": tables.lines(ranked.reset_index(names="method")),
        "ablations": tables.lines(ablated),
        "precisions": tables.lines(narrowed),
    }
    records.write(out.with_suffix(".json"), record)
    caption = f"commit {', '.join(commits)}, torch {conditions['torch']}"
    picture.draw(rows, tasks, chosen, caption, out.with_suffix(".png"))
    print(f"{out}.csv, .json, .png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description=explained,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = [name for name, task in TASKS.items() if not task.on_request]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=usual, metavar="TASK")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["grid", "compare"])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, fewer seeds")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    for name, (kind, text) in SMALLER.items():
        many = "+" if kind is tuple else None
        parser.add_argument(f"--{name}", type=int, nargs=many, metavar="N", help=text)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--commit", help="for a tree without its history")
    parser.add_argument("--out", type=Path, help="without suffix; .csv, .json and .png are written")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {arguments.jobs}")
    if arguments.out is None:
        quick = records.ROOT / "out" / "convergence_quick"
        arguments.out = quick if arguments.quick else records.RESULTS / "convergence"
    return arguments


if __name__ == "__main__":
    main()
