"""Weights, gradients and steps for whoever steps beside the oracle."""

import numpy as np
import torch
from support.cases import RUNNING, STEPS, build, give
from support.oracle import Oracle
from support.running_oracle import RunningOracle

MOVED = 0.05
"""How far weights of size 1 must go, or a comparison of them shows nothing. The running form starts
with smaller steps, and a 100th of it is still far above a rounding."""

SHAPES = ((1,), (7,), (5, 13), (4099,))

TUNER = {"s_init": 1e-2, "s_decay": 0.1}
"""A start at which the weights move within STEPS steps, and a λ that shows."""

RTOL = 1e-12
"""Of float64 against float64: a few hundred roundings, sums in another order."""


def start_weights(shapes=SHAPES):
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape) for shape in shapes]


def noisy_gradients(weights, t, sign=1.0):
    """Return those of ½Σd(x − o)² with its noise at step t; `sign` = −1 to maximize."""
    rng = np.random.default_rng([2, t])
    out = []
    for x in weights:
        i = np.arange(x.size).reshape(x.shape)
        out.append(sign * ((1 + i % 5) * (x - np.cos(i)) + 0.3 * rng.standard_normal(x.shape)))
    return out


def parameters(weights, dtype=torch.float64):
    return [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in weights]


def give_arrays(params, grads):
    pairs = zip(params, grads, strict=True)
    give(params, [None if g is None else torch.tensor(g, dtype=p.dtype) for p, g in pairs])


def arrays(params):
    return [p.detach().double().numpy() for p in params]


class Beside:
    """An optimizer of ours and the oracle, with the same weights, groups and options.

    Args:
        laid_out: a weight's numbers → ours, which may be laid out otherwise.
    """

    def __init__(
        self,
        implementation,
        base="adamw",
        groups=list,
        lr=1.0,
        shapes=SHAPES,
        laid_out=lambda x: x,
        **options,
    ):
        running = options.get("variant") == RUNNING
        options = options if running else {**TUNER, **options}
        self.params = [
            torch.nn.Parameter(laid_out(p.detach())) for p in parameters(start_weights(shapes))
        ]
        self.opt = build(implementation, base, groups(self.params), lr=lr, **options)
        oracle = RunningOracle if running else Oracle
        self.oracle = oracle(groups(start_weights(shapes)), base, lr=float(lr), **options)

    def step(self, t, edit=lambda t, grads: grads, lr_factor=1.0, **loss):
        """Step on the gradients at the oracle's weights, as `edit` changes them, and compare."""
        grads = edit(t, noisy_gradients(self.oracle.x, t, -1.0 if self.oracle.maximize else 1.0))
        give_arrays(self.params, grads)
        self.opt.step(**loss)
        self.oracle.step(grads, lr_factor, **loss)
        np.testing.assert_allclose(self.opt.scale.numpy(), self.oracle.scale, rtol=RTOL, atol=0)
        for ours, x in zip(arrays(self.params), self.oracle.x, strict=True):
            np.testing.assert_allclose(ours, x, rtol=RTOL, atol=RTOL)

    def run(self, edit=lambda t, grads: grads, loss=None):
        """Take STEPS steps, in which all weights must move.

        Args:
            edit: changes the gradients of step t.
            loss: weights → the loss to be observed; None: none is.
        """
        start = [x.copy() for x in self.oracle.x]
        for t in range(1, STEPS + 1):
            observed = {} if loss is None else {"loss": loss(self.oracle.x)}
            self.step(t, edit, **observed)
        moved = MOVED / 100 if isinstance(self.oracle, RunningOracle) else MOVED
        assert min(np.abs(x - x0).max() for x, x0 in zip(self.oracle.x, start, strict=True)) > moved
