"""Weights of more than 2³¹ elements, without allocating them."""

from types import SimpleNamespace

import pytest
import torch
from cases import FUSED, QUICK, assert_same
from conftest import skip_unless_available
from triton_lockstep import INTERPRETED, of_sizes, random_gradient, triton_module, written

from mechanic_fused import backends
from mechanic_fused.backends import device_tables, layout
from mechanic_fused.bucket import chunk_table

# Beyond what 32 bits count, signed or not.
FAR = 1 << 33
HUGE = 3 << 31


@pytest.mark.parametrize("chunk", [1 << 13, layout.CPU_CHUNK])
def test_chunks_of_a_huge_weight_cover_it_once(chunk):
    sizes = (5, HUGE + 7, 0, chunk)
    table = chunk_table(list(sizes), chunk)
    assert table.dtype is torch.int64
    tensor, offset, length = table.unbind(1)
    assert length.min() > 0 and length.max() == chunk
    for i, n in enumerate(sizes):
        ends = (offset + length)[tensor == i]
        assert offset[tensor == i].tolist() == [0, *ends.tolist()][: len(ends)]
        assert ends[-1:].tolist() == [n] * bool(n)
    assert offset.max() >= HUGE


def test_spans_of_a_huge_weight_count_all_its_chunks():
    chunks = torch.tensor([[0, 0, 1], [1, 0, 4], [1, 4, 4], [1, HUGE, 1]])
    found = device_tables._spans(
        SimpleNamespace(sums=torch.empty(3, 4), rows=[0, 2, 2], chunks=chunks)
    )
    assert found.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [1, 3, 1, 2]]


ON_CPU = ["triton"] if INTERPRETED else ["cpp"]
ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]


@pytest.fixture(params=ON_CPU if INTERPRETED else ON_CPU + ON_GPU)
def verbs(request, monkeypatch):
    """A backend's module, and the device that it works on."""
    name = request.param
    on_gpu = name != "cpp" and not INTERPRETED
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    skip_unless_available(name)
    module = triton_module(monkeypatch) if name == "triton" else backends.load(name)
    return name, module, "cuda" if on_gpu else "cpu"


def tables_of(found):
    """The tables that the kernels read."""
    if isinstance(found.handle, device_tables.DeviceTables):
        return found.handle
    return getattr(found.handle, "tables", found)


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"narrow_state": True}),
        (torch.bfloat16, {"narrow_delta": True}),
    ],
    ids=str,
)
def test_elements_beyond_the_range_of_32_bits(verbs, dtype, narrow):
    """Addresses are lowered and offsets raised by as much: the elements are where they were."""
    name, module, device = verbs
    results = []
    for far in (0, FAR):
        params = [torch.nn.Parameter(x.to(device)) for x in of_sizes(dtype, (0, 3, 1025, 4100))()]
        opt = FUSED["adamw"](params, weight_decay=0.1, backend=name, **narrow, **QUICK)
        for t in range(2):
            for i, p in enumerate(params):
                p.grad = random_gradient(p, t, i).to(device)
            opt.step()
        (found,) = opt._plan.buckets
        assert found.collect_gradients()
        step_count = opt._tuner.counters[0, 0] if narrow.get("narrow_delta") else None
        found.load([list(row) for row in found.hyper_rows], {}, None, None, step_count=step_count)
        module.prepare(found)
        tables = tables_of(found)
        tables.chunks[:, 1] += far
        state = dtype if narrow.get("narrow_state") else torch.float32
        widths = dict.fromkeys(("gradient", "weight", "x_ref"), dtype.itemsize)
        widths |= {
            "delta": found.delta[0].element_size(),
            "state0": state.itemsize,
            "state1": state.itemsize,
        }
        for column, width in widths.items():
            tables.tensors[:, layout.TENSOR.index(column)] -= far * width
        module.accumulate(found)
        module.apply(found, opt._tuner)
        after_apply = found.sums.cpu().clone()
        module.measure(found)
        assert_same(found.sums.cpu(), after_apply)
        results.append((written(opt, params), after_apply))
    assert_same(results[1], results[0])
