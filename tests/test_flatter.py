"""FlatterFaster: the law, what it reads and writes, and that optimizers follow it."""

import copy

import pytest
import torch
from cases import STEPS, assert_same, build, make_weights, run, set_gradients, snapshot, values

from mechanic_fused import MechanicAdamW
from mechanic_fused.tuners import FlatterFaster

LR, BETA = 0.3, 0.9
# lr/lr_ref of each step: down by a cosine, to 0, and up again past the reference.
RATIOS = [*torch.linspace(0, torch.pi, STEPS).cos().add(1).div(2).tolist(), 0.0, 1.5, 100.0]


def law(ratio, beta):
    """As a cube root of a square, in float64."""
    root = torch.tensor(ratio, dtype=torch.float64).square().pow(1 / 3)
    return float((1 - (1 - beta) * root).clamp(0, 0.999))


def scheduled(opt):
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda t: RATIOS[min(t, len(RATIOS) - 1)])


def close(value):
    # A power, a square and two roundings of numbers of size 1.
    return pytest.approx(value, rel=0, abs=8 * torch.finfo(torch.float64).eps)


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, momentum=BETA, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, betas=(BETA, 0.99)),
    "mechanic sgd": lambda p: build("reference", "sgd", p, lr=LR, momentum=BETA),
    "mechanic adamw": lambda p: build("reference", "adamw", p, lr=LR, betas=(BETA, 0.99)),
}


@pytest.fixture(params=MAKERS)
def optimizer(request):
    return MAKERS[request.param](make_weights())


def test_follows_the_law_over_a_schedule(optimizer):
    schedule = scheduled(optimizer)
    coupling = FlatterFaster(optimizer)
    params = optimizer.param_groups[0]["params"]
    seen = []
    for t, ratio in enumerate(RATIOS):
        seen.append(coupling.get_last_momentum()[0])
        assert seen[-1] == close(law(ratio, BETA))
        run(optimizer, params, 1, first=t)
        schedule.step()
        coupling.step()
    assert max(seen) == 0.999
    assert min(seen) == 0.0
    if "betas" in optimizer.param_groups[0]:
        assert optimizer.param_groups[0]["betas"][1] == 0.99
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("ours", [False, True])
def test_an_optimizer_steps_as_with_momenta_set_by_hand(road, base, ours):
    def make():
        params = make_weights()
        if ours:
            options = {"momentum": BETA} if base == "sgd" else {"betas": (BETA, 0.99)}
            return build(road, base, params, lr=LR, s_init=0.1, **options), params
        return MAKERS[base](params), params

    opt, params = make()
    schedule, coupling = scheduled(opt), FlatterFaster(opt)
    other, others = make()
    fixed, still = make()
    for t in range(STEPS):
        set_gradients(params, t)
        opt.step()
        for group in other.param_groups + fixed.param_groups:
            group["lr"] = LR * RATIOS[t]
        for group in other.param_groups:
            if base == "sgd":
                group["momentum"] = coupling.get_last_momentum()[0]
            else:
                group["betas"] = (coupling.get_last_momentum()[0], 0.99)
        run(other, others, 1, first=t)
        run(fixed, still, 1, first=t)
        schedule.step()
        coupling.step()
    assert_same(values(others), values(params))
    assert not torch.equal(still[0], params[0])


def test_each_group_has_a_reference_of_its_own():
    first, second, third = make_weights()
    groups = [{"params": [first]}, {"params": [second], "lr": 0.1, "momentum": 0.5}]
    opt = torch.optim.SGD(groups, lr=LR, momentum=BETA)
    coupling = FlatterFaster(opt)
    assert coupling.get_last_momentum() == [close(BETA), close(0.5)]
    opt.add_param_group({"params": [third], "lr": 0.2, "momentum": 0.8})
    for group in opt.param_groups:
        group["lr"] /= 8
    opt.param_groups[2]["lr"] = 0.2
    coupling.step()
    assert coupling.get_last_momentum() == [close(1 - 0.1 / 4), close(1 - 0.5 / 4), close(0.8)]


