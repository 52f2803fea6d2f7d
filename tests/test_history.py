"""The history checker finds nothing in what the program does, and every fault that is planted in it, under the right name.

A `World` moves jobs through real Stores, as the loops of server and client move them, and notes what scripts and driver
would note. Faults are planted in the files that it leaves, in the values read from them, and at random.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import io
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar, cast

import history
import pytest
from conftest import MakePair
from harness import submit, wait_status
from history import (
    BUSY,
    ENDED,
    LEGAL,
    OVER,
    RULES,
    Attempt,
    Evidence,
    Expected,
    Fault,
    Log,
    Mark,
    Move,
    Quota,
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

QUOTAS = {"example": Quota(2, 3)}
NO_QUOTAS = {"example": Quota(1000, 1000)}
V = TypeVar("V")


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
        return self.client.job(joborch.JOB_BY_MARK, uuid=job.uuid, attempt=job.attempt)

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
        self.must_move(job, Status.CLEANED, "2 days after it ended")

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
        for payload in self.client.jobs(joborch.PAYLOADS_IN, status="Running", limit=1000):
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


def test_rules_are_all_and_named() -> None:
    assert list(RULES) == ["accepted", "expected", "legal", "chain", "left", "order", "quota", "starts", "attempts", "result", "explained"]
    assert all(rule.__doc__ for rule in RULES.values())


def test_the_words_are_those_of_the_program() -> None:
    assert frozenset(map(str, joborch.BUSY)) == BUSY
    assert frozenset(map(str, joborch.ENDED)) == ENDED
    assert frozenset(map(str, joborch.OVER)) == OVER
    assert LEGAL["server"] >= {("Queued", "Processing"), ("Completed", "Cleaned")}


def test_what_still_goes_on_is_proven_as_far_as_it_is() -> None:
    world = World()
    running = world.do(world.submit(), "claim", "accept", "start")
    sending = world.do(world.submit(), "claim")
    waiting = world.submit()
    assert check(world.evidence(settled=False)) == []
    faults = check(world.evidence())
    assert [(fault.rule, fault.job) for fault in faults] == [("accepted", job_id) for job_id in (running, sending, waiting)]
    world.close()


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


def test_what_is_not_given_is_not_looked_at(left_by_world: tuple[Path, World]) -> None:
    evidence = gather(left_by_world[0] / "server.db")
    assert (evidence.marks, evidence.results, evidence.terminated) == (None, None, None)
    assert (evidence.clients, evidence.expected, evidence.quotas) == ([], {}, {})
    assert check(evidence) == []


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool, good: Evidence) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        check(good)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_there_must_be_a_database(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such database"):
        read_log(tmp_path / "nothing.db")
    assert not list(tmp_path.iterdir())


# == Faults planted in the files ==


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
        f"SELECT job_id, number + 1, at, '{source}', '{target}', 'again', attempt, seq FROM history "
        f"WHERE job_id = {job_id} ORDER BY number DESC LIMIT 1;"
    ) + of_job(job_id, f"status = '{target}', reason = 'again', moves = moves + 1")


RUNNING_AGAIN = "status = 'Running', reason = '', cause = NULL, moves = 4"
ORPHAN = "INSERT INTO history (job_id, number, at, target, reason, attempt, seq) VALUES (99, 1, 0, 'Queued', '', 1, 1 << 60)"
TOO_MUCH = "INSERT INTO attempts (job_id, attempt, client, reason, cause) VALUES (1, 1, 'gpu1', 'gpu1 lost it', 'infrastructure')"

PLANTED_SQL: list[tuple[str, str, set[str]]] = [
    ("a row is gone", "DELETE FROM jobs WHERE id = 2", {"accepted", "chain", "starts"}),
    ("the row of a success is gone", "DELETE FROM jobs WHERE id = 1", {"accepted", "chain", "starts"}),
    ("a job is gone", "DELETE FROM jobs WHERE id = 4; DELETE FROM history WHERE job_id = 4", {"accepted"}),
    ("a job hangs", "DELETE FROM history WHERE job_id = 8 AND number = 5;" + of_job(8, RUNNING_AGAIN), {"accepted"}),
    ("another uuid", of_job(4, "uuid = 'x'"), {"accepted"}),
    ("a move is gone", "DELETE FROM history WHERE job_id = 3 AND number = 4", {"chain"}),
    ("all moves are gone", "DELETE FROM history WHERE job_id = 4", {"chain", "accepted"}),
    ("moves of nobody", ORPHAN, {"chain"}),
    ("attempts of nobody", "INSERT INTO attempts (job_id, attempt) VALUES (99, 1)", {"chain"}),
    ("a number is left out", of_move(1, 5, "number = 6"), {"chain"}),
    ("a target is changed", of_move(1, 4, "target = 'Unknown'"), {"chain"}),
    ("a source is changed", of_move(1, 5, "source = 'Unknown'"), {"chain"}),
    ("the first move has a source", of_move(4, 1, "source = 'Processing'"), {"chain"}),
    ("it began elsewhere", state_between(4, 1, "Unknown"), {"chain"}),
    ("a row stands elsewhere", of_job(2, "status = 'Cleaned'"), {"chain"}),
    ("a row counts wrong", of_job(1, "moves = 4"), {"chain"}),
    ("an illegal move", state_between(8, 3, "Running") + state_between(8, 4, "Submitted"), {"legal", "starts"}),
    ("a state is taken twice", state_between(8, 3, "Unknown") + state_between(8, 4, "Unknown"), {"legal"}),
    ("a word that is no state", state_between(8, 4, "Lost"), {"legal"}),
    ("an end is left", further(1, "Completed", "Running"), {"left"}),
    ("it ends twice", further(2, "Failed", "Killed") + of_job(2, "cause = 'cancelled'"), {"left", "accepted", "expected", "explained"}),
    ("Cleaned is left", further(9, "Cleaned", "Queued"), {"left"}),
    ("Cleaned twice", further(9, "Cleaned", "Cleaned"), {"left"}),
    ("another end than expected", of_move(2, 5, "target = 'Invalid'") + of_job(2, "status = 'Invalid'"), {"expected"}),
    ("a wish that nobody had", of_job(2, "kill_requested_at = 1"), {"expected"}),
    ("an attempt is forgotten", "DELETE FROM attempts WHERE job_id = 3", {"attempts"}),
    ("an attempt too much", TOO_MUCH, {"attempts"}),
    ("retried for the script's failure", of_attempt(3, "cause = 'user'"), {"attempts"}),
    ("retried for no cause", of_attempt(3, "cause = NULL"), {"attempts"}),
    ("retried after an exit", of_attempt(3, "exit_code = 1"), {"attempts"}),
    ("an attempt at nobody", of_attempt(3, "client = NULL"), {"attempts"}),
    ("an attempt for no reason", of_attempt(3, "reason = '?'"), {"attempts"}),
    ("more attempts than allowed", of_job(3, "retries = 0"), {"attempts"}),
    ("an attempt is not counted", of_move(3, 8, "attempt = 1"), {"attempts"}),
    ("the row is at another attempt", of_job(10, "attempt = 1") + "DELETE FROM attempts WHERE job_id = 10", {"attempts", "result"}),
    ("no digest in the row", of_job(1, "result_sha256 = NULL"), {"result"}),
    ("no size in the row", of_job(1, "result_size = NULL"), {"result"}),
    ("another digest", of_job(1, "result_sha256 = 'ab'"), {"result"}),
    ("another size", of_job(1, "result_size = 1"), {"result"}),
    ("what a failure left is gone", of_job(2, "result_sha256 = 'ab', result_size = 5"), {"result"}),
    ("no reason", of_move(2, 5, "reason = ' '") + of_job(2, "reason = ' '"), {"explained"}),
    ("two reasons", of_job(2, "reason = 'because'"), {"explained"}),
    ("no cause", of_job(8, "cause = NULL"), {"explained"}),
    ("a cause that is none", of_job(8, "cause = 'bad luck'"), {"explained"}),
    ("a cause of another end", of_job(8, "cause = 'cancelled'"), {"explained"}),
    ("the cause of another failure", of_job(8, "cause = 'user'"), {"explained"}),
    ("a cause of a success", of_job(1, "cause = 'user'"), {"explained"}),
    ("no cause, and Cleaned", of_job(9, "cause = NULL"), {"explained"}),
    ("time falls within a job", "UPDATE history SET seq = seq - 1000000000 WHERE job_id = 8 AND number > 1", {"order"}),
    ("time falls between two jobs", "UPDATE history SET seq = seq - 1000000000 WHERE job_id = 4", {"order"}),
]
# On the client, whose payloads 1 and 2 are of the jobs 1 and 2, 3 and 4 of job 3.
PLANTED_CLIENT_SQL: list[tuple[str, str, set[str]]] = [
    ("a move is gone", "DELETE FROM history WHERE job_id = 2 AND number = 2", {"chain"}),
    ("a row is gone", "DELETE FROM jobs WHERE id = 2", {"chain"}),
    ("an illegal move", state_between(1, 2, "Unknown"), {"legal"}),
    ("it ends twice", further(1, "Completed", "Failed") + of_job(1, "cause = 'user'"), {"left"}),
    ("no reason", of_move(2, 3, "reason = ''") + of_job(2, "reason = ''"), {"explained"}),
    ("no reason to compare", of_move(3, 3, "reason = ''") + of_job(3, "reason = '', cause = 'user'"), {"explained"}),
    ("no cause", of_job(2, "cause = NULL"), {"explained"}),
    ("an attempt that was never sent", of_job(2, "attempt = 3") + "UPDATE history SET attempt = 3 WHERE job_id = 2", {"starts"}),
    ("two attempts in one payload", of_move(2, 2, "attempt = 2"), {"attempts"}),
    (
        "a retry after the script's own failure",
        of_job(3, "cause = 'user', reason = 'gpu1 lost it'") + of_move(3, 3, "reason = 'gpu1 lost it'"),
        {"attempts"},
    ),
]
ABOUT_THE_SERVER = {"an attempt that was never sent", "a retry after the script's own failure"}
PLANTED = [("server.db", *planted) for planted in PLANTED_SQL] + [("client.db", *planted) for planted in PLANTED_CLIENT_SQL]


@pytest.mark.parametrize(("file", "name", "sql", "rules"), PLANTED, ids=[f"{file}: {name}" for file, name, _, _ in PLANTED])
def test_a_fault_planted_in_a_database_is_found(
    file: str, name: str, sql: str, rules: set[str], left_by_world: tuple[Path, World], tmp_path: Path
) -> None:
    folder, world = left_by_world
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with closing(sqlite3.connect(tmp_path / file)) as db:
        before = db.total_changes
        db.executescript(sql)
        assert db.total_changes > before, "something was planted"
    faults = check(evidence_of(tmp_path, world.expected, world.terminated))
    assert rules_of(faults) == rules, faults
    assert all(str(fault).startswith(f"{fault.rule}: gpu1, job ") == (fault.where == "gpu1") for fault in faults)
    assert {fault.where for fault in faults} == {"gpu1" if file == "client.db" and name not in ABOUT_THE_SERVER else "server"}


def spoil(path: Path) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


PLANTED_FILES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "a byte is changed": spoil,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a folder": lambda path: path.rename(path.with_name("moved")).with_name(path.name).mkdir(),
}


@pytest.mark.parametrize("plant", PLANTED_FILES.values(), ids=PLANTED_FILES)
def test_a_fault_planted_in_a_result_is_found(plant: Callable[[Path], object], left_by_world: tuple[Path, World], tmp_path: Path) -> None:
    folder, world = left_by_world
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    plant(tmp_path / "results" / f"{world.expected[3].uuid}.2.zip")
    faults = check(evidence_of(tmp_path, world.expected, world.terminated))
    assert [(fault.rule, fault.job) for fault in faults] == [("result", 3)]


def test_results_lie_where_an_older_joborch_left_them_or_where_one_says(left_by_world: tuple[Path, World], tmp_path: Path) -> None:
    folder, world = left_by_world
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in list((tmp_path / "results").iterdir()):
        path.rename(path.with_name(path.name.split(".")[0] + ".zip"))
    assert check(evidence_of(tmp_path, world.expected, world.terminated)) == []
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    elsewhere = gather(
        tmp_path / "server.db",
        results=lambda row: tmp_path / "elsewhere" / f"{row.uuid}.zip",
        expected=world.expected,
        terminated=world.terminated,
    )
    assert check(elsewhere) == []
    assert set(elsewhere.results or ()) == {1, 3, 10}
    assert found(evidence_of(tmp_path, world.expected, world.terminated)) == {"result"}


@pytest.mark.parametrize(
    ("data", "damage"),
    [(b"", "not a zip"), (zip_of("x")[:-1], "not a zip"), (zip_of("x").replace(b"out.txtx", b"out.txty"), "CRC"), (b"no zip", "not a zip")],
)
def test_a_damaged_zip_is_found_though_its_digest_is_right(data: bytes, damage: str, good: Evidence) -> None:
    read = read_result(io.BytesIO(data))
    assert damage in read.damage
    row = good.server.rows[1]._replace(result_size=read.size, result_sha256=read.sha256)
    evidence = dataclasses.replace(with_row(good, row), results={**(good.results or {}), 1: read})
    for members in (good.expected[1].members, {}):
        faults = check(with_expected(evidence, 1, members=members))
        assert [(fault.rule, fault.sentence) for fault in faults] == [("result", f"its result cannot be read: {read.damage}")]


def test_content_is_expected_of_what_completed_alone(good: Evidence) -> None:
    row = good.server.rows[2]._replace(result_size=5, result_sha256="ab")
    evidence = dataclasses.replace(with_row(good, row), results={**(good.results or {}), 2: history.Result(5, "ab")})
    assert check(with_expected(evidence, 2, ends=(), members={"out.txt": "ab"}, only_members=True)) == []


def test_members_are_read_where_somebody_expects_some(left_by_world: tuple[Path, World]) -> None:
    folder, world = left_by_world
    log, place = read_log(folder / "server.db"), history.results_in(folder / "results")
    read = history.read_results(
        log, place, {1: Expected(only_members=True), 3: Expected(members={"a": "b"}), 10: Expected(world.expected[10].uuid)}
    )
    assert {job_id: bool(result.members) for job_id, result in read.items()} == {1: True, 3: True, 10: False}


def test_a_name_that_stands_twice_is_found() -> None:
    spool = io.BytesIO()
    with zipfile.ZipFile(spool, "w") as archive:
        archive.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a", "2")
    spool.seek(0)
    assert "twice" in read_result(spool).damage


def test_links_and_folders_of_a_result(tmp_path: Path) -> None:
    """A folder is no member with content; a link is one by its target."""
    spool = io.BytesIO()
    with zipfile.ZipFile(spool, "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("link", "folder")
    spool.seek(0)
    assert read_result(spool).members == {"link": hashlib.sha256(b"folder").hexdigest()}


# == Faults planted in what was read ==


def with_row(evidence: Evidence, row: Row, log: int = 0) -> Evidence:
    """The same evidence with another row; `log` 0 is the server's."""
    return with_log(evidence, log, rows={**log_at(evidence, log).rows, row.id: row})


