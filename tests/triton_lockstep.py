"""Triton beside the reference on the CPU: twins that step together and are compared verb by verb.

On a GPU Triton runs there. Without one it runs in its interpreter, which must be chosen before the
kernels are defined: test_triton.py starts a process of its own for that.
"""

import os

import pytest
import torch
from cases import FEW, FUSED, QUICK, SUM_RTOL, assert_same, noise

from mechanic_fused import backends
from mechanic_fused.backends import layout, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

on_kernels = [
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()),
        reason="there is no GPU; test_in_the_interpreter runs it",
    ),
    # Of the interpreter's numpy, which says so where it makes a NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]

CASES = {
    "sgd": ("sgd", {"lr": 0.05}),
    "sgd l2": ("sgd", {"lr": 0.05, "weight_decay": 0.1}),
    "momentum": ("sgd", {"lr": 0.05, "momentum": 0.9}),
    "dampening": ("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": ("sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": ("adam", {"lr": 1.0}),
    "adam l2": ("adam", {"lr": 0.7, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw": ("adamw", {"lr": 1.0, "weight_decay": 0.1}),
    "adamw maximize": ("adamw", {"lr": 1.0, "weight_decay": 0.1, "maximize": True}),
    "lion": ("lion", {"lr": 0.5}),
    "lion decay": ("lion", {"lr": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.1}),
}
FULL = ("dampening", "adam l2", "adamw", "lion decay")  # every stream of every kernel
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)

# Nothing; one; less than, across and beyond a thread's share, a block and a chunk.
SIZES = (0, 1, 3, 63, 1025, 5003, layout.CPU_CHUNK + 129)
FEWER = (0, 3, 1025, 4100)
# The interpreter takes milliseconds a block, whatever its size: fewer and larger ones.
INTERPRETED_THREADS = 512


def triton_module(monkeypatch):
    """The Triton backend's module; in the interpreter its kernels run in larger blocks."""
    module = backends.load("triton")
    if INTERPRETED:
        monkeypatch.setattr(module.storage, "THREADS", INTERPRETED_THREADS)
        interpreted = type(module.storage.read)
        prepare_and_call = interpreted.__call__

        def call(self, *args, **kwargs):
            # The interpreter prepares the whole language anew for each call of a function, which
            # for one of ours the kernel has done: half of the time of these tests.
            if self.fn.__module__.startswith("triton."):
                return prepare_and_call(self, *args, **kwargs)
            return self.rewrite()(*args, **kwargs)

        monkeypatch.setattr(interpreted, "__call__", call)
    return module


def in_lockstep(kernels, monkeypatch):
    """Return a function that steps twins and compares them: sums, the tuner's state, then the rest.

    Sums differ in their last bits, since backends add in other orders. So each step's sums and
    tuner must be the reference's; then both go on with the reference's, and all that follows must
    be equal.
    """
    tune_reference, tune_triton = reference.tune, kernels.tune
    recorded = []
    delta_norm = 0.0

    def record(sums, tuner):
        before = sums.clone()
        tune_reference(sums, tuner)
        recorded.append((before, tuner.state.clone()))

    def compare(sums, tuner):
        expected_sums, expected = recorded.pop()
        assert_sums_agree(sums.cpu(), expected_sums, delta_norm)
        sums.copy_(expected_sums)
        tune_triton(sums, tuner)
        torch.testing.assert_close(tuner.state.cpu(), expected, rtol=SUM_RTOL, atol=0)
        tuner.state.copy_(expected)

    def run(pairs, steps=FEW, gradient=random_gradient, rtol=0.0):
        nonlocal delta_norm
        (one, one_params), (two, two_params) = pairs
        for t in range(steps):
            deltas = [state["delta"].double() for state in one.state.values()]
            delta_norm = float(sum(delta.square().sum() for delta in deltas)) ** 0.5
            advance(pairs, t, gradient)
            actual, expected = written(two, two_params), written(one, one_params)
            if rtol == 0:
                assert_same(actual, expected)
            else:
                torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol, equal_nan=True)
        assert sum(float(one.state[p]["delta"].abs().sum()) for p in one_params) > 0

    monkeypatch.setattr(reference, "tune", record)
    monkeypatch.setattr(kernels, "tune", compare)
    return run


def assert_sums_agree(sums, expected, delta_norm):
    """To an error relative to Σ|gΔ| ≤ ‖g‖‖Δ‖, since the products cancel."""
    gg, xx = expected[:, 2], expected[:, 3]
    sizes = torch.stack([gg.sqrt() * delta_norm, xx.sqrt() * delta_norm, gg, xx], dim=1)
    finite = expected.isfinite()
    assert (sums.isfinite() == finite).all()
    allowed = SUM_RTOL * sizes
    assert ((sums - expected).abs() <= allowed)[finite].all(), f"{sums} for {expected}"


def of_sizes(dtype, sizes=SIZES):
    def make():
        rng = torch.Generator().manual_seed(0)
        return [torch.randn(n, generator=rng, dtype=torch.float64).to(dtype) for n in sizes]

    return make


def twins(base, make, groups=lambda params: params, **options):
    """The same optimizer twice: the reference on the CPU, then Triton where it runs."""
    pairs = []
    for backend, device in (("reference", "cpu"), ("triton", DEVICE)):
        params = [torch.nn.Parameter(x.to(device)) for x in make()]
        pairs.append((FUSED[base](groups(params), backend=backend, **QUICK, **options), params))
    return pairs


def random_gradient(p, t, i):
    """Not a function of x, so that a difference in x would not hide behind one in g."""
    rng = torch.Generator().manual_seed(1000 * t + i)
    return (noise(p, rng) + 0.5).to(p.dtype)


def put(p, g):
    """Set a gradient on p's device, with its storage offset kept."""
    if g is not None and g.device != p.device:
        base = g._base if g._base is not None else g
        g = base.to(p.device).as_strided(g.shape, g.stride(), g.storage_offset())
    p.grad = g


def written(opt, params):
    """All that kernels write of the weights, on the CPU; the tuner's is compared elsewhere."""
    return [
        {
            **{name: value.cpu() for name, value in opt.state.get(p, {}).items()},
            "x": p.detach().cpu(),
        }
        for p in params
    ]


def advance(pairs, t, gradient=random_gradient):
    for opt, params in pairs:
        for i, p in enumerate(params):
            put(p, gradient(p, t, i))
        opt.step()
