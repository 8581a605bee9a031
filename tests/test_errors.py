"""One clear error for each bad option, base and backend, and nothing changed by the attempt."""

import sys

import pytest
import torch
from cases import (
    FEW,
    FUSED,
    QUICK,
    PlainAdamW,
    assert_same,
    build,
    make_weights,
    run,
    set_gradients,
    snapshot,
    values,
)

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, backends, mechanize

# Option → a bad value, and what the message must say: its name, what was expected, what was given.
BAD_OPTIONS = {
    "s_decay": [(-0.5, r"s_decay must be .*0 or more.* -0\.5"), (float("nan"), "s_decay .*nan")],
    "s_init": [
        (0.0, r"s_init must be .*above 0.* 0\.0"),
        (-1.0, r"s_init .*-1\.0"),
        (float("inf"), "s_init .*finite.* inf"),
    ],
    "tuner_eps": [(0.0, r"tuner_eps must be .*above 0.* 0\.0"), (float("nan"), "tuner_eps .*nan")],
    "tuner_betas": [
        ((), r"tuner_betas must be .*\(0, 1\).* \(\)"),
        ((0.9, 1.0), r"tuner_betas must be .*\(0, 1\).*1\.0"),
        ((0.0, 0.9), r"tuner_betas .*0\.0"),
        ((0.9, float("nan")), "tuner_betas .*nan"),
        (0.9, r"tuner_betas .*0\.9"),
    ],
    "variant": [("adam", "variant must be one of .*optax.* 'adam'")],
    "scale": [("layer", "scale must be one of .*parameter.* 'layer'")],
    "backend": [("gpu", "backend must be .*reference.* 'gpu'")],
}
BAD = [(name, value, text) for name, rows in BAD_OPTIONS.items() for value, text in rows]


@pytest.mark.parametrize(("name", "value", "text"), BAD)
def test_a_bad_option_of_the_instance(name, value, text):
    with pytest.raises((ValueError, TypeError), match=text):
        MechanicAdamW(make_weights(), **{name: value})


@pytest.mark.parametrize(("name", "value", "text"), BAD)
def test_a_bad_option_of_the_class(name, value, text):
    named = {"tuner_betas": "betas", "tuner_eps": "eps"}.get(name, name)
    with pytest.raises((ValueError, TypeError), match=text):
        mechanize(torch.optim.AdamW, **{named: value})(make_weights())


@pytest.mark.parametrize("name", ["s_decay", "s_init", "tuner_eps", "tuner_betas"])
def test_a_bad_type_names_the_option(name):
    with pytest.raises((ValueError, TypeError), match=f"{name} must be .*many"):
        MechanicAdamW(make_weights(), **{name: "many"})


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (MechanicAdamW, {"lr": -1.0}, r"[Ll]earning rate.*-1\.0"),
        (MechanicAdamW, {"betas": (1.0, 0.9)}, r"beta.*1\.0"),
        (MechanicSGD, {"nesterov": True}, "[Nn]esterov"),
        (MechanicLion, {"lr": -1.0}, r"lr must be 0 or more.*-1\.0"),
        (MechanicLion, {"betas": (0.9,)}, r"betas must be two .*\(0\.9,\)"),
        (MechanicLion, {"betas": (0.9, 1.0)}, r"betas must be .*1\.0"),
        (MechanicLion, {"weight_decay": -1.0}, r"weight_decay must be 0 or more.*-1\.0"),
    ],
)
def test_a_bad_option_of_the_base(make, options, text):
    with pytest.raises(ValueError, match=text):
        make(make_weights(), **options)


def test_an_option_that_nobody_knows():
    with pytest.raises(TypeError, match="narow_state"):
        MechanicAdamW(make_weights(), narow_state=True)


@pytest.mark.parametrize("make", [MechanicAdamW, MechanicSGD, mechanize(torch.optim.RAdam)])
@pytest.mark.parametrize("how", ["option", "group", "added group"])
def test_differentiable(make, how):
    text = "differentiable must be False"
    if how == "option":
        with pytest.raises(ValueError, match=text):
            make(make_weights(), differentiable=True)
    elif how == "group":
        with pytest.raises(ValueError, match=text):
            make([{"params": make_weights(), "differentiable": True}])
    else:
        params = make_weights()
        opt = make(params, **QUICK)
        run(opt, params, FEW)
        before = snapshot(opt)
        with pytest.raises(ValueError, match=text):
            opt.add_param_group({"params": make_weights(), "differentiable": True})
        assert_same(snapshot(opt), before)


@pytest.mark.parametrize(
    ("base", "text"),
    [
        (torch.nn.Linear, "Base must be a subclass of torch.optim.Optimizer, got .*Linear"),
        (torch.optim.AdamW(make_weights()), "Base must be a subclass of .*got AdamW"),
        (MechanicAdamW, "Base must be a plain optimizer, got MechanicAdamW"),
        (torch.optim.LBFGS, "Base must step without a closure, got LBFGS"),
    ],
)
def test_what_cannot_be_mechanized(base, text):
    with pytest.raises(TypeError, match=text):
        mechanize(base)


MORE_BETAS = tuple(1 - 0.5**n for n in range(1, 12))


@pytest.mark.parametrize("betas", [(0.9,), MORE_BETAS, (1.5,) * 6], ids=["fewer", "more", "bad"])
def test_tuner_betas_changed_in_mid_run(road, betas):
    """The tuner's state has a place for each beta, and kernels trust their number."""
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    before = opt.param_groups[0]["tuner_betas"]
    opt.param_groups[0]["tuner_betas"] = betas
    set_gradients(params, FEW)
    weights, state = values(params), [dict(opt.state[p]) for p in params]
    with pytest.raises(ValueError, match="tuner_betas"):
        opt.step()
    opt.param_groups[0]["tuner_betas"] = before
    assert_same(values(params), weights)
    assert_same([dict(opt.state[p]) for p in params], state)
    run(opt, params, 1, first=FEW)


@pytest.mark.parametrize("name", ["cpp", "cuda", "triton"])
def test_a_backend_that_is_not_here_says_what_to_install(name):
    row = next(row for row in backends.table() if row.name == name)
    if row.available:
        pytest.skip(f"{name} is available here")
    with pytest.raises(ValueError, match=f"backend '{name}' is not available: .*install"):
        MechanicAdamW(make_weights(), backend=name)


def test_without_the_extension_auto_is_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "mechanic_fused._native", None)
    monkeypatch.delitem(sys.modules, "mechanic_fused.backends.native", raising=False)
    with pytest.raises(ValueError, match="backend 'cpp' is not available: .*compiler"):
        MechanicAdamW(make_weights(), backend="cpp")
    params = make_weights()
    opt = MechanicAdamW(params, **QUICK)
    run(opt, params, FEW)
    assert opt.road == "fused: reference"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_the_backend_does_not_serve(cpp, device):
    with pytest.raises(ValueError, match=f"backend 'cpp' serves weights on cpu, got .*{device}"):
        backends.resolve(cpp, device)


@pytest.mark.parametrize("make", [*FUSED.values(), mechanize(PlainAdamW)])
def test_an_optimizer_over_nothing_is_torchs_error(make):
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
