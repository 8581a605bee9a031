"""What is kept of a run: the conditions it was taken under, and JSON written whole."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import mechanic_fused

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def conditions(commit: str | None = None) -> Row:
    """Return what a reader must know to repeat a run, or to doubt it.

    Args:
        commit: the commit, for a tree that was copied here without its history.
    """
    built = ROOT / "mechanic_fused" / "_build.txt"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": commit or _commit(),
        "mechanic_fused": mechanic_fused.__version__,
        "extension": built.read_text().strip() if built.exists() else "no word of how it was built",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "load": round(os.getloadavg()[0], 2),
    }


def _module() -> str:
    """Return the name by which this program was started."""
    program = Path(sys.argv[0])
    return f"benchmarks.{program.parent.name if program.stem == '__main__' else program.stem}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", *arguments], cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "-uno") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return (
            next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Bystanders:
    """How much of the processors others take from now on: what makes step times doubtful."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.before = self._others()

    def cores(self) -> float | None:
        """Return the cores that others have kept busy, on average; None where nothing tells."""
        now = self._others()
        if now is None or self.before is None:
            return None
        return round(max(0.0, now - self.before) / (time.perf_counter() - self.began), 2)

    @staticmethod
    def _others() -> float | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        # Ours are those of this process and of the children that have ended.
        return busy - sum(os.times()[:4])


def write(path: Path, record: Row) -> None:
    """Write a record as JSON, whole or not at all: a run may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    draft.replace(path)
