"""max_grad_norm= does in the step what clip_grad_norm_ does before it."""

import copy
import itertools

import pytest
import torch
from support.cases import FUSED, OPTIONS, RADAM, Training, gradients, skip_unless_available

from mechanic_fused import MechanicAdamW

STEPS = 6
RTOL = 2e-6
"""clip_grad_norm_ rounds its norm and its product to float32 once more than ours does."""

SUM = 8 * 2**-24
"""The processor adds 8 products in float32 before it goes on in float64."""


def norm(grads):
    return float(torch.cat([g.double().flatten() for g in grads]).norm())


@pytest.mark.parametrize(
    ("implementation", "base"), [*itertools.product(["reference", "cpp"], FUSED), (RADAM, "adam")]
)
@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_it_does_what_clipping_before_the_step_does(implementation, base, max_norm):
    if implementation == "cpp":
        skip_unless_available("cpp")
    options = {} if implementation is RADAM else OPTIONS[base]
    inside = Training(implementation, base, max_grad_norm=max_norm, **options)
    before = Training(implementation, base, **options)
    for t in range(STEPS):
        grads = gradients(inside.params, t)
        inside.step([g.clone() for g in grads])
        assert all(torch.equal(p.grad, g) for p, g in zip(inside.params, grads, strict=True))
        for p, g in zip(before.params, gradients(before.params, t), strict=True):
            p.grad = g
        expected = torch.nn.utils.clip_grad_norm_(before.params, max_norm)
        before.opt.step()
        assert float(inside.opt.grad_norm) == pytest.approx(float(expected), rel=RTOL)
    torch.testing.assert_close(inside.opt.scale, before.opt.scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(inside.x, before.x, rtol=1e-5, atol=1e-6)


def test_the_norm_is_readable_without_clipping(backend):
    one = Training(backend)
    assert float(one.opt.grad_norm) == 0
    for t in range(2):
        expected = norm(gradients(one.params, t))
        one.run(1)
        assert float(one.opt.grad_norm) == pytest.approx(expected, rel=SUM)


def test_elements_that_are_not_finite_are_left_out_of_the_norm(train):
    one = train(max_grad_norm=1.0).run(2)
    grads = gradients(one.params, 2)
    grads[0][0] = 0.0
    expected = norm(grads)
    grads[0][0] = torch.inf
    one.step(grads)
    assert float(one.opt.grad_norm) == pytest.approx(expected, rel=SUM)
    assert one.opt.nonfinite_steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_the_norm_is_that_of_unscaled_gradients(backend, fused):
    """Whoever divides GradScaler's scale out."""
    scaled, plain = (Training(backend, max_grad_norm=1.0, fused=f) for f in (fused, None))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for t in range(STEPS):
        for p, g in zip(scaled.params, gradients(scaled.params, t), strict=True):
            p.grad = 1024.0 * g
        scaler.step(scaled.opt)
        scaler.update()
        plain.run(1)
        assert float(scaled.opt.grad_norm) == pytest.approx(float(plain.opt.grad_norm), rel=SUM)
    assert all(torch.equal(p, q) for p, q in zip(scaled.x, plain.x, strict=True))


def test_the_bound_is_copied_and_may_be_taken_away():
    one = Training(MechanicAdamW, max_grad_norm=1.0)
    assert copy.deepcopy(one.opt).max_grad_norm == 1.0
    one.opt.max_grad_norm = None
    expected = norm(gradients(one.params, 0))
    assert float(one.run(1).opt.grad_norm) == pytest.approx(expected, rel=SUM)
