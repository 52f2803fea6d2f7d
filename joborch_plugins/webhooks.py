"""Webhooks: a job's JSON is POSTed to its `callback_url` when it ends, signed as Standard Webhooks says (standardwebhooks.com).

A row of `deliveries` is stored in the transaction that moves the job, so none is lost and none is sent for a move that did not happen.
Senders deliver each at least once, those of one job in order. They are few, and of one receiver fewer still, so a receiver that
hangs delays no other. A receiver is called at the address that was checked, so a host name cannot lead to another machine.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import io
import ipaddress
import json
import re
import socket
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from datetime import timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from random import uniform
from secrets import token_bytes
from typing import Any, NamedTuple, Union
from urllib.parse import urlsplit

from joborch import (
    BAD,
    CONNECT_TIMEOUT_S,
    CONNECTION_ERRORS,
    ENDED,
    ID,
    JSON_TYPE,
    KIB,
    NOT_FOUND,
    STATUS_NAMES,
    Answer,
    Backoff,
    Bounds,
    Config,
    ConfigError,
    Connection,
    Gives,
    HttpError,
    Job,
    Loop,
    Move,
    NoAnswer,
    QueueInfo,
    Request,
    Server,
    Service,
    Status,
    StorageError,
    __version__,
    crash_point,
    file_trouble,
    format_duration,
    job_json,
    known_job,
    log,
    one_line,
    plain_cause,
    plural,
    read_small_file,
    read_some,
    rfc3339,
    route,
    statements,
    write_atomic,
)

SENDERS = 16  # deliveries under way at once
SENDERS_UNPROVEN = 8  # of these, to receivers that did not accept their last delivery
SENDERS_A_RECEIVER = 2  # one, to such a receiver
GIVE_UP_S = 3 * 24 * 3600.0
PAUSE_FIRST_S, PAUSE_LAST_S = 5.0, 3600.0  # between two attempts of a delivery: doubled after each
HOLD_MOST_S = 3600.0  # how long one Retry-After holds back the other deliveries to its receiver
SILENT_S = 10.0  # the longest silence in an answer; it may take twice as long in all
ANSWER_LIMIT_BYTES, ANSWER_SHOWN = 4 * KIB, 200  # how much of an answer is read; how many characters of it are kept
ADDRESSES_TRIED = 4  # of a host that has many
TRIES_KEPT = 5  # attempts that GET /jobs/ID shows
RECEIVERS_KEPT = 1000  # that nothing is due for
UNHEALTHY_S = 600.0  # a receiver that fails for longer is a problem of /health
URL_LONGEST = 2000

# == Which receivers may be called ==

Ip = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]
NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
# IPv6 networks whose addresses stand for IPv4 addresses, and how many bits follow the IPv4 address in them.
CARRIERS = tuple(
    (ipaddress.IPv6Network(text), bits)
    for text, bits in (("::ffff:0:0/96", 0), ("::/96", 0), ("64:ff9b::/96", 0), ("::ffff:0:0:0/96", 0), ("2002::/16", 80))
)
TEREDO, MAPPED = ipaddress.IPv6Network("2001::/32"), CARRIERS[0][0]
ISATAP = (0x5EFE, 0x0200_5EFE)  # the third quarter of addresses that end with an IPv4 address (RFC 5214, 6.1)
# Special networks (RFC 6890 and its registry) that `is_global` of some versions of Python takes for public.
SPECIAL = tuple(map(ipaddress.ip_network, ("100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "3fff::/20", "5f00::/16")))
# Only listing the very address allows these: where clouds keep secrets of a machine, and networks that name no single machine.
NEVER = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "169.254.0.0/16", "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.0/3", "::/128", "fd00:ec2::254",
        "fe80::/10", "fec0::/10", "ff00::/8", "64:ff9b:1::/48",
    )
)  # fmt: skip


class Forbidden(OSError):
    """A host's address must not be called; the text says why."""


