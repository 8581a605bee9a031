"""What every backend promises of the two ends of a step of Muon: the reference's bits.

The products between them are torch's: here they are an exact function of each element, so that the
reference on a CPU and a backend on a GPU make the same O.
"""

import pytest
import torch
from support.cases import DTYPES
from support.lockstep import moved, random_gradient
from support.ready_bucket import bad_elements

from mechanic_fused import MechanicMuon
from mechanic_fused.backends import muon, orthogonalize
from mechanic_fused.backends.layout import KERNEL_DTYPES

FEW = 3


def slow_but(quick, values):
    return [v if v == quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    def halved(n, weight, group):
        ratio = orthogonalize.adjusted_ratio(group["adjust_lr_fn"], *weight.shape[:2])
        return (0.5 * n if n.dtype is not torch.bfloat16 else n.clone()), ratio

    monkeypatch.setattr(muon, "orthogonalized_shards", halved)


def shapes_of(kernels):
    """A single number, one tail, odd rows, and equal ones of several chunks."""
    largest = (max(kernels.sizes) // 96 + 1, 96)
    return [(1, 1), (3, 5), (9, 113), largest, largest]


def pairs_of(running, dtype, shapes, axes=(0, 1), **options):
    rng = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]
    found = []
    for name, device in (("reference", "cpu"), (running.kernels.name, running.kernels.device)):
        params = [torch.nn.Parameter(moved(x.clone().permute(axes), device)) for x in xs]
        opt = MechanicMuon(params, backend=name, **{"ns_dtype": torch.bfloat16, **options})
        found.append((opt, params))
    return found


def run(running, dtype, gradient=random_gradient, **options):
    shapes = options.pop("shapes", shapes_of(running.kernels))
    pairs = pairs_of(running, dtype, shapes, **options)
    for t in range(FEW):
        running.step(pairs, t, gradient)
    return pairs


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ends_have_the_bits_of_the_reference(running, dtype, bits):
    if dtype is torch.float64 and bits < 32:
        pytest.skip("float64 weights have no narrow state")
    run(running, dtype, optim_bits=bits)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_directions_in_the_dtype_of_arithmetic(running, dtype):
    run(running, dtype, ns_dtype=torch.float32)


@pytest.mark.parametrize("dtype", slow_but(torch.bfloat16, DTYPES), ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False, "weight_decay": 0.0},
        {"adjust_lr_fn": "original"},
        {"state_dtype": "param", "momentum": 0.0},
    ],
    ids=str,
)
def test_every_option(running, dtype, options):
    run(running, dtype, **options)


def test_clipped_gradients(running):
    """In float32, where the coefficient hides how the norm was rounded."""
    run(running, torch.float32, max_grad_norm=0.5)


def test_bfloat16_weights_without_low_bits(running):
    run(running, torch.bfloat16, optim_bits=8, bf16_stochastic_round=True)


@pytest.mark.parametrize("phase", [0, 8, 1, 1023])
@pytest.mark.parametrize("dtype", slow_but(torch.float32, DTYPES), ids=str)
def test_kept_blocks(running, set_phases, dtype, phase):
    set_phases(phase)
    run(running, dtype, x_ref_every=8, shapes=[(3, 5), (40, 30), shapes_of(running.kernels)[-1]])


@pytest.mark.parametrize("dtype", slow_but(torch.float32, DTYPES), ids=str)
def test_weights_that_are_laid_out_by_columns(running, dtype):
    run(running, dtype, axes=(1, 0))


@pytest.mark.parametrize("dtype", slow_but(torch.float16, DTYPES), ids=str)
def test_absent_gradients_and_those_that_are_not_finite(running, dtype):
    def spoil(p, t, i):
        g = random_gradient(p, t, i)
        return bad_elements(i + 1, g.view(-1)).view_as(g) if (i + 1) % 2 else None

    run(running, dtype, spoil)


@pytest.mark.parametrize("dtype", slow_but(torch.float32, DTYPES), ids=str)
def test_gradients_whose_squares_are_no_floats(running, dtype):
    def scaled(p, t, i):
        size = 1e-30 if dtype is torch.float16 else (1e-25, 1e20, 0.0)[t]
        return (random_gradient(p, t, i).double() * size).to(dtype)

    run(running, dtype, scaled)
