"""The history checker finds nothing in what the program does, and every fault that is planted in it, under the right name.

A `World` moves jobs through real Stores, as the loops of server and client move them, and notes what scripts and driver
would note. Faults are planted in the files that it leaves, in the values read from them, and at random.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
import sqlite3
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import history
import pytest
from conftest import MakePair
from harness import submit, wait_status
from history import (
    BUSY,
    ENDED,
    LEGAL,
    OVER,
    Attempt,
    Evidence,
    Expected,
    Fault,
    Log,
    Mark,
    Move,
    Quota,
    Reading,
    Row,
    assert_proven,
    check,
    gather,
    log_of,
    main,
    mark_lines,
    read_log,
    read_marks,
    read_result,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from world import HandClock, a_service, new_job

import joborch
from joborch import Cause, Job, Status, Store
from joborch_base import statements

QUOTAS = {"example": Quota(2, 3)}
NO_QUOTAS = {"example": Quota(1000, 1000)}


def rules_of(faults: Sequence[Fault]) -> set[str]:
    """The names of the broken rules."""
    return {fault.rule for fault in faults}


def found(evidence: Evidence) -> set[str]:
    """The names of the rules that this evidence breaks."""
    return rules_of(check(evidence))


# == A world of real Stores ==


def zip_of(text: str) -> bytes:
    """A result whose file out.txt holds `text`."""
    spool = io.BytesIO()
    with zipfile.ZipFile(spool, "w") as archive:
        archive.writestr("out.txt", text)
        archive.writestr(".joborch/stdout", "")
    return spool.getvalue()


class World:
    """A server and a client of it, each with its Store; a second passes with every step."""

    service = a_service(runs_per_user=2, max_runs=3)
    other_end: Mapping[str, tuple[Status, Cause, int | None]] = {
        "fail": (Status.FAILED, Cause.USER, 1),
        "run_out": (Status.FAILED, Cause.LIMIT, None),
    }

    def __init__(self, folder: Path | None = None) -> None:
        """Keep all in `folder`, or in memory."""
        self.folder, self.clock = folder, HandClock()
        self.server = Store(str(folder / "server.db") if folder else ":memory:", "server", self.clock)
        self.client = Store(str(folder / "client.db") if folder else ":memory:", "client", self.clock)
        self.server.set_limits({"example": self.service})
        self.expected: dict[int, Expected] = {}
        self.marks: list[Mark] = []
        self.zips: dict[int, bytes] = {}
        self.terminated: set[int] = set()
        self.most = Counter[str]()  # the most jobs that were with clients at once, of one user and of all

    def close(self) -> None:
        """Close both databases."""
        self.server.close()
        self.client.close()

    def job(self, job_id: int) -> Job:
        """A job as it stands."""
        job = self.server.get(job_id)
        assert job is not None
        return job

    def payload(self, job: Job) -> Job | None:
        """What the client has of the present attempt."""
        return self.client.job(statements.JOB_BY_MARK, uuid=job.uuid, attempt=job.attempt)

    def must_move(self, job: Job, to: Status, reason: str, **changes: Any) -> None:
        """A move of the server's that has to succeed."""
        assert self.server.move(self.job(job.id), to, reason, **changes)

    def move_payload(self, job: Job, to: Status, reason: str, **changes: Any) -> None:
        """Move the payload of the present attempt, where it has not ended."""
        payload = self.payload(job)
        if payload and payload.status in (Status.PREPARED, Status.RUNNING):
            assert self.client.move(payload, to, reason, **changes)

    # -- what may happen to a job --

    def submit(self, user_id: int = 1, retries: int = 2) -> int:
        """An upload that was answered with 201."""
        self.clock.pass_s(1)
        job = self.server.add(new_job(user_id=user_id, retries=retries), "uploaded")
        self.expected[job.id] = Expected(job.uuid)
        return job.id

    def claim(self, job: Job) -> None:
        """Take it for the client where its quota allows."""
        self.server.admit_due()
        self.server.claim(job.id, "gpu1", 1000)

    def accept(self, job: Job) -> None:
        """The client takes it."""
        self.client.add(joborch.NewJob(job.uuid, user_id=job.user_id, service=job.service, attempt=job.attempt), "taken")
        self.must_move(job, Status.SUBMITTED, "accepted by gpu1", dest_id="1")

    def refuse(self, job: Job) -> None:
        """The client is full."""
        self.must_move(job, Status.QUEUED, "gpu1 is full", client=None)

    def reject(self, job: Job) -> None:
        """The client refuses it for good."""
        self.must_move(job, Status.INVALID, "gpu1 refuses it: two files of one name", cause=Cause.USER.value)

    def no_answer(self, job: Job) -> None:
        """The client takes it, and its answer is lost."""
        self.client.add(joborch.NewJob(job.uuid, user_id=job.user_id, service=job.service, attempt=job.attempt), "taken")
        self.must_move(job, Status.UNKNOWN, "gpu1 did not answer: it is asked again")

    def answer_again(self, job: Job) -> None:
        """The client is back, and says how the payload is."""
        payload = self.payload(job)
        assert payload is not None
        to = Status.RUNNING if payload.status is Status.RUNNING else Status.SUBMITTED
        self.must_move(job, to, "gpu1 answers again", dest_id="1")

    def be_silent(self, job: Job) -> None:
        """The client does not answer."""
        self.must_move(job, Status.UNKNOWN, "gpu1 cannot be reached; it is tried again")

    def start(self, job: Job) -> None:
        """The script starts, and says so."""
        self.move_payload(job, Status.RUNNING, "", started_at=self.clock.wall())
        self.marks.append(Mark(job.uuid, job.attempt, "start", 1000 + len(self.marks)))
        self.must_move(job, Status.RUNNING, "", started_at=self.clock.wall())

    def end_mark(self, job: Job) -> None:
        """The script says that it ends."""
        started = [mark for mark in self.marks if (mark.uuid, mark.attempt) == (job.uuid, job.attempt)]
        self.marks += [mark._replace(what="end") for mark in started]

    def complete(self, job: Job) -> None:
        """The script ends well, and its result is fetched."""
        data = zip_of(f"{job.user_id} {job.retries}")
        digest = hashlib.sha256(data).hexdigest()
        self.end_mark(job)
        self.move_payload(job, Status.COMPLETED, "run.sh ended with exit status 0", exit_code=0)
        self.zips[job.id] = data
        if self.folder:
            (self.folder / "results").mkdir(exist_ok=True)
            (self.folder / "results" / f"{job.mark}.zip").write_bytes(data)
        self.must_move(job, Status.COMPLETED, "run.sh ended with exit status 0", exit_code=0, result_size=len(data), result_sha256=digest)
        members = {"out.txt": hashlib.sha256(f"{job.user_id} {job.retries}".encode()).hexdigest()}
        self.expected[job.id] = Expected(job.uuid, ["Completed"], members=members, only_members=True)

    def end_badly(self, job: Job, how: str) -> None:
        """The script fails by itself, or is over its limit."""
        status, cause, code = self.other_end[how]
        self.end_mark(job)
        self.move_payload(job, status, f"run.sh was no good: {how}", cause=cause.value, exit_code=code)
        self.must_move(job, status, f"run.sh was no good: {how}", cause=cause.value, exit_code=code)
        self.expected[job.id] = Expected(job.uuid, [Status.FAILED], [cause])

    def fail(self, job: Job) -> None:
        """The script ends with exit status 1."""
        self.end_badly(job, "fail")

    def run_out(self, job: Job) -> None:
        """The script is over its time limit."""
        self.end_badly(job, "run_out")

    def terminate(self, job: Job) -> None:
        """Somebody asks to end it, and it is ended."""
        self.terminated.add(job.id)
        self.server.request_kill(job.id, Cause.CANCELLED)
        self.move_payload(job, Status.KILLED, "terminated on request", cause=Cause.CANCELLED.value)
        self.must_move(job, Status.KILLED, "terminated on request", cause=Cause.CANCELLED.value)
        self.expected[job.id] = Expected(job.uuid, ["Completed"])  # it may have been meant to

    def lose(self, job: Job) -> None:
        """The machine of the client fails, and the payload with it."""
        self.move_payload(job, Status.FAILED, "gpu1 lost it", cause=Cause.INFRASTRUCTURE.value)
        self.give_up(job)

    def give_up(self, job: Job) -> None:
        """The server lets go of an attempt; whatever runs of it runs on."""
        if job.attempt <= job.retries:
            changes: dict[str, Any] = {"attempt": job.attempt + 1, "client": None, "dest_id": None, "started_at": None}
            self.must_move(job, Status.QUEUED, f"attempt {job.attempt}: gpu1 lost it", not_before=self.clock.wall(), **changes)
        else:
            self.must_move(job, Status.FAILED, "gpu1 lost it; no attempt is left", cause=Cause.INFRASTRUCTURE.value)
            self.expected[job.id] = Expected(job.uuid, ["Failed", "Completed"], ["infrastructure"])

    def clean(self, job: Job) -> None:
        """Its files go."""
        if self.folder:
            (self.folder / "results" / f"{job.mark}.zip").unlink(missing_ok=True)
        self.zips.pop(job.id, None)
        self.must_move(job, Status.CLEANED, "2 days after it ended", row_reason=job.reason)

    # -- how it goes on --

    def ways(self, job: Job) -> Sequence[Callable[[Job], None]]:
        """What may happen to a job next; first what brings it to its end."""
        ways: dict[Status, Sequence[Callable[[Job], None]]] = {
            Status.QUEUED: [self.claim, self.terminate],
            Status.PROCESSING: [self.accept, self.refuse, self.reject, self.no_answer],
            Status.SUBMITTED: [self.start, self.lose, self.be_silent, self.terminate],
            Status.RUNNING: [self.complete, self.fail, self.run_out, self.lose, self.be_silent, self.terminate],
            Status.UNKNOWN: [self.answer_again, self.give_up, self.lose],
        }
        return ways.get(job.status, [self.clean] if job.status.value in ENDED else [])

    def do(self, job_id: int, *names: str) -> int:
        """Let these things happen to a job, one after the other; return its id."""
        for name in names:
            self.clock.pass_s(1)
            getattr(self, name)(self.job(job_id))
            rows = [row for row in self.server.jobs("SELECT * FROM jobs") if row.status.value in BUSY]
            of_users = Counter(row.user_id for row in rows)
            self.most |= Counter({"user": max(of_users.values(), default=0), "service": len(rows)})
        return job_id

    def step(self, pick: int, way: int) -> None:
        """Let something happen to some job, or submit a new one."""
        jobs = [job for job in self.server.jobs("SELECT * FROM jobs ORDER BY id") if self.ways(job)]
        if pick >= len(jobs):
            self.submit(user_id=1 + way % 2, retries=way % 3)
        else:
            ways = self.ways(jobs[pick])
            self.do(jobs[pick].id, ways[way % len(ways)].__name__)

    def settle(self) -> None:
        """Bring every job, and what still runs of given-up attempts, to an end."""
        while jobs := [job for job in self.server.jobs("SELECT * FROM jobs ORDER BY id") if job.status.value not in OVER]:
            for job in jobs:
                self.do(job.id, self.ways(self.job(job.id))[0].__name__)
        for payload in self.client.jobs(statements.PAYLOADS_IN, status="Running", limit=1000):
            assert self.client.move(payload, Status.FAILED, "run.sh ended with exit status 9", cause="user", exit_code=9)

    def evidence(self, settled: bool = True) -> Evidence:
        """All that is known of it."""
        if self.folder:
            (self.folder / "marks").write_text("".join(f"{' '.join(map(str, mark))}\n" for mark in self.marks))
            return evidence_of(self.folder, self.expected, self.terminated, settled)
        logs = log_of(self.server.db), [log_of(self.client.db, "client", "gpu1")]
        results = {job_id: read_result(io.BytesIO(data)) for job_id, data in self.zips.items()}
        return Evidence(*logs, self.expected, QUOTAS, self.marks, results, self.terminated, settled)


