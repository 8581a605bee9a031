"""Fixtures for the tests of examples/, whose scripts import each other as neighbours."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def importable_examples():
    """Put examples/ on the path, as Python does for a script there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield


@pytest.fixture(scope="session")
def short_text(importable_examples):
    """The text with so little validation that it takes no time."""
    from char_model import load_text

    text = load_text()
    return text._replace(validation=text.validation[:1000])


@pytest.fixture
def run_example(monkeypatch, capsys):
    """run_example(module, "--steps=3", …): call its main() here; return what it prints."""

    def run(module, *options):
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, options)])
        module.main()
        return capsys.readouterr().out

    return run
