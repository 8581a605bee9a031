"""Measured rows as Markdown tables, and the requirements that they must meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .records import Record, Row

DISTURBED = 0.1
"""Cores used by other processes above which step times are unreliable."""


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table that is readable in a terminal too."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def shown(value: float | None, digits: int = 3, unit: float = 1.0) -> str:
    """Return a number with ``digits`` significant digits, or a dash for None."""
    if value is None:
        return "–"
    value = value / unit
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def spread(row: Row, *keys: str, unit: float = 1.0) -> str:
    """Return two quartiles as one cell, empty where they were not measured."""
    if row.get(keys[0]) is None:
        return ""
    return "…".join(shown(row[key], 3, unit) for key in keys)


def step_table(rows: list[Row]) -> str:
    """Return the table of all measured steps."""
    headers = ["case", "optimizer", "ms", "quartiles", "ns/param", "bytes/param", "GB/s"]
    headers += ["of copy", "extra MB", "against", "ratio", "quartiles"]
    lines = []
    for row in rows:
        why = row.get("absent") or row.get("failed")
        if why:
            kind = "absent" if "absent" in row else "failed"
            lines.append([row["case"], row["optimizer"], kind, *[""] * 6, why[:60], "", ""])
        elif "median_s" in row:
            lines.append(
                [
                    row["case"],
                    row["optimizer"],
                    shown(row["median_s"], 3, 1e-3),
                    spread(row, "q1_s", "q3_s", unit=1e-3),
                    shown(row["median_s"] / row["parameters"], 3, 1e-9),
                    shown(row["bytes_per_parameter"]),
                    shown(bandwidth(row), 3, 1e9),
                    shown(row["of_copy"], 2),
                    f"{row['extra_bytes'] / 1e6:.1f}",
                    row.get("against", ""),
                    shown(row["ratio"]) if "ratio" in row else "",
                    spread(row, "ratio_q1", "ratio_q3"),
                ]
            )
    return table(headers, lines)


def bandwidth(row: Row) -> float:
    """Return the bytes a second of a measured step."""
    return row["bytes_per_parameter"] * row["parameters"] / row["median_s"]


@dataclass(frozen=True)
class Requirement:
    """A bound on a measured quantity.

    Args:
        case: the name of the case.
        top, bottom: the optimizers in the numerator and the denominator. Without ``bottom`` the
            bound is on a quantity of ``top`` alone.
        bound: the largest value, or with ``at_least`` the smallest.
        quantity: the key of the row.
        floor: also show the ratio of the bytes that the two must move.
    """

    case: str
    top: str
    bottom: str | None
    bound: float
    at_least: bool = False
    quantity: str = "ratio"
    floor: bool = False

    def judge(self, rows: list[Row], judged: bool = True) -> Row:
        """Return the measured value and whether it meets the bound; None if it was not measured."""
        row = self._find(rows, self.top, self.bottom, self.quantity) or {}
        value = row.get(self.quantity)
        met = None
        if judged and value is not None:
            met = value >= self.bound if self.at_least else value <= self.bound
        return {
            "what": self._title(),
            "bound": f"{'≥' if self.at_least else '≤'} {self.bound:g}",
            "floor": self._floor(rows) if self.floor else None,
            "measured": value,
            "quartiles": spread(row, "ratio_q1", "ratio_q3") if self.bottom else "",
            "of_medians": row.get("ratio_of_medians") if self.bottom else None,
            "met": met,
        }

    def _title(self) -> str:
        if self.bottom:
            return f"{self.top} / {self.bottom}"
        names = {"of_copy": "bytes a second / device copy", "launches": "launches a step"}
        return f"{self.top}, {names[self.quantity]}"

    def _find(self, rows: list[Row], name: str, against: str | None, key: str) -> Row | None:
        return next(
            (
                row
                for row in rows
                if (row["case"], row["optimizer"]) == (self.case, name)
                and row.get(key) is not None
                and (against is None or row.get("against") == against)
            ),
            None,
        )

    def _floor(self, rows: list[Row]) -> float | None:
        key = "bytes_per_parameter"
        top = self._find(rows, self.top, None, key)
        bottom = self._find(rows, self.bottom or "", None, key)
        return top[key] / bottom[key] if top and bottom else None


def requirement_table(requirements: list[Requirement], rows: list[Row], judged: bool) -> str:
    """Return the table of requirements; ``judged`` is false for miniatures."""
    headers = ["case", "what", "required", "floor by bytes", "median of pairs", "quartiles"]
    headers += ["ratio of medians", "met"]
    words: dict[Any, str] = {True: "yes", False: "NO", None: "not judged"}
    lines = []
    for requirement in requirements:
        found = requirement.judge(rows, judged)
        measured = found["measured"] is not None
        lines.append(
            [
                requirement.case,
                found["what"],
                found["bound"],
                shown(found["floor"]),
                shown(found["measured"]),
                found["quartiles"] or "–",
                shown(found["of_medians"]),
                words[found["met"]] if measured else "not measured",
            ]
        )
    return table(headers, lines)


def heading(record: Record) -> str:
    """Return the lines above any table: the environment, and what makes the figures unreliable."""
    environment = record.environment
    lines = [f"{key:<26} {value}" for key, value in environment.items()]
    if (environment.get("cores busy with other work") or 0) > DISTURBED:
        lines += ["", "WARNING: other processes ran on these cores. Do not quote these figures:"]
        lines += ["optimizers that split their work evenly among threads suffer more than ours."]
    if environment.get("miniature"):
        lines += ["", "Miniature cases: the figures mean nothing."]
    return "\n".join(lines)


def report(record: Record, requirements: list[Requirement], *more: str) -> str:
    """Return what the reader of a terminal should see of measured steps."""
    judged = not record.environment.get("miniature")
    parts = [heading(record), step_table(record.rows), *more]
    return "\n\n".join([*parts, requirement_table(requirements, record.rows, judged), ""])
