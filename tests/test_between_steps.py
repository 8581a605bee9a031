"""What users, loaders and wrappers may do to weights, gradients, state and groups between steps."""

import pytest
import torch
from torch.nn import Parameter

from mechanic_fused import Lion, MechanicAdamW, MechanicSGD, mechanize


def step(opt, weights, gradient=1.0):
    for p in weights:
        p.grad = torch.full_like(p, gradient)
    opt.step()


def test_a_gradient_of_another_shape_is_refused():
    p = Parameter(torch.ones(4))
    opt = MechanicSGD([p], lr=1.0)
    step(opt, [p])
    p.grad = torch.ones(4)
    p.data = torch.ones(64)
    with pytest.raises(ValueError, match=r"\(64,\).*\(4,\)|\(4,\).*\(64,\)"):
        opt.step()


def test_a_lazily_negated_gradient_counts_as_what_it_is():
    deltas = []
    for gradient in (torch._neg_view(torch.ones(4)), -torch.ones(4)):
        p = Parameter(torch.ones(4))
        opt = MechanicSGD([p], lr=1.0)
        p.grad = gradient
        opt.step()
        deltas.append(opt.state[p]["delta"])
    assert torch.equal(*deltas)


def test_a_weight_without_storage_of_its_own_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    p = Parameter(TwoTensor(torch.ones(4), torch.ones(4)))
    opt = MechanicSGD([p], lr=1.0)
    with pytest.raises(ValueError, match="storage of their own.*TwoTensor"):
        opt.step()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_weight_can_be_repaired_by_hand(broken):
    p = Parameter(torch.ones(3))
    opt = MechanicAdamW([p], lr=1.0)
    step(opt, [p])
    for value in (broken, 3.0):
        with torch.no_grad():
            p[0] = value
        step(opt, [p], 0.0)
    assert torch.isfinite(p).all() and abs(p[0].item() - 3.0) < 1e-3


def test_scales_go_with_their_groups():
    weights = [Parameter(torch.ones(3)) for _ in range(3)]
    opt = MechanicAdamW([{"params": [p]} for p in weights[:2]], lr=1.0, scale="group")
    for t in range(6):
        for p in weights[:2]:
            p.grad = p.detach() * (1.0 if p is weights[0] else (-1.0) ** t)
        opt.step()
    a, b = opt.scale.tolist()
    assert a != b
    opt.param_groups.reverse()
    assert opt.scale.tolist() == [b, a]
    opt.add_param_group({"params": [weights[2]]})
    opt.param_groups.insert(0, opt.param_groups.pop())
    # A new row starts where the run's start was found to be.
    fresh = opt.param_groups[1]["s_init"]
    assert opt.scale.tolist() == [fresh, b, a]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_state_that_was_replaced_or_cleared_is_what_the_next_step_uses(backend):
    p = Parameter(torch.ones(3))
    opt = MechanicAdamW([p], lr=1.0, backend=backend)
    step(opt, [p])
    opt.state[p]["exp_avg"] = torch.full((3,), 5.0)
    step(opt, [p])
    assert (opt.state[p]["exp_avg"] > 4).all()
    opt.state.clear()
    step(opt, [p])
    assert opt.state[p]["step"] == 1 and set(opt.state[p]) >= {"delta", "x_ref", "exp_avg"}


def test_a_new_start_reaches_frozen_weights_too():
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    opt = MechanicSGD([p, q], lr=1.0)
    step(opt, [p, q])
    q.requires_grad_(False)
    step(opt, [p])
    opt.reset_scale()
    assert not opt.state[q]["delta"].any()


def test_frozen_weights_are_not_held_to_what_trained_ones_need():
    p = Parameter(torch.ones(2))
    frozen = Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    opt = MechanicSGD([p, frozen], lr=1.0)
    step(opt, [p])
    assert opt.state[p]["delta"].any() and frozen not in opt.state


@pytest.mark.parametrize("options", [{"amsgrad": True}, {}], ids=["amsgrad", "fused"])
def test_a_plain_checkpoint_of_bfloat16_weights_goes_on(options):
    p = Parameter(torch.ones(3, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([p], **options)
    step(plain, [p])
    opt = MechanicAdamW([p], lr=1.0, **options)
    opt.load_state_dict(plain.state_dict())
    step(opt, [p])
    assert opt.state[p]["exp_avg"].dtype is torch.float32 and opt.state[p]["step"] == 2


class NeedsRate(Lion):
    def __init__(self, params, lr):
        super().__init__(params, lr)


def test_a_base_with_required_arguments_comes_back_plain_and_apart():
    p = Parameter(torch.ones(3))
    opt = mechanize(NeedsRate)([p], lr=1.0)
    step(opt, [p])
    plain = opt.to_base()
    assert type(plain) is NeedsRate and plain.param_groups[0]["lr"] == opt.learned_lr()[0]
    before = opt.state[p]["exp_avg"].clone()
    step(plain, [p])
    assert torch.equal(opt.state[p]["exp_avg"], before)
