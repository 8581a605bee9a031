"""Codes: what they mean, by an oracle in float64, and what they do with odd numbers."""

import math

import numpy as np
import pytest
import torch
from support.cases import assert_same

from mechanic_fused.backends import quantize
from mechanic_fused.backends.quantize import FORMATS, LINEAR, SIGNED, UNSIGNED, Codes

EVERY = range(quantize.FRACTION)
"""Every ξ."""
HALF = quantize.FRACTION // 2

FORMAT = pytest.mark.parametrize("codes", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])

EPS = 2.0**-23


def root_of(x, codes: Codes):
    """The root of x on a line between powers of 2, in float64: by exponent and fraction."""
    fraction, exponent = np.frexp(np.asarray(x, dtype=np.float64))
    place = (exponent - 1 + 2 * fraction - 1) / 2**codes.root
    whole = np.floor(place)
    return np.ldexp(1 + place - whole, whole.astype(int))


def blocks(codes, n=64, size=128, spread=2.0):
    rng = torch.Generator().manual_seed(0)
    x = torch.exp(spread * torch.randn(n, size, generator=rng, dtype=torch.float64))
    x *= torch.exp(8 * torch.randn(n, 1, generator=rng, dtype=torch.float64))
    signs = torch.randn(n, size, generator=rng).sign() if codes.signed else 1.0
    return (x * signs).float()


@FORMAT
def test_a_root_and_back_loses_the_last_bits_alone(codes):
    x = blocks(codes).abs().view(-1)
    r = quantize.compand(x, codes)
    np.testing.assert_allclose(r.numpy(), root_of(x, codes), rtol=2**codes.root * EPS)
    back = quantize.expand(r, codes)
    np.testing.assert_allclose(back.numpy(), x.numpy(), rtol=2**codes.root * EPS)
    assert_same(quantize.compand(back, codes), r)
    assert (r.diff()[x.diff() > 0] >= 0).all()
    assert quantize.compand(torch.ones(1), codes) == 1


@FORMAT
@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_number_is_counted_to_a_code_and_rounded_as_its_fraction_says(codes, size):
    x = blocks(codes, size=size)
    largest = x.abs().amax(1, keepdim=True)
    exact = codes.top * root_of(x.abs(), codes) / root_of(largest, codes)
    total = np.zeros_like(exact)
    for xi in EVERY:
        q, _ = quantize.quantize(x, xi, codes)
        count = q.to(torch.int32).abs().numpy()
        assert (np.abs(count - exact) < 1 + 1e-4).all()
        assert (torch.sign(q.to(torch.int32)) == torch.where(q == 0, 0, x.sign())).all()
        total += count
    mean = total / len(EVERY)
    # One in 4,096 for ξ, and what float32 loses of 255 codes; codes of 0 are 1 where unsigned.
    fair = (exact >= 1) & (exact <= codes.top)
    assert np.abs(mean - exact)[fair].max() < 2.0**-12 + 255 * 4 * EPS


# Smaller ones have codes for numbers that no float holds.
@pytest.mark.parametrize(
    ("codes", "largest"),
    [
        *((codes, size) for codes in (SIGNED, UNSIGNED) for size in (1e-12, 1.0, 3e7, 1e30)),
        (SIGNED, 1e-28),
        (UNSIGNED, 1e-18),
    ],
    ids=str,
)
def test_codes_that_are_not_changed_stay_whatever_rounds_them(codes, largest):
    q = torch.arange(256).view(2, 128).to(codes.dtype)
    q = torch.arange(-127, 128).to(torch.int8) if codes is SIGNED else q.view(-1)[1:]
    q = torch.cat([q, q[-1:]]).view(2, 128).clone()
    q[:, 0] = codes.top  # the scale of a block is that of its largest
    scale = quantize.compand(torch.full((2,), largest), codes) / codes.top
    x = quantize.dequantize(q, scale, codes)
    assert x.isfinite().all()
    assert float(x.max()) == pytest.approx(largest, rel=2**codes.root * 2 * EPS)
    for xi in (0, 1, HALF, quantize.FRACTION - 1):
        again, scales = quantize.quantize(x, xi, codes)
        assert_same(again, q)
        np.testing.assert_allclose(scales.numpy(), scale.numpy(), rtol=2 * EPS)


