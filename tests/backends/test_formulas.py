"""The reference's formulas against their definitions, written apart."""

import math

import numpy as np
import pytest
import torch

from mechanic_fused.backends import formulas, layout

SIGMAS = 6
"""Standard deviations that a mean over random bits may be off: one in 10⁹ is further."""

MASK = (1 << 32) - 1


def scrambled(n):
    """Return the hash, on Python's own numbers."""
    n = (n ^ (n >> 16)) * 0x7FEB352D & MASK
    n = (n ^ (n >> 15)) * 0x846CA68B & MASK
    return n ^ (n >> 16)


def random_bits(step, number, count):
    seed = formulas.rounding_seed(torch.tensor(float(step), dtype=torch.float64), number)
    return formulas.random_bits16(seed, torch.arange(count))


def neighbours(x):
    """Return the bfloat16 towards 0 and the one beyond x, as float64, of float32 numbers."""
    bits = x.view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32).double(), (bits + 0x10000).view(torch.float32).double()


def test_there_is_an_update_for_every_kind():
    assert tuple(formulas.UPDATES) == layout.KINDS == tuple(layout.STATES)
    assert set(layout.STEPPED) <= set(layout.KINDS)


@pytest.mark.parametrize("size", [2.0**-30, 1.0, 4.0, 2.0**80])
@pytest.mark.parametrize("max_norm", [0.0, 1e-9, 0.3, 1.0, 5.0, math.inf])
def test_the_clip_coefficient_is_that_of_clip_grad_norm_(size, max_norm):
    # Of a power of two what is left tells the coefficient exactly.
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    p.grad = torch.full_like(p, size)
    torch.nn.utils.clip_grad_norm_([p], max_norm)
    # A division here, a reciprocal and a product there: three roundings.
    expected = pytest.approx(float(p.grad) / size, rel=3 * 2.0**-53, abs=0)
    assert formulas.clip_coefficient(size * size, max_norm) == expected


def test_stochastic_rounding_takes_each_neighbour_as_often_as_it_is_near():
    """Against float64: the mean over many bits is x, each result one of x's two neighbours."""
    rng = torch.Generator().manual_seed(0)
    some = torch.tensor([0.0, -0.0, 1.0, 1.5e-39, -2e38, 0.1])
    x = torch.cat([torch.randn(2000, generator=rng), some])
    low, high = neighbours(x)
    count = 4096
    total = torch.zeros(len(x), dtype=torch.float64)
    for t in range(count):
        found = formulas.stochastic_round(random_bits(t, 3, len(x)), x).double()
        assert ((found == low) | (found == high)).all()
        total += found
    part = (x.double() - low) / (high - low)
    sigma = (high - low).abs() * (part * (1 - part) / count).sqrt()
    assert ((total / count - x.double()).abs() <= SIGMAS * sigma).all()
    # Errors of different elements are independent: their mean has √n less of them.
    error = (total / count - x.double())[:2000] / (high - low).abs()[:2000]
    assert abs(float(error.mean())) <= SIGMAS * 0.5 / math.sqrt(count * 2000)


def test_what_is_not_finite_is_rounded_to_itself():
    x = torch.tensor([math.nan, -math.nan, math.inf, -math.inf]).view(torch.int32)
    # A NaN whose only bits are among those that are cut off.
    x = torch.cat([x, torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32)])
    for bits in (0, 1, 0xFFFF):
        found = formulas.stochastic_round(torch.full((6,), bits), x.view(torch.float32))
        assert found.isnan().tolist() == [True, True, False, False, True, True]
        assert found[2:4].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize(("step", "number"), [(0, 0), (1, 0), (7, 5), (1 << 33, 2)])
def test_random_bits_are_a_hash_of_step_weight_and_element(step, number):
    seed = scrambled(scrambled(step & MASK) + number & MASK)
    expected = [scrambled(i + seed & MASK) >> 16 for i in range(100)]
    assert random_bits(step, number, 100).tolist() == expected


def test_random_bits_of_neighbouring_elements_steps_and_weights_are_independent():
    n = 1 << 16
    sources = ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1))
    rows = [random_bits(step, number, n) for step, number in sources]
    rows.append(rows[0].roll(1))
    correlation = np.corrcoef(torch.stack(rows).numpy())
    assert np.abs(correlation - np.eye(len(rows))).max() <= SIGMAS / math.sqrt(n)
    # Each of the 16 bits is as often 1 as 0.
    ones = (rows[1][:, None] >> torch.arange(16)) & 1
    assert ((ones.double().mean(0) - 0.5).abs() <= SIGMAS * 0.5 / math.sqrt(n)).all()
