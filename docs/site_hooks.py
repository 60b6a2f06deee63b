"""Hooks for mkdocs: add pages from the repository's root to the site, and turn links to source files into plain text.

In the repository every link of docs/*.md, CONTRIBUTING.md and CHANGELOG.md leads to a file. The site has only pages:
for a link to anything else it shows the link's text, followed by the path unless the text is the end of the path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
WIDE = {"compiler-report.md", "coverage.md", "hostile-inputs.md", "mutants.md", "ops.md"}  # pages at full width
OF_THE_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md")  # files of the root that are pages of the site
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(<code>)~?")  # Sphinx roles in docstrings
SEVERAL = re.compile(r"<code>\((<autoref .*?</autoref>)\)</code>")  # "ValueError, TypeError: …" is rendered as a tuple
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<to>[^):#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config) -> Files:
    """Add the pages from the repository's root."""
    for name in OF_THE_ROOT:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Make every link lead to a page of the site, or turn it into text.

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

    # Code blocks stay as they are.
    parts = re.split(r"(^```.*?^```|^(?: {4}[^\n]*\n)+)", markdown, flags=re.M | re.S)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def on_page_content(html: str, page, config, files: Files) -> str:
    """Show the names in docstrings as plain code, without Sphinx roles and parentheses."""
    return SEVERAL.sub(r"<code>\1</code>", ROLE.sub(r"\1", html))
