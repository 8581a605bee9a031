"""Pickles of 0.1 name this module: it only finds what replaced its function."""

from .optimizers import _log_scale, restore

_restore = restore

__all__ = ["_log_scale", "_restore"]
