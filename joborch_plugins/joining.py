"""Clients that call in: the client's side. It asks its servers for calls, answers them by its own application, and listens nowhere."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import secrets
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from joborch import (
    CONNECT_TIMEOUT_S,
    CONNECTION_ERRORS,
    COUNT_IN,
    DOWN_BYTES,
    INLINE_BYTES,
    KIB,
    MIB,
    NONCE_HEADER,
    OURS_HEADER,
    PIECE_BYTES,
    READ_TIMEOUT_S,
    Backoff,
    Bounds,
    Carried,
    Client,
    Connection,
    Connections,
    HttpError,
    JoborchError,
    NoAnswer,
    Pool,
    Session,
    Status,
    __version__,
    answer_carried,
    crash_point,
    format_duration,
    frame,
    keep_alive,
    key_id,
    link_key,
    log,
    make_app,
    mask,
    new_token,
    one_line,
    parse_json,
    plain_cause,
    read_frames,
    read_some,
    url_host,
    write_atomic,
)

ANSWER_LIMIT_S = 20.0  # for an answer, beside the time for which the server lets it wait
POLL_S = 50  # of a poll at first; gateways lose patience after a minute of silence
LONGEST_POLL_S = 600  # of a poll, if everything on the way is so patient
NEXT_CALL_S = 5  # how long an answer waits for the next call
MOST_WAITING = 4  # answers that wait for calls at once
REFUSED_PAUSE_S = 60.0  # after a refusal that only a person can fix
FULL_PAUSE_S = 0.05  # before a part is sent again for which the server had no room
CALL_THREADS = 64
ANSWER_BYTES = DOWN_BYTES + MIB  # of a server, at most
PROXY_HEAD_BYTES = 64 * KIB


class UplinkDown(JoborchError):
    """A server could not be called, or answered nothing that can be used. The call may be repeated."""


class ServerRefuses(JoborchError):
    """A server answers, but refuses this client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# == Exchanges ==  Requests to a server, each with the proof that this client has the token, which itself never travels.


class ServerAnswer(NamedTuple):
    """An answer of a server."""

    status: int
    headers: Any
    body: bytes

    @property
    def message(self) -> str:
        """What the server says of a refusal."""
        with contextlib.suppress(ValueError, AttributeError):
            return one_line(str(parse_json(self.body).get("message") or f"it answered {self.status}"))
        return f"it answered {self.status}"


def proxy_of(parts: Any) -> Any:
    """Return the URL of the proxy for https calls (HTTPS_PROXY, NO_PROXY), split; or None. Raises OSError for one of another kind."""
    found = urllib.request.getproxies().get("https") if parts.scheme == "https" else None
    if not found or any(urllib.request.proxy_bypass(name) for name in (parts.hostname or "", parts.netloc)):
        return None
    proxy = urlsplit(found if "://" in found else f"http://{found}")
    if proxy.scheme != "http":
        raise OSError(f"the proxy in HTTPS_PROXY is of the kind {proxy.scheme}: give one that is called by http://")
    return proxy


class ServerConnection(Connection):
    """A connection to a server, which may lead through a proxy that is asked by CONNECT."""

    def connect(self, timeout_s: float) -> socket.socket:
        """Connect to the server, or to the proxy. Raises OSError."""
        proxy = proxy_of(urlsplit(f"{'https' if self.secure else 'http'}://{self.authority}"))
        near = (proxy.hostname or "", proxy.port or 80) if proxy else (self.host, self.port)
        made = socket.create_connection(near, timeout_s)
        try:
            keep_alive(made)
            if proxy:
                self.ask_proxy(made, proxy)
        except BaseException:
            made.close()
            raise
        return made

    def ask_proxy(self, made: socket.socket, proxy: Any) -> None:
        """Let a proxy connect to the server (RFC 9110, 9.3.6). Raises OSError if it refuses."""
        target = f"{url_host(self.host)}:{self.port}"
        secret = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        lines += ["Proxy-Authorization: Basic " + base64.b64encode(secret).decode()] if proxy.username else []
        made.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1"))
        head = b""
        while not head.endswith(b"\r\n\r\n"):  # byte by byte, because what follows belongs to TLS
            byte = made.recv(1)
            head += byte
            if not byte or len(head) > PROXY_HEAD_BYTES:
                raise OSError(f"the proxy {proxy.hostname} gave no answer")
        status = head.split(b" ")[1:2]
        if status != [b"200"]:
            said = one_line(head.partition(b"\r\n")[0].decode("latin-1"), 80)
            raise OSError(f"the proxy {proxy.hostname} refused the connection: it answered {said}")


