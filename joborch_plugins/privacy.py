"""Deletes jobs on request: their files, names, reasons and texts, here and at clients. What accounting needs stays in their rows.

1. Deletion
2. Routes

Each step is noted in the table `erasures` before it is done, and the note goes in the transaction that completes the step. So what
a crash or a silent client interrupts is done later.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence

from joborch import (
    BAD,
    BIGGEST,
    BUSY,
    ENDED,
    ID,
    JSON_TYPE,
    KIB,
    NOT_FOUND,
    OVER,
    SMALLEST,
    Answer,
    BackendUnavailable,
    Backoff,
    Cause,
    Client,
    Gives,
    Job,
    Link,
    Loop,
    Move,
    NoAnswer,
    Node,
    NothingSent,
    Parameter,
    Reason,
    Request,
    Server,
    Status,
    crash_point,
    drop_packings,
    known_job,
    log,
    plural,
    put_off,
    read_some,
    read_uuid,
    refused_text,
    remove_files,
    route,
    statements,
)

LOOK_S = 1.0  # between two looks while something is left to do
AT_ONCE = 200  # jobs in one tick
BLANKED_AT_ONCE = 10  # in one transaction: others wait meanwhile
NOTED_AT_ONCE = 1000
ASK_TIMEOUT_S = 15.0  # for a client's answer
ANSWER_S = 5.0  # a client deletes for as long before it answers that it is still at it
WAIT_S = 10.0  # a caller waits for as long
FEW = 20  # deleted jobs whose texts are not overwritten yet
SMALL_BYTES = 64 * KIB * KIB  # a database up to this size is rewritten after each deletion
DAY_S = 86400.0  # a larger one is rewritten at most once a day
QUIET_S = 60.0  # since the last new or moved job, as nobody else can write during a rewrite; after a day of waiting it is done anyway
REWRITE_SHARE = 20  # a rewrite is followed by a pause of as many times its length
TRY_AGAIN_S = 3600.0  # after an error
LIVE_SHARE = 20  # a look for jobs to stop is followed by a pause of as many times its length


# == 1. Deletion ==  Stop the job, remove its files here, blank its rows, ask its clients for the same, overwrite what is left.


class Privacy:
    """Carries out deletions that were noted. A server and its clients both have one."""

    def __init__(self, node: Node) -> None:
        self.node, self.store = node, node.store
        self.wanted = True  # there may be something to do
        self.live_due = float("-inf")  # monotonic: the next look for jobs to stop
        self.batch_outage = Backoff(node.clock)
        self.rewritten: list[int] = []  # jobs deleted before the last rewrite: only the log of the database has to be emptied for them
        self.rewrite_due = float("-inf")  # monotonic, as the next two
        self.waits_since: float | None = None  # since when a rewrite waits for a quiet moment
        self.moved_at = float("-inf")  # when the last job came or moved
        self.lock = threading.Lock()

    def start(self) -> None:
        """Add the loop. Its first tick finds what the last process has left."""
        self.node.loops["erase"] = Loop("erase", self.tick, lambda: self.node.pool, LOOK_S, wanted=lambda: self.wanted)

    def committed(self, moves: Iterable[Move]) -> None:
        """Note that others are at work, and go on at once when a job has ended that waits for that."""
        self.moved_at = self.node.clock.monotonic()
        if self.wanted and any(move.to in ENDED for move in moves):
            self.node.wake("erase")

    def begin(self) -> None:
        """Do what was noted, now."""
        self.wanted, self.live_due = True, float("-inf")
        self.node.wake("erase")

    def note(self, job_ids: Iterable[int]) -> None:
        """Note durably that these jobs are to be deleted, and begin."""

        def add(db: sqlite3.Connection) -> None:
            for job_id in job_ids:
                db.execute(statements.ERASURE_ADD, {"id": job_id, "client": ""})

        self.store.write(add)
        crash_point("erase.noted")
        self.begin()

    def note_user(self, user_id: int) -> None:
        """Note durably that all jobs of a user are to be deleted, unless that is noted or done, and begin."""
        ids = [row["id"] for row in self.store.read(statements.IDS_TO_ERASE, user_id=user_id, erased=f"{Reason.ERASED}%")]
        for at in range(0, len(ids), NOTED_AT_ONCE):
            self.note(ids[at : at + NOTED_AT_ONCE])

    def reported(self, job: Job, client: str) -> None:
        """A client reports a payload of a job that is deleted: delete that, too."""
        self.store.write(lambda db: db.execute(statements.ERASURE_ADD, {"id": job.id, "client": client}).rowcount)
        self.begin()

    def left_of(self, job_id: int) -> list[str]:
        """Return where a job is still to be deleted: names of clients, and an empty text for here."""
        return [row["client"] for row in self.store.read(statements.ERASURES_OF_JOB, id=job_id)]

    def do_now(self) -> None:
        """Do what can be done now in this thread, unless another one does it."""
        if self.lock.acquire(blocking=False):
            try:
                more = self.work()
            finally:
                self.lock.release()
            if more:
                self.begin()

    def tick(self) -> bool:
        """Do what can be done now. Return whether there is more."""
        with self.lock:
            return self.work()

    def work(self) -> bool:
        """See `tick`. The caller holds the lock."""
        self.wanted = False  # first: what is noted from now on sets it again
        self.stop_live()
        more = self.erase_here()
        places = [row["client"] for row in self.store.read(statements.ERASURE_CLIENTS)]
        if isinstance(self.node, Server):
            for link in list(self.node.links.values()):
                if link.name in places:
                    self.erase_at(self.node, link)
        if not more:
            self.overwrite()
        self.wanted = bool(self.wanted or more or places or self.store.number(statements.REMNANTS))
        return more

    def stop_live(self) -> None:
        """Stop jobs that are to be deleted. If there are very many, this does not look for them each time."""
        begun = time.monotonic()
        if begun < self.live_due:
            return
        live = self.store.jobs(statements.ERASURES_LIVE, limit=AT_ONCE)
        self.live_due = begun if live else time.monotonic() + LIVE_SHARE * (time.monotonic() - begun)

        def kill_queued(db: sqlite3.Connection) -> None:
            for job in live:
                current = self.store.row(db, job.id)
                if current.status is Status.QUEUED:
                    self.store.move_in(db, current, Status.KILLED, Reason.KILLED_UNSENT, cause=Cause.CANCELLED.value)

        if any(job.status is Status.QUEUED for job in live):
            self.store.write(kill_queued)
        for job in live:
            if job.status is not Status.QUEUED and self.store.request_kill(job.id, Cause.CANCELLED):
                self.node.wake(f"kill:{job.client}" if job.status in BUSY and job.client else "end")

    def erase_here(self) -> bool:
        """Delete files and texts of jobs that are over. Return whether there are more."""
        jobs = [job for job in self.store.jobs(statements.ERASURES_DUE, limit=AT_ONCE) if not self.is_in_use(job)]
        done = [job for job in jobs if self.remove_files(job)]
        if done:
            crash_point("erase.files")
            for at in range(0, len(done), BLANKED_AT_ONCE):
                self.blank_in_turn([job.id for job in done[at : at + BLANKED_AT_ONCE]])
            crash_point("erase.blanked")
            log.info("%s deleted on request", plural(len(done), f"{self.store.noun} is", f"{self.store.noun}s are"))
        return len(done) == AT_ONCE

    def is_in_use(self, job: Job) -> bool:
        """Tell whether a thread still sends or fetches files of a job, or their removal failed a short time ago."""
        if job.id in self.node.unremovable and self.node.unremovable[job.id].waits():
            return True
        links = self.node.links.values() if isinstance(self.node, Server) else ()
        records = [link.jobs[job.id] for link in list(links) if job.id in link.jobs]
        return any(live.sending or (live.end is not None and live.end.taken) for live in records)

    def remove_files(self, job: Job) -> bool:
        """Remove a job's files. Return False if some cannot be removed now: then this is tried again, with growing pauses."""
        if isinstance(self.node, Client) and not self.remove_copies(self.node, job):
            return False
        try:
            if isinstance(self.node, Client):
                drop_packings(self.node, [job.id])
            remove_files(self.node, job)
        except OSError as error:
            put_off(self.node, job, error)
            return False
        self.node.unremovable.pop(job.id, None)
        return True

    def remove_copies(self, client: Client, job: Job) -> bool:
        """Delete what a batch system keeps of a payload. Return False if it does not answer now."""
        erase = getattr(client.executor, "erase", None)
        if erase is None or not job.handle:
            return True
        if self.batch_outage.waits():
            return False
        try:
            erase(job)
        except BackendUnavailable as error:
            if self.batch_outage.failed(error):
                log.warning("payload %d is not deleted yet: %s", job.id, error)
            return False
        self.batch_outage.worked()
        return True

    def blank_in_turn(self, job_ids: Sequence[int]) -> None:
        """Blank the texts of jobs, and let others write afterwards for as long as that took.

        It need not be on the disk at once: what a power failure undoes is noted as before. The pages that are written go to the
        database here, on another connection, or the next one who writes would wait for that.
        """
        begun = time.monotonic()
        self.store.write(functools.partial(self.blank_all, job_ids), durable=False)
        if len(job_ids) == BLANKED_AT_ONCE:
            self.store.read(statements.CHECKPOINT)
            time.sleep(time.monotonic() - begun)

    def blank_all(self, job_ids: Iterable[int], db: sqlite3.Connection) -> None:
        """Blank the texts of jobs whose files are removed, in one transaction."""
        db.execute(statements.SECURE_DELETE)
        for job_id in job_ids:
            self.blank(db, job_id)

    def blank(self, db: sqlite3.Connection, job_id: int) -> None:
        """Blank the texts of a job, and note its clients."""
        row = db.execute(statements.JOB_GET, {"id": job_id}).fetchone()
        if row is None:  # its row was old enough
            return
        is_server = self.store.mode == "server"
        clients = {each["client"] for each in db.execute(statements.CLIENTS_OF_JOB, {"id": job_id})} if is_server else set()
        if row["status"] != Status.CLEANED.value:
            self.store.move_in(db, self.store.row(db, job_id), Status.CLEANED, self.reason(clients), row_reason="")
        db.execute(statements.ERASE_JOB, {"id": job_id})
        for sql in statements.ERASE:
            db.execute(sql, {"id": job_id})
        for client in clients:
            db.execute(statements.ERASURE_ADD, {"id": job_id, "client": client})
        db.execute(statements.ERASURE_DONE, {"id": job_id, "client": ""})
        self.store.core.moved.add(job_id)

    def reason(self, clients: Iterable[str]) -> str:
        """Return what the history says of a deletion. Clients of job-orchestrator 2.2 cannot be asked for it."""
        links = self.node.links if isinstance(self.node, Server) else {}
        old = sorted(name for name in clients if name in links and not links[name].protocol.has_events)
        return Reason.ERASED_22.format(clients=", ".join(old)) if old else Reason.ERASED

    def erase_at(self, server: Server, link: Link) -> None:
        """Ask a client to delete what it has of jobs. One that does not answer is asked again when it does."""
        if link.held() or not link.answers:
            return
        for row in self.store.read(statements.ERASURES_AT, client=link.name, limit=AT_ONCE):
            job = self.store.get(row["job_id"])
            try:
                if job is not None and not self.ask(link, job):
                    continue
            except (NothingSent, NoAnswer) as error:
                link.note(f"has not deleted job {row['job_id']} yet: {error}", level=20)
                return
            crash_point("erase.asked")
            self.client_done(row["job_id"], link.name)

    def client_done(self, job_id: int, client: str) -> None:
        """Note that nothing is left to do at a client."""

        def done(db: sqlite3.Connection) -> None:
            db.execute(statements.ERASURE_DONE, {"id": job_id, "client": client})
            self.store.core.moved.add(job_id)

        self.store.write(done)

    @staticmethod
    def ask(link: Link, job: Job) -> bool:
        """Ask a client to delete a job. Return whether it has nothing of it any more, or cannot be asked at all."""
        if not link.protocol.has_events:
            log.info("job %d: %s is a 2.2 client, which cannot delete its files on request; it removes them later", job.id, link.name)
            return True
        answer = link.call("DELETE", f"{link.address.base_url}/payloads/{job.uuid}", ASK_TIMEOUT_S, service=job.service)
        text = read_some(answer, KIB)
        if answer.status in (404, 405):
            log.warning("job %d: %s is too old to delete it on request; it removes its files and rows later", job.id, link.name)
            return True
        if answer.status not in (200, 202):
            raise NoAnswer(refused_text(answer.status, text))
        return answer.status == 200

    def overwrite(self) -> None:
        """Overwrite deleted texts in unused parts of the database and in its log."""
        now = self.node.clock.monotonic()
        if self.store.path == ":memory:" or not self.store.number(statements.REMNANTS):
            return
        try:
            if not self.rewritten and now >= self.rewrite_due and self.is_rewrite_harmless(now):
                self.rewrite()
            if self.rewritten and self.empty_log():
                crash_point("erase.rewritten")
                self.store.write(self.forget_remnants)
                self.rewritten = []
        except (sqlite3.Error, OSError) as error:
            self.rewrite_due = now + TRY_AGAIN_S
            log.warning("the database cannot be rewritten to overwrite deleted texts: %s; it is tried again in an hour", error)

    def rewrite(self) -> None:
        """Write the whole database anew, because SQLite leaves copies of rows in unused parts of its pages. Other writes wait for that."""
        begun = self.node.clock.monotonic()
        size, deleted = os.path.getsize(self.store.path), [row["job_id"] for row in self.store.read(statements.REMNANTS_ALL)]
        with self.store.core.inside():
            self.store.db.execute(statements.REWRITE)
        took_s = self.node.clock.monotonic() - begun
        self.rewrite_due = begun + took_s + (REWRITE_SHARE * took_s if size <= SMALL_BYTES else DAY_S)
        self.rewritten, self.waits_since = deleted, None
        log.info("the database was rewritten in %.1f s, because jobs were deleted", took_s)

    def empty_log(self) -> bool:
        """Write all pages to the database and empty its log. Return False if a reader prevents that now."""
        with self.store.core.inside():
            self.store.db.execute(statements.NO_PATIENCE)  # nobody else can write while it waits for readers here
            try:
                return not self.store.db.execute(statements.CHECKPOINT_ALL).fetchone()[0]
            finally:
                self.store.db.execute(statements.PATIENCE)

    def forget_remnants(self, db: sqlite3.Connection) -> None:
        """All is overwritten: wake the callers that wait for it."""
        for job_id in self.rewritten:
            db.execute(statements.REMNANT_GONE, {"id": job_id})
        self.store.core.moved.update(self.rewritten)

    def is_rewrite_soon(self) -> bool:
        """Tell whether a caller should wait for the next rewrite."""
        soon = self.node.clock.monotonic() + LOOK_S
        return bool(self.rewritten) or (self.rewrite_due <= soon and self.is_rewrite_harmless(soon))

    def is_rewrite_harmless(self, now: float) -> bool:
        """Tell whether the database is small, or nobody writes to it, or this has been waited for long enough."""
        if os.path.getsize(self.store.path) <= SMALL_BYTES:
            return True
        self.waits_since = now if self.waits_since is None else self.waits_since
        return now - self.moved_at >= QUIET_S or now - self.waits_since >= DAY_S

    def has_remnants(self, job_id: int) -> bool:
        """Tell whether texts of a job may be in unused parts of the database, and are overwritten soon."""
        return self.is_rewrite_soon() and bool(self.store.read(statements.REMNANT_OF, id=job_id))


