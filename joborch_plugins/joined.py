"""Clients that call in: the server's side. A client asks for calls by long polls, and its answers come in requests of its own.

Everything above `Link` works as with a client that the server calls: the same requests and answers travel, with the same proofs.
Only their direction is turned, so that a client needs no port that others can reach.
"""

from __future__ import annotations

import errno
import functools
import io
import re
import secrets
import socket
import threading
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

from joborch import (
    BAD,
    DONE_AT_ONCE,
    DOWN_BYTES,
    DRAINED_ALL,
    EVENTS_WAIT_S,
    FRAMES_BYTES,
    HELLO_TIMEOUT_S,
    INLINE_BYTES,
    JSON_TYPE,
    OURS_HEADER,
    Answer,
    Bounds,
    Caller,
    ClientProtocol,
    Clock,
    Connection,
    EventsReply,
    FilesBody,
    Gives,
    HttpError,
    JoborchError,
    Link,
    Loop,
    NoAnswer,
    Node,
    NothingSent,
    Parameter,
    Proof,
    ProofReader,
    Reply,
    Request,
    Server,
    Service,
    Session,
    __version__,
    client_address,
    crash_point,
    format_duration,
    frame,
    hear,
    is_whole_token,
    keep_alive,
    key_id,
    log,
    loops_of,
    mask,
    one_line,
    parse_json,
    plural,
    poll_wait_s,
    read_frames,
    route,
    unproven,
)

POLL_S = 50.0  # of a client's long poll, unless it asks for another time; gateways give up after 60 s of silence
LONGEST_POLL_S = 900
MOST_POLLS = 8  # of one client, at once
RESEND_S = 5.0  # frames that were sent this long ago and not acknowledged are sent again
PARKED_BYTES = 128 << 10  # answers in a request that may wait for calls
GAP_S = 15.0  # how long a client may be without a poll before calls to it fail
IDLE_NEWS_S = 600.0  # how long a client without jobs may wait before it tells that nothing has changed
REVOKED = "the token was revoked: give this client a new one, which `joborch token add` makes"
BUFFER_BYTES = 4 << 20  # of one answer, kept until they are read
LATE_S = 10.0  # how much later than requested an answer to /events may come

# == Calls ==  What the server asks of one client, until the client acknowledges it, and the answers as they arrive.


class Call:
    """One call, in place of the socket of a `Reply`: what the client gets of the request, and what has arrived of the answer."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.number, self.lock = calls, 0, threading.Condition()
        self.body: FilesBody | None = None
        self.piece_at, self.piece = 0, b""  # the part of the body that the client has asked for last, and where it begins
        self.arrived, self.received = bytearray(), 0  # what was not read yet; bytes of the answer that have come
        self.ended, self.trouble = False, ""
        self.failure: Exception | None = None  # of reading the body
        self.timeout_s: float | None = None
        self.holders = 1  # the connection, and the file made of it
        self.on_answer: Callable[[], object] = lambda: None

    # -- as a socket --

    def settimeout(self, seconds: float) -> None:
        self.timeout_s = seconds

    def makefile(self, _: str) -> io.BufferedReader:
        """Return a file that keeps the call open; `Incoming` reads by `recv_into`."""
        self.holders += 1
        return io.BufferedReader(CallFile(self))

    def recv_into(self, buffer: Any) -> int:
        """Copy what has arrived; 0 at the end. Raises OSError if nothing comes in time, or the client has left."""
        with self.lock:
            if not self.lock.wait_for(lambda: self.arrived or self.ended or self.trouble, self.timeout_s):
                raise socket.timeout("timed out")
            if not self.arrived and self.trouble:
                raise ConnectionResetError(errno.ECONNRESET, self.trouble)
            count = min(len(buffer), len(self.arrived))
            buffer[:count] = self.arrived[:count]
            del self.arrived[:count]
            return count

    def close(self) -> None:
        """Give the call up, once nobody holds it: the client hears that nobody waits for its answer."""
        self.holders -= 1
        if not self.holders:
            self.calls.drop(self)

    # -- the request --

    def part_of_body(self, at: int) -> bytes:
        """Return the part of the body from a byte on: the next one, or the last one again. Raises HttpError."""
        with self.lock:
            if self.body is None or at not in (self.piece_at, self.piece_at + len(self.piece)):
                raise HttpError(409, f"ask for the parts of a body in order: the next one begins at byte {self.piece_at + len(self.piece)}")
            if at != self.piece_at or not self.piece:
                try:
                    self.piece_at, self.piece = at, self.body.read(DOWN_BYTES)
                except (OSError, JoborchError) as error:
                    self.failure = error
                    raise HttpError(
                        410, "the files of this job have changed while they were sent: drop this call, another one will come"
                    ) from error
                finally:
                    self.lock.notify_all()
            return self.piece

    def wait_until_sent(self, patience_s: float) -> None:
        """Wait until the client has asked for the whole body, or has answered. Raises what reading the body raised, or OSError."""
        with self.lock:
            while self.body is not None and self.piece_at + len(self.piece) < len(self.body):
                before = self.piece_at
                if not self.lock.wait_for(lambda: self.piece_at != before or self.received or self.trouble or self.failure, patience_s):  # noqa: B023 - called at once
                    raise socket.timeout("timed out")
                if self.failure is not None:
                    raise self.failure
                if self.received or self.trouble:
                    return

    # -- the answer --

    def add(self, at: int, data: bytes, said: Mapping[str, Any]) -> bool:
        """Take a part of the answer. Return False if it has to come again later; a repeated one is ignored."""
        with self.lock:
            if len(self.arrived) > BUFFER_BYTES:
                return False
            if at == self.received and not self.ended:
                self.arrived += data
                self.received += len(data)
                self.ended = said.get("end") is True
                self.trouble = one_line(said["broken"]) if isinstance(said.get("broken"), str) else self.trouble
            self.lock.notify_all()
        self.on_answer()
        return True

    def break_off(self, why: str) -> None:
        """Fail the call: no answer will come."""
        with self.lock:
            self.trouble = self.trouble or why
            self.lock.notify_all()
        self.on_answer()


class CallFile(io.RawIOBase):
    """Keeps a call open until it is closed."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.call.close()


