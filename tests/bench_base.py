"""What the benchmarks of `tests/bench.py` share: measures, the machine, HTTP as a load generator speaks it, and bare runs.

The load must not be what is measured, where two cores are all there is: HTTP is spoken over plain sockets with requests
made beforehand, and many connections are driven by one thread (`Swarm`). Standard library only.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import itertools
import json
import math
import os
import platform
import random
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union

REPOSITORY = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
Json = dict[str, Any]
START_LIMIT_S = 30
STOP_LIMIT_S = 15
ANSWER_LIMIT_S = 120  # longer than the longest ?wait, 60 s
SETTLE_S = 2
CHUNK_BYTES = 1 << 20
MB = 1e6


class BenchError(Exception):
    """A benchmark that could not be measured: what happened, in one line."""


class Measure(NamedTuple):
    """One figure of one run; `bare` is the base that its ratio is to, in the same unit."""

    name: str
    value: float | None = None
    unit: str = ""
    bare: float | None = None
    missing: str = ""  # why there is no value


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def say(text: str) -> None:
    """Tell the person who waits, without disturbing the table."""
    print(text, file=sys.stderr, flush=True)


def wait_until(condition: Callable[[], object], limit_s: float, what: str) -> None:
    """Return once `condition` holds; raises BenchError with `what` if that takes longer than `limit_s`."""
    limit = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > limit:
            raise BenchError(f"not so after {limit_s:g} s: {what}")
        time.sleep(0.005)


# == The machine ==  What the figures were measured on, read from /proc.


class Place(NamedTuple):
    """What is measured, and where: the program, the interpreter that runs it, the folder that holds the sites."""

    program: Path
    python: str
    folder: Path


def first_line(path: str, begins: str) -> str:
    """What stands after the colon of the first line of `path` that begins so; "" where there is none."""
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(begins)), "")


def file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, by its longest mount point."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    parents = {str(path) for path in (folder, *folder.parents)}
    return max((len(point), kind) for point, kind in mounts if point in parents)[1]


def output_of(place: Place, *arguments: str) -> str:
    """What the interpreter under test prints, as one line."""
    done = subprocess.run([place.python, *arguments], capture_output=True, text=True, timeout=START_LIMIT_S)
    return " ".join(done.stdout.split())


def machine(place: Place) -> Json:
    """Processor, cores, load, memory, kernel, file system, Python, SQLite, program and date."""
    versions = "import platform, sqlite3; print(platform.python_version(), sqlite3.sqlite_version)"
    python, sqlite = output_of(place, "-c", versions).split()
    return {
        "date": datetime.datetime.now().astimezone().date().isoformat(),
        "cpu": first_line("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),  # what else ran
        "memory_gib": round(int(first_line("/proc/meminfo", "MemTotal").split()[0]) / 2**20),
        "kernel": platform.release(),
        "file_system": file_system(place.folder.resolve()),
        "python": python,
        "sqlite": sqlite,
        "version": output_of(place, str(place.program), "--version"),
    }


def peak_rss_mb(pid: int) -> float:
    """The most memory that this process ever held at once (VmHWM, shared pages included)."""
    return int(first_line(f"/proc/{pid}/status", "VmHWM").split()[0]) * 1024 / MB


def memory_mb(pid: int) -> tuple[str, float]:
    """What memory a process holds now: ("PSS", MB), or ("RSS", MB) where its PSS is not ours to read."""
    try:
        return "PSS", int(first_line(f"/proc/{pid}/smaps_rollup", "Pss:").split()[0]) * 1024 / MB
    except PermissionError:  # the client makes itself undumpable: only root may look closely
        return "RSS", int(first_line(f"/proc/{pid}/status", "VmRSS").split()[0]) * 1024 / MB


class Usage(NamedTuple):
    """What a process has used since it began, with all its threads; of its children, those that have ended and were waited for.

    Switches of threads that have ended are not in it: /proc forgets them.
    """

    cpu_s: float  # user and system
    children_cpu_s: float
    voluntary: int  # context switches: the thread waited for something
    involuntary: int  # it was made to wait

    def since(self, before: Usage) -> Usage:
        """What was used between two looks."""
        return Usage(
            self.cpu_s - before.cpu_s,
            self.children_cpu_s - before.children_cpu_s,
            self.voluntary - before.voluntary,
            self.involuntary - before.involuntary,
        )


def usage(pid: int) -> Usage:
    """Look at what a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    user, system, children_user, children_system = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[11:15])
    switches = {"voluntary_ctxt_switches": 0, "nonvoluntary_ctxt_switches": 0}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
            for line in (task / "status").read_text(encoding="utf-8", errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name in switches:
                    switches[name] += int(value)
    return Usage(user + system, children_user + children_system, *switches.values())


def fsync_ms(folder: Path, times: int = 50) -> float:
    """The device's own share of a durable write: 4 KiB appended and synced, median."""
    taken = []
    with (folder / "fsync").open("wb", buffering=0) as file:
        for _ in range(times):
            begin = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1000


@contextlib.contextmanager
def temporary_folder(place: Place) -> Iterator[Path]:
    """A new folder that is gone afterwards, and whose traces have left the disk's queue."""
    folder = Path(tempfile.mkdtemp(prefix="joborch-bench-", dir=place.folder))
    try:
        yield folder
    finally:
        for _ in range(5):  # a script that was just let go may still write into it
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.2)
        os.sync()


