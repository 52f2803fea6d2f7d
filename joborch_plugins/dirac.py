"""Executor `dirac`: payloads run as jobs of a grid. One query per tick covers all, and the exit file outranks DIRAC's report."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shlex
import shutil
import ssl
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable, cast
from urllib.parse import quote, urlencode

if TYPE_CHECKING:  # imported where it is used, because it is slow
    import requests


from joborch import (
    CHUNK_BYTES,
    CLOCK_TOLERANCE_S,
    CONNECT_TIMEOUT_S,
    IDLE_LOOK_S,
    JSON_TYPE,
    KIB,
    LOOK_AGAIN_S,
    MIB,
    NO_LOCKS,
    READ_TIMEOUT_S,
    BackendUnavailable,
    Backoff,
    BatchOptions,
    CannotRun,
    Cause,
    Clock,
    Config,
    ConfigError,
    DataFolder,
    Finding,
    Job,
    JoborchError,
    Outcome,
    Reason,
    ResultLimits,
    StillRunning,
    T,
    below,
    crash_point,
    discard,
    file_chunks,
    format_duration,
    free_bytes,
    fsync_path,
    helper_environment,
    host_of,
    lock_trouble,
    log,
    node_environment,
    one_line,
    parse_json,
    read_exit,
    read_small_file,
    sync_file_system,
    walk,
    wrapper_text,
    write_atomic,
)

# == Grid files ==  The job descriptions for a grid, and archives that are unpacked only inside their folder.

SANDBOX_LIMIT_BYTES = 100 * MIB  # DiracX accepts no larger archive
OUTPUT_LIMIT_BYTES = 2 * SANDBOX_LIMIT_BYTES  # limit of a download, if a site allows more than DiracX's default
DIRAC_CLIENT_ID = "myDIRACClientID"  # of the official commands, whose login is used
REFRESH_AHEAD_S = 60.0
LOGIN_LOCK_S = 20.0  # the official client locks the credentials while it refreshes them
LOGIN_ROOM_BYTES = 64 * KIB  # reserved on the disk before a refresh, so that the new token can be stored
TROUBLES_OF_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
SEARCH_LIMIT = 5_000  # jobs in one query; DiracX pages beyond 10,000
SUBMIT_SETTLE_S = 90.0  # how long a submission may still be in progress after its answer was lost,
RESTART_SETTLE_S = 10.0  # and, if a crash of the client interrupted it, after the client's start
JUDGES = 3  # outputs that are fetched at once
FETCH_PATIENCE_S = 3600.0  # how long fetching is repeated if outputs are damaged or do not fit on the disk
FORGET_S = 60.0  # a job is forgotten if it was not polled for this long
LAUNCHER, OUTPUT_ARCHIVE = "joborch.sh", "joborch-output.tar.gz"
NOT_BEGUN = frozenset(("Submitting", "Received", "Checking", "Staging", "Scouting", "Waiting", "Rescheduled"))
WITH_PILOT = frozenset(("Matched", "Running", "Stalled", "Completing"))
GRID_ENDED = frozenset(("Done", "Completed", "Failed", "Killed"))
# What a pilot reports of a job that was killed: its process is gone (the status itself never changes again).
PILOT_IS_DONE = re.compile(
    r"Received Kill signal|Execution Complete|Application (Finished|thread)|Output Sandbox|Pending Requests|stalled: pilot", re.IGNORECASE
)
GRID_LIMIT = re.compile(r"(cpu|memory|wall.?clock|time) limit|maximum wall clock|time left", re.IGNORECASE)
SCRIPT_FAILED = re.compile(r"Application Finished|Execution Complete|Uploading|Uploaded|Pending Requests", re.IGNORECASE)
JDL_TEXT = re.compile(r"[A-Za-z0-9_.:@/+=~|-]+")  # DIRAC drops blanks in lists, and replaces %j
JDL_STATEMENT = re.compile(r"\s*([A-Za-z][A-Za-z0-9_.]*)\s*=\s*([^\[\]]*[^\[\]\s])\s*")
OWN_JDL = re.compile(
    r"jobname|executable|arguments|std(output|error)|(input|output)sandbox|(max)?numberofprocessors|minram|cputime|site|tags|platform"
    r"|owner|ownergroup|virtualorganization|jobid|parameter.*",
    re.IGNORECASE,
)
LAUNCHER_TEXT = r"""#!/bin/bash
# joborch: runs the wrapper on a worker node and packs the payload's files.
here=$PWD
mkdir -p payload
@EXPORTS@
bash wrapper.sh "$here/payload" @ARGUMENTS@ &
wrapper=$!
pass_on() {                                        # to the wrapper and to run.sh, which has a separate process group
    for child in $(cat /proc/$wrapper/task/$wrapper/children); do kill -TERM -- -$child; done
    kill -TERM $wrapper
}
trap 'pass_on 2>/dev/null' TERM INT HUP
while :; do
    wait $wrapper; status=$?
    kill -0 $wrapper 2>/dev/null || break