class ServerConnections(Connections):
    """The connections to one server, kept open between two requests."""

    def take(self, url: str) -> Connection:
        """Return a kept connection, or a new one that is not open yet."""
        found = super().take(url)
        return found if found.sock is not None else ServerConnection(url, found.idle)


class Exchanges:
    """Makes requests to one server, on connections that it keeps."""

    def __init__(self, url: str, token: str, ca_file: str) -> None:
        self.url, self.prefix, self.ca_file = url.rstrip("/"), urlsplit(url).path.rstrip("/"), ca_file
        self.connections = ServerConnections()
        self.heard_at = time.monotonic()  # the last answer of the server, or the start
        self.use(token)

    def use(self, token: str) -> None:
        """Prove from now on that this client has a token."""
        self.token, self.key = token, link_key(token)
        self.session = Session(self.key, "0" * 32)  # the server's answer to the first request has its nonce

    def ask(self, method: str, target: str, body: bytes = b"", limit_s: float = READ_TIMEOUT_S, again: str = "") -> ServerAnswer:
        """Make one request, and check that the answer is from a server that knows the token. Raises UplinkDown.

        A kept connection may have been closed meanwhile; then the request is repeated, with `again` added to its target.
        """
        while True:
            session = self.session
            proof = session.proof(method, target)
            headers = {OURS_HEADER: __version__, "X-Joborch-Key": key_id(self.key), "Content-Type": "application/octet-stream"}
            headers["Authorization"] = proof.authorization(headers, len(body))
            headers["Content-Length"] = str(len(body))
            connection = self.connections.take(self.url)
            is_kept = connection.sock is not None
            try:
                heard = self.exchange(connection, method, self.prefix + target, headers, body, limit_s)
            except (*CONNECTION_ERRORS, NoAnswer) as error:
                connection.close()
                if is_kept and not isinstance(error, socket.timeout):
                    target, again = target + again, ""
                    continue
                cause = str(error) if isinstance(error, NoAnswer) else plain_cause(error)
                raise UplinkDown(f"it cannot be reached: {cause}") from error
            nonce = heard.headers.get(NONCE_HEADER, "")
            if heard.status == 401 and nonce not in ("", session.client):
                self.session = Session(self.key, nonce)
                continue
            if proof.is_of_answer(heard.status, heard.headers):
                self.heard_at = time.monotonic()
                return heard
            who = heard.message if heard.status in (401, 403) and OURS_HEADER in heard.headers else f"it answered {heard.status}"
            raise UplinkDown(f"{who}, without a proof that it knows the token")

    def exchange(
        self, connection: Connection, method: str, path: str, headers: Mapping[str, str], body: bytes, limit_s: float
    ) -> ServerAnswer:
        """Send a request on a connection, and read its answer. Raises NoAnswer, or one of CONNECTION_ERRORS."""
        connection.bounds = Bounds(limit_s)
        sock = connection.sock or connection.open(lambda _: None, self.ca_file, CONNECT_TIMEOUT_S)
        sock.settimeout(limit_s)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it hung up
            connection.send(method, path, headers, io.BytesIO(body) if body else None)
        answer = connection.answer(method)
        return ServerAnswer(answer.status, answer.headers, read_some(answer, ANSWER_BYTES))


