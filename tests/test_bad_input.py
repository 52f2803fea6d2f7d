"""Bad input: each gets a clear error, and leaves no row and no file."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MakeProcess
from harness import (
    BOUNDARY,
    NOBODY_UID,
    Pair,
    Process,
    assert_error,
    assert_error_body,
    field_part,
    file_part,
    form,
    form_type,
    free_port,
    nothing_left,
    open_program,
    parse_answer,
    part,
    post_form,
    raw_exchange,
    raw_head,
    read_all,
    upload,
    wait_for,
)

MIB = 1024 * 1024
RUN = file_part("run.sh", b"true")
USER, SERVICE = field_part("user_id", "1"), field_part("service", "example")
FORM_TYPE = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server of two services, whose clients are away; uploads over 64 MiB are too large."""
    wiring = {f"SERVICE_{name}_CLIENTS": f"http://127.0.0.1:{free_port()}" for name in ("EXAMPLE", "DOCKING_FAST")}
    folder = tmp_path_factory.mktemp("bad-input")
    process = Process("server", folder, {**wiring, "JOBORCH_MAX_UPLOAD": "64M"})
    try:
        yield process.start()
    finally:
        process.close()


@pytest.fixture(autouse=True)
def leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test that speaks with `server` must leave no row and no file on it."""
    if "server" not in request.fixturenames:
        yield
        return
    with nothing_left(request.getfixturevalue("server")):
        yield


# == Fields ==


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([USER, SERVICE], ["file"]),
        ([], ["missing"]),
        ([field_part("file", "a text field of that name"), USER, SERVICE], ["file"]),
        ([RUN, SERVICE], ["user_id"]),
        ([RUN, USER], ["service"]),
        *[([RUN, field_part("user_id", value), SERVICE], ["user_id"]) for value in ("", "abc", "1.5", "1e3", "9" * 40)],
        ([RUN, field_part("user_id", b"\xff\xfe"), SERVICE], ["user_id"]),
        ([RUN, field_part("user_id", "\N{FULLWIDTH DIGIT ONE}"), SERVICE], ["user_id"]),
        ([RUN, USER, field_part("service", "nowhere")], ["nowhere", "example", "docking_fast"]),
        ([RUN, USER, field_part("service", "")], ["service", "example"]),
        *[
            ([RUN, USER, SERVICE, field_part(name, value)], [name])
            for name, value in (
                ("timeout", "soon"),
                ("timeout", "-1"),
                ("timeout", "nan"),
                ("timeout", "inf"),
                ("retries", "many"),
                ("retries", "-1"),
                ("cpus", "0"),
                ("cpus", "two"),
                ("memory", "-5"),
                ("memory", "1e400"),
            )
        ],
    ],
)
def test_fields(server: Process, parts: list[bytes], words: list[str]) -> None:
    """400, and the message names the field and what would be right."""
    assert_error(post_form(server, parts), 400, *words)


@pytest.mark.parametrize("name", ["name", "service", "user_id", "never_heard_of"])
def test_a_megabyte_in_a_text_field(server: Process, name: str) -> None:
    """A text field is short: refused by name, and not echoed."""
    others = {"user_id": USER, "service": SERVICE}
    parts = [RUN, *[each for field, each in others.items() if field != name], field_part(name, b"x" * MIB)]
    answer = post_form(server, parts)
    assert_error(answer, [400, 413], name)
    assert len(answer.content) < 2000


def test_line_breaks_in_fields(server: Process) -> None:
    """No line of the log and no header can be made by what a caller sends."""
    forged = "x\r\nX-Injected: yes\r\n\nINJECTED 2026-01-01 job 1 Queued -> Completed"
    for parts in ([RUN, USER, field_part("service", forged)], [RUN, field_part("user_id", forged), SERVICE]):
        answer = post_form(server, parts)
        assert_error(answer, 400)
        assert "X-Injected" not in answer.headers
    server.get("/jobs/1%0d%0aX-Injected:%20yes%0aINJECTED")
    server.get("/nowhere%0aINJECTED", headers={"User-Agent": "a\tINJECTED"})
    assert not re.search(r"^\s*(X-Injected|INJECTED)", server.log, re.MULTILINE)


def test_line_breaks_in_the_location_of_an_answer(server: Process) -> None:
    """A path that is sent back (a redirect, an error) cannot split the head of the answer."""
    for path in ("/swagger%0d%0aX-Injected:%20yes", "/download/%0d%0aX-Injected:%20yes", "/%0d%0aX-Injected:%20yes"):
        received = raw_exchange(server.port, raw_head("GET", path, server.port))
        code, headers, body = parse_answer(received)
        assert code in (400, 404)
        assert "x-injected" not in headers
        assert_error_body(headers["content-type"], body)


# == File names ==

BAD_NAMES = {
    "absolute": ["/etc/passwd"],
    "dots": ["../run.sh"],
    "dots inside": ["a/../../b"],
    "dots at the end": ["a/.."],
    "NUL": ["a\0b"],
    "300 bytes": ["x" * 300],
    "300 bytes of umlauts": ["ü" * 150],
    "300 bytes in a folder": ["a/" + "x" * 300 + "/b"],
    "path over 1,024 bytes": ["/".join(["y" * 200] * 6)],
    "20 levels": ["/".join("abcdefghijklmnopqrst")],
    "twice": ["a.txt", "a.txt"],
    "run.sh twice": ["run.sh"],
    "file and folder": ["a", "a/b"],
    "folder and file": ["a/b", "a"],
    "file deep below a file": ["a", "a/b/c"],
}


@pytest.mark.parametrize("names", BAD_NAMES.values(), ids=BAD_NAMES.keys())
@pytest.mark.parametrize("way", ["filename", "filename*"])
def test_file_names(server: Process, names: list[str], way: str) -> None:
    """400 before anything is stored, in whichever way the name is written; the message says which name."""
    parts = [RUN, *[named_part(name, way) for name in names], USER, SERVICE]
    body = assert_error(post_form(server, parts), 400)
    first = re.sub(r"[\0].*", "", names[-1])[:20]
    assert first in body["message"] or first in str(body.get("field")), body


def named_part(name: str, way: str) -> bytes:
    """A file part whose name is written plainly or percent-encoded (RFC 5987)."""
    if way == "filename":
        return file_part(name, b"content")
    encoded = "".join(f"%{byte:02X}" for byte in name.encode())
    return part(f"form-data; name=\"file\"; filename*=utf-8''{encoded}", b"content")


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x1b[31mred", "tab\tname", "\x7f"])
def test_control_characters_in_names(tmp_path: Path, make_process: MakeProcess, name: str) -> None:
    """Refused by name and without a trace, or kept as any other character: never a split line."""
    process = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    answer = post_form(process, [RUN, named_part(name, "filename*"), USER, SERVICE])
    if answer.status_code == 201:
        stored = process.get(f"/download_partial/{answer.json()['id']}")
        assert stored.status_code == 200
        assert b"content" in stored.content
    else:
        assert_error(answer, 400)
        assert process.jobs() == []
    assert not any(character in process.log for character in "\x1b\x7f\r")
    assert not re.search(r"^b\b", process.log, re.MULTILINE)


# == Bodies ==

WHOLE = form([RUN, USER, SERVICE])


def test_body_cut_off(server: Process) -> None:
    """The caller goes away half way, with and without saying goodbye."""
    head = raw_head("POST", "/upload", server.port, FORM_TYPE, f"Content-Length: {len(WHOLE)}")
    for cut in (0, 10, len(WHOLE) // 2, len(WHOLE) - 3):
        with closing(socket.create_connection(("127.0.0.1", server.port))) as line:
            line.sendall(head + WHOLE[:cut])
        received = raw_exchange(server.port, head + WHOLE[:cut], half_close=True)
        assert b" 201 " not in received
    assert server.get("/health").status_code == 200


def test_body_without_its_end(server: Process) -> None:
    """All bytes that were announced are there, but the form does not end."""
    for body in (WHOLE[:-6], b"".join([RUN, USER, SERVICE]), WHOLE[:60], b"rubbish"):
        assert_error(server.post("/upload", data=body, headers=form_type()), 400)
    assert_error(server.post("/upload", data=b"", headers={**form_type(), "Content-Length": "0"}), [400, 411])


def test_stalled_bodies_do_not_keep_others_waiting(server: Process) -> None:
    """Forty callers stop in the middle of a file: others are served meanwhile, and nothing is left when they go."""
    head = raw_head("POST", "/upload", server.port, FORM_TYPE, "Content-Length: 1000000")
    lines = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    try:
        for line in lines:
            line.sendall(head + WHOLE[:100])
        assert server.get("/health", timeout=10).status_code == 200
        assert server.get("/jobs", timeout=10).status_code == 200
    finally:
        for line in lines:
            line.close()
    assert server.get("/health").status_code == 200


def test_body_without_length(server: Process) -> None:
    """Neither a length nor chunks: 411."""
    code, headers, body = parse_answer(raw_exchange(server.port, raw_head("POST", "/upload", server.port, FORM_TYPE)))
    assert code == 411
    assert_error_body(headers["content-type"], body, "Content-Length")


def chunked(body: bytes, size: int = 50) -> bytes:
    """The body in chunks."""
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("stream", "half_close"),
    [
        (chunked(WHOLE)[:150], True),
        (b"zz\r\nrubbish\r\n0\r\n\r\n", False),
        (b"-5\r\nrubbish\r\n0\r\n\r\n", False),
        (b"ffffffffffffffffffff\r\nrubbish\r\n0\r\n\r\n", True),
        (chunked(b"rubbish"), False),
    ],
    ids=["cut off", "no number", "negative", "endless", "no form"],
)
def test_bad_chunks(server: Process, stream: bytes, half_close: bool) -> None:
    """Chunks that end too early, or are none: refused (or hung up on)."""
    head = raw_head("POST", "/upload", server.port, FORM_TYPE, "Transfer-Encoding: chunked")
    received = raw_exchange(server.port, head + stream, half_close=half_close)
    if received or not half_close:
        code, headers, body = parse_answer(received)
        assert code in (400, 411, 413)
        assert_error_body(headers["content-type"], body)


def test_chunked_body_over_the_limit(server: Process) -> None:
    """Without a length the limit holds all the same, by count (or chunks are refused as such)."""
    head = raw_head("POST", "/upload", server.port, FORM_TYPE, "Transfer-Encoding: chunked")
    start = part('form-data; name="file"; filename="big"', b"")[:-2]
    block = b"%x\r\n%s\r\n" % (MIB, b"x" * MIB)
    received = raw_exchange(server.port, head + chunked(start)[:-5] + block * 66, limit_s=30)
    code, headers, body = parse_answer(received)
    assert code in (411, 413)
    assert_error_body(headers["content-type"], body)


def test_length_and_chunks_at_once(server: Process) -> None:
    """Two lengths, or a length that is no number, are how requests are smuggled: refused."""
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    for lines in (
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: -5"],
        ["Content-Length: 5x"],
        ["Content-Length: +5"],
        ["Transfer-Encoding: gzip"],
    ):
        head = raw_head("POST", "/upload", server.port, FORM_TYPE, *lines)
        code, headers, body = parse_answer(raw_exchange(server.port, head + smuggled, half_close=True))
        assert 400 <= code < 600, lines
        assert code in (400, 411, 501), lines
        assert_error_body(headers["content-type"], body)


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; boundary=another",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "b" * 5000,
    ],
)
def test_wrong_boundary(server: Process, kind: str) -> None:
    """400, and the message says that it is the boundary (or the form) that is wrong."""
    answer = server.post("/upload", data=WHOLE, headers={"Content-Type": kind})
    body = assert_error(answer, 400)
    assert re.search("boundary|multipart|form", body["message"])


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", "rubbish", None])
def test_other_kinds_of_body(server: Process, kind: str | None) -> None:
    """Not a multipart form at all: 415 (or 400), and the message says what is wanted."""
    answer = server.post("/upload", data=WHOLE, headers={"Content-Type": kind} if kind else {})
    assert_error(answer, [400, 415], "multipart/form-data")


def test_too_many_parts(server: Process) -> None:
    """20,001 parts are one too many, be they files or fields."""
    files = [file_part(f"f{i}", b"") for i in range(20_001)]
    fields = [field_part(f"f{i}", "") for i in range(20_001)]
    for many in (files, fields):
        body = assert_error(post_form(server, [RUN, USER, SERVICE, *many]), [400, 413])
        assert re.search("20[, ]?000", body["message"])


def test_parts_without_a_head_or_with_an_endless_one(server: Process) -> None:
    """No Content-Disposition, one of another kind, 64 KiB of header: refused."""
    lead = b"--" + BOUNDARY.encode() + b"\r\n"
    for odd in (
        lead + b"\r\nno header\r\n",
        lead + b"Content-Type: text/plain\r\n\r\nno disposition\r\n",
        part("attachment; filename=x", b"not a form's"),
        part('form-data; name="' + "n" * 65536 + '"', b"long"),
        lead + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\nmany\r\n",
        lead + b"rubbish without a colon\r\n\r\nx\r\n",
    ):
        body = assert_error(post_form(server, [RUN, USER, SERVICE, odd]), [400, 413])
        assert "20000" not in body["message"].replace(",", ""), "it has 4 parts"


# == Sizes ==


def exchange_head(process: Process, *lines: str) -> tuple[int, dict[str, str], bytes]:
    """Send the head of an upload alone, and return the answer that comes before any byte of the body."""
    with closing(socket.create_connection(("127.0.0.1", process.port), timeout=15)) as line:
        line.sendall(raw_head("POST", "/upload", process.port, FORM_TYPE, *lines))
        return parse_answer(read_all(line))


@pytest.mark.parametrize("expect", [["Expect: 100-continue"], []], ids=["with Expect", "without Expect"])
@pytest.mark.parametrize("length", [64 * MIB + 1, 10**15, 10**25])
def test_too_large_by_its_length(server: Process, expect: list[str], length: int) -> None:
    """413 before the body is read, and no `100 Continue` first."""
    code, headers, body = exchange_head(server, f"Content-Length: {length}", *expect)
    assert code == 413
    message = assert_error_body(headers["content-type"], body)["message"]
    assert re.search(r"64 ?M|67108864|67,108,864", message), message


def test_curl_with_a_too_large_file(server: Process, tmp_path: Path) -> None:
    """curl shows the code and our JSON, not a broken connection."""
    with (tmp_path / "big").open("wb") as big:
        big.truncate(80 * MIB)
    command = ["curl", "-sS", "--noproxy", "*", "-F", "file=@big", "-F", "user_id=1", "-w", "%{stderr}%{http_code}"]
    done = subprocess.run([*command, f"{server.url}/upload"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("413"), done
    assert_error_body("application/json", done.stdout.encode())


def test_long_heads(server: Process) -> None:
    """A head without an end: refused with our JSON."""
    lines = [f"X-Long-{i}: " + "y" * 8000 for i in range(50)]
    received = raw_exchange(server.port, raw_head("GET", "/jobs", server.port, *lines))
    code, headers, body = parse_answer(received)
    assert code in (400, 431)
    assert_error_body(headers["content-type"], body)


def test_rubbish_instead_of_a_request(server: Process) -> None:
    """Not HTTP at all: an error or a closed line, and the server lives on."""
    for rubbish in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\r\n" * 10 + b"x y z\r\n\r\n",
    ):
        received = raw_exchange(server.port, rubbish, half_close=True)
        if received:
            code, headers, body = parse_answer(received)
            assert code in (400, 404, 405, 501, 505)
            assert_error_body(headers["content-type"], body)
    assert server.get("/health").status_code == 200


@pytest.fixture
def small_disk(tmp_path: Path, root: None) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_disk_full(make_process: MakeProcess, small_disk: Path) -> None:
    """507 below JOBORCH_MIN_FREE, 507 before the body where it would not fit, and work goes on once there is room."""
    process = make_process("server", {"JOBORCH_MIN_FREE": "16M", "DATA_PATH": str(small_disk)}).start()
    process.data = small_disk
    files = {"run.sh": b"true"}
    assert upload(process, files).status_code == 201
    code, headers, body = exchange_head(process, f"Content-Length: {40 * MIB}", "Expect: 100-continue")
    assert code == 507
    assert_error_body(headers["content-type"], body)
    filler = small_disk / "filler"
    with nothing_left(process):
        filler.write_bytes(bytes(52 * MIB))
        assert_error(upload(process, files), 507, "disk")
        filler.unlink()
    assert upload(process, files).status_code == 201


# == Ids and methods ==

NO_IDS = [
    "0",
    "-1",
    "9" * 30,
    "9223372036854775808",
    "abc",
    "1.5",
    "1e0",
    "+1",
    "%20",
    "0x1",
    "%EF%BC%91",
    "1%00",
    "..",
    "%2e%2e",
]
ID_ROUTES = [
    ("GET", "/download/{}"),
    ("HEAD", "/download/{}"),
    ("GET", "/download_partial/{}"),
    ("POST", "/terminate/{}"),
    ("POST", "/jobs/{}/retry"),
    ("POST", "/jobs/{}/redeliver"),
    ("GET", "/jobs/{}/result"),
    ("GET", "/jobs/{}/files"),
    ("GET", "/jobs/{}/files/run.sh"),
    ("GET", "/jobs/{}"),
]


@pytest.mark.parametrize(("method", "path"), ID_ROUTES)
@pytest.mark.parametrize("number", NO_IDS)
def test_ids_of_the_server(server: Process, method: str, path: str, number: str) -> None:
    """404 for an id that cannot be one (400 where it is no number)."""
    check_no_id(server, method, path.format(number), number, {})


@pytest.mark.parametrize(("method", "path"), [("GET", "/retrieve/{}"), ("GET", "/retrieve_partial/{}"), ("POST", "/kill/{}")])
@pytest.mark.parametrize("number", NO_IDS)
def test_ids_of_the_client(pair: Pair, method: str, path: str, number: str) -> None:
    """The same on the client."""
    check_no_id(pair.client, method, path.format(number), number, {"Authorization": f"Bearer {Pair.TOKEN}"})


def check_no_id(process: Process, method: str, path: str, number: str, headers: dict[str, str]) -> None:
    """Ask with the path exactly as it stands, and expect a clear error."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    request = raw_head(method, path, process.port, "Content-Length: 0", *lines)
    code, answered, body = parse_answer(raw_exchange(process.port, request))
    assert code in ((404,) if re.fullmatch(r"-?\d+", number) else (400, 404)), (path, code, body)
    if method == "HEAD":
        assert body == b""
    else:
        assert_error_body(answered["content-type"], body)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/upload", {"POST"}),
        ("DELETE", "/upload", {"POST"}),
        ("POST", "/jobs", {"GET"}),
        ("PUT", "/jobs/1", {"GET", "DELETE"}),
        ("PUT", "/download/1", {"GET", "HEAD"}),
        ("GET", "/terminate/1", {"POST"}),
        ("PATCH", "/health", {"GET"}),
        ("TRACE", "/jobs", {"GET"}),
        ("BREW", "/jobs", {"GET"}),
    ],
)
def test_methods(server: Process, method: str, path: str, allowed: set[str]) -> None:
    """405, with the methods that are allowed."""
    answer = server.call(method, path)
    assert_error(answer, 405)
    assert allowed <= {each.strip() for each in answer.headers["Allow"].split(",")}
    assert method not in answer.headers["Allow"]


