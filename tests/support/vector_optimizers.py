"""The optimizers made of vector ops as they are tested: options, oracles in NumPy, a problem.

An oracle takes the steps of a finished run in plain arithmetic of one dtype.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from mechanic_fused.torch_internals import dtensor
from mechanic_fused.tuners import CGQ, AdaRem, AutoGD, ExtrapolatedSGD

from .cases import FEW, STEPS, SUM_RTOL, make_weights, noise, snapshot, ulp, values

NUMPY = {torch.float64: np.float64, torch.float32: np.float32}
MAX_BETA = 0.8


def loss_and_gradient(x, t):
    """Return ½Σd(x − o)² + ⟨n, x⟩ of step t and its gradient, in float64."""
    i = torch.arange(x.numel()).reshape(x.shape)
    d, o = 1 + i % 5, i.double().cos()
    n = 0.3 * noise(x, torch.Generator().manual_seed(t))
    away = x.detach().double() - o
    return float((d * away**2).sum() / 2 + (n * x.detach().double()).sum()), d * away + n


def whole(p):
    return p.detach().full_tensor() if isinstance(p, dtensor()) else p.detach()


def sharded_like(g, p):
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(p, dtensor()):
        return g
    return distribute_tensor(g, p.device_mesh, p.placements)


class Closure:
    """The quadratic of step t, called as by torch's LBFGS; notes its calls and the weights then.

    Args:
        params: the weights.
        deterministic: whether every step has the noise of step 0.
        lost: the steps whose losses without gradients are NaN.
    """

    def __init__(self, params, deterministic=False, lost=()):
        self.params, self.deterministic, self.lost = params, deterministic, lost
        self.t, self.calls, self.seen = 0, [], []

    def __call__(self):
        training = torch.is_grad_enabled()
        self.calls.append((self.t, training))
        self.seen.append(values(self.params))
        t = 0 if self.deterministic else self.t
        found = [loss_and_gradient(whole(p), t) for p in self.params]
        for p, (_, g) in zip(self.params, found, strict=True):
            p.grad = sharded_like(g.to(p.dtype), p) if training else None
        loss = sum(loss for loss, _ in found)
        lost = self.t in self.lost and not training
        return torch.tensor(math.nan if lost else loss, dtype=torch.float64)


class Run:
    """An optimizer and the steps that it takes on the quadratic.

    Args:
        name: a key of METHODS.
        backend: its backend.
        dtype: of the weights.
        params: the weights; None makes them.
        options: of the optimizer, beside those of the method.
    """

    def __init__(self, name, backend="auto", dtype=torch.float64, params=None, **options):
        self.name, self.method = name, METHODS[name]
        self.backend, self.options = backend, {**self.method.options, **options}
        self.params = make_weights(dtype=dtype) if params is None else params
        self.opt = self.method.make(self.params, **self.options, backend=backend)
        self.closure = Closure(self.params, self.method.deterministic)

    def steps(self, count=STEPS):
        for _ in range(count):
            self.opt.step(self.closure)
            self.closure.t += 1
        return self

    def follow(self, opt, t):
        """Go on with another optimizer, from step t."""
        self.opt, self.params = opt, [p for g in opt.param_groups for p in g["params"]]
        self.closure = Closure(self.params, self.method.deterministic)
        self.closure.t = t
        return self

    def resumed(self):
        """Return a run of other weights with the same values, loaded from this run's state dict."""
        params = [torch.nn.Parameter(x) for x in values(self.params)]
        other = Run(self.name, self.backend, params=params, **self.method.unlike)
        other.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))
        other.closure.t = self.closure.t
        return other

    def searches(self):
        """Return whether each step was a search."""
        return [(t, False) in self.closure.calls for t in range(self.closure.t)]

    @property
    def group(self):
        return self.opt.param_groups[0]

    def snapshot(self):
        return snapshot(self.opt)


class Outcome(NamedTuple):
    """Weights after the steps, the numbers learned, and the largest number met."""

    xs: list
    learned: dict
    largest: float


def start(dtype):
    return [p.detach().numpy().astype(NUMPY[dtype]) for p in make_weights(dtype=dtype)]


def at(xs, t, dtype):
    """Return the loss and the gradients, rounded to the dtype."""
    found = [loss_and_gradient(torch.from_numpy(x), t) for x in xs]
    return sum(f for f, _ in found), [g.to(dtype).numpy() for _, g in found]


def dot(a, b):
    return sum(float(u.ravel() @ v.ravel()) for u, v in zip(wide(a), wide(b), strict=True))


def wide(vector):
    return [v.astype(np.float64) for v in vector]


def size(*vectors):
    return max(abs(v).max() for vector in vectors for v in vector)


def outcome(xs, largest, dtype, **learned):
    return Outcome([torch.from_numpy(x) for x in xs], learned, torch.tensor(largest, dtype=dtype))


