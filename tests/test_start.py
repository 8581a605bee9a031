"""s_init="auto" and variant="scaled": a start that does not depend on the units of lr."""

import math

import pytest
import torch
from cases import (
    FUSED,
    OPTIONS,
    QUICK,
    SUM_RTOL,
    TINY_EPS,
    SmallNet,
    assert_same,
    build,
    make_weights,
    run,
    set_gradients,
    train_net,
    values,
)

from mechanic_fused import MechanicAdamW, MechanicSGD, step_together
from mechanic_fused.options import START, UNCALIBRATED, ZERO_WEIGHT

STEPS = 30
LAMBDA = torch.optim.lr_scheduler.LambdaLR


def norm(tensors):
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def test_the_start_is_a_ratio_of_norms(road):
    params = make_weights()
    before = norm(params)
    opt = build(road, "sgd", params, s_init="auto", lr=0.5)
    assert opt.param_groups[0]["s_init"] == "auto"
    set_gradients(params, 0)
    direction = 0.5 * norm(p.grad for p in params)
    opt.step()
    found = opt.param_groups[0]["s_init"]
    assert found == pytest.approx(START * before / direction, rel=1e-6)
    # The tuner's first step leaves S at its start.
    assert float(opt.scale) == pytest.approx(found, rel=1e-6)
    run(opt, params, 2, first=1)
    assert opt.param_groups[0]["s_init"] == found


@pytest.mark.parametrize("base", FUSED)
def test_the_base_lr_does_not_matter(backend, base):
    """To the rounding of float32 in Δ, which grows in the course of a run. (The general road reads
    u off weights in float32, where an lr of 1e-4 leaves it few digits.)"""
    found = []
    for lr in (1.0, 1e-2, 1e-4):
        net = SmallNet(seed=0)
        opt = build(
            backend, base, net.parameters(), **{**OPTIONS[base], "lr": lr}, variant="scaled"
        )
        train_net(net, opt, STEPS)
        found.append((values(net.parameters()), float(opt.scale) * lr))
    for weights, rate in found[1:]:
        assert rate == pytest.approx(found[0][1], rel=1e-2)
        for x, y in zip(weights, found[0][0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-4)


def test_the_published_variants_do_depend_on_it():
    found = []
    for lr in (1.0, 1e-4):
        net = SmallNet(seed=0)
        opt = MechanicAdamW(net.parameters(), lr=lr, variant="optax")
        train_net(net, opt, STEPS)
        found.append(float(opt.scale) * lr)
    assert found[1] < 0.1 * found[0]


@pytest.mark.parametrize("by", ["scheduler", "hand"])
@pytest.mark.parametrize("first", [0.0, 0.01])
def test_a_warm_up_does_not_inflate_the_start(first, by):
    """The first update is tiny or 0 there, but the peak is known: from the scheduler, or, where a
    loop sets the lr itself, from the constructor."""
    found = []
    for factor in (1.0, first):

        def part(t, factor=factor):
            return max(factor, min(1.0, t / 5))

        params = make_weights()
        opt = MechanicSGD(params, lr=0.5)
        schedule = LAMBDA(opt, part) if by == "scheduler" else None
        for t in range(3):
            if schedule is None:
                opt.param_groups[0]["lr"] = 0.5 * part(t)
            set_gradients(params, 0)
            opt.step()
            if schedule is not None:
                schedule.step()
        assert opt.param_groups[0]["rate"] == 0.5
        found.append(opt.param_groups[0]["s_init"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_weights_of_zero_have_a_start_too(road):
    params = [torch.nn.Parameter(torch.zeros(10, 10))]
    opt = build(road, "sgd", params, s_init="auto", lr=1.0)
    params[0].grad = torch.full((10, 10), 3.0)
    opt.step()
    assert opt.param_groups[0]["s_init"] == pytest.approx(START * ZERO_WEIGHT / 3, rel=1e-6)


@pytest.mark.parametrize("base", FUSED)
def test_a_given_start_is_in_units_of_the_lr(backend, base):
    """s_init/c at lr·c is the same run: λ and ε follow by themselves."""
    found = []
    for c in (1.0, 2.0**-13):
        params = make_weights()
        options = {**OPTIONS[base], "lr": OPTIONS[base]["lr"] * c, "tuner_eps": TINY_EPS}
        opt = build(backend, base, params, **options, s_init=QUICK["s_init"] / c)
        run(opt, params)
        found.append([*values(params), opt.scale * c])
    assert_same(found[1], found[0])


def test_groups_with_rates_of_their_own():
    one, two = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    opt = MechanicSGD([{"params": [one]}, {"params": [two], "lr": 0.1}], lr=1.0, variant="scaled")
    one.grad, two.grad = torch.full((4,), 2.0), torch.full((4,), 3.0)
    opt.step()
    expected = START * math.sqrt(8) / math.sqrt(4 * 2.0**2 + 4 * 0.3**2)
    for group in opt.param_groups:
        assert group["s_init"] == pytest.approx(expected, rel=1e-6)
        assert group["rate"] == 1.0


def test_optimizers_that_step_together_have_one_peak():
    weights = [make_weights(seed=seed) for seed in (0, 1)]
    groups = [{"params": w, "lr": lr} for w, lr in zip(weights, (1.0, 0.1), strict=True)]
    same = [{**group, "params": make_weights(seed=i)} for i, group in enumerate(groups)]
    together = [MechanicAdamW([group]) for group in groups]
    one = MechanicAdamW(same)
    for t in range(STEPS):
        for group in (*groups, *same):
            set_gradients(group["params"], t)
        step_together(together)
        one.step()
    for opt in together:
        assert opt.param_groups[0]["rate"] == 1.0
        assert float(opt.scale) == pytest.approx(float(one.scale), rel=SUM_RTOL)


def test_a_start_is_saved_copied_and_joined(tmp_path):
    params = make_weights()
    opt = MechanicAdamW(params, lr=0.1, variant="scaled")
    run(opt, params, 3)
    found, rate = (opt.param_groups[0][name] for name in ("s_init", "rate"))
    assert isinstance(found, float) and rate == 0.1
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    other = MechanicAdamW(make_weights(), lr=0.1, variant="scaled")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    for group in (*opt.param_groups, *other.param_groups):
        assert (group["s_init"], group["rate"]) == (found, rate)
    run(opt, params, 2, first=3)


def test_a_reset_takes_a_new_start():
    params = make_weights()
    opt = MechanicAdamW(params, lr=1.0, s_init="auto")
    run(opt, params, 3)
    opt.reset_scale()
    assert opt.param_groups[0]["s_init"] == "auto"
    assert float(opt.scale) == pytest.approx(UNCALIBRATED)
    run(opt, params, 1, first=3)
    assert isinstance(opt.param_groups[0]["s_init"], float)


def test_a_bad_start_is_refused():
    with pytest.raises(ValueError, match='s_init must be "auto" or a finite number above 0'):
        MechanicAdamW(make_weights(), s_init="big")
