"""An optimizer like any of torch's: closures, hooks, compiled loops, the rules of autograd."""

import pytest
import torch
from support import cases
from support.cases import FEW, QUICK, STEPS, Training, assert_same, make_weights, values
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mechanic_fused import MechanicAdamW, is_mechanized, mechanize

# Closures


@pytest.mark.parametrize("enabled", [True, False])
def test_a_closure_runs_with_autograd_on_and_its_loss_is_returned(implementation, enabled):
    found = []
    for closed in (False, True):
        model = cases.SmallNet()
        opt = cases.build(implementation, "adamw", model.parameters(), **QUICK)
        losses = []
        for t in range(FEW):

            def closure(t=t, opt=opt, model=model):
                assert torch.is_grad_enabled()
                opt.zero_grad()
                loss = cases.net_loss(model, t)
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
    assert_same(*found)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_closure_that_raises_changes_nothing_and_leaves_autograd_as_it_was(train, enabled):
    one = train().run(FEW)
    before = one.snapshot()

    def closure():
        raise KeyError("the loss")

    with torch.set_grad_enabled(enabled):
        with pytest.raises(KeyError, match="the loss"):
            one.opt.step(closure)
        assert torch.is_grad_enabled() is enabled
    assert_same(one.snapshot(), before)
    assert cases.differs(one.run(1).snapshot(), before)


# Maximize, hooks, types


@pytest.mark.parametrize("base", cases.FUSED)
def test_maximizing_is_minimizing_the_negated_loss(train, base):
    one, other = (train(base, maximize=maximize, **cases.OPTIONS[base]) for maximize in (0, 1))
    before = one.loss
    for t in range(STEPS):
        one.run(1)
        other.step([-g for g in cases.gradients(other.params, t)])
    assert_same([*one.x, one.opt.scale], [*other.x, other.opt.scale])
    assert other.loss < cases.LEARNED * before


@pytest.mark.parametrize("make", [MechanicAdamW, cases.FALLBACK["adamw"], cases.RADAM])
@pytest.mark.parametrize("scheduled", [False, True])
def test_step_hooks_fire_once_each(make, scheduled):
    # Once a plain one has been made, torch runs the hooks inside its step as well.
    for base in make.__mro__:
        if base.__module__.startswith("torch.optim.") and base is not torch.optim.Optimizer:
            base(make_weights())
    one = Training(make)
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(one.opt, 0.9)
    seen = []
    handles = [
        one.opt.register_step_pre_hook(lambda *_: seen.append("own pre")),
        one.opt.register_step_post_hook(lambda *_: seen.append("own post")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        one.run(1)
        once = list(seen)
        one.opt.step(lambda: None)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(once) == ["own post", "own pre", "post", "pre"]
    assert seen == 2 * once
    assert once[:2] == ["pre", "own pre"]


def test_a_pre_hook_may_change_the_gradients(train):
    """Clipping and gradient noise are done so."""

    def halve(opt, *_):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    one, other = train(), train()
    one.opt.register_step_pre_hook(halve)
    for t in range(FEW):
        one.run(1)
        other.step([0.5 * g for g in cases.gradients(other.params, t)])
    assert_same(one.x, other.x)


def test_a_mechanized_optimizer_is_an_instance_of_its_base():
    opt, plain = MechanicAdamW(make_weights()), torch.optim.AdamW(make_weights())
    assert isinstance(opt, torch.optim.AdamW)
    assert is_mechanized(opt)
    assert not is_mechanized(plain)
    assert isinstance(mechanize(torch.optim.RAdam)(make_weights()), torch.optim.RAdam)
    assert plain.param_groups[0].keys() <= opt.param_groups[0].keys()
    assert plain.defaults.items() <= opt.defaults.items()


# The loop around it


def test_a_compiled_model_may_be_trained(cpp):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = cases.SmallNet()
        opt = cases.build(cpp, "adamw", model.parameters(), **QUICK)
        net = torch.compile(model, backend="aot_eager") if compiled else model
        found.append(cases.train_net(net, opt, FEW))
    assert found[1] == pytest.approx(found[0], rel=STEPS * torch.finfo(torch.float32).eps)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_training_step_may_call_it(implementation):
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = cases.SmallNet()
        opt = cases.build(implementation, "adamw", model.parameters(), **QUICK)

        def step(z, y, model=model, opt=opt):
            loss = (model(z) - y).square().mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss.detach()

        step = torch.compile(step, backend="eager") if compiled else step
        losses = [float(step(*cases.batch(t))) for t in range(FEW)]
        found.append([losses, *values(model.parameters())])
    assert_same(*found)


def plain_sgd(params, lr, **_):
    return torch.optim.SGD(params, lr)


@pytest.mark.parametrize("moved_by", ["torch", "its gradient", "the scale alone"])
def test_a_backward_through_overwritten_weights_raises(implementation, moved_by):
    one = Training(plain_sgd if moved_by == "torch" else implementation, "sgd").run(1)
    loss = (one.params[0] ** 3).sum()
    grads = cases.gradients(one.params, 1)
    if moved_by == "the scale alone":
        grads[0] = None
    one.step(grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("other_base", ["adamw", "lion"])
def test_two_optimizers_in_one_process_do_not_meet(train, other_base):
    options = {"variant": "paper", "tuner_betas": (0.9,)}
    alone = [train().run(), train(other_base, seed=1, **options).run()]
    one, other = train(), train(other_base, seed=1, **options)
    for _ in range(STEPS):
        one.run(1)
        other.run(1)
    assert_same([one.x, other.x], [each.x for each in alone])
