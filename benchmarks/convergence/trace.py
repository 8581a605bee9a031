"""One run of Mechanic, step by step: how the scale evolves.

python -m benchmarks.convergence.trace char AdamW --seed 7 --steps 200
"""

from __future__ import annotations

from functools import partial

import torch
from tabulate import tabulate

from .._harness import options
from .ablations import ARMS
from .methods import BASES, Make, mechanic
from .tasks import TASKS, Task


def trace(
    name: str, base: str, seed: int, steps: int, every: int, arm: str = "default"
) -> list[dict[str, float]]:
    """Return a row for every ``every`` steps: the mean loss, the range and last value of S."""
    chosen, change = ARMS[arm][1]
    with change:
        return _traced(partial(mechanic, base, chosen), TASKS[name], seed, steps, every)


def _traced(make: Make, task: Task, seed: int, steps: int, every: int) -> list[dict[str, float]]:
    problem = task.build(seed)
    trainer = make(problem, task, task.steps)
    rows, losses, scales = [], [], []
    for t in range(1, min(steps, task.steps) + 1):
        lr = trainer.optimizer.param_groups[0]["lr"]
        losses.append(trainer.train_step(problem, problem.batch(), task.clip).item())
        scales.append(float(trainer.optimizer.scale))
        if t % every == 0:
            row = {"step": t, "loss": sum(losses) / every}
            row |= {"smallest S": min(scales), "largest S": max(scales), "S": scales[-1], "lr": lr}
            rows.append(row)
            losses, scales = [], []
    return rows


def main() -> None:
    parser = options.parser("convergence.trace", __doc__)
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
