"""The protocol of benchmarks.convergence: what it runs, when it ends, what it concludes."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas
import pytest
import torch
from scipy import stats

from mechanic_fused import options as constants

ROOT = Path(__file__).resolve().parents[1]
FEW = 20
"""Steps of a run, at least."""


@pytest.fixture
def convergence(monkeypatch):
    """The package as a module: it is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.convergence.large
    import benchmarks.convergence.protocol
    import benchmarks.convergence.runs
    import benchmarks.convergence.store
    import benchmarks.convergence.tables

    return benchmarks.convergence


def rows_of(convergence, specs, loss):
    """Rows as the store would hold them, with a loss for each spec."""
    lines = []
    for spec in specs:
        scores = {"train_loss": 0.0, "validation_loss": loss(spec), "accuracy": 0.5}
        lines.append({**asdict(spec), "steps": 1, **scores, "rate": 0.1, "seconds": 1.0})
    return pandas.DataFrame(lines, columns=convergence.store.FIELDS)


def until_done(convergence, part, loss, **more):
    """Run a part to its end over made-up losses; return its rows."""
    protocol = convergence.protocol.Protocol(choosing=(0,), fresh=(100, 101), **more)
    specs, rows = [], rows_of(convergence, [], loss)
    while asked := part(rows, ["char"], protocol):
        assert not set(asked) & set(specs)
        specs += asked
        rows = rows_of(convergence, specs, loss)
    return rows, protocol


def valley(at, by=0.0):
    """A loss over learning rates whose smallest is at 2^at, for Mechanic ``by`` above that."""
    return lambda spec: 1 + abs(math.log2(spec.lr) - at) / 10 if spec.lr else 1 + by


@pytest.mark.parametrize("at", [-7, -2, -13])
def test_a_grid_grows_until_its_best_is_inside(convergence, at):
    rows, protocol = until_done(convergence, convergence.protocol.searched, valley(at), horizons=1)
    rates = sorted(rows[rows.method == "AdamW"].lr)
    assert len(rates) >= protocol.points
    assert rates[0] < 2.0**at < rates[-1]
    assert {b / a for a, b in zip(rates, rates[1:], strict=False)} == {2.0}


def test_a_grid_that_never_ends_is_given_up(convergence):
    rows, protocol = until_done(convergence, convergence.protocol.searched, valley(99), horizons=1)
    assert len(rows[rows.method == "AdamW"]) == protocol.widest


def test_a_longer_horizon_starts_around_the_best_of_the_shorter(convergence):
    rows, protocol = until_done(convergence, convergence.protocol.searched, valley(-6), horizons=4)
    later = sorted(rows[(rows.method == "AdamW") & (rows.horizon == 4)].lr)
    assert later == [2.0**k for k in (-8, -7, -6, -5, -4)]


@pytest.mark.parametrize(("by", "met"), [(0.0099, True), (0.0101, False)])
def test_a_comparison_is_met_within_its_tolerance(convergence, by, met):
    def part(*arguments):
        searched = convergence.protocol.searched(*arguments)
        return searched or convergence.protocol.compared(*arguments)

    rows, protocol = until_done(convergence, part, valley(-7, by), horizons=1)
    assert set(rows[(rows.method == "AdamW") & (rows.seed >= 100)].lr) == {2.0**-7}
    table = convergence.tables.comparisons(rows, ["char"], protocol)
    line = table[table.base == "AdamW"].iloc[0]
    assert line.behind == pytest.approx(by) and bool(line.met) is met and bool(line.inside)


def test_the_interval_is_that_of_paired_differences(convergence):
    rng = torch.Generator().manual_seed(0)
    ours, tuned = (pandas.Series(torch.rand(5, generator=rng).tolist()) for _ in range(2))
    behind, half = convergence.tables.gap(tuned, ours, "accuracy")
    low, high = stats.ttest_rel(tuned, ours).confidence_interval(0.95)
    assert (behind - half, behind + half) == pytest.approx((low, high))


def test_an_arm_changes_one_run_only(convergence):
    variants, start = dict(constants.VARIANTS), constants.START
    losses = {}
    for arm in convergence.ablations.ARMS:
        spec = convergence.runs.Spec("digits_mlp", 1, "Mechanic AdamW", 0.0, arm, 0)
        losses[arm] = convergence.runs.run(spec, shorter=10)["train_loss"]
        assert (constants.VARIANTS, constants.START) == (variants, start)
    assert all(map(math.isfinite, losses.values()))
    others = {arm: loss for arm, loss in losses.items() if arm != "default"}
    same = {arm for arm, loss in others.items() if loss == losses["default"]}
    # Where r does not fall below 0, nothing is floored.
    assert same <= {"r floored"}


