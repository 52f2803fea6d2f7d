"""Hooks of MkDocs: the README is the first page, and files of the repository that pages point to are part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"(\]\()\.\./([^)#\s]+)")  # a link from docs/ to another folder of the repository


def on_config(config: Any) -> Any:
    """A page that mkdocs.yml does not list is the last one of the list."""
    listed = str(config.nav)
    config.nav += sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name not in listed)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and all that pages of docs/ point to outside of docs/."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {found[1] for page in pages for found in OUTSIDE.findall(page.read_text())} - {"README.md"}
    named |= {link for link in re.findall(r"\]\(([^)#\s:]+)", (ROOT / "README.md").read_text()) if not link.startswith("docs/")}
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    for name in sorted(named):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to where the files are in the site; leave out diagrams that only GitHub draws without another program."""
    if page.file.src_path in ("index.md", "CHANGELOG.md"):
        return markdown.replace("](docs/", "](")
    markdown = re.sub(r"^```mermaid\n.*?^```\n", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return OUTSIDE.sub(r"\1\2", markdown).replace("](README.md", "](index.md")
