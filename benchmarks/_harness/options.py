"""Command-line options that several benchmarks have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .records import RESULTS


def parser(module: str, explained: str | None, result: str = "") -> argparse.ArgumentParser:
    """Return a parser; where the program has a ``result``, with options for that file."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=explained,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if result:
        made.add_argument("--out", type=Path, default=RESULTS / result, help="default: %(default)s")
        made.add_argument("--report", action="store_true", help="only print what --out holds")
    return made


def at_least(smallest: int) -> Callable[[str], int]:
    """Return the type of an integer option with a lower bound."""

    def number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be {smallest} or more, got {value}")
        return value

    return number


def device(text: str) -> torch.device:
    """Return the device of an option: cpu, or cuda where torch finds a GPU."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no GPU, got cuda")
    return torch.device(text)


def names_among(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return the type of an option with names separated by commas."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"must be among {', '.join(known)}, got {', '.join(unknown)}"
            )
        return chosen

    return names
