"""Peak memory and time of a training step with and without release_gradients().

python -m benchmarks.release [--quick] [--device cpu|cuda] [--width N] [--depth N] [--rounds N]
                             [--out FILE]

A perceptron of ``depth`` layers of ``width`` x ``width`` weights is trained. Memory is taken in a
new process for each row: by how much it (on a GPU: torch's allocator) grows from just before the
first backward pass, weights and optimizer state being there, to its peak within a few steps.
Gradients that are kept are 4 bytes a weight; released, they are at least the largest weight's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mechanic_fused import MechanicAdamW

from . import records, tables, timing
from .contenders import DECAY
from .records import Row
from .tables import shown

OURS = "MechanicAdamW"
TORCH = "torch AdamW fused"
BATCH = 16
STEPS = 3


@dataclass(frozen=True)
class Size:
    """A perceptron: ``depth`` layers of (width, width) weights with biases."""

    width: int
    depth: int

    @property
    def parameters(self) -> int:
        return self.depth * (self.width + 1) * self.width

    def predicted(self, released: bool) -> int:
        """Return the bytes of the gradients that must be there at a time."""
        return 4 * (self.width**2 if released else self.parameters)

    def model(self, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        layers = [
            nn.Sequential(nn.Linear(self.width, self.width, device=device), nn.ReLU())
            for _ in range(self.depth)
        ]
        return nn.Sequential(*layers)


class Each:
    """torch's optimizers, one a weight, each stepping as soon as its gradient is there: the recipe
    of torch's tutorials, which an optimizer with sums over all weights cannot follow."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.optimizers = {p: plain(p) for p in weights}
        for p in weights:
            p.register_post_accumulate_grad_hook(self.take)

    def take(self, weight: Tensor) -> None:
        self.optimizers[weight].step()  # type: ignore[index]
        weight.grad = None

    def step(self) -> None:
        for p, optimizer in self.optimizers.items():
            if p.grad is not None:  # set by hand, not in a backward pass
                optimizer.step()


def plain(*weights: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=1e-6, weight_decay=DECAY, fused=True)


def optimizer_of(name: str, released: bool, weights: list[nn.Parameter]) -> Any:
    if name == TORCH:
        return Each(weights) if released else plain(*weights)
    optimizer = MechanicAdamW(weights, lr=1.0, weight_decay=DECAY)
    if released:
        optimizer.release_gradients()
    return optimizer


def make(size: Size, name: str, released: bool, device: torch.device) -> Callable[[], Any]:
    """Return a training step whose optimizer has all its state, made from one gradient at a time.

    Otherwise the state would be made in the first step, beside gradients that nobody releases yet.
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
    """Return bytes before the first backward pass and at the peak; to be run in a new process."""
    device = torch.device(kind)
    torch.set_num_threads(1)
    step = make(size, name, released, device)

    def steps() -> None:
        for _ in range(STEPS):
            step()

    if kind == "cuda":
        before = torch.cuda.memory_allocated()
        peak = before + timing.peak_extra(steps, device)
        allocated = peak - before
    else:
        before, peak = timing.resident(steps)
        allocated = timing.allocator_peak(step)
    if not before:
        raise RuntimeError("this system does not tell a process's memory: Linux's /proc is needed")
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
    """Call a function in a process of its own, in which glibc gives large blocks back at once.

    Otherwise resident memory would also be of blocks that are free, how many being chance.
    """
    with (
        mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(1 << 20)),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(function, *arguments).result()


def times(size: Size, name: str, device: torch.device, rounds: int) -> Row:
    """Return the times of whole training steps, with and without release by turns."""
    kept, released = (make(size, name, flag, device) for flag in (False, True))
    taken: tuple[list[float], list[float]] = ([], [])
    with timing.no_collection():
        for i in range(timing.WARM_UP + rounds):
            for step, into in zip((kept, released), taken, strict=True):
                seconds = timing.seconds(step, device, 1)
                if i >= timing.WARM_UP:
                    into.append(seconds)
    low, ratio, high = timing.quartiles([b / a for a, b in zip(*taken, strict=True)])
    return {
        "optimizer": name,
        "rounds": rounds,
        "median_s": timing.quartiles(taken[0])[1],
        "released_median_s": timing.quartiles(taken[1])[1],
        "ratio": ratio,
        "ratio_q1": low,
        "ratio_q3": high,
        "samples_s": [float(f"{t:.5g}") for t in taken[0]],
        "released_samples_s": [float(f"{t:.5g}") for t in taken[1]],
    }


def memory_table(rows: list[Row]) -> str:
    headers = ["optimizer", "gradients", "before MB", "peak MB", "extra MB", "by torch's allocator"]
    keys = ("before_bytes", "peak_bytes", "extra_bytes", "allocated_bytes", "predicted_bytes")
    kinds = {False: "kept", True: "released"}
    lines = [
        [row["optimizer"], kinds[row["released"]], *(f"{row[key] / 1e6:.1f}" for key in keys)]
        for row in rows
    ]
    return tables.table([*headers, "gradients alone"], lines)


def time_table(rows: list[Row]) -> str:
    headers = ["optimizer", "kept, ms a training step", "released, ms", "ratio", "quartiles"]
    lines = []
    for row in rows:
        medians = [shown(row[key], 3, 1e-3) for key in ("median_s", "released_median_s")]
        spread = f"{shown(row['ratio_q1'])}…{shown(row['ratio_q3'])}"
        lines.append([row["optimizer"], *medians, shown(row["ratio"]), spread])
    return tables.table(headers, lines)


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.release",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a miniature: does it run at all?")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "release.json")
    chosen = parser.parse_args(arguments)
    for name, least in (("width", 1), ("depth", 1), ("rounds", 3)):
        if getattr(chosen, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(chosen, name)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none")
    if chosen.quick:
        chosen.width, chosen.depth, chosen.rounds = 256, 6, 3
    return chosen


def main(arguments: list[str] | None = None) -> None:
    chosen = options(arguments)
    size = Size(chosen.width, chosen.depth)
    device = torch.device(chosen.device)
    bystanders = records.Bystanders()
    conditions = {
        **records.conditions(),
        "device": torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu",
        "weights": f"{size.parameters:,} in {size.depth} layers of {size.width} x {size.width}",
        "method": f"memory: a new process a row, {STEPS} steps, freed blocks of 1 MiB and more go "
        "back to the system; time: whole training steps, kept and released by turns in one process",
    }
    record: Row = {"conditions": conditions, "quick": chosen.quick, "memory": [], "times": []}
    for name in (OURS, TORCH):
        for released in (False, True):
            row = in_new_process(memory, size, name, released, chosen.device)
            record["memory"].append(row)
            more = f"{row['extra_bytes'] / 1e6:.1f} MB more"
            print(f"{name}, released={released}: {more}", file=sys.stderr)
    for name in (OURS, TORCH):
        record["times"].append(times(size, name, device, chosen.rounds))
    conditions["cores busy with other work"] = bystanders.cores()
    records.write(chosen.out, record)
    print(*tables.heading(record), "", memory_table(record["memory"]), sep="\n")
    print("", time_table(record["times"]), "", f"Written to {chosen.out}", sep="\n")


if __name__ == "__main__":
    main()
