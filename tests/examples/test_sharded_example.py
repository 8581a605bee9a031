"""The sharded example as users run it: cut short after its first checkpoint, it goes on."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 120


def example(folder, ranks, *options):
    """Run it and return what rank 0 prints."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    # A port of its own, or two runs on one machine would meet.
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(ROOT / "examples" / "fsdp2.py"), "--checkpoint=saved", *options]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_saves_and_goes_on_to_the_same_bits(tmp_path):
    through = tmp_path / "through"
    through.mkdir()
    expected = example(through, 2, "--steps=6", "--every=3")
    assert "2 ranks on cpu" in expected[0] and "from step 0" in expected[0]
    assert "the same bits on 2 ranks" in expected[-1]
    # What a kill in the course of the second save leaves: a folder without its .metadata.
    (through / "saved" / "step-6" / ".metadata").unlink()
    resumed = example(through, 2, "--steps=6", "--every=3")
    assert "from step 3" in resumed[0]
    assert resumed[1:] == expected[2:]
