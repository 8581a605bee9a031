"""Offload: a copy of each weight on the host, which the CPU's kernels step beside its state there.

In a step only gradients go to the host and weights come back, so these are in pinned memory; x_ref
and the base's state never cross, and are in ordinary memory. With ``release_gradients()`` a thread
steps the copies while the backward pass goes on.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .options import RUNNING, one_of
from .param_checks import check_stored, is_dense
from .torch_internals import dtensor, is_fsdp1_flat, read_version

PART = 1 << 26
"""Bytes of weights that are stepped while others are copied, where gradients are not released."""

ROW = 1024
"""Elements of 8 bytes in a row of a checksum."""


PLACE = 0x1E3779B97F4A7C15
"""By which the places of a checksum are told apart; its multiples are spread over 64 bits."""


def checksum(weight: Tensor) -> Tensor:
    """Return an int64 that other bits, or the same ones in another order, nearly always change.

    Sums of rows and of columns, times odd numbers that tell their places. Integers of 8 bytes are
    added as they are; others torch would widen first, all of them at once.
    """
    flat = weight.detach()
    flat = flat.as_strided((flat.numel(),), (1,)) if is_dense(flat) else flat.flatten().contiguous()
    width = 8 // flat.element_size()
    whole = flat.numel() // (ROW * width) * ROW * width
    aligned = flat.storage_offset() % width == 0
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    if aligned and whole:
        rows = flat[:whole].view(torch.int64).view(-1, ROW)
        total += _placed(rows.sum(0)) + 3 * _placed(rows.sum(1))
    rest = flat[whole:] if aligned else flat
    if rest.numel():
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rest.element_size()]
        total += 5 * _placed(rest.view(integers).to(torch.int64))
    return total


def _placed(sums: Tensor) -> Tensor:
    places = torch.arange(len(sums), dtype=torch.int64, device=sums.device)
    return (sums * (places * PLACE | 1)).sum()


class Lanes:
    """Two streams of a GPU: gradients go to the host on one, weights come back on the other."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        # Before the backward pass: a copy that waits for its kernels hides nothing.
        self._down, self._up = (self._module.Stream(device, priority=-1) for _ in range(2))

    def fetch(self, task: Callable[[], None], *read: Tensor) -> Any:
        """Queue copies to the host, after all that is queued so far; return the event of their end.

        Args:
            task: queues them; it reads the tensors ``read``, which may then be freed.

        Raises:
            RuntimeError: while a CUDA graph is captured.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a step with offload=True waits for the host: it cannot be captured")
        self._down.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._down):
            task()
        for t in read:
            t.record_stream(self._down)
        return self._down.record_event()

    def send(self, task: Callable[[], None]) -> None:
        """Queue copies to the device."""
        with self._module.stream(self._up):
            task()

    def meet(self) -> None:
        """Let what is queued from now on see what was sent."""
        self._module.current_stream(self._device).wait_stream(self._up)


class HostCopy:
    """The copy of a weight that is on the host itself: what is there is taken in every step.

    Attributes:
        x: the copy, laid out as the weight.
        gradient: as x.
    """

    def __init__(self, weight: Tensor, pin_memory: bool = False) -> None:
        self.weight = weight.detach()
        layout = torch.preserve_format if is_dense(weight) else torch.contiguous_format
        self.x, self.gradient = (
            torch.empty_like(self.weight, device="cpu", pin_memory=pin_memory, memory_format=layout)
            for _ in range(2)
        )
        self.read()

    def read(self) -> None:
        """Take the weight as it is."""
        self.x.copy_(self.weight)

    def begin(self, g: Tensor) -> Tensor:
        """Begin to copy the weight's gradient to the host; return where it will be.

        Raises:
            ValueError: for a gradient without storage.
        """
        check_stored(g)
        self.gradient.copy_(g)
        self.read()
        return self.gradient

    def wait(self) -> None:
        """Wait until the gradient is on the host."""

    def end(self) -> None:
        """Wait for what :meth:`begin` has begun."""

    def send(self) -> None:
        """Begin to copy x to the weight."""
        self.weight.copy_(self.x)


class PinnedCopy(HostCopy):
    """The copy of a weight on a GPU, which is read only where others have written to it.

    Its version counter tells most of these writes. Those through ``p.data`` leave it as it is: a
    checksum on the device tells them.

    Args:
        weight: the weight.
        lanes: of its device.
    """

    def __init__(self, weight: Tensor, lanes: Lanes) -> None:
        self._lanes = lanes
        # Checksums of what was written to the weight, and of what is there now.
        self._sums = torch.zeros(2, dtype=torch.int64, device=weight.device)
        on_gpu = weight.device.type != "cpu"
        self._found = torch.zeros(2, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._arrived: Any = None
        super().__init__(weight, pin_memory=on_gpu)

    def read(self) -> None:
        self._noted = read_version(self.weight)
        self._lanes.fetch(self._read).synchronize()
        self._is_modified, self._arrived = False, None

    def _read(self) -> None:
        self.x.copy_(self.weight, non_blocking=True)
        self._sums[0] = checksum(self.weight)

    def begin(self, g: Tensor) -> Tensor:
        check_stored(g)
        self._is_modified = self._noted != read_version(self.weight)
        self._arrived = self._lanes.fetch(partial(self._fetch, g), g)
        return self.gradient

    def _fetch(self, g: Tensor) -> None:
        self.gradient.copy_(g, non_blocking=True)
        self._sums[1] = checksum(self.weight)
        self._found.copy_(self._sums, non_blocking=True)

    def wait(self) -> None:
        """Wait until the gradient is on the host, and free on the device."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def end(self) -> None:
        if self._arrived is None:
            return
        self.wait()
        written, now = self._found.tolist()
        if self._is_modified or written != now:
            self.read()

    def send(self) -> None:
        self._lanes.send(self._send)

    def _send(self) -> None:
        self.weight.copy_(self.x, non_blocking=True)
        self._noted = read_version(self.weight)
        self._sums[0] = checksum(self.weight)


