"""Checkpoints: saved, loaded and gone on with, to the bit, in this process and in a fresh one."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import (
    FEW,
    FUSED,
    GENERAL,
    OPTIONS,
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
    set_gradients,
    snapshot,
    train_net,
    values,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD, mechanize

schedulers = torch.optim.lr_scheduler


class Run:
    """A training run that a checkpoint must carry over: weights, an optimizer, perhaps a schedule."""

    def __init__(self, make, dtype=torch.float32, schedule=None, seed=0, **options):
        self.params = make_weights(dtype=dtype, seed=seed)
        self.opt = make(self.params, **QUICK, **options)
        self.schedule = schedule and schedule(self.opt)

    def advance(self, first, steps):
        for t in range(first, first + steps):
            set_gradients(self.params, t)
            self.opt.step()
            if self.schedule:
                self.schedule.step()

    def saved(self):
        return {
            "weights": values(self.params),
            "optimizer": self.opt.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else {},
        }

    def load(self, saved):
        with torch.no_grad():
            for p, x in zip(self.params, saved["weights"], strict=True):
                p.copy_(x)
        self.opt.load_state_dict(saved["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(saved["schedule"])


class AddedGroup(Run):
    """Has a second group from the middle on."""

    def __init__(self, make, fresh=False, seed=0, **options):
        super().__init__(make, seed=seed, **options)
        if fresh:
            self.add()

    def add(self):
        more = make_weights([(7,), (2, 3)], seed=3)
        self.params += more
        self.opt.add_param_group({"params": more, "lr": 0.5})

    def advance(self, first, steps):
        if first == 0:
            super().advance(0, steps // 2)
            self.add()
            first, steps = steps // 2, steps - steps // 2
        super().advance(first, steps)


class Freezing(Run):
    """One weight is frozen, another gets no gradient, and the scale is frozen too."""

    def advance(self, first, steps):
        if first == 0:
            super().advance(0, steps)
            self.opt.freeze_scale()
        self.params[0].requires_grad_(False)
        for t in range(first, first + steps):
            set_gradients(self.params[2:], t)
            self.params[0].grad = self.params[1].grad = None
            self.opt.step()


class EmptyGroup(Run):
    """A group without weights, as trainers make that split off the biases."""

    def __init__(self, make, seed=0, **options):
        self.params = make_weights(seed=seed)
        groups = [{"params": []}, {"params": self.params, "lr": 0.5}]
        self.opt, self.schedule = make(groups, **QUICK, **options), None


def one_cycle(opt):
    return schedulers.OneCycleLR(opt, 2.0, total_steps=2 * STEPS + 1)


def warm_up_and_cosine(opt):
    parts = [schedulers.LinearLR(opt, 0.1, total_iters=4), schedulers.CosineAnnealingLR(opt, STEPS)]
    return schedulers.SequentialLR(opt, parts, [4])


RADAM = mechanize(torch.optim.RAdam)
# Name → how to make the run anew, in whatever process.
RUNS = {
    "adamw": lambda **o: Run(MechanicAdamW, **o),
    "adamw reference": lambda **o: Run(MechanicAdamW, backend="reference", **o),
    "adamw float64": lambda **o: Run(MechanicAdamW, torch.float64, **o),
    "adamw bfloat16": lambda **o: Run(MechanicAdamW, torch.bfloat16, **o),
    "adamw float16": lambda **o: Run(MechanicAdamW, torch.float16, **o),
    "adamw narrow": lambda **o: Run(MechanicAdamW, torch.bfloat16, narrow_state=True, **o),
    "sgd": lambda **o: Run(MechanicSGD, **OPTIONS["sgd"], **o),
    "sgd without momentum": lambda **o: Run(MechanicSGD, lr=0.05, **o),
    "lion bfloat16": lambda **o: Run(MechanicLion, torch.bfloat16, **o),
    "one cycle": lambda **o: Run(MechanicAdamW, schedule=one_cycle, **o),
    "warm-up, cosine": lambda **o: Run(MechanicAdamW, schedule=warm_up_and_cosine, **o),
    "tensor lr": lambda **o: Run(
        MechanicAdamW, lr=torch.tensor(1.0), schedule=warm_up_and_cosine, **o
    ),
    "added group": lambda **o: AddedGroup(MechanicAdamW, **o),
    "added group, scale=group": lambda **o: AddedGroup(MechanicAdamW, scale="group", **o),
    "added group, scale=parameter": lambda **o: AddedGroup(MechanicAdamW, scale="parameter", **o),
    "empty group": lambda **o: EmptyGroup(MechanicAdamW, **o),
    "freezing": lambda **o: Freezing(MechanicAdamW, **o),
    "other tuner": lambda **o: Run(MechanicAdamW, variant="paper", tuner_betas=(0.9, 0.99), **o),
    "general adamw": lambda **o: Run(GENERAL["adamw"], **o),
    "general bfloat16": lambda **o: Run(GENERAL["adamw"], torch.bfloat16, **o),
    "general added group": lambda **o: AddedGroup(GENERAL["adamw"], **o),
    "general freezing": lambda **o: Freezing(GENERAL["adamw"], **o),
    "amsgrad": lambda **o: Run(MechanicAdamW, amsgrad=True, **o),
    "radam": lambda **o: Run(RADAM, schedule=one_cycle, **o),
    "adagrad": lambda **o: Run(mechanize(torch.optim.Adagrad), **o),
    "adafactor": lambda **o: Run(mechanize(torch.optim.Adafactor), **o),
}


def start_anew(name, seed):
    """The run as a fresh process makes it, with weights that only a checkpoint can put right."""
    late = {"fresh": True} if "added group" in name else {}
    return RUNS[name](seed=seed, **late)


def resume_all(folder):
    """What the fresh process does: load each checkpoint of the folder and go on from there."""
    torch.set_num_threads(1)
    for name in RUNS:
        saved = torch.load(folder / f"{name}.pt", weights_only=True)
        run = start_anew(name, seed=1)
        run.load(saved)
        run.advance(STEPS, STEPS)
        torch.save(run.saved(), folder / f"{name} resumed.pt")


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
        [sys.executable, "-W", "error", __file__, folder],
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


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", RUNS)
def test_a_copy_goes_on_as_the_original_and_apart_from_it(name, how):
    run = RUNS[name]()
    run.advance(0, FEW)
    if run.schedule:
        run.schedule = None  # torch's own schedulers cannot all be copied
    if how == "deepcopy":
        twin = copy.deepcopy(run)
    else:
        twin = pickle.loads(pickle.dumps(run))
    assert type(twin.opt) is type(run.opt)
    assert twin.opt.road == run.opt.road
    assert all(p is not q for p, q in zip(run.params, twin.params, strict=True))
    before = snapshot(run.opt)
    twin.advance(FEW, FEW)
    assert_same(snapshot(run.opt), before)
    run.advance(FEW, FEW)
    assert_same(snapshot(twin.opt), snapshot(run.opt))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_an_optimizer_that_has_not_stepped(road, how):
    params = make_weights()
    pair = [params, build(road, "adamw", params, scale="group", **QUICK)]
    others, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    run(pair[1], params, FEW)
    run(other, others, FEW)
    assert_same(snapshot(other), snapshot(pair[1]))


@pytest.mark.parametrize("make", [*FUSED.values(), *GENERAL.values(), RADAM])
def test_a_copy_keeps_its_options(make):
    opt = make(make_weights(), s_decay=0.5, scale="parameter", variant="paper", lr=0.25)
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert type(twin) is make
        assert_same(twin.state_dict(), opt.state_dict())
        twin.add_param_group({"params": make_weights(seed=1)})
        assert twin.param_groups[1]["s_decay"] == 0.5
        assert_same(twin.scale, opt.scale.new_zeros(6))


class Mine(MechanicAdamW):
    """A user's own subclass, at module level as pickle wants it."""


def test_a_users_subclass_pickles():
    params = make_weights()
    opt = Mine(params, **QUICK)
    run(opt, params, FEW)
    others, other = pickle.loads(pickle.dumps((params, opt)))
    assert type(other) is Mine
    run(opt, params, FEW, first=FEW)
    run(other, others, FEW, first=FEW)
    assert_same(values(others), values(params))


def test_a_fused_copy_still_takes_the_grad_scalers_scale():
    opt = MechanicAdamW(make_weights(), fused=True)
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert twin._step_supports_amp_scaling


# torch.distributed.checkpoint, in a single process

DCP_MAKERS = {
    "fused": MechanicAdamW,
    "general": mechanize(PlainAdamW),
    "radam": RADAM,
    "scale=parameter": lambda params, **options: MechanicAdamW(params, scale="parameter", **options),
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


if __name__ == "__main__":
    resume_all(Path(sys.argv[1]))
