"""The Store keeps its promises: legal moves alone, a history of each, quotas at every instant, one transaction for many writers."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import sqlite3
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from harness import wait_for
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, precondition, rule
from sql_turns import SqlStore
from world import FIRST, HandClock, a_service, heads, new_job, together

import joborch
from joborch import BUSY, ENDED, OVER, Cause, ConfigError, Job, Service, Status, StorageError, Store
from joborch_base import statements
from joborch_base.scheduling import NO_USE
from joborch_base.states import MOVES
from joborch_base.vocabulary import IllegalMove

EVERYTHING = "SELECT * FROM jobs ORDER BY id"


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Makes stores of a test's own, which are closed with the test."""
    made: list[Store] = []

    def make(mode: str = "server", path: str | None = None, limits: Mapping[str, Service] | None = None) -> Store:
        store = Store(path or str(tmp_path / f"{mode}.db"), mode, HandClock())
        made.append(store)
        store.set_limits({"example": a_service()} if limits is None else limits)
        return store

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    """A server's store with the service `example`."""
    return make_store()


def must(job: Job | None) -> Job:
    """A job that has to be there."""
    assert job is not None
    return job


def moved(store: Store, job: Job, *states: Status, **changes: Any) -> Job:
    """Move a job through these states and return it as it is then."""
    for state in states:
        assert store.move(must(store.get(job.id)), state, f"to {state}", **changes)
    return must(store.get(job.id))


def history(store: Store, job_id: int) -> list[tuple[str | None, str]]:
    """The moves of a job as its history tells them."""
    return [(row["source"], row["target"]) for row in store.read(statements.HISTORY_GET, id=job_id)]


# == Moves, against a model ==


@dataclasses.dataclass
class Row:
    """What the model knows of a job."""

    user_id: int
    status: Status
    history: list[tuple[str | None, str]]
    attempt: int = 1
    client: str | None = None
    not_before: float | None = None
    wish: bool = False


class StoreMachine(RuleBasedStateMachine):
    """A store with a real file below a folder of its own."""

    mode = "server"
    make: type[Store] = Store

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="joborch-test-"))
        self.clock = HandClock()
        self.store = self.make(str(self.folder / "joborch.db"), self.mode, self.clock)

    def teardown(self) -> None:
        """Close and remove it."""
        self.store.close()
        shutil.rmtree(self.folder)


class Moves(StoreMachine):
    """A server's jobs, moved at random: the rows, histories and attempts are those of a model."""

    jobs = Bundle("jobs")
    service = a_service(runs_per_user=2, max_runs=3)

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, Row] = {}
        self.seen: list[Job] = []
        self.store.set_limits({"example": self.service})

    def note(self, job_id: int, to: Status) -> None:
        """Write a move down in the model."""
        row = self.rows[job_id]
        row.history.append((row.status.value, to.value))
        row.status = to

    @rule(target=jobs, user_id=st.integers(1, 2))
    def add(self, user_id: int) -> int:
        """A new job."""
        job = self.store.add(new_job(user_id=user_id), "uploaded")
        self.rows[job.id] = Row(user_id, FIRST[self.mode], [(None, FIRST[self.mode].value)])
        self.seen.append(job)
        return job.id

    @rule(job_id=jobs, data=st.data())
    def move(self, job_id: int, data: st.DataObject) -> None:
        """Any move: a legal one changes the row, another one raises and changes nothing."""
        job, row = must(self.store.get(job_id)), self.rows[job_id]
        legal = [target for source, target in MOVES[self.mode] if source is row.status]
        to = data.draw(st.sampled_from(legal or list(Status)) | st.sampled_from(list(Status)))
        changes: dict[str, Any] = {}
        if to is Status.QUEUED and row.status is not Status.PROCESSING:
            changes = {"attempt": row.attempt + 1, "client": None, "not_before": self.clock.wall() + data.draw(st.integers(1, 30))}
        if (row.status, to) not in MOVES[self.mode]:
            with pytest.raises(IllegalMove):
                self.store.move(job, to, "illegal", **changes)
            return
        assert self.store.move(job, to, "legal", **changes) is True
        self.note(job_id, to)
        row.attempt, row.not_before = changes.get("attempt", row.attempt), changes.get("not_before", row.not_before)
        row.client = changes.get("client", row.client)
        self.seen.append(must(self.store.get(job_id)))

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def lose_a_race(self, data: st.DataObject) -> None:
        """A move by what was read before another moved the row: False, and nothing changes."""
        job = data.draw(st.sampled_from(self.seen))
        legal = sorted(target for source, target in MOVES[self.mode] if source is job.status)
        if legal and (job.id not in self.rows or self.rows[job.id].status is not job.status):
            assert self.store.move(job, data.draw(st.sampled_from(legal)), "too late") is False

    @precondition(lambda self: self.mode == "server")
    @rule(job_id=jobs, client=st.sampled_from("ab"), room=st.integers(0, 3))
    def claim(self, job_id: int, client: str, room: int) -> None:
        """A claim moves what is queued, where there is room; what shall end is ended instead."""
        row = self.rows[job_id]
        busy = [other for other in self.rows.values() if other.status in BUSY]
        full = (
            sum(other.client == client for other in busy) >= room
            or len(busy) >= self.service.max_runs
            or sum(other.user_id == row.user_id for other in busy) >= self.service.runs_per_user
        )
        claimed = self.store.claim(job_id, client, room)
        if row.status is not Status.QUEUED or (full and not row.wish):
            assert claimed is None
        elif row.wish:
            assert claimed is None
            if must(self.store.get(job_id)).status is Status.KILLED or not full:
                self.note(job_id, Status.KILLED)
        elif row.not_before is None:
            assert claimed == self.store.get(job_id)
            self.note(job_id, Status.PROCESSING)
            row.client = client
        elif claimed is not None:  # a new attempt before its time: not by its user's turn, which does not list it
            self.note(job_id, Status.PROCESSING)
            row.client = client

    @rule(seconds=st.integers(0, 40))
    def admit_due(self, seconds: int) -> None:
        """Time goes by: new attempts may be claimed once their back-off is over."""
        self.clock.pass_s(seconds)
        due = [row for row in self.rows.values() if row.status is Status.QUEUED and row.not_before is not None]
        due = [row for row in due if (row.not_before or 0) <= self.clock.wall()]
        assert self.store.admit_due() == len(due)
        for row in due:
            row.not_before = None

    @rule(job_id=jobs)
    def request_kill(self, job_id: int) -> None:
        """A wish is news once, and only for what has not ended."""
        row = self.rows[job_id]
        assert self.store.request_kill(job_id, Cause.CANCELLED) is (not row.wish and row.status not in OVER)
        row.wish = row.wish or row.status not in OVER

    @rule(target=jobs, job_id=consumes(jobs))
    def forget(self, job_id: int) -> Any:
        """Rows of cleaned jobs go, with all that hangs on them."""
        if self.rows[job_id].status is not Status.CLEANED:
            return job_id
        self.store.forget([job_id])
        del self.rows[job_id]
        assert self.store.get(job_id) is None
        assert history(self.store, job_id) == []
        assert self.store.read(statements.ATTEMPTS_GET, id=job_id) == []
        return multiple()

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        """Status, attempt, client, wish and end of every job."""
        stored = {job.id: job for job in self.store.jobs(EVERYTHING)}
        assert set(stored) == set(self.rows)
        for job_id, row in self.rows.items():
            job = stored[job_id]
            assert (job.status, job.attempt, job.client) == (row.status, row.attempt, row.client)
            assert (job.kill_requested_at is not None) == row.wish
            assert (job.ended_at is not None) == (row.status in OVER)
            if row.status is Status.QUEUED:
                assert job.not_before == row.not_before

    @invariant()
    def every_move_has_one_row_of_history(self) -> None:
        """In order, numbered without a gap, and no end is left but to Cleaned."""
        for job_id, row in self.rows.items():
            assert history(self.store, job_id) == row.history
            numbers = [found["number"] for found in self.store.read("SELECT number FROM history WHERE job_id = :id", id=job_id)]
            assert numbers == list(range(1, len(row.history) + 1))
            ends = [target for _, target in row.history if Status(target) in OVER]
            assert ends in ([], [row.status.value], [ends[0], Status.CLEANED.value] if ends else [])
            attempts = [found["attempt"] for found in self.store.read(statements.ATTEMPTS_GET, id=job_id)]
            assert attempts == list(range(1, row.attempt))


