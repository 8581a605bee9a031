"""README, pages and docstrings: examples run as pasted, and links lead somewhere."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import mechanic_fused

ROOT = Path(__file__).resolve().parents[2]
PAGES = [p for p in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md"))]
TUNERS = sorted(p for p in ROOT.glob("docs/tuners/*.md") if "```python" in p.read_text())
RUN_AS_PASTED = [
    *("README.md", "docs/quickstart.md", "docs/checkpoints.md"),
    *(str(p.relative_to(ROOT)) for p in TUNERS),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def modules():
    found = pkgutil.walk_packages(mechanic_fused.__path__, "mechanic_fused.")
    skipped = ("triton_kernels", "_native", "__main__", "backends.cuda")
    return sorted(m.name for m in found if not any(part in m.name for part in skipped))


OF_STACKS = {"torchtitan", "deepspeed", "axolotl"}
"""Modules beside stacks that need not be installed."""


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_run(name):
    stack = name.rpartition(".")[2]
    if "integrations" in name and stack in OF_STACKS:
        pytest.importorskip(stack, exc_type=ImportError)
    module = importlib.import_module(name)
    names = {"torch": torch, **{n: getattr(mechanic_fused, n) for n in mechanic_fused.__all__}}
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        test.globs.update({k: v for k, v in names.items() if k not in test.globs})
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert result.failed == 0, test.name


@pytest.mark.parametrize(
    "name", ["MechanicAdamW", "MechanicAdam", "MechanicSGD", "MechanicLion", "mechanize", "Lion"]
)
def test_every_public_optimizer_has_an_example(name):
    assert ">>> opt" in getattr(mechanic_fused, name).__doc__


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("page", RUN_AS_PASTED)
def test_the_code_of_a_page_runs_as_pasted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    code = "\n".join(blocks)
    exec(compile(code, page, "exec"), {"__name__": "pasted"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = [t for t in LINK.findall(page.read_text()) if "://" not in t]
    missing = [t for t in targets if not (page.parent / t).exists()]
    assert not missing


def test_the_readme_is_short_and_its_lines_can_be_read_in_a_diff():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 800
    prose = [line for line in text.splitlines() if not line.startswith(("|", "!["))]
    assert max(map(len, prose)) <= 120
