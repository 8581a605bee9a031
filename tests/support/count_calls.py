"""Count the Python calls of one warm step: how many functions and files a reader walks through.

``python tests/support/count_calls.py`` prints the calls of MechanicAdamW in order, and its figures
beside those of torch's fused AdamW.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any, NamedTuple

import torch

import mechanic_fused
from mechanic_fused import MechanicAdamW

PACKAGE = os.path.dirname(mechanic_fused.__file__)
TORCH_OPTIM = os.path.dirname(torch.optim.__file__)


class Calls(NamedTuple):
    """The named calls of a step: (file, function) in the order in which they are entered."""

    sequence: list[tuple[str, str]]

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.sequence}

    @property
    def changes_of_file(self) -> int:
        pairs = zip(self.sequence, self.sequence[1:], strict=False)
        return sum(before[0] != after[0] for before, after in pairs)

    def __str__(self) -> str:
        return (
            f"{len(self.sequence)} named calls, {len(self.files)} files, "
            f"{self.changes_of_file} changes of file"
        )


def warm_step_calls(make: Any, folder: str) -> Calls:
    """Return the calls into ``folder`` of a warm step over two weights.

    Comprehensions and lambdas, whose names begin with "<", are part of the function around them.

    Args:
        make: parameters → optimizer.
        folder: files outside of it are not counted.
    """
    weights = [torch.nn.Parameter(torch.randn(8, 8)), torch.nn.Parameter(torch.randn(8))]
    opt = make(weights)
    for _ in range(3):
        for w in weights:
            w.grad = torch.randn_like(w)
        opt.step()
    sequence: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folder) and code.co_name[0] != "<":
            sequence.append((os.path.relpath(code.co_filename, folder), code.co_name))

    sys.setprofile(note)
    try:
        opt.step()
    finally:
        sys.setprofile(None)
    return Calls(sequence)


if __name__ == "__main__":
    ours = warm_step_calls(lambda weights: MechanicAdamW(weights, lr=1.0), PACKAGE)
    for file, function in ours.sequence:
        print(f"{file:20} {function}")
    print(f"MechanicAdamW: {ours}")
    theirs = warm_step_calls(lambda weights: torch.optim.AdamW(weights, fused=True), TORCH_OPTIM)
    print(f"torch.optim.AdamW(fused=True): {theirs}")
