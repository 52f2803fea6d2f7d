"""Results that one can pick from: the result of a job, a list of its files, and single files.

A file is read straight from the stored ZIP; nothing is unpacked. A large ZIP has an index, so that a file of many is found
without reading the whole directory. While a job runs, its client shows the work folder; before that, the server shows the inputs.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import contextlib
import heapq
import itertools
import os
import secrets
import stat
import struct
import threading
import time
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple, Protocol
from urllib.parse import quote, unquote_to_bytes

from joborch import (
    BAD,
    BUSY,
    CLIENT_AWAY,
    COME_AGAIN_S,
    ID,
    JSON_TYPE,
    KIB,
    MARK,
    MIB,
    NOT_FOUND,
    OVER,
    PARTS,
    PAYLOAD_ID,
    TEXT_TYPE,
    WAIT,
    ZIP_TYPE,
    Answer,
    Client,
    Gives,
    Gone,
    HttpError,
    Job,
    Link,
    NoAnswer,
    NothingSent,
    Parameter,
    Request,
    Server,
    Status,
    T,
    ZipRecord,
    calling,
    crash_point,
    digest_of_chunks,
    discard,
    file_answer,
    file_chunks,
    job_after_wait,
    known_job,
    known_payload,
    log,
    member_chunks,
    member_part,
    one_line,
    open_regular,
    opened_folder,
    parse_json,
    ranged,
    read_member,
    read_part,
    rfc3339,
    route,
    running_archive,
    stored_archive,
    utf8_name,
    zip_directory,
    zip_record_at,
    zip_records,
)

INDEX_FROM_BYTES = 128 * KIB  # a ZIP whose directory is at least this large gets an index
RUN_MEMBERS = 20_000  # members that are sorted at once: an index of any size is made in little memory
NAMES_AT_ONCE = 1000  # of a folder that is listed
DEPTH_MOST = 100  # folders above a file that is listed while its job runs
HASHED_BYTES = 16 * KIB  # a file of a result up to this size is listed with its SHA-256
HEAD_BYTES = 4 * KIB  # of a file, to tell whether it is text
PART_BYTES = 1 * MIB  # of a live file that a client sends at once
EXAMPLE_FILE = {
    "path": "summary.txt", "size": 28, "mode": "100644", "mtime": "2026-11-24T09:00:02.000Z",
    "sha256": "b3d9e61f6d8080fe83078b0748d7e2d4746bdef7c6e12b701b3b9709555e1224",
}  # fmt: skip
EXAMPLE_FILES = {"files": [EXAMPLE_FILE], "next": None}
CLEANED_FILES = Gives("the files of the job are deleted", JSON_TYPE, {"message": "the files of job 42 were cleaned"})
EXAMPLE_MISSING = {"message": "job 42 has no file 'out.txt': see /jobs/42/files", "field": "path"}
NO_FILE = Gives("no job has this id, or it has no such file", JSON_TYPE, EXAMPLE_MISSING)
IMAGES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"))


# == 1. The result ==  Unlike /download it is never 200 without a result, so that `curl -f -o result.zip` writes nothing else.

NO_RESULT = {"message": "job 42 has no result yet: it is Running", "status": "Running", "reason": "its script runs"}
RESULT_GIVES = {
    200: Gives("completed: the result", ZIP_TYPE),
    400: BAD,
    404: NOT_FOUND,
    409: Gives("there is no result; Retry-After says when to ask again, unless the job ended without one", JSON_TYPE, NO_RESULT),
    410: CLEANED_FILES,
    **PARTS,
}


@route("GET", "/jobs/<job_id>/result", "server", who="user portal operator", takes=(ID, WAIT), gives=RESULT_GIVES, quick=True)
def job_result(server: Server, request: Request, job_id: int, wait: float) -> Answer:
    """Fetch the result of a job as a ZIP, or get an error if there is none. With `wait`, wait for the end first."""
    job, _ = job_after_wait(server, request, job_id, wait, UNENDED)
    headers = {"X-Job-Status": job.status.value}
    if job.status is Status.COMPLETED:
        return file_answer(request, stored_archive(server, job), f"job-{job.id}.zip", headers)
    refuse_cleaned(job)
    said = {"message": f"job {job.id} has no result yet: it is {job.status}", "status": job.status.value, "reason": job.reason}
    if job.status not in OVER:
        return Answer(said, 409, {**headers, "Retry-After": str(COME_AGAIN_S)})
    left = f"; /jobs/{job.id}/files lists the files that it left" if job.result_sha256 is not None else ""
    return Answer({**said, "message": f"job {job.id} is {job.status} and has no result: {job.reason}{left}"}, 409, headers)


UNENDED = frozenset(status.value for status in Status if status not in OVER)


def refuse_cleaned(job: Job) -> None:
    """Raise HttpError 410 if the files of a job are deleted."""
    if job.status is Status.CLEANED:
        raise HttpError(410, f"the files of job {job.id} were cleaned", X_Job_Status=job.status.value)


# == 2. The index ==  The entries of a ZIP's directory in the order of their paths. A damaged index is made again.

INDEX_HEAD = struct.Struct("=8s32sL")  # a name, the SHA-256 of the result, the CRC-32 of what follows: four bytes for each member
INDEX_NAME = b"joborch1"
BUILDING = threading.Lock()  # a large index takes seconds and memory, so one is made at a time


def shown_path(path: bytes) -> str:
    """Return a path as text, as in a result."""
    return utf8_name(path.decode("utf-8", "surrogateescape"))


def key_of(path: bytes) -> bytes:
    """Return what paths are sorted by: as they are shown, and the files of a folder together."""
    return shown_path(path).encode().replace(b"/", b"\0")


class Members(Sequence[bytes]):
    """The sort keys of a ZIP's members, in order. `places` are their entries in its directory, which begins at `begin`."""

    def __init__(self, file: IO[bytes], places: array[int]) -> None:
        self.file, self.places = file, places
        self.begin = zip_directory(file)[0]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:
        return key_of(self.record(number).name)

    def record(self, number: int) -> ZipRecord:
        """Return a member. Raises ValueError if the ZIP is damaged, IndexError after the last one."""
        return zip_record_at(self.file, self.begin + self.places[number])