class Poll(NamedTuple):
    """A request that waits for a call. No thread belongs to it."""

    connection: Any
    serve: Callable[[], object]
    until: float  # monotonic


@dataclass
class Frame:
    """A message to the client that may not have arrived."""

    number: int
    text: bytes
    sent_at: float = float("-inf")  # monotonic


class Calls:
    """The calls to one client. Several of its requests may wait for one; the last of them gets it, so that the others can rest.

    A frame that was sent is sent again if no later request acknowledges it: after RESEND_S, or at once if the client has lost an answer.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock, self.lock = clock, threading.Lock()
        self.session, self.start, self.former = "", "", deque[str](maxlen=20)
        self.last, self.untaken = 0, deque[Frame]()  # the number of the last frame; frames that may not have arrived
        self.open: dict[int, Call] = {}
        self.polls: list[Poll] = []
        self.rung_at = float("-inf")  # monotonic: when a poll was woken that has not taken its frames yet
        self.seen_at = float("-inf")  # monotonic: the last request of the client, or the end of one that waited
        self.polled_at = float("-inf")  # monotonic: the last request that could wait

    def begin(self, start: str) -> tuple[str, int]:
        """Begin a session with a start of the client. Return its id, and the number of the last frame before it.

        Open calls of the earlier session fail.
        """
        with self.lock:
            self.former.append(self.session)
            self.session, self.start, self.seen_at = secrets.token_hex(16), start, self.clock.monotonic()
            last = self.last
        self.break_off("the client has joined again")
        return self.session, last

    def break_off(self, why: str) -> None:
        """Fail all open calls, and answer the client's polls."""
        with self.lock:
            broken, self.open = list(self.open.values()), {}
            self.untaken.clear()
            polls, self.polls = self.polls, []
        for call in broken:
            call.break_off(why)
        for poll in polls:
            poll.serve()

    def end(self) -> None:
        """End the session: the client has left, or may not call any more."""
        with self.lock:
            self.session, self.seen_at = "", float("-inf")
        self.break_off("the client has stopped")

    def is_here(self) -> bool:
        """Tell whether the client waits for calls, or did so a moment ago."""
        return any(not poll.connection.closed for poll in self.polls) or self.clock.monotonic() - self.seen_at < GAP_S

    def put(self, call: Call, said: Mapping[str, Any], data: bytes) -> None:
        """Hand a call to the client's next poll."""
        with self.lock:
            self.last += 1
            call.number = self.last
            self.open[call.number] = call
            self.untaken.append(Frame(call.number, frame({"number": call.number, **said}, data)))
        self.ring()

    def drop(self, call: Call) -> None:
        """Forget a call, and tell the client if it has not answered in full."""
        with self.lock:
            if self.open.pop(call.number, None) is None or call.ended or call.trouble:
                return
            self.last += 1
            self.untaken.append(Frame(self.last, frame({"number": self.last, "cancel": call.number})))
        self.ring()

    def ring(self) -> None:
        """Answer a poll that waits, the last one first, unless one that was woken has yet to take its frames."""
        with self.lock:
            now, poll = self.clock.monotonic(), None
            while self.polls and poll is None and now - self.rung_at > 1:
                poll = self.polls.pop()
                poll = None if poll.connection.closed else poll
            self.rung_at = now if poll is not None else self.rung_at
        if poll is not None:
            poll.serve()

    def fresh(self, now: float) -> list[Frame]:
        """Return the frames to send now. The caller holds the lock."""
        return [each for each in self.untaken if now - each.sent_at > RESEND_S]

    def acknowledge(self, after: int, lost: bool) -> None:
        """Note which frames the client has; if it has lost an answer, all others are sent again. The caller holds the lock."""
        self.seen_at = self.clock.monotonic()
        while self.untaken and self.untaken[0].number <= after:
            self.untaken.popleft()
        for each in self.untaken if lost else ():
            each.sent_at = float("-inf")

    def park(self, after: int, poll: Poll, lost: bool = False, may_wait: bool = True) -> bool:
        """Keep a poll until there is a call for it. Return False if there is one already, or it must not wait."""
        with self.lock:
            self.acknowledge(after, lost)
            self.polled_at = self.seen_at
            waits = may_wait and not self.fresh(self.seen_at)
            self.polls += [poll] if waits else []
            before = self.polls.pop(0) if len(self.polls) > MOST_POLLS else None
        if before is not None:
            before.serve()
        return waits

    def take(self, after: int, lost: bool = False) -> bytes:
        """Return the frames after this number that are to be sent now, up to FRAMES_BYTES."""
        with self.lock:
            self.acknowledge(after, lost)
            taken, size, due = list[bytes](), 0, self.fresh(self.seen_at)
            for each in due:
                if taken and size + len(each.text) > FRAMES_BYTES:
                    break
                taken.append(each.text)
                size, each.sent_at = size + len(each.text), self.seen_at
            self.rung_at = float("-inf")
        if len(taken) < len(due):
            self.ring()
        return b"".join(taken)

    def look(self) -> None:
        """Answer polls that have waited long enough, and send again what may be lost; forget polls whose connections are gone."""
        now = self.clock.monotonic()
        if not self.polls:
            return
        with self.lock:
            over = [poll for poll in self.polls if now >= poll.until and not poll.connection.closed]
            kept = [poll for poll in self.polls if now < poll.until and not poll.connection.closed]
            if len(kept) < len(self.polls):
                self.seen_at, self.polls = now, kept
            due = bool(self.untaken and self.fresh(now))
        for poll in over:
            poll.serve()
        if due:
            self.ring()


