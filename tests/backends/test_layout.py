"""The columns of the tables: Python, C++ and Triton name the same ones in the same order."""

import importlib

import pytest
from support.cases import skip_unless_available

from mechanic_fused.backends import layout

COLUMNS = ("TENSOR", "CHUNK", "SPAN", "HYPER", "SUMS", "TUNER", "COUNTERS", "CONSTANTS")


def test_the_names_in_cpp_are_those_of_python():
    skip_unless_available("cpp")
    found = importlib.import_module("mechanic_fused._native").layout
    expected = {name: getattr(layout, name) for name in (*COLUMNS, "KINDS")}
    expected["KERNEL_DTYPES"] = tuple(
        str(dtype).removeprefix("torch.") for dtype in layout.KERNEL_DTYPES
    )
    assert found == expected


@pytest.mark.parametrize("table", COLUMNS)
def test_the_constants_of_triton_are_the_columns_of_python(table):
    pytest.importorskip("triton")
    triton_layout = importlib.import_module("mechanic_fused.triton_kernels.layout")
    columns = getattr(layout, table)
    expected = {f"{table}_{name.upper()}": i for i, name in enumerate(columns)}
    # How long a row is, or where what follows these columns begins.
    ends = {f"{table}_{what}": len(columns) for what in ("COLUMNS", "BLOCKS", "BETAS")}
    found = {
        name: constant.value
        for name, constant in vars(triton_layout).items()
        if name.startswith(f"{table}_")
    }
    assert found.items() <= (expected | ends).items()
    assert expected.keys() < found.keys()
