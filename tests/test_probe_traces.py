"""LineProbe where others have a hand in: autocast, frozen weights, buffers, released gradients."""

import copy
import pickle

import pytest
import torch
from cases import assert_same, make_weights, set_gradients, snapshot
from probe_runs import MULTIPLES, batch

import mechanic_fused
from mechanic_fused.tuners import LineProbe


def test_an_outer_autocast_does_not_hide_the_points():
    """Its cache of bfloat16 weights would give every point the same loss."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    z = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        model(z).square().mean().backward()
        losses = LineProbe(opt, model)(lambda: model(z).square().mean(), MULTIPLES)
    assert len(set(losses)) == len(MULTIPLES)


def test_a_weight_frozen_with_its_gradient_comes_back():
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1)
    set_gradients(params, 0)
    params[1].requires_grad_(False)
    before = snapshot(opt)
    LineProbe(opt)(lambda: sum(p.double().sum() for p in params), (1,))
    assert_same(snapshot(opt), before)


def test_gradients_of_the_models_other_weights_come_back():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    opt = torch.optim.SGD(model[0].parameters(), lr=0.1)
    z = batch(0)[:, :3]
    model(z).square().mean().backward()
    held = [p.grad for p in model.parameters()]

    def closure():
        model.zero_grad()
        return model(z).square().mean()

    LineProbe(opt, model)(closure)
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))


def test_buffers_that_are_replaced_or_expanded_come_back():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 1)
            self.register_buffer("mean", torch.zeros(1))
            self.register_buffer("mask", torch.ones(1).expand(4))

        def forward(self, z):
            y = self.inner(z * self.mask)
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()
            return y

    model = Odd()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(0)).square().mean().backward()
    held, value = model.mean, model.mean.clone()
    LineProbe(opt, model)(lambda: model(batch(1)).square().mean())
    assert model.mean is held and torch.equal(held, value)


def test_released_gradients_are_named_as_the_cause():
    params = make_weights()
    opt = mechanic_fused.MechanicSGD(params, lr=0.1)
    opt.release_gradients()
    with pytest.raises(ValueError, match="an optimizer that releases them"):
        LineProbe(opt)(lambda: params[0].sum())


def test_copies_and_pickles_probe_as_the_original():
    weight = torch.nn.Parameter(torch.ones(5))
    opt = torch.optim.SGD([weight], lr=0.1)
    probe = LineProbe(opt)
    for other in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):
        (twin,) = other.optimizer.param_groups[0]["params"]
        losses = []
        for one, p in ((probe, weight), (other, twin)):
            p.grad = torch.ones(5)
            losses.append(one(lambda p=p: p.square().sum()))
        assert losses[0] == losses[1]