def sorted_places(file: IO[bytes], most: int) -> array[int]:
    """Return the places of a ZIP's directory entries (at most `most`), in the order of their paths. Raises ValueError if it has none."""
    begin, size, _ = zip_directory(file)
    if size >= 2**32:
        raise ValueError("the directory is too large")
    records, runs = itertools.islice(zip_records(file, limit_bytes=size), most), []
    while run := sorted((key_of(record.name), record.place - begin) for record in itertools.islice(records, RUN_MEMBERS)):
        runs.append(array("I", (place for _, place in run)))
    if len(runs) < 2:
        return runs[0] if runs else array("I")
    members = [Members(file, run) for run in runs]
    return array("I", (place for _, place in heapq.merge(*(zip(run, run.places) for run in members))))


def read_index(path: Path, sha256: str) -> array[int] | None:
    """Return the places in the index of the result with this SHA-256 (hex); None if there is none, or if it is damaged."""
    try:
        content = path.read_bytes()
        name, digest, crc = INDEX_HEAD.unpack_from(content)
        places = array("I", content[INDEX_HEAD.size :])
    except (OSError, struct.error, ValueError):
        return None
    is_whole = (name, digest, crc) == (INDEX_NAME, bytes.fromhex(sha256), zlib.crc32(places))
    return places if is_whole else None


def make_index(server: Server, mark: str, sha256: str) -> None:
    """Make the index of a result that has just been stored. If that fails, the first request for one of its files tries again."""
    try:
        with open(server.data.result(mark), "rb") as file:
            places_of(server, mark, sha256, file)
    except (OSError, ValueError) as error:
        log.info("%s has no index of its files: %s", mark, error)


