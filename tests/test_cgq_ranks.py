"""CGQ on ranks: they decide alike, and sharded weights step as whole ones."""

import pytest
import torch
from cases import (
    FEW,
    STEPS,
    SUM_RTOL,
    assert_same,
    make_weights,
)
from cgq_runs import OPTIONS, slopes_of

from mechanic_fused.tuners.cgq import CGQ


def averaged():
    """Ranks with losses of their own and one average gradient, as data parallel training has it."""
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    opt = CGQ([weight], **OPTIONS)
    spread_out = torch.distributed.is_initialized()
    targets = [torch.distributed.get_rank()] if spread_out else [0, 1]
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        losses = [(1 + target) * (weight - 5 * target).square().sum() / 2 for target in targets]
        loss = torch.stack(losses).mean()
        if loss.requires_grad:
            loss.backward()
            if spread_out:
                torch.distributed.all_reduce(weight.grad)
                weight.grad /= torch.distributed.get_world_size()
        return loss

    for _ in range(STEPS):
        opt.step(closure)
    return weight.detach(), opt.param_groups[0]["lr"], calls


def test_ranks_with_losses_of_their_own_decide_alike(ranks):
    first, second = ranks(2).run("test_cgq_ranks.averaged")
    assert_same(first, second)
    weight, lr, calls = averaged()
    assert first[2] == calls
    # One sum of two numbers in another order: none.
    assert first[1] == lr
    assert torch.equal(first[0], weight)


def sharded(probability):
    """Weights that lie over the ranks, or whole ones; what they are after steps, whole."""
    params = make_weights(((4,), (6, 3)), torch.float64)
    if spread_out := torch.distributed.is_initialized():
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        params = [
            torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params
        ]

    def whole(p):
        return p.detach().full_tensor() if spread_out else p.detach()

    opt = CGQ(params, **{**OPTIONS, "probability": probability})
    step = 0

    def closure():
        found = [slopes_of(whole(p), step) for p in params]
        for p, (_, g) in zip(params, found, strict=True):
            grad = distribute_tensor(g, mesh, [Shard(0)]) if spread_out else g
            p.grad = grad if torch.is_grad_enabled() else None
        return torch.tensor(sum(loss for loss, _ in found), dtype=torch.float64)

    for step in range(FEW):  # noqa: B007  the closure reads it
        opt.step(closure)
    return [whole(p).clone() for p in params], opt.param_groups[0]["lr"]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_sharded_weights_step_as_whole_ones(ranks, probability):
    found = ranks(2).run("test_cgq_ranks.sharded", probability)
    assert_same(found[0], found[1])
    expected, lr = sharded(probability)
    if not probability:
        assert_same(found[0], (expected, lr))
        return
    # The slope is added in another order; this leaves room for what the parabola makes of it.
    for p, x in zip(found[0][0], expected, strict=True):
        torch.testing.assert_close(p, x, rtol=SUM_RTOL, atol=SUM_RTOL * FEW * float(x.abs().max()))
    assert found[0][1] == pytest.approx(lr, rel=SUM_RTOL * FEW)