# == Links ==  A link whose connections are calls.


class JoinedConnection(Connection):
    """Stands for a connection, for one call."""

    def __init__(self, link: JoinedLink, url: str) -> None:
        super().__init__(url, [])
        self.link = link

    def open(self, look: Callable[[socket.socket], None], ca_file: str, timeout_s: float) -> Any:
        """Return what takes the place of a socket. Raises NothingSent if the client does not wait for calls."""
        self.link.check_here()
        self.sock: Any = Call(self.link.calls)
        return self.sock

    def send(self, method: str, target: str, headers: Mapping[str, str], body: Any) -> None:
        """Hand a call to the client; a large body goes out in parts that the client asks for."""
        call: Call = self.sock
        size, data = (len(body), b"" if len(body) > INLINE_BYTES else body.read()) if body else (0, b"")
        call.body = body if body and not data else None
        call.settimeout(self.bounds.silent_s)
        self.link.calls.put(call, {"call": {"method": method, "target": target, "headers": dict(headers), "size": size}}, data)
        call.wait_until_sent(self.bounds.silent_s)


class CallConnections(NamedTuple):
    """Takes the place of the connections that a link keeps: each call gets a new one."""

    link: JoinedLink

    def take(self, url: str) -> JoinedConnection:
        return JoinedConnection(self.link, url)


class NewsRequest(NamedTuple):
    """A request to /events that waits at the client."""

    connection: JoinedConnection
    call: Call
    proof: Proof
    confirmed: int
    wait_s: float
    until: float  # monotonic: then it is overdue


