"""The verbs as calls into the compiled module: the only file that hands out addresses.

Same functions and same results as reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _native
from .bases import KINDS
from .bucket import Bucket
from .tuner import Tuner

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""In the order of the numbers by which the compiled module knows them."""


def prepare(bucket: Bucket) -> None:
    """Describe the bucket to the compiled module; its tables are read where they are."""
    if bucket.handle is None:
        first = bucket.states[0][:1]
        bucket.handle = _native.Bucket(
            tensors=bucket.tensors.data_ptr(),
            chunks=bucket.chunks.data_ptr(),
            hyper=bucket.hyper.data_ptr(),
            partials=bucket.partials.data_ptr(),
            sums=bucket.sums.data_ptr(),
            tensor_count=len(bucket.tensors),
            chunk_count=len(bucket.chunks),
            scale_count=len(bucket.sums),
            elements=sum(x.numel() for x in bucket.weights),
            kind=KINDS.index(bucket.kind) if bucket.kind in KINDS else 0,
            weight=DTYPES.index(bucket.dtype),
            state=DTYPES.index(first[0].dtype if first else bucket.wide),
        )


def accumulate(bucket: Bucket) -> None:
    """Take g·Δ and g·g with the old Δ; move the base's state and Δ on by one update."""
    _native.cpu.accumulate(bucket.handle, torch.get_num_threads())


def tune(sums: Tensor, tuner: Tuner) -> None:
    """Learn S from the sums, (scales, 4) float64; ``tuner.state`` changes in place."""
    _native.cpu.tune(sums.data_ptr(), _tuner(tuner))


def apply(bucket: Bucket, tuner: Tuner) -> None:
    """x = round(x_ref + S·Δ); leaves x·Δ and x·x of the rounded x for the next step."""
    _native.cpu.apply(bucket.handle, _tuner(tuner), torch.get_num_threads())
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.parameters)


def measure(bucket: Bucket) -> None:
    """Take x·Δ and x·x from x as it stands."""
    _native.cpu.measure(bucket.handle, torch.get_num_threads())


def _tuner(tuner: Tuner) -> _native.Tuner:
    return _native.Tuner(
        state=tuner.state.data_ptr(),
        constants=tuner.constants.data_ptr(),
        scale_count=len(tuner.keys),
        betas=len(tuner.betas),
    )