def with_moves(evidence: Evidence, job_id: int, moves: Sequence[Move], log: int = 0) -> Evidence:
    """The same evidence with other moves of a job."""
    return with_log(evidence, log, moves={**log_at(evidence, log).moves, job_id: moves})


def log_at(evidence: Evidence, log: int) -> Log:
    """The server's log, or that of a client."""
    return [evidence.server, *evidence.clients][log]


def with_log(evidence: Evidence, log: int, **changes: Any) -> Evidence:
    """The same evidence with another log."""
    logs = [evidence.server, *evidence.clients]
    logs[log] = dataclasses.replace(logs[log], **changes)
    return dataclasses.replace(evidence, server=logs[0], clients=logs[1:])


def with_marks(evidence: Evidence, *marks: Mark) -> Evidence:
    """The same evidence with further marks."""
    return dataclasses.replace(evidence, marks=[*(evidence.marks or ()), *marks])


def with_expected(evidence: Evidence, job_id: int, **changes: Any) -> Evidence:
    """The same evidence with another expectation."""
    wanted = dataclasses.replace(evidence.expected.get(job_id, Expected()), **changes)
    return dataclasses.replace(evidence, expected={**evidence.expected, job_id: wanted})


def start_of(evidence: Evidence, job_id: int, **changes: Any) -> Mark:
    """The first start of a job's script, or one like it."""
    row = evidence.server.rows[job_id]
    first = next((mark for mark in evidence.marks or () if mark.uuid == row.uuid), Mark(row.uuid, 1, "start", 99))
    return first._replace(**changes)


