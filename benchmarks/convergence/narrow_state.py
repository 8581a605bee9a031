"""The base's state in fewer bits: twins of the same seed, which differ in that alone.

Beside them AdamW at the best rate of its grid, with its state as torch and other packages narrow
it: twins of AdamW with a float32 state.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .methods import DECAY, Trainer, optimizer
from .problem import Problem
from .schedules import schedule
from .tasks import Task

BITS = (32, 16, 8)
BETAS2 = (0.999, 0.95)

TASKS = ("char", "lora", "tokens", "digits_mlp", "digits_conv", "vit", "seq2seq", "mixer", "masked")
"""Those whose weights are large enough to be narrow."""


def arm(beta2: float, bits: int) -> str:
    """Return the name of an arm."""
    return f"beta2 {beta2:g} {bits} bits"


def control(beta2: float) -> str:
    """Return the name of the arm in 32 bits that is rounded otherwise."""
    return f"{arm(beta2, 32)} other rounding"


NARROW: dict[str, dict[str, Any]] = {
    arm(beta2, bits): {"betas": (0.9, beta2), "optim_bits": bits}
    for beta2 in BETAS2
    for bits in BITS
}
"""Arm → options of MechanicAdamW."""

NARROW |= {control(beta2): {"betas": (0.9, beta2), "eps": 1e-8 * (1 + 1e-6)} for beta2 in BETAS2}
"""The controls: how far apart twins end that differ in nothing but roundings."""


def rounded(lr: float, problem: Problem, task: Task) -> Any:
    """Return torch's AdamW with its state in bfloat16, to nearest.

    torch's fused kernel computes in float32 and rounds what it stores; on the CPU it takes no
    state that is narrower than the weights, so here a hook rounds a float32 state.
    """
    made = optimizer("AdamW", lr, problem, task)

    def round_state(*_: Any) -> None:
        for state in made.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(state[name].bfloat16())

    made.register_step_post_hook(round_state)
    return made


def torchao(lr: float, problem: Problem, task: Task) -> Any:
    """Return torchao's AdamW8bit."""
    package = importlib.import_module("torchao.optim")
    return package.AdamW8bit(problem.weights(), lr=lr, weight_decay=DECAY["AdamW"] * task.decay)


def bitsandbytes(lr: float, problem: Problem, task: Task) -> Any:
    """Return bitsandbytes' AdamW8bit."""
    package = importlib.import_module("bitsandbytes")
    decay = DECAY["AdamW"] * task.decay
    return package.optim.AdamW8bit(problem.weights(), lr=lr, weight_decay=decay)


RIVALS: dict[str, Callable[[float, Problem, Task], Any]] = {
    "torch, bfloat16 state": rounded,
    "torchao, 8 bits": torchao,
    "bitsandbytes, 8 bits": bitsandbytes,
}
"""Arm → (lr, problem, task) → AdamW with a narrow state."""


def installed() -> list[str]:
    """Return the arms of RIVALS whose package is installed."""
    return [arm for arm in RIVALS if find_spec(arm.partition(",")[0]) is not None]


class Eager(Trainer):
    """What a step compiles runs eagerly: torchao compiles once for each shape, for seconds."""

    def step(self, **given: Tensor) -> None:
        with torch.compiler.set_stance("force_eager"):
            super().step(**given)


def rival(arm: str, lr: float, problem: Problem, task: Task, steps: int) -> Trainer:
    """Train with AdamW at this learning rate, its state narrow."""
    made = RIVALS[arm](lr, problem, task)
    return Eager(problem.model, made, schedule(made, task, steps))
