"""What the comparisons say together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas

from .protocol import Rows
from .tasks import TASKS

FAR = 0.05
"""How far behind the best of the grid, on the same seed, a single run is far behind: 5 % of a loss,
or 5 points. A row of the smallest validation set is 2.6 points."""

WIDER = "topics"
"""The task of the wider character model, which is judged by itself."""

LATER = ("vit", "seq2seq", "denoise")
"""The tasks that were unseen when the running form was first judged, and are not any more."""

GROUPS: dict[str, Callable[[Any], bool]] = {
    "first": lambda row: not TASKS[row.task].unseen and row.task not in (WIDER, *LATER),
    "at 4 T": lambda row: row.horizon > 1,
    "unseen": lambda row: TASKS[row.task].unseen,
    "unseen before": lambda row: row.task in LATER,
    WIDER: lambda row: row.task == WIDER,
    "all": lambda row: True,
}
"""Which comparisons are judged together."""


def summary(compared: dict[str, Rows]) -> Rows:
    """Return a row for each group of tasks.

    Args:
        compared: what Mechanic is beside → tables.comparisons.
    """
    lines = []
    for beside, table in compared.items():
        rows = list(table.itertuples())
        for group, belongs in GROUPS.items():
            part = table[[belongs(row) for row in rows]] if rows else table
            if len(part):
                lines.append({"beside": beside, "tasks": group, **_judged(part)})
    return pandas.DataFrame(lines)


def _judged(part: Rows) -> dict[str, Any]:
    worst = part.loc[part.behind.idxmax()]
    far = [difference > FAR for differences in part["by seed"] for difference in differences]
    return {
        "met": f"{part.met.sum()} of {len(part)}",
        "mean": 100 * part.behind.mean(),
        "worst": 100 * worst.behind,
        "where": f"{worst.task} ×{worst.horizon} {worst.base}",
        "runs far behind": f"{sum(far)} of {len(far)}",
        "worst run": 100 * max(map(max, part["by seed"])),
    }


def ranks(ranking: Rows) -> Rows:
    """Return the mean ranks of tables.ranking, of Mechanic's bases and of the other methods."""
    columns = [name for name in ranking.columns if name.startswith("rank with ")]
    if not columns:
        return pandas.DataFrame()
    return pandas.DataFrame({"mean rank": ranking[columns].mean(axis=1)})
