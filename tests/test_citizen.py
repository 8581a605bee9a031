"""An optimizer like any other: all that torch's own optimizers do, and what people do to them."""

import inspect
import logging
import pickle
import weakref

import mechanic_pytorch
import pytest
import torch
from cases import (
    FEW,
    FUSED,
    LONG,
    OPTIONS,
    PLAIN,
    QUICK,
    SHAPES,
    STEPS,
    SUM_RTOL,
    PlainAdamW,
    SmallNet,
    assert_same,
    assert_within,
    batch,
    build,
    differs,
    double,
    gradients,
    loss_of,
    make_weights,
    move,
    run,
    set_gradients,
    snapshot,
    train_net,
    ulp,
    values,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mechanic_fused import (
    MechanicAdamW,
    MechanicLion,
    MechanicSGD,
    backends,
    is_mechanized,
    mechanize,
)

SCALES = ("global", "group", "parameter")
# A loss that starts in the tens has been learned from when this much of it is left.
LEARNED = 0.5
WIDTHS = [torch.float32, torch.bfloat16]


# Param groups


@pytest.mark.parametrize("base", FUSED)
def test_groups_keep_their_own_options(road, base):
    """With a scale for each group, two groups are two optimizers."""
    own = [{"lr": 1.0, "weight_decay": 0.1}, {"lr": 0.3, "weight_decay": 0.0}]
    if base == "sgd":
        own = [{"momentum": 0.5, **own[0]}, {"momentum": 0.0, **own[1]}]
    else:
        own = [{"betas": (0.5, 0.9), **own[0]}, {"betas": (0.9, 0.99), **own[1]}]
    apart = []
    for seed, options in enumerate(own):
        params = make_weights(seed=seed)
        run(build(road, base, params, **QUICK, **options), params)
        apart += values(params)
    params = [make_weights(seed=0), make_weights(seed=1)]
    groups = [{"params": p, **options} for p, options in zip(params, own, strict=True)]
    opt = build(road, base, groups, scale="group", **QUICK)
    for t in range(STEPS):
        for group in params:
            set_gradients(group, t)
        opt.step()
    assert_same(values(sum(params, [])), apart)


@pytest.mark.parametrize("when", [0, 1, FEW])
@pytest.mark.parametrize("scale", ["group", "parameter"])
def test_an_added_group_runs_as_if_alone_and_disturbs_no_other(road, scale, when):
    old, new = make_weights(seed=0), make_weights(seed=1)
    opt = build(road, "adamw", old, scale=scale, **QUICK)
    run(opt, old, when)
    opt.add_param_group({"params": new, "lr": 0.5})
    for t in range(when, when + STEPS):
        set_gradients(old, t)
        set_gradients(new, t)
        opt.step()
    alone = make_weights(seed=0), make_weights(seed=1)
    run(build(road, "adamw", alone[0], scale=scale, **QUICK), alone[0], when + STEPS)
    run(build(road, "adamw", alone[1], scale=scale, lr=0.5, **QUICK), alone[1], STEPS, first=when)
    assert_same(values(old + new), values(alone[0] + alone[1]))


@pytest.mark.parametrize("when", [0, 1, FEW])
def test_a_group_added_under_a_global_scale_is_a_group_without_gradients_so_far(road, when):
    found = []
    for late in (False, True):
        old, new = make_weights(seed=0), make_weights(seed=1)
        # λ = 0, or the weights that are not there yet would be missing in ‖x‖.
        opt = build(road, "adamw", old, s_decay=0.0, **QUICK)
        if not late:
            opt.add_param_group({"params": new, "lr": 0.5})
        run(opt, old, when)
        if late:
            opt.add_param_group({"params": new, "lr": 0.5})
        for t in range(when, when + STEPS):
            set_gradients(old, t)
            set_gradients(new, t)
            opt.step()
        found.append(values(old + new))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("scale", SCALES)
def test_the_learned_rates_are_readable_at_once_after_adding_a_group(road, scale):
    old, new = make_weights(seed=0), make_weights(seed=1)
    opt = build(road, "adamw", old, scale=scale, **QUICK)
    run(opt, old, FEW)
    before = opt.scale
    opt.add_param_group({"params": new})
    assert_same(opt.scale[: len(before)], before)
    assert opt.scale.shape == ({"global": 1, "group": 2, "parameter": len(old + new)}[scale],)
    assert len(opt.learned_lr()) == len(opt.to_base().param_groups[0:2]) == 2


def test_an_added_group_takes_over_the_tuners_options_and_refuses_others(road):
    old, new = make_weights(seed=0), make_weights(seed=1)
    opt = build(road, "adamw", old, tuner_betas=(0.9, 0.99), **QUICK)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"s_decay .*0\.01.*0\.5"):
        opt.add_param_group({"params": new, "s_decay": 0.5})
    assert_same(snapshot(opt), before)
    opt.add_param_group({"params": new})
    assert opt.param_groups[1]["tuner_betas"] == opt.param_groups[0]["tuner_betas"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("emptied", [0, 1])
def test_a_group_that_becomes_empty_leaves_the_others_alone(road, scale, emptied):
    params = [make_weights(seed=0), make_weights(seed=1)]
    left = params[1 - emptied]
    opt = build(road, "adamw", [{"params": list(p)} for p in params], scale=scale, **QUICK)
    for t in range(FEW):
        set_gradients(params[0] + params[1], t)
        opt.step()
    gone = values(params[emptied])
    learned = opt.group_scales()[1 - emptied]
    opt.param_groups[emptied]["params"].clear()
    assert opt.group_scales()[1 - emptied] == learned
    loss = loss_of(left)
    run(opt, left, STEPS, first=FEW)
    assert loss_of(left) < LEARNED * loss
    assert_same(values(params[emptied]), gone)
    assert len(opt.learned_lr()) == 2


@pytest.mark.parametrize("scale", SCALES)
def test_an_empty_group_from_the_start_is_as_none(road, scale):
    found = []
    for groups in ([0], [1, 0], [0, 1]):
        params = make_weights()
        opt = build(
            road,
            "adamw",
            [{"params": [] if empty else params} for empty in groups],
            scale=scale,
            **QUICK,
        )
        run(opt, params)
        found.append(values(params))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_an_optimizer_without_weights_steps_and_takes_some_later(road):
    opt = build(road, "adamw", [{"params": []}], **QUICK)
    opt.step()
    params = make_weights()
    opt.add_param_group({"params": params})
    loss = loss_of(params)
    run(opt, params, LONG)
    assert loss_of(params) < LEARNED * loss


def test_weights_replaced_after_construction_are_the_ones_trained(road):
    """As accelerate does when it shards a model."""
    old, new, direct = make_weights(seed=0), make_weights(seed=1), make_weights(seed=1)
    opt = build(road, "adamw", old, **QUICK)
    opt.param_groups[0]["params"] = new
    run(opt, new)
    run(build(road, "adamw", direct, **QUICK), direct)
    assert_same(values(old), values(make_weights(seed=0)))
    assert_same(values(new), values(direct))


# Frozen weights, absent gradients


def test_frozen_weights_are_neither_moved_nor_counted(road):
    frozen, free, alone = make_weights(seed=0), make_weights(seed=1), make_weights(seed=1)
    for p in frozen:
        p.requires_grad_(False)
    before = values(frozen)
    opt = build(road, "adamw", frozen + free, **QUICK)
    for t in range(STEPS):
        set_gradients(free, t)
        for p in frozen:
            p.grad = torch.ones_like(p)  # left over from before it was frozen
        opt.step()
    run(build(road, "adamw", alone, **QUICK), alone)
    assert_same(values(frozen), before)
    assert_same(values(free), values(alone))


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_unfrozen_weights_do_not_jump(road, dtype):
    params = make_weights(dtype=dtype)
    frozen = params[0]
    opt = build(road, "sgd", params, lr=0.05, **QUICK)
    run(opt, params, FEW)
    frozen.requires_grad_(False)
    frozen.grad = None
    run(opt, params[1:], STEPS, first=FEW)
    drift = move(opt, frozen)
    frozen.requires_grad_(True)
    opt.freeze_scale()
    before, moved = double(frozen), move(opt, frozen)
    assert not torch.equal(moved, torch.zeros_like(moved))
    # A jump would be as large as what S has done to S·Δ meanwhile: far above the rounding.
    run(opt, params, 1, first=FEW + STEPS)
    expected = before + move(opt, frozen) - moved
    assert_within(frozen, expected, 2 * ulp(frozen))
    assert float(drift.abs().max()) > 10 * ulp(frozen)


def test_a_weight_frozen_from_the_start_joins_where_it_stands(road):
    params = make_weights()
    late = params[0].requires_grad_(False)
    opt = build(road, "sgd", params, lr=0.05, **QUICK)
    run(opt, params[1:], FEW)
    late.requires_grad_(True)
    before = double(late)
    run(opt, params, 1, first=FEW)
    assert_within(late, before + move(opt, late), ulp(late))
    assert differs(double(late), before)


def test_a_weight_without_gradient_keeps_its_state_and_follows_the_scale(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    absent = params[0]
    absent.grad = None
    before = {k: v.clone() for k, v in opt.state[absent].items()}
    x_before = values([absent])
    run(opt, params[1:], STEPS, first=FEW)
    assert_same(dict(opt.state[absent]), before)
    assert differs(values([absent]), x_before)
    expected = before["x_ref"].double() + move(opt, absent)
    assert_within(absent, expected, ulp(absent))


@pytest.mark.parametrize("steps", [0, FEW])
def test_a_step_without_any_gradient_changes_nothing(road, steps):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, steps)
    opt.zero_grad()
    before = snapshot(opt)
    assert opt.step() is None
    if steps == 0:  # state may be made, and only that
        assert_same(values(params), before["weights"])
        assert_same(opt.scale, build(road, "adamw", make_weights(), **QUICK).scale)
    else:
        assert_same(snapshot(opt), before)


# Closures


@pytest.mark.parametrize("enabled", [True, False])
def test_a_closure_runs_with_autograd_on_and_its_loss_is_returned(road, enabled):
    found = []
    for closed in (False, True):
        model = SmallNet()
        opt = build(road, "adamw", model.parameters(), **QUICK)
        losses = []
        for t in range(FEW):
            z, y = batch(t)

            def closure(z=z, y=y, opt=opt, model=model):
                assert torch.is_grad_enabled()
                opt.zero_grad()
                loss = (model(z) - y).square().mean()
                loss.backward()
                return loss

            if closed:
                with torch.set_grad_enabled(enabled):
                    losses.append(float(opt.step(closure).detach()))
                    assert torch.is_grad_enabled() is enabled
            else:
                losses.append(float(closure().detach()))
                opt.step()
        found.append([losses, *values(model.parameters())])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("enabled", [True, False])
def test_a_closure_that_raises_changes_nothing_and_leaves_autograd_as_it_was(road, enabled):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    before = snapshot(opt)

    def closure():
        raise KeyError("the loss")

    with torch.set_grad_enabled(enabled):
        with pytest.raises(KeyError, match="the loss"):
            opt.step(closure)
        assert torch.is_grad_enabled() is enabled
    assert_same(snapshot(opt), before)
    run(opt, params, 1, first=FEW)
    assert differs(snapshot(opt), before)


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


# Maximize, hooks, types


@pytest.mark.parametrize("base", FUSED)
def test_maximizing_is_minimizing_the_negated_loss(road, base):
    found = []
    for sign in (1, -1):
        params = make_weights()
        opt = build(road, base, params, maximize=sign < 0, **QUICK, **OPTIONS[base])
        for t in range(STEPS):
            for p, g in zip(params, gradients(params, t), strict=True):
                p.grad = sign * g
            opt.step()
        found.append([*values(params), opt.scale])
    assert_same(found[1], found[0])
    assert loss_of(params) < LEARNED * loss_of(make_weights())


@pytest.mark.parametrize("make", [MechanicAdamW, mechanize(PlainAdamW), mechanize(torch.optim.RAdam)])
@pytest.mark.parametrize("scheduled", [False, True])
def test_step_hooks_fire_once_each(make, scheduled):
    # Once a plain one has been made, torch runs the hooks inside its step as well.
    for base in make.__mro__:
        if base.__module__.startswith("torch.optim.") and base is not torch.optim.Optimizer:
            base(make_weights())
    params = make_weights()
    opt = make(params, **QUICK)
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    seen = []
    handles = [
        opt.register_step_pre_hook(lambda *_: seen.append("own pre")),
        opt.register_step_post_hook(lambda *_: seen.append("own post")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        run(opt, params, 1)
        once = list(seen)
        opt.step(lambda: None)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(once) == ["own post", "own pre", "post", "pre"]
    assert seen == 2 * once
    assert once[:2] == ["pre", "own pre"]


def test_a_pre_hook_may_change_the_gradients(road):
    """Clipping and gradient noise are done so."""
    found = []
    for hooked in (False, True):
        params = make_weights()
        opt = build(road, "adamw", params, **QUICK)

        def halve_gradients(*_, params=params):
            for p in params:
                p.grad.mul_(0.5)

        if hooked:
            opt.register_step_pre_hook(halve_gradients)
        for t in range(FEW):
            set_gradients(params, t)
            if not hooked:
                halve_gradients()
            opt.step()
        found.append(values(params))
    assert_same(found[1], found[0])


def test_ours_are_what_they_are_made_of():
    opt = MechanicAdamW(make_weights())
    assert isinstance(opt, torch.optim.AdamW) and is_mechanized(opt)
    assert not is_mechanized(torch.optim.AdamW(make_weights()))
    assert isinstance(mechanize(torch.optim.RAdam)(make_weights()), torch.optim.RAdam)
    plain = torch.optim.AdamW(make_weights())
    assert plain.param_groups[0].keys() <= opt.param_groups[0].keys()
    assert plain.defaults.items() <= {**opt.defaults, "lr": plain.defaults["lr"]}.items()


# Weights of every kind

LAYOUTS = {
    "strided": lambda x: torch.cat([x.flatten(), x.flatten()])[::2].as_strided(
        x.flatten().shape, (2,)
    ),
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: torch.cat([x, x], dim=3)[..., ::2],
    "inside a larger one": lambda x: torch.stack([x, x])[1],
}


@pytest.mark.parametrize("gradient_layout", ["weight's", "contiguous", "transposed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_of_any_layout_learns_as_a_contiguous_one(road, layout, gradient_layout):
    start = make_weights([(4, 6, 3, 5)], torch.float64)[0].detach()
    found = []
    for lay in (LAYOUTS[layout], lambda x: LAYOUTS[layout](x).contiguous()):
        p = torch.nn.Parameter(lay(start.clone()))
        strides = p.stride()
        opt = build(road, "adamw", [p], **QUICK, **OPTIONS["adamw"])
        for t in range(STEPS):
            (g,) = gradients([p], t)
            if gradient_layout == "contiguous":
                g = g.contiguous()
            elif gradient_layout == "transposed":
                g = g.mT.contiguous().mT if g.dim() > 1 else g
            p.grad = g
            opt.step()
        assert p.stride() == strides
        found.append([p.detach().contiguous(), opt.scale])
    assert differs(found[0][0], start)
    for one, other in zip(*found, strict=True):
        # Only the order of the sums differs.
        assert_within(one, other, STEPS * SUM_RTOL * float(other.abs().max()))


@pytest.mark.parametrize("when", ["before", "after the dry step", "in mid-run"])
def test_a_model_converted_to_channels_last_goes_on_as_it_was(road, when):
    found = []
    for convert in (False, True):
        p = make_weights([(4, 6, 3, 5)], torch.float64)[0]
        opt = build(road, "adamw", [p], **QUICK)
        if when == "after the dry step":
            p.grad = torch.zeros_like(p)
            opt.step()
        if when == "in mid-run":
            run(opt, [p], FEW)
        if convert:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        run(opt, [p], FEW, first=FEW)
        assert p.is_contiguous() is not convert
        found.append(p.detach().contiguous())
    assert_within(found[1], found[0], STEPS * SUM_RTOL * float(found[0].abs().max()))


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, FEW])
def test_a_model_converted_to_another_dtype_goes_on_where_it_is(road, to, steps):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    run(opt, params, steps)
    for p in params:
        p.grad = None
        p.data = p.data.to(to)
    loss = loss_of(params)
    run(opt, params, STEPS, first=steps)
    assert all(p.dtype is to for p in params)
    assert loss_of(params) < LEARNED * loss


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_weights_of_one_element_and_of_none(road, shape):
    p, other = torch.nn.Parameter(torch.ones(shape)), make_weights()
    opt = build(road, "adamw", [p, *other], **QUICK)
    run(opt, [p, *other])
    assert p.shape == shape
    assert (p != 1).all()
    assert opt.state[p]["delta"].shape == opt.state[p]["x_ref"].shape == shape
    alone = torch.nn.Parameter(torch.ones(shape))
    opt = build(road, "adamw", [alone], **QUICK)
    run(opt, [alone])
    assert alone.isfinite().all() and opt.scale.isfinite().all()


def test_an_expanded_gradient_is_read_as_a_dense_one(road):
    found = []
    for dense in (False, True):
        p = make_weights([(63,)])[0]
        opt = build(road, "adamw", [p], **QUICK)
        for t in range(FEW):
            expanded = torch.full((1,), 1.0 + t).expand(p.shape)
            p.grad = expanded.contiguous() if dense else expanded
            opt.step()
        found.append(p.detach())
    assert_same(found[1], found[0])


def test_a_tied_weight_is_trained_once(road):
    """Through a second name, a weight must not be counted or moved twice."""
    tied = SmallNet()
    opt = build(road, "adamw", tied.parameters(), **QUICK)
    losses = train_net(tied, opt)
    assert sum(len(group["params"]) for group in opt.param_groups) == 3
    assert tied.first.weight is tied.second.weight

    functional = SmallNet()
    weights = [functional.first.weight, functional.first.bias, functional.second.bias]
    again = train_net(functional, build(road, "adamw", weights, **QUICK))
    assert losses == again


@pytest.mark.parametrize("scale", SCALES)
def test_dtypes_may_be_mixed_in_one_model(road, scale):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = [p for dtype in dtypes for p in make_weights(dtype=dtype)]
    opt = build(road, "adamw", params, scale=scale, **QUICK)
    before = [loss_of([p]) for p in params]
    run(opt, params, STEPS)
    assert [p.dtype for p in params] == [dtype for dtype in dtypes for _ in SHAPES]
    for p, loss in zip(params, before, strict=True):
        assert loss_of([p]) < loss
    exact = make_weights(dtype=torch.float64) * len(dtypes)
    if scale == "global":
        exact = [p for _ in dtypes for p in make_weights(dtype=torch.float64)]
        twin = build(road, "adamw", exact, **QUICK)
        run(twin, exact, STEPS)
        # The sums of all dtypes come together: S is that of float64 weights but for their rounding.
        torch.testing.assert_close(
            opt.scale, twin.scale, rtol=STEPS * torch.finfo(torch.bfloat16).eps, atol=0
        )


# GradScaler

LOSS_SCALE = 2.0**16
ENORMOUS = 1e38


def scaled_gradients(params, t, scaler):
    scale = scaler.get_scale()
    for p, g in zip(params, gradients(params, t), strict=True):
        p.grad = g * scale


def make_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
    scaler.scale(torch.ones(()))  # makes its state
    return scaler


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [None, True], ids=["", "fused=True"])
@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
def test_grad_scaler_changes_no_bit(road, base, fused, unscale):
    plain = make_weights()
    run(build(road, base, plain, fused=fused, **QUICK), plain, FEW)
    params, scaler = make_weights(), make_scaler()
    opt = build(road, base, params, fused=fused, **QUICK)
    for t in range(FEW):
        scaled_gradients(params, t, scaler)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    # A power of two: unscaling is exact.
    assert_same(values(params), values(plain))


@pytest.mark.parametrize("steps", [0, FEW])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [None, True], ids=["", "fused=True"])
def test_an_overflow_step_is_skipped_whole(road, fused, unscale, steps):
    params, scaler = make_weights(), make_scaler()
    opt = build(road, "adamw", params, fused=fused, **QUICK)
    run(opt, params, steps)
    before, scale = snapshot(opt), opt.scale
    set_gradients(params, steps)
    params[1].grad[2, 3] = torch.inf
    if unscale:
        scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    after = snapshot(opt)
    assert_same(after["weights"], before["weights"])
    assert_same(opt.scale, scale)
    if steps:  # at the start state may be made
        assert_same(after["optimizer"], before["optimizer"])
    assert scaler.get_scale() < LOSS_SCALE
    assert opt.nonfinite_steps == 0
    twin = make_weights()
    run(build(road, "adamw", twin, **QUICK), twin, steps)
    other = build(road, "adamw", twin, **QUICK)
    other.load_state_dict(opt.state_dict())
    for t in range(steps, steps + FEW):
        set_gradients(twin, t)
        other.step()
        scaled_gradients(params, t, scaler)
        scaler.step(opt)
        scaler.update()
    assert_same(values(params), values(twin))


def test_grad_scaler_with_an_option_that_is_not_fused():
    """amsgrad takes the general road, where the base must not unscale a second time."""
    found = []
    for scaler in (None, make_scaler()):
        params = make_weights()
        opt = MechanicAdamW(params, amsgrad=True, fused=scaler is not None, **QUICK)
        for t in range(FEW):
            if scaler is None:
                run(opt, params, 1, first=t)
            else:
                scaled_gradients(params, t, scaler)
                scaler.step(opt)
                scaler.update()
        assert opt.road.startswith("general")
        found.append([opt.state[p]["delta"] for p in params])
    for one, other in zip(*found, strict=True):
        # torch's fused Adam rounds otherwise than its plain one: an ulp of x in each step's move.
        assert_within(one, other, 2 * FEW * ulp(*params))


def test_without_fused_the_scaler_unscales_by_itself():
    assert not getattr(MechanicAdamW(make_weights()), "_step_supports_amp_scaling", False)
    assert MechanicAdamW(make_weights(), fused=True)._step_supports_amp_scaling


# Gradients that are not finite, enormous or tiny


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("at", [0, FEW])
def test_a_step_that_is_not_finite_costs_one_step_of_learning(road, at, bad):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, at)
    before, scale = loss_of(make_weights()), opt.scale
    set_gradients(params, at)
    params[0].grad[0] = bad
    spared = opt.state[params[0]]["delta"][0].clone() if at else None
    opt.step()
    assert_same(opt.scale, scale)
    assert opt.nonfinite_steps == 1
    if at:
        assert differs(opt.state[params[0]]["delta"][0], spared)  # momentum goes on at g = 0
    run(opt, params, LONG, first=at + 1)
    assert differs(opt.scale, scale)
    assert opt.nonfinite_steps == 1
    assert loss_of(params) < LEARNED * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_the_size_of_gradients_does_not_matter_to_the_scale(road, size, dtype):
    """With lr, ε and s_init to match, a run is the same at any size of the gradients."""
    found = []
    for factor in (1.0, size):
        params = make_weights(dtype=dtype)
        # ε is lost in √v, and m never at its start: nothing but the sizes differs.
        opt = build(road, "sgd", params, lr=0.05 / factor, tuner_eps=1e-300, **QUICK)
        start = values(params)
        for t in range(FEW):
            for p, g in zip(params, gradients(start, t), strict=True):
                p.grad = (g.double() * factor).to(dtype)
            opt.step()
        assert opt.nonfinite_steps == 0
        found.append(opt.scale)
    # One rounding of each gradient and each product at the weights' width.
    torch.testing.assert_close(*found, rtol=STEPS * torch.finfo(dtype).eps, atol=0)
    assert differs(found[0], build(road, "sgd", make_weights(), **QUICK).scale)


