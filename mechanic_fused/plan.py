"""StepPlan: the weights of an optimizer in buckets, and the ops of one step over all buckets."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from . import backends, distributed
from .backends import Backend, muon, quantize, reference
from .backends.layout import (
    COUNT,
    GD,
    GG,
    HALF_DTYPES,
    KERNEL_DTYPES,
    MUON,
    STATES,
    SUMS,
    compute_dtype,
)
from .bucket import Bucket, ParamSlot
from .distributed import (
    Groups,
    Reduction,
    Rows,
    first_element,
    mesh_groups,
    shard_index,
    shards,
)
from .fallback import FALLBACK, Fallback
from .fused_bases import FusedBase, Group
from .kept_blocks import WHOLE, KeptBlocks, keep
from .log_tuner import LogTuner
from .lr_schedule import PEAK, Slip, lr_of
from .offload import PART, HostCopy, Offload
from .options import (
    OPTIM_BITS,
    RUNNING,
    X_REF_EVERY,
    checked_optim_bits,
    checked_x_ref_every,
)
from .param_checks import check_weights, is_dense, is_trained, may_be_given
from .recording import LearnedScale, Recorder
from .scale_rows import KEY, ScaleRows
from .state import ensure_state
from .state_formats import StateFormat, state_format
from .torch_internals import local
from .tuner import Tuner
from .zero_pieces import Span, clear

if TYPE_CHECKING:
    from .gradient_release import GradientRelease

ALL_COLUMNS, GRADIENT_COLUMNS = slice(None), slice(GD, GG + 1, GG - GD)
"""Columns of the sums that a step of the running form takes, and those of ``accumulate``."""

LOSS = slice(1, 3)
"""Columns of the row beside the sums that is reduced with them: the sum and number of losses."""

SAME = slice(3, 6)
"""The others of its columns: 1, S and S² of each rank, by which ranks whose S differ are found."""

SAME_EVERY, SAME_ON_GPU_EVERY = 100, 1000
"""Steps between two looks at them, which reads the device."""

LEAST_DIFFERENCE = 1e-12
"""The variance of the ranks' S in units of the square of its mean, from which on they differ."""

SHARD_BITS = 16
"""Low bits of a weight's number; the shard's index is above them, so that shards round apart."""

PATIENCE = 3
"""Steps without any gradient before a warning."""

IMMUTABLE_TYPES = (float, int, bool, str, type(None), torch.dtype, LearnedScale)
"""Option types whose objects cannot change in place, so that identity implies equal values."""


class Phase(Enum):
    """How far a run has come."""

    FRESH = "no informative step so far"
    PREPARED = "the fallback's base has created its state in a dry run"
    RUNNING = "an informative step has been taken"


