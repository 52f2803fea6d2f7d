"""What an upload may bring besides plain files: archives, a digest of the body, Windows line ends; and what a retry may replace."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import (
    Pair,
    Process,
    assert_error,
    download,
    field_part,
    file_part,
    form,
    form_type,
    free_port,
    nothing_left,
    post_form,
    tar_of,
    upload,
    wait_status,
    zip_of,
)

MIB = 1 << 20
FIELDS = [field_part("user_id", "1"), field_part("service", "example")]
RUN = b"#!/bin/bash\nls -R > listed; ./tool > said; cat data/in.txt\n"
TOOL = b"#!/bin/bash\necho tool\n"
TREE = {"run.sh": (RUN, 0o644), "tool": (TOOL, 0o755), "data/in.txt": (b"hello\n", 0o640), "data/quiet.sh": (TOOL, 0o600)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server without a client, where all files of a job together have at most 16 MiB."""
    settings = {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}", "JOBORCH_MAX_UPLOAD": "16M"}
    process = Process("server", tmp_path_factory.mktemp("uploads"), settings)
    try:
        yield process.start()
    finally:
        process.close()


def send(process: Process, archive: bytes, name: str = "tree", *more: bytes, **headers: str) -> requests.Response:
    """Upload an archive, and further parts."""
    return post_form(process, [file_part(name, archive, "archive"), *more, *FIELDS], **headers)


def inputs_of(process: Process, answer: requests.Response) -> dict[str, bytes]:
    """The files that the server keeps for a job."""
    folder = Path(answer.json()["loc"])
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# == Archives ==

WAYS: dict[str, Callable[[str], bytes]] = {
    "zip": lambda top: zip_of(TREE, top),
    "zip stored": lambda top: zip_of(TREE, top, zipfile.ZIP_STORED),
    "tar of GNU": lambda top: tar_of(TREE, "w", top, format=tarfile.GNU_FORMAT),
    "tar of POSIX": lambda top: tar_of(TREE, "w", top, format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 600}),
    "tar.gz": lambda top: tar_of(TREE, "w:gz", top),
    "tar.gz in two pieces": lambda top: (tar := tar_of(TREE, "w", top)) and gzip.compress(tar[:700]) + gzip.compress(tar[700:]),
}


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("top", ["", "./", "project-1/"])
def test_an_archive_runs_as_its_files_would(pair: Pair, make: Callable[[str], bytes], top: str) -> None:
    """With its permissions, and without the folder around it."""
    answer = send(pair.server, make(top), "tree.tar.gz")
    assert answer.status_code == 201, answer.text
    assert answer.json()["warnings"] == []
    kept = {path: (Path(answer.json()["loc"]) / path).stat().st_mode & 0o777 for path in TREE}
    assert kept == {path: rights for path, (_, rights) in TREE.items()}
    job = wait_status(pair.server, answer.json()["id"], "Completed")
    result = download(pair.server, job["id"])
    assert result["said"] == b"tool\n"
    modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in result.zip.infolist() if entry.filename in TREE}
    assert modes == {path: rights for path, (_, rights) in TREE.items()}


def test_a_folder_around_other_things_stays(server: Process) -> None:
    """It is left out only if all files of the archive are in it, with run.sh on top."""
    two = {"run.sh": (RUN, 0o644), "project/run.sh": (RUN, 0o644)}
    assert set(inputs_of(server, send(server, tar_of(two)))) == {"run.sh", "project/run.sh"}
    deep = tar_of({"a/b/run.sh": (RUN, 0o644)})
    assert_error(send(server, deep), 400, "there is no run.sh, but a/b/run.sh")
    macos = zip_of({"p/run.sh": (RUN, 0o644), "__MACOSX/p/._run.sh": (b"x", 0o644)})
    assert set(inputs_of(server, send(server, macos))) == {"run.sh"}


