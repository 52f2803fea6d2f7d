"""The benchmark `accounts` of `tests/bench.py`: exports of very many jobs, and their deletion.

Meanwhile small uploads and /health are timed: nothing of this may make others wait.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import sqlite3
import statistics
import time
from collections.abc import Iterator
from typing import Callable

from bench_base import HOST, NOOP, Caller, Measure, Place, Script, Swarm, end, peak_rss_mb, percentile, request, upload_request, wait_until
from bench_load import helper
from bench_queue import copy_rows, one_job_done
from bench_site import Site, running_site

USERS = 1000
BULKY = 5  # the user with a tenth of all jobs
IDLE_S = 10
LEAST_S = 2  # of a probe
PAUSE_S = 0.02  # between two requests of a caller
LIMIT_S = 1800
LOST = 10**9  # ids of users of the small uploads


def end_all(site: Site, count: int) -> None:
    """Let the only job of a server that is stopped be there so many times, with names and reasons; a tenth is of one user, with files."""
    data = site.folder / "server"
    (result,) = (data / "results").iterdir()
    ended = {
        "id": "n", "uuid": "printf('%08x-0000-4000-8000-000000000000', n)", "user_id": f"iif(n % 10 = 0, {BULKY}, n % {USERS} + 10)",
        "name": "'a name of job ' || n", "client": "NULL", "created_at": "t.created_at + n", "started_at": "t.started_at + n",
        "ended_at": "t.ended_at + n", "status": "iif(n % 3 = 0, 'Failed', 'Completed')",
        "reason": "'the output of job ' || n || ' says why'",
    }  # fmt: skip
    with contextlib.closing(sqlite3.connect(data / "joborch.db")) as db, db:
        copy_rows(db, "jobs", "t.id = 1", count, ended)
        moves = {"job_id": "n", "seq": "10 * n + t.number", "reason": "t.reason || ' ' || n"}
        copy_rows(db, "history", "t.job_id = 1", count, moves)
        copy_rows(db, "attempts", "t.job_id = 1", count, {"job_id": "n", "client": "NULL", "reason": "'job ' || n"})
    content = result.read_bytes()
    for number in range(10, count + 2, 10):
        result.with_name(f"{number:08x}-0000-4000-8000-000000000000.1.zip").write_bytes(content)


class Probe:
    """How long small uploads and /health took, in ms, until `go_on` says no."""

    def __init__(self, port: int, go_on: Callable[[], bool]) -> None:
        self.upload, self.health, self.go_on = list[float](), list[float](), go_on
        users = itertools.count(LOST)
        Swarm(port).run(
            [
                self.caller(self.health, itertools.repeat(request("GET", "/health"))),
                self.caller(self.upload, (upload_request(NOOP, user=user) for user in users)),
            ]
        )

    def caller(self, taken: list[float], wanted: Iterator[bytes]) -> Script:
        """Ask for one after another."""
        while self.go_on():
            begin = time.perf_counter()
            answer = yield next(wanted)
            taken.append((time.perf_counter() - begin) * 1000)
            answer.json()
            yield PAUSE_S


def read_export(site: Site, form: str) -> float:
    """Read an export as it comes; return the seconds."""
    begin, connection = time.perf_counter(), http.client.HTTPConnection(HOST, site.port, timeout=LIMIT_S)
    connection.request("GET", f"/export?format={form}")
    answer = connection.getresponse()
    while answer.read(1 << 16):
        pass
    return time.perf_counter() - begin


def delete_all(site: Site, path: str) -> float:
    """Delete a job, or all jobs of a user; return the seconds until the server says that all is done."""
    begin, status = time.perf_counter(), 0
    with Caller(site.port) as caller:
        while status != 200:
            answer = caller.ask(request("DELETE", path))
            answer.json()
            status = answer.status
            time.sleep(1 if status != 200 else 0)
    return time.perf_counter() - begin


def left(site: Site) -> int:
    """How many jobs were deleted, and have texts in unused parts of the database."""
    with contextlib.closing(sqlite3.connect(f"file:{site.folder}/server/joborch.db?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM remnants").fetchone()[0])


def overwritten(site: Site) -> float:
    """Wait until no text is left in unused parts of the database; return the seconds."""
    begin = time.perf_counter()
    wait_until(lambda: left(site) == 0, LIMIT_S, "the texts are overwritten")
    return time.perf_counter() - begin


WORKS: dict[str, Callable[[Site], float]] = {
    "export as csv": lambda site: read_export(site, "csv"),
    "export as swf": lambda site: read_export(site, "swf"),
    "export as summary": lambda site: read_export(site, "summary"),
    "DELETE /jobs/ID": lambda site: delete_all(site, "/jobs/100"),
    "texts overwritten": overwritten,
    "DELETE /users/ID": lambda site: delete_all(site, f"/users/{BULKY}"),
}


def accounts(place: Place, size: int) -> Iterator[Measure]:
    """Exports in all formats, deletion of a job and of a user with a tenth of all jobs, and what others wait meanwhile."""
    with running_site(place) as site:
        one_job_done(site, NOOP["run.sh"])
        end(site.processes["client"])
        end_all(site, size)
        site.start("server")
        end(site.processes["server"])
        site.start("server")
        until = time.monotonic() + IDLE_S
        idle = Probe(site.port, lambda: time.monotonic() < until)
        yield Measure("database", (site.folder / "server/joborch.db").stat().st_size / 1e6, "MB")
        for name, work in WORKS.items():
            with helper(lambda _, work=work: work(site)) as one:
                least = time.monotonic() + LEAST_S
                busy = Probe(site.port, lambda one=one, least=least: not one.is_done() or time.monotonic() < least)
                seconds = one.result()
            yield Measure(name, seconds, "s")
            for what, now, alone in (("upload", busy.upload, idle.upload), ("/health", busy.health, idle.health)):
                yield Measure(f"{name}, {what}, p99", percentile(now, 99), "ms", percentile(alone, 99))
                yield Measure(f"{name}, {what}, longest", max(now), "ms", max(alone))
            yield Measure(f"{name}, peak RSS, server", peak_rss_mb(site.processes["server"].pid), "MB")
        yield Measure("upload, median", statistics.median(idle.upload), "ms")