@FORMAT
def test_zeros_stay_zeros_beside_anything(codes):
    x = blocks(codes)
    x[::2, ::3] = 0
    x[5] = 0
    q, scale = quantize.quantize(x, quantize.FRACTION - 1, codes)
    assert (q[x == 0] == 0).all()
    assert (quantize.dequantize(q, scale, codes)[x == 0] == 0).all()
    assert (quantize.dequantize(q, torch.zeros_like(scale), codes) == 0).all()


def test_v_above_zero_is_never_zero():
    """Or a momentum over it would be an infinite update."""
    x = torch.full((1, 128), 1e-30)
    x[0, 0] = 1.0
    q, scale = quantize.quantize(x, 0, UNSIGNED)
    assert (q >= 1).all()
    assert (quantize.dequantize(q, scale, UNSIGNED) > 0).all()


@FORMAT
@pytest.mark.parametrize("largest", [1.4e-45, 1e-38, 1e38, torch.finfo(torch.float32).max])
def test_the_largest_and_smallest_numbers_stay_finite(codes, largest):
    x = torch.full((2, 32), largest)
    x[1] = 0
    x[1, 3] = largest
    q, scale = quantize.quantize(x, HALF, codes)
    back = quantize.dequantize(q, scale, codes)
    assert back.isfinite().all()
    assert scale.isfinite().all()
    if largest > 1e-37:
        limited = min(largest, 2.0**127)
        assert float(back[0, 0]) == pytest.approx(limited, rel=2**codes.root * 2 * EPS)
        assert (back[1, :3] == 0).all()


def test_a_momentum_that_is_not_finite_is_nan_and_spoils_no_neighbour():
    x = blocks(SIGNED, n=4)
    expected = quantize.quantize(x, HALF, SIGNED)
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = x.clone()
        largest = x.abs().argmax(1)
        places = (largest + 1) % 128
        spoilt[torch.arange(4), places] = bad
        q, scale = quantize.quantize(spoilt, HALF, SIGNED)
        assert (q[torch.arange(4), places] == -128).all()
        assert quantize.dequantize(q, scale, SIGNED).isnan().sum() == 4
        kept = torch.ones_like(x, dtype=torch.bool)
        kept[torch.arange(4), places] = False
        assert_same(q[kept], expected[0][kept])
        assert_same(scale, expected[1])


def test_a_v_that_is_nan_or_infinite_does_not_spoil_its_block():
    """A v that overflowed is a large one: its weight moves little, as in torch, where it stands."""
    x = blocks(UNSIGNED, n=2)
    x[0, 1], x[1, 1] = math.nan, math.inf
    q, scale = quantize.quantize(x, HALF, UNSIGNED)
    back = quantize.dequantize(q, scale, UNSIGNED)
    assert back.isfinite().all()
    assert back[0, 1] == 0
    assert float(back[1, 1]) == pytest.approx(2.0**127, rel=1e-5)


def drawn(number, steps, elements, codes):
    """Return ξ of elements in each step, (steps, elements) float64."""
    element = torch.arange(elements)
    bits = [
        quantize.rounding_bits(number, torch.tensor(float(t)), element, codes.stride)
        for t in range(steps)
    ]
    return torch.stack(bits).double() / 2.0**32


@FORMAT
@pytest.mark.parametrize("fraction", [0.002, 0.037, 0.31, 0.5])
@pytest.mark.parametrize("over", ["steps", "elements"])
def test_what_is_rounded_up_is_even_over_any_run_of_steps_and_of_elements(codes, fraction, over):
    """An irrational number leaves no run with many more or fewer roundings up than due."""
    found = drawn(7, 2000, 64, codes) if over == "steps" else drawn(7, 64, 2000, codes).T
    counted = (found >= 1 - fraction).double().cumsum(0)
    due = fraction * torch.arange(1, len(found) + 1)[:, None]
    # By chance they would be √(2000·0.25) = 22 apart at the end.
    assert (counted - due).abs().max() < 5


