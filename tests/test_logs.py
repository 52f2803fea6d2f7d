"""What a script writes, read while it runs and after it: by offsets that count the bytes it wrote, whatever of them is kept."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import MakePair
from harness import Pair, submit, wait_for, wait_status
from hypothesis import given
from hypothesis import strategies as st
from world import KNOWN_CALLER, Asked, Desk, Peer, Yard, ask, new_folder, reply, serving, tried

import joborch
from joborch import Status, Stream, ZipPacker


def read_whole(stream: Stream, read_at: Any, offset: int, room: int) -> bytes:
    """Read part after part, as who follows does."""
    said = b""
    while True:
        part, following = stream.part(read_at, offset, room)
        assert following >= offset
        if not part:
            return said
        said, offset = said + part, following


@given(st.binary(max_size=200), st.integers(2, 60), st.integers(0, 220), st.integers(1, 100))
def test_any_part_of_any_stream(content: bytes, limit: int, offset: int, room: int) -> None:
    """What is kept from the offset on, and one line for what is not; from the file, and from the ZIP that it was packed into."""
    first, second = (limit // 2, len(content) - limit // 2) if len(content) > limit else (len(content), len(content))
    wanted = content[offset:first]
    if offset < second and first < second:
        wanted += f"\n[joborch: {second - max(offset, first)} bytes left out]\n".encode()
    wanted += content[max(offset, second) :]
    stream = Stream(len(content), limit)
    assert read_whole(stream, lambda begin, count: content[begin : begin + count], offset, room) == wanted
    with new_folder() as folder:
        (folder / "stdout").write_bytes(content)
        with (folder / "zip").open("w+b") as file:
            packer = ZipPacker(file)
            kept, chunks = joborch.kept_output(folder, "stdout", limit)
            packer.add_chunks("stdout", chunks, joborch.STREAM_COMMENT.format(kept.size, kept.limit))
            packer.finish()
            part = joborch.part_of_archive(file, "stdout", 10**6, offset)
            end = joborch.part_of_archive(file, "stdout", 10**6, -offset - 1)
            from_there = joborch.part_of_archive(file, "stdout", 10**6, max(0, len(content) - offset - 1))
    assert part.text == wanted
    assert end == from_there, "a negative offset counts from the end"


def log(node: Any, path: str) -> tuple[int, bytes, int | None]:
    """Status, text and next offset of an answer."""
    said = ask(node, "GET", path)
    following = said.headers.get("X-Next-Offset")
    return said.status, said.body, int(following) if following is not None else None


def test_a_payload_is_read_while_it_runs(yard: Yard) -> None:
    job = yard.submit("echo one; echo two >&2; READY; BLOCK")
    assert log(yard.client, f"/logs/{job.id}") == (200, b"", 0)
    yard.ready(job)
    assert log(yard.client, f"/logs/{job.id}") == (200, b"one\n", 4)
    assert log(yard.client, f"/logs/{job.id}?stream=stderr&offset=2") == (200, b"o\n", 4)
    assert log(yard.client, f"/logs/{job.id}?offset=4") == (200, b"", 4)
    assert log(yard.client, f"/logs/{job.id}?offset=100") == (200, b"", 100)


@pytest.mark.parametrize(("query", "field"), [("stream=both", "stream"), ("offset=-1", "offset"), ("offset=x", "offset")])
def test_what_cannot_be_asked_for(query: str, field: str, yard: Yard, desk: Desk) -> None:
    job, payload = desk.upload(), yard.submit("true")
    for node, path in ((yard.client, f"/logs/{payload.id}"), (desk.server, f"/jobs/{job.id}/logs")):
        said = ask(node, "GET", f"{path}?{query}")
        assert (said.status, said.json["field"]) == (400, field)


@pytest.mark.parametrize("replacement", ["ln -s /etc/passwd", "mkfifo", "mkdir"])
def test_what_the_script_puts_in_the_place_of_its_output_is_not_read(replacement: str, yard: Yard) -> None:
    job = yard.ready(yard.submit(f"rm ../stdout; {replacement} ../stdout; READY; BLOCK"))
    assert log(yard.client, f"/logs/{job.id}") == (200, b"", 0)


def test_where_a_jobs_output_is_by_and_by(desk: Desk, peer: Peer) -> None:
    """Nowhere while it is queued, at its client, and in the stored result; a client that is away is no end of it."""
    queued, job = desk.upload(user_id=2), desk.with_client(Status.RUNNING)
    assert log(desk.server, f"/jobs/{queued.id}/logs") == (200, b"", 0)
    peer.says["/logs/7"] = [reply(200, b"text", X_Next_Offset="9"), reply(503), reply(404), reply(200, b"text"), b""]
    assert log(desk.server, f"/jobs/{job.id}/logs?stream=stderr&offset=5") == (200, b"text", 9)
    assert peer.asked[-1].path == "/logs/7?stream=stderr&offset=5"
    assert peer.asked[-1].headers["X-Joborch-Mark"] == job.mark
    assert [log(desk.server, f"/jobs/{job.id}/logs")[0] for _ in range(4)] == [503, 404, 503, 503]
    desk.store.move(desk[job], Status.KILLED, "")
    assert log(desk.server, f"/jobs/{job.id}/logs") == (200, b"", 0)
    desk.store.move(desk[job], Status.CLEANED, "")
    assert log(desk.server, f"/jobs/{job.id}/logs")[0] == 404


def test_a_22_client_shows_no_output(desk22: Desk) -> None:
    said = ask(desk22.server, "GET", f"/jobs/{desk22.with_client(Status.RUNNING).id}/logs")
    assert said.status == 404 and "2.2" in said.json["message"]


SCRIPT = "for n in 1 2 3; do echo line $n; echo error $n >&2; while [ ! -e {go}$n ]; do sleep 0.02; done; done; exit 3"
WHOLE = b"line 1\nline 2\nline 3\n"


def test_a_job_is_followed_from_its_upload_to_its_end(own_pair: Pair, tmp_path: Path) -> None:
    """Every line as soon as it is written, over the death of server's client and all; and after the end the same again."""
    server, client = own_pair.server, own_pair.client
    job = submit(server, SCRIPT.format(go=tmp_path / "go"))
    seen: list[bytes] = []

    def follow() -> None:
        with server.get(f"/jobs/{job}/logs?follow=1", stream=True) as answer:
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            seen.extend(answer.iter_content(None))

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    for number in (1, 2, 3):
        wait_for(lambda number=number: b"".join(seen).count(b"\n") == number, what=f"line {number}")  # type: ignore[misc]
        assert reader.is_alive()
        if number == 2:
            client.kill()
            client.start()
        (tmp_path / f"go{number}").touch()
    reader.join(30)
    assert not reader.is_alive()
    assert b"".join(seen) == WHOLE
    assert wait_status(server, job, "Failed")["exit_code"] == 3
    for query, text in (("", WHOLE), ("?offset=7", WHOLE[7:]), ("?follow=1", WHOLE), ("?stream=stderr", WHOLE.replace(b"line", b"error"))):
        answer = server.get(f"/jobs/{job}/logs{query}")
        assert answer.content == text
        assert answer.headers["X-Job-Status"] == "Failed"
        assert answer.headers.get("X-Next-Offset") == (None if "follow" in query else str(len(WHOLE) + ("stderr" in query) * 3))


