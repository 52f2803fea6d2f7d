"""The disk lies: full, read-only, gone, locked or damaged under either side; nothing is lost, and work goes on by itself.

The first half counts pages and files in this process, where a tick stands still; the second half has real processes. What
a kernel does to a program whose disk fails is done by `liar.c`, which the dynamic linker puts before the C library.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    BOUNDARY,
    ENDED,
    LinkCaller,
    Pair,
    Process,
    assert_error,
    assert_error_body,
    download,
    field_part,
    file_part,
    form,
    free_port,
    nothing_left,
    parse_answer,
    raw_head,
    read_all,
    replace,
    submit,
    upload,
    wait_for,
    wait_status,
)
from world import (
    AT_HOME,
    MIB,
    PAGE,
    Asked,
    Desk,
    Disk,
    Peer,
    Said,
    Yard,
    all_jobs,
    ask,
    digest_of,
    event,
    events,
    reasons,
    reply,
    send_next,
    submit_payload,
    zip_reply,
)

import joborch
from joborch import (
    DataFolder,
    Job,
    Status,
    StorageError,
    Store,
    end_tick,
    fetch_tick,
    get_tick,
    kill_tick,
    limit_tick,
    run_tick,
    watch_tick,
)
from joborch_base import statements
from joborch_base.vocabulary import BACKOFF_LAST_S

pytestmark = pytest.mark.usefixtures("no_long_polls")


FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
REFUSED = (503, 507)


# == Disks ==


@pytest.fixture
def make_disk(tmp_path: Path, root: None) -> Iterator[Callable[..., Disk]]:
    """Makes small disks, taken away with the test."""
    made: list[Disk] = []

    def make(options: str = "size=32m", path: Path | None = None) -> Disk:
        made.append(Disk(path or tmp_path / f"disk{len(made)}", options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def disk(tmp_path: Path, make_disk: Callable[..., Disk]) -> Disk:
    """A small disk below the data folder of the in-process tests: to be asked for before `data` and what needs it."""
    return make_disk("size=32m,nr_inodes=200", tmp_path / "data")


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """The database is locked by somebody else."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def impatient(store: Store) -> None:
    """Let a store wait a millisecond for a lock, instead of 10 s."""
    store.db.execute("PRAGMA busy_timeout = 1")


# == A server in this process ==


@pytest.fixture
def desk(disk: Disk, data: DataFolder, peer: Peer, tmp_path: Path) -> Iterator[Desk]:
    """A server whose files are on the small disk, and whose database is not."""
    (data.path / "server.db").symlink_to(tmp_path / "server.db")
    made = Desk(data, peer.url, JOBORCH_MIN_FREE="0")
    impatient(made.store)
    yield made
    made.store.close()


FILES = {"run.sh": b"true\n", "two-pages": bytes(2 * PAGE), "folder/one-page": bytes(PAGE)}  # 4 pages
PARTS = [file_part(name, content) for name, content in FILES.items()]


def uploaded(desk: Desk) -> Said:
    """POST /upload of FILES."""
    body = form([*PARTS, field_part("user_id", "1"), field_part("service", "example")])
    return ask(desk.server, "POST", "/upload", body, Content_Type=FORM_TYPE)


def check_refused(said: Said, *codes: int) -> None:
    """A clean refusal, with its reason."""
    assert said.status in (codes or REFUSED), said
    assert_error_body(said.headers["Content-Type"], said.body)
    assert int(said.headers["Retry-After"]) > 0


def rows(desk: Desk) -> list[Job]:
    """All jobs."""
    return all_jobs(desk.store)


@pytest.mark.parametrize("pages", range(6))
def test_an_upload_to_a_disk_with_so_many_pages_left(pages: int, disk: Disk, desk: Desk) -> None:
    """201 where all fits, else 507 and nothing of it stays; with room again the next one is taken."""
    disk.fill(pages)
    said = uploaded(desk)
    if pages >= 4:
        assert said.status == 201, said
    else:
        check_refused(said, 507)
        assert (rows(desk), list(desk.data.jobs.iterdir())) == ([], [])
    disk.free()
    assert uploaded(desk).status == 201


@pytest.mark.parametrize("pages", [4, 5, 6, 8, 12, 24])
def test_a_database_with_so_many_pages_left(pages: int, disk: Disk, data: DataFolder, peer: Peer) -> None:
    """What was answered with 201 is there, with its files, also for a server that starts later; what was not is not."""
    desk = Desk(data, peer.url)
    disk.fill(pages)
    told = []
    for _ in range(8):
        said = uploaded(desk)
        if said.status == 201:
            told.append(said.json["id"])
        else:
            check_refused(said)
    assert len(told) < 8, "it was to become full"
    disk.free()
    told.append(uploaded(desk).json["id"])
    desk.restart()
    assert [job.id for job in rows(desk)][::-1] == told
    for job in rows(desk):
        assert (desk.data.job(job.uuid) / "two-pages").read_bytes() == FILES["two-pages"]
    assert len(list(desk.data.jobs.iterdir())) == len(told)
    desk.store.close()


