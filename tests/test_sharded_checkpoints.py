"""What torch.distributed.checkpoint saves under one layout goes on under another."""

import layouts
import pytest
import sharded_runs
import torch
from test_layouts import assert_agrees

HALF = 6


@pytest.fixture
def expected():
    return layouts.single("adamw", 2 * HALF)


@pytest.mark.parametrize("form", sharded_runs.FORMS)
@pytest.mark.parametrize(
    "layout, size",
    [("fsdp2", 2), ("hsdp", 4), pytest.param("fsdp2 x tp", 4, marks=pytest.mark.slow)],
)
def test_saved_on_two_ranks_resumed_elsewhere(ranks, tmp_path, expected, layout, size, form):
    save = ("fsdp2", "adamw", str(tmp_path), form, HALF)
    ranks(2).run("sharded_runs.save", *save)
    load = (layout, "adamw", str(tmp_path), form, HALF, HALF)
    assert_agrees(ranks(size).run("sharded_runs.resume", *load), expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["sharded", "flattened", "full"])
def test_saved_on_two_ranks_resumed_by_one_process(ranks, tmp_path, expected, form):
    ranks(2).run("sharded_runs.save", "fsdp2", "adamw", str(tmp_path), form, HALF)
    result = sharded_runs.resume("single", "adamw", str(tmp_path), form, HALF, HALF)
    assert_agrees([result], expected)


@pytest.mark.parametrize("base", ["adamw", "sgd", "lion", "radam"])
def test_saved_and_resumed_under_the_same_layout_to_the_bit(ranks, tmp_path, base):
    run = ("sharded_runs.save", "fsdp2", base, str(tmp_path), "sharded", HALF)
    ranks(2).run(*run)
    load = ("fsdp2", base, str(tmp_path), "sharded", HALF, HALF)
    resumed = ranks(2).run("sharded_runs.resume", *load)
    through = ranks(2).run("layouts.run", "fsdp2", base, 2 * HALF)
    assert_agrees(resumed, through[0], tolerance=0.0)


def test_low_precision_keeps_its_wide_state(ranks, tmp_path):
    """Loaders cast state to the weight's dtype: a bfloat16 Δ would forget small updates."""
    narrow = {"dtype": torch.bfloat16}
    ranks(2).run("sharded_runs.save", "fsdp2", "adamw", str(tmp_path), "sharded", HALF, **narrow)
    load = ("hsdp", "adamw", str(tmp_path), "sharded", HALF, HALF)
    results = ranks(4).run("sharded_runs.resume", *load, **narrow)
    single = layouts.single("adamw", 2 * HALF, **narrow)
    kinds = results[0]["dtypes"]
    assert kinds["delta"] is kinds["exp_avg"] is torch.float32
    assert kinds["x_ref"] is torch.bfloat16
    # A weight may round to the other side: one ulp of bfloat16 at 4.
    assert_agrees(results, single, tolerance=2**-6)


@pytest.mark.parametrize("base", ["adamw", "radam"])
@pytest.mark.parametrize("layout, size", [("fsdp2", 2), ("fsdp2 x tp", 4)])
def test_a_dry_step_changes_nothing(ranks, layout, size, base):
    results = ranks(size).run("sharded_runs.look_before_the_first_step", layout, base, HALF)
    assert_agrees(results, layouts.single(base, HALF))
    assert "exp_avg" in results[0]["names"]
