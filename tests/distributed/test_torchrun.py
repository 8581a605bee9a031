"""Programs under torchrun's agent learn, and resume to the bit when they have been cut short."""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import train_script
from support.cases import assert_same
from support.chain_model import LEARNED, ChainModel, loss_of
from support.ranks import forkserver, hide_gpus
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "fsdp2.py"
SECONDS = 120

# Well after the first checkpoint and well before the end.
KILLED_AT = train_script.STEPS - 2


def under_torchrun(ranks, function, *arguments):
    """Run a function under torchrun's agent, in processes that need not import torch.

    Returns:
        the lines that rank 0 has printed.
    """
    forkserver()
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            # A port of its own, or two runs on one machine would meet.
            rdzv_endpoint="localhost:0",
            run_id="run",
            max_restarts=0,
            monitor_interval=0.05,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=Std.ALL),
        )
        elastic_launch(config, function)(*arguments)
        [printed] = Path(logs).glob("run_*/attempt_0/0/stdout.log")
        return printed.read_text().splitlines()


def ends(folder, ranks):
    return [torch.load(folder / f"end {rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_resumes_to_the_bit(ranks, tmp_path, size):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    ranks(size).run(train_script.train, whole)
    with pytest.raises(ChildFailedError, match="SIGKILL"):
        under_torchrun(size, train_script.main, killed, KILLED_AT)
    assert 0 < torch.load(killed / "run.pt", weights_only=True)["steps"] < KILLED_AT
    assert not list(killed.glob("end*"))
    under_torchrun(size, train_script.main, killed)

    expected = ends(whole, size)
    assert_same(*expected, *ends(killed, size))
    model = ChainModel()
    before = loss_of(model)
    model.load_state_dict(expected[0]["weights"])
    assert loss_of(model) <= LEARNED * before


def run_example(*arguments):
    hide_gpus()
    sys.path.insert(0, str(EXAMPLE.parent))
    sys.argv = [EXAMPLE.name, *arguments]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_the_example_saves_and_resumes_to_the_bit(tmp_path):
    saved = tmp_path / "saved"
    arguments = (f"--checkpoint={saved}", "--steps=6", "--every=3")
    through = under_torchrun(2, run_example, *arguments)
    assert "2 ranks on cpu" in through[0]
    assert "from step 0" in through[0]
    assert "identical on 2 ranks" in through[-1]
    # What a kill in the middle of the second save leaves: a folder without its .metadata.
    (saved / "step-6" / ".metadata").unlink()
    resumed = under_torchrun(2, run_example, *arguments)
    assert "from step 3" in resumed[0]
    assert resumed[1:] == through[2:]


@pytest.mark.slow
@pytest.mark.parametrize("program", [train_script.__file__, EXAMPLE], ids=["script", "example"])
def test_a_program_runs_from_the_command_line(tmp_path, program):
    argument = tmp_path if program != EXAMPLE else "--steps=1"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", program, argument],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("end*"))) == 2 or "identical on 2 ranks" in done.stdout
