"""Requests are judged before they are read, answered as HTTP has it, and no failure shows our insides."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import socket
import sqlite3
from contextlib import closing
from typing import Any

import pytest
from harness import replace
from hypothesis import assume, example, given
from hypothesis import strategies as st
from world import BOUNDED, RESULT, Desk, HandClock, Peer, ask, reply, tried, zip_reply

import joborch
from joborch import OVER, ROUTES, Archive, Cause, ConfigError, HttpError, Job, Request, Status, StorageError, find_route
from joborch_base.identity import machine_names, tcp_uid
from joborch_base.routes import byte_range, check_caller, check_size

pytestmark = pytest.mark.usefixtures("no_long_polls")


# == Ranges ==

RANGES = st.from_regex(r"(bytes|Bytes|items)?=? ?[0-9]{0,2}-?[0-9]{0,2}(, ?[0-9]?-[0-9]?)?", fullmatch=True)


def model(header: str, size: int) -> list[int] | None:
    """The bytes that a Range asks for (RFC 9110, 14.1.2); None where a server may ignore it: several, or no range at all."""
    unit, equals, spec = header.strip().partition("=")
    first, dash, last = spec.partition("-")
    if unit != "bytes" or not equals or not dash or not (first + last).isascii() or "," in spec or " " in spec:
        return None
    if not all(text == "" or text.isdigit() for text in (first, last)) or first + last == "":
        return None
    if first == "":
        return list(range(size))[-int(last) :] if int(last) else []
    if last and int(last) < int(first):
        return None
    return [at for at in range(size) if at >= int(first) and (last == "" or at <= int(last))]


@BOUNDED
@given(RANGES, st.integers(0, 30))
@example("bytes=0-", 0)
@example("bytes=0-0", 0)
@example("bytes=-0", 5)
@example("bytes=-9", 5)
@example("bytes=4-9", 5)
@example("bytes=5-", 5)
@example("bytes=3-2", 5)
@example("bytes=٣-", 5)
@example("bytes=0-999999999999999999", 5)
def test_a_range_is_what_rfc_9110_says(header: str, size: int) -> None:
    span, wanted = byte_range(header, size), model(header, size)
    assert (span is None) == (wanted is None)
    if span is not None:
        begin, end = span
        assert list(range(size))[begin:end] == wanted
        assert begin >= 0 and end <= size


def requested(method: str = "GET", **headers: str) -> Request:
    """A request with these headers."""
    return Request({"REQUEST_METHOD": method, **{"HTTP_" + name.upper(): value for name, value in headers.items()}})


TAG = f'"{hashlib.sha256(RESULT).hexdigest()}"'


def answered(request: Request) -> tuple[joborch.Answer, io.BytesIO]:
    """What a file is answered with, and the file."""
    file = io.BytesIO(RESULT)
    archive = Archive(file, len(RESULT), TAG.strip('"'))
    return joborch.file_answer(request, archive, "job-1.zip", {"X-Job-Status": "Completed"}), file


@pytest.mark.parametrize(
    ("headers", "status", "content"),
    [
        ({}, 200, RESULT),
        ({"Range": "bytes=3-5"}, 206, RESULT[3:6]),
        ({"Range": "bytes=-4"}, 206, RESULT[-4:]),
        ({"Range": "bytes=3-5", "If_Range": TAG}, 206, RESULT[3:6]),
        ({"Range": "bytes=3-5", "If_Range": '"other"'}, 200, RESULT),
        ({"Range": "bytes=3-5", "If_Range": "W/" + TAG}, 200, RESULT),
        ({"Range": "bytes=0-1,3-4"}, 200, RESULT),
        ({"Range": "bytes=9-3"}, 200, RESULT),
        ({"If_None_Match": '"other"'}, 200, RESULT),
        ({"If_None_Match": TAG}, 304, b""),
        ({"If_None_Match": f'"other", W/{TAG}'}, 304, b""),
        ({"If_None_Match": "*"}, 304, b""),
        ({"If_None_Match": TAG, "Range": "bytes=3-5"}, 304, b""),
    ],
)
def test_a_file_is_answered_whole_in_part_or_not_at_all(headers: dict[str, str], status: int, content: bytes) -> None:
    answer, file = answered(requested(**headers))
    assert answer.status == status
    assert (answer.headers["ETag"], answer.headers["X-Job-Status"]) == (TAG, "Completed")
    if status == 304:
        assert answer.body is None
        assert file.closed
        return
    length = int(answer.headers["Content-Length"])
    assert answer.body.read(length) == content
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers.get("Content-Range") == (
        f"bytes {RESULT.index(content)}-{RESULT.index(content) + length - 1}/{len(RESULT)}" if status == 206 else None
    )


@pytest.mark.parametrize("asked", ["bytes=99-", f"bytes={len(RESULT)}-", "bytes=-0", "bytes=99-100"])
def test_a_range_that_lies_outside(asked: str) -> None:
    file = io.BytesIO(RESULT)
    refusal = tried(lambda: joborch.file_answer(requested(Range=asked), Archive(file, len(RESULT), "0" * 64), "x", {}), HttpError)
    assert isinstance(refusal, HttpError)
    assert (refusal.status, refusal.headers["Content-Range"]) == (416, f"bytes */{len(RESULT)}")
    assert file.closed


def test_only_get_has_ranges() -> None:
    """RFC 9110, 14.2: for any other method a server must ignore them; HEAD tells the length of the whole."""
    answer, _ = answered(requested("HEAD", Range="bytes=3-5"))
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(RESULT)))


# == Parameters ==


@BOUNDED
@given(st.text(max_size=25) | st.integers(-(2**70), 2**70).map(str), st.integers(-5, 5), st.integers(6, 2**63))
def test_a_whole_number_of_a_query_lies_between_its_bounds(text: str, least: int, most: int) -> None:
    parameter = joborch.Parameter("n", "query", "integer", "a number", least=least, most=most, default=7)
    got = tried(lambda: parameter.value(text), HttpError)
    if isinstance(got, HttpError):
        assert (got.status, got.field) == (400, "n")
        assert got.message.isprintable()
        assert not (
            text.isascii() and text.lstrip("-").isdigit() and text.count("-") <= 1 and least <= int(text) <= most and len(text) < 19
        )
    else:
        assert least <= got <= most
        assert int(text) == got
    assert parameter.value(None) == 7


@BOUNDED
@given(st.floats(0, 10**8).map(lambda number: f"{number:.3f}") | st.text(max_size=12))
@example("nan")
@example("inf")
@example("1e9")
@example("-1")
def test_a_wait_is_bounded(text: str) -> None:
    got = tried(lambda: joborch.WAIT.value(text), HttpError)
    assert isinstance(got, HttpError) or got == min(float(text), joborch.WAIT_LIMIT_S)
    assert joborch.WAIT.value(None) == 0


def test_a_query_is_read_with_its_blanks_and_escapes() -> None:
    request = Request({"REQUEST_METHOD": "GET", "QUERY_STRING": "a=1&b=&c=%C3%A9+x&d&e=%ff&a=2"})
    assert request.query == {"a": "2", "b": "", "c": "é x", "d": "", "e": "\ufffd"}


# == Routes ==


@pytest.mark.parametrize("mode", ["server", "client"])
def test_every_route_is_found_and_no_other_method(mode: str) -> None:
    for declared in ROUTES:
        if mode not in declared.mode.split():
            continue
        path = declared.path.replace("<job_id>", "42").replace("<name>", "swagger-ui.css")
        assert find_route(mode, declared.method, path) is declared
        here = {other.method for other in ROUTES if mode in other.mode.split() and other.pattern.match(path)}
        here |= {"HEAD"} if "GET" in here else set()
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get", "BREW\n"):
            found = tried(lambda: find_route(mode, method, path), HttpError)  # noqa: B023 - called at once
            if method in here:
                assert not isinstance(found, HttpError)
            else:
                assert isinstance(found, HttpError)
                assert (found.status, set(found.headers["Allow"].split(", "))) == (405, here)
                assert found.message.isprintable()


@pytest.mark.parametrize("path", ["/nothing", "//jobs", "/jobs/", "/jobs/1/2", "jobs", "", "/JOBS", "/submit", "/swagger-ui/a/b"])
def test_paths_that_lead_nowhere(path: str) -> None:
    refusal = tried(lambda: find_route("server", "GET", path), HttpError)
    assert isinstance(refusal, HttpError) and refusal.status == 404


def test_routes_of_the_other_mode_are_not_there() -> None:
    for mode, path in (("server", "/events"), ("client", "/jobs"), ("client", "/services")):
        assert isinstance(tried(lambda: find_route(mode, "GET", path), HttpError), HttpError)  # noqa: B023 - called at once


# == Who may call ==


class FromHere:
    """The other end of a connection over 127.0.0.1."""

    address = "127.0.0.1"

    def __init__(self, uid: int | None) -> None:
        self.known_uid = uid

    def uid(self) -> int | None:
        """The user there."""
        return self.known_uid


def caller(desk: Desk, headers: dict[str, str], uid: int | None = os.getuid(), **settings: str) -> int:
    """200, or the code with which a caller is refused."""
    config = joborch.load_config("server", {}, {**desk.environment, **settings})
    node = joborch.Node(config, desk.store, desk.data, HandClock())
    refusal = tried(lambda: check_caller(node, headers, FromHere(uid)), HttpError)
    return refusal.status if isinstance(refusal, HttpError) else 200


HERE = {"HOST": "127.0.0.1:5000"}
STRANGER = 4_000_000
ANONYMOUS = {"JOBORCH_ALLOW_ANONYMOUS": "1"}


@pytest.mark.parametrize(
    ("headers", "uid", "settings", "status"),
    [
        (HERE, os.getuid(), {}, 200),
        (HERE, 0, {}, 200),
        (HERE, STRANGER, {}, 403),
        (HERE, None, {}, 403),
        (HERE, STRANGER, ANONYMOUS, 403),
        (HERE, STRANGER, {**ANONYMOUS, "JOBORCH_ALLOW_FROM": "10.0.0.0/8"}, 403),
        (HERE, STRANGER, {**ANONYMOUS, "JOBORCH_ALLOW_FROM": "10.0.0.0/8, 127.0.0.0/8"}, 200),
        (HERE, None, {**ANONYMOUS, "JOBORCH_ALLOW_FROM": "127.0.0.1"}, 200),
        ({**HERE, "VIA": "1.1 proxy"}, os.getuid(), {}, 403),
        ({**HERE, "VIA": "1.1 proxy"}, os.getuid(), {**ANONYMOUS, "JOBORCH_ALLOW_FROM": "127.0.0.1"}, 200),
        ({"HOST": "localhost"}, os.getuid(), {}, 200),
        ({"HOST": "[::1]:5000"}, os.getuid(), {}, 200),
        ({"HOST": "LOCALHOST:1"}, os.getuid(), {}, 200),
        ({"HOST": "evil.example"}, os.getuid(), {}, 403),
        ({"HOST": "evil.example"}, os.getuid(), ANONYMOUS, 403),
        ({"HOST": "192.0.2.7:5000"}, os.getuid(), {}, 200),
        ({"HOST": "0.0.0.0:5000"}, os.getuid(), {}, 403),
        ({"HOST": socket.gethostname()}, os.getuid(), {}, 200),
        ({"HOST": "queue.lab"}, os.getuid(), {"JOBORCH_HOSTS": "other, Queue.Lab"}, 200),
        ({"HOST": "127.0.0.1.evil.example"}, os.getuid(), {}, 403),
        ({"HOST": ""}, os.getuid(), {}, 403),
        ({}, os.getuid(), {}, 200),
        ({"HOST": "[::1"}, os.getuid(), {}, 403),
        ({"HOST": "a@127.0.0.1"}, os.getuid(), ANONYMOUS, 200),
        ({**HERE, "ORIGIN": "http://127.0.0.1:5000"}, os.getuid(), {}, 200),
        ({**HERE, "ORIGIN": "http://127.0.0.1:6000"}, os.getuid(), {}, 403),
        ({**HERE, "ORIGIN": "null"}, os.getuid(), {}, 403),
        ({**HERE, "ORIGIN": ""}, os.getuid(), {}, 403),
        ({**HERE, "ORIGIN": "http://[::1"}, os.getuid(), {}, 403),
        ({**HERE, "ORIGIN": "http://evil.example"}, os.getuid(), ANONYMOUS, 403),
        ({**HERE, "SEC_FETCH_SITE": "cross-site"}, os.getuid(), ANONYMOUS, 403),
        ({**HERE, "SEC_FETCH_SITE": "same-origin"}, os.getuid(), {}, 200),
    ],
)
def test_callers_without_a_token(headers: dict[str, str], uid: int | None, settings: dict[str, str], status: int, desk: Desk) -> None:
    assert caller(desk, headers, uid, **settings) == status


TOKENS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=","), min_size=1, max_size=12)


def test_only_a_right_token_is_let_in(desk: Desk) -> None:
    @BOUNDED
    @given(st.lists(TOKENS, min_size=1, max_size=3), TOKENS | st.text(max_size=8))
    @example(["a"], "é")
    @example(["a"], "")
    def check(tokens: list[str], shown: str) -> None:
        setting = {"JOBORCH_TOKEN": ",".join(tokens)}
        assume(setting["JOBORCH_TOKEN"].strip(","))
        for token in tokens:
            assert caller(desk, {"AUTHORIZATION": f"Bearer {token}"}, STRANGER, **setting) == 200
            assert caller(desk, {"AUTHORIZATION": f"bearer  {token} ", "ORIGIN": "http://evil.example"}, STRANGER, **setting) == 200
            for wrong in (f"Basic {token}", token, f"Bearer {token}x", f"Bearer {token[:-1]}", "Bearer", ""):
                assert caller(desk, {**HERE, "AUTHORIZATION": wrong}, **setting) == 401 or wrong[7:] in tokens
        assert caller(desk, {"AUTHORIZATION": f"Bearer {shown}"}, **setting) == (200 if shown.strip() in tokens else 401)

    check()


ADDRESS = re.compile(r"([0-9]+\.){3}[0-9]+|:")  # a name holds neither


@BOUNDED
@given(st.text(max_size=30), st.none() | st.text(max_size=30))
@example("[", None)
@example("localhost", "http://[")
@example("localhost:x", "http://localhost:x")
def test_odd_headers_are_refused_and_nothing_worse(host: str, origin: str | None) -> None:
    """Whatever urlsplit thinks of them."""

    class Bare:
        tokens = ()
        config = joborch.load_config("server", {}, {"DATA_PATH": "/nowhere"})
        refused = joborch.RefusedTokens(HandClock())

    headers = {"HOST": host, **({"ORIGIN": origin} if origin is not None else {})}
    refusal = tried(lambda: check_caller(Bare(), headers, FromHere(os.getuid())), HttpError)  # type: ignore[arg-type]
    assert not isinstance(refusal, HttpError) or refusal.status == 403
    ours = {"localhost", *machine_names()}
    assert isinstance(refusal, HttpError) or any(name in host.lower() for name in ours) or ADDRESS.search(host), "a name that is not ours"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_user_at_the_other_end(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        closing(socket.create_server((address, 0), family=family)) as listener,
        closing(socket.create_connection(listener.getsockname()[:2])) as near,
    ):
        far, peer = listener.accept()
        with closing(far):
            assert tcp_uid(peer[:2], far.getsockname()[:2]) == os.getuid()
            assert tcp_uid((peer[0], 1), far.getsockname()[:2]) is None
            assert tcp_uid(("10.0.0.1", peer[1]), far.getsockname()[:2]) is None
            assert tcp_uid(("no address", 1), ("x", 1)) is None
        assert near.fileno() > 0


# == How large ==


@pytest.mark.parametrize(
    ("path", "length", "chunked", "status"),
    [
        ("/upload", 1000, False, 200),
        ("/upload", 0, False, 411),
        ("/upload", 0, True, 200),
        ("/upload", 2001, False, 413),
        ("/upload", 2000, False, 200),
        ("/jobs", 0, False, 200),
        ("/jobs", 1 << 20, False, 200),
        ("/jobs", (1 << 20) + 1, False, 413),
        ("/jobs", 0, True, 413),
    ],
)
def test_sizes(path: str, length: int, chunked: bool, status: int, desk: Desk) -> None:
    desk.restart(JOBORCH_MAX_UPLOAD="2000")
    found = find_route("server", "POST" if path == "/upload" else "GET", path)
    refusal = tried(lambda: check_size(desk.server, found, length, chunked), HttpError)
    assert (refusal.status if isinstance(refusal, HttpError) else 200) == status


@pytest.mark.parametrize(("free", "status"), [(2999, 507), (3000, 200)])
def test_the_disk_must_hold_a_body_twice(free: int, status: int, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is spooled, once as files; and what is to stay free."""
    desk.restart(JOBORCH_MIN_FREE="1000")
    replace(monkeypatch, "free_bytes", lambda _: free)
    refusal = tried(lambda: check_size(desk.server, find_route("server", "POST", "/upload"), 1000, False), HttpError)
    assert (refusal.status if isinstance(refusal, HttpError) else 200) == status
    if status == 507:
        assert isinstance(refusal, HttpError) and refusal.headers["Retry-After"]


