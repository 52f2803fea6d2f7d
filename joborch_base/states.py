"""The states of a job, which moves are legal, and why a job ends.

1. States
2. Reasons
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import signal
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from joborch_base.files import last_line, open_regular, script_head, script_hints
from joborch_base.vocabulary import KIB, format_duration, one_line, plural

# == 1. States ==  The tables of legal moves, and the row that moves. No status changes in a way that is not listed here.


class Status(str, Enum):
    """The states of a job on the server, and of a payload on a client; the names are those of job-orchestrator 2.2."""

    QUEUED = "Queued"
    PROCESSING = "Processing"
    SUBMITTED = "Submitted"
    PREPARED = "Prepared"
    RUNNING = "Running"
    COMPLETED = "Completed"
    FAILED = "Failed"
    INVALID = "Invalid"
    KILLED = "Killed"
    UNKNOWN = "Unknown"
    CLEANED = "Cleaned"

    def __str__(self) -> str:
        return self.value


class Cause(str, Enum):
    """What made a job end: its script, a limit, the infrastructure, or a request."""

    USER = "user"
    LIMIT = "limit"
    INFRASTRUCTURE = "infrastructure"
    CANCELLED = "cancelled"

    def __str__(self) -> str:
        return self.value


BUSY = (Status.PROCESSING, Status.SUBMITTED, Status.RUNNING, Status.UNKNOWN)  # at a client; quotas count these
ENDED = (Status.COMPLETED, Status.FAILED, Status.INVALID, Status.KILLED)
OVER = (*ENDED, Status.CLEANED)

SERVER_MOVES: tuple[tuple[Status, Status, str], ...] = (
    (Status.QUEUED, Status.PROCESSING, "it was claimed: its user's quota, the service's limit and a client had room"),
    (Status.QUEUED, Status.KILLED, "terminated before it was sent"),
    (Status.QUEUED, Status.FAILED, "no client of the service answered for too long"),
    (Status.QUEUED, Status.INVALID, "a job that it waited for did not complete"),
    (Status.PROCESSING, Status.SUBMITTED, "a client accepted it"),
    (Status.PROCESSING, Status.QUEUED, "it was not sent: the client has nothing of it"),
    (Status.PROCESSING, Status.UNKNOWN, "it was sent, but no answer arrived"),
    (Status.PROCESSING, Status.INVALID, "a client refuses it and will not accept it later"),
    (Status.PROCESSING, Status.KILLED, "terminated"),
    (Status.PROCESSING, Status.FAILED, "its input files are missing or were changed on the server"),
    (Status.SUBMITTED, Status.RUNNING, "the client reports it"),
    *((source, to, why) for source in (Status.SUBMITTED, Status.RUNNING) for to, why in (
        (Status.COMPLETED, "result fetched, verified, on disk"),
        (Status.FAILED, "the script failed, or no attempt is left"),
        (Status.INVALID, "the payload cannot be run"),
        (Status.UNKNOWN, "the client does not answer, or the result could not be fetched"),
        (Status.QUEUED, "a new attempt after an infrastructure failure"),
        (Status.KILLED, "terminated"),
    )),
    (Status.UNKNOWN, Status.SUBMITTED, "the client answered again"),
    (Status.UNKNOWN, Status.RUNNING, "the client answered again"),
    (Status.UNKNOWN, Status.COMPLETED, "the client answered again"),
    (Status.UNKNOWN, Status.FAILED, "the client answered again, or no attempt is left"),
    (Status.UNKNOWN, Status.INVALID, "the client answered again"),
    (Status.UNKNOWN, Status.QUEUED, "a new attempt: the client lost it or was silent too long"),
    (Status.UNKNOWN, Status.KILLED, "terminated"),
    *((source, Status.CLEANED, "older than MAX_AGE since it ended") for source in ENDED),
)  # fmt: skip

CLIENT_MOVES: tuple[tuple[Status, Status, str], ...] = (
    (Status.PREPARED, Status.RUNNING, "a slot is free; the row is written before the start"),
    (Status.PREPARED, Status.INVALID, "it has no usable run.sh"),
    (Status.PREPARED, Status.FAILED, "it could not be started"),
    (Status.PREPARED, Status.KILLED, "stopped on request"),
    (Status.RUNNING, Status.COMPLETED, "exit status 0"),
    (Status.RUNNING, Status.FAILED, "another exit status, a signal, a limit, or a lost machine"),
    (Status.RUNNING, Status.KILLED, "stopped on request"),
    *((source, Status.CLEANED, "its files are old enough") for source in ENDED),
)

MOVES: Mapping[str, frozenset[tuple[Status, Status]]] = {
    "server": frozenset((source, to) for source, to, _ in SERVER_MOVES),
    "client": frozenset((source, to) for source, to, _ in CLIENT_MOVES),
}


FIGURES = ("peak_memory", "cpu_time")  # what a payload has used: columns of jobs and of attempts


class Job(NamedTuple):
    """One row: a job of the server, or a payload of a client (a job that may have no user and no service)."""

    id: int
    uuid: str
    user_id: int | None
    service: str | None
    name: str | None
    status: Status
    reason: str
    cause: str | None
    exit_code: int | None
    signal: int | None
    priority: int
    cpus: int
    memory: int | None  # MiB
    timeout: float | None  # seconds of run time
    retries: int
    return_inputs: int
    attempt: int
    client: str | None  # server: the name of its Address
    dest_id: str | None  # server: the payload's id at its client
    remote_id: str | None  # client: the job's id at its server
    handle: str | None  # client: what the executor calls it
    idempotency_key: str | None
    request_digest: str | None
    result_size: int | None  # bytes
    result_sha256: str | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    not_before: float | None  # steady time: a new attempt waits until then
    fetched_at: float | None  # client: a server has the result
    kill_requested_at: float | None  # wall time; a request to stop a job is a column, not a state
    kill_cause: str | None
    moves: int
    changed: int | None  # client: the number of its last change, for /events
    moved_at: float  # steady time of its last change of status
    synced: int  # client: 1 if its files are safely on the disk, 2 if a server has confirmed that it holds the result
    inputs_sha256: str | None  # server: digest of the list of its files and their digests
    after_ids: str  # server: ids of the jobs that must be Completed first, separated by commas
    blocked: int  # server: how many of those have not ended
    arrived_at: float  # steady time of its upload: its place in the queue through all attempts
    charged: float  # server: slot-seconds charged to its user for this attempt
    ended_as: str | None  # the status that a Cleaned job ended with; see `end`
    retry_of: int | None  # server: the job that it repeats
    from_ids: str  # server: ids of the jobs whose results it gets, separated by commas
    callback_url: str | None  # server: where its webhooks go
    inputs_size: int | None  # server: bytes of its files; None: a job of an earlier version
    kill_by: str | None  # server: the token of whoever asked to stop it, if that has a name
    gpus: int  # GPUs that it needs
    peak_memory: int | None  # bytes; None: not known
    cpu_time: float | None  # seconds; None: not known

    @property
    def pair(self) -> tuple[str, int]:
        """Return the service and the user, whose share it is: see Shares."""
        return self.service or "", self.user_id or 0

    @property
    def mark(self) -> str:
        """The attempt key: unique among all attempts of all jobs."""
        return f"{self.uuid}.{self.attempt}"

    @property
    def end(self) -> str | None:
        """The status that it ended with, also after its files were cleaned; None until it ends."""
        return self.status.value if self.status in ENDED else self.ended_as


STATUS_AT = Job._fields.index("status")
ATTEMPT = ("attempt", "client", "dest_id", "started_at", "ended_at", "exit_code", "signal", "reason", "cause", *FIGURES)
MOVABLE = (  # what a move may change besides status and reason
    *("cause", "exit_code", "signal", "attempt", "client", "dest_id", "started_at", "ended_at"),
    *("not_before", "result_size", "result_sha256", *FIGURES),
)


class Move(NamedTuple):
    """A change of a job's status, as plug-ins get it."""

    job: Job  # before it; a new job as it was stored
    source: Status | None  # None: it is new
    to: Status
    at: float  # steady time
    changes: Mapping[str, Any]  # new values of columns
    run_s: float | None = None  # how long the payload ran, if the move ends it on the server


