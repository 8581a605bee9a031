"""LineProbe: what it measures, and that it leaves everything as it was, to the bit."""

import copy
import pickle
import random

import numpy
import pytest
import torch
from support.cases import FALLBACK, assert_same, differs, make_weights, set_gradients, snapshot
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mechanic_fused
from mechanic_fused.tuners import LineProbe, parabola

MULTIPLES = (-1.0, 0.0, 0.5, 1.0, 2.0)
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
    "mechanic fallback": lambda p: FALLBACK["adamw"](p, lr=1.0),
}
of_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def batch(t):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(t))


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


def noisy_loss(model, z):
    """Draw from every generator that a closure may draw from."""
    noise = random.random() + float(numpy.random.rand())
    return (model(z).squeeze(1) - z.sum(1) - 0.01 * noise).square().mean()


def everything(model, opt):
    generator = numpy.random.get_state()
    return {
        "optimizer": snapshot(opt),
        "model": copy.deepcopy(model.state_dict()),
        "gradients": [
            torch.empty(0) if p.grad is None else p.grad.clone() for p in model.parameters()
        ],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (torch.from_numpy(generator[1].astype("int64")), *generator[2:]),
    }


def train(name, steps, probes):
    random.seed(0)
    numpy.random.seed(0)
    model = Net()
    opt = OPTIMIZERS[name](list(model.parameters()))
    probe = LineProbe(opt, model)
    for t in range(steps):
        opt.zero_grad()
        noisy_loss(model, batch(t)).backward()
        if t in probes:
            before, other = everything(model, opt), batch(100 + t)
            losses = probe(lambda z=other: noisy_loss(model, z), MULTIPLES)
            # The first step of the running form moves nothing: S is not known yet.
            moves = t > 0 or not name.startswith("mechanic")
            assert (len(set(losses)) > 1) is moves, losses
            assert_same(everything(model, opt), before)
        opt.step()
    return everything(model, opt)


@of_optimizers
def test_a_run_with_probes_is_the_run_without_to_the_bit(name):
    """The first step, where state is yet to be made, and later ones."""
    assert_same(train(name, 5, probes=(0, 1, 3)), train(name, 5, probes=()))


@of_optimizers
def test_the_losses_are_those_at_multiples_of_the_step(name):
    """Beside a copy of the weights that are moved by hand."""
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
        other = copy.deepcopy(model)
        for r, loss in zip(MULTIPLES, losses, strict=True):
            with torch.no_grad():
                for p, a, b in zip(other.parameters(), w, model.parameters(), strict=True):
                    p.copy_(a + r * (b - a))
                # x differs by a few roundings, and the loss is a sum of 48 squares of sums of 5.
                assert loss == pytest.approx(float(other(z).square().mean()), rel=1e-12)


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


# Closures and hooks


def test_a_closure_in_the_manner_of_lbfgs():
    model = torch.nn.Linear(4, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        opt.zero_grad(set_to_none=False)
        loss = model(batch(0)).square().mean()
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
@pytest.mark.parametrize("where", ["closure", "step"])
def test_an_error_leaves_everything_as_it_was(name, where):
    model = Net()
    opt = OPTIMIZERS[name](list(model.parameters()))
    noisy_loss(model, batch(0)).backward()
    calls = []

    def fails(*_):
        raise RuntimeError("out of memory")

    def closure():
        calls.append(noisy_loss(model, batch(1)))
        return calls[-1] if len(calls) < 2 else fails()

    if where == "step":
        opt.register_step_post_hook(fails)
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match="out of memory"):
        LineProbe(opt, model)(closure, (1, 2))
    assert len(calls) == (2 if where == "closure" else 0)
    assert_same(everything(model, opt), before)


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
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step"):
        scheduler.step()


# Weights, gradients and buffers in special states


