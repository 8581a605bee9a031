"""A whole training step in one CUDA graph: forward, backward and the optimizer's step.

    python examples/cuda_graph.py               # a few seconds on a GPU
    python examples/cuda_graph.py --float-lr    # with a float lr, copied before each replay

A small network learns a fixed function of random points. A replay runs no Python: the loop only
fills the graph's inputs, replays it, and steps the scheduler. docs/cuda-graphs.md has the rules.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from mechanic_fused import MechanicAdamW

WARM_UP = 3  # steps outside the graph, which train like any other
BATCH, FEATURES = 256, 8


class StepOutputs(NamedTuple):
    """Tensors on the device after a step; the next step overwrites them."""

    x: Tensor
    y: Tensor
    loss: Tensor


def network(device: str = "cuda") -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 256), nn.GELU(), nn.Linear(256, 1)).to(device)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def fill(x: Tensor, y: Tensor) -> None:
    """Write a new batch to the graph's inputs."""
    x.normal_()
    y.copy_(x.sin().sum(1, keepdim=True))


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    steps: int,
    show: Callable[[int, StepOutputs], None] = lambda t, seen: None,
) -> None:
    """Train a network in a graph after a few warm-up steps; call ``show`` after each step."""
    device = next(model.parameters()).device
    scheduler = CosineAnnealingLR(opt, T_max=steps)
    x, y = torch.empty(BATCH, FEATURES, device=device), torch.empty(BATCH, 1, device=device)

    def training_step() -> Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        opt.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(WARM_UP):
            opt.zero_grad(set_to_none=True)
            fill(x, y)
            show(t, StepOutputs(x, y, training_step()))
            scheduler.step()
    torch.cuda.current_stream().wait_stream(side)

    opt.refresh_hyperparameters()  # the scheduler has changed lr since the last step
    opt.zero_grad(set_to_none=True)  # backward then allocates gradients in the graph's memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training_step()  # recorded, not run

    for t in range(WARM_UP, steps):
        fill(x, y)
        graph.replay()
        show(t, StepOutputs(x, y, loss))
        scheduler.step()
        if not torch.is_tensor(opt.param_groups[0]["lr"]):
            opt.refresh_hyperparameters()


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole training step in one CUDA graph.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--float-lr", action="store_true", help="lr as a float, not a tensor")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, the steps before the capture")
    if not torch.cuda.is_available():
        sys.exit("cuda_graph.py needs a GPU: torch.cuda.is_available() is False")
    torch.manual_seed(0)
    model = network()
    # A tensor on the device is read by each replay; a float must be copied there before.
    lr = 1.0 if args.float_lr else torch.tensor(1.0, device="cuda")
    opt = MechanicAdamW(model.parameters(), lr=lr, weight_decay=0.01)
    if opt.implementation not in ("fused (cuda)", "fused (triton)"):
        sys.exit(f"a capture needs the CUDA or the Triton backend, got {opt.implementation}")

    def show(t: int, seen: StepOutputs) -> None:
        if t == WARM_UP or (t + 1) % 100 == 0:  # reading the loss waits for the device
            rate = opt.learned_lr()[0]
            print(f"step {t:5}  loss {seen.loss.item():.4f}  learned lr {rate:.3g}")

    train(model, opt, args.steps, show)


if __name__ == "__main__":
    main()
