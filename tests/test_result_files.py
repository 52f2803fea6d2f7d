"""Results that one can pick from: the result or an error, a list of its files, and single files of it, wherever they are."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from harness import Pair, parse_answer, raw_exchange, submit, wait_for, wait_status
from hypothesis import example, given
from hypothesis import strategies as st
from world import BOUNDED, Desk, Peer, Said, Yard, ask, new_folder, packed, reply, together, zip_reply

import joborch
from joborch import DataFolder, Job, Link, Status, clean_tick, sweep
from joborch_plugins import results

MIB = 1 << 20
MEMBERS = {
    "run.sh": b"true\n",
    "out/a.txt": b"a\n" * 3000,
    "out/b.bin": random.Random(1).randbytes(300_000),
    "out.txt": b"",
    "o%20d name": "ümlaut".encode(),
    "ü/ü.html": b"<script>alert(1)</script>",
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


def zipped(members: dict[str, bytes], *links: tuple[str, str]) -> bytes:
    """A ZIP as clients make it."""
    target = io.BytesIO()
    packer = joborch.ZipPacker(target, 1_795_510_800.0)
    for name, content in members.items():
        packer.zip.add(name, 1_795_510_800.0, 0o100640, content, zipfile.ZIP_DEFLATED)
    for name, leads_to in links:
        packer.zip.add(name, 1_795_510_800.0, 0o120777, leads_to.encode())
    packer.zip.finish()
    return target.getvalue()


def with_result(desk: Desk, content: bytes, status: Status = Status.COMPLETED) -> Job:
    """A job that has ended with this result."""
    job = desk.with_client(Status.RUNNING)
    desk.data.result(job.mark).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert desk.store.move(job, status, "because", result_size=len(content), result_sha256=digest)
    return desk[job]


def listed(node: joborch.Node, job: Job, limit: int = 1000) -> list[dict[str, Any]]:
    """All pages of a job's files."""
    rows, query = list[dict[str, Any]](), f"?limit={limit}"
    while query:
        said = ask(node, "GET", f"/jobs/{job.id}/files{query}")
        assert said.status == 200, said
        rows += said.json["files"]
        query = f"?limit={limit}&after={said.json['next']}" if said.json["next"] else ""
    return rows


def pick(node: joborch.Node, job: Job, path: str, **headers: str) -> Said:
    """One file of a job."""
    return ask(node, "GET", f"/jobs/{job.id}/files/{path}", **headers)


# == The result ==


