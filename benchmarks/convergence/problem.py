"""What a task hands to the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

Scores = dict[str, float]


class Problem(ABC):
    """A model with freshly drawn weights, batches of training data, and how it is judged.

    Args:
        model: what is trained; its weights with requires_grad are the optimizer's.
        seed: of the batches, too.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)

    def weights(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @abstractmethod
    def batch(self) -> Any:
        """Return the next batch."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Return the training objective of a batch."""

    @abstractmethod
    def scores(self, model: nn.Module) -> Scores:
        """Return train_loss, validation_loss and accuracy (on the validation split)."""


class Classification(Problem):
    """Rows with a class each; an epoch is a permutation of the training rows.

    Args:
        train, validation: (x, y), y int64 classes.
        size: of a batch.
        l2: adds (l2/2)·‖w‖² to the training objective.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor],
        size: int,
        l2: float = 0.0,
    ) -> None:
        super().__init__(model, seed)
        self.train, self.validation, self.size, self.l2 = train, validation, size, l2
        self.order = torch.empty(0, dtype=torch.int64)

    def batch(self) -> tuple[Tensor, Tensor]:
        if len(self.order) < self.size:
            self.order = torch.randperm(len(self.train[1]), generator=self.generator)
        chosen, self.order = self.order[: self.size], self.order[self.size :]
        return self.train[0][chosen], self.train[1][chosen]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self._objective(self.model, batch)

    def _objective(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(model(x), y)
        if self.l2:
            loss = loss + 0.5 * self.l2 * sum(w.square().sum() for w in model.parameters())
        return loss

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Scores:
        x, y = self.validation
        logits = model(x)
        return {
            "train_loss": self._objective(model, self.train).item(),
            "validation_loss": nn.functional.cross_entropy(logits, y).item(),
            "accuracy": (logits.argmax(1) == y).float().mean().item(),
        }
