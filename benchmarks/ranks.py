"""What a step over sharded weights spends in the all-reduce of its sums, on gloo ranks of one CPU.

python -m benchmarks.ranks [--quick] [--cases 35M,1000x1000] [--layouts fsdp2,fsdp2xtp]
                           [--rounds N] [--out FILE]

fsdp2 runs on 2 ranks, fsdp2xtp on 4 as 2 x 2; each rank has one thread. Gradients are made once and
placed as the weights are, so that what is measured is the optimizer alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from . import records, tables
from .rank_work import CASES, LAYOUTS, work
from .records import Row
from .tables import shown


def run(layout: str, names: list[str], rounds: int, quick: bool) -> list[Row]:
    """Start the ranks of a layout, wait for them, and return the rows."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            work, (layout, names, rounds, quick, folder), nprocs=LAYOUTS[layout]
        )
        return json.loads(Path(folder, f"{layout}.json").read_text())


def rank_table(rows: list[Row]) -> str:
    """Return the table of all rows."""
    headers = ["case", "layout", "optimizer", "ms", "quartiles", "× torch", "all-reduce ms"]
    headers += ["least of all ranks", "share", "collectives", "bytes"]
    lines = []
    for row in rows:
        first = [row["case"], row["layout"], row["optimizer"]]
        if "failed" in row:
            lines.append([*first, "failed", row["failed"][:60], *[""] * 6])
            continue
        share = row["share"]
        lines.append(
            [
                *first,
                shown(row["median_s"], 3, 1e-3),
                f"{shown(row['q1_s'], 3, 1e-3)}…{shown(row['q3_s'], 3, 1e-3)}",
                shown(row["of_torch"]),
                shown(row["reduce_s"], 3, 1e-3),
                shown(row["reduce_least_s"], 3, 1e-3),
                "–" if share is None else f"{share:.1%}",
                str(row["collectives"]),
                shown(row["collective_bytes"], 1),
            ]
        )
    return tables.table(headers, lines)


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="miniatures: does it run at all?")
    parser.add_argument("--cases", default=",".join(CASES), help="names with commas between")
    parser.add_argument("--layouts", default="fsdp2", help="names with commas between")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "ranks.json")
    chosen = parser.parse_args(arguments)
    for name, known in (("cases", CASES), ("layouts", LAYOUTS)):
        given = getattr(chosen, name).split(",")
        unknown = [word for word in given if word not in known]
        if unknown:
            parser.error(f"--{name} must be among {', '.join(known)}, got {', '.join(unknown)}")
        setattr(chosen, name, given)
    if chosen.rounds < 3:
        parser.error(f"--rounds must be 3 or more, got {chosen.rounds}")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    chosen = options(arguments)
    torch.set_num_threads(1)
    bystanders = records.Bystanders()
    conditions = {
        **records.conditions(),
        "method": "A B C A B C … after a barrier each; a step is the slowest rank's, an all-reduce "
        "the mean of all ranks, waiting included; gloo, one thread a rank, one machine",
    }
    rows = []
    for layout in chosen.layouts:
        if LAYOUTS[layout] > (conditions["cores"] or 1):
            print(f"{layout}: {LAYOUTS[layout]} ranks share the cores and wait", file=sys.stderr)
        rows += run(layout, chosen.cases, 3 if chosen.quick else chosen.rounds, chosen.quick)
    conditions["cores busy with other work"] = bystanders.cores()
    record = {"conditions": conditions, "quick": chosen.quick, "rows": rows}
    records.write(chosen.out, record)
    print(*tables.heading(record), "", rank_table(rows), "", sep="\n")
    print(f"Written to {chosen.out}")


if __name__ == "__main__":
    main()
