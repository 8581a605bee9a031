"""What users read and steer, and the way to the plain base and back."""

import inspect
import logging
import pickle

import mechanic_pytorch
import pytest
import torch
from cases import (
    FEW,
    LEARNED,
    LONG,
    OPTIONS,
    PLAIN,
    QUICK,
    SCALES,
    STEPS,
    SUM_RTOL,
    PlainAdamW,
    assert_same,
    assert_within,
    build,
    differs,
    loss_of,
    make_weights,
    run,
    snapshot,
    values,
)

from mechanic_fused import (
    MechanicAdamW,
    MechanicLion,
    MechanicSGD,
    backends,
    mechanize,
)

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


def test_the_scale_is_the_readers_own_also_with_a_single_beta():
    opt = MechanicAdamW(make_weights(), tuner_betas=(0.9,), **QUICK)
    before = opt.scale
    opt.scale.zero_()
    assert_same(opt.scale, before)
    assert before > 0


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


def test_the_tuners_options_may_be_changed_in_the_groups(road):
    """As schedulers change any option of a group."""
    found = []
    for s_decay in (0.01, 1.0):
        params = make_weights()
        opt = build(road, "adamw", params, **QUICK)
        run(opt, params, FEW)
        opt.param_groups[0]["s_decay"] = s_decay
        run(opt, params, FEW, first=FEW)
        found.append(opt.scale)
    assert differs(found[1], found[0])


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


@pytest.mark.parametrize("case", ["sgd", "dampened", "adam", "adamw", "lion"])
def test_a_plain_checkpoint_loads_into_ours_and_the_next_update_is_the_plain_ones(road, case):
    base = "sgd" if case == "dampened" else case
    # Undampened is only the first gradient, and that is long gone.
    options = {**OPTIONS[base], **({"dampening": 0.5} if case == "dampened" else {})}
    plains = make_weights(dtype=torch.float64)
    plain = PLAIN[base](plains, **{**options, "lr": 0.01})
    run(plain, plains, STEPS)
    params = [torch.nn.Parameter(p.detach().clone()) for p in plains]
    opt = build(road, base, params, **QUICK, **options)
    opt.load_state_dict(plain.state_dict())
    fresh = build(road, base, make_weights(), **QUICK, **options)
    assert_same(opt.scale, fresh.scale)
    start = values(params)
    run(plain, plains, 1, first=STEPS)
    run(opt, params, 1, first=STEPS)
    for p, q, x in zip(params, plains, start, strict=True):
        assert_same(opt.state[p]["x_ref"], x)
        assert_within(opt.state[p]["delta"], q - x, SUM_RTOL * float(x.abs().max()))
    for group in opt.param_groups:
        group["lr"] = options["lr"]
    loss = loss_of(params)
    run(opt, params, LONG, first=STEPS + 1)
    assert loss_of(params) < loss


def test_pickle_of_the_log_function_is_by_name():
    made = mechanize(torch.optim.AdamW, log_func=print, log_every=2)
    opt = pickle.loads(pickle.dumps(made(make_weights())))
    assert type(opt) is made
