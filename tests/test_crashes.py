"""Crash anywhere: the server and the client die as by SIGKILL at every point between two writes, are started again, and die again.

Each crash point of joborch.py is driven to in turn, on either side, in two real processes with jobs of every kind of end
under way. Whatever died: all jobs come to exactly the end they should have, with the bytes they should have, and no script
is started twice for one attempt. The history checker proves it from what is left.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import MakePair
from harness import (
    ENDED,
    SCRIPT_UIDS,
    JoinedPair,
    Pair,
    Process,
    field_part,
    file_part,
    form,
    form_type,
    from_source,
    program_text,
    tar_of,
    wait_for,
)
from history import Expected, Quota, assert_proven, gather, mark_lines, read_marks
from world import Peer, reply

BIG = random.Random(5).randbytes(300 * 1024)  # too large to travel with the news of its end
LIMITS = {"SERVICE_EXAMPLE_RUNS_PER_USER": "2", "SERVICE_EXAMPLE_MAX_RUNS": "6"}
QUOTAS = {"example": Quota(2, 6)}
LIMIT_S = 60.0


def sha256(content: bytes) -> str:
    """The digest of a member of a result."""
    return hashlib.sha256(content).hexdigest()


def fields_of(**more: Any) -> list[bytes]:
    """The fields of a form for the service."""
    return [field_part(name, f"{value}") for name, value in {"service": "example", **more}.items()]


class Side:
    """One process that is started again whenever it has died; its n-th start gets the n-th of `crashes`, later ones none."""

    def __init__(self, process: Process, crashes: list[str]) -> None:
        self.process, self.crashes, self.deaths, self.held = process, [*crashes], 0, False

    def start(self) -> None:
        """Start it with its next crash."""
        self.process.settings["JOBORCH_TEST_CRASH"] = self.crashes.pop(0) if self.crashes else None
        self.process.spawn()

    def look(self) -> None:
        """Start it again where it has died; whatever else ended it is a fault."""
        if self.process.process is not None and self.process.process.poll() is not None and not self.held:
            assert self.process.process.returncode == -signal.SIGKILL, self.process.log[-3000:]
            self.deaths += 1
            self.start()


class Run:
    """A pair of processes that die, and a user who does not give up: what was not answered is asked again."""

    def __init__(self, pair: Pair, server: list[str], client: list[str]) -> None:
        self.pair, self.server, self.client = pair, Side(pair.server, server), Side(pair.client, client)
        self.marks, self.hold = pair.folder / "marks", pair.folder / "go"
        self.expected: dict[int, Expected] = {}
        self.terminated: list[int] = []
        self.ended, self.failures = threading.Event(), []  # type: ignore[var-annotated]
        self.keeper = threading.Thread(target=self.keep, daemon=True)

    def keep(self) -> None:
        """Start again who died, until the run is over."""
        while not self.ended.wait(0.02):
            for side in (self.client, self.server):
                try:
                    side.look()
                except AssertionError as error:
                    self.failures.append(error)
                    self.ended.set()

    def start(self) -> None:
        """Start both and the keeper."""
        for side in (self.client, self.server):
            side.start()
        self.keeper.start()

    def stop(self) -> None:
        """End the keeper; what it saw counts."""
        self.ended.set()
        self.keeper.join(30)
        if self.failures:
            raise self.failures[0]

    def insist(self, call: Callable[[], Any], fits: Callable[[Any], bool], what: str) -> Any:
        """Ask until an answer fits; a server that is dead now is asked again."""
        end = time.monotonic() + LIMIT_S
        last: Any = None
        while time.monotonic() < end and not self.failures:
            try:
                last = call()
                if fits(last):
                    return last
            except requests.RequestException as error:
                last = error
            time.sleep(0.02)
        if self.failures:
            raise self.failures[0]
        said = last.text if isinstance(last, requests.Response) else last
        logs = [f"{side.process.role}: {side.process.log[-2500:]}" for side in (self.server, self.client)]
        raise AssertionError("\n".join([f"{what}: not within {LIMIT_S:g} s; the last answer: {said}", *logs]))

    def submit(self, script: str, user_id: int, expected: Expected) -> int:
        """Upload a script under a key of its own until that is answered with 201."""
        files = {"run.sh": (mark_lines(self.marks) + script).encode(), "data": BIG}
        return self.send("/upload", [*map(file_part, files, files.values()), *fields_of(user_id=user_id)], expected)

    def send(self, path: str, parts: list[bytes], expected: Expected) -> int:
        """Send a form under a key of its own until that is answered with 201; return the id of the new job."""
        headers, body = {**form_type(), "Idempotency-Key": f"key-{len(self.expected)}"}, form(parts)
        answer = self.insist(
            lambda: self.pair.server.post(path, data=body, headers=headers, timeout=20), lambda said: said.status_code == 201, path
        )
        number = int(answer.json()["id"])
        assert number not in self.expected, f"job {number} was stored under two keys"
        self.expected[number] = expected
        return number

    def job(self, number: int, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The job, once it fits."""
        answer = self.insist(
            lambda: self.pair.server.get(f"/jobs/{number}", timeout=20), lambda said: said.status_code == 200 and fits(said.json()), "job"
        )
        return dict(answer.json())

    def terminate(self, number: int) -> None:
        """Ask for the end of a job until it is so."""
        self.terminated.append(number)
        self.insist(
            lambda: self.pair.server.post(f"/terminate/{number}", timeout=20), lambda said: said.status_code in (200, 409), "terminate"
        )

    def settle(self) -> None:
        """Wait until every job has ended, then prove that all is as it should be."""
        for number in self.expected:
            self.job(number, lambda job: job["status"] in ENDED)
        self.stop()
        assert_proven(
            gather(
                self.pair.server.data / "joborch.db",
                clients={"client": self.pair.client.data / "joborch.db"},
                marks=[self.marks],
                results=self.pair.server.data / "results",
                expected=self.expected,
                quotas=QUOTAS,
                terminated=self.terminated,
            )
        )
        server = self.pair.server
        wait_for(lambda: not any((server.data / "tmp").iterdir()), LIMIT_S, "no temporary file")
        uuids = {server.job(number)["uuid"] for number in self.expected}
        wait_for(lambda: {path.name for path in (server.data / "jobs").iterdir()} == uuids, LIMIT_S, "no folder without its job")


