"""Results on disk: rows in a CSV file, their environments in environments.json beside it."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import mechanic_fused

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ENVIRONMENTS = "environments.json"
PER_RUN = ("date", "command", "load")
"""What may differ between two runs in the same environment."""

Row = dict[str, Any]


@dataclass
class Record:
    """The rows of one run and the environment in which they were measured.

    Rows are flat and may have different keys. On disk a missing key is an empty cell, and floats
    have six significant digits.
    """

    environment: Row
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the rows to ``path`` and the environment beside it; a killed run corrupts none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        draft = path.with_suffix(".part")
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: compact(v) for k, v in row.items()} for row in self.rows)
        draft.replace(path)
        _write_environments(path, [self.environment])

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what ``save`` has written."""
        with path.open(newline="") as file:
            rows = [
                {key: parsed(text) for key, text in row.items() if text}
                for row in csv.DictReader(file)
            ]
        return cls(environments(path)[0], rows)


def compact(value: Any, digits: int = 6) -> Any:
    """Return a cell of the CSV file: floats with so many significant digits."""
    return f"{value:.{digits}g}" if isinstance(value, float) else value


def parsed(text: str) -> Any:
    """Return the value of a cell: an int, a float, a bool or text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"True": True, "False": False}.get(text, text)


def environments(path: Path) -> list[Row]:
    """Return the environments of a result file, in the order of their numbers."""
    shared = path.with_name(ENVIRONMENTS)
    return json.loads(shared.read_text()).get(path.stem, []) if shared.exists() else []


def number_of(path: Path, environment: Row) -> int:
    """Return the number of an environment in a result file; a new one is added to the list."""

    def lasting(row: Row) -> Row:
        return {key: value for key, value in row.items() if key not in PER_RUN}

    known = environments(path)
    for i, other in enumerate(known):
        if lasting(other) == lasting(environment):
            return i
    _write_environments(path, [*known, environment])
    return len(known)


def _write_environments(path: Path, found: list[Row]) -> None:
    shared = path.with_name(ENVIRONMENTS)
    shared.parent.mkdir(parents=True, exist_ok=True)
    everything = json.loads(shared.read_text()) if shared.exists() else {}
    everything[path.stem] = found
    draft = shared.with_suffix(".part")
    lists = []
    for name, of_file in sorted(everything.items()):
        short: Row = {"ensure_ascii": False, "separators": (",", ":")}
        lines = ",\n".join(json.dumps(each, **short) for each in of_file)
        lists.append(f"{json.dumps(name)}: [\n{lines}\n]")
    draft.write_text("{\n" + ",\n".join(lists) + "\n}\n")
    draft.replace(shared)


def environment(commit: str | None = None, miniature: bool = False) -> Row:
    """Return what is needed to repeat a run, or to doubt it.

    Args:
        commit: the commit, where the source tree has no git history.
        miniature: the cases are so small that the figures mean nothing.
    """
    built = ROOT / "mechanic_fused" / "_build.txt"
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": commit or _commit(),
        "mechanic_fused": mechanic_fused.__version__,
        "extension": built.read_text().strip() if built.exists() else "unknown build",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "load": round(os.getloadavg()[0], 2),
        **({"miniature": True} if miniature else {}),
    }


def device_name(device: torch.device) -> str:
    """Return "cpu", or the name of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


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
        return next(s for s in lines if s.startswith("model name")).partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class BackgroundLoad:
    """Measures how busy other processes keep the cores, which makes step times unreliable."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.before = self._others()

    def cores(self) -> float | None:
        """Return the mean number of cores kept busy by others; None where it cannot be read."""
        now = self._others()
        if now is None or self.before is None:
            return None
        return round(max(0.0, now - self.before) / (time.perf_counter() - self.began), 2)

    @staticmethod
    def _others() -> float | None:
        """Return the processor seconds used so far by all other processes."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        # times() counts this process and its children that have ended.
        return busy - sum(os.times()[:4])
