"""AutoDrop: the learning rate drops when the path of the weights has stopped turning."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from .. import backends
from ..param_checks import check_weights
from ..torch_internals import local
from .trajectory import Trajectory, smooth

DEFAULTS: dict[int, dict[str, Any]] = {
    1: {"factor": 0.2, "threshold": 0.01, "min_lr": 1e-4, "extra": 20, "threshold_max": 1.0},
    2: {"k": 64, "factor": 0.95, "threshold": 0.1, "min_lr": 0.0, "window": 10},
}
"""Version → its options; one that is missing has no default there or does not belong to it."""


class AutoDrop:
    """Multiply the learning rates by ``factor`` when the angle between displacements is steady.

    Version 2 sums the weights over windows of k steps. With S the sum of a window and
    s = S − S_prev: ω = degrees(acos(s·s_prev/(‖s‖‖s_prev‖))) joins B. Of ``window`` angles B a
    smoothed C is made, and the oldest leaves. If C − C_prev < threshold: lr = max(min_lr,
    factor·lr), B = [], C_prev = None; else C_prev = C.

    Version 1 takes x_e, the weights after the first step of each epoch of k steps, s_e = x_e −
    x_{e−1} and ω_e = angle(s_e, s_{e−1}). Once |ω_e − ω_{e−1}| < θ, A += n·x_e for n = 1 …
    ``extra`` epochs; then θ = min(threshold_max, θ/factor), the lr drops as above and the weights
    become A/(extra(extra + 1)/2).

    Angles are over all weights that require gradients, as one vector; see ``angle`` (the latest,
    degrees), ``smoothed`` (all C) and ``drops``. When these weights change (more groups, another
    dtype or device, frozen ones), all that has been measured but ``smoothed`` and ``drops`` is
    dropped, and the measuring starts anew; so does it for those of another place in memory.

    Our reading where the paper does not say or has misprints: the Gaussian of C is over the index
    of an angle, σ = min(std(B), window/2) with std of the population, its weights are normalised,
    and C is its value at the newest angle (for σ = 0 that angle itself). C_prev does not survive a
    drop. There is no ε: where a displacement is exactly 0 or not finite there is no angle, and the
    test waits. A drop never raises an lr that is below ``min_lr``. Version 1: x_e is what it was
    before the average replaces it.

    Args:
        optimizer: any torch optimizer; call ``step()`` after each ``optimizer.step()``.
        k: steps of a window, 64 by default; in version 1 the steps of an epoch, no default.
        factor: of a drop, in (0, 1); 0.95, in version 1 0.2.
        window: angles that are smoothed together (version 2), 10.
        threshold: degrees; 0.1, in version 1 0.01.
        min_lr: floor of each group's lr; 0, in version 1 1e-4.
        version: 1 (arXiv) or 2 (UAI).
        extra: epochs that are averaged before a drop (version 1), 20.
        threshold_max: degrees, the largest θ (version 1), 1.
        beside: other schedulers of this optimizer, whose own base rates are to drop too. Those
            that compute the lr from them (LambdaLR, OneCycleLR, CyclicLR, warm restarts,
            SequentialLR) would otherwise undo a drop.
        reduce_group: the process group over which plain weights are sharded, or None.
        backend: "auto" or a backend's name.

    Raises:
        ValueError: for options out of range, or of the other version.

    Source: arXiv 2111.15317 (version 1, from the authors' code) and UAI 2024, PMLR 244:3603
    (version 2, from the paper). The floor of version 2's lr is not stated there.

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
        options = _checked(version, {k: v for k, v in given.items() if v is not None})
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
        self._progress = Progress(options["threshold"])
        self._motion: Trajectory | None = None

    @property
    def angle(self) -> float | None:
        """The latest angle in degrees, None before the first."""
        return self._progress.angle

    @property
    def smoothed(self) -> list[float]:
        """Every C of version 2 so far, in degrees."""
        return self._progress.smoothed

    @property
    def drops(self) -> list[tuple[int, float]]:
        """(step, product of all factors so far) of each drop; steps are counted from 1."""
        return self._progress.drops

    @property
    def threshold(self) -> float:
        """The threshold in degrees as it stands: version 1 raises it at each drop."""
        return self._progress.threshold

    def step(self) -> None:
        """Look at the weights after a step of the optimizer, and lower its rates if it is time.

        The host reads from the device at most once in k steps.

        Raises:
            ValueError: where no weight requires gradients, or one cannot be worked on.
        """
        weights = self._weights()
        if self._motion is None or not self._motion.fits(weights):
            motion = self._measure(weights)
            if self._motion is not None:
                self._progress.forget()
            self._motion = motion
        self._progress.step += 1
        if self.version == 2:
            self._sum_up(self._motion, self._progress)
        elif (self._progress.step - 1) % self.k == 0:
            self._look(self._motion, self._progress)

    def get_last_lr(self) -> list[Any]:
        """Return the lr of each group as it stands, a copy where it is a tensor."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [lr.clone() if torch.is_tensor(lr) else lr for lr in rates]

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on to the same bits.

        As with torch's optimizers its tensors, a list of one a weight in the order of the groups,
        are the live ones: save or copy them before the next step.
        """
        saved: dict[str, Any] = {"version": self.version, "k": self.k, **asdict(self._progress)}
        saved["vectors"] = None if self._motion is None else self._motion.saved()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state dict; call it when the weights are where they will be trained.

        Raises:
            ValueError: for one of another version, another k, or other weights; nothing has
                changed then.
        """
        for name, mine in (("version", self.version), ("k", self.k)):
            if state_dict.get(name) != mine:
                raise ValueError(
                    f"{name} must be that of the saved run, expected {mine}, "
                    f"got {state_dict.get(name)!r}"
                )
        names = {f.name for f in fields(Progress)}
        if missing := [name for name in (*sorted(names), "vectors") if name not in state_dict]:
            raise ValueError(f"a state dict of AutoDrop must have {', '.join(missing)}")
        motion = None
        if state_dict["vectors"] is not None:
            motion = self._measure(self._weights())
            motion.load(state_dict["vectors"])
        self._progress = Progress(**copy.deepcopy({name: state_dict[name] for name in names}))
        self._motion = motion

    def _weights(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def _measure(self, weights: list[Tensor]) -> Trajectory:
        check_weights([local(p) for p in weights])
        return Trajectory(weights, self.version == 2, self.backend, self.reduce_group)

    def _sum_up(self, motion: Trajectory, now: Progress) -> None:
        # The first of a window overwrites, so that nothing has to be zeroed.
        motion.space.axpby(motion.sum, motion.space.weights, a=1.0 if now.count else 0.0)
        now.count += 1
        if now.count < self.k:
            return
        now.count = 0
        angle = motion.turned(motion.sum)
        motion.sum, motion.previous = motion.previous, motion.sum
        if angle is None:
            return
        now.angle = angle
        now.angles.append(angle)
        if len(now.angles) < self.window:
            return
        level = smooth(now.angles)
        now.smoothed.append(level)
        del now.angles[0]
        if now.level is not None and level - now.level < now.threshold:
            self._drop()
            now.angles, now.level = [], None
        else:
            now.level = level

    def _look(self, motion: Trajectory, now: Progress) -> None:
        weights = motion.space.weights
        angle, before = motion.turned(weights), now.before
        now.before = angle
        for x_prev, x in zip(motion.previous, weights, strict=True):
            x_prev.copy_(x)
        if not math.isfinite(motion.squared):
            # Their average would never be finite again.
            now.armed, now.count = False, 0
            return
        if angle is not None:
            now.angle = angle
            now.armed |= before is not None and abs(angle - before) < now.threshold
        if not now.armed:
            return
        now.count += 1
        motion.space.axpby(motion.sum, weights, 1.0 if now.count > 1 else 0.0, float(now.count))
        if now.count == self.extra:
            now.threshold = min(self.threshold_max, now.threshold / self.factor)
            now.armed, now.count = False, 0
            self._drop()
            motion.replace(self.extra * (self.extra + 1) // 2)

    @torch.no_grad()
    def _drop(self) -> None:
        schedulers = list({id(s): s for s in _flat(self.beside)}.values())
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
                rates = getattr(scheduler, name, [])
                rates[:] = [self._lower(rate, lowered) for rate in rates]
        now = self._progress
        reached = now.drops[-1][1] if now.drops else 1.0
        now.drops.append((now.step, self.factor * reached))

    def _lower(self, rate: Any, lowered: set[int]) -> Any:
        """Return the rate after a drop; a tensor is changed in place, once."""
        if not torch.is_tensor(rate):
            return min(rate, max(self.min_lr, self.factor * rate))
        # Groups that were made without an lr of their own share the default's tensor.
        if id(rate) not in lowered:
            lowered.add(id(rate))
            rate.copy_(torch.minimum(rate, (self.factor * rate).clamp(min=self.min_lr)))
        return rate


@dataclass
class Progress:
    """What a run has come to, apart from vectors: B is ``angles``, C_prev ``level``."""

    threshold: float
    step: int = 0
    count: int = 0  # steps in the window; version 1: epochs in the average
    armed: bool = False
    angle: float | None = None
    before: float | None = None  # version 1: the angle of the epoch before, if it had one
    level: float | None = None
    angles: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    drops: list[tuple[int, float]] = field(default_factory=list)

    def forget(self) -> None:
        """Drop what is of weights that are no more."""
        self.count, self.armed, self.angles = 0, False, []
        self.angle = self.before = self.level = None


def _flat(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Yield schedulers and those that they are made of: SequentialLR, ChainedScheduler."""
    for scheduler in schedulers:
        yield scheduler
        yield from _flat(getattr(scheduler, "_schedulers", ()))


def _checked(version: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a version, or raise ValueError."""
    if version not in DEFAULTS:
        raise ValueError(f"version must be 1 or 2, got {version!r}")
    options: dict[str, Any] = {**DEFAULTS[version], **given}
    for name in ("window", "extra", "threshold_max"):
        if name in given and name not in DEFAULTS[version]:
            raise ValueError(
                f"{name} must be None in version {version}, which has none, got {given[name]!r}"
            )
    if "k" not in options:
        raise ValueError("version 1 needs k, the steps of an epoch, got None")
    for name in ("k", "window", "extra"):
        value = options.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of 1 or more, got {value!r}")
    if not 0 < options["factor"] < 1:
        raise ValueError(f"factor must lie in (0, 1), got {options['factor']!r}")
    if not 0 <= options["min_lr"] < math.inf:
        raise ValueError(f"min_lr must be a finite number of 0 or more, got {options['min_lr']!r}")
    for name in ("threshold", "threshold_max"):
        if not math.isfinite(options.get(name, 0)):
            raise ValueError(f"{name} must be a finite number, got {options[name]!r}")
    return options
