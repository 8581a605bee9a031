"""Two backends in lockstep: a step of each is compared verb by verb.

Only sums may differ, since backends add in other orders; so once they have been compared, the
second goes on with the first one's numbers, and all that follows must be equal to the bit.
"""

from functools import lru_cache

import torch
from cases import FUSED, STEPS, SUM_RTOL, WIDE, assert_same, assert_within, ulp

from mechanic_fused import backends
from mechanic_fused.backends import reference

# Up to eight float products are added in float before they go on in double.
FLOAT_SUM_RTOL = 8 * 2.0**-24


class SharedScale:
    """What `assert_lockstep` tells the patched verbs: how large Δ is, row by row at most this."""

    delta_norm = 0.0
    rtol = SUM_RTOL


def share_scale(monkeypatch):
    """cpp's sums must be those of the reference; then cpp learns from the same numbers as the
    reference, must come to the same, and goes on with it."""
    native = backends.load("cpp")
    tune_reference, tune_cpp = reference.tune, native.tune
    recorded = []
    shared = SharedScale()

    def record(sums, tuner):
        tune_reference(sums, tuner)
        recorded.append((sums.clone(), tuner.state.clone()))

    def compare(sums, tuner):
        expected_sums, expected = recorded.pop()
        assert_sums_agree(sums, expected_sums, shared)
        sums.copy_(expected_sums)
        tune_cpp(sums, tuner)
        torch.testing.assert_close(tuner.state, expected, rtol=SUM_RTOL, atol=0)
        tuner.state.copy_(expected)

    monkeypatch.setattr(reference, "tune", record)
    monkeypatch.setattr(native, "tune", compare)
    return shared


def assert_sums_agree(sums, expected, shared):
    """To an error relative to Σ|gΔ| ≤ ‖g‖‖Δ‖, since the products cancel."""
    gg, xx = expected[:, 2], expected[:, 3]
    sizes = [gg.sqrt() * shared.delta_norm, xx.sqrt() * shared.delta_norm, gg, xx]
    finite = expected.isfinite()
    assert (sums.isfinite() == finite).all()
    error = (sums - expected).abs()
    allowed = shared.rtol * torch.stack(sizes, dim=1)
    assert (error <= allowed)[finite].all(), f"{error} above {allowed}"


def twins(base, make_params, **options):
    """The same optimizer twice: reference, then cpp, each over its own weights."""
    pairs = []
    for backend in ("reference", "cpp"):
        params = make_params()
        groups = options.get("groups", lambda params: params)(params)
        own = {name: value for name, value in options.items() if name != "groups"}
        pairs.append((FUSED[base](groups, backend=backend, **own), params))
    return pairs


@lru_cache(maxsize=256)
def random_numbers(shape, t, i):
    rng = torch.Generator().manual_seed(1000 * t + i)
    return torch.randn(shape, generator=rng, dtype=torch.float64) + 0.5


def random_gradient(p, t, i):
    """Not a function of x, so that a difference in x would not hide behind one in g."""
    return random_numbers(p.shape, t, i).to(p.dtype, copy=True)


def state_of(opt, params):
    """The tensors that kernels write, without the tuner's, which `shared_scale` compares."""
    return [{**opt.state.get(p, {}), "x": p.detach()} for p in params]


def assert_near(state, expected):
    """torch's float64 square root is not always the nearest one, so Adam's u may be an ulp off."""
    for own, other in zip(state, expected, strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert_within(own[name], value, STEPS * ulp(value))


def assert_lockstep(shared, pairs, steps, gradient=random_gradient):
    wide = {WIDE[p.dtype] for _, params in pairs for p in params}
    shared.rtol = SUM_RTOL if wide == {torch.float64} else FLOAT_SUM_RTOL
    rooted = wide == {torch.float64} and isinstance(pairs[0][0], torch.optim.Adam)
    for t in range(steps):
        deltas = [s["delta"].double() for s in pairs[0][0].state.values()]
        shared.delta_norm = float(sum(delta.square().sum() for delta in deltas)) ** 0.5
        for opt, params in pairs:
            for i, p in enumerate(params):
                p.grad = gradient(p, t, i)
            opt.step()
        (one, one_params), (two, two_params) = pairs
        compare = assert_near if rooted else assert_same
        compare(state_of(two, two_params), state_of(one, one_params))
    moved = [opt.state[p]["delta"].abs().sum() for opt, params in pairs for p in params]
    assert sum(moved) > 0
