"""Checkpoints: saved, loaded and gone on with, to the bit, in this process and in a fresh one."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
import torch.distributed.checkpoint as dcp
from cases import (
    FEW,
    QUICK,
    STEPS,
    WIDE,
    PlainAdamW,
    SmallNet,
    assert_same,
    build,
    differs,
    leaves,
    make_weights,
    run,
    snapshot,
    train_net,
    values,
)
from runs import RADAM, RUNS
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mechanic_fused import MechanicAdamW, mechanize


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Folder with each run's checkpoint and what a fresh process made of it; uninterrupted runs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = {}
    torch.set_num_threads(1)
    for name, make in RUNS.items():
        run = make()
        run.advance(0, STEPS)
        torch.save(run.saved(), folder / f"{name}.pt")
        run.advance(STEPS, STEPS)
        whole[name] = run.saved()
    tests, root = Path(__file__).parent, Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(root), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-W", "error", runs.__file__, folder],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    return folder, whole


@pytest.mark.parametrize("name", RUNS)
def test_a_fresh_process_goes_on_to_the_bit(resumed, name):
    folder, whole = resumed
    found = torch.load(folder / f"{name} resumed.pt", weights_only=True)
    assert_same(found, whole[name])
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    assert differs(found["weights"], saved["weights"])


@pytest.mark.parametrize("name", ["adamw", "adamw bfloat16", "adamw float64", "adamw narrow"])
def test_dtypes_are_those_that_were_saved(resumed, name):
    folder, _ = resumed
    saved = torch.load(folder / f"{name} resumed.pt", weights_only=True)
    dtype = saved["weights"][0].dtype
    kept = dtype if name == "adamw narrow" else WIDE[dtype]
    for state in saved["optimizer"]["state"].values():
        assert state["x_ref"].dtype is dtype
        assert state["delta"].dtype is WIDE[dtype]
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is kept
        assert state["step"].dtype is torch.float32
    assert saved["optimizer"]["param_groups"][0]["mechanic"].dtype is torch.float64


def test_a_checkpoint_holds_only_tensors_and_plain_values():
    run = RUNS["added group, scale=group"]()
    run.advance(0, FEW)
    for path, leaf in leaves(run.opt.state_dict()):
        assert type(leaf) in (torch.Tensor, float, int, bool, str, type(None)), path


# In one process


@pytest.mark.parametrize("order", ["weights first", "optimizer first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_optimizer_may_be_loaded_in_either_order(road, dtype, order):
    model = SmallNet().to(dtype)
    opt = build(road, "adamw", model.parameters(), **QUICK)
    run(opt, list(model.parameters()), STEPS)
    saved = copy.deepcopy([model.state_dict(), opt.state_dict()])
    run(opt, list(model.parameters()), STEPS, first=STEPS)

    other = SmallNet(seed=1).to(dtype)
    fresh = build(road, "adamw", other.parameters(), **QUICK)
    if order == "weights first":
        other.load_state_dict(saved[0])
        fresh.load_state_dict(saved[1])
    else:
        fresh.load_state_dict(state_dict=saved[1])
        other.load_state_dict(saved[0])
    run(fresh, list(other.parameters()), STEPS, first=STEPS)
    assert_same(snapshot(fresh), snapshot(opt))


@pytest.mark.parametrize("scale", ["global", "group", "parameter"])
def test_a_run_may_be_rolled_back(road, scale):
    """Loaded into the optimizer that has stepped on since."""
    params = make_weights()
    opt = build(road, "adamw", params, scale=scale, **QUICK)
    run(opt, params, STEPS)
    saved = snapshot(opt)
    run(opt, params, FEW, first=STEPS)
    expected = snapshot(opt)
    with torch.no_grad():
        for p, x in zip(params, saved["weights"], strict=True):
            p.copy_(x)
    opt.load_state_dict(saved["optimizer"])
    assert_same(snapshot(opt), saved)
    run(opt, params, FEW, first=STEPS)
    assert_same(snapshot(opt), expected)


def test_a_round_trip_before_the_first_step_changes_nothing(road):
    """accelerate does one when it prepares an optimizer."""
    params, straight = make_weights(), make_weights()
    opt = build(road, "adamw", params, **QUICK)
    opt.load_state_dict(opt.state_dict())
    run(opt, params)
    twin = build(road, "adamw", straight, **QUICK)
    run(twin, straight)
    assert_same(snapshot(opt), snapshot(twin))


def test_loading_ties_no_two_optimizers_together(road):
    params, others = make_weights(), make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    other = build(road, "adamw", others, **QUICK)
    saved = opt.state_dict()
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    run(other, others, FEW, first=FEW)
    assert_same(saved, before)
    assert_same(opt.state_dict(), before)


def test_one_tensor_of_the_tuner_is_shared_by_all_groups_after_a_load(road):
    params = make_weights()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt = build(road, "adamw", groups, **QUICK)
    run(opt, params, FEW)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(opt, params, 1, first=FEW)
    assert opt.param_groups[0]["mechanic"] is opt.param_groups[1]["mechanic"]


def test_a_checkpoint_moves_between_backends_and_roads():
    """The state is the same whoever has made it, and the next step too, to the roads' rounding."""
    params = make_weights(dtype=torch.float64)
    opt = build("reference", "adamw", params, **QUICK)
    run(opt, params)
    saved = snapshot(opt)
    for road in ("cpp", "general"):
        others = [torch.nn.Parameter(x.clone()) for x in saved["weights"]]
        other = build(road, "adamw", others, **QUICK)
        other.load_state_dict(copy.deepcopy(saved["optimizer"]))
        assert_same(snapshot(other), saved)