PLANTED_VALUES: dict[str, tuple[str, int | None, Callable[[Evidence], Evidence]]] = {
    "a 201 without a row": ("accepted", 77, lambda e: with_expected(e, 77, uuid="x")),
    "a uuid twice": (
        "accepted",
        4,
        lambda e: with_expected(with_row(e, e.server.rows[4]._replace(uuid=e.server.rows[3].uuid)), 4, uuid=""),
    ),
    "started twice": ("starts", 2, lambda e: with_marks(e, start_of(e, 2))),
    "started twice by others": ("starts", 2, lambda e: with_marks(e, start_of(e, 2, pid=7))),
    "ended by another process": ("starts", 5, lambda e: with_marks(e, start_of(e, 5, what="end", pid=7))),
    "an unknown script": ("starts", None, lambda e: with_marks(e, Mark("nobody", 1, "start", 7))),
    "an unknown attempt": ("starts", 2, lambda e: with_marks(e, start_of(e, 2, attempt=2))),
    "attempt 0": ("starts", 2, lambda e: with_marks(e, start_of(e, 2, attempt=0))),
    "started after Queued -> Killed": ("starts", 4, lambda e: with_marks(e, start_of(e, 4))),
    "started after Processing -> Invalid": ("starts", 7, lambda e: with_marks(e, start_of(e, 7))),
    "a mark of rubbish": ("starts", None, lambda e: with_marks(e, history.as_mark("half a li"))),
    "no mark": ("starts", 3, lambda e: dataclasses.replace(e, marks=[m for m in e.marks or () if m.uuid != e.server.rows[3].uuid])),
    "only the mark of an attempt before": (
        "starts",
        3,
        lambda e: dataclasses.replace(e, marks=[m for m in e.marks or () if (m.uuid, m.attempt) != (e.server.rows[3].uuid, 2)]),
    ),
    "at two clients": (
        "starts",
        2,
        lambda e: dataclasses.replace(e, clients=[*e.clients, dataclasses.replace(e.clients[0], name="gpu2")]),
    ),
    "another end": ("expected", 1, lambda e: with_expected(e, 1, ends=["Failed", "Killed"])),
    "another end of a terminated one": (
        "expected",
        7,
        lambda e: with_expected(dataclasses.replace(e, terminated={4, 5, 7}), 7, ends=["Failed"]),
    ),
    "too many attempts": ("expected", 3, lambda e: with_expected(e, 3, most_attempts=1)),
    "nobody asked": ("expected", 4, lambda e: dataclasses.replace(e, terminated={5})),
    "another cause": ("explained", 8, lambda e: with_expected(e, 8, causes=["user", "infrastructure"])),
    "another content": ("result", 1, lambda e: with_expected(e, 1, members={"out.txt": "ab"})),
    "a member is missing": ("result", 1, lambda e: with_expected(e, 1, members={"log.txt": "ab"}, only_members=False)),
    "a member too much": ("result", 1, lambda e: with_expected(e, 1, members={})),
    "a result is gone": ("result", 1, lambda e: dataclasses.replace(e, results={})),
    "one more than the user's quota": ("quota", 10, lambda e: with_late_end(e, {"example": Quota(1, 5)})),
    "one more than the service's": ("quota", 10, lambda e: with_late_end(e, {"example": Quota(5, 1)})),
}


