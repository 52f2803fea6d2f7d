"""The proxy does to a message what its faults say, and nothing to any other: each kind on a tiny server of the test's own."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from harness import raw_exchange, raw_head, wait_for
from proxy import GARBAGE, KINDS, RUBBISH, Fault, Proxy

BODY = bytes(range(256)) * 40
BIG_BYTES = 64 << 20


class Handler(BaseHTTPRequestHandler):
    """Echoes what it is sent; /chunked in chunks, /endless until the line ends, /big is big, /early does not wait for the end."""

    protocol_version = "HTTP/1.1"
    got: list[tuple[str, bytes]]  # what arrived whole
    began: list[str]  # what arrived at all

    def do_GET(self) -> None:
        """Any request."""
        self.began.append(self.path)
        if self.path == "/early":
            self.say(413, b"too large")
            self.close_connection = True
            return
        body = self.chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(self.length())
        if len(body) < self.length():
            self.close_connection = True
            return
        self.got.append((f"{self.command} {self.path}", body))
        self.answer(body or BODY)

    def length(self) -> int:
        """How long the body is told to be."""
        return int(self.headers.get("Content-Length") or 0)

    def chunks(self) -> bytes:
        """A body that comes in chunks."""
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline() != b"\r\n":
            continue
        return body

    def answer(self, body: bytes) -> None:
        """Say it in the way that the path asks for."""
        if self.path == "/chunked":
            self.head(200, "Transfer-Encoding", "chunked")
            for begin in range(0, len(body), 1000):
                piece = body[begin : begin + 1000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        elif self.path == "/endless":
            self.close_connection = True
            self.head(200, "Connection", "close")
            self.wfile.write(body)
        elif self.path == "/big":
            self.head(200, "Content-Length", str(BIG_BYTES))
            for _ in range(BIG_BYTES >> 20):
                self.wfile.write(b"\0" * (1 << 20))
        elif self.path == "/nothing":
            self.head(204, "X-Nothing", "here")
        else:
            self.say(200, body)

    def head(self, status: int, name: str, value: str) -> None:
        """Status line and one header."""
        self.wfile.write(f"HTTP/1.1 {status} Because\r\n{name}: {value}\r\n\r\n".encode())

    def say(self, status: int, body: bytes) -> None:
        """An answer whose length is told."""
        self.head(status, "Content-Length", str(len(body)))
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_HEAD = do_POST = do_GET  # noqa: N815 - the names are http.server's

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Target:
    """The tiny server."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.began: list[str] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"got": self.got, "began": self.began}))
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = int(self.http.server_address[1])
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """End it."""
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(name="target")
def target_fixture() -> Iterator[Target]:
    """A tiny server, closed with the test."""
    made = Target()
    yield made
    made.close()


@pytest.fixture
def proxy(target: Target) -> Iterator[Proxy]:
    """A proxy in front of it."""
    with Proxy(target.port) as made:
        yield made


class Caller:
    """A connection to the proxy, kept alive."""

    def __init__(self, proxy: Proxy) -> None:
        self.line = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, bytes]:
        """Status and body of an answer."""
        self.line.request(method, path, body, **options)
        answer = self.line.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def caller(proxy: Proxy) -> Iterator[Caller]:
    """Somebody who asks through the proxy."""
    made = Caller(proxy)
    yield made
    made.line.close()


def failure_of(call: Callable[[], object]) -> BaseException:
    """What a call raises."""
    try:
        value = call()
    except (OSError, http.client.HTTPException) as error:
        return error
    raise AssertionError(f"it did not fail: {value!r:.200}")


# == What no fault befalls ==


def test_all_passes_unchanged_on_one_connection(proxy: Proxy, target: Target, caller: Caller) -> None:
    """However a message tells its length."""
    assert caller.ask("GET", "/") == (200, BODY)
    assert caller.ask("POST", "/", BODY) == (200, BODY)
    assert caller.ask("POST", "/", iter([b"abc", b"defg"])) == (200, b"abcdefg")
    assert caller.ask("HEAD", "/") == (200, b"")
    assert caller.ask("GET", "/nothing") == (204, b"")
    assert caller.ask("GET", "/chunked") == (200, BODY)
    line = caller.line.sock
    assert caller.ask("GET", "/") == (200, BODY)
    assert caller.line.sock is line, "the connection was not kept"
    assert caller.ask("GET", "/endless") == (200, BODY)
    assert [exchange.status for exchange in proxy.seen] == [200, 200, 200, 200, 204, 200, 200, 200]
    assert proxy.done == []


