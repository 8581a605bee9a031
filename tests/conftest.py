"""Fixtures for all tests. Every test runs with uninitialised memory filled with NaN."""

import functools
import os

# torch asks for it where deterministic algorithms meet a GPU; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from pool import Pool
from support.cases import IMPLEMENTATIONS, Training, skip_unless_available


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


@pytest.fixture(scope="session")
def pools():
    made = {}
    yield made
    for pool in made.values():
        pool.close()


@pytest.fixture
def ranks(pools):
    """ranks(n): n processes in one gloo group, made at their first use and kept for all tests."""
    return lambda size: Kept(pools, size)


class Kept:
    """A pool that stays until a test has failed in it."""

    def __init__(self, pools, size):
        self.pools, self.size = pools, size
        if size not in pools:
            pools[size] = Pool(size)

    def run(self, function, *args, **options):
        try:
            return self.pools[self.size].run(function, *args, **options)
        except BaseException:
            # Its ranks may be at different collectives now.
            self.pools.pop(self.size).close()
            raise