def evidence_of(folder: Path, expected: Mapping[int, Expected], terminated: set[int], settled: bool = True) -> Evidence:
    """What a world in `folder` has left."""
    return gather(
        folder / "server.db",
        clients={"gpu1": folder / "client.db"},
        marks=[folder / "marks"],
        results=folder / "results",
        expected=expected,
        quotas=QUOTAS,
        terminated=terminated,
        settled=settled,
    )


def fill(world: World) -> World:
    """Let one job of each kind happen; their ids are 1 to 10."""
    run = ("claim", "accept", "start")
    world.do(world.submit(), *run, "complete")  # 1
    world.do(world.submit(), *run, "fail")  # 2
    world.do(world.submit(), *run, "lose", *run, "be_silent", "answer_again", "complete")  # 3
    world.do(world.submit(), "terminate")  # 4
    world.do(world.submit(user_id=2), *run, "terminate")  # 5
    world.do(world.submit(), "claim", "refuse", "claim", "no_answer", "answer_again", "start", "complete", "clean")  # 6
    world.do(world.submit(), "claim", "reject")  # 7
    world.do(world.submit(), *run, "run_out")  # 8
    world.do(world.submit(retries=0), *run, "be_silent", "give_up", "clean")  # 9
    world.do(world.submit(), *run, "be_silent", "give_up", *run, "complete")  # 10
    world.settle()
    return world