@dataclass(frozen=True)
class NewJob:
    """The columns of a new row that its creator chooses."""

    uuid: str
    user_id: int | None = None
    service: str | None = None
    name: str | None = None
    priority: int = 0
    cpus: int = 1
    memory: int | None = None
    timeout: float | None = None
    retries: int = 0
    return_inputs: int = 1
    attempt: int = 1
    remote_id: str | None = None
    idempotency_key: str | None = None
    request_digest: str | None = None
    inputs_sha256: str | None = None
    after_ids: str = ""
    blocked: int = 0
    retry_of: int | None = None
    from_ids: str = ""
    callback_url: str | None = None
    inputs_size: int | None = None
    gpus: int = 0

    @property
    def after(self) -> list[int]:
        return ids_in(self.after_ids)


NEW_COLUMNS = (
    *(item.name for item in dataclasses.fields(NewJob)),
    *("status", "reason", "created_at", "moves", "changed", "moved_at", "arrived_at"),
)


class Filter(NamedTuple):
    """Which jobs or moves a list shows; None stands for all."""

    user_id: int | None = None
    service: str | None = None
    statuses: tuple[str, ...] = ()
    cause: str | None = None
    name: str | None = None  # how the name begins
    since: float | None = None  # wall time
    until: float | None = None  # wall time; not included
    services: tuple[str, ...] = ()  # only these; empty: all

    def values(self) -> dict[str, Any]:
        """Return the parameters of a statement."""
        lists = {name: f"/{'/'.join(getattr(self, name))}/" if getattr(self, name) else None for name in ("statuses", "services")}
        return {**self._asdict(), **lists}

    def span(self) -> dict[str, float]:
        """Return its times as parameters of a statement that compares with both; infinite if they are not given."""
        return {"since": -math.inf if self.since is None else self.since, "until": math.inf if self.until is None else self.until}

    def narrows(self) -> bool:
        """Tell whether rows may have to be examined that do not match."""
        return sum(value not in (None, ()) for value in self[:5]) > 1 or (self.cause, self.name, self.services) != (None, None, ())


