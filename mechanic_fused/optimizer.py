"""Mechanized: a torch optimizer around a base optimizer, with a learned scale of its updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from . import backends, state
from .backends.layout import REFERENCE_EVERY, device_of_numbers
from .base_code import OF_BASE, base_code, base_constructor
from .checkpoint_checks import check_entries, check_scales, check_tuner_states
from .fallback import Fallback
from .fused_bases import TABLE, fallback_reason
from .gradient_release import GradientRelease, check_releasable
from .kept_blocks import keep
from .log_tuner import LogTuner, in_running_form
from .loss import LossWatcher, check_loss_groups, observed
from .lr_schedule import PEAK, annealing_factor, lr_of, track_peak_lr
from .offload import Offload, check_offloaded, checked_offload
from .options import (
    AUTO,
    CALIBRATED,
    DELTA_DTYPES,
    OPTIM_BITS,
    RUNNING,
    SCALE_PER,
    STATE_DTYPES,
    USER_OPTIONS,
    X_REF_EVERY,
    accepts_old_names,
    checked_optim_bits,
    checked_stochastic_round,
    checked_x_ref_every,
    max_norm,
    one_of,
    options_of_groups,
    resolve_variant,
    tuner_options,
    warn_renamed,
    with_new_group_keys,
    with_own_optim_bits,
    with_own_x_ref_every,
)
from .plan import Phase, PlanOptions, Run, StepPlan, create_state_of_fakes
from .recording import Recorder, Recording, drawn
from .scale_rows import KEY, ScaleRows, scale_keys
from .state_formats import state_format
from .step import take_step
from .torch_internals import (
    SupportsGradScaler,
    in_fake_mode,
    is_fake,
    is_fsdp1_flat,
    local,
    mute_capturable_warning,
    unhooked_step,
)
from .tuner import Tuner
from .zero_pieces import LOST_REFERENCE, are_pieces, clear, elements_of, padding_of_pieces

DEFAULTS: dict[str, Any] = {
    "s_decay": None,
    "tuner_betas": None,
    "s_init": None,
    "tuner_eps": None,
    "variant": None,
    "scale_per": "model",
    "backend": "auto",
    "log_func": None,
    "log_every": 0,
}
"""The options of a class made by mechanize(Base), unless its caller says otherwise."""


class Mechanized(SupportsGradScaler, Optimizer):
    """What :func:`mechanic_fused.mechanize` puts in front of a base: x += S·u.

    Do not instantiate this class: use a subclass, which names its base.
    """

    _base: type[Optimizer]
    _class_options: dict[str, Any] = DEFAULTS
    _plan: StepPlan | None
    _tuner: ScaleRows | None

    @accepts_old_names
    def __init__(
        self,
        params: Iterable[Any],
        *args: Any,
        s_decay: float | None = None,
        tuner_betas: Sequence[float] | None = None,
        s_init: float | str | None = None,
        tuner_eps: float | None = None,
        variant: str | None = None,
        scale_per: str | None = None,
        backend: str | None = None,
        optim_bits: int = 32,
        state_dtype: str | None = None,
        delta_dtype: torch.dtype | None = None,
        x_ref_every: int = 1,
        bf16_stochastic_round: bool = False,
        offload: bool = False,
        max_grad_norm: float | None = None,
        reduce_group: Any = None,
        loss_group: Any = None,
        extra_groups: Sequence[Any] = (),
        base_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(self, "_base"):
            raise TypeError("Mechanized has no base of its own: use mechanize(Base)")
        given = {
            "s_decay": s_decay,
            "tuner_betas": tuner_betas,
            "s_init": s_init,
            "tuner_eps": tuner_eps,
            "variant": variant,
            "scale_per": scale_per,
            "backend": backend,
        }
        params = params if torch.is_tensor(params) else list(params)  # or torch's error below
        chosen = {
            **self._class_options,
            **options_of_groups(params),
            **{k: v for k, v in given.items() if v is not None},
        }
        exact = (chosen["s_decay"], chosen["tuner_betas"], chosen["tuner_eps"], delta_dtype)
        chosen["variant"] = resolve_variant(chosen["variant"], *exact)
        self._tuner_options = tuner_options(**{k: chosen[k] for k in USER_OPTIONS})
        self._scale_per = one_of("scale_per", chosen["scale_per"], SCALE_PER)
        self._backend = chosen["backend"]
        backends.check(self._backend)
        self._state_dtype = one_of("state_dtype", state_dtype, STATE_DTYPES)
        self._delta_dtype = one_of("delta_dtype", delta_dtype, DELTA_DTYPES)
        self._optim_bits = checked_optim_bits(optim_bits, state_dtype, None)
        self._x_ref_every = checked_x_ref_every(x_ref_every, chosen["variant"])
        self._bf16_stochastic_round = checked_stochastic_round(
            bf16_stochastic_round, chosen["variant"], self._optim_bits
        )
        self._offload = checked_offload(offload, chosen["variant"], self._backend)
        self.max_grad_norm = max_norm(max_grad_norm)
        if delta_dtype is not None and chosen["variant"] == RUNNING:
            raise ValueError(
                "delta_dtype must be None with variant='running', which keeps no Δ, "
                f"got {delta_dtype}"
            )
        self.reduce_group, self.loss_group = reduce_group, loss_group
        self.extra_groups = tuple(extra_groups)
        self._lost_groups = self._warned = False
        self._given: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._release: GradientRelease | None = None
        self._run = self._new_run()
        self._drop_derived()
        with base_constructor(self, Mechanized):
            base: Any = super()  # mypy takes it for Optimizer itself
            base.__init__(params, *args, **options, **(base_options or {}))
        taken = sorted(self.defaults.keys() & self._tuner_options.keys())
        if taken:
            raise TypeError(
                f"the base must leave the entries {taken} of param groups to Mechanic, got "
                f"{self._base.__name__}, which has defaults of these names"
            )
        # The tuner's state is in param_groups from the start: loaders look for it there.
        self._current_tuner()

    @torch.compiler.disable
    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """Take one step: x += S·u, then S moves; or one of the exact form that was chosen.

        Until the first step with a gradient element that is not 0, only state is created. Where
        weights are sharded, every rank must call it.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` returns; it is
                observed, see :meth:`observe`.
            loss: the loss whose gradients these are, to be observed.

        Raises:
            ValueError: for gradients, weights or a loss that cannot be used; nothing has changed
                then.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        if self._plan is None and self._has_fakes():
            self._step_fakes()
            return returned
        if in_fake_mode():
            raise RuntimeError(
                "a step under FakeTensorMode only makes state, expected weights that were made "
                "under it as well, got real ones"
            )
        plan = self.plan_step()
        if loss is not None:
            self.observe(loss)
        elif returned is not None:
            self._observe_closure(returned)
        take_step([plan])
        return returned

    @torch.compiler.disable
    @torch.no_grad()
    def observe(self, loss: Tensor | float) -> None:
        """Take a loss of the next step, from which S is estimated: S·‖g‖·‖u‖ = loss/13.

        For training loops that cannot pass it to :meth:`step`. Losses observed between two steps
        are averaged, as in gradient accumulation; so are those of the ranks. A loss that is not
        above 0, or not finite, says nothing. Once S learns, after the warm-up and ten steps at
        least, none is needed. The exact forms do without.

        Args:
            loss: one number; a tensor stays on its device and is not read, but with ``offload``.

        Raises:
            ValueError: for more than one number, or losses of several ranks where nothing tells
                over which of them to average.

        Example:
            >>> from mechanic_fused import MechanicSGD
            >>> weight = torch.nn.Parameter(torch.ones(3))
            >>> opt = MechanicSGD([weight], lr=1.0)
            >>> loss = (weight**2).sum()
            >>> loss.backward()
            >>> opt.observe(loss)
            >>> opt.step()
        """
        number = observed(loss)
        tuner = self._current_tuner()
        if not isinstance(tuner, LogTuner):
            return
        check_loss_groups(self.param_groups, self.reduce_group, self.loss_group)
        tuner.observe(number)

    def _observe_closure(self, loss: Any) -> None:
        """Observe what a closure has returned, where it is known over which ranks to average."""
        if not self._is_running:
            return
        try:
            self.observe(loss)
        except ValueError as error:
            # 0.1 did not look at what a closure returns.
            if not self._warned:
                self._warned = True
                warnings.warn(f"the closure's loss is not observed: {error}", stacklevel=3)

    def watch(self, model: torch.nn.Module) -> RemovableHandle:
        """Observe the ``loss`` of what a model returns while it trains, as transformers' models do.

        Args:
            model: its outputs have an attribute or an entry ``loss``, or are left alone.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        return model.register_forward_hook(LossWatcher(self.observe, model))

    @torch.no_grad()
    def plan_step(self) -> StepPlan:
        """Return the plan of the next step, rebuilt if weights or groups have changed.

        Raises:
            ValueError: for weights that cannot be trained.
            RuntimeError: for a copy whose process groups have not been set again.
        """
        continues = False
        if self._parts:  # an engine steps pieces of the weights
            pending = self._run.pending
            members = [p for group in self.param_groups for p in group["params"]]
            continues = pending is not None and pending.takes(members)
            self._plan = self._parts.get(tuple(map(id, members)), self._plan)
        plan = self._plan
        if (
            plan is None
            or plan.states is not self.state
            or not plan.is_current(self.param_groups, self.reduce_group)
        ):
            plan = self._fitting_plan(continues)
        plan.continues = continues
        plan.param_groups = self.param_groups
        plan.max_grad_norm, plan.extra_groups = self.max_grad_norm, self.extra_groups
        # GradScaler sets these for the duration of a step.
        plan.grad_scale = getattr(self, "grad_scale", None)
        plan.found_inf = getattr(self, "found_inf", None)
        plan.release = self._release
        return plan

    def _new_run(self) -> Run:
        return Run(offload=Offload() if self._offload else None)

    def _check_process_groups(self) -> None:
        groups = (self.reduce_group, self.loss_group, *self.extra_groups)
        if self._lost_groups and all(group is None for group in groups):
            raise RuntimeError(
                "process groups cannot be copied or pickled: set reduce_group, loss_group or "
                "extra_groups of the copy to what the original had"
            )

    def _fitting_plan(self, continues: bool) -> StepPlan:
        self._check_process_groups()
        reason = self.fallback_reason
        if self._offload:
            check_offloaded([], reason)
        fused = None if reason else TABLE[self._base]
        # Another part of a step has the S of the first.
        tuner = self._tuner if continues and self._tuner else self._current_tuner()
        plan = self._plan
        if (
            plan is not None
            and plan.tuner is tuner
            and plan.states is self.state
            and plan.options.loss_group is self.loss_group
            and plan.fits(self.param_groups, fused, self.reduce_group)
        ):
            return plan
        members = [p for group in self.param_groups for p in group["params"]]
        steps_pieces = are_pieces(members, self._given)
        padding = padding_of_pieces(members, self._given) if steps_pieces else {}
        for piece, spans in padding.items():
            clear(piece, spans)
        entries = [self.state[p] for p in members if p in self.state] if steps_pieces else []
        has_lost = any(own.keys() - {"step"} and "x_ref" not in own for own in entries)
        if has_lost and bool((tuner.counters[:, 0] > 0).any()):
            warnings.warn(LOST_REFERENCE, stacklevel=2)
        options = self._plan_options()
        fallback = Fallback(self, self._base, reason) if reason else None
        plan = StepPlan(self.param_groups, self.state, options, tuner, self._run, fused, fallback)
        if self._class_options["log_every"] > 0:
            plan.on_step = self._log
        plan.padding = padding
        if steps_pieces and self._scale_per == "model":
            plan.given = elements_of(self._given)
            self._parts[tuple(map(id, members))] = plan
        self._plan = plan
        return plan

    def _plan_options(self) -> PlanOptions:
        return PlanOptions(
            self._backend,
            self._scale_per,
            self._state_dtype,
            self._delta_dtype,
            self.reduce_group,
            self.loss_group,
            self._is_running,
            self._bf16_stochastic_round,
            self._offload,
        )

    def _has_fakes(self) -> bool:
        return any(is_fake(p) for group in self.param_groups for p in group["params"])

    def _step_fakes(self) -> None:
        """Create the state of weights of FakeTensorMode, by which memory is estimated."""
        fused = None if self.fallback_reason else TABLE[self._base]
        if fused is None:
            # The base's state is there from the first step on, and ours beside it.
            weights = [p for group in self.param_groups for p in group["params"]]
            kept = {p: p.grad for p in weights if self.state.get(p)}
            for p in kept:
                p.grad = None
            with base_code(self):
                unhooked_step(self._base)(self)
            for p, g in kept.items():
                p.grad = g
        create_state_of_fakes(self.param_groups, self.state, self._plan_options(), fused)

    @property
    def _is_running(self) -> bool:
        return bool(self.param_groups) and self.param_groups[0]["variant"] == RUNNING

    def _current_tuner(self) -> ScaleRows:
        self._run.settle()
        groups = self.param_groups
        device = next((p.device for g in groups for p in g["params"]), torch.device("cpu"))
        # Weights on the meta device get their storage, and their device, later.
        if self._offload or device.type == "meta":
            device = torch.device("cpu")
        device = device_of_numbers(device)
        kind = LogTuner if groups and groups[0]["variant"] == RUNNING else Tuner
        if type(self._tuner) is not kind or self._tuner.device != device:
            # Who reads S under inference_mode must not make tensors that no step may write.
            with torch.inference_mode(False):
                self._tuner = kind(scale_keys(groups, self._scale_per), groups[0], device)
        self._tuner.follow(groups, self._scale_per)
        self._tuner.set_options(groups[0])
        return self._tuner

    def _phases(self, weights: list[Tensor]) -> list[int]:
        """Return the phases of weights whose x_ref is kept in part, see ``kept_blocks.py``."""
        if any(map(is_fsdp1_flat, weights)):
            self._check_process_groups()
        blocks = self._run.kept_blocks
        blocks.reduce_group = self.reduce_group
        return blocks.phases([(p, REFERENCE_EVERY) for p in weights])

    def _drop_derived(self) -> None:
        """Drop everything that can be derived from param_groups and state."""
        self._run.settle()
        self._plan, self._tuner = None, None
        self._parts: dict[tuple[int, ...], StepPlan] = {}
        self._run.last_part = None
        self._run.phase = self._run.squared_norm = self._run.slip = None
        self._run.has_slipped = False

    def _log(self) -> None:
        steps = int(self._current_tuner().counters[0, 0])
        if steps % self._class_options["log_every"] == 0:
            self._class_options["log_func"]({"iter_count": steps, "s": float(self.scale.sum())})

    # What users read

    @property
    def scale(self) -> Tensor:
        """S: a new float64 tensor (scales,) on the weights' device.

        On the CPU with offload, and where the weights' device has no float64.
        """
        return self._current_tuner().scale()

    @property
    def scale_source(self) -> str:
        """What S started from: "loss", "norms" (no loss was observed) or "s_init"; "" before.

        "s_init" also where it was taken over from a checkpoint of an exact form.
        """
        tuner = self._current_tuner()
        if self.param_groups[0]["s_init"] != AUTO or not isinstance(tuner, LogTuner):
            return "s_init"
        known = tuner.scale() > 0
        if not bool(known.any()):
            return ""
        if bool(tuner.given().any()):
            return "s_init"
        return "loss" if bool((tuner.anchored() | ~known).all()) else "norms"

    def learned_lr(self) -> list[float]:
        """Return S·lr of each param group, as floats, for logging; reads the device.

        With ``scale_per="parameter"`` it is the mean over the group's weights that have a scale.
        """
        known = [[scale for scale in scales if scale] for scales in self.group_scales()]
        return [
            sum(scales) / len(scales) * float(lr_of(group)) if scales else 0.0
            for group, scales in zip(self.param_groups, known, strict=True)
        ]

    def group_scales(self) -> list[list[float]]:
        """Return S of each param group, as floats: one, or one for each of its weights."""
        tuner = self._current_tuner()
        return [tuner.scale(group[KEY]).tolist() for group in self.param_groups]

    def record(self, every: int = 10, capacity: int = 10_000) -> None:
        """Keep the numbers of every so many steps on the device, for :meth:`recording`.

        No step waits for it. What was recorded before is dropped; checkpoints and copies lack it.

        Args:
            every: 1 or more; 0: stop recording.
            capacity: rows of eight numbers; the newest are kept.

        Raises:
            ValueError: for numbers out of range.

        Example:
            >>> from mechanic_fused import MechanicSGD
            >>> weight = torch.nn.Parameter(torch.ones(3))
            >>> opt = MechanicSGD([weight], lr=1.0)
            >>> opt.record(every=1)
            >>> for _ in range(3):
            ...     loss = (weight**2).sum()
            ...     opt.zero_grad()
            ...     loss.backward()
            ...     opt.step(loss=loss)
            >>> opt.recording().step
            array([1., 2., 3.])
        """
        device = self._current_tuner().device
        self._run.recorder = None if every == 0 else Recorder(every, capacity, device)

    def recording(self) -> Recording:
        """Return the recorded steps as arrays: step, effective_lr, scale, h, loss, norms.

        Raises:
            RuntimeError: where :meth:`record` was not called.
        """
        self._run.settle()
        if self._run.recorder is None:
            raise RuntimeError("nothing was recorded: call record() before the steps")
        return self._run.recorder.read()

    def plot(self) -> Any:
        """Return a matplotlib figure of the recorded losses and learned rates over the steps."""
        return drawn(self.recording())

    @property
    def fallback_reason(self) -> str | None:
        """Why the base has no fused update with its present options, or None if it has one."""
        return fallback_reason(self._base, self.param_groups)

    @property
    def implementation(self) -> str:
        """How a step is computed: "fused (cpp)", or "fallback: RAdam has no fused update"."""
        reason = self.fallback_reason
        if reason:
            return f"fallback: {reason}"
        devices = {p.device.type for group in self.param_groups for p in group["params"]}
        devices = {"cpu"} if self._offload else devices
        names = sorted(backends.resolve(self._backend, device) for device in devices)
        return f"fused ({', '.join(names)})"

    @property
    def road(self) -> str:
        """Deprecated name of :attr:`implementation`."""
        warn_renamed("opt.road", "opt.implementation", stacklevel=3)
        return self.implementation

    @property
    def grad_norm(self) -> Tensor:
        """The norm of all gradients in the last step, unscaled and before clipping, 0-dim float64.

        √(g·g) over all weights and ranks. With ``max_grad_norm`` elements that are not finite do
        not count. Without it they make the norm NaN or infinite, and the running form leaves out
        param groups whose lr is 0 while other groups have an lr above 0.
        """
        self._run.settle()
        squared = self._run.squared_norm
        if squared is None:
            return torch.zeros((), dtype=torch.float64, device=self._current_tuner().device)
        return squared.sum().sqrt()

    @property
    def nonfinite_steps(self) -> int:
        """Number of steps in which nothing was tuned because a sum was not finite."""
        return int(self._current_tuner().counters[:1, 1].sum())

    def __repr__(self) -> str:
        """Return the class, how it steps, the learned scale, and the options of each group."""
        if self._has_fakes():
            return super().__repr__()
        scales = self.scale.tolist()
        span = f"{scales[0]:.4g}" if scales else "none"
        if len(scales) > 1:
            span = f"{len(scales)} scales, {min(scales):.4g} to {max(scales):.4g}"
        lines = [
            f"{type(self).__name__} (",
            f"    {self.implementation}",
            f"    scale S: {span}, one per {self._scale_per}",
            *(f"    {name}: {self.param_groups[0][name]}" for name in USER_OPTIONS),
        ]
        hidden = {"params", "param_names", KEY, PEAK, *self._tuner_options}
        for i, (group, lr) in enumerate(zip(self.param_groups, self.learned_lr(), strict=True)):
            count = sum(p.numel() for p in group["params"])
            lines += [
                f"Parameter Group {i}: {len(group['params'])} tensors, {count} elements",
                f"    learned lr: {lr:.4g}",
                *(f"    {name}: {group[name]}" for name in sorted(group) if name not in hidden),
            ]
        return "\n".join([*lines, ")"])

    # How users control a run

    @torch.no_grad()
    def shift_reference(self) -> None:
        """Accept weights written by others: x_ref shifts by what was written since the last step.

        Needed only in the exact forms, after writes that torch cannot see (through ``.data`` or
        numpy); all others are detected.
        """
        if self._is_running or not self._run.has_started(self._current_tuner()):
            return
        plan = self.plan_step()
        if self._release is not None and self._release.taken:
            raise RuntimeError(
                "shift_reference() must come before backward() or after step() where gradients "
                "are released"
            )
        plan.write_tables(None, None)
        plan.reconcile(everything=True)

    def freeze_scale(self, frozen: bool = True) -> None:
        """Stop learning S, or with False resume; the weights go on moving by S·u."""
        for group in self.param_groups:
            group["tune_scale"] = not frozen

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Start a new run from the current weights: S as at the start, x_ref = x (and Δ = 0).

        The base's own state (momentum) is kept; the count of non-finite steps starts at 0.
        """
        for bucket in self.plan_step().buckets:
            for delta in bucket.delta:
                delta.zero_()
        # Weights that are frozen now have a Δ and an x_ref as well.
        for p, entries in self.state.items():
            if isinstance(entries, dict) and "delta" in entries:
                entries["delta"].zero_()
            elif isinstance(entries, dict) and "x_ref" in entries:
                x_ref = entries["x_ref"]
                if state.is_part(x_ref, p):
                    [phase] = self._phases([p])
                    x_ref.copy_(keep(local(p), local(p), phase))
                else:
                    x_ref.copy_(p)
        for group in self.param_groups:
            group.update({name: self._tuner_options[name] for name in CALIBRATED})
            group.pop(PEAK, None)
        self._current_tuner().reset()
        self._drop_derived()

    def release_gradients(self, reduced: bool = False) -> None:
        """Take each weight's part of a step during the backward pass, and free its gradient there.

        Only one gradient or a few are then in memory at a time. The results are those of the
        ordinary step up to the order of the sums. In the running form the weights are written there
        too, from the first step on; in the exact forms it takes effect from the second informative
        step, and ``step()`` writes the weights. Calling it again changes nothing.

        Args:
            reduced: whether gradients of plain weights need no reduction over ranks after the
                backward pass (DistributedDataParallel does one, ``fully_shard`` does not).

        Raises:
            ValueError: without a fused update, with ``max_grad_norm``, or for plain weights in a
                world of several ranks. Later, clipping by torch finds no gradients, and a second
                backward pass before ``step()`` and GradScaler raise RuntimeError.
        """
        check_releasable(self.fallback_reason, self.max_grad_norm, self.param_groups, reduced)
        if self._release is None:
            self._release = GradientRelease(self.plan_step, self._run, self.param_groups, reduced)

    def to_base(self) -> Optimizer:
        """Return a plain base optimizer over the same weights, at the learned lr, with its state.

        A scale for each weight makes a param group for each weight. The state is a copy, in the
        weights' dtype.

        Raises:
            ValueError: before a scale is known.
        """
        names = None if self.fallback_reason else TABLE[self._base].state_names
        scales = self.group_scales()
        known = [scale for group in scales for scale in group if scale > 0]
        if not known:
            raise ValueError("to_base() needs a learned scale, expected S above 0, got 0")
        # Weights that have not learned a scale of their own take the others' mean.
        mean = sum(known) / len(known)
        scales = [[scale or mean for scale in group] for group in scales]
        return state.to_base(self, self._base, scales, names)

    def refresh_hyperparameters(self) -> None:
        """Send changed hyperparameters to the device, before replaying a captured step.

        A replay runs no Python, so a float lr that a scheduler has changed must be sent first; an
        lr that is a tensor on the device needs no call.
        """
        if self._run.has_started(self._current_tuner()):
            growth = track_peak_lr(self.param_groups, started=True)
            plan = self.plan_step()
            if growth > 1:
                plan.rescale(1 / growth)
            plan.write_tables(None, None)
            plan.tuner.set_annealing_factor(annealing_factor(self.param_groups))

    @property
    def releases_gradients(self) -> bool:
        """Whether :meth:`release_gradients` has been called."""
        return self._release is not None

    def run_state(self) -> tuple[Phase | None, Tensor | None, Tensor | None]:
        """Return what is in neither param_groups nor state.

        The phase, the last squared norm and the losses observed for the next step.
        """
        tuner = self._current_tuner()
        losses = tuner.losses.clone() if isinstance(tuner, LogTuner) else None
        return self._run.phase, self._run.squared_norm, losses

    def restore_run_state(self, saved: tuple[Phase | None, Tensor | None, Tensor | None]) -> None:
        """Restore :meth:`run_state`, after param_groups and state have been restored."""
        self._drop_derived()
        self._run.phase, self._run.squared_norm, losses = saved
        tuner = self._current_tuner()
        if losses is not None and isinstance(tuner, LogTuner):
            tuner.losses.copy_(losses)

    # Being a torch optimizer

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also what released ones have left for ``step``."""
        super().zero_grad(set_to_none)
        if self._run.offload is not None:
            self._run.offload.forget()
            self._run.offload.meet()
        if self._release is not None:
            self._release.end_step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its weights join the run at their current values.

        Raises:
            ValueError: for tuner options that differ from the other groups', an ``x_ref_every``
                that cannot be, or differentiable.
        """
        if param_group.get("differentiable", self.defaults.get("differentiable")):
            raise ValueError("differentiable must be False: a step of Mechanic has no derivative")
        param_group = with_new_group_keys(param_group)
        now = self.param_groups[0] if self.param_groups else {}
        for name, value in self._tuner_options.items():
            # A load may have changed what the constructor was given.
            value = now.get(name, value)
            if name == "max_peak_lr":
                # Recomputed every step; a value already here was left by another optimizer.
                param_group[name] = value
            if param_group.setdefault(name, value) != value:
                raise ValueError(
                    f"{name} must be the same in all groups: expected {value}, "
                    f"got {param_group[name]}"
                )
        if self._optim_bits != 32:
            # Loaders look in a checkpoint for every entry that a group has here.
            param_group.setdefault(OPTIM_BITS, self._optim_bits)
        if param_group["variant"] == RUNNING:
            param_group.setdefault(X_REF_EVERY, self._x_ref_every)
        checked_x_ref_every(param_group.get(X_REF_EVERY, 1), param_group["variant"])
        super().add_param_group(param_group)
        try:
            self._check_optim_bits(self.param_groups[-1])
            if self._offload:
                check_offloaded(self.param_groups[-1]["params"], self.fallback_reason)
        except ValueError:
            self.param_groups.pop()
            raise
        for p in self.param_groups[-1]["params"]:
            self._given[p] = None
        lr = float(lr_of(param_group))
        # A group that joins a run late in its schedule is not at its peak.
        param_group[PEAK] = max(lr, param_group["max_peak_lr"]) if self.state else lr
        if self._release is not None:
            try:
                check_releasable(
                    self.fallback_reason,
                    self.max_grad_norm,
                    self.param_groups,
                    self._release.reduced,
                )
            except ValueError:
                self.param_groups.pop()
                raise
            self._release.watch(self.param_groups[-1]["params"])

    def _check_optim_bits(self, group: dict[str, Any]) -> None:
        """Raise ValueError where the base's state cannot be kept in so few bits."""
        bits = group.get(OPTIM_BITS, 32)
        checked_optim_bits(bits, self._state_dtype, self.fallback_reason)
        for p in group["params"]:
            state_format(p, bits, self._state_dtype, self.reduce_group)

    @torch.no_grad()
    def replace_parameter(
        self, old: torch.nn.Parameter, new: torch.nn.Parameter, index_map: Tensor
    ) -> None:
        """Train another weight in the place of one, with the state of its rows.

        For weights that grow or shrink in mid-run: points that are split, cloned and pruned,
        vocabularies that are extended. S and the step count go on.

        Args:
            old: a weight of this optimizer.
            new: the weight in its place, (rows, …), of the same dtype and on the same device.
            index_map: (rows,) int64: the row of ``old`` that each row of ``new`` continues, or −1
                for a row that starts without state.

        Raises:
            ValueError: for an ``old`` that is not here, or a ``new`` or a map that does not fit it,
                or a sharded weight; nothing has changed then.

        Example:
            >>> from mechanic_fused import MechanicAdamW
            >>> points = torch.nn.Parameter(torch.ones(3, 2))
            >>> opt = MechanicAdamW([points])
            >>> points.grad = torch.ones(3, 2)
            >>> opt.step()
            >>> kept = torch.tensor([0, 2, 2, -1])  # without point 1, point 2 twice, a new one
            >>> more = torch.nn.Parameter(points.detach()[kept])
            >>> opt.replace_parameter(points, more, kept)
            >>> opt.state[more]["exp_avg"].shape
            torch.Size([4, 2])
        """
        places = [
            (group["params"], i)
            for group in self.param_groups
            for i, p in enumerate(group["params"])
            if p is old
        ]
        if not places or any(p is new for group in self.param_groups for p in group["params"]):
            raise ValueError(
                f"expected an old weight that is in a param group, and a new one that is not, got "
                f"shapes {tuple(old.shape)} and {tuple(new.shape)}"
            )
        state.check_replacement(old, new, index_map)
        self._current_tuner()
        entries = self.state.get(old)
        mapped = None if entries is None else state.mapped_state(entries, old, new, index_map)
        [(params, place)] = places
        params[place] = new
        self._given.pop(old, None)
        self._given[new] = None
        self.state.pop(old, None)
        if mapped is not None:
            self.state[new] = mapped
        if self._release is not None:
            self._release.watch([new])

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups, after the reduction of the last step has ended.

        An x_ref that is kept in part has its weight's shape there, with NaN for other elements.
        """
        self._run.settle()
        return state.save_spread(self, super().state_dict, self._phases)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours, or one of the plain base; dtypes stay as they were saved.

        As with every torch optimizer the saved hyperparameters come along: after loading a plain
        base's checkpoint set ``lr`` (and a scheduler's ``initial_lr``) of each group back to 1.

        A checkpoint of an exact form goes on in the running form with the S that it had learned.

        Raises:
            ValueError: for a checkpoint with scales for other parts of the model, or other groups,
                or one of the running form in an exact one, or one whose x_ref was kept in part
                where it is to be whole; or for an entry that cannot be this weight's or tuner's:
                of another shape, dtype or number of columns, without storage, or not finite where
                it is the tuner's. Nothing has changed then.
        """
        groups = [with_new_group_keys(group) for group in state_dict["param_groups"]]
        check_tuner_states(groups)
        if self._is_running:
            if not any(group.get("variant") == RUNNING for group in groups):
                groups = in_running_form(groups)
            groups = with_own_x_ref_every(groups, self.param_groups)
        elif any(group.get("variant") == RUNNING for group in groups):
            raise ValueError(
                "a checkpoint of the running form has neither Δ nor a bettor's state: expected "
                f"an optimizer with variant='running', got {self.param_groups[0]['variant']!r}; or "
                "load what to_base() gives"
            )
        groups = with_own_optim_bits(groups, self.param_groups)
        if self._offload:
            check_offloaded([], fallback_reason(self._base, groups))
        states = state.with_short_integers(state_dict["state"])
        state_dict = {**state_dict, "state": states, "param_groups": groups}
        check_scales(groups, self.param_groups, self._scale_per)
        host = torch.device("cpu") if self._offload else None
        load = super().load_state_dict
        state.load_keeping_dtypes(self, load, state_dict, self._check_loaded, host)

    def _check_loaded(self, loaded: dict[str, Any]) -> None:
        names = None if self.fallback_reason else (*TABLE[self._base].state_names, "step")
        check_entries(loaded, self.param_groups, names)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep; hooks and process groups are lost."""
        kept = (
            *("_tuner_options", "_scale_per", "_backend", "max_grad_norm"),
            *("_optim_bits", "_state_dtype", "_delta_dtype", "_x_ref_every"),
            *("_bf16_stochastic_round", "_offload", OF_BASE),
        )
        self._run.settle()
        groups = (self.reduce_group, self.loss_group, *self.extra_groups)
        lost = self._lost_groups or any(group is not None for group in groups)
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in kept},
            "_prepared": self._run.phase is Phase.PREPARED,
            "_lost_groups": lost,
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        """Restore a copy, or take the groups and state of a checkpoint."""
        super().__setstate__(_from_0_1(saved))
        vars(self).setdefault("_x_ref_every", 1)
        vars(self).setdefault("_optim_bits", 32)
        vars(self).setdefault("_bf16_stochastic_round", False)
        vars(self).setdefault("_offload", False)
        vars(self).setdefault(OF_BASE, {})
        self._base_runs = False
        self.param_groups = [with_new_group_keys(group) for group in self.param_groups]
        for group in self.param_groups:
            for name, value in self._tuner_options.items():
                group.setdefault(name, value)
        if self.defaults.get("fused"):
            # Torch's fused optimizers set it in the constructor, and copies forget it.
            self._step_supports_amp_scaling = True
        mute_capturable_warning(self)
        if "_run" not in vars(self):
            self._given = WeakIdKeyDictionary()
            for group in self.param_groups:
                for p in group["params"]:
                    self._given[p] = None
            self._run = self._new_run()
            self.reduce_group, self.loss_group, self.extra_groups = None, None, ()
            self._release = None
            self._warned = False
        self._drop_derived()
        if vars(self).pop("_prepared", False):
            self._run.phase = Phase.PREPARED


def _from_0_1(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a pickled optimizer of 0.1 under today's names."""
    if "_scale_kind" not in saved:
        return saved
    saved = dict(saved)
    kind = saved.pop("_scale_kind")
    saved["_scale_per"] = "model" if kind == "global" else kind
    saved["_state_dtype"] = "param" if saved.pop("_narrow_state", False) else None
    saved["_delta_dtype"] = torch.bfloat16 if saved.pop("_narrow_delta", False) else None
    saved["_prepared"] = saved.pop("_rehearsed", False)
    saved["_tuner_options"] = with_new_group_keys(saved["_tuner_options"])
    return saved