@pytest.mark.parametrize("pages", [0, 1, 4, 5])
def test_a_result_for_a_disk_with_so_many_pages_left(pages: int, disk: Disk, desk: Desk, peer: Peer) -> None:
    """The job is Unknown and says why, nothing of the part stays, and it is Completed once there is room."""
    result = random.Random(1).randbytes(5 * PAGE)
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [zip_reply(result, Repr_Digest=digest_of(result))]
    disk.fill(pages)
    found = desk.settle(job)
    if pages < 5:
        assert found.status is Status.UNKNOWN
        assert "no space left on device" in found.reason.lower()
        assert desk.quiet()
        disk.free()
        desk.clock.pass_s(2)
        assert fetch_tick(desk.server, desk.link)
    assert desk[job].status is Status.COMPLETED
    assert desk.data.result(job.mark).read_bytes() == result


@pytest.mark.parametrize("fails", range(6))
def test_an_upload_whose_fsync_failed_is_never_taken(fails: int, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three files, their folder, the job's folder and the folder of all: whichever was it."""
    real, calls = os.fsync, list[int]()

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) - 1 == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    check_refused(uploaded(desk))
    assert len(calls) == fails + 1, "it is not tried again: the kernel forgets what it could not write"
    assert (rows(desk), list(desk.data.jobs.iterdir())) == ([], [])
    assert uploaded(desk).status == 201


