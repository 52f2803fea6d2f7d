"""GET /metrics: counters and figures in Prometheus' text format, counted as things happen and never by scanning jobs."""

from __future__ import annotations

import bisect
import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from joborch import (
    COUNT_LIVE,
    INSTANCE,
    MOVES,
    OVER,
    QUEUED_OLDEST,
    QUEUED_PRIORITIES,
    Answer,
    Cause,
    Client,
    Gives,
    Job,
    Loop,
    Move,
    Node,
    Request,
    Route,
    Server,
    Status,
    __version__,
    free_bytes,
    log,
    route,
)

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WAIT_BOUNDS_S = (0.01, 0.1, 1, 10, 60, 600, 3600, 6 * 3600, 24 * 3600)  # of a queue, and of runs
TRANSFER_BOUNDS_S = (0.005, 0.02, 0.1, 0.5, 2, 10, 60, 600)

# == The text format ==  https://prometheus.io/docs/instrumenting/exposition_formats/

Labels = tuple[str, ...]


def escaped(text: str) -> str:
    """Return a label's value as it stands between quotes."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def labelled(names: Sequence[str], values: Sequence[str]) -> str:
    """Return the labels of a sample in braces; empty if there are none."""
    pairs = ",".join(f'{name}="{escaped(value)}"' for name, value in zip(names, values))
    return f"{{{pairs}}}" if pairs else ""


class Family:
    """Samples of one name, one for each set of labels: a counter, or a gauge."""

    def __init__(self, name: str, kind: str, meaning: str, labels: Sequence[str] = ()) -> None:
        self.name, self.kind, self.meaning, self.labels = f"joborch_{name}", kind, meaning, tuple(labels)
        self.values: dict[Labels, float] = {}

    def add(self, labels: Labels, amount: float = 1) -> None:
        """Count. The caller holds the lock of all metrics."""
        self.values[labels] = self.values.get(labels, 0) + amount

    def set(self, *labels: str, value: float) -> None:
        """Give a gauge its value."""
        self.values[labels] = value

    def samples(self) -> Iterator[str]:
        """Yield the lines of all samples."""
        for labels, value in self.values.items():
            yield f"{self.name}{labelled(self.labels, labels)} {value:.17g}"

    def lines(self) -> Iterator[str]:
        """Yield the lines of the family: none if it has no samples."""
        if self.values:
            yield f"# HELP {self.name} {self.meaning}"
            yield f"# TYPE {self.name} {self.kind}"
            yield from self.samples()


class Histogram(Family):
    """Counts of values in buckets, with their sum."""

    def __init__(self, name: str, meaning: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        super().__init__(name, "histogram", meaning, labels)
        self.bounds, self.buckets = tuple(bounds), dict[Labels, list[int]]()

    def begin(self, labels: Labels) -> None:
        """Show these labels from now on, without a value. The caller holds the lock of all metrics."""
        if labels not in self.buckets:
            self.buckets[labels] = [0] * (len(self.bounds) + 1)
            self.add(labels, 0)

    def observe(self, labels: Labels, value: float) -> None:
        """Count a value, which is not negative. The caller holds the lock of all metrics."""
        value = max(0.0, value)
        self.begin(labels)
        self.buckets[labels][bisect.bisect_left(self.bounds, value)] += 1
        self.add(labels, value)

    def samples(self) -> Iterator[str]:
        """Yield the buckets, each with all smaller ones, then sum and count."""
        for labels, counts in self.buckets.items():
            total = 0
            for bound, count in zip((*(f"{bound:g}" for bound in self.bounds), "+Inf"), counts):
                total += count
                yield f"{self.name}_bucket{labelled((*self.labels, 'le'), (*labels, bound))} {total}"
            yield f"{self.name}_sum{labelled(self.labels, labels)} {self.values[labels]:.17g}"
            yield f"{self.name}_count{labelled(self.labels, labels)} {total}"


# == Counting ==  By what happens: moves of jobs after their COMMIT, and requests when they are answered.


class Metrics:
    """What one server or client counts. A user's id is never a label: there are too many, and they are nobody's business."""

    def __init__(self, node: Node) -> None:
        noun = f"{node.store.noun}s"
        self.node, self.lock, self.is_server = node, threading.Lock(), node.config.mode == "server"
        of_service, of_route = ("service",), ("method", "route", "code")
        self.moves = Family(f"{noun}_total", "counter", f"{noun} that came to this status", ("service", "status"))
        self.live = Family(f"{noun}_current", "gauge", f"{noun} in this status now", ("service", "status"))
        self.failures = Family("failures_total", "counter", f"{noun} that failed, by cause", ("service", "cause"))
        self.attempts = Family("new_attempts_total", "counter", "attempts that were lost and are made again", of_service)
        self.results = Family("result_bytes_total", "counter", "bytes of the results that were stored", of_service)
        self.wait = Histogram("wait_seconds", "time in the queue until a client is chosen", of_service, WAIT_BOUNDS_S)
        self.dispatch = Histogram("dispatch_seconds", "time from this choice until the client has the files", of_service, TRANSFER_BOUNDS_S)
        self.run = Histogram("run_seconds", "run time of scripts", of_service, WAIT_BOUNDS_S)
        self.transfer = Histogram(
            "transfer_seconds", "time from the news of an end until its result is stored", of_service, TRANSFER_BOUNDS_S
        )
        self.requests = Family("http_requests_total", "counter", "requests that were answered", of_route)
        self.took = Family("http_request_seconds_total", "counter", "time that handlers took, waits included", ("method", "route"))
        self.received = Family("http_received_bytes_total", "counter", "bytes of the bodies of requests", ("method", "route"))
        self.sent = Family("http_sent_bytes_total", "counter", "bytes of the bodies of answers, as announced", ("method", "route"))
        self.errors = Family("loop_errors_total", "counter", "ticks of a loop that ended in an error", ("loop",))
        self.errors_of = weakref.WeakKeyDictionary[Loop, int]()  # those that are counted
        self.counted = [value for value in vars(self).values() if isinstance(value, Family)]
        self.begin(node.config.services if self.is_server else ())

    def begin(self, services: Iterable[str]) -> None:
        """Begin to count for further services: rates begin at 0, not with the first job."""
        with self.lock:
            for service in services:
                for status in {status for move in MOVES[self.node.config.mode] for status in move}:
                    self.moves.add((service, status.value), 0)
                    if status not in OVER:
                        self.live.add((service, status.value), 0)
                for cause in Cause:
                    self.failures.add((service, cause.value), 0)
                for family in (self.attempts, self.results):
                    family.add((service,), 0)
                for histogram in (self.wait, self.dispatch, self.run, self.transfer):
                    histogram.begin((service,))

    def start(self) -> None:
        """Count the jobs that are there now. Of a million that takes a second, so a thread does it, on a snapshot of this moment."""
        store = self.node.store
        self.live.values = dict.fromkeys(self.live.values, 0)  # without the moves of the start, which the snapshot has
        if store.alone:
            self.add_live(store.read(COUNT_LIVE))
            return
        db = store.reader()
        db.execute("BEGIN")
        db.execute(INSTANCE).fetchone()  # the first read begins the snapshot
        threading.Thread(target=self.count_live, args=(db,), name="count", daemon=True).start()

    def count_live(self, db: sqlite3.Connection) -> None:
        """Count the jobs in a snapshot."""
        try:
            with contextlib.closing(db):
                self.add_live(db.execute(COUNT_LIVE).fetchall())
        except sqlite3.Error as error:
            log.warning("the jobs of before the start are missing in joborch_%s_current: %s", self.node.store.noun, error)

    def add_live(self, rows: Iterable[sqlite3.Row]) -> None:
        """Add counted jobs to what has moved since."""
        with self.lock:
            for row in rows:
                self.live.add((row["service"], row["status"]), row["jobs"])

    def committed(self, moves: Sequence[Move]) -> None:
        """Count moves."""
        with self.lock:
            for move in moves:
                self.count(move)

    def count(self, move: Move) -> None:
        """Count one move. The caller holds the lock."""
        job, changes, service = move.job, move.changes, move.job.service or ""
        self.moves.add((service, move.to.value))
        if move.source is not None and move.source not in OVER:
            self.live.add((service, move.source.value), -1)
        if move.to not in OVER:
            self.live.add((service, move.to.value))
        if move.to is Status.FAILED:
            self.failures.add((service, changes["cause"] or "unknown"))
        if move.source is None or move.to is Status.CLEANED:
            return
        if changes["attempt"] != job.attempt:
            self.attempts.add((service,))
        if move.to in OVER and changes["result_size"]:
            self.results.add((service,), changes["result_size"])
        self.observe(move, (service,))

    def observe(self, move: Move, labels: Labels) -> None:
        """Count the times that a move ends."""
        spent_s = move.at - move.job.moved_at
        if move.to is Status.PROCESSING:
            self.wait.observe(labels, spent_s)
        elif move.source is Status.PROCESSING and move.to is Status.SUBMITTED:
            self.dispatch.observe(labels, spent_s)
        elif move.to in OVER:
            started, ended = move.changes["started_at"], move.changes["ended_at"]
            if move.run_s is not None:
                self.run.observe(labels, move.run_s)
            elif not self.is_server and started and ended:
                self.run.observe(labels, ended - started)

    def fetched(self, job: Job, seconds: float) -> None:
        """Count how long it took until the server had a result."""
        with self.lock:
            self.transfer.observe((job.service or "",), seconds)

    def answered(self, method: str, declared: Route | None, code: int, took_s: float = 0.0, received: int = 0, sent: int = 0) -> None:
        """Count one answer. What has no route, or an unknown method, shares a label: strangers must not make new ones."""
        path = declared.path if declared is not None else ""
        labels = (method if method in ("GET", "HEAD", "POST", "PUT", "DELETE") else "other", path)
        with self.lock:
            self.requests.add((*labels, str(code)))
            self.took.add(labels, took_s)
            if received:
                self.received.add(labels, received)
            if sent:
                self.sent.add(labels, sent)

    def count_errors(self) -> None:
        """Count the errors of loops since the last look: a loop that goes with its client takes none away. The caller holds the lock."""
        for loop in list(self.node.loops.values()):
            self.errors.add((loop.name.partition(":")[0],), loop.errors - self.errors_of.get(loop, 0))
            self.errors_of[loop] = loop.errors

    def text(self) -> str:
        """Return everything as text."""
        now = [*figures_of_process(self.node), *figures_of_problems(self.node)]
        if isinstance(self.node, Server):
            now += figures_of_server(self.node)
        with self.lock:
            self.count_errors()
            lines = [line for family in (*self.counted, *now) for line in family.lines()]
        return "\n".join(lines) + "\n"


# == Figures of the moment ==  Read from memory, or with one call to the system or one indexed query each.


def size_of(path: str) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def figure(name: str, meaning: str, value: float, kind: str = "gauge") -> Family:
    """Return a family with one sample without labels."""
    family = Family(name, kind, meaning)
    family.set(value=value)
    return family


def figures_of_process(node: Node) -> Iterator[Family]:
    """Yield what any process has: age, CPU, memory, disk, database, loops."""
    about = Family("info", "gauge", "version and mode of this process", ("version", "mode"))
    about.set(__version__, node.config.mode, value=1)
    yield about
    yield figure("uptime_seconds", "age of this process", node.clock.monotonic() - node.started)
    yield figure("cpu_seconds_total", "CPU time of this process, without payloads", time.process_time(), "counter")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    yield figure("resident_memory_bytes", "memory of this process", pages * os.sysconf("SC_PAGE_SIZE"))
    yield figure("database_bytes", "size of the database", size_of(node.store.path))
    yield figure("database_wal_bytes", "size of its write-ahead log", size_of(f"{node.store.path}-wal"))
    yield figure("disk_free_bytes", "free space for the data folder", free_bytes(node.data.path))
    yield figure("disk_kept_bytes", "free space below which uploads are refused", node.config.min_free_bytes)
    loops = list(node.loops.values())
    yield figure("loop_lag_seconds", "how late the timer looked at a loop, at most", max((loop.late_s for loop in loops), default=0.0))
    if isinstance(node, Client):
        yield figure("slots", "slots of this client", node.config.slots)
        yield figure("load_percent", "CPU use of this machine", node.cpu_load())


def figures_of_problems(node: Node) -> Iterator[Family]:
    """Yield the problems of /health: 1 for each that stands, and how many there are."""
    problems = node.plugins["health"].report()
    found = Family("problem", "gauge", "1 for each problem that /health shows", ("kind", "service", "client"))
    for problem in problems:
        found.set(*problem.key, value=1)
    yield found
    yield figure("problems", "how many problems /health shows", len(problems))


def oldest_wait_s(server: Server, service: str) -> float:
    """Return how long the first job of a service's queue has waited; 0 if it is empty."""
    levels = server.store.read(QUEUED_PRIORITIES, service=service)
    oldest = [row[0] for level in levels for row in server.store.read(QUEUED_OLDEST, service=service, priority=level["priority"])]
    return max(0.0, server.store.steady() - min(oldest)) if oldest else 0.0


