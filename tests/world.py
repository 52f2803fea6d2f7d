"""What several tests share: clocks, jobs, data folders, peers, servers and clients whose ticks a test calls.

Fixtures made of these stand in conftest.py. harness.py starts joborch as real processes and uses nothing of joborch itself.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import uuid
import wsgiref.util
import zipfile
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import requests
from harness import (
    BOUNDARY,
    Process,
    clean_environment,
    end_all_below,
    file_part,
    form,
    free_port,
    from_source,
    need_backend,
    processes_below,
    submit,
    wait_for,
    wait_status,
)
from hypothesis import settings
from hypothesis import strategies as st
from waitress import wasyncore

import joborch
from joborch import (
    BackendUnavailable,
    Client,
    DataFolder,
    HttpError,
    Job,
    Link,
    Outcome,
    Server,
    Status,
    StillRunning,
    Store,
    SubmitRefused,
    Tree,
    ZipPacker,
    dispatch_tick,
    fetch_tick,
    load_config,
    recover_payloads,
    run_tick,
    send_tick,
)
from joborch_base import statements
from joborch_base.connections import FoldedHeaders
from joborch_base.identity import PROOF_SHAPE, Proof, link_key
from joborch_base.routes import Caller
from joborch_base.scheduling import Waiting
from joborch_base.settings import client_address

# == What a test begins with ==

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
BOUNDED = settings(deadline=None, max_examples=100)  # machines are slow now and then: no test fails by its time
FIRST = {"server": Status.QUEUED, "client": Status.PREPARED}


def heads(store: joborch.Store, service: str, limit: int = 100) -> list[Waiting]:
    """The next jobs of those users who have a free run, in the order of their turns."""
    return [turn.head for turn in itertools.islice(store.turns(service), limit)]


class HandClock(joborch.Clock):
    """Time that stands still until a test moves it; wall and monotonic time go together unless somebody sets the clock."""

    def __init__(self, wall: float = 1_795_510_800.0) -> None:
        self.now, self.beginning, self.off, self.boots = wall, wall, 0.0, 1

    def wall(self) -> float:
        return self.now + self.off

    def monotonic(self) -> float:
        return self.now - self.beginning + 1000.0

    def boot(self) -> tuple[str, float]:
        return f"boot-{self.boots}", self.monotonic()

    def set_s(self, seconds: float) -> None:
        """Set the clock forward, or back: wall time alone."""
        self.off += seconds

    def reboot(self) -> None:
        """Switch the machine off and on: boot time begins anew."""
        self.boots, self.beginning = self.boots + 1, self.now

    def pass_s(self, seconds: float) -> None:
        """Let time go by."""
        self.now += seconds


def a_service(name: str = "example", *urls: str, **changes: Any) -> joborch.Service:
    """A service with the default limits, at clients with these base URLs."""
    addresses = tuple(client_address(url) for url in urls or ("http://127.0.0.1:9000",))
    return dataclasses.replace(joborch.Service(name, addresses, token="token"), **changes)


def new_job(**changes: Any) -> joborch.NewJob:
    """A job of user 1 for `example`, with a uuid of its own."""
    return dataclasses.replace(joborch.NewJob(str(uuid.uuid4()), user_id=1, service="example", retries=2), **changes)


def all_jobs(store: joborch.Store) -> list[joborch.Job]:
    """All jobs of a store, the newest first."""
    jobs, following = store.page(joborch.Filter(), 1000, joborch.BIGGEST)
    assert following is None
    return jobs


def changed(job: joborch.Job, **changes: Any) -> joborch.Job:
    """A job as it would be with other columns."""
    return job._replace(**changes)


def tried(call: Callable[[], T], error: type[E]) -> T | E:
    """What `call` returns, or the error with which it refuses."""
    try:
        return call()
    except error as raised:
        return raised


def together(count: int, work: Callable[[int], object]) -> None:
    """Run `work(0)`, `work(1)`... in as many threads, from one start; what one raises is raised here."""
    ready, errors = threading.Barrier(count), list[BaseException]()

    def run(number: int) -> None:
        ready.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    for error in errors:
        raise error


def soon(call: Callable[[], Any], folder: Path) -> Any:
    """What `call` returns; fails where it hangs on a fifo in `folder` (and lets it go on)."""
    got: list[Any] = []

    def run() -> None:
        try:
            got.append(call())
        except Exception as error:  # noqa: BLE001 - shown by the assertion of the caller
            got.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    hangs = thread.is_alive()
    for pipe in folder.rglob("*") if hangs else ():
        if pipe.is_fifo():
            os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
    thread.join(5)
    assert not hangs, "it hangs on a fifo"
    return got[0]


# == Folders, files and archives ==


@contextlib.contextmanager
def new_folder() -> Iterator[Path]:
    """A folder for one example; Hypothesis gives all examples of a test the same tmp_path."""
    path = Path(tempfile.mkdtemp(prefix="joborch-test-"))
    try:
        yield path
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", str(path)], check=False, stderr=subprocess.DEVNULL)
        joborch.remove_tree(path)


class Trickle(io.RawIOBase):
    """A stream that gives what it has in pieces of odd sizes, never more than asked for."""

    def __init__(self, content: bytes, sizes: Sequence[int]) -> None:
        self.content, self.sizes, self.reads = content, list(sizes) or [1 << 20], 0

    def read(self, size: int = -1) -> bytes:
        """Return the next piece."""
        assert size >= 0, "a read without a limit fills the memory"
        piece = self.content[: min(size, self.sizes[self.reads % len(self.sizes)])]
        self.content = self.content[len(piece) :]
        self.reads += 1
        return piece


def on_disk(folder: Path) -> dict[str, bytes]:
    """All files below `folder`, by their relative paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A script that uses 200 MiB until the wrapper on its node has seen it.
