"""Options that change in mid-run are those of the next step, although a plan notes what it read."""

import copy

import pytest
import torch
from support import cases
from support.cases import FEW, LONG, SUM_RTOL, Training, assert_same, make_weights

# A change in mid-run, of whatever kind


def without_gradients(one):
    one.step([None] * len(one.params))


def skipped(one):
    """Take a step that GradScaler skips."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    cases.give(one.params, [torch.full_like(p, torch.inf) for p in one.params])
    scaler.step(one.opt)


def refused(one):
    """Try a step that raises."""
    sparse = torch.ones_like(one.params[0]).to_sparse()
    with pytest.raises(ValueError, match="gradients must be dense"):
        one.step([sparse, *cases.gradients(one.params[1:], 0)])


def lower_lr(one):
    one.group["lr"] = 0.3


def and_then(take):
    """Change the lr, then take a step that is none."""

    def change(one):
        lower_lr(one)
        take(one)

    return change


def set_option(**options):
    return lambda one: one.group.update(options)


def replace_groups(one):
    one.opt.param_groups = [dict(group) for group in one.opt.param_groups]
    lower_lr(one)


def replace_group(one):
    one.opt.param_groups[0] = {**one.group, "lr": 0.3}


def drop_weight(one):
    one.group["params"] = one.params[1:]


def replace_weights(one):
    one.params = one.group["params"] = make_weights(seed=1)


def fill_tensor(one):
    one.group["lr"].fill_(0.3)


def with_list_of_betas(params):
    return [{"params": params, "betas": [0.9, 0.999]}]


def change_betas(one):
    one.group["betas"][:] = [0.5, 0.6]


def fill_betas(one):
    one.group["betas"][0].fill_(0.5)


def add_group(one):
    more = make_weights(seed=1)
    one.params = one.params + more
    one.opt.add_param_group({"params": more, "lr": 0.3})


def load(one):
    saved = one.opt.state_dict()
    saved["param_groups"][0]["lr"] = 0.3
    one.opt.load_state_dict(saved)


def clip(one):
    one.opt.max_grad_norm = 0.1


def switch_amsgrad_on(one):
    """The fused state is the base's own, so the base goes on with it."""
    one.group["amsgrad"] = True
    for p in one.params:
        one.opt.state[p]["max_exp_avg_sq"] = one.opt.state[p]["exp_avg_sq"].clone()


TENSOR_LR = {"lr": torch.tensor(1.0, dtype=torch.float64)}
TENSOR_BETAS = {"betas": (torch.tensor(0.9), torch.tensor(0.999))}
CHANGES = {
    "lr": (lower_lr, {}),
    "lr, then a step without gradients": (and_then(without_gradients), {}),
    "lr, then a step that is skipped": (and_then(skipped), {"fused": True}),
    "lr, then a step that raises": (and_then(refused), {}),
    "weight_decay": (set_option(weight_decay=0.5), {}),
    "maximize": (set_option(maximize=True), {}),
    "eps": (set_option(eps=1e-2), {}),
    "tensor lr, in place": (fill_tensor, TENSOR_LR),
    "list of betas, in place": (change_betas, {"groups": with_list_of_betas}),
    "tensors of betas, in place": (fill_betas, TENSOR_BETAS),
    "amsgrad": (switch_amsgrad_on, {}),
    "s_decay": (set_option(s_decay=1.0), {}),
    "tuner_eps": (set_option(tuner_eps=10.0), {}),
    "tuner_betas": (set_option(tuner_betas=(0.5, 0.9)), {"tuner_betas": (0.9, 0.99)}),
    "variant": (set_option(variant="paper"), {}),
    "a frozen scale": (lambda one: one.opt.freeze_scale(), {}),
    "max_grad_norm": (clip, {}),
    "another list of groups": (replace_groups, {}),
    "another group": (replace_group, {}),
    "one weight less": (drop_weight, {}),
    "other weights": (replace_weights, {}),
    "one more group": (add_group, {}),
    "a state dict": (load, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_step(train, change):
    """As it is by an optimizer that derives everything anew at each step."""
    apply, options = CHANGES[change]
    found = []
    for forgetful, changing in ((False, True), (True, True), (False, False)):
        one = train(**copy.deepcopy(options)).run(FEW)
        for t in range(2 * FEW):
            if t == FEW and changing:
                apply(one)
            if forgetful:
                one.opt._drop_derived()
            one.run(1)
        states = [dict(one.opt.state[p]) for p in one.params]
        found.append([one.x, states, one.opt.scale, one.opt.learned_lr()])
    assert_same(found[0], found[1])
    assert cases.differs(found[0], found[2])


def test_an_option_that_is_not_fused_may_come_and_go(cpp):
    one = Training(cpp).run()
    scale, loss = one.opt.scale, one.loss
    switch_amsgrad_on(one)
    assert one.opt.implementation == "fallback: amsgrad=True has no fused update"
    assert_same(one.opt.scale, scale)
    assert one.run(LONG).loss < loss
    one.group["amsgrad"] = False
    assert one.opt.implementation == f"fused ({cpp})"
    one.run(FEW)
    assert one.opt.state[one.params[0]]["step"] == one.t


# An option that comes and goes, beside the plain base

OPTIONS = {
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


@pytest.mark.parametrize("change", OPTIONS)
def test_a_changed_option_is_that_of_the_next_update(train, change):
    """Changed, and changed back: Δ sums what the plain base adds with the same changes."""
    base, options, changed = OPTIONS[change]
    options = {"lr": 0.5, **options}
    one = train(base, dtype=torch.float64, s_init=cases.LOST, **options)
    original = {}

    def meddle(opt, t):
        (group,) = opt.param_groups
        if t == FEW:
            original.update({name: group[name] for name in changed})
        if t in (FEW, 2 * FEW):
            group.update(changed if t == FEW else original)

    total = cases.sum_of_updates(cases.PLAIN[base], one, 3 * FEW, meddle, **options)
    for delta, expected, x in zip(one.states("delta"), total, one.x, strict=True):
        assert float(expected.abs().max()) > 0
        size = float(expected.abs().max() + x.abs().max())
        cases.assert_within(delta, expected, SUM_RTOL * size)


# Where a changed option cannot be

MORE_BETAS = tuple(1 - 0.5**n for n in range(1, 12))


@pytest.mark.parametrize("betas", [(0.9,), MORE_BETAS, (1.5,) * 6], ids=["fewer", "more", "bad"])
def test_the_number_of_tuner_betas_stays(train, betas):
    """The tuner's state has a place for each beta, and kernels trust their number."""
    one = train().run(FEW)
    before = one.group["tuner_betas"]
    one.group["tuner_betas"] = betas
    weights, state = one.x, copy.deepcopy([dict(one.opt.state[p]) for p in one.params])
    with pytest.raises(ValueError, match="tuner_betas"):
        one.run(1)
    one.group["tuner_betas"] = before
    assert_same(one.x, weights)
    assert_same([dict(one.opt.state[p]) for p in one.params], state)
    one.run(1)