COMPLETED = {"ends": ["Completed"], "most_attempts": 1}
WITH_DATA = {"run.sh": "", "data": sha256(BIG)}


def chain(run: Run) -> None:
    """A job that came as an archive with Windows line ends, one that gets its result, and a retry of that with one file replaced."""
    first = mark_lines(run.marks) + "cat data words > out"
    files = {"run.sh": first.replace("\n", "\r\n").encode(), "data": BIG, "words": b"one\n"}
    archive = file_part("tree.tar.gz", tar_of({name: (content, 0o644) for name, content in files.items()}, "w:gz", "tree/"), "archive")
    members = {"out": sha256(BIG + b"one\n"), "words": sha256(b"one\n")}
    one = run.send("/upload", [archive, *fields_of(user_id=5, crlf="fix")], Expected(members=members, **COMPLETED))
    script = mark_lines(run.marks) + f"cat from/{one}/out more > out"
    parts = [file_part("run.sh", script.encode()), file_part("more", b"two\n"), *fields_of(user_id=5, inputs_from=one)]
    members = {"out": sha256(BIG + b"one\ntwo\n"), f"from/{one}/words": sha256(b"one\n")}
    two = run.send("/upload", parts, Expected(members=members, **COMPLETED))
    members = {"out": sha256(BIG + b"one\nthree\n"), f"from/{one}/words": sha256(b"one\n")}
    run.send(f"/jobs/{two}/retry", [file_part("more", b"three\n")], Expected(members=members, **COMPLETED))


