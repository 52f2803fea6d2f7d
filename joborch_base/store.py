"""The jobs table: who moves a job, and what changes with it.

1. Store
2. Limits
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import math
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Callable, cast
from urllib.parse import quote

from joborch_base import statements
from joborch_base.database import NO_LINE, NO_LOAD, NO_SHARE, Database, Shares
from joborch_base.logs import job_fields
from joborch_base.scheduling import (
    CANDIDATES_LOOKED_AT,
    RUN_TAKES,
    TURN_S,
    Line,
    Load,
    Pace,
    Run,
    Share,
    Sharing,
    Turn,
    Usage,
    Waiting,
    cap_idle_credit,
    charge_in_advance,
    counted_s,
    rank_of,
    run_of_job,
    use_now,
    used,
    with_open_runs,
    with_run,
)
from joborch_base.settings import Service
from joborch_base.states import (
    BUSY,
    ENDED,
    MOVABLE,
    MOVES,
    OVER,
    Cause,
    Filter,
    Job,
    Move,
    NewJob,
    Reason,
    Status,
    as_job,
    ids_in,
    with_caller,
)
from joborch_base.vocabulary import BIGGEST, Clock, IllegalMove, NoInputs, QueueFull, StoreFull, UnknownJob, log, one_line, size_text

# == 1. Store ==  A status changes in one statement; its history row, its user's account and rank change in the same transaction.

EXAMINED_MOST = 50_000  # rows that one page of a list examines
NAMED_MOST = 10_000  # jobs whose names begin alike; if there are more, the newest are found faster by id


class Forgotten(Exception):
    """Moves that a caller has not seen are no longer kept."""


def last_seq_of(path: str) -> int:
    """Return the seq of the last move in the database at `path`, or 0 if it cannot be read."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as db:
        return int(db.execute(statements.LAST_SEQ).fetchone()[0])
    return 0


RESTORE_ID_GAP = 1_000_000  # ids skipped after a restore: they may have been assigned since the backup
RESTORE_SEQ_GAP = 3600 * 10**6  # the same for `seq`: each reboot moves steady time ahead of wall time by up to a minute


