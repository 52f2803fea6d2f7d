"""A bad network costs time, never a job: every fault of tests/proxy.py, at every exchange, on both sides of the server.

A proxy stands between server and client, another one between user and server. The server is hasty: it waits for answers
1.5 s instead of 60 s, and begins its back-off at 0.1 s; else it is joborch.py as it stands.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests
from harness import (
    ROOT,
    JoinedPair,
    Pair,
    Process,
    alive,
    assert_error,
    download,
    from_source,
    nothing_left,
    partial,
    repr_digest,
    submit,
    upload,
    wait_for,
    wait_status,
)
from proxy import KINDS, Fault, Proxy
from world import Desk, event

from joborch import DataFolder, Job, Status, report

HASTE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import joborch
joborch.BACKOFF_FIRST_S, joborch.EVENTS_WAIT_S = 0.1, 4.0
patient = joborch.Link.call
def call(self, method, url, read_timeout_s=0.0, **options):
    return patient(self, method, url, 5.5 if "/events?" in url else 1.5, **options)
joborch.Link.call = call
sys.exit(joborch.main())
"""
BLOCK = Random(7).randbytes(64 << 10)  # deflate looks back 32 KiB: repeated, it stays as large as it is
LARGE_BLOCKS = 32
MAKE_LARGE = f"for i in $(seq {LARGE_BLOCKS}); do cat in.bin; done > out.bin\n"
MAKE_MANY = "for i in $(seq 20); do echo $i > $i.txt; done\n"  # more than travel with the news


@dataclass
class Sent:
    """A job of a test, and the file to which its script appends a line when it starts."""

    number: int
    marks: Path
    ended: bool = False  # it was seen to have ended after one start


class Net:
    """A server and a client, with a proxy between them (`inner`) and one between user and server (`outer`).

    `joined`: the client calls the server; else the server calls it.
    """

    def __init__(self, folder: Path, joined: bool = False) -> None:
        self.folder = folder
        kind: type[Pair] = JoinedPair if joined else Pair
        self.pair = kind(folder, {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "100"}, {"JOBORCH_SLOTS": "8"})
        self.server, self.client = self.pair.server, self.pair.client
        self.inner, self.outer = Proxy(self.server.port if joined else self.client.port), Proxy(self.server.port)
        if joined:
            self.client.settings["JOBORCH_JOIN"] = self.inner.url
            self.client.program = from_source(BACKOFF_FIRST_S=0.05, BACKOFF_LAST_S=0.2)
        else:
            self.server.settings["SERVICE_EXAMPLE_CLIENTS"] = self.inner.url
        self.server.program = [sys.executable, "-c", HASTE]
        self.server.settings.update(JOBORCH_SEND_INTERVAL="0.05", JOBORCH_GET_INTERVAL="0.05")
        self.user = Process("server", folder / "user", port=self.outer.port)  # the server, as a user behind a bad line sees it
        self.sent: list[Sent] = []

    def start(self) -> Net:
        """Start all four."""
        self.inner.start()
        self.outer.start()
        self.pair.start()
        return self

    def close(self) -> None:
        """End all."""
        self.pair.close()
        self.inner.close()
        self.outer.close()
        self.user.api.close()

    def calm(self) -> None:
        """No faults, and a server that reaches its client."""
        self.inner.calm()
        self.outer.calm()
        wait_for(lambda: self.server.get("/services").json()["services"][0]["clients"][0]["reachable"], what="the client reachable")

    def marks(self) -> Path:
        """The marks file for the next job."""
        return self.folder / f"marks-{len(self.sent)}"

    def send(self, script: str, files: dict[str, bytes] | None = None, **fields: Any) -> Sent:
        """Upload a script that notes its start, over a good line."""
        marks = self.marks()
        sent = Sent(submit(self.server, f"echo started >> {marks}\n{script}", files, **fields), marks)
        self.sent.append(sent)
        return sent

    def ends(self, sent: Sent, status: str) -> dict[str, Any]:
        """The job, once it has ended as it should, after one start in one attempt."""
        job = wait_status(self.server, sent.number, status)
        assert sent.marks.read_text() == "started\n", f"started more than once: {job}"
        assert (job["attempt"], len(job["attempts"])) == (1, 1), job
        assert {row["attempt"] for row in job["history"]} == {1}, job["history"]
        sent.ended = True
        return job

    def check(self) -> None:
        """Nothing that had ended was started again later: some faults deliver what they hold back."""
        again = [sent.number for sent in self.sent if sent.ended and sent.marks.read_text() != "started\n"]
        assert not again, f"jobs {again} were started again later"