USES_MEMORY = r"""python3 -c '
import re, time
kept = b"x" * (200 << 20)
while max(map(int, re.findall("peak ([0-9]+)\n", open("../times").read())), default=0) < 200 << 10:
    time.sleep(0.05)
'
"""


def files_with(folder: Path, secret: str) -> list[str]:
    """The files below `folder` in which the secret is, in their content or their name; some may be removed meanwhile."""

    def is_in(path: Path) -> bool:
        try:
            return secret in str(path) or (path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes())
        except FileNotFoundError:
            return False  # it has just been removed

    below = [Path(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files)]
    return [str(path.relative_to(folder)) for path in sorted(below) if is_in(path)]


# What looks like the boundary, in contents: the line itself must not be in them (RFC 2046).
ALMOST = [b"\r\n--" + BOUNDARY.encode()[:-1], b"--" + BOUNDARY.encode(), b"\n--" + BOUNDARY.encode() + b"\r\n", b"\r\n", b"--", b"\r"]
CONTENTS = st.lists(st.binary(max_size=40) | st.sampled_from(ALMOST), max_size=6).map(b"".join)
CONTENTS = CONTENTS.filter(lambda content: b"\r\n--" + BOUNDARY.encode() not in b"\r\n" + content)
NAME_PARTS = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/"), min_size=1, max_size=8)
NAMES = st.lists(NAME_PARTS.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join)


def fit(paths: Sequence[str]) -> bool:
    """Whether these names can stand side by side in one form."""
    tree = Tree()
    return all(tried(lambda: tree.add(path), HttpError) is None for path in paths)  # noqa: B023 - called at once


