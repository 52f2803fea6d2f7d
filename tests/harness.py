"""What the black-box tests share: real processes, requests built byte by byte, and conditions waited for.

Nothing in here imports joborch: it is started as a user starts it, and spoken to over its sockets.
"""

from __future__ import annotations

import base64
import collections
import errno
import fcntl
import hashlib
import hmac
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import requests
from pythons import pythons

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "joborch.py"
BASE = sorted((ROOT / "joborch_base").glob("*.py"))
PLUGINS = sorted((ROOT / "joborch_plugins").glob("*.py"))
EXAMPLE = ROOT / "example"
BOUNDARY = "----joborch-tests"
NOBODY_UID = 65534
STRANGER_UID = 65533
# Of JOBORCH_ISOLATION=user: no two clients of a machine may share a range, also not those of tests that run beside each other.
FIRST_UID = 28_001 + 640 * (zlib.crc32(os.fsencode(ROOT)) % 50) + 64 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
SCRIPT_UIDS = f"{FIRST_UID}-{FIRST_UID + 47}"
ENDED = {"Completed", "Failed", "Invalid", "Killed", "Cleaned"}
LIMIT_S = 60.0  # a limit ends a hopeless wait, it asserts no speed: machines of CI stand still for seconds
PAUSE_S = 0.02
T = TypeVar("T")


def program_text() -> str:
    """The source of the whole program: the module, what it is built on, and its plug-ins."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (SOURCE, *BASE, *PLUGINS))


def replace(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Replace a global of the program during a test, in every module that has imported it."""
    own = re.compile(r"joborch(_(base|plugins)\.\w+)?$")
    modules = [module for known, module in list(sys.modules.items()) if own.match(known) and hasattr(module, name)]
    assert modules, f"no module of the program has {name}"
    for module in modules:
        monkeypatch.setattr(module, name, value)


# == Chromium, as Debian packages it ==

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


# == Waiting ==


def wait_for(condition: Callable[[], T], limit_s: float = LIMIT_S, what: str = "the condition") -> T:
    """Return the first true value of `condition`; fail after `limit_s`, saying what never came true."""
    end = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true within {limit_s:g} s; last value: {value!r}")
        time.sleep(PAUSE_S)


DRAWN_PORTS = collections.deque[int](maxlen=500)
PORTS = Path(f"/tmp/joborch-test-ports-{os.geteuid()}").open("a")  # noqa: SIM115 - open until the end, for its locks


