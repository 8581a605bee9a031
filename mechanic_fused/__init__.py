"""Mechanic: PyTorch optimizers that find their own learning rate, fused."""

from .distributed import step_together
from .factory import is_mechanized, mechanize
from .lion import Lion
from .mechanized import Mechanized
from .optimizers import MechanicAdam, MechanicAdamW, MechanicLion, MechanicSGD

__version__ = "0.1.0"

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