def packed(folder: Path, spool: Any = None, **options: Any) -> tuple[joborch.Archive, zipfile.ZipFile]:
    """The finished archive of a folder, its digest and size checked, and what zipfile reads in it."""
    packer = ZipPacker(spool or io.BytesIO())
    packer.add_folder(folder, **options)
    archive = packer.finish()
    content = archive.file.read()
    assert (archive.size, archive.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    read = zipfile.ZipFile(io.BytesIO(content))
    assert read.testzip() is None
    names = read.namelist()
    assert len(names) == len(set(names)), "a name stands twice"
    assert not any(name.startswith("/") or ".." in name.split("/") for name in names)
    return archive, read


def digest_of(content: bytes) -> str:
    """Repr-Digest, made by hand."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


# == A full disk ==

PAGE, MIB = 4096, 1024 * 1024


class Disk:
    """A small file system (tmpfs), which gives out pages of 4 KiB and, with `nr_inodes`, a number of files."""

    def __init__(self, path: Path, options: str) -> None:
        self.path, self.filler = path, path / "filler"
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True)

    def pages(self) -> int:
        """How many pages are free."""
        return os.statvfs(self.path).f_bfree

    def fill(self, pages: int = 0) -> None:
        """Take all pages but so many; what others write meanwhile counts too."""
        with self.filler.open("ab") as file:
            while self.pages() > pages:
                size = os.fstat(file.fileno()).st_size
                with contextlib.suppress(OSError):  # somebody was quicker
                    os.posix_fallocate(file.fileno(), size, (self.pages() - pages) * PAGE)

    def take_files(self, left: int) -> None:
        """Make empty files until the file system can hold so many more."""
        for number in range(os.statvfs(self.path).f_ffree - left):
            (self.path / f"filler-{number}").touch()

    def free(self) -> None:
        """Give all of it back."""
        for path in self.path.glob("filler*"):
            path.unlink()

    def close(self) -> None:
        """End what runs there, and take it away."""
        end_all_below(self.path)
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


# == A client that says what a test tells it to say ==


@dataclasses.dataclass
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def reply(status: int, body: Any = b"", **headers: str) -> bytes:
    """An answer byte by byte: JSON unless the body is bytes; headers are named with underscores."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    said = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
    said.update({name.replace("_", "-"): value for name, value in headers.items()})
    lines = [f"HTTP/1.1 {status} Because", *(f"{name}: {value}" for name, value in said.items() if value)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def zip_reply(body: bytes, **headers: str) -> bytes:
    """A result."""
    return reply(200, body, Content_Type="application/zip", **headers)


RawAnswer = bytes  # what goes over the line, whole or not; empty: the line is closed without an answer
NONCE = "0123456789abcdef" * 2


def proven(said: RawAnswer, asked: Asked, token: str) -> RawAnswer:
    """An answer with the proof that its head is of who holds the token, where the request bore one."""
    head, blank, body = said.partition(b"\r\n\r\n")
    shown = PROOF_SHAPE.fullmatch(asked.headers.get("Authorization", ""))
    if not (blank and shown and re.match(rb"HTTP/1\.[01] [0-9]{3} ", head)):
        return said
    fields = {name: value.strip() for name, _, value in (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])}
    proof = Proof(link_key(token), shown[1], shown[2], int(shown[3]), asked.method, asked.path)
    mac = proof.of_answer(int(head.split()[1]), FoldedHeaders(fields.items()))
    return head + f"\r\n{joborch.MAC_HEADER}: {mac}".encode() + blank + body


class Peer:
    """An HTTP server on loopback. `says` maps the beginning of a path to the answers to give, the last one for ever.

    It says hello and proves its answers by its token as a joborch client does, unless `says` has a /hello of its own.
    """

    def __init__(self, token: str = "a-token") -> None:
        self.token = token
        self.says: dict[str, list[RawAnswer | Callable[[Asked], RawAnswer]]] = {}
        self.asked: list[Asked] = []
        self.silent = threading.Event()  # set: it never answers until it is closed
        self.closing = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"peer": self}))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """End it; who connects then is refused."""
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def answer_to(self, asked: Asked) -> RawAnswer:
        """The next answer for a request, 404 where nothing is to be said."""
        if asked.path == "/hello" and "/hello" not in self.says and not self.silent.is_set():
            return proven(reply(200, {"version": "0.2.0", "nonce": NONCE, "proof": bool(self.token)}, X_Joborch="0.2.0"), asked, self.token)
        self.asked.append(asked)
        if self.silent.is_set():
            self.closing.wait(60)
        return proven(self.next_answer(asked), asked, self.token)

    def next_answer(self, asked: Asked) -> RawAnswer:
        """Its prepared answer to a request."""
        for path, answers in self.says.items():
            if asked.path.startswith(path):
                said = answers[0] if len(answers) == 1 else answers.pop(0)
                return said if isinstance(said, bytes) else said(asked)
        return reply(404)


