"""The machine code of the CPU kernels: packed arithmetic in every clone, no fused a·b + c."""

import importlib
import platform
import re
import shutil
import subprocess
from collections import defaultdict

import pytest
from support.cases import skip_unless_available

# Clone → its registers; gcc before 12 calls the first avx512f. Beside 16-bit numbers it takes the
# half of AVX-512's. The default clone is what every processor has: nothing to look for.
REGISTERS = {"arch_x86_64_v4": "[yz]mm", "avx2": "ymm"}
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
OPS = ("apply", "norm", "step_along", "axpby", "difference_dots", "dots", "adarem")
"""Beside accumulate. ``abs_max`` has no arithmetic to look for."""
KERNEL = re.compile(
    rf"mechanic::cpu::(accumulate_chunk<mechanic::(\w+), .*>|(?:{'|'.join(OPS)})_chunk<.*>)"
    r"\(.* \[clone \.(\w+)\]"
)
# Packed: …ps or …pd, never …ss or …sd.
PACKED = {
    "multiplication": r"vmulp[sd]\b.*%{register}",
    "addition": r"v(add|sub)p[sd]\b.*%{register}",
    "load or store": r"vmov[a-z0-9]+ .*\(.*%{register}|vmov[a-z0-9]+ .*%{register}.*\(",
}
ADAMS = {"root": r"vsqrtp[sd]\b.*%{register}", "division": r"vdivp[sd]\b.*%{register}"}
FUSED = re.compile(r"vf(n?)m(add|sub)")
BASES = ("Sgd", "Momentum", "Adam", "Lion")
WEIGHTS = ("float", "double", "mechanic::BFloat16", "mechanic::Half")


def states_of(base, weight):
    """Return the types of the base's state beside weights."""
    if weight == "double":
        return {"double"}
    if base == "Sgd":
        return {"float"}
    return {weight, "float", "mechanic::BFloat16", "mechanic::Code"}


@pytest.fixture(scope="module")
def kernels():
    """(kernel, base or "", clone) → its instructions."""
    skip_unless_available("cpp")
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("clones are made for x86-64 Linux alone")
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed (binutils)")
    path = importlib.import_module("mechanic_fused._native").__file__
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, current = defaultdict(list), None
    for line in text.splitlines():
        if header := FUNCTION.match(line):
            kernel = KERNEL.search(header[1])
            current = found[kernel[1], kernel[2] or "", kernel[3]] if kernel else None
        elif current is not None:
            current.append(line)
    return {key: "\n".join(lines) for key, lines in found.items() if key[2] != "resolver"}


def test_every_kernel_has_every_clone(kernels):
    clones = defaultdict(set)
    for name, _, clone in kernels:
        clones[name].add(clone)
    assert all(found == {*REGISTERS, "default"} for found in clones.values())
    for base in BASES:
        for reads_x in ("true", "false"):
            for weight in WEIGHTS:
                for state in states_of(base, weight):
                    key = f"accumulate_chunk<mechanic::{base}, {reads_x}, {weight}, {state}>"
                    assert clones.pop(key, None), key
    for weight in WEIGHTS:
        wide = "double" if weight == "double" else "float"
        for delta in [wide, *["mechanic::Code"] * (wide == "float")]:
            key = f"apply_chunk<{weight}, {delta}>"
            assert clones.pop(key, None), key
    others = [op for op in OPS if op != "apply"]
    assert clones.keys() == {f"{op}_chunk<{weight}>" for op in others for weight in WEIGHTS}


@pytest.mark.parametrize("clone", REGISTERS)
def test_arithmetic_is_packed(kernels, clone):
    lacking = []
    for (name, base, own_clone), code in kernels.items():
        if own_clone == clone:
            patterns = {**PACKED, **(ADAMS if base == "Adam" else {})}
            for what, pattern in patterns.items():
                if not re.search(pattern.replace("{register}", REGISTERS[clone]), code):
                    lacking.append((name, what))
    assert not lacking


def test_float_and_double_take_the_widest_registers(kernels):
    lacking = []
    for (name, _, clone), code in kernels.items():
        has_16_bits = "mechanic::Half" in name or "BFloat16" in name
        widest = PACKED["multiplication"].replace("{register}", "zmm")
        if clone == "arch_x86_64_v4" and not has_16_bits and not re.search(widest, code):
            lacking.append(name)
    assert not lacking


def test_no_product_is_fused_with_a_sum(kernels):
    """Each rounds alone, so that every clone and every backend gives the same bits."""
    assert kernels
    assert not [key for key, code in kernels.items() if FUSED.search(code)]
