"""Gradients scaled, overflowing, not finite, enormous or tiny, of other layouts, and unharmed."""

import weakref

import pytest
import torch
from support import cases
from support.cases import EXACT, FEW, RUNNING, STEPS, Training, assert_same, snapshot, values
from support.tensors import at_an_odd_address, cut, freed

from mechanic_fused import MechanicAdamW, MechanicSGD

LOSS_SCALE = 2.0**16


class Scaled:
    """A training whose steps are taken by a GradScaler."""

    def __init__(self, one):
        self.one = one
        self.scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
        self.scaler.scale(torch.ones(()))  # makes its state

    def run(self, steps, unscale=False, spoil=lambda grads: None):
        one = self.one
        for _ in range(steps):
            scale = self.scaler.get_scale()
            grads = [g * scale for g in cases.gradients(one.params, one.t)]
            spoil(grads)
            cases.give(one.params, grads)
            if unscale:
                self.scaler.unscale_(one.opt)
            self.scaler.step(one.opt)
            self.scaler.update()
            one.t += 1
        return self


unscaled_by_the_loop = pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
fused_or_not = pytest.mark.parametrize("fused", [None, True], ids=["", "fused=True"])


@unscaled_by_the_loop
@fused_or_not
@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
def test_a_grad_scaler_changes_no_bit(train, base, fused, unscale):
    """Its scale is a power of two, so that unscaling is exact."""
    one = train(base, fused=fused)
    Scaled(one).run(FEW, unscale)
    assert_same(one.x, train(base, fused=fused).run(FEW).x)


@pytest.mark.parametrize("steps", [0, FEW])
@unscaled_by_the_loop
@fused_or_not
def test_an_overflow_skips_the_whole_step(train, fused, unscale, steps):
    one = train(fused=fused).run(steps)
    before, scale = one.snapshot(), one.opt.scale
    scaled = Scaled(one)

    def spoil(grads):
        grads[1][2, 3] = torch.inf

    scaled.run(1, unscale, spoil)
    assert_same(one.x, before["weights"])
    assert_same(one.opt.scale, scale)
    if steps:  # at the start state may be created
        assert_same(one.snapshot(), before)
    assert scaled.scaler.get_scale() < LOSS_SCALE
    assert one.opt.nonfinite_steps == 0
    one.t = steps
    scaled.run(FEW)
    assert_same(one.x, train(fused=fused).run(steps + FEW).x)


def test_the_base_of_the_fallback_does_not_unscale_a_second_time():
    found = []
    for scaled in (False, True):
        one = Training(MechanicAdamW, amsgrad=True, fused=scaled)
        Scaled(one).run(FEW) if scaled else one.run(FEW)
        assert one.opt.implementation.startswith("fallback")
        found.append(one.states("delta"))
    for delta, other in zip(*found, strict=True):
        # torch's fused Adam rounds otherwise than its plain one: an ulp of x in each step's move.
        cases.assert_within(delta, other, 2 * FEW * cases.ulp(*one.params))


# Gradients that are enormous or tiny; for those that are not finite see test_oracle.py


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_the_size_of_gradients_does_not_matter_to_the_scale(train, size, dtype):
    """With lr, ε and s_init to match, a run is the same at any size of the gradients."""
    found = []
    for factor in (1.0, size):
        options = {"lr": 0.05 / factor, "variant": "optax", "tuner_eps": cases.TINY_EPS}
        one = train("sgd", dtype=dtype, **options)
        start, scale = one.x, one.opt.scale
        for t in range(FEW):
            one.step([(g.double() * factor).to(dtype) for g in cases.gradients(start, t)])
        assert one.opt.nonfinite_steps == 0
        found.append(one.opt.scale)
    # One rounding of each gradient and each product at the weights' width.
    torch.testing.assert_close(*found, rtol=STEPS * torch.finfo(dtype).eps, atol=0)
    assert cases.differs(found[0], scale)


# Gradients of other layouts and dtypes


def test_a_gradient_may_be_expanded(train):
    def grads(t):
        return torch.full((1,), 1.0 + t).expand(63)

    one, other = (train(shapes=[(63,)]) for _ in range(2))
    for t in range(FEW):
        one.step([grads(t)])
        other.step([grads(t).contiguous()])
    assert_same(one.x, other.x)


def test_a_gradient_may_be_negated_lazily():
    made = [Training(MechanicSGD, "sgd", shapes=[(4,)]) for _ in range(2)]
    for one, grad in zip(made, (torch._neg_view(torch.ones(4)), -torch.ones(4)), strict=True):
        one.step([grad])
    assert_same(*(one.states("delta") for one in made))


def test_a_gradient_may_be_wider_than_its_weight(train):
    """torch lets a weight ask for it."""
    one, other = (train(shapes=[(63,)], dtype=torch.bfloat16) for _ in range(2))
    one.params[0].grad_dtype = torch.float32
    for t in range(FEW):
        one.step([g.float() for g in cases.gradients(one.params, t)])
        assert one.params[0].grad.dtype is torch.float32
        other.run(1)
    assert_same(one.x, other.x)


