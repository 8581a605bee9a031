"""The parts of `python -m benchmarks.gpu` that use the device, each in its own process.

    python -m benchmarks.gpu.parts (machine | case NAME | compiled NAME | sanitize BACKEND) FILE

Each appends lines of JSON to FILE as soon as it has them, so that a crash loses only the rest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import mechanic_fused
from mechanic_fused import backends

from .._harness import baselines, cases, measure, timing
from .._harness.baselines import OptimizerSpec
from .._harness.records import Row

ROUNDS = 40
PAIR_SECONDS = 1.2
COPY_SIZE = 1 << 31

FUSED = baselines.torch_adamw("fused")
FOREACH = baselines.torch_adamw("foreach")


def copy_speed(device: torch.device) -> float:
    return timing.copy_speed(device, COPY_SIZE if device.type == "cuda" else 1 << 20)


def budget_for(device: torch.device) -> measure.Budget:
    if device.type == "cuda":
        return measure.Budget(ROUNDS, PAIR_SECONDS, copy_speed(device))
    return measure.Budget(3, 0.0, copy_speed(device))


def machine(_: str, device: torch.device) -> Iterator[Row]:
    """Describe the device and measure its copy speed."""
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
    found["backends"] = ", ".join(sorted(available()))
    yield {"environment": found}


def available() -> set[str]:
    return {row.name for row in backends.table() if row.available}


def our_backends(device: torch.device) -> list[str]:
    """Return the backends to measure, available or not: the table then says why not."""
    return ["cuda", "triton"] if device.type == "cuda" else ["cpp", "reference"]


def pairs_of(case: cases.Case, device: torch.device) -> list[measure.Pair]:
    names = our_backends(device)
    pairs = [(baselines.adamw(name), FUSED) for name in names]
    pairs += [(baselines.adamw(name, x_ref_every=8), FUSED) for name in names]
    pairs += [(baselines.adamw(name, variant="annealed"), FUSED) for name in names]
    narrow = [baselines.adamw(name, optim_bits=bits) for name in names for bits in (8, 16)]
    pairs += [(each, FUSED) for each in narrow]
    if case.dtype is torch.bfloat16:
        options = {"optim_bits": 8, "bf16_stochastic_round": True}
        pairs += [(baselines.adamw(name, **options), FUSED) for name in names]
    else:
        pairs += [(baselines.adamw(name, optim_bits=8, x_ref_every=8), FUSED) for name in names]
        # The fair rival: 20 bytes a weight.
        pairs += [(each, baselines.torch_adamw_narrow()) for each in narrow]
    for each in baselines.lean_adamws():
        pairs += [(each, FUSED)]
        pairs += [(baselines.adamw(name, optim_bits=8), each) for name in names]
    pairs += [(FOREACH, FUSED)]
    if case.name in ("1.5B", "124M"):
        pairs += [(baselines.muon(), baselines.torch_muon())]
    if case.name.startswith("1.5B"):
        return pairs  # the other packages' copies would not fit into memory
    ours = [baselines.adamw(name) for name in names if name in available()] or [FUSED]
    pairs += [(baselines.mechanic_pytorch(), each) for each in ours]
    pairs += [(baselines.mechanic_pytorch(fused=True), ours[-1])]
    return pairs + [(other, FUSED) for other in baselines.other_tuners()]


def run_case(name: str, device: torch.device) -> Iterator[Row]:
    """Measure all pairs of a case; then, for small cases, what the host and the device do."""
    case = find_case(name, device)
    for row in measure.measure_case(case, pairs_of(case, device), device, budget_for(device)):
        yield {"row": row}
    if not name.startswith("1.5B"):
        compared = [baselines.adamw(backend) for backend in our_backends(device)]
        compared += [baselines.torch_adamw("fused", capturable=device.type == "cuda")]
        # Captures come last: one that fails may break what follows it.
        for measure_host in (host_work, graph_replay):
            for spec in compared:
                yield {"host": measure_host(spec, case, device)}


def run_compiled(name: str, device: torch.device) -> Iterator[Row]:
    """Measure torch's optimizers through torch.compile, beside the fused one."""
    case = find_case(name, device)
    compiler = "inductor" if device.type == "cuda" else "eager"
    pairs = [(baselines.compiled(each, compiler), FUSED) for each in (FOREACH, FUSED)]
    for row in measure.measure_case(case, pairs, device, budget_for(device)):
        yield {"row": row}


