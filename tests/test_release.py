"""Gradients that are taken in the backward pass give the numbers of the ordinary step."""

import layouts
import pytest
import torch
from cases import differs, snapshot
from conftest import skip_unless_available

from mechanic_fused import MechanicAdamW, mechanize

STEPS = 8
TOLERANCE = 1e-6
"""As for layouts: sums are added in another order, so that S may round otherwise."""


def make(base="adamw", dtype=torch.float32, released=True, **options):
    net = layouts.model(dtype)
    opt = layouts.BASES[base](net.parameters(), **layouts.OPTIONS, **options)
    if released:
        opt.release_gradients()
    return net, opt


def train(net, opt, first=0, steps=STEPS, skip=()):
    for t in range(first, first + steps):
        opt.zero_grad()
        for name, p in net.named_parameters():
            p.requires_grad_(not (t % 3 == 2 and name in skip))
        layouts.loss_of(net, layouts.batch(t)).backward()
        opt.step()


def assert_close(one, two):
    (net, opt), (other, expected) = one, two
    torch.testing.assert_close(opt.scale, expected.scale, rtol=1e-9, atol=0)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCE if p.dtype.itemsize > 2 else 2**-7)
        for name, value in expected.state[q].items():
            torch.testing.assert_close(opt.state[p][name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("base", ["adamw", "sgd", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_numbers_as_the_ordinary_step(base, dtype, backend):
    skip_unless_available(backend)
    runs = [make(base, dtype, released, backend=backend) for released in (True, False)]
    for run in runs:
        train(*run)
    assert_close(*runs)


@pytest.mark.parametrize("scale", ["group", "parameter"])
def test_a_scale_for_each_group_or_weight(scale):
    runs = [make(released=released, scale=scale) for released in (True, False)]
    for run in runs:
        train(*run)
    assert_close(*runs)


def test_no_gradient_is_left_after_backward():
    net, opt = make()
    train(net, opt, steps=2)
    layouts.loss_of(net, layouts.batch(2)).backward()
    assert all(p.grad is None for p in net.parameters())
    before = snapshot(opt)
    opt.step()
    assert differs(snapshot(opt), before)


def test_weights_that_rest_for_a_while():
    runs = [make(released=released) for released in (True, False)]
    for run in runs:
        train(*run, skip=("up.weight", "gain.weight"))
    assert_close(*runs)


def test_a_gradient_set_by_hand_counts_too():
    """Of a weight that takes no part in the backward pass."""
    runs = [make(released=released) for released in (True, False)]
    for net, opt in runs:
        net.extra = torch.nn.Parameter(torch.ones(3))
        opt.add_param_group({"params": [net.extra]})
        for t in range(STEPS):
            net.extra.grad = torch.full((3,), 0.5)
            layouts.loss_of(net, layouts.batch(t)).backward()
            opt.step()
            net.zero_grad()
    assert_close(*runs)
    assert (runs[0][0].extra != 1).all()


def test_a_schedule_a_new_group_and_a_checkpoint():
    runs = [make(released=released) for released in (True, False)]
    for net, opt in runs:
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=STEPS)
        for t in range(STEPS):
            train(net, opt, first=t, steps=1)
            schedule.step()
            if t == 2:
                torch.manual_seed(1)
                net.extra = torch.nn.Linear(2, 2)
                opt.add_param_group({"params": list(net.extra.parameters())})
            if t == 4:
                opt.load_state_dict(opt.state_dict())
    assert_close(*runs)


def test_a_nan_is_survived():
    net, opt = make()
    train(net, opt, steps=3)
    hook = net.up.weight.register_hook(lambda g: g * float("nan"))
    train(net, opt, first=3, steps=1)
    hook.remove()
    train(net, opt, first=4, steps=2)
    assert opt.nonfinite_steps == 1
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_second_backward_pass_is_refused():
    net, opt = make()
    train(net, opt, steps=2)
    layouts.loss_of(net, layouts.batch(2)).backward()
    with pytest.raises(RuntimeError, match="complete after one backward pass"):
        layouts.loss_of(net, layouts.batch(3)).backward()


def test_a_grad_scaler_is_refused():
    net, opt = make(fused=True)
    train(net, opt, steps=2)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(layouts.loss_of(net, layouts.batch(2))).backward()
    with pytest.raises((RuntimeError, AssertionError), match="GradScaler|No inf checks"):
        scaler.step(opt)


def test_weights_that_change_between_backward_and_step_are_refused():
    net, opt = make()
    train(net, opt, steps=2)
    layouts.loss_of(net, layouts.batch(2)).backward()
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="between backward"):
        opt.step()


def test_weights_written_after_a_step_are_not_undone():
    runs = [make(released=released) for released in (True, False)]
    for net, opt in runs:
        for t in range(STEPS):
            train(net, opt, first=t, steps=1)
            if t == 3:
                with torch.no_grad():
                    net.up.weight.add_(0.1)
            if t == 5:
                net.down.weight.data.add_(0.1)
                opt.shift_reference()
    assert_close(*runs)


def test_weights_written_between_backward_and_step_are_refused():
    for write in ("add_", "shift_reference"):
        net, opt = make()
        train(net, opt, steps=2)
        layouts.loss_of(net, layouts.batch(2)).backward()
        with pytest.raises(RuntimeError, match="where gradients are released"):
            if write == "add_":
                with torch.no_grad():
                    net.up.weight.add_(0.1)
                opt.step()
            else:
                opt.shift_reference()


def test_a_group_or_an_option_that_cannot_be_released_is_refused():
    net, opt = make()
    train(net, opt, steps=2)
    with pytest.raises(ValueError, match="amsgrad=True has no fused update"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "amsgrad": True})
    assert len(opt.param_groups) == 1
    opt.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="max_grad_norm needs"):
        layouts.loss_of(net, layouts.batch(2)).backward()


def test_what_cannot_be_released_is_refused_at_once():
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="RAdam has no fused update"):
        mechanize(torch.optim.RAdam)([weight]).release_gradients()
    with pytest.raises(ValueError, match="max_grad_norm .* got 1.0"):
        MechanicAdamW([weight], max_grad_norm=1.0).release_gradients()


@pytest.mark.parametrize("layout, size", [("fsdp2", 2), ("hsdp", 4)])
def test_sharded_weights(ranks, layout, size):
    results = ranks(size).run("layouts.run", layout, "adamw", STEPS, released=True)
    expected = layouts.single("adamw", STEPS)
    for result in results:
        assert torch.equal(result["scale"], results[0]["scale"])
        for name, x in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], x, rtol=0, atol=TOLERANCE)


def test_plain_weights_of_several_ranks_are_refused(ranks):
    ranks(2).run("layouts.refuse_release")