@pytest.fixture(scope="module")
def left_by_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, World]:
    """The files of a world in which one job of each kind happened, and what its driver knows."""
    folder = tmp_path_factory.mktemp("world")
    world = fill(World(folder))
    world.evidence()
    world.close()
    return folder, world


@pytest.fixture
def good(left_by_world: tuple[Path, World]) -> Evidence:
    """Evidence without a fault, to plant one in."""
    folder, world = left_by_world
    return evidence_of(folder, world.expected, world.terminated)


# == What is good is proven ==


def test_what_the_program_does_is_proven(good: Evidence) -> None:
    assert check(good) == []
    assert_proven(good)
    ends = {end.target for job_id in good.server.rows if (end := good.server.end_of(job_id))}
    assert ends == ENDED, "each kind of end has happened"
    assert [row.id for row in good.server.rows.values() if row.status == "Cleaned"] == [6, 9]
    assert len(good.server.attempts) == 2
    assert good.results is not None and set(good.results) == {1, 3, 10}
    assert {mark.what for mark in good.marks or ()} == {"start", "end"}


def test_the_words_are_those_of_the_program() -> None:
    assert frozenset(map(str, joborch.BUSY)) == BUSY
    assert frozenset(map(str, joborch.ENDED)) == ENDED
    assert frozenset(map(str, joborch.OVER)) == OVER
    assert LEGAL["server"] >= {("Queued", "Processing"), ("Completed", "Cleaned")}


def test_a_log_is_read_while_it_is_written_and_after_a_kill(tmp_path: Path) -> None:
    """The WAL of a process that was killed is read, and left for its next start."""
    world = World(tmp_path)
    world.do(world.submit(), "claim", "accept")
    seen = read_log(tmp_path / "server.db")
    copy = tmp_path / "killed"
    copy.mkdir()
    for name in ("server.db", "server.db-wal"):
        shutil.copy(tmp_path / name, copy)
    wal = (copy / "server.db-wal").read_bytes()
    assert wal
    assert read_log(copy / "server.db") == seen
    assert (copy / "server.db-wal").read_bytes() == wal
    assert [move.target for move in seen.moves[1]] == ["Queued", "Processing", "Submitted"]
    world.close()


# == Planted faults ==
#
# Each is planted alone, in the files that a world has left or in the values read from them, and found under its own name.


def of_job(job_id: int, assignments: str) -> str:
    """Change a row of jobs."""
    return f"UPDATE jobs SET {assignments} WHERE id = {job_id};"


def of_move(job_id: int, number: int, assignments: str) -> str:
    """Change a row of history."""
    return f"UPDATE history SET {assignments} WHERE job_id = {job_id} AND number = {number};"


def of_attempt(job_id: int, assignments: str) -> str:
    """Change the rows of attempts of a job."""
    return f"UPDATE attempts SET {assignments} WHERE job_id = {job_id};"


def state_between(job_id: int, number: int, state: str) -> str:
    """Let a move lead to another state, and the next one leave it."""
    return of_move(job_id, number, f"target = '{state}'") + of_move(job_id, number + 1, f"source = '{state}'")


def further(job_id: int, source: str, target: str) -> str:
    """Add a last move to another state, in history and row."""
    return (
        "INSERT INTO history (job_id, number, at, source, target, reason, attempt, seq) "
        f"SELECT job_id, number + 1, at, '{source}', '{target}', 'again', attempt, (SELECT max(seq) + 1 FROM history) FROM history "
        f"WHERE job_id = {job_id} ORDER BY number DESC LIMIT 1;"
    ) + of_job(job_id, f"status = '{target}', reason = 'again', moves = moves + 1")


def with_server(evidence: Evidence, **changes: Any) -> Evidence:
    """The same evidence with another log of the server."""
    return dataclasses.replace(evidence, server=dataclasses.replace(evidence.server, **changes))


def with_marks(evidence: Evidence, *marks: Mark) -> Evidence:
    """The same evidence with further marks."""
    return dataclasses.replace(evidence, marks=[*(evidence.marks or ()), *marks])


def without_marks(evidence: Evidence, job_id: int, *attempts: int) -> Evidence:
    """The same evidence without the marks of these attempts of a job."""
    gone = {(evidence.server.rows[job_id].uuid, attempt) for attempt in attempts}
    return dataclasses.replace(evidence, marks=[mark for mark in evidence.marks or () if mark[:2] not in gone])


def with_reading(evidence: Evidence, change: Callable[[list[Any]], list[Any]] = list, upto: int | None = None) -> Evidence:
    """What a reader of /changes saw, with one thing changed: all moves, or only the first ones."""
    moves = sorted((move.seq or 0, move.job_id, move.source, move.target) for moves in evidence.server.moves.values() for move in moves)
    return dataclasses.replace(evidence, reading=Reading(change(moves[:upto]), moves[:upto][-1][0]))


