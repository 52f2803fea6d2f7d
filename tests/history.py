"""The history checker: proves from the transition log that no job was lost, started twice, or run over a quota.

It reads what a run has left: the tables `jobs`, `history` and `attempts` of the server and of its clients, the lines that
the scripts themselves wrote when they started and ended, and the results on the server's disk. The driver of the run adds
what it knows: who was answered with 201, and how each job should have ended. Each rule below is one function over these
plain values; what it returns is empty where the rule is proven.

    python tests/history.py DATA/joborch.db --client-db CLIENT/joborch.db --settled

proves what a log alone can show, says what it looked at, and ends with 0, or with 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import shlex
import sqlite3
import sys
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import IO, Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a command, only tests/ is searched

from joborch import Cause, Status, one_line, rfc3339
from joborch_base.states import MOVES

# == Words ==  As the database has them: texts, since a Status hashes by its name and not by its value.

LEGAL = {mode: frozenset((source.value, target.value) for source, target in moves) for mode, moves in MOVES.items()}
FIRST = {"server": Status.QUEUED.value, "client": Status.PREPARED.value}
# Written out, not taken from joborch: were an end or a busy state missing there, the proof would miss it as well.
BUSY = frozenset(("Processing", "Submitted", "Running", "Unknown"))
ENDED = frozenset(("Completed", "Failed", "Invalid", "Killed"))
OVER = ENDED | {"Cleaned"}
# By these a job leaves Processing when a client may have it; by the others it surely has not.
MAYBE_SENT = frozenset(("Submitted", "Unknown", "Killed"))
INFRASTRUCTURE = Cause.INFRASTRUCTURE.value
CAUSES = {
    "Failed": {Cause.USER.value, Cause.LIMIT.value, INFRASTRUCTURE},
    "Invalid": {Cause.USER.value},
    "Killed": {Cause.CANCELLED.value},
}
HISTORIES_SHOWN = 20


# == Evidence ==  Plain values, so that a fault can be planted without a database.


class Row(NamedTuple):
    """What the proof needs of a row of `jobs`."""

    id: int
    uuid: str
    user_id: int | None
    service: str | None
    status: str
    reason: str
    cause: str | None
    retries: int
    attempt: int
    result_size: int | None
    result_sha256: str | None
    kill_requested_at: float | None
    moves: int

    @property
    def mark(self) -> str:
        """The present attempt, as results and payloads are called."""
        return f"{self.uuid}.{self.attempt}"


class Move(NamedTuple):
    """A row of `history`; `seq` is None where the log has no such column."""

    job_id: int
    number: int
    at: float
    source: str | None
    target: str
    reason: str
    attempt: int
    seq: int | None = None

    @property
    def when(self) -> float:
        """What orders the moves of different jobs (see `order`)."""
        return self.at if self.seq is None else self.seq


class Reading(NamedTuple):
    """What a reader of /changes saw, from the first move on: (seq, job id, from, to) of each move, and its last `next`."""

    seen: Sequence[tuple[int, int, str | None, str]]
    following: int


class Attempt(NamedTuple):
    """A row of `attempts`: an attempt that was given up."""

    job_id: int
    attempt: int
    client: str | None
    exit_code: int | None
    reason: str | None
    cause: str | None


class Mark(NamedTuple):
    """A line that a script wrote: `JOB_UUID ATTEMPT start|end PID`; anything else is kept as `what` with attempt 0."""

    uuid: str
    attempt: int
    what: str
    pid: int


class Result(NamedTuple):
    """A result on the server's disk: size in bytes, SHA-256 (hex), that of each member where somebody expects some, and what is wrong."""

    size: int
    sha256: str
    members: Mapping[str, str] = {}
    damage: str = ""


class Quota(NamedTuple):
    """How many jobs of a service may be with clients at once: of one user, and of all."""

    runs_per_user: int
    max_runs: int


@dataclass(frozen=True)
class Log:
    """The log of one process; moves and attempts by job, in their order."""

    rows: Mapping[int, Row]
    moves: Mapping[int, Sequence[Move]]
    attempts: Mapping[int, Sequence[Attempt]] = field(default_factory=dict)
    mode: str = "server"
    name: str = "server"

    def moves_of(self, job_id: int) -> Sequence[Move]:
        """The moves of a job; none where the log knows none."""
        return self.moves.get(job_id, ())

    def end_of(self, job_id: int) -> Move | None:
        """The last move to an end, or None."""
        return next((move for move in reversed(self.moves_of(job_id)) if move.target in ENDED), None)

    @functools.cached_property
    def by_uuid(self) -> dict[str, Row]:
        """The rows by uuid; on a client the latest attempt of each."""
        return {row.uuid: row for row in sorted(self.rows.values(), key=lambda row: row.attempt)}