class ClientMoves(Moves):
    """The same for a client's payloads; each of their changes has a number of its own, which grows."""

    mode = "client"

    @invariant()
    def changes_are_numbered(self) -> None:
        """What changed last has the highest number."""
        numbers = [job.changed for job in self.store.jobs(EVERYTHING)]
        assert len(numbers) == len(set(numbers))
        assert max(filter(None, numbers), default=0) <= self.store.last_change
        since = self.store.last_change // 2
        listed = [job.changed for job in self.store.jobs(statements.CHANGED_SINCE, since=since)]
        news = [job.changed for job in self.store.jobs(EVERYTHING) if job.status is not Status.PREPARED]
        assert listed == sorted(number for number in news if number and number > since)


STEPS = settings(deadline=None, max_examples=25, stateful_step_count=30)
TestMoves = Moves.TestCase
TestMoves.settings = STEPS
TestClientMoves = ClientMoves.TestCase
TestClientMoves.settings = STEPS


def test_a_job_that_was_deleted_meanwhile_is_a_lost_race(store: Store) -> None:
    job = store.add(new_job(), "uploaded")
    for status in (Status.FAILED, Status.CLEANED):
        assert store.move(must(store.get(job.id)), status, "")
    store.forget([job.id])
    for status in (Status.KILLED, Status.FAILED):
        assert store.move(job, status, "cancelled") is False


def test_a_move_by_an_earlier_attempt_is_a_lost_race(store: Store) -> None:
    """The status is the same again, but the attempt is another: nothing of the old one may be written over it."""
    job = store.add(new_job(), "uploaded")
    must(store.claim(job.id, "a", 1))
    old = moved(store, job, Status.SUBMITTED, Status.RUNNING)
    store.move(old, Status.QUEUED, "the machine was restarted", attempt=2, client=None)
    must(store.claim(job.id, "b", 1))
    now = moved(store, job, Status.SUBMITTED, Status.RUNNING)
    assert store.move(old, Status.COMPLETED, "the result of attempt 1") is False
    assert store.get(job.id) == now


def test_a_new_attempt_is_not_claimed_before_its_time(store: Store) -> None:
    job = moved(store, store.add(new_job(), "uploaded"), Status.PROCESSING, Status.UNKNOWN)
    store.move(job, Status.QUEUED, "again", attempt=2, client=None, not_before=store.clock.wall() + 10)
    assert store.claim(job.id, "a", 9) is None, "a head that another thread read before"
    store.clock.pass_s(11)  # type: ignore[attr-defined]
    assert store.admit_due() == 1
    assert must(store.claim(job.id, "a", 9)).attempt == 2


def test_what_shall_end_does_not_wait_for_a_place(store: Store) -> None:
    job = store.add(new_job(), "uploaded")
    store.request_kill(job.id, Cause.CANCELLED)
    assert store.claim(job.id, "a", 0) is None
    assert must(store.get(job.id)).status is Status.KILLED


