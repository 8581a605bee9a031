"""The example that trains one model with every tuner."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def test_all_methods_train_and_are_plotted(run_example, monkeypatch, tmp_path):
    import compare_tuners

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_tuners, "VALIDATION", 1000)
    printed = run_example(compare_tuners, "--steps", 5, "--threads", 1)
    table = printed.splitlines()[2:-2]
    assert {line[:24].strip() for line in table} == set(compare_tuners.METHODS)
    assert Path("out/compare_tuners.png").stat().st_size > 1000
