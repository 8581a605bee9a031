"""The rows of a run as a picture: how long a step takes beside torch's fused AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .contenders import torch_adamw
from .records import Row
from .tables import shown

OURS, OTHERS = "#c44e52", "#6c6c6c"
GRID = {"color": "#e4e4e4", "linewidth": 0.6, "zorder": 0}


def draw(record: Row, path: Path) -> str:
    """Write a PNG; return what became of it. Matplotlib is optional."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no picture, since matplotlib is absent"
    rows = best_rows(record["rows"])
    names = list(dict.fromkeys(row["case"] for row in rows))
    if not names:
        return "no picture, since nothing was measured"
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for name, axis in zip(names, axes.flat, strict=False):
        _panel(axis, name, [row for row in rows if row["case"] == name])
    conditions = record["conditions"]
    figure.suptitle(
        f"Time of a step, ms (quartiles as lines) · {conditions.get('device', 'CPU')} · "
        f"torch {conditions['torch']} · {conditions['commit']}"
        + (" · MINIATURES, the figures mean nothing" if record["quick"] else ""),
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"picture in {path}"


def best_rows(rows: list[Row]) -> list[Row]:
    """Return one row for each case and optimizer: the first."""
    found: dict[Any, Row] = {}
    for row in rows:
        if "median_s" in row:
            found.setdefault((row["case"], row["optimizer"]), row)
    return list(found.values())


def _panel(axis: Any, title: str, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: row["median_s"], reverse=True)
    middle = [row["median_s"] * 1e3 for row in rows]
    below = [m - row["q1_s"] * 1e3 for m, row in zip(middle, rows, strict=True)]
    above = [row["q3_s"] * 1e3 - m for m, row in zip(middle, rows, strict=True)]
    colours = [OURS if row["optimizer"].startswith("Mechanic") else OTHERS for row in rows]
    names = [row["optimizer"] for row in rows]
    axis.hlines(range(len(rows)), 0, 1, transform=axis.get_yaxis_transform(), **GRID)
    axis.errorbar(middle, range(len(rows)), xerr=[below, above], ecolor=colours, fmt="none")
    axis.scatter(middle, range(len(rows)), color=colours, s=18, zorder=3)
    axis.set_yticks(range(len(rows)), names)
    for i, row in enumerate(rows):
        axis.annotate(
            f"{shown(middle[i])} ms · {shown(row['bytes_per_second'], 3, 1e9)} GB/s",
            (middle[i], i),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=6,
            ha="center",
        )
    axis.set_xscale("log")
    # Room for the words over the outermost points.
    axis.set_xlim(min(middle) / 10, max(middle) * 10)
    axis.set_ylim(-0.6, len(rows) - 0.3)
    fused = next((r for r in rows if r["optimizer"] == torch_adamw("fused").name), None)
    if fused:
        axis.axvline(fused["median_s"] * 1e3, color="black", linewidth=0.6, linestyle=":")
    axis.tick_params(labelsize=6)
    axis.set_title(f"{title}: {rows[0]['parameters']:,} parameters, {rows[0]['dtype']}", fontsize=8)
