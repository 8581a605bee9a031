"""The recipes of docs/stacks run as they stand, each page in a process of its own."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.stacks import import_stack

pytestmark = pytest.mark.stacks

TESTS = Path(__file__).resolve().parents[1]
NEEDS = {
    "README": (),
    "accelerate": ("accelerate",),
    "ddp": (),
    "deepspeed": ("deepspeed", "transformers"),
    "lightning": ("lightning",),
    "llama-factory": ("llamafactory",),
    "logs": (),
    "timm": (),
    "torchtitan": ("torchtitan",),
    "trainer": ("transformers",),
    "trl": ("trl", "peft"),
}
"""Page → the stacks that it needs."""

WITHOUT_CODE = {"axolotl", "sd-scripts"}
"""Pages of configuration and arguments, which test_logs_and_registries.py tries."""


def test_every_page_is_run():
    pages = {path.stem for path in (TESTS.parent / "docs" / "stacks").glob("*.md")}
    assert pages == NEEDS.keys() | WITHOUT_CODE


@pytest.mark.parametrize("page", NEEDS)
def test_the_code_of_a_page_runs(page, tmp_path):
    for name in NEEDS[page]:
        import_stack(name)
    if page == "timm" and importlib.util.find_spec("timm") is None:  # which the page's run imports
        import_stack("timm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "MASTER_PORT": port, "PYTHONPATH": paths}
    environment["PYTHONWARNINGS"] = "ignore"
    command = [sys.executable, str(TESTS / "integrations" / "run_page.py"), page]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "RESULT" in done.stdout
