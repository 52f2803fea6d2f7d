"""The server's ticks: each reads what the Store says and what a client answers, and moves jobs on; also twice, also too late.

The client is a peer that says what a test has it say. Loops, the cleaner and the sweeper of both modes are tried here too.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import free_port, replace, wait_for
from world import RESULT, Asked, Desk, Peer, changed, digest_of, event, events, heads, new_job, reply, zip_reply

import joborch
from joborch import (
    BUSY,
    Cause,
    DataFolder,
    Job,
    Loop,
    Server,
    Status,
    ThreadLimit,
    clean_tick,
    fetch_tick,
    get_tick,
    kill_tick,
    load_config,
    sweep,
    watch_tick,
)
from joborch_base import statements
from joborch_base.scheduling import Pace
from joborch_base.threads import next_look

pytestmark = pytest.mark.usefixtures("no_long_polls")


# == Sending ==


@pytest.mark.parametrize(
    ("said", "status", "attempt", "client", "cause"),
    [
        (reply(200, {"id": 7}), Status.SUBMITTED, 1, True, None),
        (reply(400, {"message": "no"}), Status.INVALID, 1, True, "user"),
        (reply(503), Status.QUEUED, 1, False, None),
        (reply(429), Status.QUEUED, 1, False, None),
        (reply(401), Status.QUEUED, 1, False, None),
        (reply(500), Status.UNKNOWN, 1, True, None),
        (reply(200, b"<html>"), Status.UNKNOWN, 1, True, None),
        (b"", Status.UNKNOWN, 1, True, None),
    ],
)
def test_what_becomes_of_a_job_that_is_sent(
    said: bytes, status: Status, attempt: int, client: bool, cause: str | None, desk: Desk, peer: Peer
) -> None:
    job = desk.upload()
    peer.says["/submit"] = [said]
    desk.link.heard()
    assert desk.send()
    sent = desk[job]
    assert (sent.status, sent.attempt, sent.client is not None, sent.cause) == (status, attempt, client, cause)
    assert sent.dest_id == ("7" if status is Status.SUBMITTED else None)
    assert desk.link.name in desk.reasons(job)
    is_left_alone = bool(desk.link.why_not("example"))
    assert is_left_alone == (status in (Status.QUEUED, Status.UNKNOWN)), "a client that cannot be used is left alone for a while"
    assert not desk.send()


def test_a_client_that_is_not_there(data: DataFolder) -> None:
    desk = Desk(data, f"http://127.0.0.1:{free_port()}")
    job = desk.upload()
    assert not desk.send(), "nothing is sent to whom was never heard"
    desk.link.heard()
    assert desk.send()
    assert (desk[job].status, desk[job].client) == (Status.QUEUED, None)
    assert "connection refused" in desk.reasons(job)
    desk.store.close()


def test_a_lost_answer_is_asked_for_under_the_same_key(desk: Desk, peer: Peer) -> None:
    """And before anything else goes to this client."""
    job, other = desk.upload(), desk.upload()
    peer.says["/submit"] = [b"", reply(200, {"id": 7}), reply(200, {"id": 8})]
    desk.link.heard()
    desk.send()
    assert not desk.send()
    desk.clock.pass_s(2)
    assert desk.send()
    assert (desk[job].status, desk[job].dest_id, desk[other].status) == (Status.SUBMITTED, "7", Status.QUEUED)
    keys = [(asked.headers["X-Joborch-Uuid"], asked.headers["X-Joborch-Attempt"]) for asked in peer.asked]
    assert keys == [(job.uuid, "1")] * 2


def test_a_lost_answer_is_asked_for_at_once_when_the_client_is_back(desk: Desk, peer: Peer) -> None:
    """Not two minutes later: `what is due again is tried at once when its peer is heard of`."""
    job = desk.upload()
    peer.says["/submit"] = [b"", reply(503), reply(200, {"id": 7})]
    desk.link.heard()
    desk.send()
    desk.clock.pass_s(2)
    desk.send()
    assert desk[job].status is Status.UNKNOWN, "it may have it from the first time: it stays pinned"
    desk.clock.pass_s(40)
    desk.link.heard()
    assert desk.send()
    assert desk[job].status is Status.SUBMITTED


@pytest.mark.parametrize("said", [b"", reply(500), reply(200, b"<html>")])
def test_a_22_client_is_never_sent_an_attempt_twice(said: bytes, desk22: Desk, peer: Peer) -> None:
    """It knows no keys: a lost answer costs the attempt."""
    job = desk22.upload(retries=1)
    peer.says["/in"] = [said]
    for attempt in (1, 2):
        desk22.clock.pass_s(60)
        watch_tick(desk22.server)
        desk22.link.heard()
        assert desk22.send()
        assert len(peer.asked) == attempt
    assert (desk22[job].status, desk22[job].attempt, desk22[job].cause) == (Status.FAILED, 2, "infrastructure")
    assert [asked.headers["X-Joborch-Attempt"] for asked in peer.asked] == ["1", "2"]


def test_a_22_client_was_being_sent_a_job_when_the_server_died(desk22: Desk, peer: Peer) -> None:
    job = desk22.with_client(Status.PROCESSING)
    desk22.store.close()
    node = joborch.open_node(load_config("server", {"db_path": str(desk22.data.path / "server.db")}, desk22.environment))
    assert isinstance(node, Server)
    desk22.server, desk22.store = node, node.store
    peer.says["/in"] = [reply(200, {"id": 7})]
    desk22.link.heard()
    while desk22.send():
        pass
    assert desk22[job].attempt == 2
    assert "1" not in [asked.headers["X-Joborch-Attempt"] for asked in peer.asked]


def test_files_that_a_22_client_would_lose(desk22: Desk, peer: Peer) -> None:
    job = desk22.upload()
    for name in ("a", "b"):
        (desk22.data.job(job.uuid) / name).mkdir()
        (desk22.data.job(job.uuid) / name / "same").write_bytes(b"")
    desk22.link.heard()
    desk22.send()
    assert (desk22[job].status, desk22[job].cause) == (Status.INVALID, "user")
    assert "same" in desk22[job].reason
    assert peer.asked == []


def test_a_22_client_that_numbers_from_1_again(desk22: Desk, peer: Peer) -> None:
    """What it had under this number or a later one is lost."""
    old = [desk22.with_client(Status.RUNNING, user_id=number) for number in (1, 2)]
    desk22.store.move(desk22[old[0]], Status.UNKNOWN, "", dest_id="3")
    job = desk22.upload(user_id=3)
    peer.says["/in"] = [reply(200, {"id": 5})]
    desk22.send()
    assert (desk22[job].status, desk22[job].dest_id) == (Status.SUBMITTED, "5")
    assert [(desk22[each].status, desk22[each].attempt) for each in old] == [(Status.UNKNOWN, 1), (Status.QUEUED, 2)]


def test_the_files_of_a_job_were_removed_by_hand(desk: Desk, peer: Peer) -> None:
    """That is no fault of the user, and the reason says where they are missing."""
    job = desk.upload()
    joborch.remove_tree(desk.data.job(job.uuid))
    peer.says["/submit"] = [reply(400, {"message": "there is no file: send at least run.sh"})]
    desk.link.heard()
    desk.send()
    assert (desk[job].status, desk[job].cause) == (Status.FAILED, "infrastructure")
    assert "server" in desk[job].reason


def test_a_job_that_shall_end_is_not_queued_again(desk: Desk, peer: Peer) -> None:
    job = desk.upload()

    def refuse(_: Asked) -> bytes:
        desk.store.request_kill(job.id, Cause.CANCELLED)
        return reply(503)

    peer.says["/submit"] = [refuse]
    desk.link.heard()
    desk.send()
    assert (desk[job].status, desk[job].cause) == (Status.KILLED, "cancelled")


def test_a_full_service_does_not_hold_up_another_at_the_same_client(peer: Peer, data: DataFolder) -> None:
    desk = Desk(data, peer.url, SERVICE_B_CLIENTS=peer.url, SERVICE_B_TOKEN="a-token", SERVICE_EXAMPLE_MAX_RUNS="1")
    jobs = [desk.upload(user_id=1), desk.upload(user_id=2), desk.upload(user_id=3, service="b")]
    peer.says["/submit"] = [reply(200, {"id": 7})]
    desk.link.heard()
    desk.link.slots = 4
    for _ in range(4):
        desk.send()
    assert [desk[job].status for job in jobs] == [Status.SUBMITTED, Status.QUEUED, Status.SUBMITTED]
    desk.store.close()


def test_no_more_is_sent_than_there_is_room_for(desk: Desk, peer: Peer) -> None:
    desk.restart(SERVICE_EXAMPLE_RUNS_PER_USER="99", SERVICE_EXAMPLE_MAX_RUNS="99")
    for _ in range(10):
        desk.upload()
    peer.says["/submit"] = [reply(200, {"id": 7})]
    peer.says["/events"] = [events()]
    get_tick(desk.server, desk.link)
    while desk.send():
        pass
    assert desk.store.number(statements.COUNT_IN, status="Submitted") == desk.link.slots == 2
    desk.store.write(lambda db: desk.store.set_pace(db, "example", Pace(5, 0.01)))
    desk.link.ended_at = desk.clock.monotonic()
    while desk.send():
        pass
    assert desk.store.number(statements.COUNT_IN, status="Submitted") == 8, "of short runs, some wait there for the next free slot"


@pytest.mark.parametrize("status", ["Completed", "Failed", "Cleaned"])
def test_a_slot_is_not_free_twice(status: str, desk: Desk, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as that of a payload that has ended, and again by its job's row: a wide job would be sent to where it must wait."""
    job = desk.with_client(Status.RUNNING, cpus=2)
    other = desk.with_client(Status.RUNNING)
    desk.link.slots = 3
    peer.says["/retrieve"] = [zip_reply(RESULT)]
    joborch.report(desk.server, desk.link, event(job, status=status))
    free, move_in = [desk.server.capacities_of([desk.link])[0].free], desk.store.move_in

    def move(*arguments: Any, **changes: Any) -> bool:
        moved = move_in(*arguments, **changes)
        desk.store.db.execute("COMMIT")
        free.append(desk.server.capacities_of([desk.link])[0].free)
        desk.store.db.execute("BEGIN")
        return moved

    monkeypatch.setattr(desk.store, "move_in", move)
    assert fetch_tick(desk.server, desk.link)
    assert free == [2, 2] and desk[job].status not in BUSY and desk[other].status in BUSY