def test_an_attempt_that_failed_is_archived(store: Store) -> None:
    job = store.add(new_job(), "uploaded")
    must(store.claim(job.id, "a", 1))
    job = moved(store, job, Status.SUBMITTED, dest_id="7")
    job = moved(store, job, Status.RUNNING, started_at=5.0)
    store.move(job, Status.QUEUED, "it lost power", attempt=2, client=None, dest_id=None, started_at=None)
    (attempt,) = [dict(row) for row in store.read(statements.ATTEMPTS_GET, id=job.id)]
    assert attempt == {
        "peak_memory": None,
        "cpu_time": None,
        "attempt": 1, "client": "a", "dest_id": "7", "started_at": 5.0, "ended_at": store.clock.wall(), "exit_code": None,
        "signal": None, "reason": "it lost power", "cause": "infrastructure",
    }  # fmt: skip
    assert (must(store.get(job.id)).client, must(store.get(job.id)).dest_id) == (None, None)


def test_nothing_of_a_forgotten_job_stays(store: Store) -> None:
    kept, gone = (moved(store, store.add(new_job(), "uploaded"), Status.PROCESSING, Status.UNKNOWN) for _ in range(2))
    for job in (kept, gone):
        assert store.move(job, Status.QUEUED, "again", attempt=2, client=None)
        moved(store, job, Status.KILLED, Status.CLEANED)
    store.forget([gone.id])
    for table in ("history", "attempts"):
        assert {row["job_id"] for row in store.read(f"SELECT job_id FROM {table}")} == {kept.id}
    assert store.get(gone.id) is None


@pytest.mark.parametrize(("mode", "levels"), [("server", {2}), ("client", {1})])
def test_what_must_outlive_a_power_cut_is_written_with_full_sync(mode: str, levels: set[int], make_store: Callable[..., Store]) -> None:
    """On the server the new job, the claim and the end; a client's rows need no more than to be consistent."""
    store = make_store(mode)
    found = set()

    def level() -> None:
        found.add(int(store.db.execute("PRAGMA synchronous").fetchone()[0]))

    job = store.add(new_job(), "added")
    level()
    if mode == "server":
        must(store.claim(job.id, "a", 1))
        level()
        moved(store, job, Status.SUBMITTED)
        assert store.db.execute("PRAGMA synchronous").fetchone()[0] == 1, "a move between two that count waits for no disk"
    moved(store, job, Status.RUNNING, Status.COMPLETED)
    level()
    store.request_kill(job.id, Cause.CANCELLED)
    assert store.db.execute("PRAGMA synchronous").fetchone()[0] == 2, "a wish is answered with 202: it must not be lost"
    assert found == levels


# == Quotas, against a full scan ==

SERVICES = ("a", "b")
CLIENTS = ("x", "y")
POLICIES = st.sampled_from(["share", "fifo", "priority"])
LIMITS = st.fixed_dictionaries({name: st.tuples(st.integers(1, 3), st.integers(1, 4), POLICIES) for name in SERVICES})
Figures = Mapping[str, tuple[int, int, str]]


def limits_of(figures: Figures) -> dict[str, Service]:
    """Services with these limits, for a user and in all, and these policies."""
    return {name: a_service(name, runs_per_user=user, max_runs=whole, policy=how) for name, (user, whole, how) in figures.items()}


def completed(store: Store, job: Job) -> bool:
    """Whether a job was Completed, whatever has become of its files since."""
    return any(row["target"] == "Completed" for row in store.read(statements.HISTORY_GET, id=job.id))