class Store(Database):
    """The jobs of one process. Every status changes here, and with it whose turn it is.

    One class serves both modes: a payload of a client is a job that may have no user and no service.
    """

    def __init__(self, path: str, mode: str, clock: Clock | None = None, is_copy: bool = False) -> None:
        super().__init__(path, mode, clock, is_copy)
        self.noun = "job" if mode == "server" else "payload"
        self.limits: Mapping[str, Service] = {}
        self.sharing = Sharing()
        self.has_delayed = True  # whether an attempt may wait for the end of its back-off
        self.movers: list[Callable[[sqlite3.Connection, Move], object]] = []  # called in the transaction of each move
        self.last_seq = max(self.db.execute(statements.LAST_SEQ).fetchone()[0], *self.db.execute(statements.FEED_GET).fetchone())

    # -- reading --

    def jobs(self, sql: str, **values: Any) -> list[Job]:
        return [as_job(row) for row in self.read(sql, **values)]

    def job(self, sql: str, **values: Any) -> Job | None:
        rows = self.jobs(sql, **values)
        return rows[0] if rows else None

    def get(self, job_id: int) -> Job | None:
        return self.job(statements.JOB_GET, id=job_id)

    def page(self, of: Filter, limit: int, before: int) -> tuple[list[Job], int | None]:
        """Return at most `limit` jobs with ids below `before` that match a filter, newest first, and the next `before`, or None.

        A cleaned job also matches the status with which it ended. At most EXAMINED_MOST rows are examined, so a page may be short.
        """
        values, floor = of.values(), 0
        if of.since is not None:
            floor = self.number(statements.CREATED_FIRST, since=of.since) or BIGGEST
        if of.until is not None:
            before = min(before, self.number(statements.CREATED_LAST, until=of.until) + 1)
        sources, lowest = self.sources(of), floor
        for bound, _, status in sources if of.narrows() else ():
            if bound:
                rows = self.read(bound, **values, before=before, status=status, skip=EXAMINED_MOST // len(sources) - 1)
                floor = max(floor, rows[0]["id"] if rows else 0)
        found: dict[int, Job] = {}
        for _, page, status in sources:
            jobs = self.jobs(page, **values, before=before, floor=floor, status=status, limit=limit + 1)
            found.update((job.id, job) for job in jobs)
        newest = sorted(found.values(), key=lambda job: -job.id)
        if len(newest) > limit:
            return newest[:limit], newest[limit - 1].id
        return newest, floor if floor > lowest else None

    def sources(self, of: Filter) -> list[tuple[str, str, str | None]]:
        """Return which statements find the jobs of a filter: the bound ("" if it needs none), the page, and the status to look for."""
        if of.name and self.number(statements.JOBS_NAMED, name=of.name, limit=NAMED_MOST + 1) <= NAMED_MOST:
            return [("", statements.JOBS_PAGE_NAMED, None)]
        if of.user_id is not None:
            return [(statements.JOBS_BOUND_OF_USER, statements.JOBS_PAGE_OF_USER, None)]
        if of.statuses:
            in_status = [(statements.JOBS_BOUND_IN_STATUS, statements.JOBS_PAGE_IN_STATUS, status) for status in of.statuses]
            return [
                *in_status,
                *((statements.JOBS_BOUND_CLEANED, statements.JOBS_PAGE_CLEANED, status) for status in of.statuses if status in ENDED),
            ]
        if of.service is not None:
            return [(statements.JOBS_BOUND_OF_SERVICE, statements.JOBS_PAGE_OF_SERVICE, None)]
        return [(statements.JOBS_BOUND, statements.JOBS_PAGE, None)]

    def page_by_end(self, of: Filter, limit: int, before: tuple[float, int]) -> tuple[list[Job], tuple[float, int] | None]:
        """Return at most `limit` jobs that ended before a moment and id, the last to end first, and the next `before`: see `page`."""
        values = {**of.values(), **of.span(), "ended_before": before[0], "before": before[1]}
        is_narrow = of != Filter(since=of.since, until=of.until)
        rows = self.read(statements.JOBS_BOUND_BY_END, **values, skip=EXAMINED_MOST - 1) if is_narrow else []
        floor = (rows[0]["ended_at"], rows[0]["id"]) if rows else None
        ended_floor, floor_id = floor or (-math.inf, 0)
        jobs = self.jobs(statements.JOBS_PAGE_BY_END, **values, ended_floor=ended_floor, floor=floor_id, limit=limit + 1)
        if len(jobs) > limit:
            return jobs[:limit], (cast(float, jobs[limit - 1].ended_at), jobs[limit - 1].id)
        return jobs, floor

    def pick(self, ids: Iterable[int], of: Filter, by_end: bool) -> list[Job]:
        """Return those of these jobs that match a filter, by id, or those that have ended."""
        values = of.values()
        return [
            job
            for each in sorted(set(ids))
            for job in self.jobs(statements.JOB_IF_ENDED if by_end else statements.JOB_IF, **values, id=each)
        ]

    def changes(self, of: Filter, limit: int, after: int, ids: Collection[int] | None = None) -> tuple[list[sqlite3.Row], int]:
        """Return at most `limit` moves with a seq above `after` that match a filter, in order, and the seq from which to continue.

        `ids` are the only jobs that count. At most EXAMINED_MOST moves are examined. Raises Forgotten if earlier moves are missing.
        """
        values, last = of.values(), self.number(statements.LAST_SEQ)
        if ids is None:
            bound = self.read(statements.CHANGES_BOUND, after=after, skip=EXAMINED_MOST - 1)
            last = bound[0]["seq"] if bound else last
            rows = self.read(statements.CHANGES, **values, after=after, last=last, limit=limit)
        else:
            rows = [row for each in set(ids) for row in self.read(statements.CHANGES_OF_JOB, **values, id=each, after=after, last=last)]
            rows = sorted(rows, key=lambda row: int(row["seq"]))[:limit]
        forgotten = self.read(statements.FEED_GET)[0]["forgotten"]  # read last: what was deleted before the other reads has raised it
        if after < forgotten:
            raise Forgotten(f"the moves up to {forgotten} are no longer kept")
        return rows, rows[-1]["seq"] if len(rows) == limit else max(after, last)

    @staticmethod
    def row(db: sqlite3.Connection, job_id: int) -> Job:
        """Return a job that exists, inside a transaction."""
        return as_job(db.execute(statements.JOB_GET, {"id": job_id}).fetchone())

    # -- writing --

    def add(self, new: NewJob, reason: str, most_queued: int | None = None, kept_s: float = float("inf"), most_bytes: int = 0) -> Job:
        """Store a new job durably, as Queued or Prepared, or as Invalid if a job that it follows did not end Completed.

        Raises sqlite3.IntegrityError if its mark or key exists, UnknownJob if it follows a job that its user does not have, NoInputs if
        one of `from_ids` has no result or ended over `kept_s` seconds ago, QueueFull if its user has `most_queued` jobs queued, and
        StoreFull if the files and results of its user would have more than `most_bytes` (0: no limit).
        """

        def insert(db: sqlite3.Connection) -> Job:
            self.check_inputs(db, new, kept_s)
            self.check_stored(db, new, most_bytes)
            job = self.insert(db, new, reason, most_queued)
            words = (self.noun, job.id, job.status, job.service, job.user_id)
            self.core.after(functools.partial(log.info, "%s %d %s (service=%s user=%s)", *words, extra=job_fields(self.noun, job)))
            return job

        return self.write(insert, durable=self.mode == "server")

    def insert(self, db: sqlite3.Connection, new: NewJob, reason: str, most_queued: int | None) -> Job:
        """Store a new job inside a transaction: see `add`."""
        if (
            most_queued
            and db.execute(statements.QUEUED_OF_USER, {"user_id": new.user_id, "limit": most_queued}).fetchone()[0] >= most_queued
        ):
            raise QueueFull(f"user {new.user_id} has {most_queued:,} jobs queued, which is the limit")
        status = Status.QUEUED if self.mode == "server" else Status.PREPARED
        open_ids, broken = self.still_open(db, new)
        now, steady = self.clock.wall(), self.steady()
        values = {**vars(new), "status": status.value, "reason": reason, "blocked": len(open_ids), "moves": 1}
        values.update(changed=self.next_change(), created_at=now, moved_at=steady, arrived_at=steady)
        job_id = cast(int, db.execute(statements.JOB_ADD, values).lastrowid)
        for on_id in open_ids:
            db.execute(statements.DEPENDENCY_ADD, {"on_id": on_id, "job_id": job_id})
        for on_id in ids_in(new.from_ids):
            db.execute(statements.RESULT_NEEDED_ADD, {"on_id": on_id, "job_id": job_id})
        job = self.row(db, job_id)
        self.add_move(db, Move(job, None, status, steady, {}), now, reason)
        self.update_rank(db, job, queued=int(not open_ids))
        if broken:
            self.move_row(db, job, Status.INVALID, broken, cause=Cause.USER.value)
            return self.row(db, job_id)
        if self.mode == "server":  # servers need no news of a payload that is only Prepared
            self.core.moved.add(job_id)
        return job

    def check_inputs(self, db: sqlite3.Connection, new: NewJob, kept_s: float) -> None:
        """Raise NoInputs if a new job cannot get a result of another one. `kept_s` is how long the cleaner keeps results."""
        for on_id in ids_in(new.from_ids):
            row = db.execute(statements.JOB_GET, {"id": on_id}).fetchone()
            if row is None or row["user_id"] != new.user_id:
                raise NoInputs(f"user {new.user_id} has no job {on_id}")
            earlier = as_job(row)
            if earlier.end not in (None, Status.COMPLETED.value):
                raise NoInputs(f"job {on_id} ended as {earlier.end} and has no result")
            if earlier.end and (earlier.status is Status.CLEANED or earlier.moved_at <= self.steady() - kept_s):
                raise NoInputs(f"the result of job {on_id} is deleted, or about to be: run that job again")

    def check_stored(self, db: sqlite3.Connection, new: NewJob, most_bytes: int) -> None:
        """Raise StoreFull if the files and results of a user would have more than `most_bytes` (0: no limit)."""
        stored = db.execute(statements.STORED_OF_USER, {"user_id": new.user_id}).fetchone()[0] if most_bytes else 0
        if most_bytes and stored + (new.inputs_size or 0) > most_bytes:
            what = f"this job has {size_text(new.inputs_size or 0)}, and the limit is {size_text(most_bytes)}"
            raise StoreFull(f"user {new.user_id} has {size_text(stored)} stored, {what}")

    def cleanable(self, **moments: float) -> list[Job]:
        """Return ended jobs whose files are due. They are read in a transaction: a job that needs a result is stored before or after."""
        found = self.jobs(statements.ENDED_BEFORE, **moments)
        return found and self.write(lambda db: [as_job(row) for row in db.execute(statements.ENDED_BEFORE, moments)], durable=False)

    def still_open(self, db: sqlite3.Connection, new: NewJob) -> tuple[list[int], str]:
        """Return the jobs that a new one must wait for, and why it can never run (empty if it can)."""
        open_ids, broken = [], ""
        for on_id in new.after:
            row = db.execute(statements.JOB_GET, {"id": on_id}).fetchone()
            if row is None or row["user_id"] != new.user_id:
                raise UnknownJob(f"user {new.user_id} has no job {on_id}")
            earlier = as_job(row)
            if earlier.status not in OVER:
                open_ids.append(on_id)
            elif earlier.status is not Status.COMPLETED and db.execute(statements.WAS_COMPLETED, {"id": on_id}).fetchone() is None:
                broken = broken or Reason.CHAIN_BROKEN.format(job=on_id, status=earlier.status)
        return ([], broken) if broken else (open_ids, "")

    def move(self, job: Job, to: Status, reason: str, durable: bool = False, **changes: Any) -> bool:
        """Move `job` from the status it was read with to `to`, and write its history.

        Return False if the row has left that status meanwhile, or if a kill of a payload was requested since it was read. Raises
        IllegalMove for a move that is not in the table. `changes` are other columns of MOVABLE, and `row_reason` if the row keeps
        another reason than its history. On the server an end is always durable.
        """
        durable = durable or (self.mode == "server" and to in ENDED)

        def move(db: sqlite3.Connection) -> bool:
            moved = self.move_in(db, job, to, reason, **changes)
            if moved:
                words = (self.noun, job.id, job.status, to, job.service, job.user_id, ": " + one_line(reason) if reason else "")
                extra = job_fields(self.noun, job, client=changes.get("client", job.client))
                self.core.after(functools.partial(log.info, "%s %d %s -> %s (service=%s user=%s)%s", *words, extra=extra))
            return moved

        return self.write(move, durable)

    def move_accepted(self, job: Job, accepted: str, dest_id: str, to: Status, reason: str, **changes: Any) -> bool:
        """Move a Processing job to Submitted, for the reason `accepted`, and on to its end, durably and in one transaction.

        Its history is that of two moves. Returns False if the row has left Processing meanwhile.
        """

        def both(db: sqlite3.Connection) -> bool:
            return self.move(job, Status.SUBMITTED, accepted, dest_id=dest_id) and self.move(self.row(db, job.id), to, reason, **changes)

        return self.write(both)

    def move_in(self, db: sqlite3.Connection, job: Job, to: Status, reason: str, **changes: Any) -> bool:
        """Make one move inside a transaction, and update the jobs that wait for this one: see `move`."""
        moved = self.move_row(db, job, to, reason, **changes)
        if moved and self.mode == "server" and to in ENDED:
            self.tell_dependents(db, job.id, to)
        return moved

    def move_row(self, db: sqlite3.Connection, job: Job, to: Status, reason: str, **changes: Any) -> bool:
        if (job.status, to) not in MOVES[self.mode]:
            raise IllegalMove(f"job {job.id}: {job.status} -> {to} is not a legal move")
        if to is Status.KILLED:
            for (name,) in db.execute(statements.KILLED_BY, {"id": job.id}):  # no row: the job was deleted meanwhile
                reason = with_caller(reason, name)
        now = self.clock.wall()
        run_s, row_reason = changes.pop("run_s", None), changes.pop("row_reason", reason)
        if to in ENDED and job.status not in ENDED:
            changes.setdefault("ended_at", now)
        values = {name: changes.get(name, getattr(job, name)) for name in MOVABLE}
        values.update(id=job.id, to=to.value, source=job.status.value, reason=row_reason, expected=job.attempt)
        values.update(ended_as=job.status.value if to is Status.CLEANED else None)
        values.update(changed=self.next_change(), moved_at=self.steady())
        # Whether a kill was requested decides how a payload ended, so a row that was read before the request is not good enough.
        values.update(any_wish=self.mode == "server", kill_requested_at=job.kill_requested_at)
        was_queued = job.status is Status.QUEUED and self.is_in_queue(db, job.id)  # `job` may have been read before it was
        if db.execute(statements.JOB_MOVE, values).rowcount != 1:
            return False
        self.core.moved.add(job.id)
        if values["attempt"] != job.attempt:
            cause = Cause.INFRASTRUCTURE.value
            db.execute(statements.ATTEMPT_ADD, {**job._asdict(), "ended_at": now, "reason": reason, "cause": cause})
        self.add_move(db, Move(job, job.status, to, values["moved_at"], values, run_s), now, reason)
        if self.mode == "server" and (job.status in BUSY or to in BUSY):
            self.account(db, job, to, run_s, values)
        if values["not_before"] is not None:
            self.core.after(self.note_delayed)
        if not (job.status in BUSY and to in BUSY):
            is_queued = to is Status.QUEUED and self.is_in_queue(db, job.id)
            self.update_rank(db, job, is_queued - was_queued, is_queue=Status.QUEUED in (job.status, to))
        return True

    @staticmethod
    def is_in_queue(db: sqlite3.Connection, job_id: int) -> bool:
        """Tell whether a job could run, inside a transaction."""
        return db.execute(statements.IS_IN_QUEUE, {"id": job_id}).fetchone() is not None

    def tell_dependents(self, db: sqlite3.Connection, job_id: int, to: Status) -> None:
        """Release the jobs that follow a Completed one. If it ended otherwise, make them Invalid, and those that follow them."""
        ended = [(job_id, to)]
        while ended:
            on_id, how = ended.pop()
            for row in db.execute(statements.DEPENDENTS, {"on_id": on_id}).fetchall():
                job = as_job(row)
                if how is not Status.COMPLETED:
                    reason = Reason.CHAIN_BROKEN.format(job=on_id, status=how)
                    self.move_row(db, job, Status.INVALID, reason, cause=Cause.USER.value)
                    ended.append((job.id, Status.INVALID))
                elif db.execute(statements.JOB_UNBLOCK, {"id": job.id}).rowcount and job.blocked == 1:
                    self.update_rank(db, job, queued=1)
            db.execute(statements.DEPENDENTS_FORGET, {"on_id": on_id})

    def add_move(self, db: sqlite3.Connection, move: Move, now: float, reason: str) -> None:
        """Store a move. `seq` orders all moves, whatever the clock says: unique microseconds of steady time."""
        self.last_seq = max(self.last_seq + 1, int(self.steady() * 1e6))
        values = {"id": move.job.id, "now": now, "source": move.source and move.source.value, "to": move.to.value, "reason": reason}
        db.execute(statements.HISTORY_ADD, {**values, "seq": self.last_seq})
        self.core.moves.append(move)
        for moved in self.movers:
            moved(db, move)

    def next_change(self) -> int | None:
        """Return the next number for a client's /events; called inside a transaction. The server has none."""
        if self.mode == "server":
            return None
        self.last_change += 1
        return self.last_change

    def request_kill(self, job_id: int, cause: Cause, by: str | None = None) -> bool:
        """Store durably that a job must be stopped, and the name of who wants that. Return whether that is new."""
        values = {"id": job_id, "now": self.clock.wall(), "cause": cause.value, "by": by}

        def request(db: sqlite3.Connection) -> bool:
            is_new = db.execute(statements.KILL_WISH, values).rowcount == 1
            if is_new and self.mode == "server":
                self.set_run(self.row(db, job_id))
            return is_new

        return self.write(request)

    def take_along(self, job: Job, client: str) -> bool:
        """Store that a job's client has another name. Return False if the job has moved meanwhile."""
        values = {"id": job.id, "source": job.client, "to": client, "attempt": job.attempt}

        def rename(db: sqlite3.Connection) -> bool:
            if db.execute(statements.JOB_CLIENT, values).rowcount != 1:
                return False
            self.set_run(self.row(db, job.id))
            return True

        return self.write(rename)

    def note(self, sql: str, **values: Any) -> None:
        """Write a column that is not a status, without waiting for the disk."""
        self.write(lambda db: db.execute(sql, values).rowcount, durable=False)

    def tell(self, job_id: int, **begun: float) -> None:
        """Let /events report a payload again. If it has just started, give `started_at` (wall) and `now` (steady)."""

        def say(db: sqlite3.Connection) -> None:
            sql = statements.PAYLOAD_BEGUN if begun else statements.PAYLOAD_TOLD
            if db.execute(sql, {"id": job_id, "changed": self.next_change(), **begun}).rowcount:
                self.core.moved.add(job_id)

        self.write(say, durable=False)

    def forget(self, job_ids: Sequence[int]) -> None:

        def delete(db: sqlite3.Connection) -> None:
            for job_id in job_ids:
                for sql in statements.FORGET:
                    db.execute(sql, {"id": job_id})

        self.write(delete, durable=False)

    def renew(self, replaced: str) -> None:
        """After a restore: skip ids and seqs that the database at `replaced` may have assigned, and become a new instance."""
        seq = max(self.last_seq, last_seq_of(replaced), int(self.steady() * 1e6)) + RESTORE_SEQ_GAP

        def skip(db: sqlite3.Connection) -> None:
            last = db.execute(statements.LAST_ID).fetchone()
            db.execute(statements.SKIP_IDS, {"last": (last[0] if last else 0) + RESTORE_ID_GAP})
            db.execute(statements.FEED_SKIP, {"seq": seq})
            db.execute(statements.NEW_INSTANCE)

        self.write(skip)

    # -- turns --

    def share(self, service: str, user_id: int) -> Share:
        """Return a user's part in a service, from memory or, if nothing is going on there, from the rows."""
        share = self.core.shares.users.get((service, user_id), self.core.is_inside())
        if share is None:
            rows = self.read(statements.USAGE_GET, service=service, user_id=user_id)
            share = Share(Usage(*rows[0])) if rows else NO_SHARE
        return share

    def line(self, service: str) -> Line:
        return self.core.shares.lines.get(service, self.core.is_inside()) or NO_LINE

    def load(self, client: str) -> Load:
        return self.core.shares.loads.get(client, self.core.is_inside()) or NO_LOAD

    def weight(self, user_id: int) -> float:
        """Return a user's weight: the stored one, else that of the settings, else 1."""
        return self.core.shares.weights.get(user_id, self.core.is_inside()) or 1.0

    def turns(self, service: str) -> Iterator[Turn]:
        """Yield the turns of users whose next job may be sent, the first turn first."""
        shares = self.core.shares
        turns = shares.turns(service) if self.core.is_inside() else iter(shares.order.get(service, [])[:CANDIDATES_LOOKED_AT])
        return itertools.takewhile(lambda turn: not turn.at_quota, turns)

    def users_queued(self, service: str) -> int:
        """Return how many users have a job that could run, counted up to 10,000."""
        return min(len(self.core.shares.order.get(service, ())), 10_000)

    def turns_before(self, service: str, turn: Turn) -> int:
        """Return how many users with a free run have their turn before this one, counted up to 10,000."""
        return min(bisect.bisect_left(self.core.shares.order.get(service, []), turn._replace(at_quota=False)), 10_000)

    def runs(self) -> Iterator[Run]:
        """Yield all jobs at clients, as of the last COMMIT."""
        return (run for share in list(self.core.shares.users.known.values()) for run in share.runs)

    def set_pace(self, db: sqlite3.Connection, service: str, pace: Pace) -> None:
        db.execute(statements.PACE_SET, {"service": service, "runs": pace.runs, "mean_s": pace.mean_s})
        self.core.shares.lines.changes[service] = self.line(service)._replace(pace=pace)

    def set_run(self, job: Job) -> None:
        """Keep what is known of a job at a client as it is now, inside a transaction; forget it if it is at none any more."""
        run, shares, share, line = run_of_job(job), self.core.shares, self.share(*job.pair), self.line(job.pair[0])
        old = share.run(job.id)
        if old is not None and run is not None:
            run = run._replace(killed=old.killed or run.killed)  # the job may have been read before the request
        if old is None or run is None or old[RUN_TAKES] != run[RUN_TAKES]:
            for each, count in ((old, -1), (run, 1)):
                if each is not None:
                    shares.loads.changes[each.client] = self.load(each.client).plus(each, count)
                    line = line._replace(busy=line.busy + count)
            shares.lines.changes[job.pair[0]] = line
        runs = sorted(each for each in (*share.runs, run) if each is not None and each is not old)
        shares.users.changes[job.pair] = Share(share.usage, tuple(runs), share.waiting, share.turn)

    def account(self, db: sqlite3.Connection, job: Job, to: Status, run_s: float | None, row: Mapping[str, Any]) -> None:
        """Charge a user in advance for a job that goes to a client, or its real length when it is over. `row` are the new values."""
        share = self.share(*job.pair)
        run = share.run(job.id)
        if run is None:
            charged = charge_in_advance(job, share.usage, self.line(job.pair[0]).pace, self.sharing.half_life_s)
        else:
            charged = run.charged if to in BUSY else self.charge_run(db, job, to, run_s, run)
        if run is None or to not in BUSY:
            db.execute(statements.JOB_CHARGE_SET, {"id": job.id, "charged": charged})
        changed = {name: row[name] for name in ("client", "dest_id", "moved_at")}
        self.set_run(job._replace(status=to, charged=charged, **changed))

    def charge_run(self, db: sqlite3.Connection, job: Job, to: Status, run_s: float | None, run: Run) -> float:
        """Add a run that is over to its user's use. Return its charge."""
        now, share = self.steady(), self.share(*job.pair)
        usage = share.usage
        if run_s is None:
            run_s = now - job.moved_at if job.status is Status.RUNNING else 0.0 if job.started_at is None else run.charged / job.cpus
        elif to in (Status.COMPLETED, Status.FAILED):
            usage = with_run(usage, run_s)
            self.set_pace(db, job.pair[0], with_run(self.line(job.pair[0]).pace, run_s))
        use = self.without_old_credit(job, share) if run_s > TURN_S else usage.use
        counted = job.cpus * counted_s(max(run_s, TURN_S), self.sharing.half_life_s)
        usage = usage._replace(use=used(use, counted, now, self.sharing.half_life_s))
        db.execute(statements.USAGE_SET, {"service": job.service, "user_id": job.user_id, **usage._asdict()})
        self.core.shares.users.changes[job.pair] = share._replace(usage=usage)
        return job.cpus * max(run_s, TURN_S)

    def without_old_credit(self, job: Job, share: Share) -> float:
        """Return the use of a job's user, capped by the use of the service's other active users: see `cap_idle_credit`.

        It is not capped if the user has no more jobs waiting. What the others were charged in advance does not count, because
        they may not use it.
        """
        (name, user_id), use, now, shares = job.pair, share.usage.use, self.steady(), self.core.shares
        service, weight = self.limits.get(name), self.weight(user_id)
        level = next((turn.rank for turn in self.turns(name) if turn.user_id != user_id), float("inf"))
        if service is None or service.policy != "share" or share.turn is None or cap_idle_credit(use, weight, level) == use:
            return use
        changed = {other for service_name, other in shares.users.changes if service_name == name}
        for other in (shares.running.get(name, set()) | changed) - {user_id}:
            theirs = self.share(name, other)
            if theirs.runs:
                had = with_open_runs(theirs.usage.use, theirs.runs, now, self.sharing.half_life_s, in_advance=False)
                level = min(level, had - math.log2(self.weight(other)))
        return use if level == float("inf") else cap_idle_credit(use, weight, level)

    def used_slot_s(self, service: str, user_id: int) -> float:
        """Return a user's use of a service as it counts now, in slot-seconds. Running jobs count with the time they have run."""
        now, half_life_s, share = self.steady(), self.sharing.half_life_s, self.share(service, user_id)
        return use_now(with_open_runs(share.usage.use, share.runs, now, half_life_s, in_advance=False), now, half_life_s)

    def charge_longer(self, job: Job) -> None:
        """Charge more for a run that takes longer than expected: double the charge, but never far more than the run has used."""
        charged = job.charged + min(max(job.charged, 1.0), job.cpus * self.sharing.half_life_s / 8)

        def charge(db: sqlite3.Connection) -> None:
            values = {"id": job.id, "attempt": job.attempt, "status": job.status.value, "charged": charged}
            if db.execute(statements.JOB_CHARGE, values).rowcount:
                self.set_run(self.row(db, job.id))
                self.update_rank(db, job, is_queue=False)

        self.write(charge, durable=False)

    def update_rank(self, db: sqlite3.Connection, job: Job, queued: int = 0, is_queue: bool = True) -> None:
        """Update the turn of a job's user. Its service has `queued` jobs more. Without `is_queue`, those of the user are as before."""
        if self.mode == "server" and job.service in self.limits:
            self.core.undecided = True
            if queued:
                line = self.line(job.pair[0])
                self.core.shares.lines.changes[job.pair[0]] = line._replace(queued=line.queued + queued)
            self.update_turn(db, job.pair, is_queue)

    def update_turn(self, db: sqlite3.Connection, pair: tuple[str, int], is_queue: bool) -> None:
        """Update a user's turn in a service, inside a transaction."""
        service, share, turn = self.limits[pair[0]], self.share(*pair), None
        if is_queue:
            sql = statements.WAITING_FIRST if service.policy == "share" else statements.WAITING_BY_PRIORITY
            rows = db.execute(sql, {"service": pair[0], "user_id": pair[1]})
            share = share._replace(waiting=tuple(Waiting(*row) for row in rows))
        if share.waiting:
            use = with_open_runs(share.usage.use, share.runs, self.steady(), self.sharing.half_life_s)
            rank, head = rank_of(service.policy, share.waiting, use - math.log2(self.weight(pair[1])), self.sharing.ageing_s)
            turn = Turn(len(share.runs) >= service.runs_per_user, rank, head, pair[1])
        self.core.shares.users.changes[pair] = Share(share.usage, share.runs, share.waiting, turn)

    def set_limits(self, services: Mapping[str, Service], sharing: Sharing | None = None) -> None:
        """Use these services and rules, and compute all turns."""
        self.limits, self.sharing = services, sharing or self.sharing
        if self.mode == "server":
            self.write(self.make_turns)

    def make_turns(self, db: sqlite3.Connection) -> None:
        """Fill the memory from the rows."""
        convert_uses(self, db)
        shares = self.core.shares = Shares()
        shares.weights.changes.update(weights_now(self, db))
        shares.lines.changes.update({row[0]: Line(pace=Pace(*row[1:])) for row in db.execute(statements.PACE_ALL)})
        for job in map(as_job, db.execute(statements.ALL_BUSY)):
            self.set_run(job)
        make_queues(self, db)

    def set_weight(self, user_id: int, weight: float) -> None:

        def store(db: sqlite3.Connection) -> None:
            db.execute(statements.WEIGHT_SET, {"user_id": user_id, "weight": weight})
            self.core.shares.weights.changes[user_id] = weight
            for service in self.limits:
                self.update_turn(db, (service, user_id), is_queue=False)
            self.core.undecided = True

        self.write(store)

    # -- claims --

    def claim(self, job_id: int, client: str, room: int) -> Job | None:
        """Move a queued job to Processing for `client`, if quota, service limit and `room` (slots) there still allow it.

        One transaction decides, and it is durable: a restarted server must know where a job may be.
        """

        def take(db: sqlite3.Connection) -> Job | None:
            job = self.row(db, job_id)
            service = self.limits[job.service or ""]
            if job.status is Status.QUEUED and job.kill_requested_at is not None:
                self.move_in(db, job, Status.KILLED, Reason.KILLED_UNSENT, cause=Cause.CANCELLED.value)
                return None
            full = (
                self.load(client).cpus + job.cpus > room
                or self.line(job.pair[0]).busy >= service.max_runs
                or len(self.share(*job.pair).runs) >= service.runs_per_user
            )
            if full or job.status is not Status.QUEUED or job.not_before is not None or job.blocked:
                return None
            self.move_in(db, job, Status.PROCESSING, Reason.CLAIMED.format(client=client), client=client)
            return self.row(db, job_id)

        return self.write(take)

    def note_delayed(self) -> None:
        self.has_delayed = True

    def admit_due(self) -> int:
        """Make new attempts claimable if their back-off is over; return how many."""
        self.has_delayed = False  # first: a COMMIT after this look sets it again
        delayed, now = self.read(statements.DELAYED_FIRST), self.steady()
        if delayed:
            self.has_delayed = True
        due = [row for row in delayed if row["not_before"] <= now]

        def admit(db: sqlite3.Connection) -> None:
            for row in due:
                if db.execute(statements.JOB_ADMIT, {"id": row["id"]}).rowcount:
                    self.update_rank(db, self.row(db, row["id"]), queued=1)

        if due:
            self.write(admit, durable=False)
        return len(due)


# == 2. Limits ==  Other services and rules of turns, taken while jobs are under way.


def change_limits(store: Store, db: sqlite3.Connection, services: Mapping[str, Service], sharing: Sharing) -> None:
    """Use other services and rules from this transaction on, unless it is rolled back, and compute all turns anew."""
    store.core.after(lambda: None, functools.partial(keep_limits, store, store.limits, store.sharing))
    keep_limits(store, services, sharing)
    shares = store.core.shares
    users = {**shares.users.known, **shares.users.changes}
    if convert_uses(store, db):
        rows = db.execute(statements.USAGE_ALL)
        used = {(row["service"], row["user_id"]): Usage(row["used"], row["runs"], row["mean_s"]) for row in rows}
        users = {pair: share._replace(usage=used.get(pair, share.usage)) for pair, share in users.items()}
    shares.users.changes.update({pair: share._replace(waiting=(), turn=None) for pair, share in users.items()})
    lines = {**shares.lines.known, **shares.lines.changes}
    shares.lines.changes.update({name: line._replace(queued=0) for name, line in lines.items()})
    shares.weights.changes.update({**dict.fromkeys(shares.weights.known, 1.0), **weights_now(store, db)})
    make_queues(store, db)
    store.core.undecided = True


def make_queues(store: Store, db: sqlite3.Connection) -> None:
    """Count the jobs that could run, and compute the turns of their users."""
    for service in store.limits:
        (queued,) = db.execute(statements.QUEUED_IN_SERVICE, {"service": service}).fetchone()
        if queued != store.line(service).queued:
            store.core.shares.lines.changes[service] = store.line(service)._replace(queued=queued)
        for (user_id,) in db.execute(statements.QUEUED_USERS, {"service": service}).fetchall():
            store.update_turn(db, (service, user_id), is_queue=True)


def keep_limits(store: Store, services: Mapping[str, Service], sharing: Sharing) -> None:
    """Use these services and rules for what is decided from now on."""
    store.limits, store.sharing = services, sharing


def convert_uses(store: Store, db: sqlite3.Connection) -> bool:
    """Convert uses that were counted with another half-life to their present value. Return whether the half-life is another."""
    (half_life_s,), now = db.execute(statements.TURNS_MADE).fetchone(), store.steady()
    if half_life_s == store.sharing.half_life_s:
        return False
    shift = now / store.sharing.half_life_s - now / half_life_s if half_life_s else 0.0
    for row in db.execute(statements.USAGE_ALL).fetchall() if shift else ():
        db.execute(statements.USAGE_SET, {**dict(row), "use": row["used"] + shift})
    db.execute(statements.TURNS_MADE_BY, {"half_life_s": store.sharing.half_life_s})
    return True


def weights_now(store: Store, db: sqlite3.Connection) -> dict[int, float]:
    """Return the weights that the settings or the store give to users."""
    return {**store.sharing.weights, **{row[0]: row[1] for row in db.execute(statements.WEIGHT_ALL)}}
