"""The client's ticks and routes, and both halves together: a payload is started once, ends once, and its end is told."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import os
import shutil
import tempfile
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import alive, disk_bytes, field_part, file_part, free_port, part, processes_below, replace, wait_for
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from world import Yard, all_jobs, ask, new_job, send_next, serving, soon, submit_payload, together

import joborch
from joborch import (
    BUSY,
    OVER,
    Cause,
    DataFolder,
    FilesBody,
    Job,
    Server,
    Status,
    StillRunning,
    Store,
    clean_tick,
    end_tick,
    limit_tick,
    load_config,
    run_tick,
    sweep,
)
from joborch_base import statements

pytestmark = pytest.mark.usefixtures("strangers_are_safe", "no_long_polls")


UUID = "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0"


# == Submitting ==


def test_a_payload_has_six_fields_of_fixed_types(yard: Yard) -> None:
    """A 2.2 server reads all of them, in every state."""
    wanted = {"id": int, "input": dict, "status": str, "loc": str, "pid": int, "killed": bool}
    job = yard.submit("READY; BLOCK")
    for status in ("Prepared", "Running", "Killed"):
        said = ask(yard.client, "GET", f"/retrieve/{job.id}").json
        assert {name: type(value) for name, value in said.items()} == wanted
        assert (said["id"], said["status"], said["killed"]) == (job.id, status, status == "Killed")
        assert (said["pid"] > 0) == (status == "Running")
        if status == "Prepared":
            yard.ready(job)
        else:
            yard.store.request_kill(job.id, Cause.CANCELLED)
            end_tick(yard.client)


def test_headers_become_columns(yard: Yard) -> None:
    said = submit_payload(
        yard.client, [file_part("run.sh", b"true")], X_Joborch_Job="42", X_Joborch_Uuid=UUID.upper(), X_Joborch_Attempt="3",
        X_Joborch_Service="%C3%A9%0Ax", X_Joborch_User="-7", X_Joborch_Cpus="2", X_Joborch_Memory="100", X_Joborch_Timeout="1.5",
        X_Joborch_Return_Inputs="0",
    )  # fmt: skip
    job = yard[said.json["id"]]
    assert (job.mark, job.remote_id, job.service, job.user_id) == (f"{UUID}.3", "42", "é x", -7)
    assert (job.cpus, job.memory, job.timeout, job.return_inputs) == (2, 100, 1.5, 0)
    bare = yard[submit_payload(yard.client, [file_part("run.sh", b"true")]).json["id"]]
    assert (bare.attempt, bare.user_id, bare.service, bare.cpus, bare.timeout, bare.return_inputs) == (1, None, None, 1, None, 1)
    assert yard.folder(bare).name == bare.mark


@pytest.mark.parametrize(
    "headers",
    [
        {"X_Joborch_Uuid": "../../etc"},
        {"X_Joborch_Uuid": UUID + "x"},
        {"X_Joborch_Attempt": "0"},
        {"X_Joborch_Attempt": "x"},
        {"X_Joborch_Cpus": "-1"},
        {"X_Joborch_User": "1e3"},
        {"X_Joborch_Timeout": "soon"},
        {"X_Joborch_Timeout": "-1"},
    ],
)
def test_headers_that_cannot_be_used(headers: dict[str, str], yard: Yard) -> None:
    said = submit_payload(yard.client, [file_part("run.sh", b"true")], **headers)
    assert said.status == 400
    assert said.json["field"].replace("-", "_") in headers
    assert all_jobs(yard.store) == []


def leavings(yard: Yard) -> list[str]:
    """What lies in the folders of payloads and transfers."""
    return [path.name for folder in (yard.data.jobs, yard.data.tmp) for path in folder.iterdir()]


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([], 400),
        ([field_part("", "text")], 400),
        ([file_part("run.sh", b"x"), file_part("run.sh", b"x")], 400),
        ([file_part("run.sh", b"x"), file_part("run.sh/x", b"x")], 400),
        ([file_part("../run.sh", b"x")], 400),
        ([file_part("run.sh", b"x"), field_part(joborch.DIGESTS_FIELD, "{")], 400),
        ([file_part("run.sh", b"x"), field_part(joborch.DIGESTS_FIELD, '{"run.sh": "00"}')], 503),
        ([file_part("run.sh", b"x"), field_part(joborch.DIGESTS_FIELD, "{}")], 503),
        ([file_part("run.sh", b"x"), field_part(joborch.DIGESTS_FIELD, "[" * 60_000)], 400),
    ],
)
def test_what_is_refused_leaves_nothing(parts: list[bytes], status: int, yard: Yard) -> None:
    said = submit_payload(yard.client, parts, X_Joborch_Uuid=UUID)
    assert said.status == status, said
    assert leavings(yard) == []
    assert all_jobs(yard.store) == []
    assert yard.data.receiving == set()
    assert submit_payload(yard.client, [file_part("run.sh", b"x")], X_Joborch_Uuid=UUID).status == 200


def test_one_attempt_that_comes_many_times_is_one_payload(yard: Yard) -> None:
    ids = list[int]()
    together(6, lambda _: ids.append(submit_payload(yard.client, [file_part("run.sh", b"true")], X_Joborch_Uuid=UUID).json["id"]))
    assert len(set(ids)) == 1
    assert leavings(yard) == [f"{UUID}.1"]
    other = submit_payload(yard.client, [file_part("run.sh", b"true")], X_Joborch_Uuid=UUID, X_Joborch_Attempt="2")
    assert other.json["id"] not in ids


def test_a_repeat_answers_the_payload_as_it_is(yard: Yard) -> None:
    """Also when it has ended; and never starts it again."""
    job = yard.submit("echo ran >> ../../count", X_Joborch_Uuid=UUID)
    yard.run(job)
    said = submit_payload(yard.client, [file_part("run.sh", b"true")], X_Joborch_Uuid=UUID)
    assert (said.json["id"], said.json["status"]) == (job.id, "Completed")
    run_tick(yard.client)
    assert (yard.data.jobs / "count").read_text() == "ran\n"


def test_files_that_a_crash_left_without_a_row_are_replaced(yard: Yard) -> None:
    old = yard.data.job(f"{UUID}.1")
    (old / "work").mkdir(parents=True)
    (old / "started.1").write_text("1\n")
    (old / "work/old").write_bytes(b"x")
    job = yard.run(yard.submit("echo new", X_Joborch_Uuid=UUID))
    assert job.status is Status.COMPLETED
    assert set(yard.zip(job).namelist()) == {"run.sh", ".joborch/stdout", ".joborch/stderr"}


def test_a_database_that_cannot_be_written_leaves_no_files(yard: Yard) -> None:
    pages = yard.store.db.execute("PRAGMA page_count").fetchone()[0]
    yard.store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    yard.store.db.execute(f"PRAGMA max_page_count = {pages}")
    for _ in range(500):
        said = submit_payload(yard.client, [file_part("run.sh", b"x")], X_Joborch_Service="s" * 200)
        if said.status != 200:
            break
    assert said.status == 503
    assert "database" in said.json["message"]
    assert len(leavings(yard)) == len(all_jobs(yard.store))


# == Starting with the submit ==


@pytest.fixture
def quick_yard(yard: Yard) -> Iterator[Yard]:
    """A client that starts a payload when it is submitted, as one does whose loops run."""
    yard.client.starts_at_once = True
    yield yard
    for job in yard.store.jobs(statements.PAYLOADS_IN, status="Running", limit=99):  # only a wrapper in its folder can be ended
        wait_for(functools.partial(joborch.read_claim, yard.folder(job), job.attempt), what="the claim of the wrapper")


def submitted(yard: Yard, script: str = "exec sleep 1000", **headers: str) -> Job:
    """A payload that may have started when this returns."""
    said = submit_payload(yard.client, [file_part("run.sh", script.encode())], **headers)
    assert said.status == 200, said
    return yard[said.json["id"]]


def moves_of(yard: Yard, job: Job) -> list[tuple[str | None, str]]:
    """The history of a payload."""
    return [(row["source"], row["target"]) for row in yard.store.read(statements.HISTORY_GET, id=job.id)]


def test_a_payload_starts_with_its_submit_where_a_slot_is_free(quick_yard: Yard) -> None:
    """One transaction leaves the history of two, and no row needs the handle: a client that died finds what it started."""
    job = submitted(quick_yard)
    row = quick_yard.store.get(job.id)
    assert (job.status, row.handle if row else "") == (Status.RUNNING, None)
    assert moves_of(quick_yard, job) == [(None, "Prepared"), ("Prepared", "Running")]
    assert ask(quick_yard.client, "GET", f"/retrieve/{job.id}").json["pid"] == int((job.handle or "").split()[0])
    wait_for(lambda: joborch.read_claim(quick_yard.folder(job), 1), what="the claim of the wrapper")
    quick_yard.restart()
    assert quick_yard[job].handle == job.handle
    quick_yard.store.request_kill(job.id, Cause.CANCELLED)
    assert end_tick(quick_yard.client)
    assert quick_yard[job].status is Status.KILLED


def test_submits_at_once_take_no_more_slots_than_there_are(quick_yard: Yard) -> None:
    jobs: list[Job] = []
    together(6, lambda _: jobs.append(submitted(quick_yard)))
    assert Counter(quick_yard[job].status for job in jobs) == {Status.RUNNING: 2, Status.PREPARED: 4}
    run_tick(quick_yard.client)
    assert Counter(quick_yard[job].status for job in jobs) == {Status.RUNNING: 2, Status.PREPARED: 4}


def test_a_submit_overtakes_none_that_waits(quick_yard: Yard) -> None:
    submitted(quick_yard)
    wide, small = submitted(quick_yard, X_Joborch_Cpus="2"), submitted(quick_yard)
    assert (wide.status, small.status) == (Status.PREPARED, Status.PREPARED)


@pytest.mark.parametrize(("script", "status"), [("", Status.INVALID), (None, Status.INVALID)])
def test_a_payload_that_cannot_run_is_left_to_the_runner(script: str | None, status: Status, quick_yard: Yard) -> None:
    job = quick_yard.submit(script, {"data": b"x"})
    assert quick_yard[job].status is Status.PREPARED
    run_tick(quick_yard.client)
    assert quick_yard[job].status is status


def test_a_kill_that_comes_while_a_submit_starts_its_payload(quick_yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the payload taken, and is not forgotten."""
    real, woken = quick_yard.client.executor.start, []

    def start(job: Job) -> str:
        quick_yard.store.request_kill(job.id, Cause.CANCELLED)
        assert not end_tick(quick_yard.client)
        return real(job)

    monkeypatch.setattr(quick_yard.client.executor, "start", start)
    monkeypatch.setattr(quick_yard.client, "wake", woken.append)
    job = submitted(quick_yard)
    assert woken == ["end"]
    assert end_tick(quick_yard.client)
    assert (quick_yard[job].status, processes_below(quick_yard.folder(job))) == (Status.KILLED, [])


