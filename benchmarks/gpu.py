"""What a GPU shows, in one command: builds, tests, compute-sanitizer, then step times.

    python -m benchmarks.gpu [--packages DIR] [--out DIR] [--minutes 8.75] [--parts build,…]

Each part is a process of its own with a time limit, and gpu.json is written anew after each.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import cases, picture, records, tables
from .gpu_run import Run
from .records import ROOT

RESERVED = 230.0
"""Seconds kept for the benchmarks: tests that take longer are cut short."""

COMPILED = ("124M", "124M-bf16", "1.5B", "1.5B-bf16")
SANITIZERS = [(tool, name) for tool in ("memcheck", "racecheck") for name in ("cuda", "triton")]


def reserved(run: Run) -> float:
    return RESERVED if "bench" in run.chosen.parts else 0.0


def build(run: Run) -> None:
    """Build in place, and make sure that the Triton half can be imported from here."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = run.part("build", command, run.left(reserved(run)))
    built = ROOT / "mechanic_fused" / "_build.txt"
    note = built.read_text().strip() if built.exists() else "no word of how it was built"
    run.record["conditions"]["extension"] = note
    well = status == 0 and (", with CUDA" in note or run.chosen.dry_run)
    run.note("build with CUDA", well, 0, 0, note)
    if importable(run, (0, 1)):
        return
    install = ["install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    limit = min(120, run.left(reserved(run)))
    run.part("install", [sys.executable, "-m", "pip", *install], limit, (0, 1))
    if not importable(run, (0, 1)):
        run.env.update(PYTHONSAFEPATH="1", PYTHONPATH=overlay(run))
        importable(run, (0,))


def importable(run: Run, fine: tuple[int, ...]) -> bool:
    command = [sys.executable, "-c", "import mechanic_fused.triton_kernels"]
    return run.part("import of the Triton kernels", command, 60, fine) == 0


def overlay(run: Run) -> str:
    """Lay the package out as setup.py would install it, in links; return the path to it."""
    package = run.scratch / "overlay" / "mechanic_fused"
    package.mkdir(parents=True)
    for path in [*(ROOT / "mechanic_fused").iterdir(), ROOT / "triton_kernels"]:
        (package / path.name).symlink_to(path)
    return os.pathsep.join([str(package.parent), run.env["PYTHONPATH"]])


def tests(run: Run) -> None:
    """The tests that need a GPU, and beside them the tests that need none."""
    # Warnings are no errors here: the versions are not the ones that the tests are pinned to.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default"]
    # Where pytest-benchmark is installed it warns of xdist, and no test here uses it.
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "minversion=0"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, (os.cpu_count() or 2) // 3))]
    if run.chosen.dry_run:
        command += ["--collect-only"]
    no_test = 5
    well = (0, no_test) if run.chosen.dry_run else (0,)
    # Many processes on few cores, each of them with spinning threads, would slow each other down.
    few = {"OMP_NUM_THREADS": "2"}

    def on_gpu() -> None:
        run.part("tests gpu", [*command, "-m", "gpu"], run.left(reserved(run)), well, **few)

    with ThreadPoolExecutor() as pool:
        lane = pool.submit(on_gpu)
        command_cpu = [*command, "-m", "not gpu and not slow"]
        run.part("tests cpu", command_cpu, run.left(reserved(run)), **few)
    lane.result()


def sanitize(run: Run) -> None:
    """Memcheck and racecheck over a few small steps of both backends."""
    places = [
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
        "/usr/local/cuda/compute-sanitizer",
    ]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if found is None:
        return run.note("sanitizer", run.chosen.dry_run, 0, "absent", "no compute-sanitizer here")
    for tool, backend in SANITIZERS:
        options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        # Python may take longer to reach the GPU than the 10 s that the sanitizer waits for it.
        options += ["--target-processes", "application-only", "--launch-timeout", "60"]
        part = [sys.executable, "-m", "benchmarks.gpu_parts", "sanitize", backend, os.devnull]
        # Without torch's cache an access beyond a tensor is one beyond what was allocated.
        bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        limit = min(60, run.left(reserved(run)))
        run.part(f"{tool} {backend}", [found, *options, *part], limit, **bare)


def bench(run: Run) -> None:
    """The step times; what a requirement names first, what must be compiled last."""
    run.child("machine", limit=min(180, run.left()))
    for case in cases.GPU:
        if case.name in run.chosen.cases:
            run.child("case", case.name, limit=min(100, run.left()))
    for name in COMPILED:
        if name in run.chosen.cases:
            run.child("compiled", name, limit=min(120, run.left()))


PARTS = {"build": build, "tests": tests, "sanitize": sanitize, "bench": bench}


def options(arguments: list[str] | None) -> argparse.Namespace:
    names = [case.name for case in cases.GPU]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--packages", type=Path, help="a folder with mechanic_pytorch and others")
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    parser.add_argument("--minutes", type=float, default=8.75, help="for everything")
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas between")
    parser.add_argument("--cases", default=",".join(names), help="names with commas between")
    parser.add_argument("--commit", help="for a tree without its history")
    parser.add_argument("--dry-run", action="store_true", help="miniatures on the processor")
    chosen = parser.parse_args(arguments)
    for option, known in (("parts", PARTS), ("cases", names)):
        given = getattr(chosen, option).split(",")
        if set(given) - set(known):
            parser.error(f"--{option} must be among {', '.join(known)}, got {', '.join(given)}")
        setattr(chosen, option, given)
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    run = Run(chosen)
    began = time.monotonic()
    try:
        for name, part in PARTS.items():
            if name in chosen.parts:
                part(run)
    finally:
        run.record["conditions"]["seconds"] = round(time.monotonic() - began)
        run.save()
        run.log.close()
        shutil.rmtree(run.scratch, ignore_errors=True)
    print(tables.report(run.record), flush=True)
    print(f"Written to {run.out / 'gpu.json'}; {picture.draw(run.record, run.out / 'gpu.png')}")
    return 0 if all(part["well"] for part in run.record["parts"]) else 1


if __name__ == "__main__":
    sys.exit(main())
