"""Partial sums of chunks, folded by the last program of each scale.

Tickets are integers: which program is last varies, the order in which it adds does not.
"""

import triton
import triton.language as tl

# Partial sums that a program folds at once: two a thread.
FOLD = tl.constexpr(512)


@triton.jit
def draw_ticket(chunk, row, first, second, partials, spans, tickets, COLUMN: tl.constexpr):
    """Hand in a chunk's partial sums (columns COLUMN and COLUMN + 2); True for its scale's last.

    The atomic addition releases what this program has written and read, and lets the last one
    acquire what all others have.
    """
    tl.store(partials + chunk * 4 + COLUMN, first)
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
        b += tl.load(at + 2, mask=i < count, other=0.0)
        start += FOLD
    tl.store(sums + row * 4 + COLUMN, tl.sum(a, 0))
    tl.store(sums + row * 4 + COLUMN + 2, tl.sum(b, 0))
    tl.store(tickets + row, 0)
