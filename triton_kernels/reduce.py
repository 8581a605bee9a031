"""Partial sums of chunks, folded by the last program of each scale.

Tickets are integers: which program is last varies, the order in which it adds does not.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mechanic_fused.backends.device_tables import DeviceTables
from mechanic_fused.bucket import Bucket

from .storage import DTYPES, OPTIONS, on, sizes

# Partial sums that a program folds at once: two a thread.
FOLD = tl.constexpr(512)


class Tables(DeviceTables):
    """A bucket's tables on its device, and what its programs fold sums by.

    Attributes:
        tickets: (scales,) int32, all 0 between launches: how many chunks of a scale are done. The
            program that draws a scale's last ticket folds its partial sums and puts 0 back.
    """

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self.tickets = torch.zeros(len(bucket.sums), dtype=torch.int32, device=bucket.device)


def launch(kernel: Any, bucket: Bucket, **own: Any) -> None:
    """Run a kernel that folds sums: a program a chunk, then one a scale.

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
def reduce_chunk(chunk, row, first, second, partials, spans, tickets, COLUMN: tl.constexpr):
    """Hand in a chunk's partial sums; True for its scale's last chunk.

    They belong to the columns COLUMN and COLUMN + 2; where the latter is none, ``second`` is None.

    The atomic addition releases what this program has written and read, and lets the last one
    acquire what all others have.
    """
    tl.store(partials + chunk * 4 + COLUMN, first)
    if second is not None:
        tl.store(partials + chunk * 4 + COLUMN + 2, second)
    tl.debug_barrier()
    drawn = tl.atomic_add(tickets + row, 1)
    return drawn + 1 == tl.load(spans + row * 4 + 1)


@triton.jit
def fold(row, partials, sums, spans, tickets, COLUMN: tl.constexpr):
    """sums[row] = its chunks' partial sums, in an order that depends on their number only."""
    first = tl.load(spans + row * 4)
    count = tl.load(spans + row * 4 + 1)
    a = tl.zeros((FOLD,), dtype=tl.float64)
    b = tl.zeros((FOLD,), dtype=tl.float64)
    start = tl.full((), 0, tl.int64)
    while start < count:
        i = start + tl.arange(0, FOLD)
        at = partials + (first + i) * 4 + COLUMN
        a += tl.load(at, mask=i < count, other=0.0)
        if COLUMN < 2:
            b += tl.load(at + 2, mask=i < count, other=0.0)
        start += FOLD
    tl.store(sums + row * 4 + COLUMN, tl.sum(a, 0))
    if COLUMN < 2:
        tl.store(sums + row * 4 + COLUMN + 2, tl.sum(b, 0))
    tl.store(tickets + row, 0)