# == Calls ==  What a server asks of this client.


class Call:
    """One call of a server, until it is answered."""

    def __init__(self, uplink: Uplink, session: str, number: int, said: Mapping[str, Any], data: bytes) -> None:
        self.uplink, self.number, self.data, self.session = uplink, number, data, session
        self.method, self.target, self.size = str(said["method"]), str(said["target"]), int(said["size"])
        self.headers = {str(name): str(text) for name, text in dict(said["headers"]).items()}
        self.is_over = False  # nobody waits for the answer

    def left(self) -> bool:
        """Tell whether nobody waits for the answer any more."""
        return self.is_over or self.uplink.session != self.session or self.uplink.stopping.is_set()

    def run(self) -> None:
        """Answer the call, and go on with the next one that comes with the answer to it."""
        call: Call | None = self
        while call is not None:
            call = call.answer()

    def answer(self) -> Call | None:
        """Answer the call. Return the next one to answer, if the server had one."""
        body: Any = io.BytesIO(self.data) if len(self.data) == self.size else io.BufferedReader(Body(self), 1 << 18)
        asked = Carried(self.method, self.target, self.headers, self.size, body, self.left)
        at, data = 0, bytearray()
        answer: Any = answer_carried(self.uplink.client, self.uplink.app, asked)
        try:
            for part in answer:
                data += part
                while len(data) >= PIECE_BYTES and not self.left():
                    self.uplink.send(self, frame({"number": self.number, "at": at, "end": False}, bytes(data[:PIECE_BYTES])), False)
                    at += PIECE_BYTES
                    del data[:PIECE_BYTES]
                if self.left():
                    return None
            answer.close()
            last = frame({"number": self.number, "at": at, "end": True}, bytes(data))
        except Exception as error:  # noqa: BLE001 - whatever it is, the server must not wait for the rest
            log.debug("call %d: %s", self.number, error)
            last = frame({"number": self.number, "at": at, "broken": "the client could not continue"})
        finally:
            answer.close()
        try:
            return self.uplink.send(self, last, True)
        finally:
            self.uplink.calls.pop(self.number, None)


