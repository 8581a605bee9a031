"""Count what a reader must follow of one warm step: python tests/support/count_calls.py

Prints the sequence of Python calls of MechanicAdamW, and three figures of it beside those of
torch.optim.AdamW(fused=True): named calls, files, and changes of file along the sequence.
"""

import itertools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import mechanic_fused

PACKAGE = Path(mechanic_fused.__file__).parent
TORCH_OPTIM = Path(torch.optim.__file__).parent


class Call(NamedTuple):
    """A call of a Python function that has a name: not of a lambda or a comprehension."""

    file: str
    function: str


class Figures(NamedTuple):
    """What a reader must follow."""

    calls: int
    files: int
    changes_of_file: int


def calls_of(function, folder):
    """Call a function; return the calls made to named functions of the files in a folder."""
    found = []

    def note(frame, event, argument):
        code = frame.f_code
        if event != "call" or code.co_name.startswith("<"):
            return
        if code.co_filename.startswith(f"{folder}{os.sep}"):
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has the latter only
            found.append(Call(os.path.relpath(code.co_filename, folder), name))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


def figures(calls):
    files = [call.file for call in calls]
    changes = sum(a != b for a, b in itertools.pairwise(files))
    return Figures(len(calls), len(set(files)), changes)


def calls_of_warm_step(make, folder):
    """Return the calls of the fourth step of an optimizer over two weights, `make(params)`."""
    rng = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=rng)) for s in ((8, 8), (8,))]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = make(params)
    for _ in range(3):
        opt.step()
    return calls_of(opt.step, folder)


def of_ours():
    return calls_of_warm_step(
        lambda params: mechanic_fused.MechanicAdamW(params, lr=1.0, backend="cpp"), PACKAGE
    )


def of_torch():
    return calls_of_warm_step(lambda params: torch.optim.AdamW(params, fused=True), TORCH_OPTIM)


def main():
    ours = of_ours()
    for file, function in ours:
        print(f"{file:24} {function}")
    for name, calls in (("MechanicAdamW", ours), ("torch.optim.AdamW(fused=True)", of_torch())):
        found = figures(calls)
        print(f"{name}: {found.calls} calls, {found.files} files, {found.changes_of_file} changes")


if __name__ == "__main__":
    main()