class _Handler(BaseHTTPRequestHandler):
    """Gives the peer's answers."""

    peer: Peer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Any request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = self.peer.answer_to(Asked(self.command, self.path, dict(self.headers), body))
        self.close_connection = True
        self.wfile.write(said)

    def do_DELETE(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """The same."""
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def make_link(url: str, data: DataFolder) -> Link:
    """A link to a client of ours below this URL."""
    made = Link(client_address(url), data, HandClock())
    made.services.append(a_service(token="a-token"))
    return made


# == A server whose ticks a test calls ==

RESULT = b"PK of a result"


def send_next(server: Server, link: Link) -> None:
    """What the dispatcher and a sender of a client do together: claim the next job, and send it."""
    dispatch_tick(server)
    send_tick(server, link)


class Desk:
    """A server whose ticks a test calls, and a clock that it moves."""

    def __init__(self, folder: DataFolder, urls: str, **settings: str) -> None:
        self.data, self.clock = folder, HandClock()
        self.environment = {"SERVICE_EXAMPLE_CLIENTS": urls, "SERVICE_EXAMPLE_TOKEN": "a-token", "DATA_PATH": str(folder.path)}
        self.environment.update({"PORT": str(free_port()), **settings})
        self.open()

    def open(self) -> None:
        """Open the store and make the server, as at a start; the loops are not started."""
        config = load_config("server", {}, self.environment)
        self.store = Store(str(self.data.path / "server.db"), "server", self.clock)
        self.server = Server(config, self.store, self.data, self.clock)

    def restart(self, **settings: str) -> None:
        """End the server, and start it again with further settings."""
        self.store.close()
        self.environment.update(settings)
        self.open()

    @property
    def link(self) -> Link:
        """The link to the only client."""
        (found,) = self.server.links.values()
        return found

    def upload(self, **changes: Any) -> Job:
        """A queued job with its file in place."""
        new = new_job(**changes)
        self.data.job(new.uuid).mkdir()
        (self.data.job(new.uuid) / "run.sh").write_bytes(b"echo\n")
        return self.store.add(new, "uploaded")

    def __getitem__(self, job: Job) -> Job:
        found = self.store.get(job.id)
        assert found is not None
        return found

    def with_client(self, to: Status = Status.RUNNING, **changes: Any) -> Job:
        """A job that is with the client as payload 7, in one of the states of quotas."""
        job = self.upload(**changes)
        assert self.store.claim(job.id, self.link.name, 100)
        self.link.heard()
        if to is not Status.PROCESSING:
            assert self.store.move(self[job], Status.SUBMITTED, "", dest_id="7")
        if to in (Status.RUNNING, Status.UNKNOWN):
            assert self.store.move(self[job], to, "", started_at=5.0 if to is Status.RUNNING else None)
        return self[job]

    def send(self) -> bool:
        """One tick of the sender; whether there was something to send."""

        def state() -> tuple[int, int]:
            return self.store.number("SELECT sum(moves) FROM jobs"), self.link.outage.failures

        before = state()
        send_next(self.server, self.link)
        return state() != before

    def settle(self, job: Job, **payload: Any) -> Job:
        """Hear that a payload has ended, and fetch what there is."""
        self.link.heard()
        joborch.report(self.server, self.link, event(job, **payload))
        assert fetch_tick(self.server, self.link)
        return self[job]

    def reasons(self, job: Job) -> str:
        """All reasons of a job's history."""
        return "\n".join(row["reason"] for row in self.store.read(statements.HISTORY_GET, id=job.id))

    def quiet(self) -> bool:
        """Whether nothing of a transfer is left over."""
        return not list(self.data.tmp.iterdir())


def event(job: Job, **changes: Any) -> dict[str, Any]:
    """What a client says of a job's payload."""
    said = {"id": int(job.dest_id or 7), "uuid": job.uuid, "attempt": job.attempt, "status": "Completed", "reason": "", "cause": None}
    return {**said, "exit_code": None, "signal": None, "started_at": 5.0, "ended_at": 6.0, **changes}


def events(*payloads: Any, **changes: Any) -> bytes:
    """What a client answers to /events."""
    return reply(200, {"instance": "i", "next": 9, "slots": 2, "payloads": list(payloads), **changes})


# == Requests without a socket ==


@dataclasses.dataclass
class Said:
    """An answer of the application."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


KNOWN_CALLER = Caller("default", "token")


def ask(node: joborch.Node, method: str, path: str, body: bytes = b"", caller: Caller | None = KNOWN_CALLER, **headers: str) -> Said:
    """One request to a node's application; headers are named with underscores."""
    path, _, query = path.partition("?")
    path = path.encode().decode("latin-1")  # WSGI has bytes in texts (PEP 3333)
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "wsgi.input": io.BytesIO(body)}
    environ["CONTENT_LENGTH"] = str(len(body))
    environ["joborch.caller"] = caller
    for name, value in headers.items():
        environ[name.upper() if name == "Content_Type" else "HTTP_" + name.upper()] = value
    wsgiref.util.setup_testing_defaults(environ)
    got: list[Any] = []
    chunks = joborch.make_app(node)(environ, lambda status, said, _=None: got.extend((status, said)))
    content = b"".join(chunks)
    if hasattr(chunks, "close"):
        chunks.close()
    return Said(int(got[0].split()[0]), {name: str(value) for name, value in got[1]}, content)


