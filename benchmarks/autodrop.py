"""The cost of AutoDrop (version 2): its passes beside copies, and a training step with it.

python -m benchmarks.autodrop [--quick] [--rounds N] [--batch N] [--threads N] [--out FILE]

The passes run on the weights of the case 35M, in turn with copies that move as many bytes. Training
steps are of the examples' character transformer with 35 M weights under torch's fused AdamW; those
with and without AutoDrop alternate, in one process and on one model. AutoDrop's cost of a step is
the running sum, timed where it runs, plus 1/k of the angle pass.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from mechanic_fused.tuners.autodrop import AutoDrop
from mechanic_fused.tuners.trajectory import Trajectory

from ._harness import cases, options, records, tables, timing
from ._harness.records import Record, Row
from ._harness.tables import shown
from ._harness.timing import Step
from .convergence.text import example

K = 64
TARGET = 0.03
SECONDS = {"pass": 20.0, "training": 120.0}
"""Time limits: a slow machine runs fewer rounds, but at least three."""

MODEL = {"width": 608, "layers": 8, "heads": 8, "context": 128}
QUICK_MODEL = {"width": 32, "layers": 2, "heads": 4, "context": 16}


def passes(case: cases.Case, rounds: int) -> list[Row]:
    """Return a row for each pass over the weights of a case."""
    weights = [torch.nn.Parameter(x) for x in case.draw(timing.CPU, spread=0.02, seed=1)]
    path = Trajectory(weights, True, "auto", None)
    path.space.axpby(path.previous, path.space.weights, a=0.0)
    path.space.axpby(path.sum, path.space.weights, a=0.0, c=1.5)
    path.advance(path.sum)
    return [
        pass_row(
            "running sum",
            lambda: path.space.axpby(path.sum, path.space.weights, a=1.0),
            12 * case.parameters,
            rounds,
        ),
        pass_row("angle", lambda: path.advance(path.sum), 16 * case.parameters, rounds),
    ]


def pass_row(name: str, run_pass: Step, moved: int, rounds: int) -> Row:
    """Time a pass in turn with a copy that moves as many bytes."""
    source = torch.ones(moved // 8)  # a copy reads and writes 4 bytes of each element
    target = torch.zeros_like(source)
    steps = [run_pass, lambda: target.copy_(source)]
    taken, copied = timing.alternate(steps, rounds, limit=SECONDS["pass"])
    return {
        "pass": name,
        "bytes": moved,
        "rounds": len(taken),
        "median_s": statistics.median(taken),
        "copy_median_s": statistics.median(copied),
        **timing.paired_ratio(taken, copied),
    }


def training(sizes: dict[str, int], batch: int, rounds: int, angle: float) -> Row:
    """Return the cost of a training step without and with AutoDrop.

    Args:
        sizes: the sizes of the model.
        batch: windows of ``context`` characters in a step.
        rounds: the largest number of steps of each kind.
        angle: seconds of an angle pass per weight; each step pays 1/k of it.
    """
    torch.manual_seed(0)
    parts = example()
    text = parts.load_text()
    model = parts.CharModel(len(text.vocabulary), **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tuner = AutoDrop(optimizer, k=K)
    rng = torch.Generator().manual_seed(0)
    sums: list[float] = []

    def plain() -> None:
        loss = model.loss(parts.random_batch(text.train, batch, sizes["context"], rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def tuned() -> None:
        plain()
        began = time.perf_counter()
        tuner.step()
        sums.append(time.perf_counter() - began)

    steps, bare = timing.alternate([tuned, plain], rounds, limit=SECONDS["training"])
    # The median excludes the angle pass, which runs once in k steps.
    running_sum = statistics.median(sums[1:])
    elements = sum(p.numel() for p in model.parameters())
    angle *= elements
    step = statistics.median(bare)
    alternating = {
        key.replace("ratio", "overhead_by_turns"): value - 1 + angle / K / step
        for key, value in timing.paired_ratio(steps, bare).items()
    }
    return {
        "parameters": elements,
        "tokens": batch * sizes["context"],
        "rounds": len(bare),
        "step_s": step,
        "sum_s": running_sum,
        "angle_s": angle,
        "overhead": (running_sum + angle / K) / step,
        **alternating,
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
            tables.spread(row, "ratio_q1", "ratio_q3"),
        ]
        for row in rows
    ]
    return tables.table(headers, lines)


def training_table(row: Row, judged: bool) -> str:
    headers = ["weights", "tokens a step", "step ms", "running sum ms", f"angle ms / {K}"]
    headers += ["overhead %", "by turns %", "quartiles %", "required", "met"]
    percent = [f"{100 * row[f'overhead_by_turns{end}']:.2f}" for end in ("", "_q1", "_q3")]
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
        ("yes" if row["overhead"] <= TARGET else "NO") if judged else "not judged",
    ]
    return tables.table(headers, [line])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.parser("autodrop", __doc__, "autodrop.csv")
    parser.add_argument("--quick", action="store_true", help="a miniature: does it run at all?")
    parser.add_argument("--rounds", type=options.at_least(3), default=30, help="training steps")
    parser.add_argument(
        "--batch", type=options.at_least(1), default=16, help="windows of 128 characters a step"
    )
    parser.add_argument("--threads", type=options.at_least(1), default=torch.get_num_threads())
    return parser.parse_args(arguments)


def run(chosen: argparse.Namespace) -> Record:
    torch.set_num_threads(chosen.threads)
    began = time.perf_counter()
    load = records.BackgroundLoad()
    case = next(case for case in cases.CPU if case.name == "35M")
    case = case.shrunk() if chosen.quick else case
    rows = passes(case, 3 if chosen.quick else 31)
    angle = next(row["median_s"] for row in rows if row["pass"] == "angle")
    sizes = QUICK_MODEL if chosen.quick else MODEL
    rounds = 3 if chosen.quick else chosen.rounds
    rows.append(training(sizes, chosen.batch, rounds, angle / case.parameters))
    record = Record(
        {
            **records.environment(miniature=chosen.quick),
            "passes on": f"{case.parameters:,} float32 weights of the case {case.name}",
            "trained": f"character transformer of {rows[-1]['parameters']:,} float32 weights, "
            f"{sizes}, {rows[-1]['tokens']} characters a step, torch's fused AdamW, k = {K}",
            "method": "A B A B … in one process, medians; overhead: (running sum, timed within the "
            "training step, + angle pass / k) / training step without",
            "cores busy with other work": load.cores(),
            "seconds": round(time.perf_counter() - began),
        },
        rows,
    )
    record.save(chosen.out)
    return record


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    record = Record.load(chosen.out) if chosen.report else run(chosen)
    judged = not record.environment.get("miniature")
    print(tables.heading(record), pass_table(record.rows[:-1]), sep="\n\n")
    print("", training_table(record.rows[-1], judged), sep="\n")


if __name__ == "__main__":
    main()
