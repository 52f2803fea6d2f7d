"""joborch's processes for `tests/bench.py`: a server and its clients in a folder of their own, and what several benchmarks do there.

A site has every guarantee on and no setting but limits that do not bind. It is ended whatever happens.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench_base import (
    HOST,
    NOOP,
    START_LIMIT_S,
    BenchError,
    Caller,
    Json,
    Place,
    Script,
    Swarm,
    end,
    environment,
    free_port,
    request,
    temporary_folder,
    upload_request,
    wait_until,
)

TOKEN = "the-token-of-a-benchmark"
HOLD_LIMIT_S = 900  # a job that was held ends by itself after that, whatever became of this program
SERVER_THREADS = 4  # of waitress, in joborch and in the bare "hello" server alike
ENDED = ("Completed", "Failed", "Invalid", "Killed", "Cleaned")
NOT_ENDED = ("Queued", "Processing", "Submitted", "Running", "Unknown")

# == joborch's processes ==  A site is a server and a client in a folder of their own, ended whatever happens.


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


class Site:
    """A server and its clients as processes, by the names "server", "client", "client-2" and so on; use `running_site`."""

    def __init__(self, place: Place, folder: Path, clients: int = 1) -> None:
        self.place, self.folder = place, folder
        self.clients = ["client", *(f"client-{number}" for number in range(2, clients + 1))]
        self.ports = {name: free_port() for name in ("server", *self.clients)}
        self.doors: dict[str, int] = {}  # ports of proxies that stand before a process
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.fence = folder / "fence"  # a held job reads one line from this pipe, which costs no CPU
        self.marks = folder / "marks"  # and appends a byte to this file when it starts
        os.mkfifo(self.fence)
        self.marks.touch()

    @property
    def port(self) -> int:
        """The server's port."""
        return self.ports["server"]

    def url(self, name: str) -> str:
        """Where others are to call a process."""
        return f"http://{HOST}:{self.doors.get(name, self.ports[name])}"

    def settings(self, name: str) -> dict[str, str]:
        """The settings of a process: where it lives, and limits that do not bind."""
        common = {"PORT": str(self.ports[name]), "DATA_PATH": str(self.folder / name)}
        if name in self.clients:
            return {**common, "JOBORCH_TOKEN": TOKEN}
        return {**common, "JOBORCH_MAX_QUEUED_PER_USER": "1000000", **service_settings("BENCH", *map(self.url, self.clients))}

    def start(self, name: str, ready: bool = True, **settings: str) -> None:
        """Start a process, with further settings, and return once it answers; at once for one that does not listen (`ready`)."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            self.processes[name] = subprocess.Popen(
                [self.place.python, str(self.place.program), name.partition("-")[0]],
                cwd=self.folder,
                env=environment(self.folder, **{**self.settings(name), **settings}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for this program, which then ends them
            )
        if ready:
            wait_until_ready(self.processes[name], self.ports[name], log)

    def stop(self) -> None:
        """End all processes and let the held jobs go."""
        for process in self.processes.values():
            end(process)
        self.release(max(1000, 2 * self.held_starts()), linger_s=0.1)

    def held_upload(self, user: int = 1, first: bytes = b"") -> bytes:
        """The upload of a job that does nothing until `release`; `first` are the first lines of its script."""
        mark, fence = shlex.quote(str(self.marks)), shlex.quote(str(self.fence))
        script = f"printf . >>{mark}\nexec 3<>{fence}\nread -r -t {HOLD_LIMIT_S} -u 3\nexit 0\n"
        return upload_request({**NOOP, "run.sh": first + script.encode()}, user=user)

    def held_starts(self) -> int:
        """How many held jobs have started so far."""
        return self.marks.stat().st_size

    def release(self, count: int, linger_s: float = 0.0) -> None:
        """Let so many held jobs end; which ones is chance. `linger_s` is for those that have started and not opened the pipe yet."""
        pipe = os.open(self.fence, os.O_RDWR | os.O_NONBLOCK)
        try:
            os.write(pipe, b"\n" * count)
            time.sleep(linger_s)  # the pipe is empty as soon as its last end closes
        finally:
            os.close(pipe)

    def hold(self, count: int) -> list[int]:
        """Queue jobs that take every slot of the client and do nothing; return their ids."""
        before = self.held_starts()
        with Caller(self.port) as caller:
            ids = [int(caller.ask(self.held_upload()).json()["id"]) for _ in range(count)]
        wait_until(lambda: self.held_starts() > before, START_LIMIT_S, "one of the queued jobs runs")
        return ids


def service_settings(name: str, *urls: str) -> dict[str, str]:
    """A server's settings of a service with these clients and limits that do not bind."""
    settings = {"CLIENTS": ",".join(urls), "TOKEN": TOKEN, "RUNS_PER_USER": "1000000", "MAX_RUNS": "1000000"}
    return {f"SERVICE_{name}_{key}": value for key, value in settings.items()}


