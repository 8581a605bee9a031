"""Bucket: the tensors that one call of an op works on, and the tables that kernels read.

Nothing here computes with weights: it keeps addresses and row numbers, and decides whether a
gradient can be used at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from math import inf
from operator import ge, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Backend
from .backends.layout import (
    CPU_CHUNK,
    HYPER,
    OWN_STATE,
    STEPPED,
    SUMS,
    TENSOR,
    compute_dtype,
    device_of_numbers,
    dtype_of_sums,
)
from .distributed import Groups, local_gradients
from .kept_blocks import WHOLE
from .offload import HostCopy
from .param_checks import check_gradient, check_stored, is_dense
from .state_formats import SCALE_SUFFIX
from .torch_internals import local, local_tensors, padding_of, read_version

DELTA_SCALES = f"delta{SCALE_SUFFIX}"


def chunk_table(sizes: list[int], chunk: int) -> Tensor:
    """Return (chunks, 3) int64, a row of ``layout.CHUNK`` for each piece of such tensors."""
    elements = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    counts = (elements + chunk - 1) // chunk
    tensor = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
    first = (counts.cumsum(0) - counts)[tensor]
    offset = (torch.arange(len(tensor), device="cpu") - first) * chunk
    return torch.stack([tensor, offset, (elements[tensor] - offset).clamp(max=chunk)], 1)


def _getter(names: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Return a function from a dict to a tuple of its entries of these names."""
    get = itemgetter(*names)
    return get if len(names) > 1 else lambda entries: (get(entries),)


class ParamSlot(NamedTuple):
    """A parameter and its place in the tables.

    Args:
        parameter: may be a DTensor.
        group: its row of the hyperparameters.
        row: its row of the sums, the number of its scale.
        number: its number in the optimizer.
        state: its entries of the optimizer's state, perhaps DTensors.
        names: the names of the base's own state tensors.
        phase: of its x_ref, see ``kept_blocks.py``.
        element: the index of its first element in the whole weight, whose shard it may be.
        block: elements that share a scale of 8-bit codes; 0: the state has none.
        copy: what is stepped in its place, or None.
    """

    parameter: Tensor
    group: int
    row: int
    number: int
    state: dict[str, Any]
    names: tuple[str, ...]
    phase: int = WHOLE
    element: int = 0
    block: int = 0
    copy: HostCopy | None = None


