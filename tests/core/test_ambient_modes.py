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


@pytest.mark.parametrize(
    ("name", "floats"),
    [("AdamW", 3), ("annealed", 4), ("Lion", 2), ("clipped SGD", 2), ("RAdam", 3)],
)
def test_weights_without_data_show_how_much_memory_a_step_takes(name, floats):
    """As with torch's optimizers: a step under FakeTensorMode makes state of the right sizes."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        model = torch.nn.Linear(1000, 500)
        opt = MAKERS[name](model.parameters())
        for _ in range(2):
            model(torch.randn(8, 1000)).sum().backward()
            opt.step()
        states = [t for entries in opt.state.values() for t in entries.values()]
        assert all(isinstance(t, FakeTensor) for t in states)
        assert sum(t.numel() for t in states if t.dim()) == floats * 500 * 1001
        repr(opt), opt.state_dict()


def test_bases_of_the_fallback_step_without_data_more_than_once():
    """Their state is wide beside 16-bit weights, and some weights get gradients later."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.ones(7, dtype=torch.bfloat16)) for _ in range(2)]
        opt = mechanize(torch.optim.RAdam)(weights)
        for t in range(3):
            for p in weights[: t + 1]:
                p.grad = torch.ones_like(p)
            opt.step()
        for p in weights:
            assert opt.state[p]["exp_avg"].dtype is torch.float32
            assert p.grad is not None


def test_real_weights_are_not_stepped_under_fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = torch.nn.Parameter(torch.ones(3))
    opt = MechanicAdamW([weight])
    for _ in range(3):
        weight.grad = torch.ones(3)
        opt.step()
    before = weight.detach().clone()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="got real ones"):
        opt.step()
    assert torch.equal(weight, before)


def test_state_of_weights_without_data_is_that_of_others():
    """Entries, shapes and dtypes, of 16-bit weights and of an x_ref in part too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def described(dtype, **options):
        p = torch.nn.Parameter(torch.empty(128, 128, dtype=dtype).fill_(1))
        opt = MechanicAdamW([p], lr=1.0, **options)
        p.grad = torch.ones_like(p)
        opt.step()
        return {name: (t.shape, t.dtype, t.stride()) for name, t in opt.state[p].items()}

    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"x_ref_every": 8}, {"state_dtype": "param"}):
            wanted = described(dtype, **options)
            with FakeTensorMode():
                assert described(dtype, **options) == wanted
