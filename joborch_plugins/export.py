"""What jobs used and how long they waited, for accounting and for simulations: `GET /export` as CSV, as SWF, or summed up by month.

1. Rows
2. Formats
3. Route

An export is made while it is sent, a page of rows at a time, so its size does not matter.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import io
import math
import time
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from joborch import (
    BAD,
    COME_AGAIN_S,
    JSON_TYPE,
    KIB,
    LIVE_HEADERS,
    TEXT_TYPE,
    Answer,
    CutOff,
    Filter,
    Gives,
    HttpError,
    LiveBody,
    Parameter,
    Request,
    Server,
    __version__,
    ids_in,
    rfc3339,
    route,
    statements,
)
from joborch_plugins.lists import CSV_TYPE, FILTERS, NO_USER, read_filter

PAGE_ROWS = 1000  # examined in one query

# == 1. Rows ==  Jobs in the order of their uploads.


def rows_of(server: Server, request: Request, of: Filter) -> Iterator[dict[str, Any]]:
    """Yield jobs that match a filter, in the order of their uploads. Raises CutOff if the caller has left or the server stops.

    After each page it rests for as long as that took: a thread that never waits would delay all others (Python runs one at a time).
    """
    values = {**of.values(), **of.span()}
    at, after = values["since"], 0
    while True:
        if server.stopping.is_set() or request.left():
            raise CutOff
        begun = time.thread_time()
        bound = server.store.read(statements.EXPORT_BOUND, **values, at=at, after=after, skip=PAGE_ROWS - 1)
        to_at, to_id = (bound[0]["created_at"], bound[0]["id"]) if bound else (math.inf, 0)
        for row in server.store.read(statements.EXPORT_PAGE, **values, at=at, after=after, to_at=to_at, to_id=to_id):
            yield {**dict(row), "ended_as": row["ended_as"] or row["status"]}
        if not bound:
            return
        at, after = to_at, to_id
        server.stopping.wait(max(0.0, time.thread_time() - begun))


def wait_and_run_s(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return how long a job waited and ran, in seconds; None for what has not ended. One that never started waited until its end."""
    created, started, ended = row["created_at"], row["started_at"], row["ended_at"]
    if started is None:
        return (None, None) if ended is None else (max(0.0, ended - created), 0.0)
    return max(0.0, started - created), None if ended is None else max(0.0, ended - started)


# == 2. Formats ==  CSV for people and accounting, SWF for simulations.

COLUMNS = (
    *("id", "user_id", "service", "name", "status", "ended_as", "cause", "exit_code", "signal", "priority", "cpus", "memory", "timeout"),
    *("created_at", "started_at", "ended_at", "wait_s", "run_s", "cpu_time", "peak_memory", "attempt", "client", "inputs_size"),
    *("result_size", "retry_of"),
)
TIMES = ("created_at", "started_at", "ended_at")
ENDED = {"Completed": 1, "Failed": 0, "Invalid": 0, "Killed": 5}  # field 11 of SWF


def harmless(text: Any) -> Any:
    """Return a value that no spreadsheet takes for a formula."""
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def csv_lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a CSV file (RFC 4180) with a header."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(COLUMNS)
    for row in rows:
        wait_s, run_s = wait_and_run_s(row)
        said = {**row, "wait_s": wait_s and round(wait_s, 3), "run_s": run_s and round(run_s, 3)}
        said.update({name: rfc3339(row[name]) for name in TIMES})
        writer.writerow([harmless(said[name]) for name in COLUMNS])
        if buffer.tell() > 64 * KIB:
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()


