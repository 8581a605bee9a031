"""AdaRem's count of steps, its maxima, and gradients that are absent or not finite."""

import copy

from support.cases import (
    FEW,
    assert_same,
    assert_within,
    give,
    gradients,
    ulp,
)
from support.vector_optimizers import METHODS, Run

OPTIONS = METHODS["AdaRem"].options


def test_a_skipped_weight_meets_the_optimizers_count_of_steps(backend):
    run = Run("AdaRem", backend).steps(FEW)
    params, opt = run.params, run.opt
    m, x = opt.state[params[1]]["exp_avg"].clone(), params[1].detach().clone()
    g = gradients(params, FEW)
    give(params, [g[0], None, g[2]])
    opt.step()
    assert float(opt.state[params[0]]["step"]) == FEW + 1
    assert float(opt.state[params[1]]["step"]) == FEW
    give(params, g)
    opt.step()
    assert float(opt.state[params[1]]["step"]) == FEW + 2
    b = g[1].sign() * m / (m.abs().max() + OPTIONS["eps"])
    gain = 1 + OPTIONS["lam"] ** (FEW + 2) * b
    expected = x - OPTIONS["lr"] * (gain * g[1] + OPTIONS["weight_decay"] * x)
    assert_within(params[1], expected, METHODS["AdaRem"].roundings * ulp(g[1]))


def test_the_maxima_are_those_of_a_momentum_that_was_replaced(backend):
    run, twin = (Run("AdaRem", backend).steps(FEW) for _ in range(2))
    # The copy has no maxima from before.
    twin.follow(copy.deepcopy(twin.opt), FEW)
    for one in (run, twin):
        for p in one.params:
            one.opt.state[p]["exp_avg"] = one.opt.state[p]["exp_avg"] / 8
    assert_same(run.steps(1).snapshot(), twin.steps(1).snapshot())


def test_without_any_gradient_nothing_moves(backend):
    run = Run("AdaRem", backend).steps(1)
    run.opt.zero_grad()
    before = run.snapshot()
    assert run.opt.step(lambda: 3.0) == 3.0
    assert_same(run.snapshot(), before)
