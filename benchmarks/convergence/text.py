"""Text that comes with Python: character models, and the low-rank fine-tuning of one."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._harness.records import ROOT
from .problem import Problem, Scores
from .transformer import encoder_layers

CONTEXT, BATCH = 64, 8
TRAIN_WINDOWS, VALIDATION_WINDOWS = 256, 1024
"""Windows of text that the final losses are computed over."""

MODULES = (
    *("argparse", "ast", "calendar", "configparser", "datetime", "difflib", "doctest", "inspect"),
    *("logging", "pathlib", "pickle", "statistics", "tarfile", "turtle", "typing", "zipfile"),
)
PRETRAINING, PRETRAINING_RATE = 2000, 1e-2
RANK = 8
MASKED = 0.15
"""The part of a window that a masked language model predicts."""


@cache
def example() -> Any:
    """Import examples/char_model.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("char_model", ROOT / "examples/char_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _documentation() -> Any:
    return example().load_text()


@cache
def source() -> tuple[str, str]:
    """Return the source of some standard modules, (train, validation)."""
    # Read without importing them: turtle wants a display's library.
    files = [importlib.util.find_spec(name).origin for name in MODULES]
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    held_out = max(1, len(texts) // 5)
    return "\n".join(texts[held_out:]), "\n".join(texts[:held_out])


class Language(Problem):
    """Predict the next character; the losses are over windows that do not overlap."""

    def __init__(
        self, model: nn.Module, seed: int, train: Tensor, validation: Tensor, size: int = BATCH
    ) -> None:
        super().__init__(model, seed)
        self.train, self.validation, self.size = train, validation, size

    def batch(self) -> Tensor:
        return example().random_batch(self.train, self.size, CONTEXT, self.generator)

    def loss(self, batch: Tensor) -> Tensor:
        return self.model.loss(batch)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        train = self.train[: TRAIN_WINDOWS * CONTEXT + 1]
        validation = self.validation[: VALIDATION_WINDOWS * CONTEXT + 1]
        return {
            "train_loss": example().validation_loss(model, train),
            "validation_loss": example().validation_loss(model, validation),
        }


def characters(seed: int) -> Language:
    """A transformer with two layers of width 64 on Python's documentation."""
    text = _documentation()
    torch.manual_seed(seed)
    model = example().CharModel(len(text.vocabulary), context=CONTEXT)
    return Language(model, seed, text.train, text.validation)


@cache
def _topics() -> tuple[Tensor, Tensor, int]:
    """Return the help topics as they are, (train, validation), and the number of characters."""
    text = "\n".join(topics.values())
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])
    split = len(tokens) * 9 // 10
    return tokens[:split], tokens[split:], len(number)


def wider(seed: int) -> Language:
    """The character model with width 96, in batches of 16 windows."""
    train, validation, characters = _topics()
    torch.manual_seed(seed)
    model = example().CharModel(characters, width=96, context=CONTEXT)
    return Language(model, seed, train, validation, size=16)


class Encoder(nn.Module):
    """A transformer with two layers that sees all of a window: (n, CONTEXT) to logits."""

    def __init__(self, characters: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(characters + 1, width)  # the last is the mask
        self.position = nn.Embedding(CONTEXT, width)
        self.layers = nn.Sequential(*encoder_layers(width, layers, heads), nn.LayerNorm(width))
        self.head = nn.Linear(width, characters)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, windows: Tensor) -> Tensor:
        return self.head(self.layers(self.token(windows) + self.position.weight))


class Masked(Language):
    """Predict the characters of a window that a mask hides, MASKED of them."""

    def loss(self, batch: Tensor) -> Tensor:
        return self._masked_loss(self.model, batch[:, :CONTEXT], self.generator)

    @staticmethod
    def _masked_loss(model: nn.Module, windows: Tensor, generator: torch.Generator) -> Tensor:
        hidden = torch.rand(windows.shape, generator=generator) < MASKED
        logits = model(windows.masked_fill(hidden, model.head.out_features))
        return F.cross_entropy(logits[hidden], windows[hidden])

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        generator = torch.Generator().manual_seed(0)
        train, validation = (
            self._masked_loss(
                model, part.unfold(0, CONTEXT, CONTEXT)[:VALIDATION_WINDOWS], generator
            ).item()
            for part in (self.train, self.validation)
        )
        return {"train_loss": train, "validation_loss": validation}


def masked(seed: int) -> Masked:
    """An encoder with two layers of width 64 on the documentation."""
    text = _documentation()
    torch.manual_seed(seed)
    return Masked(Encoder(len(text.vocabulary)), seed, text.train, text.validation, size=16)


class LowRank(nn.Module):
    """A frozen linear layer plus B·A, which is learned and starts at 0."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.a), self.b)


@cache
def _pretrained() -> dict[str, Tensor]:
    """Return the weights of the character model, pretrained with AdamW on the documentation."""
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
    """The pretrained character model, fine-tuned to Python source by matrices of rank 8."""
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