# The start


@pytest.mark.parametrize("dry", [False, True], ids=["", "after a dry step"])
@pytest.mark.parametrize("how", ["load_state_dict", "data"])
def test_weights_loaded_after_construction_are_where_the_run_starts(road, how, dry):
    late, early = SmallNet(seed=0), SmallNet(seed=1)
    opt = build(road, "adamw", late.parameters(), **QUICK)
    if dry:
        for p in late.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    if how == "data":
        for p, q in zip(late.parameters(), early.parameters(), strict=True):
            p.data = q.data.clone()
    else:
        late.load_state_dict(early.state_dict())
    train_net(late, opt)
    train_net(early, build(road, "adamw", early.parameters(), **QUICK))
    assert_same(values(late.parameters()), values(early.parameters()))


def test_a_model_cast_after_construction(road):
    late, early = SmallNet(), SmallNet().double()
    opt = build(road, "adamw", late.parameters(), **QUICK)
    late.double()
    for t in range(FEW):
        set_gradients(list(late.parameters()), t)
        opt.step()
    run(build(road, "adamw", early.parameters(), **QUICK), list(early.parameters()), FEW)
    assert_same(values(late.parameters()), values(early.parameters()))


@pytest.mark.parametrize("lr", [0.0, 1.0])
@pytest.mark.parametrize("base", FUSED)
def test_a_dry_step_makes_state_and_changes_nothing_else(road, base, lr):
    params, straight = make_weights(), make_weights()
    opt = build(road, base, params, **QUICK, **OPTIONS[base])
    opt.param_groups[0]["lr"] = lr
    before, scale = values(params), opt.scale
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert_same(values(params), before)
    assert_same(opt.scale, scale)
    if road != "general":
        assert all({"x_ref", "delta"} < opt.state[p].keys() for p in params)
    opt.param_groups[0]["lr"] = OPTIONS[base]["lr"]
    run(opt, params)
    twin = build(road, base, straight, **QUICK, **OPTIONS[base])
    run(twin, straight)
    assert_same(snapshot(opt), snapshot(twin))


