"""Vectors over all weights of a model, and the ops on them that the other tuners need."""

from .space import Space, Vector

__all__ = ["Space", "Vector"]
