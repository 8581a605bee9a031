"""Signatures, docstrings and representations: what an editor or a prompt shows."""

import inspect
import re

import pytest
import torch
from support.cases import FEW, FUSED, PLAIN, RADAM, SCALE_PER, Training, make_weights

from mechanic_fused import MechanicAdamW, MechanicSGD, mechanize

OWN = {
    "s_decay": None,
    "tuner_betas": None,
    "s_init": None,
    "tuner_eps": None,
    "variant": None,
    "scale_per": "model",
    "backend": "auto",
    "optim_bits": 32,
    "state_dtype": None,
    "delta_dtype": None,
    "x_ref_every": 1,
    "bf16_stochastic_round": False,
    "offload": False,
    "max_grad_norm": None,
    "reduce_group": None,
    "loss_group": None,
    "extra_groups": (),
}
"""The arguments of all classes beside the base's own, with their defaults."""


def parameters(function):
    return list(inspect.signature(function).parameters.values())


@pytest.mark.parametrize("base", FUSED)
def test_a_class_takes_the_arguments_of_its_base_and_then_ours(base):
    theirs, ours = parameters(PLAIN[base]), parameters(FUSED[base])
    for own, other in zip(ours, theirs, strict=False):
        assert (own.name, own.kind, own.default) == (other.name, other.kind, other.default)
    rest = ours[len(theirs) :]
    assert {p.name: p.default for p in rest} == OWN
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in rest)
    assert all(p.annotation is not inspect.Parameter.empty for p in ours)


@pytest.mark.parametrize("base", [torch.optim.RAdam, torch.optim.Muon, torch.optim.Adafactor])
def test_a_mechanized_class_shows_the_arguments_of_its_base_and_then_ours(base):
    theirs, ours = parameters(base), parameters(mechanize(base))
    named = [(p.name, p.kind, p.default) for p in theirs]
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == named
    assert [p.name for p in ours[len(theirs) :]] == [*OWN, "base_options"]


@pytest.mark.parametrize("positional", [(0.5,), (0.5, (0.8, 0.9)), (0.5, (0.8, 0.9), 1e-6, 0.1)])
def test_arguments_may_be_positional_as_those_of_torch(positional):
    ours, plain = (cls(make_weights(), *positional) for cls in (MechanicAdamW, torch.optim.AdamW))
    for name in plain.defaults:
        assert ours.param_groups[0][name] == plain.param_groups[0][name]


def documented(cls):
    """Return the names before the colons of a docstring's Args."""
    args = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(cls), re.DOTALL)[1]
    heads = re.findall(r"^    (\w[\w, ]*):", args, re.MULTILINE)
    return [name for head in heads for name in head.split(", ")]


@pytest.mark.parametrize("base", FUSED)
def test_every_argument_is_documented_in_order(base):
    names = [p.name for p in parameters(FUSED[base])]
    assert sorted(documented(FUSED[base])) == sorted(names)
    ours = [name for name in documented(FUSED[base]) if name in OWN]
    assert ours == list(OWN)


def test_every_argument_of_mechanize_is_documented():
    assert sorted(documented(mechanize)) == sorted(p.name for p in parameters(mechanize))


# What print shows


@pytest.mark.parametrize("steps", [0, FEW])
@pytest.mark.parametrize("scale_per", SCALE_PER)
@pytest.mark.parametrize("make", [MechanicAdamW, MechanicSGD, RADAM])
def test_print_shows_how_it_steps_and_what_it_has_learned(make, scale_per, steps):
    shapes = [(3,)] * 100
    one = Training(make, shapes=shapes, scale_per=scale_per, tuner_betas=(0.9, 0.99)).run(steps)
    text = repr(one.opt)
    lines = [line.strip() for line in text.splitlines()]
    scales = one.opt.scale.tolist()
    assert lines[0] == f"{make.__name__} ("
    assert lines[1] == one.opt.implementation
    assert lines[2].startswith("scale S: ")
    assert lines[2].endswith(f", one per {scale_per}")
    shown = (min(scales), max(scales)) if len(scales) > 1 else scales
    assert all(f"{s:.4g}" in lines[2] for s in shown)
    assert (f"{len(scales)} scales" in lines[2]) == (len(scales) > 1)
    assert f"learned lr: {one.opt.learned_lr()[0]:.4g}" in lines
    assert "Parameter Group 0: 100 tensors, 300 elements" in lines
    assert {f"lr: {one.group['lr']}", "tuner_betas: (0.9, 0.99)"} <= {*lines}
    assert "tensor(" not in text
    assert "mechanic_state" not in text
    assert max(map(len, lines)) < 100


def test_print_works_without_weights():
    text = repr(MechanicAdamW([{"params": []}], scale_per="parameter"))
    assert "scale S: none" in text
    assert "Parameter Group 0: 0 tensors, 0 elements" in text
