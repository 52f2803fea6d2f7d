"""Upgrade and downgrade by a person: another joborch.pyz in the place of the one that runs, with jobs in every state on both sides."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from harness import ENDED, NOBODY_UID, JoinedPair, Pair, Process, download, open_program, replace, submit, wait_for, wait_status
from history import Expected, assert_proven, gather, mark_lines
from releases import FIRST, STABLE, archive_of
from world import Desk, HandClock, command, tried

import joborch
from joborch import ConfigError, JoborchError, Status, Store
from joborch_base import statements
from joborch_plugins import admin

RELEASED = Path(__file__).parent / "joborch-0.1.0.sql"  # a database that the Store of 0.1.0 made

LIMIT_S = 90.0  # from an archive, a process compiles itself when it starts


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """joborch.pyz of 0.1.0."""
    return archive_of(FIRST, tmp_path_factory.mktemp("first"))


QUOTA = {"SERVICE_EXAMPLE_RUNS_PER_USER": "2", "SERVICE_EXAMPLE_MAX_RUNS": "20"}


class Site:
    """A server and a client that run from one archive, with jobs in every state, and what must become of each."""

    def __init__(self, make_pair: MakePair, folder: Path, archive: Path) -> None:
        self.folder, self.archive = folder, folder / "joborch.pyz"
        shutil.copy(archive, self.archive)
        self.pair = make_pair(program=[sys.executable, str(self.archive)], server=QUOTA, client={"JOBORCH_SLOTS": "6"})
        self.server, self.client = self.pair.server, self.pair.client
        self.expected: dict[int, Expected] = {}
        self.terminated: list[int] = []
        for process in (self.client, self.server):
            process.start(LIMIT_S)

    @property
    def marks(self) -> Path:
        return self.folder / "marks"

    def submit(self, script: str, end: str = "Completed", **fields: Any) -> int:
        """Send a script that must run once and come to this end."""
        causes = {"Failed": ["user"], "Killed": ["cancelled"]}.get(end, [])
        members = {"out": hashlib.sha256(b"done\n").hexdigest()} if end == "Completed" else {}
        number = submit(self.server, mark_lines(self.marks) + script, **fields)
        self.expected[number] = Expected(ends=[end], causes=causes, members=members, most_attempts=1)
        return number

    def gated(self, gate: str, **fields: Any) -> int:
        """Send a script that runs until this gate is opened."""
        return self.submit(f"until [ -e {self.folder / gate} ]; do sleep 0.05; done; echo done > out", **fields)

    def open(self, gate: str) -> None:
        """Open a gate."""
        (self.folder / gate).touch()

    def terminate(self, number: int) -> None:
        """Ask for the end of a job."""
        self.terminated.append(number)
        assert self.server.post(f"/terminate/{number}").status_code in (200, 202)

    def fill(self) -> None:
        """Have jobs that ended in every way, that run, that wait for their turn, and that follow others."""
        ended = [self.submit("echo done > out", user_id=1), self.submit("exit 3", "Failed", user_id=1)]
        stopped = self.submit("sleep 600", "Killed", user_id=2)
        running = [self.gated("later", user_id=3), self.gated("later", user_id=3), self.gated("meanwhile", user_id=4)]
        for number in (stopped, *running):
            wait_status(self.server, number, "Running", limit_s=LIMIT_S)
        queued = [self.submit("echo done > out", user_id=3) for _ in range(3)]
        self.submit("echo done > out", user_id=3, after=running[0])
        self.terminate(stopped)
        self.terminate(queued.pop())
        for number in (*ended, stopped):
            wait_status(self.server, number, *ENDED, limit_s=LIMIT_S)
        assert {self.server.job(number)["status"] for number in queued} == {"Queued"}

    def settle(self) -> None:
        """Wait for the end of all jobs, and prove that none was lost, run twice or left behind."""
        self.open("later")
        for number in self.expected:
            wait_status(self.server, number, *ENDED, limit_s=LIMIT_S)
        wait_for(lambda: not {job["status"] for job in self.server.jobs()} - ENDED, LIMIT_S, "the end of all jobs")
        # Killed before it ran: `starts` looks for marks of Completed jobs alone.
        assert_proven(
            gather(
                self.server.data / "joborch.db",
                clients={"client": self.client.data / "joborch.db"},
                marks=[self.marks],
                results=self.server.data / "results",
                expected=self.expected,
                terminated=self.terminated,
            )
        )

    def copies(self, process: Process) -> list[Path]:
        """The copies of its database from before a migration."""
        return sorted(process.data.glob("joborch.db.schema-*"))


def by_rename(new: Path, target: Path) -> None:
    """As `mv` does: what runs keeps the old file."""
    fresh = target.with_name("fresh")
    shutil.copy(new, fresh)
    fresh.replace(target)


def server_first(site: Site) -> None:
    site.server.restart(LIMIT_S)
    site.open("meanwhile")
    site.client.restart(LIMIT_S)


def client_first(site: Site) -> None:
    site.client.restart(LIMIT_S)
    site.open("meanwhile")
    site.server.restart(LIMIT_S)


def both_at_once(site: Site) -> None:
    """One job ends while neither runs."""
    for process in (site.server, site.client):
        process.stop()
    site.open("meanwhile")
    for process in (site.server, site.client):
        process.spawn()
    for process in (site.server, site.client):
        wait_for(process._healthy, LIMIT_S, f"/health of the {process.role}")


def killed(site: Site) -> None:
    """Both die while a job is on its way, and while a job is to be stopped that its client has not heard of."""
    to_end = site.submit("sleep 600", "Killed", user_id=6)
    wait_status(site.server, to_end, "Running", limit_s=LIMIT_S)
    os.kill(site.client.pid, signal.SIGSTOP)
    sent = site.submit("echo done > out", user_id=7)
    wait_for(lambda: site.server.job(sent)["status"] == "Processing", LIMIT_S, "a job on its way")
    site.terminated.append(to_end)
    with contextlib.suppress(OSError):  # the answer may wait for the client
        site.server.post(f"/terminate/{to_end}", timeout=1)
    with contextlib.closing(sqlite3.connect(site.server.data / "joborch.db")) as db:
        asked = "SELECT kill_requested_at FROM jobs WHERE id = ?"
        wait_for(lambda: db.execute(asked, (to_end,)).fetchone()[0], LIMIT_S, "the request to stop a job")
    for process in (site.server, site.client):
        process.kill()
    site.open("meanwhile")
    for process in (site.client, site.server):
        process.start(LIMIT_S)


@pytest.mark.parametrize(
    ("swap", "restart"),
    [(by_rename, server_first), (by_rename, client_first), (by_rename, both_at_once), (shutil.copy, killed)],
    ids=lambda each: each.__name__,
)
def test_from_the_first_release(
    swap: Callable[[Path, Path], object],
    restart: Callable[[Site], None],
    first_release: Path,
    pyz: Path,
    make_pair: MakePair,
    tmp_path: Path,
) -> None:
    """Nothing is lost, run twice or left behind, and both sides keep a copy of their database as it was."""
    site = Site(make_pair, tmp_path, first_release)
    site.fill()
    swap(pyz, site.archive)
    restart(site)
    site.settle()
    for process in (site.server, site.client):
        [copy] = site.copies(process)
        assert f"{copy} is a copy for the older version" in process.log
        with contextlib.closing(sqlite3.connect(copy)) as db:
            assert db.execute("PRAGMA user_version").fetchone()[0] == 3


def test_back_to_the_first_release(first_release: Path, pyz: Path, make_pair: MakePair, tmp_path: Path) -> None:
    """The copy from before the migration restores by the older archive; what came since is listed before."""
    site = Site(make_pair, tmp_path, first_release)
    done = site.submit("echo done > out", user_id=1)
    wait_status(site.server, done, "Completed", limit_s=LIMIT_S)
    runs = site.gated("later", user_id=1)
    wait_status(site.server, runs, "Running", limit_s=LIMIT_S)
    by_rename(pyz, site.archive)
    both_at_once(site)
    later = site.submit("echo done > out", user_id=2)
    site.settle()
    for process in (site.server, site.client):
        process.stop()
    [copy] = site.copies(site.server)

    old = tmp_path / "old.pyz"
    shutil.copy(first_release, old)
    site.server.program = site.client.program = [sys.executable, str(old)]
    status, said = site.server.start_refused(LIMIT_S)
    assert status == 2 and "newer joborch" in said
    listed = command(site.server, "restore", "--dry-run", str(copy))
    assert (listed.returncode, listed.stderr) == (0, "")
    assert f"  job {later} (service=example user=2): Completed, not in the backup\n" in listed.stdout
    assert f"  job {runs} (service=example user=1): Completed, Running in the backup\n" in listed.stdout
    assert f"job {done} " not in listed.stdout
    words = [*site.server.program, "restore", str(copy)]
    restored = subprocess.run(words, env=site.server.environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert restored.returncode == 0, restored.stderr
    site.client.settings["DATA_PATH"] = str(tmp_path / "empty")  # as docs/operate.md says of a client without jobs
    for process in (site.client, site.server):
        process.start(LIMIT_S)
    assert download(site.server, done).text("out") == "done\n"
    again = wait_status(site.server, runs, "Completed", limit_s=LIMIT_S)
    assert again["attempt"] == 2, "it ran in the copy, so it runs again, as was said"
    assert site.server.get(f"/jobs/{later}").status_code == 404


# == The copy from before a migration ==


def older(path: Path) -> Path:
    """A database as 0.1.0 left it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(RELEASED.read_text())
    return path