def stands_for(address: Ip) -> Iterator[Ip]:
    """Yield an address and the IPv4 address in it; a mapped IPv4 address is that IPv4 address alone."""
    if not isinstance(address, ipaddress.IPv6Address) or address not in MAPPED:
        yield address
    if isinstance(address, ipaddress.IPv6Address):
        if address in TEREDO:
            yield ipaddress.IPv4Address(~int(address) & 0xFFFFFFFF)
        if int(address) >> 32 & 0xFFFFFFFF in ISATAP:
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        for network, bits in CARRIERS:
            if address in network and not address.is_loopback:
                yield ipaddress.IPv4Address(int(address) >> bits & 0xFFFFFFFF)


class Hosts(NamedTuple):
    """The hosts of JOBORCH_CALLBACK_HOSTS: `*`, `*.example.org`, names, addresses and networks."""

    names: frozenset[str] = frozenset()
    suffixes: tuple[str, ...] = ()  # as in ".example.org"; "" stands for all
    networks: tuple[Network, ...] = ()

    def allow(self, host: str) -> bool:
        """Tell whether a URL may name this host."""
        return host in self.names or self.is_listed(host) or any(host.endswith(suffix) for suffix in self.suffixes)

    def is_listed(self, text: str) -> bool:
        """Tell whether a text is an address that is listed itself, or in a listed network."""
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False
        return any(address in network for network in self.networks)

    def check(self, host: str, text: str) -> None:
        """Raise Forbidden if `host`, which has the address `text`, must not be called there.

        An address that is not public is called if it is listed, or if its host is listed by its full name.
        """
        address = ipaddress.ip_address(text.partition("%")[0])
        for each in stands_for(address):
            if not any(each in network for network in self.networks):
                if any(each in network for network in NEVER):
                    raise Forbidden(f"{host} has the address {text}, which is never called: list the address in JOBORCH_CALLBACK_HOSTS")
                is_public = each.is_global and not any(each in network for network in SPECIAL)
                if not is_public and host not in self.names:
                    raise Forbidden(f"{host} has the address {text}, which is not public: list {host} in JOBORCH_CALLBACK_HOSTS")