class Quotas(StoreMachine):
    """Users, services and clients at random: the limits hold after every step, and the memory is what SQL says."""

    jobs = Bundle("jobs")
    store: SqlStore
    make = SqlStore

    @initialize(figures=LIMITS)
    def begin(self, figures: Figures) -> None:
        """Limits to begin with."""
        self.services = limits_of(figures)
        self.store.set_limits(self.services)
        self.before: Counter[Any] = Counter()
        self.room = dict.fromkeys(CLIENTS, 0)

    @rule(
        target=jobs,
        user_id=st.integers(-1, 2),
        service=st.sampled_from(SERVICES),
        priority=st.sampled_from([-100, 0, 0, 1, 100]),
        cpus=st.sampled_from([1, 1, 2]),
        seconds=st.integers(0, 100),
    )
    def add(self, user_id: int, service: str, priority: int, cpus: int, seconds: int) -> int:
        """A user uploads."""
        self.clock.pass_s(seconds)
        return self.store.add(new_job(user_id=user_id, service=service, priority=priority, cpus=cpus), "uploaded").id

    @rule(target=jobs, job_id=jobs, other_id=jobs, service=st.sampled_from(SERVICES))
    def follow(self, job_id: int, other_id: int, service: str) -> int:
        """A user uploads what is to follow two of his jobs; one of somebody else is refused."""
        job, other = must(self.store.get(job_id)), must(self.store.get(other_id))
        new = new_job(user_id=job.user_id, service=service, after_ids=",".join(map(str, sorted({job_id, other_id}))))
        if job.user_id != other.user_id:
            with pytest.raises(joborch.UnknownJob):
                self.store.add(new, "uploaded")
            return job_id
        return self.store.add(new, "uploaded").id

    @rule(service=st.sampled_from(SERVICES), client=st.sampled_from(CLIENTS), room=st.integers(1, 4))
    def send(self, service: str, client: str, room: int) -> None:
        """A client takes the head of the service, as the sender does; the head is refused only where a limit binds."""
        if service not in self.services:
            return
        self.room[client] = room
        for head in heads(self.store, service, 1):
            claimed = self.store.claim(head.job_id, client, room)
            job = must(self.store.get(head.job_id))
            full = self.before["service", service] >= self.services[service].max_runs or self.before["client", client] + job.cpus > room
            assert (claimed is None) == (full or job.kill_requested_at is not None)

    @rule(job_id=jobs, client=st.sampled_from(CLIENTS), room=st.integers(0, 4))
    def claim_any(self, job_id: int, client: str, room: int) -> None:
        """A claim by a head that was read long ago: whatever it is by now, no limit is passed."""
        self.room[client] = room
        job = must(self.store.get(job_id))
        if job.service in self.services:
            self.store.claim(job_id, client, room)

    @rule(job_id=jobs, data=st.data())
    def go_on(self, job_id: int, data: st.DataObject) -> None:
        """Something becomes of a job that is with a client, or of one that waits."""
        job = must(self.store.get(job_id))
        targets = sorted(to for source, to in MOVES["server"] if source is job.status and to is not Status.PROCESSING)
        if targets:
            to = data.draw(st.sampled_from(targets))
            later = (
                {"attempt": job.attempt + 1, "not_before": self.clock.wall() + 5}
                if to is Status.QUEUED and data.draw(st.booleans())
                else {}
            )
            self.store.move(job, to, "at random", **({"client": None, **later} if to is Status.QUEUED else {}))

    @rule(seconds=st.integers(0, 6))
    def admit_due(self, seconds: int) -> None:
        """New attempts come of age."""
        self.clock.pass_s(seconds)
        self.store.admit_due()

    @rule(job_id=jobs)
    def run_longer(self, job_id: int) -> None:
        """A run takes longer than its user was charged for."""
        job = must(self.store.get(job_id))
        if job.status is Status.RUNNING and job.service in self.services:
            self.store.charge_longer(job)

    @rule(user_id=st.integers(-1, 2), weight=st.floats(0.01, 100))
    def weigh(self, user_id: int, weight: float) -> None:
        """A user gets another weight."""
        self.store.set_weight(user_id, weight)

    @rule(job_id=jobs)
    def request_kill(self, job_id: int) -> None:
        """Somebody wants a job stopped; if it is queued, the next claim kills it."""
        self.store.request_kill(job_id, Cause.CANCELLED)

    @rule(job_id=jobs, client=st.sampled_from(CLIENTS))
    def take_along(self, job_id: int, client: str) -> None:
        """The client of a job turns out to be another."""
        job = must(self.store.get(job_id))
        if self.store.take_along(job, client):
            self.before["client", client] += job.cpus  # whatever room there is

    @rule(figures=LIMITS, gone=st.sampled_from([None, *SERVICES]))
    def reopen(self, figures: Figures, gone: str | None) -> None:
        """The server is started again with other limits, or without one of its services."""
        self.store.close()
        self.store = SqlStore(self.store.path, "server", self.clock)
        self.services = limits_of({name: figures[name] for name in SERVICES if name != gone})
        self.store.set_limits(self.services)

    @invariant()
    def limits_hold(self) -> None:
        """None is passed; where limits were lowered below what runs, nothing is added until enough has ended."""
        jobs = self.store.jobs(EVERYTHING)
        busy = [job for job in jobs if job.status in BUSY]
        now = Counter(("service", job.service) for job in busy) + Counter(("user", job.service, job.user_id) for job in busy)
        for job in busy:
            now["client", job.client] += job.cpus
        for key, count in now.items():
            service = self.services.get(key[1])
            most = {"client": self.room.get(key[1], 0)}.get(key[0], 0)
            if service is not None:
                most = service.max_runs if key[0] == "service" else service.runs_per_user
            assert count <= max(most, self.before[key]), f"{key}: {count} where {most} is the limit"
        self.before = now

    @invariant()
    def memory_is_what_sql_says(self) -> None:
        """One turn for each user who has work that could run, with its rank and the job that takes it."""
        self.store.compare()

    @invariant()
    def it_is_known_that_attempts_are_delayed(self) -> None:
        assert self.store.has_delayed or not self.store.read(statements.DELAYED_FIRST)

    @invariant()
    def who_follows_waits_for_all_of_them(self) -> None:
        """It is blocked by as many jobs as have not ended; where one ended badly it has ended too."""
        jobs = {job.id: job for job in self.store.jobs(EVERYTHING)}
        for job in jobs.values():
            before = [jobs[on_id] for on_id in joborch.ids_in(job.after_ids)]
            if job.status is Status.QUEUED:
                assert job.blocked == sum(other.status not in OVER for other in before)
            if job.status not in OVER:
                assert all(other.status not in OVER or completed(self.store, other) for other in before), "it can never run"
            if job.status in BUSY or job.started_at is not None:
                assert all(completed(self.store, other) for other in before), "it ran before its time"

    @invariant()
    def nobody_is_charged_for_what_is_not_there(self) -> None:
        """What all users of a service have used, by their jobs' charges, is what is written down; fewer where it was given back."""
        charged = Counter[Any]()
        for job in self.store.jobs(EVERYTHING):
            charged[job.service, job.user_id] += job.charged
        for row in self.store.read(statements.USAGE_ALL):
            assert row["used"] == NO_USE or charged[row["service"], row["user_id"]] >= 0


TestQuotas = Quotas.TestCase
TestQuotas.settings = settings(deadline=None, max_examples=30, stateful_step_count=30)


def test_quotas_hold_when_many_claim_at_once(make_store: Callable[..., Store]) -> None:
    """Eight threads claim by heads that each read for itself: the limits are filled, and never passed."""
    store = make_store(limits={"example": a_service(runs_per_user=2, max_runs=5)})
    for number in range(40):
        store.add(new_job(user_id=number % 4), "uploaded")

    def claim(number: int) -> None:
        for _ in range(30):
            for head in heads(store, "example", 4):
                store.claim(head.job_id, f"client{number % 2}", 3)

    for _ in range(3):
        together(8, claim)
        busy = [job for job in store.jobs(EVERYTHING) if job.status in BUSY]
        assert len(busy) == 5
        assert max(Counter(job.user_id for job in busy).values()) == 2
        assert sorted(Counter(job.client for job in busy).values()) == [2, 3]
        for job in busy:
            assert store.move(job, Status.KILLED, "makes room")


def test_limits_are_kept_between_two_services_of_one_user(store: Store) -> None:
    store.set_limits({"a": a_service("a", runs_per_user=1), "b": a_service("b", runs_per_user=1)})
    jobs = [store.add(new_job(service=service), "uploaded") for service in ("a", "a", "b", "b")]
    assert [store.claim(job.id, "x", 9) is not None for job in jobs] == [True, False, True, False]


