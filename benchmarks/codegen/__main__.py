"""What the compilers made of the kernels: registers, spills, widths of access, occupancy.

    python -m benchmarks.codegen [--out FILE]

Needs no GPU. Prints a table; exits with 1 if a bound is broken or a backend is not available.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from .._harness import options, records
from . import cuda, triton
from .bounds import Row

HEADER = (
    "backend kernel                dtype     state     delta     arch    registers  stack  local"
    " shared  ld128  st128  threads/SM occupancy  in flight/SM"
)


def line(row: Row) -> str:
    return (
        f"{row.backend:8}{row.kernel:22}{row.dtype:10}{row.state:10}{row.delta:10}"
        f"sm_{row.architecture:<5}{row.registers:>9}{row.stack:>7}{row.local:>7}{row.shared:>7}{row.loads:>7}"
        f"{row.stores:>7}{row.threads:>12}{row.occupancy:>10.0%}{row.in_flight // 1024:>10} KiB"
        f"  {'; '.join(row.broken)}"
    ).rstrip()


def without_triton() -> str:
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


SOURCES = {
    "cuda": (cuda.absent, cuda.rows),
    "triton": (without_triton, triton.rows),
}


def main(arguments: list[str] | None = None) -> int:
    parser = options.parser("codegen", __doc__)
    parser.add_argument("--out", type=Path, help="also write the rows to this CSV file")
    chosen = parser.parse_args(arguments)
    print(HEADER)
    rows, absent = [], {}
    for backend, (why_absent, source) in SOURCES.items():
        if why := why_absent():
            absent[backend] = why
            print(f"{backend}: {why}")
            continue
        for row in source():
            print(line(row), flush=True)
            rows.append(row)
    if chosen.out:
        found = [{**row._asdict(), "broken": "; ".join(row.broken)} for row in rows]
        records.Record(records.environment() | {"absent": absent}, found).save(chosen.out)
    return int(bool(absent) or any(row.broken for row in rows))


if __name__ == "__main__":
    sys.exit(main())
