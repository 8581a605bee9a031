"""DeepSpeed itself, on the CPU with gloo: a single process's numbers in every stage of ZeRO.

DeepSpeed compiles an op at its first run, in about a minute.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.stacks import import_stack

from mechanic_fused.integrations.deepspeed import load_universal, to_universal

pytestmark = pytest.mark.stacks

import_stack("deepspeed")

from support import deepspeed_runs as runs  # noqa: E402

ROUNDED = {"bf16": 1e-3, "fp16": 1e-3}
"""Ranks' gradients are averaged in 16 bits, which a single process does not do."""

NARROW, NARROW_WEIGHTS = 1e-3, 0.017 * 0.03 * runs.STEPS
"""A state of 16 bits, which pieces have whatever their size, and small weights of one process not.

Updates, of size 1, err by 1.7 % then, and are scaled by an S of up to 0.03.
"""


def tolerance_of(options, ranks):
    """Return the relative one of S."""
    if "of_optimizer" in options:
        return NARROW
    dtype = options.get("dtype", "fp32")
    return ROUNDED.get(dtype, 1e-6) if ranks > 1 or dtype == "fp16" else 1e-6


def spawned(function, ranks, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(function, (ranks, port, str(folder)), nprocs=ranks)


@pytest.fixture(scope="module", params=[1, 2])
def trained(request, tmp_path_factory):
    """(ranks, what every rank has come to in every case)."""
    folder = tmp_path_factory.mktemp("deepspeed")
    spawned(runs.run_cases, request.param, folder)
    found = [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]
    return request.param, found


@pytest.mark.parametrize("case", runs.CASES)
def test_every_stage_has_the_numbers_of_a_single_process(trained, case):
    ranks, of_ranks = trained
    options = runs.CASES[case]
    scales, weights = runs.single(**options)
    dtype = options.get("dtype", "fp32")
    tolerance = tolerance_of(options, ranks)
    for found in of_ranks:
        assert not isinstance(found[case], str), found[case]
        read, own = found[case]
        for t, scale in read:
            assert scale == pytest.approx(scales[t], rel=tolerance)
        for x, expected in zip(own, weights, strict=True):
            # A bfloat16 may round either way.
            atol = 1e-6 if dtype == "fp32" else 2e-2
            atol = NARROW_WEIGHTS if "of_optimizer" in options else atol
            torch.testing.assert_close(x, expected, rtol=0, atol=atol)
    if ranks == 2:
        assert of_ranks[0][case][0] == of_ranks[1][case][0]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    spawned(runs.run_resumed, 2, folder)
    return [torch.load(folder / f"resumed-2-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", runs.RESUMED)
def test_a_checkpoint_of_the_engine_goes_on_to_the_bit(resumed, case):
    for found in resumed:
        assert not isinstance(found[case], str), found[case]
        (scale, weights), (other, others) = found[case]
        assert scale == other
        assert all(torch.equal(x, y) for x, y in zip(weights, others, strict=True))


def test_ranks_without_a_group_are_refused_before_anything_moves(tmp_path):
    spawned(runs.run_without_group, 2, tmp_path)
    for rank in range(2):
        error, moved = torch.load(tmp_path / f"without-{rank}.pt")
        assert "expected reduce_group=torch.distributed.group.WORLD" in error
        assert not moved


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)])
def continued(request, tmp_path_factory):
    """What every rank has come to from a universal checkpoint of another number of ranks."""
    before, after = request.param
    folder = tmp_path_factory.mktemp("universal")
    spawned(runs.run_saved, before, folder)
    for name in runs.UNIVERSAL:
        tag = runs.tag_of(name)
        to_universal(folder / tag, folder / f"{tag}-universal")
    spawned(runs.run_from_universal, after, folder)
    return [torch.load(folder / f"universal-{after}-{rank}.pt") for rank in range(after)]


@pytest.mark.parametrize("case", runs.UNIVERSAL)
def test_a_universal_checkpoint_goes_on_on_another_number_of_ranks(continued, case):
    scales, weights = runs.single(**runs.CASES[case])
    for found in continued:
        assert not isinstance(found[case], str), found[case]
        read, own, lost = found[case]
        assert not lost
        tolerance = tolerance_of(runs.CASES[case], len(continued))
        for t, scale in read:
            assert scale == pytest.approx(scales[t], rel=tolerance)
        for x, expected in zip(own, weights, strict=True):
            atol = NARROW_WEIGHTS if tolerance == NARROW else tolerance
            torch.testing.assert_close(x, expected, rtol=0, atol=atol)


def test_a_universal_checkpoint_without_x_ref_warns(tmp_path):
    """As DeepSpeed's own converter makes it, loaded by the engine alone."""
    spawned(runs.run_saved, 1, tmp_path)
    for name in runs.UNIVERSAL:
        folder = tmp_path / f"{runs.tag_of(name)}-universal"
        to_universal(tmp_path / runs.tag_of(name), folder)
        for path in folder.glob("zero/**/x_ref.pt"):
            path.unlink()
    spawned(functools.partial(runs.run_from_universal, by_deepspeed=True), 1, tmp_path)
    found = torch.load(tmp_path / "universal-1-0.pt")
    for name in runs.UNIVERSAL:
        assert not isinstance(found[name], str), found[name]
        assert found[name][2]


def test_a_state_that_the_converter_does_not_know_is_refused(tmp_path):
    state = {0: {"momentum_buffer": torch.ones(2), "x_ref": torch.ones(2)}}
    saved = {"optimizer_state_dict": {"base_optimizer_state": {"state": state}}}
    (tmp_path / "run").mkdir()
    torch.save(saved, tmp_path / "run" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match="knows Adam's moments alone"):
        to_universal(tmp_path / "run", tmp_path / "universal")
    assert not (tmp_path / "universal").exists()


def test_a_universal_checkpoint_without_x_ref_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a universal checkpoint by"):
        load_universal(None, tmp_path, "run")


def result_of(script, *stage):
    """Return what a script of this folder prints, in a process that is a rank of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parents[1]), *sys.path])
    environment = {**os.environ, "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = paths
    command = [sys.executable, str(here.with_name(script)), *stage]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("stack", ["trainer", "accelerate"])
def test_a_stack_with_deepspeed_learns_what_it_learns_alone(stack):
    import_stack("transformers")
    script = f"{stack}_deepspeed.py"
    alone = result_of(script)
    for stage in ("1", "3"):
        found = result_of(script, stage)
        assert found["scale"] == pytest.approx(alone["scale"], rel=1e-5)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
