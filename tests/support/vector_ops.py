"""The ops on vectors as they are tested: their formulas, vectors in several layouts, an oracle.

The oracle computes in more digits than float64 has. The reference is a second one, whose elements
must agree to the bit.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mechanic_fused import backends
from mechanic_fused.backends.layout import CPU_CHUNK
from mechanic_fused.vectors.reference import AdaRemOptions
from mechanic_fused.vectors.space import Space

from .cases import SUM_RTOL, WIDE, assert_same
from .kernels import INTERPRETED, TRITON, kernels_of

# No 16-bit dtype represents any of these numbers, so that their rounding counts too.
A, C = 0.7, 1 / 3
OPTIONS = AdaRemOptions(lr=0.4, beta=0.9, lam_t=0.999**3, weight_decay=0.01, eps=1e-8)
SIZES = (0, 1, 3, 63, 1025)
LAYOUTS = ("flat", "offset", "transposed", "strided")
BEYOND_CHUNK = 129
GUARD = 64.0
"""What is beside a weight in memory: larger than its elements, and not to be written."""

INTERPRETED_CHUNK = 1 << 12
"""The interpreter takes milliseconds a block: fewer of them make a chunk there."""


class Op(NamedTuple):
    """An op as it is tested.

    Args:
        streams: the kinds of its vectors: x the weights, n of their dtype, w of the arithmetic's.
        writes: the numbers of those that it writes.
        run: called with the space, its vectors and max|m|.
        formula: what it writes of one weight, from numpy arrays of any width.
        products: the terms of its sums, from the vectors before and after.
    """

    streams: str
    writes: tuple[int, ...]
    run: Callable
    formula: Callable = lambda *arrays: ()
    products: Callable | None = None


def adarem(x, g, m, peak):
    g = np.where(np.isfinite(g), g, np.zeros_like(g))
    gain = x.dtype.type(OPTIONS.lam_t / (peak + OPTIONS.eps))
    adjusted = (1 + gain * (np.sign(g) * m)) * g
    moved = x - OPTIONS.lr * (adjusted + OPTIONS.weight_decay * x)
    return moved, OPTIONS.beta * m + (1 - OPTIONS.beta) * g


OPS = {
    "step_along": Op(
        "xnw", (0,), lambda s, x, w, d, _: s.step_along(x, w, d, C), lambda x, w, d, _: (w - C * d,)
    ),
    "put": Op("wn", (0,), lambda s, a, x, _: s.axpby(a, x, 0.0, C), lambda a, x, _: (C * x,)),
    "axpby": Op(
        "wn", (0,), lambda s, a, x, _: s.axpby(a, x, A, C), lambda a, x, _: (A * a + C * x,)
    ),
    "difference_dots": Op(
        "wnn",
        (0,),
        lambda s, old, a, b, _: s.difference_dots(old, a, b),
        lambda old, a, b, _: (a - b,),
        lambda before, after: (after[0] * before[0], after[0] * after[0]),
    ),
    "dots": Op(
        "nnw",
        (),
        lambda s, g, last, p, _: s.dots(g, last, p),
        products=lambda v, _: (v[0] * v[0], v[0] * v[1], v[1] * v[1], v[0] * v[2]),
    ),
    "abs_max": Op("n", (), lambda s, a, _: s.abs_max(a)),
    "adarem": Op("xnw", (0, 2), lambda s, x, g, m, peaks: s.adarem(g, m, peaks, OPTIONS), adarem),
}
PEAKS = {"abs_max": 0, "adarem": 2}
"""Op → the vector whose largest magnitudes it returns."""

QUICK_DTYPES = (torch.float32, torch.bfloat16)


def on_backends(**axes):
    """Run a test on every backend and for every combination of the axes.

    What takes the interpreter long is slow there: other dtypes than float32 and bfloat16, and with
    layouts all but flat vectors and misaligned bfloat16.
    """
    rows = []
    for name, *values in itertools.product(("reference", "cpp", "triton"), *axes.values()):
        marks = list(TRITON.marks) if name == "triton" else []
        if marks and not quick(**dict(zip(axes, values, strict=True))):
            marks.append(pytest.mark.slow)
        rows.append(
            pytest.param(name, *values, marks=marks, id=" ".join(map(str, (name, *values))))
        )
    return pytest.mark.parametrize(("place", *axes), rows, indirect=["place"])


def quick(dtype=None, layout=None, **_):
    if layout is None:
        return dtype is None or dtype in QUICK_DTYPES
    return layout == "flat" or (layout, dtype) == ("offset", torch.bfloat16)


class Place(NamedTuple):
    """A backend, the type of its device, and the elements of a chunk there."""

    backend: str
    device: str
    chunk: int


@pytest.fixture
def place(request, monkeypatch):
    kernels = kernels_of(request.param, monkeypatch)
    module = backends.load_vectors(kernels.name)
    if kernels.name == "triton" and INTERPRETED:
        monkeypatch.setitem(module.CHUNK, "cpu", INTERPRETED_CHUNK)
    return Place(kernels.name, kernels.device, module.CHUNK.get(kernels.device, CPU_CHUNK))


def lay_out(values, layout):
    """Return the values as a weight with this layout."""
    n = values.numel()
    if layout == "offset":
        memory = torch.full((n + 2,), GUARD, dtype=values.dtype, device=values.device)
        memory[1:-1] = values
        return memory[1:-1]
    if layout == "transposed":
        rows = next((i for i in range(2, n) if n % i == 0), 1)
        return values.reshape(rows, n // rows).t()
    if layout == "strided":
        return torch.stack([values, torch.full_like(values, GUARD)], 1)[:, 0]
    return values


def vector(place, layout="flat", dtypes=(torch.float32,), seed=0):
    rng = torch.Generator().manual_seed(seed)
    sizes = (*SIZES, place.chunk + BEYOND_CHUNK) if layout == "flat" else (*SIZES, *SIZES[::-1])
    found = []
    for i, n in enumerate(sizes):
        values = torch.randn(n, generator=rng, dtype=torch.float64)
        found.append(lay_out(values.to(place.device, dtypes[i % len(dtypes)]), layout))
    return found


def parameters(*args, **options):
    return [torch.nn.Parameter(x) for x in vector(*args, **options)]


class Done(NamedTuple):
    """The vectors before and after an op, on the CPU, what it returned, and max|m| as given."""

    before: list
    after: list
    returned: torch.Tensor | None
    peaks: torch.Tensor


def do(name, place, layout="flat", dtypes=(torch.float32,), change=lambda vectors: None):
    """Run an op on fresh vectors."""
    op = OPS[name]
    wide = [WIDE[dtype] for dtype in dtypes]
    space = Space(parameters(place, layout, dtypes), place.backend)
    vectors = [
        space.weights if kind == "x" else vector(place, layout, wide if kind == "w" else dtypes, i)
        for i, kind in enumerate(op.streams, 1)
    ]
    change(vectors)
    peaks = torch.linspace(0.5, 2, len(space.weights), dtype=torch.float64, device=place.device)
    before = [[x.cpu().clone() for x in v] for v in vectors]
    returned = op.run(space, *vectors, peaks)
    if returned is not None:
        assert returned.dtype is torch.float64
        returned = returned.cpu()
    for x in (x for v in vectors for x in v):
        if x._base is not None:
            assert (x._base == GUARD).sum() == x._base.numel() - x.numel()
    return Done(before, [[x.cpu().clone() for x in v] for v in vectors], returned, peaks.cpu())


def exact(x):
    """Return x in more digits than the result can have: 64 bits of them for float64."""
    return x.double().numpy().astype(np.longdouble)


def assert_near(op, done):
    """Check that what was written errs at most twice as much as plain arithmetic."""
    errors = {}
    for i, peak in enumerate(done.peaks.tolist()):
        before = [v[i] for v in done.before]
        dtype = WIDE[before[op.streams.find("n")].dtype]
        oracle = op.formula(*map(exact, before), peak)
        plain = op.formula(*[x.to(dtype).numpy() for x in before], peak)
        for number, true, near in zip(op.writes, oracle, plain, strict=True):
            assert near.dtype == torch.empty(0, dtype=dtype).numpy().dtype
            after = done.after[number][i]
            rounded = torch.from_numpy(np.ascontiguousarray(near)).to(after.dtype)
            both = [float(abs(exact(x) - true).max(initial=0)) for x in (after, rounded)]
            errors.setdefault((before[0].dtype, number), []).append(both)
    for found in errors.values():
        actual, plain = np.max(found, 0)
        assert actual <= 2 * plain


def assert_sums(op, done):
    totals, sizes = 0, 0
    for i in range(len(done.peaks)):
        before, after = ([exact(v[i]) for v in vectors] for vectors in (done.before, done.after))
        products = op.products(before, after)
        totals = totals + np.array([p.sum() for p in products])
        sizes = sizes + np.array([abs(p).sum() for p in products])
    assert (abs(done.returned.numpy() - totals) <= SUM_RTOL * sizes).all()


def assert_right(name, place, *case):
    """Run an op; check it beside the oracle, and its elements beside the reference's bits."""
    op, done = OPS[name], do(name, place, *case)
    assert_near(op, done)
    if op.products:
        assert_sums(op, done)
    if name in PEAKS:
        sizes = [x.double().abs().max() if x.numel() else 0.0 for x in done.after[PEAKS[name]]]
        assert_same(done.returned, torch.tensor(sizes, dtype=torch.float64))
    expected = do(name, Place("reference", "cpu", place.chunk), *case)
    assert_same(done.before, expected.before)
    assert_same(done.after, expected.after)
    return done
