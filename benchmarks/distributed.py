"""Step times over sharded weights and the cost of the all-reduce, on gloo ranks of one CPU.

python -m benchmarks.distributed [--quick] [--cases 35M,1000x1000] [--layouts fsdp2,fsdp2xtp]
                                 [--rounds N] [--out FILE]

fsdp2 runs on 2 ranks, fsdp2xtp on 4 ranks as 2 x 2, with one thread each. Gradients are made once
and sharded like the weights, so only the optimizer is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mechanic_fused import MechanicAdamW
from mechanic_fused.distributed import local, wrap

from ._harness import baselines, options, records, tables, timing
from ._harness.cases import CPU, Case
from ._harness.measure import reason
from ._harness.records import Record, Row
from ._harness.tables import shown
from ._harness.timing import Step

CASES = {case.name: case for case in CPU if case.name in ("35M", "1000x1000")}
LAYOUTS = {"fsdp2": 2, "fsdp2xtp": 4}
"""The number of ranks of each layout."""

COLLECTIVE_SECONDS = 60
MAX_NORM = 1e3
"""Above the norm of the gradients: clipping costs the same whether or not it scales them."""

OURS = baselines.adamw()
FUSED = baselines.torch_adamw("fused")
CLIPPED = f", max_grad_norm={MAX_NORM:g}"
TORCH_CLIPPED = ", clip_grad_norm_"
PLAIN = ", plain local tensors"
ALONE = "an all-reduce alone"
ALONE_ELEMENTS = 8
"""As many float64 as one all-reduce of sums: one row of sums and one that marks gradients."""


class Weights(nn.Module):
    """Weights without a model: fully_shard only takes modules."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(tensors)


