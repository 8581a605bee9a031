"""One run of Mechanic, step by step: how the scale finds its place.

python -m benchmarks.convergence.trace char AdamW --seed 7 --steps 200
"""

from __future__ import annotations

import argparse

import torch
from tabulate import tabulate

from .ablations import ARMS
from .methods import BASES, Make, mechanic
from .tasks import TASKS, Task


def trace(
    name: str, base: str, seed: int, steps: int, every: int, arm: str = "default"
) -> list[dict[str, float]]:
    """Return a row for each so many steps: the mean loss, the range of S, and where it ended."""
    options, change = ARMS[arm][1]
    with change:
        return _traced(mechanic(base, **options), TASKS[name], seed, steps, every)


def _traced(make: Make, task: Task, seed: int, steps: int, every: int) -> list[dict[str, float]]:
    problem = task.build(seed)
    trainer = make(problem, task, task.steps)
    rows, losses, scales = [], [], []
    for t in range(1, min(steps, task.steps) + 1):
        factor = trainer.optimizer.param_groups[0]["lr"]
        loss = problem.loss(problem.batch())
        trainer.backward(loss, task.clip)
        trainer.step()
        losses.append(loss.item())
        scales.append(float(trainer.optimizer.scale))
        if t % every == 0:
            rows.append(
                {
                    "step": t,
                    "loss": sum(losses) / every,
                    "smallest S": min(scales),
                    "largest S": max(scales),
                    "S": scales[-1],
                    "lr": factor,
                }
            )
            losses, scales = [], []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence.trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="task", choices=TASKS)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--arm", choices=ARMS, default="default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = trace(**vars(arguments))
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    main()
