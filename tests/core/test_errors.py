"""One clear error for each bad option, base and backend, and nothing changed by the attempt."""

import sys

import pytest
import torch
from support import cases
from support.cases import FEW, FUSED, Training, assert_same, make_weights

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, backends, mechanize

# Option → bad values, each with what the message must say: the option's name, what was expected,
# what was given.
OF_TUNER = {
    "s_decay": [(-0.5, r"must be .*0 or more.* -0\.5"), (float("nan"), "nan"), ("many", "many")],
    "s_init": [
        (0.0, r'must be "auto" or .*above 0.* 0\.0'),
        (-1.0, r"-1\.0"),
        (float("inf"), "finite.* inf"),
        ("many", "many"),
    ],
    "tuner_eps": [(0.0, r"must be .*above 0.* 0\.0"), (float("nan"), "nan"), ("many", "many")],
    "tuner_betas": [
        ((), r"must be .*\(0, 1\).* \(\)"),
        ((0.9, 1.0), r"must be .*\(0, 1\).*1\.0"),
        ((0.0, 0.9), r"0\.0"),
        ((0.9, float("nan")), "nan"),
        (0.9, r"0\.9"),
        ("many", "many"),
    ],
    "variant": [("adam", "must be one of .*optax.* 'adam'")],
    "scale_per": [("layer", "must be one of .*parameter.* 'layer'")],
    "backend": [("gpu", "must be .*reference.* 'gpu'")],
}
OF_INSTANCE = {
    "optim_bits": [(4, "must be one of 32, 16, 8, got 4"), ("8", "one of .* '8'"), (True, "True")],
    "state_dtype": [
        (torch.bfloat16, "must be one of None, param, got torch.bfloat16"),
        ("float32", "must be one of .* 'float32'"),
        (True, "must be one of .* True"),
    ],
    "delta_dtype": [
        (torch.float16, "must be one of None, torch.bfloat16, got torch.float16"),
        ("bfloat16", "must be one of .* 'bfloat16'"),
        (True, "must be one of .* True"),
    ],
    "max_grad_norm": [
        (bad, f"must be None or a finite number above 0, got {bad!r}")
        for bad in (0.0, -1.0, float("nan"), float("inf"), "1")
    ],
}


def rows(table):
    return [(name, value, text) for name, bad in table.items() for value, text in bad]


@pytest.mark.parametrize(("name", "value", "text"), rows({**OF_TUNER, **OF_INSTANCE}))
def test_a_bad_option_of_the_instance_is_refused(name, value, text):
    with pytest.raises(ValueError, match=f"{name} .*{text}"):
        MechanicAdamW(make_weights(), **{name: value})


@pytest.mark.parametrize(("name", "value", "text"), rows(OF_TUNER))
def test_a_bad_option_of_the_class_is_refused(name, value, text):
    """By the names of mechanic_pytorch, betas and eps, as by ours."""
    theirs = {"tuner_betas": "betas", "tuner_eps": "eps"}.get(name, name)
    for given in {name, theirs}:
        with pytest.raises(ValueError, match=f"{name} .*{text}"):
            mechanize(torch.optim.AdamW, **{given: value})


@pytest.mark.parametrize("log_every", [-1, 1.5, True])
def test_a_bad_interval_of_logging_is_refused(log_every):
    with pytest.raises(ValueError, match=f"log_every must be an integer of 0 .*{log_every}"):
        mechanize(torch.optim.AdamW, log_every=log_every)
    with pytest.raises(ValueError, match="log_func must be callable, got 'print'"):
        mechanize(torch.optim.AdamW, log_func="print")


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
def test_a_bad_option_of_the_base_is_refused(make, options, text):
    with pytest.raises(ValueError, match=text):
        make(make_weights(), **options)


@pytest.mark.parametrize("make", [MechanicAdamW, mechanize(torch.optim.RAdam)])
def test_an_option_that_nobody_knows_is_refused(make):
    with pytest.raises(TypeError, match="stat_dtype"):
        make(make_weights(), stat_dtype="param")


@pytest.mark.parametrize("make", [MechanicAdamW, MechanicSGD, mechanize(torch.optim.RAdam)])
@pytest.mark.parametrize("how", ["option", "group", "added group"])
def test_differentiable_is_refused(make, how):
    group = {"params": make_weights(), "differentiable": True}
    one = Training(make).run(FEW)
    before = one.snapshot()
    attempt = {
        "option": lambda: make(make_weights(), differentiable=True),
        "group": lambda: make([group]),
        "added group": lambda: one.opt.add_param_group(group),
    }[how]
    with pytest.raises(ValueError, match="differentiable must be False"):
        attempt()
    assert_same(one.snapshot(), before)


@pytest.mark.parametrize(
    ("base", "text"),
    [
        (torch.nn.Linear, "Base must be a subclass of torch.optim.Optimizer, got .*Linear"),
        (torch.optim.AdamW(make_weights()), "Base must be a subclass of .*got AdamW"),
        (MechanicAdamW, "Base must be a plain optimizer, got MechanicAdamW"),
        (torch.optim.LBFGS, "Base must step without a closure, got LBFGS"),
    ],
)
def test_a_base_that_cannot_be_mechanized_is_refused(base, text):
    with pytest.raises(TypeError, match=text):
        mechanize(base)


@pytest.mark.parametrize("name", ["cpp", "cuda", "triton"])
def test_a_backend_that_is_not_here_says_what_to_install(name):
    row = next(row for row in backends.table() if row.name == name)
    if row.available:
        pytest.skip(f"{name} is available here")
    with pytest.raises(ValueError, match=f"backend '{name}' is not available: .*install"):
        MechanicAdamW(make_weights(), backend=name)


def test_without_the_extension_auto_is_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "mechanic_fused._native", None)
    monkeypatch.delitem(sys.modules, "mechanic_fused.backends.cpp", raising=False)
    with pytest.raises(ValueError, match=r"backend 'cpp' is not available: .*compiler"):
        MechanicAdamW(make_weights(), backend="cpp")
    assert Training(MechanicAdamW).run(FEW).opt.implementation == "fused (reference)"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_the_backend_does_not_serve_is_refused(cpp, device):
    with pytest.raises(ValueError, match=f"backend 'cpp' serves weights on cpu, got .*{device}"):
        backends.resolve(cpp, device)


@pytest.mark.parametrize("make", [*FUSED.values(), cases.FALLBACK["adamw"]])
def test_an_optimizer_over_nothing_is_the_error_of_torch(make):
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
