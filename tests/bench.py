#!/usr/bin/env python3
"""Measure joborch: `python tests/bench.py [NAME ...]`. Standard library only.

These are measurements, never timed tests: a slow machine fails nothing. A server and a client run as two real
processes in a fresh folder, with every guarantee on and no setting but limits that do not bind. Each benchmark runs
several times; a figure is the median of its runs, and so is its ratio to something bare that was measured in the
same run, since machines differ and are noisy.

How the load is made matters where two cores are all there is: HTTP is spoken over plain sockets with requests made
beforehand, and many connections are driven by one thread (`Swarm`), so that what is measured is joborch.

Sections: figures and goals, the machine, HTTP, joborch's processes, what is bare, benchmarks, output.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import heapq
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
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
TOKEN = "bench-token"
Json = dict[str, Any]
START_LIMIT_S = 30
STOP_LIMIT_S = 15
ANSWER_LIMIT_S = 120  # longer than the longest ?wait, 60 s
HOLD_LIMIT_S = 900  # a job that was held ends by itself after that, whatever became of this program
SETTLE_S = 2
SLURM_INTERVAL_S = 10  # JOBORCH_BATCH_INTERVAL as it is by default
SERVER_THREADS = 4  # of waitress, in joborch and in the bare "hello" server alike
CHUNK_BYTES = 1 << 20
MB = 1e6
ENDED = ("Completed", "Failed", "Invalid", "Killed", "Cleaned")
NOT_ENDED = ("Queued", "Processing", "Submitted", "Running", "Unknown")


class BenchError(Exception):
    """A benchmark that could not be measured: what happened, in one line."""


# == Figures and goals ==  A run gives measures; the medians of all runs are figures, and a goal judges a figure.


class Measure(NamedTuple):
    """One figure of one run; `bare` is what its ratio is to, in the same unit."""

    name: str
    value: float
    unit: str
    bare: float | None = None


class Goal(NamedTuple):
    """The bounds that a figure has to keep; None bounds nothing."""

    most: float | None = None
    ratio_most: float | None = None
    ratio_least: float | None = None

    def text(self) -> str:
        """The goal in words, as in `at most 10, 5 x`."""
        most = [f"{self.most:g}"] if self.most is not None else []
        most += [f"{self.ratio_most:g} x"] if self.ratio_most is not None else []
        least = [f"at least {self.ratio_least:g} x"] if self.ratio_least is not None else []
        return ", ".join(([f"at most {', '.join(most)}"] if most else []) + least)

    def met(self, value: float, ratio: float | None) -> bool:
        """Whether every bound is kept."""
        bounds = [value <= self.most] if self.most is not None else []
        if ratio is not None:
            bounds += [ratio <= self.ratio_most] if self.ratio_most is not None else []
            bounds += [ratio >= self.ratio_least] if self.ratio_least is not None else []
        return all(bounds)


class Figure(NamedTuple):
    """The median of a benchmark's runs, as it is printed and written."""

    benchmark: str
    name: str
    value: float
    unit: str
    ratio: float | None
    goal: str
    met: bool | None
    runs: list[float]


