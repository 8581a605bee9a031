"""One page: the curve of each grid over the learning rate, and Mechanic's single point on it."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

from ..picture import GRID, OTHERS, OURS
from .methods import BASES
from .protocol import Protocol, Rows, cells, grid, grid_means
from .tables import of, score
from .tasks import TASKS


def draw(rows: Rows, tasks: list[str], protocol: Protocol, caption: str, path: Path) -> None:
    """Write the picture, PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = list(cells(tasks, protocol))
    bases = [base for base in BASES if any(base in TASKS[task].bases for task in tasks)]
    width = 3.3 * len(bases)
    figure, axes = pyplot.subplots(
        len(found),
        len(bases),
        figsize=(width, 1.55 * len(found) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for line, (task, horizon) in zip(axes, found, strict=True):
        for axis, base in zip(line, bases, strict=True):
            _panel(axis, rows, task, horizon, base, protocol)
        line[0].set_ylabel(
            f"{task}, {horizon * TASKS[task].steps:,}\n{TASKS[task].metric}", fontsize=7
        )
    for axis, base in zip(axes[0], bases, strict=True):
        axis.set_title(base, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("learning rate", fontsize=7)
    title = (
        "Validation: a grid of learning rates (grey; dark: its best on fresh seeds) and Mechanic "
        f"(red, on the same fresh seeds; its learning rate is learned) · {caption}"
    )
    # So many letters of this size go into an inch.
    figure.suptitle("\n".join(wrap(title, int(14 * width))), fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis: Any, rows: Rows, task: str, horizon: int, base: str, protocol: Protocol) -> None:
    column = score(task)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    # The labels of a short axis would lie on top of each other.
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(**{**GRID, "zorder": 0})
    axis.tick_params(labelsize=6)
    rates = grid(rows, task, horizon, base, protocol)
    means = grid_means(rows, task, horizon, base, rates, protocol)
    if means is None:
        return
    curve = means[column].sort_index()
    axis.plot(curve.index, curve, "o-", color="#a8a8a8", markersize=2.5, linewidth=1)
    top = means.iloc[0][column]
    fresh = {"arm": "", "seed": protocol.fresh}
    tuned = of(rows, task, horizon, base, lr=float(means.index[0]), **fresh)[column]
    ours = of(rows, task, horizon, f"Mechanic {base}", **fresh)
    for values, x, colour in (
        (tuned, float(means.index[0]), OTHERS),
        (ours[column], ours.rate.mean(), OURS),
    ):
        if len(values):
            axis.vlines(x, values.min(), values.max(), color=colour, linewidth=1)
            axis.plot([x], [values.mean()], "D", color=colour, markersize=3.5, zorder=4)
            axis.axhline(values.mean(), color=colour, linewidth=0.5, linestyle=":")
    worst = [*ours[column], *tuned, top]
    if TASKS[task].metric == "loss":
        axis.set_ylim(min(worst) * 0.97, max(max(worst) * 1.02, top * 1.25))
    else:
        axis.set_ylim(min(min(worst) - 0.01, top - 0.1), min(1.005, max(worst) + 0.02))
