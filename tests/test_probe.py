"""LineProbe: what it measures, and that it leaves everything as it was, to the bit."""

import copy
import random

import numpy
import pytest
import torch
from cases import PlainAdamW, assert_same, differs, leaves, make_weights, set_gradients, snapshot
from probe_runs import MULTIPLES, batch

import mechanic_fused
from mechanic_fused.tuners import LineProbe, parabola

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "foreach nesterov": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, foreach=True
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "lion": lambda p: mechanic_fused.Lion(p, lr=0.01),
    "mechanic cpp": lambda p: mechanic_fused.MechanicAdamW(p, lr=1.0, backend="cpp"),
    "mechanic reference": lambda p: mechanic_fused.MechanicSGD(p, lr=1.0, backend="reference"),
    "mechanic general": lambda p: mechanic_fused.mechanize(PlainAdamW)(p, lr=1.0),
}


class Net(torch.nn.Module):
    """Batch norm, dropout and a frozen weight: all that a forward pass may move."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.drop = torch.nn.Dropout(0.3)
        self.last = torch.nn.Linear(8, 1)
        self.last.bias.requires_grad_(False)

    def forward(self, z):
        return self.last(self.drop(torch.relu(self.norm(self.first(z)))))


def loss_of(model, z):
    """Draws from every generator that a closure may draw from."""
    noise = random.random() + float(numpy.random.rand())
    return (model(z).squeeze(1) - z.sum(1) - 0.01 * noise).square().mean()


def everything(model, opt):
    return {
        "optimizer": snapshot(opt),
        "model": copy.deepcopy(model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "generators": (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1:]),
    }


def assert_unchanged(before, after):
    generators = before.pop("generators"), after.pop("generators")
    assert_same(after, before)
    assert torch.equal(generators[0][0], generators[1][0])
    assert generators[0][1] == generators[1][1]
    assert (generators[0][2][0] == generators[1][2][0]).all()
    assert generators[0][2][1:] == generators[1][2][1:]


def train(name, steps, probes):
    random.seed(0)
    numpy.random.seed(0)
    model = Net()
    opt = OPTIMIZERS[name]([p for p in model.parameters()])
    probe = LineProbe(opt, model)
    for t in range(steps):
        opt.zero_grad()
        loss_of(model, batch(t)).backward()
        if t in probes:
            before = everything(model, opt)
            other = batch(100 + t)
            losses = probe(lambda z=other: loss_of(model, z), MULTIPLES)
            assert len(set(losses)) > 1, losses
            assert_unchanged(before, everything(model, opt))
        opt.step()
    return model, opt


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_probes_is_the_run_without_to_the_bit(name):
    """The first step, where state is yet to be made, and later ones."""
    found = train(name, 5, probes=(0, 1, 3))
    expected = train(name, 5, probes=())
    generators = {"optimizer", "model"}
    one, two = (everything(*run) for run in (found, expected))
    assert_same({k: one[k] for k in generators}, {k: two[k] for k in generators})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_losses_are_those_at_multiples_of_the_step(name):
    """Beside a copy of all that takes the step itself."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    opt = OPTIMIZERS[name](list(model.parameters()))
    z = batch(0).double()
    for _ in range(3):
        opt.zero_grad()
        model(z).square().mean().backward()
        losses = LineProbe(opt, model)(lambda: model(z).square().mean(), MULTIPLES)
        w = [p.detach().clone() for p in model.parameters()]
        opt.step()
        moved = [p.detach().clone() for p in model.parameters()]
        for r, loss in zip(MULTIPLES, losses, strict=True):
            other = copy.deepcopy(model)
            with torch.no_grad():
                for p, a, b in zip(other.parameters(), w, moved, strict=True):
                    p.copy_(a + r * (b - a))
                expected = float(other(z).square().mean())
            # x differs by a few roundings, and the loss is a sum of 48 squares of sums of 5.
            assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back_to_the_bit(dtype, backend):
    params = make_weights(dtype=dtype)
    opt = torch.optim.AdamW(params, lr=0.1)
    set_gradients(params, 0)
    before = snapshot(opt)
    probe = LineProbe(opt, backend=backend)
    one, zero = probe(lambda: sum(p.float().square().sum() for p in params), (1, 0))
    assert one != zero
    assert not differs(snapshot(opt), before)


