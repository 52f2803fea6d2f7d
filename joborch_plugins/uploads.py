"""What an upload may bring besides plain files: archives, a Content-Digest, Windows line ends, and results of other jobs."""

from __future__ import annotations

import base64
import binascii
import functools
import gzip
import hashlib
import hmac
import itertools
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from joborch import (
    CHUNK_BYTES,
    DIRECTORY_LIMIT_BYTES,
    KIB,
    MIB,
    PARTS_LIMIT,
    FormReader,
    HttpError,
    Input,
    InputsChanged,
    Job,
    Reason,
    Server,
    StoredFile,
    Tree,
    ZipRecord,
    check_path,
    crash_point,
    digest_of_chunks,
    discard,
    file_chunks,
    file_sha256,
    ids_in,
    inputs_digest,
    log,
    member_chunks,
    new_uuid,
    read_member,
    shown,
    size_text,
    zip_directory,
    zip_records,
)

# == 1. Archives ==  They are unpacked with little memory, whatever their headers say, and under the rules for names in forms.

HEADER_LIMIT_BYTES = MIB  # of one member of a tar, with its extended headers
OTHER_FORMATS = ((b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"7z\xbc\xaf", "7-Zip"), (b"Rar!", "RAR"))
NOT_KEPT = {stat.S_IFLNK: "a link", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}

Member = tuple[str, int, Iterator[bytes]]  # its path, its permissions, its content


def unpack(reader: FormReader, name: str, file: IO[bytes]) -> None:
    """Store the files in a ZIP, tar or tar.gz in the folder of `reader`, without a folder around all of them that has run.sh.

    Folders are made for the files in them. Raises HttpError 400 for an archive with anything else, DiskFull, and OSError.
    """
    first = len(reader.form.files)
    try:
        for path, mode, chunks in members(file):
            reader.file(path, within_limit(reader, chunks), mode)
        crash_point("unpack.stored")
        strip_top(reader, first)
    except HttpError as error:
        raise HttpError(400, f"archive {shown(name)}: {error.message}", "archive") from error
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        text = f"archive {shown(name)} is damaged or incomplete: make it again, and send it as it is"
        raise HttpError(400, text, "archive") from error


