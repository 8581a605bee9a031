"""The demo as a user runs it: a few steps, Ctrl-C, going on, and clear words about mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[1]
STEPS, CUT = 16, 7
OPTIONS = ["--checkpoint=checkpoint", "--out=picture.png"]

# The demo, with Ctrl-C pressed in the middle of a step.
INTERRUPTED = f"""
import itertools, signal
import char_lm

calls, draw_batch = itertools.count(1), char_lm.random_batch
def random_batch(*arguments):
    if next(calls) == {CUT}:
        signal.raise_signal(signal.SIGINT)
    return draw_batch(*arguments)
char_lm.random_batch = random_batch
char_lm.main()
"""


def demo(folder: Path, program: list[str]) -> subprocess.Popen:
    """Start the demo in `folder`, with every warning an error."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-W", "error", *program, f"--steps={STEPS}", *OPTIONS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint/MechanicAdamW.pt", weights_only=True)


def assert_same(left: object, right: object) -> None:
    """Equal to the last bit, through dicts and lists."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        left, right = list(left.values()), list(right.values())
    if isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    else:
        assert left == right


def test_resumed_after_interrupt_equals_uninterrupted(tmp_path):
    script = [str(ROOT / "examples/char_lm.py")]
    with (
        demo(tmp_path / "whole", script) as whole,
        demo(tmp_path / "cut", ["-c", INTERRUPTED]) as cut,
    ):
        printed, errors = cut.communicate()
        assert cut.returncode == 130, errors
        assert "the same command goes on" in printed
        assert checkpoint(tmp_path / "cut")["step"] == CUT

        printed, errors = whole.communicate()
        assert whole.returncode == 0, errors
        assert "validation loss" in printed and "The model writes" in printed
        assert (tmp_path / "whole/picture.png").stat().st_size > 0

    with demo(tmp_path / "cut", script) as rest:
        printed, errors = rest.communicate()
    assert rest.returncode == 0, errors
    assert f"going on after step {CUT}" in printed
    assert_same(checkpoint(tmp_path / "cut"), checkpoint(tmp_path / "whole"))


@pytest.fixture
def char_lm(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import char_lm

    return char_lm


def test_checkpoint_of_other_settings_is_refused(char_lm, tmp_path):
    text = char_lm.load_text()
    char_lm.Run(text, steps=2, seed=0).save(tmp_path / "run.pt")
    with pytest.raises(SystemExit, match="written with seed = 0, this run has 1"):
        char_lm.Run(text, steps=2, seed=1).load(tmp_path / "run.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_file_that_is_no_checkpoint_is_refused(char_lm, tmp_path, content):
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(SystemExit, match="no checkpoint of this example"):
        char_lm.Run(char_lm.load_text(), steps=2, seed=0).load(tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps=0"], "--steps must be 1 or more, got 0"),
        (["--out=picture.txt"], "--out must end in"),
        (["--checkpoint=file"], "cannot write in the folder file"),
    ],
)
def test_bad_options_are_refused(char_lm, monkeypatch, tmp_path, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["char_lm.py", *options])
    with pytest.raises(SystemExit) as refusal:
        char_lm.parse_arguments()
    assert words in f"{refusal.value} {capsys.readouterr().err}"


def test_validation_text_is_not_in_the_training_text(char_lm):
    text = char_lm.load_text()
    training = set(text.decode(text.train.tolist()).split("\n\n"))
    validation = text.decode(text.validation.tolist()).split("\n\n")
    assert not training & set(validation[1:])  # the first was cut by the split
