"""Webhooks: each end of a job arrives at least once, in order and signed, at hosts that are listed, and holds up nothing else."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeProcess
from harness import ROOT, Process, field_part, file_part, form, form_type, free_port, replace, wait_for
from hypothesis import given
from hypothesis import strategies as st
from newcomer import section
from standardwebhooks import Webhook, WebhookVerificationError
from world import BOUNDED, Desk, Peer, ask, reply, tried

import joborch
from joborch import ConfigError, DataFolder, HttpError, Job, Status
from joborch_plugins import webhooks
from joborch_plugins.reload import refresh_copies
from joborch_plugins.webhooks import GIVE_UP_S, Hosts, Webhooks, check_url, next_due, read_hosts, retry_after_s

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes: 12").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"b" * 24).decode()
OK = reply(204, b"")


@pytest.fixture(name="receiver")
def receiver_fixture() -> Iterator[Peer]:
    """A receiver of webhooks at /hook, which accepts them."""
    made = Peer()
    made.says["/hook"] = [OK]
    yield made
    made.close()


@pytest.fixture(name="office")
def office_fixture(data: DataFolder) -> Iterator[Desk]:
    """A server that may call receivers on this machine; no client takes its jobs."""
    made = Desk(data, "http://127.0.0.1:9", JOBORCH_CALLBACK_HOSTS="127.0.0.1,localhost", JOBORCH_CALLBACK_SECRET=SECRET)
    made.clock.now = time.time()  # receivers check the time
    yield made
    made.store.close()


def of(desk: Desk) -> Webhooks:
    """The plug-in of a server."""
    found: Webhooks = desk.server.plugins["webhooks"]
    return found


def ended(desk: Desk, url: str, user_id: int = 1) -> Job:
    """A job with a callback URL that was killed while it was queued."""
    job = desk.upload(callback_url=url, user_id=user_id)
    assert desk.store.move(job, Status.KILLED, "terminated", cause="cancelled")
    return job


def deliver(desk: Desk) -> None:
    """Send what is due."""
    while of(desk).tick():
        pass


def shown(desk: Desk, job: Job) -> list[dict[str, Any]]:
    """What GET /jobs/ID says of a job's webhooks."""
    return list(ask(desk.server, "GET", f"/jobs/{job.id}").json["webhooks"])


def states(desk: Desk, job: Job) -> list[tuple[str, int]]:
    """State and attempts of each webhook of a job."""
    return [(each["state"], each["attempts"]) for each in shown(desk, job)]


# == What is sent ==


def test_an_end_is_delivered_and_its_signature_verified(office: Desk, receiver: Peer) -> None:
    """By the library that Standard Webhooks publishes; with another secret, body, id or time it refuses."""
    job = ended(office, f"{receiver.url}/hook?from=joborch")
    before = ask(office.server, "GET", f"/jobs/{job.id}").json
    deliver(office)
    (asked,) = receiver.asked
    assert (asked.method, asked.path, asked.headers["Content-Type"]) == ("POST", "/hook?from=joborch", "application/json")
    said = Webhook(SECRET).verify(asked.body.decode(), asked.headers)
    assert said == json.loads(asked.body)
    assert (said["id"], said["status"], said["cause"]) == (job.id, "Killed", "cancelled")
    assert {**said, "webhooks": before["webhooks"]} == before, "it is what GET /jobs/ID says"
    assert [move["to"] for move in said["history"]] == ["Queued", "Killed"]
    for name, value in (("webhook-id", "msg_1"), ("webhook-timestamp", str(int(asked.headers["webhook-timestamp"]) + 1))):
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(asked.body.decode(), {**asked.headers, name: value})
    for secret, body in ((OTHER_SECRET, asked.body), (SECRET, asked.body + b" ")):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body.decode(), asked.headers)
    assert states(office, job) == [("delivered", 1)]


def test_while_a_secret_is_replaced_both_sign(office: Desk, receiver: Peer) -> None:
    office.restart(JOBORCH_CALLBACK_SECRET=f"{OTHER_SECRET}, {SECRET}")
    ended(office, f"{receiver.url}/hook")
    deliver(office)
    (asked,) = receiver.asked
    for secret in (SECRET, OTHER_SECRET):
        assert Webhook(secret).verify(asked.body.decode(), asked.headers)


@pytest.mark.parametrize("end", ["Completed", "Failed", "Invalid", "Killed"])
def test_each_end_is_one_webhook(end: str, office: Desk, receiver: Peer) -> None:
    job = office.with_client(Status.RUNNING, callback_url=f"{receiver.url}/hook")
    deliver(office)
    assert receiver.asked == [], "it has not ended"
    assert office.store.move(office[job], Status(end), "it is over")
    assert office.store.move(office[job], Status.CLEANED, "two days later")
    deliver(office)
    (asked,) = receiver.asked
    said = json.loads(asked.body)
    assert (said["status"], said["reason"], said["attempts"][0]["client"]) == (end, "it is over", office.link.name)


