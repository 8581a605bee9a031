"""What is trained: each task's recipe, the same for every optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import large, tabular, text, tokens
from .problem import Problem


@dataclass(frozen=True)
class Task:
    """A model, its data and its recipe.

    Args:
        build: seed → the problem: weights, split and order of the batches depend on the seed alone.
        steps: T, the shorter horizon.
        seconds: about what a run of T takes, for the order of the runs.
        metric: what is compared, "loss" or "accuracy", both on the validation split.
        schedule: "drops", × 0.1 at 60, 80 and 95 % of the steps, or "cosine", after 5 % warm-up.
        decay: weight decay of the base; 0 where the loss has an L2 term of its own.
        clip: the largest norm of the gradients, where the recipe clips them.
        horizons: in multiples of ``steps``.
        bases: the base optimizers that it is run with.
        narrower: what the middle of each base's first grid is divided by: a large model wants less.
        on_request: run only when named: it needs a GPU. The other packages are not run then.
    """

    build: Callable[[int], Problem]
    steps: int
    seconds: float
    metric: str = "accuracy"
    schedule: str = "cosine"
    decay: float = 0.01
    clip: float | None = None
    horizons: tuple[int, ...] = (1,)
    bases: tuple[str, ...] = ("SGD", "AdamW", "Lion")
    narrower: int = 1
    on_request: bool = False


def _regression(name: str, steps: int, seconds: float) -> Task:
    """Logistic regression: batches of 16, 100 epochs, the learning rate × 0.1 at 60, 80 and 95."""
    return Task(
        lambda seed: tabular.regression(name, seed), steps, seconds, schedule="drops", decay=0.0
    )


TASKS = {
    "iris": _regression("iris", 700, 0.2),
    "wine": _regression("wine", 900, 0.2),
    "breast_cancer": _regression("breast_cancer", 2700, 0.6),
    "digits": _regression("digits", 8500, 2),
    "digits_mlp": Task(tabular.digits_mlp, 500, 0.2, horizons=(1, 4)),
    "digits_conv": Task(tabular.digits_conv, 1000, 1),
    "char": Task(text.characters, 1000, 8, metric="loss", clip=1.0, horizons=(1, 4)),
    "lora": Task(text.low_rank, 500, 5, metric="loss", clip=1.0),
    "gpt2": Task(
        *(large.gpt2, 2000, 100),
        metric="loss",
        clip=1.0,
        bases=("AdamW",),
        narrower=8,
        on_request=True,
    ),
    "tokens": Task(tokens.token_types, 600, 5, clip=1.0),
}
"""The metric's tolerance is tables.WITHIN."""
