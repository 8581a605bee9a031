"""The benchmarks and the example of the tuners run; nothing is timed."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("pandas", "sklearn", "matplotlib", "tqdm", "tabulate"):
    pytest.importorskip(name)

ROOT = Path(__file__).resolve().parents[1]
FEW = 20
"""Steps of a run, at least."""


def run(folder, *command):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tuned(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.convergence.runs
    import benchmarks.convergence.tuned

    return benchmarks.convergence


METHODS = (
    *("AutoDrop AdamW", "exponential AdamW", "drops AdamW", "GeN AdamW", "LRTuner AdamW"),
    *("AutoDrop SGD", "exponential SGD", "drops SGD", "LQA", "CGQ", "extrapolated SGD"),
    *("AdaRem", "Flatter, faster SGD", "AutoGD"),
)


def test_every_method_is_listed_here(tuned):
    assert set(METHODS) == set(tuned.tuned.TUNED)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns(tuned, method):
    """Wine at a ninth of its steps: its largest class has two rows in five."""
    start = tuned.tuned.TUNED[method].start
    lr = 2.0**-6 if isinstance(start, str) else start
    row = tuned.runs.run(tuned.runs.Spec("wine", 1, method, lr, "", 0), shorter=9)
    assert row["accuracy"] > 0.7 and row["rate"] > 0


def test_the_program_runs_and_goes_on(tmp_path):
    out = tmp_path / "tuners"
    text = run(ROOT, "-m", "benchmarks.tuners", "--methods", "AutoGD", "--quick", "--out", out)
    assert "| AutoGD " in text
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    table = json.loads(out.with_suffix(".json").read_text())["table"]
    assert {row["task"] for row in table} == {"wine", "breast_cancer", "digits_mlp"}
    again = run(ROOT, "-m", "benchmarks.tuners", "--methods", "AutoGD", "--quick", "--out", out)
    assert "| AutoGD " in again and len(out.with_suffix(".csv").read_text().splitlines()) == 10


def test_the_cost_of_autodrop_is_written(tmp_path):
    out = tmp_path / "autodrop.json"
    run(ROOT, "-m", "benchmarks.autodrop", "--quick", "--threads", 1, "--batch", 2, "--out", out)
    record = json.loads(out.read_text())
    elements = int(record["conditions"]["passes on"].split()[0].replace(",", ""))
    assert [row["bytes"] / elements for row in record["passes"]] == [12, 16]
    assert record["training"]["overhead"] > 0


def test_the_example_draws_all_methods(tmp_path):
    text = run(tmp_path, ROOT / "examples" / "compare_tuners.py", "--steps", FEW, "--threads", 1)
    assert len([line for line in text.splitlines() if "e-" in line or "e+" in line]) >= 13
    assert (tmp_path / "out" / "compare_tuners.png").stat().st_size > 1000
