"""Sums over weights that are spread over ranks: what a single process finds, on every rank.

The functions without ``test_`` run on every rank of a pool.
"""

import pytest
import torch
from cases import SUM_RTOL, assert_same
from conftest import skip_unless_available
from mechanic_fused.vectors import Space
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mechanic_fused.distributed import local
from mechanic_fused.vectors.reference import AdaRemOptions

RANKS = 2
# Uneven, a single row (the other rank has nothing), and one for a second dimension.
SHAPES = ((7, 3), (1, 8), (5,), (6, 4))
# The last one stays whole on every rank, and must be counted once.
WHOLE = len(SHAPES) - 1
OPTIONS = AdaRemOptions(lr=0.4, beta=0.9, boost=0.999, decay=0.01, eps=1e-8)


def full(seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in SHAPES]


def mesh():
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def on_a_mesh(vectors):
    """DTensors, sharded along either dimension, and a plain tensor."""
    placed = [
        distribute_tensor(x, mesh(), [Shard(x.dim() - 1 if x.shape[0] == 1 else 0)])
        for x in vectors[:WHOLE]
    ]
    return [*placed, vectors[WHOLE].clone()]


def in_parts(vectors):
    """Plain tensors of which every rank has a part, one of them none of the rows."""
    rank = torch.distributed.get_rank()
    return [part[rank].clone() for part in (chunks(x) for x in vectors)]


def chunks(x):
    return [*x.split((len(x) + RANKS - 1) // RANKS), x[:0]][:RANKS]


def verbs(layout, backend, spoilt=None):
    """What every verb that returns numbers returns."""
    lay = {"mesh": on_a_mesh, "parts": in_parts, "single": lambda vectors: vectors}[layout]
    group = torch.distributed.group.WORLD if layout == "parts" else None
    vectors = [full(seed) for seed in range(4)]
    if spoilt is not None:
        vectors[1][0][spoilt] = torch.nan
    x, g, a, s = map(lay, vectors)
    space = Space([torch.nn.Parameter(p) for p in x], backend, group)
    g, a, s = ([local(t) for t in v] for v in (g, a, s))
    found = {
        "dots": space.dots(g, a, s),
        "abs_max": space.abs_max(g),
        "difference_dots": space.difference_dots(s, g, a),
        "adarem": space.adarem(g, s, space.abs_max(s), OPTIONS),
    }
    return found


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("layout", ["mesh", "parts"])
def test_ranks_agree_with_a_single_process(ranks, layout, backend):
    skip_unless_available(backend)
    first, second = ranks(RANKS).run("test_vectors_ranks.verbs", layout, backend)
    assert_same(second, first)
    expected = verbs("single", backend)
    for name in ("abs_max", "adarem"):
        assert_same(first[name], expected[name])
    g, a, s = (torch.cat([x.flatten() for x in full(seed)]).double() for seed in (1, 2, 3))
    fresh = (g.float() - a.float()).double()
    products = {"dots": (g * g, g * a, a * a, g * s), "difference_dots": (fresh * s, fresh * fresh)}
    for name, terms in products.items():
        sizes = torch.stack([term.abs().sum() for term in terms])
        sums = torch.stack([term.sum() for term in terms])
        for other in (expected[name], sums):
            assert ((first[name] - other).abs() <= SUM_RTOL * sizes).all()


@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("layout", ["mesh", "parts"])
def test_a_nan_of_one_rank_is_the_largest_everywhere(ranks, layout, row):
    for found in ranks(RANKS).run("test_vectors_ranks.verbs", layout, "reference", spoilt=row):
        assert found["abs_max"].isnan().tolist() == [True, False, False, False]


def largest_beside_a_strided_part():
    """The reference takes the part that is not dense; only one rank has such a part."""
    rank = torch.distributed.get_rank()
    room = torch.arange(16.0).reshape(8, 2) + 100 * rank
    part = room[:4, 0] if rank else room[:4, 0].contiguous()
    spread = DTensor.from_local(part, mesh(), [Shard(0)], run_check=False)
    other = distribute_tensor(torch.arange(6.0), mesh(), [Shard(0)])
    return Space([torch.nn.Parameter(other), torch.nn.Parameter(spread)], "cpp").abs_max(
        [local(other), part]
    )


def test_ranks_whose_parts_lie_differently_reduce_alike(ranks):
    skip_unless_available("cpp")
    for found in ranks(RANKS).run("test_vectors_ranks.largest_beside_a_strided_part"):
        assert found.tolist() == [5, 106]


def gradients_placed_otherwise():
    p = torch.nn.Parameter(distribute_tensor(torch.zeros(7, 3), mesh(), [Shard(0)]))
    whole = torch.arange(21.0).reshape(7, 3)
    p.grad = distribute_tensor(whole, mesh(), [Replicate()])
    (g,) = Space([p]).gradients()
    return torch.equal(g, distribute_tensor(whole, mesh(), [Shard(0)]).to_local())


def test_gradients_are_sharded_as_their_weights(ranks):
    assert ranks(RANKS).run("test_vectors_ranks.gradients_placed_otherwise") == [True, True]
