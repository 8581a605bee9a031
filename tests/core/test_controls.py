"""What users read and control: scale, learned lr, implementation, freezing, resetting, logging."""

import inspect
import logging
import pickle

import mechanic_pytorch
import pytest
import torch
from support import cases
from support.cases import (
    FEW,
    QUICK,
    SCALE_PER,
    STEPS,
    SUM_RTOL,
    Training,
    assert_same,
    make_weights,
)

from mechanic_fused import MechanicAdamW, backends, mechanize

# What users read


@pytest.mark.parametrize("scale_per", SCALE_PER)
def test_scale_and_learned_lr_are_readable_at_any_time(train, scale_per):
    def groups(params):
        return [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "lr": torch.tensor(2.0)}]

    one = train(groups=groups, scale_per=scale_per)
    rows = {"model": [0, 0, 0], "group": [0, 1, 1], "parameter": [0, 1, 2]}[scale_per]
    for _ in range(FEW):
        lrs, s = one.opt.learned_lr(), one.opt.scale
        assert s.dtype is torch.float64
        assert s.shape == (max(rows) + 1,)
        assert all(type(lr) is float for lr in lrs)
        expected = [0.5 * s[rows[0]], 2.0 * (s[rows[1]] + s[rows[2]]) / 2]
        assert lrs == pytest.approx([float(lr) for lr in expected], rel=SUM_RTOL)
        before = one.snapshot()
        s.zero_()  # theirs: a copy
        assert_same(one.snapshot(), before)
        one.run(1)
    assert cases.differs(one.opt.scale, s)


def test_the_scale_is_a_copy_also_with_a_single_beta():
    opt = MechanicAdamW(make_weights(), tuner_betas=(0.9,), **QUICK)
    before = opt.scale
    opt.scale.zero_()
    assert_same(opt.scale, before)
    assert before > 0


def test_the_implementation_is_named_with_its_reason():
    expected = "cpp" if backends.resolve("auto", "cpu") == "cpp" else "reference"
    amsgrad = "fallback: amsgrad=True has no fused update"
    groups = [{"params": make_weights()}, {"params": make_weights(), "amsgrad": True}]
    for opt, name in [
        (MechanicAdamW(make_weights()), f"fused ({expected})"),
        (MechanicAdamW(make_weights(), backend="reference"), "fused (reference)"),
        (MechanicAdamW(make_weights(), amsgrad=True), amsgrad),
        (MechanicAdamW(groups), amsgrad),
        (cases.RADAM(make_weights()), "fallback: RAdam has no fused update"),
        (cases.FALLBACK["adamw"](make_weights()), "fallback: PlainAdamW has no fused update"),
    ]:
        assert opt.implementation == name


# What they control


def test_a_frozen_scale_stays_and_the_weights_go_on(train):
    one = train().run(FEW)
    one.opt.freeze_scale()
    scale, loss, x = one.opt.scale, one.loss, one.x
    one.run(FEW)
    assert_same(one.opt.scale, scale)
    assert cases.differs(one.x, x)
    assert one.loss < loss
    one.opt.freeze_scale(False)
    one.run(FEW)
    assert cases.differs(one.opt.scale, scale)


def test_a_reset_starts_anew_from_the_current_weights(train):
    one = train().run(STEPS)
    kept = {k: cases.values(one.states(k)) for k in ("exp_avg", "exp_avg_sq", "step")}
    x = one.x
    one.opt.reset_scale()
    assert_same(one.x, x)
    assert_same({k: one.states(k) for k in kept}, kept)
    twin = train(params=cases.copies(one.params))
    assert_same(one.opt.scale, twin.opt.scale)
    plain = torch.optim.AdamW(twin.params)
    plain.load_state_dict(one.opt.to_base().state_dict())
    twin.opt.load_state_dict(plain.state_dict())
    twin.group["lr"], twin.t = one.group["lr"], one.t
    assert_same(one.run(STEPS).x, twin.run(STEPS).x)


@pytest.mark.parametrize("steps", [0, FEW])
def test_a_reset_takes_weights_that_never_had_a_gradient(train, steps):
    one = train()
    rest = one.params[1:]
    one.run(steps, rest)
    one.opt.reset_scale()
    loss = cases.loss_of(rest)
    one.run(cases.LONG, rest)
    assert cases.loss_of(rest) < cases.LEARNED * loss


def test_a_reset_reaches_frozen_weights_too(train):
    one = train("sgd").run(1)
    frozen, *rest = one.params
    frozen.requires_grad_(False)
    one.run(1, rest)
    one.opt.reset_scale()
    assert not one.opt.state[frozen]["delta"].any()


# Logging, and the call of mechanic_pytorch


def test_log_func_gets_the_scale_every_so_many_steps(implementation):
    seen, every, fallback = [], 2, implementation == "fallback"
    made = mechanize(
        cases.PlainAdamW if fallback else torch.optim.AdamW,
        log_func=lambda data: seen.append((data, float(one.opt.scale.sum()))),
        log_every=every,
        backend="auto" if fallback else implementation,
    )
    one = Training(made)
    one.run(FEW)
    assert [data["iter_count"] for data, _ in seen] == list(range(every, FEW + 1, every))
    assert [data["s"] for data, _ in seen] == [scale for _, scale in seen]


def test_without_log_func_the_scale_is_logged(caplog):
    one = Training(mechanize(torch.optim.AdamW, log_every=1))
    with caplog.at_level(logging.INFO, logger="mechanic_fused"):
        one.run(1)
    assert f"{float(one.opt.scale.sum()):g}" in caplog.text


def test_the_log_function_is_pickled_by_name():
    made = mechanize(torch.optim.AdamW, log_func=print, log_every=2)
    assert type(pickle.loads(pickle.dumps(made(make_weights())))) is made


def test_the_call_of_mechanic_pytorch_works_unchanged():
    theirs = inspect.signature(mechanic_pytorch.mechanize).parameters
    ours = inspect.signature(mechanize).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name in ("log_func", "log_every"):
        assert ours[name].default == theirs[name].default
    positional = (torch.optim.SGD, 0.0, (0.9, 0.99), 1e-3, 1e-6, True, None, 0)
    params = make_weights()
    opt = mechanize(*positional)(params, lr=0.1)
    cases.run(opt, params, 1)
    names = ("s_decay", "tuner_betas", "s_init", "tuner_eps")
    assert tuple(opt.param_groups[0][name] for name in names) == positional[1:5]
    mechanize(torch.optim.SGD, store_delta=False)


def test_options_of_the_instance_prevail_over_those_of_the_class():
    made = mechanize(torch.optim.AdamW, s_decay=0.5, s_init=0.1, variant="paper")
    group = made(make_weights(), s_decay=0.0, variant="pytorch").param_groups[0]
    assert (group["s_decay"], group["s_init"], group["variant"]) == (0.0, 0.1, "pytorch")
