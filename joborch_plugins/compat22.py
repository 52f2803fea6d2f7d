"""Peers of job-orchestrator 2.2: how a server works with a 2.2 client, and how JOBORCH_COMPAT=2.2 answers web back ends."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from joborch import (
    AT_CLIENT,
    BUSY,
    KIB,
    READ_TIMEOUT_S,
    BadAnswer,
    ClientProtocol,
    FilesBody,
    Gone,
    Input,
    Job,
    Link,
    Reason,
    Rejected,
    Server,
    become_unknown,
    new_attempt,
    one_line,
    payload_gone,
    queue_info_of,
    read_some,
    report,
)

PAUSE_FIRST_S, PAUSE_LAST_S = 0.2, 5.0  # between two polls of one job
PING_S = 10.0  # how often a client without jobs is pinged


class Protocol22(ClientProtocol):
    """A 2.2 client: it has no proofs, no events and no attempt keys, and numbers payloads from 1 again after a restart."""

    can_prove = has_events = keeps_folders = knows_keys = False
    kill_timeout_s = READ_TIMEOUT_S

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.one_at_a_time = threading.Lock()
        self.poll_due: dict[int, tuple[float, float]] = {}  # by job id: when (monotonic), and the pause after it in seconds

    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """Return a lock: after a restart an id may mean another payload, so no call may overtake a submit."""
        return self.one_at_a_time

    def unproven_headers(self, service: str | None) -> dict[str, str]:
        """Return the token, if one is set for 2.2 clients. Each call uses a new connection.

        A submit on a kept connection would be lost if the client had closed it.
        """
        shown = self.link.set_token(service) if self.link.may_be_22() else ""
        return {"Connection": "close", **({"Authorization": f"Bearer {shown}"} if shown else {})}

    def get_news(self, server: Server) -> bool:
        """Ask about each job that is due, with growing pauses. If there is none, check that the client answers."""
        link, now = self.link, server.clock.monotonic()
        jobs = [job for job in server.store.jobs(AT_CLIENT, client=link.name) if job.dest_id]
        if link.heard_at is None or not link.answers or (not jobs and now - link.heard_at > PING_S):
            self.probe()
            link.heard()
            server.wake(f"send:{link.name}")
            server.dispatch()
        for job in jobs:
            due, pause_s = self.poll_due.get(job.id, (0.0, PAUSE_FIRST_S))
            if due <= now and link.of(job.id).end is None:
                self.poll_due[job.id] = (now + pause_s, min(pause_s * 1.5, PAUSE_LAST_S))
                self.poll(server, job)
        known = {job.id for job in jobs}
        self.poll_due = {job_id: due for job_id, due in self.poll_due.items() if job_id in known}
        return False

    def poll(self, server: Server, job: Job) -> None:
        """Ask about one job."""
        link = self.link
        with self.turn():
            current = server.store.get(job.id)
            if current is None or current.dest_id != job.dest_id or current.status not in BUSY:
                return
            try:
                payload = link.status(job)
            except Gone as error:
                payload_gone(server, current, str(error))
                return
            except BadAnswer as error:
                become_unknown(server, current, Reason.NOT_SENT.format(client=link.name, error=error))
                return
        link.heard()
        report(server, link, {**payload, "uuid": job.uuid, "attempt": job.attempt, "id": job.dest_id})

    def probe(self) -> None:
        """Check that the client answers; any HTTP answer will do. Raises NothingSent or NoAnswer."""
        parts = urlsplit(self.link.address.upload_url)
        read_some(self.link.call("GET", f"{parts.scheme}://{parts.netloc}/", read_timeout_s=10), KIB)

    def form(self, job: Job, folder: Path, paths: Sequence[str], more: Sequence[Input]) -> tuple[FilesBody, dict[str, str]]:
        """Return the form without digests, which a 2.2 client would treat as a file.

        Raises Rejected if two files have the same base name: a 2.2 client flattens folders and would silently lose one.
        So it does for results of other jobs, whose script looks for them in from/ID/.
        """
        if more:
            raise Rejected("a 2.2 client flattens folders, so it cannot get results of other jobs: send the files themselves")
        names = [path.rpartition("/")[2] for path in paths]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise Rejected(f"a 2.2 client flattens folders, and two files are called {one_line(twice[0])!r}: give each a different name")
        return FilesBody(folder, paths, False, job.inputs_sha256), {}

    def accepted(self, server: Server, payload_id: str) -> None:
        """Start new attempts of jobs with the same or a later id: the client has restarted and counts from 1 again, so they are lost."""
        for job in server.store.jobs(AT_CLIENT, client=self.link.name):
            if job.dest_id and int(job.dest_id) >= int(payload_id):
                new_attempt(server, job, Reason.BEGAN_ANEW.format(client=self.link.name))

    def logs_url(self, job: Job, stream: str, offset: int) -> str:
        """Raise Gone: a 2.2 client has no such route."""
        raise Gone(f"{self.link.name} shows no output while a script runs: it is a 2.2 client")


def download_json(server: Server, job: Job) -> dict[str, Any]:
    """Return the answer of GET /download/ID with JOBORCH_COMPAT=2.2 for a job that is not Completed."""
    return {"id": job.id, "status": job.status.value, "message": queue_info_of(server, job).waiting_for or job.reason or str(job.status)}