@dataclass(frozen=True)
class Expected:
    """What the driver of a run knows of a job that was answered with 201; what is empty is not checked."""

    uuid: str = ""
    ends: Collection[str] = ()
    causes: Collection[str] = ()  # of an end other than Completed
    members: Mapping[str, str] = field(default_factory=dict)  # of the ZIP of a Completed job: name -> SHA-256 (hex)
    only_members: bool = False  # the ZIP holds nothing else, but for what joborch adds below `.joborch/`
    most_attempts: int = 0
    marked: bool = True  # its script begins with `mark_lines`


@dataclass(frozen=True)
class Evidence:
    """All that a proof rests on. What is None was not looked at, and proves nothing."""

    server: Log
    clients: Sequence[Log] = ()
    expected: Mapping[int, Expected] = field(default_factory=dict)  # by job id
    quotas: Mapping[str, Quota] = field(default_factory=dict)  # by service; the highest of the run where they changed
    marks: Sequence[Mark] | None = None
    results: Mapping[int, Result] | None = None  # by job id: those that are on the disk
    terminated: Collection[int] | None = None  # ids of the jobs that somebody asked to terminate
    settled: bool = True  # every job must have ended
    reading: Reading | None = None  # of a reader of /changes


class Fault(NamedTuple):
    """A rule that was broken: its name, the job's id in the log `where`, and one sentence."""

    rule: str
    job: int | None
    sentence: str
    where: str = "server"

    def __str__(self) -> str:
        place = "" if self.where == "server" else f"{self.where}, "
        return f"{self.rule}: {place}job {self.job}: {self.sentence}"


Rule = Callable[[Evidence], Iterator[Fault]]


# == Accepted, expected ==


def accepted(evidence: Evidence) -> Iterator[Fault]:
    """Every job that was answered with 201 has its row; every row has exactly one end, or none yet."""
    rows = evidence.server.rows
    for job_id, wanted in evidence.expected.items():
        if job_id not in rows:
            yield Fault("accepted", job_id, "was answered with 201 and has no row")
        elif wanted.uuid and rows[job_id].uuid != wanted.uuid:
            yield Fault("accepted", job_id, f"was answered with the uuid {wanted.uuid}; its row has {rows[job_id].uuid}")
    for row in rows.values():
        ends = [move.target for move in evidence.server.moves_of(row.id) if move.target in ENDED]
        if len(ends) > 1:
            yield Fault("accepted", row.id, f"has ended {len(ends)} times: {', '.join(ends)}")
        elif not ends and evidence.settled:
            yield Fault("accepted", row.id, f"has not ended: it is {row.status}")
        if evidence.server.by_uuid[row.uuid] is not row:
            yield Fault("accepted", row.id, f"has the uuid of job {evidence.server.by_uuid[row.uuid].id}")


def expected(evidence: Evidence) -> Iterator[Fault]:
    """Each job ended as its driver says it should; nobody's job was terminated who did not ask for it."""
    for row in evidence.server.rows.values():
        end = evidence.server.end_of(row.id)
        wanted = evidence.expected.get(row.id, Expected())
        if end and wanted.ends and end.target not in ends_of(row, wanted, evidence.terminated or ()):
            yield Fault("expected", row.id, f"ended as {end.target}, not as {' or '.join(sorted(map(str, wanted.ends)))}: {end.reason}")
        if wanted.most_attempts and row.attempt > wanted.most_attempts:
            yield Fault("expected", row.id, f"took {row.attempt} attempts, where at most {wanted.most_attempts} should have been made")
        unasked = evidence.terminated is not None and row.id not in evidence.terminated
        if unasked and ((end and end.target == "Killed") or row.kill_requested_at is not None):
            yield Fault("expected", row.id, "was terminated, and nobody asked for it")


def ends_of(row: Row, wanted: Expected, terminated: Collection[int]) -> set[str]:
    """The ends that a job may have; one that shall end gets no further attempt, so that a lost client fails it."""
    ends = set(map(str, wanted.ends))
    if row.id in terminated:
        ends |= {"Killed", "Failed"} if row.cause == INFRASTRUCTURE else {"Killed"}
    return ends


# == Legal, chain, left ==  For the server's log and the clients' alike.


def logs_of(evidence: Evidence) -> list[Log]:
    """All logs, the server's first."""
    return [evidence.server, *evidence.clients]


def legal(evidence: Evidence) -> Iterator[Fault]:
    """Every move is one of joborch's table of legal moves."""
    for log in logs_of(evidence):
        moves = LEGAL[log.mode]
        for job_id, chained in log.moves.items():
            for move in chained:
                # The first has no source (see `chain`); ends have a rule of their own, which does not believe the table (see `left`).
                if (move.source, move.target) not in moves and move.source is not None and move.source not in OVER:
                    yield Fault("legal", job_id, f"move {move.number}, {move.source} -> {move.target}, is not a legal one", log.name)


