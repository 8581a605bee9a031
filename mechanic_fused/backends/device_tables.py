"""DeviceTables: copies of a bucket's tables on its device, uploaded only when stale.

The CUDA and Triton backends share them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..scale_rows import STALE_IN_CAPTURE

if TYPE_CHECKING:
    from ..bucket import Bucket

SPARES = 4
"""Uploads that one graph capture may hold; pinned memory cannot be allocated during it."""


class DeviceTables:
    """The tables of a bucket on its device, at addresses that never change.

    Attributes:
        tensors: (weights, 15) int64, a row of ``layout.TENSOR`` per weight.
        chunks: (chunks, 3) int64, rows of ``layout.CHUNK``.
        hyper: (groups, 9) float64, a row of ``layout.HYPER`` per param group.
        spans: (scales, 4) int64, a row of ``layout.SPAN`` per scale. Weights are in the order of
            their groups, so the weights and chunks of a scale are contiguous.

    Args:
        bucket: on a CPU (in Triton's interpreter) its own tables are used in place.
    """

    def __init__(self, bucket: Bucket) -> None:
        device = bucket.device
        self.pinned = device.type == "cuda"
        self.spans = _spans(bucket).to(device)
        self.chunks = bucket.chunks.to(device)
        self.tensors = bucket.tensors.to(device)
        self.hyper = bucket.hyper.to(device)
        self._spares: list[Tensor] = []
        # Copy nodes of captured graphs read these at every replay.
        self._owned_by_graphs: list[Tensor] = []

    def upload(self, bucket: Bucket) -> None:
        """Upload the tables that have changed, on the current stream; never waits for the device.

        In a graph capture the upload of the tensor table becomes a node of the graph, so that a
        replay finds the addresses of its own gradients whatever steps were taken in between.

        Raises:
            RuntimeError: during a capture, if the device lacks the present hyperparameters or no
                step was taken before.
        """
        if self.pinned:
            capturing = torch.cuda.is_current_stream_capturing()
            if capturing and bucket.hyper_stale:
                raise RuntimeError(STALE_IN_CAPTURE)
            if bucket.hyper_stale:
                self._send(bucket.hyper, self.hyper, capturing)
            # After a capture the device may hold the addresses of any graph's last replay.
            if bucket.tensors_stale or capturing or self._owned_by_graphs:
                self._send(bucket.tensors, self.tensors, capturing)
        for group, lr in bucket.live_lr.items():
            self.hyper[group, 0].copy_(lr, non_blocking=True)
        bucket.tensors_stale = bucket.hyper_stale = False

    def _send(self, table: Tensor, to: Tensor, capturing: bool) -> None:
        if capturing:
            if not self._spares:
                raise RuntimeError(
                    "take a step outside the graph before each capture; "
                    f"a graph may hold at most {SPARES} steps"
                )
            buffer = self._spares.pop()
            self._owned_by_graphs.append(buffer)
        else:
            # A fresh buffer each time: the copy from the last one may still be pending. Torch's
            # host allocator reuses a buffer only when its copy is done.
            buffer = torch.empty_like(table, pin_memory=True)
            while len(self._spares) < SPARES:
                self._spares.append(torch.empty_like(self.tensors, device="cpu", pin_memory=True))
        buffer.copy_(table)
        to.copy_(buffer, non_blocking=True)


def _spans(bucket: Bucket) -> Tensor:
    scales = len(bucket.sums)
    tensor_rows = torch.tensor(bucket.rows, dtype=torch.int64, device="cpu")
    columns = []
    for rows in (tensor_rows[bucket.chunks[:, 0]], tensor_rows):
        counts = torch.bincount(rows, minlength=scales)
        columns += [counts.cumsum(0) - counts, counts]
    return torch.stack(columns, 1)
