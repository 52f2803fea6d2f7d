"""Calls to a client over HTTP: connections that are kept, answers that are read within limits, and calls that a client fetches.

1. Calls
2. Carried calls
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import select
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Callable, NamedTuple, cast
from urllib.parse import unquote_to_bytes, urlsplit

from joborch_base.archives import FilesBody, repr_digest
from joborch_base.connections import FoldedHeaders
from joborch_base.identity import Proof
from joborch_base.routes import CALLER_KEY, Answer, check_size, find_route, identify, proof_of, reason_phrase, refuse_not_utf8
from joborch_base.vocabulary import (
    JSON_TYPE,
    KIB,
    MAC_HEADER,
    MIB,
    OURS_HEADER,
    READ_TIMEOUT_S,
    BadAnswer,
    HttpError,
    NoAnswer,
    __version__,
    one_line,
    parse_json,
)

if TYPE_CHECKING:
    from joborch import Node

# == 1. Calls ==  A client's answers are limited in size and time. A connection serves one call after another.

ANSWER_HEADERS = 100  # at most
ANSWER_HEAD_BYTES = 64 * KIB  # of an answer without its body: headers, those before them as "100 Continue", chunk framing
SLOWEST_BYTES_S = 8 * KIB  # an answer that is slower on average is abandoned
WANTED_LOOK_S = 1.0  # between two checks that a caller still waits for an answer
IDLE_CONNECTIONS = 16  # to one client
CONNECTION_ERRORS = (http.client.HTTPException, OSError, ValueError)  # ValueError: a chunk whose length is not a number


class Bounds(NamedTuple):
    """Limits for one answer: seconds of silence, and a function that returns True when nobody waits for it any more."""

    silent_s: float
    unwanted: Callable[[], bool] | None = None


class Incoming(io.RawIOBase):
    """Reads an answer, but limits the size of its head and the pace of its body, and stops when nobody waits for it.

    With a read time-out alone, a client that sends a byte a minute, or endless headers, could block a thread for ever.
    """

    def __init__(self, raw: io.RawIOBase, connection: socket.socket, bounds: Bounds) -> None:
        self.raw, self.connection, self.bounds = raw, connection, bounds
        self.begun, self.looked_at = time.monotonic(), time.monotonic()
        self.count, self.body_count = 0, 0  # bytes received, in all and of the body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has arrived. Raises OSError if it is too slow or too long, or nobody waits for it."""
        if self.count - self.body_count > ANSWER_HEAD_BYTES + self.body_count // 8:
            raise OSError("its answer has endless headers or frames")
        silent_until, changed = time.monotonic() + self.bounds.silent_s, False
        try:
            while True:
                patience_s = self.patience_s(silent_until)
                if changed or patience_s < 0.99 * self.bounds.silent_s:  # else it has this time-out: setting one is a system call
                    changed = True
                    self.connection.settimeout(patience_s)
                with contextlib.suppress(socket.timeout):
                    count = self.connection.recv_into(buffer)
                    self.count += count
                    return count
        finally:
            if changed:
                self.connection.settimeout(self.bounds.silent_s)  # the next request may use this connection

    def patience_s(self, silent_until: float) -> float:
        """Return how long to wait now, in seconds. Raises OSError if waiting is pointless."""
        now = time.monotonic()
        slow_at = self.begun + 2 * self.bounds.silent_s + self.body_count / SLOWEST_BYTES_S
        if now >= silent_until:
            raise socket.timeout("timed out")
        if now >= slow_at:
            raise socket.timeout("its answer takes too long")
        left_s = min(silent_until, slow_at) - now
        if self.bounds.unwanted is None:
            return left_s
        if now >= self.looked_at + WANTED_LOOK_S:
            self.looked_at = now
            if self.bounds.unwanted():
                raise OSError("no caller waits for its answer any more")
        return min(left_s, WANTED_LOOK_S)

    def close(self) -> None:
        self.raw.close()
        super().close()


