"""Who the peer of a connection is: the kernel or a token proves it.

1. Identity
2. Tokens
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import hmac
import http.client
import ipaddress
import itertools
import json
import os
import re
import secrets
import socket
import stat
import struct
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from joborch_base.data_folder import user_numbers
from joborch_base.processes import is_scripts_socket
from joborch_base.settings import Config, default_folder, url_host
from joborch_base.vocabulary import BACKLOG, DEFAULT_HOSTS, MAC_HEADER, Clock, ConfigError, HttpError, NothingSent, log, plural

# == 1. Identity ==  The kernel or a token proves who the peer of a connection is; a port proves nothing.

ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LISTEN = 1, 4, 5, 8, 10  # TCP states, as the kernel numbers them
HALF_CLOSED = (FIN_WAIT1, FIN_WAIT2)
SOCKET_PATH_LIMIT_BYTES = 107  # unix(7): sun_path has 108 bytes, one of them for the end


class SeenSocket(NamedTuple):
    """A TCP socket of this machine, as the kernel describes it."""

    state: int
    uid: int
    inode: int  # 0: no process holds it, and the uid means nothing

    @property
    def proves(self) -> bool:
        """Whether its uid is that of a caller: a process holds it, and it has been connected.

        A socket that is still connecting (SYN_SENT) may have the same ends as one that is gone.
        """
        return self.inode != 0 and self.state in (ESTABLISHED, *HALF_CLOSED)


def peer_uid(connection: socket.socket) -> int | None:
    """Return the user id at the other end of a connection on this machine, or None if it cannot be proven, as for isolated scripts.

    TCP: look up the peer's socket, then check ours. If ours is still connected, no other socket can have had the same two ends
    meanwhile. Unix sockets: SO_PEERCRED.
    """
    with contextlib.suppress(OSError, ValueError):
        if connection.family == socket.AF_UNIX:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=iII"))
            return int(struct.unpack("=iII", credentials)[1])
        peer, here = connection.getpeername()[:2], connection.getsockname()[:2]
        for _ in range(2):  # again if the peer half-closes its end between the two steps
            seen = find_socket(peer, here)
            if seen is None or not seen.proves:
                return None
            state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            if state == ESTABLISHED or (state == CLOSE_WAIT and seen.state in HALF_CLOSED):
                return None if seen.uid == os.geteuid() and is_scripts_socket(seen.inode) else seen.uid
    return None


def is_half_closed(connection: socket.socket) -> bool:
    """Tell whether a local process has finished sending and keeps its end open to read the answer."""
    with contextlib.suppress(OSError):
        state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state == CLOSE_WAIT and not connection.recv(1, socket.MSG_PEEK) and peer_uid(connection) is not None
    return False


def tcp_uid(peer: tuple[str, int], here: tuple[str, int]) -> int | None:
    """Return the user id of the process that holds the socket with these ends. This does not prove the caller: see `peer_uid`."""
    seen = find_socket(peer, here)
    return seen.uid if seen is not None and seen.proves else None


def find_socket(peer: tuple[str, int], here: tuple[str, int]) -> SeenSocket | None:
    """Return the socket of this machine that has `peer` as its own end and `here` as the other, or None.

    It asks sock_diag(7) for this one socket or, if that is denied, reads the list of all in /proc/net/tcp (proc(5)).
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, struct.error):
            return diagnosed_socket(family, peer, here)
    return None if sock_diag_works() else listed_socket(peer, here)


