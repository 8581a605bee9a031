"""The bytes that a step must move, and the time that they alone would take: a prediction.

    python -m benchmarks.roofline [--copy 4.3e12] [--out FILE]

No step is timed. The bytes per parameter are counted in the plan of a real optimizer over a few
small weights: they depend on the dtype and on nothing else.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from ._harness import baselines, cases, options, records, tables
from ._harness.baselines import OptimizerSpec

COPY = 4.3e12
"""Measured speed of a large copy within an H200's memory: bytes read plus written a second."""

SMALL = ((64, 128),)
"""The shapes of the weights that bytes are counted for: large enough for a narrow state."""

OPTIMIZERS = (
    baselines.adamw("reference"),
    baselines.adamw("reference", decay=0.0),
    baselines.adamw("reference", x_ref_every=8),
    baselines.adamw("reference", optim_bits=16),
    baselines.adamw("reference", optim_bits=8),
    baselines.adamw("reference", optim_bits=8, x_ref_every=8),
    baselines.adamw("reference", optim_bits=8, bf16_stochastic_round=True),
    baselines.sgd("reference"),
    baselines.lion("reference"),
)
"""Any backend will do: all of them read the same tables."""


def bytes_per_parameter(spec: OptimizerSpec, dtype: torch.dtype) -> float:
    """Return what a step moves, from the plan of an optimizer that has taken one."""
    small = cases.Case("small", SMALL, dtype)
    device = torch.device("cpu")
    weights: list[Any] = [torch.nn.Parameter(x) for x in small.draw(device, 1.0, seed=0)]
    for x, g in zip(weights, small.draw(device, 1.0, seed=1), strict=True):
        x.grad = g
    optimizer = spec.make(weights)
    optimizer.step()
    return spec.bytes_per_parameter(optimizer, small.parameters, dtype)


def predicted(case: cases.Case, spec: OptimizerSpec, copy: float) -> records.Row:
    """Return the row of a case and an optimizer: bytes, and the time at ``copy`` bytes a second."""
    each = bytes_per_parameter(spec, case.dtype)
    return {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "optimizer": spec.name.replace(", reference", ""),
        "parameters": case.parameters,
        "bytes_per_parameter": each,
        "bytes": round(each * case.parameters),
        "predicted_s": each * case.parameters / copy,
    }


def table(rows: list[records.Row], copy: float) -> str:
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


def speed(text: str) -> float:
    """The type of --copy."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {value}")
    return value


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("roofline", __doc__)
    parser.add_argument("--copy", type=speed, default=COPY, help="bytes read + written a second")
    parser.add_argument("--out", type=Path, help="also write the rows to this CSV file")
    chosen = parser.parse_args(arguments)
    listed = {case.name: case for case in (*cases.GPU, *cases.CPU)}
    rows = [predicted(case, spec, chosen.copy) for case in listed.values() for spec in OPTIMIZERS]
    if chosen.out:
        environment = {**records.environment(), "copy bytes a second": chosen.copy}
        records.Record(environment, rows).save(chosen.out)
    print(table(rows, chosen.copy))
    print("\nPredictions from bytes alone, not measurements: they ignore launches and caches.")


if __name__ == "__main__":
    main()