def test_a_closure_in_the_manner_of_lbfgs():
    model = torch.nn.Linear(3, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    z = batch(0)[:, :3]

    def closure():
        opt.zero_grad(set_to_none=False)
        loss = model(z).square().mean()
        if loss.requires_grad:
            loss.backward()
        return loss

    loss = closure()
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    losses = LineProbe(opt, model)(closure, (0, 1))
    assert losses[0] == float(loss.detach())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert_same(grads, values)


@pytest.mark.parametrize("name", ["momentum", "mechanic cpp"])
def test_a_closure_that_fails_leaves_everything_as_it_was(name):
    model = Net()
    opt = OPTIMIZERS[name](list(model.parameters()))
    loss_of(model, batch(0)).backward()
    before = everything(model, opt)
    calls = []

    def closure():
        calls.append(loss_of(model, batch(1)))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return calls[-1]

    with pytest.raises(RuntimeError, match="out of memory"):
        LineProbe(opt, model)(closure, (1, 2))
    assert_unchanged(before, everything(model, opt))


def test_a_step_that_fails_leaves_everything_as_it_was():
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    set_gradients(params, 0)

    def fails(*_):
        raise RuntimeError("no")

    opt.register_step_post_hook(fails)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match="no"):
        LineProbe(opt)(lambda: params[0].sum(), (1,))
    assert_same(snapshot(opt), before)


def test_hooks_that_write_gradients_see_them_as_they_were():
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1)

    def double(*_):
        for p in params:
            p.grad.mul_(2)

    opt.register_step_pre_hook(double)
    set_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    losses = LineProbe(opt)(lambda: sum(p.double().sum() for p in params), (0, 1))
    assert_same([p.grad for p in params], before)
    moved = 0.2 * sum(float(g.double().sum()) for g in before)
    # A thousand float32 weights, each rounded once.
    slack = sum(float((p.detach().abs() * 2**-23).sum()) for p in params)
    assert losses[0] - losses[1] == pytest.approx(moved, abs=slack)


def test_every_point_sees_the_same_random_numbers():
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.0)
    set_gradients(params, 0)
    losses = LineProbe(opt)(lambda: torch.rand(()) + random.random() + numpy.random.rand(), (0, 1))
    assert losses[0] == losses[1]


def test_schedulers_do_not_take_the_probe_for_a_step():
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 10)
    set_gradients(params, 0)
    LineProbe(opt)(lambda: params[0].sum(), (1,))
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


def test_weights_that_are_added_later_are_probed():
    params = make_weights()
    opt = torch.optim.SGD(params[:1], lr=0.1)
    probe = LineProbe(opt)
    opt.add_param_group({"params": params[1:]})
    set_gradients(params, 0)
    zero, one = probe(lambda: params[-1].double().sum(), (0, 1))
    assert zero != one


def test_what_it_refuses():
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1)
    with pytest.raises(ValueError, match="expected gradients"):
        LineProbe(opt)(lambda: params[0].sum())
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="must return one number, got a shape"):
        LineProbe(opt)(lambda: params[2])
    with pytest.raises(ValueError, match="backend"):
        LineProbe(opt, backend="cobol")


def test_parabolas_are_exact_through_three_points():
    fit = parabola((-1, 0, 1), (7.0, 2.0, 3.0))
    assert [fit.level, fit.slope, fit.curvature, fit.minimizer] == pytest.approx(
        [2, 2, 6, 1 / 3], rel=1e-12
    )
    assert fit.r_squared == pytest.approx(1) and fit.convex
    assert not parabola((-1, 0, 1), (1.0, 2.0, 1.0)).convex
    assert not parabola((-1, 0, 1), (1.0, 2.0, 7.0)).convex
    assert parabola((-1, 0, 1), (1.0, float("nan"), 7.0)) is None
    assert parabola((0, 1, 2, 3), (0.0, 1.0, 0.0, 1.0)).r_squared < 0.5


def test_losses_are_averaged_over_ranks(ranks):
    """Of (1 − rank)²·3 and (0.9 − rank)²·3 on ranks 0 and 1; float32 weights near 1."""
    for losses in ranks(2).run("probe_runs.losses_of_ranks"):
        assert losses == pytest.approx([1.5, 3 * (0.81 + 0.01) / 2], rel=1e-6)


def test_leaves_walks_generators():
    """The comparison above reaches into what it compares."""
    assert len(list(leaves({"a": [1, (2, 3)]}))) == 5


@pytest.mark.parametrize("level", [0.0, 98.375, 1e6])
def test_losses_on_a_line_have_no_minimum(level):
    """Roundings of the fit must not pass for a curvature."""
    for slope in torch.linspace(-3, 3, 41).tolist():
        for points in ((-1.0, 0.0, 1.0), (-2.0, -1.0, 0.0, 1.0, 2.0)):
            step = round(slope * 64) / 64
            fit = parabola(points, [level - step * r for r in points])
            assert fit.curvature == 0 and not fit.convex


def test_fully_sharded_weights_are_probed_where_they_are(ranks):
    """The root keeps its gathered weights after a pass without gradients: a point behind."""
    for losses, expected, steps, undisturbed in ranks(1).run("probe_runs.fully_sharded"):
        # Sums of a few dozen float32 terms in the same order: to a few ulps.
        assert losses[0] == pytest.approx(expected[0], rel=1e-6)
        assert steps == pytest.approx(undisturbed, rel=1e-6)