def ids_in(text: str) -> list[int]:
    """Return the ids in a text that separates them by commas."""
    return [int(part) for part in text.split(",") if part]


def as_job(row: sqlite3.Row) -> Job:
    """Return a row of jobs as a Job."""
    values = list(row)
    values[STATUS_AT] = Status(values[STATUS_AT])
    return Job._make(values)


# == 2. Reasons ==  Every reason why a job fails, is killed or becomes Unknown is worded here; errors and plug-ins add their facts.


class Reason:
    """Templates of reasons; facts are in braces: `Reason.REFUSED.format(client=..., error=...)`.

    `{error}` is the text of a Rejected, Gone, NothingSent, NoAnswer or CannotRun. Reasons that only Slurm or DIRAC can give
    are worded by functions of their plug-ins.
    """

    # The server sends a job.
    CLAIMED = "claimed for {client}"
    ACCEPTED = "accepted by {client}"
    FOUND_THERE = "{client} has it"
    FILES_REMOVED = "its files were removed from the {where}'s disk"
    FILES_CHANGED = "its files on the server's disk are not those that were uploaded: some were changed or removed"
    RESULT_LOST = "the result of job {job}, which it gets as input, is missing or damaged on the server's disk"
    TOO_MANY_INPUTS = "it has {limit:,} files or more together with the results that it gets as inputs, which is too many"
    REFUSED = "{client} refuses it: {error}"
    NOT_SENT = "{client} {error}"
    ANSWER_LOST = "{client} {error}: the job is sent there again under the same key"
    ANSWER_LOST_22 = "{client} {error}, and cannot say whether it has the job"
    CANNOT_SAY = "{client} cannot say whether it has the job"
    BEGAN_ANEW = "{client} was restarted and has lost it"
    ANSWER_NOT_STORED = "the client's answer could not be stored: the job is sent there again under the same key"
    SERVER_RESTARTED = "the server was restarted while sending it to {client}: it is sent there again under the same key"
    CHAIN_BROKEN = "job {job}, which it follows, ended as {status}"

    # A client is silent, or its answer cannot be used.
    TRIED_AGAIN = "{reason}; it is tried again"
    ANSWERS_AGAIN = "{client} answers again"
    NOT_CONFIGURED = "{client} is no longer configured"
    SILENT = "{trouble}; no answer for {duration}"
    SILENT_AND_KILLED = "{trouble}; no answer for {duration}; if it comes back, the job is stopped there"
    UNREACHABLE = "client unreachable: no client of {service} answered for {duration}"
    NO_SERVICE = "service {service} has not been configured for {duration}"
    CLIENT_FAILED = "{client} failed"
    INSTANCE_GONE = "the instance {client} is gone: {reason}"

    # An attempt is over.
    ATTEMPT = "attempt {attempt}: {reason}"
    NO_ATTEMPT_LEFT = "{reason}; no attempt is left of {attempt}"
    NO_ATTEMPT_KILLED = "{reason}; terminate was requested"
    KILLED = "terminated on request"
    KILLED_AND_GONE = "terminated on request; {reason}"
    KILLED_UNSENT = "terminated before it was sent"
    COMPLETED = "run.sh ended with exit status 0"
    COMPLETED_CHILDREN = "run.sh ended with exit status 0; processes that it left running were killed"
    CLIENT_SAYS = "the client says {status}"

    # The result is lost, too large, or cannot be fetched.
    RESULT_HAS = "the result has {too_much}"
    RESULT_HAS_EXIT = "the result has {too_much}; run.sh ended with exit status {status}"
    NOT_KEPT = "{reason}; its files were not kept: {error}"
    NOT_FETCHED = "the result could not be fetched from {client}: {error}"
    NOT_STORED = "the result could not be stored: {error}"
    CLIENT_HAS_NOTHING = "{client} no longer has its files"
    CLIENT_CLEANED = "{client} no longer has its files: {reason}"
    FAILED_AND_CLEANED = "{reason}; {cleaned}"
    RUN_FAILED = "run.sh failed"
    WORK_REMOVED = "its work folder was removed from the client's disk"
    CLEANED = "{duration} after it ended"
    ERASED = "deleted on request"
    ERASED_22 = "deleted on request; {clients} cannot do that, and removes its copies later by itself"

    # The client cannot start a payload, or loses it.
    NO_SCRIPT = "there is no run.sh: upload a bash script of that name"
    EMPTY_SCRIPT = "run.sh is empty: it has 0 bytes"
    NOT_STARTED = "the client could not start it: {error}"
    DISK_FULL = "the client's disk is full: the script was not started"
    NO_WRAPPER = "the wrapper could not be started, or stopped too early: the script was not started"
    REBOOTED = "the machine or the container was restarted while the script ran"
    REBOOTED_UNSYNCED = "the machine was restarted, and what had reached its disk is not known"
    FOLDER_REMOVED = "the payload's folder was removed while the script ran"
    WORK_GONE = "its work folder was removed or replaced while run.sh ran, and its files are missing"
    WORK_GONE_EXIT = WORK_GONE + " (run.sh ended with exit status {status})"
    ENDED_WITH_CLIENT = "the script's processes were stopped together with the client, or while it did not run, and left no exit status"
    WRAPPER_KILLED = "the wrapper was killed and left no exit status: the script killed it, or the kernel did because memory was short"
    WRAPPER_GONE = (
        "the wrapper was killed and left no exit status: its script cannot do that (JOBORCH_ISOLATION), "
        "so it was the kernel because memory was short, or somebody on the machine"
    )
    OVER_MEMORY = "it used {used} of the {limit} of memory asked for"
    OVER_PROCESSES = "it ran {used} processes and threads at once, more than the {limit} that JOBORCH_MAX_PROCESSES allows"
    OVER_CPU_TIME = "it used {used:.1f} s of CPU time, more than the {limit:.10g} s that JOBORCH_MAX_CPU_TIME allows"
    OVER_WORK = "its work folder and TMPDIR had {used}, more than the {limit} that JOBORCH_MAX_WORK allows"
    OVER_FILE = "it wrote to a file more than the {limit} that JOBORCH_MAX_WORK allows"
    OVER_EXIT = "{over}; run.sh ended with exit status {status}"
    ISOLATION_FAILED = "what isolates its script (JOBORCH_ISOLATION) failed, or was killed{words}"
    STOPPED_WITH_CLIENT = (
        "it was stopped from outside joborch, together with the client: run.sh ended with exit status {status}; "
        "if a service manager did it, set KillMode=process for the client"
    )
    STOPPED_WITH_WRAPPER = (
        "it was stopped from outside joborch, together with its wrapper: run.sh ended with exit status {status}; "
        "if a service manager did it, set KillMode=process for the client"
    )


