"""The proxy does to a message what its faults say, and nothing to any other: each kind on a tiny server of the test's own."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from harness import raw_exchange, raw_head, wait_for
from proxy import GARBAGE, KINDS, RUBBISH, Fault, Proxy

BODY = bytes(range(256)) * 40
CHUNKED = b"".join(b"%x\r\n%s\r\n" % (len(BODY[at : at + 1000]), BODY[at : at + 1000]) for at in range(0, len(BODY), 1000)) + b"0\r\n\r\n"


class Handler(BaseHTTPRequestHandler):
    """Echoes what it is sent; /chunked in chunks, /endless until the line ends, /early before it has read all."""

    protocol_version = "HTTP/1.1"
    got: list[bytes]  # the bodies that arrived whole

    def do_POST(self) -> None:
        """Any request."""
        length = int(self.headers.get("Content-Length") or 0)
        body = b"" if self.path == "/early" else self.rfile.read(length)
        self.close_connection = self.path in ("/early", "/endless") or len(body) < length
        if self.path == "/early" or len(body) == length:
            self.got.append(body)
            shape = {"/chunked": "Transfer-Encoding: chunked", "/endless": "Connection: close"}
            content = CHUNKED if self.path == "/chunked" else body
            head = shape.get(self.path, f"Content-Length: {len(content)}")
            self.wfile.write(f"HTTP/1.1 200 Because\r\n{head}\r\n\r\n".encode() + (b"" if self.command == "HEAD" else content))

    do_GET = do_HEAD = do_POST  # noqa: N815 - the names are http.server's

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(name="got")
def got_fixture() -> list[bytes]:
    """What has arrived at the target."""
    return []


@pytest.fixture
def proxy(got: list[bytes]) -> Iterator[Proxy]:
    """A proxy in front of a tiny server."""
    target = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"got": got}))
    target.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=target.serve_forever, args=(0.01,), daemon=True).start()
    with Proxy(int(target.server_address[1])) as made:
        yield made
    target.shutdown()
    target.server_close()


def ask(line: Proxy | http.client.HTTPConnection, body: Any = BODY, path: str = "/", method: str = "POST") -> Any:
    """The body of an answer, its status where that is not 200, or the kind of error; on a new connection unless one is given."""
    if isinstance(line, Proxy):
        line = http.client.HTTPConnection("127.0.0.1", line.port, timeout=10)
    try:
        line.request(method, path, body)
        answer = line.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return type(error)
    return content if answer.status == 200 else answer.status


def flipped(place: int, bit: int = 0) -> bytes:
    """BODY with one bit changed."""
    return BODY[:place] + bytes([BODY[place] ^ 1 << bit]) + BODY[place + 1 :]


def test_what_no_fault_befalls_passes_unchanged(proxy: Proxy, got: list[bytes]) -> None:
    """However a message tells its length; what is no HTTP passes as well, and so does half a request."""
    line = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    assert [ask(line), ask(line, path="/chunked"), ask(line, method="HEAD")] == [BODY, BODY, b""]
    kept = line.sock
    assert ask(line) == BODY
    assert line.sock is kept, "the connection was not kept"
    assert ask(line, path="/endless") == BODY
    early = f"POST /early HTTP/1.1\r\nContent-Length: {16 << 20}\r\n\r\n".encode()
    assert raw_exchange(proxy.port, early + bytes(16 << 20)).startswith(b"HTTP/1.1 200"), "an answer before the request has ended"
    assert b"400" in raw_exchange(proxy.port, b"\0\1rubbish rubbish rubbish\r\n\r\n")
    whole = len(got)
    assert raw_exchange(proxy.port, b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc", half_close=True) == b""
    assert (len(got), proxy.done) == (whole, [])
    assert [exchange.status for exchange in proxy.seen] == [200] * 6 + [0]


HALF, WHOLE = len(BODY) // 2, len(BODY)
GONE, RESET, CUT = http.client.RemoteDisconnected, ConnectionResetError, http.client.IncompleteRead


@pytest.mark.parametrize(
    ("fault", "path", "answer", "arrives"),
    [
        (Fault("cut_request", after=7), "/", GONE, False),
        (Fault("reset", after=0.5, where="request"), "/", RESET, False),
        (Fault("stall", after=10**9, where="request"), "/", GONE, False),
        (Fault("stall", after=9, seconds=0.2, where="request", goes_on=True), "/", BODY, True),
        (Fault("drip", after=70, seconds=0.2, where="request"), "/", BODY, True),
        (Fault("flip_request", after=0.5, bit=3), "/", flipped(HALF, 3), True),
        (Fault("flip_request", at="\x01\x02", bit=1), "/", flipped(3, 1), True),
        (Fault("cut_answer"), "/", GONE, True),
        (Fault("cut_answer", after=10**9), "/", CUT, True),
        (Fault("reset", after=4000), "/chunked", RESET, True),
        (Fault("stall", after=4000), "/chunked", CUT, True),
        (Fault("stall", after=4000, seconds=0.2, goes_on=True), "/", BODY, True),
        (Fault("drip", after=70, seconds=0.2), "/", BODY, True),
        (Fault("flip_answer", after=10**9, bit=7), "/", flipped(WHOLE - 1, 7), True),
        (Fault("flip_answer", after=1000), "/chunked", flipped(1000), True),
        (Fault("lost_answer"), "/", GONE, True),
        (Fault("garbage"), "/", http.client.BadStatusLine, True),
        (Fault("rubbish"), "/chunked", RUBBISH, True),
        (Fault("rubbish", status=502), "/", 502, True),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_fault_befalls_one_message(fault: Fault, path: str, answer: Any, arrives: bool, proxy: Proxy, got: list[bytes]) -> None:
    """What the caller gets, and whether the target had the whole request; the next request passes."""
    proxy.plant(fault)
    began = time.monotonic()
    assert ask(proxy, path=path) == answer
    assert time.monotonic() - began >= fault.seconds
    assert (len(got), proxy.counts()) == (int(arrives), {fault.kind: 1})
    assert ask(proxy, path=path) == BODY


def test_so_many_bytes_pass(proxy: Proxy) -> None:
    """Of a request's body, or of its head where it has no body; of an answer with its head."""
    head = b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\n"
    proxy.plant(Fault("cut_request", after=7))
    assert raw_exchange(proxy.port, head + b"x" * 10) == b""
    proxy.plant(Fault("cut_request", after=9))
    assert raw_exchange(proxy.port, raw_head("GET", "/", proxy.port)) == b""
    proxy.plant(Fault("cut_answer", after=30))
    assert len(raw_exchange(proxy.port, raw_head("GET", "/", proxy.port))) == 30
    assert [(seen.request_bytes, seen.answer_bytes) for seen in proxy.seen[:2]] == [(len(head) + 7, 0), (9, 0)]
    proxy.plant(Fault("garbage"))
    assert raw_exchange(proxy.port, raw_head("GET", "/", proxy.port)) == GARBAGE


