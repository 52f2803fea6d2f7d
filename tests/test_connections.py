"""Whoever connects gets an answer or is dropped: silence, slowness, floods and rubbish of strangers keep nobody else out.

Servers are real processes; strangers are processes of another user, so that their connections have a limit of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import MakePair, MakeProcess
from harness import (
    BOUNDARY,
    STRANGER_UID,
    assert_error_body,
    field_part,
    file_part,
    form,
    from_source,
    open_python,
    parse_answer,
    raw_exchange,
    raw_head,
    read_all,
    replace,
    run_to_end,
    submit,
    upload,
    wait_for,
    wait_status,
)
from world import serving

import joborch
from joborch_base.connections import UNPROVEN_BYTES, Dispatcher, Watch

GENEROUS_S = 8.0  # by then somebody who has nothing to do with an attack has the answer, on a busy machine too
TICKS = os.sysconf("SC_CLK_TCK")

# Opens so many connections, sends the same text on each, says how many there are, and holds them.
FLOOD = """
import socket, sys, time
port, count, text = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode().decode("unicode_escape").encode()
links = []
for _ in range(count):
    link = socket.socket()
    link.settimeout(5)
    try:
        link.connect(("127.0.0.1", port))
        link.send(text)
    except OSError:
        break
    links.append(link)
print(len(links), flush=True)
time.sleep(600)
"""


def limited(soft: int, hard: int) -> list[str]:
    """The command that starts joborch with these limits of open files."""
    return ["prlimit", f"--nofile={soft}:{hard}", *from_source()]


@contextlib.contextmanager
def flood(port: int, count: int, text: str = r"GET /health HTTP/1.1\r\nX-Slow: ") -> Iterator[int]:
    """A stranger holds so many connections; yields how many it got."""
    command = [open_python(), "-c", FLOOD, str(port), str(count), text]
    stranger = subprocess.Popen(
        ["prlimit", "--nofile=8192:8192", *command],
        stdout=subprocess.PIPE,
        text=True,
        user=0,
        group=STRANGER_UID,
        extra_groups=[],
        cwd="/",
    )
    try:
        assert stranger.stdout is not None
        yield int(stranger.stdout.readline())
    finally:
        stranger.kill()
        stranger.wait()
        if stranger.stdout is not None:
            stranger.stdout.close()


def cpu_s(pid: int) -> float:
    """The CPU time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def health_s(port: int) -> float:
    """How long a caller on a connection of its own waits for /health."""
    begin = time.monotonic()
    status = parse_answer(raw_exchange(port, raw_head("GET", "/health", port)))[0]
    assert status == 200
    return time.monotonic() - begin


def next_answer(line: socket.socket) -> int:
    """The status of the next answer on a connection that stays open."""
    text = line.recv(65536)
    while b"\r\n\r\n" not in text or len(text.partition(b"\r\n\r\n")[2]) < int(parse_answer(text)[1]["content-length"]):
        part = line.recv(65536)
        assert part, f"closed after {text!r}"
        text += part
    return parse_answer(text)[0]


# == Silence ==


@pytest.mark.parametrize(("soft", "hard"), [(1024, 1024), (1024, 4096), (4096, 4096), (256, 256)])
def test_silent_connections_of_a_stranger_lock_nobody_out(soft: int, hard: int, make_process: MakeProcess, root: None) -> None:
    """Of 2,000: others are answered at once, the log gets a line, and the process has nothing to do."""
    server = make_process("server", program=limited(soft, hard)).start()
    before = len(server.log)
    with flood(server.port, 2000) as held:
        assert held > 1900
        took = [health_s(server.port) for _ in range(20)]
        begin, used = time.monotonic(), cpu_s(server.pid)
        wait_for(lambda: time.monotonic() > begin + 3, what="three seconds of nothing")
        share = (cpu_s(server.pid) - used) / (time.monotonic() - begin)
        took.append(health_s(server.port))
    print(f"limits {soft}:{hard}: /health took {max(took) * 1000:.0f} ms at most, {share:.1%} of a core when idle")
    assert max(took) < GENEROUS_S
    assert share < 0.5, "it is to wait, not to spin"
    assert len(server.log) - before < 2000, server.log[before:][:3000]
    assert "connections: no place was free" in server.log or hard > 2500


