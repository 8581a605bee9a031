"""Space: vectors over all weights of a model, and the verbs that tuners need of them.

A vector is a list of tensors, one a weight and laid out like it. The verbs are those of a backend
(``vectors_reference.py`` defines them) with the chunks and the determinism of the optimizers' own:
a chunk writes its own partial sums, and a fixed order folds them. Sums over sharded weights are
added up over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import backends, distributed
from ..backends.layout import CPU_CHUNK, KERNEL_DTYPES, compute_dtype
from ..bucket import chunk_table
from ..distributed import Groups, shards
from ..param_checks import is_dense
from ..torch_internals import local
from .reference import AdaRemOptions, Stream

Vector = list[Tensor]


class BucketKey(NamedTuple):
    """What the weights of a part have in common; a part's narrow streams have its dtype."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    shards: Groups


class VectorBucket:
    """Weights of one device, dtype, backend and sharding, which one call of a verb works on.

    Attributes that backends read: ``compute_dtype`` (dtype of the arithmetic), ``dtype``, ``device``,
    ``chunks`` (chunks, 3) int64, ``partials`` (chunks, 4) float64, ``elements``; ``handle`` is the
    backend's own.
    """

    def __init__(self, key: BucketKey, indices: list[int], sizes: list[int]) -> None:
        self.key = key
        self.indices = indices
        self.backend: ModuleType = backends.load_vectors(key.backend)
        self.dtype, self.device = key.dtype, key.device
        self.compute_dtype = compute_dtype(key.dtype)
        self.elements = sum(sizes)
        chunk = self.backend.CHUNK.get(key.device.type, CPU_CHUNK)
        self.chunks = chunk_table(sizes, chunk)
        self.partials = torch.zeros(len(self.chunks), 4, dtype=torch.float64, device=self.device)
        self.owners = self.chunks[:, 0].to(self.device)
        self.handle: Any = None
        # On the device, or indexing by a list would upload it each time.
        self.places = torch.tensor(indices, device=self.device)

    def of(self, vector: Sequence[Tensor]) -> Stream:
        """Return this part's tensors of a vector."""
        return [vector[i] for i in self.indices]

    def zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self.device)

    def addresses(self, streams: Sequence[Stream]) -> Tensor:
        """Return (weights, 4) int64, the streams' addresses, kept until the next call."""
        columns = [[t.data_ptr() for t in stream] for stream in streams]
        columns += [[0] * len(self.indices)] * (4 - len(streams))
        self._addresses = torch.tensor(columns, dtype=torch.int64).t().contiguous()
        return self._addresses

    def folded(self) -> Tensor:
        """Return (4,), the sums over all chunks."""
        return self.partials.sum(0)

    def peaks(self) -> Tensor:
        """Return (weights,), the largest first partial of each weight's chunks."""
        found = self.zeros(len(self.indices))
        return found.scatter_reduce(0, self.owners, self.partials[:, 0], "amax")


