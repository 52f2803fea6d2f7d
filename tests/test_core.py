"""The core: what follows from work is decided in its transaction, memory changes after the COMMIT, and inside is nothing that blocks."""

from __future__ import annotations

import builtins
import functools
import os
import random
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import replace, wait_for
from world import RESULT, Desk, Peer, Yard, ask, event, events, file_part, new_job, reply, submit_payload, zip_reply

import joborch
from joborch import BUSY, Cause, DataFolder, Job, Status, StorageError, Store, fetch_tick, get_tick, watch_tick
from joborch_base import statements
from joborch_base.scheduling import Line
from joborch_base.states import MOVES
from joborch_plugins import reload

pytestmark = pytest.mark.usefixtures("no_long_polls")

EVERYTHING = "SELECT * FROM jobs ORDER BY id"
ORDER = "SELECT job_id, source, target, reason, attempt FROM history ORDER BY seq"


def decide_at_once(desk: Desk) -> None:
    """Claim in the transaction that makes it possible, as from the start of a server."""
    desk.store.core.propose = functools.partial(joborch.propose, desk.server)


def held_by_senders(link: joborch.Link) -> set[int]:
    """The jobs that a sender of a client holds; the link counts as many."""
    held = {job_id for job_id, live in link.jobs.items() if live.sending}
    assert link.sending == len(held)
    return held


def targets(store: Store) -> list[tuple[int, str]]:
    """All moves in their order, as job and status."""
    return [(row["job_id"], row["target"]) for row in store.read(ORDER)]


def commits(store: Store, work: Callable[[], object]) -> int:
    """How many transactions `work` commits."""
    seen = list[str]()
    store.db.set_trace_callback(seen.append)
    work()
    store.db.set_trace_callback(None)
    return seen.count("COMMIT")


# == What follows is decided in the same transaction ==


def test_an_upload_and_its_claim_are_one_commit(desk: Desk) -> None:
    decide_at_once(desk)
    desk.link.heard()
    assert commits(desk.store, desk.upload) == 1
    assert targets(desk.store) == [(1, "Queued"), (1, "Processing")]
    assert [job.id for job in desk.link.outbox] == [1] and held_by_senders(desk.link) == {1}
    assert desk.link.outbox[0].status is Status.PROCESSING


def test_an_end_and_the_next_claim_are_one_commit(desk: Desk, peer: Peer) -> None:
    """The quota of the user holds in the order of the log: the end comes first."""
    desk.restart(SERVICE_EXAMPLE_RUNS_PER_USER="1")
    job = desk.with_client()
    waits = desk.upload()
    decide_at_once(desk)
    peer.says["/retrieve"] = [zip_reply(RESULT)]
    joborch.report(desk.server, desk.link, event(job))
    assert commits(desk.store, lambda: fetch_tick(desk.server, desk.link)) == 1
    assert targets(desk.store)[-2:] == [(job.id, "Completed"), (waits.id, "Processing")]


def test_what_needs_no_disk_is_committed_alone_and_the_claim_after_it(desk: Desk) -> None:
    """A move that must not wait for the disk does not; the claim that it makes possible must."""
    desk.restart(SERVICE_EXAMPLE_RUNS_PER_USER="1")
    job = desk.with_client(Status.PROCESSING)
    waits = desk.upload()
    decide_at_once(desk)
    assert commits(desk.store, lambda: desk.store.move(job, Status.QUEUED, "it was refused", client=None, not_before=1e12)) == 2
    assert [job.id for job in desk.link.outbox] == [waits.id]


def test_a_client_that_is_back_gets_what_waits(desk: Desk, peer: Peer) -> None:
    jobs = [desk.upload() for _ in range(3)]
    decide_at_once(desk)
    peer.says["/events"] = [events()]
    get_tick(desk.server, desk.link)
    assert [job.id for job in desk.link.outbox] == [job.id for job in jobs[: desk.link.slots]]


def test_a_job_to_be_killed_does_not_hold_up_the_next(desk: Desk) -> None:
    first, second = desk.upload(), desk.upload()
    assert desk.store.request_kill(first.id, Cause.CANCELLED)
    desk.link.heard()
    decide_at_once(desk)
    desk.server.dispatch()
    assert desk[first].status is Status.KILLED
    assert desk[second].status is Status.PROCESSING


