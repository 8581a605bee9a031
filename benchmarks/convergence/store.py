"""The rows of all runs in a CSV file; a line is appended as each run ends."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas

from .._harness.records import Row, compact, number_of

FIELDS = [
    *["task", "horizon", "method", "lr", "arm", "seed"],
    *["train_loss", "validation_loss", "accuracy", "rate", "environment"],
]


class Store:
    """Rows that outlive the process. A line that was cut off is removed.

    Args:
        path: of the CSV file, made with the first row.
        environment: of new rows; they hold its number in environments.json.
    """

    def __init__(self, path: Path, environment: Row) -> None:
        self.path, self.environment = path, environment
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")
            path.write_bytes(whole[0] + whole[1])

    def rows(self) -> pandas.DataFrame:
        """Return all rows so far."""
        if not self.path.exists():
            return pandas.DataFrame(columns=FIELDS)
        blank = {"accuracy": [""]}
        rows = pandas.read_csv(self.path, na_values=blank, keep_default_na=False)
        missing = [name for name in FIELDS if name not in rows.columns]
        if missing:
            raise SystemExit(f"{self.path} has no columns {', '.join(missing)}: remove it")
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; the lr is exact, since rows are found by it.

        What a task is not judged by has as many digits as tables show.
        """
        unjudged = {"train_loss", "rate"}
        if row.get("accuracy") is not None:
            unjudged.add("validation_loss")
        row = {
            name: value if name == "lr" else compact(value, 4 if name in unjudged else 6)
            for name, value in row.items()
        }
        row["environment"] = number_of(self.path, self.environment)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
