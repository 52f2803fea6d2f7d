"""Folders and files that are exchanged for links while they are read, packed or removed: nothing outside is found, and nothing touched."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import SCRIPT_UIDS, replace, wait_for
from world import Yard, ask, exchange, exchanging

import joborch
from joborch import DataFolder, Job, Status, clean_tick, run_tick
from joborch_base import files
from joborch_base.usage import folder_bytes

pytestmark = pytest.mark.usefixtures("strangers_are_safe")

SECRET = b"secret"
# Exchanges each of these names for a link, all the while (renameat2(2); 2 is RENAME_EXCHANGE).
SWAPPER = """
import ctypes, os, sys
rename, foreign, names, count = ctypes.CDLL(None).renameat2, sys.argv[1], sys.argv[2:], 0
for name in names:
    os.symlink(foreign + ("/a" if os.path.isfile(name) else ""), name + ".link")
pairs = [(name.encode(), name.encode() + b".link") for name in names]
while not os.path.exists("stop"):
    for one, other in pairs:
        rename(-100, one, -100, other, 2)
    count += 1
    if count == 1000:
        open("swapping", "w").close()
"""
INSIDE = "d d/inner out $TMPDIR/d"  # what a script can exchange wherever it runs
AROUND = "../work ../stdout ../exit.json ../started.1 $TMPDIR ../../$JOBORCH_MARK"  # and what only one that is not isolated can
SCRIPT = """mkdir -p d/inner $TMPDIR/d; touch d/{{1..50}} d/inner/{{1..50}}; echo own > out; ln -s {foreign} here
exec /usr/bin/python3 swapper.py {foreign} {names}
"""


def facts(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a folder: mode, time of change, content."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        state = path.lstat()
        found[str(path)] = (state.st_mode, state.st_mtime_ns, path.read_bytes() if stat.S_ISREG(state.st_mode) else b"")
    return found


@pytest.fixture(name="yard", params=["none", "process", "full", "user"])
def yard_fixture(request: pytest.FixtureRequest, data: DataFolder) -> Iterator[Yard]:
    """A client in this process for each value, which looks at the size of work folders, too."""
    if request.param == "user" and os.geteuid() != 0:
        pytest.skip("needs root")
    settings = {"JOBORCH_UIDS": SCRIPT_UIDS} if request.param == "user" else {}
    made = Yard(data, JOBORCH_ISOLATION=request.param, JOBORCH_MAX_WORK="1G", **settings)
    yield made
    made.close()


def look(yard: Yard, job: Job) -> None:
    """All that a client reads of a payload for its callers, and by itself; nothing of it is foreign."""
    said = [ask(yard.client, "GET", f"/{path}/{job.id}") for path in ("retrieve_partial", "logs", "files")]
    said += [ask(yard.client, "GET", f"/file/{job.id}?path={path}") for path in ("d/1", "d/a", "out", "out.link", "d.link/a")]
    bodies = [each.body for each in said if each.body[:2] != b"PK"]
    if said[0].status == 200:
        shown = yard.zip(job, "retrieve_partial")
        bodies += [shown.read(name) for name in shown.namelist() if not name.startswith(".joborch/left-out")]
    assert not any(SECRET in body for body in bodies)
    run_tick(yard.client)
    joborch.limit_tick(yard.client)
    joborch.sync_tick(yard.client)


@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_a_script_that_exchanges_its_folders_for_links(end: str, yard: Yard, foreign: Path) -> None:
    """While it runs and is shown, while the client is started again, when it ends, when it is packed, and when it is cleaned."""
    before = facts(foreign)
    apart = yard.client.config.isolation in ("full", "user")
    script = SCRIPT.format(foreign=foreign, names=INSIDE if apart else f"{INSIDE} {AROUND}")
    job = yard.submit(script, {"swapper.py": SWAPPER.encode()})
    work = os.open(yard.folder(job) / "work", os.O_RDONLY)  # whatever its name is later
    try:
        run_tick(yard.client)
        wait_for(lambda: is_there(work, "swapping") or yard[job].status is not Status.RUNNING, what="the script")
        assert yard[job].status is Status.RUNNING, yard[job].reason
        wait_for(lambda: is_led_astray(work), what="a look by paths that finds what is outside")
        for _ in range(10):
            look(yard, job)
        yard.restart()
        for _ in range(10):
            look(yard, job)
        if end == "is killed":
            yard.store.request_kill(job.id, joborch.Cause.CANCELLED)
            joborch.end_tick(yard.client)
        os.close(os.open("stop", os.O_WRONLY | os.O_CREAT, dir_fd=work))
    finally:
        os.close(work)
    wait_for(lambda: is_over(yard, job), what="its end")
    said = ask(yard.client, "GET", f"/retrieve/{job.id}")
    if said.body[:2] == b"PK":
        shown = yard.zip(job)
        assert not any(SECRET in shown.read(name) for name in shown.namelist())
    else:
        assert SECRET not in said.body
    clean(yard, job)
    assert facts(foreign) == before


def is_there(folder: int, name: str) -> bool:
    """Whether an open folder has this entry."""
    try:
        return bool(os.stat(name, dir_fd=folder))
    except FileNotFoundError:
        return False


def is_led_astray(work: int) -> bool:
    """Whether who follows links finds the foreign file in the script's folder: so the attack works."""
    try:
        file = os.open("d/a", os.O_RDONLY, dir_fd=work)
    except OSError:
        return False
    try:
        return SECRET in os.read(file, 100)
    finally:
        os.close(file)