# == Ends that come with the answer to a submit ==


@pytest.fixture
def short(desk: Desk) -> Desk:
    """A server whose service had short runs, and whose client was heard of."""
    desk.store.write(lambda db: desk.store.set_pace(db, "example", Pace(9, 0.005)))
    desk.link.heard()
    return desk


SHA256, ARCHIVE = hashlib.sha256(RESULT).hexdigest(), base64.b64encode(RESULT).decode()


def with_end(job: Job, **changes: Any) -> bytes:
    """What a client answers to the submit of a job whose payload has ended; `changes` of None leave a field out."""
    said = {**event(job, reason="fine", exit_code=0), "sha256": SHA256, "archive": ARCHIVE, **changes}
    return reply(200, {"id": 7, "status": "Completed", "end": {name: value for name, value in said.items() if value is not None}})


def moves_of(desk: Desk, job: Job) -> list[str]:
    """The states of a job, one after the other."""
    return [row["target"] for row in desk.store.read(statements.HISTORY_GET, id=job.id)]


@pytest.mark.parametrize(
    ("said", "status", "cause", "exit_code"),
    [({}, "Completed", None, 0), ({"status": "Failed", "cause": "user", "exit_code": 3}, "Failed", "user", 3)],
)
def test_an_end_that_comes_with_the_answer(
    said: dict[str, Any], status: str, cause: str | None, exit_code: int, short: Desk, peer: Peer
) -> None:
    """Two moves, two rows of history, one transaction; the client is asked for nothing more."""
    job = short.upload()
    peer.says["/submit"] = [with_end(job, **said)]
    assert short.send()
    ended = short[job]
    assert moves_of(short, job) == ["Queued", "Processing", "Submitted", status]
    assert (ended.status.value, ended.cause, ended.exit_code, ended.dest_id, ended.reason) == (status, cause, exit_code, "7", "fine")
    assert (ended.started_at, ended.result_sha256, ended.result_size) == (5.0, SHA256, len(RESULT))
    assert short.data.result(job.mark).read_bytes() == RESULT
    assert (short.link.confirmed_ids, short.link.reports(), short.link.sending) == (["7"], [], 0)
    assert [(asked.path, asked.headers.get("X-Joborch-Wait")) for asked in peer.asked] == [("/submit", "500")]
    assert short.quiet()


LIES: list[tuple[Any, str]] = [
    ({"uuid": "another"}, "another payload"),
    ({"attempt": 2}, "another payload"),
    ({"id": 8}, "another payload"),
    ({"status": "Running"}, "says Running"),
    ({"status": "Killed", "cause": "cancelled"}, "says Killed"),
    ({"status": "Failed", "cause": "infrastructure"}, "says Failed"),
    ({"status": "Fine"}, "not the description"),
    ({"sha256": "0" * 64}, "does not fit its digest"),
    ({"sha256": None}, "does not fit its digest"),
    ({"archive": None}, "is missing"),
    ({"archive": "A" * 300_000}, "is missing"),
    ({"archive": base64.b64encode(RESULT[:-1]).decode()}, "does not fit its digest"),
]