def submit_payload(node: joborch.Node, parts: list[bytes], **headers: str) -> Said:
    """POST /submit with these parts."""
    return ask(node, "POST", "/submit", form(parts), Content_Type=f"multipart/form-data; boundary={BOUNDARY}", **headers)


def close_connections(http: Any) -> None:
    """Have waitress close all that it has open, and so end its loop."""
    with contextlib.suppress(OSError):  # a worker woke the loop first, which has closed its end of the trigger by now
        http.trigger.pull_trigger(lambda: wasyncore.close_all(http._map))


@contextlib.contextmanager
def serving(node: joborch.Node) -> Iterator[str]:
    """Serve a node on its port by waitress, in this process."""
    http = joborch.make_http_server(node, joborch.make_app(node))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.effective_port}"
    finally:
        node.stopping.set()
        node.store.core.wake_all()
        close_connections(http)
        thread.join(20)
        http.task_dispatcher.shutdown(timeout=20)
        assert not thread.is_alive()


# == A client whose ticks a test calls ==


def end_payloads(folder: Path) -> None:
    """Kill all that works below a folder, also what was only being started."""
    while processes_below(folder):
        end_all_below(folder)


# Scripts that spoil their own folders do so nowhere else, whatever the fault that starts them.
AT_HOME = "case $PWD in */jobs/*.[0-9]/work) ;; *) exit 99 ;; esac\n"


def exchange(one: Path, other: Path) -> None:
    """Exchange two names at once: renameat2(2), RENAME_EXCHANGE."""
    assert ctypes.CDLL(None, use_errno=True).renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0


