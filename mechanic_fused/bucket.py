"""Bucket: the tensors that one call of a verb works on, and the tables that kernels read.

No arithmetic on weights happens here, only bookkeeping: addresses, row numbers, and whether a
gradient can be worked on at all.
"""

from __future__ import annotations

from operator import is_
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.layout import (
    CPU_CHUNK,
    HYPER,
    STEPPED,
    TENSOR,
    compute_dtype,
)
from .distributed import Groups, local, local_gradients


def delta_dtype(dtype: torch.dtype, narrow: bool) -> torch.dtype:
    """Return the dtype of Δ beside weights of ``dtype``; narrow: bfloat16, but for float64."""
    return torch.bfloat16 if narrow and dtype is not torch.float64 else compute_dtype(dtype)


def is_dense(x: Tensor) -> bool:
    """Return whether x fills its range of memory once, in any order of its axes."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True


def chunk_table(sizes: list[int], chunk: int) -> Tensor:
    """Return (chunks, 3) int64: tensor, offset and length of each piece of such tensors."""
    elements = torch.tensor(sizes, dtype=torch.int64)
    counts = (elements + chunk - 1) // chunk
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts)[tensor]
    offset = (torch.arange(len(tensor)) - first) * chunk
    return torch.stack([tensor, offset, (elements[tensor] - offset).clamp(max=chunk)], 1)


class ParamSlot(NamedTuple):
    """A weight and where it belongs: its parameter, row of the hyperparameters, row of the sums,
    number in the optimizer, state entries, and the names of its base's state. Parameter and state
    may be DTensors."""

    parameter: Tensor
    group: int
    row: int
    number: int
    state: dict[str, Any]
    names: tuple[str, ...]


class Bucket:
    """Weights of one device, dtype, update and sharding, which one call of a verb works on.

    ``parameters`` and ``ours`` (x_ref and Δ) are as users see them; all else is of plain tensors,
    the rank's own parts of DTensors.
    ``shards`` are the process groups over which these weights are spread.

    Attributes that backends read: ``kind`` (the update), ``compute_dtype`` (dtype of the arithmetic),
    ``delta_is_bfloat16`` (whether Δ is in bfloat16), ``weights``, ``grads``, ``x_ref``, ``delta``,
    ``states``, ``steps`` (lists, one entry a weight), ``rows``, ``groups`` and ``numbers`` (of each
    weight: row of the sums and of the hyperparameters, and its number in the optimizer),
    ``hyper`` (groups, 8) float64, ``sums`` (scales, 4) float64 and ``partials`` (chunks, 4),
    ``tensors`` (weights, 10) and ``chunks`` (chunks, 3) int64. ``handle`` is the backend's own.
    """

    def __init__(
        self,
        backend: ModuleType,
        kind: str,
        members: list[ParamSlot],
        groups: int,
        scales: int,
        shards: Groups,
    ) -> None:
        first = members[0].parameter
        self.members = members
        self.shards = shards
        self.wrapped = local(first) is not first
        self.backend = backend
        self.kind = kind
        self.dtype = first.dtype
        self.device = first.device
        self.compute_dtype = compute_dtype(first.dtype)
        self.parameters = [member.parameter for member in members]
        self.weights = [local(x).detach() for x in self.parameters]
        self.rows = [member.row for member in members]
        self.groups = [member.group for member in members]
        self.numbers = [member.number for member in members]
        self.strides = [x.stride() for x in self.weights]
        self.shapes = [x.shape for x in self.weights]
        self.contiguous = [x.is_contiguous() for x in self.weights]
        self.permuted = [i for i, plain in enumerate(self.contiguous) if not plain]
        self.sizes = [x.numel() for x in self.weights]
        self.dense = all(is_dense(x) for x in self.weights)
        self.ours = [
            {name: member.state[name] for name in ("x_ref", "delta")} for member in members
        ]
        self.x_ref = [local(ours["x_ref"]) for ours in self.ours]
        self.delta = [local(ours["delta"]) for ours in self.ours]
        self.delta_is_bfloat16 = self.delta[0].dtype is not self.compute_dtype
        self.states = [
            tuple(local(member.state[name]) for name in member.names) for member in members
        ]
        self.steps = [member.state["step"] for member in members] if kind in STEPPED else []
        self.grads: list[Tensor | None] = [None] * len(members)
        self.hyper = torch.zeros(groups, len(HYPER), dtype=torch.float64)
        self.hyper_rows: list[list[float]] = []
        self.sums = torch.zeros(scales, 4, dtype=torch.float64, device=self.device)
        self.tensors = self._tensor_table()
        self.chunk = backend.CHUNK.get(self.device.type, CPU_CHUNK)
        self.chunks = chunk_table(self.sizes, self.chunk)
        self.partials = torch.zeros(len(self.chunks), 4, dtype=torch.float64, device=self.device)
        self.note_versions()
        self.addresses = self.tensors[:, 1].tolist()
        self.gradient_addresses: list[int] = []
        self.live_lr: dict[int, Tensor] = {}
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.clip: Tensor | None = None
        self.step_count: Tensor | None = None
        self.tensors_stale = self.hyper_stale = True
        self.handle: Any = None
        self.places = [(m.state, name) for m in members for name in ("delta", *m.names[:1])]
        self.held = [state[name] for state, name in self.places]

    def single(self, i: int) -> Bucket:
        """Return a bucket of weight i alone, with the same state."""
        return Bucket(
            self.backend, self.kind, [self.members[i]], len(self.hyper), len(self.sums), self.shards
        )

    def collect_gradients(self, fresh: bool = True) -> bool:
        """Look at every gradient; raise for one that cannot be used; True if there is any.

        Args:
            fresh: whether the plan is new. Torch compares shapes and devices when a gradient is
                assigned, so they can differ only where the weight has changed since.
        """
        grads = (
            local_gradients(self.parameters) if self.wrapped else [x.grad for x in self.parameters]
        )
        if not fresh and self._are_plain(grads):
            self.grads = grads
            return True
        for i, (g, stride) in enumerate(zip(grads, self.strides, strict=True)):
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise ValueError(
                    f"gradients must be dense, got a gradient of layout {g.layout} "
                    f"for a weight of shape {tuple(self.shapes[i])}"
                )
            if fresh and (g.shape != self.shapes[i] or g.device != self.device):
                raise ValueError(
                    "a gradient must have its weight's shape and device, expected "
                    f"{tuple(self.shapes[i])} on {self.device}, got {tuple(g.shape)} on {g.device}"
                )
            if g.dtype is not self.dtype or g.is_neg() or (self.dense and g.stride() != stride):
                grads[i] = self._conform(g, self.weights[i])
        self.grads = grads
        return any(g is not None for g in grads)

    def _are_plain(self, grads: list[Tensor | None]) -> bool:
        """Return whether all gradients are there, of the weights' dtype and layout: the usual case,
        which costs a step of 1,000 small weights half of what the loop over them does."""
        try:
            return (
                self._have_our_layout(grads)  # type: ignore[arg-type]
                and all([g.dtype is self.dtype for g in grads])  # type: ignore[union-attr]
                and not any([g.is_neg() for g in grads])  # type: ignore[union-attr]
            )
        except (AttributeError, RuntimeError):  # None has no stride, a sparse gradient refuses it
            return False

    def _conform(self, g: Tensor, x: Tensor) -> Tensor:
        """Return g in x's dtype and layout, since both are walked as flat storage."""
        if g.is_complex():
            raise ValueError(f"gradients must be real, got dtype {g.dtype}")
        same_storage = g.is_contiguous() and x.is_contiguous() and not g.is_neg()
        if g.dtype is self.dtype and same_storage:
            return g
        return torch.empty_like(x, memory_format=torch.preserve_format).copy_(g)

    def load(
        self,
        hyper_rows: list[list[float]],
        live_lr: dict[int, Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None = None,
        step_count: Tensor | None = None,
    ) -> None:
        """Write this step's addresses and hyperparameters into the tables.

        What a backend on a GPU must upload again shows in ``tensors_stale`` and ``hyper_stale``.
        ``live_lr`` (group → tensor), ``grad_scale`` and ``found_inf`` are for kernels that read
        them on the device; empty and None where the host has read them already. ``clip``, (2,)
        float64 on the bucket's device, is (N², max_norm), which ``accumulate`` clips gradients by;
        its numbers may come later, from the sums of ``norm``. ``step_count``, 0-dim float64 there, is
        the count of the tuner's steps, which the rounding of a narrow Δ goes by.
        """
        self.live_lr, self.grad_scale, self.found_inf = live_lr, grad_scale, found_inf
        self.clip, self.step_count = clip, step_count
        addresses = [0 if g is None else g.data_ptr() for g in self.grads]
        if 0 in addresses:
            addresses = [self._address(g) for g in self.grads]
        if addresses != self.gradient_addresses:
            self.gradient_addresses = addresses
            self.tensors[:, 0] = torch.tensor(addresses, dtype=torch.int64)
            self.tensors_stale = True
        if hyper_rows != self.hyper_rows:
            self.hyper_rows = hyper_rows
            self.hyper.copy_(torch.tensor(hyper_rows, dtype=torch.float64))
            self.hyper_stale = True

    def _address(self, g: Tensor | None) -> int:
        """Return where g lies: 0 means absent, so an empty gradient, which nobody reads, gets 1."""
        if g is not None and g.numel() and not g.data_ptr():
            raise ValueError(
                "gradients must be plain tensors with storage of their own for plain weights, "
                f"got a {type(g).__name__} of shape {tuple(g.shape)}"
            )
        return 0 if g is None else g.data_ptr() or 1

    def _parts(self) -> list[Tensor]:
        """Return the weights as they are now, of DTensors what this rank holds."""
        if not self.wrapped:
            return self.parameters
        return [x._local_tensor for x in self.parameters]  # type: ignore[attr-defined]

    def is_stale(self) -> bool:
        """Return whether a weight has another storage, shape or layout, or another state, than
        the tables say."""
        weights = self._parts()
        return (
            [x.data_ptr() for x in weights] != self.addresses
            or [x.numel() for x in weights] != self.sizes
            or not self._have_our_layout(weights)
            or not all(map(is_, [held.get(name) for held, name in self.places], self.held))
        )

    def _have_our_layout(self, tensors: list[Tensor]) -> bool:
        """Return whether tensors lie as the weights did when the plan was made.

        A contiguous tensor is known by that, which takes half the time of comparing strides.
        """
        return [t.is_contiguous() for t in tensors] == self.contiguous and all(
            [tensors[i].stride() == self.strides[i] for i in self.permuted]
        )

    def externally_modified(self) -> list[int]:
        """Return the weights that somebody else has written since ``remember``."""
        versions = self._versions()
        if versions == self.versions:
            return []
        pairs = zip(versions, self.versions, strict=True)
        return [i for i, (now, then) in enumerate(pairs) if now != then]

    def note_versions(self) -> None:
        """Note the weights' versions after our own writes."""
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        versions = [x._version for x in self.parameters]
        if self.wrapped:
            # Writes to a DTensor count there, writes to its part count in the part.
            parts = self._parts()
            versions = [v + part._version for v, part in zip(versions, parts, strict=True)]
        return versions

    def _tensor_table(self) -> Tensor:
        table = torch.zeros(len(self.weights), len(TENSOR), dtype=torch.int64)
        for i, x in enumerate(self.weights):
            states = [state.data_ptr() for state in self.states[i]]
            step = self.steps[i].data_ptr() if self.steps else 0
            table[i] = torch.tensor(
                [0, x.data_ptr(), self.x_ref[i].data_ptr(), self.delta[i].data_ptr()]
                + (states + [0, 0])[:2]
                + [step, self.rows[i], self.groups[i], self.numbers[i]]
            )
        return table
