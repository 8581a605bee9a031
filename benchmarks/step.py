"""Step times on the CPU: ours beside torch's own optimizers and beside mechanic-pytorch.

python -m benchmarks.step [--quick] [--cases 35M,1000x16] [--out FILE] [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from . import cases, contenders, measure, records, tables, timing
from .tables import Must

DUEL_SECONDS = 8.0
"""A slow opponent gets fewer rounds, so that the whole takes less than 12 minutes on 2 cores."""

COPY_SIZE = 1 << 28

OURS = contenders.adamw()
OURS_PLAIN = contenders.adamw(decay=0.0)
OURS_NARROW = contenders.adamw(narrow_delta=True)
OURS_SGD = contenders.sgd()
FUSED = contenders.torch_adamw("fused")
FUSED_PLAIN = contenders.torch_adamw("fused", decay=0.0)
FOREACH = contenders.torch_adamw("foreach")
SGD_FUSED = contenders.torch_sgd("fused")
SGD_FOREACH = contenders.torch_sgd("foreach")
THEIRS = contenders.mechanic_pytorch()
THEIRS_FUSED = contenders.mechanic_pytorch(fused=True)

PAIRS = [(OURS, FUSED), (FOREACH, FUSED), (THEIRS_FUSED, OURS), (THEIRS, OURS)]
MORE_PAIRS = [
    (OURS_PLAIN, FUSED_PLAIN),
    (OURS_SGD, SGD_FUSED),
    (SGD_FOREACH, SGD_FUSED),
]
"""Only for the case whose requirements name them."""

REQUIRED = [
    Must("35M", OURS.name, FUSED.name, 1.70, floor=True),
    Must("35M", OURS_PLAIN.name, FUSED_PLAIN.name, 1.52, floor=True),
    Must("35M", OURS_SGD.name, SGD_FUSED.name, 1.75, floor=True),
    Must("35M", THEIRS_FUSED.name, OURS.name, 4.2, at_least=True),
    Must("35M", THEIRS.name, OURS.name, 8.0, at_least=True),
    Must("1000x1000", OURS.name, FUSED.name, 0.6),
    Must("1000x16", OURS.name, FUSED.name, 0.6),
]


def options(arguments: list[str] | None) -> argparse.Namespace:
    names = [case.name for case in cases.CPU]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="miniatures: does it run at all?")
    parser.add_argument("--cases", default=",".join(names), help="names with commas between")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "step.json")
    parser.add_argument("--rounds", type=int, default=31, help="at most so many of a duel")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(arguments)
    chosen.cases = chosen.cases.split(",")
    unknown = set(chosen.cases) - set(names)
    if unknown:
        parser.error(f"--cases must be among {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if chosen.rounds < 3:
        parser.error(f"--rounds must be 3 or more, got {chosen.rounds}")
    if chosen.threads < 1:
        parser.error(f"--threads must be 1 or more, got {chosen.threads}")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    chosen = options(arguments)
    torch.set_num_threads(chosen.threads)
    device = torch.device("cpu")
    began = time.perf_counter()
    bystanders = records.Bystanders()
    copy = timing.copy_speed(device, COPY_SIZE >> 6 if chosen.quick else COPY_SIZE)
    effort = measure.Effort(
        rounds=3 if chosen.quick else chosen.rounds,
        seconds=0.1 if chosen.quick else DUEL_SECONDS,
        copy=copy,
    )
    record = {
        "conditions": {
            **records.conditions(),
            "copy GB/s": round(copy / 1e9, 2),
            "method": "A B A B … in one process, one step a sample; gradients change sign each "
            "round; copy counts bytes read + written",
        },
        "quick": chosen.quick,
        "rows": [],
        "required": [],
    }
    for case in cases.CPU:
        if case.name not in chosen.cases:
            continue
        pairs = PAIRS + MORE_PAIRS * (case.name == "35M")
        pairs += [(OURS_NARROW, FUSED)] * (case.dtype is torch.bfloat16)
        small = case.shrunk() if chosen.quick else case
        for row in measure.rows_of(small, pairs, device, effort):
            record["rows"].append(row)
            progress(row)
            record["conditions"]["cores busy with other work"] = bystanders.cores()
            records.write(chosen.out, record)
    record["required"] = [must.judge(record["rows"], not chosen.quick) for must in REQUIRED]
    record["conditions"]["seconds"] = round(time.perf_counter() - began)
    records.write(chosen.out, record)
    print(tables.report(record))
    print(f"Written to {chosen.out}")


def progress(row: records.Row) -> None:
    """Say what was just measured, to people and not into the report."""
    took = tables.shown(row.get("median_s"), 3, 1e-3)
    ratio = f", {tables.shown(row['ratio'])} × {row['against']}" if row.get("ratio") else ""
    why = row.get("absent") or row.get("failed") or f"{took} ms{ratio}"
    print(f"{row['case']:<12} {row['optimizer']:<32} {why}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