def with_expected(evidence: Evidence, job_id: int, **changes: Any) -> Evidence:
    """The same evidence with another expectation."""
    wanted = dataclasses.replace(evidence.expected.get(job_id, Expected()), **changes)
    return dataclasses.replace(evidence, expected={**evidence.expected, job_id: wanted})


def start_of(evidence: Evidence, job_id: int, **changes: Any) -> Mark:
    """The first start of a job's script, or one like it."""
    row = evidence.server.rows[job_id]
    first = next((mark for mark in evidence.marks or () if mark.uuid == row.uuid), Mark(row.uuid, 1, "start", 99))
    return first._replace(**changes)


def with_zip(evidence: Evidence, data: bytes) -> Evidence:
    """As if the result of job 1 were these bytes, with the right size and digest."""
    read = read_result(io.BytesIO(data))
    row = evidence.server.rows[1]._replace(result_size=read.size, result_sha256=read.sha256)
    return dataclasses.replace(with_server(evidence, rows={**evidence.server.rows, 1: row}), results={**(evidence.results or {}), 1: read})


def with_late_end(evidence: Evidence, quotas: Mapping[str, Quota]) -> Evidence:
    """As if job 8 had stayed with its client until all was over."""
    moves = list(evidence.server.moves[8])
    moves[-1] = moves[-1]._replace(seq=10**18)
    return dataclasses.replace(with_server(evidence, moves={**evidence.server.moves, 8: moves}), quotas=quotas)


