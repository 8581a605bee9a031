"""The kernels compile for every architecture, into what the benchmarks' bounds allow; no GPU."""

import os
import re

import pytest
import torch

from mechanic_fused.backends.layout import KINDS

triton = pytest.importorskip("triton")
codegen = pytest.importorskip("benchmarks.codegen.__main__")
bounds = pytest.importorskip("benchmarks.codegen.bounds")
machine_code = pytest.importorskip("benchmarks.codegen.machine_code")

KERNELS = bounds.KERNELS

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def slow_but(quick, values):
    """Return the values, all but one marked slow: a kernel takes a second to compile."""
    return [v if v == quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


@compiles
@pytest.mark.parametrize("architecture", slow_but(90, bounds.ARCHITECTURES))
@pytest.mark.parametrize("kernel", slow_but("adam step", KERNELS))
@pytest.mark.parametrize("dtype", slow_but(torch.bfloat16, bounds.DTYPES), ids=str)
def test_a_triton_kernel_keeps_the_bounds(kernel, dtype, architecture):
    for state in bounds.variants(kernel, dtype):
        row = codegen.triton.row(kernel, dtype, architecture, state)
        assert not row.broken, codegen.line(row)
        assert row.registers > 0
        assert row.threads >= 128


@compiles
@pytest.mark.parametrize("kernel", slow_but("sgd", bounds.WITH_DELTA))
@pytest.mark.parametrize("dtype", slow_but(torch.float32, bounds.MAIN), ids=str)
def test_a_narrow_delta_keeps_the_bounds(kernel, dtype):
    row = codegen.triton.row(kernel, dtype, 90, narrow_delta=True)
    assert not row.broken, codegen.line(row)
    assert row.delta == "bfloat16"


@compiles
@pytest.mark.parametrize("architecture", slow_but(90, bounds.ARCHITECTURES))
@pytest.mark.parametrize("kernel", bounds.TUNERS)
def test_the_tuners_compile(kernel, architecture):
    assert codegen.triton.row(kernel, torch.float64, architecture).registers > 0


@compiles
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        ("apply", torch.bfloat16),
        ("adam step", torch.bfloat16),
        pytest.param("adam", torch.float32, marks=pytest.mark.slow),
        pytest.param("lion", torch.float64, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_products_and_sums_are_not_fused(kernel, dtype):
    """a·b + c rounded once would differ from the reference."""
    ptx = codegen.triton.compiled(kernel, dtype, 90)["ptx"]
    assert "mul" in ptx
    for inexact in ("fma.rn.f", ".ftz", ".approx", "div.full"):
        assert inexact not in ptx


@compiles
@pytest.mark.parametrize("kernel", slow_but("measure", KERNELS))
def test_offsets_into_weights_have_64_bits(kernel):
    """What is added to an address out of the table, or a weight of 2³¹ elements would wrap."""
    ttir = codegen.triton.compiled(kernel, torch.float32, 90)["ttir"]
    arrays = re.findall(r"(%\S+) = tt\.int_to_ptr %\S+ : i64 -> !tt\.ptr<f32>", ttir)
    # norm reads the gradient alone.
    assert len(arrays) >= (1 if kernel == "norm" else 2)
    indexed = 0
    for array in arrays:
        for offset in re.findall(rf"tt\.addptr {array}, %\S+ : !tt\.ptr<f32>, (\S+)", ttir):
            assert offset == "i64", ttir
            indexed += 1
    streams = sum(bounds.traffic(kernel, torch.float32)) - (kernel in KINDS)
    assert indexed >= (streams + 1) // 2


@compiles
@pytest.mark.parametrize("architecture", slow_but(90, bounds.ARCHITECTURES))
@pytest.mark.parametrize("dtype", slow_but(torch.float16, bounds.DTYPES), ids=str)
def test_norm_reads_gradients_16_bytes_at_a_time_and_adds_in_order(dtype, architecture):
    ptx = codegen.triton.compiled("norm", dtype, architecture)["ptx"]
    assert len(re.findall(r"ld\.global\.(?:v4\.b32|v2\.b64)\b", ptx)) == 1
    assert "fma.rn" not in ptx
    assert not re.search(r"atom\S*\.f\d\d", ptx)
    # A chunk's partial sum, its scale's sum, and the ticket put back.
    assert len(re.findall(r"st\.global", ptx)) == 3


@compiles
@pytest.mark.parametrize("architecture", slow_but(90, bounds.ARCHITECTURES))
def test_the_clip_coefficient_is_made_in_float64(architecture):
    """Of a constant that is 1e-6 in float64, not in float32, and rounded as the reference does."""
    from mechanic_fused.triton_kernels import storage

    source = codegen.triton.source("sgd", torch.float32)
    plain = codegen.triton.compiled("sgd", torch.float32, architecture)["ptx"]
    clip = source.fn.arg_names.index("clip")
    clipped = triton.compile(
        triton.compiler.ASTSource(
            fn=source.fn,
            signature={**source.signature, "clip": "*fp64"},
            constexprs={at: value for at, value in source.constants.items() if at != (clip,)},
            attrs={**source.attrs, (clip,): [["tt.divisibility", 16]]},
        ),
        target=triton.backends.compiler.GPUTarget("cuda", architecture, 32),
        options=storage.OPTIONS,
    ).asm["ptx"]
    for instruction in ("0d3EB0C6F7A0B5ED8D", "sqrt.rn.f64", "div.rn.f64"):
        assert instruction in clipped
        assert instruction not in plain


CLEAN = {"registers": 40, "stack": 0, "local": 0, "shared": 0}
CLEAN |= {"loads": 5, "stores": 3, "local_accesses": 0}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"registers": 200}, "more than"),
        ({"stack": 8}, "spills"),
        ({"local": 8}, "spills"),
        ({"local_accesses": 1}, "spills"),
        ({"loads": 4}, "fewer than 5"),
        ({"stores": 2}, "5 [+] 3"),
        ({"registers": 255}, "in flight"),
        ({"shared": 100_000}, "in flight"),
    ],
)
@pytest.mark.parametrize("backend", bounds.JUDGED)
def test_a_kernel_that_breaks_a_bound_is_named(backend, fault, said):
    code = machine_code.Code(**CLEAN)
    assert not bounds.checked(backend, "adam", torch.float32, 90, code, 128).broken
    row = bounds.checked(backend, "adam", torch.float32, 90, code._replace(**fault), 128)
    assert re.search(said, codegen.line(row))