def adarem_oracle(dtype, run, **options):
    o = {**run.options, **options}
    kind, xs, largest = NUMPY[dtype], start(dtype), 0.0
    ms = [np.zeros_like(x) for x in xs]
    for t in range(run.closure.t):
        _, gs = at(xs, t, dtype)
        largest = max(largest, size(xs, ms, gs))
        lam_t = kind(o["lam"] ** (t + 1))
        for i, (x, m, g) in enumerate(zip(xs, ms, gs, strict=True)):
            b = np.sign(g) * m / (abs(m).max() + kind(o["eps"]))
            xs[i] = x - kind(o["lr"]) * ((1 + lam_t * b) * g + kind(o["weight_decay"]) * x)
            ms[i] = kind(o["beta"]) * m + kind(1 - o["beta"]) * g
    return outcome(xs, largest, dtype)


def extrapolated_oracle(dtype, run, **options):
    o = {k: NUMPY[dtype](v) for k, v in {**run.options, **options}.items()}
    xs, largest = start(dtype), 0.0
    gs = ds = [np.zeros_like(x) for x in xs]
    for t in range(run.closure.t):
        halves = [x - o["extrapolation"] * o["lr"] * g for x, g in zip(xs, gs, strict=True)]
        _, gs = at(halves, t, dtype)
        rows = zip(ds, gs, xs, strict=True)
        ds = [o["momentum"] * d + (g + o["weight_decay"] * x) for d, g, x in rows]
        xs = [x - o["lr"] * d for x, d in zip(xs, ds, strict=True)]
        largest = max(largest, size(xs, gs, ds))
    return outcome(xs, largest, dtype)


def autogd_oracle(dtype, run, **options):
    o = {**run.options, **options}
    kind, xs, largest, gamma = NUMPY[dtype], start(dtype), 0.0, o["lr"]
    for _ in range(run.closure.t):
        f, gs = at(xs, 0, dtype)
        largest = max(largest, size(xs, gs))
        accepted = {}
        for c in (gamma / 2, gamma, 2 * gamma):
            there = [x - kind(c) * g for x, g in zip(xs, gs, strict=True)]
            f_there, _ = at(there, 0, dtype)
            if f_there <= f - o["eta"] * c * dot(gs, gs):
                accepted[f_there] = c, there
        if accepted:
            gamma, xs = accepted[min(accepted)]
        else:
            gamma /= 4
    return outcome(xs, largest, dtype, lr=gamma)


def cgq_oracle(dtype, run, searches=None, errors=None, **options):
    """The first parabola through a quadratic is exact, so a search takes two more losses.

    Args:
        searches: whether each step is a search; None: as in the run.
        errors: a generator of relative errors of the losses.
    """
    o = {**run.options, **options}
    kind, xs, largest, last = NUMPY[dtype], start(dtype), 0.0, None
    ps = [np.zeros_like(x) for x in xs]
    lr, momentum = o["lr"], o["momentum"]

    def measured(points, t):
        f, gs = at(points, t, dtype)
        return f * (1 + SUM_RTOL * errors.choice([-1, 1]) if errors else 1), gs

    for t, search in enumerate(run.searches() if searches is None else searches):
        f, gs = measured(xs, t)
        beta, step = momentum, lr
        if search and last is not None:
            turn = [a - b for a, b in zip(wide(gs), wide(last), strict=True)]
            beta = min(MAX_BETA, max(0.0, dot(gs, turn) / dot(last, last)))
            momentum = (momentum + beta) / 2
        rows = zip(ps, gs, xs, strict=True)
        ps = [kind(beta) * p + (g + kind(o["weight_decay"]) * x) for p, g, x in rows]
        if search:
            last, slope, trial = gs, -dot(gs, ps), o["trial"]
            there, _ = measured([x - kind(trial) * p for x, p in zip(xs, ps, strict=True)], t)
            a = (there - f - slope * trial) / trial**2
            step = min(o["bound"], -slope / (2 * a))
            lr = (lr + step) / 2
        xs = [x - kind(step) * p for x, p in zip(xs, ps, strict=True)]
        largest = max(largest, size(xs, gs, ps))
    return outcome(xs, largest, dtype, lr=lr, momentum=momentum)


def worst(found, expected):
    """Return the largest difference."""
    return max(
        float((a.detach().double() - b.double()).abs().max())
        for a, b in zip(found, expected, strict=True)
    )


