"""What a vector op cannot read raises before anything has changed, instead of reaching a kernel."""

import pytest
import torch
from support.tensors import WithoutStorage, at_an_odd_address, cut, freed

from mechanic_fused.tuners import CGQ, AdaRem, ExtrapolatedSGD
from mechanic_fused.vectors.space import Space

SIZE = 50_000
MAKERS = {
    "AdaRem": lambda ps: AdaRem(ps, lr=0.1, backend="cpp"),
    "CGQ": lambda ps: CGQ(ps, lr=0.1, backend="cpp"),
    "ExtrapolatedSGD": lambda ps: ExtrapolatedSGD(ps, lr=0.1, backend="cpp"),
}
UNREADABLE = {
    "without storage": WithoutStorage,
    "freed": freed,
    "cut": cut,
    "at an odd address": at_an_odd_address,
}


def _closure(p, gradient):
    def closure():
        p.grad = gradient
        return torch.ones(())

    return closure


def _started(maker):
    p = torch.nn.Parameter(torch.randn(SIZE))
    opt = MAKERS[maker]([p])
    opt.step(_closure(p, torch.ones(SIZE)))
    return p, opt


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_gradient_that_cannot_be_read_is_refused(maker, kind):
    p, opt = _started(maker)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="storage"):
        opt.step(_closure(p, UNREADABLE[kind](torch.ones(SIZE))))
    assert torch.equal(p, before)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_gradient_whose_shape_was_changed_in_place_is_refused(maker):
    p, opt = _started(maker)
    gradient = torch.ones(SIZE)
    p.grad = gradient
    gradient.data = torch.ones(3)
    with pytest.raises(ValueError, match="shape and device"):
        opt.step(_closure_that_keeps(p))


def _closure_that_keeps(p):
    return lambda: torch.ones(())


def test_a_weight_that_was_freed_is_refused():
    p, opt = _started("AdaRem")
    p.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage"):
        opt.step(_closure(p, torch.ones(SIZE)))


def test_state_that_was_replaced_by_a_tensor_without_storage_is_refused():
    p, opt = _started("AdaRem")
    opt.state[p]["exp_avg"] = WithoutStorage(opt.state[p]["exp_avg"])
    with pytest.raises(ValueError, match="storage"):
        opt.step(_closure(p, torch.ones(SIZE)))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_weights_that_share_memory_are_refused(backend):
    memory = torch.zeros(100)
    with pytest.raises(ValueError, match="share memory"):
        Space([memory[:60], memory[40:]], backend)
    with pytest.raises(ValueError, match="storage"):
        Space([WithoutStorage(memory)], backend)
