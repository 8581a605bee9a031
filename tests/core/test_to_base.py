"""The way to a plain base optimizer, and from its checkpoint back."""

import pytest
import torch
from support import cases
from support.cases import FEW, STEPS, SUM_RTOL, Training, assert_same, make_weights

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, mechanize

BASES = {
    "AdamW": (MechanicAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "SGD": (MechanicSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "SGD without momentum": (MechanicSGD, torch.optim.SGD, {"lr": 0.1}),
    "Lion": (MechanicLion, cases.PLAIN["lion"], {"weight_decay": 0.1}),
    "amsgrad": (MechanicAdamW, torch.optim.AdamW, {"amsgrad": True}),
    "RAdam": (cases.RADAM, torch.optim.RAdam, {}),
    "Adagrad": (mechanize(torch.optim.Adagrad), torch.optim.Adagrad, {}),
}
OURS = ("x_ref", "delta")


@pytest.mark.parametrize("scale_per", ["model", "parameter"])
@pytest.mark.parametrize("case", BASES)
def test_the_base_goes_on_at_the_learned_lr(case, scale_per):
    make, base, options = BASES[case]
    one = Training(make, scale_per=scale_per, **options).run()
    plain = one.opt.to_base()
    assert type(plain) is base
    # By hand: the base alone, over copies, at each weight's own lr and with its state.
    copies = cases.copies(one.params)
    lrs = [one.group["lr"] * s for s in one.opt.scale.tolist()]
    lrs *= 1 if scale_per == "parameter" else len(copies)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(copies, lrs, strict=True)]
    by_hand = base(groups, **{k: v for k, v in options.items() if k != "lr"})
    ours = (*OURS, "step") if base is torch.optim.SGD else OURS
    for p, q in zip(one.params, copies, strict=True):
        kept = {k: v for k, v in one.opt.state[p].items() if k not in ours}
        by_hand.state[q] = {k: v.clone() for k, v in kept.items()}
    before = one.x
    for optimizer, weights in ((plain, one.params), (by_hand, copies)):
        cases.run(optimizer, weights, FEW, first=STEPS)
        assert all(not set(OURS) & optimizer.state[p].keys() for p in weights)
    assert_same(one.x, cases.values(copies))
    assert cases.differs(one.x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_base_trains_16_bit_weights_on(backend, dtype):
    one = Training(backend, dtype=dtype).run()
    loss = one.loss
    cases.run(one.opt.to_base(), one.params, STEPS, first=STEPS)
    assert one.loss < loss


def test_the_base_has_the_groups_and_the_schedule():
    def groups(params):
        return [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "weight_decay": 0.3}]

    def schedule(opt):
        return torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)

    one = Training(MechanicAdamW, groups=groups, schedule=schedule).run(FEW)
    plain, s = one.opt.to_base(), float(one.opt.scale)
    for ours, theirs in zip(one.opt.param_groups, plain.param_groups, strict=True):
        for name in ("lr", "initial_lr"):
            assert theirs[name] == pytest.approx(s * ours[name], rel=SUM_RTOL)
        assert theirs["weight_decay"] == ours["weight_decay"]
    plain_keys = torch.optim.AdamW(make_weights()).param_groups[0].keys()
    assert plain.param_groups[0].keys() == plain_keys | {"initial_lr"}


def test_before_the_first_step_the_base_is_fresh(train):
    one = train()
    plain = one.opt.to_base()
    assert not plain.state
    cases.run(plain, one.params, 1)


class NeedsLr(cases.Lion):
    def __init__(self, params, lr):
        super().__init__(params, lr)


def test_a_base_with_required_arguments_gets_them_and_a_state_of_its_own():
    one = Training(mechanize(NeedsLr)).run(1)
    plain = one.opt.to_base()
    assert type(plain) is NeedsLr
    assert plain.param_groups[0]["lr"] == one.opt.learned_lr()[0]
    before = cases.values(one.states("exp_avg"))
    cases.run(plain, one.params, 1)
    assert_same(one.states("exp_avg"), before)


# From a plain base's checkpoint


@pytest.mark.parametrize(
    "case", ["sgd l2", "momentum", "dampening", "adam l2", "adamw", "lion decay"]
)
def test_after_a_plain_checkpoint_the_next_update_is_that_of_the_base(train, case):
    base, options = cases.CASES[case]
    plains = make_weights(dtype=torch.float64)
    plain = cases.PLAIN[base](plains, **{**options, "lr": 0.01})
    cases.run(plain, plains, STEPS)
    one = train(base, params=cases.copies(plains), **options)
    scale, start = one.opt.scale, one.x
    one.opt.load_state_dict(plain.state_dict())
    assert_same(one.opt.scale, scale)
    one.t = STEPS
    cases.run(plain, plains, 1, first=STEPS)
    one.run(1)
    assert_same(one.states("x_ref"), start)
    for delta, q, x in zip(one.states("delta"), plains, start, strict=True):
        cases.assert_within(delta, q - x, SUM_RTOL * float(x.abs().max()))
    for group in one.opt.param_groups:
        group["lr"] = options["lr"]
    loss = one.loss
    assert one.run(cases.LONG).loss < loss


@pytest.mark.parametrize("options", [{"amsgrad": True}, {}], ids=["amsgrad", "fused"])
def test_after_a_plain_checkpoint_the_state_of_bfloat16_weights_is_wide(options):
    params = make_weights(dtype=torch.bfloat16)
    plain = torch.optim.AdamW(params, **options)
    cases.run(plain, params, 1)
    one = Training(MechanicAdamW, params=params, **options)
    one.opt.load_state_dict(plain.state_dict())
    one.run(1)
    assert all(state.dtype is torch.float32 for state in one.states("exp_avg"))
    assert one.states("step") == [2, 2, 2]
