"""Other tuners of the learning rate, on the same kernels: beside any torch optimizer, or one."""

from .autogd import AutoGD
from .gen import GeN
from .lqa import LQA
from .lrtuner import LRTuner
from .probe import LineProbe, Parabola, parabola

__all__ = ["AutoGD", "GeN", "LQA", "LRTuner", "LineProbe", "Parabola", "parabola"]