# == HTTP ==  One way to write a request and to read an answer, for one connection or for hundreds.


class Answer(NamedTuple):
    """An HTTP answer; its header block is kept as bytes, for most callers want none of it."""

    status: int
    head: bytes
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header, or None."""
        _, found, rest = self.head.lower().partition(f"\r\n{name}:".encode().lower())
        return rest.partition(b"\r\n")[0].decode("latin-1").strip() if found else None

    def json(self) -> Json:
        """The body of an answer that is well; raises BenchError where it is an error."""
        if not 200 <= self.status < 300:
            raise BenchError(f"the server answered {self.status}: {self.body[:300].decode(errors='replace')}")
        found: Json = json.loads(self.body)
        return found


def parse_answer(buffer: bytearray, headers_only: bool) -> Answer | None:
    """Take a whole answer off the front of `buffer`, or return None while there is none."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(buffer[:end])
    answer = Answer(int(head[9:12]), head, b"")
    bodyless = headers_only or answer.status in (204, 304)
    stop = end + 4 + (0 if bodyless else body_length(answer))
    if len(buffer) < stop:
        return None
    body = bytes(buffer[end + 4 : stop])
    del buffer[:stop]
    return answer._replace(body=body)


def body_length(answer: Answer) -> int:
    """The Content-Length of an answer; raises BenchError where it has none."""
    length = answer.header("Content-Length")
    if length is None:
        raise BenchError(f"an answer without Content-Length: {answer.head[:300]!r}")
    return int(length)


def request(method: str, path: str, headers: str = "", body: bytes = b"") -> bytes:
    """A whole request, ready to be sent any number of times."""
    return f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\n{headers}\r\n".encode() + body


FORM_END = b"\r\n--joborch-bench--\r\n"


def form_part(name: str, filename: str = "") -> bytes:
    """What stands before the content of one part of a form."""
    file = f'; filename="{filename}"\r\nContent-Type: application/octet-stream' if filename else ""
    return f'\r\n--joborch-bench\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()


def upload_request(files: dict[str, bytes], user: int = 1, extra_bytes: int = 0, service: str = "bench") -> bytes:
    """A whole POST /upload of these files; with `extra_bytes` the last content and the form's end are yet to come."""
    fields = {"user_id": str(user), "service": service}
    body = b"".join(form_part(name) + value.encode() for name, value in fields.items())
    body += b"".join(form_part("file", name) + content for name, content in files.items())
    body += b"" if extra_bytes else FORM_END
    length = len(body) + (extra_bytes + len(FORM_END) if extra_bytes else 0)
    kind = "Content-Type: multipart/form-data; boundary=joborch-bench"
    return request("POST", "/upload", f"{kind}\r\nContent-Length: {length}\r\n", body)


