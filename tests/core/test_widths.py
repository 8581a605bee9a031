"""Narrow weights on every backend err no more than the oracle's formulas in plain float32."""

import numpy as np
import pytest
import torch
from support import beside_oracle
from support.beside_oracle import arrays, noisy_gradients
from support.cases import CASES, STEPS, build
from support.oracle import Oracle

# A backend may err at most twice as much as the plainest numpy program of the same width.
WIDTH_FACTOR = 2
# One rounding of a float32 coefficient (lr, a bias correction) shifts every u, and so Σs, by this.
FLOAT32_ROUNDING = 2.0**-24


def rounding(dtype):
    """Return array → the array rounded to `dtype`, of the same width: numpy has no bfloat16."""
    return lambda x: torch.from_numpy(x).to(dtype).to(torch.from_numpy(x).dtype).numpy()


def check_width(backend, base, dtype, size=1.0, **options):
    """Take STEPS steps of ours, of the oracle, and of the oracle's formulas in plain float32.

    All three get the same rounded gradients and start each step from the weights that ours wrote. S
    and Δ of ours may err WIDTH_FACTOR times as much as plain's, and each of our weights must be the
    rounding of a number that near the exact one.
    """
    options = {**beside_oracle.TUNER, **options}
    store = rounding(dtype)
    weights = [store(x) for x in beside_oracle.start_weights()]
    params = beside_oracle.parameters(weights, dtype)
    opt = build(backend, base, params, **options)
    exact = Oracle(weights, base, round_x=store, **options)
    plain = Oracle(weights, base, round_x=store, dtype=np.float32, **options)
    s_errors, delta_errors, plain_x_error = [], [], 0.0
    for t in range(1, STEPS + 1):
        grads = [store(size * g) for g in noisy_gradients(exact.x, t)]
        beside_oracle.give_arrays(params, grads)
        opt.step()
        exact.step(grads)
        plain.step(grads)
        scales = np.concatenate([opt.scale.numpy(), plain.scale])
        s_errors.append(np.abs(scales / exact.scale - 1))
        delta, plain_delta = (np.concatenate([d.ravel() for d in o.delta]) for o in (exact, plain))
        own = np.concatenate([opt.state[p]["delta"].double().numpy().ravel() for p in params])
        delta_errors.append(
            [np.linalg.norm(d - delta) / np.linalg.norm(delta) for d in (own, plain_delta)]
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
        own, of_plain = np.max(errors, axis=0)
        assert own <= WIDTH_FACTOR * of_plain + FLOAT32_ROUNDING
    moved = max(np.abs(x - x0).max() for x, x0 in zip(exact.x, weights, strict=True))
    assert moved > beside_oracle.MOVED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["dampening", "nesterov", "adam l2", "adamw betas", "lion decay"])
def test_narrow_weights_err_no_more_than_plain_float32(backend, case, dtype):
    base, options = CASES[case]
    check_width(backend, base, dtype, **options)


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_of_float32_gradients_neither_overflow_nor_vanish(backend, size):
    options = {"lr": 0.05 / size, "tuner_eps": 1e-40, "s_init": 1e-2, "s_decay": 1.0}
    check_width(backend, "sgd", torch.float32, size, **options)
