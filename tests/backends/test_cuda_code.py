"""The machine code of the CUDA backend, as far as it can be judged without a GPU."""

import importlib

import pytest
import torch
from support.cases import skip_unless_available

from mechanic_fused.backends.layout import KINDS

codegen = pytest.importorskip("benchmarks.codegen.__main__")
bounds = pytest.importorskip("benchmarks.codegen.bounds")


@pytest.fixture(scope="module", params=bounds.ARCHITECTURES)
def rows(request):
    """The rows of one architecture."""
    skip_unless_available("cuda")
    why = codegen.cuda.absent()
    if why:
        pytest.skip(why)
    found = list(codegen.cuda.rows((request.param,)))
    if not found:
        pytest.skip(f"not built for sm_{request.param}")
    return found


def test_every_kernel_is_there_for_every_dtype(rows):
    expected = [
        (kernel, dtype, state)
        for dtype in bounds.DTYPES
        for kernel in bounds.KERNELS
        for state in bounds.variants(kernel, dtype)
    ]
    names = [str(dtype).removeprefix("torch.") for _, dtype, _ in expected]
    kernels = [kernel for kernel, _, _ in expected]
    assert sorted((row.kernel, row.dtype) for row in rows) == sorted(
        [*zip(kernels, names, strict=True), *((tuner, "float64") for tuner in bounds.TUNERS)]
    )


def test_the_kernels_keep_the_bounds(rows):
    """Registers, no spills, no local memory, 128-bit accesses, bytes in flight; in every dtype."""
    assert not [codegen.line(row) for row in rows if row.broken]


def test_the_main_path_moves_16_bytes_at_a_time_and_nothing_twice(rows):
    for row in rows:
        dtype = getattr(torch, row.dtype)
        state = getattr(torch, row.state) if row.state else None
        loads, stores = bounds.traffic(row.kernel, dtype, state)
        if row.kernel in bounds.WITH_DELTA and dtype in bounds.NARROW and row.state != "int8":
            # The other side of a branch: a narrow Δ. Beside float32 its accesses have 8 bytes.
            loads, stores = loads + 1, stores + (row.kernel in KINDS)
        if "muon" in row.kernel and dtype in bounds.NARROW:
            # The other side of a branch: n or O in bfloat16. Beside float32 it has 8 bytes.
            loads += row.kernel == bounds.UPDATE
            stores += row.kernel != bounds.UPDATE
        if row.kernel == bounds.UPDATE and row.dtype == "bfloat16":
            stores += 1  # the other side of a branch: an x without low bits
        if "step" in row.kernel and row.dtype == "bfloat16" and row.state in ("bfloat16", "int8"):
            stores += 1  # the other side of a branch: an x without low bits
        assert (row.loads, row.stores) == (loads, stores), codegen.line(row)


def test_names_are_read_as_the_compiler_mangles_them():
    part = "_ZN8mechanic4cuda17accumulate_kernelINS_"
    of = codegen.cuda.kernel_of
    assert of(f"{part}4AdamEffEEvNS_6BucketE") == ("adam", torch.float32, None)
    assert of(f"{part}3SgdENS_8BFloat16EfEEv") == ("sgd", torch.bfloat16, None)
    assert of(f"{part}4LionENS_4HalfES3_EEv") == ("lion", torch.float16, torch.float16)
    assert of("12apply_kernelILb0EddEEv") == ("measure", torch.float64, None)
    assert of("11norm_kernelINS_4HalfEEEv") == ("norm", torch.float16, None)
    assert of("12apply_kernelILb1ENS_8BFloat16EfEEv") == ("apply", torch.bfloat16, None)
    codes = ("apply", torch.bfloat16, torch.int8)
    assert of("12apply_kernelILb1ENS_8BFloat16ENS_4CodeEEEv") == codes
    assert of("12apply_kernelILb1EfNS_4CodeEEEv") == ("apply", torch.float32, torch.int8)
    step = part.replace("17accumulate", "11step").replace("INS_", "ILb0ENS_")
    assert of(f"{step}4AdamENS_8BFloat16EfEEv") == ("adam step", torch.bfloat16, None)
    assert of(f"{step}8MomentumENS_4HalfES3_EEv") == ("momentum step", torch.float16, torch.float16)
    codes = ("adam step", torch.float32, torch.int8)
    assert of(f"{step}4AdamEfNS_4CodeEEEvNS_6BucketE") == codes
    codes = ("adam step", torch.bfloat16, torch.int8)
    assert of(f"{step}4AdamENS_8BFloat16ENS_4CodeEEEv") == codes
    narrow = ("adam step", torch.float16, torch.bfloat16)
    assert of(f"{step}4AdamENS_4HalfENS_8BFloat16EEEv") == narrow
    in_part = step.replace("Lb0", "Lb1")
    assert of(f"{in_part}3SgdEffEEv") == ("sgd step in part", torch.float32, None)
    assert of("_ZN8mechanic4cuda75_GLOBAL__N__1_11tune_kernelEPKNS_4SumsE")[0] == "tune"
    assert of("_ZN8mechanic4cuda75_GLOBAL__N__1_15log_tune_kernelEPKNS_4SumsE")[0] == "log_tune"
    momentum = "_ZN8mechanic4cuda39_GLOBAL__N__1_7_muon_cu_215momentum_kernelI"
    assert of(f"{momentum}Lb0EfNS_8BFloat16EEEvNS_6BucketE") == (
        "muon momentum",
        torch.float32,
        torch.bfloat16,
    )
    half = ("muon momentum in part", torch.float16, torch.float16)
    assert of(f"{momentum}Lb1ENS_4HalfES3_EEvNS_6BucketE") == half
    update = momentum.replace("15momentum", "13update")
    assert of(f"{update}NS_4HalfEEEvNS_6BucketE") == ("muon update", torch.float16, None)
    assert of("_ZN4none4mineEv") is None


def test_the_blocks_have_the_threads_that_occupancy_is_reckoned_with():
    """A block adds up as many chunks as it has threads, and each such group takes a ticket."""
    skip_unless_available("cuda")
    native = importlib.import_module("mechanic_fused._native")
    chunks = 1 << 20
    assert native.cuda.ticket_count(chunks, 0) * codegen.cuda.THREADS == chunks


def test_an_error_names_the_op_and_the_call():
    skip_unless_available("cuda")
    native = importlib.import_module("mechanic_fused._native")
    bucket = native.Bucket(
        tables=native.Tables(tensors=0, chunks=0, hyper=0, partials=0, sums=0),
        counts=native.Counts(
            tensors=0, chunks=1 << 31, scales=0, elements=0, in_part=0, state_block=0
        ),
        kind=0,
        dtypes=native.DTypes(weight=0, state=0, delta=0),
    )
    reduction = native.cuda.Reduction(spans=0, tickets=0)
    scalars = native.cuda.StepScalars(grad_scale=0, found_inf=0)
    with pytest.raises(RuntimeError, match="mechanic_fused accumulate: cudaLaunchKernel: "):
        native.cuda.accumulate(bucket, reduction, scalars, 0)
