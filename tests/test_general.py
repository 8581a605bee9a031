"""The general road: any optimizer as base, watched from outside, in step with the fused road."""

import copy

import pytest
import torch
from cases import (
    FEW,
    FUSED,
    GENERAL,
    LONG,
    LOST,
    OPTIONS,
    QUICK,
    STEPS,
    SUM_RTOL,
    WIDE,
    assert_same,
    assert_within,
    build,
    double,
    gradients,
    loss_of,
    make_weights,
    run,
    set_gradients,
    snapshot,
    ulp,
    values,
)

from mechanic_fused import MechanicAdamW, mechanize

# What is left of a loss that has been learned from.
LEARNED = 0.5
MATRICES = ((4, 5), (3, 3))  # Muon wants nothing else

TORCH_BASES = [
    getattr(torch.optim, name)
    for name in torch.optim.__all__
    if name[0].isupper() and name not in ("Optimizer", "LBFGS", "SparseAdam")
]


class SignDescent(torch.optim.Optimizer):
    """Somebody's own optimizer: new weights by `.data =`, state under a name of its own."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        self.state["calls"] = self.state.get("calls", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    assert p.grad.isfinite().all()
                    assert not {"x_ref", "delta"} & self.state[p].keys()
                    seen = self.state[p].setdefault("seen", torch.zeros_like(p))
                    seen += p.grad.abs()
                    p.data = p.data - group["lr"] * p.grad.sign()


class Foreach(torch.optim.AdamW):
    """A subclass that takes torch's multi-tensor implementation."""

    def __init__(self, params, **options):
        super().__init__(params, foreach=True, **options)


BASES = {
    **{base.__name__: (base, {}) for base in TORCH_BASES},
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "centered RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "SignDescent": (SignDescent, {}),
    "Foreach": (Foreach, {}),
}
EXACT_CLASSES = ("SGD", "Adam", "AdamW")  # are fused


