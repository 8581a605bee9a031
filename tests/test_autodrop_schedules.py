"""AutoDrop beside other schedules: what a drop multiplies, floors, shared rates, Mechanic."""

import pytest
import torch
from autodrop_runs import ALWAYS, NEVER, drift
from cases import assert_same, make_weights, run, values
from torch.optim import lr_scheduler as torch_lr

from mechanic_fused import MechanicAdamW
from mechanic_fused.tuners import AutoDrop


@pytest.mark.parametrize("base", [torch.optim.AdamW, MechanicAdamW])
@pytest.mark.parametrize("version", [1, 2])
def test_a_run_in_which_nothing_drops_is_the_run_without(base, version):
    results = []
    for tuned in (False, True):
        params = make_weights()
        opt = base(params, lr=0.1)
        sched = AutoDrop(opt, k=2, version=version, threshold=NEVER[version]) if tuned else None
        for t in range(40):
            run(opt, params, 1, t)
            if sched:
                sched.step()
        results.append([values(params), opt.state_dict()])
    assert sched.angle is not None and not sched.drops
    assert_same(*results)


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
    """AutoDrop that drops at each other step from the fourth on."""
    return AutoDrop(opt, k=1, window=1, threshold=ALWAYS, **options)


@pytest.mark.parametrize("make", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("first", ["schedule", "drop"])
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_a_drop_multiplies_what_another_schedule_says(make, first, tensor):
    steps, factor = 24, 0.8
    rates = []
    for tuned in (False, True):
        params = make_weights()
        lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
        opt = torch.optim.SGD(params, lr=lr)
        other = make(opt)
        order = [other]
        if tuned:
            sched = dropping(opt, factor=factor, beside=[other])
            order = [other, sched] if first == "schedule" else [sched, other]
        rates.append([])
        for t in range(steps):
            drift(params, t)
            opt.step()
            for each in order:
                each.step()
            rates[-1].append(float(opt.param_groups[0]["lr"]))
        assert (opt.param_groups[0]["lr"] is lr) or not tensor
    assert [step for step, _ in sched.drops] == list(range(4, steps + 1, 2))
    for t, (alone, both) in enumerate(zip(*rates, strict=True), 1):
        expected = alone * factor ** sum(step <= t for step, _ in sched.drops)
        # A few roundings a step and drop of numbers no larger than 0.3.
        assert abs(both - expected) <= 8 * steps * 2.0**-53 * 0.3


def test_a_schedule_that_is_not_named_undoes_a_drop():
    """Why ``beside`` is there; the docs say so."""
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1)
    other = torch_lr.LambdaLR(opt, lambda t: 1.0)
    sched = dropping(opt)
    for t in range(4):
        drift(params, t)
        opt.step()
        sched.step()
        rate = opt.param_groups[0]["lr"]
        other.step()
    assert len(sched.drops) == 1 and rate == 0.95 * 0.1
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_the_floor_holds_for_each_group_and_raises_none(tensor):
    params = make_weights()
    rates = [1.0, 0.3, 0.01]
    kinds = [torch.tensor(r, dtype=torch.float64) if tensor else r for r in rates]
    opt = torch.optim.SGD(
        [{"params": [p], "lr": r} for p, r in zip(params, kinds, strict=True)], lr=1.0
    )
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
        assert all(g["lr"] is r for g, r in zip(opt.param_groups, kinds, strict=True))


def test_a_tensor_that_groups_share_drops_once():
    params = make_weights()
    lr = torch.tensor(1.0, dtype=torch.float64)
    opt = torch.optim.SGD([{"params": [p]} for p in params], lr=lr)
    assert all(group["lr"] is lr for group in opt.param_groups)
    sched = dropping(opt, factor=0.5)
    for t in range(4):
        drift(params, t)
        sched.step()
    assert len(sched.drops) == 1 and float(lr) == 0.5
    last = sched.get_last_lr()
    assert [float(x) for x in last] == [0.5] * len(params)
    assert all(x is not lr for x in last)


@pytest.mark.parametrize("version", [1, 2])
def test_mechanic_takes_a_drop_and_an_average_as_if_made_by_hand(version):
    options = {
        1: {"threshold": ALWAYS, "threshold_max": ALWAYS, "extra": 2, "factor": 0.5},
        2: {"threshold": ALWAYS, "window": 1, "factor": 0.5},
    }
    results = []
    for tuned in (True, False):
        params = make_weights()
        opt = MechanicAdamW(params, lr=1.0, s_init=0.1)
        sched = AutoDrop(opt, k=1, version=version, **options[version])
        for t in range(12):
            run(opt, params, 1, t)
            before = values(params)
            if tuned:
                sched.step()
                results.append((len(sched.drops), opt.param_groups[0]["lr"], values(params)))
                continue
            drops, lr, after = results[t]
            for group in opt.param_groups:
                group["lr"] = lr
            if version == 1 and drops > (results[t - 1][0] if t else 0):
                assert any((x != y).any() for x, y in zip(before, after, strict=True))
                with torch.no_grad():
                    for p, x in zip(params, after, strict=True):
                        p.copy_(x)
            assert_same(values(params), after)
    assert results[-1][0] > 1 and results[-1][1] < 0.3
