"""Peak memory and time of a training step, with and without release_gradients().

python -m benchmarks.memory [--quick] [--device cpu|cuda] [--width N] [--depth N] [--rounds N]
                            [--out FILE]

A perceptron with ``depth`` layers of ``width`` x ``width`` weights is trained. Each row's memory is
measured in a new process, as the growth of the process (on a GPU: of torch's allocator) from just
before the first backward pass, when weights and optimizer state exist, to its peak within a few
steps. Kept gradients take 4 bytes a weight; released ones at least the bytes of the largest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mechanic_fused import MechanicAdamW

from ._harness import options, records, tables, timing
from ._harness.baselines import DECAY
from ._harness.records import Record, Row
from ._harness.tables import shown
from ._harness.timing import Step

OURS = "MechanicAdamW"
NARROW = {f"{OURS}, {bits} bits": bits for bits in (16, 8)}
TORCH = "torch AdamW fused"
BATCH = 16
STEPS = 3


@dataclass(frozen=True)
class Size:
    """A perceptron with ``depth`` layers of (width, width) weights and biases."""

    width: int
    depth: int

    @property
    def parameters(self) -> int:
        return self.depth * (self.width + 1) * self.width

    def predicted(self, released: bool) -> int:
        """Return the bytes of the gradients that must exist at the same time."""
        return 4 * (self.width**2 if released else self.parameters)

    def model(self, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        layers = [
            nn.Sequential(nn.Linear(self.width, self.width, device=device), nn.ReLU())
            for _ in range(self.depth)
        ]
        return nn.Sequential(*layers)


class PerWeight:
    """One torch optimizer for each weight, which steps as soon as its gradient exists.

    This is the recipe of torch's tutorials; it does not work with sums over all weights.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.optimizers = {p: torch_adamw(p) for p in weights}
        for p in weights:
            p.register_post_accumulate_grad_hook(self.take)

    def take(self, weight: Tensor) -> None:
        self.optimizers[weight].step()  # type: ignore[index]
        weight.grad = None

    def step(self) -> None:
        for p, optimizer in self.optimizers.items():
            if p.grad is not None:  # set by hand, not in a backward pass
                optimizer.step()


def torch_adamw(*weights: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=1e-6, weight_decay=DECAY, fused=True)


def optimizer_of(name: str, released: bool, weights: list[nn.Parameter]) -> Any:
    if name == TORCH:
        return PerWeight(weights) if released else torch_adamw(*weights)
    bits = NARROW.get(name, 32)
    optimizer = MechanicAdamW(weights, lr=1.0, weight_decay=DECAY, optim_bits=bits)
    if released:
        optimizer.release_gradients()
    return optimizer