def chain(evidence: Evidence) -> Iterator[Fault]:
    """Each history is unbroken: numbered from 1, each move begins where the last one ended, and the row stands where it ends."""
    for log in logs_of(evidence):
        for job_id in sorted((log.moves.keys() | log.attempts.keys()) - log.rows.keys()):
            yield Fault("chain", job_id, "has a history, and no row", log.name)
        for row in log.rows.values():
            problem = break_of(row, log.moves_of(row.id), FIRST[log.mode])
            if problem:
                yield Fault("chain", row.id, problem, log.name)


def break_of(row: Row, moves: Sequence[Move], first: str) -> str:
    """Where the history of a row is broken first; an empty text where it is whole."""
    if not moves:
        return "has a row, and no history"
    if moves[0].target != first:
        return f"began as {moves[0].target}, not as {first}"
    before = None
    for number, move in enumerate(moves, 1):
        if move.number != number:
            return f"its move {number} bears the number {move.number}"
        if move.source != before:
            return f"move {number} leaves {move.source}, where the job was {before}"
        before = move.target
    if row.status != before:
        return f"its row says {row.status}, its last move {before}"
    if row.moves != len(moves):
        return f"its row counts {row.moves} moves, its history has {len(moves)}"
    return ""


def left(evidence: Evidence) -> Iterator[Fault]:
    """No end is left again but for Cleaned, and Cleaned never."""
    for log in logs_of(evidence):
        for job_id, moves in log.moves.items():
            for before, move in zip(moves, moves[1:]):
                if before.target in OVER and (before.target, move.target) not in {(end, "Cleaned") for end in ENDED}:
                    yield Fault("left", job_id, f"had ended as {before.target}, and became {move.target}", log.name)


# == Quotas ==
#
# What orders the moves of different jobs? `history.seq`: microseconds of a time that goes on over restarts whatever is done
# to the clock, and one more where two would be the same. It is made inside the transaction that writes the move, and
# writers wait for each other, so that it never falls from one commit to the next. (A log of schema 1 has only `at`, wall
# time, and can be relied on where nobody set the clock back.) Where it falls all the same, within a job or from one new
# job to the next (ids grow by commit), nothing in the log tells which moves came before: the rule `order` says so, and
# what is left to prove is the present. A fall that shows in neither place cannot be told from a broken quota.


def order(evidence: Evidence) -> Iterator[Fault]:
    """The log says in which order all moves were made; only quotas need it."""
    highest = float("-inf")
    for job_id, moves in sorted(evidence.server.moves.items()) if evidence.quotas else ():
        for before, move in zip(moves, moves[1:]):
            if move.when < before.when:
                yield Fault("order", job_id, f"the order of the log falls at its move {move.number}: {before.when:.0f}, {move.when:.0f}")
                return
        if moves and moves[0].when < highest:
            yield Fault("order", job_id, f"the order of the log falls where it came: {highest:.0f}, {moves[0].when:.0f}")
            return
        highest = max(highest, moves[0].when if moves else highest)


def merged(evidence: Evidence) -> Iterator[Fault]:
    """A transaction that makes several moves leaves the history of separate ones: each move has a place of its own in the order."""
    for log in logs_of(evidence):
        known: dict[int, Move] = {}
        for moves in log.moves.values():
            for move in moves:
                other = known.setdefault(move.seq, move) if move.seq else move
                if other is not move:
                    where = f"move {other.number} of job {other.job_id}"
                    yield Fault("merged", move.job_id, f"its move {move.number} has the same place in the order as {where}", log.name)


def feed(evidence: Evidence) -> Iterator[Fault]:
    """A reader of /changes saw every move exactly once, in the order of the log; none after its last `next`."""
    if evidence.reading is None:
        return
    seen, following = evidence.reading
    moves = [move for moves in evidence.server.moves.values() for move in moves if (move.seq or 0) <= following]
    made = sorted((move.seq or 0, move.job_id, move.source, move.target) for move in moves)
    for number, (saw, was) in enumerate(zip_longest(seen, made), 1):
        if saw != was:
            yield Fault("feed", (was or saw)[1], f"the reader saw {saw} as its move {number}, where the log has {was}")
            return


class Crossing(NamedTuple):
    """A move by which a job comes to be with a client, or to be with none."""

    when: float
    job_id: int
    number: int
    enters: bool


def crossings(log: Log) -> list[Crossing]:
    """All moves that quotas count, in the order of the log."""
    found = [
        Crossing(move.when, move.job_id, move.number, move.target in BUSY)
        for moves in log.moves.values()
        for move in moves
        if (move.source in BUSY) != (move.target in BUSY)
    ]
    return sorted(found)


class Count(NamedTuple):
    """What a quota counts: the jobs of a service that are with clients, of one user or (with `each` False) of all."""

    service: str
    each: bool
    user_id: int | None
    limit: int