def is_over(yard: Yard, job: Job) -> bool:
    """Tick, and tell whether a payload has ended."""
    run_tick(yard.client)
    return yard[job].status is not Status.RUNNING


def clean(yard: Yard, job: Job) -> None:
    """The cleaner's time has come."""
    yard.clock.pass_s(10 * yard.client.config.max_age_s)

    def cleaned() -> bool:
        clean_tick(yard.client)
        return yard[job].status is Status.CLEANED

    wait_for(cleaned, what="it to be cleaned")


@pytest.mark.parametrize("what", ["its folder", "work", "TMPDIR", "stdout", "exit.json"])
def test_a_stranger_who_exchanges_what_a_payload_left(what: str, data: DataFolder, foreign: Path) -> None:
    """While the client is started again, judges and packs it, and while it cleans up."""
    before = facts(foreign)
    yard = Yard(data)
    try:
        job = yard.ready(yard.submit("touch {1..50} $TMPDIR/own; echo own; READY; BLOCK"))
        folder = yard.folder(job)
        place = {"its folder": folder, "TMPDIR": (folder / "tmp").readlink()}.get(what, folder / what)
        link = place.with_name(f"{place.name}.link")
        link.symlink_to(foreign if place.is_dir() else foreign / "a")
        pipe = os.open(folder / "go", os.O_RDWR)
        with exchanging(place, link):
            yard.restart()
            os.write(pipe, b"go\n")
            wait_for(lambda: is_over(yard, job), what="its end")
            for _ in range(10):
                said = ask(yard.client, "GET", f"/retrieve/{job.id}")
                assert SECRET not in said.body
                look(yard, job)
            clean(yard, job)
        os.close(pipe)
        assert facts(foreign) == before
    finally:
        yard.close()
        for left in (place, link):
            if left.is_symlink():
                left.unlink()
            shutil.rmtree(left, ignore_errors=True)


def test_a_folder_exchanged_just_before_it_is_removed(tmp_path: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it cannot be removed at once, and gets rights first: those of what it was exchanged for stay as they are."""
    for path in (foreign / "d", foreign / "a"):
        path.chmod(0o400 if path.is_file() else 0o500)
    before, folder, link = facts(foreign), tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(foreign)
    real = shutil.rmtree

    def swap(path: Path) -> None:
        exchange(folder, link)
        real(path)

    monkeypatch.setattr(files.shutil, "rmtree", swap)
    joborch.remove_tree(folder)
    assert facts(foreign) == before
    assert not os.path.lexists(folder) and link.is_dir()


def test_the_size_of_a_folder_is_its_own(tmp_path: Path, foreign: Path) -> None:
    """A link in the place of a folder adds nothing, and leads the look nowhere."""
    (foreign / "large").write_bytes(bytes(1 << 20))
    work = tmp_path / "own/work"
    (work / "d").mkdir(parents=True)
    (work / "link").symlink_to(foreign)
    with exchanging(work / "d", work / "link"):
        assert max(folder_bytes(str(work)) for _ in range(2000)) < 1 << 20
    shutil.rmtree(work)
    work.symlink_to(foreign)
    assert folder_bytes(str(work)) == 0


def test_a_stream_exchanged_for_a_link_changes_nothing_for_others(data: DataFolder, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its middle is not freed; that of other payloads' output is, as before."""
    yard = Yard(data, JOBORCH_LOG_LIMIT="64K")
    try:
        job = yard.run(yard.submit("head -c 1000000 /dev/zero"))
        real, stream = files.state_below, yard.folder(job) / "stdout"

        def swap(folder: Path, name: str) -> os.stat_result:
            state = real(folder, name)
            stream.unlink()
            stream.symlink_to(foreign / "a")
            return state

        replace(monkeypatch, "state_below", swap)
        joborch.bound_outputs(yard.client, str(yard.folder(job)))
        assert stream.is_symlink() and yard.client.holes
        assert SECRET in (foreign / "a").read_bytes()
    finally:
        yard.close()