def failure_reason(folder: Path, exit_status: int, run_s: float) -> str:
    """Say how a script failed: exit status or signal, run time, the last line of its standard error, and a known remedy."""
    signalled = f" (as by signal {signal_name(exit_status - 128)})" if is_signalled(exit_status) else ""
    text = f"run.sh ended with exit status {exit_status}{signalled} after {format_duration(run_s)}{last_words(folder)}"
    return "; ".join([text + shell_hint(folder), *script_hints(script_head(folder, "work", "run.sh"))])


LIMIT_NOTE = "over"  # a file in a payload's folder: what it used too much of, written before it is stopped


def limit_reason(folder: Path, limit_s: float) -> str:
    """Say that a script was stopped at a limit: the one in its note, or else its time limit."""
    with contextlib.suppress(OSError), open_regular(folder, LIMIT_NOTE) as file:
        return f"run.sh was stopped: {one_line(file.read(200).decode('utf-8', 'replace'))}{last_words(folder)}"
    return f"run.sh was stopped at its time limit of {format_duration(limit_s)}{last_words(folder)}"


def last_words(folder: Path) -> str:
    """Return the last line of a script's standard error as the end of a sentence; empty if there is none."""
    words = last_line(folder / "stderr")
    return f'; last line of standard error: "{words}"' if words else ""


