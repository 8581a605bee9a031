"""How much of Adam's update each format of its state loses, beside float32: a simulation.

python -m benchmarks.state_formats [--quick] [--out FILE]

Gradients are drawn from Student's t with 5 degrees of freedom, for 4,096 elements whose sizes are
lognormal, within blocks of 128 and from block to block; so no model is trained, and the conditions
are harsher than most. Half way the gradients change as the phase says. Figures are ‖u − u32‖/‖u32‖,
the mean over the last fifth of the steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mechanic_fused.backends import formulas, quantize

from ._harness import options, records, tables
from ._harness.records import Record, Row

ELEMENTS, BLOCK = 4096, 128
BETA1, EPS = 0.9, 1e-8
STEPS = 6000

OURS = "codes of 8 bits, blocks of 64"
BAR = 0.12
"""The largest error that a format may have in any phase."""

Stored = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(numbers, 32 bits each of chance, 32 that turn) → the numbers as they are stored."""


class Format(NamedTuple):
    """How m and v are stored, and the bytes of both."""

    m: Stored
    v: Stored
    bytes: float


class Phase(NamedTuple):
    """What happens to the gradients half way, and the spread of sizes within a block."""

    change: Callable[[Tensor], Tensor]
    spread: float = 1.0


def _half(g: Tensor) -> Tensor:
    return torch.arange(len(g)) % 2 == 0


PHASES = {
    "stationary": Phase(lambda g: g),
    "all shrink tenfold": Phase(lambda g: g / 10),
    "half grow, half shrink threefold": Phase(lambda g: torch.where(_half(g), g * 3, g / 3)),
    "half get none": Phase(lambda g: torch.where(_half(g), g, 0.0)),
    "15 of 16 get none": Phase(lambda g: torch.where(torch.arange(len(g)) % 16 == 0, g, 0.0)),
    "five decades in a block": Phase(lambda g: g, spread=2.5),
}
JUDGED = list(PHASES)[:5]
"""Those that the bar is for. In the last no format of 8 bits stays below it."""


def wide(x: Tensor, chance: Tensor, turning: Tensor) -> Tensor:
    return x


def nearest_bfloat16(x: Tensor, chance: Tensor, turning: Tensor) -> Tensor:
    return x.bfloat16().float()


def stochastic_bfloat16(x: Tensor, chance: Tensor, turning: Tensor) -> Tensor:
    return formulas.stochastic_round(turning >> 16, x).float()


