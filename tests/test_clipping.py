"""max_grad_norm= does in one pass what clip_grad_norm_ does before a step."""

import copy
import functools
import itertools

import pytest
import torch
from cases import FUSED, OPTIONS, QUICK, make_weights, set_gradients
from conftest import skip_unless_available

from mechanic_fused import MechanicAdamW, mechanize

STEPS = 6
RTOL = 2e-6
"""clip_grad_norm_ rounds its norm and its product to float32 once more than ours does."""

SUM = 8 * 2**-24
"""The processor adds 8 products in float32 before it goes on in float64."""


def make(road, base, **options):
    if road == "general":
        return functools.partial(mechanize(torch.optim.RAdam), **QUICK, **options)
    return functools.partial(FUSED[base], backend=road, **QUICK, **OPTIONS[base], **options)


def unscaled_norm(params):
    grads = [p.grad.double() for p in params if p.grad is not None]
    return torch.cat([g.flatten() for g in grads]).norm()


@pytest.mark.parametrize(
    "road, base",
    [*itertools.product(["reference", "cpp"], FUSED), ("general", "radam")],
)
@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_the_same_as_clipping_before_the_step(road, base, max_norm):
    if road == "cpp":
        skip_unless_available("cpp")
    params, others = make_weights(seed=0), make_weights(seed=0)
    inside = make(road, base, max_grad_norm=max_norm)(params)
    before = make(road, base)(others)
    for t in range(STEPS):
        set_gradients(params, t)
        set_gradients(others, t)
        gradients = [p.grad.clone() for p in params]
        norm = torch.nn.utils.clip_grad_norm_(others, max_norm)
        before.step()
        inside.step()
        assert float(inside.grad_norm) == pytest.approx(float(norm), rel=RTOL)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))
    torch.testing.assert_close(inside.scale, before.scale, rtol=1e-4, atol=0)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_norm_is_readable_without_clipping(backend):
    params = make_weights(seed=0)
    opt = MechanicAdamW(params, backend=backend)
    assert float(opt.grad_norm) == 0
    for t in range(2):
        set_gradients(params, t)
        expected = unscaled_norm(params)
        opt.step()
        assert float(opt.grad_norm) == pytest.approx(float(expected), rel=SUM)


def test_infinities_are_left_out_of_the_norm(road):
    params = make_weights(seed=0)
    opt = make(road, "adamw", max_grad_norm=1.0)(params)
    for t in range(3):
        set_gradients(params, t)
        if t == 2:
            params[0].grad.view(-1)[0] = 0.0
            expected = unscaled_norm(params)
            params[0].grad.view(-1)[0] = float("inf")
        opt.step()
    assert float(opt.grad_norm) == pytest.approx(float(expected), rel=SUM)
    assert opt.nonfinite_steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_is_divided_out_first(backend, fused):
    """max_norm is of the true gradients, whoever unscales them."""
    params, others = make_weights(seed=0), make_weights(seed=0)
    scaled = MechanicAdamW(params, max_grad_norm=1.0, backend=backend, fused=fused, **QUICK)
    plain = MechanicAdamW(others, max_grad_norm=1.0, backend=backend, **QUICK)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for t in range(STEPS):
        set_gradients(params, t)
        set_gradients(others, t)
        for p in params:
            p.grad *= 1024.0
        scaler.step(scaled)
        scaler.update()
        plain.step()
        assert float(scaled.grad_norm) == pytest.approx(float(plain.grad_norm), rel=SUM)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_the_bound_can_change_and_is_copied_along():
    params = make_weights(seed=0)
    opt = MechanicAdamW(params, max_grad_norm=1.0)
    assert copy.deepcopy(opt).max_grad_norm == 1.0
    opt.max_grad_norm = None
    set_gradients(params, 0)
    opt.step()
    assert float(opt.grad_norm) == pytest.approx(float(unscaled_norm(params)), rel=SUM)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_a_bad_bound_is_refused(bad):
    with pytest.raises(ValueError, match="max_grad_norm must be None or a finite number above 0"):
        MechanicAdamW(make_weights(), max_grad_norm=bad)
