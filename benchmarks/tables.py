"""A run in words: tables of what was measured and of what was required.

python -m benchmarks.tables FILE.json
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from .records import Row

DISTURBED = 0.1
"""Cores that others may use while the processor is measured."""


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, which reads well in a terminal too; texts left, numbers right."""
    try:
        from tabulate import tabulate
    except ImportError:
        widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
        lines = [headers, ["-" * width for width in widths], *rows]
        return "\n".join(
            "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
            for line in lines
        )
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def shown(value: float | None, digits: int = 3, unit: float = 1.0) -> str:
    """Return a number to ``digits`` significant digits, or a dash."""
    if value is None:
        return "–"
    value = value / unit
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


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
            continue
        against = row["against"] is not None
        lines.append(
            [
                row["case"],
                row["optimizer"],
                shown(row["median_s"], 3, 1e-3),
                f"{shown(row['q1_s'], 3, 1e-3)}…{shown(row['q3_s'], 3, 1e-3)}",
                shown(row["median_s"] / row["parameters"], 3, 1e-9),
                shown(row["bytes_per_parameter"]),
                shown(row["bytes_per_second"], 3, 1e9),
                shown(row["of_copy"], 2),
                f"{row['extra_bytes'] / 1e6:.1f}",
                row["against"] or "",
                shown(row["ratio"]) if against else "",
                f"{shown(row['ratio_q1'])}…{shown(row['ratio_q3'])}" if against else "",
            ]
        )
    return table(headers, lines)


@dataclass(frozen=True)
class Must:
    """A required ratio of step times.

    Args:
        case: the name of the case.
        top, bottom: the names of the optimizers above and below the line; without ``bottom`` it is
            the row's own ``quantity`` that is judged.
        bound: the required number.
        at_least: the ratio must be at or above the bound, otherwise at or below.
        quantity: the entry of a row.
        floor: show what the bytes alone would give.
    """

    case: str
    top: str
    bottom: str | None
    bound: float
    at_least: bool = False
    quantity: str = "ratio"
    floor: bool = False

    def judge(self, rows: list[Row], judged: bool) -> Row:
        """Return what was measured and whether it is enough; None where it was not measured."""
        row = self._find(rows, self.top, self.bottom, self.quantity)
        value = row[self.quantity] if row else None
        met = None
        if judged and value is not None:
            met = value >= self.bound if self.at_least else value <= self.bound
        return {
            "case": self.case,
            "what": self._words(),
            "must": f"{'≥' if self.at_least else '≤'} {self.bound:g}",
            "floor": self._floor(rows) if self.floor else None,
            "measured": value,
            "q1": row.get("ratio_q1") if row and self.quantity == "ratio" else None,
            "q3": row.get("ratio_q3") if row and self.quantity == "ratio" else None,
            "of_medians": row.get("ratio_of_medians") if row and self.bottom else None,
            "met": met,
        }

    def _words(self) -> str:
        names = {"of_copy": "bytes a second / device copy", "launches": "launches a step"}
        return (
            f"{self.top} / {self.bottom}" if self.bottom else f"{self.top}, {names[self.quantity]}"
        )

    def _find(self, rows: list[Row], name: str, against: str | None, key: str) -> Row | None:
        for row in rows:
            if row["case"] == self.case and row["optimizer"] == name and row.get(key) is not None:
                if against is None or row["against"] == against:
                    return row
        return None

    def _floor(self, rows: list[Row]) -> float | None:
        key = "bytes_per_parameter"
        top = self._find(rows, self.top, None, key)
        bottom = self._find(rows, self.bottom or "", None, key)
        return top[key] / bottom[key] if top and bottom else None


def must_table(judgements: list[Row]) -> str:
    """Return the table of requirements."""
    headers = ["case", "what", "must", "floor by bytes", "median of pairs", "quartiles"]
    headers += ["ratio of medians", "met"]
    words = {True: "yes", False: "NO", None: "not judged"}
    lines = [
        [
            j["case"],
            j["what"],
            j["must"],
            shown(j["floor"]),
            shown(j["measured"]),
            f"{shown(j['q1'])}…{shown(j['q3'])}" if j["q1"] is not None else "–",
            shown(j["of_medians"]),
            words[j["met"]] if j["measured"] is not None else "not measured",
        ]
        for j in judgements
    ]
    return table(headers, lines)


def fact_table(facts: list[Row]) -> str:
    """Return what the host and the device do in a step, where somebody has looked."""
    headers = ["case", "optimizer", "host ms", "kernels", "copies", "graph replay ms", "failed"]
    lines = [
        [
            fact["case"],
            fact["optimizer"],
            shown(fact.get("host_s"), 3, 1e-3),
            shown(fact.get("launches")),
            shown(fact.get("transfers")),
            shown(fact.get("graph_s"), 3, 1e-3),
            (fact.get("failed") or fact.get("graph_failed") or "")[:60],
        ]
        for fact in facts
    ]
    return table(headers, lines)


def part_table(parts: list[Row]) -> str:
    """Return how each part of a run went."""
    lines = [
        [
            part["part"],
            "ok" if part["well"] else "FAILED",
            f"{part['seconds']:.0f}",
            str(part["status"]),
            part["last_line"][:90].replace("|", "/"),
        ]
        for part in parts
    ]
    return table(["part", "", "s", "status", "last line"], lines)


def heading(record: Row) -> list[str]:
    """Return the lines that come before any table: the conditions, and what speaks against them."""
    conditions = record["conditions"]
    lines = [f"{key:<26} {value}" for key, value in conditions.items()]
    if (conditions.get("cores busy with other work") or 0) > DISTURBED:
        lines += ["", "WARNING: other work ran on these cores. The figures are not to be quoted:"]
        lines += ["optimizers that split their work evenly among threads suffer more than ours."]
    if record.get("quick"):
        lines += ["", "Miniature cases: the figures mean nothing."]
    return lines


def report(record: Row) -> str:
    """Return everything that a reader of the terminal should see at the end."""
    lines = heading(record)
    if record.get("rows"):
        lines += ["", step_table(record["rows"])]
    if record.get("facts"):
        lines += ["", fact_table(record["facts"])]
    if record.get("parts"):
        lines += ["", part_table(record["parts"])]
    return "\n".join([*lines, "", must_table(record["required"]), ""])


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())))
