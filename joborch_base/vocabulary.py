"""Constants, errors and small functions that several modules share, and the names of plug-ins.

1. Vocabulary
2. Plug-ins
"""

from __future__ import annotations

import functools
import importlib
import ipaddress
import json
import logging
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from random import uniform
from typing import Any, Callable, NamedTuple, NoReturn, TypeVar, Union
from urllib.parse import urlsplit

__version__ = "1.0.0"

# == 1. Vocabulary ==  Constants, errors and small functions. Numbers have their unit in their name.

CHUNK_BYTES = 1 << 20
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PARTS_LIMIT = 20_000  # parts of a form
PART_HEADER_LIMIT_BYTES = 16 * KIB  # a path of 1,024 bytes may be percent-encoded, twice
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 60.0
HELLO_TIMEOUT_S = 10.0  # for the answers with which a client proves its identity
BACKOFF_FIRST_S, BACKOFF_LAST_S = 1.0, 30.0
CLOCK_TOLERANCE_S = 5.0  # doctor reports clocks that differ by more
IDLE_LOOK_S = 4.0  # the pause between questions to a batch system in which no job of this client runs or waits
LOOK_AGAIN_S = 2.0  # the pause between two looks at what is out of order
COME_AGAIN_S = 5  # Retry-After if too many callers wait
DEFAULT_HOSTS = "127.0.0.1,::1"  # both: else another user could listen on the one that `localhost` resolves to first
BACKLOG = 1024  # connections that wait to be accepted
WAITER_PLACES = 32  # callers that may wait in `?wait=` at once
LISTENER_PLACES = 16  # callers that may listen to /changes at once
LEFT_OUT_LINES = 1000  # at most, in .joborch/left-out.txt
DIRECTORY_LIMIT_BYTES = 32 * MIB  # limit for a ZIP's directory that is searched for an output stream
SMALLEST, BIGGEST = -(2**63), 2**63 - 1  # of the whole numbers that SQLite keeps
PROBLEMS_TOLD = 20  # problems of a client, at most, in one answer
EVENTS_PLACES = 16  # servers, and callers of terminate and kill, that may wait at once
WORKER_THREADS = 4
JSON_TYPE, ZIP_TYPE = "application/json", "application/zip"
OURS_HEADER = "X-Joborch"  # in every answer of joborch; a gateway's own answers lack it
NONCE_HEADER, MAC_HEADER = "X-Joborch-Nonce", "X-Joborch-Mac"  # a client's new nonce; the proof of an answer
DIGESTS_FIELD = ".joborch-digests"  # the last field of a joborch server's submit: the SHA-256 of each file before it

log = logging.getLogger("joborch")
T = TypeVar("T")
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class JoborchError(Exception):
    """What went wrong, as one sentence for a person: the thing, the fact, the remedy."""


class ConfigError(JoborchError):
    """A setting is invalid; the program stops with exit status 2."""


class StorageError(JoborchError):
    """The database or the disk cannot be written now; callers get a 503 and should try again."""


class IllegalMove(JoborchError):
    """A status change is not in the table of legal moves: a bug in joborch."""


class NothingSent(JoborchError):
    """The client certainly received nothing of the job, so it may be sent again, to any client."""


class Refused(NothingSent):
    """The client answers, but accepts no job now, as when it is full."""


class WrongToken(Refused):
    """The client answers, but demands another token."""


class NoAnswer(JoborchError):
    """Bytes were sent and no answer came: it is unknown whether the client has the job."""


class NotPacked(NoAnswer):
    """The client is still packing the result. Nothing is wrong; the server asks again."""


class BadAnswer(NoAnswer):
    """The answer does not fit the request. This says nothing about the other jobs at that client."""


class ResultTooLarge(JoborchError):
    """A result exceeds a limit, so trying again will not help; the text names the limit."""


class GivenUp(JoborchError):
    """Packing was stopped because nobody waits for the result."""


class InputsChanged(JoborchError):
    """A job's files differ from those that were uploaded; the request that was sending them is left incomplete."""


class Rejected(JoborchError):
    """The client refuses this payload for good."""


class Gone(JoborchError):
    """The client answers, but does not know the payload."""


class UnknownJob(JoborchError):
    """The job to wait for does not exist, or belongs to another user."""


class NoInputs(UnknownJob):
    """A job cannot get the result of another one."""


class QueueFull(JoborchError):
    """The user already has the largest number of queued jobs that is allowed."""


class StoreFull(JoborchError):
    """The files and results of the user already have the largest size that is allowed."""


class StillRunning(JoborchError):
    """A process of a payload still runs after the kill."""


class BackendUnavailable(JoborchError):
    """The batch system does not answer. This fails no job: before joborch repeats a start, it asks whether the first one arrived."""


