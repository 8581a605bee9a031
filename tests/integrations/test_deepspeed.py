"""DeepSpeed itself, on the CPU with gloo: a single process's numbers in every stage of ZeRO.

DeepSpeed compiles an op at its first run, in about a minute.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.stacks import import_stack

pytestmark = pytest.mark.stacks

import_stack("deepspeed")

from support import deepspeed_runs as runs  # noqa: E402

ROUNDED = {"bf16": 1e-3, "fp16": 1e-3}
"""Ranks' gradients are averaged in 16 bits, which a single process does not do."""


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
    tolerance = ROUNDED.get(dtype, 1e-6) if ranks > 1 or dtype == "fp16" else 1e-6
    for found in of_ranks:
        assert not isinstance(found[case], str), found[case]
        read, own = found[case]
        for t, scale in read:
            assert scale == pytest.approx(scales[t], rel=tolerance)
        for x, expected in zip(own, weights, strict=True):
            # A bfloat16 may round either way.
            atol = 1e-6 if dtype == "fp32" else 2e-2
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


def trainer_with(*stage):
    script = Path(__file__).with_name("trainer_deepspeed.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), *stage]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_the_trainer_with_deepspeed_learns_what_it_learns_alone():
    import_stack("transformers")
    alone = trainer_with()
    for stage in ("1", "3"):
        found = trainer_with(stage)
        assert found["scale"] == pytest.approx(alone["scale"], rel=1e-5)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