def test_zero_gradients_later_are_an_ordinary_step(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    before = snapshot(opt)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    after = snapshot(opt)
    assert differs(after["weights"], before["weights"])
    assert opt.state[params[0]]["step"] == FEW + 1


# The loop around it


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_in_the_loop(cpp):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = SmallNet()
        opt = build(cpp, "adamw", model.parameters(), **QUICK)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        found.append(train_net(model, opt, FEW, forward=forward))
    assert found[1] == pytest.approx(found[0], rel=STEPS * torch.finfo(torch.float32).eps)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_training_step_works_around_ours(road):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = SmallNet()
        opt = build(road, "adamw", model.parameters(), **QUICK)

        def step(z, y, model=model, opt=opt):
            loss = (model(z) - y).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss.detach()

        step = torch.compile(step, backend="eager") if compiled else step
        found.append([[float(step(*batch(t))) for t in range(FEW)], *values(model.parameters())])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("moved_by", ["its gradient", "the scale alone"])
@pytest.mark.parametrize("make", ["torch", "ours"])
def test_a_backward_through_overwritten_weights_raises(road, make, moved_by):
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1) if make == "torch" else build(road, "sgd", params)
    run(opt, params, 1)
    loss = (params[0] ** 3).sum()
    set_gradients(params, 1)
    if moved_by == "the scale alone":
        if make == "torch":
            pytest.skip("no scale moves a weight of torch's")
        params[0].grad = None
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("other_base", ["adamw", "lion"])
def test_two_optimizers_in_one_process_do_not_meet(road, other_base):
    alone = make_weights(), make_weights(seed=1)
    run(build(road, "adamw", alone[0], **QUICK), alone[0])
    other_options = {"variant": "paper", "tuner_betas": (0.9,), "s_init": 0.1}
    run(build(road, other_base, alone[1], **other_options), alone[1])
    params = make_weights(), make_weights(seed=1)
    one = build(road, "adamw", params[0], **QUICK)
    two = build(road, other_base, params[1], **other_options)
    for t in range(STEPS):
        run(one, params[0], 1, first=t)
        run(two, params[1], 1, first=t)
    assert_same(values(params[0] + params[1]), values(alone[0] + alone[1]))


