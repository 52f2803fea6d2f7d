"""Whatever bytes come, a process answers with an error or waits for more: no 5xx, no leftover file, no traceback, and /health goes on.

Hypothesis makes the inputs, which go over real sockets to real processes: broken first lines, headers, chunks, lengths and
forms, and valid requests and archives that were cut, mixed and mutated anywhere. JOBORCH_FUZZ_INPUTS says how many of them (5,000).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import select
import socket
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import BOUNDARY, Process, field_part, file_part, form, free_port, tar_of, wait_for, zip_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INPUTS = int(os.environ.get("JOBORCH_FUZZ_INPUTS", "5000"))
BATCH = 25  # inputs that are sent side by side
QUIET_S = 0.04  # after this long without an answer, connections that are still open wait for the rest of their input
STATUS = re.compile(rb"HTTP/1\.[01] (\d\d\d) ")

# == Inputs ==

MARK = b"--" + BOUNDARY.encode()
FORM = form(
    [file_part("run.sh", b"true\n"), file_part("a/b.txt", b"x" * 300), field_part("user_id", "1"), field_part("service", "example")]
)
NO_USER = form([file_part("run.sh", b"true\n"), file_part("deep/er/c", bytes(50)), field_part("service", "example")])
TYPE = f"multipart/form-data; boundary={BOUNDARY}".encode()


def request(method: bytes, path: bytes, headers: list[bytes], body: bytes = b"") -> bytes:
    """A request as it goes over the wire."""
    return b"\r\n".join([method + b" " + path + b" HTTP/1.1", b"Host: 127.0.0.1", *headers]) + b"\r\n\r\n" + body


def posted(path: bytes, body: bytes) -> bytes:
    """A form with its length."""
    return request(b"POST", path, [b"Content-Type: " + TYPE, b"Content-Length: %d" % len(body)], body)


def in_chunks(body: bytes, sizes: list[int]) -> bytes:
    """A body in chunks of these sizes, over and over."""
    out, at, turn = b"", 0, 0
    while at < len(body):
        piece = body[at : at + sizes[turn % len(sizes)]]
        out, at, turn = out + b"%x\r\n" % len(piece) + piece + b"\r\n", at + len(piece), turn + 1
    return out + b"0\r\n\r\n"


CHUNKED = [b"Content-Type: " + TYPE, b"Transfer-Encoding: chunked"]
DOWNLOAD = request(b"HEAD", b"/download/1", [])
BASES = [
    *(posted(path, body) for path in (b"/upload", b"/submit") for body in (NO_USER, NO_USER, FORM)),
    *(request(b"POST", path, CHUNKED, in_chunks(NO_USER, [7, 100])) for path in (b"/upload", b"/submit")),
    request(b"GET", b"/dashboard/jobs?user_id=1&status=&before=", []),
    request(b"POST", b"/session", [b"Content-Type: application/x-www-form-urlencoded", b"Content-Length: 15"], b"token=%78&to=%2f"),
    request(b"GET", b"/jobs?limit=3&user_id=1", [b"Connection: close"]),
    request(b"GET", b"/jobs?status=Failed,Killed&since=2d&until=2026-11-28&by=ended&name=a&ids=1,2&format=csv&before=1.5_2", []),
    request(b"GET", b"/changes?after=0&status=Failed&cause=user&since=2026-11-28T10:00:00Z", []),
    request(b"GET", b"/health", [b"Range: bytes=0-1"]),
    request(b"GET", b"/metrics", []),
    request(b"POST", b"/tokens?name=x&role=portal&services=example&days=3", [b"Content-Length: 0"]),
    request(b"DELETE", b"/tokens/x", []),
    request(b"DELETE", b"/jobs/77", []),
    request(b"DELETE", b"/users/77", []),
    request(b"DELETE", b"/payloads/8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0", []),
    request(b"GET", b"/export?format=swf&since=2d&until=2026-11-28&user_id=1&service=example", []),
    request(b"POST", b"/join", [b"Content-Length: 36"], b'{"instance": "a", "start": "b"}     '),
    request(b"GET", b"/join/calls?session=x&after=0", []),
    request(b"POST", b"/join/answers?session=x", [b"Content-Length: 28"], b'{"number": 1, "bytes": 1}\nxx'),
    DOWNLOAD,
    request(b"GET", b"/jobs/1/logs?stream=stdout&offset=0", []),
    request(b"GET", b"/jobs/1/result?wait=0", [b"Range: bytes=1-5"]),
    request(b"GET", b"/jobs/1/files?limit=2&after=cnVuLnNo", []),
    request(b"GET", b"/jobs/1/files/run.sh?inline=1", [b"Range: bytes=0-3"]),
    request(b"GET", b"/files/1?limit=2&after=cnVuLnNo", []),
    request(b"GET", b"/file/1?path=a%2fb.txt&offset=1&count=9", []),
    request(b"POST", b"/jobs/1/redeliver", [b"Content-Length: 0"]),
    request(b"POST", b"/jobs/1/retry", [b"Content-Length: 0", b"Idempotency-Key: again"]),
    request(b"GET", b"/events?since=0&instance=x&wait=0&problems=3&done=1,2", []),
    request(b"POST", b"/terminate/1", [b"Content-Length: 0"]),
]
TOKENS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b" ",
    b"\t",
    b": ",
    b'"',
    b"\\",
    b"%00",
    b"%ff",
    b"%",
    b"//",
    b"..",
    b"[",
    b"http://[",
    b"?",
    b"#",
    b";",
    b"Content-Length: 0\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: " + b"9" * 5000 + b"\r\n",
    b"Content-Length: +5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity, chunked\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: keep-alive\r\n",
    MARK,
    MARK + b"--\r\n",
    b"boundary=",
    b"boundary=" + b"x" * 80,
    b'filename="',
    b"filename*=utf-8''%ff%2f",
    b"name*=utf-8''",
    b"X-Joborch-Path: %2e%2e/x\r\n",
    b"0\r\n\r\n",
    b"ffffffffffffffffffff\r\n",
    b"1;x=\r\n",
    b"A" * 3000,
    b"\xc2\xb2",
    b"\xed\xa0\x80",
    b"Idempotency-Key: x\r\n",
    b"X-Joborch-Attempt: 1e9\r\n",
    b"Range: bytes=-0\r\n",
    b" HTTP/1.0",
    b" HTTP/9.9",
    b"user_id",
    b"after",
    b"inputs_from",
    b"callback_url",
]
PIECE = st.sampled_from(TOKENS) | st.binary(max_size=8)
PLACE = st.floats(0, 1)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid request that was changed in a few places."""
    text = bytearray(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 4))):
        change(draw, text, PIECE)
    return bytes(text)


