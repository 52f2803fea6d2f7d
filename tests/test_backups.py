"""Backups: a copy of the database while the server writes, and the way back: no id is given twice, nothing is deleted."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from pathlib import Path

import pytest
from conftest import MakePair
from harness import Pair, download, free_port, replace, submit, wait_for, wait_status
from history import gather, read_log
from world import Desk, HandClock, command, new_job, tried

import joborch
from joborch import ConfigError, DataFolder, JoborchError, Status, Store
from joborch_base import statements
from joborch_base.database import damage_of
from joborch_plugins.admin import back_up, restore


@pytest.fixture(name="desk")
def desk_fixture(data: DataFolder) -> Desk:
    """A server at whose client nobody is; its database is where a restore looks for it."""
    return Desk(data, f"http://127.0.0.1:{free_port()}")


def database(desk: Desk) -> str:
    return desk.store.path


def damage(path: str) -> None:
    """Overwrite pages in the middle of a database."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = Path(path).stat().st_size
    with Path(path).open("r+b") as file:
        for page in range(2, size // 4096):
            file.seek(page * 4096)
            file.write(b"\xa5" * 200)


def test_a_backup_is_of_one_instant_while_others_write(desk: Desk, tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            desk.store.add(new_job(), "uploaded")

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for number in range(5):
            back_up(database(desk), tmp_path / "backup")
            copy = read_log(tmp_path / "backup")
            assert all(len(copy.moves_of(job)) == 1 for job in copy.rows), number
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert (tmp_path / "backup").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if "backup" in path.name] == ["backup"]


def test_a_backup_that_fails_leaves_the_older_one(desk: Desk, tmp_path: Path) -> None:
    desk.upload()
    back_up(database(desk), tmp_path / "backup")
    before = (tmp_path / "backup").read_bytes()
    desk.store.close()
    damage(database(desk))
    assert isinstance(tried(lambda: back_up(database(desk), tmp_path / "backup"), JoborchError), JoborchError)
    assert (tmp_path / "backup").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if "backup" in path.name] == ["backup"]


@pytest.mark.parametrize("kind", ["none", "text", "other", "newer", "damaged"])
def test_what_is_no_backup_is_not_put_in_place(kind: str, desk: Desk, tmp_path: Path) -> None:
    """The database that is there stays, whatever it is."""
    job = desk.upload()
    bad = tmp_path / "bad"
    back_up(database(desk), bad)
    if kind == "none":
        bad.unlink()
    elif kind == "text":
        bad.write_text("no database at all" * 100)
    elif kind == "damaged":
        damage(str(bad))
    else:
        with contextlib.closing(sqlite3.connect(bad)) as db:
            db.execute("PRAGMA user_version = 99" if kind == "newer" else "DROP TABLE jobs")
    desk.store.close()
    assert isinstance(tried(lambda: restore(database(desk), desk.data, str(bad)), (JoborchError, ConfigError)), JoborchError)
    desk.open()
    assert desk[job].status is Status.QUEUED
    assert desk.data.job(job.uuid).is_dir()


def test_the_way_back(desk: Desk, tmp_path: Path) -> None:
    kept = desk.upload()
    back_up(database(desk), tmp_path / "backup")
    instance = desk.store.read(statements.INSTANCE)[0]["instance"]
    lost = desk.upload()
    desk.data.result(lost.mark).write_bytes(b"result")
    desk.store.close()
    old, unclaimed = restore(database(desk), desk.data, str(tmp_path / "backup"))
    assert old and unclaimed
    desk.open()
    assert [job.id for job in desk.store.jobs("SELECT * FROM jobs")] == [kept.id]
    assert (unclaimed / "jobs" / lost.uuid / "run.sh").exists()
    assert (unclaimed / "results" / f"{lost.mark}.zip").read_bytes() == b"result"
    assert desk.data.job(kept.uuid).is_dir()
    assert desk.upload().id > lost.id, "nobody gets the id of somebody else's job"
    assert desk.store.read(statements.INSTANCE)[0]["instance"] != instance
    assert set(read_log(old).rows) == {kept.id, lost.id}, "with what stood in its WAL"


def test_an_empty_backup_skips_ids_too(desk: Desk, tmp_path: Path) -> None:
    back_up(database(desk), tmp_path / "backup")
    lost = desk.upload()
    desk.store.close()
    restore(database(desk), desk.data, str(tmp_path / "backup"))
    desk.open()
    assert desk.upload().id > lost.id + 1000


