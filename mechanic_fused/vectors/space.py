"""Space: vectors over all weights of a model, and the ops on them that tuners need.

A vector is a list with one tensor per weight, laid out as the weight is. The ops are those of a
backend; ``reference.py`` defines them. Chunks and sums are as in the optimizers: each chunk writes
its own partial sums and a fixed order adds them. Sums over sharded weights are all-reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import backends, distributed
from ..backends.layout import CPU_CHUNK, KERNEL_DTYPES, compute_dtype
from ..bucket import chunk_table
from ..distributed import Groups, shards
from ..param_checks import check_gradient, check_readable, check_weights, is_dense
from ..torch_internals import local
from .reference import AdaRemOptions, Stream

Vector = list[Tensor]


class BucketKey(NamedTuple):
    """What the weights of a bucket have in common; its narrow streams have the weights' dtype."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    shards: Groups


class VectorBucket:
    """Weights of one device, dtype, backend and sharding, which one call of an op works on.

    Attributes that backends read: ``compute_dtype`` (dtype of the arithmetic), ``dtype``,
    ``device``, ``chunks`` (chunks, 3) int64, ``partials`` (chunks, 4) float64, ``elements``.
    ``handle`` belongs to the backend.
    """

    def __init__(self, key: BucketKey, indices: list[int], weights: Vector) -> None:
        sizes = [x.numel() for x in weights]
        self.key = key
        self.indices = indices
        self.weights = weights
        self.shapes = [x.shape for x in weights]
        self._checked: dict[int, list[int]] = {}  # place of a stream → the last addresses
        self.backend = backends.load_vectors(key.backend)
        self.dtype, self.device = key.dtype, key.device
        self.compute_dtype = compute_dtype(key.dtype)
        self.elements = sum(sizes)
        self.chunks = chunk_table(sizes, self.backend.CHUNK.get(key.device.type, CPU_CHUNK))
        self.partials = torch.zeros(len(self.chunks), 4, dtype=torch.float64, device=self.device)
        self.handle: Any = None
        # Both on the device: indexing by a list would upload it at each call.
        self.weight_of_chunk = self.chunks[:, 0].to(self.device)
        self.places = torch.tensor(indices, device=self.device)

    def of(self, vector: Sequence[Tensor]) -> Stream:
        """Return this bucket's tensors of a vector."""
        return [vector[i] for i in self.indices]

    def zeros(self, count: int) -> Tensor:
        """Return (count,) float64 zeros on the device."""
        return torch.zeros(count, dtype=torch.float64, device=self.device)

    def addresses(self, streams: Sequence[Stream]) -> Tensor:
        """Return (weights, 4) int64, the addresses of the streams; valid until the next call.

        Raises:
            ValueError: for a tensor that a kernel cannot read as its weight.
        """
        columns = [[t.data_ptr() for t in stream] for stream in streams]
        for place, (stream, addresses) in enumerate(zip(streams, columns, strict=True)):
            if [t.shape for t in stream] != self.shapes or addresses != self._checked.get(place):
                for x, t in zip(self.weights, stream, strict=True):
                    check_readable(t, x)
                self._checked[place] = addresses
        columns += [[0] * len(self.indices)] * (4 - len(streams))
        self._addresses = torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous()
        return self._addresses

    def folded(self) -> Tensor:
        """Return (4,) float64, the partial sums added over all chunks."""
        return self.partials.sum(0)

    def peaks(self) -> Tensor:
        """Return (weights,) float64, the largest first partial among each weight's chunks."""
        found = self.zeros(len(self.indices))
        return found.scatter_reduce(0, self.weight_of_chunk, self.partials[:, 0], "amax")