def with_late_end(evidence: Evidence, quotas: Mapping[str, Quota]) -> Evidence:
    """As if job 8 had stayed with its client until all was over."""
    moves = list(evidence.server.moves[8])
    moves[-1] = moves[-1]._replace(seq=10**18)
    return dataclasses.replace(with_moves(evidence, 8, moves), quotas=quotas)


MANY = ("a result is gone", "at two clients", "one more than the user's quota", "one more than the service's")
FAULTS_OF_MANY = [PLANTED_VALUES[name][2] for name in MANY]


@pytest.mark.parametrize(("rule", "job", "plant"), PLANTED_VALUES.values(), ids=PLANTED_VALUES)
def test_a_planted_fault_is_found(rule: str, job: int | None, plant: Callable[[Evidence], Evidence], good: Evidence) -> None:
    faults = check(plant(good))
    assert rules_of(faults) == {rule}
    assert job in {fault.job for fault in faults}
    # Where all results are gone, a job stays too long or a client is there twice, others are at fault too.
    assert {fault.job for fault in faults} == {job} or plant in FAULTS_OF_MANY


def test_what_was_not_looked_at_is_no_fault(good: Evidence) -> None:
    blind = dataclasses.replace(good, marks=None, results=None, terminated=None, quotas={}, expected={}, clients=())
    assert check(blind) == []
    unmarked = {job_id: dataclasses.replace(wanted, marked=False) for job_id, wanted in good.expected.items()}
    assert check(dataclasses.replace(good, marks=[], expected=unmarked)) == []


