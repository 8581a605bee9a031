"""Narrow weights on every backend err no more than the oracle's formulas in plain float32."""

import numpy as np
import pytest
import torch
from cases import FUSED
from oracle import Oracle
from oracle_cases import (
    CASES,
    MOVED,
    STEPS,
    TUNER,
    arrays,
    noisy_gradients,
    parameters,
    set_gradients,
    start_weights,
)

from mechanic_fused import MechanicSGD

# A backend may err at most twice as much as the plainest numpy program of the same width.
WIDTH_FACTOR = 2
# One rounding of a float32 coefficient (lr, a bias correction) shifts every u, and so Σs, by this.
FLOAT32_ROUNDING = 2.0**-24


def rounding(dtype):
    """numpy in, rounded to `dtype`, numpy of the same width out: bfloat16 is none of numpy's."""
    return lambda x: torch.from_numpy(x).to(dtype).to(torch.from_numpy(x).dtype).numpy()


def assert_width(opt, params, base, options, dtype, size=1.0):
    """STEPS steps of ours, of the oracle, and of the oracle's formulas in plain float32, all three
    from the same rounded gradients and the weights that ours wrote.

    S and Δ of ours may err WIDTH_FACTOR times as much as plain's, and each of our weights must be
    the rounding of a number that near the exact one.
    """
    store = rounding(dtype)
    weights = [store(x) for x in start_weights()]
    exact = Oracle(weights, base, round_x=store, **options)
    plain = Oracle(weights, base, round_x=store, dtype=np.float32, **options)
    s_errors, delta_errors, plain_x_error = [], [], 0.0
    for t in range(1, STEPS + 1):
        gradients = [store(size * g) for g in noisy_gradients(exact.x, t)]
        set_gradients(params, gradients)
        opt.step()
        exact.step(gradients)
        plain.step(gradients)
        scales = np.concatenate([opt.scale.numpy(), plain.scale])
        s_errors.append(np.abs(scales / exact.scale - 1))
        delta = np.concatenate([d.ravel() for d in exact.delta])
        ours = np.concatenate([opt.state[p]["delta"].double().numpy().ravel() for p in params])
        plains = np.concatenate([d.ravel() for d in plain.delta])
        delta_errors.append(
            [np.linalg.norm(d - delta) / np.linalg.norm(delta) for d in (ours, plains)]
        )
        targets = [exact.unrounded(i) for i in range(len(params))]
        for i, target in enumerate(targets):
            plain_x_error = max(plain_x_error, np.abs(plain.unrounded(i) - target).max())
        margin = WIDTH_FACTOR * plain_x_error
        for i, (x, target) in enumerate(zip(arrays(params), targets, strict=True)):
            assert (store(target - margin) <= x).all()
            assert (x <= store(target + margin)).all()
            # The next step starts from what the model saw: a tie rounded otherwise is no error.
            exact.x[i], plain.x[i] = x.copy(), x.astype(np.float32)
    for errors in s_errors, delta_errors:
        ours, plains = np.max(errors, axis=0)
        assert ours <= WIDTH_FACTOR * plains + FLOAT32_ROUNDING
    assert max(np.abs(x - x0).max() for x, x0 in zip(exact.x, weights, strict=True)) > MOVED


WIDTHS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("case", ["dampened", "nesterov", "adam", "adamw", "lion"])
def test_narrow_weights_err_no_more_than_plain_float32(backend, case, dtype):
    base, options = CASES[case]
    options = {**options, **TUNER}
    params = parameters(start_weights(), dtype)
    opt = FUSED[base](params, backend=backend, **options)
    assert_width(opt, params, base, options, dtype)


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_of_float32_gradients_neither_overflow_nor_vanish(backend, size):
    options = {"lr": 0.05 / size, "tuner_eps": 1e-40, "s_init": 1e-2, "s_decay": 1.0}
    params = parameters(start_weights(), torch.float32)
    opt = MechanicSGD(params, backend=backend, **options)
    assert_width(opt, params, "sgd", options, torch.float32, size)
