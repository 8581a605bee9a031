"""python -m mechanic_fused: what a bug report needs to say about this installation."""

import platform
from importlib import import_module, metadata
from pathlib import Path

import numpy
import torch

from . import __version__, backends


def triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "absent"


def native_report() -> str:
    """Whether the compiled module loads, and what setup.py wrote about its build."""
    build = Path(__file__).with_name("_build.txt")
    note = build.read_text().strip() if build.exists() else "not built"
    try:
        import_module("mechanic_fused._native")
    except ImportError as error:
        return note if note.startswith("not built") else f"{note}, but does not load: {error}"
    return note


def gpu_report() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def report() -> str:
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()} as torch sees it"
    lines = [
        f"mechanic_fused  {__version__}",
        f"python          {platform.python_version()}, {platform.platform()}",
        f"torch           {torch.__version__}, CUDA {torch.version.cuda or 'absent'}",
        f"triton          {triton_version()}",
        f"numpy           {numpy.__version__}",
        f"CPU             {cpu}, {torch.get_num_threads()} threads",
        f"GPU             {gpu_report()}",
        f"_native         {native_report()}",
        "",
        "backend    serves     available",
    ]
    for name, devices, available, why_not in backends.table():
        lines.append(f"{name:<10} {devices:<10} {'yes' if available else f'no: {why_not}'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