class Reply(http.client.HTTPResponse):
    """A client's answer, read within limits and never decompressed. Once its body is read, its connection serves the next call."""

    def __init__(self, sock: socket.socket, method: str | None, connection: Connection) -> None:
        self.connection: Connection | None = connection
        super().__init__(sock, method=method)
        self.incoming = Incoming(self.fp.detach(), sock, connection.bounds)
        self.fp = io.BufferedReader(self.incoming)

    def begin(self) -> None:
        """Read the head of the answer. http.client parses it as an e-mail, which takes longer than all the rest of a call."""
        answer: Any = self  # http.client's own fields
        answer.status = 100
        while answer.status < 200 and answer.status != 101:  # 100 Continue, 103 Early Hints: the answer follows (RFC 9110, 15.2)
            line = self.head_line(is_first=True)
            match = re.fullmatch(r"HTTP/([0-9.]+) +([1-9][0-9]{2})(?: .*)?", line)
            if not match:
                raise http.client.BadStatusLine(line)
            if not match[1].startswith("1."):
                raise http.client.UnknownProtocol(match[1])
            answer.version, answer.status = 10 if match[1] == "1.0" else 11, int(match[2])
            self.headers = cast(Any, FoldedHeaders(self.header_pairs()))
        answer.chunked, answer.chunk_left = self.headers.get("Transfer-Encoding", "").lower() == "chunked", None
        length = self.headers.get("Content-Length", "") if not answer.chunked else ""
        answer.length = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        if answer.status in (204, 304) or answer.status < 200 or answer._method == "HEAD":
            answer.length = 0
        answer.will_close = answer._check_close() or (answer.length is None and not answer.chunked)

    def head_line(self, is_first: bool = False) -> str:
        """Return the next line of the head, empty at its end. Raises HTTPException if it is too long, or if the head is cut off."""
        line = bytes(self.fp.readline(ANSWER_HEAD_BYTES + 1))
        if len(line) > ANSWER_HEAD_BYTES:
            raise http.client.LineTooLong("header line")
        if is_first and not line:
            raise http.client.RemoteDisconnected("closed without an answer")
        if not line.endswith(b"\n"):  # its headers would be only some of those that were sent
            raise http.client.IncompleteRead(line)
        return line.decode("latin-1").rstrip("\r\n")

    def header_pairs(self) -> Iterator[tuple[str, str]]:
        """Yield name and value of each header; of several with one name, the last counts."""
        for _ in range(ANSWER_HEADERS):
            line = self.head_line()
            if not line:
                return
            name, _, value = line.partition(":")
            yield name, value.strip()
        raise http.client.HTTPException(f"more than {ANSWER_HEADERS} headers")

    def piece(self, limit_bytes: int) -> bytes:
        """Return the next piece of the body, empty at its end. Raises NoAnswer if it breaks off.

        Unlike read(), it keeps what arrived of an incomplete body.
        """
        try:
            data = self.read1(limit_bytes)
            if not data and self.length:
                raise http.client.IncompleteRead(b"", self.length)
        except CONNECTION_ERRORS as error:
            self.close()
            raise NoAnswer(f"the transfer broke after {self.incoming.body_count} bytes: {plain_cause(error)}") from error
        self.incoming.body_count += len(data)
        if not data and self.connection is not None:
            connection, self.connection = self.connection, None
            self.close()
            connection.rest()
        return data

    def close(self) -> None:
        """Close the answer. Its connection is closed, too, if the body was not read to the end."""
        connection, self.connection = self.connection, None
        super().close()
        if connection is not None:
            connection.close()


class Connection:
    """A connection to a client. When an answer was read to its end, it waits in `idle` for the next call."""

    def __init__(self, url: str, idle: list[Connection]) -> None:
        self.secure, self.idle, self.bounds = url.startswith("https:"), idle, Bounds(READ_TIMEOUT_S)
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or (443 if self.secure else 80)
        self.authority, self.sock = parts.netloc.rpartition("@")[2], cast("socket.socket | None", None)
        self.is_last = False  # the request asks for the end of the connection

    def open(self, look: Callable[[socket.socket], None], ca_file: str, timeout_s: float) -> socket.socket:
        """Connect within `timeout_s`. `look` is called before the first byte is sent, and raises if the connection must not be used.

        `ca_file` has the certificates to trust, in PEM; without it, those that this machine trusts are used.
        """
        self.sock = self.connect(timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        look(self.sock)
        if self.secure:
            context = ssl.create_default_context(cafile=ca_file or None)
            context.minimum_version = ssl.TLSVersion.TLSv1_2  # Python 3.9 accepts older versions
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        return self.sock

    def connect(self, timeout_s: float) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout_s)

    def send(self, method: str, target: str, headers: Mapping[str, str], body: FilesBody | io.BytesIO | None) -> None:
        """Send a request. Its head and the first piece of its body leave together: then the client wakes once for both."""
        self.is_last = headers.get("Connection") == "close"
        authority = self.authority if self.authority.isascii() else self.authority.encode("idna").decode()
        lines = [f"{method} {target} HTTP/1.1", f"Host: {authority}", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if not all(map(str.isprintable, lines)):
            raise ValueError("a header has a control character")
        data, sock = "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1"), cast("socket.socket", self.sock)
        more = body.read() if body else b""
        sock.sendall(data + more)
        while body and (more := body.read()):
            sock.sendall(more)

    def answer(self, method: str) -> Reply:
        """Return the head of the answer. If that was the last one on this connection, only the answer keeps it open."""
        reply = Reply(cast("socket.socket", self.sock), method, self)
        try:
            reply.begin()
        except BaseException:
            reply.close()
            raise
        if reply.will_close or self.is_last:
            self.close()
        return reply

    def close(self) -> None:
        sock, self.sock = self.sock, None
        if sock is not None:
            sock.close()

    def rest(self) -> None:
        """Keep the connection for the next call, or close it if there are enough."""
        if self.sock is not None and len(self.idle) < IDLE_CONNECTIONS:
            self.idle.append(self)
        else:
            self.close()