def places_of(server: Server, mark: str, sha256: str, file: IO[bytes]) -> array[int]:
    """Return the places of a result's members in the order of their paths, from its index if it is large.

    Raises ValueError if it is not a ZIP.
    """
    most, path = server.config.max_zip_members, server.data.index(mark)
    if zip_directory(file)[1] < INDEX_FROM_BYTES:
        return sorted_places(file, most)
    places = read_index(path, sha256)
    if places is None:
        with BUILDING:
            places = read_index(path, sha256)  # another caller may have made it meanwhile
            if places is None:
                places = sorted_places(file, most)
                write_index(server, mark, sha256, places)
    return places


def write_index(server: Server, mark: str, sha256: str, places: array[int]) -> None:
    """Keep an index. It need not be durable: a damaged one is noticed."""
    part, path = server.data.tmp / f"index-{secrets.token_hex(8)}", server.data.index(mark)
    try:
        with open(part, "xb") as target:
            target.write(INDEX_HEAD.pack(INDEX_NAME, bytes.fromhex(sha256), zlib.crc32(places)))
            target.write(places)
        crash_point("index.written")
        os.rename(part, path)
        crash_point("index.renamed")
        if not server.data.result(mark).exists():  # cleaned meanwhile; the cleaner removes the result first
            discard(path)
    except OSError as error:
        log.warning("the index of %s cannot be kept: %s", mark, error)
        discard(part)


# == 3. Sources ==  Where the files of a job are: in a ZIP, in a folder here, or at its client.


class Found(NamedTuple):
    """A file that was found: its size in bytes, ETag ("" if it may change), CRC-32 (if known), first bytes, and a reader of a part."""

    size: int
    tag: str
    crc: int | None
    head: bytes
    part: Callable[[int, int], Iterator[bytes]]


Row = dict[str, Any]


class NotAFile(Exception):
    """There is no such file; the text says what there is instead, if anything."""


class Source(Protocol):
    """The files of a job, wherever they are."""

    def page(self, after: bytes, limit: int) -> list[Row]:
        """Return up to `limit` files and links that follow the path `after`, in the order of their paths."""

    def find(self, path: bytes) -> Found:
        """Return a file. Raises NotAFile."""


def row_of(path: bytes, size: int, mode: int, mtime: float | None) -> Row:
    """Return a file as it is listed."""
    return {"path": shown_path(path), "size": size, "mode": f"{mode:06o}", "mtime": rfc3339(mtime), "sha256": None}


def meanings(path: bytes) -> list[bytes]:
    """Return the paths that a caller may mean by a path: itself, and what its percent-encoded bytes stand for."""
    return list(dict.fromkeys((path, unquote_to_bytes(path))))


def refuse_path(path: bytes) -> None:
    """Raise HttpError 400 unless a path is a relative one that stays in its folder."""
    parts = path.split(b"/")
    if path.startswith(b"/"):
        why = "is absolute: give a path as /files lists it"
    elif b".." in parts or b"." in parts:
        why = "has a part '.' or '..': give a path as /files lists it"
    elif b"\0" in path:
        why = "contains a NUL: no file has such a name"
    elif b"" in parts:
        why = "has an empty part: give the path of a file, without a / at its end"
    else:
        return
    raise HttpError(400, f"path {one_line(shown_path(path), 80)!r} {why}", "path")


class ZipFiles:
    """The files in a ZIP. It may be damaged or forged: every method may raise ValueError."""

    def __init__(self, file: IO[bytes], places: array[int], sha256: str) -> None:
        self.file, self.members, self.sha256 = file, Members(file, places), sha256

    def page(self, after: bytes, limit: int) -> list[Row]:
        rows: list[Row] = []
        for number in range(bisect_right(self.members, key_of(after)) if after else 0, len(self.members)):
            record = self.members.record(number)
            if not record.name.endswith(b"/"):
                row = row_of(record.name, record.size, record.mode or 0o100644, moment_s(record.moment))
                rows.append({**row, "sha256": self.sha256_of(record)})
            if len(rows) == limit:
                break
        return rows

    def sha256_of(self, record: ZipRecord) -> str | None:
        """Return the SHA-256 (hex) of a small file; None for a large one, a link, or a damaged one."""
        if record.size > HASHED_BYTES or stat.S_ISLNK(record.mode):
            return None
        with contextlib.suppress(ValueError):
            return digest_of_chunks(member_chunks(self.file, record))
        return None

    def find(self, path: bytes) -> Found:
        key = key_of(path)
        number = bisect_left(self.members, key)
        if number < len(self.members) and self.members[number] == key:
            return self.found(self.members.record(number))
        raise NotAFile("a folder" if number < len(self.members) and self.members[number].startswith(key + b"\0") else "")

    def found(self, record: ZipRecord) -> Found:
        if stat.S_ISLNK(record.mode):
            target = read_member(self.file, record, 0, HEAD_BYTES)
            raise NotAFile(f"a symbolic link to {one_line(shown_path(target), 80)!r}")

        def part(begin: int, end: int) -> Iterator[bytes]:
            is_whole = (begin, end) == (0, record.size)
            return member_chunks(self.file, record) if is_whole else member_part(self.file, record, begin, end)

        head = read_member(self.file, record, 0, min(record.size, HEAD_BYTES))
        return Found(record.size, f'"{self.sha256}-{record.place:x}"', record.crc, head, part)


