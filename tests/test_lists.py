"""`GET /jobs` and `GET /changes`: filters, cursors, waits, events; nothing is left out and nothing is shown twice."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import requests
from conftest import MakePair
from harness import clean_environment, replace, submit, wait_for, wait_status
from history import Reading, assert_proven, gather
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world import Desk, HandClock, a_service, ask, new_job, serving

import joborch
from joborch import BIGGEST, ENDED, Filter, Forgotten, Job, Status, Store
from joborch_base.store import RESTORE_ID_GAP

PATHS: list[tuple[Status, ...]] = [
    (),
    (Status.KILLED,),
    (Status.PROCESSING,),
    (Status.PROCESSING, Status.SUBMITTED, Status.COMPLETED),
    (Status.PROCESSING, Status.SUBMITTED, Status.RUNNING, Status.FAILED),
    (Status.PROCESSING, Status.SUBMITTED, Status.FAILED, Status.CLEANED),
]
NAMES = [None, "dock", "dock-2", "dockx", "fold", "Dock", "é"]


@dataclasses.dataclass
class Filled:
    """A store with jobs of every kind, and its rows as they are."""

    store: Store
    jobs: list[Job]
    moves: list[dict[str, Any]]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """Jobs whose moves are mixed; the clock goes on, and once back."""
    chance, clock = random.Random(5), HandClock()
    store = Store(str(tmp_path_factory.mktemp("filled") / "db"), "server", clock)
    store.set_limits({name: a_service(name) for name in "ab"})
    left: list[tuple[int, list[Status]]] = []
    for number in range(60):
        job = store.add(new_job(user_id=number % 3, service="ab"[number % 2], name=NAMES[number % 7]), "uploaded")
        left.append((job.id, list(PATHS[number % len(PATHS)])))
        clock.pass_s(10)
        if number == 30:
            clock.set_s(-95)
        for _ in range(2):
            job_id, path = chance.choice(left)
            if path:
                move(store, job_id, path.pop(0))
    while any(path for _, path in left):
        job_id, path = chance.choice([each for each in left if each[1]])
        clock.pass_s(1)
        move(store, job_id, path.pop(0))
    rows = store.read("SELECT seq, at, job_id AS id, source, target, reason FROM history ORDER BY seq")
    yield Filled(store, store.jobs("SELECT * FROM jobs ORDER BY id DESC"), [dict(row) for row in rows])
    store.close()


def move(store: Store, job_id: int, to: Status) -> None:
    """Move a job on; an end gets a cause."""
    job = store.get(job_id)
    assert job is not None
    cause = ["user", "limit"][job_id % 2] if to is Status.FAILED else job.cause
    assert store.move(job, to, f"to {to}", cause=cause)


BOUNDED = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
STATUS = st.lists(st.sampled_from([status.value for status in Status]), max_size=3, unique=True).map(lambda found: tuple(sorted(found)))


@st.composite
def filters(draw: st.DrawFn) -> Filter:
    """Any combination of filters; times are near those of the rows."""
    begin = HandClock().wall()
    moment = st.none() | st.integers(-20, 700).map(lambda late: begin + late)
    service, cause = draw(st.sampled_from([None, None, "a", "b"])), draw(st.sampled_from([None, None, "user", "limit"]))
    name = draw(st.sampled_from([None, None, "dock", "d", "dock-", "é", "zz"]))
    return Filter(draw(st.none() | st.integers(0, 3)), service, draw(STATUS), cause, name, draw(moment), draw(moment))


def fits(job: Job, of: Filter, at: float | None) -> bool:
    """Whether a filter shows a job, said plainly."""
    return (
        of.user_id in (None, job.user_id)
        and of.service in (None, job.service)
        and (not of.statuses or job.status.value in of.statuses or job.ended_as in of.statuses)
        and of.cause in (None, job.cause)
        and (of.name is None or (job.name or "").startswith(of.name))
        and (of.since is None or (at is not None and at >= of.since))
        and (of.until is None or (at is not None and at < of.until))
    )


def pages(first: Any, read: Callable[[Any], tuple[list[Any], Any]]) -> list[Any]:
    """What all pages of a list show, from a first cursor on."""
    found, cursor = [], first
    for _ in range(1000):
        page, following = read(cursor)
        found += page
        if following is None:
            return found
        assert following != cursor
        cursor = following
    raise AssertionError("the list does not end")


@pytest.fixture(params=[50_000, 7], ids=["in one go", "few rows a page"])
def examined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many rows a page may examine."""
    replace(monkeypatch, "EXAMINED_MOST", request.param)
    replace(monkeypatch, "NAMED_MOST", request.param // 2)
    return int(request.param)


def test_pages_are_what_a_scan_gives(filled: Filled, examined: int) -> None:
    """Whatever the filters: all pages together are each job once, the newest first."""

    @BOUNDED
    @given(filters(), st.integers(1, 70))
    def check(of: Filter, limit: int) -> None:
        found = pages(BIGGEST, lambda before: filled.store.page(of, limit, before))
        assert found == [job for job in filled.jobs if fits(job, of, job.created_at)]

    check()


def test_pages_by_end_are_what_a_scan_gives(filled: Filled, examined: int) -> None:
    @BOUNDED
    @given(filters(), st.integers(1, 70))
    def check(of: Filter, limit: int) -> None:
        found = pages((float("inf"), BIGGEST), lambda before: filled.store.page_by_end(of, limit, before))
        ended = [job for job in filled.jobs if job.ended_at is not None and fits(job, of, job.ended_at)]
        assert found == sorted(ended, key=lambda job: (job.ended_at, job.id), reverse=True)

    check()


def test_picked_jobs_are_what_a_scan_gives(filled: Filled) -> None:
    @BOUNDED
    @given(filters(), st.sets(st.integers(1, 70), max_size=20), st.booleans())
    def check(of: Filter, ids: set[int], by_end: bool) -> None:
        found = filled.store.pick(ids, of, by_end)
        of_these = [job for job in filled.jobs if job.id in ids and (job.ended_at is not None or not by_end)]
        assert found[::-1] == [job for job in of_these if fits(job, of, job.ended_at if by_end else job.created_at)]

    check()


def test_a_page_examines_few_rows(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter that nothing matches: the rows between two cursors are as many as a page may examine."""
    replace(monkeypatch, "EXAMINED_MOST", 7)
    page, following = filled.store.page(Filter(cause="infrastructure"), 100, BIGGEST)
    assert (page, following) == ([], filled.jobs[6].id)
    page, following = filled.store.page(Filter(user_id=1, cause="infrastructure"), 100, BIGGEST)
    assert (page, following) == ([], [job for job in filled.jobs if job.user_id == 1][6].id)


def fits_move(row: dict[str, Any], job: Job, of: Filter) -> bool:
    """Whether a filter shows a move, said plainly."""
    of_job = of._replace(statuses=(), cause=None, since=None, until=None)
    return (
        fits(job, of_job, None)
        and (not of.statuses or row["target"] in of.statuses)
        and (of.cause is None or (row["target"] in {end.value for end in ENDED} and job.cause == of.cause))
        and (of.since is None or row["at"] >= of.since)
        and (of.until is None or row["at"] < of.until)
    )


def test_changes_are_all_moves_in_order(filled: Filled, examined: int) -> None:
    """Whatever the filters and the size of a page: each move once, and the reader comes to the last one."""
    jobs, last = {job.id: job for job in filled.jobs}, filled.moves[-1]["seq"]

    @BOUNDED
    @given(filters(), st.integers(1, 70), st.none() | st.sets(st.integers(1, 70), max_size=10))
    def check(of: Filter, limit: int, ids: set[int] | None) -> None:
        def read(after: int) -> tuple[list[Any], int | None]:
            rows, following = filled.store.changes(of, limit, after, ids)
            return rows, None if following == last and not rows else following

        found = [{name: row[name] for name in filled.moves[0]} for row in pages(0, read)]
        assert found == [row for row in filled.moves if (ids is None or row["id"] in ids) and fits_move(row, jobs[row["id"]], of)]

    check()


def test_changes_of_forgotten_jobs_are_missed_openly(desk: Desk) -> None:
    """A reader that has seen all moves of the deleted job continues. Any other reader gets an error."""
    store = desk.store
    first, second = (store.add(new_job(), "uploaded") for _ in range(2))
    move(store, first.id, Status.KILLED)
    move(store, first.id, Status.CLEANED)
    cleaned = store.last_seq
    move(store, second.id, Status.KILLED)
    store.forget([first.id])
    with pytest.raises(Forgotten):
        store.changes(Filter(), 100, cleaned - 1)
    rows, following = store.changes(Filter(), 100, cleaned)
    assert ([row["id"] for row in rows], following) == ([second.id], store.last_seq)


def test_seq_rises_over_starts_and_restores(tmp_path: Path) -> None:
    """Also if the clock of steady time is behind, as after a restore of an old backup on a machine with a wrong clock."""
    path, clock = str(tmp_path / "db"), HandClock()
    store = Store(path, "server", clock)
    store.add(new_job(), "uploaded")
    high = store.last_seq + 10**15
    store.write(lambda db: db.execute("UPDATE history SET seq = ?", (high,)).rowcount)
    store.close()
    store = Store(path, "server", clock)
    store.add(new_job(), "uploaded")
    assert store.last_seq == high + 1
    store.close()
    restored = Store(str(tmp_path / "restored"), "server", clock)
    restored.renew(path)
    restored.close()
    restored = Store(str(tmp_path / "restored"), "server", clock)
    restored.add(new_job(), "uploaded")
    assert restored.last_seq > high + 3000 * 10**6
    restored.close()


def test_a_replaced_database_that_cannot_be_read_hinders_no_restore(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"no database" * 1000)
    for name in ("old", "missing"):
        store = Store(str(tmp_path / f"after-{name}"), "server", HandClock())
        store.renew(str(tmp_path / name))
        job = store.add(new_job(), "uploaded")
        assert (job.id, store.last_seq > 0) == (RESTORE_ID_GAP + 1, True)
        store.close()


# == HTTP ==


def listed(desk: Desk, **query: object) -> Any:
    """GET /jobs with these parameters; the answer's JSON."""
    said = ask(desk.server, "GET", f"/jobs?{urlencode(query)}")
    assert said.status == 200, said.body
    return said.json


def ids_of(said: Any) -> list[int]:
    return [job["id"] for job in said["jobs"]]


BAD: list[tuple[str, str, str]] = [
    ("user=7", "user", "did you mean user_id?"),
    ("stauts=Failed", "stauts", "did you mean status?"),
    ("status=failed", "status", "did you mean Failed?"),
    ("status=", "status", "give one of"),
    ("cause=nobody", "cause", "give one of user, limit, infrastructure, cancelled"),
    ("ids=1,x", "ids", "ids of jobs separated by commas"),
    ("ids=", "ids", "ids of jobs separated by commas"),
    ("ids=" + ",".join(map(str, range(1001))), "ids", "at most 1000"),
    ("since=yesterday", "since", "2026-11-28T14:30:00Z, 2026-11-28 or 2d"),
    ("since=2026-13-01", "since", "or 2d"),
    ("since=2026-11-28T25:00:00Z", "since", "or 2d"),
    ("since=2026-11-28T10:00", "since", "or 2d"),
    ("until=9999999999d", "until", "or 2d"),
    ("until=0000-01-01", "until", "or 2d"),
    ("since=0001-01-01T00:00:00%2B23:00", "since", "or 2d"),
    ("since=%D9%A2d", "since", "or 2d"),
    ("service=nobody", "service", "give one of example"),
    ("name=%00", "name", "printable"),
]
BAD_JOBS = [
    ("wait=5", "wait", "ids=41,42&wait=45"),
    ("wait=x", "wait", "seconds"),
    ("wait_for=some&ids=1", "wait_for", "any or all"),
    ("by=name", "by", "created or ended"),
    ("format=xml", "format", "json or csv"),
    ("before=0", "before", "`next` of the page before"),
    ("before=x", "before", "`next` of the page before"),
    ("before=9999999999999999999", "before", "`next` of the page before"),
    ("before=1.5_3", "before", "by another time"),
    ("before=3&by=ended", "before", "by another time"),
    ("limit=1001", "limit", "1000"),
]
BAD_CHANGES = [("after=-1", "after", "whole number"), ("after=x", "after", "whole number"), ("before=1", "before", "is not a parameter")]


@pytest.mark.parametrize(
    ("query", "field", "remedy"),
    [*(("/jobs?" + each, *rest) for each, *rest in BAD + BAD_JOBS), *(("/changes?" + each, *rest) for each, *rest in BAD + BAD_CHANGES)],
)
def test_bad_parameters_are_refused(query: str, field: str, remedy: str, desk: Desk) -> None:
    said = ask(desk.server, "GET", query)
    assert (said.status, said.json["field"]) == (400, field), said.json
    assert remedy in said.json["message"], said.json


def test_times_are_understood(desk: Desk) -> None:
    """A date is its begin in UTC; an offset may have lost its plus."""
    job, now = desk.upload(), desk.clock.wall()
    at = joborch.rfc3339(now) or ""
    date, earlier = at[:10], joborch.rfc3339(now - 60) or ""
    shifted = (joborch.rfc3339(now + 3600 - 5) or "")[:19] + "+01:00"
    for since in ("1s", "2d", date, earlier, earlier.lower(), earlier.replace("Z", "+00:00"), earlier.replace("Z", " 00:00"), shifted):
        assert ids_of(listed(desk, since=since)) == [job.id], since
        assert ids_of(listed(desk, until=since)) == [], since
    desk.clock.pass_s(100)
    assert (ids_of(listed(desk, since="90s")), ids_of(listed(desk, until="90s"))) == ([], [job.id])


COMBINED: dict[str, list[str]] = {
    "user_id": ["1", "-5"], "service": ["example"], "status": ["Failed", "Queued,Running,Cleaned"], "cause": ["limit"],
    "name": ["dock", "é"], "ids": ["1,2,3", "9" * 18], "since": ["2d"], "until": ["2030-01-01"], "by": ["created", "ended"],
    "format": ["json", "csv"],
}  # fmt: skip


def test_every_combination_of_filters_is_answered(desk: Desk) -> None:
    """All pairs of all values, and all filters at once."""
    desk.upload(name="dock")
    choices = [(name, value) for name, values in COMBINED.items() for value in values]
    queries = [dict(pair) for pair in itertools.combinations(choices, 2)] + [{name: values[0] for name, values in COMBINED.items()}]
    for query in queries:
        said = ask(desk.server, "GET", f"/jobs?{urlencode(query)}")
        assert said.status == 200, (query, said.body)
        moves = {name: value for name, value in query.items() if name not in ("by", "format")}
        assert ask(desk.server, "GET", f"/changes?after=0&{urlencode(moves)}").status == 200, query


def test_cursors_lead_through_all_jobs(desk: Desk) -> None:
    jobs = [desk.upload() for _ in range(5)]
    for job in (jobs[3], jobs[0], jobs[4]):
        desk.clock.pass_s(1)
        assert desk.store.move(desk[job], Status.KILLED, "")
    by_end = [jobs[4].id, jobs[0].id, jobs[3].id]
    newest = [job.id for job in reversed(jobs)]
    some = ",".join(str(job.id) for job in jobs)
    for query, wanted in (({}, newest), ({"ids": some}, newest), ({"by": "ended"}, by_end), ({"by": "ended", "ids": some}, by_end)):

        def read(before: Any, query: dict[str, str] = query) -> tuple[list[int], Any]:
            said = listed(desk, **query, limit=2, **({"before": before} if before else {}))
            return ids_of(said), said["next"]

        assert pages(None, read) == wanted, query


def test_each_row_says_what_it_waits_for(desk: Desk) -> None:
    jobs = [desk.upload(user_id=1), desk.upload(user_id=1), desk.upload(user_id=2)]
    for said, job in zip(listed(desk)["jobs"][::-1], jobs):
        whole = ask(desk.server, "GET", f"/jobs/{job.id}").json
        assert said["waiting_for"] and said["waiting_for"] == said["message"] == whole["waiting_for"]


def test_a_list_counts_only_some_of_the_jobs_ahead(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page stays fast if a user has queued thousands; one job is asked for its exact place."""
    replace(monkeypatch, "COUNTED_IN_LISTS", 2)
    jobs = [desk.upload(user_id=1) for _ in range(4)]
    desk.link.heard()
    assert "2 or more of your jobs are ahead of it" in listed(desk)["jobs"][0]["waiting_for"]
    whole = ask(desk.server, "GET", f"/jobs/{jobs[3].id}").json
    assert "3 of your jobs are ahead of it" in whole["waiting_for"] and whole["queue_position"] == 4


def test_a_cleaned_job_keeps_how_it_ended(desk: Desk) -> None:
    job = desk.with_client()
    assert desk.store.move(job, Status.FAILED, "exit status 3", cause="user", exit_code=3)
    assert desk.store.move(desk[job], Status.CLEANED, "old", row_reason="exit status 3")
    for query in ({"status": "Failed"}, {"status": "Failed,Killed", "by": "ended"}, {"cause": "user", "user_id": job.user_id}):
        (said,) = listed(desk, **query)["jobs"]
        shown = {name: said[name] for name in ("status", "ended_as", "reason", "cause", "exit_code")}
        assert shown == {"status": "Cleaned", "ended_as": "Failed", "reason": "exit status 3", "cause": "user", "exit_code": 3}


def test_csv_has_the_same_rows(desk: Desk) -> None:
    """Texts that a spreadsheet would run are not run there; the next page is in a header."""
    jobs = [desk.upload(name=name) for name in ('=HYPERLINK("http://x")', 'a,"b"', None, "-1")]
    said = ask(desk.server, "GET", "/jobs?format=csv&limit=3&service=example")
    assert said.headers["Content-Type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(said.body.decode())))
    assert [(row["id"], row["name"]) for row in rows] == [(str(jobs[3].id), "'-1"), (str(jobs[2].id), ""), (str(jobs[1].id), 'a,"b"')]
    link = re.fullmatch(r"<(/jobs\?.*)>; rel=\"next\"", said.headers["Link"])
    assert link is not None
    last = list(csv.DictReader(io.StringIO(ask(desk.server, "GET", link[1]).body.decode())))
    assert [row["name"] for row in last] == ['\'=HYPERLINK("http://x")']
    assert all(row["status"] == "Queued" and row["waiting_for"] for row in rows + last)


@pytest.mark.parametrize(("query", "ends_needed"), [("wait_for=any", 1), ("", 1), ("wait_for=any&ended=1", 1), ("wait_for=all", 2)])
def test_one_request_waits_for_many_jobs(query: str, ends_needed: int, desk: Desk) -> None:
    """It answers when as many as it needs have ended, and not before."""
    jobs = [desk.upload() for _ in range(4)]
    assert desk.store.move(desk[jobs[0]], Status.KILLED, "")
    ids, said = ",".join(str(job.id) for job in jobs[:3]), list[Any]()
    thread = threading.Thread(target=lambda: said.append(ask(desk.server, "GET", f"/jobs?ids={ids}&wait=45&{query}").json))
    thread.start()
    wait_for(lambda: desk.store.core.waiters, what="a caller that waits")
    assert desk.store.move(desk[jobs[3]], Status.KILLED, "another job")
    for count, job in enumerate(jobs[1:3]):
        assert (count < ends_needed) is (not said)
        assert desk.store.move(desk[job], Status.KILLED, "")
        if count + 1 == ends_needed:
            thread.join(60)
    assert not thread.is_alive()
    states = {job["id"]: job["status"] for job in said[0]["jobs"]}
    assert list(states.values()).count("Killed") == 1 + ends_needed


@pytest.mark.parametrize("query", ["wait_for=all", "wait_for=any", "wait_for=any&ended=1", "wait_for=any&ended=0"])
def test_a_wait_for_jobs_that_have_ended_answers_at_once(query: str, desk: Desk) -> None:
    """A job that does not exist has ended; a wait of an hour is cut, not refused."""
    job = desk.upload()
    assert desk.store.move(job, Status.KILLED, "")
    assert ids_of(ask(desk.server, "GET", f"/jobs?ids={job.id},999&wait=3600&{query}").json) == [job.id]


def test_ends_that_a_caller_does_not_know_are_told_at_once(desk: Desk) -> None:
    jobs = [desk.upload(), desk.upload()]
    assert desk.store.move(jobs[0], Status.KILLED, "")
    assert len(ids_of(ask(desk.server, "GET", f"/jobs?ids={jobs[0].id},{jobs[1].id}&wait=45&ended=0").json)) == 2


def test_changes_are_read_from_where_the_reader_was(desk: Desk) -> None:
    job = desk.with_client()
    said = ask(desk.server, "GET", "/changes?after=0").json
    assert [(each["id"], each["from"], each["to"]) for each in said["changes"]] == [
        (job.id, None, "Queued"), (job.id, "Queued", "Processing"), (job.id, "Processing", "Submitted"), (job.id, "Submitted", "Running"),
    ]  # fmt: skip
    assert said["changes"][-1]["seq"] == said["next"]
    now = ask(desk.server, "GET", "/changes").json
    assert now == {"changes": [], "next": said["next"]}
    assert desk.store.move(job, Status.FAILED, "too long", cause="limit")
    (end,) = ask(desk.server, "GET", f"/changes?after={now['next']}&wait=45").json["changes"]
    kept = {name: value for name, value in end.items() if name not in ("seq", "at")}
    assert kept == {
        "id": job.id, "user_id": 1, "service": "example", "from": "Running", "to": "Failed", "reason": "too long", "cause": "limit",
    }  # fmt: skip


def test_a_wait_for_changes_ends_with_the_first(desk: Desk) -> None:
    """Moves that its filters leave out do not end it."""
    after, said = ask(desk.server, "GET", "/changes").json["next"], list[Any]()
    thread = threading.Thread(target=lambda: said.append(ask(desk.server, "GET", f"/changes?after={after}&wait=45&user_id=2").json))
    thread.start()
    wait_for(lambda: desk.store.core.waiters, what="a reader that waits")
    desk.upload(user_id=1)
    assert not said
    job = desk.upload(user_id=2)
    thread.join(60)
    assert [each["id"] for each in said[0]["changes"]] == [job.id]


def test_a_reader_that_was_away_too_long_is_told(desk: Desk) -> None:
    job = desk.upload()
    assert desk.store.move(job, Status.KILLED, "")
    desk.store.forget([job.id])
    for headers in ({}, {"Accept": "text/event-stream"}):
        said = ask(desk.server, "GET", "/changes?after=0", **headers)
        assert (said.status, "without `after`" in said.json["message"]) == (410, True)
    assert ask(desk.server, "GET", f"/changes?after={desk.store.last_seq}").status == 200


def events_of(answer: requests.Response, wanted: int) -> list[dict[str, Any]]:
    """The next events of a stream, each with its id; comments are left out."""
    found, last_id = list[dict[str, Any]](), ""
    for line in answer.iter_lines():
        name, _, value = line.decode().partition(": ")
        last_id = value if name == "id" else last_id
        if name == "data":
            found.append({**json.loads(value), "id of event": last_id})
            if len(found) == wanted:
                break
    return found


def test_changes_come_as_events(desk: Desk) -> None:
    """They go on where the last connection broke, and a listener that leaves gives up its place."""
    with serving(desk.server) as url, requests.Session() as session:
        headers, job = {"Accept": "text/event-stream"}, desk.upload()
        with session.get(f"{url}/changes?after=0", headers=headers, stream=True, timeout=60) as answer:
            assert answer.headers["Content-Type"] == "text/event-stream"
            (first,) = events_of(answer, 1)
            assert (first["to"], first["id of event"]) == ("Queued", str(first["seq"]))
        assert desk.store.move(job, Status.KILLED, "")
        headers["Last-Event-ID"] = first["id of event"]
        with session.get(f"{url}/changes?after=0", headers=headers, stream=True, timeout=60) as answer:
            (second,) = events_of(answer, 1)
            assert (second["from"], second["to"]) == ("Queued", "Killed")
        places = desk.server.listeners.free

        def all_free() -> bool:
            desk.upload()  # a listener that sends something notices that its caller has left
            taken = [places.acquire(blocking=False) for _ in range(joborch.LISTENER_PLACES)]
            for _ in filter(None, taken):
                places.release()
            return all(taken)

        wait_for(all_free, 60, "the places of those who left")


def test_listeners_are_limited(desk: Desk) -> None:
    """A listener beyond the limit gets an error. Other requests are still answered."""
    headers, session = {"Accept": "text/event-stream"}, requests.Session()
    with serving(desk.server) as url, session:
        open_ones = [session.get(f"{url}/changes", headers=headers, stream=True, timeout=60) for _ in range(joborch.LISTENER_PLACES)]
        assert {answer.status_code for answer in open_ones} == {200}
        refused = session.get(f"{url}/changes", headers=headers, timeout=60)
        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        assert session.get(f"{url}/changes", timeout=60).status_code == 200
        job = desk.upload()
        assert {events_of(answer, 1)[0]["id"] for answer in open_ones} == {job.id}
        for answer in open_ones:
            answer.close()


def test_a_quiet_stream_has_comments(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """They carry how far the listener is, whatever its filters leave out."""
    lists = joborch.load_plugin("lists")
    monkeypatch.setattr(lists, "COMMENT_EVERY_S", 0.0)
    reader = lists.Reader(desk.server, joborch.Request({}), Filter(user_id=5), None, 1000)
    parts = lists.change_events(reader, desk.store.last_seq)
    assert next(parts) == f": moves of jobs\nid: {desk.store.last_seq}\n\n".encode()
    desk.upload(user_id=1)
    desk.clock.pass_s(1)
    seen = [next(parts)]
    while f"id: {desk.store.last_seq}\n".encode() not in seen[-1]:
        seen.append(next(parts))
    assert seen[-1].startswith(b": quiet\n")
    desk.server.stopping.set()
    with pytest.raises(joborch.CutOff):
        list(parts)


def test_a_user_sees_limits_and_what_is_left(desk: Desk) -> None:
    desk.restart(SERVICE_EXAMPLE_RUNS_PER_USER="3", JOBORCH_MAX_QUEUED_PER_USER="20")
    desk.with_client(user_id=7)
    desk.upload(user_id=7)
    said = ask(desk.server, "GET", "/users/7").json
    assert (said["queued"], said["max_queued"], said["queued_left"]) == (1, 20, 19)
    (service,) = said["services"]
    assert (service["running"], service["runs_per_user"], service["runs_left"]) == (1, 3, 2)
    (other,) = ask(desk.server, "GET", "/users/8").json["services"]
    assert (other["name"], other["runs"], other["runs_left"]) == ("example", 0, 3)


READER = """
import json, sys, urllib.request
url, path = sys.argv[1:]
after = 0
with open(path, "a+b") as file:
    file.seek(0)
    whole = 0
    for line in file:
        if line.endswith(b"\\n"):
            after, whole = json.loads(line)["next"], whole + len(line)
    file.truncate(whole)  # a line that a kill has cut
    while True:
        try:
            with urllib.request.urlopen(f"{url}/changes?after={after}&wait=45&limit=3", timeout=60) as answer:
                said = json.loads(answer.read())
        except (OSError, ValueError):
            continue  # the server is being restarted
        if said["changes"]:
            file.write(json.dumps(said).encode() + b"\\n")
            file.flush()
        after = said["next"]
"""


def test_a_reader_that_is_killed_sees_every_move_once(make_pair: MakePair) -> None:
    """Killed again and again, as the server is: it goes on at the `next` that it kept."""
    pair = make_pair(server={"SERVICE_EXAMPLE_RUNS_PER_USER": "2"}, client={"JOBORCH_SLOTS": "2"}).start()
    kept, ids = pair.folder / "kept", list[int]()

    def read() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", READER, pair.server.url, str(kept)], env=clean_environment(pair.folder))

    def pages_kept() -> list[Any]:
        return [json.loads(line) for line in kept.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if kept.exists() else []

    reader = read()
    try:
        for number in range(6):
            ids += [submit(pair.server, "echo", user_id=user_id) for user_id in (1, 2)]
            seen = len(pages_kept())
            wait_for(lambda seen=seen: len(pages_kept()) > seen, 60, "a page that the reader kept")  # type: ignore[misc]
            reader.kill()
            reader.wait(60)
            if number % 2:
                pair.server.kill()
                pair.server.start()
            else:
                pair.server.restart()
            reader = read()
        for job_id in ids:
            wait_status(pair.server, job_id, "Completed")
        last = pair.server.get("/changes").json()["next"]
        wait_for(lambda: pages_kept()[-1]["next"] >= last, 60, "the reader has seen the last move")
    finally:
        reader.kill()
        reader.wait(60)
    seen = [(each["seq"], each["id"], each["from"], each["to"]) for page in pages_kept() for each in page["changes"]]
    assert_proven(gather(pair.server.data / "joborch.db", reading=Reading(seen, last)))
    assert len(seen) >= 3 * len(ids)


def test_names_with_blanks_and_signs_are_found(desk: Desk) -> None:
    job = desk.upload(name="a & b=100%")
    assert ids_of(ask(desk.server, "GET", f"/jobs?name={quote('a & b=')}").json) == [job.id]
