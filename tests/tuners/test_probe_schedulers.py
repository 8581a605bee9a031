"""What GeN, LQA and LRTuner make of the losses that a probe finds."""

import math

import pytest
import torch
from support.cases import make_weights, set_gradients

from mechanic_fused.tuners import LQA, GeN, LRTuner

# Float64 weights: losses of a few terms, whose second difference is near the loss itself.
RTOL = 1e-9
CURVATURES = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)


def bowl(lr=0.01):
    """Return ½Σa·x², an optimizer and its gradient: along a step every curvature is known."""
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    opt = torch.optim.SGD([x], lr=lr)

    def closure():
        return (CURVATURES * x.square()).sum() / 2

    closure().backward()
    return x, opt, closure


def best_lr(x):
    """Return g·g/g·Ag, the exact minimizer along the gradient."""
    g = CURVATURES * x.detach()
    return float((g * g).sum() / (g * CURVATURES * g).sum())


def lr_after(losses, make, lr=0.01):
    """Return whether a tuner changed the lr, and the lr, after a probe that finds these losses."""
    _, opt, _ = bowl(lr)
    found = iter(losses)
    changed = make(opt).step(lambda: torch.tensor(next(found)))
    return changed, opt.param_groups[0]["lr"]


@pytest.mark.parametrize("lr", [0.2, 0.3, 0.5, 0.9])
def test_gen_moves_the_lr_a_tenth_of_the_way_to_the_minimizer(lr):
    x, opt, closure = bowl(lr)
    tuner = GeN(opt)
    assert tuner.step(closure)
    target = min(2.0, max(0.5, best_lr(x) / lr)) * lr
    assert tuner.get_last_lr() == [pytest.approx(0.9 * lr + 0.1 * target, rel=RTOL)]


@pytest.mark.parametrize("points", [3, 5])
def test_gen_converges_to_the_best_lr(points):
    """With the weights held, by a tenth of what is left a probe: 0.9^150 is 1e-7."""
    x, opt, closure = bowl()
    tuner = GeN(opt, every=1, points=points)
    for _ in range(250):
        tuner.step(closure)
    assert tuner.get_last_lr() == [pytest.approx(best_lr(x), rel=1e-5)]
    assert len(tuner.losses) == points


@pytest.mark.parametrize(
    "losses", [(1.0, 2.0, 1.0), (1.0, 2.0, 7.0), (1.0, math.nan, 7.0), (1.0, 1.0, 1.0)]
)
def test_gen_keeps_the_lr_where_the_parabola_has_no_minimum_ahead(losses):
    assert lr_after(losses, GeN) == (False, 0.01)


@pytest.mark.parametrize(("rough", "accepted"), [(0.0, True), (2.0, False)])
def test_gen_with_five_points_wants_a_good_fit(rough, accepted):
    # (r − 3)² at −2 … 2, and something on top that no parabola follows.
    losses = [25.0 + rough, 16.0 - rough, 9.0 + rough, 4.0 - rough, 1.0 + rough]
    assert lr_after(losses, lambda opt: GeN(opt, points=5))[0] is accepted


def test_all_groups_move_by_one_factor():
    params = make_weights(dtype=torch.float64)
    lr = torch.tensor(0.02, dtype=torch.float64)
    groups = [{"params": params[:1], "lr": 0.01}, {"params": params[1:], "lr": lr}]
    opt = torch.optim.SGD(groups)
    set_gradients(params, 0)
    assert GeN(opt).step(lambda: sum(p.square().sum() for p in params))
    first, second = (group["lr"] for group in opt.param_groups)
    assert second is lr and float(second) == pytest.approx(2 * first, rel=1e-15)
    assert first != 0.01


def test_lqa_takes_the_exact_minimizer_at_every_step():
    x, opt, closure = bowl(1e-3)
    tuner = LQA(opt)
    for _ in range(20):
        opt.zero_grad()
        closure().backward()
        assert tuner.step(closure)
        assert tuner.get_last_lr() == [pytest.approx(best_lr(x), rel=1e-6)]
        opt.step()
    # Steepest descent with exact steps: (κ − 1)/(κ + 1) a step at κ = 8.
    assert float(closure().detach()) <= 4.625 * (7 / 9) ** 40