def test_a_terminated_job_may_have_been_quicker_and_a_lost_one_may_fail(good: Evidence) -> None:
    asked = dataclasses.replace(good, terminated={1, 2, 3, 4, 5, 9})
    assert check(asked) == []
    assert check(with_expected(asked, 9, ends=["Completed"], causes=["user"])) == []
    assert found(with_expected(asked, 2, ends=["Completed"])) == {"expected"}
    nobody_knows = check(dataclasses.replace(good, terminated=None))
    assert [(fault.rule, fault.job) for fault in nobody_knows] == [("expected", 4), ("expected", 5)], "it was to complete"


def test_a_start_may_be_newer_than_the_marks_while_jobs_run(good: Evidence) -> None:
    assert check(dataclasses.replace(good, marks=[], settled=False)) == []
    assert found(dataclasses.replace(good, marks=[])) == {"starts"}


def test_a_payload_that_was_never_started_is_no_start(good: Evidence) -> None:
    """A second client may have got the files as well, where an answer was lost: what counts is who started them."""
    payload, moves = good.clients[0].rows[2], good.clients[0].moves[2]
    waiting = payload._replace(status="Prepared", reason=moves[0].reason, cause=None, moves=1)
    assert check(dataclasses.replace(good, clients=[*good.clients, Log({2: waiting}, {2: moves[:1]}, {}, "client", "gpu2")])) == []


def test_payloads_of_other_servers_are_nobody_s_fault(good: Evidence) -> None:
    client = good.clients[0]
    foreign = {99: client.rows[2]._replace(id=99, uuid="of another server")}
    assert check(with_log(good, 1, rows={**client.rows, **foreign}, moves={**client.moves, 99: client.moves[2]})) == []


def test_a_job_that_was_killed_without_a_wish(good: Evidence) -> None:
    """Somebody may have ended its payload at the client; then the driver knows."""
    silent = with_row(good, good.server.rows[5]._replace(kill_requested_at=None))
    assert check(silent) == []
    assert found(dataclasses.replace(silent, terminated={4})) == {"expected"}


