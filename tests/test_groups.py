"""Param groups that differ, come and empty; weights that freeze; gradients that stay away."""

import pytest
import torch
from cases import (
    FEW,
    FUSED,
    LEARNED,
    LONG,
    NARROW_TOO,
    QUICK,
    SCALES,
    STEPS,
    assert_same,
    assert_within,
    build,
    differs,
    double,
    loss_of,
    make_weights,
    move,
    run,
    set_gradients,
    snapshot,
    ulp,
    values,
)

# Of x_ref, when it is shifted, and of x.
ROUNDINGS = 2
# How many roundings a jump must be worth, to be seen if it happened.
VISIBLE = 10


# Param groups


@pytest.mark.parametrize("base", FUSED)
def test_groups_keep_their_own_options(road, base):
    """With a scale for each group, two groups are two optimizers, where λ and ε are not per unit of
    the largest lr."""
    own = [{"lr": 1.0, "weight_decay": 0.1}, {"lr": 0.3, "weight_decay": 0.0}]
    if base == "sgd":
        own = [{"momentum": 0.5, **own[0]}, {"momentum": 0.0, **own[1]}]
    else:
        own = [{"betas": (0.5, 0.9), **own[0]}, {"betas": (0.9, 0.99), **own[1]}]
    apart = []
    for seed, options in enumerate(own):
        params = make_weights(seed=seed)
        run(build(road, base, params, variant="optax", **QUICK, **options), params)
        apart += values(params)
    params = [make_weights(seed=0), make_weights(seed=1)]
    groups = [{"params": p, **options} for p, options in zip(params, own, strict=True)]
    opt = build(road, base, groups, scale="group", variant="optax", **QUICK)
    for t in range(STEPS):
        for group in params:
            set_gradients(group, t)
        opt.step()
    assert_same(values(sum(params, [])), apart)


@pytest.mark.parametrize("when", [0, 1, FEW])
@pytest.mark.parametrize("scale", ["group", "parameter"])
def test_an_added_group_runs_as_if_alone_and_disturbs_no_other(road, scale, when):
    old, new = make_weights(seed=0), make_weights(seed=1)
    options = {"scale": scale, "variant": "optax", **QUICK}
    opt = build(road, "adamw", old, **options)
    run(opt, old, when)
    opt.add_param_group({"params": new, "lr": 0.5})
    for t in range(when, when + STEPS):
        set_gradients(old, t)
        set_gradients(new, t)
        opt.step()
    alone = make_weights(seed=0), make_weights(seed=1)
    run(build(road, "adamw", alone[0], **options), alone[0], when + STEPS)
    run(build(road, "adamw", alone[1], lr=0.5, **options), alone[1], STEPS, first=when)
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
def test_the_count_of_bad_steps_outlives_the_weight_that_made_them(road, scale):
    params = [make_weights(seed=0), make_weights(seed=1)]
    opt = build(road, "adamw", [{"params": list(p)} for p in params], scale=scale, **QUICK)
    set_gradients(params[0] + params[1], 0)
    params[0][0].grad[0] = torch.nan
    opt.step()
    opt.param_groups[0]["params"].clear()
    assert opt.nonfinite_steps == 1
    run(opt, params[1], FEW)
    assert opt.nonfinite_steps == 1


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


@pytest.mark.parametrize("dtype", NARROW_TOO, ids=str)
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
    assert_within(frozen, expected, ROUNDINGS * ulp(frozen))
    assert float(drift.abs().max()) > VISIBLE * ulp(frozen)


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