@pytest.mark.parametrize("fails", [0, 1])
def test_a_result_whose_fsync_failed_is_fetched_again(fails: int, desk: Desk, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the file, or of the folder that it was moved to. All of it: what was here may not be on the disk."""
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [zip_reply(b"PK", Repr_Digest=digest_of(b"PK"), ETag='"x"')]
    real, calls = os.fsync, list[int]()

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) - 1 == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    found = desk.settle(job)
    assert found.status is Status.UNKNOWN
    assert "input/output error" in found.reason.lower()
    assert desk.quiet()
    desk.clock.pass_s(2)
    assert fetch_tick(desk.server, desk.link)
    assert desk[job].status is Status.COMPLETED
    assert [asked.headers.get("Range") for asked in peer.asked] == [None, None]


# == A database that fails at the wrong moment ==


def go_on(desk: Desk, seconds: int = 300) -> None:
    """Let all loops of a server tick for so long."""
    for _ in range(seconds):
        for tick in (get_tick, send_next, fetch_tick, kill_tick):
            tick(desk.server, desk.link)
        watch_tick(desk.server)
        desk.clock.pass_s(1)


SENT = {"taken": reply(200, {"id": 7}), "busy": reply(503), "not answered": b"", "refused": reply(400, {"message": "no"})}


@pytest.mark.parametrize("said", SENT)
def test_what_became_of_a_job_that_was_sent_cannot_be_stored(said: str, desk: Desk, peer: Peer) -> None:
    """Whether the client has it or not: the job must not stay Processing for ever, and hold a place of its user's quota."""
    job = desk.upload()
    locks = contextlib.ExitStack()

    def answer(_: object) -> bytes:
        locks.enter_context(locked(desk.store.path))
        return SENT[said]

    peer.says["/submit"] = [answer, SENT["refused"] if said == "refused" else SENT["taken"]]
    peer.says["/events"] = [events(next=1)]
    get_tick(desk.server, desk.link)
    with locks, pytest.raises(StorageError):
        send_next(desk.server, desk.link)
    go_on(desk)
    assert desk[job].status is (Status.INVALID if said == "refused" else Status.SUBMITTED), desk[job]
    assert {(asked.headers["X-Joborch-Uuid"], asked.headers["X-Joborch-Attempt"]) for asked in peer.asked if asked.method == "POST"} == {
        (job.uuid, "1")
    }


def since(asked: Asked) -> int:
    """From where on a server asks for news."""
    return int(re.search(r"since=(\d+)", asked.path)[1])  # type: ignore[index]


def test_the_end_of_a_job_is_told_while_its_row_cannot_be_written(desk: Desk, peer: Peer) -> None:
    """A client tells its news once; what could not be taken in must be asked for again."""
    job = desk.with_client(Status.PROCESSING)
    peer.says["/events"] = [events(next=1), events(event(job), next=9), events(next=9)]
    peer.says["/submit"] = [reply(200, {"id": 7})]
    peer.says["/retrieve/7"] = [zip_reply(b"PK")]
    get_tick(desk.server, desk.link)
    with locked(desk.store.path), pytest.raises(StorageError):
        get_tick(desk.server, desk.link)
    # Asked from before that news, the client tells it again; asked for what came after it, it does not.
    peer.says["/events"] = [lambda asked: events(*([event(job)] if since(asked) < 9 else []), next=9)]
    go_on(desk)
    assert desk[job].status is Status.COMPLETED, desk[job]


def test_the_news_of_one_job_cannot_be_stored_and_another_has_ended(desk: Desk, peer: Peer) -> None:
    """The second is not forgotten because of the first."""
    first, second = desk.with_client(Status.SUBMITTED), desk.with_client(Status.SUBMITTED, user_id=2)
    desk.store.move(second, Status.RUNNING, "", dest_id="8")
    both = [event(first, status="Running"), event(second, id=8)]
    peer.says["/retrieve/8"] = [zip_reply(b"PK")]
    peer.says["/events"] = [events(event(first, status="Prepared"), event(second, id=8, status="Running"), next=1), events(*both, next=9)]
    get_tick(desk.server, desk.link)
    with locked(desk.store.path), pytest.raises(StorageError):
        get_tick(desk.server, desk.link)
    peer.says["/events"] = [lambda asked: events(*(both if since(asked) < 9 else []), next=9)]
    go_on(desk)
    assert desk[second].status is Status.COMPLETED, desk[second]
    assert desk[first].status is Status.RUNNING, desk[first]


@pytest.mark.parametrize("code", [503, 507])
def test_a_client_that_is_full_for_an_hour_is_asked_less_and_less_often(code: int, desk: Desk, peer: Peer) -> None:
    """That it answers /events meanwhile is no reason to begin anew with short pauses; each try leaves two rows of history."""
    job = desk.upload()
    peer.says["/submit"] = [reply(code, {"message": "the disk is full"})]

    def long_poll(_: object) -> bytes:
        for _ in range(10):
            send_next(desk.server, desk.link)
            desk.clock.pass_s(1)
        return events(next=1)

    peer.says["/events"] = [events(next=1), long_poll]
    begin = desk.clock.now
    while desk.clock.now < begin + 3600:
        if not get_tick(desk.server, desk.link):
            desk.clock.pass_s(0.5)
    asked = sum(each.method == "POST" for each in peer.asked)
    assert desk[job].status is Status.QUEUED
    assert asked <= 2 * 3600 / BACKOFF_LAST_S, f"asked {asked} times in an hour; {desk[job].moves} rows of history"


# == A client in this process ==


@pytest.fixture
def yard(disk: Disk, data: DataFolder, tmp_path: Path) -> Iterator[Yard]:
    """A client whose files are on the small disk, and whose database is not."""
    made = Yard(data, DB_PATH=str(tmp_path / "client.db"))
    impatient(made.store)
    yield made
    made.close()


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """A file, on another disk, to which scripts append a line when they run."""
    path = tmp_path / "marks"
    path.touch()
    return path


@pytest.mark.parametrize("pages", range(6))
def test_a_payload_for_a_disk_with_so_many_pages_left(pages: int, disk: Disk, yard: Yard) -> None:
    disk.fill(pages)
    said = submit_payload(yard.client, PARTS)
    if pages >= 4:
        assert said.status == 200, said
    else:
        check_refused(said, 507)
        assert [*yard.data.jobs.iterdir(), *yard.data.tmp.iterdir()] == []
        assert all_jobs(yard.store) == []
    disk.free()
    assert submit_payload(yard.client, PARTS).status == 200


@pytest.mark.parametrize(("what", "left"), [*(("pages", left) for left in range(4)), *(("files", left) for left in range(7))])
def test_a_payload_is_started_on_a_disk_with_so_little_left(what: str, left: int, disk: Disk, yard: Yard, marks: Path) -> None:
    """It runs once and is Completed, or it does not run at all and the disk is named: never the fault of the user."""
    said = submit_payload(yard.client, [file_part("run.sh", f"{AT_HOME}echo ran >> {marks}".encode())])
    job = yard[said.json["id"]]
    if what == "pages":
        disk.fill(left)
    else:
        disk.take_files(left)
    ended = yard.run(job)
    if ended.status is Status.COMPLETED:
        assert marks.read_text() == "ran\n"
    else:
        assert (ended.status, ended.cause, marks.read_text()) == (Status.FAILED, "infrastructure", ""), ended.reason
        assert "disk is full" in ended.reason or "No space left" in ended.reason
    assert ended.status is Status.COMPLETED or left < 6, "the last of each has enough"


def test_the_handle_of_a_payload_cannot_be_stored_before_its_wrapper_has_come(yard: Yard, marks: Path, tmp_path: Path) -> None:
    """The row says Running, the process was started and takes its time, and nothing says so yet: it must not be given up."""
    begin = tmp_path / "begin"
    (tmp_path / "bin").mkdir()
    slow = f'#!/bin/sh\nuntil [ -e {begin} ]; do sleep 0.02; done\nexec /bin/bash "$@"\n'
    (tmp_path / "bin/bash").write_text(slow)
    (tmp_path / "bin/bash").chmod(0o755)
    executor: Any = yard.client.executor
    executor.inherited = {**executor.inherited, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    job = yard.submit(f"echo ran >> {marks}")
    try:
        start_and_lock(yard)
        run_tick(yard.client)
        assert yard[job].status is Status.RUNNING, f"{yard[job].reason}: it is about to run"
    finally:
        begin.touch()
    yard.until(job, Status.COMPLETED)
    assert marks.read_text() == "ran\n"


def start_and_lock(yard: Yard) -> None:
    """A tick that starts a payload, whose database cannot be written as soon as the process is there."""
    executor, locks = yard.client.executor, contextlib.ExitStack()
    real = executor.start

    def start(job: Job) -> str:
        handle = real(job)
        locks.enter_context(locked(yard.store.path))
        return handle

    executor.start = start  # type: ignore[method-assign]
    with locks, contextlib.suppress(StorageError):
        run_tick(yard.client)
    executor.start = real  # type: ignore[method-assign]


def test_the_time_limit_holds_for_a_payload_whose_handle_could_not_be_stored(yard: Yard) -> None:
    job = yard.submit("READY; BLOCK", X_Joborch_Timeout="5")
    start_and_lock(yard)
    (yard.folder(job) / "ready").read_text()
    for _ in range(3):
        yard.clock.pass_s(10)
        run_tick(yard.client)
        limit_tick(yard.client)
        end_tick(yard.client)
    assert (yard[job].status, yard[job].cause) == (Status.FAILED, "limit")


def test_a_result_is_packed_on_a_full_disk(disk: Disk, yard: Yard) -> None:
    """507, and the whole result once there is room."""
    big = random.Random(2).randbytes(3 * MIB)
    job = yard.run(yard.submit("true", {"big": big}))
    disk.fill(MIB // PAGE)
    check_refused(ask(yard.client, "GET", f"/retrieve/{job.id}"), 507)
    disk.free()
    assert yard.zip(job).read("big") == big


class FailingSpool:
    """A file of which one write fails, after 2 MiB."""

    def __init__(self, file: IO[bytes], code: int) -> None:
        self.file, self.code, self.failed = file, code, False

    def write(self, data: bytes) -> int:
        """Write, or fail."""
        if self.file.tell() > 2 * MIB and not self.failed:
            self.failed = True
            raise OSError(self.code, os.strerror(self.code))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def failing_chunks(code: int) -> Callable[[IO[bytes], int], Iterator[bytes]]:
    """A `file_chunks` that reads one chunk and then fails."""
    real = joborch.file_chunks

    def chunks(source: IO[bytes], count: int) -> Iterator[bytes]:
        for number, chunk in enumerate(real(source, count)):
            if number == 1:
                raise OSError(code, os.strerror(code))
            yield chunk

    return chunks


@pytest.mark.parametrize("call", ["read", "write"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ESTALE], ids=errno.errorcode.get)
def test_a_disk_that_fails_while_a_result_is_packed(call: str, code: int, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets a part of a file for the whole: an error, or at least the file is left out and named."""
    big = random.Random(3).randbytes(3 * MIB)
    job = yard.run(yard.submit("true", {"big": big, "small": b"x"}))
    if call == "read":
        replace(monkeypatch, "file_chunks", failing_chunks(code))
    else:
        real = DataFolder.spool
        monkeypatch.setattr(DataFolder, "spool", lambda folder: FailingSpool(real(folder), code))
    said = ask(yard.client, "GET", f"/retrieve/{job.id}")
    if said.status == 200:
        with zipfile.ZipFile(io.BytesIO(said.body)) as got:
            assert "big" not in got.namelist() or got.read("big") == big, "a part of a file as if it were the whole"
            assert "big" in got.read(".joborch/left-out.txt").decode()
    else:
        check_refused(said)
    monkeypatch.undo()
    assert yard.zip(job).read("big") == big


def test_a_client_whose_database_went_takes_nothing_more(yard: Yard) -> None:
    """Its rows would go nowhere: after the next start nobody would know what runs."""
    Path(yard.store.path).rename(yard.store.path + ".away")
    check_refused(submit_payload(yard.client, PARTS), 503)
    assert [*yard.data.jobs.iterdir(), *yard.data.tmp.iterdir()] == []
    Path(yard.store.path + ".away").rename(yard.store.path)
    assert submit_payload(yard.client, PARTS).status == 200


# == Real processes ==

LIAR = r"""
// What a program is told whose disk fails. The file that LIAR names says: CALLS ERRNO PATH. CALLS is `sync` or `write`;
// PATH is where the files begin that it concerns. While that file is empty or not there, nothing is touched.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static int lies(const char *kind, int folder, const char *path) {
    char text[4500] = "", calls[16], place[4200], where[4200] = "", link[64], full[8500];
    const char *name = getenv("LIAR");
    int code, kept = errno, file;
    if (!name || (file = syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC)) < 0) { errno = kept; return 0; }
    long count = syscall(SYS_read, file, text, sizeof text - 1);
    syscall(SYS_close, file);
    errno = kept;
    if (count <= 0 || sscanf(text, "%15s %d %4199s", calls, &code, place) != 3 || strcmp(calls, kind)) return 0;
    if (!path || path[0] != '/') {
        if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd"); else sprintf(link, "/proc/self/fd/%d", folder);
        if (readlink(link, where, sizeof where - 1) < 0) { errno = kept; return 0; }
    }
    snprintf(full, sizeof full, "%s%s%s", where, path && where[0] ? "/" : "", path ? path : "");
    errno = kept;
    if (strncmp(full, place, strlen(place))) return 0;
    errno = code;
    return 1;
}

#define CALL(type, name, given, passed, kind, folder, path) \
    type name given { \
        static type (*real) given; \
        if (lies(kind, folder, path)) return -1; \
        if (!real) real = (type (*) given) dlsym(RTLD_NEXT, #name); \
        return real passed; \
    }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        static int (*real)(const char *, int, ...); \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && lies("write", AT_FDCWD, path)) return -1; \
        if (!real) real = (int (*)(const char *, int, ...)) dlsym(RTLD_NEXT, #name); \
        return real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        static int (*real)(int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && lies("write", folder, path)) return -1; \
        if (!real) real = (int (*)(int, const char *, int, ...)) dlsym(RTLD_NEXT, #name); \
        return real(folder, path, flags, mode); \
    }

CALL(int, fsync, (int file), (file), "sync", file, NULL)
CALL(int, fdatasync, (int file), (file), "sync", file, NULL)
CALL(int, syncfs, (int file), (file), "sync", file, NULL)
CALL(ssize_t, write, (int file, const void *data, size_t size), (file, data, size), "write", file, NULL)
CALL(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at), "write", file, NULL)
CALL(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at), "write", file, NULL)
CALL(int, ftruncate, (int file, off_t size), (file, size), "write", file, NULL)
CALL(int, ftruncate64, (int file, off64_t size), (file, size), "write", file, NULL)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), "write", AT_FDCWD, path)
CALL(int, unlink, (const char *path), (path), "write", AT_FDCWD, path)
CALL(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags), "write", folder, path)
CALL(int, rmdir, (const char *path), (path), "write", AT_FDCWD, path)
CALL(int, rename, (const char *from, const char *to), (from, to), "write", AT_FDCWD, to)
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
"""


class Liar:
    """The library, and the file that tells it which lies to tell."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.orders = folder / "orders"
        self.settings: dict[str, str | None] = {"LD_PRELOAD": str(library), "LIAR": str(self.orders)}

    def say(self, calls: str, code: int, path: Path) -> None:
        """From now on these calls fail with this code for what begins with `path`."""
        temporary = self.orders.with_suffix(".new")
        temporary.write_text(f"{calls} {code} {path}")
        temporary.rename(self.orders)

    def stop(self) -> None:
        """From now on the truth."""
        self.orders.unlink()