def test_more_than_expected_may_be_in_a_result_unless_that_is_all(good: Evidence) -> None:
    results = dict(good.results or {})
    results[1] = results[1]._replace(members={**results[1].members, "run.sh": "ab"})
    more = dataclasses.replace(good, results=results)
    assert found(more) == {"result"}
    assert check(with_expected(more, 1, only_members=False)) == []


def test_a_job_without_moves_does_not_upset_the_order(good: Evidence) -> None:
    assert found(with_moves(good, 4, [])) == {"accepted", "chain"}


def test_two_words_are_a_sentence(good: Evidence) -> None:
    past = [one._replace(reason="it burned") for one in good.server.attempts[3]]
    assert check(with_log(good, 0, attempts={**good.server.attempts, 3: past})) == []


def test_as_many_attempts_as_expected_are_no_fault(good: Evidence) -> None:
    assert check(with_expected(good, 3, most_attempts=2)) == []


def test_states_and_causes_may_be_given_as_the_program_has_them(good: Evidence) -> None:
    assert check(with_expected(good, 8, ends=(Status.FAILED, Status.COMPLETED), causes={Cause.LIMIT})) == []
    assert found(with_expected(good, 8, ends=(Status.KILLED,))) == {"expected"}


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


def test_a_report_of_many_jobs_is_bounded(good: Evidence) -> None:
    rows = {number: good.server.rows[1]._replace(id=number, uuid=f"u{number}") for number in range(1, 51)}
    with pytest.raises(AssertionError, match="and 30 more jobs") as raised:
        assert_proven(Evidence(Log(rows, {})))
    assert str(raised.value).count("has a row, and no history") == 50


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


def test_a_service_without_quotas_is_not_counted() -> None:
    log = a_log("Q1 P2", "Q1 P2")
    assert check(Evidence(log, quotas={"another": Quota(1, 1)}, settled=False)) == []


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
    assert found(Evidence(a_log("Q1 P2 S3 C4", "Q1 P3 U5 C6", jumpy=True), quotas=QUOTAS)) == set(), "wall time falls all the way"


def test_without_an_order_the_present_is_counted() -> None:
    log = a_log("Q5 P6 S4", "Q5 P7", "Q5 P8", "Q5 P3 S4 C5")
    faults = check(Evidence(log, quotas={"example": Quota(2, 5)}, settled=False))
    assert [(fault.rule, fault.job) for fault in faults] == [("order", 1), ("quota", 3)]
    assert found(Evidence(a_log("Q5 P6 S4 C9", "Q5 P7 S8 C9"), quotas={"example": Quota(1, 1)})) == {"order"}, "and nothing else"


def test_a_fault_of_a_quota_says_whose_it_is() -> None:
    faults = check(Evidence(a_log("Q1 P2", "Q1 P3"), quotas={"example": Quota(1, 1)}, settled=False))
    assert [fault.sentence for fault in faults] == [
        "with its move 2, 2 jobs of user 1 and example are with clients, 1 are allowed: 1, 2",
        "with its move 2, 2 jobs of example are with clients, 1 are allowed: 1, 2",
    ]


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


# The first job is claimed, accepted and started, and its machine fails: there is a place for every fault.
BEGINNING = [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 3, 0)]


