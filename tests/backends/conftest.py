"""Fixtures for the tests of backends."""

import pytest
from support.cases import RUNNING, skip_unless_available  # noqa: F401
from support.kernels import KERNELS, kernels_of
from support.lockstep import Lockstep

from mechanic_fused.kept_blocks import WHOLE, KeptBlocks


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


@pytest.fixture
def set_phases(monkeypatch):
    """set_phases(…) makes every weight a shard that begins at one of these phases, in turns."""

    def set_phases(*phases):
        def found(self, weights):
            return [
                phases[i % len(phases)] if every > 1 else WHOLE
                for i, (_, every) in enumerate(weights)
            ]

        monkeypatch.setattr(KeptBlocks, "phases", found)

    return set_phases
