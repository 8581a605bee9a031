"""The benchmarks run, count the bytes that mechanic.md counts, and write JSON; nothing is timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mechanic_fused import MechanicLion

ROOT = Path(__file__).resolve().parents[1]

# Bytes a parameter and step, by hand from what is read and written.
FLOOR = {"fused": 28, "decayed": 44, "plain": 40, "sgd": 32, "sgd fused": 20}
BF16_FLOOR = {"fused": 14, "decayed": 36}
FLOORS = {
    torch.float32: {
        "MechanicAdamW wd=0.01": FLOOR["decayed"],
        "MechanicAdamW wd=0": FLOOR["plain"],
        "MechanicSGD momentum": FLOOR["sgd"],
        "MechanicLion wd=0.01": 36,
    },
    torch.bfloat16: {
        "MechanicAdamW wd=0.01": BF16_FLOOR["decayed"],
        "MechanicAdamW wd=0": 34,
        "MechanicSGD momentum": 26,
        "MechanicLion wd=0.01": 28,
    },
}


@pytest.fixture
def benchmarks(monkeypatch):
    """The package as a module: it is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.contenders
    import benchmarks.roofline
    import benchmarks.step
    import benchmarks.tables

    return benchmarks


def run(module, *arguments):
    # One thread: others may be at work on these cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr, done.returncode


def test_step_writes_rows_and_requirements(tmp_path):
    out = tmp_path / "step.json"
    text, code = run("step", "--quick", "--threads", 1, "--cases", "35M,1000x16", "--out", out)
    assert code == 0, text
    record = json.loads(out.read_text())
    assert record["conditions"]["torch"] == torch.__version__
    assert {row["case"] for row in record["rows"]} == {"35M", "1000x16"}
    assert all(row["median_s"] > 0 for row in record["rows"])
    required = record["required"]
    assert all(row["met"] is None for row in required)  # miniatures prove nothing
    assert [row["measured"] is None for row in required] == [False] * 5 + [True, False]
    assert [round(row["floor"], 2) for row in required[:3]] == [1.57, 1.43, 1.60]
    assert "| MechanicAdamW wd=0.01 " in text


@pytest.mark.parametrize(
    "option, said",
    [
        (["--cases", "36M"], "got 36M"),
        (["--rounds", "2"], "3 or more, got 2"),
        (["--threads", "0"], "1 or more, got 0"),
    ],
)
def test_step_refuses_bad_options(benchmarks, capsys, option, said):
    with pytest.raises(SystemExit):
        benchmarks.step.options(option)
    assert said in capsys.readouterr().err


def test_gpu_goes_through_its_parts_on_a_cpu(tmp_path):
    arguments = ["--dry-run", "--parts", "bench", "--cases", "1000x16", "--out", tmp_path]
    text, code = run("gpu", *arguments)
    assert code == 0, text
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["well"] for part in record["parts"]] == [True] * 2
    assert {row["case"] for row in record["rows"]} == {"1000x16"}
    absent = [row["optimizer"] for row in record["rows"] if "absent" in row]
    assert "mechanic-pytorch AdamW" not in absent


def test_bytes_a_parameter(benchmarks):
    contenders = benchmarks.contenders
    assert contenders.torch_adamw("fused").bytes_per_parameter(None, 1, torch.float32) == (
        pytest.approx(FLOOR["fused"], rel=1e-3)
    )
    assert contenders.torch_adamw("fused").bytes_per_parameter(None, 1, torch.bfloat16) == (
        pytest.approx(BF16_FLOOR["fused"], rel=1e-3)
    )
    assert contenders.torch_sgd("fused").bytes_per_parameter(None, 1, torch.float32) == (
        pytest.approx(FLOOR["sgd fused"], rel=1e-3)
    )
    for contender, dtype, expected in (
        (contenders.adamw("reference"), torch.float32, FLOOR["decayed"]),
        (contenders.adamw("reference"), torch.bfloat16, BF16_FLOOR["decayed"]),
        (contenders.adamw("reference", decay=0.0), torch.float32, FLOOR["plain"]),
        (contenders.sgd(), torch.float32, FLOOR["sgd"]),
    ):
        weights = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3, 0, 65)]
        for x in weights:
            x.grad = torch.ones_like(x)
        optimizer = contender.make(weights)
        optimizer.step()
        assert contender.bytes_per_parameter(optimizer, 68, dtype) == expected


def test_the_roofline_predicts_every_case_from_its_bytes(benchmarks, tmp_path, capsys):
    copy = 1e12
    out = tmp_path / "roofline.json"
    benchmarks.roofline.main(["--copy", str(copy), "--out", str(out)])
    record = json.loads(out.read_text())
    assert "prediction" in record["kind"] and "predicted ms at 1 TB/s" in capsys.readouterr().out
    found = {(row["case"], row["optimizer"]): row for row in record["rows"]}
    cases = benchmarks.roofline.cases
    listed = {case.name: case for case in (*cases.GPU, *cases.CPU)}
    assert {case for case, _ in found} == set(listed) and len(found) == 4 * len(listed)
    for name, case in listed.items():
        floors = FLOORS[case.dtype]
        for optimizer, floor in floors.items():
            row = found[name, optimizer]
            assert row["bytes_per_parameter"] == floor
            assert row["bytes"] == floor * case.parameters
            assert row["predicted_s"] == pytest.approx(row["bytes"] / copy)


@pytest.mark.parametrize("copy", ["0", "-1", "nan", "inf"])
def test_the_roofline_refuses_a_speed_that_is_none(benchmarks, capsys, copy):
    with pytest.raises(SystemExit):
        benchmarks.roofline.main(["--copy", copy])
    assert f"above 0, got {float(copy)}" in capsys.readouterr().err


def test_the_roofline_counts_the_state_that_is_there(benchmarks):
    """Momentum in 2 bytes instead of 4, read and written; everything in 8."""
    roofline, contenders = benchmarks.roofline, benchmarks.contenders
    case = benchmarks.roofline.cases.Case("two", ((3, 5), (7,)), torch.bfloat16)
    plain = contenders.lion("reference")
    narrow = contenders.Contender(
        "narrow",
        lambda weights: MechanicLion(weights, weight_decay=0.1, narrow_state=True),
        ours=True,
    )
    expected = FLOORS[torch.bfloat16][plain.name]
    assert roofline.bytes_per_parameter(plain, case) == expected
    assert roofline.bytes_per_parameter(narrow, case) == expected - 2 * 2
    double = roofline.cases.replace(case, dtype=torch.float64)
    assert roofline.bytes_per_parameter(plain, double) == 2 * FLOORS[torch.float32][plain.name]


def test_requirement_is_judged_by_its_row(benchmarks):
    must = benchmarks.tables.Must("case", "ours", "theirs", 2.0)
    row = {"case": "case", "optimizer": "ours", "against": "theirs", "ratio": 1.9}
    assert must.judge([row], True)["met"] is True
    assert must.judge([{**row, "ratio": 2.1}], True)["met"] is False
    assert must.judge([{**row, "against": "others"}], True)["met"] is None
    assert must.judge([row], False)["met"] is None
    launches = benchmarks.tables.Must("case", "ours", None, 3, quantity="launches")
    assert launches.judge([row, {**row, "launches": 3.0}], True)["met"] is True


def test_table_without_tabulate(benchmarks, monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    text = benchmarks.tables.table(["a", "number"], [["x", "1"], ["yy", "22"]])
    assert text.splitlines() == [
        "| a  | number |",
        "| -- | ------ |",
        "| x  | 1      |",
        "| yy | 22     |",
    ]
