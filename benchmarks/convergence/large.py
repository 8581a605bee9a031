"""A model of GPT-2's size on the source of Python's standard library; it needs a GPU."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from .problem import Problem, Scores
from .text import example

SIZES = {"width": 768, "layers": 12, "heads": 12, "context": 256}
BATCH = 32
SCORED = 2048
"""Windows of text that each loss is computed over."""


@cache
def _bytes() -> tuple[Tensor, Tensor]:
    """Return the library's source as bytes, (train, validation); every tenth file validates."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, path in enumerate(files):
        parts[i % 10 == 0].append(path.read_bytes())
    train, validation = (
        torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8).long() for part in parts
    )
    return train, validation


class Source(Problem):
    """Predict the next byte of Python source, with matrix products in bfloat16."""

    def __init__(self, model: nn.Module, seed: int, device: str) -> None:
        super().__init__(model.to(device), seed)
        self.device = device
        self.train, self.validation = (part.to(device) for part in _bytes())

    def batch(self) -> Tensor:
        context = SIZES["context"]
        return example().random_batch(self.train, BATCH, context, self.generator)

    def loss(self, batch: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.model.loss(batch)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        context = SIZES["context"]
        windows = [part[: SCORED * context + 1] for part in (self.train, self.validation)]
        with torch.autocast(self.device, torch.bfloat16):
            train, validation = (example().validation_loss(model, w, BATCH) for w in windows)
        return {"train_loss": train, "validation_loss": validation}


def gpt2(seed: int) -> Source:
    """Twelve layers of width 768, 85 M weights. Without a GPU it takes days on the CPU."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Source(example().CharModel(256, **SIZES), seed, device)