def test_archives_and_files_together(server: Process) -> None:
    """What several parts bring lies side by side, whatever their order; one name stays one file."""
    nested = zip_of({"a/a/a": (b"deep", 0o644), "a/run.sh": (RUN, 0o755)})
    other = tar_of({"data/x": (b"x", 0o644)})
    parts = [file_part("a/here", b"here"), file_part("n", nested, "archive"), file_part("o", other, "archive"), file_part("data/y", b"y")]
    answer = post_form(server, [*parts, *FIELDS])
    expected = {"a/here": b"here", "a/a": b"deep", "run.sh": RUN, "data/x": b"x", "data/y": b"y"}
    assert inputs_of(server, answer) == expected
    with nothing_left(server):
        twice = [file_part("run.sh", RUN), file_part("n", nested, "archive")]
        assert_error(post_form(server, [*twice, *FIELDS]), 400, "'run.sh' is used twice")
        assert_error(post_form(server, [*twice[::-1], *FIELDS]), 400, "'run.sh' is used twice")


def test_the_same_files_by_any_way_have_one_key(server: Process) -> None:
    """A repeat may bring as an archive what came as files, and the other way round."""
    files = [file_part(path, content) for path, (content, _) in TREE.items()]
    numbers = {post_form(server, [*files, *FIELDS], **{"Idempotency-Key": "k"}).json()["id"]}
    numbers |= {send(server, make("top/"), **{"Idempotency-Key": "k"}).json()["id"] for make in WAYS.values()}
    assert len(numbers) == 1


def with_member(kind: bytes, **more: Any) -> bytes:
    """A tar with run.sh and a member of another kind."""
    spool = io.BytesIO()
    with tarfile.open(fileobj=spool, mode="w") as archive:
        run = tarfile.TarInfo("run.sh")
        run.size = len(RUN)
        archive.addfile(run, io.BytesIO(RUN))
        header = tarfile.TarInfo("other")
        header.type = kind
        for name, value in more.items():
            setattr(header, name, value)
        archive.addfile(header)
    return spool.getvalue()


def zip_with(change: Callable[[zipfile.ZipInfo], object]) -> bytes:
    """A ZIP with run.sh and a member whose directory entry is changed."""
    spool = io.BytesIO()
    with zipfile.ZipFile(spool, "w") as archive:
        archive.writestr("run.sh", RUN)
        archive.writestr("other", b"content")
        change(archive.filelist[1])
    return spool.getvalue()


def patched(data: bytes, old: bytes, new: bytes, times: int = -1) -> bytes:
    assert old in data
    return data.replace(old, new, times)


def encrypted_zip() -> bytes:
    """A ZIP whose member claims to be encrypted, in both headers."""
    return zip_with(lambda entry: setattr(entry, "flag_bits", 1))


