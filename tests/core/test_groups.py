"""Param groups that differ, come and empty; weights that freeze; gradients that stay away."""

import pytest
import torch
from support import cases
from support.cases import FEW, LEARNED, SCALE_PER, STEPS, assert_same, double, make_weights, move

from mechanic_fused import MechanicAdamW

# Of x_ref, when it is shifted, and of x.
ROUNDINGS = 2
# How many roundings a jump must be worth, to be seen if it happened.
VISIBLE = 10


def two():
    return [make_weights(seed=0), make_weights(seed=1)]


def one_each(params):
    """Return a group for each of the two lists of `two`."""
    half = len(params) // 2
    return [{"params": params[:half]}, {"params": params[half:]}]


# Param groups


@pytest.mark.parametrize("when", [0, 1, FEW])
@pytest.mark.parametrize("scale_per", ["group", "parameter"])
def test_an_added_group_runs_as_if_alone_and_disturbs_no_other(train, scale_per, when):
    options = {"scale_per": scale_per, "variant": "optax"}
    old, new = two()
    one = train(params=old, **options).run(when)
    one.opt.add_param_group({"params": new, "lr": 0.5})
    one.run(STEPS, old, new)
    alone = train(seed=0, **options).run(when + STEPS)
    late = train(seed=1, lr=0.5, **options)
    late.t = when
    assert_same(cases.values(old + new), alone.x + late.run().x)


@pytest.mark.parametrize("when", [0, 1, FEW])
def test_a_group_added_under_one_scale_is_a_group_without_gradients_so_far(train, when):
    found = []
    for late in (False, True):
        old, new = two()
        # λ = 0, or the weights that are not there yet would be missing in ‖x‖.
        one = train(params=old, s_decay=0.0)
        group = {"params": new, "lr": 0.5}
        if not late:
            one.opt.add_param_group(group)
        one.run(when, old)
        if late:
            one.opt.add_param_group(group)
        one.run(STEPS, old, new)
        found.append(cases.values(old + new))
    assert_same(*found)


@pytest.mark.parametrize("scale_per", SCALE_PER)
def test_the_learned_lrs_are_readable_at_once_after_a_group_is_added(train, scale_per):
    old, new = two()
    one = train(params=old, scale_per=scale_per).run(FEW)
    before = one.opt.scale
    one.opt.add_param_group({"params": new})
    assert_same(one.opt.scale[: len(before)], before)
    assert one.opt.scale.shape == (
        {"model": 1, "group": 2, "parameter": len(old + new)}[scale_per],
    )
    assert len(one.opt.learned_lr()) == len(one.opt.to_base().param_groups[0:2]) == 2


def test_an_added_group_takes_over_the_options_of_the_tuner_and_refuses_others(train):
    one = train(tuner_betas=(0.9, 0.99))
    before, new = one.snapshot(), make_weights(seed=1)
    with pytest.raises(ValueError, match=r"s_decay .*0\.01.*0\.5"):
        one.opt.add_param_group({"params": new, "s_decay": 0.5})
    assert_same(one.snapshot(), before)
    one.opt.add_param_group({"params": new})
    assert one.opt.param_groups[1]["tuner_betas"] == one.group["tuner_betas"]


@pytest.mark.parametrize("scale_per", SCALE_PER)
@pytest.mark.parametrize("emptied", [0, 1])
def test_a_group_that_becomes_empty_leaves_the_others_alone(train, scale_per, emptied):
    parts = two()
    left, gone = parts[1 - emptied], parts[emptied]
    one = train(params=[*parts[0], *parts[1]], groups=one_each, scale_per=scale_per).run(FEW)
    before, learned = cases.values(gone), one.opt.group_scales()[1 - emptied]
    one.opt.param_groups[emptied]["params"].clear()
    assert one.opt.group_scales()[1 - emptied] == learned
    loss = cases.loss_of(left)
    one.run(STEPS, left)
    assert cases.loss_of(left) < LEARNED * loss
    assert_same(cases.values(gone), before)
    assert len(one.opt.learned_lr()) == 2


@pytest.mark.parametrize("scale_per", SCALE_PER)
def test_the_count_of_bad_steps_outlives_the_weight_that_made_them(train, scale_per):
    parts = two()
    one = train(params=[*parts[0], *parts[1]], groups=one_each, scale_per=scale_per)
    grads = cases.gradients(one.params, 0)
    grads[0][0] = torch.nan
    one.step(grads)
    one.opt.param_groups[0]["params"].clear()
    assert one.opt.nonfinite_steps == 1
    one.run(FEW, parts[1])
    assert one.opt.nonfinite_steps == 1


@pytest.mark.parametrize("scale_per", SCALE_PER)
def test_an_empty_group_from_the_start_changes_nothing(train, scale_per):
    found = []
    for empty in ([0], [1, 0], [0, 1]):
        one = train(
            groups=lambda params, empty=empty: [{"params": [] if e else params} for e in empty],
            scale_per=scale_per,
        )
        found.append(one.run().x)
    assert_same(*found)


def test_an_optimizer_without_weights_steps_and_takes_some_later(train):
    one = train(groups=lambda params: [{"params": []}])
    one.opt.step()
    one.opt.add_param_group({"params": one.params})
    loss = one.loss
    assert one.run(cases.LONG).loss < LEARNED * loss