def ordinary(run: Run) -> None:
    """Jobs of every kind of end: small, large, failing, terminated while it runs and while it is queued, and one that runs all the time.

    A chain of jobs runs beside them.
    """
    small = {"out": sha256(b"small\n"), "data": sha256(BIG)}
    large = {"copy": sha256(BIG + BIG), "data": sha256(BIG)}
    held = run.submit(f"while [ ! -e {run.hold} ]; do sleep 0.05; done; echo small > out", 2, Expected(members=small, **COMPLETED))
    stopped = run.submit("sleep 600", 2, Expected(ends=["Killed"], causes=["cancelled"], most_attempts=1))
    queued = run.submit("sleep 600", 2, Expected(ends=["Killed"], causes=["cancelled"], most_attempts=1))
    run.submit("echo small > out", 1, Expected(members=small, **COMPLETED))
    run.submit("cat data data > copy", 1, Expected(members=large, **COMPLETED))
    run.submit("echo why >&2; exit 3", 3, Expected(ends=["Failed"], causes=["user"], most_attempts=1))
    chain(run)
    run.job(stopped, lambda job: job["status"] == "Running")
    run.terminate(queued)
    run.terminate(stopped)
    run.job(held, lambda job: job["status"] == "Running")
    run.hold.touch()


def sides_of(point: str) -> list[str]:
    """Which side passes a crash point."""
    area = point.split(".")[0]
    if area in ("upload", "unpack", "retry", "index", "claim", "send", "attempt", "hear", "fetch", "webhook") or point in (
        "kill.queued",
        "kill.asked",
        "start.asked",
    ):
        return ["server"]
    if area in ("submit", "run", "end", "events", "sync") or point in ("kill.begun", "kill.ended", "kill.stored"):
        return ["client"]
    return ["server", "client"]


# Those of a batch system or a cloud are passed with one alone: see test_slurm.py, test_dirac.py and test_clouds.py.
POINTS = sorted(set(re.findall(r'crash_point\("(?!slurm|dirac|cloud)([\w.]+)"\)', program_text())))
ELSEWHERE = ("clean.", "join.", "restore.", "webhook.", "erase.")  # see below, test_joined.py, test_instances.py and test_privacy.py
SPECIAL = (
    "send.refused",
    "send.lost",
    "send.ended",
    "submit.ended",
    "submit.waits",
    "attempt.stored",
    "start.asked",
    "sync.done",
    "index.written",
    "index.renamed",
)
ORDINARY = [(side, point) for point in POINTS if point not in SPECIAL and not point.startswith(ELSEWHERE) for side in sides_of(point)]
COMMITS = [
    (side, f"commit.begun:{number}") for side, last in (("server", (12, 16)), ("client", (11,))) for number in (2, 3, 4, 5, 7, 9, *last)
]


@pytest.fixture
def make_run(make_pair: MakePair) -> Iterator[Callable[..., Run]]:
    """Makes a run (not started), which is over with the test."""
    runs: list[Run] = []

    def make(server: list[str], client: list[str], program: list[str] | None = None, calls_in: bool = False, **settings: str) -> Run:
        own = {"JOBORCH_SLOTS": "6", "JOBORCH_KILL_GRACE": "0.2", **settings}
        pair = make_pair(kind=JoinedPair if calls_in else Pair, server={**LIMITS, **settings}, client=own, program=program)
        if isinstance(pair, JoinedPair):
            pair.prepare()
        runs.append(Run(pair, server, client))
        return runs[-1]

    yield make
    for run in runs:
        run.ended.set()


def test_the_points_are_found() -> None:
    assert len(POINTS) > 35
    assert {"upload.stored", "claim.stored", "run.marked", "fetch.renamed"} <= set(POINTS)


@pytest.mark.parametrize(("side", "point"), ORDINARY + COMMITS)
def test_a_crash_at_every_point(side: str, point: str, make_run: Callable[..., Run]) -> None:
    """And once more at the same one, where the process passes it again after its restart."""
    run = make_run(**{"server": [], "client": [], side: [point, point]})
    run.start()
    ordinary(run)
    run.settle()
    assert getattr(run, side).deaths >= 1, f"the {side} never came to {point}"


AROUND_A_SCRIPT = ["run.prepared", "run.started", "kill.begun", "end.stored"]


