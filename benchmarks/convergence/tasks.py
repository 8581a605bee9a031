"""The tasks and their recipes, which are the same for every optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import images, infilling, large, tabular, text, tokens
from .problem import Problem


@dataclass(frozen=True)
class Task:
    """A model, its data and its recipe.

    Args:
        build: seed → problem; the weights, the split and the order of batches depend only on it.
        steps: T, the shorter horizon.
        seconds: roughly, of a run of T steps; used to order the runs.
        metric: the validation score that is compared, "loss" or "accuracy".
        schedule: "drops", × 0.1 at 60, 80 and 95 % of the steps, or "cosine", after 5 % warm-up.
        decay: weight decay of the base; 0 where the loss has an L2 term.
        clip: the maximum norm of the gradients, if the recipe clips them.
        horizons: in multiples of ``steps``.
        bases: the base optimizers that run on it.
        smaller_lr: divides the middle of each first grid: a large model needs a smaller lr.
        on_request: run only when named, and without the other packages: it needs a GPU.
        unseen: nothing of Mechanic was chosen on it.
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
    smaller_lr: int = 1
    on_request: bool = False
    unseen: bool = False


def _regression(name: str, steps: int, seconds: float) -> Task:
    """Logistic regression: batches of 16 for 100 epochs."""
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
        smaller_lr=8,
        on_request=True,
    ),
    "tokens": Task(tokens.token_types, 600, 5, clip=1.0),
    "topics": Task(text.wider, 500, 10, metric="loss", decay=0.0, clip=1.0, bases=("AdamW",)),
    "vit": Task(images.vit, 1000, 8, clip=1.0),
    "seq2seq": Task(infilling.seq2seq, 600, 8, metric="loss", clip=1.0),
    "denoise": Task(images.denoise, 1000, 5, metric="loss"),
    "mixer": Task(images.mixer, 1000, 6, clip=1.0, unseen=True),
    "masked": Task(text.masked, 600, 8, metric="loss", clip=1.0, unseen=True),
    "flow": Task(images.flow, 1000, 5, metric="loss", clip=1.0, unseen=True),
}