@pytest.fixture(scope="module")
def liar_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built."""
    folder = tmp_path_factory.mktemp("liar")
    (folder / "liar.c").write_text(LIAR)
    library = folder / "liar.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "liar.c"), "-ldl"], check=True)
    return library


@pytest.fixture
def liar(liar_library: Path, tmp_path: Path) -> Liar:
    """A liar of the test's own, which tells the truth for now."""
    (tmp_path / "liar").mkdir()
    return Liar(liar_library, tmp_path / "liar")


def gated(gate: Path, marks: Path) -> str:
    """A script that leaves a result of 2 MB and a mark, and goes on until there is a file `gate`."""
    return f'echo done > result; head -c 2000000 /dev/urandom > big\necho ran >> {marks}\nuntil [ -e "{gate}" ]; do sleep 0.05; done\n'


def check_once(server: Process, number: int, marks: Path, limit_s: float = 40) -> dict[str, Any]:
    """The job is Completed in the end, at its first attempt; its moves join up; the script ran once, and its result is here."""
    job = wait_status(server, number, "Completed", limit_s=limit_s)
    moves = job["history"]
    assert all(before["to"] == after["from"] for before, after in zip(moves, moves[1:])), moves
    assert [move["to"] for move in moves if move["to"] in ENDED] == ["Completed"], moves
    assert (job["attempt"], job["cause"], marks.read_text()) == (1, None, "ran\n"), job
    assert download(server, number)["result"] == b"done\n"
    return job


