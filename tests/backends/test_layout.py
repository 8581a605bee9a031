"""The tables have the same columns in Python, in C++ and CUDA, and in Triton."""

import importlib

import pytest
import torch
from conftest import skip_unless_available

from mechanic_fused.backends import layout

TABLES = (
    *("TENSOR", "CHUNK", "SPAN", "HYPER", "SUMS", "TUNER", "COUNTERS", "CONSTANTS"),
    *("LOG_TUNER", "LOG_CONSTANTS", "LOSSES"),
)

# What Triton calls the number of a table's columns, where it is not COLUMNS; None: it has no need.
COUNTS = {"TUNER": "BLOCKS", "CONSTANTS": "BETAS", "LOG_CONSTANTS": None, "LOSSES": None}
# With what the names of a table begin in Triton, where it is not the table's name.
PREFIXES = {"LOG_TUNER": "LOG"}


def test_cpp_and_python_have_the_same_columns():
    skip_unless_available("cpp")
    native = importlib.import_module("mechanic_fused._native")
    constants = ("KINDS", "STORED_DTYPES", "REFERENCE_BLOCK", "REFERENCE_PERIOD", "MOST_SCALE")
    expected = {name: getattr(layout, name) for name in (*TABLES, *constants)}
    expected["STORED_DTYPES"] = tuple(
        str(dtype).removeprefix("torch.") for dtype in layout.STORED_DTYPES
    )
    assert native.layout == expected


@pytest.mark.parametrize("table", TABLES)
def test_triton_and_python_have_the_same_columns(table):
    pytest.importorskip("triton")
    module = importlib.import_module("mechanic_fused.triton_kernels.layout")
    prefix = PREFIXES.get(table, table)
    longer = tuple(f"{t}_" for t in TABLES if t.startswith(f"{prefix}_"))
    found = {
        name: number.value
        for name, number in vars(module).items()
        if name.startswith(f"{prefix}_") and not name.startswith(longer)
    }
    columns = getattr(layout, table)
    expected = {f"{prefix}_{column.upper()}": i for i, column in enumerate(columns)}
    count = COUNTS.get(table, "COLUMNS")
    if count:
        expected[f"{prefix}_{count}"] = len(columns)
    assert found == expected


def test_triton_takes_the_dtypes_that_the_kernels_take():
    pytest.importorskip("triton")
    storage = importlib.import_module("mechanic_fused.triton_kernels.storage")
    assert set(storage.DTYPES) == set(layout.KERNEL_DTYPES)
    assert set(storage.STORED_DTYPES) == {*layout.STORED_DTYPES, torch.int16}


def test_columns_are_named_once():
    for table in (*TABLES, "KINDS"):
        names = getattr(layout, table)
        assert len(set(names)) == len(names)
    assert len(set(layout.KERNEL_DTYPES)) == len(layout.KERNEL_DTYPES)
    assert all(isinstance(dtype, torch.dtype) for dtype in layout.KERNEL_DTYPES)
    assert set(layout.STATES) == {*layout.KINDS, layout.MUON}