def schema_of(path: Path) -> int:
    """The schema of a database."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def names(folder: Path) -> list[str]:
    """What is in a folder, without the time in names."""
    return sorted(re.sub(r"-\d{8}-\d{6}", "-TIME", path.name) for path in folder.iterdir())


def test_a_migration_that_is_cut_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of the schema from which it began stays; what a killed start has left of a copy goes."""
    path = older(tmp_path / "db")
    (tmp_path / "db.schema-3.part").write_bytes(b"half of a copy")
    replace(monkeypatch, "MIGRATIONS", {**statements.MIGRATIONS, 6: "BEGIN; CREATE TABLE paused (service TEXT); SELECT * FROM nowhere;"})
    error = tried(lambda: Store(str(path), "server", HandClock()), ConfigError)
    assert "nowhere" in str(error) and schema_of(path) == 6
    monkeypatch.undo()
    Store(str(path), "server", HandClock()).close()
    assert schema_of(path) == statements.SCHEMA_VERSION
    assert names(tmp_path) == ["db", "db.schema-3-TIME", "db.schema-6-TIME"]
    Store(str(path), "server", HandClock()).close()
    assert names(tmp_path) == ["db", "db.schema-3-TIME", "db.schema-6-TIME"], "once a migration, not once a start"


def test_a_migration_that_fails_again_and_again_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service manager starts the process every two seconds; a start that migrates nothing takes its copy back."""
    path = older(tmp_path / "db")
    replace(monkeypatch, "MIGRATIONS", {**statements.MIGRATIONS, 3: "BEGIN; CREATE TABLE half (id); SELECT * FROM nowhere;"})
    for _ in range(3):
        assert "nowhere" in str(tried(lambda: Store(str(path), "server", HandClock()), ConfigError))
        assert schema_of(path) == 3 and names(tmp_path) == ["db"]
    monkeypatch.undo()
    Store(str(path), "server", HandClock()).close()
    assert schema_of(path) == statements.SCHEMA_VERSION and names(tmp_path) == ["db", "db.schema-3-TIME"]


def test_a_database_that_this_user_may_not_write_to_is_no_reason_to_restore_a_backup(
    root: None, open_folder: Path, make_process: MakeProcess, pyz: Path
) -> None:
    """As after a start as root: the message names the owner and who needs access."""
    server = make_process("server", folder=open_folder / "server", user=NOBODY_UID, program=open_program(open_folder, pyz))
    server.start(LIMIT_S).stop()
    database = server.data / "joborch.db"
    os.chown(database, 0, 0)
    status, said = server.start_refused(LIMIT_S)
    assert status == 2 and f"{database} belongs to user id 0; let user id {NOBODY_UID}, who runs this, read and write it" in said
    assert "restore" not in said
    os.chown(database, NOBODY_UID, NOBODY_UID)
    server.start(LIMIT_S)


def test_without_room_for_the_copy_nothing_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = older(tmp_path / "db")

    def full(db: sqlite3.Connection, target: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    replace(monkeypatch, "copy_to", full)
    error = str(tried(lambda: Store(str(path), "server", HandClock()), ConfigError))
    assert "is not migrated without it: free 1" in error and "or start the older version again" in error
    assert schema_of(path) == 3 and names(tmp_path) == ["db"]


@pytest.mark.parametrize("mode", ["server", "client"])
def test_a_newer_database_is_refused_with_the_way_back(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "db"
    Store(str(path), mode, HandClock()).close()
    newer = statements.SCHEMA_VERSION + 1
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {newer}")
    error = str(tried(lambda: Store(str(path), mode, HandClock()), ConfigError))
    assert f"newer joborch (schema {newer}, this one knows {newer - 1}): run that version, or " in error
    for each in (3, newer - 1, newer):
        (tmp_path / f"db.schema-{each}-202611{each:02d}-120000").touch()
    (tmp_path / f"db.schema-{newer - 1}.part").touch()
    error = str(tried(lambda: Store(str(path), mode, HandClock()), ConfigError))
    if mode == "server":
        assert f"joborch restore {tmp_path}/db.schema-{newer - 1}-202611{newer - 1:02d}-120000 (with --dry-run it lists what came" in error
    else:
        assert "joborch client --drain" in error and "empty DATA_PATH" in error


def test_a_restore_lists_what_came_since(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each job that it loses or sets back; beforehand, too, and of a backup with an older schema."""
    backup = older(tmp_path / "backup")
    desk.store.close()
    database = Path(desk.store.path)
    for path in database.parent.glob(f"{database.name}*"):
        path.unlink()
    older(database)
    desk.open()
    config = dataclasses.replace(desk.server.config, db_path=desk.store.path)
    assert admin.command_restore(config, str(backup), is_dry_run=True) == 0
    same = capsys.readouterr().out
    assert "uploaded after the backup, so they must be sent again: none\nmoved since the backup" in same and ": none\n" in same
    waits = desk.store.get(6)
    assert waits is not None
    desk.store.move(waits, Status.KILLED, "terminated", cause="cancelled")
    later = desk.upload(user_id=9)
    lines = [
        f"  job {later.id} (service=example user=9): Queued, not in the backup\n",
        f"  job 6 (service=example user={waits.user_id}): Killed, Queued in the backup\n",
    ]
    assert admin.command_restore(config, str(backup), is_dry_run=True) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in lines) and said.count("  job ") == 3, "job 7 follows job 6, and can never run"
    desk.store.close()
    desk.data.lock.close()
    assert admin.command_restore(config, str(backup)) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in lines) and "restored" in said
    assert not list(database.parent.glob("*.restoring*")), "the migration of a backup leaves no copy beside it"
    bad = tmp_path / "bad"
    bad.write_text("no database at all" * 100)
    assert "cannot be compared" in str(tried(lambda: admin.command_restore(config, str(bad), is_dry_run=True), JoborchError))


