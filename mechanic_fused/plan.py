"""StepPlan: the whole of what one step works on, sorted into buckets; kept between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, distributed, state
from .backends import reference
from .backends.layout import GG, KERNEL_DTYPES, STATES, compute_dtype
from .bucket import Bucket, ParamSlot, delta_dtype, is_dense
from .distributed import Groups, Rows, local, place, shards
from .fused_bases import Base, Group
from .lr_schedule import PEAK
from .param_checks import check_weights
from .tuner import Tuner

PLACE = 16
"""Where a weight's number holds the rank's place among its shards, so that they round apart."""

GENERAL = "general"
"""The kind of a bucket whose update the base optimizer makes itself."""


class Sort(NamedTuple):
    """What the weights of a bucket have in common."""

    kind: str
    device: torch.device
    dtype: torch.dtype
    backend: str
    shards: Groups
    wrapped: bool


class StepPlan:
    """Buckets of the weights that require gradients, by device, dtype, update and sharding.

    Args:
        param_groups: the optimizer's own.
        states: the optimizer's own ``state``; entries that are missing are made.
        base: the base's row of the table of fused updates, or None for the general road.
        backend: the name of a backend, or "auto".
        scale: which weights share a scale: "global", "group" or "parameter".
        narrow_state: keep the base's state in the weight's dtype instead of float32.
        narrow_delta: keep Δ in bfloat16 instead of float32.
        tuner: gets a row for each scale.
        reduce_group: the process group over which plain weights are sharded, or None.

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
        narrow_delta: bool,
        tuner: Tuner,
        reduce_group: Any = None,
    ) -> None:
        weights = [p for group in param_groups for p in group["params"] if p.requires_grad]
        check_weights([local(p) for p in weights])
        self.signature = signature(param_groups, base)
        self.base = base
        self.tuner = tuner
        members = self._sort(param_groups, scale, backend, reduce_group)
        for sort, sorted_members in members.items():
            kind = sort.kind
            kept = sort.dtype if narrow_state else compute_dtype(sort.dtype)
            for i, member in enumerate(sorted_members):
                p = member.parameter
                member.state.update(states.get(p, {}))
                state.ensure(member.state, p, kind, kept, delta_dtype(sort.dtype, narrow_delta))
                # On the general road a weight without a gradient so far keeps its entries here.
                if kind != GENERAL or p in states:
                    states[p].update(member.state)
                    sorted_members[i] = member._replace(state=states[p])
        self.states, self.state_count = states, len(states)
        scales = len(tuner.keys)
        self.buckets = [
            Bucket(
                backends.load(sort.backend),
                sort.kind,
                sorted_members,
                len(param_groups),
                scales,
                sort.shards,
            )
            for sort, sorted_members in members.items()
        ]
        self.groups = {sort.shards: None for sort in members} | (
            {} if reduce_group is None else {(reduce_group,): None}
        )
        # A stage that trains nothing adds zeros, or the others would wait for it.
        self.groups = self.groups or {(): None}
        self.reduce_group = reduce_group
        self.alone = not any(self.groups)
        near = (bucket.backend for bucket in self.buckets if bucket.device == tuner.device)
        name = backends.resolve(backend, tuner.device.type)
        self.tuning = next(near, backends.load(name))
        self.fresh = True
        self.present = False
        self.release: Any = None
        """The hooks that take gradients in the backward pass, if there are any."""

    def _sort(
        self, param_groups: list[Group], scale: str, backend: str, reduce_group: Any
    ) -> dict[Sort, list[ParamSlot]]:
        members: dict[Sort, list[ParamSlot]] = {}
        row = count = 0
        for number, group in enumerate(param_groups):
            kind = GENERAL if self.base is None else self.base.kind(group)
            for p in group["params"]:
                if scale != "global":
                    row = row if scale == "parameter" else number
                if p.requires_grad:
                    name = backends.resolve(backend, p.device.type)
                    # Kernels walk flat storage, which a weight with gaps has not, and know the
                    # four usual dtypes.
                    if not is_dense(local(p)) or p.dtype not in KERNEL_DTYPES:
                        name = "reference"
                    groups = shards(p, reduce_group)
                    sort = Sort(kind, p.device, p.dtype, name, groups, local(p) is not p)
                    own = place(groups) << PLACE | count
                    member = ParamSlot(p, number, row, own, {}, STATES.get(kind, ()))
                    members.setdefault(sort, []).append(member)
                row += scale == "parameter"
                count += 1
        return members

    def fits(self, param_groups: list[Group], base: Base | None, reduce_group: Any) -> bool:
        """Return whether nothing has changed but values, gradients and hyperparameters."""
        return (
            self.signature == signature(param_groups, base)
            and self.reduce_group is reduce_group
            and len(self.states) >= self.state_count
            and not any(bucket.is_stale() for bucket in self.buckets)
        )

    def collect_gradients(self) -> bool:
        """Look at every gradient before anything changes; True if there is any at all."""
        found = any([bucket.collect_gradients(self.fresh) for bucket in self.buckets])
        self.present = found or bool(self.release and self.release.taken)
        return self.present

    def agree(self, found_inf: Tensor | float, extra_groups: Sequence[Any]) -> Tensor:
        """Return found_inf as all ranks see it: torch reduces it over one mesh only."""
        flag = torch.as_tensor(found_inf, dtype=torch.float64, device=self.tuner.device)
        if len(self.groups) == 1 and not extra_groups:
            return flag.to(torch.float32)
        rows = {groups: flag.reshape(1) for groups in self.groups}
        return distributed.reduce(rows, extra_groups).to(torch.float32)

    def rows(self, of: Callable[[Bucket], Tensor], shape: tuple[int, ...]) -> Rows:
        """Return sums of the buckets, added up by what these are sharded over.

        Args:
            of: takes a bucket's sums, of ``shape``.
            shape: also of the zeros that a rank without weights has to give.
        """
        device = self.tuner.device
        found = distributed.merge({bucket.shards: of(bucket).to(device)} for bucket in self.buckets)
        for groups in self.groups.keys() - found.keys():
            found[groups] = torch.zeros(shape, dtype=torch.float64, device=device)
        # In one order on all ranks.
        return {groups: found[groups] for groups in self.groups}

    def inspect(self, started: bool, norms: bool) -> Rows:
        """Return (2,): whether any gradient has an element that is not 0, and N² = Σ g·g.

        Args:
            started: the first answer is known to be yes; otherwise the host reads the device.
            norms: whether N² is wanted, the squared norm of the finite elements.
        """

        def look(bucket: Bucket) -> Tensor:
            informative = started or any(g is not None and bool(g.any()) for g in bucket.grads)
            row = bucket.sums.new_full((2,), float(informative))
            row[1] = 0.0
            if norms:
                bucket.backend.norm(bucket)
                row[1] = bucket.sums[:, GG].sum()
            return row

        return self.rows(look, (2,))

    def capture(self) -> None:
        """Let the run start here: x_ref takes x."""
        for bucket in self.buckets:
            for x_ref, x in zip(bucket.x_ref, bucket.weights, strict=True):
                x_ref.copy_(x)

    @property
    def on_device(self) -> bool:
        """Whether kernels read GradScaler's numbers and a tensor lr themselves, on the device."""
        if self.base is None or self.tuner.device.type == "cpu":
            return False
        return all(
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
            clock = self.tuner.to(bucket.device).counters[0, 0] if bucket.delta_is_bfloat16 else None
            bucket.load(hyper, live_lr, near[0], near[1], step_count=clock)
            bucket.backend.prepare(bucket)

    def reconcile(self, everything: bool = False) -> None:
        """Shift x_ref where weights were written by hand; take x·Δ and x·x anew where needed.

        Args:
            everything: also look where no version counter has moved.
        """
        everything = everything or self.fresh
        for bucket in self.buckets:
            written = bucket.externally_modified()
            if not (written or everything):
                continue
            scale = self.tuner.scale().to(bucket.device)
            for i in range(len(bucket.weights)) if everything else written:
                reference.shift_reference(bucket, i, scale)
            bucket.backend.measure(bucket)
            # Gradient release comes by here again before the weights are written.
            bucket.note_versions()
        self.fresh = False

    def clip(self, squared_norm: Tensor, max_norm: float) -> None:
        """Let ``accumulate`` scale gradients down to ``max_norm`` where their norm is above it."""
        clip = torch.stack([squared_norm, squared_norm.new_full((), max_norm)])
        for bucket in self.buckets:
            bucket.clip = clip.to(bucket.device)

    def accumulate(self) -> None:
        """Take the sums with the old Δ and move Δ on, in every bucket."""
        for bucket in self.buckets:
            bucket.backend.accumulate(bucket)
            if self.release:
                self.release.add(bucket)

    def start_norms(self, param_groups: list[Group]) -> Rows:
        """Return (3,): x·x, d·d and the number of weights, where d = Δ·lr₀/lr after the first step.

        Groups whose lr is 0 do not count.
        """
        ratios = [
            group[PEAK] / lr if (lr := float(group.get("lr", 1.0))) else 0.0
            for group in param_groups
        ]

        def norms(bucket: Bucket) -> Tensor:
            row = bucket.sums.new_zeros(3)
            for i, group in enumerate(bucket.groups):
                if ratios[group]:
                    row[0] += reference.squared_norm(bucket.weights[i])
                    row[1] += reference.squared_norm(bucket.delta[i]) * ratios[group] ** 2
                    row[2] += bucket.sizes[i]
            # A step that took some gradients for 0 is none to go by.
            row[1] += 0.0 * bucket.sums[:, GG].sum()
            return row

        return self.rows(norms, (3,))

    def sums(self, shared: bool) -> Rows:
        """Return (scales, 4), the sums over all buckets.

        Args:
            shared: adds a row that tells whether this rank has any gradient.
        """
        scales = len(self.tuner.keys)
        if not shared:
            return self.rows(lambda bucket: bucket.sums, (scales, 4))

        def with_presence(bucket: Bucket) -> Tensor:
            return torch.cat([bucket.sums, bucket.sums.new_full((1, 4), float(self.present))])

        return self.rows(with_presence, (scales + 1, 4))

    def tune(self, total: Tensor) -> None:
        """Let the tuner learn from the sums over all weights, on its own device.

        Without a gradient on any rank it learns nothing, as a single process that returns early.
        """
        scales = len(self.tuner.keys)
        if len(total) > scales:
            absent = total[scales, 0] == 0
            if not self.on_device:
                if absent:
                    return
            else:
                found = self.tuner.found_inf
                skip = absent.to(torch.float32)
                self.tuner.found_inf = skip if found is None else torch.maximum(skip, found)
        self.tuning.tune(total[:scales], self.tuner)

    def apply(self) -> None:
        """Write the weights; the last bucket first, since its Δ is the likeliest to be in cache."""
        for bucket in reversed(self.buckets):
            bucket.backend.apply(bucket, self.tuner.to(bucket.device))
            bucket.note_versions()

    def finish(self) -> None:
        """Let go of the gradients, or they would outlive the next zero_grad."""
        if self.release:
            self.release.done()
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
