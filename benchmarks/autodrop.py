"""What AutoDrop (version 2) costs: its passes beside copies, and a training step with it.

python -m benchmarks.autodrop [--quick] [--rounds N] [--batch N] [--threads N]
                              [--out FILE]

The passes run on the weights of the 35M case, by turns with copies that move as many bytes. The
training step is of the examples' character transformer at 35 M weights under torch's fused AdamW:
steps with and without AutoDrop by turns, in one process and on one model. The cost of a step is
the running sum, timed where it runs, and 1/k of the angle pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mechanic_fused.tuners.autodrop import AutoDrop
from mechanic_fused.tuners.trajectory import Trajectory

from . import cases, records, tables, timing
from .convergence.text import example
from .records import Row
from .tables import shown

K = 64
TARGET = 0.03
SECONDS = {"pass": 20.0, "training": 120.0}
"""What the rounds of each should take: a slow machine makes fewer, but 3."""

MODEL = {"width": 608, "layers": 8, "heads": 8, "context": 128}
QUICK_MODEL = {"width": 32, "layers": 2, "heads": 4, "context": 16}

Pass = Callable[[], Any]


def passes(case: cases.Case, rounds: int) -> tuple[list[Row], int]:
    """Return a row for each pass, timed by turns with a copy of the same bytes; and the weights."""
    device = torch.device("cpu")
    weights = [torch.nn.Parameter(x) for x in case.draw(device, spread=0.02, seed=1)]
    motion = Trajectory(weights, True, "auto", None)
    motion.space.axpby(motion.previous, motion.space.weights, a=0.0)
    motion.space.axpby(motion.sum, motion.space.weights, a=0.0, c=1.5)
    motion.advance(motion.sum)
    elements = case.parameters

    def add() -> None:
        motion.space.axpby(motion.sum, motion.space.weights, a=1.0)

    def turn() -> None:
        motion.advance(motion.sum)

    work = {"running sum": (add, 12 * elements), "angle": (turn, 16 * elements)}
    rows = [pass_row(name, one, moved, rounds) for name, (one, moved) in work.items()]
    return rows, elements


def pass_row(name: str, one: Pass, moved: int, rounds: int) -> Row:
    source = torch.ones(moved // 8)  # read and written: 4 + 4 bytes an element
    target = torch.zeros_like(source)
    taken, copied = by_turns(one, lambda: target.copy_(source), rounds, SECONDS["pass"])
    low, ratio, high = timing.quartiles([a / b for a, b in zip(taken, copied, strict=True)])
    return {
        "pass": name,
        "bytes": moved,
        "rounds": len(taken),
        "median_s": statistics.median(taken),
        "copy_median_s": statistics.median(copied),
        "ratio": ratio,
        "ratio_q1": low,
        "ratio_q3": high,
        "samples_s": [float(f"{t:.5g}") for t in taken],
        "copy_samples_s": [float(f"{t:.5g}") for t in copied],
    }


def by_turns(a: Pass, b: Pass, rounds: int, limit: float) -> tuple[list[float], list[float]]:
    """Return the times of a and of b: A B A B … after a round that warms up.

    Args:
        a, b: what is timed.
        rounds: at most so many.
        limit: seconds after which no more are begun, but 3.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    with timing.no_collection():
        while len(taken[0]) <= rounds:
            if len(taken[0]) > 3 and time.perf_counter() - began > limit:
                break
            for step, into in zip((a, b), taken, strict=True):
                into.append(timing.seconds(step, torch.device("cpu"), 1))
    return taken[0][1:], taken[1][1:]


