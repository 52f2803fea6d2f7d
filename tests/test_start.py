"""The start: joborch.pyz unpacks itself once into the cache and runs from there; where that cannot be trusted, from the archive.

Beside it: the three ways of running, the .pyz, `pip install .` and `python joborch.py`, do the same.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from harness import NOBODY_UID, ROOT, STRANGER_UID, clean_environment, download, open_python, run_to_end, wait_for
from pythons import pythons
from releases import copy_source
from world import Disk

import joborch
import zipapp_main
from build_zipapp import CACHE, LOCK

DAY_S = 24 * 3600


class User:
    """A user with a home, who starts a joborch.pyz of his own."""

    def __init__(self, home: Path, pyz: Path, python: str = sys.executable, uid: int | None = None) -> None:
        self.home, self.python, self.uid = home, python, uid
        home.mkdir()
        self.pyz = Path(shutil.copy(pyz, home.parent / f"{home.name}.pyz"))
        self.environment = clean_environment(home)
        self.cache = home / ".cache" / "joborch"
        self.copy = self.cache / hashlib.sha256(pyz.read_bytes()).hexdigest()
        if uid is not None:
            os.chown(home, uid, uid)

    def spawn(self, *words: str, flags: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start it without waiting for its end."""
        identity: dict[str, Any] = {} if self.uid is None else {"user": self.uid, "group": self.uid, "extra_groups": []}
        return subprocess.Popen(
            [self.python, *flags, str(self.pyz), *words],
            env=self.environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **identity,
        )

    def runs_from(self) -> str:
        """Start it; return where the program was read from: "byte code", "copy" (the source in the cache) or "archive"."""
        process = self.spawn("version", flags=("-v",))
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.startswith(f"joborch {joborch.__version__}\n"), out
        [line] = [line for line in err.splitlines() if line.startswith("import 'joborch' #")]
        if "zipimporter" in line:
            return "archive"
        return "byte code" if f"code object from '{self.copy}/__pycache__/joborch." in err else "copy"

    def left(self) -> list[str]:
        """What is in the cache."""
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.is_dir() else []


@pytest.fixture(name="user")
def user_fixture(pyz: Path, tmp_path: Path) -> User:
    """Whoever runs the tests, with a new home."""
    return User(tmp_path / "home", pyz)


@pytest.fixture(name="stranger")
def stranger_fixture(root: None, pyz: Path, open_folder: Path) -> User:
    """Another user of this machine, with a new home."""
    return User(open_folder / "home", pyz, open_python(), STRANGER_UID)


# == The copy ==


