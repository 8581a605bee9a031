"""CGQ's searches: when they come, what they find, and what groups share."""

import math

import numpy
import pytest
import torch
from support.cases import (
    FEW,
    STEPS,
    SUM_RTOL,
    WIDTHS,
    assert_near,
    assert_same,
    assert_within,
    differs,
    make_weights,
    snapshot,
    values,
)
from support.vector_optimizers import METHODS, Run, cgq_oracle, sharded, tolerances, worst

from mechanic_fused.tuners import CGQ
from mechanic_fused.tuners.cgq import line_search, minimizer, polak_ribiere, uniform

OPTIONS = METHODS["CGQ"].options
TRIAL, BOUND = OPTIONS["trial"], OPTIONS["bound"]


def test_searches_are_drawn_with_their_probability_by_the_seed():
    draws = [uniform(0, i) for i in range(4000)]
    assert draws == [uniform(0, i) for i in range(4000)] != [uniform(1, i) for i in range(4000)]
    # Five standard deviations of a share of 4,000 draws.
    for share in (0.1, 0.5):
        found = sum(x < share for x in draws) / len(draws)
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / len(draws)))
    searches = Run("CGQ").steps().searches()
    assert any(searches) and not all(searches)
    assert all(Run("CGQ", probability=1.0).steps(FEW).searches())
    assert not any(Run("CGQ", probability=0.0).steps(FEW).searches())
    assert searches != Run("CGQ", seed=1).steps().searches()


def test_one_search_more_or_less_would_be_seen():
    run = Run("CGQ").steps()
    expected, atol = tolerances(run)
    searches = run.searches()
    searches[STEPS // 2] = not searches[STEPS // 2]
    assert worst(cgq_oracle(torch.float64, run, searches).xs, expected.xs) > atol["xs"]


def test_a_search_calls_the_closure_once_with_gradients_and_twice_without(backend):
    calls = Run("CGQ", backend, probability=1.0).steps(2).closure.calls
    assert calls == [(t, grads) for t in range(2) for grads in (True, False, False)]


def test_it_finds_the_minimizer_along_the_gradient_of_a_quadratic(backend):
    a = torch.linspace(0.5, 3, 200, dtype=torch.float64)
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.nn.Parameter(x.clone())
    opt = CGQ([weight], lr=0.01, probability=1.0, bound=10.0, backend=backend)

    def closure():
        opt.zero_grad()
        loss = (a * weight**2).sum() / 2
        if loss.requires_grad:
            loss.backward()
        return loss

    opt.step(closure)
    p = a * x
    curvature = p.dot(a * p)
    best = float(p.dot(p) / curvature)
    # The parabola's a is a difference of losses over trial²/2: their rounding grows by this.
    rtol = SUM_RTOL * float((a * x**2).sum() / 2) / float(curvature * TRIAL**2 / 2)
    assert 2 * opt.param_groups[0]["lr"] - 0.01 == pytest.approx(best, rel=rtol)
    assert_within(weight, x - best * p, rtol * best * float(p.abs().max()))
    # Steepest descent with exact steps: the next gradient is orthogonal to the last.
    assert float((a * weight.detach()).dot(p)) == pytest.approx(0, abs=rtol * float(p.dot(p)))


def test_a_step_is_no_longer_than_the_bound(backend):
    run = Run("CGQ", backend, lr=0.1, probability=1.0, bound=0.05).steps(1)
    assert run.group["lr"] == (0.1 + 0.05) / 2


def test_losses_that_are_not_finite_keep_the_lr(backend):
    # The first search has no last gradient, so its β is the momentum: a plain step.
    plain = Run("CGQ", backend, torch.float32, probability=0.0).steps(1)
    lost = Run("CGQ", backend, torch.float32, probability=1.0)
    lost.closure.lost = (0,)
    lost.steps(1)
    assert len(lost.closure.calls) == 2
    assert [lost.group[name] for name in ("lr", "momentum")] == [0.02, 0.7]
    assert_same(values(lost.params), values(plain.params))


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_an_lr_of_0_after_a_refused_search_leaves_the_weights_to_the_bit(backend, dtype):
    run = Run("CGQ", backend, dtype, lr=0.0, probability=1.0)
    run.closure.lost = (0,)
    run.steps(1)
    assert differs(run.closure.seen[1], run.closure.seen[0])
    assert_same(values(run.params), values(make_weights(dtype=dtype)))


def split(backend):
    """Return a run with two groups."""
    params = make_weights(dtype=torch.float64)
    run = Run("CGQ", backend, params=[{"params": params[:1]}, {"params": params[1:]}])
    return run.follow(run.opt, 0)


def test_groups_share_what_is_learned(backend):
    run, whole = split(backend).steps(), Run("CGQ", backend).steps()
    for group in run.opt.param_groups:
        assert [group[name] for name in ("lr", "momentum")] == [
            whole.group[name] for name in ("lr", "momentum")
        ]
    assert_same(values(run.params), values(whole.params))


def test_an_added_group_takes_over_what_has_been_learned(backend):
    run = Run("CGQ", backend).steps()
    more = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    run.opt.add_param_group({"params": [more]})
    for name in ("lr", "momentum", "draws"):
        assert run.opt.param_groups[1][name] == run.group[name]
    run.follow(run.opt, STEPS).steps(2)
    assert not torch.equal(more, torch.ones_like(more))
    with pytest.raises(ValueError, match=r"^lr must be the same in all param groups, got"):
        run.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 7.0})
    assert len(run.opt.param_groups) == 2


