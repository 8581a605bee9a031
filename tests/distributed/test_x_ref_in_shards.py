"""x_ref of one block in eight, of weights that ranks share: the run of a single process."""

import copy

import pytest
import torch
from support import sharding
from support.cases import RUNNING
from support.sharding import LAYOUTS, Run, assert_agrees, assert_equals_single_process
from test_sharded_checkpoints import FORMS, HALF, resume, save
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from mechanic_fused import MechanicSGD
from mechanic_fused.distributed import element_range
from mechanic_fused.torch_internals import local

WIDTH = 72
"""Both matrices have 10,368 elements, and shards that begin within a block of 128."""

PART = {"variant": RUNNING, "s_init": None, "width": WIDTH, "x_ref_every": 8}
ROWWISE = {"tp": ("down",), "fsdp2 x tp": ("down",)}
"""Layout → the weights that tensor parallelism shards by their columns."""


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("base", ["adamw", slow("sgd"), slow("lion"), "radam"])
@pytest.mark.parametrize("layout", [name for name in sharding.SHARDED if name != "fsdp1 flat"])
def test_a_layout_equals_a_single_process(ranks, layout, base):
    options = {**PART, "base": base, "steps": 20, "whole": ROWWISE.get(layout, ())}
    assert_equals_single_process(ranks, layout, observed=True, **options)


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1"])
def test_shards_may_be_uneven(ranks, layout):
    """Of three ranks: theirs begin in the midst of packets of 16 bytes."""
    options = {**PART, "steps": 12, "width": 71, "observed": True}
    results = ranks(3).run(sharding.run, layout, **options)
    assert_agrees(results, sharding.run("single", **options))


def test_a_flat_weight_is_one_weight_whatever_the_number_of_ranks(ranks):
    options = {**PART, "steps": 12, "observed": True}
    two, three = (ranks(n).run(sharding.run, "fsdp1 flat", **options) for n in (2, 3))
    assert_agrees(three, two[0])


def kept_sizes(layout):
    """Return how many x_refs this rank keeps, and has in all, after a step."""
    run = Run(layout, **PART)
    run.train(0, 1)
    entries = [entries for entries in run.inner.state.values() if "x_ref" in entries]
    kept = sum(e["x_ref"].numel() for e in entries)
    return kept, sum(local(e["exp_avg"]).numel() for e in entries)


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1"])
def test_ranks_keep_a_part_of_their_shards(ranks, layout):
    whole = sum(p.numel() for p in sharding.model(width=WIDTH).parameters())
    found = ranks(2).run(kept_sizes, layout)
    assert sum(size for _, size in found) >= whole
    assert all(kept < size / 3 for kept, size in found)


# Where a shard is not one range


def refused(x_ref_every):
    weight = nn.Parameter(distribute_tensor(torch.ones(72, 144), sharding.flat_mesh(), [Shard(1)]))
    opt = MechanicSGD([{"params": [weight], "x_ref_every": x_ref_every}], lr=1.0)
    weight.grad = torch.ones_like(weight)
    try:
        opt.step()
    except ValueError as error:
        return str(error), len(opt.state)
    return "", len(opt.state)


def test_shards_of_columns_are_refused_before_anything_has_changed(ranks):
    for text, states in ranks(2).run(refused, 8):
        assert "Shard(dim=0)" in text
        assert "or x_ref_every=1 in its param group, got (Shard(dim=1),)" in text
        assert states == 0
    assert ranks(2).run(refused, 1) == [("", 1)] * 2


def ranges():
    """Return the ranges of this rank of several weights, and those that their numbers tell."""
    flat, square = sharding.flat_mesh(), sharding.square_mesh()
    cases = [
        ((10, 3), flat, [Shard(0)]),
        ((3, 5), flat, [Shard(0)]),
        ((1, 10, 3), flat, [Shard(1)]),
        ((10, 3), square, [Shard(0), Shard(0)]),
        ((7, 2), square, [Shard(0), Shard(0)]),
    ]
    found = []
    for shape, mesh, placements in cases:
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)
        weight = distribute_tensor(numbers, mesh, placements)
        shard = weight.to_local().flatten()
        start, size = element_range(weight)
        assert size == numbers.numel()
        found.append(shard.numel() == 0 or shard.equal(start + torch.arange(shard.numel())))
    return found


