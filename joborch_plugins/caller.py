"""The library for scripts: `Jobs` submits jobs to a joborch server, waits for them and fetches their results.

    from joborch import Jobs

    job = Jobs().submit(["run.sh", "2oob.pdb"])
    print(job.read("summary.txt").decode())

It needs only the standard library, and nothing else of joborch. Calls that were cut off are repeated for `patience_s` seconds;
an upload carries an Idempotency-Key, so a repeated one starts no second job. Several threads may use one `Jobs` object. The
commands of `joborch` for users use this library.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import http.client
import io
import json
import os
import socket
import stat
import threading
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable, NamedTuple, Union
from urllib.parse import quote, urlencode, urlsplit

if TYPE_CHECKING:  # imported where it is used, because it is slow
    import zipfile

Content = Union[bytes, str, "os.PathLike[str]"]  # bytes, a text, or the path of a file
Files = Union[str, "os.PathLike[str]", Sequence[Union[str, "os.PathLike[str]"]], Mapping[str, Content]]
Progress = Callable[[str, int, int], None]  # "sent" or "fetched", the bytes so far, all bytes

ENDED = ("Completed", "Failed", "Invalid", "Killed", "Cleaned")
DEFAULT_SERVER = "http://127.0.0.1:5000"
CHUNK_BYTES = 1 << 20
NAME_BYTES = 255  # the longest name of a file
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 75.0
WAIT_S = 45.0  # of a long poll: the longest that a server allows
GLANCE_S = 2.0  # of a long poll for the first of many jobs, so that the end of another is noticed soon
IDS_AT_ONCE = 500  # in one request: gateways refuse long URLs
ROWS_A_S = 500  # jobs to look at in a second: of many jobs, several ends are noticed together
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # between two attempts to reach a server
ATTEMPT_LINE = "\n[joborch: attempt "  # what a server writes before the output of a further attempt
OWN_TAR = "files.tar"  # the name of a tar that this library makes of files
AT_ONCE = 8  # uploads of `map` that are under way at the same time


# == 1. Errors ==  Every error of a server or a job is a `JobsError`.


class JobsError(Exception):
    """The base of all errors of this library."""


class ServerUnreachable(JobsError):
    """The server gave no usable answer within `patience_s`."""


class Refused(JobsError):
    """The server refused the request: `status` is the HTTP status, `field` what to change, or None."""

    def __init__(self, message: str, status: int, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field


class Damaged(JobsError):
    """The received data is not what the server sent, or a file changed while it was sent."""


class JobFailed(JobsError):
    """A job ended without a result: `job` is the job, `reason` and `cause` say why, `exit_code` is that of its script."""

    def __init__(self, job: Job) -> None:
        said = job.facts
        super().__init__(f"job {job.id} is {said['status']}: {said.get('reason') or 'the reason is unknown'}")
        self.job, self.reason, self.cause, self.exit_code = job, said.get("reason"), said.get("cause"), said.get("exit_code")

    def logs(self) -> str:
        """Return what the job wrote to standard error, or to standard output if that is empty."""
        return self.job.logs("stderr") or self.job.logs()


# == 2. Server ==  Calls one server over TCP or its Unix socket, and repeats calls that were cut off.


class Head:
    """The lines of an answer's head. http.client would take a head that was cut off for a whole one, without its other headers."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.has_begun = file, False

    def readline(self, limit: int = -1) -> bytes:
        """Return the next line. Raises ConnectionResetError if the head is cut off."""
        line = self.file.readline(limit)
        if not line.endswith(b"\n") and (line or self.has_begun) and len(line) != limit:
            raise ConnectionResetError("the answer was cut off")
        self.has_begun = True
        return line

    def close(self) -> None:
        """Close the answer."""
        self.file.close()


class WholeAnswer(http.client.HTTPResponse):
    """An answer whose head arrived to its end."""

    def begin(self) -> None:
        """Read the head. Raises OSError, HTTPException."""
        answer: Any = self  # http.client's own field
        file = answer.fp
        answer.fp = Head(file)
        try:
            super().begin()
        finally:
            answer.fp = file if answer.fp is not None else None  # http.client closes what is no HTTP


class Closing(http.client.HTTPConnection):
    """A connection that is closed together with its owner, without a warning."""

    response_class = WholeAnswer

    def __del__(self) -> None:
        self.close()


class TlsConnection(Closing, http.client.HTTPSConnection):
    """A connection by HTTPS."""


class UnixConnection(Closing):
    """A connection to the Unix socket of a server on this machine."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_TIMEOUT_S)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket. Raises OSError."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


FILE_LIMIT = 64 << 10  # characters of a file with a token: a path may be that of a device without end


def own_socket(port: int) -> str | None:
    """Return the path of the default Unix socket of this user's server on `port`, or None if there is none.

    Only this user can listen there, but any user of the machine could listen on the port and get the files.
    """
    for folder in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/tmp/joborch-{os.getuid()}"):
        for name in (f"joborch-{port}.sock", f"joborch-{port}-{os.stat('/proc/self/ns/net').st_ino}.sock"):
            path = os.path.join(folder, name)
            try:
                owner, kind = os.lstat(folder), os.lstat(path)
            except OSError:
                continue
            is_own = os.path.isabs(folder) and owner.st_uid == os.getuid() and not owner.st_mode & 0o022
            if is_own and stat.S_ISSOCK(kind.st_mode) and is_of_this_network(path):
                return path
    return None


def is_of_this_network(path: str) -> bool:
    """Tell whether somebody listens on a Unix socket in this network namespace: the same port of another one is another server's.

    The kernel lists the Unix sockets of each network namespace, although all see the same files. If in doubt, the answer is yes.
    """
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as file:
            return any(line.rstrip("\n").endswith(f" {path}") and " 00010000 " in line for line in file)  # __SO_ACCEPTCON
    except OSError:
        return True


def token_of_environment() -> str:
    """Return the caller's token: JOBORCH_TOKEN, or the content of JOBORCH_TOKEN_FILE. Raises JobsError if that is unreadable."""
    path, token = os.environ.get("JOBORCH_TOKEN_FILE", ""), os.environ.get("JOBORCH_TOKEN", "")
    if not token and path:
        try:
            with open(os.path.expanduser(path), encoding="utf-8") as file:
                token = file.read(FILE_LIMIT).strip()
        except (OSError, UnicodeDecodeError) as error:
            why = (getattr(error, "strerror", None) or str(error)).lower()
            raise JobsError(f"JOBORCH_TOKEN_FILE {path} cannot be read ({why}): give a file with the token") from error
    return token.split(",")[0].strip()