# == Many writers, one transaction ==


def queued_up(store: Store, works: list[Callable[[sqlite3.Connection], Any]]) -> list[Any]:
    """Have one thread for each of `works` write it, all in one transaction; return what each got: a value or an error."""
    got: list[Any] = [None] * len(works)

    def write(number: int) -> None:
        try:
            got[number] = store.write(works[number])
        except Exception as error:  # noqa: BLE001 - it is what this is about
            got[number] = error

    threads = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(len(works))]
    with store.core.inside():
        for thread in threads:
            thread.start()
        wait_for(lambda: len(store.core.inbox) == len(works), what="all writers to wait")
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return got


def inserting(key: str, then: Exception | None = None) -> Callable[[sqlite3.Connection], Any]:
    """A piece of work that stores a job of this key, and returns its key or raises after it."""

    def work(db: sqlite3.Connection) -> str:
        values = {**dataclasses.asdict(new_job(idempotency_key=key)), "status": "Queued", "reason": "", "created_at": 0.0}
        db.execute(statements.JOB_ADD, {**values, "changed": None, "moved_at": 0.0, "moves": 1, "arrived_at": 0.0})
        if then is not None:
            raise then
        return key

    return work


def keys(store: Store) -> set[str]:
    """The keys of all stored jobs."""
    return {job.idempotency_key or "" for job in store.jobs(EVERYTHING)}


def test_writers_of_one_transaction_get_each_its_own(store: Store) -> None:
    """A value or an error; what one raises undoes its part and no other."""
    works = [
        inserting("a"),
        inserting("b", KeyError("mine")),
        inserting("c"),
        inserting("a"),
        inserting("d", ValueError("and mine")),
        inserting("e"),
    ]
    got = queued_up(store, works)
    wins, loses = (0, 3) if got[0] == "a" else (3, 0)  # threads queue up in any order
    assert [got[wins], got[2], got[5]] == ["a", "c", "e"]
    assert isinstance(got[loses], sqlite3.IntegrityError)
    assert isinstance(got[1], KeyError) and isinstance(got[4], ValueError)
    assert keys(store) == {"a", "c", "e"}


def test_one_transaction_serves_all_who_wait(store: Store) -> None:
    begun = list[str]()
    store.db.set_trace_callback(lambda sql: begun.append(sql) if sql.startswith(("BEGIN", "COMMIT")) else None)
    assert queued_up(store, [inserting(str(number)) for number in range(20)]) == [str(number) for number in range(20)]
    assert begun == ["BEGIN IMMEDIATE", "COMMIT"]


def test_many_writers_at_once_lose_nothing(store: Store) -> None:
    def write(number: int) -> None:
        for turn in range(25):
            key = f"{number}-{turn}"
            assert store.write(inserting(key), durable=turn % 5 == 0) == key
            with pytest.raises(ZeroDivisionError):
                store.write(inserting("never", ZeroDivisionError()))

    together(8, write)
    assert keys(store) == {f"{number}-{turn}" for number in range(8) for turn in range(25)}


def test_a_full_disk_fails_all_of_a_transaction_and_is_over_when_there_is_room(store: Store) -> None:
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.db.execute(f"PRAGMA max_page_count = {pages}")
    big = [inserting(str(number) + "x" * 100_000) for number in range(3)]
    got = queued_up(store, [*big, inserting("small")])
    assert {type(each) for each in got} == {StorageError}
    assert "full" in str(got[0])
    assert keys(store) == set()
    store.db.execute("PRAGMA max_page_count = 1000000")
    assert store.write(inserting("again")) == "again"
    assert keys(store) == {"again"}


def test_a_database_that_another_process_locks(store: Store) -> None:
    store.db.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="cannot be written: database is locked"):
        store.add(new_job(), "uploaded")
    assert store.jobs(EVERYTHING) == [], "reading goes on"
    other.execute("ROLLBACK")
    other.close()
    assert store.add(new_job(), "uploaded").status is Status.QUEUED


def test_a_closed_store_says_so_to_writers(tmp_path: Path) -> None:
    """The process ends while somebody uploads: that is 503, come again, and no internal error."""
    store = Store(str(tmp_path / "db"), "server", HandClock())
    store.close()
    with pytest.raises(StorageError):
        store.add(new_job(), "uploaded")


# == What is stored ==


def test_keys_and_marks_are_unique(store: Store) -> None:
    first = store.add(new_job(idempotency_key="k"), "uploaded")
    for again in (new_job(idempotency_key="k"), new_job(uuid=first.uuid)):
        with pytest.raises(sqlite3.IntegrityError):
            store.add(again, "uploaded")
    assert store.jobs(EVERYTHING) == [first]
    assert history(store, first.id) == [(None, "Queued")]
    store.add(new_job(idempotency_key="k", user_id=2), "uploaded")
    store.add(new_job(uuid=first.uuid, attempt=2), "uploaded")
    assert must(store.job(statements.JOB_BY_UUID, uuid=first.uuid)).attempt == 2
    assert store.job(statements.JOB_BY_MARK, uuid=first.uuid, attempt=1) == first


def test_a_job_is_stored_as_given(store: Store) -> None:
    new = new_job(
        user_id=-(2**63), name="é\n", cpus=3, memory=5, timeout=1.5, retries=0, return_inputs=0, remote_id="7", request_digest="d"
    )
    job = store.add(new, "uploaded")
    for item in dataclasses.fields(new):
        assert getattr(job, item.name) == getattr(new, item.name), item.name
    assert (job.status, job.reason, job.created_at, job.mark) == (Status.QUEUED, "uploaded", store.clock.wall(), f"{new.uuid}.1")


@pytest.mark.parametrize("path", [None, ":memory:"])
def test_readers_see_what_was_written_in_every_thread(path: str | None, make_store: Callable[..., Store]) -> None:
    store = make_store("client", path)

    def work(number: int) -> None:
        for _ in range(10):
            job = store.add(new_job(), "")
            assert store.get(job.id) == job
            assert moved(store, job, Status.RUNNING).status is Status.RUNNING

    together(4, work)
    assert store.number(statements.COUNT_IN, status="Running") == 40