# == 2. Routes ==  For people and portals at the server; and for servers at their clients.

EXAMPLE_DELETED = {"id": 42, "status": "Cleaned", "message": "deleted", "pending": []}
LATER = "it is deleted at gpu1:9000 as soon as that client answers"
DELETED = Gives("its files and texts are deleted, here and at its clients", JSON_TYPE, EXAMPLE_DELETED)
DELETED_LATER = Gives(
    "it is noted, and done as soon as it can be: `pending` names the clients where something is left",
    JSON_TYPE,
    {**EXAMPLE_DELETED, "message": LATER, "pending": ["gpu1:9000"]},
)


@route(
    "DELETE",
    "/jobs/<job_id>",
    "server",
    who="user portal operator",
    takes=(ID,),
    gives={200: DELETED, 202: DELETED_LATER, 400: BAD, 404: NOT_FOUND},
)
def delete_job(server: Server, request: Request, job_id: int) -> Answer:
    """Stop a job and delete its files, name, reason and texts, here and at its clients. Its figures stay. It may be repeated."""
    job, privacy = known_job(server, request, job_id), server.plugins["privacy"]
    privacy.note([job.id])
    privacy.do_now()

    def is_done() -> bool | None:
        return None if privacy.left_of(job.id) or privacy.has_remnants(job.id) else True

    with server.places.place() as parked:
        server.wait_until(is_done, WAIT_S if parked else 0.0, lambda: request.left() or is_hopeless(server, job.id), job.id)
    job, left = known_job(server, request, job_id), privacy.left_of(job.id)
    message = later_text(job, left) if left else "deleted"
    said = {"id": job.id, "status": job.status.value, "message": message, "pending": list(filter(None, left))}
    return Answer(said, 202 if left else 200, {"X-Job-Status": job.status.value})


