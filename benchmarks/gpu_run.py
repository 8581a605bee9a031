"""A run of ``python -m benchmarks.gpu``: the time that is left, its processes, what they found."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from . import records
from .contenders import adamw, mechanic_pytorch, torch_adamw
from .records import ROOT, Row
from .tables import Must


def requirements(names: tuple[str, ...]) -> list[Must]:
    """Return what is required of each of our backends."""
    fused, found = torch_adamw("fused").name, []
    for ours in (adamw(name).name for name in names):
        found += [
            Must("1.5B", ours, None, 0.85, at_least=True, quantity="of_copy"),
            Must("1.5B", ours, fused, 1.60, floor=True),
            Must("1000x1000", ours, fused, 1.0),
            Must("1000x1000", ours, None, 3, quantity="launches"),
            Must("124M", mechanic_pytorch().name, ours, 10, at_least=True),
        ]
    return found


class Run:
    """The state of one run: what is left of the time, where things go, what has been found."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.end = time.monotonic() + 60 * chosen.minutes
        self.out: Path = chosen.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.log = (self.out / "gpu.log").open("w")
        self.scratch = Path(tempfile.mkdtemp(prefix="mechanic-gpu-"))
        paths = [str(ROOT), *([str(chosen.packages.resolve())] if chosen.packages else [])]
        given = os.environ.get("PYTHONPATH")
        self.env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths + ([given] if given else []))}
        self.record: Row = {
            "conditions": {
                **records.conditions(chosen.commit),
                "method": "A B A B … in one process, CUDA events around steps that follow one "
                "another; gradients change sign each round; copy counts bytes read + written",
            },
            "quick": chosen.dry_run,
            "parts": [],
            "rows": [],
            "facts": [],
            "required": [],
        }

    def left(self, reserve: float = 0.0) -> float:
        return self.end - time.monotonic() - reserve

    def part(
        self,
        name: str,
        command: list[str],
        limit: float,
        fine: tuple[int, ...] = (0,),
        **variables: str,
    ) -> int | str:
        """Run a command, note how it went, and return its exit status, or why it has none.

        Args:
            limit: seconds, after which it is stopped.
            fine: the exit statuses that mean well.
            variables: more of its environment.
        """
        began = time.monotonic()
        output = self.scratch / f"{name.replace(' ', '-')}.out"
        code: int | str = "no time left"
        if limit > 1:
            with output.open("w") as out:
                # A session of its own, so that what the command has started ends with it.
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**self.env, **variables},
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
                try:
                    code = process.wait(limit)
                except subprocess.TimeoutExpired:
                    code = f"stopped after {limit:.0f} s"
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
        text = output.read_text(errors="replace") if output.exists() else ""
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        self.note(name, code in fine, time.monotonic() - began, code, last)
        with self.lock:
            self.log.write(f"\n$ {' '.join(command)}\n{text}\nstatus: {code}\n")
            self.log.flush()
        return code

    def note(self, name: str, well: bool, seconds: float, status: int | str, last: str) -> None:
        part = {"part": name, "well": well, "seconds": round(seconds, 1), "status": status}
        print(f"{'ok  ' if well else 'FAIL'} {seconds:6.1f} s  {name}: {last[-160:]}", flush=True)
        with self.lock:
            self.record["parts"].append({**part, "last_line": last[-300:]})
            self.save()

    def save(self) -> None:
        judged = not self.chosen.dry_run
        found = self.record["rows"] + self.record["facts"]
        self.record["required"] = [must.judge(found, judged) for must in self.musts()]
        records.write(self.out / "gpu.json", self.record)

    def musts(self) -> list[Must]:
        return requirements(("cpp", "reference") if self.chosen.dry_run else ("cuda", "triton"))

    def child(self, part: str, name: str = "", limit: float = 60.0) -> None:
        """Run a part of gpu_parts.py and take in its rows, also if it ended badly."""
        rows = self.scratch / f"{part}-{name}.jsonl"
        cpu = ["--cpu"] if self.chosen.dry_run else []
        names = [name] if name else []
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part, *names, str(rows), *cpu]
        self.part(f"{part} {name}".strip(), command, limit)
        for line in rows.read_text().splitlines() if rows.exists() else []:
            try:
                found = json.loads(line)
            except ValueError:
                break  # the child was stopped in the middle of a line
            self.record["conditions"].update(found.get("conditions", {}))
            self.record["rows"] += [found["row"]] if "row" in found else []
            if "fact" in found:
                self.merge(found["fact"])
        self.save()

    def merge(self, fact: Row) -> None:
        for known in self.record["facts"]:
            if (known["case"], known["optimizer"]) == (fact["case"], fact["optimizer"]):
                return known.update(fact)
        self.record["facts"].append(fact)
