"""Vectors over all weights of a model, and the ops that the other tuners need of them."""

from .space import Space, Vector

__all__ = ["Space", "Vector"]
