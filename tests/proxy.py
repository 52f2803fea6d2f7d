"""A bad line: a TCP proxy that stands between two processes and befalls chosen requests, or random ones, with faults.

    proxy = Proxy(client.port).start()                        # whoever asks proxy.url, asks the client
    proxy.plant(Fault("cut_answer", "GET /retrieve/", after=100_000))
    proxy.scatter(seed=7, rate=0.1, kinds=("reset", "stall"))  # a chaos run; proxy.calm() ends it

It knows as much of HTTP/1.1 as tells where a message ends (request line, Content-Length, chunked, keep-alive); what no
fault befalls passes unchanged, byte for byte and while it comes. Each connection has two threads, one a direction, so
that an answer may come before its request has ended. A target that is not there shows as a connection that is reset.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import random
import re
import select
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, NamedTuple, cast

HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 18
HEAD_LIMIT_BYTES = 1 << 20
SPOOL_BYTES = 1 << 20  # of a request that is delivered twice, more than this stands on the disk
LINGER_S = 2.0  # how long what a caller still sends to a target that is gone is thrown away
DRIP_BYTES = 7
DRIPPED_BYTES = 1000  # how much of a message drips, unless told otherwise
GARBAGE = b"\x16\x03\x01\x00\xf8 this is no HTTP \xff\xfe\r\n\r\n\x00" * 8
RUBBISH = b"<!doctype html><title>Welcome to the guest network</title><p>Please accept our terms.\n"

KINDS = {
    "refuse": "the port is closed for `seconds` (0: until calm): connection refused. Without `match` at once, and what is open stays open; "
    "with one a request closes it, and is reset itself before a byte of it goes on",
    "cut_request": "after `after` bytes of the request's body (of its head, where it has no body) both sides are closed",
    "cut_answer": "after `after` bytes of the answer, its head included, both sides are closed",
    "lost_answer": "the target does what it is asked; its answer is swallowed, and both sides are closed",
    "reset": "as cut_answer (with where='request' as cut_request), but by RST",
    "stall": "as cut_answer or cut_request, but the line stays open and silent for `seconds`; then it is closed, or goes on (goes_on)",
    "drip": "the first `after` bytes (0: 1,000) of the answer (where='request': of the request) come 7 at a time, spread over `seconds`",
    "garbage": "the target does what it is asked; instead of its answer come bytes that are no HTTP, and both sides are closed",
    "rubbish": "the same, but what comes is good HTTP: `status`, `content_type`, a body that means nothing; the connection stays open",
    "flip_request": "one bit (`bit`) of byte `after` of the request's body is changed",
    "flip_answer": "one bit of byte `after` of the answer's body is changed",
    "duplicate": "the target gets the request twice, on two connections: order='together'; the copy 'before' the caller's own, "
    "and answered; or `seconds` 'after' the caller had its answer",
}
ON_REQUESTS = ("refuse", "cut_request", "flip_request", "duplicate")


@dataclass
class Fault:
    """What shall befall a request: KINDS says what each kind does with `after`, `seconds` and the rest."""

    kind: str
    match: str = ""  # a regular expression for the beginning of `METHOD /path?query`; "" is any request
    times: int = 1  # how many requests it befalls; 0: every one
    after: float = 0  # bytes, short of the last one where the length is known; between 0 and 1: a share of the length
    seconds: float = 0.0
    where: str = "answer"  # reset, stall, drip: answer or request
    goes_on: bool = False  # stall
    status: int = 200  # rubbish
    content_type: str = "text/html"  # rubbish
    order: str = "together"  # duplicate
    bit: int = 0  # flip_request, flip_answer
    at: str = ""  # the same: a regular expression; the byte behind its first match, instead of byte `after`
    left: int = field(init=False, default=0)  # of `times`; kept by the proxy

    def __post_init__(self) -> None:
        assert self.kind in KINDS, f"{self.kind!r} is none of {', '.join(KINDS)}"
        assert self.where in ("answer", "request"), self.where
        assert self.order in ("together", "before", "after"), self.order

    @property
    def on_request(self) -> bool:
        """Whether it befalls the request; else the answer."""
        return self.kind in ON_REQUESTS or (self.where == "request" and self.kind in ("reset", "stall", "drip"))


class Done(NamedTuple):
    """A fault that has happened."""

    at: float  # time.monotonic()
    kind: str
    request: str  # `METHOD /path?query`; empty for a port that was closed at once


@dataclass
class Exchange:
    """A request that came by, and what became of it."""

    method: str
    path: str  # with its query
    headers: dict[str, str]  # names in lower case
    fault: Fault | None = None  # what is to befall it
    happened: bool = False  # and has
    status: int = 0  # of the answer that the caller got, 0 as long as there is none
    answer_headers: dict[str, str] = field(default_factory=dict)
    request_bytes: int = 0  # what the target got on the caller's behalf, heads included
    answer_bytes: int = 0  # what the caller got
    copies: list[int] = field(default_factory=list)  # status of the answer to each copy
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def request(self) -> str:
        """What faults are matched with."""
        return f"{self.method} {self.path}"


class Closed(Exception):
    """A fault has ended the connection."""


# == Messages ==

Piece = tuple[bytes, bool]  # bytes of a message, and whether they are content: not head, nor size of a chunk


def read_head(reader: IO[bytes]) -> bytes:
    """The next head with its empty line; less where the line ends before, nothing at its end."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and head != b"\r\n" and len(head) < HEAD_LIMIT_BYTES:
        line = reader.readline(HEAD_LIMIT_BYTES)
        if not line:
            break
        head += line
    return head


