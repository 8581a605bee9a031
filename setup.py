"""Builds mechanic_fused._native as far as this machine can; all else is in pyproject.toml."""

import os
import re
import shlex
import subprocess
from glob import glob
from pathlib import Path
from shutil import which
from sysconfig import get_config_var, get_path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


def visible_gpus():
    """Returns the compute capabilities of the GPUs here; "" stands for one that is unknown."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout if which(query[0]) else ""
    return re.findall(r"^\d+\.\d+$", answer, re.M) or [""] * os.path.exists("/dev/nvidia0")


def find_nvcc():
    """Returns the CUDA compiler, or None and why CUDA is left out."""
    choice = os.environ.get("MECHANIC_CUDA")
    if choice == "0":
        return None, "MECHANIC_CUDA=0"
    if choice != "1" and not visible_gpus():
        return None, "no GPU is visible; MECHANIC_CUDA=1 compiles it"
    nvcc = which("nvcc") or which(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc")
    return nvcc, f"{nvcc} failed" if nvcc else "no nvcc on PATH or in CUDA_HOME"


def gencode(nvcc):
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    default = "8.0;9.0;10.0+PTX" if "compute_100" in known else "8.0;9.0+PTX"
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(sorted(set(visible_gpus())))
    for arch in (wanted or default).replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        for kind in ("sm", "compute") if arch.endswith("+PTX") else ("sm",):
            yield f"-gencode=arch=compute_{number},code={kind}_{number}"


def run_ninja(module, cxx, nvcc=None):
    """Compiles in parallel what has changed, as csrc/rules.ninja says; True if all went well."""
    out = Path("build", "native" + get_config_var("EXT_SUFFIX"))  # one folder a Python
    headers = shlex.join(["-isystem", pybind11.get_include(), "-isystem", get_path("include")])
    lines = [f"builddir = {out}", f"cxx = {cxx}", f"headers = {headers}"]
    sources, define = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))], ""
    if nvcc:
        sources += sorted(glob("csrc/cuda/*.cu"))
        lines += [f"nvcc = {nvcc}", f"gencode = {' '.join(gencode(nvcc))}"]
        define = "\n  define = -DMECHANIC_CUDA"
    lines += ["include csrc/rules.ninja"]
    lines += [f"build {out}/{s}.o: {s.rpartition('.')[2]} {s}" for s in sources]
    lines[-len(sources)] += define  # of the bindings, the one source that CUDA changes
    objects = " ".join(f"{out}/{s}.o" for s in sources)
    lines += [f"build {module}: {'link_cuda' if nvcc else 'link'} {objects}"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = which("ninja", path=get_path("scripts")) or which("ninja")  # .venv is not activated
    return subprocess.call([ninja, "-f", out / "build.ninja"]) == 0


def build(module):
    """Returns a line on what was built; OSError names the compiler or header that is missing."""
    cxx = os.environ.get("CXX") or "c++"
    version = subprocess.check_output([*shlex.split(cxx), "--version"], text=True).splitlines()[0]
    os.stat(f"{get_path('include')}/Python.h")
    nvcc, why_not = find_nvcc()
    if nvcc and run_ninja(module, cxx, nvcc):
        return f"built by {version}, with CUDA by {nvcc}"
    if os.environ.get("MECHANIC_CUDA") == "1":
        raise SystemExit(f"MECHANIC_CUDA=1, but {why_not}")  # asked for, so nothing less will do
    if run_ninja(module, cxx):
        return f"built by {version}, without CUDA: {why_not}"
    raise RuntimeError(f"{version} does not compile csrc")


class BuildNative(build_ext):
    def run(self):
        module = Path(os.path.relpath(self.get_ext_fullpath("mechanic_fused._native")))
        try:
            note = build(module)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as why:
            if self.inplace and isinstance(why, RuntimeError):
                raise SystemExit(why) from None  # a fault stops its authors, not an install
            module.unlink(missing_ok=True)
            note = f"not built: {why}"
        # pip hides what is printed here, and `python -m mechanic_fused` reads the file.
        module.with_name("_build.txt").write_text(f"{note}\n")
        print(f"mechanic_fused._native: {note}")


kernels = find_packages(include=["triton_kernels*"])
setup(
    packages=find_packages(include=["mechanic_fused*"]) + [f"mechanic_fused.{p}" for p in kernels],
    package_dir={"mechanic_fused.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("mechanic_fused._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