class JoinedLink(Link):
    """The link to a client that calls in. Its name is that of the client's token."""

    calls_in = True

    def __init__(self, name: str, server: Server) -> None:
        super().__init__(client_address(f"joined://{name}"), server.data, server.clock)
        self.server, self.calls, self.on_loopback = server, Calls(server.clock), False
        self.connections: Any = CallConnections(self)
        self.protocol = JoinedProtocol(self)
        self.asked: NewsRequest | None = None

    def offer(self, names: Collection[str]) -> None:
        """Note that it serves these services."""
        self.offered = frozenset(names)
        self.services = self.server.services_at(self, self.server.services)

    def serves(self, service: Service) -> bool:
        """Tell whether its token allows it to serve a service."""
        return service.name in self.offered

    def key(self) -> bytes:
        """Return the key that both sides know. Raises NothingSent if the token is no longer valid."""
        token = self.server.token_store.named(self.name)
        if token is None or token.key is None:
            raise NothingSent("is not called: its token was revoked or has expired")
        return bytes.fromhex(token.key)

    def check_here(self) -> None:
        """Raise NothingSent if the client does not call."""
        if not self.calls.is_here():
            raise NothingSent("does not call this server: it has stopped, or its network is down")

    def may_be_22(self) -> bool:
        """Return False: it proves its identity, which a 2.2 client cannot."""
        return False

    def session(self, service: str | None, patience_s: float = HELLO_TIMEOUT_S) -> Session:
        """Return the session whose proofs all calls need. Raises NothingSent if the client must not be called."""
        with self.opening:
            key, known = self.key(), self.sessions.get("")
            try:
                if known is None or known.key != key:  # a new token may have the name of one that was revoked
                    known = self.begin_session(key, (self.greet(patience_s) or {})["nonce"], patience_s)
            except NoAnswer as error:  # /hello changes nothing, so a lost answer is harmless
                raise NothingSent(str(error)) from error
            self.sessions[""] = known
            return known

    def unproven(self, answer: Reply) -> str:
        """Return the message about an answer without a valid proof."""
        return f"did not answer: its answer {answer.status} is without a proof that it has the token of this name"

    def events_of(self, answer: Reply) -> EventsReply:
        """Read an answer to /events. Raises NothingSent also if it poses as another client than the one that its token is bound to."""
        heard, token = super().events_of(answer), self.server.token_store.named(self.name)
        if token is not None and heard.instance != token.instance:
            raise NothingSent("reports another database than that of the client to which its token belongs: start it again")
        return heard

    # -- news: asked for without a thread that waits --

    def is_calm(self) -> bool:
        """Tell whether nothing of the client can be due soon."""
        if self.reports() or self.confirmed_ids or self.outage.failures or self.outbox or self.superseded_attempts or self.relist:
            return False
        quiet = self.clock.monotonic() - self.ended_at > EVENTS_WAIT_S
        return quiet and self.since > 0 and not self.server.store.load(self.name).jobs

    def waits_for_news(self) -> bool:
        """Tell whether a client without jobs has been asked for news, and is there: its answer wakes the loop that gets it."""
        asked = self.asked
        healthy = asked is not None and not (asked.call.received or asked.call.trouble) and self.clock.monotonic() <= asked.until
        return healthy and self.calls.is_here() and self.is_calm()

    def ask_for_news(self, wait_s: float) -> None:
        """Send a request for news; its answer wakes the loop that gets it. Raises NothingSent."""
        done = self.confirmed_ids[:DONE_AT_ONCE]
        url, session = self.events_url(wait_s, done), self.session(None)
        proof, connection = session.proof("GET", self.target_of(url)), self.connections.take(url)
        connection.bounds = Bounds(HELLO_TIMEOUT_S)
        call = connection.open(self.look, "", HELLO_TIMEOUT_S)
        call.on_answer = functools.partial(self.server.wake, f"get:{self.name}")
        self.asked = NewsRequest(connection, call, proof, len(done), wait_s, self.clock.monotonic() + wait_s + LATE_S)
        connection.send("GET", proof.target, {"Authorization": proof.authorization({}, 0), OURS_HEADER: __version__}, None)

    def forget_news(self) -> None:
        """Give up the request for news that waits at the client."""
        asked, self.asked = self.asked, None
        if asked is not None:
            asked.connection.close()

    def has_news(self) -> bool:
        """Tell whether the answer has come. Raises NoAnswer if it should have come by now, or never will."""
        asked = self.asked
        if asked is None:
            return False
        if asked.call.trouble or self.clock.monotonic() > asked.until or not self.calls.is_here():
            self.forget_news()
            raise NoAnswer(f"did not answer: {asked.call.trouble or 'no news came in time'}")
        return bool(asked.call.received)

    def events(self, wait_s: float, done: Sequence[str]) -> EventsReply:
        """Return the news that have come, or ask for them and wait."""
        asked, self.asked = self.asked, None
        if asked is None:
            return super().events(wait_s, done)
        try:
            answer = asked.connection.answer("GET")
        except (OSError, ValueError) as error:
            asked.connection.close()
            raise NoAnswer(f"did not answer: {one_line(str(error))}") from error
        if not asked.proof.is_of_answer(answer.status, answer.headers):
            answer.close()
            raise NoAnswer(self.unproven(answer))
        heard = self.events_of(answer)
        heard.confirmed = asked.confirmed
        return heard


