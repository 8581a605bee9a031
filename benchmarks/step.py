"""Step times on the CPU, beside torch's own optimizers and mechanic-pytorch.

python -m benchmarks.step [--quick] [--cases 35M,1000x16] [--out FILE] [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from ._harness import baselines, cases, measure, options, records, tables, timing
from ._harness.records import Record
from ._harness.tables import Requirement

PAIR_SECONDS = 8.0
"""Slow optimizers get fewer rounds, so that the whole takes less than 12 minutes on 2 cores."""

COPY_SIZE = 1 << 28

OURS = baselines.adamw()
OURS_PLAIN = baselines.adamw(decay=0.0)
OURS_EXACT = baselines.adamw(variant="annealed")
OURS_BF16_DELTA = baselines.adamw(variant="annealed", delta_dtype=torch.bfloat16)
OURS_PART = baselines.adamw(x_ref_every=8)
OURS_8 = baselines.adamw(optim_bits=8)
OURS_16 = baselines.adamw(optim_bits=16)
OURS_8_PART = baselines.adamw(optim_bits=8, x_ref_every=8)
OURS_8_ROUNDED = baselines.adamw(optim_bits=8, bf16_stochastic_round=True)
OURS_SGD = baselines.sgd()
OURS_MUON = baselines.muon()
FUSED = baselines.torch_adamw("fused")
FUSED_PLAIN = baselines.torch_adamw("fused", decay=0.0)
FOREACH = baselines.torch_adamw("foreach")
SGD_FUSED = baselines.torch_sgd("fused")
SGD_FOREACH = baselines.torch_sgd("foreach")
FUSED_MASTERS = baselines.adamw_of_masters()
TORCH_MUON = baselines.torch_muon()
THEIRS = baselines.mechanic_pytorch()
THEIRS_FUSED = baselines.mechanic_pytorch(fused=True)

PAIRS = [(OURS, FUSED), (FOREACH, FUSED), (THEIRS_FUSED, OURS), (THEIRS, OURS)]
MORE_PAIRS = [
    (OURS_EXACT, FUSED),
    (OURS_PART, FUSED),
    (OURS_PART, OURS),
    (OURS_8, FUSED),
    (OURS_16, FUSED),
    (OURS_8_PART, FUSED),
    (OURS_PLAIN, FUSED_PLAIN),
    (OURS_SGD, SGD_FUSED),
    (SGD_FOREACH, SGD_FUSED),
]
"""Only for 35M, whose requirements name them."""

BF16_PAIRS = [
    (OURS, FUSED_MASTERS),
    (OURS_PART, FUSED_MASTERS),
    (OURS_BF16_DELTA, FUSED),
    (OURS_8, FUSED_MASTERS),
    (OURS_8_ROUNDED, FUSED_MASTERS),
    (OURS_16, FUSED_MASTERS),
]

MUON_PAIRS = [(OURS_MUON, TORCH_MUON), (baselines.muon(8), TORCH_MUON)]

REQUIRED = [
    Requirement("35M", OURS.name, FUSED.name, 1.25, floor=True),
    Requirement("35M", OURS_PLAIN.name, FUSED_PLAIN.name, 1.25, floor=True),
    Requirement("35M", OURS_SGD.name, SGD_FUSED.name, 1.35, floor=True),
    Requirement("35M", OURS_PART.name, FUSED.name, 1.12, floor=True),
    Requirement("35M", OURS_16.name, FUSED.name, 1.0, floor=True),
    Requirement("35M", OURS_8.name, FUSED.name, 1.0, floor=True),
    Requirement("35M-bf16", OURS.name, FUSED_MASTERS.name, 1.20, floor=True),
    Requirement("35M", OURS_EXACT.name, FUSED.name, 1.70, floor=True),
    Requirement("35M", THEIRS_FUSED.name, OURS.name, 4.2, at_least=True),
    Requirement("35M", THEIRS.name, OURS.name, 8.0, at_least=True),
    Requirement("1000x1000", OURS.name, FUSED.name, 0.6),
    Requirement("1000x16", OURS.name, FUSED.name, 0.6),
    Requirement(cases.MUON, OURS_MUON.name, TORCH_MUON.name, 0.7),
]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [case.name for case in cases.CPU]
    parser = options.parser("step", __doc__, "step.csv")
    parser.add_argument("--quick", action="store_true", help="miniatures: does it run at all?")
    parser.add_argument("--cases", type=options.names_among(names), default=names)
    parser.add_argument("--rounds", type=options.at_least(3), default=31, help="most of a pair")
    parser.add_argument("--threads", type=options.at_least(1), default=torch.get_num_threads())
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    record = Record.load(chosen.out) if chosen.report else run(chosen)
    print(tables.report(record, REQUIRED))


def run(chosen: argparse.Namespace) -> Record:
    torch.set_num_threads(chosen.threads)
    device = torch.device("cpu")
    began = time.perf_counter()
    load = records.BackgroundLoad()
    copy = timing.copy_speed(device, COPY_SIZE >> 6 if chosen.quick else COPY_SIZE)
    budget = measure.Budget(
        rounds=3 if chosen.quick else chosen.rounds,
        seconds=0.1 if chosen.quick else PAIR_SECONDS,
        copy=copy,
    )
    record = Record(
        {
            **records.environment(miniature=chosen.quick),
            "copy GB/s": round(copy / 1e9, 2),
            "method": "A B A B … in one process, one step a sample; gradients change sign each "
            "round; copy counts bytes read + written",
        }
    )
    for case in cases.CPU:
        if case.name not in chosen.cases:
            continue
        pairs = PAIRS + MORE_PAIRS * (case.name == "35M")
        pairs = MUON_PAIRS if case.name == cases.MUON else pairs
        pairs += BF16_PAIRS * (case.dtype is torch.bfloat16)
        small = case.shrunk() if chosen.quick else case
        for row in measure.measure_case(small, pairs, device, budget):
            record.rows.append(row)
            progress(row)
            record.environment["cores busy with other work"] = load.cores()
            record.save(chosen.out)
    record.environment["seconds"] = round(time.perf_counter() - began)
    record.save(chosen.out)
    return record


def progress(row: records.Row) -> None:
    """Report a new row on stderr, apart from the tables."""
    took = tables.shown(row.get("median_s"), 3, 1e-3)
    ratio = f", {tables.shown(row['ratio'])} × {row['against']}" if "ratio" in row else ""
    why = row.get("absent") or row.get("failed") or f"{took} ms{ratio}"
    print(f"{row['case']:<12} {row['optimizer']:<32} {why}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
