"""What is out of order now: the one place that finds problems, for GET /health, the metrics, doctor and a client's server."""

from __future__ import annotations

import errno
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from joborch import (
    CLOCK_TOLERANCE_S,
    COUNT_IN,
    JSON_TYPE,
    KIB,
    LOOK_AGAIN_S,
    PAYLOADS_IN,
    PROBLEMS_TOLD,
    Answer,
    Client,
    DiskFull,
    Gives,
    Link,
    Loop,
    Node,
    Parameter,
    Request,
    Server,
    Service,
    Status,
    StorageError,
    __version__,
    format_duration,
    full_texts,
    log,
    no_client_text,
    problem_of,
    problem_since,
    rfc3339,
    room_json,
    route,
    say_full,
    sees_site,
    unremovable_json,
)

SLOW_S = 1.0  # a write to the database that takes longer is a problem
LOGIN_AHEAD_S = 24 * 3600.0  # a login that ends sooner is a problem
BLOCKING = ("service_stopped", "backend", "disk_full", "disk")  # `?deep=1` answers 503 if this process has one of them


class Problem(NamedTuple):
    """One thing that is out of order, in words for whoever runs the process."""

    kind: str  # for programs: alerts and scripts
    what: str
    remedy: str
    service: str = ""  # several are separated by commas
    client: str = ""  # if it is a client's
    since: float | None = None  # wall time

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same problem at the next look."""
        return self.kind, self.service, self.client

    def as_json(self) -> dict[str, Any]:
        """Return it as /health shows it."""
        named = {"service": self.service or None, "client": self.client or None}
        return {"kind": self.kind, "what": self.what, "since": rfc3339(self.since), **named, "remedy": self.remedy}


# == Looking ==  What each look needs is in memory, or one call to the system; the database is tried by a thread of its own.


class WriteProbe:
    """Writes to the database and the data folder in another thread, so that nobody waits long for a disk that hangs."""

    def __init__(self, node: Node) -> None:
        self.node, self.lock, self.done = node, threading.Lock(), threading.Event()
        self.began: float | None = None  # monotonic; None: no write is under way
        self.took_s, self.error = 0.0, ""
        self.refused: OSError | None = None  # why the data folder takes no file

    def ask(self, patience_s: float) -> None:
        """Write something, unless such a write is under way; wait for its end, but at most `patience_s`."""
        with self.lock:
            if self.began is None:
                self.began, self.done = time.monotonic(), threading.Event()
                if not self.node.pool.add(self.write):
                    self.began = None
                    return
            done = self.done
        done.wait(patience_s)

    def write(self) -> None:
        """Write, and note how long it took and why it failed. Space is one reason; others are inodes, a quota, a disk that is read-only."""
        error, refused = "", self.try_folder()
        try:
            self.node.store.check()
        except StorageError as failure:
            error = str(failure)
        with self.lock:
            self.took_s, self.error, self.began = time.monotonic() - (self.began or 0.0), error, None
            self.refused = refused
        self.done.set()

    def try_folder(self) -> OSError | None:
        """Write a small file into the data folder and delete it; return the error if that fails."""
        self.node.disk_failed = False
        try:
            with tempfile.TemporaryFile(dir=self.node.data.tmp, buffering=0) as file:
                file.write(bytes(4 * KIB))
        except OSError as error:
            return error
        return None

    def problems(self) -> Iterator[Problem]:
        """Yield that the last write failed, or took long, or that the present one does."""
        with self.lock:
            waited_s = 0.0 if self.began is None else time.monotonic() - self.began
            took_s, error = self.took_s, self.error or self.node.store.damage
        look = f"look at the disk of {self.node.store.path}, and for another program that locks this file"
        if error:
            yield Problem("database", error, self.node.store.way_out() if self.node.store.damage else f"{look}; then restart it")
        elif waited_s > SLOW_S:
            yield Problem("database", f"the database has not completed a write for {format_duration(waited_s)}", look)
        elif took_s > SLOW_S:
            yield Problem("database", f"the database is slow: a write took {format_duration(took_s)}", look)
        if self.refused and self.refused.errno in (errno.ENOSPC, errno.EDQUOT):
            yield Problem("disk_full", *full_texts(self.node, write_failed=True))
        elif self.refused:
            what = f"uploads are refused: nothing can be written to {self.node.data.path}: {self.refused.strerror}"
            yield Problem("disk", what, "look at its file system, and at the kernel's log")


def problems_of_process(node: Node) -> Iterator[Problem]:
    """Yield what any process may have: too little space, and a file that was replaced."""
    try:
        node.data.account.check(1)
    except DiskFull:
        yield Problem("disk_full", *full_texts(node))
    except OSError as error:
        yield Problem("disk", f"{node.data.path} cannot be read: {error.strerror}", "look at its file system")
    what, _, remedy = node.program.restart_needed().partition(": ")
    if what:
        yield Problem("program", what, remedy)
    what, remedy = node.plugins["reload"].trouble
    if what:
        yield Problem("settings", what, remedy)


def problems_of_client(client: Client) -> Iterator[Problem]:
    """Yield why payloads cannot be started, and that a login ends soon."""
    trouble = problem_of(client)
    if trouble and not client.plugins["drain"].reason:  # somebody wanted that
        yield Problem("backend", trouble, "run `joborch doctor client` on its machine", since=problem_since(client, trouble))
    until = getattr(client.executor, "login_valid_until", lambda: None)()
    left_s = float("inf") if until is None else until - client.clock.wall()
    if 0 < left_s < LOGIN_AHEAD_S:
        left = format_duration(left_s)
        yield Problem("login", f"the login for {client.config.executor} ends in {left}, at {rfc3339(until)}", "log in again there")


def problems_of_link(link: Link) -> Iterator[Problem]:
    """Yield why a client does not answer its server, or what it reports itself."""
    services = ", ".join(service.name for service in link.services)
    if link.outage.failures:
        names = link.services[0].name.upper() if link.services else "<NAME>"
        what, since = f"client {link.name} {link.outage.reason}".replace("<NAME>", names), link.outage.since
        if link.wants_token:
            setting = link.remedy("TOKEN", lambda _: True)
            yield Problem("client_refuses", what, f"set {setting} to the token of this client", services, link.name, since)
        else:
            remedy = f"start it there with `joborch client`, or check the network and the URL in {link.remedy('CLIENTS', lambda _: True)}"
            if link.calls_in:
                remedy = f"start it there with `joborch client --join`, or revoke its token with `joborch token revoke {link.name}`"
            yield Problem("client_gone", what, remedy, services, link.name, since)
        return
    for name in [service.name for service in link.services if link.wrong_tokens.reason(service.name)]:
        remedy = f"set SERVICE_{name.upper()}_TOKEN to the token of this client"
        yield Problem("client_refuses", f"client {link.name} {link.wrong_tokens.reason(name)}", remedy, name, link.name)
    if link.copy_of:
        yield Problem("client_copy", f"client {link.name} {link.why_not()}", "stop one of the two", services, link.name)
    for told in link.problems:
        of = told["service"] or services
        yield Problem(told["kind"], f"client {link.name}: {told['what']}", told["remedy"], of, link.name, told["since"])
    if abs(link.ahead_s) > CLOCK_TOLERANCE_S:
        how = f"{format_duration(abs(link.ahead_s))} {'ahead of' if link.ahead_s > 0 else 'behind'}"
        yield Problem("clock", f"the clock of client {link.name} is {how} this machine's", "use NTP on both", services, link.name)


def runs_nothing(link: Link, service: str) -> bool:
    """Tell whether a client can get no job of a service until somebody does something; one that is only full, or not called yet, can."""
    cannot = any(told["kind"] in BLOCKING for told in link.problems) or bool(link.problem)
    return bool(link.outage.failures or link.drained or link.copy_of or link.wrong_tokens.reason(service)) or cannot


def problems_of_service(server: Server, service: Service) -> Iterator[Problem]:
    """Yield that a service can run nothing."""
    links = server.links_of(service)
    if all(runs_nothing(link, service.name) for link in links) and not server.plugins["clouds"].serves(service.name):
        troubles = {link.name: link.why_not(service.name) or ", ".join(told["what"] for told in link.problems) for link in links}
        remedy = "see the problems of its clients"
        if not links:
            remedy = f"start a client for it with a token that `joborch token add NAME --role client --services {service.name}` makes"
        elif all(link.drained for link in links):
            remedy = f"POST /clients/{links[0].name}/resume"
        yield Problem("service_stopped", no_client_text(service.name, troubles), remedy, service.name)


def problems_of(node: Node) -> Iterator[Problem]:
    """Yield everything that is out of order now, apart from the database; what stops a whole service comes first."""
    if isinstance(node, Server):
        for service in node.services.values():
            yield from problems_of_service(node, service)
    yield from problems_of_process(node)
    if isinstance(node, Client):
        yield from problems_of_client(node)
    if isinstance(node, Server):
        for link in node.links.values():
            yield from problems_of_link(link)
        for what, remedy in node.plugins["clouds"].problems():
            yield Problem("cloud", what, remedy)
        for what, remedy, since in node.plugins["webhooks"].problems():
            yield Problem("webhooks", what, remedy, since=since)


class Health:
    """Remembers since when each problem stands. It looks every 2 s, and whenever somebody asks."""

    def __init__(self, node: Node) -> None:
        self.node, self.probe, self.lock = node, WriteProbe(node), threading.Lock()
        self.standing: dict[tuple[str, str, str], Problem] = {}
        self.seen = 1  # counts what a server must hear of: a problem that comes or goes, and a clock that was set
        self.off_s = node.clock.wall() - node.clock.monotonic()

    def start(self) -> None:
        """Add the loop that looks."""
        self.node.loops["health"] = Loop("health", self.tick, lambda: self.node.pool, LOOK_AGAIN_S)

    def committed(self, moves: Iterable[Any]) -> None:
        """Moves of jobs are no problem."""

    def tick(self) -> bool:
        """Look; write only if a write has failed, so that an idle process writes nothing."""
        if self.node.disk_failed or any(self.probe.problems()):
            self.probe.ask(0.0)
        self.look()
        return False

    def look(self) -> list[Problem]:
        """Return all problems with the times since when they stand, and log those that are new or over."""
        found = {problem.key: problem for problem in (*self.probe.problems(), *problems_of(self.node))}
        now, off_s = self.node.clock.wall(), self.node.clock.wall() - self.node.clock.monotonic()
        with self.lock:
            before, was_set = self.standing, abs(off_s - self.off_s) > 1
            for key, problem in found.items():
                begun = before[key].since if key in before else now
                found[key] = problem._replace(since=begun if problem.since is None else problem.since)
            self.standing, self.off_s = found, off_s
            new, over = found.keys() - before.keys(), before.keys() - found.keys()
            self.seen += bool(new or over or was_set)
        if new or over or was_set:
            self.say([found[key] for key in new], [before[key] for key in over])
            self.node.store.core.wake_all()  # a server that waits in /events hears of it
        return list(found.values())

    def say(self, new: Iterable[Problem], over: Iterable[Problem]) -> None:
        """Log what nobody else logs: clients, executors and the file of the program have lines of their own."""
        for problem in new:
            if problem.kind == "disk_full" and not problem.client:
                say_full(self.node, (problem.what, problem.remedy))
            elif problem.kind == "clock" or (problem.kind in ("database", "login", "disk") and not problem.client):
                log.warning("%s: %s", problem.what, problem.remedy)
        for problem in over:
            log.info("it is over: %s", problem.what)

    def report(self) -> list[Problem]:
        """Try the database, and return all problems."""
        self.probe.ask(SLOW_S + 0.1)
        return self.look()

    # -- of a client, for its server --

    def nothing_new(self, seen: int | None) -> list[Any] | None:
        """Return None while there is no news for a server that has `seen` this much, else an empty list, which ends its wait."""
        return None if seen is None or seen == self.seen else []

    def told(self) -> dict[str, Any]:
        """Return the problems as /events reports them, and the number that stands for this report."""
        with self.lock:
            standing, seen = list(self.standing.values())[:PROBLEMS_TOLD], self.seen
        names = ("kind", "what", "remedy", "service", "since")
        problems = [{name: getattr(each, name) for name in names} for each in standing]
        return {"problems": problems, "problems_seen": seen, "at": self.node.clock.wall()}


# == The route ==

EXAMPLE_PROBLEM = {
    "kind": "client_gone", "what": "client gpu1:9000 cannot be reached: connection refused", "since": "2026-11-28T09:30:00.000Z",
    "service": "docking", "client": "gpu1:9000", "remedy": "start it there with `joborch client`",
}  # fmt: skip
EXAMPLE_HEALTH = {
    "status": "degraded", "database": "ok", "problems": [EXAMPLE_PROBLEM], "version": __version__, "mode": "server", "uptime_s": 12.5,
    "restart_needed": None, "unremovable": None,
}  # fmt: skip
HEALTHY = Gives("`status` is ok, or degraded if there are problems; a caller without a token sees no more", JSON_TYPE, EXAMPLE_HEALTH)
UNHEALTHY = Gives(
    "the database cannot be read and written; with deep=1 also: a service can run nothing, or uploads are refused",
    JSON_TYPE,
    {"status": "error", "database": "error"},
)
DEEP = Parameter(
    "deep",
    "query",
    "string",
    "1: answer 503 also if a service can run nothing or uploads are refused",
    "1",
    choices=("0", "1"),
    default="0",
)


def counts_json(client: Client) -> dict[str, int]:
    """Return how many payloads run, are queued here, and wait in the queue of a batch system."""
    handed, queued = (client.store.number(COUNT_IN, status=status.value) for status in (Status.RUNNING, Status.PREPARED))
    waiting = 0
    if client.executor.is_batch:
        waiting = sum(job.started_at is None for job in client.store.jobs(PAYLOADS_IN, status=Status.RUNNING.value, limit=1_000_000))
    return {"running": handed - waiting, "queued": queued, "waiting": waiting}


def details(node: Node, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return what only authenticated callers see: strangers get no paths, counts and versions."""
    said: dict[str, Any] = {"problems": [problem.as_json() for problem in problems], "version": __version__, "mode": node.config.mode}
    own = {problem.kind: problem for problem in problems if not problem.client}
    program, backend = own.get("program"), own.get("backend")
    said.update(uptime_s=round(node.clock.monotonic() - node.started, 1), restart_needed=program and f"{program.what}: {program.remedy}")
    said.update(unremovable=unremovable_json(node))
    if isinstance(node, Client):
        trouble = node.plugins["drain"].reason or (backend.what if backend else "")
        said.update(executor=node.config.executor, **room_json(node), **counts_json(node), problem=trouble or None)
        said["problem_since"] = rfc3339(problem_since(node, trouble))
    return said


@route("GET", "/health", "server client", who="anyone", takes=(DEEP,), gives={200: HEALTHY, 503: UNHEALTHY})
def health(node: Node, request: Request, deep: str) -> Answer:
    """Tell whether all is well and, to authenticated callers, what is out of order, since when, and what to do."""
    found: Health = node.plugins["health"]
    problems, error = found.report(), found.probe.error
    said: dict[str, Any] = {"status": "degraded" if problems else "ok", "database": "ok"}
    known = sees_site(request.caller)
    if error:
        log.error("health: %s", error)
        said.update(status="error", database="error", **({"message": error} if known else {}))
    try:
        said.update(details(node, problems) if known else {})
    except StorageError as failure:
        said.update(status="error", database="error", message=str(failure))
    blocked = deep == "1" and any(problem.kind in BLOCKING and not problem.client for problem in problems)
    if said["status"] == "error" or blocked:
        return Answer(said, 503, {"Retry-After": "5"})
    return Answer(said)