def test_followers_do_not_keep_others_waiting(own_pair: Pair, tmp_path: Path) -> None:
    """More of them than there are places; the others are told to come again, and jobs are heard of all the while."""
    server = own_pair.server
    job = submit(server, f"while [ ! -e {tmp_path / 'go'} ]; do sleep 0.05; done")
    wait_status(server, job, "Running")
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(server.get(f"/jobs/{job}/logs?follow=1").status_code), daemon=True)
        for _ in range(joborch.WAITER_PLACES + 3)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: codes.count(503) == 3, what="three to be refused")
    assert wait_status(server, submit(server, "echo quick"), "Completed")
    (tmp_path / "go").touch()
    for thread in threads:
        thread.join(30)
    assert codes.count(200) == joborch.WAITER_PLACES


def test_long_output_is_followed_over_its_gap(make_pair: MakePair) -> None:
    pair = make_pair(client={"JOBORCH_LOG_LIMIT": "64K"}).start()
    job = submit(pair.server, "head -c 300000 /dev/zero | tr '\\0' x; echo; echo end")
    wait_status(pair.server, job, "Completed")
    text = pair.server.get(f"/jobs/{job}/logs").text
    (left_out,) = re.findall(r"\n\[joborch: (\d+) bytes left out\]\n", text)
    assert int(left_out) == 300_005 - 64 * 1024
    assert text.endswith("x\nend\n")
    assert pair.server.get(f"/jobs/{job}/logs?offset=300001").text == "end\n"
    assert pair.server.get(f"/jobs/{job}/logs?follow=1&offset=100").text == text[100:]


@pytest.mark.parametrize("accept", ["text/plain", "text/event-stream"])
@pytest.mark.parametrize("first", [b"one\n", b""])
def test_output_that_a_stopping_server_cut_off_does_not_look_complete(accept: str, first: bytes, desk: Desk, peer: Peer) -> None:
    """Also if the job ends just then, with output that was not sent: no event `end`, and no end of the body."""
    job = desk.with_client()

    def last(_: Asked) -> bytes:
        assert desk.store.move(desk[job], Status.FAILED, "")
        desk.server.stopping.set()
        return reply(200, b"", X_Next_Offset=str(len(first)))

    peer.says["/logs/7"] = [reply(200, first, X_Next_Offset=str(len(first))), last, last]
    got = list[bytes]()
    with (
        serving(desk.server) as url,
        requests.get(f"{url}/jobs/{job.id}/logs?follow=1", headers={"Accept": accept}, stream=True, timeout=60) as answer,
    ):
        if accept == "text/plain" and not first:
            assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
            return
        broken = tried(lambda: got.extend(answer.iter_content(None)), requests.exceptions.ChunkedEncodingError)
    assert isinstance(broken, requests.exceptions.ChunkedEncodingError)
    assert first.strip() in b"".join(got)
    assert b"event: end" not in b"".join(got)


def test_a_follower_whose_answer_is_never_sent_keeps_no_place(desk: Desk) -> None:
    job, answers = desk.with_client(), []
    for accept in ("text/plain", "text/event-stream"):
        request = joborch.Request({"REQUEST_METHOD": "GET", "HTTP_ACCEPT": accept, "joborch.caller": KNOWN_CALLER})
        for _ in range(joborch.WAITER_PLACES + 1):
            answers.append(joborch.job_logs(desk.server, request, job.id, "stdout", 0, "1"))
            answers[-1].body.close()