# == Failures ==


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (HttpError(409, "so it is", "x", Retry_After="3"), 409, "so it is"),
        (StorageError("the database /data/x.db is broken"), 503, "try again"),
        (OSError(errno.ENOSPC, "full", "/data/x"), 507, "disk is full"),
        (OSError(errno.EDQUOT, "full", "/data/x"), 507, "disk is full"),
        (OSError(errno.EIO, "broken", "/data/x"), 503, "cannot be used now"),
        (OSError(errno.EINVAL, "odd", "/data/x"), 500, "internal error"),
        (ValueError("/data/secret"), 500, "internal error"),
        (sqlite3.ProgrammingError("/data/secret"), 500, "internal error"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_failure_shows_our_insides(
    error: Exception, status: int, word: str, method: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(joborch.Store, "page", fail)
    said = ask(desk.server, method, "/jobs")
    assert (said.status, said.headers["Content-Type"]) == (status, "application/json")
    if method == "GET":
        assert word in said.json["message"]
        assert "/data" not in said.body.decode()
    assert ("Retry-After" in said.headers) == (status in (409, 503, 507))


def test_errors_that_bottle_makes_are_json_too(desk: Desk) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("DELETE", "/jobs", 405)):
        said = ask(desk.server, method, path)
        assert said.status == status
        assert isinstance(said.json["message"], str)


def test_every_answer_forbids_guessing_of_its_type(desk: Desk) -> None:
    for path in ("/", "/jobs", "/nothing-at-all/1", "/swagger-ui/", "/swagger-ui/swagger-ui.css"):
        said = ask(desk.server, "GET", path)
        assert said.headers.get("X-Content-Type-Options") == "nosniff" or said.status == 404, path


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        ("text/html,application/xhtml+xml", True),
        ("text/html;q=0.9", True),
        ("*/*", False),
        ("", False),
        ("application/json, text/html", False),
    ],
)
def test_browsers_are_known_by_what_they_prefer(accept: str, html: bool, desk: Desk) -> None:
    assert joborch.prefers_html(accept) is html
    assert ask(desk.server, "GET", "/", Accept=accept).status == (302 if html else 200)


