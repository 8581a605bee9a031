"""Other tuners of the learning rate: optimizers, and schedulers beside any torch optimizer."""

from .adarem import AdaRem
from .autodrop import AutoDrop
from .autogd import AutoGD
from .cgq import CGQ
from .extrapolated import ExtrapolatedSGD
from .flatter import FlatterFaster
from .gen import GeN
from .lqa import LQA
from .lrtuner import LRTuner
from .probe import LineProbe, Parabola, parabola

__all__ = [
    "CGQ",
    "LQA",
    "AdaRem",
    "AutoDrop",
    "AutoGD",
    "ExtrapolatedSGD",
    "FlatterFaster",
    "GeN",
    "LRTuner",
    "LineProbe",
    "Parabola",
    "parabola",
]
