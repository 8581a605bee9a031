"""The simulation of formats of the state: it runs, judges, and its rivals are what they claim."""

import importlib

import pytest
import torch


@pytest.fixture(scope="module")
def formats():
    return importlib.import_module("benchmarks.state_formats")


def test_the_program_runs_and_says_whether_the_bar_is_kept(formats, tmp_path, capsys):
    out = tmp_path / "made.csv"
    formats.main(["--quick", "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"({formats.BAR} required)" in printed
    assert all(name in printed for name in formats.FORMATS)
    formats.main(["--report", "--out", str(out)])
    assert capsys.readouterr().out == printed


def test_a_wide_state_has_no_error_and_ours_less_than_rounding_by_chance(formats):
    names = {
        "wide": formats.Format(formats.wide, formats.wide, 8),
        formats.OURS: formats.FORMATS[formats.OURS],
        "chance": formats.FORMATS["codes, rounded by chance"],
    }
    found = formats.errors(names, formats.PHASES["stationary"], beta2=0.95, steps=200)
    assert found["wide"] == 0
    assert 0 < found[formats.OURS] < 0.9 * found["chance"] < formats.BAR


def test_a_v_to_nearest_bfloat16_does_not_fall(formats):
    names = ("bfloat16 to nearest", "bfloat16, v rounded by bits that turn")
    chosen = {name: formats.FORMATS[name] for name in names}
    phase = formats.PHASES["all shrink tenfold"]
    nearest, turning = formats.errors(chosen, phase, beta2=0.999, steps=3000).values()
    assert nearest > 0.4
    assert turning < 0.03


def test_the_dynamic_map_has_256_numbers_a_code_and_each_of_them_is_kept(formats):
    for signed in (True, False):
        table = formats._dynamic_map(signed)
        assert len(table) == len(table.unique()) == 256
        stored = formats.dynamic(signed, block=256)(table.clone(), None, None)
        torch.testing.assert_close(stored, table, rtol=1e-6, atol=0)
