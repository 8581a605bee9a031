"""x_ref of one block of 128 elements in eight: beside its oracle, saved, loaded and refused."""

import pytest
from support.beside_oracle import Beside
from support.cases import CASES, FULL, RUNNING
from test_running_form import STARTS, loss_of

EVERY = {"variant": RUNNING, "x_ref_every": 8}
SHAPES = ((7,), (8191,), (8192,), (3, 2900), (9217,))
"""Too small to be kept in part, and the smallest that is not; then ends inside and after a kept block."""


def beside(implementation, base, start, shapes=SHAPES, **options):
    own = {"s_init": 0.02} if start == "s_init" else {}
    return Beside(implementation, base, shapes=shapes, **EVERY, **own, **options)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("case", FULL)
def test_each_base_and_start_agrees_with_the_oracle(implementation, case, start):
    base, options = CASES[case]
    both = beside(implementation, base, start, **options)
    both.run(loss=loss_of(start))
    assert both.opt.scale_source == start
