"""How it is measured: two optimizers by turns in one process, medians of what each took."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .contenders import Contender

Step = Callable[[], Any]

WARM_UP = 3
GPU_SAMPLE = 0.01
"""Seconds that a sample on a GPU should take, so that what an event costs does not matter."""


@dataclass
class Runner:
    """A contender over weights of its own, warmed up. ``seconds`` is a rough step time."""

    contender: Contender
    optimizer: Any
    weights: list[Tensor]
    gradients: list[Tensor]
    step: Step
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)


def start(contender: Contender, case: Case, gradients: list[Tensor]) -> Runner:
    """Make the weights and the optimizer, and take the first steps."""
    device = gradients[0].device
    weights = [torch.nn.Parameter(x) for x in case.draw(device, spread=0.02, seed=1)]
    own = gradients if contender.shares_gradients else [g.clone() for g in gradients]
    for x, g in zip(weights, own, strict=True):
        x.grad = g
    optimizer = contender.make(weights)
    step = optimizer.step
    if contender.compiled:
        torch._dynamo.reset()
        step = torch.compile(lambda: optimizer.step(), backend=contender.compiled)
    runner = Runner(contender, optimizer, weights, own, step)
    for _ in range(WARM_UP):
        step()
    runner.seconds = seconds(step, device, 1)
    return runner


def seconds(step: Step, device: torch.device, repeats: int) -> float:
    """Return the time of one step, from ``repeats`` of them.

    On a GPU one more step goes ahead of the clock, so that the device is busy while the host
    prepares the first: what is measured is how fast steps follow one another.
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
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def host_seconds(step: Step, device: torch.device, rounds: int) -> float:
    """Return the median time in which ``step`` returns to a host that has nothing to wait for."""
    taken = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
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


def duel(b: Runner, a: Runner, rounds: int, limit: float) -> tuple[list[float], list[float], int]:
    """Time a and b by turns: A B A B …

    The gradients change sign from round to round, or the learned scale would grow without end.

    Args:
        b, a: the runners, on one device.
        rounds: at most so many.
        limit: seconds that all of them should take together; at least 3 rounds are made.

    Returns:
        The times of b, those of a, and the number of steps in a sample.
    """
    device = b.weights[0].device
    pair = a.seconds + b.seconds
    repeats = 1
    if device.type == "cuda":
        repeats = max(1, min(20, round(GPU_SAMPLE / max(a.seconds, b.seconds))))
    rounds = max(3, min(rounds, int(limit / (pair * (repeats + (device.type == "cuda"))))))
    gradients = list({id(g): g for g in [*a.gradients, *b.gradients]}.values())
    times_a, times_b = [], []
    with no_collection():
        for _ in range(1 + rounds):
            torch._foreach_neg_(gradients)
            times_a.append(seconds(a.step, device, repeats))
            times_b.append(seconds(b.step, device, repeats))
    # The first round has seen what the collector and the making of b left behind.
    return times_b[1:], times_a[1:], repeats


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def copy_speed(device: torch.device, size: int, rounds: int = 15) -> float:
    """Return the bytes a second of ``y.copy_(x)``, those read and those written, x of ``size``."""
    x = torch.ones(size // 4, device=device)
    y = torch.zeros_like(x)
    taken = [seconds(lambda: y.copy_(x), device, 1) for _ in range(rounds + 2)][2:]
    return 2 * x.nbytes / statistics.median(taken)


def peak_extra(step: Step, device: torch.device) -> int:
    """Return the bytes that a step holds at its peak beyond what was there before it.

    On a CPU the larger of two counts: what torch's allocator reports (which misses memory of other
    libraries) and by how much the process grew (which misses heap that was kept from before).
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
    """Return by how much torch's CPU allocator, which counts no other library's, grew in a step."""
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
    """Return the memory of this process before a step, and its peak in it; zeros where the kernel
    does not tell."""
    status = Path("/proc/self/status")

    def read(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = read("VmRSS:")
        step()
        return before, max(before, read("VmHWM:"))
    except (OSError, StopIteration):
        return 0, 0