def test_weights_and_their_states_are_rounded_apart():
    formats = (SIGNED, UNSIGNED, LINEAR)
    draws = [drawn(number, 1, 4096, codes)[0] for number in (0, 1) for codes in formats]
    for i, one in enumerate(draws):
        assert len(one.unique()) == len(one)
        for other in draws[:i]:
            apart = (one - other) % 1
            assert float(torch.minimum(apart, 1 - apart).mean()) > 0.01


def test_a_fraction_is_what_is_left_of_the_bits():
    bits = torch.tensor([0, (1 << 20) - 1, 1 << 20, (1 << 32) - 1])
    assert quantize.fraction(bits).tolist() == [0, 0, 1, quantize.FRACTION - 1]


def test_codes_of_16_bits_count_powers_of_2():
    x = blocks(LINEAR)
    largest = x.abs().amax(1).double()
    one = 2.0 ** (largest.log2().floor() - 14)
    exact = x.double() / one[:, None]
    total = torch.zeros_like(exact)
    for xi in range(0, quantize.FRACTION, 16):
        q, scale = quantize.quantize(x, xi, LINEAR)
        assert_same(scale.double(), one)
        assert ((q - exact).abs() < 1 + 1e-4).all()
        assert_same(quantize.dequantize(q, scale, LINEAR).double(), q.double() * one[:, None])
        total += q
    fair = exact.abs() < LINEAR.top - 1
    assert (total / 256 - exact)[fair].abs().max() < 2.0**-7


@pytest.mark.parametrize("largest", [1e-28, 1e-12, 1.0, 3e7, 1e30])
def test_codes_of_16_bits_that_are_not_changed_stay_whatever_rounds_them(largest):
    rng = torch.Generator().manual_seed(0)
    q = torch.randint(-LINEAR.top, LINEAR.top + 1, (64, 64), generator=rng).to(torch.int16)
    q[:, 0], q[:, 1] = LINEAR.top, -LINEAR.top
    scale = torch.full((64,), 2.0 ** math.floor(math.log2(largest)))
    x = quantize.dequantize(q, scale, LINEAR)
    for xi in (0, 1, HALF, quantize.FRACTION - 1):
        again, scales = quantize.quantize(x, xi, LINEAR)
        assert_same((again, scales), (q, scale))


def test_odd_numbers_among_codes_of_16_bits():
    tiny, huge = 1.4e-45, torch.finfo(torch.float32).max
    x = torch.tensor([[math.nan, 1.0], [math.inf, -2.0], [0.0, 0.0], [tiny, 0.0], [huge, -1.0]])
    q, scale = quantize.quantize(x, HALF, LINEAR)
    back = quantize.dequantize(q, scale, LINEAR)
    assert q[0, 0] == q[1, 0] == -32768
    assert back.isnan().tolist() == [[True, False], [True, False], *[[False, False]] * 3]
    assert back[:3, 1].tolist() == [1.0, -2.0, 0.0]
    assert (back[2:4] == 0).all()
    assert back[4, 0] == 2.0**127
    assert scale.isfinite().all()


def test_delta_in_codes_of_16_bits_is_near_the_sum_of_its_updates():
    """Within 0.4 %; in bfloat16, rounded stochastically, it is 8 to 10 % away."""
    rng = torch.Generator().manual_seed(1)
    size, drift = torch.exp(torch.randn(64, 64, generator=rng)), torch.randn(64, 64, generator=rng)
    element = torch.arange(64 * 64).view(64, 64)
    exact, delta = torch.zeros(64, 64, dtype=torch.float64), torch.zeros(64, 64)
    for t in range(2000):
        u = (0.1 * drift + torch.randn(64, 64, generator=rng)) * size
        exact += u.double()
        bits = quantize.rounding_bits(0, torch.tensor(float(t)), element, LINEAR.stride)
        q, scale = quantize.quantize(delta + u, quantize.fraction(bits), LINEAR)
        delta = quantize.dequantize(q, scale, LINEAR)
    assert float((delta - exact).norm() / exact.norm()) < 0.004


def test_the_formats_are_named_by_their_dtypes():
    assert {torch.int8: SIGNED, torch.uint8: UNSIGNED, torch.int16: LINEAR} == FORMATS
