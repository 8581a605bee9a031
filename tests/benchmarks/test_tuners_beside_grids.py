"""The methods of mechanic_fused.tuners learn in their benchmark; nothing is timed."""

import csv

import pytest

for name in ("pandas", "sklearn", "matplotlib", "tqdm", "tabulate"):
    pytest.importorskip(name)


@pytest.fixture(scope="session")
def convergence():
    """The package with its modules."""
    import benchmarks.convergence.runs

    return benchmarks.convergence


METHODS = (
    *("AutoDrop AdamW", "exponential AdamW", "drops AdamW", "GeN AdamW", "LRTuner AdamW"),
    *("AutoDrop SGD", "exponential SGD", "drops SGD", "LQA", "CGQ", "extrapolated SGD"),
    *("AdaRem", "Flatter, faster SGD", "AutoGD"),
)


def test_every_method_is_listed_here(convergence):
    assert set(METHODS) == set(convergence.tuned.TUNED)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns(convergence, method):
    """Wine at a ninth of its steps: its largest class has two rows in five."""
    start = convergence.tuned.TUNED[method].start
    lr = 2.0**-6 if isinstance(start, str) else start
    row = convergence.runs.run(convergence.runs.Spec("wine", 1, method, lr, "", 0), shorter=9)
    assert row["accuracy"] > 0.7 and row["rate"] > 0


def rows_in(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_table_is_made_from_the_rows(convergence):
    """The committed rows are complete and give a line for each method and task."""
    from benchmarks import tuners
    from benchmarks._harness.records import RESULTS
    from benchmarks.convergence.store import Store

    grids, rows = (Store(RESULTS / f"{name}.csv", {}).rows() for name in ("convergence", "tuners"))
    table = tuners.table(grids, rows, list(METHODS))
    assert len(table) == 3 * len(METHODS)
    line = table[(table.method == "GeN AdamW") & (table.task == "char")].iloc[0]
    assert round(line["behind, %"], 1) == -2.9
    assert not convergence.protocol.missing(rows, tuners.specs(grids, list(METHODS)))


@pytest.mark.slow
def test_the_program_runs_and_resumes(run_program, tmp_path):
    out = tmp_path / "tuners.csv"
    options = ["--methods", "AutoGD", "--quick", "--out", out]
    assert "| AutoGD " in run_program("tuners", *options)
    rows = rows_in(out)
    assert len(rows) == 9
    assert {row["task"] for row in rows} == {"wine", "breast_cancer", "digits_mlp"}
    assert "| AutoGD " in run_program("tuners", *options)
    assert rows_in(out) == rows


def test_the_cost_of_autodrop_is_written(tmp_path, capsys):
    from benchmarks import autodrop
    from benchmarks._harness.records import Record

    out = tmp_path / "autodrop.csv"
    autodrop.main(["--quick", "--threads", "1", "--batch", "2", "--out", str(out)])
    record = Record.load(out)
    elements = int(record.environment["passes on"].split()[0].replace(",", ""))
    assert [row["bytes"] / elements for row in record.rows[:-1]] == [12, 16]
    assert record.rows[-1]["overhead"] > 0
    assert "not judged" in capsys.readouterr().out
