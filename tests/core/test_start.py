"""Where S starts, and that a run does not depend on the unit of lr."""

import functools
import math

import pytest
import torch
from support import cases
from support.cases import (
    EXACT,
    QUICK,
    SUM_RTOL,
    TINY_EPS,
    Training,
    assert_same,
    make_weights,
    values,
)

from mechanic_fused import MechanicAdamW, MechanicSGD, step_together
from mechanic_fused.backends.layout import MOST_SCALE
from mechanic_fused.options import FIRST_UPDATE_NORM, UNCALIBRATED, ZERO_WEIGHT_RMS

STEPS = 30


def norm(tensors):
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


# s_init="auto"


def test_the_start_is_a_ratio_of_norms(train):
    one = train("sgd", s_init="auto", lr=0.5)
    before = norm(one.params)
    assert one.group["s_init"] == "auto"
    direction = 0.5 * norm(cases.gradients(one.params, 0))
    one.run(1)
    found = one.group["s_init"]
    assert found == pytest.approx(FIRST_UPDATE_NORM * before / direction, rel=1e-6)
    # The tuner's first step leaves S at its start.
    assert float(one.opt.scale) == pytest.approx(found, rel=1e-6)
    assert one.run(2).group["s_init"] == found


def test_weights_of_zero_have_a_start_too(train):
    one = train("sgd", [torch.nn.Parameter(torch.zeros(10, 10))], s_init="auto", lr=1.0)
    one.step([torch.full((10, 10), 3.0)])
    expected = FIRST_UPDATE_NORM * ZERO_WEIGHT_RMS / 3
    assert one.group["s_init"] == pytest.approx(expected, rel=1e-6)


def test_groups_count_at_their_own_lr():
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.1}]
    opt = MechanicSGD(groups, lr=1.0, variant=EXACT)
    cases.give(weights, [torch.full((4,), 2.0), torch.full((4,), 3.0)])
    opt.step()
    expected = FIRST_UPDATE_NORM * math.sqrt(8) / math.sqrt(4 * 2.0**2 + 4 * 0.3**2)
    for group in opt.param_groups:
        assert group["s_init"] == pytest.approx(expected, rel=1e-6)
        assert group["max_peak_lr"] == 1.0


