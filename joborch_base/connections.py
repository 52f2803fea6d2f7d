"""The HTTP server under the routes: its connections, and the threads that serve them.

1. Places
2. Connections
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import resource
import select
import socket
import struct
import sys
import termios
import threading
import time
import types
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl

from joborch_base.archives import repr_digest
from joborch_base.identity import is_half_closed, open_listeners, open_socket_file, peer_uid, socket_path
from joborch_base.routes import CALLER_KEY, CHUNKED_BYTES, VALID_KEY, Answer, CutOff, Judge, Route, reason_phrase
from joborch_base.settings import Config
from joborch_base.threads import Pool, stop_pools
from joborch_base.vocabulary import (
    BACKLOG,
    COME_AGAIN_S,
    EVENTS_PLACES,
    JSON_TYPE,
    KIB,
    LISTENER_PLACES,
    MAC_HEADER,
    MIB,
    OURS_HEADER,
    WAITER_PLACES,
    WORKER_THREADS,
    ConfigError,
    HttpError,
    __version__,
    log,
    one_line,
)

if TYPE_CHECKING:
    from joborch import Node

# == 1. Places ==  The number of connections is limited, and nobody takes the places of others.

FRESH_S = 1.0  # a connection this new is not closed: its request may have arrived, unread
UNPROVEN_BYTES = 32 * MIB  # limit of the memory for all unproven connections together


class House:
    """Limits the connections of one process. If the limit is reached, the connection that has been idle longest is closed.

    Connections without a complete request for a second are closed first, then those that called only open routes, then new
    ones, then idle callers. A peer with more than half of the connections loses one before others do. A connection with a
    request under way is never closed.
    """

    def __init__(self, places: int) -> None:
        self.places, self.lock = places, threading.RLock()
        self.peers: dict[Any, str] = {}  # by connection
        self.counts: Counter[str] = Counter()
        self.idle: tuple[dict[Any, None], ...] = ({}, {}, {})  # by rank, the longest idle one first
        self.held: dict[Any, int] = {}  # bytes in memory, by unproven connection
        self.held_bytes = 0
        self.evicted = self.turned_away = 0
        self.told_at = float("-inf")

    def enter(self, connection: Any, address: Any) -> None:
        with self.lock:
            self.peers[connection] = peer = peer_of(address)
            self.counts[peer] += 1
            self.idle[0][connection] = None

    def leave(self, connection: Any) -> None:
        with self.lock:
            self.hold(connection, 0)
            for rank in self.idle:
                rank.pop(connection, None)
            peer = self.peers.pop(connection, None)
            if peer is not None:
                self.counts[peer] -= 1
                if not self.counts[peer]:
                    del self.counts[peer]

    def busy(self, connection: Any) -> None:
        with self.lock:
            for rank in self.idle:
                rank.pop(connection, None)

    def rest(self, connection: Any) -> None:
        with self.lock:
            if connection in self.peers:
                self.busy(connection)
                self.idle[2 if connection.proven else 1][connection] = None

    def hold(self, connection: Any, size: int) -> None:
        with self.lock:
            self.held_bytes += size - self.held.pop(connection, 0)
            if size:
                self.held[connection] = size

    def shrink(self) -> None:
        """Close unproven connections that use memory, while they exceed the limit together."""
        with self.lock:
            holders = list(self.held) if self.held_bytes > UNPROVEN_BYTES else []
        for connection in holders:
            if self.held_bytes > UNPROVEN_BYTES and not connection.requests:
                self.evicted += 1
                connection.handle_close()

    def is_full(self) -> bool:
        return len(self.peers) >= self.places

    def victim(self) -> Any:
        """Return the connection to close next, or None if all have a request under way."""
        with self.lock:
            heaviest = max(self.counts, key=self.counts.__getitem__, default="")
            owners = [{heaviest}] if self.counts[heaviest] > self.places // 2 else []
            before = time.monotonic() - FRESH_S
            for ranks, until in ((self.idle[:1], before), (self.idle[1:2], math.inf), (self.idle[:1], math.inf), (self.idle[2:], math.inf)):
                for chosen in (*owners, self.counts.keys()):
                    for rank in ranks:
                        for connection in rank:
                            if connection.since > until:
                                break
                            if self.peers[connection] in chosen and not connection.is_under_way():
                                return connection
        return None

    def make_room(self) -> bool:
        """Close a connection for a new one. Return False if none can be closed."""
        victim = self.victim()
        if victim is None:
            self.turned_away += 1
            return False
        self.evicted += 1
        victim.handle_close()
        return True

    def tell(self, now: float) -> None:
        """Log, at most once a minute, that the limit was reached."""
        if (self.evicted or self.turned_away) and now - self.told_at >= 60:
            log.warning(
                "connections: no place was free of %d (%d files may be open): %d idle ones were closed, new ones had to wait %d times",
                self.places,
                resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                self.evicted,
                self.turned_away,
            )
            self.evicted, self.turned_away, self.told_at = 0, 0, now


def peer_of(address: Any) -> str:
    """Return the peer that a connection counts for: an IPv4 address, or the 64-bit network of an IPv6 address."""
    host = str(address[0])
    try:
        return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex() if ":" in host else host
    except OSError:
        return host


# == 2. Connections ==  Every caller gets an answer or is dropped. No caller can keep the others out.


class Watch:
    """Waits for the sockets of a process with epoll(7). It replaces waitress's loop, which asks every socket at each turn.

    This one asks the sockets that had an event or that a worker serves, and once more within a second. That is all that can change;
    as a precaution it asks all of them now and then, but not often, because hundreds may wait for a call.
    """

    SWEEP_S = 15.0

    def __init__(self) -> None:
        self.epoll, self.known = select.epoll(), cast("dict[int, tuple[Any, int]]", {})  # by descriptor: its connection, and the events
        self.touched = deque[Any]()  # by other threads
        self.again, self.recent = set[Any](), set[Any]()  # recent: asked since the last look
        self.next_look = self.next_sweep = 0.0  # monotonic
        self.worker = threading.local()  # its `connection` is the one that this thread serves now

    def loop(self, timeout: float, map: dict[int, Any], use_poll: bool) -> None:  # noqa: A002 - waitress's names
        """Serve all sockets of `map` until it is empty."""
        while map:
            try:
                self.turn(map, timeout)
            except Exception:
                log.exception("an error in the loop of connections")
                time.sleep(0.2)  # so that an error that repeats does not fill the log

    def turn(self, sockets: dict[int, Any], timeout_s: float) -> None:
        from waitress import wasyncore

        due, now = self.again, time.monotonic()
        while self.touched:
            due.add(self.touched.popleft())
        self.recent |= due
        if now >= self.next_look:
            due, self.recent, self.next_look = due | self.recent, set(), now + 1
        if now >= self.next_sweep:
            self.next_sweep = now + self.SWEEP_S
            due.update(list(sockets.values()))
            self.known = {descriptor: of for descriptor, of in self.known.items() if of[0]._fileno == descriptor}
        for each in due:
            self.register(each)
        self.again = {each for each in due if each._fileno is not None and getattr(each, "serving", True)}
        for descriptor, flags in self.epoll.poll(timeout_s):
            found = sockets.get(descriptor)
            if found is None:  # another event has closed it
                continue
            self.again.add(found)
            if self.known.get(descriptor, (None, 0))[0] is found:  # else a worker has closed that one, and its number is taken again
                wasyncore.readwrite(found, true_flags(descriptor, flags))

    def register(self, each: Any) -> None:
        """Register with the kernel the events that a connection or listener waits for now."""
        descriptor = each._fileno
        while descriptor is not None:
            flags = events_for(each)
            if each._fileno is None or self.known.get(descriptor, (each, 0)) == (each, flags):
                return  # looked at again after a change: a worker that was done just before it wakes nobody
            with contextlib.suppress(FileNotFoundError):  # it was closed, so the kernel has removed it
                if descriptor in self.known:
                    self.epoll.unregister(descriptor)
            self.known.pop(descriptor, None)
            if flags:
                self.epoll.register(descriptor, flags)
                self.known[descriptor] = (each, flags)

    def is_outdated(self, each: Any) -> bool:
        """Tell whether a connection waits for other events than those that are registered."""
        return bool(self.known.get(each._fileno, (each, 0)) != (each, events_for(each)))


def events_for(each: Any) -> int:
    """Return the events that a connection or listener waits for now."""
    flags = select.EPOLLIN | select.EPOLLPRI if each.readable() else 0
    return flags | (select.EPOLLOUT if each.writable() and not each.accepting else 0)


def true_flags(descriptor: int, flags: int) -> int:
    """Return the flags of an event without an end of the connection that is not its own: see NothingToRead."""
    ends = select.EPOLLHUP | select.EPOLLERR
    if not flags & ends:
        return flags
    poll = select.poll()
    poll.register(descriptor, 0)
    return flags if poll.poll(0) else flags & ~ends


REQUEST_LIMIT_S = 15.0  # for all headers of a request
IDLE_LIMIT_S = 120.0  # between two requests
PROGRESS_BYTES = 64 * KIB  # a body or an answer must advance by this much within IDLE_LIMIT_S
LINGER_S = 2.0  # after a refusal, the rest of the request is read and discarded for this long: a reset would lose the answer
MOST_CONNECTIONS = 4096
ACCEPTS_AT_ONCE = 64
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def make_task_class() -> Any:
    """Return a waitress task that passes on what its parser knows: the caller, and the promise of disk space."""
    import waitress.channel
    import waitress.task

    class Task(waitress.task.WSGITask):  # type: ignore[misc]
        def get_environment(self) -> dict[str, Any]:
            environ: dict[str, Any] = super().get_environment()
            environ[CALLER_KEY] = self.request.caller
            environ[VALID_KEY] = self.request.node.token_store.is_valid
            environ["joborch.promise"] = self.request.promise
            if hasattr(self.request, "heard"):  # what has parked the request
                environ["joborch.heard"] = self.request.heard
            return environ

        def execute(self) -> None:
            """Answer. An answer that is cut off gets no last chunk."""
            try:
                super().execute()
            except CutOff as error:
                raise waitress.channel.ClientDisconnected from error

        def write(self, data: bytes) -> None:
            """Send head and body in one piece, if that is all: the peer wakes once for both."""
            task: Any = self
            if task.wrote_header or not (data and task.has_body and len(data) == task.content_length):
                super().write(data)
                return
            task.wrote_header, task.content_bytes_written = True, len(data)
            task.channel.write_soon(task.build_response_header() + data)

    return Task


def make_error_task_class() -> Any:
    """Return a waitress task that sends every error as JSON and closes the connection."""
    import waitress.task

    class ErrorTask(waitress.task.ErrorTask):  # type: ignore[misc]
        def execute(self) -> None:
            error = self.request.error
            refusal = getattr(error, "refusal", None) or HttpError(error.code, one_line(f"{error.reason}: {error.body}".lower()))
            answer = Answer.of(refusal)
            body = json.dumps(answer.body).encode()
            self.status = f"{answer.status} {reason_phrase(answer.status)}"
            digest = repr_digest(hashlib.sha256(body).hexdigest())
            head = [("Content-Type", JSON_TYPE), ("Repr-Digest", digest), (OURS_HEADER, __version__)]
            self.response_headers.extend([*head, *answer.headers.items()])
            self.set_close_on_finish()
            self.content_length = len(body)
            self.channel.lingers = True
            said = b"" if getattr(self.request, "command", "") == "HEAD" else body
            # In one piece: a caller that half-closed its connection would otherwise get only the headers.
            self.channel.write_soon(self.build_response_header() + said)
            self.wrote_header, self.content_bytes_written = True, len(said)

    return ErrorTask


def make_signing(task_class: Any) -> Any:
    """Return a waitress task that proves its answer to a server that has proven its request."""

    class Signing(task_class):  # type: ignore[misc]
        def build_response_header(self) -> bytes:
            head = bytes(super().build_response_header())
            # Not self.request: waitress replaces it if it fails.
            asked = getattr(next(iter(self.channel.requests), None), "proof", None)
            if asked is None:
                return head
            mac = asked.of_answer(int(self.status.split()[0]), FoldedHeaders(self.response_headers))
            return head[:-2] + f"{MAC_HEADER}: {mac}\r\n\r\n".encode()

    return Signing


class FoldedHeaders(dict[str, str]):
    """Headers by name, ignoring case."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        super().__init__((name.lower(), value) for name, value in pairs)

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())


