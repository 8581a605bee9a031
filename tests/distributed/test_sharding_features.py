"""What users do beside the plain loop works with weights sharded over ranks too."""

import copy

import pytest
import torch
from support import sharding
from support.sharding import (
    BASES,
    LAYOUTS,
    LOSS_SCALE,
    OPTIONS,
    SPOILT_STEP,
    STEPS,
    Run,
    assert_agrees,
    assert_equals_single_process,
)
from torch import distributed, nn

from mechanic_fused import MechanicAdamW


def on(*layouts):
    return pytest.mark.parametrize("layout", layouts)


# The fallback beside DistributedDataParallel


@on("ddp", "zero1")
def test_gradients_of_bfloat16_weights_are_still_reduced_after_a_step_of_the_fallback(
    ranks, layout
):
    """A weight that has once had data of another dtype has lost DDP's hooks on its gradient."""
    options = {"base": "radam", "dtype": torch.bfloat16, "own_batches": 2}
    results = ranks(2).run(sharding.run, layout, **options)
    # One ulp of bfloat16 at 4.
    assert_agrees(results, sharding.run("single", **options), tolerance=2**-6)


# GradScaler


@pytest.mark.parametrize("fused", [False, True])
@on("fsdp2", "hsdp", "ddp")
def test_all_ranks_skip_the_step_in_which_one_overflows(ranks, layout, fused):
    options = {"change": "inf", "loss_scale": LOSS_SCALE, "fused": fused}
    results, _ = assert_equals_single_process(ranks, layout, **options)
    assert [result["factor"] for result in results] == [LOSS_SCALE / 2] * len(results)


def test_a_sharded_grad_scaler_serves_fsdp1(ranks):
    options = {"change": "inf", "loss_scale": LOSS_SCALE, "fused": True}
    assert_equals_single_process(ranks, "fsdp1", **options)


def test_all_ranks_of_several_meshes_skip_together(ranks):
    """GradScaler asks the ranks of one mesh only. Its own factor then differs between ranks, so
    that the steps after this one cannot be right; the docs say so."""
    options = {"change": "inf", "loss_scale": LOSS_SCALE, "fused": True, "steps": SPOILT_STEP + 1}
    assert_equals_single_process(ranks, "fsdp2 x tp", **options)


# Clipping, several passes, release


@pytest.mark.parametrize("bound", [0.5, pytest.param(100.0, marks=pytest.mark.slow)])
@on("fsdp2", "hsdp", "tp", "fsdp2 x tp", "fsdp1", "zero1")
def test_max_grad_norm_bounds_the_norm_over_all_ranks(ranks, layout, bound):
    """Also over weights on several meshes, where clip_grad_norm_ raises."""
    _, expected = assert_equals_single_process(ranks, layout, max_grad_norm=bound)
    clipped = [norm > bound for norm in expected["norms"]]
    assert len(clipped) == STEPS
    assert all(clipped) or not any(clipped)


@on("fsdp2", "hsdp", "ddp")
def test_clipping_by_torch_equals_a_single_process(ranks, layout):
    assert_equals_single_process(ranks, layout, clip_by_torch=0.5)


def test_a_nan_on_one_rank_does_not_spoil_the_norm(ranks):
    options = {"max_grad_norm": 0.5, "change": "nan"}
    _, expected = assert_equals_single_process(ranks, "fsdp2", **options)
    assert all(norm > 0 for norm in expected["norms"])


@on("fsdp2", "hsdp", "ddp")
def test_several_passes_per_step_equal_a_single_process(ranks, layout):
    assert_equals_single_process(ranks, layout, passes=2)


@on("fsdp2", "hsdp")
def test_released_gradients_give_the_ordinary_step(ranks, layout):
    results = ranks(LAYOUTS[layout].ranks).run(sharding.run, layout, released=True)
    assert_agrees(results, sharding.run("single"))


def refuse_release():
    """Hooks would see gradients that DistributedDataParallel has not reduced so far."""
    opt = Run("ddp").opt
    with pytest.raises(ValueError, match="plain weights in a world of 2 ranks"):
        opt.release_gradients()
    opt.release_gradients(reduced=True)


def test_release_refuses_plain_weights_of_several_ranks(ranks):
    ranks(2).run(refuse_release)


# Pipeline stages


def pipeline_stage(steps=STEPS, **options):
    """Train one half of the weights on each rank; the other half is the other rank's stage."""
    run = Run("single")
    weights = list(run.net.parameters())
    world = distributed.group.WORLD
    own = [p for i, p in enumerate(weights) if i % 2 == distributed.get_rank()]
    run.opt = run.inner = BASES["adamw"](own, extra_groups=[world], **{**OPTIONS, **options})
    for t in range(steps):
        run.net.zero_grad()
        run.train(t, 1)
        # A real pipeline keeps the halves apart; here both are needed for the next forward pass.
        for i, p in enumerate(weights):
            distributed.broadcast(p.detach(), i % 2)
    return run.result()


@pytest.mark.parametrize(
    "options",
    [{"steps": 2 * STEPS}, {"max_grad_norm": 0.5}, {"s_init": "auto"}],
    ids=["plain", "clipped", "calibrated"],
)
def test_pipeline_stages_learn_one_scale(ranks, options):
    assert_agrees(ranks(2).run(pipeline_stage, **options), sharding.run("single", **options))


def idle_stage():
    """Train one stage beside a frozen one; return whether this rank's weight has moved, and S."""
    rank, world = distributed.get_rank(), distributed.group.WORLD
    weight = nn.Parameter(torch.ones(3), requires_grad=rank == 1)
    opt = MechanicAdamW([weight], lr=1.0, extra_groups=[world], **OPTIONS)
    for _ in range(4):
        if rank == 1:
            weight.grad = torch.full((3,), 2.0)
        opt.step()
    return bool((weight != 1).any()), float(opt.scale)


def test_a_stage_that_trains_nothing_does_not_block_the_others(ranks):
    (frozen, scale), (moved, other) = ranks(2).run(idle_stage)
    assert moved
    assert not frozen
    assert scale == other > 0


# Process groups


def lose_groups():
    """A copy cannot have the process groups of its original."""
    other = copy.deepcopy(Run("fsdp1").opt)
    with pytest.raises(RuntimeError, match="set reduce_group"):
        other.step()
    other.reduce_group = distributed.group.WORLD
    other.step()


def forget_the_group():
    """Without its group each rank of FSDP1 would learn from its own shard."""
    run = Run("fsdp1", reduce_group=None)
    run.backward(0)
    with pytest.raises(ValueError, match="need reduce_group="):
        run.opt.step()


@pytest.mark.parametrize("forget", [lose_groups, forget_the_group])
def test_an_error_names_the_process_group_that_is_missing(ranks, forget):
    ranks(2).run(forget)
