"""How step times and memory are measured."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .baselines import OptimizerSpec
from .cases import Case
from .records import Row

Step = Callable[[], Any]

WARM_UP = 3
LEAST_ROUNDS = 3
GPU_SAMPLE = 0.01
"""Seconds that a sample on a GPU should take, so that the cost of an event does not matter."""

CPU = torch.device("cpu")


@dataclass
class Runner:
    """An optimizer over its own weights, warmed up. ``seconds`` is a rough step time."""

    spec: OptimizerSpec
    optimizer: Any
    weights: list[Tensor]
    gradients: list[Tensor]
    step: Step
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)


def start(spec: OptimizerSpec, case: Case, gradients: list[Tensor]) -> Runner:
    """Make the weights and the optimizer, and take the first steps."""
    device = gradients[0].device
    weights = [torch.nn.Parameter(x) for x in case.draw(device, spread=0.02, seed=1)]
    own = gradients if spec.shares_gradients else [g.clone() for g in gradients]
    for x, g in zip(weights, own, strict=True):
        x.grad = g
    optimizer = spec.make(weights)
    step = optimizer.step
    if spec.compiler:
        torch._dynamo.reset()
        step = torch.compile(lambda: optimizer.step(), backend=spec.compiler)
    runner = Runner(spec, optimizer, weights, own, step)
    for _ in range(WARM_UP):
        step()
    runner.seconds = seconds(step, device)
    return runner


def seconds(step: Step, device: torch.device = CPU, repeats: int = 1) -> float:
    """Return the mean time of ``repeats`` consecutive steps.

    On a GPU an additional step runs before the clock starts. The device is then busy while the host
    prepares the first timed step, so the result is the rate at which steps follow one another.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        step()
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began) / repeats


def host_seconds(step: Step, device: torch.device, rounds: int) -> float:
    """Return the median time until ``step`` returns to the host, with an idle device before it."""
    taken = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alternate(
    steps: Sequence[Step],
    rounds: int,
    device: torch.device = CPU,
    repeats: int = 1,
    warm_up: int = 1,
    limit: float = math.inf,
    prepare: Step = lambda: None,
) -> list[list[float]]:
    """Time several steps in turn, A B C A B C …, and return the seconds of each.

    Args:
        rounds: the largest number of samples of each step.
        repeats: steps in a sample.
        warm_up: rounds that are run first and not counted.
        limit: seconds after which no round is begun, once LEAST_ROUNDS have been counted.
        prepare: called before each round.
    """
    taken: list[list[float]] = [[] for _ in steps]
    began = time.perf_counter()
    with no_collection():
        for i in range(warm_up + rounds):
            if i >= warm_up + LEAST_ROUNDS and time.perf_counter() - began > limit:
                break
            prepare()
            for step, times in zip(steps, taken, strict=True):
                times.append(seconds(step, device, repeats))
    return [times[warm_up:] for times in taken]


def paired_times(a: Runner, b: Runner, rounds: int, limit: float) -> int:
    """Time two runners in turn, A B A B …, and fill their ``times``.

    The gradients change sign each round: otherwise the learned scale would grow without bound.

    Args:
        a, b: runners on one device.
        rounds: the largest number of rounds.
        limit: seconds for all rounds; at least LEAST_ROUNDS are run.

    Returns:
        The number of steps in a sample.
    """
    device = a.weights[0].device
    on_gpu = device.type == "cuda"
    repeats = 1
    if on_gpu:
        repeats = max(1, min(20, round(GPU_SAMPLE / max(a.seconds, b.seconds))))
    affordable = int(limit / ((a.seconds + b.seconds) * (repeats + on_gpu)))
    rounds = max(LEAST_ROUNDS, min(rounds, affordable))
    gradients = list({id(g): g for g in [*a.gradients, *b.gradients]}.values())
    a.times, b.times = alternate(
        [a.step, b.step],
        rounds,
        device,
        repeats,
        prepare=lambda: torch._foreach_neg_(gradients),
    )
    return repeats


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(times: list[float]) -> Row:
    """Return the median and the quartiles of step times, in seconds."""
    low, median, high = quartiles(times)
    return {"median_s": median, "q1_s": low, "q3_s": high}


def paired_ratio(times: list[float], others: list[float]) -> Row:
    """Return the median and the quartiles of the ratios of each round."""
    low, ratio, high = quartiles([a / b for a, b in zip(times, others, strict=True)])
    return {"ratio": ratio, "ratio_q1": low, "ratio_q3": high}


def copy_speed(device: torch.device, size: int, rounds: int = 15) -> float:
    """Return the speed of ``y.copy_(x)`` over ``size`` bytes: bytes read plus written a second."""
    x = torch.ones(size // 4, device=device)
    y = torch.zeros_like(x)
    taken = [seconds(lambda: y.copy_(x), device) for _ in range(rounds + 2)][2:]
    return 2 * x.nbytes / statistics.median(taken)


def peak_extra(step: Step, device: torch.device) -> int:
    """Return the bytes that a step allocates at its peak beyond the memory in use before it.

    On a CPU this is the larger of two counts: the growth of torch's allocator (which does not see
    other libraries) and the growth of the process (which does not see reused heap memory).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before, peak = resident(step)
    return max(allocator_peak(step), peak - before)


def allocator_peak(step: Step) -> int:
    """Return by how much torch's CPU allocator grows during a step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def resident(step: Step) -> tuple[int, int]:
    """Return this process's memory before a step and its peak during it; zeros without /proc."""
    status = Path("/proc/self/status")

    def read(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        before = read("VmRSS:")
        step()
        return before, max(before, read("VmHWM:"))
    except (OSError, StopIteration):
        return 0, 0
