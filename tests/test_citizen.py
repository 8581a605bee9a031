"""An optimizer like any other: closures, hooks, compiled loops, autograd's own rules."""

import pytest
import torch
from cases import (
    FEW,
    FUSED,
    LEARNED,
    OPTIONS,
    QUICK,
    STEPS,
    PlainAdamW,
    SmallNet,
    assert_same,
    batch,
    build,
    differs,
    gradients,
    loss_of,
    make_weights,
    run,
    set_gradients,
    snapshot,
    train_net,
    values,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mechanic_fused import (
    MechanicAdamW,
    is_mechanized,
    mechanize,
)

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


@pytest.mark.parametrize(
    "make", [MechanicAdamW, mechanize(PlainAdamW), mechanize(torch.optim.RAdam)]
)
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


# The loop around it


def test_a_compiled_model_in_the_loop(cpp):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = SmallNet()
        opt = build(cpp, "adamw", model.parameters(), **QUICK)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        found.append(train_net(model, opt, FEW, forward=forward))
    assert found[1] == pytest.approx(found[0], rel=STEPS * torch.finfo(torch.float32).eps)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
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
