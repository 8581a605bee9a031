"""Learning rates: every scheduler of torch, tensors, and what lr means to the tuner."""

import pytest
import torch
from cases import (
    FEW,
    FUSED,
    LOST,
    OPTIONS,
    PLAIN,
    QUICK,
    STEPS,
    SUM_RTOL,
    TINY_EPS,
    assert_same,
    assert_within,
    build,
    gradients,
    make_weights,
    run,
    values,
)

# Learning rates

schedulers = torch.optim.lr_scheduler
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
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 2.0, step_size_up=4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 7),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 2.0, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS, power=2.0),
}


def test_every_scheduler_of_torch_is_tried():
    assert SCHEDULERS.keys() == set(schedulers.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["", "tensor lr"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_every_update(road, name, base, tensor_lr):
    """Δ is where the plain base would be, if the scheduler drives it over the same gradients."""
    options = {"sgd": {"momentum": 0.9}, "adamw": {"weight_decay": 0.0}}[base]
    lr = torch.tensor(1.0, dtype=torch.float64) if tensor_lr else 1.0
    ours, plains = make_weights(dtype=torch.float64), make_weights(dtype=torch.float64)
    opt = build(road, base, ours, lr=lr, **options)
    plain = PLAIN[base](plains, lr=1.0, **options)
    pairs = [(opt, SCHEDULERS[name](opt)), (plain, SCHEDULERS[name](plain))]
    start, rates = values(plains), []
    for t in range(STEPS):
        # Of the unmoved weights, so that both see the same.
        for p, q, g in zip(ours, plains, gradients(start, t), strict=True):
            p.grad, q.grad = g, g.clone()
        for optimizer, scheduler in pairs:
            optimizer.step()
            metric = () if name != "ReduceLROnPlateau" else (1.0,)
            scheduler.step(*metric)
        keys = [k for k in ("lr", "betas", "momentum") if k in plain.param_groups[0]]
        options = [[o.param_groups[0][k] for k in keys] for o in (opt, plain)]
        assert str(float(options[0][0])) == str(float(options[1][0]))
        assert options[0][1:] == options[1][1:]
        rates.append(float(options[0][0]))
    assert len(set(rates)) > 1
    for p, q, x in zip(ours, plains, start, strict=True):
        size = float((q - x).detach().abs().max()) + float(x.abs().max())
        assert_within(opt.state[p]["delta"], q - x, SUM_RTOL * size)


def test_swa_lr_drives_ours_too(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    scheduler = torch.optim.swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=FEW)
    for t in range(FEW):
        run(opt, params, 1, first=t)
        scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_tensor_lr_is_read_anew_at_each_step(road):
    found = []
    for tensor in (False, True):
        params = make_weights()
        lr = torch.tensor(1.0, dtype=torch.float64) if tensor else 1.0
        opt = build(road, "adamw", params, lr=lr, **QUICK)
        run(opt, params, FEW)
        if tensor:
            lr.fill_(0.25)
        else:
            opt.param_groups[0]["lr"] = 0.25
        run(opt, params, FEW, first=FEW)
        found.append([*values(params), opt.scale, opt.learned_lr()])
    assert_same(found[1], found[0])


# Invariances


@pytest.mark.parametrize("base", FUSED)
def test_lr_may_be_traded_for_the_tuners_constants(backend, base):
    """lr·c with s_init/c, λ·c and ε·c is the same run; for c = 2ⁿ to the bit."""
    found = []
    for c in (1.0, 2.0**-13):
        params = make_weights()
        options = {**OPTIONS[base], "lr": OPTIONS[base]["lr"] * c}
        tuner = {"s_init": QUICK["s_init"] / c, "s_decay": 0.01 * c, "tuner_eps": TINY_EPS * c}
        tuner["variant"] = "optax"
        opt = build(backend, base, params, **options, **tuner)
        run(opt, params)
        found.append([*values(params), opt.scale * c])
    assert_same(found[1], found[0])


# What somebody may do to a group between steps.
CHANGES = {
    "momentum comes": ("sgd", {}, {"momentum": 0.9, "dampening": 0.5}),
    "momentum goes": ("sgd", {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.0}),
    "nesterov": ("sgd", {"momentum": 0.9}, {"nesterov": True}),
    "decay": ("sgd", {}, {"weight_decay": 0.5}),
    "decay and eps": ("adam", {}, {"weight_decay": 0.5, "eps": 1e-2}),
    "decoupled decay": ("adamw", {"weight_decay": 0.0}, {"weight_decay": 0.5}),
    "betas": ("adamw", {}, {"betas": (0.5, 0.7)}),
    "maximize": ("adamw", {}, {"maximize": True}),
    "lion": ("lion", {}, {"betas": (0.5, 0.7), "weight_decay": 0.5}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_option_changed_between_steps_is_that_of_the_next_update(road, change):
    """Changed, and changed back: Δ sums what the plain base would add with the same changes."""
    base, options, changed = CHANGES[change]
    ours, plains = make_weights(dtype=torch.float64), make_weights(dtype=torch.float64)
    # A scale at which S·Δ is lost: ours stay where they are, and the plain ones are put back.
    opt = build(road, base, ours, lr=0.5, s_init=LOST, **options)
    opt.freeze_scale()
    plain = PLAIN[base](plains, lr=0.5, **options)
    start = values(plains)
    total = [torch.zeros_like(x) for x in start]
    original = {name: plain.param_groups[0][name] for name in changed}
    for t in range(3 * FEW):
        if t in (FEW, 2 * FEW):
            for optimizer in (opt, plain):
                optimizer.param_groups[0].update(changed if t == FEW else original)
        for p, q, g in zip(ours, plains, gradients(start, t), strict=True):
            p.grad, q.grad = g, g.clone()
        opt.step()
        plain.step()
        for q, x, sum_ in zip(plains, start, total, strict=True):
            sum_ += q.detach() - x
            q.data.copy_(x)
    for p, x, sum_ in zip(ours, start, total, strict=True):
        size = float(sum_.abs().max() + x.abs().max())
        assert_within(opt.state[p]["delta"], sum_, SUM_RTOL * size)