def left_out_text(count: int) -> str:
    """Return the end of a sentence about files that no archive can hold; empty for none."""
    return f"; {plural(count, 'file was', 'files were')} left out: see .joborch/left-out.txt" if count else ""


def with_caller(reason: str, name: str) -> str:
    """Add who asked to stop a job to the reason why it was killed."""
    if "terminated" not in reason:
        return f"{reason}; terminated by {name}"
    return reason.replace("terminated on request", "terminated", 1).replace("terminated", f"terminated by {name}", 1)


def is_signalled(exit_status: int) -> bool:
    """Tell whether an exit status means that a signal killed the script: 128 plus the signal's number, as in a shell."""
    return 128 < exit_status < 193


def signal_name(number: int) -> str:
    """Return the name of a signal, or its number if it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


LOGIN_COMMANDS = re.compile(
    rb"(?<![\w-])(module|ml|spack|conda|mamba|micromamba): command not found|(Conda|Mamba)\w*Error: Run '(conda|mamba) init'"
)


def shell_hint(folder: Path) -> str:
    """Return the remedy if the begin or end of standard error shows that a command of login shells was missing."""
    try:
        with open_regular(folder, "stderr") as file:
            said = file.read(4 * KIB)
            file.seek(max(len(said), os.fstat(file.fileno()).st_size - 4 * KIB))
            missing = LOGIN_COMMANDS.search(said + file.read(4 * KIB))
    except OSError:
        return ""
    name = (missing[1] or missing[3]).decode() if missing else ""
    remedy = "begin run.sh with #!/bin/bash -l, or set SERVICE_<NAME>_PRELUDE at the client"
    return f"; {name} is often defined only for login shells: {remedy}" if name else ""