def quota(evidence: Evidence) -> Iterator[Fault]:
    """At no instant more jobs of a user or a service are with clients than its quota allows."""
    if not evidence.quotas:
        return
    log = evidence.server
    present = [Crossing(0, row.id, row.moves, True) for row in log.rows.values() if row.status in BUSY]
    crossed = present if list(order(evidence)) else crossings(log)
    busy: dict[Count, set[int]] = defaultdict(set)
    for _, group in groupby(crossed, key=itemgetter(0)):
        instant = list(group)
        last = {crossing.job_id: crossing for crossing in instant}
        counts = {job_id: counts_of(log.rows.get(job_id), evidence.quotas) for job_id in last}
        # What happened at one time is taken in the order that serves the program best: who leaves does so first, who only
        # passes through does so alone and while the fewest are there, and who comes to stay comes last.
        for job_id in last:
            for count in counts[job_id]:
                busy[count].discard(job_id)
        passing = {crossing.job_id: crossing for crossing in instant if crossing.enters and not last[crossing.job_id].enters}
        for job_id, crossing in passing.items():
            full = [count for count in counts[job_id] if len(busy[count]) >= count.limit]
            yield from (over_quota(crossing, count, busy[count] | {job_id}) for count in full)
        for job_id, crossing in last.items():
            for count in counts[job_id] if crossing.enters else ():
                busy[count].add(job_id)
                if len(busy[count]) > count.limit:
                    yield over_quota(crossing, count, busy[count])


def counts_of(row: Row | None, quotas: Mapping[str, Quota]) -> tuple[Count, ...]:
    """The counts to which a job adds; none where its service has no quotas."""
    limits = quotas.get(row.service or "") if row else None
    if row is None or row.service is None or limits is None:
        return ()
    return Count(row.service, True, row.user_id, limits.runs_per_user), Count(row.service, False, None, limits.max_runs)


def over_quota(crossing: Crossing, count: Count, jobs: Collection[int]) -> Fault:
    """The fault of a job that makes one too many."""
    whose = f"of user {count.user_id} and {count.service}" if count.each else f"of {count.service}"
    named = ", ".join(map(str, sorted(jobs)[:20]))
    sentence = f"with its move {crossing.number}, {len(jobs)} jobs {whose} are with clients, {count.limit} are allowed: {named}"
    return Fault("quota", crossing.job_id, sentence)


# == Starts ==


def starts(evidence: Evidence) -> Iterator[Fault]:
    """A script starts at most once an attempt, and only in an attempt that was sent to a client."""
    log = evidence.server
    begun = Counter((mark.uuid, mark.attempt) for mark in evidence.marks or () if mark.what == "start")
    yield from mark_faults(evidence, begun)
    running = Counter(attempt for client in evidence.clients for attempt in started_at(client) if attempt[0] in log.by_uuid)
    for (job_uuid, attempt), count in running.items():
        if count > 1:
            yield Fault("starts", log.by_uuid[job_uuid].id, f"attempt {attempt} was started at {count} clients")
    for job_uuid, attempt in begun.keys() | running.keys():
        row = log.by_uuid.get(job_uuid)
        if row is None:
            yield Fault("starts", None, f"a script started for the uuid {job_uuid}, which no job has")
        elif not was_sent(log.moves_of(row.id), attempt):
            yield Fault("starts", row.id, f"attempt {attempt} was started, and never sent to a client")


def mark_faults(evidence: Evidence, begun: Mapping[tuple[str, int], int]) -> Iterator[Fault]:
    """What is wrong with the scripts' own marks, by themselves and where a job has none."""
    log, marks = evidence.server, evidence.marks
    ids = {job_uuid: row.id for job_uuid, row in log.by_uuid.items()}
    for (job_uuid, attempt), count in begun.items():
        if count > 1:
            yield Fault("starts", ids.get(job_uuid), f"attempt {attempt} of {job_uuid} was started {count} times")
    started = {(mark.uuid, mark.attempt, mark.pid) for mark in marks or () if mark.what == "start"}
    for mark in {mark for mark in marks or () if mark.what != "start"}:
        if mark.what != "end":
            yield Fault("starts", ids.get(mark.uuid), f"a mark cannot be read: {mark.what!r}")
        elif mark[:2] + mark[3:] not in started:  # it may end twice: a child of bash that is ended as it forks still has the trap
            yield Fault("starts", ids.get(mark.uuid), f"attempt {mark.attempt} of {mark.uuid}, process {mark.pid}, ended without a start")
    # Marks are read before the log (see `gather`): while jobs still run, one that has Completed since may miss its mark.
    for job_id, wanted in evidence.expected.items() if evidence.settled and marks is not None else ():
        row, end = log.rows.get(job_id), log.end_of(job_id)
        if row and end and end.target == "Completed" and wanted.marked and not begun.get((row.uuid, row.attempt)):
            yield Fault("starts", job_id, f"is Completed, and its script never started in attempt {row.attempt}")


