#!/usr/bin/env python3
"""joborch: one file that turns any machine into a job server or a compute client.

A web site takes uploads from people; joborch stands between the site and the machines that compute. The *server* queues
jobs, enforces a quota for each user and service, sends the files to a client, fetches the result, keeps it and serves it
as a ZIP. The *client* runs `run.sh` in a separate folder. How the data flows:

    curl ── POST /upload ──▶ files, row (Queued)                                  ┌──────── client ────────┐
                                   │ dispatch: claim (Processing), send           │                        │
                                   └──────────── POST /submit ───────────────────▶│ files, row (Prepared)  │
                                                                                  │   │ run: wrapper, mark │
                             row (Submitted, Running) ◀─── GET /events ───────────│ row (Running)          │
                                   │                                              │   │ exit.json          │
                                   │ get, fetch: GET /retrieve, digest, rename ◀──│ row (Completed)        │
                                   ▼                                              └────────────────────────┘
    curl ◀─ GET /download ── row (Completed), result.zip ──▶ clean, 48 h after the end (Cleaned)

Files are written before rows, rows before answers. What a crash leaves between two of these is removed at the next start,
or done again without harm. Threads share the Store, what is known of each client (`Link`), and wake-up calls. A tick moves
jobs on according to the Store; it may run at any time, twice, or after a crash.

The sections go from the outside in: the server and a job's way through it, the client, what runs payloads, and then what they
are built on: the store, files, HTTP, cleaning. Words, values, states and routes come first, settings and commands last:

     1. Vocabulary            15. Ends                  29. Restore
     2. Values                16. Waiting               30. Files
     3. States                17. Client routes         31. Folders
     4. Reasons               18. Client                32. Trust
     5. Loops                 19. Logs                  33. Data folder
     6. Routes                20. Results               34. Archives
     7. Server routes         21. Executors             35. Access
     8. Jobs                  22. Local executor        36. HTTP
     9. Site routes           23. Inheritance           37. Connections
    10. Server                24. Transfers             38. Cleaning
    11. Scheduling            25. Identity              39. Settings
    12. Links                 26. Statements            40. Configuration
    13. Answers               27. Database              41. Weak set-ups
    14. News                  28. Store                 42. Commands
"""

from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import fnmatch
import functools
import grp
import hashlib
import heapq
import hmac
import http.client
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pwd
import re
import reprlib
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import weakref
import zipfile
import zlib
from collections import ChainMap, Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from random import uniform
from typing import IO, TYPE_CHECKING, Any, Callable, ClassVar, NamedTuple, NoReturn, Optional, Protocol, TypeVar, Union, cast
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit

if sys.version_info < (3, 9):  # noqa: UP036 - it is parsed by 3.8 as well, which has no list[str]
    sys.exit(f"joborch needs Python 3.9 or later, and this is {sys.version.split()[0]}: start it with a newer one")

if TYPE_CHECKING:  # imported where they are used, so that `joborch version` starts fast
    import bottle

sys.modules.setdefault("joborch", sys.modules[__name__])  # run as a script it is `__main__`: plug-ins must not import a second one

__version__ = "0.2.0"

# == 1. Vocabulary ==  Constants, exceptions and small functions that several sections share. Numbers have their unit in their name.

CHUNK_BYTES = 1 << 20
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FIELD_LIMIT_BYTES = 64 * KIB  # a text field of a form
PARTS_LIMIT = 20_000  # parts of a form
PART_HEADER_LIMIT_BYTES = 16 * KIB  # a path of 1,024 bytes may be percent-encoded, twice
NAME_LIMIT_BYTES, PATH_LIMIT_BYTES, DEPTH_LIMIT = 255, 1024, 16
WAIT_LIMIT_S = 45.0  # the longest `?wait=`: gateways give up after 60 s of silence
EVENTS_WAIT_S = 10.0  # of a long poll at a client; a client that hangs is noticed 10 s later
EVENTS_SETTLE_S = 0.03  # delay before a start is reported: short payloads are over by then
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 60.0
HELLO_TIMEOUT_S = 10.0  # for the answers with which a client proves its identity
KILL_TIMEOUT_S = 10.0  # for a client's answer to a kill request; the kill itself may take longer
NOTED_PATIENCE_S = 10.0  # how long a terminate waits for a batch system that has only accepted the request
TERMINATE_TRY_S = 2.0  # how long a terminate waits for a client that did not answer, and the pause between later tries
FOREIGN_PATIENCE_S = 3600.0  # answers without the joborch header are ignored for this long: then it may be a 2.2 client
BACKOFF_FIRST_S, BACKOFF_LAST_S = 1.0, 30.0
SILENT_AFTER_S = 15.0  # if a client has not answered for this long, its jobs become Unknown
CHECK_PATIENCE_S = 0.5  # how long a start waits for the database check, which then goes on in the background
RESTORE_ID_GAP = 1_000_000  # ids skipped after a restore: they may have been assigned since the backup
HEARTBEAT_S = 60.0  # how often steady time is saved: after a reboot it continues from the last saved value
SYNC_AFTER_S = 5.0  # a result that nobody has fetched by then is written to the disk
CLOCK_TOLERANCE_S = 5.0  # doctor reports clocks that differ by more
TRY_AGAIN_S = 1.0  # the shortest pause before a refused operation is tried again
FIND_AGAIN_S = 2.0  # wait before retrying a payload that the batch system rejected or could not report on
COME_AGAIN_S = 5  # Retry-After if too many callers wait
BATCH_SLOTS = 100  # jobs that a batch system gets at once, unless JOBORCH_SLOTS is set
DEFAULT_HOSTS = "127.0.0.1,::1"  # both: else another user could listen on the one that `localhost` resolves to first
BACKLOG = 1024  # connections that wait to be accepted
WAITER_PLACES = 32  # callers that may wait in `?wait=` at once
ANYONES_BODY_BYTES = 16 * KIB  # limit for requests without a token: strangers must not fill the memory
MEMORY_SPOOL_BYTES = 1 * MIB  # a ZIP below this size never touches the disk
UNREADABLE_LIMIT = 20  # unreadable files that an archive may leave out; if there are more, the disk is at fault
PACK_PATIENCE_S = 20.0  # how long a caller waits for a result to be packed
PACK_GLANCE_S = 0.5  # how long a joborch server waits for it: it fetches other results and asks again
PACK_LEASE_S, PACK_LIVE_LEASE_S = 30.0, 5.0  # how long packing continues until a caller asks again: a result; a folder in use
PACK_ASKED_MOST = 1000  # requests for a result that is still being packed before its job becomes Unknown: over an hour
PACK_READERS, PACK_QUEUE = 4, 16  # callers that may wait for large results at once; results being packed or waiting for it
PACKERS = 2  # large results that are packed at once
QUICK_MEASURE_FILES = 2000  # work folders with up to this many files are measured directly, larger ones in a thread
PACKED_KEPT_S = 600.0  # how long a packed result is kept for repeated requests
LEFT_OUT_LINES = 1000  # at most, in .joborch/left-out.txt
WALK_DESCRIPTORS = 64  # folders that a walk keeps open at once
PACKING_HEADER = "X_Joborch_Packing"  # in a client's 503: the result is being packed, nothing is wrong
DIRECTORY_LIMIT_BYTES = 32 * MIB  # limit for a ZIP's directory that is searched for an output stream
RESERVE_BYTES = 4 * MIB  # kept free for the database on the data folder's disk
INLINE_LIMIT_BYTES, INLINE_FILES, INLINE_PAYLOADS = 64 * KIB, 16, 20  # limits for results that are sent along with the report of their end
LOG_PART_BYTES = 1 * MIB  # of an output stream, at most, in one answer
EVENTS_PAGE, EVENTS_PAGE_BYTES = 1000, 4 * MIB  # limits for one answer of /events: payloads, and bytes of JSON
EVENTS_PLACES = 16  # servers, and callers of terminate and kill, that may wait at once
WORKER_THREADS = 4
SENDERS_PER_CLIENT = 3  # jobs that are sent to one client at once
JSON_TYPE, ZIP_TYPE = "application/json", "application/zip"
DISK_TROUBLES = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
EPOCH_ZIP = (1980, 1, 1, 0, 0, 0)
OUTPUT_STREAMS = ("stdout", "stderr")
OURS_HEADER = "X-Joborch"  # in every answer of joborch; a gateway's own answers lack it
NONCE_HEADER, MAC_HEADER = "X-Joborch-Nonce", "X-Joborch-Mac"  # a client's new nonce; the proof of an answer
DIGESTS_FIELD = ".joborch-digests"  # the last field of a joborch server's submit: the SHA-256 of each file before it

log = logging.getLogger("joborch")
T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")
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
    """The client answers, but accepts no job now: it is full, or expects another token."""


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


class QueueFull(JoborchError):
    """The user already has the largest number of queued jobs that is allowed."""


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


def rfc3339(wall: float | None) -> str | None:
    """Return a time as RFC 3339 in UTC with milliseconds, or None for None."""
    if wall is None:
        return None
    moment = datetime.fromtimestamp(wall, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


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


def one_line(text: str, limit: int = 300) -> str:
    """Return `text` with every control character replaced, cut to `limit` characters: safe in logs and headers."""
    clean = "".join(char if char.isprintable() else " " for char in text).strip()
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


PLUGINS = {  # a third-party executor is named in the same form: JOBORCH_EXECUTOR=package.module:Class
    "slurm": "joborch_plugins.slurm:SlurmExecutor",
    "dirac": "joborch_plugins.dirac:DiracExecutor",
    "documents": "joborch_plugins.documents",
    "admin": "joborch_plugins.admin",
    "caller": "joborch_plugins.caller",
    "compat22": "joborch_plugins.compat22",
    "commands": "joborch_plugins.commands",
    "top": "joborch_plugins.top",
    "page": "joborch_plugins.page",
    "uploads": "joborch_plugins.uploads",
}
ROUTE_PLUGINS = ("documents", "page")  # they declare routes
# The only names of this module that plug-ins may use; a test checks that.
PLUGIN_API: tuple[str, ...] = (
    "__version__", "Address", "Answer", "AT_CLIENT", "BackendUnavailable", "Backoff", "BAD", "BadAnswer", "BatchOptions",
    "become_unknown", "below", "BUSY", "CannotRun", "Cause", "check_path", "check_site", "CHUNK_BYTES", "ClientProtocol",
    "client_token_file", "Clock", "CLOCK_TOLERANCE_S", "Config", "ConfigError", "CONNECT_TIMEOUT_S", "crash_point", "CSRF_HEADER",
    "csrf_token_of", "damage_of", "DataFolder", "decided_restore", "DEFAULT_HOSTS", "DIRECTORY_LIMIT_BYTES", "discard", "EXIT_DONE",
    "EXIT_FAILED", "FilesBody", "file_chunks", "Finding", "find_route", "finish_restore", "first_file_limit", "fits_one", "folder_of",
    "forgotten_executor", "format_duration", "FormReader", "free_bytes", "fsync_path", "GIB", "Gives", "Gone", "HELLO_TIMEOUT_S",
    "helper_environment", "host_of", "HttpError", "is_own_user", "Job", "JoborchError", "JSON_TYPE", "KIB", "last_line", "left_out",
    "Link", "load_plugin", "LOCK_HELD", "lock_trouble", "log", "make_executor", "marked_below", "member_chunks", "MIB", "NEWEST_ENDED",
    "NEWEST_FAILURES", "NEWEST_SUBMITTED", "new_attempt", "new_session", "new_uuid", "NoAnswer", "Node", "node_environment",
    "NothingSent", "NO_LOCKS", "OLDEST_QUEUED", "one_line", "on_network", "open_listeners", "Outcome", "OVER", "own_file", "Parameter",
    "parse_json", "PARTS_LIMIT", "passed_on", "payload_gone", "peer_uid", "plural", "queue_info_of", "read_all", "read_answer",
    "read_claim", "read_exit", "read_some", "READ_TIMEOUT_S", "Reason", "Rejected", "report", "Request", "ResultLimits", "Route", "route",
    "ROUTES", "routes_of", "Server", "Service", "SERVICE_SETTINGS", "session_cookie", "SESSION_S", "SETTINGS", "shown", "size_text",
    "socket_path", "Status", "StillRunning", "Store", "StoredFile", "SubmitRefused", "sync_file_system", "T", "time_stamp", "token_names",
    "token_place", "token_remedy", "Tree", "USERS_WITH_JOBS", "walk", "weak_setups", "with_first_file_limit", "wrapper_text",
    "write_atomic", "zip_directory", "zip_records",
)  # fmt: skip


def new_uuid() -> str:
    """Return a random UUID."""
    import uuid

    return str(uuid.uuid4())


def own_file(name: str) -> bytes:
    """Return the content of a file next to this module, also inside joborch.pyz. Raises OSError if it does not exist."""
    loader: Any = __loader__  # type: ignore[name-defined]
    return bytes(loader.get_data(os.path.join(os.path.dirname(__file__), name)))


def load_plugin(reference: str) -> Any:
    """Import `package.module` or `package.module:Name`, or a short name in PLUGINS. Raises ImportError or AttributeError."""
    module, _, name = PLUGINS.get(reference, reference).partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def __getattr__(name: str) -> Any:
    """Return `Jobs`, the library for scripts: `from joborch import Jobs` imports its plug-in (PEP 562)."""
    if name == "Jobs":
        return load_plugin("caller").Jobs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# == 2. Values ==  Readers of what people write in settings and requests: each returns the value, or raises ValueError with the remedy.


def read_text(text: str) -> str:
    """Accept any text."""
    return text


def read_line(text: str) -> str:
    """Accept any single line of text."""
    if not text.isprintable():
        raise ValueError("give one line of printable characters")
    return text


def fitting(pattern: str, remedy: str) -> Callable[[str], str]:
    """Return a reader that accepts texts that match `pattern` as a whole."""

    def read(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(remedy)
        return text

    return read


read_token = fitting(r"(?=.*[^,])[!-~]{1,4096}", "give printable ASCII without blanks")  # a bearer token, or several separated by commas
read_word = fitting(r"(?!-)[!-~]{1,500}", "give one word, as in short")  # a partition, an account, a constraint
read_mode = fitting(r"0?[0-7]{3}", "give a mode in octal, as in 0600 or 0660")  # the mode of a file


def read_whole(text: str, least: int = 0, most: int = 2**31 - 1) -> int:
    """Return a whole number from `least` to `most`."""
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise ValueError(f"give a whole number from {least} to {most}")
    return int(text)


def read_port(text: str) -> int:
    """Return a TCP port; 0 means a free one."""
    return read_whole(text, 0, 65535)


def read_positive(text: str) -> int:
    """Return a whole number from 1."""
    return read_whole(text, 1)


def read_seconds(text: str) -> float:
    """Return seconds: a plain number, or one with s, m, h or d."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([smhd]?)", text)
    if not match:
        raise ValueError("give seconds, or a number with s, m, h or d, as in 90 or 24h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def read_period(text: str) -> float:
    """Return a period or a time limit in seconds."""
    if read_seconds(text) < 0.01:
        raise ValueError("give at least 0.01 seconds")
    return read_seconds(text)


def read_bytes(text: str) -> int:
    """Return bytes: a plain number, or one with K, M or G (powers of 1,024)."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGkmg]?)(?:i?[Bb])?", text)
    if not match:
        raise ValueError("give bytes, or a number with K, M or G, as in 512M")
    return int(match[1]) * {"": 1, "K": KIB, "M": MIB, "G": GIB}[match[2].upper()]


def read_run_time(text: str) -> float:
    """Return a run time limit of a job, in seconds."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?[smhd]?", text) or not 0 < read_seconds(text) < 1e9:
        raise ValueError("give seconds above 0, or a number with s, m, h or d, as in 3600, 90m or 2d")
    return read_seconds(text)


def read_mib(text: str) -> int:
    """Return memory in MiB, rounded up: a plain number (MiB), or one with K, M or G."""
    if not re.fullmatch(r"[0-9]{1,10}([KMGkmg]i?[Bb]?)?", text):
        raise ValueError("give MiB, or a number with M or G, as in 8192 or 8G")
    mib = -(-read_bytes(text + "M" if text.isdecimal() else text) // MIB)
    if not 1 <= mib <= 2**31:
        raise ValueError(f"give at least 1 and at most {2**31} MiB")
    return mib


def read_weight(text: str) -> float:
    """Return a weight: how large a user's share is. The default is 1."""
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,6})?", text) or not 0.001 <= float(text) <= 1_000_000:
        raise ValueError("give a number from 0.001 to 1000000, as in 2 or 0.5")
    return float(text)


def read_weights(text: str) -> dict[int, float]:
    """Return weights by user: pairs separated by commas, as in 7=2,8=0.5."""
    weights = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        user, equals, weight = pair.partition("=")
        if not equals or not re.fullmatch(r"-?[0-9]{1,18}", user.strip()):
            raise ValueError("give USER=WEIGHT, separated by commas, as in 7=2,8=0.5")
        weights[int(user)] = read_weight(weight.strip())
    return weights


def read_url(text: str) -> str:
    """Accept an http or https URL with a host."""
    try:
        parts = urlsplit(text)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and re.fullmatch(r"[!-~]+", text)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("give a URL, as in https://dirac.example.org")
    return text


def read_networks(text: str) -> tuple[Network, ...]:
    """Return IP addresses and networks, separated by commas; IPv4 addresses in IPv6 form (::ffff:) become IPv4."""
    networks: list[Network] = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        try:
            network = ipaddress.ip_network(part)
        except ValueError as error:
            raise ValueError(f"{error}: give addresses and networks separated by commas, as in 192.0.2.7,10.0.0.0/8") from None
        mapped = getattr(network.network_address, "ipv4_mapped", None)
        if mapped is not None and network.prefixlen >= 96:
            network = ipaddress.ip_network((mapped, network.prefixlen - 96))
        networks.append(network)
    if not networks:
        raise ValueError("give at least one address or network")
    return tuple(networks)


def read_names(text: str) -> tuple[str, ...]:
    """Return names of variables, separated by commas, as in PGHOST,MYLAB_*; `*` matches any characters."""
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    if not all(re.fullmatch(r"[!-<>-~]+", name) for name in names):
        raise ValueError("give names of variables separated by commas, as in PGHOST,MYLAB_*")
    return names


def read_switch(text: str) -> bool:
    """Return whether a switch is on: 1 or 0."""
    if text not in ("0", "1"):
        raise ValueError("give 1 or 0")
    return text == "1"


def one_of(*words: str) -> Callable[[str], str]:
    """Return a reader that accepts one of `words`, in any case."""

    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError("give one of " + ", ".join(words))
        return text.lower()

    return read


def read_executor(text: str) -> str:
    """Return the name of an executor: a built-in one, in any case, or `package.module:Class` for a third-party one."""
    if text.lower() in ("local", "slurm", "dirac"):
        return text.lower()
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", text):
        raise ValueError("give one of local, slurm, dirac, or package.module:Class")
    return text


def read_by_plugin(reference: str) -> Callable[[str], Any]:
    """Return a reader that a plug-in defines as `package.module:name`; it is imported when there is a value to read."""

    def read(text: str) -> Any:
        return load_plugin(reference)(text)

    return read


# == 3. States ==  The tables of legal moves, and the row that moves. No status changes in a way that is not listed here.


class Status(str, Enum):
    """The states of a job on the server, and of a payload on a client; the names are those of job-orchestrator 2.2."""

    QUEUED = "Queued"
    PROCESSING = "Processing"
    SUBMITTED = "Submitted"
    PREPARED = "Prepared"
    RUNNING = "Running"
    COMPLETED = "Completed"
    FAILED = "Failed"
    INVALID = "Invalid"
    KILLED = "Killed"
    UNKNOWN = "Unknown"
    CLEANED = "Cleaned"

    def __str__(self) -> str:
        return self.value


class Cause(str, Enum):
    """What made a job end: its script, a limit, the infrastructure, or a request."""

    USER = "user"
    LIMIT = "limit"
    INFRASTRUCTURE = "infrastructure"
    CANCELLED = "cancelled"

    def __str__(self) -> str:
        return self.value


BUSY = (Status.PROCESSING, Status.SUBMITTED, Status.RUNNING, Status.UNKNOWN)  # at a client; quotas count these
ENDED = (Status.COMPLETED, Status.FAILED, Status.INVALID, Status.KILLED)
OVER = (*ENDED, Status.CLEANED)

SERVER_MOVES: tuple[tuple[Status, Status, str], ...] = (
    (Status.QUEUED, Status.PROCESSING, "claimed: quota, service limit and a client had room"),
    (Status.QUEUED, Status.KILLED, "terminated before dispatch"),
    (Status.QUEUED, Status.FAILED, "no client of the service answered for too long"),
    (Status.QUEUED, Status.INVALID, "a job that it was to follow ended otherwise than Completed"),
    (Status.PROCESSING, Status.SUBMITTED, "a client accepted it"),
    (Status.PROCESSING, Status.QUEUED, "the client certainly has nothing of it"),
    (Status.PROCESSING, Status.UNKNOWN, "bytes were sent and no answer came"),
    (Status.PROCESSING, Status.INVALID, "a client refuses it for good"),
    (Status.PROCESSING, Status.KILLED, "terminated"),
    (Status.PROCESSING, Status.FAILED, "its input files are missing or were changed on the server"),
    (Status.SUBMITTED, Status.RUNNING, "the client reports it"),
    *((source, to, why) for source in (Status.SUBMITTED, Status.RUNNING) for to, why in (
        (Status.COMPLETED, "result fetched, verified, on disk"),
        (Status.FAILED, "the payload ended badly, or no attempt is left"),
        (Status.INVALID, "the payload cannot be run"),
        (Status.UNKNOWN, "the client does not answer, or the result could not be fetched"),
        (Status.QUEUED, "a new attempt after an infrastructure failure"),
        (Status.KILLED, "terminated"),
    )),
    (Status.UNKNOWN, Status.SUBMITTED, "a retry got through"),
    (Status.UNKNOWN, Status.RUNNING, "a retry got through"),
    (Status.UNKNOWN, Status.COMPLETED, "a retry got through"),
    (Status.UNKNOWN, Status.FAILED, "a retry got through, or no attempt is left"),
    (Status.UNKNOWN, Status.INVALID, "a retry got through"),
    (Status.UNKNOWN, Status.QUEUED, "a new attempt: the client lost it or was silent too long"),
    (Status.UNKNOWN, Status.KILLED, "terminated"),
    *((source, Status.CLEANED, "older than MAX_AGE since it ended") for source in ENDED),
)  # fmt: skip

CLIENT_MOVES: tuple[tuple[Status, Status, str], ...] = (
    (Status.PREPARED, Status.RUNNING, "a slot is free; the row is written before the start"),
    (Status.PREPARED, Status.INVALID, "it has no usable run.sh"),
    (Status.PREPARED, Status.FAILED, "it could not be started"),
    (Status.PREPARED, Status.KILLED, "stopped on request"),
    (Status.RUNNING, Status.COMPLETED, "exit status 0"),
    (Status.RUNNING, Status.FAILED, "another exit status, a signal, a limit, or a lost machine"),
    (Status.RUNNING, Status.KILLED, "stopped on request"),
    *((source, Status.CLEANED, "its files are old enough") for source in ENDED),
)

MOVES: Mapping[str, frozenset[tuple[Status, Status]]] = {
    "server": frozenset((source, to) for source, to, _ in SERVER_MOVES),
    "client": frozenset((source, to) for source, to, _ in CLIENT_MOVES),
}


def diagram(moves: Sequence[tuple[Status, Status, str]] = SERVER_MOVES) -> str:
    """Return a table of moves as a Mermaid state diagram, for docs/reference.md."""
    lines = [f"    {source} --> {to}" for source, to, _ in moves]
    return "\n".join(["stateDiagram-v2", "    [*] --> " + str(moves[0][0]), *lines])


class Job(NamedTuple):
    """One row: a job of the server, or a payload of a client (a job that may have no user and no service)."""

    id: int
    uuid: str
    user_id: int | None
    service: str | None
    name: str | None
    status: Status
    reason: str
    cause: str | None
    exit_code: int | None
    signal: int | None
    priority: int
    cpus: int
    memory: int | None  # MiB
    timeout: float | None  # seconds of run time
    retries: int
    return_inputs: int
    attempt: int
    client: str | None  # server: the name of its Address
    dest_id: str | None  # server: the payload's id at its client
    remote_id: str | None  # client: the job's id at its server
    handle: str | None  # client: what the executor calls it
    idempotency_key: str | None
    request_digest: str | None
    result_size: int | None  # bytes
    result_sha256: str | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    not_before: float | None  # steady time: a new attempt waits until then
    fetched_at: float | None  # client: a server has the result
    kill_requested_at: float | None  # wall time; a request to stop a job is a column, not a state
    kill_cause: str | None
    moves: int
    changed: int | None  # client: the number of its last change, for /events
    moved_at: float  # steady time of its last change of status
    synced: int  # client: 1 if its files are safely on the disk, 2 if a server has confirmed that it holds the result
    inputs_sha256: str | None  # server: digest of the list of its files and their digests
    after_ids: str  # server: ids of the jobs that must be Completed first, separated by commas
    blocked: int  # server: how many of those have not ended
    arrived_at: float  # steady time of its upload: its place in the queue through all attempts
    charged: float  # server: slot-seconds charged to its user for this attempt
    ended_as: str | None  # the status that a Cleaned job ended with; see `end`
    retry_of: int | None  # server: the job that it repeats

    @property
    def pair(self) -> tuple[str, int]:
        """Return the service and the user, whose share it is: see Shares."""
        return self.service or "", self.user_id or 0

    @property
    def mark(self) -> str:
        """The attempt key: unique among all attempts of all jobs."""
        return f"{self.uuid}.{self.attempt}"

    @property
    def end(self) -> str | None:
        """The status that it ended with, also after its files were cleaned; None until it ends."""
        return self.status.value if self.status in ENDED else self.ended_as


STATUS_AT = Job._fields.index("status")
ATTEMPT = ("attempt", "client", "dest_id", "started_at", "ended_at", "exit_code", "signal", "reason", "cause")  # the columns of an attempt
MOVABLE = (  # what a move may change besides status and reason
    *("cause", "exit_code", "signal", "attempt", "client", "dest_id", "started_at", "ended_at"),
    *("not_before", "result_size", "result_sha256"),
)


@dataclass(frozen=True)
class NewJob:
    """The columns of a new row that its creator chooses."""

    uuid: str
    user_id: int | None = None
    service: str | None = None
    name: str | None = None
    priority: int = 0
    cpus: int = 1
    memory: int | None = None
    timeout: float | None = None
    retries: int = 0
    return_inputs: int = 1
    attempt: int = 1
    remote_id: str | None = None
    idempotency_key: str | None = None
    request_digest: str | None = None
    inputs_sha256: str | None = None
    after_ids: str = ""
    blocked: int = 0
    retry_of: int | None = None

    @property
    def after(self) -> list[int]:
        return ids_in(self.after_ids)


NEW_COLUMNS = (
    *(item.name for item in dataclasses.fields(NewJob)),
    *("status", "reason", "created_at", "moves", "changed", "moved_at", "arrived_at"),
)


def ids_in(text: str) -> list[int]:
    """Return the ids in a text that separates them by commas."""
    return [int(part) for part in text.split(",") if part]


def as_job(row: sqlite3.Row) -> Job:
    """Return a row of jobs as a Job."""
    values = list(row)
    values[STATUS_AT] = Status(values[STATUS_AT])
    return Job._make(values)


# == 4. Reasons ==  Every reason why a job fails, is killed or becomes Unknown is worded here; errors and plug-ins add their facts.


class Reason:
    """Templates of reasons; facts are in braces: `Reason.REFUSED.format(client=..., error=...)`.

    `{error}` is the text of a Rejected, Gone, NothingSent, NoAnswer or CannotRun. Reasons that only Slurm or DIRAC can give
    are worded by functions of their plug-ins.
    """

    # The server sends a job.
    CLAIMED = "claimed for {client}"
    ACCEPTED = "accepted by {client}"
    FOUND_THERE = "{client} has it"
    FILES_REMOVED = "its files were removed from the {where}'s disk"
    REFUSED = "{client} refuses it: {error}"
    NOT_SENT = "{client} {error}"
    ANSWER_LOST = "{client} {error}: the job is sent there again under the same key"
    ANSWER_LOST_22 = "{client} {error}, and cannot say whether it has the job"
    CANNOT_SAY = "{client} cannot say whether it has the job"
    BEGAN_ANEW = "{client} was restarted and has lost it"
    ANSWER_NOT_STORED = "the client's answer could not be stored: the job is sent there again under the same key"
    SERVER_RESTARTED = "the server was restarted while sending it to {client}: it is sent there again under the same key"
    CHAIN_BROKEN = "job {job}, which it follows, ended as {status}"

    # A client is silent, or its answer cannot be used.
    TRIED_AGAIN = "{reason}; it is tried again"
    ANSWERS_AGAIN = "{client} answers again"
    NOT_CONFIGURED = "{client} is no longer configured"
    SILENT = "{trouble}; no answer for {duration}"
    SILENT_AND_KILLED = "{trouble}; no answer for {duration}; if it comes back, the job is stopped there"
    UNREACHABLE = "client unreachable: no client of {service} answered for {duration}"
    CLIENT_FAILED = "{client} failed"

    # An attempt is over.
    ATTEMPT = "attempt {attempt}: {reason}"
    NO_ATTEMPT_LEFT = "{reason}; no attempt is left of {attempt}"
    NO_ATTEMPT_KILLED = "{reason}; terminate was requested"
    KILLED = "terminated on request"
    KILLED_AND_GONE = "terminated on request; {reason}"
    KILLED_UNSENT = "terminated before it was sent"
    COMPLETED = "run.sh ended with exit status 0"
    COMPLETED_CHILDREN = "run.sh ended with exit status 0; processes that it left running were killed"
    CLIENT_SAYS = "the client says {status}"

    # The result is lost, too large, or cannot be fetched.
    RESULT_HAS = "the result has {too_much}"
    RESULT_HAS_EXIT = "the result has {too_much}; run.sh ended with exit status {status}"
    NOT_KEPT = "{reason}; its files were not kept: {error}"
    NOT_FETCHED = "the result could not be fetched from {client}: {error}"
    NOT_STORED = "the result could not be stored: {error}"
    CLIENT_HAS_NOTHING = "{client} no longer has its files"
    CLIENT_CLEANED = "{client} no longer has its files: {reason}"
    FAILED_AND_CLEANED = "{reason}; {cleaned}"
    RUN_FAILED = "run.sh failed"
    WORK_REMOVED = "its work folder was removed from the client's disk"
    CLEANED = "{duration} after it ended"

    # The client cannot start a payload, or loses it.
    NO_SCRIPT = "there is no run.sh: upload a bash script of that name"
    EMPTY_SCRIPT = "run.sh is empty: it has 0 bytes"
    NOT_STARTED = "the client could not start it: {error}"
    DISK_FULL = "the client's disk is full: the script was not started"
    NO_WRAPPER = "the wrapper could not be started, or stopped too early: the script was not started"
    REBOOTED = "the machine or the container was restarted while the script ran"
    REBOOTED_UNSYNCED = "the machine was restarted, and what had reached its disk is not known"
    FOLDER_REMOVED = "the payload's folder was removed while the script ran"
    WORK_GONE = "its work folder was removed or replaced while run.sh ran, and its files are missing"
    WORK_GONE_EXIT = WORK_GONE + " (run.sh ended with exit status {status})"
    ENDED_WITH_CLIENT = "the script's processes were stopped together with the client, or while it did not run, and left no exit status"
    WRAPPER_KILLED = "the wrapper was killed and left no exit status: the script killed it, or the kernel did because memory was short"
    STOPPED_WITH_CLIENT = (
        "it was stopped from outside joborch, together with the client: run.sh ended with exit status {status}; "
        "if a service manager did it, set KillMode=process for the client"
    )
    STOPPED_WITH_WRAPPER = (
        "it was stopped from outside joborch, together with its wrapper: run.sh ended with exit status {status}; "
        "if a service manager did it, set KillMode=process for the client"
    )


def failure_reason(folder: Path, exit_status: int, run_s: float) -> str:
    """Say how a script failed: exit status or signal, run time, the last line of its standard error, and a known remedy."""
    signalled = f" (as by signal {signal_name(exit_status - 128)})" if is_signalled(exit_status) else ""
    text = f"run.sh ended with exit status {exit_status}{signalled} after {format_duration(run_s)}{last_words(folder)}"
    return "; ".join([text + shell_hint(folder), *hints_for(folder, "work", "run.sh")])


def limit_reason(folder: Path, limit_s: float) -> str:
    """Say that a script was stopped at its time limit."""
    return f"run.sh was stopped at its time limit of {format_duration(limit_s)}{last_words(folder)}"


def last_words(folder: Path) -> str:
    """Return the last line of a script's standard error as the end of a sentence; empty if there is none."""
    words = last_line(folder / "stderr")
    return f'; last line of standard error: "{words}"' if words else ""


def left_out_text(count: int) -> str:
    """Return the end of a sentence about files that no archive can hold; empty for none."""
    return f"; {plural(count, 'file was', 'files were')} left out: see .joborch/left-out.txt" if count else ""


def is_signalled(exit_status: int) -> bool:
    """Tell whether an exit status means that a signal killed the script: 128 plus the signal's number, as in a shell."""
    return 128 < exit_status < 193


def signal_name(number: int) -> str:
    """Return the name of a signal, or its number if it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


LOGIN_COMMANDS = re.compile(
    rb"(?<![\w-])(module|ml|spack|conda|mamba|micromamba): command not found|(Conda|Mamba)\w*Error: Run '(conda|mamba) init'"
)


def shell_hint(folder: Path) -> str:
    """Return the remedy if the begin or end of standard error shows that a command of login shells was missing."""
    try:
        with open_regular(folder, "stderr") as file:
            said = file.read(4 * KIB)
            file.seek(max(len(said), os.fstat(file.fileno()).st_size - 4 * KIB))
            missing = LOGIN_COMMANDS.search(said + file.read(4 * KIB))
    except OSError:
        return ""
    name = (missing[1] or missing[3]).decode() if missing else ""
    remedy = "begin run.sh with #!/bin/bash -l, or set SERVICE_<NAME>_PRELUDE at the client"
    return f"; {name} is often defined only for login shells: {remedy}" if name else ""


# == 5. Loops ==  A loop calls its tick, a plain function, when woken or when its period ends, in a thread of a pool.


SILENT_THREADS = 40  # for clients that do not answer: a call to each takes up to 10 s, every 30 s


class Pool:
    """A pool of threads that start when they are needed and stop after they were idle for a while.

    The thread that became idle last gets the next work, so that few threads stay awake.
    """

    IDLE_S = 30.0

    def __init__(self, name: str, threads: int = sys.maxsize, waiting: int = sys.maxsize) -> None:
        """At most `threads` work at once, and at most `waiting` pieces of work wait for a thread."""
        self.name, self.most, self.most_waiting = name, threads, waiting
        self.lock, self.waiting = threading.Lock(), deque[Callable[[], object]]()
        self.threads, self.number, self.short, self.stopping = 0, 1, False, False
        self.ended = threading.Condition(self.lock)
        self.idle: list[threading.Lock] = []  # bells of threads that sleep

    def add(self, work: Callable[[], object]) -> bool:
        """Queue a piece of work. Return False if too many wait already, or if there is no thread and none can be started."""
        with self.lock:
            if len(self.waiting) >= self.most_waiting:
                return False
            self.waiting.append(work)
            if self.idle:
                self.idle.pop().release()
            elif self.threads < self.most and not self.stopping and not self.start_thread() and not self.threads:
                self.waiting.pop()
                return False
        return True

    def start_thread(self) -> bool:
        """Return whether a thread could be started. The caller holds the lock."""
        try:
            threading.Thread(target=self.work, name=f"{self.name}-{self.number}", daemon=True).start()
        except RuntimeError as error:
            if not self.short:
                log.error("%s: work waits, because no thread can be started: %s", self.name, error)
            self.short = True
            return False
        self.threads, self.number, self.short = self.threads + 1, self.number + 1, False
        return True

    def work(self) -> None:
        bell = threading.Lock()  # released only to wake this thread
        while True:
            with self.lock:
                bell.acquire(blocking=False)
                unused = bell in self.idle
                if unused:
                    self.idle.remove(bell)
                work = self.waiting.popleft() if self.waiting else None
                if work is None and (unused or self.stopping):
                    self.threads -= 1
                    return self.ended.notify_all()
                if work is None:
                    self.idle.append(bell)
            try:
                work() if work is not None else bell.acquire(timeout=self.IDLE_S)
            except Exception:
                log.exception("a request ended in an error")

    def stop(self, timeout_s: float = 0.0) -> None:
        """Stop the threads once no work waits. Do not wait more than `timeout_s` for busy ones."""
        with self.lock:
            self.stopping = True
            while self.idle:
                self.idle.pop().release()
            self.ended.wait_for(lambda: not self.threads, timeout_s)


def stop_pools(pools: Collection[Pool], timeout_s: float) -> None:
    """Stop pools all at once. Do not wait more than `timeout_s` for busy threads."""
    deadline = time.monotonic() + timeout_s
    for pool in pools:
        pool.stop()
    for pool in pools:
        pool.stop(max(0.0, deadline - time.monotonic()))


@dataclass
class Loop:
    """Runs `tick` in a thread of a pool: at once when woken or while a tick returns True (more to do), else every `period_s`.

    If a tick raises, the error is logged and the next tick runs a period later.
    """

    name: str
    tick: Callable[[], bool]
    pool: Callable[[], Pool]  # asked before each tick, because a client that hangs moves to another pool
    period_s: float
    most_runs: int = 1  # ticks at once; a further one starts if the loop is woken while all others are busy
    wanted: Callable[[], bool] = lambda: True  # whether to tick after a period; the timer calls it, so it must not block

    def __post_init__(self) -> None:
        self.lock, self.calls, self.runs, self.started, self.trouble = threading.Lock(), 0, 0, False, ""

    def start(self) -> None:
        self.started = True
        self.wake()

    def stop(self) -> None:
        self.started = False

    def wake(self) -> None:
        """Tick now. If `most_runs` ticks run already, one of them runs again afterwards."""
        with self.lock:
            self.calls = min(self.calls + 1, self.most_runs)
            if self.runs == self.most_runs or not self.started:
                return
            self.runs += 1
        self.go_on(self.pool())

    def look(self) -> None:
        """Tick after a period, if no tick is running and there may be something to do."""
        if not self.runs and (self.calls or self.trouble or self.wanted()):
            self.wake()

    def go_on(self, pool: Pool) -> None:
        if not pool.add(functools.partial(self.run, pool)):
            with self.lock:
                self.runs -= 1  # the next `look` tries again

    def run(self, pool: Pool) -> None:
        """Tick in a thread of `pool` while there is something to do, or until another pool has to take over."""
        while self.pool() is pool:
            with self.lock:
                self.calls = max(0, self.calls - 1)
            more = self.started and self.tick_once()
            with self.lock:
                if not self.started or not (more or self.calls):
                    self.runs -= 1
                    return
        self.go_on(self.pool())

    def tick_once(self) -> bool:
        """Return whether there may be more to do. Errors are logged."""
        try:
            more = self.tick()
            self.trouble = ""
        except Exception as error:  # noqa: BLE001 - logged; the loop goes on
            self.complain(error)
            return False
        return more

    def complain(self, error: Exception) -> None:
        """Log an error of a tick, once as long as it stays the same; a bug is logged with its traceback."""
        text = one_line(f"{type(error).__name__}: {error}")
        if text == self.trouble or not self.started:  # when stopping, the store may close before the last tick is done
            return
        self.trouble = text
        known = isinstance(error, (StorageError, OSError))
        said = str(error) if known else text
        log.error("%s: %s; it is tried again every %s", self.name, said, format_duration(self.period_s), exc_info=None if known else error)


def keep_time(loops: Iterable[Loop], stopping: threading.Event) -> None:
    """The timer of all loops of a process: look at each loop after each of its periods, until `stopping`."""
    due = [(time.monotonic() + loop.period_s, number, loop) for number, loop in enumerate(loops)]
    heapq.heapify(due)
    while not stopping.wait(max(0.0, due[0][0] - time.monotonic()) if due else None):
        now = time.monotonic()
        while due[0][0] <= now:
            at, number, loop = due[0]
            loop.look()
            heapq.heapreplace(due, (max(at + loop.period_s, now), number, loop))


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


class WorkerLimit:
    """Limits how many threads work at once, because more would only contend for the GIL. A waiting thread gives up its place."""

    def __init__(self, places: int) -> None:
        self.free, self.mine = threading.Semaphore(places), threading.local()

    def __enter__(self) -> None:
        self.free.acquire()
        self.mine.inside = True

    def __exit__(self, *_: object) -> None:
        self.mine.inside = False
        self.free.release()

    @contextlib.contextmanager
    def stepped_out(self) -> Iterator[None]:
        """Give up this thread's place during the block, if it has one."""
        inside = getattr(self.mine, "inside", False)
        if inside:
            self.__exit__()
        try:
            yield
        finally:
            if inside:
                self.__enter__()


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


class Watch:
    """Waits for the sockets of a process with epoll(7). It replaces waitress's loop, which asks every socket at each turn.

    This one asks the sockets that had an event or that a worker serves, and all of them once a second.
    """

    def __init__(self) -> None:
        self.epoll, self.known = select.epoll(), cast("dict[int, tuple[Any, int]]", {})  # by descriptor: its connection, and the events
        self.touched = deque[Any]()  # by other threads
        self.again: set[Any] = set()
        self.next_sweep = 0.0  # monotonic

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
        if now >= self.next_sweep:
            self.next_sweep = now + 1
            due.update(list(sockets.values()))
            self.known = {descriptor: of for descriptor, of in self.known.items() if of[0]._fileno == descriptor}
        for each in due:
            self.register(each)
        self.again = {each for each in due if each._fileno is not None and getattr(each, "serving", True)}
        for descriptor, flags in self.epoll.poll(timeout_s):
            found = sockets.get(descriptor)
            if found is not None:  # else another event has closed it
                wasyncore.readwrite(found, flags)
                self.again.add(found)

    def register(self, each: Any) -> None:
        """Register with the kernel the events that a connection or listener waits for now."""
        descriptor = each._fileno
        if descriptor is None:
            return
        flags = select.EPOLLIN | select.EPOLLPRI if each.readable() else 0
        flags |= select.EPOLLOUT if each.writable() and not each.accepting else 0
        if each._fileno is None or self.known.get(descriptor) == (each, flags):
            return
        with contextlib.suppress(FileNotFoundError):  # it was closed, so the kernel has removed it
            if descriptor in self.known:
                self.epoll.unregister(descriptor)
        self.known.pop(descriptor, None)
        if flags:
            self.epoll.register(descriptor, flags)
            self.known[descriptor] = (each, flags)


DAY_S = 24 * 3600.0


class Program:
    """The file that this process runs, `joborch.pyz` or `joborch.py`, as it was at the start."""

    # Set by zipapp_main.py: the path of joborch.pyz, its SHA-256, and why it runs without a copy in the cache.
    archive: ClassVar[tuple[str, bytes, str] | None] = None

    def __init__(self) -> None:
        own = os.path.abspath(__file__)
        self.path, self.digest, _ = self.archive or (own, hashlib.sha256(Path(own).read_bytes()).digest(), "")
        self.copy = os.path.dirname(own) if self.archive and os.path.isfile(own) else None
        self.lock, self.seen, self.trouble = threading.Lock(), cast("tuple[int, ...]", ()), ""

    def keep_copy(self) -> None:
        """Touch the copy in the cache once a day: starts of other versions remove copies that were not used for 30 days."""
        with contextlib.suppress(OSError):  # missing or read-only; everything needed is in memory
            if self.copy and os.stat(self.copy).st_mtime < time.time() - DAY_S:
                os.utime(self.copy)

    def restart_needed(self) -> str:
        """Return why this process should be restarted (its file has changed), or an empty text. Log a new reason."""
        name = os.path.basename(self.path)
        with self.lock:
            try:
                state = os.stat(self.path)
                seen: tuple[int, ...] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
                if seen == self.seen:
                    return self.trouble
                same = hashlib.sha256(Path(self.path).read_bytes()).digest() == self.digest
                trouble = "" if same else f"{name} was replaced after this process started: restart it to run the new file"
            except FileNotFoundError:
                seen, trouble = (), f"{name} was removed after this process started: put it back, or the next start will fail"
            except OSError:
                return self.trouble  # it cannot be read now
            if trouble and trouble != self.trouble:
                log.warning("%s", trouble)
            self.seen, self.trouble = seen, trouble
            return trouble


class Node:
    """One process, server or client: its settings, its store, its folders, its loops."""

    def __init__(self, config: Config, store: Store, data: DataFolder, clock: Clock | None = None) -> None:
        self.config, self.store, self.data, self.clock = config, store, data, clock or Clock()
        # A client's archives may use the reserved space: only a result that was fetched can be deleted.
        data.keep_free(config.min_free_bytes, packs_below_minimum=config.mode == "client")
        self.loops: dict[str, Loop] = {}
        self.pool, self.silent_pool = Pool("loop"), Pool("silent", SILENT_THREADS)
        self.waiters, self.places, self.gate = WaiterLimit(WAITER_PLACES), WaiterLimit(EVENTS_PLACES), WorkerLimit(WORKER_THREADS)
        self.refused = RefusedTokens(self.clock)
        self.pack_places = WaiterLimit(PACK_READERS)
        self.tokens: tuple[str, ...] = tuple(token.strip() for token in config.token.split(",") if token.strip())
        self.proofs = ProofReader(self.tokens)
        self.old_server_at = float("-inf")  # monotonic: when a server that cannot prove its identity was last logged
        self.started, self.program = self.clock.monotonic(), Program()
        self.full_said_at = float("-inf")  # monotonic: when the log last said that uploads are refused
        self.stopping = threading.Event()
        self.unremovable: dict[int, Unremovable] = {}  # by id: ended jobs whose files cannot be removed
        self.load, self.last_cpu, self.cpu_read_at = 0.0, (0, 0), float("-inf")  # percent; /proc/stat's total and idle; monotonic

    def folder(self, job: Job) -> Path:
        """Return the folder of a job's files: one for each job on the server, one for each attempt on a client."""
        return self.data.job(job.uuid if self.config.mode == "server" else job.mark)

    def wake(self, name: str) -> None:
        loop = self.loops.get(name)
        if loop is not None:
            loop.wake()

    def start(self) -> None:
        for loop in self.loops.values():
            loop.start()
        threading.Thread(target=keep_time, args=(self.loops.values(), self.stopping), name="timer", daemon=True).start()

    def stop(self) -> None:
        """Stop the loops and wake all waiting callers. Payloads keep running."""
        self.stopping.set()
        for loop in self.loops.values():
            loop.stop()
        self.store.core.wake_all()
        stop_pools((self.pool, self.silent_pool), 1.0)

    def cpu_load(self) -> float:
        """Return the CPU use of this machine over the last second or so, in percent."""
        now = self.clock.monotonic()
        if now - self.cpu_read_at < 1:
            return self.load
        self.cpu_read_at = now
        fields = [int(text) for text in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        total, idle = sum(fields), fields[3] + fields[4]
        last_total, last_idle = self.last_cpu
        if total - last_total >= 10:  # clock ticks; fewer are too imprecise
            self.last_cpu, self.load = (total, idle), round(100 * (1 - (idle - last_idle) / (total - last_total)), 1)
        return self.load

    def wait_until(self, look: Callable[[], T | None], timeout_s: float, left: Callable[[], bool], job_id: int | None = None) -> T | None:
        """Return what `look` finds, as soon as it finds something. None after `timeout_s`, if we stop, or if the caller has `left`.

        The core looks again when the job moves; if `job_id` is None, when any job moves.
        """
        deadline = self.clock.monotonic() + timeout_s
        with self.store.core.watching(look, job_id) as waiter:
            found = look()
            while found is None:
                remaining = deadline - self.clock.monotonic()
                if remaining <= 0 or self.stopping.is_set() or left():
                    break
                with self.gate.stepped_out():
                    waiter.bell.wait(min(remaining, 2.0))
                found = waiter.take()
        return found


# == 6. Routes ==  A route is declared once: who may call it, what it takes, and what it answers.


class Parameter(NamedTuple):
    """One parameter of a route: the declaration makes both the OpenAPI entry and the check."""

    name: str
    place: str  # path, query, header or form
    kind: str  # string, integer, number, boolean or file
    help: str
    example: Any = None
    required: bool = False
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str = ""  # of a string; shown in OpenAPI, and checked by `read`
    default: Any = None  # the value if it is absent
    longest: int | None = None  # characters of a string, all of them printable
    missing: str = ""  # the remedy if it is required and absent
    read: Callable[[str], Any] | None = None  # makes the value from a text, or raises ValueError with the remedy

    def value(self, text: str | None) -> Any:
        """Return the value of the `text` in a request, or the default for None. Raises HttpError 400 with the remedy.

        In forms and headers, white space around the text is ignored, and an empty text counts as absent.
        """
        shown = text
        if text is not None and self.place in ("form", "header"):
            text = text.strip()
            shown = text if text or self.missing else None
        if shown is None:
            if self.missing:
                raise HttpError(400, f"{self.name} is missing: {self.missing}", self.name)
            return self.default
        try:
            return self.checked((self.read or self.plain)(shown))
        except ValueError as error:
            raise HttpError(400, f"{self.name} is {one_line(shown, 40)!r}: {error}", self.name) from error

    def plain(self, text: str) -> Any:
        """Convert a text to this kind. Raises ValueError with the remedy."""
        if self.kind != "integer":
            return text
        if not re.fullmatch(r"[+-]?[0-9]{1,30}" if self.place == "form" else r"-?[0-9]{1,30}", text):
            raise ValueError(self.whole_number)
        return int(text)

    def checked(self, value: Any) -> Any:
        """Return `value` if it is within the bounds. Raises ValueError that names them."""
        if self.choices and value not in self.choices:
            raise ValueError(f"give {' or '.join(self.choices)}" if len(self.choices) == 2 else f"give one of {', '.join(self.choices)}")
        if self.longest is not None and (len(value) > self.longest or not value.isprintable()):
            raise ValueError(f"give at most {self.longest} printable characters")
        below_least = self.least is not None and value < self.least
        if self.kind in ("integer", "number") and (below_least or (self.most is not None and value > self.most)):
            raise ValueError(self.whole_number)
        return value

    @property
    def whole_number(self) -> str:
        """The remedy if a whole number is required."""
        bounds = (("from", self.least), ("to", self.most))
        return "give a whole number" + "".join(f" {word} {bound}" for word, bound in bounds if bound is not None)


def read_all(parameters: Iterable[Parameter], texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the value of each parameter by its name. Raises HttpError for the first that is invalid."""
    return {parameter.name: parameter.value(texts.get(parameter.name)) for parameter in parameters}


class Gives(NamedTuple):
    """One answer of a route: what it means, its content type ("" for none) and a real example."""

    meaning: str
    content: str = ""
    example: Any = None


@dataclass(frozen=True)
class Request:
    """What a handler sees of a request."""

    environ: Mapping[str, Any]

    @property
    def caller(self) -> Caller | None:
        """Who calls; None on a route for anyone, if nothing was proven."""
        return cast("Caller | None", self.environ.get(CALLER_KEY))

    @functools.cached_property
    def query_pairs(self) -> list[tuple[str, str]]:
        return parse_qsl(self.environ.get("QUERY_STRING", ""), keep_blank_values=True)

    @functools.cached_property
    def query(self) -> dict[str, str]:
        return dict(self.query_pairs)

    @property
    def method(self) -> str:
        return str(self.environ["REQUEST_METHOD"])

    @property
    def stream(self) -> IO[bytes]:
        return cast("IO[bytes]", self.environ["wsgi.input"])

    @property
    def length(self) -> int:
        return int(self.environ.get("CONTENT_LENGTH") or 0)

    def read_form(self, folder: Path, by_name: bool = False, unpack_limit_bytes: int = 0) -> Form:
        """Read the form of this request and write its files to `folder`. They use up the disk space reserved for the request.

        With `unpack_limit_bytes`, archives are unpacked, and all files may have so many bytes. Raises HttpError, also if the body
        is not the one of its Content-Digest.
        """
        promise: Promise | None = self.environ.get("joborch.promise")
        account = (promise.more_for_file, promise.wrote, promise.more) if promise is not None else ()
        reader, stream = FormReader(folder, by_name, *account), self.stream
        reader.unpack_limit_bytes = unpack_limit_bytes
        digest = self.header("Content-Digest")
        if not digest:
            return reader.read(stream, self.header("Content-Type"), self.length)
        checked = load_plugin("uploads").DigestedBody(stream, digest)
        try:
            form = reader.read(cast("IO[bytes]", checked), self.header("Content-Type"), self.length)
        except HttpError:
            checked.check()  # the true reason
            raise
        checked.check()
        return form

    def header(self, name: str) -> str:
        key = name.upper().replace("-", "_")
        return str(self.environ.get(key if key == "CONTENT_TYPE" else "HTTP_" + key, ""))

    def left(self) -> bool:
        """Tell whether the caller has closed the connection."""
        gone = self.environ.get("waitress.client_disconnected")
        return bool(gone and gone())


@dataclass
class Answer:
    """What a handler returns: a JSON value, bytes, an open file, or nothing; a status; further headers."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, refusal: HttpError) -> Answer:
        said = {"message": refusal.message, **({"field": refusal.field} if refusal.field else {})}
        return cls(said, refusal.status, dict(refusal.headers))


Handler = Callable[..., Answer]


@dataclass(frozen=True)
class Route:
    """One declaration, which makes the Bottle route, the OpenAPI entry, the access rule and a test."""

    method: str
    path: str  # with <name> for its variable parts
    mode: str  # "server", "client" or "server client"
    who: str  # anyone; caller; or server: one that proved itself by the link's MAC, or any caller if no token is set
    summary: str
    takes: tuple[Parameter, ...]
    gives: Mapping[int, Gives]
    handler: Handler
    quick: bool  # only reads the database: a WorkerLimit lets few run at once
    slow: bool  # its duration depends on others: on what a script wrote, a client's answer, the size of an upload

    def taken(self, place: str) -> list[Parameter]:
        return [parameter for parameter in self.takes if parameter.place == place]

    @property
    def takes_form(self) -> bool:
        return bool(self.taken("form"))

    @property
    def needs_form(self) -> bool:
        return any(parameter.required for parameter in self.taken("form"))

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        part = re.sub(r"<(\w+)>", r"(?P<\1>[^/]+)", self.path)
        return re.compile("^" + re.sub(r"<(\w+):path>", r"(?P<\1>.+)", part) + "$")


ROUTES: list[Route] = []


def route(
    method: str,
    path: str,
    mode: str,
    *,
    who: str,
    takes: Sequence[Parameter] = (),
    gives: Mapping[int, Gives],
    quick: bool = False,
    slow: bool = False,
) -> Callable[[Handler], Handler]:
    """Declare a route. The first sentence of the handler's docstring is its summary."""

    def declare(handler: Handler) -> Handler:
        summary = (handler.__doc__ or "").strip().split("\n")[0]
        ROUTES.append(Route(method, path, mode, who, summary, tuple(takes), gives, handler, quick, slow))
        return handler

    return declare


@functools.lru_cache(maxsize=2)
def routes_of(mode: str) -> tuple[Route, ...]:
    """Return the routes of one mode, in an order that does not depend on which plug-in was imported first."""
    order = {load_plugin(name).__name__: number for number, name in enumerate(ROUTE_PLUGINS)}
    sorted_routes = sorted(ROUTES, key=lambda found: order.get(found.handler.__module__, -1))
    return tuple(found for found in sorted_routes if mode in found.mode.split())


def find_route(mode: str, method: str, path: str) -> Route:
    """Return the route of a request. Raises HttpError 404 or 405."""
    wanted = "GET" if method == "HEAD" else method
    here = [found for found in routes_of(mode) if found.pattern.match(path)]
    for found in here:
        if found.method == wanted:
            return found
    if here:
        allowed = sorted({found.method for found in here} | ({"HEAD"} if any(found.method == "GET" for found in here) else set()))
        raise HttpError(405, f"{one_line(method, 20)} is not possible here: use {' or '.join(allowed)}", Allow=", ".join(allowed))
    raise HttpError(404, f"there is nothing at {one_line(path, 80)}{nearest_path(mode, path)}: see /swagger-ui/")


def nearest_path(mode: str, path: str) -> str:
    """Return ` (did you mean /jobs/1?)` for a path whose first part is almost that of a route, or an empty text."""
    first, *rest = path.strip("/").split("/")
    known = {found.path.split("/")[1] for found in routes_of(mode)} - {""}
    import difflib

    for close in [first, *difflib.get_close_matches(first[:80], known, n=1)]:
        meant = "/" + "/".join([close, *rest])
        if len(meant) <= 80 and any(found.pattern.match(meant) for found in routes_of(mode)):
            return f" (did you mean {one_line(meant)}?)"
    return ""


def validate(node: Node, request: Request, declared: Route, path: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the declared parameters in path and query. Raises HttpError 400 or 404."""
    refuse_unknown(node, request, declared)
    texts = {"path": path, "query": request.query}
    return {name: value for place, given in texts.items() for name, value in read_all(declared.taken(place), given).items()}


def refuse_unknown(node: Node, request: Request, declared: Route) -> None:
    """Raise HttpError 400 for a query parameter that the route does not declare, or that is given twice.

    If a filter were silently ignored, the caller would misread the answer. A server may send its client any parameter: it may
    be newer than the client.
    """
    if not request.query_pairs or (node.config.mode == "client" and request.header(OURS_HEADER)):
        return
    known = [parameter.name for parameter in declared.taken("query")]
    for name, times in Counter(name for name, _ in request.query_pairs).items():
        shown = one_line(name, 80)
        if name not in known and any(parameter.name == name for parameter in declared.taken("form")):
            raise HttpError(400, f"{shown} does not belong in the URL: send it in the form, as in -F {shown}=...", shown)
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            path = re.sub(r"<(\w+)(:path)?>", r"{\1}", declared.path)
            raise HttpError(400, f"{shown!r} is not a parameter of {declared.method} {path}{nearest(name, known)}: {takes}", shown)
        if times > 1:
            raise HttpError(400, f"{shown} is in the URL {times} times: give it once", shown)


MISSING_USER = "give the whole number of a user, as in -F user_id=1"
EXAMPLE_ERROR = {"message": f"user_id is missing: {MISSING_USER}", "field": "user_id"}
BAD = Gives("the request cannot be understood; `field` is what to change", JSON_TYPE, EXAMPLE_ERROR)
NOT_FOUND = Gives("no job has this id", JSON_TYPE, {"message": "no job has the id 42"})
NO_LENGTH = Gives("no length", JSON_TYPE, {"message": "the request has no body: send a form with Content-Length, as curl -F does"})
TOO_LARGE = Gives("too large", JSON_TYPE, {"message": "the request is 20000000000 bytes large: at most 10737418240 (JOBORCH_MAX_UPLOAD)"})
NOT_A_FORM = Gives("not a form", JSON_TYPE, {"message": "send a form as multipart/form-data, as curl -F does"})
KEY_USED = Gives(
    "the Idempotency-Key was used before with other content", JSON_TYPE, {"message": "this Idempotency-Key was used for job 42"}
)
NO_STORAGE = Gives("storage cannot be written now", JSON_TYPE, {"message": "the database cannot be used now: try again soon"})
DISK_FULL = Gives("disk full", JSON_TYPE, {"message": "the disk of this server is too full for 1000000 bytes more: try again later"})
CLIENT_AWAY = Gives("its client does not answer now", JSON_TYPE, {"message": "gpu1:9000 cannot be reached: connection refused"})
RECEIVING = {411: NO_LENGTH, 413: TOO_LARGE, 415: NOT_A_FORM, 503: NO_STORAGE, 507: DISK_FULL}
PARTS = {
    206: Gives("the part that Range requested", ZIP_TYPE),
    304: Gives("you have it already (If-None-Match)"),
    416: Gives("the Range is outside the file", JSON_TYPE, {"message": "there are 1234 bytes: ask for a part of them"}),
}


# == 7. Server routes ==  The HTTP contract of the server; each route is declared once, with real examples.

EXAMPLE_JOB: dict[str, Any] = {
    "id": 42, "uuid": "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0", "user_id": 1, "service": "example", "name": None, "status": "Queued",
    "ended_as": None, "reason": "uploaded", "cause": None, "exit_code": None, "signal": None, "priority": 0, "cpus": 1, "memory": None,
    "timeout": None, "retries": 2, "after": [], "retry_of": None, "attempt": 1, "client": None, "dest_id": "",
    "loc": "/data/jobs/8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0", "message": "it is next for a free slot at a client for example",
    "created_at": "2026-11-24T09:00:00.000Z", "started_at": None, "ended_at": None,
    "queue_position": 1, "estimated_start": "2026-11-24T09:00:00.000Z",
    "waiting_for": "it is next for a free slot at a client for example",
    "result": None, "attempts": [],
    "history": [{"at": "2026-11-24T09:00:00.000Z", "from": None, "to": "Queued", "reason": "uploaded", "attempt": 1}],
}  # fmt: skip
EXAMPLE_PAYLOAD = {"id": 1, "input": {}, "status": "Prepared", "loc": "/data/jobs/8f14e45f.1", "pid": 0, "killed": False}
EXAMPLE_HEALTH = {
    "status": "ok", "database": "ok", "version": __version__, "mode": "server", "uptime_s": 12.5, "restart_needed": None,
    "unremovable": None,
}  # fmt: skip
QUEUE_FULL = {"message": "user 1 has 10,000 jobs queued, which is the limit", "field": "user_id"}
AFTER_LIMIT = 1000  # jobs that one may follow
SMALLEST, BIGGEST = -(2**63), 2**63 - 1  # of the whole numbers that SQLite keeps


def read_job_id(text: str) -> int:
    """Return a job id from a path. Raises HttpError 400 if it is not a number, 404 if no job can have it."""
    if not re.fullmatch(r"-?[0-9]{1,30}", text):
        raise HttpError(400, f"{one_line(text, 40)!r} is not a job id: give a whole number", "id")
    if not 1 <= int(text) < 2**63:
        raise HttpError(404, f"no job has the id {text}")
    return int(text)


ID = Parameter("job_id", "path", "integer", "the id of a job", 42, required=True, least=1, read=read_job_id)
IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    "header",
    "string",
    "of your choice; a repeat with the same key gets the first answer and starts nothing",
    "run-2026-11-24-a",
    default="",
    longest=255,
)


def known_job(node: Node, request: Request, job_id: int) -> Job:
    """Return a job that the caller of `request` may see. Raises HttpError 404.

    All routes for one job find it here, so ownership can be checked in one place.
    """
    job = node.store.get(job_id)
    if job is None:
        raise HttpError(404, f"no job has the id {job_id}")
    return job


def job_summary(server: Server, job: Job) -> dict[str, Any]:
    """Return the job in JSON without attempts, history and queue position, which need further queries."""
    said = {name: getattr(job, name, None) for name in EXAMPLE_JOB if name not in ("attempts", "history")}
    said.update(status=job.status.value, ended_as=job.end, after=ids_in(job.after_ids), dest_id=job.dest_id or "", message=job.reason)
    said.update({name: rfc3339(said[name]) for name in ("created_at", "started_at", "ended_at")}, loc=str(server.folder(job)))
    if job.result_sha256 is not None:
        said["result"] = {"size": job.result_size, "sha256": job.result_sha256}
    return said


def job_json(server: Server, job: Job, outlook: QueueInfo | None = None) -> dict[str, Any]:
    """Return the whole job in JSON, as the row was when it was read; its `outlook` is looked up unless it is given."""
    said = job_summary(server, job)
    outlook = outlook or queue_info_of(server, job)
    said["waiting_for"], said["queue_position"] = outlook.waiting_for, outlook.position
    said["message"] = outlook.waiting_for or job.reason
    if outlook.wait_s is not None:
        said["estimated_start"] = rfc3339(server.clock.wall() + outlook.wait_s)
    rows = [dict(row) for row in server.store.read(ATTEMPTS_GET, id=job.id)] if job.attempt > 1 else []
    if job.client is not None:
        rows.append({name: getattr(job, name) for name in ATTEMPT})
    said["attempts"] = [{**row, "started_at": rfc3339(row["started_at"]), "ended_at": rfc3339(row["ended_at"])} for row in rows]
    said["history"] = [
        {"at": rfc3339(row["at"]), "from": row["source"], "to": row["target"], "reason": row["reason"], "attempt": row["attempt"]}
        for row in server.store.read(HISTORY_GET, id=job.id)[: job.moves]
    ]
    return said


# -- upload --


def read_user(text: str) -> int:
    """Return the number of a user."""
    if not re.fullmatch(r"[+-]?[0-9]{1,1000}", text):
        raise ValueError("give the number that the user has in your system, as in -F user_id=1")
    return int(text)


def read_after(text: str) -> str:
    """Return the ids of the jobs that must be Completed first: sorted, each once, separated by commas."""
    ids = [each.strip() for each in text.split(",") if each.strip()]
    if len(ids) > AFTER_LIMIT or not all(re.fullmatch(r"[0-9]{1,18}", each) for each in ids):
        raise ValueError(f"give at most {AFTER_LIMIT} job ids separated by commas, as in -F after=41,42")
    return ",".join(map(str, sorted(set(map(int, ids)))))


RUN_TIME, MEMORY = r"^[0-9]+(\.[0-9]+)?[smhd]?$", r"^[0-9]+([KMGkmg]i?[Bb]?)?$"
FORM_FILE = Parameter("file", "form", "file", "one or more files; a filename may be a relative path; run.sh is the script")
ARCHIVE_HELP = "a zip, tar or tar.gz with files of the job; a folder around all of them is left out if run.sh is in it"
FORM_ARCHIVE = Parameter("archive", "form", "file", ARCHIVE_HELP)
CONTENT_DIGEST = Parameter(
    "Content-Digest", "header", "string", "SHA-256 of the body (RFC 9530); another body is refused",
    "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:",
)  # fmt: skip
FORM_FIELDS = {
    field.name: field
    for field in (
        Parameter(
            "user_id", "form", "integer", "the user who owns the job", 1, True, SMALLEST, BIGGEST, missing=MISSING_USER, read=read_user
        ),
        Parameter("service", "form", "string", "which service runs it", "example", True, default=""),
        Parameter("name", "form", "string", "a name of your choice, at most 200 characters", "2oob", longest=200),
        Parameter("priority", "form", "integer", "of your own jobs, the highest priority runs first", 0, least=-100, most=100, default=0),
        Parameter(
            "after", "form", "string", "ids of your jobs, separated by commas: it runs once all are Completed", "41",
            default="", read=read_after,
        ),
        Parameter(
            "timeout", "form", "string", "run time limit: seconds, or with s, m, h or d", "90m", pattern=RUN_TIME, read=read_run_time
        ),
        Parameter("retries", "form", "integer", "further attempts after an infrastructure failure", 2, least=0, most=100),
        Parameter("cpus", "form", "integer", "cores the script needs", 1, least=1, most=1_000_000, default=1),
        Parameter("memory", "form", "string", "memory the script needs: MiB, or with M or G", "2G", pattern=MEMORY, read=read_mib),
        Parameter(
            "crlf", "form", "string", "Windows line ends in run.sh: `fix` changes them, `keep` leaves them; else they are refused", "fix",
            choices=("fix", "keep"),
        ),
    )
}  # fmt: skip


def refuse_too_large(server: Server, service: Service, cpus: int, memory: int | None) -> None:
    """Raise HttpError 400 for a job that no client of a service could ever run, once all clients have reported their size."""
    links = server.links_of(service)
    if all(link.heard_at is not None for link in links):
        too_large = too_large_text(service.name, cpus, memory, server.capacities_of(links))
        if too_large:
            field = "cpus" if all(cpus > link.slots for link in links) else "memory"
            raise HttpError(400, too_large, field)


def named_service(server: Server, text: str) -> Service:
    """Return the service that a caller names. Raises HttpError 400 that lists the known ones."""
    service = server.services.get(text.lower())
    if service is None:
        known = ", ".join(sorted(server.services))
        raise HttpError(400, f"service {one_line(text, 80)!r} is not known: give one of {known}", "service")
    return service


def new_job(server: Server, form: Form, job_uuid: str, **more: Any) -> NewJob:
    """Return the row for a received form; `more` are further columns. Raises HttpError 400 for the first invalid field."""
    given = read_all(FORM_FIELDS.values(), form.fields)
    if not given["service"]:
        known = ", ".join(sorted(server.services))
        raise HttpError(400, f"service is missing: give one of {known}, as in -F service={next(iter(server.services))}", "service")
    service = named_service(server, given["service"])
    if not form.files:
        raise HttpError(400, "there is no file: send at least run.sh, as in -F file=@run.sh", "file")
    if not any(file.path == "run.sh" for file in form.files):
        raise HttpError(400, no_script_text([file.path for file in form.files]), "file")
    refuse_too_large(server, service, given["cpus"], given["memory"])
    limit_s, most_s = given["timeout"], service.timeout_s
    if limit_s is not None and most_s is not None and limit_s > most_s:
        raise HttpError(400, f"timeout is {limit_s:.12g}: service {service.name} allows at most {most_s:.12g} seconds", "timeout")
    return NewJob(
        uuid=job_uuid,
        user_id=given["user_id"],
        service=service.name,
        name=given["name"],
        priority=given["priority"],
        after_ids=given["after"],
        cpus=given["cpus"],
        memory=given["memory"],
        timeout=most_s if limit_s is None else limit_s,
        retries=service.retries if given["retries"] is None else given["retries"],
        return_inputs=int(service.return_inputs),
        **more,
    )


def key_columns(request: Request, form: Form, *more: str) -> dict[str, str | None]:
    """Return the columns by which a repeat of this request is known: independent of the form's boundary and order."""
    key = IDEMPOTENCY_KEY.value(request.header("Idempotency-Key"))
    files = sorted((file.path, file.size, file.sha256) for file in form.files)
    said = json.dumps([sorted(form.fields.items()), files, *more]).encode()
    return {"idempotency_key": key or None, "request_digest": hashlib.sha256(said).hexdigest() if key else None}


def receive_form(server: Server, request: Request, folder: Path) -> Form:
    """Receive the form of a job, and its files in `folder`. Raises HttpError, also for a run.sh with Windows line ends."""
    form = request.read_form(folder, unpack_limit_bytes=server.config.max_upload_bytes)
    crlf = FORM_FIELDS["crlf"].value(form.fields.get("crlf"))
    for number, file in enumerate(form.files):
        if file.path == "run.sh" and crlf != "keep":
            form.files[number] = load_plugin("uploads").without_crlf(file, folder / "run.sh", may_fix=crlf == "fix")
    return form


BATCH_LINE = re.compile(rb"^#(SBATCH|PBS|BSUB|\$)[ \t]+-", re.MULTILINE)  # of Slurm, PBS, LSF and Grid Engine


def batch_line_warnings(script: Path) -> list[str]:
    """Return a warning about lines of a run.sh that are meant for a batch system, which joborch ignores."""
    try:
        with open_regular(script) as file:
            words = BATCH_LINE.findall(file.read(64 * KIB))
    except OSError:
        return []  # there is none
    if not words:
        return []
    which = " and ".join(f"#{word.decode()}" for word in dict.fromkeys(words))
    text = f"run.sh has {plural(len(words), 'line', 'lines')} with {which}, which joborch ignores"
    fields = "give cpus, memory (MiB) and timeout (seconds) as fields of the upload, as in -F cpus=4 -F memory=2048 -F timeout=3600"
    return [f"{text}: {fields}; partition, account and the like are settings of the client, such as SERVICE_<NAME>_SLURM_PARTITION"]


@contextlib.contextmanager
def receiving(node: Node, folder: Path, key: str) -> Iterator[None]:
    """Create `folder` for an upload, and remove it if the block fails."""
    node.data.receiving.add(key)
    try:
        folder.mkdir()
        yield
    except BaseException:
        discard(folder)
        raise
    finally:
        node.data.receiving.discard(key)


UPLOAD_GIVES = {
    201: Gives("the job is stored durably", JSON_TYPE, EXAMPLE_JOB),
    400: BAD,
    422: KEY_USED,
    429: Gives("this user has too many jobs queued; Retry-After says when to try again", JSON_TYPE, QUEUE_FULL),
    **RECEIVING,
}


FORM = (FORM_FILE, FORM_ARCHIVE, *FORM_FIELDS.values())


@route("POST", "/upload", "server", who="caller", slow=True, takes=(*FORM, IDEMPOTENCY_KEY, CONTENT_DIGEST), gives=UPLOAD_GIVES)
def upload(server: Server, request: Request) -> Answer:
    """Queue a job: send its files, its user and its service."""
    job_uuid = new_uuid()
    folder = server.data.job(job_uuid)
    with receiving(server, folder, job_uuid):
        form = receive_form(server, request, folder)
        digest = inputs_digest({file.path: file.sha256 for file in form.files})
        new = new_job(server, form, job_uuid, inputs_sha256=digest, **key_columns(request, form))
        crash_point("upload.received")
        job, is_new = keep_upload(server, new, folder, [file.path for file in form.files])
    return upload_answer(server, job, form, folder, is_new)


def upload_answer(server: Server, job: Job, form: Form, folder: Path, is_new: bool) -> Answer:
    """Return the answer to an upload, with warnings about its fields and its run.sh unless it is a repeat."""
    if not is_new:
        return Answer(job_json(server, job), 201, {"Location": f"/jobs/{job.id}"})
    known = [parameter.name for parameter in FORM]
    unknown = [name for name in form.fields if name not in known]
    warnings = [f"field {one_line(name, 80)!r} is not known and was ignored{nearest(name, known)}" for name in unknown]
    warnings += [*hints_for(folder / "run.sh"), *batch_line_warnings(folder / "run.sh")]
    claimed = server.store.read(JOB_STATUS, id=job.id)[0]["status"] != job.status.value  # in the same transaction: it waits for nothing
    said = {**job_json(server, job, NEXT if claimed else None), "warnings": warnings}
    return Answer(said, 201, {"Location": f"/jobs/{job.id}", "X-Job-Status": job.status.value})


def keep_upload(server: Server, new: NewJob, folder: Path, paths: Sequence[str]) -> tuple[Job, bool]:
    """Store a new job with its files `paths` in `folder` durably; return it, and True.

    If a request with the same Idempotency-Key was stored earlier, remove the folder and return that request's job, and False.
    """
    earlier = earlier_job(server, new)
    if earlier is None:
        fsync_tree(folder, paths)
        crash_point("upload.synced")
        server.store.check_identity()
        try:
            job = stored(server, new)
            crash_point("upload.stored")
            return job, True
        except sqlite3.IntegrityError:
            earlier = earlier_job(server, new)
            if earlier is None:
                raise
    discard(folder)
    return earlier, False


def stored(server: Server, new: NewJob) -> Job:
    """Store an uploaded job. Raises HttpError 400 if it cannot follow the jobs in `after`, 429 if its user has too many queued jobs."""
    try:
        return server.store.add(new, "uploaded", server.config.max_queued_per_user)
    except UnknownJob as error:
        raise HttpError(400, f"after: {error}", "after") from error
    except QueueFull as error:
        message = f"{error} (JOBORCH_MAX_QUEUED_PER_USER): send more when some of them have started"
        raise HttpError(429, message, "user_id", Retry_After=str(FULL_QUEUE_RETRY_S)) from error


def earlier_job(server: Server, new: NewJob) -> Job | None:
    """Return the job of an Idempotency-Key that was used before. Raises HttpError 422 if that was another request."""
    if not new.idempotency_key:
        return None
    job = server.store.job(JOB_BY_KEY, user_id=new.user_id, idempotency_key=new.idempotency_key)
    if job and job.request_digest != new.request_digest:
        raise HttpError(422, f"this Idempotency-Key was used for job {job.id} with other files or fields: use a new one", "Idempotency-Key")
    return job


INPUTS_GONE = {"message": "the files of job 42 are deleted: upload them again"}
RETRY_GIVES = {
    201: Gives("the new job, stored durably", JSON_TYPE, {**EXAMPLE_JOB, "id": 43, "retry_of": 42}),
    400: BAD,
    404: NOT_FOUND,
    410: Gives("its files are deleted", JSON_TYPE, INPUTS_GONE),
    422: KEY_USED,
    429: UPLOAD_GIVES[429],
    **RECEIVING,
}
RETRY_FORM = tuple(parameter._replace(required=False) for parameter in FORM if parameter.name != "user_id")


@route(
    "POST",
    "/jobs/<job_id>/retry",
    "server",
    who="caller",
    slow=True,
    takes=(ID, *RETRY_FORM, IDEMPOTENCY_KEY, CONTENT_DIGEST),
    gives=RETRY_GIVES,
)
def retry(server: Server, request: Request, job_id: int) -> Answer:
    """Queue a new job with the files and fields of this one, which stays as it is. A form may replace some of them."""
    job, job_uuid = known_job(server, request, job_id), new_uuid()
    folder = server.data.job(job_uuid)
    with receiving(server, folder, job_uuid):
        form = receive_form(server, request, folder) if request.length else Form()
        own = key_columns(request, form, f"retry {job.id}")
        if form.fields.setdefault("user_id", str(job.user_id)).strip() != str(job.user_id):
            raise HttpError(400, f"user_id is another: job {job.id} and its retries belong to user {job.user_id}", "user_id")
        form.fields = {**fields_of(server, job, form.fields), **form.fields}
        digest = inherit_files(server, job, form, folder)
        # Judged afterwards: the cleaner may have begun to delete them meanwhile.
        if are_files_due(server, known_job(server, request, job_id)):
            raise files_gone(job)
        new = new_job(server, form, job_uuid, inputs_sha256=digest, retry_of=job.id, **own)
        made, is_new = keep_upload(server, new, folder, [file.path for file in form.files])
    log.info("job %d has the files of job %d, which was retried", made.id, job.id)
    return upload_answer(server, made, form, folder, is_new)


def files_gone(job: Job) -> HttpError:
    """Return the error about a job that cannot be retried."""
    return HttpError(410, f"the files of job {job.id} are deleted: upload them again")


def fields_of(server: Server, job: Job, given: Mapping[str, str]) -> dict[str, str]:
    """Return the fields of a job as texts of a form; `given` are those that replace some. The service's own time limit is left out."""
    service = server.services.get(given.get("service", job.service or "").strip().lower())
    most_s = service.timeout_s if service else None
    limit_s = None if job.timeout is None or (most_s is not None and job.timeout >= most_s) else f"{job.timeout:.3f}"
    texts = {"service": job.service, "name": job.name, "after": job.after_ids, "timeout": limit_s}
    numbers = {name: getattr(job, name) for name in ("priority", "retries", "cpus", "memory")}
    return {name: str(value) for name, value in {**texts, **numbers}.items() if value not in (None, "")}


def inherit_files(server: Server, job: Job, form: Form, folder: Path) -> str | None:
    """Link the files of a job into `folder`, and add them to `form`, unless that has others of these names.

    Returns the digest of all files. Raises HttpError 410 if some are gone, 400 if the names do not fit together.
    """
    source, new, tree = server.folder(job), {file.path: file.sha256 for file in form.files}, Tree()
    old = files_below(source)
    kept = [path for path in old if path not in new]
    for path in [*new, *kept]:
        tree.add(path)
    try:
        link_files(source, folder, kept)
        digests = {path: file_sha256(source / path) for path in old} if new else {}
    except FileNotFoundError as error:
        raise files_gone(job) from error
    if "run.sh" not in old or (new and job.inputs_sha256 not in (None, inputs_digest(digests))):
        raise files_gone(job)
    form.files += [StoredFile(path, 0, digests.get(path, "")) for path in kept]
    return inputs_digest({**digests, **new}) if new else job.inputs_sha256


def are_files_due(server: Server, job: Job) -> bool:
    """Tell whether the cleaner may be deleting the files of a job now, or has done so."""
    return job.status in OVER and (job.status is Status.CLEANED or job.moved_at <= server.store.steady() - server.config.max_age_s)


def link_files(source: Path, target: Path, paths: Iterable[str]) -> None:
    """Give files below `source` a second name below `target`, which exists. The server never changes such files.

    Raises FileNotFoundError if one is removed meanwhile.
    """
    for path in paths:
        os.makedirs(os.path.dirname(target / path), exist_ok=True)
        try:
            os.link(source / path, target / path, follow_symlinks=False)
        except PermissionError:  # a file system without hard links
            shutil.copy2(source / path, target / path, follow_symlinks=False)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# == 8. Jobs ==  Routes that show a job, serve its result, list jobs, and terminate one.


def stored_archive(server: Server, job: Job) -> Archive:
    """Open the result of an ended job. Raises HttpError 500 if the file is missing."""
    try:
        file = open(server.data.result(job.mark), "rb")  # noqa: SIM115 - the web server closes it
    except FileNotFoundError as error:
        log.error("job %d: its result is missing on disk", job.id)
        raise HttpError(500, "the result of this job is missing on the server's disk") from error
    return Archive(file, os.fstat(file.fileno()).st_size, job.result_sha256 or "0" * 64)


DOWNLOAD_GIVES = {
    200: Gives("completed: the result (with JOBORCH_COMPAT=2.2 also a short JSON in every other state)", ZIP_TYPE),
    202: Gives("queued or running; Retry-After says when to ask again", JSON_TYPE, EXAMPLE_JOB),
    204: Gives("failed, invalid, killed or cleaned; X-Job-Status says which"),
    400: BAD,
    404: NOT_FOUND,
    **PARTS,
}


@route("GET", "/download/<job_id>", "server", who="caller", takes=(ID,), gives=DOWNLOAD_GIVES, quick=True)
def download(server: Server, request: Request, job_id: int) -> Answer:
    """Fetch the result of a job as a ZIP. HEAD returns only the state."""
    job = known_job(server, request, job_id)
    headers = {"X-Job-Status": job.status.value}
    if job.status is Status.COMPLETED:
        return file_answer(request, stored_archive(server, job), f"job-{job.id}.zip", headers)
    if server.config.compat == "2.2" and request.method == "GET":
        return Answer(load_plugin("compat22").download_json(server, job), 200, headers)
    if job.status in OVER:
        return Answer(None, 204, headers)
    headers["Retry-After"] = "1"
    return Answer(job_json(server, job) if request.method == "GET" else {}, 202, headers)


AS_IT_STANDS = "the job's current files: its inputs while it is queued, from its client while it runs, from the server when it has ended"


@route(
    "GET",
    "/download_partial/<job_id>",
    "server",
    who="caller",
    slow=True,
    takes=(ID,),
    gives={200: Gives(AS_IT_STANDS, ZIP_TYPE), 400: BAD, 404: NOT_FOUND, 503: CLIENT_AWAY, **PARTS},
)
def download_partial(server: Server, request: Request, job_id: int) -> Answer:
    """Fetch the current files of a job, also of a failed one: the work folder and, below .joborch/, its output."""
    job = known_job(server, request, job_id)
    headers = {"X-Job-Status": job.status.value}
    if job.status is Status.CLEANED:
        raise HttpError(404, f"the files of job {job.id} were cleaned")
    name = f"job-{job.id}-partial.zip"
    if job.result_sha256 is not None:
        return file_answer(request, stored_archive(server, job), name, headers)
    link = server.links.get(job.client or "")
    if job.status in BUSY and job.dest_id and link:
        return file_answer(request, running_archive(server, request, link, job), name, headers)
    return file_answer(request, inputs_archive(server, request, job), name, headers)


def inputs_archive(server: Server, request: Request, job: Job) -> Archive:
    """Pack the inputs of a job that is not at a client. Raises HttpError 503 if too many are being packed, or if the caller left."""

    def fill(packer: ZipPacker) -> None:
        packer.wanted = lambda: not request.left()
        packer.add_folder(server.folder(job))

    with server.pack_places.place() as free:
        if not free:
            raise HttpError(503, "many archives are being packed: try again", Retry_After="5")
        try:
            return packed(server.data.spool, job.created_at, fill)
        except GivenUp as error:
            raise HttpError(503, str(error), Retry_After="5") from error


def running_archive(server: Server, request: Request, link: Link, job: Job) -> Archive:
    """Fetch the current files of a running job from its client. Raises HttpError 503 if that is not possible now."""
    spool, deadline = server.data.spool(), time.monotonic() + READ_TIMEOUT_S
    into = result_transfer(server.config, spool)
    try:
        while True:
            with calling(server, request, link) as unwanted, contextlib.suppress(NotPacked):
                link.fetch(job, into, partial=True, unwanted=unwanted)
                break
            if request.left() or time.monotonic() > deadline or server.stopping.wait(PACK_GLANCE_S):
                raise NotPacked("is still packing the files: try again")
    except (NothingSent, NoAnswer, Gone, ResultTooLarge) as error:
        spool.close()
        said = f"{link.name}: {error}" if isinstance(error, ResultTooLarge) else f"{link.name} {error}"
        raise HttpError(503, said, Retry_After=str(COME_AGAIN_S)) from error
    except BaseException:
        spool.close()
        raise
    spool.seek(0)
    return Archive(spool, into.size, into.digest.hexdigest())


@contextlib.contextmanager
def calling(server: Server, request: Request, link: Link) -> Iterator[Callable[[], bool]]:
    """Take one of the few places for calls to a client on behalf of a caller; yield a function that tells if the call is useless now.

    Raises HttpError 503 at once if the client does not answer or all places are taken: a hanging client must block few threads.
    """
    if link.outage.failures:
        raise HttpError(503, f"{link.name} {link.outage.reason}", Retry_After=str(COME_AGAIN_S))
    with link.callers.place() as here, server.callers.place() if here else contextlib.nullcontext(False) as anywhere:
        if not (here and anywhere):
            raise HttpError(503, f"too many callers wait for {link.name}: try again", Retry_After=str(COME_AGAIN_S))
        yield lambda: request.left() or bool(link.outage.failures) or server.stopping.is_set()


STATUS_NAMES = tuple(status.value for status in Status)


def read_wait(text: str) -> float:
    """Return how long a caller wants to wait, in seconds; at most WAIT_LIMIT_S."""
    if not re.fullmatch(r"[0-9]{1,30}(\.[0-9]{1,30})?", text):
        raise ValueError("give seconds, as in wait=30")
    return min(float(text), WAIT_LIMIT_S)


def read_since(text: str) -> frozenset[str]:
    """Return the statuses that a caller knows."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STATUS_NAMES:
            all_names = ", ".join(known for known in STATUS_NAMES if known != Status.PREPARED.value)
            close = nearest(name.capitalize(), STATUS_NAMES)
            raise HttpError(
                400, f"since is {one_line(name, 40)!r}{close}: give one of {all_names}, or several separated by commas", "since"
            )
    return frozenset(names)


WAIT = Parameter(
    "wait",
    "query",
    "number",
    "wait until the job has ended, for at most this many seconds; values above 45 count as 45",
    30,
    least=0,
    default=0.0,
    read=read_wait,
)
SINCE = Parameter(
    "since",
    "query",
    "string",
    "with `wait`: the status you know, or several separated by commas; the answer comes when the status is another",
    "Queued,Processing",
    pattern="^({0})(,({0}))*$".format("|".join(STATUS_NAMES)),
    default=frozenset(status.value for status in Status if status not in OVER),
    read=read_since,
)


@route(
    "GET",
    "/jobs/<job_id>",
    "server",
    who="caller",
    takes=(ID, WAIT, SINCE),
    gives={200: Gives("the whole job", JSON_TYPE, EXAMPLE_JOB), 400: BAD, 404: NOT_FOUND},
    quick=True,
)
def show_job(server: Server, request: Request, job_id: int, wait: float, since: frozenset[str]) -> Answer:
    """Show a job: state, reason, attempts, history, and what it waits for."""
    job = known_job(server, request, job_id)
    if wait and job.status.value in since:
        with server.waiters.place() as parked:
            if not parked:  # omit what needs more queries: callers that poll must not starve the others
                headers = {"Retry-After": str(COME_AGAIN_S), "X-Job-Status": job.status.value}
                return Answer({**job_summary(server, job), "attempts": None, "history": None}, 200, headers)
            server.wait_until(lambda: status_other_than(server, job.id, since), wait, request.left, job.id)
        job = known_job(server, request, job_id)
    return Answer(job_json(server, job), 200, {"X-Job-Status": job.status.value})


def status_other_than(server: Server, job_id: int, known: Collection[str]) -> str | None:
    """Return a job's status if it is not in `known`, else None; an empty text if the row is gone."""
    rows = server.store.read(JOB_STATUS, id=job_id)
    if not rows:
        return ""
    return None if rows[0]["status"] in known else str(rows[0]["status"])


LIST_FILTERS = (
    Parameter("user_id", "query", "integer", "only jobs of this user", 1, least=SMALLEST, most=BIGGEST),
    Parameter("service", "query", "string", "only jobs of this service", "example"),
    Parameter("status", "query", "string", "only jobs in this state, or cleaned jobs that ended in it", "Running", choices=STATUS_NAMES),
    Parameter("limit", "query", "integer", "the most jobs to return", 100, least=1, most=1000, default=100),
    Parameter("before", "query", "integer", "only ids below this: the cursor", 42, least=1, most=BIGGEST, default=BIGGEST),
)
PAGE = Gives("newest first; `next` is the cursor of the next page", JSON_TYPE, {"jobs": [EXAMPLE_JOB], "next": None})


@route("GET", "/jobs", "server", who="caller", takes=LIST_FILTERS, gives={200: PAGE, 400: BAD}, quick=True)
def list_jobs(
    server: Server, request: Request, user_id: int | None, service: str | None, status: str | None, limit: int, before: int
) -> Answer:
    """List jobs, newest first, a page at a time."""
    name = None if service is None else named_service(server, service).name
    jobs = server.store.page(before, limit + 1, user_id, name, status)
    following = jobs[limit - 1].id if len(jobs) > limit else None
    return Answer({"jobs": [job_summary(server, job) for job in jobs[:limit]], "next": following})


TERMINATE_GIVES = {
    200: Gives("killed: none of its processes runs", JSON_TYPE, {"id": 42, "status": "Killed", "message": "terminated on request"}),
    202: Gives(
        "being stopped, or to be stopped when its client answers",
        JSON_TYPE,
        {"id": 42, "status": "Unknown", "message": "it will be stopped as soon as gpu1:9000 answers"},
    ),
    400: BAD,
    404: NOT_FOUND,
    409: Gives("it had already ended in another state", JSON_TYPE, EXAMPLE_JOB),
}


@route("POST", "/terminate/<job_id>", "server", who="caller", takes=(ID,), gives=TERMINATE_GIVES)
def terminate(server: Server, request: Request, job_id: int) -> Answer:
    """Stop a job in any state. It may be repeated."""
    job = known_job(server, request, job_id)
    if job.status not in OVER:
        server.store.request_kill(job.id, Cause.CANCELLED)
        crash_point("kill.wished")
        kill_queued(server, job.id)
        job = known_job(server, request, job_id)
    if job.status not in OVER:
        wait_for_end(server, request, job)
        kill_queued(server, job.id)
        job = known_job(server, request, job_id)
    if job.status is Status.KILLED:
        return Answer({"id": job.id, "status": job.status.value, "message": job.reason}, 200, {"X-Job-Status": job.status.value})
    if job.status in OVER:
        return Answer(job_json(server, job), 409, {"X-Job-Status": job.status.value})
    link = server.links.get(job.client or "")
    message = f"it will be stopped as soon as {job.client} answers" if job.client else "it will be stopped before it is sent"
    if link is not None and not link.outage.reason:
        message = link.notes.get(job.id) or f"{job.client} is stopping it"
    return Answer({"id": job.id, "status": job.status.value, "message": message}, 202, {"X-Job-Status": job.status.value})


def wait_for_end(server: Server, request: Request, job: Job) -> None:
    """Ask a client to stop a job, and wait for that as long as the client answers. A client that does not is tried once."""
    with server.places.place() as parked:
        link = server.links.get(job.client or "")
        if link is not None and link.outage.failures and parked:
            try_now(server, request, link)
        server.wake(f"kill:{job.client}")
        patience_s = WAIT_LIMIT_S if parked and link and not link.outage.failures else 0.0

        noted_until = time.monotonic() + NOTED_PATIENCE_S

        def hopeless() -> bool:
            is_noted = link is not None and link.notes.get(job.id, "").startswith(BEING_ENDED)
            return request.left() or bool(link and link.outage.failures) or (is_noted and time.monotonic() > noted_until)

        server.wait_until(lambda: over_or_queued(server, job.id), patience_s, hopeless, job.id)


def try_now(server: Server, request: Request, link: Link) -> None:
    """Call a client now, despite its back-off, and wait briefly for the outcome."""
    failed_at, deadline = link.failed_at, time.monotonic() + TERMINATE_TRY_S
    link.try_at = server.clock.monotonic()
    server.wake(f"get:{link.name}")
    while link.outage.failures and link.failed_at == failed_at and time.monotonic() < deadline and not request.left():
        if server.stopping.wait(0.02):
            return


def over_or_queued(server: Server, job_id: int) -> Job | None:
    """Return the job if it is no longer at a client, else None."""
    job = server.store.get(job_id)
    return job if job is None or job.status in OVER or job.status is Status.QUEUED else None


# == 9. Site routes ==  Routes for operators: services, clients, and the weights of users.

EXAMPLE_CLIENT = {
    "name": "127.0.0.1:9000", "services": ["example"], "reachable": True, "drained": False, "slots": 2, "free": 1, "memory": 16000,
    "load": 12.5, "jobs": 1, "instance": "a1b2c3", "same_client_as": [],
    "last_seen": "2026-11-24T09:00:00.000Z", "trouble": "", "held_for_s": 0.0,
}  # fmt: skip
EXAMPLE_SERVICE = {
    "name": "example", "policy": "share", "runs_per_user": 5, "max_runs": 10, "running": 1, "queued": 3, "users_queued": 2,
    "mean_run_s": 12.5, "clients": [EXAMPLE_CLIENT],
}  # fmt: skip
EXAMPLE_USER = {
    "user_id": 7, "weight": 2.0, "queued": 3,
    "services": [{"name": "example", "used_slot_s": 42.5, "runs": 17, "mean_run_s": 2.5, "running": 1, "turns_before": 0}],
}  # fmt: skip
SERVICES = Gives("services, their limits, and their clients", JSON_TYPE, {"services": [EXAMPLE_SERVICE]})
CLIENTS = Gives("clients, and why one gets no jobs", JSON_TYPE, {"clients": [EXAMPLE_CLIENT]})
ONE_CLIENT = Gives("the client", JSON_TYPE, EXAMPLE_CLIENT)
NO_CLIENT = Gives("no client has this name", JSON_TYPE, {"message": "no client is called gpu9:9000: give one of 127.0.0.1:9000"})
ONE_USER = Gives("a user's weight, jobs and use", JSON_TYPE, EXAMPLE_USER)
CLIENT_NAME = Parameter("name", "path", "string", "the name of a client, as /clients lists it", "127.0.0.1:9000", required=True)
USER_ID = Parameter("user_id", "path", "integer", "the user's number", 7, required=True, least=SMALLEST, most=BIGGEST)
WEIGHT = Parameter(
    "weight",
    "query",
    "number",
    "how large this user's share is; the default is 1",
    2,
    required=True,
    least=0.001,
    most=1_000_000,
    missing="give it in the URL, as in PUT /users/7?weight=2",
    read=read_weight,
)


def clients_json(server: Server, links: Sequence[Link]) -> list[dict[str, Any]]:
    """Return clients in JSON. `trouble` says why a client gets no jobs now."""
    said = []
    for link, place in zip(links, server.capacities_of(links)):
        silent_s = None if link.heard_at is None else server.clock.monotonic() - link.heard_at
        held_for_s = max(0.0, max(link.outage.until, link.refusal.until) - server.clock.monotonic())
        known = link.protocol.has_events and link.heard_at is not None
        said.append({
            "name": link.name, "services": [service.name for service in link.services], "reachable": link.answers and not link.held(),
            "drained": link.drained, "slots": link.slots if known else None, "free": max(0, place.free) if known else None,
            "memory": link.memory, "load": link.load if known else None, "jobs": server.store.load(link.name).jobs,
            "instance": link.instance or None, "same_client_as": [other.name for other in server.names_of(link)[1:]],
            "last_seen": None if silent_s is None else rfc3339(server.clock.wall() - silent_s), "trouble": link.why_not(),
            "held_for_s": round(held_for_s, 1),
        })  # fmt: skip
    return said


@route("GET", "/services", "server", who="caller", gives={200: SERVICES}, quick=True)
def show_services(server: Server, request: Request) -> Answer:
    """Show the services: policy, limits, running and queued jobs (counted up to 10,000), and their clients."""
    said = []
    for service in server.services.values():
        mean_s, name = mean_run_s(server, service), service.name
        said.append({
            "name": name, "policy": service.policy, "runs_per_user": service.runs_per_user, "max_runs": service.max_runs,
            "running": server.store.line(name).busy, "queued": server.store.number(QUEUED_IN_SERVICE, service=name),
            "users_queued": server.store.users_queued(name), "mean_run_s": mean_s and round(mean_s, 3),
            "clients": clients_json(server, server.links_of(service)),
        })  # fmt: skip
    return Answer({"services": said})


@route("GET", "/clients", "server", who="caller", gives={200: CLIENTS}, quick=True)
def show_clients(server: Server, request: Request) -> Answer:
    """Show the clients: slots, memory, load, jobs, and why one gets no jobs."""
    return Answer({"clients": clients_json(server, [*server.links.values()])})


def drain_client(server: Server, name: str, drained: bool) -> Answer:
    """Stop or resume sending jobs to a client. Raises HttpError 404 that lists the known ones."""
    link = server.links.get(name)
    if link is None:
        raise HttpError(404, f"no client is called {one_line(name, 80)}: give one of {', '.join(server.links)}")
    server.drain(link, drained)
    log.info("client %s is %s", link.name, "drained" if drained else "resumed")
    server.dispatch()
    return Answer(clients_json(server, [link])[0])


@route("POST", "/clients/<name:path>/drain", "server", who="caller", takes=(CLIENT_NAME,), gives={200: ONE_CLIENT, 404: NO_CLIENT})
def drain(server: Server, request: Request, name: str) -> Answer:
    """Send a client no more jobs until it is resumed, also after a restart of the server. Its present jobs keep running."""
    return drain_client(server, name, True)


@route("POST", "/clients/<name:path>/resume", "server", who="caller", takes=(CLIENT_NAME,), gives={200: ONE_CLIENT, 404: NO_CLIENT})
def resume(server: Server, request: Request, name: str) -> Answer:
    """Send a drained client jobs again."""
    return drain_client(server, name, False)


def user_answer(server: Server, user_id: int) -> Answer:
    """Return what decides when a user's jobs run."""
    store = server.store
    names = {row["service"] for row in store.read(USAGE_OF_USER, user_id=user_id)}
    names.update(name for name in server.services if store.share(name, user_id).runs)
    services = []
    for name in sorted(names):
        share = store.share(name, user_id)
        services.append({
            "name": name, "used_slot_s": round(store.used_slot_s(name, user_id), 3), "runs": share.usage.runs,
            "mean_run_s": round(share.usage.mean_s, 3) if share.usage.runs else None, "running": len(share.runs),
            "turns_before": None if share.turn is None else store.turns_before(name, share.turn),
        })  # fmt: skip
    weight = store.weight(user_id)
    queued = server.store.number(QUEUED_OF_USER, user_id=user_id, limit=server.config.max_queued_per_user)
    return Answer({"user_id": user_id, "weight": weight, "queued": queued, "services": services})


@route("GET", "/users/<user_id>", "server", who="caller", takes=(USER_ID,), gives={200: ONE_USER, 400: BAD}, quick=True)
def show_user(server: Server, request: Request, user_id: int) -> Answer:
    """Show a user's weight, queued jobs, and use of each service as it counts now."""
    return user_answer(server, user_id)


@route("PUT", "/users/<user_id>", "server", who="caller", takes=(USER_ID, WEIGHT), gives={200: ONE_USER, 400: BAD})
def set_user(server: Server, request: Request, user_id: int, weight: float) -> Answer:
    """Set a user's weight: twice the weight means twice the share. It overrides JOBORCH_WEIGHTS."""
    server.store.set_weight(user_id, weight)
    return user_answer(server, user_id)


# == 10. Server ==  The server claims jobs and sends them. Its ticks move jobs on by the Store and by what clients answer.


class Server(Node):
    """A server: its services, and a link to each client."""

    def __init__(self, config: Config, store: Store, data: DataFolder, clock: Clock | None = None) -> None:
        super().__init__(config, store, data, clock)
        self.services = config.services
        self.links: dict[str, Link] = {}
        self.callers = WaiterLimit(CALLS_IN_ALL)  # for calls to clients on behalf of callers
        self.claims: dict[str, tuple[str, str]] = {}  # by mark: another client that also has it, and its payload id there; see `sort_claim`
        store.set_limits(self.services, Sharing(config.share_half_life_s, config.ageing_s, config.weights))
        for service in self.services.values():
            for address in service.addresses:
                link = self.links.get(address.name)
                if link is None:
                    link = Link(address, data, self.clock, config.ca_file)
                    self.links[address.name] = link
                link.services.append(service)
        for row in store.read(DRAINED_ALL):
            if row["client"] in self.links:
                self.links[row["client"]].drained = True

    def service(self, job: Job) -> Service:
        """Return the service of a job, with default limits if it is no longer configured."""
        name = job.service or ""
        return self.services.get(name) or make_service(name, {"CLIENTS": "http://not-configured"})

    def links_of(self, service: Service) -> list[Link]:
        return [self.links[address.name] for address in service.addresses]

    def troubles(self, service: Service) -> dict[str, str]:
        """Return why each client of a service gets no jobs now, by name; empty if it gets jobs."""
        return {link.name: link.why_not() for link in self.links_of(service)}

    def names_of(self, link: Link) -> list[Link]:
        """Return all links to the same client, this one first."""
        return [link, *(other for other in self.links.values() if other is not link and other.client == link.client)]

    def capacities_of(self, links: Iterable[Link]) -> list[ClientCapacity]:
        """Return clients as the scheduler sees them now. Two URLs of one client share its slots."""
        by_client: dict[str, list[Link]] = {}
        for link in self.links.values():
            by_client.setdefault(link.client, []).append(link)
        places = []
        for link in links:
            others = [other for other in by_client.get(link.client, ()) if other is not link]
            # Read before what has ended: see count_no_more.
            jobs, cpus, memory = map(sum, zip(*(self.store.load(each.name) for each in (link, *others))))
            places.append(link.capacity(cpus, memory, jobs, others))
        return places

    def start(self) -> None:
        """Let the core claim jobs from now on, as soon as a commit makes that possible."""
        self.store.core.propose = functools.partial(propose, self)
        super().start()

    def stop(self) -> None:
        """Claim no more jobs."""
        self.store.core.propose = lambda: None
        super().stop()

    def dispatch(self) -> None:
        """Claim jobs after a client or a sender became free. If storing fails, `dispatch_tick` tries again."""
        self.store.core.settle()

    def drain(self, link: Link, drained: bool) -> None:
        """Store that a client, under all its names, gets no more jobs, or gets jobs again."""
        links = self.names_of(link)
        sql, values = (DRAINED_SET, {"at": self.clock.wall()}) if drained else (DRAINED_CLEAR, {})
        self.store.write(lambda db: [db.execute(sql, {"client": each.name, **values}).rowcount for each in links])
        for each in links:
            each.drained = drained


def dispatch_tick(server: Server) -> bool:
    """Claim the next job for the client that the scheduler chose. Return whether there was one.

    Most claims are made in the transaction that made them possible; this tick makes those that failed. Each client has separate
    senders and gets a job only if one of them is free, so a client that hangs delays no other.
    """
    step = propose(server)
    return step is not None and server.store.write(lambda db: step())


def propose(server: Server) -> Callable[[], bool] | None:
    """Return how to claim the next job inside a transaction, or None if there is none."""
    chosen = next_placement(server)
    return None if chosen is None else functools.partial(place, server, *chosen)


def place(server: Server, head: Candidate, place: ClientCapacity) -> bool:
    """Claim a job for a client inside a transaction; a sender gets it after the COMMIT. Return False if it can no longer be claimed."""
    link = link_to(server, head, place)
    if head.job_id in link.sending:
        return False  # it was queued again, and its sender is about to release it
    link.sending.add(head.job_id)  # before the COMMIT: a Processing job that no sender holds is treated as lost
    claimed = None
    try:
        claimed = server.store.claim(head.job_id, link.name, place.taken + head.cpus)
    finally:
        if claimed is None:
            link.sending.discard(head.job_id)
    if claimed is None:
        return False
    crash_point("claim.decided")
    server.store.core.after(functools.partial(hand_to_sender, server, link, claimed), lambda: link.sending.discard(claimed.id))
    return True


def hand_to_sender(server: Server, link: Link, job: Job) -> None:
    """Give a job to a sender of its client, after its claim was stored."""
    crash_point("claim.stored")
    log.info("job %d Queued -> Processing (service=%s user=%s): for %s", job.id, job.service, job.user_id, link.name)
    link.outbox.append(job)
    server.wake(f"send:{link.name}")


def next_placement(server: Server) -> tuple[Candidate, ClientCapacity] | None:
    """Return the next job and the client that gets it, or None if nothing can be sent now."""
    free = [link for link in server.links.values() if can_be_sent_to(link)]
    clients = one_each(free)
    names = {link.name: clients[link.client].name for link in free}
    lines = [line for line in (service_queue_of(server, service, names) for service in server.services.values()) if line]
    if not lines:
        return None
    return choose(lines, server.capacities_of(clients.values()), functools.partial(runs_at, server), server.store.steady())


def can_be_sent_to(link: Link) -> bool:
    """Tell whether a job that is claimed for a client now would be sent at once."""
    return link.takes_jobs() and link.has_free_sender()


def one_each(links: Iterable[Link]) -> dict[str, Link]:
    """Return the first link to each client, by client."""
    found: dict[str, Link] = {}
    for link in links:
        found.setdefault(link.client, link)
    return found


def link_to(server: Server, head: Candidate, place: ClientCapacity) -> Link:
    """Return the link by which a service reaches the chosen client."""
    chosen = server.links[place.name]
    links = server.links_of(server.services[head.service])
    return next((link for link in links if link.client == chosen.client and can_be_sent_to(link)), chosen)


def service_queue_of(server: Server, service: Service, names: Mapping[str, str]) -> ServiceQueue | None:
    """Return the queue of a service, or None if it is empty, the service is at its limit, or no client can get its jobs.

    `names` maps each name of a client that can get jobs to the one name that the scheduler uses for it.
    """
    clients = {names[address.name] for address in service.addresses if address.name in names}
    busy, turns = server.store.line(service.name).busy, server.store.turns(service.name)
    first = next(turns, None) if clients else None
    if first is None or busy >= service.max_runs:
        return None
    heads = (turn.candidate(service.name) for turn in itertools.islice(itertools.chain([first], turns), CANDIDATES_LOOKED_AT))
    return ServiceQueue(service.name, clients, busy / service.max_runs, mean_run_s(server, service), heads)


def mean_run_s(server: Server, service: Service) -> float | None:
    """Return the mean length of a service's last runs in seconds, or None if there were none."""
    pace = server.store.line(service.name).pace
    return pace.mean_s if pace.runs else None


def runs_at(server: Server, client: str) -> list[Run]:
    """Return what runs at a client."""
    links = {link.name: link for link in server.names_of(server.links[client])}
    return [run for run in server.store.runs() if run.client in links and run.job_id not in links[run.client].ended]


def send_tick(server: Server, link: Link) -> bool:
    """Send one job to one client. Return whether there was one."""
    job = next_to_send(server, link)
    if job is None:
        probe_tick(server, link)
        return False
    was_probing = link.probing
    try:
        with link.protocol.turn():
            send_job(server, link, job)
    finally:
        was_full = was_probing or not link.has_free_sender()
        link.sending.discard(job.id)
        if was_full:
            server.dispatch()
    return True


def may_send(link: Link) -> bool:
    """Tell whether `send_tick` may have something to do: a job to send or send again, or a probe."""
    return bool(link.outbox) or (not link.held() and (link.may_have_pinned or lacks_probe(link)))


def lacks_probe(link: Link) -> bool:
    """Tell whether to ask a failed client if it answers, because its long poll began before the failure and may still wait."""
    return not (link.answers or link.held()) and link.asked_at < link.failed_at


def probe_tick(server: Server, link: Link) -> None:
    """Ask a client that failed whether it answers again, without risking a job for that.

    `get_tick` would notice, too, but its long poll may have begun before the failure and still wait.
    """
    if lacks_probe(link) and link.probe():
        server.dispatch()


def next_to_send(server: Server, link: Link) -> Job | None:
    """Return a job to send: one that was claimed for this client, or else one that a lost answer ties to it."""
    with contextlib.suppress(IndexError):
        return link.outbox.popleft()
    if not link.ready():
        return None
    pinned = server.store.jobs(PINNED_AT_CLIENT, client=link.name) if link.may_have_pinned else []
    link.may_have_pinned = bool(pinned)
    for job in pinned:
        if not link.protocol.knows_keys:
            new_attempt(server, job, Reason.CANNOT_SAY.format(client=link.name))
            continue
        with link.lock:
            due = link.has_free_sender() and link.resend_due.get(job.id, 0.0) <= server.clock.monotonic()
            if due:
                link.resend_due[job.id] = server.clock.monotonic() + 2 * READ_TIMEOUT_S
                link.sending.add(job.id)  # it occupies a sender, like any other job
        if due:
            return job
    return None


def send_job(server: Server, link: Link, job: Job) -> None:
    """Send a claimed job and store the outcome."""
    folder = server.data.job(job.uuid)
    try:
        paths = files_below(folder)
        if not paths:
            reason = Reason.FILES_REMOVED.format(where="server")
            end_busy(server, job, Status.FAILED, reason, cause=Cause.INFRASTRUCTURE.value)
            return
        returned = server.service(job).return_inputs
        dest_id, end = link.submit(job, folder, paths, returned, end_wait_ms(server, link, job))
        crash_point("send.answered")
        link.accepted[job.mark] = (dest_id, end is not None)
    except NothingSent as error:
        send_again(server, link, job, error)
        return
    except InputsChanged as error:
        end_busy(server, job, Status.FAILED, str(error), cause=Cause.INFRASTRUCTURE.value)
        return
    except Rejected as error:
        link.heard()
        server.store.move(job, Status.INVALID, Reason.REFUSED.format(client=link.name, error=error), cause=Cause.USER.value)
        return
    except (NoAnswer, OSError) as error:
        link.failed(error)
        mark_outcome_unknown(server, link, job, error)
        return
    take_answer(server, link, job, dest_id, end)


def take_answer(server: Server, link: Link, job: Job, dest_id: str, end: Any) -> None:
    """Store that a client has accepted a job, and its end if that came along."""
    link.took_one()
    link.resend_due.pop(job.id, None)
    link.protocol.accepted(server, dest_id)
    if end is None or not end_as_answered(server, link, job._replace(dest_id=dest_id), end):
        store_accepted(server, link, job, dest_id)
        crash_point("send.stored")
        if end is not None:
            ask_for_end(server, link, job)
        if server.store.number(KILLS_COUNT, client=link.name):
            server.wake(f"kill:{link.name}")
    link.accepted.pop(job.mark, None)


SHORT_RUN_S, END_WAIT_S = 0.03, 0.1  # mean run of a service whose submits wait for the end, and how long (X-Joborch-Wait)


def end_wait_ms(server: Server, link: Link, job: Job) -> int:
    """Return how long a client may wait for the end of this job before it answers the submit: 0 unless its service's runs are short.

    A sender waits as long, so one of them always remains that does not.
    """
    is_new = job.status is Status.PROCESSING and job.kill_requested_at is None
    if not (is_new and link.protocol.has_events and link.has_free_sender()):
        return 0
    mean_s = mean_run_s(server, server.service(job))
    return round(1000 * END_WAIT_S) if mean_s is not None and mean_s < SHORT_RUN_S else 0


def end_as_answered(server: Server, link: Link, job: Job, said: Any) -> bool:
    """Bring a payload's end that came with the answer to its submit to its place, as one that /events told.

    Submitted and the end are two moves in one transaction. Returns False if it must be asked for in the usual way.
    """
    payload = clean_payload(said)
    wrong = why_not_its_end(job, payload)
    if payload is None or wrong:
        link.note(f"answered with an end of job {job.id} that cannot be used: {wrong}; it is asked again")
        return False
    found = EndReport(job.id, payload, 0.0)
    link.ended_at = server.clock.monotonic()  # before the COMMIT, in which the next job may be claimed
    if not collect_end(server, link, job, found):
        drop_part(found)
        return False
    crash_point("send.ended")
    link.confirm(job.dest_id)
    return True


def ask_for_end(server: Server, link: Link, job: Job) -> None:
    """Have the fetch loop ask a client for the end of a payload: the client will not report it again by itself."""
    note_end(server, link, EndReport(job.id, {"status": "?"}, 0.0))


def why_not_its_end(job: Job, payload: Mapping[str, Any] | None) -> str:
    """Return why what a client says in its answer to a submit cannot be the end of this job's payload; an empty text if it can."""
    if payload is None:
        return "it is not the description of a payload"
    if (payload["uuid"], payload["attempt"], payload["id"]) != (job.uuid, job.attempt, job.dest_id):
        return "it is that of another payload"
    failed = payload["status"] == Status.FAILED.value and payload.get("cause") == Cause.USER.value
    if payload["status"] != Status.COMPLETED.value and not failed:
        return f"it says {payload['status']}"
    return "" if inline_archive_of(payload) else "its archive is missing, or does not fit its digest"


def send_again(server: Server, link: Link, job: Job, error: NothingSent) -> None:
    """The client certainly did not get the job: pause submits to it, and queue the job again unless it is tied to this client."""
    if isinstance(error, Refused):
        link.refused(error)
    else:
        link.failed(error)
    if job.status is Status.PROCESSING:
        server.store.move(job, Status.QUEUED, Reason.NOT_SENT.format(client=link.name, error=error), client=None)
        crash_point("send.refused")
        kill_queued(server, job.id)
    else:
        with link.lock:
            link.resend_due[job.id] = server.clock.monotonic() + backoff_s(link.outage.failures)


def kill_queued(server: Server, job_id: int) -> None:
    """Kill a queued job for which terminate was requested."""
    job = server.store.get(job_id)
    if job and job.status is Status.QUEUED and job.kill_requested_at is not None:
        server.store.move(job, Status.KILLED, Reason.KILLED_UNSENT, cause=Cause.CANCELLED.value)
        crash_point("kill.queued")


def store_accepted(server: Server, link: Link, job: Job, dest_id: str) -> None:
    """Store the payload's id. Durably if the client has no attempt keys, because then it could not be found again."""
    durable = not link.protocol.knows_keys
    server.store.move(job, Status.SUBMITTED, Reason.ACCEPTED.format(client=link.name), durable=durable, dest_id=dest_id)


def mark_outcome_unknown(server: Server, link: Link, job: Job, error: Exception) -> None:
    """Bytes were sent and no answer came: send the job to this client again under the same attempt key.

    A client without attempt keys could run the job twice, so there a new attempt begins.
    """
    if job.status is Status.PROCESSING:
        server.store.move(job, Status.UNKNOWN, Reason.ANSWER_LOST.format(client=link.name, error=error))
        crash_point("send.lost")
    link.may_have_pinned = True
    with link.lock:
        link.resend_due[job.id] = server.clock.monotonic() + backoff_s(link.outage.failures)
    current = server.store.get(job.id)
    if not link.protocol.knows_keys and current and current.status is Status.UNKNOWN and not current.dest_id:
        new_attempt(server, current, Reason.ANSWER_LOST_22.format(client=link.name, error=error))


def end_busy(server: Server, job: Job, to: Status, reason: str, **changes: Any) -> None:
    """Move a job to an end state from its current busy state, unless it has ended or is at another attempt.

    If its payload ended before the submit was answered, it is still Processing but has a `dest_id`: it becomes Submitted first.
    """
    current: Job | None = job
    while current is not None and current.status in BUSY and current.attempt == job.attempt:
        if current.status is Status.PROCESSING and job.dest_id:
            moved = server.store.move_accepted(current, Reason.ACCEPTED.format(client=job.client), job.dest_id, to, reason, **changes)
        else:
            moved = server.store.move(current, to, reason, **changes)
        if moved:
            return
        current = server.store.get(job.id)


def become_unknown(server: Server, job: Job, reason: str) -> None:
    """Move a job to Unknown. The server keeps trying, so the job recovers without help."""
    if job.status in (Status.SUBMITTED, Status.RUNNING):
        server.store.move(job, Status.UNKNOWN, Reason.TRIED_AGAIN.format(reason=reason))


def payload_gone(server: Server, job: Job, reason: str) -> None:
    """The client answers but does not know the payload, so no process of it runs."""
    if job.kill_requested_at is not None and job.status is not Status.PROCESSING:
        server.store.move(job, Status.KILLED, Reason.KILLED_AND_GONE.format(reason=reason), cause=Cause.CANCELLED.value)
    else:
        new_attempt(server, job, reason)


def new_attempt(server: Server, job: Job, reason: str) -> None:
    """After an infrastructure failure: queue another attempt, or fail the job if none is left."""
    if attempts_left(job):
        changes: dict[str, Any] = {"attempt": job.attempt + 1, "client": None, "dest_id": None, "started_at": None}
        due = server.store.steady() + backoff_s(job.attempt)
        server.store.move(job, Status.QUEUED, Reason.ATTEMPT.format(attempt=job.attempt, reason=reason), not_before=due, **changes)
        crash_point("attempt.stored")
    else:
        text = Reason.NO_ATTEMPT_KILLED if job.kill_requested_at else Reason.NO_ATTEMPT_LEFT
        server.store.move(job, Status.FAILED, text.format(reason=reason, attempt=job.attempt), cause=Cause.INFRASTRUCTURE.value)


# == 11. Scheduling ==  Pure functions of rows and a clock: whose turn it is, which client gets the job, and why a job waits.

NO_USE = float("-inf")  # log2(0)
CANDIDATES_LOOKED_AT = 100  # of one service, when its first jobs are too wide for the free slots
UNKNOWN_RUN_S = 60.0  # charged in advance for a run when the service has no earlier runs
TURN_S = 0.001  # the least cost of a turn: even jobs that take no time must not pass users who had no turn yet
TURNING_S = 1.0  # no job is sent ahead to a client that finished no run for this long
HANDOVER_S = 0.2  # how much work may queue at a client, so that its slots do not idle between two jobs
FULL_QUEUE_RETRY_S = 60


@dataclass(frozen=True)
class Sharing:
    """What turns depend on, apart from the rows and the services."""

    half_life_s: float = 6 * 3600.0
    ageing_s: float = 60.0
    weights: Mapping[int, float] = field(default_factory=dict)  # by user; weights in the store take precedence


class Waiting(NamedTuple):
    """A queued job, as the ranking sees it."""

    job_id: int
    priority: int
    arrived_at: float  # steady
    cpus: int
    memory: int | None  # MiB
    timeout: float | None  # seconds


class Usage(NamedTuple):
    """A user's past use of a service, as the base-2 logarithm of slot-seconds, and the mean length of the user's runs.

    It covers finished runs only. Running ones are added on the fly (`with_open_runs`), so nothing is ever refunded.
    A use u at time `now` is stored as log2(u) + now / half-life. Stored values never need an update: after one half-life a
    new slot-second counts twice as much as an old one, and the order of users does not change as time passes.
    """

    use: float = NO_USE
    runs: int = 0
    mean_s: float = 0.0


class Pace(NamedTuple):
    """The mean length of a service's runs."""

    runs: int = 0
    mean_s: float = 0.0


Mean = TypeVar("Mean", Usage, Pace)


def with_run(known: Mean, run_s: float) -> Mean:
    """Return a moving mean of about the last twenty runs, with one more run."""
    runs = known.runs + 1
    return known._replace(runs=runs, mean_s=known.mean_s + (run_s - known.mean_s) / min(runs, 20))


class Run(NamedTuple):
    """A job at a client: what its user is charged for it, and what it takes there."""

    job_id: int
    cpus: int
    charged: float = 0.0  # slot-seconds, in advance; more if it runs longer than that
    since: float | None = None  # steady; None before it starts
    memory: int = 0  # MiB
    timeout: float | None = None  # seconds
    client: str = ""

    def run_s(self, now: float) -> float:
        return 0.0 if self.since is None else max(0.0, now - self.since)

    def ends_at(self, now: float) -> float:
        """Return when it will have ended: infinity without a time limit, which counts from the start of the run."""
        return float("inf") if self.timeout is None else (now if self.since is None else self.since) + self.timeout


class Turn(NamedTuple):
    """When a user is next in a service: turns sort in this order. Who has no free run left comes last."""

    at_quota: bool
    rank: float
    head: Waiting
    user_id: int

    def candidate(self, service: str) -> Candidate:
        return Candidate(service, self.head.job_id, self.head.cpus, self.head.memory, self.head.timeout)


class Share(NamedTuple):
    """A user's part in a service. `waiting` are the queued jobs that the rank depends on (see `rank_of`)."""

    usage: Usage = Usage()
    runs: tuple[Run, ...] = ()  # by job id
    waiting: tuple[Waiting, ...] = ()
    turn: Turn | None = None  # None if no job could run

    def run(self, job_id: int) -> Run | None:
        return next((run for run in self.runs if run.job_id == job_id), None)


class Line(NamedTuple):
    """The load of a service: how many of its jobs are at clients, and how long they take."""

    busy: int = 0
    pace: Pace = Pace()


class Load(NamedTuple):
    """What the server's jobs take at a client."""

    jobs: int = 0
    cpus: int = 0
    memory: int = 0  # MiB

    def plus(self, run: Run, count: int = 1) -> Load:
        return Load(self.jobs + count, self.cpus + count * run.cpus, self.memory + count * run.memory)


def used(use: float, slot_s: float, now: float, half_life_s: float) -> float:
    """Return a use (see Usage) increased by `slot_s` slot-seconds at time `now`."""
    if slot_s <= 0:
        return use
    term = now / half_life_s + math.log2(slot_s)
    return max(use, term) + math.log2(1 + 2.0 ** (min(use, term) - max(use, term)))


def counted_s(run_s: float, half_life_s: float) -> float:
    """Return how many seconds of a run count now: each eighth of a half-life counts less than the one after it."""
    step_s, fade = half_life_s / 8, 2.0 ** (-1 / 8)
    whole = min(run_s // step_s, 1000.0)
    return float(step_s * (1 - fade**whole) / (1 - fade) + (run_s - whole * step_s) * fade**whole)


def with_open_runs(use: float, runs: Collection[Run], now: float, half_life_s: float, in_advance: bool = True) -> float:
    """Return a use plus its open runs: everything that was charged in advance, or only the time they have run."""
    had = sum(run.cpus * counted_s(run.run_s(now), half_life_s) for run in runs)
    ahead = sum(max(0.0, run.charged - run.cpus * run.run_s(now)) for run in runs) if in_advance else 0.0
    return used(use, had + ahead, now, half_life_s)


def use_now(use: float, now: float, half_life_s: float) -> float:
    """Convert a use (see Usage) to slot-seconds at time `now`."""
    return float(2.0 ** min(use - now / half_life_s, 1000.0))


def charge_in_advance(job: Job, usage: Usage, pace: Pace, half_life_s: float) -> float:
    """Return the slot-seconds that a job is charged when it starts, so that running jobs count at once.

    The estimate is the mean run of the user, else of the service. Longer runs are charged as they go on.
    """
    expected = usage.mean_s if usage.runs else pace.mean_s if pace.runs else UNKNOWN_RUN_S
    return job.cpus * min(expected, job.timeout or expected, half_life_s / 8)


def cap_idle_credit(use: float, weight: float, level: float) -> float:
    """Return the use of a user who comes back after a pause: at most one half-life of credit over the other active users.

    `level` is the least use by weight among those. The cap is applied when a run ends and the user has more jobs, not when a
    job arrives: a newcomer goes ahead of everyone with more use until the first run has been charged.
    """
    return max(use, level - 1 + math.log2(weight))


def rank_of(policy: str, waiting: Sequence[Waiting], share_rank: float, ageing_s: float) -> tuple[float, Waiting]:
    """Return a user's rank for a service (the lowest goes next), and the job to run.

    `waiting` holds the first job of each priority; the policy `share` needs only the highest. Ranks do not change as time
    passes. The policy `priority` is one queue for all users, in which a point of priority is worth `ageing_s` seconds of
    waiting. So only jobs that arrive within (100 - priority) * `ageing_s` of a job can overtake it: 200 minutes at most.
    """
    if policy == "priority":
        first = min(waiting, key=lambda job: (job.arrived_at / ageing_s - job.priority, job.job_id))
        return first.arrived_at / ageing_s - first.priority, first
    highest = min(waiting, key=lambda job: (-job.priority, job.job_id))
    return min(job.arrived_at for job in waiting) if policy == "fifo" else share_rank, highest


def run_of_job(job: Job) -> Run | None:
    """Return what is kept in memory of a job at a client; None of another job."""
    if job.status not in BUSY:
        return None
    since = job.moved_at if job.status is Status.RUNNING else None
    return Run(job.id, job.cpus, job.charged, since, job.memory or 0, job.timeout, job.client or "")


# -- which client gets a job --


class Candidate(NamedTuple):
    """The first queued job of a user who is below the quota: what a service could run next."""

    service: str
    job_id: int
    cpus: int = 1
    memory: int | None = None  # MiB
    timeout: float | None = None  # seconds


class ServiceQueue(NamedTuple):
    """The candidates of one service in the order of their turns, its clients, and its load."""

    service: str
    clients: Collection[str]
    busy: float  # the part of its max_runs that is in use, 0 to 1
    run_s: float | None  # the mean run, if known
    heads: Iterable[Candidate]


class ClientCapacity(NamedTuple):
    """A client that takes jobs now, as the scheduler sees it."""

    name: str
    slots: int
    free: int  # slots; negative if jobs queue there
    memory: int | None = None  # MiB; None if the client does not say
    free_memory: int | None = None
    load: float = 0.0  # percent
    failed_s_ago: float = float("inf")
    turning: bool = False  # a run ended there less than TURNING_S ago
    queues: bool = False  # a 2.2 client: it does not report its slots, and queues jobs by itself
    taken: int = 0  # slots of all its jobs, including those that have ended
    job_slots: bool = False  # it feeds a batch system: one slot holds one job, whatever number of cores it needs

    def wanted(self, cpus: int) -> int:
        """Return how many slots a job occupies here."""
        return 1 if self.job_slots else cpus

    def could_run(self, cpus: int, memory: int | None) -> bool:
        """Tell whether a job of this size would fit on an idle client."""
        return self.queues or (self.wanted(cpus) <= self.slots and (memory is None or self.memory is None or memory <= self.memory))

    def room(self, run_s: float | None, cpus: int = 1) -> int:
        """Return how many slots a job may use: the free ones, and for short runs a few more, so that no slot idles.

        Jobs sent ahead amount to at most HANDOVER_S of work, so they delay a newcomer's job no longer. Nothing is sent ahead if
        no run ended lately, nor a job that needs several slots at once: both could wait there for long.
        """
        if self.queues:
            return 1 << 30
        if not self.turning or run_s is None or cpus > 1:
            return self.free
        return self.free + min(max(self.slots, 4), int(HANDOVER_S * self.slots / max(run_s, 1e-3)))

    def preference(self) -> tuple[float, float, float, str]:
        """Return a sort key, best client first: most free slots, lowest load, longest time since a failure."""
        return (-self.free, self.load, -self.failed_s_ago, self.name)


class Reservation(NamedTuple):
    """A client that is reserved for a wide job until it can start; `cpus` and `memory` are what other jobs may use meanwhile."""

    until: float  # steady; the latest start of the wide job, infinity if unknown
    cpus: int
    memory: float

    def lets(self, head: Candidate, now: float) -> bool:
        """Tell whether another job may run first: it ends before `until`, or fits into the spare part (EASY backfilling)."""
        ends_before = head.timeout is not None and now + head.timeout <= self.until < float("inf")
        return ends_before or (head.cpus <= self.cpus and (head.memory or 0) <= self.memory)


def reserve(candidate: Candidate, client: ClientCapacity, runs: Iterable[Run], now: float) -> Reservation:
    """Return the latest time at which a client will have room for a job, and what else will be free then.

    If that depends on a run without a time limit, nothing else is free: everything that becomes free is kept for the job.
    """
    wanted, free, until = client.wanted(candidate.cpus), client.free, 0.0
    memory = float("inf") if client.free_memory is None else float(client.free_memory)
    for run in sorted(runs, key=lambda run: run.ends_at(now)):
        if free >= wanted and memory >= (candidate.memory or 0):
            break
        free, memory, until = free + client.wanted(run.cpus), memory + run.memory, run.ends_at(now)
    if until == float("inf") or free < wanted:
        return Reservation(float("inf"), 0, 0)
    return Reservation(until, free - wanted, memory - (candidate.memory or 0))


def fits(candidate: Candidate, client: ClientCapacity, run_s: float | None, reserved: Reservation | None, now: float) -> bool:
    """Tell whether a job can be sent to a client now."""
    memory_fits = candidate.memory is None or client.free_memory is None or candidate.memory <= client.free_memory
    wanted = client.wanted(candidate.cpus)
    if wanted > client.room(run_s, wanted) or not (memory_fits or client.queues):
        return False
    return reserved is None or reserved.lets(candidate, now)


def choose(
    queues: Sequence[ServiceQueue], clients: Sequence[ClientCapacity], runs_at: Callable[[str], Iterable[Run]], now: float
) -> tuple[Candidate, ClientCapacity] | None:
    """Return the next job and the client that gets it, or None if nothing can be sent now.

    The service that uses the smallest part of its limit goes first; within a service, turns decide. The first job that is too
    wide for the free slots reserves the client that can start it earliest; other jobs pass it only if they do not delay it.
    """
    reserved: dict[str, Reservation] = {}
    for queue in sorted(queues, key=lambda queue: queue.busy):
        able = [client for client in clients if client.name in queue.clients]
        if not any(client.room(queue.run_s) > 0 for client in able):
            continue
        one_waits = False
        for candidate in queue.heads:
            fitting = [client for client in able if fits(candidate, client, queue.run_s, reserved.get(client.name), now)]
            if fitting:
                return candidate, min(fitting, key=ClientCapacity.preference)
            large = [each for each in able if each.could_run(candidate.cpus, candidate.memory) and each.name not in reserved]
            if large and not one_waits:
                one_waits = True
                starts = {client.name: reserve(candidate, client, runs_at(client.name), now) for client in large}
                best = min(large, key=lambda client: (starts[client.name].until, *client.preference()))
                reserved[best.name] = starts[best.name]
    return None


# -- why a job waits --


class QueueFacts(NamedTuple):
    """The figures that decide when a queued job runs."""

    runs_of_user: int
    runs_per_user: int
    runs_of_service: int
    max_runs: int
    queued_before: int  # of the same user
    users_before: int = 0  # whose turn comes first
    cpus: int = 1
    memory: int | None = None  # MiB

    def before(self, with_others: bool = True) -> str:
        """Return what is ahead of the job, as a clause; empty if nothing is."""
        jobs = plural(self.queued_before, "of your jobs", "of your jobs")
        users = plural(self.users_before if with_others else 0, "other user's turn", "other users' turns")
        parts = [part for part in (jobs, users) if part]
        verb = "is" if len(parts) == 1 and parts[0].startswith("1 ") else "are"
        return f"{' and '.join(parts)} {verb} ahead of it" if parts else ""


def join_clauses(text: str, more: str) -> str:
    """Join two clauses with "and"; `more` may be empty."""
    return f"{text} and {more}" if more else text


def plural(count: int, one: str, many: str) -> str:
    """Return `1 job` or `5 jobs`, an empty text for 0, and `10,000 or more jobs` where counting stops."""
    return "" if not count else f"1 {one}" if count == 1 else f"{count:,}{' or more' if count == 10_000 else ''} {many}"


def attempts_left(job: Job) -> bool:
    """Tell whether the job may be tried again after an infrastructure failure."""
    return job.attempt <= job.retries and job.kill_requested_at is None


def needs(cpus: int, memory: int | None) -> str:
    """Return a job's size in words: `2 slots and 4,096 MiB of memory`."""
    return plural(cpus, "slot", "slots") + (f" and {memory:,} MiB of memory" if memory else "")


def too_large_text(service: str, cpus: int, memory: int | None, places: Collection[ClientCapacity]) -> str:
    """Return why no client of a service could ever run a job of this size; empty if one could, or if none is known."""
    if not places or any(place.could_run(cpus, memory) for place in places):
        return ""
    largest = max(places, key=lambda place: (place.slots >= cpus, place.slots, place.memory or 0))
    has = needs(largest.slots, largest.memory if memory else None)
    return f"no client for {service} is large enough: it needs {needs(cpus, memory)}, and the largest, {largest.name}, has {has}"


def why_waiting(service: str, facts: QueueFacts, troubles: Mapping[str, str], places: Collection[ClientCapacity]) -> str:
    """Return what a queued job waits for, as one sentence.

    `troubles` says, by client, why it takes no jobs now (empty if it does); `places` are the clients that do.
    """
    if facts.runs_of_user >= facts.runs_per_user:
        text = f"{facts.runs_of_user} of your {facts.runs_per_user} runs for {service} are in use"
        return join_clauses(text, facts.before(with_others=False))
    if facts.runs_of_service >= facts.max_runs:
        return join_clauses(f"all {facts.max_runs} runs of {service} are in use", facts.before())
    if troubles and all(troubles.values()):
        said = [f"{name} {why}" for name, why in troubles.items()]
        more = [f"and {plural(len(said) - 3, 'other', 'others')} (GET /clients)"] if len(said) > 4 else []
        return f"no client for {service} takes jobs: " + "; ".join(said[:3] + more if more else said)
    too_large = too_large_text(service, facts.cpus, facts.memory, places)
    if too_large:
        return too_large
    if places and all(place.free <= 0 and not place.queues for place in places):
        slots, names = sum(place.slots for place in places), sorted(place.name for place in places)
        where, taken = names[0] if len(names) == 1 else f"{len(names)} clients", "the only slot" if slots == 1 else f"all {slots} slots"
        return join_clauses(f"{taken} of {where} {'is' if slots == 1 else 'are'} in use", facts.before())
    if facts.before():
        return f"it waits for its turn: {facts.before()}"
    if places and not any(place.queues or place.free >= place.wanted(facts.cpus) for place in places):
        best = max(places, key=lambda place: (place.could_run(facts.cpus, facts.memory), place.free))
        has = f"{best.name} has {max(0, best.free)} of {best.slots} free and reserves freed slots for it"
        return f"it needs {needs(facts.cpus, None)} at once: {has}"
    return f"it is next for a free slot at a client for {service}"


def wait_estimate_s(position: int, facts: QueueFacts, slots: int, run_s: float) -> float:
    """Estimate the seconds until a queued job starts, in rounds of `run_s`, the mean of past runs.

    `position` is the job's place in the service's queue, from 1. It waits for the longer of two: the rounds that the jobs
    ahead take with `slots` and max_runs, and the rounds that its user's own jobs take with runs_per_user.
    """
    at_once = max(1, min(slots, facts.max_runs))
    free = max(0, at_once - facts.runs_of_service)
    rounds = max(0, position - free + at_once - 1) // at_once
    own_free = max(0, facts.runs_per_user - facts.runs_of_user)
    own_rounds = max(0, facts.queued_before + 1 - own_free + facts.runs_per_user - 1) // facts.runs_per_user
    return max(rounds, own_rounds) * run_s


# == 12. Links ==  The server's calls to a client. Every call has time-outs, and its error says what the client may have received.


class Link:
    """One client as the server sees it: how to call it, whether it answers, and which results wait there."""

    def __init__(self, address: Address, data: DataFolder, clock: Clock, ca_file: str = "") -> None:
        self.address, self.data, self.clock, self.ca_file, self.name = address, data, clock, ca_file, address.name
        self.on_loopback = is_loopback(host_of(address.base_url or address.upload_url)[1])
        self.sessions: dict[str, Session | None] = {}  # by token; None: calls carry no proof
        self.opening, self.outdated = threading.Lock(), False  # outdated: joborch 0.1.0, which cannot prove its identity
        self.services: list[Service] = []
        self.connections, self.lock = Connections(), threading.Lock()
        self.slots, self.memory, self.load = 1, cast("int | None", None), 0.0  # as the client reports; MiB, percent
        self.job_slots = False  # a job takes one slot there, whatever its number of cores
        self.notes: dict[int, str] = {}  # by job id: what a payload waits for, as the client reports
        self.ours = False  # it is joborch: an answer had its header
        self.protocol: ClientProtocol = (ClientProtocol if address.base_url else load_plugin("compat22").Protocol22)(self)
        self.heard_at: float | None = None  # monotonic
        self.silent_since = clock.monotonic()
        self.drained = False  # an operator stopped new jobs for it
        self.probing = False  # after a failure it gets one job at a time until it accepts one
        self.outage = Backoff(clock)  # after failed calls
        self.answers = True  # it has answered since its last failure
        self.problem = ""  # why it accepts no payload now, as the client reports
        self.try_at = self.asked_at = float("inf")  # monotonic: when to call it despite the back-off, for a kill; when its poll began
        self.failed_at = self.ended_at = float("-inf")  # monotonic: its last failure, and the last end of a run there
        self.refusal = Backoff(clock)  # after submits that it refused
        self.instance, self.since = "", 0
        self.start, self.copy_of = "", ""  # id of its process start; the client whose data folder it has a copy of
        self.instance_at = self.start_at = float("-inf")  # monotonic: when instance and start became known
        self.met = self.relist = False  # its instance was compared with the others' instances; its whole list must be requested again
        self.undecided: set[int] = set()  # ids of jobs that two clients report: decided when both lists are complete
        self.ended: dict[int, EndReport] = {}  # by job id
        self.confirmed_ids: list[str] = []  # payload ids to confirm: their results are stored here
        self.listed: set[int] | None = None  # job ids that a first contact has listed so far; None if none is under way
        self.polls, self.quiet_until = Allowance(), 0.0  # monotonic: no warning about its answers before then
        self.callers = WaiterLimit(CALLS_A_CLIENT)  # limits calls on behalf of HTTP callers
        self.kill_due: dict[int, float] = {}  # by job id, monotonic
        self.outbox: deque[Job] = deque()  # claimed for it, and not yet taken by a sender
        self.sending: set[int] = set()  # job ids that a sender holds: from before the claim until the outcome is stored
        self.accepted: dict[str, tuple[str, bool]] = {}  # by mark, until they are stored: payload ids, and whether an end came along
        self.superseded_attempts: dict[str, Job] = {}  # by mark: attempts that the server replaced, but that still run here
        self.may_have_kills = self.may_have_pinned = True  # jobs to kill; jobs tied to it by a lost answer, or by a crash at their submit
        self.resend_due: dict[int, float] = {}  # by job id, monotonic: jobs that a lost answer ties to this client

    def token(self, service: str | None = None) -> str:
        """Return the token that this client must have: the one set for the service, or else the one in this user's token file.

        Without a service name, any service's token will do. The token file is only used for a client on this machine.
        """
        token = self.set_token(service)
        path = client_token_file() if self.on_loopback and not token else None
        try:  # read again each time: the client may start later
            return path.read_text(encoding="ascii").strip() if path else token
        except OSError:
            return ""

    def set_token(self, service: str | None) -> str:
        """Return the token that is set for a service, or for any of its services if the name is not one of them."""
        set_ones = self.set_tokens()
        return set_ones[service] if service in set_ones else next(filter(None, set_ones.values()), "")

    def set_tokens(self) -> dict[str | None, str]:
        return {service.name: service.token for service in self.services}

    def may_be_22(self) -> bool:
        """Tell whether all its services allow a 2.2 client, which cannot prove its identity."""
        return bool(self.services) and all(service.peer == "2.2" for service in self.services)

    def remedy(self, setting: str, lacking: Callable[[Service], bool]) -> str:
        """Return the full name of a setting for the first service that lacks it."""
        name = next((service.name.upper() for service in self.services if lacking(service)), "<NAME>")
        return f"SERVICE_{name}_{setting}"

    @property
    def client(self) -> str:
        """What identifies the client, however many URLs it has: its instance, or its name until the instance is known."""
        return f"instance {self.instance}" if self.protocol.has_events and self.instance and not self.copy_of else self.name

    def is_heard(self) -> bool:
        return self.heard_at is not None and not self.outage.failures

    def has_told_all(self) -> bool:
        """Tell whether its list of payloads is complete, or waiting for it is useless."""
        if self.protocol.has_events and self.is_heard():
            return self.since > 0 and self.listed is None
        return not self.protocol.has_events or self.silent_s() > SILENT_AFTER_S

    # -- health --

    def held(self) -> bool:
        """Tell whether the client has never answered, or is held back after a failure."""
        return self.heard_at is None or self.outage.waits()

    def heard(self) -> None:
        """Note that the client answered. Everything that waits for it is due at once."""
        if self.outage.failures:
            log.info("client %s answers again after %s", self.name, format_duration(self.clock.monotonic() - self.silent_since))
            with self.lock:
                self.resend_due.clear()
                self.kill_due.clear()
                for found in self.ended.values():
                    found.due = 0.0
        self.heard_at = self.silent_since = self.clock.monotonic()
        self.outage.worked()
        self.answers, self.try_at = True, float("inf")

    def failed(self, error: object) -> None:
        """Pause calls to the client, longer after each failure in a row. Calls that fail during the pause do not count again."""
        text = one_line(str(error))
        if text != self.outage.reason:
            never = self.heard_at is None and isinstance(error, NothingSent) and not isinstance(error, Refused)
            hint = "; it has not answered yet: start one there with `joborch client`" if never else ""
            log.warning("client %s: %s%s", self.name, text, hint)
        self.failed_at, self.probing, self.answers = self.clock.monotonic(), True, False
        if self.outage.waits():
            self.outage.reason = text
        else:
            self.outage.failed(text)

    def probe(self) -> bool:
        """Ask a client that failed whether it answers again, with a call that affects no job. Return whether it does."""
        try:
            self.protocol.probe()
            self.answers = True
        except Gone as error:
            log.debug("client %s: %s", self.name, error)  # it is a 2.2 client
        except (NothingSent, NoAnswer) as error:
            self.failed(error)
        return self.answers

    def refused(self, error: object) -> None:
        """Pause submits to a client that answers but refuses jobs, longer after each refusal in a row."""
        self.refusal.failed(one_line(str(error)))
        self.probing = True

    def took_one(self) -> None:
        self.heard()
        self.refusal.worked()
        self.probing = False

    def takes_jobs(self) -> bool:
        """Tell whether it may get a new job now. It must have answered since its last failure."""
        return not self.drained and not self.copy_of and self.answers and not self.problem and self.ready()

    def ready(self) -> bool:
        return not self.held() and not self.refusal.waits()

    def has_free_sender(self) -> bool:
        """Tell whether a job claimed for it now would be sent at once."""
        return len(self.sending) < (1 if self.probing else SENDERS_PER_CLIENT)

    def why_not(self) -> str:
        """Return why it gets no jobs now, as the end of a sentence; empty if it gets jobs."""
        if self.drained:
            return "is drained: an operator stopped new jobs for it"
        if self.copy_of:
            return f"runs on a copy of the data folder of {self.copy_of}: stop it, and start it with an empty DATA_PATH"
        if self.takes_jobs():
            return ""
        if self.outage.reason:
            return f"{self.outage.reason} ({format_duration(self.silent_s())} ago)"
        return self.problem or self.refusal.reason or "has not been called yet"

    def silent_s(self) -> float:
        return self.clock.monotonic() - self.silent_since

    def reports(self) -> list[EndReport]:
        """Return the payloads that have ended here and whose results are not collected yet."""
        with self.lock:
            return list(self.ended.values())

    def capacity(self, cpus: int, memory: int, jobs: int = 0, others: Sequence[Link] = ()) -> ClientCapacity:
        """Return its capacity for the scheduler, given the sums of cores, memory (MiB) and jobs that it has.

        Payloads that have ended and wait to be fetched use none. `others` are further URLs of the same client; their jobs count, too.
        """
        ended = [found for link in (self, *others) for found in link.reports()]
        free = self.slots - (jobs if self.job_slots else cpus)
        free += sum(min(found.cpus, 1) if self.job_slots else found.cpus for found in ended)
        free_memory = None if self.memory is None else self.memory - memory + sum(found.memory for found in ended)
        now = self.clock.monotonic()
        turning = now - self.ended_at < TURNING_S
        state = (self.load, now - self.failed_at, turning, not self.protocol.has_events)
        return ClientCapacity(self.name, self.slots, free, self.memory, free_memory, *state, cpus, self.job_slots)

    # -- limits on what it sends --

    def confirm(self, payload_id: str | None) -> None:
        """Let the next poll tell the client that it need not keep a result. The rest is found again at a first contact."""
        if payload_id and len(self.confirmed_ids) < SETTLED_LIMIT:
            self.confirmed_ids.append(payload_id)

    def note(self, text: str, level: int = logging.WARNING) -> None:
        """Log an oddity in its answers, at most once a minute: a faulty client must not fill the log."""
        if time.monotonic() >= self.quiet_until:
            self.quiet_until = time.monotonic() + 60
            log.log(level, "client %s %s", self.name, text)

    # -- proof --

    def look(self, made: socket.socket) -> None:
        """Raise NothingSent if a connection leads to another user of this machine. Called before the first byte is sent.

        If all its services have a token, the other user must prove that it knows it; a 2.2 client cannot.
        """
        try:
            port = made.getpeername()[1]
            if not is_loopback(made.getpeername()[0]):
                return
            uid = far_uid(made)
        except OSError as error:
            raise NothingSent(f"cannot be reached: {plain_cause(error)}") from error
        by_mac = bool(self.services) and all(self.set_tokens().values()) and not self.may_be_22()
        if is_own_user(uid) or by_mac:
            return
        self.sessions.clear()
        whose = "belongs to an unknown user" if uid is None else f"belongs to the user {uid}"
        remedy = "set " + self.remedy("TOKEN", lambda service: not service.token) + " to its token"
        raise NothingSent(
            f"is not called: its port {port} on this machine {whose}; stop the process that listens there, "
            f"or, if that user runs this client, {'run it as this user' if self.may_be_22() else remedy}"
        )

    def session(self, service: str | None, patience_s: float = HELLO_TIMEOUT_S) -> Session | None:
        """Return the session whose proofs this client's calls need, or None if they need no proof.

        Without a service name, any service's token will do. Raises NothingSent if the client must not be called.
        """
        if not self.protocol.can_prove and not self.may_be_22():
            raise NothingSent(self.no_joborch("it has no common base URL"))
        if self.heard_at is None:  # many clients may hang: do not let the first call to another one wait long for a thread
            patience_s = min(patience_s, 2.0 ** min(self.outage.failures, 10))
        names = [service] if service in self.set_tokens() else list(self.set_tokens()) or [None]
        trouble: NothingSent | None = None
        with self.opening:
            tokens = list(dict.fromkeys(map(self.token, names)))
            known = dict(self.sessions)  # a copy, because a failed call clears the table
            for token in sorted(tokens, key=lambda token: token not in known) if self.protocol.can_prove else []:
                try:
                    if token not in known:
                        self.sessions[token] = known[token] = self.open_session(service, token, patience_s)
                    return known[token]
                except NothingSent as error:
                    trouble = trouble or error
                except NoAnswer as error:  # /hello changes nothing, so a lost answer is harmless
                    trouble = trouble or NothingSent(str(error))
        if trouble is not None:
            raise trouble
        return None

    def open_session(self, service: str | None, token: str, patience_s: float) -> Session | None:
        """Open a session by calls that change nothing. Return None if the client need not prove its identity."""
        said = self.greet(patience_s)
        if said is None:
            return None
        is_set = bool(token) and token in self.set_tokens().values()
        if not token and not self.on_loopback and not self.may_be_22():
            setting = self.remedy("TOKEN", lambda each: each.name == service or (service is None and not each.token))
            raise NothingSent(f"is not called, because it cannot prove its identity: set {setting} to its token")
        if not token or not (said["proof"] or is_set):
            return None  # without a token, on loopback, `look` has checked the user
        session, url = Session(token, said["nonce"]), f"{self.address.base_url}/hello"
        answer, proven = self.prove("GET", url, patience_s, session)
        text = read_some(answer, 4 * KIB)
        if not proven:
            if answer.status in (401, 403):
                raise Refused(refused_text(answer.status, text))
            raise NothingSent(self.unproven(answer))
        return session

    def greet(self, patience_s: float) -> dict[str, Any] | None:
        """Call /hello, which reveals no secret. Return a joborch client's answer, or None for a 2.2 client. Raises NothingSent."""
        answer = self.exchange("GET", f"{self.address.base_url}/hello", patience_s)
        version, text = one_line(answer.headers.get(OURS_HEADER, ""), 40), read_some(answer, 4 * KIB)
        self.outdated = version.startswith("0.1.") and answer.status == 404
        if version and answer.status == 404 and not self.outdated:
            raise NothingSent("is not a joborch client, but perhaps a joborch server: correct SERVICE_<NAME>_CLIENTS")
        if self.outdated:
            self.silent_since = self.clock.monotonic()  # it answers, so its jobs are not lost
            raise NothingSent(
                f"runs joborch {version}, which cannot prove its identity: replace its joborch.pyz by version {__version__}; its jobs wait"
            )
        if version:
            self.ours = True
            return read_hello(answer.status, text)
        if self.ours and self.silent_s() < FOREIGN_PATIENCE_S:
            raise NothingSent(f"did not answer: another program answered in its place, with {answer.status}")
        if not 400 <= answer.status < 500:
            foreign = "sends an invalid answer: is it a joborch client?"
            raise NothingSent(refused_text(answer.status, text) if answer.status >= 500 else foreign)
        if not self.may_be_22():
            raise NothingSent(self.no_joborch(f"it answered {answer.status} to /hello"))
        self.protocol = load_plugin("compat22").Protocol22(self)
        log.info("client %s has no /events: it is polled, as a 2.2 client", self.name)
        return None

    def no_joborch(self, why: str) -> str:
        """Return the message about a client that cannot prove its identity, but must."""
        setting = self.remedy("PEER", lambda service: service.peer != "2.2")
        return f"cannot prove its identity, because {why}: set {setting}=2.2 if it is a 2.2 client"

    def unproven(self, answer: Reply) -> str:
        """Return the message about an answer without a valid proof."""
        if OURS_HEADER in answer.headers and MAC_HEADER not in answer.headers:
            why = "it has no token, so it cannot prove that it knows this one: set JOBORCH_TOKEN there"
        else:
            why = "set SERVICE_<NAME>_TOKEN to this client's token, or find out who listens there"
        what = f"a program without its token answered in its place, with {answer.status}, or changed its answer"
        return f"did not answer: {what}; {why}"

    def target_of(self, url: str) -> str:
        """Return the path and query of a URL as the client sees them, without the prefix that a gateway removes."""
        base = self.address.base_url
        return url[len(base) :] if url.startswith(base) else "/" + url.partition("://")[2].partition("/")[2]

    def prove(self, method: str, url: str, read_timeout_s: float, session: Session, **options: Any) -> tuple[Reply, bool]:
        """Make one call with a proof. Return the answer, and whether it is proven; an unproven answer closes the session."""
        headers = options.pop("headers", {})
        proof = session.proof(method, self.target_of(url))
        proven = {**headers, "Authorization": proof.authorization(headers, int(headers.get("Content-Length", 0)))}
        answer = self.exchange(method, url, read_timeout_s, headers=proven, **options)
        fits = hmac.compare_digest(answer.headers.get(MAC_HEADER, "").encode(), proof.of_answer(answer.status, answer.headers).encode())
        if not fits:
            self.sessions.clear()
        return answer, fits

    # -- calls --

    def call(self, method: str, url: str, read_timeout_s: float = READ_TIMEOUT_S, *, service: str | None = None, **options: Any) -> Reply:
        """Make one call for a service and return its answer; the caller reads the body.

        The call stops when the option `unwanted` returns True: nobody waits for the answer.
        Raises NothingSent if no byte of the request can have been sent, else NoAnswer.
        """
        could_prove = self.protocol.can_prove
        session = self.session(service, min(read_timeout_s, HELLO_TIMEOUT_S))
        if could_prove and not self.protocol.can_prove:
            raise NothingSent("has no /hello: from now on it is called as a 2.2 client")
        if session is None:
            headers = {**options.pop("headers", {}), **self.protocol.unproven_headers(service)}
            return self.its_own(self.exchange(method, url, read_timeout_s, headers=headers, **options))
        answer, proven = self.prove(method, url, read_timeout_s, session, **options)
        if not proven and answer.status == 401 and NONCE_HEADER in answer.headers:
            answer.close()
            answer, proven = self.call_again(method, url, read_timeout_s, service, **options)
        if not proven and answer.status == 413 and OURS_HEADER not in answer.headers:
            return answer  # from a gateway: the client certainly received nothing
        if not proven:
            answer.close()
            raise NoAnswer(self.unproven(answer))
        self.ours = True
        return answer

    def call_again(self, method: str, url: str, read_timeout_s: float, service: str | None, **options: Any) -> tuple[Reply, bool]:
        """Repeat a call to a client that has restarted. It may have carried out the first one, so each failure is NoAnswer."""
        if "body" in options:
            options["body"].rewind()
        try:
            session = self.session(service, min(read_timeout_s, HELLO_TIMEOUT_S))
            if session is None:
                raise NothingSent("was restarted and cannot prove its identity")
            return self.prove(method, url, read_timeout_s, session, **options)
        except NothingSent as error:
            raise NoAnswer(str(error)) from error

    def exchange(
        self,
        method: str,
        url: str,
        read_timeout_s: float,
        headers: Mapping[str, str] = types.MappingProxyType({}),
        body: FilesBody | None = None,
        unwanted: Callable[[], bool] | None = None,
    ) -> Reply:
        """Send one request and return the head of its answer. Raises NothingSent if no byte can have been sent, else NoAnswer."""
        connection, begun = self.connections.take(url), False
        connection.bounds = Bounds(read_timeout_s, unwanted)
        try:
            (connection.sock or connection.open(self.look, self.ca_file, min(CONNECT_TIMEOUT_S, read_timeout_s))).settimeout(read_timeout_s)
            begun = True
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it hung up
                connection.request(method, "/" + url.partition("://")[2].partition("/")[2], body, {**headers, OURS_HEADER: __version__})
            return refuse_encoded(cast("Reply", connection.getresponse()))
        except CONNECTION_ERRORS as error:
            connection.close()
            self.sessions.clear()  # whoever answers next has to prove its identity
            if begun:
                raise NoAnswer(f"did not answer: {plain_cause(error)}") from error
            if isinstance(error, ssl.SSLCertVerificationError):
                raise NothingSent("cannot be reached: its TLS certificate is not trusted here; set JOBORCH_CA_FILE") from error
            raise NothingSent(f"cannot be reached: {plain_cause(error)}") from error
        except BaseException:
            connection.close()
            raise

    def its_own(self, answer: Reply) -> Reply:
        """Return `answer` if it is the client's. Raises NoAnswer if a gateway on the way answered in its place.

        A gateway's 413 is returned: it means that the client certainly received nothing.
        """
        if OURS_HEADER in answer.headers:
            self.ours = True
            if not self.protocol.can_prove and self.address.base_url and answer.status in (401, 403):  # joborch has replaced 2.2
                self.protocol = ClientProtocol(self)
                self.sessions.clear()
        elif answer.status == 413:
            return answer
        elif self.ours and self.silent_s() < FOREIGN_PATIENCE_S:
            answer.close()
            raise NoAnswer(f"did not answer: another program answered in its place, with {answer.status}")
        return answer

    def submit(self, job: Job, folder: Path, paths: Sequence[str], return_inputs: bool, wait_ms: int = 0) -> tuple[str, Any]:
        """Send the files of one attempt. Return the payload's id, and its end if the client waited for it (`wait_ms`), else None.

        Raises NothingSent if the client certainly has no payload, NoAnswer if that is unknown, Rejected if it refuses for good.
        """
        body, checks = self.protocol.form(job, folder, paths)
        headers = {
            "Content-Type": f"multipart/form-data; boundary={body.boundary}",
            "Content-Length": str(len(body)),
            "X-Joborch-Job": str(job.id),
            "X-Joborch-Uuid": job.uuid,
            "X-Joborch-Attempt": str(job.attempt),
            "X-Joborch-Service": quote(job.service or ""),
            "X-Joborch-User": str(job.user_id),
            "X-Joborch-Cpus": str(job.cpus),
            **checks,
            **({"X-Joborch-Memory": str(job.memory)} if job.memory else {}),
            **({"X-Joborch-Timeout": f"{job.timeout:.12g}"} if job.timeout else {}),
            **({} if return_inputs else {"X-Joborch-Return-Inputs": "0"}),
            **({"X-Joborch-Wait": str(wait_ms)} if wait_ms else {}),
        }
        answer = self.call("POST", self.address.upload_url, service=job.service, body=body, headers=headers)
        if answer.status == 413 and OURS_HEADER not in answer.headers:
            read_some(answer, KIB)
            remedy = "raise its limit (nginx: client_max_body_size 0), or send less"
            raise Rejected(f"a gateway in front of it refused {len(body):,} bytes (it answered 413): {remedy}")
        text = read_some(answer, 64 * KIB + (INLINE_BASE64_LIMIT if wait_ms else 0))  # a 2.2 client echoes all input after the id
        return read_submit_answer(answer.status, text), read_end(text) if wait_ms else None

    def events(self, wait_s: float, done: Sequence[str]) -> EventsReply:
        """Wait for changes at the client: one long poll for all its payloads.

        The client may delete the results of `done`. Raises Gone if it is a 2.2 client, which has no /events.
        """
        self.session(None)
        if not self.protocol.has_events:
            raise Gone("no /events")
        more = "&more=1" if self.listed is not None and self.since else ""
        query = f"since={self.since}&instance={self.instance}&wait={wait_s:g}&done={','.join(done)}{more}"
        answer = self.call("GET", f"{self.address.base_url}/events?{query}", read_timeout_s=wait_s + 10)
        if answer.status != 200:
            raise NothingSent(refused_text(answer.status, read_some(answer, 64 * KIB)))
        try:
            with contextlib.closing(self.data.spool()) as spool:
                copy_some(answer, EVENTS_ANSWER_BYTES + 1, spool)
                # Objects take several times the memory of their text: only one large answer is read at a time.
                with BIG_ANSWER if spool.tell() > BIG_ANSWER_BYTES else contextlib.nullcontext():
                    spool.seek(0)
                    return read_events(spool.read())
        except (ValueError, KeyError, TypeError) as error:
            raise NothingSent("sends an invalid answer to /events: is it a joborch client?") from error

    def status(self, job: Job) -> dict[str, Any]:
        """Return a job's payload as the client shows it: `{"status": ...}`. Raises Gone if the client does not know it."""
        answer = self.call("GET", f"{self.address.download_url}/{job.dest_id}", service=job.service, headers=named(job))
        if answer.status == 200 and answer.headers.get("Content-Type", "").startswith(ZIP_TYPE):
            answer.close()
            return {"status": Status.COMPLETED.value}
        text = read_some(answer, MIB)
        if answer.status == 404:
            raise Gone(f"{self.name} no longer knows payload {job.dest_id}")
        if answer.status != 200:
            raise BadAnswer(refused_text(answer.status, text))
        try:
            said = clean_payload(read_answer(text))
        except ValueError as error:
            raise BadAnswer("sends an invalid answer to /retrieve") from error
        if said is None:
            raise BadAnswer("sends an invalid answer to /retrieve")
        return said

    def fetch(self, job: Job, into: Transfer, partial: bool = False, unwanted: Callable[[], bool] | None = None) -> None:
        """Fetch the ZIP of a payload; verify length and SHA-256 if the client sent them.

        A broken transfer resumes where it stopped if each call makes progress. Raises Gone if the client does not know the
        payload, and NoAnswer if the transfer broke: what arrived stays in `into` for the next try.
        """
        url = self.address.download_url + ("_partial" if partial else "") + f"/{job.dest_id}"
        small = 0
        while True:
            before, begun = into.size, time.monotonic()
            try:
                return self.fetch_rest(job, url, into, unwanted)
            except NoAnswer as error:
                least = max(1.0, SLOWEST_BYTES_S * (time.monotonic() - begun - 1))
                small += into.size - before < 64 * KIB
                if not into.tag or into.size - before < least or small > SMALL_PIECES or (unwanted and unwanted()):
                    raise
                log.warning("job %d: %s %s; it is resumed there", job.id, self.name, error)

    def fetch_rest(self, job: Job, url: str, into: Transfer, unwanted: Callable[[], bool] | None) -> None:
        """Request the missing rest of a ZIP once and add what arrives to `into`."""
        headers = {**named(job), **into.wanted()}
        answer = self.call("GET", url, service=job.service, headers=headers, unwanted=unwanted)
        if answer.status in (200, 206) and answer.headers.get("Content-Type", "").startswith(ZIP_TYPE):
            return take_rest(answer, into)
        text = read_some(answer, KIB)
        if answer.status == 404:
            raise Gone(f"{self.name} no longer knows payload {job.dest_id}")
        if answer.status == 200 and said_status(text) == Status.CLEANED.value:
            raise Gone(f"the result is missing at {self.name}: its files were removed there")
        if answer.status == 416:  # the result is now shorter than the part that is stored here
            into.begin()
        if answer.status == 503 and PACKING_HEADER.replace("_", "-") in answer.headers:
            raise NotPacked("is still packing the result")
        raise NoAnswer(refused_text(answer.status, text))

    def logs(self, job: Job, stream: str, offset: int, unwanted: Callable[[], bool] | None = None) -> tuple[bytes, int]:
        """Return a part of an output stream, and the offset after it (in bytes).

        Raises Gone if the client does not know the payload, or is a 2.2 client, which shows no output.
        """
        url = self.protocol.logs_url(job, stream, offset)
        answer = self.call("GET", url, read_timeout_s=10, service=job.service, headers=named(job), unwanted=unwanted)
        text = read_some(answer, 2 * LOG_PART_BYTES)
        if answer.status == 404:
            raise Gone(f"{self.name} no longer knows payload {job.dest_id}")
        following = answer.headers.get("X-Next-Offset", "")
        if answer.status != 200 or not re.fullmatch(r"[0-9]{1,18}", following) or "Content-Length" not in answer.headers:
            raise NoAnswer(refused_text(answer.status, text))
        if int(following) < offset:
            raise NoAnswer("sends an invalid answer to /logs: its next offset is before the requested one")
        return text, int(following)

    def kill(self, job: Job) -> bool:
        """Ask the client to kill a payload. Return True if none of its processes runs, False if the kill is still under way."""
        url = f"{self.address.terminate_url}/{job.dest_id}"
        answer = self.call("POST", url, self.protocol.kill_timeout_s, service=job.service, headers=named(job))
        text = read_some(answer, KIB)
        if answer.status == 404:
            raise Gone(f"{self.name} no longer knows payload {job.dest_id}")
        if answer.status not in (200, 202):
            raise NoAnswer(refused_text(answer.status, text))
        return answer.status == 200


class ClientProtocol:
    """How a server and one of our clients work together. The plug-in compat22 has a subclass for 2.2 clients.

    `Link.greet` and `Link.its_own` change the protocol of a link if another program answers at the client's URL.
    """

    can_prove = True  # it has /hello, and proves its answers
    has_events = True  # it reports its slots, its instance, and its payloads
    knows_keys = True  # it finds a payload by uuid and attempt, so a submit may be repeated
    kill_timeout_s = KILL_TIMEOUT_S

    def __init__(self, link: Link) -> None:
        self.link = link

    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """Return a lock for calls that must not overtake each other."""
        return contextlib.nullcontext()

    def unproven_headers(self, service: str | None) -> dict[str, str]:
        """Return headers to add to a call that carries no proof."""
        return {}

    def get_news(self, server: Server) -> bool:
        """Get what has changed at the client; tell whether to ask again at once. Raises NothingSent, NoAnswer or Gone."""
        return hear(server, self.link)

    def probe(self) -> None:
        """Check that the client answers, by a call that affects no job. Raises NothingSent, NoAnswer or Gone."""
        self.link.events(0, ())

    def form(self, job: Job, folder: Path, paths: Sequence[str]) -> tuple[FilesBody, dict[str, str]]:
        """Return the form with a job's files, and headers about their digests. Raises Rejected if the client would lose files."""
        inputs = {"X-Joborch-Inputs": job.inputs_sha256} if job.inputs_sha256 else {}
        return FilesBody(folder, paths, True, job.inputs_sha256), {"X-Joborch-Digests": "1", **inputs}

    def accepted(self, server: Server, payload_id: str) -> None:
        """Note that the client accepted a payload, before its id is stored."""

    def logs_url(self, job: Job, stream: str, offset: int) -> str:
        """Return where a part of an output stream is read. Raises Gone if the client shows none."""
        return f"{self.link.address.base_url}/logs/{job.dest_id}?stream={stream}&offset={offset}"


def named(job: Job) -> dict[str, str]:
    """Return the header that names the attempt behind a payload id: a client with an empty data folder reuses ids."""
    return {"X-Joborch-Mark": job.mark}


# == 13. Answers ==  A client's answers are limited in size and time, and checked before they are used.


@dataclass
class EventsReply:
    """A client's answer to /events: its state, and the payloads that changed."""

    instance: str
    next: int
    slots: int
    payloads: list[dict[str, Any]]
    memory: int | None = None  # MiB
    load: float = 0.0  # percent
    job_slots: bool = False  # a job takes one slot, whatever its number of cores
    more: bool = False  # there are further pages
    size: int = field(default=0, compare=False)  # bytes of the answer
    problem: str = ""  # why it takes no payload now
    start: str = ""  # id of the client's process start


@dataclass
class EndReport:
    """A client's report that a payload has ended. It waits here until its result is collected."""

    job_id: int
    payload: dict[str, Any]
    due: float  # monotonic
    failures: int = 0
    taken: bool = False  # a thread is collecting it
    newer: EndReport | None = None  # a later report about the same job
    needs: int = 0  # bytes that did not fit on the disk; it is fetched again when there is room
    part: Transfer | None = None  # the part of its result that has arrived
    asked: int = 0  # how often the client answered that it is still packing the result
    pause_s: float = 0.0  # the pause before asking again
    cpus: int = 0  # slots that are free again
    memory: int = 0  # MiB


PAYLOAD_STATES = (Status.PREPARED, Status.RUNNING, *ENDED, Status.CLEANED)
ANSWER_HEAD_BYTES = 64 * KIB  # of an answer without its body: headers, a "100 Continue" before them, chunk framing
ANSWER_VALUES = 50_000  # JSON values in one answer: 4 MiB of `[{},{},...` would become 110 MB of objects
EVENTS_ANSWER_BYTES = EVENTS_PAGE_BYTES + 256 * KIB  # a page of /events, including everything around its payloads
INLINE_BASE64_LIMIT = 4 * INLINE_LIMIT_BYTES  # a small result with its ZIP's directory, in base64
SLOWEST_BYTES_S = 8 * KIB  # an answer that is slower on average is abandoned
WANTED_LOOK_S = 1.0  # between two checks that a caller still waits for an answer
BIG_ANSWER_BYTES, BIG_ANSWER = 256 * KIB, threading.Lock()
IDLE_CONNECTIONS = 16  # to one client
CONNECTION_ERRORS = (http.client.HTTPException, OSError, ValueError)  # ValueError: a chunk whose length is not a number


def whole_in(said: Any, least: int, most: int) -> int | None:
    """Return an integer from a client, or None if it is anything else (such as true) or out of range."""
    return said if type(said) is int and least <= said <= most else None


def number_in(said: Any, least: float, most: float) -> float | None:
    """Return a number from a client, or None if it is anything else or out of range, as NaN and 1e400 are."""
    return said if type(said) in (int, float) and least <= said <= most else None


def text_in(said: Any, pattern: str) -> str | None:
    """Return a text from a client, or None if it is anything else or does not match."""
    return said if isinstance(said, str) and re.fullmatch(pattern, said, re.ASCII) else None


def clean_payload(said: Any) -> dict[str, Any] | None:
    """Return a client's description of a payload with each field of the right type and size, or None if it is invalid.

    Invalid fields are omitted. `uuid`, `attempt` and `id` may be None; `reason` may be empty.
    """
    if not isinstance(said, dict) or not isinstance(said.get("status"), str):
        return None
    if said["status"] not in {state.value for state in PAYLOAD_STATES}:
        return None
    clean = {
        "started_at": number_in(said.get("started_at"), 0, 1e11),
        "ended_at": number_in(said.get("ended_at"), 0, 1e11),
        "exit_code": whole_in(said.get("exit_code"), -(2**31), 2**32),
        "signal": whole_in(said.get("signal"), 0, 255),
        "archive": text_in(said.get("archive"), f"[A-Za-z0-9+/=]{{0,{INLINE_BASE64_LIMIT}}}"),
        "sha256": text_in(said.get("sha256"), "[0-9a-f]{64}"),
    }
    clean = {name: value for name, value in clean.items() if value is not None}
    if isinstance(said.get("cause"), str) and said["cause"] in {cause.value for cause in Cause}:
        clean["cause"] = said["cause"]
    if isinstance(said.get("ended_as"), str) and said["ended_as"] in {state.value for state in ENDED}:
        clean["ended_as"] = said["ended_as"]
    for name in ("reason", "ended_reason"):
        clean[name] = one_line(said[name][:2000], 1000) if isinstance(said.get(name), str) else ""
    number = said.get("id")
    clean["id"] = text_in(str(number) if type(number) is int else number, "[0-9]{1,18}")
    clean.update(status=said["status"], uuid=text_in(said.get("uuid"), r"[\w-]{1,64}"), attempt=whole_in(said.get("attempt"), 1, 2**31))
    return clean


def read_answer(text: bytes) -> Any:
    """Parse a client's JSON. Raises ValueError if it is invalid, or would take far more memory than its text."""
    if has_many_values(text):
        raise ValueError("too many values")
    return parse_json(text)


def has_many_values(text: bytes) -> bool:
    """Tell whether a JSON text has more than ANSWER_VALUES values; the content of strings does not count."""
    separators = (b",", b"[", b"{")
    count = sum(map(text.count, separators))
    if count <= ANSWER_VALUES:
        return False
    bare = text.replace(rb"\\", b"").replace(rb"\"", b"")
    if bare.count(b'"') > 4 * ANSWER_VALUES:
        return True
    inside = sum(sum(map(found[0].count, separators)) for found in re.finditer(rb'"[^"]*"', bare))
    return count - inside > ANSWER_VALUES


def read_events(text: bytes) -> EventsReply:
    """Parse a client's answer to /events. Raises ValueError, KeyError or TypeError if it is invalid."""
    if len(text) > EVENTS_ANSWER_BYTES or not text.isascii():
        raise ValueError("longer than a page, or not ASCII")
    said = read_answer(text)
    payloads, next_change = said["payloads"], whole_in(said["next"], 0, 2**63 - 1)
    slots, load = whole_in(said["slots"], 0, 10**6), number_in(said.get("load") or 0.0, -1e6, 1e6)
    memory, instance = whole_in(said.get("memory"), 0, 2**40), text_in(said["instance"], r"[\w.-]{1,64}")
    if next_change is None or slots is None or load is None or instance is None or memory != said.get("memory"):
        raise ValueError("invalid numbers")
    if not isinstance(payloads, list) or len(payloads) > EVENTS_PAGE or not all(isinstance(payload, dict) for payload in payloads):
        raise ValueError("invalid payloads")
    cleaned = [clean_payload(payload) or {"rubbish": reprlib.repr(payload)} for payload in payloads]
    heard = EventsReply(instance, next_change, slots, cleaned, memory, min(100.0, max(0.0, load)))
    heard.job_slots, heard.more, heard.size = said.get("job_slots") is True, said.get("more") is True, len(text)
    problem = said.get("problem")
    heard.problem = one_line(problem) if isinstance(problem, str) else ""
    heard.start = text_in(said.get("start"), "[0-9a-f]{1,64}") or ""
    return heard


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


def refused_text(status: int, body: bytes) -> str:
    """Describe an error answer in one sentence."""
    message: Any = None
    with contextlib.suppress(ValueError, AttributeError):
        message = read_answer(body).get("message")
    if status in (401, 403):
        return f"answered {status}: set SERVICE_<NAME>_TOKEN to the token that this client demands"
    return f"answered {status}" + (f": {one_line(message)}" if message and isinstance(message, str) else "")


def repr_digest(sha256_hex: str) -> str:
    """Return a Repr-Digest header (RFC 9530)."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256_hex)).decode()}:"


def read_hello(status: int, text: bytes) -> dict[str, Any]:
    """Return a joborch client's answer to /hello: its `nonce`, and whether it has a token to prove (`proof`).

    Raises NothingSent for anything else.
    """
    if status != 200:
        raise NothingSent(refused_text(status, text))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = parse_json(text)
        if re.fullmatch("[0-9a-f]{32}", said["nonce"]):
            return {"nonce": said["nonce"], "proof": said.get("proof") is not False}
    raise NothingSent("sends an invalid answer to /hello: is it a joborch client?")


def said_status(text: bytes) -> str | None:
    """Return the status in a client's answer about a payload, or None if there is none."""
    try:
        said = parse_json(text)
    except ValueError:
        return None
    return str(said.get("status")) if isinstance(said, dict) else None


def read_submit_answer(status: int, text: bytes) -> str:
    """Return the payload id in an answer to /submit, or raise the exception that the answer means."""
    if status in (200, 201):
        match = re.search(rb'"id"\s*:\s*([0-9]{1,18})\s*[,}]', text)  # with what follows: a truncated id would be another payload's
        if not match:
            raise NoAnswer("sent an invalid answer to /submit")
        return match[1].decode()
    if status in (400, 409, 413, 415, 422):
        raise Rejected(refused_text(status, text))
    if status in (401, 403, 404, 405, 429, 503, 507):
        raise Refused(refused_text(status, text))
    raise NoAnswer(refused_text(status, text))


def read_end(text: bytes) -> Any:
    """Return what an answer to /submit says of the payload's end; None if it says nothing that can be read."""
    try:
        return read_answer(text).get("end")
    except (ValueError, AttributeError):
        return None


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
        silent_until = time.monotonic() + self.bounds.silent_s
        try:
            while True:
                self.connection.settimeout(self.patience_s(silent_until))
                with contextlib.suppress(socket.timeout):
                    count = self.connection.recv_into(buffer)
                    self.count += count
                    return count
        finally:
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


class Connection(http.client.HTTPConnection):
    """A connection to a client. When an answer was read to its end, it waits in `idle` for the next call."""

    response_class: Any  # see __init__

    def __init__(self, url: str, idle: list[Connection]) -> None:
        self.secure, self.idle, self.bounds = url.startswith("https:"), idle, Bounds(READ_TIMEOUT_S)
        self.default_port = 443 if self.secure else 80
        parts = urlsplit(url)
        super().__init__(parts.hostname or "", parts.port or self.default_port, blocksize=CHUNK_BYTES)
        self.response_class = functools.partial(Reply, connection=self)

    def open(self, look: Callable[[socket.socket], None], ca_file: str, timeout_s: float) -> socket.socket:
        """Connect within `timeout_s`. `look` is called before the first byte is sent, and raises if the connection must not be used.

        `ca_file` has the certificates to trust, in PEM; without it, those that this machine trusts are used.
        """
        self.sock = socket.create_connection((self.host, self.port), timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        look(self.sock)
        if self.secure:
            context = ssl.create_default_context(cafile=ca_file or None)
            context.minimum_version = ssl.TLSVersion.TLSv1_2  # Python 3.9 accepts older versions
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        return self.sock

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


def receive(answer: Reply, into: Transfer) -> None:
    """Copy a response's body to a file. Raises DiskFull before the first byte if its known length does not fit."""
    length = answer.headers.get("Content-Length", "")
    try:
        if re.fullmatch("[0-9]{1,18}", length):
            into.expect(int(length))
        for chunk in iter(lambda: answer.piece(CHUNK_BYTES), b""):
            into.write(chunk)
    finally:
        answer.close()
        if into.promise is not None:
            into.promise.close()


def take_rest(answer: Reply, into: Transfer) -> None:
    """Copy a response's body to its place in a file. Raises NoAnswer if length or digest differ from its headers."""
    begin = f"bytes {into.size}-"
    if answer.status == 200:
        into.begin(answer.headers.get("ETag", ""))
    elif not answer.headers.get("Content-Range", "").startswith(begin):
        answer.close()
        into.begin()
        raise NoAnswer("answered with another part of the result than was requested")
    before = into.size
    receive(answer, into)
    promised = answer.headers.get("Content-Length")
    said = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", answer.headers.get("Repr-Digest", ""))
    if promised is None and said is None and "chunked" not in answer.headers.get("Transfer-Encoding", ""):
        into.begin()
        raise NoAnswer("the transfer broke: its headers are incomplete, without length and digest")
    if promised is not None and promised != str(into.size - before):
        raise NoAnswer(f"the transfer broke: {into.size - before} of {promised} bytes arrived")
    if said and said[1] != base64.b64encode(into.digest.digest()).decode():
        into.begin()
        raise NoAnswer("the transfer broke: what arrived does not match its digest")


class WaiterLimit:
    """Limits how many callers may wait at once, so that uploads never starve."""

    def __init__(self, places: int) -> None:
        self.free = threading.BoundedSemaphore(places)

    @contextlib.contextmanager
    def place(self) -> Iterator[bool]:
        """Take a place for the block. Yields False if all are taken."""
        taken = self.free.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self.free.release()


class Allowance:
    """Allows as many polls as a busy client needs, and slows down a client that always answers at once."""

    burst, per_s = 200.0, 50.0

    def __init__(self) -> None:
        self.left, self.at = self.burst, time.monotonic()

    def take(self, amount: float) -> float:
        """Use a part of the allowance. Return how many seconds to pause if it is overdrawn."""
        now = time.monotonic()
        self.left, self.at = min(self.burst, self.left + (now - self.at) * self.per_s) - amount, now
        return max(0.0, -self.left / self.per_s)


SETTLED_LIMIT = 20_000  # payloads of one client whose results are not confirmed yet
SUPERSEDED_LIMIT = 1000  # superseded attempts of one client that are not killed yet
INLINE_KEPT_BYTES = 2 * MIB  # small results of one client that wait to be stored; further ones are fetched later
RESTLESS_MOVES = 100  # of one job
SMALL_PIECES = 20  # of one transfer that broke before 64 KiB had arrived
CONFIRM_WITHIN_S = SYNC_AFTER_S / 2  # a client need not fsync results that are confirmed by then
DONE_AT_ONCE = 500  # payloads that one poll confirms
CALLS_A_CLIENT, CALLS_IN_ALL = 4, 12  # calls to clients at once on behalf of HTTP callers: to one client, to all


# == 14. News ==  Jobs move on by what clients report. A client is identified by its instance, whatever its URL.


def may_be_asked(link: Link) -> bool:
    """Tell whether `get_tick` may call a client: it has not failed, its back-off is over, or a kill was requested."""
    return not link.outage.failures or link.clock.monotonic() >= min(link.outage.until, link.try_at)


def get_tick(server: Server, link: Link) -> bool:
    """Get the changes at one client, by its protocol."""
    if not may_be_asked(link):
        return False
    link.asked_at = server.clock.monotonic()
    try:
        return link.protocol.get_news(server)
    except Gone:  # it is a 2.2 client: the next tick polls it
        return True
    except (NothingSent, NoAnswer) as error:
        fail_to_hear(server, link, error)
        return False
    finally:
        link.asked_at = float("inf")


def hear(server: Server, link: Link) -> bool:
    """Get the changes at one client by a long poll, and ask again at once. Raises NothingSent, NoAnswer or Gone."""
    if link.relist:
        link.relist, link.since = False, 0
        link.undecided.clear()
    fresh, asked_at = link.since == 0, server.clock.monotonic()
    done = link.confirmed_ids[:DONE_AT_ONCE]
    at_once = fresh or link.listed is not None or not link.answers
    heard = link.events(0 if at_once else poll_wait_s(server, link), done)
    crash_point("hear.answered")
    del link.confirmed_ids[: len(done)]
    link.heard()
    take_in(server, link, heard, fresh, asked_at)
    if fresh:
        for name in ("send", "fetch", "kill"):
            server.wake(f"{name}:{link.name}")  # it is back
    if fresh or link.ended:
        server.dispatch()  # it may have room again
    server.stopping.wait(link.polls.take(1 + heard.size / (64 * KIB)))
    return True


def poll_wait_s(server: Server, link: Link) -> float:
    """Return how long a poll may wait for news: not long after ends that came with submits, which the next poll confirms."""
    if len(link.confirmed_ids) > DONE_AT_ONCE:
        return 0.0
    return min(EVENTS_WAIT_S, CONFIRM_WITHIN_S if server.clock.monotonic() - link.ended_at < EVENTS_WAIT_S else EVENTS_WAIT_S)


def fail_to_hear(server: Server, link: Link, error: Exception) -> None:
    """Pause calls to a client that did not answer. Call it more often if kills are requested there."""
    link.since = 0  # its first answer will list all its payloads
    link.failed(error)
    link.try_at = float("inf")
    if server.store.number(KILLS_COUNT, client=link.name):
        link.try_at = server.clock.monotonic() + TERMINATE_TRY_S
    if link.outage.failures == 1:
        decide_again(server)


def take_in(server: Server, link: Link, heard: EventsReply, fresh: bool, asked_at: float = float("-inf")) -> None:
    """Apply a client's events. After the last page of a first contact, also look for jobs that the client did not list.

    `asked_at` (monotonic) is when the events were requested.
    """
    if link.instance not in ("", heard.instance):
        link.note("has a new database: its list of jobs is requested again", logging.INFO)
        for job in server.store.jobs(AT_CLIENT, client=link.name):
            goes_on_elsewhere(server, link, job)
        link.instance, link.met, link.copy_of, link.since = heard.instance, False, "", 0
        return  # the next tick requests the whole list
    meet(server, link, heard, asked_at)
    link.slots, link.memory, link.load = heard.slots, heard.memory, heard.load
    link.job_slots, link.problem = heard.job_slots, heard.problem
    if fresh:
        link.notes.clear()
        link.listed = set()
    each(heard.payloads, functools.partial(report, server, link))  # if one fails, `since` stays, and the client reports it again
    link.since = max(heard.next, link.since)
    if link.listed is not None and not heard.more:
        listed, link.listed = link.listed, None
        for job in server.store.jobs(AT_CLIENT, client=link.name):
            if job.dest_id and job.id not in listed:  # it should be there: ask about it
                note_end(server, link, EndReport(job.id, {"status": "?"}, 0.0))
        decide_again(server)
    forget_others(server, link)


def meet(server: Server, link: Link, heard: EventsReply, asked_at: float) -> None:
    """Learn which client answers. It may have another URL as well, or run on a copy of another client's data folder.

    A restart changes a client's `start`, too; but two starts that answer in turn are two processes.
    """
    now, news = server.clock.monotonic(), not link.met or link.start != heard.start
    if not link.met:
        link.instance, link.instance_at, link.met = heard.instance, now, True
    if link.start != heard.start:
        link.start, link.start_at, link.copy_of = heard.start, now, ""
    known = [other for other in server.links.values() if other is not link and other.protocol.has_events]
    for other in [other for other in known if other.instance == link.instance]:
        if link.start and other.start and link.start != other.start:
            first, second = sorted((link, other), key=lambda each: each.instance_at)
            if link.start_at <= other.start_at < asked_at and not (first.copy_of or second.copy_of):
                second.copy_of = first.name
                log.error("client %s %s", second.name, second.why_not())
        elif news and not other.copy_of:
            log.warning("clients %s and %s are one client with two URLs: its slots are counted once", other.name, link.name)
        if news and link.client == other.client:
            link.drained = other.drained = link.drained or other.drained


def decide_again(server: Server) -> None:
    """Request the lists of clients with undecided jobs again, now that another client's list is complete or that client is silent."""
    for link in server.links.values():
        if link.undecided:
            link.relist = True


def forget_others(server: Server, link: Link) -> None:
    """Forget notes on jobs that a client no longer has, if there are many."""
    noted: tuple[dict[int, Any], ...] = (link.notes, link.kill_due, link.resend_due)
    if max(len(known) for known in noted) <= EVENTS_PAGE:
        return
    here = {job.id for job in server.store.jobs(AT_CLIENT, client=link.name)}
    with link.lock:
        for known in noted:
            for job_id in known.keys() - here:
                known.pop(job_id, None)


def report(server: Server, link: Link, said: Any) -> None:
    """Move a job on by its client's report of a payload."""
    payload = clean_payload(said)
    if payload is None or not payload["uuid"] or not payload["attempt"] or not payload["id"]:
        link.note(f"reports an invalid payload: {one_line(reprlib.repr(said))}")
        return
    job = server.store.job(JOB_BY_UUID, uuid=payload["uuid"])
    if job is not None and job.client != link.name and job.attempt == payload["attempt"] and job.status in BUSY:
        job = with_its_client(server, link, job, payload)
    if job is None:
        return
    if job.attempt == payload["attempt"] and job.status in BUSY:
        report_of_current(server, link, job, payload)
    else:
        report_of_another(server, link, job, payload)


def report_of_current(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> None:
    """Move a job on by its client's report of the current attempt."""
    status = str(payload["status"])
    if link.listed is not None:
        link.listed.add(job.id)
    if contradicts(server, link, job, status):
        return
    accepted = with_payload_id(server, link, job, payload["id"])
    if accepted is None:
        return
    job = accepted
    waits = payload["reason"] if status in (Status.PREPARED.value, Status.RUNNING.value) else ""
    if waits:
        link.notes[job.id] = waits  # such as its place in a batch system
    else:
        link.notes.pop(job.id, None)
    if status == Status.RUNNING.value and job.status is not Status.RUNNING:
        server.store.move(job, Status.RUNNING, "", started_at=payload.get("started_at") or server.clock.wall())
        crash_point("hear.running")
    elif status == Status.PREPARED.value and job.status is Status.UNKNOWN:
        server.store.move(job, Status.SUBMITTED, Reason.ANSWERS_AGAIN.format(client=link.name))
    elif status not in (Status.PREPARED.value, Status.RUNNING.value):
        note_end(server, link, EndReport(job.id, dict(payload), 0.0, cpus=job.cpus, memory=job.memory or 0))


def report_of_another(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> None:
    """Apply a client's report of an attempt that has ended or was replaced: kill it, or confirm that it need not be kept.

    An attempt that is queued again is ignored: if it is sent to this client, its key finds the payload.
    """
    if payload["status"] not in (Status.PREPARED.value, Status.RUNNING.value):
        if job.status in OVER or payload["attempt"] != job.attempt:
            link.confirm(payload["id"])  # its result is stored here, or useless
    elif payload["attempt"] < job.attempt or (payload["attempt"] == job.attempt and job.status in OVER):
        end_stray(server, link, job, payload)


def with_its_client(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> Job | None:
    """Handle a report of a job's current attempt from another client than its row names. Return the moved job, or None.

    If the client has a new URL, or its old URL is silent, the job moves to the new one. Otherwise both URLs report the same.
    """
    home = server.links.get(job.client or "")
    if link.copy_of or job.status is Status.PROCESSING:
        return None
    if home is None or (home.outage.failures and home.instance in ("", link.instance) and not home.copy_of):
        return take_along(server, link, job)
    if home.instance == link.instance:
        return None  # one client with two URLs, or a copy of it
    if not home.is_heard() or not home.instance or not home.has_told_all():
        link.undecided.add(job.id)
    elif job.dest_id is None:
        return take_along(server, link, job)  # it is not known whether the other client got it
    else:
        claim_for(server, link, home, job, str(payload["id"]))
    return None


def claim_for(server: Server, link: Link, home: Link, job: Job, payload_id: str) -> None:
    """Two clients seem to have this attempt: let `fetch_tick` ask the one in the job's row. `sort_claim` then decides."""
    asked = home.ended.get(job.id)
    if len(server.claims) < SUPERSEDED_LIMIT and (asked is None or asked.payload["status"] == "?"):
        server.claims[job.mark] = (link.name, payload_id)
        with home.lock:
            if asked is not None and not asked.taken:
                del home.ended[job.id]  # so that it is asked at once
        note_end(server, home, EndReport(job.id, {"status": "?"}, 0.0))


def take_along(server: Server, link: Link, job: Job) -> Job | None:
    """Move a job to another URL of its client. Return None if it has moved on meanwhile."""
    if not server.store.take_along(job, link.name):
        return None
    log.info("job %d: its client %s is reached as %s now", job.id, job.client, link.name)
    link.may_have_pinned = link.may_have_pinned or job.dest_id is None
    if job.kill_requested_at is not None:
        server.wake(f"kill:{link.name}")
    return server.store.get(job.id)


def goes_on_elsewhere(server: Server, link: Link, job: Job) -> bool:
    """Move a job to another URL of its client if that URL answers. Return whether it does."""
    others = [other for other in server.names_of(link)[1:] if other.is_heard()]
    if not others or job.status is Status.PROCESSING:
        return False
    take_along(server, others[0], job)
    others[0].relist = True
    return True


def contradicts(server: Server, link: Link, job: Job, status: str) -> bool:
    """Tell whether a client's report would only move a job back and forth and fill its history.

    A payload that has ended does not run again. A job that has moved very often leaves Unknown at most once a minute.
    """
    if status not in (Status.PREPARED.value, Status.RUNNING.value):
        return False
    ended = link.ended.get(job.id)
    if ended is not None and ended.payload["status"] != "?":
        link.note(f"reports job {job.id} as {status} after it had ended")
        return True
    return job.moves > RESTLESS_MOVES and server.store.steady() - job.moved_at < 60


def with_payload_id(server: Server, link: Link, job: Job, payload_id: str) -> Job | None:
    """Store a payload id that a client reports before it answers the submit. Return None if the job has moved on."""
    current: Job | None = job
    while current is not None and current.dest_id is None:
        server.store.move(current, Status.SUBMITTED, Reason.FOUND_THERE.format(client=link.name), dest_id=payload_id)
        current = server.store.get(job.id)  # a sender may have moved it to Unknown meanwhile: try again from there
        if current is None or current.attempt != job.attempt or current.status not in BUSY:
            return None
    return current


def note_end(server: Server, link: Link, found: EndReport) -> None:
    """Note that a payload has ended, for the threads that collect results. If one of them has it, this report waits."""
    link.ended_at = server.clock.monotonic()
    with link.lock:
        if "archive" in found.payload and not has_room_for(found, link.ended):
            del found.payload["archive"]
        earlier = link.ended.get(found.job_id)
        if earlier is not None and earlier.taken:
            earlier.newer = found
        else:
            if earlier is not None and earlier.payload["status"] == found.payload["status"]:
                found.failures, found.due = earlier.failures, earlier.due  # no news: keep its back-off
            found.part = earlier.part if earlier is not None else None  # keep what has arrived of the result
            link.ended[found.job_id] = found
    server.wake(f"fetch:{link.name}")


def has_room_for(found: EndReport, ended: Mapping[int, EndReport]) -> bool:
    """Tell whether a small result may be kept in memory until it is stored. If not, it is fetched later."""
    if len(ended) > EVENTS_PAGE:
        return False
    kept = sum(len(other.payload.get("archive", "")) for other in ended.values() if other.job_id != found.job_id)
    return kept + len(found.payload["archive"]) <= INLINE_KEPT_BYTES


def end_stray(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> None:
    """Kill a payload of an attempt that was replaced, on a client that came back late."""
    superseded = job._replace(dest_id=str(payload["id"]), attempt=int(payload["attempt"]))
    if len(link.superseded_attempts) >= SUPERSEDED_LIMIT and superseded.mark not in link.superseded_attempts:
        return  # the next first contact will list it again
    link.note(f"still runs attempt {payload['attempt']} of job {job.id}, which was replaced: it is killed there")
    link.superseded_attempts[superseded.mark] = superseded
    server.wake(f"kill:{link.name}")


# == 15. Ends ==  Fetches results, carries out requested kills, and starts jobs of lost clients again.


def known_of_end(server: Server, job: Job, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return a client's report of how a payload ended, as changes of its job's row."""
    changes = {name: payload[name] for name in ("exit_code", "signal", "started_at") if payload.get(name) is not None}
    return {**changes, **run_of(server, job, payload)}


def run_of(server: Server, job: Job, payload: Mapping[str, Any]) -> dict[str, float]:
    """Return the run time of a payload by its client's clock, as a change of its job's row; empty if the client does not report it.

    The user is charged for this time, so it is limited to the time since the upload.
    """
    started, ended = payload.get("started_at"), payload.get("ended_at")
    if started is None or ended is None:
        return {}
    return {"run_s": max(0.0, min(ended - started, server.store.steady() - job.arrived_at + CLOCK_TOLERANCE_S))}


def settle_cleaned(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> None:
    """A client has removed an ended payload's files. A failure or kill remains one; for a lost result the job runs again."""
    why = payload.get("reason")
    removed = (Reason.CLIENT_CLEANED if why else Reason.CLIENT_HAS_NOTHING).format(client=link.name, reason=why)
    cause, ended_as = payload.get("cause"), payload.get("ended_as")
    reason = Reason.FAILED_AND_CLEANED.format(reason=payload.get("ended_reason") or Reason.RUN_FAILED, cleaned=removed)
    if cause in (Cause.USER.value, Cause.LIMIT.value):
        to = Status.INVALID if ended_as == Status.INVALID.value else Status.FAILED
        end_busy(server, job, to, reason, cause=cause, **known_of_end(server, job, payload))
    elif cause == Cause.CANCELLED.value and ended_as == Status.KILLED.value:
        end_busy(server, job, Status.KILLED, reason, cause=cause, **known_of_end(server, job, payload))
    else:
        payload_gone(server, job, removed)


def fetch_tick(server: Server, link: Link) -> bool:
    """Collect one job whose payload has ended. Return whether there was one."""
    now = server.clock.monotonic()
    with link.lock:
        waiting = [
            found for found in link.ended.values() if found.due <= now and not found.taken and (link.answers or "archive" in found.payload)
        ]
        if not waiting:
            return False
        # Results that came with the report first: they cost no call. Those that the client is still packing last.
        due = min(waiting, key=lambda found: ("archive" not in found.payload, found.asked))
        due.taken = True
    if len(waiting) > 1:
        server.wake(f"fetch:{link.name}")
    settled, job = False, cast("Job | None", None)
    try:
        with link.protocol.turn():
            job = server.store.get(due.job_id)
            settled = job is None or job.client != link.name or job.status not in BUSY or collect_end(server, link, job, due)
        crash_point("fetch.settled")
    finally:
        give_back(server, link, due, settled)
    if settled:
        current = server.store.get(job.id) if job and link.protocol.has_events else None
        if job and current and current.status in OVER and (current.client, current.dest_id) == (link.name, job.dest_id):
            link.confirm(job.dest_id)
    return True


def give_back(server: Server, link: Link, due: EndReport, settled: bool) -> None:
    """Drop a report that was processed, or keep it for later. A newer report replaces it."""
    with link.lock:
        if due.newer is not None:
            due.newer.part, due.part = due.part, None
            if not settled and due.newer.payload["status"] == due.payload["status"]:  # no news: keep the back-off
                due.newer.failures, due.newer.due = due.failures + 1, server.clock.monotonic() + backoff_s(due.failures + 1)
            link.ended[due.job_id] = due.newer
        elif settled:
            link.ended.pop(due.job_id, None)
        else:
            due.failures, due.taken = due.failures + (not due.pause_s), False
            due.due = server.clock.monotonic() + (due.pause_s or backoff_s(due.failures))
    if settled:
        drop_part(due)
    if due.newer is not None:
        server.wake(f"fetch:{link.name}")


def collect_end(server: Server, link: Link, job: Job, found: EndReport) -> bool:
    """Fetch the files of an ended payload and move its job to its end state. Return False if this must be repeated."""
    found.pause_s = 0.0
    try:
        settle_as_told(server, link, job, found)
    except Gone as error:
        others = [other for other in server.links.values() if other is not link]
        if not all(other.has_told_all() and not (job.id in other.undecided and other.is_heard()) for other in others):
            return False  # another client may have it: one with a new URL
        count_no_more(found)
        sorted_out, current = sort_claim(server, job, is_here=False), server.store.get(job.id)
        if not sorted_out and current is not None and current.client == link.name:
            payload_gone(server, current, str(error))  # else it was moved meanwhile
    except ResultTooLarge as error:  # permanent: it would be as large next time
        drop_part(found)
        count_no_more(found)
        end_busy(server, job, Status.FAILED, str(error), cause=Cause.LIMIT.value, **known_of_end(server, job, found.payload))
    except (NothingSent, NoAnswer) as error:
        if found.part is not None and not found.part.wanted():
            drop_part(found)  # it cannot be resumed
        if not is_being_packed(found, error):
            become_unknown(server, job, Reason.NOT_FETCHED.format(client=link.name, error=error))
        return False
    except OSError as error:
        found.needs = error.needed if isinstance(error, DiskFull) else 0
        drop_part(found)  # after a failed write or fsync the content on disk is unknown, and others need the space
        why = error.strerror if isinstance(error, DiskFull) else os.strerror(error.errno or 0)
        become_unknown(server, job, Reason.NOT_STORED.format(error=why))
        return False
    return True


def settle_as_told(server: Server, link: Link, job: Job, found: EndReport) -> None:
    """Act on the status of an ended payload."""
    if found.payload["status"] == "?":
        found.payload.update(link.status(job))
        sort_claim(server, job, is_here=True)
    status = found.payload["status"]
    if status in (Status.PREPARED.value, Status.RUNNING.value):
        return  # it has not ended; /events will report it
    if status == Status.COMPLETED.value:
        fetch_result(server, link, job, found)
    elif status == Status.CLEANED.value:
        count_no_more(found)
        settle_cleaned(server, link, job, found.payload)
    elif found.payload.get("cause") == Cause.INFRASTRUCTURE.value and attempts_left(job):
        count_no_more(found)
        new_attempt(server, job, found.payload.get("reason") or Reason.CLIENT_FAILED.format(client=link.name))
    else:
        fetch_failure(server, link, job, found)


def sort_claim(server: Server, job: Job, is_here: bool) -> bool:
    """Decide which of two clients has an attempt, by the answer of the one in the job's row.

    Return whether the job moves to the other one. If both have it, it is killed at the other one.
    """
    name, payload_id = server.claims.pop(job.mark, ("", ""))
    other = server.links.get(name)
    if other is None:
        return False
    if is_here:
        end_stray(server, other, job, {"id": payload_id, "attempt": job.attempt})
        return False
    other.relist = True
    return take_along(server, other, job) is not None


def is_being_packed(found: EndReport, error: Exception) -> bool:
    """Tell whether the client is still packing a result; if so, schedule the next request, for about an hour."""
    if not isinstance(error, NotPacked) or found.asked >= PACK_ASKED_MOST:
        return False
    found.asked, found.pause_s = found.asked + 1, min(5.0, 0.5 + 0.5 * found.asked)
    return True


def count_no_more(found: EndReport) -> None:
    """Stop counting an ended payload's slots as free, just before its job's row frees them: no slot must be free twice."""
    found.cpus = found.memory = 0


def fetch_result(server: Server, link: Link, job: Job, found: EndReport) -> None:
    """Store a result: file, digest, fsync, rename; then the row."""
    size, digest = store_archive(server, link, job, found, partial=False)
    count_no_more(found)
    payload = found.payload
    reason = payload.get("reason") or Reason.COMPLETED
    changes = {"exit_code": 0, "started_at": payload.get("started_at") or job.started_at, **run_of(server, job, payload)}
    end_busy(server, job, Status.COMPLETED, reason, result_size=size, result_sha256=digest, **changes)


def inline_archive_of(payload: Mapping[str, Any]) -> bytes:
    """Return the ZIP that came with a payload's end report; empty if there is none, or if its digest is wrong."""
    try:
        data = base64.b64decode(str(payload.get("archive", "")))
    except ValueError:
        return b""
    return data if hashlib.sha256(data).hexdigest() == payload.get("sha256") else b""


def store_archive(server: Server, link: Link, job: Job, found: EndReport, partial: bool) -> tuple[int, str]:
    """Store a payload's ZIP; return its size in bytes and its SHA-256 (hex). Durable on return.

    If the transfer breaks, what has arrived stays with the report for the next try.
    """
    server.data.account.check(found.needs)  # do not fetch what would not fit
    if found.part is None:
        target = tempfile.NamedTemporaryFile(dir=server.data.tmp, buffering=0, delete=False)  # noqa: SIM115
        found.part = result_transfer(server.config, cast("IO[bytes]", target), Promise(server.data.account))
    part = found.part
    data = inline_archive_of(found.payload)
    if data:
        part.begin()
        part.write(data)
    else:
        link.fetch(job, part, partial)
    check_result(server.config, part)
    crash_point("fetch.received")
    os.fsync(part.target.fileno())
    crash_point("fetch.synced")
    os.rename(part.target.name, server.data.result(job.mark))
    crash_point("fetch.renamed")
    fsync_path(server.data.results)
    crash_point("fetch.durable")
    drop_part(found)
    return part.size, part.digest.hexdigest()


def result_transfer(config: Config, target: IO[bytes], promise: Promise | None = None) -> Transfer:
    """Return a Transfer that accepts a result: the largest ZIP within the limits, with output streams, names and headers."""
    largest = config.max_result_bytes * 33 // 32 + 2 * config.log_limit_bytes + config.max_result_files * KIB + MIB
    return Transfer(target, promise, largest, ResultLimits(config.max_result_bytes))


def check_result(config: Config, part: Transfer) -> None:
    """Check the files in a large ZIP against the limits, whatever the client says. Raises ResultTooLarge."""
    limits, streams = ResultLimits(config.max_result_bytes * 33 // 32, config.max_result_files * 3 // 2 + 32), 0
    if part.size <= min(config.max_result_bytes, config.max_result_files * 2 * ZIP_CENTRAL.size):
        return
    with open(part.target.name, "rb") as file:
        try:
            size, count = 0, zip_directory(file)[2]
            for record in zip_records(file):
                if streams < len(OUTPUT_STREAMS) and record.comment.startswith(b"joborch stream "):
                    streams, size = streams + 1, size + max(0, record.packed_bytes - config.log_limit_bytes)
                else:
                    size += record.packed_bytes
        except ValueError:
            size, count = part.size, 0  # it is no ZIP
    if limits.broken_by(size, count):
        told = ResultLimits(config.max_result_bytes, config.max_result_files)
        raise ResultTooLarge(Reason.RESULT_HAS.format(too_much=told.broken_by(size, count)))


def drop_part(found: EndReport) -> None:
    """Drop a transfer: the result is stored, or the data is useless."""
    if found.part is not None:
        found.part.target.close()
        if found.part.promise is not None:
            found.part.promise.close()
        discard(Path(found.part.target.name))
        found.part = None


def fetch_failure(server: Server, link: Link, job: Job, found: EndReport) -> None:
    """Fetch the files of a failed payload, as far as possible, and move its job to its end state."""
    payload, to = found.payload, Status(found.payload["status"])
    size, digest, reason = None, None, payload.get("reason") or Reason.CLIENT_SAYS.format(status=to)
    try:
        size, digest = store_archive(server, link, job, found, partial=True)
    except Gone:
        log.info("job %d: %s no longer has its files; its end counts all the same", job.id, link.name)
    except ResultTooLarge as error:
        reason = Reason.NOT_KEPT.format(reason=reason, error=error)
        drop_part(found)
    count_no_more(found)
    cause = payload.get("cause") or (Cause.CANCELLED.value if to is Status.KILLED else Cause.USER.value)
    changes = known_of_end(server, job, payload)
    end_busy(server, job, to, reason, cause=cause, result_size=size, result_sha256=digest, **changes)


def may_kill(link: Link) -> bool:
    """Tell whether `kill_tick` may have something to do."""
    return link.may_have_kills and not link.held()


def kill_tick(server: Server, link: Link) -> bool:
    """Ask a client to kill jobs and superseded attempts. Its events report when they have ended."""
    now, link.may_have_kills = server.clock.monotonic(), True
    if link.held():
        return False
    for superseded in list(link.superseded_attempts.values()):
        try:
            link.kill(superseded)
        except (NothingSent, NoAnswer) as error:
            link.failed(error)
            return False
        except Gone:
            log.info("job %d: %s no longer has attempt %d", superseded.id, link.name, superseded.attempt)
        link.superseded_attempts.pop(superseded.mark, None)
    jobs = server.store.jobs(KILLS_AT_CLIENT, client=link.name)
    link.may_have_kills = bool(jobs)
    for job_id in set(link.kill_due).difference(job.id for job in jobs):
        link.kill_due.pop(job_id, None)
    for job in jobs:
        if link.kill_due.get(job.id, 0.0) > now:
            continue
        link.kill_due[job.id] = now + 2.0
        try:
            link.kill(job)
            crash_point("kill.asked")
            link.heard()
        except Gone as error:
            payload_gone(server, job, str(error))
        except (NothingSent, NoAnswer) as error:
            link.kill_due.pop(job.id, None)  # due at the next call
            link.failed(error)
            return False
    return False


def watch_tick(server: Server) -> bool:
    """Handle what no event reports: silent clients, unreachable services, attempts that are due."""
    server.store.admit_due()
    busy = server.store.jobs(ALL_BUSY)
    for name in {job.client or "" for job in busy if job.kill_requested_at is not None}.intersection(server.links):
        server.links[name].may_have_kills = True
    each(busy, functools.partial(judge, server))
    running = [job for job in busy if job.status is Status.RUNNING]
    each([job for job in running if job.cpus * (server.store.steady() - job.moved_at) > job.charged], server.store.charge_longer)
    each(server.services.values(), functools.partial(fail_unreachable, server))
    forget_ended(server, {job.id for job in busy})
    return False


def forget_ended(server: Server, busy: Collection[int]) -> None:
    """Drop the links' notes on jobs that are no longer at a client."""
    for link in server.links.values():
        tables: tuple[dict[int, Any], ...] = (link.notes, link.resend_due)
        for job_id in {job_id for table in tables for job_id in list(table)}.difference(busy):
            job = server.store.get(job_id)  # it may have gone there since the list was read
            if job is None or job.status not in BUSY:
                for table in tables:
                    table.pop(job_id, None)


def judge(server: Server, job: Job) -> None:
    """Decide what happens to a job whose client is silent, by the length of the silence."""
    link = server.links.get(job.client or "")
    if link is None:
        since_start_s = server.clock.monotonic() - server.started
        if since_start_s > SILENT_AFTER_S:  # its client may be configured under another name
            judge_silence(server, job, Reason.NOT_CONFIGURED.format(client=job.client), since_start_s)
    elif job.status is Status.PROCESSING and job.id not in link.sending:
        sort_out(server, link, job)
    elif link.outage.failures and goes_on_elsewhere(server, link, job):
        return
    elif link.outage.failures and link.silent_s() > SILENT_AFTER_S:
        trouble = Reason.NOT_SENT.format(client=link.name, error=link.outage.reason)
        judge_silence(server, job, trouble, 0.0 if link.outdated else link.silent_s())


def sort_out(server: Server, link: Link, job: Job) -> None:
    """Continue with a job that was sent while the database could not be written."""
    dest_id, has_ended = link.accepted.pop(job.mark, ("", False))
    if dest_id:
        store_accepted(server, link, job, dest_id)
        if has_ended:
            ask_for_end(server, link, job)
        return
    server.store.move(job, Status.UNKNOWN, Reason.ANSWER_NOT_STORED)
    link.may_have_pinned = True
    server.wake(f"send:{link.name}")


def judge_silence(server: Server, job: Job, trouble: str, silent_s: float) -> None:
    """Make a silent client's job Unknown. After LOST_AFTER queue a new attempt, or fail the job."""
    if silent_s <= server.service(job).lost_after_s:
        if job.status in (Status.SUBMITTED, Status.RUNNING):
            become_unknown(server, job, trouble)
        return
    if job.status is Status.PROCESSING:
        server.store.move(job, Status.UNKNOWN, trouble)
        job = server.store.get(job.id) or job
    text = Reason.SILENT if job.kill_requested_at is None else Reason.SILENT_AND_KILLED
    new_attempt(server, job, text.format(trouble=trouble, duration=format_duration(silent_s)))


def fail_unreachable(server: Server, service: Service) -> None:
    """Fail the queued jobs of a service if none of its clients answered for UNREACHABLE_AFTER."""
    links = server.links_of(service)
    if any(not link.outage.failures or link.outdated or link.silent_s() <= service.unreachable_after_s for link in links):
        return
    before = server.store.steady() - service.unreachable_after_s
    for job in server.store.jobs(QUEUED_OF_SERVICE, service=service.name, before=before):
        reason = Reason.UNREACHABLE.format(service=service.name, duration=format_duration(service.unreachable_after_s))
        server.store.move(job, Status.FAILED, reason, cause=Cause.INFRASTRUCTURE.value)


def is_silent(link: Link) -> bool:
    """Tell whether a client has never answered or failed at least twice in a row, so that calls to it may hang."""
    return link.heard_at is None or link.outage.failures > 1


def make_server_loops(server: Server) -> dict[str, Loop]:
    """Return the loops of a server, by name: four for each client (get, send, fetch, kill), and dispatch, watch and clean.

    All silent clients share one small pool of threads, so they never delay other clients.
    """
    config, loops = server.config, cast("dict[str, Loop]", {})

    def add(name: str, tick: Callable[..., bool], period_s: float, link: Link | None = None, **options: Any) -> None:
        def pool() -> Pool:
            return server.silent_pool if link is not None and is_silent(link) else server.pool

        full_name, arguments = (f"{name}:{link.name}", (server, link)) if link else (name, (server,))
        loops[full_name] = Loop(full_name, functools.partial(tick, *arguments), pool, period_s, **options)

    for link in server.links.values():
        add("get", get_tick, config.get_interval_s, link, wanted=functools.partial(may_be_asked, link))
        add("send", send_tick, config.send_interval_s, link, most_runs=SENDERS_PER_CLIENT, wanted=functools.partial(may_send, link))
        add("fetch", fetch_tick, config.get_interval_s, link, most_runs=3, wanted=functools.partial(bool, link.ended))
        add("kill", kill_tick, config.get_interval_s, link, wanted=functools.partial(may_kill, link))
    add("dispatch", dispatch_tick, config.send_interval_s)
    add("watch", watch_tick, 1.0)
    add("clean", clean_tick, config.clean_interval_s)
    return loops


# == 16. Waiting ==  Why a job waits, its place in the queue, and when it may start.


class QueueInfo(NamedTuple):
    """What a job waits for, its place in the queue (1 is next), and the expected wait in seconds; None if unknown."""

    waiting_for: str | None = None
    position: int | None = None
    wait_s: float | None = None


NEXT = QueueInfo("it is sent to a client now", 1)  # of a job that was claimed as soon as it was stored


def queue_info_of(server: Server, job: Job) -> QueueInfo:
    """Return the QueueInfo of a job; all None if it does not wait."""
    if job.status is not Status.QUEUED:
        return QueueInfo(waiting_on_client(server, job))
    service = server.services.get(job.service or "")
    if service is None:
        return QueueInfo(f"service {job.service} is no longer configured")
    if job.blocked:
        return QueueInfo(follows_text(server, job))
    if job.not_before is not None:
        left = max(0.0, job.not_before - server.store.steady())
        return QueueInfo(f"attempt {job.attempt} starts in {format_duration(left)}: {job.reason}")
    facts = queue_facts_of(server, job, service)
    places = server.capacities_of(one_each(link for link in server.links_of(service) if link.takes_jobs()).values())
    text = why_waiting(service.name, facts, server.troubles(service), places)
    position = position_of(server, job, service, facts)
    run_s, slots = mean_run_s(server, service), sum(place.slots for place in places if place.could_run(job.cpus, job.memory))
    if position is None or run_s is None or not slots or any(place.queues for place in places):
        return QueueInfo(text, position)
    return QueueInfo(text, position, wait_estimate_s(position, facts, slots, run_s))


def waiting_on_client(server: Server, job: Job) -> str | None:
    """Return what a job at a client waits for, or None."""
    link = server.links.get(job.client or "")
    if job.status is Status.UNKNOWN:
        return job.reason
    if job.status in BUSY and link and link.outage.reason:
        return f"{link.name} {link.outage.reason}"
    return link.notes.get(job.id) if link and job.status in BUSY else None


def follows_text(server: Server, job: Job) -> str:
    """Say which jobs a job must wait for: the id of the first, and how many others."""
    open_jobs = [found for found in map(server.store.get, ids_in(job.after_ids)) if found is not None and found.status not in OVER]
    if not open_jobs:
        return "the jobs that it follows have just ended"
    first = f"it follows job {open_jobs[0].id}, which is {open_jobs[0].status}"
    more = plural(len(open_jobs) - 1, "other job", "other jobs")
    return f"{first}, and {more}" if more else first


def queue_facts_of(server: Server, job: Job, service: Service) -> QueueFacts:
    """Return the figures that decide when a queued job runs."""
    store, name = server.store, service.name
    share = store.share(*job.pair)
    before = store.number(QUEUED_BEFORE, service=name, user_id=job.user_id, priority=job.priority, id=job.id)
    others = 0 if share.turn is None else store.turns_before(name, share.turn)
    busy = store.line(name).busy
    return QueueFacts(len(share.runs), service.runs_per_user, busy, service.max_runs, before, others, job.cpus, job.memory)


def position_of(server: Server, job: Job, service: Service, facts: QueueFacts) -> int | None:
    """Return a job's place in its service's queue, 1 being next; None beyond 10,000.

    With fifo and priority the place is exact. With share it is an estimate, which assumes that every waiting user has a job for
    each turn; it is never above the number of queued jobs.
    """
    if service.policy == "share":
        before = facts.users_before
        if facts.queued_before:
            before += facts.queued_before * server.store.users_queued(service.name)
            before = min(before, server.store.number(QUEUED_IN_SERVICE, service=service.name) - 1)
    else:
        point_s = server.config.ageing_s if service.policy == "priority" else 0.0
        before = 0
        for row in server.store.read(QUEUED_PRIORITIES, service=service.name):
            earlier = job.arrived_at + (row["priority"] - job.priority) * point_s
            before += server.store.number(QUEUED_EARLIER, service=service.name, priority=row["priority"], before=earlier)
    return max(0, before) + 1 if before < 9_999 else None


# -- at a client --


@dataclass
class Held(Backoff):
    """A payload that waits at the client: the executor refused it, or has not been asked yet."""

    tried_at: float = float("-inf")  # monotonic
    passed: bool = False  # others were accepted after it was refused: the problem is this payload


class Holds:
    """Decides which payloads the executor gets now: in each service the longest waiting first. No service waits for another."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.by_service: dict[str, Backoff] = {}  # "" for all
        self.held: dict[int, Held] = {}  # by payload id: Running by their row, but certainly not at the executor

    def of(self, key: str) -> Backoff | None:
        hold = self.by_service.get(key)
        return hold if hold and hold.waits() else None

    def of_all(self) -> Backoff | None:
        """Return what keeps every payload from being started now, or None."""
        return self.of("")

    def reasons(self, for_all: bool) -> list[str]:
        """Return why payloads wait. With `for_all` only reasons that affect every service, else also those of services and payloads."""
        held = [hold.reason for key, hold in list(self.by_service.items()) if self.of(key) and not (for_all and key)]
        return held if for_all else held + [one.reason for one in list(self.held.values()) if one.reason]

    def reason_of(self, job: Job) -> str:
        away, hold = self.of_all(), self.of(job.service or "-")
        return away.reason if away else self.held[job.id].reason or (hold.reason if hold else "")

    def hold(self, key: str, reason: str) -> None:
        """Pause starts of one service, or of all if `key` is empty; longer after each failure in a row."""
        if key and self.of(key):
            return  # an extra try because others arrived must not prolong the pause
        if self.by_service.setdefault(key, Backoff(self.clock)).failed(reason):
            log.warning("no payload%s is started: %s", f" of {key}" if key else "", reason)

    def put_off(self, job: Job, reason: str) -> None:
        """Note that the executor refused a payload. It is tried again, with growing pauses."""
        held = self.held.setdefault(job.id, Held(self.clock))
        if held.failed(reason):
            log.warning("payload %d is not accepted: %s", job.id, reason)
        held.tried_at = self.clock.monotonic()

    def taken(self, job: Job) -> None:
        self.by_service.pop("", None)
        self.by_service.pop(job.service or "-", None)
        self.held.pop(job.id, None)

    def due(self, waiting: Sequence[Job]) -> list[Job]:
        """Return those of the waiting payloads, given in the order of their arrival, that may be tried now."""
        services = dict.fromkeys(job.service for job in waiting)
        if self.of_all():
            return []
        return [job for service in services for job in self.due_of([job for job in waiting if job.service == service])]

    def due_of(self, waiting: Sequence[Job]) -> list[Job]:
        """Return the payloads of one service that may be tried now: all of them as soon as the first one may be.

        A payload that was refused while others were accepted waits separately.
        """
        together = [job for job in waiting if not self.held[job.id].passed]
        alone = [job for job in waiting if self.held[job.id].passed and not self.held[job.id].waits()][:1]
        first = self.held[together[0].id] if together else Held(self.clock)
        others_came = any(not self.held[job.id].failures for job in together)
        early = self.clock.monotonic() < first.tried_at + TRY_AGAIN_S or (not others_came and first.waits())
        held = not others_came and self.of(waiting[0].service or "-")
        return alone if first.failures and (early or held) else together + alone

    def start(self, due: Sequence[Job], start: Callable[[Job], bool]) -> None:
        for service in dict.fromkeys(job.service for job in due):
            self.start_in_turn([job for job in due if job.service == service], start)

    def start_in_turn(self, due: Sequence[Job], start: Callable[[Job], bool]) -> None:
        """Start one service's payloads in order. If one is refused, try the one that has not been tried for the longest time.

        If that one is accepted, the problem is the first payload. If not, the service is paused.
        """
        waiting, refused = list(due), cast("list[Held]", [])
        while waiting and len(refused) < 2 and not self.of_all():
            job = min(waiting, key=lambda job: (self.held[job.id].tried_at, job.id)) if refused else waiting[0]
            waiting.remove(job)
            held = self.held[job.id]
            before = held.failures
            if start(job):
                for other in refused:
                    other.passed = True
                refused.clear()
            elif held.failures > before and not held.passed:
                refused.append(held)
        if len(refused) == 2:
            self.hold(due[0].service or "-", refused[1].reason)


# == 17. Client routes ==  The HTTP contract of the client, and the routes of both modes.


def payload_json(client: Client, job: Job) -> dict[str, Any]:
    """Return a payload as a 2.2 client shows it: always six fields."""
    first = (with_handle(client, job).handle or "").partition(" ")[0]
    pid = int(first) if job.status is Status.RUNNING and re.fullmatch(r"[0-9]{1,18}", first) else 0  # PBS says 4711.host
    killed = job.kill_requested_at is not None and job.kill_cause == Cause.CANCELLED.value
    return {"id": job.id, "input": {}, "status": shown_status(job).value, "loc": str(client.folder(job)), "pid": pid, "killed": killed}


def event_json(client: Client, job: Job) -> dict[str, Any]:
    """Return a payload as /events reports it to a joborch server."""
    said = {name: getattr(job, name) for name in EXAMPLE_EVENT}
    said["status"] = shown_status(job).value
    if job.status is Status.RUNNING:
        said["reason"] = client.notes.get(job.id, "")
    if job.status is Status.CLEANED:  # `reason` says now why it was cleaned
        for row in client.store.read(HISTORY_GET, id=job.id):
            if row["target"] in ENDED:
                said.update(ended_as=row["target"], ended_reason=row["reason"])
    return said


def known_payload(client: Client, request: Request, job_id: int) -> Job:
    """Return a payload. Raises HttpError 404, also if the caller means another attempt by this id."""
    job = known_job(client, request, job_id)
    meant = request.header("X-Joborch-Mark")
    if meant and meant != job.mark:
        raise HttpError(404, f"payload {job.id} belongs to another job: this client has a new database")
    return job


PAYLOAD_ID = ID._replace(help="the id of a payload", example=1)
MARK = Parameter(
    "X-Joborch-Mark",
    "header",
    "string",
    "uuid and attempt of the payload; 404 if the id belongs to another",
    "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0.1",
)


def read_uuid(text: str) -> str:
    """Return a UUID in lower case."""
    if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text.lower()):
        raise ValueError("give a UUID")
    return text.lower()


def read_limit(text: str) -> float:
    """Return the run time limit that a server sends, in seconds."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise ValueError("give seconds")
    return float(text)


def header(name: str, kind: str, meaning: str, example: Any, **more: Any) -> Parameter:
    """Declare a header of /submit."""
    return Parameter(f"X-Joborch-{name}", "header", kind, meaning, example, **more)


SUBMIT_HEADERS = (
    header("Job", "string", "the job's id at its server", "42", read=lambda text: one_line(text, 40)),
    header("Uuid", "string", "with the attempt, the key: a repeat returns the first payload", MARK.example[:36], read=read_uuid),
    header("Attempt", "integer", "number of the attempt", 1, least=1, most=1_000_000, default=1),
    header(
        "Service", "string", "the service, percent-encoded", "example",
        read=lambda text: one_line(unquote_to_bytes(text).decode("utf-8", "replace"), 200) or None,
    ),
    header("User", "integer", "the user", 1, least=SMALLEST, most=BIGGEST),
    header("Cpus", "integer", "cores it needs", 1, least=1, most=1_000_000, default=1),
    header("Memory", "integer", "memory it needs, in MiB", 2048, least=1, most=2**31),
    header("Timeout", "number", "run time limit in seconds", 3600, least=0, read=read_limit),
    header("Inputs", "string", "the digest of all files, computed at the upload", "9f86d0..."),
    header("Digests", "string", "1: the digests follow the files; if they are missing, the transfer broke", "1"),
    header("Return-Inputs", "string", "0: the result omits inputs that the script left unchanged", "0"),
    header(
        "Wait", "integer", "milliseconds to wait for the end of a payload that starts at once: the answer then has it as `end`", 100,
        least=0, most=1000, default=0,
    ),
)  # fmt: skip


def submit_headers(request: Request) -> dict[str, Any]:
    """Return the values of the headers that a joborch server sends and a 2.2 server does not; HttpError 400."""
    return read_all(SUBMIT_HEADERS, {each.name: request.header(each.name) for each in SUBMIT_HEADERS})


def new_payload(said: Mapping[str, Any]) -> NewJob:
    """Return the row for a payload, from the headers of its submit."""
    return NewJob(
        uuid=said["X-Joborch-Uuid"] or new_uuid(),
        user_id=said["X-Joborch-User"],
        service=said["X-Joborch-Service"],
        cpus=said["X-Joborch-Cpus"],
        memory=said["X-Joborch-Memory"],
        timeout=said["X-Joborch-Timeout"],
        return_inputs=0 if said["X-Joborch-Return-Inputs"] == "0" else 1,
        attempt=said["X-Joborch-Attempt"],
        remote_id=said["X-Joborch-Job"],
    )


PAYLOAD_FILE = Parameter("file", "form", "file", "the part's `name` is the relative path, its `filename` the base name", required=True)
TAKEN = "the payload is accepted; `end` is what /events says of one that has ended within X-Joborch-Wait, with `archive` and `sha256`"
SUBMIT_GIVES = {200: Gives(TAKEN, JSON_TYPE, EXAMPLE_PAYLOAD), 400: BAD, **RECEIVING}


@route("POST", "/submit", "client", who="caller", slow=True, takes=(PAYLOAD_FILE, *SUBMIT_HEADERS), gives=SUBMIT_GIVES)
def submit(client: Client, request: Request) -> Answer:
    """Accept the files of one payload; it runs as soon as a slot is free. With X-Joborch-Wait, the answer may have its end."""
    said = submit_headers(request)
    new, wait_s = new_payload(said), said["X-Joborch-Wait"] / 1000
    mark = f"{new.uuid}.{new.attempt}"
    job = client.store.job(JOB_BY_MARK, uuid=new.uuid, attempt=new.attempt)
    if job is not None:
        tell_in_events(client, job.id)  # the answer that had its end was lost
        return Answer(payload_json(client, job))
    problem = problem_of(client, for_all=True)
    if problem:  # another client may be able to run it
        raise HttpError(503, problem, Retry_After="10")
    folder = client.data.tmp / f"submit-{secrets.token_hex(8)}"
    with receiving(client, folder, mark):
        (folder / "work").mkdir()
        form = received_form(request, folder / "work")
        if not new.return_inputs:
            remember_inputs(folder, form)
        crash_point("submit.received")
        client.store.check_identity()
        job, is_marked = place_payload(client, folder, new, is_quiet=wait_s > 0)
    crash_point("submit.stored")
    if not is_marked:
        client.wake("run")
        return Answer(payload_json(client, job))
    start_placed(client, job, wait_s)
    current = known_job(client, request, job.id)
    end = told_end(client, current) if wait_s else {}
    crash_point("submit.ended")
    return Answer({**payload_json(client, current), **end})


def told_end(client: Client, job: Job) -> dict[str, Any]:
    """Return what the answer to a submit says of a payload's end: what /events would say, with its archive.

    It is empty if the payload has not ended by itself, or left too much: then /events tells it.
    """
    ended_by_itself = job.status is Status.COMPLETED or (job.status is Status.FAILED and job.cause == Cause.USER.value)
    archive = inline_archive(client, job) if ended_by_itself and job.id in client.store.core.quiet else {}
    if archive:
        return {"end": {**event_json(client, job), **archive}}
    tell_in_events(client, job.id)
    return {}


def tell_in_events(client: Client, job_id: int) -> None:
    """Let /events report a payload that it left to the answer of its submit."""
    if job_id in client.store.core.quiet:
        client.store.core.quiet.discard(job_id)
        client.store.tell(job_id)


def received_form(request: Request, work: Path) -> Form:
    """Receive a payload's files. Raises HttpError 400 if they are invalid; 503 for a joborch server, because then the transfer broke."""
    ours = bool(request.header("X-Joborch-Digests"))
    try:
        form = request.read_form(work, by_name=True)
        check_digests(form, ours)
        meant = request.header("X-Joborch-Inputs").lower()  # proven if the server is
        if meant and meant != inputs_digest({file.path: file.sha256 for file in form.files}):
            raise HttpError(503, "the transfer broke: the files that arrived are not those of the job", Retry_After="1")
        if not form.files:
            raise HttpError(400, "there is no file: send at least run.sh", "file")
    except HttpError as refusal:
        if ours and refusal.status == 400:
            raise HttpError(503, f"the transfer broke: {refusal.message}", Retry_After="1") from refusal
        raise
    return form


def check_digests(form: Form, wanted: bool) -> None:
    """Compare the files with the digests that a joborch server sent after them. HttpError 503 makes it send them again."""
    sent = form.fields.pop(DIGESTS_FIELD, None)
    if sent is None and wanted:
        raise HttpError(503, "the transfer broke: the digests did not arrive", Retry_After="1")
    try:
        digests = parse_json(sent) if sent is not None else {file.path: file.sha256 for file in form.files}
    except ValueError as error:
        raise HttpError(400, "the digests cannot be read") from error
    if digests != {file.path: file.sha256 for file in form.files}:
        raise HttpError(503, "the transfer broke: what arrived does not match its digests", Retry_After="1")


def remember_inputs(folder: Path, form: Form) -> None:
    """Note size and mtime of each input, so that the result can omit those that the script leaves unchanged."""
    states = {file.path: os.stat(folder / "work" / file.path) for file in form.files}
    lines = [json.dumps([path, state.st_size, state.st_mtime_ns]) + "\n" for path, state in states.items()]
    (folder / "inputs.json").write_text("".join(lines), encoding="utf-8")


def place_payload(client: Client, folder: Path, new: NewJob, is_quiet: bool) -> tuple[Job, bool]:
    """Move received files to their place, then store the row. If one attempt arrives twice, both calls get the same payload.

    Returns the payload, and whether the caller must start it: see `add_payload`.
    """
    place = client.data.job(f"{new.uuid}.{new.attempt}")
    with client.placing:  # files and row together
        job = client.store.job(JOB_BY_MARK, uuid=new.uuid, attempt=new.attempt)
        if job is not None:
            discard(folder)
            return job, False
        discard(place)  # without a row, a crash left it: it never ran
        os.rename(folder, place)
        crash_point("submit.renamed")
        try:
            return add_payload(client, new, is_quiet)
        except BaseException:
            discard(place)
            raise


def asked_archive(client: Client, request: Request, job: Job) -> Archive:
    """Return a payload's archive. A joborch server waits only briefly: it fetches other results and asks again."""
    return packed_result(client, job, PACK_GLANCE_S if request.header("X-Joborch-Mark") else PACK_PATIENCE_S, request.left)


PACKING = Gives(
    "the archive is not packed yet; Retry-After says when to ask again", JSON_TYPE, {"message": "the result is being packed: try again"}
)
RETRIEVED = Gives("completed: the result as application/zip; else the payload with its status", JSON_TYPE, EXAMPLE_PAYLOAD)


@route(
    "GET",
    "/retrieve/<job_id>",
    "client",
    who="caller",
    slow=True,
    takes=(PAYLOAD_ID, MARK),
    gives={200: RETRIEVED, 400: BAD, 404: NOT_FOUND, 503: PACKING, **PARTS},
)
def retrieve(client: Client, request: Request, job_id: int) -> Answer:
    """Fetch the result of a payload, or its state."""
    job = known_payload(client, request, job_id)
    if job.status is Status.COMPLETED and (job.id, True) not in client.packings and not has_work(client.folder(job)):
        client.store.move(job, Status.CLEANED, Reason.WORK_REMOVED)
        job = known_payload(client, request, job_id)
    if job.status is not Status.COMPLETED:
        ours = event_json(client, job) if request.header("X-Joborch-Mark") else {}
        return Answer({**payload_json(client, job), **ours})
    return send_archive(client, request, job, f"payload-{job.id}.zip")


def send_archive(client: Client, request: Request, job: Job, filename: str) -> Answer:
    """Answer with a payload's archive, and note that it was fetched if the caller cannot confirm it."""
    archive = asked_archive(client, request, job)
    if job.status in ENDED and not request.header("X-Joborch-Mark"):  # a joborch server confirms it in /events, a 2.2 server cannot
        client.store.note(JOB_FETCHED, id=job.id, now=client.clock.wall())
    return file_answer(request, archive, filename, {})


WORK_FOLDER = Gives("the work folder now, with the output streams", ZIP_TYPE)


@route(
    "GET",
    "/retrieve_partial/<job_id>",
    "client",
    who="caller",
    slow=True,
    takes=(PAYLOAD_ID, MARK),
    gives={200: WORK_FOLDER, 400: BAD, 404: NOT_FOUND, 503: PACKING, **PARTS},
)
def retrieve_partial(client: Client, request: Request, job_id: int) -> Answer:
    """Fetch the current work folder of a payload."""
    job = known_payload(client, request, job_id)
    if job.status is Status.CLEANED:
        raise HttpError(404, f"the files of payload {job.id} were cleaned")
    return send_archive(client, request, job, f"payload-{job.id}-partial.zip")


KILL_GIVES = {
    200: Gives("none of its processes runs", JSON_TYPE, {**EXAMPLE_PAYLOAD, "status": "Killed", "killed": True}),
    202: Gives("it is being stopped", JSON_TYPE, {**EXAMPLE_PAYLOAD, "status": "Running", "killed": True}),
    400: BAD,
    404: NOT_FOUND,
}


@route("POST", "/kill/<job_id>", "client", who="caller", takes=(PAYLOAD_ID, MARK), gives=KILL_GIVES)
def kill(client: Client, request: Request, job_id: int) -> Answer:
    """Stop a payload and everything it started. A joborch server gets its answer at once and the end by /events."""
    job = known_payload(client, request, job_id)
    if job.status not in OVER:
        client.store.request_kill(job.id, Cause.CANCELLED)
        crash_point("kill.wished")
        client.wake("end")
        if not request.header("X-Joborch-Mark"):
            wait_until_over(client, request, job)
        job = known_payload(client, request, job_id)
    return Answer(payload_json(client, job), 200 if job.status in OVER else 202)


def wait_until_over(client: Client, request: Request, job: Job) -> None:
    """Wait until a payload has ended, or a batch system has accepted the request to stop it, which may take long."""

    def noted() -> bool:
        return request.left() or (client.executor.is_batch and job.id in client.stubborn)

    with client.places.place() as parked:
        client.wait_until(lambda: over(client, job.id), WAIT_LIMIT_S if parked else 0.0, noted, job.id)


def over(node: Node, job_id: int) -> Job | None:
    """Return the job if it is over, else None."""
    job = node.store.get(job_id)
    return job if job is None or job.status in OVER else None


EVENTS_TAKES = (
    Parameter(
        "since",
        "query",
        "integer",
        "the `next` of your last answer; 0 requests all payloads whose results were not fetched",
        0,
        least=0,
        most=BIGGEST,
        default=0,
    ),
    Parameter("instance", "query", "string", "the `instance` of your last answer", "a1b2c3", default=""),
    WAIT._replace(help="wait for a change, for at most this many seconds", example=10),
    Parameter(
        "more",
        "query",
        "string",
        "1: continue the list that since=0 began, if its last page said `more`",
        "1",
        choices=("0", "1"),
        default="0",
    ),
    Parameter("done", "query", "string", "ids of payloads whose results you have: the client may delete them", "1,2", default=""),
)
EXAMPLE_EVENT = {
    "id": 1, "uuid": MARK.example[:36], "attempt": 1, "status": "Completed", "reason": "run.sh ended with exit status 0", "cause": None,
    "exit_code": 0, "signal": None, "started_at": 1795510800.0, "ended_at": 1795510803.5,
}  # fmt: skip
EXAMPLE_ROOM = {"slots": 2, "job_slots": False, "memory": 16000}
EXAMPLE_EVENTS = {
    "instance": "a1b2c3", "start": "5f0c3b9c8f1e4d2a", "next": 7, "more": False, "load": 12.5, **EXAMPLE_ROOM, "problem": None,
    "payloads": [EXAMPLE_EVENT],
}  # fmt: skip
CHANGED = Gives("payloads that changed, one page; if `more` is true, request the next page", JSON_TYPE, EXAMPLE_EVENTS)
TOO_MANY = Gives("too many wait", JSON_TYPE, {"message": "too many callers wait here: try again"})


UNPROVEN = Gives(
    "the caller is not a server that proves its identity",
    JSON_TYPE,
    {"message": "the token is wrong, or the request was changed on its way"},
)
OLD_SERVER = Gives(
    "a server of joborch 0.1.0, which cannot prove its identity",
    JSON_TYPE,
    {"message": "this server cannot prove its identity: replace the server's joborch.pyz by version 0.2.0; its jobs wait"},
)


@route(
    "GET",
    "/events",
    "client",
    who="server",
    takes=EVENTS_TAKES,
    gives={200: CHANGED, 400: BAD, 401: UNPROVEN, 426: OLD_SERVER, 503: TOO_MANY},
)
def events(client: Client, request: Request, since: int, instance: str, wait: float, more: str, done: str) -> Answer:
    """Wait for changes of payloads: one long poll serves all of a server's jobs here."""
    if instance == client.instance:
        confirm(client, done)
    elif instance:  # the server knew another instance: send it the whole list, at once
        since, wait = 0, 0.0
    news = News(client, since)
    if since == 0 or more == "1":
        last = client.store.number(CHANGED_LAST)  # before the list: a change in between is reported twice, but never lost
        found = client.store.jobs(CHANGED_ALL, since=since)
        client.store.core.quiet.difference_update(job.id for job in found if job.status in ENDED)
        inline = 0
    else:
        with client.places.place() as parked:
            if not parked and wait:
                raise HttpError(503, "too many callers wait here: try again", Retry_After="1")
            found = client.wait_until(lambda: news.look() or None, wait, request.left) or []
            if found and wait:
                client.wait_until(
                    lambda: any(job.status not in (Status.PREPARED, Status.RUNNING) for job in news.look()) or None,
                    EVENTS_SETTLE_S,
                    request.left,
                )
                found = news.look()
        last, inline = since if found else news.since, INLINE_PAYLOADS
    jobs, payloads = events_page(client, found, inline)
    is_more, told = len(jobs) < len(found), max((job.changed or 0 for job in jobs), default=since)
    said = {"instance": client.instance, "start": client.start_id, "next": told if is_more else max(told, last), "more": is_more}
    problem = problem_of(client, for_all=True)[:1000] or None
    return Answer({**said, "load": client.cpu_load(), **room_json(client), "problem": problem, "payloads": payloads})


class News:
    """The payloads that changed since a caller last asked, without those whose ends the answers to their submits tell."""

    def __init__(self, client: Client, since: int) -> None:
        self.client, self.since = client, since

    def look(self) -> list[Job]:
        """Return the changed payloads, the earliest change first, without quiet ones; quiet ones at the start are not read again."""
        found, quiet = self.client.store.jobs(CHANGED_SINCE, since=self.since), self.client.store.core.quiet
        kept = [job for job in found if job.id not in quiet]
        for job in found:
            if job.id not in quiet:
                break
            self.since = job.changed or self.since
        return kept


def events_page(client: Client, jobs: Sequence[Job], inline: int) -> tuple[list[Job], list[dict[str, Any]]]:
    """Return the payloads that fit on a page, and their JSON; the first `inline` of them include small results."""
    told, payloads, room = list[Job](), list[dict[str, Any]](), EVENTS_PAGE_BYTES
    for job in jobs[:EVENTS_PAGE]:
        said = event_json(client, job)
        if inline and job.status in ENDED and job.fetched_at is None:
            said.update(inline_archive(client, job))
            inline -= 1
        room -= 1000 + 12 * len(said["reason"] or "") + len(said.get("archive", ""))  # a character takes at most 12 bytes
        if room < 0 and told:
            break
        told.append(job)
        payloads.append(said)
    return told, payloads


def room_json(client: Client) -> dict[str, Any]:
    """Return a client's capacity: cores and memory (MiB), or for a batch system the number of jobs."""
    if client.executor.is_batch:
        return {"slots": client.config.slots, "job_slots": True, "memory": None}
    return {"slots": client.config.slots, "job_slots": False, "memory": client.config.memory_bytes // MIB}


def confirm(client: Client, done: str) -> None:
    """Note that a server has the results of these payloads, by ids separated by commas."""
    ids = [int(text) for text in done.split(",") if re.fullmatch(r"[0-9]{1,18}", text)]
    if ids:
        now = client.clock.wall()
        client.store.write(lambda db: [db.execute(JOB_CONFIRMED, {"id": job_id, "now": now}).rowcount for job_id in ids], durable=False)
        crash_point("events.confirmed")
        client.store.core.quiet.difference_update(ids)
        drop_packings(client, ids)


EXAMPLE_HELLO = {"version": "0.2.0", "nonce": "5f0c3b9c8f1e4d2a9b7c6d5e4f3a2b1c", "proof": True}


@route("GET", "/hello", "client", who="anyone", gives={200: Gives("how a server proves its identity here", JSON_TYPE, EXAMPLE_HELLO)})
def hello(client: Client, request: Request) -> Answer:
    """Return the nonce of this start. With it, server and client prove that they have the same token."""
    return Answer({"version": __version__, "nonce": client.proofs.nonce, "proof": bool(client.tokens)})


@route("GET", "/load", "client", who="anyone", gives={200: Gives("CPU use in percent: a bare number", JSON_TYPE, 12.5)})
def load(client: Client, request: Request) -> Answer:
    """Return the CPU use of this machine."""
    return Answer(client.cpu_load())


# -- both --


HEALTHY = Gives("all is well", JSON_TYPE, EXAMPLE_HEALTH)
UNHEALTHY = Gives("the database cannot be read and written", JSON_TYPE, {"status": "error", "database": "error"})


def counts_json(client: Client) -> dict[str, int]:
    """Return how many payloads run, are queued here, and wait in the queue of a batch system."""
    handed, queued = (client.store.number(COUNT_IN, status=status.value) for status in (Status.RUNNING, Status.PREPARED))
    waiting = 0
    if client.executor.is_batch:
        waiting = sum(job.started_at is None for job in client.store.jobs(PAYLOADS_IN, status=Status.RUNNING.value, limit=1_000_000))
    return {"running": handed - waiting, "queued": queued, "waiting": waiting}


@route("GET", "/health", "server client", who="anyone", gives={200: HEALTHY, 503: UNHEALTHY})
def health(node: Node, request: Request) -> Answer:
    """Tell whether the process works and can read and write its database. Authenticated callers get more fields."""
    said: dict[str, Any] = {"status": "ok", "database": "ok"}
    known = request.caller is not None  # strangers get no paths, counts and versions
    try:
        node.store.check()
        if known:
            said.update(version=__version__, mode=node.config.mode, uptime_s=round(node.clock.monotonic() - node.started, 1))
            said["restart_needed"] = node.program.restart_needed() or None
            said.update(unremovable=unremovable_json(node))
        if known and isinstance(node, Client):
            problem = problem_of(node)
            said.update(executor=node.config.executor, **room_json(node), **counts_json(node), problem=problem or None)
            said["problem_since"] = rfc3339(problem_since(node, problem))
    except StorageError as error:
        log.error("health: %s", error)
        said.update(status="error", database="error", **({"message": str(error)} if known else {}))
        return Answer(said, 503, {"Retry-After": "5"})
    return Answer(said)


PONG = Gives("it answers", JSON_TYPE, {"message": "pong"})


@route("GET", "/", "server client", who="anyone", gives={200: PONG, 302: Gives("a browser is sent to a page")})
def ping(node: Node, request: Request) -> Answer:
    """Tell that the process answers."""
    if prefers_html(request.header("Accept")):
        return Answer(None, 302, {"Location": "/dashboard" if node.config.mode == "server" else "/swagger-ui/"})
    return Answer({"message": "pong"})


def prefers_html(accept: str) -> bool:
    """Tell whether an Accept header names text/html before anything else."""
    return accept.split(",")[0].split(";")[0].strip() == "text/html"


# == 18. Client ==  The client's loops start payloads, notice their end, kill them on request, and enforce their limits.


BEING_ENDED = "it is being stopped"  # how the note begins while a batch system takes its time to stop a payload
SUBMIT_WAITERS = 6  # submits that wait for the end of their payloads at once: half of the threads for small forms
LOOK_S = 10.0  # between two looks at payloads whose end a signal (SIGCHLD) reports
LATE_START_S = 1.0  # a payload that starts this long after it was marked has its start time stored
ENDING_THREADS = 32  # payloads that are killed at once: each may take all of JOBORCH_KILL_GRACE


class Client(Node):
    """A client: its executor, and what it knows about its payloads apart from the rows."""

    def __init__(self, config: Config, store: Store, data: DataFolder, clock: Clock | None = None) -> None:
        super().__init__(config, store, data, clock)
        self.executor = make_executor(data, config)
        self.notes: dict[int, str] = {}  # by payload id: what payloads that have not started wait for
        self.holds = Holds(self.clock)
        self.stubborn: dict[int, Backoff] = {}  # by payload id: those that do not end although they were killed
        self.tried: dict[int, Backoff] = {}  # by payload id: those whose start may or may not have succeeded
        # A new database has a new instance: it tells servers that the payload ids they know are invalid.
        self.instance = str(store.read(INSTANCE)[0]["instance"])
        self.start_id = secrets.token_hex(8)  # tells servers whether two clients of this instance are one process
        self.ending, self.lock, self.placing = cast("set[int]", set()), threading.Lock(), threading.Lock()
        self.lingering: set[int] = set()  # payloads that ended, but are still Running because not all is known of their end
        self.submit_places = WaiterLimit(SUBMIT_WAITERS)
        self.starts_at_once = False  # whether a submit starts its payload if a slot is free: once the loops run
        self.wanted: set[int] = set()  # payloads to kill that another thread is starting
        self.handles: dict[int, str] = {}  # by payload id: handles that are not stored, because a wrapper's claim replaces them
        self.unsaved: dict[int, tuple[str, float]] = {}  # handles and start times (steady) that could not be stored yet
        self.limits = ResultLimits(config.max_result_bytes, config.max_result_files)
        self.measurings: dict[int, Measuring] = {}  # by payload id: large work folders of ended payloads
        self.packings: dict[tuple[int, bool], Any] = {}  # by payload id, and whether it has ended: archives that are packed or being packed
        self.packers, self.quick_packers = threading.BoundedSemaphore(PACKERS), threading.BoundedSemaphore(1)
        self.measurers = threading.BoundedSemaphore(PACKERS)
        # Whether payloads run or wait, and whether some that run are to be killed; set by `run_tick`.
        self.has_payloads = self.has_kills = True
        self.needs_looks, self.looked_at = True, float("-inf")  # set by `run_tick`: see `needs_look`; monotonic
        self.holes = True  # the file system can punch holes, as far as we know
        self.troubled_at: float | None = None  # wall: since when nothing can be started for some service
        for name, tick, period_s, options in (
            ("run", run_tick, config.run_interval_s, {"wanted": functools.partial(needs_look, self)}),
            ("end", end_tick, config.run_interval_s, {"most_runs": ENDING_THREADS, "wanted": lambda: self.has_kills}),
            ("limit", limit_tick, config.run_interval_s, {"wanted": lambda: self.has_payloads}),
            ("sync", sync_tick, SYNC_AFTER_S, {}),
            ("clean", clean_tick, config.clean_interval_s, {}),
        ):
            self.loops[name] = Loop(name, functools.partial(tick, self), lambda: self.pool, period_s, **options)

    @property
    def local(self) -> LocalExecutor | None:
        """The local executor, which needs no handles to find its payloads, and can wait for them; None if another one runs payloads."""
        return self.executor if isinstance(self.executor, LocalExecutor) and not self.executor.is_batch else None

    def start(self) -> None:
        self.starts_at_once = self.local is not None
        super().start()

    def stop(self) -> None:
        """Store the time first: what stopped the client may have stopped payloads, too."""
        try:
            (self.data.path / STOP_NOTE).touch()
        except OSError as error:
            log.warning("the time of the stop cannot be kept: %s", error)
        super().stop()


def needs_look(client: Client) -> bool:
    """Tell whether `run_tick` may find something that nobody wakes it for. The end of our own child is a signal (SIGCHLD)."""
    late = client.clock.monotonic() - client.looked_at > LOOK_S
    return client.executor.is_batch or (client.has_payloads and (client.needs_looks or late))


def run_tick(client: Client) -> bool:
    """Finish payloads that ended, and start others on free slots. While stopping, leave both to the next start of the client."""
    if client.stopping.is_set():
        return False
    client.looked_at = client.clock.monotonic()
    save_handles(client)
    noted = {*client.notes, *client.tried, *client.stubborn, *client.handles}  # before the rows: what is started now is in neither
    everything = client.store.jobs(PAYLOADS_IN, status=Status.RUNNING.value, limit=1_000_000)
    waiting = client.store.number(COUNT_IN, status=Status.PREPARED.value)
    with client.lock:  # a submit may have started a payload since the rows were read
        client.has_payloads = bool(everything or waiting or client.ending or client.handles)
    client.has_kills = any(job.kill_requested_at is not None for job in everything)
    for job_id in noted.difference(job.id for job in everything):
        drop_notes(client, job_id)  # another thread noted it just after its end
    # Not those that another thread starts or kills. Look that up before the handles: a thread that starts a payload leaves one.
    running = [with_handle(client, job) for job in [job for job in everything if job.id not in client.ending]]
    started = [job for job in running if job.handle is not None]
    outcomes = client.executor.poll([job for job in started if job.id not in client.measurings])
    outcomes.update({job_id: measuring.outcome for job_id, measuring in list(client.measurings.items())})  # poll reports an end only once
    problem = client.executor.problem()
    problem_since(client, problem)
    for job in started:
        if outcomes[job.id].alive and job.kill_requested_at is None:
            if job.started_at is None and not outcomes[job.id].waits:
                client.store.tell(job.id, started_at=client.clock.wall(), now=client.store.steady())
            set_wait_reason(client, job.id, problem or outcomes[job.id].waits)
    lingering = set()
    for job in started:
        if not outcomes[job.id].alive:
            crash_point("end.seen")
            if job.kill_cause is not None or not finish(client, job, outcomes[job.id]):
                lingering.add(job.id)
            crash_point("end.stored")
    client.lingering = lingering
    start_again(client, [job for job in running if job.handle is None and job.kill_requested_at is None])  # it may take long
    start_what_fits(client)
    local = client.local
    client.needs_looks = bool(waiting or lingering or client.holds.held) or not (local and all(map(local.is_child, running)))
    return False


def set_wait_reason(client: Client, job_id: int, text: str) -> None:
    """Note what a payload waits for (empty: nothing). Report it to the server if it is new."""
    if client.notes.get(job_id, "") == text:
        return
    client.notes[job_id] = text
    if not text:
        del client.notes[job_id]
    client.store.tell(job_id)


def drop_notes(client: Client, job_id: int) -> None:
    """Drop the notes on a payload that is over."""
    tables: tuple[dict[int, Any], ...] = (client.notes, client.tried, client.stubborn, client.measurings, client.handles)
    for table in tables:
        table.pop(job_id, None)


def shown_status(job: Job) -> Status:
    """Return a payload's status as servers see it: one that waits in a batch system's queue is Prepared."""
    return Status.PREPARED if job.status is Status.RUNNING and job.started_at is None else job.status


def problem_of(client: Client, for_all: bool = False) -> str:
    """Return why nothing can be started now for some service, or `for_all` services; an empty text if all is well."""
    held = client.holds.reasons(for_all)
    return client.executor.problem() or (held[0] if held else "")


def problem_since(client: Client, problem: str) -> float | None:
    """Return when (wall time) the present problem began, or None if there is none. Each tick calls it with the current problem."""
    if not problem and not client.holds.by_service:  # while a retry is under way, the problem is not over
        client.troubled_at = None
    elif client.troubled_at is None:
        client.troubled_at = client.clock.wall()
    return client.troubled_at if problem else None


def start_what_fits(client: Client) -> None:
    """Start payloads in the order of their arrival, as slots and memory allow. None overtakes one that must wait."""
    for job in client.store.jobs(PAYLOADS_IN, status=Status.PREPARED.value, limit=client.config.slots):
        if not begin(client, job):
            break
    if client.executor.is_batch:
        start_held(client)


def has_room(client: Client, db: sqlite3.Connection, job: Job) -> bool:
    """Tell inside a transaction whether slots and memory are free for a payload. One that asks for more than there is runs alone."""
    count, cpus, memory = db.execute(RUNNING_NEEDS).fetchone()
    for job_id in list(client.lingering):
        row = db.execute(JOB_GET, {"id": job_id}).fetchone()
        if row is not None and row["status"] == Status.RUNNING.value:
            count, cpus, memory = count - 1, cpus - row["cpus"], memory - (row["memory"] or 0)
    if client.executor.is_batch:  # it counts the cores
        return bool(count < client.config.slots)
    fits = cpus + job.cpus <= client.config.slots and memory + (job.memory or 0) <= client.config.memory_bytes // MIB
    return bool(fits or not count)


def begin(client: Client, job: Job) -> bool:
    """Start one payload, or end it if it cannot run. Return False if there is no room for it."""
    work = client.data.job(job.mark) / "work"
    if not work.is_dir():
        reason = Reason.FILES_REMOVED.format(where="client")
        client.store.move(job, Status.FAILED, reason, cause=Cause.INFRASTRUCTURE.value)
        return True
    problem = why_not_runnable(work / "run.sh")
    if problem:
        client.store.move(job, Status.INVALID, problem, cause=Cause.USER.value)
        return True
    with kept_from_ending(client, job) as free:
        return not free or launch(client, job)


@contextlib.contextmanager
def kept_from_ending(client: Client, job: Job) -> Iterator[bool]:
    """Keep other threads from killing a payload that has no handle yet. Yields False if one is already killing it."""
    with client.lock:
        free = job.id not in client.ending
        client.ending.update({job.id} if free else ())
    try:
        yield free
    finally:
        if free:
            let_others_end(client, job.id)


def let_others_end(client: Client, job_id: int) -> None:
    """Let other threads kill a payload again, and wake them if it was to be killed meanwhile."""
    with client.lock:
        client.ending.discard(job_id)
        wanted = job_id in client.wanted
        client.wanted.discard(job_id)
    if wanted:
        client.wake("end")


def launch(client: Client, job: Job) -> bool:
    """Mark a payload as Running, and start it. Return False if there is no room for it or the client is stopping."""
    if client.stopping.is_set():
        return False
    # A job in a batch system survives a power failure of this machine, so the row must, too.
    is_batch = client.executor.is_batch
    started_at = None if is_batch else client.clock.wall()

    def mark(db: sqlite3.Connection) -> bool | None:
        return client.store.move(job, Status.RUNNING, "", is_batch, started_at=started_at) if has_room(client, db, job) else None

    marked = client.store.write(mark, durable=is_batch)
    if marked:
        start_marked(client, job._replace(status=Status.RUNNING, moved_at=client.store.steady()))
    return marked is not None


def start_marked(client: Client, job: Job) -> None:
    """Start a payload that was just marked as Running, unless others wait: then it takes its turn (see `start_held`)."""
    crash_point("run.marked")
    if has_others_before(client, job):
        client.holds.held[job.id] = Held(client.clock)
    else:
        start_on_executor(client, job)


def has_others_before(client: Client, job: Job) -> bool:
    """Tell whether payloads wait here that what runs them has refused."""
    return bool(client.holds.held or client.holds.of_all() or client.holds.of(job.service or "-"))


def add_payload(client: Client, new: NewJob, is_quiet: bool) -> tuple[Job, bool]:
    """Store a new payload. If it can start at once, it is Running in the same transaction, and the caller starts it: see `start_placed`.

    If `is_quiet`, /events does not report one that starts at once: the caller does. Returns the payload, and whether it is to be started.
    """
    store = client.store
    can_start = client.starts_at_once and not why_not_runnable(client.data.job(f"{new.uuid}.{new.attempt}") / "work" / "run.sh")

    def add(db: sqlite3.Connection) -> tuple[Job, bool]:
        job = store.add(new, "submitted")
        first = db.execute(FIRST_PREPARED).fetchone()[0] == job.id
        if not (can_start and first and has_room(client, db, job)) or client.stopping.is_set() or has_others_before(client, job):
            return job, False
        store.core.after(lambda: None, functools.partial(forget_start, client, job.id))
        with client.lock:
            client.ending.add(job.id)  # before the COMMIT: other threads must not see it without its handle
            client.has_payloads = True
        store.core.quiet.update({job.id} if is_quiet else ())
        store.move(job, Status.RUNNING, "", started_at=client.clock.wall())
        return store.row(db, job.id), True

    return store.write(add, durable=False)


def forget_start(client: Client, job_id: int) -> None:
    """Forget a payload whose transaction was undone: another one may get its id."""
    client.store.core.quiet.discard(job_id)
    with client.lock:
        client.ending.discard(job_id)


def start_placed(client: Client, job: Job, wait_s: float) -> None:
    """Start a payload that `add_payload` has marked as Running, and take in its end if that comes within `wait_s` seconds.

    Until then no other thread ends it: a kill waits. Few callers wait at once, so that they leave worker threads to others.
    """
    try:
        start_marked(client, job)
        with client.submit_places.place() if wait_s else contextlib.nullcontext() as parked:
            if parked:
                take_end(client, with_handle(client, job), wait_s)
    finally:
        let_others_end(client, job.id)


def take_end(client: Client, job: Job, wait_s: float) -> None:
    """Wait for the end of a payload, and move it on; what cannot be decided at once is left to the runner."""
    if not client.local or not client.local.wait(job, wait_s):
        client.wake("run")  # its end may have come just now
        return
    outcome = client.executor.poll([job])[job.id]
    crash_point("end.seen")
    if outcome.alive or not finish(client, job, outcome) or client.store.read(FIRST_PREPARED)[0][0] is not None:
        client.wake("run")
    crash_point("end.stored")


def start_on_executor(client: Client, job: Job) -> bool:
    """Start a payload whose row says Running. Return True if the executor accepted it.

    If that is impossible now, it is tried again; if it can never run, the payload fails.
    """
    try:
        handle = client.executor.start(job)
    except SubmitRefused as error:
        client.holds.put_off(job, str(error))
    except BackendUnavailable as error:
        client.holds.held.pop(job.id, None)  # it is unknown whether the executor has it
        client.tried.setdefault(job.id, Backoff(client.clock)).failed(error, FIND_AGAIN_S)
        client.holds.hold("", str(error))
        set_wait_reason(client, job.id, str(error))
    except CannotRun as error:
        fail_to_start(client, job, str(error), Cause.LIMIT)
    except OSError as error:
        fail_to_start(client, job, Reason.NOT_STARTED.format(error=os.strerror(error.errno or 0)), Cause.INFRASTRUCTURE)
    else:
        crash_point("run.started")
        client.holds.taken(job)
        client.tried.pop(job.id, None)
        if client.executor.is_batch:
            log.info("payload %d is job %s of the batch system", job.id, handle)
        keep_handle(client, job, handle)
        crash_point("run.stored")
        return True
    return False


def keep_handle(client: Client, job: Job, handle: str) -> None:
    """Keep the handle of a payload that was started: in memory if `find` gets it again after a crash, else in its row.

    One that starts long after it was marked has its time begin now.
    """
    if not client.local or client.store.steady() - job.moved_at > LATE_START_S:
        client.unsaved[job.id] = (handle, client.store.steady())
        save_handles(client)
    else:
        client.handles[job.id] = handle


def with_handle(client: Client, job: Job) -> Job:
    """Return a payload with its handle, wherever that is kept."""
    handle = client.handles.get(job.id)
    return job if handle is None else job._replace(handle=handle)


def fail_to_start(client: Client, job: Job, reason: str, cause: Cause) -> None:
    """Move a payload that could not be started to its end state."""
    drop_notes(client, job.id)
    drop_scratch(client, job)
    current = client.store.get(job.id)
    if current is not None and current.status is Status.RUNNING:
        client.store.move(current, Status.FAILED, reason, cause=cause.value)


def save_handles(client: Client) -> None:
    """Store the handles of started payloads. A StorageError stops the tick, so no payload is judged before that."""
    for job_id, (handle, now) in list(client.unsaved.items()):
        client.store.note(JOB_STARTED, id=job_id, handle=handle, now=now)
        client.unsaved.pop(job_id, None)


def finish(client: Client, job: Job, outcome: Outcome, patient: bool = False) -> bool:
    """Move an ended payload to its end state, with a reason; return whether it was moved.

    If not `patient`, a large work folder delays that to a later tick.
    """
    folder = client.data.job(job.mark)
    try:
        client.executor.collect(job)
    except BackendUnavailable as error:
        set_wait_reason(client, job.id, f"its outputs are not available yet: {error}")
        return False  # a later tick tries again
    if outcome.cause is None and not has_work(folder):
        text = Reason.WORK_GONE if outcome.exit_status is None else Reason.WORK_GONE_EXIT
        outcome = dataclasses.replace(outcome, cause=Cause.INFRASTRUCTURE, reason=text.format(status=outcome.exit_status))
    for stream in OUTPUT_STREAMS:
        bound_output(client, folder / stream)
    too_much, left_out = too_much_left(client, job, outcome, patient) if outcome.cause is None else ("", 0)
    if too_much is None:
        return False
    started, ended = run_times(folder, job)
    changes: dict[str, Any] = {"started_at": started, "ended_at": ended, "exit_code": outcome.exit_status}
    if too_much:
        reason = Reason.RESULT_HAS_EXIT.format(too_much=too_much, status=outcome.exit_status)
        moved = client.store.move(job, Status.FAILED, reason, cause=Cause.LIMIT.value, **changes)
    elif outcome.cause is not None:
        to = Status.KILLED if outcome.cause is Cause.CANCELLED else Status.FAILED
        moved = client.store.move(job, to, outcome.reason or limit_reason(folder, job.timeout or 0), cause=outcome.cause.value, **changes)
    elif outcome.exit_status == 0:
        reason = Reason.COMPLETED_CHILDREN if outcome.children_left else Reason.COMPLETED
        moved = client.store.move(job, Status.COMPLETED, reason + left_out_text(left_out), **changes)
    else:
        status = outcome.exit_status or 0
        run_s = run_seconds(started, ended, client.store.steady() - job.moved_at)
        reason, number = failure_reason(folder, status, run_s) + left_out_text(left_out), status - 128 if is_signalled(status) else None
        moved = client.store.move(job, Status.FAILED, reason, cause=Cause.USER.value, signal=number, **changes)
    if moved:  # else a kill was requested meanwhile: end_tick decides how it ended
        drop_notes(client, job.id)
        drop_scratch(client, job)
    return moved


def end_tick(client: Client) -> bool:
    """Kill one payload for which that was requested. Return whether there was one."""
    job = take_for_ending(client)
    if job is None:
        return False
    try:
        folder = client.data.job(job.mark)
        begun = folder / f"ending.{job.attempt}"  # left by a crash during the kill: then the kill caused the exit status
        measuring = client.measurings.get(job.id)
        outcome = measuring.outcome if measuring else client.executor.poll([job])[job.id] if job.status is Status.RUNNING else Outcome(True)
        if outcome.exit_status is not None and outcome.cause is not Cause.INFRASTRUCTURE and not begun.exists():  # it ended before the kill
            finish(client, job, outcome, patient=True)
            return True
        if job.status is Status.RUNNING:
            with contextlib.suppress(OSError):
                begun.touch()
            crash_point("kill.begun")
            client.executor.cancel(job)
            crash_point("kill.ended")
            with contextlib.suppress(BackendUnavailable):  # its outputs are not worth waiting for
                client.executor.collect(job)
        if job.kill_cause == Cause.LIMIT.value:
            times: dict[str, Any] = dict(zip(("started_at", "ended_at"), run_times(folder, job)))
            client.store.move(job, Status.FAILED, limit_reason(folder, job.timeout or 0), cause=Cause.LIMIT.value, **times)
        else:
            client.store.move(job, Status.KILLED, Reason.KILLED, cause=Cause.CANCELLED.value)
            crash_point("kill.stored")
        drop_notes(client, job.id)
        drop_scratch(client, job)
    except StillRunning as error:
        if client.stubborn.setdefault(job.id, Backoff(client.clock)).failed(error, client.config.run_interval_s):
            log.error("%s; it is tried again", error)
        if client.executor.is_batch:
            set_wait_reason(client, job.id, f"{BEING_ENDED}: {error}")
        return True  # there may be others
    finally:
        with client.lock:
            client.ending.discard(job.id)
    client.wake("run")
    return True


def take_for_ending(client: Client) -> Job | None:
    """Return a payload to kill that no other thread is killing and that was not tried a moment ago."""
    for status in (Status.RUNNING, Status.PREPARED):
        for job in client.store.jobs(PAYLOADS_IN, status=status.value, limit=1_000_000):
            with client.lock:
                lately = job.id in client.stubborn and client.stubborn[job.id].waits()
                if job.kill_requested_at is None or job.id in client.ending or lately:
                    client.wanted.update({job.id} & client.ending if job.kill_requested_at is not None else ())
                    continue
                client.ending.add(job.id)
            current = client.store.get(job.id)  # read again: it may have got a handle since
            if current is not None and current.status not in OVER:
                return with_handle(client, current)
            with client.lock:
                client.ending.discard(job.id)
    return None


def limit_tick(client: Client) -> bool:
    """Enforce the limits of running payloads: run time, and the size of their output streams."""
    now, limit_bytes, jobs = client.store.steady(), client.config.log_limit_bytes, str(client.data.jobs)
    for job_id, uuid, attempt, timeout, moved_at in client.store.read(RUNNING_LIMITS):
        over = timeout and not client.executor.is_batch and now - moved_at > timeout
        if over and client.store.request_kill(job_id, Cause.LIMIT):
            client.wake("end")
        for stream in OUTPUT_STREAMS:
            path = f"{jobs}/{uuid}.{attempt}/{stream}"
            with contextlib.suppress(OSError):  # a first look is cheap: there may be thousands
                if os.lstat(path).st_size <= limit_bytes:
                    continue
            bound_output(client, Path(path))
    return False


def check_executor(client: Client) -> None:
    """Raise ConfigError if payloads run that another executor started: this one would lose them."""
    note = client.data.path / "executor"
    before = note.read_text(encoding="utf-8").strip() if note.exists() else "local"
    running = client.store.number(COUNT_IN, status=Status.RUNNING.value)
    if before != client.config.executor and running:
        remedy = f"start it with --executor {one_line(before, 40)} until they have ended, or give another DATA_PATH"
        raise ConfigError(
            f"JOBORCH_EXECUTOR is {client.config.executor!r}, but {running} payloads here were started by {before!r}: {remedy}"
        )
    write_atomic(note, client.config.executor.encode())


def recover_payloads(client: Client) -> None:
    """When a client starts: find the payloads that it started before, and start those that certainly never ran."""
    if client.store.is_new:
        end_orphans(client)
    if client.store.rebooted:
        distrust(client)
    running = client.store.jobs(PAYLOADS_IN, status=Status.RUNNING.value, limit=1_000_000)
    start_again(client, [job for job in running if job.handle is None and job.kill_requested_at is None])
    if running:
        log.info("%d payloads were running when the client stopped: recovered", len(running))


def start_again(client: Client, cut_off: Sequence[Job]) -> None:
    """Find payloads that were started before a crash or a lost answer. Start those that certainly never were."""
    held = client.holds.held
    refused = {job.id for job in client.holds.due(waiting_here(client)) if held[job.id].failures}
    lately = {job_id for job_id, tried in list(client.tried.items()) if tried.waits()}
    asked = [job for job in cut_off if (job.id in refused if job.id in held else job.id not in lately)]
    if not asked or client.holds.of_all():
        return
    try:
        handles = client.executor.find(asked)
    except BackendUnavailable as error:
        client.holds.hold("", str(error))
        for job in asked:
            set_wait_reason(client, job.id, str(error))
        return
    for job in asked:
        handle = handles.get(job.mark)
        if handle:
            held.pop(job.id, None)
            if client.local:
                client.handles[job.id] = handle
            else:
                client.store.note(JOB_HANDLE, id=job.id, handle=handle)
        elif handle is not None:
            held.pop(job.id, None)
            text = "its submission was interrupted: the client waits to learn whether it succeeded"
            client.tried.setdefault(job.id, Backoff(client.clock)).failed(text, FIND_AGAIN_S)
            set_wait_reason(client, job.id, text)
        elif job.id not in held:
            if job.id not in client.tried:
                log.warning("payload %d was stored as Running but never started: it is started now", job.id)
            held[job.id] = Held(client.clock)
    start_held(client)


def start_held(client: Client) -> None:
    """Start the waiting payloads that are due, and note for the others why they wait."""
    client.holds.start(client.holds.due(waiting_here(client)), functools.partial(start_now, client))
    for job in waiting_here(client):
        reason = client.holds.reason_of(job)
        if reason:
            set_wait_reason(client, job.id, reason)


def waiting_here(client: Client) -> list[Job]:
    """Return the payloads that wait here, in the order of their arrival. Forget those that ended or were found meanwhile."""
    found = []
    for job_id in sorted(client.holds.held):
        job = client.store.get(job_id)
        if job is None or job.status is not Status.RUNNING or with_handle(client, job).handle is not None:
            client.holds.held.pop(job_id)
        elif job.kill_requested_at is None:
            found.append(job)
    return found


def start_now(client: Client, job: Job) -> bool:
    """Start a payload whose row says Running but that never started, unless a kill was requested. Return whether it started."""
    taken = False
    with kept_from_ending(client, job) as free:
        current = client.store.get(job.id)
        if free and current is not None and current.status is Status.RUNNING and current.kill_requested_at is None:
            taken = start_on_executor(client, current)
    return taken


def distrust(client: Client) -> None:
    """After a reboot, discard files and results that may not have reached the disk. The server tries those jobs again."""
    for job in client.store.jobs(UNSYNCED, before=client.store.steady()):
        if job.status is Status.COMPLETED:  # a failed script remains a failure, even if its files are lost
            client.store.move(job, Status.CLEANED, Reason.REBOOTED_UNSYNCED)
    for job in client.store.jobs(PAYLOADS_IN, status=Status.PREPARED.value, limit=1_000_000):
        client.store.move(job, Status.FAILED, Reason.REBOOTED_UNSYNCED, cause=Cause.INFRASTRUCTURE.value)
    running = client.store.jobs(PAYLOADS_IN, status=Status.RUNNING.value, limit=1_000_000)
    for job in running if client.local else ():  # whatever its files say: they may not have reached the disk
        if job.handle is None and job.kill_requested_at is None:
            client.store.move(job, Status.FAILED, Reason.REBOOTED, cause=Cause.INFRASTRUCTURE.value)


def sync_tick(client: Client) -> bool:
    """Flush results that no server has fetched yet to the disk, with one call for all."""
    jobs = client.store.jobs(UNSYNCED, before=client.store.steady() - SYNC_AFTER_S)
    if jobs:
        sync_file_system(client.data.jobs)
        crash_point("sync.done")
        client.store.write(lambda db: [db.execute(JOB_SYNCED, {"id": job.id}).rowcount for job in jobs])
    return False


def end_orphans(client: Client) -> None:
    """A new database does not have the payloads of an earlier run: kill and remove them."""
    client.executor.end_orphans([folder.name for folder in client.data.jobs.iterdir()])
    discard_payloads(client.data)


# == 19. Logs ==  A script's output can be read while it runs and as long as its files are kept.

TEXT_TYPE, EVENT_TYPE = "text/plain; charset=utf-8", "text/event-stream"
COMMENT_EVERY_S = 15.0  # in a quiet event stream: gateways give up after 60 s of silence
STREAM = Parameter(
    "stream", "query", "string", "which of the two (default: stdout)", "stderr", choices=OUTPUT_STREAMS, default=OUTPUT_STREAMS[0]
)
OFFSET = Parameter(
    "offset",
    "query",
    "integer",
    "how many bytes of the output you have: X-Next-Offset of the last answer",
    0,
    least=0,
    most=10**18,
    default=0,
)
FOLLOW = Parameter("follow", "query", "string", "1: continue until the job has ended", "1", choices=("0", "1"), default="0")
LOG_PART = Gives(
    "output from `offset` on, at most 1 MiB; X-Next-Offset says where the next part begins. With follow=1, everything until the job "
    "ends; with `Accept: text/event-stream` as events with the offset as id, comments in pauses, and a last event `end` with the status",
    TEXT_TYPE,
)
NO_OUTPUT = Gives("no job has this id, or its output is not available", JSON_TYPE, {"message": "the files of job 42 were cleaned"})


def bound_output(client: Client, path: Path) -> None:
    """Free the middle of an output stream that is over its limit."""
    if not client.holes:
        return
    try:
        punch_middle(path, client.config.log_limit_bytes)
    except FileNotFoundError:
        return  # the wrapper has not created it yet
    except OSError as error:
        client.holes = False
        log.warning("output cannot be limited on this file system (%s): it is cut when it is read", error)


class LogPart(NamedTuple):
    """A part of an output stream: its bytes, and the offset after them."""

    text: bytes
    following: int


@route(
    "GET",
    "/logs/<job_id>",
    "client",
    who="caller",
    slow=True,
    takes=(PAYLOAD_ID, MARK, STREAM, OFFSET),
    gives={200: LOG_PART, 400: BAD, 404: NOT_FOUND},
)
def payload_logs(client: Client, request: Request, job_id: int, stream: str, offset: int) -> Answer:
    """Read a payload's output, also while it runs."""
    job = known_payload(client, request, job_id)
    part = LogPart(b"", offset)
    # OSError: it does not exist yet, or the script replaced it by something else.
    with contextlib.suppress(OSError), open_regular(client.folder(job), stream) as source:

        def read_at(begin: int, count: int) -> bytes:
            source.seek(begin)
            return source.read(count)

        kept = Stream(os.fstat(source.fileno()).st_size, client.config.log_limit_bytes)
        part = LogPart(*kept.part(read_at, offset, LOG_PART_BYTES))
    return Answer(part.text, 200, {"Content-Type": TEXT_TYPE, "X-Next-Offset": str(part.following)})


def stored_log(server: Server, job: Job, stream: str, offset: int) -> LogPart:
    """Read a part of an ended job's output from its result; empty if it never ran. Raises HttpError 404 if the ZIP is damaged."""
    if job.result_sha256 is None:
        return LogPart(b"", offset)
    with contextlib.closing(stored_archive(server, job).file) as file:
        try:
            return part_of_archive(file, stream, server.config.log_limit_bytes, offset)
        except ValueError as error:
            raise HttpError(404, f"the output of job {job.id} cannot be read: its client sent a damaged ZIP") from error


def part_of_archive(file: IO[bytes], stream: str, limit_bytes: int, offset: int) -> LogPart:
    """Read a part of an output stream from a ZIP; empty if it has no such member. Raises ValueError if the ZIP is invalid.

    The work is bounded by `limit_bytes` of output, whatever the ZIP claims: a client may have forged it.
    """
    for record in zip_records(file, commented=True):  # a client puts the streams first
        said = re.fullmatch(STREAM_COMMENT.format("([0-9]{1,18})", "([0-9]{1,18})").encode(), record.comment)
        if said and record.name.endswith(f"/{stream}".encode()):
            return part_of_member(file, record, Stream(int(said[1]), int(said[2])), limit_bytes, offset)
    return LogPart(b"", offset)  # a 2.2 client keeps no output


def part_of_member(file: IO[bytes], record: ZipRecord, kept: Stream, limit_bytes: int, offset: int) -> LogPart:
    """Read a part of an output stream from its member of a ZIP; `kept` says which bytes of the stream the member has."""
    first, second = kept.gap
    shorter = second - first - len(kept.line(first)) if second > first else 0  # than the stream, after the gap
    if record.size != kept.size - shorter or record.size > limit_bytes + KIB:  # not as a client packs it, or over the limit here
        size = min(record.size, limit_bytes)
        kept, second, shorter = Stream(size, size), size, 0

    def read_at(begin: int, count: int) -> bytes:
        return read_member(file, record, begin if begin < second else begin - shorter, count)

    return LogPart(*kept.part(read_at, offset, LOG_PART_BYTES))


def job_log(server: Server, request: Request, job: Job, stream: str, offset: int) -> LogPart:
    """Read a part of a job's output from wherever it is now. Raises HttpError 404 or 503 if it is not available."""
    if job.status is Status.CLEANED:
        raise HttpError(404, f"the files of job {job.id} were cleaned")
    link = server.links.get(job.client or "")
    if job.status in ENDED:
        return stored_log(server, job, stream, offset)
    if job.dest_id is None or link is None:
        return LogPart(b"", offset)  # it is not at a client yet
    try:
        with calling(server, request, link) as unwanted:
            return LogPart(*link.logs(job, stream, offset, unwanted))
    except Gone as error:
        raise HttpError(404, str(error)) from error
    except (NothingSent, NoAnswer) as error:
        raise HttpError(503, f"{link.name} {error}", Retry_After=str(COME_AGAIN_S)) from error


@route(
    "GET",
    "/jobs/<job_id>/logs",
    "server",
    who="caller",
    slow=True,
    takes=(ID, STREAM, OFFSET, FOLLOW),
    gives={200: LOG_PART, 400: BAD, 404: NO_OUTPUT, 503: CLIENT_AWAY},
)
def job_logs(server: Server, request: Request, job_id: int, stream: str, offset: int, follow: str) -> Answer:
    """Read a job's output, live while it runs. With follow=1, read on until it has ended."""
    job = known_job(server, request, job_id)
    headers = {"Content-Type": TEXT_TYPE, "X-Job-Status": job.status.value}
    if follow == "1" and request.method == "GET":
        place = contextlib.ExitStack()
        if not place.enter_context(server.waiters.place()):
            raise HttpError(503, "too many callers wait here: try again", Retry_After=str(COME_AGAIN_S))
        headers.update({"X-Accel-Buffering": "no", "Cache-Control": "no-store"})  # else nginx would buffer it until the end
        if EVENT_TYPE not in request.header("Accept"):
            parts = followed_log(server, request, job, stream, offset, place)
            return Answer((part.text for part in parts), 200, headers)
        known = request.header("Last-Event-ID")  # a browser that reconnects says how far it was
        offset = int(known) if re.fullmatch("[0-9]{1,18}", known) else offset
        parts = followed_log(server, request, job, stream, offset, place)
        return Answer(log_events(server, job, parts), 200, {**headers, "Content-Type": EVENT_TYPE})
    part = job_log(server, request, job, stream, offset)
    return Answer(part.text, 200, {**headers, "X-Next-Offset": str(part.following)})


def followed_log(
    server: Server, request: Request, job: Job, stream: str, offset: int, place: contextlib.AbstractContextManager[Any]
) -> Iterator[LogPart]:
    """Yield a job's output until it has ended, and empty parts in pauses. A line announces a new attempt. Frees `place` at the end."""
    pause_s, attempt = 0.1, job.attempt
    with place:
        while not server.stopping.wait(pause_s) and not request.left():
            current = server.store.get(job.id)
            if current is None:
                return
            if current.attempt != attempt:
                attempt, offset = current.attempt, 0
                yield LogPart(f"\n[joborch: attempt {attempt}]\n".encode(), 0)
            part = LogPart(b"", offset)
            with contextlib.suppress(HttpError):  # not available now, or never: wait for the job's end
                part = job_log(server, request, current, stream, offset)
            pause_s = 0.0 if part.text else min(1.0, max(0.1, pause_s * 1.5))
            offset = part.following
            yield part
            if current.status in OVER and not part.text:
                return


def log_events(server: Server, job: Job, parts: Iterator[LogPart]) -> Iterator[bytes]:
    """Yield output as server-sent events: the text in `data`, the offset after it as id; the last event is `end` with the status.

    Unlike plain text, events can have comments that keep a gateway from giving up. Carriage returns become line feeds, and
    bytes that are not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield b": output of the job\n\n"  # at once, because it sends the headers
    said_at = server.clock.monotonic()
    for part in parts:
        text = decoder.decode(part.text)
        if text:
            lines = "".join(f"data: {line}\n" for line in re.split("\r\n|\r|\n", text))
            yield f"id: {part.following - len(decoder.getstate()[0])}\n{lines}\n".encode()
        elif server.clock.monotonic() - said_at >= COMMENT_EVERY_S:
            yield b": quiet\n\n"
        else:
            yield b""
            continue
        said_at = server.clock.monotonic()
    ended = server.store.get(job.id)
    if ended is not None and ended.status in OVER:
        yield f"event: end\ndata: {ended.status}\n\n".encode()


# == 20. Results ==  A payload's files are packed once for all callers that request them.


class ResultLimits(NamedTuple):
    """The limits of a result: bytes (including holes), files and links (without run.sh), and half as many folders."""

    size_bytes: int = 2**62
    files: int = 2**62

    @property
    def folders(self) -> int:
        return self.files // 2 + 16

    @property
    def entries(self) -> int:
        """How many directory entries to read: if there are more, one of the limits is exceeded."""
        return self.files + self.folders + 1

    def broken_by(self, size_bytes: int, files: int) -> str:
        """Return what exceeds a limit, as the end of a sentence; empty if nothing does."""
        if size_bytes > self.size_bytes:
            sizes = [size_text(size) for size in (size_bytes, self.size_bytes)]
            has, most = sizes if sizes[0] != sizes[1] else (f"{size_bytes} bytes", str(self.size_bytes))
            return f"{has}: at most {most} are allowed (JOBORCH_MAX_RESULT)"
        if files > self.files:
            return f"more than {self.files:,} files, or {self.folders:,} folders: no more are allowed (JOBORCH_MAX_RESULT_FILES)"
        return ""


QUICK_PACK = ResultLimits(16 * MIB, 1000)  # results up to this size do not wait behind larger ones


def pack_payload(client: Client, job: Job, wanted: Callable[[], bool] = lambda: True, limits: ResultLimits | None = None) -> Archive:
    """Pack a payload's work folder in its present state, with its output streams below `.joborch/`, within the limits.

    Raises OSError if the archive cannot be written, and GivenUp if it is no longer `wanted`.
    """

    def fill(packer: ZipPacker) -> None:
        packer.wanted, packer.limits = wanted, limits or client.limits
        packer.places, packer.mends = [work_path(client, job)], job.status in ENDED
        try:
            with opened_folder(client.folder(job)) as folder:
                fill_archive(client, job, packer, folder)
        except OSError as error:  # the script removed its folder, or replaced it by a link
            packer.leave_out(f"the payload's folder: {os.strerror(error.errno or 0)}")

    # With a fixed time for entries that have none, a payload always gives the same bytes, so a transfer can resume.
    return packed(client.data.spool, job.ended_at, fill)


def fill_archive(client: Client, job: Job, packer: ZipPacker, folder: int) -> None:
    """Pack a payload's files. Output streams come first, so they can be found without reading the rest."""
    work = open_work(folder)
    try:
        if work is not None:
            packer.choose_own(work)
        for stream in OUTPUT_STREAMS:
            try:
                kept, chunks = kept_output(folder, stream, client.config.log_limit_bytes)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    packer.leave_out(f"{packer.own}/{stream}: the script replaced it by something else")
                continue
            packer.add_chunks(stream, chunks, STREAM_COMMENT.format(kept.size, kept.limit), kept.size)
        if work is None:
            packer.leave_out("the work folder: the script removed it or replaced it by something else")
        else:
            whole = job.return_inputs or job.status is not Status.COMPLETED  # the inputs of a failed job help to explain the failure
            packer.add_open_folder(work, {} if whole else unchanged_inputs(folder))
    finally:
        if work is not None:
            os.close(work)


def open_work(folder: int) -> int | None:
    """Return a descriptor of a payload's work folder, or None if the script removed or replaced it."""
    try:
        give_rights(folder, "work")
        return open_folder(folder, "work", flags=os.O_RDONLY)
    except OSError:
        return None


class Measuring:
    """Measures a large work folder of an ended payload in a thread. `outcome` is kept until `too_much` is no longer None."""

    def __init__(self, client: Client, job: Job, outcome: Outcome) -> None:
        self.outcome, self.too_much, self.left_out = outcome, cast("str | None", None), 0
        threading.Thread(target=self.measure, args=(client, job), name=f"measure-{job.id}", daemon=True).start()

    def measure(self, client: Client, job: Job) -> None:
        found: str | None = ""
        try:
            with client.measurers:
                found, self.left_out = excess(client, job, client.limits)
        finally:
            self.too_much = found or ""
            client.wake("run")


def excess(client: Client, job: Job, limits: ResultLimits) -> tuple[str | None, int]:
    """Return by what a finished payload exceeds a limit (empty: by nothing), and how many entries its archive cannot hold.

    The text is None if the payload exceeds `limits`, but not the client's limits.
    """
    try:
        with opened_folder(client.data.job(job.mark)) as folder:
            give_rights(folder, "work")
            with opened_folder(folder, "work") as work:
                losses = Losses([path_of(work), work_path(client, job)])
                left = measure(work, limits, {} if job.return_inputs else unchanged_inputs(folder), losses)
    except OSError:
        return "", 0  # the folder is gone
    return client.limits.broken_by(*left) or (None if limits.broken_by(*left) else ""), losses.count


def work_path(client: Client, job: Job) -> bytes:
    """Return the path by which a payload's script may know its work folder."""
    return os.fsencode(os.path.abspath(client.folder(job) / "work"))


def too_much_left(client: Client, job: Job, outcome: Outcome, patient: bool) -> tuple[str | None, int]:
    """Like `excess`, but if not `patient`, the text is None while measuring takes longer than a tick may."""
    if job.id in client.measurings and not patient:
        return client.measurings[job.id].too_much, client.measurings[job.id].left_out
    quick = client.limits._replace(files=min(QUICK_MEASURE_FILES, client.limits.files))
    found = excess(client, job, client.limits if patient else quick)
    if found[0] is None:
        client.measurings[job.id] = Measuring(client, job, outcome)
    return found


class Packing:
    """The archive of a payload, made by one thread for all callers that request it meanwhile.

    The archive of an ended payload is kept for later callers. Packing stops when no caller waits any more.
    """

    def __init__(self, client: Client, job: Job, quick: bool) -> None:
        self.done, self.archive, self.error = threading.Event(), cast("Archive | None", None), cast("Exception | None", None)
        self.client, self.job, self.quick = client, job, quick
        self.passing = job.status not in ENDED  # a snapshot of a running payload, not to be reused
        self.readers, self.until = 0, 0.0  # callers that wait now; until when (monotonic) a caller that was sent away may return
        self.used_at = client.clock.monotonic()

    def start(self) -> None:
        threading.Thread(target=self.pack, name=f"pack-{self.job.id}", daemon=True).start()

    def wanted(self) -> bool:
        """Tell whether a caller waits for it, or may return for it."""
        return (self.readers > 0 or time.monotonic() < self.until) and not self.client.stopping.is_set()

    def pack(self) -> None:
        try:
            if self.quick:
                self.archive = self.pack_in_turn(self.client.quick_packers, QUICK_PACK)
            if self.archive is None or self.archive.cut:  # it has grown since it was measured
                self.quick = False
                self.archive = self.pack_in_turn(self.client.packers, self.client.limits)
        except (OSError, GivenUp) as error:
            self.error = error
        finally:
            self.done.set()
        while self.wanted() and (self.passing or self.error):
            self.client.stopping.wait(0.2)
        forget_packings(self.client)

    def pack_in_turn(self, place: threading.Semaphore, limits: ResultLimits) -> Archive:
        while not place.acquire(timeout=0.2):
            if not self.wanted():
                raise GivenUp("no caller waits for the archive any more")
        try:
            size, files = min(limits.size_bytes, self.client.limits.size_bytes), min(limits.files, self.client.limits.files)
            return pack_payload(self.client, self.job, self.wanted, ResultLimits(size, files))
        finally:
            place.release()

    def outdated(self) -> bool:
        """Tell whether it can be dropped: no caller waits for it, and none is expected."""
        if not self.done.is_set() or self.readers:
            return False
        if self.passing or self.archive is None or not self.archive.whole:
            return not self.wanted()
        return self.used_at < self.client.clock.monotonic() - PACKED_KEPT_S

    def opened(self) -> Archive:
        """Return the archive with a separate file position."""
        if self.error is not None or self.archive is None:
            raise self.error or OSError(errno.EIO, "the result could not be packed")
        return Archive(cast(Spool, self.archive.file).again(), self.archive.size, self.archive.sha256)

    def join(self, patience_s: float, left: Callable[[], bool]) -> None:
        """Wait until it is packed or the caller has left, at most `patience_s`. Few may wait for large ones: each holds a thread."""
        with self.client.pack_places.place() as free:
            deadline = time.monotonic() + (patience_s if free or self.quick else 0.0)
            while not self.done.wait(min(0.1, max(0.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline or left():
                    return


def forget_packings(client: Client) -> None:
    """Drop packed results that no caller has requested for a while."""
    with client.lock:
        for key, packing in list(client.packings.items()):
            if packing.outdated():
                del client.packings[key]
                if packing.archive is not None:
                    packing.archive.file.close()


def drop_packings(client: Client, job_ids: Iterable[int]) -> None:
    """Drop packed results that the server has stored."""
    for job_id in job_ids:
        packing = client.packings.get((job_id, True))
        if packing is not None:
            packing.passing, packing.until = True, 0.0
    forget_packings(client)


def take_packing(client: Client, job: Job) -> Packing:
    """Return the packing of a payload and count the caller as a reader. Raises HttpError 503 if too many wait to be packed."""
    forget_packings(client)
    key = (job.id, job.status in ENDED)
    quick = key in client.packings or is_quick(client, job)
    with client.lock:
        packing = client.packings.get(key)
        if packing is None:
            ahead = [other for other in client.packings.values() if not other.done.is_set() and other.quick == quick]
            if len(ahead) >= PACK_QUEUE:
                raise not_packed("many results wait to be packed")
            packing = client.packings[key] = Packing(client, job, quick)
            packing.readers += 1
            packing.start()
        else:
            packing.readers += 1
        packing.used_at = client.clock.monotonic()
        return packing


def is_quick(client: Client, job: Job) -> bool:
    """Tell whether a payload is small enough to be packed at once."""
    try:
        with opened_folder(client.folder(job), "work") as work:
            return not QUICK_PACK.broken_by(*measure(work, QUICK_PACK, {}))
    except OSError:
        return True  # there are no files


def not_packed(why: str) -> HttpError:
    """Return the error for a caller that comes before the archive is ready."""
    return HttpError(503, f"{why}: try again", Retry_After="5", **{PACKING_HEADER: "1"})


def packed_result(client: Client, job: Job, patience_s: float, left: Callable[[], bool]) -> Archive:
    """Return the archive of a payload; `left` tells whether the caller has closed the connection.

    Raises HttpError 503 if it is not packed within `patience_s`.
    """
    packing, told = take_packing(client, job), False
    try:
        packing.join(patience_s, left)
        if not packing.done.is_set() or isinstance(packing.error, GivenUp):
            told = not left()
            raise not_packed("the result is being packed")
        return packing.opened()
    finally:
        with client.lock:
            # A server whose call broke will return for an ended payload. Set the lease before the reader goes, or packing would stop.
            if told or not (packing.passing or packing.done.is_set()):
                packing.until = time.monotonic() + (PACK_LIVE_LEASE_S if packing.passing else PACK_LEASE_S)
            packing.readers -= 1
            if not told and packing.done.is_set() and not packing.readers:
                packing.until = 0.0
        if packing.done.is_set():
            forget_packings(client)


def inline_archive(client: Client, job: Job) -> dict[str, str]:
    """Return a small result in base64 with its SHA-256, to save the server a call; empty if it is not small."""
    try:
        with opened_folder(client.folder(job)) as folder:
            if not is_small(folder):
                return {}
        archive = pack_payload(client, job, limits=ResultLimits(INLINE_LIMIT_BYTES, INLINE_FILES))
        with contextlib.closing(archive.file):
            if archive.cut:  # it has grown since
                return {}
            return {"archive": base64.b64encode(archive.file.read()).decode(), "sha256": archive.sha256}
    except OSError:
        return {}  # the server fetches it and gets the error


def is_small(folder: int) -> bool:
    """Tell whether a payload left only a few small files. Raises OSError if its folder cannot be read."""
    size = sum(os.stat(stream, dir_fd=folder, follow_symlinks=False).st_size for stream in OUTPUT_STREAMS)
    with opened_folder(folder, "work", flags=os.O_RDONLY) as work, os.scandir(work) as entries:
        for number, entry in enumerate(entries):
            if number >= INLINE_FILES or not entry.is_file(follow_symlinks=False):
                return False
            size += entry.stat(follow_symlinks=False).st_size
    return size <= INLINE_LIMIT_BYTES


# == 21. Executors ==  Every executor starts an attempt at most once, finds it after a crash, and kills all of its processes.

# The same wrapper runs a payload everywhere. $1 is the payload's folder, $2 the attempt. If the batch system does not enforce
# the time limit, $3 is that limit and $4 the time from TERM to KILL, both in seconds.
# It claims the attempt with a file that only one process can create, and starts run.sh in a separate process group, so that
# `kill 0` in run.sh does not reach the wrapper (bash has job control without a terminal, dash does not). Afterwards it writes
# exit.json next to the work folder: the exit status, and whether the wrapper got a signal to stop (run.sh may have got it, too).
# Everything that a full disk could break is done before `ready` is written to the claim: without `ready` the script never began.
WRAPPER = r"""#!/bin/bash
# joborch: runs one attempt of one payload. Usage: bash wrapper.sh FOLDER ATTEMPT [LIMIT_S GRACE_S]
@FIRST@umask @UMASK@@FILES@
cd "$1" || exit 1
here=$PWD                                          # $1 may be relative
set -C                                             # > fails if the file exists (O_EXCL): a second wrapper stops here
echo $$ 2>/dev/null >"started.$2" || { : 2>/dev/null >"again.$2"; exit 0; }
set +C
set -m
told=0 over=0
trap told=1 TERM INT HUP                           # a handler, not '': children inherit ignored signals
trap : ALRM USR1 USR2 QUIT PIPE XCPU               # a batch system's warnings (sbatch --signal=B:USR1@60) must not kill the wrapper
[ -z "$3" ] || trap over=1 ALRM
@SCRATCH@printf '%80s' '' >exit.json || exit 1               # reserve its disk space before the script can fill the disk,
exec 9<>exit.json 7>>stdout 8>>stderr || exit 1    # and open it: the script may remove the permissions of its folders
cd work || exit 1
prelude=$JOBORCH_PRELUDE login=
unset JOBORCH_PRELUDE
IFS= read -r -n 250 first 2>/dev/null <run.sh
case $first in '#!'*bash*[[:space:]]-*)
    pattern='^#!.*bash([[:space:]].*)?[[:space:]](-[[:alpha:]]*l[[:alpha:]]*|--login)([[:space:]]|$)'
    [[ $first =~ $pattern ]] && login=--login
esac
echo ready >>"../started.$2" || exit 1
if [ -n "$prelude" ]; then                          # in the script's own shell: it may define functions
    then='eval "$1"; [ $? -eq 0 ] || echo "joborch: the line before the script (SERVICE_..._PRELUDE) failed: $1" >&2; shift; . ./run.sh'
    { @BEFORE@exec bash --login -c "$then" ./run.sh "$prelude"; } </dev/null >&7 2>&8 7>&- 8>&- 9>&- &
else
    { @BEFORE@exec bash $login ./run.sh; } </dev/null >&7 2>&8 7>&- 8>&- 9>&- &
fi
pid=$!
if [ -n "$3" ]; then
    { sleep "$3"; kill -ALRM $$; kill -TERM -- -$pid; sleep "$4"; kill -KILL -- -$pid; } >/dev/null 2>&1 7>&- 8>&- 9>&- &
    timer=$!
fi
set +m                                             # else wait also returns when run.sh is suspended
while :; do
    wait $pid; status=$?
    kill -0 $pid 2>/dev/null || break              # still alive: a signal to the wrapper interrupted the wait
done
wait $pid 2>/dev/null; last=$?                     # it may have exited between an interrupted wait and the check
[ $last -eq 127 ] || [ $last -lt 0 ] || status=$last  # -1: bash 5.2 loses the status if a signal arrives as the child exits
[ -z "$3" ] || kill -KILL -- -$timer 2>/dev/null
runs() {                                           # is a process of run.sh's group alive? Zombies do not count
    local file line
    for file in /proc/[0-9]*/stat; do
        { read -r line <"$file"; } 2>/dev/null || continue
        set -- ${line##*) }
        [ "$3" != $pid ] || [ "$1" = Z ] || [ "$1" = X ] || return 0
    done
    return 1
}
rest() {                                           # let remaining processes exit by themselves, for these seconds
    for pause; do
        runs && [ $told$over = 00 ] || return 0
        sleep $pause 7>&- 8>&- 9>&-
    done
}
left=0
if kill -0 -- -$pid 2>/dev/null; then              # filters as in `exec > >(tee log)`, and background processes
    rest 0.02 0.05 0.1 0.2 0.3 0.3 0.3 0.3 0.43
    runs && left=1 && kill -TERM -- -$pid && rest 0.1 0.2 0.2
    kill -KILL -- -$pid
fi 2>/dev/null
[ $status -le 128 ] || [ $told$over != 00 ] || sleep 0.3  # a signal to the whole session may reach run.sh before the wrapper
gone=                                              # set if the work folder was removed or replaced
there() { [ "$here/work" -ef /proc/$$/cwd ]; }
there || { [ -x "$here" ] || chmod u+x "$here"; there; } 2>/dev/null || gone=', "gone": 1'
printf '{"status": %d, "left": %d, "told": %d, "limit": %d%s}' $status $left $told $over "$gone" >&9
shopt -s nullglob dotglob
set -- "$TMPDIR"/*                                 # if TMPDIR is empty, the client removes it: that saves a process here
case $TMPDIR in */jo-*) [ $# -eq 0 ] || rm -rf -- "$TMPDIR";; esac
exit $status
"""
# On another machine, the wrapper creates TMPDIR: a short path on the node, or else `tmp` in the payload's folder.
NODE_SCRATCH = r"""name=${JOBORCH_MARK//-/} scratch=$PWD/tmp
name=jo-${name:0:12}.$2
for base in "${TMPDIR%/}" /tmp; do
    [ "${base:0:1}" = / ] && [ ${#base} -le @LONGEST@ ] && mkdir -m 700 "$base/$name" 2>/dev/null && scratch=$base/$name && break
done
if [ "$scratch" = "$PWD/tmp" ]; then mkdir -p tmp; else ln -sfn "$scratch" tmp; fi 2>/dev/null
export TMPDIR=$scratch
"""
SCRATCH_BASE_BYTES = 40  # a socket's path has at most 107 bytes (unix(7)); Python's multiprocessing adds 32, other programs more

CHILDREN_FILE = f"/proc/self/task/{os.getpid()}/children"  # of the main thread, which gets the orphans (proc(5))


@dataclass(frozen=True)
class Outcome:
    """The state of a started payload: `alive`, perhaps with `waits`, or how it ended."""

    alive: bool
    exit_status: int | None = None  # as in the shell: 128 plus the signal's number if a signal killed it
    children_left: bool = False
    cause: Cause | None = None  # set if there is no exit status, or if the script did not cause the end
    reason: str = ""
    told: bool = False  # the wrapper got a signal to stop, and perhaps run.sh, too
    waits: str = ""  # why it has not started, in the batch system's words; constant while nothing changes


class Executor(Protocol):
    """The interface of everything that runs payloads. Several threads call it. A handle is a text that outlives the client's process."""

    is_batch: bool
    """True if payloads may wait after the start, time limits are enforced elsewhere, and each job takes one slot."""

    def start(self, job: Job) -> str:
        """Start the attempt and return its handle. The row says Running before this is called.

        Raises OSError if it cannot be started now, CannotRun if it never can, and BackendUnavailable if that is unknown: then
        the client calls `find` before it starts the attempt again.
        """

    def find(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Return the handles, by mark, of attempts whose start was interrupted. Attempts that are missing never ran.

        An empty handle means: not known yet. Raises BackendUnavailable if nothing is known about any attempt.
        """

    def poll(self, jobs: Sequence[Job]) -> dict[int, Outcome]:
        """Return the outcome of these payloads, by id, with one call to a batch system. If that does not answer, all count as alive."""

    def cancel(self, job: Job) -> None:
        """Kill the payload; return when none of its processes runs, or raise StillRunning. May be repeated."""

    def collect(self, job: Job) -> None:
        """Fetch the outputs into the payload's folder, unless it is shared. After BackendUnavailable the caller tries again."""

    def end_orphans(self, marks: Sequence[str]) -> None:
        """Kill attempts that are no longer in any database."""

    def problem(self) -> str:
        """Return why it cannot work now and since when; an empty text if all is well."""

    def examine(self) -> Iterator[Finding]:
        """Yield findings for `joborch doctor`, without starting a job."""


def read_exit(folder: Path) -> Outcome | None:
    """Return the outcome in the wrapper's exit file, or None if the file is missing or incomplete."""
    try:
        with open_regular(folder, "exit.json") as file:
            said = parse_json(file.read(400))
        status, cause = said["status"], Cause.LIMIT if said.get("limit") else None
        fits = type(status) is int and 0 <= status < 256
        reason = one_line(str(said.get("reason", "")), 200)
        if said.get("gone") and cause is None and fits:
            cause, reason = Cause.INFRASTRUCTURE, Reason.WORK_GONE_EXIT.format(status=status)
        return Outcome(False, status, bool(said["left"]), cause, reason, told=bool(said.get("told"))) if fits else None
    except PermissionError:
        with contextlib.suppress(OSError):
            give_rights(folder)  # the script removed the folder's permissions; the next call succeeds
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # missing, incomplete, or replaced by the script


def why_not_runnable(script: Path) -> str:
    """Return why a payload's run.sh cannot be run, or an empty text."""
    if not script.is_file():
        return Reason.NO_SCRIPT
    if script.stat().st_size == 0:
        return Reason.EMPTY_SCRIPT
    return ""


def run_times(folder: Path, job: Job) -> tuple[float | None, float]:
    """Return when a payload started and ended: the times of the wrapper's files, or of the clock if they are gone.

    The start is None if it never started: its claim is missing, or empty because it only fences the attempt.
    """
    if job.started_at is None and not read_claim(folder, job.attempt):
        return None, time.time()
    times = []
    for name in (f"started.{job.attempt}", "exit.json"):
        try:
            times.append(state_below(folder, name).st_mtime)
        except OSError:
            times.append(job.started_at or time.time() if not times else time.time())
    return times[0], max(times)


def boot_id() -> str:
    """Return a unique id of this boot and of this container (by the start of its process 1)."""
    return f"{kernel_boot_id()}.{process_start(1) or 0}"


def process_start(pid: int) -> str | None:
    """Return when a process started (clock ticks since boot, field 22 of proc(5)), or None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


@dataclass(frozen=True)
class Process:
    """One process, as /proc shows it."""

    pid: int
    parent: int
    group: int
    session: int
    start: str
    terminal: int = 0  # 0: none


def all_processes() -> list[Process]:
    """Return every process that is not a zombie."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            text = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        fields = text.rpartition(")")[2].split()
        if fields[0] not in ("Z", "X"):
            found.append(Process(int(name), int(fields[1]), int(fields[2]), int(fields[3]), fields[19], int(fields[4])))
    return found


def bears_mark(pid: int, mark: str) -> bool:
    """Tell whether a process has an attempt's key in its environment."""
    try:
        return f"\0JOBORCH_MARK={mark}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False  # it ended, or belongs to another user


def marks_of(process: Process, jobs: Path) -> list[bytes]:
    """Return the marks of the payloads below `jobs` that a process belongs to, judged by this process alone; mostly none.

    A mark in its environment is proof. A working folder below `jobs` is not: a person may be there with a shell or an
    editor. It counts only for an orphan without a terminal whose environment was emptied.
    """
    try:
        environment = b"\0" + Path(f"/proc/{process.pid}/environ").read_bytes()
        marks = re.findall(rb"\0JOBORCH_MARK=([^\0]+)(?=\0)", environment)
        # People's processes have a HOME, systemd's services an INVOCATION_ID.
        others = re.search(rb"\0(HOME|INVOCATION_ID)=", environment) and b"\0JOBORCH_ATTEMPT=" not in environment
        if marks or others or process.terminal:
            return marks
        where, place = os.readlink(f"/proc/{process.pid}/cwd".encode()), os.fsencode(jobs) + b"/"
        return [where[len(place) :].split(b"/")[0]] if where.startswith(place) and is_orphan(process) else []
    except OSError:
        return []  # it ended, or belongs to another user


def is_orphan(process: Process) -> bool:
    """Tell whether a process was taken over by this client, by process 1, or by a user's systemd."""
    if process.parent in (1, os.getpid()):
        return True
    return Path(f"/proc/{process.parent}/comm").read_text(encoding="utf-8", errors="replace") == "systemd\n"


class ProcessTable:
    """All processes, each with the marks of payloads below `jobs`. Threads that ask at the same time share one look at /proc."""

    def __init__(self, jobs: Path) -> None:
        self.jobs, self.changed, self.begun, self.done = jobs, threading.Condition(), 0, 0
        self.found: list[tuple[Process, list[bytes]]] = []

    def look(self) -> list[tuple[Process, list[bytes]]]:
        """Return what was found by a look that began after this call."""
        with self.changed:
            next_look = self.begun + 1
            while self.done < next_look and self.begun > self.done:
                self.changed.wait()
            if self.done >= next_look:
                return self.found
            self.begun += 1
        found: list[tuple[Process, list[bytes]]] | None = None
        try:
            # Process 1 and kernel threads may have session and group 0, which belong to no payload.
            everything = [process for process in all_processes() if process.pid != 1 and process.group != 0]
            found = [(process, marks_of(process, self.jobs)) for process in everything]
            return found
        finally:
            with self.changed:
                if found is None:
                    self.begun = self.done  # those who wait look themselves
                else:
                    self.done, self.found = self.begun, found
                self.changed.notify_all()


process_table = functools.lru_cache(maxsize=8)(ProcessTable)


def tree_of(job: Job, folder: Path, wrapper_pid: int, known: Collection[Process] = ()) -> list[Process]:
    """Return all running processes of an attempt, including those `known` from an earlier call: their parents may be gone."""
    return belonging({os.fsencode(job.mark)}, folder.parent, wrapper_pid, known)


def belonging(marks: set[bytes], jobs: Path, session: int = 0, known: Collection[Process] = ()) -> list[Process]:
    """Return all processes of these attempts: by mark (see `marks_of`) or session, and then by parent and group."""
    looked = process_table(jobs).look()
    everything, before = [process for process, _ in looked], {(process.pid, process.start) for process in known}
    found = {
        process.pid
        for process, its_marks in looked
        if process.session == session != 0 or (process.pid, process.start) in before or not marks.isdisjoint(its_marks)
    }
    grown = -1
    while grown != len(found):
        grown = len(found)
        groups = {process.group for process in everything if process.pid in found}
        found |= {process.pid for process in everything if process.parent in found or process.group in groups}
    return [process for process in everything if process.pid in found and process.pid != os.getpid()]


def marked_below(jobs: Path) -> set[str]:
    """Return the marks of all payloads below `jobs` that have a running process, with one pass over /proc."""
    return {os.fsdecode(mark) for process in all_processes() for mark in marks_of(process, jobs)}


def become_subreaper() -> bool:
    """Adopt the processes that payloads orphan (prctl(2)), to find them without reading all of /proc. Return whether that works."""
    pr_set_child_subreaper = 36
    return bool(libc().prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0 and os.path.exists(CHILDREN_FILE))


def signal_all(processes: Iterable[Process], number: int) -> None:
    """Send a signal to each of these processes; one that has ended is fine."""
    for process in processes:
        # ProcessLookupError: it has ended. PermissionError: it has changed its user.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)


OOM_HANDICAP = 500  # in thousandths of all memory: if that runs out, the kernel kills a script before the client or server


def handicap() -> str:
    """Return a shell line that makes the kernel kill the script first if memory runs out (proc(5)). It needs no privilege."""
    own = int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
    return f"echo {min(1000, own + OOM_HANDICAP)} 2>/dev/null >/proc/self/oom_score_adj; "


def wrapper_text(data: DataFolder, first: str = "", before_script: str = "", file_limit: str = "", here: bool = False) -> bytes:
    """Return the wrapper with this process's original umask and, if `file_limit` is given, a soft limit of open files.

    It runs `first` at its start and `before_script` just before the script. Unless it runs `here`, it makes TMPDIR itself.
    """
    scratch = "" if here else NODE_SCRATCH.replace("@LONGEST@", str(SCRATCH_BASE_BYTES))
    files = f"; ulimit -Sn {file_limit}" if file_limit else ""
    text = WRAPPER.replace("@UMASK@", f"{data.umask:04o}").replace("@FILES@", files).replace("@FIRST@", first)
    return text.replace("@BEFORE@", before_script).replace("@SCRATCH@", scratch).encode()


# -- scratch: what a script's TMPDIR is --


def scratch_bases(environment: Mapping[str, str]) -> list[str]:
    """Return the folders in which TMPDIR may be created: the site's TMPDIR, and /tmp."""
    bases = (environment.get("TMPDIR", "").rstrip("/"), "/tmp")
    return [base for base in bases if base.startswith("/") and len(os.fsencode(base)) <= SCRATCH_BASE_BYTES]


def scratch_name(mark: str) -> str:
    """Return the unique name of an attempt's TMPDIR."""
    job_uuid, _, attempt = mark.partition(".")
    return f"jo-{job_uuid.replace('-', '')[:12]}.{attempt}"


def make_scratch(folder: Path, bases: Sequence[str]) -> str:
    """Create an attempt's TMPDIR in one of `bases` and link `tmp` in the payload's folder to it. If that fails, use `tmp` itself."""
    note = folder / "tmp"
    for base in bases:
        place = f"{base}/{scratch_name(folder.name)}"
        try:
            if not is_own_scratch(place):
                os.mkdir(place, 0o700)
            if note.is_symlink():
                note.unlink()  # from before a crash; the site's TMPDIR may have changed since
            os.symlink(place, note)
            return place
        except OSError as error:
            log.debug("no TMPDIR in %s: %s", base, error)
    if note.is_symlink():
        note.unlink()
    note.mkdir(exist_ok=True)
    return str(note)


def is_own_scratch(place: str) -> bool:
    """Tell whether this is a folder that belongs to this user, not a link."""
    try:
        state = os.lstat(place)
    except OSError:
        return False
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid()


def read_claim(folder: Path, attempt: int) -> str | None:
    """Return the wrapper's claim: its process id, and `ready` once the script can start. None if there is no claim."""
    try:
        with open_regular(folder, f"started.{attempt}") as file:
            return file.read(40).decode("ascii", "replace")
    except FileNotFoundError:
        return None
    except OSError:
        return ""  # the script replaced it


# == 22. Local executor ==  Starts, watches and kills payloads on this machine: all processes of a payload, and no others.


class Engines:
    """The container engines of this machine. Their containers are not children of the payload and outlive its processes."""

    NAMES = ("docker", "podman")
    CALL_S, STOP_S = 5.0, 2  # limit of a call, plus the time it asks for; from TERM to KILL in a container
    AWAY_S = 60.0  # how long an engine that failed is not called again

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment, path = environment, environment.get("PATH")
        self.engines = [found for found in (shutil.which(name, path=path) for name in self.NAMES) if found]
        self.away_until: dict[str, float] = {}  # monotonic, by engine

    def stop_mounting(self, folder: Path) -> None:
        """Stop the containers that mount a payload's folder or something in it."""
        for engine in self.engines:
            if self.away_until.get(engine, 0.0) > time.monotonic():
                continue
            try:
                self.stop_in(engine, folder)
            except (OSError, subprocess.SubprocessError) as error:
                self.away_until[engine] = time.monotonic() + self.AWAY_S
                words = getattr(error, "stderr", None) or str(error).encode()
                log.info("%s cannot list containers of payloads: %s", engine, one_line(words.decode("utf-8", "replace"), 200))

    def stop_in(self, engine: str, folder: Path) -> None:
        """Stop those of one engine. Raises OSError or SubprocessError."""
        running = self.call(engine, "ps", "--quiet", "--no-trunc").split()
        if not running:
            return
        places = {str(folder), os.path.realpath(folder)}
        chosen = []
        for line in self.call(engine, "inspect", "--format", "{{.Id}}{{range .Mounts}}|{{.Source}}{{end}}", *running).splitlines():
            name, *sources = line.split("|")
            if any(source == place or source.startswith(f"{place}/") for source in sources for place in places):
                chosen.append(name)
        if chosen:
            log.info("containers that mount %s are stopped by %s: %s", folder.name, engine, ", ".join(chosen))
            self.call(engine, "stop", "-t", str(self.STOP_S), *chosen, more_s=self.STOP_S * len(chosen))

    def call(self, engine: str, *words: str, more_s: float = 0.0) -> str:
        done = subprocess.run(
            [engine, *words],
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=self.CALL_S + more_s,
            check=True,
        )
        return done.stdout.decode("utf-8", "replace")


REST_S, TERM_S = 2.0, 0.5  # processes that a script left may exit by themselves, then get TERM, then KILL; the wrapper does the same
STOP_STATUSES = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)}
STOP_NEAR_S = 5.0  # between the end of a script and of its client, if one signal stopped both


class LocalExecutor:
    """Runs payloads as processes of this machine. A handle is `pid start boot`: process ids are reused, boot ids are not."""

    is_batch = False

    def __init__(
        self,
        data: DataFolder,
        kill_grace_s: float,
        pass_env: Sequence[str] = (),
        options: Callable[[str | None], BatchOptions] = lambda service: BatchOptions(),
    ) -> None:
        self.data, self.kill_grace_s, self.options = data, kill_grace_s, options
        self.scratch_bases = scratch_bases(os.environ)
        self.boot, self.inherited = boot_id(), passed_on(os.environ, pass_env)
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.seen: set[str] = set()  # marks of attempts that this process saw running and that have no exit file yet
        self.own: set[str] = set()  # marks of attempts that this process started: their orphans become its children
        self.untidy: set[str] = set()  # marks of attempts that left processes running, which were killed
        self.resting: dict[str, float] = {}  # by mark, monotonic: since when the processes that an attempt left may exit by themselves
        self.reaps_orphans, self.engines = become_subreaper(), Engines(self.inherited)
        self.wrapper = wrapper_text(data, before_script=handicap(), file_limit=first_file_limit_text(), here=True)
        self.cancelled: set[str] = set()  # marks of attempts that are being killed now
        self.awaited: set[int] = set()  # process ids of wrappers that `wait` waits for
        self.unseen = False  # one that nobody waited for has ended since `is_end_awaited` was asked

    def start(self, job: Job) -> str:
        folder = self.data.job(job.mark)
        environment = payload_environment(job, folder, self.inherited, self.options(job.service).prelude)
        environment["TMPDIR"] = make_scratch(folder, self.scratch_bases)
        crash_point("run.prepared")
        # close_fds=False: all are close-on-exec (close_at_exec), and subprocess can use vfork.
        # The wrapper's text, not its path, so nobody can replace the file.
        child = subprocess.Popen(
            ["bash", "-c", self.wrapper, "joborch-wrapper", str(folder), str(job.attempt)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            start_new_session=True,
        )
        self.children[child.pid] = child
        self.seen.add(job.mark)
        self.own.add(job.mark)
        return f"{child.pid} {process_start(child.pid) or 0} {self.boot}"

    def wait(self, job: Job, patience_s: float) -> bool:
        """Wait for the end of a payload that this process started; tell whether it has ended. Kernels before 5.3 cannot say."""
        pid = int((job.handle or "0").split(" ")[0])
        if not pid:
            return False  # it could not be started
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        except (OSError, AttributeError):
            return False
        self.awaited.add(pid)
        try:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(patience_s * 1000))
        finally:
            self.awaited.discard(pid)
            os.close(descriptor)

    def is_child(self, job: Job) -> bool:
        """Tell whether a payload's wrapper is a child of this process that has not ended, as far as it knows."""
        return int((job.handle or "0").split(" ")[0]) in self.children

    def is_end_awaited(self) -> bool:
        """Tell whether somebody waits for each payload that this process has started, so that the end of a child is no news.

        Asked after each end of a child: whichever thread has taken in that of another payload meanwhile, it is news.
        """
        unseen, self.unseen = self.unseen, False
        return not unseen and set(self.children) <= self.awaited

    def find(self, jobs: Sequence[Job]) -> dict[str, str]:
        handles = {}
        for job in jobs:
            pid = self.claimed_pid(job)
            if pid is not None:
                ours = pid and bears_mark(pid, job.mark)
                handles[job.mark] = f"{pid} {process_start(pid) or 0} {self.boot}" if ours else f"0 0 {self.boot}"
        return handles

    def claimed_pid(self, job: Job) -> int | None:
        """Return the process id in the wrapper's claim; 0 if it has none, None if there is no claim."""
        said = read_claim(self.data.job(job.mark), job.attempt)
        first = (said or "").split("\n")[0]
        return None if said is None else int(first) if re.fullmatch("[0-9]{1,10}", first) else 0

    def poll(self, jobs: Sequence[Job]) -> dict[int, Outcome]:
        """Return the outcomes. Processes that an ended payload left are killed first; until then it counts as alive."""
        orphans = self.reap()
        outcomes = {job.id: self.outcome(job) for job in jobs}
        ended = [job for job in jobs if not outcomes[job.id].alive]
        for job in self.left_running(ended, orphans):
            outcomes[job.id] = Outcome(True)
        for job in ended:
            if not outcomes[job.id].alive:
                outcomes[job.id] = dataclasses.replace(
                    outcomes[job.id], children_left=outcomes[job.id].children_left or job.mark in self.untidy
                )
                self.forget(job)
                if outcomes[job.id].children_left and self.engines.engines:
                    place = self.data.job(job.mark)
                    threading.Thread(target=self.engines.stop_mounting, args=(place,), name=f"engines-{job.id}", daemon=True).start()
        return outcomes

    def forget(self, job: Job) -> None:
        for marks in (self.seen, self.own, self.untidy):
            marks.discard(job.mark)
        self.resting.pop(job.mark, None)

    def reap(self) -> bool:
        """Reap children and orphans that have ended. Return whether other orphans are alive.

        The main thread starts only payloads, so any other child of it was orphaned by one.
        """
        for child in list(self.children.values()):
            if child.poll() is not None:
                self.unseen = (
                    self.unseen or child.pid not in self.awaited
                )  # first: see is_end_awaited  # reap only known ids: waitpid(-1) would steal those of other threads
                self.children.pop(child.pid, None)  # another thread may have been quicker
        if not self.reaps_orphans:
            return True  # there may be some
        alive = 0
        for pid in map(int, Path(CHILDREN_FILE).read_text(encoding="ascii").split()):
            if pid not in self.children:
                with contextlib.suppress(ChildProcessError):  # another thread was quicker
                    alive += os.waitpid(pid, os.WNOHANG) == (0, 0)
        return alive > 0

    def left_running(self, ended: Sequence[Job], orphans: bool) -> list[Job]:
        """Kill processes that these payloads left running. Return the payloads that had such processes.

        Processes in the script's session may exit by themselves for REST_S, then get TERM: they may still write output.
        """
        suspects = [job for job in ended if orphans or job.mark not in self.own]
        marked = marked_below(self.data.jobs) if suspects else set()
        left = []
        for job in suspects:
            wrapper = int((job.handle or "0").split(" ")[0])  # it may still be exiting
            processes = tree_of(job, self.data.job(job.mark), 0) if job.mark in marked else []
            processes = [process for process in processes if process.pid != wrapper]
            if not processes:
                continue
            left.append(job)
            rested_s = time.monotonic() - self.resting.setdefault(job.mark, time.monotonic())
            if rested_s < REST_S and any(process.session == wrapper for process in processes):
                continue
            self.untidy.add(job.mark)
            if rested_s < REST_S + TERM_S and any(process.session == wrapper for process in processes):
                signal_all(processes, signal.SIGTERM)
                continue
            signal_all(processes, signal.SIGSTOP)  # stopped processes cannot fork faster than we look
            signal_all(processes, signal.SIGKILL)
        return left

    def outcome(self, job: Job) -> Outcome:
        pid, start, boot = (job.handle or f"0 0 {self.boot}").split(" ")
        if boot != self.boot:  # an exit file proves nothing: the script's files may not have reached the disk
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.REBOOTED)
        if int(pid) in self.children or (int(pid) and process_start(int(pid)) == start):
            self.seen.add(job.mark)
            return Outcome(True)  # whatever the exit file says: the script may have forged it
        return self.outcome_without_wrapper(job, self.data.job(job.mark))

    def outcome_without_wrapper(self, job: Job, folder: Path) -> Outcome:
        """Judge a payload if the wrapper in its handle is gone."""
        claimed = self.claimed_pid(job)
        # The handle may name a second wrapper, which stopped because the first has the claim.
        if claimed and bears_mark(claimed, job.mark):
            return Outcome(True)
        ended = read_exit(folder)
        if ended:
            return self.stopped_by_others(job, folder, ended) or ended
        if not folder.is_dir() or folder.is_symlink():
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.FOLDER_REMOVED)
        if "ready" not in (read_claim(folder, job.attempt) or ""):
            if job.mark in marked_below(self.data.jobs):
                return Outcome(True)  # its wrapper is about to claim it, or a process outlived the wrapper
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.DISK_FULL if is_full(folder) else Reason.NO_WRAPPER)
        if job.mark not in self.seen:
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.ENDED_WITH_CLIENT)
        return Outcome(False, cause=Cause.USER, reason=Reason.WRAPPER_KILLED)

    def stopped_by_others(self, job: Job, folder: Path, ended: Outcome) -> Outcome | None:
        """Return the outcome of a payload that was stopped from outside joborch, as by a service manager; else None.

        The exit status does not matter, not even 0: a script that handles TERM leaves an incomplete result.
        """
        alone = not ended.told
        if (alone and ended.exit_status not in STOP_STATUSES) or (folder / f"ending.{job.attempt}").exists():
            return None  # not stopped, or stopped by the client
        if alone and not self.ended_with_client(folder):
            return None  # the script sent the signal to itself
        how = Reason.STOPPED_WITH_CLIENT if alone else Reason.STOPPED_WITH_WRAPPER
        return dataclasses.replace(ended, cause=Cause.INFRASTRUCTURE, reason=how.format(status=ended.exit_status))

    def ended_with_client(self, folder: Path) -> bool:
        """Tell whether a script ended just when a client on this data folder was stopped."""
        try:
            stopped_at = os.stat(self.data.path / STOP_NOTE).st_mtime
            return abs(state_below(folder, "exit.json").st_mtime - stopped_at) <= STOP_NEAR_S
        except OSError:
            return False  # no client was ever stopped here

    def own_wrapper(self, job: Job) -> int:
        """Return the process id (and session) of an attempt's wrapper; 0 if it is unknown or another process has that id now."""
        pid, start, boot = (job.handle or f"0 0 {self.boot}").split(" ")
        if boot != self.boot:
            return 0
        if pid == "0":
            claimed = self.claimed_pid(job) or 0
            return claimed if claimed and bears_mark(claimed, job.mark) else 0
        # The kernel reuses no id while its session has members: if the leader is gone, the rest belongs to the attempt.
        return int(pid) if process_start(int(pid)) in (None, start) else 0

    def cancel(self, job: Job) -> None:
        with self.cancelling(job.mark):
            self.end_tree(job, self.data.job(job.mark), self.own_wrapper(job))

    @contextlib.contextmanager
    def cancelling(self, mark: str) -> Iterator[None]:
        """Count a kill under way: the more there are, the less often each of them reads all of /proc."""
        self.cancelled.add(mark)
        try:
            yield
        finally:
            self.cancelled.discard(mark)

    def end_tree(self, job: Job, folder: Path, pid: int) -> None:
        """Send TERM to all processes of a payload, and KILL after the grace time. Return when none is left, or raise StillRunning."""
        known = tree_of(job, folder, pid)
        signal_all(known, signal.SIGTERM)
        deadline = time.monotonic() + self.kill_grace_s
        while time.monotonic() < deadline and (found := self.still_there(job, folder, pid, known)):
            known = found
            pause_s = min(0.2, 0.02 * len(self.cancelled))
            time.sleep(pause_s - time.monotonic() % pause_s)  # all at the same time, to share a look
        for _ in range(200):
            if not self.still_there(job, folder, pid, known) and not self.still_there(job, folder, pid, known):
                self.forget(job)
                self.engines.stop_mounting(folder)
                return
            # Stop them first, or they could fork faster than we look.
            known = tree_of(job, folder, pid, known)
            signal_all(known, signal.SIGSTOP)
            known = tree_of(job, folder, pid, known)
            signal_all(known, signal.SIGKILL)
            time.sleep(0.01)
        raise StillRunning(f"payload {job.id}: its processes do not end after KILL")

    def still_there(self, job: Job, folder: Path, pid: int, known: Collection[Process]) -> list[Process]:
        self.reap()
        return tree_of(job, folder, pid, known)

    def collect(self, job: Job) -> None:
        """Do nothing: the outputs are on this machine."""

    def end_orphans(self, marks: Sequence[str]) -> None:
        signal_all(belonging(set(map(os.fsencode, marks)), self.data.jobs), signal.SIGKILL)

    def problem(self) -> str:
        return ""

    def examine(self) -> Iterator[Finding]:
        bash = shutil.which("bash")
        yield Finding(bool(bash), f"scripts are run by {bash}" if bash else "there is no bash, which runs the scripts: install it")


def run_seconds(started: float | None, ended: float, passed_s: float) -> float:
    """Return how long a script ran in seconds, by the times of its files; `passed_s` if the clock was set meanwhile."""
    return ended - started if started is not None and 0 <= ended - started <= passed_s + 1 else max(0.0, passed_s)


def make_executor(data: DataFolder, config: Config) -> Executor:
    """Return the executor of a client. Raises ConfigError if JOBORCH_EXECUTOR does not name a usable one."""
    if config.executor == "local":
        return LocalExecutor(data, config.kill_grace_s, config.pass_env, config.batch_options)
    try:
        made: Executor = load_plugin(config.executor)(data, config)
    except (ImportError, AttributeError) as error:
        if config.executor in PLUGINS:
            raise
        remedy = "give local, slurm, dirac, or the package.module:Class of a class that Python can import (see PYTHONPATH)"
        raise ConfigError(f"JOBORCH_EXECUTOR is {config.executor!r}: {error}: {remedy}") from error
    return made


# == 23. Inheritance ==  A script gets only the listed variables of its client, so no secret reaches it by accident.

# Passed on to every script. JOBORCH_PASS_ENV adds names; joborch's own settings are never passed on.
PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "TERM", "LANG", "LANGUAGE", "LC_*", "TZ", "LOCPATH", "LOCALE_ARCHIVE"),
    *("XDG_*_HOME", "XDG_*_DIRS", "XDG_RUNTIME_DIR", "SCRATCH", "WORK", "PROJECT"),
    # Environment Modules and Lmod, and what loaded modules have set
    *("MODULE*PATH", "MODULE*HOME", "MODULERCFILE", "MODULES_*", "__MODULES_*", "*_modshare", "*_modquar", "__modquar_*"),
    *("LOADEDMODULES", "_LMFILES_", "LMOD_*", "__LMOD_*", "_ModuleTable*", "BASH_ENV", "ENV", "FPATH", "BASH_FUNC_*"),
    *("EASYBUILD_*", "EBROOT*", "EBVERSION*", "EBDEVEL*", "EBEXTS*", "SPACK_*", "CRAY*", "PE_*", "PE_ENV", "GUIX_*"),
    *("CONDA_*", "_CE_*", "MAMBA_*", "VIRTUAL_ENV", "NIX_PATH", "NIX_PROFILES"),
    # libraries, and packages of programming languages
    *("LD_LIBRARY_PATH", "LD_RUN_PATH", "LD_PRELOAD", "LIBRARY_PATH", "CPATH", "*_INCLUDE_PATH", "MANPATH", "INFOPATH", "PKG_CONFIG_PATH"),
    *("CC", "CXX", "FC", "F77", "F90", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "PERL5LIB", "PERLLIB"),
    *("R_LIBS*", "R_HOME", "JULIA_*", "CLASSPATH", "GEM_HOME", "GEM_PATH", "RUBYLIB", "LUA_PATH", "LUA_CPATH", "TCLLIBPATH"),
    # accelerators, threads, MPI
    *("CUDA_*", "NVIDIA_*", "NCCL_*", "ROCR_*", "ROCM_*", "HIP_*", "HSA_*", "ZE_*", "ONEAPI_*", "SYCL_*", "GPU_DEVICE_ORDINAL"),
    *("OMP_*", "MKL_*", "OPENBLAS_*", "BLIS_*", "KMP_*", "GOMP_*", "NUMEXPR_*", "I_MPI_*", "OMPI_*", "PRTE_*", "MPICH_*", "UCX_*", "FI_*"),
    # batch systems and containers
    *("SLURM_*", "SBATCH_*", "PBS_*", "LSB_*", "APPTAINER_*", "SINGULARITY_*"),
    # the network
    *("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NIX_SSL_CERT_FILE", "GIT_SSL_CAINFO", "X509_CERT_DIR"),
)
PLACES = re.compile(r"\w+_(HOME|ROOT|DIR|PATH|PREFIX|BIN|LIB|INC|INCLUDE)")  # environment modules use such names; passed on if it is a path
# A family such as CONDA_* may include secrets, and the URL of a proxy a password: these are passed on only by JOBORCH_PASS_ENV.
SECRET_NAMES = re.compile(
    r"PASS|SECRET|TOKEN|CREDENTIAL|AUTH|LOGIN|USERNAME|COOKIE|JWT|_KEY$|(API|ACCESS|PRIVATE)_?KEY|^(APPTAINER|SINGULARITY)_ENV$",
    re.IGNORECASE,
)
LOGIN_IN_URL = re.compile(r"//[^/\s@]*@|^[^/\s@]*:[^/\s@]*@")


def fits_one(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a name matches one of these patterns, in which `*` matches any text."""
    rule = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns) or r"(?!)")
    return lambda name: bool(rule.match(name))


def is_own_setting(name: str) -> bool:
    """Tell whether a variable is a setting of joborch: the client's PORT and tokens are not for scripts."""
    return name.startswith(("JOBORCH_", "SERVICE_")) or any(name == setting.name for setting in SETTINGS)


def passed_on(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """Return the part of the client's environment that scripts get: what PASSED_ON and `more` (JOBORCH_PASS_ENV) list."""
    listed, wanted, plain = fits_one(PASSED_ON), fits_one(more), {name for name in PASSED_ON if "*" not in name}

    def is_passed(name: str, value: str) -> bool:
        if is_own_setting(name) or wanted(name):
            return not is_own_setting(name)
        if name in plain or name.startswith("BASH_FUNC_"):
            return not ("proxy" in name.lower() and LOGIN_IN_URL.search(value))
        known = listed(name) or (PLACES.fullmatch(name) and value.startswith("/"))
        return bool(known) and not SECRET_NAMES.search(name) and not LOGIN_IN_URL.search(value)

    return {name: value for name, value in environment.items() if is_passed(name, value)}


def left_out(environment: Mapping[str, str], more: Sequence[str]) -> list[str]:
    """Return the sorted names of the variables that scripts do not get, without joborch's own."""
    kept = passed_on(environment, more)
    return sorted(name for name in environment if name not in kept and not is_own_setting(name))


def payload_environment(job: Job, folder: Path, inherited: Mapping[str, str], prelude: str = "") -> dict[str, str]:
    """Return the wrapper's environment: inherited variables, those of the job, and the commands to run before the script."""
    ours = {
        "JOBORCH_JOB_ID": job.remote_id or str(job.id),
        "JOBORCH_ATTEMPT": str(job.attempt),
        "JOBORCH_SERVICE": job.service or "",
        "JOBORCH_USER_ID": "" if job.user_id is None else str(job.user_id),
        "JOBORCH_CPUS": str(job.cpus),
        "JOBORCH_MEMORY": "" if job.memory is None else str(job.memory),
        "JOBORCH_MARK": job.mark,
        "TMPDIR": str(folder / "tmp"),
    }
    return {**inherited, **ours, **({"JOBORCH_PRELUDE": prelude} if prelude else {})}


def node_environment(job: Job, inherited: Mapping[str, str], prelude: str) -> dict[str, str]:
    """Return the wrapper's environment on another machine, without TMPDIR, which the wrapper sets there."""
    words = payload_environment(job, Path(), {}, prelude)
    del words["TMPDIR"]
    return {**inherited, **words}


@functools.lru_cache(maxsize=1)
def first_file_limit() -> tuple[int, int]:
    """Return the soft and hard limit of open files at the start of this process; payloads get the same."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def raise_file_limit() -> None:
    """Raise the soft limit of open files, usually 1,024, to the hard one: each connection needs a file."""
    most = 65_536  # even without a hard limit, because some programs loop over all possible descriptors
    soft, hard = first_file_limit()
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit of open files stays at %d: it cannot be raised to %d (%s)", soft, wanted, error)


def first_file_limit_text() -> str:
    """Return the first soft limit of open files for `ulimit -Sn`; empty if it was not raised."""
    soft = first_file_limit()[0]
    return "" if soft == resource.getrlimit(resource.RLIMIT_NOFILE)[0] else str(soft)


def with_first_file_limit(command: Sequence[str]) -> list[str]:
    """Return a command that runs with the first limit of open files: sbatch(1) passes its limit on to jobs."""
    limit = first_file_limit_text()
    return ["sh", "-c", f'ulimit -Sn {limit}; exec "$0" "$@"', *command] if limit else list(command)


# == 24. Transfers ==  Files are streamed and verified by digests. After a break, only the rest is sent again.


class FilesBody:
    """A multipart body that is read from the files while it is sent. Its length is known beforehand."""

    def __init__(self, folder: Path, paths: Sequence[str], with_digests: bool, inputs_sha256: str | None = None) -> None:
        """If `inputs_sha256` is given, reading raises InputsChanged before the end if the files do not match it."""
        self.inputs_sha256 = inputs_sha256
        self.boundary = secrets.token_hex(16)
        self.folder, self.with_digests = folder, with_digests
        self.digests: dict[str, str] = {}
        states = [(path, os.stat(folder / path)) for path in paths]
        self.parts = [(path, self.part_head(path, state.st_mode), state.st_size) for path, state in states]
        digest_bytes = sum(len(json.dumps(path)) + 70 for path in paths) + 2
        self.digest_head = f'--{self.boundary}\r\nContent-Disposition: form-data; name="{DIGESTS_FIELD}"\r\n\r\n'.encode()
        self.digest_room = digest_bytes if with_digests else 0
        ends = len(f"--{self.boundary}--\r\n") + (len(self.digest_head) + digest_bytes + 2 if with_digests else 0)
        self.length = sum(len(head) + size + 2 for _, head, size in self.parts) + ends
        self.rewind()

    def rewind(self) -> None:
        """Start from the beginning, to send the body again."""
        self.chunks, self.rest = self.generate(), b""

    def part_head(self, path: str, mode: int) -> bytes:
        """Return the header of one part. `name` is the path with HTML 5 escapes; joborch reads the exact path from X-Joborch-Path."""
        escaped = os.fsencode(path).replace(b'"', b"%22").replace(b"\r", b"%0D").replace(b"\n", b"%0A")
        base = escaped.rpartition(b"/")[2]
        exact = quote(os.fsencode(path)).encode()
        disposition = b'Content-Disposition: form-data; name="' + escaped + b'"; filename="' + base + b'"'
        kind, place = b"Content-Type: application/octet-stream", b"X-Joborch-Path: " + exact
        lines = (b"--" + self.boundary.encode(), disposition, kind, place, b"X-Joborch-Mode: %03o" % (mode & 0o777))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def generate(self) -> Iterator[bytes]:
        for path, head, size in self.parts:
            yield head
            digest, missing = hashlib.sha256(), size
            with open(self.folder / path, "rb", buffering=0) as source:
                for chunk in file_chunks(source, size):
                    digest.update(chunk)
                    missing -= len(chunk)
                    yield chunk
            if missing:  # the length was sent already, so anything else would be read as the rest of this file
                raise OSError(errno.EIO, f"{shown(path)} became shorter while it was sent")
            self.digests[path] = digest.hexdigest()
            yield b"\r\n"
        if self.inputs_sha256 not in (None, inputs_digest(self.digests)):
            raise InputsChanged("its files on the server's disk are not those that were uploaded: some were changed or removed")
        if self.with_digests:
            yield self.digest_head + json.dumps(self.digests, separators=(",", ":")).encode().ljust(self.digest_room) + b"\r\n"
        yield f"--{self.boundary}--\r\n".encode()

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next part of the body, at most `size` bytes."""
        size = size if size > 0 else CHUNK_BYTES
        pieces, have = [self.rest], len(self.rest)
        while have < size:
            chunk = next(self.chunks, b"")
            if not chunk:
                break
            pieces.append(chunk)
            have += len(chunk)
        data = b"".join(pieces)
        self.rest = data[size:]
        return data[:size] if self.rest else data


class Transfer:
    """A file that arrives over the network, in several pieces if a transfer breaks: the part that arrived, and the file's ETag."""

    def __init__(
        self, target: IO[bytes], promise: Promise | None = None, limit_bytes: int = 2**62, limits: ResultLimits | None = None
    ) -> None:
        """With a `promise` of disk space, writing raises DiskFull if the data does not fit.

        It raises ResultTooLarge above `limit_bytes`; the message names `limits`.
        """
        self.target, self.promise, self.limit_bytes, self.limits = target, promise, limit_bytes, limits or ResultLimits(limit_bytes)
        self.size, self.tag, self.digest = 0, "", hashlib.sha256()

    def expect(self, size: int) -> None:
        """Reserve space for `size` more bytes. Raises ResultTooLarge or DiskFull if they are too many."""
        self.check_limit(size)
        if self.promise is not None:
            self.promise.more(size)

    def check_limit(self, size: int) -> None:
        if self.size + size > self.limit_bytes:
            raise ResultTooLarge(Reason.RESULT_HAS.format(too_much=self.limits.broken_by(self.size + size, 0)))

    def write(self, data: bytes) -> None:
        self.check_limit(len(data))
        if self.promise is not None:
            if len(data) > self.promise.left:
                self.promise.more(len(data) - self.promise.left)
            self.promise.wrote(len(data))
        write_all(self.target, data)
        self.digest.update(data)
        self.size += len(data)

    def begin(self, tag: str = "") -> None:
        """Drop the part that arrived: a whole file with the ETag `tag` follows."""
        self.target.seek(0)
        self.target.truncate()
        self.size, self.tag, self.digest = 0, tag, hashlib.sha256()

    def wanted(self) -> dict[str, str]:
        """Return the headers that request the missing rest of exactly this file (RFC 9110, If-Range)."""
        return {"Range": f"bytes={self.size}-", "If-Range": self.tag} if self.size and self.tag else {}


class Stream(NamedTuple):
    """An output stream as it is kept: whole up to `limit` bytes, else the first and last `limit / 2` bytes."""

    size: int
    limit: int

    @property
    def gap(self) -> tuple[int, int]:
        """The first byte that was left out, and the first one kept after it; equal if everything is kept."""
        half = self.limit // 2
        return (half, self.size - half) if self.size > self.limit else (self.size, self.size)

    def line(self, begin: int) -> bytes:
        """Return the line that replaces the bytes left out, from `begin` on."""
        return f"\n[joborch: {self.gap[1] - begin} bytes left out]\n".encode()

    def part(self, read_at: Callable[[int, int], bytes], offset: int, room: int) -> tuple[bytes, int]:
        """Return about `room` bytes from `offset` on, and the offset after them. `read_at` takes an offset and a count."""
        first, second = self.gap
        said = read_at(offset, min(room, first - offset)) if offset < first else b""
        offset += len(said)
        if first <= offset < second and len(said) < room:
            said, offset = said + self.line(offset), second
        if offset >= second and len(said) < room:
            more = read_at(offset, min(room - len(said), self.size - offset)) if offset < self.size else b""
            said, offset = said + more, offset + len(more)
        return said, offset


def kept_output(folder: Path | int, name: str, limit_bytes: int) -> tuple[Stream, Iterator[bytes]]:
    """Return how an output stream is kept, and its chunks: all, or head, one line and tail. Raises OSError if it is unreadable."""
    source = open_regular(folder, name)
    stream = Stream(os.fstat(source.fileno()).st_size, limit_bytes)

    def chunks() -> Iterator[bytes]:
        first, second = stream.gap
        with source:
            yield from file_chunks(source, first)
            if second > first:
                yield stream.line(first)
                source.seek(second)
                yield from file_chunks(source, stream.size - second)

    return stream, chunks()


def punch_middle(path: Path, limit_bytes: int) -> None:
    """Free the disk blocks between the head and tail that `kept_output` shows. Offsets do not change.

    Raises OSError if the file system does not support holes.
    """
    keep_size, punch_hole, block = 1, 2, 4096
    state = state_below(path.parent, path.name)
    size = state.st_size
    begin = -(-(limit_bytes // 2) // block) * block
    end = (size - limit_bytes // 2) // block * block
    if not stat.S_ISREG(state.st_mode) or size <= limit_bytes or end <= begin:
        return
    with opened_folder(path.parent) as folder:
        descriptor = os.open(path.name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        arguments = (ctypes.c_int(punch_hole | keep_size), ctypes.c_int64(begin), ctypes.c_int64(end - begin))
        if libc().fallocate64(descriptor, *arguments) != 0:
            raise OSError(ctypes.get_errno(), "fallocate failed", str(path))
    finally:
        os.close(descriptor)


class ZipRecord(NamedTuple):
    """A member of a ZIP by its directory. The values are untrusted."""

    name: bytes
    comment: bytes
    method: int
    packed_bytes: int
    size: int
    begin: int  # of its local header
    crc: int
    flags: int
    mode: int  # type and permissions, if it was packed on Unix


def zip_directory(file: IO[bytes]) -> tuple[int, int, int]:
    """Return the offset, size and number of members of a ZIP's directory. Raises ValueError if there is none."""
    length = file.seek(0, os.SEEK_END)
    for room in (ZIP_END.size, 66 * KIB):  # most have no comment at their end
        file.seek(max(0, length - room - ZIP64_LOCATOR.size))
        tail = file.read()
        at = tail.rfind(b"PK\5\6", 0, len(tail) - ZIP_END.size + 4)
        if at >= 0:
            break
    else:
        raise ValueError("no ZIP")
    if at + ZIP_END.size > len(tail):
        raise ValueError("no ZIP")
    count, size, begin = ZIP_END.unpack_from(tail, at)[4:7]
    if at >= ZIP64_LOCATOR.size and tail[at - ZIP64_LOCATOR.size :].startswith(b"PK\6\7"):
        file.seek(min(ZIP64_LOCATOR.unpack_from(tail, at - ZIP64_LOCATOR.size)[2], length))
        wide = file.read(ZIP64_END.size)
        if len(wide) < ZIP64_END.size or not wide.startswith(b"PK\6\6"):
            raise ValueError("no ZIP")
        count, size, begin = ZIP64_END.unpack(wide)[7:10]
    if begin + size > length:
        raise ValueError("no ZIP")
    return begin, size, count


def zip_records(file: IO[bytes], commented: bool = False) -> Iterator[ZipRecord]:
    """Yield the entries of a ZIP's directory while reading it, with little memory, up to DIRECTORY_LIMIT_BYTES.

    With `commented`, only members with a comment. Raises ValueError if there is no directory.
    """
    begin, left, _ = zip_directory(file)
    left, rest, step, chunk = min(left, DIRECTORY_LIMIT_BYTES), b"", 4 * KIB, b""
    file.seek(begin)
    while left:
        chunk = file.read(min(left, step))
        if not chunk:
            return
        left, step, rest, at = left - len(chunk), 256 * KIB, rest + chunk, 0
        while len(rest) - at >= ZIP_CENTRAL.size:
            fields = ZIP_CENTRAL.unpack_from(rest, at)
            name, extra, comment = fields[12:15]
            end = at + ZIP_CENTRAL.size + name + extra + comment
            if fields[0] != b"PK\1\2":
                return
            if end > len(rest):
                break
            if comment or not commented:
                yield zip_record(fields, rest[at + ZIP_CENTRAL.size : end])
            at = end
        rest = rest[at:]


def zip_record(fields: tuple[Any, ...], words: bytes) -> ZipRecord:
    """Return a record of a ZIP's directory, from its fixed fields and the bytes after them (name, extra fields, comment)."""
    method, packed, size, name, extra, begin = fields[6], *fields[10:14], fields[18]
    more, at = words[name : name + extra], 0
    while at + 4 <= len(more):
        kind, length = struct.unpack_from("<2H", more, at)
        if kind == 1:  # ZIP64: what does not fit above, in this order
            known = more[at + 4 : at + 4 + min(length, 24)]
            wide = [value for (value,) in struct.iter_unpack("<Q", known[: len(known) // 8 * 8])]
            size, packed, begin = [wide.pop(0) if value == 2**32 - 1 and wide else value for value in (size, packed, begin)]
        at += 4 + length
    mode = fields[17] >> 16 if fields[2] in (3, 19) else 0  # packed on Unix, on macOS
    return ZipRecord(words[:name], words[name + extra :], method, packed, size, begin, fields[9], fields[5], mode)


def read_member(file: IO[bytes], record: ZipRecord, begin: int, count: int) -> bytes:
    """Return up to `count` bytes of a ZIP's member from `begin` on. The work is bounded by `begin + count` bytes.

    Raises ValueError if the member does not match its directory entry.
    """
    length, place = file.seek(0, os.SEEK_END), member_place(file, record)
    if record.method == zipfile.ZIP_STORED:
        file.seek(min(place + begin, length))
        return file.read(max(0, min(count, record.packed_bytes - begin)))
    file.seek(min(place, length))
    unpacker, said, passed = zlib.decompressobj(-15), bytearray(), 0
    # Real programs never deflate data to much more than its size; a forged stream could be endless and contain nothing.
    for chunk in file_chunks(file, min(record.packed_bytes, (begin + count) * 17 // 16 + 64 * KIB)):
        ahead = chunk
        while ahead and len(said) < count:
            try:
                piece = unpacker.decompress(ahead, 256 * KIB)
            except zlib.error as error:
                raise ValueError(str(error)) from error
            said += piece[max(0, begin - passed) :]
            passed, ahead = passed + len(piece), unpacker.unconsumed_tail
        if len(said) >= count or unpacker.eof:
            break
    return bytes(said[:count])


def member_place(file: IO[bytes], record: ZipRecord) -> int:
    """Return where the data of a ZIP's member begins. Raises ValueError if there is none that can be read."""
    length = file.seek(0, os.SEEK_END)
    file.seek(min(record.begin, length))
    head = file.read(ZIP_LOCAL.size)
    if len(head) < ZIP_LOCAL.size or not head.startswith(b"PK\3\4") or record.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("no member")
    name, extra = ZIP_LOCAL.unpack(head)[-2:]
    return record.begin + len(head) + int(name) + int(extra)


def member_chunks(file: IO[bytes], record: ZipRecord) -> Iterator[bytes]:
    """Yield the content of a ZIP's member. Raises ValueError or zlib.error if it is not what its directory entry says."""
    size = crc = 0
    for piece in unpacked_chunks(file, record):
        size, crc = size + len(piece), zlib.crc32(piece, crc)
        if size > record.size:
            break
        yield piece
    if (size, crc) != (record.size, record.crc):
        raise ValueError(f"{size} bytes with the checksum {crc:08x} instead of {record.size} with {record.crc:08x}")


def unpacked_chunks(file: IO[bytes], record: ZipRecord) -> Iterator[bytes]:
    """Yield what the data of a ZIP's member unpacks to, unchecked, in pieces of at most 256 KiB."""
    file.seek(member_place(file, record))
    unpacker = zlib.decompressobj(-15)
    for chunk in file_chunks(file, record.packed_bytes):
        if record.method == zipfile.ZIP_STORED:
            yield chunk
            continue
        ahead = chunk
        while ahead and not unpacker.eof:
            yield unpacker.decompress(ahead, 256 * KIB)
            ahead = unpacker.unconsumed_tail
    while record.method == zipfile.ZIP_DEFLATED and not unpacker.eof:
        piece = unpacker.decompress(b"", 256 * KIB)
        if not piece:
            return
        yield piece


# == 25. Identity ==  The kernel or a token proves who the peer of a connection is; a port proves nothing.

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
    """Return the user id at the other end of a connection on this machine, or None if it cannot be proven.

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
                return seen.uid
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
    """Return the path of the Unix socket of a server on `port` for this value of JOBORCH_SOCKET; None if it has none."""
    if setting in ("0", "none"):
        return None
    if setting:
        return Path(os.path.abspath(setting))
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    own = runtime.is_absolute() and not folder_problem(runtime, by_default=True)  # after sudo it may be another user's folder
    return (runtime if own else Path(f"/tmp/joborch-{os.getuid()}")) / f"joborch-{port}.sock"


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


def remove_stale_socket(path: Path) -> str:
    """Remove the socket of a server that no longer runs. Return what else is at the path, or an empty string."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return ""
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
        return "something else is there"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            return "another server listens there"
    os.unlink(path)
    return ""


# -- the link between server and client: both prove that they have the same token, and never send it --

LINK_VERSION = 1
OLD_SERVER_LOG_S = 3600.0  # how often a client logs that a server of version 0.1.0 calls it
SESSIONS_LIMIT = 1000  # for one client: each start and each token of a server makes one
WINDOW = 4096  # requests of one session that may overtake each other
SIGNED_OF_ANSWER = ("Content-Length", "Content-Type", "Repr-Digest", "ETag", "Content-Range", "X-Next-Offset", "Retry-After")
PROOF_SHAPE = re.compile(r"Joborch nonce=([0-9a-f]{32}), peer=([0-9a-f]{32}), n=([0-9]{1,15}), mac=([0-9a-f]{64})", re.IGNORECASE)


@functools.lru_cache(maxsize=64)
def link_key(token: str, purpose: bytes = b"joborch link 1") -> bytes:
    """Derive a key from a token: that of server and client, or of sessions. It is slow on purpose: nobody must guess a token from MACs."""
    return hashlib.pbkdf2_hmac("sha256", token.encode(), purpose, 10_000)


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

    def authorization(self, headers: Mapping[str, str], length: int) -> str:
        mac = self.of_request(headers, length)
        return f"Joborch nonce={self.server}, peer={self.client}, n={self.number}, mac={mac}"


class Session:
    """A server's side of the link to one start of a client: it numbers the requests."""

    def __init__(self, token: str, client: str) -> None:
        self.key, self.server, self.client = link_key(token), secrets.token_hex(16), client
        self.numbers = itertools.count(1)  # next() is atomic

    def proof(self, method: str, target: str) -> Proof:
        return Proof(self.key, self.server, self.client, next(self.numbers), method, target)


class ProofReader:
    """A client's side of the link: it recognises a server by the token and accepts each request once."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.lock = tokens, threading.Lock()
        self.nonce = secrets.token_hex(16)
        self.seen: dict[tuple[str, bytes], tuple[int, int]] = {}  # by server nonce and key: the highest number, a bit for each lower one

    def accept(self, headers: Mapping[str, str], method: str, target: str, length: int) -> Proof:
        """Return the proof of a request. Raises HttpError 401 if it is wrong, repeated, or meant for an earlier start."""
        shown = PROOF_SHAPE.fullmatch(headers.get("AUTHORIZATION", "").strip())
        if shown is None:
            raise unproven("the proof is malformed")
        server, client, number, mac = shown[1].lower(), shown[2].lower(), int(shown[3]), shown[4].lower()
        if client != self.nonce:
            raise unproven("this client was restarted: call GET /hello again", self.nonce)
        for token in self.tokens:
            proof = Proof(link_key(token), server, client, number, method, target)
            if hmac.compare_digest(proof.of_request(headers, length), mac):
                self.take(proof)
                return proof
        raise unproven("the token is wrong, or the request was changed on its way")

    def take(self, proof: Proof) -> None:
        """Note a request's number in a sliding window (RFC 4303, 3.4.3). Raises HttpError 401 if the number was used before."""
        session = (proof.server, proof.key)
        with self.lock:
            if session not in self.seen and len(self.seen) >= SESSIONS_LIMIT:
                self.seen.clear()  # proofs with the old nonce are invalid from now on, so none can be repeated
                self.nonce = secrets.token_hex(16)
                raise unproven("this client has too many sessions: call GET /hello again", self.nonce)
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


# == 26. Statements ==  All SQL of the program, as named constants. Every query uses an index.

SCHEMA_VERSION = 4

SCHEMA = """
BEGIN;
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, uuid TEXT NOT NULL, user_id INTEGER, service TEXT, name TEXT,
    status TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', cause TEXT, exit_code INTEGER, signal INTEGER,
    priority INTEGER NOT NULL DEFAULT 0, cpus INTEGER NOT NULL DEFAULT 1, memory INTEGER, timeout REAL,
    retries INTEGER NOT NULL DEFAULT 0, return_inputs INTEGER NOT NULL DEFAULT 1, attempt INTEGER NOT NULL DEFAULT 1,
    client TEXT, dest_id TEXT, remote_id TEXT, handle TEXT, idempotency_key TEXT, request_digest TEXT,
    result_size INTEGER, result_sha256 TEXT,
    created_at REAL NOT NULL, started_at REAL, ended_at REAL, not_before REAL, fetched_at REAL, kill_requested_at REAL, kill_cause TEXT,
    moves INTEGER NOT NULL DEFAULT 0, changed INTEGER, moved_at REAL NOT NULL DEFAULT 0, synced INTEGER NOT NULL DEFAULT 0,
    inputs_sha256 TEXT, after_ids TEXT NOT NULL DEFAULT '', blocked INTEGER NOT NULL DEFAULT 0,
    arrived_at REAL NOT NULL DEFAULT 0, charged REAL NOT NULL DEFAULT 0, ended_as TEXT, retry_of INTEGER
);
CREATE UNIQUE INDEX jobs_uuid ON jobs(uuid, attempt);
CREATE UNIQUE INDEX jobs_key ON jobs(user_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_user ON jobs(user_id, id);
CREATE INDEX jobs_service ON jobs(service, id);
CREATE INDEX jobs_status ON jobs(status, id);
CREATE INDEX jobs_changed ON jobs(changed) WHERE changed IS NOT NULL;
CREATE INDEX jobs_delayed ON jobs(not_before) WHERE status = 'Queued' AND not_before IS NOT NULL;
CREATE INDEX jobs_queued ON jobs(service, user_id, priority DESC, id)
 WHERE status = 'Queued' AND not_before IS NULL AND blocked = 0;
CREATE INDEX jobs_line ON jobs(service, priority, arrived_at) WHERE status = 'Queued' AND not_before IS NULL AND blocked = 0;
CREATE INDEX jobs_waiting ON jobs(user_id) WHERE status = 'Queued';
CREATE INDEX jobs_client ON jobs(client, id, cpus, memory) WHERE status IN ('Processing', 'Submitted', 'Running', 'Unknown');
CREATE INDEX jobs_ended ON jobs(moved_at) WHERE status IN ('Completed', 'Failed', 'Invalid', 'Killed');
CREATE INDEX jobs_cleaned ON jobs(moved_at) WHERE status = 'Cleaned';
CREATE INDEX jobs_unfetched ON jobs(changed) WHERE changed IS NOT NULL AND fetched_at IS NULL;
CREATE INDEX jobs_unsynced ON jobs(id)
 WHERE synced = 0 AND changed IS NOT NULL AND fetched_at IS NULL AND status IN ('Completed', 'Failed', 'Invalid', 'Killed');
CREATE INDEX jobs_ended_as ON jobs(ended_as, id) WHERE status = 'Cleaned';
CREATE TABLE history (
    job_id INTEGER NOT NULL, number INTEGER NOT NULL, at REAL NOT NULL, source TEXT, target TEXT NOT NULL, reason TEXT NOT NULL,
    attempt INTEGER NOT NULL, seq INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job_id, number)
) WITHOUT ROWID;
CREATE TABLE attempts (
    job_id INTEGER NOT NULL, attempt INTEGER NOT NULL, client TEXT, dest_id TEXT, started_at REAL, ended_at REAL,
    exit_code INTEGER, signal INTEGER, reason TEXT, cause TEXT,
    PRIMARY KEY (job_id, attempt)
) WITHOUT ROWID;
CREATE TABLE usage (
    service TEXT NOT NULL, user_id INTEGER NOT NULL, used REAL NOT NULL, runs INTEGER NOT NULL, mean_s REAL NOT NULL,
    PRIMARY KEY (service, user_id)
) WITHOUT ROWID;
CREATE INDEX usage_user ON usage(user_id);
CREATE TABLE pace (
    service TEXT PRIMARY KEY, level REAL NOT NULL, -- not used any more
    runs INTEGER NOT NULL, mean_s REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE users (user_id INTEGER PRIMARY KEY, weight REAL NOT NULL);
CREATE TABLE drained (client TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE dependencies (on_id INTEGER NOT NULL, job_id INTEGER NOT NULL, PRIMARY KEY (on_id, job_id)) WITHOUT ROWID;
CREATE INDEX dependencies_of ON dependencies(job_id);
CREATE TABLE turns_made (rules TEXT NOT NULL, half_life_s REAL NOT NULL); -- rules: not used any more
INSERT INTO turns_made VALUES ('', 0);
CREATE TABLE heartbeat (
    at REAL NOT NULL, instance TEXT NOT NULL, boot TEXT NOT NULL DEFAULT '', boot_s REAL NOT NULL DEFAULT 0, steady REAL NOT NULL DEFAULT 0
);
INSERT INTO heartbeat (at, instance) VALUES (0, lower(hex(randomblob(8))));
PRAGMA user_version = 4;
COMMIT;
"""

# From each version of the schema that was released to the next. 0.1.0 made version 3.
MIGRATIONS = {
    3: """
BEGIN;
ALTER TABLE jobs ADD COLUMN ended_as TEXT;
ALTER TABLE jobs ADD COLUMN retry_of INTEGER;
DROP TABLE contenders;
DROP INDEX jobs_busy;
UPDATE jobs
   SET ended_as = (SELECT source FROM history WHERE job_id = jobs.id AND target = 'Cleaned' ORDER BY number DESC LIMIT 1),
       reason = coalesce((SELECT reason FROM history WHERE job_id = jobs.id AND target IN ('Completed', 'Failed', 'Invalid', 'Killed')
                           ORDER BY number DESC LIMIT 1), reason)
 WHERE status = 'Cleaned';
CREATE INDEX jobs_ended_as ON jobs(ended_as, id) WHERE status = 'Cleaned';
PRAGMA user_version = 4;
COMMIT;
""",
}

JOB_ADD = "INSERT INTO jobs (" + ", ".join(NEW_COLUMNS) + ") VALUES (:" + ", :".join(NEW_COLUMNS) + ")"
JOB_MOVE = (
    "UPDATE jobs SET status = :to, reason = :reason, ended_as = :ended_as, moves = moves + 1, changed = :changed, moved_at = :moved_at, "
    + ", ".join(name + " = :" + name for name in MOVABLE)
    + " WHERE id = :id AND status = :source AND attempt = :expected AND (:any_wish OR kill_requested_at IS :kill_requested_at)"
)
JOB_GET = "SELECT * FROM jobs WHERE id = :id"
JOB_BY_UUID = "SELECT * FROM jobs WHERE uuid = :uuid ORDER BY attempt DESC LIMIT 1"
JOB_BY_MARK = "SELECT * FROM jobs WHERE uuid = :uuid AND attempt = :attempt"
JOB_BY_KEY = "SELECT * FROM jobs WHERE user_id = :user_id AND idempotency_key = :idempotency_key"
JOB_STATUS = "SELECT status FROM jobs WHERE id = :id"
JOB_HANDLE = "UPDATE jobs SET handle = :handle WHERE id = :id"
JOB_STARTED = "UPDATE jobs SET handle = :handle, moved_at = :now WHERE id = :id"
PAYLOAD_TOLD = "UPDATE jobs SET changed = :changed WHERE id = :id AND status NOT IN ('Prepared', 'Cleaned')"
PAYLOAD_BEGUN = "UPDATE jobs SET changed = :changed, started_at = :started_at, moved_at = :now WHERE id = :id AND status = 'Running'"
JOB_FETCHED = """
UPDATE jobs SET fetched_at = :now
 WHERE id = :id AND fetched_at IS NULL AND status IN ('Completed', 'Failed', 'Invalid', 'Killed', 'Cleaned')
"""
JOB_CONFIRMED = """
UPDATE jobs SET fetched_at = :now, synced = 2
 WHERE id = :id AND synced < 2 AND status IN ('Completed', 'Failed', 'Invalid', 'Killed', 'Cleaned')
"""
JOB_ADMIT = "UPDATE jobs SET not_before = NULL WHERE id = :id AND status = 'Queued'"
JOB_CLIENT = """
UPDATE jobs SET client = :to
 WHERE id = :id AND client = :source AND attempt = :attempt AND status IN ('Submitted', 'Running', 'Unknown')
"""
KILL_WISH = """
UPDATE jobs SET kill_requested_at = :now, kill_cause = :cause
 WHERE id = :id AND kill_requested_at IS NULL AND status IN ('Queued', 'Processing', 'Submitted', 'Prepared', 'Running', 'Unknown')
"""
HISTORY_ADD = """
INSERT INTO history (job_id, number, at, source, target, reason, attempt, seq)
SELECT id, moves, :now, :source, :to, :reason, attempt, :seq FROM jobs WHERE id = :id
"""
HISTORY_GET = "SELECT at, source, target, reason, attempt FROM history WHERE job_id = :id ORDER BY number"
ATTEMPT_ADD = "INSERT OR REPLACE INTO attempts (job_id, " + ", ".join(ATTEMPT) + ") VALUES (:id, :" + ", :".join(ATTEMPT) + ")"
ATTEMPTS_GET = "SELECT " + ", ".join(ATTEMPT) + " FROM attempts WHERE job_id = :id ORDER BY attempt"
AT_CLIENT = """
SELECT * FROM jobs INDEXED BY jobs_client
 WHERE client = :client AND status IN ('Processing', 'Submitted', 'Running', 'Unknown') ORDER BY id
"""
ALL_BUSY = "SELECT * FROM jobs INDEXED BY jobs_client WHERE status IN ('Processing', 'Submitted', 'Running', 'Unknown') ORDER BY client, id"
PINNED_AT_CLIENT = """
SELECT * FROM jobs INDEXED BY jobs_client
 WHERE client = :client AND status IN ('Processing', 'Submitted', 'Running', 'Unknown') AND status = 'Unknown' AND dest_id IS NULL
 ORDER BY id
"""
KILLS_AT_CLIENT = """
SELECT * FROM jobs INDEXED BY jobs_client
 WHERE client = :client AND status IN ('Processing', 'Submitted', 'Running', 'Unknown')
   AND kill_requested_at IS NOT NULL AND dest_id IS NOT NULL ORDER BY id
"""
KILLS_COUNT = """
SELECT count(*) FROM jobs INDEXED BY jobs_client
 WHERE client = :client AND status IN ('Processing', 'Submitted', 'Running', 'Unknown') AND kill_requested_at IS NOT NULL
"""
CUT_OFF_SENDING = "SELECT * FROM jobs INDEXED BY jobs_status WHERE status = 'Processing'"
WAITING_FIRST = """
SELECT id, priority, arrived_at, cpus, memory, timeout FROM jobs INDEXED BY jobs_queued
 WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
 ORDER BY priority DESC, id LIMIT 1
"""
WAITING_BY_PRIORITY = """
WITH RECURSIVE level(priority, id) AS (
    SELECT * FROM (SELECT priority, id FROM jobs INDEXED BY jobs_queued
                    WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
                    ORDER BY priority DESC, id LIMIT 1)
    UNION ALL
    SELECT (SELECT j.priority FROM jobs j INDEXED BY jobs_queued
             WHERE j.service = :service AND j.user_id = :user_id AND j.status = 'Queued' AND j.not_before IS NULL AND j.blocked = 0
               AND j.priority < level.priority ORDER BY j.priority DESC, j.id LIMIT 1),
           (SELECT j.id FROM jobs j INDEXED BY jobs_queued
             WHERE j.service = :service AND j.user_id = :user_id AND j.status = 'Queued' AND j.not_before IS NULL AND j.blocked = 0
               AND j.priority < level.priority ORDER BY j.priority DESC, j.id LIMIT 1)
      FROM level WHERE level.priority IS NOT NULL
) SELECT jobs.id, jobs.priority, arrived_at, cpus, memory, timeout FROM level JOIN jobs ON jobs.id = level.id
"""
QUEUED_BEFORE = """
SELECT (SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_queued
         WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
           AND priority > :priority LIMIT 10000))
     + (SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_queued
         WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
           AND priority = :priority AND id < :id LIMIT 10000))
"""
QUEUED_IN_SERVICE = """
SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_line
 WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0 LIMIT 10000)
"""
QUEUED_PRIORITIES = """
WITH RECURSIVE level(priority) AS (
    SELECT * FROM (SELECT priority FROM jobs INDEXED BY jobs_line
                    WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0
                    ORDER BY priority LIMIT 1)
    UNION ALL
    SELECT (SELECT j.priority FROM jobs j INDEXED BY jobs_line
             WHERE j.service = :service AND j.status = 'Queued' AND j.not_before IS NULL AND j.blocked = 0
               AND j.priority > level.priority ORDER BY j.priority LIMIT 1)
      FROM level WHERE level.priority IS NOT NULL
) SELECT priority FROM level WHERE priority IS NOT NULL
"""
QUEUED_EARLIER = """
SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_line
 WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0
   AND priority = :priority AND arrived_at < :before LIMIT 10000)
"""
QUEUED_OF_USER = """
SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_waiting WHERE user_id = :user_id AND status = 'Queued' LIMIT :limit)
"""
QUEUED_USERS = """
WITH RECURSIVE waiting(user_id) AS (
    SELECT * FROM (SELECT user_id FROM jobs INDEXED BY jobs_queued
                    WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0 ORDER BY user_id LIMIT 1)
    UNION ALL
    SELECT (SELECT j.user_id FROM jobs j INDEXED BY jobs_queued
             WHERE j.service = :service AND j.status = 'Queued' AND j.not_before IS NULL AND j.blocked = 0
               AND j.user_id > waiting.user_id ORDER BY j.user_id LIMIT 1)
      FROM waiting WHERE waiting.user_id IS NOT NULL
) SELECT user_id FROM waiting WHERE user_id IS NOT NULL
"""
QUEUED_OF_SERVICE = """
SELECT * FROM jobs INDEXED BY jobs_queued
 WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0 AND moved_at < :before
 ORDER BY user_id, priority DESC, id LIMIT 1000
"""
DELAYED_DUE = """
SELECT id FROM jobs INDEXED BY jobs_delayed
 WHERE status = 'Queued' AND not_before IS NOT NULL AND not_before <= :now LIMIT 1000
"""
USAGE_GET = "SELECT used, runs, mean_s FROM usage WHERE service = :service AND user_id = :user_id"
USAGE_SET = "INSERT OR REPLACE INTO usage (service, user_id, used, runs, mean_s) VALUES (:service, :user_id, :use, :runs, :mean_s)"
USAGE_OF_USER = "SELECT service, used, runs, mean_s FROM usage INDEXED BY usage_user WHERE user_id = :user_id"
USAGE_ALL = "SELECT service, user_id, used, runs, mean_s FROM usage"
PACE_ALL = "SELECT service, runs, mean_s FROM pace"
PACE_SET = "INSERT OR REPLACE INTO pace (service, level, runs, mean_s) VALUES (:service, 0, :runs, :mean_s)"
JOB_CHARGE_SET = "UPDATE jobs SET charged = :charged WHERE id = :id"
JOB_CHARGE = "UPDATE jobs SET charged = :charged WHERE id = :id AND attempt = :attempt AND status = :status AND charged < :charged"
WEIGHT_ALL = "SELECT user_id, weight FROM users"
WEIGHT_SET = "INSERT OR REPLACE INTO users (user_id, weight) VALUES (:user_id, :weight)"
DRAINED_ALL = "SELECT client, at FROM drained"
DRAINED_SET = "INSERT OR IGNORE INTO drained (client, at) VALUES (:client, :at)"
DRAINED_CLEAR = "DELETE FROM drained WHERE client = :client"
DEPENDENCY_ADD = "INSERT OR IGNORE INTO dependencies (on_id, job_id) VALUES (:on_id, :job_id)"
DEPENDENTS = """
SELECT jobs.* FROM dependencies JOIN jobs ON jobs.id = dependencies.job_id
 WHERE dependencies.on_id = :on_id AND jobs.status = 'Queued' ORDER BY dependencies.job_id
"""
DEPENDENTS_FORGET = "DELETE FROM dependencies WHERE on_id = :on_id"
DEPENDENCIES_FORGET = "DELETE FROM dependencies WHERE job_id = :id"
JOB_UNBLOCK = "UPDATE jobs SET blocked = blocked - 1 WHERE id = :id AND status = 'Queued' AND blocked > 0"
WAS_COMPLETED = "SELECT 1 FROM history WHERE job_id = :id AND target = 'Completed' LIMIT 1"
TURNS_MADE = "SELECT half_life_s FROM turns_made"
TURNS_MADE_BY = "UPDATE turns_made SET half_life_s = :half_life_s"
PAYLOADS_IN = "SELECT * FROM jobs INDEXED BY jobs_status WHERE status = :status ORDER BY id LIMIT :limit"
RUNNING_LIMITS = "SELECT id, uuid, attempt, timeout, moved_at FROM jobs INDEXED BY jobs_status WHERE status = 'Running' ORDER BY id"
RUNNING_NEEDS = (
    "SELECT count(*), coalesce(sum(cpus), 0), coalesce(sum(memory), 0) FROM jobs INDEXED BY jobs_status WHERE status = 'Running'"
)
FIRST_PREPARED = "SELECT min(id) FROM jobs INDEXED BY jobs_status WHERE status = 'Prepared'"
COUNT_IN = "SELECT count(*) FROM jobs INDEXED BY jobs_status WHERE status = :status"
CHANGED_SINCE = """
SELECT * FROM jobs INDEXED BY jobs_changed WHERE changed IS NOT NULL AND changed > :since AND status <> 'Prepared'
 ORDER BY changed LIMIT 1001
"""  # a page of /events, and one more that tells whether there is another page
CHANGED_ALL = """
SELECT * FROM jobs INDEXED BY jobs_unfetched
 WHERE changed IS NOT NULL AND changed > :since AND fetched_at IS NULL AND status <> 'Cleaned' ORDER BY changed LIMIT 1001
"""
CHANGED_LAST = "SELECT coalesce(max(changed), 1) FROM jobs INDEXED BY jobs_changed WHERE changed IS NOT NULL"
ENDED_BEFORE = """
SELECT * FROM jobs INDEXED BY jobs_ended
 WHERE status IN ('Completed', 'Failed', 'Invalid', 'Killed') AND moved_at < :before
   AND (
    moved_at < :unfetched_before
    OR fetched_at IS NOT NULL AND (moved_at < :fetched_before OR synced = 2 AND fetched_at < :confirmed_before)
   ) ORDER BY moved_at LIMIT :limit
"""  # moved_at is steady time, fetched_at that of the wall clock
CLEANED_BEFORE = "SELECT id FROM jobs INDEXED BY jobs_cleaned WHERE status = 'Cleaned' AND moved_at < :before LIMIT 500"
FORGET_JOB = "DELETE FROM jobs WHERE id = :id"
FORGET_HISTORY = "DELETE FROM history WHERE job_id = :id"
FORGET_ATTEMPTS = "DELETE FROM attempts WHERE job_id = :id"
JOBS_PAGE = "SELECT * FROM jobs WHERE id < :before ORDER BY id DESC LIMIT :limit"
JOBS_PAGE_OF_USER = """
SELECT * FROM jobs INDEXED BY jobs_user WHERE user_id = :user_id AND id < :before
   AND (:service IS NULL OR service = :service) AND (:status IS NULL OR status = :status OR ended_as = :status)
 ORDER BY id DESC LIMIT :limit
"""
JOBS_PAGE_IN_STATUS = """
SELECT * FROM jobs INDEXED BY jobs_status WHERE status = :status AND id < :before
   AND (:service IS NULL OR service = :service) ORDER BY id DESC LIMIT :limit
"""
JOBS_PAGE_CLEANED = """
SELECT * FROM jobs INDEXED BY jobs_ended_as WHERE status = 'Cleaned' AND ended_as = :status AND id < :before
   AND (:service IS NULL OR service = :service) ORDER BY id DESC LIMIT :limit
"""
JOBS_PAGE_OF_SERVICE = "SELECT * FROM jobs INDEXED BY jobs_service WHERE service = :service AND id < :before ORDER BY id DESC LIMIT :limit"
# For the charts of the web page. They examine the newest 20,000 jobs, so that they take as long whatever the number of jobs.
NEWEST_SUBMITTED = """
SELECT CAST((created_at - :since) / :step_s AS INTEGER) AS step, count(*) AS jobs, avg(started_at - created_at) AS wait_s
  FROM (SELECT created_at, started_at FROM jobs ORDER BY id DESC LIMIT 20000) WHERE created_at >= :since GROUP BY step
"""
NEWEST_ENDED = """
SELECT CAST((at - :since) / :step_s AS INTEGER) AS step, ended, count(*) AS jobs
  FROM (SELECT coalesce(ended_as, status) AS ended, CASE status WHEN 'Cleaned' THEN ended_at ELSE moved_at + :steady_began END AS at
          FROM jobs ORDER BY id DESC LIMIT 20000)
 WHERE ended IN ('Completed', 'Failed', 'Invalid', 'Killed') AND at >= :since GROUP BY step, ended
"""
NEWEST_FAILURES = """
SELECT reason, count(*) AS jobs, max(id) AS newest
  FROM (SELECT id, reason, coalesce(ended_as, status) AS ended,
               CASE status WHEN 'Cleaned' THEN ended_at ELSE moved_at + :steady_began END AS at
          FROM jobs ORDER BY id DESC LIMIT 20000)
 WHERE ended IN ('Failed', 'Invalid') AND at >= :since GROUP BY reason ORDER BY jobs DESC, newest DESC LIMIT 20
"""
OLDEST_QUEUED = """
SELECT service, min(created_at) AS created_at
  FROM (SELECT service, created_at FROM jobs INDEXED BY jobs_status WHERE status = 'Queued' ORDER BY id LIMIT 10000) GROUP BY service
"""
USERS_WITH_JOBS = """
SELECT user_id FROM (SELECT user_id, max(used) AS most FROM usage INDEXED BY usage_user GROUP BY user_id ORDER BY most DESC LIMIT :limit)
 UNION
SELECT user_id FROM (SELECT user_id FROM jobs INDEXED BY jobs_status WHERE status = 'Queued' ORDER BY id LIMIT 1000) LIMIT 2 * :limit
"""
UNSYNCED = """
SELECT * FROM jobs INDEXED BY jobs_unsynced
 WHERE synced = 0 AND changed IS NOT NULL AND fetched_at IS NULL AND status IN ('Completed', 'Failed', 'Invalid', 'Killed')
   AND moved_at <= :before ORDER BY id
"""
JOB_SYNCED = "UPDATE jobs SET synced = 1 WHERE id = :id AND synced = 0"
HEARTBEAT = "UPDATE heartbeat SET at = :at, boot = :boot, boot_s = :boot_s, steady = :steady"
LAST_HEARTBEAT = "SELECT at, boot, boot_s, steady FROM heartbeat"
INSTANCE = "SELECT instance FROM heartbeat"
NEW_INSTANCE = "UPDATE heartbeat SET instance = lower(hex(randomblob(8)))"
LAST_ID = "SELECT seq FROM sqlite_sequence WHERE name = 'jobs'"
SKIP_IDS = "INSERT OR REPLACE INTO sqlite_sequence (rowid, name, seq) VALUES (1, 'jobs', :last)"
ALL_UUIDS = "SELECT uuid FROM jobs"
DAMAGE = "PRAGMA quick_check(1)"


# == 27. Database ==  One connection writes; threads that wait for it share a transaction. Ages are counted in steady time.

READERS_KEPT = 8  # idle read connections to keep
DECISIONS_AT_ONCE = 8  # claims in one transaction, so that its callers wait for few


class Message:
    """A piece of work for the core, and its outcome."""

    def __init__(self, work: Callable[[sqlite3.Connection], Any], durable: bool) -> None:
        self.work, self.durable = work, durable
        self.done, self.value, self.error = False, None, cast(Optional[BaseException], None)


class Waiter:
    """A caller that waits until `look` finds something in the rows of one job, or of any job if `job_id` is None."""

    def __init__(self, look: Callable[[], Any], job_id: int | None) -> None:
        self.look, self.job_id, self.bell = look, job_id, threading.Event()
        self.found, self.error = cast(Any, None), cast(Optional[Exception], None)

    def look_again(self) -> None:
        """Look, and wake the caller if that finds something or fails."""
        try:
            self.found = self.look()
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            self.error = error
        if self.found is not None or self.error is not None:
            self.bell.set()

    def take(self) -> Any:
        """Return what was found, or else look now. Raises the error of `look`."""
        self.bell.clear()
        if self.error is not None:
            raise self.error
        return self.look() if self.found is None else self.found


def is_fatal(error: BaseException) -> bool:
    """Tell whether an error ends the whole transaction: the disk, or a lock."""
    return isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError)


class Shares:
    """What turns depend on and who has one, in memory: it always follows from the rows.

    Each map has two layers: what the current transaction changes, which only that transaction sees, and what is committed.
    A COMMIT brings the changes down, a rollback drops them. Records are never changed, only replaced, so readers need no lock.
    """

    def __init__(self) -> None:
        self.users: ChainMap[tuple[str, int], Share] = ChainMap({}, {})  # by service and user; only those with jobs that run or could
        self.lines: ChainMap[str, Line] = ChainMap({}, {})  # by service
        self.loads: ChainMap[str, Load] = ChainMap({}, {})  # by client
        self.weights: ChainMap[int, float] = ChainMap({}, {})  # by user; others have 1
        self.maps: tuple[ChainMap[Any, Any], ...] = (self.users, self.lines, self.loads, self.weights)
        self.order: dict[str, list[Turn]] = {}  # by service: all turns, sorted
        self.running: dict[str, set[int]] = {}  # by service: users with jobs at clients

    def changes(self) -> list[dict[Any, Any]]:
        """Return what the transaction has changed so far."""
        return [dict(known.maps[0]) for known in self.maps]

    def back_to(self, changes: Sequence[dict[Any, Any]] = ({}, {}, {}, {})) -> None:
        """Forget what the transaction has changed, or all but some earlier changes."""
        for known, kept in zip(self.maps, changes):
            known.maps[0] = dict(kept)

    def commit(self) -> None:
        """Let everybody see the changes of the transaction."""
        changed, known = self.users.maps
        for pair, share in changed.items():
            before = known.get(pair, NO_SHARE)
            if share.turn != before.turn:
                self.move_turn(pair[0], before.turn, share.turn)
            running = self.running.setdefault(pair[0], set())
            (running.add if share.runs else running.discard)(pair[1])
        for layers in self.maps:
            layers.maps[1].update(layers.maps[0])
        for pair, share in changed.items():
            if not (share.runs or share.waiting):
                del known[pair]
        self.back_to()

    def move_turn(self, service: str, before: Turn | None, after: Turn | None) -> None:
        order = self.order.setdefault(service, [])
        if before is not None:
            del order[bisect.bisect_left(order, before)]
        if after is not None:
            bisect.insort(order, after)

    def turns(self, service: str) -> Iterator[Turn]:
        """Yield the turns of all users who have a free run, as the current transaction sees them."""
        changed = {pair[1]: share.turn for pair, share in self.users.maps[0].items() if pair[0] == service}
        kept = (turn for turn in self.order.get(service, ()) if turn.user_id not in changed)
        return heapq.merge(kept, sorted(turn for turn in changed.values() if turn is not None))


NO_SHARE, NO_LINE, NO_LOAD = Share(), Line(), Load()


class Core:
    """Runs all changes of rows, one transaction after another, and afterwards looks for callers that wait.

    The calling thread runs the transaction. Work that arrives meanwhile shares the next transaction, and so an fsync. A separate
    thread would cost a hand-over for each call: see docs/benchmarks.md, "The hot path". Inside, work uses only SQLite and memory:
    no file, no socket, no process, no sleep. Its reads see what the transaction has written.
    """

    def __init__(self, db: sqlite3.Connection, beat: Callable[[sqlite3.Connection], None], is_time: Callable[[], bool]) -> None:
        """`beat` stores the time, in the first transaction for which `is_time` returns True."""
        self.db, self.beat, self.is_time = db, beat, is_time
        self.lock, self.owner = threading.Lock(), 0  # held for a transaction, by the thread with this id
        self.inbox, self.waiters = deque[Message](), set[Waiter]()
        self.moved: set[int] = set()  # the jobs that the current transaction moves
        self.quiet: set[int] = set()  # jobs whose moves the answer to a submit reports: they do not wake callers that wait for any job
        self.synchronous = ""
        self.propose: Callable[[], Callable[[], bool] | None] = lambda: None  # see `decide`
        self.undecided = False  # the rows have changed, so a new decision may be possible
        self.outcomes: list[tuple[Callable[[], object], Callable[[], object]]] = []  # what to call after a COMMIT, and after a failure
        self.shares = Shares()

    def call(self, work: Callable[[sqlite3.Connection], T], durable: bool) -> T:
        """Run `work` in a transaction and return its value; if `durable`, it is on disk then. Inside a transaction, run it at once.

        If `work` raises, only its own part is rolled back. Raises StorageError if the database cannot be written.
        """
        if self.is_inside():
            return work(self.db)
        message, following = Message(work, durable), list[Callable[[], object]]()
        self.inbox.append(message)
        with self.inside():
            if not message.done:
                following = self.commit_waiting()
        self.carry_out(following)
        if message.error is not None:
            raise message.error
        return cast(T, message.value)

    def settle(self) -> None:
        """Decide now, because something other than the rows has changed."""
        with self.inside():
            self.undecided = True
            following = self.commit_waiting()
        self.carry_out(following)

    @staticmethod
    def carry_out(following: Iterable[Callable[[], object]]) -> None:
        """Do what follows from a COMMIT, all of it: none of it is the caller's alone."""
        for follow in following:
            try:
                follow()
            except Exception:
                log.exception("an error in what follows from a transaction")

    def after(self, done: Callable[[], object], failed: Callable[[], object] = lambda: None) -> None:
        """Call `done` outside the core after the COMMIT of the current transaction, or `failed` if it is rolled back."""
        self.outcomes.append((done, failed))

    def is_inside(self) -> bool:
        """Tell whether this thread is inside the core now."""
        return self.owner == threading.get_ident()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Enter the core for the block: one thread at a time."""
        with self.lock:
            self.owner = threading.get_ident()
            try:
                yield
            finally:
                self.owner = 0

    @contextlib.contextmanager
    def watching(self, look: Callable[[], Any], job_id: int | None) -> Iterator[Waiter]:
        """During the block, look for a caller after each commit that moved the job; any job if `job_id` is None."""
        waiter = Waiter(look, job_id)
        self.waiters.add(waiter)
        try:
            yield waiter
        finally:
            self.waiters.discard(waiter)

    def wake_all(self) -> None:
        for waiter in list(self.waiters):
            waiter.bell.set()

    def commit_waiting(self) -> list[Callable[[], object]]:
        """Run and commit all waiting work in one transaction, then look for waiting callers.

        Decisions that are left over, or that need a durable transaction, get a separate one. Return what to call outside the core.
        """
        following = list[Callable[[], object]]()
        while self.inbox or self.undecided:
            batch = [self.inbox.popleft() for _ in range(len(self.inbox))]
            try:
                self.transact(batch)
            except BaseException as error:  # noqa: BLE001 - every waiting thread gets it
                log.debug("a transaction for %d callers failed: %s", len(batch), error)  # dispatch_tick repeats lost decisions
                self.roll_back(is_storage=isinstance(error, sqlite3.Error))
                for message in batch:
                    message.error = self.why_not(error, alone=len(batch) == 1)
            for message in batch:
                message.done = True
            following += [done for done, _ in self.outcomes]
            self.outcomes.clear()
            self.look_around()
        return following

    def look_around(self) -> None:
        """Look for callers that wait for a job that has moved."""
        moved, self.moved = self.moved, set()
        is_news = not moved <= self.quiet
        for waiter in list(self.waiters) if moved else ():
            if waiter.job_id in moved or (waiter.job_id is None and is_news):
                waiter.look_again()

    def transact(self, batch: Sequence[Message]) -> None:
        """Run all of this work in one transaction, and the decisions that it makes possible."""
        durable = any(message.durable for message in batch)
        if batch:
            self.begin("FULL" if durable else "NORMAL")
        if len(batch) == 1:
            batch[0].value = batch[0].work(self.db)
        else:
            for message in batch:
                self.run(message)
        if self.undecided and (durable or not batch):
            self.decide()
        if not self.db.in_transaction:
            return
        if self.is_time():
            self.beat(self.db)
        crash_point("commit.begun")
        self.db.execute("COMMIT")
        self.shares.commit()
        crash_point("commit.done")

    def begin(self, level: str) -> None:
        """Begin a transaction. With FULL it is on disk when its COMMIT returns."""
        self.set_synchronous(level)
        self.db.execute("BEGIN IMMEDIATE")

    def decide(self) -> None:
        """Carry out what `propose` proposes, as long as that changes the rows.

        An error here loses only the decisions of this transaction, not the callers' work.
        """
        try:
            for _ in range(DECISIONS_AT_ONCE):
                self.undecided = False
                step = self.propose()
                if step is None:
                    return
                if not self.db.in_transaction:
                    self.begin("FULL")
                self.savepoint(step)
                if not self.undecided:  # it was refused
                    return
        except Exception as error:
            if is_fatal(error):
                raise
            self.undecided = False
            log.exception("an error while deciding which job is sent")

    def savepoint(self, work: Callable[[], T]) -> T:
        """Run work, and roll its part back if it raises."""
        self.db.execute("SAVEPOINT part")
        known, changes = len(self.outcomes), self.shares.changes()
        try:
            value = work()
        except Exception as error:
            if not is_fatal(error):
                self.db.execute("ROLLBACK TO part")
                self.db.execute("RELEASE part")
                self.forget_outcomes(known)
                self.shares.back_to(changes)
            raise
        self.db.execute("RELEASE part")
        return value

    def forget_outcomes(self, known: int) -> None:
        """Call the `failed` of all outcomes except the first `known`, and forget them."""
        for _, failed in self.outcomes[known:]:
            failed()
        del self.outcomes[known:]

    def roll_back(self, is_storage: bool) -> None:
        self.moved.clear()
        self.forget_outcomes(0)
        self.shares.back_to()
        self.undecided = False  # the changes of rows are undone
        with contextlib.suppress(sqlite3.Error):  # closed or gone: nothing to roll back
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if is_storage:
                # A failed COMMIT may leave complete frames in the WAL, which recovery would apply: overwrite them.
                self.beat(self.db)

    @staticmethod
    def why_not(error: BaseException, alone: bool) -> BaseException:
        """Return the error for a thread whose transaction failed: its own if it was alone in it, else a StorageError."""
        return error if alone and not is_fatal(error) else StorageError(f"the database cannot be written: {error}")

    def run(self, message: Message) -> None:
        """Run one of several pieces of work: if it raises, only its own part is rolled back."""
        try:
            message.value = self.savepoint(lambda: message.work(self.db))
        except Exception as error:
            if is_fatal(error):
                raise
            message.error = error

    def set_synchronous(self, level: str) -> None:
        if level != self.synchronous:
            self.db.execute("PRAGMA synchronous = FULL" if level == "FULL" else "PRAGMA synchronous = NORMAL")
            self.synchronous = level


class Database:
    """The database of one process.

    The core owns the connection that writes. Other threads read through a few more; the last one used is taken first, because it
    has the statements prepared. A database in memory or on a network file system, where WAL has no shared memory, has only one.
    """

    def __init__(self, path: str, mode: str, clock: Clock | None = None) -> None:
        self.path, self.mode, self.clock = path, mode, clock or Clock()
        self.alone = path == ":memory:" or on_network(path)
        self.readers: list[sqlite3.Connection] = []  # idle ones
        self.damage = ""
        self.make_room: Callable[[], bool] = lambda: False  # frees space on a full disk; returns whether it did
        try:
            self.db = self.connect()
            found = damage_of(self.db, CHECK_PATIENCE_S)
            self.checked = found is not None  # whether the check finished in time
            self.refuse_damaged(found)
            self.migrate()
            self.set_steady()
            self.core = Core(self.db, self.beat, lambda: self.steady() - self.beaten_at > HEARTBEAT_S)
            self.last_change = int(self.db.execute(CHANGED_LAST).fetchone()[0])
            self.identity = None if path == ":memory:" else os.stat(path)[stat.ST_INO]
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_CORRUPT" or "malformed" in str(error):
                self.refuse_damaged(str(error))
            or_restore = ", or restore a backup: joborch restore BACKUP" if mode == "server" else ""
            way = "give a file that joborch created, or a new one"
            raise ConfigError(f"DB_PATH {path!r} cannot be opened ({error}): {way}{or_restore}") from error

    def refuse_damaged(self, damage: str | None) -> None:
        if damage:
            raise ConfigError(f"DB_PATH {self.path!r} is damaged ({one_line(damage, 120)}): {self.way_out()}")

    def way_out(self) -> str:
        if self.mode == "server":
            return "restore a backup with: joborch restore BACKUP"
        return "move it away: the server starts new attempts of the jobs that ran here"

    def look_for_damage(self) -> None:
        """Check the whole database in the background, unless the start did. A damaged database accepts no more jobs."""
        if self.checked:
            return
        with contextlib.closing(self.reader()) as db:
            self.damage = damage_of(db) or ""
        if self.damage:
            log.error("the database is damaged: %s; stop this %s, and %s", self.damage, self.mode, self.way_out())

    def connect(self, mode: str = "rwc") -> sqlite3.Connection:
        address = self.path if self.path == ":memory:" else f"file:{quote(os.path.abspath(self.path))}?mode={mode}"
        db = sqlite3.connect(address, uri=self.path != ":memory:", timeout=10, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        if self.alone:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA journal_size_limit = 67108864")
        return db

    def migrate(self) -> None:
        """Create the schema or bring it up to date. Raises ConfigError if this program does not know it."""
        version = int(self.db.execute("PRAGMA user_version").fetchone()[0])
        self.is_new = version == 0
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"DB_PATH {self.path!r} was created by a newer joborch (schema {version}, this one knows {SCHEMA_VERSION}): "
                "run that version, or give another file"
            )
        if 0 < version < min(MIGRATIONS):
            raise ConfigError(f"DB_PATH {self.path!r} was created by an unreleased joborch (schema {version}): give another file")
        if self.is_new:
            self.db.executescript(SCHEMA)
        for older in range(version, SCHEMA_VERSION) if version else ():
            self.db.executescript(MIGRATIONS[older])

    def set_steady(self) -> None:
        """Continue steady time where the last process left it: by the clock of this boot, or by wall time after a reboot."""
        at, boot, boot_s, steady = self.db.execute(LAST_HEARTBEAT).fetchone()
        now_boot, now_s = self.clock.boot()
        self.rebooted = boot not in ("", now_boot)  # what was not synced before that may be lost
        if boot != now_boot:
            # It is 0 in a new database, so it begins as wall time. Moves can be later than the last heartbeat, at most by its period.
            boot_s, steady = now_s, steady + max(HEARTBEAT_S if boot else 0.0, self.clock.wall() - at)
        self.steady_offset = float(steady - boot_s)
        self.beat(self.db)

    def steady(self) -> float:
        """Return the time in seconds for ages and delays. It began as wall time, but setting the clock does not change it."""
        return self.clock.boot()[1] + self.steady_offset

    def beat(self, db: sqlite3.Connection) -> None:
        """Store the value from which steady time continues after a reboot."""
        boot, boot_s = self.clock.boot()
        self.beaten_at = boot_s + self.steady_offset
        db.execute(HEARTBEAT, {"at": self.clock.wall(), "boot": boot, "boot_s": boot_s, "steady": self.beaten_at})

    def close(self) -> None:
        """Close the writing connection. Readers keep theirs: closing one during a query crashes the process."""
        with self.core.inside():
            self.db.close()

    def read(self, sql: str, **values: Any) -> list[sqlite3.Row]:
        """Return all rows of a query. Raises StorageError if the database cannot be read."""
        try:
            if self.core.is_inside():
                return self.db.execute(sql, values).fetchall()
            if self.alone:
                with self.core.inside():
                    return self.db.execute(sql, values).fetchall()
            try:
                db = self.readers.pop()
            except IndexError:
                db = self.reader()
            try:
                return db.execute(sql, values).fetchall()
            finally:
                if len(self.readers) < READERS_KEPT:
                    self.readers.append(db)
                else:
                    db.close()
        except sqlite3.Error as error:
            raise StorageError(f"the database cannot be read: {error}") from error

    def reader(self) -> sqlite3.Connection:
        db = self.connect("rw")  # rw: does not create a new file if the file was removed
        db.execute("PRAGMA query_only = 1")
        db.execute("PRAGMA wal_autocheckpoint = 0")  # only the writer checkpoints
        return db

    def number(self, sql: str, **values: Any) -> int:
        """Return the single number of a query; None counts as 0."""
        return int(self.read(sql, **values)[0][0] or 0)

    def write(self, work: Callable[[sqlite3.Connection], T], durable: bool = True) -> T:
        """Like Core.call, but on a full disk free space and try once more."""
        try:
            return self.core.call(work, durable)
        except StorageError as error:
            if "full" not in str(error) or not self.make_room():
                raise
            return self.core.call(work, durable)

    def check(self) -> None:
        """Raise StorageError if the database cannot be read and written, or its file was removed."""
        self.write(self.beat, durable=False)
        self.check_identity()

    def check_identity(self) -> None:
        """Raise StorageError if the database is damaged, or its file was removed: writes would be lost."""
        if self.damage:
            raise StorageError(f"the database is damaged: {self.damage}")
        if self.identity is not None:
            try:
                gone = os.stat(self.path)[stat.ST_INO] != self.identity
            except OSError:
                gone = True
            if gone:
                raise StorageError("the database file was removed or replaced while the program ran: restart it")


def damage_of(db: sqlite3.Connection, patience_s: float | None = None) -> str | None:
    """Return what is wrong with a database: empty if nothing is, None if the check took longer than `patience_s`."""
    deadline = None if patience_s is None else time.monotonic() + patience_s
    db.set_progress_handler(lambda: deadline is not None and time.monotonic() > deadline, 10_000)
    try:
        said = db.execute(DAMAGE).fetchone()[0]
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            return None
        raise
    except sqlite3.DatabaseError as error:  # too damaged to be checked
        return str(error)
    finally:
        db.set_progress_handler(None, 0)
    return "" if said == "ok" else str(said)


def on_network(path: str) -> bool:
    """Tell whether a path is on a network file system, by the longest mount point in /proc/mounts."""
    kinds = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "fuse.sshfs", "9p", "panfs", "orangefs")
    real, best, kind = os.path.realpath(path), "", ""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in mounts:
        _, point, found = line.split(" ")[:3]
        if (real + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, kind = point, found
    return kind.startswith(kinds)


# == 28. Store ==  A status changes in one statement; its history row, its user's account and rank change in the same transaction.


class Store(Database):
    """The jobs of one process. Every status changes here, and with it whose turn it is.

    One class serves both modes: a payload of a client is a job that may have no user and no service.
    """

    def __init__(self, path: str, mode: str, clock: Clock | None = None) -> None:
        super().__init__(path, mode, clock)
        self.noun = "job" if mode == "server" else "payload"
        self.limits: Mapping[str, Service] = {}
        self.sharing, self.last_seq = Sharing(), 0

    # -- reading --

    def jobs(self, sql: str, **values: Any) -> list[Job]:
        return [as_job(row) for row in self.read(sql, **values)]

    def job(self, sql: str, **values: Any) -> Job | None:
        rows = self.jobs(sql, **values)
        return rows[0] if rows else None

    def get(self, job_id: int) -> Job | None:
        return self.job(JOB_GET, id=job_id)

    def page(self, before: int, limit: int, user_id: int | None, service: str | None, status: str | None) -> list[Job]:
        """Return at most `limit` jobs with ids below `before` that match the filters, newest first.

        A cleaned job also matches the status with which it ended.
        """
        values = {"before": before, "limit": limit, "user_id": user_id, "service": service, "status": status}
        if user_id is not None:
            return self.jobs(JOBS_PAGE_OF_USER, **values)
        if status is not None:
            found = {job.id: job for sql in (JOBS_PAGE_IN_STATUS, JOBS_PAGE_CLEANED) for job in self.jobs(sql, **values)}
            return sorted(found.values(), key=lambda job: -job.id)[:limit]
        return self.jobs(JOBS_PAGE_OF_SERVICE if service is not None else JOBS_PAGE, **values)

    @staticmethod
    def row(db: sqlite3.Connection, job_id: int) -> Job:
        """Return a job that exists, inside a transaction."""
        return as_job(db.execute(JOB_GET, {"id": job_id}).fetchone())

    # -- writing --

    def add(self, new: NewJob, reason: str, most_queued: int | None = None) -> Job:
        """Store a new job durably, as Queued or Prepared, or as Invalid if a job that it follows did not end Completed.

        Raises sqlite3.IntegrityError if its mark or key exists, UnknownJob if it follows a job that its user does not have, and
        QueueFull if its user has `most_queued` jobs queued.
        """

        def insert(db: sqlite3.Connection) -> Job:
            job = self.insert(db, new, reason, most_queued)
            words = (self.noun, job.id, job.status, job.service, job.user_id)
            self.core.after(functools.partial(log.info, "%s %d %s (service=%s user=%s)", *words))
            return job

        return self.write(insert, durable=self.mode == "server")

    def insert(self, db: sqlite3.Connection, new: NewJob, reason: str, most_queued: int | None) -> Job:
        """Store a new job inside a transaction: see `add`."""
        if most_queued and db.execute(QUEUED_OF_USER, {"user_id": new.user_id, "limit": most_queued}).fetchone()[0] >= most_queued:
            raise QueueFull(f"user {new.user_id} has {most_queued:,} jobs queued, which is the limit")
        status = Status.QUEUED if self.mode == "server" else Status.PREPARED
        open_ids, broken = self.still_open(db, new)
        now, steady = self.clock.wall(), self.steady()
        values = {**vars(new), "status": status.value, "reason": reason, "blocked": len(open_ids), "moves": 1}
        values.update(changed=self.next_change(), created_at=now, moved_at=steady, arrived_at=steady)
        job_id = cast(int, db.execute(JOB_ADD, values).lastrowid)
        for on_id in open_ids:
            db.execute(DEPENDENCY_ADD, {"on_id": on_id, "job_id": job_id})
        self.add_history(db, job_id, now, None, status, reason)
        job = self.row(db, job_id)
        if broken:
            self.move_row(db, job, Status.INVALID, broken, cause=Cause.USER.value)
            return self.row(db, job_id)
        if self.mode == "server":  # servers need no news of a payload that is only Prepared
            self.core.moved.add(job_id)
        self.update_rank(db, job)
        return job

    def still_open(self, db: sqlite3.Connection, new: NewJob) -> tuple[list[int], str]:
        """Return the jobs that a new one must wait for, and why it can never run (empty if it can)."""
        open_ids, broken = [], ""
        for on_id in new.after:
            row = db.execute(JOB_GET, {"id": on_id}).fetchone()
            if row is None or row["user_id"] != new.user_id:
                raise UnknownJob(f"user {new.user_id} has no job {on_id}")
            earlier = as_job(row)
            if earlier.status not in OVER:
                open_ids.append(on_id)
            elif earlier.status is not Status.COMPLETED and db.execute(WAS_COMPLETED, {"id": on_id}).fetchone() is None:
                broken = broken or Reason.CHAIN_BROKEN.format(job=on_id, status=earlier.status)
        return ([], broken) if broken else (open_ids, "")

    def move(self, job: Job, to: Status, reason: str, durable: bool = False, **changes: Any) -> bool:
        """Move `job` from the status it was read with to `to`, and write its history.

        Return False if the row has left that status meanwhile, or if a kill of a payload was requested since it was read. Raises
        IllegalMove for a move that is not in the table. `changes` are other columns of MOVABLE, and `row_reason` if the row keeps
        another reason than its history. On the server an end is always durable.
        """
        durable = durable or (self.mode == "server" and to in ENDED)

        def move(db: sqlite3.Connection) -> bool:
            moved = self.move_in(db, job, to, reason, **changes)
            if moved:
                words = (self.noun, job.id, job.status, to, job.service, job.user_id, ": " + one_line(reason) if reason else "")
                self.core.after(functools.partial(log.info, "%s %d %s -> %s (service=%s user=%s)%s", *words))
            return moved

        return self.write(move, durable)

    def move_accepted(self, job: Job, accepted: str, dest_id: str, to: Status, reason: str, **changes: Any) -> bool:
        """Move a Processing job to Submitted, for the reason `accepted`, and on to its end, durably and in one transaction.

        Its history is that of two moves. Returns False if the row has left Processing meanwhile.
        """

        def both(db: sqlite3.Connection) -> bool:
            return self.move(job, Status.SUBMITTED, accepted, dest_id=dest_id) and self.move(self.row(db, job.id), to, reason, **changes)

        return self.write(both)

    def move_in(self, db: sqlite3.Connection, job: Job, to: Status, reason: str, **changes: Any) -> bool:
        """Make one move inside a transaction, and update the jobs that wait for this one: see `move`."""
        moved = self.move_row(db, job, to, reason, **changes)
        if moved and self.mode == "server" and to in ENDED:
            self.tell_dependents(db, job.id, to)
        return moved

    def move_row(self, db: sqlite3.Connection, job: Job, to: Status, reason: str, **changes: Any) -> bool:
        if (job.status, to) not in MOVES[self.mode]:
            raise IllegalMove(f"job {job.id}: {job.status} -> {to} is not a legal move")
        now = self.clock.wall()
        run_s, row_reason = changes.pop("run_s", None), changes.pop("row_reason", reason)
        if to in ENDED and job.status not in ENDED:
            changes.setdefault("ended_at", now)
        values = {name: changes.get(name, getattr(job, name)) for name in MOVABLE}
        values.update(id=job.id, to=to.value, source=job.status.value, reason=row_reason, expected=job.attempt)
        values.update(ended_as=job.status.value if to is Status.CLEANED else None)
        values.update(changed=self.next_change(), moved_at=self.steady())
        # Whether a kill was requested decides how a payload ended, so a row that was read before the request is not good enough.
        values.update(any_wish=self.mode == "server", kill_requested_at=job.kill_requested_at)
        if db.execute(JOB_MOVE, values).rowcount != 1:
            return False
        self.core.moved.add(job.id)
        if values["attempt"] != job.attempt:
            cause = Cause.INFRASTRUCTURE.value
            db.execute(ATTEMPT_ADD, {**job._asdict(), "ended_at": now, "reason": reason, "cause": cause})
        self.add_history(db, job.id, now, job.status, to, reason)
        if self.mode == "server" and (job.status in BUSY or to in BUSY):
            self.account(db, job, to, run_s, values["moved_at"], values["client"])
        if not (job.status in BUSY and to in BUSY):
            self.update_rank(db, job, is_queue=Status.QUEUED in (job.status, to))
        return True

    def tell_dependents(self, db: sqlite3.Connection, job_id: int, to: Status) -> None:
        """Release the jobs that follow a Completed one. If it ended otherwise, make them Invalid, and those that follow them."""
        ended = [(job_id, to)]
        while ended:
            on_id, how = ended.pop()
            for row in db.execute(DEPENDENTS, {"on_id": on_id}).fetchall():
                job = as_job(row)
                if how is not Status.COMPLETED:
                    reason = Reason.CHAIN_BROKEN.format(job=on_id, status=how)
                    self.move_row(db, job, Status.INVALID, reason, cause=Cause.USER.value)
                    ended.append((job.id, Status.INVALID))
                elif db.execute(JOB_UNBLOCK, {"id": job.id}).rowcount and job.blocked == 1:
                    self.update_rank(db, job)
            db.execute(DEPENDENTS_FORGET, {"on_id": on_id})

    def add_history(self, db: sqlite3.Connection, job_id: int, now: float, source: Status | None, to: Status, reason: str) -> None:
        """Store a move. `seq` orders all moves, whatever the clock says: unique microseconds of steady time."""
        self.last_seq = max(self.last_seq + 1, int(self.steady() * 1e6))
        values = {"id": job_id, "now": now, "source": source and source.value, "to": to.value, "reason": reason, "seq": self.last_seq}
        db.execute(HISTORY_ADD, values)

    def next_change(self) -> int | None:
        """Return the next number for a client's /events; called inside a transaction. The server has none."""
        if self.mode == "server":
            return None
        self.last_change += 1
        return self.last_change

    def request_kill(self, job_id: int, cause: Cause) -> bool:
        """Store durably that a job must be stopped. Return whether that is new."""
        values = {"id": job_id, "now": self.clock.wall(), "cause": cause.value}
        return self.write(lambda db: db.execute(KILL_WISH, values).rowcount == 1)

    def take_along(self, job: Job, client: str) -> bool:
        """Store that a job's client has another name. Return False if the job has moved meanwhile."""
        values = {"id": job.id, "source": job.client, "to": client, "attempt": job.attempt}

        def rename(db: sqlite3.Connection) -> bool:
            if db.execute(JOB_CLIENT, values).rowcount != 1:
                return False
            self.set_run(self.row(db, job.id))
            return True

        return self.write(rename)

    def note(self, sql: str, **values: Any) -> None:
        """Write a column that is not a status, without waiting for the disk."""
        self.write(lambda db: db.execute(sql, values).rowcount, durable=False)

    def tell(self, job_id: int, **begun: float) -> None:
        """Let /events report a payload again. If it has just started, give `started_at` (wall) and `now` (steady)."""

        def say(db: sqlite3.Connection) -> None:
            sql = PAYLOAD_BEGUN if begun else PAYLOAD_TOLD
            if db.execute(sql, {"id": job_id, "changed": self.next_change(), **begun}).rowcount:
                self.core.moved.add(job_id)

        self.write(say, durable=False)

    def forget(self, job_ids: Sequence[int]) -> None:

        def delete(db: sqlite3.Connection) -> None:
            for job_id in job_ids:
                for sql in (FORGET_HISTORY, FORGET_ATTEMPTS, DEPENDENCIES_FORGET, FORGET_JOB):
                    db.execute(sql, {"id": job_id})

        self.write(delete, durable=False)

    def renew(self) -> None:
        """After a restore: skip ids that may have been assigned since the backup, and become a new instance."""

        def skip(db: sqlite3.Connection) -> None:
            last = db.execute(LAST_ID).fetchone()
            db.execute(SKIP_IDS, {"last": (last[0] if last else 0) + RESTORE_ID_GAP})
            db.execute(NEW_INSTANCE)

        self.write(skip)

    # -- turns --

    def seen(self, known: ChainMap[K, V]) -> Mapping[K, V]:
        """Return a map of Shares as this thread may see it: only the current transaction sees its changes."""
        return known if self.core.is_inside() else known.maps[1]

    def share(self, service: str, user_id: int) -> Share:
        """Return a user's part in a service, from memory or, if nothing is going on there, from the rows."""
        share = self.seen(self.core.shares.users).get((service, user_id))
        if share is None:
            rows = self.read(USAGE_GET, service=service, user_id=user_id)
            share = Share(Usage(*rows[0])) if rows else NO_SHARE
        return share

    def line(self, service: str) -> Line:
        return self.seen(self.core.shares.lines).get(service, NO_LINE)

    def load(self, client: str) -> Load:
        return self.seen(self.core.shares.loads).get(client, NO_LOAD)

    def weight(self, user_id: int) -> float:
        """Return a user's weight: the stored one, else that of the settings, else 1."""
        return self.seen(self.core.shares.weights).get(user_id, 1.0)

    def turns(self, service: str) -> Iterator[Turn]:
        """Yield the turns of users whose next job may be sent, the first turn first."""
        shares = self.core.shares
        turns = shares.turns(service) if self.core.is_inside() else iter(shares.order.get(service, [])[:CANDIDATES_LOOKED_AT])
        return itertools.takewhile(lambda turn: not turn.at_quota, turns)

    def users_queued(self, service: str) -> int:
        """Return how many users have a job that could run, counted up to 10,000."""
        return min(len(self.core.shares.order.get(service, ())), 10_000)

    def turns_before(self, service: str, turn: Turn) -> int:
        """Return how many users with a free run have their turn before this one, counted up to 10,000."""
        return min(bisect.bisect_left(self.core.shares.order.get(service, []), turn._replace(at_quota=False)), 10_000)

    def runs(self) -> Iterator[Run]:
        """Yield all jobs at clients."""
        users = self.seen(self.core.shares.users)
        return (run for share in list(users.values()) for run in share.runs)

    def set_pace(self, db: sqlite3.Connection, service: str, pace: Pace) -> None:
        db.execute(PACE_SET, {"service": service, "runs": pace.runs, "mean_s": pace.mean_s})
        self.core.shares.lines[service] = self.line(service)._replace(pace=pace)

    def set_run(self, job: Job) -> None:
        """Keep what is known of a job at a client as it is now, inside a transaction; forget it if it is at none any more."""
        run, shares, share, line = run_of_job(job), self.core.shares, self.share(*job.pair), self.line(job.pair[0])
        old = share.run(job.id)
        for each, count in ((old, -1), (run, 1)):
            if each is not None:
                shares.loads[each.client] = self.load(each.client).plus(each, count)
                line = line._replace(busy=line.busy + count)
        shares.lines[job.pair[0]] = line
        runs = [each for each in (*share.runs, run) if each is not None and each is not old]
        shares.users[job.pair] = share._replace(runs=tuple(sorted(runs)))

    def account(self, db: sqlite3.Connection, job: Job, to: Status, run_s: float | None, moved_at: float, client: str) -> None:
        """Charge a user in advance for a job that goes to a client, or its real length when it is over."""
        share = self.share(*job.pair)
        run = share.run(job.id)
        if run is None:
            charged = charge_in_advance(job, share.usage, self.line(job.pair[0]).pace, self.sharing.half_life_s)
        else:
            charged = run.charged if to in BUSY else self.charge_run(db, job, to, run_s, run)
        if run is None or to not in BUSY:
            db.execute(JOB_CHARGE_SET, {"id": job.id, "charged": charged})
        self.set_run(job._replace(status=to, charged=charged, client=client, moved_at=moved_at))

    def charge_run(self, db: sqlite3.Connection, job: Job, to: Status, run_s: float | None, run: Run) -> float:
        """Add a run that is over to its user's use. Return its charge."""
        now, share = self.steady(), self.share(*job.pair)
        usage = share.usage
        if run_s is None:
            run_s = now - job.moved_at if job.status is Status.RUNNING else 0.0 if job.started_at is None else run.charged / job.cpus
        elif to in (Status.COMPLETED, Status.FAILED):
            usage = with_run(usage, run_s)
            self.set_pace(db, job.pair[0], with_run(self.line(job.pair[0]).pace, run_s))
        use = self.without_old_credit(job, share) if run_s > TURN_S else usage.use
        counted = job.cpus * counted_s(max(run_s, TURN_S), self.sharing.half_life_s)
        usage = usage._replace(use=used(use, counted, now, self.sharing.half_life_s))
        db.execute(USAGE_SET, {"service": job.service, "user_id": job.user_id, **usage._asdict()})
        self.core.shares.users[job.pair] = share._replace(usage=usage)
        return job.cpus * max(run_s, TURN_S)

    def without_old_credit(self, job: Job, share: Share) -> float:
        """Return the use of a job's user, capped by the use of the service's other active users: see `cap_idle_credit`.

        It is not capped if the user has no more jobs waiting. What the others were charged in advance does not count, because
        they may not use it.
        """
        (name, user_id), use, now, shares = job.pair, share.usage.use, self.steady(), self.core.shares
        service, weight = self.limits.get(name), self.weight(user_id)
        level = next((turn.rank for turn in self.turns(name) if turn.user_id != user_id), float("inf"))
        if service is None or service.policy != "share" or share.turn is None or cap_idle_credit(use, weight, level) == use:
            return use
        changed = {other for service_name, other in shares.users.maps[0] if service_name == name}
        for other in (shares.running.get(name, set()) | changed) - {user_id}:
            theirs = self.share(name, other)
            if theirs.runs:
                had = with_open_runs(theirs.usage.use, theirs.runs, now, self.sharing.half_life_s, in_advance=False)
                level = min(level, had - math.log2(self.weight(other)))
        return use if level == float("inf") else cap_idle_credit(use, weight, level)

    def used_slot_s(self, service: str, user_id: int) -> float:
        """Return a user's use of a service as it counts now, in slot-seconds. Running jobs count with the time they have run."""
        now, half_life_s, share = self.steady(), self.sharing.half_life_s, self.share(service, user_id)
        return use_now(with_open_runs(share.usage.use, share.runs, now, half_life_s, in_advance=False), now, half_life_s)

    def charge_longer(self, job: Job) -> None:
        """Charge more for a run that takes longer than expected: double the charge, but never far more than the run has used."""
        charged = job.charged + min(max(job.charged, 1.0), job.cpus * self.sharing.half_life_s / 8)

        def charge(db: sqlite3.Connection) -> None:
            values = {"id": job.id, "attempt": job.attempt, "status": job.status.value, "charged": charged}
            if db.execute(JOB_CHARGE, values).rowcount:
                self.set_run(self.row(db, job.id))
                self.update_rank(db, job, is_queue=False)

        self.write(charge, durable=False)

    def update_rank(self, db: sqlite3.Connection, job: Job, is_queue: bool = True) -> None:
        """Update the turn of a job's user. If `is_queue` is False, the user's queued jobs are the same as before."""
        if self.mode == "server" and job.service in self.limits:
            self.core.undecided = True
            self.update_turn(db, job.pair, is_queue)

    def update_turn(self, db: sqlite3.Connection, pair: tuple[str, int], is_queue: bool) -> None:
        """Update a user's turn in a service, inside a transaction."""
        service, share, turn = self.limits[pair[0]], self.share(*pair), None
        if is_queue:
            sql = WAITING_FIRST if service.policy == "share" else WAITING_BY_PRIORITY
            rows = db.execute(sql, {"service": pair[0], "user_id": pair[1]})
            share = share._replace(waiting=tuple(Waiting(*row) for row in rows))
        if share.waiting:
            use = with_open_runs(share.usage.use, share.runs, self.steady(), self.sharing.half_life_s)
            rank, head = rank_of(service.policy, share.waiting, use - math.log2(self.weight(pair[1])), self.sharing.ageing_s)
            turn = Turn(len(share.runs) >= service.runs_per_user, rank, head, pair[1])
        self.core.shares.users[pair] = share._replace(turn=turn)

    def set_limits(self, services: Mapping[str, Service], sharing: Sharing | None = None) -> None:
        """Use these services and rules, and compute all turns."""
        self.limits, self.sharing = services, sharing or self.sharing
        if self.mode == "server":
            self.write(self.make_turns)

    def make_turns(self, db: sqlite3.Connection) -> None:
        """Fill the memory from the rows. Convert uses that were counted with another half-life to their present value."""
        (half_life_s,), now = db.execute(TURNS_MADE).fetchone(), self.steady()
        if half_life_s != self.sharing.half_life_s:
            shift = now / self.sharing.half_life_s - now / half_life_s if half_life_s else 0.0
            for row in db.execute(USAGE_ALL).fetchall() if shift else ():
                db.execute(USAGE_SET, {**dict(row), "use": row["used"] + shift})
            db.execute(TURNS_MADE_BY, {"half_life_s": self.sharing.half_life_s})
        shares = self.core.shares = Shares()
        shares.weights.update({**self.sharing.weights, **{row[0]: row[1] for row in db.execute(WEIGHT_ALL)}})
        shares.lines.update({row[0]: Line(0, Pace(*row[1:])) for row in db.execute(PACE_ALL)})
        for job in map(as_job, db.execute(ALL_BUSY)):
            self.set_run(job)
        for service in self.limits:
            for (user_id,) in db.execute(QUEUED_USERS, {"service": service}).fetchall():
                self.update_turn(db, (service, user_id), is_queue=True)

    def set_weight(self, user_id: int, weight: float) -> None:

        def store(db: sqlite3.Connection) -> None:
            db.execute(WEIGHT_SET, {"user_id": user_id, "weight": weight})
            self.core.shares.weights[user_id] = weight
            for service in self.limits:
                self.update_turn(db, (service, user_id), is_queue=False)
            self.core.undecided = True

        self.write(store)

    # -- claims --

    def claim(self, job_id: int, client: str, room: int) -> Job | None:
        """Move a queued job to Processing for `client`, if quota, service limit and `room` (slots) there still allow it.

        One transaction decides, and it is durable: a restarted server must know where a job may be.
        """

        def take(db: sqlite3.Connection) -> Job | None:
            job = self.row(db, job_id)
            service = self.limits[job.service or ""]
            if job.status is Status.QUEUED and job.kill_requested_at is not None:
                self.move_in(db, job, Status.KILLED, Reason.KILLED_UNSENT, cause=Cause.CANCELLED.value)
                return None
            full = (
                self.load(client).cpus + job.cpus > room
                or self.line(job.pair[0]).busy >= service.max_runs
                or len(self.share(*job.pair).runs) >= service.runs_per_user
            )
            if full or job.status is not Status.QUEUED or job.not_before is not None or job.blocked:
                return None
            self.move_in(db, job, Status.PROCESSING, Reason.CLAIMED.format(client=client), client=client)
            return self.row(db, job_id)

        return self.write(take)

    def admit_due(self) -> int:
        """Make new attempts claimable if their back-off is over; return how many."""
        due = self.read(DELAYED_DUE, now=self.steady())

        def admit(db: sqlite3.Connection) -> None:
            for row in due:
                db.execute(JOB_ADMIT, {"id": row["id"]})
                self.update_rank(db, self.row(db, row["id"]))

        if due:
            self.write(admit, durable=False)
        return len(due)


# == 29. Restore ==  A prepared restore is completed at the next start, and no id is assigned twice.


def folder_of(path: str) -> str:
    """Return the real path of the folder that a file is in."""
    return os.path.realpath(os.path.dirname(path))


def decided_restore(db_path: str) -> Path | None:
    """Return a restored database that is complete but not yet in place, or None."""
    folder, start = Path(folder_of(db_path)), f"{os.path.basename(db_path)}.restored-"
    return next((path for path in folder.iterdir() if path.name.startswith(start)), None) if folder.is_dir() else None


def finish_restore(db_path: str, data: DataFolder) -> tuple[Path | None, Path | None]:
    """Put a restored database in place and remove incomplete ones. Return the replaced database and the folder of files without a job.

    Both are None if there was nothing to do. Each step may be repeated after a crash.
    """
    for suffix in ("", "-wal", "-shm", "-journal"):
        discard(Path(f"{db_path}.restoring{suffix}"))
    ready = decided_restore(db_path)
    if ready is None:
        return None, None
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(ready))}?immutable=1", uri=True)) as db:
        known = {row[0] for row in db.execute(ALL_UUIDS)}
    unclaimed = data.set_aside(lambda name: name.partition(".")[0] in known)
    crash_point("restore.files")
    kept = Path(f"{db_path}.replaced-{ready.name.rpartition('.restored-')[2]}")
    if os.path.exists(db_path) and not kept.exists():
        os.link(db_path, kept)
    crash_point("restore.kept")
    for suffix in ("-wal", "-shm"):  # of the old database
        with contextlib.suppress(FileNotFoundError):
            os.rename(db_path + suffix, f"{kept}{suffix}")
    fsync_path(folder_of(db_path))
    crash_point("restore.moved")
    os.replace(ready, db_path)
    fsync_path(folder_of(db_path))
    return kept if kept.exists() else None, unclaimed


# == 30. Files ==  Names are checked before anything is stored, and content is streamed in chunks.


class StoredFile(NamedTuple):
    """One received file: its relative POSIX path, its size in bytes and its SHA-256 (hex)."""

    path: str
    size: int
    sha256: str


@dataclass
class Form:
    """A received form: its files, already on disk, and its text fields."""

    files: list[StoredFile] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)


def shown(name: str) -> str:
    """Return a file name for a message: quoted, printable and short."""
    return repr(one_line(name, 80))


def check_path(path: str) -> str:
    """Return `path` without a leading `./`. Raises HttpError 400 unless it is a relative POSIX path that stays in its folder."""
    name = re.sub(r"^(\./)+", "", path)
    parts = name.split("/")
    if not name:
        raise HttpError(400, "a file has no name: give a relative path, as in inputs/a.pdb", "file")
    if any(ord(char) < 32 or ord(char) == 127 for char in name):
        raise HttpError(400, f"file name {shown(name)} contains a control character: use printable ones", "file")
    if name.startswith("/"):
        raise HttpError(400, f"file name {shown(name)} is absolute: give a relative path", "file")
    if ".." in parts:
        raise HttpError(400, f"file name {shown(name)} contains '..': give a path that stays in its folder", "file")
    if "" in parts or "." in parts:
        raise HttpError(400, f"file name {shown(name)} has an empty part or a '.': write inputs/a.pdb", "file")
    if len(parts) > DEPTH_LIMIT + 1:
        raise HttpError(400, f"file name {shown(name)} is {len(parts) - 1} folders deep: at most {DEPTH_LIMIT}", "file")
    sizes = [len(os.fsencode(part)) for part in parts]
    if max(sizes) > NAME_LIMIT_BYTES or sum(sizes) + len(sizes) - 1 > PATH_LIMIT_BYTES:
        limits = f"at most {NAME_LIMIT_BYTES} bytes for each part and {PATH_LIMIT_BYTES} in all"
        raise HttpError(400, f"file name {shown(name)} is too long: {limits}", "file")
    return name


def inputs_digest(digests: Mapping[str, str]) -> str:
    """Return one SHA-256 (hex) for a set of files; `digests` has the SHA-256 of each, by path."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def parents_of(path: str) -> set[str]:
    """Return all folders above a relative path: `a` and `a/b` for `a/b/c`."""
    parts = path.split("/")
    return {"/".join(parts[:depth]) for depth in range(1, len(parts))}


class Tree:
    """The file names of one form so far: each is unique, and none is both a file and a folder."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.folders: set[str] = set()

    def add(self, path: str) -> None:
        """Add `path`. Raises HttpError 400 if it clashes with an earlier one."""
        parents = parents_of(path)
        if path in self.files:
            raise HttpError(400, f"file name {path!r} is used twice: give each file a different name", "file")
        if path in self.folders or parents & self.files:
            raise HttpError(400, f"file name {path!r} is both a file and a folder", "file")
        self.files.add(path)
        self.folders |= parents


def part_path(segment: Any, by_name: bool) -> str | None:
    """Return the path of a part's file, or None if the part is a text field.

    Callers of a server send the path as `filename`. Between machines (`by_name`), `name` is the path and `filename` the base
    name. A 2.2 server writes `name*=utf-8''two%20words.txt`, which the multipart library ignores.
    """
    exact = segment.header("X-Joborch-Path")
    if by_name and exact:
        return os.fsdecode(unquote_to_bytes(exact))
    name: str = segment.name or extended_parameter(segment.header("Content-Disposition", ""), "name")
    filename: str | None = segment.filename
    if filename is None:
        filename = extended_parameter(segment.header("Content-Disposition", ""), "filename") or None
    if not by_name or (filename is None and name == DIGESTS_FIELD):
        return filename
    return filename if name in ("", "file") and filename else name or None


def extended_parameter(header: str, name: str) -> str:
    """Return the value of `name*=utf-8''...` in a header (RFC 5987), or an empty string."""
    match = re.search(rf";\s*{name}\*=(?:utf-8|UTF-8)''([^;\s]+)", header)
    return unquote_to_bytes(match[1]).decode("utf-8", "replace") if match else ""


def multipart_boundary(content_type: str) -> str:
    """Return the boundary of a form. Raises HttpError 415 for another content type, 400 if the boundary is missing."""
    kind, _, rest = content_type.partition(";")
    if kind.strip().lower() != "multipart/form-data":
        raise HttpError(415, "send a form as multipart/form-data, as curl -F does", "Content-Type")
    match = re.search(r'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', rest)
    if not match:
        raise HttpError(400, "the Content-Type has no boundary: let your HTTP library write it", "Content-Type")
    return match[1] or match[2]


class FormReader:
    """Streams a multipart form: files to disk below `folder`, text fields to memory.

    `before_file` may refuse a further file; `after_write` gets the number of bytes written, and `reserve` that of bytes which an
    archive unpacks to. They serve the disk account.
    """

    def __init__(
        self,
        folder: Path,
        by_name: bool = False,
        before_file: Callable[[], None] = lambda: None,
        after_write: Callable[[int], None] = lambda _: None,
        reserve: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.folder, self.root, self.by_name = folder, str(folder), by_name
        self.before_file, self.after_write, self.reserve = before_file, after_write, reserve
        self.form, self.tree, self.folders = Form(), Tree(), {""}
        self.unpack_limit_bytes = 0  # of all files together, if archives are unpacked

    def read(self, stream: IO[bytes], content_type: str, length: int) -> Form:
        """Read the whole form. Raises HttpError; the caller must then remove the folder."""
        import multipart

        parser = multipart.PushMultipartParser(
            multipart_boundary(content_type),
            content_length=length,
            max_header_size=PART_HEADER_LIMIT_BYTES,
            max_segment_count=PARTS_LIMIT,
        )
        try:
            events = parser.parse_blocking(stream.read, chunk_size=CHUNK_BYTES)
            for event in events:
                self.part(event, events)
        except multipart.ParserLimitReached as error:
            if "segment count" in str(error).lower():
                raise HttpError(413, f"the form has more than {PARTS_LIMIT} parts: send the files as one archive") from error
            raise HttpError(413, f"a part's headers are too long: at most 8 lines of {PART_HEADER_LIMIT_BYTES} bytes") from error
        except multipart.MultipartError as error:
            raise HttpError(400, f"the form cannot be read: {error}") from error
        return self.form

    def part(self, segment: Any, events: Iterator[Any]) -> None:
        """Read one part from the event stream, up to the None that ends it."""
        path = part_path(segment, self.by_name)
        chunks = iter(lambda: next(events), None)
        if path is None:
            self.text(segment, events)
        elif self.unpack_limit_bytes and segment.name == "archive":
            self.archive(path, chunks)
        else:
            mode = segment.header("X-Joborch-Mode", "") if self.by_name else ""
            self.file(check_path(path), chunks, int(mode, 8) if re.fullmatch("[0-7]{3}", mode) else None)

    def text(self, segment: Any, events: Iterator[Any]) -> None:
        limit = 32 * MIB if self.by_name and segment.name == DIGESTS_FIELD else FIELD_LIMIT_BYTES
        name, value = one_line(segment.name, 80), bytearray()
        for chunk in iter(lambda: next(events), None):
            value += chunk
            if len(value) > limit:
                raise HttpError(413, f"field {name} is over {limit // KIB} KiB: send long texts as files", name)
        if name in self.form.fields:
            raise HttpError(400, f"field {name} is given twice: give it once", name)
        try:
            self.form.fields[name] = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise HttpError(400, f"field {name} is not UTF-8", name) from error

    def archive(self, name: str, chunks: Iterable[bytes]) -> None:
        """Store the files in an archive, once it has arrived: the directory of a ZIP is at its end."""
        with tempfile.TemporaryFile() as spool:
            for chunk in chunks:
                spool.write(chunk)
                self.after_write(len(chunk))
            load_plugin("uploads").unpack(self, name, spool)

    def file(self, path: str, chunks: Iterable[bytes], mode: int | None = None) -> None:
        """Store one file. If its permissions are not known, a program gets the right to be executed: a script may call ./tool."""
        self.tree.add(path)
        self.before_file()
        self.make_folders(path)
        digest, size, head = hashlib.sha256(), 0, b""
        descriptor = os.open(f"{self.root}/{path}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        with open(descriptor, "wb", buffering=0) as target:
            for chunk in chunks:
                write_all(target, chunk)
                self.after_write(len(chunk))
                digest.update(chunk)
                size += len(chunk)
                head += chunk[: 4 - len(head)]
            if mode is not None:
                os.fchmod(descriptor, mode & 0o777 | 0o600)
            elif head.startswith((b"#!", b"\x7fELF")):
                os.fchmod(descriptor, 0o700)
        self.form.files.append(StoredFile(path, size, digest.hexdigest()))

    def make_folders(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        if parent not in self.folders:
            (self.folder / parent).mkdir(parents=True, exist_ok=True)
            self.folders |= parents_of(path)


def write_all(target: IO[bytes], data: bytes) -> None:
    """Write all of `data` to an unbuffered file, whose write() may accept only a part."""
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]


# == 31. Folders ==  Makes files durable, and safely reads folders that a script can tamper with.


def fsync_path(path: str | Path) -> None:
    """Make a file's content or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[str]:
    """Return the relative paths of all files below a folder, sorted."""
    root = os.fsencode(folder)
    return sorted(os.fsdecode(os.path.join(here, name)[len(root) + 1 :]) for here, _, names in walk(root) for name in names)


def fsync_tree(folder: Path, paths: Sequence[str]) -> None:
    """Make `folder`, the files `paths` in it, and its entry in its parent durable."""
    if len(paths) > 32:  # one syncfs is cheaper than many fsyncs
        sync_file_system(folder)
        return
    root = str(folder)
    inner = set().union(*(parents_of(path) for path in paths))
    for path in [*paths, *sorted(inner, key=lambda inner_path: -inner_path.count("/"))]:
        fsync_path(f"{root}/{path}")
    fsync_path(root)
    fsync_path(folder.parent)


def sync_file_system(path: Path) -> None:
    """Write the whole file system of `path` to disk (syncfs(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc().syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs failed", str(path))
    finally:
        os.close(descriptor)


@functools.lru_cache(maxsize=1)
def libc() -> ctypes.CDLL:
    """Return the C library, for system calls that Python does not wrap."""
    return ctypes.CDLL(None, use_errno=True)


def open_folder(path: str | Path | int, *inner: str | bytes, flags: int = os.O_PATH) -> int:
    """Return a descriptor of a folder, or of the folder `inner` below it. Raises OSError if any of them is a link.

    `path` may be a descriptor. `flags` apply to the last folder: O_PATH is enough to open what is in it.
    """
    names: list[str | bytes] = [*inner] if isinstance(path, int) else [os.fspath(path), *inner]
    descriptor = owned = path if isinstance(path, int) else -1
    for number, name in enumerate(names, 1):
        how = (flags if number == len(names) else os.O_PATH) | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            further = os.open(name, how, dir_fd=None if descriptor < 0 else descriptor)
        finally:
            if descriptor != owned:
                os.close(descriptor)
        descriptor = further
    return descriptor


@contextlib.contextmanager
def opened_folder(path: str | Path | int, *inner: str | bytes, flags: int = os.O_PATH) -> Iterator[int]:
    """Open a folder as `open_folder` does, and close it at the end."""
    descriptor = open_folder(path, *inner, flags=flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_regular(path: str | Path | int, *inner: str) -> IO[bytes]:
    """Open a file that a script could have replaced: follow no link, wait for no FIFO. Raises OSError if it is not a regular file.

    With `inner`, `path` is a folder (or a descriptor of one) and `inner` the path below it; no folder on the way may be a link.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    if isinstance(path, int) and len(inner) == 1:
        descriptor = os.open(inner[0], flags, dir_fd=path)
    elif inner:
        with opened_folder(path, *inner[:-1]) as folder:
            descriptor = os.open(inner[-1], flags, dir_fd=folder)
    else:
        descriptor = os.open(cast("str | Path", path), flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return open(descriptor, "rb")


def state_below(folder: Path, name: str) -> os.stat_result:
    """Return the status of `name` in a folder that a script can change, following no link. Raises OSError."""
    with opened_folder(folder) as descriptor:
        return os.stat(name, dir_fd=descriptor, follow_symlinks=False)


def has_work(folder: Path) -> bool:
    """Tell whether a payload has its work folder. True if that cannot be checked."""
    try:
        return stat.S_ISDIR(state_below(folder, "work").st_mode)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def last_line(path: Path) -> str:
    """Return the last non-blank line of a text file, safe to show; empty if the file cannot be read."""
    try:
        with open_regular(path.parent, path.name) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4 * KIB))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((one_line(line, 200) for line in reversed(lines) if line.strip()), "")


def give_rights(folder: Path | int, *inner: str | bytes) -> None:
    """Give this user full rights to a folder again if a script removed them. Raises OSError if it is not a folder."""
    with opened_folder(folder, *inner) as descriptor:
        path = f"/proc/self/fd/{descriptor}"
        if not os.access(path, os.R_OK | os.X_OK):
            os.chmod(path, 0o700)


def open_unreadable(name: bytes | str, folder: int | None) -> int:
    """Open a file whose mode denies reading even to its owner, and restore its mode. Raises PermissionError if another user owns it."""
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)
    try:
        state, path = os.fstat(descriptor), f"/proc/self/fd/{descriptor}"
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        os.chmod(path, stat.S_IMODE(state.st_mode) | stat.S_IRUSR)
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        finally:
            os.chmod(path, stat.S_IMODE(state.st_mode))
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file atomically and durably: after a crash it has either its old or its new content."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    os.rename(temporary, path)
    fsync_path(os.path.realpath(path.parent))  # DATA_PATH may be a link


def is_full(folder: str | Path) -> bool:
    """Tell whether the file system of `folder` is full: no blocks or no inodes left (some file systems have no inode limit)."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize < 64 * KIB or (state.f_files > 0 and state.f_favail < 8)


def free_bytes(folder: str | Path) -> int:
    """Return how many bytes an ordinary user can still write to the file system of `folder`."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def walk(root: bytes, on_error: Callable[[OSError], None] | None = None) -> Iterator[tuple[bytes, list[bytes], list[bytes]]]:
    """Yield each folder below `root` with its subfolders and its other entries, all sorted. Links are not followed.

    Unlike os.walk() before Python 3.12, it works at any depth.
    """
    waiting = [root]
    while waiting:
        here = waiting.pop()
        try:
            entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(here))
        except OSError as error:
            if on_error is not None:
                on_error(error)
            continue
        folders = [name for name, is_folder in entries if is_folder]
        yield here, folders, [name for name, is_folder in entries if not is_folder]
        waiting += [os.path.join(here, name) for name in reversed(folders)]


class Level:
    """One folder on the path of a walk: its path, its descriptor (-1 if closed), and the subfolders still to visit."""

    def __init__(self, path: bytes, descriptor: int) -> None:
        self.path, self.descriptor, self.folders = path, descriptor, cast("list[bytes]", [])

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def walk_open(
    root: int, room: int, note: Callable[[bytes, str], None], mend: bool = False
) -> Iterator[tuple[int, bytes, list[bytes], int]]:
    """Yield the open folder `root` and each folder below it: descriptor, path, sorted names of non-folders, number of entries.

    Links are never followed, even if something is replaced by one during the walk. The walk ends after `room` entries; `note`
    gets the path of each omitted entry, and why. With `mend`, folders of this user are made readable first. Deep trees need
    few descriptors: upper folders are closed and reopened on the way back.
    """
    levels: list[Level] = []
    entered: Level | None = Level(b"", os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=root))
    try:
        while entered is not None or levels:
            if entered is not None:
                levels.append(entered)
                files, entered.folders, count = read_folder(entered, room, note)
                room -= count
                yield entered.descriptor, entered.path, files, count
                if room < 0:
                    return
                if len(levels) > WALK_DESCRIPTORS:
                    levels[-WALK_DESCRIPTORS - 1].close()
            while levels and not levels[-1].folders:
                levels.pop().close()
            entered = enter(root, levels[-1], note, mend) if levels else None
    finally:
        for level in [*levels, *([entered] if entered else [])]:
            level.close()


def enter(root: int, above: Level, note: Callable[[bytes, str], None], mend: bool) -> Level | None:
    """Open the next subfolder of `above`. If that is impossible, note it and return None."""
    name = above.folders.pop()
    path = above.path + b"/" + name if above.path else name
    try:
        if len(path) > 4095:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if above.descriptor < 0:
            above.descriptor = open_folder(root, *above.path.split(b"/"), flags=os.O_RDONLY)
        if mend:
            with contextlib.suppress(PermissionError):  # another user's folder: read what its mode allows
                give_rights(above.descriptor, name)
        return Level(path, os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above.descriptor))
    except OSError as error:
        note(path, os.strerror(error.errno or 0))
        return None


def read_folder(level: Level, room: int, note: Callable[[bytes, str], None]) -> tuple[list[bytes], list[bytes], int]:
    """Return the names of non-folders (sorted), of folders (in reverse), and the number of entries, which may exceed `room`."""
    names: list[list[bytes]] = [[], []]
    count, prefix = 0, level.path + b"/" if level.path else b""
    try:
        with os.scandir(level.descriptor) as entries:
            for entry in entries:
                count += 1
                if count > room + LEFT_OUT_LINES:
                    break
                names[entry.is_dir(follow_symlinks=False)].append(os.fsencode(entry.name))
    except OSError as error:
        note(level.path, os.strerror(error.errno or 0))
    files, folders = sorted(names[0]), sorted(names[1])
    if count > room:
        for name in [*files[room:], *folders[max(0, room - len(files)) :]]:
            note(prefix + name, "the result would have too many files (JOBORCH_MAX_RESULT_FILES)")
        note(level.path, "the rest was not read: the result would have too many files (JOBORCH_MAX_RESULT_FILES)")
        files, folders = files[:room], folders[: max(0, room - len(files))]
    return files, folders[::-1], count


def helper_environment() -> dict[str, str]:
    """Return the environment for rm, chmod and zstd, without secrets, because payloads could read it."""
    return {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}


LOCK_HELD = (errno.EAGAIN, errno.EACCES)  # lockf(3): another process holds the lock; other errors come from the file system
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock_trouble(error: OSError) -> str:
    """Return why a file system refused a lock that no process holds, and the remedy."""
    reason = os.strerror(error.errno or 0)
    if error.errno not in NO_LOCKS:
        return f"{reason}; is the file system healthy?"
    return (
        f"this file system has no locks ({reason}); use a folder on another one, such as a local disk, "
        "or mount it with locks (Lustre: -o flock; NFS: with lockd)"
    )


def bytes_below(path: Path) -> int:
    """Return the total size of the files below a folder that this user can see."""
    total = 0
    for here, _, names in walk(os.fsencode(path)):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(here, name)).st_size
    return total


def take_lock(file: IO[str], name: str, kind: str) -> None:
    """Lock an open file until the process ends and write the process id to it. Raises ConfigError if that fails."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in LOCK_HELD:
            raise ConfigError(f"{name} cannot be locked: {lock_trouble(error)}") from error
        file.seek(0)
        owner = file.read().strip() or "unknown"
        raise ConfigError(f"{name} is in use by process {owner}: stop it, or use another {kind}") from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()


# -- run.sh --

SHELLS = re.compile(r"r?(ba|da|a|k|mk|z)?sh[-0-9.]*|busybox")  # bash can run their scripts, too
SCRIPT_NAMES = {"python": "your.py", "pypy": "your.py", "perl": "your.pl", "Rscript": "your.R", "node": "your.js", "julia": "your.jl"}


def interpreter_of(first_line: bytes) -> str:
    """Return the name of the program that a `#!` line calls, directly or through env; empty for any other line."""
    words = first_line[2:].decode("utf-8", "replace").split() if first_line.startswith(b"#!") else []
    if words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    return os.path.basename(words[0]) if words else ""


def script_hints(head: bytes) -> list[str]:
    """Return one sentence for each mistake in the first bytes of a run.sh that would make bash fail."""
    hints = []
    first_line = head[:500].partition(b"\n")[0]
    name = interpreter_of(first_line)
    if name and not SHELLS.fullmatch(name):
        said, name = one_line(first_line.decode("utf-8", "replace"), 80), one_line(name, 40)
        other = SCRIPT_NAMES.get(re.sub(r"[0-9.]+$", "", name), "your-script")
        hints.append(f"run.sh begins with {said} but is run by bash: send it as {other}, and put `{name} {other}` into run.sh")
    if head.startswith(b"\x7fELF"):
        hints.append("run.sh is a program, not a script: send it as your-program, and put `./your-program` into run.sh")
    if head.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        hints.append("run.sh begins with a byte order mark, which bash does not understand: save it as UTF-8 without one")
    if b"\r\n" in head:
        hints.append("run.sh has Windows line endings (CRLF), which bash does not understand: convert it, for example with dos2unix")
    return hints


def hints_for(folder: Path, *inner: str) -> list[str]:
    """Return the hints for a run.sh on disk; the arguments are those of `open_regular`."""
    try:
        with open_regular(folder, *inner) as file:
            return script_hints(file.read(64 * KIB))
    except OSError:
        return []  # a missing run.sh is reported elsewhere


def no_script_text(paths: Sequence[str]) -> str:
    """Return what to do about an upload without run.sh, naming its files."""
    below = [path for path in paths if path.endswith("/run.sh")]
    top = paths[0].partition("/")[0]
    if len(below) == 1 and all(path.startswith(top + "/") for path in paths):
        inner, found = below[0].rpartition("/")[0], one_line(below[0], 80)
        return f"there is no run.sh, but {found}: leave the folder {one_line(inner, 80)} out of the file names{example_part(below[0])}"
    among = ", ".join(one_line(path, 80) for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    text = f"there is no run.sh among {among}"
    scripts = below or [path for path in paths if re.fullmatch(r"run\.sh\S*|.*\.(sh|bash)", path.lower())] or list(paths)
    if len(scripts) != 1:
        return f"{text}: send a bash script of that name, as in -F file=@run.sh"
    if re.search(r"\.(zip|tar|tgz|t?[gx]z|bz2|7z|rar)$", scripts[0].lower()):
        return f"{text}: send it as an archive, as in -F archive=@tree.tar.gz, and it is unpacked; zip, tar and tar.gz can be"
    which = "it" if len(paths) == 1 else one_line(scripts[0], 80)
    return f"{text}: rename {which}{example_part(scripts[0])}"


def example_part(path: str) -> str:
    """Return how curl sends `path` as run.sh, as the end of a sentence; empty for a name with special characters."""
    return f", as in -F 'file=@{path};filename=run.sh'" if re.fullmatch(r"[\w./ +-]{1,80}", path) else ""


# == 32. Trust ==  Folders, links and token files are not trusted if other users could replace them.


def owner_name(uid: int) -> str:
    """Return a user's name for a message."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def made_as(folder: Path) -> int | None:
    """Return the owner of a file that this process creates in `folder` (NFS may map root to nobody), or None if it cannot create one."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_uid
    except OSError:
        return None


def is_strangers(uid: int, folder: Path) -> bool:
    """Tell whether the owner of something in `folder` is neither root nor this user, as its file system maps them."""
    return uid not in (0, os.geteuid()) and uid != made_as(folder)


class UserNumbers(NamedTuple):
    """What the user ids that this process sees mean."""

    unmapped: int | None  # the id that stands for all users outside our user namespace; None if there is no namespace
    root: bool  # id 0 is the root of the machine


@functools.lru_cache(maxsize=1)
def user_numbers() -> UserNumbers:
    """Read the meaning of user ids (user_namespaces(7)): in a user namespace, all unknown users share the overflow id."""
    try:
        lines = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()]
    except OSError:
        return UserNumbers(None, True)  # a kernel without user namespaces
    if lines == [(0, 0, 2**32 - 1)]:
        return UserNumbers(None, True)
    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    return UserNumbers(overflow, any(inside == 0 and outside == 0 for inside, outside, _ in lines))


def is_unmapped(uid: int) -> bool:
    """Tell whether a user namespace shows all unknown users, including the machine's root, as this id."""
    return uid == user_numbers().unmapped


def is_private_group(gid: int) -> bool:
    """Tell whether a group has no other members than this user and root. With one group per user, folders may be group-writable."""
    if gid == 0 or gid != os.getegid():
        return gid == 0
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return gid == os.geteuid()
    return user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


def examine_place(path: str | Path, what: str, itself: bool = True) -> Iterator[Finding]:
    """Yield who else can replace the content of a folder or, if not `itself`, only replace the folder through one of its parents.

    A finding is False (refused) if it is about the folder. It is None (a warning) if it is about a group or a parent, as is
    usual on clusters.
    """
    real, given = Path(os.path.realpath(path)), Path(os.path.abspath(path))
    for folder in dict.fromkeys((*([real] if itself else []), *real.parents, *given.parents)):
        try:
            state = folder.stat()
        except OSError:
            continue
        place, mode = f"{what}: {str(folder)!r}", stat.S_IMODE(state.st_mode)
        if is_strangers(state.st_uid, folder) and not is_unmapped(state.st_uid):
            good = False if folder == real else None
            yield Finding(good, f"{place} belongs to {owner_name(state.st_uid)}, who can replace its content: use your own folder")
        elif mode & 0o002 and not mode & stat.S_ISVTX:
            good, who = False if folder == real else None, f"writable by every user (mode {mode:04o}), who can replace its content"
            yield Finding(good, f"{place} is {who}: chmod o-w, or chmod +t")
        elif mode & 0o020 and not mode & stat.S_ISVTX and not is_private_group(state.st_gid):
            who = f"writable by a group (mode {mode:04o}), which can replace its content"
            yield Finding(None, f"{place} is {who}: chmod g-w, or chmod +t")
    for link in (given, *given.parents):
        if link.is_symlink() and is_strangers(owner := link.lstat().st_uid, link.parent) and not is_unmapped(owner):
            text = f"{what}: the link {str(link)!r} belongs to {owner_name(owner)}, who can point it elsewhere"
            yield Finding(False, f"{text}: name the folder itself")


def examine_secret_file(path: str, what: str, remedy: str = "") -> Iterator[Finding]:
    """Yield who else can read or change a file with a token; nothing if the file does not exist."""
    real = os.path.realpath(os.path.expanduser(path))
    try:
        state = os.stat(real)
    except OSError:
        return
    if real.startswith(("/run/secrets/", "/var/run/secrets/")):
        return  # a container's secrets: only root can put a file there
    mode, name = stat.S_IMODE(state.st_mode), f"{what} {path}"
    if is_strangers(state.st_uid, Path(real).parent) and not is_unmapped(state.st_uid):
        yield Finding(False, f"{name} belongs to {owner_name(state.st_uid)}, who knows the token and can change it: use your own file")
    elif mode & 0o002:
        fix = f"chmod 600 {shlex.quote(path)}, and put a new token in it"
        yield Finding(False, f"{name} is writable by every user (mode {mode:04o}): {fix}")
    elif mode & 0o004 or (mode & (0o060 if state.st_uid == os.geteuid() else 0o020) and not is_private_group(state.st_gid)):
        fix = remedy or f"chmod 600 {shlex.quote(path)}, and put a new token in it if others use this machine"
        yield Finding(None, f"{name} is readable by others (mode {mode:04o}): {fix}")


# == 33. Data folder ==  Only one process uses it, and no transfer takes disk space that was promised to another.


class DiskFull(OSError):
    """`needed` more bytes do not fit, because of other promises and of what must stay free. errno is ENOSPC."""

    def __init__(self, needed: int) -> None:
        super().__init__(errno.ENOSPC, f"no space left on device for {needed} bytes more (some is kept free: JOBORCH_MIN_FREE)")
        self.needed = needed


class DiskAccount:
    """Reserves disk space for transfers: no transfer gets space that was promised to another.

    At least `keep_bytes` stay free. Each process has a separate account and sees what others write with statvfs(2).
    """

    LOOK_AGAIN_S, MARGIN_BYTES = 0.2, 64 * MIB  # an older statvfs is good enough if it leaves more than this margin

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock, self.keep_bytes = folder, threading.Lock(), 0
        self.promised = 0  # to all transfers together, not written yet
        self.free, self.looked_at = 0, float("-inf")  # the last statvfs less what was written since; its time (monotonic)

    def take(self, size: int, promise: bool, keep_bytes: int | None = None) -> None:
        """Promise `size` bytes or, if not `promise`, count them as written. Raises DiskFull if they do not fit."""
        with self.lock:
            needed = size + self.promised + (self.keep_bytes if keep_bytes is None else keep_bytes)
            now = time.monotonic()
            if now - self.looked_at > self.LOOK_AGAIN_S or self.free - needed < self.MARGIN_BYTES:
                self.free, self.looked_at = free_bytes(self.folder), now
            if self.free < needed:
                raise DiskFull(size)
            if promise:
                self.promised += size
            else:
                self.free -= size

    def check(self, size: int) -> None:
        if size:
            self.take(size, promise=True)
            self.give_back(size)

    def give_back(self, size: int, written: int = 0) -> None:
        """Cancel a promise of `size` bytes of which `written` are now on the disk."""
        with self.lock:
            self.promised -= size
            self.free -= written


class Promise:
    """Disk space promised to one transfer: writes use it up, and closing returns the rest."""

    def __init__(self, account: DiskAccount) -> None:
        self.account, self.left, self.lock = account, 0, threading.Lock()

    def more(self, size: int) -> None:
        """Get `size` more bytes promised. Raises DiskFull if they do not fit."""
        self.account.take(size, promise=True)
        with self.lock:
            self.left += size

    def more_for_file(self) -> None:
        """Count the blocks of one more file: thousands of one-byte files fill a disk, too."""
        self.more(4 * KIB)
        self.wrote(4 * KIB)

    def wrote(self, size: int) -> None:
        with self.lock:
            used = min(size, self.left)
            self.left -= used
            self.account.give_back(used, size)

    def close(self) -> None:
        """Return what was not written. The promise can be used again."""
        with self.lock:
            left, self.left = self.left, 0
            self.account.give_back(left)


class Spool:
    """A nameless temporary file that stays in memory while small, so that it works on a full disk.

    tempfile.SpooledTemporaryFile turns a full disk into an AttributeError before Python 3.12.
    """

    def __init__(self, folder: Path, claim: Callable[[int], None] = lambda _: None) -> None:
        """`claim` is called with the number of bytes before they are written to the disk, and may raise DiskFull."""
        self.folder, self.file, self.claim = folder, cast("IO[bytes]", io.BytesIO()), claim

    def write(self, data: bytes) -> int:
        if isinstance(self.file, io.BytesIO) and self.file.tell() + len(data) > MEMORY_SPOOL_BYTES:
            self.claim(self.file.tell())
            self.move_to_disk()
        if not isinstance(self.file, io.BytesIO):
            self.claim(len(data))
        return self.file.write(data)

    def move_to_disk(self) -> None:
        larger = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - closed with the spool
        try:
            larger.write(cast(io.BytesIO, self.file).getvalue())
        except BaseException:
            larger.close()
            raise
        self.file = cast("IO[bytes]", larger)

    def again(self) -> IO[bytes]:
        """Return a second reader of the same bytes, with a separate position."""
        if isinstance(self.file, io.BytesIO):
            return io.BytesIO(self.file.getvalue())
        return open(f"/proc/self/fd/{self.file.fileno()}", "rb")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


STOP_NOTE = "stopped"  # an empty file in a client's data folder; its time is that of the client's last stop


class DataFolder:
    """The folders of one process: `jobs/UUID` (inputs) or `jobs/UUID.ATTEMPT` (payloads), `results/UUID.ATTEMPT.zip`, `tmp`, the lock.

    A second process on the same folder is refused. Files that belong to no job are removed, so a folder is also refused if
    another program has created entries with these names.
    """

    LOCK = "joborch.lock"
    NAMES = frozenset(("jobs", "results", "tmp", "reserve", "wrapper.sh", "executor", STOP_NOTE, LOCK))
    NAMES |= {"joborch.db", "joborch.db-wal", "joborch.db-shm"}

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.jobs, self.results, self.tmp = self.path / "jobs", self.path / "results", self.path / "tmp"
        self.receiving: set[str] = set()  # uuids of uploads in progress, which have no row yet
        self.account, self.packs_below_minimum = DiskAccount(self.path), False

    def open(self) -> None:
        """Create the folders, take the lock, empty tmp. Raises ConfigError if the folder cannot be used or is not safe."""
        self.umask = os.umask(0o077)  # uploads are private; scripts get the original umask back
        try:
            self.close_to_others()
            self.refuse_foreign()
            for folder in (self.jobs, self.results, self.tmp):
                folder.mkdir(parents=True, exist_ok=True)
            self.close_to_others()  # again: another user may have created it first
            self.lock = open(self.path / self.LOCK, "a+")  # noqa: SIM115 - held as long as the process lives
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConfigError(f"DATA_PATH is {str(self.path)!r}: {reason}; give a folder that joborch may write to") from error
        take_lock(self.lock, f"DATA_PATH {str(self.path)!r}", "folder")
        for leftover in self.tmp.iterdir():
            discard(leftover)
        # waitress spools bodies here: on the same file system, and emptied at each start.
        tempfile.tempdir = str(self.tmp)

    def weak_spots(self) -> Iterator[Finding]:
        """Yield who else can replace the folder's content. A start refuses False findings and fixes the modes of our own folders."""
        real, name, remedy = os.path.realpath(self.path), f"DATA_PATH is {str(self.path)!r}, which", "give your own folder"
        yield from examine_place(self.path, "DATA_PATH", itself=False)
        if not os.path.isdir(real):
            return
        state = os.stat(real)
        mode, sticky = stat.S_IMODE(state.st_mode), state.st_mode & stat.S_ISVTX
        if is_strangers(state.st_uid, Path(real)):
            yield Finding(False, f"{name} belongs to {owner_name(state.st_uid)}, who can replace its content: {remedy}")
            return
        foreign = self.foreign_entry(Path(real), everything=bool(mode & 0o022 and not sticky))
        who = f"writable by {'every user' if mode & 0o002 else 'a group'} (mode {mode:04o})"
        if foreign:
            yield Finding(False, f"{name} contains {foreign}, who can replace its content: {remedy}")
        elif mode & 0o022 and not sticky and state.st_uid == 0 != os.geteuid():
            in_pod = "KUBERNETES_SERVICE_HOST" in os.environ and os.path.ismount(real)  # an emptyDir is private to its pod
            yield Finding(False if mode & 0o002 and not in_pod else None, f"{name} belongs to root and is {who}: {remedy}")
        elif mode & 0o022 and not sticky and (mode & 0o002 or not is_private_group(state.st_gid)):
            yield Finding(None, f"{name} belongs to you and is {who}: joborch removes that permission when it starts")

    def foreign_entry(self, real: Path, everything: bool) -> str:
        """Return an entry of another user and its owner: only entries with our names count, or all if `everything` (as in /tmp)."""
        for entry in real.iterdir() if os.access(real, os.R_OK | os.X_OK) else ():
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                if (everything or entry.name in self.NAMES) and is_strangers(owner := entry.lstat().st_uid, real):
                    return f"{entry.name!r} of {owner_name(owner)}"
        return ""

    def close_to_others(self) -> None:
        """Remove others' write permission from our own folders. Raises ConfigError if others can replace their content."""
        for finding in self.weak_spots():
            if finding.good is False:
                raise ConfigError(finding.text)
        for folder in (self.path, self.jobs, self.results, self.tmp):
            with contextlib.suppress(FileNotFoundError):
                mode = stat.S_IMODE(folder.stat().st_mode)
                if mode & 0o022 and not mode & stat.S_ISVTX and folder.stat().st_uid == os.geteuid():
                    folder.chmod(mode & ~0o022)

    def refuse_foreign(self) -> None:
        """Raise ConfigError if joborch did not create `tmp`, `jobs` or `results` there: DATA_PATH=/var would empty /var/tmp."""
        for folder in (self.jobs, self.results, self.tmp):
            if folder.exists() and not (self.path / self.LOCK).exists():
                raise ConfigError(f"DATA_PATH is {str(self.path)!r}, which has a {folder.name!r} not made by joborch: give an empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / self.LOCK).touch()

    def keep_reserve(self) -> None:
        """Reserve some disk space, if there is plenty, for the database to use once scripts have filled the disk."""
        path = self.path / "reserve"
        if not path.exists() and free_bytes(self.path) > 4 * RESERVE_BYTES:
            with contextlib.suppress(OSError), open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)

    def drop_reserve(self) -> bool:
        """Free the reserve. Return False if there is none."""
        try:
            os.unlink(self.path / "reserve")
        except OSError:
            return False
        log.warning("the disk is full: the database now uses its reserve of %d MiB", RESERVE_BYTES // MIB)
        return True

    def lock_database(self, path: str) -> None:
        """Lock a database outside this folder. Raises ConfigError if another process uses it."""
        if path != ":memory:" and os.path.dirname(os.path.realpath(path)) != os.path.realpath(self.path):
            self.database_lock = open(f"{path}.lock", "a+")  # noqa: SIM115 - held as long as the process lives
            take_lock(self.database_lock, f"DB_PATH {path!r}", "file")

    def set_aside(self, known: Callable[[str], bool]) -> Path | None:
        """Move the entries of `jobs` and `results` that are not `known` by name to a new folder; return it, or None."""
        aside, moved = self.path / f"unclaimed-{time_stamp()}", False
        for folder in (self.jobs, self.results):
            for path in [path for path in folder.iterdir() if not known(path.name)]:
                (aside / folder.name).mkdir(parents=True, exist_ok=True)
                os.rename(path, aside / folder.name / path.name)
                moved = True
        return aside if moved else None

    def job(self, name: str) -> Path:
        return self.jobs / name

    def result(self, mark: str) -> Path:
        """Return the path of one attempt's result. A late result cannot overwrite that of another attempt."""
        return self.results / f"{mark}.zip"

    def keep_free(self, keep_bytes: int, packs_below_minimum: bool) -> None:
        """Set how many bytes of the disk stay free; with `packs_below_minimum`, archives may still use them."""
        self.account.keep_bytes, self.packs_below_minimum = keep_bytes, packs_below_minimum

    def spool(self) -> IO[bytes]:
        """Return a nameless temporary file (see Spool) that disappears when closed."""
        keep_bytes = 0 if self.packs_below_minimum else None
        return cast("IO[bytes]", Spool(self.tmp, lambda size: self.account.take(size, promise=False, keep_bytes=keep_bytes)))


# == 34. Archives ==  Packs a folder as a ZIP. No link is followed out of it, and whatever is omitted is listed.


STREAM_COMMENT = "joborch stream {} {}"  # ZIP comment of a stream's member: its size before its middle was cut, and the limit
# The headers of APPNOTE 6.3.10: 4.3.7, 4.3.12, 4.3.14, 4.3.15 and 4.3.16.
ZIP_LOCAL, ZIP_CENTRAL, ZIP_END = struct.Struct("<4s5H3L2H"), struct.Struct("<4s4B4H3L5H2L"), struct.Struct("<4s4H2LH")
ZIP64_END, ZIP64_LOCATOR = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
ZIP_STREAMED, ZIP_UTF8 = 0x08, 0x800  # flags: sizes follow the content; the name is UTF-8
ZEROS = bytes(MIB)


class DigestWriter:
    """Writes to another file and keeps size and SHA-256. Raises BrokenArchive if writing fails."""

    def __init__(self, target: IO[bytes]) -> None:
        self.target, self.digest, self.size = target, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        try:
            self.target.write(data)
        except OSError as error:
            raise BrokenArchive(error.errno or 0) from error
        self.digest.update(data)
        self.size += len(data)


@dataclass
class Archive:
    """A finished ZIP: an open file at its start, its size in bytes and SHA-256 (hex). Not `whole` if a file could not be read."""

    file: IO[bytes]
    size: int
    sha256: str
    whole: bool = True
    cut: bool = False  # something was left out because of a limit


class Unreadable(JoborchError):
    """A file could not be read to its end, so an archive with its first part is useless."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{shown(name)} cannot be read: {why}")
        self.name, self.why = name, why


class BrokenArchive(JoborchError):
    """An archive could not be written completely."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Losses:
    """Counts the entries of an ended payload's work folder that cannot be packed; `places` are the paths of that folder."""

    def __init__(self, places: Sequence[bytes] = ()) -> None:
        self.places, self.count = places, 0

    def note(self, path: bytes, why: str) -> None:
        self.count += 1

    def look(self, root: int, folder: int, path: bytes, name: bytes, state: os.stat_result) -> None:
        """Count an entry if it cannot be packed. Raises OSError if it cannot be read."""
        if stat.S_ISLNK(state.st_mode):
            self.count += packed_target(root, path, os.readlink(name, dir_fd=folder), self.places) is None
        elif not stat.S_ISREG(state.st_mode):
            self.count += 1
        elif state.st_uid != os.geteuid():
            self.count += not os.access(name, os.R_OK, dir_fd=folder)


def measure(root: int, limits: ResultLimits, skipped: Mapping[str, Sequence[int]], losses: Losses | None = None) -> tuple[int, int]:
    """Return the bytes and the number of files and links below an open folder, not counting the unchanged inputs (`skipped`).

    It stops as soon as a limit is exceeded; too many folders count as one file too many. `losses`, for a payload that has
    ended, counts entries that cannot be packed.
    """
    size = count = folders = 0
    for folder, path, names, entries in walk_open(root, limits.entries, losses.note if losses else lambda _, why: None, bool(losses)):
        folders += entries - len(names)
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                state = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if skipped and is_unchanged(state, os.fsdecode(path + b"/" + name if path else name), skipped):
                    continue
                size += state.st_size * stat.S_ISREG(state.st_mode)
                count += bool(path) or name != b"run.sh"
                if losses:
                    losses.look(root, folder, path, name, state)
            if size > limits.size_bytes or count > limits.files:
                return size, count
        if folders > limits.folders:
            return size, limits.files + 1
    return size, count


def unchanged_inputs(folder: Path | int) -> dict[str, Sequence[int]]:
    """Return the size and mtime (ns) of each input as it arrived; empty if the script damaged the list."""
    noted: dict[str, Sequence[int]] = {}
    try:
        with open_regular(folder, "inputs.json") as file:
            for line in itertools.islice(iter(lambda: file.readline(PART_HEADER_LIMIT_BYTES), b""), PARTS_LIMIT):
                path, size, mtime_ns = parse_json(line)  # one list per line: a single forged document could fill the memory
                noted[path] = (int(size), int(mtime_ns))
    except (OSError, ValueError, TypeError):
        return {}
    return noted


def is_unchanged(state: os.stat_result, name: str, inputs: Mapping[str, Sequence[int]]) -> bool:
    """Tell whether a file is an input with its original size and time."""
    return list(inputs.get(name, ())) == [state.st_size, state.st_mtime_ns]


def readable(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yield the chunks of a file that is being packed. Raises Unreadable if its disk fails."""
    try:
        yield from chunks
    except OSError as error:
        raise Unreadable(name, os.strerror(error.errno or 0)) from error


def content_of(source: IO[bytes], state: os.stat_result, name: str) -> Iterator[bytes | int]:
    """Yield an open file's content: bytes, and each hole as its length. Data appended meanwhile is omitted."""
    begin, size, descriptor = 0, state.st_size, source.fileno()
    while state.st_blocks * 512 < size and begin < size:
        try:
            data = os.lseek(descriptor, begin, os.SEEK_DATA)
            end = min(size, os.lseek(descriptor, data, os.SEEK_HOLE))
        except OSError as error:
            if error.errno != errno.ENXIO:
                break  # this file system does not report holes
            data = end = max(begin, min(size, os.fstat(descriptor).st_size))  # no more data; the file may have been truncated
            size = end
        if data > begin:
            yield min(data, size) - begin
        if end > data:
            os.lseek(descriptor, data, os.SEEK_SET)
            yield from readable(file_chunks(source, end - data), name)
        begin = end
    if begin < size:
        os.lseek(descriptor, begin, os.SEEK_SET)
        yield from readable(file_chunks(source, size - begin), name)


@functools.lru_cache(maxsize=1)
def deflated_mebibyte() -> tuple[bytes, int, tuple[int, ...]]:
    """Return 1 MiB of zeros as a piece of a deflate stream, its CRC-32, and how each bit of a preceding CRC-32 changes that.

    The piece is byte-aligned and self-contained (Z_FULL_FLUSH), so a stream may contain it any number of times.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece, nothing = packer.compress(ZEROS) + packer.flush(zlib.Z_FULL_FLUSH), zlib.crc32(ZEROS, 0)
    return piece, nothing, tuple(zlib.crc32(ZEROS, 1 << bit) ^ nothing for bit in range(32))


class Deflater:
    """Compresses (or copies) what is written and keeps its size and CRC-32. Long runs of zeros cost almost nothing."""

    def __init__(self, target: DigestWriter, method: int) -> None:
        self.target, self.size, self.crc = target, 0, 0
        self.packer = zlib.compressobj(1, zlib.DEFLATED, -15) if method == zipfile.ZIP_DEFLATED else None

    def write(self, data: bytes) -> None:
        self.size, self.crc = self.size + len(data), zlib.crc32(data, self.crc)
        self.target.write(self.packer.compress(data) if self.packer else data)

    def zeros(self, count: int) -> None:
        if self.packer and count >= 2 * MIB:
            piece, nothing, changes = deflated_mebibyte()
            self.target.write(self.packer.flush(zlib.Z_FULL_FLUSH))
            for _ in range(count // MIB):
                self.target.write(piece)
                self.crc = functools.reduce(lambda crc, bit: crc ^ changes[bit] * (self.crc >> bit & 1), range(32), nothing)
            self.size, count = self.size + count // MIB * MIB, count % MIB
        while count:
            self.write(ZEROS[:count])
            count -= min(count, MIB)

    def finish(self) -> None:
        if self.packer:
            self.target.write(self.packer.flush())


class ZipWriter:
    """Writes a ZIP (APPNOTE 6.3.10) sequentially. The directory is collected in a second file, so memory use stays constant."""

    def __init__(self, target: IO[bytes], directory: IO[bytes]) -> None:
        self.target, self.directory, self.members = DigestWriter(target), DigestWriter(directory), 0

    def add(self, name: str, mtime: float, mode: int, data: bytes, method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> None:
        """Add a member from memory. It is stored if deflating does not make it smaller by a tenth."""
        packed = zlib.compress(data, 1)[2:-4] if data and method == zipfile.ZIP_DEFLATED else data
        if len(packed) >= 0.9 * len(data):  # also for an empty file, as empty data is not a valid deflate stream
            packed, method = data, zipfile.ZIP_STORED
        raw, begin, crc = name.encode(), self.target.size, zlib.crc32(data)
        head = (20, 0 if raw.isascii() else ZIP_UTF8, method, *zip_moment(mtime), crc, len(packed), len(data), len(raw))
        self.target.write(ZIP_LOCAL.pack(b"PK\3\4", *head, 0) + raw + packed)
        self.note(raw, head, mode, begin, comment)

    def stream(self, name: str, mtime: float, mode: int, chunks: Iterable[bytes | int], method: int, comment: bytes = b"") -> None:
        """Add a member from a stream of bytes and of numbers of zeros."""
        raw, begin = name.encode(), self.target.size
        head = (45, ZIP_STREAMED | (0 if raw.isascii() else ZIP_UTF8), method, *zip_moment(mtime))
        self.target.write(ZIP_LOCAL.pack(b"PK\3\4", *head, 0, 2**32 - 1, 2**32 - 1, len(raw), 20) + raw + struct.pack("<2H2Q", 1, 16, 0, 0))
        body, before = Deflater(self.target, method), self.target.size
        for chunk in chunks:
            body.zeros(chunk) if isinstance(chunk, int) else body.write(chunk)
        body.finish()
        packed = self.target.size - before
        self.target.write(struct.pack("<4sL2Q", b"PK\7\10", body.crc, packed, body.size))
        self.note(raw, (*head, body.crc, packed, body.size, len(raw)), mode, begin, comment)

    def note(self, raw: bytes, head: tuple[int, ...], mode: int, begin: int, comment: bytes) -> None:
        """Write a member's directory record; `head` has the fields that it shares with the local header."""
        version, flags, method, moment, day, crc, *sizes, length = head
        wide = [value for value in (sizes[1], sizes[0], begin) if value >= 2**32 - 1]  # those that do not fit, in this order (4.5.3)
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        version = 45 if wide else version
        values = (version, 3, version, 0, flags, method, moment, day, crc, *[min(size, 2**32 - 1) for size in sizes])
        rest = (length, len(extra), len(comment), 0, 0, mode << 16, min(begin, 2**32 - 1))
        self.directory.write(ZIP_CENTRAL.pack(b"PK\1\2", *values, *rest) + raw + extra + comment)
        self.members += 1

    def finish(self) -> None:
        begin, size, count = self.target.size, self.directory.size, self.members
        self.directory.target.seek(0)
        for chunk in file_chunks(self.directory.target, size):
            self.target.write(chunk)
        if count >= 2**16 - 1 or begin >= 2**32 - 1 or size >= 2**32 - 1:
            end = ZIP64_END.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, begin)
            self.target.write(end + ZIP64_LOCATOR.pack(b"PK\6\7", 0, begin + size, 1))
        counts = [min(count, 2**16 - 1)] * 2
        self.target.write(ZIP_END.pack(b"PK\5\6", 0, 0, *counts, min(size, 2**32 - 1), min(begin, 2**32 - 1), 0))


class ZipPacker:
    """Packs the current content of a folder as a ZIP in constant memory, and follows no link out of it.

    Symbolic links that stay inside are stored as links, absolute ones as relative ones. Devices, FIFOs, sockets, unreadable
    files, links that lead out, and whatever exceeds the limits are listed in `.joborch/left-out.txt`. A file that changes
    meanwhile is packed as it was read.
    """

    def __init__(self, spool: IO[bytes], at: float | None = None, directory: IO[bytes] | None = None) -> None:
        """`at` is the time of members that have none; if it is fixed, equal files give equal bytes. `directory` is a second spool."""
        self.spool, self.at = spool, time.time() if at is None else at
        self.directory = cast("IO[bytes]", io.BytesIO()) if directory is None else directory
        self.zip = ZipWriter(spool, self.directory)
        self.names: set[bytes] = set()
        self.left_out: list[str] = []
        self.unreadable: Mapping[str, str] = {}  # paths that could not be read before, and why
        self.limits, self.size, self.count, self.further = ResultLimits(), 0, 0, 0
        self.wanted: Callable[[], bool] = lambda: True
        self.own, self.cut = ".joborch", False
        self.places: Sequence[bytes] = ()  # other paths of the folder, which absolute links may use
        self.mends = False  # the script has ended: read this user's files even if their mode forbids it

    def add_folder(self, folder: Path, unchanged: Mapping[str, Sequence[int]] | None = None) -> None:
        """Pack everything below `folder` except the inputs that still have the size and mtime in `unchanged`."""
        with opened_folder(folder, flags=os.O_RDONLY) as root:
            self.choose_own(root)
            self.add_open_folder(root, unchanged or {})

    def choose_own(self, root: int) -> None:
        """Choose a free name for the folder of our own files: a script may have a .joborch, too."""
        with contextlib.suppress(FileNotFoundError):
            while os.stat(self.own, dir_fd=root, follow_symlinks=False):
                self.own = f".joborch-{int(self.own[9:] or 0) + 1}"

    def add_open_folder(self, root: int, unchanged: Mapping[str, Sequence[int]]) -> None:
        room, self.places = self.limits.entries, (*self.places, path_of(root))
        for folder, path, names, entries in walk_open(root, room, self.note, self.mends):
            room -= entries
            self.cut = self.cut or room < 0
            inside = os.fsdecode(path) + "/" if path else ""
            for name in names:
                self.check_wanted()
                self.add_path(root, folder, name, inside + os.fsdecode(name), unchanged)
            if path and not entries:
                self.zip.add(self.member_name(inside), self.at, 0o040755, b"")

    def check_wanted(self) -> None:
        if not self.wanted():
            raise GivenUp("no caller waits for the archive any more")

    def note(self, path: bytes, why: str) -> None:
        self.leave_out(f"{os.fsdecode(path) or '.'}: {why}")

    def leave_out(self, line: str) -> None:
        """List something that is not packed, and why."""
        if len(self.left_out) < LEFT_OUT_LINES:
            self.left_out.append(line)
        else:
            self.further += 1

    def add_path(self, root: int, folder: int, name: bytes, path: str, unchanged: Mapping[str, Sequence[int]]) -> None:
        try:
            state = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISLNK(state.st_mode):
                self.add_link(root, os.readlink(name, dir_fd=folder), path, state)
            elif not stat.S_ISREG(state.st_mode):
                self.leave_out(f"{path}: not a file, folder or link")
            elif not unchanged or not is_unchanged(state, path, unchanged):
                self.add_file(name, path, folder)
        except FileNotFoundError:
            return  # removed meanwhile
        except OSError as error:
            self.leave_out(f"{path}: {os.strerror(error.errno or 0)}")

    def add_file(self, name: bytes, path: str, folder: int | None = None) -> None:
        # O_NONBLOCK: a FIFO that replaced the file since the stat must not block us.
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except PermissionError:
            if not self.mends:
                raise
            descriptor = open_unreadable(name, folder)
        with open(descriptor, "rb", buffering=0) as source:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise OSError(errno.EINVAL, "not a file")
            too_much = self.limits.broken_by(self.size + state.st_size, self.count + (path != "run.sh"))
            if too_much:
                self.cut = True
                self.leave_out(f"{path}: with it ({size_text(state.st_size)}) the result would have {too_much}")
            elif path in self.unreadable:
                self.leave_out(f"{path}: {self.unreadable[path]}")
            else:
                self.add_open_file(source, state, path)

    def add_open_file(self, source: IO[bytes], state: os.stat_result, path: str) -> None:
        """Pack an open file. Raises Unreadable or BrokenArchive if that fails half-way; then the archive is useless."""
        mode, name = 0o100000 | stat.S_IMODE(state.st_mode), self.member_name(path)
        self.count += path != "run.sh"
        sparse = state.st_blocks * 512 < state.st_size > MIB
        probe = b"" if sparse else b"".join(readable(file_chunks(source, min(256 * KIB, state.st_size)), path))
        if len(probe) < 256 * KIB and not sparse:
            self.zip.add(name, state.st_mtime, mode, probe, zipfile.ZIP_DEFLATED)
            self.size += len(probe)
            return
        method = zipfile.ZIP_DEFLATED if sparse else worthwhile_compression(probe)
        further = content_of(source, state, path) if sparse else readable(file_chunks(source, state.st_size - len(probe)), path)
        self.zip.stream(name, state.st_mtime, mode, self.while_wanted(itertools.chain([probe], further)), method)
        self.size += state.st_size

    def while_wanted(self, chunks: Iterable[bytes | int]) -> Iterator[bytes | int]:
        """Yield the chunks. Raises GivenUp as soon as no caller waits for them."""
        for chunk in chunks:
            self.check_wanted()
            yield chunk

    def add_link(self, root: int, target: bytes, name: str, state: os.stat_result) -> None:
        too_much = self.limits.broken_by(0, self.count + 1)
        stored = packed_target(root, os.path.dirname(os.fsencode(name)), target, self.places)
        if too_much or stored is None:
            self.cut = self.cut or bool(too_much)
            why = f"with it the result would have {too_much}" if too_much else "a link that leads out of the folder, to "
            self.leave_out(f"{name}: {why}{'' if too_much else os.fsdecode(target)}")
            return
        self.count += 1
        self.zip.add(self.member_name(name), state.st_mtime, 0o120777, stored)

    def add_chunks(self, name: str, chunks: Iterable[bytes], comment: str = "", size: int | None = None) -> None:
        """Pack one of our own files, below `.joborch/`; `size` is its size, if known."""
        method, path = zipfile.ZIP_DEFLATED, self.member_name(f"{self.own}/{name}")
        if size is not None and size < 256 * KIB:
            self.zip.add(path, self.at, 0o100644, b"".join(chunks), method, comment.encode())
        else:
            self.zip.stream(path, self.at, 0o100644, self.while_wanted(chunks), method, comment.encode())

    def member_name(self, name: str) -> str:
        """Return a file's name in the archive: unique, and percent-encoded if it is not UTF-8."""
        safe = name
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            safe = quote(os.fsencode(name), safe="/ ()[]{}+,;=@!$&'~")
        if "%" in safe or safe.startswith(self.own):  # all other names are unique already
            while (known := hashlib.blake2b(safe.encode(), digest_size=16).digest()) in self.names:
                safe += "~"
            self.names.add(known)
        return safe

    def abandon(self) -> None:
        self.directory.close()
        self.spool.close()

    def finish(self) -> Archive:
        """Write the list of what was omitted, and the directory; return the archive, ready to be read."""
        if self.left_out:
            lines = [one_line(line, 5000) + "\n" for line in self.left_out]
            lines += [f"... and {self.further:,} more\n"] if self.further else []
            self.add_chunks("left-out.txt", (line.encode("utf-8", "replace") for line in lines))
        self.zip.finish()
        self.directory.close()
        self.spool.flush()
        self.spool.seek(0)
        return Archive(self.spool, self.zip.target.size, self.zip.target.digest.hexdigest(), not self.unreadable, self.cut)


def path_of(folder: int) -> bytes:
    """Return the real path of an open folder."""
    return os.readlink(f"/proc/self/fd/{folder}".encode())


def below(places: Sequence[bytes], path: bytes) -> bytes | None:
    """Return an absolute path relative to the first of `places` that contains it, or None."""
    plain = re.sub(rb"/+", b"/", path)
    for place in places:
        if (plain + b"/").startswith(place + b"/"):
            return plain[len(place) + 1 :] or b"."
    return None


def packed_target(root: int, folder: bytes, target: bytes, places: Sequence[bytes]) -> bytes | None:
    """Return the target to store for a link in `folder` (relative to the open folder `root`), or None if it leads out of `root`.

    An absolute target below one of `places`, the paths of `root`, is made relative, so that it works on another machine.
    """
    if not target.startswith(b"/"):
        return None if leads_out(root, folder, target, places) else target
    inner = below(places, target)
    if inner is None or leads_out(root, b"", inner, places):
        return None
    return b"../" * len([part for part in folder.split(b"/") if part]) + inner


def leads_out(root: int, folder: bytes, target: bytes, places: Sequence[bytes]) -> bool:
    """Tell whether a relative link in `folder` (relative to the open folder `root`) leads out of `root`, perhaps through other links.

    Other links may be absolute if they lead below one of `places`.
    """
    lexical = os.path.normpath(os.path.join(folder, target))
    if lexical == b".." or lexical.startswith(b"../"):
        return True
    here, ahead, links = [part for part in folder.split(b"/") if part], target.split(b"/")[::-1], 0
    while ahead and links < 40:  # as in the kernel; with more, a link leads nowhere
        part = ahead.pop()
        if part == b"..":
            if not here:
                return True
            here.pop()
        elif part not in (b"", b"."):
            try:
                further = os.readlink(b"/".join([*here, part]), dir_fd=root)
            except OSError:  # not a link, or missing
                here.append(part)
                continue
            if further.startswith(b"/"):
                inner = below(places, further)
                if inner is None:
                    return True
                here, further = [], inner
            links, ahead = links + 1, ahead + further.split(b"/")[::-1]
    return False


def packed(spool: Callable[[], IO[bytes]], at: float | None, fill: Callable[[ZipPacker], None]) -> Archive:
    """Pack what `fill` adds. Raises OSError if the archive cannot be written, GivenUp if no caller waits for it.

    A file that cannot be read at the third attempt is omitted and listed.
    """
    unreadable, tries = cast("dict[str, str]", {}), cast("Counter[str]", Counter())
    while True:
        packer = ZipPacker(spool(), at, spool())
        packer.unreadable = unreadable
        try:
            fill(packer)
            return packer.finish()
        except Unreadable as error:
            packer.abandon()
            if len(unreadable) >= UNREADABLE_LIMIT:
                raise OSError(errno.EIO, str(error)) from error
            tries[error.name] += 1
            if tries[error.name] == 3:
                unreadable[error.name] = error.why
        except BrokenArchive as error:
            packer.abandon()
            raise OSError(error.number, "the archive cannot be written") from error
        except BaseException:
            packer.abandon()
            raise


def zip_time(mtime: float) -> tuple[int, int, int, int, int, int]:
    """Return a file's time as a ZIP can express it: local time, 1980 to 2107."""
    try:
        year, month, day, hour, minute, second = time.localtime(mtime)[:6]
    except (OverflowError, OSError, ValueError):
        return EPOCH_ZIP
    return (year, month, day, hour, minute, second) if 1980 <= year <= 2107 else EPOCH_ZIP


def zip_moment(mtime: float) -> tuple[int, int]:
    """Return a file's time as the two MS-DOS numbers of a ZIP header: time and date."""
    year, month, day, hour, minute, second = zip_time(mtime)
    return hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day


def worthwhile_compression(probe: bytes) -> int:
    """Return STORED if the start of a file shrinks by less than a tenth, else DEFLATED."""
    return zipfile.ZIP_STORED if len(zlib.compress(probe, 1)) > 0.9 * len(probe) else zipfile.ZIP_DEFLATED


def file_chunks(source: IO[bytes], count: int) -> Iterator[bytes]:
    """Yield the next `count` bytes of a file, or fewer if it ends before."""
    while count > 0:
        chunk = source.read(min(count, CHUNK_BYTES))
        if not chunk:
            return
        count -= len(chunk)
        yield chunk


# == 35. Access ==  A caller needs a token, or must be the same user on this machine. A refusal names the remedy.

PROXY_HEADERS = ("FORWARDED", "X_FORWARDED_FOR", "VIA", "X_REAL_IP")  # added when a request is passed on


class Caller(NamedTuple):
    """Who calls, and how that was proven: token, session, unix socket, same user, anonymous or link."""

    name: str
    proof: str


class Peer(Protocol):
    """The other end of a connection."""

    @property
    def address(self) -> str:
        """Return its IP address; empty on a Unix socket."""

    def uid(self) -> int | None:
        """Return its user on this machine, or None if that cannot be proven."""


def check_caller(node: Node, headers: Mapping[str, str], peer: Peer) -> Caller:
    """Return who calls. Raises HttpError 401 or 403 with what the caller needs.

    `headers` are those of the request, in CGI spelling (AUTHORIZATION). A token is sufficient proof. A caller without one may be
    a web page in the user's browser, so requests from other sites, or for another host name, are refused.
    """
    shown = headers.get("AUTHORIZATION", "")
    if node.tokens and (shown or peer.address):
        if not shown and csrf_token_of(node, headers.get("COOKIE", "")):
            check_site(headers)
            return Caller("default", "session")
        return check_token(node, shown, peer)
    check_site(headers)
    if peer.address:
        check_host(node, headers)
    uid, proxied = None, next((name for name in PROXY_HEADERS if name in headers), "")
    if not proxied and (not peer.address or is_here(peer.address)):
        uid = peer.uid()
    if not peer.address and uid is not None:  # the mode of the socket decides who may open it
        return Caller(f"uid {uid}", "unix socket")
    if is_own_user(uid):
        return Caller(f"uid {uid}", "same user")
    if node.config.allow_anonymous and is_allowed(node.config.allow_from, peer.address):
        return Caller(peer.address, "anonymous")
    raise HttpError(403, why_refused(node, peer, proxied, uid))


def check_token(node: Node, shown: str, peer: Peer) -> Caller:
    """Return the caller if it has one of our tokens, else raise HttpError 401, in a time that does not depend on the token."""
    kind, _, token = shown.partition(" ")
    fits = [hmac.compare_digest(token.strip().encode("latin-1", "replace"), known.encode()) for known in node.tokens]
    if kind.lower() == "bearer" and any(fits):
        return Caller("default", "token")
    if shown:
        node.refused.note(peer.address)
    what = "the token is wrong" if token else "a token is needed"
    raise HttpError(401, f"{what}: send the header Authorization: Bearer TOKEN", WWW_Authenticate='Bearer realm="joborch"')


# -- sessions: a browser keeps a cookie in place of the token, for the web page --

SESSION_S = 12 * 3600.0
CSRF_HEADER = "X-CSRF-Token"


def session_cookie(node: Node) -> str:
    """Return the name of the cookie. Cookies are the same for all ports of a host, so that servers need different names."""
    return f"joborch-session-{node.config.port}"


def session_mac(token: str, text: str) -> str:
    """Return the MAC of a text about sessions, by a key that comes from `token`."""
    return hmac.new(link_key(token, b"joborch session 1"), text.encode(), "sha256").hexdigest()


def new_session(node: Node, token: str) -> str | None:
    """Return the value of a cookie that stands for `token` for SESSION_S, or None if the token is wrong.

    Nothing is stored: the value is its own end and a MAC. It is valid as long as the token is.
    """
    fits = [known for known in node.tokens if hmac.compare_digest(token.strip().encode("utf-8", "replace"), known.encode())]
    if not fits:
        return None
    text = f"{node.clock.wall() + SESSION_S:.0f}.{secrets.token_hex(8)}"
    return f"{text}.{session_mac(fits[0], 'cookie ' + text)}"


def csrf_token_of(node: Node, cookies: str) -> str | None:
    """Return the CSRF token of the session in a Cookie header, or None if it has no valid session. A client has no sessions."""
    shape = rf"(?:^|; *){session_cookie(node)}=(([0-9]{{1,15}})\.[0-9a-f]{{16}})\.([0-9a-f]{{64}}) *(?:;|$)"
    found = re.search(shape, cookies) if node.config.mode == "server" else None
    if found is None or int(found[2]) <= node.clock.wall():
        return None
    fits = [token for token in node.tokens if hmac.compare_digest(session_mac(token, "cookie " + found[1]), found[3])]
    return session_mac(fits[0], "csrf " + found[1]) if fits else None


def check_csrf(node: Node, declared: Route, caller: Caller | None, headers: Mapping[str, str]) -> None:
    """Raise HttpError 403 for a change in a session without its CSRF token, which only our own pages know."""
    if caller is None or caller.proof != "session" or declared.method == "GET" or declared.who == "anyone":
        return
    shown = headers.get(CSRF_HEADER.upper().replace("-", "_"), "").encode("latin-1", "replace")
    if not hmac.compare_digest(shown, (csrf_token_of(node, headers.get("COOKIE", "")) or "").encode()):
        raise HttpError(403, f"the header {CSRF_HEADER} is missing or out of date: load the page again", CSRF_HEADER)


def check_site(headers: Mapping[str, str]) -> None:
    """Raise HttpError 403 for a request that a browser sends for a page of another site."""
    origin = headers.get("ORIGIN")
    foreign = origin is not None and host_of(origin)[0] != headers.get("HOST", "")
    if foreign or headers.get("SEC_FETCH_SITE", "").lower() == "cross-site":
        raise HttpError(403, "a page of another site may not call this server: send a token")


def check_host(node: Node, headers: Mapping[str, str]) -> None:
    """Raise HttpError 403 for a host name that is not this server's: a web page could use one (DNS rebinding).

    IP addresses are safe, and so are requests without Host, because browsers always send it.
    """
    if "HOST" not in headers:
        return
    name = host_of(f"//{headers['HOST']}")[1]
    address = plain_address(name)
    known = [each.strip().lower() for each in node.config.hosts.split(",") if each.strip()]
    by_address = address is not None and not address.is_unspecified  # browsers accept 0.0.0.0 as this machine, too
    if not by_address and name not in {*known, "localhost", *machine_names()}:
        remedy = "use 127.0.0.1, list the name in JOBORCH_HOSTS, or send a token"
        raise HttpError(403, f"this server is not called {one_line(name, 80)!r}: {remedy}")


def is_allowed(networks: Sequence[Network], text: str) -> bool:
    """Tell whether a caller at this address needs no token. This machine counts only if loopback is among the networks."""
    address = plain_address(text)
    if address is None:
        return False
    if not address.is_loopback and is_here(text):
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return any(address in network for network in networks)


def why_refused(node: Node, peer: Peer, proxied: str, uid: int | None) -> str:
    """Return why a caller without a token is refused, and the remedy."""
    remedy = f"set JOBORCH_TOKEN for the {node.config.mode} and send it"
    if proxied:
        header = proxied.replace("_", "-").title()
        return f"the request has the header {header}, so it came through a proxy and its user is unknown: {remedy}"
    if peer.address and not is_here(peer.address):
        return f"callers at {peer.address} need a token: {remedy}, or list the address in JOBORCH_ALLOW_FROM"
    if uid is None or uid == user_numbers().unmapped:
        return f"joborch cannot tell which user of this machine is calling: {remedy}"
    return f"another user of this machine needs a token: {remedy}"


def identify(node: Node, who: str, proof: Proof | None, headers: Mapping[str, str], peer: Peer) -> Caller | None:
    """Return who calls a route that is open to `who`; None for an unauthenticated caller of an open route. Raises HttpError."""
    if proof is not None:
        return Caller("server", "link")
    try:
        caller = check_caller(node, headers, peer)
    except HttpError:
        if who != "anyone":
            raise
        return None
    if who == "server" and caller.proof == "token":
        refuse_old_server(node)
    return caller


def refuse_old_server(node: Node) -> NoReturn:
    """Raise HttpError 426 for a server that sends its token instead of a proof, and log that from time to time."""
    now = node.clock.monotonic()
    if now - node.old_server_at > OLD_SERVER_LOG_S:
        node.old_server_at = now
        log.warning("a server sends its token, as joborch 0.1.0 does: replace its joborch.pyz with version %s; its jobs wait", __version__)
    what = f"this client is joborch {__version__}, and this server does not prove its identity (joborch 0.1.0 cannot)"
    raise HttpError(426, f"{what}: replace the server's joborch.pyz with version {__version__}; its jobs wait", Upgrade="joborch-link/1")


def proof_of(node: Node, headers: Mapping[str, str], method: str, target: str, length: int, peer: Peer) -> Proof | None:
    """Return the proof in a request, or None if it has none. Raises HttpError 401 if the proof is wrong."""
    if not (node.config.mode == "client" and node.tokens and headers.get("AUTHORIZATION", "").lower().startswith("joborch")):
        return None
    try:
        return node.proofs.accept(headers, method, target, length)
    except HttpError as refusal:
        if "X-Joborch-Nonce" not in refusal.headers:  # with a new nonce, the server only needs to call /hello again
            node.refused.note(peer.address)
        raise


# == 36. HTTP ==  A request is checked at the end of its headers: its caller, its size, its route.

CALLER_KEY = "joborch.caller"  # in the WSGI environment, where request headers begin with HTTP_

FULL_SAID_EVERY_S = 60.0


def check_size(node: Node, found: Route, length: int, chunked: bool) -> Promise:
    """Reserve the disk space that a body needs. Raises HttpError 411, 413 or 507, before the body is read.

    A form needs its size twice: as it arrives, and as files. If its length is unknown, each part is reserved when it arrives.
    """
    promise = Promise(node.data.account)
    if not found.takes_form:
        if length > (ANYONES_BODY_BYTES if found.who == "anyone" else MIB) or chunked:
            raise HttpError(413, "no body is expected here")
        return promise
    if not length and not chunked and not found.needs_form:
        return promise
    if not length and not chunked:
        raise HttpError(411, "the request has no body: send a form with Content-Length, as curl -F does", "Content-Length")
    limit = node.config.max_upload_bytes
    if length > limit:
        raise HttpError(413, f"the request is {length} bytes large: at most {limit} (JOBORCH_MAX_UPLOAD)", "Content-Length")
    try:
        promise.more(2 * length)
    except DiskFull as error:
        raise too_full(node, length) from error
    return promise


def too_full(node: Node, length: int) -> HttpError:
    """Return the error for a body of `length` bytes that does not fit on the disk, and log that."""
    say_full(node)
    what = f"the disk of this {node.config.mode} is too full for {length} bytes more"
    return HttpError(507, f"{what}: try again later, or ask its operator to free space (JOBORCH_MIN_FREE)", Retry_After="60")


def say_full(node: Node) -> None:
    """Log that uploads are refused because the disk is full, at most once a minute."""
    now = node.clock.monotonic()
    if now - node.full_said_at >= FULL_SAID_EVERY_S:
        node.full_said_at = now
        free, kept = free_bytes(node.data.path) // MIB, node.config.min_free_bytes // MIB
        log.warning(
            "uploads are refused: %s has %d MiB free, JOBORCH_MIN_FREE keeps %d: free space, or lower it", node.data.path, free, kept
        )


def make_app(node: Node) -> bottle.Bottle:
    """Return the WSGI application of one node: a Bottle with the routes of its mode."""
    import bottle

    app = bottle.Bottle()
    app.config["json.enable"] = False  # run_handler encodes answers
    for declared in routes_of(node.config.mode):
        app.route(declared.path, declared.method, functools.partial(run_handler, node, declared))
    app.default_error_handler = plain_error
    return app


def plain_error(error: Any) -> bytes:
    """Return the JSON body of an error that Bottle itself made."""
    import bottle

    bottle.response.content_type = JSON_TYPE
    return json.dumps({"message": one_line(str(error.body or error.status_line))}).encode()


def run_handler(node: Node, declared: Route, **arguments: str) -> bottle.HTTPResponse:
    """Run one handler. Whatever it raises becomes an answer without traceback and paths."""
    import bottle

    request = Request(bottle.request.environ)
    try:
        values = validate(node, request, declared, arguments)
        with node.gate if declared.quick else contextlib.nullcontext():
            answer = declared.handler(node, request, **values)
    except HttpError as refusal:
        answer = Answer.of(refusal)
    except StorageError as error:
        log.error("%s %s: %s", request.method, declared.path, error)
        answer = Answer({"message": "the database cannot be used now: try again soon"}, 503, {"Retry-After": "5"})
    except DiskFull as error:
        answer = Answer.of(too_full(node, error.needed))
    except OSError as error:
        trouble = disk_refusal(node, error)
        if trouble.status != 507:  # say_full has logged that
            log.exception("%s %s: %s", request.method, declared.path, trouble.message)
        answer = Answer.of(trouble)
    except Exception:
        trouble = internal_error(node)
        log.exception("%s %s: %s", request.method, declared.path, trouble.message)
        answer = Answer.of(trouble)
    body, headers = answer.body, dict(answer.headers)
    if isinstance(body, (dict, list, int, float, str)):
        body = json.dumps(body, allow_nan=False).encode() + b"\n"
        headers.setdefault("Content-Type", JSON_TYPE)
    if isinstance(body, bytes):
        headers.setdefault("Content-Length", str(len(body)))
        if node.config.mode == "client" and body:
            headers.setdefault("Repr-Digest", repr_digest(hashlib.sha256(body).hexdigest()))
    headers.update({"X-Content-Type-Options": "nosniff", OURS_HEADER: __version__})
    return bottle.HTTPResponse(body if body is not None else b"", answer.status, headers)


def internal_error(node: Node) -> HttpError:
    """Return a 500 with a random number that is also in the log."""
    return HttpError(500, f"internal error {secrets.token_hex(4)}: look for this number in the log of this {node.config.mode}")


def disk_refusal(node: Node, error: OSError) -> HttpError:
    """Return the answer for an error of the disk: 507 if it is full, 503 for other disk errors, else 500."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        say_full(node)
        return HttpError(507, f"disk is full at this {node.config.mode}: try again later", Retry_After="60")
    if error.errno in DISK_TROUBLES:
        return HttpError(503, f"the disk of this {node.config.mode} cannot be used now: try again later", Retry_After="60")
    return internal_error(node)


def reason_phrase(status: int) -> str:
    """Return HTTP's name of a status code."""
    import http

    return http.HTTPStatus(status).phrase


def file_answer(request: Request, archive: Archive, filename: str, headers: Mapping[str, str]) -> Answer:
    """Return an open file: all of it, a part (RFC 9110 Range, If-Range), or 304 if the caller has it."""
    tag = f'"{archive.sha256}"'
    said = {
        "Content-Type": ZIP_TYPE,
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Repr-Digest": repr_digest(archive.sha256),
        "Content-Disposition": f'attachment; filename="{filename}"',
        **headers,
    }
    known = [text.strip().replace("W/", "") for text in request.header("If-None-Match").split(",")]
    if tag in known or "*" in known:
        archive.file.close()
        return Answer(None, 304, {name: said[name] for name in ("ETag", *headers)})
    wanted = request.method == "GET" and request.header("If-Range") in ("", tag)  # RFC 9110: only GET has ranges
    span = byte_range(request.header("Range"), archive.size) if wanted else None
    if span is None:
        return Answer(archive.file, 200, {**said, "Content-Length": str(archive.size)})
    begin, end = span
    if begin >= end:
        archive.file.close()
        raise HttpError(416, f"there are {archive.size} bytes: ask for a part of them", "Range", Content_Range=f"bytes */{archive.size}")
    archive.file.seek(begin)
    return Answer(
        archive.file, 206, {**said, "Content-Length": str(end - begin), "Content-Range": f"bytes {begin}-{end - 1}/{archive.size}"}
    )


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Return (begin, end) of a single byte range; empty if it is outside the file, None if the header is absent or invalid."""
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header.strip())
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        return (max(0, size - int(match[2])), size) if int(match[2]) else (size, size)
    if match[2] and int(match[2]) < int(match[1]):
        return None
    return int(match[1]), min(int(match[2] or size) + 1, size)


PIPELINED_MOST = 16  # requests on one connection that arrive before the first is answered
CHUNKED_BYTES = 16 * KIB  # of a chunked body at once: the parser copies the rest for each chunk, which may be one byte
CONTROL_LINE_BYTES, TRAILER_BYTES = 4 * KIB, 64 * KIB  # of a chunked body


class Judge:
    """Extends waitress's parser: checks a request as soon as its headers have arrived, and answers 400 if it is malformed."""

    node: Node
    route: Route | None = None
    proof: Proof | None = None  # of the server that sent it
    caller: Caller | None = None
    proven = False  # its caller was authenticated

    def attach(self, channel: Any) -> None:
        self.its_channel = weakref.ref(channel)  # a cycle would keep a spool until the garbage collector runs
        self.too_many = len(channel.requests) >= PIPELINED_MOST
        self.promise = Promise(self.node.data.account)

    @property
    def channel(self) -> Any:
        return self.its_channel()

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the headers of a request and check it."""
        import waitress.parser

        parser: Any = self
        try:
            cast(Any, super()).parse_header(header_plus)
            length = -1 if parser.chunked else parser.content_length
            self.proof = proof_of(self.node, parser.headers, parser.command, parser.request_uri, length, self.channel)
            found = self.route = find_route(self.node.config.mode, parser.command, parser.path)
            self.caller = identify(self.node, found.who, self.proof, parser.headers, self.channel)
            check_csrf(self.node, found, self.caller, parser.headers)
            if self.caller is not None:
                self.proven = self.channel.proven = True
            self.promise = check_size(self.node, found, parser.content_length, parser.chunked)
        except HttpError as refusal:
            self.refuse(refusal)
        except (waitress.parser.ParsingError, waitress.parser.TransferEncodingNotImplemented):
            raise  # waitress answers these
        except Exception as error:  # noqa: BLE001 - strangers can cause it, so it is logged only for debugging
            self.refuse_unread(error)

    def received(self, data: bytes) -> int:
        """Process received data. Every error becomes an answer, and strangers cannot fill the log."""
        parser: Any = self
        if self.too_many:
            self.refuse(HttpError(400, f"more than {PIPELINED_MOST} requests arrived at once: wait for the answers before you send more"))
            return len(data)
        try:
            in_body = parser.body_rcv is not None and not parser.completed
            return self.received_body(data) if in_body else int(cast(Any, super()).received(data))
        except DiskFull as error:
            self.refuse(too_full(self.node, error.needed))
        except OSError as error:  # of the file that a large body is spooled to
            log.error("%s %s: the body cannot be kept: %s", parser.command, one_line(parser.path, 80), error)
            self.refuse(disk_refusal(self.node, error))
        except Exception as error:  # noqa: BLE001 - as above
            self.refuse_unread(error)
        return len(data)

    def received_body(self, data: bytes) -> int:
        """Process a part of the body and count it in the disk account."""
        parser: Any = self
        if parser.chunked:
            data = data[:CHUNKED_BYTES]
            self.promise.more(2 * len(data))
        taken = int(cast(Any, super()).received(data))
        self.promise.wrote(taken)
        if parser.chunked and (len(parser.body_rcv.control_line) > CONTROL_LINE_BYTES or len(parser.body_rcv.trailer) > TRAILER_BYTES):
            self.refuse(HttpError(400, "the request cannot be read: the head of a chunk, or what follows the last one, is too long"))
        return taken

    def refuse_unread(self, error: Exception) -> None:
        log.debug("a request cannot be read: %s", one_line(repr(error), 200))
        self.refuse(HttpError(400, "the request cannot be read: its first line or a header is malformed"))

    def refuse(self, refusal: HttpError) -> None:
        """Answer the request with this error and discard its body."""
        import waitress.utilities

        parser: Any = self
        parser.error = waitress.utilities.Error(refusal.message)
        parser.error.refusal = refusal
        # With a length of 0, waitress's own limits do not replace this error.
        parser.completed, parser.expect_continue, parser.content_length = True, False, 0
        self.close()

    def close(self) -> None:
        """Release the body and the disk space that was promised for it."""
        with contextlib.suppress(OSError):  # it may have buffered bytes that the disk does not accept
            cast(Any, super()).close()
        self.promise.close()


# == 37. Connections ==  Every caller gets an answer or is dropped. No caller can keep the others out.


REQUEST_LIMIT_S = 15.0  # for all headers of a request
IDLE_LIMIT_S = 120.0  # between two requests
PROGRESS_BYTES = 64 * KIB  # a body or an answer must advance by this much within IDLE_LIMIT_S
LINGER_S = 2.0  # after a refusal, the rest of the request is read and discarded for this long: a reset would lose the answer
MOST_CONNECTIONS = 4096
ACCEPTS_AT_ONCE = 64
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def make_task_class() -> Any:
    """Return a waitress task that passes on what its parser knows: the caller, and the promise of disk space."""
    import waitress.task

    class Task(waitress.task.WSGITask):  # type: ignore[misc]
        def get_environment(self) -> dict[str, Any]:
            environ: dict[str, Any] = super().get_environment()
            environ[CALLER_KEY] = self.request.caller
            environ["joborch.promise"] = self.request.promise
            return environ

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
            parent.handle_read()
            connection.server.house.hold(self, held_bytes(connection))
            connection.server.house.shrink()
        elif time.monotonic() > self.linger_until or not connection.recv(MIB):
            connection.handle_close()

    def recv(self, size: int) -> bytes:
        """Read. Only a little of a chunked body: chunks of one byte take a thousand times their size in memory."""
        request = cast(Any, self).request
        return bytes(cast(Any, super()).recv(min(size, CHUNKED_BYTES) if request is not None and request.chunked else size))

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
        try:
            parent.service()
        finally:
            self.serving = False
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
    siblings: Sequence[Any] = ()  # the other listeners of the process
    next_look = paused_until = 0.0  # monotonic

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
        cast(Any, super()).close()

    def close_overdue(self, now: float) -> None:
        """Close connections that are overdue, and unproven ones that occupy too much memory."""
        for connection in list(cast(Any, self).active_channels.values()):
            if connection.is_overdue(now):
                connection.handle_close()
        self.house.shrink()
        self.house.tell(now)

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
        quick = WORKER_THREADS + EVENTS_PLACES + (WAITER_PLACES if mode == "server" else 0)
        forms = {"form": Pool("form", 12, 1000), "large": Pool("large", 8, 1000)}
        self.pools = {"quick": Pool("quick", quick), **forms, "slow": Pool("slow", 16, 64)}

    def add_task(self, connection: Any) -> None:
        """Queue the next request of a connection, or answer 503 if too many of its class wait."""
        request = connection.requests[0]
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
    time, and a WaiterLimit applies to them.
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


# == 38. Cleaning ==  Files of jobs are deleted only here. Files that cannot be removed do not delay others.


def due_for_cleaning(node: Node, now: float) -> list[Job]:
    """Return some ended jobs whose files are due at `now` (steady), without those whose removal failed a short time ago."""
    age, is_client = node.config.max_age_s, node.config.mode == "client"
    kept_s = min(age, node.config.keep_fetched_s) if is_client else age
    moments = {
        "before": now - kept_s,
        "fetched_before": now - age,
        "unfetched_before": now - (4 * age if is_client else age),
        "confirmed_before": node.clock.wall() - kept_s,
    }
    jobs = node.store.jobs(ENDED_BEFORE, **moments, limit=500 + len(node.unremovable))  # the query returns unremovable ones first
    return [job for job in jobs if job.id not in node.unremovable or not node.unremovable[job.id].waits()]


def clean_tick(node: Node) -> bool:
    """Clean jobs that ended long enough ago: files first, then the row. Also do other periodic work."""
    node.store.write(node.store.beat, durable=False)
    node.refused.report()
    node.program.restart_needed()  # logs it
    node.program.keep_copy()
    node.data.keep_reserve()
    now, more = node.store.steady(), False
    for job in due_for_cleaning(node, now):
        try:
            if node.config.mode == "client":
                remove_scratch(node.folder(job))
            remove_tree(node.folder(job))
            crash_point("clean.folder")
            remove_tree(node.data.result(job.mark))
            crash_point("clean.files")
        except OSError as error:
            put_off(node, job, error)
            continue
        node.unremovable.pop(job.id, None)
        reason = Reason.CLEANED.format(duration=format_duration(max(0.0, now - job.moved_at)))
        more = node.store.move(job, Status.CLEANED, reason, row_reason=job.reason) or more
        crash_point("clean.stored")
    old = [row["id"] for row in node.store.read(CLEANED_BEFORE, before=now - node.config.keep_rows_s)]
    if old:
        node.store.forget(old)
        crash_point("clean.forgotten")
    return more or bool(old)


def sweep(node: Node) -> None:
    """In the background, check the database and remove files without a row, which a crash left."""
    node.store.look_for_damage()
    for folder in (node.data.jobs, node.data.results):
        for path in folder.iterdir():
            if node.stopping.is_set():
                return
            if re.sub(r"[.]zip$", "", path.name) in node.data.receiving:
                continue
            job = row_of(node, path)  # after that check: an upload that has just finished has a row
            given_up = job is not None and folder == node.data.results and path.name != node.data.result(job.mark).name
            if job is None or job.status is Status.CLEANED or given_up:
                try:
                    remove_tree(path)
                    log.info("%s belongs to no %s: removed", path.name, node.store.noun)
                except OSError as error:  # such as files of a container's user
                    log.warning("%s belongs to no %s and cannot be removed: %s", path.name, node.store.noun, error)
            elif node.config.mode == "client" and job.status in ENDED:
                remove_scratch(path)


def row_of(node: Node, path: Path) -> Job | None:
    """Return the job whose files are at `path`: `UUID`, `UUID.ATTEMPT.zip` on a server, `UUID.ATTEMPT` on a client."""
    job_uuid, _, rest = path.name.partition(".")
    if node.config.mode == "client" and rest.isdigit():
        return node.store.job(JOB_BY_MARK, uuid=job_uuid, attempt=int(rest))
    return node.store.job(JOB_BY_UUID, uuid=job_uuid)


@dataclass
class Unremovable(Backoff):
    """Files of an ended job that could not be removed: where they are, and their size."""

    folder: Path = Path()
    size_bytes: int = 0


UNREMOVABLE_FIRST_S, UNREMOVABLE_LAST_S = 60.0, 86400.0  # pauses from the third try on, each four times the one before


def put_off(node: Node, job: Job, error: OSError) -> None:
    """Try to remove a job's files again later, with growing pauses. The first failure is logged, later ones once a day."""
    folder = node.folder(job)
    known = node.unremovable.setdefault(job.id, Unremovable(node.clock, folder=folder))
    pause_s = min(UNREMOVABLE_FIRST_S * 4.0 ** min(known.failures - 1, 10), UNREMOVABLE_LAST_S) if known.failures else 0.0
    known.size_bytes = bytes_below(folder)
    known.failed(error, pause_s)
    if known.failures == 1 or pause_s == UNREMOVABLE_LAST_S:
        log.warning(
            "the files of %s %d cannot be removed: %s; remove %s as their owner or as root; other files are still removed",
            node.store.noun, job.id, error, folder,
        )  # fmt: skip


def unremovable_json(node: Node) -> dict[str, Any] | None:
    """Return how many files cannot be removed, with the remedy; None if there are none."""
    found = list(node.unremovable.values())
    if not found:
        return None
    size = sum(each.size_bytes for each in found)
    what = f"{node.store.noun}s" if len(found) > 1 else node.store.noun
    text = f"files of {len(found):,} ended {what} ({size_text(size)}) cannot be removed, as in {found[0].folder}"
    remedy = "they belong to another user, perhaps of a container: remove them as that user or as root"
    return {"count": len(found), "bytes": size, "message": f"{text}: {remedy}"}


# -- removal --


def discard(path: Path) -> None:
    """Remove files without a row, of a failed upload, a second delivery, or a useless transfer. They may be missing."""
    remove_tree(path)


def discard_payloads(data: DataFolder) -> None:
    """Remove the payloads of an earlier database, with their TMPDIR."""
    for folder in data.jobs.iterdir():
        try:
            remove_scratch(folder)
            remove_tree(folder)
        except OSError as error:
            log.warning("%s belongs to an earlier database and cannot be removed: %s", folder, error)


def remove_tree(path: Path) -> None:
    """Remove a file or folder, whatever permissions a script has set in it. It may be missing. Raises OSError if something remains."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):  # missing rights, or a path too long or too deep for Python
        subprocess.run(["chmod", "-R", "u+rwx", "--", str(path)], check=False, capture_output=True, env=helper_environment())
        done = subprocess.run(
            ["rm", "-rf", "--", str(path)], check=False, capture_output=True, text=True, errors="replace", env=helper_environment()
        )
        if done.returncode != 0 and path.exists():
            raise OSError(errno.EIO, one_line(done.stderr) or "rm failed", str(path)) from None


def scratch_of(folder: Path) -> list[str]:
    """Return where an attempt's TMPDIR may be on this machine: where `tmp` points, which its script can change, and in each base."""
    name = scratch_name(folder.name)
    places = [f"{base}/{name}" for base in scratch_bases(os.environ)]
    with contextlib.suppress(OSError):  # it is a folder, or gone
        place = os.readlink(folder / "tmp")
        if place.startswith("/") and place.rpartition("/")[2] == name:
            places.insert(0, place)
    return list(dict.fromkeys(places))


def remove_scratch(folder: Path, at_once: bool = True) -> bool:
    """Remove an attempt's TMPDIR if it is on this machine. If not `at_once`, keep it if it is not empty, and return False."""
    for place in scratch_of(folder):
        try:
            os.rmdir(place)
            continue
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and not at_once:
                return False
        try:
            if os.lstat(place).st_uid == os.geteuid():
                remove_tree(Path(place))
        except OSError as error:
            log.warning("%s, the TMPDIR of %s, cannot be removed: %s", place, folder.name, error)
    return True


def drop_scratch(client: Client, job: Job) -> None:
    """Remove the TMPDIR of a payload that is over, in the background if it is not empty, because it may be large."""
    folder = client.data.job(job.mark)
    if not remove_scratch(folder, at_once=False):
        threading.Thread(target=remove_scratch, args=(folder,), name=f"scratch-{job.id}", daemon=True).start()


# == 39. Settings ==  Each setting is declared once, as a field of one of three classes. Flags, environment, help and messages follow.


@dataclass(frozen=True)
class Setting:
    """One setting: its environment name, the field that it fills, how it is read, and what it means."""

    name: str
    field: str
    read: Callable[[str], Any]
    default: str  # as a person writes it; "" means none
    help: str
    modes: str  # "server", "client" or both
    plugin: str = ""  # the plug-in that uses it; "" means the program itself
    secret: bool = False

    @property
    def flag(self) -> str:
        """The command-line flag: JOBORCH_SEND_INTERVAL is --send-interval, PORT is --port."""
        return "--" + self.name.replace("JOBORCH_", "").lower().replace("_", "-")


BOTH = "server client"


def setting(
    name: str, modes: str, read: Callable[[str], T], default: str, meaning: str, *, plugin: str = "", secret: bool = False, unset: Any = ""
) -> T:
    """Declare a field of a dataclass as a setting; `unset` is its value if it is not given and has no default."""
    row = Setting(name, "", read, default, meaning, modes, plugin, secret)
    return field(default_factory=lambda: read(default) if default else unset, metadata={"setting": row})


def settings_of(owner: type) -> tuple[Setting, ...]:
    """Return the settings that are declared as fields of a dataclass."""
    declared = ((item.name, item.metadata.get("setting")) for item in dataclasses.fields(owner))
    return tuple(dataclasses.replace(row, field=name) for name, row in declared if row)


@dataclass(frozen=True)
class Address:
    """The three URLs of a client, and their common base if they have one; only then can it have /events and /health."""

    upload_url: str
    download_url: str
    terminate_url: str
    base_url: str

    @property
    def name(self) -> str:
        """What people call it: host and port, and the path of its base if there is one."""
        parts = urlsplit(self.base_url or self.upload_url)
        return parts.netloc + (parts.path if parts.path != "/" else "").rstrip("/")


# fmt: off
@dataclass(frozen=True)
class Config:
    """The effective settings of one process, and where each came from. Declared as: name, modes, reader, default, help."""

    mode: str
    port: int = setting("PORT", BOTH, read_port, "", "port to listen on; 0 picks a free one (default: server 5000, client 9000)", unset=-1)
    host: str = setting("JOBORCH_HOST", BOTH, read_text, DEFAULT_HOSTS, "addresses to listen on, separated by commas")
    data_path: str = setting("DATA_PATH", BOTH, read_text, "", "folder for files (default: the user's data folder)")
    db_path: str = setting("DB_PATH", BOTH, read_text, "",
        "database file (default: joborch.db in DATA_PATH); :memory: for a client that forgets")
    max_age_s: float = setting("MAX_AGE", BOTH, read_seconds, "172800",
        "seconds (or 90m, 48h, 2d) that files are kept after a job's end; a client keeps unfetched results four times as long")
    token: str = setting("JOBORCH_TOKEN", BOTH, read_token, "",
        "bearer token(s) that callers must send, separated by commas; visible in ps (client: created at first start)", secret=True)
    token_file: str = setting("JOBORCH_TOKEN_FILE", BOTH, read_text, "", "file with the token; a client creates it if it is missing")
    allow_anonymous: bool = setting("JOBORCH_ALLOW_ANONYMOUS", BOTH, read_switch, "0",
        "1: callers from JOBORCH_ALLOW_FROM need no token; a client that has no token then serves the same user")
    allow_from: tuple[Network, ...] = setting("JOBORCH_ALLOW_FROM", BOTH, read_networks, "",
        "addresses and networks that JOBORCH_ALLOW_ANONYMOUS=1 admits, separated by commas, as in 192.0.2.7,10.0.0.0/8", unset=())
    hosts: str = setting("JOBORCH_HOSTS", BOTH, read_text, "", "further host names of this server, separated by commas")
    socket_file: str = setting("JOBORCH_SOCKET", "server", read_text, "",
        "Unix socket for users of this machine; 0: none (default: joborch-PORT.sock in XDG_RUNTIME_DIR, else in /tmp/joborch-UID)")
    socket_mode: str = setting("JOBORCH_SOCKET_MODE", "server", read_mode, "0600", "mode of the Unix socket: whoever may open it may call")
    slots: int = setting("JOBORCH_SLOTS", "client", read_positive, "",
        "local: cores that payloads may use at once (default: all); batch system: jobs that it gets at once (default: 100)", unset=0)
    memory_bytes: int = setting("JOBORCH_MEMORY", "client", read_bytes, "",
        "memory that payloads may request together (default: the machine's memory)", unset=0)
    executor: str = setting("JOBORCH_EXECUTOR", "client", read_executor, "local",
        "what runs the payloads: local, slurm, dirac, or package.module:Class for another executor")
    pass_env: tuple[str, ...] = setting("JOBORCH_PASS_ENV", "client", read_names, "",
        "further variables that scripts get from the client's environment: names separated by commas, * for any characters", unset=())
    batch_interval_s: float = setting("JOBORCH_BATCH_INTERVAL", "client", read_period, "10",
        "seconds between two queries of a batch system (one query for all jobs)")
    vanish_grace_s: float = setting("JOBORCH_VANISH_GRACE", "client", read_seconds, "120",
        "seconds to wait for the exit file of a batch job that ended or is no longer known")
    dirac_url: str = setting("JOBORCH_DIRAC_URL", "client", read_url, "",
        "URL of DiracX, as in https://dirac.example.org", plugin="dirac")
    dirac_credentials: str = setting("JOBORCH_DIRAC_CREDENTIALS", "client", read_text, "~/.cache/diracx/credentials.json",
        "the file that `dirac login` writes", plugin="dirac")
    dirac_quiet_s: float = setting("JOBORCH_DIRAC_QUIET", "client", read_seconds, "45m",
        "how long the pilot of a killed job may be silent before it counts as gone (pilots call every 30 minutes)", plugin="dirac")
    kill_grace_s: float = setting("JOBORCH_KILL_GRACE", "client", read_seconds, "10", "seconds from TERM to KILL")
    log_limit_bytes: int = setting("JOBORCH_LOG_LIMIT", BOTH, read_bytes, "64M",
        "how much of each output stream is kept: half of it from the start, half from the end")
    run_interval_s: float = setting("JOBORCH_RUN_INTERVAL", "client", read_period, "0.5",
        "longest sleep of the runner, in seconds")
    send_interval_s: float = setting("JOBORCH_SEND_INTERVAL", "server", read_period, "0.5",
        "longest sleep of the sender, in seconds")
    get_interval_s: float = setting("JOBORCH_GET_INTERVAL", "server", read_period, "0.5",
        "longest sleep of the getter, in seconds")
    share_half_life_s: float = setting("JOBORCH_SHARE_HALF_LIFE", "server", read_period, "6h",
        "policy share: the time after which a past use counts half")
    ageing_s: float = setting("JOBORCH_AGEING", "server", read_period, "60", "policy priority: seconds of waiting that count as one point")
    weights: Mapping[int, float] = setting("JOBORCH_WEIGHTS", "server", read_weights, "",
        "policy share: USER=WEIGHT, separated by commas, as in 7=2,8=0.5", unset={})
    max_queued_per_user: int = setting("JOBORCH_MAX_QUEUED_PER_USER", "server", read_positive, "10000",
        "jobs of one user that may be queued at once")
    clean_interval_s: float = setting("JOBORCH_CLEAN_INTERVAL", BOTH, read_period, "60", "seconds between two runs of the cleaner")
    keep_fetched_s: float = setting("JOBORCH_KEEP_FETCHED", "client", read_seconds, "10m",
        "how long a client keeps files after a server has confirmed that it has the result")
    keep_rows_s: float = setting("JOBORCH_KEEP_ROWS", BOTH, read_seconds, "365d", "how long rows and history of cleaned jobs are kept")
    max_upload_bytes: int = setting("JOBORCH_MAX_UPLOAD", BOTH, read_bytes, "10G", "largest request body")
    max_result_bytes: int = setting("JOBORCH_MAX_RESULT", BOTH, read_bytes, "10G",
        "largest result: total size of the files that a script leaves, including holes")
    max_result_files: int = setting("JOBORCH_MAX_RESULT_FILES", BOTH, read_positive, "200000",
        "most files and links in a result, with half as many folders")
    min_free_bytes: int = setting("JOBORCH_MIN_FREE", BOTH, read_bytes, "1G", "free disk space below which uploads are refused with 507")
    ca_file: str = setting("JOBORCH_CA_FILE", "server", read_text, "",
        "certificates (PEM) to check https clients with, instead of the system's")
    compat: str = setting("JOBORCH_COMPAT", "server", one_of("1.2", "2.2"), "1.2",
        "2.2: GET /download/ID answers as the reference's 2.2 does", plugin="compat22")
    log_level: str = setting("JOBORCH_LOG", BOTH, one_of("debug", "info", "warning", "error"), "info",
        "log level: debug, info, warning or error")
    log_format: str = setting("JOBORCH_LOG_FORMAT", BOTH, one_of("text", "json"), "text", "json: one JSON object per line")
    services: Mapping[str, Service] = field(default_factory=dict)
    batch: Mapping[str, BatchOptions] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    env_file: str = ""

    def batch_options(self, service: str | None) -> BatchOptions:
        """Return the options for the jobs of a service in a batch system."""
        return self.batch.get((service or "").lower(), BatchOptions())


@dataclass(frozen=True)
class Service:
    """A service: its clients and limits. Each setting is SERVICE_<NAME>_..., as in SERVICE_EXAMPLE_CLIENTS."""

    name: str
    addresses: tuple[Address, ...]  # its clients, from the first four settings
    upload_url: str = setting("UPLOAD_URL", "server", read_text, "", "where a client accepts payloads, as in http://host:9000/submit")
    download_url: str = setting("DOWNLOAD_URL", "server", read_text, "", "where it serves results, as in http://host:9000/retrieve")
    terminate_url: str = setting("TERMINATE_URL", "server", read_text, "", "where it kills payloads, as in http://host:9000/kill")
    clients: str = setting("CLIENTS", "server", read_text, "",
        "base URLs of clients, separated by commas; short for the three URLs")
    token: str = setting("TOKEN", "server", read_token, "", "token for these clients", secret=True)
    token_file: str = setting("TOKEN_FILE", "server", read_text, "", "file with the token for these clients")
    peer: str = setting("PEER", "server", one_of("joborch", "2.2"), "",
        "2.2: these may be 2.2 clients, which cannot prove their identity (default: joborch; 2.2 for the three URLs without a token)")
    runs_per_user: int = setting("RUNS_PER_USER", "server", read_positive, "5", "jobs of one user that may be at clients at once")
    max_runs: int = setting("MAX_RUNS", "server", read_positive, "10", "jobs of the service that may be at clients at once")
    policy: str = setting("POLICY", "server", one_of("share", "fifo", "priority"), "share",
        "who is next: least use; first come, first served; or highest priority with ageing")
    timeout_s: float | None = setting("TIMEOUT", "server", read_period, "", "run time limit in seconds (default: none)", unset=None)
    retries: int = setting("RETRIES", "server", read_whole, "2",
        "further attempts after an infrastructure failure, never after a failure of the script")
    return_inputs: bool = setting("RETURN_INPUTS", "server", read_switch, "1",
        "0: the result omits inputs that the script left unchanged")
    unreachable_after_s: float = setting("UNREACHABLE_AFTER", "server", read_period, "24h",
        "how long jobs wait if no client of the service answers")
    lost_after_s: float = setting("LOST_AFTER", "server", read_period, "3600",
        "seconds that a client may be silent before its jobs get a new attempt")


@dataclass(frozen=True)
class BatchOptions:
    """A client's options for the jobs of one service in a batch system, and the line that runs before its scripts."""

    prelude: str = setting("PRELUDE", "client", read_line, "",
        "a line of bash that runs before each script, in a login shell, as in module load gcc")
    slurm_partition: str = setting("SLURM_PARTITION", "client", read_word, "", "sbatch --partition", plugin="slurm")
    slurm_account: str = setting("SLURM_ACCOUNT", "client", read_word, "", "sbatch --account", plugin="slurm")
    slurm_qos: str = setting("SLURM_QOS", "client", read_word, "", "sbatch --qos", plugin="slurm")
    slurm_constraint: str = setting("SLURM_CONSTRAINT", "client", read_word, "", "sbatch --constraint, as in gpu", plugin="slurm")
    slurm_gres: str = setting("SLURM_GRES", "client", read_word, "", "sbatch --gres, as in gpu:1", plugin="slurm")
    slurm_time_s: float | None = setting("SLURM_TIME", "client", read_period, "",
        "time limit of jobs without a timeout, as in 90m or 24h", plugin="slurm", unset=None)
    slurm_args: tuple[str, ...] = setting("SLURM_ARGS", "client", read_by_plugin("joborch_plugins.slurm:read_sbatch_words"), "",
        "further options of sbatch, as in --nice=100 --exclusive", plugin="slurm", unset=())
    dirac_site: str = setting("DIRAC_SITE", "client", read_text, "", "sites separated by commas, as in LCG.CERN.ch", plugin="dirac")
    dirac_tags: str = setting("DIRAC_TAGS", "client", read_text, "", "tags separated by commas, as in GPU", plugin="dirac")
    dirac_cpu_time_s: float | None = setting("DIRAC_CPU_TIME", "client", read_period, "",
        "CPU time (default: a job's timeout times its cpus)", plugin="dirac", unset=None)
    dirac_platform: str = setting("DIRAC_PLATFORM", "client", read_text, "", "platform, as DIRAC names it", plugin="dirac")
    dirac_jdl: str = setting("DIRAC_JDL", "client", read_text, "",
        'further lines of JDL, as in Priority = 5; BannedSites = {"LCG.X.org"}', plugin="dirac")
# fmt: on


SETTINGS = settings_of(Config)
SERVICE_SETTINGS = settings_of(Service) + settings_of(BatchOptions)


# == 40. Configuration ==  Reads the settings and services of one process from flags, environment and files, and refuses mistakes.

QUOTED = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|\'([^\']*)\')')  # at the beginning of a value in an environment file


def env_value(text: str) -> str:
    """Return the value after `NAME=`, as systemd and shells read it. Raises ValueError if a quote is not closed.

    Quotes at its beginning are removed, with the backslashes that double quotes need; ` #` begins a comment. Other quotes and
    backslashes are literal.
    """
    pieces, rest = "", text
    while quoted := QUOTED.match(rest):
        pieces += quoted[2] if quoted[1] is None else re.sub(r'\\(["\\$`])', r"\1", quoted[1])
        rest = rest[quoted.end() :]
    bare = re.split(r"\s#", rest, maxsplit=1)[0].strip()
    if bare[:1] in ("'", '"'):
        raise ValueError("a quote is not closed")
    return pieces + bare


def read_env_file(path: str) -> dict[str, str]:
    """Return the NAME=VALUE lines of `path`, with comments, quotes and `export` as in systemd and shells."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--env-file {path} cannot be read: {error}") from error
    pairs = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith(("#", ";")):
            continue
        found = re.fullmatch(r"(?:export\s+)?(\w+)\s*=(.*)", text)
        if not found:
            raise ConfigError(f"--env-file {path}, line {number}: write NAME=VALUE")
        try:
            pairs[found[1]] = env_value(found[2])
        except ValueError as error:
            raise ConfigError(f"--env-file {path}, line {number}: {found[1]}: {error}") from error
    return pairs


def read_setting(setting: Setting, text: str, shown_name: str) -> Any:
    """Return the value of one setting. Raises ConfigError with the setting, the value and what is allowed."""
    try:
        return setting.read(text)
    except ValueError as error:
        shown = "(hidden)" if setting.secret else repr(one_line(text, 80))
        raise ConfigError(f"{shown_name} is {shown}: {error}") from error


def split_service_name(name: str) -> tuple[str, Setting] | None:
    """Return (service, setting) of `SERVICE_<NAME>_<SUFFIX>`, by the longest known suffix; None for other names."""
    for setting in sorted(SERVICE_SETTINGS, key=lambda setting: -len(setting.name)):
        suffix = "_" + setting.name
        if name.startswith("SERVICE_") and name.endswith(suffix) and len(name) > len("SERVICE_") + len(suffix):
            return name[len("SERVICE_") : -len(suffix)].lower(), setting
    return None


def client_address(base_url: str) -> Address:
    """Return the address of a client whose routes are below one base URL."""
    base = base_url.rstrip("/")
    return Address(base + "/submit", base + "/retrieve", base + "/kill", base)


def reference_address(service: Service) -> Address | None:
    """Return the address of the client that the three URLs of 2.2 name, or None if none is set."""
    first, *others = [url.rstrip("/") for url in (service.upload_url, service.download_url, service.terminate_url)]
    if not first:
        if any(others):
            raise ConfigError(f"SERVICE_{service.name.upper()}_UPLOAD_URL is missing: set it, as in http://host:9000/submit")
        return None
    base, _, last = first.rpartition("/")
    base = base if last == "submit" else ""
    if not base and not all(others):
        raise ConfigError(
            f"SERVICE_{service.name.upper()}_DOWNLOAD_URL and _TERMINATE_URL are needed if UPLOAD_URL does not end in /submit"
        )
    return Address(first, others[0] or base + "/retrieve", others[1] or base + "/kill", base)


def check_url(url: str, shown_name: str) -> None:
    """Raise ConfigError unless `url` is an http or https URL with a host and no password."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"[\s\x00-\x1f]", url)
    except ValueError:
        fits = False
    if fits and "@" in parts.netloc:
        raise ConfigError(f"{shown_name} contains a user or password: remove it, and set SERVICE_<NAME>_TOKEN to the client's token")
    if not fits:
        raise ConfigError(f"{shown_name} is {one_line(url, 80)!r}: give a URL, as in http://host:9000")


def read_token_file(path: str, shown_name: str) -> str:
    """Return the token in a file. Raises ConfigError if it cannot be read."""
    try:
        return read_token(Path(path).read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown_name} {path} cannot be read: {error}") from error


EXAMPLE_CLIENT_URL = "http://127.0.0.1:9000"  # the client of `example` if none is set


def read_settings(texts: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """Return the values of one service's settings by field, from texts by suffix. Settings without a text are omitted."""
    given = [setting for setting in SERVICE_SETTINGS if texts.get(setting.name)]
    return {setting.field: read_setting(setting, texts[setting.name], prefix + setting.name) for setting in given}


def make_service(name: str, texts: Mapping[str, str]) -> Service:
    """Build one service from its settings, by suffix. Raises ConfigError if they do not fit together."""
    prefix = f"SERVICE_{name.upper()}_"
    service = Service(name, (), **read_settings(texts, prefix))
    bases = [base.strip() for base in service.clients.split(",") if base.strip()]
    first = reference_address(service)
    for base in bases:
        check_url(base, prefix + "CLIENTS")
    for url, setting in zip(dataclasses.astuple(first) if first else (), ("UPLOAD_URL", "DOWNLOAD_URL", "TERMINATE_URL")):
        check_url(url, prefix + setting)
    if not first and not bases and name == "example":
        bases = [EXAMPLE_CLIENT_URL]
    if not first and not bases:
        raise ConfigError(f"service {name} has no client: set {prefix}CLIENTS=http://host:9000")
    token = service.token
    if not token and service.token_file:
        token = read_token_file(service.token_file, prefix + "TOKEN_FILE")
    return dataclasses.replace(
        service,
        addresses=(*([first] if first else []), *map(client_address, bases)),
        token=token,
        peer=service.peer or ("2.2" if first and not bases and not token else "joborch"),
    )


def texts_of_services(environment: Mapping[str, str], mode: str) -> dict[str, dict[str, str]]:
    """Return the `SERVICE_*` variables for one mode: texts by service and suffix."""
    texts: dict[str, dict[str, str]] = {}
    for name, text in environment.items():
        found = split_service_name(name.upper())
        if found and found[1].modes == mode:
            texts.setdefault(found[0], {})[found[1].name] = text
    return texts


def read_batch_options(environment: Mapping[str, str]) -> dict[str, BatchOptions]:
    """Return a client's options for a batch system, by service. Raises ConfigError."""
    found = texts_of_services(environment, "client").items()
    return {name: BatchOptions(**read_settings(texts, f"SERVICE_{name.upper()}_")) for name, texts in found}


def read_services(environment: Mapping[str, str]) -> dict[str, Service]:
    """Return the services in the `SERVICE_*` variables, or else `example` on this machine. Raises ConfigError."""
    texts = texts_of_services(environment, "server") or {"example": {}}
    return {name: make_service(name, suffixes) for name, suffixes in sorted(texts.items())}


def nearest_suffix(name: str) -> str:
    """Return ` (did you mean X?)` for the service setting nearest to the end of a variable's name, or an empty string."""
    suffixes, words = [setting.name for setting in SERVICE_SETTINGS], name.split("_")
    tails = {"_".join(words[-count:]) for count in (1, 2, 3)}
    import difflib

    scores = {suffix: max(difflib.SequenceMatcher(None, tail, suffix).ratio() for tail in tails) for suffix in suffixes}
    best = max(scores, key=lambda suffix: scores[suffix])
    return f" (did you mean {best}?)" if scores[best] > 0.7 else ""


def unknown_names(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable that has a prefix of joborch's settings but is not one."""
    known = {setting.name for setting in SETTINGS} | {"JOBORCH_SERVER"}
    for name in sorted(environment):
        if name.startswith("JOBORCH_") and name not in known and not name.startswith("JOBORCH_TEST_"):
            plain = name.replace("JOBORCH_", "", 1)
            yield f"{name} is not a setting" + (f" (did you mean {plain}?)" if plain in known else nearest(name, known))
        elif name.startswith("SERVICE_") and not split_service_name(name.upper()):
            yield f"{name} is not a setting of a service{nearest_suffix(name)}"


LONG_TIME_S = 6 * 3600.0  # a setting with at least this default is rarely meant in seconds


def missing_units(arguments: Mapping[str, str | None], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a question about each time that is set to a small number without a unit although hours or days are usual."""
    given = [(setting, arguments.get(setting.field) or environment.get(setting.name) or "", setting.name) for setting in SETTINGS]
    for name, text in environment.items():
        found = split_service_name(name.upper())
        given += [(found[1], text, name)] if found else []
    for setting, text, name in given:
        usual_s = read_seconds(setting.default) if setting.read in (read_seconds, read_period) and setting.default else 0.0
        if usual_s >= LONG_TIME_S and re.fullmatch(r"[0-9]{1,3}", text) and int(text):
            yield f"{name} is {text}: did you mean {text} seconds? Write {text}s if you did, else {text}h or {text}d"


def machine_memory_bytes() -> int:
    """Return the memory of this machine, or of this process's control group if that has less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return memory


def default_folder(kind: str) -> str:
    """Return the user's `data` or `config` folder for joborch. Raises ConfigError if the user has no home."""
    import platformdirs

    folder = platformdirs.user_data_dir("joborch") if kind == "data" else platformdirs.user_config_dir("joborch")
    if folder.startswith("~") or not os.path.isabs(folder):
        raise ConfigError("this user has no home folder: set DATA_PATH to a writable folder")
    return folder


def token_of_file(config: Config) -> str:
    """Return the token in JOBORCH_TOKEN_FILE; empty if it is not set, or if a client will create the file at its first start."""
    path = config.token_file
    waits = config.mode == "client" and not os.path.lexists(path)
    return read_token_file(path, "JOBORCH_TOKEN_FILE") if path and not waits else ""


def with_defaults(config: Config) -> Config:
    """Fill in the values that depend on the machine, the mode or each other."""
    data_path = os.path.abspath(config.data_path or os.path.join(default_folder("data"), config.mode))
    db_path = config.db_path or os.path.join(data_path, "joborch.db")
    return dataclasses.replace(
        config,
        port=config.port if config.port >= 0 else {"server": 5000}.get(config.mode, 9000),
        data_path=data_path,
        db_path=db_path if db_path == ":memory:" else os.path.abspath(db_path),
        slots=config.slots or (os.cpu_count() or 1 if config.executor == "local" else BATCH_SLOTS),
        memory_bytes=config.memory_bytes or machine_memory_bytes(),
        token=config.token or token_of_file(config),
    )


def load_config(mode: str, arguments: Mapping[str, str | None], environment: Mapping[str, str]) -> Config:
    """Return the effective configuration of `mode`. A flag wins over the environment, that over --env-file, that over the default.

    `arguments` maps a setting's field (and `env_file`) to the text given on the command line, or None.
    """
    env_file = arguments.get("env_file") or ""
    from_file = {name: text for name, text in (read_env_file(env_file) if env_file else {}).items() if text}
    given = {name: text for name, text in environment.items() if text}
    merged = {**from_file, **given}
    found_in = {name: "environment" if name in given else "--env-file" for name in merged}
    sources = {name.upper(): source for name, source in found_in.items() if split_service_name(name.upper())}
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        flag = arguments.get(setting.field)
        sources[setting.name] = f"flag {setting.flag}" if flag else found_in.get(setting.name, "default")
        if flag or setting.name in merged:
            values[setting.field] = read_setting(setting, flag or merged[setting.name], setting.flag if flag else setting.name)
    config = with_defaults(Config(mode, env_file=env_file, sources=sources, **values))
    services = read_services(merged) if mode == "server" else {}
    batch = read_batch_options(merged) if mode == "client" else {}
    config = dataclasses.replace(config, services=services, batch=batch)
    check_config(config)
    warnings = (*unknown_names(merged), *missing_units(arguments, merged), *batch_warnings(config), *access_warnings(config))
    return dataclasses.replace(config, warnings=warnings)


def check_certificates(path: str) -> None:
    """Raise ConfigError if JOBORCH_CA_FILE is set and has no certificates."""
    import ssl

    try:
        if path:
            ssl.create_default_context(cafile=path)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = one_line(error.strerror or str(error)).lower() if isinstance(error, OSError) else one_line(str(error))
        raise ConfigError(f"JOBORCH_CA_FILE is {path!r}: {why}; give a file of certificates in PEM") from error


def check_config(config: Config) -> None:
    """Raise ConfigError for settings that contradict each other."""
    if config.mode == "server" and config.db_path == ":memory:":
        raise ConfigError("DB_PATH is ':memory:': a server must keep its jobs in a file; only a client may forget them")
    beyond = beyond_loopback(config.host)
    if (
        beyond
        and not config.token
        and (config.allow_anonymous or config.mode == "server")
        and not (config.allow_anonymous and config.allow_from)
    ):
        raise ConfigError(
            f"JOBORCH_HOST is {config.host!r}, which others can reach: set JOBORCH_TOKEN (callers must send it), "
            "or JOBORCH_ALLOW_ANONYMOUS=1 and JOBORCH_ALLOW_FROM=ADDRESS,NETWORK (callers from there need none)"
        )


def batch_warnings(config: Config) -> Iterator[str]:
    """Yield a warning if services have settings of a plug-in that this client does not use."""
    given = [setting for options in config.batch.values() for setting in settings_of(BatchOptions) if getattr(options, setting.field)]
    if config.executor == "local" and any(setting.plugin for setting in given):
        yield "settings for a batch system (SERVICE_..._SLURM_..., _DIRAC_...) have no effect: JOBORCH_EXECUTOR is local"


def access_warnings(config: Config) -> Iterator[str]:
    """Yield warnings about who is served without a token."""
    if config.token and (config.allow_anonymous or config.allow_from):
        yield "JOBORCH_ALLOW_ANONYMOUS and JOBORCH_ALLOW_FROM have no effect, because a token is set: every caller must send it"
    elif config.allow_anonymous:
        places = ", ".join(map(str, config.allow_from))
        here = "this user's processes on this machine are served without a token"
        yield "JOBORCH_ALLOW_ANONYMOUS is 1: " + (f"all callers at {places} are served without a token, and {here}" if places else here)
    elif config.allow_from:
        yield "JOBORCH_ALLOW_FROM has no effect: set JOBORCH_ALLOW_ANONYMOUS=1, too"
    if int(config.socket_mode, 8) & 0o077 and not config.socket_file and config.mode == "server":
        yield "JOBORCH_SOCKET_MODE has no effect: others cannot enter the socket's folder; set JOBORCH_SOCKET to a path that they can reach"


def beyond_loopback(hosts: str) -> list[str]:
    """Return the addresses to listen on that other machines can reach."""
    return [host for host in map(str.strip, hosts.split(",")) if host and not is_loopback(host)]


def url_host(host: str) -> str:
    """Return a host as a URL writes it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is loopback."""
    return host in ("localhost", "::1", "[::1]") or bool(re.fullmatch(r"127\.[0-9]+\.[0-9]+\.[0-9]+", host))


def settings_table() -> str:
    """Return the table of settings of docs/reference.md, in Markdown."""
    rows = ["| name | flag | default | meaning |", "|---|---|---|---|"]
    rows += [f"| `{setting.name}` | `{setting.flag}` | {setting.default} | {setting.help} |" for setting in SETTINGS]
    rows += [f"| `SERVICE_<NAME>_{setting.name}` | | {setting.default} | {setting.help} |" for setting in SERVICE_SETTINGS]
    return "\n".join(rows)


# == 41. Weak set-ups ==  A set-up that lets other users in is refused, or gives a warning at every start.


TOKEN_LEAST = 16  # characters; shorter tokens can be guessed
NEW_TOKEN = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))' prints one"


def weak_setups(config: Config) -> Iterator[Finding]:
    """Yield what lets other users in, with the remedy. A start refuses False findings and warns of the others."""
    if os.geteuid() == 0:
        what = "so do its scripts, from which nothing is hidden" if config.mode == "client" else "it does not need that"
        yield Finding(None, f"this {config.mode} runs as root: {what}; run it as a separate user, for example with User= in a systemd unit")
    yield from weak_tokens(config)
    for path, what in secret_files(config):
        remedy = "joborch sets its mode to 0600 at the start; others may know the old token, so remove the file to get a new one"
        made_by_us = config.mode == "client" and what == CLIENT_TOKEN
        yield from examine_secret_file(path, what, remedy if made_by_us else "")
        found = examine_place(os.path.dirname(os.path.abspath(os.path.expanduser(path))), f"{what}'s folder")
        # DIRAC's own program decides where its login is kept: warn only.
        yield from (finding._replace(good=None) if "DIRAC" in what else finding for finding in found)
    yield from DataFolder(config.data_path).weak_spots()
    if config.db_path != ":memory:" and os.path.dirname(os.path.realpath(config.db_path)) != os.path.realpath(config.data_path):
        yield from examine_place(os.path.dirname(os.path.abspath(config.db_path)), "DB_PATH")
        if os.path.exists(config.db_path) and is_strangers(owner := os.stat(config.db_path).st_uid, Path(config.db_path).parent):
            yield Finding(False, f"DB_PATH is {config.db_path!r}, which belongs to {owner_name(owner)}: use your own file")


def weak_tokens(config: Config) -> Iterator[Finding]:
    """Yield tokens that can be guessed, or that other users of this machine can read."""
    shortest = min(map(len, filter(None, config.token.split(","))), default=TOKEN_LEAST)
    if shortest < TOKEN_LEAST:
        where = f", and JOBORCH_HOST={config.host} lets other machines try" if beyond_loopback(config.host) else ""
        how_long = plural(shortest, "character", "characters")
        yield Finding(None, f"JOBORCH_TOKEN has a token of {how_long}{where}: use at least {TOKEN_LEAST}; {NEW_TOKEN}")
    if config.sources.get("JOBORCH_TOKEN", "").startswith("flag"):
        yield Finding(None, "the token was given as --token, which every user of this machine can see with ps: set JOBORCH_TOKEN_FILE")
    for service in config.services.values():
        beyond = not all(is_loopback(host_of(address.upload_url)[1]) for address in service.addresses)
        if beyond and 0 < len(service.token) < TOKEN_LEAST:
            name = f"SERVICE_{service.name.upper()}_TOKEN"
            how_long = plural(len(service.token), "character", "characters")
            yield Finding(None, f"{name} has {how_long}: use at least {TOKEN_LEAST}; {NEW_TOKEN}")


CLIENT_TOKEN = "the client's token file"


def secret_files(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the files with tokens for these settings, each with its name for messages."""
    if config.token_file and config.sources.get("JOBORCH_TOKEN") == "default":
        yield config.token_file, "JOBORCH_TOKEN_FILE"
    for service in config.services.values():
        if service.token_file and f"SERVICE_{service.name.upper()}_TOKEN" not in config.sources:
            yield service.token_file, f"SERVICE_{service.name.upper()}_TOKEN_FILE"
    if config.env_file and any(config.sources.get(name) == "--env-file" for name in token_names(config)):
        yield config.env_file, "--env-file"
    own = client_token_file()
    by_service = any(not service.token for service in config.services.values())
    if own and (by_service if config.mode == "server" else not config.token and not config.allow_anonymous):
        yield str(own), CLIENT_TOKEN
    if config.mode == "client" and config.executor == "dirac":
        yield config.dirac_credentials, "JOBORCH_DIRAC_CREDENTIALS"


def token_names(config: Config) -> list[str]:
    """Return the names of the settings that are tokens."""
    return ["JOBORCH_TOKEN", *(name for name in config.sources if name.startswith("SERVICE_") and name.endswith("_TOKEN"))]


def forgotten_executor(config: Config) -> list[str]:
    """Return a question if a client would run payloads on what looks like the login node of a cluster; else nothing."""
    forgotten = config.executor == "local" and config.sources.get("JOBORCH_EXECUTOR") == "default"
    if not forgotten or shutil.which("sbatch") is None:
        return []
    return ["this machine has sbatch, but payloads would run on it directly: did you mean JOBORCH_EXECUTOR=slurm? (else set local)"]


# == 42. Commands ==  The commands. Each has an example, and its errors name the mistake and the remedy.

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class JsonLines(logging.Formatter):
    """Formats records as one JSON object per line: at, level, message."""

    def format(self, record: logging.LogRecord) -> str:
        said = {"at": rfc3339(record.created), "level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


def set_up_logging(config: Config) -> None:
    """Log to standard error, as text or as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")
    handler.setFormatter(JsonLines() if config.log_format == "json" else plain)
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("waitress").setLevel(logging.WARNING)  # callers that leave are not worth a line


def bound_memory() -> None:
    """Let all threads share two arenas of glibc's malloc(3): by default, each of sixty threads keeps its peak size."""
    m_arena_max = -8
    with contextlib.suppress(AttributeError):  # not in every C library
        libc().mallopt(m_arena_max, 2)


def hide_from_payloads() -> None:
    """Make this process undumpable (prctl(2)): payloads of the same user cannot read its memory, and no core file contains a token."""
    pr_set_dumpable = 4
    if libc().prctl(pr_set_dumpable, 0, 0, 0, 0) != 0:
        log.warning("this process cannot be made undumpable: payloads of the same user may read its token")


def close_at_exec() -> None:
    """Mark all descriptors above stderr close-on-exec: scripts do not get files that our parent left open."""
    close_range, cloexec, last = 436, 4, 2**32 - 1  # close_range(2), of Linux 5.11
    if libc().syscall(close_range, 3, ctypes.c_uint(last), cloexec) != 0:
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2:
                with contextlib.suppress(OSError):  # the descriptor of the listing itself
                    os.set_inheritable(descriptor, False)


def ensure_client_token(config: Config) -> Config:
    """Return the configuration with a token: the one that is set, or one that the first start creates in a file (mode 0600)."""
    if config.token or config.allow_anonymous:
        return config
    path = token_place(config)
    if path is None:
        raise ConfigError(f"JOBORCH_TOKEN is not set and this user has no home folder to store one in: {token_remedy(config)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_mode & 0o077 and path.stat().st_uid == os.geteuid():
            path.chmod(0o600)  # weak_setups has warned about it
        if not path.exists() or not path.read_text(encoding="ascii").strip():
            write_atomic(path, (secrets.token_urlsafe(32) + "\n").encode(), 0o600)
            log.info("created a token for callers in %s", path)
        return dataclasses.replace(config, token=path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise ConfigError(f"the token file {path} cannot be used ({os.strerror(error.errno or 0)}): {token_remedy(config)}") from error


def open_node(config: Config) -> Node:
    """Open the folders, lock and database of one process, and return its node. Raises ConfigError if one of them cannot be used."""
    check_certificates(config.ca_file)
    data = DataFolder(config.data_path)
    data.open()
    crash_point("start.locked")
    try:
        os.makedirs(os.path.dirname(config.db_path) or ".", exist_ok=True)
        data.lock_database(config.db_path)
    except OSError as error:
        raise ConfigError(f"DB_PATH is {config.db_path!r}: {os.strerror(error.errno or 0)}") from error
    if config.mode == "server":
        if decided_restore(config.db_path):
            log.warning("a restore of the database was interrupted and is completed now; the replaced database is kept next to it")
        finish_restore(config.db_path, data)
    store = Store(config.db_path, config.mode)
    data.keep_reserve()
    store.make_room = data.drop_reserve
    crash_point("start.opened")
    if config.mode == "client":
        client = Client(config, store, data)
        check_executor(client)
        recover_payloads(client)
        return client
    unclaimed = data.set_aside(lambda name: False) if store.is_new else None
    if unclaimed:
        log.warning("the database is new, but the data folder has files of jobs: they are kept in %s", unclaimed)
    server = Server(config, store, data)
    server.loops = make_server_loops(server)
    for job in store.jobs(CUT_OFF_SENDING):  # the client is known, but not whether the job arrived there
        store.move(job, Status.UNKNOWN, Reason.SERVER_RESTARTED.format(client=job.client))
        crash_point("start.asked")
    return server


IGNORED_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # a closed terminal, a reload, a rotated log: they must not stop us


def import_what_will_be_needed(config: Config) -> None:
    """Import everything before listening: a newer release may replace these files while the process runs."""
    for name in ["difflib", "multipart", "uuid", *(["tarfile", "requests"] if config.executor == "dirac" else [])]:
        importlib.import_module(name)
    if config.mode == "server":
        load_plugin("uploads")
    if config.compat == "2.2" or any(service.peer == "2.2" for service in config.services.values()):
        load_plugin("compat22")


def serve(config: Config) -> int:
    """Run a server or client until INT or TERM. A client's payloads keep running, and the next start recovers them."""
    hide_from_payloads()
    close_at_exec()
    set_up_logging(config)
    bound_memory()
    if Program.archive and Program.archive[2]:
        log.info("starts are slow because joborch.pyz has no copy in the cache folder: %s", Program.archive[2])
    warn_of_weak_setups(config)
    if config.mode == "client":
        log.debug("variables that scripts do not get: %s", ", ".join(left_out(os.environ, config.pass_env)) or "none")
        config = ensure_client_token(config)
    for name in token_names(config):  # programs started later do not need them
        os.environ.pop(name, None)
    raise_file_limit()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, *IGNORED_SIGNALS):
        signal.signal(number, lambda *_: None)  # the pipe passes the number to listen_for_signals
    import_what_will_be_needed(config)
    node = open_node(config)
    http_server = make_http_server(node, make_app(node))
    node.start()
    threading.Thread(target=http_server.run, name="http", daemon=True).start()
    threading.Thread(target=sweep, args=(node,), name="sweep", daemon=True).start()
    greet(node, http_server)
    if isinstance(node, Client) and node.executor.is_batch:
        threading.Thread(target=warn_of_problems, args=(node,), name="examine", daemon=True).start()
    with contextlib.suppress(AttributeError):
        libc().malloc_trim(0)  # compiling this module leaves about 20 MB of free memory behind
    try:
        listen_for_signals(node, wake_read)
    finally:
        node.stop()
        node.store.close()
        remove_socket_file(http_server)
    log.info("%s stopped", config.mode)
    return EXIT_DONE


def listening_at(http_server: Any) -> list[str]:
    """Return the URLs of a server, and the path of its Unix socket."""
    places = []
    for listener in list(http_server._map.values()):
        if hasattr(listener, "effective_port"):
            host, port = listener.effective_host, listener.effective_port
            places.append(str(port) if listener.family == socket.AF_UNIX else f"http://{url_host(host)}:{port}")
    return places


def greet(node: Node, http_server: Any) -> None:
    """Log where the process listens, and its services or slots."""
    config = node.config
    places = " and ".join(listening_at(http_server))
    log.info("joborch %s %s listens on %s (data in %s)", __version__, config.mode, places, config.data_path)
    if isinstance(node, Server):
        if not any(name.startswith("SERVICE_") for name in config.sources):
            log.info("no SERVICE_* is set: a client at http://127.0.0.1:9000 serves the service example")
        for service in node.services.values():
            log.info(
                "service %s: %s (per user %d, in all %d)",
                service.name,
                ", ".join(address.name for address in service.addresses),
                service.runs_per_user,
                service.max_runs,
            )
    else:
        log.info("runs up to %d payloads at once with the %s executor", config.slots, config.executor)
        for text in forgotten_executor(config):
            log.warning("%s", text)


def warn_of_weak_setups(config: Config) -> None:
    """Log the configuration's warnings and whatever lets other users in. Raises ConfigError if it is too dangerous to start."""
    for warning in config.warnings:
        log.warning("%s", warning)
    for finding in weak_setups(config):
        if finding.good is False:
            raise ConfigError(finding.text)
        log.warning("%s", finding.text)


def warn_of_problems(client: Client) -> None:
    """Log what is wrong with a client's batch system before the first job hits it."""
    for finding in client.executor.examine():
        if finding.good is not True:
            log.warning("%s", finding.text)


def listen_for_signals(node: Node, wake_read: int) -> None:
    """Wait for INT or TERM. CHLD wakes the runner; IGNORED_SIGNALS are logged."""
    while True:
        select.select([wake_read], [], [])
        numbers = os.read(wake_read, 512)
        if signal.SIGINT in numbers or signal.SIGTERM in numbers:
            return
        for number in set(numbers).intersection(IGNORED_SIGNALS):
            log.info("%s is ignored: settings are read only at the start; restart joborch to read them again", signal_name(number))
        if not (isinstance(node, Client) and node.local and node.local.is_end_awaited()):
            node.wake("run")


def bundled_packages() -> dict[str, str]:
    """Return the versions of the packages in use: those in joborch.pyz, or else the installed ones."""
    try:
        return dict(json.loads(own_file("bundled.json")))
    except OSError:
        pass  # it runs from a checkout, or was installed with pip
    from importlib import metadata

    found = {}
    for name in ("bottle", "waitress", "requests", "platformdirs", "multipart"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def command_version(as_json: bool) -> int:
    """Print the versions of joborch and everything it uses."""
    import platform

    said = {"joborch": __version__, "python": platform.python_version(), "sqlite": sqlite3.sqlite_version, **bundled_packages()}
    print(json.dumps(said) if as_json else "\n".join(f"{name} {version}" for name, version in said.items()))
    return EXIT_DONE


# -- the command line --


def make_parser(argv: Sequence[str] | None = None) -> Any:
    """Return the parser of the command line, with a flag for each setting of the commands that run here.

    Commands that `argv` lacks get no flags: adding them all would slow down every start.
    """
    parser, words = load_plugin("commands").make_parser(__version__)
    for name, word in words.items():
        if argv is not None and name not in argv:
            continue
        if name in ("backup", "restore"):
            word.add_argument("file", metavar="FILE", help="the backup")
        if name in ("server", "client", "config", "doctor", "backup", "restore"):
            add_setting_flags(word, name)
        if name in ("config", "doctor"):
            word.add_argument("mode", nargs="?", choices=("server", "client"), default="server", help="which settings (default: server)")
        if name in ("config", "doctor", "version"):
            word.add_argument("--json", action="store_true", help="print JSON")
        if name == "demo":
            word.add_argument("--keep", action="store_true", help="leave both running")
    return parser


def add_setting_flags(word: argparse.ArgumentParser, mode: str) -> None:
    """Add the flags of a command's settings, from SETTINGS."""
    word.add_argument("--env-file", metavar="FILE", help="read NAME=VALUE lines from FILE; variables of the environment take precedence")
    for setting in SETTINGS:
        storage = mode in ("backup", "restore") and setting.field in ("data_path", "db_path")
        if storage or mode in ("config", "doctor") or mode in setting.modes.split():
            default = "" if not setting.default or "(default" in setting.help else f" (default: {setting.default})"
            text = f"{setting.help}{default} [{setting.name}]".replace("%", "%%")
            flag: Any = word.add_argument(setting.flag, dest=setting.field, metavar="VALUE", help=text)
            flag.example = "1" if setting.read is read_switch else ""  # for the error if the value is missing


def run_command(arguments: argparse.Namespace) -> int:
    """Run a command; return the exit status."""
    if arguments.command == "version":
        return command_version(arguments.json)
    if arguments.command == "demo":
        return int(load_plugin("admin").command_demo(arguments.keep))
    mode = arguments.mode if arguments.command in ("config", "doctor") else "client" if arguments.command == "client" else "server"
    config = load_config(mode, vars(arguments), os.environ)
    if arguments.command in ("server", "client"):
        return serve(config)
    admin = load_plugin("admin")
    if arguments.command in ("backup", "restore"):
        work = admin.command_backup if arguments.command == "backup" else admin.command_restore
        return int(work(config, arguments.file))
    work = admin.command_doctor if arguments.command == "doctor" else admin.command_config
    return int(work(config, arguments.json))


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line. Exits with one line on stderr if it is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(argv)
    arguments: argparse.Namespace
    arguments, rest = parser.parse_known_args(argv)
    if not arguments.command:
        if rest:
            parser.unknown(rest[0], ("--version", "--help"))
    elif rest:
        (words,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        word: Any = words.choices[arguments.command]
        word.unknown(rest[0], word._option_string_actions)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see `joborch --help`."""
    if argv is None:  # as a program; before all else, because the environment may contain a token
        hide_from_payloads()
    commands = load_plugin("commands")
    if argv is None:
        commands.use_utf8()
    words = sys.argv[1:] if argv is None else argv
    if commands.takes(words):
        return int(commands.main(words))
    try:
        try:
            return run_command(parse_command(argv))
        finally:
            sys.stdout.flush()  # here, where an error is still caught
    except BrokenPipeError:  # as in `joborch config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ConfigError as error:
        print(f"joborch: {error}", file=sys.stderr)
        return EXIT_USAGE
    except JoborchError as error:
        print(f"joborch: {error}", file=sys.stderr)
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        remedy = "run joborch.pyz, which has it, or pip install -r requirements.lock"
        print(f"joborch: the package {error.name} is missing: {remedy}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