class SwfWriter:
    """Writes jobs that have ended in the Standard Workload Format, version 2.2 (Feitelson's Parallel Workloads Archive)."""

    def __init__(self, server: Server, of: Filter) -> None:
        self.server = server
        self.facts = dict(server.store.read(statements.EXPORT_FACTS, **{**of.values(), **of.span()})[0])
        self.begin = math.floor(self.facts["first"] or server.clock.wall())
        self.queues = {row["service"]: number for number, row in enumerate(server.store.read(statements.EXPORT_SERVICES), 1)}
        self.users: dict[int, int] = {}  # SWF numbers users from 1 in the order of their first jobs
        self.ids = array("q")  # of the jobs so far: field 17 names one by its number here

    def header(self) -> Iterator[str]:
        """Yield the header comments."""
        facts, ended = self.facts, math.ceil(self.facts["last"] or self.begin)
        slots = sum(link.slots for link in self.server.links.values())
        yield "; Version: 2.2\n"
        yield "; Computer: joborch\n"
        yield f"; Conversion: written by joborch {__version__}\n"
        yield f"; MaxJobs: {facts['jobs']}\n; MaxRecords: {facts['jobs']}\n"
        yield "; Preemption: No\n"
        yield f"; UnixStartTime: {self.begin}\n; TimeZone: 0\n; TimeZoneString: UTC\n"
        yield f"; StartTime: {time.strftime('%a %b %d %H:%M:%S UTC %Y', time.gmtime(self.begin))}\n"
        yield f"; EndTime: {time.strftime('%a %b %d %H:%M:%S UTC %Y', time.gmtime(ended))}\n"
        if slots:
            yield f"; MaxProcs: {slots}\n"
        yield f"; MaxQueues: {len(self.queues)}\n; Queues: one for each service\n"
        for service, number in self.queues.items():
            yield f"; Queue: {number} {service}\n"
        yield "; Note: a job that never started has waited until its end, and ran for 0 s on -1 processors\n"

    def line(self, row: dict[str, Any]) -> str:
        """Return the 18 fields of a job that has ended; -1 stands for what is not known."""
        wait_s, run_s = wait_and_run_s(row)
        cpus, started = row["cpus"], row["started_at"] is not None
        memory = row["peak_memory"]
        asked_kib = None if row["memory"] is None else row["memory"] * 1024 // cpus
        user = self.users.setdefault(row["user_id"], len(self.users) + 1)
        number = len(self.ids) + 1
        before = [each for each in map(self.number_of, ids_in(row["after_ids"])) if each > 0]
        self.ids.append(row["id"])
        return " ".join(
            str(-1 if value is None else value)
            for value in (
                *(number, max(0, int(row["created_at"] - self.begin)), round(wait_s or 0), round(run_s or 0), cpus if started else -1),
                *(None if row["cpu_time"] is None else round(row["cpu_time"] / cpus, 2), memory and memory // 1024 // cpus, cpus),
                *(None if row["timeout"] is None else math.ceil(row["timeout"]), asked_kib, ENDED[row["ended_as"]], user),
                *(-1, -1, self.queues.get(row["service"], -1), -1, max(before, default=-1), -1),
            )
        )

    def number_of(self, job_id: int) -> int:
        """Return the number of a job in this file, or -1."""
        place = bisect.bisect_left(self.ids, job_id)
        return place + 1 if place < len(self.ids) and self.ids[place] == job_id else -1

    def lines(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        """Yield the header and a line for each job that has ended, in parts."""
        yield "".join(self.header())
        part: list[str] = []
        for row in rows:
            if row["ended_as"] in ENDED:
                part.append(self.line(row))
            if len(part) == 1000:
                yield "\n".join(part) + "\n"
                part = []
        if part:
            yield "\n".join(part) + "\n"


def summary(server: Server, of: Filter) -> list[dict[str, Any]]:
    """Return jobs, use and waits by service and month (UTC) of the upload."""
    found = []
    for row in server.store.read(statements.EXPORT_SUMMARY, **{**of.values(), **of.span()}):
        said = dict(row)
        said.update({name: None if said[name] is None else round(said[name], 1) for name in said if name.endswith("_s")})
        found.append(said)
    return found


# == 3. Route ==

FORMAT = Parameter(
    "format",
    "query",
    "string",
    "csv: a line for each job; swf: jobs that have ended, in the Standard Workload Format 2.2; summary: by service and month, as JSON",
    "csv",
    choices=("csv", "swf", "summary"),
    default="csv",
)
TAKES = (FORMAT, *(each for each in FILTERS if each.name in ("user_id", "service", "since", "until")))
EXAMPLE_SUMMARY = {
    "service": "example", "month": "2026-11", "jobs": 120, "completed": 112, "failed": 5, "killed": 3, "users": 9, "slot_s": 86400.0,
    "cpu_s": 51234.5, "mean_wait_s": 42.1, "longest_wait_s": 3600.0, "mean_run_s": 700.2,
}  # fmt: skip
EXPORTED = Gives(
    "jobs in the order of their uploads; with format=summary, jobs, use (slot-seconds and CPU seconds) and waits",
    JSON_TYPE,
    {"months": [EXAMPLE_SUMMARY]},
    ("text/csv", "text/plain"),
)
TOO_MANY = Gives("too many exports", JSON_TYPE, {"message": "too many callers wait here: try again"})


@route(
    "GET",
    "/export",
    "server",
    who="user portal reader operator",
    slow=True,
    takes=TAKES,
    gives={200: EXPORTED, 400: BAD, 404: NO_USER, 503: TOO_MANY},
)
def export(server: Server, request: Request, format: str, **given: Any) -> Answer:  # noqa: A002 - the name of the parameter
    """Export jobs with their use and waits, for accounting or simulation. `since` and `until` are times of upload."""
    of = read_filter(server, request, {**given, "status": frozenset(), "cause": None, "name": None})
    if format == "summary":
        return Answer({"months": summary(server, of)})
    place = contextlib.ExitStack()
    if not place.enter_context(server.waiters.place()):
        raise HttpError(503, "too many callers wait here: try again", Retry_After=str(COME_AGAIN_S))
    rows = rows_of(server, request, of)
    try:
        parts = csv_lines(rows) if format == "csv" else SwfWriter(server, of).lines(rows)
    except BaseException:
        place.close()
        raise
    headers = {"Content-Type": CSV_TYPE if format == "csv" else TEXT_TYPE, "Content-Disposition": f'attachment; filename="jobs.{format}"'}
    return Answer(LiveBody((part.encode() for part in parts), place), 200, {**headers, **LIVE_HEADERS})