def test_the_result_is_never_something_else(desk: Desk) -> None:
    job = desk.with_client(Status.RUNNING)
    for wanted in (desk.upload(), job):
        said = ask(desk.server, "GET", f"/jobs/{wanted.id}/result")
        assert (said.status, said.json["status"]) == (409, desk[wanted].status.value)
        assert int(said.headers["Retry-After"]) > 0
        assert said.headers["X-Job-Status"] in said.json["message"]
    content = zipped(MEMBERS)
    done = with_result(desk, content)
    said = ask(desk.server, "GET", f"/jobs/{done.id}/result")
    assert (said.status, said.body, said.headers["Content-Type"]) == (200, content, "application/zip")
    assert said.headers["Etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    same = ask(desk.server, "GET", f"/download/{done.id}").headers
    assert {name: said.headers[name] for name in same if name != "Date"} == {name: same[name] for name in same if name != "Date"}
    assert ask(desk.server, "HEAD", f"/jobs/{done.id}/result").headers["Content-Length"] == str(len(content))
    part = ask(desk.server, "GET", f"/jobs/{done.id}/result", Range="bytes=5-9")
    assert (part.status, part.headers["Content-Range"]) == (206, f"bytes 5-9/{len(content)}")
    failed = with_result(desk, content, Status.FAILED)
    said = ask(desk.server, "GET", f"/jobs/{failed.id}/result")
    assert (said.status, said.json["reason"], "Retry-After" in said.headers) == (409, "because", False)
    assert f"/jobs/{failed.id}/files" in said.json["message"]
    for gone in (done, failed):
        assert desk.store.move(desk[gone], Status.CLEANED, "")
        for path in ("result", "files", "files/run.sh"):
            said = ask(desk.server, "GET", f"/jobs/{gone.id}/{path}")
            assert (said.status, "cleaned" in said.json["message"]) == (410, True), path
    assert ask(desk.server, "GET", "/jobs/99/result").status == 404


def test_the_result_can_be_waited_for(desk: Desk) -> None:
    """The answer comes with the end; a caller that cannot wait gets the state."""
    job, content, said = desk.with_client(Status.RUNNING), zipped(MEMBERS), list[Said]()

    def end(_: int) -> None:
        wait_for(lambda: desk.store.core.waiters, 60, "a caller that waits")
        desk.data.result(job.mark).write_bytes(content)
        desk.store.move(desk[job], Status.COMPLETED, "", result_size=len(content), result_sha256=hashlib.sha256(content).hexdigest())

    def wait(_: int) -> None:
        said.append(ask(desk.server, "GET", f"/jobs/{job.id}/result?wait=45"))

    together(2, lambda number: (wait, end)[number](number))
    assert (said[0].status, said[0].body) == (200, content)
    with contextlib.ExitStack() as full:
        while full.enter_context(desk.server.waiters.place()):
            continue
        assert ask(desk.server, "GET", f"/jobs/{desk.upload().id}/result?wait=45").status == 409
    assert ask(desk.server, "GET", f"/jobs/{job.id}/result?wait=x").status == 400


# == Files of a stored result ==


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED], ids=str)
def test_files_of_a_result(status: Status, desk: Desk) -> None:
    job = with_result(desk, zipped(MEMBERS, ("latest", "out/a.txt")), status)
    rows = listed(desk.server, job)
    assert {row["path"]: row["size"] for row in rows} == {**{name: len(content) for name, content in MEMBERS.items()}, "latest": 9}
    assert all(set(row) == {"path", "size", "mode", "mtime", "sha256"} for row in rows)
    small = {name: hashlib.sha256(content).hexdigest() for name, content in MEMBERS.items() if len(content) <= results.HASHED_BYTES}
    assert {row["path"]: row["sha256"] for row in rows} == {**small, "out/b.bin": None, "latest": None}
    modes = {row["path"]: row["mode"] for row in rows}
    assert (modes["run.sh"], modes["latest"]) == ("100640", "120777")
    assert {row["mtime"] for row in rows} == {joborch.rfc3339(1_795_510_800.0)}
    for limit in (1, 2, 3, len(rows)):
        assert listed(desk.server, job, limit) == rows, limit
    for name, content in MEMBERS.items():
        said = pick(desk.server, job, name)
        assert (said.status, said.body) == (200, content), name
        assert said.headers["Content-Length"] == str(len(content))
        assert said.headers["X-File-Crc32"] == f"{zlib.crc32(content):08x}"
        assert said.headers["X-Content-Type-Options"] == "nosniff"
        assert said.headers["X-Job-Status"] == status.value
        assert quote(name.rpartition("/")[2], safe="") in said.headers["Content-Disposition"]


def test_text_is_text_and_nothing_else_is(desk: Desk) -> None:
    """No page of a result becomes a page of the server; images are shown if a caller asks for that."""
    job = with_result(desk, zipped(MEMBERS))
    kinds = {name: pick(desk.server, job, name).headers["Content-Type"] for name in MEMBERS}
    text, data = "text/plain; charset=utf-8", "application/octet-stream"
    assert {name for name, kind in kinds.items() if kind == data} == {"out/b.bin", "picture.png"}
    assert {name for name, kind in kinds.items() if kind == text} == set(MEMBERS) - {"out/b.bin", "picture.png"}
    shown = pick(desk.server, job, "picture.png?inline=1").headers
    assert (shown["Content-Type"], shown["Content-Disposition"][:7]) == ("image/png", "inline;")
    page = pick(desk.server, job, "ü/ü.html?inline=1").headers
    assert (page["Content-Type"], page["Content-Security-Policy"]) == (text, "default-src 'none'; sandbox")
    assert pick(desk.server, job, "run.sh").headers["Content-Disposition"] == "attachment; filename*=UTF-8''run.sh"
    long = with_result(desk, zipped({"cut": b"x" * 4095 + "ü".encode(), "utf-16": "text".encode("utf-16")}))
    assert pick(desk.server, long, "cut").headers["Content-Type"] == text, "a character at the border of what is looked at"
    assert pick(desk.server, long, "utf-16").headers["Content-Type"] == data