def diagnosed_socket(family: int, peer: tuple[str, int], here: tuple[str, int]) -> SeenSocket:
    """Ask the kernel for the socket with these two ends. Raises OSError if there is none."""
    sock_diag, by_family, request, error, any_value = 4, 20, 1, 2, 0xFFFFFFFF
    ends = [packed_address(family, host).ljust(16, b"\0") for host in (peer[0], here[0])]
    wanted = struct.pack("!HH16s16s", peer[1], here[1], *ends) + struct.pack("=III", 0, any_value, any_value)
    body = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, any_value) + wanted
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, sock_diag) as kernel:
        kernel.settimeout(1)
        kernel.send(struct.pack("=IHHII", 16 + len(body), by_family, request, 1, 0) + body)
        answer = kernel.recv(8192)
    if struct.unpack_from("=IHHII", answer)[1] == error:
        raise OSError(-struct.unpack_from("=i", answer, 16)[0], "sock_diag failed")
    # A header of 16 bytes; family, state and two more; both ends (48); expires, rqueue, wqueue, uid and inode.
    uid, inode = struct.unpack_from("=II", answer, 16 + 4 + 48 + 12)
    return SeenSocket(answer[17], uid, inode)


@functools.lru_cache(maxsize=1)
def sock_diag_works() -> bool:
    """Tell whether sock_diag works here. If it does, "no such socket" is an answer, and /proc/net need not be read."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
            return diagnosed_socket(socket.AF_INET, near.getsockname(), near.getpeername()).inode != 0
    except (OSError, struct.error):
        return False


def packed_address(family: int, host: str) -> bytes:
    """Return an IP address in network order; an IPv4 address is mapped to IPv6 if the family is IPv6."""
    return socket.inet_pton(family, "::ffff:" + host if family == socket.AF_INET6 and ":" not in host else host)


def listed_sockets(family: int) -> Iterator[tuple[str, str, SeenSocket]]:
    """Yield the TCP sockets in /proc/net: their own and their other end as written there, and the socket."""
    table = "tcp" if family == socket.AF_INET else "tcp6"
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            yield fields[1], fields[2], SeenSocket(int(fields[3], 16), int(fields[7]), int(fields[9]))


def listed_socket(peer: tuple[str, int], here: tuple[str, int]) -> SeenSocket | None:
    """Return the socket with these two ends from the lists in /proc/net, or None."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):  # no address of this family
            wanted = (tcp_hex(family, *peer), tcp_hex(family, *here))
            for near, far, seen in listed_sockets(family):
                if (near, far) == wanted:
                    return seen
    return None


def tcp_hex(family: int, host: str, port: int) -> str:
    """Return an address as /proc/net/tcp writes it: 32-bit words in the byte order of the machine."""
    packed = packed_address(family, host)
    words = [packed[at : at + 4] for at in range(0, len(packed), 4)]
    return "".join(word[::-1].hex() if sys.byteorder == "little" else word.hex() for word in words).upper() + f":{port:04X}"


def is_own_user(uid: int | None) -> bool:
    """Tell whether a user id is certainly that of this process, or root's."""
    numbers = user_numbers()
    return uid is not None and uid != numbers.unmapped and (uid == os.getuid() or (uid == 0 and numbers.root))


@functools.lru_cache(maxsize=1)
def machine_names() -> frozenset[str]:
    """Return this machine's names in lower case: host name, its first part, and names in /etc/hosts. It does not ask DNS."""
    name = socket.gethostname().lower()
    names = {name, name.partition(".")[0]}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/etc/hosts").read_text(encoding="utf-8").lower().splitlines():
            words = line.partition("#")[0].split()[1:]
            names.update(words if name in words else ())
    return frozenset(names - {""})