def test_the_users_load_hooks_run_once_and_are_obeyed(road):
    params = make_weights()
    opt = build(road, "adamw", params, **QUICK)
    run(opt, params, FEW)
    saved = copy.deepcopy(opt.state_dict())
    calls = []

    def rewrite(_, state_dict):
        calls.append("pre")
        rewritten = copy.deepcopy(state_dict)
        rewritten["state"][0]["delta"].fill_(0.5)
        return rewritten

    def look(loaded):
        calls.append("post")
        assert (loaded.state[params[0]]["delta"] == 0.5).all()

    opt.register_load_state_dict_pre_hook(rewrite)
    opt.register_load_state_dict_post_hook(look)
    opt.load_state_dict(saved)
    assert calls == ["pre", "post"]
    assert (opt.state[params[0]]["delta"] == 0.5).all()


def test_a_checkpoint_of_another_scale_kind_is_refused_and_nothing_changes():
    params, others = make_weights(), make_weights()
    opt = MechanicAdamW(params, **QUICK)
    run(opt, params, FEW)
    other = MechanicAdamW(others, scale="parameter", **QUICK)
    run(other, others, FEW)
    before = snapshot(other)
    with pytest.raises(ValueError, match="scale"):
        other.load_state_dict(opt.state_dict())
    assert_same(snapshot(other), before)


@pytest.mark.parametrize("steps", [0, FEW])
def test_a_checkpoint_of_other_tuner_betas_brings_its_own(road, steps):
    """As torch does with every option of a group: what was saved wins."""
    params, others = make_weights(), make_weights(seed=1)
    opt = build(road, "adamw", params, tuner_betas=(0.9, 0.99), **QUICK)
    run(opt, params, FEW)
    other = build(road, "adamw", others, **QUICK)
    run(other, others, steps)
    with torch.no_grad():
        for p, x in zip(others, params, strict=True):
            p.copy_(x)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(other.scale, opt.scale)
    for optimizer, weights in ((opt, params), (other, others)):
        run(optimizer, weights, FEW, first=FEW)
    assert_same(values(others), values(params))


def test_a_checkpoint_of_another_layout_is_laid_out_anew(road):
    (p,) = make_weights([(4, 6, 3, 5)])
    opt = build(road, "adamw", [p], **QUICK)
    run(opt, [p], FEW)
    saved = snapshot(opt)["optimizer"]
    twin = torch.nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
    assert twin.stride() != p.stride()
    other = build(road, "adamw", [twin], **QUICK)
    other.load_state_dict(saved)
    run(opt, [p], FEW, first=FEW)
    run(other, [twin], FEW, first=FEW)
    # S differs in the order of its sums, so x may round otherwise.
    eps = torch.finfo(p.dtype).eps
    torch.testing.assert_close(twin, p, rtol=STEPS * eps, atol=STEPS * eps)


# torch.distributed.checkpoint, in a single process

DCP_MAKERS = {
    "fused": MechanicAdamW,
    "general": mechanize(PlainAdamW),
    "radam": RADAM,
    "scale=parameter": lambda params, **options: MechanicAdamW(
        params, scale="parameter", **options
    ),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("maker", DCP_MAKERS)
def test_distributed_checkpoint_goes_on_to_the_bit(tmp_path, maker):
    model = SmallNet()
    opt = DCP_MAKERS[maker](model.parameters(), **QUICK)
    train_net(model, opt, STEPS)
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    train_net(model, opt, FEW, first=STEPS)

    other = SmallNet(seed=1)
    fresh = DCP_MAKERS[maker](other.parameters(), **QUICK)
    before = values(other.parameters())
    weights, state = get_state_dict(other, fresh)
    assert_same(values(other.parameters()), before)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        other, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    train_net(other, fresh, FEW, first=STEPS)
    assert_same(values(other.parameters()), values(model.parameters()))
    assert_same(fresh.scale, opt.scale)


def test_a_description_in_place_of_the_state_is_refused():
    """What torch hands to all ranks but the first where FSDP1 loads with broadcast_from_rank0."""
    opt = MechanicAdamW(make_weights())
    saved = opt.state_dict()
    saved["param_groups"][0]["mechanic"] = (torch.Size([1, 26]), torch.float64)
    with pytest.raises(ValueError, match="must be a tensor, got a tuple"):
        opt.load_state_dict(saved)