# == Listening ==


def test_a_port_that_is_taken_is_named(desk: Desk) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        desk.restart(PORT=str(taken.getsockname()[1]))
        with pytest.raises(
            ConfigError, match=rf"PORT is {taken.getsockname()[1]}: cannot listen on 127.0.0.1:.* \(address already in use\)"
        ):
            joborch.make_http_server(desk.server, joborch.make_app(desk.server))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.7", "x y"])
def test_a_host_that_is_not_here(host: str, desk: Desk) -> None:
    desk.restart(JOBORCH_HOST=host, JOBORCH_TOKEN="a-token-of-this-test", PORT="0")
    with pytest.raises(ConfigError, match="cannot listen on"):
        joborch.make_http_server(desk.server, joborch.make_app(desk.server))


# == The server's answers in every state ==


def in_state(desk: Desk, status: Status) -> Job:
    """A job in this state, with a result where that is Completed or Failed."""
    if status is Status.QUEUED:
        return desk.upload()
    if status in joborch.BUSY:
        return desk.with_client(status)
    job = desk.with_client(Status.RUNNING)
    stored = {"result_size": len(RESULT), "result_sha256": hashlib.sha256(RESULT).hexdigest()}
    desk.data.result(job.mark).write_bytes(RESULT)
    end = status if status is not Status.CLEANED else Status.COMPLETED
    desk.store.move(job, end, f"to {end}", **(stored if end in (Status.COMPLETED, Status.FAILED) else {}))
    if status is Status.CLEANED:
        desk.store.move(desk[job], status, "")
    return desk[job]