@contextlib.contextmanager
def running(net: Net) -> Iterator[Net]:
    """Start it for the block; at the end nothing may have been started again."""
    try:
        yield net.start()
    finally:
        net.close()
    net.check()


@pytest.fixture(scope="module")
def shared_net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """One for all tests whose faults are over when they end."""
    with running(Net(tmp_path_factory.mktemp("net"))) as net:
        yield net


@pytest.fixture
def net(shared_net: Net) -> Iterator[Net]:
    """The shared one, calm before and after."""
    shared_net.calm()
    yield shared_net
    shared_net.calm()


# == Server and client: every fault at every exchange ==

FAULTS: dict[str, dict[str, Any]] = {
    "refuse": {"kind": "refuse", "seconds": 0.3},
    "cut_request": {"kind": "cut_request", "after": 0.5},
    "cut_answer": {"kind": "cut_answer", "after": 0.5},
    "lost_answer": {"kind": "lost_answer"},
    "reset_request": {"kind": "reset", "where": "request", "after": 0.5},
    "reset_answer": {"kind": "reset", "after": 0.5},
    "stall_request": {"kind": "stall", "where": "request", "after": 0.5, "seconds": 0.3},
    "stall_answer": {"kind": "stall", "after": 0.5, "seconds": 0.3},
    "silent_request": {"kind": "stall", "where": "request", "after": 0.5, "seconds": 60},
    "silent_answer": {"kind": "stall", "after": 0.5, "seconds": 60},
    "late_request": {"kind": "stall", "where": "request", "after": 0.5, "seconds": 0.3, "goes_on": True},
    "late_answer": {"kind": "stall", "after": 0.5, "seconds": 0.3, "goes_on": True},
    "drip_request": {"kind": "drip", "where": "request", "seconds": 0.3},
    "drip_answer": {"kind": "drip", "seconds": 0.3},
    "garbage": {"kind": "garbage"},
    "rubbish": {"kind": "rubbish"},
    "rubbish_json": {"kind": "rubbish", "content_type": "application/json"},
    "rubbish_502": {"kind": "rubbish", "status": 502},
    "flip_request": {"kind": "flip_request", "after": 0.5},
    "flip_answer": {"kind": "flip_answer", "after": 0.5},
    "duplicate": {"kind": "duplicate"},
    "duplicate_before": {"kind": "duplicate", "order": "before"},
    "duplicate_after": {"kind": "duplicate", "order": "after"},
}


def through_submit(net: Net, fault: Fault) -> dict[str, Any]:
    """A fault at POST /submit."""
    fault.match = "POST /submit"
    net.inner.plant(fault)
    sent = net.send("cp in.bin out.bin\n", {"in.bin": BLOCK * 2})
    job = net.ends(sent, "Completed")
    assert download(net.server, sent.number)["out.bin"] == BLOCK * 2
    return job


def through_events(net: Net, fault: Fault) -> dict[str, Any]:
    """A fault at the GET /events that brings the end, and a small result with it."""
    fault.match = "GET /events"
    gate = net.folder / f"gate-{len(net.sent)}"
    net.inner.plant(fault)
    sent = net.send(f"while [ ! -e {gate} ]; do sleep 0.02; done\ncp in.bin out.bin\n", {"in.bin": BLOCK[:5000]})
    wait_for(lambda: any(exchange.fault is fault for exchange in net.inner.find("GET /events")), what="a poll that it befalls")
    wait_for(sent.marks.exists, what="the script's start")
    gate.touch()
    job = net.ends(sent, "Completed")
    assert download(net.server, sent.number)["out.bin"] == BLOCK[:5000]
    return job


def through_retrieve(net: Net, fault: Fault) -> dict[str, Any]:
    """A fault at GET /retrieve/ID of a large result."""
    fault.match = "GET /retrieve/"
    net.inner.plant(fault)
    sent = net.send(MAKE_LARGE, {"in.bin": BLOCK})
    job = net.ends(sent, "Completed")
    assert download(net.server, sent.number)["out.bin"] == BLOCK * LARGE_BLOCKS
    return job


def through_small_retrieve(net: Net, fault: Fault) -> dict[str, Any]:
    """A fault at GET /retrieve/ID of a small result of many files."""
    fault.match = "GET /retrieve/"
    net.inner.plant(fault)
    sent = net.send(MAKE_MANY)
    job = net.ends(sent, "Completed")
    result = download(net.server, sent.number)
    assert [result.text(f"{number}.txt") for number in range(1, 21)] == [f"{number}\n" for number in range(1, 21)]
    return job


