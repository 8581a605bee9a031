"""Which backends there are, which device each serves, and which one "auto" means."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple


class Row(NamedTuple):
    """A backend as it stands on this machine."""

    name: str
    devices: tuple[str, ...]
    available: bool
    why: str


def _module(name: str) -> Callable[[], ModuleType]:
    return lambda: importlib.import_module(f"mechanic_fused.{name}")


MODULES = {
    "cpp": _module("native"),
    "cuda": _module("native"),
    "triton": _module("triton_kernels"),
    "reference": _module("reference"),
}
"""Backend → its module. All have the same six functions; CONTRIBUTING.md lists them."""

VECTORS = {
    "cpp": _module("vectors_native"),
    "cuda": _module("triton_kernels.vectors"),
    "triton": _module("triton_kernels.vectors"),
    "reference": _module("vectors_reference"),
}
"""Backend → the module with its vector verbs: see vectors_reference.py. On a GPU they are Triton's
alone: they move the same bytes as CUDA's would, once in many steps."""

AUTO = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
"""Device → the backends that "auto" tries, in this order."""


def _missing(name: str) -> str:
    """Return why a backend cannot be used here, or the empty string."""
    if name == "reference":
        return ""
    if name == "triton":
        try:
            MODULES[name]()
        except ImportError as error:
            return f"{error}; pip install 'mechanic_fused[triton]'"
        return ""
    try:
        native = importlib.import_module("mechanic_fused._native")
    except ImportError as error:
        return f"the extension was not built ({error}); install a C++17 compiler, then reinstall"
    if name == "cuda" and not native.has_cuda:
        return "the extension was built without CUDA; install nvcc, then reinstall"
    return ""


def table() -> list[Row]:
    """Return a row for each backend: which devices it serves, whether it is there, why not."""
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
    """Raise ValueError unless ``name`` is "auto" or a backend that is there."""
    if name != "auto" and name not in MODULES:
        raise ValueError(f"backend must be auto, {', '.join(MODULES)}, got {name!r}")
    why = "" if name == "auto" else _missing(name)
    if why:
        raise ValueError(f"backend {name!r} is not available: {why}")


def resolve_vectors(name: str, device: str) -> str:
    """Return the backend whose vector verbs serve weights on ``device``; see :func:`resolve`."""
    found = resolve(name, device)
    if found == "cuda" and name == "auto" and _missing("triton"):
        return "reference"
    return found


def resolve(name: str, device: str) -> str:
    """Return the backend that serves weights on ``device``.

    Args:
        name: "auto" or a backend's name.
        device: a device type, "cpu" or "cuda".

    Raises:
        ValueError: if that backend is not there or does not serve that device.
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