def test_parts_of_a_file(desk: Desk) -> None:
    job = with_result(desk, zipped(MEMBERS))
    for name in ("out/a.txt", "out/b.bin"):
        content = MEMBERS[name]
        tag = pick(desk.server, job, name).headers["Etag"]
        for begin, end in ((0, 1), (1, 5000), (4096, 4097), (len(content) - 1, len(content))):
            said = pick(desk.server, job, name, Range=f"bytes={begin}-{end - 1}", If_Range=tag)
            assert (said.status, said.body) == (206, content[begin:end])
            assert said.headers["Content-Range"] == f"bytes {begin}-{end - 1}/{len(content)}"
        assert pick(desk.server, job, name, Range="bytes=0-0", If_Range='"other"').body == content
        assert pick(desk.server, job, name, Range="bytes=-7").body == content[-7:]
        known = pick(desk.server, job, name, If_None_Match=tag)
        assert (known.status, known.body, known.headers["Etag"]) == (304, b"", tag)
        outside = pick(desk.server, job, name, Range=f"bytes={len(content)}-")
        assert (outside.status, outside.headers["Content-Range"]) == (416, f"bytes */{len(content)}")
        head = ask(desk.server, "HEAD", f"/jobs/{job.id}/files/{name}", Range="bytes=0-0")
        assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(content)))
    assert pick(desk.server, job, "out/a.txt").headers["Etag"] != pick(desk.server, job, "out/b.bin").headers["Etag"]


BAD_PATHS = [
    ("../run.sh", 400, "'..'"), ("out/../run.sh", 400, "'..'"), ("./run.sh", 400, "'.'"), ("/etc/passwd", 400, "absolute"),
    ("out//a.txt", 400, "empty part"), ("out/", 400, "empty part"), ("a\0b", 400, "NUL"), ("out", 404, "a folder"),
    ("latest", 404, "a symbolic link to 'out/a.txt'"), ("latest/x", 404, "no file"), ("nothing", 404, "see /jobs/"),
    ("x" * 255, 404, "no file"), ("y" * 256, 404, "no file"), ("run.sh/x", 404, "no file"), ("a/" * 2000 + "b", 404, "no file"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "status", "said"), BAD_PATHS, ids=range(len(BAD_PATHS)))
