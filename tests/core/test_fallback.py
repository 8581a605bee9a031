"""The fallback takes any optimizer as base, and agrees with the fused path where there is one."""

import copy

import pytest
import torch
from support import cases
from support.cases import FEW, LONG, STEPS, SUM_RTOL, WIDE, Training, assert_same, assert_within

from mechanic_fused import MechanicAdamW, mechanize

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
FUSED_BY_NAME = ("SGD", "Adam", "AdamW")


def of_base(name, dtype, **options):
    base, own = BASES[name]
    return Training(mechanize(base), shapes=MATRICES, dtype=dtype, **own, **options)


def test_the_bases_include_those_that_people_ask_for():
    asked = {"RAdam", "NAdam", "Adagrad", "RMSprop", "Adafactor", "amsgrad", "SignDescent"}
    assert asked <= BASES.keys()
    assert hasattr(torch.optim, "Muon") == ("Muon" in BASES)


@pytest.mark.parametrize("dtype", cases.WIDTHS, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_every_base_learns(name, dtype):
    one = of_base(name, dtype)
    before, scale = one.loss, one.opt.scale
    one.run(LONG)
    assert one.loss < cases.LEARNED * before
    assert (one.opt.scale != scale).all()
    assert all(p.dtype is dtype for p in one.params)
    assert all(delta.dtype is WIDE[dtype] for delta in one.states("delta"))


@pytest.mark.parametrize("name", [name for name in BASES if name not in FUSED_BY_NAME])
def test_delta_sums_the_updates_of_the_base_alone(name):
    """With S·Δ lost beside x, the base sees the same weights at every step, and u is its own."""
    one = of_base(name, torch.float64, lr=0.5, s_init=cases.LOST)
    total = cases.sum_of_updates(BASES[name][0], one, lr=0.5, **BASES[name][1])
    for delta, expected in zip(one.states("delta"), total, strict=True):
        assert float(expected.abs().max()) > 0
        assert_same(delta, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base", cases.FUSED)
def test_fallback_and_fused_path_make_the_same_updates(cpp, base, dtype):
    """In the fallback u is a difference of weights: right to a rounding of x at each step."""
    deltas = []
    for implementation in (cpp, "fallback"):
        # Weights that stay and given gradients, so that only the two roundings differ.
        options = {**cases.OPTIONS[base], "s_init": cases.LOST}
        one = Training(implementation, base, dtype=dtype, **options)
        one.opt.freeze_scale()
        start = one.x
        largest = [torch.zeros_like(x, dtype=WIDE[dtype]) for x in start]
        before = largest
        for t in range(STEPS):
            one.step(cases.gradients(start, t))
            after = cases.values(one.states("delta"))
            sizes = [
                x.abs() + (new - old).abs()
                for x, new, old in zip(start, after, before, strict=True)
            ]
            largest = [torch.maximum(a, b) for a, b in zip(largest, sizes, strict=True)]
            before = after
        assert_same(one.x, start)
        deltas.append(after)
    for one, other, size in zip(*deltas, largest, strict=True):
        # x + u and the difference, a rounding each, beside those of the base's own arithmetic.
        assert_within(one, other, 2 * STEPS * cases.ulp(size))


def test_fallback_and_fused_path_agree_in_float32_to_its_rounding(cpp):
    """In float64 both agree with the oracle: see test_oracle.py."""
    one, other = (Training(each).run() for each in (cpp, "fallback"))
    # Each u of Adam is about 1 and x up to 4, so u is right to 4 roundings; the errors of all steps
    # reach S, and from there x.
    rtol = 4 * STEPS * torch.finfo(torch.float32).eps
    cases.assert_near([one.opt.scale, *one.x], [other.opt.scale, *other.x], rtol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_base_keeps_its_state_in_float32(dtype):
    one = Training("fallback", dtype=dtype).run(FEW)
    for name in ("exp_avg", "exp_avg_sq"):
        assert all(state.dtype is torch.float32 for state in one.states(name))


def test_the_base_keeps_state_of_its_own_beside_that_of_the_weights():
    one = Training(mechanize(SignDescent)).run(FEW)
    assert one.opt.state["calls"] == FEW
    other = Training(mechanize(SignDescent), seed=1).load(copy.deepcopy(one.saved()), FEW)
    for each in (one, other):
        each.run(FEW)
        each.opt.reset_scale()
        each.run(FEW)
    assert_same(other.snapshot(), one.snapshot())
    assert one.opt.to_base().state["calls"] == 3 * FEW


def test_the_base_does_not_see_weights_without_gradients():
    one = Training(cases.RADAM)
    first, *rest = one.params
    one.run(FEW, rest)
    assert first not in one.opt.state or not one.opt.state[first]
    one.run(FEW)
    assert [int(step) for step in one.states("step")] == [FEW, 2 * FEW, 2 * FEW]


@pytest.mark.parametrize("base", cases.FUSED)
def test_a_subclass_of_a_fused_base_takes_the_fallback(base):
    """It may step otherwise."""
    assert Training("fallback", base).opt.implementation.startswith("fallback: Plain")
    assert Training("auto", base).opt.implementation.startswith("fused")


def test_the_fallback_takes_any_backend_for_its_own_ops(backend):
    options = {"dtype": torch.float64, "amsgrad": True, "weight_decay": 0.01}
    one = Training(MechanicAdamW, backend=backend, **options).run(FEW)
    other = Training(mechanize(torch.optim.AdamW), **options).run(FEW)
    cases.assert_near(one.x, other.x, STEPS * SUM_RTOL)


def test_a_dry_run_leaves_the_groups_as_they_were():
    """Some optimizers count their steps in param_groups."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["steps"] = group.get("steps", 0) + 1
            super().step(closure)

    one = Training(mechanize(Counting), lr=0.05)
    before = one.x
    one.step_on_zeros()
    assert "steps" not in one.group
    assert_same(one.x, before)
    one.run(FEW)
    assert one.group["steps"] == FEW


def test_the_base_writes_to_copies_of_the_gradients():
    class Scribbler(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.zero_()

    one = Training(mechanize(Scribbler), lr=0.05)
    grads = cases.gradients(one.params, 0)
    one.step(grads)
    assert_same(grads, cases.gradients(cases.make_weights(), 0))


def test_a_base_that_raises_leaves_weights_and_gradients_as_they_were():
    """What the base has done to its own state we cannot undo without a copy, and say so."""

    class Raising(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise KeyError("the base")

    one = Training(mechanize(Raising), dtype=torch.bfloat16, lr=0.05).run(FEW)
    before, grads = one.snapshot(), cases.gradients(one.params, FEW)
    one.opt.fails = True
    with (
        pytest.raises(KeyError, match="the base"),
        pytest.warns(UserWarning, match="the base's own state may have moved"),
    ):
        one.step(grads)
    assert_same(one.snapshot(), before)
    assert all(p.grad is g for p, g in zip(one.params, grads, strict=True))
    one.opt.fails = False
    one.run(1)


def test_narrow_state_of_a_fused_run_is_widened_for_its_base():
    """An option without a fused update is asked for in the middle of a run with 16 bits."""
    weight = torch.nn.Parameter(torch.ones(128, 64))
    narrow = MechanicAdamW([weight], lr=1.0, optim_bits=16)
    weight.grad = weight.detach().clone()
    narrow.step()
    assert narrow.state[weight]["exp_avg"].dtype is torch.bfloat16
    saved = narrow.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    saved["state"][0]["max_exp_avg_sq"] = torch.zeros(128, 64)
    wide = MechanicAdamW([weight], lr=1.0, amsgrad=True)
    wide.load_state_dict(saved)
    wide.step()
    assert wide.state[weight]["exp_avg"].dtype is torch.float32


def test_lazy_weights_may_be_given_before_they_have_a_shape():
    layer = torch.nn.LazyLinear(3)
    opt = MechanicAdamW(layer.parameters(), lr=1.0)
    layer(torch.ones(2, 4)).sum().backward()
    opt.step()
    assert opt.scale > 0