def find_case(name: str, device: torch.device) -> cases.Case:
    case = next(case for case in cases.GPU if case.name == name)
    return case if device.type == "cuda" else case.shrunk()


def host_work(spec: OptimizerSpec, case: cases.Case, device: torch.device) -> Row:
    """Return how long the host is busy with a step, and the kernels and copies it launches."""
    row: Row = {"case": case.name, "optimizer": spec.name}
    try:
        runner = timing.start(spec, case, case.draw(device, spread=1e-3, seed=2))
        row["host_s"] = timing.host_seconds(runner.step, device, ROUNDS)
        if device.type == "cuda":
            row.update(launches(runner.step))
    except Exception as error:  # measure the other optimizers regardless
        row["host_failed"] = measure.reason(error)
    return row


def launches(step: Any, steps: int = 4) -> Row:
    """Return the kernels, and the copies or fills, of a step as seen by the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    names = [
        event.name()
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
        # The profiler shows the span of a step on the device too.
        and not event.name().startswith("Optimizer.")
    ]
    moved = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    if len(names) == moved:
        raise RuntimeError("the profiler saw no kernel")
    return {"launches": (len(names) - moved) / steps, "transfers": moved / steps}


def graph_replay(spec: OptimizerSpec, case: cases.Case, device: torch.device) -> Row:
    """Return how long a step takes when it is replayed from a CUDA graph."""
    row: Row = {"case": case.name, "optimizer": spec.name}
    if device.type != "cuda":
        return row
    try:
        runner = timing.start(spec, case, case.draw(device, spread=1e-3, seed=2))
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
        row["graph_s"] = timing.quartiles(taken)[1]
    except Exception as error:  # as above
        row["graph_failed"] = measure.reason(error)
    return row


def sanitize(backend: str, device: torch.device) -> Iterator[Row]:
    """Take a few steps over awkward sizes while compute-sanitizer watches."""
    shapes = ((3,), (0,), (1025,), (37, 41), (40_000,))
    for dtype in (torch.float32, torch.bfloat16):
        for make in (
            lambda w: mechanic_fused.MechanicAdamW(w, lr=1.0, backend=backend),
            lambda w: mechanic_fused.MechanicAdamW(w, x_ref_every=8, backend=backend),
            lambda w: mechanic_fused.MechanicAdamW(w, backend=backend, delta_dtype=torch.bfloat16),
            lambda w: mechanic_fused.MechanicSGD(w, lr=0.1, momentum=0.9, backend=backend),
            lambda w: mechanic_fused.MechanicLion(w, lr=0.1, backend=backend),
        ):
            case = cases.Case("small", shapes, dtype)
            # Drawn on the CPU, so that few kernels other than ours run; the last is misaligned.
            drawn = [x.to(device) for x in case.draw(torch.device("cpu"), 1.0, 1)]
            weights = [torch.nn.Parameter(x) for x in [*drawn[:-1], drawn[-1][1:]]]
            for x in weights:
                x.grad = torch.ones_like(x)
            optimizer = make(weights)
            for _ in range(4):
                optimizer.step()
            if optimizer.nonfinite_steps:
                raise RuntimeError(f"{optimizer.nonfinite_steps} steps were not finite")
    yield {}


PARTS = {"machine": machine, "case": run_case, "compiled": run_compiled, "sanitize": sanitize}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="miniatures on the CPU")
    chosen = parser.parse_args()
    device = torch.device("cpu" if chosen.cpu else "cuda")
    if chosen.cpu:
        torch.set_num_threads(1)
    with chosen.out.open("a") as out:
        for line in PARTS[chosen.part](chosen.name, device):
            out.write(json.dumps(line) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