SHAPE_CHANGES = {
    "data": lambda g: setattr(g, "data", g.new_ones(2)),
    "data, as many elements": lambda g: setattr(g, "data", g.new_ones(g.numel(), 1)),
    "set_": lambda g: g.set_(g.new_ones(2)),
    "resize_": lambda g: g.resize_(2),
}


@pytest.mark.parametrize("variant", [EXACT, RUNNING])
@pytest.mark.parametrize("change", SHAPE_CHANGES)
def test_a_gradient_whose_shape_was_changed_in_place_is_refused(train, variant, change):
    """Torch compares shapes when a gradient is assigned, and not later."""
    one = train(variant=variant).run(FEW)
    before = snapshot(one.opt), values(one.params)
    cases.give(one.params, cases.gradients(one.params, FEW))
    SHAPE_CHANGES[change](one.params[-1].grad)
    with pytest.raises(ValueError, match="a gradient must have its weight's shape and device"):
        one.opt.step()
    assert_same((snapshot(one.opt), values(one.params)), before)


STORAGES = {"freed": freed, "cut": cut, "at an odd address": at_an_odd_address}


@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize("variant", [RUNNING, EXACT])
def test_a_gradient_that_is_not_all_in_memory_is_refused(train, kind, variant):
    one = train(variant=variant).run(FEW)
    before = one.snapshot()
    grads = cases.gradients(one.params, FEW)
    grads[1] = STORAGES[kind](grads[1])
    with pytest.raises(ValueError, match="storage is missing, cut or misaligned"):
        one.step(grads)
    assert_same(one.snapshot(), before)
    one.step(cases.gradients(one.params, FEW))


@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize("when", [0, FEW])
def test_a_weight_that_is_not_all_in_memory_is_refused(train, kind, when):
    one = train().run(when)
    weight, kept = one.params[1], one.params[1].data
    grads = cases.gradients(one.params, FEW)
    weight.data = STORAGES[kind](kept)
    with pytest.raises(ValueError, match="storage is missing, cut or misaligned"):
        one.step(grads)
    weight.data = kept
    one.step(grads)


# Weights that only their owner gives gradients


@pytest.mark.parametrize("variant", [EXACT, RUNNING])
def test_a_weight_without_requires_grad_is_trained_where_it_is_given_gradients(train, variant):
    """As by torch's optimizers: master weights, offloading, evolution strategies."""
    one, other = (train(variant=variant) for _ in range(2))
    for p in other.params:
        p.requires_grad_(False)
    for _ in range(STEPS):
        one.run(1), other.run(1)
        other.opt.zero_grad()
    assert_same(one.x, other.x)


def test_a_weight_that_is_given_gradients_later_is_trained_from_then_on(train):
    one = train()
    given, frozen = one.params[0].requires_grad_(False), one.params[1].requires_grad_(False)
    start = values(one.params)
    grads = cases.gradients(one.params, 0)
    one.step([None, None, *grads[2:]])
    assert given not in one.opt.state or "x_ref" not in one.opt.state[given]
    for t in range(1, STEPS):
        grads = cases.gradients(one.params, t)
        one.step([grads[0], None, *grads[2:]])
    assert not torch.equal(given, start[0])
    assert torch.equal(frozen, start[1]) and not one.opt.state.get(frozen)


def test_the_third_step_without_any_gradient_says_so_once(train):
    one = train().run(1)
    one.opt.zero_grad()
    for _ in range(2):
        one.opt.step()
    with pytest.warns(UserWarning, match="no gradient 3 times in a row: expected p.grad"):
        one.opt.step()
    one.opt.step()
    one.run(1)
    one.opt.zero_grad()
    one.opt.step()


# Whose they are


def test_gradients_do_not_outlive_zero_grad(train):
    one = train().run(FEW)
    alive = [weakref.ref(p.grad) for p in one.params]
    one.opt.zero_grad()
    assert [ref() for ref in alive] == [None] * len(one.params)


def test_gradients_are_left_as_they_were(train):
    """They are the user's: for logging, or to go on accumulating."""
    one = train(maximize=True, weight_decay=0.1)
    for t in range(FEW):
        grads = cases.gradients(one.params, t)
        grads[0][0] = torch.nan if t == 1 else 1.0
        before = values(grads)
        one.step(grads)
        assert all(p.grad is g for p, g in zip(one.params, grads, strict=True))
        assert_same(values(grads), before)


def test_gradients_zeroed_in_place_are_as_good_as_new_ones(implementation):
    found = []
    for set_to_none in (False, True):
        model = cases.SmallNet()
        opt = cases.build(implementation, "adamw", model.parameters(), **cases.QUICK)
        for t in range(STEPS):
            opt.zero_grad(set_to_none=set_to_none)
            cases.net_loss(model, t).backward()
            opt.step()
        found.append(values(model.parameters()))
    assert_same(*found)
