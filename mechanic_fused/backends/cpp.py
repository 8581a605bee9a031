"""The ops as calls into the compiled module on the CPU.

``_native`` takes addresses: this module and ``cuda.py`` are the only ones that pass them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _native  # type: ignore[attr-defined]
from .layout import CPU_CHUNK, KINDS, STORED_DTYPES

if TYPE_CHECKING:
    from ..bucket import Bucket
    from ..log_tuner import LogTuner
    from ..tuner import Tuner

CHUNK = {"cpu": CPU_CHUNK}
COPIES_TABLES = False


def prepare(bucket: Bucket) -> None:
    """Describe the bucket to the compiled module, which reads the tables in place."""
    if bucket.handle is None:
        bucket.handle = describe(bucket, bucket)


def accumulate(bucket: Bucket) -> None:
    """Take g·Δ and g·g with the old Δ; move the base's state and Δ by one update."""
    clip = address("clip", bucket.clip, torch.float64)
    step_count = address("step_count", bucket.step_count, torch.float64)
    _native.cpu.accumulate(bucket.handle, clip, step_count, torch.get_num_threads())


def norm(bucket: Bucket) -> None:
    """Take g·g over the finite elements, before any clipping."""
    _native.cpu.norm(bucket.handle, torch.get_num_threads())


def tune(sums: Tensor, tuner: Tuner) -> None:
    """Update ``tuner.state`` from the sums, (scales, 6) float64."""
    _native.cpu.tune(sums.data_ptr(), describe_tuner(tuner))


def apply(bucket: Bucket, tuner: Tuner) -> None:
    """x = round(x_ref + S·Δ); leaves x·Δ and x·x of the rounded x for the next step."""
    _native.cpu.apply(bucket.handle, describe_tuner(tuner), torch.get_num_threads())
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.parameters)


def step(bucket: Bucket, tuner: LogTuner) -> None:
    """Take the sums with the x before the step, move the base's state, and x += S·u."""
    clip = address("clip", bucket.clip, torch.float64)
    step_count = address("step_count", bucket.step_count, torch.float64)
    tuned = describe_log_tuner(tuner)
    _native.cpu.step(bucket.handle, tuned, clip, step_count, torch.get_num_threads())
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.with_gradient)


def muon_momentum(bucket: Bucket, n: Tensor) -> None:
    """Take the sums with the x before the step, move the momentum, and leave n."""
    clip = address("clip", bucket.clip, torch.float64)
    step_count = address("step_count", bucket.step_count, torch.float64)
    _native.cpu.muon_momentum(
        bucket.handle, describe_directions(n), clip, step_count, torch.get_num_threads()
    )


def muon_update(bucket: Bucket, o: Tensor, ratio: float, tuner: LogTuner) -> None:
    """x += S·u of O, and the sum of u·u."""
    step_count = address("step_count", bucket.step_count, torch.float64)
    _native.cpu.muon_update(
        bucket.handle,
        describe_directions(o),
        ratio,
        describe_log_tuner(tuner),
        step_count,
        torch.get_num_threads(),
    )
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.with_gradient)


def log_tune(sums: Tensor, tuner: LogTuner) -> None:
    """Update ``tuner.state`` from the sums, (scales, 6) float64, and the observed losses."""
    _native.cpu.log_tune(sums.data_ptr(), describe_log_tuner(tuner))


def measure(bucket: Bucket) -> None:
    """Take x·Δ and x·x of the weights as they are."""
    _native.cpu.measure(bucket.handle, torch.get_num_threads())


def describe(bucket: Bucket, tables: Any) -> Any:
    """Return the compiled module's description of a bucket.

    Args:
        bucket: the bucket.
        tables: what has ``tensors``, ``chunks`` and ``hyper`` where the kernels read them.
    """
    first = bucket.states[0][:1]
    return _native.Bucket(
        tables=_native.Tables(
            tensors=tables.tensors.data_ptr(),
            chunks=tables.chunks.data_ptr(),
            hyper=tables.hyper.data_ptr(),
            partials=bucket.partials.data_ptr(),
            sums=bucket.sums.data_ptr(),
        ),
        counts=_native.Counts(
            tensors=len(bucket.tensors),
            chunks=len(bucket.chunks),
            scales=len(bucket.sums),
            elements=sum(bucket.sizes),
            in_part=bucket.in_part,
            state_block=bucket.state_block,
        ),
        # A bucket of the fallback is only measured and applied, whatever its kind.
        kind=KINDS.index(bucket.kind) if bucket.kind in KINDS else 0,
        dtypes=_native.DTypes(
            weight=STORED_DTYPES.index(bucket.dtype),
            state=STORED_DTYPES.index(first[0].dtype if first else bucket.compute_dtype),
            delta=STORED_DTYPES.index(
                torch.int8
                if bucket.delta_scales
                else bucket.delta[0].dtype
                if bucket.delta
                else bucket.compute_dtype
            ),
        ),
    )


def describe_tuner(tuner: Tuner) -> Any:
    """Return the compiled module's description of a tuner."""
    return _native.Tuner(
        state=tuner.state.data_ptr(),
        constants=tuner.constants.data_ptr(),
        scales=len(tuner.keys),
        betas=len(tuner.betas),
    )


def describe_directions(matrices: Tensor) -> Any:
    """Return the compiled module's description of (weights, …), each laid out as its weight."""
    return _native.Directions(
        first=matrices.data_ptr(),
        size=matrices[0].numel(),
        dtype=STORED_DTYPES.index(matrices.dtype),
    )


def describe_log_tuner(tuner: LogTuner) -> Any:
    """Return the compiled module's description of a log tuner."""
    return _native.LogTuner(
        rows=tuner.state.data_ptr(),
        constants=tuner.constants.data_ptr(),
        losses=tuner.losses.data_ptr(),
        scales=len(tuner.keys),
    )


def address(name: str, number: Tensor | None, dtype: torch.dtype) -> int:
    """Return the address of scalars that kernels read, 0 for None."""
    if number is None or not torch.is_tensor(number):
        return 0
    if number.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {number.dtype}")
    return number.data_ptr()
