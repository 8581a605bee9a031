"""What ranks run in the tests of examples/fsdp2.py."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch


def train(folder, steps, every):
    """Train as the example does, with little text to validate on; return what it prints."""
    examples = str(Path(__file__).resolve().parents[2] / "examples")
    if examples not in sys.path:
        sys.path.insert(0, examples)
    import char_model
    import fsdp2

    text = char_model.load_text()
    fsdp2.load_text = lambda: text._replace(validation=text.validation[:1000])
    arguments = Namespace(steps=steps, every=every, checkpoint=Path(folder))
    with redirect_stdout(StringIO()) as printed:
        fsdp2.train(arguments, torch.device("cpu"))
    return printed.getvalue().splitlines()