class Offload:
    """The host copies of an optimizer's weights, and the thread that steps them."""

    def __init__(self) -> None:
        self._copies: dict[Tensor, HostCopy] = {}
        self._lanes: dict[torch.device, Lanes] = {}
        self._thread: tuple[int, ThreadPoolExecutor] | None = None
        self._tasks: list[Future[None]] = []
        self._under_way: deque[HostCopy] = deque()

    def copies_of(self, weights: Iterable[Tensor]) -> dict[Tensor, HostCopy]:
        """Return the copies of these weights as they are now; all others are dropped.

        A state that is made anew takes its x_ref from them, so kept copies are read again.
        """
        self.drain()
        self.meet()
        kept, self._copies = self._copies, {}
        for p in weights:
            copy = kept.get(p)
            if copy and _is_of(copy, p):
                copy.read()
            else:
                copy = self._new_copy(p)
            self._copies[p] = copy
        return self._copies

    def _new_copy(self, p: Tensor) -> HostCopy:
        if p.device.type == "cpu":
            return HostCopy(p)
        if p.device not in self._lanes:
            self._lanes[p.device] = Lanes(p.device)
        return PinnedCopy(p, self._lanes[p.device])

    def read(self) -> None:
        """Take all weights as they are."""
        for copy in self._copies.values():
            copy.read()

    def hold_back(self, copy: HostCopy) -> None:
        """Wait where gradients of more than PART bytes, this one's included, are being copied.

        Else the backward pass would run ahead, and the device hold all of them.
        """
        self._under_way.append(copy)
        while sum(each.gradient.nbytes for each in self._under_way) > PART:
            self._under_way.popleft().wait()

    def submit(self, task: Callable[[], None]) -> None:
        """Let the thread do this, after what it has been given before."""
        # A forked process has no thread of its parent's.
        if self._thread is None or self._thread[0] != os.getpid():
            self._thread = os.getpid(), ThreadPoolExecutor(1, "mechanic_fused_offload")
        self._tasks.append(self._thread[1].submit(task))

    def drain(self) -> None:
        """Wait until the thread has done what it was given; its errors are raised here.

        They are raised again until :meth:`forget` is called.
        """
        wait(self._tasks)
        self._under_way.clear()
        self._tasks = [task for task in self._tasks if task.exception() is not None]
        for task in self._tasks:
            task.result()

    def forget(self) -> None:
        """Wait as :meth:`drain` does, and drop the errors."""
        wait(self._tasks)
        self._tasks.clear()
        self._under_way.clear()

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
        on = p.device.type
        if on not in ("cpu", "meta") and not hasattr(torch.get_device_module(on), "Stream"):
            raise ValueError(
                f"offload=True needs a device with streams, got a weight on {p.device}"
            )
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
