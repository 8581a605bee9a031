"""Modes that surround a step or a constructor change where tensors are made, and nothing else."""

import pytest
import torch
from support.cases import values

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, mechanize
from mechanic_fused.tuners import CGQ, AdaRem, AutoGD

MAKERS = {
    "AdamW": lambda ps: MechanicAdamW(ps, lr=1.0),
    "AdamW, reference": lambda ps: MechanicAdamW(ps, lr=1.0, backend="reference"),
    "annealed": lambda ps: MechanicAdamW(ps, lr=1.0, variant="annealed"),
    "a scale a weight": lambda ps: MechanicAdamW(ps, lr=1.0, scale_per="parameter"),
    "clipped SGD": lambda ps: MechanicSGD(ps, lr=1.0, momentum=0.9, max_grad_norm=1.0),
    "Lion": lambda ps: MechanicLion(ps, lr=1.0),
    "RAdam": lambda ps: mechanize(torch.optim.RAdam)(ps, lr=1.0),
    "AdaRem": lambda ps: AdaRem(ps, lr=0.1),
    "CGQ": lambda ps: CGQ(ps, lr=0.1),
    "AutoGD": lambda ps: AutoGD(ps, lr=0.1),
}


def _run(name, steps=4):
    torch.manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.empty(shape, device="cpu", dtype=torch.float32).normal_())
        for shape in ((5, 3), (4,))
    ]
    opt = MAKERS[name](weights)

    def closure():
        for p in weights:
            p.grad = p.detach() - 1
        return sum(((p.detach() - 1) ** 2).sum() for p in weights) / 2

    for _ in range(steps):
        opt.step(closure)
    opt.load_state_dict(opt.state_dict())
    opt.step(closure)
    if hasattr(opt, "learned_lr"):
        opt.learned_lr(), opt.to_base(), repr(opt), opt.grad_norm
    return values(weights)


@pytest.mark.parametrize("name", MAKERS)
def test_another_default_device_changes_nothing(name):
    """ "meta" stands for a GPU: what lands there has no numbers."""
    wanted = _run(name)
    torch.set_default_device("meta")
    try:
        found = _run(name)
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("name", MAKERS)
def test_another_default_dtype_changes_nothing(name):
    wanted = _run(name)
    torch.set_default_dtype(torch.float64)
    try:
        found = _run(name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, wanted))