def change(draw: st.DrawFn, text: bytearray, piece: st.SearchStrategy[bytes]) -> None:
    """Change a text in one place."""
    begin = int(draw(PLACE) * len(text))
    what = draw(st.sampled_from(["cut", "insert", "insert", "replace", "drop", "double"]))
    if what == "cut":
        del text[begin:]
    elif what == "insert":
        text[begin:begin] = draw(piece)
    elif what == "replace":
        text[begin : begin + draw(st.integers(1, 9))] = draw(piece)
    elif what == "drop":
        del text[begin : begin + draw(st.integers(1, 60))]
    else:
        text[begin:begin] = text[begin : begin + draw(st.integers(1, 200))]


NAME = st.sampled_from(
    [b"Host", b"Content-Length", b"Transfer-Encoding", b"Content-Type", b"Expect", b"Authorization", b"X-\xff", b"", b"Range"]
)
HEADERS = st.lists(st.tuples(NAME, st.sampled_from([b": ", b":", b" : ", b""]), PIECE), max_size=5)


@st.composite
def made_up(draw: st.DrawFn) -> bytes:
    """A request in which any part may be anything."""
    method = draw(st.sampled_from([b"GET", b"POST", b"HEAD", b"get", b"PUT", b"OPTIONS", b"PRI", b"\x16\x03"]))
    path = draw(st.sampled_from([b"/", b"/upload", b"/submit", b"/jobs/", b"*", b"http://x/upload", b"http://[", b"/swagger-ui/"])) + draw(
        PIECE
    )
    version = draw(st.sampled_from([b" HTTP/1.1", b" HTTP/1.0", b"", b" HTTP/2.0", b" HTTP/1.1 "]))
    lines = [name + colon + value for name, colon, value in draw(HEADERS)]
    end = draw(st.sampled_from([b"\r\n", b"\r\n", b"\n", b"\r"]))
    return end.join([method + b" " + path + version, *lines]) + end + end + draw(st.binary(max_size=30))


