"""Mechanic: PyTorch optimizers that find their own learning rate, fused."""

from .lion import Lion
from .muon import Muon, muon_groups
from .optimizer import Mechanized
from .optimizers import (
    MechanicAdam,
    MechanicAdamW,
    MechanicLion,
    MechanicMuon,
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
    "MechanicMuon",
    "MechanicSGD",
    "Mechanized",
    "Muon",
    "is_mechanized",
    "mechanize",
    "muon_groups",
    "step_together",
]
