"""The bytes that a step must move, and the time that these alone would take: predicted, not timed.

    python -m benchmarks.roofline [--copy 4.3e12] [--out FILE]

The bytes are counted in the tables of the plan of a real optimizer over a miniature: as many
weights, of few elements each, because bytes grow with elements and with nothing else.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import cases, contenders, records, tables
from .contenders import Contender

COPY = 4.3e12
"""Bytes read and written a second by a large copy within an H200's memory, as measured."""

ELEMENTS = 16

BASES = (
    contenders.adamw("reference"),
    contenders.adamw("reference", decay=0.0),
    contenders.sgd("reference"),
    contenders.lion("reference"),
)
"""The backend does not matter: all of them work from the same tables."""


def miniature(case: cases.Case) -> cases.Case:
    """Return a case with as many weights of the same dtype, of ELEMENTS each."""
    return replace(case, shapes=((ELEMENTS,),) * len(case.shapes))


def bytes_per_parameter(contender: Contender, case: cases.Case) -> float:
    """Return what a step moves, from the plan of an optimizer that has made one."""
    small = miniature(case)
    device = torch.device("cpu")
    weights: list[Any] = [torch.nn.Parameter(x) for x in small.draw(device, 1.0, seed=0)]
    for x, g in zip(weights, small.draw(device, 1.0, seed=1), strict=True):
        x.grad = g
    optimizer = contender.make(weights)
    optimizer.step()
    return contender.bytes_per_parameter(optimizer, small.parameters, case.dtype)


def predicted(case: cases.Case, contender: Contender, copy: float) -> records.Row:
    """Return the row of a case and an optimizer: bytes, and the time at ``copy`` bytes a second."""
    each = bytes_per_parameter(contender, case)
    return {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "optimizer": contender.name.removesuffix(", reference"),
        "parameters": case.parameters,
        "bytes_per_parameter": each,
        "bytes": round(each * case.parameters),
        "predicted_s": each * case.parameters / copy,
    }


def shown(rows: list[records.Row], copy: float) -> str:
    headers = ["case", "optimizer", "bytes/param", "MB a step"]
    headers += [f"predicted ms at {copy / 1e12:g} TB/s"]
    lines = [
        [
            row["case"],
            row["optimizer"],
            f"{row['bytes_per_parameter']:g}",
            tables.shown(row["bytes"], 4, 1e6),
            tables.shown(row["predicted_s"], 3, 1e-3),
        ]
        for row in rows
    ]
    return tables.table(headers, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--copy", type=float, default=COPY, help="bytes read + written a second")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "roofline.json")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.copy < float("inf"):
        parser.error(f"--copy must be above 0, got {chosen.copy}")
    listed = {case.name: case for case in (*cases.GPU, *cases.CPU)}
    rows = [predicted(case, base, chosen.copy) for case in listed.values() for base in BASES]
    record = {
        "kind": "prediction: bytes over a copy's speed; no step was timed",
        "conditions": records.conditions(),
        "copy_bytes_per_second": chosen.copy,
        "rows": rows,
    }
    records.write(chosen.out, record)
    print(shown(rows, chosen.copy))
    print("\nPredictions from bytes alone, no measurements: launches and caches are not in them.")
    print(f"Written to {chosen.out}")


if __name__ == "__main__":
    sys.exit(main())