def read_hosts(text: str) -> Hosts:
    """Return the hosts in a text, separated by commas. Raises ValueError."""
    names, suffixes, networks = set(), [], []
    for part in filter(None, (each.strip().lower().rstrip(".") for each in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(part.strip("[]")))
            continue
        except ValueError:
            pass
        if part == "*":
            suffixes.append("")
        elif part.startswith("*.") and NAME.fullmatch(part[2:]):
            suffixes.append(part[1:])
        elif NAME.fullmatch(part):
            names.add(part)
        else:
            raise ValueError(f"{one_line(part, 40)!r} is no host: give names separated by commas, as in portal.example.org,*.example.com")
    return Hosts(frozenset(names), tuple(suffixes), tuple(networks))


def read_host_list(text: str) -> str:
    """Accept a text with hosts: see `read_hosts`."""
    read_hosts(text)
    return text


def host_in(url: str) -> str:
    """Return the host of a URL to call. Raises ValueError with the remedy if it is not an http or https URL with nothing but a host.

    Only what all programs read alike is accepted: no blanks, backslashes, user names, or other letters than ASCII.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        host, port = "", 0
    if not re.fullmatch(r"https?://[!-~]+", url) or re.search(r"[\\\"<>^`{|}#]", url) or len(url) > URL_LONGEST or port == 0 or not host:
        raise ValueError(f"give an http or https URL of at most {URL_LONGEST:,} characters, as in https://portal.example.org/joborch")
    if "@" in parts.netloc:
        raise ValueError("remove the user and password")
    if ":" in host:
        ipaddress.IPv6Address(host)
    elif not NAME.fullmatch(host):
        raise ValueError("its host is not a name or an address")
    return host


def check_url(hosts: Hosts, url: str) -> str:
    """Return a URL that may be called. Raises ValueError with the remedy."""
    host = host_in(url)
    if not hosts.allow(host):
        raise ValueError(f"the operator of this server has not listed {host} in JOBORCH_CALLBACK_HOSTS")
    return url


def check_services(config: Config) -> None:
    """Raise ConfigError if a service has a CALLBACK_URL that may not be called."""
    for service in config.services.values():
        try:
            if service.callback_url:
                check_url(read_hosts(config.callback_hosts), service.callback_url)
        except ValueError as error:
            raise ConfigError(f"SERVICE_{service.name.upper()}_CALLBACK_URL is {one_line(service.callback_url, 80)!r}: {error}") from error


class CheckedConnection(Connection):
    """A connection to a receiver, at an address that may be called."""

    def __init__(self, url: str, hosts: Hosts) -> None:
        super().__init__(url, [])
        self.host, self.hosts = self.host.rstrip("."), hosts  # a dot at the end is no part of the name, in lists or certificates

    def connect(self, timeout_s: float) -> socket.socket:
        """Connect to an address of the host. The address that is checked is the one that is called: the name is not resolved again."""
        trouble: OSError = Forbidden(f"{self.host} has no address")
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in found[:ADDRESSES_TRIED]:
            made = None
            try:
                self.hosts.check(self.host, str(place[0]))
                made = socket.socket(family, kind, protocol)
                made.settimeout(timeout_s)
                made.connect(place)
                return made
            except OSError as error:
                trouble = error
                if made is not None:
                    made.close()
        raise trouble


# == Signing ==

SECRET_BEGIN = "whsec_"


def read_secrets(text: str) -> tuple[bytes, ...]:
    """Return the keys in a text: one, or several separated by commas. Raises ValueError."""
    keys = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            key = base64.b64decode(part[len(SECRET_BEGIN) :], validate=True)
        except binascii.Error:
            key = b""
        if not part.startswith(SECRET_BEGIN) or not 24 <= len(key) <= 64:
            raise ValueError(f"give {SECRET_BEGIN} and 24 to 64 bytes in base64: {SECRET_BEGIN}$(openssl rand -base64 32)")
        keys.append(key)
    if not keys:
        raise ValueError("there is no secret in it")
    return tuple(keys)


def read_secret(text: str) -> str:
    """Accept a text with keys: see `read_secrets`."""
    read_secrets(text)
    return text


def signing_keys(config: Config) -> tuple[bytes, ...]:
    """Return the keys that sign webhooks. Without a secret, the first start creates one in a file (mode 0600)."""
    if config.callback_secret:
        return read_secrets(config.callback_secret)
    path = Path(config.callback_secret_file or Path(config.data_path) / "callback-secret")
    try:
        if not path.exists():
            write_atomic(path, f"{SECRET_BEGIN}{base64.b64encode(token_bytes(32)).decode()}\n".encode(), 0o600)
            log.info("created a secret that signs webhooks in %s", path)
        return read_secrets(read_small_file(path).strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"JOBORCH_CALLBACK_SECRET_FILE {path} cannot be used: {file_trouble(error)}") from error


def signature(keys: Iterable[bytes], webhook_id: str, at: int, body: bytes) -> str:
    """Return the header webhook-signature: one signature for each key."""
    signed = f"{webhook_id}.{at}.".encode() + body
    return " ".join(f"v1,{base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()}" for key in keys)


# == Attempts ==


class Attempt(NamedTuple):
    """How one attempt ended."""

    at: float  # wall time
    code: int | None  # None: there was no answer
    answer: str  # the beginning of it, or why there was none
    wait_s: float = 0.0  # its Retry-After

    @property
    def is_accepted(self) -> bool:
        """Whether the receiver has the delivery."""
        return self.code is not None and 200 <= self.code < 300

    @property
    def is_outage(self) -> bool:
        """Whether other deliveries to this receiver would fail, too: it does not answer, is overloaded or broken."""
        return self.code is None or self.code == 429 or self.code >= 500

    @property
    def text(self) -> str:
        """What happened, for the log and for people."""
        if self.code is None:
            return self.answer
        if 300 <= self.code < 400:
            return f"it answered {self.code}, a redirect, which is not followed"
        return f"it answered {self.code}" + (f": {self.answer}" if self.answer else "")


def retry_after_s(text: str, now: float) -> float:
    """Return how many seconds a Retry-After asks to wait (RFC 9110, 10.2.3): a number, or a date. 0 if it is neither."""
    if re.fullmatch("[0-9]{1,12}", text):
        return float(text)
    try:
        at = parsedate_to_datetime(text)
        return max(0.0, (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp() - now)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def pause_s(failures: int, chance: float = 0.0) -> float:
    """Return the pause after the n-th failure in a row: 5 s, doubled up to an hour; `chance` (0 to 1) takes off up to a quarter."""
    doubled: float = PAUSE_FIRST_S * 2 ** min(failures - 1, 20)
    return min(PAUSE_LAST_S, doubled) * (1 - chance / 4)


def next_due(now: float, began: float, failures: int, wait_s: float, chance: float = 0.0) -> float | None:
    """Return when a delivery that has failed is tried again; None if three days are over. The last attempt is at their end."""
    end = began + GIVE_UP_S
    return None if now >= end else min(end, now + max(wait_s, pause_s(failures, chance)))


class Receiver:
    """Scheme, host and port that deliveries go to, and how that goes."""

    def __init__(self, name: str, backoff: Backoff) -> None:
        self.name, self.outage = name, backoff
        self.is_proven = False  # it accepted the last delivery
        self.sending: set[int] = set()  # ids of the deliveries under way
        self.due_at = float("-inf")  # steady time: nothing is due earlier
        self.served_at = 0  # number of the last delivery to it, of all

    def has_room(self) -> bool:
        """Tell whether one more delivery may be under way to it."""
        return len(self.sending) < (SENDERS_A_RECEIVER if self.is_proven else 1)


class Webhooks:
    """Stores deliveries as jobs move, and sends them."""

    def __init__(self, server: Server) -> None:
        self.server, self.store, self.lock = server, server.store, threading.Lock()
        self.configure()
        self.receivers: dict[str, Receiver] = {}
        self.served = 0
        self.outcomes = dict.fromkeys(("delivered", "retried", "failed", "gone"), 0)
        self.backlog = self.store.number(statements.DELIVERIES_OPEN)
        for row in self.store.read(statements.DELIVERIES_RECEIVERS):
            self.receiver(row["receiver"])

    def configure(self) -> None:
        """Take the present settings. Raises ConfigError if the file with the secret cannot be used."""
        config = self.server.config
        self.keys = signing_keys(config) if config.callback_hosts else ()
        self.hosts = read_hosts(config.callback_hosts)
        self.states: tuple[str, ...] = config.callback_on or tuple(status.value for status in ENDED)

    def start(self) -> None:
        """Add the loop of the senders."""
        self.server.loops["webhooks"] = Loop("webhooks", self.tick, lambda: self.server.pool, 1.0, SENDERS, self.is_due)

    def url_for(self, service: Service, given: str | None) -> str | None:
        """Return the callback URL of a new job. Raises HttpError 400 if it may not be called."""
        try:
            return check_url(self.hosts, given) if given else service.callback_url or None
        except ValueError as error:
            raise HttpError(400, f"callback_url is {one_line(given or '', 80)!r}: {error}", "callback_url") from error

    # -- storing --

    def moved(self, db: sqlite3.Connection, move: Move) -> None:
        """Store a delivery inside the transaction that moves a job. An error here is logged, and does not undo the move."""
        if move.job.callback_url and move.to in self.states:
            try:
                self.store.core.savepoint(functools.partial(self.add, db, self.store.row(db, move.job.id)))
            except Exception as error:
                if isinstance(error, sqlite3.Error):
                    raise
                log.exception("job %d: its webhook could not be stored", move.job.id)

    def add(self, db: sqlite3.Connection, job: Job) -> None:
        """Store the delivery of a job as it is now. It is due at once, or after the earlier ones of this job."""
        said = job_json(self.server, job, QueueInfo())
        said.pop("webhooks")
        parts, now = urlsplit(job.callback_url or ""), self.store.steady()
        values = {"job_id": job.id, "webhook_id": f"msg_{job.uuid}_{job.moves}", "status": job.status.value, "body": json.dumps(said)}
        values.update(receiver=f"{parts.scheme}://{parts.netloc}", at=self.server.clock.wall(), now=now)
        db.execute(statements.DELIVERY_ADD, values)
        crash_point("webhook.stored")
        self.store.core.after(functools.partial(self.arrived, str(values["receiver"]), 1))

    def arrived(self, name: str, count: int) -> None:
        """Wake a sender for deliveries that were stored; `count` of them are new."""
        with self.lock:
            self.backlog += count
            self.receiver(name).due_at = float("-inf")
        self.server.wake("webhooks")

    def receiver(self, name: str) -> Receiver:
        """Return what is known of a receiver. The caller holds the lock."""
        found = self.receivers.get(name)
        if found is None:
            found = self.receivers[name] = Receiver(name, Backoff(self.server.clock))
        return found

    def committed(self, moves: Iterable[Move]) -> None:
        """Nothing to do: `moved` has stored the deliveries."""

    # -- sending --

    def is_due(self) -> bool:
        """Tell whether a sender might find something to do."""
        now = self.store.steady()
        return any(receiver.due_at <= now and not receiver.outage.waits() for receiver in list(self.receivers.values()))

    def tick(self) -> bool:
        """Make one attempt of one delivery. Return whether there was one."""
        found = self.claim()
        if found is None:
            return False
        receiver, row = found
        self.server.wake("webhooks")  # another sender looks for more
        try:
            crash_point("webhook.claimed")
            attempt = self.attempt(row)
            crash_point("webhook.answered")
            if attempt.is_accepted or not self.server.stopping.is_set():
                self.note(receiver, row, attempt)
                crash_point("webhook.noted")
        except StorageError as error:
            receiver.outage.failed(error)  # else it would be sent over and over
            raise
        finally:
            with self.lock:
                receiver.sending.discard(row["id"])
                receiver.due_at = float("-inf")
        return True

    def claim(self) -> tuple[Receiver, sqlite3.Row] | None:
        """Return a delivery that is due, of the receiver that was served least recently, and mark it as under way."""
        with self.lock:
            now, known = self.store.steady(), sorted(self.receivers.values(), key=lambda receiver: receiver.served_at)
            unproven = sum(len(receiver.sending) for receiver in known if not receiver.is_proven)
            for receiver in known:
                may = receiver.is_proven or unproven < SENDERS_UNPROVEN
                if receiver.due_at <= now and may and receiver.has_room() and not receiver.outage.waits():
                    row = self.next_of(receiver, now)
                    if row is not None:
                        receiver.sending.add(row["id"])
                        self.served = receiver.served_at = self.served + 1
                        return receiver, row
        return None

    def next_of(self, receiver: Receiver, now: float) -> sqlite3.Row | None:
        """Return the next delivery to a receiver that is due, or note when there is one."""
        rows = self.store.read(statements.DELIVERY_NEXT, receiver=receiver.name, limit=len(receiver.sending) + 1)
        free = [row for row in rows if row["id"] not in receiver.sending]
        if free and free[0]["due"] <= now:
            return free[0]
        receiver.due_at = free[0]["due"] if free else float("inf")
        if not rows and not receiver.sending and (receiver.outage.failures or len(self.receivers) > RECEIVERS_KEPT):
            del self.receivers[receiver.name]
        return None

    def attempt(self, row: sqlite3.Row) -> Attempt:
        """Send a delivery once."""
        at, connection, code = self.server.clock.wall(), None, None
        body, number = row["body"].encode(), int(at)
        headers = {
            "Content-Type": JSON_TYPE,
            "Content-Length": str(len(body)),
            "User-Agent": f"joborch/{__version__}",
            "webhook-id": row["webhook_id"],
            "webhook-timestamp": str(number),
            "webhook-signature": signature(self.keys, row["webhook_id"], number, body),
        }
        try:
            check_url(self.hosts, row["callback_url"])  # the list may be another than at the upload
            connection = CheckedConnection(row["callback_url"], self.hosts)
            connection.bounds = Bounds(SILENT_S, self.server.stopping.is_set)
            connection.open(lambda _: None, self.server.config.ca_file, CONNECT_TIMEOUT_S).settimeout(SILENT_S)
            parts = urlsplit(row["callback_url"])
            connection.send("POST", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers, io.BytesIO(body))
            reply = connection.answer("POST")
            code, wait_s = reply.status, retry_after_s(reply.headers.get("Retry-After", ""), at)
            text = read_some(reply, ANSWER_LIMIT_BYTES).decode("utf-8", "replace")
            return Attempt(at, code, one_line(text, ANSWER_SHOWN), wait_s)
        except (*CONNECTION_ERRORS, NoAnswer) as error:
            return Attempt(at, code, one_line(plain_cause(error), ANSWER_SHOWN))
        finally:
            if connection is not None:
                connection.close()

    def note(self, receiver: Receiver, row: sqlite3.Row, attempt: Attempt) -> None:
        """Store how an attempt ended, and when the next one is; let the next delivery of the job follow if this one is over."""
        now, failures = self.store.steady(), row["failures"] + 1
        due = None if attempt.is_accepted or attempt.code == 410 else next_due(now, row["began"], failures, attempt.wait_s, uniform(0, 1))
        outcome = "delivered" if attempt.is_accepted else "gone" if attempt.code == 410 else "failed" if due is None else None
        said = {"at": rfc3339(attempt.at), "code": attempt.code, "answer": attempt.answer}
        tries = json.dumps([*json.loads(row["tries"]), said][-TRIES_KEPT:])
        values = {
            "id": row["id"],
            "job_id": row["job_id"],
            "due": due,
            "failures": failures,
            "tries": tries,
            "outcome": outcome,
            "now": now,
        }

        def write(db: sqlite3.Connection) -> int:
            ended = int(db.execute(statements.DELIVERY_NOTE, values).rowcount and outcome is not None)
            if outcome == "gone":
                ended += db.execute(statements.DELIVERIES_GONE, values).rowcount
            if outcome is not None:
                db.execute(statements.DELIVERY_FOLLOWS, values)
            return ended

        ended = self.store.write(write, durable=False)
        self.learn(receiver, row, attempt, outcome, ended)

    def learn(self, receiver: Receiver, row: sqlite3.Row, attempt: Attempt, outcome: str | None, ended: int) -> None:
        """Keep in memory how an attempt ended, and log what is new."""
        with self.lock:
            self.backlog -= ended
            self.outcomes[outcome or "retried"] += 1
            failed_before, receiver.is_proven = receiver.outage.failures, attempt.is_accepted
            if attempt.is_accepted or attempt.code == 410:
                receiver.outage.worked()
                is_new = False
            else:
                hold_s = min(HOLD_MOST_S, attempt.wait_s) or None
                is_new = receiver.outage.failed(attempt.text, hold_s if attempt.is_outage else 0.0)
        if failed_before and attempt.is_accepted:
            log.info("webhooks to %s are accepted again", receiver.name)
        if is_new:
            log.warning("a webhook to %s failed: %s; it is tried again for %s", receiver.name, attempt.text, format_duration(GIVE_UP_S))
        if outcome in ("failed", "gone"):
            log.warning("job %d: its webhook was not delivered: %s", row["job_id"], attempt.text)

    # -- what others see --

    def shown(self, job: Job) -> list[dict[str, Any]]:
        """Return a job's deliveries in JSON."""
        rows = self.store.read(statements.DELIVERIES_OF_JOB, job_id=job.id) if job.callback_url else []
        return [self.delivery_json(row) for row in rows]

    def delivery_json(self, row: sqlite3.Row) -> dict[str, Any]:
        """Return a delivery in JSON. A pending one without `next_attempt` follows an earlier one of its job."""
        due = None if row["due"] is None else rfc3339(self.server.clock.wall() + max(0.0, row["due"] - self.store.steady()))
        said = {"id": row["webhook_id"], "status": row["status"], "at": rfc3339(row["at"]), "state": row["outcome"] or "pending"}
        return {**said, "attempts": row["attempts"], "next_attempt": due, "tries": json.loads(row["tries"])}

    def again(self, job: Job) -> None:
        """Send all webhooks of a job again, in order, beginning now. Raises HttpError 409 if it has none."""
        parts = urlsplit(job.callback_url or "")

        def write(db: sqlite3.Connection) -> tuple[int, int]:
            values = {"job_id": job.id, "now": self.store.steady()}
            ended = db.execute(statements.DELIVERIES_ENDED, values).fetchone()[0]
            found = db.execute(statements.DELIVERIES_AGAIN, values).rowcount
            db.execute(statements.DELIVERY_FOLLOWS, values)
            return ended, found

        ended, found = self.store.write(write)
        if not found:
            on = ", ".join(self.states)
            raise HttpError(409, f"job {job.id} has sent no webhook: give callback_url with its upload; one is sent for {on}")
        name = f"{parts.scheme}://{parts.netloc}"
        with self.lock:
            self.receiver(name).outage.until = float("-inf")
        self.arrived(name, ended)

    def problems(self) -> Iterator[tuple[str, str, float]]:
        """Yield what is wrong, what to do and since when (wall time) if receivers have failed for long."""
        with self.lock:
            outages = [(receiver.outage.since, receiver) for receiver in self.receivers.values() if receiver.outage.failures]
        outages = [outage for outage in outages if self.server.clock.wall() - outage[0] > UNHEALTHY_S]
        if outages:
            since, first = min(outages, key=lambda outage: outage[0])
            others = f"; {plural(len(outages) - 1, 'other receiver fails', 'other receivers fail')}, too" if len(outages) > 1 else ""
            remedy = "look at the receiver; its webhooks are tried again for 3 days, and `joborch redeliver ID` sends them again"
            yield f"webhooks to {first.name} fail: {first.outage.reason}{others}", remedy, since


def read_events(text: str) -> tuple[str, ...]:
    """Return the states of JOBORCH_CALLBACK_ON. Raises ValueError."""
    names = [part.strip().capitalize() for part in text.split(",") if part.strip()]
    known = [name for name in STATUS_NAMES if name != Status.PREPARED.value]
    if not names or not set(names) <= set(known):
        raise ValueError(f"give states separated by commas: some of {', '.join(known)}")
    return tuple(names)


# == The route ==

EXAMPLE_DELIVERY = {
    "id": "msg_8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0_5", "status": "Completed", "at": "2026-11-24T09:05:00.000Z", "state": "pending",
    "attempts": 1, "next_attempt": "2026-11-24T09:05:05.000Z",
    "tries": [{"at": "2026-11-24T09:05:00.000Z", "code": 503, "answer": "down for maintenance"}],
}  # fmt: skip
AGAIN_GIVES = {
    202: Gives("they are sent again, in order", JSON_TYPE, {"id": 42, "webhooks": [EXAMPLE_DELIVERY]}),
    400: BAD,
    404: NOT_FOUND,
    409: Gives("the job has no webhook", JSON_TYPE, {"message": "job 42 has sent no webhook: give callback_url with its upload"}),
}


@route("POST", "/jobs/<job_id>/redeliver", "server", who="user portal operator", takes=(ID,), gives=AGAIN_GIVES)
def redeliver(server: Server, request: Request, job_id: int) -> Answer:
    """Send the webhooks of a job again, with the same ids, and try those that wait now."""
    job, webhooks = known_job(server, request, job_id), server.plugins["webhooks"]
    webhooks.again(job)
    return Answer({"id": job.id, "webhooks": webhooks.shown(job)}, 202)
