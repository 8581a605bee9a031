"""The sharded example: cut off after its first checkpoint, it resumes to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120


def assert_resumes(run, folder):
    """Run 6 steps with ``run(steps, every)``, remove the last checkpoint, and run again."""
    expected = run(6, 3)
    assert "2 ranks on cpu" in expected[0] and "from step 0" in expected[0]
    assert "identical on 2 ranks" in expected[-1]
    # A kill during the second save leaves a folder without its .metadata.
    (folder / "step-6" / ".metadata").unlink()
    resumed = run(6, 3)
    assert "from step 3" in resumed[0]
    assert resumed[1:] == expected[2:]


def test_it_saves_and_resumes_to_the_same_bits(ranks, tmp_path):
    def run(steps, every):
        return ranks(2).run("sharded_example.train", str(tmp_path), steps, every)[0]

    assert_resumes(run, tmp_path)


@pytest.mark.slow
def test_it_resumes_under_torchrun(tmp_path):
    def run(steps, every):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        # A free port, so that two runs on one machine do not meet.
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        command += [str(ROOT / "examples" / "fsdp2.py"), "--checkpoint=saved"]
        done = subprocess.run(
            [*command, f"--steps={steps}", f"--every={every}"],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert_resumes(run, tmp_path / "saved")
