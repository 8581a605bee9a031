"""python -m mechanic_fused: print the facts about this installation that a bug report needs.

python -m mechanic_fused bench: a step's time beside torch's fused AdamW; --help says for what.
python -m mechanic_fused doctor: what is missing, and how to get it.
"""

import platform
import sys
from importlib import import_module, metadata
from pathlib import Path

import numpy
import torch

from . import __version__, backends, bench, doctor


def triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def native_lines() -> list[str]:
    """Return how the module was built, whether it loads, and its instruction set."""
    build = Path(__file__).with_name("_build.txt")
    note = build.read_text().strip() if build.exists() else "no record of the build"
    try:
        native = import_module("mechanic_fused._native")
    except ImportError as error:
        return [note if note.startswith("not built") else f"not loadable: {error} ({note})"]
    return [note, f"runs {native.cpu.instruction_set()} code on this processor"]


def gpus() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none that torch can use"


def report() -> str:
    facts = {
        "mechanic_fused": [__version__],
        "python": [f"{platform.python_version()}, {platform.platform()}"],
        "torch": [f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"],
        "triton": [triton_version()],
        "numpy": [numpy.__version__],
        "CPU": [
            f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
            f"{torch.get_num_threads()} threads"
        ],
        "GPU": [gpus()],
        "_native": native_lines(),
    }
    lines = [
        f"{'' if i else name:<16}{fact}"
        for name, values in facts.items()
        for i, fact in enumerate(values)
    ]
    lines += ["", f"{'backend':<16}{'serves':<12}available"]
    for row in backends.table():
        lines.append(
            f"{row.name:<16}{', '.join(row.devices):<12}{'yes' if row.available else row.why}"
        )
    lines += [f"{'auto':<16}{d:<12}{backends.resolve('auto', d)}" for d in backends.AUTO]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Do what the first argument says."""
    verb, *rest = arguments or ["report"]
    if verb == "bench":
        bench.main(rest)
    elif verb in ("report", "doctor") and not rest:
        print(report() if verb == "report" else doctor.report())
    else:
        raise SystemExit(f"{(__doc__ or '').strip()}\n\ngot {' '.join(arguments)}")


if __name__ == "__main__":
    main(sys.argv[1:])
