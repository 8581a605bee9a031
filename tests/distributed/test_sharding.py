"""Every layout of the weights over ranks gives the results of a single process."""

import pytest
import torch
from support import sharding
from support.cases import RUNNING, skip_unless_available
from support.sharding import (
    LAYOUTS,
    NORMS_BYTES,
    SHARDED,
    STEPS,
    SUMS_BYTES,
    TOLERANCE,
    Collectives,
    assert_equals_single_process,
)
from torch import distributed, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mechanic_fused import MechanicSGD

LONG = 20
CALIBRATION_BYTES, FLAG_BYTES = 3 * 8, 8


def on(*layouts):
    return pytest.mark.parametrize("layout", layouts)


@on(*SHARDED)
def test_a_layout_equals_a_single_process(ranks, layout):
    """With batches of their own, where data is spread over ranks: gradients are then averaged in
    another order than in one process."""
    own_batches = 0 if "tp" in layout else LAYOUTS[layout].ranks
    _, expected = assert_equals_single_process(ranks, layout, own_batches=own_batches)
    start = sharding.model().named_parameters()
    moved = max((expected["weights"][name] - x).abs().max() for name, x in start)
    assert moved > 1000 * TOLERANCE


# The running form: S starts from the losses, of which each rank has one of its own.
RUNNING_FORM = {"variant": RUNNING, "s_init": None, "steps": LONG}


@on(*SHARDED)
def test_the_running_form_equals_a_single_process(ranks, layout):
    # A hidden unit that comes alive late has gradients of 5e-8 at first, rounding errors of the
    # sums over ranks, of which Adam's own ε of 1e-8 would make a whole step. Others are of 2e-3.
    own_batches = 0 if "tp" in layout else LAYOUTS[layout].ranks
    options = {**RUNNING_FORM, "eps": 1e-6, "own_batches": own_batches}
    if layout != "fsdp1 flat":
        _, expected = assert_equals_single_process(ranks, layout, observed=True, **options)
        assert expected["source"] == "loss"
    _, expected = assert_equals_single_process(ranks, layout, **options)
    assert expected["source"] == "norms"


@pytest.mark.parametrize("base", ["sgd", "lion", "radam"])
@pytest.mark.parametrize("change", ["some", "all", "nan"])
@on("fsdp2 with plain weights", "fsdp2 x tp")
def test_ranks_agree_in_the_running_form(ranks, layout, base, change):
    options = {**RUNNING_FORM, "base": base, "change": change, "observed": True}
    assert_equals_single_process(ranks, layout, **options)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("base", ["adamw", "sgd", "lion", "radam"])
@on(*SHARDED)
def test_every_base_on_every_backend_equals_a_single_process(ranks, layout, base, backend):
    skip_unless_available(backend)
    options = {"base": base, "backend": backend, "steps": LONG}
    assert_equals_single_process(ranks, layout, **options)


@pytest.mark.parametrize("base", ["sgd", "lion", "radam"])
def test_every_base_equals_a_single_process(ranks, base):
    assert_equals_single_process(ranks, "fsdp2 with plain weights", base=base)


