"""ZIP files of results, and how files and results travel between server and client.

1. Archives
2. Transfers
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import stat
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple, cast
from urllib.parse import quote

from joborch_base.data_folder import Promise
from joborch_base.files import (
    inputs_digest,
    libc,
    open_regular,
    open_unreadable,
    opened_folder,
    shown,
    state_below,
    sync_in_steps,
    walk_open,
    write_all,
)
from joborch_base.states import Reason
from joborch_base.vocabulary import (
    CHUNK_BYTES,
    DIGESTS_FIELD,
    DIRECTORY_LIMIT_BYTES,
    KIB,
    LEFT_OUT_LINES,
    MIB,
    PART_HEADER_LIMIT_BYTES,
    PARTS_LIMIT,
    GivenUp,
    InputsChanged,
    JoborchError,
    ResultTooLarge,
    one_line,
    parse_json,
    size_text,
    sizes_text,
)

# == 1. Archives ==  Packs a folder as a ZIP. No link is followed out of it, and whatever is omitted is listed.


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
            has, most = sizes_text(size_bytes, self.size_bytes)
            return f"{has}: at most {most} are allowed (JOBORCH_MAX_RESULT)"
        if files > self.files:
            return f"more than {self.files:,} files, or {self.folders:,} folders: no more are allowed (JOBORCH_MAX_RESULT_FILES)"
        return ""


STREAM_COMMENT = "joborch stream {} {}"  # ZIP comment of a stream's member: its size before its middle was cut, and the limit
# The headers of APPNOTE 6.3.10: 4.3.7, 4.3.12, 4.3.14, 4.3.15 and 4.3.16.
ZIP_LOCAL, ZIP_CENTRAL, ZIP_END = struct.Struct("<4s5H3L2H"), struct.Struct("<4s4B4H3L5H2L"), struct.Struct("<4s4H2LH")
ZIP64_END, ZIP64_LOCATOR = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
ZIP_ENCRYPTED, ZIP_STREAMED, ZIP_UTF8 = 0x01, 0x08, 0x800  # flags: sizes follow the content; the name is UTF-8
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


def utf8_name(name: str) -> str:
    """Return a file's name as it is, or percent-encoded if its bytes are not UTF-8."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return quote(name.encode("utf-8", "surrogateescape"), safe="/ ()[]{}+,;=@!$&'~")
    return name


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
        safe = utf8_name(name)
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


UNREADABLE_LIMIT = 20  # unreadable files that an archive may leave out; if there are more, the disk is at fault


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


EPOCH_ZIP = (1980, 1, 1, 0, 0, 0)


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


# == 2. Transfers ==  Files are streamed and verified by digests. After a break, only the rest is sent again.


def repr_digest(sha256_hex: str) -> str:
    """Return a Repr-Digest header (RFC 9530)."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256_hex)).decode()}:"


class Input(NamedTuple):
    """A file that a job gets from elsewhere than its folder: its path there, its size, its permissions, and its content."""

    path: str
    size: int
    mode: int
    chunks: Callable[[], Iterator[bytes]]  # may raise InputsChanged


def chunks_of(path: Path, size: int) -> Iterator[bytes]:
    """Yield the first `size` bytes of a file."""
    with open(path, "rb", buffering=0) as source:
        yield from file_chunks(source, size)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    return digest_of_chunks(chunks_of(path, sys.maxsize))


def digest_of_chunks(chunks: Iterable[bytes]) -> str:
    """Return the SHA-256 (hex) of the concatenated chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


class FilesBody:
    """A multipart body that is read from the files while it is sent. Its length is known beforehand."""

    def __init__(
        self, folder: Path, paths: Sequence[str], with_digests: bool, inputs_sha256: str | None = None, more: Sequence[Input] = ()
    ) -> None:
        """If `inputs_sha256` is given, reading raises InputsChanged before the end if the files do not match it."""
        self.inputs_sha256 = inputs_sha256
        self.boundary = secrets.token_hex(16)
        self.with_digests = with_digests
        self.digests: dict[str, str] = {}
        states = [(path, os.stat(folder / path)) for path in paths]
        inputs = [
            Input(path, state.st_size, state.st_mode, functools.partial(chunks_of, folder / path, state.st_size)) for path, state in states
        ]
        self.parts = [(each, self.part_head(each.path, each.mode)) for each in (*inputs, *more)]
        digest_bytes = sum(len(json.dumps(each.path)) + 70 for each, _ in self.parts) + 2
        self.digest_head = f'--{self.boundary}\r\nContent-Disposition: form-data; name="{DIGESTS_FIELD}"\r\n\r\n'.encode()
        self.digest_room = digest_bytes if with_digests else 0
        ends = len(f"--{self.boundary}--\r\n") + (len(self.digest_head) + digest_bytes + 2 if with_digests else 0)
        self.length = sum(len(head) + each.size + 2 for each, head in self.parts) + ends
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
        for each, head in self.parts:
            yield head
            digest, missing = hashlib.sha256(), each.size
            for chunk in each.chunks():
                digest.update(chunk)
                missing -= len(chunk)
                yield chunk
            if missing:  # the length was sent already, so anything else would be read as the rest of this file
                raise OSError(errno.EIO, f"{shown(each.path)} became shorter while it was sent")
            self.digests[each.path] = digest.hexdigest()
            yield b"\r\n"
        if self.inputs_sha256 not in (None, inputs_digest(self.digests)):
            raise InputsChanged(Reason.FILES_CHANGED)
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
        sync_in_steps(self.target, self.size, self.size + len(data))
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
    method: int  # -1 if it is encrypted
    packed_bytes: int
    size: int
    begin: int  # of its local header
    crc: int
    flags: int
    mode: int  # type and permissions, if it was packed on Unix
    moment: tuple[int, int]  # see zip_moment
    place: int  # of its entry in the directory


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


