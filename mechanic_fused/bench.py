"""python -m mechanic_fused bench: a step on this machine, beside torch's fused AdamW."""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .optimizers import MechanicAdamW

Shape = tuple[int, ...]

COPIED = 1 << 26
"""Elements of the copy whose speed is measured: 256 MB, more than caches hold."""


def gpt(layers: int = 6, width: int = 512, vocabulary: int = 31_000) -> list[Shape]:
    """Return the weight shapes of a GPT-2 of 35 M weights with a tied head."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp: list[Shape] = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    blocks = (norm + attention + norm + mlp) * layers
    return [(vocabulary, width), (512, width), *blocks, *norm]


def parsed_shapes(text: str) -> list[Shape]:
    """Return shapes of a text such as "1000x1000, 4*512": sizes joined by x, 4* for four of one.

    Raises:
        argparse.ArgumentTypeError: for a text of another form.

    Example:
        >>> parsed_shapes("2*16, 3x4")
        [(16,), (16,), (3, 4)]
    """
    found: list[Shape] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\*)?(\d+(?:x\d+)*)\s*", part)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"expected shapes such as 1000x1000 or 4*512, got {part.strip()!r}"
            )
        shape = tuple(int(size) for size in match[2].split("x"))
        found += [shape] * int(match[1] or 1)
    return found


def shapes_of_file(path: str) -> list[Shape]:
    """Return the shapes of the tensors in a file of torch.save: a state dict, or what holds one."""
    loaded = torch.load(path, map_location="meta", weights_only=True)
    found: list[Shape] = []

    def visit(value: Any) -> None:
        if torch.is_tensor(value) and value.is_floating_point():
            found.append(tuple(value.shape))
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)

    visit(loaded)
    if not found:
        raise SystemExit(f"expected a file of torch.save with weights, got none in {path}")
    return found


class Row(NamedTuple):
    """What an optimizer has come to.

    Args:
        name: of the optimizer.
        seconds: of a step, median.
        ratio: median of the ratios to torch's step just before.
        held: bytes of state a weight.
    """

    name: str
    seconds: float
    ratio: float
    held: float


Make = Callable[[list[Tensor]], Any]

OPTIMIZERS: dict[str, Make] = {
    "torch AdamW, fused": lambda weights: torch.optim.AdamW(weights, lr=1e-6, fused=True),
    "MechanicAdamW": lambda weights: MechanicAdamW(weights, lr=1.0),
    "MechanicAdamW, x_ref_every=8": lambda weights: MechanicAdamW(weights, lr=1.0, x_ref_every=8),
    "MechanicAdamW, optim_bits=8": lambda weights: MechanicAdamW(weights, lr=1.0, optim_bits=8),
}
"""Name → what makes it; the others are measured beside the first."""


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a call takes, with what it has left to the device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def copy_speed(device: torch.device, rounds: int = 7) -> float:
    """Return bytes read and written a second by a copy."""
    source = torch.ones(COPIED, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(rounds)]
    return 2 * source.nbytes / statistics.median(seconds[1:])


def measured(shapes: Sequence[Shape], device: torch.device, seconds: float) -> list[Row]:
    """Return a row for each optimizer, measured by turns with torch's in one process.

    Args:
        shapes: of the weights, float32.
        device: where they are.
        seconds: about how long to measure.
    """
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng).mul_(0.02).to(device) for shape in shapes]
    for weight in weights:
        weight.requires_grad_()
        weight.grad = torch.full_like(weight, 1e-3)
    count = sum(weight.numel() for weight in weights)
    rows: list[Row] = []
    first, *others = OPTIMIZERS
    for name in others:
        plain, ours = OPTIMIZERS[first](weights), OPTIMIZERS[name](weights)
        for _ in range(3):
            plain.step()
            ours.step()
        pairs: list[tuple[float, float]] = []
        end = time.perf_counter() + seconds / len(others)
        while len(pairs) < 3 or time.perf_counter() < end:
            pairs.append((timed(plain.step, device), timed(ours.step, device)))
        if not rows:
            rows.append(Row(first, statistics.median(a for a, _ in pairs), 1.0, held(plain, count)))
        ratio = statistics.median(b / a for a, b in pairs)
        rows.append(Row(name, statistics.median(b for _, b in pairs), ratio, held(ours, count)))
    return rows


def held(optimizer: Any, count: int) -> float:
    """Return the bytes of state that an optimizer holds for each weight."""
    state = [t for entries in optimizer.state.values() for t in entries.values()]
    return sum(t.nbytes for t in state if torch.is_tensor(t)) / count


def report(shapes: Sequence[Shape], device: torch.device, seconds: float) -> str:
    """Return the table."""
    speed = copy_speed(device)
    rows = measured(shapes, device, seconds)
    weights = sum(torch.Size(shape).numel() for shape in shapes)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [
        f"{len(shapes)} weights, {weights / 1e6:.3g} M elements, float32, on {where}; "
        f"{torch.get_num_threads()} threads; a copy moves {speed / 1e9:.3g} GB/s",
        "",
        f"{'optimizer':<32}{'ms a step':>10}{'ratio':>8}{'state bytes a weight':>22}",
    ]
    lines += [
        f"{row.name:<32}{row.seconds * 1e3:>10.3g}{row.ratio:>8.2f}{row.held:>22.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print the table for the shapes that were asked for."""
    parser = argparse.ArgumentParser("python -m mechanic_fused bench", description=__doc__)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--shapes", type=parsed_shapes, help="such as 1000x1000,4*512")
    chosen.add_argument("--model", metavar="FILE", help="of torch.save, whose shapes to take")
    parser.add_argument("--device", type=torch.device, help="cuda where there is one, or cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long to measure")
    args = parser.parse_args(arguments)
    shapes = args.shapes or (shapes_of_file(args.model) if args.model else gpt())
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(report(shapes, device, args.seconds))