@pytest.mark.parametrize("mode", ["server", "client"])
def test_a_damaged_database_is_refused_with_the_way_out(mode: str, tmp_path: Path) -> None:
    path = str(tmp_path / "db")
    store = Store(path, mode, HandClock())
    for _ in range(300):
        store.add(new_job(), "uploaded")
    store.close()
    damage(path)
    error = tried(lambda: Store(path, mode, HandClock()), ConfigError)
    assert isinstance(error, ConfigError)
    assert path in str(error) and "damaged" in str(error)
    assert ("joborch restore" in str(error)) == (mode == "server")


def test_damage_that_is_found_in_the_background_stops_uploads(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large database is not checked to the end before the start."""
    replace(monkeypatch, "CHECK_PATIENCE_S", 0.0)
    for _ in range(300):
        desk.upload()
    desk.store.close()
    damage(database(desk))
    with contextlib.suppress(ConfigError):  # what it needs at once may be damaged as well
        desk.open()
        desk.store.look_for_damage()
        with pytest.raises(joborch.StorageError, match="damaged"):
            desk.store.check()
        return
    assert damage_of(sqlite3.connect(database(desk)))


@pytest.mark.parametrize(("mode", "way"), [("server", "joborch restore"), ("client", "move it away")])
def test_what_the_start_has_not_seen_is_checked_in_the_background(
    mode: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that was seen to its end is not read a second time; what is found says the way out of its own mode."""
    for found, wanted in (("", ""), (None, "page 3")):
        answers = [found, "page 3"]
        replace(monkeypatch, "damage_of", lambda *_, answers=answers: answers.pop(0))
        store = Store(str(tmp_path / f"db-{found}"), mode, HandClock())
        store.look_for_damage()
        assert (store.damage, way in caplog.text) == (wanted, bool(wanted))
        store.close()


def test_a_check_that_takes_too_long_is_given_up(desk: Desk) -> None:
    for _ in range(2000):
        desk.store.add(new_job(), "uploaded")
    assert damage_of(desk.store.db, 0.0) is None
    assert damage_of(desk.store.db) == ""
    assert desk.store.add(new_job(), "uploaded")


def test_a_new_database_beside_old_files_deletes_nothing(make_pair: MakePair) -> None:
    """Somebody removed the database: the files are set aside, not swept."""
    pair = make_pair()
    pair.server.start()
    job = submit(pair.server, "true")
    folder = next((pair.server.data / "jobs").iterdir())
    pair.server.stop()
    for path in pair.server.data.glob("joborch.db*"):
        path.unlink()
    pair.server.start()
    (unclaimed,) = pair.server.data.glob("unclaimed-*")
    assert (unclaimed / "jobs" / folder.name / "run.sh").read_text() == "true"
    assert pair.server.get(f"/jobs/{job}").status_code == 404
    assert str(unclaimed) in pair.server.log


def test_backup_and_restore_as_a_person_does_them(own_pair: Pair, tmp_path: Path) -> None:
    """While jobs run; what has run since is not run again, its result is there, and what is damaged says what to do."""
    server, backup = own_pair.server, str(tmp_path / "backup.db")
    done = submit(server, f"echo ran >> {tmp_path / 'ran'}; echo 1 > out")
    wait_status(server, done, "Completed")
    running = submit(server, f"echo ran >> {tmp_path / 'ran'}; while [ ! -e {tmp_path / 'go'} ]; do sleep 0.02; done; echo 2 > out")
    wait_status(server, running, "Running")
    said = command(server, "backup", backup)
    assert (said.returncode, said.stderr) == (0, "")
    assert backup in said.stdout
    (tmp_path / "go").touch()
    wait_status(server, running, "Completed")
    later = submit(server, "echo 3 > out")
    wait_status(server, later, "Completed")
    said = command(server, "restore", backup)
    assert said.returncode == 2 and str(server.pid) in said.stderr, "not while it runs"
    server.stop()
    damage(str(server.data / "joborch.db"))
    status, text = server.start_refused()
    assert status == 2 and "joborch restore" in text
    said = command(server, "restore", backup)
    assert (said.returncode, said.stderr) == (0, "")
    assert "unclaimed-" in said.stdout and "replaced-" in said.stdout
    server.start()
    assert wait_status(server, running, "Completed")["attempt"] == 1
    assert [download(server, job).text("out") for job in (done, running)] == ["1\n", "2\n"]
    assert server.get(f"/jobs/{later}").status_code == 404
    new = submit(server, "echo 4 > out")
    assert new > later
    wait_status(server, new, "Completed")
    assert (tmp_path / "ran").read_text() == "ran\n" * 2, "nothing ran twice"
    wait_for(lambda: server.get("/health").status_code == 200, what="health")
    assert gather(server.data / "joborch.db").server.rows.keys() == {done, running, new}