def is_hopeless(server: Server, job_id: int) -> bool:
    """Tell whether a deletion waits for clients that do not answer."""
    job, names = server.store.get(job_id), server.plugins["privacy"].left_of(job_id)
    waits_for = [job.client if not name and job and job.status not in OVER else name for name in names]
    links = [server.links.get(name) for name in waits_for if name]
    return bool(waits_for) and all(waits_for) and all(link is None or bool(link.outage.failures) for link in links)


def later_text(job: Job, left: list[str]) -> str:
    """Return what a deletion waits for, in a sentence."""
    if "" not in left:
        return f"it is deleted at {' and '.join(left)} as soon as {'that client answers' if len(left) == 1 else 'these clients answer'}"
    if job.status in OVER:
        return "its files are being deleted"
    return f"it is deleted as soon as it is stopped{f' at {job.client}' if job.client else ''}"


USER_ID = Parameter("user_id", "path", "integer", "the number of a user", 7, required=True, least=SMALLEST, most=BIGGEST)
EXAMPLE_USER = {"user_id": 7, "jobs": 12, "pending": 0, "message": "deleted"}
USER_DELETED = Gives("the files and texts of all jobs of the user are deleted; `jobs` counts them", JSON_TYPE, EXAMPLE_USER)
USER_LATER = Gives(
    "it is noted, and done as soon as it can be; `pending` is for how many jobs something is left to do",
    JSON_TYPE,
    {**EXAMPLE_USER, "pending": 1, "message": "1 job is deleted as soon as it is stopped, or its client answers"},
)


