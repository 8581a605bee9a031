"""The vector verbs as they are tested: on which vectors, where, and what they must find.

An oracle in more digits than float64 has, and the reference, which must agree to the bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import SUM_RTOL, WIDE, assert_same
from conftest import skip_unless_available
from triton_lockstep import DTYPES, INTERPRETED, triton_module

from mechanic_fused import backends
from mechanic_fused.backends.layout import CPU_CHUNK as CHUNK
from mechanic_fused.vectors import Space
from mechanic_fused.vectors.reference import AdaRemOptions

# No number among them is one of any 16-bit dtype, so that their rounding counts too.
A, C = 0.7, 1 / 3
OPTIONS = AdaRemOptions(lr=0.4, beta=0.9, boost=0.999**3, decay=0.01, eps=1e-8)
SIZES = (0, 1, 3, 63, 1025)
BEYOND = 129  # of a chunk
LAYOUTS = ("flat", "offset", "transposed", "strided")
# What lies beside the elements of a weight: larger than any of them, and nobody's to write.
GUARD = 64.0
# The interpreter takes milliseconds a block: fewer of them make a chunk there.
INTERPRETED_CHUNK = 1 << 12


class Verb(NamedTuple):
    """A verb as it is tested.

    Attributes:
        streams: the kinds of its vectors: x the weights, n as narrow as they, w wide.
        writes: the numbers of those that it writes.
        run: called with the space, its vectors and max|m|.
        formula: what it writes of one weight, as numpy arrays of any width.
        products: of the vectors before and those written: what is summed.
    """

    streams: str
    writes: tuple[int, ...]
    run: Callable
    formula: Callable = lambda *arrays: ()
    products: Callable | None = None


def adarem(x, g, m, peak):
    g = np.where(np.isfinite(g), g, np.zeros_like(g))
    gain = x.dtype.type(OPTIONS.boost / (peak + OPTIONS.eps))
    adjusted = (1 + gain * (np.sign(g) * m)) * g
    moved = x - OPTIONS.lr * (adjusted + OPTIONS.decay * x)
    return moved, OPTIONS.beta * m + (1 - OPTIONS.beta) * g


VERBS = {
    "step_along": Verb(
        "xnw", (0,), lambda s, x, w, d, _: s.step_along(x, w, d, C), lambda x, w, d, _: (w - C * d,)
    ),
    "put": Verb("wn", (0,), lambda s, a, x, _: s.axpby(a, x, 0.0, C), lambda a, x, _: (C * x,)),
    "axpby": Verb(
        "wn", (0,), lambda s, a, x, _: s.axpby(a, x, A, C), lambda a, x, _: (A * a + C * x,)
    ),
    "difference_dots": Verb(
        "wnn",
        (0,),
        lambda s, old, a, b, _: s.difference_dots(old, a, b),
        lambda old, a, b, _: (a - b,),
        lambda before, after: (after[0] * before[0], after[0] * after[0]),
    ),
    "dots": Verb(
        "nnw",
        (),
        lambda s, g, last, p, _: s.dots(g, last, p),
        products=lambda v, _: (v[0] * v[0], v[0] * v[1], v[1] * v[1], v[0] * v[2]),
    ),
    "abs_max": Verb("n", (), lambda s, a, _: s.abs_max(a)),
    "adarem": Verb("xnw", (0, 2), lambda s, x, g, m, peaks: s.adarem(g, m, peaks, OPTIONS), adarem),
}
# Verb → the vector whose largest magnitudes it returns.
PEAKS = {"abs_max": 0, "adarem": 2}


def on_backends(*others):
    """Run a test by Triton in the interpreter, or else by the other backends and on a GPU."""
    on_gpu = pytest.param("triton", marks=pytest.mark.gpu)
    return pytest.mark.parametrize(
        "place", ["triton"] if INTERPRETED else [*others, on_gpu], indirect=True
    )


def slow_unless(wanted, *values):
    """A test's parameters; what the interpreter would take long for is left to `make test-all`."""
    marks = pytest.mark.slow if INTERPRETED and not wanted else ()
    return pytest.param(*values, marks=marks, id=" ".join(map(str, values)))


# Of each dtype, and in the interpreter of a float and a 16-bit one.
of_dtypes = pytest.mark.parametrize(
    "dtype", [slow_unless(dtype in (torch.float32, torch.bfloat16), dtype) for dtype in DTYPES]
)
INTERPRETED_CASES = [*(("flat", dtype) for dtype in DTYPES), ("offset", torch.bfloat16)]
of_dtypes_and_layouts = pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        slow_unless((layout, dtype) in INTERPRETED_CASES, dtype, layout)
        for dtype in DTYPES
        for layout in LAYOUTS
    ],
)


class Place(NamedTuple):
    backend: str
    device: str
    chunk: int


