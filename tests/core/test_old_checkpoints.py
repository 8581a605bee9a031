"""Checkpoints that 0.1 wrote load, and go on to the bits of the run that wrote them.

0.1 named some options and entries of param groups otherwise: see support/checkpoints.py.
"""

import copy
import re
import tarfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import checkpoints
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from mechanic_fused import tuners
from mechanic_fused.checkpoints import RenamingLoadPlanner

ARCHIVE = Path(__file__).with_name("checkpoints_0_1.tar.xz")
CPUINFO = Path("/proc/cpuinfo")
VENDOR = re.findall(r"vendor_id\s*: (\w+)", CPUINFO.read_text() if CPUINFO.exists() else "")[:1]
# Where the archive was written: another torch, or another processor, adds in another order. So does
# MKL on processors of another maker that have the same instructions.
WRITTEN_WITH = ("2.13.0+cpu", "AVX512", ["AuthenticAMD"])
SAME_BITS = (torch.__version__, torch.backends.cpu.get_cpu_capability(), VENDOR) == WRITTEN_WITH

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


OTHER_ROUNDING = ("narrow_state adamw",)
"""Where v is in bfloat16: 0.1 rounded it to nearest, so that it could not fall."""


def assert_goes_on(found, expected, case=""):
    same_bits = SAME_BITS and case not in OTHER_ROUNDING
    for name, value in expected.items():
        if torch.is_tensor(value):
            narrow = value.dtype is torch.bfloat16 or case in OTHER_ROUNDING
            tolerance = 0.0 if same_bits else 2.0**-6 if narrow else 1e-5
            torch.testing.assert_close(
                found[name],
                value,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name: f"{case} {name}: {text}",
            )
        else:
            assert found[name] == (value if same_bits else pytest.approx(value, rel=1e-5)), name


def parameters(tensors):
    return [torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in tensors]


@pytest.mark.parametrize("way", ["weights first", "optimizer first", "saved again"])
@pytest.mark.parametrize("file", ["bases", "options", "general"])
def test_a_state_dict_loads_and_goes_on(saved, file, way):
    for name, case in torch.load(saved / f"cases_{file}.pt", weights_only=True).items():
        weights = parameters(case["weights"])
        opt = checkpoints.build(case["options"], weights)
        if way == "optimizer first":
            with torch.no_grad():
                for p in weights:
                    p.zero_()
        opt.load_state_dict(case["state_dict"])
        if way == "optimizer first":
            with torch.no_grad():
                for p, w in zip(weights, case["weights"], strict=True):
                    p.copy_(w)
        if way == "saved again":
            again = copy.deepcopy(opt.state_dict())
            weights = parameters(case["weights"])
            opt = checkpoints.build(case["options"], weights)
            opt.load_state_dict(again)
        found = checkpoints.take_steps(opt, weights, case["gradients"], case["lrs"])
        assert_goes_on(found, case["expected"], name)


@pytest.mark.parametrize("name", ["adamw", "radam"])
def test_a_pickled_optimizer_loads_and_goes_on(saved, name):
    case = torch.load(saved / "pickled_expected.pt", weights_only=True)[name]
    opt = torch.load(saved / f"pickled_{name}.pt", weights_only=False)
    weights = [p for group in opt.param_groups for p in group["params"]]
    found = checkpoints.take_steps(opt, weights, case["gradients"], case["lrs"])
    assert_goes_on(found, case["expected"])


@pytest.mark.parametrize("name", ["dcp", "dcp_flat"])
def test_a_distributed_checkpoint_loads_and_goes_on(saved, name):
    case = torch.load(saved / "dcp_expected.pt", weights_only=True)[name]
    model = checkpoints.dcp_model(name)
    opt = checkpoints.dcp_optimizer(name, model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    options = StateDictOptions(flatten_optimizer_state_dict=name == "dcp_flat")
    weights, state = get_state_dict(model, opt, options=options)
    loaded = {"model": weights, "optim": state}
    dcp.load(loaded, checkpoint_id=saved / name, no_dist=True, planner=RenamingLoadPlanner())
    set_state_dict(
        model,
        opt,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optim"],
        options=options,
    )
    weights = list(model.parameters())
    found = checkpoints.take_steps(opt, weights, case["gradients"], case["lrs"])
    assert_goes_on(found, case["expected"])


def test_the_planner_reads_a_checkpoint_of_today(tmp_path):
    model = checkpoints.dcp_model("dcp")
    opt = checkpoints.dcp_optimizer("dcp", model)
    gradients = [[torch.ones_like(p) for p in model.parameters()]] * 3
    checkpoints.take_steps(opt, list(model.parameters()), gradients, [1.0, 1.0, 0.5])
    opt.zero_grad()
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "now", no_dist=True)
    fresh_model = checkpoints.dcp_model("dcp")
    fresh = checkpoints.dcp_optimizer("dcp", fresh_model)
    weights, state = get_state_dict(fresh_model, fresh)
    loaded = {"model": weights, "optim": state}
    planner = RenamingLoadPlanner()
    dcp.load(loaded, checkpoint_id=tmp_path / "now", no_dist=True, planner=planner)
    set_state_dict(
        fresh_model, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"]
    )
    assert torch.equal(fresh.scale, opt.scale)
    assert float(fresh.scale) > 0


@pytest.mark.parametrize(
    "name", [f"{t} {d}" for t in checkpoints.TUNERS for d in ("float32", "bfloat16")]
)
def test_a_tuner_that_is_an_optimizer_loads_and_goes_on(saved, name):
    case = torch.load(saved / "tuners.pt", weights_only=True)[name]
    weights = parameters(case["weights"])
    opt = getattr(tuners, case["options"]["class"])(weights, **case["options"]["kwargs"])
    opt.load_state_dict(case["state_dict"])
    steps = len(case["expected"]["weights"])
    assert_goes_on(checkpoints.tuner_steps(opt, weights, steps), case["expected"])


@pytest.mark.parametrize("name", ["AutoDrop", "AutoDrop 1", "GeN", "FlatterFaster"])
def test_a_tuner_beside_an_optimizer_loads_and_goes_on(saved, name):
    case = torch.load(saved / "tuners_beside.pt", weights_only=True)[name]
    weights = parameters(case["weights"])
    opt = torch.optim.SGD(weights, lr=0.02, momentum=0.9)
    opt.load_state_dict(case["optimizer"])
    tuner = checkpoints.beside_tuner(name, opt)
    tuner.load_state_dict(case["state_dict"])
    steps = len(case["expected"]["weights"])
    assert_goes_on(checkpoints.beside_steps(name, opt, tuner, weights, steps), case["expected"])


def test_this_release_writes_the_same_forms(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["checkpoints.py", str(tmp_path / "written")])
    threads = torch.get_num_threads()
    try:
        checkpoints.main()
    finally:
        torch.set_num_threads(threads)
    written = {p.name for p in (tmp_path / "written").iterdir()}
    assert {"cases_bases.pt", "cases_options.pt", "pickled_adamw.pt", "dcp", "tuners.pt"} <= written
