"""StepPlan: the whole of what one step works on, sorted into buckets; kept between steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import backends, reference, state
from .bases import STATES, Base, Group
from .bucket import Bucket, Member, is_dense, wide
from .tuner import Tuner

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

GENERAL = "general"
"""The kind of a bucket whose update the base optimizer makes itself."""


class StepPlan:
    """Buckets of the weights that require gradients, by device, dtype and update.

    Args:
        param_groups: the optimizer's own.
        states: the optimizer's own ``state``; entries that are missing are made.
        base: the base's row of the table of fused updates, or None for the general road.
        backend: the name of a backend, or "auto".
        scale: which weights share a scale: "global", "group" or "parameter".
        narrow_state: keep the base's state in the weight's dtype instead of float32.
        tuner: gets a row for each scale.

    Raises:
        ValueError: for weights that no road can train: complex, overlapping or sharing memory, or
            on a device that the backend cannot serve.
    """

    def __init__(
        self,
        param_groups: list[Group],
        states: Mapping[Tensor, dict[str, Any]],
        base: Base | None,
        backend: str,
        scale: str,
        narrow_state: bool,
        tuner: Tuner,
    ) -> None:
        weights = [p for group in param_groups for p in group["params"] if p.requires_grad]
        check_weights(weights)
        self.signature = signature(param_groups, base)
        self.base = base
        self.tuner = tuner
        members = self._sort(param_groups, scale, backend)
        for (kind, _, dtype, _), sorted_members in members.items():
            kept = dtype if narrow_state else wide(dtype)
            for i, member in enumerate(sorted_members):
                p = member.parameter
                member.state.update(states.get(p, {}))
                state.ensure(member.state, p, kind, kept)
                # On the general road a weight without a gradient so far keeps its entries here.
                if kind != GENERAL or p in states:
                    states[p].update(member.state)
                    sorted_members[i] = member._replace(state=states[p])
        self.states, self.state_count = states, len(states)
        scales = len(tuner.keys)
        self.buckets = [
            Bucket(
                backends.MODULES[name](),
                kind,
                sorted_members,
                len(param_groups),
                scales,
            )
            for (kind, _, _, name), sorted_members in members.items()
        ]
        self.fresh = True

    def _sort(
        self, param_groups: list[Group], scale: str, backend: str
    ) -> dict[tuple[str, torch.device, torch.dtype, str], list[Member]]:
        members: dict[tuple[str, torch.device, torch.dtype, str], list[Member]] = {}
        row = 0
        for number, group in enumerate(param_groups):
            kind = GENERAL if self.base is None else self.base.kind(group)
            for p in group["params"]:
                if scale != "global":
                    row = row if scale == "parameter" else number
                if p.requires_grad:
                    name = backends.resolve(backend, p.device.type)
                    # Kernels walk flat storage, which a weight with gaps has not, and know the
                    # four usual dtypes.
                    if not is_dense(p) or p.dtype not in KERNEL_DTYPES:
                        name = "reference"
                    key = (kind, p.device, p.dtype, name)
                    member = Member(p, number, row, {}, STATES.get(kind, ()))
                    members.setdefault(key, []).append(member)
                row += scale == "parameter"
        return members

    def fits(self, param_groups: list[Group], base: Base | None) -> bool:
        """Return whether nothing has changed but values, gradients and hyperparameters."""
        return (
            self.signature == signature(param_groups, base)
            and len(self.states) >= self.state_count
            and not any(bucket.converted() for bucket in self.buckets)
        )

    def gather(self) -> bool:
        """Look at every gradient before anything changes; True if there is any at all."""
        return any([bucket.gather(self.fresh) for bucket in self.buckets])

    def informative(self) -> bool:
        """Return whether any gradient has an element that is not 0: a read by the host."""
        grads = [g for bucket in self.buckets for g in bucket.grads if g is not None]
        return any(bool(g.any()) for g in grads)

    def capture(self) -> None:
        """Let the run start here: x_ref takes x."""
        for bucket in self.buckets:
            for x_ref, x in zip(bucket.x_ref, bucket.weights, strict=True):
                x_ref.copy_(x)

    @property
    def on_device(self) -> bool:
        """Whether kernels read GradScaler's numbers and a tensor lr themselves, on the device."""
        return self.base is not None and all(
            bucket.backend is not reference and bucket.device.type != "cpu"
            for bucket in self.buckets
        )

    def load(
        self, param_groups: list[Group], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Write this step's addresses and hyperparameters where the kernels read them.

        Args:
            param_groups: the optimizer's own.
            grad_scale: what GradScaler has multiplied the gradients by, or None.
            found_inf: not 0 if this step is to be skipped, or None.
        """
        unscale = 1.0 if grad_scale is None or self.on_device else 1.0 / float(grad_scale)
        live_lr = {}
        hyper = []
        for number, group in enumerate(param_groups):
            lr, *rest = (0.0,) * 7 if self.base is None else self.base.hyper(group)
            if self.on_device and torch.is_tensor(lr) and lr.device.type != "cpu":
                live_lr[number], lr = lr, 0.0
            sign = -unscale if group.get("maximize") else unscale
            hyper.append([float(lr), *map(float, rest), sign])
        there = (grad_scale, found_inf) if self.on_device else (None, None)
        self.tuner.found_inf = there[1]
        for bucket in self.buckets:
            near = [t if t is None else t.to(bucket.device, non_blocking=True) for t in there]
            bucket.load(hyper, live_lr, *near)
            bucket.backend.prepare(bucket)

    def reconcile(self, everything: bool = False) -> None:
        """Shift x_ref where weights were written by hand; take x·Δ and x·x anew where needed.

        Args:
            everything: also look where no version counter has moved.
        """
        everything = everything or self.fresh
        for bucket in self.buckets:
            written = bucket.written()
            if not (written or everything):
                continue
            scale = self.tuner.scale().to(bucket.device)
            for i in range(len(bucket.weights)) if everything else written:
                reference.shift(bucket, i, scale)
            bucket.backend.measure(bucket)
        self.fresh = False

    def accumulate(self) -> None:
        """Take the sums with the old Δ and move Δ on, in every bucket."""
        for bucket in self.buckets:
            bucket.backend.accumulate(bucket)

    def sums(self) -> Tensor:
        """Return the sums over all buckets, (scales, 4), on the tuner's device."""
        if len(self.buckets) == 1:
            return self.buckets[0].sums.to(self.tuner.device)
        return torch.stack([bucket.sums.to(self.tuner.device) for bucket in self.buckets]).sum(0)

    def tune(self) -> None:
        """Let the tuner learn from the sums over all buckets, on its own device."""
        sums = self.sums()
        near = (b.backend for b in self.buckets if b.device == self.tuner.device)
        next(near, reference).tune(sums, self.tuner)

    def apply(self) -> None:
        """Write the weights; the last bucket first, since its Δ is the likeliest to be in cache."""
        for bucket in reversed(self.buckets):
            bucket.backend.apply(bucket, self.tuner.to(bucket.device))
            bucket.remember()

    def release(self) -> None:
        """Let go of the gradients, or they would outlive the next zero_grad."""
        for bucket in self.buckets:
            bucket.grads = [None] * len(bucket.weights)


def signature(param_groups: list[Group], base: Base | None) -> list[Any]:
    """Return what a plan depends on; a plan is made anew when it changes."""
    weights = [p for group in param_groups for p in group["params"]]
    return [
        id(base),
        [len(group["params"]) for group in param_groups],
        [] if base is None else [base.kind(group) for group in param_groups],
        [id(p) for p in weights],
        [p.requires_grad for p in weights],
    ]


def check_weights(weights: list[Tensor]) -> None:
    """Raise ValueError for weights that are complex, not dense in layout, or overlap."""
    spans = []
    for p in weights:
        if p.is_complex():
            raise ValueError(f"weights must be real, got dtype {p.dtype}, shape {tuple(p.shape)}")
        if p.layout is not torch.strided:
            raise ValueError(f"weights must be dense, got layout {p.layout}")
        if p.device.type == "meta":
            raise ValueError(f"weights must have storage, got device meta, shape {tuple(p.shape)}")
        if p.numel() and p.data_ptr() == 0:
            raise ValueError(
                f"weights must be plain tensors with storage of their own, got a "
                f"{type(p.data).__name__} of shape {tuple(p.shape)}"
            )
        if p.is_neg():
            raise ValueError("weights must not be lazily negated views: call resolve_neg()")
        if p.numel():
            last = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
            start = p.data_ptr()
            spans.append((str(p.device), start, start + (last + 1) * p.element_size(), p))
    spans.sort(key=lambda span: span[:2])
    neighbours: list[Tensor] = []
    end = 0
    for i, (device, start, stop, p) in enumerate(spans):
        if i == 0 or device != spans[i - 1][0] or start >= end:
            check_apart(neighbours)
            neighbours, end = [], 0
        neighbours.append(p)
        end = max(end, stop)
    check_apart(neighbours)


def check_apart(weights: list[Tensor]) -> None:
    """Raise ValueError if any byte belongs to two elements of weights whose spans overlap."""
    if not weights or (len(weights) == 1 and is_dense(weights[0])):
        return
    if not all(is_dense(p) for p in weights):
        # Interleaved views may be apart all the same; only their elements' addresses tell.
        addresses = []
        for p in weights:
            offsets = torch.zeros((), dtype=torch.int64)
            for size, stride in zip(p.shape, p.stride(), strict=True):
                offsets = offsets[..., None] + torch.arange(size) * stride
            addresses.append(offsets.flatten() * p.element_size() + p.data_ptr())
        if len(torch.cat(addresses).unique()) == sum(map(len, addresses)):
            return
    shapes = " and ".join(str(tuple(p.shape)) for p in weights[:2])
    raise ValueError(
        f"parameters must not share memory with each other or with themselves, got {shapes}, "
        f"strides {' and '.join(str(p.stride()) for p in weights[:2])}, that do"
    )