@contextlib.contextmanager
def exchanging(one: Path, other: Path) -> Iterator[None]:
    """Two names are exchanged all the while, as long as both are there."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            with contextlib.suppress(AssertionError):
                exchange(one, other)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)


class Yard:
    """A client in this process, and a clock that a test moves."""

    def __init__(self, folder: DataFolder, **changes: str) -> None:
        self.data, self.clock = folder, HandClock(time.time())
        self.environment = {"DATA_PATH": str(folder.path), "JOBORCH_TOKEN": "t", "JOBORCH_SLOTS": "2", "JOBORCH_KILL_GRACE": "0.3"}
        self.environment.update({"DB_PATH": str(folder.path / "client.db"), **changes})
        self.children: list[Any] = []
        self.open()

    def open(self) -> None:
        """Open the store and make the client, as at a start; the loops are not started."""
        config = load_config("client", {}, self.environment)
        self.store = Store(config.db_path, "client", self.clock)
        self.client = Client(config, self.store, self.data, self.clock)

    def restart(self) -> None:
        """The client is killed and started again; what it started goes on."""
        self.children += self.client.executor.children.values()  # type: ignore[attr-defined]
        self.store.close()
        self.open()
        recover_payloads(self.client)

    def close(self) -> None:
        """End all."""
        children = [*self.children, *self.client.executor.children.values()]  # type: ignore[attr-defined]

        def ended() -> bool:
            end_payloads(self.data.path)  # a wrapper that has only just been started is not below the folder yet
            return all(child.has_ended() for child in children)

        wait_for(ended, 30, "the end of all wrappers")
        self.store.close()

    def submit(self, script: str | None = "true", files: dict[str, bytes] | None = None, **headers: str) -> Job:
        """A payload as a server submits it. READY and BLOCK in its script: see `ready`."""
        parts = [file_part(name, content) for name, content in (files or {}).items()]
        if script is not None:
            script = script.replace("READY", "echo > ../ready").replace("BLOCK", "exec 3<> ../go; read -u 3")
            parts.append(file_part("run.sh", (AT_HOME + script if script else script).encode()))
        said = submit_payload(self.client, parts, **headers)
        assert said.status == 200, said
        job = self[said.json["id"]]
        for name in ("ready", "go"):
            os.mkfifo(self.folder(job) / name)
        return job

    def __getitem__(self, job: Job | int) -> Job:
        found = self.store.get(job if isinstance(job, int) else job.id)
        assert found is not None
        return joborch.with_handle(self.client, found)

    def folder(self, job: Job) -> Path:
        """Where a payload's files are."""
        return self.data.job(job.mark)

    def ready(self, job: Job) -> Job:
        """Start it where a slot is free, and wait until its script has come to READY."""
        run_tick(self.client)
        assert self[job].status is Status.RUNNING
        (self.folder(job) / "ready").read_text()
        return self[job]

    def go(self, job: Job) -> None:
        """Let a script go on that waits at BLOCK."""
        with self.opened(job):
            self.wait(job)

    @contextlib.contextmanager
    def opened(self, job: Job) -> Iterator[None]:
        """Have a line to read where a script waits at BLOCK; it stays there while the fifo is open."""
        pipe = os.open(self.folder(job) / "go", os.O_RDWR)
        try:
            os.write(pipe, b"go\n")
            yield
        finally:
            os.close(pipe)

    def wait(self, job: Job) -> None:
        """Wait until the wrapper has ended."""
        pid = int((self[job].handle or "0").split()[0])
        children = {child.pid: child for child in [*self.children, *self.client.executor.children.values()]}  # type: ignore[attr-defined]
        if pid in children:
            wait_for(children[pid].has_ended, 30, "the end of the wrapper")

    def run(self, job: Job) -> Job:
        """Run a payload to its end."""
        run_tick(self.client)
        self.wait(job)
        run_tick(self.client)
        return self[job]

    def until(self, job: Job, status: Status) -> None:
        """Tick until a payload is in this state; the end of a process that is no child of ours cannot be waited for."""

        def look() -> bool:
            run_tick(self.client)
            return self[job].status is status

        wait_for(look, what=f"payload {job.id} to be {status}")

    def zip(self, job: Job, path: str = "retrieve") -> zipfile.ZipFile:
        """What /retrieve or /retrieve_partial gives."""
        said = ask(self.client, "GET", f"/{path}/{job.id}")
        assert (said.status, said.headers["Content-Type"]) == (200, "application/zip"), said
        return zipfile.ZipFile(io.BytesIO(said.body))

    def events(self, query: str = "since=0") -> dict[str, Any]:
        """GET /events."""
        said = ask(self.client, "GET", f"/events?{query}")
        assert said.status == 200, said
        return dict(said.json)