def through_partial(net: Net, fault: Fault) -> dict[str, Any]:
    """A fault at GET /retrieve_partial/ID of a job that failed."""
    fault.match = "GET /retrieve_partial/"
    net.inner.plant(fault)
    sent = net.send(f"{MAKE_LARGE}echo why >&2\nexit 3\n", {"in.bin": BLOCK})
    job = net.ends(sent, "Failed")
    assert (job["exit_code"], job["cause"]) == (3, "user")
    left = partial(net.server, sent.number)
    assert left["out.bin"] == BLOCK * LARGE_BLOCKS
    assert left.text(".joborch/stderr") == "why\n"
    return job


def through_kill(net: Net, fault: Fault) -> dict[str, Any]:
    """A fault at POST /kill/ID."""
    fault.match = "POST /kill/"
    pid_file = net.folder / f"pid-{len(net.sent)}"
    net.inner.plant(fault)
    sent = net.send(f"echo $$ > {pid_file}.tmp\nmv {pid_file}.tmp {pid_file}\nsleep 1000\n")
    wait_for(pid_file.exists, what="the script's start")
    wait_status(net.server, sent.number, "Running")
    assert net.server.post(f"/terminate/{sent.number}").status_code in (200, 202)
    job = net.ends(sent, "Killed")
    assert not alive(int(pid_file.read_text()))
    assert job["cause"] == "cancelled"
    return job


EXCHANGES: dict[str, Callable[[Net, Fault], dict[str, Any]]] = {
    "submit": through_submit,
    "events": through_events,
    "retrieve": through_retrieve,
    "small_retrieve": through_small_retrieve,
    "partial": through_partial,
    "kill": through_kill,
}


# What the variants of a kind add is seen well enough at these exchanges.
VARIANTS = {
    "reset_request",
    "silent_request",
    "late_request",
    "late_answer",
    "drip_request",
    "rubbish_json",
    "duplicate_before",
    "duplicate_after",
}
WITH_VARIANTS = {"submit", "retrieve"}
CASES = [
    (exchange, name)
    for exchange in EXCHANGES
    for name in FAULTS
    if (name not in VARIANTS or exchange in WITH_VARIANTS)
    and (name != "flip_request" or exchange == "submit")  # the others have no body
    and (name != "silent_answer" or exchange in ("submit", "events", "retrieve"))
]
SAID = r".*(cannot be reached|did not answer|broke|invalid answer|answered \d+).*"
GOES_ON = {"cut_answer", "reset_answer", "stall_answer", "silent_answer"}  # what came of a result is kept
AGAIN = {
    "cut_request",
    "lost_answer",
    "reset_request",
    "stall_request",
}  # at a GET: it is repeated at once, and nothing is said
QUIET = {"late_request", "late_answer", "drip_request", "drip_answer", "duplicate", "duplicate_before", "duplicate_after"}


@pytest.mark.parametrize(("exchange", "name"), CASES)
def test_a_fault_between_server_and_client(exchange: str, name: str, net: Net) -> None:
    """The job ends as it should after one start in one attempt, its result is whole, and it says why it took longer."""
    fault = Fault(**FAULTS[name])
    before, log_before = net.inner.counts()[fault.kind], len(net.server.log)
    job = EXCHANGES[exchange](net, fault)
    wait_for(lambda: net.inner.counts()[fault.kind] > before, what="the fault")
    client, reasons = re.escape(f"127.0.0.1:{net.inner.port}"), "\n".join(row["reason"] for row in job["history"])
    if name in QUIET or (name in AGAIN and fault.match.startswith("GET")) or (exchange == "events" and name in ("reset_answer", "refuse")):
        return
    if exchange == "submit" and name != "flip_answer":
        assert re.search(f"{client} ({SAID}|has it)", reasons), "its events may be quicker than the failure"
    elif exchange in ("retrieve", "small_retrieve", "partial"):
        asked = [exchange for exchange in net.inner.find(fault.match) if exchange.path.endswith(f"/{job['dest_id']}")]
        assert ["range" in call.headers for call in asked] == [False, name in GOES_ON]
        assert bool(re.search(f"the result could not be fetched from {client}: {SAID}; it is tried again", reasons)) != (name in GOES_ON)
    elif name not in ("rubbish", "flip_answer"):  # nothing in an answer to /kill matters but its status
        wait_for(lambda: re.search(f"WARNING client {client}: {SAID}", net.server.log[log_before:]), what="a line in the log")


# == Server and client: bits that matter ==


@pytest.fixture(scope="module")
def second_net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """Another one, which the tests of this section may leave deaf."""
    with running(Net(tmp_path_factory.mktemp("frail"))) as net:
        yield net


@pytest.fixture
def frail_net(second_net: Net) -> Iterator[Net]:
    """Calm before; its server is started again after a test that failed in it."""
    second_net.calm()
    number = len(second_net.sent)
    yield second_net
    if not all(sent.ended for sent in second_net.sent[number:]):
        second_net.server.restart()