def test_the_bases_asked_for_are_among_them():
    asked = {"RAdam", "NAdam", "Adagrad", "RMSprop", "Adafactor", "amsgrad", "SignDescent"}
    assert asked <= BASES.keys()
    assert hasattr(torch.optim, "Muon") == ("Muon" in BASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_every_base_learns(name, dtype):
    base, options = BASES[name]
    params = make_weights(MATRICES, dtype)
    opt = mechanize(base)(params, lr=1.0, **QUICK, **options)
    before, scale = loss_of(params), opt.scale
    run(opt, params, LONG)
    assert loss_of(params) < LEARNED * before
    assert (opt.scale != scale).all()
    assert all(p.dtype is dtype for p in params)
    assert all(opt.state[p]["delta"].dtype is WIDE[dtype] for p in params)


@pytest.mark.parametrize("name", [name for name in BASES if name not in EXACT_CLASSES])
def test_delta_is_where_the_base_alone_would_be(name):
    """With S·Δ lost beside x, the base sees the same weights at every step, and u is its own."""
    base, options = BASES[name]
    params = make_weights(MATRICES, torch.float64)
    opt = mechanize(base)(params, lr=0.5, s_init=LOST, **options)
    opt.freeze_scale()
    alone = [torch.nn.Parameter(double(p)) for p in params]
    plain = base(alone, lr=0.5, **options)
    start = values(params)
    moved = [torch.zeros_like(x) for x in start]
    for t in range(STEPS):
        for p, q, g in zip(params, alone, gradients(start, t), strict=True):
            p.grad, q.grad = g, g.clone()
        opt.step()
        plain.step()
        for q, x, total in zip(alone, start, moved, strict=True):
            total += q.detach() - x
            q.data.copy_(x)
    assert_same(values(params), start)
    for p, total in zip(params, moved, strict=True):
        assert float(total.abs().max()) > 0
        assert_same(opt.state[p]["delta"], total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base", FUSED)
def test_both_roads_make_the_same_updates(cpp, base, dtype):
    """On the general road u is a difference of weights: right to a rounding of x at each step."""
    deltas = []
    for road in (cpp, "general"):
        params = make_weights(dtype=dtype)
        start = values(params)
        # Weights that stay and given gradients, so that nothing but the roads' rounding differs.
        opt = build(road, base, params, s_init=LOST, **OPTIONS[base])
        opt.freeze_scale()
        largest = [torch.zeros_like(x, dtype=WIDE[dtype]) for x in start]
        for t in range(STEPS):
            for p, g in zip(params, gradients(start, t), strict=True):
                p.grad = g
            before = [opt.state[p]["delta"].clone() if t else 0.0 for p in params]
            opt.step()
            for p, old, size in zip(params, before, largest, strict=True):
                u = opt.state[p]["delta"] - old
                size.copy_(torch.maximum(size, p.detach().abs() + u.abs()))
        assert_same(values(params), start)
        deltas.append([opt.state[p]["delta"] for p in params])
    for one, other, size in zip(*deltas, largest, strict=True):
        # x + u and the difference, a rounding each, beside those of the base's own arithmetic.
        assert_within(one, other, 2 * STEPS * ulp(size))


@pytest.mark.parametrize("scale", ["global", "parameter"])
@pytest.mark.parametrize("base", FUSED)
def test_both_roads_learn_the_same_scale(cpp, base, scale):
    found = []
    for road in (cpp, "general"):
        params = make_weights(dtype=torch.float64)
        opt = build(road, base, params, scale=scale, **QUICK, **OPTIONS[base])
        run(opt, params)
        found.append([opt.scale, *values(params)])
    for one, other in zip(*found, strict=True):
        size = float(other.abs().max())
        assert_within(one, other, STEPS * SUM_RTOL * size)


def test_both_roads_agree_in_float32_to_its_rounding(cpp):
    found = []
    for road in (cpp, "general"):
        params = make_weights()
        opt = build(road, "adamw", params, **QUICK)
        run(opt, params)
        found.append([opt.scale, *values(params)])
    # Each u of Adam is about 1 and x up to 4, so u is right to 4 roundings; the errors of all steps
    # reach S, and from there x.
    rtol = 4 * STEPS * torch.finfo(torch.float32).eps
    for one, other in zip(*found, strict=True):
        assert_within(one, other, rtol * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bases_state_is_wide(dtype):
    params = make_weights(dtype=dtype)
    opt = build("general", "adamw", params, **QUICK)
    run(opt, params, FEW)
    for p in params:
        assert opt.state[p]["exp_avg"].dtype is opt.state[p]["exp_avg_sq"].dtype is torch.float32


def test_an_option_switched_on_in_mid_run_changes_the_road(cpp):
    """The fused state is the base's own, so the base goes on with it."""
    params = make_weights()
    opt = build(cpp, "adamw", params, **QUICK)
    run(opt, params)
    scale, loss = opt.scale, loss_of(params)
    opt.param_groups[0]["amsgrad"] = True
    for p in params:
        opt.state[p]["max_exp_avg_sq"] = opt.state[p]["exp_avg_sq"].clone()
    assert opt.road.startswith("general: amsgrad")
    assert_same(opt.scale, scale)
    run(opt, params, LONG, first=STEPS)
    assert loss_of(params) < loss
    opt.param_groups[0]["amsgrad"] = False
    assert opt.road == f"fused: {cpp}"
    run(opt, params, FEW, first=STEPS + LONG)
    assert opt.state[params[0]]["step"] == STEPS + LONG + FEW


def test_an_optimizer_with_state_of_its_own_beside_the_weights():
    params, others = make_weights(), make_weights()
    opt = mechanize(SignDescent)(params, lr=1.0, **QUICK)
    run(opt, params, FEW)
    assert opt.state["calls"] == FEW
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    other = mechanize(SignDescent)(others, lr=1.0, **QUICK)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for optimizer, weights in ((opt, params), (other, others)):
        run(optimizer, weights, FEW, first=FEW)
        optimizer.reset_scale()
        run(optimizer, weights, FEW, first=2 * FEW)
    assert_same(snapshot(other), snapshot(opt))
    assert opt.to_base().state["calls"] == 3 * FEW


def test_weights_without_gradients_are_not_shown_to_the_base():
    params = make_weights()
    opt = mechanize(torch.optim.RAdam)(params, lr=1.0, **QUICK)
    run(opt, params[1:], FEW)
    assert params[0] not in opt.state or not opt.state[params[0]]
    run(opt, params, FEW, first=FEW)
    assert opt.state[params[0]]["step"] == FEW
    assert opt.state[params[1]]["step"] == 2 * FEW


@pytest.mark.parametrize("base", FUSED)
def test_a_subclass_of_a_fused_base_is_not_fused(base):
    """It may step otherwise."""
    opt = GENERAL[base](make_weights())
    assert opt.road.startswith("general: Plain")
    assert FUSED[base](make_weights()).road.startswith("fused")


def test_the_general_road_takes_any_backend_for_its_own_verbs(backend):
    params, others = make_weights(dtype=torch.float64), make_weights(dtype=torch.float64)
    opt = MechanicAdamW(params, amsgrad=True, backend=backend, **QUICK)
    run(opt, params, FEW)
    plain = mechanize(torch.optim.AdamW)(others, amsgrad=True, weight_decay=0.01, **QUICK)
    run(plain, others, FEW)
    for p, q in zip(params, others, strict=True):
        assert_within(p, q, STEPS * SUM_RTOL * float(q.detach().abs().max()))


def test_a_dry_step_leaves_the_groups_as_they_were():
    """Some optimizers count their steps in param_groups."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["steps"] = group.get("steps", 0) + 1
            super().step(closure)

    params = make_weights()
    opt = mechanize(Counting)(params, lr=0.05, **QUICK)
    before = values(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert "steps" not in opt.param_groups[0]
    assert_same(values(params), before)
    run(opt, params, FEW)
    assert opt.param_groups[0]["steps"] == FEW


def test_gradients_are_the_users_also_when_the_base_writes_to_them():
    class Scribbler(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.zero_()

    params = make_weights()
    opt = mechanize(Scribbler)(params, lr=0.05, **QUICK)
    set_gradients(params, 0)
    grads = values([p.grad for p in params])
    opt.step()
    assert_same(values([p.grad for p in params]), grads)