def started_at(client: Log) -> set[tuple[str, int]]:
    """The attempts, as (uuid, attempt), that a client has started by its own log."""
    ids = [job_id for job_id, moves in client.moves.items() if any(move.target == "Running" for move in moves)]
    return {(client.rows[job_id].uuid, client.rows[job_id].attempt) for job_id in ids if job_id in client.rows}


def was_sent(moves: Sequence[Move], attempt: int) -> bool:
    """Whether a client can have got this attempt: it is being sent, or what came of that does not rule it out."""
    sending = bool(moves) and moves[-1].target == "Processing" and moves[-1].attempt == attempt
    return sending or any(move.attempt == attempt and move.source == "Processing" and move.target in MAYBE_SENT for move in moves)


# == Attempts ==


def attempts(evidence: Evidence) -> Iterator[Fault]:
    """A further attempt is made only because a machine failed, as often as the policy allows, never after the script's own failure."""
    log = evidence.server
    blamed = own_failures(evidence.clients)
    for row in log.rows.values():
        # The first fault alone: where one attempt is missing, the numbers of all others are wrong.
        problem = next(attempt_problems(row, log.moves_of(row.id), log.attempts.get(row.id, ()), blamed), "")
        if problem:
            yield Fault("attempts", row.id, problem)
    for client in evidence.clients:
        for payload in client.rows.values():
            if any(move.attempt != payload.attempt for move in client.moves_of(payload.id)):
                yield Fault("attempts", payload.id, "a payload is one attempt, and its history names others", client.name)


def attempt_problems(
    row: Row, moves: Sequence[Move], archived: Sequence[Attempt], blamed: Mapping[tuple[str, int], Collection[str]]
) -> Iterator[str]:
    """What is wrong with the attempts of one job."""
    if [past.attempt for past in archived] != list(range(1, row.attempt)):
        yield f"is at attempt {row.attempt}, and those before it are {[past.attempt for past in archived]}"
    if row.attempt > row.retries + 1:
        yield f"is at attempt {row.attempt}, where {row.retries} retries are allowed"
    for past in archived:
        if past.cause != INFRASTRUCTURE:
            yield f"attempt {past.attempt} was given up for the cause {past.cause!r}"
        if not past.client:
            yield f"attempt {past.attempt} was given up and names no client"
        if len((past.reason or "").split()) < 2:
            yield f"attempt {past.attempt} was given up without a sentence that says why: {past.reason!r}"
        if past.exit_code is not None:
            yield f"attempt {past.attempt} was given up although the script had ended with exit status {past.exit_code}"
        # A payload may end badly long after its attempt was given up: only where that end is the reason given it is to blame.
        if any(reason in (past.reason or "") for reason in blamed.get((row.uuid, past.attempt), ())):
            yield f"attempt {past.attempt} was given up for the script's own failure: {past.reason}"
    yield from step_problems(row, moves)


def step_problems(row: Row, moves: Sequence[Move]) -> Iterator[str]:
    """Where the number of the attempt changes in another way than by one, with the move that gives an attempt up."""
    attempt = 1
    for move in moves:
        attempt += move.target == "Queued" and move.source in BUSY - {"Processing"}
        if move.attempt != attempt:
            yield f"move {move.number}, {move.source} -> {move.target}, belongs to attempt {move.attempt}; it should be {attempt}"
            return
    if row.attempt != attempt:
        yield f"its row is at attempt {row.attempt}, its history at {attempt}"


def own_failures(clients: Iterable[Log]) -> dict[tuple[str, int], list[str]]:
    """The reasons, by (uuid, attempt), of payloads that failed by their script's own doing or its limit."""
    found: dict[tuple[str, int], list[str]] = defaultdict(list)
    for client in clients:
        for row in client.rows.values():
            end = client.end_of(row.id)
            if end and end.reason and row.cause in (Cause.USER.value, Cause.LIMIT.value):
                found[row.uuid, row.attempt].append(one_line(end.reason, 1000))  # as the server hears it
    return found


# == Results, reasons ==


def result(evidence: Evidence) -> Iterator[Fault]:
    """What a row says of its result lies on the disk, byte for byte, and holds what its job should have made."""
    for row in evidence.server.rows.values():
        if row.status == "Completed" and (row.result_sha256 is None or row.result_size is None):
            yield Fault("result", row.id, "is Completed, and its row has no result")
        elif row.result_sha256 is not None and row.status != "Cleaned" and evidence.results is not None:
            problem = result_problem(row, evidence.results.get(row.id), evidence.expected.get(row.id, Expected()))
            if problem:
                yield Fault("result", row.id, problem)