def test_a_submit_that_cannot_be_stored_leaves_its_payload_to_others(quick_yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit fails after the payload was taken to be started: a later one with its id is not taken for that one."""
    with monkeypatch.context() as patch:
        patch.setattr(quick_yard.store, "add_move", lambda *_: 1 / 0)
        assert submit_payload(quick_yard.client, [file_part("run.sh", b"exit 0")]).status == 500
    assert not quick_yard.client.payloads
    assert submitted(quick_yard).status is Status.RUNNING


def test_what_a_client_of_another_boot_had_started_is_not_trusted(quick_yard: Yard) -> None:
    """Its exit file says it was done, but what it wrote may not have reached the disk."""
    job = submitted(quick_yard, "exit 0")
    quick_yard.wait(job)
    quick_yard.clock.reboot()
    quick_yard.restart()
    assert (quick_yard[job].status, quick_yard[job].cause) == (Status.FAILED, "infrastructure")


# == Ends that the answer to a submit has ==


def test_the_answer_to_a_submit_has_the_end_of_a_short_payload(quick_yard: Yard) -> None:
    """What /events would say, with the archive; /events itself tells it only to a server that has lost all it knew."""
    since = quick_yard.events()["next"]
    said = submit_payload(quick_yard.client, [file_part("run.sh", b"echo hi > out; exit 0")], X_Joborch_Wait="1000")
    assert set(said.json) == {"id", "input", "status", "loc", "pid", "killed", "end"}
    job, end = quick_yard[said.json["id"]], said.json["end"]
    assert moves_of(quick_yard, job) == [(None, "Prepared"), ("Prepared", "Running"), ("Running", "Completed")]
    assert (said.json["status"], end["status"], end["uuid"], end["attempt"], end["exit_code"]) == ("Completed", "Completed", job.uuid, 1, 0)
    content = base64.b64decode(end["archive"])
    assert hashlib.sha256(content).hexdigest() == end["sha256"]
    assert zipfile.ZipFile(io.BytesIO(content)).read("out") == b"hi\n"
    later = quick_yard.events(f"since={since}&instance={quick_yard.client.instance}")
    assert later["payloads"] == []
    assert [payload["status"] for payload in quick_yard.events()["payloads"]] == ["Completed"]


def test_a_script_that_fails_at_once(quick_yard: Yard) -> None:
    end = submit_payload(quick_yard.client, [file_part("run.sh", b"exit 3")], X_Joborch_Wait="1000").json["end"]
    assert (end["status"], end["cause"], end["exit_code"], "archive" in end) == ("Failed", "user", 3, True)


def test_an_answer_that_was_lost(quick_yard: Yard) -> None:
    """The submit is repeated: /events has the end."""
    key, form = {"X_Joborch_Uuid": UUID, "X_Joborch_Wait": "1000"}, [file_part("run.sh", b"exit 0")]
    assert "end" in submit_payload(quick_yard.client, form, **key).json
    since = quick_yard.events(f"since=1&instance={quick_yard.client.instance}")["next"]
    again = submit_payload(quick_yard.client, form, **key).json
    assert (again["status"], "end" in again) == ("Completed", False)
    (told,) = quick_yard.events(f"since={since}&instance={quick_yard.client.instance}")["payloads"]
    assert (told["uuid"], told["status"], "archive" in told) == (UUID, "Completed", True)


def test_what_is_confirmed_is_forgotten(quick_yard: Yard) -> None:
    said = submit_payload(quick_yard.client, [file_part("run.sh", b"exit 0")], X_Joborch_Wait="1000").json
    assert quick_yard.client.store.core.quiet == {said["id"]}
    quick_yard.events(f"since=1&instance={quick_yard.client.instance}&done={said['id']}")
    assert (quick_yard.client.store.core.quiet, quick_yard[said["id"]].fetched_at is None) == (set(), False)


@pytest.mark.parametrize("script", ["exec sleep 1000", "head -c 100k /dev/urandom > big; exit 0", "touch {1..17}", "rm -rf ../work"])
def test_what_an_answer_cannot_have_is_told_by_events(script: str, quick_yard: Yard) -> None:
    """A payload that runs on, a large result, and an end that is no fault of the script."""
    since = quick_yard.events()["next"]
    wait_ms = "50" if "sleep" in script else "1000"
    said = submit_payload(quick_yard.client, [file_part("run.sh", script.encode())], X_Joborch_Wait=wait_ms).json
    assert "end" not in said
    (told,) = quick_yard.events(f"since={since}&instance={quick_yard.client.instance}")["payloads"]
    assert told["status"] == said["status"] == {"exec": "Running", "rm": "Failed"}.get(script.split()[0], "Completed")
    assert not quick_yard.client.store.core.quiet


def test_a_kill_waits_for_the_answer(quick_yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload that ends meanwhile is killed no more: it ended before."""
    local, woken = quick_yard.client.executor, []
    monkeypatch.setattr(quick_yard.client, "wake", woken.append)
    real = local.wait  # type: ignore[attr-defined]

    def wait(job: Job, patience_s: float) -> bool:
        quick_yard.store.request_kill(job.id, Cause.CANCELLED)
        assert not end_tick(quick_yard.client)
        return bool(real(job, patience_s))

    monkeypatch.setattr(local, "wait", wait)
    said = submit_payload(quick_yard.client, [file_part("run.sh", b"exit 0")], X_Joborch_Wait="1000").json
    assert ("end" in said, said["status"], "end" in woken) == (False, "Running", True)
    assert end_tick(quick_yard.client)
    assert quick_yard[said["id"]].status is Status.COMPLETED


def test_few_submits_wait_at_once(quick_yard: Yard) -> None:
    """The others are answered at once: no worker thread is taken from whom it belongs to."""
    with contextlib.ExitStack() as taken:
        for _ in range(joborch.SUBMIT_WAITERS):
            assert taken.enter_context(quick_yard.client.submit_places.place())
        said = submit_payload(quick_yard.client, [file_part("run.sh", b"exit 0")], X_Joborch_Wait="1000").json
    assert (said["status"], "end" in said) == ("Running", False)
    quick_yard.until(quick_yard[said["id"]], Status.COMPLETED)


def test_a_submit_waits_for_a_payload_that_waits_for_a_slot(quick_yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer has the end as well, if that comes in time. Otherwise /events reports it."""
    first, _ = submitted(quick_yard), submitted(quick_yard)
    with monkeypatch.context() as patch:
        replace(patch, "await_end", lambda *_: None)  # as if the time were over
        assert submitted(quick_yard, "exit 0", X_Joborch_Wait="1000").status is Status.PREPARED
    assert not quick_yard.client.store.core.quiet
    answers = list[Any]()
    waits = threading.Thread(
        target=lambda: answers.append(submit_payload(quick_yard.client, [file_part("run.sh", b"exit 0")], X_Joborch_Wait="1000").json)
    )
    waits.start()
    wait_for(lambda: quick_yard.client.store.core.waiters, what="the submit to wait")
    quick_yard.store.request_kill(first.id, Cause.CANCELLED)
    assert end_tick(quick_yard.client)

    def told() -> bool:
        run_tick(quick_yard.client)
        return bool(answers)

    wait_for(told, what="the answer of the submit")
    waits.join()
    assert (answers[0]["status"], answers[0]["end"]["status"], "archive" in answers[0]["end"]) == ("Completed", "Completed", True)


def test_the_end_of_one_child_among_others_is_news(quick_yard: Yard) -> None:
    """Also if it was taken in by a thread that waits for another one."""
    local = quick_yard.client.local
    assert local
    first, second = submitted(quick_yard), submitted(quick_yard, "exit 0")
    pids = [int((job.handle or "").split()[0]) for job in (first, second)]
    local.children[pids[0]].is_awaited = True
    assert not local.is_end_awaited()
    quick_yard.wait(second)
    local.poll([first])
    assert pids[1] not in local.children
    assert not local.is_end_awaited()
    assert local.is_end_awaited(), "it was said once"


def test_payloads_that_only_run_are_not_looked_at(quick_yard: Yard) -> None:
    """The end of a child is a signal; what a client before this one has started must be looked at, as what waits must."""
    client, clock = quick_yard.client, quick_yard.clock
    job = submitted(quick_yard)
    run_tick(client)
    assert not joborch.needs_look(client)
    clock.pass_s(joborch.LOOK_S + 1)
    assert joborch.needs_look(client)
    submitted(quick_yard, X_Joborch_Cpus="2")
    run_tick(client)
    assert joborch.needs_look(client)
    wait_for(lambda: joborch.read_claim(quick_yard.folder(job), 1), what="the claim of the wrapper")
    quick_yard.restart()
    run_tick(quick_yard.client)
    assert joborch.needs_look(quick_yard.client)


def test_the_end_of_one_payload_costs_no_look_at_the_others(quick_yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with a thousand payloads asks about those that have ended, and about all of them now and then."""
    client, real, asked = quick_yard.client, quick_yard.client.executor.poll, list[list[int]]()

    def poll(jobs: Sequence[Job]) -> dict[int, joborch.Outcome]:
        asked.append([job.id for job in jobs])
        return real(jobs)

    monkeypatch.setattr(client.executor, "poll", poll)
    run_tick(client)
    first, second = submitted(quick_yard), submitted(quick_yard, "exit 0")
    quick_yard.wait(second)
    run_tick(client)
    quick_yard.clock.pass_s(joborch.LOOK_S + 1)
    run_tick(client)
    assert asked == [[], [second.id], [first.id]]
    assert quick_yard[second].status is Status.COMPLETED


def test_a_slot_does_not_wait_for_the_result_of_the_payload_before(quick_yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits here is started before the result of what has ended is looked at."""
    submitted(quick_yard)
    second, third = submitted(quick_yard, "exit 0"), submitted(quick_yard)
    quick_yard.wait(second)
    real, seen = joborch.finish, list[Status]()

    def finish(*arguments: Any) -> bool:
        seen.append(quick_yard[third].status)
        return real(*arguments)

    replace(monkeypatch, "finish", finish)
    run_tick(quick_yard.client)
    assert (seen, quick_yard[second].status) == ([Status.RUNNING], Status.COMPLETED)


def test_a_submit_wakes_the_runner_only_if_it_may_start_something(quick_yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes in an end starts what waits for that slot."""
    woken = list[str]()
    monkeypatch.setattr(quick_yard.client, "wake", woken.append)
    submitted(quick_yard)
    submitted(quick_yard)
    submitted(quick_yard)
    assert (woken, joborch.needs_look(quick_yard.client)) == ([], True), "a look from time to time does no harm"
    quick_yard.client.starts_at_once = False
    for job in quick_yard.store.jobs(statements.PAYLOADS_IN, status="Running", limit=9):
        quick_yard.store.request_kill(job.id, Cause.CANCELLED)
        assert end_tick(quick_yard.client)
    woken.clear()
    submitted(quick_yard)
    assert woken == ["run"]


# == Running ==


@pytest.mark.parametrize(
    ("script", "status", "cause", "figures", "words"),
    [
        ("true", Status.COMPLETED, None, (0, None), ["exit status 0"]),
        ("echo oops >&2; echo; exit 3", Status.FAILED, "user", (3, None), ["exit status 3", 'standard error: "oops"']),
        ("kill -SEGV $$", Status.FAILED, "user", (139, 11), ["SIGSEGV"]),
        ("exit 200", Status.FAILED, "user", (200, None), ["exit status 200"]),
        ("sleep 1000 & disown", Status.COMPLETED, None, (0, None), ["left running"]),
        ("echo a\r\nfalse\r\nexit 4\r\n", Status.FAILED, "user", None, ["CRLF"]),
        ("printf 'a\\033[31m\\377\\n' >&2; exit 1", Status.FAILED, "user", (1, None), ["a [31m\ufffd"]),
        ("kill -9 $PPID; exit 1", Status.FAILED, "user", (None, None), ["the wrapper was killed"]),
        ("", Status.INVALID, "user", (None, None), ["empty"]),
        (None, Status.INVALID, "user", (None, None), ["no run.sh"]),
    ],
)
def test_how_a_payload_ends(script: str | None, status: Status, cause: str | None, figures: Any, words: list[str], yard: Yard) -> None:
    job = yard.run(yard.submit(script, {"other": b""}))
    assert (job.status, job.cause) == (status, cause), job.reason
    assert figures is None or (job.exit_code, job.signal) == figures
    assert all(word in job.reason for word in words), job.reason
    assert job.reason.isprintable()
    if status is not Status.INVALID:
        assert job.started_at and job.ended_at and 0 <= job.ended_at - job.started_at < 60
    wait_for(lambda: not processes_below(yard.folder(job)), what="what was killed to be gone")


@pytest.mark.parametrize(("memory", "running"), [(400, 2), (600, 1), (5000, 1)])
def test_no_more_payloads_run_than_there_is_memory_for(memory: int, running: int, data: DataFolder) -> None:
    """What asks for more than there is runs alone."""
    yard = Yard(data, JOBORCH_MEMORY="1000M")
    jobs = [yard.submit("READY; BLOCK", X_Joborch_Memory=str(memory)) for _ in range(2)]
    run_tick(yard.client)
    assert [yard[job].status for job in jobs] == [Status.RUNNING] * running + [Status.PREPARED] * (2 - running)
    for job in jobs[:running]:
        yard.ready(job)
    yard.close()


def test_no_more_payloads_run_than_there_are_slots(yard: Yard) -> None:
    """The oldest first; each slot is filled as soon as it is free."""
    jobs = [yard.submit("READY; BLOCK") for _ in range(4)]
    run_tick(yard.client)
    run_tick(yard.client)
    assert [yard[job].status for job in jobs] == [Status.RUNNING] * 2 + [Status.PREPARED] * 2
    yard.ready(jobs[0])
    yard.go(jobs[0])
    run_tick(yard.client)
    assert [yard[job].status for job in jobs] == [Status.COMPLETED, Status.RUNNING, Status.RUNNING, Status.PREPARED]


def test_an_idle_client_ticks_only_when_woken(yard: Yard) -> None:
    """While a payload runs, its limits are looked after; one that is to be killed is tried again until nothing of it runs."""

    def wanted() -> set[str]:
        return {name for name in ("run", "limit", "end") if yard.client.loops[name].wanted()}

    run_tick(yard.client)
    assert wanted() == set()
    job = yard.submit("READY; BLOCK")
    run_tick(yard.client)
    assert wanted() == {"run", "limit"}
    yard.ready(job)
    run_tick(yard.client)
    assert wanted() == {"limit"}
    yard.store.request_kill(job.id, Cause.CANCELLED)
    run_tick(yard.client)
    assert wanted() == {"limit", "end"}
    while end_tick(yard.client):
        pass
    run_tick(yard.client)
    assert wanted() == set()


def test_a_payload_is_started_once_however_many_ticks_there_are(yard: Yard) -> None:
    jobs = [yard.submit("echo $JOBORCH_MARK >> ../../count") for _ in range(2)]
    together(4, lambda _: run_tick(yard.client))
    for job in jobs:
        yard.run(job)
    assert sorted((yard.data.jobs / "count").read_text().split()) == sorted(job.mark for job in jobs)


def test_files_that_were_removed_by_hand_are_no_fault_of_the_user(yard: Yard) -> None:
    job = yard.submit("true")
    joborch.remove_tree(yard.folder(job))
    job = yard.run(job)
    assert (job.status, job.cause) == (Status.FAILED, "infrastructure"), job.reason


def test_a_payload_that_cannot_be_started(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    job, other = yard.submit("true"), yard.submit("true")
    real = yard.client.executor.start

    def start(started: Job) -> str:
        if started.id == job.id:
            raise OSError(12, "Cannot allocate memory")
        return real(started)

    monkeypatch.setattr(yard.client.executor, "start", start)
    yard.run(other)
    assert (yard[job].status, yard[job].cause) == (Status.FAILED, "infrastructure")
    assert "annot allocate memory" in yard[job].reason
    assert yard[other].status is Status.COMPLETED


HOSTILE = {
    "a fifo for a script": "rm run.sh; mkfifo run.sh; exit 1",
    "a fifo for standard error": "rm ../stderr; mkfifo ../stderr; exit 1",
    "a folder for standard error": "rm ../stderr; mkdir ../stderr; exit 1",
    "a fifo for the exit file": "rm ../exit.json; mkfifo ../exit.json; exit 1",
    "a folder for the exit file": "rm ../exit.json; mkdir ../exit.json; exit 1",
    "a link for the exit file": "ln -sf exit.json ../exit.json; exit 1",
    "nothing at all": "rm -rf ../* .[a-z]*; exit 1",
}


@pytest.mark.parametrize("script", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_payload_stops_no_other(script: str, yard: Yard) -> None:
    hostile, other = yard.submit(script), yard.submit("echo fine")
    run_tick(yard.client)
    for job in (hostile, other):
        yard.wait(job)
    got = soon(lambda: run_tick(yard.client), yard.data.jobs)
    assert not isinstance(got, Exception), got
    assert yard[other].status is Status.COMPLETED
    soon(lambda: run_tick(yard.client), yard.data.jobs)
    assert yard[hostile].status is Status.FAILED
    soon(lambda: ask(yard.client, "GET", f"/retrieve_partial/{hostile.id}"), yard.data.jobs)
    assert yard.submit("true").status is Status.PREPARED


# == Ending ==


def test_what_shall_end_is_ended_with_all_its_processes(yard: Yard) -> None:
    job, other = yard.submit("setsid bash -c 'READY; BLOCK' & wait"), yard.submit("READY; BLOCK")
    yard.ready(job)
    yard.ready(other)
    assert yard.store.request_kill(job.id, Cause.CANCELLED)
    assert end_tick(yard.client)
    assert not end_tick(yard.client)
    assert (yard[job].status, yard[job].cause) == (Status.KILLED, "cancelled")
    assert not processes_below(yard.folder(job))
    assert yard[other].status is Status.RUNNING
    run_tick(yard.client)
    assert (yard[job].status, yard[other].status) == (Status.KILLED, Status.RUNNING)


def test_what_has_not_started_never_does(yard: Yard) -> None:
    job = yard.submit("echo ran > ../../ran")
    yard.store.request_kill(job.id, Cause.CANCELLED)
    end_tick(yard.client)
    run_tick(yard.client)
    assert yard[job].status is Status.KILLED
    assert not (yard.data.jobs / "ran").exists()


def test_a_wish_that_comes_between_row_and_start(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says Running, nothing runs yet: an end that is told then must not be followed by a start."""
    job = yard.submit("READY; BLOCK")
    real, ending = yard.client.executor.start, list[threading.Thread]()

    def start(started: Job) -> str:
        yard.store.request_kill(job.id, Cause.CANCELLED)
        ending.append(threading.Thread(target=end_tick, args=(yard.client,)))
        ending[0].start()
        ending[0].join(3)
        return real(started)

    monkeypatch.setattr(yard.client.executor, "start", start)
    run_tick(yard.client)
    ending[0].join(20)
    for _ in range(3):
        end_tick(yard.client)
        run_tick(yard.client)
    assert yard[job].status is Status.KILLED
    assert not processes_below(yard.folder(job))


def test_what_does_not_end_is_tried_again(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    job = yard.ready(yard.submit("READY; BLOCK"))
    yard.store.request_kill(job.id, Cause.CANCELLED)

    def refuse(_: Job) -> None:
        raise StillRunning("payload 1: its processes do not end after KILL")

    with monkeypatch.context() as patched:
        patched.setattr(yard.client.executor, "cancel", refuse)
        assert end_tick(yard.client), "others may be waiting for their end"
    assert yard[job].status is Status.RUNNING
    assert not end_tick(yard.client), "it was tried a moment ago"
    yard.clock.pass_s(1.0)
    assert end_tick(yard.client)
    assert yard[job].status is Status.KILLED


def test_two_ends_at_once(yard: Yard) -> None:
    jobs = [yard.submit("trap '' TERM; READY; BLOCK") for _ in range(2)]
    for job in jobs:
        yard.ready(job)
        yard.store.request_kill(job.id, Cause.CANCELLED)
    together(2, lambda _: end_tick(yard.client))
    assert {yard[job].status for job in jobs} == {Status.KILLED}


def test_a_payload_over_its_time_is_ended_and_says_so(yard: Yard) -> None:
    job = yard.ready(yard.submit("echo busy >&2; READY; BLOCK", X_Joborch_Timeout="60"))
    unlimited = yard.ready(yard.submit("READY; BLOCK"))
    yard.clock.pass_s(59)
    limit_tick(yard.client)
    assert not end_tick(yard.client)
    yard.clock.pass_s(2)
    limit_tick(yard.client)
    limit_tick(yard.client)
    assert end_tick(yard.client)
    assert (yard[job].status, yard[job].cause) == (Status.FAILED, "limit")
    assert "time limit of 60 s" in yard[job].reason and '"busy"' in yard[job].reason
    assert ask(yard.client, "GET", f"/retrieve/{job.id}").json["killed"] is False
    assert yard[unlimited].status is Status.RUNNING


def test_a_script_that_ended_in_time_is_not_called_too_slow(yard: Yard) -> None:
    """Its end stands on disk; that the client looks late is not its fault."""
    job = yard.ready(yard.submit("READY; BLOCK", X_Joborch_Timeout="60"))
    yard.go(job)
    yard.clock.pass_s(3600)
    limit_tick(yard.client)
    run_tick(yard.client)
    end_tick(yard.client)
    assert yard[job].status is Status.COMPLETED, yard[job].reason


@pytest.mark.parametrize("hours", [-100, -1, 1, 100])
def test_whoever_sets_the_clock_ends_no_payload(hours: int, yard: Yard) -> None:
    """The time limit counts what has passed, also over a restart of the client."""
    job = yard.ready(yard.submit("READY; BLOCK", X_Joborch_Timeout="60"))
    yard.clock.pass_s(30)
    yard.clock.set_s(hours * 3600)
    yard.restart()
    limit_tick(yard.client)
    assert not end_tick(yard.client)
    yard.clock.pass_s(31)
    limit_tick(yard.client)
    assert end_tick(yard.client)
    assert yard[job].cause == "limit"


def test_the_time_of_a_payload_begins_when_it_is_started(yard: Yard) -> None:
    """Not when the client, which then died for an hour, was about to start it."""
    job = yard.submit("READY; BLOCK", X_Joborch_Timeout="60")
    yard.store.move(job, Status.RUNNING, "", started_at=yard.clock.wall())
    yard.clock.pass_s(3600)
    yard.restart()
    (yard.folder(job) / "ready").read_text()
    limit_tick(yard.client)
    assert not end_tick(yard.client)
    yard.go(job)
    yard.until(job, Status.COMPLETED)


def test_output_is_bounded_while_it_is_written(data: DataFolder) -> None:
    yard = Yard(data, JOBORCH_LOG_LIMIT="64K")
    loud, hostile = yard.submit("head -c 4M /dev/zero; READY; BLOCK"), yard.submit("ln -sf /dev/null ../stdout; READY; BLOCK")
    yard.ready(hostile)
    yard.ready(loud)
    for _ in range(2):
        limit_tick(yard.client)
    kept = disk_bytes(yard.folder(loud))
    with (yard.folder(loud) / "stdout").open("rb") as output:
        head = output.read(32 * 1024)
    yard.close()
    assert kept < 256 * 1024, "one payload that hides its output from us must not free all others of their bound"
    assert head == b"\0" * 32 * 1024


def test_outputs_of_many_payloads_are_bounded_in_turn(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick measures only some of them: those that come next, however many there are then."""
    looked: list[str] = []
    replace(monkeypatch, "MEASURED_AT_ONCE", 2)
    replace(monkeypatch, "bound_outputs", lambda _, folder: looked.append(folder))
    limit_tick(yard.client)
    assert looked == [], "nothing runs"
    jobs = [yard.submit() for _ in range(5)]
    for job in jobs:
        assert yard.store.move(job, Status.RUNNING, "")
    for _ in range(5):
        limit_tick(yard.client)
    assert looked == [str(yard.folder(job)) for job in [*jobs, *jobs]]
    assert yard.store.move(yard[jobs[0]], Status.FAILED, "")
    assert yard.store.move(yard[jobs[1]], Status.FAILED, "")
    looked.clear()
    for _ in range(2):
        limit_tick(yard.client)
    assert {str(yard.folder(job)) for job in jobs[2:]} <= set(looked)


# == Started again ==


def test_payloads_are_taken_up_as_they_are(yard: Yard) -> None:
    running, ends = yard.submit("READY; BLOCK"), yard.submit("READY; BLOCK; exit 3")
    yard.ready(running)
    yard.ready(ends)
    pid = int((yard[ends].handle or "").split()[0])
    yard.store.close()
    with yard.opened(ends):
        wait_for(yard.client.executor.children[pid].has_ended, 30, "the end of the wrapper")  # type: ignore[attr-defined]
    yard.restart()
    run_tick(yard.client)
    assert [yard[job].status for job in (running, ends)] == [Status.RUNNING, Status.FAILED]
    assert yard[ends].exit_code == 3
    yard.go(running)
    yard.until(running, Status.COMPLETED)


def test_after_another_boot_nothing_is_trusted_that_may_not_be_on_the_disk(yard: Yard) -> None:
    """Files that were received or written shortly before the power went may be empty now: the server has another attempt made."""
    old = yard.submit("echo old")
    yard.until(old, Status.COMPLETED)
    yard.clock.pass_s(joborch.SYNC_AFTER_S)
    joborch.sync_tick(yard.client)
    fresh, fetched = yard.submit("echo fresh"), yard.submit("echo fetched")
    for job in (fresh, fetched):
        yard.until(job, Status.COMPLETED)
    joborch.confirm(yard.client, str(fetched.id))
    waits = yard.submit("true")
    yard.clock.reboot()
    yard.restart()
    assert (yard[waits].status, yard[waits].cause) == (Status.FAILED, "infrastructure")
    assert yard[fresh].status is Status.CLEANED
    assert "restarted" in yard[waits].reason and yard[waits].reason == yard[fresh].reason
    assert [yard[job].status for job in (old, fetched)] == [Status.COMPLETED] * 2


def test_results_that_nobody_fetches_are_brought_to_the_disk_once(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    replace(monkeypatch, "sync_file_system", synced.append)
    job = yard.submit("true")
    yard.until(job, Status.COMPLETED)
    joborch.sync_tick(yard.client)
    assert synced == [], "most are fetched at once"
    yard.clock.pass_s(joborch.SYNC_AFTER_S)
    for _ in range(2):
        joborch.sync_tick(yard.client)
    assert synced == [yard.data.jobs]
    assert yard[job].synced == 1


@pytest.mark.parametrize("when", ["before the start", "after the start"])
def test_a_crash_about_the_start(when: str, yard: Yard) -> None:
    """The mark is in the row, the handle is not: what never ran is started, what ran is found; once, in both cases."""
    job = yard.submit("echo ran >> ../../count; READY; BLOCK")
    yard.store.move(job, Status.RUNNING, "", started_at=yard.clock.wall())
    if when == "after the start":
        yard.client.executor.start(yard[job])
        (yard.folder(job) / "ready").read_text()
    yard.restart()
    if when == "before the start":
        (yard.folder(job) / "ready").read_text()
    run_tick(yard.client)
    assert yard[job].status is Status.RUNNING
    assert (yard.data.jobs / "count").read_text() == "ran\n"
    yard.go(job)
    yard.until(job, Status.COMPLETED)


def test_a_folder_that_went_while_the_client_was_down_stops_no_start(yard: Yard) -> None:
    job, other = yard.submit("true"), yard.submit("true")
    yard.store.move(job, Status.RUNNING, "", started_at=yard.clock.wall())
    joborch.remove_tree(yard.folder(job))
    yard.restart()
    yard.run(other)
    assert (yard[job].status, yard[job].cause) == (Status.FAILED, "infrastructure")
    assert yard[other].status is Status.COMPLETED


def test_what_shall_end_is_not_started_again(yard: Yard) -> None:
    job = yard.submit("echo ran > ../../ran; READY; BLOCK")
    yard.store.move(job, Status.RUNNING, "", started_at=yard.clock.wall())
    yard.store.request_kill(job.id, Cause.CANCELLED)
    yard.restart()
    end_tick(yard.client)
    assert yard[job].status is Status.KILLED
    assert not (yard.data.jobs / "ran").exists()


def test_with_a_database_in_memory_orphans_are_ended(data: DataFolder) -> None:
    yard = Yard(data, DB_PATH=":memory:")
    job = yard.ready(yard.submit("setsid bash -c 'READY; BLOCK' & wait"))
    pids, instance = processes_below(yard.folder(job)), yard.client.instance
    assert len(pids) >= 2
    yard.restart()
    wait_for(lambda: not any(map(alive, pids)), what="the orphans to end")
    assert leavings(yard) == []
    assert yard.client.instance != instance
    assert yard.submit("true").id == 1
    yard.close()


def test_the_instance_is_that_of_the_database(yard: Yard) -> None:
    before = yard.client.instance
    yard.restart()
    assert yard.client.instance == before
    yard.store.close()
    Path(yard.environment["DB_PATH"]).unlink()
    yard.open()
    assert yard.client.instance != before


# == Events ==


def statuses(said: dict[str, Any]) -> list[tuple[int, str]]:
    """Payloads and their states, as events tell them."""
    return [(payload["id"], payload["status"]) for payload in said["payloads"]]


def test_events_tell_all_that_was_not_fetched_and_then_what_changes(yard: Yard) -> None:
    jobs = [yard.submit("true"), yard.submit("exit 3"), yard.submit("READY; BLOCK")]
    yard.run(jobs[0])
    yard.run(jobs[1])
    yard.ready(jobs[2])
    yard.zip(jobs[0])
    first = yard.events("since=0")
    assert sorted(statuses(first)) == [(jobs[1].id, "Failed"), (jobs[2].id, "Running")]
    assert (first["instance"], first["slots"]) == (yard.client.instance, 2)
    assert yard.events(f"since={first['next']}")["payloads"] == []
    yard.go(jobs[2])
    yard.wait(jobs[2])
    run_tick(yard.client)
    then = yard.events(f"since={first['next']}&wait=20")
    assert statuses(then) == [(jobs[2].id, "Completed")]
    assert then["next"] > first["next"]
    (told,) = then["payloads"]
    assert (told["uuid"], told["attempt"], told["exit_code"], told["cause"]) == (jobs[2].uuid, 1, 0, None)


def test_a_small_result_comes_with_the_news(yard: Yard) -> None:
    """Whole, with its digest; one that is large, or more than plain files, is to be fetched."""
    scripts = [
        "echo out",
        "echo err >&2; exit 3",
        "head -c 100000 /dev/zero",
        "mkdir d",
        "ln -s run.sh link",
        "rm -r $PWD",
        "touch {1..20}",
    ]
    since = yard.events()["next"]
    jobs = [yard.run(yard.submit(script)) for script in scripts]
    told = {payload["id"]: payload for payload in yard.events(f"since={since}")["payloads"]}
    assert ["archive" in told[job.id] for job in jobs] == [True, True, False, False, False, False, False]
    content = base64.b64decode(told[jobs[0].id]["archive"])
    assert hashlib.sha256(content).hexdigest() == told[jobs[0].id]["sha256"]
    read = zipfile.ZipFile(io.BytesIO(content))
    assert (read.testzip(), read.read(".joborch/stdout")) == (None, b"out\n")
    assert yard[jobs[0]].fetched_at is None, "that it was sent is not that it arrived"


def test_what_a_server_confirms_need_not_be_kept_for_it(yard: Yard) -> None:
    """By the ids of this instance alone; rubbish among them is passed over."""
    jobs = [yard.run(yard.submit()) for _ in range(3)]
    ids = ",".join(str(job.id) for job in jobs[:2])
    yard.events(f"since=0&instance=another&done={ids}")
    yard.events(f"since=0&done={ids}")
    assert [yard[job].fetched_at for job in jobs] == [None] * 3
    yard.events(f"since=0&instance={yard.client.instance}&done={ids},x,-1,,99999999999999999999,12345")
    assert [yard[job].fetched_at is not None for job in jobs] == [True, True, False]
    assert statuses(yard.events()) == [(jobs[2].id, "Completed")]


def test_a_payload_that_runs_cannot_be_confirmed(yard: Yard) -> None:
    """Nobody has a result that is not there yet."""
    job = yard.ready(yard.submit("READY; BLOCK"))
    yard.events(f"since=0&instance={yard.client.instance}&done={job.id}")
    yard.go(job)
    run_tick(yard.client)
    assert statuses(yard.events()) == [(job.id, "Completed")]


def test_a_caller_who_knew_another_instance_is_told_all(yard: Yard) -> None:
    job = yard.run(yard.submit("true"))
    assert statuses(yard.events("since=1000&instance=another&wait=20")) == [(job.id, "Completed")]


def test_a_caller_waits_for_a_change(yard: Yard) -> None:
    job, got = yard.submit("true"), list[Any]()
    since = yard.events()["next"]
    waiter = threading.Thread(target=lambda: got.append(yard.events(f"since={since}&wait=30")))
    waiter.start()
    wait_for(lambda: yard.store.core.waiters, what="the caller to wait")
    yard.run(job)
    waiter.join(20)
    assert statuses(got[0]) == [(job.id, "Completed")], "that it started is not worth an answer of its own"


def test_nothing_is_lost_between_the_list_and_its_number(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that comes while a list is made is in the list, or in the next one."""
    job = yard.submit("true")
    yard.store.move(job, Status.RUNNING, "")
    real = Store.jobs

    def jobs(store: Store, sql: str, **values: Any) -> list[Job]:
        monkeypatch.setattr(Store, "jobs", real)
        found = real(store, sql, **values)
        yard.store.move(yard[job], Status.COMPLETED, "meanwhile")
        return found

    monkeypatch.setattr(Store, "jobs", jobs)
    first = yard.events("since=0")
    told = statuses(first) + statuses(yard.events(f"since={first['next']}"))
    assert (job.id, "Completed") in told


def test_no_more_callers_wait_than_there_are_places(yard: Yard) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(joborch.EVENTS_PLACES):
            assert stack.enter_context(yard.client.places.place())
        assert ask(yard.client, "GET", "/events?since=1&wait=20").status == 503
        assert ask(yard.client, "GET", "/events?since=1&wait=0").status == 200


# == Results ==


def test_a_result_is_the_work_folder_and_the_streams(yard: Yard) -> None:
    job = yard.run(yard.submit("echo out; echo err >&2; mkdir d; mv in d/", {"in": b"x"}))
    read = yard.zip(job)
    assert {name: read.read(name) for name in read.namelist() if name != "run.sh"} == {
        "d/in": b"x", ".joborch/stdout": b"out\n", ".joborch/stderr": b"err\n",
    }  # fmt: skip
    assert yard[job].fetched_at is not None


def test_unchanged_inputs_stay_out_where_the_service_says_so(yard: Yard) -> None:
    script = "echo more >> changed; echo new > new; rm gone"
    files = {"same": b"x", "changed": b"x", "gone": b"x", "two words": b"x"}
    read = yard.zip(yard.run(yard.submit(script, files, X_Joborch_Return_Inputs="0")))
    assert {name for name in read.namelist() if not name.startswith(".joborch/")} == {"changed", "new"}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"same": 3}', '{"same": null}', "[" * 60_000])
def test_a_list_of_inputs_that_the_script_spoiled(content: str, yard: Yard) -> None:
    """The result is told all the same."""
    job = yard.run(yard.submit(f"printf %s '{content[:100]}' > ../inputs.json", {"same": b"x"}, X_Joborch_Return_Inputs="0"))
    (yard.folder(job) / "inputs.json").write_text(content)
    assert "same" in yard.zip(job).namelist()


@pytest.mark.parametrize("made", ["mkfifo", "mkdir", "ln -s /etc/passwd", "ln -s ../started.1", "ln -s stdout"])
def test_streams_that_the_script_replaced_are_not_followed(made: str, yard: Yard) -> None:
    job = yard.run(yard.submit(f"rm ../stdout; {made} ../stdout; echo kept > file"))
    got = soon(lambda: yard.zip(job), yard.data.jobs)
    assert isinstance(got, zipfile.ZipFile), got
    assert got.read("file") == b"kept\n"
    assert ".joborch/stdout" not in got.namelist() or got.read(".joborch/stdout") == b""


@pytest.mark.parametrize("made", ["ln -s /etc", "mkfifo", "touch", "true"])
def test_a_work_folder_that_the_script_replaced_is_not_followed(made: str, yard: Yard) -> None:
    job = yard.run(yard.submit(f"cd ..; rm -r work; {made} work; echo out"))
    assert (yard[job].status, yard[job].cause) == (Status.FAILED, "infrastructure"), "and it is no empty result"
    got = soon(lambda: yard.zip(job, "retrieve_partial"), yard.data.jobs)
    assert isinstance(got, zipfile.ZipFile), got
    assert {name for name in got.namelist() if not name.startswith(".joborch/")} == set()
    assert got.read(".joborch/stdout") == b"out\n"


def test_a_payload_id_of_another_attempt_is_not_known(yard: Yard) -> None:
    job = yard.run(yard.submit("true"))
    for method, path in (("GET", "retrieve"), ("GET", "retrieve_partial"), ("POST", "kill")):
        assert ask(yard.client, method, f"/{path}/{job.id}", X_Joborch_Mark=f"{job.uuid}.2").status == 404
        assert ask(yard.client, method, f"/{path}/{job.id}", X_Joborch_Mark=job.mark).status == 200
        assert ask(yard.client, method, f"/{path}/99").status == 404


def test_kill_answers_when_nothing_runs_any_more(yard: Yard) -> None:
    job = yard.ready(yard.submit("READY; BLOCK"))
    loop = yard.client.loops["end"]
    loop.start()
    said = ask(yard.client, "POST", f"/kill/{job.id}")
    assert (said.status, said.json["status"], said.json["killed"]) == (200, "Killed", True)
    assert not processes_below(yard.folder(job))
    loop.stop()
    yard.client.pool.stop(20)
    done = yard.run(yard.submit("true"))
    said = ask(yard.client, "POST", f"/kill/{done.id}")
    assert (said.status, said.json["status"], said.json["killed"]) == (200, "Completed", False)


def test_health_counts_payloads(yard: Yard) -> None:
    yard.ready(yard.submit("READY; BLOCK"))
    yard.submit("true")
    said = ask(yard.client, "GET", "/health").json
    assert (said["status"], said["executor"], said["slots"], said["running"], said["queued"]) == ("ok", "local", 2, 1, 1)
    yard.store.db.execute("DROP TABLE heartbeat")
    said = ask(yard.client, "GET", "/health")
    assert (said.status, said.json["status"], said.json["database"]) == (503, "error", "error")


# == Cleaning ==


def test_results_that_nobody_fetched_are_kept_four_times_as_long(yard: Yard) -> None:
    fetched, not_fetched, running = yard.run(yard.submit()), yard.run(yard.submit()), yard.ready(yard.submit("READY; BLOCK"))
    yard.zip(fetched)
    yard.clock.pass_s(172_900)
    clean_tick(yard.client)
    assert [yard[job].status for job in (fetched, not_fetched, running)] == [Status.CLEANED, Status.COMPLETED, Status.RUNNING]
    assert not yard.folder(fetched).exists()
    yard.clock.pass_s(3 * 172_800)
    clean_tick(yard.client)
    assert [yard[job].status for job in (not_fetched, running)] == [Status.CLEANED, Status.RUNNING]
    assert ask(yard.client, "GET", f"/retrieve/{fetched.id}").json["status"] == "Cleaned"
    assert ask(yard.client, "GET", f"/retrieve_partial/{fetched.id}").status == 404


def test_many_that_nobody_fetched_keep_no_other_from_being_cleaned(yard: Yard) -> None:
    """One of two servers is away for days: what the other has fetched goes all the same."""
    jobs = [yard.store.add(new_job(), "submitted") for _ in range(510)]
    for job in jobs:
        yard.store.move(job, Status.FAILED, "")
        yard.clock.pass_s(0.001)
    yard.store.note(statements.JOB_FETCHED, id=jobs[-1].id, now=yard.clock.wall())
    yard.clock.pass_s(172_900)
    clean_tick(yard.client)
    assert yard[jobs[-1]].status is Status.CLEANED


def test_sweep_never_touches_a_payload_that_has_not_ended(yard: Yard) -> None:
    """Also where another attempt of the same job was cleaned here, or has not ended."""
    early = yard.submit("READY; BLOCK", X_Joborch_Uuid=UUID)
    yard.ready(early)
    late = yard.run(yard.submit("true", X_Joborch_Uuid=UUID, X_Joborch_Attempt="2"))
    joborch.remove_tree(yard.folder(late))
    yard.store.move(late, Status.CLEANED, "")
    sweep(yard.client)
    assert yard.folder(early).exists()
    assert yard[early].status is Status.RUNNING


def test_sweep_leaves_what_is_being_received(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the files and the row there is a moment; the sweeper may come in it."""
    real = yard.store.add

    def add(*arguments: Any) -> Job:
        sweep(yard.client)
        return real(*arguments)

    monkeypatch.setattr(yard.store, "add", add)
    job = yard.submit("true")
    assert yard.run(job).status is Status.COMPLETED


def test_sweep_removes_what_a_crash_left(yard: Yard) -> None:
    job = yard.submit("true")
    (yard.data.jobs / f"{UUID}.1").mkdir()
    sweep(yard.client)
    assert [path.name for path in yard.data.jobs.iterdir()] == [job.mark]


# == Both halves ==


def test_the_way_of_a_job_tick_by_tick(tmp_path: Path, data: DataFolder) -> None:
    """Each tick does its one step, and done twice does no harm."""
    with Halves(tmp_path / "halves") as halves:
        job = halves.upload("echo out; echo $JOBORCH_JOB_ID > id; cat 'in put'", **{"in put": b"content"})
        link = halves.link
        send_next(halves.server, link)
        assert halves[job].status is Status.QUEUED, "nothing is sent to whom was never heard"
        joborch.get_tick(halves.server, link)
        for _ in range(2):
            send_next(halves.server, link)
            assert halves[job].status is Status.SUBMITTED
        halves.yard.run(halves.payload(job))
        for _ in range(2):
            joborch.get_tick(halves.server, link)
            assert halves[job].status is Status.SUBMITTED
        for _ in range(2):
            joborch.fetch_tick(halves.server, link)
            assert halves[job].status is Status.COMPLETED
        done = halves[job]
        assert (done.status, done.exit_code, done.client) == (Status.COMPLETED, 0, link.name)
        content = zipfile.ZipFile(halves.server.data.result(job.mark))
        assert content.read("id") == b"%d\n" % job.id
        assert content.read(".joborch/stdout") == b"out\ncontent"
        assert done.started_at is not None
        assert done.result_sha256 == hashlib.sha256(halves.server.data.result(job.mark).read_bytes()).hexdigest()
        targets = [row["target"] for row in halves.server.store.read(statements.HISTORY_GET, id=job.id)]
        assert targets == ["Queued", "Processing", "Submitted", "Completed"]


class Halves:
    """A server and a client in one process, over a real socket; a test calls the ticks of both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved = tempfile.tempdir, os.umask(0o022)
        self.stack, self.patch = contextlib.ExitStack(), pytest.MonkeyPatch()
        self.log = folder / "ran"

    def __enter__(self) -> Halves:
        server_data, client_data = (DataFolder(str(self.folder / name)) for name in ("server", "client"))
        for data in (server_data, client_data):
            data.open()
        self.yard = Yard(client_data, PORT=str(free_port()), JOBORCH_MIN_FREE="0")
        self.clock = self.yard.clock
        self.environment = {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{self.yard.environment['PORT']}", "SERVICE_EXAMPLE_TOKEN": "t"}
        self.environment.update({"DATA_PATH": str(server_data.path), "SERVICE_EXAMPLE_RUNS_PER_USER": "2", "SERVICE_EXAMPLE_MAX_RUNS": "3"})
        self.server_data = server_data
        replace(self.patch, "await_end", lambda *_: None)
        self.open_server()
        self.open_client()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
        self.stack.close()
        self.yard.close()
        self.server.store.close()
        for data in (self.server_data, self.yard.data):
            data.lock.close()
        tempfile.tempdir = self.saved[0]
        os.umask(self.saved[1])

    def open_server(self) -> None:
        """Start the server: what was being sent is Unknown, as `open_node` has it."""
        store = Store(str(self.server_data.path / "server.db"), "server", self.clock)
        self.server = Server(load_config("server", {}, self.environment), store, self.server_data, self.clock)
        for job in store.jobs(statements.CUT_OFF_SENDING):
            store.move(job, Status.UNKNOWN, "the server was restarted")

    def open_client(self) -> None:
        """Serve the client. No caller waits for an end there: the tick that brings it is a test's to call, and the clock stands still."""
        self.yard.client.places = joborch.ThreadLimit(0)
        self.stack.enter_context(serving(self.yard.client))

    def close_client(self) -> None:
        """Serve it no more."""
        self.stack.close()

    @property
    def link(self) -> joborch.Link:
        """The way to the client."""
        (found,) = self.server.links.values()
        return found

    def __getitem__(self, job: Job) -> Job:
        found = self.server.store.get(job.id)
        assert found is not None
        return found

    def payload(self, job: Job) -> Job:
        """The job's payload at the client."""
        found = self.yard.store.job(statements.JOB_BY_MARK, uuid=job.uuid, attempt=self[job].attempt)
        assert found is not None
        return found

    def upload(self, script: str, user_id: int = 1, **files: bytes) -> Job:
        """A queued job; its script notes that it ran."""
        new = new_job(user_id=user_id)
        folder = self.server_data.job(new.uuid)
        folder.mkdir()
        noted = f"echo $JOBORCH_MARK >> {self.log}\n{script}\n"
        for name, content in {"run.sh": noted.encode(), **files}.items():
            (folder / name).write_bytes(content)
        return self.server.store.add(new, "uploaded")


class AnyOrder(RuleBasedStateMachine):
    """Ticks of both halves in any order, with restarts, ends and time between: every job ends once, each attempt ran once."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="joborch-test-"))
        self.halves = Halves(self.folder).__enter__()
        self.client_is_up = True
        self.wished: set[int] = set()

    @rule(
        target=jobs,
        script=st.sampled_from(["true", "exit 3", "exec 3<> $TMPDIR/go; read -u 3", "kill -9 $PPID"]),
        user_id=st.integers(1, 2),
    )
    def upload(self, script: str, user_id: int) -> Job:
        """A job: one that succeeds, one that fails, one that goes on until it is ended, one that ends its wrapper."""
        if "read" in script:
            script = "mkfifo $TMPDIR/go; " + script
        return self.halves.upload(script, user_id)

    @rule(tick=st.sampled_from(["dispatch", "send", "get", "fetch", "kill", "watch"]))
    def server_tick(self, tick: str) -> None:
        """One tick of the server."""
        halves = self.halves
        if tick in ("watch", "dispatch"):
            getattr(joborch, f"{tick}_tick")(halves.server)
        else:
            getattr(joborch, f"{tick}_tick")(halves.server, halves.link)

    @rule(tick=st.sampled_from(["run", "end", "limit"]))
    def client_tick(self, tick: str) -> None:
        """One tick of the client."""
        if self.client_is_up:
            getattr(joborch, f"{tick}_tick")(self.halves.yard.client)

    @rule()
    def one_payload_ends(self) -> None:
        """Wait for those that end by themselves."""
        for payload in self.halves.yard.store.jobs(statements.PAYLOADS_IN, status="Running", limit=99) if self.client_is_up else ():
            if not (self.halves.yard.folder(payload) / "tmp/go").exists():
                self.halves.yard.wait(payload)

    @rule(job=jobs)
    def terminate(self, job: Job) -> None:
        """Somebody asks for the end of a job."""
        if self.halves.server.store.request_kill(job.id, Cause.CANCELLED):
            self.wished.add(job.id)
        joborch.kill_queued(self.halves.server, job.id)

    @rule(seconds=st.sampled_from([1.0, 20.0, 100.0]))
    def time_goes_by(self, seconds: float) -> None:
        """For both."""
        self.halves.clock.pass_s(seconds)

    @rule()
    def restart_the_server(self) -> None:
        """It is killed and started again."""
        self.halves.server.store.close()
        self.halves.open_server()

    @rule()
    def restart_the_client(self) -> None:
        """It is killed, or started again."""
        if self.client_is_up:
            self.halves.close_client()
        else:
            self.halves.yard.restart()
            self.halves.open_client()
        self.client_is_up = not self.client_is_up

    @invariant()
    def quotas_hold(self) -> None:
        """At every step."""
        busy = [job for job in all_jobs(self.halves.server.store) if job.status in BUSY]
        assert len(busy) <= 3
        assert all(count <= 2 for count in Counter(job.user_id for job in busy).values())

    def drain(self) -> list[Job]:
        """Let all come to its end: endless scripts are terminated first."""
        halves = self.halves
        if not self.client_is_up:
            self.restart_the_client()
        for _ in range(400):
            jobs = all_jobs(halves.server.store)
            if all(job.status in OVER for job in jobs):
                return jobs
            for job in jobs:
                if b"mkfifo" in (halves.server_data.job(job.uuid) / "run.sh").read_bytes():
                    self.terminate(job)
            for tick in ("watch", "get", "dispatch", "send", "kill", "fetch"):
                self.server_tick(tick)
            for tick in ("run", "end", "limit"):
                self.client_tick(tick)
            self.one_payload_ends()
            self.time_goes_by(1.0)
        raise AssertionError(f"not all came to an end: {[(job.id, str(job.status), job.reason) for job in jobs]}")

    def teardown(self) -> None:
        """All comes to an end, and the ends are true."""
        try:
            jobs = self.drain()
            ran = Counter(self.halves.log.read_text().split() if self.halves.log.exists() else ())
            assert set(ran.values()) <= {1}, f"attempts that ran more than once: {ran}"
            for job in jobs:
                self.check(job, ran)
            assert not processes_below(self.halves.yard.data.jobs)
        finally:
            self.halves.__exit__()
            shutil.rmtree(self.folder)

    def check(self, job: Job, ran: Counter[str]) -> None:
        """What a job's end says of it."""
        script = (self.halves.server_data.job(job.uuid) / "run.sh").read_text()
        if job.status is Status.COMPLETED:
            assert "true" in script
            assert ran[job.mark] == 1
            content = self.halves.server_data.result(job.mark).read_bytes()
            assert hashlib.sha256(content).hexdigest() == job.result_sha256
            assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
        elif job.status is Status.KILLED:
            assert job.id in self.wished
        else:
            assert job.status is Status.FAILED
            assert "true" not in script or job.cause == "infrastructure"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(deadline=None, max_examples=12, stateful_step_count=40)


def test_what_our_server_sends_is_what_our_client_takes(yard: Yard, tmp_path: Path) -> None:
    """Also names that need every escape there is."""
    files = {"run.sh": b"true", 'quo"te é': b"1", "d/%22 back\\": b"2", "a b;c=d": b"3"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    body = FilesBody(tmp_path, list(files), with_digests=True)
    kind = f"multipart/form-data; boundary={body.boundary}"
    said = ask(yard.client, "POST", "/submit", b"".join(iter(body.read, b"")), Content_Type=kind)
    assert said.status == 200, said
    work = yard.folder(yard[said.json["id"]]) / "work"
    assert {str(path.relative_to(work)): path.read_bytes() for path in work.rglob("*") if path.is_file()} == files


def test_a_payload_by_a_part_name_alone(yard: Yard) -> None:
    said = submit_payload(
        yard.client, [part('form-data; name="d/run.sh"', b"true"), part("form-data; name*=utf-8''run.sh; filename=\"x\"", b"true")]
    )
    assert said.status == 200
    assert yard.run(yard[said.json["id"]]).status is Status.COMPLETED