def endless_headers() -> bytes:
    """A tar whose extended header has 100 MB, which gzip makes small."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 100 * MIB
    return gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(100 * MIB), 1)


def sparse_map() -> bytes:
    """A tar whose map of a sparse file never ends: tarfile would keep all of it in memory."""
    header = tarfile.TarInfo("sparse")
    records = b"".join(
        pax_record(b"GNU.sparse." + name, value) for name, value in ((b"major", b"1"), (b"minor", b"0"), (b"realsize", b"1"))
    )
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size, header.size = tarfile.XHDTYPE, len(records), 1 << 33
    blocks = pax.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0") + header.tobuf(tarfile.GNU_FORMAT)
    return gzip.compress(blocks + b"99999999999\n" + b"0\n" * (30 * MIB), 1)


def pax_record(name: bytes, value: bytes) -> bytes:
    size = len(name) + len(value) + 3
    while size != len(name) + len(value) + 3 + len(str(size)):
        size = len(name) + len(value) + 3 + len(str(size))
    return b"%d %s=%s\n" % (size, name, value)


def overlapping() -> bytes:
    """A ZIP bomb whose 5,000 entries share one member of 1 MiB."""
    data = zip_of({"run.sh": (RUN, 0o644), "b0000": (bytes(MIB), 0o644)})
    begin = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    end = data.index(b"PK\5\6")
    entry = data[begin:end]
    more = b"".join(entry.replace(b"b0000", b"b%04d" % number) for number in range(1, 5000))
    count, size, place = struct.unpack_from("<HLL", data, end + 10)
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count + 4999, count + 4999, size + len(more), place, 0)
    return data[:end] + more + tail


def many_members() -> bytes:
    """A tar that is damaged after 20,001 folders: it is refused for their number, so nothing was read beyond the limit."""
    header = tarfile.TarInfo("d")
    header.type = tarfile.DIRTYPE
    return gzip.compress(header.tobuf() * 20_001 + b"x" * 512, 1)


def of_names(*names: str) -> list[bytes]:
    """The same names in a tar and in a ZIP."""
    files = {"run.sh": (RUN, 0o644), **dict.fromkeys(names, (b"x", 0o644))}
    return [tar_of(files), zip_of(files)]


BAD: dict[str, tuple[bytes | Callable[[], bytes], list[str]]] = {
    **{f"absolute {n}": (each, ["'/etc/passwd' is absolute"]) for n, each in enumerate(of_names("/etc/passwd"))},
    **{f"dots {n}": (each, ["'../x' contains '..'"]) for n, each in enumerate(of_names("../x"))},
    **{f"dots inside {n}": (each, ["contains '..'"]) for n, each in enumerate(of_names("a/../../x"))},
    **{f"long part {n}": (each, ["too long"]) for n, each in enumerate(of_names("x" * 300))},
    **{f"deep {n}": (each, ["folders deep"]) for n, each in enumerate(of_names("/".join("abcdefghijklmnopqrst")))},
    **{f"file and folder {n}": (each, ["both a file and a folder"]) for n, each in enumerate(of_names("a", "a/b"))},
    **{f"control {n}": (each, ["control character"]) for n, each in enumerate(of_names("a\nb"))},
    "too many members in a tar": (many_members, ["20,000"]),
    "100,000 members in a ZIP": (lambda: zip_of({f"m{n}": (b"", 0o644) for n in range(100_000)}), ["20,000"]),
    "duplicate in a tar": (tar_of({"run.sh": (RUN, 0o644)})[:1024] + tar_of({"run.sh": (RUN, 0o644)}), ["is used twice"]),
    "symbolic link": (with_member(tarfile.SYMTYPE, linkname="/etc/passwd"), ["'other' is a link", "--dereference"]),
    "hard link": (with_member(tarfile.LNKTYPE, linkname="run.sh"), ["'other' is a link", "--hard-dereference"]),
    "device": (with_member(tarfile.CHRTYPE, devmajor=1, devminor=3), ["'other' is neither a file nor a folder"]),
    "pipe": (with_member(tarfile.FIFOTYPE), ["neither"]),
    "unknown kind": (with_member(b"Q"), ["neither"]),
    "folder with dots": (with_member(tarfile.DIRTYPE, name="../up"), ["'..'"]),
    "sparse": (with_member(tarfile.GNUTYPE_SPARSE), ["'other'"]),
    "link in a ZIP": (zip_with(lambda entry: setattr(entry, "external_attr", 0o120777 << 16)), ["'other' is a link"]),
    "device in a ZIP": (zip_with(lambda entry: setattr(entry, "external_attr", 0o020666 << 16)), ["'other' is a device"]),
    "encrypted": (encrypted_zip(), ["'other' is encrypted"]),
    "bzip2 in a ZIP": (zip_of({"run.sh": (RUN, 0o644)}, method=zipfile.ZIP_BZIP2), ["compressed by method 12"]),
    "tar.bz2": (tar_of(TREE, "w:bz2"), ["made by bzip2", "send a zip, tar or tar.gz"]),
    "tar.xz": (tar_of(TREE, "w:xz"), ["made by xz"]),
    "bomb in a tar.gz": (lambda: tar_of({"run.sh": (RUN, 0o644), "zeros": (bytes(64 * MIB), 0o644)}, "w:gz"), ["JOBORCH_MAX_UPLOAD"]),
    "bomb in a ZIP": (lambda: zip_of({"run.sh": (RUN, 0o644), "zeros": (bytes(64 * MIB), 0o644)}), ["JOBORCH_MAX_UPLOAD"]),
    "overlapping bomb": (overlapping, ["JOBORCH_MAX_UPLOAD"]),
    "endless headers": (endless_headers, ["header of a file"]),
    "endless map": (sparse_map, ["archive"]),
    "endless end": (lambda: gzip.compress(tar_of(TREE) + bytes(64 * MIB), 1), ["header of a file"]),
    "only archives in it": (tar_of({"inner.zip": (zip_of(TREE), 0o644)}), ["no run.sh among inner.zip"]),
    "empty": (b"", ["is no zip, tar or tar.gz"]),
    "a script": (RUN, ["is no zip, tar or tar.gz", "send single files as file=@NAME"]),
    "noise": (random.Random(4).randbytes(5000), ["is no zip, tar or tar.gz"]),
    "only gzip": (gzip.compress(RUN), ["is no zip, tar or tar.gz"]),
    "wrong checksum in a ZIP": (zip_with(lambda entry: setattr(entry, "CRC", 1)), ["damaged or incomplete"]),
    "wrong size in a ZIP": (zip_with(lambda entry: setattr(entry, "file_size", 3)), ["damaged or incomplete"]),
    "wrong header in a tar": (patched(tar_of(TREE), b"data/quiet.sh", b"data/Quiet.sh", 1), ["damaged or incomplete"]),
    "wrong checksum in a gzip": (tar_of(TREE, "w:gz")[:-8] + bytes(4) + tar_of(TREE, "w:gz")[-4:], ["damaged or incomplete"]),
}  # fmt: skip


@pytest.mark.parametrize(("archive", "words"), BAD.values(), ids=BAD.keys())
def test_bad_archives(server: Process, archive: bytes | Callable[[], bytes], words: list[str]) -> None:
    """Each is refused by a sentence, and nothing of it is kept; the memory stays small."""
    before, archive = peak_kib(server), archive() if callable(archive) else archive
    with nothing_left(server):
        said = assert_error(send(server, archive, "tree.bin"), 400, *words)
    assert said["field"] in ("archive", "file")
    assert "Traceback" not in server.log
    assert peak_kib(server) - before < 60 * 1024


def peak_kib(process: Process) -> int:
    """The most memory that a process had so far."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("kind", ["zip", "tar of GNU", "tar.gz"])
