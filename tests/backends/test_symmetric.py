"""Half of a symmetric product, mirrored: Triton's kernel, and when it is taken."""

import pytest
import torch
from support.kernels import INTERPRETED

from mechanic_fused.backends import orthogonalize

SHAPES = [(1, 1, 1), (2, 5, 9), (1, 128, 64), (2, 129, 200), (1, 300, 70)]


@pytest.fixture
def kernel():
    """The kernel, and the device where it runs here."""
    pytest.importorskip("triton")
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("there is no GPU (TRITON_INTERPRET=1 needs none)")
    from mechanic_fused.triton_kernels.symmetric import symmetric_product

    return symmetric_product, "cpu" if INTERPRETED else "cuda"


def drawn(shape, dtype, device):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).to(device)


@pytest.mark.triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_product(kernel, shape, tall, dtype):
    product, device = kernel
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bfloat16 as integers")
    batch, n, k = shape
    a = drawn((batch, k, n), dtype, device).mT if tall else drawn(shape, dtype, device)
    out = torch.full((batch, n, n), torch.nan, dtype=dtype, device=device)
    product(a, out)
    exact = a.double() @ a.double().mT
    # Of k float32 products and sums, and one rounding of the result.
    eps = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-24
    norms = a.double().norm(dim=2)
    bound = (k + 1) * 2.0**-24 * norms[:, :, None] * norms[:, None, :] + eps * exact.abs()
    assert ((out.double() - exact).abs() <= bound).all()
    assert torch.equal(out, out.mT)


@pytest.mark.triton
def test_a_multiple_of_a_is_added(kernel):
    product, device = kernel
    a = drawn((2, 140, 140), torch.float32, device)
    a = a + a.mT
    out = product(a, torch.empty_like(a), 0.5, -2.0)
    exact = 0.5 * a.double() @ a.double() - 2 * a.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


def test_small_matrices_and_those_on_a_cpu_are_torchs(monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing is measured here")

    monkeypatch.setattr(orthogonalize, "mirrors_faster", refuse)
    monkeypatch.setattr(orthogonalize, "SYMMETRIC_FROM", 1)
    a = drawn((2, 6, 9), torch.float32, "cpu")
    out = orthogonalize.symmetric_product(a, a.new_empty(2, 6, 6))
    assert torch.equal(out, torch.bmm(a, a.mT))


@pytest.mark.gpu
def test_the_choice_is_measured_once():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    orthogonalize.mirrors_faster.cache_clear()
    device = torch.device("cuda", 0)
    found = {n: orthogonalize.mirrors_faster(device, n, n, torch.bfloat16) for n in (2048, 4096)}
    assert orthogonalize.mirrors_faster.cache_info().misses == 2
    print(found)
    a = drawn((1, 2048, 4096), torch.bfloat16, "cuda")
    out = orthogonalize.symmetric_product(a, a.new_empty(1, 2048, 2048))
    torch.testing.assert_close(out.float(), (a.float() @ a.mT.float()), rtol=2**-7, atol=2.0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("architecture", "unit"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")]
)
def test_it_is_compiled_for_tensor_cores_and_loads_ahead(architecture, unit):
    pytest.importorskip("triton")
    from mechanic_fused.triton_kernels import symmetric
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compiled

    constants = {"K": 4096, "ADDS": True, "TILE": 128, "DEPTH": 64, "a_column": 1}
    types = {"a": "*bf16", "out": "*bf16", "alpha": "fp32", "beta": "fp32"}
    names = symmetric.symmetric_kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    whole = [n for n in names if signature[n] in ("*bf16", "i32")]
    source = ASTSource(
        fn=symmetric.symmetric_kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in whole},
    )
    made = compiled(source, target=GPUTarget("cuda", architecture, 32), options=symmetric.OPTIONS)
    assert unit in made.asm["ptx"]
    assert "cp.async" in made.asm["ptx"]