def test_waiting_callers_stay_while_silent_connections_come_and_go(own_pair: Any, root: None) -> None:
    """500 callers wait for a job, and a stranger is silent on 2,000 connections: /health is quick, and all get their answer."""
    server = own_pair.server
    job = submit(server, "until [ -e go ]; do sleep 0.1; done")
    wait_status(server, job, "Running")
    answers: list[int] = []

    def wait() -> None:
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=60)) as line:
            line.sendall(raw_head("GET", f"/jobs/{job}?wait=5&since=Running", server.port))
            answers.append(parse_answer(read_all(line))[0])

    callers = [threading.Thread(target=wait) for _ in range(500)]
    for caller in callers:
        caller.start()
    with flood(server.port, 2000):
        took = [health_s(server.port) for _ in range(20)]
        for caller in callers:
            caller.join(60)
    print(f"/health took {max(took) * 1000:.0f} ms at most")
    assert max(took) < GENEROUS_S
    assert answers == [200] * 500


def test_who_was_let_in_keeps_his_connection_when_the_house_is_full(make_process: MakeProcess, root: None) -> None:
    """A stranger's connections make room for each other, also those that asked an open route; the owner's are left alone."""
    server = make_process("server", {"JOBORCH_TOKEN": "a-token-for-tests-only"}, program=limited(256, 256)).start()
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as line:
        ask = f"GET /jobs HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer a-token-for-tests-only\r\n\r\n".encode()
        line.sendall(ask)
        assert next_answer(line) == 200
        for text in (
            r"GET /health HTTP/1.1\r\n",
            r"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
            r"POST /health HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
        ):
            with flood(server.port, 300, text):
                assert health_s(server.port) < GENEROUS_S
                line.sendall(ask)
                assert next_answer(line) == 200, text


def test_half_a_head_on_thousands_of_connections_takes_little_memory(make_process: MakeProcess, root: None) -> None:
    """60 KB on each of 2,000 would be 120 MB: who holds it for longest is closed, until all together hold less than the limit."""
    server = make_process("server").start()

    def sockets() -> int:
        links = [str(entry.readlink()) for entry in Path(f"/proc/{server.pid}/fd").iterdir() if entry.is_symlink()]
        return sum(link.startswith("socket:") for link in links)

    own, open_now = sockets(), list[int]()
    with flood(server.port, 2000, r"GET /health HTTP/1.1\r\nX-Long: " + "x" * 60_000) as held:
        assert held > 1900
        for _ in range(20):
            assert health_s(server.port) < GENEROUS_S
            open_now.append(sockets() - own)
    assert min(open_now) <= UNPROVEN_BYTES // 60_000 + 10, open_now


def is_open(line: socket.socket) -> bool:
    """Whether the other side has not closed a connection on which nothing was said."""
    line.setblocking(False)
    try:
        return bool(line.recv(1))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


def test_who_holds_most_places_makes_room_first(make_process: MakeProcess, root: None) -> None:
    """Three silent connections of one address outlast sixty of another, though they are older."""
    server = make_process("server", program=limited(256, 256)).start()
    with contextlib.ExitStack() as stack:

        def connect(source: str, count: int) -> list[socket.socket]:
            where = ("127.0.0.1", server.port)
            return [stack.enter_context(socket.create_connection(where, timeout=10, source_address=(source, 0))) for _ in range(count)]

        few, many = connect("127.0.0.3", 3), connect("127.0.0.2", 58)
        begin = time.monotonic()
        wait_for(lambda: time.monotonic() > begin + 1.5, what="their first second to be over")
        connect("127.0.0.1", 20)
        assert health_s(server.port) < GENEROUS_S
        assert sum(map(is_open, many)) < 50
        assert sum(map(is_open, few)) == 3


def test_a_process_that_runs_out_of_files_waits_for_some(make_process: MakeProcess, root: None) -> None:
    """accept(2) fails as long as there is none: no spinning, no flood of lines, and all is well when there are some again."""
    server = make_process("server").start()
    before = len(server.log)
    used = [int(path.name) for path in Path(f"/proc/{server.pid}/fd").iterdir()]
    subprocess.run(["prlimit", "--pid", str(server.pid), f"--nofile={max(used) + 1}:"], check=True)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", server.port), timeout=30)))
        begin, cpu = time.monotonic(), cpu_s(server.pid)
        wait_for(lambda: time.monotonic() > begin + 3, what="three seconds of nothing")
        assert cpu_s(server.pid) - cpu < 1.5
        assert len(server.log) - before < 2000, server.log[before:][:3000]
        subprocess.run(["prlimit", "--pid", str(server.pid), "--nofile=1024:"], check=True)
        assert health_s(server.port) < GENEROUS_S


