"""One case: its duels one after another, and a row for each, as it comes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import timing
from .cases import Case
from .contenders import Contender
from .records import Row

Pair = tuple[Contender, Contender]
"""(above the line, below it)."""


@dataclass(frozen=True)
class Effort:
    """How much to measure: at most ``rounds`` of a duel, and ``seconds`` for all of them."""

    rounds: int
    seconds: float
    copy: float
    """Bytes a second of a plain copy on this device: what a row's own speed is held against."""


def rows_of(case: Case, pairs: list[Pair], device: torch.device, effort: Effort) -> Iterator[Row]:
    """Run a case's duels in order.

    Only the two of the duel are in memory, and one that fights again at once is kept. One that
    fails or is absent gets a row that says why, and the others go on.
    """
    gradients = case.draw(device, spread=1e-3, seed=2)
    running: dict[str, timing.Runner] = {}
    seen: set[str] = set()
    for pair in pairs:
        names = [contender.name for contender in pair]
        for name in running.keys() - set(names):
            del running[name]
        _free(device)
        for contender in reversed(pair):
            if contender.name not in running:
                row = _try_start(contender, case, gradients, running)
                if row is not None and contender.name not in seen:
                    seen.add(contender.name)
                    yield row
        if not all(name in running for name in names):
            continue
        b, a = (running[name] for name in names)
        try:
            b.times, a.times, repeats = timing.duel(b, a, effort.rounds, effort.seconds)
            for runner, other in ((a, None), (b, a)):
                if other is not None or runner.contender.name not in seen:
                    seen.add(runner.contender.name)
                    yield _row(runner, other, case, repeats, effort.copy)
        except Exception as error:  # anybody's code may fail here, and the rest is still wanted
            running.clear()
            yield _why(case, names[0], error)
        # Nothing may hold on to a runner that is about to be dropped.
        a = b = runner = other = None


def _try_start(
    contender: Contender, case: Case, gradients: list[Any], running: dict[str, timing.Runner]
) -> Row | None:
    try:
        running[contender.name] = timing.start(contender, case, gradients)
    except Exception as error:  # as above
        return _why(case, contender.name, error)
    return None


def _why(case: Case, name: str, error: Exception) -> Row:
    kind = "absent" if isinstance(error, ModuleNotFoundError) else "failed"
    text = f"{type(error).__name__}: {error}".strip()
    return {"case": case.name, "optimizer": name, "against": None, kind: text[:500]}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _row(
    runner: timing.Runner, other: timing.Runner | None, case: Case, repeats: int, copy: float
) -> Row:
    low, median, high = timing.quartiles(runner.times)
    parameters = case.parameters
    moved = runner.contender.bytes_per_parameter(runner.optimizer, parameters, case.dtype)
    row: Row = {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tensors": len(case.shapes),
        "parameters": parameters,
        "optimizer": runner.contender.name,
        "road": getattr(runner.optimizer, "road", None),
        "rounds": len(runner.times),
        "repeats": repeats,
        "median_s": median,
        "q1_s": low,
        "q3_s": high,
        "bytes_per_parameter": moved,
        "bytes_per_second": moved * parameters / median,
        "of_copy": moved * parameters / median / copy,
        "extra_bytes": timing.peak_extra(runner.step, runner.weights[0].device),
        "samples_s": [float(f"{t:.5g}") for t in runner.times],
        "against": None,
    }
    if other is not None:
        ratios = [b / a for b, a in zip(runner.times, other.times, strict=True)]
        low, median, high = timing.quartiles(ratios)
        row.update(
            against=other.contender.name,
            ratio=median,
            ratio_q1=low,
            ratio_q3=high,
            ratio_of_medians=row["median_s"] / timing.quartiles(other.times)[1],
            against_samples_s=[float(f"{t:.5g}") for t in other.times],
        )
    return row
