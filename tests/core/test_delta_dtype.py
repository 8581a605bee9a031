"""delta_dtype=torch.bfloat16: Δ is rounded right on average, and alike on every backend."""

import copy
import math

import numpy as np
import pytest
import torch
from support import cases
from support.cases import FEW, RADAM, Training, assert_same

from mechanic_fused import MechanicAdamW, MechanicLion, MechanicSGD
from mechanic_fused.backends import formulas

NARROW = {"delta_dtype": torch.bfloat16}
SIGMAS = 6
"""Standard deviations that a mean over random bits may be off: one in 10⁹ is further."""

MASK = (1 << 32) - 1
NONFINITE = [math.nan, -math.nan, math.inf, -math.inf]


# The formulas


def hash32(n):
    """Hash a number as the definition does, written apart: with Python's own integers."""
    n = (n ^ (n >> 16)) * 0x7FEB352D & MASK
    n = (n ^ (n >> 15)) * 0x846CA68B & MASK
    return n ^ (n >> 16)


def random_bits(step, number, count):
    seed = formulas.rounding_seed(torch.tensor(float(step), dtype=torch.float64), number)
    return formulas.random_bits16(seed, torch.arange(count))


def neighbours(x):
    """Return the bfloat16 towards 0 and the one beyond float32 numbers x, in float64."""
    low = x.view(torch.int32) & ~0xFFFF
    return low.view(torch.float32).double(), (low + 0x10000).view(torch.float32).double()


def test_the_rounding_takes_each_neighbour_as_often_as_it_is_near():
    """Against float64: the mean over many bits is x, each result one of x's two neighbours."""
    rng = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(2000, generator=rng), torch.tensor([0.0, -0.0, 1.0, 1.5e-39])])
    x = torch.cat([x, torch.tensor([-2e38, 0.1])])
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


def test_the_rounding_leaves_what_is_not_finite():
    x = torch.tensor(NONFINITE).view(torch.int32)
    # A NaN whose only bits are among those that are cut off.
    x = torch.cat([x, torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32)])
    for bits in (0, 1, 0xFFFF):
        found = formulas.stochastic_round(torch.full((6,), bits), x.view(torch.float32))
        assert found.isnan().tolist() == [True, True, False, False, True, True]
        assert found[2:4].tolist() == [math.inf, -math.inf]


def test_the_bits_are_a_hash_of_step_weight_and_element():
    for step, number in ((0, 0), (1, 0), (7, 5), (1 << 33, 2)):
        seed = hash32(hash32(step & MASK) + number & MASK)
        expected = [hash32(i + seed & MASK) >> 16 for i in range(100)]
        assert random_bits(step, number, 100).tolist() == expected


def test_bits_of_neighbouring_elements_steps_and_weights_are_independent():
    n = 1 << 16
    pairs = ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1))
    rows = [random_bits(t, number, n) for t, number in pairs]
    rows.append(rows[0].roll(1))
    correlation = np.corrcoef(torch.stack(rows).numpy())
    assert np.abs(correlation - np.eye(len(rows))).max() <= SIGMAS / math.sqrt(n)
    # Each of the 16 bits is as often 1 as 0.
    ones = (rows[1][:, None] >> torch.arange(16)) & 1
    assert ((ones.double().mean(0) - 0.5).abs() <= SIGMAS * 0.5 / math.sqrt(n)).all()


# The steps


def test_updates_below_half_a_last_place_count_on_average(train):
    """Where Δ is 1 and u is −2⁻¹⁰, rounding to nearest would leave it for ever."""
    one = train("sgd", shapes=[(10_000,)], lr=1.0, **NARROW)
    (p,) = one.params
    one.step([torch.full_like(p, -1.0)])
    assert (one.states("delta")[0] == 1).all()
    steps, small = 40, 2.0**-10
    for _ in range(steps):
        one.step([torch.full_like(p, small)])
    # Below 1 bfloat16 numbers are 2⁻⁸ apart: a quarter of the elements moves in each step.
    moved = 1 - one.states("delta")[0].double()
    assert moved.unique().numel() > 5
    variance = steps * 0.25 * 0.75 * 2.0**-16
    assert abs(float(moved.mean()) - steps * small) <= SIGMAS * math.sqrt(variance / p.numel())
    assert float(moved.var()) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("cls", [MechanicAdamW, MechanicLion, MechanicSGD, RADAM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_delta_is_kept_in_bfloat16_and_two_runs_have_the_same_bits(cls, dtype):
    one, other = (Training(cls, shapes=[(33, 7), (5,)], dtype=dtype, **NARROW) for _ in range(2))
    assert_same(one.run().snapshot(), other.run().snapshot())
    assert all(delta.dtype is torch.bfloat16 for delta in one.states("delta"))
    assert float(one.states("delta")[0].abs().sum()) > 0


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "delta_dtype", "expected"),
    [
        (torch.float32, None, None, 20),
        (torch.float32, "param", torch.bfloat16, 18),
        (torch.bfloat16, None, None, 16),
        (torch.bfloat16, "param", None, 12),
        (torch.bfloat16, None, torch.bfloat16, 14),
        (torch.float16, "param", torch.bfloat16, 10),
    ],
    ids=str,
)
def test_bytes_a_parameter_are_those_of_the_docs(dtype, state_dtype, delta_dtype, expected):
    options = {"state_dtype": state_dtype, "delta_dtype": delta_dtype}
    one = Training(MechanicAdamW, shapes=[(64,)], dtype=dtype, **options).run(2)
    (p,) = one.params
    kept = [p, *(x for x in one.opt.state[p].values() if torch.is_tensor(x) and x.dim())]
    assert sum(x.element_size() for x in kept) == expected