def on_disk(process: Process, disk: Disk, **settings: str) -> Process:
    """Let a process have its data, the database too, on a small disk."""
    process.data = disk.path / "data"
    process.data.mkdir(exist_ok=True)
    process.settings.update({"DATA_PATH": str(process.data), "JOBORCH_MIN_FREE": "1K", **settings})
    return process


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_disk_is_full_while_a_job_runs(
    side: str, make_disk: Callable[..., Disk], make_pair: MakePair, tmp_path: Path, marks: Path
) -> None:
    """On either side: uploads are refused or wait and say why, what runs is not lost, and all goes on once there is room."""
    disk, own, gate = make_disk(), make_pair(), tmp_path / "gate"
    on_disk(getattr(own, side), disk)
    own.start()
    server = own.server
    earlier = submit(server, "head -c 100000 /dev/urandom > big")
    wait_status(server, earlier, "Completed")
    number = submit(server, gated(gate, marks))
    wait_status(server, number, "Running")
    wait_for(marks.read_text, what="the script's start")
    disk.fill()
    files = {"run.sh": b"true", "input": bytes(50_000)}
    if side == "server":
        assert_error(upload(server, files), REFUSED, "")
        assert download(server, earlier)["big"]
        gate.touch()
        wait_for(lambda: "could not be stored" in reasons(server.job(number)) or "cannot be written" in server.log, 30, "a reason")
        assert server.job(number)["status"] not in ENDED
    else:
        second = submit(server, "true", {"input": bytes(50_000)})  # before the first ends, whose row frees what was held back
        wait_for(lambda: "disk" in reasons(server.job(second)), 30, "a reason")
        assert server.job(second)["status"] not in ENDED
        gate.touch()
    disk.free()
    check_once(server, number, marks)
    if side == "client":
        wait_status(server, second, "Completed", limit_s=60)
    assert run_again(server) == "Completed"