def moment_s(moment: tuple[int, int]) -> float | None:
    """Return the time of a ZIP's member (local time, as two MS-DOS numbers) in seconds since the epoch; None if it is none."""
    clock, day = moment
    parts = ((day >> 9) + 1980, day >> 5 & 15, day & 31, clock >> 11, clock >> 5 & 63, 2 * (clock & 31))
    return time.mktime((*parts, 0, 0, -1)) if 1 <= parts[1] <= 12 and parts[2] else None


class FolderFiles:
    """The files in an open folder, which a script may change meanwhile. No link is followed."""

    def __init__(self, root: int, stack: contextlib.ExitStack) -> None:
        """`stack` closes the files that are found."""
        self.root, self.stack = root, stack

    def page(self, after: bytes, limit: int) -> list[Row]:
        found = itertools.islice(files_in(self.root, b"", after.split(b"/")), limit)
        return [row_of(path, state.st_size, state.st_mode, state.st_mtime) for path, state in found]

    def find(self, path: bytes) -> Found:
        file = self.stack.enter_context(self.open(path))
        size = os.fstat(file.fileno()).st_size

        def part(begin: int, end: int) -> Iterator[bytes]:
            file.seek(begin)
            return file_chunks(file, end - begin)

        return Found(size, "", None, file.read(HEAD_BYTES), part)

    def open(self, path: bytes) -> IO[bytes]:
        """Open a file. Raises NotAFile, or HttpError 400 if the path leads out of the folder."""
        for name in meanings(path):
            refuse_path(name)
            parts = os.fsdecode(name).split("/")
            try:
                return open_regular(self.root, *parts)
            except OSError:
                kind = self.kind_of(parts)
            if kind:
                raise NotAFile(kind)
        raise NotAFile

    def kind_of(self, parts: Sequence[str]) -> str:
        """Say what there is instead of a readable file; empty if there is nothing."""
        try:
            with opened_folder(self.root, ".", *parts[:-1]) as folder:
                mode = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode
        except OSError:
            return ""
        is_known = ((stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a symbolic link"), (stat.S_ISREG, "a file that cannot be read"))
        return next((text for test, text in is_known if test(mode)), "not a file")


def files_in(folder: int, prefix: bytes, after: Sequence[bytes]) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield the files and links below an open folder, in the order of their paths, from the one that follows the path `after`."""
    first, depth, known = after[0], prefix.count(b"/"), True
    while names := next_names(folder, first, known):
        for shown, name in names:
            inner_after = after[1:] if shown == after[0] and len(after) > 1 else (b"",)
            with contextlib.suppress(OSError):  # the script removed it
                state = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISDIR(state.st_mode) and depth < DEPTH_MOST:
                    with opened_folder(folder, name, flags=os.O_RDONLY) as inner:
                        yield from files_in(inner, prefix + shown + b"/", inner_after)
                elif (stat.S_ISREG(state.st_mode) or stat.S_ISLNK(state.st_mode)) and shown != after[0]:
                    yield prefix + shown, state
        first, known = names[-1][0], False


def next_names(folder: int, first: bytes, inclusive: bool) -> list[tuple[bytes, bytes]]:
    """Return some names in an open folder that follow `first`: as they are shown, and as they are. The memory is bounded."""
    with os.scandir(folder) as entries:
        raw = (os.fsencode(entry.name) for entry in entries)
        names = ((shown_path(name).encode(), name) for name in raw)
        return heapq.nsmallest(NAMES_AT_ONCE, (pair for pair in names if pair[0] > first or (inclusive and pair[0] == first)))


class LiveFiles:
    """The files of a running job, at its client. Every method may raise Gone: the client is an older one, or has no such payload."""

    def __init__(self, server: Server, request: Request, link: Link, job: Job) -> None:
        self.server, self.request, self.link, self.job = server, request, link, job

    def ask(self, path: str) -> tuple[Any, bytes]:
        """Return the headers and the body of the client's answer. Raises HttpError 503 if it does not answer."""
        if not self.link.protocol.has_events:
            raise Gone("a 2.2 client shows no single files")
        try:
            with calling(self.server, self.request, self.link) as unwanted:
                answer, body = read_part(self.link, self.job, f"{self.link.address.base_url}{path}", unwanted)
        except (NothingSent, NoAnswer) as error:
            raise HttpError(503, f"{self.link.name} {error}", Retry_After=str(COME_AGAIN_S)) from error
        return answer.headers, body

    def page(self, after: bytes, limit: int) -> list[Row]:
        _, body = self.ask(f"/files/{self.job.dest_id}?limit={limit}&after={cursor_of(after)}")
        try:
            rows = parse_json(body)["files"]
            return [clean_row(row) for row in rows[:limit]]
        except (ValueError, KeyError, TypeError) as error:
            raise HttpError(503, f"{self.link.name} sends an invalid list of files", Retry_After=str(COME_AGAIN_S)) from error

    def find(self, path: bytes) -> Found:
        size, head = self.read(path, 0, HEAD_BYTES)

        def part(begin: int, end: int) -> Iterator[bytes]:
            while begin < end:
                _, data = self.read(path, begin, min(end - begin, PART_BYTES))
                if not data:
                    raise ValueError("it became shorter")
                yield data
                begin += len(data)

        return Found(size, "", None, head, part)

    def read(self, path: bytes, begin: int, count: int) -> tuple[int, bytes]:
        """Return the size of a file, and up to `count` bytes of it."""
        headers, body = self.ask(f"/file/{self.job.dest_id}?offset={begin}&count={count}&path={quote(path, safe='')}")
        size = headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdecimal():
            said = parse_json(body) if body else {}
            raise NotAFile(one_line(str(said.get("message", "")), 120))
        return int(size), body[:count]


def clean_row(row: Any) -> Row:
    """Check a row from a client. Raises ValueError, KeyError or TypeError."""
    path, size, mode, mtime = row["path"], row["size"], row["mode"], row["mtime"]
    if not isinstance(path, str) or not isinstance(size, int) or not isinstance(mode, str) or not isinstance(mtime, (str, type(None))):
        raise TypeError("not a file")
    return {"path": path, "size": size, "mode": mode[:6], "mtime": mtime and mtime[:30], "sha256": None}


# == 4. Routes ==  The server's routes find the files wherever they are now; the client's show a payload's work folder.


def read_cursor(text: str) -> bytes:
    """Return the path in a cursor. Raises ValueError if it is none."""
    try:
        return base64.b64decode(text.encode() + b"=" * (-len(text) % 4), b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise ValueError("give the `next` of the page before") from error


def cursor_of(path: bytes) -> str:
    """Return the cursor of the page that follows a path."""
    return base64.urlsafe_b64encode(path).decode().rstrip("=")


LIMIT = Parameter("limit", "query", "integer", "the most files to return", 100, least=1, most=1000, default=100)
AFTER = Parameter(
    "after", "query", "string", "the cursor: `next` of the page before", cursor_of(b"out/a.txt"), default=b"",
    pattern="^([A-Za-z0-9_-]{4})*([A-Za-z0-9_-]{2,3})?$", read=read_cursor,
)  # fmt: skip
PATH = Parameter("path", "path", "string", "the path of a file, as /jobs/ID/files lists it", "summary.txt", required=True)
INLINE = Parameter(
    "inline", "query", "string", "1: for a browser, which then shows text and images and does not save them", "1", choices=("0", "1"),
    default="0",
)  # fmt: skip
LISTED = Gives(
    "files and links in the order of their paths, a page at a time; `mode` is octal, 12.... for a symbolic link; `sha256` is that of a "
    "file up to 16 KiB in a result, else null; `next` is the cursor of the next page",
    JSON_TYPE,
    EXAMPLE_FILES,
)


@route(
    "GET",
    "/jobs/<job_id>/files",
    "server",
    who="user portal operator",
    slow=True,
    takes=(ID, LIMIT, AFTER),
    gives={200: LISTED, 400: BAD, 404: NOT_FOUND, 410: CLEANED_FILES, 503: CLIENT_AWAY},
)
def job_files(server: Server, request: Request, job_id: int, limit: int, after: bytes) -> Answer:
    """List the files of a job: of its result, or those that exist now."""
    job = known_job(server, request, job_id)
    with contextlib.ExitStack() as stack:
        rows = in_files(server, request, job, stack, lambda source: source.page(after, limit + 1))
    following = cursor_of(os.fsencode(rows[limit - 1]["path"])) if len(rows) > limit else None
    return Answer({"files": rows[:limit], "next": following}, 200, {"X-Job-Status": job.status.value})


FILE_GIVES = {
    200: Gives("the file: as text/plain if it is text, else as application/octet-stream", "application/octet-stream"),
    400: BAD,
    404: NO_FILE,
    410: CLEANED_FILES,
    503: CLIENT_AWAY,
    **PARTS,
    206: Gives("the part that Range requested", "application/octet-stream"),
}


@route(
    "GET", "/jobs/<job_id>/files/<path:path>", "server", who="user portal operator", slow=True, takes=(ID, PATH, INLINE), gives=FILE_GIVES
)
def job_file(server: Server, request: Request, job_id: int, path: str, inline: str) -> Answer:
    """Fetch one file of a job without the rest. X-File-CRC32 is that of the whole file, if it is known."""
    job, wanted = known_job(server, request, job_id), asked_path(request)
    with contextlib.ExitStack() as stack:
        try:
            found = in_files(server, request, job, stack, lambda source: source.find(wanted))
        except NotAFile as error:
            shown = one_line(shown_path(wanted), 80)
            said = f"{shown!r} of job {job.id} is {error}" if str(error) else f"job {job.id} has no file {shown!r}"
            raise HttpError(404, f"{said}: see /jobs/{job.id}/files", "path") from error
        name, way = quote(os.path.basename(wanted), safe=""), "inline" if inline == "1" else "attachment"
        headers = {
            "Content-Type": content_type(found.head, inline == "1"),
            "Content-Disposition": f"{way}; filename*=UTF-8''{name}",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "X-Job-Status": job.status.value,
            **({} if found.crc is None else {"X-File-CRC32": f"{found.crc:08x}"}),
        }
        answer, begin, end = ranged(request, found.size, found.tag, headers)
        if request.method == "GET" and answer.status != 304:
            answer.body = body_of(job, found.part(begin, end), stack.pop_all())
    return answer


def in_files(server: Server, request: Request, job: Job, stack: contextlib.ExitStack, look: Callable[[Source], T]) -> T:
    """Return what `look` finds in the files of a job, wherever they are now; `stack` closes what was opened.

    Raises HttpError 404 if its client sent a damaged ZIP, 410 if the files are deleted, 503 if they cannot be seen now.
    """
    refuse_cleaned(job)
    link = server.links.get(job.client or "")
    try:
        if job.result_sha256 is not None:
            file = stack.enter_context(stored_archive(server, job).file)
            return look(ZipFiles(file, places_of(server, job.mark, job.result_sha256, file), job.result_sha256))
        if not (job.status in BUSY and job.dest_id and link):
            return look(FolderFiles(stack.enter_context(opened_folder(server.folder(job), flags=os.O_RDONLY)), stack))
        try:
            return look(LiveFiles(server, request, link, job))
        except Gone:  # an older client sends all of its files, or none
            archive = running_archive(server, request, link, job)
            file = stack.enter_context(contextlib.closing(archive.file))
            return look(ZipFiles(file, sorted_places(file, server.config.max_zip_members), archive.sha256))
    except ValueError as error:
        log.warning("job %d: its files cannot be read: %s", job.id, error)
        raise HttpError(404, f"the files of job {job.id} cannot be read: its client sent a damaged ZIP") from error


def body_of(job: Job, chunks: Iterator[bytes], stack: contextlib.ExitStack) -> Iterator[bytes]:
    """Yield a file, or fewer bytes than its length if it cannot be read: then the connection is closed, so that the caller notices."""
    with stack:
        try:
            yield from chunks
        except (OSError, ValueError, Gone, NotAFile, HttpError) as error:
            log.warning("job %d: one of its files was sent only in part: %s", job.id, error)


def asked_path(request: Request) -> bytes:
    """Return the path after /files/ in a request. Raises HttpError 400 if it is not a relative path that stays inside."""
    path: bytes = request.environ["bottle.raw_path"].partition("/files/")[2].encode("latin-1")
    refuse_path(path)
    return path


def content_type(head: bytes, may_show_images: bool) -> str:
    """Return text/plain for the first bytes of a text; else the type of an image, if a browser may show it, or octet-stream."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        text = "\0"
    if not any(char < " " and char not in "\t\n\r\f\x1b" for char in text):
        return TEXT_TYPE
    known = (kind for start, kind in IMAGES if may_show_images and head.startswith(start))
    return next(known, "application/octet-stream")


@route(
    "GET", "/files/<job_id>", "client", who="operator", slow=True, takes=(PAYLOAD_ID, MARK, LIMIT._replace(most=1001), AFTER),
    gives={200: LISTED, 400: BAD, 404: NOT_FOUND},
)  # fmt: skip
def payload_files(client: Client, request: Request, job_id: int, limit: int, after: bytes) -> Answer:
    """List the files in a payload's work folder, also while it runs."""
    with contextlib.ExitStack() as stack:
        work = work_files(client, known_payload(client, request, job_id), stack)
        return Answer({"files": work.page(after, limit) if work else [], "next": None})


OFFSET = Parameter("offset", "query", "integer", "the first byte", 0, least=0, most=10**18, default=0)
COUNT = Parameter("count", "query", "integer", "the most bytes to return", 4096, least=1, most=PART_BYTES, default=PART_BYTES)


@route(
    "GET",
    "/file/<job_id>",
    "client",
    who="operator",
    slow=True,
    takes=(PAYLOAD_ID, MARK, PATH._replace(place="query", help="the path of the file", missing="give the path of the file"), OFFSET, COUNT),
    gives={206: Gives("a part of the file; Content-Range has its size", "application/octet-stream"), 400: BAD, 404: NOT_FOUND},
)
def payload_file(client: Client, request: Request, job_id: int, path: str, offset: int, count: int) -> Answer:
    """Read a part of a file in a payload's work folder."""
    with contextlib.ExitStack() as stack:
        work = work_files(client, known_payload(client, request, job_id), stack)
        try:
            if work is None:
                raise NotAFile
            file = stack.enter_context(work.open(os.fsencode(path)))
        except NotAFile as error:  # not 404: the server would think that there is no such payload
            raise HttpError(400, str(error), "path") from error
        size = file.seek(0, os.SEEK_END)
        file.seek(min(offset, size))
        data = file.read(count)
        span = f"{offset}-{offset + len(data) - 1}" if data else "*"
        return Answer(data, 206, {"Content-Type": "application/octet-stream", "Content-Range": f"bytes {span}/{size}"})


def work_files(client: Client, job: Job, stack: contextlib.ExitStack) -> FolderFiles | None:
    """Return the files in a payload's work folder; None if its script removed the folder, or if it was cleaned."""
    try:
        return FolderFiles(stack.enter_context(opened_folder(client.folder(job), "work", flags=os.O_RDONLY)), stack)
    except OSError:
        return None