def header_fields(head: bytes) -> dict[str, str]:
    """The headers of a head, names in lower case."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if ":" in line)}


def content_length(headers: dict[str, str]) -> int | None:
    """How long the content is, where its message tells."""
    text = headers.get("content-length", "")
    return int(text) if text.isdigit() and "transfer-encoding" not in headers else None


def content_pieces(reader: IO[bytes], headers: dict[str, str], open_end: bool) -> Iterator[Piece]:
    """What follows a head, while it comes. `open_end`: where no length is told, all until the line ends."""
    length = content_length(headers)
    if "chunked" in headers.get("transfer-encoding", "").lower():
        yield from chunked_pieces(reader)
    elif length is not None:
        yield from counted_pieces(reader, length)
    elif open_end:
        yield from counted_pieces(reader, 1 << 62)


def counted_pieces(reader: IO[bytes], length: int) -> Iterator[Piece]:
    """So many bytes; less where the line ends before."""
    while length:
        data = reader.read1(min(length, CHUNK_BYTES))  # type: ignore[attr-defined]
        if not data:
            return
        length -= len(data)
        yield data, True


def chunked_pieces(reader: IO[bytes]) -> Iterator[Piece]:
    """A chunked content with its sizes and trailers (RFC 9112, 7.1)."""
    while True:
        line = reader.readline(1000)
        yield line, False
        size = re.match(rb"[0-9A-Fa-f]+", line)
        if not size:
            return
        if int(size[0], 16) == 0:
            break
        yield from counted_pieces(reader, int(size[0], 16))
        yield reader.readline(1000), False
    while True:
        line = reader.readline(HEAD_LIMIT_BYTES)
        yield line, False
        if line in (b"\r\n", b"\n", b""):
            return


def flipped(pieces: Iterable[Piece], fault: Fault, length: int | None, note: Callable[[], None]) -> Iterator[Piece]:
    """The pieces with one bit of the content changed; `note` is called before it goes out."""
    so_far, place = 0, -1 if fault.at else place_of(fault, 0, length)
    for data, is_content in pieces:
        found = re.search(fault.at.encode(), data) if fault.at and place < 0 and is_content else None
        if found:
            place = so_far + found.end()
        inside = place - so_far
        if is_content and 0 <= inside < len(data):
            note()
            yield data[:inside] + bytes([data[inside] ^ (1 << fault.bit)]) + data[inside + 1 :], True
        else:
            yield data, is_content
        so_far += len(data) if is_content else 0


def place_of(fault: Fault, begin: int, length: int | None) -> int:
    """Where a fault happens, in bytes of a message of which `begin` bytes do not count and `length` more are to come."""
    within = int(fault.after * (1000 if length is None else length)) if 0 < fault.after < 1 else int(fault.after)
    return begin + (within if length is None else max(0, min(within, length - 1)))


# == Connections ==


def close_with_reset(line: socket.socket) -> None:
    """Make the close of a connection an RST."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Line:
    """One connection of a caller, and ours to the target for it."""

    def __init__(self, proxy: Proxy, caller: socket.socket) -> None:
        self.proxy, self.caller, self.lock = proxy, caller, threading.Lock()
        self.waiting: collections.deque[Exchange] = collections.deque()  # asked, not answered
        self.target: socket.socket | None = None
        self.target_gone, self.ending, self.ended = False, False, 0

    def run(self) -> None:
        """Pass on what the caller says, until both directions have ended."""
        try:
            self.target = socket.create_connection((HOST, self.proxy.target_port), timeout=10)
        except OSError:
            close_with_reset(self.caller)
            self.caller.close()
            self.proxy.forget(self)
            return
        self.target.settimeout(None)
        for line in (self.caller, self.target):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.proxy.in_background(self.one_way, self.target, self.pass_answers)
        self.one_way(self.caller, self.pass_requests)

    def one_way(self, source: socket.socket, pass_all: Callable[[IO[bytes]], None]) -> None:
        """Run one direction to its end; the second one to end closes both sides."""
        reader = cast("IO[bytes]", source.makefile("rb", CHUNK_BYTES))
        try:
            pass_all(reader)
        except Closed:
            pass
        except ConnectionError:
            self.end(by_reset=True)  # one side was reset: so is the other
        except (OSError, ValueError):
            self.end()  # closed by the other direction
        finally:
            with contextlib.suppress(OSError):
                reader.close()
            with self.lock:
                self.ended += 1
                last = self.ended == 2
            if last:
                self.shut()

    def shut(self) -> None:
        """Close both sides, and let go of what is not answered."""
        for line in (self.caller, self.target):
            if line is not None:
                line.close()
        for exchange in self.waiting:
            exchange.over.set()
        self.proxy.forget(self)

    def end(self, by_reset: bool = False) -> None:
        """Wake both directions, which then close both sides. Only SHUT_RD sends nothing: the caller shall see an RST alone."""
        self.ending = True
        for line in (self.caller, self.target):
            if line is not None:
                with contextlib.suppress(OSError):
                    if by_reset:
                        close_with_reset(line)
                    line.shutdown(socket.SHUT_RD if by_reset and line is self.caller else socket.SHUT_RDWR)

    def half_close(self, line: socket.socket | None) -> None:
        """Say on this side that no more comes."""
        with contextlib.suppress(OSError):
            if line is not None and not self.ending:
                line.shutdown(socket.SHUT_WR)

    # -- from the caller to the target --

    def pass_requests(self, reader: IO[bytes]) -> None:
        while head := read_head(reader):
            if self.target_gone:
                raise ConnectionResetError
            exchange = self.proxy.seen_request(head)
            self.waiting.append(exchange)
            opaque = not exchange.method
            try:
                self.pass_request(exchange, head, content_pieces(reader, exchange.headers, open_end=opaque))
            except (BrokenPipeError, ConnectionResetError):
                self.throw_away()  # the target hangs up; what it said before is passed on meanwhile
                return
        self.half_close(self.target)

    def throw_away(self) -> None:
        """Read what the caller still sends: closed with bytes unread, TCP would reset it and take the answer with it."""
        deadline, poll = time.monotonic() + LINGER_S, select.poll()
        poll.register(self.caller, select.POLLIN)
        while time.monotonic() < deadline:
            if poll.poll(100) and not self.caller.recv(CHUNK_BYTES):
                return

    def pass_request(self, exchange: Exchange, head: bytes, content: Iterable[Piece]) -> None:
        """Pass on one request, with the fault that befalls it."""
        fault, length = exchange.fault, content_length(exchange.headers)
        if fault is None or not fault.on_request:
            self.send_request(exchange, with_head(head, content))
        elif fault.kind == "refuse":
            self.happens(exchange)
            self.proxy.refuse(fault.seconds)
            self.close(by_reset=True)
        elif fault.kind == "duplicate":
            self.pass_twice(exchange, fault, with_head(head, content))
        elif fault.kind == "flip_request":
            changed = flipped(content, fault, length, lambda: self.happens(exchange))
            self.send_request(exchange, with_head(head, changed))
        else:
            has_content = bool(length) or "transfer-encoding" in exchange.headers
            place = place_of(fault, len(head), length) if has_content else place_of(fault, 0, len(head))
            self.befall(exchange, fault, place, (data for data, _ in with_head(head, content)), self.tell_target)
        if fault is not None and fault.on_request and not exchange.happened and fault.kind != "duplicate":
            self.proxy.give_back(fault)

    def tell_target(self, exchange: Exchange, data: bytes) -> None:
        """Send bytes of a request."""
        assert self.target is not None
        self.target.sendall(data)
        exchange.request_bytes += len(data)

    def send_request(self, exchange: Exchange, pieces: Iterable[Piece]) -> None:
        for data, _ in pieces:
            self.tell_target(exchange, data)

    def pass_twice(self, exchange: Exchange, fault: Fault, pieces: Iterable[Piece]) -> None:
        """Deliver a request to the target twice."""
        if fault.order == "together":
            second = socket.create_connection((HOST, self.proxy.target_port))
            for data, _ in pieces:
                second.sendall(data)
                self.tell_target(exchange, data)
            self.proxy.in_background(self.hear_copy, exchange, second)
            return
        spool = cast("IO[bytes]", tempfile.SpooledTemporaryFile(SPOOL_BYTES))  # noqa: SIM115 - closed by who sends it last
        for data, _ in pieces:
            spool.write(data)
            if fault.order == "after":
                self.tell_target(exchange, data)
        if fault.order == "after":
            self.proxy.in_background(self.send_later, exchange, fault, spool)
            return
        with spool:
            self.send_copy(exchange, spool)
            spool.seek(0)
            for data in iter(lambda: spool.read(CHUNK_BYTES), b""):
                self.tell_target(exchange, data)

    def send_later(self, exchange: Exchange, fault: Fault, spool: IO[bytes]) -> None:
        """Deliver the copy when the caller has had its answer."""
        with spool:
            exchange.over.wait()
            self.proxy.pause(fault.seconds)
            self.send_copy(exchange, spool)

    def send_copy(self, exchange: Exchange, spool: IO[bytes]) -> None:
        with contextlib.suppress(OSError):
            second = socket.create_connection((HOST, self.proxy.target_port))
            spool.seek(0)
            for data in iter(lambda: spool.read(CHUNK_BYTES), b""):
                second.sendall(data)
            self.hear_copy(exchange, second)

    def hear_copy(self, exchange: Exchange, second: socket.socket) -> None:
        """Read the answer to a copy to its end; nobody else gets it."""
        with second, contextlib.suppress(OSError, http.client.HTTPException):
            answer = http.client.HTTPResponse(second, method=exchange.method)
            answer.begin()
            while answer.read(CHUNK_BYTES):
                continue
            exchange.copies.append(answer.status)
            self.happens(exchange)

    # -- from the target to the caller --

    def pass_answers(self, reader: IO[bytes]) -> None:
        while head := read_head(reader):
            status = re.match(rb"HTTP/1\.[01] ([1-9][0-9]{2})", head)
            interim = bool(status and status[1].startswith(b"1"))
            exchange = self.waiting[0] if self.waiting else Exchange("", "", {})
            bodiless = interim or exchange.method == "HEAD" or bool(status and status[1] in (b"204", b"304"))
            headers = header_fields(head)
            content: Iterable[Piece] = () if bodiless else content_pieces(reader, headers, open_end=True)
            if interim or not status:
                self.send_answer(exchange, with_head(head, content))
                continue
            self.pass_answer(exchange, head, int(status[1]), headers, content)
            if self.waiting:
                self.waiting.popleft()
            exchange.over.set()
        self.target_gone = True
        self.half_close(self.caller)

    def pass_answer(self, exchange: Exchange, head: bytes, status: int, headers: dict[str, str], content: Iterable[Piece]) -> None:
        """Pass on one answer, with the fault that befalls it."""
        fault, length = exchange.fault, content_length(headers)
        exchange.answer_headers = headers
        if fault is None or fault.on_request:
            exchange.status = status
            self.send_answer(exchange, with_head(head, content))
        elif fault.kind in ("lost_answer", "garbage", "rubbish"):
            for _ in content:
                continue
            self.happens(exchange)
            self.replace_answer(exchange, fault)
        elif fault.kind == "flip_answer":
            exchange.status = status
            changed = flipped(content, fault, length, lambda: self.happens(exchange))
            self.send_answer(exchange, with_head(head, changed))
        else:
            exchange.status = status
            whole = None if length is None else len(head) + length
            place = place_of(fault, 0, len(head) if content == () else whole)
            self.befall(exchange, fault, place, (data for data, _ in with_head(head, content)), self.tell_caller)
        if fault is not None and not fault.on_request and not exchange.happened:
            self.proxy.give_back(fault)

    def replace_answer(self, exchange: Exchange, fault: Fault) -> None:
        """Give something else for an answer that was swallowed, or nothing."""
        if fault.kind == "rubbish":
            exchange.status = fault.status
            body = b"" if exchange.method == "HEAD" else RUBBISH
            lines = (f"HTTP/1.1 {fault.status} Because", f"Content-Type: {fault.content_type}", f"Content-Length: {len(RUBBISH)}")
            self.tell_caller(exchange, "\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            return
        if fault.kind == "garbage":
            self.tell_caller(exchange, GARBAGE)
        self.close()

    def tell_caller(self, exchange: Exchange, data: bytes) -> None:
        """Send bytes of an answer."""
        self.caller.sendall(data)
        exchange.answer_bytes += len(data)

    def send_answer(self, exchange: Exchange, pieces: Iterable[Piece]) -> None:
        for data, _ in pieces:
            self.tell_caller(exchange, data)

    # -- either way --

    def befall(
        self, exchange: Exchange, fault: Fault, place: int, stream: Iterator[bytes], tell: Callable[[Exchange, bytes], None]
    ) -> None:
        """Cut, reset, stall or let drip a message; where it ends before `place`, it passes unharmed."""
        if fault.kind == "drip":
            self.happens(exchange)
            self.drip(exchange, fault, stream, tell)
            return
        rest = b""
        for data in stream:
            tell(exchange, data[:place])
            place, rest = place - len(data[:place]), data[place:]
            if rest:
                break
        else:
            return
        self.happens(exchange)
        if fault.kind == "stall":
            self.proxy.pause(fault.seconds)
            if fault.goes_on:
                tell(exchange, rest)
                for data in stream:
                    tell(exchange, data)
                return
        self.close(by_reset=fault.kind == "reset")

    def drip(self, exchange: Exchange, fault: Fault, stream: Iterator[bytes], tell: Callable[[Exchange, bytes], None]) -> None:
        """Send the beginning of a message a few bytes at a time, the rest as it comes."""
        left = int(fault.after) or DRIPPED_BYTES
        pause_s = fault.seconds * DRIP_BYTES / left
        for data in stream:
            for begin in range(0, min(left, len(data)), DRIP_BYTES):
                tell(exchange, data[begin : min(begin + DRIP_BYTES, left)])
                self.proxy.pause(pause_s)
            if left < len(data):
                tell(exchange, data[left:])
            left = max(0, left - len(data))

    def happens(self, exchange: Exchange) -> None:
        """Write down that the fault of an exchange happens now."""
        exchange.happened = True
        self.proxy.note(exchange)

    def close(self, by_reset: bool = False) -> None:
        """Close both sides as the fault has it."""
        self.end(by_reset)
        raise Closed


def with_head(head: bytes, content: Iterable[Piece]) -> Iterator[Piece]:
    """A message, piece by piece."""
    yield head, False
    yield from content


# == The proxy ==


def listen_on(port: int | None) -> socket.socket:
    """A socket that listens on a port of loopback; None takes a free one, below those that the kernel gives out by itself."""
    for _ in range(200):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port or random.randrange(12_000, 32_000)))
            listener.listen(256)
            return listener
        except OSError:
            listener.close()
    raise AssertionError(f"no port is free: {port or 'any'}")


