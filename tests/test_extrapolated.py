"""ExtrapolatedSGD against its formula in NumPy, and that x comes back from where it looked."""

import copy

import numpy
import pytest
import torch
from cases import (
    FEW,
    STEPS,
    assert_same,
    assert_within,
    gradients,
    loss_of,
    make_weights,
    set_gradients,
    snapshot,
    ulp,
    values,
)

from mechanic_fused.tuners import ExtrapolatedSGD

OPTIONS = {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.02, "extrapolation": 1.5}
VARIANTS = {
    "all": {},
    "no momentum": {"momentum": 0.0},
    "no decay": {"weight_decay": 0.0},
    "plain": {"momentum": 0.0, "weight_decay": 0.0},
}
# A step is 8 roundings of numbers no larger than the largest among x, g and d; momentum adds up to
# 1/(1 − momentum) of them, and the quadratic shrinks what earlier steps have left.
ROUNDINGS = 8 / (1 - 0.8)
NUMPY = {torch.float64: numpy.float64, torch.float32: numpy.float32}


def oracle(dtype, steps=STEPS, **options):
    """The weights after steps in plain arithmetic of one dtype, and the largest number met."""
    o = {k: NUMPY[dtype](v) for k, v in {**OPTIONS, **options}.items()}
    xs = [p.detach().numpy().astype(NUMPY[dtype]) for p in make_weights(dtype=dtype)]
    gs = ds = [numpy.zeros_like(x) for x in xs]
    largest = 0.0
    for t in range(steps):
        halves = [x - o["extrapolation"] * o["lr"] * g for x, g in zip(xs, gs, strict=True)]
        gs = [g.numpy() for g in gradients([torch.from_numpy(x) for x in halves], t)]
        pairs = zip(ds, gs, xs, strict=True)
        ds = [o["momentum"] * d + (g + o["weight_decay"] * x) for d, g, x in pairs]
        xs = [x - o["lr"] * d for x, d in zip(xs, ds, strict=True)]
        largest = max([largest, *(abs(v).max() for v in xs + gs + ds)])
    return [torch.from_numpy(x) for x in xs], torch.tensor(largest, dtype=dtype)


class Closure:
    """Sets the gradients of step t where the weights are, and remembers where that was."""

    def __init__(self, params):
        self.params, self.t, self.seen = params, 0, []

    def __call__(self):
        assert torch.is_grad_enabled()
        self.seen.append(values(self.params))
        set_gradients(self.params, self.t)
        self.t += 1
        return loss_of(self.params)


def train(opt, params, steps=STEPS, first=0):
    closure = Closure(params)
    closure.t = first
    for _ in range(steps):
        opt.step(closure)
    return closure


def trained(backend="auto", dtype=torch.float64, steps=STEPS, **options):
    params = make_weights(dtype=dtype)
    opt = ExtrapolatedSGD(params, **{**OPTIONS, **options}, backend=backend)
    return params, opt, train(opt, params, steps)