def test_the_first_start_makes_a_copy_that_the_next_ones_run_from(user: User) -> None:
    """It is closed to others, whole, and has byte code for everything; what only the archive needs stays there."""
    assert user.runs_from() == "byte code"
    assert user.left() == [user.copy.name]
    before = {path: path.stat().st_mtime_ns for path in user.cache.rglob("*")}
    assert user.runs_from() == "byte code"
    assert {path: path.stat().st_mtime_ns for path in user.cache.rglob("*")} == before
    for folder in (user.cache, user.copy):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with zipfile.ZipFile(user.pyz) as archive:
        for name in archive.namelist():
            if name == "__main__.py" or name.startswith("licenses/"):
                assert not (user.copy / name).exists()
            else:
                assert (user.copy / name).read_bytes() == archive.read(name)
    for source in user.copy.rglob("*.py"):
        [code] = (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")
        assert code.read_bytes()[4:8] == b"\1\0\0\0"  # PEP 552: not compared with its source


@pytest.mark.parametrize("version", pythons())
def test_every_python_runs_from_the_same_copy(version: str, pyz: Path, tmp_path: Path) -> None:
    """Whatever environment variables and flags say of byte code; and no warning of a package's source is shown."""
    user = User(tmp_path / "home", pyz)
    assert user.runs_from() == "byte code"
    user.python = str(pythons()[version])
    user.environment["PYTHONDONTWRITEBYTECODE"] = "1"
    assert user.runs_from() == user.runs_from() == "byte code"
    process = user.spawn("config", flags=("-I", "-S", "-W", "error"))
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    assert user.left() == [user.copy.name]


def test_another_archive_is_another_copy(user: User, tmp_path: Path) -> None:
    """And the same one elsewhere, read-only, is the same."""
    user.runs_from()
    user.pyz = Path(shutil.copy(user.pyz, tmp_path / "other.pyz"))
    user.pyz.chmod(0o444)
    assert user.runs_from() == "byte code"
    assert user.left() == [user.copy.name]
    before = user.copy
    user.pyz.chmod(0o644)
    with zipfile.ZipFile(user.pyz) as archive:
        joborch_py = archive.read("joborch.py")
    changed = joborch_py.replace(b"\n# == 1. ", b"\n# == 7. ", 1)
    assert changed != joborch_py
    content = user.pyz.read_bytes().replace(joborch_py, changed)
    crc = zipfile.crc32(joborch_py).to_bytes(4, "little"), zipfile.crc32(changed).to_bytes(4, "little")  # type: ignore[attr-defined]
    user.pyz.write_bytes(content.replace(*crc))
    user.copy = user.cache / hashlib.sha256(user.pyz.read_bytes()).hexdigest()
    assert user.runs_from() == "byte code"
    assert user.left() == sorted({before.name, user.copy.name})


def imported(user: User, *words: str) -> set[str]:
    """The modules that a start imports."""
    process = user.spawn(*words, flags=("-X", "importtime"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return imported_in(err)


def imported_in(text: str) -> set[str]:
    """The modules in what `python -X importtime` wrote."""
    return {line.rpartition("|")[2].strip() for line in text.splitlines() if line.startswith("import time:")}


def test_the_version_is_told_without_the_program(user: User) -> None:
    """And without a look at the cache."""
    assert not {"joborch", "argparse", "hashlib"} & imported(user, "--version")
    assert user.left() == []
    assert user.spawn("--version").communicate(timeout=60) == (f"joborch {joborch.__version__}\n", "")


def test_the_environment_is_hidden_before_anything_else(user: User) -> None:
    """Undumpable: /proc/PID/environ belongs to root as long as the process runs, even while it unpacks."""
    text = zipfile.Path(user.pyz, "__main__.py").read_text()
    assert text.index("prctl(4, 0") < text.index("def ")


def test_a_start_imports_only_what_it_needs(user: User, make_process: MakeProcess) -> None:
    """That is what a start costs. `tests/bench.py start` measures the time, which a test could not rely on."""
    user.runs_from()
    helped = imported(user, "--help")
    assert "argparse" in helped and not {"joborch", "joborch_base", "requests", "sqlite3"} & helped
    program = [sys.executable, "-X", "importtime", str(user.pyz)]
    server = make_process("server", program=program, home_folder=user.home).start()
    modules = imported_in(server.log)
    server.stop()
    rare = {"slurm", "dirac", "page", "documents", "top", "sandbox", "admin"}
    assert "joborch_base.store" in modules and not {f"joborch_plugins.{name}" for name in rare} & modules


# == A cache that cannot be used ==


def no_home(user: User) -> None:
    """Nor does the user database know one."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        del user.environment[name]


def closed_home(user: User) -> None:
    """It is somebody else's, as that of many services is."""
    os.chown(user.home, 0, 0)


def open_cache(user: User) -> None:
    """Everybody may write to the folder with the copies."""
    user.cache.mkdir(parents=True)
    os.chown(user.cache.parent, STRANGER_UID, STRANGER_UID)
    os.chown(user.cache, STRANGER_UID, STRANGER_UID)
    user.cache.chmod(0o777)


def sticky_cache(user: User) -> None:
    """As /tmp is: others could make the copy before we do."""
    open_cache(user)
    user.cache.chmod(0o1777)


def group_cache(user: User) -> None:
    """A group may write to it."""
    open_cache(user)
    user.cache.chmod(0o770)


def open_parent(user: User) -> None:
    """Everybody may replace the folder with the copies."""
    open_cache(user)
    user.cache.chmod(0o700)
    user.cache.parent.chmod(0o777)


def anothers_cache(user: User) -> None:
    """Its owner could change what is in it."""
    open_cache(user)
    os.chown(user.cache, NOBODY_UID, NOBODY_UID)


def anothers_copy(user: User) -> None:
    """So could the owner of the copy itself."""
    assert user.runs_from() == "byte code"
    os.chown(user.copy, NOBODY_UID, NOBODY_UID)
    user.copy.chmod(0o755)


def link_to_anothers(user: User) -> None:
    """A symbolic link takes the place of the folder."""
    open_cache(user)
    elsewhere = user.home.parent / "elsewhere"
    user.cache.rename(elsewhere)
    os.chown(elsewhere, NOBODY_UID, NOBODY_UID)
    user.cache.symlink_to(elsewhere)


UNUSABLE = [no_home, closed_home, open_cache, sticky_cache, group_cache, open_parent, anothers_cache, anothers_copy, link_to_anothers]


@pytest.mark.parametrize("spoil", UNUSABLE)
def test_a_cache_that_cannot_be_used_or_trusted(spoil: Callable[[User], None], stranger: User) -> None:
    """The program runs from the archive, and nothing is written where others could change it."""
    spoil(stranger)
    before = stranger.left()
    assert stranger.runs_from() == "archive"
    assert stranger.left() == before
    assert [path.name for path in stranger.home.iterdir()] in ([], [".cache"])


def test_a_foreign_home_is_left_alone(root: None, pyz: Path, open_folder: Path) -> None:
    """Root with the home of another user, as sudo may leave it: a folder of root's in there would be in that user's way."""
    user = User(open_folder / "home", pyz)
    os.chown(user.home, STRANGER_UID, STRANGER_UID)
    assert user.runs_from() == "archive"
    assert list(user.home.iterdir()) == []


def test_a_link_to_a_folder_of_our_own(user: User, tmp_path: Path) -> None:
    """As where homes are small: the cache lies on another disk."""
    (tmp_path / "scratch").mkdir()
    (user.home / ".cache").symlink_to(tmp_path / "scratch")
    assert user.runs_from() == "byte code"
    assert user.left() == [user.copy.name]


def test_a_relative_cache_folder_does_not_count(user: User) -> None:
    """XDG Base Directory Specification: it is as if there was none."""
    user.environment["XDG_CACHE_HOME"] = "somewhere"
    assert user.runs_from() == "byte code"
    assert user.left() == [user.copy.name]


@pytest.fixture(name="disk")
def disk_fixture(root: None, tmp_path: Path) -> Iterator[Disk]:
    """A small disk."""
    disk = Disk(tmp_path / "disk", "size=16m")
    yield disk
    disk.close()


def test_a_full_disk(user: User, disk: Disk) -> None:
    """With any number of free pages: what was begun is taken away again, and the next start with room makes the copy."""
    user.environment["XDG_CACHE_HOME"] = str(disk.path)
    user.cache = disk.path / "joborch"
    user.copy = user.cache / user.copy.name
    with zipfile.ZipFile(user.pyz) as archive:
        source = sum(entry.file_size // 4096 + 1 for entry in archive.infolist())
    seen = set()
    for pages in (0, 1, 3, 100, source // 2, source):
        disk.free()
        shutil.rmtree(user.cache, ignore_errors=True)
        disk.fill(pages)
        seen.add(user.runs_from())
        assert set(user.left()) <= {user.copy.name}, pages
    assert seen == {"archive", "copy"}  # "copy": there was room for the source, not for the byte code
    disk.free()
    assert user.runs_from() == "byte code"


def test_a_disk_that_is_read_only(user: User, disk: Disk) -> None:
    """A copy that is there can be used; after a day too, when others would be told that it is."""
    user.environment["XDG_CACHE_HOME"] = str(disk.path)
    user.cache = disk.path / "joborch"
    user.copy = user.cache / user.copy.name
    subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
    assert user.runs_from() == "archive"
    subprocess.run(["mount", "-o", "remount,rw", str(disk.path)], check=True)
    assert user.runs_from() == "byte code"
    os.utime(user.copy, (1, 1))
    subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)
    assert user.runs_from() == "byte code"


def test_server_and_client_from_a_copy_in_memory(pyz: Path, make_pair: MakePair, tmp_path: Path) -> None:
    """They work, and tell when the archive is replaced, where there is no cache."""
    archive = Path(shutil.copy(pyz, tmp_path / "joborch.pyz"))
    blocked = {"XDG_CACHE_HOME": "/dev/null"}
    own = make_pair(server=dict(blocked), client=dict(blocked), program=[sys.executable, str(archive)]).start()
    for process in (own.server, own.client):
        assert process.health()["restart_needed"] is None
        assert "no copy in the cache folder: " in process.log
    archive.write_bytes(b"another")
    assert run_to_end(own.server, "true")["status"] == "Completed"
    assert own.server.get("/swagger-ui/swagger-ui.css").status_code == 200
    for process in (own.server, own.client):
        assert "restart it" in process.health()["restart_needed"]


def test_a_copy_that_goes_while_they_run(pyz: Path, make_pair: MakePair) -> None:
    """As when somebody empties his cache. Only the files of Swagger UI are missed: a plain page takes their place."""
    own = make_pair(program=[sys.executable, str(pyz)]).start()
    for process in (own.server, own.client):
        assert process.home is not None
        shutil.rmtree(process.home / ".cache")
    done = run_to_end(own.server, "echo kept > result")
    assert download(own.server, done["id"]).text("result") == "kept\n"
    assert own.server.health()["restart_needed"] is None
    page = own.server.get("/swagger-ui/")
    assert (page.status_code, "These are the routes" in page.text) == (200, True)
    assert own.server.get("/swagger-ui/swagger-ui.css").status_code == 404
    assert "Traceback" not in own.server.log + own.client.log


# == Starts at once, and starts that were cut off ==


def test_first_starts_at_once(user: User) -> None:
    """All of them run, one copy is left."""
    starts = [user.spawn("version") for _ in range(6)]
    for process in starts:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, err) == (0, "")
        assert out.startswith("joborch ")
    assert user.left() == [user.copy.name]
    assert user.runs_from() == "byte code"


def test_starts_that_are_killed_while_they_unpack(user: User) -> None:
    """At any moment: the next one runs, from a copy that is whole."""
    for number in range(12):
        process = user.spawn("version")
        time.sleep(0.03 * (number + 1))
        process.kill()
        process.communicate()
        if number % 4 == 3:
            shutil.rmtree(user.copy, ignore_errors=True)
    assert user.runs_from() == "byte code"
    for source in user.copy.rglob("*.py"):
        assert list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")), source


def truncate(copy: Path) -> None:
    """As after a crash of the machine."""
    os.truncate(copy / "joborch.py", 1000)
    os.truncate(copy / "waitress" / "server.py", 0)


def clean_by_age(copy: Path) -> None:
    """As clusters do in scratch folders."""
    for path in list(copy.rglob("*"))[::3]:
        if path.is_file():
            path.unlink()


def keep_nothing(copy: Path) -> None:
    """Only the folder is left."""
    for path in copy.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def byte_code_goes(copy: Path) -> None:
    """Some other program took it for rubbish."""
    for folder in copy.rglob("__pycache__"):
        shutil.rmtree(folder)


@pytest.mark.parametrize("damage", [truncate, clean_by_age, keep_nothing, byte_code_goes])
def test_a_damaged_copy_is_mended(damage: Callable[[Path], None], user: User) -> None:
    user.runs_from()
    damage(user.copy)
    assert user.runs_from() in ("byte code", "copy")
    with zipfile.ZipFile(user.pyz) as archive:
        for name in archive.namelist():
            if name != "__main__.py" and not name.startswith("licenses/"):
                assert (user.copy / name).read_bytes() == archive.read(name)


# == Network file systems, as far as they can be imitated ==


@pytest.fixture(name="start")
def start_fixture(pyz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Readies the copy in this process; returns its folder."""
    archive = pyz.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: Path(zipapp_main.ready_copy(archive, hashlib.sha256(archive).hexdigest()))


def test_a_rename_that_was_done_and_reported_as_failed(start: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the answer was lost, and the repeated call finds nothing to rename."""
    rename = os.rename

    def lost(old: str, new: str) -> None:
        rename(old, new)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", old)

    monkeypatch.setattr(os, "rename", lost)
    copy = start()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    assert (copy / "joborch.py").exists()


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EEXIST])
def test_another_machine_was_quicker(code: int, start: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def late(old: str, new: str) -> None:
        shutil.copytree(old, new)
        raise OSError(code, os.strerror(code), old)

    monkeypatch.setattr(os, "rename", late)
    copy = start()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["rename", "replace", "mkdir", "lstat"])
def test_a_file_system_that_fails(call: str, code: int, start: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and whoever asked falls back; nothing half done is left."""

    def fails(*arguments: object, **named: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises(OSError, match=os.strerror(code)):
            start()
    copy = start()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


# == Copies of old versions ==


def test_copies_that_nothing_used_for_30_days_go(user: User) -> None:
    """With a first start of another version; nothing else in the folder does, and links are not followed."""
    now = time.time()
    ages_days = {"a" * 64: 31, "b" * 64: 29, f".{'c' * 32}": 31, f".{'d' * 32}": 1, "notes": 400, "e" * 64: 31}
    for name, age_days in ages_days.items():
        folder = user.cache / name
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").touch()
        os.utime(folder, (now - age_days * DAY_S,) * 2)
    shutil.rmtree(user.cache / ("e" * 64))
    (user.cache / ("e" * 64)).symlink_to(user.cache / "notes")
    os.utime(user.cache / ("e" * 64), (1, 1), follow_symlinks=False)
    assert user.runs_from() == "byte code"
    assert set(user.left()) >= {"b" * 64, f".{'d' * 32}", "notes", user.copy.name}
    assert not {"a" * 64, f".{'c' * 32}"} & set(user.left())
    assert (user.cache / "notes" / "deep" / "file").exists()


def test_a_copy_that_is_started_while_others_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was touched between the first look at its age and the second one: it stays."""
    folder = tmp_path / ("a" * 64)
    folder.mkdir()
    os.utime(folder, (1, 1))
    rename = os.rename

    def touch_and_rename(old: str, new: str) -> None:
        os.utime(old)
        rename(old, new)

    monkeypatch.setattr(os, "rename", touch_and_rename)
    zipapp_main.sweep(str(tmp_path), "b" * 64)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_start_touches_its_copy_once_a_day(user: User) -> None:
    user.runs_from()
    hour_ago = time.time() - 3600
    for then, kept in ((hour_ago, True), (hour_ago - DAY_S, False)):
        os.utime(user.copy, (then, then))
        user.runs_from()
        assert (user.copy.stat().st_mtime == pytest.approx(then, abs=1)) == kept


def test_a_process_touches_its_copy_once_a_day(pyz: Path, make_process: MakeProcess, tmp_path: Path) -> None:
    server = make_process("server", {"JOBORCH_CLEAN_INTERVAL": "1"}, program=[sys.executable, str(pyz)]).start()
    assert server.home is not None
    [copy] = (server.home / ".cache" / "joborch").iterdir()
    os.utime(copy, (1, 1))
    wait_for(lambda: copy.stat().st_mtime > 1, 100, "the touch by the cleaner")
    server.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]


# == Three ways of running ==


@pytest.fixture(name="installed", scope="module")
def installed_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new environment with joborch and what requirements.lock pins, installed by pip without an index."""
    folder = tmp_path_factory.mktemp("installed")
    wheels, environment = folder / "wheels", folder / "venv"
    source = copy_source(folder / "source")  # setuptools leaves its own folders beside pyproject.toml
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, source], check=True, timeout=100)
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    to = [*pip, f"--python={python}", "install", "--no-index"]
    subprocess.run([*to, f"--find-links={ROOT / CACHE}", "--require-hashes", "-r", ROOT / LOCK], check=True, timeout=100)
    subprocess.run([*to, *wheels.glob("joborch-*.whl")], check=True, timeout=100)  # fails if a dependency is not there
    return python


def test_what_pip_installs(installed: Path, tmp_path: Path) -> None:
    """The program, its plug-ins and the example; no Django, and nothing else that the lock file does not pin."""
    code = "import importlib.metadata as m; print(*sorted(d.metadata['Name'].lower() for d in m.distributions()))"
    found = subprocess.run([installed, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    wanted = [line.split("==")[0] for line in (ROOT / LOCK).read_text().splitlines() if "==" in line]
    assert found == sorted(["joborch", *wanted])
    [site] = installed.parent.parent.glob("lib/python*/site-packages")
    for folder, name in (("example", "joborch_example"), ("joborch_plugins", "joborch_plugins")):
        files = {path.name for path in (ROOT / folder).iterdir() if path.is_file() and path.suffix != ".zip"}
        assert files <= {path.name for path in (site / name).iterdir()}
    command = [installed.with_name("joborch"), "demo"]
    demo = subprocess.run(command, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert (demo.returncode, "downloaded the result" in demo.stdout) == (0, True), demo.stdout + demo.stderr


@pytest.mark.parametrize("way", ["joborch.pyz", "pip install .", "python joborch.py"])
def test_the_whole_way_of_a_job(way: str, make_pair: MakePair, request: pytest.FixtureRequest) -> None:
    """Upload, run, result, page: server and client do the same, however they are started."""
    if way == "joborch.pyz":
        program = [sys.executable, str(request.getfixturevalue("pyz"))]
    elif way == "pip install .":
        program = [str(request.getfixturevalue("installed").with_name("joborch"))]
    else:
        program = [sys.executable, str(ROOT / "joborch.py")]
    own = make_pair(program=program).start()
    files = {"2oob.pdb": (ROOT / "example" / "2oob.pdb").read_bytes()}
    done = run_to_end(own.server, (ROOT / "example" / "run.sh").read_text(), files)
    assert done["status"] == "Completed"
    assert download(own.server, done["id"]).text("summary.txt").startswith("2oob: 36 residue pairs")
    command = [*program, "list", "--user", "1", "--server", own.server.url]
    listed = subprocess.run(command, env=clean_environment(own.folder), capture_output=True, text=True, timeout=60)
    assert (listed.returncode, listed.stderr, listed.stdout.split("\t")[:3]) == (0, "", [str(done["id"]), "", "Completed"])
    for process in (own.server, own.client):
        assert process.health()["restart_needed"] is None
        page = process.get("/swagger-ui/").text
        assert ("swagger-ui-bundle.js" in page) == (way == "joborch.pyz")
        assert process.get("/api-docs/openapi.json").json()["openapi"].startswith("3.1")
        assert process.get("/swagger-ui/swagger-ui.css").status_code == (200 if way == "joborch.pyz" else 404)
        assert "Traceback" not in process.log
