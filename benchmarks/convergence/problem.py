"""The interface between a task and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

Scores = dict[str, float]


class Problem(ABC):
    """A newly initialized model, batches of training data, and the scores of a trained model.

    Args:
        model: the optimizer gets its weights with requires_grad.
        seed: determines the batches.
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
        """Return train_loss, validation_loss and, where that is the metric, validation accuracy."""


class Classification(Problem):
    """Classify rows; an epoch is a permutation of the training rows.

    Args:
        train, validation: (x, y), y being int64 classes.
        size: rows in a batch.
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
