"""Text that Python's installation carries: a character model and its low-rank fine-tune."""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..records import ROOT
from .problem import Problem, Scores

CONTEXT, BATCH = 64, 8
WINDOWS, KEPT = 256, 1024
"""How many windows of text the scores are taken over at the end, of training and of validation."""

MODULES = """
argparse ast calendar configparser datetime difflib doctest inspect
logging pathlib pickle statistics tarfile turtle typing zipfile
""".split()
PRETRAINING, PRETRAINING_RATE = 2000, 1e-2
RANK = 8


@cache
def example() -> Any:
    """Return examples/char_model.py, which is a script's neighbour and in no package."""
    spec = importlib.util.spec_from_file_location("char_model", ROOT / "examples/char_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _documentation() -> Any:
    return example().load_text()


@cache
def source() -> tuple[str, str]:
    """Return the source of some of Python's modules, (train, validation)."""
    texts = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    kept = max(1, len(texts) // 5)
    return "\n".join(texts[kept:]), "\n".join(texts[:kept])


class Language(Problem):
    """The next character, in windows of validation text that do not overlap."""

    def __init__(self, model: nn.Module, seed: int, train: Tensor, validation: Tensor) -> None:
        super().__init__(model, seed)
        self.train, self.validation = train, validation

    def batch(self) -> Tensor:
        return example().random_batch(self.train, BATCH, CONTEXT, self.generator)

    def loss(self, batch: Tensor) -> Tensor:
        return self.model.loss(batch)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        seen = self.train[: WINDOWS * CONTEXT + 1]
        kept = self.validation[: KEPT * CONTEXT + 1]
        windows = kept.unfold(0, CONTEXT + 1, CONTEXT)
        right = total = 0
        for part in windows.split(128):
            right += (model(part[:, :-1]).argmax(-1) == part[:, 1:]).sum().item()
            total += part[:, 1:].numel()
        return {
            "train_loss": example().validation_loss(model, seen),
            "validation_loss": example().validation_loss(model, kept),
            "accuracy": right / total,
        }


def characters(seed: int) -> Language:
    """A two-layer transformer, width 64, on Python's documentation."""
    text = _documentation()
    torch.manual_seed(seed)
    model = example().CharModel(len(text.vocabulary), context=CONTEXT)
    return Language(model, seed, text.train, text.validation)


class LowRank(nn.Module):
    """A linear layer that stays as it is, plus B·A, which is learned and is 0 at the start."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.a), self.b)


@cache
def _pretrained() -> dict[str, Tensor]:
    """Return the character model after AdamW's steps on the documentation, the same for all."""
    problem = characters(seed=1234)
    opt = torch.optim.AdamW(problem.model.parameters(), lr=PRETRAINING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, PRETRAINING_RATE, PRETRAINING)
    for _ in range(PRETRAINING):
        opt.zero_grad()
        problem.loss(problem.batch()).backward()
        nn.utils.clip_grad_norm_(problem.model.parameters(), 1.0)
        opt.step()
        schedule.step()
    return problem.model.state_dict()


def low_rank(seed: int) -> Language:
    """The documentation's model, fine-tuned to Python source by matrices of rank 8."""
    vocabulary = _documentation().vocabulary
    number = {character: i for i, character in enumerate(vocabulary)}
    parts = [torch.tensor([number.get(c, 0) for c in part]) for part in source()]
    state = _pretrained()
    torch.manual_seed(seed)
    model = example().CharModel(len(vocabulary), context=CONTEXT)
    model.load_state_dict(state)
    model.requires_grad_(False)
    for block in model.blocks:
        block.query_key_value = LowRank(block.query_key_value)
        block.attention_out = LowRank(block.attention_out)
        block.perceptron[1] = LowRank(block.perceptron[1])
        block.perceptron[3] = LowRank(block.perceptron[3])
    return Language(model, seed, *parts)
