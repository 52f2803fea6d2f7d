"""Server and client prove to each other that they hold the same token; nothing that matters crosses before that.

Between them stands somebody who changes, repeats, swaps and cuts what passes; or who took the client's port.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    ENDED,
    STRANGER_UID,
    LinkCaller,
    Pair,
    Process,
    assert_error,
    download,
    file_part,
    form,
    form_type,
    free_port,
    from_source,
    open_program,
    parse_answer,
    raw_exchange,
    raw_head,
    submit,
    wait_for,
    wait_status,
)
from hypothesis import given
from hypothesis import strategies as st
from releases import FIRST, source_of
from world import BOUNDED, Between, Change, HeadLines, read_message, serve_each, tried

import joborch
from joborch import HttpError, ProofReader
from joborch_base.archives import repr_digest
from joborch_base.identity import PROOF_SHAPE, SESSIONS_LIMIT, SIGNED_OF_ANSWER, WINDOW, Proof, link_key

BEARER = {"Authorization": f"Bearer {Pair.TOKEN}"}
OTHER_UID = STRANGER_UID - 1

# == What is proven ==

PROOF = Proof(link_key("t"), "a" * 32, "b" * 32, 7, "POST", "/kill/1?x=1")
HEADERS = {"X-Joborch-Mark": "m", "Content-Type": "text/plain", "Accept": "*/*"}


def test_the_mac_is_the_one_of_the_contract() -> None:
    """Written down here once more, byte by byte."""
    key = hashlib.pbkdf2_hmac("sha256", b"t", b"joborch link 1", 10_000)
    text = json.dumps(["request", 1, "a" * 32, "b" * 32, 7, "POST", "/kill/1?x=1", 3, "text/plain", [["x-joborch-mark", "m"]]])
    assert PROOF.of_request(HEADERS, 3) == hmac.new(key, text.encode(), "sha256").hexdigest()
    text = json.dumps(["answer", 1, "a" * 32, "b" * 32, 7, "POST", "/kill/1?x=1", 200, "2", "", "", '"e"', "", "", ""])
    assert PROOF.of_answer(200, {"Content-Length": "2", "ETag": '"e"'}) == hmac.new(key, text.encode(), "sha256").hexdigest()


CHANGED = [
    ({"key": link_key("u")}, HEADERS, 3),
    ({"server": "c" * 32}, HEADERS, 3),
    ({"client": "c" * 32}, HEADERS, 3),
    ({"number": 8}, HEADERS, 3),
    ({"method": "GET"}, HEADERS, 3),
    ({"target": "/kill/2?x=1"}, HEADERS, 3),
    ({"target": "/kill/1"}, HEADERS, 3),
    ({}, HEADERS, 4),
    ({}, HEADERS, -1),
    ({}, {**HEADERS, "Content-Type": "text/html"}, 3),
    ({}, {**HEADERS, "X-Joborch-Mark": "n"}, 3),
    ({}, {**HEADERS, "X-Joborch-New": ""}, 3),
    ({}, {"Content-Type": "text/plain"}, 3),
    ({}, {"X-Joborch-M": "ark: m", "Content-Type": "text/plain"}, 3),
]


@pytest.mark.parametrize(("changes", "headers", "length"), CHANGED)
def test_each_part_of_a_request_counts(changes: dict[str, Any], headers: dict[str, str], length: int) -> None:
    changed = PROOF._replace(**changes)
    assert changed.of_request(headers, length) != PROOF.of_request(HEADERS, 3)
    assert PROOF.of_request({**HEADERS, "Accept": "text/html", "Host": "x"}, 3) == PROOF.of_request(HEADERS, 3), "gateways change these"


@pytest.mark.parametrize("name", SIGNED_OF_ANSWER)
def test_each_part_of_an_answer_counts(name: str) -> None:
    known = PROOF.of_answer(200, {})
    assert known not in (PROOF.of_answer(200, {name: "x"}), PROOF.of_answer(201, {}), PROOF.of_request({}, 0))
    assert known not in {PROOF._replace(**changes).of_answer(200, {}) for changes, _, _ in CHANGED if changes}


def accepted(reader: ProofReader, proof: Proof, headers: dict[str, str] | None = None) -> bool:
    """Whether a client takes a request."""
    head = {name.upper().replace("-", "_"): value for name, value in (headers or {}).items()}
    head["AUTHORIZATION"] = proof.authorization(headers or {}, 0)
    got = tried(lambda: reader.accept(head, proof.method, proof.target, 0), HttpError)
    assert got == proof or got.status == 401
    return got == proof


@BOUNDED
@given(st.lists(st.integers(1, 3 * WINDOW) | st.integers(1, 50), max_size=60))
def test_each_number_is_taken_once(numbers: list[int]) -> None:
    """In any order within the window; what is older is refused, seen or not."""
    reader, seen = ProofReader(("t",)), set[int]()
    for number in numbers:
        fresh = number not in seen and number > max(seen, default=0) - WINDOW
        assert accepted(reader, Proof(link_key("t"), "a" * 32, reader.nonce, number, "GET", "/")) is fresh
        seen.add(number)


def test_sessions_are_bounded_and_nothing_comes_again() -> None:
    """Who holds no token fills no place; when all are taken, a new nonce makes all that was proven by the old one worthless."""
    reader = ProofReader(("t", "second"))
    proofs = [Proof(link_key("t"), f"{number:032x}", reader.nonce, 1, "GET", "/") for number in range(SESSIONS_LIMIT)]
    assert not any(accepted(reader, Proof(link_key("wrong"), f"{number:032x}", reader.nonce, 1, "GET", "/")) for number in range(2000))
    assert all(accepted(reader, proof) for proof in proofs)
    assert not any(accepted(reader, proof) for proof in proofs)
    before = reader.nonce
    assert not accepted(reader, Proof(link_key("second"), "a" * 32, before, 1, "GET", "/"))
    assert reader.nonce != before
    assert not any(accepted(reader, proof) for proof in proofs)
    assert accepted(reader, Proof(link_key("second"), "a" * 32, reader.nonce, 1, "GET", "/"))


# == A client that is called ==


@pytest.fixture(name="client")
def client_fixture(make_process: MakeProcess) -> Process:
    """A client with two tokens."""
    return make_process("client", {"JOBORCH_TOKEN": f"another-token-of-it,{Pair.TOKEN}", "JOBORCH_MAX_UPLOAD": "1M"}).start()


def test_a_proven_request_has_a_proven_answer(client: Process) -> None:
    """Whoever makes the answer: a handler, the router, what judges the head."""
    for token in (Pair.TOKEN, "another-token-of-it"):
        caller = LinkCaller(client, token).hello()
        assert caller.call("GET", "/events?since=0").json()["payloads"] == []
        assert caller.call("GET", "/hello").json()["nonce"] == caller.peer
        assert caller.call("GET", "/retrieve/77").status_code == 404
        assert caller.call("GET", "/nowhere").status_code == 404
        assert caller.call("DELETE", "/events").status_code == 405
        assert caller.call("GET", "/retrieve/x").status_code in (400, 404)
        assert caller.call("POST", "/kill/77", data=b"").status_code == 404
        assert caller.call("GET", "/events?since=-1").status_code == 400
    head = raw_head("POST", "/submit", client.port, f"Authorization: {caller.head('POST', '/submit', {}, 0)}", "Content-Length: 0")
    status, headers, _ = parse_answer(raw_exchange(client.port, head))
    assert (status, caller.is_proven(status, {joborch_case(name): value for name, value in headers.items()}, "POST", "/submit")) == (
        411,
        True,
    )
    size = 5 << 20
    head = raw_head("POST", "/submit", client.port, f"Authorization: {caller.head('POST', '/submit', {}, size)}", f"Content-Length: {size}")
    status, headers, _ = parse_answer(raw_exchange(client.port, head))
    assert (status, caller.is_proven(status, {joborch_case(name): value for name, value in headers.items()}, "POST", "/submit")) == (
        413,
        True,
    )


def joborch_case(name: str) -> str:
    """A header's name as the contract spells it."""
    known = {spelled.lower(): spelled for spelled in (*LinkCaller.SIGNED, "X-Joborch-Mac")}
    return known.get(name.lower(), name)