def test_lqa_keeps_the_lr_without_a_minimum_ahead():
    x, opt, closure = bowl()
    assert not LQA(opt).step(lambda: -closure())
    for g in (0.0, math.inf, math.nan):
        x.grad = torch.full_like(x, g)
        assert not LQA(opt).step(closure)
    assert opt.param_groups[0]["lr"] == 0.01


def test_lqa_bounds_a_change_of_the_lr():
    _, opt, closure = bowl()
    assert LQA(opt, bound=1.5).step(closure)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.015, rel=1e-15)


REFUSED_BY_LQA = {
    "Adam": lambda params: torch.optim.Adam(params),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "weight_decay": lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1),
    "maximize": lambda params: torch.optim.SGD(params, lr=0.1, maximize=True),
    r"\[0\.1, 0\.2\]": lambda params: torch.optim.SGD(
        [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}]
    ),
}


@pytest.mark.parametrize("given", REFUSED_BY_LQA)
def test_lqa_wants_plain_sgd_with_one_lr(given):
    with pytest.raises(ValueError, match=f"LQA needs .* got .*{given}"):
        LQA(REFUSED_BY_LQA[given](make_weights()))


def test_lqa_refuses_a_group_that_came_later():
    _, opt, closure = bowl()
    tuner = LQA(opt)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "momentum": 0.9})
    with pytest.raises(ValueError, match=r"LQA needs torch\.optim\.SGD without"):
        tuner.step(closure)
    assert opt.param_groups[0]["lr"] == 0.01 and tuner.count == 0


def test_lrtuner_explores_at_the_edge_and_exploits_at_the_minimum():
    x, opt, closure = bowl(0.3)
    tuner = LRTuner(opt, steps=40, explore=0.5, every=10, bound=2.0)
    seen = [tuner.get_last_lr()[0] for _ in range(40) if tuner.step(closure)]
    # The far edge of a parabola is at twice its minimum.
    wide, narrow = (pytest.approx(c * best_lr(x), rel=1e-6) for c in (2, 1))
    assert seen == [0.6, wide, narrow, narrow]


def test_lrtuner_may_let_the_loss_rise_while_exploring():
    x, opt, closure = bowl(0.5)
    tuner = LRTuner(opt, steps=10, tolerance=0.1, bound=2.0)
    tuner.step(closure)
    with torch.no_grad():
        start = float(closure())
        x.sub_(tuner.get_last_lr()[0] * CURVATURES * x)
        assert float(closure()) == pytest.approx(1.1 * start, rel=1e-6)


def test_uphill_lrtuner_lowers_the_lr_whatever_is_tolerated():
    x, opt, closure = bowl()
    x.grad.neg_()
    LRTuner(opt, steps=10, tolerance=1.0, bound=2.0).step(closure)
    assert opt.param_groups[0]["lr"] == 0.005


@pytest.mark.parametrize(
    ("losses", "exploring", "exploiting"),
    [
        ((4.0, 3.6, 3.0, 1.0), 2.0, 1.0),  # ever steeper downhill
        ((4.0, 4.6, 5.1, 5.5), 0.5, 1.0),  # uphill, ever flatter
        ((4.0, 4.5, 6.0, 12.0), 0.5, 0.5),  # a bowl that is behind
        ((4.0, math.inf, 5.0, 6.0), 0.5, 0.5),
    ],
)
def test_lrtuner_where_there_is_no_minimum_ahead(losses, exploring, exploiting):
    for explore, factor in ((1.0, exploring), (0.0, exploiting)):
        _, lr = lr_after(losses, lambda opt, e=explore: LRTuner(opt, steps=1, explore=e, bound=2.0))
        assert lr == pytest.approx(0.01 * factor, rel=1e-12)
