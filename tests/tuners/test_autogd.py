"""AutoGD's choice among its candidates, beyond the contract of the vector optimizers."""

import math

import pytest
import torch
from support.cases import assert_same, make_weights, values

from mechanic_fused.tuners import AutoGD

CURVATURES = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64)


def closure_of(opt, f):
    def closure():
        opt.zero_grad()
        loss = f()
        if loss.requires_grad:
            loss.backward()
        return loss

    return closure


def quadratic(dtype=torch.float64, lr=1.0):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=dtype))
    opt = AutoGD([weight], lr=lr)
    a = CURVATURES.to(dtype)
    return weight, opt, closure_of(opt, lambda: (a * weight.square()).sum() / 2)


@pytest.mark.parametrize("lr", [1e-12, 1.0, 1e12])
def test_it_descends_from_any_lr(lr):
    _, opt, closure = quadratic(lr=lr)
    losses = [float(opt.step(closure).detach()) for _ in range(120)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-3 * losses[0]


def test_weights_for_which_all_candidates_are_too_long_keep_their_bits():
    weight, opt, closure = quadratic(torch.float32, lr=1e6)
    before = values([weight])
    opt.step(closure)
    assert_same(values([weight]), before)
    assert opt.param_groups[0]["lr"] == 1e6 / 4


def test_losses_that_are_not_finite_are_not_accepted():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = AutoGD([weight], lr=1.0)
    # Below 0 there is no logarithm: of the candidates only γ/2 stays above.
    assert math.isfinite(opt.step(closure_of(opt, lambda: weight.log().sum())).detach())
    assert weight.item() == 0.5 and opt.param_groups[0]["lr"] == 0.5


def test_at_an_optimum_the_lr_stays():
    lr = torch.tensor(0.25, dtype=torch.float64)
    weight, opt, closure = quadratic(lr=lr)
    with torch.no_grad():
        weight.zero_()
    opt.step(closure)
    assert opt.param_groups[0]["lr"] is lr and float(lr) == 0.25


def test_an_lr_that_is_a_tensor_stays_the_same_tensor():
    lr = torch.tensor(0.01, dtype=torch.float64)
    _, opt, closure = quadratic(lr=lr)
    opt.step(closure)
    assert opt.param_groups[0]["lr"] is lr and float(lr) == 0.02


def test_a_second_group_is_refused():
    groups = [{"params": [p]} for p in make_weights()]
    with pytest.raises(ValueError, match="one param group, got another"):
        AutoGD(groups)