def test_unknown_paths(server: Process) -> None:
    """404 in JSON, for any odd path."""
    for path in (
        "/nowhere",
        "/upload/",
        "/jobs/1/2/3",
        "/..",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/swagger-ui/../../etc/passwd",
    ):
        code, headers, body = parse_answer(raw_exchange(server.port, raw_head("GET", path, server.port)))
        assert code in (404, 405), path
        assert_error_body(headers["content-type"], body)
    for path in (
        "/swagger-ui/%2e%2e/joborch.py",
        "/swagger-ui/..%2fjoborch.py",
        "/swagger-ui/%00",
        "/swagger-ui//etc/passwd",
    ):
        assert parse_answer(raw_exchange(server.port, raw_head("GET", path, server.port)))[0] in (400, 404), path


# == Uploads to the client ==


@pytest.mark.parametrize("names", BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_file_names_at_the_client(pair: Pair, names: list[str]) -> None:
    """The client trusts no server: the same names are refused by /submit, by part name and by file name."""
    headers = {**form_type(), "Authorization": f"Bearer {Pair.TOKEN}"}
    before = pair.client.files()
    for way in ("path as name", "path as filename"):
        files = [submit_part(name, way) for name in ["run.sh", *names]]
        assert_error(pair.client.post("/submit", data=form(files), headers=headers), 400)
    wait_for(lambda: pair.client.files() <= before, what="nothing left")  # the client may still try what isolation it could have


def submit_part(path: str, way: str) -> bytes:
    """A part of /submit: the path is the part's name, or its filename where the name is just `file`."""
    encoded = "".join(f"%{byte:02X}" for byte in path.encode())
    if way == "path as filename":
        return part(f"form-data; name=\"file\"; filename*=utf-8''{encoded}", b"content")
    return part(f"form-data; name*=utf-8''{encoded}; filename=\"x\"", b"content")


def test_client_refuses_an_empty_submit(pair: Pair) -> None:
    """No file at all, no form at all."""
    headers = {"Authorization": f"Bearer {Pair.TOKEN}"}
    assert_error(pair.client.post("/submit", data=form([]), headers={**form_type(), **headers}), 400, "file")
    assert_error(pair.client.post("/submit", data=b"{}", headers=headers), [400, 415])


# == Settings ==


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [
        ("server", "PORT", "abc"),
        ("server", "PORT", "70000"),
        ("server", "PORT", "-1"),
        ("server", "MAX_AGE", "two days"),
        ("server", "MAX_AGE", "-1"),
        ("server", "JOBORCH_MAX_UPLOAD", "10Q"),
        ("server", "JOBORCH_MIN_FREE", "some"),
        ("server", "JOBORCH_SEND_INTERVAL", "nan"),
        ("server", "JOBORCH_ALLOW_ANONYMOUS", "perhaps"),
        ("server", "JOBORCH_COMPAT", "3.0"),
        ("server", "JOBORCH_LOG", "loud"),
        ("server", "JOBORCH_LOG_FORMAT", "xml"),
        ("server", "JOBORCH_HOST", "not a host"),
        ("server", "SERVICE_EXAMPLE_RUNS_PER_USER", "many"),
        ("server", "SERVICE_EXAMPLE_MAX_RUNS", "-1"),
        ("server", "SERVICE_EXAMPLE_CLIENTS", "gpu1"),
        ("server", "SERVICE_EXAMPLE_CLIENTS", "ftp://gpu1"),
        ("server", "SERVICE_EXAMPLE_TIMEOUT", "-1"),
        ("client", "JOBORCH_SLOTS", "0"),
        ("client", "JOBORCH_SLOTS", "all"),
        ("client", "JOBORCH_EXECUTOR", "cloudy"),
        ("client", "JOBORCH_KILL_GRACE", "-1"),
        ("client", "JOBORCH_LOG_LIMIT", "1X"),
        ("client", "JOBORCH_TOKEN", "with blanks and\nlines"),
    ],
)
def test_settings(make_process: MakeProcess, role: str, name: str, value: str) -> None:
    """The program stops at its start with status 2 and one line: the setting, the value, what is allowed."""
    wiring = {"SERVICE_EXAMPLE_CLIENTS": "http://127.0.0.1:9"} if role == "server" else {}
    process = make_process(role, {**wiring, name: value})
    code, said = process.start_refused()
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1, said
    assert name in said
    assert value in said or "TOKEN" in name
    assert process.files() == set(), "it left files although it never started"


