"""benchmarks.bases: a base trains, resumes, or says why it does not."""

import pytest
import torch


@pytest.fixture(scope="module")
def bases():
    from benchmarks import bases

    return bases


def test_a_base_trains_beside_its_rates_and_resumes(bases):
    row = bases.measure("torch RAdam", torch.optim.RAdam, 10)
    assert row["how"] == "fallback"
    assert 0 < row["accuracy"] <= 1
    assert 0 < row["best of five rates"] <= 1
    assert row["resumes"] is True
    assert "why" not in row


def test_muon_is_given_its_groups(bases):
    row = bases.measure("mechanic_fused Muon", bases.bases()["mechanic_fused Muon"], 10)
    assert (row["how"], row["resumes"]) == ("fused", True)


def test_what_does_not_run_says_why(bases):
    row = bases.measure("torch LBFGS", torch.optim.LBFGS, 10)
    assert "LBFGS, which needs one" in row["why"]


def test_the_table_is_printed_again(bases, capsys, tmp_path):
    bases.main(["--quick", "--out", str(tmp_path / "bases.csv")])
    printed = capsys.readouterr().out
    assert "| torch AdamW | fused " in printed
    bases.main(["--report", "--out", str(tmp_path / "bases.csv")])
    assert capsys.readouterr().out == printed
