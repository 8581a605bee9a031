"""All GPU checks in one command: build, tests, compute-sanitizer, then step times.

    python -m benchmarks.gpu [--packages DIR] [--out FILE] [--minutes 8.75] [--parts build,…]

Each part is a process with a time limit. After each, the rows so far are written to --out; its
output goes to a log beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .._harness import cases, options, tables
from .._harness.records import ROOT, Record
from .run import Run, host_table, requirements

RESERVED = 230.0
"""Seconds kept for the benchmarks: tests that take longer are cut short."""

COMPILED = ("124M", "124M-bf16", "1.5B", "1.5B-bf16")
SANITIZERS = [(tool, name) for tool in ("memcheck", "racecheck") for name in ("cuda", "triton")]


def time_left(run: Run) -> float:
    """Return the seconds left for a part that comes before the benchmarks."""
    return run.left(RESERVED if "bench" in run.chosen.parts else 0.0)


def build(run: Run) -> None:
    """Build in place, and make sure that the Triton kernels can be imported."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = run.part("build", command, time_left(run))
    built = ROOT / "mechanic_fused" / "_build.txt"
    note = built.read_text().strip() if built.exists() else "unknown build"
    run.record.environment["extension"] = note
    run.note("build with CUDA", status == 0 and (", with CUDA" in note or run.chosen.dry_run), note)
    if importable(run, (0, 1)):
        return
    install = ["install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    run.part(
        "install", [sys.executable, "-m", "pip", *install], min(120, time_left(run)), fine=(0, 1)
    )
    if not importable(run, (0, 1)):
        run.env.update(PYTHONSAFEPATH="1", PYTHONPATH=overlay(run))
        importable(run, (0,))


def importable(run: Run, fine: tuple[int, ...]) -> bool:
    command = [sys.executable, "-c", "import mechanic_fused.triton_kernels"]
    return run.part("import of the Triton kernels", command, 60, fine) == 0


def overlay(run: Run) -> str:
    """Lay out the package as installed, with links; return the import path for it."""
    package = run.scratch / "overlay" / "mechanic_fused"
    package.mkdir(parents=True)
    for path in [*(ROOT / "mechanic_fused").iterdir(), ROOT / "triton_kernels"]:
        (package / path.name).symlink_to(path)
    return os.pathsep.join([str(package.parent), run.env["PYTHONPATH"]])


def tests(run: Run) -> None:
    """Run the tests that need a GPU, and at the same time those that do not."""
    # Warnings are not errors here: the versions differ from those the tests are pinned to.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default"]
    # pytest-benchmark, where it is installed, warns of xdist, and no test uses it.
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "minversion=0"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, (os.cpu_count() or 2) // 3))]
    if run.chosen.dry_run:
        command += ["--collect-only"]
    no_test_collected = 5
    fine = (0, no_test_collected) if run.chosen.dry_run else (0,)

    def marked(name: str, marks: str) -> None:
        # Many processes of spinning threads on few cores would slow each other down.
        run.part(name, [*command, "-m", marks], time_left(run), fine, OMP_NUM_THREADS="2")

    with ThreadPoolExecutor() as pool:
        on_gpu = pool.submit(marked, "tests gpu", "gpu")
        marked("tests cpu", "not gpu and not slow")
    on_gpu.result()


def sanitize(run: Run) -> None:
    """Run memcheck and racecheck over a few small steps of both backends."""
    places = [
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
        "/usr/local/cuda/compute-sanitizer",
    ]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if found is None:
        return run.note("sanitizer", run.chosen.dry_run, "compute-sanitizer is not installed")
    for tool, backend in SANITIZERS:
        switches = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        # Python may take longer to reach the GPU than the 10 s that the sanitizer waits.
        switches += ["--target-processes", "application-only", "--launch-timeout", "60"]
        part = [sys.executable, "-m", "benchmarks.gpu.parts", "sanitize", backend, os.devnull]
        # With torch's cache an access beyond a tensor could stay within an allocation.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        limit = min(60, time_left(run))
        run.part(f"{tool} {backend}", [found, *switches, *part], limit, **uncached)


def bench(run: Run) -> None:
    """Measure step times: cases with a requirement first, compiled steps last."""
    run.child("machine", limit=min(180, run.left()))
    for case in cases.GPU:
        if case.name in run.chosen.cases:
            run.child("case", case.name, limit=min(100, run.left()))
    for name in COMPILED:
        if name in run.chosen.cases:
            run.child("compiled", name, limit=min(120, run.left()))


PARTS = {"build": build, "tests": tests, "sanitize": sanitize, "bench": bench}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [case.name for case in cases.GPU]
    parser = options.parser("gpu", __doc__, "gpu.csv")
    parser.add_argument("--packages", type=Path, help="a folder with mechanic_pytorch and others")
    parser.add_argument("--minutes", type=float, default=8.75, help="for everything")
    parser.add_argument("--parts", type=options.names_among(PARTS), default=list(PARTS))
    parser.add_argument("--cases", type=options.names_among(names), default=names)
    parser.add_argument("--commit", help="for a source tree without git history")
    parser.add_argument("--dry-run", action="store_true", help="miniatures on the CPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    failed = []
    if chosen.report:
        record = Record.load(chosen.out)
    else:
        with Run(chosen) as run:
            for name, part in PARTS.items():
                if name in chosen.parts:
                    part(run)
        record, failed = run.record, run.failed
    backends = ("cpp", "reference") if chosen.dry_run else ("cuda", "triton")
    print(tables.report(record, requirements(backends), host_table(record.rows)), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
