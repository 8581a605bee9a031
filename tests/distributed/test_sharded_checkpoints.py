"""What torch.distributed.checkpoint saves under one layout continues under another."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import sharding
from support.sharding import LAYOUTS, Run, assert_agrees
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mechanic_fused.checkpoints import RenamingLoadPlanner
from mechanic_fused.options import RENAMED_GROUP_KEYS

HALF = 6
FORMS = {
    "sharded": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "broadcast": {"full_state_dict": True, "broadcast_from_rank0": True},
}
PLAIN = ("full", "broadcast")
"""The forms that one torch.save of rank 0 holds."""

RELEASE_0_1 = {new: old for old, new in RENAMED_GROUP_KEYS.items()}


def state_of(run, options):
    return {
        "net": get_model_state_dict(run.net, options=options),
        "opt": get_optimizer_state_dict(run.net, run.opt, options=options),
    }


def renamed(state):
    """Return the state with the names that 0.1 gave to the entries of a param group."""
    groups = [
        {RELEASE_0_1.get(name, name): value for name, value in group.items()}
        for group in state["opt"]["param_groups"]
    ]
    return {**state, "opt": {**state["opt"], "param_groups": groups}}


def save(folder, form, layout="fsdp2", as_0_1=False, **options):
    """Train to the middle, and save."""
    run = Run(layout, **options)
    run.train(0, HALF)
    state = state_of(run, StateDictOptions(**{**FORMS[form], "broadcast_from_rank0": False}))
    if form not in PLAIN:
        dcp.save(renamed(state) if as_0_1 else state, checkpoint_id=folder)
    elif distributed.get_rank() == 0:
        torch.save(state, f"{folder}/state.pt")
    distributed.barrier()


def resume(folder, form, layout="fsdp2", planner=None, **options):
    """Load what ``save`` has left and train to the end."""
    run, chosen = Run(layout, **options), StateDictOptions(**FORMS[form])
    if form in PLAIN:
        # With a broadcast only rank 0 reads the file.
        reads = form != "broadcast" or distributed.get_rank() == 0
        state = torch.load(f"{folder}/state.pt") if reads else {"net": {}, "opt": {}}
    else:
        state = state_of(run, chosen)
        dcp.load(state, checkpoint_id=folder, planner=planner)
    set_model_state_dict(run.net, state["net"], options=chosen)
    set_optimizer_state_dict(run.net, run.opt, state["opt"], options=chosen)
    run.train(HALF, HALF)
    entries = run.opt.state[max(run.net.parameters(), key=lambda p: p.numel())]
    return {**run.result(), "dtypes": {name: value.dtype for name, value in entries.items()}}


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """saved(form) → the folder in which two ranks of FSDP2 have saved in this form."""
    folders = {}

    def folder(form):
        if form not in folders:
            folders[form] = str(tmp_path_factory.mktemp(form))
            ranks(2).run(save, folders[form], form)
        return folders[form]

    return folder


@pytest.fixture(scope="module")
def expected():
    return sharding.run("single", 2 * HALF)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "layout", ["fsdp2", "hsdp", pytest.param("fsdp2 x tp", marks=pytest.mark.slow)]
)
def test_a_run_of_two_ranks_resumes_under_another_layout(ranks, saved, expected, layout, form):
    results = ranks(LAYOUTS[layout].ranks).run(resume, saved(form), form, layout)
    assert_agrees(results, expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["sharded", "flattened", "full"])
def test_a_run_of_two_ranks_resumes_in_one_process(saved, expected, form):
    assert_agrees([resume(saved(form), form, "single")], expected)


@pytest.mark.parametrize("base", ["adamw", "sgd", "lion", "radam"])
def test_a_run_resumes_under_its_own_layout_to_the_bit(ranks, tmp_path, base):
    ranks(2).run(save, str(tmp_path), "sharded", base=base)
    resumed = ranks(2).run(resume, str(tmp_path), "sharded", base=base)
    through = ranks(2).run(sharding.run, "fsdp2", 2 * HALF, base=base)
    assert_agrees(resumed, through[0], tolerance=0.0)


def test_a_checkpoint_of_0_1_resumes_by_the_renaming_planner(ranks, tmp_path, expected):
    ranks(2).run(save, str(tmp_path), "sharded", as_0_1=True)
    results = ranks(4).run(resume, str(tmp_path), "sharded", "hsdp", RenamingLoadPlanner())
    assert_agrees(results, expected)


def test_state_beside_bfloat16_weights_stays_float32(ranks, tmp_path):
    """Loaders cast state to the weight's dtype: a bfloat16 Δ would forget small updates."""
    options = {"dtype": torch.bfloat16}
    ranks(2).run(save, str(tmp_path), "sharded", **options)
    results = ranks(4).run(resume, str(tmp_path), "sharded", "hsdp", **options)
    dtypes = results[0]["dtypes"]
    assert dtypes["delta"] is dtypes["exp_avg"] is torch.float32
    assert dtypes["x_ref"] is torch.bfloat16
    # A weight may round to the other side: one ulp of bfloat16 at 4.
    assert_agrees(results, sharding.run("single", 2 * HALF, **options), tolerance=2**-6)


SHORT = {
    "low bits": {"dtype": torch.bfloat16, "variant": "running"},
    "codes of Δ": {"variant": "annealed", "optim_bits": 8, "width": 128},
}
"""Integers of 16 bits, which no process group gathers."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", SHORT)
def test_integers_of_16_bits_are_saved_in_every_form(ranks, tmp_path, form, what):
    options = SHORT[what]
    ranks(2).run(save, str(tmp_path), form, **options)
    resumed = ranks(2).run(resume, str(tmp_path), form, **options)
    assert torch.int16 in resumed[0].pop("dtypes").values()
    through = ranks(2).run(sharding.run, "fsdp2", 2 * HALF, **options)
    assert_agrees(resumed, through[0], tolerance=0.0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("what", SHORT)
def test_integers_of_16_bits_go_from_one_process_to_two_ranks(ranks, tmp_path, what):
    """Saved in 16 bits and loaded into 32 by torch, which converts them."""
    options = SHORT[what]
    alone = Run("single", **options)
    alone.train(0, HALF)
    dcp.save(state_of(alone, StateDictOptions()), checkpoint_id=str(tmp_path))
    results = ranks(2).run(resume, str(tmp_path), "sharded", **options)
    alone.train(HALF, HALF)
    assert_agrees(results, alone.result(), tolerance=2**-6)


@pytest.mark.parametrize("base", ["adamw", "radam"])
@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2 x tp"])
def test_reading_the_state_before_the_first_step_changes_nothing(ranks, layout, base):
    size = LAYOUTS[layout].ranks
    results = ranks(size).run(sharding.run, layout, base=base, reads_state=True)
    assert_agrees(results, sharding.run("single", base=base))
