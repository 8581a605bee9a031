"""Offload: a copy of each weight on the host, which the CPU's kernels step beside its state there.

In a step only gradients go to the host and weights come back, so these are in pinned memory; x_ref
and the base's state never cross, and are in ordinary memory. With ``release_gradients()`` a thread
steps the copies while the backward pass goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .options import RUNNING, one_of
from .param_checks import check_stored, is_dense
from .torch_internals import dtensor, is_fsdp1_flat, read_version

PART = 1 << 26
"""Bytes of weights that are stepped while others are copied, where gradients are not released."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Lanes:
    """Two streams of a GPU: gradients go to the host on one, weights come back on the other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.down, self.up = self.module.Stream(device), self.module.Stream(device)

    def meet(self) -> None:
        """Let what is queued from now on see all weights."""
        self.module.current_stream(self.device).wait_stream(self.up)


class HostCopy:
    """A weight's copy on the host, and room for its gradient.

    Attributes:
        x: the copy, laid out as the weight.
        gradient: as x.

    Args:
        weight: plain, on any device.
        lanes: of its device; None on the CPU, where copies are made at once.
    """

    def __init__(self, weight: Tensor, lanes: Lanes | None) -> None:
        self.weight, self._lanes = weight.detach(), lanes
        pinned = lanes is not None
        layout = torch.preserve_format if is_dense(weight) else torch.contiguous_format
        self.x = torch.empty_like(
            self.weight, device="cpu", pin_memory=pinned, memory_format=layout
        )
        self.gradient = torch.empty_like(self.x, pin_memory=pinned)
        # The checksums of what was written to the weight and of what is there now.
        self._sums = torch.zeros(2, dtype=torch.int64, device=weight.device)
        self._found = torch.zeros(2, dtype=torch.int64, pin_memory=pinned)
        self._arrived: Any = None
        self.read()

    def read(self) -> None:
        """Take the weight as it is."""
        lanes = self._lanes
        if lanes is None:
            self._read()
        else:
            lanes.down.wait_stream(lanes.module.current_stream(lanes.device))
            with lanes.module.stream(lanes.down):
                self._read()

    def _read(self) -> None:
        self._sums[0] = self._checksum()
        self._noted = read_version(self.weight)
        self._is_modified = False
        # It waits for all that is queued before it.
        self.x.copy_(self.weight)
        self._found.zero_()

    def begin(self, g: Tensor) -> Tensor:
        """Begin to copy the weight's gradient to the host; return where it will be.

        Raises:
            ValueError: for a gradient without storage.
        """
        check_stored(g)
        self._is_modified = self._noted != read_version(self.weight)
        lanes = self._lanes
        if lanes is None:
            self._fetch(g)
            return self.gradient
        lanes.down.wait_stream(lanes.module.current_stream(lanes.device))
        with lanes.module.stream(lanes.down):
            self._fetch(g)
        g.record_stream(lanes.down)
        self._arrived = lanes.down.record_event()
        return self.gradient

    def _fetch(self, g: Tensor) -> None:
        self.gradient.copy_(g, non_blocking=True)
        self._sums[1] = self._checksum()
        self._found.copy_(self._sums, non_blocking=True)

    def end(self) -> None:
        """Wait for the gradient, and for the weight where others have written to it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        written, now = self._found.tolist()
        # A checksum too, since writes through p.data leave the version counter as it is.
        if self._is_modified or written != now:
            self.read()

    def send(self) -> None:
        """Begin to copy x to the weight."""
        lanes = self._lanes
        if lanes is None:
            self._write()
        else:
            with lanes.module.stream(lanes.up):
                self._write()

    def _write(self) -> None:
        self.weight.copy_(self.x, non_blocking=True)
        self._sums[0] = self._checksum()
        self._noted = read_version(self.weight)

    def _checksum(self) -> Tensor:
        return self.weight.view(BITS[self.weight.element_size()]).sum(dtype=torch.int64)


class Offload:
    """The host copies of an optimizer's weights, and the thread that steps them."""

    def __init__(self) -> None:
        self._copies: dict[Tensor, HostCopy] = {}
        self._lanes: dict[torch.device, Lanes] = {}
        self._thread = ThreadPoolExecutor(1, "mechanic_fused_offload")
        self._tasks: list[Future[None]] = []

    def copies_of(self, weights: Iterable[Tensor]) -> dict[Tensor, HostCopy]:
        """Return the copies of these weights, made where there is none; all others are dropped."""
        self.drain()
        kept, self._copies = self._copies, {}
        for p in weights:
            copy = kept.get(p)
            if copy is None or not _is_of(copy, p):
                lanes = None
                if p.device.type != "cpu":
                    lanes = self._lanes.get(p.device) or Lanes(p.device)
                    self._lanes[p.device] = lanes
                copy = HostCopy(p, lanes)
            self._copies[p] = copy
        return self._copies

    def read(self) -> None:
        """Take all weights as they are."""
        for copy in self._copies.values():
            copy.read()

    def submit(self, task: Callable[[], None]) -> None:
        """Let the thread do this, after what it has been given before."""
        self._tasks.append(self._thread.submit(task))

    def drain(self) -> None:
        """Wait until the thread has done what it was given; its errors are raised here."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.result()

    def meet(self) -> None:
        """Let what each GPU is given from now on see the new weights."""
        for lanes in self._lanes.values():
            lanes.meet()


def _is_of(copy: HostCopy, p: Tensor) -> bool:
    """Return whether a copy is of the memory that a weight has now."""
    w = copy.weight
    return (
        w.data_ptr() == p.data_ptr()
        and w.shape == p.shape
        and w.dtype is p.dtype
        and w.stride() == p.stride()
        and w.device == p.device
    )


def checked_offload(value: Any, variant: str, backend: str) -> bool:
    """Return ``offload``, or raise ValueError."""
    one_of("offload", value, (True, False))
    if value and variant != RUNNING:
        raise ValueError(
            "offload=True needs variant='running', whose S is known before the step, got "
            f"{variant!r}"
        )
    if value and backend not in ("auto", "cpp", "reference"):
        raise ValueError(
            f"offload=True steps on the CPU: expected backend='auto', 'cpp' or 'reference', got "
            f"{backend!r}"
        )
    return bool(value)


def check_offloaded(params: list[Tensor], reason: str | None) -> None:
    """Raise ValueError where weights cannot be stepped on the host.

    Args:
        params: of a param group.
        reason: why there is no fused update, or None.
    """
    if reason:
        raise ValueError(f"offload=True needs a fused update, got {reason}")
    for p in params:
        kind = "FSDP1" if is_fsdp1_flat(p) else "DTensor" if isinstance(p, dtensor()) else None
        if kind:
            remedy = {
                "DTensor": "fully_shard(..., offload_policy=CPUOffloadPolicy())",
                "FSDP1": "FullyShardedDataParallel(..., cpu_offload=CPUOffload(True))",
            }[kind]
            raise ValueError(
                f"offload=True needs plain weights, got a {kind} weight of shape "
                f"{tuple(p.shape)}: {remedy} keeps weights and gradients on the CPU, where the "
                "same kernels step them without offload"
            )