def test_nothing_passes_a_wide_job_whose_start_is_not_known(desk: Desk) -> None:
    desk.link.heard()
    desk.link.slots = 2
    job = desk.with_client()
    decide_at_once(desk)
    wide, narrow = desk.upload(cpus=2, user_id=2), desk.upload(timeout=1.0)
    assert desk[wide].status is desk[narrow].status is Status.QUEUED
    desk.store.move(desk[job], Status.COMPLETED, "")
    assert desk[wide].status is Status.PROCESSING and desk[narrow].status is Status.QUEUED


def test_a_fault_in_a_decision_costs_nobody_his_work(desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    decide_at_once(desk)
    desk.link.heard()
    real = desk.store.claim

    def claim(*arguments: Any) -> Job | None:
        real(*arguments)
        raise ZeroDivisionError

    monkeypatch.setattr(desk.store, "claim", claim)
    job = desk.upload()
    assert desk[job].status is Status.QUEUED and not held_by_senders(desk.link) and not desk.link.outbox
    assert "an error while deciding" in caplog.text


def test_a_fault_in_what_follows_keeps_back_nothing_else(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where no thread can be started: the caller is answered, and the next claim gets to its sender."""
    jobs = [desk.upload() for _ in range(2)]
    monkeypatch.setattr(desk.server, "wake", lambda name: 1 / 0)
    decide_at_once(desk)
    desk.link.heard()
    desk.link.slots = 9
    last = desk.upload()
    assert [job.id for job in desk.link.outbox] == [job.id for job in (*jobs, last)]
    assert "an error in what follows" in caplog.text


def test_a_sender_that_still_has_a_job_keeps_it(desk: Desk) -> None:
    """It is queued again, and the sender lets it go a moment later: a claim by then would be taken for lost."""
    job = desk.with_client(Status.PROCESSING)
    assert desk.link.hold(job.id) and not desk.link.hold(job.id)
    decide_at_once(desk)
    assert desk.store.move(job, Status.QUEUED, "it was refused", client=None)
    assert desk[job].status is Status.QUEUED and held_by_senders(desk.link) == {job.id}
    desk.link.release(job.id)
    desk.server.dispatch()
    assert desk[job].status is Status.PROCESSING


def told(desk: Desk, peer: Peer) -> list[tuple[Any, ...]]:
    """The histories of some jobs that are sent and end one after the other."""
    peer.says["/retrieve"] = [zip_reply(RESULT)]
    peer.says["/submit"] = [reply(200, {"id": 7})]
    desk.link.heard()
    for number in range(6):
        desk.upload(user_id=number % 2)
    for _ in range(20):
        desk.send()
        for job in desk.store.jobs(EVERYTHING):
            if job.status is Status.SUBMITTED:
                desk.settle(job, uuid=job.uuid, id=7)
                break
    assert {job.status for job in desk.store.jobs(EVERYTHING)} == {Status.COMPLETED}
    rows = desk.store.read("SELECT job_id, number, source, target, reason, attempt FROM history ORDER BY job_id, number")
    return [tuple(row) for row in rows]


def test_merged_transactions_leave_the_same_history(desk: Desk, peer: Peer, tmp_path_factory: pytest.TempPathFactory) -> None:
    separate = told(desk, peer)
    folder = DataFolder(str(tmp_path_factory.mktemp("merged")))
    folder.open()
    other = Desk(folder, peer.url)
    decide_at_once(other)
    assert told(other, peer) == separate
    seqs = [row["seq"] for row in other.store.read("SELECT seq FROM history")]
    assert len(set(seqs)) == len(seqs), "moves of one transaction have places of their own"
    other.store.close()
    folder.lock.close()


# == A COMMIT that fails ==


class Faults:
    """Makes the COMMIT of the writing connection fail, by SQLite itself, whenever `coming` is set."""

    def __init__(self, store: Store) -> None:
        self.store, self.coming = store, False

    def refuse(self, action: int, name: str | None, *_: object) -> int:
        return sqlite3.SQLITE_DENY if self.coming and action == sqlite3.SQLITE_TRANSACTION and name == "COMMIT" else sqlite3.SQLITE_OK

    def arm(self, coming: bool) -> None:
        """Let the next COMMITs fail or not; a new authorizer has the statements prepared anew."""
        self.coming = coming
        self.store.db.set_authorizer(self.refuse)


def works(desk: Desk, dice: random.Random) -> dict[str, Callable[[], object]]:
    """A piece of work of each kind that a server's threads bring to the core."""
    store, link = desk.store, desk.link

    def some(*statuses: Status) -> Job:
        return dice.choice([job for job in store.jobs(EVERYTHING) if job.status in statuses] or [desk.upload()])

    def upload() -> None:
        store.add(new_job(user_id=dice.randrange(3), priority=dice.randrange(3)), "uploaded")

    def end() -> None:
        job = some(*BUSY)
        if job.status in BUSY and (job.status, Status.COMPLETED) in MOVES["server"] and store.move(job, Status.COMPLETED, ""):
            finish(link, job)

    def start() -> None:
        job = some(Status.PROCESSING)
        if job.status is Status.PROCESSING and store.move(job, Status.SUBMITTED, "", dest_id="7"):
            finish(link, job)

    def clean() -> None:
        job = some(Status.COMPLETED, Status.KILLED)
        if job.status in joborch.ENDED:
            store.move(job, Status.CLEANED, "")
            store.forget([job.id])

    return {
        "upload": upload,
        "start": start,
        "end": end,
        "give up": lambda: (
            joborch.new_attempt(desk.server, some(Status.SUBMITTED), "lost") if some(Status.SUBMITTED).status in BUSY else None
        ),
        "kill": lambda: store.request_kill(some(*BUSY).id, Cause.CANCELLED),
        "take along": lambda: store.take_along(some(Status.SUBMITTED), link.name),
        "weight": lambda: store.set_weight(dice.randrange(3), dice.uniform(0.5, 4)),
        "drain": lambda: desk.server.drain(link, dice.random() < 0.3),
        "reload": lambda: reload_settings(desk, dice),
        "charge": lambda: store.charge_longer(some(Status.SUBMITTED)),
        "admit": lambda: watch_tick(desk.server),
        "clean": clean,
        "dispatch": lambda: (desk.server.dispatch(), joborch.dispatch_tick(desk.server)),
        "beat": store.check,
    }


def reload_settings(desk: Desk, dice: random.Random) -> None:
    """As SIGHUP does: other limits, rules and weights, and now and then a further service, or none that has jobs."""
    texts = {name: text for name, text in desk.environment.items() if name.startswith("SERVICE_EXAMPLE") or name in ("DATA_PATH", "PORT")}
    texts["SERVICE_EXAMPLE_RUNS_PER_USER"], texts["SERVICE_EXAMPLE_POLICY"] = dice.choice("123"), dice.choice(["share", "fifo", "priority"])
    texts["JOBORCH_SHARE_HALF_LIFE"], texts["JOBORCH_WEIGHTS"] = dice.choice(["1h", "6h"]), f"{dice.randrange(3)}={dice.choice('24')}"
    if dice.random() < 0.3:
        texts = {name.replace("EXAMPLE", "OTHER"): text for name, text in texts.items()}
    plugin = desk.server.plugins["reload"]
    reload.change_server(plugin, desk.server, joborch.load_config("server", {}, texts))
    for loop in desk.server.loops.values():
        loop.stop()


def finish(link: joborch.Link, job: Job) -> None:
    """As a sender does when the outcome of its job is stored."""
    link.outbox = type(link.outbox)(other for other in link.outbox if other.id != job.id)
    link.release(job.id)


def compare(desk: Desk) -> None:
    """What is in memory is what the rows give."""
    core, link = desk.store.core, desk.link
    processing = {job.id for job in desk.store.jobs(EVERYTHING) if job.status is Status.PROCESSING}
    assert held_by_senders(link) == processing == {job.id for job in link.outbox}
    assert link.drained == bool(desk.store.read(statements.DRAINED_ALL))
    assert not core.inbox and not core.moved and not core.outcomes and not core.undecided and not core.owner
    assert not desk.store.db.in_transaction
    kept = core.shares
    assert not any(layers.changes for layers in kept.maps), "changes that were neither committed nor dropped"
    desk.store.set_limits(desk.store.limits)
    anew, core.shares = core.shares, kept
    assert kept.users.known == anew.users.known
    assert {
        user: weight for user, weight in kept.weights.known.items() if weight != 1.0 or user in anew.weights.known
    } == anew.weights.known
    for ours, theirs in ((kept.order, anew.order), (kept.running, anew.running)):
        assert {name: found for name, found in ours.items() if found} == {name: found for name, found in theirs.items() if found}
    assert {name: line for name, line in kept.lines.known.items() if line != Line()} == anew.lines.known
    assert {name: load for name, load in kept.loads.known.items() if load.jobs} == anew.loads.known


@pytest.mark.parametrize("seed", range(4))
def test_memory_is_what_the_rows_say_whichever_commit_fails(seed: int, desk: Desk) -> None:
    """Each kind of work fails at some COMMITs; it is answered clearly, changes nothing, and works the next time."""
    decide_at_once(desk)
    desk.link.heard()
    desk.link.slots = 3
    dice, faults = random.Random(seed), Faults(desk.store)
    failed, worked, said, changed = set[str](), set[str](), set[str](), False
    for _ in range(250):
        kinds = works(desk, dice)
        kind = dice.choice(list(kinds))
        before = targets(desk.store)
        faults.arm(dice.random() < 0.3)
        try:
            kinds[kind]()
            worked.add(kind)
        except StorageError as error:
            failed.add(kind)
            said.add(str(error))
            changed |= targets(desk.store) != before
        faults.arm(False)
        compare(desk)
    assert worked == set(works(desk, dice)), "each kind was tried"
    assert len(failed) > 6 and not changed
    assert all("the database cannot be written" in text for text in said)


def test_those_who_share_a_commit_that_fails_all_hear_of_it(desk: Desk) -> None:
    faults, got = Faults(desk.store), list[object]()

    def upload() -> None:
        try:
            got.append(desk.store.add(new_job(), "uploaded"))
        except StorageError as error:
            got.append(str(error))

    threads = [threading.Thread(target=upload) for _ in range(4)]
    with desk.store.core.inside():
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while len(desk.store.core.inbox) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        faults.arm(True)
    for thread in threads:
        thread.join(30)
    faults.arm(False)
    assert len(got) == 4 and all("cannot be written" in str(each) for each in got)
    assert desk.store.jobs(EVERYTHING) == []
    compare(desk)


@pytest.mark.parametrize("seed", range(3))
def test_a_client_runs_each_payload_once_whichever_commit_fails(seed: int, data: DataFolder, tmp_path: Path) -> None:
    """A submit is answered with 503 and leaves nothing, or there is its payload; a handle that could not be stored is kept until it is."""
    yard, dice, starts = Yard(data), random.Random(seed), tmp_path / "starts"
    faults, taken, refused = Faults(yard.store), list[int](), 0
    script = file_part("run.sh", f"basename $(dirname $PWD) >> {starts}".encode())

    def submit() -> None:
        nonlocal refused
        said = submit_payload(yard.client, [script])
        if said.status == 200:
            taken.append(said.json["id"])
        else:
            assert said.status == 503, said
            refused += 1

    ticks = [functools.partial(tick, yard.client) for tick in (joborch.run_tick, joborch.sync_tick, joborch.clean_tick, joborch.limit_tick)]
    confirm = functools.partial(ask, yard.client, "GET", f"/events?since=1&instance={yard.client.instance}&done=1,2,3")
    try:
        for _ in range(60):
            faults.arm(dice.random() < 0.4)
            with suppress(StorageError):
                dice.choice([submit, submit, *ticks, ticks[0], confirm])()
        faults.arm(False)

        def all_are_over() -> bool:
            joborch.run_tick(yard.client)
            return all(job.status in joborch.OVER for job in yard.store.jobs(EVERYTHING))

        wait_for(all_are_over, what="the end of all payloads")
        jobs = yard.store.jobs(EVERYTHING)
        assert [job.id for job in jobs] == taken and taken and refused
        assert {job.status for job in jobs} == {Status.COMPLETED}
        assert sorted(starts.read_text().split()) == sorted(job.mark for job in jobs)
        assert yard.store.last_change >= max(job.changed or 0 for job in jobs)
        joborch.run_tick(yard.client)
        assert not yard.client.payloads, "nothing is known any more of what is over"
    finally:
        faults.arm(False)
        yard.close()


@pytest.mark.parametrize("seed", range(2))
def test_a_client_remembers_nothing_false_whichever_commit_fails(
    seed: int, data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Payloads start with their submits, some end with them, some are killed: in the end all is over, and known from the rows alone."""
    replace(monkeypatch, "await_end", lambda *_: None)  # it waits for a tick, which would follow it here
    yard, dice, starts = Yard(data, JOBORCH_SLOTS="4"), random.Random(seed), tmp_path / "starts"
    client, faults, said = yard.client, Faults(yard.store), set[int]()
    client.starts_at_once = True

    def submit(end: str, wait_ms: int) -> None:
        script = f"basename $(dirname $PWD) >> {starts}; {end}".encode()
        said.add(submit_payload(client, [file_part("run.sh", script)], X_Joborch_Wait=str(wait_ms)).status)

    def kill() -> None:
        jobs = yard.store.jobs(EVERYTHING)
        said.update(ask(client, "POST", f"/kill/{job.id}", X_Joborch_Mark=job.mark).status for job in jobs[-2:])

    ticks = [functools.partial(tick, client) for tick in (joborch.run_tick, joborch.end_tick, joborch.sync_tick, joborch.limit_tick)]
    given = (("exit 0", 1000), ("exit 0", 0), ("exec sleep 1000", 0), ("exec sleep 1000", 1))
    submits = [functools.partial(submit, *each) for each in given]
    try:
        for _ in range(60):
            faults.arm(dice.random() < 0.3)
            with suppress(StorageError):
                dice.choice([*submits, kill, *ticks])()
        faults.arm(False)

        def all_are_over() -> bool:
            yard.clock.pass_s(1)
            joborch.run_tick(client)
            while joborch.end_tick(client):
                pass
            rest = [job for job in yard.store.jobs(EVERYTHING) if job.status not in joborch.OVER]
            for job in rest:
                if job.status is Status.RUNNING:
                    yard.store.request_kill(job.id, joborch.Cause.CANCELLED)
            return not rest

        wait_for(all_are_over, 120, "the end of all payloads")
        jobs, ran = yard.store.jobs(EVERYTHING), starts.read_text().split() if starts.exists() else []
        assert {200, 503} <= said <= {200, 202, 503}, "some were refused, and some were not"
        assert {job.status for job in jobs} <= {Status.COMPLETED, Status.KILLED}
        assert len(ran) == len(set(ran)) and {job.mark for job in jobs if job.status is Status.COMPLETED} <= set(ran)
        assert yard.store.core.quiet <= {job.id for job in jobs if job.status is Status.COMPLETED}
        joborch.run_tick(client)
        assert not client.payloads and not client.holds.held and not client.executor.attempts  # type: ignore[attr-defined]
        assert {path.name for path in data.jobs.iterdir()} == {job.mark for job in jobs} and not list(data.tmp.iterdir())
    finally:
        faults.arm(False)
        yard.close()


# == Inside ==


def test_inside_are_sqlite_and_memory_alone(desk: Desk, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, socket, process or sleep, whatever a server and a client do."""
    inside, stores = list[str](), [desk.store]

    def watch(where: Any, name: str) -> None:
        real = getattr(where, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            if any(store.core.is_inside() for store in stores):
                inside.append(f"{name}{arguments!r}")
            return real(*arguments, **options)

        monkeypatch.setattr(where, name, watched)

    for where, name in (
        (builtins, "open"), (os, "open"), (os, "fsync"), (os, "rename"), (os, "stat"), (socket, "socket"), (socket.socket, "connect"),
        (socket.socket, "send"), (socket.socket, "sendall"), (socket.socket, "recv_into"), (subprocess, "Popen"), (time, "sleep"),
        (joborch.log, "info"),
    ):  # fmt: skip
        watch(where, name)
    decide_at_once(desk)
    told(desk, peer)
    joborch.clean_tick(desk.server)
    desk.clock.pass_s(10**6)
    joborch.clean_tick(desk.server)
    watch_tick(desk.server)
    assert desk.server.wait_until(lambda: "found", 1, lambda: False) == "found"
    folder = DataFolder(str(desk.data.path / "client"))
    folder.open()
    yard = Yard(folder)
    stores.append(yard.store)
    try:
        yard.run(yard.submit("echo done > result"))
        assert [said["status"] for said in yard.events()["payloads"]] == ["Completed"]
        joborch.sync_tick(yard.client)
        joborch.clean_tick(yard.client)
    finally:
        yard.close()
        folder.lock.close()
    assert inside == []
