"""Muon over sharded matrices: the numbers of a single process, whoever owns which matrix."""

import pytest
import torch
from support import sharding
from support.cases import assert_near, assert_same
from support.placed_runs import load, placing, save
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from mechanic_fused import MechanicMuon, owners

MATRICES = ((7, 12), (7, 12), (7, 12), (1, 8), (16, 6), (16, 6), (3, 8, 6), (6, 4, 2, 1))
"""Rows that no two ranks share evenly; one row; tall; experts; a convolution."""
OTHERS = ((9,), (11, 5))
STEPS, HALF = 6, 3


def whole_gradient(shape, t):
    return torch.randn(shape, generator=torch.Generator().manual_seed(97 * t + sum(shape)))


class Run:
    """Matrices under a layout, other weights, and their optimizer."""

    def __init__(self, layout, **options):
        self.place = placing(layout, least_dim=2)
        start = [whole_gradient(shape, -1) for shape in (*MATRICES, *OTHERS)]
        self.params = [nn.Parameter(self.place(x)) for x in start]
        n = len(MATRICES)
        groups = [
            {"params": self.params[:n], "use_muon": True},
            {"params": self.params[n:], "use_muon": False},
        ]
        options = {"s_init": 0.02, "ns_dtype": torch.float32, **options}
        self.opt = MechanicMuon(groups, **options)

    def train(self, first, steps):
        for t in range(first, first + steps):
            for p in self.params:
                p.grad = self.place(whole_gradient(tuple(p.shape), t))
            self.opt.step(loss=2.0)
        return self

    def result(self):
        weights = [p.detach() for p in self.params]
        whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in weights]
        return {"scale": self.opt.scale, "weights": whole}


def trained(layout, **options):
    return Run(layout, **options).train(0, STEPS).result()


def assert_agrees(found, expected):
    torch.testing.assert_close(found["scale"], expected["scale"], rtol=1e-6, atol=0)
    assert_near(found["weights"], expected["weights"], 1e-6)


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        ("Shard(0)", 2),
        ("Shard(0)", 3),
        ("Shard(1)", 2),
        ("hsdp", 4),
        ("replicas", 2),
        ("rows and columns", 4),
        ("Shard(0) twice", 4),
    ],
)
@pytest.mark.parametrize("options", [{}, {"s_init": None}, {"max_grad_norm": 0.5}], ids=str)
def test_every_layout_has_the_numbers_of_a_single_process(ranks, layout, world, options):
    expected = trained(None, **options)
    results = ranks(world).run(trained, layout, **options)
    assert_same(*results)
    assert_agrees(results[0], expected)


def counts_of_products(layout):
    """Return how many matrices this rank has orthogonalized in a step."""
    from mechanic_fused.backends import orthogonalize

    made, newton_schulz = [], orthogonalize.newton_schulz

    def note(matrices, *options):
        made.append(len(matrices))
        return newton_schulz(matrices, *options)

    orthogonalize.newton_schulz = note
    try:
        Run(layout).train(0, 1)
    finally:
        orthogonalize.newton_schulz = newton_schulz
    return sum(made)


def test_each_matrix_has_one_owner(ranks):
    """Three experts of the ten matrices are sharded by whole ones."""
    found = ranks(3).run(counts_of_products, "Shard(0)")
    assert sum(found) == counts_of_products(None) == len(MATRICES) + 2


def split(layout, **options):
    """Three ranks, two weights of fused projections: one rank owns none."""
    place = Run(layout).place
    params = [nn.Parameter(place(whole_gradient((12, 8), i))) for i in range(2)]
    group = {"params": params, "use_muon": True, "split_sizes": (3, 9)}
    opt = MechanicMuon([group], s_init=0.02, **options)
    for t in range(STEPS):
        for i, p in enumerate(params):
            p.grad = place(whole_gradient((12, 8), 10 * t + i))
        opt.step()
    whole = [p.detach() for p in params]
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in whole]
    return {"scale": opt.scale, "weights": whole}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rank_may_own_no_matrix(ranks, dtype):
    expected = split(None, ns_dtype=dtype)
    results = ranks(3).run(split, "Shard(0)", ns_dtype=dtype)
    assert_same(*results)
    if dtype is torch.float32:
        assert_agrees(results[0], expected)