class JoinedProtocol(ClientProtocol):
    """How a server gets the news of a client that calls in."""

    link: JoinedLink

    def get_news(self, server: Server) -> bool:
        """Take the news that have come, or ask for them; tell whether to ask again at once. Raises NothingSent or NoAnswer."""
        link = self.link
        wait_s = IDLE_NEWS_S if link.is_calm() else poll_wait_s(server, link)
        at_once = link.relist or link.since == 0 or link.listed is not None or not link.answers
        if at_once or (link.asked is not None and not link.asked.call.received and link.asked.wait_s > max(wait_s, EVENTS_WAIT_S)):
            link.forget_news()
        if not at_once and link.asked is None:
            link.ask_for_news(wait_s)
            return False
        return hear(server, link) if at_once or link.has_news() else False


# == Enrolment ==  A token is bound to the instance of the client that uses it first.


class KeyReader(ProofReader):
    """Recognises a client that calls in by the key of its token."""

    again = "this server was restarted, or has too many sessions: prove the request again, with the nonce of this answer"
    unknown = "this server knows no such token, or the request was changed on its way: check the token file of this client"

    def __init__(self, joined: Joined) -> None:
        super().__init__(())
        self.joined = joined

    def keys(self, headers: Mapping[str, str]) -> Iterable[bytes]:
        """Return the key that the request names, if a valid token has it."""
        token = self.joined.token_with(headers.get("X_JOBORCH_KEY", ""))
        return [] if token is None else [bytes.fromhex(token.key)]