def free_port() -> int:
    """A loopback port that nobody uses on 127.0.0.1 or ::1, below the range from which the kernel gives out ports by itself.

    Tests that run beside each other draw different ports, and none of the last ones is drawn again: nobody listens yet on
    a port that was just drawn, or whose process is being restarted. Chaos once spoke with the server of another run.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for _ in range(2_000):
        port = 10 * random.SystemRandom().randrange(1_200, 3_200) + worker % 10  # Hypothesis gives `random` the same seed everywhere
        if port in DRAWN_PORTS or not reserve(port):
            continue
        if len(DRAWN_PORTS) == DRAWN_PORTS.maxlen:
            fcntl.lockf(PORTS.fileno(), fcntl.LOCK_UN, 1, DRAWN_PORTS[0])
        DRAWN_PORTS.append(port)
        if all(can_be_bound(family, host, port) for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))):
            return port
    raise AssertionError("no free port found")


def reserve(port: int) -> bool:
    """Whether no other test run has drawn this port: each holds a lock on one byte for each of its ports, until it ends."""
    try:
        fcntl.lockf(PORTS.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


def can_be_bound(family: socket.AddressFamily, host: str, port: int) -> bool:
    """Whether nobody listens there; a machine without this kind of address has no listener either."""
    try:
        with closing(socket.socket(family)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def need_backend(command: Path) -> None:
    """Leave a test out where what starts a real batch system is missing; in CI, let it fail."""
    said = f"{command} is missing: it starts the real system that this test needs"
    if os.environ.get("CI") == "true":
        assert command.exists(), said
    elif not command.exists():
        pytest.skip(said)


# == Processes of the machine ==


def alive(pid: int) -> bool:
    """Whether `pid` is a process that still runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_below(folder: Path) -> list[int]:
    """The running processes whose current folder is `folder` or lies below it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                here = str((entry / "cwd").readlink()).replace(" (deleted)", "")
            except OSError:
                continue
            if (here + "/").startswith(f"{folder}/") and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def end_all_below(folder: Path) -> None:
    """Kill what a test left running below its own folder."""
    for pid in processes_below(folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def paths_below(folder: Path) -> list[Path]:
    """All files and folders below a folder, also while others remove some of them."""
    return [Path(here, name) for here, folders, files in os.walk(folder) for name in (*folders, *files)]


def disk_bytes(folder: Path) -> int:
    """What the files below `folder` take on the disk (holes do not count)."""
    total = 0
    for path in paths_below(folder):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


# == joborch as a process ==


def clean_environment(home: Path | None) -> dict[str, str]:
    """The environment of a freshly logged-in user whose home is `home` (None: one without a home)."""
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    if home is not None:
        environment["HOME"] = str(home)
        for name, folder in (("CONFIG", ".config"), ("DATA", ".local/share"), ("CACHE", ".cache"), ("STATE", ".state")):
            environment[f"XDG_{name}_HOME"] = str(home / folder)
    return environment


def from_source(**constants: float) -> list[str]:
    """The command that runs joborch.py of this repository with the tests' own interpreter.

    Constants of time may be given other values, so that a test need not wait as long as a user may have to.
    """
    return [sys.executable, str(ROOT / "tests" / "quick_start.py"), *(f"{name}={seconds}" for name, seconds in constants.items())]


class Process:
    """One `server` or `client` of joborch, with a folder of its own for home, data and log.

    `settings` are environment variables on top of PORT, DATA_PATH and what keeps tests quick; None leaves one out.
    `user` is the uid it runs as (needs root). A stopped or killed one can be started again on the same folder.
    """

    def __init__(
        self,
        role: str,
        folder: Path,
        settings: Mapping[str, str | None] | None = None,
        *,
        program: Sequence[str] | None = None,
        arguments: Sequence[str] = (),
        home: bool = True,
        user: int | None = None,
        port: int | None = None,
        home_folder: Path | None = None,
    ) -> None:
        self.role, self.folder, self.user = role, folder, user
        self.program = list(program or from_source())
        self.arguments = list(arguments)
        self.port = port or free_port()
        self.home = (home_folder or folder / "home") if home else None
        self.data = folder / "data"
        self.log_path = folder / "log"
        self.settings = dict(settings or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.api = requests.Session()
        self.api.trust_env = False
        self._make_folders()

    def _make_folders(self) -> None:
        for path in (self.folder, self.data, *([self.home] if self.home else [])):
            path.mkdir(parents=True, exist_ok=True)
            if self.user is not None:
                os.chown(path, self.user, self.user)

    @property
    def url(self) -> str:
        """The base URL on loopback."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Everything that it wrote so far, over all its starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def pid(self) -> int:
        """The process id of the running process."""
        assert self.process is not None, f"the {self.role} was never started"
        return self.process.pid

    def environment(self) -> dict[str, str]:
        """What the process gets as its environment, and nothing else."""
        chosen: dict[str, str | None] = {
            "PORT": str(self.port),
            "DATA_PATH": str(self.data),
            "JOBORCH_MIN_FREE": "1M",
            "JOBORCH_KILL_GRACE": "1",
        }
        chosen.update(self.settings)
        given = {name: value for name, value in chosen.items() if value is not None}
        return {**clean_environment(self.home), **given}

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process without waiting until it answers."""
        identity: dict[str, Any] = {}
        if self.user is not None:
            identity = {"user": self.user, "group": self.user, "extra_groups": []}
        command = [*self.program, self.role, *self.arguments]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **identity,
            )
        return self.process

    def start(self, limit_s: float = LIMIT_S) -> Process:
        """Start the process and wait until GET /health answers 200."""
        self.spawn()
        wait_for(self._healthy, limit_s, f"/health of the {self.role} on port {self.port}")
        return self

    def _healthy(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"the {self.role} ended with status {code} at its start:\n{self.log[-3000:]}"
        try:
            return self.api.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def start_refused(self, limit_s: float = LIMIT_S) -> tuple[int, str]:
        """Start the process and wait until it gives up; return its exit status and what it said."""
        before = len(self.log)
        process = self.spawn()
        try:
            return process.wait(limit_s), self.log[before:]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the {self.role} started although it had to refuse:\n{self.log[before:]}") from None

    def stop(self, limit_s: float = LIMIT_S) -> int:
        """Ask it to end (TERM) and return its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the {self.role} did not end within {limit_s:g} s of TERM:\n{self.log[-3000:]}") from None

    def kill(self) -> None:
        """End it with SIGKILL, as the kernel does when memory is short."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(LIMIT_S)

    def restart(self, limit_s: float = LIMIT_S) -> Process:
        """End it where it runs, and start it again on the same folder and port."""
        if self.running():
            self.stop()
        return self.start(limit_s)

    def running(self) -> bool:
        """Whether the process runs now."""
        return self.process is not None and self.process.poll() is None

    def close(self) -> None:
        """End it whatever its state, with all that it started in its folder."""
        self.api.close()
        if self.running():
            self.kill()
        end_all_below(self.folder)
        for scratch in self.data.glob("jobs/*/tmp"):  # what a killed client would remove at its next start
            if scratch.is_symlink() and scratch.readlink().name.startswith("jo-"):
                shutil.rmtree(scratch.readlink(), ignore_errors=True)

    # -- speaking with it --

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request, never redirected, with a limit on silence."""
        options.setdefault("timeout", 90)
        options.setdefault("allow_redirects", False)
        return self.api.request(method, self.url + path, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """GET `path`."""
        return self.call("GET", path, **options)

    def health(self) -> dict[str, Any]:
        """What GET /health says to a caller who shows the token of this process."""
        token = (self.settings.get("JOBORCH_TOKEN") or "").split(",")[0]
        return dict(self.get("/health", headers={"Authorization": f"Bearer {token}"} if token else {}).json())

    def head(self, path: str, **options: Any) -> requests.Response:
        """HEAD `path`."""
        return self.call("HEAD", path, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        """POST to `path`."""
        return self.call("POST", path, **options)

    def job(self, number: int) -> dict[str, Any]:
        """The whole job as GET /jobs/ID tells it."""
        answer = self.get(f"/jobs/{number}")
        assert answer.status_code == 200, f"GET /jobs/{number}: {answer.status_code} {answer.text}"
        return dict(answer.json())

    def jobs(self, **filters: Any) -> list[dict[str, Any]]:
        """The jobs of one page of GET /jobs (the largest)."""
        answer = self.get("/jobs", params={"limit": 1000, **filters})
        assert answer.status_code == 200, f"GET /jobs: {answer.status_code} {answer.text}"
        return list(answer.json()["jobs"])

    def files(self) -> set[str]:
        """What stands below the data folder, without the database's own files, the audit log and the certificates out of the .pyz."""
        return {
            str(path.relative_to(self.data))
            for path in paths_below(self.data)
            if not re.search(r"\.(db|sqlite3?)(-wal|-shm|-journal)?$|cacert\.pem$|^audit\.jsonl$", path.name)
        }


def open_python() -> str:
    """An interpreter that other users of the machine may run too."""
    for path in (sys.executable, "/usr/bin/python3", *map(str, pythons().values())):
        try:
            done = subprocess.run([path, "-c", ""], user=NOBODY_UID, group=NOBODY_UID, extra_groups=[], check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return path
    raise AssertionError("no Python on this machine that another user may run")


def open_program(folder: Path, pyz: Path) -> list[str]:
    """The command that runs a copy of the .pyz in `folder` as any user of the machine."""
    copy = Path(shutil.copy(pyz, folder))
    copy.chmod(0o644)
    return [open_python(), str(copy)]


class Pair:
    """A server and a client, wired with an address and a token."""

    TOKEN = "a-token-for-tests-only"

    def __init__(
        self,
        folder: Path,
        server: Mapping[str, str | None] | None = None,
        client: Mapping[str, str | None] | None = None,
        **options: Any,
    ) -> None:
        self.folder = folder
        self.client = Process("client", folder / "client", {"JOBORCH_TOKEN": self.TOKEN, **(client or {})}, **options)
        self.server = Process("server", folder / "server", {**self.wiring(), **(server or {})}, **options)

    def wiring(self) -> dict[str, str | None]:
        """The settings with which a server reaches this client."""
        return {"SERVICE_EXAMPLE_CLIENTS": self.client.url, "SERVICE_EXAMPLE_TOKEN": self.TOKEN}

    def start(self) -> Pair:
        """Start both, side by side, and wait until both answer."""
        self.client.spawn()
        self.server.spawn()
        for process in (self.client, self.server):
            wait_for(process._healthy, LIMIT_S, f"/health of the {process.role}")
        return self

    def close(self) -> None:
        """End both and all that they started."""
        self.server.close()
        self.client.close()
        end_all_below(self.folder)


def children(pid: int) -> list[int]:
    """The processes that a process and all its threads have started, and those that these have started."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *children(child)]
    return found


def send_all(number: int, pids: Iterable[int]) -> None:
    """Send a signal to each of these that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class JoinedClient(Process):
    """A client that calls a server: it listens nowhere, so the server tells whether it is there."""

    def __init__(
        self, folder: Path, server: Process, name: str = "gpu", settings: Mapping[str, str | None] | None = None, **options: Any
    ) -> None:
        self.server, self.name, self.token_file = server, name, folder / "token"
        calls = {"JOBORCH_JOIN": server.url, "JOBORCH_TOKEN_FILE": str(self.token_file)}
        super().__init__("client", folder, {**calls, **(settings or {})}, **options)

    def enrol(self, services: str = "example") -> None:
        """Make its token at the server."""
        answer = self.server.post("/tokens", params={"name": self.name, "role": "client", "services": services})
        assert answer.status_code == 201, answer.text
        self.token_file.write_text(answer.json()["token"])
        self.token_file.chmod(0o600)
        if self.user is not None:
            os.chown(self.token_file, self.user, self.user)

    def listed(self) -> dict[str, Any] | None:
        """What GET /clients of the server says of it."""
        found = [client for client in self.server.get("/clients").json()["clients"] if client["name"] == self.name]
        return found[0] if found else None

    def _healthy(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"the client ended with status {code} at its start:\n{self.log[-3000:]}"
        try:
            found = self.listed()
        except requests.ConnectionError:
            return False
        return bool(found and found["reachable"])


class JoinedPair(Pair):
    """A server, and a client that calls it."""

    def __init__(
        self,
        folder: Path,
        server: Mapping[str, str | None] | None = None,
        client: Mapping[str, str | None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(folder, {"SERVICE_EXAMPLE_CLIENTS": "", "SERVICE_EXAMPLE_TOKEN": None, **(server or {})}, **options)
        self.client = self.joined = JoinedClient(folder / "client", self.server, "gpu", client, **options)

    def start(self) -> Pair:
        """Start the server, make the token, and start the client; wait until it has called."""
        self.server.start()
        self.joined.enrol()
        self.joined.start()
        return self

    def prepare(self) -> None:
        """Make the token, and leave both stopped."""
        self.server.start()
        self.joined.enrol()
        self.server.stop()


def problems(process: Process, kind: str, **fields: str | None) -> list[dict[str, Any]]:
    """The problems of this kind that /health shows, with these values of other fields."""
    said = process.health().get("problems", [])
    return [each for each in said if each["kind"] == kind and all(each[name] == value for name, value in fields.items())]


# == The link between server and client ==


class LinkCaller:
    """Calls a client as a joborch server does, by proofs instead of the token: written from the contract alone."""

    SIGNED = ("Content-Length", "Content-Type", "Repr-Digest", "ETag", "Content-Range", "X-Next-Offset", "Retry-After")

    def __init__(self, client: Process, token: str = Pair.TOKEN) -> None:
        self.client = client
        self.key = hashlib.pbkdf2_hmac("sha256", token.encode(), b"joborch link 1", 10_000)
        self.nonce, self.number, self.peer = os.urandom(16).hex(), 0, ""

    def hello(self) -> LinkCaller:
        """Learn the client's nonce."""
        self.peer = self.client.get("/hello").json()["nonce"]
        return self

    def mac(self, kind: str, number: int, method: str, target: str, *said: Any) -> str:
        """The MAC of a request or an answer."""
        text = json.dumps([kind, 1, self.nonce, self.peer, number, method, target, *said])
        return hmac.new(self.key, text.encode(), "sha256").hexdigest()

    def head(self, method: str, target: str, headers: Mapping[str, str], length: int, number: int | None = None) -> str:
        """The header Authorization of the next request, or of one with another number."""
        self.number += 1
        number = self.number if number is None else number
        ours = sorted([name.lower(), value] for name, value in headers.items() if name.lower().startswith("x-joborch-"))
        mac = self.mac("request", number, method, target, length, headers.get("Content-Type", ""), ours)
        return f"Joborch nonce={self.nonce}, peer={self.peer}, n={number}, mac={mac}"

    def call(self, method: str, target: str, **options: Any) -> requests.Response:
        """One request; its answer has to be proven."""
        headers = dict(options.pop("headers", {}))
        length = len(options.get("data", b""))
        answer = self.client.call(
            method, target, headers={**headers, "Authorization": self.head(method, target, headers, length)}, **options
        )
        assert self.is_proven(answer.status_code, answer.headers, method, target), f"{answer.status_code} {answer.headers}"
        return answer

    def is_proven(self, status: int, headers: Mapping[str, str], method: str, target: str) -> bool:
        """Whether the answer to the last request is of who holds the token."""
        said = [headers.get(name, "") for name in self.SIGNED]
        return headers.get("X-Joborch-Mac") == self.mac("answer", self.number, method, target, status, *said)


# == Requests, byte by byte ==


def part(disposition: str | bytes, content: bytes) -> bytes:
    """One part of a multipart form, whose Content-Disposition is given as it goes over the wire."""
    raw = disposition.encode() if isinstance(disposition, str) else disposition
    return b"--" + BOUNDARY.encode() + b"\r\nContent-Disposition: " + raw + b"\r\n\r\n" + content + b"\r\n"


def file_part(name: str, content: bytes, field: str = "file") -> bytes:
    """A file part as browsers and today's curl send it."""
    escaped = name.replace('"', "%22")
    return part(f'form-data; name="{field}"; filename="{escaped}"', content)


def field_part(name: str, value: str | bytes) -> bytes:
    """A text field."""
    return part(f'form-data; name="{name}"', value.encode() if isinstance(value, str) else value)


def form(parts: Iterable[bytes], boundary: str = BOUNDARY) -> bytes:
    """The body of a multipart form."""
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


def form_type(boundary: str = BOUNDARY) -> dict[str, str]:
    """The header that goes with `form`."""
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def tar_of(files: Mapping[str, tuple[bytes, int]], mode: str = "w", top: str = "", **options: Any) -> bytes:
    """A tar with these files and their permissions."""
    spool = io.BytesIO()
    with tarfile.open(fileobj=spool, mode=mode, **options) as archive:
        for path, (content, rights) in files.items():
            header = tarfile.TarInfo(top + path)
            header.size, header.mode = len(content), rights
            archive.addfile(header, io.BytesIO(content))
    return spool.getvalue()


def zip_of(files: Mapping[str, tuple[bytes, int]], top: str = "", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A ZIP with these files and their permissions."""
    spool = io.BytesIO()
    with zipfile.ZipFile(spool, "w", method) as archive:
        for path, (content, rights) in files.items():
            header = zipfile.ZipInfo(top + path)
            header.external_attr, header.compress_type = (0o100000 | rights) << 16, method
            archive.writestr(header, content)
    return spool.getvalue()


def post_form(server: Process, parts: Iterable[bytes], **headers: str) -> requests.Response:
    """POST a form to /upload; headers are named with underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.post("/upload", data=form(parts), headers={**form_type(), **named})


def upload(server: Process, files: Mapping[str, bytes], *, headers: Mapping[str, str] | None = None, **fields: Any) -> requests.Response:
    """Upload `files` by name; `user_id` is 1, `service` is example unless told otherwise; None leaves a field out."""
    chosen = {"user_id": 1, "service": "example", **fields}
    parts = [file_part(name, content) for name, content in files.items()]
    parts += [field_part(name, str(value)) for name, value in chosen.items() if value is not None]
    return server.post("/upload", data=form(parts), headers={**form_type(), **(headers or {})})


def submit(server: Process, script: str, files: Mapping[str, bytes] | None = None, **fields: Any) -> int:
    """Upload a script (and files beside it); return the id of the job."""
    answer = upload(server, {"run.sh": script.encode(), **(files or {})}, **fields)
    assert answer.status_code == 201, f"upload: {answer.status_code} {answer.text}"
    return int(answer.json()["id"])


def wait_status(server: Process, number: int, *wanted: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Return the job once its status is one of `wanted`; fail at once where it ended in another way."""
    end = time.monotonic() + limit_s
    job = server.job(number)
    while job["status"] not in wanted:
        assert job["status"] not in ENDED, f"job {number} was to be {wanted}: {json.dumps(job, indent=1)}"
        left_s = end - time.monotonic()
        assert left_s > 0, f"job {number} was to be {wanted} within {limit_s:g} s: {json.dumps(job, indent=1)}"
        query = {"wait": f"{min(left_s, 10):.1f}", "since": job["status"]}
        answer = server.get(f"/jobs/{number}", params=query)
        job = answer.json() if answer.status_code == 200 else server.job(number)
        if answer.status_code != 200:
            time.sleep(PAUSE_S)
    return job


def run_to_end(server: Process, script: str, files: Mapping[str, bytes] | None = None, **fields: Any) -> dict[str, Any]:
    """Run a script as a job and return the job in whatever way it ended."""
    return wait_status(server, submit(server, script, files, **fields), *ENDED)


def raw_exchange(port: int, request: bytes, *, half_close: bool = False, limit_s: float = 15) -> bytes:
    """Send bytes as they are and return all that comes back until the other side closes (or stays silent too long)."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=limit_s)) as line:
        try:
            line.sendall(request)
            if half_close:
                line.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # It answered and closed before it had read everything: the answer is still there to be read.
        return read_all(line)


def read_all(line: socket.socket) -> bytes:
    """What comes over `line` until it is closed or reset; fails where it stays open and silent."""
    received = b""
    while True:
        try:
            chunk = line.recv(65536)
        except ConnectionResetError:
            return received
        if not chunk:
            return received
        received += chunk


def raw_head(method: str, path: str, port: int, *lines: str) -> bytes:
    """The head of a request, which asks to close the line after the answer."""
    head = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close", *lines]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n"


def parse_answer(received: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of a raw answer."""
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    assert first.startswith("HTTP/1."), f"not an HTTP answer: {received[:200]!r}"
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, body


# == Results ==


class Archive:
    """A ZIP that came as an answer: names, contents and links."""

    def __init__(self, content: bytes) -> None:
        self.zip = zipfile.ZipFile(io.BytesIO(content))
        assert self.zip.testzip() is None, "a member of the ZIP is damaged"
        names = [entry.filename for entry in self.zip.infolist()]
        assert len(names) == len(set(names)), f"a name stands twice in the ZIP: {names}"

    def names(self) -> set[str]:
        """All names of files and links, without folders."""
        return {entry.filename for entry in self.zip.infolist() if not entry.is_dir()}

    def __getitem__(self, name: str) -> bytes:
        return self.zip.read(name)

    def text(self, name: str) -> str:
        """One file, as text."""
        return self.zip.read(name).decode()

    def is_link(self, name: str) -> bool:
        """Whether a member is stored as a symbolic link."""
        return stat.S_ISLNK(self.zip.getinfo(name).external_attr >> 16)

    def own_files(self) -> set[str]:
        """The names that are the script's, without what joborch adds."""
        return {name for name in self.names() if not name.startswith(".joborch/")}


def download(server: Process, number: int) -> Archive:
    """The result of a completed job; its digest is checked on the way."""
    answer = server.get(f"/download/{number}")
    assert answer.status_code == 200, f"GET /download/{number}: {answer.status_code} {answer.text[:300]}"
    assert answer.headers["Repr-Digest"] == repr_digest(answer.content)
    return Archive(answer.content)


def partial(server: Process, number: int) -> Archive:
    """The job as it stands, by GET /download_partial/ID."""
    answer = server.get(f"/download_partial/{number}")
    assert answer.status_code == 200, f"GET /download_partial/{number}: {answer.status_code} {answer.text[:300]}"
    return Archive(answer.content)


def repr_digest(content: bytes) -> str:
    """The value of Repr-Digest (RFC 9530) for `content`."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


def assert_error(answer: requests.Response, code: int | Sequence[int], *words: str) -> dict[str, Any]:
    """The answer is an error as the contract has it: code, JSON, a message with `words`, nothing of our insides."""
    codes = [code] if isinstance(code, int) else list(code)
    assert answer.status_code in codes, f"{answer.status_code} instead of {codes}: {answer.text[:500]}"
    return assert_error_body(answer.headers.get("Content-Type", ""), answer.content, *words)


def assert_error_body(content_type: str, content: bytes, *words: str) -> dict[str, Any]:
    """The body of an error: JSON with a message that names `words`, without traceback or path of the server."""
    assert content_type.startswith("application/json"), f"{content_type!r}: {content[:300]!r}"
    body = json.loads(content)
    message = body["message"]
    assert isinstance(message, str)
    assert len(message) > 5, message
    for word in words:
        assert word.lower() in (message + " " + str(body.get("field"))).lower(), f"{word!r} is not in {body}"
    for inside in ("Traceback", str(ROOT), "site-packages", '.py"', "/data/"):
        assert inside not in content.decode(), body
    return dict(body)


@contextmanager
def nothing_left(server: Process) -> Iterator[None]:
    """Whatever happens inside leaves no row and no file on the server."""
    rows, files = [job["id"] for job in server.jobs()], server.files()
    yield
    assert [job["id"] for job in server.jobs()] == rows, "a row was left behind"
    wait_for(lambda: server.files() <= files, what=f"nothing new below {server.data}")
