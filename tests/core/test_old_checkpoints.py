"""Checkpoints of earlier releases load, and go on to the bit.

support/write_checkpoints.py has written them, with the release that the folder is named after.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import write_checkpoints as written
from support.write_checkpoints import AFTER, BEFORE
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mechanic_fused import tuners
from mechanic_fused.checkpoints import RenamingLoadPlanner

FOLDER = Path(__file__).with_name("checkpoints_0_1")
WRITTEN_WITH = written.load(FOLDER / "written_with.pt.gz")
CASES = written.load(FOLDER / "cases.pt.gz")
TUNERS = written.load(FOLDER / "tuners.pt.gz")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def check(found, expected):
    """Compare to the bit, or where torch or the processor is another, to the rounding of sums."""
    same_machine = written.machine().items() <= WRITTEN_WITH.items()
    narrow = expected["weights"].dtype is torch.bfloat16
    tolerance = 0.0 if same_machine else 2.0**-6 if narrow else 1e-5
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def fill(weights, row):
    with torch.no_grad():
        for p, x in zip(weights, row.split([p.numel() for p in weights]), strict=True):
            p.copy_(x.view(p.shape))


def filled(row):
    weights = written.start_weights(row.dtype)
    fill(weights, row)
    return weights


@pytest.mark.parametrize("how", ["at once", "before the weights", "saved again"])
@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_goes_on(name, how):
    saved = CASES[name]
    state = copy.deepcopy(saved["state_dict"])
    for _ in range(2 if how == "saved again" else 1):
        weights = filled(saved["weights"])
        opt = written.build(saved["spec"], weights)
        if how == "before the weights":
            fill(weights, torch.zeros_like(saved["weights"]))
        opt.load_state_dict(state)
        fill(weights, saved["weights"])
        state = copy.deepcopy(opt.state_dict())
    check(written.walk(opt, weights, BEFORE, AFTER), saved["expected"])


@pytest.mark.parametrize("name", written.PICKLED)
def test_a_pickled_optimizer_goes_on(name):
    opt = written.load(FOLDER / f"pickled_{name}.pt.gz", weights_only=False)
    weights = [p for group in opt.param_groups for p in group["params"]]
    expected = written.load(FOLDER / "pickled_expected.pt.gz")[name]
    check(written.walk(opt, weights, BEFORE, AFTER), expected)


def resumed_from(folder, name):
    """Load a checkpoint of torch.distributed into a fresh model and go on."""
    model = written.dcp_model()
    opt = written.dcp_optimizer(name, model)
    fill([model.weight], torch.zeros(6))
    options = written.dcp_options(name)
    weights, state = get_state_dict(model, opt, options=options)
    loaded = {"model": weights, "optim": state}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True, planner=RenamingLoadPlanner())
    weights, state = loaded.values()
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state, options=options)
    return written.walk(opt, [model.weight], BEFORE, AFTER)


@pytest.mark.parametrize("name", written.DCP)
def test_a_distributed_checkpoint_goes_on(name):
    expected = written.load(FOLDER / "dcp_expected.pt.gz")[name]
    check(resumed_from(FOLDER / name, name), expected)


@pytest.mark.parametrize("name", written.DCP)
def test_the_planner_also_loads_a_checkpoint_of_today(name, tmp_path):
    written.write_dcp(tmp_path)
    expected = written.load(tmp_path / "dcp_expected.pt.gz")[name]
    check(resumed_from(tmp_path / name, name), expected)


# The other tuners


@pytest.mark.parametrize("name", TUNERS["optimizers"])
def test_a_tuner_that_is_an_optimizer_goes_on(name):
    saved = TUNERS["optimizers"][name]
    weights = filled(saved["weights"])
    options = written.OPTIMIZERS[saved["name"]]
    opt = getattr(tuners, saved["name"])(weights, backend="reference", **options)
    opt.load_state_dict(copy.deepcopy(saved["state_dict"]))
    check(written.walk_optimizer(opt, weights, AFTER), saved["expected"])


@pytest.mark.parametrize("name", written.BESIDE)
def test_a_tuner_beside_an_optimizer_goes_on(name):
    saved = TUNERS["beside"][name]
    weights = filled(saved["weights"])
    opt = written.plain_sgd(weights)
    opt.load_state_dict(copy.deepcopy(saved["optimizer"]))
    tuner = written.BESIDE[name](opt)
    tuner.load_state_dict(copy.deepcopy(saved["state_dict"]))
    steps = len(saved["expected"]["weights"])
    check(written.walk_beside(name, opt, tuner, weights, steps), saved["expected"])