def refused_with(
    client: Process, authorization: str, method: str = "GET", target: str = "/events?since=0", **headers: str
) -> dict[str, str]:
    """The headers of the 401 with which a request is refused."""
    answer = client.call(method, target, headers={"Authorization": authorization, **{n.replace("_", "-"): v for n, v in headers.items()}})
    assert_error(answer, 401)
    assert "X-Joborch-Mac" not in answer.headers
    return dict(answer.headers)


def test_what_is_not_proven_is_refused(client: Process) -> None:
    """Changed, repeated, of another start, of another token, or garbled."""
    caller = LinkCaller(client).hello()
    good = caller.head("GET", "/events?since=0", {}, 0)
    assert client.get("/events?since=0", headers={"Authorization": good}).status_code == 200
    refused_with(client, good)  # again
    for name, value in {"X-Joborch-Mark": "x", "Content-Type": "text/plain"}.items():
        refused_with(client, caller.head("GET", "/events?since=0", {}, 0), **{name.replace("-", "_"): value})
    refused_with(client, caller.head("GET", "/events?since=1", {}, 0))
    refused_with(client, caller.head("POST", "/events?since=0", {}, 0))
    refused_with(client, caller.head("GET", "/events?since=0", {"X-Joborch-Mark": "x"}, 0))
    refused_with(client, caller.head("GET", "/events?since=0", {}, 1))
    assert "X-Joborch-Nonce" not in refused_with(client, LinkCaller(client, "wrong-token").hello().head("GET", "/events?since=0", {}, 0))
    for garbled in ("Joborch", "Joborch x", good[:-1], good.replace("n=", "n=-"), f"{good}, {good}", f"Joborch {'x' * 9000}"):
        refused_with(client, garbled)
    assert caller.call("GET", "/events?since=0").status_code == 200, "none of these has harmed the session"
    old = [caller.head("GET", "/events?since=0", {}, 0) for _ in range(2)]
    caller.number += 5000
    caller.call("GET", "/events?since=0")
    for late in old:
        refused_with(client, late)
    client.restart()
    told = refused_with(client, caller.head("GET", "/events?since=0", {}, 0))
    caller.peer = told["X-Joborch-Nonce"]
    assert caller.call("GET", "/events?since=0").status_code == 200