@pytest.mark.parametrize(
    "at",
    [
        "",  # the first boundary
        r"Content-Disp",
        r'name="in.b',
        r"X-Joborch-Pa",
        r"X-Joborch-Path: in.b",
        r"X-Joborch-Path: run.sh\r\n\r\n",
        r"\r\n--",  # the boundary that ends a file: the next part would become a piece of it
        r'name="\.joborch-digests"\r\n\r\n\{"[^"]*":"',
        r'name="\.joborch-digests"\r\n\r\n',
        r"true\n\r\n--",  # the boundary before the digests: without them nothing can be compared
        r'"\} *\r\n--',  # the last boundary
    ],
)
def test_a_bit_of_a_submit(at: str, frail_net: Net) -> None:
    """Wherever it flips, what was sent is not what came: it is sent again, neither refused nor run."""
    frail_net.inner.plant(Fault("flip_request", "POST /submit", at=at))
    sent = frail_net.send("cp in.bin out.bin\ntrue\n", {"in.bin": BLOCK[:100]})
    frail_net.ends(sent, "Completed")
    assert download(frail_net.server, sent.number)["out.bin"] == BLOCK[:100]
    assert frail_net.inner.counts()["flip_request"]


@pytest.mark.parametrize("at", [r'"id": ', r'"i', r'"status": "P'])
def test_a_bit_of_an_answer_to_submit(at: str, frail_net: Net) -> None:
    """Above all the id: that of another payload would have the result asked for in vain, and the script run again."""
    frail_net.inner.plant(Fault("flip_answer", "POST /submit", at=at))
    sent = frail_net.send(MAKE_MANY)
    frail_net.ends(sent, "Completed")
    assert download(frail_net.server, sent.number).text("20.txt") == "20\n"


SMALL = "echo 20 > 20.txt\n"
OF_AN_END = r'(?=.*"status": "C)'  # in an answer that tells of a script's start, the bit would be made good by the news of its end


@pytest.mark.parametrize(
    ("at", "script"),
    [
        (r'"instance": "' + OF_AN_END, SMALL),
        (r'"payloads": \[\{"i' + OF_AN_END, SMALL),
        (r'"payloads": \[\{"i' + OF_AN_END, MAKE_MANY),
        (r'"payloads": \[\{"id": ' + OF_AN_END, SMALL),
        (r'"payloads": \[\{"id": ' + OF_AN_END, MAKE_MANY),
        (r'"status": "C.*"exit_co', MAKE_MANY),
        (r'"archive": "UEs', SMALL),
        (r'"sha256": "', SMALL),
        (r'"uuid": "' + OF_AN_END, SMALL),
        (r'"status": "C', MAKE_MANY),
    ],
    ids={SMALL: "small", MAKE_MANY: "many"}.get,
)
def test_a_bit_of_the_news(at: str, script: str, frail_net: Net) -> None:
    """An end that was not understood is told again."""
    gate = frail_net.folder / f"gate-{len(frail_net.sent)}"
    fault = frail_net.inner.plant(Fault("flip_answer", "GET /events", at=at))
    sent = frail_net.send(f"while [ ! -e {gate} ]; do sleep 0.02; done\n{script}")
    wait_status(frail_net.server, sent.number, "Running")
    wait_for(lambda: frail_net.inner.find("GET /events")[-1].fault is fault, what="a poll that it befalls")
    before = frail_net.inner.counts()["flip_answer"]
    gate.touch()
    wait_for(lambda: frail_net.inner.counts()["flip_answer"] > before, what="the fault")
    frail_net.ends(sent, "Completed")
    assert download(frail_net.server, sent.number).text("20.txt") == "20\n"


def heard_until(net: Net) -> int:
    """The number of the last news that the server has heard."""
    return int(wait_for(lambda: re.findall(r"since=([1-9][0-9]*)", net.inner.find("GET /events")[-1].path), what="a poll that waits")[0])


def larger_bit(number: int) -> int | None:
    """The bit that makes the first digit of this number, and of those that come soon, larger; None where there is none."""
    digit = int(str(number)[0])
    if str(number + 20)[0] != str(digit):
        return None
    return next((bit for bit in (2, 1, 0) if not digit & 1 << bit and digit | 1 << bit < 10), None)


