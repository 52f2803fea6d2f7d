"""Benchmarks of `tests/bench.py` under load and at rest: polling, waiting callers, silent callers, all at once, many slots, start, idle."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import resource
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, Callable

from bench_base import (
    NOOP,
    SETTLE_S,
    BenchError,
    Caller,
    Measure,
    Place,
    Script,
    Swarm,
    connect,
    end,
    environment,
    memory_mb,
    peak_rss_mb,
    percentile,
    request,
    say,
    timed_run,
    upload_request,
    usage,
    wait_until,
)
from bench_site import (
    USERS,
    Site,
    answers,
    hello_server,
    new_site,
    running_site,
    upload_all,
    warm_up,
)

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


Pipe = multiprocessing.connection.Connection


def run_helper(work: Callable[[Pipe], object], pipe: Pipe) -> None:
    """The process of a helper: it sends back what its work returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    pipe.send(work(pipe))


class Helper:
    """Work in a process of its own, so that it takes none of this one's time."""

    def __init__(self, work: Callable[[Pipe], object]) -> None:
        self.pipe, there = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=run_helper, args=(work, there), daemon=True)
        self.process.start()
        there.close()

    def tell(self, word: str) -> None:
        """Send the work a word; most take any as the sign to stop."""
        self.pipe.send(word)

    def is_done(self) -> bool:
        """Whether the work has ended, well or not."""
        return self.pipe.poll() or not self.process.is_alive()

    def result(self) -> Any:
        """Wait for the end of the work and return what it returned; raises BenchError if it failed."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise BenchError("a helper failed: see above") from None

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.terminate()
        self.process.join()


@contextlib.contextmanager
def helper(work: Callable[[Pipe], object]) -> Iterator[Helper]:
    """A helper that is gone afterwards."""
    one = Helper(work)
    try:
        yield one
    finally:
        one.close()


@contextlib.contextmanager
def waiting_crowd(port: int, ids: Sequence[int], counts: dict[str, int]) -> Iterator[None]:
    """Hundreds of callers in `?wait`; afterwards `counts` holds how they fared."""

    def wait(pipe: Pipe) -> dict[str, int]:
        fared = {"refused": 0, "answered": 0}
        Swarm(port).run([waiter(ids[number % len(ids)], fared) for number in range(WAITERS)], stop=pipe.fileno())
        return fared

    with helper(wait) as crowd:
        yield
        crowd.tell("enough")
        counts.update(crowd.result())


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


IMPORTS = "import argparse, json, logging, sqlite3, http.client"  # what any program of this kind has to import


def start(place: Place, size: int) -> Iterator[Measure]:
    """The program's first signs of life, and a server's first answer, beside a bare Python with the same imports; the cache is warm."""
    bare: list[float] = []
    taken: dict[str, list[float]] = {"--version": [], "--help": [], "first /health": [], "list": []}
    with new_site(place) as site:
        env = environment(site.folder)
        timed_run(place.python, str(place.program), "--version", env=env)  # fills the cache
        for _ in range(size):
            bare.append(timed_run(place.python, "-c", IMPORTS, env=env) * 1000)
            for option in ("--version", "--help"):
                taken[option].append(timed_run(place.python, str(place.program), option, env=env) * 1000)
            begin = time.perf_counter()
            site.start("server")
            taken["first /health"].append((time.perf_counter() - begin) * 1000)
            asks = {**env, "JOBORCH_SERVER": site.url("server")}
            taken["list"].append(timed_run(place.python, str(place.program), "list", env=asks) * 1000)
            end(site.processes["server"])
            shutil.rmtree(site.folder / "server")
    for name, times in taken.items():
        yield Measure(name, statistics.median(times), "ms", statistics.median(bare))


def idle(place: Place, size: int) -> Iterator[Measure]:
    """What both processes cost while nothing happens, after they have done some work."""
    with running_site(place) as site:
        for _ in range(USERS):
            warm_up(site)
        time.sleep(SETTLE_S)
        yield from cost_at_rest(site, size)


def cost_at_rest(site: Site, seconds: float) -> Iterator[Measure]:
    """Memory of each process, and the share of a core that it uses during so many seconds."""
    before = {name: usage(process.pid) for name, process in site.processes.items()}
    time.sleep(seconds)
    for name, process in site.processes.items():
        kind, held_mb = memory_mb(process.pid)
        yield Measure(f"{kind}, {name}", held_mb, "MB")
        yield Measure(f"CPU, {name}", usage(process.pid).since(before[name]).cpu_s / seconds * 100, "%")


# == Many slots ==

FILL_SLOTS = 64
REST_S = 20
FILL_LIMIT_S = 600


def seconds_until(site: Site, starts: int, begin: float) -> float:
    """Seconds since `begin` until so many held jobs have started."""
    wait_until(lambda: site.held_starts() >= starts, FILL_LIMIT_S, f"{starts} payloads run")
    return time.perf_counter() - begin


def fill(place: Place, size: int) -> Iterator[Measure]:
    """64 slots: how soon all run. Then very many payloads that sleep: what they cost server and client."""
    with running_site(place, {"JOBORCH_SLOTS": str(FILL_SLOTS)}) as site:
        warm_up(site)
        wanted = [site.held_upload(user) for user in range(1, FILL_SLOTS + 1)]
        begin = time.perf_counter()
        upload_all(site.port, wanted)
        yield Measure(f"{FILL_SLOTS} slots run, from the first upload", seconds_until(site, FILL_SLOTS, begin), "s")
        upload_all(site.port, wanted)
        begin = time.perf_counter()
        site.release(FILL_SLOTS)
        yield Measure(f"{FILL_SLOTS} slots run again, from a queue", seconds_until(site, 2 * FILL_SLOTS, begin), "s")
    with running_site(place, {"JOBORCH_SLOTS": str(size)}) as site:
        begin = time.perf_counter()
        upload_all(site.port, [site.held_upload(number % USERS + 1) for number in range(size)])
        yield Measure("all payloads run, from the first upload", seconds_until(site, size, begin), "s")
        time.sleep(SETTLE_S)
        for one in cost_at_rest(site, REST_S):
            yield one._replace(name=f"{one.name}, payloads running")