class Connections:
    """The connections to one client, kept open between two calls."""

    def __init__(self) -> None:
        self.idle: dict[tuple[str, str], list[Connection]] = {}  # by scheme and host

    def take(self, url: str) -> Connection:
        """Return the most recently used connection that is still open, or else a new one that is not open yet."""
        idle = self.idle.setdefault(urlsplit(url)[:2], [])
        with contextlib.suppress(IndexError):
            while True:
                known, ready = idle.pop(), select.poll()
                ready.register(cast("socket.socket", known.sock), select.POLLIN)
                if not ready.poll(0):
                    return known
                known.close()
        return Connection(url, idle)


def refuse_encoded(answer: Reply) -> Reply:
    """Return `answer`. Raises BadAnswer if its body is compressed: 65 KB could become gigabytes."""
    coding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        answer.close()
        raise BadAnswer(f"answers with Content-Encoding {one_line(coding, 40)!r}: switch off compression in the proxy before it")
    return answer


def read_some(answer: Reply, limit_bytes: int) -> bytes:
    """Return at most the first `limit_bytes` of an answer's body, and release its connection."""
    target = io.BytesIO()
    copy_some(answer, limit_bytes, target)
    return target.getvalue()


def copy_some(answer: Reply, limit_bytes: int, target: IO[bytes]) -> None:
    """Copy at most the first `limit_bytes` of an answer's body to a file, and release its connection."""
    digest, left, piece = hashlib.sha256(), limit_bytes, b"-"
    while piece and left:
        piece = answer.piece(min(64 * KIB, left))
        target.write(piece)
        digest.update(piece)
        left -= len(piece)
    if piece and answer.piece(1):
        answer.close()  # longer than `limit_bytes`
    elif answer.headers.get("Repr-Digest", "") not in ("", repr_digest(digest.hexdigest())):
        raise NoAnswer("the answer broke: it does not match its digest")


def plain_cause(error: Exception) -> str:
    """Return why a connection failed, in plain words."""
    if isinstance(error, http.client.IncompleteRead):
        return "it ended too early"
    if isinstance(error, http.client.RemoteDisconnected):
        return "it hung up without an answer"
    if isinstance(error, http.client.HTTPException):
        return f"the answer is not HTTP ({type(error).__name__})"
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, ssl.SSLError):  # its errno is not a system error
        return f"TLS failed: {(getattr(error, 'reason', None) or 'no reason given').replace('_', ' ').lower()}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    text = one_line(str(error) or type(error).__name__, 120)
    return text[:1].lower() + text[1:]


def whole_in(said: Any, least: int, most: int) -> int | None:
    """Return an integer from a client, or None if it is anything else (such as true) or out of range."""
    return said if type(said) is int and least <= said <= most else None


def number_in(said: Any, least: float, most: float) -> float | None:
    """Return a number from a client, or None if it is anything else or out of range, as NaN and 1e400 are."""
    return said if type(said) in (int, float) and least <= said <= most else None


def text_in(said: Any, pattern: str) -> str | None:
    """Return a text from a client, or None if it is anything else or does not match."""
    return said if isinstance(said, str) and re.fullmatch(pattern, said, re.ASCII) else None


# == 2. Carried calls ==  A client that calls in fetches its calls as frames, and its answers travel in requests of its own.

PIECE_BYTES = 960 * KIB  # of an answer in one request: nginx refuses more than 1 MiB by default
DOWN_BYTES = 4 * MIB  # of a request in one answer
INLINE_BYTES = 64 * KIB  # a larger body travels in pieces of its own
FRAMES_BYTES = 768 * KIB  # frames in one exchange


TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT = 4, 5, 6  # tcp(7)
KEEPALIVE = (  # options by level
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, TCP_KEEPIDLE, 20),
    (socket.IPPROTO_TCP, TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, TCP_KEEPCNT, 4),
)


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel probe a TCP connection while it is silent, so that the end of the network is noticed within a minute."""
    for level, option, value in KEEPALIVE:
        connection.setsockopt(level, option, value)


def key_id(key: bytes) -> str:
    """Return the public name of a key, by which a server finds the token that it belongs to."""
    return hashlib.sha256(b"joborch key " + key).hexdigest()[:32]


def frame(said: Mapping[str, Any], data: bytes = b"") -> bytes:
    """Return one message of a link that a client opened: a line of JSON, and the bytes that belong to it with their digest."""
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} if data else {}
    return json.dumps({**said, **about}).encode() + b"\n" + data


def read_frames(text: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the messages in a body, each with its bytes. Raises ValueError if it is no such body, or was changed on its way."""
    at = 0
    while at < len(text):
        end = text.index(b"\n", at)
        said = parse_json(text[at:end])
        size = said.get("bytes", 0) if isinstance(said, dict) else None
        if type(size) is not int or not 0 <= size <= len(text) - end - 1:
            raise ValueError("the head of a frame is wrong")
        at = end + 1 + size
        data = text[end + 1 : at]
        if size and hashlib.sha256(data).hexdigest() != said.get("sha256"):
            raise ValueError("a frame does not match its digest")
        yield said, data


class Carried(NamedTuple):
    """A request that came without a connection of its own."""

    method: str
    target: str
    headers: Mapping[str, str]
    size: int  # bytes of its body
    body: IO[bytes]
    left: Callable[[], bool]  # whether nobody waits for the answer any more
    address: str = ""  # as on a Unix socket

    def uid(self) -> int | None:
        """Return None: its sender is on another machine, where no user can be looked up."""
        return None


def answer_carried(node: Node, app: Any, asked: Carried) -> Iterator[bytes]:
    """Yield the answer of this process to a request, head first, as HTTP/1.1. The same checks apply as to a request on a connection."""
    cgi = {name.upper().replace("-", "_"): value for name, value in asked.headers.items()}
    path, _, query = asked.target.partition("?")
    path = unquote_to_bytes(path).decode("latin-1")
    said: list[Any] = []
    proof = None
    try:
        proof = proof_of(node, cgi, asked.method, asked.target, asked.size, asked)
        refuse_not_utf8(path)
        found = find_route(node.config.mode, asked.method, path)
        caller = identify(node, found.who, proof, cgi, asked)
        promise = check_size(node, found, asked.size, False)
    except HttpError as refusal:
        body = json.dumps(Answer.of(refusal).body).encode()
        kind = [("Content-Type", JSON_TYPE), ("Content-Length", str(len(body))), (OURS_HEADER, __version__)]
        yield answer_head(proof, refusal.status, [*kind, *refusal.headers.items()]) + body
        return
    environ = {
        "REQUEST_METHOD": asked.method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": query, "SERVER_NAME": "joborch",
        "SERVER_PORT": "0", "SERVER_PROTOCOL": "HTTP/1.1", "CONTENT_LENGTH": str(asked.size), "CONTENT_TYPE": cgi.pop("CONTENT_TYPE", ""),
        "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": asked.body, "wsgi.errors": sys.stderr, "wsgi.multithread": True,
        "wsgi.multiprocess": False, "wsgi.run_once": False, CALLER_KEY: caller, "joborch.promise": promise,
        "waitress.client_disconnected": asked.left, **{f"HTTP_{name}": value for name, value in cgi.items()},
    }  # fmt: skip
    chunks: Any = ()
    try:
        chunks = app(environ, lambda status, headers, _=None: said.extend((int(status.split()[0]), headers)))
        parts = iter(chunks)
        first = next(parts, b"")
        yield answer_head(proof, said[0], said[1]) + first
        yield from parts
    finally:
        if hasattr(chunks, "close"):
            chunks.close()
        promise.close()


def answer_head(proof: Proof | None, status: int, headers: Sequence[tuple[str, str]]) -> bytes:
    """Return the head of an answer, with its proof if the request had one."""
    lines = [f"HTTP/1.1 {status} {reason_phrase(status)}", *(f"{name}: {value}" for name, value in headers), "Connection: close"]
    if proof is not None:
        lines.append(f"{MAC_HEADER}: {proof.of_answer(status, FoldedHeaders(headers))}")
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