def test_the_range_of_a_shard_is_what_its_numbers_say(ranks):
    assert all(all(found) for found in ranks(4).run(ranges))


# Checkpoints


@pytest.fixture(scope="module")
def expected():
    return sharding.run("single", 2 * HALF, **PART)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["hsdp", "fsdp2 x tp"])
def test_a_run_of_two_ranks_resumes_under_another_layout(ranks, tmp_path, layout, form):
    options = {**PART, "whole": ROWWISE.get(layout, ())}
    ranks(2).run(save, str(tmp_path), form, **options)
    results = ranks(LAYOUTS[layout].ranks).run(resume, str(tmp_path), form, layout, **options)
    assert_agrees(results, sharding.run("single", 2 * HALF, **options))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["sharded", "flattened", "full"])
def test_a_run_of_two_ranks_resumes_in_one_process(ranks, tmp_path, expected, form):
    ranks(2).run(save, str(tmp_path), form, **PART)
    assert_agrees([resume(str(tmp_path), form, "single", **PART)], expected)


@pytest.mark.parametrize("base", ["adamw", "radam"])
def test_a_run_resumes_under_its_own_layout_to_the_bit(ranks, tmp_path, base):
    options = {**PART, "base": base}
    ranks(2).run(save, str(tmp_path), "sharded", **options)
    resumed = ranks(2).run(resume, str(tmp_path), "sharded", **options)
    through = ranks(2).run(sharding.run, "fsdp2", 2 * HALF, **options)
    assert_agrees(resumed, through[0], tolerance=0.0)


@pytest.mark.parametrize("form", ["sharded", "full"])
@pytest.mark.parametrize("layout", ["fsdp1", "fsdp1 flat"])
def test_fsdp1_hands_the_state_on(ranks, tmp_path, layout, form):
    ranks(2).run(save, str(tmp_path), form, layout, **PART)
    resumed = ranks(2).run(resume, str(tmp_path), form, layout, **PART)
    through = ranks(2).run(sharding.run, layout, 2 * HALF, **PART)
    assert_agrees(resumed, through[0])


def test_fsdp1_keeps_the_blocks_of_whole_weights(ranks, tmp_path, expected):
    """So its checkpoint goes on anywhere."""
    ranks(2).run(save, str(tmp_path), "full", "fsdp1", **PART)
    assert_agrees(ranks(4).run(resume, str(tmp_path), "full", "hsdp", **PART), expected)


def through_zero1(**options):
    """Train to the middle, move the state to a new run by ZeroRedundancyOptimizer's way, go on."""
    from torch import distributed

    one, other = Run("zero1", **options), Run("zero1", **options)
    one.train(0, HALF)
    one.opt.consolidate_state_dict(to=0)
    saved = [one.opt.state_dict() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(saved)
    other.net.load_state_dict(copy.deepcopy(one.net.state_dict()))
    other.opt.load_state_dict(saved[0])
    other.train(HALF, HALF)
    return other.result()


def test_zero1_hands_the_state_on(ranks):
    resumed = ranks(2).run(through_zero1, **PART)
    through = ranks(2).run(sharding.run, "zero1", 2 * HALF, **PART)
    assert_agrees(resumed, through[0])


def refuses_a_part(folder):
    whole = {**PART, "x_ref_every": 1}
    try:
        resume(folder, "sharded", **whole)
    except ValueError as error:
        return str(error)
    return ""


def test_a_part_does_not_load_into_a_whole_x_ref_and_a_whole_one_loads_into_a_part(ranks, tmp_path):
    ranks(2).run(save, str(tmp_path / "part"), "sharded", **PART)
    for text in ranks(2).run(refuses_a_part, str(tmp_path / "part")):
        assert "lacks most of x_ref: expected x_ref_every=8 for param group 0, got 1" in text
    ranks(2).run(save, str(tmp_path / "whole"), "sharded", **{**PART, "x_ref_every": 1})
    results = ranks(4).run(resume, str(tmp_path / "whole"), "sharded", "hsdp", **PART)
    assert all(torch.equal(r["scale"], results[0]["scale"]) for r in results)