PART_LINE = st.sampled_from(
    [
        b'Content-Disposition: form-data; name="file"; filename="run.sh"',
        b'Content-Disposition: form-data; name="user_id"',
        b"Content-Disposition: form-data",
        b'Content-Disposition: form-data; name="a"; filename="../b"',
        b"Content-Disposition: form-data; name=a; filename*=utf-8''%00",
        b"Content-Disposition: attachment; filename=\xff",
        b"Content-Type: text/plain; charset=utf-16",
        b"Content-Type: multipart/mixed; boundary=" + BOUNDARY.encode(),
        b"Content-Transfer-Encoding: base64",
        b"Content-Length: 1",
        b"no colon",
        b": ",
        b"X-Joborch-Path: a%2F%2Fb",
        b" folded",
        b"X: " + b"y" * 20_000,
    ]
)


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """A form whose parts may be anything, whole or chunked, with a length that may be wrong."""
    body = draw(st.sampled_from([b"", b"", b"preamble\r\n"]))
    for lines in draw(st.lists(st.lists(PART_LINE, max_size=3), max_size=4)):
        start = draw(st.sampled_from([b"--", b"--", b"--", b"-", b"\n--"])) + BOUNDARY.encode()
        body += start + b"\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + draw(PIECE) + b"\r\n"
    body += draw(st.sampled_from([MARK + b"--\r\n", MARK + b"--", b"", MARK]))
    kind = draw(
        st.sampled_from(
            [TYPE, TYPE, TYPE, b"multipart/form-data", b'multipart/form-data; boundary=""', b"text/plain", TYPE + b"; charset=x"]
        )
    )
    path = draw(st.sampled_from([b"/upload", b"/submit"]))
    if draw(st.booleans()):
        return request(
            b"POST",
            path,
            [b"Content-Type: " + kind, b"Transfer-Encoding: chunked"],
            in_chunks(body, draw(st.sampled_from([[1], [5], [64, 1]]))),
        )
    length = len(body) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 100]))
    return request(b"POST", path, [b"Content-Type: " + kind, b"Content-Length: %d" % length], body)


TREE = {"run.sh": (b"true\n", 0o644), "a/b": (b"b" * 700, 0o600), "a/c.txt": (bytes(2000), 0o755)}
ARCHIVES = [
    *(zip_of(TREE, top) for top in ("", "top/")),
    zip_of(TREE, method=zipfile.ZIP_STORED),
    *(tar_of(TREE, mode, top) for mode in ("w", "w:gz") for top in ("", "top/")),
    tar_of(TREE, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 600}),
    tar_of({"x" * 90 + "/" + "y" * 90: (b"", 0o644), **TREE}, "w", format=tarfile.GNU_FORMAT),
]
FIELDS = [field_part("user_id", "1"), field_part("service", "example")]
HEADS = [b"PK\3\4", b"PK\5\6", b"PK\1\2", b"\x1f\x8b\x08\0", b"ustar\0", b"BZh", b""]


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """An upload with an archive: a valid one that was changed in a few places, also inside a gzip, or random bytes with a head."""
    text = bytearray(draw(st.sampled_from(ARCHIVES) | st.builds(bytes.__add__, st.sampled_from(HEADS), st.binary(max_size=600))))
    is_gzip = text in ARCHIVES and text.startswith(b"\x1f\x8b") and draw(st.booleans())
    data = bytearray(gzip.decompress(text)) if is_gzip else text
    for _ in range(draw(st.integers(0, 4))):
        change(draw, data, st.binary(min_size=1, max_size=8))
    parts = [file_part("tree", gzip.compress(data, 1) if is_gzip else bytes(data), "archive")]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, 1)), file_part(draw(st.sampled_from(["run.sh", "a", "a/b", "top/run.sh", "other"])), b"true\n"))
    return posted(draw(st.sampled_from([b"/upload", b"/upload", b"/jobs/1/retry"])), form([*parts, *FIELDS]))


INPUT = st.one_of(mutated(), mutated(), mutated(), made_up(), forms(), forms(), archives(), st.binary(max_size=60))


# == Exchanges ==


def exchange(port: int, inputs: list[bytes]) -> list[bytes]:
    """Send each input on a connection of its own; return what came back on each until nothing more came."""
    lines: dict[int, tuple[int, socket.socket]] = {}
    answers = [b""] * len(inputs)
    watch = select.epoll()
    try:
        for number, text in enumerate(inputs):
            line = socket.create_connection(("127.0.0.1", port), timeout=10)
            lines[line.fileno()] = (number, line)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was answered before its end
                line.sendall(text)
            watch.register(line, select.EPOLLIN)
        while lines and take(watch, lines, answers, QUIET_S):
            continue
        for _, line in lines.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 10
        while lines and time.monotonic() < end:
            take(watch, lines, answers, 1)
        assert not lines, f"{len(lines)} connections stay open although their callers have left"
    finally:
        watch.close()
        for _, line in lines.values():
            line.close()
    return answers