def figures_of_server(server: Server) -> Iterable[Family]:
    """Return what a server knows of its queues and clients."""
    oldest = Family("oldest_wait_seconds", "gauge", "how long the first job of the queue has waited", ("service",))
    limit = Family("runs_limit", "gauge", "jobs of a service that may be at clients at once", ("service",))
    for service in server.services.values():
        oldest.set(service.name, value=oldest_wait_s(server, service.name))
        limit.set(service.name, value=service.max_runs)
    up = Family("client_up", "gauge", "1 if the client answers", ("client",))
    slots = Family("client_slots", "gauge", "slots of the client", ("client",))
    free = Family("client_slots_free", "gauge", "free slots of the client", ("client",))
    load = Family("client_load_percent", "gauge", "CPU use of the client's machine", ("client",))
    links = list(server.links.values())
    for link, place in zip(links, server.capacities_of(links)):
        up.set(link.name, value=int(link.is_heard()))
        if link.is_heard() and link.protocol.has_events:
            slots.set(link.name, value=link.slots)
            free.set(link.name, value=max(0, place.free))
            load.set(link.name, value=link.load)
    return oldest, limit, up, slots, free, load, *figures_of_webhooks(server), *figures_of_clouds(server)


def figures_of_clouds(server: Server) -> Iterator[Family]:
    """Yield the instances in clouds by state, and what they cost."""
    clouds: Any = server.plugins["clouds"]
    if not clouds.sites:
        return
    made = Family("cloud_instances", "gauge", "instances in this state", ("cloud", "state"))
    today = Family("cloud_cost_today", "gauge", "what instances have cost since midnight (UTC)", ("cloud",))
    spent = Family("cloud_cost_total", "counter", "what instances have cost in all", ("cloud",))
    runs = Family("cloud_service_cost", "gauge", "what runs of this service have cost in all", ("cloud", "service"))
    runs_today = Family("cloud_service_cost_today", "gauge", "the same since midnight (UTC)", ("cloud", "service"))
    idle = Family("cloud_unassigned_cost", "gauge", "what instances have cost beyond runs: boots and idle slots", ("cloud",))
    idle_today = Family("cloud_unassigned_cost_today", "gauge", "the same since midnight (UTC)", ("cloud",))
    held = Family("cloud_held", "gauge", "1 if the cloud makes no instances now because something is wrong", ("cloud",))
    rows, bill = clouds.rows(), clouds.bill()
    for name, site in clouds.sites.items():
        for state in ("intended", "booting", "joined", "draining", "ending"):
            made.set(name, state, value=sum((row.cloud, row.state) == (name, state) for row in rows))
        held.set(name, value=int(bool(site.held())))
    for name, cost in bill.clouds.items():
        rest, services = bill.unassigned(name), bill.of_services(name).items()
        for family, labels, value in (
            (today, (name,), cost.today), (spent, (name,), cost.in_all), (idle, (name,), rest.in_all), (idle_today, (name,), rest.today),
            *((runs, (name, service), each.in_all) for service, each in services),
            *((runs_today, (name, service), each.today) for service, each in services),
        ):  # fmt: skip
            family.set(*labels, value=value)
    yield from (made, today, spent, runs, runs_today, idle, idle_today, held)


def figures_of_webhooks(server: Server) -> Iterator[Family]:
    """Yield how many webhooks wait, and how attempts to deliver them ended."""
    webhooks: Any = server.plugins["webhooks"]
    attempts = Family("webhook_attempts_total", "counter", "attempts to deliver a webhook, by outcome", ("outcome",))
    for outcome, count in webhooks.outcomes.items():
        attempts.set(outcome, value=count)
    yield attempts
    yield figure("webhook_backlog", "webhooks that are not delivered yet", webhooks.backlog)


@route(
    "GET", "/metrics", "server client", who="reader operator", gives={200: Gives("all figures, in Prometheus' text format", "text/plain")}
)
def metrics(node: Node, request: Request) -> Answer:
    """Show counters and figures for Prometheus."""
    found: Any = node.plugins["metrics"]
    return Answer(found.text().encode(), 200, {"Content-Type": TEXT_TYPE})