def result_problem(row: Row, found: Result | None, wanted: Expected) -> str:
    """What is wrong with the result of one job; an empty text where it is as it should be."""
    if found is None:
        return f"is {row.status}, and its result is not on the disk"
    if (found.size, found.sha256) != (row.result_size, row.result_sha256):
        return f"its result has {found.size} bytes and SHA-256 {found.sha256}; its row says {row.result_size} and {row.result_sha256}"
    if row.status != "Completed" or not (wanted.members or wanted.only_members):
        return ""
    if found.damage:
        return f"its result cannot be read: {found.damage}"
    wrong = [name for name, digest in wanted.members.items() if found.members.get(name) != digest]
    if wrong:
        return f"its result should hold {wrong[0]} with SHA-256 {wanted.members[wrong[0]]}; it has {found.members.get(wrong[0])}"
    others = [name for name in found.members if name not in wanted.members and not name.startswith(".joborch/")]
    return f"its result holds {others[0]}, which it should not" if wanted.only_members and others else ""


def explained(evidence: Evidence) -> Iterator[Fault]:
    """Every end has a reason and, unless it is Completed, a cause that fits it, and the driver's expectation."""
    for log in logs_of(evidence):
        server = log is evidence.server
        for row in log.rows.values():
            wanted = evidence.expected.get(row.id, Expected()) if server else Expected()
            asked = server and row.id in (evidence.terminated or ())
            problem = explanation_problem(row, log.moves_of(row.id), log.end_of(row.id), wanted, asked)
            if problem:
                yield Fault("explained", row.id, problem, log.name)


def explanation_problem(row: Row, moves: Sequence[Move], end: Move | None, wanted: Expected, asked: bool) -> str:
    """What an end leaves unexplained; an empty text where nothing, or where there is no end yet."""
    last = end if row.status == "Cleaned" else moves[-1] if moves else None  # what was cleaned keeps the reason of its end
    if last is not None and last.reason != row.reason:
        return f"its row gives the reason {row.reason!r}, its last move {last.reason!r}"
    if end is None:
        return ""
    if not end.reason.strip():
        return f"ended as {end.target} without a reason"
    if end.target == "Completed":
        return f"is Completed, and has the cause {row.cause!r}" if row.cause is not None else ""
    if row.cause not in CAUSES.get(end.target, ()):
        return f"ended as {end.target} with the cause {row.cause!r}"
    causes = set(map(str, wanted.causes)) | ({Cause.CANCELLED.value, INFRASTRUCTURE} if asked else set())
    return f"ended with the cause {row.cause}, not {' or '.join(sorted(causes))}" if wanted.causes and row.cause not in causes else ""


# == Proof ==

RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (accepted, expected, legal, chain, left, order, merged, feed, quota, starts, attempts, result, explained)
}


@contextmanager
def uncollected() -> Iterator[None]:
    """Hold the garbage collector: a hundred thousand jobs are millions of small values, through which it goes again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def check(evidence: Evidence) -> list[Fault]:
    """Return every fault that the evidence shows; none where all rules are proven."""
    return [fault for rule in RULES.values() for fault in rule(evidence)]


def assert_proven(evidence: Evidence) -> None:
    """Raise AssertionError with all faults, and the whole history of the jobs they are about, unless there is none."""
    faults = check(evidence)
    if faults:
        raise AssertionError(report(evidence, faults))


def report(evidence: Evidence, faults: Sequence[Fault]) -> str:
    """All faults, one a line, and below them what all logs and marks tell of these jobs (of the first HISTORIES_SHOWN)."""
    logs = {log.name: log for log in logs_of(evidence)}
    uuids = []
    for fault in faults:
        row = logs[fault.where].rows.get(fault.job or 0)
        uuids += [row.uuid] if row and row.uuid not in uuids else []
    lines = [f"{len(faults)} faults:" if len(faults) > 1 else "1 fault:", *(f"  {fault}" for fault in faults)]
    for job_uuid in uuids[:HISTORIES_SHOWN]:
        lines += ["", *(line for log in logs.values() for line in story(log, job_uuid))]
        lines += [f"  mark: attempt {mark.attempt} {mark.what} {mark.pid}" for mark in evidence.marks or () if mark.uuid == job_uuid]
    if len(uuids) > HISTORIES_SHOWN:
        lines += ["", f"and {len(uuids) - HISTORIES_SHOWN} more jobs"]
    return "\n".join(lines)


def story(log: Log, job_uuid: str) -> Iterator[str]:
    """Tell all that a log has of a job, one line a move."""
    for row in log.rows.values():
        if row.uuid != job_uuid:
            continue
        cause = f", cause {row.cause}" if row.cause else ""
        wish = ", shall end" if row.kill_requested_at is not None else ""
        yield f"{log.name}, job {row.id}, {row.mark}: {row.status}{cause}{wish} (service={row.service} user={row.user_id})"
        for move in log.moves_of(row.id):
            seq = "" if move.seq is None else f" ({move.seq})"
            said = f": {move.reason}" if move.reason else ""
            yield f"  {move.number:3d} {rfc3339(move.at)}{seq} attempt {move.attempt}: {move.source} -> {move.target}{said}"
        for past in log.attempts.get(row.id, ()):
            yield f"  attempt {past.attempt} at {past.client}: {past.cause}: {past.reason}"


# == Reading ==

ROWS = """
SELECT id, uuid, user_id, service, status, reason, cause, retries, attempt, result_size, result_sha256, kill_requested_at, moves
  FROM jobs ORDER BY id