def figures(benchmark: Benchmark, runs: Sequence[Sequence[Measure]]) -> Iterator[Figure]:
    """Yield one figure for each measure that the runs have in common by its place."""
    for same in zip(*runs):
        ratios = [measure.value / measure.bare for measure in same if measure.bare]
        values = [measure.value for measure in same]
        value, ratio = statistics.median(values), statistics.median(ratios) if ratios else None
        goal = GOALS.get((benchmark.name, same[0].name))
        yield Figure(
            benchmark.name, same[0].name, value, same[0].unit, ratio,
            goal.text() if goal else "", goal.met(value, ratio) if goal else None, values,
        )  # fmt: skip


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


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
    """Processor, cores, memory, kernel, file system, Python, SQLite, program and date."""
    versions = "import platform, sqlite3; print(platform.python_version(), sqlite3.sqlite_version)"
    python, sqlite = output_of(place, "-c", versions).split()
    return {
        "date": datetime.datetime.now().astimezone().date().isoformat(),
        "cpu": first_line("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
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


def cpu_s(pid: int) -> float:
    """User and system time of a process with all its threads, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def upload_request(files: dict[str, bytes], user: int = 1, extra_bytes: int = 0) -> bytes:
    """A whole POST /upload of these files; with `extra_bytes` the last content and the form's end are yet to come."""
    fields = {"user_id": str(user), "service": "bench"}
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

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def ask(self, wanted: bytes) -> Answer:
        """Send a whole request and return its answer."""
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
        begin = upload_request({**files, last.name: b""}, extra_bytes=last.stat().st_size)
        self.connection.sendall(begin)
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


# == joborch's processes ==  A site is a server and a client in a folder of their own, ended whatever happens.


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """The environment here without what could steer joborch or Python, at home in `folder`."""
    foreign = ("JOBORCH_", "SERVICE_", "PYTHON", "XDG_")
    names = ("PORT", "DB_PATH", "DATA_PATH", "MAX_AGE")
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(foreign) and k.upper() not in names}
    homes = {name: str(folder / name.lower()) for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    return {**kept, "HOME": str(folder), "TMPDIR": str(folder), **homes, **settings}


def answers(port: int, path: str = "/health") -> bool:
    """Whether the server on this port answers `path` with 200."""
    try:
        with Caller(port) as caller:
            return caller.ask(request("GET", path)).status == 200
    except (OSError, BenchError):
        return False


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path, path: str = "/health") -> None:
    """Return as soon as the process answers; raises BenchError with the end of its log where it does not."""
    limit = time.monotonic() + START_LIMIT_S
    while not answers(port, path):
        if process.poll() is not None or time.monotonic() > limit:
            raise BenchError(f"{log.stem} did not start: {log.read_text(errors='replace')[-500:]}")
        time.sleep(0.002)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that this program started: TERM, then KILL."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Site:
    """A server and a client as two processes; use `running_site`."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place, self.folder = place, folder
        self.ports = {"server": free_port(), "client": free_port()}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.fence = folder / "fence"  # a held job reads one line from this pipe, which costs no CPU
        os.mkfifo(self.fence)

    @property
    def port(self) -> int:
        """The server's port."""
        return self.ports["server"]

    def settings(self, mode: str) -> dict[str, str]:
        """The settings of a mode: where it lives, and limits that do not bind."""
        common = {"PORT": str(self.ports[mode]), "DATA_PATH": str(self.folder / mode)}
        if mode == "client":
            return {**common, "JOBORCH_TOKEN": TOKEN}
        service = {
            "CLIENTS": f"http://{HOST}:{self.ports['client']}",
            "TOKEN": TOKEN,
            "RUNS_PER_USER": "1000000",
            "MAX_RUNS": "1000000",
        }
        return {**common, **{f"SERVICE_BENCH_{name}": value for name, value in service.items()}}

    def start(self, mode: str, **settings: str) -> None:
        """Start "server" or "client", with further settings, and return once it answers."""
        log = self.folder / f"{mode}.log"
        with log.open("wb") as output:
            self.processes[mode] = subprocess.Popen(
                [self.place.python, str(self.place.program), mode],
                cwd=self.folder,
                env=environment(self.folder, **self.settings(mode), **settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for this program, which then ends them
            )
        wait_until_ready(self.processes[mode], self.ports[mode], log)

    def stop(self) -> None:
        """End both processes and let the held jobs go."""
        for process in self.processes.values():
            end(process)
        pipe = os.open(self.fence, os.O_RDWR | os.O_NONBLOCK)
        os.write(pipe, b"\n" * 1000)
        time.sleep(0.1)  # the pipe is empty as soon as its last end closes
        os.close(pipe)

    def hold(self, count: int) -> list[int]:
        """Queue jobs that take every slot of the client and do nothing; return their ids."""
        script = f"exec 3<>{shlex.quote(str(self.fence))}\nread -r -t {HOLD_LIMIT_S} -u 3\nexit 0\n"
        with Caller(self.port) as caller:
            wanted = upload_request({**NOOP, "run.sh": script.encode()})
            ids = [int(caller.ask(wanted).json()["id"]) for _ in range(count)]
            wait_until_one_runs(caller)
        return ids


@contextlib.contextmanager
def running_site(place: Place) -> Iterator[Site]:
    """A site with both its processes up, that is gone afterwards."""
    with temporary_folder(place) as folder:
        site = Site(place, folder)
        try:
            site.start("client")
            site.start("server")
            yield site
        finally:
            site.stop()


def job_after(caller: Caller, job_id: object, status: object) -> Json:
    """The job once its status differs from `status`, or a minute later."""
    answer = caller.ask(request("GET", f"/jobs/{job_id}?wait=60&since={status}"))
    job = {"id": job_id, "status": status} if answer.status in (429, 503) else answer.json()
    if job["status"] == status:  # the minute is over, or every parking place was taken
        time.sleep(float(answer.header("Retry-After") or 0))
    return job


def wait_until_one_runs(caller: Caller) -> None:
    """Return once some job runs; which one is the server's choice."""
    limit = time.monotonic() + START_LIMIT_S
    while not caller.get("/jobs?status=Running&limit=1")["jobs"]:
        if time.monotonic() > limit:
            raise BenchError(f"no job runs {START_LIMIT_S} s after it was queued")
        time.sleep(0.05)


def wait_until_completed(caller: Caller, job: Json) -> Json:
    """The job once it is Completed; raises BenchError where it ends otherwise."""
    while job["status"] not in ENDED:
        job = job_after(caller, job["id"], job["status"])
    if job["status"] != "Completed":
        raise BenchError(f"job {job['id']} is {job['status']}: {job.get('reason')}")
    return job


def wait_until_none_is_left(caller: Caller) -> None:
    """Return once every job of the server has ended.

    A few dozen cheap requests for thousands of jobs: of those that have not ended, the newest is likely to be the
    last, so it alone is waited for; then the server is asked whether any other is left.
    """
    while True:
        pages = [caller.get(f"/jobs?status={status}&limit=1")["jobs"] for status in NOT_ENDED]
        left = [job for page in pages for job in page]
        if not left:
            return
        wait_until_completed(caller, left[0])


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


def timed_run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> float:
    """Seconds that a command takes; raises where it fails."""
    begin = time.perf_counter()
    subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


HELLO = """
import logging, sys
sys.path.insert(0, sys.argv[1])
import bottle, waitress
logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # one line a request that waits
app = bottle.Bottle()
app.route("/hello")(lambda: "hello")
_, _, host, port, threads = sys.argv
waitress.serve(app, host=host, port=int(port), threads=int(threads), asyncore_use_poll=True, _quiet=True)
"""


@contextlib.contextmanager
def hello_server(place: Place, folder: Path) -> Iterator[int]:
    """The port of a process with one bare route on the same HTTP stack, taken from the program under test."""
    port, log = free_port(), folder / "hello.log"
    command = [place.python, "-c", HELLO, str(place.program), HOST, str(port), str(SERVER_THREADS)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_until_ready(process, port, log, "/hello")
        yield port
    finally:
        end(process)


# == Benchmarks ==  Each function is one run: it takes a place and a size, and yields its measures.


def latency(place: Place, size: int) -> Iterator[Measure]:
    """One no-op job at a time, each followed by a bare run."""
    jobs, bare = [], []
    wanted = upload_request(NOOP)
    with running_site(place) as site, Caller(site.port) as caller:
        (site.folder / "bare").mkdir()
        wait_until_completed(caller, caller.ask(wanted).json())  # the first job finds nothing warm
        cpu_before = {mode: cpu_s(process.pid) for mode, process in site.processes.items()}
        for number in range(size):
            begin = time.perf_counter()
            wait_until_completed(caller, caller.ask(wanted).json())
            jobs.append((time.perf_counter() - begin) * 1000)
            bare.append(bare_run(site.folder / "bare" / str(number)) * 1000)
        yield Measure("median", statistics.median(jobs), "ms", statistics.median(bare))
        yield Measure("p99", percentile(jobs, 99), "ms", percentile(bare, 99))
        yield Measure("bare run, median", statistics.median(bare), "ms")
        yield Measure("bare run, p99", percentile(bare, 99), "ms")
        yield Measure("fsync of the device", fsync_ms(site.folder), "ms")
        for mode, process in sorted(site.processes.items()):
            yield Measure(f"CPU a job, {mode}", (cpu_s(process.pid) - cpu_before[mode]) * 1000 / size, "ms")


USERS = 20
UPLOADERS = 8


def uploader(wanted: Sequence[bytes], ids: list[int]) -> Script:
    """Upload one job after another, and keep their ids."""
    for upload in wanted:
        answer = yield upload
        ids.append(int(answer.json()["id"]))


def checker(ids: Sequence[int]) -> Script:
    """Make sure that every one of these results can be downloaded."""
    for job_id in ids:
        answer = yield request("HEAD", f"/download/{job_id}")
        if answer.status != 200:
            raise BenchError(f"job {job_id} has ended and HEAD /download answers {answer.status}")


def job_rate(port: int, count: int) -> tuple[float, float]:
    """Jobs a second that are uploaded, and that are through (clocked until none is left, then each is checked)."""
    wanted = [upload_request(NOOP, user=number % USERS + 1) for number in range(count)]
    ids: list[int] = []
    with Caller(port) as caller:
        begin = time.perf_counter()
        Swarm(port).run([uploader(wanted[first::UPLOADERS], ids) for first in range(UPLOADERS)])
        uploaded = time.perf_counter()
        wait_until_none_is_left(caller)
        finished = time.perf_counter()
    Swarm(port).run([checker(ids[first::UPLOADERS]) for first in range(UPLOADERS)])
    return count / (uploaded - begin), count / (finished - begin)


def throughput(place: Place, size: int) -> Iterator[Measure]:
    """Many no-op jobs of many users, from several uploaders, until all results can be downloaded."""
    with temporary_folder(place) as folder:
        write_files(folder / "template", NOOP)
        (folder / "one.sh").write_text(BARE_SCRIPT)
        bare = xargs_rate(folder, size, ["sh", "one.sh"])
        plain = xargs_rate(folder / "template", size, ["bash", "run.sh"])
    with running_site(place) as site:
        uploads, jobs = job_rate(site.port, size)
    yield Measure("jobs", jobs, "jobs/s", bare)
    yield Measure("jobs, to xargs without folders", jobs, "jobs/s", plain)
    yield Measure("uploads alone", uploads, "jobs/s")
    yield Measure("bare xargs -P2", bare, "jobs/s")


def write_noise(path: Path, size: int) -> None:
    """A file of `size` bytes that no compressor makes smaller."""
    block = os.urandom(min(size, 64 * CHUNK_BYTES))
    with path.open("wb", buffering=0) as file:
        for number in range(size // len(block)):
            file.write(number.to_bytes(8, "big"))
            file.write(block[8:])


def moments(job: Json) -> dict[str, float]:
    """When a job came into each state, in seconds of the epoch."""
    moves: list[dict[str, str]] = job["history"]
    return {move["to"]: datetime.datetime.fromisoformat(move["at"].replace("Z", "+00:00")).timestamp() for move in moves}


def hop_times(site: Site, source: Path) -> dict[str, float]:
    """Send one large file through all hops; return how many seconds each took."""
    files = {"run.sh": f"mv {source.name} result\n".encode()}  # a result as large as the input, made in no time
    with Caller(site.port) as caller:
        os.sync()
        begin = time.perf_counter()
        job = caller.upload_file(files, source)
        uploaded = time.perf_counter()
        job = wait_until_completed(caller, job)
        came = moments(caller.get(f"/jobs/{job['id']}"))
        os.sync()
        fetch_begin = max(at for status, at in came.items() if status != "Completed")
        download_begin = time.perf_counter()
        caller.download(f"/download/{job['id']}", site.folder / "result.zip")
        downloaded = time.perf_counter()
    return {
        "upload": uploaded - begin,
        "send": came["Submitted"] - came["Processing"],
        "run and fetch": came["Completed"] - fetch_begin,
        "download": downloaded - download_begin,
    }


def big(place: Place, size: int) -> Iterator[Measure]:
    """One job with a large input that it moves to its result; each hop against copy and hash of the same file."""
    if shutil.disk_usage(place.folder).free < 9 * size:
        raise BenchError(f"big needs {9 * size >> 30} GiB of free disk: choose another --dir, or --quick")
    with running_site(place) as site:
        source = site.folder / "source"
        write_noise(source, size)
        os.sync()
        copy_s = timed_run("cp", str(source), str(site.folder / "copy"))
        bare = size / MB / (copy_s + timed_run("sha256sum", str(site.folder / "copy")))
        (site.folder / "copy").unlink()
        for hop, taken_s in hop_times(site, source).items():
            yield Measure(hop, size / MB / max(taken_s, 0.001), "MB/s", bare)
        yield Measure("bare cp + sha256sum", bare, "MB/s")
        for mode, process in site.processes.items():
            yield Measure(f"peak RSS, {mode}", peak_rss_mb(process.pid), "MB")


def bare_pack_s(folder: Path) -> float:
    """Seconds of `cp -r` and `zip -r` of the folder `in`."""
    copy_s = timed_run("cp", "-r", "in", "copy", cwd=folder)
    pack = ("zip", "-q", "-r") if shutil.which("zip") else (sys.executable, "-m", "zipfile", "-c")
    return copy_s + timed_run(*pack, "bare.zip", "copy", cwd=folder)


def many_files(place: Place, size: int) -> Iterator[Measure]:
    """One job with many small inputs that it moves to its results, so that bash's own speed stays out of it."""
    inputs = {f"{number}.txt": f"line {number}\n".encode() * 50 for number in range(size)}
    files = {"run.sh": b"mv in out\n", **{f"in/{name}": content for name, content in inputs.items()}}
    with running_site(place) as site, Caller(site.port) as caller:
        write_files(site.folder / "in", inputs)
        os.sync()
        bare = size / bare_pack_s(site.folder)
        wanted = upload_request(files)
        os.sync()
        begin = time.perf_counter()
        job = wait_until_completed(caller, caller.ask(wanted).json())
        caller.download(f"/download/{job['id']}", site.folder / "result.zip")
        yield Measure("files", size / (time.perf_counter() - begin), "files/s", bare)
        yield Measure("bare cp -r + zip -r", bare, "files/s")


CONNECTIONS = 64


def poller(requests: Sequence[bytes], end_at: float, taken: list[float]) -> Script:
    """Ask these things in turn until `end_at`, and keep how long each took."""
    for wanted in itertools.cycle(requests):
        begin = time.perf_counter()
        if begin > end_at:
            return
        answer = yield wanted
        taken.append(time.perf_counter() - begin)
        if answer.status not in (200, 202):
            raise BenchError(f"{wanted[:60]!r} was answered {answer.status}")


def poll(port: int, requests: Sequence[Sequence[bytes]], seconds: float) -> tuple[float, float]:
    """Requests a second and p99 in ms of one connection for each list of requests."""
    taken: list[float] = []
    swarm = Swarm(port)
    end_at = time.perf_counter() + seconds
    swarm.run([poller(wanted, end_at, taken) for wanted in requests])
    if swarm.busy > 0.85:
        say(f"the load generator used {swarm.busy:.0%} of a core: it may have been the bottleneck")
    return len(taken) / seconds, percentile(taken, 99) * 1000


def polling(place: Place, size: int) -> Iterator[Measure]:
    """Every caller asks for a job of its own; two run, the rest wait, and none of them uses CPU."""
    with running_site(place) as site, hello_server(place, site.folder) as hello_port:
        ids = site.hold(CONNECTIONS)
        head = [[request("HEAD", f"/download/{job_id}")] for job_id in ids]
        get = [[request("GET", f"/jobs/{job_id}")] for job_id in ids]
        both = [one + other for one, other in zip(head, get)]
        kinds = {"HEAD and GET": both, "HEAD /download/ID": head, "GET /jobs/ID": get}
        hello = [[request("GET", "/hello")]] * CONNECTIONS
        for name, requests in kinds.items():
            bare, bare_p99 = poll(hello_port, hello, size)
            rate, p99 = poll(site.port, requests, size)
            yield Measure(name, rate, "1/s", bare)
            yield Measure(f"{name}, p99", p99, "ms", bare_p99)
            yield Measure(f"bare hello beside {name}", bare, "1/s")


WAITERS = 500
WAITED_JOBS = 50


def waiter(job_id: int, counts: dict[str, int]) -> Script:
    """Wait for a job that goes on, for ever; where no place is free, come back when told to."""
    status = "Queued"
    while True:
        answer = yield request("GET", f"/jobs/{job_id}?wait=60&since={status}")
        pause = answer.header("Retry-After")
        counts["refused" if pause else "answered"] += 1
        if pause:
            yield float(pause)
        else:
            status = str(answer.json()["status"])


def crowd(port: int, ids: Sequence[int], count: int, pipe: multiprocessing.connection.Connection) -> None:
    """The process of the waiters: waits until `pipe` says enough, then sends back what was counted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    counts = {"refused": 0, "answered": 0}
    Swarm(port).run([waiter(ids[number % len(ids)], counts) for number in range(count)], stop=pipe.fileno())
    pipe.send(counts)


@contextlib.contextmanager
def waiting_crowd(port: int, ids: Sequence[int], counts: dict[str, int]) -> Iterator[None]:
    """Hundreds of callers in `?wait`, in a process of their own; afterwards `counts` holds how they fared."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=crowd, args=(port, ids, WAITERS, there), daemon=True)
    process.start()
    there.close()
    try:
        yield
        here.send("enough")
        counts.update(here.recv())
    except EOFError:
        raise BenchError("the waiting callers failed: see above") from None
    finally:
        process.terminate()
        process.join()


def upload_times_ms(port: int, count: int) -> list[float]:
    """How long each of these uploads takes, one after another."""
    wanted, taken = upload_request(NOOP, user=2), []
    with Caller(port) as caller:
        for _ in range(count):
            begin = time.perf_counter()
            caller.ask(wanted).json()
            taken.append((time.perf_counter() - begin) * 1000)
    return taken


def waiters(place: Place, size: int) -> Iterator[Measure]:
    """Uploads with hundreds of callers in `?wait`, against the same without them."""
    counts: dict[str, int] = {}
    with running_site(place) as site:
        ids = site.hold(WAITED_JOBS)
        alone = upload_times_ms(site.port, size)
        begin = time.perf_counter()
        with waiting_crowd(site.port, ids, counts):
            arriving = upload_times_ms(site.port, size // 5)
            time.sleep(SETTLE_S)
            crowded = upload_times_ms(site.port, size)
        seconds = time.perf_counter() - begin
    yield Measure("upload, p99", percentile(crowded, 99), "ms", percentile(alone, 99))
    yield Measure("upload, median", statistics.median(crowded), "ms", statistics.median(alone))
    yield Measure("upload as they arrive, slowest", max(arriving), "ms", max(alone))
    yield Measure("told to come again", counts["refused"] / seconds, "1/s")


SILENT_CONNECTIONS = 2000


@contextlib.contextmanager
def silent_connections(port: int, count: int) -> Iterator[None]:
    """Open connections and keep them: every second one sends half a request, the others nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 1000), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for number in range(count):
            connection = stack.enter_context(connect(port))
            if number % 2:
                connection.sendall(b"GET /jobs HTTP/1.1\r\nHost: ")
        yield


def health_times_ms(port: int, count: int) -> list[float]:
    """How long each of these takes, connection included, as a health check makes it."""
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        if not answers(port):
            raise BenchError("/health does not answer")
        taken.append((time.perf_counter() - begin) * 1000)
    return taken


def silent(place: Place, size: int) -> Iterator[Measure]:
    """/health with 2,000 silent connections and hundreds of callers in `?wait` at once, against the same without them."""
    counts: dict[str, int] = {}
    with running_site(place) as site:
        ids = site.hold(WAITED_JOBS)
        alone = health_times_ms(site.port, size)
        with waiting_crowd(site.port, ids, counts), silent_connections(site.port, SILENT_CONNECTIONS):
            time.sleep(SETTLE_S)
            crowded = health_times_ms(site.port, size)
        yield Measure("/health, p99", percentile(crowded, 99), "ms", percentile(alone, 99))
        yield Measure("/health, median", statistics.median(crowded), "ms", statistics.median(alone))
        yield Measure("peak RSS, server", peak_rss_mb(site.processes["server"].pid), "MB")


def many_results(place: Place, size: int) -> Iterator[Measure]:
    """One job with a result of very many files, whose output is then read by eight callers."""
    files = {"run.sh": f"echo made; mkdir out; cd out; seq {size} | xargs touch\n".encode()}
    with running_site(place) as site, Caller(site.port) as caller:
        begin = time.perf_counter()
        job = wait_until_completed(caller, caller.ask(upload_request(files)).json())
        yield Measure("files", size / (time.perf_counter() - begin), "files/s")
        Swarm(site.port).run([poller([request("GET", f"/jobs/{job['id']}/logs")], time.perf_counter() + 2, []) for _ in range(8)])
        for mode, process in sorted(site.processes.items()):
            yield Measure(f"peak RSS, {mode}", peak_rss_mb(process.pid), "MB")


def start(place: Place, size: int) -> Iterator[Measure]:
    """The program's first sign of life, and a server's first answer in a new folder, each beside a bare Python."""
    bare, version, health = [], [], []
    for _ in range(size):
        with temporary_folder(place) as folder:
            env = environment(folder)
            bare.append(timed_run(place.python, "-c", "pass", env=env) * 1000)
            version.append(timed_run(place.python, str(place.program), "--version", env=env) * 1000)
            site = Site(place, folder)
            try:
                begin = time.perf_counter()
                site.start("server")
                health.append((time.perf_counter() - begin) * 1000)
            finally:
                site.stop()
    yield Measure("--version", statistics.median(version), "ms", statistics.median(bare))
    yield Measure("first /health", statistics.median(health), "ms", statistics.median(bare))
    yield Measure("bare python -c pass", statistics.median(bare), "ms")


def copy_rows(db: sqlite3.Connection, table: str, where: str, count: int, changes: dict[str, str]) -> None:
    """Insert the row `t` of a table that `where` finds so many times more, for n from 2; `changes` are columns as SQL of t and n."""
    names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    copied = ", ".join(changes.get(name, f"t.{name}") for name in names)
    numbers = "WITH RECURSIVE numbers(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM numbers WHERE n <= ?)"
    db.execute(f"{numbers} INSERT INTO {table} SELECT {copied} FROM {table} t, numbers WHERE {where}", [count])


def multiply_job(site: Site, count: int) -> None:
    """Let the only job of a server that is stopped be there so many times: row, history, result and folder."""
    data = site.folder / "server"
    (result,), (folder,) = (data / "results").iterdir(), (data / "jobs").iterdir()
    with contextlib.closing(sqlite3.connect(data / "joborch.db")) as db, db:
        copy_rows(db, "jobs", "t.id = 1", count, {"id": "n", "uuid": "'copy-' || n"})
        copy_rows(db, "history", "t.job_id = 1", count, {"job_id": "n"})
    content = result.read_bytes()
    for number in range(2, count + 2):
        result.with_name(f"copy-{number}.1.zip").write_bytes(content)
        folder.with_name(f"copy-{number}").mkdir()


def restart(place: Place, size: int) -> Iterator[Measure]:
    """A server's start with many ended jobs, and a client's with many running payloads, of which one ended meanwhile."""
    with running_site(place) as site:
        with Caller(site.port) as caller:
            wait_until_completed(caller, caller.ask(upload_request(NOOP)).json())
        end(site.processes["server"])
        multiply_job(site, size)
        begin = time.perf_counter()
        site.start("server")
        yield Measure("server, ended jobs", (time.perf_counter() - begin) * 1000, "ms")
    payloads = max(10, size // 100)
    with temporary_folder(place) as folder:
        site = Site(place, folder)
        try:
            site.start("client", JOBORCH_SLOTS=str(payloads))
            site.start("server")
            site.hold(payloads)
            with Caller(site.port) as caller:
                while len(caller.get("/jobs?status=Running&limit=1000")["jobs"]) < min(payloads, 1000):
                    time.sleep(0.1)
            site.processes["client"].kill()
            site.processes["client"].wait()
            pipe = os.open(site.fence, os.O_RDWR | os.O_NONBLOCK)
            os.write(pipe, b"\n")
            time.sleep(SETTLE_S)
            begin = time.perf_counter()
            site.start("client", JOBORCH_SLOTS=str(payloads))
            answered = time.perf_counter() - begin
            while running_payloads(site) != payloads - 1:
                time.sleep(0.01)
            yield Measure("client, running payloads, first /health", answered * 1000, "ms")
            yield Measure("client, running payloads, all taken up", (time.perf_counter() - begin) * 1000, "ms")
            os.close(pipe)
        finally:
            site.stop()


def running_payloads(site: Site) -> int:
    """How many payloads the client says that it runs."""
    with Caller(site.ports["client"]) as caller:
        return int(caller.ask(request("GET", "/health", f"Authorization: Bearer {TOKEN}\r\n")).json()["running"])


def idle(place: Place, size: int) -> Iterator[Measure]:
    """What both processes cost while nothing happens, after they have done some work."""
    with running_site(place) as site, Caller(site.port) as caller:
        for _ in range(USERS):
            wait_until_completed(caller, caller.ask(upload_request(NOOP)).json())
        time.sleep(SETTLE_S)
        before = {mode: cpu_s(process.pid) for mode, process in site.processes.items()}
        time.sleep(size)
        for mode, process in site.processes.items():
            kind, held_mb = memory_mb(process.pid)
            yield Measure(f"{kind}, {mode}", held_mb, "MB")
            yield Measure(f"CPU, {mode}", (cpu_s(process.pid) - before[mode]) / size * 100, "%")


def queue_up(site: Site, count: int, users: int, with_files: int) -> None:
    """Let the only job of a server that is stopped be queued so many times, by so many users; the first have files."""
    data = site.folder / "server"
    (folder,) = (data / "jobs").iterdir()
    queued = {
        "id": "n", "uuid": "printf('%08x-0000-4000-8000-000000000000', n)", "user_id": f"n % {users} + 1", "status": "'Queued'",
        "reason": "'uploaded'", "moves": "1",
        "arrived_at": "t.arrived_at + n * 0.001", "exit_code": "NULL", "client": "NULL", "dest_id": "NULL", "started_at": "NULL",
        "ended_at": "NULL", "result_size": "NULL", "result_sha256": "NULL", "charged": "0",
    }  # fmt: skip
    with contextlib.closing(sqlite3.connect(data / "joborch.db")) as db, db:
        copy_rows(db, "jobs", "t.id = 1", count, queued)
        copy_rows(db, "history", "t.job_id = 1 AND t.number = 1", count, {"job_id": "n"})
        db.execute("UPDATE turns_made SET rules = ''")  # whose turn it is was not kept up by this
    for number in range(2, min(count, with_files) + 2):
        shutil.copytree(folder, folder.with_name(f"{number:08x}-0000-4000-8000-000000000000"))


def one_job_done(site: Site, script: bytes) -> None:
    """Let one job of the site run, and end its server."""
    with Caller(site.port) as caller:
        wait_until_completed(caller, caller.ask(upload_request({**NOOP, "run.sh": script})).json())
    end(site.processes["server"])


DECISIONS = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import joborch
data, clients, count = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
urls = ",".join(f"http://127.0.0.1:{10000 + number}" for number in range(clients))
limits = {"SERVICE_BENCH_RUNS_PER_USER": "1000000", "SERVICE_BENCH_MAX_RUNS": "1000000"}
config = joborch.load_config("server", {}, {"DATA_PATH": data, "SERVICE_BENCH_CLIENTS": urls, **limits})
server = joborch.Server(config, joborch.Store(config.db_path, "server"), joborch.DataFolder(data))
for link in server.links.values():
    link.heard()
    link.slots = 2
def place_one():
    begin = time.perf_counter()
    assert joborch.next_placement(server)
    decided = time.perf_counter()
    assert joborch.dispatch_tick(server)
    placed = time.perf_counter()
    link, job = next((link, link.outbox.pop()) for link in server.links.values() if link.outbox)
    link.sending.clear()
    return job, decided - begin, placed - decided
running = [place_one()[0] for _ in range(2 * clients - 1)]
times = []
for number in range(count):
    job, *took = place_one()
    times.append(took)
    running.append(job)
    job = running.pop(0)
    for status in (joborch.Status.SUBMITTED, joborch.Status.COMPLETED):
        server.store.move(server.store.get(job.id), status, "", run_s=0.1)
json.dump(times, sys.stdout)
"""


def decision_times_ms(site: Site, clients: int, count: int) -> tuple[list[float], list[float]]:
    """How long one decision takes at a stopped server's database: to choose job and client; and to choose again and claim."""
    words = [site.place.python, "-c", DECISIONS, str(site.place.program.parent), str(site.folder / "server"), str(clients), str(count)]
    if site.place.program.suffix == ".pyz":
        words[3] = str(site.place.program)
    done = subprocess.run(words, capture_output=True, text=True, env=environment(site.folder), check=False)
    if done.returncode:
        raise BenchError(f"no decisions: {done.stderr.strip().splitlines()[-1]}")
    times = json.loads(done.stdout)
    return [pair[0] * 1000 for pair in times], [pair[1] * 1000 for pair in times]


def look_times_ms(port: int, job_id: int) -> dict[str, float]:
    """Medians of what callers ask most, in ms."""
    wanted = {
        "GET /jobs": request("GET", "/jobs?limit=100"),
        "GET /jobs of a user": request("GET", "/jobs?limit=1&user_id=7&status=Queued"),
        "GET /jobs/ID": request("GET", f"/jobs/{job_id}"),
        "HEAD /download/ID": request("HEAD", f"/download/{job_id}"),
    }
    found = {}
    with Caller(port) as caller:
        for name, text in wanted.items():
            times = []
            for _ in range(50):
                begin = time.perf_counter()
                caller.ask(text)
                times.append((time.perf_counter() - begin) * 1000)
            found[name] = statistics.median(times)
    return found


@contextlib.contextmanager
def backlogged_site(place: Place, size: int, users: int) -> Iterator[Site]:
    """A site with so many jobs queued, whose server is stopped; its turns are made."""
    with running_site(place) as site:
        one_job_done(site, NOOP["run.sh"])
        end(site.processes["client"])
        queue_up(site, size, users, with_files=1000)
        site.start("server")
        end(site.processes["server"])
        yield site


BACKLOG_USERS, BACKLOG_SMALL, BACKLOG_CLIENTS = 1000, 1000, 100


def backlog(place: Place, size: int) -> Iterator[Measure]:
    """A long queue: what a decision, a start and a look cost beside a queue of 1,000; and the same with 100,000 users and 100 clients."""
    decisions, looks = {}, {}
    for count in (BACKLOG_SMALL, size):
        with backlogged_site(place, count, BACKLOG_USERS) as site:
            begin = time.perf_counter()
            site.start("server")
            restarted = (time.perf_counter() - begin) * 1000
            looks[count] = look_times_ms(site.port, count // 2)
            if count == size:
                yield Measure("restart", restarted, "ms")
                yield Measure("peak RSS, server", peak_rss_mb(site.processes["server"].pid), "MB")
            end(site.processes["server"])
            decisions[count] = decision_times_ms(site, 1, 300)
    for number, name in enumerate(("choose", "choose and claim")):
        few, many = decisions[BACKLOG_SMALL][number], decisions[size][number]
        yield Measure(f"{name}, median", statistics.median(many), "ms", statistics.median(few))
        yield Measure(f"{name}, p99", percentile(many, 99), "ms", percentile(few, 99))
    for name, value in looks[size].items():
        yield Measure(name, value, "ms", looks[BACKLOG_SMALL][name])
    with backlogged_site(place, size, size // 10) as site:
        many, _ = decision_times_ms(site, BACKLOG_CLIENTS, 300)
    yield Measure("choose, 100 clients, a tenth as many users as jobs, median", statistics.median(many), "ms")
    yield Measure("the same, p99", percentile(many, 99), "ms")


FAIR_OTHERS, FAIR_RUN_S, FAIR_SLOTS = 50, 0.25, 2


def wait_s_of(job: Json) -> float:
    """How long a job waited: from its upload until its script began."""
    created, started = (datetime.datetime.fromisoformat(str(job[name]).replace("Z", "+00:00")) for name in ("created_at", "started_at"))
    return (started - created).total_seconds()


def fairness(place: Place, size: int) -> Iterator[Measure]:
    """One user's long queue, and others who come with one job each: first one after another, then all at once."""
    script = f"sleep {FAIR_RUN_S}\n".encode()
    wanted = [upload_request({**NOOP, "run.sh": script}, user=1000 + number) for number in range(2 * FAIR_OTHERS)]
    with running_site(place) as site:
        one_job_done(site, script)
        end(site.processes["client"])
        queue_up(site, size, 1, with_files=2000)
        site.start("client", JOBORCH_SLOTS=str(FAIR_SLOTS))
        site.start("server")
        with Caller(site.port) as caller:
            wait_until_one_runs(caller)
            time.sleep(SETTLE_S)
            before, begin = len(caller.get("/jobs?status=Completed&limit=1000")["jobs"]), time.perf_counter()
            time.sleep(20 * FAIR_RUN_S)
            done = len(caller.get("/jobs?status=Completed&limit=1000")["jobs"]) - before
            job_s = FAIR_SLOTS * (time.perf_counter() - begin) / done
            alone = [wait_s_of(wait_until_completed(caller, caller.ask(text).json())) for text in wanted[:FAIR_OTHERS]]
            time.sleep(SETTLE_S)
            ids: list[int] = []
            Swarm(site.port).run([uploader([text], ids) for text in wanted[FAIR_OTHERS:]])
            crowd = [wait_s_of(wait_until_completed(caller, caller.get(f"/jobs/{job_id}"))) for job_id in ids]
    yield Measure("job time", job_s * 1000, "ms", FAIR_RUN_S * 1000)
    yield Measure("one after another, median", statistics.median(alone) / job_s, "job times")
    yield Measure("one after another, p90", percentile(alone, 90) / job_s, "job times")
    yield Measure("at once, median", statistics.median(crowd) / job_s, "job times")
    yield Measure("at once, the last", max(crowd) / job_s, "job times")


SLURM_CLUSTER = REPOSITORY.parent / "shared" / "backends" / "slurm" / "cluster"
SLURM_COMMANDS = ("sbatch", "squeue", "sacct", "scancel")


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A real Slurm of two nodes; yields the settings with which commands reach it, each call of them a line in `calls`."""
    (folder / "bin").mkdir()
    for name in SLURM_COMMANDS:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\necho {name} >>{folder}/calls\nexec {shutil.which(name)} "$@"\n')
        script.chmod(0o755)
    (folder / "calls").touch()
    subprocess.run([str(SLURM_CLUSTER), "start", str(folder / "slurm")], check=True, timeout=60)
    try:
        yield {"SLURM_CONF": str(folder / "slurm/etc/slurm.conf"), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    finally:
        subprocess.run([str(SLURM_CLUSTER), "stop", str(folder / "slurm")], check=True, timeout=60)


def bare_sbatch_rate(folder: Path, count: int, settings: dict[str, str]) -> float:
    """Jobs a second of a loop of sbatch, until the last of them has left the queue."""
    write_files(folder, NOOP)
    known, begin = {**os.environ, **settings}, time.perf_counter()
    for _ in range(count):
        submit = ["/usr/bin/sbatch", "--parsable", "--output=/dev/null", "--wrap=bash run.sh"]
        subprocess.run(submit, cwd=folder, env=known, check=True, stdout=subprocess.DEVNULL)
    while subprocess.run(["/usr/bin/squeue", "-h", "-o", "%i"], env=known, check=True, capture_output=True).stdout:
        time.sleep(0.1)
    return count / (time.perf_counter() - begin)


def slurm(place: Place, size: int) -> Iterator[Measure]:
    """No-op jobs through the Slurm executor against a real slurmctld, and a bare loop of sbatch; the cluster drains some 4 a second."""
    with temporary_folder(place) as folder, slurm_cluster(folder) as settings:
        bare = bare_sbatch_rate(folder / "bare", size, settings)
        site, begin = Site(place, folder), time.perf_counter()
        try:
            site.start("client", JOBORCH_EXECUTOR="slurm", **settings)
            site.start("server")
            _, jobs = job_rate(site.port, size)
        finally:
            site.stop()
        calls = (folder / "calls").read_text().split()
        intervals = (time.perf_counter() - begin) / SLURM_INTERVAL_S
    yield Measure("jobs", jobs, "jobs/s", bare)
    yield Measure("bare loop of sbatch", bare, "jobs/s")
    yield Measure("sbatch calls a job", calls.count("sbatch") / size, "")
    yield Measure("squeue and sacct calls an interval", (calls.count("squeue") + calls.count("sacct")) / intervals, "")


class Benchmark(NamedTuple):
    """A row of the table below."""

    name: str
    run: Callable[[Place, int], Iterator[Measure]]
    size: int
    quick_size: int
    runs: int
    what: str
    against: str


GIB = 1 << 30
BENCHMARKS = [
    # name, one run of it, its size, the size with --quick, runs, what the size counts, what the ratio is to
    Benchmark("latency", latency, 200, 50, 3, "no-op jobs", "bash run.sh in a new folder"),
    Benchmark("throughput", throughput, 2000, 200, 3, "no-op jobs", "xargs -P2 with new folders"),
    Benchmark("big", big, 2 * GIB, GIB // 4, 3, "bytes", "cp + sha256sum"),
    Benchmark("many-files", many_files, 10_000, 1000, 3, "files", "cp -r + zip -r"),
    Benchmark("polling", polling, 2, 1, 5, "seconds a slice", "a hello route of the same stack"),
    Benchmark("waiters", waiters, 300, 100, 3, "uploads", "no waiters"),
    Benchmark("silent", silent, 300, 100, 1, "health checks", "the same alone"),
    Benchmark("many-results", many_results, 200_000, 20_000, 1, "files", ""),
    Benchmark("start", start, 10, 3, 1, "starts", "python -c pass"),
    Benchmark("restart", restart, 100_000, 2000, 1, "ended jobs; a hundredth as many running payloads", ""),
    Benchmark("backlog", backlog, 1_000_000, 20_000, 1, "queued jobs of 1,000 users", "the same with 1,000 queued"),
    Benchmark("fairness", fairness, 10_000, 2000, 1, "queued jobs of one user; 50 others come", "the script alone"),
    Benchmark("slurm", slurm, 500, 40, 1, "no-op jobs", "a bare loop of sbatch"),
    Benchmark("idle", idle, 60, 10, 1, "seconds", ""),
]
GOALS = {
    ("latency", "median"): Goal(most=10, ratio_most=5),
    ("latency", "p99"): Goal(most=30),
    ("throughput", "jobs"): Goal(ratio_least=0.5),
    ("big", "upload"): Goal(ratio_least=0.5),
    ("big", "send"): Goal(ratio_least=0.5),
    ("big", "run and fetch"): Goal(ratio_least=0.5),
    ("big", "download"): Goal(ratio_least=0.5),
    ("big", "peak RSS, server"): Goal(most=80),
    ("big", "peak RSS, client"): Goal(most=80),
    ("polling", "HEAD and GET"): Goal(ratio_least=0.7),
    ("polling", "HEAD /download/ID"): Goal(ratio_least=0.7),
    ("waiters", "upload, p99"): Goal(most=100),
    ("silent", "/health, p99"): Goal(most=100),
    ("many-results", "peak RSS, server"): Goal(most=150),
    ("many-results", "peak RSS, client"): Goal(most=150),
    ("start", "--version"): Goal(most=150),
    ("start", "first /health"): Goal(most=600),
    ("restart", "server, ended jobs"): Goal(most=2000),
    ("restart", "client, running payloads, all taken up"): Goal(most=2000),
    ("backlog", "restart"): Goal(most=2000),
    ("backlog", "peak RSS, server"): Goal(most=150),
    ("backlog", "choose, p99"): Goal(most=5, ratio_most=2),
    ("backlog", "choose, median"): Goal(ratio_most=2),
    ("backlog", "choose and claim, p99"): Goal(ratio_most=2),
    ("backlog", "GET /jobs"): Goal(ratio_most=2),
    ("backlog", "HEAD /download/ID"): Goal(ratio_most=2),
    ("fairness", "one after another, p90"): Goal(most=2),
    ("fairness", "at once, the last"): Goal(most=FAIR_OTHERS / FAIR_SLOTS + 2),
    ("slurm", "jobs"): Goal(ratio_least=0.8),
    ("slurm", "squeue and sacct calls an interval"): Goal(most=1.5),
    ("idle", "PSS, server"): Goal(most=45),
    ("idle", "PSS, client"): Goal(most=45),
    ("idle", "CPU, server"): Goal(most=0.2),
    ("idle", "CPU, client"): Goal(most=0.2),
}


# == Output ==  One table for people, one JSON line a figure for programs.

COLUMNS = ("benchmark", "figure", "value", "ratio", "goal", "met")


def say(text: str) -> None:
    """Tell the person who waits, without disturbing the table."""
    print(text, file=sys.stderr, flush=True)


def cells(figure: Figure) -> tuple[str, ...]:
    """A figure as a row of the table."""
    digits = max(0, 2 - len(str(int(abs(figure.value)))) + (figure.value < 100))
    value = f"{figure.value:,.{digits}f} {figure.unit}"
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f} x"
    met = {True: "yes", False: "NO", None: ""}[figure.met]
    return figure.benchmark, figure.name, value, ratio, figure.goal, met


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines with aligned columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        parts = [cell.rjust(width) if 2 <= at <= 3 else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths))]
        yield "  ".join(parts).rstrip()


def markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines of a Markdown table."""
    yield f"| {' | '.join(rows[0])} |"
    yield "|---|---|--:|--:|---|---|"
    for row in rows[1:]:
        yield f"| {' | '.join(row)} |"


def footnotes(names: Sequence[str], facts: Json) -> Iterator[str]:
    """What the ratios are to, and the machine."""
    rows = [row for row in BENCHMARKS if row.name in names and row.against]
    against = " Ratios are to: " + "; ".join(f"{row.name}: {row.against}" for row in rows) + "." if rows else ""
    yield f"Each figure is the median of several runs.{against}"
    yield (
        "{cpu}, {cores} cores, {memory_gib} GiB; Linux {kernel}, {file_system}; Python {python}, "
        "SQLite {sqlite}; {version}; {date}.".format(**facts)
    )


def write_json(path: Path, found: Sequence[Figure], facts: Json, quick: bool) -> None:
    """Append one line a figure."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**figure._asdict(), "quick": quick, "machine": facts}) + "\n" for figure in found)


def measure(benchmark: Benchmark, place: Place, quick: bool) -> list[Figure]:
    """Run a benchmark as often as its row says."""
    size, runs = benchmark.quick_size if quick else benchmark.size, []
    for number in range(benchmark.runs):
        say(f"{benchmark.name}: run {number + 1} of {benchmark.runs}, {size:,} {benchmark.what}")
        os.sync()
        runs.append(list(benchmark.run(place, size)))
    return list(figures(benchmark, runs))


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(description="Measure joborch.", epilog="example: python tests/bench.py latency idle --quick")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure, all by default: {', '.join(names)}")
    parser.add_argument("--pyz", type=Path, default=REPOSITORY / "joborch.pyz", help="the program (joborch.pyz or joborch.py)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs it")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="the folder, and so the file system, to use")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "bench.jsonl", help="where one JSON line a figure is added")
    parser.add_argument("--quick", action="store_true", help="small sizes: a look, not a measurement")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(names))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(names)}")
    if not given.pyz.exists():
        parser.error(f"{given.pyz.name} is not there: make it by python3 build_zipapp.py, or name another by --pyz")
    given.names = given.names or names
    return given


def interrupt(*_: object) -> None:
    """INT and TERM end this program by way of every `finally`, which a second signal must not cut short."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Measure what was asked for; 1 where something could not be measured."""
    given = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    place = Place(given.pyz.resolve(), given.python, given.dir)
    facts = machine(place)
    found: list[Figure] = []
    status = 0
    for benchmark in BENCHMARKS:
        if benchmark.name not in given.names or status == 130:
            continue
        try:
            found += (new := measure(benchmark, place, given.quick))
            write_json(given.json, new, facts, given.quick)
        except (BenchError, OSError, subprocess.SubprocessError) as error:
            say(f"{benchmark.name} could not be measured: {error}")
            status = 1
        except KeyboardInterrupt:
            status = 130
    if found:
        rows = [COLUMNS, *map(cells, found)]
        print("\n".join(markdown(rows) if given.markdown else aligned(rows)), end="\n\n")
        print("\n".join(footnotes([figure.benchmark for figure in found], facts)))
    return status


if __name__ == "__main__":
    sys.exit(main())
