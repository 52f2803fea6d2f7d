"""The archive: the same bytes from every build, nothing but pure Python and named data, and it starts everywhere."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pythons import pythons

from build_zipapp import (
    BUILD_LOCK,
    CACHE,
    DATA,
    LOCK,
    ROOT,
    SHEBANG,
    SOURCES,
    SWAGGER_PACKAGE,
    SWAGGER_WHEEL_FOLDER,
    BuildError,
    build,
    direct_dependencies,
    fetch,
    place,
    read_lock,
    source_members,
    write_lock,
)

BYTES_AT_MOST = 3_000_000


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("archive") / "joborch.pyz"
    build(ROOT, target, ROOT / CACHE)
    return target


@pytest.fixture(scope="module")
def entries(archive: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(archive) as opened:
        return opened.infolist()


def test_two_builds_are_byte_identical(archive: Path, tmp_path: Path) -> None:
    digest = build(ROOT, tmp_path / "again.pyz", ROOT / CACHE)
    assert (tmp_path / "again.pyz").read_bytes() == archive.read_bytes()
    assert digest == hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.parametrize("version", pythons())
def test_every_python_builds_the_same_bytes(version: str, archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "a name with spaces.pyz"
    command = [pythons()[version], ROOT / "build_zipapp.py", "--output", target]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert target.read_bytes() == archive.read_bytes()
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert said == f"{target.name}: {target.stat().st_size} bytes, SHA-256 {digest}\n"


def test_members_are_sorted_dated_and_plain(entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    assert names == sorted(set(names))
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {stat.S_IFREG | 0o644}
    assert {entry.create_system for entry in entries} == {3}
    assert {entry.flag_bits for entry in entries} == {0}


def test_every_member_can_be_read_back(archive: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        assert opened.testzip() is None
        for name in ("joborch.py", "example/run.sh", "example/2oob.pdb"):
            assert opened.read(name) == (ROOT / name).read_bytes()


def test_only_python_source_named_data_and_licences_are_in_it(entries: list[zipfile.ZipInfo]) -> None:
    own = {member.name for member in source_members(ROOT)} | {"__main__.py", "bundled.json"}
    for name in (entry.filename for entry in entries):
        assert name.endswith(".py") or name in DATA | own or name.startswith("licenses/"), name
        assert not {"tests", "__pycache__", "bin", "redoc"} & set(name.split("/")), name


def test_every_package_brings_its_licence_and_version(archive: Path) -> None:
    pins = [pin for lock in (LOCK, BUILD_LOCK) for pin in read_lock((ROOT / lock).read_text())]
    with zipfile.ZipFile(archive) as opened:
        assert json.loads(opened.read("bundled.json")) == {pin.name: pin.version for pin in pins}
        licensed = {name.split("/")[1] for name in opened.namelist() if name.startswith("licenses/")}
    assert licensed == {f"{pin.name.replace('-', '_')}-{pin.version}" for pin in pins}


def test_it_is_one_executable_file_of_bounded_size(archive: Path) -> None:
    assert archive.read_bytes().startswith(SHEBANG)
    assert archive.stat().st_mode & 0o777 == 0o755
    assert archive.stat().st_size <= BYTES_AT_MOST
    assert [path.name for path in archive.parent.iterdir()] == ["joborch.pyz"]


@pytest.mark.parametrize("version", pythons())
def test_every_python_starts_it(version: str, archive: Path) -> None:
    done = subprocess.run([pythons()[version], "-IS", archive, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("joborch ")


@pytest.mark.parametrize("version", pythons())
def test_every_python_finds_the_packages_and_assets_in_it(version: str, archive: Path) -> None:
    script = """
import sys, pkgutil
sys.path.insert(0, sys.argv[1])
import bottle, joborch_plugins, multipart, platformdirs, requests, waitress
for module in (bottle, joborch_plugins, multipart, platformdirs, requests, waitress):
    assert module.__file__.startswith(sys.argv[1]), module
