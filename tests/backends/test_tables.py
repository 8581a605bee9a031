"""The chunks and spans that kernels walk, of weights of more than 2³¹ elements too."""

from types import SimpleNamespace

import pytest
import torch

from mechanic_fused.backends import device_tables, layout
from mechanic_fused.bucket import chunk_table

HUGE = 3 << 31
"""Beyond what 32 bits count, signed or not."""


@pytest.mark.parametrize("chunk", [layout.GPU_CHUNK, layout.CPU_CHUNK])
def test_chunks_cover_every_weight_once_also_a_huge_one(chunk):
    sizes = (5, HUGE + 7, 0, chunk)
    table = chunk_table(list(sizes), chunk)
    assert table.dtype is torch.int64
    tensor, offset, length = table.unbind(1)
    assert length.min() > 0
    assert length.max() == chunk
    for i, n in enumerate(sizes):
        ends = (offset + length)[tensor == i]
        assert offset[tensor == i].tolist() == [0, *ends.tolist()][: len(ends)]
        assert ends[-1:].tolist() == [n] * bool(n)
    assert offset.max() >= HUGE


def test_spans_count_the_chunks_and_weights_of_every_scale():
    chunks = torch.tensor([[0, 0, 1], [1, 0, 4], [1, 4, 4], [1, HUGE, 1]])
    found = device_tables._spans(
        SimpleNamespace(sums=torch.empty(3, 4), rows=[0, 2, 2], chunks=chunks)
    )
    assert found.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [1, 3, 1, 2]]
