"""Mechanic: PyTorch optimizers that find their own learning rate, fused."""

from .lion import Lion
from .optimizer import Mechanized
from .optimizers import (
    MechanicAdam,
    MechanicAdamW,
    MechanicLion,
    MechanicSGD,
    is_mechanized,
    mechanize,
)
from .step import step_together

__version__ = "0.2.0.dev0"

__all__ = [
    "Lion",
    "MechanicAdam",
    "MechanicAdamW",
    "MechanicLion",
    "MechanicSGD",
    "Mechanized",
    "is_mechanized",
    "mechanize",
    "step_together",
]
