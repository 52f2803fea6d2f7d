"""Files and folders: names are checked before anything is stored, what is written is durable, and what a script did is no danger.

1. Files
2. Folders
3. Removal
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple, cast
from urllib.parse import unquote_to_bytes

from joborch_base.vocabulary import (
    CHUNK_BYTES,
    DIGESTS_FIELD,
    KIB,
    LEFT_OUT_LINES,
    MIB,
    PART_HEADER_LIMIT_BYTES,
    PARTS_LIMIT,
    ConfigError,
    HttpError,
    load_plugin,
    one_line,
)

# == 1. Files ==  Names are checked before anything is stored, and content is streamed in chunks.


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


NAME_LIMIT_BYTES, PATH_LIMIT_BYTES, DEPTH_LIMIT = 255, 1024, 16


def check_path(path: str) -> str:
    """Return `path` without a leading `./`. Raises HttpError 400 unless it is a relative POSIX path that stays in its folder."""
    name = re.sub(r"^(\./)+", "", path)
    parts = name.split("/")
    if not name:
        raise HttpError(400, "a file has no name: give a relative path, as in inputs/a.pdb", "file")
    if re.search("[\\x00-\\x1f\\x7f]", name):
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


FIELD_LIMIT_BYTES = 64 * KIB  # a text field of a form


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
        self.stored_bytes = 0  # of all files so far

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
                sync_in_steps(target, size, size + len(chunk))
                self.after_write(len(chunk))
                digest.update(chunk)
                size += len(chunk)
                head += chunk[: 4 - len(head)]
            if mode is not None:
                os.fchmod(descriptor, mode & 0o777 | 0o600)
            elif head.startswith((b"#!", b"\x7fELF")):
                os.fchmod(descriptor, 0o700)
        self.stored_bytes += size
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


SYNC_STEP_BYTES = 16 * MIB


def sync_in_steps(target: IO[bytes], before: int, after: int) -> None:
    """Bring a large file to the disk while it is written: called with its size in bytes before and after each write.

    Otherwise gigabytes wait in memory, and the fsync of a small file, and so each upload and COMMIT, may wait seconds for them
    (measured on ext4: 1.5 s, and 0.04 s with this).
    """
    if before // SYNC_STEP_BYTES != after // SYNC_STEP_BYTES:
        os.fdatasync(target.fileno())


# == 2. Folders ==  Makes files durable, and safely reads folders that a script can tamper with.


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
    """Return a new descriptor of a folder, or of the folder `inner` below it. Raises OSError if any of them is a link.

    `path` may be a descriptor, which stays open. `flags` apply to the last folder: O_PATH is enough to open what is in it.
    """
    if isinstance(path, int) and not inner:
        return os.dup(path)
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


def touch_below(folder: Path, name: str) -> None:
    """Create a file in a folder that a script can change, unless it is there; follow no link. Raises OSError."""
    with opened_folder(folder) as descriptor:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=descriptor))


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


def write_atomic(path: Path, data: bytes, mode: int = 0o644, follow: bool = True) -> None:
    """Write a file atomically and durably: after a crash it has either its old or its new content.

    Unless `follow`, raises OSError if its folder is a link, as a script may have made it.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW))
    try:
        temporary = f".{path.name}.{secrets.token_hex(4)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, dir_fd=folder)
        with open(descriptor, "wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
        os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)


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


WALK_DESCRIPTORS = 64  # folders that a walk keeps open at once


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


def script_head(folder: Path, *inner: str) -> bytes:
    """Return the first bytes of a run.sh on disk, none if it is missing; the arguments are those of `open_regular`."""
    try:
        with open_regular(folder, *inner) as file:
            return file.read(64 * KIB)
    except OSError:
        return b""  # a missing run.sh is reported elsewhere


BATCH_LINE = re.compile(rb"^#(SBATCH|PBS|BSUB|\$)[ \t]+-", re.MULTILINE)  # of Slurm, PBS, LSF and Grid Engine


def batch_line_warnings(head: bytes) -> list[str]:
    """Return a warning about lines in the first bytes of a run.sh that are meant for a batch system, which joborch ignores."""
    words = BATCH_LINE.findall(head)
    if not words:
        return []
    which = " and ".join(f"#{word.decode()}" for word in dict.fromkeys(words))
    text = f"run.sh has {len(words)} line{'s' if len(words) > 1 else ''} with {which}, which joborch ignores"
    fields = "give cpus, memory (MiB) and timeout (seconds) as fields of the upload, as in -F cpus=4 -F memory=2048 -F timeout=3600"
    return [f"{text}: {fields}; partition, account and the like are settings of the client, such as SERVICE_<NAME>_SLURM_PARTITION"]


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


# == 3. Removal ==  Removes files and folders, whatever rights a script has set in them. What is removed, and when, is decided elsewhere.

# -- removal --


def discard(path: Path) -> None:
    """Remove files without a row, of a failed upload, a second delivery, or a useless transfer. They may be missing."""
    remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a file or folder, whatever permissions a script has set in it. It may be missing. Raises OSError if something remains."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):  # missing rights, or a path too long or too deep for Python
        with contextlib.suppress(OSError), opened_folder(path) as folder:  # not `path`, which could be a link by now
            give_rights(folder)
            command = ["chmod", "-R", "u+rwx", "--", f"/proc/self/fd/{folder}/."]
            subprocess.run(command, check=False, capture_output=True, env=helper_environment(), pass_fds=[folder])
        done = subprocess.run(
            ["rm", "-rf", "--", str(path)], check=False, capture_output=True, text=True, errors="replace", env=helper_environment()
        )
        if done.returncode != 0 and path.exists():
            raise OSError(errno.EIO, one_line(done.stderr) or "rm failed", str(path)) from None