class Hand:
    """What plants one fault: it picks by Hypothesis, and changes evidence."""

    def __init__(self, data: st.DataObject, evidence: Evidence) -> None:
        self.data, self.evidence = data, evidence

    def pick(self, among: Sequence[V]) -> V:
        """One of them."""
        return self.data.draw(st.sampled_from(among))

    def any_job(self, log: int = 0) -> int:
        """The id of some job."""
        return self.pick(sorted(log_at(self.evidence, log).moves))

    def some_log(self) -> int:
        """The server's, or the client's where it has payloads."""
        return self.pick([0, 1]) if self.evidence.clients[0].moves else 0

    def jobs(self, fits: Callable[[Row], bool]) -> list[Row]:
        """The server's rows that fit."""
        return [row for row in self.evidence.server.rows.values() if fits(row)]

    # -- one method a fault: the evidence with it, or None where there is no place for it --

    def drop_a_move(self) -> Evidence:
        log = self.some_log()
        job_id = self.any_job(log)
        moves = list(log_at(self.evidence, log).moves[job_id])
        moves.remove(self.pick(moves))
        return with_moves(self.evidence, job_id, moves, log)

    def double_a_move(self) -> Evidence:
        log = self.some_log()
        job_id = self.any_job(log)
        moves = list(log_at(self.evidence, log).moves[job_id])
        at = self.pick(range(len(moves)))
        return with_moves(self.evidence, job_id, [*moves[: at + 1], *moves[at:]], log)

    def change_a_move(self) -> Evidence:
        log = self.some_log()
        job_id = self.any_job(log)
        moves = list(log_at(self.evidence, log).moves[job_id])
        at = self.pick(range(len(moves)))
        move, state = moves[at], self.pick([state.value for state in Status])
        changed = [new for new in (move._replace(source=state), move._replace(target=state)) if new != move]
        moves[at] = self.pick(changed)
        return with_moves(self.evidence, job_id, moves, log)

    def change_a_row(self) -> Evidence:
        log = self.some_log()
        row = log_at(self.evidence, log).rows[self.any_job(log)]
        other = self.pick([state.value for state in Status if state.value != row.status])
        return with_row(self.evidence, self.pick([row._replace(status=other), row._replace(moves=row.moves + 1)]), log)

    def drop_a_row(self) -> Evidence:
        log = self.some_log()
        job_id = self.any_job(log)
        return with_log(self.evidence, log, rows={key: row for key, row in log_at(self.evidence, log).rows.items() if key != job_id})

    def drop_a_job(self) -> Evidence:
        job_id, log = self.any_job(), self.evidence.server
        kept = {name: {key: value for key, value in getattr(log, name).items() if key != job_id} for name in ("rows", "moves", "attempts")}
        return with_log(self.evidence, 0, **kept)

    def go_an_illegal_way(self) -> Evidence | None:
        log = self.some_log()
        legal_here = LEGAL[log_at(self.evidence, log).mode]
        job_id = self.any_job(log)
        moves = list(log_at(self.evidence, log).moves[job_id])
        places = [
            (at, state.value)
            for at in range(1, len(moves) - 1)
            for state in Status
            if state.value not in OVER and moves[at + 1].source not in OVER
            if not {(moves[at].source, state.value), (state.value, moves[at + 1].target)} <= legal_here
        ]
        if not places:
            return None
        at, state = self.pick(places)
        moves[at], moves[at + 1] = moves[at]._replace(target=state), moves[at + 1]._replace(source=state)
        return with_moves(self.evidence, job_id, moves, log)

    def leave_an_end(self) -> Evidence | None:
        rows = self.jobs(lambda row: row.status in OVER)
        if not rows:
            return None
        row = self.pick(rows)
        moves = self.evidence.server.moves[row.id]
        state = self.pick([state.value for state in Status if not (row.status in ENDED and state is Status.CLEANED)])
        further = moves[-1]._replace(number=len(moves) + 1, source=row.status, target=state)
        changed = with_moves(self.evidence, row.id, [*moves, further])
        return with_row(changed, row._replace(status=state, moves=row.moves + 1))

    def leave_open(self) -> Evidence | None:
        rows = self.jobs(lambda row: row.status in ENDED)
        if not rows or not self.evidence.settled:
            return None
        row = self.pick(rows)
        moves = self.evidence.server.moves[row.id][:-1]
        changed = row._replace(status=moves[-1].target, reason=moves[-1].reason, moves=row.moves - 1)
        return with_row(with_moves(self.evidence, row.id, moves), changed)

    def start_twice(self) -> Evidence | None:
        starts = [mark for mark in self.evidence.marks or () if mark.what == "start"]
        if not starts:
            return None
        return with_marks(self.evidence, self.pick(starts)._replace(pid=self.data.draw(st.integers(1, 99999))))

    def start_unsent(self) -> Evidence:
        row = self.evidence.server.rows[self.any_job()]
        sent = row.attempt if history.was_sent(self.evidence.server.moves[row.id], row.attempt) else row.attempt - 1
        return with_marks(self.evidence, Mark(row.uuid, sent + self.data.draw(st.integers(1, 2)), "start", 7))

    def lose_a_mark(self) -> Evidence | None:
        marks = list(self.evidence.marks or ())
        completed = {f"{row.uuid} {row.attempt}" for row in self.jobs(lambda row: row.status == "Completed")}
        starts = [mark for mark in marks if mark.what == "start" and f"{mark.uuid} {mark.attempt}" in completed]
        if not starts:
            return None
        marks.remove(self.pick(starts))
        return dataclasses.replace(self.evidence, marks=marks)

    def spoil_a_result(self) -> Evidence | None:
        results = dict(self.evidence.results or {})
        if not results:
            return None
        job_id = self.pick(sorted(results))
        old = results.pop(job_id)
        spoiled = [old._replace(size=old.size + 1), old._replace(sha256="ab" * 32), old._replace(damage="it is")]
        spoiled += [old._replace(members=members) for members in ({"out.txt": "ab" * 32}, {}, {**old.members, "more": "ab"})]
        new = self.pick([None, *spoiled])
        return dataclasses.replace(self.evidence, results=results if new is None else {**results, job_id: new})

    def explain_badly(self) -> Evidence | None:
        rows = self.jobs(lambda row: row.status in ENDED)
        if not rows:
            return None
        row = self.pick(rows)
        if self.data.draw(st.booleans()):
            moves = list(self.evidence.server.moves[row.id])
            moves[-1] = moves[-1]._replace(reason="")
            return with_row(with_moves(self.evidence, row.id, moves), row._replace(reason=""))
        causes: list[str | None] = ["bad luck", "", "user" if row.status == "Completed" else None]
        return with_row(self.evidence, row._replace(cause=self.pick(causes)))

    def retry_wrongly(self) -> Evidence | None:
        rows = self.jobs(lambda row: row.attempt > 1)
        if not rows:
            return None
        row = self.pick(rows)
        if self.data.draw(st.booleans()):
            return with_row(self.evidence, row._replace(retries=row.attempt - 2))
        past = list(self.evidence.server.attempts[row.id])
        one = past.pop(self.pick(range(len(past))))
        changed = [one._replace(cause="user"), one._replace(client=None), one._replace(reason=""), one._replace(exit_code=1)]
        changed += [one._replace(attempt=one.attempt + 9)]
        kept = self.pick([[], *([new] for new in changed)])
        past = sorted([*past, *kept])
        return with_log(self.evidence, 0, attempts={**self.evidence.server.attempts, row.id: past})


