"""8-bit codes: what they mean, by an oracle in float64, and what they do with odd numbers."""

import math

import numpy as np
import pytest
import torch
from support.cases import assert_same

from mechanic_fused.backends import quantize
from mechanic_fused.backends.quantize import FORMATS, SIGNED, UNSIGNED, Codes

EVERY = torch.arange(1 << 16)
"""Random bits."""

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
    signs = torch.randn(n, size, generator=rng).sign() if codes is SIGNED else 1.0
    return (x * signs).float()


def every_uniform():
    return quantize.uniform(EVERY).unique()


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
    every = every_uniform()
    for xi in every.tolist():
        q, _ = quantize.quantize(x, xi, codes)
        count = q.to(torch.int32).abs().numpy()
        assert (np.abs(count - exact) < 1 + 1e-4).all()
        assert (torch.sign(q.to(torch.int32)) == torch.where(q == 0, 0, x.sign())).all()
        total += count
    mean = total / len(every)
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
    for xi in every_uniform()[[0, 1, 2047, -2, -1]].tolist():
        again, scales = quantize.quantize(x, xi, codes)
        assert_same(again, q)
        np.testing.assert_allclose(scales.numpy(), scale.numpy(), rtol=2 * EPS)


@FORMAT
def test_zeros_stay_zeros_beside_anything(codes):
    x = blocks(codes)
    x[::2, ::3] = 0
    x[5] = 0
    q, scale = quantize.quantize(x, 1 - 2.0**-13, codes)
    assert (q[x == 0] == 0).all()
    assert (quantize.dequantize(q, scale, codes)[x == 0] == 0).all()
    assert (quantize.dequantize(q, torch.zeros_like(scale), codes) == 0).all()


def test_v_above_zero_is_never_zero():
    """Or a momentum over it would be an infinite update."""
    x = torch.full((1, 128), 1e-30)
    x[0, 0] = 1.0
    q, scale = quantize.quantize(x, 2.0**-13, UNSIGNED)
    assert (q >= 1).all()
    assert (quantize.dequantize(q, scale, UNSIGNED) > 0).all()


@FORMAT
@pytest.mark.parametrize("largest", [1.4e-45, 1e-38, 1e38, torch.finfo(torch.float32).max])
def test_the_largest_and_smallest_numbers_stay_finite(codes, largest):
    x = torch.full((2, 32), largest)
    x[1] = 0
    x[1, 3] = largest
    q, scale = quantize.quantize(x, 0.5, codes)
    back = quantize.dequantize(q, scale, codes)
    assert back.isfinite().all()
    assert scale.isfinite().all()
    if largest > 1e-37:
        limited = min(largest, 2.0**127)
        assert float(back[0, 0]) == pytest.approx(limited, rel=2**codes.root * 2 * EPS)
        assert (back[1, :3] == 0).all()


def test_a_momentum_that_is_not_finite_is_nan_and_spoils_no_neighbour():
    x = blocks(SIGNED, n=4)
    expected = quantize.quantize(x, 0.5, SIGNED)
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = x.clone()
        largest = x.abs().argmax(1)
        places = (largest + 1) % 128
        spoilt[torch.arange(4), places] = bad
        q, scale = quantize.quantize(spoilt, 0.5, SIGNED)
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
    q, scale = quantize.quantize(x, 0.5, UNSIGNED)
    back = quantize.dequantize(q, scale, UNSIGNED)
    assert back.isfinite().all()
    assert back[0, 1] == 0
    assert float(back[1, 1]) == pytest.approx(2.0**127, rel=1e-5)


@FORMAT
def test_the_rounding_of_an_element_is_even_over_any_run_of_steps(codes):
    """The golden ratio leaves no run of steps with many more or fewer roundings up than due."""
    steps, fraction = 2000, 0.037
    element = torch.arange(64)
    ups = []
    for t in range(steps):
        bits = quantize.random_bits(7, torch.tensor(float(t)), element)[codes is UNSIGNED]
        ups.append(quantize.uniform(bits) >= 1 - fraction)
    counted = torch.stack(ups).cumsum(0).double()
    due = fraction * torch.arange(1, steps + 1)[:, None]
    # Rounded by chance they would be √(2000·0.037) = 8 apart, and many of 64 elements more.
    assert (counted - due).abs().max() < 4


def test_elements_and_weights_are_rounded_apart():
    element = torch.arange(1 << 14)
    zero = torch.zeros(())
    draws = [torch.stack(quantize.random_bits(n, zero, element)).double() for n in (0, 1)]
    drawn = torch.cat(draws) / 2.0**16
    limit = 5 / math.sqrt(len(element))
    assert (drawn.mean(1) - 0.5).abs().max() < limit
    correlation = torch.corrcoef(torch.cat([drawn, drawn.roll(1, 1)]))
    assert (correlation - torch.eye(8)).abs().max() < limit


def test_the_formats_are_named_by_their_dtypes():
    assert {torch.int8: SIGNED, torch.uint8: UNSIGNED} == FORMATS
