"""Fixtures for the tests of benchmarks/, which is not installed. Nothing is timed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Before any test is collected: otherwise `benchmarks` may be this folder, without modules.
sys.path.insert(0, str(ROOT))


@pytest.fixture
def run_program():
    """run_program("step", "--quick", …): run a benchmark as users do; return what it prints."""

    def run(module, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
