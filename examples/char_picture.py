"""The plot of char_lm.py: losses and learning rates over the steps."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # draws to files, without a display
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from char_lm import Run

MECHANIC, SCALE = "tab:red", "0.45"
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


def draw(runs: Sequence["Run"], path: Path) -> None:
    """Plot Mechanic's run, the first one, and those of plain AdamW, if any."""
    mechanic, *grid = runs
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12 if grid else 8, 6.5), layout="constrained")
        columns = figure.add_gridspec(2, 2 if grid else 1, width_ratios=[2, 1] if grid else None)
        losses = figure.add_subplot(columns[0, 0])
        rates = figure.add_subplot(columns[1, 0], sharex=losses)
        draw_losses(losses, mechanic, grid)
        draw_rates(rates, mechanic, grid)
        if grid:
            draw_grid(figure.add_subplot(columns[:, 1]), mechanic, grid)
        figure.align_ylabels([losses, rates])
        figure.suptitle("A character-level transformer, trained without choosing a learning rate")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def colours(grid: Sequence["Run"]):
    """Return shades of blue, darker for a higher learning rate."""
    return plt.cm.Blues([0.35 + 0.6 * i / max(1, len(grid) - 1) for i in range(len(grid))])


def smooth(values: Sequence[float], radius: int = 6) -> list[float]:
    """Return means over neighbours: the loss of one batch is noisy."""
    return [fmean(values[max(0, i - radius) : i + radius + 1]) for i in range(len(values))]


def draw_losses(axes: plt.Axes, mechanic: "Run", grid: Sequence["Run"]) -> None:
    for run, colour in zip(grid, colours(grid), strict=True):
        steps, losses = zip(*run.validation, strict=True)
        label = "AdamW, darker for a higher rate" if run is grid[0] else None
        axes.plot(steps, losses, color=colour, lw=1, label=label)
    steps, losses, _, _ = zip(*mechanic.history, strict=True)
    axes.plot(steps, losses, color=MECHANIC, lw=0.5, alpha=0.3)
    axes.plot(steps, smooth(losses), color=MECHANIC, lw=1, ls="--", label="Mechanic, training")
    steps, losses = zip(*mechanic.validation, strict=True)
    label = "Mechanic, validation"
    axes.plot(steps, losses, color=MECHANIC, lw=2, marker="o", ms=3.5, label=label)
    axes.annotate(
        f"{losses[-1]:.3f}",
        (steps[-1], losses[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=MECHANIC,
    )
    axes.set_ylabel("loss (nats a character)")
    axes.tick_params(labelbottom=False)
    axes.set_xlim(0, mechanic.steps)
    axes.set_ylim(top=1.1 * losses[0])  # the first steps fall from 4.6, which would hide the rest
    axes.legend(frameon=False, loc="lower left")


def draw_rates(axes: plt.Axes, mechanic: "Run", grid: Sequence["Run"]) -> None:
    for run, colour in zip(grid, colours(grid), strict=True):
        steps, _, rates, _ = zip(*run.history, strict=True)
        axes.plot(steps, rates, color=colour, lw=1)
    steps, _, rates, scales = zip(*mechanic.history, strict=True)
    axes.plot(steps, scales, color=SCALE, ls=":", label="S, the learned scale")
    label = f"S × lr, the learned learning rate (at most {mechanic.peak_rate():.1e})"
    axes.plot(steps, rates, color=MECHANIC, lw=2, label=label)
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(scales) / 10)  # the schedule ends at 0, which a log axis cannot show
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.legend(frameon=False, loc="lower center")


def draw_grid(axes: plt.Axes, mechanic: "Run", grid: Sequence["Run"]) -> None:
    """Plot the final validation loss at each learning rate of the grid."""
    final = [run.validation[-1][1] for run in grid]
    axes.plot([run.lr for run in grid], final, color="tab:blue", zorder=1)
    axes.scatter([run.lr for run in grid], final, color=colours(grid), s=50, label="AdamW")
    learned = mechanic.validation[-1][1]
    axes.axhline(learned, color=MECHANIC, lw=1, ls="--")
    axes.plot(
        mechanic.peak_rate(),
        learned,
        "*",
        color=MECHANIC,
        ms=16,
        label="Mechanic, at its learned peak",
    )
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("final validation loss (nats a character)")
    axes.legend(frameon=False)