class Joined:
    """The clients that have called this server. A client has none."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.names: dict[str, str] = {}  # of tokens, by the id of their keys
        if isinstance(node, Server):
            node.proofs = KeyReader(self)

    @property
    def server(self) -> Server:
        assert isinstance(self.node, Server)
        return self.node

    def links(self) -> list[JoinedLink]:
        return [link for link in self.server.links.values() if isinstance(link, JoinedLink)]

    def start(self) -> None:
        """Know the clients that have jobs, and look after all of them."""
        if not isinstance(self.node, Server):
            return
        for token in list(self.node.token_store.by_name.values()):
            if token.key is not None and self.node.store.load(token.name).jobs and token.name not in self.node.links:
                self.node.loops.update(loops_of(self.node, self.add(token.name, self.names_of(token, ()))))
        self.node.loops["joined"] = Loop("joined", self.tick, lambda: self.node.pool, 2.0, wanted=lambda: bool(self.links()))

    def committed(self, moves: Iterable[Any]) -> None:
        """Moves of jobs change nothing here."""

    def token_with(self, identity: str) -> Any:
        """Return the valid token whose key has this id, or None."""
        store = self.node.token_store
        if identity not in self.names:
            self.names = {key_id(bytes.fromhex(token.key)): token.name for token in list(store.by_name.values()) if token.key}
        token = store.named(self.names.get(identity, ""))
        return token if token is not None and token.key and key_id(bytes.fromhex(token.key)) == identity else None

    def caller(self, proof: Proof) -> Caller:
        """Return the client that has proven a request. Raises HttpError 401 if its token was revoked meanwhile."""
        token = self.token_with(key_id(proof.key))
        if token is None:
            raise unproven(REVOKED)
        caller: Caller = token.caller("link")
        return caller

    def names_of(self, token: Any, offered: Sequence[str]) -> set[str]:
        """Return the names of the services that a client with a token may serve, if it offers these (all, if it names none)."""
        allowed = {name for name in token.services.split(",") if name} or set(self.server.services)
        return allowed.intersection(offered) if offered else allowed

    def add(self, name: str, offered: Collection[str]) -> JoinedLink:
        """Add the link to a client, without its loops."""
        link = JoinedLink(name, self.server)
        link.offer(offered)
        link.drained = name in {row["client"] for row in self.node.store.read(DRAINED_ALL)}
        self.server.links = {**self.server.links, name: link}
        return link

    def join(self, caller: Caller, instance: str, start: str, offered: Sequence[str]) -> dict[str, Any]:
        """Begin a session with a client. Return what the answer says. Raises HttpError.

        A client whose token works once gets no session before it has replaced the token.
        """
        token = self.node.token_store.named(caller.name)
        if token is None or token.digest != caller.digest:
            raise unproven(REVOKED)
        names = self.names_of(token, offered)
        if token.instance is None and names & self.server.services.keys():
            self.bind(token.name, instance)
            token = self.node.token_store.named(token.name) or token  # two may have come at once
            if token.once:
                crash_point("cloud.bound")
            crash_point("join.bound")
        if token.instance not in (None, instance):
            log.error("client %s: another client (instance %s) calls with its token; it is refused", token.name, instance)
            remedy = f"give this client a token of its own; or, if its data folder is new on purpose, revoke {token.name} and add it again"
            raise HttpError(403, f"the token {token.name} belongs to the client that used it first: {remedy}")
        if not names & self.server.services.keys():
            why = "allows none of the services that this server has and the client offers"
            raise HttpError(403, f"the token {token.name} {why}", "services")
        session, after = ("", 0) if token.once else self.welcome(token.name, names, start)
        crash_point("join.welcomed")
        served = sorted(names & self.server.services.keys())
        return {"session": session, "after": after, "services": served, "renew": bool(token.once)}

    def bind(self, name: str, instance: str) -> None:
        """Bind a token to a client for good. Raises HttpError 403 for the client of another link, which may be posed as."""
        other = next((link.name for link in self.server.links.values() if link.instance == instance and link.is_heard()), None)
        if other not in (None, name):
            log.error("client %s: a client calls with this token and the database of the client %s; it is refused", name, other)
            raise HttpError(403, f"the client {other} has this database: start this one with an empty DATA_PATH")
        self.node.token_store.bind(name, instance)

    def welcome(self, name: str, offered: Collection[str], start: str) -> tuple[str, int]:
        """Make the link if it is not there, and begin a session; everything that waits for the client is due."""
        with self.server.plugins["reload"].lock:  # it replaces the table of links, too
            known = self.server.links.get(name)
            if known is not None and not isinstance(known, JoinedLink):
                raise HttpError(409, f"a client of the settings is called {name}: give the token another name")
            link = self.add(name, offered) if known is None else known
            link.offer(offered)
            link.leaving = False
            if link.calls.start not in ("", start) and link.calls.is_here():
                link.note("has joined from a second process, or was restarted: if both run, stop one")
            session = link.calls.begin(start)
            if known is None:
                self.run(link)
        log.info("client %s calls in (%s)", name, ", ".join(service.name for service in link.services))
        link.outage.until = float("-inf")
        for kind in ("get", "send", "kill"):
            self.server.wake(f"{kind}:{name}")
        return session

    def run(self, link: JoinedLink) -> None:
        """Start the loops of a client."""
        loops = loops_of(self.server, link)
        self.server.loops = {**self.server.loops, **loops}
        for loop in loops.values():
            loop.start()

    def link_of(self, caller: Caller | None, session: str) -> JoinedLink:
        """Return the link of a client's session. Raises HttpError 401, 409 or 410 if it must call anew, or must not."""
        if not self.node.token_store.is_valid(caller):
            raise unproven(REVOKED)
        link = self.server.links.get(caller.name) if caller is not None else None
        if isinstance(link, JoinedLink) and session and link.calls.session == session:
            return link
        if isinstance(link, JoinedLink) and session in link.calls.former and link.calls.is_here():
            raise HttpError(409, SECOND_PROCESS)
        raise HttpError(410, "this server does not know the session: call POST /join again")

    def remove(self, link: JoinedLink, why: str) -> None:
        """Forget a client without jobs, as one that was removed from the settings."""
        link.forget_news()
        link.offer(())
        link.leaving = True
        log.info("client %s is no longer listed: %s", link.name, why)

    def tick(self) -> bool:
        """Answer polls that have waited long enough, and forget clients that are gone."""
        for link in self.links():
            link.calls.look()
            is_valid = self.node.token_store.named(link.name) is not None
            if not is_valid and link.calls.session:
                link.calls.end()
            if link.leaving or link.calls.is_here():
                continue
            if link.asked is not None:
                self.node.wake(f"get:{link.name}")  # it has left while it was asked for news
            if self.node.store.load(link.name).jobs:
                continue
            silent_s = self.node.clock.monotonic() - max(link.calls.seen_at, self.node.started)
            if not is_valid:
                self.remove(link, "its token is not valid any more")
            elif silent_s > self.server.config.forget_client_s:
                self.remove(link, f"it has not called for {format_duration(silent_s)}")
        return False


# == Routes ==