class Pending:
    """What is left of a step of the running form: its sums are reduced while the caller goes on.

    Some engines call ``step()`` once for each part of the weights: those are one step, whose sums
    are added up. It ends when a weight is stepped again, or when S is read.
    """

    def __init__(self) -> None:
        self._parts: list[Reduction | Tensor] = []
        self._plans: list[StepPlan] = []

    def add(self, part: Reduction | Tensor, plans: Sequence[StepPlan]) -> None:
        """Take the sums of a part of the step, which may still be reduced.

        Args:
            part: the sums, or their reduction.
            plans: whose tuners wait for them.
        """
        self._parts.append(part)
        self._plans += plans

    def takes(self, weights: Sequence[Tensor]) -> bool:
        """Return whether a step of these weights is another part of this one."""
        in_parts = bool(self._plans) and self._plans[0].given is not None
        return in_parts and bool(weights) and not any(plan.has_any(weights) for plan in self._plans)

    @staticmethod
    def _check_pieces(plans: Sequence[StepPlan]) -> None:
        """Raise ValueError where ranks have stepped pieces of the weights, and none knows of it."""
        given = plans[0].given
        if given is None or not torch.distributed.is_initialized():
            return
        stepped = sum(sum(bucket.sizes) for plan in plans for bucket in plan.buckets)
        if (
            stepped < given
            and torch.distributed.get_world_size() > 1
            and not any(plan.reduces for plan in plans)
        ):
            raise ValueError(
                "pieces of the weights have taken their place, as under ZeRO: expected "
                "reduce_group=torch.distributed.group.WORLD, or the group of ranks that have the "
                f"pieces, got None and {stepped} of {given} elements on this rank, which would "
                "learn a scale of its own"
            )

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for the sums and tune, once.

        Raises:
            ValueError: where ranks have stepped pieces of the weights, and none knows of it.
        """
        parts, plans = self._parts, self._plans
        if not plans:
            return
        self._parts, self._plans = [], []
        self._check_pieces(plans)
        totals = [part if torch.is_tensor(part) else part.wait() for part in parts]
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
        for plan in {id(plan.tuner): plan for plan in plans}.values():
            plan.log_tune(total)
            if plan.given is not None and plan.on_step is not None:
                plan.on_step()


@dataclass
class Run:
    """The state of a run that is in neither param groups nor state; the optimizer's plans share it.

    Attributes:
        phase: None until it has been read from the tuner's counters.
        squared_norm: N² = Σ g·g of the last step, one number, or one per scale.
        pending: the reduction that the last step of the running form has left under way, or None.
        kept_blocks: tells the phase of each weight.
        offload: has the weights' copies on the host, or None.
        idle_steps: how many steps in a row have found no gradient.
        step_number: how many steps this object has seen begin.
        last_part: the plan of the last step, if that may have been a part of one.
        recorder: keeps what the steps come to, or None.
        slip: what the last step has seen of the peak lrs, if that may have been a slip.
        has_slipped: whether one has been taken back.
    """

    phase: Phase | None = None
    squared_norm: Tensor | None = None
    pending: Pending | None = None
    kept_blocks: KeptBlocks = field(default_factory=KeptBlocks)
    offload: Offload | None = None
    idle_steps: int = 0
    step_number: int = 0
    last_part: StepPlan | None = None
    recorder: Recorder | None = None
    slip: Slip | None = None
    has_slipped: bool = False

    def settle(self) -> None:
        """Finish what is under way: steps of released gradients, and the sums of the last step."""
        if self.offload is not None:
            self.offload.drain()
            self.offload.meet()
        if self.pending is not None:
            self.pending.settle()
            self.pending = None

    def note_idle_step(self, weights: int) -> None:
        """Count a step without any gradient; warn at the third in a row."""
        self.idle_steps += 1
        if self.idle_steps == PATIENCE and weights:
            warnings.warn(
                f"step() has found no gradient {PATIENCE} times in a row: expected p.grad of "
                f"some of the {weights} weights in param_groups, got None for each of them (does "
                "the model still hold the weights that the optimizer was given?)",
                stacklevel=2,
            )

    def has_started(self, tuner: ScaleRows) -> bool:
        """Return whether an informative step has been taken; reads the device once in a run."""
        if self.phase is None:
            any_steps = bool(tuner.counters[:, 0].any())
            self.phase = Phase.RUNNING if any_steps else Phase.FRESH
        return self.phase is Phase.RUNNING


@dataclass(frozen=True)
class PlanOptions:
    """Options of an optimizer that decide how its weights are sorted and stored.

    Args:
        backend: the name of a backend, or "auto".
        scale_per: which weights share a scale: "model", "group" or "parameter".
        state_dtype: "param" to keep the base's state in the weights' dtype where ``optim_bits`` is
            32; None: float32.
        delta_dtype: torch.bfloat16 to keep Δ in bfloat16; None: float32. float64 weights keep
            float64.
        reduce_group: the process group over which plain weights are sharded, or None.
        loss_group: the process group over whose ranks observed losses are averaged; None: those of
            the meshes of the weights, and ``reduce_group``.
        is_running: the running form; its state has no Δ.
        bf16_stochastic_round: of the running form: round bfloat16 weights whose state is narrow
            stochastically, instead of keeping their low bits.
        offload: step copies of the weights on the host, where the state is.
    """

    backend: str
    scale_per: str
    state_dtype: str | None = None
    delta_dtype: torch.dtype | None = None
    reduce_group: Any = None
    loss_group: Any = None
    is_running: bool = False
    bf16_stochastic_round: bool = False
    offload: bool = False

    def format_of_state(self, p: Tensor, group: Group, kind: str) -> StateFormat:
        """Return how the base's state of a weight is stored, for an update of a kind."""
        if not STATES.get(kind):
            return StateFormat(compute_dtype(p.dtype))
        bits = group.get(OPTIM_BITS, 32)
        return state_format(p, bits, self.state_dtype, self.reduce_group)

    def has_low_bits(self, weight: torch.dtype, stored: StateFormat) -> bool:
        """Return whether low bits are kept beside a weight of a dtype and its state."""
        is_narrow = stored.dtype is not compute_dtype(weight)
        rounds = self.bf16_stochastic_round and weight is torch.bfloat16 and is_narrow
        return self.is_running and weight in HALF_DTYPES and not rounds

    def format_of_delta(self, p: Tensor, stored: StateFormat) -> StateFormat | None:
        """Return how a weight's Δ is stored, or None in forms without one.

        Where ``optim_bits`` has made the base's state narrow, Δ has 16 bits: codes beside codes.
        """
        wide = compute_dtype(p.dtype)
        if self.is_running:
            return None
        if stored.block:
            return StateFormat(quantize.LINEAR.dtype, stored.block)
        narrow = stored.dtype is not wide and self.state_dtype is None
        given = torch.bfloat16 if narrow else self.delta_dtype
        return StateFormat(given if given and wide is torch.float32 else wide)


class BucketKey(NamedTuple):
    """What the weights of a bucket have in common."""

    kind: str
    device: torch.device
    dtype: torch.dtype
    backend: str
    shards: Groups
    is_sharded: bool
    stands_still: bool
    state: StateFormat
    part: int = 0