def test_gradients_do_not_outlive_zero_grad(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    alive = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    assert [ref() for ref in alive] == [None] * len(params)


def test_gradients_are_left_as_they_were(road):
    """They are the user's: for logging, or to go on accumulating."""
    params = make_weights()
    opt = build(road, "adamw", params, maximize=True, weight_decay=0.1, **QUICK)
    for t in range(FEW):
        set_gradients(params, t)
        params[0].grad[0] = torch.nan if t == 1 else 1.0
        grads = [p.grad for p in params]
        before = values(grads)
        opt.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert_same(values(grads), before)


def test_gradients_zeroed_in_place_are_as_good_as_new_ones(road):
    found = []
    for set_to_none in (False, True):
        model = SmallNet()
        opt = build(road, "adamw", model.parameters(), **QUICK)
        for t in range(STEPS):
            z, y = batch(t)
            opt.zero_grad(set_to_none=set_to_none)
            (model(z) - y).square().mean().backward()
            opt.step()
        found.append(values(model.parameters()))
    assert_same(found[1], found[0])


# Writing to the weights by hand


def halve(p):
    with torch.no_grad():
        p.mul_(0.5)


def clamp(p):
    with torch.no_grad():
        p.clamp_(-0.1, 0.1)


def prune(p):
    with torch.no_grad():
        p[::2] = 0


def swap_data(p):
    p.data = p.data * 0.5


def flatten(p):
    """As torch.nn.utils.vector_to_parameters: the weight becomes a view of a vector."""
    vector = torch.cat([p.detach().flatten() * 0.5, torch.zeros(3, dtype=p.dtype)])
    torch.nn.utils.vector_to_parameters(vector[: p.numel()], [p])


WRITES = {"mul_": halve, "clamp_": clamp, "a part": prune, "data": swap_data, "flatten": flatten}


@pytest.mark.parametrize("dtype", [*WIDTHS, torch.float64], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_by_hand_is_not_undone(road, write, dtype):
    params = make_weights(dtype=dtype)
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, STEPS)
    trained = values(params)
    for p in params:
        WRITES[write](p)
    assert differs(values(params), trained)
    check_next_step_starts_here(opt, params)


def check_next_step_starts_here(opt, params):
    written = [double(p) for p in params]
    before = [move(opt, p) for p in params]
    refs = [opt.state[p]["x_ref"].clone() for p in params]
    run(opt, params, 1, first=STEPS)
    for p, x, old, ref in zip(params, written, before, refs, strict=True):
        # x_ref, x and, in float64, what is expected here: a rounding each at the largest size.
        sizes = [t.to(p.dtype) for t in (p, ref, opt.state[p]["x_ref"], old, move(opt, p))]
        assert_within(p, x + move(opt, p) - old, 4 * ulp(*sizes))
        assert differs(double(p), x)


def test_a_model_loaded_in_mid_run_is_not_undone(road):
    model, other = SmallNet(seed=0), SmallNet(seed=1)
    opt = build(road, "adamw", model.parameters(), **QUICK)
    train_net(model, opt)
    model.load_state_dict(other.state_dict())
    check_next_step_starts_here(opt, list(model.parameters()))


def test_data_written_where_torch_cannot_see_it_needs_one_call(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, STEPS)
    for p in params:
        p.data.mul_(0.5)
    written = values(params)
    opt.shift_reference()
    assert_same(values(params), written)
    check_next_step_starts_here(opt, params)


@pytest.mark.parametrize("steps", [0, FEW])
def test_shifting_without_a_write_changes_nothing(road, steps):
    found = []
    for shift in (False, True):
        params = make_weights()
        opt = build(road, "adamw", params, **QUICK)
        run(opt, params, steps)
        if shift:
            opt.shift_reference()
        run(opt, params, FEW, first=steps)
        found.append(snapshot(opt))
    assert_same(found[1], found[0])


def test_an_averaged_copy_may_be_swapped_in_and_out(road):
    """As people evaluate an EMA: the run goes on as if it had not happened, to the rounding."""
    found = []
    for swap in (False, True):
        params = make_weights(dtype=torch.float64)
        opt = build(road, "adamw", params, **QUICK)
        run(opt, params, FEW)
        if swap:
            kept = values(params)
            with torch.no_grad():
                for p in params:
                    p.zero_()
                for p, x in zip(params, kept, strict=True):
                    p.copy_(x)
        run(opt, params, FEW, first=FEW)
        found.append([*values(params), opt.scale])
    for one, other in zip(*found, strict=True):
        assert_within(one, other, STEPS * SUM_RTOL * float(other.abs().max()))


# What users read and steer


def test_the_scale_starts_where_the_variant_says():
    for variant, start in {"optax": 1e-6, "paper": 0.0, "pytorch": 0.0}.items():
        opt = MechanicAdamW(make_weights(), variant=variant)
        torch.testing.assert_close(
            opt.scale, torch.full((1,), 6 * start, dtype=torch.float64), rtol=SUM_RTOL, atol=0
        )


@pytest.mark.parametrize("scale", SCALES)
def test_scale_and_learned_lr_are_readable_at_any_time(road, scale):
    params = make_weights()
    groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "lr": torch.tensor(2.0)}]
    opt = build(road, "adamw", groups, scale=scale, **QUICK)
    rows = {"global": [0, 0, 0], "group": [0, 1, 1], "parameter": [0, 1, 2]}[scale]
    for t in range(FEW):
        rates, s = opt.learned_lr(), opt.scale
        assert s.dtype is torch.float64 and s.shape == (max(rows) + 1,)
        assert all(type(rate) is float for rate in rates)
        expected = [0.5 * s[rows[0]], 2.0 * (s[rows[1]] + s[rows[2]]) / 2]
        assert rates == pytest.approx([float(rate) for rate in expected], rel=SUM_RTOL)
        before = snapshot(opt)
        s.zero_()  # theirs: a copy
        assert_same(snapshot(opt), before)
        run(opt, params, 1, first=t)
    assert differs(opt.scale, s)