OCTETS = "application/octet-stream"
EXAMPLE_JOIN = {"session": "5f0c3b9c8f1e4d2a9b7c6d5e4f3a2b1c", "after": 0, "services": ["example"], "renew": False}
SESSION = Parameter(
    "session",
    "query",
    "string",
    "the `session` of POST /join",
    str(EXAMPLE_JOIN["session"]),
    required=True,
    missing="call POST /join first",
)
CALL_ID = Parameter("number", "path", "integer", "the number of a call", 7, required=True, least=1, most=2**62)
AFTER = Parameter("after", "query", "integer", "the number of the last frame that arrived", 0, least=0, most=2**62, default=0)
AT = Parameter("at", "query", "integer", "the first byte", 0, least=0, most=2**62, default=0)
SECOND_PROCESS = "another process has called with this token since: stop one of them"
REFUSED = Gives(
    "the token is bound to another client, or allows no service",
    JSON_TYPE,
    {"message": "the token gpu belongs to the client that used it first"},
)
SECOND = Gives("another process has called with this token since", JSON_TYPE, {"message": SECOND_PROCESS})
CALL_ANEW = Gives("the session is not known", JSON_TYPE, {"message": "this server does not know the session: call POST /join again"})
COMMON = {400: BAD, 403: REFUSED, 409: SECOND, 410: CALL_ANEW}
JOINED = "a session for calls; with `renew` there is none: replace the token by POST /join/token, then join again"
JOIN_GIVES = {200: Gives(JOINED, JSON_TYPE, EXAMPLE_JOIN), 400: BAD, 403: REFUSED, 409: SECOND}


