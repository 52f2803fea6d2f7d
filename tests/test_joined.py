"""Clients that call in: they listen nowhere, and everything works as with a client that the server calls."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import (
    ROOT,
    JoinedClient,
    JoinedPair,
    Process,
    children,
    download,
    free_port,
    from_source,
    need_backend,
    partial,
    send_all,
    submit,
    wait_for,
    wait_status,
)
from history import Expected, assert_proven, gather, mark_lines
from proxy import Fault, Proxy
from world import Desk, Gateway, HandClock, event, events, gated, reasons, serve_each, serving, tried

from joborch import DataFolder, HttpError, NothingSent, Session, Status, new_token, report
from joborch_base.calls import frame, read_frames
from joborch_base.tokens import digest_of
from joborch_plugins.joined import BUFFER_BYTES, RESEND_S, Call, Calls, Poll
from joborch_plugins.joining import Call as ClientCall
from joborch_plugins.joining import Exchanges, Uplink, UplinkDown

LIMIT_S = 90.0  # machines are slow now and then

# == The whole way ==


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JoinedPair]:
    """A pair for all tests that break nothing."""
    limits = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "100"}
    pair = JoinedPair(tmp_path_factory.mktemp("joined"), limits, {"JOBORCH_SLOTS": "4"})
    try:
        pair.start()
        yield pair
    finally:
        pair.close()


def test_a_job_from_upload_to_result(joined: JoinedPair) -> None:
    """The client appears by its token's name, without a restart of the server."""
    number = submit(joined.server, "cat in.txt > out.txt; echo said", {"in.txt": b"hello"})
    job = wait_status(joined.server, number, "Completed", limit_s=LIMIT_S)
    assert (job["client"], job["attempt"]) == ("gpu", 1)
    archive = download(joined.server, number)
    assert archive.text("out.txt") == "hello"
    assert joined.server.get(f"/jobs/{number}/logs").text == "said\n"
    (service,) = joined.server.get("/services").json()["services"]
    (client,) = service["clients"]
    assert (client["name"], client["reachable"], client["slots"], client["trouble"]) == ("gpu", True, 4, "")


def test_many_jobs_at_once(joined: JoinedPair) -> None:
    numbers = [submit(joined.server, f"echo {number} > out.txt", user_id=number % 5) for number in range(30)]
    for each in numbers:
        job = wait_status(joined.server, each, "Completed", limit_s=LIMIT_S)
        assert len(job["attempts"]) == 1, job
    assert [download(joined.server, number).text("out.txt") for number in numbers] == [f"{number}\n" for number in range(30)]


