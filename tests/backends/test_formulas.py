"""The reference's formulas: one a kind, and torch's clipping."""

import math

import pytest
import torch

from mechanic_fused.backends import formulas, layout


def test_there_is_an_update_for_every_kind():
    assert (*formulas.UPDATES, layout.MUON) == (*layout.KINDS, layout.MUON) == tuple(layout.STATES)
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
