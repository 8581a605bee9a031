"""Stacks that are imitated: what torchtitan and DeepSpeed do to the optimizers that they hold."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import assert_same, differs, values
from tiny import TinyModel, batch

from mechanic_fused import MechanicAdamW

STEPS, SAVED_AT = 8, 4
START, GROUP = {"s_init": 0.01}, {"lr": 1.0, "weight_decay": 0.1}


def train(model, opt, steps, first=0):
    for t in range(first, first + steps):
        model(**batch(t))["loss"].backward()
        opt.step()
        opt.zero_grad()


# torchtitan 0.3: named groups, a dry step, a flat state dict by the weights' names


def named_groups(model):
    """With and without decay; the implementation stands in every group."""
    groups = []
    for decays in (True, False):
        named = [(n, p) for n, p in model.named_parameters() if (p.ndim > 1) is decays]
        names, params = zip(*named, strict=True)
        options = {**GROUP, "fused": True, "foreach": False}
        if not decays:
            options["weight_decay"] = 0.0
        groups.append({"params": list(params), "param_names": list(names), **options})
    return groups


def make_state(opt):
    """The dry step by which a container gets entries to read or to fill."""
    if opt.state:
        return
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    opt.step(closure=None)
    for group, lr in zip(opt.param_groups, rates, strict=True):
        group["lr"] = lr
    opt.zero_grad(set_to_none=True)


def flat_state(opt):
    make_state(opt)
    flat = {}
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            for key, value in opt.state[p].items():
                flat[f"state.{name}.{key}"] = value
            for key, value in group.items():
                if key not in ("params", "param_names"):
                    flat[f"param_groups.{name}.{key}"] = value
    return flat


def load_flat_state(opt, flat):
    """The options of a group are those of its first weight."""
    make_state(opt)
    state, groups = {}, []
    for group in opt.param_groups:
        names = group["param_names"]
        ids = range(len(state), len(state) + len(names))
        for i, name, p in zip(ids, names, group["params"], strict=True):
            state[i] = {key: flat[f"state.{name}.{key}"] for key in opt.state[p]}
        keys = group.keys() - {"params", "param_names"}
        options = {key: flat[f"param_groups.{names[0]}.{key}"] for key in keys}
        groups.append({"params": list(ids), **options})
    opt.load_state_dict({"state": state, "param_groups": groups})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_flat_state_by_name_goes_on_to_the_bit(tmp_path):
    model = TinyModel()
    opt = MechanicAdamW(named_groups(model), **START)
    train(model, opt, SAVED_AT)
    parts = {"model": model.state_dict(), "optimizer": flat_state(opt)}
    dcp.save(parts, checkpoint_id=tmp_path, no_dist=True)
    train(model, opt, STEPS - SAVED_AT, first=SAVED_AT)

    other = TinyModel(1)
    fresh = MechanicAdamW(named_groups(other), **START)
    parts = {"model": other.state_dict(), "optimizer": flat_state(fresh)}
    dcp.load(parts, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(parts["model"])
    load_flat_state(fresh, parts["optimizer"])
    train(other, fresh, STEPS - SAVED_AT, first=SAVED_AT)
    assert_same(other.state_dict(), model.state_dict())
    assert_same(fresh.state_dict(), opt.state_dict())


def test_reading_the_state_before_the_first_step_changes_no_bit():
    found = []
    for reads in (False, True):
        model = TinyModel()
        opt = MechanicAdamW(named_groups(model), **START)
        if reads:
            before = values(model.parameters())
            assert any(name.endswith(".delta") for name in flat_state(opt))
            assert_same(values(model.parameters()), before)
        train(model, opt, SAVED_AT)
        found.append({"weights": model.state_dict(), "optimizer": opt.state_dict()})
    assert_same(found[1], found[0])
    assert opt.road.startswith("fused")


# DeepSpeed 0.19: flat float32 weights that are lent to the optimizer for a step


def lent_group(opt, flat):
    """ZeRO-1 and ZeRO-2: each group by itself, in a list of its own."""
    groups = opt.param_groups
    for group in groups:
        opt.param_groups = [group]
        opt.step()
    opt.param_groups = groups


def lent_weight(opt, flat):
    """ZeRO-3: the weight is in its group only while it is stepped."""
    opt.param_groups[0]["params"] = [flat]
    opt.step()
    opt.param_groups[0]["params"] = []


def ordinary(opt, flat):
    opt.step()


def flat_run(step):
    """bfloat16 weights that follow a flat float32 one, as a partition of ZeRO on one rank does."""
    model = TinyModel().to(torch.bfloat16)
    weights = list(model.parameters())
    flat = torch.nn.Parameter(torch.cat([p.detach().float().flatten() for p in weights]))
    opt = MechanicAdamW([flat], **START, **GROUP)
    scales = []
    for t in range(STEPS):
        model.zero_grad()
        model(**batch(t))["loss"].backward()
        flat.grad = torch.cat([p.grad.float().flatten() for p in weights])
        step(opt, flat)
        flat.grad = None
        torch.nn.utils.vector_to_parameters(flat.detach().bfloat16(), weights)
        scales.append(opt.scale)
    assert differs(scales[-1], scales[0])
    return [flat.detach(), *scales, dict(opt.state[flat])]


@pytest.mark.parametrize("step", [lent_group, lent_weight])
def test_a_weight_lent_for_a_step_takes_the_ordinary_step(step):
    assert_same(flat_run(step), flat_run(ordinary))