class Space:
    """All weights of a model as one long vector.

    Args:
        parameters: weights, DTensors among them.
        backend: "auto" or a backend's name.
        reduce_group: the process group over which plain weights are sharded, or None.

    Raises:
        ValueError: without weights, or for a backend that does not serve their device.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        backend: str = "auto",
        reduce_group: Any = None,
    ) -> None:
        self.parameters = list(parameters)
        self.backend, self.reduce_group = backend, reduce_group
        if not self.parameters:
            raise ValueError("expected weights to work on, got none")
        self.weights: Vector = [local(p).detach() for p in self.parameters]
        self.device = self.weights[0].device
        members: dict[BucketKey, list[int]] = {}
        for i, (p, x) in enumerate(zip(self.parameters, self.weights, strict=True)):
            name = backends.resolve_vectors(backend, x.device.type)
            if not is_dense(x) or x.dtype not in KERNEL_DTYPES:
                name = "reference"
            key = BucketKey(x.device, x.dtype, name, shards(p, reduce_group))
            members.setdefault(key, []).append(i)
        sizes = [x.numel() for x in self.weights]
        self.parts = [
            VectorBucket(key, found, [sizes[i] for i in found]) for key, found in members.items()
        ]

    def fits(self) -> bool:
        """Return whether the weights still lie where they did."""
        now = [local(p) for p in self.parameters]
        return all(
            x.data_ptr() == w.data_ptr() and x.dtype is w.dtype and x.stride() == w.stride()
            for x, w in zip(now, self.weights, strict=True)
        )

    def zeros(self) -> Vector:
        """Return a vector of zeros in the dtype of the arithmetic."""
        return [torch.zeros_like(x, dtype=compute_dtype(x.dtype)) for x in self.weights]

    def copy(self) -> Vector:
        """Return a copy of the weights, in their dtype."""
        return [x.clone(memory_format=torch.preserve_format) for x in self.weights]

    def gradients(self) -> Vector | None:
        """Return the gradients in the weights' dtype and layout, zeros where there is none.

        None where no weight has one.
        """
        grads = distributed.local_gradients(self.parameters)
        if all(g is None for g in grads):
            return None
        return [_conform(g, x) for g, x in zip(grads, self.weights, strict=True)]

    def step_along(self, x: Vector, w: Vector, d: Vector, c: Tensor | float) -> None:
        """x = round(w − c·d). Writes to the weights themselves count as writes for autograd.

        Args:
            c: a number, or a float64 tensor with one on any device.
        """
        c = torch.as_tensor(c, dtype=torch.float64)
        for part in self.parts:
            near = c.to(part.device, non_blocking=True)
            part.backend.step_along(part, part.of(x), part.of(w), part.of(d), near)
        if x is self.weights:
            self.written()

    def axpby(self, s: Vector, x: Vector, a: float = 1.0, c: float = 1.0) -> None:
        """s = a·s + c·x; where a = 0 s is not read."""
        for part in self.parts:
            part.backend.axpby(part, part.of(s), part.of(x), a, c)

    def difference_dots(self, s: Vector, a: Vector, b: Vector) -> Tensor:
        """s' = a − b; return (2,), s'·s and s'·s' over all ranks; s takes s'."""
        return self._sum(lambda p: p.backend.difference_dots(p, p.of(s), p.of(a), p.of(b)), 2)

    def dots(self, g: Vector, l: Vector, p: Vector) -> Tensor:  # noqa: E741
        """Return (4,), g·g, g·l, l·l and g·p over all ranks, in one read."""
        return self._sum(
            lambda part: part.backend.dots(part, part.of(g), part.of(l), part.of(p)), 4
        )

    def abs_max(self, a: Vector) -> Tensor:
        """Return (weights,), max|a| of each weight over all ranks, float64."""
        return self._most([part.backend.abs_max(part, part.of(a)) for part in self.parts])

    def adarem(self, g: Vector, m: Vector, peaks: Tensor, options: AdaRemOptions) -> Tensor:
        """Take one step of AdaRem on the weights; return max|m| of each weight's new m."""
        found = []
        for part in self.parts:
            near = peaks.to(part.device)[part.places]
            streams = part.of(self.weights), part.of(g), part.of(m)
            found.append(part.backend.adarem(part, *streams, near, options))
        self.written()
        return self._most(found)

    def written(self) -> None:
        """Tell autograd that the weights have been written, and autocast that its casts are old."""
        increment_version(self.parameters)
        torch.clear_autocast_cache()

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles make the tables anew: those hold addresses.
        return Space, (self.parameters, self.backend, self.reduce_group)

    def _sum(self, of: Callable[[VectorBucket], Tensor], count: int) -> Tensor:
        rows = distributed.merge({part.key.shards: of(part).to(self.device)} for part in self.parts)
        return distributed.all_reduce([rows])

    def _most(self, found: list[Tensor]) -> Tensor:
        most = torch.zeros(len(self.weights), dtype=torch.float64, device=self.device)
        for part, values in zip(self.parts, found, strict=True):
            most[part.places.to(self.device)] = values.to(self.device)
        # Not by parts: those that are not dense on one rank may be dense on another.
        sharded: dict[Groups, list[int]] = {}
        for part in self.parts:
            if part.key.shards:
                sharded.setdefault(part.key.shards, []).extend(part.indices)
        for groups, indices in sharded.items():
            places = torch.tensor(sorted(indices), device=self.device)
            # As integers, by which sizes compare as they do and a NaN is the largest.
            bits = most[places].abs().view(torch.int64)
            for group in groups:
                torch.distributed.all_reduce(bits, torch.distributed.ReduceOp.MAX, group=group)
            most[places] = bits.view(torch.float64)
        return most


def _conform(g: Tensor | None, x: Tensor) -> Tensor:
    if g is None:
        return torch.zeros_like(x, memory_format=torch.preserve_format)
    if g.layout is not torch.strided or g.is_complex():
        raise ValueError(f"gradients must be dense and real, got {g.layout}, {g.dtype}")
    if g.dtype is x.dtype and g.stride() == x.stride() and not g.is_neg():
        return g
    return torch.empty_like(x, memory_format=torch.preserve_format).copy_(g)
