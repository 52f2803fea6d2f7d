"""Archives of earlier versions: each is built from its commit by its own build_zipapp.py, and has to have the digest pinned here.

`python tests/releases.py COMMIT` pins the version of a commit as STABLE, and writes its digest into the release notes.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT))  # as a command, only tests/ is searched
from build_zipapp import CACHE


class Version(NamedTuple):
    """A version, the commit that made it, and the SHA-256 of its joborch.pyz."""

    name: str
    commit: str
    sha256: str


FIRST = Version("0.1.0", "b219a6462093843ddaf17bf09a478bfd2b3265e2", "6f9759ea03441c29a6dcbc87ae1f0d6f39f0710e5755f0164e4d39737a7b8b6a")

# The version from which on neighbours work together; the last release.
STABLE = Version("1.0.0", "c1717ead5948497ddb949a4331bb2035357144fe", "e7dc07461ed66fd623d05d06e5f2f928c2cf0e59a90f1789e5a67c1b65cc96d3")


def source_of(version: Version, folder: Path) -> Path:
    """Put the files of a version into `folder`. Without the history of the repository, the test is left out."""
    done = subprocess.run(["git", "archive", version.commit], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"version {version.name} is made from the history of the repository, which is not here: git fetch --unshallow")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def archive_of(version: Version, folder: Path) -> Path:
    """Build joborch.pyz of a version in `folder`, of the packages that it locked, which are kept with those of today."""
    source = source_of(version, folder)
    (ROOT / CACHE).mkdir(parents=True, exist_ok=True)
    (source / CACHE).parent.mkdir(exist_ok=True)
    (source / CACHE).symlink_to(ROOT / CACHE)
    target = folder / "joborch.pyz"
    subprocess.run([sys.executable, source / "build_zipapp.py", "--output", target], check=True, stdout=subprocess.DEVNULL, timeout=100)
    sha256 = hashlib.sha256(target.read_bytes()).hexdigest()
    assert sha256 == version.sha256 or not version.sha256, f"another archive than that of {version.name}: {sha256}"
    return target


def copy_source(folder: Path) -> Path:
    """Copy the sources as they are now: what git knows, or in an unpacked archive everything but what was built."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    for name in names:
        if name and (ROOT / name).is_file() and not name.startswith(("build/", ".")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def pin(revision: str) -> None:
    """Pin the version of a commit as STABLE, and write commit, size and digest of its archive into its release notes."""
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    with tempfile.TemporaryDirectory() as folder:
        archive = archive_of(Version(revision, commit.stdout.strip(), ""), Path(folder))
        said = subprocess.run([sys.executable, archive, "--version"], check=True, capture_output=True, text=True)
        stable = Version(said.stdout.split()[1], commit.stdout.strip(), hashlib.sha256(archive.read_bytes()).hexdigest())
        size = archive.stat().st_size
    own, notes = Path(__file__), ROOT / "docs" / f"release-notes-{stable.name}.md"
    words = ", ".join(f'"{word}"' for word in stable)
    own.write_text(re.sub(r"(?m)^STABLE = .*$", f"STABLE = Version({words})", own.read_text()))
    text = re.sub(r"[0-9,]+ bytes, SHA-256 `[0-9a-f]*`", f"{size:,} bytes, SHA-256 `{stable.sha256}`", notes.read_text())
    notes.write_text(re.sub(r"(commit `|git checkout )[0-9a-f]*", rf"\g<1>{stable.commit}", text))
    print(f"{stable.name}: commit {stable.commit}, {size:,} bytes, SHA-256 {stable.sha256}")


if __name__ == "__main__":
    pin(sys.argv[1])