def test_flags_are_checked_too(make_process: MakeProcess) -> None:
    """A flag that is wrong or unknown: status 2, and the nearest known is named."""
    code, said = make_process("client", arguments=["--slots", "none"]).start_refused()
    assert (code, "slots" in said.lower(), "Traceback" in said) == (2, True, False)
    code, said = make_process("client", arguments=["--slotz", "2"]).start_refused()
    assert (code, "--slotz" in said, "Traceback" in said) == (2, True, False)


def test_unknown_setting_with_our_prefix(make_process: MakeProcess) -> None:
    """It starts, and warns with the nearest known name."""
    process = make_process("client", {"JOBORCH_SLOTZ": "3", "JOBORCH_TOKEN": "t"}).start()
    line = next(line for line in process.log.splitlines() if "JOBORCH_SLOTZ" in line)
    assert re.search(r"JOBORCH_SLOTS\b", line)


def test_port_in_use(make_process: MakeProcess) -> None:
    """One line that names the port; not a traceback."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for role in ("server", "client"):
            code, said = make_process(role, port=port).start_refused()
            assert code != 0
            assert str(port) in said
            assert "Traceback" not in said


def test_data_folder_that_cannot_be_made(make_process: MakeProcess, tmp_path: Path) -> None:
    """A file where the folder should be: DATA_PATH is named."""
    (tmp_path / "file").write_text("in the way")
    for role in ("server", "client"):
        code, said = make_process(role, {"DATA_PATH": str(tmp_path / "file" / "data")}).start_refused()
        assert code == 2
        assert "DATA_PATH" in said
        assert "Traceback" not in said


def test_data_folder_not_writable(make_process: MakeProcess, open_folder: Path, pyz: Path, root: None) -> None:
    """A folder that belongs to somebody else: DATA_PATH and the folder are named."""
    closed = open_folder / "closed"
    closed.mkdir(mode=0o555)
    program = open_program(open_folder, pyz)
    for role in ("server", "client"):
        settings: dict[str, str | None] = {"DATA_PATH": str(closed)}
        process = make_process(role, settings, folder=open_folder / role, user=NOBODY_UID, program=program)
        code, said = process.start_refused()
        assert code == 2
        assert "DATA_PATH" in said
        assert str(closed) in said
        assert "Traceback" not in said
    assert list(closed.iterdir()) == []


def database(process: Process) -> Path:
    """The database file of a process, found by its first bytes."""
    found = [path for path in process.data.rglob("*") if path.is_file() and path.read_bytes()[:15] == b"SQLite format 3"]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("role", ["server", "client"])
def test_database_of_a_newer_version(make_process: MakeProcess, role: str) -> None:
    """It is left as it is, and the message says that joborch has to be newer."""
    process = make_process(role).start()
    process.stop()
    path = database(process)
    with closing(sqlite3.connect(path)) as connection:
        before = connection.execute("PRAGMA user_version").fetchone()[0]
        assert before > 0, "the schema's version stands in user_version"
        connection.execute("PRAGMA user_version = 9999")
    content = path.read_bytes()
    code, said = process.start_refused()
    assert code != 0
    assert "9999" in said or "newer" in said
    assert "Traceback" not in said
    assert path.read_bytes() == content


@pytest.mark.parametrize("role", ["server", "client"])
def test_database_that_is_none(make_process: MakeProcess, role: str) -> None:
    """A file of other content under DB_PATH: refused, left as it is, named."""
    process = make_process(role)
    path = process.folder / "notes.db"
    path.write_text("these are my notes, not a database\n" * 100)
    process.settings["DB_PATH"] = str(path)
    code, said = process.start_refused()
    assert code != 0
    assert "DB_PATH" in said or str(path) in said
    assert "Traceback" not in said
    assert path.read_text().startswith("these are my notes")


# == Not a bad input, but near to one ==


@pytest.mark.parametrize(
    "name",
    [
        "output.zip",
        "two words.txt",
        "ünïcödé ☃.txt",
        'quote".txt',
        "semi;colon=.txt",
        "-rf",
        "a/b/c/d.txt",
        "%41.txt",
        ".hidden",
        "x" * 255,
    ],
)
def test_unusual_names_that_are_fine(pair: Pair, name: str) -> None:
    """An input may be called anything else, and comes back under its name."""
    from harness import download, submit, wait_status

    number = submit(pair.server, "true", {name: b"content"})
    wait_status(pair.server, number, "Completed")
    assert download(pair.server, number)[name] == b"content"


def test_windows_path_is_reduced(pair: Pair) -> None:
    """A path of a Windows browser is reduced to its base name."""
    from harness import download, submit, wait_status

    number = submit(pair.server, "true", {"C:\\work\\input.pdb": b"content"})
    wait_status(pair.server, number, "Completed")
    assert download(pair.server, number).own_files() == {"run.sh", "input.pdb"}


def test_sixteen_levels_are_fine(pair: Pair) -> None:
    """As deep as is allowed, and 20,000 parts as many as are allowed."""
    answer = upload(pair.server, {"run.sh": b"true", "/".join("abcdefghijklmnop") + "/file": b""})
    assert answer.status_code == 201, answer.text


def test_messages_are_json_for_head_and_get(server: Process) -> None:
    """HEAD bears the head that GET has, without the body."""
    get, head = server.get("/jobs/77"), server.head("/jobs/77")
    assert (get.status_code, head.status_code, head.content) == (404, 404, b"")
    assert json.loads(get.text)["message"]
    assert os.linesep not in get.headers["Content-Type"]