def name_twice() -> bytes:
    """A ZIP in which a name stands twice."""
    spool = io.BytesIO()
    with zipfile.ZipFile(spool, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("out.txt", "1")
        archive.writestr("out.txt", "2")
    return spool.getvalue()


def spoil(path: Path) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


RUNNING_AGAIN = "status = 'Running', reason = '', cause = NULL, moves = 4"
ORPHAN = "INSERT INTO history (job_id, number, at, target, reason, attempt, seq) VALUES (99, 1, 0, 'Queued', '', 1, 1 << 60)"
TOO_MUCH = "INSERT INTO attempts (job_id, attempt, client, reason, cause) VALUES (1, 1, 'gpu1', 'gpu1 lost it', 'infrastructure')"
RETRIED_FOR_ITS_OWN_FAILURE = of_job(3, "cause = 'user', reason = 'gpu1 lost it'") + of_move(3, 3, "reason = 'gpu1 lost it'")

# SQL for the server's database; with `client:` in front for the client's, whose payloads 1 and 2 are of the jobs 1 and 2,
# 3 and 4 of job 3. A function changes the file of the result of job 3 (PLANTED_FILES), or the evidence (PLANTED_VALUES).
PLANTED_SQL: dict[str, tuple[set[str], str]] = {
    "a row is gone": ({"accepted", "chain", "starts"}, "DELETE FROM jobs WHERE id = 2"),
    "a job is gone": ({"accepted"}, "DELETE FROM jobs WHERE id = 4; DELETE FROM history WHERE job_id = 4"),
    "a job hangs": ({"accepted"}, "DELETE FROM history WHERE job_id = 8 AND number = 5;" + of_job(8, RUNNING_AGAIN)),
    "another uuid": ({"accepted"}, of_job(4, "uuid = 'x'")),
    "all moves are gone": ({"chain", "accepted"}, "DELETE FROM history WHERE job_id = 4"),
    "moves of nobody": ({"chain"}, ORPHAN),
    "attempts of nobody": ({"chain"}, "INSERT INTO attempts (job_id, attempt) VALUES (99, 1)"),
    "a number is left out": ({"chain"}, of_move(1, 5, "number = 6")),
    "a source is changed": ({"chain"}, of_move(1, 5, "source = 'Unknown'")),
    "it began elsewhere": ({"chain"}, state_between(4, 1, "Unknown")),
    "a row stands elsewhere": ({"chain"}, of_job(2, "status = 'Cleaned'")),
    "a row counts wrong": ({"chain"}, of_job(1, "moves = 4")),
    "an illegal move": ({"legal", "starts"}, state_between(8, 3, "Running") + state_between(8, 4, "Submitted")),
    "a word that is no state": ({"legal"}, state_between(8, 4, "Lost")),
    "an end is left": ({"left"}, further(1, "Completed", "Running")),
    "it ends twice": ({"left", "accepted", "expected", "explained"}, further(2, "Failed", "Killed") + of_job(2, "cause = 'cancelled'")),
    "Cleaned is left": ({"left"}, further(9, "Cleaned", "Queued")),
    "another end than expected": ({"expected"}, of_move(2, 5, "target = 'Invalid'") + of_job(2, "status = 'Invalid'")),
    "a request that nobody made": ({"expected"}, of_job(2, "kill_requested_at = 1")),
    "an attempt is forgotten": ({"attempts"}, "DELETE FROM attempts WHERE job_id = 3"),
    "an attempt too much": ({"attempts"}, TOO_MUCH),
    "retried for the script's failure": ({"attempts"}, of_attempt(3, "cause = 'user'")),
    "retried after an exit": ({"attempts"}, of_attempt(3, "exit_code = 1")),
    "an attempt at nobody": ({"attempts"}, of_attempt(3, "client = NULL")),
    "an attempt for no reason": ({"attempts"}, of_attempt(3, "reason = '?'")),
    "more attempts than allowed": ({"attempts"}, of_job(3, "retries = 0")),
    "an attempt is not counted": ({"attempts"}, of_move(3, 8, "attempt = 1")),
    "the row is at another attempt": ({"attempts", "result"}, of_job(10, "attempt = 1") + "DELETE FROM attempts WHERE job_id = 10"),
    "no digest in the row": ({"result"}, of_job(1, "result_sha256 = NULL")),
    "another size": ({"result"}, of_job(1, "result_size = 1")),
    "what a failure left is gone": ({"result"}, of_job(2, "result_sha256 = 'ab', result_size = 5")),
    "no reason": ({"explained"}, of_move(2, 5, "reason = ' '") + of_job(2, "reason = ' '")),
    "two reasons": ({"explained"}, of_job(2, "reason = 'because'")),
    "a cause of another end": ({"explained"}, of_job(8, "cause = 'cancelled'")),
    "the cause of another failure": ({"explained"}, of_job(8, "cause = 'user'")),
    "a cause of a success": ({"explained"}, of_job(1, "cause = 'user'")),
    "no cause, and Cleaned": ({"explained"}, of_job(9, "cause = NULL")),
    "time falls within a job": ({"order"}, "UPDATE history SET seq = seq - 1000000000 WHERE job_id = 8 AND number > 1"),
    "a claim at the place of its upload": (
        {"merged"},
        "UPDATE history SET seq = (SELECT seq FROM history WHERE job_id = 1 AND number = 1) WHERE job_id = 1 AND number = 2",
    ),
    "time falls between two jobs": ({"order"}, "UPDATE history SET seq = seq - 1000000000 WHERE job_id = 4"),
    "client: a move is gone": ({"chain"}, "DELETE FROM history WHERE job_id = 2 AND number = 2"),
    "client: an illegal move": ({"legal"}, state_between(1, 2, "Unknown")),
    "client: it ends twice": ({"left"}, further(1, "Completed", "Failed") + of_job(1, "cause = 'user'")),
    "client: no reason": ({"explained"}, of_move(2, 3, "reason = ''") + of_job(2, "reason = ''")),
    "client: never sent": ({"starts"}, of_job(2, "attempt = 3") + "UPDATE history SET attempt = 3 WHERE job_id = 2"),
    "client: two attempts in one payload": ({"attempts"}, of_move(2, 2, "attempt = 2")),
    "client: retried for its own failure": ({"attempts"}, RETRIED_FOR_ITS_OWN_FAILURE),
}
PLANTED_FILES: dict[str, tuple[set[str], Callable[[Path], object]]] = {
    "a result is gone": ({"result"}, lambda path: path.unlink()),
    "a byte is changed": ({"result"}, spoil),
    "a folder": ({"result"}, lambda path: path.rename(path.with_name("moved")).with_name(path.name).mkdir()),
}
PLANTED_VALUES: dict[str, tuple[set[str], Callable[[Evidence], Evidence]]] = {
    "a 201 without a row": ({"accepted"}, lambda e: with_expected(e, 77, uuid="x")),
    "a uuid twice": (
        {"accepted"},
        lambda e: with_expected(
            with_server(e, rows={**e.server.rows, 4: e.server.rows[4]._replace(uuid=e.server.rows[3].uuid)}), 4, uuid=""
        ),
    ),
    "started twice": ({"starts"}, lambda e: with_marks(e, start_of(e, 2))),
    "ended by another process": ({"starts"}, lambda e: with_marks(e, start_of(e, 5, what="end", pid=7))),
    "an unknown script": ({"starts"}, lambda e: with_marks(e, Mark("nobody", 1, "start", 7))),
    "an unknown attempt": ({"starts"}, lambda e: with_marks(e, start_of(e, 2, attempt=2))),
    "started after Queued -> Killed": ({"starts"}, lambda e: with_marks(e, start_of(e, 4))),
    "started after Processing -> Invalid": ({"starts"}, lambda e: with_marks(e, start_of(e, 7))),
    "a mark of rubbish": ({"starts"}, lambda e: with_marks(e, history.as_mark("half a li"))),
    "a mark with a word for a number": ({"starts"}, lambda e: with_marks(e, history.as_mark("a 1 start five"))),
    "no mark": ({"starts"}, lambda e: without_marks(e, 3, 1, 2)),
    "only the mark of an attempt before": ({"starts"}, lambda e: without_marks(e, 3, 2)),
    "at two clients": (
        {"starts"},
        lambda e: dataclasses.replace(e, clients=[*e.clients, dataclasses.replace(e.clients[0], name="gpu2")]),
    ),
    "a reader missed a move": ({"feed"}, lambda e: with_reading(e, lambda seen: seen[:5] + seen[6:])),
    "a reader saw a move twice": ({"feed"}, lambda e: with_reading(e, lambda seen: [*seen[:5], *seen[4:]])),
    "a reader saw moves in another order": ({"feed"}, lambda e: with_reading(e, lambda seen: [*seen[:3], seen[4], seen[3], *seen[5:]])),
    "a reader saw another move": ({"feed"}, lambda e: with_reading(e, lambda seen: [*seen[:3], (*seen[3][:3], "Unknown"), *seen[4:]])),
    "a reader missed the last move": ({"feed"}, lambda e: with_reading(e, lambda seen: seen[:-1])),
    "a reader saw more than there was": ({"feed"}, lambda e: with_reading(e, lambda seen: [*seen, (1 << 60, 1, None, "Queued")])),
    "another end": ({"expected"}, lambda e: with_expected(e, 1, ends=["Failed", "Killed"])),
    "another end of a terminated one": (
        {"expected"},
        lambda e: with_expected(dataclasses.replace(e, terminated={4, 5, 7}), 7, ends=["Failed"]),
    ),
    "too many attempts": ({"expected"}, lambda e: with_expected(e, 3, most_attempts=1)),
    "nobody asked": ({"expected"}, lambda e: dataclasses.replace(e, terminated={5})),
    "another cause": ({"explained"}, lambda e: with_expected(e, 8, causes=["user", "infrastructure"])),
    "another content": ({"result"}, lambda e: with_expected(e, 1, members={"out.txt": "ab"})),
    "a member too much": ({"result"}, lambda e: with_expected(e, 1, members={})),
    "no ZIP": ({"result"}, lambda e: with_zip(e, b"no zip")),
    "a damaged ZIP": ({"result"}, lambda e: with_zip(e, zip_of("x").replace(b"out.txtx", b"out.txty"))),
    "a name twice": ({"result"}, lambda e: with_zip(e, name_twice())),
    "one more than the user's quota": ({"quota"}, lambda e: with_late_end(e, {"example": Quota(1, 5)})),
    "one more than the service's": ({"quota"}, lambda e: with_late_end(e, {"example": Quota(5, 1)})),
}
# What must not be taken for a fault.
ALLOWED: dict[str, Callable[[Evidence], Evidence]] = {
    "a reader that saw all": with_reading,
    "a reader that saw the first moves": lambda e: with_reading(e, upto=7),
    "nothing is looked at": lambda e: Evidence(e.server),
    "scripts that write no marks": lambda e: dataclasses.replace(
        e, marks=[], expected={job_id: dataclasses.replace(wanted, marked=False) for job_id, wanted in e.expected.items()}
    ),
    "starts newer than the marks, while jobs run": lambda e: dataclasses.replace(e, marks=[], settled=False),
    "terminated, and quicker": lambda e: dataclasses.replace(e, terminated={1, 2, 3, 4, 5, 9}),
    "terminated, and lost": lambda e: with_expected(dataclasses.replace(e, terminated={4, 5, 9}), 9, ends=["Completed"], causes=["user"]),
    "a payload that a second client never started": lambda e: dataclasses.replace(
        e,
        clients=[
            *e.clients,
            dataclasses.replace(
                e.clients[0],
                name="gpu2",
                moves={2: e.clients[0].moves[2][:1]},
                rows={2: e.clients[0].rows[2]._replace(status="Prepared", reason=e.clients[0].moves[2][0].reason, cause=None, moves=1)},
            ),
        ],
    ),
    "a payload of another server": lambda e: dataclasses.replace(
        e, clients=[dataclasses.replace(e.clients[0], rows={**e.clients[0].rows, 2: e.clients[0].rows[2]._replace(uuid="foreign")})]
    ),
    "as many attempts as expected": lambda e: with_expected(e, 3, most_attempts=2),
    "words as the program has them": lambda e: with_expected(e, 8, ends=(Status.FAILED, Status.COMPLETED), causes={Cause.LIMIT}),
    "more in a result, where that is not all": lambda e: with_expected(e, 1, members={}, only_members=False),
}


@pytest.mark.parametrize(("rules", "sql"), PLANTED_SQL.values(), ids=PLANTED_SQL)
def test_a_fault_planted_in_a_database_is_found(
    rules: set[str], sql: str, request: pytest.FixtureRequest, left_by_world: tuple[Path, World], tmp_path: Path
) -> None:
    folder, world = left_by_world
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    at_client = "[client: " in request.node.name
    with closing(sqlite3.connect(tmp_path / ("client.db" if at_client else "server.db"))) as db:
        before = db.total_changes
        db.executescript(sql)
        assert db.total_changes > before, "something was planted"
    faults = check(evidence_of(tmp_path, world.expected, world.terminated))
    assert rules_of(faults) == rules, faults
    about_the_server = not at_client or rules == {"starts"} or sql == RETRIED_FOR_ITS_OWN_FAILURE
    assert {fault.where for fault in faults} == {"server" if about_the_server else "gpu1"}


@pytest.mark.parametrize(("rules", "plant"), PLANTED_FILES.values(), ids=PLANTED_FILES)
def test_a_fault_planted_in_a_result_is_found(
    rules: set[str], plant: Callable[[Path], object], left_by_world: tuple[Path, World], tmp_path: Path
) -> None:
    folder, world = left_by_world
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    plant(tmp_path / "results" / f"{world.expected[3].uuid}.2.zip")
    assert found(evidence_of(tmp_path, world.expected, world.terminated)) == rules


@pytest.mark.parametrize(("rules", "plant"), PLANTED_VALUES.values(), ids=PLANTED_VALUES)
def test_a_fault_planted_in_the_evidence_is_found(rules: set[str], plant: Callable[[Evidence], Evidence], good: Evidence) -> None:
    assert found(plant(good)) == rules


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
def test_what_may_be_is_no_fault(change: Callable[[Evidence], Evidence], good: Evidence) -> None:
    assert check(change(good)) == []


def test_a_refused_job_that_waits_may_not_have_started(good: Evidence) -> None:
    """Between refusal and next claim the client surely has nothing; once it is sent again nobody knows."""
    moves = good.server.moves[6]
    assert [move.target for move in moves[:4]] == ["Queued", "Processing", "Queued", "Processing"]
    assert [history.was_sent(moves[:length], 1) for length in range(6)] == [False, False, True, False, True, True]
    assert not any(history.was_sent(moves[:length], 2) for length in range(6))


def test_the_report_tells_the_whole_story(good: Evidence) -> None:
    with pytest.raises(AssertionError) as raised:
        assert_proven(with_marks(with_expected(good, 77, uuid="x"), start_of(good, 3)))
    text = str(raised.value)
    assert text.startswith("2 faults:\n  accepted: job 77: was answered with 201 and has no row\n  starts: job 3: attempt 1 of ")
    for line in (
        f"server, job 3, {good.server.rows[3].mark}: Completed (service=example user=1)",
        "attempt 1: None -> Queued: uploaded",
        "attempt 2: Running -> Completed: run.sh ended with exit status 0",
        "attempt 1 at gpu1: infrastructure: attempt 1: gpu1 lost it",
        f"gpu1, job 3, {good.server.rows[3].uuid}.1: Failed, cause infrastructure",
        f"mark: attempt 1 start {start_of(good, 3).pid}",
    ):
        assert line in text
    assert good.server.rows[4].uuid not in text


# == Quotas, in the order of the log ==

NAMES = {"Q": "Queued", "P": "Processing", "S": "Submitted", "R": "Running", "U": "Unknown", "C": "Completed"}


def a_log(*jobs: str, user_ids: Sequence[int] = (), jumpy: bool = False) -> Log:
    """A log of jobs told as `Q1 P2 S2 C5`: letters of states, each with its time; with `jumpy` wall time is wrong, and `seq` right."""
    rows, moves = {}, {}
    for job_id, told in enumerate(jobs, 1):
        words = [(NAMES[word[0]], int(word[1:])) for word in told.split()]
        targets = [target for target, _ in words]
        attempt, chained = 1, []
        for number, ((target, when), source) in enumerate(zip(words, [None, *targets]), 1):
            attempt += target == "Queued" and source not in (None, "Processing")
            at, seq = (100.0 - when, when) if jumpy else (float(when), None)
            chained.append(Move(job_id, number, at, source, target, "because of it", attempt, seq))
        user_id = user_ids[job_id - 1] if user_ids else 1
        digest = ("ab", 5) if targets[-1] == "Completed" else (None, None)
        rows[job_id] = Row(
            job_id, f"u{job_id}", user_id, "example", targets[-1], "because of it", None, 5, attempt, digest[1], digest[0], None, len(words)
        )
        moves[job_id] = chained
    past = {
        job_id: [Attempt(job_id, number, "gpu1", None, "it was lost", "infrastructure") for number in range(1, row.attempt)]
        for job_id, row in rows.items()
    }
    return Log(rows, moves, past)


def counted(log: Log, runs_per_user: int, max_runs: int = 1000) -> list[int | None]:
    """The jobs that are one too many."""
    faults = check(Evidence(log, quotas={"example": Quota(runs_per_user, max_runs)}, settled=False))
    assert rules_of(faults) <= {"quota"}
    return [fault.job for fault in faults]


@pytest.mark.parametrize("jumpy", [False, True], ids=["by wall time", "by seq"])
def test_quotas_are_counted_at_every_instant(jumpy: bool) -> None:
    one_by_one = a_log("Q1 P2 S4 R6 C8", "Q3 P9 U10 Q11", "Q5 P12", jumpy=jumpy)
    assert counted(one_by_one, 1, 1) == []
    two_at_once = a_log("Q1 P2 S4 R6 C8", "Q3 P7 U9 S10 C11", jumpy=jumpy)
    assert counted(two_at_once, 2, 2) == []
    assert counted(two_at_once, 1) == [2]
    assert counted(two_at_once, 2, 1) == [2]
    of_two = a_log("Q1 P2 S4 R6 C8", "Q3 P7 U9 S10 C11", user_ids=[1, 2], jumpy=jumpy)
    assert counted(of_two, 1) == []
    assert counted(of_two, 1, 1) == [2]
    in_three = a_log("Q1 P4 S7 C10", "Q2 P5 S8 C11", "Q3 P6 S9 C12", jumpy=jumpy)
    assert counted(in_three, 3, 3) == []
    assert counted(in_three, 2) == [3]
    assert counted(in_three, 1) == [2, 3]


def test_what_happens_at_one_time_is_taken_to_the_good_of_the_program() -> None:
    assert counted(a_log("Q1 P2 S3 C5", "Q1 P5 S6"), 1) == [], "one leaves as the other comes"
    assert counted(a_log("Q1 P5 S6", "Q1 P2 S3 C5"), 1) == [], "in whatever order they are named"
    assert counted(a_log("Q1 P5 S5 C5", "Q1 P5 S5 C5"), 1) == [], "two pass through, one after the other"
    assert counted(a_log("Q1 P2 Q5 P5", "Q1 P5 S5 C5"), 1) == [], "one comes again, another passes before"
    assert counted(a_log("Q1 P2 S3 C5", "Q1 P5", "Q1 P5"), 1) == [3], "one leaves, two come"
    assert counted(a_log("Q1 P2 S3 C9", "Q1 P5 S5 C5"), 1) == [2], "one passes through while another is there"
    assert counted(a_log("Q1 P2 S3 C9", "Q1 P5 Q5"), 1) == [2], "however short"
    assert counted(a_log("Q1 P2 Q5 P5", "Q1 P3"), 1) == [2, 1], "one that leaves and comes again"
    assert counted(a_log("Q1 P2 Q5 P5", "Q1 P3"), 2) == []


def test_an_order_that_falls_is_said() -> None:
    assert found(Evidence(a_log("Q5 P6 S4 C7"), quotas=QUOTAS)) == {"order"}
    assert found(Evidence(a_log("Q5 P6", "Q4 P7"), quotas=QUOTAS, settled=False)) == {"order"}
    assert found(Evidence(a_log("Q5 P6", "Q4 P7", jumpy=True), quotas=QUOTAS, settled=False)) == {"order"}
    assert found(Evidence(a_log("Q5 P6 S4 C7"))) == set(), "without quotas nobody asks for the order"
    assert found(Evidence(a_log("Q1 P3 S4 C6", "Q2 P5 U7 C8", jumpy=True), quotas=QUOTAS)) == set(), "wall time falls all the way"


def test_without_an_order_the_present_is_counted() -> None:
    log = a_log("Q5 P6 S4", "Q5 P7", "Q5 P8", "Q5 P3 S4 C5")
    faults = check(Evidence(log, quotas={"example": Quota(2, 5)}, settled=False))
    assert [(fault.rule, fault.job) for fault in faults] == [("order", 1), ("quota", 3)]
    assert found(Evidence(a_log("Q5 P6 S4 C9", "Q5 P7 S8 C9"), quotas={"example": Quota(1, 1)})) == {"order"}, "and nothing else"


def test_a_clock_that_is_set_back_and_forth_does_not_matter(tmp_path: Path) -> None:
    """The order is read from the database; without that column, as schema 1 had none, nothing is proven of quotas."""
    world = World(tmp_path)
    for user_id, jump_s in ((1, 0), (1, -500), (2, 1000), (3, -70)):
        world.clock.set_s(jump_s)
        world.do(world.submit(user_id), "claim")
    world.settle()
    world.close()
    evidence = world.evidence()
    assert check(evidence) == []
    assert found(dataclasses.replace(evidence, quotas={"example": Quota(1, 3)})) == {"quota"}
    with closing(sqlite3.connect(tmp_path / "server.db")) as db:
        db.execute("DROP INDEX history_seq")
        db.execute("ALTER TABLE history DROP COLUMN seq")
    assert world.evidence().server.moves[1][0].seq is None
    assert found(world.evidence()) == {"order"}


# == At random ==

JUMPS = st.sampled_from([0, 0, 0, 0, 500, -500])
STEPS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 11), JUMPS), max_size=60)
AT_RANDOM = settings(deadline=None, max_examples=60)