@pytest.mark.parametrize("place", ["result", "inputs", "client"])
def test_bad_paths(place: str, path: str, status: int, said: str, desk: Desk, yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a clear error; a path leads nowhere else, in a ZIP, in a folder here, or at a client."""
    if place == "result":
        job = with_result(desk, zipped(MEMBERS, ("latest", "out/a.txt")))
    else:
        job = desk.upload() if place == "inputs" else desk.with_client(Status.RUNNING)
        folder = desk.data.job(job.uuid)
        if place == "client":
            payload = yard.submit("true", {"out/a.txt": b"a"})
            folder = yard.folder(payload) / "work"
            desk.store.write(lambda db: db.execute("UPDATE jobs SET dest_id = ? WHERE id = ?", (str(payload.id), job.id)))
            at_client(monkeypatch, yard)
        (folder / "out").mkdir(exist_ok=True)
        (folder / "latest").symlink_to("out/a.txt")
        said = said.replace(" to 'out/a.txt'", "")
    answer = pick(desk.server, desk[job], path)
    assert (answer.status, answer.json["field"]) == (status, "path"), answer
    assert said in answer.json["message"]
    assert desk.quiet()


def at_client(monkeypatch: pytest.MonkeyPatch, yard: Yard) -> None:
    """Have calls for the files of a payload answered by a client in this process."""

    def read_part(link: Link, job: Job, url: str, unwanted: Any = None) -> tuple[Any, bytes]:
        said = ask(yard.client, "GET", url.removeprefix(link.address.base_url))
        if said.status == 404:
            raise joborch.Gone("")
        return type("Reply", (), {"headers": said.headers, "status": said.status}), said.body

    monkeypatch.setattr(results, "read_part", read_part)


def test_a_path_that_is_not_utf8(pair: Pair) -> None:
    """Its listed name is percent-encoded; bottle would drop such bytes of a path and find another file."""
    number = submit(pair.server, "touch ab; printf x > $'a\\xffb'; echo > '%41'; rm run.sh")
    wait_status(pair.server, number, "Completed")
    rows = [row["path"] for row in pair.server.get(f"/jobs/{number}/files").json()["files"]]
    assert rows == ["%41", ".joborch/stderr", ".joborch/stdout", "a%FFb", "ab"]
    assert pair.server.get(f"/jobs/{number}/files/a%25FFb").content == b"x"
    assert pair.server.get(f"/jobs/{number}/files/%2541").content == b"\n"
    answer = pair.server.get(f"/jobs/{number}/files/a%FFb")
    assert (answer.status_code, "a%25FFb" in answer.json()["message"]) == (400, True)
    for other in (f"/jobs/%FF{number}", f"/jobs/{number}/files/%FF", f"/download/{number}%C0%80", "/%FF"):
        answer = pair.server.get(other)
        assert (answer.status_code, answer.json()["field"]) == (400, "path"), "no other job or file is meant"
    for other in (f"/jobs/{number}%0A", f"/jobs/{number}/files%0A", f"/jobs/{number}/files/ab%0A"):
        assert pair.server.get(other).status_code in (400, 404), other
    for path in ("..%2fab", "%2e%2e/ab", "/ab", "%00", "./ab", "a%0Ab"):
        received = raw_exchange(pair.server.port, f"GET /jobs/{number}/files/{path} HTTP/1.0\r\n\r\n".encode())
        status, _, body = parse_answer(received)
        assert status in (400, 404) and json.loads(body)["message"], path


@BOUNDED
@given(st.lists(st.sampled_from("ab./!-ü\0") | st.characters(max_codepoint=999), max_size=6).map("".join), st.sampled_from(["", "%2e%2e/"]))
@example("a", "")
def test_no_path_leads_out(path: str, prefix: str) -> None:
    """Whatever is asked for: a file of the folder, or a refusal."""
    with new_folder() as folder, contextlib.ExitStack() as stack:
        (folder / "work").mkdir()
        (folder / "secret").write_bytes(b"secret")
        (folder / "work/a").write_bytes(b"inside")
        (folder / "work/b").symlink_to("../secret")
        source = results.FolderFiles(stack.enter_context(joborch.opened_folder(folder / "work", flags=os.O_RDONLY)), stack)
        with contextlib.suppress(joborch.HttpError, results.NotAFile, UnicodeEncodeError):
            assert source.find((prefix + path).encode()).head == b"inside"


# == Order and cursors ==


TREES = st.dictionaries(
    st.lists(st.sampled_from(["a", "b", "a.b", "a!", "ü", "-"]), min_size=1, max_size=4).map("/".join), st.binary(max_size=5), max_size=12
)


@BOUNDED
@given(TREES, st.integers(1, 4), st.sampled_from([1, 2, 1000]))
def test_a_folder_and_its_zip_list_the_same(tree: dict[str, bytes], limit: int, at_once: int) -> None:
    """Any tree by pages of any size, with folders that are read a few names at a time: all files once, in one order."""
    with new_folder() as folder, pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(results, "NAMES_AT_ONCE", at_once)
        patch.setattr(results, "RUN_MEMBERS", at_once)
        kept = dict[str, bytes]()
        for path, content in tree.items():
            with contextlib.suppress(OSError):  # a file where a folder should be
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
                kept[path] = content
        archive, _ = packed(folder)
        archive.file.seek(0)
        zip_files = results.ZipFiles(archive.file, results.sorted_places(archive.file, 10**6), "00")
        live = results.FolderFiles(stack.enter_context(joborch.opened_folder(folder, flags=os.O_RDONLY)), stack)
        wanted = sorted(kept, key=lambda path: path.encode().split(b"/"))
        for source in (zip_files, live):
            assert [row["path"] for row in pages(source, limit)] == wanted
            for path, content in kept.items():
                found = source.find(path.encode())
                assert b"".join(found.part(0, found.size)) == content


def pages(source: results.Source, limit: int) -> list[dict[str, Any]]:
    """All rows of a source, page by page."""
    rows = source.page(b"", limit)
    while more := source.page(rows[-1]["path"].encode() if rows else b"", limit) if rows else []:
        rows += more
    return rows


@pytest.mark.parametrize("cursor", ["x", "a.b", "ü", "aaaaa", "%3D"])
def test_a_cursor_that_is_none(cursor: str, desk: Desk) -> None:
    said = ask(desk.server, "GET", f"/jobs/{desk.upload().id}/files?after={quote(cursor, safe='%')}")
    assert (said.status, said.json["field"]) == (400, "after")


# == The index ==


def many(count: int = 3000) -> dict[str, bytes]:
    """A result with so many files that it gets an index."""
    return {f"deep/er/{number % 7}/file-{number:05}.txt": str(number).encode() for number in range(count)}


def test_a_large_result_gets_an_index_when_it_is_fetched(desk: Desk, peer: Peer) -> None:
    content = zipped(many())
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [zip_reply(content)]
    assert desk.settle(job).status is Status.COMPLETED
    index = desk.data.index(job.mark)
    assert index.stat().st_size == results.INDEX_HEAD.size + 4 * 3000
    made = index.read_bytes()
    assert [row["path"] for row in listed(desk.server, job)] == sorted(many())
    assert pick(desk.server, job, "deep/er/3/file-00010.txt").body == b"10"
    assert index.read_bytes() == made
    sweep(desk.server)
    assert index.exists(), "it belongs to its result"
    desk.clock.pass_s(10**7)
    clean_tick(desk.server)
    assert desk[job].status is Status.CLEANED
    assert not list(desk.data.results.iterdir())


def test_a_small_result_needs_none(desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [zip_reply(zipped({"large": random.Random(2).randbytes(500_000)}))]
    assert desk.settle(job).status is Status.COMPLETED
    assert pick(desk.server, job, "large").status == 200
    assert not desk.data.index(job.mark).exists()


def test_a_result_that_is_no_zip_is_fetched_all_the_same(desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.RUNNING)
    peer.says["/retrieve/7"] = [zip_reply(b"PK" + random.Random(3).randbytes(500_000))]
    assert desk.settle(job).status is Status.COMPLETED
    for path in ("files", "files/a"):
        said = ask(desk.server, "GET", f"/jobs/{job.id}/{path}")
        assert (said.status, "damaged ZIP" in said.json["message"]) == (404, True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: b"",
        lambda index: index[:50],
        lambda index: index[:-4],
        lambda index: index[:-3],
        lambda index: index + index[-4:],
        lambda index: index[:100] + bytes([index[100] ^ 1]) + index[101:],
        lambda index: index[:20] + bytes([index[20] ^ 1]) + index[21:],
        lambda index: b"joborch0" + index[8:],
    ],
    ids=range(8),
)
def test_a_damaged_index_is_made_again(damage: Callable[[bytes], bytes], desk: Desk) -> None:
    job = with_result(desk, zipped(many()))
    assert pick(desk.server, job, "deep/er/0/file-00000.txt").body == b"0"
    index = desk.data.index(job.mark)
    good = index.read_bytes()
    index.write_bytes(damage(good))
    assert pick(desk.server, job, "deep/er/6/file-02995.txt").body == b"2995"
    assert index.read_bytes() == good
    assert desk.quiet()


def test_an_index_of_another_result_is_not_used(desk: Desk) -> None:
    first, second = with_result(desk, zipped(many())), with_result(desk, zipped({"x" * 200: b"", **many()}))
    for job in (first, second):
        assert pick(desk.server, job, "deep/er/0/file-00000.txt").body == b"0"
    desk.data.index(second.mark).write_bytes(desk.data.index(first.mark).read_bytes())
    assert len(listed(desk.server, second, 1000)) == 3001


def test_an_index_that_cannot_be_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk: the file comes all the same, and nothing is left."""
    job = with_result(desk, zipped(many()))

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    assert pick(desk.server, job, "deep/er/0/file-00000.txt").body == b"0"
    assert "cannot be kept" in caplog.text
    assert desk.quiet()
    assert not desk.data.index(job.mark).exists()


def test_an_index_of_a_result_that_is_cleaned_meanwhile(desk: Desk) -> None:
    """The cleaner removes the result first, so the index that comes too late goes with it."""
    job = with_result(desk, zipped(many()))
    with desk.data.result(job.mark).open("rb") as file:
        desk.data.result(job.mark).unlink()
        places = results.places_of(desk.server, job.mark, job.result_sha256 or "", file)
    assert len(places) == 3000
    assert not list(desk.data.results.iterdir())


def test_an_index_is_made_once_for_all(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job, made = with_result(desk, zipped(many())), list[int]()
    real = results.sorted_places
    monkeypatch.setattr(results, "sorted_places", lambda file, most: made.append(1) or real(file, most))
    together(4, lambda number: assert_body(pick(desk.server, job, "deep/er/0/file-00000.txt"), b"0"))
    assert len(made) == 1


def assert_body(said: Said, content: bytes) -> None:
    """An answer has this body."""
    assert (said.status, said.body) == (200, content)


# == Damaged and forged ZIPs ==


@BOUNDED
@given(st.data())
def test_damage_is_never_wrong_bytes(data: st.DataObject) -> None:
    """Any damage to a ZIP: the right bytes of a whole file, fewer of them, or an error."""
    good = zipped({"a.txt": b"some words\n" * 300, "b.bin": random.Random(4).randbytes(3000), "c": b""})
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    names = {crc: text for text in (b"some words\n" * 300, random.Random(4).randbytes(3000), b"") for crc in [zlib.crc32(text)]}
    file = io.BytesIO(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    with contextlib.suppress(ValueError, results.NotAFile):
        source = results.ZipFiles(file, results.sorted_places(file, 10**6), "00")
        for row in source.page(b"", 10):
            found = source.find(row["path"].encode())
            got = b"".join(found.part(0, found.size))
            assert zlib.crc32(got) == found.crc and len(got) == found.size, "else it raises before the last bytes"
            assert found.crc not in names or got == names[found.crc]


def test_a_file_that_is_damaged_inside_is_cut_before_its_end(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Its first bytes are under way when the damage shows: the answer ends early, and the caller sees it by the length."""
    content = bytearray(zipped({"b.bin": random.Random(5).randbytes(3 * MIB)}))
    content[2 * MIB] ^= 1
    job = with_result(desk, bytes(content))
    said = pick(desk.server, job, "b.bin")
    assert said.status == 200
    assert len(said.body) < int(said.headers["Content-Length"]) == 3 * MIB
    assert "checksum" in caplog.text


def test_an_encrypted_member_is_no_file(desk: Desk) -> None:
    content = bytearray(zipped({"a": b"12345"}))
    at = content.rindex(b"PK\1\2")
    content[at + 8] |= 1
    said = pick(desk.server, with_result(desk, bytes(content)), "a")
    assert (said.status, "damaged ZIP" in said.json["message"]) == (404, True)


def test_a_zip_with_more_members_than_may_be(desk: Desk) -> None:
    """A forged directory costs no more than the largest result that is allowed."""
    desk.restart(JOBORCH_MAX_RESULT_FILES="100")
    job = with_result(desk, zipped(many()))
    assert len(listed(desk.server, job)) == 100 * 3 // 2 + 32


@pytest.mark.parametrize("size", [k * 256 * 1024 + extra for k in (1, 2, 4) for extra in (-1, 0, 1, 258)])
@pytest.mark.parametrize("kind", ["zeros", "words"])
def test_deflated_members_come_whole(kind: str, size: int) -> None:
    """Sizes at the border of what is inflated at once, where zlib may keep some output back."""
    content = bytes(size) if kind == "zeros" else (b"0123456789" * (size // 10 + 1))[:size]
    file = io.BytesIO(zipped({"a": content}))
    (record,) = joborch.zip_records(file)
    for begin, end in ((0, size), (1, size - 1), (size - 1, size), (0, size + 100), (256 * 1024 - 1, 256 * 1024 + 1)):
        assert b"".join(joborch.member_part(file, record, begin, end)) == content[begin:end]


# == Files that change: inputs, and a running job ==


def test_inputs_of_a_queued_job(desk: Desk) -> None:
    job = desk.upload()
    assert [(row["path"], row["size"]) for row in listed(desk.server, job)] == [("run.sh", 5)]
    said = pick(desk.server, job, "run.sh", Range="bytes=1-2")
    assert (said.status, said.body, "Etag" in said.headers) == (206, b"ch", False)


def test_a_client_that_knows_no_files_sends_all(desk: Desk, peer: Peer) -> None:
    """An older client: its ZIP of the present files is read in its place."""
    job = desk.with_client(Status.RUNNING)
    peer.says["/files/7"] = peer.says["/file/7"] = [reply(404, {"message": "there is nothing at /files/7"})]
    peer.says["/retrieve_partial/7"] = [zip_reply(zipped(MEMBERS))]
    assert {row["path"] for row in listed(desk.server, job)} == set(MEMBERS)
    assert pick(desk.server, job, "out/a.txt").body == MEMBERS["out/a.txt"]
    assert pick(desk.server, job, "nothing").status == 404
    assert desk.quiet()


@pytest.mark.parametrize(
    "row",
    [1, {}, {"path": 1, "size": 1, "mode": "", "mtime": None}, {"path": "a", "size": "1", "mode": "", "mtime": None},
     {"path": "a", "size": 1, "mode": 1, "mtime": None}, {"path": "a", "size": 1, "mode": "", "mtime": 1}],
    ids=range(6),
)  # fmt: skip
def test_a_client_that_lists_nonsense(row: Any, desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.RUNNING)
    for body in ({"files": [row]}, {"files": 1}, {}, [], b"{"):
        peer.says["/files/7"] = [reply(200, body)]
        said = ask(desk.server, "GET", f"/jobs/{job.id}/files")
        assert (said.status, said.headers["Retry-After"]) == (503, "5"), body


def test_a_client_that_does_not_answer(desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.RUNNING)
    peer.says["/files/7"] = peer.says["/file/7"] = [b""]
    for path in ("files", "files/a"):
        assert ask(desk.server, "GET", f"/jobs/{job.id}/{path}").status == 503
    desk.link.failed("cannot be reached")
    assert ask(desk.server, "GET", f"/jobs/{job.id}/files").status == 503


def test_a_live_file_that_becomes_shorter_is_cut(desk: Desk, peer: Peer) -> None:
    job = desk.with_client(Status.RUNNING)
    first = {"Content_Type": "application/octet-stream", "Content_Range": "bytes 0-2/9"}
    peer.says["/file/7"] = [reply(206, b"abc", **first), reply(206, b"abc", **first), reply(206, b"", Content_Range="bytes */3")]
    said = pick(desk.server, job, "a")
    assert (said.status, said.body, said.headers["Content-Length"]) == (200, b"abc", "9")


def test_files_of_a_running_job(pair: Pair, tmp_path: Path) -> None:
    """Through real processes, with a file of several parts; then the same from the stored result."""
    go, size = tmp_path / "go", 3 * MIB + 17
    os.mkfifo(go)
    number = submit(pair.server, f"mkdir out; head -c {size} /dev/zero | tr '\\0' x > out/big; echo now > out/small; read line < {go}")

    wait_status(pair.server, number, "Running")

    def rows() -> dict[str, int]:
        answer = pair.server.get(f"/jobs/{number}/files")
        return {row["path"]: row["size"] for row in answer.json().get("files", [])}

    wait_for(lambda: rows() == {"run.sh": rows().get("run.sh"), "out/big": size, "out/small": 4}, 60, "the files")
    big = pair.server.get(f"/jobs/{number}/files/out/big")
    assert (big.status_code, big.headers["X-Job-Status"], len(big.content)) == (200, "Running", size)
    assert set(big.content) == set(b"x")
    part = pair.server.get(f"/jobs/{number}/files/out/big", headers={"Range": f"bytes={size - 5}-"})
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, b"xxxxx", f"bytes {size - 5}-{size - 1}/{size}")
    page = pair.server.get(f"/jobs/{number}/files?limit=1").json()
    assert [row["path"] for row in page["files"]] == ["out/big"]
    following = pair.server.get(f"/jobs/{number}/files", params={"limit": "1", "after": page["next"]}).json()
    assert [row["path"] for row in following["files"]] == ["out/small"]
    assert "is a folder" in pair.server.get(f"/jobs/{number}/files/out").json()["message"]
    with go.open("w") as line:
        line.write("go\n")
    wait_status(pair.server, number, "Completed")
    assert pair.server.get(f"/jobs/{number}/files/out/small").content == b"now\n"
    assert set(rows()) == {"run.sh", "out/big", "out/small", ".joborch/stdout", ".joborch/stderr"}


def test_a_work_folder_that_its_script_tampers_with(yard: Yard) -> None:
    """Links, a FIFO and another user's file are no files; nothing hangs, and no link is followed."""
    payload = yard.submit("true", {"a": b"a"})
    work = yard.folder(payload) / "work"
    os.mkfifo(work / "fifo")
    (work / "link").symlink_to("/etc")
    deep = work
    for _ in range(results.DEPTH_MOST + 5):
        deep = deep / "d"
        deep.mkdir()
        (deep / "f").touch()
    said = ask(yard.client, "GET", f"/files/{payload.id}?limit=1000").json
    paths = [row["path"] for row in said["files"]]
    assert {"a", "link", "run.sh"} < set(paths) and "fifo" not in paths
    assert len([path for path in paths if path.endswith("/f")]) == results.DEPTH_MOST
    for path, what in (("fifo", "not a file"), ("link", "link"), ("link/passwd", ""), ("..%2fstdout", "'..'"), ("d", "folder")):
        answer = ask(yard.client, "GET", f"/file/{payload.id}?path={path}")
        assert answer.status == 400 and what in answer.json["message"], path
    assert ask(yard.client, "GET", f"/file/{payload.id}?path=a&offset=5").headers["Content-Range"] == "bytes */1"
    joborch.remove_tree(work)
    assert ask(yard.client, "GET", f"/files/{payload.id}").json["files"] == []
    assert ask(yard.client, "GET", f"/file/{payload.id}?path=a").status == 400
    missing = ask(yard.client, "GET", f"/file/{payload.id}")
    assert missing.status == 400 and b"path is missing: give the path of the file" in missing.body
    assert ask(yard.client, "GET", f"/files/{payload.id}", X_Joborch_Mark="x.1").status == 404


def test_a_fifo_that_replaced_a_file(data: DataFolder) -> None:
    """It is not waited for."""
    folder = data.path / "w"
    folder.mkdir()
    os.mkfifo(folder / "a")
    with contextlib.ExitStack() as stack:
        source = results.FolderFiles(stack.enter_context(joborch.opened_folder(folder, flags=os.O_RDONLY)), stack)
        with pytest.raises(results.NotAFile, match="not a file"):
            source.find(b"a")
    assert (folder / "a").is_fifo()