STATES = [status for status in Status if status is not Status.PREPARED]


@pytest.mark.parametrize("compat", ["1.2", "2.2"])
@pytest.mark.parametrize("status", STATES, ids=str)
def test_download_in_every_state(status: Status, compat: str, desk: Desk) -> None:
    desk.restart(JOBORCH_COMPAT=compat)
    job = in_state(desk, status)
    code = 200 if status is Status.COMPLETED else 204 if status in OVER else 202
    head, got = ask(desk.server, "HEAD", f"/download/{job.id}"), ask(desk.server, "GET", f"/download/{job.id}")
    assert (head.status, head.body, head.headers["X-Job-Status"]) == (code, b"", status.value)
    assert got.headers["X-Job-Status"] == status.value
    if status is Status.COMPLETED:
        assert (got.status, got.body) == (200, RESULT)
    elif compat == "2.2":
        assert (got.status, set(got.json), got.json["status"]) == (200, {"id", "status", "message"}, status.value)
        assert got.json["message"]
    else:
        assert got.status == code
        assert ("Retry-After" in got.headers) == (code == 202)
        assert (got.json["id"] == job.id) if code == 202 else got.body == b""


@pytest.mark.parametrize("status", STATES, ids=str)
def test_download_partial_in_every_state(status: Status, desk: Desk, peer: Peer) -> None:
    job = in_state(desk, status)
    peer.says["/retrieve_partial/7"] = [zip_reply(b"PK from the client")]
    said = ask(desk.server, "GET", f"/download_partial/{job.id}")
    assert said.status == (404 if status is Status.CLEANED else 200)
    if status in (Status.COMPLETED, Status.FAILED):
        assert said.body == RESULT
    elif status in (Status.SUBMITTED, Status.RUNNING, Status.UNKNOWN):
        assert said.body == b"PK from the client"
        peer.says["/retrieve_partial/7"] = [reply(500)]
        assert ask(desk.server, "GET", f"/download_partial/{job.id}").status == 503
    elif status is not Status.CLEANED:
        assert b"run.sh" in said.body


