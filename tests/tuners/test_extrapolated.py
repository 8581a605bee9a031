"""Where ExtrapolatedSGD takes its gradient, and that the weights come back from there."""

import pytest
import torch
from support.cases import FEW, WIDTHS, assert_same, make_weights, values
from support.vector_optimizers import Run

from mechanic_fused.tuners import ExtrapolatedSGD


def test_the_first_gradient_is_taken_at_the_weights_and_later_ones_ahead(backend):
    run = Run("ExtrapolatedSGD", backend, torch.float32).steps(1)
    assert_same(run.closure.seen[0], values(make_weights()))
    before = values(run.params)
    run.steps(1)
    assert len(run.closure.seen) == 2
    assert all(not torch.equal(a, b) for a, b in zip(run.closure.seen[1], before, strict=True))


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_a_gradient_of_0_leaves_the_weights_to_the_bit(backend, dtype):
    options = {"momentum": 0.0, "weight_decay": 0.0}
    run = Run("ExtrapolatedSGD", backend, dtype, **options).steps(FEW)
    before, ahead = values(run.params), []

    def flat():
        ahead.extend(values(run.params))
        for p in run.params:
            p.grad = torch.zeros_like(p)
        return 0.0

    run.opt.step(flat)
    assert not torch.equal(ahead[0], before[0])
    assert_same(values(run.params), before)


def test_a_weight_that_is_frozen_later_is_not_moved_ahead():
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in "ab")
    opt = ExtrapolatedSGD([a, b], lr=0.1)
    seen = []

    def closure():
        opt.zero_grad()
        seen.append(b.detach().clone())
        loss = (a * a).sum() + (b * b).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 6.0
    b.requires_grad_(False)
    opt.step(closure)
    assert torch.equal(seen[-1], b.detach())