def take(watch: select.epoll, lines: dict[int, tuple[int, socket.socket]], answers: list[bytes], quiet_s: float) -> bool:
    """Take in what comes within this time; False if nothing did."""
    events = watch.poll(quiet_s)
    for descriptor, _ in events:
        number, line = lines[descriptor]
        try:
            part = line.recv(65536)
        except ConnectionResetError:
            part = b""
        answers[number] += part
        if not part:
            lines.pop(descriptor)
            watch.unregister(descriptor)
            line.close()
    return bool(events)


def healthy(port: int) -> None:
    """The process answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(request(b"GET", b"/health", [b"Connection: close"]))
        assert line.recv(65536).startswith(b"HTTP/1.1 200 ")


def check(port: int, inputs: list[bytes]) -> None:
    """Each is answered without a server error; 501 is what RFC 9112 wants for a transfer coding that is not known."""
    for text, answer in zip(inputs, exchange(port, inputs)):
        assert not answer or STATUS.match(answer), (text, answer)
        bad = [status for status in STATUS.findall(answer) if status >= b"500" and status != b"501"]
        assert not bad, (text, answer)
    healthy(port)


def nothing_strange_left(process: Process) -> None:
    """Each folder has its row, `tmp` is empty, and the log has nothing to say."""
    jobs = process.data / "jobs"

    def strangers() -> list[str]:
        rows = stored(process)
        waiting = [path.name for path in (process.data / "tmp").iterdir()]
        return waiting + [path.name for path in jobs.iterdir() if path.name.partition(".")[0] not in rows]

    wait_for(lambda: not strangers(), what=f"nothing left over in {process.data}")
    said = [line for line in process.log.splitlines() if re.search(r"Traceback| (ERROR|CRITICAL) ", line)]
    assert not said, process.log[-5000:]


def stored(process: Process) -> set[str]:
    """The uuids of all jobs, or of all payloads."""
    if process.role == "client":
        return {str(each["uuid"]) for each in process.get("/events?since=0&wait=0").json()["payloads"]}
    found, query = set[str](), "/jobs?limit=1000"
    while query:
        page = process.get(query).json()
        found |= {str(each["uuid"]) for each in page["jobs"]}
        query = f"/jobs?limit=1000&before={page['next']}" if page["next"] else ""
    return found


@pytest.fixture(scope="module", params=["server", "client"])
def process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A process with a disk that holds all that is sent; a client's payloads may run."""
    settings = {
        "JOBORCH_ALLOW_ANONYMOUS": "1",
        "JOBORCH_MAX_QUEUED_PER_USER": "1000000",
        "SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}",
    }
    if request.param == "client":
        settings = {"JOBORCH_ALLOW_ANONYMOUS": "1"}
    started = Process(request.param, tmp_path_factory.mktemp("fuzz"), settings)
    try:
        yield started.start()
    finally:
        started.close()


@pytest.mark.timeout(300 + INPUTS // 10)
def test_nothing_that_is_sent_does_harm(process: Process) -> None:
    """A server gets four fifths of the inputs, a client one."""
    examples = max(1, INPUTS * (4 if process.role == "server" else 1) // 5 // BATCH)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(INPUT, min_size=BATCH, max_size=BATCH))
    def run(inputs: list[bytes]) -> None:
        check(process.port, inputs)

    before = len(process.log)
    run()
    nothing_strange_left(process)
    assert len(process.log) - before < 200 * INPUTS, "a caller must not fill the log"


@pytest.mark.parametrize("text", BASES[:8], ids=range(8))
def test_a_request_that_ends_at_any_byte(text: bytes, process: Process) -> None:
    """Cut off after each seventh byte, and sent in two pieces: it is waited for, or answered, and leaves nothing."""
    cuts = range(1, len(text), 7 if INPUTS <= 5000 else 1)
    for begin in range(0, len(cuts), BATCH):
        check(process.port, [text[:cut] for cut in cuts[begin : begin + BATCH]])
    nothing_strange_left(process)


def test_the_inputs_are_not_all_refused_at_once(process: Process) -> None:
    """The bases are valid: they reach the reader of forms, and some are stored."""
    answers = exchange(process.port, BASES)
    if process.role == "server":
        kinds = [posted(b"/upload", form([file_part("tree", each, "archive"), *FIELDS])) for each in ARCHIVES]
        assert all(answer.startswith(b"HTTP/1.1 201") for answer in exchange(process.port, kinds)), "an archive is not valid"
    assert any(answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")) for answer in answers[:6]), answers[:6]
    assert any(b"user_id is missing" in answer or b'"id"' in answer for answer in answers[:8])
    assert json.loads(answers[BASES.index(DOWNLOAD)].partition(b"\r\n\r\n")[2] or b"{}") is not None
    assert Path(process.data / "jobs").is_dir()