"""
HISTORY = "SELECT job_id, number, at, source, target, reason, attempt, seq FROM history ORDER BY job_id, number"
HISTORY_1 = "SELECT job_id, number, at, source, target, reason, attempt, NULL FROM history ORDER BY job_id, number"  # schema 1
ATTEMPTS = "SELECT job_id, attempt, client, exit_code, reason, cause FROM attempts ORDER BY job_id, attempt"
COLUMNS = "SELECT name FROM pragma_table_info('history')"


def read_log(path: str | Path, mode: str = "server", name: str = "") -> Log:
    """Return the log of a database of joborch, which may be in use: all of it is of one instant."""
    where = Path(path).resolve()
    if not where.is_file():
        raise FileNotFoundError(f"{where}: there is no such database")
    # mode=ro: a killed process's WAL is read and left as it is, for its next start to find.
    with closing(sqlite3.connect(f"{where.as_uri()}?mode=ro", uri=True, timeout=10, isolation_level=None)) as db:
        return log_of(db, mode, name or mode)


def log_of(db: sqlite3.Connection, mode: str = "server", name: str = "server") -> Log:
    """Return the log that an open database holds, read in one transaction."""
    cursor = db.cursor()
    cursor.row_factory = None
    cursor.execute("BEGIN")
    try:
        rows = {row[0]: Row._make(row) for row in cursor.execute(ROWS)}
        has_seq = ("seq",) in cursor.execute(COLUMNS).fetchall()
        moves = [Move._make(row) for row in cursor.execute(HISTORY if has_seq else HISTORY_1)]
        past = [Attempt._make(row) for row in cursor.execute(ATTEMPTS)]
    finally:
        cursor.execute("ROLLBACK")
    first = itemgetter(0)
    return Log(
        rows,
        {job_id: list(group) for job_id, group in groupby(moves, key=first)},
        {job_id: list(group) for job_id, group in groupby(past, key=first)},
        mode,
        name,
    )


def mark_lines(path: Path) -> str:
    """Return the lines of bash with which a test's script begins: it writes to `path` that it starts and, unless killed, that it ends.

    One line is one write to a file opened with O_APPEND, so that lines of scripts that write at once stay whole. A script
    that cannot write its mark ends with 97: unseen, it must not run. Let `path` be on a disk that the test does not fill.
    """
    return f"""\
joborch_mark() {{ printf '%s %s %s %s\\n' "${{JOBORCH_MARK%.*}}" "${{JOBORCH_MARK##*.}}" "$1" "$$" >>{shlex.quote(str(path))}; }}
joborch_mark start || exit 97
trap 'joborch_mark end' EXIT
"""


def read_marks(*paths: Path) -> list[Mark]:
    """Return all marks of these files; one that does not exist yet has none."""
    lines = [line for path in paths if path.exists() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [as_mark(line) for line in lines]


def as_mark(line: str) -> Mark:
    """Return a line as a mark; one that is none becomes a mark that `starts` reports."""
    words = line.split(" ")
    if len(words) == 4 and words[1].isdecimal() and words[2] in ("start", "end") and words[3].isdecimal():
        return Mark(words[0], int(words[1]), words[2], int(words[3]))
    return Mark(words[0], 0, line, 0)


Place = Callable[[Row], Path]


def results_in(folder: Path) -> Place:
    """Return what tells where a job's result lies: UUID.ATTEMPT.zip in `folder`, or UUID.zip where an older joborch left that."""

    def place(row: Row) -> Path:
        path = folder / f"{row.mark}.zip"
        return path if path.exists() else folder / f"{row.uuid}.zip"

    return place


def read_results(log: Log, place: Place, expected: Mapping[int, Expected]) -> dict[int, Result]:
    """Return what lies on the disk of the results that rows speak of; members only where somebody expects some."""
    found = {}
    for row in log.rows.values():
        wanted = expected.get(row.id, Expected())
        path = place(row)
        if row.result_sha256 is not None and row.status != "Cleaned" and path.is_file():
            with path.open("rb") as file:
                found[row.id] = read_result(file, bool(wanted.members) or wanted.only_members)
    return found


