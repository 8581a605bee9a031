"""Step times: the program runs, counts bytes as by hand, and judges its requirements."""

import pytest
import torch

from mechanic_fused import MechanicLion

# Bytes per parameter and step, by hand from what is read and written.
FLOOR = {"fused": 28, "adamw": 32, "sgd": 24, "sgd fused": 20}
EXACT_FLOOR = {"decayed": 44, "plain": 40}
BF16_FLOOR = {"fused": 14, "adamw": 28, "exact": 36}
FLOORS = {
    torch.float32: {
        "MechanicAdamW wd=0.01": FLOOR["adamw"],
        "MechanicAdamW wd=0": FLOOR["adamw"],
        "MechanicSGD momentum": FLOOR["sgd"],
        "MechanicLion wd=0.01": FLOOR["sgd"],
        # A scale of 4 bytes a block of 64 and state, read and written, is a quarter of a byte.
        "MechanicAdamW wd=0.01, x_ref/8": 28.5,
        "MechanicAdamW wd=0.01, 16 bits": 24,
        "MechanicAdamW wd=0.01, 8 bits": 20.25,
        "MechanicAdamW wd=0.01, x_ref/8, 8 bits": 16.75,
        "MechanicAdamW wd=0.01, 8 bits, x rounded": 20.25,
    },
    torch.bfloat16: {
        "MechanicAdamW wd=0.01": BF16_FLOOR["adamw"],
        "MechanicAdamW wd=0": BF16_FLOOR["adamw"],
        "MechanicSGD momentum": 20,
        "MechanicLion wd=0.01": 20,
        "MechanicAdamW wd=0.01, x_ref/8": 26.25,
        "MechanicAdamW wd=0.01, 16 bits": 20,
        "MechanicAdamW wd=0.01, 8 bits": 16.25,
        "MechanicAdamW wd=0.01, x_ref/8, 8 bits": 14.5,
        "MechanicAdamW wd=0.01, 8 bits, x rounded": 12.25,
    },
}


