"""Training steps whose optimizer has its state on the host, beside those that have it on the GPU.

python -m benchmarks.offload [--quick] [--device cpu|cuda] [--width N] [--depth N] [--batch N]
                             [--rounds N] [--out FILE]

A perceptron with ``depth`` layers of ``width`` x ``width`` weights is trained, by each optimizer in
turn. "Hidden" is how much of the time in which weights are stepped lies before the end of the
backward pass. On the CPU, where nothing is gained, copies and threads are the same, and the rival
is the scheme of torchao's CPUOffloadOptimizer: a hook copies each gradient, and the step takes a
fused AdamW of torch's for one weight after the other. On a GPU it is that package itself.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mechanic_fused import MechanicAdamW
from mechanic_fused.plan import StepPlan

from ._harness import options, records, tables, timing
from ._harness.baselines import DECAY
from ._harness.records import Record, Row
from ._harness.tables import shown
from ._harness.timing import Step
from .memory import Size, torch_adamw

NONE = "forward and backward alone"
OURS = "MechanicAdamW"
OFFLOAD = f"{OURS}, offload"
RELEASED = f"{OFFLOAD}, released"
NARROW = f"{RELEASED}, 8 bits"
TORCH = "torch AdamW fused"
RIVAL = "torchao CPUOffloadOptimizer"
SCHEME = "the scheme of torchao's, on the CPU"


class NoStep:
    """No optimizer."""

    def step(self) -> None:
        """Do nothing."""


class AtTheStep:
    """Copies of weights and gradients, and an AdamW of torch's for each weight."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.copies: dict[Tensor, nn.Parameter] = {}
        self.queue: list[Tensor] = []
        for p in weights:
            self.copies[p] = nn.Parameter(p.detach().clone())
            self.copies[p].grad = torch.empty_like(p)
            p.register_post_accumulate_grad_hook(self.take)
        self.optimizers = {p: torch_adamw(copied) for p, copied in self.copies.items()}

    def take(self, weight: Tensor) -> None:
        """Copy a gradient and free it."""
        grad = self.copies[weight].grad
        assert grad is not None and weight.grad is not None
        grad.copy_(weight.grad)
        weight.grad = None
        self.queue.append(weight)

    @torch.no_grad()
    def step(self) -> None:
        """Step the copies and copy them back."""
        for p in self.queue:
            self.optimizers[p].step()  # type: ignore[index]
            p.copy_(self.copies[p])
        self.queue.clear()


def ours(bits: int = 32, offload: bool = True, release: bool = True) -> Callable[[Any], Any]:
    """Return weights → our optimizer."""

    def make(weights: list[nn.Parameter]) -> Any:
        optimizer = MechanicAdamW(
            weights, lr=1.0, weight_decay=DECAY, optim_bits=bits, offload=offload
        )
        if release:
            optimizer.release_gradients()
        return optimizer

    return make


def torchao(weights: list[nn.Parameter]) -> Any:
    """Return torchao's optimizer."""
    package = importlib.import_module("torchao.optim")
    more = {"lr": 1e-6, "weight_decay": DECAY, "fused": True}
    return package.CPUOffloadOptimizer(weights, torch.optim.AdamW, offload_gradients=True, **more)


ARMS: dict[str, Callable[[Any], Any]] = {
    NONE: lambda weights: NoStep(),
    TORCH: lambda weights: torch_adamw(*weights),
    OURS: ours(offload=False, release=False),
    OFFLOAD: ours(release=False),
    RELEASED: ours(),
    NARROW: ours(bits=8),
    SCHEME: AtTheStep,
    RIVAL: torchao,
}
"""Optimizer → how it is made."""


def arms(device: torch.device) -> dict[str, Callable[[Any], Any]]:
    """Return the optimizers that can be had on a device."""
    left_out = {SCHEME}
    if device.type == "cpu" or importlib.util.find_spec("torchao") is None:
        left_out = {RIVAL} if device.type == "cpu" else {SCHEME, RIVAL}
    return {name: make for name, make in ARMS.items() if name not in left_out}