def test_news_that_skip_ahead(frail_net: Net) -> None:
    """Where a bit of `next` made it larger, what comes next is heard of all the same."""
    while (bit := larger_bit(heard_until(frail_net))) is None:
        frail_net.ends(frail_net.send("true\n"), "Completed")
    gate = frail_net.folder / "gate-ahead"
    sent = frail_net.send(f"while [ ! -e {gate} ]; do sleep 0.02; done\n")
    wait_status(frail_net.server, sent.number, "Running")
    before = frail_net.inner.counts()["flip_answer"]
    frail_net.inner.plant(Fault("flip_answer", "GET /events", at=r'"next": ', bit=bit))
    frail_net.ends(frail_net.send("true\n"), "Completed")
    wait_for(lambda: frail_net.inner.counts()["flip_answer"] > before, what="the fault")
    later = frail_net.send("true\n")
    gate.touch()
    for each in (sent, later):
        frail_net.ends(each, "Completed")


# == Server and client: somebody else answers ==


@pytest.mark.parametrize(
    ("exchange", "said"),
    [
        ("submit", {"status": 503}),  # Killed, though nobody asked for it, or Submitted for ever
        ("submit", {"status": 504}),
        ("small_retrieve", {"status": 404}),  # started twice
        ("small_retrieve", {"status": 503}),
        ("small_retrieve", {"content_type": "application/zip"}),  # the page is taken for the result
        ("partial", {"status": 404}),  # what it left is given up
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_gateway_answers_instead_of_the_client(exchange: str, said: dict[str, Any], frail_net: Net) -> None:
    """A page, whatever its status, is no word of the client: the job neither ends nor begins anew by it."""
    EXCHANGES[exchange](frail_net, Fault("rubbish", **said))
    assert frail_net.inner.counts()["rubbish"]


def test_a_gateway_that_finds_nothing_for_once(tmp_path: Path) -> None:
    """A client that had /events has it still: it does not become one of 2.2 for good, which knows no keys."""
    net = Net(tmp_path)
    try:
        net.start().calm()
        net.inner.plant(Fault("rubbish", "GET /events", status=404))
        net.ends(net.send("true\n"), "Completed")
        wait_for(lambda: net.inner.counts()["rubbish"], what="the fault")
        net.inner.plant(Fault("lost_answer", "POST /submit"))
        net.ends(net.send("true\n"), "Completed")
    finally:
        net.close()


# == Server and client: news and a lost answer at once ==


@pytest.mark.parametrize("status", ["Prepared", "Running", "Completed"])
def test_news_of_a_job_while_its_submit_fails(status: str, data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both senders saw it Processing; whichever writes first, it is known by which id its client has it."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        desk = Desk(data, f"http://127.0.0.1:{silent.getsockname()[1]}")
        job, move = desk.with_client(Status.PROCESSING), desk.store.move

        def too_late(stale: Job, to: Status, reason: str, **changes: Any) -> bool:
            monkeypatch.setattr(desk.store, "move", move)
            assert move(stale, Status.UNKNOWN, "it did not answer")
            return move(stale, to, reason, **changes)

        monkeypatch.setattr(desk.store, "move", too_late)
        for _ in range(2):
            report(desk.server, desk.link, event(job, id=12, status=status, started_at=5.0))
        desk.store.close()
        assert desk_row(desk, job).dest_id == "12"


def desk_row(desk: Desk, job: Job) -> Job:
    """The row of a job after the store was closed: nothing is left in memory."""
    desk.open()
    with contextlib.closing(desk.store):
        return desk[job]


# == Server and client: large results ==


@pytest.mark.parametrize("status", ["Completed", "Failed"])
@pytest.mark.parametrize("kind", ["cut_answer", "reset", "stall"])
def test_a_broken_transfer_goes_on_where_it_broke(kind: str, status: str, net: Net) -> None:
    """By Range of the same ETag, three times over; what went over the line is about what there was to be sent."""
    net.inner.plant(Fault(kind, "GET /retrieve", after=0.5, times=3))
    sent = net.send(MAKE_LARGE + ("" if status == "Completed" else "exit 3\n"), {"in.bin": BLOCK})
    job = net.ends(sent, status)
    assert partial(net.server, sent.number)["out.bin"] == BLOCK * LARGE_BLOCKS
    size = job["result"]["size"]
    asked = [call for call in net.inner.find("GET /retrieve") if call.path.endswith(f"/{job['dest_id']}")]
    begins = [int(call.headers.get("range", "bytes=0-")[len("bytes=") : -1]) for call in asked]
    assert begins == sorted(begins) and len(begins) == 4 and begins[-1] > 0, begins
    assert {call.headers.get("if-range") for call in asked if "range" in call.headers} == {asked[0].answer_headers["etag"]}
    assert [call.status for call in asked] == [206 if begin else 200 for begin in begins]
    went = sum(call.answer_bytes for call in asked)
    if kind == "reset":  # an RST takes what was on its way: how much, the kernel knows
        assert went < 2.5 * size + 4 * 2000, "half of what was asked for, three times, and what was then left"
    else:
        assert begins == sorted(set(begins)) and size / 2 - 2000 < begins[1] < size / 2 + 2000
        assert size < went < size + 4 * 2000, "nothing came twice"


def test_a_changed_bit_of_a_large_result_has_all_of_it_sent_again(net: Net) -> None:
    """Nobody knows which bit it was."""
    net.inner.plant(Fault("flip_answer", "GET /retrieve/", after=0.3))
    sent = net.send(MAKE_LARGE, {"in.bin": BLOCK})
    job = net.ends(sent, "Completed")
    assert download(net.server, sent.number)["out.bin"] == BLOCK * LARGE_BLOCKS
    asked = [call for call in net.inner.find("GET /retrieve/") if call.path.endswith(f"/{job['dest_id']}")]
    assert ["range" in call.headers for call in asked] == [False, False]
    assert all(call.answer_bytes > job["result"]["size"] for call in asked)


def test_a_changed_bit_of_a_transfer_that_goes_on(net: Net) -> None:
    """The digest is that of the whole: both pieces are thrown away."""
    net.inner.plant(Fault("cut_answer", "GET /retrieve/", after=0.5))
    net.inner.plant(Fault("flip_answer", "GET /retrieve/", after=0.5))
    sent = net.send(MAKE_LARGE, {"in.bin": BLOCK})
    job = net.ends(sent, "Completed")
    assert download(net.server, sent.number)["out.bin"] == BLOCK * LARGE_BLOCKS
    asked = [call for call in net.inner.find("GET /retrieve/") if call.path.endswith(f"/{job['dest_id']}")]
    assert ["range" in call.headers for call in asked] == [False, True, False]


# == Server and client: no line at all ==


def test_a_client_that_cannot_be_reached(net: Net) -> None:
    """A job waits, says why, and is sent when the line is back."""
    net.inner.refuse()
    net.inner.drop()
    sent = net.send("true\n")
    reason = f"127.0.0.1:{net.inner.port} cannot be reached: connection refused"
    wait_for(lambda: reason in str(net.server.job(sent.number)["waiting_for"]), what="the reason to wait")
    assert net.server.job(sent.number)["status"] == "Queued"
    net.inner.open()
    net.ends(sent, "Completed")


def test_a_submit_that_is_refused_went_nowhere(tmp_path: Path) -> None:
    """The poll's connection is there, another one cannot be made: the job is queued again, with the reason."""
    net = Net(tmp_path)
    try:
        net.start().calm()
        net.inner.refuse()
        sent = net.send("true\n")
        wait_for(lambda: "connection refused" in str(net.server.job(sent.number)["history"]), what="the reason")
        net.inner.open()
        job = net.ends(sent, "Completed")
    finally:
        net.close()
    moves = [(row["to"], row["reason"]) for row in job["history"]]
    assert ("Queued", f"127.0.0.1:{net.inner.port} cannot be reached: connection refused") in moves


def test_a_line_that_breaks_while_scripts_run(net: Net) -> None:
    """What runs runs on, and what ended meanwhile is heard of."""
    gate = net.folder / "gate-broken"
    sent = [net.send(f"while [ ! -e {gate} ]; do sleep 0.02; done\necho {number} > out.txt\n") for number in range(3)]
    for job in sent:
        wait_status(net.server, job.number, "Running")
    net.inner.refuse()
    net.inner.drop()
    gate.touch()
    wait_for(lambda: not net.server.get("/services").json()["services"][0]["clients"][0]["reachable"], what="the failure noticed")
    net.inner.open()
    for number, job in enumerate(sent):
        net.ends(job, "Completed")
        assert download(net.server, job.number).text("out.txt") == f"{number}\n"


@pytest.mark.parametrize("seed", range(2))
def test_a_line_on_which_everything_happens(seed: int, net: Net) -> None:
    """A dozen jobs while every third request fails in some way."""
    kinds = [kind for kind in KINDS if not kind.startswith("flip")]
    net.inner.scatter(seed, 0.3, kinds, longest_s=0.3)
    sent = [net.send("cp in.bin out.bin\n", {"in.bin": BLOCK}) for _ in range(6)]
    sent += [net.send(MAKE_LARGE + "exit 3\n", {"in.bin": BLOCK}) for _ in range(3)]
    sent += [net.send("exit 4\n") for _ in range(3)]
    for number, job in enumerate(sent):
        net.ends(job, "Completed" if number < 6 else "Failed")
    for job in sent[:6]:
        assert download(net.server, job.number)["out.bin"] == BLOCK
    for job in sent[6:9]:
        assert partial(net.server, job.number)["out.bin"] == BLOCK * LARGE_BLOCKS
    assert len(net.inner.counts()) > 3


# == A client that calls in ==


@pytest.fixture(scope="module")
def joined_net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    """A server, and a client that calls it over a bad line."""
    with running(Net(tmp_path_factory.mktemp("joined"), joined=True)) as net:
        yield net


JOINED_FAULTS = [name for name in FAULTS if not name.startswith("silent")]  # these last as long as the client is patient
AT_POLLS = ("refuse", "cut_request", "cut_answer", "lost_answer", "reset_answer", "garbage", "flip_answer", "duplicate")
JOINED_CASES = [*(("GET /join/calls", name) for name in AT_POLLS), *(("POST /join/answers", name) for name in JOINED_FAULTS)]


@pytest.mark.parametrize(("where", "name"), JOINED_CASES)
def test_a_fault_between_a_client_that_calls_and_its_server(name: str, where: str, joined_net: Net) -> None:
    """Jobs go on until the fault has come; each ends after one start in one attempt, with its result."""
    net = joined_net
    fault = Fault(match=where, **FAULTS[name])
    before = net.inner.counts()[fault.kind]
    net.inner.plant(fault)
    while net.inner.counts()[fault.kind] == before:
        sent = [net.send("cp in.bin out.bin; sleep 0.1\n", {"in.bin": BLOCK[:5000]}) for _ in range(5)]
        for each in sent:
            net.ends(each, "Completed")
            assert download(net.server, each.number)["out.bin"] == BLOCK[:5000]
    net.inner.calm()


# == User and server ==

USER_FAULTS = [name for name in FAULTS if not name.startswith(("silent", "flip"))]
FORM = {"in.bin": BLOCK}


@dataclass
class Upload:
    """An upload of a user of its own, who tries until it is answered."""

    net: Net
    key: str
    user_id: int
    sent: Sent
    content: bytes = BLOCK

    def once(self) -> int:
        """The id that the server answers with; 0 where no good answer comes."""
        files = {"run.sh": f"echo started >> {self.sent.marks}\n".encode(), "in.bin": self.content}
        try:
            answer = upload(self.net.user, files, headers={"Idempotency-Key": self.key} if self.key else {}, user_id=self.user_id)
            said = answer.json() if answer.status_code == 201 else {}
        except (requests.RequestException, ValueError):
            return 0
        return int(said.get("id", 0))

    def rows(self) -> list[dict[str, Any]]:
        """The jobs that came of it."""
        return self.net.server.jobs(user_id=self.user_id)


@pytest.fixture
def new_upload(net: Net, request: pytest.FixtureRequest) -> Callable[[str], Upload]:
    """Makes an upload, with a key or ""."""

    def make(key: str) -> Upload:
        sent = Sent(0, net.marks())
        net.sent.append(sent)
        return Upload(net, key, 1000 + len(net.sent), sent)

    return make


@pytest.mark.parametrize("name", USER_FAULTS)
def test_an_upload_that_is_repeated_with_its_key(name: str, net: Net, new_upload: Callable[[str], Upload]) -> None:
    """One job, one id, however often and whatever happened to it; with another file it is refused."""
    mine = new_upload(f"key-{name}")
    fault = net.outer.plant(Fault(match="POST /upload", **FAULTS[name]))
    number = mine.sent.number = wait_for(mine.once, what="an answer")
    assert mine.once() == number
    wait_for(lambda: net.outer.counts()[fault.kind], what="the fault")
    assert [job["id"] for job in mine.rows()] == [number]
    net.ends(mine.sent, "Completed")
    assert download(net.server, number)["in.bin"] == BLOCK
    mine.content = BLOCK[:-1]
    form = {"run.sh": b"true\n"}
    assert_error(upload(net.user, form, headers={"Idempotency-Key": mine.key}, user_id=mine.user_id), 422, "Idempotency-Key", str(number))
    assert mine.once() == 0, "a single byte less is another file"
    assert [job["id"] for job in mine.rows()] == [number]


@pytest.mark.parametrize("name", USER_FAULTS)
def test_an_upload_without_a_key(name: str, net: Net, new_upload: Callable[[str], Upload]) -> None:
    """What did not arrive whole leaves nothing; what did is a job, whether its answer arrived or not; twice delivered, it is two."""
    mine = new_upload("")
    fault = Fault(match="POST /upload", **FAULTS[name])
    arrives = not fault.on_request or fault.goes_on or fault.kind in ("drip", "duplicate")
    before = net.outer.counts()[fault.kind]
    with nothing_left(net.server) if not arrives else contextlib.nullcontext():
        net.outer.plant(fault)
        answered = mine.once()
        wait_for(lambda: net.outer.counts()[fault.kind] > before, what="the fault")
    rows = wait_for(mine.rows) if arrives else mine.rows()
    assert len(rows) == (2 if fault.kind == "duplicate" else int(arrives))
    assert bool(answered) == (name in QUIET)
    for row in rows:
        wait_status(net.server, row["id"], "Completed")
    assert (mine.sent.marks.read_text() if rows else "") == "started\n" * len(rows)
    mine.sent.marks.write_text("started\n")  # what it has had is right


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999999])
@pytest.mark.parametrize("name", ["cut_request", "reset_request", "stall_request"])
def test_a_large_upload_that_breaks_leaves_nothing(name: str, share: float, net: Net) -> None:
    with nothing_left(net.server):
        net.outer.plant(Fault(match="POST /upload", **{**FAULTS[name], "after": share}))
        with pytest.raises(requests.ConnectionError):
            upload(net.user, {"run.sh": b"true\n", "in.bin": BLOCK * LARGE_BLOCKS})
    assert len(net.outer.find("POST /upload")[-1].headers)


@pytest.mark.parametrize("at", ["", r"Content-Disp", r'name="user_id"\r\n\r\n1[^-]*--[^-]*-'])
def test_an_upload_whose_form_is_damaged_leaves_nothing(at: str, net: Net) -> None:
    with nothing_left(net.server):
        fault = net.outer.plant(Fault("flip_request", "POST /upload", at=at))
        assert_error(upload(net.user, {"run.sh": b"true\n"}), 400)
    assert not fault.left


@pytest.fixture(scope="module")
def large_result(shared_net: Net) -> tuple[int, bytes]:
    """A completed job, and its ZIP as it comes over a good line."""
    sent = shared_net.send(MAKE_LARGE, {"in.bin": BLOCK})
    shared_net.ends(sent, "Completed")
    return sent.number, shared_net.server.get(f"/download/{sent.number}").content


class Download:
    """A result that is fetched as `curl -C -` does: what came is kept, and the rest asked for."""

    def __init__(self, net: Net, number: int) -> None:
        self.net, self.number, self.content, self.tag = net, number, b"", ""

    def once(self) -> bool:
        """Ask for what is missing; whether all is there, as the digest has it."""
        headers = {"Range": f"bytes={len(self.content)}-", "If-Range": self.tag} if self.content else {}
        try:
            with self.net.user.get(f"/download/{self.number}", headers=headers, stream=True) as answer:
                if answer.headers.get("Content-Type") != "application/zip":
                    return False
                assert answer.status_code == (206 if headers else 200)
                self.tag = answer.headers["ETag"]
                for chunk in answer.iter_content(10_000):
                    self.content += chunk
        except requests.RequestException:
            return False
        if answer.headers["Repr-Digest"] == repr_digest(self.content):
            return True
        self.content = b""
        return False


@pytest.mark.parametrize("name", [*USER_FAULTS, "flip_answer"])
def test_a_download(name: str, net: Net, large_result: tuple[int, bytes]) -> None:
    """The bytes are those of the result, and few come twice."""
    number, content = large_result
    before = len(net.outer.find("GET /download/"))
    fault = net.outer.plant(Fault(match="GET /download/", **FAULTS[name]))
    mine = Download(net, number)
    wait_for(mine.once, what="the result")
    assert mine.content == content
    wait_for(lambda: net.outer.counts()[fault.kind], what="the fault")
    asked = net.outer.find("GET /download/")[before:]
    if name in GOES_ON:
        assert [call.status for call in asked] == [200, 206]
    if name in GOES_ON - {"reset_answer"}:
        assert sum(call.answer_bytes for call in asked) < len(content) + 15_000, "more than a chunk of ours came twice"
    if name == "flip_answer":
        assert [call.status for call in asked] == [200, 200]


@pytest.mark.parametrize("name", ["lost_answer", "cut_request", "cut_answer", "reset_answer", "garbage", "duplicate", "duplicate_after"])
def test_terminate_is_asked_again(name: str, net: Net) -> None:
    """Whether the first wish arrived or not, in the end the job is Killed, once."""
    sent = net.send("sleep 1000\n")
    wait_status(net.server, sent.number, "Running")
    fault = net.outer.plant(Fault(match="POST /terminate/", **FAULTS[name]))

    def once() -> bool:
        try:
            return net.user.post(f"/terminate/{sent.number}").status_code == 200
        except requests.RequestException:
            return False

    wait_for(once, what="an answer")
    assert net.ends(sent, "Killed")["cause"] == "cancelled"
    wait_for(lambda: net.outer.counts()[fault.kind], what="the fault")
    assert once()