def test_a_bearer_is_for_foreign_callers_alone(client: Process) -> None:
    """The documented routes go on as they did; /events is for servers, which prove themselves."""
    sent = client.post("/submit", data=form([file_part("run.sh", b"true\n")]), headers={**BEARER, **form_type()})
    assert sent.status_code == 200
    number = sent.json()["id"]
    wait_for(lambda: "zip" in client.get(f"/retrieve/{number}", headers=BEARER).headers["Content-Type"], what="the result")
    assert client.post(f"/kill/{number}", headers=BEARER).status_code == 200
    assert_error(client.get("/events?since=0"), 401)
    assert_error(client.get("/events?since=0", headers={"Authorization": "Bearer wrong"}), 401)
    for _ in range(3):
        answer = client.get("/events?since=0", headers=BEARER)
        assert_error(answer, 426, "replace the server's joborch.pyz")
        assert answer.headers["Upgrade"]
    assert client.log.count("replace its joborch.pyz") == 1


def test_files_are_compared_with_the_digest_in_the_head(client: Process) -> None:
    """The head is proven; the digests that travel with the files are not."""
    caller, content = LinkCaller(client).hello(), b"echo right > out\n"
    meant = joborch.inputs_digest({"run.sh": hashlib.sha256(content).hexdigest()})
    for sent, status in ((content.replace(b"right", b"wrong"), 503), (content, 200)):
        headers = {**form_type(), "X-Joborch-Inputs": meant}
        answer = caller.call("POST", "/submit", data=form([file_part("run.sh", sent)]), headers=headers)
        assert answer.status_code == status, answer.text
    assert_error(
        caller.call("POST", "/submit", data=form([file_part("run.sh", content)]), headers={**form_type(), "X-Joborch-Inputs": "x"}), 503
    )


# == Somebody in between ==


@pytest.fixture(name="between")
def between_fixture(make_pair: MakePair) -> Iterator[tuple[Pair, Between]]:
    """A pair with somebody in between, where what failed is tried again soon; the client is started."""
    own = make_pair(program=from_source(BACKOFF_FIRST_S=0.2))
    own.client.start()
    middle = Between(own.client)
    own.server.settings["SERVICE_EXAMPLE_CLIENTS"] = middle.url
    yield own, middle
    middle.close()


def once(middle: Between, start: str, change: Callable[[HeadLines, bytes], tuple[HeadLines, bytes] | None], times: int = 1) -> None:
    """Change the answers to the next requests that begin so."""

    def change_answer(first: bytes, head: HeadLines, body: bytes) -> tuple[HeadLines, bytes] | None:
        if middle.changed >= times or not re.match(start, first.decode()):
            return head, body
        middle.changed += 1
        return change(head, body)

    middle.changed, middle.change_answer = 0, change_answer


def without(head: HeadLines, name: bytes) -> HeadLines:
    """A head without a header."""
    return [line for line in head if not line.lower().startswith(name.lower() + b":")]


def with_header(head: HeadLines, name: bytes, value: bytes) -> HeadLines:
    """A head with another value of a header."""
    return [*without(head, name), name + b": " + value]


def marked(tmp_path: Path, script: str = "") -> tuple[str, Path]:
    """A script that notes each of its starts, and leaves a result that does not travel with the news; and where it notes them."""
    marks = tmp_path / "marks"
    return f"echo started >> {marks}\n{script}\nseq 100000 > out.txt\nfor i in $(seq 20); do echo $i > $i.txt; done\n", marks


def ends_once(server: Process, number: int, marks: Path) -> None:
    """The job has run once, in one attempt, and its result is right."""
    job = wait_status(server, number, *ENDED, limit_s=60)
    assert (job["status"], job["attempt"]) == ("Completed", 1), job
    assert marks.read_text() == "started\n"
    assert download(server, number).text("out.txt").split() == [str(line) for line in range(1, 100_001)]


