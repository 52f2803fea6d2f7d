"""The benchmark `all-at-once` of `tests/bench.py`: everything that could make others wait happens at the same time.

A large upload, a result of very many files, payloads that ignore TERM and are killed, a client that hangs in every way that
tests/proxy.py knows, and hundreds of callers that wait. Meanwhile small uploads, /health and the start of other users' jobs are timed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from typing import Callable, NamedTuple

from bench_base import (
    CHUNK_BYTES,
    FORM_END,
    HOST,
    NOOP,
    SETTLE_S,
    BenchError,
    Caller,
    Json,
    Measure,
    Place,
    Script,
    Swarm,
    free_port,
    percentile,
    request,
    upload_request,
    wait_until,
)
from bench_load import WAITED_JOBS, Helper, Pipe, helper, waiting_crowd
from bench_site import ENDED, Site, new_site, service_settings, wait_s_of, wait_until_completed, warm_up
from proxy import KINDS, Fault, Proxy

GIB = 1 << 30
SLOTS = 128  # more than all jobs of this benchmark need at once: nobody waits for a slot
STUBBORN = 30
FILES_A_GIB = 20_000  # of the result, beside each GiB of the upload
KIND_S, KIND_LIMIT_S = 2, 45  # how long the client hangs in one way; how long to wait for the server to come and see, after its back-off
HANG_JOB_S = 0.25  # between two jobs for the client that hangs
IDLE_S = 20
PAYLOADS_LIMIT_S = 120
JOB_CALLERS = 3
PAUSE_S = 0.05  # between two requests of a caller
OTHERS = 1000  # the first user of the small uploads; each job is of another one
BULK_USER, PACK_USER, STUBBORN_USER, HANG_USER = 2, 3, 4, 5


# == What is timed ==


class Probe(NamedTuple):
    """How long others waited, in ms."""

    upload: list[float]
    health: list[float]
    start: list[float]  # from the upload of a job until its script began


def health_caller(found: Probe, go_on: Callable[[], bool]) -> Script:
    """Ask for /health again and again."""
    wanted = request("GET", "/health")
    while go_on():
        begin = time.perf_counter()
        answer = yield wanted
        found.health.append((time.perf_counter() - begin) * 1000)
        answer.json()
        yield PAUSE_S


def job_caller(users: Iterator[int], found: Probe, go_on: Callable[[], bool]) -> Script:
    """Upload a small job of another user, look at it until it has ended, and note when it was started; then the next.

    It does not use `?wait`, because the waiting callers have taken all places there. It has one job at a time: the probe measures
    how long a job waits, not how a queue grows if jobs arrive faster than two busy cores can run them.
    """
    while go_on():
        begin = time.perf_counter()
        answer = yield upload_request(NOOP, user=next(users))
        found.upload.append((time.perf_counter() - begin) * 1000)
        job = answer.json()
        while job["status"] not in ENDED:
            yield PAUSE_S
            answer = yield request("GET", f"/jobs/{job['id']}")
            job = answer.json()
        if job["status"] != "Completed":
            raise BenchError(f"job {job['id']} is {job['status']}: {job.get('reason')}")
        found.start.append(wait_s_of(job) * 1000)


def probe(port: int, go_on: Callable[[], bool]) -> Probe:
    """Let some callers have small jobs of many users run, and one ask for /health, until `go_on` says no."""
    found, users = Probe([], [], []), itertools.count(OTHERS)
    Swarm(port).run([health_caller(found, go_on), *(job_caller(users, found, go_on) for _ in range(JOB_CALLERS))])
    return found


# == What happens meanwhile ==  Each in a process of its own.


def send_bulk(port: int, size: int) -> float:
    """Upload one job of `size` bytes as fast as they are taken; return the seconds. Its service has no client, so it never runs."""
    block = os.urandom(CHUNK_BYTES)
    files = {"run.sh": b"exit 0\n", "input": b""}
    with Caller(port) as caller:
        begin = time.perf_counter()
        caller.connection.settimeout(None)  # the disk decides how long it takes
        caller.connection.sendall(upload_request(files, user=BULK_USER, extra_bytes=size, service="bulk"))
        for _ in range(size // CHUNK_BYTES):
            caller.connection.sendall(block)
        caller.connection.sendall(FORM_END)
        job = caller.answer().json()
        taken_s = time.perf_counter() - begin
        caller.ask(request("POST", f"/terminate/{job['id']}", "Content-Length: 0\r\n"))
    return taken_s


def pack_result(port: int, files: int) -> float:
    """Run a job that leaves so many files; return the seconds until its result can be downloaded."""
    script = f"mkdir out; cd out; seq {files} | xargs touch\n".encode()
    with Caller(port) as caller:
        begin = time.perf_counter()
        wait_until_completed(caller, caller.ask(upload_request({"run.sh": script}, user=PACK_USER)).json())
        return time.perf_counter() - begin


def killer(job_id: int) -> Script:
    """Terminate a job and wait until it has ended."""
    yield request("POST", f"/terminate/{job_id}", "Content-Length: 0\r\n")
    job: Json = {"status": ""}
    while job["status"] not in ENDED:
        answer = yield request("GET", f"/jobs/{job_id}?wait=45")
        if answer.status in (429, 503):  # no place to wait is free
            yield float(answer.header("Retry-After") or 1)
        else:
            job = answer.json()
    if job["status"] != "Killed":
        raise BenchError(f"job {job_id} was terminated and is {job['status']}")


def kill_all(port: int, ids: list[int]) -> float:
    """Terminate these jobs at once; return the seconds until all are Killed."""
    begin = time.perf_counter()
    Swarm(port).run([killer(job_id) for job_id in ids])
    return time.perf_counter() - begin


class Enough(Exception):
    """The line to the client that hangs is not needed any more."""


class BadLine:
    """The line to a client: a good one, and from the first word on one that hangs in every way in turn, while jobs come for it."""

    def __init__(self, proxy: Proxy, server_port: int, pipe: Pipe) -> None:
        self.proxy, self.port, self.pipe = proxy, server_port, pipe

    def run(self) -> dict[str, int]:
        """Say when it has been through all ways, go on, and end at the next word. Return how often each fault happened."""
        with self.proxy:
            self.pipe.recv()
            with Caller(self.port) as caller, contextlib.suppress(Enough):
                for number, kind in enumerate(itertools.cycle(KINDS)):
                    if number == len(KINDS):
                        self.pipe.send("all")
                    self.hang(kind, caller)
            return dict(self.proxy.counts())

    def hang(self, kind: str, caller: Caller) -> None:
        """Let the server see that the client is well, since it backs off from one that is not; then hang, until that has shown."""
        begin = len(self.proxy.seen)
        self.proxy.calm()
        self.send_jobs(caller, lambda: any(exchange.status == 200 for exchange in self.proxy.seen[begin:]), 0)
        times = self.proxy.counts()[kind]
        self.proxy.plant(Fault(kind, times=0, seconds=10 * KIND_S))
        self.send_jobs(caller, lambda: self.proxy.counts()[kind] > times, KIND_S)

    def send_jobs(self, caller: Caller, seen: Callable[[], bool], least_s: float) -> None:
        """Upload jobs for the client for `least_s` seconds, and until `seen` returns True; raises Enough if the pipe has a message."""
        begin = time.monotonic()
        while time.monotonic() < begin + least_s or (not seen() and time.monotonic() < begin + KIND_LIMIT_S):
            caller.ask(upload_request(NOOP, user=HANG_USER, service="hang")).json()
            if self.pipe.poll(HANG_JOB_S):
                raise Enough


# == The benchmark ==


@contextlib.contextmanager
def site_with_bad_line(place: Place, size: int) -> Iterator[tuple[Site, Helper]]:
    """A server with a good client, one behind a proxy, and a service whose only client is not there; and the proxy's process."""
    with new_site(place, clients=2) as site:
        proxy = Proxy(site.ports["client-2"])
        site.doors["client-2"] = proxy.port
        with helper(lambda pipe: BadLine(proxy, site.port, pipe).run()) as line:
            proxy.listener.close()  # it is the helper's now
            site.start("client", JOBORCH_SLOTS=str(SLOTS))
            site.start("client-2")
            nobody = service_settings("BULK", f"http://{HOST}:{free_port()}")
            good, bad = service_settings("BENCH", site.url("client")), service_settings("HANG", site.url("client-2"))
            site.start("server", **{"JOBORCH_MAX_UPLOAD": str(size + GIB), **good, **bad, **nobody})
            yield site, line