@functools.lru_cache(maxsize=256)
def plain_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse an IP address, and turn IPv4-mapped IPv6 into IPv4. Return None for anything else."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_here(text: str) -> bool:
    """Tell whether an IP address belongs to this machine: loopback, or an address that a socket can bind to."""
    address = plain_address(text)
    if address is None or address.is_loopback:
        return address is not None
    zone = text.partition("%")[1:] if address.version == 6 else ()  # a link-local address needs its interface
    try:
        with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6) as probe:
            probe.bind((str(address) + "".join(zone), 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL  # if in doubt, yes: then only this user may call
    return True


class RefusedTokens:
    """Counts wrong tokens and logs, at most once a period, how many there were and where the last came from."""

    def __init__(self, clock: Clock, period_s: float = 60.0) -> None:
        self.clock, self.period_s, self.lock = clock, period_s, threading.Lock()
        self.count, self.last, self.quiet_until = 0, "", float("-inf")

    def note(self, address: str) -> None:
        with self.lock:
            self.count, self.last = self.count + 1, address or "the Unix socket"
        self.report()

    def report(self) -> None:
        """Log the count, unless the period has not passed yet."""
        with self.lock:
            now = self.clock.monotonic()
            if not self.count or now < self.quiet_until:
                return
            count, self.count, self.quiet_until = self.count, 0, now + self.period_s
        log.warning("refused %s with a wrong token; the last came from %s", plural(count, "request", "requests"), self.last)


# -- listeners --


def listener_uid(host: str, port: int) -> int | None:
    """Return the user id of the process that listens on this address, or on all addresses; None if there is none."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):  # no address of this family
            wanted = tcp_hex(family, host, port)
            every = "0" * len(wanted.partition(":")[0]) + f":{port:04X}"
            for near, _, seen in listed_sockets(family):
                if seen.state == LISTEN and near in (wanted, every):
                    return seen.uid
    return None


def open_listeners(hosts: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on each of `hosts` (separated by commas), all on one port. Port 0 picks one that is free on all.

    Raises ConfigError that names the address that cannot be used. With the default hosts, ::1 may be missing.
    """
    for last in (*[False] * 20, True):
        listeners: list[socket.socket] = []
        try:
            for host in filter(None, dict.fromkeys(each.strip().strip("[]") for each in hosts.split(","))):
                taken = port or (listeners[0].getsockname()[1] if listeners else 0)
                try:
                    listeners += open_host(host, taken)
                except (OSError, ValueError) as error:
                    if hosts == DEFAULT_HOSTS and host == "::1" and getattr(error, "errno", 0) in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        log.debug("this machine has no address ::1: listening only on 127.0.0.1")
                        continue
                    raise ConfigError(cannot_listen(host, taken, error)) from error
            if not listeners:
                raise ConfigError(f"JOBORCH_HOST is {hosts!r}: give an address to listen on, as in 127.0.0.1")
            return listeners
        except ConfigError:
            for listener in listeners:
                listener.close()
            if port or last or not listeners:
                raise
    raise AssertionError("the last try returns or raises")


def open_host(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on all addresses of one host. None stays open if it raises OSError or ValueError."""
    listeners: list[socket.socket] = []
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, address in dict.fromkeys((each[0], each[4]) for each in found):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)  # at once: another process can take a port that is only bound
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def cannot_listen(host: str, port: int, error: Exception) -> str:
    """Return why listening on an address failed, who holds it, and what to do."""
    why = os.strerror(error.errno or 0).lower() if isinstance(error, OSError) and (error.errno or 0) > 0 else str(error)
    uid = listener_uid(host, port) if isinstance(error, OSError) and error.errno == errno.EADDRINUSE else None
    holder = "" if uid is None else f"; a process of user {uid} listens there"
    return f"PORT is {port}: cannot listen on {url_host(host)}:{port} ({why}){holder}; give another PORT or JOBORCH_HOST"


def socket_path(setting: str, port: int) -> Path | None:
    """Return the path of the Unix socket of a server on `port` for this value of JOBORCH_SOCKET; None if it has none.

    A server in another network namespace may have the same port and the same folder: then the name has the id of this one.
    """
    if setting in ("0", "none"):
        return None
    if setting:
        return Path(os.path.abspath(setting))
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    own = runtime.is_absolute() and not folder_problem(runtime, by_default=True)  # after sudo it may be another user's folder
    path = (runtime if own else Path(f"/tmp/joborch-{os.getuid()}")) / f"joborch-{port}.sock"
    is_foreign = has_listener(path) and not is_of_this_network(path)
    return path.with_name(f"joborch-{port}-{os.stat('/proc/self/ns/net').st_ino}.sock") if is_foreign else path


def folder_problem(folder: Path, by_default: bool) -> str:
    """Return why another user could own a socket in this folder, or an empty string. A link does not count as a folder."""
    try:
        found = os.lstat(folder)
    except OSError as error:
        return f"{folder}: {os.strerror(error.errno or 0).lower()}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is not a folder"
    if found.st_uid not in ((os.getuid(),) if by_default else (os.getuid(), 0)):
        return f"{folder} belongs to user {found.st_uid}"
    sticky = not by_default and found.st_mode & stat.S_ISVTX
    return f"other users may write to {folder}" if found.st_mode & 0o022 and not sticky else ""


def open_socket_file(setting: str, port: int, mode: int) -> socket.socket:
    """Return a Unix socket that listens at its path with this mode. Raises ConfigError if that is impossible."""
    path, remedy = socket_path(setting, port), "set JOBORCH_SOCKET to another path, or to 0 for none"
    if path is None or len(os.fsencode(path)) > SOCKET_PATH_LIMIT_BYTES:
        raise ConfigError(f"{path} is too long for a Unix socket (at most {SOCKET_PATH_LIMIT_BYTES} bytes): {remedy}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not setting:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path.parent, 0o700)
        problem = folder_problem(path.parent, by_default=not setting) or remove_stale_socket(path)
        if problem:
            raise ConfigError(f"no Unix socket at {path}: {problem}; {remedy}")
        umask = os.umask(0o077)  # bind(2) creates the file, which others must not use before its mode is set
        try:
            listener.bind(str(path))
        finally:
            os.umask(umask)
        os.chmod(path, mode)
        listener.listen(BACKLOG)
    except (OSError, ConfigError) as error:
        listener.close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"no Unix socket at {path}: {os.strerror(error.errno or 0).lower()}; {remedy}") from error
    return listener


def is_of_this_network(path: Path) -> bool:
    """Tell whether who listens on the Unix socket at a path does so in this network namespace (namespaces(7)). If in doubt, yes.

    The kernel lists the Unix sockets of each network namespace, although all see the same files.
    """
    try:
        lines = Path("/proc/net/unix").read_bytes().split(b"\n")
    except OSError:
        return True
    listens = b" 00010000 "  # __SO_ACCEPTCON: a connection to a socket of another namespace has the path, too
    return any(line.endswith(b" " + os.fsencode(path)) and listens in line for line in lines)


def has_listener(path: Path) -> bool:
    """Tell whether a process listens on the Unix socket at a path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR, errno.EACCES)
        except OSError:  # too long
            return False


def remove_stale_socket(path: Path) -> str:
    """Remove the socket of a server that no longer runs. Return what else is at the path, or an empty string."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return ""
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
        return "something else is there"
    if has_listener(path):
        return "another server listens there"
    os.unlink(path)
    return ""


# -- the link between server and client: both prove that they have the same token, and never send it --

LINK_VERSION = 1  # of the calls between server and client
# Those that this version can speak: a client says it in /hello or as it joins. What the other side may ignore, such as a new field or
# header, needs no new number. A new number is spoken beside the one before, so that neighbouring versions work together.
LINK_VERSIONS = (1,)
OLD_SERVER_LOG_S = 3600.0  # how often a client logs that a server of version 0.1.0 calls it
SESSIONS_LIMIT = 1000  # for one client: each start and each token of a server makes one
WINDOW = 4096  # requests of one session that may overtake each other
SIGNED_OF_ANSWER = ("Content-Length", "Content-Type", "Repr-Digest", "ETag", "Content-Range", "X-Next-Offset", "Retry-After")
PROOF_SHAPE = re.compile(r"Joborch nonce=([0-9a-f]{32}), peer=([0-9a-f]{32}), n=([0-9]{1,15}), mac=([0-9a-f]{64})", re.IGNORECASE)


def check_protocols(spoken: Any) -> None:
    """Raise NothingSent if a client speaks none of our versions of the link. Before 1.0 clients did not say what they speak."""
    known = [each for each in spoken if type(each) is int] if isinstance(spoken, list) else []
    if spoken is None or set(known).intersection(LINK_VERSIONS):
        return
    theirs, ours = (" and ".join(map(str, sorted(each))) or "none" for each in (known, LINK_VERSIONS))
    raise NothingSent(f"speaks protocol {theirs} and this server protocol {ours}: replace the older joborch.pyz of the two; its jobs wait")


@functools.lru_cache(maxsize=64)
def link_key(token: str, purpose: bytes = b"joborch link 1") -> bytes:
    """Derive a key from a token: that of server and client, or of sessions. It is slow on purpose: nobody must guess a token from MACs."""
    return hashlib.pbkdf2_hmac("sha256", token.encode(), purpose, 10_000)


def mask(key: bytes, salt: bytes, data: bytes) -> bytes:
    """Encrypt or decrypt up to 64 bytes with a key of a link. The salt must be random, and new each time."""
    stream = hmac.new(key, b"joborch mask 1" + salt, "sha512").digest()
    return bytes(each ^ other for each, other in zip(data, stream))


class Proof(NamedTuple):
    """The data that proves one request of a server and the answer to it."""

    key: bytes
    server: str  # nonces: random, one for each start of a process, not secret
    client: str
    number: int  # each is used once
    method: str
    target: str

    def mac(self, kind: str, *said: Any) -> str:
        """Return the MAC (HMAC-SHA-256, hex) of these values, encoded as JSON so that no two lists look alike."""
        text = json.dumps([kind, LINK_VERSION, self.server, self.client, self.number, self.method, self.target, *said])
        return hmac.new(self.key, text.encode(), "sha256").hexdigest()

    def of_request(self, headers: Mapping[str, str], length: int) -> str:
        """Return the MAC of this request. It covers the headers named X-Joborch-... and the body's type."""
        said = {name.lower().replace("_", "-"): value for name, value in headers.items()}
        ours = sorted((name, value) for name, value in said.items() if name.startswith("x-joborch-"))
        return self.mac("request", length, said.get("content-type", ""), ours)

    def of_answer(self, status: int, headers: Mapping[str, str] | http.client.HTTPMessage) -> str:
        """Return the MAC of the answer to this request. It covers the body by the length and digest in the answer's headers."""
        return self.mac("answer", status, *(headers.get(name, "") for name in SIGNED_OF_ANSWER))

    def is_of_answer(self, status: int, headers: Mapping[str, str] | http.client.HTTPMessage) -> bool:
        """Tell whether an answer shows the MAC of who knows the key."""
        return hmac.compare_digest(headers.get(MAC_HEADER, "").encode(), self.of_answer(status, headers).encode())

    def authorization(self, headers: Mapping[str, str], length: int) -> str:
        mac = self.of_request(headers, length)
        return f"Joborch nonce={self.server}, peer={self.client}, n={self.number}, mac={mac}"


class Session:
    """A server's side of the link to one start of a client: it numbers the requests."""

    def __init__(self, key: bytes, client: str) -> None:
        self.key, self.server, self.client = key, secrets.token_hex(16), client
        self.numbers = itertools.count(1)  # next() is atomic

    def proof(self, method: str, target: str) -> Proof:
        return Proof(self.key, self.server, self.client, next(self.numbers), method, target)


class ProofReader:
    """A client's side of the link: it recognises a server by the token and accepts each request once."""

    again = "this client was restarted, or has too many sessions: call GET /hello again"
    unknown = "the token is wrong, or the request was changed on its way"

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.lock = tokens, threading.Lock()
        self.nonce = secrets.token_hex(16)
        self.seen: dict[tuple[str, bytes], tuple[int, int]] = {}  # by server nonce and key: the highest number, a bit for each lower one

    def keys(self, headers: Mapping[str, str]) -> Iterable[bytes]:
        """Return the keys that may prove a request with these headers."""
        return map(link_key, self.tokens)

    def accept(self, headers: Mapping[str, str], method: str, target: str, length: int) -> Proof:
        """Return the proof of a request. Raises HttpError 401 if it is wrong, repeated, or meant for an earlier start."""
        shown = PROOF_SHAPE.fullmatch(headers.get("AUTHORIZATION", "").strip())
        if shown is None:
            raise unproven("the proof is malformed")
        server, client, number, mac = shown[1].lower(), shown[2].lower(), int(shown[3]), shown[4].lower()
        if client != self.nonce:
            raise unproven(self.again, self.nonce)
        for key in self.keys(headers):
            proof = Proof(key, server, client, number, method, target)
            if hmac.compare_digest(proof.of_request(headers, length), mac):
                self.take(proof)
                return proof
        raise unproven(self.unknown)

    def take(self, proof: Proof) -> None:
        """Note a request's number in a sliding window (RFC 4303, 3.4.3). Raises HttpError 401 if the number was used before."""
        session = (proof.server, proof.key)
        with self.lock:
            if session not in self.seen and len(self.seen) >= SESSIONS_LIMIT:
                self.seen.clear()  # proofs with the old nonce are invalid from now on, so none can be repeated
                self.nonce = secrets.token_hex(16)
                raise unproven(self.again, self.nonce)
            highest, bits = self.seen.get(session, (0, 0))
            if proof.number > highest:
                bits, highest = bits << (proof.number - highest) if proof.number - highest < WINDOW else 0, proof.number
            bit = 1 << (highest - proof.number) if highest - proof.number < WINDOW else 0
            if not bit or bits & bit:
                raise unproven("this request was received before, or is far too late")
            self.seen[session] = (highest, (bits | bit) & ((1 << WINDOW) - 1))


def unproven(message: str, nonce: str = "") -> HttpError:
    """Return the error for a server that has not proven its identity; it may use `nonce` to do so."""
    return HttpError(401, message, WWW_Authenticate='Joborch realm="joborch"', **({"X_Joborch_Nonce": nonce} if nonce else {}))


def far_uid(connection: socket.socket) -> int | None:
    """Return the user id of the process that an outgoing connection has reached on this machine, or None if it is unknown.

    Until the connection is accepted, no process holds the other end; then the user of the listening socket counts.
    """
    peer, here = connection.getpeername()[:2], connection.getsockname()[:2]
    wild = "::" if ":" in peer[0] else "0.0.0.0"
    uid = tcp_uid(peer, here)
    for listener in (peer, (wild, peer[1]), ("::", peer[1])) if uid is None else ():
        seen = find_socket(listener, ("::" if ":" in listener[0] else wild, 0))
        if seen is not None and seen.state == LISTEN and seen.inode:
            uid = seen.uid
            break
    # Only if the connection is still open: else this may be a later socket with the same ends.
    return uid if connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED else None


def client_token_file() -> Path | None:
    """Return the file in which this user's client on this machine keeps its token, or None if the user has no home."""
    try:
        return Path(default_folder("config")) / "client-token"
    except ConfigError:
        return None


def token_place(config: Config) -> Path | None:
    """Return the file of the token that a client created: JOBORCH_TOKEN_FILE, or a file in its user's home. None if there is neither."""
    return Path(config.token_file) if config.token_file else client_token_file()


def token_remedy(config: Config) -> str:
    """Return what to do if a client cannot store its token in the usual place."""
    return f"set JOBORCH_TOKEN_FILE={config.data_path}/token to create one there, or set JOBORCH_TOKEN"


# == 2. Tokens ==  Secret scanners find a token by its beginning, and its end shows whether all of it was copied.

TOKEN_PREFIX = "joborch_"
TOKEN_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TOKEN_SHAPE = re.compile(TOKEN_PREFIX + "([0-9A-Za-z]{40})([0-9a-f]{8})")


def new_token() -> str:
    """Return a new token: the prefix, 40 random letters and digits (238 bits), and their CRC-32 in hex."""
    secret = "".join(secrets.choice(TOKEN_LETTERS) for _ in range(40))
    return f"{TOKEN_PREFIX}{secret}{zlib.crc32(secret.encode()):08x}"


def is_whole_token(text: str) -> bool:
    """Tell whether a text is a complete token, as `new_token` makes them."""
    found = TOKEN_SHAPE.fullmatch(text)
    return found is not None and found[2] == f"{zlib.crc32(found[1].encode()):08x}"