class Method(NamedTuple):
    """An optimizer as it is tested.

    Args:
        make: the class.
        options: those that it has unless a test gives others.
        oracle: called with a dtype, a finished run, and options in place of the run's.
        roundings: of one step, of numbers no larger than the largest met; earlier ones' remains
            included.
        variants: name → options with which it is held against its oracle.
        mutant: options of the oracle alone, from which a difference must be seen.
        state: entry of a weight's state → whether it has the weight's dtype.
        refused: options that are out of range.
        unlike: options of an optimizer that then loads a state dict.
        searches: options with which each step evaluates the loss at trial points; None: never.
        deterministic: whether every step must have the same objective.
    """

    make: type
    options: dict[str, Any]
    oracle: Callable
    roundings: float
    variants: dict[str, dict[str, Any]]
    mutant: dict[str, Any]
    state: dict[str, bool]
    refused: tuple[tuple[str, Any], ...]
    unlike: dict[str, Any]
    searches: dict[str, Any] | None = None
    deterministic: bool = False


METHODS = {
    "AdaRem": Method(
        AdaRem,
        {"lr": 0.05, "beta": 0.9, "lam": 0.98, "weight_decay": 0.02, "eps": 1e-8},
        adarem_oracle,
        16,
        {"all": {}},
        {"lam": 0.97},
        {"exp_avg": False},
        (
            *(("lr", -1.0), ("lr", math.nan), ("beta", 1.0), ("lam", 1.1)),
            *(("weight_decay", -0.1), ("eps", 0.0)),
        ),
        {"lr": 0.4, "beta": 0.5},
    ),
    "CGQ": Method(
        CGQ,
        {
            **{"lr": 0.02, "momentum": 0.7, "weight_decay": 0.02, "probability": 0.5},
            **{"trial": 0.02, "bound": 0.5},
        },
        cgq_oracle,
        # Momentum adds up to 1/(1 − 0.9) of what earlier steps have left.
        8 / (1 - 0.9),
        {"all": {}, "no decay": {"weight_decay": 0.0}, "no searches": {"probability": 0.0}},
        {"momentum": 0.69},
        {"momentum_buffer": False, "last_gradient": True},
        (
            *(("lr", -1.0), ("momentum", 1.0), ("weight_decay", -0.1), ("probability", 1.5)),
            *(("trial", 0.0), ("bound", math.inf), ("seed", -1), ("seed", 0.5)),
        ),
        {"lr": 1.0, "seed": 5},
        {"probability": 1.0},
    ),
    "ExtrapolatedSGD": Method(
        ExtrapolatedSGD,
        {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.02, "extrapolation": 1.5},
        extrapolated_oracle,
        8 / (1 - 0.8),
        {
            "all": {},
            "no momentum": {"momentum": 0.0},
            "no decay": {"weight_decay": 0.0},
            "plain": {"momentum": 0.0, "weight_decay": 0.0},
        },
        {"extrapolation": 1.49},
        {"last_gradient": False, "momentum_buffer": False},
        (
            *(("lr", -1.0), ("lr", math.inf), ("momentum", 1.0)),
            *(("weight_decay", -0.1), ("extrapolation", -0.5)),
        ),
        {"lr": 1.0},
    ),
    "AutoGD": Method(
        AutoGD,
        {"lr": 1.0, "eta": 1e-4},
        autogd_oracle,
        8,
        {"all": {}, "from below": {"lr": 1e-4}, "from above": {"lr": 100.0}},
        {"eta": 0.6},
        {},
        (("lr", 0.0), ("lr", math.inf), ("eta", 1.0), ("eta", 0.0)),
        {"lr": 7.0},
        {},
        deterministic=True,
    ),
}
SEARCHING = [name for name, method in METHODS.items() if method.searches is not None]
NEED_CLOSURE = [name for name in METHODS if name != "AdaRem"]


def tolerances(run):
    """Return the oracle's outcome in float64, and how far weights and learned numbers may be off.

    Where losses decide by how much weights move, twice what losses that are off by the rounding of
    their sums make of the same steps is added.
    """
    expected = run.method.oracle(torch.float64, run)
    atol = dict.fromkeys(expected.learned, 0.0)
    moved = 0.0
    if run.name == "CGQ" and any(run.searches()):
        for seed in range(8):
            off = cgq_oracle(torch.float64, run, errors=np.random.default_rng(seed))
            moved = max(moved, 2 * worst(off.xs, expected.xs))
            for name, value in expected.learned.items():
                atol[name] = max(atol[name], 2 * abs(off.learned[name] - value))
    atol["xs"] = moved + run.closure.t * run.method.roundings * ulp(expected.largest)
    return expected, atol


def sharded(name, backend, **options):
    """Return the weights, whole, and the lr after steps of weights that are sharded over ranks.

    Where there are no ranks the weights are plain ones.
    """
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    params = make_weights(((4,), (6, 3)), torch.float64)
    if torch.distributed.is_initialized():
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        shards = [distribute_tensor(p.detach(), mesh, [Shard(0)]) for p in params]
        params = [torch.nn.Parameter(shard) for shard in shards]
    run = Run(name, backend, params=params, **options).steps(FEW)
    return [whole(p).clone() for p in params], run.group["lr"]