def test_an_outer_autocast_does_not_hide_the_points():
    """Its cache of bfloat16 weights would give every point the same loss."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch(0)).square().mean().backward()
        losses = LineProbe(opt, model)(lambda: model(batch(0)).square().mean(), MULTIPLES)
    assert len(set(losses)) == len(MULTIPLES)


def test_weights_that_are_added_later_are_probed():
    params = make_weights()
    opt = torch.optim.SGD(params[:1], lr=0.1)
    probe = LineProbe(opt)
    opt.add_param_group({"params": params[1:]})
    set_gradients(params, 0)
    zero, one = probe(lambda: params[-1].double().sum(), (0, 1))
    assert zero != one


def test_a_weight_frozen_with_its_gradient_comes_back():
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1)
    set_gradients(params, 0)
    params[1].requires_grad_(False)
    before = snapshot(opt)
    LineProbe(opt)(lambda: sum(p.double().sum() for p in params), (1,))
    assert_same(snapshot(opt), before)


def test_gradients_of_the_models_other_weights_come_back():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    opt = torch.optim.SGD(model[0].parameters(), lr=0.1)
    model(batch(0)).square().mean().backward()
    held = [p.grad for p in model.parameters()]

    def closure():
        model.zero_grad()
        return model(batch(0)).square().mean()

    LineProbe(opt, model)(closure)
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))


def test_buffers_that_are_replaced_or_expanded_come_back():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 1)
            self.register_buffer("mean", torch.zeros(1))
            self.register_buffer("mask", torch.ones(1).expand(4))

        def forward(self, z):
            y = self.inner(z * self.mask)
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()
            return y

    model = Odd()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(0)).square().mean().backward()
    held, value = model.mean, model.mean.clone()
    LineProbe(opt, model)(lambda: model(batch(1)).square().mean())
    assert model.mean is held and torch.equal(held, value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda probe: pickle.loads(pickle.dumps(probe))])
def test_copies_and_pickles_probe_as_the_original(copied):
    weight = torch.nn.Parameter(torch.ones(5))
    probe = LineProbe(torch.optim.SGD([weight], lr=0.1))
    other = copied(probe)
    (twin,) = other.optimizer.param_groups[0]["params"]
    losses = []
    for one, p in ((probe, weight), (other, twin)):
        p.grad = torch.ones(5)
        losses.append(one(lambda p=p: p.square().sum()))
    assert losses[0] == losses[1]


def test_what_it_refuses():
    params = make_weights()
    opt = torch.optim.SGD(params, lr=0.1)
    with pytest.raises(ValueError, match="got weights without gradients"):
        LineProbe(opt)(lambda: params[0].sum())
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="must return one number, got a tensor of shape"):
        LineProbe(opt)(lambda: params[2])
    with pytest.raises(ValueError, match="backend"):
        LineProbe(opt, backend="cobol")
    released = mechanic_fused.MechanicSGD(params, lr=0.1)
    released.release_gradients()
    with pytest.raises(ValueError, match=r"cannot be used with release_gradients\(\)"):
        LineProbe(released)(lambda: params[0].sum())


# Parabolas


def test_parabolas_are_exact_through_three_points():
    fit = parabola((-1, 0, 1), (7.0, 2.0, 3.0))
    found = [fit.level, fit.slope, fit.curvature, fit.minimizer]
    assert found == pytest.approx([2, 2, 6, 1 / 3], rel=1e-12)
    assert fit.r_squared == pytest.approx(1) and fit.convex
    assert not parabola((-1, 0, 1), (1.0, 2.0, 1.0)).convex
    assert not parabola((-1, 0, 1), (1.0, 2.0, 7.0)).convex
    assert parabola((-1, 0, 1), (1.0, float("nan"), 7.0)) is None
    assert parabola((0, 1, 2, 3), (0.0, 1.0, 0.0, 1.0)).r_squared < 0.5


@pytest.mark.parametrize("level", [0.0, 98.375, 1e6])
@pytest.mark.parametrize("points", [(-1.0, 0.0, 1.0), (-2.0, -1.0, 0.0, 1.0, 2.0)])
def test_losses_on_a_line_have_no_minimum(level, points):
    """Roundings of the fit must not pass for a curvature."""
    for slope in torch.linspace(-3, 3, 41).tolist():
        step = round(slope * 64) / 64
        fit = parabola(points, [level - step * r for r in points])
        assert fit.curvature == 0 and not fit.convex


# Ranks


def losses_of_ranks():
    """Return what a probe finds where each rank's loss is of its own target, its number."""
    weight = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(3)
    target = float(torch.distributed.get_rank())
    return LineProbe(opt)(lambda: (weight - target).square().sum(), (0, 1))


def test_losses_are_averaged_over_ranks(ranks):
    """Of (1 − rank)²·3 and (0.9 − rank)²·3 on ranks 0 and 1; float32 weights near 1."""
    for losses in ranks(2).run("test_probe.losses_of_ranks"):
        assert losses == pytest.approx([1.5, 3 * (0.81 + 0.01) / 2], rel=1e-6)


def trained(sharded, probes):
    """Return what the first probe found, if there was one, and the loss of each of three steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    z = torch.randn(8, 4)
    if sharded:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of():
        return (model(z) - 1).square().mean()

    found, steps = [], []
    for t in range(3):
        opt.zero_grad()
        loss = loss_of()
        loss.backward()
        if t < probes:
            found.append(LineProbe(opt, model)(loss_of, (0, 1, 2)))
        opt.step()
        steps.append(float(loss.detach()))
    return found[:1], steps


def test_fully_sharded_weights_are_probed_where_they_are(ranks):
    """The root keeps its gathered weights after a pass without gradients: a point behind."""
    expected, _ = trained(sharded=False, probes=1)
    _, undisturbed = trained(sharded=False, probes=0)
    for losses, steps in ranks(1).run("test_probe.trained", sharded=True, probes=3):
        # Sums of a few dozen float32 terms in the same order: to a few ulps.
        assert losses[0] == pytest.approx(expected[0], rel=1e-6)
        assert steps == pytest.approx(undisturbed, rel=1e-6)