def read_result(file: IO[bytes], with_members: bool = True) -> Result:
    """Return size, digest and, where asked for, the digests of the members of a ZIP (those of links are of their targets)."""
    digest = sha256_of(iter(lambda: file.read(1 << 20), b""))
    size = file.tell()
    if not with_members:
        return Result(size, digest)
    try:
        with zipfile.ZipFile(file) as archive:
            return Result(size, digest, dict(members_of(archive)))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        return Result(size, digest, damage=str(error))


def members_of(archive: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """Yield name and SHA-256 (hex) of each member but folders; ValueError where a name stands twice."""
    names = archive.namelist()
    if len(names) != len(set(names)):
        raise ValueError("a name stands twice in it")
    for entry in archive.infolist():
        if not entry.is_dir():
            with archive.open(entry) as member:
                yield entry.filename, sha256_of(iter(lambda member=member: member.read(1 << 20), b""))  # type: ignore[misc]


def sha256_of(chunks: Iterable[bytes]) -> str:
    """The SHA-256 (hex) of what comes in chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


@uncollected()
def gather(
    server_db: str | Path,
    *,
    clients: Mapping[str, str | Path] | None = None,
    marks: Sequence[Path] | None = None,
    results: Path | Place | None = None,
    expected: Mapping[int, Expected] | None = None,
    quotas: Mapping[str, Quota] | None = None,
    terminated: Collection[int] | None = None,
    settled: bool = True,
    reading: Reading | None = None,
) -> Evidence:
    """Read all that a run has left: the clients' databases by name, files of marks, and the folder of results (or where each lies).

    While the run goes on, the order matters: a script starts after its client knows of it, which is after the server
    knows; a result lies there before its row says so. So marks come first, and results last.
    """
    read = read_marks(*marks) if marks is not None else None
    client_logs = [read_log(path, "client", name) for name, path in (clients or {}).items()]
    log = read_log(server_db)
    place = results_in(results) if isinstance(results, Path) else results
    found = read_results(log, place, expected or {}) if place is not None else None
    return Evidence(log, client_logs, expected or {}, quotas or {}, read, found, terminated, settled, reading)


# == Command ==


def read_quota(text: str) -> tuple[str, Quota]:
    """Take a quota as it is written in a command: example:5:10."""
    service, per_user, most = text.rsplit(":", 2)
    return service, Quota(int(per_user), int(most))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="tests/history.py", description="Prove from the logs of joborch what they can show.")
    made.add_argument("server_db", type=Path, metavar="SERVER_DB", help="the server's database")
    made.add_argument("--client-db", type=Path, action="append", default=[], metavar="DB", help="a client's database; repeat it")
    made.add_argument("--marks", type=Path, action="append", metavar="FILE", help="a file of the scripts' own marks; repeat it")
    made.add_argument("--results", type=Path, metavar="FOLDER", help="the server's results (default: beside its database, if there)")
    made.add_argument(
        "--quota",
        type=read_quota,
        action="append",
        default=[],
        metavar="SERVICE:RUNS_PER_USER:MAX_RUNS",
        help="a service's quotas; repeat it",
    )
    made.add_argument("--settled", action="store_true", help="every job must have ended")
    return made


def verdict(evidence: Evidence, faults: Sequence[Fault]) -> str:
    """What was looked at, what was not, and what came of it."""
    log = evidence.server
    states = ", ".join(f"{count} {status}" for status, count in sorted(Counter(row.status for row in log.rows.values()).items()))
    moves = sum(map(len, log.moves.values()))
    looked = f"{len(log.rows)} jobs ({states or 'none'}), {moves} moves, {len(evidence.clients)} clients' logs"
    missing = {
        "quotas (--quota)": not evidence.quotas,
        "the scripts' marks (--marks)": evidence.marks is None,
        "results (--results)": evidence.results is None,
        "that all have ended (--settled)": not evidence.settled,
        "what a reader of /changes saw": evidence.reading is None,
    }
    unseen = ", ".join(name for name, absent in missing.items() if absent)
    lines = [looked, *([f"not looked at: {unseen}"] if unseen else [])]
    return "\n".join([*lines, report(evidence, faults) if faults else "proven: " + ", ".join(RULES)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prove what the given logs can show; 0 where all is proven, 1 where there is a fault."""
    given = parser().parse_args(arguments)
    beside = given.server_db.resolve().parent / "results"
    results = given.results or (beside if beside.is_dir() else None)
    clients = {f"client {path}": path for path in given.client_db}
    try:
        evidence = gather(
            given.server_db, clients=clients, marks=given.marks, results=results, quotas=dict(given.quota), settled=given.settled
        )
    except (OSError, sqlite3.Error) as error:
        print(f"tests/history.py: {given.server_db}: {error}", file=sys.stderr)
        return 2
    faults = check(evidence)
    print(verdict(evidence, faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