def training(sizes: dict[str, int], batch: int, rounds: int, angle: float) -> Row:
    """Return what a training step costs without and with AutoDrop.

    Args:
        sizes: of the model.
        batch: windows of ``context`` characters in a step.
        rounds: at most so many steps of each kind.
        angle: seconds of an angle pass a weight, of which a step pays 1/k.
    """
    torch.manual_seed(0)
    parts = example()
    text = parts.load_text()
    model = parts.CharModel(len(text.vocabulary), **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    sched = AutoDrop(optimizer, k=K)
    rng = torch.Generator().manual_seed(0)
    own: list[float] = []

    def plain() -> None:
        loss = model.loss(parts.random_batch(text.train, batch, sizes["context"], rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def tuned() -> None:
        plain()
        began = time.perf_counter()
        sched.step()
        own.append(time.perf_counter() - began)

    steps, bare = by_turns(tuned, plain, rounds, SECONDS["training"])
    # The medians leave out the angle pass, which comes once in k steps.
    total = statistics.median(own[1:])
    elements = sum(p.numel() for p in model.parameters())
    angle *= elements
    step = statistics.median(bare)
    low, ratio, high = timing.quartiles([a / b for a, b in zip(steps, bare, strict=True)])
    return {
        "parameters": elements,
        "tokens": batch * sizes["context"],
        "rounds": len(bare),
        "step_s": step,
        "sum_s": total,
        "angle_s": angle,
        "overhead": (total + angle / K) / step,
        "overhead_by_turns": ratio - 1 + angle / K / step,
        "overhead_by_turns_q1": low - 1 + angle / K / step,
        "overhead_by_turns_q3": high - 1 + angle / K / step,
        "samples_s": [float(f"{t:.5g}") for t in steps],
        "plain_samples_s": [float(f"{t:.5g}") for t in bare],
        "sum_samples_s": [float(f"{t:.5g}") for t in own[1:]],
    }


def pass_table(rows: list[Row]) -> str:
    headers = ["pass", "MB moved", "ms", "ms of a copy", "ratio", "quartiles"]
    lines = [
        [
            row["pass"],
            f"{row['bytes'] / 1e6:.0f}",
            shown(row["median_s"], 3, 1e-3),
            shown(row["copy_median_s"], 3, 1e-3),
            shown(row["ratio"]),
            f"{shown(row['ratio_q1'])}…{shown(row['ratio_q3'])}",
        ]
        for row in rows
    ]
    return tables.table(headers, lines)


def training_table(row: Row, judged: bool) -> str:
    headers = ["weights", "tokens a step", "step ms", "running sum ms", f"angle ms / {K}"]
    headers += ["overhead %", "by turns %", "quartiles %", "must", "met"]
    percent = [f"{100 * row[f'overhead_by_turns{end}']:.2f}" for end in ("", "_q1", "_q3")]
    met = ("yes" if row["overhead"] <= TARGET else "NO") if judged else "not judged"
    line = [
        f"{row['parameters']:,}",
        str(row["tokens"]),
        shown(row["step_s"], 3, 1e-3),
        shown(row["sum_s"], 3, 1e-3),
        shown(row["angle_s"] / K, 3, 1e-3),
        f"{100 * row['overhead']:.2f}",
        percent[0],
        f"{percent[1]}…{percent[2]}",
        f"≤ {100 * TARGET:g}",
        met,
    ]
    return tables.table(headers, [line])


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autodrop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a miniature: does it run at all?")
    parser.add_argument("--rounds", type=int, default=30, help="at most so many training steps")
    parser.add_argument("--batch", type=int, default=16, help="windows of 128 characters a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=records.RESULTS / "autodrop.json")
    chosen = parser.parse_args(arguments)
    for name, least in (("rounds", 3), ("batch", 1), ("threads", 1)):
        if getattr(chosen, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(chosen, name)}")
    return chosen


def main(arguments: list[str] | None = None) -> None:
    chosen = options(arguments)
    torch.set_num_threads(chosen.threads)
    began = time.perf_counter()
    bystanders = records.Bystanders()
    case = next(case for case in cases.CPU if case.name == "35M")
    case = case.shrunk() if chosen.quick else case
    rows, elements = passes(case, 3 if chosen.quick else 31)
    angle = next(row["median_s"] for row in rows if row["pass"] == "angle")
    sizes = QUICK_MODEL if chosen.quick else MODEL
    rounds = 3 if chosen.quick else chosen.rounds
    row = training(sizes, chosen.batch, rounds, angle / elements)
    conditions = {
        **records.conditions(),
        "passes on": f"{elements:,} float32 weights of the case {case.name}",
        "trained": f"character transformer of {row['parameters']:,} float32 weights, {sizes}, "
        f"{row['tokens']} characters a step, torch's fused AdamW, k = {K}",
        "method": "A B A B … in one process, medians; overhead: (running sum, timed within the "
        "training step, + angle pass / k) / training step without",
        "cores busy with other work": bystanders.cores(),
        "seconds": round(time.perf_counter() - began),
    }
    record = {"conditions": conditions, "quick": chosen.quick, "passes": rows, "training": row}
    records.write(chosen.out, record)
    print(*tables.heading(record), "", pass_table(rows), sep="\n")
    print("", training_table(row, not chosen.quick), "", f"Written to {chosen.out}", sep="\n")


if __name__ == "__main__":
    main()
