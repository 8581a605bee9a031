"""The demo: a few steps, Ctrl-C, resuming, and clear messages about mistakes."""

import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).resolve().parents[2]
STEPS, CUT = 9, 4
OPTIONS = [f"--steps={STEPS}", "--checkpoint=checkpoint", "--out=picture.png", "--threads=1"]


@pytest.fixture
def char_lm(monkeypatch, short_text):
    """The demo with little text to validate on."""
    import char_lm

    monkeypatch.setattr(char_lm, "load_text", lambda: short_text)
    handler = signal.getsignal(signal.SIGINT)
    yield char_lm
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """folders("whole") makes a folder and works there from then on."""

    def enter(name):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)

    return enter


def checkpoint() -> dict:
    return torch.load("checkpoint/MechanicAdamW.pt", weights_only=True)


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


def test_resumed_after_interrupt_equals_uninterrupted(char_lm, run_example, monkeypatch, folders):
    folders("whole")
    printed = run_example(char_lm, *OPTIONS)
    assert "validation loss" in printed and "The model writes" in printed
    assert Path("picture.png").stat().st_size > 0
    whole = checkpoint()

    calls, draw_batch = count(1), char_lm.random_batch

    def interrupted(*arguments):
        """Press Ctrl-C in the middle of a step."""
        if next(calls) == CUT:
            signal.raise_signal(signal.SIGINT)
        return draw_batch(*arguments)

    folders("cut")
    with monkeypatch.context() as patch:
        patch.setattr(char_lm, "random_batch", interrupted)
        with pytest.raises(SystemExit) as stopped:
            run_example(char_lm, *OPTIONS)
    assert stopped.value.code == 130
    assert checkpoint()["step"] == CUT

    printed = run_example(char_lm, *OPTIONS)
    assert "run the same command to resume" in printed  # from before
    assert f"resumed after step {CUT}" in printed
    assert_same(checkpoint(), whole)


def test_compare_prints_and_plots_a_grid(char_lm, run_example, monkeypatch, folders):
    folders("compared")
    monkeypatch.setattr(char_lm, "ADAMW_GRID", (1e-3, 1e-2))
    printed = run_example(char_lm, "--steps=3", "--compare", "--threads=1", "--out=picture.svg")
    rows = [line for line in printed.splitlines() if "e-0" in line and "Adam" in line]
    assert [row.split()[0] for row in rows] == ["MechanicAdamW", "AdamW", "AdamW"]
    assert Path("picture.svg").stat().st_size > 0


@pytest.mark.slow
def test_the_demo_runs_as_a_program(tmp_path):
    """With every warning an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples/char_lm.py", "--steps=16"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "The model writes" in done.stdout
    assert (tmp_path / "out/char_lm.png").stat().st_size > 0


def test_checkpoint_of_other_settings_is_refused(char_lm, short_text, tmp_path):
    char_lm.Run(short_text, steps=2, seed=0).save(tmp_path / "run.pt")
    with pytest.raises(SystemExit, match="written with seed = 0, this run has 1"):
        char_lm.Run(short_text, steps=2, seed=1).load(tmp_path / "run.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_file_that_is_not_a_checkpoint_is_refused(char_lm, short_text, tmp_path, content):
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(SystemExit, match="not a checkpoint of this example"):
        char_lm.Run(short_text, steps=2, seed=0).load(tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps=0"], "--steps must be 1 or more, got 0"),
        (["--out=picture.txt"], "--out must end in"),
        (["--checkpoint=file"], "cannot write in the folder file"),
    ],
)
def test_bad_options_are_refused(char_lm, monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", ["char_lm.py", *options])
    with pytest.raises(SystemExit) as refusal:
        char_lm.parse_arguments()
    assert message in f"{refusal.value} {capsys.readouterr().err}"


def test_validation_text_is_not_in_the_training_text():
    from char_model import load_text

    text = load_text()
    training = set(text.decode(text.train.tolist()).split("\n\n"))
    validation = text.decode(text.validation.tolist()).split("\n\n")
    assert not training & set(validation[1:])  # the first was cut by the split
