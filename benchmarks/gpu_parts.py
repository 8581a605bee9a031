"""The parts of ``python -m benchmarks.gpu`` that touch the device, each in a process of its own.

    python -m benchmarks.gpu_parts (machine | case NAME | compiled NAME | sanitize BACKEND) ROWS

Each appends lines of JSON to the file ROWS as it has them, so that a crash loses only the rest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import mechanic_fused
from mechanic_fused import backends

from . import cases, contenders, measure, timing
from .records import Row

ROUNDS = 40
DUEL_SECONDS = 1.2
COPY_SIZE = 1 << 31

FUSED = contenders.torch_adamw("fused")
FOREACH = contenders.torch_adamw("foreach")


def copy_speed(device: torch.device) -> float:
    return timing.copy_speed(device, COPY_SIZE if device.type == "cuda" else 1 << 20)


def effort_on(device: torch.device) -> measure.Effort:
    if device.type == "cuda":
        return measure.Effort(ROUNDS, DUEL_SECONDS, copy_speed(device))
    return measure.Effort(3, 0.0, copy_speed(device))


def machine(device: torch.device) -> Iterator[Row]:
    """What the device is, and how fast it copies."""
    found: Row = {"copy GB/s": round(copy_speed(device) / 1e9, 1), "device": "cpu (dry run)"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["L2 MB"] = round(getattr(properties, "L2_cache_size", 0) / 1e6, 1)
        found["memory GB"] = round(properties.total_memory / 1e9, 1)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        found["driver"] = answer.stdout.strip() or "unknown"
    found["CUDA of torch"] = torch.version.cuda or "absent"
    found["backends"] = ", ".join(row.name for row in backends.table() if row.available)
    yield {"conditions": found}


def our_backends(device: torch.device) -> list[str]:
    """The backends to measure; unavailable ones too, so that the table says why."""
    return ["cuda", "triton"] if device.type == "cuda" else ["cpp", "reference"]


def pairs_of(case: cases.Case, device: torch.device) -> list[measure.Pair]:
    ours = [contenders.adamw(name) for name in our_backends(device)]
    pairs = [(contender, FUSED) for contender in ours]
    if case.dtype is torch.bfloat16:
        names = our_backends(device)
        pairs += [(contenders.adamw(name, narrow_delta=True), FUSED) for name in names]
    pairs += [(FOREACH, FUSED)]
    if case.name.startswith("1.5B"):
        return pairs  # the packages' copies would not fit beside another optimizer
    available = {row.name for row in backends.table() if row.available}
    there = [
        each for each, name in zip(ours, our_backends(device), strict=True) if name in available
    ]
    for opponent in there or [FUSED]:
        pairs += [(contenders.mechanic_pytorch(), opponent)]
    pairs += [(contenders.mechanic_pytorch(fused=True), pairs[-1][1])]
    return pairs + [(contender, FUSED) for contender in contenders.other_tuners()]


def run_case(name: str, device: torch.device) -> Iterator[Row]:
    """All duels of a case; then, for what fits several times, what the host and the device do."""
    case = find_case(name, device)
    effort = effort_on(device)
    for row in measure.rows_of(case, pairs_of(case, device), device, effort):
        yield {"row": row}
    if not name.startswith("1.5B"):
        compared = [contenders.adamw(backend) for backend in our_backends(device)]
        compared += [contenders.torch_adamw("fused", capturable=device.type == "cuda")]
        for look in (facts, replay):
            # Captures come last: one that fails may spoil what follows it.
            for contender in compared:
                yield {"fact": look(contender, case, device)}


def run_compiled(name: str, device: torch.device) -> Iterator[Row]:
    """Torch's optimizers through torch.compile, beside the fused one."""
    case = find_case(name, device)
    compiler = "inductor" if device.type == "cuda" else "eager"
    pairs = [(contenders.compiled(each, compiler), FUSED) for each in (FOREACH, FUSED)]
    effort = effort_on(device)
    for row in measure.rows_of(case, pairs, device, effort):
        yield {"row": row}


def find_case(name: str, device: torch.device) -> cases.Case:
    case = next(case for case in cases.GPU if case.name == name)
    return case if device.type == "cuda" else case.shrunk()


