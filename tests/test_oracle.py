"""Every backend against the oracle where the authors' packages have no answer."""

import functools

import numpy as np
import pytest
import torch
from cases import FUSED, build
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

from mechanic_fused import MechanicAdamW

# float64 against float64 over 20 steps: a few hundred roundings, sums in another order.
FLOAT64_RTOL = 1e-12


@pytest.fixture
def on_road(road):
    """on_road(base, params, **options) → an optimizer of ours on a backend or the general road."""
    return functools.partial(build, road)


def assert_agrees(opt, params, oracle):
    np.testing.assert_allclose(opt.scale.numpy(), oracle.scale, rtol=FLOAT64_RTOL, atol=0)
    for ours, x in zip(arrays(params), oracle.x, strict=True):
        np.testing.assert_allclose(ours, x, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)


def walk_with_oracle(opt, params, oracle, edit=lambda t, gradients: gradients, sign=1.0):
    """STEPS steps of both on the gradients at the oracle's weights as `edit` changes them, compared
    after each."""
    first = [x.copy() for x in oracle.x]
    for t in range(1, STEPS + 1):
        gradients = edit(t, noisy_gradients(oracle.x, t, sign))
        set_gradients(params, gradients)
        opt.step()
        oracle.step(gradients)
        assert_agrees(opt, params, oracle)
    assert min(np.abs(x - x0).max() for x, x0 in zip(oracle.x, first, strict=True)) > MOVED


@pytest.mark.parametrize("variant", ["scaled", "optax", "paper", "pytorch"])
@pytest.mark.parametrize("case", CASES)
def test_each_base_and_variant_is_the_oracle(backend, case, variant):
    base, options = CASES[case]
    options = {**options, **TUNER, "variant": variant}
    params = parameters(start_weights())
    opt = FUSED[base](params, backend=backend, **options)
    sign = -1.0 if options.get("maximize") else 1.0
    walk_with_oracle(opt, params, Oracle(start_weights(), base, **options), sign=sign)


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("scale", ["global", "parameter"])
@pytest.mark.parametrize("variant", ["scaled", "optax"])
def test_a_schedule_tames_the_scale_of_variant_scaled(road, variant, scale, kind):
    """Up from a tenth, then down to 0: s takes that part of each move, or all with "optax"."""
    options = {**TUNER, "variant": variant, "scale": scale}
    params = parameters(start_weights())
    lr = 2.0 if kind == "float" else torch.tensor(2.0, dtype=torch.float64)
    opt = build(road, "adamw", params, lr=lr, **options)
    oracle = Oracle(start_weights(), "adamw", lr=2.0, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, pace_of)
    for t in range(1, STEPS + 1):
        gradients = noisy_gradients(oracle.x, t)
        set_gradients(params, gradients)
        opt.step()
        oracle.step(gradients, pace=pace_of(t - 1))
        schedule.step()
        assert_agrees(opt, params, oracle)
    rested = opt.scale.clone()
    for t in range(STEPS + 1, STEPS + 4):
        set_gradients(params, noisy_gradients(oracle.x, t))
        opt.step()
    assert torch.equal(rested, opt.scale) == (variant == "scaled")


def pace_of(t):
    return min((t + 1) / 10, max(0.0, (STEPS - t) / 10), 1.0)


def test_tuner_options_reach_the_tuner(backend):
    options = {
        "lr": 1.0,
        "s_init": 0.02,
        "s_decay": 0.5,
        "tuner_eps": 1e-2,
        "tuner_betas": (0.5, 0.95),
    }
    params = parameters(start_weights())
    opt = MechanicAdamW(params, backend=backend, **options)
    walk_with_oracle(opt, params, Oracle(start_weights(), "adamw", **options))


@pytest.mark.parametrize("scale", ["global", "group", "parameter"])
def test_groups_and_scales_are_the_oracle(on_road, scale):
    def groups(weights):
        return [
            {"params": weights[:1], "lr": 1.0, "weight_decay": 0.1},
            {"params": weights[1:], "lr": 0.5, "betas": (0.7, 0.9)},
        ]

    params = parameters(start_weights())
    opt = on_road("adamw", groups(params), scale=scale, **TUNER)
    oracle = Oracle(groups(start_weights()), "adamw", scale=scale, **TUNER)
    assert opt.scale.shape == oracle.scale.shape
    walk_with_oracle(opt, params, oracle)


# Step → the weights without a gradient at it. At step 6 none has one.
ABSENT = {1: {2}, 2: {2}, 5: {0, 3}, 6: {0, 1, 2, 3}, 7: {1}, 11: {0, 1, 2}}


@pytest.mark.parametrize("scale", ["global", "parameter"])
@pytest.mark.parametrize("case", ["sgd", "dampened", "adamw", "lion"])
def test_gradients_that_come_and_go(on_road, case, scale):
    def edit(t, gradients):
        return [None if i in ABSENT.get(t, ()) else g for i, g in enumerate(gradients)]

    base, options = CASES[case]
    options = {**options, **TUNER, "scale": scale}
    params = parameters(start_weights())
    opt = on_road(base, params, **options)
    walk_with_oracle(opt, params, Oracle(start_weights(), base, **options), edit)


@pytest.mark.parametrize("scale", ["global", "parameter"])
@pytest.mark.parametrize("at", [{1: np.nan}, {5: np.nan, 6: np.inf, 12: -np.inf}])
@pytest.mark.parametrize("case", ["dampened", "adamw", "lion"])
def test_nonfinite_gradients_cost_their_own_element_and_step(on_road, case, at, scale):
    scales = {}

    def edit(t, gradients):
        scales[t] = opt.scale.clone()
        if t in at:
            gradients[3][[0, 4097]] = at[t]
        return gradients

    base, options = CASES[case]
    options = {**options, **TUNER, "scale": scale}
    params = parameters(start_weights())
    opt = on_road(base, params, **options)
    oracle = Oracle(start_weights(), base, **options)
    walk_with_oracle(opt, params, oracle, edit)
    assert int(opt.nonfinite_steps) == oracle.nonfinite_steps == len(at)
    row = 3 if scale == "parameter" else 0
    for t in at:
        assert scales[t + 1][row] == scales[t][row]
        assert scale == "global" or t == 1 or (scales[t + 1] != scales[t])[:row].all()


def test_zero_gradients_change_nothing_at_the_start_and_are_a_step_later(on_road):
    first_informative, zero_again = 4, 9

    def edit(t, gradients):
        if t < first_informative:
            return [-np.zeros_like(g) if t == 2 else np.zeros_like(g) for g in gradients]
        return [np.zeros_like(g) for g in gradients] if t == zero_again else gradients

    options = {"lr": 1.0, "weight_decay": 0.05, **TUNER}
    params = parameters(start_weights())
    opt = on_road("adamw", params, **options)
    walk_with_oracle(opt, params, Oracle(start_weights(), "adamw", **options), edit)