@pytest.mark.parametrize("status", STATES, ids=str)
def test_terminate_in_every_state(status: Status, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once where it is with no client; noted where its client is away; 409 where it ended in another way."""
    replace(monkeypatch, "TERMINATE_TRY_S", 0.05)
    job = in_state(desk, status)
    desk.link.failed("cannot be reached")
    for _ in range(2):
        said = ask(desk.server, "POST", f"/terminate/{job.id}")
        code = 200 if status in (Status.QUEUED, Status.KILLED) else 409 if status in OVER else 202
        assert (said.status, said.json["id"], said.headers["X-Job-Status"]) == (code, job.id, desk[job].status.value)
    assert desk[job].status is (Status.KILLED if status is Status.QUEUED else status)
    assert (desk[job].kill_requested_at is not None) == (status not in OVER)
    assert code != 202 or desk.link.name in said.json["message"]


FIELDS = [
    "id", "uuid", "user_id", "service", "name", "status", "ended_as", "reason", "cause", "exit_code", "signal", "priority", "cpus",
    "memory", "timeout", "retries", "after", "retry_of", "attempt", "client", "dest_id", "loc", "message", "created_at", "started_at",
    "ended_at", "queue_position", "estimated_start", "waiting_for", "inputs_from", "result", "attempts", "history",
    "callback_url", "webhooks", "gpus", "peak_memory", "cpu_time",
]  # fmt: skip


@pytest.mark.parametrize("status", STATES, ids=str)
def test_the_whole_job_in_every_state(status: Status, desk: Desk) -> None:
    job = in_state(desk, status)
    said = ask(desk.server, "GET", f"/jobs/{job.id}").json
    assert set(FIELDS) == set(said)
    assert (said["status"], said["dest_id"]) == (status.value, job.dest_id or "")
    assert (said["queue_position"] is not None) == (status is Status.QUEUED)
    assert [move["to"] for move in said["history"]][-1] == status.value
    assert (said["ended_at"] is not None) == (status in OVER)
    listed = ask(desk.server, "GET", "/jobs").json["jobs"][0]
    assert {name: listed[name] for name in FIELDS if name in listed and name not in ("message", "queue_position", "waiting_for")} == {
        name: said[name] for name in FIELDS if name in listed and name not in ("message", "queue_position", "waiting_for")
    }


def test_places_in_the_queue_and_what_is_waited_for(desk: Desk) -> None:
    desk.restart(SERVICE_EXAMPLE_RUNS_PER_USER="1", SERVICE_EXAMPLE_MAX_RUNS="2")
    desk.with_client(Status.RUNNING, user_id=1)
    jobs = [desk.upload(user_id=user) for user in (1, 1, 2, 3)]
    desk.link.slots = 4
    said = [ask(desk.server, "GET", f"/jobs/{job.id}").json for job in jobs]
    assert [each["queue_position"] for each in said] == [3, 4, 1, 2], "who has used nothing goes before who runs one"
    assert said[0]["waiting_for"] == "1 of your 1 runs for example are in use"
    assert said[1]["waiting_for"] == "1 of your 1 runs for example are in use and 1 of your jobs is ahead of it"
    assert said[2]["waiting_for"].startswith("it is next")
    assert said[3]["waiting_for"] == "it waits for its turn: 1 other user's turn is ahead of it"
    desk.with_client(Status.RUNNING, user_id=4)
    assert ask(desk.server, "GET", f"/jobs/{jobs[3].id}").json["waiting_for"].startswith("all 2 runs of example are in use")
    desk.link.failed("cannot be reached: connection refused")
    assert "connection refused" in ask(desk.server, "GET", "/jobs/1").json["waiting_for"]


def test_a_new_attempt_says_when_it_begins(desk: Desk) -> None:
    job = desk.with_client(Status.RUNNING)
    joborch.new_attempt(desk.server, job, "the machine was restarted")
    said = ask(desk.server, "GET", f"/jobs/{job.id}").json
    assert "attempt 2 starts in" in said["waiting_for"] and "the machine was restarted" in said["waiting_for"]
    assert [attempt["attempt"] for attempt in said["attempts"]] == [1]
    assert said["attempts"][0]["cause"] == "infrastructure"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("0", 404),
        ("-1", 404),
        ("99", 404),
        (str(2**63), 404),
        ("9" * 30, 404),
        ("9" * 31, 400),
        ("x", 400),
        ("1.0", 400),
        ("٣", 400),
        ("1 ", 400),
        ("+1", 400),
    ],
)
def test_ids(path: str, status: int, desk: Desk) -> None:
    desk.upload()
    assert ask(desk.server, "GET", f"/jobs/{path}").status == status


def test_a_result_that_is_missing_on_disk_is_said_to_be(desk: Desk) -> None:
    job = in_state(desk, Status.COMPLETED)
    desk.data.result(job.mark).unlink()
    said = ask(desk.server, "GET", f"/download/{job.id}")
    assert said.status == 500
    assert "missing" in said.json["message"]


def test_a_wish_for_a_job_that_went_meanwhile(desk: Desk) -> None:
    """Rows go after KEEP_ROWS: whoever waits for one is told, and nothing breaks."""
    job = in_state(desk, Status.CLEANED)
    assert joborch.status_other_than(desk.server, job.id, {"Queued"}) == "Cleaned"
    desk.store.forget([job.id])
    assert joborch.status_other_than(desk.server, job.id, {"Cleaned"}) == ""
    assert joborch.over_or_queued(desk.server, job.id) is None
    assert not desk.store.request_kill(job.id, Cause.CANCELLED)
    assert ask(desk.server, "POST", f"/terminate/{job.id}").status == 404
