"""Measurements of speed, memory and convergence; README.md has the figures and the commands."""

import os

# Before torch is imported: its profiler, which counts memory and launches, else writes to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