def test_a_chunked_request_passes(proxy: Proxy, target: Target) -> None:
    """With its trailers; and what follows it on the connection, sent at once, is another request."""
    chunks = b"5\r\nabcde\r\n1;x=y\r\nf\r\n0\r\nTrailer: x\r\n\r\n"
    first = b"POST /nothing HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    received = raw_exchange(proxy.port, first + raw_head("GET", "/endless", proxy.port))
    assert received.startswith(b"HTTP/1.1 204") and received.endswith(BODY)
    assert target.got == [("POST /nothing", b"abcdef"), ("GET /endless", b"")]
    assert proxy.seen[0].request_bytes == len(first)


def test_an_answer_may_come_before_its_request_has_ended(proxy: Proxy) -> None:
    """The rest of the request goes nowhere, and takes nothing with it."""
    head = b"POST /early HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n"
    assert raw_exchange(proxy.port, head + b"x" * (8 << 20)).endswith(b"too large")


def test_what_is_no_http_passes(proxy: Proxy) -> None:
    """The target says what it thinks of it."""
    assert b"400" in raw_exchange(proxy.port, b"\0\1rubbish rubbish rubbish\r\n\r\n")
    assert proxy.seen == []


def test_half_a_request_passes(proxy: Proxy, target: Target) -> None:
    """Who hangs up in between is passed on as one who hung up."""
    assert raw_exchange(proxy.port, b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc", half_close=True) == b""
    assert (target.began, target.got) == (["/"], [])


def test_what_is_big_is_not_held(proxy: Proxy) -> None:
    """A caller who does not read holds up the target, not the proxy's memory."""
    with contextlib.closing(socket.socket()) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        line.connect(("127.0.0.1", proxy.port))
        line.sendall(raw_head("GET", "/big", proxy.port))
        wait_for(lambda: proxy.seen and proxy.seen[0].answer_bytes, 5, "the first bytes")
        before = -1
        while before != proxy.seen[0].answer_bytes:  # until nothing more fits between target and caller
            before = proxy.seen[0].answer_bytes
            time.sleep(0.05)
        assert before < BIG_BYTES / 2
        line.settimeout(10)
        received = 0
        while received < BIG_BYTES:
            received += len(line.recv(1 << 20))


def test_a_target_that_is_not_there_resets(target: Target, proxy: Proxy) -> None:
    target.close()
    assert isinstance(failure_of(lambda: Caller(proxy).ask("GET", "/")), ConnectionResetError)


def test_a_target_that_hangs_up_idle_hangs_up_on_the_caller(proxy: Proxy, target: Target) -> None:
    """Who would use the connection again sees in time that it is gone."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=10)) as line:
        line.sendall(b"GET /endless HTTP/1.1\r\n\r\n")
        while line.recv(1 << 16):
            continue
    wait_for(lambda: not proxy.lines, 5, "the connection let go of")


def test_drop_resets_what_is_open(proxy: Proxy, caller: Caller) -> None:
    """New connections are welcome."""
    caller.ask("GET", "/")
    proxy.drop()
    assert isinstance(failure_of(lambda: caller.ask("GET", "/")), ConnectionResetError)
    assert Caller(proxy).ask("GET", "/") == (200, BODY)


# == Each kind ==


def test_refuse_at_once(proxy: Proxy, caller: Caller) -> None:
    """New connections are refused, those that are open go on; calm opens the port."""
    caller.ask("GET", "/")
    proxy.plant(Fault("refuse"))
    assert isinstance(failure_of(lambda: Caller(proxy).ask("GET", "/")), ConnectionRefusedError)
    assert caller.ask("GET", "/") == (200, BODY)
    proxy.calm()
    assert Caller(proxy).ask("GET", "/") == (200, BODY)
    assert proxy.counts() == {"refuse": 1}


def test_refuse_for_a_while(proxy: Proxy) -> None:
    proxy.plant(Fault("refuse", seconds=0.1))
    assert isinstance(failure_of(lambda: Caller(proxy).ask("GET", "/")), ConnectionRefusedError)
    wait_for(proxy.opened.is_set, 5, "the port open again")
    assert Caller(proxy).ask("GET", "/") == (200, BODY)


def test_refuse_from_a_request_on(proxy: Proxy, target: Target, caller: Caller) -> None:
    """That request is reset before the target has any of it."""
    proxy.plant(Fault("refuse", "POST /"))
    assert caller.ask("GET", "/") == (200, BODY)
    assert isinstance(failure_of(lambda: caller.ask("POST", "/", b"x")), ConnectionResetError)
    assert isinstance(failure_of(lambda: Caller(proxy).ask("GET", "/")), ConnectionRefusedError)
    assert target.began == ["/"]


@pytest.mark.parametrize("kind", ["cut_request", "reset", "stall"])
@pytest.mark.parametrize(("after", "wanted"), [(0, 0), (7, 7), (0.5, len(BODY) // 2), (10**9, len(BODY) - 1)])
def test_half_a_request(kind: str, after: float, wanted: int, proxy: Proxy, target: Target, caller: Caller) -> None:
    """So many bytes of the body arrive, never all; the caller sees how it ends."""
    proxy.plant(Fault(kind, "POST", after=after, where="request"))
    head = f"POST / HTTP/1.1\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    with contextlib.closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=10)) as line:
        line.sendall(head + BODY)
        if kind == "reset":
            assert isinstance(failure_of(lambda: line.recv(10)), ConnectionResetError)
        else:
            assert line.recv(10) == b""
    (seen,) = proxy.seen
    assert (seen.request_bytes, seen.happened) == (len(head) + wanted, True)
    assert (target.got, proxy.counts()) == ([], {kind: 1})
    assert caller.ask("POST", "/", BODY) == (200, BODY), "it befalls one request alone"


def test_half_the_head_of_a_request_without_a_body(proxy: Proxy, target: Target, caller: Caller) -> None:
    proxy.plant(Fault("cut_request", after=9))
    failure_of(lambda: caller.ask("GET", "/"))
    assert proxy.seen[0].request_bytes == 9
    assert target.began == []


@pytest.mark.parametrize("path", ["/", "/chunked", "/endless"])
@pytest.mark.parametrize("kind", ["cut_answer", "reset", "stall"])
def test_half_an_answer(kind: str, path: str, proxy: Proxy, target: Target, caller: Caller) -> None:
    """So many bytes arrive, head included."""
    proxy.plant(Fault(kind, "GET", after=4000))
    caller.line.request("GET", path)
    if path == "/endless" and kind != "reset":  # nobody can tell that it was cut
        assert len(caller.line.getresponse().read()) < 4000
    else:
        error = failure_of(lambda: caller.line.getresponse().read())
        assert type(error) is (ConnectionResetError if kind == "reset" else http.client.IncompleteRead), error
    assert (proxy.seen[0].answer_bytes, proxy.seen[0].status) == (4000, 200)
    assert len(target.got) == 1


def test_an_answer_cut_at_its_first_and_at_its_last_byte(proxy: Proxy, caller: Caller) -> None:
    proxy.plant(Fault("cut_answer"))
    proxy.plant(Fault("cut_answer", after=10**9))
    assert isinstance(failure_of(lambda: caller.ask("GET", "/")), http.client.RemoteDisconnected)
    error = failure_of(lambda: caller.ask("GET", "/"))
    assert isinstance(error, http.client.IncompleteRead) and error.expected == 1


def test_a_lost_answer(proxy: Proxy, target: Target, caller: Caller) -> None:
    """The target did what it was asked."""
    proxy.plant(Fault("lost_answer", "POST"))
    assert isinstance(failure_of(lambda: caller.ask("POST", "/", b"x")), http.client.RemoteDisconnected)
    assert target.got == [("POST /", b"x")]
    assert (proxy.seen[0].status, proxy.seen[0].answer_bytes) == (0, 0)


@pytest.mark.parametrize("where", ["request", "answer"])
def test_a_stall_that_goes_on(where: str, proxy: Proxy, target: Target, caller: Caller) -> None:
    """Silent, then whole; calm ends a silence at once."""
    proxy.plant(Fault("stall", after=1000, seconds=0.2, where=where, goes_on=True))
    began = time.monotonic()
    assert caller.ask("POST", "/", BODY) == (200, BODY)
    assert time.monotonic() - began >= 0.2
    proxy.plant(Fault("stall", after=1000, seconds=60, where=where, goes_on=True))
    caller.line.request("POST", "/", BODY)
    wait_for(lambda: proxy.counts()["stall"] == 2, 5, "the silence")
    proxy.calm()
    assert caller.line.getresponse().read() == BODY


def test_a_stall_keeps_the_connection_open(proxy: Proxy) -> None:
    proxy.plant(Fault("stall", after=100, seconds=60))
    with contextlib.closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=0.2)) as line:
        line.sendall(raw_head("GET", "/", proxy.port))
        wait_for(lambda: proxy.done, 5, "the silence")
        assert len(line.recv(1 << 16)) == 100
        with pytest.raises(TimeoutError):
            line.recv(1 << 16)
        proxy.calm()
        line.settimeout(5)
        assert line.recv(1 << 16) == b""


@pytest.mark.parametrize("where", ["request", "answer"])
def test_a_drip(where: str, proxy: Proxy, caller: Caller) -> None:
    """A few bytes at a time, spread over the time that was asked for."""
    proxy.plant(Fault("drip", after=70, seconds=0.2, where=where))
    began = time.monotonic()
    assert caller.ask("POST", "/", BODY) == (200, BODY)
    assert time.monotonic() - began >= 0.2
    proxy.plant(Fault("drip", after=70, seconds=5))
    with contextlib.closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=10)) as line:
        line.sendall(raw_head("GET", "/", proxy.port))
        assert len(line.recv(1 << 16)) == 7
        proxy.calm()


def test_garbage(proxy: Proxy, target: Target, caller: Caller) -> None:
    """The target did it, the caller gets what is no HTTP."""
    proxy.plant(Fault("garbage"))
    assert isinstance(failure_of(lambda: caller.ask("POST", "/", b"x")), http.client.BadStatusLine)
    proxy.plant(Fault("garbage"))
    assert raw_exchange(proxy.port, raw_head("GET", "/", proxy.port)) == GARBAGE
    assert len(target.got) == 2


def test_rubbish(proxy: Proxy, target: Target, caller: Caller) -> None:
    """Good HTTP that means nothing; the connection goes on."""
    proxy.plant(Fault("rubbish"))
    proxy.plant(Fault("rubbish", status=502))
    proxy.plant(Fault("rubbish"))
    assert caller.ask("POST", "/", b"x") == (200, RUBBISH)
    line = caller.line.sock
    assert caller.ask("GET", "/chunked") == (502, RUBBISH)
    assert caller.ask("HEAD", "/") == (200, b"")
    assert caller.ask("GET", "/") == (200, BODY)
    assert caller.line.sock is line
    assert len(target.got) == 4


@pytest.mark.parametrize(("after", "bit", "wanted"), [(0, 0, 0), (300, 7, 300), (0.5, 3, len(BODY) // 2), (10**9, 1, len(BODY) - 1)])
@pytest.mark.parametrize("kind", ["flip_request", "flip_answer"])
def test_a_bit_flips(kind: str, after: float, bit: int, wanted: int, proxy: Proxy, target: Target, caller: Caller) -> None:
    """That one, and nothing else."""
    changed = bytearray(BODY)
    changed[wanted] ^= 1 << bit
    proxy.plant(Fault(kind, "POST", after=after, bit=bit))
    assert caller.ask("POST", "/", BODY) == (200, bytes(changed))
    assert target.got == [("POST /", bytes(changed) if kind == "flip_request" else BODY)]
    assert caller.ask("POST", "/", BODY) == (200, BODY)


def test_a_bit_flips_in_chunks_and_never_in_their_sizes(proxy: Proxy, caller: Caller) -> None:
    for place in (0, 999, 1000, 5000):
        changed = bytearray(BODY)
        changed[place] ^= 1
        proxy.plant(Fault("flip_answer", after=place))
        assert caller.ask("GET", "/chunked") == (200, bytes(changed))


def test_a_bit_flips_behind_a_text(proxy: Proxy, caller: Caller) -> None:
    """The first that fits; where there is none, the message passes."""
    proxy.plant(Fault("flip_request", at='"id": ', bit=1))
    assert caller.ask("POST", "/", b"nothing") == (200, b"nothing")
    wait_for(lambda: proxy.planted[0].left, 5, "the fault given back")
    assert caller.ask("POST", "/", b'{"id": 1, "id": 1}') == (200, b'{"id": 3, "id": 1}')
    assert proxy.counts() == {"flip_request": 1}


def test_what_cannot_happen_waits_for_the_next(proxy: Proxy, caller: Caller) -> None:
    """A message without a body has no bit to flip: it passes, the fault does not count."""
    proxy.plant(Fault("flip_answer"))
    proxy.plant(Fault("flip_request"))
    assert caller.ask("GET", "/nothing") == (204, b"")
    wait_for(lambda: all(fault.left for fault in proxy.planted), 5, "the fault given back")
    assert proxy.counts() == {}
    assert caller.ask("GET", "/")[1] == bytes([BODY[0] ^ 1]) + BODY[1:]
    assert caller.ask("POST", "/", b"abc") == (200, b"`bc")
    assert proxy.counts() == {"flip_answer": 1, "flip_request": 1}


@pytest.mark.parametrize("order", ["together", "before", "after"])
def test_a_duplicate(order: str, proxy: Proxy, target: Target, caller: Caller) -> None:
    """The target gets it twice, the caller one answer."""
    proxy.plant(Fault("duplicate", "POST", order=order, seconds=0.01))
    assert caller.ask("POST", "/", BODY * 300) == (200, BODY * 300)
    wait_for(lambda: proxy.seen[0].copies, 5, "the answer to the copy")
    assert proxy.seen[0].copies == [200]
    assert target.got == [("POST /", BODY * 300)] * 2
    assert caller.ask("POST", "/", b"x") == (200, b"x")
    assert len(target.got) == 3
    assert proxy.counts() == {"duplicate": 1}


# == Which, when, how often ==


def test_faults_befall_what_they_match_as_often_as_told(proxy: Proxy, caller: Caller) -> None:
    """The one planted first comes first; a query is part of the path."""
    proxy.plant(Fault("rubbish", "GET /a/[0-9]+$", times=2, status=501))
    proxy.plant(Fault("rubbish", "GET /a/", times=1, status=502))
    proxy.plant(Fault("rubbish", r"GET /b\?x=1", times=0, status=503))
    paths = ["/", "/a/x", "/a/1", "/a/12", "/a/3", "/b", "/b?x=1", "/b?x=1", "/b?x=1"]
    assert [caller.ask("GET", path)[0] for path in paths] == [200, 502, 501, 501, 200, 200, 503, 503, 503]
    assert [done.request for done in proxy.done] == ["GET /a/x", "GET /a/1", "GET /a/12", *["GET /b?x=1"] * 3]
    assert len(proxy.find("GET /a/")) == 4
    proxy.calm()
    assert caller.ask("GET", "/b?x=1")[0] == 200


def test_scattered_faults_come_from_the_seed(target: Target) -> None:
    """The same for the same requests; only those that match; none after calm."""
    runs = []
    for seed in (1, 1, 2):
        with Proxy(target.port) as proxy:
            proxy.scatter(seed, 0.3, ("rubbish", "lost_answer"), "GET /x")
            for number in range(40):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    Caller(proxy).ask("GET", f"/x{number}" if number % 2 else "/y")
            runs.append([(done.kind, done.request) for done in proxy.done])
            proxy.calm()
            assert Caller(proxy).ask("GET", "/x") == (200, BODY)
    assert runs[0] == runs[1] != runs[2]
    assert 2 < len(runs[0]) < 15
    assert {kind for kind, _ in runs[0]} == {"rubbish", "lost_answer"}
    assert all(re.match("GET /x", request) for _, request in runs[0])


@pytest.mark.parametrize("seed", range(3))
def test_scattered_faults_of_every_kind(seed: int, target: Target) -> None:
    """Whatever comes of it, it ends, and after calm all is well."""
    with Proxy(target.port) as proxy:
        proxy.scatter(seed, 0.8, longest_s=0.02)

        def call(number: int) -> None:
            for path in ("/", "/chunked", "/nothing", "/endless") * 6:
                wait_for(proxy.opened.is_set, 5, "the port open")
                with contextlib.suppress(OSError, http.client.HTTPException):
                    Caller(proxy).ask("POST", path, BODY * number)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        assert len(proxy.counts()) >= len(KINDS) - 2, proxy.counts()
        proxy.calm()
        assert Caller(proxy).ask("POST", "/", b"x") == (200, b"x")
    assert not proxy.lines


def test_close_ends_whatever_is_under_way(target: Target) -> None:
    proxy = Proxy(target.port).start()
    proxy.plant(Fault("stall", seconds=60, times=0))
    with contextlib.closing(socket.create_connection(("127.0.0.1", proxy.port), timeout=10)) as line:
        line.sendall(raw_head("GET", "/", proxy.port))
        wait_for(lambda: proxy.done, 5, "the silence")
        proxy.close()
        assert line.recv(10) == b""
    assert isinstance(failure_of(lambda: Caller(proxy).ask("GET", "/")), ConnectionRefusedError)
    assert not proxy.threads and not proxy.lines


@pytest.mark.parametrize("fault", [{"kind": "x"}, {"kind": "stall", "where": "x"}, {"kind": "duplicate", "order": "x"}])
def test_a_fault_that_is_none_is_refused(fault: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        Fault(**fault)
