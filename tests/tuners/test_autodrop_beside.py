"""AutoDrop beside other schedules and Mechanic: what a drop multiplies, and its floor."""

import pytest
import torch
from support.cases import assert_same, make_weights, run, values, write
from support.schedulers import ALWAYS, drift, sgd
from torch.optim import lr_scheduler as torch_lr

from mechanic_fused import MechanicAdamW
from mechanic_fused.tuners import AutoDrop

BESIDE = {
    "MultiStepLR": lambda opt: torch_lr.MultiStepLR(opt, [7, 15], 0.3),
    "CosineAnnealingLR": lambda opt: torch_lr.CosineAnnealingLR(opt, 30),
    "LambdaLR": lambda opt: torch_lr.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda opt: torch_lr.OneCycleLR(opt, 0.2, 30, cycle_momentum=False),
    "CyclicLR": lambda opt: torch_lr.CyclicLR(opt, 0.1, 0.3, 4, cycle_momentum=False),
    "SequentialLR": lambda opt: torch_lr.SequentialLR(
        opt,
        [torch_lr.LinearLR(opt, 0.1, total_iters=5), torch_lr.LambdaLR(opt, lambda t: 0.9**t)],
        [5],
    ),
}


def dropping(opt, **options):
    """Return an AutoDrop that drops at each other step from the fourth on."""
    return AutoDrop(opt, k=1, window=1, threshold=ALWAYS, **options)


def lrs_over(steps, make, tensor, drop_first=None, factor=0.8):
    """Return the lr after each step of a schedule, alone or with a dropping AutoDrop beside it."""
    params = make_weights()
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    opt = sgd(params, lr)
    other = make(opt)
    order, sched = [other], None
    if drop_first is not None:
        sched = dropping(opt, factor=factor, beside=[other])
        order = [sched, other] if drop_first else [other, sched]
    found = []
    for t in range(steps):
        drift(params, t)
        opt.step()
        for each in order:
            each.step()
        found.append(float(opt.param_groups[0]["lr"]))
    assert (opt.param_groups[0]["lr"] is lr) or not tensor
    return found, sched


@pytest.mark.parametrize("make", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("drop_first", [False, True])
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_a_drop_multiplies_what_another_schedule_says(make, drop_first, tensor):
    steps, factor = 24, 0.8
    alone, _ = lrs_over(steps, make, tensor)
    both, sched = lrs_over(steps, make, tensor, drop_first, factor)
    drops = [step for step, _ in sched.drops]
    assert drops == list(range(4, steps + 1, 2))
    for t, (lr, dropped) in enumerate(zip(alone, both, strict=True), 1):
        expected = lr * factor ** sum(step <= t for step in drops)
        # A few roundings a step and drop of numbers no larger than 0.3.
        assert abs(dropped - expected) <= 8 * steps * 2.0**-53 * 0.3


def test_a_schedule_that_is_not_named_undoes_a_drop():
    """Why ``beside`` is there; the docs say so."""
    params = make_weights()
    opt = sgd(params)
    other = torch_lr.LambdaLR(opt, lambda t: 1.0)
    sched = dropping(opt)
    for t in range(4):
        drift(params, t)
        opt.step()
        sched.step()
        lr = opt.param_groups[0]["lr"]
        other.step()
    assert len(sched.drops) == 1 and lr == 0.95 * 0.1
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_the_floor_holds_for_each_group_and_raises_none(tensor):
    params = make_weights()
    lrs = [torch.tensor(r, dtype=torch.float64) if tensor else r for r in (1.0, 0.3, 0.01)]
    opt = sgd([{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)], 1.0)
    sched = dropping(opt, factor=0.5, min_lr=0.2)
    seen = []
    for t in range(8):
        drift(params, t)
        sched.step()
        seen.append([float(lr) for lr in sched.get_last_lr()])
    assert seen[2:] == [
        [1.0, 0.3, 0.01],
        *[[0.5, 0.2, 0.01]] * 2,
        *[[0.25, 0.2, 0.01]] * 2,
        [0.2, 0.2, 0.01],
    ]
    if tensor:
        assert all(g["lr"] is lr for g, lr in zip(opt.param_groups, lrs, strict=True))


@pytest.mark.parametrize(
    ("version", "options"),
    [
        (1, {"threshold": ALWAYS, "threshold_max": ALWAYS, "extra": 2, "factor": 0.5}),
        (2, {"threshold": ALWAYS, "window": 1, "factor": 0.5}),
    ],
)
def test_mechanic_takes_a_drop_and_an_average_as_if_made_by_hand(version, options):
    params, others = make_weights(), make_weights()
    opt, by_hand = (MechanicAdamW(p, lr=1.0, s_init=0.1) for p in (params, others))
    sched = AutoDrop(opt, k=1, version=version, **options)
    for t in range(12):
        run(opt, params, 1, t)
        run(by_hand, others, 1, t)
        before, drops = values(params), len(sched.drops)
        sched.step()
        by_hand.param_groups[0]["lr"] = opt.param_groups[0]["lr"]
        if version == 1 and len(sched.drops) > drops:
            assert any((x != y).any() for x, y in zip(before, values(params), strict=True))
            write(others, values(params))
        assert_same(values(params), values(others))
    assert len(sched.drops) > 1 and opt.param_groups[0]["lr"] < 0.3
