"""The former place of support/kernels.py, for the tests of vectors."""

from support.cases import DTYPES  # noqa: F401
from support.kernels import INTERPRETED, kernels_of  # noqa: F401


def triton_module(monkeypatch):
    return kernels_of("triton", monkeypatch).ops