def no_fault(request: str) -> Fault | None:
    """What befalls a request where nothing is scattered."""
    return None


class Proxy:
    """Listens on a port of loopback for a target on another, and keeps a record of what came by."""

    def __init__(self, target_port: int, port: int | None = None) -> None:
        self.target_port = target_port
        self.listener = listen_on(port)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.seen: list[Exchange] = []  # every request that came by
        self.done: list[Done] = []  # every fault that has happened
        self.lock, self.closed = threading.Lock(), False
        self.opened, self.calmed = threading.Event(), threading.Event()
        self.planted: list[Fault] = []
        self.scattered: Callable[[str], Fault | None] = no_fault
        self.lines: set[Line] = set()
        self.threads: set[threading.Thread] = set()

    def start(self) -> Proxy:
        """Take connections from now on."""
        self.opened.set()
        self.in_background(self.accept_all)
        return self

    def close(self) -> None:
        """End all: the port, the connections, what waits."""
        self.closed = True
        self.calm()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RD)
        for line in list(self.lines):
            line.end()
        with self.lock:
            running = list(self.threads)
        for thread in running:
            thread.join(5)
        self.listener.close()

    def __enter__(self) -> Proxy:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- faults --

    def plant(self, fault: Fault) -> Fault:
        """Let a fault befall the next requests that it matches; the one planted first comes first."""
        if fault.kind == "refuse" and not fault.match:
            self.done.append(Done(time.monotonic(), "refuse", ""))
            self.refuse(fault.seconds)
            return fault
        with self.lock:
            fault.left = fault.times
            self.planted.append(fault)
        return fault

    def scatter(self, seed: int, rate: float, kinds: Sequence[str] = tuple(KINDS), match: str = "", longest_s: float = 1.0) -> None:
        """Let random faults befall a share of the requests, in the order in which these come; silences last `longest_s` at most."""
        chance = random.Random(seed)

        def pick(request: str) -> Fault | None:
            if not re.match(match, request) or chance.random() >= rate:
                return None
            return Fault(
                chance.choice(list(kinds)),
                match,
                after=chance.choice([0, chance.random(), int(2 ** chance.uniform(0, 20))]),
                seconds=chance.uniform(0.05, 1) * longest_s,
                where=chance.choice(["answer", "request"]),
                goes_on=chance.random() < 0.5,
                order=chance.choice(["together", "before", "after"]),
                bit=chance.randrange(8),
            )

        self.scattered = pick

    def calm(self) -> None:
        """No more faults: what is planted or scattered is forgotten, the port is open, silences and drips end at once."""
        with self.lock:
            self.planted.clear()
            self.scattered = no_fault
            calmed, self.calmed = self.calmed, threading.Event()
        calmed.set()
        self.open()

    def refuse(self, seconds: float = 0.0) -> None:
        """Close the port, until calm() or for `seconds`; what is connected stays so."""
        with self.lock:
            was_open = self.opened.is_set()
            self.opened.clear()
            if was_open:  # under the lock: who opens it meanwhile would find it closed for good
                self.listener.shutdown(socket.SHUT_RD)  # it stays bound, and wakes who accepts
        if seconds:
            self.in_background(self.open_later, seconds)

    def drop(self) -> None:
        """Reset every connection that is open now."""
        for line in list(self.lines):
            line.end(by_reset=True)

    def open_later(self, seconds: float) -> None:
        self.pause(seconds)
        self.open()

    def open(self) -> None:
        """Let callers connect again."""
        with self.lock:
            if not self.closed and not self.opened.is_set():
                self.listener.listen(256)
                self.opened.set()

    # -- what came by --

    def counts(self) -> collections.Counter[str]:
        """How often each kind of fault has happened."""
        return collections.Counter(done.kind for done in self.done)

    def find(self, match: str) -> list[Exchange]:
        """The requests so far whose `METHOD /path?query` begins with this regular expression."""
        return [exchange for exchange in list(self.seen) if re.match(match, exchange.request)]

    # -- for the lines --

    def seen_request(self, head: bytes) -> Exchange:
        """Write down a request, and choose what befalls it. What is no HTTP has no method, and passes as it is."""
        first = re.match(rb"([!-~]+) ([!-~]+) HTTP/1\.[01]\r\n", head)
        if not first or not head.endswith(b"\r\n\r\n"):
            return Exchange("", "", {})
        exchange = Exchange(first[1].decode("latin-1"), first[2].decode("latin-1"), header_fields(head))
        with self.lock:
            exchange.fault = self.choose(exchange.request)
            self.seen.append(exchange)
        return exchange

    def choose(self, request: str) -> Fault | None:
        """The fault for a request, or None. The lock is held."""
        for fault in self.planted:
            if (fault.left > 0 or not fault.times) and re.match(fault.match, request):
                fault.left -= 1
                return fault
        return self.scattered(request)

    def give_back(self, fault: Fault) -> None:
        """A fault did not happen (the message was too short for it): it may befall the next."""
        with self.lock:
            fault.left += 1

    def note(self, exchange: Exchange) -> None:
        assert exchange.fault is not None
        self.done.append(Done(time.monotonic(), exchange.fault.kind, exchange.request))

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond calm()."""
        self.calmed.wait(seconds)

    def in_background(self, work: Callable[..., None], *arguments: object) -> None:
        """Run something in a thread that close() waits for."""

        def run() -> None:
            try:
                work(*arguments)
            finally:
                with self.lock:
                    self.threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=f"proxy-{work.__name__}", daemon=True)
        with self.lock:
            thread.start()
            self.threads.add(thread)

    def accept_all(self) -> None:
        """Take connections until closed; while the port refuses, wait."""
        while not self.closed:
            self.opened.wait(0.2)
            try:
                caller, _ = self.listener.accept()
            except OSError:
                continue  # it does not listen now
            line = Line(self, caller)
            self.lines.add(line)
            self.in_background(line.run)

    def forget(self, line: Line) -> None:
        self.lines.discard(line)
