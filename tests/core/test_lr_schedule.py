"""Learning rates: every scheduler of torch, the peak lr, and the annealing factor."""

import copy
import functools
import math

import pytest
import torch
from support import cases
from support.cases import (
    EXACT,
    FEW,
    RUNNING,
    STEPS,
    SUM_RTOL,
    Training,
    assert_same,
    make_weights,
)

from mechanic_fused import MechanicAdamW, MechanicSGD, mechanize, step_together
from mechanic_fused.lr_schedule import PEAK
from mechanic_fused.tuner import Tuner

schedulers = torch.optim.lr_scheduler


def plateau(opt):
    """Return a ReduceLROnPlateau that is stepped like the others: its metric never improves."""
    scheduler = schedulers.ReduceLROnPlateau(opt, patience=1)
    scheduler.step = functools.partial(scheduler.step, 1.0)
    return scheduler


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: t / 4),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.8)], [3]
    ),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.8), schedulers.ConstantLR(o, 0.3, 4)]
    ),
    "ReduceLROnPlateau": plateau,
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 2.0, step_size_up=4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 7),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 2.0, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS, power=2.0),
}


def test_every_scheduler_of_torch_is_tried():
    assert SCHEDULERS.keys() == set(schedulers.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("tensor", [False, True], ids=["", "tensor lr"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_drives_every_update(train, name, base, tensor):
    """Δ sums what the plain base adds if the scheduler drives it over the same gradients."""
    options = {"sgd": {"momentum": 0.9}, "adamw": {"weight_decay": 0.0}}[base]
    lr = torch.tensor(1.0, dtype=torch.float64) if tensor else 1.0
    schedule = {"schedule": SCHEDULERS[name]}
    one = train(base, dtype=torch.float64, lr=lr, s_init=cases.LOST, **options, **schedule)
    seen = []

    def note(opt, t):
        (group,) = opt.param_groups
        seen.append([float(group["lr"]), *(group.get(k) for k in ("betas", "momentum"))])

    plain = cases.PLAIN[base]
    total = cases.sum_of_updates(plain, one, change=note, lr=1.0, **options, **schedule)
    assert seen[::2] == seen[1::2]
    assert len({row[0] for row in seen}) > 1
    for delta, expected, x in zip(one.states("delta"), total, one.x, strict=True):
        size = float(expected.abs().max()) + float(x.abs().max())
        cases.assert_within(delta, expected, SUM_RTOL * size)


def test_swa_lr_drives_ours_too(train):
    def schedule(opt):
        return torch.optim.swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=FEW)

    assert train(schedule=schedule).run(FEW).group["lr"] == pytest.approx(0.05)


def test_at_an_lr_of_0_the_tuner_goes_on_learning():
    """As at an lr next to 0: s rests, and what it will be goes on being learned."""
    found = []
    for least in (0.0, 1e-30):
        one = Training(s_init=0.01)
        start = one.x
        for t in range(STEPS):
            one.group["lr"] = least if 5 <= t < 10 else 1.0
            one.step(cases.gradients(start, t))
        found.append(float(one.opt.scale))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("s_init", [None, 1e-3])
def test_the_lr_may_be_0_until_the_loop_sets_it(s_init):
    one = Training(lr=0.0, s_init=s_init)
    start = one.x
    for t in range(STEPS):
        one.group["lr"] = t / 10
        one.run(1)
    assert all(torch.isfinite(p).all() for p in one.params)
    assert one.opt.scale.isfinite().all()
    assert cases.differs(one.x, start)
    assert one.group[PEAK] == (STEPS - 1) / 10


def test_the_base_may_have_no_lr():
    class NoLr(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad)

    params = make_weights()
    opt = mechanize(NoLr)(params)
    cases.run(opt, params)
    assert 0 < opt.learned_lr()[0] == float(opt.scale)


def test_a_base_may_set_its_own_lr_where_it_is_none():
    """As transformers' Adafactor does."""

    class OwnLr(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                assert group["lr"] is None
                for p in group["params"]:
                    p.sub_(0.1 * p.grad)

    params = make_weights()
    opt = mechanize(OwnLr)(params)
    for group in opt.param_groups:
        group["lr"] = None
    cases.run(opt, params)
    assert 0 < opt.learned_lr()[0] == float(opt.scale)
    opt.load_state_dict(opt.state_dict())
    assert opt.to_base().param_groups[0]["lr"] is None


@pytest.mark.parametrize("variant", ["running", "annealed", "optax"])
@pytest.mark.parametrize("lr", [math.inf, math.nan, -1.0, "0.1", 1e200])
def test_a_bad_lr_is_refused_and_leaves_no_trace(train, variant, lr):
    one = train(variant=variant).run(FEW)
    before = one.snapshot()
    one.group["lr"], kept = lr, one.group["lr"]
    with pytest.raises(ValueError, match="lr of param group 0 must be a finite number of 0 or mor"):
        one.run(1)
    one.group["lr"] = kept
    assert_same(one.snapshot(), before)
    assert_same(one.run(FEW).x, train(variant=variant).run(2 * FEW).x)


@pytest.mark.parametrize("variant", ["running", "annealed", "optax"])
def test_a_bad_lr_of_the_first_step_is_refused_and_leaves_no_trace(train, variant):
    one = train(variant=variant)
    one.group["lr"], kept = math.inf, one.group["lr"]
    with pytest.raises(ValueError, match="lr of param group 0 must be a finite number"):
        one.run(1)
    one.group["lr"] = kept
    assert_same(one.run(FEW).x, train(variant=variant).run(FEW).x)


def test_a_fused_update_needs_an_lr():
    params = make_weights()
    opt = MechanicAdamW(params)
    cases.run(opt, params)
    opt.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match=r"lr of param group 0 must be .* got None"):
        cases.run(opt, params)


def test_the_lr_may_be_a_tensor_of_one_element():
    assert float(Training(lr=torch.tensor([1.0])).run(3).opt.scale) > 0


# The peak lr, and the annealing factor lr/(peak lr)


def annealing_factor(opt):
    return float(opt._current_tuner().constants[Tuner.FACTOR])


def test_the_peak_is_what_a_scheduler_announces():
    """Not what the constructor was given."""

    def schedule(opt):
        return schedulers.OneCycleLR(opt, 0.5, total_steps=STEPS)

    assert Training(lr=1.0, schedule=schedule).run(3).group[PEAK] == 0.5


AT_ITS_PEAK = {"base": "adamw", "lr": 1.0, "variant": RUNNING, "s_init": None, "s_decay": None}


@pytest.mark.parametrize("slip", [1e3, 1e10, 1e25])
def test_a_single_step_at_a_far_too_large_lr_leaves_no_trace(slip):
    """Updates are of their usual size in it, and the peak is forgotten in the next."""
    runs = [Training(**AT_ITS_PEAK) for _ in range(2)]
    for one, lrs in zip(runs, ([1.0] * 3, [1.0, slip, 1.0]), strict=True):
        one.run(15)
        for lr in lrs:
            one.group["lr"] = lr
            one.run(1)
        one.run(3)
    expected, found = runs
    assert found.group[PEAK] == expected.group[PEAK] == 1.0
    torch.testing.assert_close(found.opt.scale, expected.opt.scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-5, atol=1e-6)


def test_of_one_group_alone_too():
    """Its weights go where they are sent, and S moves by no more than in any step."""

    def run(lr):
        one = Training(**AT_ITS_PEAK, groups=lambda ps: [{"params": [p]} for p in ps]).run(15)
        one.group["lr"] = lr
        one.run(1)
        one.group["lr"] = 1.0
        return one.run(1)

    expected, found = run(1.0), run(1e3)
    assert [group[PEAK] for group in found.opt.param_groups] == [1.0] * 3
    largest_move = math.exp(2 * 0.03 * (1 + 1))  # in two steps h may say the opposite
    assert 1 / largest_move <= float(found.opt.scale / expected.opt.scale) <= largest_move


def test_a_checkpoint_after_a_slip_brings_its_own_peak():
    """S is then what it was before, and must not grow by what the slip had taken from it."""
    one = Training(**AT_ITS_PEAK).run(15)
    saved, scale = copy.deepcopy(one.opt.state_dict()), float(one.opt.scale)
    one.group["lr"] = 1e10
    one.run(1)
    one.opt.load_state_dict(saved)
    one.run(2)
    assert one.group[PEAK] == 1.0
    assert 0.8 * scale < float(one.opt.scale) < 1.25 * scale


def test_a_schedule_that_alternates_is_followed():
    one = Training(**AT_ITS_PEAK).run(15)
    for lr in (1e3, 1.0, 1e3, 1.0, 1e3, 1.0):
        one.group["lr"] = lr
        one.run(1)
    assert one.group[PEAK] == 1e3


def test_an_lr_that_stays_far_above_its_peak_is_the_new_peak():
    one = Training(**AT_ITS_PEAK).run(15)
    one.group["lr"] = 1e3
    one.run(2)
    one.group["lr"] = 1.0
    one.run(1)
    assert one.group[PEAK] == 1e3


def test_a_reset_forgets_the_peak():
    one = Training(s_init=None).run(2)
    one.opt.reset_scale()
    one.group["lr"] = 0.1
    one.run(1)
    assert one.group[PEAK] == 0.1
    assert annealing_factor(one.opt) == 1.0


def test_the_peak_of_a_plain_checkpoint_is_forgotten():
    params = make_weights()
    plain = torch.optim.SGD(params, lr=10.0)
    cases.run(plain, params, 1)
    one = Training(MechanicSGD, "sgd", params, lr=1.0, s_init=None)
    one.opt.load_state_dict(plain.state_dict())
    one.group["lr"] = 1.0
    one.run(2)
    assert one.group[PEAK] == 1.0
    assert annealing_factor(one.opt) == 1.0


def test_groups_may_be_given_to_another_optimizer():
    groups = [{"params": make_weights(), "lr": 0.5}]
    MechanicAdamW(groups)
    assert MechanicAdamW(groups).param_groups[0][PEAK] == 0.5


@pytest.mark.parametrize("idle", ["frozen", "empty"])
def test_a_group_that_trains_nothing_does_not_hold_the_annealing_factor(idle):
    others = [p.requires_grad_(False) for p in make_weights(seed=1)] if idle == "frozen" else []
    one = Training(groups=lambda params: [{"params": params}, {"params": others}])
    for t in range(4):
        one.group["lr"] = 1.0 - t / 4
        one.run(1)
        assert annealing_factor(one.opt) == 1.0 - t / 4


def test_a_group_that_joins_late_is_not_at_its_peak():
    one = Training().run(2)
    one.group["lr"] = 0.01
    one.opt.add_param_group({"params": make_weights(seed=1), "lr": 0.01})
    one.run(1)
    assert annealing_factor(one.opt) == 0.01


def test_parts_with_schedules_of_their_own_learn_one_scale():
    parts = [Training(seed=seed, s_init=None) for seed in (0, 1)]
    for t in range(STEPS):
        parts[0].group["lr"] = 1.0 - t / STEPS
        for part in parts:
            cases.set_gradients(part.params, t)
        step_together([part.opt for part in parts])
        assert_same(*(part.opt.scale for part in parts))
    assert annealing_factor(parts[0].opt) == 1.0


def test_a_number_takes_the_place_of_a_factor_on_the_device():
    tuner = MechanicAdamW(make_weights(), variant="annealed")._current_tuner()
    for factor in (1.0, torch.tensor(0.25), 1.0, torch.tensor(0.5)):
        tuner.set_annealing_factor(factor)
        assert float(tuner.constants[Tuner.FACTOR]) == float(factor)


@pytest.mark.parametrize("variant", [EXACT, RUNNING])
def test_a_refreshed_peak_counts_as_one_that_the_step_has_found(variant):
    """For CUDA graphs, whose replays run no Python."""
    one, other = (Training(variant=variant, s_init=None).run(STEPS) for _ in range(2))
    for each in (one, other):
        each.group["lr"] = 4.0
    other.opt.refresh_hyperparameters()
    for each in (one, other):
        each.run(FEW)
    assert_same(one.opt.scale, other.opt.scale)
    assert_same(one.x, other.x)
