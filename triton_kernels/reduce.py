"""The sums of a scale, from the partial sums of its chunks.

The last program of each scale adds them up. Tickets are integers: which program is the last one
varies, the order in which it adds does not.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mechanic_fused.backends.device_tables import DeviceTables
from mechanic_fused.bucket import Bucket

from .layout import (
    CHUNK_COLUMNS,
    CHUNK_LENGTH,
    CHUNK_OFFSET,
    CHUNK_TENSOR,
    SPAN_CHUNKS,
    SPAN_COLUMNS,
    SPAN_FIRST_CHUNK,
    SUMS_COLUMNS,
)
from .storage import DTYPES, OPTIONS, on, sizes

# Partial sums that a program adds at once: four a thread.
REDUCE_BLOCK = tl.constexpr(512)


class Tables(DeviceTables):
    """A bucket's tables on its device, and the tickets of the reduction.

    Attributes:
        tickets: (scales,) int32, all 0 between launches: how many chunks of a scale are done. The
            program that draws a scale's last ticket reduces its partial sums and resets it to 0.
    """

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self.tickets = torch.zeros(len(bucket.sums), dtype=torch.int32, device=bucket.device)


def launch(kernel: Any, bucket: Bucket, **own: Any) -> None:
    """Run a kernel that reduces sums: a program a chunk, then one a scale.

    Args:
        kernel: its parameters are those named here and its own.
        bucket: after ``prepare``.
        own: the kernel's own arguments.
    """
    tables = bucket.handle
    with on(bucket.device):
        kernel[(len(tables.chunks) + len(bucket.sums),)](
            tensors=tables.tensors,
            chunks=tables.chunks,
            spans=tables.spans,
            tickets=tables.tickets,
            partials=bucket.partials,
            sums=bucket.sums,
            chunk_count=len(tables.chunks),
            X=DTYPES[bucket.dtype],
            T=DTYPES[bucket.compute_dtype],
            **sizes(bucket.dtype),
            **OPTIONS,
            **own,
        )


@triton.jit
def load_chunk(chunks, chunk):
    """A row of the chunk table: the index of the tensor, the offset, and the length, int32."""
    at = chunks + chunk * CHUNK_COLUMNS
    return (
        tl.load(at + CHUNK_TENSOR),
        tl.load(at + CHUNK_OFFSET),
        tl.load(at + CHUNK_LENGTH).to(tl.int32),
    )


@triton.jit
def reduce_chunk(chunk, row, totals, partials, spans, tickets, COLUMNS: tl.constexpr):
    """Store a chunk's partial sums; return whether it is the last chunk of its scale.

    Args:
        totals: a sum for each of the COLUMNS.
    """
    for k in tl.static_range(len(COLUMNS)):
        tl.store(partials + chunk * SUMS_COLUMNS + COLUMNS[k], totals[k])
    return is_last_block(row, spans, tickets)


@triton.jit
def is_last_block(row, spans, tickets):
    """Draw a ticket of a scale; return whether it is the last one.

    The atomic addition releases what this program has written and read, and lets the program with
    the last ticket acquire what all others have written.
    """
    tl.debug_barrier()
    drawn = tl.atomic_add(tickets + row, 1)
    return drawn + 1 == tl.load(spans + row * SPAN_COLUMNS + SPAN_CHUNKS)


@triton.jit
def is_empty(row, spans):
    """Whether a scale has no chunks, so that no program of a chunk will reduce its sums."""
    return tl.load(spans + row * SPAN_COLUMNS + SPAN_CHUNKS) == 0


@triton.jit
def reduce_scale(row, partials, sums, spans, tickets, COLUMNS: tl.constexpr):
    """sums[row] = Σ of its chunks' partial sums, in an order that depends on their number only."""
    first = tl.load(spans + row * SPAN_COLUMNS + SPAN_FIRST_CHUNK)
    count = tl.load(spans + row * SPAN_COLUMNS + SPAN_CHUNKS)
    totals = (tl.zeros((REDUCE_BLOCK,), dtype=tl.float64),) * len(COLUMNS)
    start = tl.full((), 0, tl.int64)
    while start < count:
        i = start + tl.arange(0, REDUCE_BLOCK)
        more = ()
        for k in tl.static_range(len(COLUMNS)):
            at = partials + (first + i) * SUMS_COLUMNS + COLUMNS[k]
            more = more + (totals[k] + tl.load(at, mask=i < count, other=0.0),)
        totals = more
        start += REDUCE_BLOCK
    for k in tl.static_range(len(COLUMNS)):
        tl.store(sums + row * SUMS_COLUMNS + COLUMNS[k], tl.sum(totals[k], 0))
    tl.store(tickets + row, 0)