class System(joborch.LocalExecutor):
    """A batch system: what it has, and what it says of each payload, by id."""

    is_batch = True

    def __init__(self, data: DataFolder) -> None:
        super().__init__(data, 0.1)
        self.has: list[int] = []  # what was submitted, in that order, each time
        self.refuses: dict[int, Exception] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.stubborn: set[int] = set()
        self.unclear: set[int] = set()  # nobody can tell whether it has them
        self.cancelled: list[int] = []
        self.collects: Exception | None = None
        self.trouble = ""
        self.limit, self.tries = 1000, 0  # jobs that it takes at once; how often it was asked to

    def start(self, job: Job) -> str:
        self.tries += 1
        if len(self.has) >= self.limit:
            raise SubmitRefused("AssocMaxSubmitJobLimit")
        if job.id in self.refuses:
            raise self.refuses[job.id]
        self.has.append(job.id)
        return str(100 + job.id)

    def find(self, jobs: Sequence[Job]) -> dict[str, str]:
        if self.trouble:
            raise BackendUnavailable(self.trouble)
        found = {job.mark: str(100 + job.id) for job in jobs if job.id in self.has}
        return {**found, **{job.mark: "" for job in jobs if job.id in self.unclear}}

    def poll(self, jobs: Sequence[Job]) -> dict[int, Outcome]:
        return {job.id: self.outcomes.get(job.id, Outcome(True, waits="in line")) for job in jobs}

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job.id)
        if job.id in self.stubborn:
            raise StillRunning("only noted")

    def collect(self, job: Job) -> None:
        if self.collects:
            raise self.collects

    def problem(self) -> str:
        return self.trouble


class Site:
    """A client with such a system."""

    def __init__(self, data: DataFolder, slots: int = 5) -> None:
        self.yard = Yard(data, JOBORCH_SLOTS=str(slots))
        self.system = self.yard.client.executor = System(data)

    def submit(self, **headers: str) -> Job:
        return self.yard.submit("true", **headers)

    def tick(self, seconds: float = 0.0) -> None:
        self.yard.clock.pass_s(seconds)
        run_tick(self.yard.client)

    def restart(self) -> None:
        """The client is killed and started again; the system has what it has."""
        self.yard.store.close()
        self.yard.open()
        self.yard.client.executor = self.system
        recover_payloads(self.yard.client)

    def told(self, job: Job) -> tuple[str, str]:
        """Status and reason as a server hears them."""
        said = joborch.event_json(self.yard.client, self.yard[job])
        return said["status"], said["reason"]


# == Real processes ==

# == nginx ==

GATEWAY_TOKEN = {"Authorization": "Bearer sesame"}
GATEWAY_SITE = "server {{ listen 127.0.0.1:{port}; {more} location / {{ proxy_pass http://127.0.0.1:{server}; }} }}"


class Gateway:
    """An nginx in front of one server: `port` with its defaults, `hasty` with a shorter patience."""

    def __init__(self, folder: Path, server: Process, patience_s: int) -> None:
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        need_backend(Path(nginx or "/usr/sbin/nginx"))
        self.port, self.hasty = free_port(), free_port()
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        sites = GATEWAY_SITE.format(port=self.port, server=server.port, more="")
        sites += GATEWAY_SITE.format(port=self.hasty, server=server.port, more=f"proxy_read_timeout {patience_s}s;")
        user = "user root;" if os.geteuid() == 0 else ""
        folder.mkdir()
        (folder / "conf").write_text(
            f"{user} daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
            f"http {{ access_log off; {' '.join(f'{kind}_temp_path {folder}/{kind};' for kind in kinds)} {sites} }}\n"
        )
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen([str(nginx), "-p", str(folder), "-c", str(folder / "conf")], stdout=log, stderr=log)
        wait_for(self.answers, what=f"an answer of nginx; {(folder / 'log').read_text()}")

    def answers(self) -> bool:
        try:
            return self.get(self.port, "/health").status_code == 200
        except requests.ConnectionError:
            return False

    def get(self, port: int, path: str, **options: Any) -> requests.Response:
        headers = {**GATEWAY_TOKEN, **options.pop("headers", {})}
        return requests.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=100, **options)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


HeadLines = list[bytes]  # the lines of a head
Change = Callable[[HeadLines, bytes], "tuple[HeadLines, bytes]"]