def sharded(case: Case, layout: str) -> list[nn.Parameter]:
    """Return this rank's weights; in fsdp2xtp matrices are also split by columns over tp."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors = case.draw(torch.device("cpu"), spread=0.02, seed=1)
    ranks = dist.get_world_size()
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    else:
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
        # As in real models, vectors are not split over tp, unless there is nothing else.
        least = min(2, max(t.dim() for t in tensors))
        tensors = [
            distribute_tensor(t, mesh["tp"], [Shard(t.dim() - 1)], src_data_rank=None)
            if t.dim() >= least
            else t
            for t in tensors
        ]
    module = Weights(tensors)
    fully_shard(module, mesh=mesh["dp"])
    return list(module.parameters())


@dataclass
class AllReduces:
    """Replaces torch.distributed.all_reduce, to count and time its calls."""

    inner: Any = field(default_factory=lambda: dist.all_reduce)
    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = self.inner(tensor, *args, **kwargs)
        self.seconds += time.perf_counter() - began
        self.calls += 1
        self.bytes += tensor.nbytes
        return result


def timed(step: Step) -> tuple[float, AllReduces]:
    """Return the seconds of a step that all ranks start together, and its all-reduces."""
    counter = AllReduces()
    with mock.patch.object(dist, "all_reduce", counter):
        dist.barrier()
        began = time.perf_counter()
        step()
        return time.perf_counter() - began, counter


class Runner:
    """An optimizer over its own weights, warmed up, and what one of its steps sends."""

    def __init__(self, name: str, step: Step) -> None:
        from torch.distributed.tensor.debug import CommDebugMode

        self.name, self.step = name, step
        for _ in range(timing.WARM_UP):
            step()
        with CommDebugMode() as counter:
            step()
        self.collectives = counter.get_total_counts()
        counted = timed(step)[1]
        # torch's clipping calls collectives that do not pass through all_reduce.
        self.all_timed = counted.calls == self.collectives
        self.bytes = counted.bytes


def runners(case: Case, layout: str, gradients: list[Tensor]) -> tuple[list[Runner], list[Row]]:
    """Return all runners, and a row with the reason for each optimizer that fails."""

    def weights(plain: bool = False) -> list[nn.Parameter]:
        own = sharded(case, layout)
        if plain:
            own = [nn.Parameter(local(p).detach().clone()) for p in own]
        for p, g in zip(own, gradients, strict=True):
            p.grad = wrap(g, p)
        return own

    def torch_clipped() -> Step:
        own = weights()
        optimizer = FUSED.make(own)

        def step() -> None:
            nn.utils.clip_grad_norm_(own, MAX_NORM)
            optimizer.step()

        return step

    few = torch.zeros(ALONE_ELEMENTS, dtype=torch.float64)
    chosen = {"lr": 1.0, "weight_decay": baselines.DECAY, "max_grad_norm": MAX_NORM}
    makes = {
        FUSED.name: lambda: FUSED.make(weights()).step,
        OURS.name: lambda: OURS.make(weights()).step,
        OURS.name + PLAIN: lambda: OURS.make(weights(plain=True)).step,
        OURS.name + CLIPPED: lambda: MechanicAdamW(weights(), **chosen).step,
        FUSED.name + TORCH_CLIPPED: torch_clipped,
        ALONE: lambda: lambda: dist.all_reduce(few),
    }
    running, failed = [], []
    for name, make in makes.items():
        try:
            running.append(Runner(name, make()))
        except RuntimeError as error:
            # All ranks have the same layout, so they all fail here and continue together.
            row = {"case": case.name, "layout": layout, "optimizer": name}
            failed.append({**row, "failed": reason(error)})
    return running, failed


def measure(case: Case, layout: str, rounds: int) -> list[Row]:
    """Time all optimizers in turn, A B C A B C …; return a row of each."""
    gradients = [torch.empty_like(local(p)).normal_(0, 1e-3) for p in sharded(case, layout)]
    running, failed = runners(case, layout, gradients)
    samples = torch.zeros(1 + rounds, len(running), 2, dtype=torch.float64)
    with timing.no_collection():
        for i in range(1 + rounds):
            torch._foreach_neg_(gradients)  # otherwise the learned scale would grow without bound
            for j, runner in enumerate(running):
                seconds, counter = timed(runner.step)
                samples[i, j] = torch.tensor([seconds, counter.seconds])
    ranks = [torch.zeros_like(samples) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, samples)
    taken = torch.stack(ranks)[:, 1:]
    base = taken[:, :, 0, 0].amax(0)
    return [row_of(case, layout, r, taken[:, :, j], base) for j, r in enumerate(running)] + failed


def row_of(case: Case, layout: str, runner: Runner, taken: Tensor, base: Tensor) -> Row:
    """Return a row.

    A step takes as long as on the slowest rank. The time of an all-reduce includes waiting for
    other ranks; the rank that comes last waits least, and its time is the exchange itself.

    Args:
        taken: (ranks, rounds, 2), the seconds of steps and of their all-reduces.
        base: (rounds,), the steps of torch's optimizer.
    """
    steps, reducing = taken.unbind(-1)
    row = {
        "case": case.name,
        "layout": layout,
        "ranks": len(taken),
        "tensors": len(case.shapes),
        "parameters": case.parameters,
        "optimizer": runner.name,
        "rounds": len(base),
        **timing.spread(steps.amax(0).tolist()),
        "collectives": runner.collectives,
        "of_torch": (steps.amax(0) / base).median().item(),
    }
    if runner.all_timed:
        row["collective_bytes"] = runner.bytes
        row["reduce_s"] = reducing.mean(0).median().item()
        row["reduce_least_s"] = reducing.amin(0).median().item()
        row["share"] = (reducing / steps).mean(0).median().item()
    return row


def work(rank: int, layout: str, names: list[str], rounds: int, quick: bool, folder: str) -> None:
    """Measure every case as one of the ranks; rank 0 writes the rows."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{layout}.store",
        rank=rank,
        world_size=LAYOUTS[layout],
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    rows = []
    for name in names:
        case = CASES[name]
        rows += measure(case.shrunk() if quick else case, layout, rounds)
    if rank == 0:
        Path(folder, f"{layout}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def run_layout(layout: str, names: list[str], rounds: int, quick: bool) -> list[Row]:
    """Start the ranks of a layout, wait for them, and return the rows."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (layout, names, rounds, quick, folder)
        torch.multiprocessing.spawn(work, arguments, nprocs=LAYOUTS[layout])
        return json.loads(Path(folder, f"{layout}.json").read_text())


def rank_table(rows: list[Row]) -> str:
    """Return the table of all rows."""
    headers = ["case", "layout", "optimizer", "ms", "quartiles", "× torch", "all-reduce ms"]
    headers += ["least of all ranks", "share", "collectives", "bytes"]
    lines = []
    for row in rows:
        first = [row["case"], row["layout"], row["optimizer"]]
        if "failed" in row:
            lines.append([*first, "failed", row["failed"][:60], *[""] * 6])
            continue
        lines.append(
            [
                *first,
                shown(row["median_s"], 3, 1e-3),
                tables.spread(row, "q1_s", "q3_s", unit=1e-3),
                shown(row["of_torch"]),
                shown(row.get("reduce_s"), 3, 1e-3),
                shown(row.get("reduce_least_s"), 3, 1e-3),
                f"{row['share']:.1%}" if "share" in row else "–",
                str(row["collectives"]),
                shown(row.get("collective_bytes"), 1),
            ]
        )
    return tables.table(headers, lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.parser("distributed", __doc__, "distributed.csv")
    parser.add_argument("--quick", action="store_true", help="miniatures: does it run at all?")
    parser.add_argument("--cases", type=options.names_among(CASES), default=list(CASES))
    parser.add_argument("--layouts", type=options.names_among(LAYOUTS), default=["fsdp2"])
    parser.add_argument("--rounds", type=options.at_least(3), default=31)
    return parser.parse_args(arguments)


def run(chosen: argparse.Namespace) -> Record:
    torch.set_num_threads(1)
    load = records.BackgroundLoad()
    record = Record(
        {
            **records.environment(miniature=chosen.quick),
            "method": "A B C A B C … after a barrier each; a step is the slowest rank's, an "
            "all-reduce the mean of all ranks, waiting included; gloo, one thread a rank, one "
            "machine",
        }
    )
    for layout in chosen.layouts:
        if LAYOUTS[layout] > (record.environment["cores"] or 1):
            print(f"{layout}: {LAYOUTS[layout]} ranks share the cores and wait", file=sys.stderr)
        rounds = 3 if chosen.quick else chosen.rounds
        record.rows += run_layout(layout, chosen.cases, rounds, chosen.quick)
    record.environment["cores busy with other work"] = load.cores()
    record.save(chosen.out)
    return record


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    record = Record.load(chosen.out) if chosen.report else run(chosen)
    print(tables.heading(record), rank_table(record.rows), sep="\n\n")


if __name__ == "__main__":
    main()
