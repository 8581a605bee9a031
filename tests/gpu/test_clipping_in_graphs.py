"""Clipping's kernels as a GPU gets them: how they compile, and what a step must not do."""

import importlib
import os
import re

import pytest
import torch
from cases import FUSED, QUICK, SUM_RTOL
from conftest import skip_unless_available

from mechanic_fused.backends.layout import GG, compute_dtype

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU"),
    # What torch says of its own prototypes: sync debug mode, the profiler.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
POINTERS = {
    "*i64": ("tensors", "chunks", "spans"),
    "*fp64": ("hyper", "partials", "sums", "clip"),
    "*i32": ("tickets",),
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names}


def ptx_of(verb, dtype, architecture, **constants):
    """The kernel of a verb as its launcher specialises it, without GradScaler."""
    from mechanic_fused.triton_kernels import storage
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"mechanic_fused.triton_kernels.{verb}")
    kernel = getattr(module, f"{verb}_kernel")
    x, t = storage.DTYPES[dtype], storage.DTYPES[compute_dtype(dtype)]
    constants |= {"X": x, "T": t, "grad_scale": None, "found_inf": None, **storage.sizes(dtype)}
    types = {**TYPES, "chunk_count": "i32", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if kind.startswith("*")
        },
    )
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=storage.OPTIONS).asm["ptx"]


@compiled
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_reads_gradients_16_bytes_at_a_time_and_adds_in_order(dtype, architecture):
    ptx = ptx_of("norm", dtype, architecture)
    assert len(re.findall(r"ld\.global\.(?:v4\.b32|v2\.b64)\b", ptx)) == 1
    assert "fma.rn" not in ptx and not re.search(r"atom\S*\.f\d\d", ptx)
    # A chunk's partial sum, its scale's sum, and the ticket put back.
    assert len(re.findall(r"st\.global", ptx)) == 3


@compiled
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_coefficient_is_made_in_float64(architecture):
    """Of a constant that is 1e-6 in float64, not in float32, and rounded as the reference does."""
    wide = triton.language.float32
    options = {"KIND": "sgd", "S": wide, "D": wide, "clock": None}
    clipped = ptx_of("accumulate", torch.float32, architecture, **options)
    plain = ptx_of("accumulate", torch.float32, architecture, clip=None, **options)
    constant = "0d3EB0C6F7A0B5ED8D"
    assert constant in clipped and constant not in plain
    assert "sqrt.rn.f64" in clipped and "div.rn.f64" in clipped
    assert "sqrt.rn.f64" not in plain and "div.rn.f64" not in plain


@pytest.fixture(params=["cuda", "triton"])
def clipped(request):
    """A bucket of 20 weights whose gradients are 3, to be clipped to a norm of 1."""
    skip_unless_available(request.param)
    params = [torch.nn.Parameter(torch.ones(5003, device="cuda")) for _ in range(20)]
    opt = FUSED["adamw"](params, lr=1.0, backend=request.param, **QUICK)
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    opt.step()
    [found] = opt._plan.buckets
    found.collect_gradients()
    clip = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cuda")
    found.load(found.hyper_rows, {}, None, None, clip)
    found.backend.prepare(found)
    found.backend.norm(found)  # Triton compiles it the first time
    return found


def clip_and_accumulate(found):
    found.backend.norm(found)
    found.clip[:1].copy_(found.sums[:, GG])
    found.backend.accumulate(found)


class TestOnGpu:
    pytestmark = on_gpu

    def test_the_gradients_are_clipped_to_the_norm(self, clipped):
        clip_and_accumulate(clipped)
        squares = 9.0 * 5003 * 20
        assert float(clipped.clip[0]) == pytest.approx(squares, rel=SUM_RTOL)
        norm = squares**0.5
        # The coefficient is rounded to float32.
        expected = (norm / (norm + 1e-6)) ** 2
        assert float(clipped.sums[0, GG]) == pytest.approx(expected, rel=2 * 2.0**-23)

    def test_the_host_never_waits(self, clipped):
        clip_and_accumulate(clipped)
        torch.cuda.set_sync_debug_mode("error")
        try:
            clip_and_accumulate(clipped)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_norm_is_one_launch(self, clipped):
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            clipped.backend.norm(clipped)
            torch.cuda.synchronize()
        kernels = [
            event.name
            for event in profile.events()
            if event.device_type.name == "CUDA" and not event.name.startswith(("Mem", "mem"))
        ]
        if not kernels:
            pytest.skip("the profiler sees no kernels here")
        assert len(kernels) == 1 and "norm_kernel" in kernels[0]

    def test_a_captured_norm_replays_with_the_gradients_of_the_day(self, clipped):
        clip_and_accumulate(clipped)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            clip_and_accumulate(clipped)
        for g in clipped.grads:
            g.fill_(0.5)
        graph.replay()
        assert float(clipped.clip[0]) == pytest.approx(0.25 * 5003 * 20, rel=SUM_RTOL)
