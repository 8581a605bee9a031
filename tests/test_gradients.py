"""Gradients scaled, overflowing, not finite, enormous or tiny, and whose they are."""

import weakref

import pytest
import torch
from cases import (
    FEW,
    LEARNED,
    LONG,
    QUICK,
    STEPS,
    TINY_EPS,
    SmallNet,
    assert_same,
    assert_within,
    batch,
    build,
    differs,
    gradients,
    loss_of,
    make_weights,
    run,
    set_gradients,
    snapshot,
    ulp,
    values,
)

from mechanic_fused import (
    MechanicAdamW,
)

# GradScaler

LOSS_SCALE = 2.0**16
ENORMOUS = 1e38


def scaled_gradients(params, t, scaler):
    scale = scaler.get_scale()
    for p, g in zip(params, gradients(params, t), strict=True):
        p.grad = g * scale


def make_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
    scaler.scale(torch.ones(()))  # makes its state
    return scaler


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [None, True], ids=["", "fused=True"])
@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
def test_grad_scaler_changes_no_bit(road, base, fused, unscale):
    plain = make_weights()
    run(build(road, base, plain, fused=fused, **QUICK), plain, FEW)
    params, scaler = make_weights(), make_scaler()
    opt = build(road, base, params, fused=fused, **QUICK)
    for t in range(FEW):
        scaled_gradients(params, t, scaler)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    # A power of two: unscaling is exact.
    assert_same(values(params), values(plain))


@pytest.mark.parametrize("steps", [0, FEW])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [None, True], ids=["", "fused=True"])
def test_an_overflow_step_is_skipped_whole(road, fused, unscale, steps):
    params, scaler = make_weights(), make_scaler()
    opt = build(road, "adamw", params, fused=fused, **QUICK)
    run(opt, params, steps)
    before, scale = snapshot(opt), opt.scale
    set_gradients(params, steps)
    params[1].grad[2, 3] = torch.inf
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    after = snapshot(opt)
    assert_same(after["weights"], before["weights"])
    assert_same(opt.scale, scale)
    if steps:  # at the start state may be made
        assert_same(after["optimizer"], before["optimizer"])
    assert scaler.get_scale() < LOSS_SCALE
    assert opt.nonfinite_steps == 0
    twin = make_weights()
    run(build(road, "adamw", twin, **QUICK), twin, steps)
    other = build(road, "adamw", twin, **QUICK)
    other.load_state_dict(opt.state_dict())
    for t in range(steps, steps + FEW):
        set_gradients(twin, t)
        other.step()
        scaled_gradients(params, t, scaler)
        scaler.step(opt)
        scaler.update()
    assert_same(values(params), values(twin))


def test_grad_scaler_with_an_option_that_is_not_fused():
    """amsgrad takes the general road, where the base must not unscale a second time."""
    found = []
    for scaler in (None, make_scaler()):
        params = make_weights()
        opt = MechanicAdamW(params, amsgrad=True, fused=scaler is not None, **QUICK)
        for t in range(FEW):
            if scaler is None:
                run(opt, params, 1, first=t)
            else:
                scaled_gradients(params, t, scaler)
                scaler.step(opt)
                scaler.update()
        assert opt.road.startswith("general")
        found.append([opt.state[p]["delta"] for p in params])
    for one, other in zip(*found, strict=True):
        # torch's fused Adam rounds otherwise than its plain one: an ulp of x in each step's move.
        assert_within(one, other, 2 * FEW * ulp(*params))


def test_without_fused_the_scaler_unscales_by_itself():
    assert not getattr(MechanicAdamW(make_weights()), "_step_supports_amp_scaling", False)
    assert MechanicAdamW(make_weights(), fused=True)._step_supports_amp_scaling


# Gradients that are not finite, enormous or tiny


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("at", [0, FEW])
def test_a_step_that_is_not_finite_costs_one_step_of_learning(road, at, bad):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, at)
    before, scale = loss_of(make_weights()), opt.scale
    set_gradients(params, at)
    params[0].grad[0] = bad
    spared = opt.state[params[0]]["delta"][0].clone() if at else None
    opt.step()
    assert_same(opt.scale, scale)
    assert opt.nonfinite_steps == 1
    if at:
        assert differs(opt.state[params[0]]["delta"][0], spared)  # momentum goes on at g = 0
    run(opt, params, LONG, first=at + 1)
    assert differs(opt.scale, scale)
    assert opt.nonfinite_steps == 1
    assert loss_of(params) < LEARNED * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_the_size_of_gradients_does_not_matter_to_the_scale(road, size, dtype):
    """With lr, ε and s_init to match, a run is the same at any size of the gradients."""
    tuner = {"variant": "optax", "tuner_eps": TINY_EPS, **QUICK}
    found = []
    for factor in (1.0, size):
        params = make_weights(dtype=dtype)
        opt = build(road, "sgd", params, lr=0.05 / factor, **tuner)
        start = values(params)
        for t in range(FEW):
            for p, g in zip(params, gradients(start, t), strict=True):
                p.grad = (g.double() * factor).to(dtype)
            opt.step()
        assert opt.nonfinite_steps == 0
        found.append(opt.scale)
    # One rounding of each gradient and each product at the weights' width.
    torch.testing.assert_close(*found, rtol=STEPS * torch.finfo(dtype).eps, atol=0)
    assert differs(found[0], build(road, "sgd", make_weights(), **QUICK).scale)


# Whose they are


def test_gradients_do_not_outlive_zero_grad(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    alive = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    assert [ref() for ref in alive] == [None] * len(params)


def test_gradients_are_left_as_they_were(road):
    """They are the user's: for logging, or to go on accumulating."""
    params = make_weights()
    opt = build(road, "adamw", params, maximize=True, weight_decay=0.1, **QUICK)
    for t in range(FEW):
        set_gradients(params, t)
        params[0].grad[0] = torch.nan if t == 1 else 1.0
        grads = [p.grad for p in params]
        before = values(grads)
        opt.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert_same(values(grads), before)


def test_gradients_zeroed_in_place_are_as_good_as_new_ones(road):
    found = []
    for set_to_none in (False, True):
        model = SmallNet()
        opt = build(road, "adamw", model.parameters(), **QUICK)
        for t in range(STEPS):
            z, y = batch(t)
            opt.zero_grad(set_to_none=set_to_none)
            (model(z) - y).square().mean().backward()
            opt.step()
        found.append(values(model.parameters()))
    assert_same(found[1], found[0])