@route("POST", "/join", "server", who="client", gives=JOIN_GIVES)
def join(server: Server, request: Request) -> Answer:
    """Begin a session: a client that calls in offers its services. The body is JSON: instance, start, services."""
    try:
        said = parse_json(request.stream.read(request.length))
        instance, start, offered = said["instance"], said["start"], said.get("services") or []
        if not all(isinstance(each, str) and re.fullmatch(r"[0-9A-Za-z_.-]{1,64}", each) for each in (instance, start, *offered)):
            raise ValueError("a text is missing, or is no name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "send JSON with the names instance, start and, if it serves only some, services"
        raise HttpError(400, f"the body is no offer of a client: {remedy}") from error
    assert request.caller is not None
    return Answer(server.plugins["joined"].join(request.caller, instance, start, offered))


RENEWED = Gives("the new token is valid, the old one is not any more", JSON_TYPE, {"renewed": True})


@route("POST", "/join/token", "server", who="client", gives={200: RENEWED, 400: BAD, 409: SECOND})
def renew_token(server: Server, request: Request) -> Answer:
    """Replace a token that works once. The body is JSON: a random salt, and the new token encrypted with it, in hex."""
    token = server.token_store.named(request.caller.name) if request.caller is not None else None
    if token is None or token.key is None:
        raise unproven(REVOKED)
    try:
        said = parse_json(request.stream.read(request.length))
        text = mask(bytes.fromhex(token.key), bytes.fromhex(said["salt"]), bytes.fromhex(said["token"])).decode("ascii")
        if not is_whole_token(text):
            raise ValueError("no token")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HttpError(400, "the body has no new token: send JSON with salt and token") from error
    if not server.token_store.renew(token.name, text):
        raise HttpError(409, SECOND_PROCESS)
    crash_point("cloud.renewed")
    log.info("client %s has replaced its token, which worked once", token.name)
    return Answer({"renewed": True})


def park_request(node: Node, parsed: Any, connection: Any, serve: Callable[[], object]) -> bool:
    """Take the answers in a request that waits for calls, and keep it without a thread until there is one."""
    query = Request({"QUERY_STRING": parsed.query}).query
    wait_s = next(each.default for each in parsed.route.takes if each.name == "wait")
    after, wait, size = query.get("after", ""), query.get("wait", str(wait_s)), parsed.content_length
    fits = all(text.isdecimal() and len(text) < 19 for text in (after, wait)) and int(wait) <= LONGEST_POLL_S and size <= PARKED_BYTES
    if not fits or int(wait) == 0:
        return False  # the handler says why, or answers at once
    try:
        link = node.plugins["joined"].link_of(parsed.caller, query.get("session", ""))
        body = parsed.get_body_stream()
        parsed.heard = take_in(link.calls, body.read()) if size else {}
        body.seek(0)
    except (HttpError, ValueError):
        return False
    if int(wait) > POLL_S and connection.address:  # a Unix socket has none
        keep_alive(connection.socket)
    poll = Poll(connection, serve, node.clock.monotonic() + int(wait))
    return bool(link.calls.park(int(after), poll, query.get("lost") == "1", not parsed.heard))


def take_in(calls: Calls, text: bytes) -> dict[str, list[int]]:
    """Take answers, or parts of them. Return which ones to send again, and which ones nobody waits for. Raises ValueError."""
    again, gone = [], []
    for said, data in read_frames(text):
        number, at = said.get("number"), said.get("at")
        if type(number) is not int or type(at) is not int:
            raise ValueError("a frame has no number")
        call = calls.open.get(number)
        if call is None:
            gone.append(number)
        elif not call.add(at, data, said):
            again.append(number)
    return {"again": again, "gone": gone} if again or gone else {}


CALLS = {200: Gives("frames: calls, and calls to give up", OCTETS), **COMMON}
WAIT = Parameter(
    "wait", "query", "integer", "how long to wait for calls, in seconds", 50, least=0, most=LONGEST_POLL_S, default=int(POLL_S)
)
LOST = Parameter("lost", "query", "integer", "1: an earlier answer was lost, so send all calls again", 0, least=0, most=1, default=0)


def calls_for(calls: Calls, after: int, lost: bool, heard: Mapping[str, Any]) -> Answer:
    """Return the frames for a client: first what became of its answers, if there is anything to say, then calls."""
    text = (frame(heard) if heard else b"") + calls.take(after, lost)
    return Answer(text, 200, {"Content-Type": OCTETS, "Cache-Control": "no-store"})


@route("GET", "/join/calls", "server", who="client", takes=(SESSION, AFTER, WAIT, LOST), gives=CALLS, parks=park_request)
def next_calls(server: Server, request: Request, session: str, after: int, wait: int, lost: int) -> Answer:
    """Wait for calls of the server by a long poll."""
    has_waited = "joborch.heard" in request.environ
    return calls_for(server.plugins["joined"].link_of(request.caller, session).calls, after, bool(lost) and not has_waited, {})


PART = {200: Gives("a frame with the next part of the body", OCTETS), **COMMON}


@route("GET", "/join/calls/<number>", "server", who="client", slow=True, takes=(CALL_ID, SESSION, AT), gives=PART)
def call_body(server: Server, request: Request, number: int, session: str, at: int) -> Answer:
    """Fetch a part of the body of a call, in order. The last part can be asked for again."""
    call = server.plugins["joined"].link_of(request.caller, session).calls.open.get(number)
    if call is None:
        raise HttpError(410, "nobody waits for the answer to this call any more: drop it")
    return Answer(frame({"at": at}, call.part_of_body(at)), 200, {"Content-Type": OCTETS, "Cache-Control": "no-store"})


TAKEN = (
    "frames: the first one says which calls' parts are to be sent again later (`again`), and which nobody waits for (`gone`); then calls"
)
NO_WAIT = WAIT._replace(default=0)


@route(
    "POST",
    "/join/answers",
    "server",
    who="client",
    takes=(SESSION, AFTER, NO_WAIT, LOST),
    gives={200: Gives(TAKEN, OCTETS), **COMMON},
    parks=park_request,
)
def take_answers(server: Server, request: Request, session: str, after: int, wait: int, lost: int) -> Answer:
    """Send answers, or parts of them, as frames: the number of the call, the first byte, the last part or not. Then wait for calls."""
    calls = server.plugins["joined"].link_of(request.caller, session).calls
    try:
        heard = request.environ.get("joborch.heard")  # if it has waited
        lost, heard = (lost, take_in(calls, request.stream.read(request.length))) if heard is None else (0, heard)
    except ValueError as error:
        remedy = "send frames, each a line of JSON with number, at and bytes, and then its bytes"
        raise HttpError(400, f"the answers cannot be read, because {one_line(str(error))}: {remedy}") from error
    return calls_for(calls, after, bool(lost), heard)


LEFT = {200: Gives("the client is not listed any more, unless it has jobs", JSON_TYPE, {"jobs": 0}), **COMMON}


@route("POST", "/join/leave", "server", who="client", takes=(SESSION,), gives=LEFT)
def leave(server: Server, request: Request, session: str) -> Answer:
    """Say goodbye: the client stops. It is forgotten now if it has no jobs."""
    joined = server.plugins["joined"]
    link = joined.link_of(request.caller, session)
    link.calls.end()
    jobs = server.store.load(link.name).jobs
    if not jobs:
        joined.remove(link, "it has said goodbye")
    else:
        link.failed(NothingSent(f"has stopped; {plural(jobs, 'job is', 'jobs are')} there"))
    return Answer({"jobs": jobs})