def test_many_jobs_end_while_the_disk_of_the_server_is_full(
    make_disk: Callable[..., Disk], make_pair: MakePair, tmp_path: Path, marks: Path
) -> None:
    """That one runs cannot be stored, and in the same breath the client tells that others have ended: they are not forgotten."""
    disk, own = make_disk(), make_pair(client={"JOBORCH_SLOTS": "7"})
    on_disk(own.server, disk)
    server, client = own.start().server, own.client
    gates = [tmp_path / f"gate{number}" for number in (0, 1, 1, 2, 2)]
    numbers = [submit(server, gated(gate, marks), user_id=user) for user, gate in enumerate(gates[:3])]
    for number in numbers:
        wait_status(server, number, "Running")  # these three: senders overtake each other
    numbers += [submit(server, gated(gate, marks), user_id=user) for user, gate in enumerate(gates[3:], 3)]
    numbers += [submit(server, gated(gates[1], marks), user_id=user) for user in (5, 6)]
    wait_for(lambda: client.health()["running"] == 7, what="all at the client")
    disk.fill()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        other = LinkCaller(client).hello()
        last = other.call("GET", "/events?since=0").json()["next"]
        gates[0].touch()
        other.call("GET", f"/events?since={last}&wait=20")  # the server's poll, which waits since before, is answered with this
        gates[1].touch()
        wait_for(lambda: client.health()["running"] == 2 and marks.read_text().count("ran") == 7, what="all but two ended")
    finally:
        before = len(server.log)
        os.kill(server.pid, signal.SIGCONT)
    wait_for(lambda: re.search(r"full|cannot be written|No space", server.log[before:]), what="the server has felt it")
    disk.free()
    gates[3].touch()
    for number in numbers:
        assert wait_status(server, number, "Completed", limit_s=40)["attempt"] == 1
        assert download(server, number)["result"] == b"done\n"
    assert marks.read_text() == "ran\n" * 7


def run_again(server: Process) -> str:
    """How a further job ends."""
    return str(wait_status(server, submit(server, "true"), *ENDED, limit_s=60)["status"])