def zip_records(file: IO[bytes], commented: bool = False, limit_bytes: int = DIRECTORY_LIMIT_BYTES) -> Iterator[ZipRecord]:
    """Yield the entries of a ZIP's directory while reading it, with little memory, up to `limit_bytes`.

    With `commented`, only members with a comment. Raises ValueError if there is no directory.
    """
    place, left, _ = zip_directory(file)
    left, rest, step, chunk = min(left, limit_bytes), b"", 4 * KIB, b""
    file.seek(place)
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
                yield zip_record(fields, rest[at + ZIP_CENTRAL.size : end], place + at)
            at = end
        rest, place = rest[at:], place + at


def zip_record_at(file: IO[bytes], place: int) -> ZipRecord:
    """Return the entry of a ZIP's directory at `place`. Raises ValueError if there is none."""
    file.seek(place)
    head = file.read(ZIP_CENTRAL.size)
    if len(head) < ZIP_CENTRAL.size or not head.startswith(b"PK\1\2"):
        raise ValueError("no directory entry")
    fields = ZIP_CENTRAL.unpack(head)
    return zip_record(fields, file.read(sum(fields[12:15])), place)


def zip_record(fields: tuple[Any, ...], words: bytes, place: int) -> ZipRecord:
    """Return a record of a ZIP's directory, from its fixed fields and the bytes after them (name, extra fields, comment)."""
    crc, packed, size, name, extra, begin = *fields[9:14], fields[18]
    more, at = words[name : name + extra], 0
    while at + 4 <= len(more):
        kind, length = struct.unpack_from("<2H", more, at)
        if kind == 1:  # ZIP64: what does not fit above, in this order
            known = more[at + 4 : at + 4 + min(length, 24)]
            wide = [value for (value,) in struct.iter_unpack("<Q", known[: len(known) // 8 * 8])]
            size, packed, begin = [wide.pop(0) if value == 2**32 - 1 and wide else value for value in (size, packed, begin)]
        at += 4 + length
    mode = fields[17] >> 16 if fields[2] in (3, 19) else 0  # packed on Unix, on macOS
    return ZipRecord(words[:name], words[name + extra :], fields[6], packed, size, begin, crc, fields[5], mode, fields[7:9], place)


def read_member(file: IO[bytes], record: ZipRecord, begin: int, count: int) -> bytes:
    """Return up to `count` bytes of a ZIP's member from `begin` on: see `member_part`."""
    return b"".join(member_part(file, record, begin, begin + count))


def member_part(file: IO[bytes], record: ZipRecord, begin: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a ZIP's member from `begin` to `end`, or fewer if it is shorter. The work is bounded by `end` bytes.

    Raises ValueError if the member does not match its directory entry.
    """
    length, place = file.seek(0, os.SEEK_END), member_place(file, record)
    if record.method == zipfile.ZIP_STORED:
        file.seek(min(place + begin, length))
        yield from file_chunks(file, min(end, record.packed_bytes) - begin)
        return
    file.seek(min(place, length))
    unpacker, passed, most = zlib.decompressobj(-15), 0, 256 * KIB
    # Real programs never deflate data to much more than its size; a forged stream could be endless and contain nothing.
    for chunk in file_chunks(file, min(record.packed_bytes, end * 17 // 16 + 64 * KIB)):
        ahead, more = chunk, True
        while passed < end and (ahead or more):
            try:
                piece = unpacker.decompress(ahead, most)
            except zlib.error as error:
                raise ValueError(str(error)) from error
            yield piece[max(0, begin - passed) : end - passed]
            passed, ahead = passed + len(piece), unpacker.unconsumed_tail
            more = len(piece) == most  # zlib may have more of it without further input
        if passed >= end or unpacker.eof:
            return


def member_place(file: IO[bytes], record: ZipRecord) -> int:
    """Return where the data of a ZIP's member begins. Raises ValueError if there is none that can be read."""
    length = file.seek(0, os.SEEK_END)
    file.seek(min(record.begin, length))
    head = file.read(ZIP_LOCAL.size)
    if len(head) < ZIP_LOCAL.size or not head.startswith(b"PK\3\4") or record.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("no member")
    if record.flags & ZIP_ENCRYPTED:
        raise ValueError("it is encrypted")
    name, extra = ZIP_LOCAL.unpack(head)[-2:]
    return record.begin + len(head) + int(name) + int(extra)


def member_chunks(file: IO[bytes], record: ZipRecord) -> Iterator[bytes]:
    """Yield the content of a ZIP's member. Raises ValueError, before the last bytes, if it is not what its directory entry says."""
    size, crc, held = 0, 0, b""
    for piece in member_part(file, record, 0, record.size + 1):
        yield held
        size, crc, held = size + len(piece), zlib.crc32(piece, crc), piece
    if (size, crc) != (record.size, record.crc):
        raise ValueError(f"{size} bytes with the checksum {crc:08x} instead of {record.size} with {record.crc:08x}")
    yield held
