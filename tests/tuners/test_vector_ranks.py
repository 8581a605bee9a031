"""Ops on vectors that are sharded over ranks: every rank finds what a single process does."""

import pytest
import torch
from support.cases import SUM_RTOL, assert_same, skip_unless_available
from support.vector_ops import OPTIONS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mechanic_fused.torch_internals import local
from mechanic_fused.vectors import Space

RANKS = 2
# Uneven; a single row, of which one rank has nothing; one for a second dimension; and one that
# stays whole on every rank of a mesh, and must be counted once.
SHAPES = ((7, 3), (1, 8), (5,), (6, 4))


def draw(seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in SHAPES]


def mesh():
    return init_device_mesh("cpu", (RANKS,))


def on_a_mesh(vector):
    """Return DTensors, sharded along either dimension, and a plain tensor."""
    *sharded, whole = vector
    dims = [x.dim() - 1 if len(x) == 1 else 0 for x in sharded]
    pairs = zip(sharded, dims, strict=True)
    return [*(distribute_tensor(x, mesh(), [Shard(dim)]) for x, dim in pairs), whole.clone()]


def in_parts(vector):
    """Return this rank's part of plain tensors."""
    rank = torch.distributed.get_rank()
    return [[*x.split(-(-len(x) // RANKS)), x[:0]][rank].clone() for x in vector]


def results(layout, backend, nan_at=None):
    """Return what every op that returns numbers returns."""
    lay_out = {"mesh": on_a_mesh, "parts": in_parts, "single": list}[layout]
    group = torch.distributed.group.WORLD if layout == "parts" else None
    vectors = [draw(seed) for seed in range(4)]
    if nan_at is not None:
        vectors[1][0][nan_at] = torch.nan
    x, *others = map(lay_out, vectors)
    space = Space([torch.nn.Parameter(p) for p in x], backend, group)
    g, a, s = ([local(t) for t in v] for v in others)
    return {
        "dots": space.dots(g, a, s),
        "abs_max": space.abs_max(g),
        "difference_dots": space.difference_dots(s, g, a),
        "adarem": space.adarem(g, s, space.abs_max(s), OPTIONS),
    }


@pytest.mark.parametrize("layout", ["mesh", "parts"])
def test_ranks_agree_with_a_single_process(ranks, backend, layout):
    found = ranks(RANKS).run("test_vector_ranks.results", layout, backend)
    assert_same(*found)
    expected = results("single", backend)
    for name in ("abs_max", "adarem"):
        assert_same(found[0][name], expected[name])
    g, a, s = (torch.cat([x.flatten() for x in draw(seed)]).double() for seed in (1, 2, 3))
    d = (g.float() - a.float()).double()
    products = {"dots": (g * g, g * a, a * a, g * s), "difference_dots": (d * s, d * d)}
    for name, terms in products.items():
        sizes = torch.stack([term.abs().sum() for term in terms])
        sums = torch.stack([term.sum() for term in terms])
        for other in (expected[name], sums):
            assert ((found[0][name] - other).abs() <= SUM_RTOL * sizes).all()


@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("layout", ["mesh", "parts"])
def test_a_nan_of_one_rank_is_the_largest_everywhere(ranks, layout, row):
    for found in ranks(RANKS).run("test_vector_ranks.results", layout, "reference", nan_at=row):
        assert found["abs_max"].isnan().tolist() == [True, False, False, False]


def largest_beside_a_strided_shard():
    """Only one rank has a shard that is not dense, so only there the reference takes it."""
    rank = torch.distributed.get_rank()
    memory = torch.arange(16.0).reshape(8, 2) + 100 * rank
    shard = memory[:4, 0] if rank else memory[:4, 0].contiguous()
    strided = DTensor.from_local(shard, mesh(), [Shard(0)], run_check=False)
    other = distribute_tensor(torch.arange(6.0), mesh(), [Shard(0)])
    space = Space([torch.nn.Parameter(other), torch.nn.Parameter(strided)], "cpp")
    return space.abs_max([local(other), shard])


def test_ranks_whose_shards_differ_in_layout_reduce_alike(ranks):
    skip_unless_available("cpp")
    for found in ranks(RANKS).run("test_vector_ranks.largest_beside_a_strided_shard"):
        assert found.tolist() == [5, 106]


def gradients_with_other_placements():
    p = torch.nn.Parameter(distribute_tensor(torch.zeros(7, 3), mesh(), [Shard(0)]))
    whole = torch.arange(21.0).reshape(7, 3)
    p.grad = distribute_tensor(whole, mesh(), [Replicate()])
    (g,) = Space([p]).gradients()
    return torch.equal(g, distribute_tensor(whole, mesh(), [Shard(0)]).to_local())


def test_gradients_are_sharded_as_their_weights(ranks):
    assert ranks(RANKS).run("test_vector_ranks.gradients_with_other_placements") == [True, True]