def connect(port: int) -> socket.socket:
    """A connection to a server on this machine that sends at once and never waits for ever."""
    connection = socket.create_connection((HOST, port), timeout=ANSWER_LIMIT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive(connection: socket.socket, buffer: bytearray) -> None:
    """Add what has arrived to `buffer`; raises BenchError where the peer has hung up."""
    arrived = connection.recv(1 << 16)  # more would cost a mapping of memory each time
    if not arrived:
        raise BenchError("the server closed the connection")
    buffer += arrived


class Caller:
    """One keep-alive connection that asks one thing after another."""

    def __init__(self, port: int) -> None:
        self.connection = connect(port)
        self.buffer = bytearray()
        self.asked = 0

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def ask(self, wanted: bytes) -> Answer:
        """Send a whole request and return its answer."""
        self.asked += 1
        self.connection.sendall(wanted)
        return self.answer(headers_only=wanted.startswith(b"HEAD"))

    def answer(self, headers_only: bool = False) -> Answer:
        """Wait for the answer to what was sent."""
        while True:
            answer = parse_answer(self.buffer, headers_only)
            if answer:
                return answer
            receive(self.connection, self.buffer)

    def get(self, path: str) -> Json:
        """The JSON that a path answers."""
        return self.ask(request("GET", path)).json()

    def upload_file(self, files: dict[str, bytes], last: Path) -> Json:
        """Upload `files` and, as the last part and straight from the disk, one large file; return the job."""
        self.connection.sendall(upload_request({**files, last.name: b""}, extra_bytes=last.stat().st_size))
        with last.open("rb") as content:
            self.connection.sendfile(content)
        self.connection.sendall(FORM_END)
        return self.answer().json()

    def download(self, path: str, target: Path) -> int:
        """Write the body that a path answers to `target`; return its length in bytes."""
        self.connection.sendall(request("GET", path))
        answer = self.answer(headers_only=True)
        if answer.status != 200:
            raise BenchError(f"GET {path} answered {answer.status}")
        left = length = body_length(answer)
        chunk = memoryview(bytearray(CHUNK_BYTES))
        with target.open("wb", buffering=0) as file:
            left -= file.write(self.buffer)
            self.buffer.clear()
            while left and (count := self.connection.recv_into(chunk)):
                left -= file.write(chunk[:count])
        if left:
            raise BenchError(f"GET {path} broke off {left} bytes before its end")
        return length


# What a caller in a swarm does: yields a request and is sent its answer, or yields seconds to pause and is sent None.
Script = Generator[Union[bytes, float], Any, None]


class Line:
    """One connection of a swarm, and the script that drives it."""

    def __init__(self, port: int, script: Script) -> None:
        self.connection = connect(port)
        self.connection.settimeout(None)  # select waits; a timeout would cost a second system call each time
        self.script = script
        self.buffer = bytearray()
        self.headers_only = False


class Swarm:
    """Many keep-alive connections driven by one thread; each has at most one request on its way."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.selector = selectors.DefaultSelector()
        self.pauses: list[tuple[float, int, Line]] = []
        self.busy = 0.0  # share of a core that this thread used
        self.order = itertools.count()  # pauses of the same time must not compare their lines
        self.open = 0

    def run(self, scripts: Sequence[Script], stop: int | None = None) -> None:
        """Drive every script to its end, or until the file descriptor `stop` can be read."""
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        lines = [Line(self.port, script) for script in scripts]
        try:
            self.drive(lines, stop)
        finally:
            for line in lines:
                line.connection.close()
            self.selector.close()
        self.busy = (time.thread_time() - cpu_begin) / (time.perf_counter() - begin)

    def drive(self, lines: Sequence[Line], stop: int | None) -> None:
        """The loop itself: hand answers and ends of pauses to the scripts."""
        self.open = len(lines)
        if stop is not None:
            self.selector.register(stop, selectors.EVENT_READ)
        for line in lines:
            self.selector.register(line.connection, selectors.EVENT_READ, line)
            self.advance(line, None)
        while self.open:
            for key, _ in self.selector.select(self.patience_s()):
                if key.data is None:
                    return
                self.hear(key.data)
            while self.pauses and self.pauses[0][0] <= time.monotonic():
                self.advance(heapq.heappop(self.pauses)[2], None)

    def patience_s(self) -> float:
        """How long nothing need be done unless something arrives."""
        return max(0.0, self.pauses[0][0] - time.monotonic()) if self.pauses else ANSWER_LIMIT_S

    def hear(self, line: Line) -> None:
        """Read what has arrived; hand it to the script once the answer is whole."""
        receive(line.connection, line.buffer)
        answer = parse_answer(line.buffer, line.headers_only)
        if answer:
            self.advance(line, answer)

    def advance(self, line: Line, answer: Answer | None) -> None:
        """Let a script go on, and do what it yields."""
        try:
            wanted = line.script.send(answer)
        except StopIteration:
            self.selector.unregister(line.connection)
            self.open -= 1
            return
        if isinstance(wanted, bytes):
            line.headers_only = wanted.startswith(b"HEAD")
            line.connection.sendall(wanted)
        else:
            heapq.heappush(self.pauses, (time.monotonic() + wanted, next(self.order), line))


def free_port() -> int:
    """A TCP port that nobody listens on, below the range from which the kernel gives ports to whoever connects meanwhile."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind((HOST, port))
            return port


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """The environment here without what could steer joborch or Python, at home in `folder`."""
    foreign = ("JOBORCH_", "SERVICE_", "PYTHON", "XDG_")
    names = ("PORT", "DB_PATH", "DATA_PATH", "MAX_AGE")
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(foreign) and k.upper() not in names}
    homes = {name: str(folder / name.lower()) for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    return {**kept, "HOME": str(folder), "TMPDIR": str(folder), **homes, **settings}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that this program started: TERM, then KILL."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# == What is bare ==  The same work without an orchestrator.

NOOP = {"run.sh": b"exit 0\n", "input.txt": b"one small input\n"}
BARE_SCRIPT = 'cp -r template "$1" && cd "$1" && exec bash run.sh\n'  # one fork for the folder and both its files


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """A new folder with these files."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def bare_run(folder: Path) -> float:
    """Seconds of one no-op job without an orchestrator: a new folder, two files, `bash run.sh`."""
    begin = time.perf_counter()
    write_files(folder, NOOP)
    subprocess.run(["bash", "run.sh"], cwd=folder, stdin=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def xargs_rate(folder: Path, count: int, command: Sequence[str]) -> float:
    """Scripts a second of `xargs -P2`, which runs `command NUMBER` in `folder`, `count` times."""
    numbers = "\n".join(map(str, range(count)))
    begin = time.perf_counter()
    subprocess.run(["xargs", "-P2", "-n1", *command], cwd=folder, input=numbers, text=True, check=True)
    return count / (time.perf_counter() - begin)


def plain_xargs_rate(folder: Path, count: int) -> float:
    """Scripts a second of `xargs -P2` in one folder, which is made for it."""
    write_files(folder, NOOP)
    return xargs_rate(folder, count, ["bash", "run.sh"])


def timed_run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> float:
    """Seconds that a command takes; raises where it fails."""
    begin = time.perf_counter()
    subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin
