"""GeN, LQA, LRTuner: what they make of the losses that a probe finds."""

import math

import pytest
import torch
from cases import assert_same, make_weights, set_gradients, snapshot, values

import mechanic_fused
from mechanic_fused.tuners import LQA, GeN, LRTuner, probed

# Float64 weights: losses of a few hundred terms, their second difference near the loss itself.
RTOL = 1e-9
CURVATURES = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)


def bowl(lr=0.01, make=torch.optim.SGD, **options):
    """½Σa·x² from ones: along a step every curvature is known."""
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    opt = make([x], lr=lr, **options)
    return x, opt, lambda: (CURVATURES * x.square()).sum() / 2


def backward(opt, closure):
    opt.zero_grad()
    closure().backward()


def best_rate(x):
    """g·g/g·Ag, the exact minimizer along the gradient."""
    g = CURVATURES * x.detach()
    return float((g * g).sum() / (g * CURVATURES * g).sum())


def test_gen_moves_the_lr_a_tenth_of_the_way_to_the_minimizer():
    for lr in (0.2, 0.3, 0.5, 0.9):
        x, opt, closure = bowl(lr)
        backward(opt, closure)
        tuner = GeN(opt)
        assert tuner.step(closure)
        wanted = min(2.0, max(0.5, best_rate(x) / lr)) * lr
        assert tuner.get_last_lr() == [pytest.approx(0.9 * lr + 0.1 * wanted, rel=RTOL)]


@pytest.mark.parametrize("points", [3, 5])
def test_gen_converges_to_the_best_rate(points):
    """With the weights held, by a tenth of what is left a look: 0.9^150 is 1e-7."""
    x, opt, closure = bowl(0.01)
    backward(opt, closure)
    tuner = GeN(opt, every=1, points=points)
    for _ in range(250):
        tuner.step(closure)
    assert tuner.get_last_lr() == [pytest.approx(best_rate(x), rel=1e-5)]
    assert len(tuner.losses) == points


def test_gen_looks_every_few_steps():
    x, opt, closure = bowl()
    backward(opt, closure)
    calls = []

    def counted():
        calls.append(1)
        return closure()

    tuner = GeN(opt, every=4)
    due, changed = [], []
    for _ in range(9):
        due.append(tuner.due)
        changed.append(tuner.step(counted))
    assert due == changed == [t % 4 == 0 for t in range(9)]
    assert len(calls) == 9


@pytest.mark.parametrize(
    "losses", [(1.0, 2.0, 1.0), (1.0, 2.0, 7.0), (1.0, math.nan, 7.0), (1.0, 1.0, 1.0)]
)
def test_gen_keeps_the_lr_where_the_parabola_has_no_minimum_ahead(losses):
    x, opt, closure = bowl()
    backward(opt, closure)
    found = iter(losses)
    assert not GeN(opt).step(lambda: torch.tensor(next(found)))
    assert opt.param_groups[0]["lr"] == 0.01


def test_gen_with_five_points_wants_a_good_fit():
    for rough, accepted in ((0.0, True), (2.0, False)):
        x, opt, closure = bowl()
        backward(opt, closure)
        # (r − 3)² at −2 … 2, and something on top that no parabola follows.
        found = iter([25.0 + rough, 16.0 - rough, 9.0 + rough, 4.0 - rough, 1.0 + rough])
        assert GeN(opt, points=5).step(lambda found=found: torch.tensor(next(found))) is accepted


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


def test_the_range_of_the_lr_is_kept():
    x, opt, closure = bowl(0.01)
    backward(opt, closure)
    tuner = GeN(opt, every=1, max_lr=0.012)
    for _ in range(9):
        tuner.step(closure)
    assert tuner.get_last_lr() == [0.012]


def test_gen_trains_any_optimizer_as_without_it_where_nothing_is_accepted():
    """A loss that does not change tells nothing."""
    for make in (torch.optim.AdamW, mechanic_fused.MechanicAdamW):
        runs = []
        for probes in (True, False):
            params = make_weights()
            opt = make(params, lr=0.01)
            tuner = GeN(opt, every=2)
            for t in range(6):
                set_gradients(params, t)
                if probes:
                    assert not tuner.step(lambda: torch.ones(()))
                opt.step()
            runs.append(snapshot(opt))
        assert_same(*runs)


def test_lqa_takes_the_exact_minimizer_at_every_step():
    x, opt, closure = bowl(1e-3)
    tuner = LQA(opt)
    for _ in range(20):
        backward(opt, closure)
        expected = best_rate(x)
        assert tuner.step(closure)
        assert tuner.get_last_lr() == [pytest.approx(expected, rel=1e-6)]
        opt.step()
    # Steepest descent with exact steps: (κ − 1)/(κ + 1) a step at κ = 8.
    assert float(closure().detach()) <= 4.625 * (7 / 9) ** 40


def test_lqa_keeps_the_lr_without_a_minimum_ahead():
    x, opt, closure = bowl()
    backward(opt, closure)
    assert not LQA(opt).step(lambda: -closure())
    for g in (0.0, math.inf, math.nan):
        x.grad = torch.full_like(x, g)
        assert not LQA(opt).step(closure)
    assert opt.param_groups[0]["lr"] == 0.01


def test_lqa_wants_plain_sgd():
    params = make_weights()
    refused = [
        torch.optim.Adam(params),
        torch.optim.SGD(params, lr=0.1, momentum=0.9),
        torch.optim.SGD(params, lr=0.1, weight_decay=0.1),
    ]
    for opt in refused:
        with pytest.raises(ValueError, match="expected torch.optim.SGD without"):
            LQA(opt)
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.2}]
    with pytest.raises(ValueError, match="expected one lr"):
        LQA(torch.optim.SGD(groups))


def test_lrtuner_explores_at_the_edge_and_exploits_at_the_minimum():
    x, opt, closure = bowl(0.3)
    backward(opt, closure)
    best = best_rate(x)
    tuner = LRTuner(opt, steps=40, explore=0.5, every=10, bound=2.0)
    seen = []
    for _ in range(40):
        if tuner.step(closure):
            seen.append(tuner.get_last_lr()[0])
    # The far edge of a parabola is at twice its minimum.
    wide, narrow = pytest.approx(2 * best, rel=1e-6), pytest.approx(best, rel=1e-6)
    assert seen == [0.6, wide, narrow, narrow]


def test_lrtuner_may_let_the_loss_rise_while_exploring():
    x, opt, closure = bowl(0.5)
    backward(opt, closure)
    tuner = LRTuner(opt, steps=10, tolerance=0.1, bound=2.0)
    tuner.step(closure)
    g = CURVATURES * x.detach()
    with torch.no_grad():
        start = float(closure())
        x.sub_(tuner.get_last_lr()[0] * g)
        assert float(closure()) == pytest.approx(1.1 * start, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "exploring", "exploiting"),
    [
        ((4.0, 3.6, 3.0, 1.0), 2.0, None),  # ever steeper downhill
        ((4.0, 4.6, 5.1, 5.5), 0.5, None),  # uphill, ever flatter
        ((4.0, 4.5, 6.0, 12.0), 0.5, 0.5),  # a bowl that lies behind
        ((4.0, math.inf, 5.0, 6.0), 0.5, 0.5),
    ],
)
def test_lrtuner_where_there_is_no_minimum_ahead(losses, exploring, exploiting):
    for explore, expected in ((1.0, exploring), (0.0, exploiting)):
        x, opt, closure = bowl(0.01)
        backward(opt, closure)
        found = iter(losses)
        tuner = LRTuner(opt, steps=1, explore=explore, bound=2.0)
        tuner.step(lambda found=found: torch.tensor(next(found)))
        factor = 1.0 if expected is None else expected
        assert opt.param_groups[0]["lr"] == pytest.approx(0.01 * factor, rel=1e-12)


TUNERS = {
    "gen": lambda opt: GeN(opt, every=3),
    "lqa": lambda opt: LQA(opt, every=3),
    "lrtuner": lambda opt: LRTuner(opt, steps=8, every=3),
}