class Space:
    """All weights of a model as one long vector.

    Args:
        parameters: the weights; DTensors are allowed.
        backend: "auto" or the name of a backend.
        reduce_group: the process group over which plain weights are sharded, or None.

    Raises:
        ValueError: without weights, for weights that cannot be trained (without storage, or sharing
            memory), or for a backend that does not serve their device.
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
        check_weights(self.weights)
        self.device = self.weights[0].device
        members: dict[BucketKey, list[int]] = {}
        for i, (p, x) in enumerate(zip(self.parameters, self.weights, strict=True)):
            name = backends.resolve_vectors(backend, x.device.type)
            if not is_dense(x) or x.dtype not in KERNEL_DTYPES:
                name = "reference"
            key = BucketKey(x.device, x.dtype, name, shards(p, reduce_group))
            members.setdefault(key, []).append(i)
        self.buckets = [
            VectorBucket(key, indices, [self.weights[i] for i in indices])
            for key, indices in members.items()
        ]

    def fits(self) -> bool:
        """Return whether the weights still have the storage, dtype and strides of the tables."""
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

    @torch.no_grad()
    def restore(self, w: Vector) -> None:
        """Write a :meth:`copy` back to the weights, bit by bit; autograd sees the write."""
        torch._foreach_copy_(self.weights, w)
        self.note_write()

    def gradients(self) -> Vector | None:
        """Return the gradients in the weights' dtype and layout, or None if no weight has one.

        A weight without a gradient counts as one whose gradient is 0.

        Raises:
            ValueError: for sparse or complex gradients, and those of another shape or device than
                their weight's.
        """
        grads = distributed.local_gradients(self.parameters)
        if all(g is None for g in grads):
            return None
        return [_in_weight_layout(g, x) for g, x in zip(grads, self.weights, strict=True)]

    def step_along(self, x: Vector, w: Vector, d: Vector, c: Tensor | float) -> None:
        """x = round(w − c·d); autograd sees writes to the weights themselves.

        Args:
            x: the vector to write, ``self.weights`` or another one in the weights' dtypes.
            w: a vector in the weights' dtypes.
            d: a vector in the dtype of the arithmetic.
            c: a number, or a 0-dim float64 tensor on any device.
        """
        if not torch.is_tensor(c):
            c = torch.tensor(c, dtype=torch.float64, device="cpu")
        c = c.to(torch.float64)
        for bucket in self.buckets:
            near = c.to(bucket.device, non_blocking=True)
            bucket.backend.step_along(bucket, bucket.of(x), bucket.of(w), bucket.of(d), near)
        if x is self.weights:
            self.note_write()

    def axpby(self, s: Vector, x: Vector, a: float = 1.0, c: float = 1.0) -> None:
        """s = a·s + c·x; with a = 0, s is not read."""
        for bucket in self.buckets:
            bucket.backend.axpby(bucket, bucket.of(s), bucket.of(x), a, c)

    def difference_dots(self, s: Vector, a: Vector, b: Vector) -> Tensor:
        """Return (2,), s'·s and s'·s' over all ranks for s' = a − b, which then replaces s."""
        return self._sum(lambda p: p.backend.difference_dots(p, p.of(s), p.of(a), p.of(b)))

    def dots(self, g: Vector, l: Vector, p: Vector) -> Tensor:  # noqa: E741
        """Return (4,), g·g, g·l, l·l and g·p over all ranks, in one read of the vectors."""
        return self._sum(lambda b: b.backend.dots(b, b.of(g), b.of(l), b.of(p)))

    def abs_max(self, a: Vector) -> Tensor:
        """Return (weights,) float64, max|a| of each weight over all ranks."""
        return self._max([bucket.backend.abs_max(bucket, bucket.of(a)) for bucket in self.buckets])

    def adarem(self, g: Vector, m: Vector, peaks: Tensor, options: AdaRemOptions) -> Tensor:
        """Take one step of AdaRem on the weights; return max|m| of each weight's new m."""
        found = []
        for bucket in self.buckets:
            near = peaks.to(bucket.device)[bucket.places]
            streams = bucket.of(self.weights), bucket.of(g), bucket.of(m)
            found.append(bucket.backend.adarem(bucket, *streams, near, options))
        self.note_write()
        return self._max(found)

    def note_write(self) -> None:
        """Tell autograd that the weights were written, and autocast to drop its casts of them."""
        increment_version(self.parameters)
        torch.clear_autocast_cache()

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild the tables in copies and pickles: they hold addresses."""
        return Space, (self.parameters, self.backend, self.reduce_group)

    def _sum(self, of: Callable[[VectorBucket], Tensor]) -> Tensor:
        rows = distributed.merge({b.key.shards: of(b).to(self.device)} for b in self.buckets)
        return distributed.all_reduce([rows])

    def _max(self, found: list[Tensor]) -> Tensor:
        """Return the buckets' maxima in the order of the weights, over all ranks."""
        total = torch.zeros(len(self.weights), dtype=torch.float64, device=self.device)
        for bucket, values in zip(self.buckets, found, strict=True):
            total[bucket.places.to(self.device)] = values.to(self.device)
        # Not bucket by bucket: a shard that is not dense on one rank may be dense on another.
        sharded: dict[Groups, list[int]] = {}
        for bucket in self.buckets:
            if bucket.key.shards:
                sharded.setdefault(bucket.key.shards, []).extend(bucket.indices)
        for groups, indices in sharded.items():
            places = torch.tensor(sorted(indices), device=self.device)
            # As integers: their order is that of the magnitudes, with NaN above all others.
            bits = total[places].abs().view(torch.int64)
            for group in groups:
                torch.distributed.all_reduce(bits, torch.distributed.ReduceOp.MAX, group=group)
            total[places] = bits.view(torch.float64)
        return total


def _in_weight_layout(g: Tensor | None, x: Tensor) -> Tensor:
    """Return a gradient in its weight's dtype and layout, zeros for None."""
    if g is None:
        return torch.zeros_like(x, memory_format=torch.preserve_format)
    if g.layout is not torch.strided or g.is_complex():
        raise ValueError(f"gradients must be dense and real, got {g.layout}, {g.dtype}")
    check_gradient(g, x.shape, x.device)
    if g.dtype is x.dtype and g.stride() == x.stride() and not g.is_neg():
        return g
    return torch.empty_like(x, memory_format=torch.preserve_format).copy_(g)
