"""The kernels compile for every architecture, into what the benchmarks' bounds allow; no GPU."""

import os

import pytest
import torch

pytest.importorskip("triton")
codegen = pytest.importorskip("benchmarks.codegen")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


@pytest.mark.parametrize("architecture", codegen.ARCHITECTURES)
@pytest.mark.parametrize("kernel", [*codegen.KINDS, "apply", "measure"])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.float64, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_triton_kernel_keeps_the_bounds(kernel, dtype, architecture):
    row = codegen.triton_row(kernel, dtype, architecture)
    assert not row.broken, codegen.line(row)
    assert row.registers > 0 and row.threads >= 128


@pytest.mark.parametrize("architecture", codegen.ARCHITECTURES)
def test_the_tuner_compiles(architecture):
    assert codegen.triton_row("tune", torch.float64, architecture).registers > 0


def test_products_and_sums_are_not_fused():
    """a·b + c rounded once would differ from the reference."""
    from mechanic_fused.triton_kernels import storage
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as triton_compile

    for kernel, dtype in (
        ("adam", torch.float32),
        ("lion", torch.float64),
        ("apply", torch.bfloat16),
    ):
        source = codegen.triton_source(kernel, dtype)
        target = GPUTarget("cuda", 90, 32)
        ptx = triton_compile(source, target=target, options=storage.OPTIONS).asm["ptx"]
        assert "mul" in ptx and "fma.rn.f" not in ptx and ".ftz" not in ptx
        assert ".approx" not in ptx and "div.full" not in ptx


def test_a_kernel_that_breaks_its_bounds_is_named():
    bad = {"REG": 200, "STACK": 8, "LOCAL": 0}
    row = codegen.checked("triton", "adam", torch.float32, 90, bad, 1, 3, 128)
    assert len(row.broken) == 4 and "spills" in codegen.line(row)


def test_traffic_is_what_the_step_must_move():
    """Adam in float32: g, x, Δ, m, v in; Δ, m, v out. In bf16 Δ, m and v are twice as wide."""
    assert codegen.traffic("adam", torch.float32) == (5, 3)
    assert codegen.traffic("adam", torch.bfloat16) == (8, 6)
    assert codegen.traffic("sgd", torch.float64) == (3, 1)
    assert codegen.traffic("apply", torch.bfloat16) == (3, 1)
