"""The backends: which exist, which device each serves, and which one "auto" selects."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from torch import Tensor

if TYPE_CHECKING:
    from ..bucket import Bucket
    from ..log_tuner import LogTuner
    from ..tuner import Tuner


class Backend(Protocol):
    """The ops of a step, each one call for all weights of a bucket.

    Of the exact forms: norm, accumulate, tune, apply, measure; of the running form: norm, step,
    log_tune, and of Muon the two ends of a step.

    Backends are modules; ``reference`` defines what each op computes. An op changes only what it
    names.

    Attributes:
        CHUNK: device type → elements of a chunk of the tables that the ops walk.
        COPIES_TABLES: whether the kernels read copies of the tables, so that ``prepare`` is needed
            in every step and not only in a bucket's first.
    """

    CHUNK: Mapping[str, int]
    COPIES_TABLES: bool

    def prepare(self, bucket: Bucket) -> None:
        """Bring the bucket's tables to where the kernels read them."""

    def norm(self, bucket: Bucket) -> None:
        """sums[:, GG] = g·g over the finite elements, before any clipping."""

    def accumulate(self, bucket: Bucket) -> None:
        """sums[:, GD] = g·Δ, sums[:, GG] = g·g with the old Δ; base state and Δ move by one u."""

    def tune(self, sums: Tensor, tuner: Tuner) -> None:
        """Update ``tuner.state`` from sums (scales, 6) float64 over all weights of each scale."""

    def step(self, bucket: Bucket, tuner: LogTuner) -> None:
        """sums[:, GD] = g·(x − x_ref), GG, XX, UU, COUNT; base state moves by one u; x += S·u."""

    def muon_momentum(self, bucket: Bucket, n: Tensor) -> None:
        """The sums of a step but UU; the momentum moves, and n is what Muon orthogonalizes."""

    def muon_update(self, bucket: Bucket, o: Tensor, ratio: float, tuner: LogTuner) -> None:
        """sums[:, UU]; x += S·u with the u that Muon makes of O."""

    def log_tune(self, sums: Tensor, tuner: LogTuner) -> None:
        """Update ``tuner.state`` from sums over all weights of each scale and observed losses."""

    def apply(self, bucket: Bucket, tuner: Tuner) -> None:
        """x = round(x_ref + S·Δ); sums[:, XD] = x·Δ and sums[:, XX] = x·x for the next step."""

    def measure(self, bucket: Bucket) -> None:
        """sums[:, XD] and sums[:, XX] of the weights as they are: after a load or a write."""


class Row(NamedTuple):
    """A backend on this machine."""

    name: str
    devices: tuple[str, ...]
    available: bool
    why: str


MODULES = {
    "cpp": "mechanic_fused.backends.cpp",
    "cuda": "mechanic_fused.backends.cuda",
    "triton": "mechanic_fused.triton_kernels",
    "reference": "mechanic_fused.backends.reference",
}
"""Backend → the module that is its :class:`Backend`."""

VECTOR_MODULES = {
    "cpp": "mechanic_fused.vectors.cpp",
    "cuda": "mechanic_fused.triton_kernels.vectors",
    "triton": "mechanic_fused.triton_kernels.vectors",
    "reference": "mechanic_fused.vectors.reference",
}
"""Backend → the module of its vector ops. On a GPU only Triton has them: they move the same bytes
as CUDA kernels would, once in many steps."""

AUTO = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
"""Device → the backends that "auto" tries, in this order."""


def load(name: str) -> Backend:
    """Return a backend's module; imports it at the first call."""
    return cast(Backend, importlib.import_module(MODULES[name]))


def load_vectors(name: str) -> Any:
    """Return the module of a backend's vector ops; imports it at the first call."""
    return importlib.import_module(VECTOR_MODULES[name])


def _missing(name: str) -> str:
    """Return why a backend cannot be used here, or the empty string."""
    if name == "reference":
        return ""
    if name == "triton":
        try:
            load(name)
        except ImportError as error:
            return f"{error}; pip install 'mechanic_fused[triton]'"
        return ""
    try:
        native = importlib.import_module("mechanic_fused._native")
    except ImportError as error:
        return f"the extension was not built ({error}); install a C++17 compiler, then reinstall"
    if name == "cuda" and not native.has_cuda:
        return (
            "the extension was built without CUDA; with nvcc installed and a GPU visible, or "
            "MECHANIC_CUDA=1 set, reinstall"
        )
    return ""


def table() -> list[Row]:
    """Return a row for each backend: which devices it serves, whether it is available, why not."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    devices = {
        "cpp": ("cpu",),
        "cuda": ("cuda",),
        "triton": ("cpu",) if interpreted else ("cuda",),
        "reference": ("cpu", "cuda"),
    }
    missing = {name: _missing(name) for name in MODULES}
    return [Row(name, devices[name], not missing[name], missing[name]) for name in MODULES]


def check(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto" or an available backend."""
    if name != "auto" and name not in MODULES:
        raise ValueError(f"backend must be auto, {', '.join(MODULES)}, got {name!r}")
    why = "" if name == "auto" else _missing(name)
    if why:
        raise ValueError(f"backend {name!r} is not available: {why}")


def resolve(name: str, device: str) -> str:
    """Return the backend that serves weights on ``device``.

    Args:
        name: "auto" or a backend's name.
        device: a device type, "cpu" or "cuda".

    Raises:
        ValueError: if that backend is not available or does not serve that device.
    """
    check(name)
    if name == "auto":
        return next((b for b in AUTO.get(device, ()) if not _missing(b)), "reference")
    row = next(row for row in table() if row.name == name)
    if device not in row.devices and name != "reference":
        raise ValueError(
            f"backend {name!r} serves weights on {', '.join(row.devices)}, got a weight on {device}"
        )
    return name


def resolve_vectors(name: str, device: str) -> str:
    """Return the backend whose vector ops serve weights on ``device``; see :func:`resolve`."""
    found = resolve(name, device)
    if found == "cuda" and name == "auto" and _missing("triton"):
        return "reference"
    return found
