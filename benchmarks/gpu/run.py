"""One run of `python -m benchmarks.gpu`: its time limit, its processes and their rows."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from .._harness import records, tables
from .._harness.baselines import (
    adamw,
    lean_adamws,
    mechanic_pytorch,
    muon,
    torch_adamw,
    torch_adamw_narrow,
    torch_muon,
)
from .._harness.records import ROOT, Record, Row
from .._harness.tables import Requirement, shown


def requirements(backends: tuple[str, ...]) -> list[Requirement]:
    """Return what is required of each of our backends."""
    fused, found = torch_adamw("fused").name, []
    for backend in backends:
        ours, exact = adamw(backend).name, adamw(backend, variant="annealed").name
        part = adamw(backend, x_ref_every=8).name
        found += [
            Requirement("1.5B", ours, None, 0.93, at_least=True, quantity="of_copy"),
            Requirement("1.5B", ours, fused, 1.20, floor=True),
            Requirement("1.5B", part, None, 0.93, at_least=True, quantity="of_copy"),
            Requirement("1.5B", part, fused, 1.08, floor=True),
            Requirement("1.5B", exact, None, 0.85, at_least=True, quantity="of_copy"),
            Requirement("1.5B", exact, fused, 1.60, floor=True),
            Requirement("1000x1000", ours, fused, 1.0),
            Requirement("1000x1000", ours, None, 2, quantity="launches"),
            Requirement("124M", mechanic_pytorch().name, ours, 10, at_least=True),
            *narrow_requirements(adamw(backend, optim_bits=8).name),
        ]
    found += [Requirement(case, muon().name, torch_muon().name, 0.6) for case in ("124M", "1.5B")]
    return found


def narrow_requirements(ours: str) -> list[Requirement]:
    """Return what is required of ours with a state of 8 bits."""
    fused = torch_adamw("fused").name
    found = [
        Requirement("1.5B", ours, fused, 0.80, floor=True),
        Requirement("1.5B", ours, torch_adamw_narrow().name, 1.1, floor=True),
        Requirement("1.5B", ours, None, 0.88, at_least=True, quantity="of_copy"),
        Requirement("1.5B-bf16", ours, fused, 0.95, floor=True),
        Requirement("1.5B-bf16", ours, None, 0.88, at_least=True, quantity="of_copy"),
        Requirement("1000x1000", ours, fused, 0.6),
        Requirement("1000x16", ours, fused, 0.6),
    ]
    others = [each.name for each in lean_adamws()]
    return found + [
        Requirement(case, ours, other, 1.0) for case in ("1.5B", "1.5B-bf16") for other in others
    ]


def host_table(rows: list[Row]) -> str:
    """Return the table of what the host and the device do in a step."""
    headers = ["case", "optimizer", "host ms", "kernels", "copies", "graph replay ms", "failed"]
    lines = [
        [
            row["case"],
            row["optimizer"],
            shown(row.get("host_s"), 3, 1e-3),
            shown(row.get("launches")),
            shown(row.get("transfers")),
            shown(row.get("graph_s"), 3, 1e-3),
            (row.get("host_failed") or row.get("graph_failed") or "")[:60],
        ]
        for row in rows
        if row.keys() & {"host_s", "graph_s", "host_failed", "graph_failed"}
    ]
    return tables.table(headers, lines) if lines else ""


class Run:
    """The state of one run; leaving it as a context saves what it has found."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.began = time.monotonic()
        self.lock = threading.Lock()
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        self.log = chosen.out.with_suffix(".log").open("w")
        self.scratch = Path(tempfile.mkdtemp(prefix="mechanic-gpu-"))
        paths = [str(ROOT), *([str(chosen.packages.resolve())] if chosen.packages else [])]
        given = os.environ.get("PYTHONPATH")
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths + ([given] if given else []))}
        self.failed: list[str] = []
        self.record = Record(
            {
                **records.environment(chosen.commit, miniature=chosen.dry_run),
                "method": "A B A B … in one process, CUDA events around steps that follow one "
                "another; gradients change sign each round; copy counts bytes read + written",
            }
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        self.record.environment["seconds"] = round(time.monotonic() - self.began)
        self.record.save(self.chosen.out)
        self.log.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def left(self, reserve: float = 0.0) -> float:
        """Return the seconds left for this run, less a reserve."""
        return self.began + 60 * self.chosen.minutes - time.monotonic() - reserve

    def part(
        self,
        name: str,
        command: list[str],
        limit: float,
        fine: tuple[int, ...] = (0,),
        **variables: str,
    ) -> int | str:
        """Run a command and report it; return its exit status, or why it has none.

        Args:
            limit: seconds after which the command is killed.
            fine: the exit statuses that count as success.
            variables: additional environment variables.
        """
        began = time.monotonic()
        output = self.scratch / f"{name.replace(' ', '-')}.out"
        status: int | str = "no time left"
        if limit > 1:
            with output.open("w") as out:
                # A session of its own, so that its children can be killed with it.
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**self.env, **variables},
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
                try:
                    status = process.wait(limit)
                except subprocess.TimeoutExpired:
                    status = f"stopped after {limit:.0f} s"
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
        text = output.read_text(errors="replace") if output.exists() else ""
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        self.note(name, status in fine, f"{time.monotonic() - began:.1f} s, {status}: {last}")
        with self.lock:
            self.log.write(f"\n$ {' '.join(command)}\n{text}\nstatus: {status}\n")
            self.log.flush()
        return status

    def note(self, name: str, succeeded: bool, text: str) -> None:
        """Print how a part ended."""
        print(f"{'ok  ' if succeeded else 'FAIL'} {name}: {text[:200]}", flush=True)
        with self.lock:
            self.failed += [] if succeeded else [name]
            self.record.save(self.chosen.out)

    def child(self, part: str, name: str = "", limit: float = 60.0) -> None:
        """Run a part of parts.py and collect its rows, even if it failed."""
        out = self.scratch / f"{part}-{name}.jsonl"
        cpu = ["--cpu"] if self.chosen.dry_run else []
        names = [name] if name else []
        command = [sys.executable, "-m", "benchmarks.gpu.parts", part, *names, str(out), *cpu]
        self.part(f"{part} {name}".strip(), command, limit)
        for line in out.read_text().splitlines() if out.exists() else []:
            try:
                found = json.loads(line)
            except ValueError:
                break  # the child was killed while it wrote this line
            self.record.environment.update(found.get("environment", {}))
            self.record.rows += [found["row"]] if "row" in found else []
            if "host" in found:
                self.merge(found["host"])
        self.record.save(self.chosen.out)

    def merge(self, row: Row) -> None:
        """Add a row about the host, or its columns to the row that is already there."""
        for known in self.record.rows:
            same = (known["case"], known["optimizer"]) == (row["case"], row["optimizer"])
            if same and "dtype" not in known and not known.keys() & {"absent", "failed"}:
                return known.update(row)
        self.record.rows.append(row)
