"""CGQ's searches: when they come, what they find, and that they leave no traces; groups, ranks."""

import copy
import math

import numpy
import pytest
import torch
from cases import (
    FEW,
    STEPS,
    assert_same,
    assert_within,
    differs,
    make_weights,
    snapshot,
    ulp,
    values,
)
from cgq_runs import BOUND, OPTIONS, ROUNDINGS, TRIAL, Closure, oracle, train, trained

from mechanic_fused.tuners.cgq import CGQ, drawn, line_search, minimizer, polak_ribiere


def test_searches_are_drawn_with_their_probability_by_the_seed():
    one = [drawn(0, i) for i in range(4000)]
    assert one == [drawn(0, i) for i in range(4000)]
    assert one != [drawn(1, i) for i in range(4000)]
    # Five standard deviations of a share of 4,000 draws.
    for share in (0.1, 0.5):
        found = sum(x < share for x in one) / len(one)
        assert found == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / len(one)))
    assert all(trained(probability=1.0, steps=FEW)[2].searches())
    assert not any(trained(probability=0.0, steps=FEW)[2].searches())
    assert trained()[2].searches() != trained(seed=1)[2].searches()


def test_a_search_calls_the_closure_once_with_gradients_and_twice_without(backend):
    closure = trained(backend, probability=1.0, steps=2)[2]
    assert closure.calls == [(t, grads) for t in range(2) for grads in (True, False, False)]


def test_losses_that_are_not_finite_keep_the_lr(backend):
    params, other = make_weights(), make_weights()
    opt = CGQ(params, lr=0.02, momentum=0.7, probability=1.0, backend=backend)
    plain = CGQ(other, lr=0.02, momentum=0.7, probability=0.0, backend=backend)
    # The first search has no g_last, so its β is the momentum: a plain step.
    lost = train(opt, params, 1, lost=(0,))
    train(plain, other, 1)
    assert len(lost.calls) == 2
    assert opt.param_groups[0]["lr"] == 0.02
    assert opt.param_groups[0]["momentum"] == 0.7
    assert_same(values(params), values(other))


def test_an_lr_of_zero_after_a_refused_search_leaves_the_weights_to_the_bit(backend):
    for dtype in (torch.float32, torch.bfloat16):
        params = make_weights(dtype=dtype)
        opt = CGQ(params, lr=0.0, probability=1.0, backend=backend)
        closure = train(opt, params, 1, lost=(0,))
        assert differs(closure.seen[1], closure.seen[0])
        assert_same(values(params), values(make_weights(dtype=dtype)))


def test_an_error_in_a_search_leaves_weights_and_generators_to_the_bit(backend):
    params = make_weights()
    opt = CGQ(params, lr=0.02, probability=1.0, backend=backend)
    inner, after = Closure(params), []

    def closure():
        if not torch.is_grad_enabled():
            raise RuntimeError("the loss could not be had")
        torch.rand(3)
        after.append(torch.get_rng_state())
        return inner()

    with pytest.raises(RuntimeError, match="could not be had"):
        opt.step(closure)
    assert_same(values(params), values(make_weights()))
    assert torch.equal(torch.get_rng_state(), after[0])
    assert all(p.grad is not None for p in params)


def test_a_search_moves_neither_generators_nor_buffers_and_sees_one_mask():
    def make(probability):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)
        )
        opt = CGQ(model.parameters(), lr=0.0, probability=probability, model=model)
        return model, opt

    draws, counts = [], []

    def train_once(model, opt):
        z = torch.ones(6, 4).cumsum(0)

        def closure():
            opt.zero_grad()
            draws.append(torch.rand(3))
            counts.append(int(model[1].num_batches_tracked))
            loss = model(z).square().mean()
            if loss.requires_grad:
                loss.backward()
            return loss

        torch.manual_seed(1)
        opt.step(closure)
        return torch.get_rng_state()

    searching, plain = make(1.0), make(0.0)
    after = train_once(*searching)
    # All of the search see the buffers as the call with gradients left them.
    assert counts == [0, *[1] * (len(counts) - 1)]
    assert len(draws) > 2
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    assert torch.equal(after, train_once(*plain))
    buffers = [dict(model.named_buffers()) for model in (searching[0], plain[0])]
    assert_same(*buffers)


def test_a_weight_without_gradient_stays(backend):
    params, opt, closure = trained(backend, steps=FEW)
    before = copy.deepcopy(opt.state[params[1]]), params[1].detach().clone()
    moving = params[0].detach().clone()

    def partly():
        loss = closure()
        params[1].grad = None
        return loss

    for probability in (0.0, 1.0):
        opt.param_groups[0]["probability"] = probability
        opt.step(partly)
    assert_same((opt.state[params[1]], params[1].detach()), before)
    assert not torch.equal(params[0], moving)