def test_chosen_states_come_in_order_each_as_it_was(office: Desk, receiver: Peer) -> None:
    """The second is not sent before the first is over, however often that fails."""
    office.restart(JOBORCH_CALLBACK_ON="queued, Processing,Killed,Cleaned")
    receiver.says["/hook"] = [reply(500), reply(500), OK]
    job = office.upload(callback_url=f"{receiver.url}/hook")
    office.store.claim(job.id, office.link.name, 100)
    office.store.move(office[job], Status.KILLED, "terminated")
    office.store.move(office[job], Status.CLEANED, "")
    for _ in range(4):
        deliver(office)
        office.clock.pass_s(60)
    bodies = [json.loads(asked.body) for asked in receiver.asked]
    assert [said["status"] for said in bodies] == ["Queued"] * 3 + ["Processing", "Killed", "Cleaned"]
    assert bodies[-1]["ended_as"] == "Killed" and bodies[0]["history"][-1]["to"] == "Queued"
    assert len({asked.headers["webhook-id"] for asked in receiver.asked}) == 4
    assert len({asked.headers["webhook-id"] for asked in receiver.asked[:3]}) == 1, "a repeat has the same id"
    assert states(office, job) == [("delivered", 3), ("delivered", 1), ("delivered", 1), ("delivered", 1)]


def test_moves_in_one_transaction_are_two_webhooks(office: Desk, receiver: Peer) -> None:
    """Each says the state that it is for."""
    office.restart(JOBORCH_CALLBACK_ON="Submitted,Completed")
    job = office.upload(callback_url=f"{receiver.url}/hook")
    office.store.claim(job.id, office.link.name, 100)
    assert office.store.move_accepted(office[job], "accepted", "7", Status.COMPLETED, "done")
    deliver(office)
    assert [json.loads(asked.body)["status"] for asked in receiver.asked] == ["Submitted", "Completed"]


def test_a_move_that_is_rolled_back_sends_nothing(office: Desk, receiver: Peer) -> None:
    job = office.upload(callback_url=f"{receiver.url}/hook")

    def fail(db: sqlite3.Connection) -> None:
        assert office.store.move_in(db, job, Status.KILLED, "")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        office.store.write(fail)
    deliver(office)
    assert (office[job].status, of(office).backlog, receiver.asked, shown(office, job)) == (Status.QUEUED, 0, [], [])


