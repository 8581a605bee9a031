"""AutoDrop: drop the lr when the path of the weights has stopped turning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from .. import backends
from ..options import integer, number
from ..param_checks import check_weights
from ..torch_internals import inner_schedulers, local
from .autodrop_v1 import EpochRule
from .trajectory import DropRule, Trajectory


class AutoDrop:
    """Multiply the lr by ``factor`` when the angle between displacements of the weights is steady.

    Version 2: S sums the weights over windows of k steps, s = S − S_prev, and the angle ω between s
    and s_prev, in degrees, joins a list B. When B has ``window`` angles, a smoothed angle C is
    taken and the oldest is removed; if C − C_prev < ``threshold``, lr = max(min_lr, factor·lr).

    Version 1: ω is the angle between displacements of epochs of k steps. Once it changes by less
    than ``threshold`` in an epoch, the weights of ``extra`` epochs are averaged; then the lr drops
    and the weights are replaced by the average.

    All weights that require gradients count as one vector. If these weights change (another group,
    dtype, device or memory), measuring restarts; ``smoothed`` and ``drops`` are kept.

    Args:
        optimizer: any torch optimizer; call :meth:`step` after each ``optimizer.step()``.
        k: steps of a window, 64; in version 1 steps of an epoch, without a default.
        factor: of a drop, in (0, 1); 0.95, in version 1 0.2.
        window: number of angles that are smoothed (version 2), 10.
        threshold: degrees; 0.1, in version 1 0.01.
        min_lr: lower bound of each group's lr, which never raises one; 0, in version 1 1e-4.
        version: 1 (arXiv) or 2 (UAI).
        extra: number of epochs averaged before a drop (version 1), 20.
        threshold_max: degrees, the largest threshold (version 1), 1.
        beside: other schedulers of the optimizer whose base lrs drop too. Those that compute the lr
            from base lrs (LambdaLR, OneCycleLR, CyclicLR, SequentialLR) would undo a drop.
        reduce_group: the process group over which plain weights are sharded, or None.
        backend: "auto" or the name of a backend.

    Raises:
        ValueError: for options out of range, or options of the other version.

    Source: UAI 2024, PMLR 244:3603 (version 2) and arXiv 2111.15317 (version 1). docs/tuners has
    what the papers leave open.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> opt = torch.optim.SGD([weight], lr=0.1)
        >>> sched = AutoDrop(opt, k=1, window=1)
        >>> for _ in range(4):
        ...     opt.zero_grad()
        ...     (weight ** 2).sum().backward()
        ...     opt.step()
        ...     sched.step()
        >>> sched.drops  # the path is straight: the second angle is not above the first
        [(4, 0.95)]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: int | None = None,
        factor: float | None = None,
        window: int | None = None,
        threshold: float | None = None,
        min_lr: float | None = None,
        version: int = 2,
        *,
        extra: int | None = None,
        threshold_max: float | None = None,
        beside: Iterable[Any] = (),
        reduce_group: Any = None,
        backend: str = "auto",
    ) -> None:
        given = {
            "k": k,
            "factor": factor,
            "window": window,
            "threshold": threshold,
            "min_lr": min_lr,
            "extra": extra,
            "threshold_max": threshold_max,
        }
        options = checked_options(version, {k: v for k, v in given.items() if v is not None})
        backends.check(backend)
        self.beside = list(beside)
        for scheduler in self.beside:
            if getattr(scheduler, "optimizer", None) is not optimizer:
                raise ValueError(
                    "beside must have schedulers of the same optimizer, got "
                    f"{type(scheduler).__name__} of another or none"
                )
        self.optimizer = optimizer
        self.version, self.k = version, options["k"]
        self.factor, self.min_lr = options["factor"], options["min_lr"]
        self.window, self.extra = options.get("window", 0), options.get("extra", 0)
        self.threshold_max = options.get("threshold_max", math.inf)
        self.reduce_group, self.backend = reduce_group, backend
        self.drops: list[tuple[int, float]] = []
        """(step, product of all factors so far) of each drop; steps count from 1."""
        self._steps = 0
        self._rule: DropRule = RULES[version](options)
        self._trajectory: Trajectory | None = None

    @property
    def angle(self) -> float | None:
        """The latest angle in degrees, None before the first."""
        return self._rule.angle

    @property
    def smoothed(self) -> list[float]:
        """Every C of version 2 so far, in degrees; empty in version 1."""
        return self._rule.smoothed if isinstance(self._rule, WindowRule) else []

    @property
    def threshold(self) -> float:
        """The present threshold in degrees; version 1 raises it at each drop."""
        return self._rule.threshold

    def step(self) -> None:
        """Measure the weights after a step of the optimizer, and drop its lrs if they must.

        The host reads from the device at most once in k steps.

        Raises:
            ValueError: if no weight requires gradients, or for a weight of an unsupported kind.
        """
        weights = self._weights()
        if self._trajectory is None or not self._trajectory.fits(weights):
            trajectory = self._new_trajectory(weights)
            if self._trajectory is not None:
                self._rule.restart()
            self._trajectory = trajectory
        self._steps += 1
        if self._rule.observe(self._trajectory, self._steps):
            self._drop()

    def get_last_lr(self) -> list[Any]:
        """Return the present lr of each group, a copy if it is a tensor."""
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        return [lr.clone() if torch.is_tensor(lr) else lr for lr in lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is needed to resume to the same bits.

        As with torch's optimizers, its tensors (a list with one per weight, in the order of the
        groups) are the live ones: save or copy them before the next step.
        """
        trajectory = self._trajectory
        return {
            "version": self.version,
            "k": self.k,
            "step": self._steps,
            "drops": list(self.drops),
            **self._rule.state_dict(),
            "vectors": None if trajectory is None else trajectory.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`; call it when the weights are where they will be trained.

        Raises:
            ValueError: for a state dict of another version, another k or other weights; nothing
                has changed then.
        """
        for name, mine in (("version", self.version), ("k", self.k)):
            if state_dict.get(name) != mine:
                raise ValueError(
                    f"{name} must be that of the saved run, expected {mine}, "
                    f"got {state_dict.get(name)!r}"
                )
        if missing := [name for name in self.state_dict() if name not in state_dict]:
            raise ValueError(f"a state dict of AutoDrop must have {', '.join(missing)}")
        trajectory = None
        if state_dict["vectors"] is not None:
            trajectory = self._new_trajectory(self._weights())
            trajectory.load_state_dict(state_dict["vectors"])
        self._rule.load_state_dict(state_dict)
        self._steps, self.drops = state_dict["step"], list(state_dict["drops"])
        self._trajectory = trajectory

    def _weights(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _new_trajectory(self, weights: list[Tensor]) -> Trajectory:
        check_weights([local(p) for p in weights])
        return Trajectory(weights, self._rule.SUMS, self.backend, self.reduce_group)

    @torch.no_grad()
    def _drop(self) -> None:
        schedulers = list({id(s): s for s in with_inner(self.beside)}.values())
        keys = ["lr", "initial_lr", "swa_lr"]
        if any(isinstance(s, OneCycleLR) for s in schedulers):
            keys += ["max_lr", "min_lr"]
        lowered: set[int] = set()
        for group in self.optimizer.param_groups:
            for key in keys:
                if key in group:
                    group[key] = self._lower(group[key], lowered)
        for scheduler in schedulers:
            for name in ("base_lrs", "max_lrs"):
                lrs = getattr(scheduler, name, [])
                lrs[:] = [self._lower(lr, lowered) for lr in lrs]
        product = self.drops[-1][1] if self.drops else 1.0
        self.drops.append((self._steps, self.factor * product))

    def _lower(self, lr: Any, lowered: set[int]) -> Any:
        """Return an lr after a drop; a tensor is changed in place, once.

        Args:
            lr: the lr.
            lowered: ids of the tensors that have been changed; groups that were created without
                their own lr share the default's tensor.
        """
        if not torch.is_tensor(lr):
            return min(lr, max(self.min_lr, self.factor * lr))
        if id(lr) not in lowered:
            lowered.add(id(lr))
            lr.copy_(torch.minimum(lr, (self.factor * lr).clamp(min=self.min_lr)))
        return lr


class WindowRule(DropRule):
    """Version 2: drop the lr when a smoothed angle between windows of steps no longer grows.

    With S the sum of the weights over a window of k steps and s = S − S_prev,
    ω = degrees(acos(s·s_prev/(‖s‖‖s_prev‖))) joins B. When B has ``window`` angles, C = smooth(B)
    and the oldest angle is removed. If C − C_prev < ``threshold``, the lr drops, B = [] and
    C_prev = None; else C_prev = C.

    Ours, where the paper is silent or misprinted: :func:`smooth`; C_prev does not survive a drop;
    there is no ε, and a displacement that is exactly 0 or not finite gives no angle.

    Source: UAI 2024, PMLR 244:3603.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "k": 64,
        "factor": 0.95,
        "threshold": 0.1,
        "min_lr": 0.0,
        "window": 10,
    }
    SUMS = True
    ENTRIES: ClassVar[dict[str, str]] = {
        "threshold": "threshold",
        "angle": "angle",
        "angles": "angles",
        "level": "previous_smoothed",
        "smoothed": "smoothed",
        "count": "summed_steps",
    }
    UNUSED: ClassVar[dict[str, Any]] = {"armed": False, "before": None}

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.window: int = options["window"]
        self.smoothed: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Drop what was measured of weights that have changed since; ``smoothed`` is kept."""
        self.angle = None
        self.angles: list[float] = []
        """B."""
        self.previous_smoothed: float | None = None
        """C_prev."""
        self.summed_steps = 0

    def observe(self, trajectory: Trajectory, step: int) -> bool:
        """Add the weights to the window's sum; return whether the lr must drop."""
        # The first step of a window overwrites the sum, so that it need not be zeroed.
        a = 1.0 if self.summed_steps else 0.0
        trajectory.space.axpby(trajectory.sum, trajectory.space.weights, a=a)
        self.summed_steps += 1
        if self.summed_steps < self.k:
            return False
        self.summed_steps = 0
        angle = trajectory.advance(trajectory.sum)
        trajectory.sum, trajectory.previous = trajectory.previous, trajectory.sum
        if angle is None:
            return False
        self.angle = angle
        self.angles.append(angle)
        if len(self.angles) < self.window:
            return False
        smoothed, previous = smooth(self.angles), self.previous_smoothed
        self.smoothed.append(smoothed)
        del self.angles[0]
        if previous is not None and smoothed - previous < self.threshold:
            self.angles, self.previous_smoothed = [], None
            return True
        self.previous_smoothed = smoothed
        return False


RULES: dict[int, type[DropRule]] = {1: EpochRule, 2: WindowRule}
"""Version → its rule."""


def smooth(angles: Sequence[float]) -> float:
    """Return a Gaussian average of the angles, centred on the newest.

    C = Σwᵢωᵢ/Σwᵢ with wᵢ = exp(−(m − i)²/(2σ²)) for i = 1 … m and σ = min(std, m/2), where std is
    that of the population; for σ = 0, C is the newest angle.
    """
    width = min(statistics.pstdev(angles), len(angles) / 2)
    if width == 0:
        return angles[-1]
    # Products, because ** raises an error on overflow.
    ages = [age / width for age in range(len(angles) - 1, -1, -1)]
    weights = [math.exp(-0.5 * d * d) for d in ages]
    return math.fsum(w * a for w, a in zip(weights, angles, strict=True)) / math.fsum(weights)


def with_inner(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Yield schedulers and the schedulers that they are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from with_inner(inner_schedulers(scheduler))


def checked_options(version: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a version, or raise ValueError.

    Args:
        version: 1 or 2.
        given: the options that the user gave.
    """
    if version not in RULES:
        raise ValueError(f"version must be 1 or 2, got {version!r}")
    defaults = RULES[version].DEFAULTS
    for name in ("window", "extra", "threshold_max"):
        if name in given and name not in defaults:
            raise ValueError(
                f"{name} must be None in version {version}, which has no such option, "
                f"got {given[name]!r}"
            )
    options: dict[str, Any] = {**defaults, **given}
    if "k" not in options:
        raise ValueError("version 1 needs k, the number of steps of an epoch, got None")
    for name in ("k", "window", "extra"):
        if name in options:
            integer(name, options[name], 1)
    number("factor", options["factor"], 0, 1, above=True, below=True)
    number("min_lr", options["min_lr"], 0)
    for name in ("threshold", "threshold_max"):
        if name in options:
            number(name, options[name])
    return options