def test_archives_cut_anywhere(server: Process, kind: str) -> None:
    """No shorter beginning of an archive is taken for a whole one, except for the blocks that fill up a tar."""
    whole = WAYS[kind]("")
    least = whole.rstrip(b"\0") if kind.startswith("tar of") else whole
    with nothing_left(server):
        for size in sorted({*range(0, len(least), 100 if kind == "tar.gz" else 512), len(least) - 1}):
            assert_error(send(server, whole[:size], "tree"), 400, "archive 'tree'")


def test_an_upload_of_an_archive_is_a_file_on_a_client(pair: Pair) -> None:
    """Between machines, a part's name is a path, and any path is possible."""
    token = {"Authorization": f"Bearer {pair.TOKEN}"}
    body = form([file_part("run.sh", b"cat archive > copy", "run.sh"), file_part("archive", b"plain", "archive")])
    payload = pair.client.post("/submit", data=body, headers={**form_type(), **token}).json()
    assert (Path(payload["loc"]) / "work" / "archive").exists() or (Path(payload["loc"]) / "archive").exists()


# == Digest ==


def digest_of(body: bytes, name: str = "sha256") -> str:
    return f"{name.replace('sha', 'sha-')}=:{base64.b64encode(hashlib.new(name, body).digest()).decode()}:"