def test_a_fault_in_a_webhook_stops_no_job(
    office: Desk, receiver: Peer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace(monkeypatch, "job_json", lambda *_: 1 / 0)
    job = ended(office, f"{receiver.url}/hook")
    assert office[job].status is Status.KILLED
    assert f"job {job.id}: its webhook could not be stored" in caplog.text


# == Receivers in trouble ==


class Raw:
    """A receiver that does with each connection what a test says."""

    def __init__(self, talk: Callable[[socket.socket], object], host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> None:
        self.talk, self.calls, self.context = talk, 0, context
        self.socket = socket.create_server((host, 0))
        self.port = self.socket.getsockname()[1]
        self.closing = threading.Event()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        """Accept until it is closed."""
        with contextlib.suppress(OSError):
            while True:
                line, _ = self.socket.accept()
                self.calls += 1
                threading.Thread(target=self.serve_one, args=(line,), daemon=True).start()

    def serve_one(self, line: socket.socket) -> None:
        """Let a connection be what the test says."""
        with contextlib.suppress(OSError), contextlib.closing(line):
            line = self.context.wrap_socket(line, server_side=True) if self.context else line
            self.talk(line)
            line.close()

    def close(self) -> None:
        """Accept no more."""
        self.closing.set()
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def receive(line: socket.socket) -> bytes:
    """The whole request on a connection."""
    with line.makefile("rb") as file:
        head = b""
        while (row := file.readline()).strip():
            head += row
        length = re.search(rb"(?i)content-length: (\d+)", head)
        return head + file.read(int(length[1]) if length else 0)


def endlessly(piece: bytes, begin: bytes) -> Callable[[socket.socket], None]:
    """Answers that never end."""

    def talk(line: socket.socket) -> None:
        receive(line)
        line.sendall(begin)
        while True:
            line.sendall(piece)

    return talk


def slowly(text: bytes) -> Callable[[socket.socket], None]:
    """An answer of a byte now and then."""

    def talk(line: socket.socket) -> None:
        receive(line)
        stopped = threading.Event()
        for number in range(100_000):
            line.sendall(text[number : number + 1] or b"x")
            stopped.wait(0.05)

    return talk


HEAD = b"HTTP/1.1 200 OK\r\n"
BAD_RECEIVERS: dict[str, tuple[Callable[[socket.socket], Any], str]] = {
    "hangs up": (lambda line: None, "reset|hung up|broken|ended too early"),
    "hangs up after the request": (receive, "hung up"),
    "no HTTP": (lambda line: (receive(line), line.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")), "not HTTP"),
    "garbage": (lambda line: (receive(line), line.sendall(bytes(range(256)) * 40)), "not HTTP"),
    "another protocol": (lambda line: (receive(line), line.sendall(b"HTTP/2 200 OK\r\n\r\n")), "not HTTP"),
    "a bad number": (lambda line: (receive(line), line.sendall(b"HTTP/1.1 2000 OK\r\n\r\n")), "not HTTP"),
    "endless headers": (endlessly(b"X-More: " + b"y" * 1000 + b"\r\n", HEAD), "headers|not HTTP"),
    "one endless header": (endlessly(b"y" * 4096, HEAD + b"X-Long: "), "not HTTP|headers"),
    "endless Continue": (endlessly(b"HTTP/1.1 100 Continue\r\n\r\n", b""), "headers"),
    "endless hints": (endlessly(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", b""), "headers"),
    "a slow head": (slowly(b"HTTP/1.1 200 OK\r\nX: "), "takes too long|timed out"),
    "silence": (lambda line: (receive(line), line.recv(1)), "timed out"),
}


@pytest.mark.parametrize("kind", BAD_RECEIVERS)
def test_a_bad_receiver_is_tried_again(kind: str, office: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it answers instead of an answer is shown, and takes neither long nor much memory; nothing is lost."""
    talk, why = BAD_RECEIVERS[kind]
    receiver = Raw(talk)
    try:
        job = ended(office, f"http://127.0.0.1:{receiver.port}/")
        with monkeypatch.context() as patch:
            if kind in ("a slow head", "silence"):
                replace(patch, "SILENT_S", 0.5)
            deliver(office)
        (said,) = shown(office, job)
        assert (said["state"], said["attempts"], said["tries"][0]["code"]) == ("pending", 1, None)
        assert re.search(why, said["tries"][0]["answer"]), said
        assert said["next_attempt"] is not None and receiver.calls == 1
        receiver.talk = lambda line: (receive(line), line.sendall(b"HTTP/1.1 204 No\r\n\r\n"))
        office.clock.pass_s(10)
        deliver(office)
        assert states(office, job) == [("delivered", 2)]
    finally:
        receiver.close()


@pytest.mark.parametrize("first", [b"103 Early Hints\r\nLink: </a.css>", b"102 Processing", b"100 Continue", b"199 \r\nContent-Length: 9"])
def test_an_answer_that_comes_after_others_counts(first: bytes, office: Desk) -> None:
    """Gateways send 103 before the answer, and slow receivers 102, also several of them."""
    receiver = Raw(lambda line: (receive(line), line.sendall(2 * (b"HTTP/1.1 " + first + b"\r\n\r\n") + b"HTTP/1.1 204 No\r\n\r\n")))
    try:
        job = ended(office, f"http://127.0.0.1:{receiver.port}/")
        deliver(office)
        assert states(office, job) == [("delivered", 1)]
    finally:
        receiver.close()


def test_an_endless_answer_of_success_is_a_success(office: Desk) -> None:
    """Of its body only the beginning is read."""
    receiver = Raw(endlessly(b"z" * 65536, HEAD + b"\r\n"))
    try:
        job = ended(office, f"http://127.0.0.1:{receiver.port}/")
        deliver(office)
        (said,) = shown(office, job)
        assert said["state"] == "delivered"
        assert said["tries"][0]["answer"] == "z" * 197 + "..."
    finally:
        receiver.close()


def test_a_receiver_that_is_down_for_a_while(office: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """All webhooks arrive once it is up; while it is down it gets one call at a time, however many wait. The log says so once."""
    port = free_port()
    jobs = [ended(office, f"http://127.0.0.1:{port}/hook") for _ in range(20)]
    for _ in range(10):
        deliver(office)
        office.clock.pass_s(40)
    attempts = sum(each["attempts"] for job in jobs for each in shown(office, job))
    assert attempts <= 10 and of(office).backlog == 20
    assert caplog.text.count("failed: connection refused") == 1
    receiver = Raw(lambda line: (receive(line), line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")))
    try:
        office.store.write(lambda db: db.execute("UPDATE jobs SET callback_url = ?", (f"http://127.0.0.1:{receiver.port}/",)).rowcount)
        office.clock.pass_s(3600)
        deliver(office)
        assert {each["state"] for job in jobs for each in shown(office, job)} == {"delivered"}
        assert (receiver.calls, of(office).backlog) == (20, 0)
    finally:
        receiver.close()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(code: int, office: Desk, receiver: Peer) -> None:
    receiver.says = {"/hook": [reply(code, b"", Location=f"{receiver.url}/other")], "/other": [OK]}
    job = ended(office, f"{receiver.url}/hook")
    deliver(office)
    assert [asked.path for asked in receiver.asked] == ["/hook"]
    (said,) = shown(office, job)
    assert (said["state"], said["tries"][0]["code"]) == ("pending", code)


def test_a_receiver_that_is_gone_for_good_ends_it(office: Desk, receiver: Peer) -> None:
    """410: neither this webhook nor later ones of the job are sent; those of others are."""
    office.restart(JOBORCH_CALLBACK_ON="Queued,Killed")
    receiver.says["/hook"] = [reply(410, b"moved away")]
    receiver.says["/here"] = [OK]
    gone, other = ended(office, f"{receiver.url}/hook"), ended(office, f"{receiver.url}/here")
    deliver(office)
    assert states(office, gone) == [("gone", 1), ("gone", 0)]
    assert states(office, other) == [("delivered", 1), ("delivered", 1)]
    assert of(office).backlog == 0


def test_after_three_days_it_is_given_up(office: Desk, receiver: Peer, caplog: pytest.LogCaptureFixture) -> None:
    """Then the next one of the job has its own three days."""
    office.restart(JOBORCH_CALLBACK_ON="Queued,Killed")
    receiver.says["/hook"] = [reply(404, b"no such hook")]
    job, began = ended(office, f"{receiver.url}/hook"), office.clock.now
    while office.clock.now < began + GIVE_UP_S - 60:
        deliver(office)
        office.clock.pass_s(1800)
    (first, second) = shown(office, job)
    assert (first["state"], second["state"], second["attempts"]) == ("pending", "pending", 0)
    assert len(first["tries"]) == 5 and first["tries"][-1]["answer"] == "no such hook"
    office.clock.pass_s(3600)
    receiver.says["/hook"] = [reply(404), OK]
    deliver(office)
    (first, second) = shown(office, job)
    assert (first["state"], second["state"]) == ("failed", "delivered")
    assert f"job {job.id}: its webhook was not delivered: it answered 404" in caplog.text


def test_retry_after_is_respected(office: Desk, receiver: Peer) -> None:
    """As seconds and as a date; all webhooks to this receiver wait meanwhile."""
    at = office.clock.wall() + 1000
    date = format_datetime(datetime.fromtimestamp(int(at) + 1, timezone.utc), usegmt=True)
    for asks in ("1000", date):
        receiver.says["/hook"] = [reply(503, b"", Retry_After=asks), OK]
        receiver.asked.clear()
        first, second = ended(office, f"{receiver.url}/hook"), ended(office, f"{receiver.url}/hook")
        for _ in range(24):
            deliver(office)
            office.clock.pass_s(40)
        assert len(receiver.asked) == 1, asks
        office.clock.pass_s(60)
        deliver(office)
        assert [states(office, job) for job in (first, second)] == [[("delivered", 2)], [("delivered", 1)]]
        office.clock.now = at - 1000


# == The rule of pauses ==

TIMES = st.floats(0, 2e9)


@given(TIMES, st.floats(0, GIVE_UP_S * 2), st.integers(1, 10_000), st.floats(0, 1e12), st.floats(0, 1))
@BOUNDED
def test_when_a_failed_webhook_is_tried_again(began: float, age: float, failures: int, wait_s: float, chance: float) -> None:
    """Later than now, not before Retry-After, never after three days, and not at all then."""
    now, end = began + age, began + GIVE_UP_S
    due = next_due(now, began, failures, wait_s, chance)
    assert (due is None) == (now >= end)
    if due is not None:
        assert now < due <= end
        assert due == end or due >= now + max(wait_s, 3.75) - 1e-3
        assert due <= now + max(wait_s, 3600.0) + 1e-3


@given(st.floats(0, 1))
@BOUNDED
def test_all_pauses_of_a_webhook(chance: float) -> None:
    """Soon at first, hourly at the end, and the last attempt after three days."""
    at = [0.0]
    while (due := next_due(at[-1], 0.0, len(at), 0.0, chance)) is not None:
        at.append(due)
    assert at[-1] == GIVE_UP_S and 75 <= len(at) <= 120
    assert at[1] <= 5 and at[4] <= 75
    pauses = [round(after - before, 3) for before, after in zip(at, at[1:])][:-1]
    assert pauses == sorted(pauses) and pauses[-1] <= 3600


@pytest.mark.parametrize("text", ["", "soon", "-5", "1.5", "Wed, 99 Foo 2026 00:00:00 GMT", "Mon, 01 Jan 1990 00:00:00 GMT", "1" * 13])
def test_a_retry_after_that_says_nothing(text: str) -> None:
    assert retry_after_s(text, time.time()) == 0.0


# == Nobody is held up ==


def test_a_receiver_that_hangs_holds_up_no_other(office: Desk, receiver: Peer) -> None:
    hanging = Raw(lambda line: hanging.closing.wait(60))
    try:
        stuck = [ended(office, f"http://127.0.0.1:{hanging.port}/") for _ in range(5)]
        sender = threading.Thread(target=of(office).tick, daemon=True)
        sender.start()
        wait_for(lambda: hanging.calls, 60, "its call")
        well = [ended(office, f"{receiver.url}/hook") for _ in range(30)]
        deliver(office)
        assert [states(office, job) for job in well] == [[("delivered", 1)]] * 30
        assert hanging.calls == 1, "it gets one at a time"
        assert [states(office, job)[0][0] for job in stuck] == ["pending"] * 5
    finally:
        hanging.close()
    sender.join(60)
    assert not sender.is_alive()


def test_many_receivers_that_hang_leave_senders_for_the_others(office: Desk, receiver: Peer) -> None:
    """What has never accepted a webhook shares half of the senders, one each; what accepts them gets two."""
    ended(office, f"{receiver.url}/hook")
    deliver(office)
    office.restart(JOBORCH_CALLBACK_HOSTS="*")
    plugin = of(office)
    plugin.receiver(receiver.url).is_proven = True
    for number in range(40):
        ended(office, f"https://hanging{number}.example.org/")
    taken = [plugin.claim() for _ in range(40)]
    names = [found[0].name for found in taken if found]
    assert len(names) == len(set(names)) == webhooks.SENDERS_UNPROVEN < webhooks.SENDERS
    for _ in range(4):
        ended(office, f"{receiver.url}/hook")
    assert [found[0].name for found in iter(plugin.claim, None)] == [receiver.url] * 2


def test_receivers_take_turns(office: Desk) -> None:
    office.restart(JOBORCH_CALLBACK_HOSTS="*")
    plugin, names = of(office), ["http://a.example", "http://b.example", "http://c.example"]
    for name in names * 3:
        ended(office, name)
        plugin.receiver(name).is_proven = True
    assert [found[0].name for found in iter(plugin.claim, None)] == names * 2


def test_a_webhook_whose_note_fails_is_not_sent_over_and_over(office: Desk, receiver: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    job, plugin = ended(office, f"{receiver.url}/hook"), of(office)
    with monkeypatch.context() as patch:
        patch.setattr(plugin.store, "write", lambda *_, **__: (_ for _ in ()).throw(joborch.StorageError("the disk is full")))
        with pytest.raises(joborch.StorageError):
            plugin.tick()
        assert not plugin.tick()
    office.clock.pass_s(60)
    deliver(office)
    assert (len(receiver.asked), states(office, job)) == (2, [("delivered", 1)])


# == Which hosts are called ==


class Canary:
    """A port of this machine, on IPv4 and IPv6, that nobody may call."""

    def __init__(self) -> None:
        self.first = Raw(lambda line: None)
        self.lines = [self.first.socket]
        with contextlib.suppress(OSError):  # no IPv6 here
            self.lines.append(socket.create_server(("::1", self.first.port), family=socket.AF_INET6))
        for line in self.lines[1:]:
            line.setblocking(False)
        self.port = self.first.port

    def calls(self) -> int:
        """How many calls there were."""
        count = self.first.calls
        for line in self.lines[1:]:
            with contextlib.suppress(OSError):
                line.accept()
                count += 1
        return count

    def close(self) -> None:
        """Close both."""
        self.first.close()
        for line in self.lines[1:]:
            line.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    """A port that nobody may call."""
    made = Canary()
    yield made
    made.close()


TRIES = [
    "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://LOCALHOST.:{port}/", "http://127.1:{port}/", "http://127.0.1:{port}/",
    "http://2130706433:{port}/", "http://0x7f000001:{port}/", "http://0x7f.0.0.1:{port}/", "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/", "http://0:{port}/", "http://0.0.0.0:{port}/", "http://127.255.255.254:{port}/", "http://127.0.0.1.:{port}/",
    "http://[::1]:{port}/", "http://[::]:{port}/", "http://[0:0:0:0:0:0:0:1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/", "http://[::ffff:0:127.0.0.1]:{port}/", "http://[::127.0.0.1]:{port}/", "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/", "http://[2001:0:0:0:0:0:80ff:fffe]:{port}/", "http://[fe80::1]:{port}/", "http://[fe80::1%25lo]:{port}/",
    "http://[fc00::1]:{port}/", "http://[fd00:ec2::254]:{port}/", "http://169.254.169.254:{port}/latest/meta-data/", "http://2852039166:{port}/",
    "http://10.0.0.1:{port}/", "http://172.16.0.1:{port}/", "http://192.168.1.1:{port}/", "http://100.64.0.1:{port}/",
    "http://100.100.100.200:{port}/", "http://168.63.129.16:{port}/", "http://224.0.0.1:{port}/", "http://255.255.255.255:{port}/",
    "http://user@127.0.0.1:{port}/", "http://public.example@127.0.0.1:{port}/", "http://public.example:80@127.0.0.1:{port}/",
    "http://public.example\\@127.0.0.1:{port}/", "http://127.0.0.1:{port}\\@public.example/", "http://127.0.0.1:{port}#@public.example/",
    "http://public.example#@127.0.0.1:{port}/", "http://①②⑦.⓪.⓪.①:{port}/", "http://127。0。0。1:{port}/", "http://127.0.0.1%00:{port}/",
    "http://127.0.0.1%2f:{port}/", "http://127.0.0.1 :{port}/", "http://127.0.0.1\t:{port}/", "\x01http://127.0.0.1:{port}/",
    "http:/127.0.0.1:{port}/", "http:127.0.0.1:{port}/", "//127.0.0.1:{port}/", "HTTP://127.0.0.1:{port}/", "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_POST", "ftp://127.0.0.1:{port}/", "unix:/run/docker.sock", "http://[::ffff:127.0.0.1%25lo]:{port}/",
    "http://127.0.0.1:{port}/\r\nHost: evil", "http://[v1.127.0.0.1]:{port}/", "http://127.0.0.1:0{port}/", "http://[::1]x:{port}/",
]  # fmt: skip


@pytest.mark.parametrize("template", TRIES)
def test_no_url_leads_into_the_own_network(template: str, office: Desk, canary: Canary) -> None:
    """Although all public hosts are listed: it is refused at the upload, or before the connection."""
    office.restart(JOBORCH_CALLBACK_HOSTS="*")
    url, plugin = template.format(port=canary.port), of(office)
    service = office.server.services["example"]
    said = tried(lambda: plugin.url_for(service, url), HttpError)
    assert said == url or (isinstance(said, HttpError) and (said.status, said.field) == (400, "callback_url"))
    job = ended(office, url)  # as if it had got through
    deliver(office)
    (found,) = shown(office, job)
    assert (found["state"], found["tries"][0]["code"]) == ("pending", None)
    why = "not public|is never called|give an http|name is not known|not a name|remove the user|Only|Expected|At|Exactly|Unexpected|Invalid"
    assert re.search(why, found["tries"][0]["answer"]), found
    assert canary.calls() == 0


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Let names resolve to these addresses, one after the other, the last one for ever; return the list of names that were asked for."""
    asked, left, real = list[str](), list(answers), socket.getaddrinfo

    def resolve(host: str, port: int, *rest: Any, **more: Any) -> Any:
        asked.append(host)
        return real(left.pop(0) if len(left) > 1 else left[0], port, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return asked


def test_a_name_that_resolves_to_another_address_the_second_time(office: Desk, canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt resolves once, and the address that was checked is the one that is called."""
    office.restart(JOBORCH_CALLBACK_HOSTS="*.example.org,127.0.0.2")
    receiver = socket.create_server(("127.0.0.2", canary.port))
    calls = list[bytes]()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = receiver.accept()
                with line:
                    calls.append(receive(line))
                    line.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    asked = resolving(monkeypatch, "127.0.0.2", "127.0.0.1")
    job = ended(office, f"http://rebind.example.org:{canary.port}/")
    deliver(office)
    office.clock.pass_s(60)
    deliver(office)
    receiver.close()
    assert asked == ["rebind.example.org"] * 2
    assert len(calls) == 1 and f"Host: rebind.example.org:{canary.port}".encode() in calls[0]
    (said,) = shown(office, job)
    assert [each["code"] for each in said["tries"]] == [500, None]
    assert "rebind.example.org has the address 127.0.0.1, which is not public" in said["tries"][1]["answer"]
    assert canary.calls() == 0


SPECIAL = [
    "100.64.0.1", "100.127.255.255", "192.0.0.8", "192.0.0.170", "192.88.99.1", "192.0.2.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.5", "3fff::1", "5f00::1", "100::1", "2001:db8::1", "2001:2::1", "2001:10::1", "fc00::1", "2600::5efe:10.0.0.1",
    "2600::200:5efe:127.0.0.1", "2600::5efe:169.254.169.254", "::ffff:192.88.99.1", "64:ff9b::10.0.0.1", "64:ff9b::192.0.0.8",
    "2002:a00:1::", "2001:0:1:2::f5ff:fffe",
]  # fmt: skip


@pytest.mark.parametrize("address", SPECIAL)
def test_an_address_for_a_special_purpose_is_not_public(address: str) -> None:
    """On any version of Python, also in an IPv6 address that stands for it."""
    with pytest.raises(OSError, match=r"not public|never called"):
        read_hosts("*").check("portal.example.org", address)


def test_a_dot_at_the_end_of_a_host_changes_nothing(office: Desk, receiver: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listed host may have an address that is not public."""
    receiver.says["/hook"] = [OK]
    office.restart(JOBORCH_CALLBACK_HOSTS="portal.example.org")
    asked = resolving(monkeypatch, "127.0.0.1")
    job = ended(office, f"http://Portal.Example.org.:{receiver.url.rpartition(':')[2]}/hook")
    deliver(office)
    assert states(office, job) == [("delivered", 1)] and asked == ["portal.example.org"]


def test_the_good_address_of_a_host_is_called(office: Desk, receiver: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it has a forbidden one, too."""
    port, real = int(receiver.url.rpartition(":")[2]), socket.getaddrinfo
    office.restart(JOBORCH_CALLBACK_HOSTS="*.example.org,127.0.0.1")
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: [*real("10.0.0.1", *rest, **more), *real("127.0.0.1", *rest, **more)]
    )
    job = ended(office, f"http://two.example.org:{port}/hook")
    deliver(office)
    assert states(office, job) == [("delivered", 1)]


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl to make a certificate")
@pytest.mark.parametrize(("name", "trusted"), [("portal.example.org", True), ("other.example.org", True), ("portal.example.org", False)])
def test_tls_verifies_the_name(name: str, trusted: bool, office: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the address; JOBORCH_CA_FILE says who is trusted."""
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    words = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-out", certificate, "-days", "2"]
    subprocess.run(["openssl", "req", *words, "-subj", "/CN=x", "-addext", f"subjectAltName=DNS:{name}"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    receiver = Raw(lambda line: (receive(line), line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")), context=context)
    office.restart(JOBORCH_CALLBACK_HOSTS="portal.example.org", **({"JOBORCH_CA_FILE": certificate} if trusted else {}))
    resolving(monkeypatch, "127.0.0.1")
    try:
        job = ended(office, f"https://portal.example.org:{receiver.port}/")
        deliver(office)
        (said,) = shown(office, job)
        good = trusted and name == "portal.example.org"
        assert said["state"] == ("delivered" if good else "pending")
        assert good or "certificate verify failed" in said["tries"][0]["answer"]
    finally:
        receiver.close()


LISTS = [
    ("portal.example.org", "portal.example.org", "203.0.112.1", True),
    ("portal.example.org", "Portal.example.org.", "203.0.112.1", True),
    ("portal.example.org", "portal.example.org", "10.0.0.5", True),
    ("portal.example.org", "portal.example.org", "127.0.0.1", True),
    ("portal.example.org", "portal.example.org", "::1", True),
    ("portal.example.org", "portal.example.org", "169.254.169.254", False),
    ("portal.example.org", "portal.example.org", "0.0.0.0", False),
    ("portal.example.org,169.254.169.254", "portal.example.org", "169.254.169.254", True),
    ("portal.example.org,169.254.169.254", "169.254.169.254", "169.254.169.254", True),
    ("*", "portal.example.org", "8.8.8.8", True),
    ("*", "portal.example.org", "2606:4700::1", True),
    ("*", "portal.example.org", "10.0.0.5", False),
    ("*,10.0.0.0/8", "portal.example.org", "10.0.0.5", True),
    ("*,10.0.0.0/8", "portal.example.org", "::ffff:10.0.0.5", True),
    ("*,10.0.0.0/8", "portal.example.org", "192.168.0.5", False),
    ("10.0.0.0/8", "10.0.0.5", "10.0.0.5", True),
    ("[::1]", "::1", "::1", True),
]


@pytest.mark.parametrize(("listed", "host", "address", "allowed"), LISTS)
def test_what_the_list_of_hosts_means(listed: str, host: str, address: str, allowed: bool) -> None:
    hosts, url = read_hosts(listed), f"https://[{host}]/" if ":" in host else f"https://{host}/"
    assert check_url(hosts, url) == url
    if allowed:
        hosts.check(host.lower().rstrip("."), address)
    else:
        with pytest.raises(OSError, match=r"not public|never called"):
            hosts.check(host, address)


@pytest.mark.parametrize(
    ("listed", "host"),
    [
        ("portal.example.org", "evil.portal.example.org"), ("portal.example.org", "portal.example.org.evil"),
        ("*.example.org", "example.org"),
        ("*.example.org", "evilexample.org"), ("10.0.0.0/8", "portal.example.org"), ("10.0.0.0/8", "11.0.0.1"), ("*.org", "example.com"),
    ],
)  # fmt: skip
def test_a_host_that_is_not_listed(listed: str, host: str) -> None:
    with pytest.raises(ValueError, match=f"has not listed {re.escape(host)} in JOBORCH_CALLBACK_HOSTS"):
        check_url(read_hosts(listed), f"https://{host}/")
    with pytest.raises(ValueError, match="has not listed"):
        check_url(Hosts(), f"https://{host}/")


# == Over HTTP ==


def upload(desk: Desk, **fields: str) -> Any:
    """Upload a job; return the answer."""
    parts = [file_part("run.sh", b"true\n"), field_part("user_id", "1"), field_part("service", "example")]
    parts += [field_part(name, value) for name, value in fields.items()]
    headers = {name.replace("-", "_"): value for name, value in form_type().items()}
    return ask(desk.server, "POST", "/upload", form(parts), **headers)


def test_an_upload_with_a_callback(office: Desk, receiver: Peer) -> None:
    """It is kept by a retry, a service may have one for all its jobs, and one that is not allowed is refused with the remedy."""
    url = f"{receiver.url}/hook"
    said = upload(office, callback_url=url)
    assert (said.status, said.json["callback_url"], said.json["webhooks"]) == (201, url, [])
    assert "warnings" in said.json and said.json["warnings"] == []
    assert upload(office).json["callback_url"] is None
    again = ask(office.server, "POST", f"/jobs/{said.json['id']}/retry")
    assert (again.status, again.json["callback_url"]) == (201, url)
    refused = upload(office, callback_url="https://evil.example.org/")
    assert (refused.status, refused.json["field"]) == (400, "callback_url")
    assert "has not listed evil.example.org in JOBORCH_CALLBACK_HOSTS" in refused.json["message"]
    office.restart(SERVICE_EXAMPLE_CALLBACK_URL=f"{receiver.url}/all")
    assert upload(office).json["callback_url"] == f"{receiver.url}/all"
    assert upload(office, callback_url=url).json["callback_url"] == url


def test_it_is_shown_and_sent_again(office: Desk, receiver: Peer) -> None:
    receiver.says["/hook"] = [reply(500, b"what\x1b[31m?"), OK]
    job = ended(office, f"{receiver.url}/hook")
    deliver(office)
    (said,) = shown(office, job)
    assert said["tries"] == [{"at": said["at"], "code": 500, "answer": "what [31m?"}]
    page = ask(office.server, "GET", f"/dashboard/jobs/{job.id}").body.decode()
    assert "what [31m?" in page and f"/jobs/{job.id}/redeliver" in page
    waits = ask(office.server, "POST", f"/jobs/{job.id}/redeliver")
    assert (waits.status, waits.json["webhooks"][0]["state"]) == (202, "pending")
    deliver(office)  # at once, and not after its pause
    assert (states(office, job), of(office).backlog) == ([("delivered", 2)], 0)
    ids = {asked.headers["webhook-id"] for asked in receiver.asked}
    assert ask(office.server, "POST", f"/jobs/{job.id}/redeliver").status == 202
    assert (states(office, job), of(office).backlog) == ([("pending", 2)], 1)
    deliver(office)
    assert (states(office, job), of(office).backlog) == ([("delivered", 3)], 0)
    assert {asked.headers["webhook-id"] for asked in receiver.asked} == ids


def test_what_cannot_be_sent_again(office: Desk, receiver: Peer) -> None:
    silent, waiting = office.upload(), office.upload(callback_url=f"{receiver.url}/hook")
    for job in (silent, waiting):
        said = ask(office.server, "POST", f"/jobs/{job.id}/redeliver")
        assert said.status == 409 and "has sent no webhook" in said.json["message"]
    assert ask(office.server, "POST", "/jobs/999/redeliver").status == 404


def test_metrics_and_health(office: Desk) -> None:
    port = free_port()
    for _ in range(3):
        ended(office, f"http://127.0.0.1:{port}/")
    deliver(office)
    lines = ask(office.server, "GET", "/metrics").body.decode().splitlines()
    assert {'joborch_webhook_attempts_total{outcome="retried"} 1', "joborch_webhook_backlog 3"} <= set(lines)
    kinds = [problem["kind"] for problem in ask(office.server, "GET", "/health").json["problems"]]
    assert "webhooks" not in kinds
    since = ask(office.server, "GET", "/health").json
    office.clock.pass_s(601)
    (problem,) = [each for each in ask(office.server, "GET", "/health").json["problems"] if each["kind"] == "webhooks"]
    assert problem["what"] == f"webhooks to http://127.0.0.1:{port} fail: connection refused" and since
    assert "joborch redeliver" in problem["remedy"]


def test_they_go_with_their_job_and_survive_a_restart(office: Desk, receiver: Peer) -> None:
    receiver.says["/hook"] = [reply(500), OK]
    first, second = ended(office, f"{receiver.url}/hook"), ended(office, f"{receiver.url}/hook")
    office.restart()
    assert of(office).backlog == 2
    office.clock.pass_s(60)
    deliver(office)
    office.clock.pass_s(60)
    deliver(office)
    assert [states(office, job)[0][0] for job in (first, second)] == ["delivered"] * 2
    office.store.forget([first.id])
    assert [row["job_id"] for row in office.store.read("SELECT job_id FROM deliveries")] == [second.id]


# == Settings ==


def test_a_secret_is_created_at_the_first_start(office: Desk, receiver: Peer) -> None:
    """Nobody else can read it; the next start uses it."""
    path = office.data.path / "callback-secret"
    assert not path.exists()
    office.environment.pop("JOBORCH_CALLBACK_SECRET")
    for _ in range(2):
        office.restart()
        ended(office, f"{receiver.url}/hook")
        deliver(office)
    assert path.stat().st_mode & 0o777 == 0o600
    for asked in receiver.asked:
        assert Webhook(path.read_text().strip()).verify(asked.body.decode(), asked.headers)


def test_without_hosts_there_is_no_secret(office: Desk) -> None:
    office.environment.pop("JOBORCH_CALLBACK_SECRET")
    office.restart(JOBORCH_CALLBACK_HOSTS="")
    assert not (office.data.path / "callback-secret").exists()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"JOBORCH_CALLBACK_HOSTS": "portal example"}, "is no host"),
        ({"JOBORCH_CALLBACK_HOSTS": "https://portal.example.org"}, "is no host"),
        ({"JOBORCH_CALLBACK_ON": "Ended"}, "give states separated by commas"),
        ({"JOBORCH_CALLBACK_ON": "Prepared"}, "give states separated by commas"),
        ({"JOBORCH_CALLBACK_SECRET": "secret"}, r"JOBORCH_CALLBACK_SECRET is \(hidden\): give whsec_"),
        ({"JOBORCH_CALLBACK_SECRET": "whsec_c2hvcnQ="}, "24 to 64 bytes"),
        ({"SERVICE_EXAMPLE_CALLBACK_URL": "ftp://portal.example.org"}, "give a URL"),
        (
            {"SERVICE_EXAMPLE_CALLBACK_URL": "https://portal.example.org/"},
            "SERVICE_EXAMPLE_CALLBACK_URL .*has not listed portal.example.org",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        joborch.load_config("server", {}, {"DATA_PATH": "/nowhere", **settings})


@pytest.mark.parametrize("content", [None, b"whsec_short", b"\xff", b""])
def test_a_file_with_a_secret_that_cannot_be_used(content: bytes | None, office: Desk, tmp_path: Path) -> None:
    office.environment.pop("JOBORCH_CALLBACK_SECRET")
    path = tmp_path / "secret"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"JOBORCH_CALLBACK_SECRET_FILE {path} cannot be used"):
        office.restart(JOBORCH_CALLBACK_SECRET_FILE=str(path))
    with pytest.raises(ConfigError, match="JOBORCH_CALLBACK_SECRET_FILE /dev/zero cannot be used: it has more than 64 KiB"):
        office.restart(JOBORCH_CALLBACK_SECRET_FILE="/dev/zero")
    office.environment.pop("JOBORCH_CALLBACK_SECRET_FILE")
    office.restart(JOBORCH_CALLBACK_SECRET=SECRET)


def test_a_reload_takes_other_hosts_states_and_secrets(office: Desk, receiver: Peer) -> None:
    """Without a restart; a file with the secret that cannot be used changes nothing."""
    office.server.config = dataclasses.replace(
        office.server.config, callback_hosts="*.example.org", callback_on=("Queued",), callback_secret=OTHER_SECRET
    )
    refresh_copies(office.server, office.server.config)
    assert upload(office, callback_url=f"{receiver.url}/hook").status == 400
    assert upload(office, callback_url="https://a.example.org/").status == 201
    assert (of(office).backlog, of(office).keys) == (1, (b"b" * 24,))
    office.server.config = dataclasses.replace(office.server.config, callback_secret="", callback_secret_file="/nowhere/secret")
    refresh_copies(office.server, office.server.config)
    assert of(office).keys == (b"b" * 24,)


# == Processes ==


@pytest.fixture
def receiving(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """The receiver of docs/use.md as a process, its port, and its secret."""
    page = section((ROOT / "docs" / "use.md").read_text(encoding="utf-8"), "Webhooks")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    port = free_port()
    (tmp_path / "receiver.py").write_text(code.replace("8000", str(port)))
    (tmp_path / "callback-secret").write_text(SECRET + "\n")
    with subprocess.Popen([sys.executable, "receiver.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as made:
        yield made, port, str(tmp_path / "callback-secret")
        made.terminate()


def test_the_receiver_of_the_documents(receiving: tuple[subprocess.Popen[str], int, str], make_process: MakeProcess) -> None:
    """It prints the end of a job of a real server, whose last attempt may have come before it listened; a forger gets 401."""
    made, port, secret = receiving
    settings = {"JOBORCH_CALLBACK_HOSTS": "127.0.0.1", "JOBORCH_CALLBACK_SECRET_FILE": secret}
    server: Process = make_process("server", settings).start()
    parts = [file_part("run.sh", b"true\n"), field_part("user_id", "1"), field_part("service", "example")]
    parts.append(field_part("callback_url", f"http://127.0.0.1:{port}/"))
    number = server.post("/upload", data=form(parts), headers=form_type()).json()["id"]
    assert server.post(f"/terminate/{number}").status_code == 200
    wait_for(lambda: server.job(number)["webhooks"][0]["state"] == "delivered", 90, "its delivery")
    assert made.stdout is not None and made.stdout.readline() == f"job {number} is Killed\n"
    with socket.create_connection(("127.0.0.1", port)) as line:
        head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nwebhook-id: a\r\nwebhook-timestamp: {time.time():.0f}\r\n"
        line.sendall((head + "webhook-signature: v1,AAAA\r\n\r\n{}").encode())
        assert line.recv(100).startswith(b"HTTP/1.0 401")
