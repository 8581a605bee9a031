"""The spellings of 0.1 work for one release, with a warning that names the new one."""

import pytest
import torch

from mechanic_fused import MechanicAdamW, mechanize

RENAMED = [
    ({"scale": "global"}, {"scale_per": "model"}),
    ({"scale": "group"}, {"scale_per": "group"}),
    ({"scale": "parameter"}, {"scale_per": "parameter"}),
    ({"narrow_state": True}, {"state_dtype": "param"}),
    ({"narrow_state": False}, {"state_dtype": None}),
    ({"narrow_delta": True}, {"delta_dtype": torch.bfloat16}),
    ({"variant": "scaled"}, {"variant": "annealed"}),
]


def run(make, **options):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (5, 3)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}]
    opt = make(groups, lr=1.0, backend="reference", **options)
    for _ in range(6):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator).bfloat16()
        opt.step()
    return opt, weights


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_an_old_option_gives_the_run_of_the_new_one_and_a_warning(old, new):
    (name,) = new
    with pytest.warns(DeprecationWarning, match=f"use {name}="):
        opt, weights = run(MechanicAdamW, **old)
    twin, others = run(MechanicAdamW, **new)
    assert torch.equal(opt.scale, twin.scale)
    for p, q in zip(weights, others, strict=True):
        assert torch.equal(p, q)
        assert opt.state[p]["exp_avg"].dtype is twin.state[q]["exp_avg"].dtype
        assert opt.state[p]["delta"].dtype is twin.state[q]["delta"].dtype


@pytest.mark.parametrize(("old", "new"), RENAMED[:3] + RENAMED[-1:])
def test_mechanize_takes_the_old_options_too(old, new):
    with pytest.warns(DeprecationWarning, match="use "):
        made = mechanize(torch.optim.RAdam, **old)
    assert made is mechanize(torch.optim.RAdam, **new)


@pytest.mark.parametrize(("old", "new"), RENAMED[:-1])
def test_an_option_cannot_be_given_under_both_names(old, new):
    with pytest.raises(TypeError, match="expected one of them, got both"):
        MechanicAdamW([torch.nn.Parameter(torch.ones(2))], **old, **new)


@pytest.mark.parametrize("name", ["narrow_state", "narrow_delta"])
def test_an_old_flag_must_be_a_bool(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 1"):
        MechanicAdamW([torch.nn.Parameter(torch.ones(2))], **{name: 1})


def test_the_old_name_of_the_implementation_warns():
    opt = MechanicAdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.warns(DeprecationWarning, match=r"use opt\.implementation"):
        assert opt.road == opt.implementation


def test_mechanize_takes_the_tuners_options_under_the_constructors_names():
    made = mechanize(torch.optim.RAdam, tuner_betas=(0.9, 0.99), tuner_eps=1e-6)
    assert made is mechanize(torch.optim.RAdam, betas=(0.9, 0.99), eps=1e-6)
    group = made([torch.nn.Parameter(torch.ones(2))]).param_groups[0]
    assert group["tuner_betas"] == (0.9, 0.99)
    assert group["tuner_eps"] == 1e-6


@pytest.mark.parametrize(
    ("old", "new"),
    [("mechanic", "mechanic_state"), ("rate", "max_peak_lr"), ("learning", "tune_scale")],
)
def test_an_old_entry_of_a_param_group_loads_under_its_new_name(old, new):
    opt, _ = run(MechanicAdamW)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        group[old] = group.pop(new)
    twin, _ = run(MechanicAdamW)
    twin.load_state_dict(saved)
    assert all(new in group and old not in group for group in twin.param_groups)
    assert torch.equal(opt.scale, twin.scale)