@pytest.mark.parametrize("isolation", ["process", "full", *(["user"] if os.geteuid() == 0 else [])])
def test_a_crash_around_an_isolated_script(isolation: str, make_run: Callable[..., Run], tmp_path: Path) -> None:
    """What was begun is taken up, whatever isolates it, and ends as any other."""
    common = tmp_path / "common"
    common.mkdir()
    (common / "marks").touch()
    (common / "marks").chmod(0o666)
    settings = {"JOBORCH_ISOLATION": isolation, "JOBORCH_MAX_PROCESSES": "1000", "JOBORCH_MAX_WORK": "100M"}
    settings.update({"JOBORCH_BIND_RW": str(common)} if isolation != "process" else {})
    settings.update({"JOBORCH_UIDS": SCRIPT_UIDS} if isolation == "user" else {})
    run = make_run([], AROUND_A_SCRIPT, **settings)
    run.marks, run.hold = common / "marks", common / "go"
    run.start()
    ordinary(run)
    run.settle()
    assert run.client.deaths == len(AROUND_A_SCRIPT)


PASSED_BY_ALL = ["upload.synced", "upload.stored", "claim.stored", "send.answered", "send.stored", "fetch.renamed", "fetch.durable"]
OF_CHAIN = ["upload.received:2", *(f"{point}:{number}" for point in PASSED_BY_ALL for number in (2, 3))]


@pytest.mark.parametrize("point", OF_CHAIN)
def test_a_crash_within_a_chain(point: str, make_run: Callable[..., Run]) -> None:
    """When its second and third job pass a point: each is stored once, and gets the result that it was promised."""
    run = make_run([point], [])
    run.start()
    chain(run)
    wait_for(lambda: run.server.deaths == 1, LIMIT_S, f"the death of the server at {point}")
    run.settle()


@pytest.mark.parametrize("point", ["index.written", "index.renamed"])
def test_a_crash_while_the_index_of_a_result_is_made(point: str, make_run: Callable[..., Run]) -> None:
    """It is made again, or used as it is; its files are served."""
    run = make_run([point], [])
    run.start()
    number = run.submit(
        "for n in {1..1200}; do : > $(printf %0100d $n); done; echo small > out",
        1,
        Expected(members={"out": sha256(b"small\n")}, **COMPLETED),
    )
    wait_for(lambda: run.server.deaths == 1, LIMIT_S, f"the death of the server at {point}")
    run.job(number, lambda job: job["status"] in ENDED)
    server = run.pair.server
    assert server.get(f"/jobs/{number}/files/out").content == b"small\n"
    run.settle()
    assert len(list((server.data / "results").iterdir())) == 2, "the result and its index"


@pytest.mark.parametrize("points", [("claim.stored", "submit.stored"), ("fetch.renamed", "run.started"), ("send.answered", "run.marked")])
def test_both_sides_die(points: tuple[str, str], make_run: Callable[..., Run]) -> None:
    run = make_run([points[0]] * 2, [points[1]] * 2)
    run.start()
    ordinary(run)
    run.settle()
    assert min(run.server.deaths, run.client.deaths) >= 1


WAITS = from_source(SHORT_RUN_S=1000.0, END_WAIT_S=1.0)  # every submit but the first waits for the end of its payload
WITH_ENDS = [
    *(("server", point) for point in ("send.answered:2", "fetch.synced:2", "fetch.renamed:2", "fetch.durable:2", "send.ended")),
    *(("client", point) for point in ("submit.stored:2", "run.stored:2", "end.seen:2", "end.stored:2", "submit.ended:2")),
]


@pytest.mark.parametrize(("side", "point"), WITH_ENDS)
def test_a_crash_where_the_answer_to_a_submit_has_the_end(side: str, point: str, make_run: Callable[..., Run]) -> None:
    """At the answer, at the file, before and after the commit; the end is asked again, and nothing runs twice."""
    run = make_run(**{"server": [], "client": [], side: [point, point]}, program=WAITS)
    run.start()
    for number in range(3):
        files = {"out": sha256(b"small\n")}
        job = run.submit("rm data; echo small > out", 1, Expected(members=files, **COMPLETED))
        run.job(job, lambda job: job["status"] in ENDED)
        assert number == 0 or getattr(run, side).deaths >= 1, f"the {side} never came to {point}"
    run.settle()