@route("DELETE", "/users/<user_id>", "server", who="operator", takes=(USER_ID,), gives={200: USER_DELETED, 202: USER_LATER, 400: BAD})
def delete_user(server: Server, request: Request, user_id: int) -> Answer:
    """Delete all jobs of a user as DELETE /jobs/ID does: files, names, reasons and texts. Figures stay. It may be repeated."""
    privacy = server.plugins["privacy"]
    privacy.note_user(user_id)
    privacy.do_now()

    def left() -> int:
        return server.store.number(statements.ERASURES_COUNT_OF_USER, user_id=user_id)

    def is_done() -> bool | None:
        is_rewriting = privacy.is_rewrite_soon() and server.store.read(statements.REMNANT_OF_USER, user_id=user_id)
        return None if left() or is_rewriting else True

    with server.places.place() as parked:  # each look counts them: not for many
        server.wait_until(is_done, WAIT_S if parked and left() <= AT_ONCE else 0.0, request.left)
    jobs, pending = server.store.number(statements.COUNT_OF_USER, user_id=user_id), left()
    text = f"{plural(pending, 'job is', 'jobs are')} deleted as soon as it can be: when stopped, and when its client answers"
    said = {"user_id": user_id, "jobs": jobs, "pending": pending, "message": text if pending else "deleted"}
    return Answer(said, 202 if pending else 200)


