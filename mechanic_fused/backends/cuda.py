"""The ops as calls into the compiled module on a GPU: one launch each, on the current stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import _native  # type: ignore[attr-defined]
from .cpp import address, describe, describe_directions, describe_log_tuner, describe_tuner
from .device_tables import DeviceTables
from .layout import GPU_CHUNK

if TYPE_CHECKING:
    from ..bucket import Bucket
    from ..log_tuner import LogTuner
    from ..tuner import Tuner

CHUNK = {"cuda": GPU_CHUNK}
COPIES_TABLES = True


class DeviceBucket:
    """A bucket as the kernels of a GPU see it."""

    def __init__(self, bucket: Bucket) -> None:
        self.tables = DeviceTables(bucket)
        count = _native.cuda.ticket_count(len(bucket.chunks), len(bucket.sums))
        self.tickets = torch.zeros(count, dtype=torch.int32, device=bucket.device)
        self.bucket = describe(bucket, self.tables)
        self.reduction = _native.cuda.Reduction(
            spans=self.tables.spans.data_ptr(), tickets=self.tickets.data_ptr()
        )


def prepare(bucket: Bucket) -> None:
    """Send the tables that have changed to the device."""
    if bucket.handle is None:
        bucket.handle = DeviceBucket(bucket)
    bucket.handle.tables.upload(bucket)


def accumulate(bucket: Bucket) -> None:
    """Take g·Δ and g·g with the old Δ; move the base's state and Δ by one update."""
    scalars = _scalars(bucket.grad_scale, bucket.found_inf, bucket.clip, bucket.step_count)
    _launch(
        _native.cuda.accumulate,
        bucket.device,
        bucket.handle.bucket,
        bucket.handle.reduction,
        scalars,
    )


def norm(bucket: Bucket) -> None:
    """Take g·g over the finite elements, before any clipping."""
    scalars = _scalars(bucket.grad_scale, bucket.found_inf)
    _launch(
        _native.cuda.norm, bucket.device, bucket.handle.bucket, bucket.handle.reduction, scalars
    )


def tune(sums: Tensor, tuner: Tuner) -> None:
    """Update ``tuner.state`` from the sums, (scales, 6) float64."""
    scalars = _scalars(None, tuner.found_inf)
    _launch(_native.cuda.tune, sums.device, sums.data_ptr(), describe_tuner(tuner), scalars)


def apply(bucket: Bucket, tuner: Tuner) -> None:
    """x = round(x_ref + S·Δ); leaves x·Δ and x·x of the rounded x for the next step."""
    _launch(
        _native.cuda.apply,
        bucket.device,
        bucket.handle.bucket,
        bucket.handle.reduction,
        describe_tuner(tuner),
        _scalars(None, bucket.found_inf),
    )
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.parameters)


def step(bucket: Bucket, tuner: LogTuner) -> None:
    """Take the sums with the x before the step, move the base's state, and x += S·u."""
    scalars = _scalars(bucket.grad_scale, bucket.found_inf, bucket.clip, bucket.step_count)
    _launch(
        _native.cuda.step,
        bucket.device,
        bucket.handle.bucket,
        bucket.handle.reduction,
        describe_log_tuner(tuner),
        scalars,
    )
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.with_gradient)


def muon_momentum(bucket: Bucket, n: Tensor) -> None:
    """Take the sums with the x before the step, move the momentum, and leave n."""
    _launch(
        _native.cuda.muon_momentum,
        bucket.device,
        bucket.handle.bucket,
        bucket.handle.reduction,
        describe_directions(n),
        _scalars(bucket.grad_scale, bucket.found_inf, bucket.clip, bucket.step_count),
    )


def muon_update(bucket: Bucket, o: Tensor, ratio: float, tuner: LogTuner) -> None:
    """x += S·u of O, and the sum of u·u."""
    _launch(
        _native.cuda.muon_update,
        bucket.device,
        bucket.handle.bucket,
        bucket.handle.reduction,
        describe_directions(o),
        ratio,
        describe_log_tuner(tuner),
        _scalars(None, bucket.found_inf, None, bucket.step_count),
    )
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.with_gradient)


def log_tune(sums: Tensor, tuner: LogTuner) -> None:
    """Update ``tuner.state`` from the sums, (scales, 6) float64, and the observed losses."""
    scalars = _scalars(None, tuner.found_inf)
    _launch(_native.cuda.log_tune, sums.device, sums.data_ptr(), describe_log_tuner(tuner), scalars)


def measure(bucket: Bucket) -> None:
    """Take x·Δ and x·x of the weights as they are, also in a step that GradScaler skips."""
    _launch(_native.cuda.measure, bucket.device, bucket.handle.bucket, bucket.handle.reduction)


def _launch(op: Callable[..., None], device: torch.device, *args: Any) -> None:
    with torch.cuda.device(device):
        op(*args, torch.cuda.current_stream(device).cuda_stream)


def _scalars(
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None = None,
    step_count: Tensor | None = None,
) -> Any:
    """Return the addresses of the scalars of one step: GradScaler's are float32, ours float64."""
    return _native.cuda.StepScalars(
        grad_scale=address("grad_scale", grad_scale, torch.float32),
        found_inf=address("found_inf", found_inf, torch.float32),
        clip=address("clip", clip, torch.float64),
        step_count=address("step_count", step_count, torch.float64),
    )
