"""variant="scaled": the peak of the lr, and the scale's pace that goes by it."""

import copy

import pytest
import torch
from cases import STEPS, assert_same, gradients, make_weights, run, set_gradients, snapshot, values

from mechanic_fused import MechanicAdamW, MechanicSGD, mechanize, step_together
from mechanic_fused.lr_schedule import PEAK
from mechanic_fused.tuner import PACE

schedulers = torch.optim.lr_scheduler
HALF = STEPS // 2


def pace_now(opt):
    return float(opt._current_tuner().constants[PACE])


def scheduled(make, params, **options):
    opt = MechanicAdamW(params, **options)
    return opt, make(opt)


def advance(opt, scheduler, params, steps, first=0):
    for t in range(first, first + steps):
        set_gradients(params, t)
        opt.step()
        scheduler.step()


RISING = {
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=7, cycle_momentum=False),
    "LambdaLR up": lambda o: schedulers.LambdaLR(o, lambda t: 1 + t / 10),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=2 * STEPS),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 7),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["", "tensor lr"])
@pytest.mark.parametrize("name", RISING)
def test_a_copy_in_the_middle_of_a_schedule_goes_on_to_the_same_bits(name, tensor):
    params = make_weights()
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    opt, scheduler = scheduled(RISING[name], params, lr=lr)
    advance(opt, scheduler, params, HALF)
    others = [torch.nn.Parameter(x) for x in values(params)]
    other, other_scheduler = scheduled(RISING[name], others, lr=copy.deepcopy(lr))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    other_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    advance(opt, scheduler, params, HALF, HALF)
    advance(other, other_scheduler, others, HALF, HALF)
    assert_same(snapshot(other), snapshot(opt))


@pytest.mark.parametrize("s_init", [None, 1e-3])
def test_an_lr_of_0_until_a_loop_sets_one(s_init):
    params = make_weights()
    opt = MechanicAdamW(params, lr=0.0, s_init=s_init)
    start = values(params)
    for t in range(STEPS):
        opt.param_groups[0]["lr"] = t / 10
        run(opt, params, 1, first=t)
    assert all(torch.isfinite(p).all() for p in params) and opt.scale.isfinite().all()
    assert any((p != x).any() for p, x in zip(params, start, strict=True))
    assert opt.param_groups[0][PEAK] == (STEPS - 1) / 10


class NoRate(torch.optim.Optimizer):
    """A base that has no lr."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad)


def test_a_base_without_an_lr():
    params = make_weights()
    opt = mechanize(NoRate)(params)
    run(opt, params)
    assert 0 < opt.learned_lr()[0] == float(opt.scale)


def test_parts_with_schedules_of_their_own_learn_one_scale():
    parts = [make_weights(seed=seed) for seed in (0, 1)]
    optimizers = [MechanicAdamW(part, lr=1.0) for part in parts]
    for t in range(STEPS):
        optimizers[0].param_groups[0]["lr"] = 1.0 - t / STEPS
        for part in parts:
            set_gradients(part, t)
        step_together(optimizers)
        assert_same(optimizers[0].scale, optimizers[1].scale)
    assert pace_now(optimizers[0]) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_first_step_that_is_not_finite_is_none_to_start_from(bad):
    found = []
    for spoiled in (False, True):
        params = make_weights()
        opt = MechanicAdamW(params, lr=1.0, weight_decay=0.01)
        for t in range(2):
            set_gradients(params, t)
            if spoiled and t == 0:
                params[0].grad[0] = bad
                assert opt.param_groups[0]["s_init"] == "auto"
            opt.step()
        found.append(opt.param_groups[0]["s_init"])
    # Δ is the sum of two updates by then.
    assert 0.3 < found[1] / found[0] < 3


def test_groups_may_be_given_to_another_optimizer():
    groups = [{"params": make_weights(), "lr": 0.5}]
    MechanicAdamW(groups)
    assert MechanicAdamW(groups).param_groups[0][PEAK] == 0.5


@pytest.mark.parametrize("idle", ["frozen", "empty"])
def test_groups_that_train_nothing_do_not_hold_the_pace(idle):
    params, others = make_weights(), make_weights(seed=1)
    for p in others:
        p.requires_grad = False
    rest = others if idle == "frozen" else []
    opt = MechanicAdamW([{"params": params}, {"params": rest}], lr=1.0)
    for t in range(4):
        opt.param_groups[0]["lr"] = 1.0 - t / 4
        set_gradients(params, t)
        opt.step()
        assert pace_now(opt) == 1.0 - t / 4


def test_a_group_that_joins_late_is_not_at_its_peak():
    params, late = make_weights(), make_weights(seed=1)
    opt = MechanicAdamW(params, lr=1.0)
    run(opt, params, 2)
    opt.param_groups[0]["lr"] = 0.01
    opt.add_param_group({"params": late, "lr": 0.01})
    set_gradients(params, 2)
    opt.step()
    assert pace_now(opt) == 0.01


def test_what_a_scheduler_names_is_the_peak():
    """Not what the constructor was given; and a reset forgets what was."""
    params = make_weights()
    opt, scheduler = scheduled(RISING["OneCycleLR"], params, lr=1.0)
    advance(opt, scheduler, params, 3)
    assert opt.param_groups[0][PEAK] == 0.5
    plain = MechanicAdamW(make_weights(), lr=1.0)
    run(plain, plain.param_groups[0]["params"], 2)
    plain.reset_scale()
    plain.param_groups[0]["lr"] = 0.1
    run(plain, plain.param_groups[0]["params"], 1)
    assert plain.param_groups[0][PEAK] == 0.1 and pace_now(plain) == 1.0


def test_the_peak_of_a_plain_bases_checkpoint_is_forgotten():
    params = make_weights()
    plain = torch.optim.SGD(params, lr=10.0)
    set_gradients(params, 0)
    plain.step()
    opt = MechanicSGD(params, lr=1.0)
    opt.load_state_dict(plain.state_dict())
    opt.param_groups[0]["lr"] = 1.0
    run(opt, params, 2)
    assert opt.param_groups[0][PEAK] == 1.0 and pace_now(opt) == 1.0


def test_an_lr_of_one_element():
    params = make_weights()
    opt = MechanicAdamW(params, lr=torch.tensor([1.0]))
    run(opt, params, 3)
    assert float(opt.scale) > 0


def test_at_an_lr_of_0_the_tuner_goes_on_learning():
    """As at an lr next to 0: s rests, and what it will be goes on being learned."""
    found = []
    for least in (0.0, 1e-30):
        params = make_weights()
        opt = MechanicAdamW(params, lr=1.0, s_init=0.01)
        start = values(params)
        for t in range(STEPS):
            opt.param_groups[0]["lr"] = least if 5 <= t < 10 else 1.0
            for p, g in zip(params, gradients(start, t), strict=True):
                p.grad = g
            opt.step()
        found.append(float(opt.scale))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_number_takes_the_place_of_a_pace_on_the_device():
    tuner = MechanicAdamW(make_weights())._current_tuner()
    for pace in (1.0, torch.tensor(0.25), 1.0, torch.tensor(0.5)):
        tuner.set_pace(pace)
        assert float(tuner.constants[PACE]) == float(pace)