def training_step(size: Size, name: str, released: bool, device: torch.device) -> Step:
    """Return a training step whose optimizer already has its state.

    The state is made from one gradient at a time. Otherwise the first step would make it while all
    gradients still exist.
    """
    model = size.model(device)
    weights = list(model.parameters())
    optimizer = optimizer_of(name, released, weights)
    for p in weights:
        p.grad = torch.full_like(p, 1e-6)
        optimizer.step()
        p.grad = None
    x = torch.randn(BATCH, size.width, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        for p in weights:
            p.grad = None

    return step


def memory(size: Size, name: str, released: bool, kind: str) -> Row:
    """Return the bytes before the first backward pass and at the peak; run it in a new process."""
    device = torch.device(kind)
    torch.set_num_threads(1)
    step = training_step(size, name, released, device)

    def steps() -> None:
        for _ in range(STEPS):
            step()

    if kind == "cuda":
        before = torch.cuda.memory_allocated()
        allocated = timing.peak_extra(steps, device)
        peak = before + allocated
    else:
        before, peak = timing.resident(steps)
        allocated = timing.allocator_peak(step)
    if not before:
        raise RuntimeError("cannot read this process's memory: Linux's /proc is needed")
    return {
        "optimizer": name,
        "released": released,
        "before_bytes": before,
        "peak_bytes": peak,
        "extra_bytes": peak - before,
        "allocated_bytes": allocated,
        "predicted_bytes": size.predicted(released),
    }


def in_new_process(function: Callable[..., Row], *arguments: Any) -> Row:
    """Call a function in a new process in which glibc returns large freed blocks at once.

    Otherwise resident memory would include freed blocks, an arbitrary number of them.
    """
    with (
        mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(1 << 20)),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(function, *arguments).result()


def times(size: Size, name: str, device: torch.device, rounds: int) -> Row:
    """Return the times of whole training steps, with kept and released gradients in turn."""
    steps = [training_step(size, name, released, device) for released in (False, True)]
    kept, released = timing.alternate(steps, rounds, device, warm_up=timing.WARM_UP)
    return {
        "optimizer": name,
        "rounds": rounds,
        "median_s": timing.quartiles(kept)[1],
        "released_median_s": timing.quartiles(released)[1],
        **timing.paired_ratio(released, kept),
    }


def memory_table(rows: list[Row]) -> str:
    headers = ["optimizer", "gradients", "before MB", "peak MB", "extra MB", "by torch's allocator"]
    keys = ("before_bytes", "peak_bytes", "extra_bytes", "allocated_bytes", "predicted_bytes")
    kinds = {False: "kept", True: "released"}
    lines = [
        [row["optimizer"], kinds[row["released"]], *(f"{row[key] / 1e6:.1f}" for key in keys)]
        for row in rows
        if "peak_bytes" in row
    ]
    return tables.table([*headers, "gradients alone"], lines)


def time_table(rows: list[Row]) -> str:
    headers = ["optimizer", "kept, ms a training step", "released, ms", "ratio", "quartiles"]
    lines = [
        [
            row["optimizer"],
            shown(row["median_s"], 3, 1e-3),
            shown(row["released_median_s"], 3, 1e-3),
            shown(row["ratio"]),
            tables.spread(row, "ratio_q1", "ratio_q3"),
        ]
        for row in rows
        if "median_s" in row
    ]
    return tables.table(headers, lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.parser("memory", __doc__, "memory.csv")
    parser.add_argument("--quick", action="store_true", help="a miniature: does it run at all?")
    parser.add_argument("--device", type=options.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--width", type=options.at_least(1), default=2048)
    parser.add_argument("--depth", type=options.at_least(1), default=20)
    parser.add_argument("--rounds", type=options.at_least(3), default=15)
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.width, chosen.depth, chosen.rounds = 256, 6, 3
    return chosen


def run(chosen: argparse.Namespace) -> Record:
    size = Size(chosen.width, chosen.depth)
    load = records.BackgroundLoad()
    record = Record(
        {
            **records.environment(miniature=chosen.quick),
            "device": records.device_name(chosen.device),
            "weights": f"{size.parameters:,} in {size.depth} layers of {size.width} x {size.width}",
            "method": f"memory: a new process for each row, {STEPS} steps, freed blocks of 1 MiB "
            "and more are returned to the system; time: whole training steps, kept and released in "
            "turn in one process",
        }
    )
    for name in (OURS, *NARROW, TORCH):
        for released in (False, True):
            row = in_new_process(memory, size, name, released, chosen.device.type)
            record.rows.append(row)
            more = f"{row['extra_bytes'] / 1e6:.1f} MB more"
            print(f"{name}, released={released}: {more}", file=sys.stderr)
    record.rows += [times(size, name, chosen.device, chosen.rounds) for name in (OURS, TORCH)]
    record.environment["cores busy with other work"] = load.cores()
    record.save(chosen.out)
    return record


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    record = Record.load(chosen.out) if chosen.report else run(chosen)
    rows = record.rows
    print(tables.heading(record), memory_table(rows), time_table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