def test_content_digest(server: Process) -> None:
    """A body that is not the one of its digest is refused, and nothing of it is kept."""
    body = form([file_part("run.sh", RUN), *FIELDS])
    right = [digest_of(body), digest_of(body, "sha512"), f"md5=:AAAA:, {digest_of(body)}", digest_of(body).replace("sha", "SHA")]
    for said in right:
        assert server.post("/upload", data=body, headers={**form_type(), "Content-Digest": said}).status_code == 201
    wrong = [
        digest_of(body + b"x"),
        f"{digest_of(body)}, {digest_of(b'', 'sha512')}",
        "sha-256=::",
        "md5=:AAAA:",
        "sha-256",
        digest_of(body)[:-9] + ":",
    ]
    with nothing_left(server):
        for said in wrong:
            answer = server.post("/upload", data=body, headers={**form_type(), "Content-Digest": said})
            assert assert_error(answer, 400)["field"] == "Content-Digest", said
        for said in ("sha-256=::", "SHA-512=:AAAA:", f"sha-256=:{hashlib.sha256(body).hexdigest()}:", "sha-256=:a b:"):
            answer = server.post("/upload", data=body, headers={**form_type(), "Content-Digest": said})
            assert_error(answer, 400, "is not the base64 of ", " bytes: send it as in")
        cut = body[:-40]
        answer = server.post("/upload", data=cut, headers={**form_type(), "Content-Digest": digest_of(body)})
        assert_error(answer, 400, "does not match its Content-Digest")


def test_content_digest_of_a_retry_whose_form_was_lost(server: Process) -> None:
    """Without it the job would run as before, although the caller had asked for something else."""
    number = server.post("/upload", data=form([file_part("run.sh", RUN), *FIELDS]), headers=form_type()).json()["id"]
    with nothing_left(server):
        answer = server.post(f"/jobs/{number}/retry", headers={"Content-Digest": digest_of(b"a form")})
        assert_error(answer, 400, "does not match its Content-Digest")
    assert server.post(f"/jobs/{number}/retry", headers={"Content-Digest": digest_of(b"")}).status_code == 201


def test_content_digest_with_the_rest_after_the_form(server: Process) -> None:
    """The digest is that of the whole body, also of what a form does not need."""
    body = form([file_part("run.sh", RUN), *FIELDS]) + b"\r\nepilogue"
    headers = {**form_type(), "Content-Digest": digest_of(body)}
    answer = server.post("/upload", data=body, headers=headers)
    assert answer.status_code in (201, 400)
    if answer.status_code == 400:
        assert "Content-Digest" not in answer.text


# == Line ends ==

CRLF = b"#!/bin/bash\r\necho one\r\nprintf 'a\\rb' > out\r\n"


def test_windows_line_ends(pair: Pair) -> None:
    """They are refused with the remedy, or changed, or kept; the middle of a line stays as it is."""
    with nothing_left(pair.server):
        said = assert_error(upload(pair.server, {"run.sh": CRLF}), 400, "CRLF", "dos2unix", "-F crlf=fix")
        assert said["field"] == "crlf"
        assert_error(upload(pair.server, {"run.sh": CRLF}, crlf="yes"), 400, "fix or keep")
    other = b"kept\r\n"
    answer = upload(pair.server, {"run.sh": CRLF, "data.txt": other}, crlf="fix")
    job = wait_status(pair.server, answer.json()["id"], "Completed")
    files = download(pair.server, job["id"])
    assert (files["out"], files["data.txt"], files["run.sh"]) == (b"a\rb", other, CRLF.replace(b"\r\n", b"\n"))
    assert answer.json()["warnings"] == []


def test_line_ends_at_the_edges_of_chunks(server: Process) -> None:
    """A pair that is read in two pieces is one, too."""
    for filler in (MIB - 3, MIB - 2, MIB - 1, MIB):
        script = b"#" * filler + b"\r\ntrue\r\r\nlast\r"
        answer = upload(server, {"run.sh": script}, crlf="fix")
        assert inputs_of(server, answer)["run.sh"] == script.replace(b"\r\n", b"\n")
        assert_error(upload(server, {"run.sh": script}), 400, "CRLF")


# == Retry ==


def retry(process: Process, number: int, *parts: bytes, **headers: str) -> requests.Response:
    if not parts:
        return process.post(f"/jobs/{number}/retry", headers=headers)
    return process.post(f"/jobs/{number}/retry", data=form(parts), headers={**form_type(), **headers})