class Training:
    """A model, its optimizer and a batch."""

    def __init__(
        self, size: Size, batch: int, make: Callable[[Any], Any], device: torch.device
    ) -> None:
        self.device, self.model = device, size.model(device)
        self.x = torch.randn(batch, size.width, device=device)
        self.weights = list(self.model.parameters())
        self.optimizer = make(self.weights)

    def backward(self) -> None:
        """Compute gradients."""
        self.model(self.x).square().mean().backward()

    def step(self) -> None:
        """Take a training step."""
        self.backward()
        self.optimizer.step()
        for p in self.weights:
            p.grad = None


def hidden(training: Training, steps: int = 5) -> float:
    """Return how much of the time of a step's kernels lies before the end of the backward pass."""
    spans: list[tuple[float, float]] = []
    original = StepPlan.step_bucket

    def noted(plan: StepPlan, bucket: Any) -> None:
        began = time.perf_counter()
        original(plan, bucket)
        spans.append((began, time.perf_counter()))

    within = total = 0.0
    StepPlan.step_bucket = noted  # type: ignore[method-assign]
    try:
        for _ in range(steps):
            spans.clear()
            training.backward()
            if training.device.type == "cuda":
                torch.cuda.current_stream().record_event().synchronize()
            end = time.perf_counter()
            training.optimizer.step()
            for p in training.weights:
                p.grad = None
            total += sum(b - a for a, b in spans)
            within += sum(max(0.0, min(b, end) - a) for a, b in spans)
    finally:
        StepPlan.step_bucket = original  # type: ignore[method-assign]
    return within / total


def measure(size: Size, batch: int, device: torch.device, rounds: int) -> list[Row]:
    """Return a row for each optimizer."""
    trained = {name: Training(size, batch, make, device) for name, make in arms(device).items()}
    steps: list[Step] = [each.step for each in trained.values()]
    times = timing.alternate(steps, rounds, device, warm_up=timing.WARM_UP)
    alone = times[list(trained).index(NONE)]
    rows = []
    for (name, each), taken in zip(trained.items(), times, strict=True):
        row: Row = {
            "optimizer": name,
            "parameters": size.parameters,
            "rounds": rounds,
            **timing.spread(taken),
            "beyond_s": timing.quartiles([a - b for a, b in zip(taken, alone, strict=True)])[1],
        }
        if name in (OFFLOAD, RELEASED, NARROW):
            row["hidden"] = hidden(each)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as a table."""
    headers = ["optimizer", "ms a training step", "quartiles", "beyond forward and backward, ms"]
    headers += ["ns a weight", "hidden"]
    lines = [
        [
            row["optimizer"],
            shown(row["median_s"], 3, 1e-3),
            tables.spread(row, "q1_s", "q3_s", unit=1e-3),
            shown(row["beyond_s"], 3, 1e-3),
            shown(row["beyond_s"] / row["parameters"], 3, 1e-9),
            shown(row.get("hidden"), 2) if "hidden" in row else "",
        ]
        for row in rows
    ]
    return tables.table(headers, lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.parser("offload", __doc__, "offload.csv")
    parser.add_argument("--quick", action="store_true", help="a miniature: does it run at all?")
    parser.add_argument("--device", type=options.device, default="cpu", help="cpu or cuda")
    parser.add_argument("--width", type=options.at_least(1), default=2048)
    parser.add_argument("--depth", type=options.at_least(1), default=8)
    parser.add_argument("--batch", type=options.at_least(1), default=64)
    parser.add_argument("--rounds", type=options.at_least(3), default=15)
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.width, chosen.depth, chosen.batch, chosen.rounds = 128, 3, 4, 3
    return chosen


def run(chosen: argparse.Namespace) -> Record:
    """Measure, and write the file."""
    size = Size(chosen.width, chosen.depth)
    load = records.BackgroundLoad()
    record = Record(
        {
            **records.environment(miniature=chosen.quick),
            "device": records.device_name(chosen.device),
            "weights": f"{size.parameters:,} in {size.depth} layers of {size.width} x {size.width}",
            "method": f"training steps of a batch of {chosen.batch}, by all in turn",
        }
    )
    record.rows += measure(size, chosen.batch, chosen.device, chosen.rounds)
    record.environment["cores busy with other work"] = load.cores()
    record.save(chosen.out)
    return record


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    record = Record.load(chosen.out) if chosen.report else run(chosen)
    print(tables.heading(record), table(record.rows), sep="\n\n")


if __name__ == "__main__":
    main()