class NothingToRead(Exception):
    """A connection has nothing to read, although epoll said so.

    That happens while a process is started: until its exec, it shares the sockets of its parent, so a connection that was
    closed meanwhile still has events, under a number that another connection may have by now (epoll(7), questions 6 and 9).
    """


class Turns:
    """Extends waitress's connections: they know the user, send in turns, and have time limits."""

    turn_bytes, lingers, linger_until, known_uid, writing, half_closed = 0, False, 0.0, cast("int | None", None), False, False
    proven, serving, closed = False, False, False
    moved_bytes, mark_bytes, mark_at = 0, 0, 0.0  # in and out; their number and the time (monotonic) of the last progress
    since = 0.0  # monotonic: when it became idle, or the headers of its request began
    waits_for_request = True  # for the first one

    def uid(self) -> int | None:
        connection: Any = self
        if self.known_uid is None:
            self.known_uid = peer_uid(connection.socket)
        return self.known_uid

    @property
    def address(self) -> str:
        connection: Any = self
        return "" if connection.socket.family == socket.AF_UNIX else str(connection.addr[0])

    # -- time limits --

    def is_under_way(self) -> bool:
        """Tell whether it is busy: with a complete request, or with the body of one whose caller was authenticated."""
        connection: Any = self
        request = connection.request
        return bool(connection.requests) or (self.proven and bool(connection.total_outbufs_len or (request and request.proven)))

    def is_overdue(self, now: float) -> bool:
        """Tell whether to close it: it is silent, its headers take too long, or its transfer has stalled."""
        connection: Any = self
        if self.linger_until:
            return now > self.linger_until
        request = connection.request
        if connection.total_outbufs_len or (not connection.requests and request is not None and request.proven):
            return self.stands_still(now)
        self.mark_at = 0.0
        if connection.requests:
            return False
        return now - self.since > (REQUEST_LIMIT_S if request is not None or self.waits_for_request else IDLE_LIMIT_S)

    def stands_still(self, now: float) -> bool:
        """Tell whether a transfer made too little progress for too long. Bytes count once the other end has acknowledged them."""
        moved = self.moved_bytes - unsent_bytes(cast(Any, self).socket)
        if not self.mark_at or moved - self.mark_bytes >= PROGRESS_BYTES:
            self.mark_at, self.mark_bytes = now, moved
        return now - self.mark_at > IDLE_LIMIT_S

    # -- receiving --

    def readable(self) -> bool:
        connection: Any = self
        parent: Any = super()
        return bool(self.linger_until or (parent.readable() and not (self.half_closed and connection.requests)))

    def handle_read(self) -> None:
        """Read; after a refusal, discard what the caller still sends."""
        connection: Any = self
        parent: Any = super()
        if not self.linger_until:
            # waitress would treat a half-closed connection as closed and drop the answer.
            self.half_closed = bool(connection.requests) and is_half_closed(connection.socket)
            if self.half_closed:
                return
            with contextlib.suppress(NothingToRead):
                parent.handle_read()
            connection.server.house.hold(self, held_bytes(connection))
            connection.server.house.shrink()
        else:
            with contextlib.suppress(NothingToRead):
                if time.monotonic() > self.linger_until or not connection.recv(MIB):
                    connection.handle_close()

    def recv(self, size: int) -> bytes:
        """Read. Only a little of a chunked body: chunks of one byte take a thousand times their size in memory."""
        request = cast(Any, self).request
        try:
            return bytes(cast(Any, super()).recv(min(size, CHUNKED_BYTES) if request is not None and request.chunked else size))
        except BlockingIOError as error:
            raise NothingToRead from error

    def received(self, data: bytes) -> bool:
        """Process received bytes. Incomplete headers do not extend a connection's time."""
        connection: Any = self
        parent: Any = super()
        self.moved_bytes += len(data)
        fresh = connection.request is None
        taken = bool(parent.received(data))
        if fresh and connection.request is not None and not self.waits_for_request:
            self.since = time.monotonic()
        if self.is_under_way():
            connection.server.house.busy(self)
        return taken

    # -- serving --

    def service(self) -> None:
        """Serve one request. If the connection must close, wake the I/O thread at once instead of a second later."""
        connection: Any = self
        parent: Any = super()
        with connection.requests_lock:
            self.serving = True
        connection.server.watch.touched.append(self)
        connection.server.watch.worker.connection = self
        try:
            parent.service()
        finally:
            self.serving, connection.server.watch.worker.connection = False, None
            connection.server.watch.touched.append(self)
            self.since, self.waits_for_request = time.monotonic(), False
            if self.closed:
                self.drop_requests()
            elif not self.is_under_way():
                connection.server.house.rest(self)
                connection.server.house.hold(self, held_bytes(connection))
        if connection.close_when_flushed:
            connection.server.pull_trigger()

    def handle_close(self) -> None:
        """Close it, and return the disk space of its unfinished requests at once."""
        parent: Any = super()
        self.closed = True
        parent.handle_close()
        cast(Any, self).server.house.leave(self)
        self.drop_requests()

    def drop_requests(self) -> None:
        """Close requests that will get no answer, except one that a worker is serving: the worker closes that."""
        connection: Any = self
        if connection.requests_lock.acquire(blocking=False):  # else a worker is between two requests, and calls this later
            try:
                dropped = [*connection.requests[1 if self.serving else 0 :], *([connection.request] if connection.request else [])]
                for request in dropped:
                    request.close()
            finally:
                connection.requests_lock.release()

    def handle_error(self) -> None:
        """Close it after an error in joborch. Log that only for debugging, because strangers may be able to cause it."""
        log.debug("a connection was closed after an error: %s", one_line(repr(sys.exc_info()[1]), 200))
        self.handle_close()

    # -- sending --

    def send(self, data: bytes, do_close: bool = True) -> int:
        """Send at most 4 MiB in one turn: a large download must not block the others."""
        parent: Any = super()
        sent = 0 if self.turn_bytes >= 4 * MIB else int(parent.send(data, do_close))
        self.turn_bytes += sent
        self.moved_bytes += sent
        return sent

    def write_soon(self, data: Any) -> int:
        connection: Any = self
        parent: Any = super()
        self.writing = True
        connection.server.watch.touched.append(self)
        try:
            return int(parent.write_soon(data))
        finally:
            self.writing = False
            if connection.total_outbufs_len:
                connection.server.pull_trigger()

    def writable(self) -> bool:
        """Tell whether the I/O thread should send: not while a worker does, or it would spin until the worker is done."""
        connection: Any = self
        parent: Any = super()
        busy = self.writing and connection.total_outbufs_len <= connection.adj.outbuf_high_watermark
        return not busy and bool(parent.writable())

    def handle_write(self) -> None:
        """Send the rest. After a refusal, half-close the connection and let the caller finish sending."""
        connection: Any = self
        parent: Any = super()
        self.turn_bytes = 0
        if self.lingers and connection.close_when_flushed and not connection.total_outbufs_len:
            # Unread bytes would make TCP reset the connection, and the answer would be lost.
            connection.close_when_flushed, self.linger_until = False, time.monotonic() + LINGER_S
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_WR)
        else:
            parent.handle_write()