def test_a_payload_gets_the_limit_that_its_client_was_started_with(make_pair: MakePair, root: None) -> None:
    """Not the one that the client raised for itself."""
    pair = make_pair(program=limited(1000, 3000)).start()
    job = run_to_end(pair.server, "ulimit -Sn; ulimit -Hn")
    assert job["status"] == "Completed", job
    assert pair.server.get(f"/jobs/{job['id']}/logs").text.split() == ["1000", "3000"]
    for process in (pair.server, pair.client):
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert next(line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files")) == ["3000", "3000"]


# == Slowness ==


def test_a_head_that_does_not_come_to_its_end_is_not_waited_for(make_process: MakeProcess) -> None:
    """Nothing at all, a byte now and then, blank lines, a body that no token goes with; a caller between two requests is left alone."""
    server = make_process("server", {"JOBORCH_TOKEN": "a-token-for-tests-only"}).start()
    begun = {
        "nothing": b"",
        "a byte now and then": b"GET /health HTTP/1.1\r\nX-Slow: ",
        "a body": b"POST /health HTTP/1.1\r\nContent-Length: 999\r\n\r\n",
    }
    with contextlib.ExitStack() as stack:
        lines = {
            name: stack.enter_context(closing(socket.create_connection(("127.0.0.1", server.port), timeout=60)))
            for name in [*begun, "idle"]
        }
        for name, text in begun.items():
            lines[name].sendall(text)
        ask = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
        lines["idle"].sendall(ask)
        assert next_answer(lines["idle"]) == 200
        begin, left = time.monotonic(), dict(lines)

        def drip() -> bool:
            for name in [*left]:
                try:
                    left[name].setblocking(False)
                    if name in ("a byte now and then", "a body"):
                        left[name].send(b"x")
                    if not left[name].recv(100):
                        left.pop(name)
                except BlockingIOError:
                    continue
                except OSError:
                    left.pop(name)
            return set(left) == {"idle"}

        wait_for(drip, 40, "the end of those that send no whole request")
        assert time.monotonic() - begin > 10, "who is a little slow is waited for"
        lines["idle"].setblocking(True)
        lines["idle"].sendall(ask)
        assert next_answer(lines["idle"]) == 200


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in this one has seconds for what may take minutes."""
    replace(monkeypatch, "IDLE_LIMIT_S", 3.0)
    replace(monkeypatch, "PROGRESS_BYTES", 1000)


def drip_form(line: socket.socket, port: int, step: bytes, seconds: float) -> None:
    """Send the head of an upload, and then a piece of its body four times a second, until it is cut off."""
    line.sendall(raw_head("POST", "/upload", port, f"Content-Type: multipart/form-data; boundary={BOUNDARY}", "Content-Length: 900000"))
    begin = time.monotonic()

    def send() -> bool:
        line.sendall(step)
        threading.Event().wait(0.25)
        return time.monotonic() > begin + seconds

    wait_for(send, 60, "the end of the upload")


@pytest.mark.parametrize(("step", "survives"), [(b"x", False), (b"x" * 2000, True)])
def test_an_upload_makes_progress_or_is_given_up(step: bytes, survives: bool, desk: Any, impatient: None) -> None:
    """Bytes now and then are no progress; a slow line that brings something goes on for as long as it takes."""
    with serving(desk.server) as url, closing(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30)) as line:
        if survives:
            drip_form(line, 1, step, 12)
        else:
            with pytest.raises(OSError, match=r"reset|pipe|Broken"):
                drip_form(line, 1, step, 60)
        wait_for(lambda: (desk.data.account.promised > 0) is survives, what="its promise")


def test_a_caller_who_does_not_read_is_given_up(desk: Any, impatient: None) -> None:
    """His connection is closed, and the thread that made the answer is free again."""
    done = threading.Event()

    def answer(environ: Any, start: Callable[..., Any]) -> Iterator[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            done.set()

    desk.restart(PORT="0")
    http = joborch.make_http_server(desk.server, answer)
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    with closing(socket.create_connection(("127.0.0.1", int(http.effective_port)), timeout=30)) as line:
        line.sendall(raw_head("GET", "/jobs", int(http.effective_port)))
        assert line.recv(100)
        assert done.wait(60), "the thread waits for a caller who does not read"
    http.close()


# == Rubbish ==


RUBBISH = [
    b"GET http://[ HTTP/1.1\r\n\r\n",
    b"GET //[::1 HTTP/1.1\r\n\r\n",
    b"GET http://[::1]abc/ HTTP/1.1\r\nConnection: close\r\n\r\n",
    b"POST /upload HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"POST /upload HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"GET /\xff\xfe%00%ff HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: \xff\r\n\r\n",
    b"GET / HTTP/1.1\r\n: nothing\r\n\r\n",
    b"\xc2\xb2 / HTTP/1.1\r\nContent-Length: \xc2\xb2\r\n\r\n",
]


@pytest.mark.parametrize("level", ["info", "debug"])
def test_rubbish_is_answered_and_fills_no_log(level: str, make_process: MakeProcess) -> None:
    """An error in JSON each time; not a byte in the log, and at DEBUG a short line."""
    server = make_process("server", {"JOBORCH_LOG": level}).start()
    before = len(server.log)
    for text in RUBBISH * 10:
        status, headers, body = parse_answer(raw_exchange(server.port, text, limit_s=10))
        assert status < 500 or status == 501, (text, status)
        if status >= 400:
            assert_error_body(headers["content-type"], body)
    said = "".join(line for line in server.log[before:].splitlines(keepends=True) if " client 127.0.0.1:9000: " not in line)
    assert "Traceback" not in said
    assert len(said) < (1 if level == "info" else 300 * 10 * len(RUBBISH)), said[:2000]


def test_many_requests_at_once_on_one_connection_are_refused(make_process: MakeProcess) -> None:
    """Of 10,000 that came before the first answer; a few are served."""
    server = make_process("server").start()
    one = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
    answers = raw_exchange(server.port, one * 10_000)
    assert 1 <= answers.count(b"HTTP/1.1 200") <= 20
    assert b" 400 Bad Request" in answers
    last = raw_head("GET", "/health", server.port)
    assert raw_exchange(server.port, one * 4 + last).count(b"HTTP/1.1 200") == 5


def test_a_chunk_without_end_is_no_memory_leak(make_process: MakeProcess) -> None:
    """The head of a chunk, or what follows the last one, does not grow for ever; nor do chunks of one byte keep others waiting."""
    server = make_process("server").start()
    head = raw_head("POST", "/upload", server.port, "Content-Type: multipart/form-data; boundary=x", "Transfer-Encoding: chunked")
    for body in (b"1;" + b"x" * 100_000, b"0\r\n" + b"X-Trailer: x\r\n" * 20_000):
        assert parse_answer(raw_exchange(server.port, head + body))[0] == 400
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=30)) as line:
        line.sendall(head)
        sender = threading.Thread(target=lambda: [line.sendall(b"1\r\nx\r\n" * 50_000) for _ in range(10)])
        sender.start()
        assert max(health_s(server.port) for _ in range(10)) < GENEROUS_S
        sender.join(60)


# == Slow requests ==


def test_slow_requests_leave_the_others_alone(make_pair: MakePair) -> None:
    """100 callers ask for a job at a client that hangs: health, jobs, waits, small uploads and terminate go on."""
    pair = make_pair().start()
    server = pair.server
    job = submit(server, "sleep 100")
    wait_status(server, job, "Running")
    os.kill(pair.client.pid, signal.SIGSTOP)
    codes: list[int] = []

    def ask() -> None:
        with contextlib.suppress(OSError, AssertionError):
            codes.append(parse_answer(raw_exchange(server.port, raw_head("GET", f"/download_partial/{job}", server.port), limit_s=90))[0])

    callers = [threading.Thread(target=ask, daemon=True) for _ in range(100)]
    try:
        for caller in callers:
            caller.start()
        wait_for(lambda: 503 in codes, what="a refusal: there are more than can wait")
        for _ in range(5):
            assert health_s(server.port) < GENEROUS_S
            begin = time.monotonic()
            assert len(server.jobs()) >= 1
            assert upload(server, {"run.sh": b"true"}).status_code == 201
            assert server.get(f"/jobs/{job}?wait=0.2&since=Running").status_code == 200
            assert time.monotonic() - begin < 2 * GENEROUS_S
    finally:
        os.kill(pair.client.pid, signal.SIGCONT)
    for caller in callers:
        caller.join(90)
    assert set(codes) <= {200, 503}, codes


def test_who_is_turned_away_is_told_when_to_come_again(desk: Any) -> None:
    """503 in JSON, with Retry-After, and the connection of who sent a whole form is not reset."""
    dispatcher = Dispatcher("server")
    dispatcher.pools["form"].most_waiting = 0
    desk.restart(PORT="0")
    http = joborch.make_http_server(desk.server, joborch.make_app(desk.server))
    http.task_dispatcher = dispatcher
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    body = form([file_part("run.sh", b"true"), field_part("user_id", "1"), field_part("service", "example")])
    head = raw_head(
        "POST",
        "/upload",
        int(http.effective_port),
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
        f"Content-Length: {len(body)}",
    )
    status, headers, said = parse_answer(raw_exchange(int(http.effective_port), head + body))
    assert (status, headers["retry-after"]) == (503, "5"), json.loads(said)
    assert desk.data.account.promised == 0
    http.close()


def test_threads_are_made_when_they_are_needed(make_process: MakeProcess) -> None:
    """A process that was never asked for much has few of them."""
    server = make_process("server").start()
    for _ in range(20):
        assert server.get("/health").status_code == 200
    assert len(list(Path(f"/proc/{server.pid}/task").iterdir())) < 30


def test_closing_gives_back_every_address(desk: Any) -> None:
    """All listeners end together: the port can be used again at once, on 127.0.0.1 and ::1."""
    desk.restart(PORT="0")
    http = joborch.make_http_server(desk.server, joborch.make_app(desk.server))
    port = int(http.effective_port)
    http.close()
    for listener in joborch.open_listeners(joborch.DEFAULT_HOSTS, port):
        listener.close()


# == Wake-ups of the I/O thread ==


class Line:
    """A socket as `Watch` sees one; whether it is readable changes from one question to the next."""

    accepting = False

    def __init__(self, line: socket.socket, *readable: bool) -> None:
        self._fileno, self.answers = line.fileno(), list(readable)

    def readable(self) -> bool:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def writable(self) -> bool:
        return False


def test_what_changes_while_it_is_registered_is_seen() -> None:
    """A worker that is done then finds the old events, which are those it needs, and wakes nobody."""
    near, far = socket.socketpair()
    with closing(near), closing(far):
        watch, line = Watch(), Line(near, True)
        watch.register(line)
        assert not watch.is_outdated(line)
        line.answers = [False, True]
        watch.register(line)
        assert not watch.is_outdated(line)
        far.send(b"x")
        assert [descriptor for descriptor, _ in watch.epoll.poll(60)] == [near.fileno()]
        line.answers = [False]
        assert watch.is_outdated(line)
        watch.epoll.close()


class Asked(Line):
    """A connection that counts how often it is asked."""

    serving, count = False, 0

    def readable(self) -> bool:
        self.count += 1
        return super().readable()


def test_connections_that_only_wait_are_not_asked_every_second() -> None:
    """Hundreds of clients may wait for calls. One that was touched is asked once more at the next look."""
    (near, far), (other, end) = socket.socketpair(), socket.socketpair()
    with closing(near), closing(far), closing(other), closing(end):
        watch, idle, busy = Watch(), Asked(near, True), Asked(other, True)
        sockets: dict[int, Any] = {near.fileno(): idle, other.fileno(): busy}
        watch.turn(sockets, 0)
        watch.next_sweep = float("inf")
        watch.touched.append(busy)
        counts = []
        for _ in range(4):
            counts.append((idle.count, busy.count))
            watch.next_look = 0.0 if len(counts) > 1 else float("inf")
            watch.turn(sockets, 0)
        counts.append((idle.count, busy.count))
        assert [after[0] - before[0] for before, after in zip(counts, counts[1:])] == [0, 0, 0, 0]
        assert [after[1] > before[1] for before, after in zip(counts, counts[1:])] == [True, True, False, False]
        watch.next_sweep = 0.0
        watch.turn(sockets, 0)
        assert idle.count > counts[-1][0], "as a precaution"
        watch.epoll.close()


class Told(Line):
    """A connection that keeps a list of the calls it gets."""

    def __init__(self, line: socket.socket) -> None:
        super().__init__(line, True)
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("handle_"):
            raise AttributeError(name)
        return lambda: self.told.append(name)


def test_the_end_of_a_connection_does_not_end_the_next_one_with_its_number() -> None:
    """A worker closes one after epoll has named it, and another is accepted in the same turn."""
    near, far = socket.socketpair()
    with closing(near):
        watch, old, new = Watch(), Told(near), Told(near)
        watch.register(old)
        far.close()
        watch.next_sweep = float("inf")
        watch.turn({near.fileno(): new}, 60)
        assert (old.told, new.told) == ([], [])
        watch.turn({near.fileno(): new}, 60)
        assert new.told, "the next turn registers it"
        watch.epoll.close()


def test_the_end_of_a_connection_that_a_process_being_started_shares_ends_no_other() -> None:
    """The kernel goes on to name it by its number, which another connection has by now (epoll(7), question 6)."""
    (near, far), (new, other) = socket.socketpair(), socket.socketpair()
    with closing(near), closing(far), closing(new), closing(other), closing(near.dup()):
        watch, old = Watch(), Told(near)
        watch.register(old)
        os.dup2(new.fileno(), near.fileno())
        known = Told(near)
        watch.known.clear()
        watch.epoll.register(near.fileno(), select.EPOLLIN)
        watch.known[near.fileno()], watch.next_sweep = (known, select.EPOLLIN | select.EPOLLPRI), float("inf")
        far.close()
        watch.turn({near.fileno(): known}, 60)
        assert "handle_close" not in known.told
        watch.epoll.close()


def test_an_event_of_another_connection_ends_none(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process is started, epoll may report what a closed connection would have, under a number that is taken again."""
    seen: list[Any] = []
    real = Watch.register
    monkeypatch.setattr(Watch, "register", lambda watch, each: (seen.append(each), real(watch, each))[1])
    desk.restart(PORT="0")
    with serving(desk.server) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as link:
        here = link.getsockname()
        connection = wait_for(lambda: next((each for each in list(seen) if getattr(each, "addr", None) == here), None), 60.0)
        connection.handle_read()
        link.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        link.settimeout(60)
        assert parse_answer(read_all(link))[0] == 200


def test_answers_on_a_kept_connection_do_not_wake_the_io_thread(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the next request already. Each of its turns costs CPU, and takes the interpreter from a worker."""
    import waitress.trigger

    pulls, real, count = [0], waitress.trigger.trigger._physical_pull, 50

    def pull(trigger: Any) -> None:
        pulls[0] += 1
        real(trigger)

    monkeypatch.setattr(waitress.trigger.trigger, "_physical_pull", pull)
    desk.restart(PORT="0")
    with serving(desk.server) as url, requests.Session() as session:
        for _ in range(count):
            assert session.get(f"{url}/health", timeout=60).status_code == 200
        assert pulls[0] < count, "as many as answers"


def test_a_listener_is_not_closed_while_a_worker_wakes_it(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of its pipe could belong to another file by then."""
    import waitress.trigger

    real, begun, go_on = waitress.trigger.trigger._physical_pull, threading.Event(), threading.Event()
    http = joborch.make_http_server(desk.server, joborch.make_app(desk.server))

    def pull(trigger: Any) -> None:
        begun.set()
        assert go_on.wait(60)
        real(trigger)  # raises OSError if it is closed

    monkeypatch.setattr(waitress.trigger.trigger, "_physical_pull", pull)
    with futures.ThreadPoolExecutor(2) as pool:
        waking = pool.submit(http.pull_trigger)
        assert begun.wait(60)
        closing = pool.submit(http.close)
        with pytest.raises(futures.TimeoutError):
            closing.result(0.2)
        go_on.set()
        assert waking.result(60) is None and closing.result(60) is None
        http.pull_trigger()  # it does nothing now
