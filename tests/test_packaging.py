"""What is published: the source distribution and the wheel, the archive that anybody can build again, and what is in it."""

from __future__ import annotations

import email.parser
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from harness import ROOT, clean_environment
from releases import STABLE, archive_of, copy_source

import joborch
from build_zipapp import CACHE, direct_dependencies, locked

BUILD = "from setuptools import build_meta; print(build_meta.build_sdist('dist')); print(build_meta.build_wheel('dist'))"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel."""
    source = copy_source(tmp_path_factory.mktemp("published") / "joborch")
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True, timeout=100)
    [sdist], [wheel] = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    return sdist, wheel


def test_twine_finds_nothing(published: tuple[Path, Path]) -> None:
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *published], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_the_metadata_are_complete(published: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(published[1]) as wheel:
        [name] = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.parser.BytesParser().parsebytes(wheel.read(name))
        [commands] = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert (said["Name"], said["Version"], said["Requires-Python"]) == ("joborch", joborch.__version__, ">=3.9")
    assert (said["License-Expression"], said["Description-Content-Type"]) == ("MIT", "text/markdown")
    assert said["Summary"] and said["Keywords"] and "The joborch authors" in said["Author"]
    assert said.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()
    needed = {text.split(";")[0].strip() for text in said.get_all("Requires-Dist", []) if "extra ==" not in text}
    assert len(needed) == len(direct_dependencies((ROOT / "pyproject.toml").read_text()))
    assert "joborch = joborch_plugins.commands:start" in commands


def test_the_source_distribution_builds_the_archive(published: tuple[Path, Path], pyz: Path, tmp_path: Path) -> None:
    """It has all that a reader and a packager needs: documents, samples, tests, and lock files."""
    with tarfile.open(published[0]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    for name in ("CHANGELOG.md", "docs/operate.md", "deploy/nginx.conf", "tests/harness.py", "LICENSE"):
        assert (source / name).is_file(), name
    assert build(source).read_bytes() == pyz.read_bytes()


def build(source: Path, *words: str, umask: int = 0o022, **environment: str) -> Path:
    """Build the archive in a folder with the sources, of the packages that are there already."""
    (source / CACHE).parent.mkdir(exist_ok=True)
    (source / CACHE).symlink_to(ROOT / CACHE)
    subprocess.run(
        [sys.executable, "build_zipapp.py", *words], cwd=source, check=True, capture_output=True, timeout=100,
        umask=umask, env={**clean_environment(None), **environment},
    )  # fmt: skip
    return source / "joborch.pyz"


def test_anybody_builds_the_same_archive(pyz: Path, tmp_path: Path) -> None:
    """In another folder, with another umask, locale, time zone, hash seed and times of files."""
    source = copy_source(tmp_path / "another folder")
    for path in source.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    words = ("--sbom", "bill.json")
    built = build(source, *words, umask=0o077, LC_ALL="C", TZ="Asia/Tokyo", PYTHONHASHSEED="7", SOURCE_DATE_EPOCH="1")
    assert built.read_bytes() == pyz.read_bytes()
    subprocess.run([sys.executable, "build_zipapp.py", "--output", tmp_path / "pyz", *words[:1], tmp_path / "bill"], cwd=ROOT, check=True)
    assert (source / "bill.json").read_bytes() == (tmp_path / "bill").read_bytes()


def test_the_bill_of_materials(pyz: Path, tmp_path: Path) -> None:
    """It is CycloneDX by its schema, and names each bundled package with digest and licence."""
    words = ["--output", tmp_path / "pyz", "--sbom", tmp_path / "bill"]
    done = subprocess.run([sys.executable, "build_zipapp.py", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    text = (tmp_path / "bill").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    own = bill["metadata"]["component"]
    assert own["version"] == joborch.__version__ and own["hashes"][0]["content"] == done.stdout.split()[-1]
    components = {each["name"]: each for each in bill["components"]}
    assert {name: (each["version"], each["hashes"][0]["content"]) for name, each in components.items()} == {
        pin.name: (pin.version, pin.sha256) for pin in locked(ROOT)
    }
    assert all(each["licenses"] for each in bill["components"])
    with zipfile.ZipFile(pyz) as archive:
        assert {name: each["version"] for name, each in components.items()} == json.loads(archive.read("bundled.json"))


def test_the_release_notes_have_the_digest_of_the_release(tmp_path: Path) -> None:
    """Of the archive that its commit makes. The notes come after that commit, and are not part of the archive."""
    archive = archive_of(STABLE, tmp_path)
    notes = (ROOT / "docs" / f"release-notes-{STABLE.name}.md").read_text()
    assert STABLE.sha256 in notes and STABLE.commit in notes and f"{archive.stat().st_size:,} bytes" in notes
    said = subprocess.run([sys.executable, archive, "--version"], capture_output=True, text=True, check=True, timeout=100)
    assert said.stdout == f"joborch {STABLE.name}\n"