def test_a_retry_may_replace_fields_and_files(server: Process) -> None:
    """What the form does not replace is the first job's. `retry_of` has the id of that job, in the answer and later."""
    answer = upload(server, {"run.sh": RUN, "a/in.txt": b"old", "b": b"b"}, name="first", memory="2G", timeout="90", retries=1)
    assert answer.status_code == 201, answer.text
    first = answer.json()
    second = retry(server, first["id"]).json()
    assert (first["retry_of"], second["retry_of"], second["name"]) == (None, first["id"], "first")
    assert server.get(f"/jobs/{second['id']}").json()["retry_of"] == first["id"]
    replaced = [
        field_part("name", "third"),
        field_part("memory", "3G"),
        field_part("odd", "1"),
        file_part("a/in.txt", b"new"),
        file_part("c/d", b"more"),
    ]
    answer = retry(server, second["id"], *replaced)
    third = answer.json()
    assert (third["retry_of"], third["name"], third["memory"], third["timeout"], third["retries"]) == (second["id"], "third", 3072, 90, 1)
    assert "'odd' is not known" in third["warnings"][0]
    assert inputs_of(server, answer) == {"run.sh": RUN, "a/in.txt": b"new", "b": b"b", "c/d": b"more"}
    assert (Path(first["loc"]) / "a/in.txt").read_bytes() == b"old"


def test_what_a_retry_may_not_replace(server: Process) -> None:
    """Each is a clear error, and nothing is kept."""
    number = upload(server, {"run.sh": RUN, "a/in.txt": b"old"}).json()["id"]
    with nothing_left(server):
        assert_error(retry(server, number, field_part("user_id", "2")), 400, "belong to user 1")
        assert_error(retry(server, number, field_part("service", "nowhere")), 400, "nowhere")
        assert_error(retry(server, number, file_part("a", b"file")), 400, "both a file and a folder")
        assert_error(retry(server, number, file_part("run.sh", CRLF)), 400, "CRLF")
        assert_error(retry(server, number, field_part("cpus", "0")), 400, "cpus")
        assert_error(retry(server, 10**9, field_part("cpus", "1")), 404)
        assert_error(server.post(f"/jobs/{number}/retry", data=b"x", headers={"Content-Type": "text/plain"}), 415)
    same = retry(server, number, field_part("user_id", "1"), file_part("run.sh", CRLF), field_part("crlf", "fix"))
    assert same.status_code == 201


def test_the_key_of_a_retry_covers_what_it_replaces(server: Process) -> None:
    number = upload(server, {"run.sh": RUN}).json()["id"]
    key = {"Idempotency-Key": "retry-key"}
    made = retry(server, number, file_part("more", b"1"), **key).json()["id"]
    assert retry(server, number, file_part("more", b"1"), **key).json()["id"] == made
    assert_error(retry(server, number, file_part("more", b"2"), **key), 422)
    assert_error(retry(server, number, **key), 422)


def test_a_retry_may_be_repeated_although_the_first_job_is_gone(server: Process) -> None:
    """Its answer may have been lost; the job that it made has files of its own. Another retry is refused."""
    first, key = upload(server, {"run.sh": RUN}).json(), {"Idempotency-Key": "retry-of-deleted"}
    made = retry(server, first["id"], **key).json()["id"]
    shutil.rmtree(first["loc"])
    with nothing_left(server):
        assert retry(server, first["id"], **key).json()["id"] == made
        assert_error(retry(server, first["id"], field_part("name", "other"), **key), 422)
        assert_error(retry(server, first["id"]), 410)


def test_a_retry_of_changed_files_is_refused(server: Process) -> None:
    """With new files beside them, the old ones are compared with their digest; without, the client compares all."""
    first = upload(server, {"run.sh": RUN, "b": b"b"}).json()
    (Path(first["loc"]) / "b").write_bytes(b"c")
    with nothing_left(server):
        assert_error(retry(server, first["id"], file_part("new", b"")), 410)
