"""python -m mechanic_fused, bench and doctor."""

import argparse

import pytest
import torch

from mechanic_fused import __main__, backends, bench, doctor

SHAPES = ((7, 5), (11,))


def test_the_report_names_the_backends(capsys):
    __main__.main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in backends.MODULES)


def test_bench_has_a_row_for_each_optimizer(capsys):
    __main__.main(["bench", "--shapes", "7x5, 2*11", "--device", "cpu", "--seconds", "0.01"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 weights, 5.7e-05 M elements, float32, on CPU")
    assert [line[:32].rstrip() for line in lines[3:]] == list(bench.OPTIMIZERS)


def test_the_ratio_and_the_bytes_are_what_was_measured(monkeypatch):
    steps = iter([1.0, 2.0, 1.0, 4.0, 1.0, 3.0] * 100)
    monkeypatch.setattr(bench, "timed", lambda call, device: next(steps))
    rows = bench.measured([(2048, 64)], torch.device("cpu"), 0.0)
    plain, ours, part, codes = rows
    assert (plain.ratio, ours.ratio, ours.seconds) == (1.0, 3.0, 3.0)
    assert plain.held == pytest.approx(8, abs=1e-3)
    assert ours.held == pytest.approx(12, abs=1e-3)
    assert part.held == pytest.approx(8.5, abs=1e-2)
    assert codes.held < 6.2


def test_shapes_of_a_file_are_those_of_its_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save({"model": model.state_dict(), "steps": 3}, tmp_path / "run.pt")
    expected = [tuple(t.shape) for t in model.state_dict().values() if t.is_floating_point()]
    assert bench.shapes_of_file(str(tmp_path / "run.pt")) == expected
    torch.save({"steps": 3}, tmp_path / "empty.pt")
    with pytest.raises(SystemExit, match=r"expected a file of torch\.save with weights"):
        bench.shapes_of_file(str(tmp_path / "empty.pt"))


@pytest.mark.parametrize("text", ["", "3x", "x", "2*", "3,,4", "-1"])
def test_texts_that_are_no_shapes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected shapes such as"):
        bench.parsed_shapes(text)


def test_the_doctor_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = [backends.Row(name, ("cpu",), False, "no compiler") for name in backends.MODULES]
    monkeypatch.setattr(backends, "table", lambda: rows)
    __main__.main(["doctor"])
    printed = capsys.readouterr().out
    assert "missing  the C++ kernels: no compiler" in printed
    assert "OMP_NUM_THREADS is 1" in printed


def test_the_doctor_has_no_complaint_where_all_is_there(monkeypatch):
    rows = [backends.Row(name, ("cpu",), True, "") for name in backends.MODULES]
    monkeypatch.setattr(backends, "table", lambda: rows)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    named = {found.name: found.remedy for found in doctor.findings()}
    assert named["the C++ kernels"] == named["all cores"] == ""


def test_other_words_are_answered_with_what_there_is():
    with pytest.raises(SystemExit, match="doctor: what is missing"):
        __main__.main(["benhc"])
