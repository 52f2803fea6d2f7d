"""The folder of one server or client: who else could write to it, which process uses it, and how its disk space is shared.

1. Trust
2. Data folder
"""

from __future__ import annotations

import contextlib
import errno
import functools
import grp
import io
import os
import pwd
import shlex
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple, cast

from joborch_base.files import discard, free_bytes, sync_in_steps, take_lock
from joborch_base.vocabulary import KIB, MIB, ConfigError, Finding, log, time_stamp

# == 1. Trust ==  Folders, links and token files are not trusted if other users could replace them.


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


# == 2. Data folder ==  Only one process uses it, and no transfer takes disk space that was promised to another.


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
        """Cancel a promise of `size` bytes. `written` bytes of these are on the disk by now."""
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


MEMORY_SPOOL_BYTES = 1 * MIB  # a ZIP below this size never touches the disk


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
        if isinstance(self.file, io.BytesIO):
            return self.file.write(data)
        self.claim(len(data))
        before = self.file.tell()
        written = self.file.write(data)
        sync_in_steps(self.file, before, before + written)
        return written

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
RESERVE_BYTES = 4 * MIB  # kept free for the database on the data folder's disk


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
        # The folder of a job or payload by its name. Cached: a Path is slower to build than to use, and a job's is needed often.
        self.job: Callable[[str], Path] = functools.lru_cache(maxsize=1024)(self.jobs.joinpath)
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

    def result(self, mark: str) -> Path:
        """Return the path of one attempt's result. A late result cannot overwrite that of another attempt."""
        return self.results / f"{mark}.zip"

    def index(self, mark: str) -> Path:
        """Return where the index of a large result is kept: see the plug-in `results`."""
        return self.results / f"{mark}.index"

    def keep_free(self, keep_bytes: int, packs_below_minimum: bool) -> None:
        """Set how many bytes of the disk stay free; with `packs_below_minimum`, archives may still use them."""
        self.account.keep_bytes, self.packs_below_minimum = keep_bytes, packs_below_minimum

    def spool(self) -> IO[bytes]:
        """Return a nameless temporary file (see Spool) that disappears when closed."""
        keep_bytes = 0 if self.packs_below_minimum else None
        return cast("IO[bytes]", Spool(self.tmp, lambda size: self.account.take(size, promise=False, keep_bytes=keep_bytes)))
