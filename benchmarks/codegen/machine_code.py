"""What cuobjdump says of compiled kernels: registers, memory, widths of their accesses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Code(NamedTuple):
    """A kernel's machine code in numbers."""

    registers: int  # a thread
    stack: int  # bytes of spills and local arrays a thread
    local: int  # bytes of local memory a thread
    shared: int  # bytes a block
    loads: int  # of 128 bits from global memory
    stores: int
    local_accesses: int


def cuobjdump() -> Path | None:
    """Return the tool that comes with nvcc, or else with triton, or None.

    It must have nvdisasm beside it, which it calls.
    """
    found = shutil.which("cuobjdump")
    places = [Path(found)] if found else []
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((p for p in places if p.exists() and p.with_name("nvdisasm").exists()), None)


def read(path: Path, architecture: int) -> dict[str, Code]:
    """Return the kernels of a cubin, or of a library's part for an architecture, by mangled name.

    Raises:
        FileNotFoundError: where there is no cuobjdump.
    """
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump is not installed: it comes with nvcc and with triton")
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}

    def printed(what: str) -> str:
        command = [str(tool), what, "-arch", f"sm_{architecture}", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout

    usage = dict(re.findall(r"Function (\S+):\s+(REG:.*)", printed("-res-usage")))
    texts = {}
    for text in printed("-sass").split("Function : ")[1:]:
        name, _, body = text.partition("\n")
        texts[name.strip()] = body
    return {name: parse(line, texts[name]) for name, line in usage.items()}


def parse(usage: str, sass: str) -> Code:
    """Return a kernel's numbers from its line of -res-usage and its text of -sass."""
    numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    wide = re.findall(r"\b(LDG|STG)\.E\S*\.128\b", sass)
    return Code(
        registers=numbers["REG"],
        stack=numbers["STACK"],
        local=numbers["LOCAL"],
        shared=numbers["SHARED"],
        loads=wide.count("LDG"),
        stores=wide.count("STG"),
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
    )
