"""The documents as a site: MkDocs builds it without a warning, all its links lead somewhere, and it fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from harness import ROOT

DOCUMENTS = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
FETCHED = {"script", "img", "link", "source", "iframe"}  # elements that a browser loads by itself
NAMES_ONLY = {"canonical", "next", "prev", "alternate"}  # links that it does not


class Page(HTMLParser):
    """What a page links to, its anchors, and the text of its paragraphs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []  # element and address
        self.anchors: set[str] = set()
        self.paragraphs: list[str] = []
        self.in_paragraph = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.anchors |= {named[name] or "" for name in ("id", "name") if name in named}
        if named.get("rel") not in NAMES_ONLY:
            self.links += [(tag, named[name] or "") for name in ("href", "src") if name in named]
        if tag == "p":
            self.in_paragraph = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_paragraph = self.in_paragraph and tag != "p"

    def handle_data(self, data: str) -> None:
        if self.in_paragraph:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The built pages by their files."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return {path: Page(path) for path in folder.glob("*.html") if path.name != "404.html"}


def local(site: dict[Path, Page]) -> Iterator[tuple[Path, str]]:
    """Each link of each page that stays in the site."""
    for path, page in site.items():
        yield from ((path, unquote(link)) for _, link in page.links if not re.match(r"[a-z]+:|//", link))


def test_every_document_is_a_page(site: dict[Path, Page]) -> None:
    names = {"index" if path.stem == "README" else path.stem for path in DOCUMENTS}
    assert {path.stem for path in site} == names


def test_every_link_leads_to_a_file_and_an_anchor(site: dict[Path, Page]) -> None:
    """Those of pictures and of HTML in the documents, too, which MkDocs does not check."""
    checked = 0
    for path, link in local(site):
        name, _, anchor = link.partition("#")
        target = (path.parent / (name or path.name)).resolve()
        assert target.exists(), f"{path.name}: {link}"
        if anchor and target in site and not anchor.startswith("__"):
            assert anchor in site[target].anchors, f"{path.name}: {link}"
            checked += 1
    assert checked > 200


def test_nothing_is_fetched_from_other_machines(site: dict[Path, Page]) -> None:
    links = [(tag, link) for page in site.values() for tag, link in page.links]
    assert [link for tag, link in links if tag in FETCHED and re.match(r"[a-z]+:|//", link) and not link.startswith("data:")] == []


def test_no_list_or_table_is_read_as_a_paragraph(site: dict[Path, Page]) -> None:
    """GitHub shows a list without a blank line above it, and the site would not."""
    for path, page in site.items():
        wrong = [text for text in page.paragraphs if re.search(r"^(?:[-*] |\d+\. |\||#+ |```)", text, re.MULTILINE)]
        assert wrong == [], path.name
