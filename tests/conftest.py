"""Fixtures for all tests. Every test runs with uninitialised memory filled with NaN."""

import functools
import os
from pathlib import Path

# torch asks for it where deterministic algorithms meet a GPU; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from support.cases import IMPLEMENTATIONS, Training, skip_unless_available
from support.ranks import ranks  # noqa: F401

import mechanic_fused

# `make sanitize` tests a copy of the package.
if package := os.environ.get("MECHANIC_PACKAGE"):
    assert Path(mechanic_fused.__file__).is_relative_to(Path(package).resolve())


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def process_state():
    """What one test leaves behind must not reach the next: autograd, threads.

    One thread, unless a test asks for more: on weights of these sizes a second one only waits.
    """
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """The name of a backend for the CPU."""
    skip_unless_available(request.param)
    return request.param


@pytest.fixture
def cpp():
    skip_unless_available("cpp")
    return "cpp"


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """What takes a step: the name of a backend, or "fallback"."""
    if request.param != "fallback":
        skip_unless_available(request.param)
    return request.param


@pytest.fixture
def train(implementation):
    """train(base="adamw", params=None, **options) → a Training on the implementation."""
    return functools.partial(Training, implementation)