def test_row_counts_are_those_of_torch():
    for rows in range(12):
        for n in range(1, 6):
            chunks = [len(chunk) for chunk in torch.arange(rows).chunk(n)] if rows else []
            assert owners.row_counts(rows, n) == chunks + [0] * (n - len(chunks))


def without_some_gradients(layout):
    """A rank without a gradient lends its shard; its own stays where it is."""
    run = Run(layout)
    rank = distributed.get_rank()
    for t in range(STEPS):
        before = None
        for i, p in enumerate(run.params):
            p.grad = run.place(whole_gradient(tuple(p.shape), t))
            if t == 2 and rank == 1 and i == 0:
                p.grad, before = None, p.to_local().clone()
        run.opt.step(loss=2.0)
        assert before is None or torch.equal(run.params[0].to_local(), before)
    return run.result()


def test_ranks_may_lack_a_gradient(ranks):
    found = ranks(2).run(without_some_gradients, "Shard(0)")
    assert_same(*found)
    assert all(x.isfinite().all() for x in found[0]["weights"])


def plain(layout):
    """Steps of what to_base() gives."""
    run = Run(layout).train(0, 2)
    base = run.opt.to_base()
    for p in run.params:
        p.grad = run.place(whole_gradient(tuple(p.shape), 7))
    base.step()
    return run.result()


@pytest.mark.parametrize(("layout", "world"), [("Shard(0)", 2), ("Shard(1)", 2), ("hsdp", 4)])
def test_the_plain_one_steps_shards_too(ranks, layout, world):
    expected = plain(None)
    for found in ranks(world).run(plain, layout):
        assert_agrees(found, expected)


# Real wrappers


def optimizer_of(net, **options):
    named = list(net.named_parameters())
    # Parallel styles place the gradients of these otherwise than their weights.
    matrices = [p for name, p in named if p.dim() == 2 and ("up" in name or "down" in name)]
    chosen = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "use_muon": True},
        {"params": [p for _, p in named if id(p) not in chosen], "use_muon": False},
    ]
    return MechanicMuon(groups, s_init=0.02, ns_dtype=torch.float32, **options)


def wrapped(layout):
    net, needed = sharding.LAYOUTS[layout].wrap(sharding.model())
    if layout == "ddp":
        needed["loss_group"] = distributed.group.WORLD
    opt = optimizer_of(net, **needed)
    for t in range(STEPS):
        opt.zero_grad()
        loss = sharding.loss_of(net, sharding.batch(t))
        loss.backward()
        if layout == "fsdp2 with plain weights":
            sharding.average_plain_gradients(net)
        opt.step(loss=loss.detach())
    return {"scale": opt.scale, "weights": list(sharding.full_weights(net).values())}


@pytest.mark.parametrize(
    "layout", ["fsdp2", "fsdp2 with plain weights", "hsdp", "tp", "fsdp2 x tp", "ddp"]
)
def test_wrapped_models_have_the_numbers_of_a_single_process(ranks, layout):
    results = ranks(sharding.LAYOUTS[layout].ranks).run(wrapped, layout)
    expected = wrapped("single")
    # The gradients themselves are sums over ranks, added in another order.
    for found in results:
        torch.testing.assert_close(found["scale"], expected["scale"], rtol=1e-5, atol=0)
        assert_near(found["weights"], expected["weights"], 1e-5)


# Checkpoints


def save_half(folder, layout):
    save(Run(layout).train(0, HALF), folder)


def resume(folder, layout):
    run = Run(layout).train(0, 1)
    load(run, folder)
    return run.train(HALF, HALF).result()


@pytest.mark.parametrize(("layout", "world"), [("Shard(0)", 2), ("Shard(0)", 3), ("hsdp", 4)])
def test_what_two_ranks_save_goes_on_on_others(ranks, tmp_path, layout, world):
    ranks(2).run(save_half, str(tmp_path), "Shard(0)")
    results = ranks(world).run(resume, str(tmp_path), layout)
    assert_same(*results)
    if (layout, world) == ("Shard(0)", 2):
        assert_same(results[0], ranks(2).run(trained, "Shard(0)")[0])
    assert_agrees(results[0], trained(None))


# What is refused


def flat_shards():
    p = nn.Parameter(torch.ones(4, 4))
    opt = MechanicMuon([p])
    opt.reduce_group = distributed.group.WORLD
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"expected DTensors .*got reduce_group"):
        opt.step()


def test_plain_shards_are_refused(ranks):
    ranks(2).run(flat_shards)
