"""Measure one case: its pairs of optimizers in order, and a row for each."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import timing
from .baselines import OptimizerSpec
from .cases import Case
from .records import Row

Pair = tuple[OptimizerSpec, OptimizerSpec]
"""(numerator, denominator) of a ratio."""


@dataclass(frozen=True)
class Budget:
    """Effort for each pair: at most ``rounds``, and ``seconds`` for all of them."""

    rounds: int
    seconds: float
    copy: float
    """Speed of a plain copy on this device, bytes a second; a row's own speed is divided by it."""


def measure_case(
    case: Case, pairs: list[Pair], device: torch.device, budget: Budget
) -> Iterator[Row]:
    """Yield the rows of a case.

    Only the two optimizers of a pair are in memory; one that is in the next pair too is kept. An
    optimizer that fails or is not installed gets a row with the reason, and the others go on.
    """
    gradients = case.draw(device, spread=1e-3, seed=2)
    running: dict[str, timing.Runner] = {}
    reported: set[str] = set()
    for pair in pairs:
        names = [spec.name for spec in pair]
        for name in running.keys() - set(names):
            del running[name]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for spec in reversed(pair):
            failure = None if spec.name in running else _start(spec, case, gradients, running)
            if failure and spec.name not in reported:
                reported.add(spec.name)
                yield failure
        if not all(name in running for name in names):
            continue
        b, a = (running[name] for name in names)
        try:
            repeats = timing.paired_times(a, b, budget.rounds, budget.seconds)
            if a.spec.name not in reported:
                reported.add(a.spec.name)
                yield _row(a, None, case, repeats, budget.copy)
            reported.add(b.spec.name)
            yield _row(b, a, case, repeats, budget.copy)
        except Exception as error:  # third-party code may fail here; measure the rest regardless
            running.clear()
            yield _failure(case, names[0], error)
        a = b = None  # a reference would keep a runner alive while the next one is made


def _start(
    spec: OptimizerSpec, case: Case, gradients: list[Tensor], running: dict[str, timing.Runner]
) -> Row | None:
    """Start a runner; return None, or the row of its failure."""
    try:
        running[spec.name] = timing.start(spec, case, gradients)
    except Exception as error:  # as above
        return _failure(case, spec.name, error)
    return None


def _failure(case: Case, name: str, error: Exception) -> Row:
    kind = "absent" if isinstance(error, ModuleNotFoundError) else "failed"
    return {"case": case.name, "optimizer": name, kind: reason(error)}


def reason(error: Exception) -> str:
    """Return the type and message of an error, on one line and not too long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _row(
    runner: timing.Runner, other: timing.Runner | None, case: Case, repeats: int, copy: float
) -> Row:
    taken = timing.spread(runner.times)
    moved = runner.spec.bytes_per_parameter(runner.optimizer, case.parameters, case.dtype)
    row: Row = {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tensors": len(case.shapes),
        "parameters": case.parameters,
        "optimizer": runner.spec.name,
        "implementation": getattr(runner.optimizer, "implementation", None),
        "rounds": len(runner.times),
        "repeats": repeats,
        **taken,
        "bytes_per_parameter": moved,
        "of_copy": moved * case.parameters / taken["median_s"] / copy,
        "extra_bytes": timing.peak_extra(runner.step, runner.weights[0].device),
    }
    if other is not None:
        row |= {
            "against": other.spec.name,
            **timing.paired_ratio(runner.times, other.times),
            "ratio_of_medians": taken["median_s"] / timing.quartiles(other.times)[1],
        }
    return row
