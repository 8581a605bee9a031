"""The tuners beside an optimizer as they are tested: options, training, what they refuse."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mechanic_fused.tuners import LQA, AutoDrop, FlatterFaster, GeN, LRTuner

from .cases import loss_of, make_weights, noise, set_gradients, snapshot, values

NEVER = {1: 0.0, 2: -360.0}
"""Version of AutoDrop → a threshold below every change of an angle."""

ALWAYS = 360.0
BETA = 0.9


def without_absent(entries):
    return {k: v for k, v in entries.items() if v is not ABSENT}


def drift(params, t):
    """Move weights by a constant direction and noise."""
    rng = torch.Generator().manual_seed(t)
    with torch.no_grad():
        for p in params:
            p.add_((0.03 + 0.02 * noise(p, rng)).to(p.dtype))


def sgd(params, lr=0.1, **options):
    return torch.optim.SGD(params, lr=lr, **options)


class Scheduler(NamedTuple):
    """A tuner beside an optimizer.

    Args:
        make: called with an optimizer and options.
        options: those with which it changes the lr or momentum within a test.
        neutral: those with which it never does, where the loss is constant.
        refused: options that are out of range, and what the error says.
        entries: of its state dict.
        bad_states: changed entries of a state dict, and what the error says.
        stops: steps after which a run is saved and resumed.
        probes: whether it steps before the optimizer, with a closure.
        optimizer: weights → the optimizer.
        schedule: t → the factor of the lr in step t.
    """

    make: Callable
    options: dict[str, Any]
    neutral: dict[str, Any]
    refused: tuple[tuple[dict[str, Any], str], ...]
    entries: set[str]
    bad_states: tuple[tuple[dict[str, Any], str], ...]
    stops: tuple[int, ...] = (0, 1, 4)
    probes: bool = True
    optimizer: Callable = sgd
    schedule: Callable = lambda t: 1.0


ABSENT = object()
"""In place of an option or an entry: one that is taken away."""

DROP_ENTRIES = {
    *("version", "k", "step", "drops", "threshold", "count", "armed", "angle"),
    *("before", "level", "angles", "smoothed", "vectors"),
}
DROP_REFUSED = (
    ({"version": 3}, "version must be 1 or 2, got 3"),
    ({"k": 0}, "k must be an integer of 1 or more, got 0"),
    ({"k": 2.5}, r"k must be an integer of 1 or more, got 2\.5"),
    ({"factor": 1.0}, r"factor must be a finite number above 0 and below 1, got 1\.0"),
    ({"min_lr": -1.0}, r"min_lr must be a finite number of 0 or more, got -1\.0"),
    ({"threshold": math.nan}, "threshold must be a finite number, got nan"),
    ({"backend": "tpu"}, "backend must be .* got 'tpu'"),
    ({"beside": [object()]}, "beside must have schedulers of the same optimizer, got object"),
)
PROBE_REFUSED = (
    ({"every": 0}, "every must be an integer of 1 or more, got 0"),
    ({"bound": 0.5}, r"bound must be 1 or more, got 0\.5"),
    ({"min_lr": 2.0, "max_lr": 1.0}, r"expected 0 <= min_lr <= max_lr, got 2\.0 and 1\.0"),
    ({"backend": "cobol"}, "backend"),
)
COUNT_STATES = (
    ({"count": ABSENT, "steps": 1}, r"expected the entries \['count'\], got \['steps'\]"),
    ({"count": "x"}, "count must be an integer of 0 or more, got 'x'"),
    ({"count": -1}, "count must be an integer of 0 or more, got -1"),
)

SCHEDULERS = {
    "AutoDrop 1": Scheduler(
        lambda opt, **options: AutoDrop(opt, version=1, **options),
        {"k": 2, "threshold": 40.0, "threshold_max": 60.0, "extra": 6, "factor": 0.7},
        {"k": 2, "threshold": NEVER[1]},
        (
            *DROP_REFUSED[1:],
            ({"k": None}, "version 1 needs k, the number of steps of an epoch, got None"),
            ({"extra": 0}, "extra must be an integer of 1 or more, got 0"),
            ({"window": 3}, "window must be None in version 1, .* got 3"),
            ({"threshold_max": math.inf}, "threshold_max must be a finite number, got inf"),
        ),
        DROP_ENTRIES,
        (
            ({"k": 5}, "k must .* expected 2, got 5"),
            ({"version": 2}, "version must .* expected 1, got 2"),
            ({"drops": ABSENT}, "must have drops"),
        ),
        (0, 1, 3, 18, 44, 59),
        probes=False,
    ),
    "AutoDrop 2": Scheduler(
        AutoDrop,
        {"k": 3, "threshold": 3.0, "window": 4, "factor": 0.9},
        {"k": 2, "threshold": NEVER[2]},
        (
            *DROP_REFUSED,
            ({"window": True}, "window must be an integer of 1 or more, got True"),
            ({"extra": 20}, "extra must be None in version 2, .* got 20"),
            ({"threshold_max": 2.0}, r"threshold_max must be None in version 2, .* got 2\.0"),
        ),
        DROP_ENTRIES,
        (
            ({"k": 5}, "k must .* expected 3, got 5"),
            ({"version": 1}, "version must .* expected 2, got 1"),
            ({"smoothed": ABSENT, "drops": ABSENT}, "must have drops, smoothed"),
        ),
        (0, 1, 3, 44, 49, 59),
        probes=False,
    ),
    "GeN": Scheduler(
        GeN,
        {"every": 3},
        {"every": 2},
        (
            *PROBE_REFUSED,
            ({"points": 4}, "points must be 3 or 5, got 4"),
            ({"smoothing": 1.0}, "smoothing must .* of 0 or more and below 1, got 1"),
        ),
        {"count"},
        COUNT_STATES,
    ),
    "LQA": Scheduler(LQA, {"every": 3}, {"every": 2}, PROBE_REFUSED, {"count"}, COUNT_STATES),
    "LRTuner": Scheduler(
        LRTuner,
        {"steps": 8, "every": 3},
        {"steps": 8, "every": 2, "explore": 0.0},
        (
            *PROBE_REFUSED,
            ({"steps": 0}, "steps must be an integer of 1 or more, got 0"),
            ({"explore": 2}, "explore must .* of 0 or more and of 1 or less, got 2"),
            ({"multiples": (0, 1, 1)}, "multiples must be three different numbers or more, got"),
            ({"tolerance": -1}, "tolerance must be 0 or more, got -1"),
        ),
        {"count"},
        COUNT_STATES,
    ),
    "FlatterFaster": Scheduler(
        FlatterFaster,
        {},
        {},
        (({"reference_lr": 0.0}, r"reference_lr must be a finite number above 0, got 0\.0"),),
        {"references"},
        (
            ({"references": ABSENT}, "expected the entries"),
            ({"references": []}, "expected references of 1 param groups, got 0"),
            ({"references": [[0.0, BETA]]}, "expected references lr > 0 and β in"),
        ),
        probes=False,
        optimizer=lambda params: sgd(params, momentum=BETA),
        schedule=lambda t: 1 / (1 + t),
    ),
}
PROBING = [name for name, row in SCHEDULERS.items() if row.probes]


class Tuned:
    """Weights, an optimizer, a tuner beside it, and the steps that they take on the quadratic.

    Args:
        name: a key of SCHEDULERS.
        params: the weights; None: float32 and bfloat16 ones.
        optimizer: weights → the optimizer; None: the row's.
        loss: of the weights, for a tuner that probes.
        options: of the tuner, in place of the row's.
    """

    def __init__(self, name, params=None, optimizer=None, loss=loss_of, **options):
        self.row = SCHEDULERS[name]
        if params is None:
            params = make_weights() + make_weights(dtype=torch.bfloat16, seed=1)
        self.params, self.loss = params, loss
        self.opt = (optimizer or self.row.optimizer)(params)
        self.tuner = self.row.make(self.opt, **{**self.row.options, **options})
        self.lrs = [group["lr"] for group in self.opt.param_groups]
        self.t = 0

    def closure(self):
        return self.loss(self.params)

    def steps(self, count):
        for _ in range(count):
            set_gradients(self.params, self.t)
            if self.row.probes:
                self.tuner.step(self.closure)
            self.opt.step()
            if self.row.schedule(0) != self.row.schedule(1):
                for group, lr in zip(self.opt.param_groups, self.lrs, strict=True):
                    group["lr"] = lr * self.row.schedule(self.t)
            if not self.row.probes:
                self.tuner.step()
            self.t += 1
        return self

    def follow(self, tuner):
        """Go on with another tuner and its optimizer."""
        self.tuner, self.opt = tuner, tuner.optimizer
        self.params = [p for group in self.opt.param_groups for p in group["params"]]
        return self

    def saved(self):
        """Return state dicts, through a file as torch.load has it by default."""
        file = io.BytesIO()
        torch.save([self.opt.state_dict(), self.tuner.state_dict()], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def snapshot(self):
        """Copy all that a step may change."""
        return copy.deepcopy([snapshot(self.opt), self.tuner.state_dict()])

    @property
    def changed(self):
        """Return the numbers that the tuner is there to change."""
        return [[float(group["lr"]), group.get("momentum", 0.0)] for group in self.opt.param_groups]


def resumed(name, run, **options):
    """Return another run with the weights and the state of one, loaded as from a file."""
    saved = run.saved()
    other = Tuned(name, [torch.nn.Parameter(x) for x in values(run.params)], **options)
    other.opt.load_state_dict(saved[0])
    other.tuner.load_state_dict(saved[1])
    other.t = run.t
    return other
