"""FlatterFaster's law, what it reads and writes, and that optimizers follow it."""

import pytest
import torch
from support.cases import STEPS, assert_same, build, make_weights, run, snapshot, values
from support.schedulers import BETA, sgd

from mechanic_fused.tuners import FlatterFaster

LR = 0.3
# lr/lr_ref of each step: down by a cosine, to 0, and up again past the reference.
RATIOS = [*torch.linspace(0, torch.pi, STEPS).cos().add(1).div(2).tolist(), 0.0, 1.5, 100.0]


def law(ratio, beta):
    """Return β by a cube root of a square, in float64."""
    root = torch.tensor(ratio, dtype=torch.float64).square().pow(1 / 3)
    return float((1 - (1 - beta) * root).clamp(0, 0.999))


def close(value):
    # A power, a square and two roundings of numbers of size 1.
    return pytest.approx(value, rel=0, abs=8 * torch.finfo(torch.float64).eps)


MOMENTA = {
    "sgd": lambda beta: {"momentum": beta},
    "adamw": lambda beta: {"betas": (beta, 0.99)},
}
PLAIN = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


@pytest.fixture(params=MOMENTA)
def base(request):
    return request.param


def make(kind, base):
    """Return an optimizer of torch ("plain") or ours, by its implementation, and its weights."""
    params, options = make_weights(), {"lr": LR, **MOMENTA[base](BETA)}
    if kind == "plain":
        return PLAIN[base](params, **options), params
    return build(kind, base, params, s_init=0.1, **options), params


@pytest.mark.parametrize("kind", ["plain", "reference", "cpp", "fallback"])
def test_an_optimizer_steps_by_the_law_over_a_schedule(kind, base):
    """As one whose momenta are set by hand, and unlike one whose momentum stays."""
    opt, params = make(kind, base)
    by_hand, others = make(kind, base)
    fixed, still = make(kind, base)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: RATIOS[min(t, len(RATIOS) - 1)])
    coupling = FlatterFaster(opt)
    seen = []
    for t, ratio in enumerate(RATIOS):
        seen += coupling.get_last_momentum()
        assert seen[-1] == close(law(ratio, BETA))
        for group in by_hand.param_groups + fixed.param_groups:
            group["lr"] = LR * ratio
        for group in by_hand.param_groups:
            group.update(MOMENTA[base](seen[-1]))
        run(opt, params, 1, first=t)
        run(by_hand, others, 1, first=t)
        run(fixed, still, 1, first=t)
        if t == STEPS - 1:
            assert_same(values(others), values(params))
            assert not torch.equal(still[0], params[0])
        schedule.step()
        coupling.step()
    assert max(seen) == 0.999 and min(seen) == 0.0
    assert all(p.isfinite().all() for p in params)


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
    opt = sgd(make_weights(), LR, momentum=BETA)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: t / 10)
    coupling = FlatterFaster(opt)
    assert coupling.references == [(LR, BETA)]
    assert coupling.get_last_momentum() == [0.999]


def test_a_reference_may_be_given():
    opt = sgd(make_weights(), LR, momentum=BETA)
    FlatterFaster(opt, reference_lr=8 * LR)
    assert opt.param_groups[0]["momentum"] == close(1 - (1 - BETA) / 4)


def test_an_lr_that_is_a_tensor_is_read():
    opt = torch.optim.AdamW(make_weights(), lr=torch.tensor(0.5, dtype=torch.float64))
    coupling = FlatterFaster(opt)
    opt.param_groups[0]["lr"].mul_(1 / 8)
    coupling.step()
    assert coupling.get_last_momentum() == [close(1 - 0.1 / 4)]


def test_a_loaded_reference_replaces_that_of_a_changed_momentum():
    opt = sgd(make_weights(), LR, momentum=BETA)
    saved = FlatterFaster(opt).state_dict()
    opt.param_groups[0]["momentum"] = 0.1
    coupling = FlatterFaster(opt)
    coupling.load_state_dict(saved)
    assert coupling.get_last_momentum() == [close(BETA)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: sgd(p), r"momentum in \(0, 1\) to couple, got 0"),
        (lambda p: torch.optim.Adagrad(p, lr=LR), "betas or momentum, got one with"),
        (lambda p: sgd(p, 0.0, momentum=BETA), r"above 0, got 0\.0"),
    ],
)
def test_what_cannot_be_coupled_is_refused(make, message):
    opt = make(make_weights())
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        FlatterFaster(opt)
    assert_same(snapshot(opt), before)


def test_an_added_group_without_momentum_is_refused_before_anything_changes():
    first, second, _ = make_weights()
    opt = sgd([first], LR, momentum=BETA)
    coupling = FlatterFaster(opt)
    opt.add_param_group({"params": [second], "momentum": 0.0})
    opt.param_groups[0]["lr"] = 0.01
    before = snapshot(opt)
    with pytest.raises(ValueError, match="to couple, got 0"):
        coupling.step()
    assert_same(snapshot(opt), before)
    assert len(coupling.references) == 1