AHEAD = from_source(SHORT_RUN_S=1000.0, END_WAIT_S=1.0, HANDOVER_S=1000.0, TURNING_S=1000.0)  # jobs are sent ahead, whatever they take


@pytest.mark.parametrize(("side", "point"), [("client", "submit.waits"), ("server", "send.answered:3")])
def test_a_crash_while_jobs_wait_at_a_client(side: str, point: str, make_run: Callable[..., Run]) -> None:
    """They wait for the only slot, and their submits with them: each runs once, in its first attempt."""
    run, small = make_run(**{"server": [], "client": [], side: [point]}, program=AHEAD, JOBORCH_SLOTS="1"), {"out": sha256(b"small\n")}
    run.start()
    first = run.submit("rm data; echo small > out", 1, Expected(members=small, **COMPLETED))
    run.job(first, lambda job: job["status"] in ENDED)
    held = run.submit(f"while [ ! -e {run.hold} ]; do sleep 0.05; done; rm data; echo small > out", 2, Expected(members=small, **COMPLETED))
    run.job(held, lambda job: job["status"] == "Running")
    for user in (1, 3):
        run.submit("rm data; echo small > out", user, Expected(members=small, **COMPLETED))
    wait_for(lambda: getattr(run, side).deaths == 1, LIMIT_S, f"the death of the {side}")
    run.hold.touch()
    run.settle()


def test_a_crash_after_a_client_refused(make_run: Callable[..., Run]) -> None:
    """Its disk is too full for one more job, until it has been started again."""
    run = make_run(["send.refused"], [])
    run.pair.client.settings["JOBORCH_MIN_FREE"] = "1000000G"
    run.start()
    run.submit("echo small > out", 1, Expected(members={"out": sha256(b"small\n")}, **COMPLETED))
    wait_for(lambda: run.server.deaths == 1, what="the death of the server")
    run.pair.client.settings["JOBORCH_MIN_FREE"] = "1M"
    run.client.held = True
    run.pair.client.kill()
    run.client.start()
    run.client.held = False
    run.settle()


def test_a_crash_after_an_answer_was_lost(make_run: Callable[..., Run]) -> None:
    """The client dies with the job stored, before it answers; the server dies when it has noted so."""
    run = make_run(["send.lost"], ["submit.stored"])
    run.start()
    run.submit("echo small > out", 1, Expected(members={"out": sha256(b"small\n")}, **COMPLETED))
    run.settle()
    assert (run.server.deaths, run.client.deaths) == (1, 1)


def test_a_crash_while_what_was_sent_is_sorted_out(make_run: Callable[..., Run]) -> None:
    run = make_run(["claim.stored", "start.asked", "start.asked"], [])
    run.start()
    run.submit("echo small > out", 1, Expected(members={"out": sha256(b"small\n")}, **COMPLETED))
    run.settle()
    assert run.server.deaths == 2


def test_a_crash_after_an_attempt_was_given_up(make_run: Callable[..., Run]) -> None:
    """The client lost its disk: one attempt more, and no second one for the same reason."""
    run = make_run(["attempt.stored"], [])
    run.start()
    number = run.submit(
        f"while [ ! -e {run.hold} ]; do sleep 0.05; done; echo small > out",
        1,
        Expected(ends=["Completed"], most_attempts=2, members={"out": sha256(b"small\n")}),
    )
    run.job(number, lambda job: job["status"] == "Running")
    wait_for(lambda: read_marks(run.marks), what="the start of the script")
    run.client.held = True
    run.pair.client.close()
    run.pair.client.data.rename(run.pair.folder / "lost")
    run.pair.client.data.mkdir()
    run.client.start()
    run.client.held = False
    wait_for(lambda: run.server.deaths == 1, what="the death of the server")
    run.hold.touch()
    run.settle()
    assert {mark.attempt for mark in read_marks(run.marks)} == {1, 2}