def test_the_road_is_named_with_its_reason():
    expected = "cpp" if backends.resolve("auto", "cpu") == "cpp" else "reference"
    assert MechanicAdamW(make_weights()).road == f"fused: {expected}"
    assert MechanicAdamW(make_weights(), backend="reference").road == "fused: reference"
    amsgrad = MechanicAdamW(make_weights(), amsgrad=True)
    assert amsgrad.road == "general: amsgrad=True has no fused update"
    assert mechanize(torch.optim.RAdam)(make_weights()).road.startswith("general: RAdam")
    assert mechanize(PlainAdamW)(make_weights()).road.startswith("general: PlainAdamW")
    groups = [{"params": make_weights()}, {"params": make_weights(), "amsgrad": True}]
    assert MechanicAdamW(groups).road.startswith("general: amsgrad")


def test_a_frozen_scale_stays_and_the_weights_go_on(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, STEPS)
    opt.freeze_scale()
    scale, loss = opt.scale, loss_of(params)
    x = values(params)
    run(opt, params, FEW, first=STEPS)
    assert_same(opt.scale, scale)
    assert differs(values(params), x)
    assert loss_of(params) < loss
    opt.freeze_scale(False)
    run(opt, params, FEW, first=STEPS + FEW)
    assert differs(opt.scale, scale)