@pytest.mark.parametrize(("lie", "words"), LIES)
def test_an_end_that_lies_is_asked_again(
    lie: dict[str, Any], words: str, short: Desk, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """The job is Submitted as without it, the log says why, and what the client says when it is asked counts."""
    job = short.upload()
    peer.says["/submit"] = [with_end(job, **lie)]
    peer.says["/retrieve/7"] = [zip_reply(b"PK what it really was")]
    assert short.send()
    assert (short[job].status, short[job].dest_id) == (Status.SUBMITTED, "7")
    assert words in caplog.text
    assert fetch_tick(short.server, short.link)
    assert moves_of(short, job) == ["Queued", "Processing", "Submitted", "Completed"]
    assert short.data.result(job.mark).read_bytes() == b"PK what it really was"
    assert short.quiet()


@pytest.mark.parametrize("end", [[], "x", 7, True, {"end": {}}, {"status": 7}])
def test_an_end_that_is_none(end: Any, short: Desk, peer: Peer) -> None:
    job = short.upload()
    peer.says["/submit"] = [reply(200, {"id": 7, "end": end})]
    assert short.send()
    assert (short[job].status, [found.job_id for found in short.link.reports()]) == (Status.SUBMITTED, [job.id])


def test_an_end_that_was_not_asked_for_is_left_alone(desk: Desk, peer: Peer) -> None:
    """Nobody knows yet how long runs of this service take."""
    job = desk.upload()
    peer.says["/submit"] = [with_end(job)]
    desk.link.heard()
    assert desk.send()
    assert (desk[job].status, desk.link.reports(), "X-Joborch-Wait" in peer.asked[0].headers) == (Status.SUBMITTED, [], False)


def test_for_whom_a_client_waits(short: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where runs are short; not for what is to be killed or was sent before; and not for too many."""
    job = short.with_client(Status.PROCESSING)
    link = short.link
    assert joborch.end_wait_ms(short.server, link, changed(job, kill_requested_at=1.0)) == 0
    assert joborch.end_wait_ms(short.server, link, changed(job, status=Status.UNKNOWN)) == 0
    for number in range(joborch.END_WAITERS + 1):
        assert link.hold(number)
        waits = number < joborch.END_WAITERS
        assert (joborch.end_wait_ms(short.server, link, job._replace(id=number)), link.has_free_sender()) == (500 * waits, True)
    assert link.hold(98) and link.hold(99)
    assert not link.has_free_sender(), "three that do not wait are sending"
    link.release(0)
    assert (link.waiting, link.sending) == (joborch.END_WAITERS - 1, joborch.END_WAITERS + 2)
    for number in (*range(1, joborch.END_WAITERS + 1), 98, 99):
        link.release(number)
    assert (link.waiting, link.sending) == (0, 0)
    with monkeypatch.context() as patch:
        replace(patch, "END_WAITERS_IN_ALL", 0)
        assert joborch.end_wait_ms(short.server, link, job) == 0
    short.store.write(lambda db: short.store.set_pace(db, "example", Pace(9, 0.06)))
    assert joborch.end_wait_ms(short.server, link, job) == 0


def test_an_end_that_cannot_be_stored(short: Desk, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails when the result is brought to it: the job is Submitted, and its client is asked later."""
    job = short.upload()
    peer.says["/submit"] = [with_end(job)]
    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing(OSError(28, "No space left on device")))
        assert short.send()
    assert (short[job].status, short.quiet()) == (Status.SUBMITTED, True)
    assert fetch_tick(short.server, short.link)
    assert short[job].status is Status.COMPLETED


def test_a_commit_that_fails_when_an_end_came_with_the_answer(short: Desk, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the two moves is made; what was sent is sorted out, and the client asked."""
    job = short.upload()
    peer.says["/submit"] = [with_end(job)]
    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    with monkeypatch.context() as patch:
        patch.setattr(short.store, "tell_dependents", failing(joborch.StorageError("disk I/O error")))
        with pytest.raises(joborch.StorageError):
            short.send()
    assert moves_of(short, job) == ["Queued", "Processing"]
    watch_tick(short.server)
    assert short[job].status is Status.SUBMITTED
    assert fetch_tick(short.server, short.link)
    assert moves_of(short, job) == ["Queued", "Processing", "Submitted", "Completed"]


def failing(error: Exception) -> Callable[..., Any]:
    """A function that always fails."""

    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_poll_waits_less_after_ends_that_came_with_answers(short: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one confirms them, before the client would bring their results to its disk."""
    replace(monkeypatch, "EVENTS_WAIT_S", 10.0)
    assert joborch.poll_wait_s(short.server, short.link) == 10.0
    short.link.ended_at = short.clock.monotonic()
    assert joborch.poll_wait_s(short.server, short.link) == joborch.CONFIRM_WITHIN_S < joborch.SYNC_AFTER_S
    short.clock.pass_s(11)
    assert joborch.poll_wait_s(short.server, short.link) == 10.0
    short.link.confirmed_ids[:] = ["7"] * (joborch.DONE_AT_ONCE + 1)
    assert joborch.poll_wait_s(short.server, short.link) == 0.0


# == Hearing ==


@pytest.mark.parametrize("before", [Status.SUBMITTED, Status.RUNNING, Status.UNKNOWN])
@pytest.mark.parametrize(
    ("status", "after"), [("Prepared", Status.SUBMITTED), ("Running", Status.RUNNING), ("Completed", Status.COMPLETED)]
)
def test_jobs_go_on_by_what_events_say(before: Status, status: str, after: Status, desk: Desk, peer: Peer) -> None:
    job = desk.with_client(before)
    peer.says["/events"] = [events(event(job, status=status))]
    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    assert get_tick(desk.server, desk.link)
    fetch_tick(desk.server, desk.link)
    if (before, after) != (Status.RUNNING, Status.SUBMITTED):
        assert desk[job].status is after
        assert desk[job].started_at == (5.0 if status != "Prepared" or before is Status.RUNNING else None)
    assert (desk.link.since, desk.link.slots, desk.link.instance) == (9, 2, "i")
    moves = desk[job].moves
    get_tick(desk.server, desk.link)
    fetch_tick(desk.server, desk.link)
    assert desk[job].moves == moves, "the same news again changes nothing"


@pytest.mark.parametrize("before", [Status.PROCESSING, Status.UNKNOWN])
def test_an_event_may_overtake_the_answer_to_submit(before: Status, desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.PROCESSING)
    if before is Status.UNKNOWN:
        desk.store.move(job, before, "the answer is lost")
    peer.says["/events"] = [events(event(job, id=12, status="Running"))]
    get_tick(desk.server, desk.link)
    assert (desk[job].status, desk[job].dest_id) == (Status.RUNNING, "12")


def test_news_that_come_while_the_answer_is_being_lost(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender moves the job to Unknown between a look and a move: it must not become one that runs nowhere.

    Found by seed 22 of tests/chaos.py: such a job could never be moved again, and kept the news of all others from being heard.
    """
    job = desk.with_client(Status.PROCESSING)
    real = desk.store.job

    def stale(sql: str, **values: Any) -> Job | None:
        found = real(sql, **values)
        if found and found.status is Status.PROCESSING:
            desk.store.move(found, Status.UNKNOWN, "no answer")
        return found

    monkeypatch.setattr(desk.store, "job", stale)
    for _ in range(2):
        joborch.report(desk.server, desk.link, event(job, status="Running"))
        assert (desk[job].status, desk[job].dest_id) == (Status.RUNNING, "7")


def test_one_payload_that_cannot_be_taken_in_does_not_keep_the_others_waiting(
    desk: Desk, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = desk.with_client(Status.SUBMITTED), desk.with_client(Status.SUBMITTED, user_id=2)
    desk.store.move(good, Status.UNKNOWN, "", dest_id="8")
    real = desk.store.move
    monkeypatch.setattr(desk.store, "move", lambda job, *more, **changes: 1 / 0 if job.id == bad.id else real(job, *more, **changes))
    peer.says["/events"] = [events(event(bad, status="Running"), event(good, id=8, status="Running"))]
    with pytest.raises(ZeroDivisionError):
        get_tick(desk.server, desk.link)
    assert desk[good].status is Status.RUNNING
    assert desk.link.since == 0, "what could not be taken in is told again"


def test_events_of_others_are_passed_over(desk: Desk, peer: Peer) -> None:
    """Another server's payloads, and another client's: neither is moved, and only an attempt that was given up is ended."""
    job = desk.with_client(Status.RUNNING)
    before = desk[job]
    joborch.report(desk.server, desk.link, event(job, uuid="another"))
    joborch.report(desk.server, desk.link, event(job, attempt=2))
    assert peer.asked == []
    assert desk[job] == before
    assert not fetch_tick(desk.server, desk.link)


def test_an_attempt_that_was_given_up_and_comes_back_is_ended(desk: Desk, peer: Peer) -> None:
    """Also where the job has ended meanwhile: the fence stays."""
    job = desk.with_client(Status.RUNNING)
    joborch.new_attempt(desk.server, job, "it was silent")
    peer.says["/events"] = [events(event(job, id=12, status="Running"))]
    peer.says["/kill/12"] = [b"", reply(200)]
    get_tick(desk.server, desk.link)
    kill_tick(desk.server, desk.link)
    assert list(desk.link.superseded_attempts) == [job.mark], "no answer: it is asked again"
    desk.clock.pass_s(60)
    for _ in range(2):
        kill_tick(desk.server, desk.link)
    assert [(asked.path, asked.headers["X-Joborch-Mark"]) for asked in peer.asked[1:]] == [("/kill/12", job.mark)] * 2
    assert (desk[job].status, desk[job].attempt) == (Status.QUEUED, 2)


def test_a_result_of_an_attempt_that_was_given_up_is_not_taken(desk: Desk, peer: Peer) -> None:
    """Not even where it was being fetched meanwhile: the next attempt's is there already."""
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [lambda _: overtaken(desk, job)]
    joborch.report(desk.server, desk.link, event(job))
    fetch_tick(desk.server, desk.link)
    done = desk[job]
    assert (done.status, done.attempt, done.result_sha256) == (Status.COMPLETED, 2, "of the second")
    assert desk.data.result(done.mark).read_bytes() == b"of the second"


def overtaken(desk: Desk, job: Job) -> bytes:
    """The first attempt's result, on its way while the second one comes to its end."""
    joborch.new_attempt(desk.server, desk[job], "it was silent")
    desk.clock.pass_s(60)
    watch_tick(desk.server)
    assert desk.store.claim(job.id, desk.link.name, 100)
    assert desk.store.move(desk[job], Status.SUBMITTED, "", dest_id="8")
    desk.data.result(desk[job].mark).write_bytes(b"of the second")
    assert desk.store.move(desk[job], Status.COMPLETED, "", result_sha256="of the second")
    return zip_reply(RESULT, Repr_Digest=digest_of(RESULT))


RUBBISH: list[dict[str, Any]] = [
    {},
    {"uuid": 3},
    {"uuid": None, "status": "Running"},
    {"attempt": "x", "status": "Running"},
    {"attempt": None, "status": "Prepared"},
    {"id": None, "status": "Running"},
    {"status": "Dancing"},
    {"status": None},
    {"started_at": "x", "status": "Running"},
    {"started_at": "x"},
    {"exit_code": "x", "status": "Failed"},
    {"reason": 3, "status": "Failed"},
    {"reason": ["x"], "status": "Failed"},
    {"cause": {"a": 1}, "status": "Failed"},
]


@pytest.mark.parametrize("rubbish", RUBBISH, ids=str)
def test_rubbish_about_one_payload_stops_no_other(rubbish: dict[str, Any], desk: Desk, peer: Peer) -> None:
    """Neither what a client says of the next one, nor what it says next, nor what a caller asks about this one."""
    strange, plain = desk.with_client(Status.SUBMITTED), desk.with_client(Status.SUBMITTED, user_id=2)
    peer.says["/events"] = [events(event(strange, **rubbish), event(plain, status="Running"))]
    peer.says["/retrieve"] = [zip_reply(RESULT)]
    get_tick(desk.server, desk.link)
    get_tick(desk.server, desk.link)
    for _ in range(4):
        fetch_tick(desk.server, desk.link)
    assert desk[plain].status is Status.RUNNING
    joborch.job_json(desk.server, desk[strange])


@pytest.mark.parametrize("status", ["Dancing", "Queued", "Processing", "Submitted", "Unknown", "", 3])
def test_a_state_that_is_no_end_ends_nothing(status: Any, desk: Desk, peer: Peer) -> None:
    """It is not taken over, least of all Queued: the payload may run. A caller learns what the client says."""
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve_partial/7"] = [zip_reply(RESULT)]
    for _ in range(3):
        joborch.report(desk.server, desk.link, event(job, status=status))
        fetch_tick(desk.server, desk.link)
        desk.clock.pass_s(60)
    assert desk[job].status in (Status.RUNNING, Status.UNKNOWN)
    assert desk[job].status is Status.RUNNING or str(status) in desk[job].reason
    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    desk.settle(job)
    assert desk[job].status is Status.COMPLETED


def test_a_client_that_began_anew_is_asked_for_all(desk: Desk, peer: Peer) -> None:
    """Its numbers begin again; what it has lost gets a new attempt."""
    lost = desk.with_client(Status.RUNNING)
    kept = desk.with_client(Status.RUNNING, user_id=2)
    desk.link.instance, desk.link.since = "before", 1000
    peer.says["/events"] = [events(event(kept, status="Running"))]
    for _ in range(2):
        get_tick(desk.server, desk.link)
    assert [re.sub(r"&wait=.*", "", asked.path) for asked in peer.asked] == [
        "/events?since=1000&instance=before",
        "/events?since=0&instance=i",
    ]
    while fetch_tick(desk.server, desk.link):
        pass
    assert (desk[lost].status, desk[lost].attempt) == (Status.QUEUED, 2)
    assert desk[kept].status is Status.RUNNING


def test_a_restarted_server_asks_for_what_it_is_not_told_of(desk: Desk, peer: Peer) -> None:
    """The client tells of what was not fetched; an attempt that it does not name may have ended and been fetched."""
    job = desk.with_client(Status.SUBMITTED)
    desk.restart()
    peer.says["/events"] = [events()]
    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    get_tick(desk.server, desk.link)
    fetch_tick(desk.server, desk.link)
    assert desk[job].status is Status.COMPLETED
    assert peer.asked[-1].headers["X-Joborch-Mark"] == job.mark


@pytest.mark.parametrize("said", [b"", reply(500), reply(200, b"<html>"), events(next="x"), events(3), events()[:-4]])
def test_a_client_that_answers_nothing_of_use_is_held_back_and_tried_again(said: bytes, desk: Desk, peer: Peer) -> None:
    peer.says["/events"] = [said, events()]
    get_tick(desk.server, desk.link)
    assert desk.link.held() and desk.link.outage.reason
    assert not get_tick(desk.server, desk.link)
    assert len(peer.asked) == 1, "not before its time"
    desk.clock.pass_s(2)
    get_tick(desk.server, desk.link)
    assert not desk.link.held()
    assert peer.asked[1].path.startswith("/events?since=0"), "when it is back it tells all it has"


def test_a_client_that_failed_is_asked_without_waiting_for_news(desk: Desk, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it answers is known at once, not at its next news."""
    replace(monkeypatch, "EVENTS_WAIT_S", 9.0)
    desk.link.heard()
    desk.link.instance, desk.link.since = "i", 9
    peer.says["/events"] = [events(next=9)]
    desk.link.failed("a submit failed")
    desk.clock.pass_s(2)
    assert joborch.may_be_asked(desk.link)
    for _ in range(2):
        get_tick(desk.server, desk.link)
    assert [asked.path.partition("&wait=")[2].partition("&")[0] for asked in peer.asked] == ["0", "9"]


def test_a_client_is_probed_only_if_its_poll_does_not_ask(desk: Desk, peer: Peer) -> None:
    """A poll from before a failure may wait for news; one from after it tells by itself whether the client answers."""
    peer.says["/events"] = [events()]
    desk.link.heard()
    desk.link.failed("a submit failed")
    for asked_at, probes in ((float("inf"), 0), (desk.link.failed_at + 1, 0), (desk.link.failed_at - 1, 1)):
        desk.clock.pass_s(3)
        desk.link.asked_at = asked_at
        joborch.send_tick(desk.server, desk.link)
        assert len(peer.asked) == probes
    assert desk.link.answers


def test_only_a_client_that_answers_is_asked_for_results(desk: Desk, peer: Peer) -> None:
    """What came with the news is stored meanwhile."""
    jobs = [desk.with_client(Status.RUNNING, user_id=number) for number in (1, 2)]
    small = {"archive": base64.b64encode(RESULT).decode(), "sha256": hashlib.sha256(RESULT).hexdigest()}
    joborch.report(desk.server, desk.link, event(jobs[0], status="Completed"))
    joborch.report(desk.server, desk.link, event(jobs[1], status="Completed", **small))
    desk.link.failed("a submit failed")
    desk.clock.pass_s(60)
    assert fetch_tick(desk.server, desk.link)
    assert not fetch_tick(desk.server, desk.link)
    assert [desk[job].status for job in jobs] == [Status.RUNNING, Status.COMPLETED]
    assert not peer.asked
    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    desk.link.heard()
    assert fetch_tick(desk.server, desk.link)
    assert desk[jobs[0]].status is Status.COMPLETED


def test_a_client_in_trouble_is_sent_one_job_at_a_time(desk: Desk) -> None:
    """Also of those that lost answers tie to it: a client that hangs takes one thread for them, not three."""
    jobs = [desk.with_client(Status.PROCESSING, user_id=number) for number in range(3)]
    for job in jobs:
        assert desk.store.move(job, Status.UNKNOWN, "its answer was lost")
    desk.link.failed("a submit failed")
    desk.clock.pass_s(60)
    first = joborch.next_to_send(desk.server, desk.link)
    assert first is not None
    assert joborch.next_to_send(desk.server, desk.link) is None
    desk.link.release(first.id)
    desk.link.took_one()
    assert joborch.next_to_send(desk.server, desk.link) is not None
    assert joborch.next_to_send(desk.server, desk.link) is not None


def test_only_clients_that_are_silent_share_their_few_threads(desk: Desk) -> None:
    """A client is silent that has never answered, or has failed twice: one lost answer makes nobody wait in line."""
    desk.server.loops = joborch.make_server_loops(desk.server)
    link, loops = desk.link, desk.server.loops

    def silent() -> set[str]:
        return {name.partition(":")[0] for name, loop in loops.items() if loop.pool() is desk.server.silent_pool}

    calling = {"get", "send", "fetch", "kill"}
    assert silent() == calling
    link.heard()
    assert silent() == set()
    link.failed("no answer")
    assert silent() == set()
    desk.clock.pass_s(60)
    link.failed("no answer")
    assert silent() == calling
    link.heard()
    assert silent() == set()


def test_a_request_to_kill_is_looked_after_until_it_is_carried_out(desk: Desk, peer: Peer) -> None:
    """No tick runs where nothing is to be killed, and none is forgotten that failed."""
    job = desk.with_client(Status.RUNNING)
    kill_tick(desk.server, desk.link)
    assert not joborch.may_kill(desk.server, desk.link)
    desk.store.request_kill(job.id, Cause.CANCELLED)
    watch_tick(desk.server)
    assert joborch.may_kill(desk.server, desk.link)
    peer.says["/kill/7"] = [b""]
    kill_tick(desk.server, desk.link)
    assert not joborch.may_kill(desk.server, desk.link), "it is held back"
    desk.clock.pass_s(60)
    assert joborch.may_kill(desk.server, desk.link)


def test_nothing_is_watched_while_nothing_can_happen(desk: Desk) -> None:
    """The timer then wakes no thread. What `watch_tick` looks after is never overlooked."""
    watch_tick(desk.server)
    assert not joborch.needs_watch(desk.server)
    desk.link.failed(OSError("refused"))
    assert joborch.needs_watch(desk.server), "its client fails"
    desk.link.heard()
    assert not joborch.needs_watch(desk.server)
    job = desk.with_client(Status.RUNNING)
    assert joborch.needs_watch(desk.server), "a job is at a client"
    joborch.new_attempt(desk.server, job, "it was lost")
    watch_tick(desk.server)
    assert joborch.needs_watch(desk.server), "its next attempt is delayed"
    desk.clock.pass_s(600)
    watch_tick(desk.server)
    watch_tick(desk.server)
    assert not desk.store.has_delayed
    desk.server.links.clear()
    assert joborch.needs_watch(desk.server), "a service has no client"


def test_a_job_does_not_stay_unknown_when_its_client_is_back(desk: Desk, peer: Peer) -> None:
    """Also where nothing has changed for the payload meanwhile."""
    job = desk.with_client(Status.RUNNING)
    desk.link.instance, desk.link.since = "i", 9
    peer.says["/events"] = [b"", events(event(job, status="Running"))]
    get_tick(desk.server, desk.link)
    desk.clock.pass_s(16)
    watch_tick(desk.server)
    assert desk[job].status is Status.UNKNOWN
    get_tick(desk.server, desk.link)
    assert desk[job].status is Status.RUNNING
    assert "since=0" in peer.asked[-1].path, "all is asked for, not only what has changed"


def test_without_events_a_client_is_polled(desk: Desk, peer: Peer) -> None:
    desk.restart(SERVICE_EXAMPLE_PEER="2.2")
    peer.says["/hello"] = [reply(404)]
    assert get_tick(desk.server, desk.link)
    assert not desk.link.protocol.has_events
    assert not get_tick(desk.server, desk.link)
    assert [asked.path for asked in peer.asked][1:] == ["/"]
    assert not desk.link.held()


def test_a_22_client_is_polled_gently(desk22: Desk, peer: Peer) -> None:
    """At most five times a second and job at first, less and less often then; and while nothing is with it, seldom."""
    job = desk22.with_client(Status.SUBMITTED)
    peer.says["/out/7"] = [reply(200, {"status": "Running"})]
    times = list[float]()
    for _ in range(1200):
        asked = len(peer.asked)
        get_tick(desk22.server, desk22.link)
        times += [desk22.clock.now] * (len(peer.asked) - asked)
        desk22.clock.pass_s(0.05)
    pauses = [later - earlier for earlier, later in zip(times, times[1:])]
    assert desk22[job].status is Status.RUNNING
    assert min(pauses) >= 0.19 and sorted(pauses[:8]) == pauses[:8]
    assert 4.9 <= max(pauses) <= 5.2
    peer.says["/out/7"] = [zip_reply(RESULT)]
    for _ in range(200):
        get_tick(desk22.server, desk22.link)
        desk22.clock.pass_s(0.05)
    fetch_tick(desk22.server, desk22.link)
    assert desk22[job].status is Status.COMPLETED
    asked = len(peer.asked)
    for _ in range(100):
        desk22.clock.pass_s(0.5)
        get_tick(desk22.server, desk22.link)
    assert {each.path for each in peer.asked[asked:]} == {"/"}
    assert len(peer.asked) - asked <= 6


@pytest.mark.parametrize(
    "said",
    [reply(200, {"id": 7}), reply(200, {"status": "Dancing"}), reply(200, [1]), reply(200, {"status": "Running"})[:-3], reply(500), b""],
)
def test_rubbish_of_a_22_client_is_asked_again(said: bytes, desk22: Desk, peer: Peer) -> None:
    job = desk22.with_client(Status.SUBMITTED)
    peer.says["/out/7"] = [said, zip_reply(RESULT)]
    for _ in range(4):
        get_tick(desk22.server, desk22.link)
        fetch_tick(desk22.server, desk22.link)
        desk22.clock.pass_s(60)
    assert desk22[job].status is Status.COMPLETED


@pytest.mark.parametrize("said", [reply(200, {"id": 7, "status": "Unknown"}), reply(200, b"<html>"), reply(500)])
def test_rubbish_about_one_payload_of_a_22_client_stops_no_other(said: bytes, desk22: Desk, peer: Peer) -> None:
    """The next ones are asked for all the same."""
    strange, plain = desk22.with_client(Status.SUBMITTED), desk22.with_client(Status.SUBMITTED, user_id=2)
    desk22.store.move(plain, Status.RUNNING, "", dest_id="8")
    peer.says["/out/7"] = [said]
    peer.says["/out/8"] = [zip_reply(RESULT)]
    for _ in range(6):
        get_tick(desk22.server, desk22.link)
        fetch_tick(desk22.server, desk22.link)
        desk22.clock.pass_s(40)
    assert desk22[plain].status is Status.COMPLETED
    assert desk22[strange].status not in joborch.OVER


# == Fetching ==


def test_a_result_is_stored_with_its_digest(desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.SUBMITTED)
    peer.says["/retrieve/7"] = [zip_reply(RESULT, Repr_Digest=digest_of(RESULT))]
    done = desk.settle(job, reason="run.sh ended with exit status 0", exit_code=0)
    assert (done.status, done.exit_code, done.cause, done.started_at) == (Status.COMPLETED, 0, None, 5.0)
    assert (done.result_size, done.result_sha256) == (len(RESULT), hashlib.sha256(RESULT).hexdigest())
    assert desk.data.result(job.mark).read_bytes() == RESULT
    assert desk.link.reports() == []
    assert desk.quiet()


INLINE = {"archive": base64.b64encode(RESULT).decode(), "sha256": hashlib.sha256(RESULT).hexdigest()}


@pytest.mark.parametrize("status", ["Completed", "Failed"])
def test_a_small_result_comes_with_the_news(status: str, desk: Desk, peer: Peer) -> None:
    """And needs no further call."""
    job = desk.with_client(Status.RUNNING)
    done = desk.settle(job, status=status, **INLINE)
    assert (done.status.value, done.result_size, done.result_sha256) == (status, len(RESULT), INLINE["sha256"])
    assert desk.data.result(job.mark).read_bytes() == RESULT
    assert peer.asked == []
    assert desk.quiet()


@pytest.mark.parametrize(
    "damage",
    [
        {"archive": "%%%"},
        {"archive": "abc"},
        {"archive": 3},
        {"archive": None},
        {"archive": ""},
        {"sha256": "0" * 64},
        {"sha256": None},
        {"sha256": 3},
    ],
    ids=str,
)
def test_a_small_result_that_came_damaged_is_fetched(damage: dict[str, Any], desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [zip_reply(b"PK fetched", Repr_Digest=digest_of(b"PK fetched"))]
    done = desk.settle(job, **{**INLINE, **damage})
    assert done.status is Status.COMPLETED
    assert desk.data.result(job.mark).read_bytes() == b"PK fetched"
    assert hashlib.sha256(b"PK fetched").hexdigest() == done.result_sha256


def confirmed(desk: Desk, peer: Peer) -> str:
    """The payloads of which the next call to /events says that their results are safe here."""
    peer.says["/events"] = [events()]
    get_tick(desk.server, desk.link)
    found = re.search(r"done=([0-9,]*)", peer.asked[-1].path)
    return found[1] if found else ""


def test_a_result_that_is_safe_is_confirmed_until_the_client_has_heard_it(desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    desk.settle(job)
    peer.says["/events"] = [b""]
    get_tick(desk.server, desk.link)
    assert "done=7" in peer.asked[-1].path
    desk.clock.pass_s(60)
    assert confirmed(desk, peer) == "7"
    assert confirmed(desk, peer) == ""


def test_nothing_is_confirmed_that_is_not_safe_here(desk: Desk, peer: Peer) -> None:
    """Neither a payload that runs after all, nor, by its number there, one of another client."""
    running = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [reply(200, {"status": "Running"})]
    desk.link.of(running.id).end = joborch.EndReport(running.id, {"status": "?"}, 0.0)
    fetch_tick(desk.server, desk.link)
    assert desk[running].status is Status.RUNNING
    assert confirmed(desk, peer) == ""
    moved_on = desk.with_client(Status.RUNNING, user_id=2)
    desk.link.of(moved_on.id).end = joborch.EndReport(moved_on.id, event(moved_on), 0.0)
    joborch.new_attempt(desk.server, desk[moved_on], "it was silent")
    desk.clock.pass_s(60)
    desk.store.admit_due()
    assert desk.store.claim(moved_on.id, "elsewhere:9000", 9)
    desk.store.move(desk[moved_on], Status.SUBMITTED, "", dest_id="5")
    fetch_tick(desk.server, desk.link)
    assert confirmed(desk, peer) == ""


@pytest.mark.parametrize(
    ("payload", "status", "cause"),
    [
        ({"status": "Failed", "cause": "user", "exit_code": 3, "reason": "exit 3"}, Status.FAILED, "user"),
        ({"status": "Failed", "cause": "limit", "reason": "at its time limit"}, Status.FAILED, "limit"),
        ({"status": "Failed", "cause": None}, Status.FAILED, "user"),
        ({"status": "Invalid", "cause": "user", "reason": "there is no run.sh"}, Status.INVALID, "user"),
        ({"status": "Killed", "cause": "cancelled"}, Status.KILLED, "cancelled"),
        ({"status": "Killed", "cause": None}, Status.KILLED, "cancelled"),
        ({"status": "Failed", "cause": "infrastructure", "reason": "reboot"}, Status.QUEUED, None),
        ({"status": "Cleaned"}, Status.QUEUED, None),
    ],
)
@pytest.mark.parametrize("partial", [zip_reply(RESULT), reply(404)])
def test_how_a_payload_ended_is_how_its_job_ends(
    payload: dict[str, Any], status: Status, cause: str | None, partial: bytes, desk: Desk, peer: Peer
) -> None:
    """With what it left, as far as that can be had."""
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve_partial/7"] = [partial]
    ended = desk.settle(job, **payload)
    assert (ended.status, ended.cause, ended.exit_code) == (status, cause, payload.get("exit_code"))
    assert payload.get("reason") or ended.reason
    assert payload.get("reason", "") in ended.reason
    if status is Status.QUEUED:
        assert (ended.attempt, ended.client, ended.dest_id) == (2, None, None)
        assert ended.not_before and 0.5 <= ended.not_before - desk.clock.wall() <= 2
    else:
        assert ended.result_size == (len(RESULT) if partial != reply(404) else None)
        assert desk.data.result(job.mark).exists() == (partial != reply(404))


def test_attempts_come_to_an_end(desk: Desk, peer: Peer) -> None:
    """Retries + 1 of them, each with a longer pause before it; the last failure is the job's."""
    job = desk.with_client(Status.RUNNING, retries=2)
    pauses = []
    for attempt in (1, 2):
        again = desk.settle(desk[job], status="Failed", cause="infrastructure", reason="reboot")
        assert (again.status, again.attempt) == (Status.QUEUED, attempt + 1)
        pauses.append((again.not_before or 0) - desk.clock.wall())
        assert not heads(desk.store, "example"), "not before its time"
        desk.clock.pass_s(60)
        watch_tick(desk.server)
        assert desk.store.claim(job.id, desk.link.name, 9)
        desk.store.move(desk[job], Status.SUBMITTED, "", dest_id="7")
    ended = desk.settle(desk[job], status="Failed", cause="infrastructure", reason="reboot")
    assert (ended.status, ended.attempt, ended.cause) == (Status.FAILED, 3, "infrastructure")
    assert pauses[0] < pauses[1]
    assert [row["attempt"] for row in desk.store.read(statements.ATTEMPTS_GET, id=job.id)] == [1, 2]


@pytest.mark.parametrize("wish", [False, True])
@pytest.mark.parametrize("status", ["Completed", "?"])
def test_a_payload_that_its_client_does_not_know(status: str, wish: bool, desk: Desk, peer: Peer) -> None:
    """A new attempt; but what shall end has ended."""
    job = desk.with_client(Status.RUNNING)
    if wish:
        desk.store.request_kill(job.id, Cause.CANCELLED)
    desk.link.of(job.id).end = joborch.EndReport(job.id, {"status": status}, 0.0)
    fetch_tick(desk.server, desk.link)
    assert desk[job].status is (Status.KILLED if wish else Status.QUEUED)
    assert desk.link.reports() == []


BROKEN = [
    b"",
    reply(500),
    zip_reply(RESULT)[:-1],
    zip_reply(RESULT, Repr_Digest=digest_of(b"other")),
    zip_reply(RESULT, Repr_Digest="sha-256=:abc:"),
    reply(200, {"status": "Running"}),
]


@pytest.mark.parametrize("said", BROKEN)
def test_a_transfer_that_broke_is_repeated(said: bytes, desk: Desk, peer: Peer) -> None:
    """The job is Unknown for a while, and says why; then it is Completed after all."""
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [said, said, zip_reply(RESULT, Repr_Digest=digest_of(RESULT))]
    unknown = desk.settle(job)
    assert unknown.status is Status.UNKNOWN
    assert desk.link.name in unknown.reason
    assert not fetch_tick(desk.server, desk.link), "not before its time"
    desk.clock.pass_s(2)
    assert fetch_tick(desk.server, desk.link)
    assert desk[job].status is Status.UNKNOWN
    assert desk.quiet()
    desk.clock.pass_s(3)
    assert fetch_tick(desk.server, desk.link)
    assert desk[job].status is Status.COMPLETED
    assert desk.data.result(job.mark).read_bytes() == RESULT


def test_a_result_that_cannot_be_stored_is_fetched_again(desk: Desk, peer: Peer) -> None:
    """A disk that is full, a folder that was removed by hand: the job waits, says so, and goes on when that is over."""
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    desk.data.results.rename(desk.data.path / "away")
    unknown = desk.settle(job)
    assert unknown.status is Status.UNKNOWN
    assert "could not be stored" in unknown.reason
    assert desk.quiet()
    (desk.data.path / "away").rename(desk.data.results)
    desk.clock.pass_s(2)
    fetch_tick(desk.server, desk.link)
    assert desk[job].status is Status.COMPLETED


@pytest.mark.parametrize(("status", "path"), [("Completed", "/retrieve/7"), ("Failed", "/retrieve_partial/7")])
def test_a_job_that_became_unknown_while_its_result_was_fetched(status: str, path: str, desk: Desk, peer: Peer) -> None:
    """Nobody reports the end a second time: it must not be forgotten."""
    job = desk.with_client(Status.RUNNING)

    def slowly(_: Asked) -> bytes:
        desk.store.move(desk[job], Status.UNKNOWN, "the client was silent meanwhile")
        return zip_reply(RESULT)

    peer.says[path] = [slowly, zip_reply(RESULT)]
    desk.settle(job, status=status, cause="user" if status == "Failed" else None)
    desk.clock.pass_s(60)
    fetch_tick(desk.server, desk.link)
    assert desk[job].status.value == status


def test_a_result_that_is_reported_twice_is_the_one_of_its_digest(desk: Desk, peer: Peer) -> None:
    """The client packs anew each time, with other bytes: file and row must be of the same transfer."""
    job = desk.with_client(Status.RUNNING)

    def again(_: Asked) -> bytes:
        peer.says["/retrieve/7"] = [zip_reply(b"PK second")]
        joborch.report(desk.server, desk.link, event(desk[job]))  # a reconnect tells all once more
        other = threading.Thread(target=fetch_tick, args=(desk.server, desk.link))
        other.start()
        other.join(20)
        return zip_reply(b"PK first")

    peer.says["/retrieve/7"] = [again]
    done = desk.settle(job)
    while fetch_tick(desk.server, desk.link):
        pass
    assert done.status is Status.COMPLETED
    assert hashlib.sha256(desk.data.result(job.mark).read_bytes()).hexdigest() == desk[job].result_sha256


def test_news_that_come_while_an_end_is_settled_are_not_lost(desk: Desk, peer: Peer) -> None:
    """The attempt failed, the next one is sent and ends, all while the first sender is at the end of its tick."""
    job = desk.with_client(Status.RUNNING)
    real = desk.store.move

    def move_and_be_overtaken(moved: Job, to: Status, *rest: Any, **changes: Any) -> bool:
        done = real(moved, to, *rest, **changes)
        if to is Status.QUEUED:
            desk.clock.pass_s(60)
            desk.store.admit_due()
            assert desk.store.claim(job.id, desk.link.name, 9)
            real(desk[job], Status.SUBMITTED, "", dest_id="8")
            joborch.report(desk.server, desk.link, event(desk[job]))
        return done

    peer.says["/retrieve/8"] = [zip_reply(RESULT)]
    desk.store.move = move_and_be_overtaken  # type: ignore[method-assign]
    desk.settle(job, status="Failed", cause="infrastructure")
    desk.clock.pass_s(60)
    fetch_tick(desk.server, desk.link)
    assert (desk[job].status, desk[job].attempt) == (Status.COMPLETED, 2)


def test_each_lane_takes_another_end(desk: Desk, peer: Peer) -> None:
    """While one is fetched, the next is; none is fetched twice."""
    jobs = [desk.with_client(Status.RUNNING, user_id=number) for number in range(3)]
    both = threading.Barrier(2)

    def wait_for_the_other(_: Asked) -> bytes:
        both.wait(20)
        return zip_reply(RESULT)

    peer.says["/retrieve/7"] = [wait_for_the_other, wait_for_the_other, zip_reply(RESULT)]
    for job in jobs:
        joborch.report(desk.server, desk.link, event(job))
    senders = [threading.Thread(target=fetch_tick, args=(desk.server, desk.link)) for _ in range(2)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(30)
    assert fetch_tick(desk.server, desk.link)
    assert not fetch_tick(desk.server, desk.link)
    assert {desk[job].status for job in jobs} == {Status.COMPLETED}
    assert len(peer.asked) == 3


# == Ending ==


@pytest.mark.parametrize(("said", "held"), [(reply(200), False), (reply(202), False), (reply(500), True), (b"", True)])
def test_a_wish_is_passed_on_until_the_end_is_told(said: bytes, held: bool, desk: Desk, peer: Peer) -> None:
    """Killed is only what the client says is over; asked again every two seconds at most, and not while it is held back."""
    job, other = desk.with_client(Status.RUNNING), desk.with_client(Status.RUNNING, user_id=2)
    peer.says["/kill/7"] = [said]
    desk.store.request_kill(job.id, Cause.CANCELLED)
    for _ in range(5):
        kill_tick(desk.server, desk.link)
    assert [asked.path for asked in peer.asked] == ["/kill/7"]
    assert (desk[job].status, desk[other].status, desk.link.held()) == (Status.RUNNING, Status.RUNNING, held)
    desk.clock.pass_s(3)
    kill_tick(desk.server, desk.link)
    assert len(peer.asked) == 2
    peer.says["/retrieve_partial/7"] = [zip_reply(RESULT)]
    assert desk.settle(job, status="Killed", cause="cancelled").status is Status.KILLED


def test_wishes_do_not_press_a_client_that_is_held_back(desk: Desk, peer: Peer) -> None:
    """Else each of many wishes makes the pause longer."""
    jobs = [desk.with_client(Status.RUNNING, user_id=number) for number in range(4)]
    for job in jobs:
        desk.store.request_kill(job.id, Cause.CANCELLED)
    peer.says["/kill"] = [b""]
    for _ in range(4):
        kill_tick(desk.server, desk.link)
    assert desk.link.outage.failures == len(peer.asked) == 1


def test_a_client_that_does_not_know_what_shall_end(desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.RUNNING)
    desk.store.request_kill(job.id, Cause.CANCELLED)
    kill_tick(desk.server, desk.link)
    assert (desk[job].status, desk[job].cause) == (Status.KILLED, "cancelled")


# == Watching ==


def silence(desk: Desk, seconds: float) -> None:
    """Have the client not answer for so long."""
    desk.link.failed("cannot be reached")
    desk.clock.pass_s(seconds)
    watch_tick(desk.server)


@pytest.mark.parametrize("before", BUSY)
def test_jobs_of_a_silent_client(before: Status, desk: Desk) -> None:
    """Unknown after a short while; a new attempt after LOST_AFTER; Failed where none is left."""
    jobs = [desk.with_client(before, retries=retries, user_id=retries) for retries in (0, 1)]
    assert all(desk.link.hold(job.id) for job in jobs if before is Status.PROCESSING)
    silence(desk, 10)
    assert {desk[job].status for job in jobs} == {before}
    silence(desk, 6)
    assert {desk[job].status for job in jobs} == {before if before is Status.PROCESSING else Status.UNKNOWN}
    silence(desk, 3000)
    assert {desk[job].status for job in jobs} <= {before, Status.UNKNOWN}
    silence(desk, 600)
    assert [desk[job].status for job in jobs] == [Status.FAILED, Status.QUEUED]
    assert (desk[jobs[0]].cause, desk[jobs[1]].attempt, desk[jobs[1]].client) == ("infrastructure", 2, None)
    assert all(desk.link.name in desk[job].reason and "cannot be reached" in desk[job].reason for job in jobs)


def test_a_silent_client_and_a_wish(desk: Desk) -> None:
    """Never Killed while it may run; Failed at last, so that no quota is held for ever."""
    job = desk.with_client(Status.RUNNING)
    desk.store.request_kill(job.id, Cause.CANCELLED)
    silence(desk, 3000)
    assert desk[job].status is Status.UNKNOWN
    silence(desk, 700)
    assert (desk[job].status, desk[job].cause) == (Status.FAILED, "infrastructure")
    assert "terminate was requested" in desk[job].reason


def test_a_client_that_answers_is_not_silent(desk: Desk) -> None:
    """However long nothing was to be heard: a server that was asleep, a clock that jumped."""
    job = desk.with_client(Status.RUNNING)
    desk.clock.pass_s(1_000_000)
    watch_tick(desk.server)
    assert desk[job].status is Status.RUNNING


def test_jobs_that_no_client_answers_for(desk: Desk) -> None:
    """They wait for UNREACHABLE_AFTER, and as long as they have waited themselves."""
    old = desk.upload()
    desk.link.failed("cannot be reached")
    desk.clock.pass_s(80_000)
    young = desk.upload()
    silence(desk, 6000)
    assert (desk[old].status, desk[old].cause) == (Status.QUEUED, None)
    silence(desk, 600)
    assert [desk[job].status for job in (old, young)] == [Status.FAILED, Status.QUEUED]
    assert (desk[old].cause, "client unreachable" in desk[old].reason) == ("infrastructure", True)


def test_one_client_that_answers_is_enough(peer: Peer, data: DataFolder) -> None:
    desk = Desk(data, f"{peer.url}, http://127.0.0.1:1")
    job = desk.upload()
    for link in desk.server.links.values():
        link.failed("cannot be reached")
    desk.clock.pass_s(90_000)
    first = next(iter(desk.server.links.values()))
    first.heard()
    watch_tick(desk.server)
    assert desk[job].status is Status.QUEUED
    first.failed("gone again")
    desk.clock.pass_s(90_000)
    watch_tick(desk.server)
    assert desk[job].status is Status.FAILED
    desk.store.close()


@pytest.mark.parametrize("before", BUSY)
def test_jobs_at_a_client_that_is_not_configured_any_more(before: Status, desk: Desk) -> None:
    """They reach an end as well, after LOST_AFTER from the start, and stop nobody else from being judged."""
    job = desk.with_client(before, retries=0)
    desk.restart(SERVICE_EXAMPLE_CLIENTS="http://127.0.0.1:1")
    watch_tick(desk.server)
    assert desk[job].status not in joborch.OVER
    desk.clock.pass_s(3700)
    watch_tick(desk.server)
    assert (desk[job].status, desk[job].cause) == (Status.FAILED, "infrastructure")
    assert "no longer configured" in desk[job].reason


@pytest.mark.parametrize("before", BUSY)
def test_jobs_of_a_service_that_is_not_configured_any_more(before: Status, desk: Desk, peer: Peer) -> None:
    """Those that are with a client go on to their end."""
    job = desk.with_client(before)
    url = desk.environment.pop("SERVICE_EXAMPLE_CLIENTS")
    del desk.environment["SERVICE_EXAMPLE_TOKEN"]
    desk.restart(SERVICE_OTHER_CLIENTS=url, SERVICE_OTHER_TOKEN="a-token")
    peer.says["/submit"] = [reply(200, {"id": 7})]
    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    desk.link.heard()
    watch_tick(desk.server)
    desk.send()
    joborch.job_json(desk.server, desk[job])
    if before is not Status.PROCESSING:
        desk.settle(job)
        assert desk[job].status is Status.COMPLETED


def test_new_attempts_come_of_age(desk: Desk) -> None:
    job = desk.with_client(Status.RUNNING)
    joborch.new_attempt(desk.server, job, "reboot")
    watch_tick(desk.server)
    assert heads(desk.store, "example") == []
    desk.clock.pass_s(2)
    watch_tick(desk.server)
    assert [head.job_id for head in heads(desk.store, "example")] == [job.id]


# == Starting ==


def test_a_job_that_was_being_sent_when_the_server_died(desk: Desk, peer: Peer) -> None:
    """Where it was sent is known, whether it arrived is not: the same client is asked again under the same key."""
    job, waiting = desk.with_client(Status.PROCESSING), desk.upload()
    desk.store.close()
    node = joborch.open_node(load_config("server", {"db_path": str(desk.data.path / "server.db")}, desk.environment))
    assert isinstance(node, Server)
    desk.server, desk.store = node, node.store
    assert (desk[job].status, desk[waiting].status) == (Status.UNKNOWN, Status.QUEUED)
    peer.says["/submit"] = [reply(200, {"id": 7})]
    desk.link.heard()
    assert desk.send()
    assert (desk[job].status, desk[job].attempt) == (Status.SUBMITTED, 1)
    assert peer.asked[0].headers["X-Joborch-Uuid"] == job.uuid


def test_why_a_client_cannot_be_used(desk: Desk) -> None:
    service = desk.server.services["example"]
    assert desk.server.troubles(service) == {desk.link.name: "has not been called yet"}
    desk.link.failed("cannot be reached: connection refused")
    desk.clock.pass_s(0.1)
    assert desk.server.troubles(service) == {desk.link.name: "cannot be reached: connection refused (0.1 s ago)"}
    desk.link.heard()
    assert desk.server.troubles(service) == {desk.link.name: ""}


# == Cleaning ==


def ended(desk: Desk, **changes: Any) -> Job:
    """A completed job with its result."""
    job = desk.with_client(Status.RUNNING, **changes)
    desk.data.result(job.mark).write_bytes(RESULT)
    desk.store.move(job, Status.COMPLETED, "", result_size=len(RESULT), result_sha256=hashlib.sha256(RESULT).hexdigest())
    return desk[job]


def test_jobs_are_cleaned_by_the_time_of_their_end(desk: Desk) -> None:
    """Not by that of their upload, nor by the age of their folder; and never one that has not ended."""
    running = desk.with_client(Status.RUNNING, user_id=9)
    desk.clock.pass_s(200_000)
    job = ended(desk)
    os.utime(desk.data.job(job.uuid), (0, 0))
    desk.clock.pass_s(172_700)
    assert not clean_tick(desk.server)
    assert desk[job].status is Status.COMPLETED
    desk.clock.pass_s(200)
    assert clean_tick(desk.server)
    assert desk[job].status is Status.CLEANED
    assert not desk.data.job(job.uuid).exists()
    assert not desk.data.result(job.mark).exists()
    assert desk[running].status is Status.RUNNING
    assert desk.data.job(running.uuid).exists()
    assert not clean_tick(desk.server)


def test_rows_are_deleted_long_after(desk: Desk) -> None:
    job = ended(desk)
    desk.clock.pass_s(172_900)
    clean_tick(desk.server)
    desk.clock.pass_s(364 * 86400)
    clean_tick(desk.server)
    assert desk.store.get(job.id) is not None, "from the time when its files went"
    desk.clock.pass_s(2 * 86400)
    clean_tick(desk.server)
    assert desk.store.get(job.id) is None


@pytest.mark.parametrize("hours", [-1000, -5, 5, 1000])
def test_whoever_sets_the_clock_changes_no_age_and_no_delay(hours: int, desk: Desk, peer: Peer) -> None:
    """No early cleaning, no early or endless back-off, no job that failed for a client that was away for a minute."""
    done = ended(desk)
    late, waiting = desk.with_client(Status.RUNNING, user_id=2), desk.upload(user_id=3)
    joborch.new_attempt(desk.server, late, "lost")
    desk.link.failed("refused")
    desk.clock.set_s(hours * 3600)
    for tick in (clean_tick, watch_tick):
        tick(desk.server)
    desk.restart()
    desk.link.failed("refused")
    for tick in (clean_tick, watch_tick):
        tick(desk.server)
    assert [desk[job].status for job in (done, late, waiting)] == [Status.COMPLETED, Status.QUEUED, Status.QUEUED]
    assert desk[late].not_before is not None, "its back-off is not over"
    desk.clock.pass_s(2)
    watch_tick(desk.server)
    assert desk[late].not_before is None
    desk.clock.pass_s(48 * 3600)
    clean_tick(desk.server)
    assert desk[done].status is Status.CLEANED
    desk.link.failed("refused")
    watch_tick(desk.server)
    assert desk[waiting].status is Status.FAILED


def test_files_go_before_the_row_says_so(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be removed keeps its row, and keeps no other from being cleaned."""
    stuck, other = ended(desk), ended(desk, user_id=2)
    desk.clock.pass_s(172_900)
    real = joborch.remove_tree

    def refuse(path: Path) -> None:
        if path == desk.data.job(stuck.uuid):
            raise OSError(5, "Input/output error")
        real(path)

    replace(monkeypatch, "remove_tree", refuse)
    clean_tick(desk.server)
    assert [desk[job].status for job in (stuck, other)] == [Status.COMPLETED, Status.CLEANED]
    replace(monkeypatch, "remove_tree", real)
    clean_tick(desk.server)
    assert desk[stuck].status is Status.CLEANED


def test_sweep_removes_what_belongs_to_no_job(desk: Desk) -> None:
    kept, gone = ended(desk), ended(desk, user_id=2)
    desk.store.move(gone, Status.CLEANED, "")
    late, superseded_attempts = kept._replace(attempt=kept.attempt + 1).mark, ("superseded", "receiving")
    desk.data.result(late).write_bytes(b"of an attempt that was given up")
    for name in superseded_attempts:
        (desk.data.jobs / name).mkdir()
        (desk.data.jobs / name / "file").write_bytes(b"x")
        desk.data.result(name).write_bytes(b"x")
    desk.data.receiving.add("receiving")
    sweep(desk.server)
    assert {path.name for path in desk.data.jobs.iterdir()} == {kept.uuid, "receiving"}
    assert {path.name for path in desk.data.results.iterdir()} == {f"{kept.mark}.zip", "receiving.zip"}


def test_sweep_and_an_upload_that_ends_meanwhile(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files before rows: between a look at the rows and one at what is being received, a job may have been stored."""
    new = new_job()
    desk.data.receiving.add(new.uuid)
    desk.data.job(new.uuid).mkdir()
    real = desk.store.job

    def job(sql: str, **values: Any) -> Job | None:
        found = real(sql, **values)
        if new.uuid in desk.data.receiving:
            desk.store.add(new, "uploaded")
            desk.data.receiving.discard(new.uuid)
        return found

    monkeypatch.setattr(desk.store, "job", job)
    sweep(desk.server)
    assert desk.data.job(new.uuid).exists()


def test_sweep_leaves_off_when_the_process_ends(desk: Desk) -> None:
    (desk.data.jobs / "superseded").mkdir()
    desk.server.stopping.set()
    sweep(desk.server)
    assert (desk.data.jobs / "superseded").exists()


# == Loops ==


class Ticker:
    """A tick that counts, and can be held and told what to return."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.ticks, self.gate = list(answers), 0, threading.Semaphore(0)

    def __call__(self) -> bool:
        self.ticks += 1
        self.gate.release()
        answer = self.answers.pop(0) if self.answers else False
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    def wait(self, count: int) -> None:
        """Wait for so many more ticks."""
        for _ in range(count):
            assert self.gate.acquire(timeout=20), f"only {self.ticks} ticks"


@pytest.fixture
def run_loop() -> Iterator[Callable[..., Loop]]:
    """Starts loops, which are stopped with the test."""
    made, pool, stopping = list[Loop](), joborch.Pool("test"), threading.Event()

    def start(tick: Callable[[], bool], period_s: float = 1000.0, runs: int = 1, **options: Any) -> Loop:
        made.append(Loop("test", tick, lambda: pool, period_s, runs, **options))
        made[-1].start()
        loops = {"test": made[-1]}
        threading.Thread(target=joborch.keep_time, args=(lambda: loops, stopping)).start()
        return made[-1]

    yield start
    stopping.set()
    for loop in made:
        loop.stop()
    pool.stop(20)
    assert not pool.threads


def sleeping(loop: Loop) -> bool:
    """Whether no tick of a loop runs, and no call is left."""
    return not loop.runs and not loop.calls


def test_one_wake_up_of_the_timer_serves_all_loops_with_the_same_pause() -> None:
    for pause_s in (0.02, 0.1, 0.5, 1.0, 15.0, 60.0):
        times = [1e6 + pause_s * number / 7 for number in range(70)]
        looks = [next_look(now, pause_s) for now in times]
        assert all(now < look <= now + 1.001 * pause_s for now, look in zip(times, looks))
        assert len({round(look / pause_s, 3) for look in looks}) <= 11, "ten pauses"


def test_a_loop_ticks_at_its_start_and_when_woken(run_loop: Callable[..., Loop]) -> None:
    tick = Ticker()
    loop = run_loop(tick)
    tick.wait(1)
    wait_for(lambda: sleeping(loop), what="the loop to sleep")
    loop.wake()
    tick.wait(1)
    wait_for(lambda: sleeping(loop), what="the loop to sleep")
    assert tick.ticks == 2


def test_a_loop_goes_on_while_there_is_work_and_after_a_failure(run_loop: Callable[..., Loop], caplog: pytest.LogCaptureFixture) -> None:
    tick = Ticker(True, True, False, ValueError("oops"))
    loop = run_loop(tick)
    tick.wait(3)
    wait_for(lambda: sleeping(loop), what="the loop to sleep")
    loop.wake()
    tick.wait(1)
    wait_for(lambda: sleeping(loop), what="the loop to sleep")
    loop.wake()
    tick.wait(1)
    assert "oops" in caplog.text
    assert "it is tried again" in caplog.text and "Traceback" in caplog.text


def test_a_loop_complains_once_of_the_same_trouble(run_loop: Callable[..., Loop], caplog: pytest.LogCaptureFixture) -> None:
    """A full disk for an hour is one line of the log, without a traceback, and one more when it is full again."""
    full = joborch.StorageError("the database cannot be written: disk is full")
    tick = Ticker(full, full, full, False, full)
    loop = run_loop(tick)
    for _ in range(5):
        tick.wait(1)
        wait_for(lambda: sleeping(loop), what="the loop to sleep")
        loop.wake()
    tick.wait(1)
    assert caplog.text.count("disk is full") == 2
    assert "Traceback" not in caplog.text


def test_a_call_that_comes_while_it_ticks_is_not_lost(run_loop: Callable[..., Loop]) -> None:
    inside, go = threading.Event(), threading.Event()
    ticks = list[int]()

    def tick() -> bool:
        ticks.append(1)
        inside.set()
        assert go.wait(20)
        return False

    loop = run_loop(tick)
    assert inside.wait(20)
    loop.wake()
    go.set()
    wait_for(lambda: len(ticks) == 2, what="the second tick")


def test_a_loop_of_several_threads_wakes_one_for_each_call(run_loop: Callable[..., Loop]) -> None:
    """A further run begins only where all others are at work, and no more than there may be."""
    gates, begun = threading.Semaphore(0), threading.Semaphore(0)

    def tick() -> bool:
        begun.release()
        assert gates.acquire(timeout=20)
        return False

    loop = run_loop(tick, runs=3)
    assert begun.acquire(timeout=20)
    gates.release()
    wait_for(lambda: sleeping(loop), what="the first to sleep")
    loop.wake()
    assert begun.acquire(timeout=20)
    assert loop.pool().threads == 1, "it was free"
    for _ in range(2):
        loop.wake()
        assert begun.acquire(timeout=20), "another takes the call while the first is at work"
    loop.wake()
    assert loop.pool().threads == 3
    gates.release(40)  # for whatever ticks may follow, too
    assert begun.acquire(timeout=20), "the call that nobody was free for is not lost"
    wait_for(lambda: sleeping(loop), what="all to sleep")


def test_a_loop_ticks_by_itself_after_its_period(run_loop: Callable[..., Loop]) -> None:
    tick = Ticker()
    run_loop(tick, period_s=0.01)
    tick.wait(5)


def test_a_loop_with_nothing_to_do_ticks_only_when_woken(run_loop: Callable[..., Loop]) -> None:
    tick, looks = Ticker(), threading.Semaphore(0)
    loop = run_loop(tick, period_s=0.01, wanted=lambda: looks.release() or False)
    tick.wait(1)
    for _ in range(5):
        assert looks.acquire(timeout=20)
    assert tick.ticks == 1
    loop.wake()
    tick.wait(1)


def test_a_slow_tick_is_not_run_again_before_its_next_period(run_loop: Callable[..., Loop]) -> None:
    """A tick that takes longer than its period leaves time for others: no call waits for its end."""
    tick, go, looks = Ticker(), threading.Event(), threading.Semaphore(0)

    def slow() -> bool:
        tick()
        return not go.wait(20)

    loop = run_loop(slow, period_s=0.01, wanted=lambda: looks.release() or False)
    tick.wait(1)
    loop.look()
    assert not loop.calls
    go.set()
    assert looks.acquire(timeout=20)
    assert tick.ticks == 1


def test_a_loop_goes_on_in_the_pool_that_is_due() -> None:
    """What hangs is left to a pool of its own, and what works again leaves it at once."""
    pools = {name: joborch.Pool(name, 1) for name in ("loop", "silent")}
    names, over = list[str](), threading.Event()

    def tick() -> bool:
        names.append(threading.current_thread().name)
        if len(names) == 4:
            over.set()
        return len(names) < 4

    loop = Loop("test", tick, lambda: pools["silent" if len(names) in (1, 2) else "loop"], 1000.0)
    loop.start()
    assert over.wait(20)
    loop.stop()
    joborch.stop_pools(pools.values(), 20)
    assert names == ["loop-1", "silent-1", "silent-1", "loop-1"]
    assert not any(pool.threads for pool in pools.values())


def test_work_waits_while_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Who adds work to a pool is not to blame for a system that has no more threads."""
    done, inside, go = threading.Semaphore(0), threading.Event(), threading.Event()
    pool = joborch.Pool("test")
    pool.add(lambda: (inside.set(), go.wait(20)))
    assert inside.wait(20)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert pool.add(done.release)
    assert "no thread can be started" in caplog.text
    go.set()
    assert done.acquire(timeout=20), "the thread that there is does it"
    pool.stop(20)


def test_a_loop_ticks_as_soon_as_a_thread_can_be_started(run_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread of the pool runs, the next look of the timer tries again."""
    tick, tries = Ticker(), threading.Semaphore(0)

    def refuse(pool: joborch.Pool) -> bool:
        tries.release()
        return False

    with monkeypatch.context() as patch:
        patch.setattr(joborch.Pool, "start_thread", refuse)
        loop = run_loop(tick, period_s=0.01, wanted=lambda: False)
        for _ in range(3):
            assert tries.acquire(timeout=20)
        assert tick.ticks == 0
    tick.wait(1)
    wait_for(lambda: sleeping(loop), what="the loop to sleep")


def test_wake_by_name(desk: Desk) -> None:
    woken = list[str]()
    for name in ("send:a", "send:b", "sender"):
        desk.server.loops[name] = Loop(name, lambda: False, lambda: desk.server.pool, 1.0)
        desk.server.loops[name].wake = lambda name=name: woken.append(name)  # type: ignore[method-assign, misc]
    for name in ("send:a", "send", "send:c"):
        desk.server.wake(name)
    assert woken == ["send:a"]


def test_nothing_is_dispatched_while_no_job_could_run(desk: Desk) -> None:
    """An idle server, or one with hundreds of clients, does not ask them all twice a second."""
    loop = joborch.make_server_loops(desk.server)["dispatch"]
    assert not loop.wanted()
    desk.upload()
    assert loop.wanted()


def test_every_client_has_its_loops(desk: Desk) -> None:
    name, loops = desk.link.name, joborch.make_server_loops(desk.server)
    assert set(loops) == {f"{each}:{name}" for each in ("get", "send", "fetch", "kill")} | {
        "dispatch",
        "watch",
        "clean",
    }


def test_parking_has_a_bounded_number_of_places() -> None:
    parking = ThreadLimit(2)
    with parking.place() as first, parking.place() as second, parking.place() as third:
        assert (first, second, third) == (True, True, False)
    with parking.place() as again:
        assert again


def test_waiting_ends_with_what_is_found_with_time_with_the_caller_and_with_us(desk: Desk) -> None:
    found: list[str] = []
    never: Callable[[], bool] = lambda: False  # noqa: E731
    assert desk.server.wait_until(lambda: None, 0, never) is None
    assert desk.server.wait_until(lambda: "at once", 60, never) == "at once"
    assert desk.server.wait_until(lambda: None, 60, lambda: True) is None
    looks = list[int]()

    def look() -> str | None:
        looks.append(1)
        return desk.store.get(1) and "there"

    waiter = threading.Thread(target=lambda: found.append(desk.server.wait_until(look, 60, never) or "nothing"))
    waiter.start()
    wait_for(lambda: looks, what="the first look")
    desk.upload()
    waiter.join(20)
    assert found == ["there"]
    desk.server.stopping.set()
    desk.store.core.wake_all()
    assert desk.server.wait_until(lambda: None, 60, never) is None


def test_load_is_a_percentage(desk: Desk) -> None:
    desk.server.cpu_load()
    desk.server.last_cpu = (0, 0)
    desk.clock.pass_s(1)
    assert 0.0 <= desk.server.cpu_load() <= 100.0


def test_services_are_those_of_the_settings(desk: Desk) -> None:
    job = desk.upload()
    assert desk.server.service(job) == desk.server.services["example"]
    strange = changed(job, service="gone")
    assert (desk.server.service(strange).retries, desk.server.service(strange).lost_after_s) == (2, 3600.0)


def test_a_client_that_says_that_it_takes_nothing_is_sent_nothing(desk: Desk, peer: Peer) -> None:
    """The jobs stay Queued, without a move to and fro at each try; once it says so no more, they are sent."""
    job = desk.upload()
    peer.says["/events"] = [events(problem="Slurm: unable to contact\ncontroller"), events()]
    get_tick(desk.server, desk.link)
    for _ in range(5):
        desk.clock.pass_s(10)
        assert not desk.send()
    assert len(desk.store.read(statements.HISTORY_GET, id=job.id)) == 1
    assert joborch.queue_info_of(desk.server, desk[job]).waiting_for == (
        f"no client for example takes jobs: {desk.link.name} Slurm: unable to contact controller"
    )
    get_tick(desk.server, desk.link)
    peer.says["/submit"] = [reply(200, {"id": 7})]
    assert desk.send()
    assert desk[job].status is Status.SUBMITTED
