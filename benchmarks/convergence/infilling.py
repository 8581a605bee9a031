"""A sequence to a sequence: fill gaps in Python source from the text around them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .problem import Problem, Scores
from .text import source
from .transformer import decoder_layers, encoder_layers

PART, BATCH = 32, 8
"""Characters of a gap, of the text before it and of the text after it; windows in a batch."""

SCORED = 512
"""Windows that the final losses are computed over."""


class Infiller(nn.Module):
    """An encoder of the text around a gap and a decoder of the gap, two layers each.

    Windows (n, 3·PART) to the logits of their middle parts (n, PART, characters).
    """

    def __init__(self, characters: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.position = nn.Embedding(3 * PART, width)
        self.encoder = nn.Sequential(*encoder_layers(width, layers, heads), nn.LayerNorm(width))
        self.decoder = nn.ModuleList(decoder_layers(width, layers, heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        future = torch.ones(PART, PART, dtype=torch.bool).triu(1)
        # DoG's averager averages all of a state dict, and cannot average bits.
        self.register_buffer("future", future, persistent=False)

    def forward(self, windows: Tensor) -> Tensor:
        embedded = self.token(windows) + self.position.weight
        around = torch.cat([embedded[:, :PART], embedded[:, 2 * PART :]], 1)
        memory = self.encoder(around)
        x = embedded[:, PART - 1 : 2 * PART - 1]  # each character sees those before it
        for layer in self.decoder:
            x = layer(x, memory, tgt_mask=self.future)
        return self.head(self.norm(x))


class Infilling(Problem):
    """Windows at random places; the losses are over windows that do not overlap."""

    def __init__(self, model: nn.Module, seed: int, train: Tensor, validation: Tensor) -> None:
        super().__init__(model, seed)
        self.train, self.validation = train, validation

    def batch(self) -> Tensor:
        windows = self.train.unfold(0, 3 * PART, 1)
        return windows[torch.randint(len(windows), (BATCH,), generator=self.generator)]

    def loss(self, batch: Tensor) -> Tensor:
        return self._loss(self.model, batch)

    @staticmethod
    def _loss(model: nn.Module, windows: Tensor) -> Tensor:
        gaps = windows[:, PART : 2 * PART]
        return F.cross_entropy(model(windows).flatten(0, 1), gaps.flatten())

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        train, validation = (
            self._loss(model, part.unfold(0, 3 * PART, 3 * PART)[:SCORED]).item()
            for part in (self.train, self.validation)
        )
        return {"train_loss": train, "validation_loss": validation}


@cache
def _data() -> tuple[Tensor, Tensor, int]:
    """Return (train, validation) as numbers, and the number of characters."""
    texts = source()
    number = {character: i for i, character in enumerate(sorted(set("".join(texts))))}
    train, validation = (torch.tensor([number[c] for c in text]) for text in texts)
    return train, validation, len(number)


def seq2seq(seed: int) -> Infilling:
    """An encoder and a decoder with two layers of width 64 each."""
    train, validation, characters = _data()
    torch.manual_seed(seed)
    return Infilling(Infiller(characters), seed, train, validation)
