"""Results on disk: what is written is read back, and the committed results give their tables."""

import importlib

import pytest


@pytest.fixture
def records():
    from benchmarks._harness import records

    return records


def test_rows_and_environment_are_read_back(records, tmp_path):
    rows = [
        {"case": "a, b", "rounds": 3, "median_s": 0.0123456789, "released": False},
        {"case": "c", "ratio": 2.0},
    ]
    path = tmp_path / "made" / "step.csv"
    records.Record({"commit": "1", "cores": 2}, rows).save(path)
    found = records.Record.load(path)
    assert found.environment == {"commit": "1", "cores": 2}
    assert found.rows == [{**rows[0], "median_s": 0.0123457}, rows[1]]


def test_results_in_a_folder_keep_their_own_environments(records, tmp_path):
    records.Record({"commit": "1"}).save(tmp_path / "one.csv")
    records.Record({"commit": "2"}).save(tmp_path / "two.csv")
    assert records.environments(tmp_path / "one.csv") == [{"commit": "1"}]
    assert records.environments(tmp_path / "two.csv") == [{"commit": "2"}]
    assert records.environments(tmp_path / "three.csv") == []


def test_an_environment_gets_a_new_number_only_if_it_differs(records, tmp_path):
    path = tmp_path / "convergence.csv"
    first = {"commit": "1", "date": "today", "load": 0.5}
    assert records.number_of(path, first) == 0
    assert records.number_of(path, {**first, "date": "tomorrow", "load": 1.0}) == 0
    assert records.number_of(path, {**first, "commit": "2"}) == 1
    assert records.number_of(path, first) == 0


@pytest.mark.parametrize(
    ("module", "result", "cells"),
    [
        ("step", "step", ["35M", "MechanicAdamW wd=0.01", "30.4"]),
        ("gpu.__main__", "gpu_h100", ["1.5B", "MechanicAdamW wd=0.01, cuda", "17.5"]),
        ("distributed", "distributed", ["35M", "fsdp2", "MechanicAdamW wd=0.01", "40.7"]),
        ("memory", "memory", ["MechanicAdamW", "released", "2051.8", "2078.1", "26.3"]),
        ("state_formats", "state_formats", ["codes of 8 bits, blocks of 64", "0.1", "0.11"]),
        ("autodrop", "autodrop", ["running sum", "421", "11.3", "16.3", "0.705"]),
    ],
)
def test_committed_results_give_their_tables(records, capsys, module, result, cells):
    program = importlib.import_module(f"benchmarks.{module}")
    program.main(["--report", "--out", str(records.RESULTS / f"{result}.csv")])
    printed = capsys.readouterr().out
    assert "commit " in printed
    lines = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    assert any(line[1 : 1 + len(cells)] == cells for line in lines)


def test_committed_results_are_small(records):
    assert sum(path.stat().st_size for path in records.RESULTS.iterdir()) < 400_000
