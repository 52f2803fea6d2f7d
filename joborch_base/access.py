"""Whose job is whose, and what each caller has done: the one place that knows what a caller may see.

1. Ownership
2. Records
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from joborch_base.files import Form
from joborch_base.routes import Answer, Caller, Request, Route
from joborch_base.settings import Config
from joborch_base.states import Filter, Job
from joborch_base.vocabulary import Clock, HttpError, log, one_line, plural, rfc3339

if TYPE_CHECKING:
    from joborch import Node

# == 1. Ownership ==  A route says which roles may call it; what they may see of the jobs is decided here.


def sees(caller: Caller | None, job: Job) -> bool:
    """Tell whether a caller may see a job: users their own, portals those of their services, readers and operators all.

    A client shows all of its payloads to the servers that have its token.
    """
    if caller is None or caller.role == "client":
        return False
    return job.user_id == caller.user if caller.role == "user" else sees_service(caller, job.service or "")


def sees_service(caller: Caller | None, name: str) -> bool:
    """Tell whether a caller may use a service and see its figures."""
    return caller is not None and (not caller.services or name in caller.services)


def sees_site(caller: Caller | None) -> bool:
    """Tell whether a caller may see the whole site: clients, problems, and the figures of all users."""
    return caller is not None and caller.role in ("reader", "operator", "server")


def known_job(node: Node, request: Request, job_id: int) -> Job:
    """Return a job that the caller of `request` may see. Raises HttpError 404, with no difference between no job and another's.

    All routes for one job find it here.
    """
    job = node.store.get(job_id)
    if job is None or not sees(request.caller, job):
        raise HttpError(404, f"no job has the id {job_id}")
    return job


def check_user(caller: Caller | None, user_id: int | None) -> None:
    """Raise HttpError 404 if a caller names a user of whom it may see nothing."""
    if caller is not None and caller.role == "user" and user_id not in (None, caller.user):
        raise HttpError(404, f"the token {caller.name} is for user {caller.user}, and knows no user {user_id}", "user_id")


def narrowed(caller: Caller | None, of: Filter) -> Filter:
    """Return `of`, narrowed to what the caller may see. Raises HttpError 404 as `check_user` does."""
    if caller is None:
        raise HttpError(403, "who calls is not known")
    check_user(caller, of.user_id)
    if caller.role == "user":
        return of._replace(user_id=caller.user)
    return of._replace(services=caller.services)


def check_form(node: Node, request: Request, form: Form, retried: Job | None = None) -> None:
    """Check the fields of a job, and fill in its user if that is known. Raises HttpError 403 or 400 for what the caller may not name.

    What is said of a job that the caller may not see is what is said of one that does not exist: see `Store.still_open`.
    """
    caller, fields = request.caller, form.fields
    if caller is None:
        raise HttpError(403, "who calls is not known")
    if caller.role == "user":
        named = fields.setdefault("user_id", str(caller.user)).strip()
        if not re.fullmatch(r"[+-]?[0-9]{1,30}", named) or int(named) != caller.user:
            remedy = f"leave user_id out, or give {caller.user}"
            raise HttpError(403, f"the token {caller.name} is for user {caller.user}: {remedy}", "user_id")
    if retried and fields.setdefault("user_id", str(retried.user_id)).strip() != str(retried.user_id):
        raise HttpError(400, f"user_id is another: job {retried.id} and its retries belong to user {retried.user_id}", "user_id")
    service = fields.get("service", "").strip().lower()
    if service and not sees_service(caller, service):
        names = " or ".join(caller.services)
        raise HttpError(403, f"the token {caller.name} is not for service {one_line(service, 80)!r}: give {names}", "service")
    for field in ("after", "inputs_from"):
        for text in map(str.strip, fields.get(field, "").split(",")):
            job = node.store.get(int(text)) if re.fullmatch(r"[0-9]{1,18}", text) else None
            if job is not None and not sees(caller, job):
                raise HttpError(400, f"{field}: user {one_line(fields.get('user_id', ''), 30)} has no job {job.id}", field)


# == 2. Records ==  What callers have changed, for the audit log, and how often they upload.

AUDIT_NAME = "audit.jsonl"  # in the data folder


class AuditLog:
    """One JSON line for each call that changes something. The file may be moved away at any time: the next line creates a new one."""

    def __init__(self, config: Config, clock: Clock) -> None:
        default = os.path.join(config.data_path, AUDIT_NAME) if config.mode == "server" else ""
        self.path = "" if config.audit_file == "0" else config.audit_file or default
        self.clock, self.failed = clock, False

    def note(self, request: Request, declared: Route, answer: Answer) -> None:
        """Append the line of a call that has changed something. A failure is logged once, until a line can be written again."""
        caller = request.caller
        if not self.path or caller is None or declared.method == "GET" or answer.status >= 400:
            return
        target = one_line("?".join(filter(None, (request.environ.get("PATH_INFO", ""), request.environ.get("QUERY_STRING", "")))), 500)
        said: dict[str, Any] = {"at": rfc3339(self.clock.wall()), "caller": caller.name, "role": caller.role, "proof": caller.proof}
        said.update({"from": request.environ.get("REMOTE_ADDR", ""), "call": f"{declared.method} {target}", "status": answer.status})
        if isinstance(answer.body, dict):
            said.update({name: answer.body[name] for name in ("id", "user_id", "service") if name in answer.body})
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, (json.dumps(said) + "\n").encode())
            finally:
                os.close(file)
            self.failed = False
        except OSError as error:
            if not self.failed:
                log.error("the audit log %s cannot be written: %s", self.path, os.strerror(error.errno or 0).lower())
            self.failed = True


PACE_S = 60.0
USERS_KEPT = 10_000  # beyond this number, users without an upload in the last minute are forgotten


class UploadPace:
    """Counts each user's uploads of the last minute."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.lock, self.sent = clock, threading.Lock(), dict[int, deque[float]]()

    def take(self, user_id: int, most: int) -> None:
        """Count an upload. Raises HttpError 429 if the user has sent `most` in the last minute (0: no limit)."""
        if not most:
            return
        with self.lock:
            now = self.clock.monotonic()
            if len(self.sent) > USERS_KEPT:
                self.sent = {user: times for user, times in self.sent.items() if times[-1] > now - PACE_S}
            times = self.sent.setdefault(user_id, deque())
            while times and times[0] <= now - PACE_S:
                times.popleft()
            if len(times) >= most:
                said = f"user {user_id} has sent {plural(most, 'job', 'jobs')} in the last minute (JOBORCH_UPLOADS_PER_MINUTE)"
                again_s = max(1, round(times[0] + PACE_S - now + 0.5))
                raise HttpError(429, f"{said}: try again in {again_s} s", "user_id", Retry_After=str(again_s))
            times.append(now)