def test_nothing_listens(joined: JoinedPair) -> None:
    """No process of the client has a socket that others could connect to."""
    inodes = {str(path.readlink()) for path in Path(f"/proc/{joined.client.pid}/fd").iterdir()}
    tables = [Path(f"/proc/{joined.client.pid}/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
    listening = {f"socket:[{line.split()[9]}]" for lines in tables for line in lines if line.split()[3] == "0A"}
    assert not inodes & listening


def test_a_running_job_is_seen_and_stopped(joined: JoinedPair, tmp_path: Path) -> None:
    """Live output, files while it runs, and the end by a request."""
    number = submit(joined.server, f"echo first\necho data > file.txt\n{gated(tmp_path / 'never')}")
    wait_status(joined.server, number, "Running", limit_s=LIMIT_S)
    wait_for(lambda: joined.server.get(f"/jobs/{number}/logs").text == "first\n", LIMIT_S, "live output")
    wait_for(lambda: "file.txt" in partial(joined.server, number).names(), LIMIT_S, "the file")
    assert joined.server.get(f"/jobs/{number}/files/file.txt").text == "data\n"
    assert joined.server.post(f"/terminate/{number}").status_code in (200, 202)
    assert wait_status(joined.server, number, "Killed", limit_s=LIMIT_S)["cause"] == "cancelled"


def test_a_script_that_fails(joined: JoinedPair) -> None:
    number = submit(joined.server, "echo oops >&2; exit 3")
    job = wait_status(joined.server, number, "Failed", limit_s=LIMIT_S)
    assert (job["exit_code"], job["cause"]) == (3, "user")
    assert joined.server.get(f"/jobs/{number}/logs?stream=stderr").text == "oops\n"


def test_strangers_and_other_tokens_cannot_call(joined: JoinedPair) -> None:
    """Routes for clients need the proof of a client's token: neither an operator nor the token itself is enough."""
    for method, path in (
        ("POST", "/join"),
        ("GET", "/join/calls?session=x"),
        ("POST", "/join/answers?session=x"),
        ("POST", "/join/leave?session=x"),
    ):
        answer = joined.server.call(method, path)
        assert (answer.status_code, "run the line that `joborch token add" in answer.json()["message"]) == (403, True), answer.text
        sent = {"Authorization": f"Bearer {joined.joined.token_file.read_text()}"}
        answer = joined.server.call(method, path, headers=sent)
        assert (answer.status_code, "proves" in answer.text) == (401, True), answer.text
        forged = {"Authorization": f"Joborch nonce={'0' * 32}, peer={'0' * 32}, n=1, mac={'0' * 64}", "X-Joborch-Key": "0" * 32}
        assert joined.server.call(method, path, headers=forged).status_code == 401


# == What breaks, and goes on ==


@pytest.fixture
def make_joined(tmp_path: Path) -> Iterator[Callable[..., JoinedPair]]:
    """Makes pairs of a test's own (not started)."""
    made: list[JoinedPair] = []

    def make(**options: Any) -> JoinedPair:
        made.append(JoinedPair(tmp_path / f"joined{len(made)}", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_both_sides_are_killed_while_a_job_runs(make_joined: Callable[..., JoinedPair], tmp_path: Path) -> None:
    """First the server, then the client, then both: the payload goes on, and is neither lost nor run twice."""
    pair, gate, marks = make_joined(), tmp_path / "gate", tmp_path / "marks"
    pair.start()
    number = submit(pair.server, f"echo started >> {marks}\n{gated(gate)}\necho done > out.txt")
    wait_status(pair.server, number, "Running", limit_s=LIMIT_S)
    pair.server.kill()
    pair.server.start()
    pair.client.kill()
    pair.client.spawn()
    pair.server.kill()
    pair.server.start()
    gate.touch()
    job = wait_status(pair.server, number, "Completed", limit_s=LIMIT_S)
    assert (job["attempt"], marks.read_text(), download(pair.server, number).text("out.txt")) == (1, "started\n", "done\n")
    wait_for(pair.joined.listed, LIMIT_S, "the client to be listed after the restarts")


def test_large_files_go_on_where_they_broke(make_joined: Callable[..., JoinedPair]) -> None:
    """Cuts in the middle of a large input and of a large result: one attempt, and no byte is wrong."""
    pair = make_joined()
    with Proxy(pair.server.port) as proxy:
        pair.client.settings["JOBORCH_JOIN"] = proxy.url
        pair.start()
        faults = [
            proxy.plant(Fault("cut_answer", "GET /join/calls/", after=3_000_000)),
            proxy.plant(Fault("cut_request", "POST /join/answers", after=500_000)),
            proxy.plant(Fault("lost_answer", "POST /join/answers")),
            proxy.plant(Fault("flip_answer", "GET /join/calls/", after=2_000_000)),
        ]
        content = os.urandom(12 << 20)
        number = submit(pair.server, "cat in.bin in.bin > out.bin", {"in.bin": content})
        job = wait_status(pair.server, number, "Completed", limit_s=LIMIT_S)
        assert len(job["attempts"]) == 1, job
        assert download(pair.server, number)["out.bin"] == 2 * content
        assert proxy.counts()["cut_answer"] and proxy.counts()["cut_request"], (proxy.counts(), faults)


def test_a_connection_that_comes_and_goes(make_joined: Callable[..., JoinedPair]) -> None:
    """Every kind of broken exchange costs time alone."""
    pair = make_joined(program=from_source(BACKOFF_FIRST_S=0.05, BACKOFF_LAST_S=0.2))
    with Proxy(pair.server.port) as proxy:
        pair.client.settings["JOBORCH_JOIN"] = proxy.url
        pair.start()
        kinds = ("cut_request", "cut_answer", "lost_answer", "reset", "garbage", "rubbish", "flip_request", "flip_answer", "duplicate")
        for number, kind in enumerate(kinds):
            for where in ("GET /join/calls", "POST /join/answers"):
                proxy.plant(Fault(kind, where, after=number))
        numbers = [submit(pair.server, f"echo {number}") for number in range(12)]
        for number in numbers:
            job = wait_status(pair.server, number, "Completed", limit_s=LIMIT_S)
            assert len(job["attempts"]) == 1, job
        proxy.drop()  # as if its address had changed
        assert wait_status(pair.server, submit(pair.server, "true"), "Completed", limit_s=LIMIT_S)["attempt"] == 1


def test_an_address_that_changes_all_the_time(make_joined: Callable[..., JoinedPair]) -> None:
    """Every connection is lost, again and again, while jobs and large files are on their way. All is plain HTTP/1.1, for any gateway."""
    pair, content = make_joined(program=from_source(BACKOFF_FIRST_S=0.05, BACKOFF_LAST_S=0.2)), os.urandom(3 << 20)
    with Proxy(pair.server.port) as proxy:
        pair.client.settings["JOBORCH_JOIN"] = proxy.url
        pair.start()
        files = {"in.bin": content}
        numbers = [submit(pair.server, "cat in.bin in.bin > out.bin", files, user_id=user) for user in range(6)]
        stop, changes = threading.Event(), list[float]()

        def move() -> None:
            while not stop.wait(0.5):
                proxy.drop()
                changes.append(0.5)

        mover = threading.Thread(target=move)
        mover.start()
        try:
            jobs = [wait_status(pair.server, number, "Completed", limit_s=LIMIT_S) for number in numbers]
            wait_for(lambda: len(changes) > 3, LIMIT_S, "some changes")
            late = wait_status(pair.server, submit(pair.server, "true"), "Completed", limit_s=LIMIT_S)
        finally:
            stop.set()
            mover.join()
        assert [len(job["attempts"]) for job in [*jobs, late]] == [1] * 7
        assert all(download(pair.server, number)["out.bin"] == 2 * content for number in numbers)
        assert {seen.method for seen in proxy.seen} == {"GET", "POST"}
        assert not [seen for seen in proxy.seen if {"upgrade", "http2-settings", "te"} & seen.headers.keys()]


SHORT = {"GAP_S": 1.0, "LATE_S": 1.0, "EVENTS_WAIT_S": 1.0, "SILENT_AFTER_S": 1.0, "READ_TIMEOUT_S": 4.0, "BACKOFF_LAST_S": 0.5}


class Laptop:
    """A client and its payloads, which sleep and wake. What its connections know is lost meanwhile."""

    def __init__(self, pair: JoinedPair, proxy: Proxy) -> None:
        self.pair, self.proxy, self.asleep = pair, proxy, list[int]()

    def sleep(self) -> None:
        self.asleep = [self.pair.client.pid, *children(self.pair.client.pid)]
        send_all(signal.SIGSTOP, self.asleep)
        self.proxy.drop()

    def wake(self) -> None:
        send_all(signal.SIGCONT, self.asleep)


@pytest.mark.parametrize(("moment", "lost_after"), [("idle", "1h"), ("running", "1h"), ("running", "2"), ("sending", "1h")])
def test_a_laptop_that_sleeps_for_a_night(moment: str, lost_after: str, make_joined: Callable[..., JoinedPair], tmp_path: Path) -> None:
    """Longer than anybody is patient: the job says what it waits for, and ends once. If it was given up, it runs a second time."""
    pair = make_joined(server={"SERVICE_EXAMPLE_LOST_AFTER": lost_after, "SERVICE_EXAMPLE_RETRIES": "50"}, program=from_source(**SHORT))
    marks, gate, content = tmp_path / "marks", tmp_path / "gate", os.urandom(4 << 20)
    with Proxy(pair.server.port) as proxy:
        pair.client.settings["JOBORCH_JOIN"] = proxy.url
        pair.start()
        laptop, script = Laptop(pair, proxy), f"{mark_lines(marks)}{gated(gate)}\ncat in.bin in.bin > out.bin"
        if moment == "idle":
            laptop.sleep()
        if moment == "sending":  # the large parts of an answer do not wait for calls
            proxy.plant(Fault("stall", r"POST /join/answers\?.*wait=0", after=500_000, where="request", seconds=600))
        number = submit(pair.server, script, {"in.bin": content})
        if moment == "running":
            wait_status(pair.server, number, "Running", limit_s=LIMIT_S)
            laptop.sleep()
        gate.touch()
        if moment == "sending":
            wait_for(lambda: proxy.counts()["stall"], LIMIT_S, "a part of the result on its way")
            laptop.sleep()
        gone = wait_for(lambda: (pair.joined.listed() or {})["trouble"], LIMIT_S, "the server to miss its client")
        away = wait_for(lambda: is_given_up(pair.server.job(number), lost_after), LIMIT_S, "a job that says what it waits for")
        laptop.wake()
        job = wait_status(pair.server, number, "Completed", limit_s=LIMIT_S)
        assert (job["attempt"] > 1, download(pair.server, number)["out.bin"]) == (lost_after == "2", 2 * content), (gone, away)
        assert "internal error" not in pair.client.log
        wait_for(lambda: (pair.joined.listed() or {})["trouble"] == "", LIMIT_S, "the client to be well")
        expected = {number: Expected(ends=["Completed"], most_attempts=job["attempt"])}
        clients = {"gpu": pair.client.data / "joborch.db"}
        results = pair.server.data / "results"
        assert_proven(gather(pair.server.data / "joborch.db", clients=clients, marks=[marks], results=results, expected=expected))


def is_given_up(job: dict[str, Any], lost_after: str) -> str:
    """What a job says whose client sleeps, once it does."""
    waits = str(job["waiting_for"] or job["message"] or "")
    is_missed = job["attempt"] > 1 if lost_after == "2" else job["status"] in ("Queued", "Unknown")
    return waits if is_missed else ""


def test_clocks_that_jump_by_ten_hours(make_joined: Callable[..., JoinedPair], tmp_path: Path) -> None:
    """Of the server, of the client, and back, while a payload with a time limit runs."""
    pair, gate, clocks = make_joined(), tmp_path / "gate", [tmp_path / "server-off", tmp_path / "client-off"]
    for side, off in zip((pair.server, pair.client), clocks):
        off.write_text("0")
        side.program = [sys.executable, str(ROOT / "tests" / "other_clock.py"), str(off)]
    pair.start()
    number = submit(pair.server, f"{gated(gate)}\necho done > out.txt", timeout=3600)
    wait_status(pair.server, number, "Running", limit_s=LIMIT_S)
    for off, text in [(off, text) for text in ("36000", "-36000", "0") for off in clocks]:
        off.write_text(text)
        wait_status(pair.server, submit(pair.server, "true"), "Completed", limit_s=LIMIT_S)
    assert pair.server.job(number)["status"] == "Running"
    gate.touch()
    job = wait_status(pair.server, number, "Completed", limit_s=LIMIT_S)
    assert (job["attempt"], download(pair.server, number).text("out.txt")) == (1, "done\n")


# == Enrolment ==


def test_a_token_is_bound_revoked_and_limited_to_its_services(make_joined: Callable[..., JoinedPair], tmp_path: Path) -> None:
    """A copy of the token is refused; jobs of other services do not come; a revoked token ends the link."""
    pair = make_joined(server={"SERVICE_MD_MAX_RUNS": "3"})
    pair.start()
    thief = JoinedClient(tmp_path / "thief", pair.server, "gpu")
    try:
        shutil.copy(pair.joined.token_file, thief.token_file)
        thief.spawn()
        wait_for(lambda: "belongs to the client that used it first" in thief.log, LIMIT_S, "the refusal of a second client")
        wait_for(lambda: "another client" in pair.server.log, LIMIT_S, "a line in the server's log")
    finally:
        thief.close()
    other = submit(pair.server, "true", service="md")
    mine = submit(pair.server, "true")
    assert wait_status(pair.server, mine, "Completed", limit_s=LIMIT_S)["client"] == "gpu"
    said = pair.server.job(other)
    assert (said["status"], said["waiting_for"]) == ("Queued", "no client for md takes jobs: none has joined this server for it")
    assert pair.server.call("DELETE", "/tokens/gpu").status_code == 200
    wait_for(lambda: pair.joined.listed() is None, LIMIT_S, "the client to be gone from the list")
    wait_for(lambda: "401" in pair.client.log or "token" in pair.client.log.rpartition("WARNING")[2], LIMIT_S, "the client to say why")
    late = submit(pair.server, "true")
    assert "none has joined" in str(pair.server.job(late)["waiting_for"]), reasons(pair.server.job(late))


def test_goodbye(make_joined: Callable[..., JoinedPair], tmp_path: Path) -> None:
    """A client that stops is forgotten at once, unless it has jobs; then it is known to be away, and they go on when it is back."""
    pair, gate = make_joined(), tmp_path / "gate"
    pair.start()
    number = submit(pair.server, gated(gate))
    wait_status(pair.server, number, "Running", limit_s=LIMIT_S)
    assert pair.client.stop() == 0
    assert "has stopped" in str((pair.joined.listed() or {})["trouble"])
    gate.touch()
    pair.client.spawn()
    wait_status(pair.server, number, "Completed", limit_s=LIMIT_S)
    assert pair.client.stop() == 0
    wait_for(lambda: pair.joined.listed() is None, LIMIT_S, "the client to be gone from the list")


def test_a_client_that_dies_while_its_token_is_replaced(liars: Desk, make_process: Callable[..., Process], tmp_path: Path) -> None:
    """The server has taken the new token already, so the old one is of no use: the client finds the new one."""
    store, file = liars.server.token_store, tmp_path / "token"
    file.write_text(store.add("gpu", "client", "md", None, None, once=True))
    with serving(liars.server) as url:
        client = make_process("client", {"JOBORCH_JOIN": url, "JOBORCH_TOKEN_FILE": str(file), "JOBORCH_TEST_CRASH": "join.renewed"})
        client.spawn()
        assert client.process is not None
        assert client.process.wait(LIMIT_S) == -signal.SIGKILL, client.log
        new, instance = store.by_name["gpu"].digest, store.by_name["gpu"].instance
        client.settings["JOBORCH_TEST_CRASH"] = None
        client.spawn()
        wait_for(lambda: "gpu" in liars.server.links, LIMIT_S, "the client to join")
        assert (store.by_name["gpu"].digest, store.by_name["gpu"].instance) == (new, instance)
        wait_for(lambda: digest_of(file.read_text()) == new, LIMIT_S, "the new token in the file")
        assert [path.name for path in tmp_path.glob("token*")] == ["token"]


def test_what_the_settings_must_be(make_process: Callable[..., Process]) -> None:
    code, said = make_process("client", {"JOBORCH_JOIN": "https://server.example.org"}).start_refused()
    assert (code, "joborch token add" in said) == (2, True), said
    code, said = make_process("client", {"JOBORCH_JOIN": "server:5000", "JOBORCH_TOKEN": "t" * 20}).start_refused()
    assert (code, "give the URL of each server" in said) == (2, True), said


def test_several_servers(make_joined: Callable[..., JoinedPair], make_process: Callable[..., Process]) -> None:
    """One client serves two servers with a token of each, and one of them need not answer."""
    pair, other = make_joined(), make_process("server", {"SERVICE_EXAMPLE_CLIENTS": ""}).start()
    pair.server.start()
    pair.joined.enrol()
    second = other.post("/tokens", params={"name": "lab", "role": "client", "services": "example"}).json()["token"]
    pair.joined.token_file.write_text(f"{pair.joined.token_file.read_text()},{second}\n")
    pair.client.settings["JOBORCH_JOIN"] = f"{pair.server.url}, {other.url}"
    pair.client.start(LIMIT_S)
    for server, name in ((pair.server, "gpu"), (other, "lab")):
        numbers = [submit(server, f"echo {server.port} {number} > out.txt") for number in range(5)]
        for number, job in enumerate(numbers):
            assert wait_status(server, job, "Completed", limit_s=LIMIT_S)["client"] == name
            assert download(server, job).text("out.txt") == f"{server.port} {number}\n"
    late = submit(other, "sleep 1")
    other.kill()
    assert wait_status(pair.server, submit(pair.server, "true"), "Completed", limit_s=LIMIT_S)["attempt"] == 1
    other.start()
    assert wait_status(other, late, "Completed", limit_s=LIMIT_S)["attempt"] == 1


# == Gateways ==


class Tunnel:
    """A real sshd on loopback, whose root has another home, and ssh with a forwarded port (`port`) through it."""

    def __init__(self, folder: Path, target: int) -> None:
        need_backend(Path("/usr/sbin/dropbear"))
        self.folder, self.target, self.port, self.gate = folder, target, free_port(), free_port()
        (folder / "home/.ssh").mkdir(parents=True, mode=0o700)
        (folder / "home").chmod(0o700)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "key"], cwd=folder, check=True)
        shutil.copy(folder / "key.pub", folder / "home/.ssh/authorized_keys")
        (folder / "home/.ssh/authorized_keys").chmod(0o600)
        subprocess.run(["dropbearkey", "-t", "ed25519", "-f", "host"], cwd=folder, check=True, capture_output=True)
        home = Path("~root").expanduser()
        command = f"mount --bind home {home} && exec dropbear -F -E -s -r host -P pid -p 127.0.0.1:{self.gate}"
        self.sshd = self.run("unshare", "--mount", "sh", "-c", command)
        self.ssh = self.connect()

    def run(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(words, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def connect(self) -> subprocess.Popen[bytes]:
        """Open the tunnel."""
        options = (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "BatchMode=yes",
            "ConnectionAttempts=60",
            "ExitOnForwardFailure=yes",
        )
        words = [word for option in options for word in ("-o", option)]
        forwarded = f"127.0.0.1:{self.port}:127.0.0.1:{self.target}"
        return self.run("ssh", "-N", "-F", "none", "-i", "key", *words, "-p", str(self.gate), "-L", forwarded, "root@127.0.0.1")

    def close(self) -> None:
        for process in (self.ssh, self.sshd):
            process.kill()
            process.wait(LIMIT_S)


def test_through_an_ssh_tunnel(make_joined: Callable[..., JoinedPair], tmp_path: Path, root: None) -> None:
    """It breaks while a job runs, and comes back."""
    pair, gate = make_joined(program=from_source(BACKOFF_LAST_S=1.0)), tmp_path / "gate"
    pair.server.start()
    tunnel = Tunnel(tmp_path / "tunnel", pair.server.port)
    try:
        pair.client.settings["JOBORCH_JOIN"] = f"http://127.0.0.1:{tunnel.port}"
        pair.joined.enrol()
        pair.client.start(LIMIT_S)
        number = submit(pair.server, f"{gated(gate)}\ncat in.bin > out.bin", {"in.bin": bytes(1 << 20)})
        wait_status(pair.server, number, "Running", limit_s=LIMIT_S)
        tunnel.ssh.kill()
        tunnel.ssh.wait(LIMIT_S)
        gate.touch()
        tunnel.ssh = tunnel.connect()
        job = wait_status(pair.server, number, "Completed", limit_s=LIMIT_S)
        assert (job["attempt"], download(pair.server, number)["out.bin"]) == (1, bytes(1 << 20))
    finally:
        tunnel.close()


def test_behind_nginx_with_its_defaults(make_joined: Callable[..., JoinedPair], tmp_path: Path) -> None:
    """It buffers, refuses bodies over 1 MiB, and loses patience with silence."""
    pair = make_joined()
    pair.server.start()
    gateway = Gateway(tmp_path / "nginx", pair.server, 3)
    try:
        pair.client.settings["JOBORCH_JOIN"] = f"http://127.0.0.1:{gateway.hasty}"
        pair.joined.enrol()
        pair.client.start()
        content = os.urandom(5 << 20)
        number = submit(pair.server, "sleep 4; cat in.bin > out.bin", {"in.bin": content})  # longer than nginx is patient
        wait_status(pair.server, number, "Completed", limit_s=LIMIT_S)
        assert download(pair.server, number)["out.bin"] == content
    finally:
        gateway.close()


class ConnectProxy:
    """A proxy that knows CONNECT alone, and wants a name and a password."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=serve_each, args=(self.listener, self.serve), daemon=True).start()

    def serve(self, line: socket.socket) -> None:
        with closing(line), suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += line.recv(1)
            first, *fields = head.decode("latin-1").split("\r\n")
            self.asked.append(first)
            secret = base64.b64encode(b"me:pass word").decode()
            if not first.startswith("CONNECT ") or f"Proxy-Authorization: Basic {secret}" not in fields:
                line.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            host, _, port = first.split()[1].rpartition(":")
            with socket.create_connection((host, int(port))) as target:
                line.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                ends = {line: target, target: line}
                while True:
                    for ready in select.select([line, target], [], [])[0]:
                        data = ready.recv(65536)
                        if not data:
                            return
                        ends[ready].sendall(data)


def test_tls_with_a_private_ca_through_a_proxy(make_joined: Callable[..., JoinedPair], tmp_path: Path) -> None:
    """HTTPS_PROXY with CONNECT, a name and a password; the certificate is checked with JOBORCH_CA_FILE."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "ca.pem", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key.pem")
    pair, proxy = make_joined(), ConnectProxy()
    pair.server.start()
    with closing(socket.create_server(("127.0.0.1", 0))) as listener, closing(proxy.listener):
        threading.Thread(target=unwrap_all, args=(listener, context, pair.server.port), daemon=True).start()
        settings = {
            "JOBORCH_JOIN": f"https://127.0.0.1:{listener.getsockname()[1]}",
            "HTTPS_PROXY": f"http://me:pass%20word@127.0.0.1:{proxy.port}",
        }
        pair.client.settings.update(settings, JOBORCH_CA_FILE=None)
        pair.joined.enrol()
        pair.client.spawn()
        wait_for(lambda: "certificate" in pair.client.log, LIMIT_S, "a refusal of the unknown certificate")
        assert pair.joined.listed() is None
        pair.client.kill()
        pair.client.settings["JOBORCH_CA_FILE"] = str(tmp_path / "ca.pem")
        pair.client.start(LIMIT_S)
        wait_status(pair.server, submit(pair.server, "true"), "Completed", limit_s=LIMIT_S)
        assert {each.rpartition(" ")[0] for each in proxy.asked} == {f"CONNECT 127.0.0.1:{listener.getsockname()[1]}"}


def unwrap_all(listener: socket.socket, context: ssl.SSLContext, port: int) -> None:
    """Take the TLS away from each connection, and pass what it brings on to a port."""
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=unwrap, args=(line, context, port), daemon=True).start()


def unwrap(line: socket.socket, context: ssl.SSLContext, port: int) -> None:
    with closing(line), suppress(OSError):
        secure = context.wrap_socket(line, server_side=True)
        with socket.create_connection(("127.0.0.1", port)) as target, closing(secure):
            threading.Thread(target=pump, args=(target, secure), daemon=True).start()
            pump(secure, target)


def pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)


# == Clients that lie ==


@pytest.mark.parametrize(
    ("proxy", "exempt", "said"),
    [
        ("socks5://127.0.0.1:1", "", "the proxy in HTTPS_PROXY is of the kind socks5: give one that is called by http://"),
        ("https://me:secret@127.0.0.1:1", "", "the proxy in HTTPS_PROXY is of the kind https: give one that is called by http://"),
        ("socks5://127.0.0.1:1", "127.0.0.1", "connection refused"),
        ("socks5://127.0.0.1:1", "127.0.0.1:9", "connection refused"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(proxy: str, exempt: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_PROXY may have a port, too."""
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", exempt)
    error = tried(lambda: Exchanges("https://127.0.0.1:9", new_token(), "").ask("POST", "/join"), UplinkDown)
    assert said in str(error)
    assert "secret" not in str(error)


@pytest.fixture(name="liars")
def liars_fixture(data: DataFolder) -> Iterator[Desk]:
    """A server with a client that it calls, for the service example, and the service md for clients that call in."""
    desk = Desk(data, "http://127.0.0.1:9", SERVICE_MD_MAX_RUNS="3")
    yield desk
    desk.store.close()


def enrolled(desk: Desk, url: str, name: str) -> Exchanges:
    """What makes requests as a client with a token of this name, for the service md."""
    return Exchanges(url, desk.server.token_store.add(name, "client", "md", None, None), "")


def joins(client: Exchanges, **said: Any) -> tuple[int, str]:
    """The status and message of the answer to an offer."""
    heard = client.ask("POST", "/join", json.dumps({"instance": "abc", "start": "def", "services": ["md"], **said}).encode())
    return heard.status, heard.message


@pytest.mark.parametrize(
    "text", ["\ud800", "a\nb", "\x00", "\x1b[31m", "a b", "\u202e", "x" * 65, "", 1, None, ["a"]], ids=lambda text: ascii(text)[:12]
)
def test_an_offer_with_odd_texts_is_refused_and_not_logged(text: object, liars: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """They would be stored with the token, and written to the log."""
    with serving(liars.server) as url:
        client, remedy = enrolled(liars, url, "gpu"), "send JSON with the names instance, start and, if it serves only some, services"
        for said in ({"instance": text}, {"start": text}, {"services": [text]}):
            assert joins(client, **said) == (400, f"the body is no offer of a client: {remedy}"), said
        assert liars.server.token_store.by_name["gpu"].instance is None
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_client_cannot_pose_as_another_one(liars: Desk) -> None:
    """Neither at its first call nor later: its slots, drains and jobs would be those of the other."""
    victim = liars.link
    victim.instance = "the-victim"
    victim.heard()
    with serving(liars.server) as url:
        client = enrolled(liars, url, "gpu")
        code, said = joins(client, instance="the-victim")
        assert (code, said) == (403, f"the client {victim.name} has this database: start this one with an empty DATA_PATH")
    store = liars.server.token_store
    store.bind("gpu", "its-own")
    link = liars.server.plugins["joined"].add("gpu", ("md",))
    for instance in ("the-victim", "its-own"):
        text = io.BytesIO(events(instance=instance).partition(b"\r\n\r\n")[2])
        answer: Any = SimpleNamespace(status=200, headers={}, piece=text.read, close=text.close)
        heard = tried(functools.partial(link.events_of, answer), NothingSent)
        assert isinstance(heard, NothingSent) == (instance == "the-victim"), heard


def test_of_two_clients_that_join_at_once_with_a_copied_token_one_is_refused(liars: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find the token unbound, and the first one binds it a moment before the second one does."""
    store = liars.server.token_store
    bind = store.bind

    def late(name: str, instance: str) -> None:
        bind(name, "the-first")
        bind(name, instance)

    monkeypatch.setattr(store, "bind", late)
    with serving(liars.server) as url:
        code, said = joins(enrolled(liars, url, "gpu"), instance="the-second")
    assert (code, said[:55]) == (403, "the token gpu belongs to the client that used it first:")
    assert "gpu" not in liars.server.links


def test_a_client_gets_no_job_of_another_service_by_reporting_it(liars: Desk) -> None:
    """Also not while the client that has the job is silent, or after a restart of the server."""
    job, home = liars.with_client(), liars.link
    link = liars.server.plugins["joined"].add("gpu", ("md",))
    home.failed("is silent")
    assert home.outage.failures
    for status in ("Running", "Completed", "Failed"):
        report(liars.server, link, event(job, status=status))
        assert liars[job] == job and not link.reports()
    link.offer(("md", "example"))
    report(liars.server, link, event(job))
    assert liars[job].client == "gpu", "a client that may have it can have two names"


def test_a_client_that_is_called_gets_no_job_of_another_service_by_reporting_it(data: DataFolder) -> None:
    """It knows the uuid, and the client that has the job is silent: another token is not enough."""
    others = {"SERVICE_MD_CLIENTS": "http://127.0.0.1:8", "SERVICE_MD_TOKEN": "another-token"}
    desk = Desk(data, "http://127.0.0.1:9", **others, SERVICE_LIKE_CLIENTS="http://127.0.0.1:7", SERVICE_LIKE_TOKEN="a-token")
    home, liar, like = (desk.server.links[f"127.0.0.1:{port}"] for port in (9, 8, 7))
    job = desk.upload()
    assert desk.store.claim(job.id, home.name, 100) and desk.store.move(desk[job], Status.SUBMITTED, "", dest_id="7")
    home.failed("is silent")
    report(desk.server, liar, event(desk[job]))
    assert desk[job].client == home.name and not liar.reports()
    report(desk.server, like, event(desk[job]))
    assert desk[job].client == like.name, "its token is that of the job's service, so it may be the same client"
    desk.store.close()


def test_a_session_ends_with_its_token_also_if_the_name_is_given_again(liars: Desk) -> None:
    """The poll of the former holder must not get the calls for the new one, nor calls with the former key."""
    joined, store = liars.server.plugins["joined"], liars.server.token_store
    store.add("gpu", "client", "md", None, None)
    former, link = store.by_name["gpu"], joined.add("gpu", ("md",))
    (session, _), caller = link.calls.begin("a-start"), former.caller("link")
    assert joined.link_of(caller, session) is link
    link.sessions[""] = Session(bytes.fromhex(str(former.key)), "0" * 32)
    assert link.session(None).key.hex() == former.key
    store.revoke("gpu")
    store.add("gpu", "client", "md", None, None)
    assert tried(lambda: joined.link_of(caller, session), HttpError).status == 401
    assert tried(lambda: joined.join(caller, "abc", "def", ()), HttpError).status == 401
    link.calls.seen_at = float("-inf")  # nobody answers, so a new session cannot begin; but the former one is not used
    assert isinstance(tried(lambda: link.session(None), NothingSent), NothingSent)


# == Calls ==


def connection(closed: bool = False) -> Any:
    return SimpleNamespace(closed=closed)


def numbers_of(text: bytes) -> list[int]:
    return [said["number"] for said, _ in read_frames(text)]


def test_a_call_comes_again_until_a_later_poll_shows_that_it_arrived() -> None:
    clock, served = HandClock(), list[str]()
    calls = Calls(clock)
    assert calls.park(0, Poll(connection(), lambda: served.append("first"), 2000.0))
    first, second = Call(calls), Call(calls)
    calls.put(first, {"call": {}}, b"body")
    assert served == ["first"]
    assert [data for _, data in read_frames(calls.take(0))] == [b"body"]
    assert calls.take(0) == b"", "it is on its way"
    assert not calls.park(0, Poll(connection(), lambda: None, 2000.0), lost=True)
    calls.put(second, {"call": {}}, b"")
    assert numbers_of(calls.take(0)) == [1, 2]
    clock.pass_s(RESEND_S + 1)
    assert numbers_of(calls.take(1)) == [2], "nothing shows that the second has arrived"
    assert calls.park(2, Poll(connection(), lambda: served.append("second"), 2000.0))
    first.close()
    assert served == ["first", "second"]
    assert list(read_frames(calls.take(2))) == [({"number": 3, "cancel": 1}, b"")]


def test_the_last_request_that_waits_gets_the_call_and_the_others_rest() -> None:
    """One poll is woken for several calls; the next one if the connection of the first is gone."""
    clock, served = HandClock(), list[str]()
    calls = Calls(clock)
    lines = {name: connection() for name in ("old", "dead", "new")}
    for name, line in lines.items():
        assert calls.park(0, Poll(line, functools.partial(served.append, name), clock.monotonic() + 50))
    for _ in range(2):
        calls.put(Call(calls), {"call": {}}, b"")
    assert served == ["new"], "one is enough for both"
    lines["dead"].closed = True
    clock.pass_s(2)  # and no answer was made
    calls.look()
    assert served == ["new", "old"] and not calls.polls
    assert numbers_of(calls.take(0)) == [1, 2]


def test_a_call_that_was_not_acknowledged_comes_again_with_a_poll_that_waits() -> None:
    clock, served = HandClock(), list[str]()
    calls = Calls(clock)
    calls.put(Call(calls), {"call": {}}, b"")
    assert numbers_of(calls.take(0)) == [1]
    assert calls.park(0, Poll(connection(), lambda: served.append("again"), clock.monotonic() + 50))
    calls.look()
    assert served == []
    clock.pass_s(RESEND_S + 1)
    calls.look()
    assert served == ["again"] and numbers_of(calls.take(0)) == [1]


def test_parts_of_an_answer_may_come_twice_but_not_in_disorder() -> None:
    call = Call(Calls(HandClock()))
    call.settimeout(1.0)
    assert call.add(0, b"abc", {}) and call.add(0, b"abc", {}) and call.add(9, b"x", {})
    assert call.add(3, b"de", {"end": True})
    buffer = bytearray(10)
    assert (call.recv_into(buffer), bytes(buffer[:5]), call.recv_into(buffer)) == (5, b"abcde", 0)


def test_an_answer_that_nobody_reads_has_to_come_later() -> None:
    call = Call(Calls(HandClock()))
    assert call.add(0, bytes(BUFFER_BYTES + 1), {})
    assert not call.add(BUFFER_BYTES + 1, b"x", {})


def test_who_waits_hears_that_a_client_has_left() -> None:
    calls = Calls(HandClock())
    call = Call(calls)
    calls.put(call, {"call": {}}, b"")
    calls.begin("another start")
    with pytest.raises(ConnectionResetError):
        call.recv_into(bytearray(1))


def test_a_silent_client_is_not_there() -> None:
    clock = HandClock()
    calls = Calls(clock)
    assert not calls.is_here()
    parked = Poll(connection(), lambda: None, clock.monotonic() + 50)
    assert calls.park(0, parked)
    clock.pass_s(40)
    assert calls.is_here()
    parked.connection.closed = True
    calls.look()
    assert calls.is_here()  # it may be on its way back
    clock.pass_s(16)
    assert not calls.is_here()


@pytest.mark.parametrize(
    "text", [b"x", b"{}", b"[]\n", b'{"bytes": 5}\nabc', b'{"bytes": -1}\n', b'{"bytes": 1, "sha256": "0"}\nx', b'{"bytes": true}\nx']
)
def test_frames_that_are_none(text: bytes) -> None:
    assert isinstance(tried(lambda: list(read_frames(text)), ValueError), ValueError)


def test_frames() -> None:
    text = frame({"a": 1}, b"one\n") + frame({"b": 2}) + frame({"c": "\n"}, b"")
    assert [(set(said) - {"bytes", "sha256"}, data) for said, data in read_frames(text)] == [({"a"}, b"one\n"), ({"b"}, b""), ({"c"}, b"")]


@pytest.mark.parametrize("is_last", [True, False])
def test_a_call_that_comes_with_the_answer_to_a_part_is_not_lost(is_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that sent the part goes on with it after its last part only."""
    settings = SimpleNamespace(ca_file="", orphan_after_s=0.0, token_file="")
    client: Any = SimpleNamespace(stopping=threading.Event(), config=settings, clock=HandClock())
    uplink, handed = Uplink(client, None, "http://127.0.0.1:9", "a-token-of-a-client"), list[Any]()
    said = {"method": "GET", "target": "/hello", "size": 0, "headers": {}}
    monkeypatch.setattr(uplink, "exchange", lambda *_: frame({"number": 1, "call": said}, b""))
    monkeypatch.setattr(uplink.pool, "add", handed.append)
    uplink.session = "a-session"
    following = uplink.send(ClientCall(uplink, "a-session", 0, said, b""), b"a part", is_last)
    assert (following is None, len(handed)) == (not is_last, int(not is_last))
    assert uplink.calls[1].target == "/hello"