def facts(contender: contenders.Contender, case: cases.Case, device: torch.device) -> Row:
    """How long the host is busy with a step, and what it asks of the device."""
    fact: Row = {"case": case.name, "optimizer": contender.name}
    try:
        runner = timing.start(contender, case, case.draw(device, spread=1e-3, seed=2))
        fact["host_s"] = timing.host_seconds(runner.step, device, ROUNDS)
        if device.type == "cuda":
            fact.update(launches(runner.step))
    except Exception as error:  # the other contenders are still wanted
        fact["failed"] = f"{type(error).__name__}: {error}"[:500]
    return fact


def launches(step: Any, steps: int = 4) -> Row:
    """Return kernels, and copies or fills, of a step, as the device has run them."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    names = [
        event.name()
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
        # The span of a step, which the profiler shows on the device too.
        and not event.name().startswith("Optimizer.")
    ]
    moved = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    if len(names) == moved:
        raise RuntimeError("the profiler saw no kernel")
    counted = {name[:120]: n / steps for name, n in Counter(names).most_common(12)}
    return {
        "launches": (len(names) - moved) / steps,
        "transfers": moved / steps,
        "device_events": counted,
    }


def replay(contender: contenders.Contender, case: cases.Case, device: torch.device) -> Row:
    """How long a step takes when it is replayed from a CUDA graph."""
    fact: Row = {"case": case.name, "optimizer": contender.name}
    if device.type != "cuda":
        return fact
    try:
        runner = timing.start(contender, case, case.draw(device, spread=1e-3, seed=2))
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(timing.WARM_UP):
                runner.step()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            runner.step()
        repeats = max(1, min(20, round(timing.GPU_SAMPLE / runner.seconds)))
        taken = [timing.seconds(graph.replay, device, repeats) for _ in range(ROUNDS)]
        fact["graph_s"] = timing.quartiles(taken)[1]
    except Exception as error:  # as above
        fact["graph_failed"] = f"{type(error).__name__}: {error}"[:500]
    return fact


def sanitize(backend: str, device: torch.device) -> Iterator[Row]:
    """A few steps over awkward sizes, for compute-sanitizer to watch."""
    shapes = ((3,), (0,), (1025,), (37, 41), (40_000,))
    for dtype in (torch.float32, torch.bfloat16):
        for make in (
            lambda w: mechanic_fused.MechanicAdamW(w, lr=1.0, backend=backend),
            lambda w: mechanic_fused.MechanicAdamW(w, backend=backend, narrow_delta=True),
            lambda w: mechanic_fused.MechanicSGD(w, lr=0.1, momentum=0.9, backend=backend),
            lambda w: mechanic_fused.MechanicLion(w, lr=0.1, backend=backend),
        ):
            case = cases.Case("small", shapes, dtype)
            # Drawn by the processor, so that few kernels run but ours; the last one misaligned.
            drawn = [x.to(device) for x in case.draw(torch.device("cpu"), 1.0, 1)]
            weights = [torch.nn.Parameter(x) for x in [*drawn[:-1], drawn[-1][1:]]]
            for x in weights:
                x.grad = torch.ones_like(x)
            optimizer = make(weights)
            for _ in range(4):
                optimizer.step()
            if optimizer.nonfinite_steps:
                raise RuntimeError(f"{optimizer.nonfinite_steps} steps were not finite")
    yield {"fact": {"case": "sanitize", "optimizer": backend}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__)
    parser.add_argument("part", choices=["machine", "case", "compiled", "sanitize"])
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--cpu", action="store_true", help="miniatures on the processor")
    chosen = parser.parse_args()
    device = torch.device("cpu" if chosen.cpu else "cuda")
    if chosen.cpu:
        torch.set_num_threads(1)
    if chosen.part == "machine":
        found = machine(device)
    else:
        run = {"case": run_case, "compiled": run_compiled, "sanitize": sanitize}[chosen.part]
        found = run(chosen.name, device)
    with chosen.rows.open("a") as out:
        for line in found:
            out.write(json.dumps(line) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