def test_a_reset_starts_anew_from_the_current_weights(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, STEPS)
    x = values(params)
    kept = {k: [opt.state[p][k].clone() for p in params] for k in ("exp_avg", "exp_avg_sq", "step")}
    opt.reset_scale()
    assert_same(values(params), x)
    assert_same({k: [opt.state[p][k] for p in params] for k in kept}, kept)
    fresh = [torch.nn.Parameter(p.clone()) for p in x]
    twin = build(road, "adamw", fresh, **QUICK)
    assert_same(opt.scale, twin.scale)
    plain = torch.optim.AdamW(fresh, lr=1.0)
    plain.load_state_dict(opt.to_base().state_dict())
    twin.load_state_dict(plain.state_dict())
    twin.param_groups[0]["lr"] = opt.param_groups[0]["lr"]
    run(opt, params, STEPS)
    run(twin, fresh, STEPS)
    assert_same(values(params), values(fresh))


@pytest.mark.parametrize("steps", [0, FEW])
def test_a_reset_with_weights_that_never_had_a_gradient(road, steps):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params[1:], steps)
    opt.reset_scale()
    loss = loss_of(params[1:])
    run(opt, params[1:], LONG)
    assert loss_of(params[1:]) < LEARNED * loss


def test_log_func_gets_the_scale_every_so_many_steps(road):
    seen = []
    every = 2
    made = mechanize(
        PlainAdamW if road == "general" else torch.optim.AdamW,
        log_func=lambda data: seen.append((data, float(opt.scale.sum()))),
        log_every=every,
        s_init=QUICK["s_init"],
        backend="auto" if road == "general" else road,
    )
    params = make_weights()
    opt = made(params, lr=1.0)
    run(opt, params, FEW)
    assert [data["iter_count"] for data, _ in seen] == list(range(every, FEW + 1, every))
    assert [data["s"] for data, _ in seen] == [scale for _, scale in seen]


