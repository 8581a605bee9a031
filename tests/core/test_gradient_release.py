"""Gradients taken during the backward pass give the numbers of the ordinary step."""

import pytest
import torch
from support import cases
from support.cases import build

from mechanic_fused import MechanicAdamW

STEPS = 8
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}
"""Sums are added in another order, so that S may round otherwise."""


class Net(torch.nn.Module):
    """Weights of several shapes, an embedding among them."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(7, 8, dtype=dtype)
        self.norm = torch.nn.LayerNorm(8, dtype=dtype)
        self.up = torch.nn.Linear(8, 16, dtype=dtype)
        self.down = torch.nn.Linear(16, 7, dtype=dtype)

    def loss(self, t):
        tokens = torch.randint(7, (4, 4), generator=torch.Generator().manual_seed(t))
        logits = self.down(self.up(self.norm(self.embedding(tokens))).relu()).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def make(implementation="auto", base="adamw", dtype=torch.float32, released=True, **options):
    net = Net(dtype)
    options = {"s_init": 1e-3, "lr": 1.0, **options}
    opt = build(implementation, base, net.parameters(), **options)
    if released:
        opt.release_gradients()
    return net, opt


def train(net, opt, first=0, steps=STEPS):
    for t in range(first, first + steps):
        opt.zero_grad()
        net.loss(t).backward()
        opt.step()


def check_both(loop, *args, **options):
    """Run a loop with released gradients and with ordinary ones; compare weights, S and state."""
    runs = [make(*args, released=released, **options) for released in (True, False)]
    for run in runs:
        loop(*run)
    (net, opt), (other, expected) = runs
    torch.testing.assert_close(opt.scale, expected.scale, rtol=1e-9, atol=0)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE[p.dtype])
        for name, value in expected.state[q].items():
            torch.testing.assert_close(opt.state[p][name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("dtype", cases.WIDTHS, ids=str)
def test_the_numbers_are_those_of_the_ordinary_step(backend, base, dtype):
    check_both(train, backend, base, dtype, **cases.OPTIONS[base])


@pytest.mark.parametrize("scale_per", ["group", "parameter"])
def test_each_group_or_weight_may_have_a_scale(scale_per):
    check_both(train, scale_per=scale_per)


def test_weights_may_rest_for_a_while():
    def loop(net, opt):
        for t in range(STEPS):
            for p in (net.up.weight, net.norm.weight):
                p.requires_grad_(t % 3 != 2)
            train(net, opt, t, 1)

    check_both(loop)


def test_a_gradient_set_by_hand_counts_too():
    """Of a weight that takes no part in the backward pass."""

    def loop(net, opt):
        net.extra = torch.nn.Parameter(torch.ones(3))
        opt.add_param_group({"params": [net.extra]})
        for t in range(STEPS):
            net.extra.grad = torch.full((3,), 0.5)
            net.loss(t).backward()
            opt.step()
            net.zero_grad()
        assert (net.extra != 1).all()

    check_both(loop)


def test_a_run_may_have_a_schedule_a_new_group_and_a_checkpoint():
    def loop(net, opt):
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=STEPS)
        for t in range(STEPS):
            train(net, opt, t, 1)
            schedule.step()
            if t == 2:
                torch.manual_seed(1)
                net.extra = torch.nn.Linear(2, 2)
                opt.add_param_group({"params": list(net.extra.parameters())})
            if t == 4:
                opt.load_state_dict(opt.state_dict())

    check_both(loop)


def test_weights_written_after_a_step_are_not_undone():
    def loop(net, opt):
        for t in range(STEPS):
            train(net, opt, t, 1)
            if t == 3:
                with torch.no_grad():
                    net.up.weight.add_(0.1)
            if t == 5:
                net.down.weight.data.add_(0.1)
                opt.shift_reference()

    check_both(loop)


def test_a_bfloat16_delta_is_rounded_by_the_same_bits():
    def loop(net, opt):
        train(net, opt, 0, 1)
        opt.freeze_scale()
        train(net, opt, 1, 3)
        deltas.append([opt.state[p]["delta"] for p in net.parameters()])

    deltas = []
    for released in (True, False):
        loop(*make(base="sgd", released=released, momentum=0.9, delta_dtype=torch.bfloat16))
    cases.assert_same(*deltas)


def test_no_gradient_is_left_after_backward():
    net, opt = make()
    train(net, opt, steps=2)
    net.loss(2).backward()
    assert all(p.grad is None for p in net.parameters())
    before = cases.snapshot(opt)
    opt.step()
    assert cases.differs(cases.snapshot(opt), before)


def test_a_gradient_that_is_not_finite_is_survived():
    net, opt = make()
    train(net, opt, steps=3)
    hook = net.up.weight.register_hook(lambda g: g * float("nan"))
    train(net, opt, 3, 1)
    hook.remove()
    train(net, opt, 4, 2)
    assert opt.nonfinite_steps == 1
    assert all(p.isfinite().all() for p in net.parameters())


# What is refused


def add_group(net, opt):
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    opt.step()


def write(net, opt):
    with torch.no_grad():
        net.up.weight.add_(0.1)
    opt.step()


def step_as_grad_scaler(net, opt):
    opt.grad_scale, opt.found_inf = torch.ones(()), torch.zeros(())
    opt.step()


REFUSED = {
    "a second backward pass": (
        lambda net, opt: net.loss(3).backward(),
        "complete after one backward pass",
    ),
    "another group": (add_group, "must not change between backward"),
    "a write": (write, "must not change between backward"),
    "shift_reference": (lambda net, opt: opt.shift_reference(), "where gradients are released"),
    "GradScaler": (step_as_grad_scaler, "GradScaler needs all gradients at once"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_between_backward_and_step(what):
    meddle, text = REFUSED[what]
    net, opt = make()
    train(net, opt, steps=2)
    net.loss(2).backward()
    with pytest.raises(RuntimeError, match=text):
        meddle(net, opt)


def test_a_group_or_an_option_that_comes_later_may_be_refused():
    net, opt = make()
    train(net, opt, steps=2)
    amsgrad = {"params": [torch.nn.Parameter(torch.ones(2))], "amsgrad": True}
    with pytest.raises(ValueError, match="amsgrad=True has no fused update"):
        opt.add_param_group(amsgrad)
    assert len(opt.param_groups) == 1
    opt.max_grad_norm = 1.0
    loss = net.loss(2)
    with pytest.raises(ValueError, match="max_grad_norm needs"):
        loss.backward()


def test_an_optimizer_that_cannot_release_refuses_at_once():
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="RAdam has no fused update"):
        cases.RADAM([weight]).release_gradients()
    with pytest.raises(ValueError, match=r"max_grad_norm .* got 1\.0"):
        MechanicAdamW([weight], max_grad_norm=1.0).release_gradients()