done
chmod -R u+rwX payload
(cd payload && pwd && pwd -P) >payload/place       # to recognise absolute links that stay inside
tar -czf .packing -C payload --exclude=./tmp .
[ $? -le 1 ] && mv .packing @ARCHIVE@              # 1: a file changed while it was read
[ $status -eq 0 ]                                  # never the script's status: DIRAC reschedules a job that exits with 222
"""


class SandboxTooLarge(JoborchError):
    """An output sandbox exceeds a limit of results; the text says which."""


class BadSandbox(JoborchError):
    """An output sandbox is unusable, and fetching it again will not help."""


class AnswerLost(BackendUnavailable):
    """No usable answer came, but DIRAC may have carried out the request."""


class DiracRefusal(JoborchError):
    """DIRAC refuses a request. `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def jdl_text(text: str, what: str) -> str:
    """Return `text` quoted for JDL, or raise ConfigError: JDL has no escapes, and DIRAC splits at `;` and `[` even within quotes."""
    if not JDL_TEXT.fullmatch(text):
        raise ConfigError(f"{what} is {one_line(text, 80)!r}: JDL can only have ASCII letters, digits and _.:@/+=~|-")
    return f'"{text}"'


def check_jdl(lines: str) -> list[str]:
    """Return the statements of the site's JDL lines. Raises ConfigError for invalid ones, and for those that joborch sets itself."""
    statements = []
    for text in filter(str.strip, lines.split(";")):
        match = JDL_STATEMENT.fullmatch(text)
        if not match or text.count('"') % 2 or text.count("{") != text.count("}"):
            raise ConfigError(f"DIRAC_JDL has {one_line(text, 80)!r}: write NAME = VALUE; without brackets, ; or escapes in VALUE")
        if OWN_JDL.fullmatch(match[1]):
            raise ConfigError(f"DIRAC_JDL sets {match[1]}: remove it; joborch sets it, or it would turn one job into several")
        statements.append(f"{match[1]} = {' '.join(match[2].split())}")
    return statements


def jdl_list(text: str, what: str) -> str:
    """Return names separated by commas as a list of JDL, or an empty text."""
    names = [jdl_text(name.strip(), what) for name in text.split(",") if name.strip()]
    return "{" + ", ".join(names) + "}" if names else ""


def check_dirac_options(options: BatchOptions) -> None:
    """Raise ConfigError that names the setting if JDL cannot express one."""
    build_jdl(None, options, "check")


def job_name(mark: str) -> str:
    """Return the name of an attempt in DIRAC: its mark, or a hash of it if the mark is unsuitable."""
    return mark if re.fullmatch(r"[A-Za-z0-9.-]{1,128}", mark) else hashlib.sha256(os.fsencode(mark)).hexdigest()


def build_jdl(job: Job | None, options: BatchOptions, pfn: str) -> str:
    """Return the JDL of an attempt whose input sandbox is `pfn`. It has no text from users; that is all inside the sandbox."""
    cpus, memory, timeout = (job.cpus, job.memory, job.timeout) if job else (1, None, None)
    cpu_time_s = options.dirac_cpu_time_s or (timeout and timeout * cpus)
    tags = [tag for tag in map(str.strip, options.dirac_tags.split(",")) if tag]
    tags += ["GPU"] if job and job.gpus and "GPU" not in tags else []
    values = {
        "JobName": jdl_text(job_name(job.mark) if job else "check", "the mark"),
        "Executable": f'"{LAUNCHER}"',
        "StdOutput": '"std.out"',
        "StdError": '"std.err"',
        "InputSandbox": "{" + jdl_text(pfn, "the input sandbox") + "}",
        "OutputSandbox": f'{{"{OUTPUT_ARCHIVE}", "std.out", "std.err"}}',
        "NumberOfProcessors": str(cpus) if cpus > 1 else "",
        "MaxNumberOfProcessors": str(cpus) if cpus > 1 else "",
        "MinRAM": str(memory or ""),  # MiB
        "CPUTime": str(math.ceil(cpu_time_s)) if cpu_time_s else "",
        "Site": jdl_list(options.dirac_site, "DIRAC_SITE"),
        "Tags": jdl_list(",".join(tags), "DIRAC_TAGS"),
        "Platform": jdl_text(options.dirac_platform, "DIRAC_PLATFORM") if options.dirac_platform else "",
    }
    statements = [f"{name} = {value}" for name, value in values.items() if value] + check_jdl(options.dirac_jdl)
    return "[\n" + "".join(f"{statement};\n" for statement in statements) + "]"


def launcher(job: Job, kill_grace_s: float, prelude: str = "") -> bytes:
    """Return the script that a pilot runs."""
    words = node_environment(job, {}, prelude)
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in words.items())
    arguments = f"{job.attempt} {job.timeout:.3f} {kill_grace_s:.3f}" if job.timeout else str(job.attempt)
    text = LAUNCHER_TEXT.replace("@ARGUMENTS@", arguments).replace("@ARCHIVE@", OUTPUT_ARCHIVE)
    return os.fsencode(text.replace("@EXPORTS@", exports))  # last, because a value may look like a placeholder


class Bounded:
    """A file that computes its SHA-256 while written. Raises CannotRun above SANDBOX_LIMIT_BYTES."""

    def __init__(self, target: IO[bytes]) -> None:
        self.target, self.size, self.digest = target, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        if self.size > SANDBOX_LIMIT_BYTES:
            limit = SANDBOX_LIMIT_BYTES // MIB
            raise CannotRun(f"its input files are too large for DIRAC: at most {limit} MiB, compressed; download large data in run.sh")
        self.digest.update(data)
        return self.target.write(data)


def pack_inputs(folder: Path, scripts: Mapping[str, bytes], target: IO[bytes]) -> Bounded:
    """Write the input sandbox of an attempt: scripts by name, and payload/work. Raises CannotRun if it becomes too large."""
    import tarfile

    bounded, work = Bounded(target), folder / "work"
    with tarfile.open(
        fileobj=cast("IO[bytes]", bounded), mode="w|bz2", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for name, data in scripts.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
        for here, folders, names in walk(os.fsencode(work)):
            for path in [here] * (here == os.fsencode(work)) + [os.path.join(here, name) for name in (*folders, *names)]:
                archive.add(
                    os.fsdecode(path), "payload/work" + os.fsdecode(path[len(os.fsencode(work)) :]), recursive=False, filter=nobodys
                )
    return bounded


def nobodys(member: Any) -> Any:
    """Return a member of an archive without its owner, so that the same files give the same archive."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def careful_members() -> Any:
    """Return a class of archive members that refuses what tarfile would read into memory at once: endless names and sparse maps."""
    import tarfile

    class Member(tarfile.TarInfo):
        def _proc_member(self, archive: Any) -> Any:  # all headers pass through it, from Python 3.9 to 3.13
            extension = self.type in (*tarfile.GNU_TYPES[:2], tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
            if self.type == tarfile.GNUTYPE_SPARSE or (extension and self.size > MIB):
                raise tarfile.ReadError("a header is too large")
            return cast(Any, super())._proc_member(archive)

        def _proc_gnusparse_10(self, *_: Any) -> None:
            raise tarfile.ReadError("a sparse map")

    return Member


UNPACKED = re.compile(r"work|stdout|stderr|times|exit\.json|started\.[0-9]+")


def safe_parts(name: str) -> list[str]:
    """Return the parts of a member's path; empty if it is not part of the payload. Raises BadSandbox if it leaves the folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise BadSandbox(f"it contains {one_line(name, 80)!r}, which leads out of its folder")
    return parts if parts and UNPACKED.fullmatch(parts[0]) else []


def unpack(archive: Any, target: Path, spare_bytes: int, limits: ResultLimits | None = None) -> list[str]:
    """Unpack a tar archive (tarfile.TarFile, read as a stream) below `target`. Return the names of omitted members.

    Links are created last, so no file is written through a link. Links that lead out of `target`, devices and FIFOs are
    omitted. Raises BadSandbox for a path that leaves the folder, OSError ENOSPC if less than `spare_bytes` would stay free,
    and SandboxTooLarge if it exceeds the limits; then the part that fits has been unpacked.
    """
    links: list[tuple[str, Any]] = []
    places: list[bytes] = []  # the paths of the folder where it was packed
    limits = limits or ResultLimits()
    left_out, root, size, count, too_much = [], os.path.realpath(target), 0, 0, ""
    while (member := archive.next()) is not None:
        archive.members.clear()  # or the list would fill the memory
        parts = safe_parts(member.name)
        path = os.path.join(root, *parts)
        if not parts:
            if os.path.normpath(member.name) == "place" and member.isreg():
                places = archive.extractfile(member).read(16 * KIB).split(b"\n")[:2]
            continue
        size, count = size + member.size, count + 1
        too_much = limits.broken_by(size, count if count > limits.entries else 0)  # a result's files are counted again when it is packed
        if too_much:
            break
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        if member.isdir():
            os.makedirs(path, 0o700, exist_ok=True)
        elif member.isreg():
            if member.size + spare_bytes > free_bytes(root):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            write_member(archive.extractfile(member), path, member)
        elif member.issym() or member.islnk():
            links.append((path, member))
        else:
            left_out.append(member.name)
    left_out += make_links(root, links, [place for place in places if place.startswith(b"/")])
    if too_much:
        raise SandboxTooLarge(too_much)
    return left_out


def write_member(source: IO[bytes], path: str, member: Any) -> None:
    """Write one file of an archive. It replaces an earlier one with the same name."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)
        os.fchmod(file.fileno(), member.mode & 0o777 | 0o600)
    with contextlib.suppress(OverflowError, ValueError):
        os.utime(path, (member.mtime, member.mtime))


def make_links(root: str, links: Sequence[tuple[str, Any]], places: Sequence[bytes] = ()) -> list[str]:
    """Create the links of an archive whose files and folders exist. Return the names of omitted links.

    Absolute links below `places`, the paths of `root` where it was packed, become relative.
    """
    for path, member in links:
        inner = below(places, os.fsencode(member.linkname)) if member.issym() else None
        if inner is not None:
            member.linkname = os.path.relpath(root, os.path.dirname(path)) + "/" + os.fsdecode(inner)
    left_out = [member.name for path, member in links if not make_link(root, path, member)]
    for path, member in links:  # afterwards, because a link may lead through a later one
        end = os.path.realpath(path)
        if os.path.islink(path) and end != root and not end.startswith(root + "/"):
            os.unlink(path)
            left_out.append(member.name)
    return left_out


def make_link(root: str, path: str, member: Any) -> bool:
    """Create one link. Return False if a hard link's target is not a file of the archive, or if the path exists."""
    try:
        if member.issym():
            os.symlink(member.linkname, path)
            return True
        source = os.path.join(root, *safe_parts(member.linkname))
        if source == root or os.path.realpath(source) != source or not os.path.isfile(source):
            return False
        os.link(source, path, follow_symlinks=False)
    except (OSError, ValueError, BadSandbox):
        return False
    return True


# == DiracX ==  A person's login, and calls to the service. A new token is written to the disk before it is used.

ROW = ("JobID", "JobName", "Owner", "Status", "MinorStatus", "RescheduleCounter", "LastUpdateTime", "HeartBeatTime", "StartExecTime")
Row = dict[str, Any]


def claims(token: str) -> dict[str, Any]:
    """Return the claims of a JSON web token (RFC 7519) without verifying them; empty if it is not one."""
    try:
        middle = token.split(".")[1]
        said = parse_json(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    except (ValueError, IndexError):
        return {}
    return said if isinstance(said, dict) else {}


def at_clock(wall: float) -> str:
    """Return a time as 14:02, or with its date if that is not today."""
    local = time.localtime(wall)
    return time.strftime("%H:%M" if local[:3] == time.localtime()[:3] else "%Y-%m-%d %H:%M", local)


def dirac_time(text: Any) -> float:
    """Convert a time of DiracX to seconds since 1970; 0 if there is none."""
    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return 0.0
    return moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp()


class DiracLogin:
    """The login that `dirac login` stored in a file. Its access token is refreshed before it expires, under a lock.

    The refresh token changes with each use, and reusing an old one revokes the whole login, so the new one is written to the
    disk before it is used. The official client locks the file and writes in place. So this class locks the same file, and after
    its rename it also writes the new content to the old inode, whose lock that client may be waiting for.
    """

    def __init__(self, path: str, refresh: Callable[[str], tuple[int, Any]], clock: Clock) -> None:
        """`refresh` sends a refresh token and returns DiracX's status and answer, or raises BackendUnavailable."""
        self.path, self.refresh, self.clock = Path(os.path.realpath(os.path.expanduser(path))), refresh, clock
        self.lock = threading.Lock()
        self.refused, self.refused_at = "", 0.0  # the refresh token that DiracX refused: the login has expired for good

    def read(self) -> dict[str, Any]:
        """Return the content of the file. Raises BackendUnavailable if there is no login."""
        try:
            return self.parse(read_small_file(self.path))
        except OSError as error:
            raise BackendUnavailable(
                f"DIRAC: {self.path} cannot be read ({os.strerror(error.errno or 0)}): log in with `dirac login`"
            ) from error
        except ValueError:
            raise BackendUnavailable(f"DIRAC: {self.path} contains no login: log in with `dirac login`") from None

    def parse(self, text: str) -> dict[str, Any]:
        try:
            said = parse_json(text)
            good = (
                isinstance(said["access_token"], str)
                and isinstance(said["refresh_token"], str)
                and type(said["expires_on"]) in (int, float)
            )
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise BackendUnavailable(f"DIRAC: {self.path} contains no login: log in with `dirac login`")
        return cast("dict[str, Any]", said)

    def valid_until(self) -> float | None:
        """Return when the refresh token expires (seconds since 1970; then a person must log in again), or None if unknown."""
        try:
            said = self.read()
        except BackendUnavailable:
            return None
        until = said["expires_on"] if said["refresh_token"] == self.refused else claims(said["refresh_token"]).get("exp")
        return float(until) if isinstance(until, (int, float)) else None

    def ended(self) -> str:
        """Return why the login has expired for good and what to do, or an empty text."""
        try:
            said = self.read()
        except BackendUnavailable as error:
            return str(error)
        now, until = self.clock.wall(), claims(said["refresh_token"]).get("exp")
        until = float(until) if isinstance(until, (int, float)) else None
        refused, over = said["refresh_token"] == self.refused, until is not None and until <= now
        if said["expires_on"] > now or not (refused or over):
            return ""
        when = min(self.refused_at, until or self.refused_at) if refused else until or now
        valid = f" (its refresh token was valid until {at_clock(until)})" if until else ""
        again = "log in again with `dirac login`; then waiting jobs continue by themselves"
        return f"DIRAC: the login expired at {at_clock(when)}{valid}: {again}"

    def owner(self) -> str:
        """Return who is logged in, as DIRAC names the owner of a job. Raises BackendUnavailable if the token does not say."""
        name = claims(self.read()["access_token"]).get("preferred_username")
        if not name or not isinstance(name, str):
            raise BackendUnavailable(f"DIRAC: the token in {self.path} does not say whose it is: log in again with `dirac login`")
        return str(name)

    def token(self, refused: str = "") -> str:
        """Return an access token that stays valid for a while and is not `refused`. Raises BackendUnavailable if there is none."""
        with self.lock:
            said = self.read()
            if self.lasts(said, refused):
                return str(said["access_token"])
            return str(self.renewed(refused)["access_token"])

    def lasts(self, said: Mapping[str, Any], refused: str) -> bool:
        """Tell whether an access token can still be used. If it can no longer be refreshed, it is used until it expires."""
        ahead_s = 0.0 if said["refresh_token"] == self.refused else REFRESH_AHEAD_S
        return bool(said["access_token"] != refused and said["expires_on"] > self.clock.wall() + ahead_s)

    def renewed(self, refused: str) -> dict[str, Any]:
        """Return the login after a refresh, by this process or by another one that had the lock before."""
        with self.locked() as file:
            said = self.parse(file.read())
            if self.lasts(said, refused):
                return said
            if self.ended():
                raise BackendUnavailable(self.ended())
            if said["refresh_token"] == self.refused:
                raise BackendUnavailable("DIRAC refuses both tokens of this login: log in again with `dirac login`")
            return self.refreshed(said, file)

    def refreshed(self, said: Mapping[str, Any], file: IO[str]) -> dict[str, Any]:
        """Refresh the login and store it. Its file is created before the old token is sent."""
        temporary = self.path.with_name(f".{self.path.name}.joborch")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8") as target:
                os.posix_fallocate(target.fileno(), 0, LOGIN_ROOM_BYTES)
                os.fchmod(target.fileno(), 0o600)
                status, answer = self.refresh(said["refresh_token"])
                if status in (400, 401):
                    self.refused, self.refused_at = said["refresh_token"], self.clock.wall()
                    if said["expires_on"] > self.clock.wall():
                        return dict(said)
                    raise BackendUnavailable(self.ended())
                crash_point("dirac.refreshed")
                new = {name: answer[name] for name in ("access_token", "refresh_token")}
                new["expires_on"] = int(self.clock.wall() + answer["expires_in"]) - 15  # as the official client counts
                target.write(json.dumps(new))
                target.flush()
                target.truncate()
                os.fsync(target.fileno())
            os.rename(temporary, self.path)
            fsync_path(self.path.parent)
        except (OSError, KeyError, TypeError) as error:
            raise BackendUnavailable(f"DIRAC: the login could not be refreshed: {one_line(repr(error))}") from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        try:
            file.seek(0)
            file.write(json.dumps(new))
            file.truncate()
            file.flush()
        except OSError as error:  # the new file is in place; only a program that has the old one open misses it
            log.warning("DIRAC: %s: %s", self.path, os.strerror(error.errno or 0))
        return new

    @contextlib.contextmanager
    def locked(self) -> Iterator[IO[str]]:
        """Hold the lock of the file that is at the path now. Raises BackendUnavailable if another process holds it too long."""
        deadline, file = self.clock.monotonic() + LOGIN_LOCK_S, self.lock_once()
        while file is None:
            if self.clock.monotonic() > deadline:
                raise BackendUnavailable(f"DIRAC: another program holds the lock of {self.path}")
            time.sleep(0.05)
            file = self.lock_once()
        with file:
            yield file

    def lock_once(self) -> IO[str] | None:
        """Return the locked file, or None if another process has the lock or has replaced the file."""
        try:
            file = open(self.path, "r+", encoding="utf-8")  # noqa: SIM115 - closed by the caller
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_ino == os.stat(self.path).st_ino:
                    return file
            except BlockingIOError:
                pass
            file.close()
        except OSError as error:
            trouble = lock_trouble(error) if error.errno in NO_LOCKS else os.strerror(error.errno or 0)
            raise BackendUnavailable(f"DIRAC: {self.path} cannot be used: {trouble}") from error
        return None


class DiracService:
    """DiracX's REST API. Every call has time-outs and a new connection: the service may reset a kept one after an error."""

    def __init__(self, url: str, credentials: str, clock: Clock) -> None:
        self.url = url.rstrip("/")
        self.login = DiracLogin(credentials, self.refresh, clock)

    @functools.cached_property
    def session(self) -> requests.Session:
        """The session of all calls. It ignores proxies, passwords and certificates in the environment."""
        import requests

        session, trusted = requests.Session(), ssl.get_default_verify_paths()
        session.trust_env, session.verify = False, trusted.cafile or trusted.capath or True  # of this machine
        session.headers.update({"Connection": "close", "Accept-Encoding": "identity"})
        return session

    def send(
        self, method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None, stream: bool = False
    ) -> requests.Response:
        """Return the answer to one request, whatever its status. Raises BackendUnavailable, or AnswerLost if it may have arrived."""
        timeout = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        try:
            return self.session.request(method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False, stream=stream)
        except (OSError, ValueError) as error:  # the errors of requests are OSErrors
            cause = getattr(error.args[0] if error.args else None, "reason", None) or error
            text = re.sub(r"<[^>]*>:? ?", "", str(cause))  # without object addresses, which would make each reason a new one
            unheard = type(cause).__name__ in ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError")
            kind = BackendUnavailable if unheard else AnswerLost
            raise kind(f"DIRAC: {host_of(url)[0]} does not answer: {one_line(text, 150)}") from error

    def refresh(self, token: str) -> tuple[int, Any]:
        """Send a refresh token; return the status and the answer. Raises BackendUnavailable unless it is accepted or refused."""
        form = urlencode({"grant_type": "refresh_token", "client_id": DIRAC_CLIENT_ID, "refresh_token": token})
        answer = self.send("POST", f"{self.url}/api/auth/token", form, {"Content-Type": "application/x-www-form-urlencoded"})
        return answer.status_code, {} if answer.status_code in (400, 401) else self.meant(answer)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the answer to an API call. Raises DiracRefusal if DIRAC refuses, BackendUnavailable if a retry may help."""
        token = self.login.token()
        text = None if body is None else json.dumps(body).encode()
        for _ in range(2):
            answer = self.send(method, self.url + path, text, {"Authorization": f"Bearer {token}", "Content-Type": JSON_TYPE})
            if answer.status_code != 401:
                break
            token = self.login.token(refused=token)
        return self.meant(answer)

    def meant(self, answer: requests.Response) -> Any:
        """Return the content of an answer, or raise DiracRefusal, BackendUnavailable or AnswerLost."""
        said, status, is_json = None, answer.status_code, True
        try:
            said = parse_json(answer.content)
        except ValueError:
            is_json = False
        if status in (200, 201, 206) and is_json:
            return said
        detail = said.get("detail") if isinstance(said, dict) else None
        text = f"DIRAC answers {status}: {one_line(str(detail or answer.reason), 200)}"
        if status in (400, 403, 413, 422):
            raise DiracRefusal(status, text)
        raise BackendUnavailable(text) if status in (401, 429, 503) else AnswerLost(text)

    def search(self, owner: str, parameter: str, values: Sequence[Any]) -> list[Row]:
        """Return the rows of an owner's jobs with one of these values, without visible jobs of other owners."""
        rows: list[Row] = []
        for first in range(0, len(values), SEARCH_LIMIT):
            wanted = {"parameter": parameter, "operator": "in", "values": list(values[first : first + SEARCH_LIMIT])}
            ours = {"parameter": "Owner", "operator": "eq", "value": owner}
            body = {"parameters": list(ROW), "search": [wanted, ours], "sort": [{"parameter": "JobID", "direction": "asc"}]}
            found = self.call("POST", "/api/jobs/search?per_page=10000", body)
            whole = [{name: row[name] for name in ROW} for row in found]
            rows += [row for row in whole if row["Owner"] == owner and row["Status"] != "Deleted"]
        return rows

    def upload(self, file: IO[bytes], size: int, digest: str) -> str:
        """Upload an input sandbox to DIRAC, unless it has it already, and return its pfn."""
        request = {"checksum_algorithm": "sha256", "checksum": digest, "size": size, "format": "tar.bz2"}
        said = self.call("POST", "/api/jobs/sandbox", request)
        if said.get("url"):
            boundary = secrets.token_hex(16)
            head = "".join(
                f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                for name, value in said["fields"].items()
            )
            head += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="sandbox"\r\n\r\n'
            tail = f"\r\n--{boundary}--\r\n"
            file.seek(0)
            chunks = itertools.chain([head.encode()], file_chunks(file, size), [tail.encode()])
            body = SizedBody(chunks, len(head.encode()) + size + len(tail))
            answer = self.send("POST", said["url"], body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
            if answer.status_code not in (200, 201, 204):
                text = answer.content.decode("utf-8", "replace")
                raise BackendUnavailable(f"DIRAC's sandbox store answers {answer.status_code}: {one_line(text, 200)}")
        return str(said["pfn"])

    def download(self, pfn: str, target: IO[bytes]) -> None:
        """Fetch a sandbox and verify the SHA-256 in its name. Raises BackendUnavailable if it is damaged or does not arrive."""
        url = self.call("GET", f"/api/jobs/sandbox?pfn={quote(pfn, safe='')}")["url"]
        answer = self.send("GET", url, stream=True)  # without the token: the store is another service and refuses it
        digest, size, pieces = hashlib.sha256(), 0, answer.iter_content(CHUNK_BYTES)
        try:
            while chunk := next_piece(pieces, pfn):
                digest.update(chunk)
                size += len(chunk)
                if size > OUTPUT_LIMIT_BYTES:
                    raise BadSandbox(f"{pfn} is larger than {OUTPUT_LIMIT_BYTES // MIB} MiB")
                target.write(chunk)
        finally:
            answer.close()
        if answer.status_code != 200 or f":{digest.hexdigest()}." not in pfn:
            raise BackendUnavailable(f"DIRAC: {pfn} arrived damaged (status {answer.status_code}): it is fetched again")


class SizedBody:
    """A body that is read while it is sent, with a known length: a sandbox store accepts no chunked body."""

    def __init__(self, chunks: Iterator[bytes], size: int) -> None:
        self.chunks, self.size = chunks, size

    def __iter__(self) -> Iterator[bytes]:
        return self.chunks

    def __len__(self) -> int:
        return self.size


def next_piece(pieces: Iterator[bytes], pfn: str) -> bytes:
    """Return the next piece of a sandbox, empty at its end. Raises BackendUnavailable if it does not arrive."""
    try:
        return next(pieces, b"")
    except (OSError, ValueError) as error:
        raise BackendUnavailable(f"DIRAC: {pfn} broke off: {one_line(str(error))}") from error


# == DIRAC ==  Payloads run as jobs of a grid. One query per tick covers all, and the exit file outranks DIRAC's report.


def waits_text(row: Mapping[str, Any]) -> str:
    """Return what a job that has not started waits for."""
    since = at_clock(dirac_time(row["LastUpdateTime"]))
    return f"DIRAC: {row['Status']} since {since}, {one_line(str(row['MinorStatus']), 100)} (job {row['JobID']})"


def weighed(row: Mapping[str, Any], left: Outcome) -> Outcome:
    """Return the outcome of a job with an exit file. The file decides, but only DIRAC may know who killed the job."""
    minor = one_line(str(row["MinorStatus"]), 100)
    if left.exit_status == 0 or left.cause is Cause.LIMIT:
        return left
    if row["Status"] == "Killed":
        return dataclasses.replace(left, cause=Cause.CANCELLED, reason=f"job {row['JobID']} was killed in DIRAC, not by joborch ({minor})")
    if row["Status"] == "Failed" and GRID_LIMIT.search(minor):
        return dataclasses.replace(left, cause=Cause.LIMIT, reason=f"DIRAC stopped it: {minor} (job {row['JobID']})")
    if row["Status"] == "Failed" and (left.exit_status or 0) > 128 and not SCRIPT_FAILED.search(minor):
        return dataclasses.replace(left, cause=Cause.INFRASTRUCTURE, reason=f"DIRAC stopped it: {minor} (job {row['JobID']})")
    return left


def without_exit(row: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a job without an exit file, as DIRAC reports it."""
    text = f"DIRAC: {row['Status']}, {one_line(str(row['MinorStatus']), 100)} (job {row['JobID']}), and no exit file arrived"
    if row["Status"] == "Killed":
        return Outcome(False, cause=Cause.CANCELLED, reason=f"it was killed, not by joborch. {text}")
    limit = row["Status"] == "Failed" and GRID_LIMIT.search(str(row["MinorStatus"]))
    return Outcome(False, cause=Cause.LIMIT if limit else Cause.INFRASTRUCTURE, reason=text)


def removed(number: int) -> Outcome:
    """Return the outcome of a job that DIRAC no longer knows."""
    return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=f"DIRAC no longer knows job {number}: somebody removed it")


def run_again(row: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a job that DIRAC started again: an attempt must run only once."""
    text = f"DIRAC rescheduled job {row['JobID']} by itself ({row['RescheduleCounter']} times): it was killed"
    return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=text)


class DiracExecutor:
    """Runs payloads as jobs of DIRAC 9 or later. A handle is the job's number there; the job's name is the attempt's mark."""

    is_batch = True

    def __init__(self, data: DataFolder, config: Config, clock: Clock | None = None) -> None:
        """Raises ConfigError if a setting is missing or has characters that JDL cannot express."""
        if not config.dirac_url:
            raise ConfigError("JOBORCH_DIRAC_URL is not set: give the URL of DiracX, as in https://dirac.example.org")
        for service, options in config.batch.items():
            try:
                check_dirac_options(options)
            except ConfigError as error:
                raise ConfigError(f"SERVICE_{service.upper()}_{error}") from error
        self.data, self.config, self.clock = data, config, clock or Clock()
        self.service = DiracService(config.dirac_url, config.dirac_credentials, self.clock)
        self.wrapper = wrapper_text(data)
        self.lock, self.asking = threading.Lock(), threading.Lock()
        self.rows: dict[int, Row] = {}  # the last known rows, by DIRAC's job number
        self.asked_at = float("-inf")  # monotonic
        self.asked_for: set[int] = set()
        self.polled: dict[str, tuple[int, float]] = {}  # by mark: the number of a watched job, and when (monotonic) it was polled
        self.since: dict[tuple[int, str], float] = {}  # by job and aspect: since when (monotonic)
        self.killing: set[int] = set()  # jobs being killed: each query includes them
        self.unbegun: set[int] = set()  # jobs that were killed before a pilot had them
        self.born = self.clock.monotonic()
        self.lost: dict[str, float] = {}  # by mark, monotonic: submissions whose answer was lost
        self.bringing: dict[str, threading.Lock] = {}  # by mark: held while outputs are fetched
        self.fetch_failed: dict[str, float] = {}  # by mark, monotonic: since when fetching has failed
        self.judging: set[str] = set()  # marks whose outputs are being fetched
        self.judged: dict[str, float] = {}  # by mark: `asked_at` of the row that was judged last
        self.verdicts: dict[str, Outcome] = {}  # by mark
        self.fetched: set[str] = set()  # marks whose outputs have been fetched, with or without an exit file
        self.odd: set[str] = set()  # unknown states that were logged
        self.outage = Backoff(self.clock)

    # -- problems --

    def problem(self) -> str:
        return self.service.login.ended() or (f"{self.outage.reason} (since {at_clock(self.outage.since)})" if self.outage.reason else "")

    def login_valid_until(self) -> float | None:
        """Return when a person must log in again (seconds since 1970), or None if unknown."""
        return self.service.login.valid_until()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Keep errors of the block for problem(), and raise them, also refusals, as BackendUnavailable."""
        try:
            yield
        except (BackendUnavailable, DiracRefusal) as error:
            self.note(str(error))
            raise error if isinstance(error, BackendUnavailable) else BackendUnavailable(str(error)) from error
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            self.note(f"DIRAC sends an invalid answer: {one_line(repr(error), 150)}")
            raise AnswerLost(self.outage.reason) from error
        self.outage.worked()

    def note(self, trouble: str) -> None:
        """Note a problem, and log it if it is new."""
        if self.outage.failed(trouble, LOOK_AGAIN_S):
            log.warning("%s", trouble)

    # -- starting --

    def start(self, job: Job) -> str:
        with tempfile.TemporaryFile(dir=self.data.tmp) as file:
            try:
                prelude = self.config.batch_options(job.service).prelude
                scripts = {LAUNCHER: launcher(job, self.config.kill_grace_s, prelude), "wrapper.sh": self.wrapper}
                packed = pack_inputs(self.data.job(job.mark), scripts, file)
                with self.noted():
                    pfn = self.ask(self.service.upload, file, packed.size, packed.digest.hexdigest())
                crash_point("dirac.uploaded")
                jdl = build_jdl(job, self.config.batch_options(job.service), pfn)
            except ConfigError as error:
                raise CannotRun(str(error)) from error
        try:
            with self.noted():
                said = self.ask(self.service.call, "POST", "/api/jobs/jdl", [jdl])
                crash_point("dirac.submitted")
                number = int(said[0]["JobID"])
        except AnswerLost as error:
            self.lost[job.mark] = self.clock.monotonic()
            raise AnswerLost(f"DIRAC: the answer to a submission was lost: {one_line(str(error))}") from error
        return str(number)

    def ask(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call the service for one payload. Raises CannotRun if it refuses the request itself, not the login."""
        try:
            return call(*arguments)
        except DiracRefusal as error:
            if error.status == 403:
                raise
            raise CannotRun(f"{error}; check its inputs and the service's DIRAC settings") from error

    def find(self, jobs: Sequence[Job]) -> dict[str, str]:
        names = {job_name(job.mark): job.mark for job in jobs}
        with self.noted():
            rows = self.search("JobName", list(names))
        handles = {mark: "" for mark in names.values() if self.may_come(mark)}
        for row in sorted(rows, key=lambda row: row["Status"] in GRID_ENDED):  # jobs that have not ended first
            mark = names.get(row["JobName"])  # None: the database may ignore case
            if mark and handles.get(mark):
                self.end_twin(row, handles[mark])
            elif mark:
                handles[mark] = str(row["JobID"])
                self.lost.pop(mark, None)
        return handles

    def end_twin(self, row: Row, handle: str) -> None:
        """Kill a second job of an attempt: a submission whose answer was lost has arrived after all."""
        if row["Status"] not in GRID_ENDED:
            log.warning("DIRAC has two jobs for %s: job %s is killed, job %s stays", row["JobName"], row["JobID"], handle)
            with contextlib.suppress(StillRunning, BackendUnavailable):  # harmless: nobody uses its outputs
                self.kill(row)

    def search(self, parameter: str, values: Sequence[Any]) -> list[Row]:
        """Return the rows of joborch's jobs with these values. Raises BackendUnavailable also if another user is logged in now."""
        now, note = self.service.login.owner(), self.data.path / "dirac-owner"
        known = note.read_text(encoding="utf-8") if note.exists() else ""
        if known and known != now:
            remedy = f"log in as {known}, or remove {note} when none of its jobs runs"
            raise BackendUnavailable(
                f"DIRAC: {one_line(now, 80)} is logged in, but this client's jobs belong to {one_line(known, 80)}: {remedy}"
            )
        if not known:
            write_atomic(note, now.encode(), 0o600)
        return self.service.search(now, parameter, values)

    def may_come(self, mark: str) -> bool:
        """Tell whether a submission that is not found may still arrive."""
        now = self.clock.monotonic()
        return now - self.lost[mark] < SUBMIT_SETTLE_S if mark in self.lost else now - self.born < RESTART_SETTLE_S

    # -- watching --

    def look(self, numbers: Collection[int], at_once: bool = False) -> None:
        """Ask DIRAC about these jobs, the watched ones and those being killed, unless it was just asked. Raises BackendUnavailable."""
        with self.asking:
            now = self.clock.monotonic()
            interval_s = min(LOOK_AGAIN_S, self.config.batch_interval_s) if self.outage.reason else self.config.batch_interval_s
            if not at_once and now - self.asked_at < interval_s:
                return
            wanted = {*numbers, *(number for number, _ in self.polled.values()), *self.killing}
            is_idle = not wanted and not self.outage.reason
            if is_idle and now - self.asked_at < IDLE_LOOK_S:
                return
            self.asked_at = now  # also if it fails
            with self.noted():
                found = {int(row["JobID"]): row for row in self.search("JobID", sorted(wanted) or [0])}
            keys = {(number, self.aspect(found.get(number))) for number in wanted}
            self.since = {key: self.since.get(key, now) for key in keys}
            self.rows, self.asked_for = found, wanted

    def aspect(self, row: Row | None) -> str:
        """Return the aspect of a job that is timed: that it is missing, or its status and last heartbeat."""
        return "missing" if row is None else f"{row['Status']} {row['HeartBeatTime']}"

    def lasting_s(self, number: int) -> float:
        """Return for how many seconds a job has been missing, or has been in its status without a heartbeat."""
        now = self.clock.monotonic()
        return now - self.since.get((number, self.aspect(self.rows.get(number))), now)

    def row_of(self, job: Job) -> Row | None:
        """Return a job's last known row, or None. After DIRAC lost its database, another job may have its number."""
        row = self.rows.get(int(job.handle or 0))
        return row if row and row["JobName"] == job_name(job.mark) else None

    def poll(self, jobs: Sequence[Job]) -> dict[int, Outcome]:
        self.keep_in_mind(jobs)
        with contextlib.suppress(BackendUnavailable):  # problem() reports it; the jobs count as alive
            self.look(())
        return {job.id: self.outcome(job) for job in jobs}

    def keep_in_mind(self, jobs: Sequence[Job]) -> None:
        """Watch these jobs, and forget those that were not polled for FORGET_S: they are over."""
        now = self.clock.monotonic()
        with self.lock:
            polled = {**self.polled, **{job.mark: (int(job.handle), now) for job in jobs if job.handle}}
            self.polled = {mark: entry for mark, entry in polled.items() if now - entry[1] < FORGET_S}
            self.verdicts = {mark: outcome for mark, outcome in self.verdicts.items() if mark in self.polled}
            self.judged = {mark: at for mark, at in self.judged.items() if mark in self.polled}
            self.fetched &= set(self.polled)
            numbers = {number for number, _ in self.polled.values()}
            self.unbegun, self.killing = self.unbegun & numbers, self.killing & numbers
            self.bringing = {mark: lock for mark, lock in self.bringing.items() if mark in self.polled}
            self.fetch_failed = {mark: since for mark, since in self.fetch_failed.items() if mark in self.polled}

    def outcome(self, job: Job) -> Outcome:
        number, row = int(job.handle or 0), self.row_of(job)
        if number not in self.asked_for:
            return Outcome(True, waits=f"DIRAC: submitted (job {number})")
        if job.mark in self.verdicts:
            return self.verdicts[job.mark]
        if row is None:
            gone = self.lasting_s(number) >= self.config.vanish_grace_s
            return (read_exit(self.data.job(job.mark)) or removed(number)) if gone else Outcome(True)
        if row["Status"] in GRID_ENDED or row["RescheduleCounter"]:
            self.judge_soon(job, row)
            return Outcome(True)
        if row["Status"] not in NOT_BEGUN | WITH_PILOT and row["Status"] not in self.odd:
            self.odd.add(row["Status"])
            log.warning("DIRAC reports the unknown status %r for job %d: it counts as alive", row["Status"], number)
        return Outcome(True, waits=waits_text(row) if row["Status"] in NOT_BEGUN else "")

    # -- judging --

    def judge_soon(self, job: Job, row: Row) -> None:
        """Find out in the background how a job ended, because its outputs may be large."""
        with self.lock:
            if job.mark in self.judging or len(self.judging) >= JUDGES or self.judged.get(job.mark) == self.asked_at:
                return
            self.judged[job.mark] = self.asked_at
            self.judging.add(job.mark)
        threading.Thread(target=self.judge, args=(job, row), name=f"dirac {row['JobID']}", daemon=True).start()

    def judge(self, job: Job, row: Row) -> None:
        """Find a job's outcome and keep it for the next poll."""
        try:
            with contextlib.suppress(BackendUnavailable, StillRunning):
                verdict = self.verdict(job, row)
                with self.lock:
                    self.verdicts.update({job.mark: verdict} if verdict else {})
        except Exception:  # noqa: BLE001 - logged; the next poll tries again
            log.exception("DIRAC: the outcome of job %s could not be determined; it is tried again", row["JobID"])
        finally:
            with self.lock:
                self.judging.discard(job.mark)

    def verdict(self, job: Job, row: Row) -> Outcome | None:
        """Return how a job ended, or None while its pilot may still run it or upload its outputs."""
        if row["RescheduleCounter"]:
            self.cancel(job)
            return run_again(row)
        self.collect(job)
        left = read_exit(self.data.job(job.mark))
        if left:
            return weighed(row, left)
        # A job that the pilot's watchdog kills is Failed before its outputs are uploaded.
        late = self.lasting_s(int(row["JobID"])) >= self.config.vanish_grace_s
        return without_exit(row) if late and (row["Status"] != "Killed" or self.is_over(row)) else None

    def is_over(self, row: Row) -> bool:
        """Tell whether a killed job certainly runs no more: its pilot reported it, or has been silent for too long."""
        quiet_s = self.config.dirac_quiet_s if row["StartExecTime"] else self.config.vanish_grace_s
        if int(row["JobID"]) in self.unbegun:
            return True
        return bool(PILOT_IS_DONE.search(str(row["MinorStatus"]))) or self.lasting_s(int(row["JobID"])) >= quiet_s

    # -- killing --

    def kill(self, row: Row) -> None:
        """Ask DIRAC to kill a job. Raises StillRunning if it did not accept the request."""
        # DIRAC orders changes by this time, and ignores one before the last, which may come from a pilot with a fast clock.
        times = [dirac_time(row[name]) for name in ("LastUpdateTime", "HeartBeatTime", "StartExecTime")]
        stamp = datetime.fromtimestamp(max(self.clock.wall(), *times) + 0.001, timezone.utc).isoformat(timespec="microseconds")
        change = {"Status": "Killed", "MinorStatus": "Marked for termination", "Source": "joborch"}
        with self.noted():
            said = self.service.call("PATCH", "/api/jobs/status", {str(row["JobID"]): {stamp: change}})
            noted = (said.get("success", {}).get(str(row["JobID"])) or {}).get("Status")
        if noted != "Killed":
            raise StillRunning(f"DIRAC did not accept the request to kill job {row['JobID']}")

    def cancel(self, job: Job) -> None:
        try:
            self.stop(job)
        except BackendUnavailable as error:
            raise StillRunning(str(error)) from error

    def stop(self, job: Job) -> None:
        """Kill a job; return when it certainly runs no more. Raises StillRunning or BackendUnavailable."""
        handle = job.handle or self.find([job]).get(job.mark)
        if handle is None:
            return
        if not handle:
            raise BackendUnavailable("DIRAC: it is not known yet whether the submission succeeded")
        job, number = job._replace(handle=handle), int(handle)
        self.look([number], at_once=True)
        row = self.row_of(job)
        if row and row["Status"] not in GRID_ENDED:
            self.killing.add(number)
            self.kill(row)
            self.look([number], at_once=True)
            after = self.row_of(job)
            silent = after is not None and (after["HeartBeatTime"], after["StartExecTime"]) == (row["HeartBeatTime"], row["StartExecTime"])
            if row["Status"] in NOT_BEGUN and silent:
                self.unbegun.add(number)  # no pilot has it, and none will get it
            elif after:
                raise StillRunning(f"DIRAC: job {number} is marked, and its pilot will kill it")
            row = after
        if row and row["Status"] == "Killed" and not self.is_over(row) and not self.outputs_of(number):
            self.killing.add(number)
            raise StillRunning(f"DIRAC: job {number} is Killed, but its pilot has not confirmed that")
        self.killing.discard(number)

    # -- fetching --

    def outputs_of(self, number: int) -> list[str]:
        """Return the pfns of a job's output sandboxes, newest first."""
        with self.noted():
            return [str(pfn) for pfn in reversed(self.service.call("GET", f"/api/jobs/{number}/sandbox/output"))]

    def collect(self, job: Job) -> None:
        """Fetch a job's outputs into its folder unless they are there, the exit file last, so that a crash does no harm."""
        if job.mark in self.fetched or not job.handle or read_exit(self.data.job(job.mark)):
            return
        with self.lock:
            taken = self.bringing.setdefault(job.mark, threading.Lock())
        with taken:  # poll and cancel may both want them
            if not read_exit(self.data.job(job.mark)) and any(self.bring(job, pfn) for pfn in self.outputs_of(int(job.handle))):
                self.fetched.add(job.mark)

    def bring(self, job: Job, pfn: str) -> bool:
        """Fetch one output sandbox into a payload's folder. Return False if it is useless. Raises BackendUnavailable if a retry may help.

        A sandbox that fails for FETCH_PATIENCE_S counts as useless, or it would hold a slot and its user's quota for ever.
        """
        room, first = Path(tempfile.mkdtemp(dir=self.data.tmp)), self.fetch_failed.setdefault(job.mark, self.clock.monotonic())
        try:
            with open(room / "sandbox", "w+b") as file:
                self.service.download(pfn, file)
            unpack_outputs(room, pfn, self.config.min_free_bytes, ResultLimits(self.config.max_result_bytes, self.config.max_result_files))
            sync_file_system(room / "out")  # the exit file means that all is there, also after a power failure
            crash_point("dirac.unpacked")
            exchange(room / "out", self.data.job(job.mark))
        except (BadSandbox, BackendUnavailable, DiracRefusal, OSError, LookupError, TypeError, ValueError) as error:
            text = f"the outputs of job {job.handle} cannot be fetched: {one_line(str(error), 200)}"
            log.warning("DIRAC: %s", text)
            if isinstance(error, BadSandbox) or self.clock.monotonic() - first > FETCH_PATIENCE_S:
                return False
            raise BackendUnavailable(f"DIRAC: {text}") from error
        finally:
            discard(room)
        self.fetch_failed.pop(job.mark, None)
        return True

    # -- deletion, orphans, and doctor --

    def erase(self, job: Job) -> None:
        """Release the sandboxes of a job that is over: DIRAC then deletes those that no other job has. Raises BackendUnavailable."""
        try:
            self.service.call("DELETE", f"/api/jobs/{job.handle}/sandbox")
        except DiracRefusal as error:
            log.info("payload %d: %s; DIRAC keeps the sandboxes of job %s for as long as its site wants", job.id, error, job.handle)

    def end_orphans(self, marks: Sequence[str]) -> None:
        try:
            with self.noted():
                rows = self.search("JobName", [job_name(mark) for mark in marks]) if marks else []
            for row in rows:
                if row["Status"] not in GRID_ENDED:
                    self.kill(row)
        except (BackendUnavailable, StillRunning) as error:
            log.warning("%s: jobs of a lost database may keep running there", error)

    def examine(self) -> Iterator[Finding]:
        try:
            name = self.service.login.owner()
            self.search("JobName", ["none"])
        except (BackendUnavailable, DiracRefusal) as error:
            yield Finding(False, str(error))
            return
        except (LookupError, TypeError, AttributeError, ValueError):
            yield Finding(False, f"{self.config.dirac_url} does not answer like DiracX: correct JOBORCH_DIRAC_URL")
            return
        until = self.login_valid_until()
        left = f" until {at_clock(until)}; before that, log in again with `dirac login`" if until else ""
        yield Finding(True, f"DIRAC answers at {self.config.dirac_url}; you are {name}, and your login is valid{left}")
        with contextlib.suppress(BackendUnavailable, KeyError, TypeError, ValueError):
            answer = self.service.send("GET", f"{self.service.url}/.well-known/dirac-metadata")
            off_s = parsedate_to_datetime(answer.headers["Date"]).timestamp() - self.clock.wall()
            if abs(off_s) > CLOCK_TOLERANCE_S:
                yield Finding(None, f"DIRAC's clock differs by {format_duration(abs(off_s))}: use NTP")


def unpack_outputs(folder: Path, pfn: str, spare_bytes: int, limits: ResultLimits | None = None) -> None:
    """Unpack folder/sandbox and the archive in it below folder/out. Raises BadSandbox or OSError.

    If it exceeds the limits, an exit file that says so replaces the script's.
    """
    import tarfile

    (folder / "out").mkdir()
    try:
        with contextlib.ExitStack() as stack:
            if pfn.endswith(".tar.zst"):  # Python reads it from 3.14 on
                if not shutil.which("zstd"):
                    raise BackendUnavailable("DIRAC: a pilot packed outputs with zstd: install the program zstd on this machine")
                unpacker = stack.enter_context(
                    subprocess.Popen(["zstd", "-dcq", str(folder / "sandbox")], stdout=subprocess.PIPE, env=helper_environment())
                )
                outer = stack.enter_context(tarfile.open(fileobj=unpacker.stdout, mode="r|", tarinfo=careful_members()))
            else:
                outer = stack.enter_context(tarfile.open(folder / "sandbox", mode="r|*", tarinfo=careful_members()))
            member = next((member for member in outer if member.isreg() and os.path.basename(member.name) == OUTPUT_ARCHIVE), None)
            if member is None:
                raise BadSandbox(f"there is no {OUTPUT_ARCHIVE} in it")
            stream = cast("IO[bytes]", outer.extractfile(member))
            names: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "tarinfo": careful_members()}
            inner = stack.enter_context(tarfile.open(fileobj=stream, mode="r|gz", **names))
            left_out = unpack(inner, folder / "out", spare_bytes, limits)
    except SandboxTooLarge as error:
        exit_file, left_out = folder / "out" / "exit.json", []
        exit_file.unlink(missing_ok=True)
        exit_file.write_text(
            json.dumps({"status": 1, "left": 0, "limit": 1, "reason": Reason.RESULT_HAS.format(too_much=error)}), encoding="ascii"
        )
    except (tarfile.TarError, EOFError, ValueError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno in TROUBLES_OF_OURS:
            raise
        raise BadSandbox(f"it is damaged: {one_line(str(error))}") from error
    if left_out:
        log.warning(
            "%d entries of %s were omitted: links out of their folder, or devices (%s...)", len(left_out), pfn, one_line(left_out[0], 80)
        )


def exchange(new: Path, folder: Path) -> None:
    """Move fetched outputs into a payload's folder, replacing what is there. The exit file is last: it means that all is there."""
    aside = new.with_name("old")
    aside.mkdir()
    names = sorted(os.listdir(new), key=lambda name: name == "exit.json")
    for name in names:
        if os.path.lexists(folder / name):
            os.rename(folder / name, aside / name)
        os.rename(new / name, folder / name)
        crash_point("dirac.exchanged")
    discard(aside)
