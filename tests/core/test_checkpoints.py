"""Runs saved or copied, by whatever means, go on to the bit."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import cases, checkpoint_runs
from support.cases import (
    FEW,
    RUNNING,
    SCALE_PER,
    STEPS,
    WIDE,
    Training,
    assert_same,
    make_weights,
    values,
)
from support.checkpoint_runs import RUNS
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mechanic_fused import MechanicAdamW, mechanize

# In a fresh process


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Folder with each run's checkpoint and what a fresh process made of it; uninterrupted runs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = {}
    torch.set_num_threads(1)
    for name, make in RUNS.items():
        run = make().run()
        torch.save(run.saved(), folder / f"{name}.pt")
        whole[name] = run.run().saved()
    command = [sys.executable, "-W", "error", checkpoint_runs.__file__, folder]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder, whole


@pytest.mark.parametrize("name", RUNS)
def test_a_fresh_process_goes_on_to_the_bit(resumed, name):
    folder, whole = resumed
    found = torch.load(folder / f"{name} resumed.pt", weights_only=True)
    assert_same(found, whole[name])
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    assert cases.differs(found["weights"], saved["weights"])


@pytest.mark.parametrize("name", ["adamw", "adamw bfloat16", "adamw float64", "adamw narrow state"])
def test_dtypes_are_those_that_were_saved(resumed, name):
    folder, _ = resumed
    saved = torch.load(folder / f"{name} resumed.pt", weights_only=True)
    dtype = saved["weights"][0].dtype
    kept = dtype if name == "adamw narrow state" else WIDE[dtype]
    for state in saved["optimizer"]["state"].values():
        assert state["x_ref"].dtype is dtype
        assert state["delta"].dtype is WIDE[dtype]
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is kept
        assert state["step"].dtype is torch.float32
    assert saved["optimizer"]["param_groups"][0]["mechanic_state"].dtype is torch.float64


def test_a_checkpoint_holds_only_tensors_and_plain_values():
    run = RUNS["added group, scale_per=group"]().run()
    for path, leaf in cases.leaves(run.opt.state_dict()):
        assert type(leaf) in (torch.Tensor, float, int, bool, str, type(None)), path


# In the same process


@pytest.mark.parametrize("order", ["weights first", "optimizer first"])
@pytest.mark.parametrize("dtype", cases.WIDTHS, ids=str)
def test_weights_and_optimizer_may_be_loaded_in_either_order(train, dtype, order):
    model, other = cases.SmallNet().to(dtype), cases.SmallNet(seed=1).to(dtype)
    one, fresh = (train(params=net.parameters()) for net in (model, other))
    one.run()
    saved = copy.deepcopy([model.state_dict(), one.opt.state_dict()])
    if order == "weights first":
        other.load_state_dict(saved[0])
        fresh.opt.load_state_dict(saved[1])
    else:
        fresh.opt.load_state_dict(state_dict=saved[1])
        other.load_state_dict(saved[0])
    fresh.t = one.t
    assert_same(fresh.run().snapshot(), one.run().snapshot())


@pytest.mark.parametrize("scale_per", SCALE_PER)
def test_a_run_may_be_rolled_back(train, scale_per):
    """Loaded into the optimizer that has stepped on since."""
    one = train(scale_per=scale_per).run()
    saved = one.snapshot()
    expected = one.run(FEW).snapshot()
    one.load({**saved, "schedule": {}}, STEPS)
    assert_same(one.snapshot(), saved)
    assert_same(one.run(FEW).snapshot(), expected)


def test_a_round_trip_before_the_first_step_changes_nothing(train):
    """accelerate does one when it prepares an optimizer."""
    one = train()
    one.opt.load_state_dict(one.opt.state_dict())
    assert_same(one.run().snapshot(), train().run().snapshot())


def test_loading_ties_no_two_optimizers_together(train):
    one, other = train().run(FEW), train()
    saved = one.opt.state_dict()
    before = copy.deepcopy(saved)
    other.opt.load_state_dict(saved)
    other.run(FEW)
    assert_same(before, saved, one.opt.state_dict())


def test_all_groups_share_one_tensor_of_the_tuner_after_a_load(train):
    one = train(groups=lambda params: [{"params": params[:1]}, {"params": params[1:]}]).run(FEW)
    one.opt.load_state_dict(copy.deepcopy(one.opt.state_dict()))
    one.run(1)
    assert one.group["mechanic_state"] is one.opt.param_groups[1]["mechanic_state"]


def test_a_checkpoint_moves_between_implementations(train):
    """Whoever has made it, and to their rounding the next steps are the same too."""
    one = Training("reference", dtype=torch.float64).run()
    saved = one.snapshot()
    other = train(seed=1, dtype=torch.float64).load(copy.deepcopy({**saved, "schedule": {}}), STEPS)
    assert_same(other.snapshot(), saved)
    cases.assert_near(other.run(FEW).x, one.run(FEW).x, STEPS * cases.SUM_RTOL)


def test_load_hooks_of_the_user_run_once_and_are_obeyed(train):
    one = train().run(FEW)
    saved = copy.deepcopy(one.opt.state_dict())
    calls = []

    def rewrite(_, state_dict):
        calls.append("pre")
        rewritten = copy.deepcopy(state_dict)
        rewritten["state"][0]["delta"].fill_(0.5)
        return rewritten

    def look(loaded):
        calls.append("post")
        assert (loaded.state[one.params[0]]["delta"] == 0.5).all()

    one.opt.register_load_state_dict_pre_hook(rewrite)
    one.opt.register_load_state_dict_post_hook(look)
    one.opt.load_state_dict(saved)
    assert calls == ["pre", "post"]
    assert (one.states("delta")[0] == 0.5).all()


@pytest.mark.parametrize("steps", [0, FEW])
def test_a_checkpoint_of_other_tuner_betas_brings_its_own(train, steps):
    """As torch does with every option of a group: what was saved prevails."""
    one = train(tuner_betas=(0.9, 0.99)).run(FEW)
    other = train(seed=1).run(steps).load(copy.deepcopy(one.saved()), FEW)
    assert_same(other.opt.scale, one.opt.scale)
    assert_same(other.run(FEW).x, one.run(FEW).x)


def test_a_checkpoint_of_another_layout_is_laid_out_anew(train):
    one = train(shapes=[(4, 6, 3, 5)]).run(FEW)
    twin = torch.nn.Parameter(one.x[0].clone(memory_format=torch.channels_last))
    assert twin.stride() != one.params[0].stride()
    other = train(params=[twin]).load(copy.deepcopy(one.saved()), FEW)
    # S differs in the order of its sums, so x may round otherwise.
    tolerance = STEPS * torch.finfo(twin.dtype).eps
    actual, expected = other.run(FEW).x, one.run(FEW).x
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_checkpoint_of_other_scales_is_refused_and_nothing_changes():
    one = Training(MechanicAdamW).run(FEW)
    other = Training(MechanicAdamW, scale_per="parameter").run(FEW)
    before = other.snapshot()
    with pytest.raises(ValueError, match=r"scale_per='parameter': expected 3 scales .* got 1"):
        other.opt.load_state_dict(one.opt.state_dict())
    assert_same(other.snapshot(), before)


def test_a_log_tuner_of_other_columns_is_refused_and_nothing_changes(train):
    one = train(variant=RUNNING, s_init=None).run(FEW)
    before, saved = one.snapshot(), one.opt.state_dict()
    for group in saved["param_groups"]:
        group["mechanic_state"] = group["mechanic_state"][:, :-1]
    with pytest.raises(ValueError, match=r"expected the shape \(scales, 16\), got \(1, 15\)"):
        one.opt.load_state_dict(saved)
    assert_same(one.snapshot(), before)


def test_a_description_in_place_of_the_state_is_refused():
    """What torch hands to all ranks but the first where FSDP1 loads with broadcast_from_rank0."""
    opt = MechanicAdamW(make_weights())
    saved = opt.state_dict()
    saved["param_groups"][0]["mechanic_state"] = (torch.Size([1, 26]), torch.float64)
    with pytest.raises(ValueError, match="must be a tensor, got a tuple"):
        opt.load_state_dict(saved)


# torch.distributed.checkpoint, in a single process

MAKERS = {
    "fused": MechanicAdamW,
    "fallback": mechanize(cases.PlainAdamW),
    "radam": cases.RADAM,
    "scale_per=parameter": mechanize(torch.optim.AdamW, scale_per="parameter"),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("maker", MAKERS)
def test_a_distributed_checkpoint_goes_on_to_the_bit(tmp_path, maker):
    nets = [cases.SmallNet(), cases.SmallNet(seed=1)]
    opts = [MAKERS[maker](net.parameters(), **cases.QUICK) for net in nets]
    cases.train_net(nets[0], opts[0])
    weights, state = get_state_dict(nets[0], opts[0])
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)

    before = values(nets[1].parameters())
    weights, state = get_state_dict(nets[1], opts[1])
    assert_same(values(nets[1].parameters()), before)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(*nets[1:], *opts[1:], model_state_dict=weights, optim_state_dict=state)
    for net, opt in zip(nets, opts, strict=True):
        cases.train_net(net, opt, FEW, first=STEPS)
    assert_same(*([values(net.parameters()) for net in nets]))
    assert_same(*(opt.scale for opt in opts))


# Copies

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda each: pickle.loads(pickle.dumps(each))}


def torch_steps_its_own_copy():
    """Its check of graph captures asks copies for an option that Adafactor lacks."""
    opt = copy.deepcopy(torch.optim.Adafactor(make_weights()))
    try:
        opt.step()
    except KeyError:
        return False
    return True


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", RUNS)
def test_a_copy_goes_on_as_the_original_and_apart_from_it(name, how):
    run = RUNS[name]().run()
    run.schedule = None  # torch's own schedulers cannot all be copied
    twin = COPIES[how](run)
    assert type(twin.opt) is type(run.opt)
    assert twin.opt.implementation == run.opt.implementation
    assert all(p is not q for p, q in zip(run.params, twin.params, strict=True))
    before = run.snapshot()
    try:
        twin.run(FEW)
    except KeyError as error:
        if name == "adafactor" and str(error) == "'capturable'" and not torch_steps_its_own_copy():
            pytest.skip("torch's own Adafactor does not step in a copy where there is a GPU")
        raise
    assert_same(run.snapshot(), before)
    assert_same(twin.snapshot(), run.run(FEW).snapshot())


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_optimizer_that_has_not_stepped_goes_on_alike(train, how):
    one = train(scale_per="group")
    twin = COPIES[how](one)
    assert_same(one.run(FEW).snapshot(), twin.run(FEW).snapshot())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [*cases.FUSED.values(), *cases.FALLBACK.values(), cases.RADAM])
def test_a_copy_keeps_its_options(make, how):
    opt = make(make_weights(), s_decay=0.5, scale_per="parameter", variant="paper", lr=0.25)
    twin = COPIES[how](opt)
    assert type(twin) is make
    assert_same(twin.state_dict(), opt.state_dict())
    twin.add_param_group({"params": make_weights(seed=1)})
    assert twin.param_groups[1]["s_decay"] == 0.5
    assert_same(twin.scale, opt.scale.new_zeros(6))


class Mine(MechanicAdamW):
    """A user's own subclass, at module level as pickle wants it."""


class MineToo(mechanize(torch.optim.RAdam)):
    """The same of a class that mechanize() made."""


def test_the_class_itself_can_be_pickled_for_a_worker_that_is_spawned():
    made = mechanize(torch.optim.RAdam, s_init=1e-3)
    for cls in (made, MineToo, MechanicAdamW):
        assert pickle.loads(pickle.dumps(cls)) is cls


def test_a_subclass_of_the_user_can_be_pickled():
    one = Training(Mine).run(FEW)
    twin = pickle.loads(pickle.dumps(one))
    assert type(twin.opt) is Mine
    assert_same(twin.run(FEW).x, one.run(FEW).x)