@contextlib.contextmanager
def new_site(place: Place, clients: int = 1, kind: type[Site] = Site) -> Iterator[Site]:
    """A site of which nothing runs yet, that is gone afterwards with all that was started."""
    with temporary_folder(place) as folder:
        site = kind(place, folder, clients)
        try:
            yield site
        finally:
            site.stop()


@contextlib.contextmanager
def running_site(place: Place, settings: dict[str, str] | None = None, clients: int = 1) -> Iterator[Site]:
    """A site with all its processes up; `settings` are further settings of the clients."""
    with new_site(place, clients) as site:
        for name in site.clients:
            site.start(name, **(settings or {}))
        site.start("server")
        yield site


def job_after(caller: Caller, job: Json) -> Json:
    """The job once it has ended, or once the server has waited as long as it does."""
    answer = caller.ask(request("GET", f"/jobs/{job['id']}?wait=45"))
    if answer.status not in (429, 503):
        return answer.json()
    time.sleep(float(answer.header("Retry-After") or 0.1))  # all places of waiting callers were taken
    return job


def wait_s_of(job: Json) -> float:
    """How long a job waited: from its upload until its script began."""
    created, started = (datetime.datetime.fromisoformat(str(job[name]).replace("Z", "+00:00")) for name in ("created_at", "started_at"))
    return (started - created).total_seconds()


def wait_until_one_runs(caller: Caller) -> None:
    """Return once some job runs; which one is the server's choice."""
    wait_until(lambda: caller.get("/jobs?status=Running&limit=1")["jobs"], START_LIMIT_S, "a job runs")


def wait_until_completed(caller: Caller, job: Json) -> Json:
    """The job once it is Completed; raises BenchError where it ends otherwise."""
    while job["status"] not in ENDED:
        job = job_after(caller, job)
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


def upload_all(port: int, wanted: Sequence[bytes]) -> list[int]:
    """Send these uploads from several connections at once; return the ids of the jobs."""
    ids: list[int] = []
    Swarm(port).run([uploader(wanted[first::UPLOADERS], ids) for first in range(UPLOADERS)])
    return ids


WARM_UP_JOBS = 3  # the first jobs find nothing warm, and the server does not know yet how long such jobs run


def warm_up(site: Site) -> None:
    """Run some jobs that are not measured."""
    with Caller(site.port) as caller:
        for _ in range(WARM_UP_JOBS):
            wait_until_completed(caller, caller.ask(upload_request(NOOP)).json())


def job_rate(port: int, count: int) -> tuple[float, float]:
    """Jobs a second that are uploaded, and that are through (clocked until none is left, then each is checked)."""
    wanted = [upload_request(NOOP, user=number % USERS + 1) for number in range(count)]
    begin = time.perf_counter()
    ids = upload_all(port, wanted)
    uploaded = time.perf_counter()
    with Caller(port) as caller:  # not before: a server closes a connection that sends nothing for 15 s
        wait_until_none_is_left(caller)
        finished = time.perf_counter()
    Swarm(port).run([checker(ids[first::UPLOADERS]) for first in range(UPLOADERS)])
    return count / (uploaded - begin), count / (finished - begin)
