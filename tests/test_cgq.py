"""CGQ against its formula in NumPy: backends, dtypes, resumed runs."""

import copy

import pytest
import torch
from cases import (
    FEW,
    STEPS,
    SUM_RTOL,
    assert_same,
    assert_within,
    loss_of,
    make_weights,
    snapshot,
    ulp,
    values,
)
from cgq_runs import TRIAL, oracle, spread, train, trained, worst

from mechanic_fused.tuners.cgq import CGQ


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_follows_the_formula(backend, weight_decay):
    params, opt, closure = trained(backend, weight_decay=weight_decay)
    searches = closure.searches()
    assert any(searches) and not all(searches)
    (expected, lr, momentum), atol = spread(searches, weight_decay=weight_decay)
    for p, x in zip(params, expected, strict=True):
        assert_within(p, x, atol[0])
    group = opt.param_groups[0]
    assert group["lr"] == pytest.approx(lr, rel=0, abs=atol[1])
    assert group["momentum"] == pytest.approx(momentum, rel=0, abs=atol[2])


def test_one_search_more_or_less_would_show():
    searches = trained()[2].searches()
    (expected, *_), atol = spread(searches)
    searches[STEPS // 2] = not searches[STEPS // 2]
    assert worst(oracle(torch.float64, searches)[0], expected) > atol[0]


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_float32_is_as_near_as_plain_arithmetic(backend, probability):
    params, _, closure = trained(backend, torch.float32, probability=probability)
    searches = closure.searches()
    assert any(searches) == (probability > 0)
    expected, *_ = oracle(torch.float64, searches)
    plain, _, _, largest = oracle(torch.float32, searches)
    assert worst(params, expected) <= 2 * worst(plain, expected) + ulp(largest)


def test_finds_the_minimizer_along_the_gradient_of_a_quadratic(backend):
    a = torch.linspace(0.5, 3, 200, dtype=torch.float64)
    start = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    opt = CGQ([weight], lr=0.01, probability=1.0, bound=10.0, backend=backend)

    def closure():
        opt.zero_grad()
        loss = (a * weight**2).sum() / 2
        if loss.requires_grad:
            loss.backward()
        return loss

    opt.step(closure)
    p = a * start
    curvature = p.dot(a * p)
    best = float(p.dot(p) / curvature)
    # The parabola's a is a difference of losses over trial²/2: their rounding grows by this.
    loss = float((a * start**2).sum() / 2)
    rtol = SUM_RTOL * loss / float(curvature * TRIAL**2 / 2)
    found = 2 * opt.param_groups[0]["lr"] - 0.01
    assert found == pytest.approx(best, rel=rtol)
    assert_within(weight, start - best * p, rtol * best * float(p.abs().max()))
    # Steepest descent with exact steps: the next gradient is at right angles to the last.
    assert float((a * weight.detach()).dot(p)) == pytest.approx(0, abs=rtol * float(p.dot(p)))


def test_a_step_is_no_longer_than_the_bound(backend):
    params = make_weights(dtype=torch.float64)
    opt = CGQ(params, lr=0.1, probability=1.0, bound=0.05, backend=backend)
    train(opt, params, 1)
    assert opt.param_groups[0]["lr"] == (0.1 + 0.05) / 2


def test_backends_agree_to_the_bit_between_searches(cpp):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        found = [trained(name, dtype, probability=0.0)[1] for name in (cpp, "reference")]
        assert_same(snapshot(found[0]), snapshot(found[1]))


def test_bfloat16_weights_keep_a_wide_buffer(backend):
    start = loss_of(make_weights(dtype=torch.bfloat16))
    params, opt, closure = trained(backend, torch.bfloat16)
    assert any(closure.searches())
    assert loss_of(params) < start
    for p in params:
        assert {name: v.dtype for name, v in opt.state[p].items()} == {
            "momentum_buffer": torch.float32,
            "last_gradient": torch.bfloat16,
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_to_the_bit_and_to_the_same_draws(backend, dtype):
    _, opt, whole = trained(backend, dtype)
    half, first, _ = trained(backend, dtype, FEW)
    resumed = [torch.nn.Parameter(x) for x in values(half)]
    second = CGQ(resumed, lr=1.0, seed=5, backend=backend)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    rest = train(second, resumed, STEPS - FEW, first=FEW)
    assert_same(snapshot(second), snapshot(opt))
    assert rest.calls == [call for call in whole.calls if call[0] >= FEW]


def test_a_copy_goes_on_alike(backend):
    params, opt, _ = trained(backend, steps=FEW)
    other = copy.deepcopy(opt)
    train(opt, params, FEW, first=FEW)
    train(other, other.param_groups[0]["params"], FEW, first=FEW)
    assert_same(snapshot(other), snapshot(opt))