def test_a_disk_becomes_full_while_a_large_upload_comes(make_disk: Callable[..., Disk], make_process: MakeProcess) -> None:
    """There was room for it when it began: a clean refusal, nothing of it stays, and the server goes on."""
    disk = make_disk("size=64m")
    server = on_disk(make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}), disk).start()
    body = form(
        [file_part("run.sh", b"true"), file_part("big", bytes(12 * MIB)), field_part("user_id", "1"), field_part("service", "example")]
    )
    with nothing_left(server):
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=30)) as line:
            head = raw_head("POST", "/upload", server.port, f"Content-Length: {len(body)}", f"Content-Type: {FORM_TYPE}")
            before = disk.pages()
            line.sendall(head + body[: 4 * MIB])
            wait_for(lambda: disk.pages() < before - 3 * MIB // PAGE, 30, "the first part on the disk")
            disk.fill()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                line.sendall(body[4 * MIB :])
            received = read_all(line)
        assert received, "the line was closed without an answer"
        code, headers, said = parse_answer(received)
        assert code in REFUSED
        assert_error_body(headers["content-type"], said, "disk")
        disk.free()
    assert upload(server, {"run.sh": b"true", "big": bytes(12 * MIB)}).status_code == 201


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_start_on_a_full_disk(side: str, make_disk: Callable[..., Disk], make_process: MakeProcess) -> None:
    """It works, or says in one line what is wrong and ends with status 2; with room again it starts and has lost nothing."""
    disk = make_disk()
    wiring = {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"} if side == "server" else {"JOBORCH_TOKEN": "t"}
    process = on_disk(make_process(side, wiring), disk).start()
    number = submit(process, "true") if side == "server" else 0
    process.kill()
    disk.fill()
    before = process.log
    started = process.spawn()
    wait_for(lambda: started.poll() is not None or "listens on" in process.log[len(before) :], what="its start or its end")
    said = process.log[len(before) :]
    assert "Traceback" not in said, said
    if started.poll() is not None:
        assert started.returncode == 2, said
        assert "disk" in said or "space" in said, said
    else:
        process.kill()
    disk.free()
    process.start()
    if side == "server":
        assert process.job(number)["status"] == "Queued"


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_disk_is_read_only_for_a_while(side: str, liar: Liar, make_pair: MakePair, tmp_path: Path, marks: Path) -> None:
    """As after an error of the file system: no answer pretends, nothing is lost, and all goes on when it is mended."""
    own, gate = make_pair(**{side: liar.settings}), tmp_path / "gate"
    own.start()
    server, process = own.server, getattr(own, side)
    number = submit(server, gated(gate, marks))
    wait_status(server, number, "Running")
    wait_for(marks.read_text, what="the script's start")
    liar.say("write", errno.EROFS, process.data)
    assert process.get("/health").status_code == 503
    waiting = 0
    if side == "server":
        assert_error(upload(server, {"run.sh": b"true"}), REFUSED)
        before = len(server.log)
        gate.touch()
        said = ("could not be stored", "cannot be written")
        wait_for(lambda: any(words in server.log[before:] + reasons(server.job(number)) for words in said), 30, "a reason")
    else:
        waiting = submit(server, "true")
        gate.touch()
        wait_for(lambda: "answered 50" in reasons(server.job(waiting)), 30, "a reason")
    assert server.job(number)["status"] not in ENDED
    liar.stop()
    check_once(server, number, marks)
    if waiting:
        assert wait_status(server, waiting, "Completed", limit_s=60)["attempt"] == 1
    assert run_again(server) == "Completed"


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("where", ["jobs", "joborch.db"])
def test_an_upload_that_cannot_be_brought_to_the_disk(where: str, count: int, liar: Liar, make_process: MakeProcess) -> None:
    """Never 201: not while the server runs, and not after it was killed and started again, when nothing of it is there."""
    wiring = {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}
    server = make_process("server", {**wiring, **liar.settings}).start()
    kept = submit(server, "true")
    files = {"run.sh": b"true", **{f"file-{number}": b"x" for number in range(count - 1)}}
    liar.say("sync", errno.EIO, server.data / where)
    for _ in range(2):
        assert_error(upload(server, files), REFUSED)
    assert [job["id"] for job in server.jobs()] == [kept]
    server.kill()
    liar.stop()
    server.start()
    assert [job["id"] for job in server.jobs()] == [kept], "a job that nobody was told of"
    wait_for(lambda: len(list((server.data / "jobs").iterdir())) == 1, what="the rest swept")
    assert upload(server, files).status_code == 201


def test_a_result_that_cannot_be_brought_to_the_disk(liar: Liar, make_pair: MakePair, marks: Path) -> None:
    """It is not Completed, says why, is fetched again and again, and the script ran once."""
    own = make_pair(server=liar.settings).start()
    liar.say("sync", errno.EIO, own.server.data / "tmp")
    number = submit(own.server, f"echo ran >> {marks}; echo done > result")
    job = wait_for(lambda: (found := own.server.job(number))["status"] == "Unknown" and found, what="the job Unknown")
    assert "could not be stored" in job["reason"]
    assert "input/output error" in job["reason"].lower()
    assert own.server.head(f"/download/{number}").status_code == 202
    liar.stop()
    assert "Unknown" in [move["to"] for move in check_once(own.server, number, marks)["history"]]


# == What goes away under the running program ==


@pytest.mark.parametrize("gone", ["server/results", "server/tmp", "server/jobs", "client/tmp", "client/jobs"])
def test_a_folder_is_removed(gone: str, make_pair: MakePair, marks: Path) -> None:
    """A clear reason on the job or to the caller; it is made again, by joborch or by hand, and work goes on."""
    own = make_pair().start()
    side, _, name = gone.partition("/")
    folder = getattr(own, side).data / name
    joborch.remove_tree(folder)
    answer = upload(own.server, {"run.sh": f"echo ran >> {marks}; echo done > result".encode(), "input": bytes(MIB)})
    if answer.status_code != 201:
        assert gone in ("server/jobs", "server/tmp")
        assert_error(answer, REFUSED)
        folder.mkdir(exist_ok=True)
        answer = upload(own.server, {"run.sh": f"echo ran >> {marks}; echo done > result".encode()})
        assert answer.status_code == 201, "and it goes on"
    number = answer.json()["id"]
    wait_for(
        lambda: own.server.job(number)["status"] in {"Unknown", *ENDED} or len(own.server.job(number)["history"]) > 2, 20, "an outcome"
    )
    job = own.server.job(number)
    if job["status"] != "Completed":
        assert job["status"] not in ENDED, job
        folder.mkdir(exist_ok=True)
    check_once(own.server, number, marks)


def test_the_folder_of_a_job_is_removed_on_either_side(own_pair: Pair, tmp_path: Path, marks: Path) -> None:
    """On the server while it runs: nobody needs it any more. At the client: another attempt, after the first has ended."""
    server, gate = own_pair.server, tmp_path / "gate"
    first = submit(server, gated(gate, marks))
    wait_status(server, first, "Running")
    joborch.remove_tree(server.data / "jobs" / server.job(first)["uuid"])
    gate.touch()
    check_once(server, first, marks)
    gate.unlink()
    marks.write_text("")
    second = submit(
        server, f"echo $JOBORCH_ATTEMPT >> {marks}\nuntil [ -e {gate} ]; do sleep 0.05; done\necho end $JOBORCH_ATTEMPT >> {marks}\n"
    )
    wait_for(marks.read_text, what="the script's start")
    joborch.remove_tree(own_pair.client.data / "jobs" / f"{server.job(second)['uuid']}.1")
    gate.touch()
    job = wait_status(server, second, "Completed", limit_s=60)
    assert "folder was removed" in reasons(job)
    assert (job["attempt"], marks.read_text()) == (2, "1\nend 1\n2\nend 2\n"), "one after the other"


@pytest.mark.parametrize("side", ["server", "client"])
def test_the_database_is_removed_under_the_running_program(side: str, make_pair: MakePair, marks: Path) -> None:
    """Nothing is taken into a file without a name; /health says what to do; and the files of what was there are kept."""
    own = make_pair().start()
    server, process = own.server, getattr(own, side)
    done = submit(server, f"echo ran >> {marks}; echo done > result")
    check_once(server, done, marks)
    name = server.job(done)["uuid"]
    for path in process.data.glob("*.db*"):
        path.unlink()
    answer = process.get("/health", headers={"Authorization": f"Bearer {own.TOKEN}"})
    assert answer.status_code == 503
    if side == "server":
        assert_error(upload(server, {"run.sh": b"true"}), 503)
    else:
        number = submit(server, f"echo ran >> {marks}; echo done > result")
        wait_for(lambda: "503" in reasons(server.job(number)), what="a reason")
        assert marks.read_text() == "ran\n"
    process.restart()
    if side == "server":
        assert run_again(server) == "Completed"
        assert list(process.data.rglob(f"{name}*.zip")), "the only copy of a result was removed because a database was lost"
    else:
        wait_status(server, number, "Completed", limit_s=60)
        assert marks.read_text() == "ran\nran\n"
    assert "restart" in answer.text, answer.text


# == A database that others hold, share or damaged ==


def test_a_database_that_is_locked_while_a_job_is_sent(own_pair: Pair, marks: Path) -> None:
    """503 with Retry-After to who uploads; the job that was on its way runs once, and its end is not missed."""
    server, client = own_pair.server, own_pair.client
    assert run_again(server) == "Completed", "the server knows its client"
    os.kill(client.pid, signal.SIGSTOP)
    try:
        number = submit(server, f"echo ran >> {marks}; echo done > result")
        wait_status(server, number, "Processing")
        with locked(server.data / "joborch.db"):
            os.kill(client.pid, signal.SIGCONT)
            answer = upload(server, {"run.sh": b"true"})
            assert_error(answer, 503)
            assert int(answer.headers["Retry-After"]) > 0
            assert server.job(number)["status"] == "Processing", "reading goes on"
            # The poll has nothing to store where the end of the payload came with the answer to its submit.
            wait_for(lambda: "send:" in server.log and "it is tried again" in server.log, 40, "the sender has tried")
    finally:
        os.kill(client.pid, signal.SIGCONT)
    check_once(server, number, marks)


@pytest.mark.parametrize("side", ["server", "client"])
def test_two_of_one_database_or_of_one_folder(side: str, make_process: MakeProcess, tmp_path: Path) -> None:
    """Refused with the pid of the first, in whatever way they meet: folder, link to the folder, or the database alone."""
    settings: dict[str, str | None] = {"DB_PATH": str(tmp_path / "shared.db"), "JOBORCH_TOKEN": "t"}
    first = make_process(side, settings).start()
    (tmp_path / "link").symlink_to(first.data)
    other_side = "client" if side == "server" else "server"
    for role, changes in (
        (side, {"DATA_PATH": str(tmp_path / "link"), "DB_PATH": str(tmp_path / "other.db")}),
        (other_side, {"DATA_PATH": str(first.data), "DB_PATH": str(tmp_path / "other.db")}),
        (side, {}),
    ):
        code, said = make_process(role, {**settings, **changes}).start_refused(5)
        assert code == 2, said
        assert str(first.pid) in said, said
        assert first.get("/health").status_code == 200


DAMAGES = ["header", "zeros", "rubbish", "cut off", "swapped"]


def damage(path: Path, how: str) -> None:
    """Spoil a database file."""
    content = bytearray(path.read_bytes())
    pages = len(content) // PAGE
    assert pages > 20
    at = pages // 2 * PAGE
    if how == "header":
        content[:100] = b"\xff" * 100
    elif how == "zeros":
        content[at : at + 4 * PAGE] = bytes(4 * PAGE)
    elif how == "rubbish":
        content[at : at + 4 * PAGE] = random.Random(4).randbytes(4 * PAGE)
    elif how == "cut off":
        del content[at:]
    else:  # a page that leads to rows of a table, and one with rows; that two with rows are swapped may not be seen at the start
        kinds = [content[number * PAGE] for number in range(pages)]  # fileformat2.html, 1.6
        first, second = (kinds.index(kind, 1) * PAGE for kind in (0x05, 0x0D))
        content[first : first + PAGE], content[second : second + PAGE] = content[second : second + PAGE], content[first : first + PAGE]
    path.write_bytes(content)


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_database_is_refused_at_the_start(how: str, side: str, make_process: MakeProcess) -> None:
    """Status 2, one line with the file and the way out, and the file stays as it is for who can mend it."""
    process = make_process(side, {"JOBORCH_TOKEN": "t"})
    place = process.data / "joborch.db"
    store = Store(str(place), side)
    store.write(lambda db: [db.execute(statements.JOB_ADD, a_row(store)).rowcount for _ in range(300)])
    store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    damage(place, how)
    before = place.read_bytes()
    code, said = process.start_refused(5)
    assert code == 2, said
    assert "Traceback" not in said, said
    assert str(place) in said
    assert ("joborch restore" if side == "server" else "a new one" if "not a database" in said else "move it away") in said, said
    assert place.read_bytes() == before


def a_row(store: Store) -> dict[str, Any]:
    """The values of a new row."""
    new = joborch.NewJob(str(uuid.uuid4()), 1, "example", "n" * 100)
    times = dict.fromkeys(("created_at", "moved_at", "arrived_at"), 1.0)
    return {**vars(new), **times, "status": "Completed", "reason": "r" * 200, "changed": None, "moves": 1}
