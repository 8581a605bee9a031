"""Fixtures for the tests of backends."""

import pytest
from support.cases import RUNNING, skip_unless_available  # noqa: F401
from support.kernels import KERNELS, kernels_of
from support.lockstep import Lockstep


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    """Each backend but the reference: see Kernels."""
    return kernels_of(request.param, monkeypatch)


@pytest.fixture(params=["reference", *KERNELS])
def any_kernels(request, monkeypatch):
    """Each backend."""
    return kernels_of(request.param, monkeypatch)


@pytest.fixture
def lockstep(kernels, monkeypatch):
    """A backend beside the reference: see Lockstep."""
    return Lockstep(kernels, monkeypatch)


@pytest.fixture
def running(kernels, monkeypatch):
    """A backend beside the reference in the running form: see Lockstep."""
    return Lockstep(kernels, monkeypatch, RUNNING)
