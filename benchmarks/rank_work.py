"""What each rank of `python -m benchmarks.ranks` does: the weights, the contenders, the clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mechanic_fused import MechanicAdamW
from mechanic_fused.distributed import local, wrap

from . import cases, contenders, timing
from .cases import Case
from .records import Row

CASES = {case.name: case for case in cases.CPU if case.name in ("35M", "1000x1000")}
LAYOUTS = {"fsdp2": 2, "fsdp2xtp": 4}
"""The layouts, and the ranks of each."""

COLLECTIVE_SECONDS = 60
MAX_NORM = 1e3
"""Above the gradients' norm: what clipping costs does not depend on whether it clips."""

OURS = contenders.adamw()
FUSED = contenders.torch_adamw("fused")
CLIPPED = f", max_grad_norm={MAX_NORM:g}"
TORCH_CLIPPED = ", clip_grad_norm_"
PLAIN = ", plain local tensors"
ALONE = "an all-reduce alone"
ALONE_ELEMENTS = 8
"""As many float64 as the sums of one set of groups: a row of a scale and one of presence."""


class Weights(nn.Module):
    """Weights with no model around them; fully_shard takes modules only."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(tensors)


def sharded(case: Case, layout: str) -> list[nn.Parameter]:
    """Return this rank's weights; in fsdp2xtp matrices are split by columns over tp, too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors = case.draw(torch.device("cpu"), spread=0.02, seed=1)
    ranks = dist.get_world_size()
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    else:
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
        # As models do it, norms and biases stay whole over tp, unless there is nothing else.
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


class Reductions:
    """Counts and times the calls of torch.distributed.all_reduce."""

    def __init__(self) -> None:
        self.inner = dist.all_reduce
        self.calls = self.bytes = 0
        self.seconds = 0.0

    def __call__(self, tensor: Tensor, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = self.inner(tensor, *args, **options)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        self.bytes += tensor.nbytes
        return result


def watched(step: Callable[[], Any]) -> tuple[float, Reductions]:
    """Return the seconds of a step that all ranks begin together, and its all-reduces."""
    seen = Reductions()
    with mock.patch.object(dist, "all_reduce", seen):
        dist.barrier()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start, seen


@dataclass
class Runner:
    """An optimizer over weights of its own, warmed up, and what a step of it sends."""

    name: str
    step: Callable[[], Any]
    collectives: int = 0
    reductions: Reductions | None = None

    def warm_up(self) -> Runner:
        from torch.distributed.tensor.debug import CommDebugMode

        for _ in range(timing.WARM_UP):
            self.step()
        with CommDebugMode() as counter:
            self.step()
        self.collectives = counter.get_total_counts()
        self.reductions = watched(self.step)[1]
        return self


def runners(case: Case, layout: str, gradients: list[Tensor]) -> tuple[list[Runner], list[Row]]:
    """Return all contenders, and a row that says why for each that fails."""

    def weights(plain: bool = False) -> list[nn.Parameter]:
        own = sharded(case, layout)
        if plain:
            own = [nn.Parameter(local(p).detach().clone()) for p in own]
        for p, g in zip(own, gradients, strict=True):
            p.grad = wrap(g, p)
        return own

    def torch_clipped() -> Callable[[], Any]:
        own = weights()
        optimizer = FUSED.make(own)

        def step() -> None:
            nn.utils.clip_grad_norm_(own, MAX_NORM)
            optimizer.step()

        return step

    few = torch.zeros(ALONE_ELEMENTS, dtype=torch.float64)
    options = {"lr": 1.0, "weight_decay": contenders.DECAY, "max_grad_norm": MAX_NORM}
    makes: dict[str, Callable[[], Callable[[], Any]]] = {
        FUSED.name: lambda: FUSED.make(weights()).step,
        OURS.name: lambda: OURS.make(weights()).step,
        OURS.name + PLAIN: lambda: OURS.make(weights(plain=True)).step,
        OURS.name + CLIPPED: lambda: MechanicAdamW(weights(), **options).step,
        FUSED.name + TORCH_CLIPPED: torch_clipped,
        ALONE: lambda: lambda: dist.all_reduce(few),
    }
    running, failed = [], []
    for name, make in makes.items():
        try:
            running.append(Runner(name, make()).warm_up())
        except RuntimeError as error:
            # All ranks have the same layout, so they fail alike and meet again at the next.
            why = f"{type(error).__name__}: {error}"[:500]
            failed.append({"case": case.name, "layout": layout, "optimizer": name, "failed": why})
    return running, failed


def measure(case: Case, layout: str, rounds: int) -> list[Row]:
    """Run all contenders by turns, A B C A B C …; return a row of each."""
    gradients = [torch.empty_like(local(p)).normal_(0, 1e-3) for p in sharded(case, layout)]
    running, failed = runners(case, layout, gradients)
    samples = torch.zeros(1 + rounds, len(running), 2, dtype=torch.float64)
    with timing.no_collection():
        for i in range(1 + rounds):
            torch._foreach_neg_(gradients)  # or the learned scale would grow without end
            for j, runner in enumerate(running):
                seconds, seen = watched(runner.step)
                samples[i, j] = torch.tensor([seconds, seen.seconds])
    parts = [torch.zeros_like(samples) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, samples)
    taken = torch.stack(parts)[:, 1:]
    base = taken[:, :, 0, 0].amax(0)
    rows = [row_of(case, layout, r, taken[:, :, j], base) for j, r in enumerate(running)]
    return rows + failed


def row_of(case: Case, layout: str, runner: Runner, taken: Tensor, base: Tensor) -> Row:
    """Return a row; ``taken`` is (ranks, rounds, 2), ``base`` the steps of torch's optimizer.

    A step takes as long as on the slowest rank. An all-reduce also waits for the others: the rank
    that comes last waits least, and its time is what the exchange itself costs.
    """
    steps, spent = taken.unbind(-1)
    low, median, high = timing.quartiles(steps.amax(0).tolist())
    # Clipping by torch calls collectives that do not pass through all_reduce.
    seen = runner.reductions is not None and runner.reductions.calls == runner.collectives
    return {
        "case": case.name,
        "layout": layout,
        "ranks": len(taken),
        "tensors": len(case.shapes),
        "parameters": case.parameters,
        "optimizer": runner.name,
        "rounds": len(base),
        "median_s": median,
        "q1_s": low,
        "q3_s": high,
        "collectives": runner.collectives,
        "collective_bytes": runner.reductions.bytes if seen and runner.reductions else None,
        "reduce_s": spent.mean(0).median().item() if seen else None,
        "reduce_least_s": spent.amin(0).median().item() if seen else None,
        "share": (spent / steps).mean(0).median().item() if seen else None,
        "of_torch": (steps.amax(0) / base).median().item(),
        "samples_s": [float(f"{t:.5g}") for t in steps.amax(0).tolist()],
    }


def work(rank: int, layout: str, names: list[str], rounds: int, quick: bool, folder: str) -> None:
    """What a rank does: joins the others, measures every case; rank 0 writes the rows."""
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
