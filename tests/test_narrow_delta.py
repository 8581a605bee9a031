"""narrow_delta=True: Δ in bfloat16, rounded right on average and by everybody alike."""

import copy
import math

import numpy as np
import pytest
import torch
from cases import QUICK, assert_same, build
from runs import RADAM

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD
from mechanic_fused.backends import formulas

STEPS = 12
SIGMAS = 6
"""Standard deviations that a mean over random bits may be off: one in 10⁹ is further."""

MASK = (1 << 32) - 1


def weight(*shape, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(*shape, generator=rng).to(dtype))


def give_gradient(p, t):
    rng = torch.Generator().manual_seed(1000 + t)
    p.grad = (torch.randn(p.shape, generator=rng) + 0.5).to(p.dtype)


def run(opt, params, steps=STEPS, first=0):
    for t in range(first, first + steps):
        for p in params:
            give_gradient(p, t)
        opt.step()


def delta_of(opt, p):
    return opt.state[p]["delta"]


def scrambled(n):
    """The hash, written apart: on Python's own numbers."""
    n = (n ^ (n >> 16)) * 0x7FEB352D & MASK
    n = (n ^ (n >> 15)) * 0x846CA68B & MASK
    return n ^ (n >> 16)


def neighbours(x):
    """The bfloat16 towards 0 and the one beyond x, float64, of float32 numbers."""
    bits = x.view(torch.int32)
    low = (bits & ~0xFFFF).view(torch.float32)
    high = ((bits & ~0xFFFF) + 0x10000).view(torch.float32)
    return low.double(), high.double()


def test_the_rounding_takes_each_neighbour_as_often_as_it_is_near():
    """Against float64: the mean over many bits is x, each result one of x's two neighbours."""
    x = torch.cat([weight(2000).detach(), torch.tensor([0.0, -0.0, 1.0, 1.5e-39, -2e38, 0.1])])
    low, high = neighbours(x)
    count = 4096
    total = torch.zeros(len(x), dtype=torch.float64)
    for t in range(count):
        bits = formulas.random_bits16(formulas.rounding_seed(torch.tensor(float(t)), 3), torch.arange(len(x)))
        found = formulas.stochastic_round(bits, x).double()
        assert ((found == low) | (found == high)).all()
        total += found
    part = (x.double() - low) / (high - low)
    sigma = (high - low).abs() * (part * (1 - part) / count).sqrt()
    assert ((total / count - x.double()).abs() <= SIGMAS * sigma).all()
    # Errors of different elements are independent: their mean has √n less of them.
    error = (total / count - x.double())[:2000] / (high - low).abs()[:2000]
    assert abs(float(error.mean())) <= SIGMAS * 0.5 / math.sqrt(count * 2000)


def test_what_is_not_finite_stays_what_it_is():
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, -nan, inf, -inf]).view(torch.int32)
    # A NaN whose only bits are among those that are cut off.
    x = torch.cat([x, torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32)])
    for bits in (0, 1, 0xFFFF):
        found = formulas.stochastic_round(torch.full((6,), bits), x.view(torch.float32))
        assert found.isnan().tolist() == [True, True, False, False, True, True]
        assert found[2:4].tolist() == [inf, -inf]


def test_the_bits_are_a_hash_of_step_weight_and_element():
    for step, number in ((0, 0), (1, 0), (7, 5), (1 << 33, 2)):
        key = scrambled(scrambled(step & MASK) + number & MASK)
        expected = [scrambled(i + key & MASK) >> 16 for i in range(100)]
        key = formulas.rounding_seed(torch.tensor(float(step), dtype=torch.float64), number)
        assert formulas.random_bits16(key, torch.arange(100)).tolist() == expected