@pytest.fixture
def small(convergence, monkeypatch):
    """Models that take long to make, and validation that takes long, made small."""
    monkeypatch.setattr(convergence.text, "PRETRAINING", 3)
    for module in (convergence.text, convergence.tokens):
        monkeypatch.setattr(module, "KEPT", 16)
        monkeypatch.setattr(module, "WINDOWS", 16)
    convergence.text._pretrained.cache_clear()
    monkeypatch.setattr(
        convergence.large, "SIZES", {"width": 32, "layers": 1, "heads": 2, "context": 16}
    )
    monkeypatch.setattr(convergence.large, "KEPT", 8)
    yield
    convergence.text._pretrained.cache_clear()


TASKS = "iris wine breast_cancer digits digits_mlp digits_conv char lora tokens gpt2".split()


@pytest.mark.parametrize("name", TASKS)
def test_each_task_trains_and_repeats(convergence, small, name):
    task = convergence.tasks.TASKS[name]
    spec = convergence.runs.Spec(name, 1, "Mechanic AdamW", 0.0, "", 3)
    one, two = (convergence.runs.run(spec, shorter=task.steps // FEW) for _ in range(2))
    del one["seconds"], two["seconds"]
    assert one == two
    assert math.isfinite(one["validation_loss"]) and 0 <= one["accuracy"] <= 1


def test_every_task_is_tried(convergence):
    assert set(TASKS) == set(convergence.tasks.TASKS)


@pytest.mark.parametrize("method", ["Prodigy", "D-Adapt Adam", "schedule-free AdamW", "DoG"])
def test_each_other_package_learns(convergence, method):
    spec = convergence.runs.Spec("digits", 1, method, 0.0, "", 0)
    row = convergence.runs.run(spec, shorter=10)
    assert row["accuracy"] > 0.5 and row["rate"] > 0


def test_precisions_count_their_bytes(convergence):
    """x, x_ref, Δ, m, v: 20 bytes in float32; 2 + 2 + 4 + 4 + 4 from bfloat16 weights."""
    bytes_of = convergence.precision.bytes_of
    assert bytes_of("Mechanic AdamW", "float32") == 20
    assert bytes_of("Mechanic AdamW", "bfloat16 weights") == 16
    assert bytes_of("Mechanic AdamW", "bfloat16 weights, Δ to nearest") == 14
    assert bytes_of("Mechanic AdamW", "bfloat16 weights, Δ stochastic") == 14
    assert bytes_of("Mechanic AdamW", "bfloat16 weights and state, Δ stochastic") == 10
    assert bytes_of("AdamW", "float32") == 12
    assert bytes_of("AdamW", "bfloat16 weights") == 6


@pytest.mark.parametrize("method", ["Mechanic AdamW", "AdamW"])
def test_each_precision_trains(convergence, small, method):
    for arm in convergence.precision.COMPARED[method]:
        lr = 0.0 if method.startswith("Mechanic") else 2.0**-8
        row = convergence.runs.run(
            convergence.runs.Spec("char", 1, method, lr, arm, 0), shorter=1000 // FEW
        )
        assert row["validation_loss"] < 6, arm


def program(tmp_path, *more):
    command = [sys.executable, "-m", "benchmarks.convergence", "--quick", "--out", tmp_path / "out"]
    options = "--tasks iris --points 3 --fresh 100 101".split()
    done = subprocess.run(
        [*map(str, command), *options, *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_ends_and_goes_on_where_it_was_cut(tmp_path):
    printed = program(tmp_path)
    assert "of 3 comparisons met" in printed
    csv = tmp_path / "out.csv"
    whole = csv.read_text().splitlines()
    record = json.loads((tmp_path / "out.json").read_text())
    assert len(record["comparisons"]) == 3 and len(record["ranking"]) == 7
    assert (tmp_path / "out.png").stat().st_size > 1000
    # Cut off in the middle of a line.
    csv.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:20])
    program(tmp_path)
    again = csv.read_text().splitlines()
    assert again[:-1] == whole[:-1]
    # All but the time that it took.
    assert again[-1].split(",")[:-2] == whole[-1].split(",")[:-2]


def test_a_trace_is_the_run_of_the_protocol(convergence):
    import benchmarks.convergence.trace as tracing

    rows = tracing.trace("iris", "AdamW", seed=0, steps=700, every=100)
    spec = convergence.runs.Spec("iris", 1, "Mechanic AdamW", 0.0, "", 0)
    assert [row["step"] for row in rows] == list(range(100, 800, 100))
    largest = max(row["S"] * row["lr"] for row in rows)
    assert largest <= convergence.runs.run(spec)["rate"] * 1.05
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