@pytest.mark.parametrize("name", TUNERS)
def test_a_run_that_goes_on_takes_the_same_steps(name):
    def run(opt, x, closure, tuner, steps):
        for _ in range(steps):
            backward(opt, closure)
            tuner.step(closure)
            opt.step()

    x, opt, closure = bowl()
    tuner = TUNERS[name](opt)
    run(opt, x, closure, tuner, 4)
    saved = opt.state_dict(), tuner.state_dict(), values([x])
    run(opt, x, closure, tuner, 4)

    y, other, its_closure = bowl()
    again = TUNERS[name](other)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    with torch.no_grad():
        y.copy_(saved[2][0])
    run(other, y, its_closure, again, 4)
    assert_same([*values([y]), again.get_last_lr()], [*values([x]), tuner.get_last_lr()])


@pytest.mark.parametrize("name", TUNERS)
def test_without_gradients_nothing_changes(name):
    x, opt, closure = bowl()
    tuner = TUNERS[name](opt)
    with pytest.raises(ValueError, match="expected gradients"):
        tuner.step(closure)
    assert tuner.count == 0 and opt.param_groups[0]["lr"] == 0.01


def test_options_out_of_range_are_refused():
    _, opt, _ = bowl()
    for options, words in (
        ({"every": 0}, "every must be an integer of 1 or more, got 0"),
        ({"points": 4}, "points must be 3 or 5, got 4"),
        ({"smoothing": 1.0}, "smoothing must lie in"),
        ({"bound": 0.5}, "bound must be 1 or more"),
        ({"min_lr": 2.0, "max_lr": 1.0}, "expected 0 <= min_lr <= max_lr, got 2.0 and 1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            GeN(opt, **options)
    for options, words in (
        ({"steps": 0}, "steps must be an integer of 1 or more, got 0"),
        ({"steps": 9, "explore": 2}, "explore must lie in"),
        ({"steps": 9, "multiples": (0, 1, 1)}, "three different numbers"),
        ({"steps": 9, "tolerance": -1}, "tolerance must be 0 or more"),
        ({"steps": 9, "bound": 0}, "bound must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            LRTuner(opt, **options)
    with pytest.raises(ValueError, match="bound must be 1 or more"):
        LQA(opt, bound=0)
    with pytest.raises(ValueError, match="expected the entries"):
        GeN(opt).load_state_dict({"steps": 1})


def test_lrs_that_are_tensors_stay_the_same_tensors():
    group = {"lr": torch.tensor(0.5)}
    held = group["lr"]
    probed.set_lr(group, 0.25)
    assert group["lr"] is held and float(held) == 0.25


def test_a_tensor_lr_that_groups_share_moves_once():
    params = make_weights(dtype=torch.float64)
    lr = torch.tensor(0.01, dtype=torch.float64)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    shared, plain = torch.optim.SGD(groups, lr=lr), torch.optim.SGD(groups, lr=0.01)
    set_gradients(params, 0)
    for opt in (shared, plain):
        GeN(opt).step(lambda: sum(p.square().sum() for p in params))
    assert GeN(shared).get_last_lr() == pytest.approx(GeN(plain).get_last_lr(), rel=1e-15)
    assert float(lr) != 0.01


def test_lqa_refuses_a_group_that_came_later():
    x, opt, closure = bowl()
    tuner = LQA(opt)
    y = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [y], "lr": 1.0, "momentum": 0.9})
    backward(opt, closure)
    with pytest.raises(ValueError, match="expected torch.optim.SGD without"):
        tuner.step(closure)
    assert opt.param_groups[0]["lr"] == 0.01 and tuner.count == 0


def test_uphill_the_lr_shrinks_whatever_is_tolerated():
    x, opt, closure = bowl(0.01)
    (-closure()).backward()
    LRTuner(opt, steps=10, tolerance=1.0, bound=2.0).step(closure)
    assert opt.param_groups[0]["lr"] == 0.005


def test_a_count_that_is_none_is_refused():
    _, opt, _ = bowl()
    with pytest.raises(ValueError, match="count must be an integer of 0 or more, got 'x'"):
        GeN(opt).load_state_dict({"count": "x"})
