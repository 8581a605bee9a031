"""On a device without float64, as Apple's, the reference trains; see support/without_float64.py."""

import copy
import functools

import pytest
import torch
from support.without_float64 import TYPE, device

from mechanic_fused import (
    MechanicAdamW,
    MechanicLion,
    MechanicMuon,
    MechanicSGD,
    mechanize,
    muon_groups,
    plan,
)
from mechanic_fused.backends import layout

STEPS = 6
RADAM = mechanize(torch.optim.RAdam)


def muon(net, **options):
    return MechanicMuon(muon_groups(net), **options)


def by_group(net, **options):
    groups = [{"params": [p]} for p in net.parameters()]
    return MechanicAdamW(groups, scale_per="group", **options)


def of(cls, **options):
    return lambda net, **more: cls(net.parameters(), **options, **more)


CASES = {
    "adamw": of(MechanicAdamW, weight_decay=0.1),
    "sgd": of(MechanicSGD, momentum=0.9),
    "lion": of(MechanicLion),
    "muon": muon,
    "16 bits": of(MechanicAdamW, optim_bits=16),
    "8 bits": of(MechanicAdamW, optim_bits=8),
    "x_ref in part": of(MechanicAdamW, x_ref_every=8),
    "clipped": of(MechanicAdamW, max_grad_norm=1.0),
    "a scale per group": by_group,
    "fallback": of(RADAM),
    "optax": of(MechanicAdamW, variant="optax"),
    "pytorch": of(MechanicAdamW, variant="pytorch", s_init=1e-3),
    "bfloat16 delta": of(MechanicAdamW, variant="annealed", delta_dtype=torch.bfloat16),
    "exact fallback": of(RADAM, variant="annealed", s_init=1e-2),
}


@pytest.fixture
def lacking(monkeypatch):
    """The stand-in is known to have no float64; its weights have no storage to be checked."""
    monkeypatch.setattr(plan, "check_weights", lambda weights: None)
    monkeypatch.setattr(layout, "WITHOUT_FLOAT64", {TYPE})


def train(make, place, dtype=torch.float32, resumes=False, found_inf=None):
    """Return the weights and S after STEPS steps on gradients that do not depend on them."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.Linear(96, 3)).to(dtype)
    signs = [p.detach().sign().float() for p in net.parameters()]
    for layer in net:
        layer.weight, layer.bias = (
            torch.nn.Parameter(p.detach().clone().to(place)) for p in (layer.weight, layer.bias)
        )
    opt = make(net, lr=1.0, backend="reference")
    for t in range(STEPS):
        if resumes and t == STEPS // 2:
            saved = opt.state_dict()
            opt = make(net, lr=1.0, backend="reference")
            opt.load_state_dict(saved)
        generator = torch.Generator().manual_seed(t)
        for p, sign in zip(net.parameters(), signs, strict=True):
            g = torch.randn(p.shape, generator=generator) + sign
            p.grad = g.to(dtype).to(place)
        if found_inf is not None:
            opt.found_inf = torch.tensor(found_inf).to(place)
            opt.grad_scale = torch.tensor(1.0).to(place)
        opt.step(loss=torch.tensor(2.0).to(place))
    assert opt.grad_norm.item() > 0 and opt.learned_lr()[0] > 0
    return [p.detach().cpu().float() for p in net.parameters()], opt.scale


def assert_alike(found, expected):
    """The same up to the rounding of sums in float32: S by 4 ulps of it, weights by 8."""
    torch.testing.assert_close(found[1], expected[1], rtol=4 * 2**-23, atol=0)
    for x, y in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=8 * 2**-23)


def tensor_lr(net, **options):
    """An lr that is a tensor on the weights' device, recorded."""
    place = next(net.parameters()).device
    opt = MechanicAdamW(net.parameters(), **{**options, "lr": torch.tensor(1.0).to(place)})
    opt.record(every=1)
    return opt


CASES |= {
    "tensor lr": tensor_lr,
    "exact, tensor lr": functools.partial(tensor_lr, variant="annealed", s_init=1e-3),
}


@pytest.mark.parametrize("case", CASES)
def test_it_learns_what_the_cpu_learns(lacking, case):
    with device() as place:
        assert_alike(train(CASES[case], place), train(CASES[case], "cpu"))


def test_weights_of_16_bits_keep_their_low_bits_there(lacking):
    with device() as place:
        found, expected = (
            train(CASES["adamw"], where, torch.bfloat16, resumes=True) for where in (place, "cpu")
        )
    torch.testing.assert_close(found[1], expected[1], rtol=4 * 2**-23, atol=0)
    differ = [(x != y).float().mean() for x, y in zip(found[0], expected[0], strict=True)]
    assert max(differ) < 0.01  # where a last bit of S has moved a weight across a rounding


@pytest.mark.parametrize("case", ["adamw", "8 bits", "fallback", "optax"])
def test_a_run_resumes_there_to_the_bit(lacking, case):
    with device() as place:
        found, expected = (train(CASES[case], place, resumes=resumes) for resumes in (True, False))
    assert torch.equal(found[1], expected[1])
    assert all(torch.equal(x, y) for x, y in zip(found[0], expected[0], strict=True))


def test_the_stand_in_refuses_float64(lacking, monkeypatch):
    """Or the tests above would show nothing."""
    monkeypatch.setattr(layout, "WITHOUT_FLOAT64", set())
    with device() as place, pytest.raises(TypeError, match="no float64"):
        train(CASES["adamw"], place)


def test_a_step_that_ranks_share_compares_their_scales(lacking, monkeypatch):
    """On one rank: the sums, S and found_inf are reduced, as GradScaler's is here."""
    monkeypatch.setattr(plan, "SAME_EVERY", 2)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group = {"reduce_group": torch.distributed.group.WORLD}
        with device() as place:
            found = train(of(MechanicAdamW, **group), place, found_inf=0.0)
        assert_alike(found, train(of(MechanicAdamW), "cpu"))
    finally:
        torch.distributed.destroy_process_group()


def test_a_checkpoint_in_float64_is_loaded_in_float32(lacking):
    with device() as place:
        p = torch.nn.Parameter(torch.ones(4).to(place))
        opt = MechanicAdamW([p], lr=1.0)
        p.grad = torch.ones(4).to(place)
        opt.step()
        saved = copy.deepcopy(opt.state_dict())
        saved["state"][0] = {
            name: value.cpu().double() if value.dim() else value
            for name, value in opt.state_dict()["state"][0].items()
        }
        opt.load_state_dict(saved)
        opt.step()
        assert opt.state[p]["exp_avg"].dtype is torch.float32