def test_numbers_of_changes_go_on_after_a_restart(tmp_path: Path) -> None:
    numbers = list[int]()
    for _ in range(3):
        store = Store(str(tmp_path / "db"), "client", HandClock())
        numbers.append(store.add(new_job(), "").changed or 0)
        assert store.last_change == numbers[-1]
        store.close()
    assert numbers == list(range(numbers[0], numbers[0] + 3))


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_database_file_that_went_under_us(how: str, store: Store) -> None:
    store.check()
    Path(store.path).rename(store.path + ".old")
    if how == "replaced":
        shutil.copy(store.path + ".old", store.path)
    with pytest.raises(StorageError, match="removed or replaced"):
        store.check()


def test_a_database_of_a_newer_version(tmp_path: Path) -> None:
    Store(str(tmp_path / "db"), "server").close()
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute(f"PRAGMA user_version = {statements.SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(ConfigError, match="created by a newer joborch"):
        Store(str(tmp_path / "db"), "server")


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"x" * 5000, None])
def test_a_database_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    place = tmp_path / "db"
    place.mkdir() if content is None else place.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(repr(str(place)))):
        Store(str(place), "server")


def test_a_schema_that_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    """All of it is one transaction: a crash in it leaves an empty database."""
    db = sqlite3.connect(tmp_path / "db", isolation_level=None)
    script = statements.SCHEMA.replace("COMMIT;", "")
    db.executescript(script)
    db.close()
    store = Store(str(tmp_path / "db"), "server", HandClock())
    assert store.add(new_job(), "").id == 1
    store.close()


def test_a_commit_wakes_those_whose_job_moved(store: Store) -> None:
    jobs, woken, looks = [store.add(new_job(), "uploaded") for _ in range(3)], list[object](), list[tuple[int | None, bool]]()

    def wait(job_id: int | None) -> None:
        def look() -> str | None:
            looks.append((job_id, store.core.is_inside()))
            rows = [store.get(job_id)] if job_id else store.jobs(EVERYTHING)
            return job_id or "any" if any(job and job.status is Status.PROCESSING for job in rows) else None  # type: ignore[return-value]

        with store.core.watching(look, job_id) as waiter:
            assert waiter.bell.sleep(60)
            if waiter.found:
                woken.append(waiter.found)

    threads = [threading.Thread(target=wait, args=(job_id,), daemon=True) for job_id in (jobs[0].id, jobs[1].id, None)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(store.core.waiters) == 3, what="three who wait")
    store.set_limits({"example": a_service("example")})
    assert store.claim(jobs[0].id, "x", 9)
    for thread in (threads[0], threads[2]):
        thread.join(20)
    assert {*woken} == {jobs[0].id, "any"}, "who waits for another job sleeps on"
    assert {*looks} == {(jobs[0].id, True), (None, True)}, "it is not even looked for"
    store.core.wake_all()
    threads[1].join(20)
    assert len(woken) == 2 and not store.core.waiters