def start_payloads(site: Site) -> tuple[list[int], list[int]]:
    """Start payloads that wait, and others that ignore every signal but KILL; return the ids of the jobs of both."""
    wanted = site.held_upload(STUBBORN_USER, first=b"trap '' TERM INT HUP\n")
    held = site.hold(WAITED_JOBS)
    with Caller(site.port) as caller:
        stubborn = [int(caller.ask(wanted).json()["id"]) for _ in range(STUBBORN)]
    wait_until(lambda: site.held_starts() == WAITED_JOBS + STUBBORN, PAYLOADS_LIMIT_S, "all payloads run")
    return held, stubborn


def all_at_once(place: Place, size: int) -> Iterator[Measure]:
    """Small uploads, /health and starts on a system with nothing else to do, and while all of the above happens."""
    if shutil.disk_usage(place.folder).free < 2.5 * size + GIB:
        raise BenchError(f"all-at-once needs {2.5 * size / GIB + 1:.0f} GiB of free disk: choose another --dir, or a smaller --size")
    counts: dict[str, int] = {}
    with site_with_bad_line(place, size) as (site, line):
        warm_up(site)
        until = time.monotonic() + IDLE_S
        idle = probe(site.port, lambda: time.monotonic() < until)
        held, stubborn = start_payloads(site)
        with waiting_crowd(site.port, held, counts), contextlib.ExitStack() as stack:
            time.sleep(SETTLE_S)
            works = [
                lambda _: send_bulk(site.port, size),
                lambda _: pack_result(site.port, max(1000, FILES_A_GIB * size // GIB)),
                lambda _: kill_all(site.port, stubborn),
            ]
            helpers = [stack.enter_context(helper(work)) for work in works]
            line.tell("hang")
            busy = probe(site.port, lambda: not all(one.is_done() for one in (*helpers, line)))
            taken_s = [one.result() for one in helpers]
            check_line(line)
    yield from beside(busy, idle)
    for name, seconds in zip(("the large upload", "the result of many files", "the stubborn payloads killed"), taken_s):
        yield Measure(name, seconds, "s")


def check_line(line: Helper) -> None:
    """Raise BenchError unless the client hung in every way that the proxy knows."""
    line.result()  # "all"
    line.tell("enough")
    missed = set(KINDS) - {kind for kind, times in line.result().items() if times}
    if missed:
        raise BenchError(f"the client did not hang by {', '.join(sorted(missed))}")


def beside(busy: Probe, idle: Probe) -> Iterator[Measure]:
    """The figures of both, the idle system as the base."""
    for name, now, alone in zip(("upload", "/health", "start of another user's job"), busy, idle):
        yield Measure(f"{name}, p99", percentile(now, 99), "ms", percentile(alone, 99))
        yield Measure(f"{name}, median", statistics.median(now), "ms", statistics.median(alone))