def test_bits_of_neighbouring_elements_steps_and_weights_have_nothing_in_common():
    n = 1 << 16
    rows = [
        formulas.random_bits16(formulas.rounding_seed(torch.tensor(float(t)), number), torch.arange(n))
        for t, number in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1))
    ]
    rows.append(rows[0].roll(1))
    correlation = np.corrcoef(torch.stack(rows).numpy())
    assert np.abs(correlation - np.eye(len(rows))).max() <= SIGMAS / math.sqrt(n)
    # Each of the 16 bits is as often 1 as 0.
    ones = (rows[1][:, None] >> torch.arange(16)) & 1
    assert ((ones.double().mean(0) - 0.5).abs() <= SIGMAS * 0.5 / math.sqrt(n)).all()


def test_updates_below_half_a_last_place_count_on_average(road):
    """Where Δ is 1 and u is −2⁻¹⁰, rounding to nearest would leave it for ever."""
    p = weight(10_000)
    opt = build(road, "sgd", [p], lr=1.0, narrow_delta=True, **QUICK)
    p.grad = torch.full_like(p, -1.0)
    opt.step()
    assert (delta_of(opt, p) == 1).all()
    steps, small = 40, 2.0**-10
    for _ in range(steps):
        p.grad = torch.full_like(p, small)
        opt.step()
    # Below 1 bfloat16 numbers are 2⁻⁸ apart: a quarter of the elements moves in each step.
    moved = 1 - delta_of(opt, p).double()
    assert moved.unique().numel() > 5
    variance = steps * 0.25 * 0.75 * 2.0**-16
    assert abs(float(moved.mean()) - steps * small) <= SIGMAS * math.sqrt(variance / p.numel())
    assert float(moved.var()) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("cls", [MechanicAdamW, MechanicLion, MechanicSGD, RADAM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_delta_is_kept_in_bfloat16_and_two_runs_have_the_same_bits(cls, dtype):
    found = []
    for _ in range(2):
        params = [weight(33, 7, dtype=dtype), weight(5, dtype=dtype, seed=1)]
        opt = cls(params, lr=0.5, narrow_delta=True, **QUICK)
        run(opt, params)
        assert all(delta_of(opt, p).dtype is torch.bfloat16 for p in params)
        found.append([{**opt.state[p], "x": p.detach()} for p in params])
    assert_same(found[1], found[0])
    assert float(found[0][0]["delta"].abs().sum()) > 0


@pytest.mark.parametrize(
    ("dtype", "narrow_state", "narrow_delta", "expected"),
    [
        (torch.float32, False, False, 20),
        (torch.float32, True, True, 18),
        (torch.bfloat16, False, False, 16),
        (torch.bfloat16, True, False, 12),
        (torch.bfloat16, False, True, 14),
        (torch.float16, True, True, 10),
    ],
    ids=str,
)
def test_bytes_a_parameter_are_those_of_the_docs(dtype, narrow_state, narrow_delta, expected):
    p = weight(64, dtype=dtype)
    opt = MechanicAdamW([p], narrow_state=narrow_state, narrow_delta=narrow_delta, **QUICK)
    run(opt, [p], 2)
    kept = [p, *(x for x in opt.state[p].values() if torch.is_tensor(x) and x.dim())]
    assert sum(x.element_size() for x in kept) == expected


def test_float64_weights_keep_their_delta():
    p = weight(3, dtype=torch.float64)
    opt = MechanicAdamW([p], narrow_delta=True)
    run(opt, [p], 2)
    assert delta_of(opt, p).dtype is torch.float64


def test_two_weights_with_the_same_numbers_are_rounded_apart(backend):
    """What a weight's bits depend on is its number in the optimizer, not its place in a bucket."""
    params = [weight(500), weight(500)]
    opt = MechanicAdamW(params, narrow_delta=True, backend=backend, **QUICK)
    run(opt, params, 3)
    assert not torch.equal(delta_of(opt, params[0]), delta_of(opt, params[1]))
    # A third one between them, of another bucket, changes the second's number alone.
    others = [weight(500), weight(500, dtype=torch.bfloat16), weight(500)]
    other = MechanicAdamW(others, narrow_delta=True, backend=backend, **QUICK)
    run(other, others, 1)
    again = [weight(500), weight(500)]
    opt = MechanicAdamW(again, narrow_delta=True, backend=backend, **QUICK)
    run(opt, again, 1)
    assert_same(delta_of(other, others[0]), delta_of(opt, again[0]))
    assert not torch.equal(delta_of(other, others[2]), delta_of(opt, again[1]))


def test_bits_go_by_the_place_in_memory_whatever_the_axes(cpp):
    made = []
    for backend in ("reference", cpp):
        p = torch.nn.Parameter(weight(6, 5, 4).detach().permute(2, 0, 1))
        assert not p.is_contiguous()
        opt = MechanicSGD([p], lr=0.1, narrow_delta=True, backend=backend, **QUICK)
        run(opt, [p], 1)
        made.append(delta_of(opt, p))
    assert_same(made[1], made[0])
    assert made[0].stride() == p.stride()


def test_a_checkpoint_may_be_widened_and_narrowed(road):
    for wide_first in (True, False):
        p = weight(40, 30)
        opt = build(road, "adamw", [p], narrow_delta=not wide_first, **QUICK)
        run(opt, [p])
        old = delta_of(opt, p).clone()
        q = torch.nn.Parameter(p.detach().clone())
        other = build(road, "adamw", [q], narrow_delta=wide_first, **QUICK)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        q.grad = torch.zeros_like(q)
        other.prepare()
        new = delta_of(other, q)
        assert new.dtype is (torch.bfloat16 if wide_first else torch.float32)
        assert torch.equal(new, old.to(new.dtype))


def test_a_weight_keeps_its_place_where_delta_is_narrowed():
    """x_ref moves by what rounding Δ would have moved the weight."""
    p = weight(40, 30)
    opt = MechanicSGD([p], lr=0.1, **QUICK)
    run(opt, [p])
    before = p.detach().clone()
    q = torch.nn.Parameter(before.clone())
    other = MechanicSGD([q], lr=0.1, narrow_delta=True, **QUICK)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    other.freeze_scale()
    q.grad = torch.zeros_like(q)
    other.step()
    # Its own rounding of x_ref + S·Δ, once in shifting and once in writing.
    assert torch.allclose(q.detach(), before, rtol=0, atol=2 * 2.0**-23 * float(before.abs().max()))


def test_a_gradient_that_is_released_is_rounded_by_the_same_bits():
    found = []
    for release in (False, True):
        params = [weight(300), weight(200, seed=1)]
        opt = MechanicSGD(params, lr=0.1, momentum=0.9, narrow_delta=True, **QUICK)
        if release:
            opt.release_gradients()
        for _ in range(4):
            opt.zero_grad()
            sum(((p - 1) ** 2).sum() for p in params).backward()
            opt.step()
            opt.freeze_scale()
        found.append([delta_of(opt, p) for p in params])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("given", [1, None, "bfloat16", torch.bfloat16])
def test_an_option_that_is_no_bool_is_refused(given):
    with pytest.raises(ValueError, match="narrow_delta must be True or False, got"):
        MechanicAdamW([weight(3)], narrow_delta=given)


def test_what_is_not_finite_in_delta_stays_what_it_is(backend):
    """In the kernels too: adding bits to a NaN that an operation gave must not make a number."""
    found = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 1.0]).repeat(40)
    for t in range(4):
        p = weight(len(found))
        opt = MechanicAdamW([p], weight_decay=0.0, narrow_delta=True, backend=backend, **QUICK)
        run(opt, [p], 1 + t)
        delta_of(opt, p).copy_(found)
        run(opt, [p], 1, first=1 + t)
        after = delta_of(opt, p).float()
        assert torch.equal(after.isnan(), found.isnan())
        assert torch.equal(after[found.isinf()], found[found.isinf()])
        assert after[found == 1].isfinite().all()