class StepPlan:
    """The weights that require gradients, in buckets by device, dtype, update and sharding.

    A plan is kept between steps and rebuilt when weights or groups change. Its methods are the ops
    of a step, in the order in which ``step.py`` calls them.

    Attributes:
        param_groups, max_grad_norm, extra_groups, grad_scale, found_inf: inputs of the next step,
            set by the optimizer.
        release: the hooks that take gradients during the backward pass, or None.
        reduce_device: where sums over ranks are reduced; None: where they are.
        settings_changed: whether an option of a param group may have changed since the last step.
        awaits_calibration: whether s_init is still to be calibrated.
        given: how many elements the optimizer was given, where an engine has put flat pieces in
            their place, so that this may be a part of a step; else None.
        continues: whether this is another part of a step.
        padding: the spans of pieces of ZeRO that are no weights.
        on_step: called after each step that was taken, or None.
        members: all weights of its param groups, also frozen ones.

    Args:
        param_groups: the optimizer's own.
        states: the optimizer's own ``state``; missing entries are created.
        options: how the weights are sorted and stored.
        tuner: has a row for each scale.
        run: the optimizer's own.
        fused: the base's row of the table of fused updates, or None.
        fallback: the base's own step where ``fused`` is None.

    Raises:
        ValueError: for weights that cannot be trained: complex, overlapping or sharing memory, or
            on a device that the backend does not serve.
    """

    def __init__(
        self,
        param_groups: list[Group],
        states: Mapping[Tensor, dict[str, Any]],
        options: PlanOptions,
        tuner: ScaleRows,
        run: Run,
        fused: FusedBase | None,
        fallback: Fallback | None,
    ) -> None:
        self.param_groups, self.states, self.options = param_groups, states, options
        self.tuner, self.run, self.fused, self.fallback = tuner, run, fused, fallback
        reason = fallback.reason if fallback else None
        for group in param_groups:
            checked_optim_bits(group.get(OPTIM_BITS, 32), options.state_dtype, reason)
        self.members = [p for group in param_groups for p in group["params"]]
        self._require_grad = [p.requires_grad for p in self.members]
        self._frozen = [p for p in self.members if not is_trained(p) and may_be_given(p)]
        check_weights([local(p) for p in self.members if is_trained(p)])
        self._structure = _structure(param_groups, fused)
        slots = self._slots()
        self._state_dicts = self._states_of_weights()
        self.buckets = [
            Bucket(
                self._backend_of(key),
                key.kind,
                of_bucket,
                len(param_groups),
                len(tuner.keys),
                key.shards,
            )
            for key, of_bucket in slots.items()
        ]
        self._still = {
            bucket for bucket, key in zip(self.buckets, slots, strict=True) if key.stands_still
        }
        group_sets = {key.shards: None for key in slots}
        if options.reduce_group is not None:
            group_sets[(options.reduce_group,)] = None
        self._loss_groups = self._groups_of_loss()
        # A stage that trains nothing contributes zeros, or the other ranks would wait for it.
        self._group_sets = group_sets or {(): None}
        self.reduces = any(self._group_sets) or (options.is_running and bool(self._loss_groups))
        same_device = (b.backend for b in self.buckets if b.device == tuner.device)
        name = backends.resolve(options.backend, tuner.device.type)
        self._tuner_backend = next(same_device, backends.load(name))
        self.reads_on_device = self._reads_on_device()
        # With offload the sums are on the host, where a group of NCCL alone cannot reduce them.
        devices = [p.device for p in self.members] if options.offload else []
        self.reduce_device = next((d for d in devices if d.type != "cpu"), None)
        self.max_grad_norm: float | None = None
        self.extra_groups: tuple[Any, ...] = ()
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.release: GradientRelease | None = None
        self.on_step: Callable[[], None] | None = None
        self.settings_changed = True
        self.awaits_calibration = False
        self._settings: list[tuple[list[str], list[Any]]] | None = None
        self._hyper_rows: list[list[float]] = []
        self._live_lr: dict[int, Tensor] = {}
        self._first_lr: float | Tensor = 0.0
        self._fresh = True
        self.has_gradients = False
        self.given: int | None = None
        self.continues = False
        self.padding: dict[Tensor, list[Span]] = {}
        self._set: frozenset[Tensor] = frozenset(self.members)

    def has_any(self, weights: Sequence[Tensor]) -> bool:
        """Return whether this plan has any of these weights."""
        return not self._set.isdisjoint(weights)

    def _slots(self) -> dict[BucketKey, list[ParamSlot]]:
        """Return the parameters sorted into buckets, with their state created."""
        kinds = [FALLBACK if not self.fused else self.fused.kind(g) for g in self.param_groups]
        # All keys before any state: an unusable weight must leave the state as it is.
        still = standing_still(self.param_groups)
        keys = [
            self._bucket_key(p, kind, stands, group) if is_trained(p) else None
            for group, kind, stands in zip(self.param_groups, kinds, still, strict=True)
            for p in group["params"]
        ]
        every = []
        for group in self.param_groups:
            share = checked_x_ref_every(group.get(X_REF_EVERY, 1), group["variant"])
            every += [(p, share if is_trained(p) else 1) for p in group["params"]]
        self.run.kept_blocks.reduce_group = self.options.reduce_group
        phases = self.run.kept_blocks.phases(every)
        copies: dict[Tensor, HostCopy] = {}
        if self.run.offload is not None:
            copies = self.run.offload.copies_of(p for p in self.members if is_trained(p))
        slots: dict[BucketKey, list[ParamSlot]] = {}
        offloaded: dict[BucketKey, int] = {}
        count = 0
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                key = keys[count]
                if key is not None:
                    row = {"model": 0, "group": number, "parameter": count}[self.options.scale_per]
                    names = STATES.get(key.kind, ())
                    phase, copy = phases[count], copies.get(p)
                    state = self._state_of(p, copy.x if copy else p, key, phase)
                    own_number, element = self._place_of(p, key, count)
                    block = key.state.block
                    slot = ParamSlot(
                        p, number, row, own_number, state, names, phase, element, block, copy
                    )
                    if copy:
                        key = _part_of(key, p, offloaded)
                    slots.setdefault(key, []).append(slot)
                count += 1
        return slots

    def _place_of(self, p: Tensor, key: BucketKey, number: int) -> tuple[int, int]:
        """Return the number and the first element by which random bits are drawn for a weight.

        They are those of the whole weight where a shard is one range of it; other shards have a
        number of their own.
        """
        if not key.shards:
            return number, 0
        first = first_element(p) if key.is_sharded else None
        if first is None:
            return shard_index(key.shards) << SHARD_BITS | number, 0
        return number, first

    def _groups_of_loss(self) -> Groups:
        """Return the process groups over whose ranks observed losses are averaged."""
        options = self.options
        if options.loss_group is not None:
            return (options.loss_group,)
        groups = {} if options.reduce_group is None else {options.reduce_group: None}
        for p in self.members:
            groups.update(dict.fromkeys(mesh_groups(p)))
        return tuple(groups)

    def _bucket_key(self, p: Tensor, kind: str, stands_still: bool, group: Group) -> BucketKey:
        stepped_on = "cpu" if self.options.offload else p.device.type
        name = backends.resolve(self.options.backend, stepped_on)
        # Kernels read flat storage, which a weight with gaps has not, and know four dtypes.
        if not is_dense(local(p)) or p.dtype not in KERNEL_DTYPES:
            name = "reference"
        groups = shards(p, self.options.reduce_group)
        is_sharded = local(p) is not p
        if kind == MUON and self.options.offload:
            raise ValueError(
                "offload=True steps on the CPU, where products of matrices take seconds: expected "
                "False for Muon"
            )
        if kind == MUON and groups and not is_sharded:
            raise ValueError(
                "Muon needs to know the rows of a matrix: expected DTensors (fully_shard) or whole "
                "weights in groups with use_muon=True, got reduce_group, whose plain shards "
                "(FSDP1, ZeRO) do not tell theirs"
            )
        stored = self.options.format_of_state(p, group, kind)
        return BucketKey(kind, p.device, p.dtype, name, groups, is_sharded, stands_still, stored)

    def _backend_of(self, key: BucketKey) -> Backend:
        found = backends.load(key.backend)
        if key.kind != MUON:
            return found
        plan = weakref.ref(self)  # which holds the bucket that holds this
        return muon.Muon(found, lambda: cast(StepPlan, plan()).param_groups)

    def _state_of(self, p: Tensor, x: Tensor, key: BucketKey, phase: int) -> dict[str, Any]:
        """Return the entries of the state of weight p, the missing ones created as x is laid out.

        Args:
            x: p, or its copy on the host.
        """
        kind, state = key.kind, dict(self.states.get(p, {}))
        options = self.options
        delta, low = options.format_of_delta(p, key.state), options.has_low_bits(p.dtype, key.state)
        own = self.fallback is not None and self.fallback.chooses_dtypes
        ensure_state(state, x, kind, key.state, delta, low, phase, own)
        # The fallback's base takes any entry for a state that it has created itself, so a weight
        # that has had no gradient so far keeps x_ref and Δ here.
        if kind == FALLBACK and p not in self.states:
            return state
        entries = self.states[p]
        entries.update(state)
        for name in entries.keys() - state.keys():
            del entries[name]
        return entries

    def _reads_on_device(self) -> bool:
        """Return whether kernels read GradScaler's numbers and a tensor lr on the device."""
        if self.fused is None or self.tuner.device.type == "cpu":
            return False
        return all(
            bucket.backend is not reference and bucket.device.type != "cpu" and bucket.kind != MUON
            for bucket in self.buckets
        )

    def is_current(self, param_groups: list[Group], reduce_group: Any) -> bool:
        """Return whether nothing but gradients and values has changed since the last step.

        The options of the groups count as unchanged if they are the same immutable objects.
        """
        settings = self._settings
        self.settings_changed = settings is None or not (
            len(param_groups) == len(settings)
            and all(
                list(group) == names and all(map(is_, group.values(), values))
                for group, (names, values) in zip(param_groups, settings, strict=True)
            )
        )
        if self.settings_changed:
            # Dropped here and not where they are read: this step may not be taken.
            self._hyper_rows = []
            return False
        return self._has_same_weights(param_groups, reduce_group)

    def fits(self, param_groups: list[Group], fused: FusedBase | None, reduce_group: Any) -> bool:
        """Return whether nothing but gradients, values and options of groups has changed."""
        return self._structure == _structure(param_groups, fused) and self._has_same_weights(
            param_groups, reduce_group
        )

    def _has_same_weights(self, param_groups: list[Group], reduce_group: Any) -> bool:
        members = [p for group in param_groups for p in group["params"]]
        return (
            len(members) == len(self.members)
            and all(map(is_, members, self.members))
            and [p.requires_grad for p in members] == self._require_grad
            and all([p.grad is None for p in self._frozen])
            and self.options.reduce_group is reduce_group
            and self._has_same_states()
            and not any([bucket.is_stale() for bucket in self.buckets])
        )

    def _states_of_weights(self) -> list[dict[str, Any]]:
        """Return the state of each weight; the fallback's base may have entries of its own."""
        if self.fused is not None:
            return list(self.states.values())
        return [state for key, state in self.states.items() if torch.is_tensor(key)]

    def _has_same_states(self) -> bool:
        now, noted = self._states_of_weights(), self._state_dicts
        return len(now) >= len(noted) and all(map(is_, now, noted))

    def note_states(self) -> None:
        """Note which dicts hold the weights' state: the fallback's base makes and replaces some."""
        self._state_dicts = self._states_of_weights()
        for bucket in self.buckets:
            bucket.note_states(self.states)

    def note_settings(self) -> None:
        """Note the options of the param groups, by which :meth:`is_current` compares."""
        self._settings = None
        noted = []
        for group in self.param_groups:
            for name, value in group.items():
                if name not in ("params", "param_names", KEY) and not _is_constant(value):
                    return
            noted.append((list(group), list(group.values())))
        self._settings = noted

    def has_started(self) -> bool:
        """Return whether an informative step has been taken."""
        return self.run.has_started(self.tuner)

    def collect_gradients(self) -> None:
        """Take every gradient in its weight's layout; all errors are raised here.

        Raises:
            ValueError: for a gradient that cannot be used.
            RuntimeError: where gradients are released and something has changed since.
        """
        for p, spans in self.padding.items():
            clear(p.grad, spans)
        if self.release is not None:
            self.release.check(self, has_grad_scaler=self.found_inf is not None)
        found = any([bucket.collect_gradients() for bucket in self.buckets])
        for bucket in self.buckets if self.options.offload else ():
            bucket.fetch_gradients()
        self.has_gradients = found or bool(self.release and self.release.taken)

    def load(self, shared: bool) -> bool:
        """Write the tables of this step; return whether the step is to be taken.

        The step is skipped if there is no gradient, or if the host sees that GradScaler found an
        overflow.

        Args:
            shared: whether other ranks or optimizers contribute to the sums, so that this plan
                takes part without a gradient too.
        """
        if not (self.has_gradients or shared):
            self.run.note_idle_step(len(self.members))
            return False
        self.run.idle_steps = 0
        found_inf = self.found_inf
        if shared and found_inf is not None:
            found_inf = self._reduce_found_inf(found_inf)
        if not self.reads_on_device and bool(found_inf):
            return False
        self.write_tables(self.grad_scale, found_inf)
        return True

    def _reduce_found_inf(self, found_inf: Tensor | float) -> Tensor:
        """Return found_inf summed over all ranks: torch reduces it over one mesh only."""
        flag = torch.as_tensor(found_inf).to(self.tuner.device).to(torch.float64)
        if len(self._group_sets) == 1 and not self.extra_groups:
            return flag.to(torch.float32)
        rows = {groups: flag.reshape(1) for groups in self._group_sets}
        reduced = distributed.all_reduce([rows], self.extra_groups, self.reduce_device)
        return reduced.to(torch.float32)

    def write_tables(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Write addresses and hyperparameters to where the kernels read them.

        Args:
            grad_scale: the factor by which GradScaler has multiplied the gradients, or None.
            found_inf: not 0 if this step is to be skipped, or None.
        """
        on_device = self.reads_on_device
        if self.run.recorder is not None:  # before a scheduler moves it
            lr = lr_of(self.param_groups[0])
            if torch.is_tensor(lr):
                lr = lr.detach().to(self.tuner.device, copy=True)
            self._first_lr = lr
        if grad_scale is not None or not self._hyper_rows:
            self._read_hyper(grad_scale)
        scalars = (grad_scale, found_inf) if on_device else (None, None)
        self.tuner.found_inf = scalars[1]
        for bucket in self.buckets:
            near = [t if t is None else t.to(bucket.device, non_blocking=True) for t in scalars]
            step_count = None
            if bucket.rounds_by_random_bits:
                step_count = self.tuner.to(bucket.numbers_device).counters[0, 0]
            bucket.write_tables(self._hyper_rows, self._live_lr, near[0], near[1], step_count)
            if bucket.handle is None or bucket.backend.COPIES_TABLES:
                bucket.backend.prepare(bucket)
        if grad_scale is not None:
            # The rows hold this step's loss scale.
            self._hyper_rows = []

    def _read_hyper(self, grad_scale: Tensor | None) -> None:
        """Read the groups' hyperparameters into rows of ``layout.HYPER``."""
        unscale = 1.0 if grad_scale is None or self.reads_on_device else 1.0 / float(grad_scale)
        self._hyper_rows, self._live_lr = [], {}
        for number, group in enumerate(self.param_groups):
            lr: Any = lr_of(group)
            rest: Any = (0.0,) * 6
            if self.fused is not None:
                lr, *rest = self.fused.hyper(group)
            if self.reads_on_device and torch.is_tensor(lr) and lr.device.type != "cpu":
                self._live_lr[number], lr = lr, 0.0
            sign = -unscale if group.get("maximize") else unscale
            peak = float(group.get(PEAK, lr))
            self._hyper_rows.append([float(lr), *map(float, rest), sign, peak])

    def gradient_norms(self, started: bool) -> Rows:
        """Return (2,): whether any gradient element is not 0, and N² = Σ g·g of finite elements.

        Args:
            started: the first answer is known to be yes; otherwise the host reads the device.
        """

        def norms(bucket: Bucket) -> Tensor:
            if bucket.copies:
                bucket.wait_for_gradients()
            informative = started or any(g is not None and bool(g.any()) for g in bucket.grads)
            row = bucket.sums.new_full((2,), float(informative))
            row[1] = 0.0
            if self.max_grad_norm is not None:
                bucket.backend.norm(bucket)
                row[1] = bucket.sums[:, GG].sum()
            return row

        return self._rows(norms, (2,))

    def _rows(self, of: Callable[[Bucket], Tensor], shape: tuple[int, ...]) -> Rows:
        """Return sums of the buckets, added up by what shards them.

        Args:
            of: bucket → its sums, of ``shape``.
            shape: also the shape of the zeros contributed by a rank that owns no weights.
        """
        device = self.tuner.device
        # Copied before they are widened, since a device may have no float64.
        if len(self.buckets) == 1 == len(self._group_sets):
            return {self.buckets[0].shards: of(self.buckets[0]).to(device).to(torch.float64)}
        found = distributed.merge(
            {bucket.shards: of(bucket).to(device).to(torch.float64)} for bucket in self.buckets
        )
        for groups in self._group_sets.keys() - found.keys():
            found[groups] = torch.zeros(shape, dtype=torch.float64, device=device)
        # The same order on all ranks.
        return {groups: found[groups] for groups in self._group_sets}

    def start(self) -> None:
        """Begin the run at this step: x_ref takes the weights."""
        if self.run.phase is Phase.PREPARED:
            self.states.clear()  # type: ignore[attr-defined]
        if self.run.offload is not None:
            self.run.offload.read()
        for bucket in self.buckets:
            for x_ref, x, phase in zip(bucket.x_ref, bucket.weights, bucket.phases, strict=True):
                x_ref.copy_(x if phase == WHOLE else keep(x, x, phase))
        self.run.phase = Phase.RUNNING

    def dry_run(self) -> None:
        """Let the fallback's base create its state, as the fused path has done already.

        Checkpoint loaders look for the entries that they are to fill. What the base has created is
        dropped at the first informative step, unless a checkpoint has replaced it.
        """
        if self.fallback is not None and not self.states:
            self.write_tables(None, None)
            self.fallback.dry_run(self.buckets)
            self.run.phase = Phase.PREPARED

    def clip(self, squared_norm: Tensor, max_norm: float) -> None:
        """Let the step scale the gradients down where their norm exceeds ``max_norm``."""
        clip = torch.stack([squared_norm, squared_norm.new_full((), max_norm)])
        for bucket in self.buckets:
            bucket.clip = clip.to(bucket.numbers_device)
        self.run.squared_norm = squared_norm

    def reconcile(self, everything: bool = False) -> None:
        """Shift x_ref where others have written to weights, and measure x·Δ and x·x there.

        Args:
            everything: also check weights whose version counter has not moved.
        """
        everything = everything or self._fresh
        for bucket in self.buckets:
            if not (bucket.modified or everything):
                continue
            scale = self.tuner.scale().to(bucket.numbers_device)
            for i in range(len(bucket.weights)) if everything else bucket.modified:
                reference.shift_reference(bucket, i, scale)
            bucket.backend.measure(bucket)
            bucket.modified = []
            # Gradient release reconciles once more before the weights are written.
            bucket.note_versions()
        self._fresh = False

    def accumulate(self, shared: bool) -> Rows:
        """Take the sums with the old Δ, and move the base's state and Δ by one update u.

        Args:
            shared: add a row that tells whether this plan has any gradient.

        Returns:
            {process groups: (scales, 6) float64}, of this rank.
        """
        if self.fallback is not None:
            self.fallback.accumulate(self.buckets)
            self.note_states()
        else:
            for bucket in self.buckets:
                bucket.backend.accumulate(bucket)
                if self.release:
                    self.release.add_sums(bucket, GRADIENT_COLUMNS)
        scales = len(self.tuner.keys)
        if not shared:
            return self._rows(lambda bucket: bucket.sums, (scales, len(SUMS)))

        def with_presence(bucket: Bucket) -> Tensor:
            present = bucket.sums.new_full((1, len(SUMS)), float(self.has_gradients))
            return torch.cat([bucket.sums, present])

        return self._rows(with_presence, (scales + 1, len(SUMS)))

    def step(self) -> None:
        """Take the sums of the running form; move the base's state and the weights: x += S·u."""
        if self.fallback is not None:
            self.fallback.step(self.buckets, self._log_tuner)
            self.note_states()
            return
        for bucket in self.buckets:
            self.step_bucket(bucket)
            if self.release:
                self.release.add_sums(bucket, ALL_COLUMNS)

    def step_bucket(self, bucket: Bucket) -> None:
        """Take the step of one bucket, with the S that is known."""
        tuner, device = self._log_tuner, bucket.numbers_device
        near = tuner if device == tuner.device else tuner.to(device)
        if not bucket.copies:
            bucket.backend.step(bucket, near)
            return
        bucket.wait_for_gradients()
        bucket.backend.step(bucket, near)
        bucket.send_weights()

    def sums(self) -> Tensor:
        """Return the sums of the last step, (scales, 6), where nothing has to be reduced."""
        return next(iter(self._rows(self._counted, (len(self.tuner.keys), len(SUMS))).values()))

    def _counted(self, bucket: Bucket) -> Tensor:
        """Return the sums from which S learns: 0 for weights that S does not move."""
        if bucket in self._still:
            return torch.zeros_like(bucket.sums)
        if not bucket.padding:
            return bucket.sums
        sums = bucket.sums.clone()
        for g, row, padding in zip(bucket.grads, bucket.rows, bucket.padding, strict=True):
            sums[row, COUNT] -= 0 if g is None else padding
        return sums

    def rows_to_reduce(self) -> Rows:
        """Return the sums of the last step with a row for what ranks may disagree about.

        The row: whether this rank has a gradient, the sum and the number of its losses, which are
        forgotten here, and 1, S and S².
        """
        tuner = self._log_tuner
        shape = (len(tuner.keys) + 1, len(SUMS))
        own = self._own_scale() if self._compares() else None

        def with_presence(bucket: Bucket) -> Tensor:
            numbers = tuner.state.new_full((1, len(SUMS)), float(self.has_gradients))
            present = numbers.to(bucket.numbers_device)
            present[:, LOSS] = 0.0
            if own is not None:
                present[:, SAME] = own
            return torch.cat([self._counted(bucket).to(present.device).double(), present])

        rows = self._rows(with_presence, shape)
        losses = tuner.losses.new_zeros(shape)
        losses[-1, LOSS] = tuner.losses
        if own is not None and self.options.loss_group is None:
            # All ranks of the weights' meshes; those that a user names may learn for themselves.
            losses[-1, SAME] = own
        self.forget_losses()
        return distributed.merge([rows, {self._loss_groups: losses}])

    def rescale(self, factor: float) -> None:
        """Multiply the S of the running form where the lr has risen above its known peak."""
        if isinstance(self.tuner, LogTuner):
            self.tuner.rescale(factor)

    def log_tune(self, total: Tensor) -> None:
        """Move ln S by the sums over all weights of all ranks.

        If no rank has a gradient, nothing is tuned, as in a single process.
        """
        tuner, scales = self._log_tuner, len(self.tuner.keys)
        if self.max_grad_norm is None:
            self.run.squared_norm = total[:scales, GG]
        if self.given is not None and scales == 1:
            # Pieces are padded with elements that are no weights.
            total[0, COUNT].clamp_(max=self.given)
        if len(total) > scales:
            if self._compares():
                self._check_same(total[scales, SAME])
            if self._skips(total[scales, 0] == 0):
                return
            tuner.losses.copy_(total[scales, LOSS])
        self._note(total[:scales])
        self._tuner_backend.log_tune(total[:scales], tuner)

    def _compares(self) -> bool:
        """Return whether ranks compare their S after this step: once in some, it reads a device."""
        on_cpu = self.tuner.device.type == "cpu"
        return self.run.step_number % (SAME_EVERY if on_cpu else SAME_ON_GPU_EVERY) == 0

    def _own_scale(self) -> Tensor:
        """Return 1, S and S²."""
        scale = self.tuner.scale().sum()
        return torch.stack([torch.ones_like(scale), scale, scale * scale])

    def _check_same(self, of_ranks: Tensor) -> None:
        """Raise RuntimeError where ranks have another S.

        Args:
            of_ranks: the sums over the ranks of 1, S and S².
        """
        count, total, squares = of_ranks.tolist()
        mean = total / count
        if squares / count - mean * mean > LEAST_DIFFERENCE * mean * mean:
            raise RuntimeError(
                "the ranks must have one S, got a mean of "
                f"{mean:.6g} and {float(self.tuner.scale().sum()):.6g} on this rank: one of them "
                "has loaded another checkpoint, or has been reset"
            )

    def _note(self, total: Tensor) -> None:
        """Record a step that is about to move the tuner."""
        if self.run.recorder is not None:
            self.run.recorder.note(total, self.tuner, self._first_lr)

    def forget_losses(self) -> None:
        """Drop the losses that were observed for a step that is not taken."""
        if isinstance(self.tuner, LogTuner):
            self.tuner.losses.zero_()

    @property
    def _log_tuner(self) -> LogTuner:
        assert isinstance(self.tuner, LogTuner)
        return self.tuner

    @property
    def _exact_tuner(self) -> Tuner:
        assert isinstance(self.tuner, Tuner)
        return self.tuner

    def _skips(self, absent: Tensor) -> bool:
        """Return whether nothing is to be tuned; where kernels read scalars, they are told."""
        if not self.reads_on_device:
            return bool(absent)
        found, skip = self.tuner.found_inf, absent.to(torch.float32)
        self.tuner.found_inf = skip if found is None else torch.maximum(skip, found)
        return False

    def calibration_norms(self) -> Rows:
        """Return (3,): x·x, d·d and the number of weights after the first update.

        d = Δ·lr₀/lr is the base's first update at the peak lr. Groups whose lr is 0 do not count.
        """
        to_peak = [
            group[PEAK] / lr if (lr := float(lr_of(group))) else 0.0 for group in self.param_groups
        ]

        def norms(bucket: Bucket) -> Tensor:
            row = bucket.sums.new_zeros(3)
            for i, group in enumerate(bucket.groups):
                if to_peak[group]:
                    row[0] += reference.squared_norm(bucket.weights[i])
                    delta = reference.read_delta(bucket, i)
                    row[1] += reference.squared_norm(delta) * to_peak[group] ** 2
                    row[2] += bucket.sizes[i]
            # NaN, which skips the calibration, if any gradient was not finite.
            row[1] += 0.0 * bucket.sums[:, GG].sum()
            return row

        return self._rows(norms, (3,))

    def start_at_s_init(self, factor: float | Tensor) -> None:
        """Take the s_init that has just been calibrated.

        Args:
            factor: lr/(peak lr).
        """
        self._exact_tuner.set_options(self.param_groups[0])
        self._exact_tuner.start_at_s_init()
        self._exact_tuner.set_annealing_factor(factor)

    def tune(self, total: Tensor) -> None:
        """Update s, r, v, m from the sums over all weights of all ranks.

        If no rank has a gradient, nothing is tuned, as in a single process.
        """
        scales = len(self.tuner.keys)
        if self.max_grad_norm is None:
            self.run.squared_norm = total[:scales, GG]
        if len(total) > scales and self._skips(total[scales, 0] == 0):
            return
        self._note(total[:scales])
        self._tuner_backend.tune(total[:scales], self._exact_tuner)

    def apply(self) -> None:
        """Write the weights, the last bucket first: its Δ is the likeliest to be in the cache."""
        for bucket in reversed(self.buckets):
            tuner = self._exact_tuner.to(bucket.numbers_device)
            bucket.backend.apply(bucket, tuner)
            bucket.note_versions()

    def finish(self) -> None:
        """Drop the gradients, which would otherwise outlive the next zero_grad."""
        if self.run.offload is not None:
            self.run.offload.meet()
        if self.release:
            self.release.end_step()
        for bucket in self.buckets:
            bucket.grads = [None] * len(bucket.weights)


def create_state_of_fakes(
    param_groups: Sequence[Group],
    states: Mapping[Tensor, dict[str, Any]],
    options: PlanOptions,
    fused: FusedBase | None,
) -> None:
    """Create the state that weights of FakeTensorMode would have: its size is all that they tell.

    Args:
        param_groups, states: the optimizer's own; missing entries are created, and those of a
            fallback's base are there.
        options: how the weights are stored.
        fused: the base's row of the table of fused updates, or None.
    """
    blocks = KeptBlocks(options.reduce_group)
    for group in param_groups:
        kind = fused.kind(group) if fused else FALLBACK
        share = checked_x_ref_every(group.get(X_REF_EVERY, 1), group["variant"])
        for p in filter(is_trained, group["params"]):
            if not fused and p.grad is None:
                continue  # the base takes any entry for a state that it has made itself
            stored = options.format_of_state(p, group, kind)
            delta, [phase] = options.format_of_delta(p, stored), blocks.phases([(p, share)])
            low = options.has_low_bits(p.dtype, stored)
            x = torch.empty_like(p, device="cpu") if options.offload else p
            ensure_state(states[p], x, kind, stored, delta, low, phase)


def _structure(param_groups: Sequence[Group], fused: FusedBase | None) -> list[Any]:
    """Return what a plan depends on beside its members: the base, and some options of groups."""
    kinds = [] if fused is None else [fused.kind(group) for group in param_groups]
    sizes = [
        (len(group["params"]), group.get(X_REF_EVERY, 1), group.get(OPTIM_BITS, 32))
        for group in param_groups
    ]
    return [id(fused), sizes, kinds, standing_still(param_groups)]


def standing_still(param_groups: Sequence[Group]) -> list[bool]:
    """Return which groups S does not move: in the running form those with lr = 0 beside others.

    S is for the others, so the norms and gradients of these say nothing about it. An lr on a GPU is
    not read.
    """
    lrs = [lr_of(group) for group in param_groups]
    zero = [not (torch.is_tensor(lr) and lr.device.type != "cpu") and float(lr) == 0 for lr in lrs]
    running = all(group["variant"] == RUNNING for group in param_groups)
    return [running and each and not all(zero) for each in zero]


def _part_of(key: BucketKey, p: Tensor, offloaded: dict[BucketKey, int]) -> BucketKey:
    """Return the key of the part of a bucket that a weight is in: one is copied beside the next.

    Args:
        offloaded: key → bytes of weights so far; changed in place.
    """
    before = offloaded.get(key, 0)
    offloaded[key] = before + p.numel() * p.element_size()
    return key._replace(part=before // PART)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(each, IMMUTABLE_TYPES) for each in value)
    return isinstance(value, IMMUTABLE_TYPES)
