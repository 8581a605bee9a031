"""A sequence task: the type of the token that each character of Python source is part of."""

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
from .text import CONTEXT, KEPT, WINDOWS, source

BATCH = 16


class Tagger(nn.Module):
    """Characters to the types of the tokens that they are part of, by a recurrent net."""

    def __init__(self, characters: int, types: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.recurrent = nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, types)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(x))[0])


class Tagging(Problem):
    """Windows of characters, each with a type. A window's first characters have little to go by."""

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
        seen, kept = (
            part[:, : part.shape[1] // CONTEXT * CONTEXT].unflatten(1, (-1, CONTEXT))
            for part in (self.train, self.validation)
        )
        kept = kept[:, :KEPT]
        logits = model(kept[0])
        return {
            "train_loss": self._loss(model(seen[0, :WINDOWS]), seen[1, :WINDOWS]).item(),
            "validation_loss": self._loss(logits, kept[1]).item(),
            "accuracy": (logits.argmax(-1) == kept[1]).float().mean().item(),
        }


def _types(text: str) -> list[int]:
    """Return the type of the token that each character is part of, 0 between tokens."""
    lines = text.split("\n")
    starts = [0, *accumulate(len(line) + 1 for line in lines)]
    types = [0] * len(text)
    for found in tokenize.generate_tokens(io.StringIO(text).readline):
        first, last = (starts[row - 1] + column for row, column in (found.start, found.end))
        kind = tokenize.N_TOKENS if keyword.iskeyword(found.string) else found.type
        # An end of file lies behind the text.
        types[first:last] = [kind] * (min(last, len(text)) - first)
    return types


@cache
def _data() -> tuple[Tensor, Tensor, int, int]:
    """Return (train, validation), each (2, characters): numbers of characters and of types."""
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
    """A recurrent net of width 64 over windows of 64 characters."""
    train, validation, characters, types = _data()
    torch.manual_seed(seed)
    return Tagging(Tagger(characters, types), seed, train, validation)