def test_a_crash_after_results_came_to_the_disk(make_run: Callable[..., Run]) -> None:
    """The server is away, so that a result waits at the client until it is synced."""
    run = make_run([], ["sync.done"])
    run.start()
    number = run.submit("cat data data > copy", 1, Expected(members={"copy": sha256(BIG + BIG)}, **COMPLETED))
    run.job(number, lambda job: job["status"] in ("Submitted", "Running", "Completed"))
    run.server.held = True
    run.pair.server.kill()
    wait_for(lambda: run.client.deaths == 1, what="the death of the client")
    run.server.start()
    run.server.held = False
    run.settle()


OF_WEBHOOKS = [*(point for point in POINTS if point.startswith("webhook.")), "commit.begun:3", "commit.done:3"]


@pytest.mark.parametrize("point", OF_WEBHOOKS)
def test_a_crash_around_a_webhook(point: str, make_run: Callable[..., Run], peer: Peer) -> None:
    """Between move, outbox, send and note: each arrives at least once, always with the same content, and in order for its job."""
    run = make_run([point, point], [])
    run.pair.server.settings.update(JOBORCH_CALLBACK_HOSTS="127.0.0.1", JOBORCH_CALLBACK_ON="Queued,Killed")
    peer.says["/hook"] = [reply(204)]
    # One after the other, as they came: what a dead server has sent is read before what the next one sends.
    peer.http.process_request = lambda line, address: (peer.http.finish_request(line, address), peer.http.shutdown_request(line))  # type: ignore[method-assign,assignment]
    run.server.start()
    run.keeper.start()
    parts = [file_part("run.sh", b"true"), *fields_of(user_id=1, callback_url=f"{peer.url}/hook")]
    numbers = [run.send("/upload", parts, Expected()) for _ in range(3)]
    for number in numbers:
        run.terminate(number)
    for number in numbers:
        run.job(number, lambda job: [each["state"] for each in job["webhooks"]] == ["delivered"] * 2)
    wait_for(lambda: run.server.deaths >= 1, LIMIT_S, f"the death of the server at {point}")
    run.stop()
    said: dict[int, list[tuple[str, bytes]]] = {}
    for asked in list(peer.asked):
        said.setdefault(json.loads(asked.body)["id"], []).append((asked.headers["webhook-id"], asked.body))
    assert set(said) == set(numbers)
    for found in said.values():
        assert len(set(found)) == len(dict(found)) == 2, "one content for each id"
        states = [json.loads(body)["status"] for _, body in found]
        assert states == sorted(states, reverse=True) and set(states) == {"Queued", "Killed"}


def is_empty(process: Process) -> bool:
    """Whether no file of a job is left."""
    return not process.files() - {"joborch.lock", "wrapper.sh", "executor", "reserve", "jobs", "results", "tmp"}


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("clean.")])
def test_a_crash_while_it_is_cleaned(side: str, point: str, make_run: Callable[..., Run]) -> None:
    """What was begun is done to the end after the restart: no file and, in time, no row is left."""
    run = make_run(**{"server": [], "client": [], side: [point, point]})
    for process in (run.pair.server, run.pair.client):
        keep = "0.5" if point == "clean.forgotten" else "1h"
        process.settings.update(MAX_AGE="2", JOBORCH_CLEAN_INTERVAL="0.1", JOBORCH_KEEP_ROWS=keep)
    run.start()
    number = run.submit("echo small > out", 1, Expected())
    run.insist(
        lambda: run.pair.server.get(f"/jobs/{number}"), lambda said: said.status_code == 404 or said.json()["status"] == "Cleaned", "clean"
    )
    for process in (run.pair.server, run.pair.client):
        wait_for(functools.partial(is_empty, process), what="no file")
    wait_for(lambda: getattr(run, side).deaths >= 1, what=f"the {side} at {point}")
    run.stop()
    assert len(read_marks(run.marks)) == 2


