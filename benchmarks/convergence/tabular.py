"""scikit-learn's data sets: logistic regression, a perceptron, a small convolutional net."""

from __future__ import annotations

from functools import cache

import numpy
import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from .problem import Classification

L2 = 1e-4


@cache
def _rows(name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    return getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)


def _split(name: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return (train, validation): a quarter validates; the training rows standardize columns."""
    x, y = _rows(name)
    x_train, x_kept, y_train, y_kept = train_test_split(
        x, y, test_size=0.25, stratify=y, random_state=seed
    )
    mean, spread = x_train.mean(0), x_train.std(0)
    spread[spread == 0] = 1
    return [
        (torch.tensor((x - mean) / spread, dtype=torch.float32), torch.tensor(y).long())
        for x, y in ((x_train, y_train), (x_kept, y_kept))
    ]


def pixels(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return (train, validation) of the digits, as grey levels from about -1 to 1."""
    x, y = _rows("digits")
    parts = train_test_split(x / 8 - 1, y, test_size=0.25, stratify=y, random_state=seed)
    x_train, x_kept, y_train, y_kept = (torch.tensor(part) for part in parts)
    return [(x_train.float(), y_train.long()), (x_kept.float(), y_kept.long())]


def regression(name: str, seed: int) -> Classification:
    """Softmax regression with an L2 term, a convex task; all weights start at 0."""
    train, validation = _split(name, seed)
    model = nn.Linear(train[0].shape[1], int(train[1].max()) + 1)
    for w in model.parameters():
        nn.init.zeros_(w)
    return Classification(model, seed, train, validation, size=16, l2=L2)


def digits_mlp(seed: int) -> Classification:
    """A perceptron with two hidden layers of 128."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    return Classification(model, seed, *pixels(seed), size=32)


def digits_conv(seed: int) -> Classification:
    """Two convolutions with batch norm, then average pooling."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return Classification(model, seed, *pixels(seed), size=32)