class Bucket:
    """Weights of one device, dtype, update and sharding, which one call of an op works on.

    ``parameters`` and ``own_state`` (x_ref, and Δ or low bits) are as users see them; all other
    tensors are plain: of a DTensor, this rank's shard; with offload, the copies on the host.

    Attributes that backends read, each list with one entry per weight:
        kind: the update, one of ``layout.KINDS``, or "fallback".
        compute_dtype: the dtype of the arithmetic.
        delta_is_bfloat16: whether Δ is kept in bfloat16.
        rounds_by_random_bits: whether Δ, the base's state or x is narrower than the arithmetic.
        weights, grads, x_ref, delta, x_low, states, steps: tensors (``states``: a tuple of them);
            the running form has no Δ, and beside 16-bit weights low bits, unless they are rounded
            stochastically.
        with_gradient: the parameters that have a gradient.
        rows, groups, numbers: row of the sums, row of the hyperparameters, number in the optimizer.
        state_block: elements that share a scale of an 8-bit state; 0: the state has no codes.
        scales: tensors of those scales, a tuple as in ``states``; empty without codes.
        delta_scales: of a Δ in codes, which it has in the exact forms where the state has; or
            empty.
        elements: index of the first element in the whole weight.
        phases: of x_ref, see ``kept_blocks.py``; WHOLE where all elements have one.
        copies: the weights' copies on the host; empty without offload.
        in_part: how many phases are not WHOLE.
        sizes: numbers of elements.
        padding: how many of them are no weights; empty where all are.
        hyper: (groups, 9) float64, ``layout.HYPER``; ``hyper_rows`` are the same as lists.
        numbers_device: where the numbers of the tuner and ``clip`` are; see
            ``layout.WITHOUT_FLOAT64``.
        sums: (scales, 6) float64, or float32 there, ``layout.SUMS``; ``partials``: (chunks, 6).
        tensors: (weights, 16) int64, ``layout.TENSOR``; ``chunks``: (chunks, 3) int64.
        live_lr: group → an lr on the device that kernels read there.
        grad_scale, found_inf: GradScaler's, or None.
        clip: (2,) float64: N² and max_norm, or None.
        step_count: 0-dim float64, the tuner's, or None where nothing is rounded stochastically.
        handle: the backend's own.

    Args:
        backend: whose ops work on it.
        kind: see above.
        slots: the parameters.
        groups: the number of param groups.
        scales: the number of scales.
        shards: the process groups over which the weights are sharded.
    """

    def __init__(
        self,
        backend: Backend,
        kind: str,
        slots: list[ParamSlot],
        groups: int,
        scales: int,
        shards: Groups,
    ) -> None:
        first = slots[0].parameter
        self.slots = slots
        self.shards = shards
        self.is_sharded = local(first) is not first
        self.backend = backend
        self.kind = kind
        self.dtype = first.dtype
        self.compute_dtype = compute_dtype(first.dtype)
        self.parameters = [slot.parameter for slot in slots]
        given = [local(x).detach() for x in self.parameters]
        self.copies = [slot.copy for slot in slots if slot.copy is not None]
        self.weights = [copy.x for copy in self.copies] or given
        self.device = self.weights[0].device
        self.rows = [slot.row for slot in slots]
        self.groups = [slot.group for slot in slots]
        self.numbers = [slot.number for slot in slots]
        self.elements = [slot.element for slot in slots]
        self.phases = [slot.phase for slot in slots]
        self.in_part = sum(phase != WHOLE for phase in self.phases)
        self._strides = [x.stride() for x in given]
        self._shapes = [x.shape for x in given]
        self._places = [x.get_device() for x in given]
        self._contiguous = [x.is_contiguous() for x in given]
        self._permuted = [i for i, plain in enumerate(self._contiguous) if not plain]
        self.sizes = [x.numel() for x in self.weights]
        self._dense = all(is_dense(x) for x in given)
        self._bytes = [n * self.dtype.itemsize for n in self.sizes]
        paddings = [padding_of(x) for x in self.parameters]
        self.padding = paddings if any(paddings) else []
        self.own_state = [
            {name: slot.state[name] for name in OWN_STATE if name in slot.state} for slot in slots
        ]
        self.x_ref = self._own("x_ref")
        self.delta = self._own("delta")
        self.x_low = self._own("x_low")
        self.delta_is_bfloat16 = any(t.dtype is torch.bfloat16 for t in self.delta[:1])
        self.states = [tuple(local(slot.state[name]) for name in slot.names) for slot in slots]
        self.state_block = slots[0].block
        scale_names = [name + SCALE_SUFFIX for name in slots[0].names if self.state_block]
        self.scales = [tuple(local(slot.state[name]) for name in scale_names) for slot in slots]
        delta_scales = [name for name in (DELTA_SCALES,) if self.delta and self.state_block]
        self.delta_scales = [local(slot.state[name]) for slot in slots for name in delta_scales]
        narrow = [t.dtype is not self.compute_dtype for t in (*self.states[0], *self.delta[:1])]
        has_wide_x = bool(self.delta) or bool(self.x_low) or self.dtype is not torch.bfloat16
        self.rounds_by_random_bits = any(narrow) or not has_wide_x
        self.steps = [slot.state["step"] for slot in slots] if kind in STEPPED else []
        self.grads: list[Tensor | None] = [None] * len(slots)
        self.with_gradient: list[Tensor] = []
        self.hyper = torch.zeros(groups, len(HYPER), dtype=torch.float64, device="cpu")
        self.hyper_rows: list[list[float]] = []
        self.numbers_device = device_of_numbers(self.device)
        dtype = dtype_of_sums(self.device)
        self.sums = torch.zeros(scales, len(SUMS), dtype=dtype, device=self.device)
        self.tensors = self._tensor_table()
        self.chunks = chunk_table(self.sizes, backend.CHUNK.get(self.device.type, CPU_CHUNK))
        self.partials = self.sums.new_zeros(len(self.chunks), len(SUMS))
        self.note_versions()
        self.modified: list[int] = []
        self._addresses = [x.data_ptr() for x in given]
        self._gradient_addresses: list[int] = []
        self.live_lr: dict[int, Tensor] = {}
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.clip: Tensor | None = None
        self.step_count: Tensor | None = None
        self.tensors_stale = self.hyper_stale = True
        self.handle: Any = None
        names = [*self.own_state[0], *delta_scales, *slots[0].names, *scale_names]
        names += ["step"] if self.steps else []
        self._entries_of = _getter(names)
        self._states = [slot.state for slot in slots]
        self._entries = self._find_entries()
        self._entry_addresses = self._addresses_of(self._entries)

    def _own(self, name: str) -> list[Tensor]:
        return [local(own[name]) for own in self.own_state if name in own]

    def part(self, indices: Sequence[int], backend: Backend | None = None) -> Bucket:
        """Return a bucket of some of the weights, with the same state.

        Args:
            indices: of the weights.
            backend: whose ops work on it; None: the same.
        """
        slots = [self.slots[i] for i in indices]
        backend = backend or self.backend
        return Bucket(backend, self.kind, slots, len(self.hyper), len(self.sums), self.shards)

    def collect_gradients(self) -> bool:
        """Take the gradients in the weights' dtype and layout; return whether there is any.

        Raises:
            ValueError: for a gradient that cannot be used.
        """
        params = self.parameters
        grads = local_gradients(params) if self.is_sharded else [x.grad for x in params]
        if self._are_usable(grads):
            self.grads, self.with_gradient = grads, params
            return True
        for i, (g, stride) in enumerate(zip(grads, self._strides, strict=True)):
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise ValueError(
                    f"gradients must be dense, got a gradient of layout {g.layout} "
                    f"for a weight of shape {tuple(self._shapes[i])}"
                )
            check_gradient(g, self._shapes[i], params[i].device)
            if g.dtype is not self.dtype or g.is_neg() or (self._dense and g.stride() != stride):
                check_stored(g)
                x = self.copies[i].weight if self.copies else self.weights[i]
                grads[i] = self._in_weight_layout(g, x)
        self.grads = grads
        self.with_gradient = [x for x, g in zip(params, grads, strict=True) if g is not None]
        return bool(self.with_gradient)

    def _are_usable(self, grads: list[Tensor | None]) -> bool:
        """Return whether all gradients exist in the weights' shape, dtype, layout and place.

        This is the usual case, and costs half of the loop over a thousand small weights.
        """
        try:
            return (
                [g.shape for g in grads] == self._shapes  # type: ignore[union-attr]
                and self._have_weight_layout(grads)  # type: ignore[arg-type]
                and all([g.dtype is self.dtype for g in grads])  # type: ignore[union-attr]
                and [g.get_device() for g in grads] == self._places  # type: ignore[union-attr]
                and not any([g.is_neg() for g in grads])  # type: ignore[union-attr]
            )
        except (AttributeError, RuntimeError):  # None has no stride, a sparse gradient refuses it
            return False

    def _in_weight_layout(self, g: Tensor, x: Tensor) -> Tensor:
        """Return g in x's dtype and layout: both are read as flat storage."""
        if g.is_complex():
            raise ValueError(f"gradients must be real, got dtype {g.dtype}")
        same_storage_order = g.is_contiguous() and x.is_contiguous() and not g.is_neg()
        if g.dtype is self.dtype and same_storage_order:
            return g
        return torch.empty_like(x, memory_format=torch.preserve_format).copy_(g)

    def write_tables(
        self,
        hyper_rows: list[list[float]],
        live_lr: dict[int, Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        step_count: Tensor | None = None,
    ) -> None:
        """Write this step's addresses and hyperparameters, and note which weights were modified.

        ``tensors_stale`` and ``hyper_stale`` tell a GPU backend what to upload.

        Args:
            hyper_rows: rows of ``layout.HYPER``, one per param group.
            live_lr, grad_scale, found_inf: for kernels that read them on the device; empty and None
                where the host has read them.
            step_count: see the class.
        """
        self.live_lr, self.grad_scale, self.found_inf = live_lr, grad_scale, found_inf
        self.clip, self.step_count = None, step_count
        addresses = [0 if g is None else g.data_ptr() for g in self.grads]
        if 0 in addresses:
            # 0 means absent; so one without elements, or without storage, gets 1.
            addresses = [0 if g is None else g.data_ptr() or 1 for g in self.grads]
        # A storage that is cut moves, so gradients at their last addresses need not be asked again.
        if addresses != self._gradient_addresses:
            if not self._are_stored(addresses):
                for g in self.grads:
                    if g is not None:
                        check_stored(g)
            self._gradient_addresses = addresses
            column = TENSOR.index("gradient")
            self.tensors[:, column] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            self.tensors_stale = True
        if hyper_rows != self.hyper_rows:
            self.hyper_rows = hyper_rows
            self.hyper.copy_(torch.tensor(hyper_rows, dtype=torch.float64, device="cpu"))
            self.hyper_stale = True
        # In the running form a weight is where it is found.
        self.modified = self.externally_modified() if self.delta else []

    def _are_stored(self, addresses: list[int]) -> bool:
        """Return whether all gradients are there, whole, and at addresses that kernels may read.

        Torch's own kernels do not ask: ``resize_`` of a storage leaves its tensors as they are.
        """
        size = self.dtype.itemsize
        bytes_left = [
            inf if g is None else g.untyped_storage().nbytes() - size * g.storage_offset()
            for g in self.grads
        ]
        return (
            self._dense
            and 1 not in addresses
            and all(map(ge, bytes_left, self._bytes))
            and not any([address % size for address in addresses])
        )

    def fetch_gradients(self) -> None:
        """Begin to copy the gradients to the host, and take those that will be there instead.

        Raises:
            ValueError: for a gradient without storage.
        """
        self.grads = [
            g if g is None else copy.begin(g)
            for g, copy in zip(self.grads, self.copies, strict=True)
        ]

    def wait_for_gradients(self) -> None:
        """Wait until the gradients are on the host."""
        for g, copy in zip(self.grads, self.copies, strict=True):
            if g is not None:
                copy.end()

    def send_weights(self) -> None:
        """Begin to copy the weights that were stepped to their device."""
        for g, copy in zip(self.grads, self.copies, strict=True):
            if g is not None:
                copy.send()

    def is_stale(self) -> bool:
        """Return whether a weight or an entry of its state has been replaced, or has moved.

        Entries move where torch shares them with another process, and by ``t.data = …``.
        """
        weights = local_tensors(self.parameters) if self.is_sharded else self.parameters
        if (
            [x.data_ptr() for x in weights] != self._addresses
            or [x.numel() for x in weights] != self.sizes
            or not self._have_weight_layout(weights)
        ):
            return True
        try:
            entries = self._find_entries()
        except KeyError:
            return True
        return (
            not all(map(is_, entries, self._entries))
            or self._addresses_of(entries) != self._entry_addresses
        )

    def note_states(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Take the dicts that hold this bucket's entries now."""
        for i, p in enumerate(self.parameters):
            held = states.get(p)
            if held is not None and OWN_STATE[0] in held:
                self._states[i] = held

    def _find_entries(self) -> list[Tensor]:
        """Return all entries of the state that steps read, as they are now."""
        # Those of one weight after another: they were made, and lie in memory, in this order.
        return list(chain.from_iterable(map(self._entries_of, self._states)))

    def _addresses_of(self, entries: list[Tensor]) -> list[int]:
        if self.is_sharded:
            entries = list(map(local, entries))
        return [t.data_ptr() for t in entries]

    def _have_weight_layout(self, tensors: list[Tensor]) -> bool:
        """Return whether tensors are laid out as the weights were when the plan was made.

        ``is_contiguous`` takes half the time of comparing strides.
        """
        return [t.is_contiguous() for t in tensors] == self._contiguous and all(
            [tensors[i].stride() == self._strides[i] for i in self._permuted]
        )

    def externally_modified(self) -> list[int]:
        """Return the indices of weights that others have written since ``note_versions``."""
        now = self._read_versions()
        if now == self._versions:
            return []
        pairs = zip(now, self._versions, strict=True)
        return [i for i, (version, noted) in enumerate(pairs) if version != noted]

    def note_versions(self) -> None:
        """Note the weights' version counters after our own writes."""
        self._versions = self._read_versions()

    def _read_versions(self) -> list[int]:
        found = list(map(read_version, self.parameters))
        if self.is_sharded:
            # Writes to a DTensor advance its own counter, writes to its shard the shard's.
            shards = map(read_version, local_tensors(self.parameters))
            found = [a + b for a, b in zip(found, shards, strict=True)]
        return found

    def _tensor_table(self) -> Tensor:
        table = torch.zeros(len(self.weights), len(TENSOR), dtype=torch.int64, device="cpu")
        for i, x in enumerate(self.weights):
            state0, state1 = ([state.data_ptr() for state in self.states[i]] + [0, 0])[:2]
            scales0, scales1 = ([scale.data_ptr() for scale in self.scales[i]] + [0, 0])[:2]
            row = {
                "gradient": 0,
                "weight": x.data_ptr(),
                "x_low": self.x_low[i].data_ptr() if self.x_low else 0,
                "x_ref": self.x_ref[i].data_ptr(),
                "delta": self.delta[i].data_ptr() if self.delta else 0,
                "delta_scales": self.delta_scales[i].data_ptr() if self.delta_scales else 0,
                "state0": state0,
                "state1": state1,
                "step": self.steps[i].data_ptr() if self.steps else 0,
                "scales0": scales0,
                "scales1": scales1,
                "scale": self.rows[i],
                "group": self.groups[i],
                "number": self.numbers[i],
                "phase": self.phases[i],
                "element": self.elements[i],
            }
            table[i] = torch.tensor([row[name] for name in TENSOR], device="cpu")
        return table