def test_what_looking_raises_comes_to_the_one_who_waits(store: Store) -> None:
    """Neither the writer nor the others who wait get it."""
    job = store.add(new_job(), "uploaded")
    with store.core.watching(lambda: 1 / 0, job.id) as broken, store.core.watching(lambda: "found", None) as other:
        assert store.move(job, Status.KILLED, "")
        assert other.take() == "found"
        with pytest.raises(ZeroDivisionError):
            broken.take()


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        ("ext4", False),
        ("nfs4", True),
        ("nfs", True),
        ("cifs", True),
        ("lustre", True),
        ("fuse.sshfs", True),
        ("tmpfs", False),
        ("9p", True),
    ],
)
def test_network_file_systems_are_known_by_their_mount(kind: str, network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"/dev/sda / ext4 rw 0 0\nhost:/home {tmp_path} {kind} rw 0 0\nhost:/x {tmp_path}2 nfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: mounts)
    assert joborch.on_network(str(tmp_path / "db")) is network
    assert joborch.on_network("/elsewhere/db") is False


# == Clocks that lie, and older databases ==


@pytest.mark.parametrize("hours", [-100_000, -5, 0, 5, 100_000])
def test_steady_time_is_not_changed_by_who_sets_the_clock(hours: int, tmp_path: Path) -> None:
    """Within a boot it goes on by the boot's clock, over restarts too; after another boot wall time decides, and never goes back."""
    clock, path = HandClock(), str(tmp_path / "db")
    store = Store(path, "server", clock)
    begun = store.steady()
    assert begun == pytest.approx(clock.wall()), "it begins as wall time, so that a person can read it"
    clock.pass_s(10)
    clock.set_s(hours * 3600)
    assert store.steady() == pytest.approx(begun + 10)
    store.close()
    clock.pass_s(20)
    store = Store(path, "server", clock)
    assert not store.rebooted
    assert store.steady() == pytest.approx(begun + 30)
    store.check()
    store.close()
    clock.pass_s(100)
    clock.set_s(hours * 3600)
    clock.reboot()
    store = Store(path, "server", clock)
    assert store.rebooted
    assert store.steady() == pytest.approx(begun + 30 + max(0, 100 + hours * 3600))
    store.close()


def schema_of(store: Store) -> dict[str, Any]:
    """Tables with their columns, and indexes with their texts, as SQLite knows them."""
    tables = [row["name"] for row in store.read("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {table: [tuple(row) for row in store.read(f"SELECT * FROM pragma_table_info('{table}')")] for table in tables}
    indexes = store.read("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
    return {**columns, **{row["name"]: re.sub(r"\s+", " ", row["sql"]) for row in indexes}}


RELEASED = Path(__file__).parent / "joborch-0.1.0.sql"  # a database that the Store of 0.1.0 made


def test_a_database_of_0_1_0_is_brought_on(tmp_path: Path, store: Store) -> None:
    """It has then what a new one has, with all its rows; a cleaned job gets its end and its reason from its history."""
    path = tmp_path / "old"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(RELEASED.read_text())
        rows = {table: db.execute(f"SELECT * FROM {table}").fetchall() for table in ("jobs", "history", "attempts", "usage", "users")}
    old = Store(str(path), "server", HandClock())
    assert schema_of(old) == schema_of(store)
    jobs = old.jobs("SELECT * FROM jobs ORDER BY id")
    assert [(job.name, job.status, job.ended_as, job.reason) for job in jobs] == [
        ("done", Status.COMPLETED, None, "exit status 0"),
        ("cleaned failed", Status.CLEANED, "Failed", "exit status 3"),
        ("cleaned completed", Status.CLEANED, "Completed", "exit status 0"),
        ("killed", Status.KILLED, None, "terminated before it was sent"),
        ("second attempt", Status.RUNNING, None, "running"),
        ("waits", Status.QUEUED, None, "uploaded"),
        ("follows", Status.QUEUED, None, "uploaded"),
    ]
    changed_columns = {
        "ended_as",
        "reason",
        "retry_of",
        "from_ids",
        "callback_url",
        "inputs_size",
        "kill_by",
        "gpus",
        "peak_memory",
        "cpu_time",
    }
    kept = [name for name in joborch.Job._fields if name not in changed_columns]
    before = [dict(zip(joborch.Job._fields, row)) for row in rows.pop("jobs")]
    assert [[getattr(job, name) for name in kept] for job in jobs] == [[row[name] for name in kept] for row in before]
    for table, were in rows.items():
        found = [tuple(row) for row in old.read(f"SELECT * FROM {table}")]
        assert found == [(*row, *(None,) * (len(found[0]) - len(row))) for row in were], "new columns are empty"
    old.set_limits({"example": a_service()})
    assert [head.job_id for head in heads(old, "example")] == [6]
    assert [row["client"] for row in old.read(statements.ATTEMPTS_GET, id=5)] == ["127.0.0.1:9000"]
    moved(old, jobs[5], Status.PROCESSING, Status.SUBMITTED, Status.COMPLETED)
    follower = old.get(7)
    assert follower is not None and follower.blocked == 0
    assert old.add(new_job(), "uploaded").id == 8
    old.close()
    again = Store(str(path), "server", HandClock())
    assert again.number("PRAGMA user_version") == statements.SCHEMA_VERSION
    again.close()


@pytest.mark.parametrize("version", [1, 2])
def test_a_database_that_no_release_made_is_refused(version: int, tmp_path: Path) -> None:
    path = tmp_path / "old"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(ConfigError, match=rf"unreleased joborch \(schema {version}\): give another file"):
        Store(str(path), "server", HandClock())
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0, "no table was made"


def test_a_job_is_a_row_of_its_table(store: Store) -> None:
    """`Job` names the columns in their order, with their types; `NewJob` has the defaults of the table."""
    kinds = {"int": "INTEGER", "float": "REAL", "str": "TEXT", "Status": "TEXT"}
    hints = {name: getattr(hint, "__forward_arg__", hint) for name, hint in Job.__annotations__.items()}
    table = store.read("SELECT name, type, \"notnull\" AS needed, dflt_value AS given FROM pragma_table_info('jobs')")
    assert [row["name"] for row in table] == list(Job._fields)
    for row in table:
        kind, optional, _ = hints[row["name"]].partition(" | None")
        assert row["type"] == kinds[kind], row["name"]
        assert row["name"] == "id" or bool(row["needed"]) is not bool(optional), row["name"]
    chosen = {item.name: item.default for item in dataclasses.fields(joborch.NewJob) if item.name != "uuid"}
    written = {row["name"]: row["given"] for row in table}
    assert {name: written[name] for name in chosen} == {name: None if given is None else repr(given) for name, given in chosen.items()}


# == Every query goes by an index ==

STATEMENTS = {name: value for name, value in vars(statements).items() if name.isupper() and isinstance(value, str)}
STATEMENTS = {name: sql for name, sql in STATEMENTS.items() if re.match(r"\s*(SELECT|UPDATE|DELETE|INSERT|WITH)\b", sql)}
PARTIAL = set(re.findall(r"INDEX (\w+) ON \w+\([^)]*\)\s+WHERE", statements.SCHEMA))
# What reads a whole table, and may: `heartbeat`, `turns_made`, `sqlite_sequence` and `feed` have one row, `drained` and `paused`
# one a client or a service; a start reads all of `usage`, `pace`, `users` and `tokens`; a restore reads
# all uuids; `waiting`, `level` and `known` are tables that a statement makes by itself, row by row.
SCANS_MEANT = dict.fromkeys(("HEARTBEAT", "LAST_HEARTBEAT", "INSTANCE"), "heartbeat")
SCANS_MEANT.update(
    QUEUED_USERS="waiting",
    QUEUED_SERVICES="waiting",
    PACE_ALL="pace",
    WEIGHT_ALL="users",
    NEW_INSTANCE="heartbeat",
    LAST_ID="sqlite_sequence",
    ALL_UUIDS="jobs",
    JOBS_COMPARED="jobs",
)
SCANS_MEANT.update(WAITING_BY_PRIORITY="level", QUEUED_PRIORITIES="level", USAGE_ALL="usage", DRAINED_ALL="drained")
SCANS_MEANT.update(TURNS_MADE="turns_made", TURNS_MADE_BY="turns_made", TOKEN_ALL="tokens")
SCANS_MEANT.update(DELIVERIES_RECEIVERS="known", PAUSED_ALL="paused", EXPORT_SERVICES="known")
SCANS_MEANT.update(ERASURE_CLIENTS="erasures", ERASURES_COUNT_OF_USER="erasures", REMNANTS_ALL="remnants", REMNANT_OF_USER="remnants")
SCANS_MEANT.update(REMNANTS_COUNT="remnants")
SCANS_MEANT.update(dict.fromkeys(("FEED_GET", "FEED_FORGET", "FEED_SKIP"), "feed"))
# JOBS_PAGE_NAMED: the jobs of a name lie by name, and it is used where they are few. COUNT_LIVE: once after a start, in a thread.
# EXPORT_SUMMARY: all jobs of a span of time, into few groups.
SORTS_MEANT = {"JOBS_PAGE_NAMED", "COUNT_LIVE", "EXPORT_SUMMARY"}

# They examine as many rows as their LIMIT says, or one a user, and sort no more than that: see test_dashboard.
LIMITED = {"NEWEST_SUBMITTED", "NEWEST_ENDED", "NEWEST_FAILURES", "OLDEST_QUEUED", "USERS_WITH_JOBS"}
SCANS_MEANT.update({**dict.fromkeys(LIMITED, "jobs"), "USERS_WITH_JOBS": "usage"})


def plan(store: Store, sql: str) -> list[str]:
    """The steps of a statement, as SQLite plans them."""
    values = dict.fromkeys(re.findall(r":(\w+)", sql))
    return [row["detail"] for row in store.db.execute("EXPLAIN QUERY PLAN " + sql, values)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with thousands of queued jobs, most of one user, and with what ANALYZE learned from them."""
    store = Store(str(tmp_path_factory.mktemp("filled") / "db"), "server", HandClock())
    store.set_limits({"example": a_service()})
    new = {
        **dataclasses.asdict(new_job()),
        "reason": "",
        "created_at": 0.0,
        "changed": None,
        "moved_at": 0.0,
        "moves": 1,
        "arrived_at": 0.0,
    }

    def fill(db: sqlite3.Connection) -> None:
        for number in range(5000):
            status = "Queued" if number % 50 else sorted(Status)[number // 50 % len(Status)].value
            db.execute(statements.JOB_ADD, {**new, "uuid": str(number), "user_id": 1 if number % 10 else number, "status": status})

    store.write(fill)
    store.db.execute("ANALYZE")
    yield store
    store.close()


def test_the_statements_are_found() -> None:
    assert len(STATEMENTS) > 40
    assert {"jobs_queued", "jobs_client", "jobs_ended"} <= PARTIAL
    assert not {"jobs_status", "jobs_user", "jobs_service"} & PARTIAL
    assert set(SCANS_MEANT) | LIMITED <= set(STATEMENTS)
    assert {"JOB_GET", "JOB_MOVE", "QUEUED_USERS", "JOBS_PAGE_OF_USER", "FORGET_HISTORY"} <= set(STATEMENTS)


@pytest.mark.parametrize("name", STATEMENTS)
def test_no_statement_reads_a_whole_table(name: str, store: Store, filled: Store) -> None:
    """Neither in an empty database nor in a full one whose statistics might tempt SQLite to."""
    for where in (store, filled):
        for step in plan(where, STATEMENTS[name]):
            scan = re.fullmatch(r"SCAN (?:TABLE )?(\w+)(?: USING(?: COVERING)? INDEX (\w+))?", step)
            if scan and scan[1] != SCANS_MEANT.get(name):
                assert scan[2] in PARTIAL, f"{name}: {step}"
            assert scan or step == "SCAN CONSTANT ROW" or "subquery" in step.lower() or not step.startswith("SCAN"), f"{name}: {step}"
            assert "AUTOMATIC" not in step, f"{name}: {step}"
            assert "B-TREE" not in step or "jobs" not in STATEMENTS[name] or name in LIMITED | SORTS_MEANT, f"{name} sorts: {step}"


@pytest.mark.parametrize("name", [name for name, sql in STATEMENTS.items() if "INDEXED BY" in sql])
def test_indexes_that_are_named_are_used(name: str, filled: Store) -> None:
    named = set(re.findall(r"INDEXED BY (\w+)", STATEMENTS[name]))
    used = set(re.findall(r"INDEX ((?:jobs|usage|history|deliveries|instances|erasures)_\w+)", " ".join(plan(filled, STATEMENTS[name]))))
    assert named == used


def test_every_index_serves_a_statement(filled: Store) -> None:
    made = set(re.findall(r"INDEX (\w+) ON", statements.SCHEMA))
    used = set(re.findall(r"INDEX (\w+)", " ".join(step for sql in STATEMENTS.values() for step in plan(filled, sql))))
    unique = set(re.findall(r"UNIQUE INDEX (\w+)", statements.SCHEMA))
    assert made - used <= unique, "indexes that cost a write each and serve no query"


def test_ends_are_found_by_time(store: Store) -> None:
    """ENDED_BEFORE and CLEANED_BEFORE look at the time of the end alone, and give the oldest first."""
    jobs = [moved(store, store.add(new_job(), ""), Status.KILLED) for _ in range(3)]
    store.clock.pass_s(100)  # type: ignore[attr-defined]
    late = moved(store, store.add(new_job(), ""), Status.PROCESSING, Status.FAILED)
    assert (
        store.jobs(
            statements.ENDED_BEFORE,
            before=late.moved_at,
            unfetched_before=late.moved_at,
            fetched_before=0.0,
            confirmed_before=0.0,
            limit=500,
        )
        == jobs
    )
    assert all(
        job.status in ENDED
        for job in store.jobs(
            statements.ENDED_BEFORE, before=1e12, unfetched_before=1e12, fetched_before=0.0, confirmed_before=0.0, limit=500
        )
    )
    moved(store, jobs[1], Status.CLEANED)
    assert [row["id"] for row in store.read(statements.CLEANED_BEFORE, before=1e12)] == [jobs[1].id]
    assert store.jobs(statements.ENDED_BEFORE, before=1e12, unfetched_before=1e12, fetched_before=0.0, confirmed_before=0.0, limit=500) == [
        jobs[0],
        jobs[2],
        late,
    ]
