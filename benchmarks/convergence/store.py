"""The rows of all runs in a CSV file, one line appended as each run ends."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas

FIELDS = [
    *["task", "horizon", "method", "lr", "arm", "seed", "steps"],
    *["train_loss", "validation_loss", "accuracy", "rate", "seconds", "commit"],
]


class Store:
    """Rows that outlive the process. A line that was cut off in the middle is taken away.

    Args:
        path: of the CSV file, made with the first row.
        commit: written into each new row.
    """

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.commit = path, commit
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")
            path.write_bytes(whole[0] + whole[1])

    def rows(self) -> pandas.DataFrame:
        """Return all rows so far."""
        if not self.path.exists():
            return pandas.DataFrame(columns=FIELDS)
        rows = pandas.read_csv(self.path, dtype={"commit": str}, keep_default_na=False)
        missing = [name for name in FIELDS if name not in rows.columns]
        if missing:
            raise SystemExit(f"{self.path} has no columns {', '.join(missing)}: remove it")
        return rows

    def add(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {
            name: f"{value:.6g}" if isinstance(value, float) and name != "lr" else value
            for name, value in {**row, "commit": self.commit}.items()
        }
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(row)