def read_message(line: socket.socket, rest: bytes) -> tuple[HeadLines, bytes, bytes]:
    """The head of the next message, its body, and what was read beyond; an empty head at the end."""
    while b"\r\n\r\n" not in rest:
        data = line.recv(1 << 16)
        if not data:
            return [], b"", b""
        rest += data
    text, _, rest = rest.partition(b"\r\n\r\n")
    found = re.search(rb"(?i)\r\nContent-Length: *([0-9]+)", text)
    size = int(found[1]) if found and not text.startswith(b"HTTP/1.1 304") else 0
    while len(rest) < size:
        data = line.recv(1 << 16)
        if not data:
            break
        rest += data
    return text.split(b"\r\n"), rest[:size], rest[size:]


def serve_each(listener: socket.socket, serve: Callable[[socket.socket], object]) -> None:
    """Serve each connection in a thread of its own, until the listener is closed."""
    while True:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=serve, args=(line,), daemon=True).start()


class Between:
    """Stands between server and client, keeps what passes, and changes requests or answers of its choice."""

    def __init__(self, client: Process, context: ssl.SSLContext | None = None) -> None:
        self.client, self.context = client, context
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sent = list[bytes]()  # all requests, as they came from the server
        self.answers = list[tuple[bytes, HeadLines, bytes]]()  # first line of the request, and its answer as the client gave it
        self.change_request: Change | None = None
        self.change_answer: Callable[[bytes, HeadLines, bytes], tuple[HeadLines, bytes] | None] | None = None
        self.changed = 0
        threading.Thread(target=serve_each, args=(self.listener, self.pass_all), daemon=True).start()

    def pass_all(self, line: socket.socket) -> None:
        """Pass on one connection, message by message."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(line.close)
            if self.context:
                line = stack.enter_context(self.context.wrap_socket(line, server_side=True))
            target = stack.enter_context(socket.create_connection(("127.0.0.1", self.client.port)))
            asked = told = b""
            while True:
                head, body, asked = read_message(line, asked)
                if not head:
                    return
                first = head[0]
                self.sent.append(b"\r\n".join(head) + b"\r\n\r\n" + body)
                if self.change_request:
                    head, body = self.change_request(head, body)
                target.sendall(b"\r\n".join(head) + b"\r\n\r\n" + body)
                head, body, told = read_message(target, told)
                if not head:
                    return
                self.answers.append((first, head, body))
                changed = self.change_answer(first, head, body) if self.change_answer else (head, body)
                if changed is None:
                    return
                line.sendall(b"\r\n".join(changed[0]) + b"\r\n\r\n" + changed[1])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def reasons(job: dict[str, Any]) -> str:
    """All reasons of a job's history, and what it waits for."""
    return "\n".join([*(move["reason"] for move in job["history"]), str(job["waiting_for"])])


def command(process: Process, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of joborch with the settings of a process."""
    return subprocess.run([*from_source(), *words], env=process.environment(), capture_output=True, text=True, timeout=60, check=False)


def doctor(mode: str, folder: Path, **settings: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status, and what was found."""
    environment = {**clean_environment(folder), "DATA_PATH": str(folder / "data"), "PORT": str(free_port()), **settings}
    command = [*from_source(), "doctor", mode, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60, cwd=folder)
    assert done.stdout, done.stderr
    said = json.loads(done.stdout)
    assert said["good"] is (done.returncode == 0)
    return done.returncode, said["findings"]


def clients_of(server: Process) -> dict[str, dict[str, object]]:
    """What the server knows of its clients, by name."""
    return {client["name"]: client for client in server.get("/clients").json()["clients"]}


def gated(gate: Path) -> str:
    """A script that runs until a file is there."""
    return f"until [ -e {gate} ]; do sleep 0.05; done"


def held(server: Process, gate: Path, count: int, **fields: object) -> list[int]:
    """So many jobs that run until the gate is opened."""
    numbers = [submit(server, gated(gate), **fields) for _ in range(count)]
    for number in numbers:
        wait_status(server, number, "Running")
    return numbers
