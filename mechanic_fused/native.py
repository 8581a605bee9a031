"""The verbs as calls into the compiled module: addresses and streams are handed out here.

Same functions and same results as reference.py, on the processor and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _native  # type: ignore[attr-defined]
from .bases import KINDS
from .bucket import KERNEL_DTYPES, Bucket
from .device_tables import DeviceTables
from .tuner import Tuner

CHUNKS = {"cuda": 1 << 13}
"""Elements of a chunk on a GPU, where one is a block's work: short enough that the last blocks of a
launch end together, long enough (8 rounds of 16-byte loads) that starting one costs little."""


class OnDevice:
    """A bucket as the kernels of a GPU see it.

    Args:
        bucket: on a GPU.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.tables = DeviceTables(bucket)
        tickets = _native.cuda.ticket_count(len(bucket.chunks), len(bucket.sums))
        self.tickets = torch.zeros(tickets, dtype=torch.int32, device=bucket.device)
        self.table = _table(bucket, self.tables)
        self.folding = _native.cuda.Folding(
            spans=self.tables.spans.data_ptr(), tickets=self.tickets.data_ptr()
        )


def prepare(bucket: Bucket) -> None:
    """Describe the bucket to the compiled module; a GPU gets copies of the tables that changed."""
    if bucket.device.type == "cuda":
        if bucket.handle is None:
            bucket.handle = OnDevice(bucket)
        bucket.handle.tables.upload(bucket)
    elif bucket.handle is None:
        bucket.handle = _table(bucket, bucket)


def accumulate(bucket: Bucket) -> None:
    """Take g·Δ and g·g with the old Δ; move the base's state and Δ on by one update."""
    if bucket.device.type == "cuda":
        seen = bucket.handle
        scaler = _scaler(bucket.grad_scale, bucket.found_inf, bucket.clip, bucket.clock)
        _launch(_native.cuda.accumulate, bucket.device, seen.table, seen.folding, scaler)
    else:
        clip = _number("clip", bucket.clip, torch.float64)
        clock = _number("clock", bucket.clock, torch.float64)
        _native.cpu.accumulate(bucket.handle, clip, clock, torch.get_num_threads())


def norm(bucket: Bucket) -> None:
    """Take g·g over the elements that are finite, before any clipping."""
    if bucket.device.type == "cuda":
        seen = bucket.handle
        scaler = _scaler(bucket.grad_scale, bucket.found_inf)
        _launch(_native.cuda.norm, bucket.device, seen.table, seen.folding, scaler)
    else:
        _native.cpu.norm(bucket.handle, torch.get_num_threads())


def tune(sums: Tensor, tuner: Tuner) -> None:
    """Learn S from the sums, (scales, 4) float64; ``tuner.state`` changes in place."""
    if sums.device.type == "cuda":
        scaler = _scaler(None, tuner.found_inf)
        _launch(_native.cuda.tune, sums.device, sums.data_ptr(), _tuner(tuner), scaler)
    else:
        _native.cpu.tune(sums.data_ptr(), _tuner(tuner))


def apply(bucket: Bucket, tuner: Tuner) -> None:
    """x = round(x_ref + S·Δ); leaves x·Δ and x·x of the rounded x for the next step."""
    if bucket.device.type == "cuda":
        seen = bucket.handle
        scaler = _scaler(None, bucket.found_inf)
        _launch(_native.cuda.apply, bucket.device, seen.table, seen.folding, _tuner(tuner), scaler)
    else:
        _native.cpu.apply(bucket.handle, _tuner(tuner), torch.get_num_threads())
    # Autograd has not seen the writes; a backward through the old weights must raise.
    increment_version(bucket.parameters)


def measure(bucket: Bucket) -> None:
    """Take x·Δ and x·x from x as it stands, also in a step that GradScaler skips."""
    if bucket.device.type == "cuda":
        _launch(_native.cuda.measure, bucket.device, bucket.handle.table, bucket.handle.folding)
    else:
        _native.cpu.measure(bucket.handle, torch.get_num_threads())


def _launch(verb: Callable[..., None], device: torch.device, *args: Any) -> None:
    with torch.cuda.device(device):
        verb(*args, torch.cuda.current_stream(device).cuda_stream)


def _table(bucket: Bucket, tables: Bucket | DeviceTables) -> Any:
    first = bucket.states[0][:1]
    return _native.Bucket(
        tensors=tables.tensors.data_ptr(),
        chunks=tables.chunks.data_ptr(),
        hyper=tables.hyper.data_ptr(),
        partials=bucket.partials.data_ptr(),
        sums=bucket.sums.data_ptr(),
        tensor_count=len(bucket.tensors),
        chunk_count=len(bucket.chunks),
        scale_count=len(bucket.sums),
        elements=sum(x.numel() for x in bucket.weights),
        kind=KINDS.index(bucket.kind) if bucket.kind in KINDS else 0,
        weight=KERNEL_DTYPES.index(bucket.dtype),
        state=KERNEL_DTYPES.index(first[0].dtype if first else bucket.wide),
        delta=KERNEL_DTYPES.index(bucket.delta[0].dtype),
    )


def _tuner(tuner: Tuner) -> Any:
    return _native.Tuner(
        state=tuner.state.data_ptr(),
        constants=tuner.constants.data_ptr(),
        scale_count=len(tuner.keys),
        betas=len(tuner.betas),
    )


def _scaler(
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None = None,
    clock: Tensor | None = None,
) -> Any:
    return _native.cuda.Scaler(
        grad_scale=_number("grad_scale", grad_scale, torch.float32),
        found_inf=_number("found_inf", found_inf, torch.float32),
        clip=_number("clip", clip, torch.float64),
        steps=_number("clock", clock, torch.float64),
    )


def _number(name: str, number: Tensor | None, dtype: torch.dtype) -> int:
    """Return the address of numbers that kernels read: GradScaler's are float32, ours float64."""
    if not torch.is_tensor(number):
        return 0
    if number.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {number.dtype}")
    return number.data_ptr()