class SubmitRefused(BackendUnavailable):
    """The batch system answers, but accepts no payload of this service now; the text says why."""


class CannotRun(JoborchError):
    """The executor will never accept this payload; the text says why."""


class HttpError(JoborchError):
    """An error answer: status code, message, and the field that it is about."""

    def __init__(self, status: int, message: str, field: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Finding(NamedTuple):
    """One finding of `joborch doctor`: fine (True), works for now (None) or broken (False), and a text with the remedy."""

    good: bool | None
    text: str


class Clock:
    """Wall time (seconds since 1970) for display, monotonic time (seconds) for durations. Tests pass their own clock."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def boot(self) -> tuple[str, float]:
        """Return the id of this boot (random(4)), and the seconds since it began, including sleep."""
        return kernel_boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME)


@functools.lru_cache(maxsize=1)
def kernel_boot_id() -> str:
    """Return the unique id of this boot of the machine (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


CRASH_AT = os.environ.get("JOBORCH_TEST_CRASH", "")  # in tests: the name of a crash point, or NAME:3 for its third pass
crash_passes: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Mark a point between two writes where a test can kill the process with SIGKILL. Does nothing outside tests."""
    if CRASH_AT:
        crash_passes[name] += 1
        wanted, _, number = CRASH_AT.partition(":")
        if name == wanted and crash_passes[name] == int(number or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def backoff_s(failures: int) -> float:
    """Return how long to wait after the n-th failure in a row: 1 s doubling to 30 s, with jitter."""
    doubled: float = BACKOFF_FIRST_S * 2 ** min(max(failures, 1) - 1, 10)
    return min(BACKOFF_LAST_S, doubled) * uniform(0.75, 1.0)


@dataclass
class Backoff:
    """A pause after failures, longer after each failure in a row. It knows why it waits, since when, and until when."""

    clock: Clock
    reason: str = ""
    failures: int = 0  # in a row
    since: float = 0.0  # wall: the first of them
    until: float = float("-inf")  # monotonic

    def failed(self, reason: object, pause_s: float | None = None) -> bool:
        """Count a failure and start a pause of `pause_s`, or of backoff_s() by default. Return whether the reason is new."""
        before, self.reason = self.reason, str(reason)
        self.since = self.since if self.failures else self.clock.wall()
        self.failures += 1
        self.until = self.clock.monotonic() + (backoff_s(self.failures) if pause_s is None else pause_s)
        return self.reason != before

    def worked(self) -> None:
        self.reason, self.failures, self.until = "", 0, float("-inf")

    def waits(self) -> bool:
        return self.clock.monotonic() < self.until


class TokenRefusals:
    """Pauses after submits that a client refused because it demands another token, by service."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.by_service = clock, dict[str, Backoff]()

    def failed(self, service: str, reason: object) -> None:
        """Start a pause for the jobs of a service, longer after each refusal in a row."""
        self.by_service.setdefault(service, Backoff(self.clock)).failed(str(reason).replace("<NAME>", service.upper() or "<NAME>"))

    def worked(self, service: str = "") -> None:
        """Forget the refusals of a service; without its name, those of all."""
        self.by_service = {name: pause for name, pause in list(self.by_service.items()) if service and name != service}

    def waits(self, service: str) -> bool:
        """Tell whether no job of a service is sent now."""
        return service in self.by_service and self.by_service[service].waits()

    def reason(self, service: str) -> str:
        """Return why jobs of a service wait; empty if they do not, or if none has tried again for long."""
        found = self.by_service.get(service)
        return found.reason if found and self.clock.monotonic() < found.until + BACKOFF_LAST_S else ""


def rfc3339(wall: float | None) -> str | None:
    """Return a time as RFC 3339 in UTC with milliseconds, or None for None."""
    return None if wall is None else datetime.fromtimestamp(wall, timezone.utc).isoformat(timespec="milliseconds")[:23] + "Z"


def time_stamp() -> str:
    """Return the time in UTC as part of a file's name: 20261125-093000."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime())


def format_duration(seconds: float) -> str:
    """Return a duration as people say it: `0.3 s`, `12 s`, `3 min`, `5 h`, `2 days`."""
    for unit_s, unit in ((86400 * 2, "days"), (3600 * 2, "h"), (120, "min")):
        if seconds >= unit_s:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def size_text(size_bytes: int) -> str:
    """Return a size as people write it: `300 bytes`, `1.5 MiB`, `10 GiB`."""
    for unit_bytes, unit in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit_bytes:
            size = size_bytes / unit_bytes
            return f"{size:.1f} {unit}" if size < 10 else f"{size:.0f} {unit}"
    return f"{size_bytes} bytes"


def sizes_text(size_bytes: int, limit_bytes: int) -> tuple[str, str]:
    """Return a size and its limit as people write them, in bytes if they would look the same."""
    size, limit = size_text(size_bytes), size_text(limit_bytes)
    return (size, limit) if size != limit else (f"{size_bytes} bytes", str(limit_bytes))


def read_small_file(path: str | os.PathLike[str], limit_bytes: int = 64 * KIB) -> str:
    """Return the text of a file that a setting names. Raises OSError, or ValueError if it is too large or no text.

    It may be anything: a device without end, or a pipe to which nobody writes, which counts as empty.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        os.set_blocking(file.fileno(), True)
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"it has more than {limit_bytes // KIB} KiB, so it is another file than the one that is needed")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8: byte {error.start + 1} is 0x{data[error.start]:02x}") from error


def file_trouble(error: OSError | ValueError) -> str:
    """Return why a file that a setting names cannot be used, without its path, which the caller names."""
    return os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else str(error)


def one_line(text: str, limit: int = 300) -> str:
    """Return `text` with every control character replaced, cut to `limit` characters: safe in logs and headers."""
    clean = (text if text.isprintable() else "".join(char if char.isprintable() else " " for char in text)).strip()
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


def parse_json(text: bytes | str) -> Any:
    """Parse JSON from an untrusted source. Raises ValueError if it is invalid, has NaN or Infinity, or is nested too deeply."""
    try:
        return json.loads(text, parse_constant=refuse_constant, parse_int=read_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN, Infinity and -Infinity, which Python's parser accepts although JSON has no such numbers."""
    raise ValueError(f"{name} is no number")


def read_integer(text: str) -> int:
    """Parse an integer of a JSON text, of at most 40 digits: Python before 3.10.7 takes hours for a million digits."""
    if len(text) > 40:
        raise ValueError("a number has too many digits")
    return int(text)


def host_of(url: str) -> tuple[str, str]:
    """Return (host with port, host name) of a URL; both are empty if it is not a URL."""
    try:
        parts = urlsplit(url)
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the known word nearest to `word`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def new_uuid() -> str:
    """Return a random UUID."""
    import uuid

    return str(uuid.uuid4())


def each(items: Iterable[T], work: Callable[[T], object]) -> None:
    """Call `work` for every item, even if it fails for some; raise the first failure at the end."""
    failure: Exception | None = None
    for item in items:
        try:
            work(item)
        except Exception as error:  # noqa: BLE001 - raised below
            failure = failure or error
    if failure is not None:
        raise failure


def plural(count: int, one: str, many: str, counted_to: float = math.inf) -> str:
    """Return `1 job` or `5 jobs`, an empty text for 0, and `100 or more jobs` if counting stopped at 100."""
    if count >= counted_to:
        return f"{counted_to:,} or more {many}"
    return "" if not count else f"1 {one}" if count == 1 else f"{count:,} {many}"


# == 2. Plug-ins ==  A plug-in is named by a string, and imported when a setting, a command or a request needs it.

PLUGINS = {  # a third-party executor is named in the same form: JOBORCH_EXECUTOR=package.module:Class
    "slurm": "joborch_plugins.slurm:SlurmExecutor",
    "dirac": "joborch_plugins.dirac:DiracExecutor",
    "sandbox": "joborch_plugins.sandbox:make_sandbox",
    "documents": "joborch_plugins.documents",
    "lists": "joborch_plugins.lists",
    "results": "joborch_plugins.results",
    "admin": "joborch_plugins.admin",
    "caller": "joborch_plugins.caller",
    "compat22": "joborch_plugins.compat22",
    "commands": "joborch_plugins.commands",
    "top": "joborch_plugins.top",
    "operator_commands": "joborch_plugins.operator_commands",
    "tokens": "joborch_plugins.tokens",
    "page": "joborch_plugins.page",
    "uploads": "joborch_plugins.uploads",
    "completion": "joborch_plugins.completion",
    "health": "joborch_plugins.health:Health",
    "metrics": "joborch_plugins.metrics:Metrics",
    "reload": "joborch_plugins.reload:Reload",
    "drain": "joborch_plugins.drain:Drain",
    "pauses": "joborch_plugins.pauses",
    "export": "joborch_plugins.export",
    "privacy": "joborch_plugins.privacy:Privacy",
    "webhooks": "joborch_plugins.webhooks:Webhooks",
    "joined": "joborch_plugins.joined:Joined",
    "joining": "joborch_plugins.joining:Joining",
    "clouds": "joborch_plugins.clouds:Clouds",
    "cloud_providers": "joborch_plugins.cloud_providers",
    "cloud_demo": "joborch_plugins.cloud_demo",
}


def load_plugin(reference: str) -> Any:
    """Import `package.module` or `package.module:Name`, or a short name in PLUGINS. Raises ImportError or AttributeError."""
    module, _, name = PLUGINS.get(reference, reference).partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found