# == Server and client of neighbouring versions ==


@pytest.mark.parametrize(("protocols", "called"), [([1], True), ([1, 2], True), (None, True), ([2, 3], False), ([], False), ("1", False)])
def test_a_client_with_another_protocol_is_not_called(protocols: object, called: bool) -> None:
    """And the reason says which of the two to replace. Clients from before 1.0 do not say what they speak."""
    said = {"version": "9.0.0", "nonce": "0" * 32, "proof": False, **({} if protocols is None else {"protocols": protocols})}
    answer = json.dumps(said).encode()
    if called:
        assert joborch.read_hello(200, answer)["nonce"] == "0" * 32
    else:
        error = str(tried(lambda: joborch.read_hello(200, answer), joborch.NothingSent))
        assert "this server protocol 1: replace the older joborch.pyz of the two; its jobs wait" in error


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the pinned version from which on neighbours work together."""
    return [sys.executable, str(archive_of(STABLE, tmp_path_factory.mktemp("stable")))]


@pytest.mark.parametrize("older", ["server", "client"])
@pytest.mark.parametrize("kind", [Pair, JoinedPair], ids=["called", "calls in"])
def test_neighbouring_versions_work_together(kind: type[Pair], older: str, stable: list[str], make_pair: MakePair, tmp_path: Path) -> None:
    """Jobs of every end, live output, a large file each way; and what runs meanwhile goes on when the older side is updated."""
    pair = make_pair(kind=kind)
    process = pair.server if older == "server" else pair.client
    new, process.program = process.program, stable
    server = pair.start().server
    large = os.urandom(3_000_000)
    done = submit(server, "cat large > copy; echo done > out", {"large": large}, user_id=1)
    failed = submit(server, "exit 3", user_id=2)
    stopped = submit(server, "sleep 600", user_id=3)
    held = submit(server, f"echo here; until [ -e {tmp_path / 'gate'} ]; do sleep 0.05; done; echo done > out", user_id=4)
    wait_status(server, stopped, "Running", limit_s=LIMIT_S)
    assert server.post(f"/terminate/{stopped}").status_code in (200, 202)
    assert wait_status(server, done, "Completed", limit_s=LIMIT_S) and download(server, done)["copy"] == large
    assert wait_status(server, failed, "Failed", limit_s=LIMIT_S)["exit_code"] == 3
    assert wait_status(server, stopped, "Killed", limit_s=LIMIT_S)["cause"] == "cancelled"
    wait_status(server, held, "Running", limit_s=LIMIT_S)
    with server.get(f"/jobs/{held}/logs?follow=1", stream=True) as live:
        assert next(live.iter_lines()) == b"here"
    process.program = new
    process.restart(LIMIT_S)
    (tmp_path / "gate").touch()
    assert wait_status(server, held, "Completed", limit_s=LIMIT_S)["attempt"] == 1