def test_weights_replaced_after_construction_are_those_that_are_trained(train):
    """As accelerate does when it shards a model."""
    old, new = two()
    one = train(params=old)
    one.group["params"] = new
    one.run(STEPS, new)
    assert_same(cases.values(old), cases.values(make_weights()))
    assert_same(cases.values(new), train(seed=1).run().x)


def test_scales_go_with_their_groups():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": [p]} for p in weights[:2]]
    opt = cases.FUSED["adamw"](groups, lr=1.0, scale_per="group", variant=cases.EXACT)
    for t in range(6):
        for p in weights[:2]:
            p.grad = p.detach() * (1.0 if p is weights[0] else (-1.0) ** t)
        opt.step()
    a, b = opt.scale.tolist()
    assert a != b
    opt.param_groups.reverse()
    assert opt.scale.tolist() == [b, a]
    opt.add_param_group({"params": [weights[2]]})
    opt.param_groups.insert(0, opt.param_groups.pop())
    # A new row starts at the s_init that the run has been calibrated to.
    assert opt.scale.tolist() == [opt.param_groups[1]["s_init"], b, a]


# Frozen weights, absent gradients


def test_frozen_weights_are_neither_moved_nor_counted(train):
    frozen, free = two()
    for p in frozen:
        p.requires_grad_(False)
    before = cases.values(frozen)
    one = train(params=frozen + free)
    one.run(STEPS, free)
    assert_same(cases.values(frozen), before)
    assert_same(cases.values(free), train(seed=1).run().x)


@pytest.mark.parametrize("dtype", cases.WIDTHS, ids=str)
def test_a_weight_does_not_jump_when_it_is_unfrozen(train, dtype):
    one = train("sgd", dtype=dtype).run(FEW)
    frozen, *rest = one.params
    frozen.requires_grad_(False)
    frozen.grad = None
    one.run(STEPS, rest)
    frozen.requires_grad_(True)
    one.opt.freeze_scale()
    before, moved = double(frozen), move(one.opt, frozen)
    # A jump would be as large as what S has done to S·Δ meanwhile: far above the rounding.
    assert float(moved.abs().max()) > VISIBLE * cases.ulp(frozen)
    one.run(1)
    expected = before + move(one.opt, frozen) - moved
    cases.assert_within(frozen, expected, ROUNDINGS * cases.ulp(frozen))


def test_a_weight_frozen_from_the_start_joins_where_it_stands(train):
    one = train("sgd", lr=0.05)
    late, *rest = one.params
    late.requires_grad_(False)
    one.run(FEW, rest)
    late.requires_grad_(True)
    before = double(late)
    one.run(1)
    cases.assert_within(late, before + move(one.opt, late), cases.ulp(late))
    assert cases.differs(double(late), before)


def test_frozen_weights_need_not_be_what_trained_ones_must_be():
    frozen = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    params = make_weights()
    opt = cases.FUSED["sgd"]([*params, frozen], lr=1.0)
    before = cases.values(params)
    cases.run(opt, params, 2)
    assert not torch.equal(params[0], before[0])
    assert frozen not in opt.state


@pytest.mark.parametrize("steps", [0, FEW])
def test_a_step_without_any_gradient_changes_nothing(train, steps):
    one = train().run(steps)
    one.opt.zero_grad()
    before, scale = one.snapshot(), one.opt.scale
    assert one.opt.step() is None
    assert_same(one.x, before["weights"])
    assert_same(one.opt.scale, scale)
    if steps:  # at the start state may be created
        assert_same(one.snapshot(), before)


# Groups of another optimizer


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"s_init": 1e-3},
        {"s_decay": 0.0},
        {"tuner_betas": (0.9, 0.99)},
        {"variant": "optax", "tuner_eps": 1e-6},
        {"x_ref_every": 8},
    ],
)
def test_an_optimizer_made_anew_from_param_groups_has_their_options(options, started):
    """Wrappers (Horovod's DistributedOptimizer) do this, and torch's optimizers allow it."""
    weight = torch.nn.Parameter(torch.ones(3))
    opt = MechanicAdamW([weight], lr=0.5, **options)
    if started:
        weight.grad = torch.ones(3)
        opt.step()
    kept = {k: v for k, v in opt.param_groups[0].items() if k in options or k == "lr"}
    again = type(opt)(opt.param_groups)
    assert {k: again.param_groups[0][k] for k in kept} == kept
    weight.grad = torch.ones(3)
    again.step()
    again.step()
    assert float(again.scale[0]) > 0


def test_options_that_contradict_the_groups_are_refused():
    opt = MechanicAdamW([torch.nn.Parameter(torch.ones(3))], variant="optax")
    with pytest.raises(ValueError, match="variant must be the same in all groups"):
        MechanicAdamW(opt.param_groups, variant="paper")


def test_a_group_added_after_a_load_takes_over_the_loaded_options():
    def make(**options):
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        opt = MechanicAdamW([weight], **options)
        opt.step()
        return opt

    opt = make(variant="annealed")
    opt.load_state_dict(make(tuner_betas=(0.9, 0.99), s_decay=0.0).state_dict())
    opt.freeze_scale()
    added = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [added]})
    for name in ("tuner_betas", "s_decay", "s_init", "tune_scale"):
        assert opt.param_groups[1][name] == opt.param_groups[0][name], name
    added.grad = torch.ones(2)
    opt.step()