def test_a_port_that_refuses(proxy: Proxy, got: list[bytes]) -> None:
    """At once, for a while, or from a request on, which is reset before the target has any of it; what is open goes on."""
    line = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    assert ask(line) == BODY
    proxy.plant(Fault("refuse"))
    assert (ask(proxy), ask(line)) == (ConnectionRefusedError, BODY)
    proxy.calm()
    proxy.plant(Fault("refuse", seconds=0.1))
    assert ask(proxy) is ConnectionRefusedError
    wait_for(proxy.opened.is_set, what="the port open again")
    proxy.plant(Fault("refuse", "POST /x"))
    assert (ask(proxy), ask(proxy, path="/x"), ask(proxy), len(got)) == (BODY, RESET, ConnectionRefusedError, 3)
    proxy.calm()
    proxy.drop()
    assert (ask(line), ask(proxy)) == (RESET, BODY)


@pytest.mark.parametrize("order", ["together", "before", "after"])
def test_a_duplicate(order: str, proxy: Proxy, got: list[bytes]) -> None:
    """The target gets it twice, the caller one answer."""
    proxy.plant(Fault("duplicate", "POST", order=order, seconds=0.01))
    assert ask(proxy, BODY * 300) == BODY * 300
    wait_for(lambda: proxy.seen[0].copies == [200], what="the answer to the copy")
    assert (got, proxy.counts()) == ([BODY * 300] * 2, {"duplicate": 1})


def test_faults_befall_what_they_match_as_often_as_told(proxy: Proxy) -> None:
    """The one planted first comes first; what cannot happen (a bit of no body) waits for the next."""
    proxy.plant(Fault("flip_answer", "POST /bit"))
    assert ask(proxy, b"", "/bit") == b""
    wait_for(lambda: proxy.planted[0].left, what="the fault given back")
    assert ask(proxy, path="/bit") == flipped(0)
    proxy.plant(Fault("rubbish", "GET /a/[0-9]+$", times=2, status=501))
    proxy.plant(Fault("rubbish", "GET /a/", times=1, status=502))
    proxy.plant(Fault("rubbish", r"GET /b\?x=1", times=0, status=503))
    paths = ["/", "/a/x", "/a/1", "/a/12", "/a/3", "/b", "/b?x=1", "/b?x=1"]
    assert [ask(proxy, b"", path, "GET") for path in paths] == [b"", 502, 501, 501, b"", b"", 503, 503]
    assert len(proxy.find("GET /a/")) == 4


def test_a_silence_ends_with_calm_and_with_close(proxy: Proxy) -> None:
    for end in (proxy.calm, proxy.close):
        proxy.plant(Fault("stall", after=30, seconds=60))
        with contextlib.closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=0.2)) as line:
            line.sendall(raw_head("GET", "/", proxy.port))
            assert len(line.recv(1 << 16)) == 30
            with pytest.raises(TimeoutError):
                line.recv(1 << 16)
            line.settimeout(5)
            end()
            assert line.recv(10) == b""
    assert ask(proxy) is ConnectionRefusedError
    assert not proxy.threads and not proxy.lines


def test_scattered_faults(proxy: Proxy) -> None:
    """The same seed brings the same faults for the same requests; whatever comes of them, it ends, and after calm all is well."""
    runs = []
    for seed in (1, 1, 2):
        proxy.done.clear()
        proxy.scatter(seed, 0.3, ("rubbish", "lost_answer"), "GET /x")
        for number in range(40):
            ask(proxy, b"", f"/x{number}" if number % 2 else "/y", "GET")
        runs.append([(done.kind, done.request) for done in proxy.done])
    assert runs[0] == runs[1] != runs[2]
    assert {request[:6] for run in runs for _, request in run} == {"GET /x"}
    proxy.scatter(3, 0.8, longest_s=0.02)

    def call(number: int) -> None:
        for path in ("/", "/chunked", "/endless") * 8:
            wait_for(proxy.opened.is_set, what="the port open")
            ask(proxy, BODY * number, path)

    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(proxy.counts()) >= len(KINDS) - 2, proxy.counts()
    proxy.calm()
    assert ask(proxy) == BODY
