"""See the package: `python -m benchmarks.convergence --help`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from .._harness import options, records
from . import __doc__ as explained
from . import picture, protocol, summary, tables
from .runs import NO_LOSS, Spec, run
from .store import Store
from .tasks import TASKS

PARTS: dict[str, Callable[..., list[Spec]]] = {
    "grid": protocol.grid_runs,
    "compare": protocol.comparison_runs,
    "others": protocol.other_runs,
    "noloss": protocol.no_loss_runs,
    "shapes": protocol.shape_runs,
    "ablate": protocol.ablation_runs,
    "narrow": protocol.narrow_runs,
    "muon": protocol.muon_runs,
    "precision": protocol.precision_runs,
}

OVERRIDES = {
    "points": (int, "points of the first grid, an odd number"),
    "choosing": (tuple, "seeds of the grid"),
    "fresh": (tuple, "seeds of the comparison"),
    "horizons": (int, "the longest horizon, in multiples of T"),
}
"""The fields of a protocol that an option can override: type and description."""


def main() -> None:
    arguments = parse()
    chosen = protocol.QUICK if arguments.quick else protocol.Protocol()
    given = {name: getattr(arguments, name) for name in OVERRIDES}
    chosen = replace(
        chosen,
        **{name: OVERRIDES[name][0](value) for name, value in given.items() if value is not None},
    )
    store = Store(arguments.out, records.environment(arguments.commit))
    parts = [] if arguments.report else arguments.parts

    def wanted() -> list[Spec]:
        rows = store.rows()
        return [spec for part in parts for spec in PARTS[part](rows, arguments.tasks, chosen)]

    run_all(store, wanted, chosen.shorter, arguments.jobs)
    report(store, arguments.tasks, chosen)


def run_all(store: Store, wanted: Callable[[], list[Spec]], shorter: int, jobs: int) -> None:
    """Run what is wanted until nothing is, in ``jobs`` processes of one thread each."""
    spawned = multiprocessing.get_context("spawn")
    interval = 0.5 if sys.stderr.isatty() else 60
    with (
        ProcessPoolExecutor(
            jobs, mp_context=spawned, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
        tqdm(unit="run", mininterval=interval) as bar,
    ):
        running: dict[Future, Spec] = {}
        begun: set[Spec] = set()
        while True:
            # Longest first, so that no process is left alone with a long run at the end.
            specs = sorted(set(wanted()) - begun, key=_seconds, reverse=True)
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


def _seconds(spec: Spec) -> float:
    return spec.horizon * TASKS[spec.task].seconds


def report(store: Store, tasks: list[str], chosen: protocol.Protocol) -> None:
    """Print the tables of the rows so far and draw the picture."""
    rows = store.rows()
    tables.check_unique(rows)
    compared = tables.comparisons(rows, tasks, chosen)
    shaped = tables.comparisons(rows, tasks, chosen, shaped=True)
    without = tables.comparisons(rows, tasks, chosen, NO_LOSS)
    ranking = tables.ranking(rows, tasks, chosen)
    judged = {"the grid": compared, "the grid over shapes": shaped, "the grid, no loss": without}
    for title, table in (
        ("Mechanic beside the best of the grid, on fresh seeds", compared),
        ("Beside the best of a grid that chose its schedule too", shaped),
        ("Without the loss, beside the best of the grid", without),
        ("Beside other optimizers without a learning rate", ranking),
        (
            "Ablations: per cent of loss, or points of accuracy, behind the grid's best",
            tables.ablations(rows, tasks, chosen),
        ),
        (
            "Twins with a narrow state: per cent of loss, or points of accuracy, behind 32 bits",
            tables.narrow_states(rows, tasks, chosen),
        ),
        (
            "AdamW with a narrow state, at the best rate of the grid, behind AdamW",
            tables.narrow_rivals(rows, tasks, chosen),
        ),
        (
            "Muon and AdamW: behind the best of the grid of both rates, in per cent or points",
            tables.muons(rows, tasks, chosen),
        ),
        ("Low precision, the character model", tables.precisions(rows, chosen)),
        ("Summary, in per cent of loss or points of accuracy", summary.summary(judged)),
        ("Mean rank", summary.ranks(ranking)),
    ):
        if len(table):
            print(f"\n{title}\n\n{tables.markdown(table)}")
    if len(compared):
        print(f"\n{int(compared.met.sum())} of {len(compared)} comparisons met")
    # Draw every task in the file, not only those named: the picture belongs to the file.
    drawn = [task for task in TASKS if tables.select(rows, task, 1, "Mechanic AdamW").size]
    picture.draw(rows, drawn or tasks, chosen, store.path.with_suffix(".png"))
    print(f"{store.path.with_suffix('')}.csv, .png")


def parse() -> argparse.Namespace:
    parser = options.parser("convergence", explained)
    usual = [name for name, task in TASKS.items() if not task.on_request]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=usual, metavar="TASK")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["grid", "compare", "others"])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps, fewer seeds")
    parser.add_argument("--report", action="store_true", help="run nothing, print what is there")
    for name, (kind, text) in OVERRIDES.items():
        many = "+" if kind is tuple else None
        parser.add_argument(f"--{name}", type=int, nargs=many, metavar="N", help=text)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=options.at_least(1), default=cores)
    parser.add_argument("--commit", help="for a source tree without git history")
    parser.add_argument("--out", type=Path, help="the CSV file; the picture is drawn beside it")
    arguments = parser.parse_args()
    quick = records.ROOT / "out" / "convergence_quick.csv"
    usual_out = quick if arguments.quick else records.RESULTS / "convergence.csv"
    arguments.out = (arguments.out or usual_out).with_suffix(".csv")
    return arguments


if __name__ == "__main__":
    main()
