"""The machine code of the CUDA backend, as far as it can be judged without a GPU."""

import importlib
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import skip_unless_available

TOOL = "triton/backends/nvidia/bin/cuobjdump"


@pytest.fixture(scope="module")
def disassembler():
    """cuobjdump with the path of the compiled module."""
    skip_unless_available("cuda")
    native = importlib.import_module("mechanic_fused._native")
    beside_torch = Path(torch.__file__).parent.parent / TOOL
    tool = shutil.which("cuobjdump") or (beside_torch.exists() and str(beside_torch))
    if not tool:
        pytest.skip("cuobjdump is not installed (it comes with nvcc and with triton)")

    def run(*options):
        # It looks for nvdisasm on the path.
        path = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}
        done = subprocess.run([tool, *options, native.__file__], capture_output=True, env=path)
        return done.stdout.decode()

    return run


def bound(name):
    """Registers that leave room for the blocks which accumulate.cuh counts on."""
    return 80 if "4AdamE" in name and "4AdamEff" not in name else 64


def test_registers_and_no_spills(disassembler):
    usage = disassembler("-res-usage")
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert sum("accumulate_kernel" in name for name, *_ in found) >= 22
    for name, registers, stack, local in found:
        assert (stack, local) == ("0", "0"), name
        assert int(registers) <= bound(name), name


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_main_path_moves_16_bytes_at_a_time(disassembler, arch):
    """Every stream of float32 and bfloat16 weights; Δ and wide state beside bfloat16 take two."""
    sass = disassembler("-sass", "-arch", arch)
    if not sass:
        pytest.skip(f"not built for {arch}")
    widths = {}
    for text in sass.split("Function : ")[1:]:
        moves = re.findall(r"\b(LDG|STG)\.E(?:\.\w+)*?\.(?:\w+\.)*?128\b", text)
        widths[text.split("\n", 1)[0].strip()] = Counter(moves)
        assert not re.search(r"\b(LDL|STL)\b", text)
    bfloat16 = "NS_8BFloat16E"
    expected = {
        "4AdamEffE": (5, 3),  # g, Δ, m, v, x; Δ, m, v
        "3SgdEffE": (3, 1),
        "4LionEffE": (4, 2),
        f"4AdamE{bfloat16}fE": (8, 6),
        f"4AdamE{bfloat16}S3_E": (6, 4),
        "apply_kernelILb1EfE": (2, 1),
        "apply_kernelILb1ENS_8BFloat16EE": (3, 1),
        "apply_kernelILb0EfE": (2, 0),
        "norm_kernelIfE": (1, 0),
        "norm_kernelINS_8BFloat16EE": (1, 0),
    }
    for part, (loads, stores) in expected.items():
        name = next(name for name in widths if part in name)
        assert widths[name] == Counter({"LDG": loads, "STG": stores}), name


def test_an_error_names_the_verb_and_the_call():
    skip_unless_available("cuda")
    native = importlib.import_module("mechanic_fused._native")
    too_many = dict.fromkeys(("tensors", "chunks", "hyper", "partials", "sums"), 0)
    too_many |= dict.fromkeys(("tensor_count", "scale_count", "elements", "kind"), 0)
    bucket = native.Bucket(**too_many, chunk_count=1 << 31, weight=0, state=0)
    folding = native.cuda.Folding(spans=0, tickets=0)
    scaler = native.cuda.Scaler(grad_scale=0, found_inf=0)
    with pytest.raises(RuntimeError, match="mechanic_fused accumulate: cudaLaunchKernel: "):
        native.cuda.accumulate(bucket, folding, scaler, 0)