def test_lrs_that_differ_between_groups_are_refused_before_anything_changes(backend):
    run = split(backend)
    run.opt.param_groups[1]["lr"] = 0.5
    before = snapshot(run.opt)
    with pytest.raises(ValueError, match=r"lr must be the same .* got \[0.02, 0.5\]"):
        run.opt.step(run.closure)
    assert_same(snapshot(run.opt), before)
    assert not run.closure.calls


def test_searches_on_sharded_weights_find_what_they_find_on_whole_ones(ranks):
    found = ranks(2).run("support.vector_optimizers.sharded", "CGQ", "auto", probability=1.0)
    assert_same(*found)
    xs, lr = sharded("CGQ", "auto", probability=1.0)
    # The slope is added in another order; this leaves room for what the parabola makes of it.
    assert_near(found[0][0], xs, SUM_RTOL * (FEW + 1))
    assert found[0][1] == pytest.approx(lr, rel=SUM_RTOL * FEW)


# The line search alone


def test_a_fit_that_overshoots_is_made_once_more_with_what_it_found():
    seen = []

    def quartic(t):
        seen.append(t)
        return 5 - t + 50 * t**4

    found = line_search(quartic, 5.0, -1.0, TRIAL, BOUND)
    # It is all but straight near 0, so that the first fit leads to the bound.
    assert seen == [TRIAL, BOUND, found]
    # The least-squares solution of t²·a + t·b + c by its normal equations, in units of the trial.
    rows = numpy.array([[0, 0, 1], [1, 1, 1], [625, 25, 1], [0, 1, 0]], dtype=float)
    known = [0, quartic(TRIAL) - 5, quartic(BOUND) - 5, -TRIAL]
    a, b, _ = numpy.linalg.solve(rows.T @ rows, rows.T @ known)
    # The equations' condition number is the square of the rows' own.
    rtol = numpy.finfo(float).eps * numpy.linalg.cond(rows) ** 2
    assert found == pytest.approx(-b / (2 * a) * TRIAL, rel=rtol)


@pytest.mark.parametrize(
    ("rise", "slope"),
    [
        (-0.03, -1.0),  # bent downwards
        (0.01, 1.0),  # uphill
        (0.01, 0.0),
        (math.nan, -1.0),
        (math.inf, -1.0),
        (0.01, math.nan),
    ],
)
def test_a_parabola_without_a_minimum_ahead_has_no_minimizer(rise, slope):
    assert minimizer([TRIAL], [rise], slope, 1.0) is None


def test_a_loss_that_never_falls_is_given_up_after_three():
    seen = []

    def jump(t):
        seen.append(t)
        return 1 + t

    assert line_search(jump, 1.0, -1.0, TRIAL, BOUND) is None
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("sums", "beta"),
    [
        ((4.0, 3.0, 2.0), 0.5),
        ((4.0, 5.0, 2.0), 0.0),
        ((4.0, -5.0, 2.0), 0.8),
        ((4.0, 0.0, 0.0), None),  # no last gradient
        ((math.nan, 1.0, 1.0), None),
        ((math.inf, 1.0, 1.0), None),
    ],
)
def test_beta_is_clamped_and_absent_without_a_last_gradient(sums, beta):
    assert polak_ribiere(*sums) == beta