def unsent_bytes(connection: socket.socket) -> int:
    """Return how many sent bytes the other end of a connection has not acknowledged (SIOCOUTQ)."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0])
    except OSError:
        return 0


def held_bytes(connection: Any) -> int:
    """Return the memory that an unproven caller occupies: the request so far, and the unsent part of the answer."""
    request = connection.request
    if connection.proven or connection.closed:
        return 0
    coming = len(request.header_plus) + request.body_bytes_received if request is not None else 0
    return int(coming + connection.total_outbufs_len)


def make_channel_class(node: Node) -> Any:
    """Return the class of our connections for waitress."""
    import waitress.channel
    import waitress.parser

    class Parser(Judge, waitress.parser.HTTPRequestParser):  # type: ignore[misc]
        pass

    Parser.node = node

    class Channel(Turns, waitress.channel.HTTPChannel):  # type: ignore[misc]
        task_class, error_task_class = make_signing(make_task_class()), make_signing(make_error_task_class())

        def __init__(self, server: Any, sock: Any, addr: Any, adj: Any, map: Any = None) -> None:  # noqa: A002 - waitress's name
            super().__init__(server, sock, addr, adj, map=map)
            self.requests_lock = threading.RLock()  # a connection may be closed while it is being read
            self.since = time.monotonic()
            server.house.enter(self, addr)
            server.watch.touched.append(self)

        def parser_class(self, adj: Any) -> Any:
            parser = Parser(adj)
            parser.attach(self)
            return parser

    return Channel


class Doors:
    """Extends waitress's listeners: they obey the limits of a House."""

    house: House
    watch: Watch
    siblings: Sequence[Any] = ()  # the other listeners of the process
    next_look = paused_until = 0.0  # monotonic
    waking = threading.RLock()  # held while the I/O thread is woken, or a listener is closed

    def readable(self) -> bool:
        """Tell whether to accept connections; once a second, close overdue ones."""
        now = time.monotonic()
        if now >= self.next_look:
            self.next_look = now + 1
            self.close_overdue(now)
        return bool(cast(Any, self).accepting and now >= self.paused_until)

    def close(self) -> None:
        siblings, self.siblings = self.siblings, ()
        for listener in siblings:
            listener.siblings = ()
            listener.close()
        with self.waking:
            cast(Any, super()).close()

    def close_overdue(self, now: float) -> None:
        """Close connections that are overdue, and unproven ones that occupy too much memory."""
        for connection in list(cast(Any, self).active_channels.values()):
            if connection.is_overdue(now):
                connection.handle_close()
        self.house.shrink()
        self.house.tell(now)

    def pull_trigger(self) -> None:
        """Wake the I/O thread, unless it waits already for what the connection of this worker needs, or has ended."""
        connection, trigger = getattr(self.watch.worker, "connection", None), cast(Any, self).trigger
        if connection is None or self.watch.is_outdated(connection):
            with self.waking:  # once it is closed, another file may have the number of its pipe
                if not trigger._closed:
                    cast(Any, super()).pull_trigger()

    def handle_accept(self) -> None:
        """Accept waiting connections. If no place or no file is left, close idle ones."""
        listener: Any = self
        for _ in range(min(ACCEPTS_AT_ONCE, self.house.places // 4)):
            if self.house.is_full() and not self.house.make_room():
                break
            try:
                connection, address = listener.socket.accept()
                listener.set_socket_options(connection)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in OUT_OF_FILES and not self.house.make_room():
                    break
            else:
                listener.channel_class(self, connection, listener.fix_addr(address), listener.adj, map=listener._map)
        else:
            return
        self.paused_until = time.monotonic() + 0.2  # let the requests in progress finish


def connection_places(node: Node) -> int:
    """Return the limit of connections: the limit of open files, less what database, links and requests need."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    others = max(320 + 32 * len(getattr(node, "links", ())), files // 4)
    return max(16, min(files - others, MOST_CONNECTIONS), files // 4)


class Dispatcher:
    """Gives each request to the pool of its class (waitress has a single one), so slow requests do not delay quick ones."""

    def __init__(self, mode: str) -> None:
        quick = WORKER_THREADS + EVENTS_PLACES + (WAITER_PLACES + LISTENER_PLACES if mode == "server" else 0)
        forms = {"form": Pool("form", 12, 1000), "large": Pool("large", 8, 1000)}
        self.pools = {"quick": Pool("quick", quick), **forms, "slow": Pool("slow", 16, 64)}

    def add_task(self, connection: Any) -> None:
        """Queue the next request of a connection, or answer 503 if too many of its class wait."""
        request = connection.requests[0]
        serve = functools.partial(self.pools["quick"].add, connection.service)
        parks = request.route.parks if request.route is not None and request.error is None else None
        if parks is not None and parks(request.node, request, connection, serve):
            return
        if not self.pools[class_of(request)].add(connection.service):
            request.refuse(HttpError(503, "too many requests of this kind are in progress: try again soon", Retry_After=str(COME_AGAIN_S)))
            self.pools["quick"].add(connection.service)

    def shutdown(self, cancel_pending: bool = True, timeout: float = 5) -> bool:
        """Stop the threads. Do not wait more than `timeout` seconds for busy ones."""
        stop_pools(self.pools.values(), timeout)
        return cancel_pending


def class_of(request: Any) -> str:
    """Return the pool of a request: `form` for small forms (most of the traffic), `large` for large ones, `slow` or `quick`.

    `slow` is for routes that wait for other machines. Callers that follow a job's output are `quick`: they idle most of the
    time, and a ThreadLimit applies to them.
    """
    found: Route | None = request.route
    if found is None or request.error is not None or not found.slow:
        return "quick"
    if found.takes_form:
        return "form" if int(request.headers.get("CONTENT_LENGTH") or 0) < MIB else "large"
    follows = request.command == "GET" and dict(parse_qsl(request.query)).get("follow") == "1"
    return "quick" if follows else "slow"


def make_http_server(node: Node, app: Any) -> Any:
    """Return a waitress server that listens for `node`. Raises ConfigError if an address cannot be used."""
    import waitress.server

    config = node.config
    options: dict[str, Any] = {
        "connection_limit": sys.maxsize,  # our listeners have their own limits
        "channel_request_lookahead": 1,  # to notice callers that left while waiting
        "recv_bytes": 256 * KIB,
        "max_request_body_size": config.max_upload_bytes + 1,  # for chunked bodies; check_size refuses the others earlier
        "max_request_header_size": 64 * KIB,
        "backlog": BACKLOG,
        "ident": "joborch",
        "clear_untrusted_proxy_headers": False,  # nothing here trusts them
    }
    opened: dict[int, Any] = {}  # waitress's table of open sockets, by descriptor
    sockets = open_listeners(config.host, config.port)
    local = open_own_socket(config, sockets)
    dispatcher = Dispatcher(config.mode)
    waitress.server.create_server(app, map=opened, sockets=sockets, _dispatcher=dispatcher, **options)
    if local is not None:  # waitress does not mix socket families: use a second server with the same threads
        waitress.server.create_server(app, map=opened, sockets=[local], _dispatcher=dispatcher, **options)
    listeners = [each for each in opened.values() if hasattr(each, "channel_class")]
    house, watch = House(connection_places(node)), Watch()
    for listener in listeners:
        listener.watch = watch
        listener.__class__ = type("Listener", (Doors, type(listener)), {})
        listener.house, listener.channel_class = house, make_channel_class(node)
    server = listeners[0]
    server.siblings = listeners[1:]
    server.asyncore = types.SimpleNamespace(loop=watch.loop)
    server.socket_file = local and local.getsockname()
    server.socket_inode = local and os.lstat(server.socket_file).st_ino
    return server


def open_own_socket(config: Config, listeners: Sequence[socket.socket]) -> socket.socket | None:
    """Return the server's Unix socket, or None. A failure is logged, or raises ConfigError if JOBORCH_SOCKET is set."""
    port = listeners[0].getsockname()[1]
    if config.mode != "server" or socket_path(config.socket_file, port) is None:
        return None
    try:
        return open_socket_file(config.socket_file, port, int(config.socket_mode, 8))
    except ConfigError as error:
        if config.socket_file:
            for listener in listeners:
                listener.close()
            raise
        log.warning("%s", error)
        return None


def remove_socket_file(server: Any) -> None:
    """Remove the Unix socket of a stopping server, unless another server has replaced it."""
    with contextlib.suppress(OSError):
        if server.socket_file and os.lstat(server.socket_file).st_ino == server.socket_inode:
            os.unlink(server.socket_file)
