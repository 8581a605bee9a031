"""What the tests of CGQ train: a noisy quadratic, and the same runs by its formula in NumPy."""

import math

import numpy
import torch
from cases import (
    STEPS,
    SUM_RTOL,
    make_weights,
    noise,
    ulp,
    values,
)

from mechanic_fused.tuners.cgq import CGQ

OPTIONS = {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.02, "probability": 0.5}
TRIAL, BOUND = 0.02, 0.5
NUMPY = {torch.float64: numpy.float64, torch.float32: numpy.float32}
# A step is 8 roundings of numbers no larger than the largest among x, g and p; momentum adds up to
# 1/(1 − 0.9) of them, and the quadratic shrinks what earlier steps have left.
ROUNDINGS = 8 / (1 - 0.9)


def slopes_of(x, t):
    """½Σd(x − o)² + ⟨n, x⟩ in float64, and its gradient in x's dtype."""
    i = torch.arange(x.numel()).reshape(x.shape)
    d, o = 1 + i % 5, i.double().cos()
    n = 0.3 * noise(x, torch.Generator().manual_seed(t))
    away = x.detach().double() - o
    return float((d * away**2).sum() / 2 + (n * x.detach().double()).sum()), d * away + n


class Closure:
    """The quadratic of step t, as torch's LBFGS would call it."""

    def __init__(self, params, lost=()):
        self.params, self.t, self.lost = params, 0, lost
        self.calls = []
        self.seen = []

    def __call__(self):
        self.calls.append((self.t, torch.is_grad_enabled()))
        self.seen.append(values(self.params))
        found = [slopes_of(p, self.t) for p in self.params]
        for p, (_, g) in zip(self.params, found, strict=True):
            p.grad = g.to(p.dtype) if torch.is_grad_enabled() else None
        loss = sum(loss for loss, _ in found)
        # Of the losses without gradients only.
        lost = self.t in self.lost and not torch.is_grad_enabled()
        return torch.tensor(math.nan if lost else loss, dtype=torch.float64)

    def searches(self):
        return [(t, False) in self.calls for t in range(self.t)]


def train(opt, params, steps=STEPS, first=0, **options):
    closure = Closure(params, **options)
    for closure.t in range(first, first + steps):
        opt.step(closure)
    closure.t += 1
    return closure


def trained(backend="auto", dtype=torch.float64, steps=STEPS, **options):
    params = make_weights(dtype=dtype)
    opt = CGQ(params, **{**OPTIONS, **options}, backend=backend)
    return params, opt, train(opt, params, steps)


def oracle(dtype, searches, errors=None, lr=0.02, momentum=0.7, weight_decay=0.02):
    """Weights, lr and momentum after steps in plain arithmetic of one dtype.

    The quadratic's first fit is exact, so a search always takes it: two more losses.

    Args:
        searches: of each step, whether it is a search.
        errors: draws relative errors of the losses.
    """
    kind = NUMPY[dtype]
    xs = [p.detach().numpy().astype(kind) for p in make_weights(dtype=dtype)]
    bufs = [numpy.zeros_like(x) for x in xs]
    last, largest = None, 0.0

    def at(points, t):
        found = [slopes_of(torch.from_numpy(x), t) for x in points]
        off = 1 + SUM_RTOL * errors.choice([-1, 1]) if errors else 1
        return sum(f for f, _ in found) * off, [g.numpy().astype(kind) for _, g in found]

    def dot(a, b):
        return sum(float(u.ravel() @ v.ravel()) for u, v in zip(wide(a), wide(b), strict=True))

    def wide(vector):
        return [v.astype(numpy.float64) for v in vector]

    for t, search in enumerate(searches):
        here, gs = at(xs, t)
        beta, step = momentum, lr
        if search and last is not None:
            beta = min(
                0.8,
                max(
                    0.0,
                    dot(gs, wide([a - b for a, b in zip(wide(gs), wide(last), strict=True)]))
                    / dot(last, last),
                ),
            )
            momentum = (momentum + beta) / 2
        pairs = zip(bufs, gs, xs, strict=True)
        bufs = [kind(beta) * b + (g + kind(weight_decay) * x) for b, g, x in pairs]
        if search:
            last = gs
            slope = -dot(gs, bufs)
            there, _ = at([x - kind(TRIAL) * p for x, p in zip(xs, bufs, strict=True)], t)
            a = (there - here - slope * TRIAL) / TRIAL**2
            step = min(BOUND, -slope / (2 * a))
            lr = (lr + step) / 2
        xs = [x - kind(step) * p for x, p in zip(xs, bufs, strict=True)]
        largest = max([largest, *(abs(v).max() for v in xs + gs + bufs)])
    return [torch.from_numpy(x) for x in xs], lr, momentum, torch.tensor(largest, dtype=dtype)


def worst(found, expected):
    return max(
        float((a.detach().double() - b.double()).abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def spread(searches, **options):
    """The oracle, and how far from it ours may be in weights, lr and momentum.

    Twice what losses that are off by the rounding of their sums make of the same steps, and the
    roundings of the steps themselves.
    """
    *expected, largest = oracle(torch.float64, searches, **options)
    off = [
        oracle(torch.float64, searches, numpy.random.default_rng(i), **options) for i in range(8)
    ]
    weights = 2 * max(worst(xs, expected[0]) for xs, *_ in off)
    rates = [2 * max(abs(found[i] - expected[i]) for found in off) for i in (1, 2)]
    return expected, [weights + STEPS * ROUNDINGS * ulp(largest), *rates]