@pytest.mark.parametrize("point", ["clean.folder", "clean.files", "clean.stored"])
def test_a_crash_of_the_cleaner_beside_a_result_that_is_needed(point: str, make_run: Callable[..., Run]) -> None:
    """A result is kept until the job that was promised it has ended; then everything is deleted."""
    run = make_run([point, point], [])
    server, begin = run.pair.server, run.pair.folder / "begin"
    server.settings.update(MAX_AGE="1", JOBORCH_CLEAN_INTERVAL="0.1", JOBORCH_KEEP_ROWS="1h")
    run.start()
    first = run.submit(f"while [ ! -e {begin} ]; do sleep 0.05; done; cp data out", 1, Expected())
    blocking = run.submit(f"while [ ! -e {run.hold} ]; do sleep 0.05; done", 1, Expected())
    script = mark_lines(run.marks) + f"cmp from/{first}/out from/{first}/data"
    parts = [file_part("run.sh", script.encode()), *fields_of(user_id=1, inputs_from=first, after=blocking)]
    second = run.send("/upload", parts, Expected())
    begin.touch()
    run.job(first, lambda job: job["status"] == "Completed")
    run.job(run.submit("true", 2, Expected()), lambda job: job["status"] == "Cleaned")
    wait_for(lambda: run.server.deaths >= 1, LIMIT_S, f"the death of the server at {point}")
    run.job(first, lambda job: job["status"] == "Completed")
    run.hold.touch()
    run.job(second, lambda job: job["ended_as"] == "Completed")
    for number in run.expected:
        run.job(number, lambda job: job["status"] == "Cleaned")
    wait_for(functools.partial(is_empty, server), LIMIT_S, "no file")
    run.stop()


@pytest.mark.parametrize("points", [("fetch.received", "submit.stored"), ("send.answered", "events.confirmed")])
def test_a_client_that_calls_in_and_its_server_die(points: tuple[str, str], make_run: Callable[..., Run]) -> None:
    run = make_run([points[0]], [points[1]], calls_in=True)
    run.start()
    ordinary(run)
    run.settle()
    assert min(run.server.deaths, run.client.deaths) >= 1


def test_a_client_and_its_server_die_at_every_step_of_a_join(make_run: Callable[..., Run]) -> None:
    """Before the first call, when the server has bound the token, before it answers, before the first poll, and with the first calls."""
    server, client = ["join.bound", "join.welcomed"], ["join.begun", "join.answered", "join.called"]
    assert {*server, *client, "join.renewed"} == {point for point in POINTS if point.startswith("join.")}
    run = make_run(server, client, from_source(BACKOFF_FIRST_S=0.05, BACKOFF_LAST_S=0.2), calls_in=True)
    run.start()
    run.submit("echo small > out", 1, Expected(members={"out": sha256(b"small\n")}, **COMPLETED))
    run.settle()
    assert (run.server.deaths, run.client.deaths) == (2, 3)
    (listed,) = run.pair.server.get("/clients").json()["clients"]
    assert (listed["name"], listed["reachable"], listed["trouble"]) == ("gpu", True, "")


@pytest.mark.parametrize("calls_in", [False, True])
def test_killed_at_random(make_run: Callable[..., Run], calls_in: bool) -> None:
    """At whatever statement it is just then, over and over while jobs come."""
    run, chance, stop = make_run([], [], calls_in=calls_in), random.Random(1), threading.Event()
    run.start()

    def shoot() -> None:
        while not stop.is_set():
            side = chance.choice([run.server, run.client])
            with contextlib.suppress(AssertionError):  # it died before it answered
                wait_for(lambda: stop.is_set() or side.process._healthy(), what="its start")  # noqa: B023
            if not stop.wait(chance.uniform(0.05, 0.8)) and side.process.running():
                side.process.process.kill()  # type: ignore[union-attr]

    gun = threading.Thread(target=shoot, daemon=True)
    gun.start()
    try:
        ordinary(run)
        while run.server.deaths + run.client.deaths < 12:
            text = f"{len(run.expected)}"
            run.submit(
                f"echo {text} > out", 4 + len(run.expected) % 3, Expected(members={"out": sha256(f"{text}\n".encode())}, **COMPLETED)
            )
    finally:
        stop.set()
        gun.join()
    run.settle()
    assert min(run.server.deaths, run.client.deaths) >= 2
