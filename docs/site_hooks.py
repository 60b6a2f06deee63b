"""Hooks of mkdocs: pages of the repository's root join the site, and links to its source become plain text.

On a disk or a forge every link of docs/*.md, CONTRIBUTING.md and CHANGELOG.md leads to a file. The site has its pages
alone: of a link to anything else it shows the text, and the path where the text does not tell.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
WIDE = {"compiler-report.md", "coverage.md", "hostile-inputs.md", "mutants.md", "ops.md"}  # get the whole width
OF_THE_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md")  # pages of the site, too
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(<code>)~?")  # of docstrings, as Sphinx has them
SEVERAL = re.compile(r"<code>\((<autoref .*?</autoref>)\)</code>")  # "ValueError, TypeError: …" is taken for a tuple
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<to>[^):#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config) -> Files:
    """Add the root's pages."""
    for name in OF_THE_ROOT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Let every link lead to a page of the site, or be text.

    Raises:
        FileNotFoundError: A link leads to no file of the repository.
    """
    name = page.file.src_uri
    if name in WIDE:
        page.meta["hide"] = ["toc"]
    folder = "" if name in OF_THE_ROOT else posixpath.join("docs", posixpath.dirname(name))

    def link(match: re.Match) -> str:
        text, anchor = match["text"], match["anchor"] or ""
        path = posixpath.normpath(posixpath.join(folder, match["to"]))
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{name}: a link leads to {path}, which is not there")
        site = path if path in OF_THE_ROOT else path.removeprefix("docs/") if path.startswith("docs/") else None
        if site is not None and files.get_file_from_path(site) is not None:
            return f"[{text}]({posixpath.relpath(site, posixpath.dirname(name) or '.')}{anchor})"
        plain = text.strip("`")
        return f"`{plain}`" if path.endswith(plain.rstrip("/")) else f"{text} (`{path}`)"

    # Not within blocks of code.
    parts = re.split(r"(^```.*?^```|^(?: {4}[^\n]*\n)+)", markdown, flags=re.M | re.S)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def on_page_content(html: str, page, config, files: Files) -> str:
    """Show names in docstrings as code alone."""
    return SEVERAL.sub(r"<code>\1</code>", ROLE.sub(r"\1", html))