class Body(io.RawIOBase):
    """The body of a call that is too large to come along: fetched part by part."""

    def __init__(self, call: Call) -> None:
        self.call, self.at, self.rest = call, 0, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Copy the next bytes; 0 at the end. Raises HttpError if nobody waits for the answer any more: that is no fault to log."""
        if not self.rest and self.at < self.call.size:
            self.rest = memoryview(self.call.uplink.fetch_part(self.call, self.at))
            self.at += len(self.rest)
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


class Uplink:
    """The way to one server. A thread polls for calls; those that answer calls wait for the next one with the same request.

    While there is work, an exchange brings an answer there and the next call back. One poll always waits, so that no call does.
    """

    def __init__(self, client: Client, app: Any, url: str, token: str) -> None:
        self.client, self.app, self.url, self.stopping = client, app, url, client.stopping
        self.exchanges = Exchanges(url, token, client.config.ca_file)
        self.is_leaving = threading.Event()
        self.session, self.after = "", 0  # as the server calls it; the number of the last frame up to which all have come
        self.early: set[int] = set()  # numbers of frames that came before some with lower numbers
        self.calls: dict[int, Call] = {}
        self.pool = Pool("call", CALL_THREADS)
        self.lock, self.waiting, self.lost = threading.Lock(), 0, False  # answers that wait for calls; whether an answer was lost
        self.poll_s = self.proven_poll_s = POLL_S  # how long to poll, and how long everything on the way is patient for sure
        self.longest_poll_s = LONGEST_POLL_S
        if client.config.orphan_after_s:  # it notices the silence of a server only after a poll
            self.longest_poll_s = max(1, min(LONGEST_POLL_S, int(client.config.orphan_after_s / 4)))
            self.poll_s = self.proven_poll_s = min(POLL_S, self.longest_poll_s)
        self.trouble = Backoff(client.clock)
        file = client.config.token_file
        self.renewal = Path(f"{file}.{key_id(self.exchanges.key)}") if file else None  # where a new token is until the server has taken it
        self.candidates: list[str] = []  # the old token and a new one: it is not known which of them the server takes
        if self.renewal is not None and self.renewal.exists():
            self.candidates = [token, *(each for each in self.renewal.read_text(encoding="ascii").split(",") if each not in client.tokens)]

    def run(self) -> None:
        """Ask the server for calls until this client stops."""
        while not self.is_leaving.is_set():
            try:
                if not self.session:
                    self.join()
                self.poll()
                if self.trouble.failures:
                    log.info("server %s: answers again", self.url)
                    self.trouble.worked()
            except (UplinkDown, ServerRefuses, OSError, ValueError, KeyError, TypeError) as error:
                self.candidates.reverse()
                if self.candidates:
                    self.use(self.candidates[0])
                self.failed(error)

    def failed(self, error: Exception) -> None:
        """Pause after a failure: longer each time, and a minute if only a person can fix it."""
        text = one_line(str(error))
        if isinstance(error, ServerRefuses) and error.status == 410:
            self.session = ""  # it has restarted
            return
        pause_s = None
        if isinstance(error, ServerRefuses):
            self.session, pause_s = "", REFUSED_PAUSE_S
        if self.trouble.failed(text, pause_s):
            again = f"; it is called again in {format_duration(pause_s)}" if pause_s else ""
            log.warning("server %s: %s%s", self.url, text, again)
        self.is_leaving.wait(max(0.0, self.trouble.until - self.client.clock.monotonic()))

    def join(self) -> None:
        """Begin a session."""
        crash_point("join.begun")
        offer = {"instance": self.client.instance, "start": self.client.start_id, "services": list(self.client.config.join_services)}
        said = parse_json(self.ask("POST", "/join", json.dumps(offer).encode()))
        if said.get("renew") is True:
            self.renew()
            said = parse_json(self.ask("POST", "/join", json.dumps(offer).encode()))
        if self.candidates:
            self.keep()
        crash_point("join.answered")
        with self.lock:
            self.after, self.early, self.session = int(said["after"]), set(), str(said["session"])
        log.info("joined server %s: this client serves %s", self.url, ", ".join(map(str, said["services"])))

    def renew(self) -> None:
        """Replace a token that works once by a new one. If the answer is lost, both are tried in turn."""
        old, salt = self.exchanges.token, secrets.token_bytes(16)
        new = next((token for token in self.candidates if token != old), None) or new_token()  # the server may still get an earlier request
        self.candidates = [new, old]
        if self.renewal is not None:
            tokens = (new if token == old else token for token in self.client.tokens)
            write_atomic(self.renewal, ",".join(tokens).encode(), 0o600)  # first: if this client dies now, its next start must know both
        hidden = {"salt": salt.hex(), "token": mask(self.exchanges.key, salt, new.encode()).hex()}
        self.ask("POST", "/join/token", json.dumps(hidden).encode())
        crash_point("join.renewed")
        self.use(new)

    def use(self, token: str) -> None:
        """Prove that this client has this token, and expect that its server has it."""
        if token != self.exchanges.token:
            self.client.tokens = tuple(token if each == self.exchanges.token else each for each in self.client.tokens)
            self.client.proofs.tokens = self.client.tokens
            self.exchanges.use(token)

    def keep(self) -> None:
        """Store the token that the server has accepted, for the next start."""
        self.candidates = []
        if self.renewal is not None:
            write_atomic(self.renewal, ",".join(self.client.tokens).encode(), 0o600)
            self.renewal.replace(self.client.config.token_file)

    def ask(self, method: str, target: str, body: bytes = b"", limit_s: float = READ_TIMEOUT_S, again: str = "") -> bytes:
        """Return the body of an answer. Raises UplinkDown, or ServerRefuses."""
        heard = self.exchanges.ask(method, target, body, limit_s, again)
        if heard.status in (500, 503):
            raise UplinkDown(heard.message)
        if heard.status != 200:
            raise ServerRefuses(heard.status, heard.message)
        return heard.body

    # -- calls --

    def poll(self) -> None:
        """Wait for calls, and begin to answer them.

        Gateways lose patience with silence, most after a minute. A poll that has waited long enough is followed by a longer one.
        If that one is cut off, nothing is wrong: the way is not so patient.
        """
        begun, wait_s = time.monotonic(), self.poll_s
        try:
            calls = self.take(self.session, self.exchange("GET", "/join/calls", self.session, wait_s))
            crash_point("join.called")
        except UplinkDown:
            if wait_s <= self.proven_poll_s or time.monotonic() - begun < self.proven_poll_s - 1:
                raise
            log.debug("server %s: a poll of %d s was cut off; from now on it takes %d s", self.url, wait_s, self.proven_poll_s)
            self.poll_s, self.longest_poll_s = self.proven_poll_s, self.proven_poll_s
            return
        if time.monotonic() - begun >= wait_s - 1:
            self.proven_poll_s = wait_s
            self.poll_s = min(2 * wait_s, self.longest_poll_s)
        for call in calls:
            self.pool.add(call.run)

    def exchange(self, method: str, path: str, session: str, wait_s: int, body: bytes = b"") -> bytes:
        """Make a request that brings calls. If it fails, the next one says that calls may be lost. Raises UplinkDown or ServerRefuses."""
        with self.lock:
            lost, self.lost = self.lost, False
        target = f"{path}?session={session}&after={self.after}&wait={wait_s}"
        try:
            return self.ask(method, target + "&lost=1" * lost, body, wait_s + ANSWER_LIMIT_S, "" if lost else "&lost=1")
        except UplinkDown:
            self.lost = True
            raise

    def take(self, session: str, text: bytes) -> list[Call]:
        """Take the frames of an answer. Return the calls that came for the first time. Raises ValueError if they cannot be read."""
        calls = []
        try:
            frames = list(read_frames(text))
        except ValueError:
            self.lost = True
            raise
        for said, data in frames:
            if "again" in said or not self.is_new(session, int(said["number"])):
                continue
            if "cancel" in said:
                given_up = self.calls.get(int(said["cancel"]))
                if given_up is not None:
                    given_up.is_over = True
                    self.client.store.core.wake_all()
                continue
            call = self.calls[int(said["number"])] = Call(self, session, int(said["number"]), said["call"], data)
            calls.append(call)
        return calls

    def is_new(self, session: str, number: int) -> bool:
        """Note that a frame has come. Return False if it came before, or belongs to an earlier session."""
        with self.lock:
            if session != self.session or number <= self.after or number in self.early:
                return False
            self.early.add(number)
            while self.after + 1 in self.early:
                self.after += 1
                self.early.discard(self.after)
            return True

    def fetch_part(self, call: Call, at: int) -> bytes:
        """Return the next part of the body of a call; broken connections are tried again. Raises HttpError if the call is given up."""
        for pause_s in pauses():
            if call.left():
                break
            try:
                ((_, data),) = read_frames(self.ask("GET", f"/join/calls/{call.number}?session={call.session}&at={at}"))
                return data
            except ServerRefuses as error:
                raise HttpError(408, f"the server does not send the rest: {error}") from error
            except (UplinkDown, ValueError):
                self.stopping.wait(pause_s)
        raise HttpError(408, "nobody waits for the answer any more")

    # -- answers --

    def send(self, call: Call, text: bytes, is_last: bool) -> Call | None:
        """Send a part of an answer, repeatedly until the server has it or nobody waits for it. Return a call to go on with after the last.

        With a small last part, wait a moment for the next call, unless enough others do.
        """
        with self.lock:
            waits = is_last and len(text) <= INLINE_BYTES + KIB and self.waiting < MOST_WAITING
            self.waiting += waits
        try:
            following = self.send_until_taken(call, text, NEXT_CALL_S if waits else 0)
            if following is None or is_last:
                return following
            self.pool.add(following.run)  # this thread has more of its answer to send
            return None
        finally:
            with self.lock:
                self.waiting -= waits

    def send_until_taken(self, call: Call, text: bytes, wait_s: int) -> Call | None:
        for pause_s in pauses():
            if call.left():
                return None
            try:
                heard = self.exchange("POST", "/join/answers", call.session, wait_s, text)
                calls = self.take(call.session, heard)
                is_taken = not is_to_send_again(heard, call)
                own = calls.pop(0) if calls and is_taken else None
                for other in calls:
                    self.pool.add(other.run)
                if is_taken:
                    return own
                self.stopping.wait(FULL_PAUSE_S)
            except ServerRefuses as error:
                log.debug("server %s: an answer was refused: %s", self.url, error)
                return None
            except (UplinkDown, ValueError, KeyError, TypeError) as error:
                log.debug("server %s: an answer is sent again: %s", self.url, error)
                self.stopping.wait(pause_s)
        return None

    def leave(self) -> None:
        """Stop calling the server, and tell it so if it answers at once."""
        self.is_leaving.set()
        if self.session:
            with contextlib.suppress(UplinkDown, ServerRefuses):
                self.exchanges.ask("POST", f"/join/leave?session={self.session}", b"", 2.0)


def is_to_send_again(heard: bytes, call: Call) -> bool:
    """Tell whether the server had no room for the part of an answer; note if nobody waits for it."""
    said = next(read_frames(heard), ({}, b""))[0]
    call.is_over = call.is_over or call.number in said.get("gone", ())
    return call.number in said.get("again", ())


def pauses() -> Iterator[float]:
    """Yield how long to wait before each repetition: not at all, then longer and longer, up to 5 s."""
    yield 0.0
    pause_s = 0.1
    while True:
        yield pause_s
        pause_s = min(5.0, 2 * pause_s)


class Joining:
    """Takes the place of the HTTP server of a client that listens nowhere."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._map: dict[int, Any] = {}  # as waitress's table of open sockets
        self.socket_file = None
        app, tokens = make_app(client), client.tokens
        client.say_goodbye = self.leave
        urls = enumerate(client.config.join.split(","))
        self.uplinks = [Uplink(client, app, url, tokens[min(number, len(tokens) - 1)]) for number, url in urls]

    def run(self) -> None:
        """Call all servers until the client stops."""
        threads = [threading.Thread(target=uplink.run, name=f"join-{number}", daemon=True) for number, uplink in enumerate(self.uplinks, 1)]
        for thread in threads:
            thread.start()
        if self.client.config.orphan_after_s:
            threading.Thread(target=self.watch, args=(self.client.config.orphan_after_s,), name="orphan", daemon=True).start()
        for thread in threads:
            thread.join()

    def watch(self, after_s: float) -> None:
        """Stop the client once no server has answered for `after_s` and no payload runs: it may be an instance that costs money."""
        while not self.client.stopping.wait(min(after_s / 4, 60.0)):
            silent_s = time.monotonic() - max(uplink.exchanges.heard_at for uplink in self.uplinks)
            live = sum(self.client.store.number(COUNT_IN, status=status.value) for status in (Status.PREPARED, Status.RUNNING))
            if silent_s > after_s and not live:
                log.warning("no server has answered for %s: this client stops (JOBORCH_ORPHAN_AFTER)", format_duration(silent_s))
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def leave(self) -> None:
        """Say goodbye to all servers."""
        threads = [threading.Thread(target=uplink.leave, daemon=True) for uplink in self.uplinks]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 3
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
