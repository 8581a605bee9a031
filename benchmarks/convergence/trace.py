"""One run of Mechanic, step by step: how the scale finds its place.

python -m benchmarks.convergence.trace char AdamW --seed 7 --steps 200
"""

from __future__ import annotations

import argparse

import torch
from tabulate import tabulate

from .methods import BASES, mechanic
from .tasks import TASKS


def trace(name: str, base: str, seed: int, steps: int, every: int) -> list[dict[str, float]]:
    """Return a row for each so many steps: the mean loss, the range of S, and where it ended."""
    task = TASKS[name]
    problem = task.build(seed)
    trainer = mechanic(base)(problem, task, task.steps)
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
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = trace(arguments.task, arguments.base, arguments.seed, arguments.steps, arguments.every)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    main()
