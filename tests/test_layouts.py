"""Every layout of the weights over ranks gives the numbers of a single process."""

import layouts
import pytest
import torch
from conftest import skip_unless_available

STEPS = 20
TOLERANCE = 1e-6
"""Of weights of size 1 in float32: gradients are averaged in another order, 8 ulps of it."""

LAYOUTS = [
    ("fsdp2", 2),
    ("fsdp2 with plain weights", 2),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp2 x tp", 4),
    ("ddp", 2),
    ("zero1", 2),
    ("fsdp1", 2),
    ("fsdp1 flat", 2),
]


def assert_agrees(results, expected, tolerance=TOLERANCE):
    for result in results:
        assert torch.equal(result["scale"], results[0]["scale"])
        assert result["nonfinite"] == expected["nonfinite"]
        torch.testing.assert_close(result["scale"], expected["scale"], rtol=1e-4, atol=0)
        for name, x in expected["weights"].items():
            if name in result["weights"]:
                error = (result["weights"][name].reshape(x.shape) - x).abs().max()
                assert error <= tolerance, (name, float(error))


def named(*names):
    return pytest.mark.parametrize("layout, size", [one for one in LAYOUTS if one[0] in names])


@pytest.mark.parametrize("backend", ["cpp", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize("base", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("layout, size", LAYOUTS)
def test_a_layout_agrees_with_a_single_process(ranks, layout, size, base, backend):
    skip_unless_available(backend)
    results = ranks(size).run("layouts.run", layout, base, STEPS, backend=backend)
    expected = layouts.single(base, STEPS, backend=backend)
    assert_agrees(results, expected)
    moved = max(
        (x - y).abs().max()
        for x, y in zip(expected["weights"].values(), layouts.model().parameters(), strict=True)
    )
    assert moved > 1000 * TOLERANCE


@pytest.mark.parametrize("base", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
@named("fsdp2", "fsdp2 with plain weights", "hsdp", "ddp", "zero1", "fsdp1", "fsdp1 flat")
def test_ranks_with_batches_of_their_own(ranks, layout, size, base):
    """As data is spread in earnest: gradients are averaged in an order of their own."""
    results = ranks(size).run("layouts.run", layout, base, STEPS, own_batches=True)
    assert_agrees(results, layouts.single(base, STEPS, ranks=size))


@pytest.mark.parametrize("base", ["adamw", pytest.param("radam", marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", ["some", "all", "nan"])
@named("fsdp2", "hsdp", "fsdp2 x tp", "fsdp1", "zero1")
def test_absent_and_spoilt_gradients(ranks, layout, size, base, change):
    """Decisions come from sums over all ranks: one rank's NaN is everybody's, no rank goes on
    alone."""
    results = ranks(size).run("layouts.run", layout, base, STEPS, change=change)
    expected = layouts.single(base, STEPS, change=change)
    assert expected["nonfinite"] == (change == "nan")
    assert_agrees(results, expected)


@pytest.mark.parametrize("scale", ["group", "parameter"])
@named("fsdp2", "hsdp", "fsdp2 x tp")
def test_a_scale_for_each_group_or_weight(ranks, layout, size, scale):
    results = ranks(size).run("layouts.run", layout, "adamw", STEPS, scale=scale)
    assert_agrees(results, layouts.single("adamw", STEPS, scale=scale))


@named("fsdp2", "fsdp2 with plain weights", "fsdp2 x tp", "zero1")
def test_an_automatic_start(ranks, layout, size):
    """Norms are of all weights of all ranks."""
    options = {"s_init": "auto", "variant": "scaled"}
    results = ranks(size).run("layouts.run", layout, "adamw", STEPS, **options)
    assert_agrees(results, layouts.single("adamw", STEPS, **options))


@pytest.mark.parametrize(
    "layout, size, calls",
    [
        ("fsdp2", 2, 1),
        ("hsdp", 4, 1),
        ("tp", 2, 1),
        ("fsdp2 x tp", 4, 2),
        ("fsdp1", 2, 1),
        ("ddp", 2, 0),
    ],
)
def test_collectives_of_a_step(ranks, layout, size, calls):
    """One for each process group that shards anything."""
    assert ranks(size).run("layouts.count_collectives", layout) == [calls] * size


@named("fsdp2", "hsdp", "fsdp2 x tp", "ddp", "zero1", "fsdp1")
def test_a_narrow_delta_on_ranks(ranks, layout, size):
    """Replicas round alike, to the bit; shards by bits of their own, so only nearly as one."""
    results = ranks(size).run("layouts.run", layout, "adamw", STEPS, narrow_delta=True)
    expected = layouts.single("adamw", STEPS)
    start = dict(layouts.model().named_parameters())
    for result in results:
        assert torch.equal(result["scale"], results[0]["scale"])
        torch.testing.assert_close(result["scale"], expected["scale"], rtol=0.01, atol=0)
        for name, x in result["weights"].items():
            assert torch.equal(x, results[0]["weights"].get(name, x))
    found = {name: x for result in results for name, x in result["weights"].items()}
    error, moved = 0.0, 0.0
    for name, x in expected["weights"].items():
        error += float((found[name].reshape(x.shape) - x).square().sum())
        moved += float((x - start[name].detach()).square().sum())
    # A rounding of Δ errs by 2⁻⁸ of it at most, and the errors of STEPS are independent.
    assert 0 < error <= (2.0**-8) ** 2 * STEPS * moved


def test_shards_of_a_weight_are_rounded_by_bits_of_their_own(ranks):
    (shard, replica), (other_shard, other_replica) = ranks(2).run("layouts.rounded_shards")
    assert not torch.equal(shard, other_shard)
    assert torch.equal(replica, other_replica)
    assert shard.unique().numel() == 2  # the two neighbours of 1.001
