"""Measurements: step time on a CPU (``python -m benchmarks.step``) and on a GPU (``.gpu``)."""

import os

# Before torch is imported: its profiler, which counts memory and launches, else writes to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