class Login(NamedTuple):
    """What `joborch login` stored: the server, its token, and the number of the user or None."""

    server: str
    token: str = ""
    user: int | None = None


def login_file() -> str:
    """Return the path of the file of `joborch login`, in the user's config folder (XDG); an empty string if there is no such folder."""
    folder = os.environ.get("XDG_CONFIG_HOME", "").strip() or os.path.expanduser("~/.config")
    return os.path.join(folder, "joborch", "login.json") if os.path.isabs(folder) else ""


def stored_login(url: str) -> Login:
    """Return the login for the server at `url`, or, if that is empty, for the one that is stored. Raises JobsError for an unsafe file.

    A token goes only to the server that it was stored for.
    """
    path = login_file()
    try:
        with open(path, encoding="utf-8") as file:
            state = os.fstat(file.fileno())
            said = json.loads(file.read(FILE_LIMIT))
        if state.st_uid not in (0, os.geteuid()) or state.st_mode & 0o077:
            raise JobsError(f"{path} is open to other users: delete it, get a new token, and run joborch login again")
        found = Login(str(said["server"]), str(said["token"]), None if said["user"] is None else int(said["user"]))
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # none, or it is another user's: HOME may be that of another
        return Login(url or DEFAULT_SERVER)
    except OSError as error:
        raise JobsError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise JobsError(f"{path} is damaged: run joborch login again") from error
    return found if url in ("", found.server) else Login(url)


class Server:
    """One server, and how to call it. `on_trouble` gets the reason why a call is repeated, `on_progress` the state of long transfers."""

    def __init__(self, url: str, token: str, patience_s: float) -> None:
        self.url, self.patience_s = url, patience_s
        self.on_trouble: Callable[[str], None] = lambda _: None
        self.on_progress: Progress = lambda *_: None
        self.on_warning: Callable[[str], None] = warn
        if not all("!" <= each <= "~" for each in token):
            raise JobsError("the token has a blank, a line end or another character that no token has: copy it again, whole")
        self.headers = {"User-Agent": "joborch", **({"Authorization": f"Bearer {token}"} if token else {})}
        self.kept = threading.local()  # a connection for each thread
        self.connections: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()
        self.aborted = False
        self.path, self.prefix, self.secure = "", "", False
        if url.startswith(("unix:", "/")):
            self.path = os.path.abspath(url.removeprefix("unix:"))
            return
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username is not None:
            raise JobsError(f"the server is {url!r}: give its URL, as in http://127.0.0.1:5000 or unix:/run/joborch.sock")
        try:
            port = parts.port
        except ValueError as error:
            raise JobsError(f"the server is {url!r}: a port is a number up to 65535") from error
        self.host, self.secure = parts.hostname, parts.scheme == "https"
        self.port = port or (443 if self.secure else 80)
        self.prefix = parts.path.rstrip("/")
        if not token and not self.secure and self.host in ("127.0.0.1", "::1", "localhost"):
            self.path = own_socket(self.port) or ""

    def connect(self) -> http.client.HTTPConnection:
        """Return a new connection. Raises OSError."""
        made: http.client.HTTPConnection
        if self.path:
            made = UnixConnection(self.path)
            try:
                made.connect()
            except OSError:
                if not hasattr(self, "host"):
                    raise
                self.path = ""  # left by a server that was killed
                return self.connect()
        elif self.secure:
            import ssl

            ca_file = os.environ.get("JOBORCH_CA_FILE") or None
            try:
                trusted = ssl.create_default_context(cafile=ca_file)
            except OSError as error:
                raise JobsError(f"JOBORCH_CA_FILE {ca_file} cannot be used ({plain_text(error)}): give a file with certificates") from error
            made = TlsConnection(self.host, self.port, timeout=CONNECT_TIMEOUT_S, context=trusted)
            made.connect()
        else:
            made = Closing(self.host, self.port, timeout=CONNECT_TIMEOUT_S)
            made.connect()
        made.sock.settimeout(READ_TIMEOUT_S)
        return made

    def close(self) -> None:
        """Close this thread's connection."""
        connection = getattr(self.kept, "connection", None)
        if connection is not None:
            self.kept.connection = None
            connection.close()

    def abort(self) -> None:
        """Make the calls of all threads fail, now and later."""
        self.aborted = True
        for connection in list(self.connections):
            with contextlib.suppress(OSError, AttributeError):  # it is closed already
                connection.sock.shutdown(socket.SHUT_RDWR)

    def once(self, method: str, target: str, headers: Mapping[str, str], body: Upload | None) -> http.client.HTTPResponse:
        """Send one request and return its answer. If that is read to its end, the connection is kept. Raises OSError, HTTPException."""
        used = getattr(self.kept, "connection", None)
        if used is not None and self.kept.response is not None and not self.kept.response.isclosed():
            self.close()  # the last answer was not read to its end
            used = None
        connection = self.kept.connection = used or self.connect()
        self.connections.add(connection)
        if self.aborted:
            raise ConnectionAbortedError("the program ends")
        self.kept.response = None
        try:
            try:
                send(connection, method, self.prefix + target, {**self.headers, **headers}, body, self.on_progress)
            except (BrokenPipeError, ConnectionResetError):
                if body is None:
                    raise
                # It answered before it had read everything: read the answer.
            self.kept.response = connection.getresponse()
        except BaseException as error:
            self.close()
            if used is not None and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                return self.once(method, target, headers, body)  # it had closed the connection meanwhile
            raise
        response: http.client.HTTPResponse = self.kept.response
        return response

    def open(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: Upload | None = None
    ) -> http.client.HTTPResponse:
        """Repeat a request until it is answered. Raises Refused for an error, ServerUnreachable after `patience_s`."""
        deadline, pause_s = time.monotonic() + self.patience_s, FIRST_PAUSE_S
        while True:
            try:
                response = self.once(method, target, headers or {}, body)
                if response.status < 300:
                    return response
                error: JobsError = refusal(response)
                repeated = response.status in (429, 502, 503, 504)
            except (OSError, http.client.HTTPException) as cut:
                error, repeated = ServerUnreachable(unreachable_text(self.url, cut)), True
                error.__cause__ = cut
            if not repeated or self.aborted or time.monotonic() + pause_s > deadline:
                raise error
            self.on_trouble(str(error))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def read(self, method: str, target: str, headers: Mapping[str, str] | None = None, body: Upload | None = None) -> Answer:
        """Send a request and return its whole answer. If the answer is cut off, repeat the request."""
        deadline = time.monotonic() + self.patience_s
        while True:
            response = self.open(method, target, headers, body)
            try:
                return Answer(response.status, response.headers, response.read())
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if time.monotonic() > deadline:
                    raise ServerUnreachable(unreachable_text(self.url, error)) from error
            except BaseException:
                self.close()
                raise

    def ask(self, method: str, target: str, headers: Mapping[str, str] | None = None, body: Upload | None = None) -> dict[str, Any]:
        """Send a request and return the JSON object in its answer. Raises ServerUnreachable if there is none."""
        answer = self.read(method, target, headers, body)
        try:
            said = json.loads(answer.body)
        except ValueError as error:
            raise ServerUnreachable(f"{self.url} does not answer like a joborch server: check the URL") from error
        if not isinstance(said, dict):
            raise ServerUnreachable(f"{self.url} does not answer like a joborch server: check the URL")
        return said

    def queued(self, target: str, key: str | None, form: Upload | None) -> Job:
        """Have a job queued, once; return it. What the server ignored, such as a field that it does not know, is a warning."""
        try:
            job = Job(self, self.ask("POST", target, {"Idempotency-Key": key or os.urandom(16).hex()}, form))
        except Refused as error:
            if error.field == "archive":  # the caller has sent files or a folder, and knows of no tar
                raise Refused(str(error).replace(f"archive {OWN_TAR!r}: ", "", 1), error.status) from None
            raise
        for warning in job.facts.get("warnings", []):
            self.on_warning(str(warning))
        return job


