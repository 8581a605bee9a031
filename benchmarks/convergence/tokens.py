"""Sequence labelling: the token type of each character of Python source."""

from __future__ import annotations

import io
import keyword
import tokenize
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .problem import Problem, Scores
from .text import CONTEXT, TRAIN_WINDOWS, VALIDATION_WINDOWS, source

BATCH = 16


class Tagger(nn.Module):
    """A recurrent network from characters to token types."""

    def __init__(self, characters: int, types: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.recurrent = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, types)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(x))[0])


class Tagging(Problem):
    """Windows of characters with their token types. A window's first characters lack context."""

    def __init__(self, model: nn.Module, seed: int, train: Tensor, validation: Tensor) -> None:
        super().__init__(model, seed)
        self.train, self.validation = train, validation

    def batch(self) -> Tensor:
        starts = torch.randint(self.train.shape[1] - CONTEXT, (BATCH, 1), generator=self.generator)
        return self.train[:, starts + torch.arange(CONTEXT)]

    def loss(self, batch: Tensor) -> Tensor:
        return self._loss(self.model(batch[0]), batch[1])

    @staticmethod
    def _loss(logits: Tensor, types: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), types.flatten())

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        train, validation = (
            part[:, : part.shape[1] // CONTEXT * CONTEXT].unflatten(1, (-1, CONTEXT))[:, :windows]
            for part, windows in (
                (self.train, TRAIN_WINDOWS),
                (self.validation, VALIDATION_WINDOWS),
            )
        )
        logits = model(validation[0])
        return {
            "train_loss": self._loss(model(train[0]), train[1]).item(),
            "validation_loss": self._loss(logits, validation[1]).item(),
            "accuracy": (logits.argmax(-1) == validation[1]).float().mean().item(),
        }


def _types(text: str) -> list[int]:
    """Return the token type of each character, 0 between tokens."""
    lines = text.split("\n")
    starts = [0, *accumulate(len(line) + 1 for line in lines)]
    types = [0] * len(text)
    for found in tokenize.generate_tokens(io.StringIO(text).readline):
        first, last = (starts[row - 1] + column for row, column in (found.start, found.end))
        kind = tokenize.N_TOKENS if keyword.iskeyword(found.string) else found.type
        # The end-of-file token is behind the text.
        types[first:last] = [kind] * (min(last, len(text)) - first)
    return types


@cache
def _data() -> tuple[Tensor, Tensor, int, int]:
    """Return (train, validation), each (2, length), and the numbers of characters and types."""
    texts = source()
    characters = sorted(set("".join(texts)))
    typed = [_types(text) for text in texts]
    kinds = sorted(set().union(*typed))
    train, validation = (
        torch.tensor([[characters.index(c) for c in text], [kinds.index(k) for k in types]])
        for text, types in zip(texts, typed, strict=True)
    )
    return train, validation, len(characters), len(kinds)


def token_types(seed: int) -> Tagging:
    """A recurrent network of width 64 over windows of 64 characters."""
    train, validation, characters, types = _data()
    torch.manual_seed(seed)
    return Tagging(Tagger(characters, types), seed, train, validation)
