"""The pages of docs/tutorials, run as they stand: each page's blocks of Python, in order, in one namespace."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
OF_TIMM = ("accelerate", "embed-images", "fine-tune", "index", "serve", "several-heads", "verify-in-your-ci")
NEEDS = dict.fromkeys(OF_TIMM, "timm") | {"kernels-hub": "kernels", "trainers": "lightning"}
ON_KERNELS = ("verify-in-your-ci", "read-an-inspect-report")  # the others' kernels are tested elsewhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, request, monkeypatch):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    if page.stem in ON_KERNELS:
        pytest.importorskip("triton")
        plugin = importlib.import_module("vitkernels.tools.verify.pytest_plugin")
        monkeypatch.setattr(plugin, "SECONDS", 2.0)
    else:
        request.getfixturevalue("computed_by_pytorch")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
    assert blocks
    names = {"__name__": page.stem}
    for block in blocks:
        line = block.string.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)  # errors name the line of the page
    for name, value in list(names.items()):
        if name.startswith("test_"):
            value(request.getfixturevalue("vitkernels_verify"))


def test_links_lead_to_files():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(pages) > len(PAGES)
    for page in pages:
        for to in re.findall(r"\]\(([^):#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / to).exists(), f"{page.relative_to(ROOT)}: {to}"


def test_ruff_is_of_one_version():
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.search(r"ruff-pre-commit\n\s+rev: v(.+)$", config, re.M)[1] == pinned