def test_without_log_func_the_scale_is_logged(caplog):
    params = make_weights()
    opt = mechanize(torch.optim.AdamW, log_every=1)(params, lr=1.0)
    with caplog.at_level(logging.INFO, logger="mechanic_fused"):
        run(opt, params, 1)
    assert f"{float(opt.scale.sum()):g}" in caplog.text


def test_the_call_signature_of_mechanic_pytorch_works_unchanged():
    theirs = inspect.signature(mechanic_pytorch.mechanize).parameters
    ours = inspect.signature(mechanize).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name in ("s_decay", "betas", "eps", "log_func", "log_every"):
        assert ours[name].default == theirs[name].default
    positional = (torch.optim.SGD, 0.0, (0.9, 0.99), 1e-3, 1e-6, True, None, 0)
    params = make_weights()
    opt = mechanize(*positional)(params, lr=0.1)
    run(opt, params, 1)
    group = opt.param_groups[0]
    assert [group[k] for k in ("s_decay", "tuner_betas", "s_init", "tuner_eps")] == list(
        positional[1:5]
    )
    mechanize(torch.optim.SGD, store_delta=False)


def test_options_of_the_class_give_way_to_those_of_the_instance():
    made = mechanize(torch.optim.AdamW, s_decay=0.5, s_init=0.1, variant="paper")
    group = made(make_weights(), s_decay=0.0, variant="pytorch").param_groups[0]
    assert (group["s_decay"], group["s_init"], group["variant"]) == (0.0, 0.1, "pytorch")


