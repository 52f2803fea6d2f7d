"""Lists of jobs and of their moves, `GET /jobs` and `GET /changes`, with filters, cursors, waits and events; and what a user has left.

A page examines a limited number of rows, whatever the filters: past that it is short, and has a cursor. `/changes` reads the
history, which the transaction of each move writes, so it has every move exactly once and in order.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple
from urllib.parse import urlencode

from joborch import (
    BAD,
    BIGGEST,
    COME_AGAIN_S,
    COMMENT_EVERY_S,
    ENDS_AFTER,
    EVENT_TYPE,
    EXAMPLE_JOB,
    JSON_TYPE,
    LAST_SEQ,
    LIVE_HEADERS,
    OVER,
    QUEUED_OF_USER,
    SMALLEST,
    STATUSES,
    USAGE_OF_USER,
    WAIT,
    Answer,
    Cause,
    CutOff,
    Filter,
    Forgotten,
    Gives,
    HttpError,
    Job,
    LiveBody,
    Parameter,
    Request,
    Server,
    check_user,
    job_summary,
    named_service,
    narrowed,
    one_line,
    read_seconds,
    read_statuses,
    read_weight,
    rfc3339,
    route,
    sees_service,
    waiting_texts,
)

CSV_TYPE = "text/csv; charset=utf-8; header=present"
IDS_MOST = 1000
CURSOR = re.compile(r"(?:([0-9]{1,12}(?:\.[0-9]{1,9})?)_)?([1-9][0-9]{0,18})")  # an id, or the time of an end and an id


# == 1. Filters ==  What both lists take. Each value is read in one place, and an error says what would be right.


def read_ids(text: str) -> list[int]:
    """Return the ids of jobs, separated by commas."""
    ids = text.split(",")
    if len(ids) > IDS_MOST or not all(re.fullmatch(r"[0-9]{1,18}", each) for each in ids):
        raise ValueError(f"give at most {IDS_MOST} ids of jobs separated by commas, as in ids=41,42")
    return [int(each) for each in ids]


def read_moment(text: str) -> datetime | timedelta:
    """Return a time, or an age: `2026-11-28T14:30:00+01:00`, `2026-11-28` (its begin in UTC), or `2d`."""
    remedy = "give a time, a date or an age, as in 2026-11-28T14:30:00Z, 2026-11-28 or 2d"
    try:
        if re.fullmatch(r"[0-9]{1,9}[smhd]", text):
            return timedelta(seconds=read_seconds(text))
        # A plus that was not encoded has become a blank.
        said = re.fullmatch(
            r"(\d{4})-(\d\d)-(\d\d)(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?(?:[Zz]|([+ -])(\d\d):(\d\d)))?", text, re.ASCII
        )
        if not said:
            raise ValueError(remedy)
        year, month, day, hour, minute, second = (int(part or 0) for part in said.groups()[:6])
        micro_s, offset = int((said[7] or "0").ljust(6, "0")[:6]), timedelta(hours=int(said[9] or 0), minutes=int(said[10] or 0))
        moment = datetime(year, month, day, hour, minute, second, micro_s, timezone.utc)
        return moment + offset if said[8] == "-" else moment - offset
    except (ValueError, OverflowError):
        raise ValueError(remedy) from None


def wall_time(server: Server, moment: datetime | timedelta | None) -> float | None:
    """Return the wall time of what `read_moment` has read."""
    if isinstance(moment, timedelta):
        return server.clock.wall() - moment.total_seconds()
    return None if moment is None else moment.timestamp()


MOMENT = r"^([0-9]{1,9}[smhd]|[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])(T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]Z)?)$"
FILTERS = (
    Parameter("user_id", "query", "integer", "only jobs of this user", 1, least=SMALLEST, most=BIGGEST),
    Parameter("service", "query", "string", "only jobs of this service", "example"),
    Parameter(
        "status",
        "query",
        "string",
        "only jobs in one of these states, or cleaned jobs that ended in one",
        "Failed,Killed",
        pattern=STATUSES,
        default=frozenset(),
        read=read_statuses("status"),
    ),
    Parameter("cause", "query", "string", "only jobs that ended for this cause", "limit", choices=tuple(cause.value for cause in Cause)),
    Parameter("name", "query", "string", "only jobs whose name begins with this", "dock", longest=255),
    Parameter(
        "ids",
        "query",
        "string",
        f"only these jobs, at most {IDS_MOST:,}",
        "41,42",
        pattern="^[0-9]{1,18}(,[0-9]{1,18}){0,999}$",
        read=read_ids,
    ),
    Parameter("since", "query", "string", "not before this time, date (UTC) or age", "2d", pattern=MOMENT, read=read_moment),
    Parameter("until", "query", "string", "before this time, date (UTC) or age", "2026-11-28", pattern=MOMENT, read=read_moment),
)


def read_filter(server: Server, request: Request, given: dict[str, Any]) -> Filter:
    """Return the filter that the values of FILTERS make, without what the caller may not see.

    Raises HttpError 400 for an unknown service, 404 for another user.
    """
    service = None if given["service"] is None else named_service(server, given["service"]).name
    since, until = wall_time(server, given["since"]), wall_time(server, given["until"])
    of = Filter(given["user_id"], service, tuple(sorted(given["status"])), given["cause"], given["name"] or None, since, until)
    return narrowed(request.caller, of)


NO_USER = Gives(
    "the token is for another user", JSON_TYPE, {"message": "the token ward-7 is for user 7, and knows no user 8", "field": "user_id"}
)


# == 2. Jobs ==  A page of jobs, as JSON or CSV; it may wait for ends.


def read_cursor(text: str) -> str:
    """Accept a cursor: what `next` of a page was."""
    match = CURSOR.fullmatch(text)
    if not match or int(match[2]) > BIGGEST:
        raise ValueError("give the `next` of the page before, or the id of a job")
    return text


LIST_PARAMETERS = (
    *FILTERS,
    Parameter(
        "by",
        "query",
        "string",
        "which time counts, for since, until and the order",
        "created",
        choices=("created", "ended"),
        default="created",
    ),
    Parameter("limit", "query", "integer", "the most jobs to return", 100, least=1, most=1000, default=100),
    Parameter("before", "query", "string", "the cursor: `next` of the page before", "42", pattern="^[1-9][0-9]{0,17}$", read=read_cursor),
    Parameter("format", "query", "string", "json or csv", "json", choices=("json", "csv"), default="json"),
    WAIT._replace(help="with `ids`: wait for ends, for at most this many seconds; values above 45 count as 45"),
    Parameter(
        "wait_for",
        "query",
        "string",
        "with `wait`: until one more, or all of `ids` have ended",
        "all",
        choices=("any", "all"),
        default="any",
    ),
    Parameter(
        "ended",
        "query",
        "integer",
        "with `wait_for=any`: how many of `ids` you know to have ended (default: as many as have)",
        1,
        least=0,
        most=IDS_MOST,
    ),
)
PAGE = Gives(
    "newest first; `next` is the cursor of the next page, which exists also if this page is short: a page examines 50,000 rows at most. "
    "With format=csv the header Link names the next page",
    JSON_TYPE,
    {"jobs": [EXAMPLE_JOB], "next": None},
    ("text/csv",),
)


@route(
    "GET",
    "/jobs",
    "server",
    who="user portal reader operator",
    takes=LIST_PARAMETERS,
    gives={200: PAGE, 400: BAD, 404: NO_USER},
    quick=True,
)
def list_jobs(server: Server, request: Request, limit: int, before: str | None, **given: Any) -> Answer:
    """List jobs, newest first, a page at a time; with `ids` and `wait`, when some have ended."""
    wait: float = given["wait"]
    of, ids, headers = read_filter(server, request, given), given["ids"], dict[str, str]()
    if wait and ids is None:
        raise HttpError(400, "wait needs ids: name the jobs to wait for, as in ids=41,42&wait=45", "wait")
    if wait:
        with server.waiters.place() as parked:
            if parked:
                wait_for_ends(server, request, frozenset(ids), wait, given["wait_for"], given["ended"])
            else:
                headers["Retry-After"] = str(COME_AGAIN_S)
    jobs, following = page_of(server, of, ids, given["by"], limit, before)
    texts = waiting_texts(server, jobs)
    rows = [{**job_summary(server, job), "waiting_for": text, "message": text or job.reason} for job, text in zip(jobs, texts)]
    if given["format"] == "json":
        return Answer({"jobs": rows, "next": following}, 200, headers)
    if following is not None:
        query = {**{name: value for name, value in request.query.items() if name != "wait"}, "before": following}
        headers["Link"] = f'</jobs?{urlencode(query)}>; rel="next"'
    return Answer(as_csv(rows).encode(), 200, {**headers, "Content-Type": CSV_TYPE})


def page_of(
    server: Server, of: Filter, ids: Sequence[int] | None, by: str, limit: int, before: str | None
) -> tuple[list[Job], int | str | None]:
    """Return a page of jobs and the cursor of the next page. Raises HttpError 400 for a cursor of a list in the other order."""
    by_end, cursor = by == "ended", CURSOR.fullmatch(before or "")
    if cursor and by_end != bool(cursor[1]):
        raise HttpError(400, f"before is {one_line(before or '', 40)!r}, which is of a list by another time: begin without it", "before")
    last_id = int(cursor[2]) if cursor else BIGGEST
    if not by_end and ids is None:
        return server.store.page(of, limit, last_id)
    last_end = float(cursor[1]) if cursor and cursor[1] else float("inf")
    if ids is None:
        jobs, following = server.store.page_by_end(of, limit, (last_end, last_id))
        return jobs, following and f"{following[0]!r}_{following[1]}"

    def place(job: Job) -> tuple[float, int]:
        return (job.ended_at or 0.0 if by_end else float("inf"), job.id)

    found = [job for job in server.store.pick(ids, of, by_end) if place(job) < (last_end, last_id)]
    jobs = sorted(found, key=place, reverse=True)[:limit]
    if len(found) <= limit:
        return jobs, None
    return jobs, f"{jobs[-1].ended_at!r}_{jobs[-1].id}" if by_end else jobs[-1].id


def wait_for_ends(server: Server, request: Request, ids: frozenset[int], wait_s: float, wait_for: str, ended: int | None) -> None:
    """Wait until one more of these jobs has ended, or all have. One that does not exist, or is hidden from the caller, counts as ended."""
    seen = server.store.number(LAST_SEQ)
    left = {job.id for job in server.store.pick(ids, narrowed(request.caller, Filter()), by_end=False) if job.status not in OVER}
    enough = 0 if wait_for == "all" else len(left) - 1 if ended is None else len(ids) - ended - 1

    def look() -> bool | None:
        nonlocal seen  # two threads may look at once: both then read the same moves
        for row in server.store.read(ENDS_AFTER, after=seen):
            left.discard(row["job_id"])
            seen = row["seq"]
        return len(left) <= max(0, enough) or None

    server.wait_until(look, wait_s, request.left, frozenset(left))


COLUMNS = (
    "id",
    "user_id",
    "service",
    "name",
    "status",
    "ended_as",
    "reason",
    "cause",
    "exit_code",
    "signal",
    "priority",
    "cpus",
    "memory",
    "gpus",
    "timeout",
    "retries",
    "attempt",
    "client",
    "created_at",
    "started_at",
    "ended_at",
    "waiting_for",
    "result_size",
    "result_sha256",
)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return jobs as CSV (RFC 4180). A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        result = row["result"] or {}
        values = {**row, "result_size": result.get("size"), "result_sha256": result.get("sha256")}
        is_formula = {name: isinstance(value, str) and value[:1] in "=+-@\t\r" and value != "" for name, value in values.items()}
        writer.writerow({name: f"'{value}" if is_formula[name] else value for name, value in values.items()})
    return text.getvalue()


# == 3. Changes ==  Every move of every job, for portals that keep a copy.

AFTER = Parameter(
    "after",
    "query",
    "integer",
    "the `next` of the last answer; 0: from the first move; without it, only what happens from now on",
    1_795_000_000_000_000,
    least=0,
    most=BIGGEST,
)
CHANGE_PARAMETERS = (
    AFTER,
    WAIT._replace(help="wait for a move, for at most this many seconds; values above 45 count as 45"),
    Parameter("limit", "query", "integer", "the most moves to return", 1000, least=1, most=1000, default=1000),
    *(each._replace(help="only moves to one of these states") if each.name == "status" else each for each in FILTERS),
)
EXAMPLE_CHANGE = {
    "seq": 1_795_000_000_000_123, "at": "2026-11-24T09:00:00.000Z", "id": 42, "user_id": 1, "service": "example",
    "from": "Running", "to": "Completed", "reason": "exit status 0", "cause": None,
}  # fmt: skip
CHANGES = Gives(
    "the moves after `after`, in order, each exactly once; `next` is the `after` of the next request. "
    "With `Accept: text/event-stream` as events with `seq` as id, and a comment every 15 s",
    JSON_TYPE,
    {"changes": [EXAMPLE_CHANGE], "next": EXAMPLE_CHANGE["seq"]},
    (EVENT_TYPE,),
)
GONE = Gives(
    "moves after `after` are no longer kept", JSON_TYPE, {"message": "the moves up to 1795000000000123 are no longer kept: begin again"}
)
TOO_MANY = Gives(
    "too many callers listen", JSON_TYPE, {"message": "16 callers listen already: try again, or ask without text/event-stream"}
)


class Reader(NamedTuple):
    """What one caller wants to see of the moves."""

    server: Server
    request: Request
    of: Filter
    ids: list[int] | None
    limit: int

    def read(self, after: int) -> tuple[list[dict[str, Any]], int]:
        """Return the moves after `after` in JSON, and the seq from which to continue. Raises HttpError 410."""
        try:
            rows, following = self.server.store.changes(self.of, self.limit, after, self.ids)
        except Forgotten as error:
            again = "ask /changes without `after` for a new start, then list the jobs with GET /jobs, then continue"
            raise HttpError(410, f"{error}: {again}", "after") from error
        return [as_change(row) for row in rows], following

    def wait(self, after: int, wait_s: float) -> tuple[list[dict[str, Any]], int]:
        """Like `read`, but wait for moves, for at most `wait_s` seconds."""
        server, clock = self.server, self.server.clock
        deadline = clock.monotonic() + wait_s
        while True:
            found, after = self.read(after)
            left_s = deadline - clock.monotonic()
            if found or left_s <= 0 or self.request.left() or server.stopping.is_set():
                return found, after
            server.wait_until(has_moved(server, after), left_s, self.request.left)


def has_moved(server: Server, after: int) -> Callable[[], bool | None]:
    """Return a function that returns True once there are moves after `after`, and None before."""
    return lambda: server.store.number(LAST_SEQ) > after or None


def as_change(row: Any) -> dict[str, Any]:
    """Return a move in JSON."""
    said = {**dict(row), "at": rfc3339(row["at"]), "from": row["source"], "to": row["target"]}
    return {name: said[name] for name in EXAMPLE_CHANGE}


@route(
    "GET",
    "/changes",
    "server",
    who="user portal reader operator",
    takes=CHANGE_PARAMETERS,
    gives={200: CHANGES, 400: BAD, 404: NO_USER, 410: GONE, 503: TOO_MANY},
    quick=True,
)
def show_changes(server: Server, request: Request, after: int | None, wait: float, limit: int, **given: Any) -> Answer:
    """Return every move of every job in order, from where the caller was; wait for the next one."""
    reader = Reader(server, request, read_filter(server, request, given), given["ids"], limit)
    if EVENT_TYPE in request.header("Accept") and request.method == "GET":
        return listen(reader, after)
    after = server.store.number(LAST_SEQ) if after is None else after
    headers = {}
    with server.waiters.place() if wait else contextlib.nullcontext(True) as parked:
        found, following = reader.wait(after, wait if parked else 0.0)
        if not parked:
            headers["Retry-After"] = str(COME_AGAIN_S)
    return Answer({"changes": found, "next": following}, 200, headers)


def listen(reader: Reader, after: int | None) -> Answer:
    """Answer with moves as events until the caller leaves. Raises HttpError 503 if too many listen, 410 as `Reader.read` does."""
    after = reader.request.resumed_at(after)
    place = contextlib.ExitStack()
    if not place.enter_context(reader.server.listeners.place()):
        raise HttpError(503, "too many callers listen: try again, or ask without text/event-stream", Retry_After=str(COME_AGAIN_S))
    try:
        after = reader.server.store.number(LAST_SEQ) if after is None else after
        reader.read(after)
    except BaseException:
        place.close()
        raise
    return Answer(LiveBody(change_events(reader, after), place), 200, {"Content-Type": EVENT_TYPE, **LIVE_HEADERS})


def change_events(reader: Reader, after: int) -> Iterator[bytes]:
    """Yield moves as server-sent events. A comment comes at once, since it sends the headers, and in pauses.

    Comments carry the id, too: a listener whose filters match little then need not read everything again.
    Raises CutOff if the caller has left or the server stops.
    """
    yield f": moves of jobs\nid: {after}\n\n".encode()
    while not reader.request.left() and not reader.server.stopping.is_set():
        try:
            found, after = reader.wait(after, COMMENT_EVERY_S)
        except HttpError:
            return  # forgotten meanwhile: the next request gets the error
        yield "".join(f"id: {each['seq']}\ndata: {json.dumps(each)}\n\n" for each in found).encode() or f": quiet\nid: {after}\n\n".encode()
    raise CutOff


# == 4. Users ==  What a user has, may have, and has left.

EXAMPLE_USER = {
    "user_id": 7, "weight": 2.0, "queued": 3, "max_queued": 10_000, "queued_left": 9_997,
    "services": [{
        "name": "example", "used_slot_s": 42.5, "runs": 17, "mean_run_s": 2.5, "running": 1, "turns_before": 0,
        "runs_per_user": 5, "runs_left": 4,
    }],
}  # fmt: skip
ONE_USER = Gives("a user's weight, jobs, use and limits, and what is left of them", JSON_TYPE, EXAMPLE_USER)
USER_ID = Parameter("user_id", "path", "integer", "the user's number", 7, required=True, least=SMALLEST, most=BIGGEST)
WEIGHT = Parameter(
    "weight",
    "query",
    "number",
    "how large this user's share is; the default is 1",
    2,
    required=True,
    least=0.001,
    most=1_000_000,
    missing="give it in the URL, as in PUT /users/7?weight=2",
    read=read_weight,
)


def user_answer(server: Server, request: Request, user_id: int) -> Answer:
    """Return what decides when a user's jobs run."""
    check_user(request.caller, user_id)
    store = server.store
    names = {*server.services, *(row["service"] for row in store.read(USAGE_OF_USER, user_id=user_id))}
    services = []
    for name in sorted(each for each in names if sees_service(request.caller, each)):
        share, limits = store.share(name, user_id), server.services.get(name)
        services.append({
            "name": name, "used_slot_s": round(store.used_slot_s(name, user_id), 3), "runs": share.usage.runs,
            "mean_run_s": round(share.usage.mean_s, 3) if share.usage.runs else None, "running": len(share.runs),
            "turns_before": None if share.turn is None else store.turns_before(name, share.turn),
            "runs_per_user": limits and limits.runs_per_user, "runs_left": limits and max(0, limits.runs_per_user - len(share.runs)),
        })  # fmt: skip
    most = server.config.max_queued_per_user
    queued = store.number(QUEUED_OF_USER, user_id=user_id, limit=most)
    said = {"user_id": user_id, "weight": store.weight(user_id), "queued": queued, "max_queued": most, "queued_left": most - queued}
    return Answer({**said, "services": services})


@route(
    "GET",
    "/users/<user_id>",
    "server",
    who="user portal reader operator",
    takes=(USER_ID,),
    gives={200: ONE_USER, 400: BAD, 404: NO_USER},
    quick=True,
)
def show_user(server: Server, request: Request, user_id: int) -> Answer:
    """Show a user's weight, queued jobs, and for each service: use as it counts now, limits, and what is left of them."""
    return user_answer(server, request, user_id)


@route("PUT", "/users/<user_id>", "server", who="operator", takes=(USER_ID, WEIGHT), gives={200: ONE_USER, 400: BAD})
def set_user(server: Server, request: Request, user_id: int, weight: float) -> Answer:
    """Set a user's weight: twice the weight means twice the share. It overrides JOBORCH_WEIGHTS."""
    server.store.set_weight(user_id, weight)
    return user_answer(server, request, user_id)