@pytest.fixture
def place(request, monkeypatch):
    name = request.param
    device = "cuda" if name == "triton" and not INTERPRETED else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; test_in_the_interpreter runs it")
    skip_unless_available(name)
    module = backends.load_vectors(name)
    if name == "triton":
        triton_module(monkeypatch)
        if INTERPRETED:
            monkeypatch.setitem(module.CHUNK, "cpu", INTERPRETED_CHUNK)
    return Place(name, device, module.CHUNK.get(device, CHUNK))


def lay(values, layout):
    """The values as a weight may lie in memory."""
    n = values.numel()
    if layout == "offset":
        room = torch.full((n + 2,), GUARD, dtype=values.dtype, device=values.device)
        room[1:-1] = values
        return room[1:-1]
    if layout == "transposed":
        rows = next((i for i in range(2, n) if n % i == 0), 1)
        return values.reshape(rows, n // rows).t()
    if layout == "strided":
        return torch.stack([values, torch.full_like(values, GUARD)], 1)[:, 0]
    return values


def vector(place, layout, dtypes, seed):
    rng = torch.Generator().manual_seed(seed)
    sizes = (*SIZES, place.chunk + BEYOND) if layout == "flat" else (*SIZES, *SIZES[::-1])
    found = []
    for i, n in enumerate(sizes):
        values = torch.randn(n, generator=rng, dtype=torch.float64)
        found.append(lay(values.to(place.device, dtypes[i % len(dtypes)]), layout))
    return found


class Done(NamedTuple):
    before: list
    after: list
    returned: torch.Tensor | None
    peaks: torch.Tensor


def do(name, place, layout="flat", dtypes=(torch.float32,), change=lambda vectors: None):
    """Run a verb on fresh vectors; return them before and after on the CPU, and its result."""
    verb = VERBS[name]
    wide = [WIDE[dtype] for dtype in dtypes]
    weights = [torch.nn.Parameter(x) for x in vector(place, layout, dtypes, 0)]
    space = Space(weights, place.backend)
    vectors = [
        space.weights if kind == "x" else vector(place, layout, wide if kind == "w" else dtypes, i)
        for i, kind in enumerate(verb.streams, 1)
    ]
    change(vectors)
    peaks = torch.linspace(0.5, 2, len(weights), dtype=torch.float64, device=place.device)
    before = [[x.cpu().clone() for x in v] for v in vectors]
    returned = verb.run(space, *vectors, peaks)
    if returned is not None:
        assert returned.dtype is torch.float64
        returned = returned.cpu()
    for x in (x for v in vectors for x in v):
        if x._base is not None:
            assert (x._base == GUARD).sum() == x._base.numel() - x.numel()
    return Done(before, [[x.cpu().clone() for x in v] for v in vectors], returned, peaks.cpu())


def exact(x):
    """In more digits than the result can have: 64 bits of them for float64."""
    return x.double().numpy().astype(np.longdouble)


def errors(verb, done):
    """(dtype, vector) → the largest error of what was written, and of plain arithmetic."""
    found = {}
    for i, peak in enumerate(done.peaks.tolist()):
        before = [v[i] for v in done.before]
        t = WIDE[before[verb.streams.find("n")].dtype]
        oracle = verb.formula(*map(exact, before), peak)
        plain = verb.formula(*[x.to(t).numpy() for x in before], peak)
        for number, true, near in zip(verb.writes, oracle, plain, strict=True):
            after = done.after[number][i]
            assert near.dtype == torch.empty(0, dtype=t).numpy().dtype
            rounded = torch.from_numpy(np.ascontiguousarray(near)).to(after.dtype)
            both = [float(abs(exact(x) - true).max(initial=0)) for x in (after, rounded)]
            found.setdefault((before[0].dtype, number), []).append(both)
    return {key: np.max(values, 0) for key, values in found.items()}


def assert_sums(verb, done):
    totals, sizes = 0, 0
    for i in range(len(done.peaks)):
        before, after = ([exact(v[i]) for v in vectors] for vectors in (done.before, done.after))
        products = verb.products(before, after)
        totals = totals + np.array([p.sum() for p in products])
        sizes = sizes + np.array([abs(p).sum() for p in products])
    assert (abs(done.returned.numpy() - totals) <= SUM_RTOL * sizes).all()


def assert_right(name, done):
    verb = VERBS[name]
    for actual, plain in errors(verb, done).values():
        # As many roundings as plain arithmetic has, in whatever order; none where that is exact.
        assert actual <= 2 * plain
    if verb.products:
        assert_sums(verb, done)
    if name in PEAKS:
        sizes = [x.double().abs().max() if x.numel() else 0.0 for x in done.after[PEAKS[name]]]
        assert_same(done.returned, torch.tensor(sizes, dtype=torch.float64))


def assert_bits_of_reference(name, place, done, *case):
    expected = do(name, Place("reference", "cpu", place.chunk), *case)
    assert_same(done.before, expected.before)
    assert_same(done.after, expected.after)