def worst(found, expected):
    return max(
        float((a.detach().double() - b.double()).abs().max())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_follows_the_formula(backend, options):
    expected, largest = oracle(torch.float64, **options)
    params, _, closure = trained(backend, **options)
    assert len(closure.seen) == STEPS
    for p, x in zip(params, expected, strict=True):
        assert_within(p, x, STEPS * ROUNDINGS * ulp(largest))


def test_looking_ahead_matters_to_the_formula():
    expected, largest = oracle(torch.float64)
    other, _ = oracle(torch.float64, extrapolation=1.49)
    assert worst(other, expected) > STEPS * ROUNDINGS * ulp(largest)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_float32_is_as_near_as_plain_arithmetic(backend, options):
    expected, _ = oracle(torch.float64, **options)
    plain, largest = oracle(torch.float32, **options)
    params, _, _ = trained(backend, torch.float32, **options)
    assert worst(params, expected) <= 2 * worst(plain, expected) + ulp(largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_backends_agree_to_the_bit(cpp, dtype):
    assert_same(snapshot(trained(cpp, dtype)[1]), snapshot(trained("reference", dtype)[1]))


def test_bfloat16_weights_keep_wide_state(backend):
    start = loss_of(make_weights(dtype=torch.bfloat16))
    params, opt, _ = trained(backend, torch.bfloat16)
    assert loss_of(params) < start
    for p in params:
        assert {name: v.dtype for name, v in opt.state[p].items()} == {
            "last_gradient": torch.float32,
            "momentum_buffer": torch.float32,
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_to_the_bit(backend, dtype):
    _, opt, _ = trained(backend, dtype)
    half, first, _ = trained(backend, dtype, FEW)
    resumed = [torch.nn.Parameter(x) for x in values(half)]
    second = ExtrapolatedSGD(resumed, lr=1.0, backend=backend)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, resumed, STEPS - FEW, first=FEW)
    assert_same(snapshot(second), snapshot(opt))


def test_a_copy_goes_on_alike(backend):
    params, opt, _ = trained(backend, steps=FEW)
    other = copy.deepcopy(opt)
    train(opt, params, FEW, first=FEW)
    train(other, other.param_groups[0]["params"], FEW, first=FEW)
    assert_same(snapshot(other), snapshot(opt))


def test_the_first_gradient_is_taken_at_the_weights_and_the_second_ahead(backend):
    start = values(make_weights())
    _, opt, closure = trained(backend, torch.float32, steps=2)
    assert_same(closure.seen[0], start)
    assert all(not torch.equal(a, b) for a, b in zip(closure.seen[1], start, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_return_to_the_bit_after_an_error_ahead(backend, dtype):
    params, opt, _ = trained(backend, dtype, FEW)
    before = snapshot(opt)
    ahead = []

    def fails():
        ahead.extend(values(params))
        raise RuntimeError("the loss could not be had")

    with pytest.raises(RuntimeError, match="could not be had"):
        opt.step(fails)
    assert not torch.equal(ahead[0], before["weights"][0])
    assert_same(snapshot(opt), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_zero_leaves_the_weights_to_the_bit(backend, dtype):
    params, opt, _ = trained(backend, dtype, FEW, momentum=0.0, weight_decay=0.0)
    before = values(params)
    ahead = []

    def flat():
        ahead.extend(values(params))
        for p in params:
            p.grad = torch.zeros_like(p)
        return 0.0

    opt.step(flat)
    assert not torch.equal(ahead[0], before[0])
    assert_same(values(params), before)


def test_an_lr_of_zero_moves_nothing(backend):
    params, _, closure = trained(backend, torch.float32, lr=0.0)
    assert_same(values(params), values(make_weights()))
    assert_same(closure.seen[-1], values(params))


def test_a_weight_without_gradient_stays(backend):
    params, opt, _ = trained(backend, steps=FEW)
    before = copy.deepcopy(opt.state[params[1]]), params[1].detach().clone()
    moving = params[0].detach().clone()

    def closure():
        set_gradients(params, FEW)
        params[1].grad = None
        return 0.0

    opt.step(closure)
    assert_same((opt.state[params[1]], params[1].detach()), before)
    assert not torch.equal(params[0], moving)


def test_groups_have_options_of_their_own(backend):
    params = make_weights(dtype=torch.float64)
    other = {"lr": 0.02, "momentum": 0.0, "weight_decay": 0.0, "extrapolation": 0.5}
    groups = [{"params": params[:1]}, {"params": params[1:], **other}]
    opt = ExtrapolatedSGD(groups, **OPTIONS, backend=backend)
    train(opt, params, FEW)
    first, largest = oracle(torch.float64, FEW)
    rest, _ = oracle(torch.float64, FEW, **other)
    for p, x in zip(params, [*first[:1], *rest[1:]], strict=True):
        assert_within(p, x, FEW * ROUNDINGS * ulp(largest))


def test_autograd_sees_the_writes():
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    opt = ExtrapolatedSGD([weight], lr=0.1)
    graph = (weight**2).sum()

    def closure():
        opt.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 13.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


def test_a_missing_closure_is_named(backend):
    _, opt, _ = trained(backend, steps=1)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="ExtrapolatedSGD needs a closure .* got None"):
        opt.step()
    assert_same(snapshot(opt), before)


def test_a_closure_without_gradients_is_refused_before_anything_changes(backend):
    _, opt, _ = trained(backend, steps=FEW)
    opt.zero_grad()
    before = snapshot(opt)
    with pytest.raises(ValueError, match="expected gradients"):
        opt.step(lambda: 1.0)
    assert_same(snapshot(opt), before)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -1.0),
        ("lr", float("inf")),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("extrapolation", -0.5),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*got {value}"):
        ExtrapolatedSGD(make_weights(), **{**OPTIONS, name: value})


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

    opt.step(closure)
    b.requires_grad_(False)
    opt.step(closure)
    assert torch.equal(seen[-1], b.detach())