def a_random_world(steps: Sequence[tuple[int, int, int]], settle: bool) -> tuple[World, Evidence]:
    """What has happened by these steps; at least one job to its end where all shall be settled."""
    world = World()
    if settle:
        world.submit()
    for pick, way, jump_s in steps:
        world.clock.set_s(jump_s)
        world.step(pick, way)
    if settle:
        world.settle()
    evidence = world.evidence(settle)
    world.close()
    return world, evidence


@AT_RANDOM
@given(STEPS, st.booleans())
def test_whatever_legally_happens_is_proven(steps: list[tuple[int, int, int]], settle: bool) -> None:
    world, evidence = a_random_world(steps, settle)
    assert_proven(evidence)
    if world.most:
        tight = Quota(world.most["user"], world.most["service"])
        assert check(dataclasses.replace(evidence, quotas={"example": tight})) == []
        for lower in (tight._replace(runs_per_user=tight.runs_per_user - 1), tight._replace(max_runs=tight.max_runs - 1)):
            assert found(dataclasses.replace(evidence, quotas={"example": lower})) == {"quota"}


# == Marks ==


def test_the_lines_of_a_script_write_its_marks(tmp_path: Path) -> None:
    marks = tmp_path / "it's marks"
    scripts = {
        "ends": "exit 3",
        "is killed": "kill -KILL $$",
        "is ended": "kill -TERM $$; while :; do :; done",
        "has children": "(exit 1); bash -c 'exit 2'; false",
    }
    codes = {}
    for name, script in scripts.items():
        environment = {"JOBORCH_MARK": f"{name.replace(' ', '-')}.12", "PATH": "/usr/bin:/bin"}
        codes[name] = subprocess.run(["bash", "-c", mark_lines(marks) + script], env=environment, timeout=20).returncode
    assert codes == {"ends": 3, "is killed": -9, "is ended": -15, "has children": 1}
    read = read_marks(marks, tmp_path / "nothing")
    told = [(mark.uuid, mark.attempt, mark.what) for mark in read]
    both = [(name, 12, what) for name in ("ends", "is-ended", "has-children") for what in ("start", "end")]
    assert sorted(told) == sorted([*both, ("is-killed", 12, "start")])
    assert len({mark.pid for mark in read}) == 4