# To and from the plain base

BASES = {
    "AdamW": (MechanicAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "SGD": (MechanicSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "SGD without momentum": (MechanicSGD, torch.optim.SGD, {"lr": 0.1}),
    "Lion": (MechanicLion, PLAIN["lion"], {"weight_decay": 0.1}),
    "amsgrad": (MechanicAdamW, torch.optim.AdamW, {"amsgrad": True}),
    "RAdam": (mechanize(torch.optim.RAdam), torch.optim.RAdam, {}),
    "Adagrad": (mechanize(torch.optim.Adagrad), torch.optim.Adagrad, {}),
}
OURS = ("x_ref", "delta")


@pytest.mark.parametrize("scale", ["global", "parameter"])
@pytest.mark.parametrize("case", BASES)
def test_to_base_goes_on_as_the_plain_base_at_the_learned_lr(case, scale):
    make, base, options = BASES[case]
    params = make_weights()
    opt = make(params, **{"lr": 1.0, **QUICK, **options}, scale=scale)
    run(opt, params)
    plain = opt.to_base()
    assert type(plain) is base
    # By hand: the base alone, over copies, at each weight's own rate and with its state.
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    lr, scales = opt.param_groups[0]["lr"], opt.scale.tolist()
    rates = [lr * s for s in scales] * (1 if scale == "parameter" else len(params))
    by_hand = base(
        [{"params": [p], "lr": rate} for p, rate in zip(copies, rates, strict=True)],
        **{k: v for k, v in options.items() if k != "lr"},
    )
    for p, copy_ in zip(params, copies, strict=True):
        kept = {k: v for k, v in opt.state[p].items() if k not in OURS}
        if base is torch.optim.SGD:
            kept.pop("step", None)
        by_hand.state[copy_] = {k: v.clone() for k, v in kept.items()}
    for optimizer, weights in ((plain, params), (by_hand, copies)):
        run(optimizer, weights, FEW, first=STEPS)
        state = [optimizer.state[p] for p in weights]
        assert all(not set(OURS) & s.keys() for s in state)
    assert_same(values(params), values(copies))
    assert differs(values(params), values(make_weights()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_to_base_of_16_bit_weights_trains_on(backend, dtype):
    params = make_weights(dtype=dtype)
    opt = build(backend, "adamw", params, **QUICK)
    run(opt, params)
    loss = loss_of(params)
    run(opt.to_base(), params, STEPS, first=STEPS)
    assert loss_of(params) < loss


def test_to_base_keeps_groups_and_a_schedule():
    params = make_weights()
    groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "weight_decay": 0.3}]
    opt = MechanicAdamW(groups, lr=1.0, **QUICK)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for t in range(FEW):
        run(opt, params, 1, first=t)
        scheduler.step()
    plain = opt.to_base()
    s = float(opt.scale)
    for ours, theirs in zip(opt.param_groups, plain.param_groups, strict=True):
        assert theirs["lr"] == pytest.approx(s * ours["lr"], rel=SUM_RTOL)
        assert theirs["initial_lr"] == pytest.approx(s * ours["initial_lr"], rel=SUM_RTOL)
        assert theirs["weight_decay"] == ours["weight_decay"]
    plain_keys = torch.optim.AdamW(make_weights()).param_groups[0].keys()
    assert plain.param_groups[0].keys() == plain_keys | {"initial_lr"}


def test_to_base_before_the_first_step_is_a_fresh_base(road):
    params = make_weights()
    plain = build(road, "adamw", params, **QUICK).to_base()
    assert not plain.state
    run(plain, params, 1)


@pytest.mark.parametrize("base", ["sgd", "adam", "adamw", "lion"])
def test_a_plain_checkpoint_loads_into_ours_and_the_next_update_is_the_plain_ones(road, base):
    plains = make_weights(dtype=torch.float64)
    plain = PLAIN[base](plains, **{**OPTIONS[base], "lr": 0.01})
    run(plain, plains, STEPS)
    params = [torch.nn.Parameter(p.detach().clone()) for p in plains]
    opt = build(road, base, params, **QUICK, **OPTIONS[base])
    opt.load_state_dict(plain.state_dict())
    fresh = build(road, base, make_weights(), **QUICK, **OPTIONS[base])
    assert_same(opt.scale, fresh.scale)
    start = values(params)
    run(plain, plains, 1, first=STEPS)
    run(opt, params, 1, first=STEPS)
    for p, q, x in zip(params, plains, start, strict=True):
        assert_same(opt.state[p]["x_ref"], x)
        assert_within(opt.state[p]["delta"], q - x, SUM_RTOL * float(x.abs().max()))
    for group in opt.param_groups:
        group["lr"] = OPTIONS[base]["lr"]
    loss = loss_of(params)
    run(opt, params, LONG, first=STEPS + 1)
    assert loss_of(params) < loss


def test_pickle_of_the_log_function_is_by_name():
    made = mechanize(torch.optim.AdamW, log_func=print, log_every=2)
    opt = pickle.loads(pickle.dumps(made(make_weights())))
    assert type(opt) is made
