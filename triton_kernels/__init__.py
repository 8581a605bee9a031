"""The ops in Triton: one launch an op for all tensors of a bucket.

Same functions as ``backends/reference.py``; elementwise results agree with it to the bit.
"""

from mechanic_fused.backends.layout import CPU_CHUNK
from mechanic_fused.bucket import Bucket

from .accumulate import accumulate
from .apply import apply, measure
from .log_tune import log_tune
from .muon import muon_momentum, muon_update
from .norm import norm
from .reduce import Tables
from .step import step
from .tune import tune

CHUNK = {"cpu": CPU_CHUNK, "cuda": CPU_CHUNK}
"""The CPU's size on a GPU too: 2^13, which the CUDA backend takes, has not been measured."""

COPIES_TABLES = True

__all__ = [
    "accumulate",
    "apply",
    "log_tune",
    "measure",
    "muon_momentum",
    "muon_update",
    "norm",
    "prepare",
    "step",
    "tune",
]


def prepare(bucket: Bucket) -> None:
    """Bring the tables on the device up to date."""
    if bucket.handle is None:
        bucket.handle = Tables(bucket)
    bucket.handle.upload(bucket)