@pytest.mark.parametrize("base", ["adamw", pytest.param("radam", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", ["some", "all", "nan"])
@on("fsdp2", pytest.param("hsdp", marks=pytest.mark.slow), "fsdp2 x tp", "fsdp1", "zero1")
def test_ranks_agree_on_absent_and_nonfinite_gradients(ranks, layout, change, base):
    """Decisions come from sums over all ranks: a NaN on one rank counts on all of them."""
    _, expected = assert_equals_single_process(ranks, layout, base=base, change=change)
    assert expected["nonfinite"] == (change == "nan")


@pytest.mark.parametrize("scale_per", ["group", "parameter"])
@on("fsdp2", "hsdp", "fsdp2 x tp")
def test_scales_per_group_and_per_parameter_equal_a_single_process(ranks, layout, scale_per):
    assert_equals_single_process(ranks, layout, scale_per=scale_per)


@on("fsdp2", "fsdp2 with plain weights", "fsdp2 x tp", "zero1")
def test_s_init_is_calibrated_from_all_weights_of_all_ranks(ranks, layout):
    assert_equals_single_process(ranks, layout, s_init="auto", variant="annealed")


# Collectives


def collectives_of_a_step(layout, warm=2, loss_scale=None, stages=False, **options):
    """Return the bytes of each all-reduce in the step after ``warm`` others."""
    run = sharding.Run(layout, **options)
    if stages:
        run.opt.extra_groups = (distributed.group.WORLD,)
    run.train(0, warm)
    # The gradients that tensor parallelism places otherwise than their weights are moved first.
    run.backward(warm)
    for p in run.net.parameters():
        if hasattr(p, "placements"):
            p.grad = p.grad.redistribute(p.device_mesh, p.placements)
    if loss_scale:
        run.opt.grad_scale, run.opt.found_inf = torch.tensor(loss_scale), torch.tensor(0.0)
    with Collectives() as collectives:
        run.opt.step()
    # ZeroRedundancyOptimizer broadcasts the weights.
    assert layout == "zero1" or not collectives.others
    return collectives.reductions


@pytest.mark.parametrize(
    ("layout", "reductions"),
    [
        ("ddp", []),
        ("fsdp2", [1]),
        ("fsdp2 with plain weights", [1]),
        ("hsdp", [1]),
        ("tp", [1]),
        # Over dp the sums of weights that are sharded over dp alone, and of those over tp too.
        ("fsdp2 x tp", [2, 1]),
        ("fsdp1", [1]),
        ("fsdp1 flat", [1]),
        ("zero1", [1]),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_step_reduces_once_per_process_group_that_shards(
    ranks, layout, reductions, max_grad_norm
):
    """And once more to clip. docs/distributed.md has this table."""
    expected = [rows * SUMS_BYTES for rows in reductions]
    if max_grad_norm:
        expected = [rows * NORMS_BYTES for rows in reductions] + expected
    size = LAYOUTS[layout].ranks
    found = ranks(size).run(collectives_of_a_step, layout, max_grad_norm=max_grad_norm)
    assert found == [expected] * size


@pytest.mark.parametrize(
    ("layout", "options", "expected"),
    [
        ("ddp", {"stages": True}, [SUMS_BYTES]),
        ("fsdp2", {"stages": True}, [SUMS_BYTES, SUMS_BYTES]),
        ("fsdp2", {"warm": 0}, [NORMS_BYTES, SUMS_BYTES]),
        ("fsdp2", {"warm": 0, "max_grad_norm": 1.0}, [NORMS_BYTES, SUMS_BYTES]),
        ("fsdp2", {"warm": 0, "s_init": "auto"}, [NORMS_BYTES, CALIBRATION_BYTES, SUMS_BYTES]),
        ("fsdp2", {"s_init": "auto"}, [SUMS_BYTES]),
        # Torch has reduced found_inf over the one mesh, and must be helped with two.
        ("fsdp2", {"fused": True, "loss_scale": 2.0}, [SUMS_BYTES]),
        (
            "fsdp2 x tp",
            {"fused": True, "loss_scale": 2.0},
            [2 * FLAG_BYTES, FLAG_BYTES, 2 * SUMS_BYTES, SUMS_BYTES],
        ),
    ],
)
def test_a_further_question_to_all_ranks_takes_one_further_reduction(
    ranks, layout, options, expected
):
    """What other stages have summed; whether any gradient is not 0, in steps up to the first such;
    norms to calibrate s_init; whether any rank has met an overflow."""
    size = LAYOUTS[layout].ranks
    assert ranks(size).run(collectives_of_a_step, layout, **options) == [expected] * size


# Δ in bfloat16


@on("fsdp2", "hsdp", "fsdp2 x tp", "ddp", "zero1", "fsdp1")
def test_a_bfloat16_delta_is_near_a_single_process_and_the_same_on_replicas(ranks, layout):
    """Shards draw bits of their own, so a sharded run is a single process's on average only."""
    results = ranks(LAYOUTS[layout].ranks).run(sharding.run, layout, delta_dtype=torch.bfloat16)
    expected = sharding.run("single")
    found = {name: x for result in results for name, x in result["weights"].items()}
    for result in results:
        assert torch.equal(result["scale"], results[0]["scale"])
        torch.testing.assert_close(result["scale"], expected["scale"], rtol=0.01, atol=0)
        for name, x in result["weights"].items():
            assert torch.equal(x, found[name])
    error, moved = 0.0, 0.0
    for name, start in sharding.model().named_parameters():
        x = expected["weights"][name]
        error += float((found[name].reshape(x.shape) - x).square().sum())
        moved += float((x - start.detach()).square().sum())
    # A rounding of Δ errs by 2⁻⁸ of it at most, and the errors of different steps are independent.
    assert 0 < error <= (2.0**-8) ** 2 * STEPS * moved


def rounded_deltas():
    """Return Δ after a step with one gradient everywhere: a sharded and a replicated weight's."""
    found = []
    for placement in (Shard(0), Replicate()):
        weight = nn.Parameter(
            distribute_tensor(torch.zeros(8, 64), sharding.flat_mesh(), [placement])
        )
        weight.grad = torch.full_like(weight, -1.001)
        opt = MechanicSGD([weight], lr=1.0, delta_dtype=torch.bfloat16, **sharding.OPTIONS)
        opt.step()
        found.append(opt.state[weight]["delta"].to_local())
    return found


def test_shards_are_rounded_by_different_bits_and_replicas_by_the_same(ranks):
    (shard, replica), (other_shard, other_replica) = ranks(2).run(rounded_deltas)
    assert not torch.equal(shard, other_shard)
    assert torch.equal(replica, other_replica)
    assert shard.unique().numel() == 2  # the two neighbours of 1.001