FAULTS: dict[str, tuple[Callable[[Hand], Evidence | None], set[str]]] = {
    "drop a move": (Hand.drop_a_move, {"chain"}),
    "double a move": (Hand.double_a_move, {"chain"}),
    "change a move": (Hand.change_a_move, {"chain"}),
    "change a row": (Hand.change_a_row, {"chain"}),
    "drop a row": (Hand.drop_a_row, {"chain"}),
    "drop a job": (Hand.drop_a_job, {"accepted"}),
    "go an illegal way": (Hand.go_an_illegal_way, {"legal"}),
    "leave an end": (Hand.leave_an_end, {"left"}),
    "leave open": (Hand.leave_open, {"accepted"}),
    "start twice": (Hand.start_twice, {"starts"}),
    "start unsent": (Hand.start_unsent, {"starts"}),
    "lose a mark": (Hand.lose_a_mark, {"starts"}),
    "spoil a result": (Hand.spoil_a_result, {"result"}),
    "explain badly": (Hand.explain_badly, {"explained"}),
    "retry wrongly": (Hand.retry_wrongly, {"attempts"}),
}


@pytest.mark.parametrize(("plant", "rules"), FAULTS.values(), ids=FAULTS)
def test_any_single_fault_is_found(plant: Callable[[Hand], Evidence | None], rules: set[str]) -> None:
    planted = []

    @settings(AT_RANDOM, max_examples=40)
    @given(STEPS, st.data())
    def try_it(steps: list[tuple[int, int, int]], data: st.DataObject) -> None:
        _, evidence = a_random_world([*BEGINNING, *steps], settle=True)
        spoiled = plant(Hand(data, evidence))
        if spoiled is not None:
            planted.append(spoiled)
            faults = check(spoiled)
            assert rules <= rules_of(faults), f"not found: {rules}; found: {faults}"

    try_it()
    assert planted, "there was a place for it at least once"


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


@pytest.mark.parametrize(
    "line", ["", "a 1 start", "a b start 5", "a 1 begin 5", "a 1 start five", "a 1 start 5 6", "a -1 end 5", "a  start 5"]
)
def test_a_line_that_is_no_mark_is_kept_as_a_fault(line: str, good: Evidence) -> None:
    assert history.as_mark(line) == Mark(line.split(" ")[0], 0, line, 0)
    faults = check(with_marks(good, history.as_mark(line)))
    assert [(fault.rule, fault.sentence) for fault in faults] == [("starts", f"a mark cannot be read: {line!r}")]


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
    assert said[1] == "not looked at: quotas (--quota), the scripts' marks (--marks), that all have ended (--settled)"
    assert said[2].startswith("proven: accepted, expected, legal, chain")


def test_the_command_finds_faults(left_by_world: tuple[Path, World], tmp_path: Path) -> None:
    """As a command of its own, from any folder."""
    folder, _ = left_by_world
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "marks").write_text((tmp_path / "marks").read_text() + "nobody 1 start 5\n")
    command = [sys.executable, history.__file__, "server.db", "--marks", "marks", "--quota", "example:2:3", "--settled"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert "not looked at" not in done.stdout
    assert "1 fault:\n  starts: job None: a script started for the uuid nobody" in done.stdout
    missing = subprocess.run([*command[:2], "nothing.db"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert missing.returncode == 2
    assert "there is no such database" in missing.stderr


@pytest.mark.parametrize("words", [[], ["a.db", "--quota", "example"], ["a.db", "--quota", "example:a:b"]])
def test_the_command_refuses_what_it_does_not_understand(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert cast(int, raised.value.code) == 2
    assert "usage" in capsys.readouterr().err
