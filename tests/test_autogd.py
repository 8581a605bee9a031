"""AutoGD beside a version written apart, in plain Python."""

import copy
import math

import pytest
import torch
from cases import assert_same, make_weights, values

from mechanic_fused.tuners import AutoGD

CURVATURES = (0.5, 3.0, 40.0)


def bowl(x):
    return sum(a * v * v for a, v in zip(CURVATURES, x, strict=True)) / 2


def oracle(x, gamma, eta, steps):
    """Three candidates, the best of those that pass, or a quarter of γ."""
    path = []
    for _ in range(steps):
        g = [a * v for a, v in zip(CURVATURES, x, strict=True)]
        squares = sum(v * v for v in g)
        moved = {}
        for c in (gamma / 2, gamma, 2 * gamma):
            there = [v - c * d for v, d in zip(x, g, strict=True)]
            if bowl(there) <= bowl(x) - eta * c * squares:
                moved[bowl(there)] = (c, there)
        if moved:
            gamma, x = moved[min(moved)]
        else:
            gamma /= 4
        path.append((gamma, list(x)))
    return path


def closure_of(opt, weights, f):
    def closure():
        opt.zero_grad()
        loss = f()
        if loss.requires_grad:
            loss.backward()
        return loss

    return closure


def quadratic(dtype=torch.float64, **options):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=dtype))
    opt = AutoGD([weight], **options)
    a = torch.tensor(CURVATURES, dtype=dtype)
    return weight, opt, closure_of(opt, [weight], lambda: (a * weight.square()).sum() / 2)


@pytest.mark.parametrize("lr", [1e-4, 1.0, 100.0])
def test_the_path_is_the_oracles(lr, backend):
    weight, opt, closure = quadratic(lr=lr, backend=backend)
    for gamma, x in oracle([1.0, -2.0, 0.5], lr, 1e-4, 25):
        opt.step(closure)
        assert opt.param_groups[0]["lr"] == gamma
        # Some 25 steps of a few roundings each, in numbers that are no larger than at the start.
        assert weight.tolist() == pytest.approx(x, rel=0, abs=1e-13)


def test_it_descends_from_any_rate():
    for lr in (1e-12, 1.0, 1e12):
        weight, opt, closure = quadratic(lr=lr)
        losses = [float(opt.step(closure).detach()) for _ in range(120)]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_descend(dtype):
    weight, opt, closure = quadratic(dtype, lr=0.01)
    start = float(opt.step(closure).detach())
    for _ in range(60):
        opt.step(closure)
    assert float(closure().detach()) < 0.05 * start


def test_weights_that_do_not_move_keep_their_bits():
    """2γ, γ and γ/2 are all far too long."""
    weight, opt, closure = quadratic(torch.float32, lr=1e6)
    before = values([weight])
    opt.step(closure)
    assert_same(values([weight]), before)
    assert opt.param_groups[0]["lr"] == 1e6 / 4


def test_losses_that_are_not_finite_do_not_pass():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = AutoGD([weight], lr=1.0)
    # Below 0 there is no logarithm: of the candidates only γ/2 stays above.
    closure = closure_of(opt, [weight], lambda: weight.log().sum())
    assert math.isfinite(opt.step(closure).detach())
    assert weight.item() == 0.5 and opt.param_groups[0]["lr"] == 0.5


def test_random_numbers_are_the_same_in_every_look():
    """The noise would decide otherwise; and the step consumes what its one closure call does."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = AutoGD([weight], lr=0.1)
    closure = closure_of(opt, [weight], lambda: weight.square().sum() + 1e6 * torch.rand(()))
    torch.manual_seed(0)
    opt.step(closure)
    after = torch.rand(())
    torch.manual_seed(0)
    torch.rand(())
    assert torch.equal(after, torch.rand(()))
    assert opt.param_groups[0]["lr"] == 0.2


def test_a_run_that_goes_on_takes_the_same_steps():
    weight, opt, closure = quadratic(torch.float32, lr=0.3)
    for _ in range(5):
        opt.step(closure)
    saved, x = opt.state_dict(), values([weight])
    other_weight, other, its_closure = quadratic(torch.float32, lr=7.0)
    other.load_state_dict(saved)
    with torch.no_grad():
        other_weight.copy_(x[0])
    for _ in range(5):
        opt.step(closure)
        other.step(its_closure)
    assert_same(values([other_weight]), values([weight]))


def test_at_an_optimum_the_rate_stays():
    lr = torch.tensor(0.25, dtype=torch.float64)
    weight, opt, closure = quadratic(lr=0.25)
    opt.param_groups[0]["lr"] = lr
    with torch.no_grad():
        weight.zero_()
    opt.step(closure)
    assert opt.param_groups[0]["lr"] is lr and float(lr) == 0.25


def test_a_copy_goes_on_as_the_original():
    weight, opt, closure = quadratic(lr=0.3)
    opt.step(closure)
    other = copy.deepcopy(opt)
    (twin,) = other.param_groups[0]["params"]
    a = torch.tensor(CURVATURES, dtype=torch.float64)
    its_closure = closure_of(other, [twin], lambda: (a * twin.square()).sum() / 2)
    for _ in range(5):
        opt.step(closure)
        other.step(its_closure)
    assert_same(values([twin]), values([weight]))


def test_batch_norm_sees_one_pass_a_step():
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    z = torch.randn(8, 3)
    opt = AutoGD(models[0].parameters(), model=models[0])
    opt.step(closure_of(opt, [], lambda: models[0](z).pow(4).mean()))
    models[1](z)
    assert_same(dict(models[0].named_buffers()), dict(models[1].named_buffers()))


def test_what_it_refuses():
    params = make_weights()
    for options, words in (
        ({"lr": 0}, "lr must be a finite number above 0, got 0"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"eta": 1}, "eta must lie in"),
    ):
        with pytest.raises(ValueError, match=words):
            AutoGD(params, **options)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    with pytest.raises(ValueError, match="expected one param group, got another"):
        AutoGD(groups)
    opt = AutoGD(params)
    with pytest.raises(ValueError, match="needs a closure"):
        opt.step()
    before = values(params)
    with pytest.raises(ValueError, match="must do the backward pass"):
        opt.step(lambda: params[0].detach().sum())
    assert_same(values(params), before)