@pytest.fixture(autouse=True)
def uncollected(monkeypatch):
    """No garbage collection between pairs, which in a test run takes most of the time."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture
def step():
    from benchmarks import step

    return step


@pytest.fixture
def baselines():
    from benchmarks._harness import baselines

    return baselines


@pytest.fixture
def tables():
    from benchmarks._harness import tables

    return tables


def test_rows_and_requirements(step, tmp_path, capsys):
    from benchmarks._harness.records import Record

    out = tmp_path / "step.csv"
    cases = "35M,1000x16,39M-muon"
    step.main(["--quick", "--threads", "1", "--cases", cases, "--out", str(out)])
    record = Record.load(out)
    assert record.environment["torch"] == torch.__version__
    assert {row["case"] for row in record.rows} == set(cases.split(","))
    assert all(row["median_s"] > 0 for row in record.rows if "absent" not in row)
    required = [requirement.judge(record.rows, judged=False) for requirement in step.REQUIRED]
    unmeasured = [
        r.case for r, row in zip(step.REQUIRED, required, strict=True) if row["measured"] is None
    ]
    assert unmeasured == ["35M-bf16", "1000x1000"]
    floors = [round(row["floor"], 2) for row in required if row["floor"]]
    # In a miniature more weights are too small to keep a part of x_ref, or a narrow state: at full
    # size they are 1.02, 0.86 and 0.73.
    assert floors == [1.14, 1.14, 1.20, 1.04, 0.88, 0.76, 1.57]
    printed = capsys.readouterr().out
    assert "| MechanicAdamW wd=0.01 " in printed
    assert "figures mean nothing" in printed and "not judged" in printed


@pytest.mark.slow
def test_the_program_runs(run_program, tmp_path):
    out = tmp_path / "step.csv"
    printed = run_program("step", "--quick", "--threads", 1, "--cases", "1000x16", "--out", out)
    assert "| MechanicAdamW wd=0.01 " in printed and out.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--cases", "36M"], "got 36M"),
        (["--rounds", "2"], "3 or more, got 2"),
        (["--threads", "0"], "1 or more, got 0"),
    ],
)
def test_bad_options_are_refused(step, capsys, option, message):
    with pytest.raises(SystemExit):
        step.parse(option)
    assert message in capsys.readouterr().err


def test_bytes_per_parameter(baselines):
    def exact(**options):
        return baselines.adamw("reference", variant="annealed", **options)

    for spec, dtype, expected in (
        (baselines.torch_adamw("fused"), torch.float32, FLOOR["fused"]),
        (baselines.torch_adamw("fused"), torch.bfloat16, BF16_FLOOR["fused"]),
        (baselines.torch_sgd("fused"), torch.float32, FLOOR["sgd fused"]),
    ):
        found = spec.bytes_per_parameter(None, 1, dtype)
        assert found == pytest.approx(expected, rel=1e-3)
    for spec, dtype, expected in (
        (baselines.adamw("reference"), torch.float32, FLOOR["adamw"]),
        (baselines.adamw("reference"), torch.bfloat16, BF16_FLOOR["adamw"]),
        (exact(), torch.float32, EXACT_FLOOR["decayed"]),
        (exact(), torch.bfloat16, BF16_FLOOR["exact"]),
        (exact(decay=0.0), torch.float32, EXACT_FLOOR["plain"]),
        (baselines.sgd(), torch.float32, FLOOR["sgd"]),
    ):
        weights = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3, 0, 65)]
        for x in weights:
            x.grad = torch.ones_like(x)
        optimizer = spec.make(weights)
        optimizer.step()
        assert spec.bytes_per_parameter(optimizer, 68, dtype) == expected


@pytest.mark.parametrize(
    ("dtype", "whole"), [(torch.float32, FLOOR["adamw"]), (torch.bfloat16, BF16_FLOOR["adamw"])]
)
def test_an_eighth_of_x_ref_is_counted_as_such(baselines, dtype, whole):
    weight = torch.nn.Parameter(torch.ones(1 << 14, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    spec = baselines.adamw("reference", x_ref_every=8)
    optimizer = spec.make([weight])
    optimizer.step()
    found = spec.bytes_per_parameter(optimizer, weight.numel(), dtype)
    assert found == whole - 7 / 8 * dtype.itemsize


def test_a_requirement_is_judged_by_its_row(tables):
    requirement = tables.Requirement("case", "ours", "theirs", 2.0)
    row = {"case": "case", "optimizer": "ours", "against": "theirs", "ratio": 1.9}
    row |= {"ratio_q1": 1.8, "ratio_q3": 2.0}
    assert requirement.judge([row])["met"] is True
    assert requirement.judge([{**row, "ratio": 2.1}])["met"] is False
    assert requirement.judge([{**row, "against": "others"}])["met"] is None
    assert requirement.judge([row], judged=False)["met"] is None
    launches = tables.Requirement("case", "ours", None, 3, quantity="launches")
    assert launches.judge([row, {**row, "launches": 3.0}])["met"] is True


def test_a_table_is_aligned(tables):
    text = tables.table(["a", "number"], [["x", "1"], ["yy", "22"]])
    assert text.splitlines() == [
        "| a  | number |",
        "| -- | ------ |",
        "| x  | 1      |",
        "| yy | 22     |",
    ]


def test_an_optimizer_that_fails_leaves_a_row(baselines):
    from benchmarks._harness import measure
    from benchmarks._harness.cases import Case

    def absent(weights):
        raise ModuleNotFoundError("No module named 'package'")

    def broken(weights):
        raise ValueError("broken")

    sgd = baselines.torch_sgd("fused")
    spec = baselines.OptimizerSpec
    pairs = [(spec("A", absent), sgd), (spec("B", broken), sgd), (baselines.sgd(), sgd)]
    budget = measure.Budget(rounds=3, seconds=0.0, copy=1.0)
    case = Case("small", ((4,),))
    rows = list(measure.measure_case(case, pairs, torch.device("cpu"), budget))
    assert [row["optimizer"] for row in rows] == ["A", "B", sgd.name, "MechanicSGD momentum"]
    assert "package" in rows[0]["absent"] and "broken" in rows[1]["failed"]
    assert rows[3]["against"] == sgd.name and rows[3]["ratio"] > 0


def test_the_roofline_predicts_every_case_from_its_bytes(tmp_path, capsys):
    from benchmarks import roofline
    from benchmarks._harness import cases
    from benchmarks._harness.records import Record

    copy, out = 1e12, tmp_path / "roofline.csv"
    roofline.main(["--copy", str(copy), "--out", str(out)])
    assert "predicted ms at 1 TB/s" in capsys.readouterr().out
    found = {(row["case"], row["optimizer"]): row for row in Record.load(out).rows}
    listed = {case.name: case for case in (*cases.GPU, *cases.CPU)}
    assert {case for case, _ in found} == set(listed) and len(found) == 9 * len(listed)
    for name, case in listed.items():
        for optimizer, floor in FLOORS[case.dtype].items():
            row = found[name, optimizer]
            assert row["bytes_per_parameter"] == floor
            assert row["bytes"] == floor * case.parameters
            assert row["predicted_s"] == pytest.approx(row["bytes"] / copy, rel=1e-5)


@pytest.mark.parametrize("copy", ["0", "-1", "nan", "inf"])
def test_the_roofline_refuses_a_bad_copy_speed(capsys, copy):
    from benchmarks import roofline

    with pytest.raises(SystemExit):
        roofline.main(["--copy", copy])
    assert f"above 0, got {float(copy)}" in capsys.readouterr().err


def test_the_roofline_counts_the_dtype_of_the_state(baselines):
    """Momentum in 2 bytes instead of 4, read and written; everything in 8."""
    from benchmarks import roofline

    plain = baselines.lion("reference")
    low = baselines.OptimizerSpec(
        "low",
        lambda weights: MechanicLion(weights, weight_decay=0.1, state_dtype="param"),
        ours=True,
    )
    expected = FLOORS[torch.bfloat16][plain.name]
    assert roofline.bytes_per_parameter(plain, torch.bfloat16) == expected
    assert roofline.bytes_per_parameter(low, torch.bfloat16) == expected - 2 * 2
    doubled = 2 * FLOORS[torch.float32][plain.name]
    assert roofline.bytes_per_parameter(plain, torch.float64) == doubled


def test_a_gpu_case_is_measured_on_the_cpu(monkeypatch):
    """What `python -m benchmarks.gpu` does in a process for each case, here on miniatures."""
    from benchmarks.gpu import parts

    monkeypatch.setattr(parts, "ROUNDS", 3)
    (machine,) = parts.machine("", torch.device("cpu"))
    assert machine["environment"]["copy GB/s"] > 0
    lines = list(parts.run_case("1000x16", torch.device("cpu")))
    rows = [line["row"] for line in lines if "row" in line]
    assert {row["case"] for row in rows} == {"1000x16"}
    absent = [row["optimizer"] for row in rows if "absent" in row]
    assert "mechanic-pytorch AdamW" not in absent
    hosts = [line["host"] for line in lines if "host" in line]
    assert [row["host_s"] > 0 for row in hosts if "host_s" in row] == [True] * 3


@pytest.mark.slow
def test_the_gpu_program_runs_its_parts_on_a_cpu(run_program, tmp_path):
    from benchmarks._harness.records import Record

    out = tmp_path / "gpu.csv"
    printed = run_program(
        *["gpu", "--dry-run", "--parts", "bench", "--cases", "1000x16", "--out", out]
    )
    assert printed.count("ok  ") == 2 and "FAIL" not in printed
    record = Record.load(out)
    assert {row["case"] for row in record.rows} == {"1000x16"}
    assert record.environment["device"] == "cpu (dry run)"
    assert sum("host_s" in row for row in record.rows) == 3
    assert out.with_suffix(".log").exists()