@pytest.mark.parametrize("by", ["scheduler", "hand"])
@pytest.mark.parametrize("first", [0.0, 0.01])
def test_a_warm_up_does_not_inflate_the_start(first, by):
    """The first update is tiny or 0, but the peak is known: from the scheduler, or, where the loop
    sets the lr itself, from the constructor."""
    found = []
    for least in (1.0, first):

        def factor(t, least=least):
            return max(least, min(1.0, t / 5))

        schedule = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=factor)
        schedule = schedule if by == "scheduler" else None
        one = Training(MechanicSGD, "sgd", lr=0.5, s_init=None, schedule=schedule)
        grads = cases.gradients(one.params, 0)
        for t in range(3):
            if by == "hand":
                one.group["lr"] = 0.5 * factor(t)
            one.step(grads)
        assert one.group["max_peak_lr"] == 0.5
        found.append(one.group["s_init"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_first_step_that_is_not_finite_calibrates_nothing(bad):
    found = []
    for spoiled in (False, True):
        one = Training(s_init=None)
        grads = cases.gradients(one.params, 0)
        if spoiled:
            grads[0][0] = bad
        one.step(grads)
        assert (one.group["s_init"] == "auto") == spoiled
        found.append(one.run(1).group["s_init"])
    # Δ is the sum of two updates by then.
    assert 0.3 < found[1] / found[0] < 3


def test_optimizers_that_step_together_have_one_peak_and_start():
    def groups():
        return [{"params": make_weights(seed=i), "lr": lr} for i, lr in enumerate((1.0, 0.1))]

    apart, same = groups(), groups()
    together, one = (
        [MechanicAdamW([group], variant=EXACT) for group in apart],
        MechanicAdamW(same, variant=EXACT),
    )
    for t in range(STEPS):
        for group in (*apart, *same):
            cases.set_gradients(group["params"], t)
        step_together(together)
        one.step()
    for opt in together:
        assert opt.param_groups[0]["max_peak_lr"] == 1.0
        assert float(opt.scale) == pytest.approx(float(one.scale), rel=SUM_RTOL)


def test_a_start_is_saved_and_shared_by_groups_that_join(tmp_path):
    one = Training(lr=0.1, s_init=None).run(3)
    found, peak = (one.group[name] for name in ("s_init", "max_peak_lr"))
    assert isinstance(found, float)
    assert peak == 0.1
    torch.save(one.opt.state_dict(), tmp_path / "state.pt")
    other = MechanicAdamW(make_weights(), lr=0.1, variant=EXACT)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    one.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    for group in (*one.opt.param_groups, *other.param_groups):
        assert (group["s_init"], group["max_peak_lr"]) == (found, peak)
    one.run(2)


def test_a_reset_takes_a_new_start():
    one = Training(s_init="auto").run(3)
    one.opt.reset_scale()
    assert one.group["s_init"] == "auto"
    assert float(one.opt.scale) == pytest.approx(UNCALIBRATED)
    assert isinstance(one.run(1).group["s_init"], float)


def test_a_published_variant_starts_where_its_paper_says():
    for variant, start in {"optax": 1e-6, "paper": 0.0, "pytorch": 0.0}.items():
        scale = MechanicAdamW(make_weights(), variant=variant).scale
        assert scale.tolist() == pytest.approx([6 * start], rel=SUM_RTOL)


# The unit of lr


@pytest.mark.parametrize("base", cases.FUSED)
def test_the_lr_of_the_base_does_not_matter(backend, base):
    """To the rounding of float32 in Δ, which grows in the course of a run.

    (The fallback reads u off weights in float32, where an lr of 1e-4 leaves it few digits.)
    """
    found = []
    for lr in (1.0, 1e-2, 1e-4):
        net = cases.SmallNet()
        opt = cases.build(backend, base, net.parameters(), **{**cases.OPTIONS[base], "lr": lr})
        cases.train_net(net, opt, STEPS)
        found.append((values(net.parameters()), float(opt.scale) * lr))
    for weights, learned_lr in found[1:]:
        assert learned_lr == pytest.approx(found[0][1], rel=1e-2)
        for x, y in zip(weights, found[0][0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-4)


def test_the_published_variants_do_depend_on_it():
    found = []
    for lr in (1.0, 1e-4):
        net = cases.SmallNet()
        opt = MechanicAdamW(net.parameters(), lr=lr, variant="optax")
        cases.train_net(net, opt, STEPS)
        found.append(float(opt.scale) * lr)
    assert found[1] < 0.1 * found[0]


@pytest.mark.parametrize("variant", ["annealed", "optax"])
@pytest.mark.parametrize("base", cases.FUSED)
def test_lr_may_be_traded_for_the_constants_of_the_tuner(backend, base, variant):
    """lr·c with s_init/c, and with λ·c and ε·c, is the same run; for c = 2ⁿ to the bit.

    In the annealed variant λ and ε follow by themselves.
    """
    found = []
    for c in (1.0, 2.0**-13):
        per_lr = c if variant == "optax" else 1.0
        options = {**cases.OPTIONS[base], "lr": cases.LR[base] * c, "s_init": QUICK["s_init"] / c}
        tuner = {"s_decay": 0.01 * per_lr, "tuner_eps": TINY_EPS * per_lr, "variant": variant}
        one = Training(backend, base, **options, **tuner).run()
        found.append([*one.x, one.opt.scale * c])
    assert_same(*found)


@pytest.mark.parametrize("variant", [EXACT, "running"])
def test_a_start_beside_tiny_updates_does_not_overflow(implementation, variant):
    """S of 1e39 would be infinite as a float32 number, and make a weight of 0.4 so."""
    one = Training(implementation, "sgd", s_init="auto", lr=1e-30, variant=variant)
    for _ in range(3):
        one.step([torch.full_like(p, 1e-12) for p in one.params])
    # Of the fallback u = x′ − x is 0 here, and no S is known.
    assert float(one.opt.scale) <= 2 * MOST_SCALE
    assert float(one.opt.scale) > 0 or implementation == "fallback"
    assert all(p.isfinite().all() for p in one.params)
    with pytest.raises(ValueError, match=r"s_init must .* at most 1e\+30, got 1e\+31"):
        MechanicSGD(one.params, s_init=1e31)