UUID = Parameter("uuid", "path", "string", "the uuid of a job", "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0", required=True, read=read_uuid)
EXAMPLE_GONE = {"uuid": UUID.example, "payloads": 1, "left": 0}
GONE_HERE = Gives("nothing is left but figures of `payloads` attempts of this job", JSON_TYPE, EXAMPLE_GONE)
GONE_LATER = Gives("it is being done; `left` attempts are not deleted yet", JSON_TYPE, {**EXAMPLE_GONE, "left": 1})


@route("DELETE", "/payloads/<uuid>", "client", who="operator", takes=(UUID,), gives={200: GONE_HERE, 202: GONE_LATER, 400: BAD})
def delete_payloads(client: Client, request: Request, uuid: str) -> Answer:
    """Stop all attempts of a job and delete their files, reasons and texts. It may be repeated."""
    jobs, privacy = client.store.jobs(statements.PAYLOADS_OF_JOB, uuid=uuid), client.plugins["privacy"]
    if jobs:
        privacy.note([job.id for job in jobs])
        privacy.do_now()

    def left() -> list[Job]:
        return [job for job in jobs if privacy.left_of(job.id) or privacy.has_remnants(job.id)]

    with client.places.place() as parked:
        waits = parked and client.store.number(statements.REMNANTS_COUNT) <= FEW  # for many, a server asks again
        client.wait_until(lambda: None if left() else True, ANSWER_S if waits else 0.0, request.left, frozenset(job.id for job in jobs))
    return Answer({"uuid": uuid, "payloads": len(jobs), "left": len(left())}, 202 if left() else 200)