def within_limit(reader: FormReader, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the content of a file while all files together are small enough, and the disk has room."""
    size, most = reader.stored_bytes, reader.unpack_limit_bytes
    for chunk in chunks:
        size += len(chunk)
        if size > most:
            raise HttpError(400, f"its files have more than {size_text(most)} in all, which is the limit (JOBORCH_MAX_UPLOAD)")
        reader.reserve(len(chunk))
        yield chunk


def members(file: IO[bytes]) -> Iterator[Member]:
    """Return an iterator over the files in an archive. Raises HttpError if it is of another kind."""
    file.seek(0)
    head = file.read(8)
    file.seek(0)
    if head.startswith(b"PK"):
        return zip_members(file)
    for magic, kind in OTHER_FORMATS:
        if head.startswith(magic):
            raise HttpError(400, f"it is made by {kind}: send a zip, tar or tar.gz")
    source: Any = gzip.GzipFile(fileobj=file) if head.startswith(b"\x1f\x8b") else file
    if not begins_tar(source.read(tarfile.BLOCKSIZE)):
        raise HttpError(400, "it is no zip, tar or tar.gz: make one, as in tar czf tree.tar.gz folder; send single files as file=@NAME")
    source.seek(0)
    return tar_members(TarSource(source))


def begins_tar(block: bytes) -> bool:
    """Tell whether a tar may begin with this block: with a header, or with its end."""
    if len(block) < tarfile.BLOCKSIZE or not any(block):
        return len(block) == tarfile.BLOCKSIZE
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def member_path(name: str) -> str:
    """Return the path of a member. Raises HttpError for a name that cannot be used."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise HttpError(400, f"file name {shown(name)} is not UTF-8: rename the file") from error
    return check_path(name)


def check_count(count: int) -> None:
    """Raise HttpError if an archive has more members than a job may have files."""
    if count > PARTS_LIMIT:
        raise HttpError(400, f"it has more than {PARTS_LIMIT:,} files and folders: send fewer, or an archive that run.sh unpacks")


def zip_members(file: IO[bytes]) -> Iterator[Member]:
    """Yield the files in a ZIP."""
    _, size, count = zip_directory(file)
    check_count(count)
    records = list(zip_records(file)) if size <= DIRECTORY_LIMIT_BYTES else []
    check_count(len(records))
    if len(records) != count:
        raise ValueError("its directory is damaged")
    for record in records:
        try:
            name = record.name.decode()
        except UnicodeDecodeError:
            name = record.name.decode("cp437")  # APPNOTE 6.3.10, D.1
        if name.startswith("__MACOSX/"):
            continue  # what macOS adds for its own use
        path, kind = member_path(name.rstrip("/") or name), stat.S_IFMT(record.mode)
        if name.endswith("/") or kind == stat.S_IFDIR:
            continue
        if kind not in (0, stat.S_IFREG):
            raise HttpError(400, f"{shown(path)} is {NOT_KEPT.get(kind, 'no file')}: send files and folders only")
        if record.flags & 0x41:  # encrypted, in one way or another
            raise HttpError(400, f"{shown(path)} is encrypted: send it without a password")
        if record.method not in (0, 8):
            raise HttpError(400, f"{shown(path)} is compressed by method {record.method}: use deflate, as zip does unless told otherwise")
        yield path, record.mode or 0o644, member_chunks(file, record)


class TarSource:
    """A tar as tarfile reads it. It would keep headers of any size in memory, so reading fails when they are too large."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, HEADER_LIMIT_BYTES

    def read(self, size: int) -> bytes:
        """Return the next bytes of the tar. Raises HttpError if too many are read for one header."""
        data = bytes(self.file.read(size))
        self.left -= len(data)
        if self.left < 0:
            raise HttpError(400, f"the header of a file has more than {size_text(HEADER_LIMIT_BYTES)}: make the archive again")
        return data


class TarHeader(tarfile.TarInfo):
    """A header of a tar. tarfile takes a broken one for the end of the archive; here it is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> TarHeader:
        """Return the header in a block. Raises EOFError if it is broken or missing, HeaderError at the end of the archive."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise EOFError(str(error)) from error


def tar_members(source: TarSource) -> Iterator[Member]:
    """Yield the files in a tar."""
    archive: Any = tarfile.TarFile.open(fileobj=source, mode="r|", bufsize=64 * KIB, tarinfo=TarHeader)  # type: ignore[call-overload]
    count = 0
    while (found := archive.next()) is not None:
        count += 1
        check_count(count)
        archive.members, archive.pax_headers = [], {}  # it would keep them all
        if not (found.isdir() and found.name in ("", ".")):
            path = member_path(found.name)
            if found.issym() or found.islnk():
                raise HttpError(400, f"{shown(path)} is a link: send the file itself, as in tar --dereference --hard-dereference")
            if found.issparse():
                raise HttpError(400, f"{shown(path)} is sparse: make the archive without --sparse")
            if not (found.isreg() or found.isdir()):
                raise HttpError(400, f"{shown(path)} is neither a file nor a folder: send only these")
            if found.isreg():
                yield path, found.mode, tar_content(source, archive, found)
        source.left = HEADER_LIMIT_BYTES
    while source.read(64 * KIB):
        pass  # gzip compares its checksum at the end


def tar_content(source: TarSource, archive: Any, found: Any) -> Iterator[bytes]:
    """Yield the content of a file in a tar."""
    source.left = 2 * CHUNK_BYTES
    for chunk in file_chunks(archive.extractfile(found), found.size):
        yield chunk
        source.left = 2 * CHUNK_BYTES


def strip_top(reader: FormReader, first: int) -> None:
    """Move the files from number `first` on out of the one folder that they are all in, if run.sh lies in it."""
    files = reader.form.files
    top = files[first].path.partition("/")[0] if len(files) > first else ""
    if not any(file.path == f"{top}/run.sh" for file in files[first:]):
        return
    if not all(file.path.startswith(top + "/") for file in files[first:]):
        return
    inner = [file._replace(path=file.path[len(top) + 1 :]) for file in files[first:]]
    tree = Tree()
    for file in [*files[:first], *inner]:
        tree.add(file.path)
    aside = reader.folder / new_uuid()
    os.rename(reader.folder / top, aside)
    crash_point("unpack.aside")
    reader.tree, reader.folders = tree, {""}
    others = [file for file in files[:first] if file.path.startswith(top + "/")]
    for old, file in [*((file.path[len(top) + 1 :], file) for file in others), *((file.path, file) for file in inner)]:
        reader.make_folders(file.path)
        os.rename(aside / old, reader.folder / file.path)
    discard(aside)
    files[first:] = inner


# == 2. Digest ==  A body is compared with its Content-Digest while it is read.


DIGEST_LIKE = "send it as in Content-Digest: sha-256=:BASE64:, where BASE64 is what openssl dgst -sha256 -binary BODY | base64 prints"


class DigestedBody:
    """The body of a request with a Content-Digest (RFC 9530). Raises HttpError 400 if the header has no digest that is known here."""

    def __init__(self, file: IO[bytes], header: str) -> None:
        self.file, self.wanted = file, list[tuple[str, Any, bytes]]()
        for said, value in re.findall(r"(?:^|,)\s*(sha-256|sha-512)\s*=\s*:([^:]*):", header, re.IGNORECASE):
            name, digest = said.lower(), hashlib.new(said.lower().replace("-", ""))
            try:
                wanted = base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
            except (ValueError, binascii.Error):
                wanted = b""
            if len(wanted) != digest.digest_size:
                text = f"{name} in Content-Digest is not the base64 of {digest.digest_size} bytes: {DIGEST_LIKE}"
                raise HttpError(400, text, "Content-Digest")
            self.wanted.append((name, digest, wanted))
        if not self.wanted:
            raise HttpError(400, f"Content-Digest has no SHA-256: {DIGEST_LIKE}", "Content-Digest")

    def read(self, size: int) -> bytes:
        """Return the next bytes of the body."""
        data = self.file.read(size)
        for _, digest, _ in self.wanted:
            digest.update(data)
        return data

    def check(self) -> None:
        """Read the rest of the body. Raises HttpError 400 if it is not what was sent."""
        while self.read(CHUNK_BYTES):
            pass
        for name, digest, wanted in self.wanted:
            if not hmac.compare_digest(digest.digest(), wanted):
                text = f"the body does not match its Content-Digest ({name}): it was damaged on the way, so send it again"
                raise HttpError(400, text, "Content-Digest")


# == 3. Line ends ==  bash takes the CR of a Windows line end for a part of the line.


CRLF = "run.sh has Windows line ends (CRLF), which bash does not understand"


def without_crlf(stored: StoredFile, path: Path, may_fix: bool) -> StoredFile:
    """Return a stored file as it is, or with its line ends changed to LF. Raises HttpError 400 if it has others and may not be changed."""
    if not has_crlf(path):
        return stored
    if not may_fix:
        raise HttpError(
            400, f"{CRLF}: convert it, for example with dos2unix, or have it done by the field crlf=fix, as in -F crlf=fix", "crlf"
        )
    return fix_line_ends(stored, path)


def has_crlf(path: Path) -> bool:
    """Tell whether a file has lines that end with CR and LF."""
    last = b""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            if b"\r\n" in last + chunk:
                return True
            last = chunk[-1:]
    return False


def fix_line_ends(stored: StoredFile, path: Path) -> StoredFile:
    """Change all line ends of a stored file from CR and LF to LF; return what it is now."""
    fixed, digest, last = path.with_name(new_uuid()), hashlib.sha256(), b""
    with open(path, "rb") as source, open(fixed, "xb") as target:
        os.fchmod(target.fileno(), stat.S_IMODE(os.fstat(source.fileno()).st_mode))
        for chunk in itertools.chain(iter(lambda: source.read(CHUNK_BYTES), b""), (b"",)):
            data = last + chunk
            last = b"\r" if chunk and data.endswith(b"\r") else b""  # an LF may follow
            data = data[: len(data) - len(last)].replace(b"\r\n", b"\n")
            target.write(data)
            digest.update(data)
        size = target.tell()
    crash_point("upload.fixed")
    os.replace(fixed, path)
    return StoredFile(stored.path, size, digest.hexdigest())


# == 4. Results of other jobs ==  They are read from the stored ZIPs while they are sent, and have no copy on the server.

LINKS_FOLLOWED = 8


def with_inputs(server: Server, job: Job, folder: Path, paths: Sequence[str]) -> tuple[Job, list[Input]]:
    """Return what a job gets from the results of others, and the job with the digest of all its files. Raises InputsChanged."""
    more = inputs_from(server, job)
    own = {path: file_sha256(folder / path) for path in paths}
    if job.inputs_sha256 not in (None, inputs_digest(own)):
        raise InputsChanged(Reason.FILES_CHANGED)
    taken = {each.path: digest_of_chunks(each.chunks()) for each in more}
    return job._replace(inputs_sha256=inputs_digest({**own, **taken})), more


def inputs_from(server: Server, job: Job) -> list[Input]:
    """Return the files that a job gets from the results of other jobs, in from/ID/. Raises InputsChanged if a result is damaged or gone.

    A link to a file of the result arrives as that file; other links are left out.
    """
    found: list[Input] = []
    for on_id in ids_in(job.from_ids):
        earlier = server.store.get(on_id)
        lost = InputsChanged(Reason.RESULT_LOST.format(job=on_id))
        if earlier is None:
            raise lost
        path = server.data.result(earlier.mark)
        try:
            with open(path, "rb") as file:
                records = {os.path.normpath(os.fsdecode(record.name)): record for record in zip_records(file)}
                links = 0
                for name, record in records.items():
                    target = None if record.name.endswith(b"/") else linked(file, records, name)
                    links += target is None and not record.name.endswith(b"/")
                    if target is not None:
                        content = functools.partial(result_chunks, path, target, lost)
                        found.append(Input(f"from/{on_id}/{name}", target.size, target.mode or 0o644, content))
        except (OSError, ValueError, zlib.error) as error:
            raise lost from error
        if links:
            log.info("job %d does not get %d links of job %d, which lead to no file of its result", job.id, links, on_id)
    return found


def linked(file: IO[bytes], records: Mapping[str, ZipRecord], name: str) -> ZipRecord | None:
    """Return the file of a result that a member is, or is a link to; None if there is none."""
    for _ in range(LINKS_FOLLOWED):
        record = records.get(name)
        if record is None or record.name.endswith(b"/"):
            return None
        if not stat.S_ISLNK(record.mode):
            return record
        name = os.path.normpath(os.path.join(os.path.dirname(name), os.fsdecode(read_member(file, record, 0, 4 * KIB))))
    return None


def result_chunks(path: Path, record: ZipRecord, lost: InputsChanged) -> Iterator[bytes]:
    """Yield the content of a file in a result. Raises `lost` if it is damaged or gone."""
    try:
        with open(path, "rb") as file:
            yield from member_chunks(file, record)
    except (OSError, ValueError, zlib.error) as error:
        raise lost from error