def test_the_command_fails_for_a_broken_bound_and_for_a_backend_that_it_cannot_see(
    monkeypatch, tmp_path, capsys
):
    out = tmp_path / "codegen.csv"
    good = bounds.checked("cuda", "adam", torch.float32, 90, machine_code.Code(**CLEAN), 128)

    def run(why, *rows):
        sources = {"cuda": (lambda: why, lambda: iter(rows))}
        monkeypatch.setattr(codegen, "SOURCES", sources)
        return codegen.main(["--out", str(out)])

    assert run("", good) == 0
    assert run("", good, good._replace(broken=["spills"])) == 1
    assert run("not built", good) == 1
    assert "not built" in capsys.readouterr().out
    assert out.exists()


def test_numbers_are_read_as_cuobjdump_prints_them():
    usage = "REG:64 STACK:8 SHARED:1193 LOCAL:16 CONSTANT[0]:656 TEXTURE:0"
    sass = "LDG.E.128 R4 ; LDG.E.EF.128 R8 ; LDG.E.64 R2 ; LDL.128 R1 ; STG.E.128.STRONG.GPU [R2]"
    expected = machine_code.Code(64, 8, 16, 1193, loads=2, stores=1, local_accesses=1)
    assert machine_code.parse(usage, sass) == expected


def test_traffic_is_what_the_step_must_move():
    """Adam in float32: g, x, Δ, m, v in; Δ, m, v out. In bf16 Δ, m and v are twice as wide."""
    assert bounds.traffic("adam", torch.float32) == (5, 3)
    assert bounds.traffic("adam", torch.bfloat16) == (8, 6)
    assert bounds.traffic("adam", torch.bfloat16, torch.bfloat16) == (6, 4)
    assert bounds.traffic("sgd", torch.float64) == (3, 1)
    assert bounds.traffic("apply", torch.bfloat16) == (3, 1)
    assert bounds.traffic("adam", torch.bfloat16, narrow_delta=True) == (7, 5)
    assert bounds.traffic("apply", torch.bfloat16, narrow_delta=True) == (2, 1)
    # g, x, x_ref, m, v in and x, m, v out; in bf16 also low bits, and m and v are twice as wide.
    assert bounds.traffic("adam step", torch.float32) == (5, 3)
    assert bounds.traffic("adam step", torch.bfloat16) == (8, 6)
    assert bounds.traffic("adam step", torch.bfloat16, torch.bfloat16) == (6, 4)
    assert bounds.traffic("sgd step", torch.float64) == (3, 1)
    # Codes are taken 4 or 8 bytes at a time.
    assert bounds.traffic("adam step", torch.float32, torch.int8) == (3, 1)
    assert bounds.smaller("adam step", torch.float32, torch.int8, False) == 8
    assert bounds.traffic("adam step", torch.bfloat16, torch.int8) == (4, 2)
    assert bounds.smaller("adam step", torch.bfloat16, torch.int8, False) == 16
