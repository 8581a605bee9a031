"""The benchmarks over ranks and of memory run on miniatures and count what they must; no times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 60

OURS = "MechanicAdamW wd=0.01"


@pytest.fixture
def benchmarks(monkeypatch):
    """The package as a module: it is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.ranks
    import benchmarks.release

    return benchmarks


def collectives(tmp_path, layout, case):
    out = tmp_path / "ranks.json"
    arguments = ["--quick", "--cases", case, "--layouts", layout, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ranks", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the figures mean nothing" in done.stdout
    rows = {row["optimizer"]: row for row in json.loads(out.read_text())["rows"]}
    for name, row in rows.items():
        if name.startswith(OURS):
            assert row["median_s"] > 0 and 0 <= row["share"] < 1
    return rows


def numbers(rows, suffix):
    row = rows[OURS + suffix]
    return row["collectives"], row["collective_bytes"]


def test_a_step_over_fsdp2_reduces_once_and_once_more_to_clip(tmp_path):
    """A row of sums and one of presence, of 4 float64 each; (2,) to clip."""
    rows = collectives(tmp_path, "fsdp2", "1000x1000")
    assert numbers(rows, "") == (1, 64)
    assert numbers(rows, ", max_grad_norm=1000") == (2, 64 + 16)
    assert numbers(rows, ", plain local tensors") == (0, 0)
    assert rows["torch AdamW fused, wd=0.01"]["collectives"] == 0


@pytest.mark.slow
def test_a_step_over_two_meshes_reduces_once_for_each(tmp_path):
    """Over dp the rows of matrices and of vectors together, over tp that of matrices."""
    rows = collectives(tmp_path, "fsdp2xtp", "35M")
    assert numbers(rows, "") == (2, 3 * 64)
    assert numbers(rows, ", max_grad_norm=1000") == (4, 3 * (64 + 16))


@pytest.mark.parametrize(
    "module, option, said",
    [
        ("ranks", ["--cases", "36M"], "got 36M"),
        ("ranks", ["--layouts", "fsdp2,ddp"], "got ddp"),
        ("ranks", ["--rounds", "2"], "3 or more, got 2"),
        ("release", ["--depth", "0"], "--depth must be 1 or more, got 0"),
        ("release", ["--rounds", "2"], "3 or more, got 2"),
    ],
)
def test_bad_options_are_refused(benchmarks, capsys, module, option, said):
    with pytest.raises(SystemExit):
        getattr(benchmarks, module).options(option)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["OURS", "TORCH"])
def test_a_released_gradient_is_not_there_at_the_peak(benchmarks, name):
    release = benchmarks.release
    size = release.Size(width=128, depth=6)
    kept, released = (
        release.memory(size, getattr(release, name), flag, "cpu")["allocated_bytes"]
        for flag in (False, True)
    )
    assert kept >= size.predicted(released=False)
    # Two gradients and all activations, before and after each ReLU: half of what is kept.
    activations = 2 * 4 * release.BATCH * size.width * size.depth
    assert size.predicted(True) <= released <= 2 * size.predicted(True) + activations < kept


def test_release_writes_memory_and_times(benchmarks, monkeypatch, capsys, tmp_path):
    # One process of its own is shown below; the four of a run would take too long here.
    monkeypatch.setattr(benchmarks.release, "in_new_process", lambda call, *given: call(*given))
    benchmarks.release.main(["--quick", "--out", str(tmp_path / "release.json")])
    record = json.loads((tmp_path / "release.json").read_text())
    assert [row["released"] for row in record["memory"]] == [False, True] * 2
    assert all(row["median_s"] > 0 and row["released_median_s"] > 0 for row in record["times"])
    assert "the figures mean nothing" in capsys.readouterr().out


def test_a_new_process_gives_its_result_back(benchmarks):
    assert benchmarks.release.in_new_process(os.getpid) != os.getpid()