def test_float64_weights_keep_a_float64_delta(train):
    one = train(dtype=torch.float64, **NARROW).run(2)
    assert all(delta.dtype is torch.float64 for delta in one.states("delta"))


def test_two_weights_with_the_same_numbers_are_rounded_apart(backend):
    """The bits depend on the weight's number in the optimizer, not on its place in a bucket."""

    def deltas(*dtypes, steps):
        weights = [cases.make_weights([(500,)], dtype)[0] for dtype in dtypes]
        one = Training(backend, params=weights, **NARROW)
        for t in range(steps):
            one.step([cases.gradients([p], t)[0] for p in weights])
        return one.states("delta")

    one, two = deltas(torch.float32, torch.float32, steps=3)
    assert not torch.equal(one, two)
    # A third one between them, of another bucket, changes the second's number alone.
    one, two = deltas(torch.float32, torch.float32, steps=1)
    first, _, third = deltas(torch.float32, torch.bfloat16, torch.float32, steps=1)
    assert_same(first, one)
    assert not torch.equal(third, two)


def test_bits_go_by_the_place_in_memory_whatever_the_axes(cpp):
    made = []
    for backend in ("reference", cpp):
        start = cases.make_weights([(6, 5, 4)])[0].detach()
        one = Training(backend, params=[torch.nn.Parameter(start.permute(2, 0, 1))], **NARROW)
        assert not one.params[0].is_contiguous()
        made += one.run(1).states("delta")
        assert made[-1].stride() == one.params[0].stride()
    assert_same(*made)


@pytest.mark.parametrize("then", [None, torch.bfloat16], ids=["widened", "narrowed"])
def test_a_checkpoint_may_be_widened_and_narrowed(train, then):
    first = torch.bfloat16 if then is None else None
    one, other = (train(shapes=[(40, 30)], delta_dtype=each) for each in (first, then))
    saved = copy.deepcopy(one.run().saved())
    other.load(saved, one.t)
    other.opt.plan_step()
    (old,), (new,) = one.states("delta"), other.states("delta")
    assert new.dtype is (then or torch.float32)
    assert torch.equal(new, old.to(new.dtype))


def test_a_weight_keeps_its_place_where_delta_is_narrowed():
    """x_ref moves by what rounding Δ would have moved the weight."""
    one = Training(MechanicSGD, "sgd", shapes=[(40, 30)]).run()
    other = Training(MechanicSGD, "sgd", shapes=[(40, 30)], **NARROW)
    other.load(copy.deepcopy(one.saved()), one.t)
    other.opt.freeze_scale()
    other.step_on_zeros()
    # Its own rounding of x_ref + S·Δ, once in shifting and once in writing.
    cases.assert_within(other.x[0], one.x[0], 2 * 2.0**-23 * float(one.x[0].abs().max()))


def test_what_is_not_finite_in_delta_stays(backend):
    """In the kernels too: adding bits to a NaN that an operation gave must not make a number."""
    found = torch.tensor([*NONFINITE, 1.0]).repeat(40)
    for steps in range(1, FEW):
        one = Training(backend, shapes=[(len(found),)], weight_decay=0.0, **NARROW).run(steps)
        one.states("delta")[0].copy_(found)
        after = one.run(1).states("delta")[0].float()
        assert torch.equal(after.isnan(), found.isnan())
        assert torch.equal(after[found.isinf()], found[found.isinf()])
        assert after[found == 1].isfinite().all()
