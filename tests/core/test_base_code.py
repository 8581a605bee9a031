"""Bases with attributes, keywords and methods under our names, or methods that move weights."""

import copy

import pytest
import torch
from support.cases import assert_same, make_weights, values
from torch.optim import Optimizer

from mechanic_fused import mechanize


class Descent(Optimizer):
    """Plain gradient descent, as the base of the others."""

    def __init__(self, params, lr=1e-3, **defaults):
        super().__init__(params, {"lr": lr, **defaults})

    @torch.no_grad()
    def step(self, closure=None):
        self.before_step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group["lr"])

    def before_step(self):
        pass

    def move(self, p, lr):
        """A method that steps call may move weights."""
        p.sub_(p.grad, alpha=lr)


class Clipping(Descent):
    """With a norm of its own, where 0 means none."""

    def __init__(self, params, lr=1e-3, max_grad_norm=0.0, scale=2.0):
        self.max_grad_norm, self.seen = max_grad_norm, []
        self.factor = scale
        super().__init__(params, lr)

    def before_step(self):
        self.seen.append(self.max_grad_norm)
        self.max_grad_norm += 1


def trained(cls, *args, steps=4, **options):
    params = make_weights()
    opt = mechanize(cls)(params, *args, lr=1.0, **options)
    take(opt, params, steps)
    return opt, params


def take(opt, params, steps):
    for _ in range(steps):
        for p in params:
            p.grad = p.detach() + 0.5
        opt.step()


def test_a_bases_attribute_under_our_name_is_its_own():
    opt, params = trained(Clipping)
    assert opt.seen == [0.0, 1.0, 2.0, 3.0, 4.0][: len(opt.seen)]
    assert len(opt.seen) >= 4
    assert opt.max_grad_norm is None
    _, expected = trained(Descent)
    assert_same(values(params), values(expected))


def test_ours_is_ours_all_the_same():
    opt, params = trained(Clipping, max_grad_norm=0.1)
    assert opt.max_grad_norm == 0.1
    assert opt.seen[0] == 0.0
    _, expected = trained(Descent, max_grad_norm=0.1)
    assert_same(values(params), values(expected))
    _, free = trained(Descent)
    assert not torch.equal(params[0], free[0])


def test_a_keyword_of_both_goes_to_the_base_by_base_options():
    opt, _ = trained(Clipping, max_grad_norm=0.5, base_options={"max_grad_norm": 7.0, "scale": 3.0})
    assert opt.seen[0] == 7.0
    assert opt.max_grad_norm == 0.5
    assert opt.factor == 3.0


def test_copies_keep_both():
    opt, _ = trained(Clipping)
    other = copy.deepcopy(opt)
    assert other.max_grad_norm is None
    other.seen = []
    [group] = other.param_groups
    take(other, group["params"], 1)
    assert other.seen == [opt.seen[-1] + 1]


@pytest.mark.parametrize("name", ["scale", "grad_norm", "watch", "learned_lr"])
def test_a_base_that_sets_what_is_ours_alone_is_refused(name):
    class Setting(Descent):
        def __init__(self, params, lr=1e-3):
            super().__init__(params, lr)
            setattr(self, name, 1.0)

    with pytest.raises(TypeError, match=f"the base must leave {name} to MechanicSetting"):
        mechanize(Setting)(make_weights(), lr=1.0)


def test_an_attribute_error_of_a_base_stays_its_own():
    class Failing(Descent):
        def __init__(self, params, lr=1e-3):
            super().__init__(params, lr)
            self.missing.append(1)

    with pytest.raises(AttributeError, match="missing"):
        mechanize(Failing)(make_weights(), lr=1.0)


def test_a_base_whose_groups_have_our_entries_is_refused():
    with pytest.raises(TypeError, match=r"must leave the entries \['variant'\]"):
        mechanize(Descent)(make_weights(), lr=1.0, base_options={"variant": "own"})


def test_a_base_with_a_method_under_our_name_is_refused():
    class Observing(Descent):
        def observe(self, loss):
            pass

    with pytest.raises(TypeError, match="Base must not have a method observe"):
        mechanize(Observing)


@pytest.mark.parametrize("names", [("train", "eval"), ("first_step", "second_step")])
def test_bases_that_are_known_to_move_weights_elsewhere_are_refused(names):
    base = type("Moving", (Descent,), dict.fromkeys(names, lambda self: None))
    with pytest.raises(TypeError, match=rf"got Moving, whose {names[0]}\(\) and {names[1]}\(\)"):
        mechanize(base)


class Averaging(Descent):
    @torch.no_grad()
    def show_averages(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.5)

    def count(self, more=0):
        return len(self.param_groups) + more


def test_a_method_that_moves_weights_raises_and_leaves_them():
    opt, params = trained(Averaging)
    params[0].data[...] = torch.nan
    before = [p.detach().clone() for p in params]
    with pytest.raises(TypeError, match=r"show_averages\(\) of the base must leave the weights"):
        opt.show_averages()
    assert_same(values(params), before)
    assert opt.count(more=2) == 3
    assert_same(values(params), before)


def test_schedule_free_optimizers_are_refused():
    schedulefree = pytest.importorskip("schedulefree")
    with pytest.raises(TypeError, match=r"whose train\(\) and eval\(\)"):
        mechanize(schedulefree.AdamWScheduleFree)


class Narrow(Descent):
    """Keeps a momentum in bfloat16 beside float32 weights, and codes of its own."""

    def move(self, p, lr):
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, dtype=torch.bfloat16)
            state["counts"] = torch.zeros_like(p, dtype=torch.uint8)
        assert state["momentum"].dtype is torch.bfloat16
        assert state["counts"].dtype is torch.uint8
        state["momentum"].lerp_(p.grad.bfloat16(), 0.5)
        state["counts"] += 1
        p.sub_(state["momentum"].to(p.dtype), alpha=lr)


def test_a_base_keeps_what_it_stores_in_a_dtype_of_its_own_choice():
    """Also where a checkpoint is loaded before the first step."""
    expected, whole = trained(Narrow, steps=8)
    opt, params = trained(Narrow, steps=4)
    other = mechanize(Narrow)(params, lr=1.0)
    other.load_state_dict(opt.state_dict())
    take(other, params, 4)
    assert_same(values(params), values(whole))
    assert torch.equal(other.scale, expected.scale)
    dtypes = [(s["momentum"].dtype, s["counts"].dtype) for s in other.state.values()]
    assert set(dtypes) == {(torch.bfloat16, torch.uint8)}


def test_methods_may_be_called_where_weights_have_no_numbers():
    weights = [torch.nn.Parameter(torch.empty(3, device="meta"))]
    opt = mechanize(Averaging)(weights, lr=1.0)
    assert opt.count() == 1


def test_a_step_under_fake_tensor_mode_may_call_methods():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.ones(4))]
        opt = mechanize(Narrow)(weights, lr=1.0)
        weights[0].grad = torch.ones(4)
        opt.step()
        assert set(opt.state[weights[0]]) >= {"momentum", "x_ref"}