ANSWER_FAULTS: dict[str, Callable[[HeadLines, bytes], tuple[HeadLines, bytes] | None]] = {
    "another status": lambda head, body: ([head[0].replace(b"200 OK", b"404 Not Found"), *head[1:]], body),
    "shorter": lambda head, body: (with_header(head, b"Content-Length", str(len(body) // 2).encode()), body[: len(body) // 2]),
    "another digest": lambda head, body: (with_header(head, b"Repr-Digest", b"sha-256=:" + b"A" * 43 + b"=:"), body),
    "another body": lambda head, body: (head, body[:-3] + bytes(255 - byte for byte in body[-3:])),
    "body and digest": lambda head, body: (
        with_header(head, b"Repr-Digest", repr_digest(hashlib.sha256(body[::-1]).hexdigest()).encode()),
        body[::-1],
    ),
    "another type": lambda head, body: (with_header(head, b"Content-Type", b"text/html"), body),
    "no proof": lambda head, body: (without(head, b"X-Joborch-Mac"), body),
    "no joborch header": lambda head, body: ([line for line in head if b"X-Joborch" not in line], body),
    "cut": lambda head, body: None,
    "401": lambda head, body: ([b"HTTP/1.1 401 Unauthorized", b"X-Joborch: 0.2.0", b"Content-Length: 0"], b""),
    "401 with a nonce": lambda head, body: (
        [b"HTTP/1.1 401 Unauthorized", b"X-Joborch: 0.2.0", b"X-Joborch-Nonce: " + b"a" * 32, b"Content-Length: 0"],
        b"",
    ),
    "404": lambda head, body: ([b"HTTP/1.1 404 Not Found", b"X-Joborch: 0.2.0", b"Content-Length: 0"], b""),
    "refused for good": lambda head, body: ([b"HTTP/1.1 400 Bad Request", b"X-Joborch: 0.2.0", b"Content-Length: 0"], b""),
}


SOME_FAULTS = ["another status", "another body", "no proof", "401 with a nonce", "404"]


@pytest.mark.parametrize(
    ("route", "faults"),
    [
        ("POST /submit", [*ANSWER_FAULTS][:7]),
        ("POST /submit", [*ANSWER_FAULTS][7:]),
        ("GET /retrieve/", [*ANSWER_FAULTS][:7]),
        ("GET /retrieve/", [*ANSWER_FAULTS][7:]),
        ("GET /events", SOME_FAULTS),
        ("GET /hello", SOME_FAULTS),
    ],
)
def test_changed_answers_are_not_believed(route: str, faults: list[str], between: tuple[Pair, Between], tmp_path: Path) -> None:
    """Whatever is changed: the job runs once, in one attempt, and its result is right."""
    (own, middle), (script, marks) = between, marked(tmp_path)
    server = own.server.start()
    for what in faults:
        change = ANSWER_FAULTS[what]
        marks.unlink(missing_ok=True)
        wait_for(lambda: server.get("/clients").json()["clients"][0]["reachable"], 60, "the client reachable")
        once(middle, route, change)
        if route == "GET /hello":  # a new session says hello again
            own.client.restart()
        number = submit(server, script)
        wait_for(lambda: middle.changed, 60, f"an answer changed: {what}")
        ends_once(server, number, marks)


def test_answers_of_other_requests_are_not_believed(between: tuple[Pair, Between], tmp_path: Path) -> None:
    """Swapped, repeated, out of order: each is of the client, and of another request."""
    (own, middle), (script, marks) = between, marked(tmp_path)
    server = own.server.start()
    wait_for(lambda: sum(first.startswith(b"GET /events") for first, _, _ in middle.answers) >= 2, what="two answers to /events")
    earlier = next((head, body) for first, head, body in middle.answers if first.startswith(b"GET /events"))
    once(middle, "GET /events", lambda head, body: earlier, times=2)
    number = submit(server, script)
    ends_once(server, number, marks)
    assert middle.changed
    submitted = next((head, body) for first, head, body in middle.answers if first.startswith(b"POST /submit"))
    wait_for(lambda: server.get("/clients").json()["clients"][0]["reachable"], 60, "the client reachable")
    marks.unlink()
    once(middle, "POST /submit", lambda head, body: submitted)
    number = submit(server, script)
    wait_for(lambda: middle.changed, 30, "the answer to a submit exchanged")
    ends_once(server, number, marks)
    assert "program without its token" in server.log


def test_changed_requests_are_not_obeyed(between: tuple[Pair, Between], tmp_path: Path) -> None:
    """Another path, another job's name, other files, a header more: refused, and the job runs once, as it was uploaded."""
    (own, middle), (script, marks) = between, marked(tmp_path)
    server = own.server.start()

    def headed(name: bytes, value: bytes) -> Change:
        return lambda head, body: (with_header(head, name, value), body)

    changes: dict[str, Change] = {
        "attempt": headed(b"X-Joborch-Attempt", b"9"),
        "service": headed(b"X-Joborch-Service", b"other"),
        "more": headed(b"X-Joborch-Memory", b"1"),
        "inputs": headed(b"X-Joborch-Inputs", b"0" * 64),
        "another route": lambda head, body: ([head[0].replace(b"/submit", b"/kill/1"), *head[1:]], body),
        "script": lambda head, body: (head, body.replace(b"echo started", b"echo stolen!")),
        "script and digest": lambda head, body: (
            head,
            body.replace(b"echo started", b"echo stolen!").replace(
                hashlib.sha256(script.encode()).hexdigest().encode(),
                hashlib.sha256(script.replace("echo started", "echo stolen!").encode()).hexdigest().encode(),
            ),
        ),
    }
    for what, change in changes.items():
        marks.unlink(missing_ok=True)
        wait_for(lambda: server.get("/clients").json()["clients"][0]["reachable"], 60, "the client reachable")
        done = threading.Event()

        def change_submit(head: HeadLines, body: bytes, change: Change = change, done: threading.Event = done) -> tuple[HeadLines, bytes]:
            if done.is_set() or not head[0].startswith(b"POST /submit"):
                return head, body
            done.set()
            return change(head, body)

        middle.change_request = change_submit
        number = submit(server, script)
        assert done.wait(30), what
        ends_once(server, number, marks)


def test_a_request_that_comes_again_is_refused(between: tuple[Pair, Between], tmp_path: Path) -> None:
    """A submit of an hour ago, and a kill: all that passed, sent once more, changes nothing."""
    (own, middle), (script, marks) = between, marked(tmp_path)
    server = own.server.start()
    number = submit(server, script)
    ends_once(server, number, marks)
    for request in [request for request in middle.sent if b"Authorization: Joborch" in request]:
        status, _, _ = parse_answer(raw_exchange(own.client.port, request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)))
        assert status == 401, request[:200]
    assert marks.read_text() == "started\n"


def test_no_token_in_any_byte(between: tuple[Pair, Between], tmp_path: Path) -> None:
    """Not in a request, neither of the service nor of the file of this user's client; and hello comes before anything else."""
    (own, middle), (script, marks) = between, marked(tmp_path)
    local = own.server.home / ".config/joborch/client-token"  # type: ignore[operator]
    local.parent.mkdir(parents=True)
    local.write_text("the-token-of-the-local-client\n")
    server = own.server.start()
    number = submit(server, script)
    ends_once(server, number, marks)
    server.post(f"/terminate/{number}")
    everything = b"".join(middle.sent)
    assert b"POST /submit" in everything
    for secret in (Pair.TOKEN.encode(), b"the-token-of-the-local-client", b"Bearer", link_key(Pair.TOKEN).hex().encode()):
        assert secret not in everything
    assert [request.split(b" HTTP")[0] for request in middle.sent[:2]] == [b"GET /hello"] * 2
    assert b"Authorization" not in middle.sent[0]
    assert sum(b"GET /hello" in request for request in middle.sent) == 2, "an exchange for a session, none for a job"


# == Somebody in its place ==

SQUATTER = r"""
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        size = int(self.headers.get("Content-Length") or 0)
        print(self.requestline, dict(self.headers), self.rfile.read(size), flush=True)
        body = json.dumps({"version": "0.2.0", "nonce": "ab" * 16, "proof": PROOF, "id": 1, "instance": "i", "next": 1, "slots": 9,
                           "payloads": []}).encode()
        self.send_response(200)
        for name, value in {"X-Joborch": "0.2.0", "X-Joborch-Mac": "0" * 64, "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
    def log_message(self, *_): pass
PROOF = sys.argv[2] == "1"
http.server.ThreadingHTTPServer.allow_reuse_address = True
http.server.ThreadingHTTPServer((sys.argv[3], int(sys.argv[1])), Handler).serve_forever()
"""


@contextlib.contextmanager
def squatter(folder: Path, port: int, user: int | None = None, proof: bool = True, host: str = "127.0.0.1") -> Iterator[Path]:
    """Somebody who listens on a port, plays a client, and writes down what comes."""
    seen, identity = folder / "seen", {} if user is None else {"user": user, "group": user, "extra_groups": []}
    with seen.open("wb") as file:
        python = sys.executable if user is None else "/usr/bin/python3"
        process = subprocess.Popen(
            [python, "-c", SQUATTER, str(port), "01"[proof], host],
            stdout=file,
            cwd="/",
            **identity,  # type: ignore[call-overload]
        )
        try:
            wait_for(lambda: socket.socket().connect_ex((host, port)) == 0, what="somebody listens")
            yield seen
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("proof", [True, False])
@pytest.mark.parametrize("user", [None, OTHER_UID])
def test_who_took_the_port_gets_nothing(user: int | None, proof: bool, make_pair: MakePair, tmp_path: Path, root: None) -> None:
    """Neither token nor files, and is not believed; once the client is back, the job goes to it."""
    own = make_pair()
    script, marks = marked(tmp_path, "# the-secret-of-the-script")
    with squatter(tmp_path, own.client.port, user, proof) as seen:
        server = own.server.start()
        number = submit(server, script)
        told = wait_for(lambda: waiting(server, number, "token"), what="a reason to wait")
        assert "SERVICE_<NAME>_TOKEN" in told or "JOBORCH_TOKEN" in told
        text = seen.read_text()
        assert "GET /hello" in text
        assert not re.search(f"secret|{Pair.TOKEN}|Bearer|/submit|/events", text)
    own.client.start()
    ends_once(server, number, marks)


def test_who_takes_the_port_later_gets_nothing(own_pair: Pair, tmp_path: Path) -> None:
    """A client that had proven itself, and died: whoever answers next has to prove himself anew."""
    script, marks = marked(tmp_path, "# the-secret-of-the-script")
    ends_once(own_pair.server, submit(own_pair.server, script), marks)
    marks.unlink()
    own_pair.client.kill()
    with squatter(tmp_path, own_pair.client.port) as seen:
        number = submit(own_pair.server, script)
        wait_for(
            lambda: "mac=" in seen.read_text() and waiting(own_pair.server, number, "program without its token"), 60, "a reason to wait"
        )
        assert not re.search(f"secret|{Pair.TOKEN}|Bearer|/submit|/events", seen.read_text())
    own_pair.client.start()
    ends_once(own_pair.server, number, marks)


def waiting(server: Process, number: int, *words: str) -> str:
    """What a job waits for, where that has these words."""
    said = str(server.job(number)["waiting_for"])
    return said if all(word in said for word in words) else ""


def test_a_port_of_another_user_is_not_called_at_all(make_process: MakeProcess, open_folder: Path, tmp_path: Path, root: None) -> None:
    """Not even with hello, where no token is set for the service; and the job says whose port it is, and what to do."""
    port = free_port()
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{port}"})
    with squatter(tmp_path, port, OTHER_UID) as seen:
        number = submit(server.start(), "true")
        told = wait_for(lambda: waiting(server, number, str(port), str(OTHER_UID)), what="a reason to wait")
        assert "set SERVICE_EXAMPLE_TOKEN" in told
        assert seen.read_text() == ""
        code = subprocess.run(
            [*server.program, "doctor", "server"], env=server.environment(), capture_output=True, text=True, check=False, timeout=60
        )
        assert f"belongs to the user {OTHER_UID}" in code.stdout
        assert seen.read_text() == ""


@pytest.mark.parametrize("listens", ["127.0.0.1", "0.0.0.0", "::", "::1"])
def test_whose_port_it_is(listens: str, tmp_path: Path, root: None) -> None:
    """Before the connection is accepted and after, over IPv4 and IPv6."""
    family = socket.AF_INET6 if ":" in listens else socket.AF_INET
    code = (
        "import socket, sys\n"
        f"box = socket.socket({int(family)}); box.bind(({listens!r}, 0)); box.listen()\n"
        "print(box.getsockname()[1], flush=True); sys.stdin.readline(); line, _ = box.accept(); print('accepted', flush=True)\n"
        "sys.stdin.readline()"
    )
    for user in (OTHER_UID, 0):
        other = subprocess.Popen(
            ["/usr/bin/python3", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=user,
            group=user,
            extra_groups=[],
        )
        assert other.stdin and other.stdout
        with contextlib.ExitStack() as stack:
            stack.callback(other.kill)
            port = int(other.stdout.readline())
            line = stack.enter_context(socket.create_connection(("::1" if listens == "::1" else "127.0.0.1", port)))
            assert joborch.far_uid(line) == user, "not accepted yet"
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "accepted\n"
            assert joborch.far_uid(line) == user
            other.kill()
            other.wait()
            wait_for(lambda line=line: line.recv(1, socket.MSG_DONTWAIT) == b"", what="the connection closed")  # type: ignore[misc]
            assert joborch.far_uid(line) is None, "nobody holds it any more"


def test_a_client_of_another_user_with_a_token(make_process: MakeProcess, open_folder: Path, pyz: Path, tmp_path: Path, root: None) -> None:
    """That it holds the token that is set for it proves enough."""
    token = "a-token-for-two-users"
    client = make_process(
        "client", {"JOBORCH_TOKEN": token}, folder=open_folder / "client", program=open_program(open_folder, pyz), user=OTHER_UID
    )
    client.start()
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": client.url, "SERVICE_EXAMPLE_TOKEN": token}).start()
    assert wait_status(server, submit(server, "id -u > uid"), *ENDED)["status"] == "Completed"


# == Restarts, and several services ==


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_restart_in_the_middle(who: str, between: tuple[Pair, Between], tmp_path: Path) -> None:
    """The next call says hello again; what runs goes on, and what comes is sent."""
    (own, _), (script, marks) = between, marked(tmp_path, f"until [ -e {tmp_path / 'gate'} ]; do sleep 0.05; done")
    server = own.server.start()
    number = submit(server, script)
    wait_status(server, number, "Running")
    (own.client if who == "client" else server).kill()
    (own.client if who == "client" else server).start()
    later = submit(server, "true", user_id=2)
    assert wait_status(server, later, *ENDED)["status"] == "Completed"
    (tmp_path / "gate").touch()
    ends_once(server, number, marks)


def test_each_service_by_its_own_token(between: tuple[Pair, Between], tmp_path: Path) -> None:
    """Two services share a client; one with another token than the client's waits, and holds up nobody."""
    own, middle = between
    own.client.settings["JOBORCH_TOKEN"] = "the-first-token-here,the-second-token-here"
    own.client.restart()
    own.server.settings["SERVICE_EXAMPLE_TOKEN"] = "the-first-token-here"
    for name, token in (("two", "the-second-token-here"), ("wrong", "a-token-that-it-does-not-know")):
        own.server.settings.update({f"SERVICE_{name.upper()}_CLIENTS": middle.url, f"SERVICE_{name.upper()}_TOKEN": token})
    server = own.server.start()
    stuck = submit(server, "true", service="wrong")
    wait_for(lambda: waiting(server, stuck, "SERVICE_WRONG_TOKEN"), what="a reason to wait")
    for service in ("example", "two", "example"):
        assert wait_status(server, submit(server, "true", service=service), *ENDED, limit_s=60)["status"] == "Completed"
    keys = {b"example": "the-first-token-here", b"two": "the-second-token-here"}
    for request in (request for request in middle.sent if request.startswith(b"POST /submit")):
        head = {line.split(b": ")[0].decode(): line.split(b": ")[1].decode() for line in request.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]}
        shown = PROOF_SHAPE.fullmatch(head["Authorization"])
        assert shown
        token = keys[head["X-Joborch-Service"].encode()]
        proof = Proof(link_key(token), shown[1], shown[2], int(shown[3]), "POST", "/submit")
        assert proof.of_request(head, int(head["Content-Length"])) == shown[4]
    assert server.job(stuck)["status"] == "Queued"


# == Peers that cannot prove themselves ==


class Foreign:
    """Something that is no joborch and answers 404 to all."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.seen = list[bytes]()
        self.listener = socket.create_server((host, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.answer_all, daemon=True).start()

    def answer_all(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = self.listener.accept()
                with contextlib.suppress(OSError), line:
                    head, body, _ = read_message(line, b"")
                    self.seen.append(b"\r\n".join(head) + body)
                    line.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def test_a_22_client_is_called_only_where_that_is_said(make_process: MakeProcess) -> None:
    """Else its jobs wait, and say which setting is missing; nothing but hello was sent."""
    foreign = Foreign()
    settings: dict[str, str | None] = {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{foreign.port}", "SERVICE_EXAMPLE_TOKEN": Pair.TOKEN}
    server = make_process("server", settings).start()
    number = submit(server, "true")
    wait_for(lambda: waiting(server, number, "SERVICE_EXAMPLE_PEER=2.2"), what="a reason to wait")
    assert all(seen.startswith(b"GET /hello") and Pair.TOKEN.encode() not in seen for seen in foreign.seen)
    server.settings["SERVICE_EXAMPLE_PEER"] = "2.2"
    server.restart()
    wait_for(lambda: any(seen.startswith(b"GET / ") and f"Bearer {Pair.TOKEN}".encode() in seen for seen in foreign.seen), what="a poll")
    foreign.listener.close()


def own_address() -> str:
    """An address of this machine that is not loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        return str(probe.getsockname()[0])


def test_beyond_loopback_a_token_is_needed(make_process: MakeProcess) -> None:
    """Without one the jobs wait and say so; the local client's is not used there."""
    host = own_address()
    client = make_process("client", {"JOBORCH_HOST": "0.0.0.0"}).start()
    middle = Between(client)
    middle.close()
    middle.listener = socket.create_server((host, 0))
    threading.Thread(target=serve_each, args=(middle.listener, middle.pass_all), daemon=True).start()
    url = f"http://{host}:{middle.listener.getsockname()[1]}"
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": url}, home_folder=client.home).start()
    number = submit(server, "true")
    wait_for(lambda: waiting(server, number, "set SERVICE_EXAMPLE_TOKEN"), what="a reason to wait")
    assert {request.split(b" HTTP")[0] for request in middle.sent} == {b"GET /hello"}
    assert not any(b"Authorization" in request for request in middle.sent)
    middle.close()


def test_our_client_under_the_three_urls(make_process: MakeProcess) -> None:
    """A site that puts our client in the place of a 2.2 client, under the URLs that it had, has the proof at once."""
    client = make_process("client").start()
    urls = {f"SERVICE_EXAMPLE_{name}_URL": f"{client.url}/{path}" for name, path in (("UPLOAD", "submit"), ("DOWNLOAD", "retrieve"))}
    server = make_process("server", {**urls, "SERVICE_EXAMPLE_TERMINATE_URL": f"{client.url}/kill"}, home_folder=client.home).start()
    assert wait_status(server, submit(server, "true"), *ENDED)["status"] == "Completed"
    assert "2.2" not in server.log


# == Peers of version 0.1.0 ==


@pytest.fixture(scope="session", name="old")
def old_fixture(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs joborch 0.1.0, as it was before the link proved anything."""
    folder = source_of(FIRST, tmp_path_factory.mktemp("old"))
    assert '__version__ = "0.1.0"' in (folder / "joborch.py").read_text()
    return [sys.executable, str(folder / "joborch.py")]


def test_a_client_of_version_0_1_0(old: list[str], make_pair: MakePair, tmp_path: Path) -> None:
    """One line says what to do; what runs there is Unknown, not lost, and goes on once it is replaced, adopted by the new one."""
    own = make_pair(server={"SERVICE_EXAMPLE_LOST_AFTER": "1", "SERVICE_EXAMPLE_RETRIES": "5"})
    new = own.client.program
    own.client.program = own.server.program = old
    server = own.start().server
    script, marks = marked(tmp_path, f"until [ -e {tmp_path / 'gate'} ]; do sleep 0.05; done")
    running = submit(server, script)
    wait_status(server, running, "Running")
    server.stop()
    server.program = new
    server.start()
    queued = submit(server, "true", user_id=2)
    told = wait_for(lambda: waiting(server, queued, "runs joborch 0.1.0"), what="a reason to wait")
    assert f"127.0.0.1:{own.client.port}" in told
    assert "replace its joborch.pyz by this version" in told or f"by version {joborch.__version__}" in told
    wait_for(lambda: server.job(running)["status"] == "Unknown", 60, "the job that runs there Unknown")
    assert server.log.count(f"client 127.0.0.1:{own.client.port}: runs joborch 0.1.0") == 1
    (tmp_path / "gate").touch()
    own.client.stop()
    own.client.program = new
    own.client.start()
    ends_once(server, running, marks)
    assert wait_status(server, queued, *ENDED, limit_s=60)["status"] == "Completed"


def test_a_server_of_version_0_1_0(old: list[str], make_pair: MakePair, tmp_path: Path) -> None:
    """Its jobs wait and say what to do, by the words of its own; the client says so in one line of its log."""
    own = make_pair()
    new = own.server.program
    own.server.program = old
    server = own.start().server
    script, marks = marked(tmp_path)
    number = submit(server, script)
    wait_for(lambda: waiting(server, number, "replace the server's joborch.pyz"), what="a reason to wait")
    assert own.client.log.count("replace its joborch.pyz") == 1
    server.stop()
    server.program = new
    server.start()
    ends_once(server, number, marks)


# == TLS ==


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl to make a certificate")
def test_certificates_of_a_site(make_pair: MakePair, tmp_path: Path) -> None:
    """A client behind https, with a certificate that only JOBORCH_CA_FILE knows."""
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(["openssl", "req", *words, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    own = make_pair()
    own.client.start()
    middle = Between(own.client, context)
    own.server.settings["SERVICE_EXAMPLE_CLIENTS"] = middle.url
    number = submit(own.server.start(), "true")
    wait_for(lambda: waiting(own.server, number, "certificate is not trusted", "JOBORCH_CA_FILE"), what="a reason to wait")
    own.server.settings["JOBORCH_CA_FILE"] = certificate
    own.server.restart()
    assert wait_status(own.server, number, *ENDED)["status"] == "Completed"
    middle.close()


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_a_file_without_certificates(content: bytes | None, make_process: MakeProcess, tmp_path: Path) -> None:
    """The server does not start with it, and says why."""
    if content is not None:
        (tmp_path / "ca").write_bytes(content)
    status, said = make_process("server", {"JOBORCH_CA_FILE": str(tmp_path / "ca")}).start_refused()
    assert status == 2
    assert "JOBORCH_CA_FILE" in said
    assert str(tmp_path / "ca") in said


def test_a_proof_by_another_token_is_counted_with_the_refused_tokens(make_process: MakeProcess) -> None:
    client = make_process("client", {"JOBORCH_TOKEN": Pair.TOKEN}).start()
    stranger = LinkCaller(client, "another-token-altogether").hello()
    authorization = stranger.head("GET", "/events", {}, 0)
    assert client.get("/events", headers={"Authorization": authorization}).status_code == 401
    lines = wait_for(lambda: [line for line in client.log.splitlines() if "wrong token" in line], what="a line about the refused proof")
    assert len(lines) == 1 and "127.0.0.1" in lines[0]