def test_groups_share_what_is_learned_and_have_decays_of_their_own(backend):
    whole = trained(backend)[1]
    params = make_weights(dtype=torch.float64)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    split = CGQ(groups, **OPTIONS, backend=backend)
    train(split, params)
    for group in split.param_groups:
        assert group["lr"] == whole.param_groups[0]["lr"]
        assert group["momentum"] == whole.param_groups[0]["momentum"]
    assert_same(values(params), values(whole.param_groups[0]["params"]))

    params = make_weights(dtype=torch.float64)
    groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:]}]
    mixed = CGQ(groups, **{**OPTIONS, "probability": 0.0}, backend=backend)
    train(mixed, params)
    free, _, _, largest = oracle(torch.float64, [False] * STEPS, weight_decay=0.0)
    decayed, *_ = oracle(torch.float64, [False] * STEPS)
    for p, x in zip(params, [*free[:1], *decayed[1:]], strict=True):
        assert_within(p, x, STEPS * ROUNDINGS * ulp(largest))


def test_an_added_group_takes_over_what_has_been_learned(backend):
    params, opt, _ = trained(backend)
    more = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt.add_param_group({"params": [more]})
    for name in ("lr", "momentum", "draws"):
        assert opt.param_groups[1][name] == opt.param_groups[0][name]
    train(opt, [*params, more], 2, first=STEPS)
    assert not torch.equal(more, torch.ones_like(more))
    with pytest.raises(ValueError, match="^lr must be the same in all param groups, got"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 7.0})
    assert len(opt.param_groups) == 2


def test_lrs_that_have_come_apart_are_refused_before_anything_changes(backend):
    params = make_weights()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt = CGQ(groups, **OPTIONS, backend=backend)
    opt.param_groups[1]["lr"] = 0.5
    closure, before = Closure(params), snapshot(opt)
    with pytest.raises(ValueError, match=r"lr must be the same .* got \[0.02, 0.5\]"):
        opt.step(closure)
    assert_same(snapshot(opt), before)
    assert not closure.calls


def test_a_missing_closure_and_missing_gradients_are_named(backend):
    _, opt, _ = trained(backend, steps=FEW)
    opt.zero_grad()
    before = snapshot(opt)
    with pytest.raises(ValueError, match="CGQ needs a closure .* got None"):
        opt.step()
    with pytest.raises(ValueError, match="expected gradients"):
        opt.step(lambda: torch.tensor(1.0))
    assert_same(snapshot(opt), before)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -1.0),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("probability", 1.5),
        ("trial", 0.0),
        ("bound", float("inf")),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*got {value}"):
        CGQ(make_weights(), **{**OPTIONS, name: value})


def test_a_fit_that_overshoots_is_made_once_more_with_what_it_found():
    seen = []

    def quartic(t):
        seen.append(t)
        return 5 - t + 50 * t**4

    found = line_search(quartic, 5.0, -1.0, TRIAL, BOUND)
    # All but straight near 0, so that the first fit leads to the bound.
    assert seen[:2] == [TRIAL, BOUND]
    assert len(seen) == 3
    assert found == seen[2]
    # The least-squares solution of t²·a + t·b + c by its normal equations, in units of the trial.
    rows = numpy.array([[0, 0, 1], [1, 1, 1], [625, 25, 1], [0, 1, 0]], dtype=float)
    known = [0, quartic(TRIAL) - 5, quartic(BOUND) - 5, -TRIAL]
    a, b, _ = numpy.linalg.solve(rows.T @ rows, rows.T @ known)
    # The equations' condition number is the square of the rows' own.
    rtol = numpy.finfo(float).eps * numpy.linalg.cond(rows) ** 2
    assert found == pytest.approx(-b / (2 * a) * TRIAL, rel=rtol)


@pytest.mark.parametrize(
    "rises, slope",
    [
        ([-0.03], -1.0),  # bent downwards
        ([0.01], 1.0),  # uphill
        ([0.01], 0.0),
        ([math.nan], -1.0),
        ([math.inf], -1.0),
        ([0.01], math.nan),
    ],
)
def test_an_unfit_parabola_has_no_minimizer(rises, slope):
    assert minimizer([0.02], rises, slope, 1.0) is None


def test_a_loss_that_never_falls_is_given_up_after_three():
    seen = []

    def jump(t):
        seen.append(t)
        return 1 + t

    assert line_search(jump, 1.0, -1.0, TRIAL, BOUND) is None
    assert len(seen) == 3


def test_conjugacy_is_clamped_and_absent_without_a_last_gradient():
    assert polak_ribiere(4.0, 3.0, 2.0) == 0.5
    assert polak_ribiere(4.0, 5.0, 2.0) == 0.0
    assert polak_ribiere(4.0, -5.0, 2.0) == 0.8
    assert polak_ribiere(4.0, 0.0, 0.0) is None
    assert polak_ribiere(math.nan, 1.0, 1.0) is None
    assert polak_ribiere(math.inf, 1.0, 1.0) is None


def test_an_error_in_a_search_leaves_the_vectors_as_they_were():
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    opt = CGQ([weight], lr=0.01, probability=1.0)
    fails = False

    def closure():
        opt.zero_grad()
        loss = (weight**2).sum()
        if loss.requires_grad:
            loss.backward()
        elif fails:
            raise RuntimeError("out of memory")
        return loss

    opt.step(closure)
    before = {name: t.clone() for name, t in opt.state[weight].items()}
    fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step(closure)
    assert all(torch.equal(opt.state[weight][name], t) for name, t in before.items())
