"""What ranks run in the tests of benchmarks.distributed."""

import sys
from pathlib import Path


def measure(case, layout):
    """Return the rows of a miniature."""
    root = str(Path(__file__).resolve().parents[2])
    if root not in sys.path:
        sys.path.insert(0, root)
    from benchmarks import distributed

    return distributed.measure(distributed.CASES[case].shrunk(), layout, rounds=3)