assert b"SwaggerUIBundle" in pkgutil.get_data("joborch_plugins", "swagger-ui/swagger-ui-bundle.js")
"""
    command = [pythons()[version], "-IS", "-W", "error", "-c", script, archive]  # nothing but the standard library
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# == What must not go in ==


@pytest.mark.parametrize(
    ("name", "placed"),
    [
        ("bottle.py", "bottle.py"),
        ("waitress-3.0.2.dist-info/LICENSE.txt", "licenses/waitress-3.0.2/LICENSE.txt"),
        ("idna-3.20.dist-info/licenses/LICENSE.md", "licenses/idna-3.20/LICENSE.md"),
        ("idna-3.20.dist-info/METADATA", None),
        ("bottle-0.13.4.data/scripts/bottle.py", None),
        ("urllib3/tests/test_it.py", None),
        ("urllib3/py.typed", None),
        ("urllib3/contrib/emscripten/emscripten_fetch_worker.js", None),
        (f"{SWAGGER_WHEEL_FOLDER}swagger-ui.css", "joborch_plugins/swagger-ui/swagger-ui.css"),
        (f"{SWAGGER_WHEEL_FOLDER}LICENSE", "joborch_plugins/swagger-ui/LICENSE"),
        (f"{SWAGGER_WHEEL_FOLDER}swagger-ui-bundle.js.map", None),
        ("drf_spectacular_sidecar/__init__.py", None),
        ("drf_spectacular_sidecar/apps.py", None),
        ("drf_spectacular_sidecar/static/drf_spectacular_sidecar/redoc/bundles/redoc.standalone.js", None),
    ],
)
def test_place(name: str, placed: str | None) -> None:
    assert place(name) == placed


def test_a_wheel_with_another_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = read_lock((ROOT / LOCK).read_text())
    [wheel] = fetch(pins[:1], ROOT / CACHE)
    (tmp_path / wheel.name).write_bytes(wheel.read_bytes() + b"\0")
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match=r"pip cannot download[^$]*(?i:hash)"):
        fetch(pins[:1], tmp_path)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"joborch\.py is missing"):
        list(source_members(tmp_path))


def test_plugins_go_in_with_the_files_of_the_page_and_nothing_hidden(tmp_path: Path) -> None:
    wanted = {"joborch.py", "joborch_base/vocabulary.py", "LICENSE", "example/run.sh", "example/2oob.pdb"}
    wanted |= {"joborch_plugins/__init__.py", "joborch_plugins/deep/er.py"}
    wanted |= {"joborch_plugins/page/page.html", "joborch_plugins/page/js/page.js"}
    for name in (*wanted, "joborch_plugins/notes.txt", "joborch_plugins/page/js/.page.js.swp", "joborch_plugins/.cache/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert {member.name for member in source_members(tmp_path)} == wanted


def test_no_plugins_are_no_fault(tmp_path: Path) -> None:
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert {member.name for member in source_members(tmp_path)} == set(SOURCES)


# == The lock file ==


@pytest.mark.parametrize("lock", [LOCK, BUILD_LOCK])
def test_a_lock_file_reads_back_as_written(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert write_lock(read_lock(text)) == text


@pytest.mark.parametrize("text", ["", "# nothing\n", "bottle==0.13.4\n", f"bottle>=1 \\\n    --hash=sha256:{'0' * 64}\n"])
def test_a_lock_file_without_digests_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match="--lock"):
        read_lock(text)


def test_every_dependency_is_locked() -> None:
    wanted = direct_dependencies((ROOT / "pyproject.toml").read_text())
    names = {requirement.split(">")[0] for requirement in wanted}
    assert names <= {pin.name for pin in read_lock((ROOT / LOCK).read_text())}


def test_what_only_the_build_needs_is_locked_apart() -> None:
    """`pip install -r requirements.lock` must not pull in what the package with Swagger UI's files needs."""
    assert SWAGGER_PACKAGE not in (ROOT / "pyproject.toml").read_text()
    assert [pin.name for pin in read_lock((ROOT / BUILD_LOCK).read_text())] == [SWAGGER_PACKAGE]
    assert SWAGGER_PACKAGE not in {pin.name for pin in read_lock((ROOT / LOCK).read_text())}


def test_the_build_needs_no_installed_package() -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "build_zipapp.py"), "--help"]
    assert "--lock" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
