"""The picture: each grid's scores over the learning rate, and Mechanic's points beside them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .methods import BASES
from .protocol import Protocol, Rows, cells, grid, grid_means
from .tables import score, select
from .tasks import TASKS

MECHANIC, BEST, CURVE, GRID = "#c44e52", "#6c6c6c", "#a8a8a8", "#e4e4e4"
REDS = ((196, 78, 82), (213, 125, 128), (226, 167, 168), (241, 211, 212))
GREYS = (0, 108, 168, 200, 228, 255)
"""The colours of the file: MECHANIC on white in four strengths, and the greys."""

TITLE = """\
Validation score over the learning rate
grey: a grid on two seeds · dark: its best on five fresh seeds · red: Mechanic on the same seeds"""


def draw(rows: Rows, tasks: list[str], protocol: Protocol, path: Path) -> None:
    """Write the picture as a PNG with a small palette, which takes a sixth of the bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image  # a dependency of matplotlib

    found = list(cells(tasks, protocol))
    bases = [base for base in BASES if any(base in TASKS[task].bases for task in tasks)]
    figure, axes = pyplot.subplots(
        len(found),
        len(bases),
        figsize=(2.9 * len(bases), 1.2 * len(found) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for line, (task, horizon) in zip(axes, found, strict=True):
        for axis, base in zip(line, bases, strict=True):
            _panel(axis, rows, task, horizon, base, protocol)
        steps = horizon * TASKS[task].steps
        line[0].set_ylabel(f"{task}\n{steps:,} steps\n{TASKS[task].metric}", fontsize=7)
    for axis, base in zip(axes[0], bases, strict=True):
        axis.set_title(base, fontsize=9)
    figure.suptitle(TITLE, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    pyplot.close(figure)
    palette = Image.new("P", (1, 1))
    colours = [*REDS, *((grey, grey, grey) for grey in GREYS)]
    palette.putpalette([channel for colour in colours for channel in colour])
    image = Image.open(drawn).convert("RGB")
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(path, optimize=True)


def _panel(axis: Any, rows: Rows, task: str, horizon: int, base: str, protocol: Protocol) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if base not in TASKS[task].bases:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        return
    column = score(task)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.grid(color=GRID, linewidth=0.6)
    axis.tick_params(labelsize=6.5, length=2, pad=2)
    rates = grid(rows, task, horizon, base, protocol)
    means = grid_means(rows, task, horizon, base, rates, protocol)
    if means is None:
        return
    curve = means[column].sort_index()
    wide = curve.index[-1] > 500 * curve.index[0]
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0)))
    axis.plot(curve.index, curve, "o-", color=CURVE, markersize=2.5, linewidth=1)
    best_lr, top = float(means.index[0]), means.iloc[0][column]
    tuned = select(rows, task, horizon, base, lr=best_lr, seed=protocol.fresh)[column]
    ours = select(rows, task, horizon, f"Mechanic {base}", seed=protocol.fresh)
    for values, lr, colour in (
        (tuned, best_lr, BEST),
        (ours[column], ours.rate.mean(), MECHANIC),
    ):
        if len(values):
            axis.vlines(lr, values.min(), values.max(), color=colour, linewidth=1)
            axis.plot([lr], [values.mean()], "D", color=colour, markersize=3.5, zorder=4)
            axis.axhline(values.mean(), color=colour, linewidth=0.5, linestyle=":")
    worst = [*ours[column], *tuned, top]
    if TASKS[task].metric == "loss":
        axis.set_ylim(min(worst) * 0.97, max(max(worst) * 1.02, top * 1.25))
    else:
        axis.set_ylim(min(min(worst) - 0.01, top - 0.1), min(1.005, max(worst) + 0.02))