def warn(text: str) -> None:
    """Warn the caller of this library."""
    import warnings

    warnings.warn(text, stacklevel=4)


class Answer:
    """A whole answer: its status, headers and body."""

    def __init__(self, status: int, headers: http.client.HTTPMessage, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body


def unreachable_text(url: str, error: Exception) -> str:
    """Say in one sentence why a server gave no answer, and what to do."""
    if isinstance(error, ConnectionRefusedError) or (isinstance(error, FileNotFoundError) and url.startswith(("unix:", "/"))):
        return f"no server answers at {url}: start one with `joborch server`, or name another with `joborch login URL`"
    if isinstance(error, socket.gaierror):
        return f"the name in {url} is not known here ({error.strerror}): check the URL"
    if hasattr(error, "verify_message"):  # an ssl.SSLCertVerificationError, whose import would take time
        return f"the certificate of {url} is not trusted here ({error.verify_message}): check the URL, or set JOBORCH_CA_FILE"
    if isinstance(error, TimeoutError):
        return f"{url} does not answer in time: check the URL, or try again later"
    return f"{url} cannot be reached ({plain_text(error)}): check the URL, or try again later"


def plain_text(error: Exception) -> str:
    """Return why a call failed."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]


def refusal(response: http.client.HTTPResponse) -> Refused:
    """Return the error in an answer. A gateway in front of the server may have sent a page instead of JSON."""
    try:
        said = json.loads(response.read(CHUNK_BYTES) or b"{}")
        message, field = str(said["message"]), said.get("field")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, http.client.HTTPException):
        place = f" to {response.headers['Location']}" if response.headers.get("Location") else ""
        message, field = f"the server, or a gateway in front of it, answered {response.status} {response.reason}{place}", None
    return Refused(message, response.status, field)


def send(
    connection: http.client.HTTPConnection, method: str, target: str, headers: Mapping[str, str], body: Upload | None, progress: Progress
) -> None:
    """Write one request to a connection. Raises OSError if it is cut off."""
    connection.putrequest(method, target, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if body is None:
        if method not in ("GET", "HEAD"):
            connection.putheader("Content-Length", "0")
        connection.endheaders()
        return
    connection.putheader("Content-Type", body.content_type)
    connection.putheader("Content-Length", str(body.size))
    connection.endheaders(body.small)
    sent = 0
    for chunk in () if body.small is not None else body.chunks():
        connection.send(chunk)
        sent += len(chunk)
        progress("sent", sent, body.size)


# == 3. Uploads ==  A form is read from its files while it is sent, and can be sent again.


def rights_of(content: Content) -> int:
    """Return the permissions of a file to send. A script that is given as a text can be executed."""
    if isinstance(content, (bytes, str)):
        return 0o755 if content[:2] in (b"#!", "#!") else 0o644
    return os.stat(content).st_mode & 0o777


class Upload:
    """The body of an upload: a form with files and fields. A form has no permissions, so programs make it one with a tar."""

    def __init__(self, files: Mapping[str, Content], fields: Mapping[str, object]) -> None:
        boundary = "joborch-" + os.urandom(16).hex()
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self.pieces: list[tuple[bytes | str, int]] = []  # bytes, or the path of a file; their size
        for name, value in fields.items():
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
            self.add(head.encode() + str(value).encode("utf-8", "surrogateescape") + b"\r\n")
        programs = [name for name, content in files.items() if not isinstance(content, (bytes, str)) and rights_of(content) & 0o100]
        if "run.sh" in files and programs:  # with run.sh on top, no folder is left out
            self.add_tar(f'--{boundary}\r\nContent-Disposition: form-data; name="archive"; filename="{OWN_TAR}"\r\n\r\n', files)
            files = {}
        for name, content in files.items():
            exact = quote(os.fsencode(name), safe="/")
            self.add(f"--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename*=utf-8''{exact}\r\n\r\n".encode())
            self.add(content)
            self.add(b"\r\n")
        self.add(f"--{boundary}--\r\n".encode())
        self.size = sum(size for _, size in self.pieces)
        self.small = b"".join(self.chunks()) if self.size <= CHUNK_BYTES else None

    def add_tar(self, head: str, files: Mapping[str, Content]) -> None:
        """Add a part with a tar of these files."""
        import tarfile

        self.add(head)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            at = len(self.pieces)
            self.add(content)
            member.size, member.mode = self.pieces[at][1], rights_of(content)
            begin = member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            self.pieces.insert(at, (begin, len(begin)))
            self.add(bytes(-member.size % tarfile.BLOCKSIZE))
        self.add(bytes(2 * tarfile.BLOCKSIZE))
        self.add(b"\r\n")

    def add(self, content: Content) -> None:
        """Add bytes, a text or a file."""
        if isinstance(content, (bytes, str)):
            data = content.encode() if isinstance(content, str) else content
            self.pieces.append((data, len(data)))
        else:
            self.pieces.append((os.fspath(content), os.stat(content).st_size))

    def chunks(self) -> Iterator[bytes]:
        """Yield the body. Raises Damaged if the size of a file has changed."""
        for piece, size in self.pieces:
            if isinstance(piece, bytes):
                yield piece
                continue
            left = size
            with open(piece, "rb") as file:
                while chunk := file.read(min(CHUNK_BYTES, left)):
                    left -= len(chunk)
                    yield chunk
                if left or file.read(1):
                    raise Damaged(f"{piece} changed while it was sent: try again when no program writes to it")


def text_of(value: object) -> str:
    """Return the value of a field or filter as a server takes it: lists with commas, jobs by their ids, times, and spans in seconds."""
    if isinstance(value, Job):
        return str(value.id)
    seconds, instant = getattr(value, "total_seconds", None), getattr(value, "timestamp", None)  # importing datetime would take time
    if seconds is not None:
        return f"{seconds():.0f}s"
    if instant is not None:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(instant()))
    is_several = isinstance(value, Iterable) and not isinstance(value, (str, bytes))
    return ",".join(map(text_of, value)) if is_several else str(value)  # type: ignore[call-overload]


def texts_of(values: Mapping[str, object]) -> dict[str, str]:
    """Return fields or filters as a server takes them, without those that are None."""
    return {name: text_of(value) for name, value in values.items() if value is not None}


def files_of(files: Files) -> dict[str, Content]:
    """Return the files to send, by their path in the job's folder. Raises JobsError if one cannot be sent."""
    if isinstance(files, Mapping):
        for name, content in files.items():
            if not isinstance(content, (bytes, str, os.PathLike)):
                raise JobsError(f"the content of {name} is of type {type(content).__name__}: give a text, bytes or a Path")
        return dict(files)
    if not isinstance(files, (str, os.PathLike, Sequence)):
        raise JobsError(f"{files!r} is no file: give paths, or a mapping from names to contents, as in {{'number.txt': '1'}}")
    paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    found: dict[str, Path] = {}
    for path in [os.fspath(path) for path in paths]:
        try:
            inside = {os.path.basename(path): path} if not os.path.isdir(path) else dict(files_below(path, "", ()))
            for name, source in inside.items():
                if not stat.S_ISREG(os.stat(source).st_mode):
                    raise JobsError(f"{source} is neither a file nor a folder: only these can be sent")
                if name in found:
                    raise JobsError(f"{source} and {found[name]} would both be {name} in the job's folder: rename one")
                found[name] = Path(source)
        except OSError as error:
            raise JobsError(f"{error.filename or path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    return dict(found)


def files_below(folder: str, prefix: str, above: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yield all files below a folder, with their paths in the job's folder. Links are followed. Raises OSError; JobsError for a loop."""
    found = os.stat(folder)
    here = (found.st_dev, found.st_ino)
    if here in above:
        raise JobsError(f"{folder} is a link to a folder above it: remove the link")
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from files_below(entry.path, f"{prefix}{entry.name}/", (*above, here))
            else:
                yield prefix + entry.name, entry.path


# == 4. Jobs ==  What a script calls: `Jobs` for the jobs of one user, `Job` for one of them.


class Job:
    """One job. `facts` is the last answer of GET /jobs/ID; `input` is the input that `map` started it for."""

    def __init__(self, server: Server, facts: dict[str, Any]) -> None:
        self.server, self.facts, self.input = server, facts, None  # type: Server, dict[str, Any], Any
        self.id = int(facts["id"])

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.facts['status']}>"

    @property
    def status(self) -> str:
        """The last known status, as in "Running"."""
        return str(self.facts["status"])

    @property
    def ended(self) -> bool:
        """Whether it has ended, in any state."""
        return self.status in ENDED

    @property
    def reason(self) -> str:
        """Why it is in this status, in a sentence."""
        return str(self.facts.get("reason") or "")

    def refresh(self) -> Job:
        """Get the job's present state from the server."""
        self.facts = self.server.ask("GET", f"/jobs/{self.id}")
        return self

    def wait(self, timeout_s: float | None = None) -> Job:
        """Wait until the job has ended, in any state. Raises TimeoutError after `timeout_s` seconds."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.ended:
            left_s = WAIT_S if end is None else min(WAIT_S, end - time.monotonic())
            if left_s <= 0:
                raise TimeoutError(f"job {self.id} is still {self.status} after {timeout_s:g} s")
            self.glance(left_s)
        return self

    def glance(self, wait_s: float) -> None:
        """Wait for the end, for at most `wait_s` seconds."""
        began = time.monotonic()
        self.facts = self.server.ask("GET", f"/jobs/{self.id}?wait={wait_s:.1f}")
        if not self.ended and time.monotonic() - began < min(0.5, wait_s):
            time.sleep(min(0.5, wait_s))  # too many callers wait at the server

    def check(self) -> Job:
        """Wait for the end. Raises JobFailed if the job has no result."""
        self.wait()
        if self.status != "Completed":
            raise JobFailed(self)
        return self

    def cancel(self) -> Job:
        """Stop the job and return when none of its processes runs. If its client is unreachable, the job is stopped later."""
        try:
            self.server.ask("POST", f"/terminate/{self.id}")
        except Refused as error:
            if error.status != 409:  # it had already ended
                raise
        return self.refresh()

    def retry(self, key: str | None = None, files: Files | None = None, **fields: Any) -> Job:
        """Queue a new job with the files and fields of this one, except those given here; return it.

        `files` and `fields` are those of `Jobs.submit`. The same `key` gives the same new job. Raises Refused (410) if the files of
        this job are deleted.
        """
        form = Upload(files_of(files or {}), texts_of(fields)) if files or fields else None
        return self.server.queued(f"/jobs/{self.id}/retry", key, form)

    def delete(self) -> dict[str, Any]:
        """Stop the job and delete its files, name, reason and texts, also at its client; return what the server says.

        `pending` in it names clients that do not answer now: there it is deleted later.
        """
        return self.server.ask("DELETE", f"/jobs/{self.id}")

    def redeliver(self) -> Job:
        """Let the server send the job's webhooks again. Raises Refused (409) if there are none."""
        self.server.ask("POST", f"/jobs/{self.id}/redeliver")
        return self.refresh()

    def logs(self, stream: str = "stdout") -> str:
        """Return what the script wrote so far to "stdout" or "stderr"."""
        return b"".join(self.output(stream)).decode("utf-8", "replace")

    def output(self, stream: str = "stdout", offset: int = 0) -> Iterator[bytes]:
        """Yield what the script wrote so far, from `offset` on."""
        while True:
            answer = self.server.read("GET", f"/jobs/{self.id}/logs?stream={stream}&offset={offset}")
            if not answer.body:
                return
            yield answer.body
            offset = int(answer.headers["X-Next-Offset"])

    def follow(self, stream: str = "stdout") -> Iterator[str]:
        """Yield the script's output until the job has ended. After a cut or a restart of the server, continue where it stopped."""
        attempt, offset = self.refresh().facts["attempt"], 0
        while True:
            if self.facts["attempt"] != attempt:
                attempt, offset = self.facts["attempt"], 0
                yield f"{ATTEMPT_LINE}{attempt}]\n"
            target = f"/jobs/{self.id}/logs?stream={stream}&follow=1&offset={offset}"
            response = self.server.open("GET", target, {"Accept": "text/event-stream"})
            try:
                for event in events(response):
                    if event.get("event") == "end":
                        self.refresh()
                        return
                    if "id" in event:
                        offset, text = int(event["id"]), event.get("data", "")
                        if offset == 0 and text.startswith(ATTEMPT_LINE):
                            attempt = int(text[len(ATTEMPT_LINE) :].rstrip("]\n"))
                        yield text
            except (OSError, http.client.HTTPException) as error:
                self.server.on_trouble(unreachable_text(self.server.url, error))
            finally:
                self.server.close()
            self.refresh()

    # -- results --

    def files(self, partial: bool = False) -> list[dict[str, Any]]:
        """Return the files and links of the result: `path`, `size`, `mode`, `mtime`. If `partial`, those that exist now."""
        if not partial:
            self.check()
        found, query = list[dict[str, Any]](), "limit=1000"
        while query:
            page = self.server.ask("GET", f"/jobs/{self.id}/files?{query}")
            found += page["files"]
            query = f"limit=1000&after={page['next']}" if page["next"] else ""
        return found

    def read(self, path: str, partial: bool = False) -> bytes:
        """Return one file of the result, without fetching the rest: see `copy`."""
        with io.BytesIO() as target:
            self.copy(path, target, partial)
            return target.getvalue()

    def copy(self, path: str, target: IO[bytes], partial: bool = False) -> None:
        """Write one file of the result to `target`, without fetching the rest. If `partial`, the job need not have ended.

        After a cut it continues where it stopped. Raises FileNotFoundError if there is no such file, JobFailed if there is no
        result, and Damaged if the data that arrives is not what the server has.
        """
        if not partial:
            self.check()
        copy_file(self, path, target)

    def save(self, path: str, target: str | os.PathLike[str], partial: bool = False) -> Path:
        """Fetch one file of the result as the file `target`, without fetching the rest; return its path.

        It resumes what an earlier call began, and the file appears when it is complete. Raises what `copy` raises.
        """
        if not partial:
            self.check()
        said = self.facts.get("result")
        version = hashlib.sha256(repr((said["sha256"], path)).encode("utf-8", "surrogateescape")).hexdigest() if said else ""
        with arriving(os.fspath(target), version, f"{path} of job {self.id}") as file:
            # The last byte is fetched again, so that a request has something to ask for.
            file.truncate(max(0, file.seek(0, os.SEEK_END) - 1))
            file.seek(0)
            have, crc = 0, 0
            while chunk := file.read(CHUNK_BYTES):
                have, crc = have + len(chunk), zlib.crc32(chunk, crc)
            try:
                copy_file(self, path, file, have, crc)
            except Damaged:
                file.truncate(0)  # the next call begins again
                raise
        return Path(target)

    def result(self, path: str | os.PathLike[str], partial: bool = False) -> Path:
        """Fetch the result as a ZIP file at `path`, and return the path. It resumes what an earlier call began.

        The file appears when it is complete and its SHA-256 is right. Raises JobFailed if there is no result, unless `partial`
        requests the present files, and Damaged if the data that arrives is not what the server has.
        """
        if not partial:
            self.check()
        with fetched(self, os.fspath(path)):
            return Path(path)

    def unpack(self, folder: str | os.PathLike[str], partial: bool = False) -> Path:
        """Fetch the result and unpack it as `folder`, which must be missing or empty, and appears when it is complete.

        Raises JobFailed and Damaged as `result` does, and FileExistsError if there are files in `folder`.
        """
        target = os.path.abspath(os.fspath(folder))
        refuse_filled(target)
        if not partial:
            self.check()
        os.makedirs(os.path.dirname(target), exist_ok=True)
        zipped = beside(os.path.join(os.path.dirname(target), f".{os.path.basename(target)}"), f".job-{self.id}.zip")
        with fetched(self, zipped) as file:
            try:
                unpack_as(file, target)
            except Damaged:
                file.truncate(0)
                raise
        os.unlink(zipped)
        return Path(folder)


# == 5. Results ==  A result is verified and appears under its name in one step. After a cut, fetching resumes.


def beside(path: str, end: str) -> str:
    """Return the path of a file next to `path`, with the same name and this end. A name that would be too long gets a digest instead."""
    folder, name = os.path.split(path)
    raw = os.fsencode(name)
    if len(raw) + len(end) > NAME_BYTES:
        name = hashlib.sha256(raw).hexdigest()
    return os.path.join(folder, name + end)


@contextlib.contextmanager
def arriving(path: str, version: str, what: str) -> Iterator[IO[bytes]]:
    """Open the file next to `path` in which it arrives, with what earlier calls wrote to it; in the end, rename it to `path`.

    `version` (hex) identifies the content, so that only the same is resumed; "" if it may change. Raises JobsError if another
    process writes to it.
    """
    part = beside(path, f".{version[:16] or 'live'}.part")
    try:
        file = open(part, "a+b")  # noqa: SIM115 - closed below
    except OSError as error:
        folder = os.path.dirname(os.path.abspath(path))
        raise JobsError(f"{folder} cannot be written: {(error.strerror or str(error)).lower()}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise JobsError(f"another process fetches {what} to {path}: wait for it") from error
        if not version:
            file.truncate(0)
        try:
            yield file
            file.flush()
            os.replace(part, path)
        except BaseException:
            file.flush()
            if not version or not os.fstat(file.fileno()).st_size:
                os.unlink(part)  # nothing in it can be of use
            raise


def copy_file(job: Job, path: str, target: IO[bytes], have: int = 0, crc: int = 0) -> None:
    """Write one file of a job to `target`, which has its first `have` bytes with this CRC-32. After a cut, request the rest."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    deadline = time.monotonic() + job.server.patience_s
    while True:
        try:
            response = job.server.open("GET", f"/jobs/{job.id}/files/{quote(path, errors='surrogateescape')}", headers)
        except Refused as error:
            if error.status == 404 and error.field == "path":
                raise FileNotFoundError(str(error)) from None
            if error.status == 416:
                raise Damaged(f"{path} of job {job.id} changed while it was fetched: try again") from None
            raise
        if have and response.status != 206:
            raise Damaged(f"{path} of job {job.id} changed while it was fetched: try again")
        before, size = have, have + int(response.headers.get("Content-Length", 2**62))  # it is missing if the head was cut off
        for chunk in pieces(job.server, response):
            target.write(chunk)
            have, crc = have + len(chunk), zlib.crc32(chunk, crc)
            job.server.on_progress("fetched", have, size)
        if have >= size:
            break
        job.server.close()
        deadline = time.monotonic() + job.server.patience_s if have > before else deadline
        if time.monotonic() > deadline:
            raise ServerUnreachable(f"{job.server.url} sent only {have} bytes of {path}: try again")
        tag = response.headers.get("ETag")
        headers = {"Range": f"bytes={have}-", **({"If-Range": tag} if tag else {})}
    if response.headers.get("X-File-CRC32", f"{crc:08x}") != f"{crc:08x}":
        raise Damaged(f"{path} of job {job.id} arrived damaged (its CRC-32 differs): check the network, and try again")


def pieces(server: Server, response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield what arrives of an answer's body, which may be cut off."""
    try:
        while chunk := response.read(CHUNK_BYTES):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        server.on_trouble(unreachable_text(server.url, error))


@contextlib.contextmanager
def fetched(job: Job, path: str) -> Iterator[IO[bytes]]:
    """Fetch the ZIP of a job, and open it, verified; it appears as `path` when the block ends."""
    said = job.facts.get("result")
    with arriving(path, said["sha256"] if said else "", f"job {job.id}") as file:
        live = not said
        said = said or fetch_live(job, file)
        for again in (True, False):
            if fetch_rest(job, file, int(said["size"])) == said["sha256"]:
                break
            file.truncate(0)
            if live or not again:
                raise Damaged(f"the result of job {job.id} arrived damaged (SHA-256 differs): check the network, and try again")
        yield file


def fetch_live(job: Job, file: IO[bytes]) -> dict[str, Any]:
    """Fetch the present files of a job without a stored result; return their size and SHA-256. Raises ServerUnreachable."""
    response, size = job.server.open("GET", f"/download_partial/{job.id}"), 0
    try:
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            size += len(chunk)
    except (OSError, http.client.HTTPException) as error:
        raise ServerUnreachable(unreachable_text(job.server.url, error)) from error
    file.flush()
    return {"size": size, "sha256": response.headers.get("ETag", "").strip('"')}


def fetch_rest(job: Job, file: IO[bytes], size: int) -> str:
    """Fetch the missing rest of a stored result; return the SHA-256 of all. Raises ServerUnreachable if nothing more arrives."""
    digest, have = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
        have += len(chunk)
    deadline = time.monotonic() + job.server.patience_s
    while have < size:
        before, headers = have, {"Range": f"bytes={have}-", "If-Range": f'"{job.facts["result"]["sha256"]}"'}
        response = job.server.open("GET", f"/download_partial/{job.id}", headers)
        if response.status != 206:
            raise Damaged(f"the server has another result of job {job.id} now: try again")
        try:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                have += len(chunk)
                job.server.on_progress("fetched", have, size)
        except (OSError, http.client.HTTPException) as error:
            job.server.on_trouble(unreachable_text(job.server.url, error))
        if have < size:
            job.server.close()
            deadline = time.monotonic() + job.server.patience_s if have > before else deadline
            if time.monotonic() > deadline:
                raise ServerUnreachable(f"{job.server.url} sent {have} of {size} bytes of job {job.id}: try again to resume")
    file.flush()
    return digest.hexdigest()


def refuse_filled(folder: str) -> None:
    """Raise FileExistsError unless the folder is missing or empty."""
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.path.islink(folder) or os.listdir(folder)):
        raise FileExistsError(f"{folder} already exists: give the name of a new or empty folder")


def unpack_as(zipped: str | IO[bytes], target: str) -> None:
    """Unpack a ZIP as the folder `target`, in one step. Raises Damaged if a name in it leads out of the folder."""
    import shutil
    import tempfile
    import zipfile

    partial = tempfile.mkdtemp(prefix=".joborch-", dir=os.path.dirname(target))
    try:
        with zipfile.ZipFile(zipped) as archive:
            entries = archive.infolist()
            for entry in entries:
                parts = entry.filename.rstrip("/").split("/")
                if not set(parts).isdisjoint(("", ".", "..")) or "\0" in entry.filename:
                    raise Damaged(f"the result has a file {entry.filename!r}, which leads out of the folder: it is not unpacked")
            is_link = [stat.S_ISLNK(entry.external_attr >> 16) for entry in entries]
            for entry in (entry for entry, link in zip(entries, is_link) if not link):
                unpack_file(archive, entry, os.path.join(partial, entry.filename))
            # Links come last: no file is written through one.
            for entry in (entry for entry, link in zip(entries, is_link) if link):
                unpack_link(archive, entry, partial)
        os.chmod(partial, 0o777 & ~current_umask())
        os.rename(partial, target)
    except zipfile.BadZipFile as error:
        raise Damaged(f"the result cannot be unpacked ({error}): fetch it as a ZIP file") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unpack_file(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: str) -> None:
    """Unpack a file or folder, with its permissions and modification time."""
    import shutil

    if entry.is_dir():
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with archive.open(entry) as source, open(path, "xb") as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)
    mode = entry.external_attr >> 16 & 0o777
    if mode:
        os.chmod(path, (mode | 0o600) & ~current_umask())
    changed_at = time.mktime((*entry.date_time, 0, 0, -1))
    os.utime(path, (changed_at, changed_at))


def unpack_link(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, root: str) -> None:
    """Create a link that stays inside `root`. Raises Damaged for another one."""
    path = os.path.join(root, entry.filename)
    leads_to = os.fsdecode(archive.read(entry))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    inside = os.path.realpath(root)
    place = os.path.realpath(os.path.dirname(path))
    end = os.path.realpath(os.path.join(place, leads_to))
    if os.path.isabs(leads_to) or not all((each + "/").startswith(inside + "/") for each in (place, end)):
        raise Damaged(f"the result has a link {entry.filename!r}, which leads out of the folder: it is not unpacked")
    os.symlink(leads_to, path)


def current_umask() -> int:
    """Return the process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def events(response: IO[bytes]) -> Iterator[dict[str, str]]:
    """Yield the server-sent events of an answer: their fields, with the lines of `data` joined."""
    event: dict[str, str] = {}
    for raw in response:
        line = raw.decode("utf-8", "replace").rstrip("\n")
        if not line:
            if event:
                yield event
            event = {}
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name:
            event[name] = f"{event[name]}\n{value}" if name in event else value


# == 6. All jobs ==  `Jobs`, the starting point of a script.


class Jobs:
    """The jobs of one user at one server.

    `server` is a URL or unix:PATH (default: JOBORCH_SERVER, else that of `joborch login`, else http://127.0.0.1:5000), `token` the
    caller's token (default: JOBORCH_TOKEN or JOBORCH_TOKEN_FILE, else that of the login), `user` a number (default: JOBORCH_USER, else
    that of the login, else that of the token, else the user id of this process), `service` the service (default: the only one there
    is). A call that gets no answer is repeated for `patience_s` seconds. Raises JobsError.
    """

    def __init__(
        self,
        server: str | None = None,
        token: str | None = None,
        *,
        user: int | None = None,
        service: str | None = None,
        patience_s: float = 60.0,
    ) -> None:
        login = stored_login(server or os.environ.get("JOBORCH_SERVER", ""))
        self.server = Server(login.server, (token_of_environment() or login.token) if token is None else token, patience_s)
        said = os.environ.get("JOBORCH_USER", "")
        if user is None and said and not said.lstrip("-").isdecimal():
            raise JobsError(f"JOBORCH_USER is {said!r}: give the whole number of a user")
        self.named_user = next((each for each in (user, int(said) if said else None, login.user) if each is not None), None)
        self.service = service

    @functools.cached_property
    def user(self) -> int:
        """The number of the user: the named one, else that of the token, else the user id of this process."""
        if self.named_user is not None:
            return self.named_user
        return next(each for each in (self.user_of_token(), os.getuid()) if each is not None)

    def user_of_token(self) -> int | None:
        """Return the only user whom the caller's token is for; None if there is no such user, or the server is older than tokens."""
        if "Authorization" not in self.server.headers:
            return None
        try:
            found: int | None = self.server.ask("GET", "/whoami")["user_id"]
        except Refused:
            return None  # the next call says why
        return found

    def default_service(self) -> str:
        """Return the service for jobs that name none. Raises JobsError if there are several."""
        if self.service is None:
            names = [service["name"] for service in self.server.ask("GET", "/services")["services"]]
            if len(names) != 1:
                raise JobsError(f"there are several services: name one with service= or --service: {', '.join(names)}")
            self.service = str(names[0])
        return self.service

    def submit(self, files: Files, service: str | None = None, *, script: str | None = None, key: str | None = None, **fields: Any) -> Job:
        """Send files and queue a job; return it.

        `files` is the path of a file or folder, several of these, or a mapping from paths in the job's folder to bytes, text or a
        Path. `script` is the text of run.sh. `fields` are those of an upload, as in timeout="90m". The same `key` always gives the
        same job. Raises Refused, ServerUnreachable or Damaged.
        """
        sent = files_of(files)
        if script is not None:
            sent["run.sh"] = script
        form = Upload(sent, texts_of({"user_id": self.user, "service": service or self.default_service(), **fields}))
        return self.server.queued("/upload", key, form)

    def job(self, job_id: int) -> Job:
        """Return a job by its id. Raises Refused (404) if there is none."""
        return Job(self.server, self.server.ask("GET", f"/jobs/{job_id}"))

    def list(self, *, limit: int | None = 100, all_users: bool = False, **filters: Any) -> Iterator[Job]:
        """Yield jobs, newest first: `limit` at most (None: all), of this user unless `all_users`.

        `filters` are those of GET /jobs, as in status=["Failed", "Killed"], name="dock" (a prefix), ids=[41, 42] or since="2d".
        """
        query = texts_of({**({} if all_users else {"user_id": self.user}), **filters})
        while limit is None or limit > 0:
            size = 1000 if limit is None else min(limit, 1000)
            page = self.server.ask("GET", "/jobs?" + urlencode({**query, "limit": size}))
            for facts in page["jobs"]:
                yield Job(self.server, facts)
            if page["next"] is None:
                return
            query["before"] = page["next"]
            limit = None if limit is None else limit - len(page["jobs"])

    def delete_user(self, user_id: int) -> dict[str, Any]:
        """Delete all jobs of a user, as `Job.delete` does; return what the server says: how many, and how many are left."""
        return self.server.ask("DELETE", f"/users/{user_id}")

    def export(self, kind: str = "csv", **filters: Any) -> Iterator[bytes]:
        """Yield an export of jobs: "csv", "swf", or "summary" (JSON). `filters` are those of GET /export, as in since="2026-11-01".

        Raises ServerUnreachable if it breaks off.
        """
        query = urlencode(texts_of({"format": kind, **filters}))
        response = self.server.open("GET", f"/export?{query}")
        try:
            while chunk := response.read(CHUNK_BYTES):
                yield chunk
        except (OSError, http.client.HTTPException) as error:
            self.server.close()
            raise ServerUnreachable(unreachable_text(self.server.url, error)) from error

    def wait(self, jobs: Iterable[Job], timeout_s: float | None = None) -> None:
        """Wait until all of these jobs have ended, in any state. Raises TimeoutError after `timeout_s` seconds."""
        for _ in self.as_ended(jobs, timeout_s):
            pass

    def as_ended(self, jobs: Iterable[Job], timeout_s: float | None = None) -> Iterator[Job]:
        """Yield each of these jobs when it has ended. Raises TimeoutError after `timeout_s` seconds."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        left = {job.id: job for job in jobs}
        while left:
            yield from self.take_ended(left, WAIT_S if end is None else max(0.0, min(WAIT_S, end - time.monotonic())))
            if left and end is not None and time.monotonic() >= end:
                raise TimeoutError(f"{len(left)} jobs have not ended after {timeout_s:g} s")

    def take_ended(self, left: dict[int, Job], wait_s: float = 0.0) -> Iterator[Job]:
        """Remove and yield those of these jobs that have ended. If there are none, wait for the first, for at most `wait_s` seconds.

        One request asks for many jobs. Refreshes the other jobs, too. Raises Refused (404) if one does not exist.
        """
        began, ended = time.monotonic(), [job for job in left.values() if job.ended]
        ids = sorted((job_id for job_id, job in left.items() if not job.ended), reverse=True)
        for at in range(0, len(ids), IDS_AT_ONCE):
            part, is_last = [left[each] for each in ids[at : at + IDS_AT_ONCE]], at + IDS_AT_ONCE >= len(ids)
            longest_s = min(wait_s, WAIT_S if len(ids) <= IDS_AT_ONCE else GLANCE_S)
            self.look_at(part, longest_s if is_last and not ended else 0.0)
            ended += [job for job in part if job.ended]
        for job in sorted(ended, key=lambda job: (job.facts["ended_at"] or "", job.id)):
            del left[job.id]
            yield job
        pause_s = max(len(left) / ROWS_A_S, 0.0 if ended else 0.5)  # no end so soon: too many callers wait at the server
        if left:
            time.sleep(max(0.0, min(wait_s, pause_s) - (time.monotonic() - began)))

    def look_at(self, jobs: Sequence[Job], wait_s: float) -> None:
        """Refresh these jobs, when the first has ended or after `wait_s` seconds. Raises Refused (404) if one does not exist."""
        if len(jobs) == 1:
            jobs[0].glance(wait_s)
            return
        query = {"ids": ",".join(str(job.id) for job in jobs), "limit": len(jobs)}
        waiting = {"wait": f"{wait_s:.1f}", "wait_for": "any", "ended": 0} if wait_s else {}
        page = self.server.ask("GET", "/jobs?" + urlencode({**query, **waiting}, safe=","))
        found = {int(facts["id"]): facts for facts in page["jobs"]}
        for job in jobs:
            if job.id in found:
                job.facts = found[job.id]
            else:
                job.refresh()

    def map(
        self, script: str | os.PathLike[str], inputs: Iterable[Files], service: str | None = None, *, key: str | None = None, **fields: Any
    ) -> Iterator[Job]:
        """Run a script once for each input. Yield the jobs as they end, also failed ones; `input` of a job is its input.

        `script` is the text of run.sh, or a Path to it; each of `inputs` is like `files` of `submit`. With a `key` of your choice, a
        program that is started again with the same script, inputs and fields continues with the jobs that it had.
        """
        from collections import Counter, deque
        from concurrent.futures import Future, ThreadPoolExecutor

        text = script if isinstance(script, str) else Path(script).read_text(encoding="utf-8")
        service = service or self.default_service()
        left: dict[int, Job] = {}
        sending: deque[tuple[Files, Future[Job]]] = deque()
        times: Counter[str] = Counter()

        def receive() -> None:
            given, future = sending.popleft()
            job = future.result()
            job.input = given
            left[job.id] = job

        looked_at = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for given in inputs:
                files = {**files_of(given), "run.sh": text}
                name = content_key(key, files, texts_of({**fields, "user": self.user, "service": service})) if key is not None else ""
                times[name] += 1
                sending.append((given, pool.submit(self.submit, files, service, key=name and f"{name}-{times[name]}", **fields)))
                if len(sending) >= 2 * AT_ONCE:
                    receive()
                if time.monotonic() - looked_at > GLANCE_S and left:
                    yield from self.take_ended(left)
                    looked_at = time.monotonic()
            while sending:
                receive()
        yield from self.as_ended(left.values())


def content_key(key: str, files: Mapping[str, Content], fields: Mapping[str, object]) -> str:
    """Return an Idempotency-Key that is the same for the same key, files and fields. Raises JobsError if a file cannot be read."""
    digest = hashlib.sha256(repr((key, sorted(fields.items()))).encode())
    for name in sorted(files):
        content, own = files[name], hashlib.sha256()
        if isinstance(content, (bytes, str)):
            own.update(content.encode() if isinstance(content, str) else content)
        else:
            try:
                with open(content, "rb") as file:
                    while chunk := file.read(CHUNK_BYTES):
                        own.update(chunk)
            except OSError as error:
                raise JobsError(f"{os.fspath(content)} cannot be read: {(error.strerror or str(error)).lower()}") from error
        digest.update(repr((name, own.hexdigest())).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