def test_a_script_that_cannot_write_its_mark_does_not_run(tmp_path: Path) -> None:
    script = mark_lines(tmp_path / "nowhere" / "marks") + "echo ran"
    done = subprocess.run(["bash", "-c", script], env={"JOBORCH_MARK": "a.1", "PATH": "/usr/bin:/bin"}, capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (97, b"")


# == The real program ==


def test_a_real_run_is_proven(make_pair: MakePair) -> None:
    """A client that is killed while scripts run, one job that fails, one that is terminated: all is proven."""
    pair = make_pair(server={"SERVICE_EXAMPLE_RUNS_PER_USER": "3"}, client={"JOBORCH_SLOTS": "4"}).start()
    marks, gate = pair.folder / "marks", pair.folder / "gate"
    begin = mark_lines(marks)
    waits = f"while [ ! -e {gate} ]; do sleep 0.05; done\n"
    ids = [submit(pair.server, begin + waits + f"echo {number} >out.txt") for number in range(4)]
    failing = submit(pair.server, begin + "exit 4", user_id=2)
    unwanted = submit(pair.server, begin + "exec sleep 1000", user_id=2)
    wait_status(pair.server, unwanted, "Running")
    pair.client.kill()
    pair.client.start()
    assert pair.server.post(f"/terminate/{unwanted}").status_code in (200, 202), "the server may not have found it back yet"
    gate.touch()
    completed = {
        job_id: Expected(ends=["Completed"], members={"out.txt": hashlib.sha256(b"%d\n" % number).hexdigest()}, most_attempts=1)
        for number, job_id in enumerate(ids)
    }
    wanted = {**completed, failing: Expected(ends=["Failed"], causes=["user"]), unwanted: Expected(ends=["Killed"], causes=["cancelled"])}
    for job_id, each in wanted.items():
        wait_status(pair.server, job_id, *each.ends)
    evidence = gather(
        pair.server.data / "joborch.db",
        clients={"client": pair.client.data / "joborch.db"},
        marks=[marks],
        results=pair.server.data / "results",
        expected=wanted,
        quotas={"example": Quota(3, 10)},
        terminated={unwanted},
    )
    assert_proven(evidence)
    assert len([mark for mark in evidence.marks or () if mark.what == "start"]) == 6
    assert found(dataclasses.replace(evidence, quotas={"example": Quota(2, 10)})) == {"quota"}, "three at once are seen"


# == The command ==


def test_the_command_proves_and_says_what_it_did_not_look_at(left_by_world: tuple[Path, World], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = left_by_world
    assert main([str(folder / "server.db"), "--client-db", str(folder / "client.db")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("10 jobs (2 Cleaned, 3 Completed, ") and "1 clients' logs" in said[0]
    assert (
        said[1]
        == "not looked at: quotas (--quota), the scripts' marks (--marks), that all have ended (--settled), what a reader of /changes saw"
    )
    assert said[2].startswith("proven: accepted, expected, legal, chain")


def test_the_command_finds_faults(left_by_world: tuple[Path, World], tmp_path: Path) -> None:
    """As a command of its own, from any folder."""
    folder, _ = left_by_world
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "marks").write_text((tmp_path / "marks").read_text() + "nobody 1 start 5\n")
    command = [sys.executable, history.__file__, "server.db", "--marks", "marks", "--quota", "example:2:3", "--settled"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert "not looked at: what a reader of /changes saw\n" in done.stdout
    assert "1 fault:\n  starts: job None: a script started for the uuid nobody" in done.stdout
    missing = subprocess.run([*command[:2], "nothing.db"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert missing.returncode == 2
    assert "there is no such database" in missing.stderr
