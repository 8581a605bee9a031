"""What help(), inspect and print() show of an optimizer."""

import inspect

import pytest
import torch

from mechanic_fused import Lion, MechanicAdam, MechanicAdamW, MechanicLion, MechanicSGD, mechanize

CLASSES = {
    MechanicAdamW: torch.optim.AdamW,
    MechanicAdam: torch.optim.Adam,
    MechanicSGD: torch.optim.SGD,
    MechanicLion: Lion,
}
OWN = {
    "s_decay": 0.01,
    "tuner_betas": (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999),
    "s_init": None,
    "tuner_eps": 1e-8,
    "variant": "annealed",
    "scale_per": "model",
    "backend": "auto",
    "state_dtype": None,
    "delta_dtype": None,
    "max_grad_norm": None,
    "reduce_group": None,
    "extra_groups": (),
}


@pytest.mark.parametrize("cls", CLASSES)
def test_a_signature_has_the_arguments_of_the_base_and_then_ours(cls):
    shown = inspect.signature(cls).parameters
    base = inspect.signature(CLASSES[cls]).parameters
    assert list(shown) == [*base, *OWN]
    for name, parameter in base.items():
        assert shown[name].default == parameter.default, name
        assert shown[name].kind is parameter.kind, name
    for name, default in OWN.items():
        assert shown[name].default == default, name
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY, name


@pytest.mark.parametrize("cls", CLASSES)
def test_the_docstring_describes_every_argument(cls):
    doc = inspect.getdoc(cls)
    for name in inspect.signature(cls).parameters:
        assert f"{name}:" in doc or f"{name}," in doc, name
    assert "Raises:" in doc and "Source: arXiv 2306.00144" in doc and "%(own)s" not in doc


def test_a_mechanized_class_shows_the_arguments_of_its_base_and_then_ours():
    shown = list(inspect.signature(mechanize(torch.optim.RAdam)).parameters)
    base = list(inspect.signature(torch.optim.RAdam).parameters)
    assert shown == [*base, *OWN]


def test_printing_an_optimizer_shows_what_it_has_learned_and_no_tensor():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(50)]
    opt = MechanicAdamW(weights, lr=1.0, weight_decay=0.1, backend="reference")
    for step in range(3):
        text = repr(opt)
        assert text.startswith("MechanicAdamW (\n")
        assert "fused (reference)" in text and "weight_decay: 0.1" in text
        assert f"scale S: {float(opt.scale):.4g}, one per model" in text
        assert f"learned lr: {opt.learned_lr()[0]:.4g}" in text
        assert "tensor(" not in text and "mechanic_state" not in text and "max_peak_lr" not in text
        for w in weights:
            w.grad = torch.full((3,), 1.0 + step)
        opt.step()


def test_printing_many_scales_shows_their_range():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(50)]
    opt = MechanicSGD(weights, lr=1.0, scale_per="parameter", backend="reference")
    assert "scale S: 50 scales," in repr(opt)
    assert len(repr(opt).splitlines()) < 40