def codes_of(codes: quantize.Codes, bits: str = "turning", block: int = 64) -> Stored:
    """Return our codes, rounded by bits that turn, by chance, or to nearest."""

    def stored(x: Tensor, chance: Tensor, turning: Tensor) -> Tensor:
        given = {"turning": turning, "chance": chance}.get(bits)
        half = torch.full(x.shape, quantize.FRACTION // 2, dtype=torch.int32)
        xi = half if given is None else quantize.fraction(given)
        q, scales = quantize.quantize(x.view(-1, block), xi.view(-1, block), codes)
        return quantize.dequantize(q, scales, codes).view(-1)

    return stored


def power(order: int, top: int, rounds: bool, block: int = BLOCK) -> Stored:
    """Return codes of a root of this order in blocks, rounded by chance or to nearest.

    v above 0 has a code of 1 or more.
    """

    def stored(x: Tensor, chance: Tensor, turning: Tensor) -> Tensor:
        blocks = x.view(-1, block)
        largest = blocks.abs().amax(1, keepdim=True).clamp(min=1e-45)
        xi = chance.view_as(blocks) * 2.0**-32 if rounds else 0.5
        q = (top * (blocks.abs() / largest) ** (1 / order) + xi).floor().clamp(max=top)
        q = torch.where((blocks > 0) & (top == 255), q.clamp(min=1), q)
        return ((q / top) ** order * largest * blocks.sign()).view(-1)

    return stored


def _dynamic_map(signed: bool) -> Tensor:
    """Return the numbers of bitsandbytes' dynamic map: arXiv 2110.02861, section 2.1."""
    found = [0.0, 1.0]
    for i in range(7):
        cells = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        means = (cells[:-1] + cells[1:]) / 2 * 10.0 ** (i - 6)
        found += means.tolist() + (-means).tolist() * signed
    return torch.tensor(sorted(found))


def dynamic(signed: bool, block: int = 256) -> Stored:
    """Return bitsandbytes' codes: the nearest number of a table of 256."""
    table = _dynamic_map(signed)
    middles = (table[1:] + table[:-1]) / 2

    def stored(x: Tensor, chance: Tensor, turning: Tensor) -> Tensor:
        blocks = x.view(-1, block)
        largest = blocks.abs().amax(1, keepdim=True).clamp(min=1e-45)
        return (table[torch.bucketize(blocks / largest, middles)] * largest).view(-1)

    return stored


def softsign(x: Tensor, chance: Tensor, turning: Tensor) -> Tensor:
    """Return FlashOptim's codes of m: 127 of 2y/(1 + |y|), blocks of 32, scales in float16."""
    blocks = x.view(-1, 32)
    largest = blocks.abs().amax(1, keepdim=True).half().float()
    y = torch.where(largest > 0, blocks / largest, 0.0)
    z = (127 * 2 * y / (1 + y.abs()) + 0.5).floor().clamp(-127, 127) / 127
    return (z / (2 - z.abs()) * largest).view(-1)


def root(x: Tensor, chance: Tensor, turning: Tensor) -> Tensor:
    """Return FlashOptim's codes of v: 255 of √v, blocks of 32, scales in float16."""
    blocks = x.view(-1, 32).sqrt()
    largest = blocks.amax(1, keepdim=True).half().float()
    y = torch.where(largest > 0, blocks / largest, 0.0)
    return ((255 * y + 0.5).floor().clamp(max=255) / 255 * largest).square().view(-1)


SIGNED, UNSIGNED = quantize.SIGNED, quantize.UNSIGNED
FORMATS = {
    "bfloat16 to nearest": Format(nearest_bfloat16, nearest_bfloat16, 4),
    "bfloat16, v rounded by bits that turn": Format(nearest_bfloat16, stochastic_bfloat16, 4),
    OURS: Format(codes_of(SIGNED), codes_of(UNSIGNED), 2.125),
    "codes, blocks of 32": Format(codes_of(SIGNED, block=32), codes_of(UNSIGNED, block=32), 2.25),
    "codes, blocks of 128": Format(
        codes_of(SIGNED, block=128), codes_of(UNSIGNED, block=128), 2.0625
    ),
    "codes, m to nearest": Format(codes_of(SIGNED, "none"), codes_of(UNSIGNED), 2.125),
    "codes, rounded by chance": Format(
        codes_of(SIGNED, "chance"), codes_of(UNSIGNED, "chance"), 2.125
    ),
    "√m to nearest, ∜v by chance, blocks of 128": Format(
        power(2, 127, False), power(4, 255, True), 2.0625
    ),
    "bitsandbytes' dynamic maps": Format(dynamic(True), dynamic(False), 2.03125),
    "FlashOptim's softsign and √v": Format(softsign, root, 2.125),
}


def errors(formats: dict[str, Format], phase: Phase, beta2: float, steps: int) -> dict[str, float]:
    """Return the mean error of each format's update in the last fifth of the steps."""
    rng = torch.Generator().manual_seed(0)
    sizes = torch.exp(phase.spread * torch.randn(ELEMENTS, generator=rng))
    sizes *= (
        torch.exp(torch.randn(ELEMENTS // BLOCK, 1, generator=rng)).expand(-1, BLOCK).reshape(-1)
    )
    states = {name: (torch.zeros(ELEMENTS), torch.zeros(ELEMENTS)) for name in formats}
    true = torch.zeros(ELEMENTS), torch.zeros(ELEMENTS)
    total = dict.fromkeys(formats, 0.0)
    counted = 0
    element = torch.arange(ELEMENTS)
    for t in range(steps):
        g = _student(rng) * sizes
        g = phase.change(g) if t >= steps // 2 else g
        chance = torch.randint(1 << 32, (2, ELEMENTS), generator=rng)
        steps_taken = torch.tensor(float(t))
        turning = [
            quantize.rounding_bits(0, steps_taken, element, codes.stride)
            for codes in (SIGNED, UNSIGNED)
        ]
        true = _moved(*true, g, beta2)
        expected = _update(*true, t + 1, beta2)
        counts = t >= 0.8 * steps and t % 20 == 0
        counted += counts
        for name, stored in formats.items():
            m, v = _moved(*states[name], g, beta2)
            if counts:
                error = _update(m, v, t + 1, beta2) - expected
                total[name] += float(error.norm() / expected.norm())
            states[name] = stored.m(m, chance[0], turning[0]), stored.v(v, chance[1], turning[1])
    return {name: each / counted for name, each in total.items()}


def _student(rng: torch.Generator) -> Tensor:
    normal = torch.randn(6, ELEMENTS, generator=rng)
    return normal[0] / (normal[1:].square().sum(0) / 5).sqrt()


def _moved(m: Tensor, v: Tensor, g: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    return BETA1 * m + (1 - BETA1) * g, beta2 * v + (1 - beta2) * g * g


def _update(m: Tensor, v: Tensor, t: int, beta2: float) -> Tensor:
    return m / (1 - BETA1**t) / ((v / (1 - beta2**t)).sqrt() + EPS)


def measured(steps: int) -> Iterator[Row]:
    """Yield a row for each format, β₂ and phase."""
    for beta2 in (0.999, 0.95):
        for name, phase in PHASES.items():
            for stored, error in errors(FORMATS, phase, beta2, steps).items():
                yield {
                    "format": stored,
                    "bytes": FORMATS[stored].bytes,
                    "beta2": beta2,
                    "phase": name,
                    "error": error,
                }


def report(record: Record) -> str:
    """Return the table: a row for each format, a column for each phase and β₂."""
    columns = list(dict.fromkeys((row["beta2"], row["phase"]) for row in record.rows))
    found = {(row["format"], row["beta2"], row["phase"]): row["error"] for row in record.rows}
    lines = [
        [name, *(f"{found[(name, *column)]:.2g}" for column in columns)]
        for name in dict.fromkeys(row["format"] for row in record.rows)
    ]
    worst = max(found[(OURS, *column)] for column in columns if column[1] in JUDGED)
    bar = f"{OURS}: at most {worst:.3f} in the first five phases ({BAR} required)"
    headers = ["m and v", *(f"{phase}, {beta2}" for beta2, phase in columns)]
    return "\n\n".join(
        [f"commit {record.environment['commit']}", tables.table(headers, lines), bar]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = options.parser("state_formats", __doc__, "state_formats.csv")
    parser.add_argument("--quick", action="store_true", help="100 steps: does it run at all?")
    chosen: argparse.Namespace = parser.parse_args(arguments)
    if chosen.report:
        record = Record.load(chosen.out)
    else:
        environment = records.environment(miniature=chosen.quick)
        record = Record(environment, list(measured(100 if chosen.quick else STEPS)))
        record.save(chosen.out)
    print(report(record))


if __name__ == "__main__":
    main()