def test_the_reference_is_the_initial_lr_of_a_warm_up():
    opt = torch.optim.SGD(make_weights(), lr=LR, momentum=BETA)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: t / 10)
    coupling = FlatterFaster(opt)
    assert coupling.references == [(LR, BETA)]
    assert coupling.get_last_momentum() == [0.999]


def test_a_reference_may_be_given():
    opt = torch.optim.SGD(make_weights(), lr=LR, momentum=BETA)
    FlatterFaster(opt, reference_lr=8 * LR)
    assert opt.param_groups[0]["momentum"] == close(1 - (1 - BETA) / 4)


def test_an_lr_on_the_device_is_read():
    opt = torch.optim.AdamW(make_weights(), lr=torch.tensor(0.5, dtype=torch.float64))
    coupling = FlatterFaster(opt)
    opt.param_groups[0]["lr"].mul_(1 / 8)
    coupling.step()
    assert coupling.get_last_momentum() == [close(1 - 0.1 / 4)]


def test_resumes_to_the_bit():
    def make(params):
        opt = MechanicAdamW(params, lr=LR, s_init=0.1, backend="reference")
        return opt, scheduled(opt), FlatterFaster(opt)

    def advance(parts, params, first, steps):
        for t in range(first, first + steps):
            run(parts[0], params, 1, first=t)
            parts[1].step()
            parts[2].step()

    whole = make_weights()
    parts = make(whole)
    advance(parts, whole, 0, STEPS)
    half = make_weights()
    first = make(half)
    advance(first, half, 0, STEPS // 2)
    saved = copy.deepcopy([part.state_dict() for part in first])
    resumed = [torch.nn.Parameter(x) for x in values(half)]
    second = make(resumed)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    advance(second, resumed, STEPS // 2, STEPS - STEPS // 2)
    assert_same(snapshot(second[0]), snapshot(parts[0]))
    assert second[2].state_dict() == parts[2].state_dict()


def test_a_loaded_reference_replaces_that_of_a_changed_momentum():
    opt = torch.optim.SGD(make_weights(), lr=LR, momentum=BETA)
    saved = FlatterFaster(opt).state_dict()
    opt.param_groups[0]["momentum"] = 0.1
    coupling = FlatterFaster(opt)
    coupling.load_state_dict(saved)
    assert coupling.get_last_momentum() == [close(BETA)]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: torch.optim.SGD(p, lr=LR), r"momentum in \(0, 1\) to couple, got 0"),
        (lambda p: torch.optim.Adagrad(p, lr=LR), "betas or momentum, got one with"),
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=BETA), "above 0, got 0.0"),
    ],
)
def test_what_cannot_be_coupled_is_refused(make, message):
    opt = make(make_weights())
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        FlatterFaster(opt)
    assert_same(snapshot(opt), before)


def test_a_group_without_momentum_is_refused_before_anything_changes():
    first, second, _ = make_weights()
    opt = torch.optim.SGD([first], lr=LR, momentum=BETA)
    coupling = FlatterFaster(opt)
    opt.add_param_group({"params": [second], "momentum": 0.0})
    opt.param_groups[0]["lr"] = 0.01
    before = snapshot(opt)
    with pytest.raises(ValueError, match="to couple, got 0"):
        coupling.step()
    assert_same(snapshot(opt), before)
    assert len(coupling.references) == 1


@pytest.mark.parametrize(
    "state, message",
    [({}, "expected the entries"), ({"references": []}, "expected references of 1")],
)
def test_a_strange_state_dict_is_refused(state, message):
    coupling = FlatterFaster(torch.optim.SGD(make_weights(), lr=LR, momentum=BETA))
    before = coupling.state_dict()
    with pytest.raises(ValueError, match=message):
        coupling.load_state_dict(state)
    assert coupling.state_dict() == before


def test_references_out_of_range_change_nothing():
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    coupling = FlatterFaster(opt)
    before = coupling.state_dict()
    with pytest.raises(ValueError, match="expected references lr > 0"):
        coupling.load_state_dict({"references": [[0.0, 0.9]]})
    assert coupling.state_dict() == before
