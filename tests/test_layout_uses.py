"""Scalers, clipping, containers and pipeline stages with weights spread over ranks."""

import layout_uses
import layouts
import pytest
import torch
from test_layouts import assert_agrees

from mechanic_fused import MechanicAdamW, step_together

STEPS = 8


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout, size", [("fsdp2", 2), ("hsdp", 4), ("ddp", 2)])
def test_grad_scaler(ranks, layout, size, fused):
    """An overflow on one rank is skipped by all, and the scale halves everywhere."""
    results = ranks(size).run("layout_uses.scaled_run", layout, STEPS, fused=fused)
    expected = layout_uses.scaled_run("single", STEPS, fused=fused)
    assert_agrees(results, expected)
    assert [result["factor"] for result in results] == [512.0] * size


def test_ranks_skip_together_on_several_meshes(ranks):
    """GradScaler asks the ranks of one mesh only. (Its own scale then differs between ranks, so
    that the steps after this one cannot be right; the docs say so.)"""
    overflow = 4
    results = ranks(4).run("layout_uses.scaled_run", "fsdp2 x tp", overflow, fused=True)
    assert_agrees(results, layout_uses.scaled_run("single", overflow))


def test_sharded_grad_scaler(ranks):
    results = ranks(2).run(
        "layout_uses.scaled_run", "fsdp1", STEPS, sharded_scaler=True, fused=True
    )
    assert_agrees(results, layout_uses.scaled_run("single", STEPS))


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
@pytest.mark.parametrize(
    "layout, size",
    [("fsdp2", 2), ("hsdp", 4), ("tp", 2), ("fsdp2 x tp", 4), ("fsdp1", 2), ("zero1", 2)],
)
def test_clipping_inside(ranks, layout, size, max_norm):
    """Also over weights on several meshes, where clip_grad_norm_ raises."""
    results = ranks(size).run("layout_uses.clipped_run", layout, STEPS, max_norm, inside=True)
    expected = layout_uses.clipped_run("single", STEPS, max_norm, inside=False)
    assert_agrees(results, expected)
    for found in results:
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert found["norms"] == results[0]["norms"]
    clipped = [norm > max_norm for norm in expected["norms"]]
    assert all(clipped) or not any(clipped)


@pytest.mark.parametrize("layout, size", [("fsdp2", 2), ("hsdp", 4), ("ddp", 2)])
def test_clipping_by_torch(ranks, layout, size):
    results = ranks(size).run("layout_uses.clipped_run", layout, STEPS, 0.5, inside=False)
    assert_agrees(results, layout_uses.clipped_run("single", STEPS, 0.5, inside=False))


@pytest.mark.parametrize("layout, size", [("fsdp2", 2), ("hsdp", 4), ("ddp", 2)])
def test_several_passes_a_step(ranks, layout, size):
    results = ranks(size).run("layout_uses.accumulated_run", layout, STEPS)
    assert_agrees(results, layout_uses.accumulated_run("single", STEPS))


def test_a_nan_does_not_spoil_the_norm(ranks):
    run = ("layout_uses.clipped_run", "fsdp2", STEPS, 0.5, True, "nan")
    results = ranks(2).run(*run)
    expected = layout_uses.clipped_run("single", STEPS, 0.5, True, "nan")
    assert_agrees(results, expected)
    assert results[0]["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert all(norm > 0 for norm in expected["norms"])


def test_pipeline_stages(ranks):
    results = ranks(2).run("layout_uses.pipeline_stage", 2 * STEPS)
    assert_agrees(results, layouts.single("adamw", 2 * STEPS))


def test_pipeline_stages_with_clipping(ranks):
    results = ranks(2).run("layout_uses.pipeline_stage", STEPS, max_grad_norm=0.5)
    assert_agrees(results, layouts.single("adamw", STEPS, max_grad_norm=0.5))


def test_a_container_of_optimizers_learns_one_scale(ranks):
    expected = layouts.single("adamw", STEPS)
    assert_agrees([layout_uses.contained_run(STEPS, sharded=False)], expected)
    assert_agrees(ranks(2).run("layout_uses.contained_run", STEPS), expected)


def test_a_container_resumes_from_one_flat_state_dict(ranks):
    through = ranks(2).run("layout_uses.contained_run", STEPS)
    resumed = ranks(2).run("layout_uses.contained_run", STEPS, saved_at=4)
    assert_agrees(resumed, through[0], tolerance=0.0)


def test_process_groups_that_are_missing_are_named(ranks):
    ranks(2).run("layout_uses.lose_groups")
    ranks(2).run("layout_uses.forget_the_group")


def test_a_stage_that_trains_nothing_does_not_hold_up_the_others(ranks):
    ranks(2).run("layout_uses.idle_stage")


@pytest.mark.parametrize(
    "name, values",
    [("max_grad_norm", (1.0, None)), ("s_init", (1e-3, 1e-4)), ("scale", ("group", "group"))],
)
def test_optimizers_that_step_together_must_be_alike(name, values):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in values]
    parts = zip(weights, values, strict=True)
    optimizers = [MechanicAdamW([w], **{name: value}) for w, value in parts]
    with pytest.raises(ValueError, match="optimizers that step together must have"):
        step_together(optimizers)
