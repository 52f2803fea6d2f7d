#!/usr/bin/env python3
"""joborch: one file that turns any machine into a job server or a compute client.

A web site takes uploads from people; joborch stands between the site and the machines that compute. The *server* queues
jobs, enforces a quota for each user and service, sends the files to a client, fetches the result, keeps it and serves it
as a ZIP. The *client* runs `run.sh` in a separate folder. How the data flows:

    curl ── POST /upload ──▶ files, row (Queued)                                  ┌──────── client ────────┐
                                   │ dispatch: claim (Processing), send           │                        │
                                   └──────────── POST /submit ───────────────────▶│ files, row (Prepared)  │
                                                                                  │   │ run: wrapper, mark │
                             row (Submitted, Running) ◀─── GET /events ───────────│ row (Running)          │
                                   │                                              │   │ exit.json          │
                                   │ get, fetch: GET /retrieve, digest, rename ◀──│ row (Completed)        │
                                   ▼                                              └────────────────────────┘
    curl ◀─ GET /download ── row (Completed), result.zip ──▶ clean, 48 h after the end (Cleaned)

Files are written before rows, rows before answers. What a crash leaves between two of these is removed at the next start,
or done again without harm. Threads share the Store, what is known of each client (`Link`), and wake-up calls. A tick moves
jobs on according to the Store; it may run at any time, twice, or after a crash.

The sections go from the outside in: the server and a job's way through it, the client, and at the end what both do at times.
What they are built on lies in the package `joborch_base`: settings, states and reasons, scheduling, files, HTTP, executors, the
store. Features that only some sites use are plug-ins, in the package `joborch_plugins`.

     1. Plug-ins              8. Client protocol      15. Recovery
     2. Node                  9. Answers              16. Logs
     3. Server routes        10. News                 17. Results
     4. Jobs                 11. Ends                 18. Cleaning
     5. Site routes          12. Waiting              19. Restore
     6. Server               13. Client routes        20. Commands
     7. Links                14. Client
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import reprlib
import secrets
import select
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Callable, ClassVar, NamedTuple, cast
from urllib.parse import quote, unquote_to_bytes

from joborch_base import statements
from joborch_base.access import AuditLog, UploadPace, check_form, check_user, known_job, narrowed, sees_service, sees_site
from joborch_base.archives import (
    STREAM_COMMENT,
    ZIP_CENTRAL,
    Archive,
    FilesBody,
    Input,
    Losses,
    ResultLimits,
    Stream,
    Transfer,
    ZipPacker,
    ZipRecord,
    below,
    digest_of_chunks,
    file_chunks,
    file_sha256,
    kept_output,
    measure,
    member_chunks,
    member_part,
    packed,
    path_of,
    punch_middle,
    read_member,
    unchanged_inputs,
    utf8_name,
    zip_directory,
    zip_record_at,
    zip_records,
)
from joborch_base.calls import (
    CONNECTION_ERRORS,
    DOWN_BYTES,
    FRAMES_BYTES,
    INLINE_BYTES,
    PIECE_BYTES,
    SLOWEST_BYTES_S,
    Bounds,
    Carried,
    Connection,
    Connections,
    Reply,
    answer_carried,
    copy_some,
    frame,
    keep_alive,
    key_id,
    number_in,
    plain_cause,
    read_frames,
    read_some,
    refuse_encoded,
    text_in,
    whole_in,
)
from joborch_base.connections import make_http_server, remove_socket_file
from joborch_base.data_folder import (
    STOP_NOTE,
    DataFolder,
    DiskFull,
    Promise,
    Spool,
)
from joborch_base.database import copy_to, on_network
from joborch_base.elastic import Demand, Instance, Size, Wanted, wanted_instances
from joborch_base.executors import (
    Held,
    Holds,
    Outcome,
    Payloads,
    first_file_limit,
    fits_one,
    is_own,
    left_out,
    marked_below,
    node_environment,
    passed_on,
    raise_file_limit,
    read_claim,
    read_exit,
    run_times,
    scratch_bases,
    scratch_name,
    used_by_payload,
    why_not_runnable,
    with_first_file_limit,
    wrapper_text,
)
from joborch_base.files import (
    LOCK_HELD,
    NO_LOCKS,
    Form,
    FormReader,
    StoredFile,
    Tree,
    batch_line_warnings,
    bytes_below,
    check_path,
    discard,
    files_below,
    free_bytes,
    fsync_path,
    fsync_tree,
    give_rights,
    has_work,
    helper_environment,
    inputs_digest,
    last_line,
    libc,
    link_files,
    lock_trouble,
    no_script_text,
    open_folder,
    open_regular,
    opened_folder,
    remove_tree,
    script_head,
    script_hints,
    shown,
    sync_file_system,
    touch_below,
    walk,
    write_atomic,
)
from joborch_base.identity import (
    LINK_VERSIONS,
    Proof,
    ProofReader,
    RefusedTokens,
    Session,
    check_protocols,
    client_token_file,
    far_uid,
    is_own_user,
    is_whole_token,
    link_key,
    mask,
    new_token,
    open_listeners,
    peer_uid,
    socket_path,
    token_place,
    token_remedy,
    unproven,
)
from joborch_base.local import LocalExecutor, make_executor, run_seconds
from joborch_base.logs import job_fields, set_up_logging, tell_service_manager
from joborch_base.routes import (
    BAD,
    CLIENT_AWAY,
    CSRF_HEADER,
    DEFAULT_TOKEN,
    KEY_USED,
    LIVE_HEADERS,
    MISSING_USER,
    NAME_OF_TOKEN,
    NOT_FOUND,
    PARTS,
    RECEIVING,
    ROLES,
    ROUTES,
    SESSION_S,
    Answer,
    Caller,
    CutOff,
    Gives,
    LiveBody,
    Parameter,
    Request,
    Route,
    check_site,
    csrf_token_of,
    file_answer,
    find_route,
    full_texts,
    make_app,
    may_call,
    new_session,
    ranged,
    read_all,
    route,
    routes_of,
    say_full,
    session_cookie,
)
from joborch_base.scheduling import (
    CANDIDATES_LOOKED_AT,
    FULL_QUEUE_RETRY_S,
    TURNING_S,
    Candidate,
    ClientCapacity,
    QueueFacts,
    Run,
    ServiceQueue,
    Sharing,
    attempts_left,
    choose,
    no_client_text,
    too_large_text,
    wait_estimate_s,
    why_waiting,
)
from joborch_base.settings import (
    SETTINGS,
    Address,
    BatchOptions,
    Cloud,
    Config,
    Service,
    beyond_loopback,
    check_certificates,
    check_config,
    check_join,
    client_address,
    config_rows,
    is_loopback,
    load_config,
    make_service,
    read_env_text,
    read_mib,
    read_run_time,
    read_seconds,
    read_switch,
    read_weight,
    setting_values,
    shown_value,
    url_host,
)
from joborch_base.statements import (
    AT_CLIENT,
    COUNT_IN,
    COUNT_LIVE,
    DRAINED_ALL,
    ENDS_AFTER,
    INSTANCE,
    LAST_SEQ,
    NEWEST_ENDED,
    NEWEST_FAILURES,
    NEWEST_SUBMITTED,
    OLDEST_QUEUED,
    PAUSED_CLEAR,
    PAUSED_SET,
    PAYLOADS_IN,
    QUEUED_OF_SERVICE,
    QUEUED_OF_USER,
    QUEUED_OLDEST,
    QUEUED_PRIORITIES,
    QUEUED_SERVICES,
    UNFETCHED,
    USAGE_OF_USER,
    USERS_WITH_JOBS,
)
from joborch_base.states import (
    ATTEMPT,
    BUSY,
    ENDED,
    FIGURES,
    MOVES,
    OVER,
    Cause,
    Filter,
    Job,
    Move,
    NewJob,
    Reason,
    Status,
    failure_reason,
    ids_in,
    is_signalled,
    left_out_text,
    limit_reason,
)
from joborch_base.store import Forgotten, Store, change_limits
from joborch_base.threads import SILENT_THREADS, Allowance, Loop, Pool, ThreadLimit, keep_time, stop_pools
from joborch_base.tokens import StoredToken, TokenStore
from joborch_base.vocabulary import (
    BIGGEST,
    CHUNK_BYTES,
    CLOCK_TOLERANCE_S,
    COME_AGAIN_S,
    CONNECT_TIMEOUT_S,
    DEFAULT_HOSTS,
    DIGESTS_FIELD,
    DIRECTORY_LIMIT_BYTES,
    EVENTS_PLACES,
    GIB,
    HELLO_TIMEOUT_S,
    IDLE_LOOK_S,
    JSON_TYPE,
    KIB,
    LISTENER_PLACES,
    LOOK_AGAIN_S,
    MAC_HEADER,
    MIB,
    NONCE_HEADER,
    OURS_HEADER,
    PARTS_LIMIT,
    PROBLEMS_TOLD,
    READ_TIMEOUT_S,
    SMALLEST,
    WAITER_PLACES,
    WORKER_THREADS,
    ZIP_TYPE,
    BackendUnavailable,
    Backoff,
    BadAnswer,
    CannotRun,
    Clock,
    ConfigError,
    Finding,
    GivenUp,
    Gone,
    HttpError,
    InputsChanged,
    JoborchError,
    NoAnswer,
    NoInputs,
    NothingSent,
    NotPacked,
    QueueFull,
    Refused,
    Rejected,
    ResultTooLarge,
    StillRunning,
    StorageError,
    StoreFull,
    SubmitRefused,
    T,
    TokenRefusals,
    UnknownJob,
    WrongToken,
    __version__,
    backoff_s,
    crash_point,
    each,
    file_trouble,
    format_duration,
    host_of,
    load_plugin,
    log,
    nearest,
    new_uuid,
    one_line,
    parse_json,
    plural,
    read_small_file,
    rfc3339,
    size_text,
    time_stamp,
)
from joborch_base.weak_setups import forgotten_executor, is_on_login_node, lines_for_server, start_command, token_names, weak_setups

sys.modules.setdefault("joborch", sys.modules[__name__])  # run as a script it is `__main__`: plug-ins must not import a second one

# == 1. Plug-ins ==  The names that plug-ins may use.

__all__ = (  # noqa: RUF022 - the only names that plug-ins may use; a test checks that
    "Address", "Answer", "answer_carried", "AT_CLIENT", "BackendUnavailable", "Backoff", "BAD", "BadAnswer", "BatchOptions",
    "become_unknown", "below", "beyond_loopback", "BIGGEST", "Bounds", "BUSY", "Caller", "calling", "CannotRun", "Carried", "Cause",
    "change_limits", "check_certificates", "check_config",
    "check_path", "check_site", "check_user", "CHUNK_BYTES", "Client", "client_address", "CLIENT_AWAY", "ClientCapacity",
    "ClientProtocol", "client_token_file", "Clock", "CLOCK_TOLERANCE_S", "Cloud", "COME_AGAIN_S", "COMMENT_EVERY_S", "Config",
    "ConfigError", "config_rows", "Connection", "CONNECTION_ERRORS", "Connections", "CONNECT_TIMEOUT_S", "copy_to", "COUNT_IN",
    "COUNT_LIVE", "crash_point", "CSRF_HEADER", "csrf_token_of", "CutOff", "DataFolder", "decided_restore", "DEFAULT_HOSTS",
    "DEFAULT_TOKEN", "Demand", "digest_of_chunks", "DIRECTORY_LIMIT_BYTES", "discard", "DiskFull", "DONE_AT_ONCE", "DOWN_BYTES",
    "DRAINED_ALL", "drop_packings", "ENDED", "ENDS_AFTER", "ensure_client_token", "EventsReply", "EVENTS_WAIT_S", "EVENT_TYPE",
    "EXAMPLE_JOB", "EXAMPLE_SERVICE", "EXIT_DONE", "EXIT_FAILED", "file_answer", "file_chunks", "FilesBody", "file_sha256",
    "file_trouble", "Filter",
    "Finding", "find_route", "finish_restore", "first_file_limit", "fits_one", "folder_of", "Forgotten", "forgotten_executor",
    "format_duration", "FormReader", "frame", "FRAMES_BYTES", "free_bytes", "fsync_path", "full_texts", "GIB", "Gives", "Gone", "hear",
    "HELLO_TIMEOUT_S", "helper_environment", "host_of", "HttpError", "ID", "IDLE_LOOK_S", "ids_in", "INLINE_BYTES", "Input",
    "InputsChanged", "inputs_digest", "INSTANCE", "Instance", "is_loopback", "is_own_user", "is_whole_token", "Job", "job_after_wait",
    "job_json", "job_log", "JoborchError", "job_summary", "JSON_TYPE", "keep_alive", "key_id", "KIB", "known_job", "known_payload",
    "last_line", "LAST_SEQ", "left_out", "Link", "link_key", "LiveBody", "LIVE_HEADERS", "load_config", "load_plugin", "LOCK_HELD",
    "lock_trouble", "log", "LOOK_AGAIN_S", "Loop", "loops_of", "make_app", "make_executor", "MARK", "marked_below", "mask", "may_call",
    "member_chunks",
    "member_part", "MIB", "Move", "MOVES", "named_service", "NAME_OF_TOKEN", "narrowed", "new_attempt", "NEWEST_ENDED", "NEWEST_FAILURES",
    "NEWEST_SUBMITTED", "new_session", "new_token", "new_uuid", "NoAnswer", "no_client_text", "Node", "node_environment", "NO_LOCKS",
    "NONCE_HEADER", "NOT_FOUND", "NothingSent", "OLDEST_QUEUED", "one_line", "on_network", "opened_folder", "open_listeners",
    "open_regular", "OURS_HEADER", "Outcome", "OVER", "own_file", "Parameter", "parse_json", "PARTS", "PARTS_LIMIT", "passed_on", "Pause",
    "PAUSED_CLEAR", "PAUSED_SET", "payload_gone", "PAYLOAD_ID", "PAYLOADS_IN", "peer_uid", "PIECE_BYTES", "plain_cause", "plural",
    "poll_wait_s", "Pool", "problem_of", "problem_since", "PROBLEMS_TOLD", "Proof", "ProofReader", "put_off", "QUEUED_OF_SERVICE",
    "QUEUED_OF_USER", "QUEUED_OLDEST", "QUEUED_PRIORITIES", "QUEUED_SERVICES", "QueueInfo", "queue_info_of", "ranged", "read_all",
    "read_answer", "read_claim", "read_env_text", "read_exit", "read_frames", "read_member", "read_part", "read_seconds", "read_small_file",
    "read_some", "read_statuses", "READ_TIMEOUT_S", "read_uuid", "read_weight", "Reason", "RECEIVING", "refused_text", "Rejected",
    "remove_files", "Reply", "report", "Request", "ResultLimits", "rfc3339", "ROLES", "room_json", "Route", "route", "ROUTES", "routes_of",
    "running_archive", "say_full", "sees_service", "sees_site", "Server", "Service", "service_json", "Session", "session_cookie",
    "SESSION_S", "SETTINGS", "setting_values", "set_up_logging", "Sharing", "shown", "shown_value", "Size", "size_text", "SMALLEST",
    "socket_path", "statements", "Status", "STATUSES", "STATUS_NAMES", "StillRunning", "StorageError", "Store", "stored_archive",
    "StoredFile", "StoredToken", "SubmitRefused", "sync_file_system", "T", "TEXT_TYPE", "time_stamp", "token_names", "token_place",
    "token_remedy", "Tree", "UNFETCHED", "unproven", "unremovable_json", "url_host", "USAGE_OF_USER", "USERS_WITH_JOBS", "utf8_name",
    "__version__", "WAIT", "waiting_texts", "walk", "Wanted", "wanted_instances", "weak_setups", "with_first_file_limit", "wrapper_text",
    "write_atomic", "zip_directory", "ZipRecord", "zip_record_at", "zip_records", "ZIP_TYPE",
)  # fmt: skip


def own_file(name: str) -> bytes:
    """Return the content of a file next to this module, also inside joborch.pyz. Raises OSError if it does not exist."""
    loader: Any = __loader__  # type: ignore[name-defined]
    return bytes(loader.get_data(os.path.join(os.path.dirname(__file__), name)))


def __getattr__(name: str) -> Any:
    """Return `Jobs`, the library for scripts: `from joborch import Jobs` imports its plug-in (PEP 562)."""
    if name == "Jobs":
        return load_plugin("caller").Jobs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# == 2. Node ==  One process, server or client: its settings, its store, its folders, its loops.

DAY_S = 24 * 3600.0


class Program:
    """The file that this process runs, `joborch.pyz` or `joborch.py`, as it was at the start."""

    # Set by zipapp_main.py: the path of joborch.pyz, its SHA-256, and why it runs without a copy in the cache.
    archive: ClassVar[tuple[str, bytes, str] | None] = None

    def __init__(self) -> None:
        own = os.path.abspath(__file__)
        self.path, self.digest, _ = self.archive or (own, hashlib.sha256(Path(own).read_bytes()).digest(), "")
        self.copy = os.path.dirname(own) if self.archive and os.path.isfile(own) else None
        self.lock, self.seen, self.trouble = threading.Lock(), cast("tuple[int, ...]", ()), ""

    def keep_copy(self) -> None:
        """Touch the copy in the cache once a day: starts of other versions remove copies that were not used for 30 days."""
        with contextlib.suppress(OSError):  # missing or read-only; everything needed is in memory
            if self.copy and os.stat(self.copy).st_mtime < time.time() - DAY_S:
                os.utime(self.copy)

    def restart_needed(self) -> str:
        """Return why this process should be restarted (its file has changed), or an empty text. Log a new reason."""
        name = os.path.basename(self.path)
        with self.lock:
            try:
                state = os.stat(self.path)
                seen: tuple[int, ...] = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
                if seen == self.seen:
                    return self.trouble
                same = hashlib.sha256(Path(self.path).read_bytes()).digest() == self.digest
                trouble = "" if same else f"{name} was replaced after this process started: restart it to run the new file"
            except FileNotFoundError:
                seen, trouble = (), f"{name} was removed after this process started: put it back, or the next start will fail"
            except OSError:
                return self.trouble  # it cannot be read now
            if trouble and trouble != self.trouble:
                log.warning("%s", trouble)
            self.seen, self.trouble = seen, trouble
            return trouble


PACK_READERS, PACK_QUEUE = 4, 16  # callers that may wait for large results at once; results being packed or waiting for it
# Each server and client has one object of each of these: see `Node.plugins`.
NODE_PLUGINS = {
    "server": ("health", "metrics", "reload", "drain", "privacy", "webhooks", "joined", "clouds"),
    "client": ("health", "metrics", "reload", "drain", "privacy"),
}


class Node:
    """One process, server or client: its settings, its store, its folders, its loops."""

    def __init__(self, config: Config, store: Store, data: DataFolder, clock: Clock | None = None) -> None:
        self.config, self.store, self.data, self.clock = config, store, data, clock or Clock()
        # A client's archives may use the reserved space: only a result that was fetched can be deleted.
        data.keep_free(config.min_free_bytes, packs_below_minimum=config.mode == "client")
        self.loops: dict[str, Loop] = {}
        self.pool, self.silent_pool = Pool("loop"), Pool("silent", SILENT_THREADS)
        self.waiters, self.places, self.gate = ThreadLimit(WAITER_PLACES), ThreadLimit(EVENTS_PLACES), ThreadLimit(WORKER_THREADS)
        self.refused, self.audit, self.upload_pace = RefusedTokens(self.clock), AuditLog(config, self.clock), UploadPace(self.clock)
        self.pack_places = ThreadLimit(PACK_READERS)
        self.tokens: tuple[str, ...] = tuple(token.strip() for token in config.token.split(",") if token.strip())
        self.proofs, self.token_store = ProofReader(self.tokens), TokenStore(store, self.clock)
        self.old_server_at = float("-inf")  # monotonic: when a server that cannot prove its identity was last logged
        self.started, self.program = self.clock.monotonic(), Program()
        self.full_said_at = float("-inf")  # monotonic: when the log last said that uploads are refused
        self.disk_failed = False  # since /health last wrote
        self.stopping = threading.Event()
        self.unremovable: dict[int, Unremovable] = {}  # by id: ended jobs whose files cannot be removed
        self.load, self.last_cpu, self.cpu_read_at = 0.0, (0, 0), float("-inf")  # percent; /proc/stat's total and idle; monotonic
        # By name; each has `start()` and `committed(moves)` for moves that are stored, and may have `moved(db, move)`: see `Store.movers`.
        self.plugins: dict[str, Any] = {name: load_plugin(name)(self) for name in NODE_PLUGINS[config.mode]}
        store.core.committed = self.committed
        store.movers = [plugin.moved for plugin in self.plugins.values() if hasattr(plugin, "moved")]

    def committed(self, moves: Sequence[Move]) -> None:
        """Tell the plug-ins of moves that are stored now."""
        for plugin in self.plugins.values():
            plugin.committed(moves)

    def folder(self, job: Job) -> Path:
        """Return the folder of a job's files: one for each job on the server, one for each attempt on a client."""
        return self.data.job(job.uuid if self.config.mode == "server" else job.mark)

    def wake(self, name: str) -> None:
        loop = self.loops.get(name)
        if loop is not None:
            loop.wake()

    def start(self) -> None:
        for plugin in self.plugins.values():
            plugin.start()
        for loop in self.loops.values():
            loop.start()
        threading.Thread(target=keep_time, args=(lambda: self.loops, self.stopping), name="timer", daemon=True).start()

    def stop(self) -> None:
        """Stop the loops and wake all waiting callers. Payloads keep running."""
        self.stopping.set()
        for loop in self.loops.values():
            loop.stop()
        self.store.core.wake_all()
        stop_pools((self.pool, self.silent_pool), 1.0)

    def cpu_load(self) -> float:
        """Return the CPU use of this machine over the last second or so, in percent."""
        now = self.clock.monotonic()
        if now - self.cpu_read_at < 1:
            return self.load
        self.cpu_read_at = now
        fields = [int(text) for text in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        total, idle = sum(fields), fields[3] + fields[4]
        last_total, last_idle = self.last_cpu
        if total - last_total >= 10:  # clock ticks; fewer are too imprecise
            self.last_cpu, self.load = (total, idle), round(100 * (1 - (idle - last_idle) / (total - last_total)), 1)
        return self.load

    def wait_until(
        self, look: Callable[[], T | None], timeout_s: float, left: Callable[[], bool], jobs: int | frozenset[int] | None = None
    ) -> T | None:
        """Return what `look` finds, as soon as it finds something. None after `timeout_s`, if we stop, or if the caller has `left`.

        The core looks again when the job, or one of the jobs, moves; if `jobs` is None, when any job moves.
        """
        deadline = self.clock.monotonic() + timeout_s
        with self.store.core.watching(look, jobs) as waiter:
            found = look()
            while found is None:
                remaining = deadline - self.clock.monotonic()
                if remaining <= 0 or self.stopping.is_set() or left():
                    break
                with self.gate.stepped_out():
                    waiter.bell.sleep(min(remaining, 2.0))
                found = waiter.take()
        return found


# == 3. Server routes ==  The HTTP contract of the server; each route is declared once, with real examples.

EXAMPLE_JOB: dict[str, Any] = {
    "id": 42, "uuid": "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0", "user_id": 1, "service": "example", "name": None, "status": "Queued",
    "ended_as": None, "reason": "uploaded", "cause": None, "exit_code": None, "signal": None, "priority": 0, "cpus": 1, "memory": None,
    "gpus": 0, "timeout": None, "retries": 2, "after": [], "inputs_from": [], "retry_of": None, "callback_url": None,
    "loc": "/data/jobs/8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0", "message": "it is next for a free slot at a client for example",
    "created_at": "2026-11-24T09:00:00.000Z", "started_at": None, "ended_at": None, "peak_memory": None, "cpu_time": None,
    "queue_position": 1, "estimated_start": "2026-11-24T09:00:00.000Z", "attempt": 1, "client": None, "dest_id": "",
    "waiting_for": "it is next for a free slot at a client for example",
    "result": None, "attempts": [], "webhooks": [],
    "history": [{"at": "2026-11-24T09:00:00.000Z", "from": None, "to": "Queued", "reason": "uploaded", "attempt": 1}],
}  # fmt: skip
EXAMPLE_PAYLOAD = {"id": 1, "input": {}, "status": "Prepared", "loc": "/data/jobs/8f14e45f.1", "pid": 0, "killed": False}
QUEUE_FULL = {"message": "user 1 has 10,000 jobs queued, which is the limit", "field": "user_id"}
AFTER_LIMIT = 1000  # jobs that one may follow


def read_job_id(text: str) -> int:
    """Return a job id from a path. Raises HttpError 400 if it is not a number, 404 if no job can have it."""
    if not re.fullmatch(r"-?[0-9]{1,30}", text):
        raise HttpError(400, f"{one_line(text, 40)!r} is not a job id: give a whole number", "id")
    if not 1 <= int(text) < 2**63:
        raise HttpError(404, f"no job has the id {text}")
    return int(text)


ID = Parameter("job_id", "path", "integer", "the id of a job", 42, required=True, least=1, most=BIGGEST, read=read_job_id)
IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    "header",
    "string",
    "of your choice; a repeat with the same key gets the first answer and starts nothing",
    "run-2026-11-24-a",
    default="",
    longest=255,
)


def job_summary(server: Server, job: Job) -> dict[str, Any]:
    """Return the job in JSON without attempts, history, webhooks and queue position, which need further queries."""
    said = {name: getattr(job, name, None) for name in EXAMPLE_JOB if name not in ("attempts", "history", "webhooks")}
    said.update(status=job.status.value, ended_as=job.end, after=ids_in(job.after_ids), dest_id=job.dest_id or "", message=job.reason)
    said.update({name: rfc3339(said[name]) for name in ("created_at", "started_at", "ended_at")}, loc=str(server.folder(job)))
    said["inputs_from"] = ids_in(job.from_ids)
    if job.result_sha256 is not None:
        said["result"] = {"size": job.result_size, "sha256": job.result_sha256}
    return said


def job_json(server: Server, job: Job, outlook: QueueInfo | None = None) -> dict[str, Any]:
    """Return the whole job in JSON, as the row was when it was read; its `outlook` is looked up unless it is given."""
    said = job_summary(server, job)
    outlook = outlook or queue_info_of(server, job)
    said["waiting_for"], said["queue_position"] = outlook.waiting_for, outlook.position
    said["message"] = outlook.waiting_for or job.reason
    if outlook.wait_s is not None:
        said["estimated_start"] = rfc3339(server.clock.wall() + outlook.wait_s)
    said["webhooks"] = server.plugins["webhooks"].shown(job)
    rows = [dict(row) for row in server.store.read(statements.ATTEMPTS_GET, id=job.id)] if job.attempt > 1 else []
    if job.client is not None:
        rows.append({name: getattr(job, name) for name in ATTEMPT})
    said["attempts"] = [{**row, "started_at": rfc3339(row["started_at"]), "ended_at": rfc3339(row["ended_at"])} for row in rows]
    said["history"] = [
        {"at": rfc3339(row["at"]), "from": row["source"], "to": row["target"], "reason": row["reason"], "attempt": row["attempt"]}
        for row in server.store.read(statements.HISTORY_GET, id=job.id)[: job.moves]
    ]
    return said


# -- upload --


def read_user(text: str) -> int:
    """Return the number of a user."""
    if not re.fullmatch(r"[+-]?[0-9]{1,1000}", text):
        raise ValueError("give the number that the user has in your system, as in -F user_id=1")
    return int(text)


def read_ids(text: str) -> str:
    """Return ids of jobs: sorted, each once, separated by commas."""
    ids = [each.strip() for each in text.split(",") if each.strip()]
    if len(ids) > AFTER_LIMIT or not all(re.fullmatch(r"[0-9]{1,18}", each) for each in ids):
        raise ValueError(f"give at most {AFTER_LIMIT} job ids separated by commas, as in 41,42")
    return ",".join(map(str, sorted(set(map(int, ids)))))


RUN_TIME, MEMORY = r"^[0-9]+(\.[0-9]+)?[smhd]?$", r"^[0-9]+([KMGkmg]i?[Bb]?)?$"
FORM_FILE = Parameter("file", "form", "file", "one or more files; a filename may be a relative path; run.sh is the script")
ARCHIVE_HELP = "a zip, tar or tar.gz with files of the job; a folder around all of them is left out if run.sh is in it"
FORM_ARCHIVE = Parameter("archive", "form", "file", ARCHIVE_HELP)
CONTENT_DIGEST = Parameter(
    "Content-Digest", "header", "string", "SHA-256 of the body (RFC 9530); another body is refused",
    "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:",
)  # fmt: skip
FORM_FIELDS = {
    field.name: field
    for field in (
        Parameter(
            "user_id", "form", "integer", "the number of the user in your system",
            1, True, SMALLEST, BIGGEST, missing=MISSING_USER, read=read_user,
        ),
        Parameter("service", "form", "string", "the service that runs it", "example", True, default=""),
        Parameter("name", "form", "string", "a name of your choice", "2oob", longest=200),
        Parameter("priority", "form", "integer", "of your own jobs, the highest priority runs first", 0, least=-100, most=100, default=0),
        Parameter(
            "after", "form", "string", "ids of your jobs, separated by commas: the job waits until all of them are Completed", "41",
            default="", read=read_ids,
        ),
        Parameter(
            "inputs_from", "form", "string", "ids of your jobs: like `after`, and the results of these jobs are in from/ID/", "41",
            default="", read=read_ids,
        ),
        Parameter(
            "timeout", "form", "string", "longest run time: seconds, or with s, m, h or d", "90m", pattern=RUN_TIME, read=read_run_time
        ),
        Parameter("retries", "form", "integer", "most further attempts after an infrastructure failure", 2, least=0, most=100),
        Parameter("cpus", "form", "integer", "cores that the script needs", 1, least=1, most=1_000_000, default=1),
        Parameter("memory", "form", "string", "memory that the script needs: MiB, or with M or G", "2G", pattern=MEMORY, read=read_mib),
        Parameter("gpus", "form", "integer", "GPUs that the script needs", 1, least=0, most=1_000, default=0),
        Parameter("callback_url", "form", "string", "where the server POSTs the job when it ends: a webhook", "https://portal.example.org/jobs"),
        Parameter(
            "crlf", "form", "string", "Windows line ends in run.sh are refused; `fix` changes them to LF, `keep` keeps them",
            "fix", choices=("fix", "keep"),
        ),
    )
}  # fmt: skip


def refuse_too_large(server: Server, service: Service, cpus: int, memory: int | None, gpus: int) -> None:
    """Raise HttpError 400 for a job that no client of a service could ever run, once all clients have reported their size."""
    links = server.links_of(service)
    if all(link.heard_at is not None for link in links):
        places = [*(link.capacity(0, 0) for link in links), *server.plugins["clouds"].capacities(service.name)]
        too_large = too_large_text(service.name, cpus, memory, places, gpus)
        if too_large:
            field = "cpus" if all(cpus > place.slots for place in places) else "memory"
            field = field if any(place.has_gpus(gpus) for place in places) else "gpus"
            raise HttpError(400, too_large, field)


def refuse_flat(server: Server, service: Service) -> None:
    """Raise HttpError 400 for a job that gets results of others, if a client of its service is known to lose their folders."""
    if any(link.heard_at is not None and not link.protocol.keeps_folders for link in server.links_of(service)):
        text = f"inputs_from is not possible: service {service.name} has a 2.2 client, which flattens folders; send the files themselves"
        raise HttpError(400, text, "inputs_from")


def named_service(server: Server, text: str) -> Service:
    """Return the service that a caller names. Raises HttpError 400 that lists the known ones."""
    service = server.services.get(text.lower())
    if service is None:
        known = ", ".join(sorted(server.services))
        raise HttpError(400, f"service {one_line(text, 80)!r} is not known: give one of {known}", "service")
    return service


def new_job(server: Server, form: Form, job_uuid: str, **more: Any) -> NewJob:
    """Return the row for a received form; `more` are further columns. Raises HttpError 400 for the first invalid field."""
    given = read_all(FORM_FIELDS.values(), form.fields)
    if not given["service"]:
        known = ", ".join(sorted(server.services))
        raise HttpError(400, f"service is missing: give one of {known}, as in -F service={next(iter(server.services))}", "service")
    service = named_service(server, given["service"])
    if not form.files:
        raise HttpError(400, "there is no file: send at least run.sh, as in -F file=@run.sh", "file")
    if not any(file.path == "run.sh" for file in form.files):
        raise HttpError(400, no_script_text([file.path for file in form.files]), "file")
    if given["inputs_from"] and any(file.path.partition("/")[0] == "from" for file in form.files):
        raise HttpError(400, "the folder from/ is for the results of inputs_from: give your own files other names", "file")
    if given["inputs_from"]:
        refuse_flat(server, service)
    refuse_too_large(server, service, given["cpus"], given["memory"], given["gpus"])
    limit_s, most_s = given["timeout"], service.timeout_s
    if limit_s is not None and most_s is not None and limit_s > most_s:
        raise HttpError(400, f"timeout is {limit_s:.12g}: service {service.name} allows at most {most_s:.12g} seconds", "timeout")
    return NewJob(
        uuid=job_uuid,
        user_id=given["user_id"],
        service=service.name,
        name=given["name"],
        priority=given["priority"],
        after_ids=read_ids(f"{given['after']},{given['inputs_from']}"),
        from_ids=given["inputs_from"],
        cpus=given["cpus"],
        memory=given["memory"],
        gpus=given["gpus"],
        timeout=most_s if limit_s is None else limit_s,
        retries=service.retries if given["retries"] is None else given["retries"],
        return_inputs=int(service.return_inputs),
        callback_url=server.plugins["webhooks"].url_for(service, given["callback_url"]),
        **more,
    )


def key_columns(request: Request, form: Form, *more: str) -> dict[str, str | None]:
    """Return the columns by which a repeat of this request is known: independent of the form's boundary and order."""
    key = IDEMPOTENCY_KEY.value(request.header("Idempotency-Key"))
    files = sorted((file.path, file.size, file.sha256) for file in form.files)
    said = json.dumps([sorted(form.fields.items()), files, *more]).encode()
    return {"idempotency_key": key or None, "request_digest": hashlib.sha256(said).hexdigest() if key else None}


def receive_form(server: Server, request: Request, folder: Path, retried: Job | None = None) -> Form:
    """Receive the form of a job, and its files in `folder`. Raises HttpError, also for a run.sh with Windows line ends."""
    form = request.read_form(folder, unpack_limit_bytes=server.config.max_upload_bytes)
    check_form(server, request, form, retried)
    crlf = FORM_FIELDS["crlf"].value(form.fields.get("crlf"))
    for number, file in enumerate(form.files):
        if file.path == "run.sh" and crlf != "keep":
            form.files[number] = load_plugin("uploads").without_crlf(file, folder / "run.sh", may_fix=crlf == "fix")
    return form


@contextlib.contextmanager
def receiving(node: Node, folder: Path, key: str) -> Iterator[None]:
    """Create `folder` for an upload, and remove it if the block fails."""
    node.data.receiving.add(key)
    try:
        folder.mkdir()
        yield
    except BaseException:
        discard(folder)
        raise
    finally:
        node.data.receiving.discard(key)


UPLOAD_GIVES = {
    201: Gives("the job is stored durably", JSON_TYPE, EXAMPLE_JOB),
    400: BAD,
    422: KEY_USED,
    429: Gives("this user has too many jobs queued, or uploads too often; Retry-After says when to try again", JSON_TYPE, QUEUE_FULL),
    **RECEIVING,
}


FORM = (FORM_FILE, FORM_ARCHIVE, *FORM_FIELDS.values())


@route(
    "POST", "/upload", "server", who="user portal operator", slow=True, takes=(*FORM, IDEMPOTENCY_KEY, CONTENT_DIGEST), gives=UPLOAD_GIVES
)
def upload(server: Server, request: Request) -> Answer:
    """Queue a job: send its files, its user and its service."""
    job_uuid = new_uuid()
    folder = server.data.job(job_uuid)
    with receiving(server, folder, job_uuid):
        form = receive_form(server, request, folder)
        digest = inputs_digest({file.path: file.sha256 for file in form.files})
        size = sum(file.size for file in form.files)
        new = new_job(server, form, job_uuid, inputs_sha256=digest, inputs_size=size, **key_columns(request, form))
        crash_point("upload.received")
        job, is_new = keep_upload(server, new, folder, [file.path for file in form.files])
    return upload_answer(server, job, form, folder, is_new)


def upload_answer(server: Server, job: Job, form: Form, folder: Path, is_new: bool) -> Answer:
    """Return the answer to an upload, with warnings about its fields and its run.sh unless it is a repeat."""
    if not is_new:
        return Answer(job_json(server, job), 201, {"Location": f"/jobs/{job.id}"})
    known = [parameter.name for parameter in FORM]
    unknown = [name for name in form.fields if name not in known]
    warnings = [f"field {one_line(name, 80)!r} is not known and was ignored{nearest(name, known)}" for name in unknown]
    head = script_head(folder / "run.sh")
    warnings += [*script_hints(head), *batch_line_warnings(head)]
    # It may have been claimed in the same transaction: then it waits for nothing.
    claimed = server.store.read(statements.JOB_STATUS, id=job.id)[0]["status"] != job.status.value
    said = {**job_json(server, job, NEXT if claimed else None), "warnings": warnings}
    return Answer(said, 201, {"Location": f"/jobs/{job.id}", "X-Job-Status": job.status.value})


def keep_upload(server: Server, new: NewJob, folder: Path, paths: Sequence[str]) -> tuple[Job, bool]:
    """Store a new job with its files `paths` in `folder` durably; return it, and True.

    If a request with the same Idempotency-Key was stored earlier, remove the folder and return that request's job, and False.
    """
    earlier = earlier_job(server, new.user_id, new.idempotency_key, new.request_digest)
    if earlier is None:
        fsync_tree(folder, paths)
        crash_point("upload.synced")
        server.store.check_identity()
        try:
            job = stored(server, new)
            crash_point("upload.stored")
            return job, True
        except sqlite3.IntegrityError:
            earlier = earlier_job(server, new.user_id, new.idempotency_key, new.request_digest)
            if earlier is None:
                raise
    discard(folder)
    return earlier, False


def stored(server: Server, new: NewJob) -> Job:
    """Store an uploaded job. Raises HttpError 400 if it cannot follow the jobs in `after`, 429 or 507 if its user is over a limit."""
    config = server.config
    server.upload_pace.take(new.user_id or 0, config.uploads_per_minute)
    try:
        return server.store.add(new, "uploaded", config.max_queued_per_user, config.max_age_s, config.max_stored_bytes)
    except StoreFull as error:
        message = f"{error} (JOBORCH_MAX_STORED_PER_USER): results are deleted {format_duration(config.max_age_s)} after their end"
        raise HttpError(507, message, "user_id", Retry_After="3600") from error
    except NoInputs as error:
        raise HttpError(400, f"inputs_from: {error}", "inputs_from") from error
    except UnknownJob as error:
        raise HttpError(400, f"after: {error}", "after") from error
    except QueueFull as error:
        message = f"{error} (JOBORCH_MAX_QUEUED_PER_USER): send more when some of them have started"
        raise HttpError(429, message, "user_id", Retry_After=str(FULL_QUEUE_RETRY_S)) from error


def earlier_job(server: Server, user_id: int | None, idempotency_key: str | None, request_digest: str | None) -> Job | None:
    """Return the job of an Idempotency-Key that was used before. Raises HttpError 422 if that was another request."""
    if not idempotency_key:
        return None
    job = server.store.job(statements.JOB_BY_KEY, user_id=user_id, idempotency_key=idempotency_key)
    if job and job.request_digest != request_digest:
        raise HttpError(422, f"this Idempotency-Key was used for job {job.id} with other files or fields: use a new one", "Idempotency-Key")
    return job


INPUTS_GONE = {"message": "the files of job 42 are deleted: upload them again"}
RETRY_GIVES = {
    201: Gives("the new job, stored durably", JSON_TYPE, {**EXAMPLE_JOB, "id": 43, "retry_of": 42}),
    400: BAD,
    404: NOT_FOUND,
    410: Gives("its files are deleted", JSON_TYPE, INPUTS_GONE),
    422: KEY_USED,
    429: UPLOAD_GIVES[429],
    **RECEIVING,
}
RETRY_FORM = tuple(parameter._replace(required=False) for parameter in FORM if parameter.name != "user_id")


@route(
    "POST",
    "/jobs/<job_id>/retry",
    "server",
    who="user portal operator",
    slow=True,
    takes=(ID, *RETRY_FORM, IDEMPOTENCY_KEY, CONTENT_DIGEST),
    gives=RETRY_GIVES,
)
def retry(server: Server, request: Request, job_id: int) -> Answer:
    """Queue a new job with the files and fields of this one, which stays as it is. A form may replace some of them."""
    job, job_uuid = known_job(server, request, job_id), new_uuid()
    folder = server.data.job(job_uuid)
    with receiving(server, folder, job_uuid):
        form = receive_form(server, request, folder, job) if request.length else request.empty_form(user_id=str(job.user_id))
        own, replaced = key_columns(request, form, f"retry {job.id}"), set(form.fields)
        earlier = earlier_job(server, job.user_id, **own)
        if earlier is not None:  # the files that it has may be deleted by now
            discard(folder)
            return upload_answer(server, earlier, form, folder, False)
        form.fields = {**fields_of(server, job, form.fields), **form.fields}
        digest = inherit_files(server, job, form, folder)
        crash_point("retry.linked")
        # Judged afterwards: the cleaner may have begun to delete them meanwhile.
        if are_files_due(server, known_job(server, request, job_id)):
            raise files_gone(job)
        size = sum(file.size for file in form.files) + (job.inputs_size or 0)  # those of the job are links
        new = new_job(server, form, job_uuid, inputs_sha256=digest, inputs_size=size, retry_of=job.id, **own)
        try:
            made, is_new = keep_upload(server, new, folder, [file.path for file in form.files])
        except HttpError as error:
            if error.field == "inputs_from" and "inputs_from" not in replaced:
                raise HttpError(410, f"job {job.id} cannot be retried: {error.message}", "inputs_from") from error
            raise
    log.info("job %d has the files of job %d, which was retried", made.id, job.id)
    return upload_answer(server, made, form, folder, is_new)


def files_gone(job: Job) -> HttpError:
    """Return the error about a job that cannot be retried."""
    return HttpError(410, f"the files of job {job.id} are deleted: upload them again")


def fields_of(server: Server, job: Job, given: Mapping[str, str]) -> dict[str, str]:
    """Return the fields of a job as texts of a form; `given` are those that replace some. The service's own time limit is left out."""
    service = server.services.get(given.get("service", job.service or "").strip().lower())
    most_s = service.timeout_s if service else None
    limit_s = None if job.timeout is None or (most_s is not None and job.timeout >= most_s) else f"{job.timeout:.3f}"
    texts = {"service": job.service, "name": job.name, "after": job.after_ids, "inputs_from": job.from_ids, "timeout": limit_s}
    texts["callback_url"] = None if service and job.callback_url == service.callback_url else job.callback_url
    numbers = {name: getattr(job, name) for name in ("priority", "retries", "cpus", "memory", "gpus")}
    return {name: str(value) for name, value in {**texts, **numbers}.items() if value not in (None, "")}


def inherit_files(server: Server, job: Job, form: Form, folder: Path) -> str | None:
    """Link the files of a job into `folder`, and add them to `form`, unless that has others of these names.

    Returns the digest of all files. Raises HttpError 410 if some are gone, 400 if the names do not fit together.
    """
    source, new, tree = server.folder(job), {file.path: file.sha256 for file in form.files}, Tree()
    old = files_below(source)
    kept = [path for path in old if path not in new]
    for path in [*new, *kept]:
        tree.add(path)
    try:
        link_files(source, folder, kept)
        digests = {path: file_sha256(source / path) for path in old} if new else {}
    except FileNotFoundError as error:
        raise files_gone(job) from error
    if "run.sh" not in old or (new and job.inputs_sha256 not in (None, inputs_digest(digests))):
        raise files_gone(job)
    form.files += [StoredFile(path, 0, digests.get(path, "")) for path in kept]
    return inputs_digest({**digests, **new}) if new else job.inputs_sha256


def are_files_due(server: Server, job: Job) -> bool:
    """Tell whether the cleaner may be deleting the files of a job now, or has done so."""
    return job.status in OVER and (job.status is Status.CLEANED or job.moved_at <= server.store.steady() - server.config.max_age_s)


# == 4. Jobs ==  Routes that show a job, serve its result, list jobs, and terminate one.


def stored_archive(server: Server, job: Job) -> Archive:
    """Open the result of an ended job. Raises HttpError 500 if the file is missing."""
    try:
        file = open(server.data.result(job.mark), "rb")  # noqa: SIM115 - the web server closes it
    except FileNotFoundError as error:
        log.error("job %d: its result is missing on disk", job.id)
        raise HttpError(500, "the result of this job is missing on the server's disk") from error
    return Archive(file, os.fstat(file.fileno()).st_size, job.result_sha256 or "0" * 64)


DOWNLOAD_GIVES = {
    200: Gives("completed: the result (with JOBORCH_COMPAT=2.2 also a short JSON in every other state)", ZIP_TYPE),
    202: Gives("queued or running; Retry-After says when to ask again", JSON_TYPE, EXAMPLE_JOB),
    204: Gives("failed, invalid, killed or cleaned; X-Job-Status says which"),
    400: BAD,
    404: NOT_FOUND,
    **PARTS,
}


@route("GET", "/download/<job_id>", "server", who="user portal operator", takes=(ID,), gives=DOWNLOAD_GIVES, quick=True)
def download(server: Server, request: Request, job_id: int) -> Answer:
    """Fetch the result of a job as a ZIP. HEAD returns only the state."""
    job = known_job(server, request, job_id)
    headers = {"X-Job-Status": job.status.value}
    if job.status is Status.COMPLETED:
        return file_answer(request, stored_archive(server, job), f"job-{job.id}.zip", headers)
    if server.config.compat == "2.2" and request.method == "GET":
        return Answer(load_plugin("compat22").download_json(server, job), 200, headers)
    if job.status in OVER:
        return Answer(None, 204, headers)
    headers["Retry-After"] = "1"
    return Answer(job_json(server, job) if request.method == "GET" else {}, 202, headers)


AS_IT_STANDS = "the job's current files: its inputs while it is queued, from its client while it runs, from the server when it has ended"


@route(
    "GET",
    "/download_partial/<job_id>",
    "server",
    who="user portal operator",
    slow=True,
    takes=(ID,),
    gives={200: Gives(AS_IT_STANDS, ZIP_TYPE), 400: BAD, 404: NOT_FOUND, 503: CLIENT_AWAY, **PARTS},
)
def download_partial(server: Server, request: Request, job_id: int) -> Answer:
    """Fetch the current files of a job, also of a failed one: the work folder and, below .joborch/, its output."""
    job = known_job(server, request, job_id)
    headers = {"X-Job-Status": job.status.value}
    if job.status is Status.CLEANED:
        raise HttpError(404, f"the files of job {job.id} were cleaned")
    name = f"job-{job.id}-partial.zip"
    if job.result_sha256 is not None:
        return file_answer(request, stored_archive(server, job), name, headers)
    link = server.links.get(job.client or "")
    if job.status in BUSY and job.dest_id and link:
        return file_answer(request, running_archive(server, request, link, job), name, headers)
    return file_answer(request, inputs_archive(server, request, job), name, headers)


def inputs_archive(server: Server, request: Request, job: Job) -> Archive:
    """Pack the inputs of a job that is not at a client. Raises HttpError 503 if too many are being packed, or if the caller left."""

    def fill(packer: ZipPacker) -> None:
        packer.wanted = lambda: not request.left()
        packer.add_folder(server.folder(job))

    with server.pack_places.place() as free:
        if not free:
            raise HttpError(503, "many archives are being packed: try again", Retry_After="5")
        try:
            return packed(server.data.spool, job.created_at, fill)
        except GivenUp as error:
            raise HttpError(503, str(error), Retry_After="5") from error


PACK_GLANCE_S = 0.5  # how long a joborch server waits for it: it fetches other results and asks again


def running_archive(server: Server, request: Request, link: Link, job: Job) -> Archive:
    """Fetch the current files of a running job from its client. Raises HttpError 503 if that is not possible now."""
    spool, deadline = server.data.spool(), time.monotonic() + READ_TIMEOUT_S
    into = result_transfer(server.config, spool)
    try:
        while True:
            with calling(server, request, link) as unwanted, contextlib.suppress(NotPacked):
                link.fetch(job, into, partial=True, unwanted=unwanted)
                break
            if request.left() or time.monotonic() > deadline or server.stopping.wait(PACK_GLANCE_S):
                raise NotPacked("is still packing the files: try again")
    except (NothingSent, NoAnswer, Gone, ResultTooLarge) as error:
        spool.close()
        said = f"{link.name}: {error}" if isinstance(error, ResultTooLarge) else f"{link.name} {error}"
        raise HttpError(503, said, Retry_After=str(COME_AGAIN_S)) from error
    except BaseException:
        spool.close()
        raise
    spool.seek(0)
    return Archive(spool, into.size, into.digest.hexdigest())


@contextlib.contextmanager
def calling(server: Server, request: Request, link: Link) -> Iterator[Callable[[], bool]]:
    """Take one of the few places for calls to a client on behalf of a caller; yield a function that tells if the call is useless now.

    Raises HttpError 503 at once if the client does not answer or all places are taken: a hanging client must block few threads.
    """
    if link.outage.failures:
        raise HttpError(503, f"{link.name} {link.outage.reason}", Retry_After=str(COME_AGAIN_S))
    with link.callers.place() as here, server.callers.place() if here else contextlib.nullcontext(False) as anywhere:
        if not (here and anywhere):
            raise HttpError(503, f"too many callers wait for {link.name}: try again", Retry_After=str(COME_AGAIN_S))
        yield lambda: request.left() or bool(link.outage.failures) or server.stopping.is_set()


STATUS_NAMES = tuple(status.value for status in Status)
WAIT_LIMIT_S = 45.0  # the longest `?wait=`: gateways give up after 60 s of silence


def read_wait(text: str, most_s: float | None = None) -> float:
    """Return how long a caller wants to wait, in seconds; at most `most_s`, or else WAIT_LIMIT_S."""
    if not re.fullmatch(r"[0-9]{1,30}(\.[0-9]{1,30})?", text):
        raise ValueError("give seconds, as in wait=30")
    return min(float(text), most_s or WAIT_LIMIT_S)


def read_statuses(name: str) -> Callable[[str], frozenset[str]]:
    """Return a reader of the statuses in the parameter `name`."""

    def read(text: str) -> frozenset[str]:
        names = [each.strip() for each in text.split(",")]
        for found in names:
            if found not in STATUS_NAMES:
                all_names = ", ".join(known for known in STATUS_NAMES if known != Status.PREPARED.value)
                close = nearest(found.capitalize(), STATUS_NAMES)
                said = f"{name} is {one_line(found, 40)!r}{close}: give one of {all_names}, or several separated by commas"
                raise HttpError(400, said, name)
        return frozenset(names)

    return read


STATUSES = "^({0})(,({0}))*$".format("|".join(STATUS_NAMES))  # what that reader accepts
WAIT = Parameter(
    "wait",
    "query",
    "number",
    "wait until the job has ended, for at most this many seconds; values above 45 count as 45",
    30,
    least=0,
    default=0.0,
    read=read_wait,
)
SINCE = Parameter(
    "since",
    "query",
    "string",
    "with `wait`: the status you know, or several separated by commas; the answer comes when the status is another",
    "Queued,Processing",
    pattern=STATUSES,
    default=frozenset(status.value for status in Status if status not in OVER),
    read=read_statuses("since"),
)


SHOW_GIVES = {200: Gives("the whole job", JSON_TYPE, EXAMPLE_JOB), 400: BAD, 404: NOT_FOUND}


@route("GET", "/jobs/<job_id>", "server", who="user portal reader operator", takes=(ID, WAIT, SINCE), gives=SHOW_GIVES, quick=True)
def show_job(server: Server, request: Request, job_id: int, wait: float, since: frozenset[str]) -> Answer:
    """Show a job: state, reason, attempts, history, and what it waits for."""
    job, has_waited = job_after_wait(server, request, job_id, wait, since)
    if has_waited:
        return Answer(job_json(server, job), 200, {"X-Job-Status": job.status.value})
    # Omit what needs more queries: callers that poll must not starve the others.
    headers = {"Retry-After": str(COME_AGAIN_S), "X-Job-Status": job.status.value}
    return Answer({**job_summary(server, job), "attempts": None, "history": None}, 200, headers)


def job_after_wait(server: Server, request: Request, job_id: int, wait_s: float, since: Collection[str]) -> tuple[Job, bool]:
    """Return a job when its status is none of `since`, or after `wait_s`; and False if too many callers wait, so that this one did not."""
    job = known_job(server, request, job_id)
    if not wait_s or job.status.value not in since:
        return job, True
    with server.waiters.place() as parked:
        if parked:
            server.wait_until(lambda: status_other_than(server, job.id, since), wait_s, request.left, job.id)
    return known_job(server, request, job_id), parked


def status_other_than(server: Server, job_id: int, known: Collection[str]) -> str | None:
    """Return a job's status if it is not in `known`, else None; an empty text if the row is gone."""
    rows = server.store.read(statements.JOB_STATUS, id=job_id)
    if not rows:
        return ""
    return None if rows[0]["status"] in known else str(rows[0]["status"])


TERMINATE_GIVES = {
    200: Gives("killed: none of its processes runs", JSON_TYPE, {"id": 42, "status": "Killed", "message": "terminated on request"}),
    202: Gives(
        "being stopped, or to be stopped when its client answers",
        JSON_TYPE,
        {"id": 42, "status": "Unknown", "message": "it will be stopped as soon as gpu1:9000 answers"},
    ),
    400: BAD,
    404: NOT_FOUND,
    409: Gives("it had already ended in another state", JSON_TYPE, EXAMPLE_JOB),
}


@route("POST", "/terminate/<job_id>", "server", who="user portal operator", takes=(ID,), gives=TERMINATE_GIVES)
def terminate(server: Server, request: Request, job_id: int) -> Answer:
    """Stop a job in any state. It may be repeated."""
    job = known_job(server, request, job_id)
    if job.status not in OVER:
        server.store.request_kill(job.id, Cause.CANCELLED, request.caller and request.caller.own_name)
        crash_point("kill.wished")
        kill_queued(server, job.id)
        job = known_job(server, request, job_id)
    if job.status not in OVER:
        wait_for_end(server, request, job)
        kill_queued(server, job.id)
        job = known_job(server, request, job_id)
    if job.status is Status.KILLED:
        return Answer({"id": job.id, "status": job.status.value, "message": job.reason}, 200, {"X-Job-Status": job.status.value})
    if job.status in OVER:
        return Answer(job_json(server, job), 409, {"X-Job-Status": job.status.value})
    link = server.links.get(job.client or "")
    message = f"it will be stopped as soon as {job.client} answers" if job.client else "it will be stopped before it is sent"
    if link is not None and not link.outage.reason:
        message = link.of(job.id).note or f"{job.client} is stopping it"
    return Answer({"id": job.id, "status": job.status.value, "message": message}, 202, {"X-Job-Status": job.status.value})


NOTED_PATIENCE_S = 10.0  # how long a terminate waits for a batch system that has only accepted the request


def wait_for_end(server: Server, request: Request, job: Job) -> None:
    """Ask a client to stop a job, and wait for that as long as the client answers. A client that does not is tried once."""
    with server.places.place() as parked:
        link = server.links.get(job.client or "")
        if link is not None and link.outage.failures and parked:
            try_now(server, request, link)
        server.wake(f"kill:{job.client}")
        patience_s = WAIT_LIMIT_S if parked and link and not link.outage.failures else 0.0

        noted_until = time.monotonic() + NOTED_PATIENCE_S

        def hopeless() -> bool:
            is_noted = link is not None and link.of(job.id).note.startswith(BEING_ENDED)
            return request.left() or bool(link and link.outage.failures) or (is_noted and time.monotonic() > noted_until)

        server.wait_until(lambda: over_or_queued(server, job.id), patience_s, hopeless, job.id)


TERMINATE_TRY_S = 2.0  # how long a terminate waits for a client that did not answer, and the pause between later tries


def try_now(server: Server, request: Request, link: Link) -> None:
    """Call a client now, despite its back-off, and wait briefly for the outcome."""
    failed_at, deadline = link.failed_at, time.monotonic() + TERMINATE_TRY_S
    link.try_at = server.clock.monotonic()
    server.wake(f"get:{link.name}")
    while link.outage.failures and link.failed_at == failed_at and time.monotonic() < deadline and not request.left():
        if server.stopping.wait(0.02):
            return


def over_or_queued(server: Server, job_id: int) -> Job | None:
    """Return the job if it is no longer at a client, else None."""
    job = server.store.get(job_id)
    return job if job is None or job.status in OVER or job.status is Status.QUEUED else None


# == 5. Site routes ==  Routes for operators: services and clients.

EXAMPLE_CLIENT = {
    "name": "127.0.0.1:9000", "services": ["example"], "reachable": True, "drained": False, "slots": 2, "free": 1, "memory": 16000,
    "gpus": 0, "load": 12.5, "jobs": 1, "instance": "a1b2c3", "same_client_as": [],
    "last_seen": "2026-11-24T09:00:00.000Z", "trouble": "", "held_for_s": 0.0,
}  # fmt: skip
EXAMPLE_SERVICE = {
    "name": "example", "policy": "share", "runs_per_user": 5, "max_runs": 10, "running": 1, "queued": 3, "users_queued": 2,
    "mean_run_s": 12.5, "paused": None, "clients": [EXAMPLE_CLIENT],
}  # fmt: skip
SERVICES = Gives("services, their limits, and their clients", JSON_TYPE, {"services": [EXAMPLE_SERVICE]})
CLIENTS = Gives("clients, and why one gets no jobs", JSON_TYPE, {"clients": [EXAMPLE_CLIENT]})
ONE_CLIENT = Gives("the client", JSON_TYPE, EXAMPLE_CLIENT)
NO_CLIENT = Gives("no client has this name", JSON_TYPE, {"message": "no client is called gpu9:9000: give one of 127.0.0.1:9000"})
CLIENT_NAME = Parameter("name", "path", "string", "the name of a client, as /clients lists it", "127.0.0.1:9000", required=True)


def clients_json(server: Server, links: Sequence[Link]) -> list[dict[str, Any]]:
    """Return clients in JSON. `trouble` says why a client gets no jobs now."""
    said = []
    for link, place in zip(links, server.capacities_of(links)):
        silent_s = None if link.heard_at is None else server.clock.monotonic() - link.heard_at
        held_for_s = max(0.0, max(link.outage.until, link.refusal.until) - server.clock.monotonic())
        known = link.protocol.has_events and link.heard_at is not None
        said.append({
            "name": link.name, "services": [service.name for service in link.services], "reachable": link.answers and not link.held(),
            "drained": link.drained, "slots": link.slots if known else None, "free": max(0, place.free) if known else None,
            "memory": link.memory, "gpus": link.gpus, "load": link.load if known else None, "jobs": server.store.load(link.name).jobs,
            "instance": link.instance or None, "same_client_as": [other.name for other in server.names_of(link)[1:]],
            "last_seen": None if silent_s is None else rfc3339(server.clock.wall() - silent_s), "trouble": link.why_not(),
            "held_for_s": round(held_for_s, 1),
        })  # fmt: skip
    return said


def service_json(server: Server, service: Service, caller: Caller | None) -> dict[str, Any]:
    """Return a service in JSON as a caller may see it."""
    mean_s, name = mean_run_s(server, service), service.name
    return {
        "name": name, "policy": service.policy, "runs_per_user": service.runs_per_user, "max_runs": service.max_runs,
        "running": server.store.line(name).busy, "queued": server.store.line(name).queued,
        "users_queued": server.store.users_queued(name), "mean_run_s": mean_s and round(mean_s, 3),
        "paused": server.paused[name].text() if name in server.paused else None,
        "clients": clients_json(server, server.links_of(service) if sees_site(caller) else []),
    }  # fmt: skip


@route("GET", "/services", "server", who="user portal reader operator", gives={200: SERVICES}, quick=True)
def show_services(server: Server, request: Request) -> Answer:
    """Show the services: policy, limits, running and queued jobs (counted up to 10,000); for operators and readers also their clients."""
    seen = [service for name, service in server.services.items() if sees_service(request.caller, name)]
    return Answer({"services": [service_json(server, service, request.caller) for service in seen]})


@route("GET", "/clients", "server", who="reader operator", gives={200: CLIENTS}, quick=True)
def show_clients(server: Server, request: Request) -> Answer:
    """Show the clients: slots, memory, load, jobs, and why one gets no jobs."""
    return Answer({"clients": clients_json(server, [*server.links.values()])})


def drain_client(server: Server, name: str, drained: bool) -> Answer:
    """Stop or resume sending jobs to a client. Raises HttpError 404 that lists the known ones."""
    link = server.links.get(name)
    if link is None:
        raise HttpError(404, f"no client is called {one_line(name, 80)}: give one of {', '.join(server.links)}")
    server.drain(link, drained)
    log.info("client %s is %s", link.name, "drained" if drained else "resumed")
    server.dispatch()
    return Answer(clients_json(server, [link])[0])


@route("POST", "/clients/<name:path>/drain", "server", who="operator", takes=(CLIENT_NAME,), gives={200: ONE_CLIENT, 404: NO_CLIENT})
def drain(server: Server, request: Request, name: str) -> Answer:
    """Send a client no more jobs until it is resumed, also after a restart of the server. Its present jobs keep running."""
    return drain_client(server, name, True)


@route("POST", "/clients/<name:path>/resume", "server", who="operator", takes=(CLIENT_NAME,), gives={200: ONE_CLIENT, 404: NO_CLIENT})
def resume(server: Server, request: Request, name: str) -> Answer:
    """Send a drained client jobs again."""
    return drain_client(server, name, False)


# == 6. Server ==  The server claims jobs and sends them. Its ticks move jobs on by the Store and by what clients answer.


class Pause(NamedTuple):
    """A service whose jobs wait because somebody asked for that."""

    service: str
    at: float  # wall time
    caller: str
    reason: str

    def text(self) -> str:
        """Return what its jobs wait for."""
        return f"service {self.service} is paused since {rfc3339(self.at)} by {self.caller}" + (f": {self.reason}" if self.reason else "")


class Server(Node):
    """A server: its services, and a link to each client."""

    def __init__(self, config: Config, store: Store, data: DataFolder, clock: Clock | None = None) -> None:
        super().__init__(config, store, data, clock)
        self.services = config.services
        self.links: dict[str, Link] = {}
        self.deserted: dict[str, float] = {}  # by service without any client: since when (monotonic)
        self.callers = ThreadLimit(CALLS_IN_ALL)  # for calls to clients on behalf of callers
        self.listeners = ThreadLimit(LISTENER_PLACES)
        self.paused = {str(row["service"]): Pause(*row) for row in store.read(statements.PAUSED_ALL)}  # by service
        store.set_limits(self.services, Sharing(config.share_half_life_s, config.ageing_s, config.weights))
        self.links = self.links_for(self.services)
        for link in self.links.values():
            link.services = self.services_at(link, self.services)

    def links_for(self, services: Mapping[str, Service]) -> dict[str, Link]:
        """Return a link to each client of these services, by name: the present one, or a new one."""
        drained = {row["client"] for row in self.store.read(statements.DRAINED_ALL)}
        links = {name: link for name, link in self.links.items() if link.calls_in}
        for address in itertools.chain.from_iterable(service.addresses for service in services.values()):
            if address.name not in links:
                link = self.links.get(address.name) or Link(address, self.data, self.clock, self.config.ca_file)
                link.drained = link.drained or address.name in drained
                links[address.name] = link
        return links

    @staticmethod
    def services_at(link: Link, services: Mapping[str, Service]) -> list[Service]:
        """Return those of these services that a client serves."""
        return [service for service in services.values() if link.serves(service)]

    def service(self, job: Job) -> Service:
        """Return the service of a job, with default limits if it is no longer configured."""
        name = job.service or ""
        return self.services.get(name) or make_service(name, {"CLIENTS": "http://not-configured"})

    def links_of(self, service: Service) -> list[Link]:
        links = self.links  # a service that was removed just now may have none any more
        named = [links[address.name] for address in service.addresses if address.name in links]
        return [*named, *(link for link in links.values() if link.calls_in and link.serves(service))]

    def troubles(self, service: Service) -> dict[str, str]:
        """Return why each client of a service gets no jobs now, by name; empty if it gets jobs."""
        return {link.name: link.why_not(service.name) for link in self.links_of(service)}

    def names_of(self, link: Link) -> list[Link]:
        """Return all links to the same client, this one first."""
        return [link, *(other for other in self.links.values() if other is not link and other.client == link.client)]

    def capacities_of(self, links: Iterable[Link]) -> list[ClientCapacity]:
        """Return clients as the scheduler sees them now. Two URLs of one client share its slots."""
        by_client: dict[str, list[Link]] = {}
        for link in self.links.values():
            by_client.setdefault(link.client, []).append(link)
        places = []
        for link in links:
            others = [other for other in by_client.get(link.client, ()) if other is not link]
            # Read before what has ended: see count_no_more.
            jobs, cpus, memory, _, _, gpus = map(sum, zip(*(self.store.load(each.name) for each in (link, *others))))
            places.append(link.capacity(cpus, memory, jobs, others, gpus))
        return places

    def start(self) -> None:
        """Let the core claim jobs from now on, as soon as a commit makes that possible."""
        self.store.core.propose = functools.partial(propose, self)
        super().start()

    def stop(self) -> None:
        """Claim no more jobs."""
        self.store.core.propose = lambda: None
        super().stop()

    def dispatch(self) -> None:
        """Claim jobs after a client or a sender became free. If storing fails, `dispatch_tick` tries again."""
        self.store.core.settle()

    def drain(self, link: Link, drained: bool) -> None:
        """Store that a client, under all its names, gets no more jobs, or gets jobs again."""
        links = self.names_of(link)
        sql, values = (statements.DRAINED_SET, {"at": self.clock.wall()}) if drained else (statements.DRAINED_CLEAR, {})
        self.store.write(lambda db: [db.execute(sql, {"client": each.name, **values}).rowcount for each in links])
        for link in links:
            link.drained = drained


def dispatch_tick(server: Server) -> bool:
    """Claim the next job for the client that the scheduler chose. Return whether there was one.

    Most claims are made in the transaction that made them possible; this tick makes those that failed. Each client has separate
    senders and gets a job only if one of them is free, so a client that hangs delays no other.
    """
    step = propose(server)
    return step is not None and server.store.write(lambda db: step())


def propose(server: Server) -> Callable[[], bool] | None:
    """Return how to claim the next job inside a transaction, or None if there is none."""
    chosen = next_placement(server)
    return None if chosen is None else functools.partial(place, server, *chosen)


def place(server: Server, head: Candidate, place: ClientCapacity) -> bool:
    """Claim a job for a client inside a transaction; a sender gets it after the COMMIT. Return False if it can no longer be claimed."""
    link = link_to(server, head, place)
    if not link.hold(head.job_id):  # before the COMMIT: a Processing job that no sender holds is treated as lost
        return False  # it was queued again, and its sender is about to release it
    claimed = None
    try:
        claimed = server.store.claim(head.job_id, link.name, place.taken + head.cpus)
    finally:
        if claimed is None:
            link.release(head.job_id)
    if claimed is None:
        return False
    crash_point("claim.decided")
    server.store.core.after(functools.partial(hand_to_sender, server, link, claimed), functools.partial(link.release, claimed.id))
    return True


def hand_to_sender(server: Server, link: Link, job: Job) -> None:
    """Give a job to a sender of its client, after its claim was stored."""
    crash_point("claim.stored")
    log.info(
        "job %d Queued -> Processing (service=%s user=%s): for %s",
        job.id,
        job.service,
        job.user_id,
        link.name,
        extra=job_fields("job", job),
    )
    link.outbox.append(job)
    server.wake(f"send:{link.name}")


def next_placement(server: Server) -> tuple[Candidate, ClientCapacity] | None:
    """Return the next job and the client that gets it, or None if nothing can be sent now."""
    queued = services_queued(server)  # first, because there may be hundreds of clients
    free = [link for link in server.links.values() if can_be_sent_to(link)] if queued else []
    clients = one_each(free)
    names = {link.name: clients[link.client].name for link in free}
    lines = [line for line in (service_queue_of(server, service, names) for service in queued) if line]
    if not lines:
        return None
    return choose(lines, server.capacities_of(clients.values()), functools.partial(runs_at, server), server.store.steady())


def services_queued(server: Server) -> list[Service]:
    """Return the services with a queued job that could run, if a client had room."""
    return [service for service in server.services.values() if next(server.store.turns(service.name), None) is not None]


def can_be_sent_to(link: Link) -> bool:
    """Tell whether a job that is claimed for a client now would be sent at once."""
    return link.takes_jobs() and link.has_free_sender()


def one_each(links: Iterable[Link]) -> dict[str, Link]:
    """Return the first link to each client, by client."""
    found: dict[str, Link] = {}
    for link in links:
        found.setdefault(link.client, link)
    return found


def link_to(server: Server, head: Candidate, place: ClientCapacity) -> Link:
    """Return the link by which a service reaches the chosen client."""
    chosen = server.links[place.name]
    links = server.links_of(server.services[head.service])
    return next((link for link in links if link.client == chosen.client and can_be_sent_to(link)), chosen)


def service_queue_of(server: Server, service: Service, names: Mapping[str, str]) -> ServiceQueue | None:
    """Return the queue of a service, or None if it is empty or paused, at its limit, or no client can get its jobs.

    `names` maps each name of a client that can get jobs to the one name that the scheduler uses for it.
    """
    links = [link for link in server.links_of(service) if link.name in names]
    clients = {names[link.name] for link in links if not link.wrong_tokens.waits(service.name)}
    busy, turns = server.store.line(service.name).busy, server.store.turns(service.name)
    first = next(turns, None) if clients and service.name not in server.paused else None
    if first is None or busy >= service.max_runs:
        return None
    heads = (turn.candidate(service.name) for turn in itertools.islice(itertools.chain([first], turns), CANDIDATES_LOOKED_AT))
    return ServiceQueue(service.name, clients, busy / service.max_runs, mean_run_s(server, service), heads)


def mean_run_s(server: Server, service: Service) -> float | None:
    """Return the mean length of a service's last runs in seconds, or None if there were none."""
    pace = server.store.line(service.name).pace
    return pace.mean_s if pace.runs else None


def runs_at(server: Server, client: str) -> list[Run]:
    """Return what runs at a client."""
    links = server.names_of(server.links[client])
    names, ended = {link.name for link in links}, {found.job_id for link in links for found in link.reports()}
    return [run for run in server.store.runs() if run.client in names and run.job_id not in ended]


def send_tick(server: Server, link: Link) -> bool:
    """Send one job to one client. Return whether there was one."""
    job = next_to_send(server, link)
    if job is None:
        probe_tick(server, link)
        return False
    was_probing = link.probing
    try:
        with link.protocol.turn():
            send_job(server, link, job)
    finally:
        was_full = was_probing or not link.has_free_sender()
        link.release(job.id)
        if was_full:
            server.dispatch()
    return True


def may_send(server: Server, link: Link) -> bool:
    """Tell whether `send_tick` may have something to do: a job to send or send again, or a probe."""
    return bool(link.outbox) or (not link.held() and (server.store.load(link.name).pinned > 0 or lacks_probe(link)))


def lacks_probe(link: Link) -> bool:
    """Tell whether to ask a failed client if it answers, because its long poll began before the failure and may still wait."""
    return not (link.answers or link.held()) and link.asked_at < link.failed_at


def probe_tick(server: Server, link: Link) -> None:
    """Ask a client that failed whether it answers again, without risking a job for that.

    `get_tick` would notice, too, but its long poll may have begun before the failure and still wait.
    """
    if lacks_probe(link) and link.probe():
        server.dispatch()


def next_to_send(server: Server, link: Link) -> Job | None:
    """Return a job to send: one that was claimed for this client, or else one that a lost answer ties to it."""
    with contextlib.suppress(IndexError):
        return link.outbox.popleft()
    if not link.ready():
        return None
    for job in server.store.jobs(statements.PINNED_AT_CLIENT, client=link.name) if server.store.load(link.name).pinned else []:
        if not link.protocol.knows_keys:
            new_attempt(server, job, Reason.CANNOT_SAY.format(client=link.name))
            continue
        is_due = link.of(job.id).resend_due <= server.clock.monotonic()
        if is_due and link.has_free_sender() and link.hold(job.id):  # it occupies a sender, like any other job
            link.of(job.id).resend_due = server.clock.monotonic() + 2 * READ_TIMEOUT_S
            return job
    return None


def send_job(server: Server, link: Link, job: Job) -> None:
    """Send a claimed job and store the outcome."""
    folder = server.data.job(job.uuid)
    if link.leaving and job.status is Status.PROCESSING:
        server.store.move(job, Status.QUEUED, Reason.NOT_CONFIGURED.format(client=link.name), client=None)
        kill_queued(server, job.id)
        return
    try:
        paths = files_below(folder)
        if not paths:
            reason = Reason.FILES_REMOVED.format(where="server")
            end_busy(server, job, Status.FAILED, reason, cause=Cause.INFRASTRUCTURE.value)
            return
        job, more = load_plugin("uploads").with_inputs(server, job, folder, paths) if job.from_ids else (job, [])
        if len(paths) + len(more) >= PARTS_LIMIT:
            reason = Reason.TOO_MANY_INPUTS.format(limit=PARTS_LIMIT)
            server.store.move(job, Status.INVALID, reason, cause=Cause.USER.value)
            return
        returned = server.service(job).return_inputs
        dest_id, end = link.submit(job, folder, paths, returned, end_wait_ms(server, link, job), more)
        crash_point("send.answered")
        link.of(job.id).answer = (dest_id, end is not None)
    except NothingSent as error:
        send_again(server, link, job, error)
        return
    except InputsChanged as error:
        end_busy(server, job, Status.FAILED, str(error), cause=Cause.INFRASTRUCTURE.value)
        return
    except Rejected as error:
        link.heard()
        server.store.move(job, Status.INVALID, Reason.REFUSED.format(client=link.name, error=error), cause=Cause.USER.value)
        return
    except (NoAnswer, OSError) as error:
        link.failed(error)
        mark_outcome_unknown(server, link, job, error)
        return
    take_answer(server, link, job, dest_id, end)


def take_answer(server: Server, link: Link, job: Job, dest_id: str, end: Any) -> None:
    """Store that a client has accepted a job, and its end if that came along."""
    link.took_one(job.service or "")
    link.protocol.accepted(server, dest_id)
    if end is None or not end_as_answered(server, link, job._replace(dest_id=dest_id), end):
        store_accepted(server, link, job, dest_id)
        crash_point("send.stored")
        if end is not None:
            ask_for_end(server, link, job)
        if server.store.load(link.name).kills:
            server.wake(f"kill:{link.name}")


SHORT_RUN_S, END_WAIT_S = 0.06, 0.5  # mean run of a service whose submits wait for the end, and how long (X-Joborch-Wait)
END_WAITERS, END_WAITERS_IN_ALL = 8, 32  # submits that wait for an end at once: at one client, at all


def end_wait_ms(server: Server, link: Link, job: Job) -> int:
    """Return how long a client may wait for the end of this job before it answers the submit: 0 unless its service's runs are short.

    The thread that sends it waits as long. It is not counted as a sender then, so that others can send meanwhile.
    """
    is_new = job.status is Status.PROCESSING and job.kill_requested_at is None
    mean_s = mean_run_s(server, server.service(job)) if is_new and link.protocol.has_events and not link.probing else None
    if mean_s is None or mean_s >= SHORT_RUN_S or sum(each.waiting for each in server.links.values()) >= END_WAITERS_IN_ALL:
        return 0
    was_full = not link.has_free_sender()
    with link.lock:
        if link.waiting >= END_WAITERS:
            return 0
        link.of(job.id).waits, link.waiting = True, link.waiting + 1
    if was_full:
        server.dispatch()
    return round(1000 * END_WAIT_S)


def end_as_answered(server: Server, link: Link, job: Job, said: Any) -> bool:
    """Bring a payload's end that came with the answer to its submit to its place, as one that /events told.

    Submitted and the end are two moves in one transaction. Returns False if it must be asked for in the usual way.
    """
    payload = clean_payload(said)
    wrong = why_not_its_end(job, payload)
    if payload is None or wrong:
        link.note(f"answered with an end of job {job.id} that cannot be used: {wrong}; it is asked again")
        return False
    found = EndReport(job.id, payload, 0.0)
    link.ended_at = server.clock.monotonic()  # before the COMMIT, in which the next job may be claimed
    if not collect_end(server, link, job, found):
        drop_part(found)
        return False
    crash_point("send.ended")
    link.confirm(job.dest_id)
    return True


def ask_for_end(server: Server, link: Link, job: Job) -> None:
    """Have the fetch loop ask a client for the end of a payload: the client will not report it again by itself."""
    note_end(server, link, EndReport(job.id, {"status": "?"}, 0.0))


def why_not_its_end(job: Job, payload: Mapping[str, Any] | None) -> str:
    """Return why what a client says in its answer to a submit cannot be the end of this job's payload; an empty text if it can."""
    if payload is None:
        return "it is not the description of a payload"
    if (payload["uuid"], payload["attempt"], payload["id"]) != (job.uuid, job.attempt, job.dest_id):
        return "it is that of another payload"
    failed = payload["status"] == Status.FAILED.value and payload.get("cause") == Cause.USER.value
    if payload["status"] != Status.COMPLETED.value and not failed:
        return f"it says {payload['status']}"
    return "" if inline_archive_of(payload) else "its archive is missing, or does not fit its digest"


def send_again(server: Server, link: Link, job: Job, error: NothingSent) -> None:
    """The client certainly did not get the job: pause submits to it, and queue the job again unless it is tied to this client."""
    if isinstance(error, Refused):
        link.refused(error, job.service or "")
    else:
        link.failed(error)
    if job.status is Status.PROCESSING:
        server.store.move(job, Status.QUEUED, Reason.NOT_SENT.format(client=link.name, error=error), client=None)
        crash_point("send.refused")
        kill_queued(server, job.id)
    else:
        link.of(job.id).resend_due = server.clock.monotonic() + backoff_s(link.outage.failures)


def kill_queued(server: Server, job_id: int) -> None:
    """Kill a queued job for which terminate was requested."""
    job = server.store.get(job_id)
    if job and job.status is Status.QUEUED and job.kill_requested_at is not None:
        server.store.move(job, Status.KILLED, Reason.KILLED_UNSENT, cause=Cause.CANCELLED.value)
        crash_point("kill.queued")


def store_accepted(server: Server, link: Link, job: Job, dest_id: str) -> None:
    """Store the payload's id. Durably if the client has no attempt keys, because then it could not be found again."""
    durable = not link.protocol.knows_keys
    server.store.move(job, Status.SUBMITTED, Reason.ACCEPTED.format(client=link.name), durable=durable, dest_id=dest_id)


def mark_outcome_unknown(server: Server, link: Link, job: Job, error: Exception) -> None:
    """Bytes were sent and no answer came: send the job to this client again under the same attempt key.

    A client without attempt keys could run the job twice, so there a new attempt begins.
    """
    if job.status is Status.PROCESSING:
        server.store.move(job, Status.UNKNOWN, Reason.ANSWER_LOST.format(client=link.name, error=error))
        crash_point("send.lost")
    link.of(job.id).resend_due = server.clock.monotonic() + backoff_s(link.outage.failures)
    current = server.store.get(job.id)
    if not link.protocol.knows_keys and current and current.status is Status.UNKNOWN and not current.dest_id:
        new_attempt(server, current, Reason.ANSWER_LOST_22.format(client=link.name, error=error))


def end_busy(server: Server, job: Job, to: Status, reason: str, **changes: Any) -> None:
    """Move a job to an end state from its current busy state, unless it has ended or is at another attempt.

    If its payload ended before the submit was answered, it is still Processing but has a `dest_id`: it becomes Submitted first.
    """
    current: Job | None = job
    while current is not None and current.status in BUSY and current.attempt == job.attempt:
        if current.status is Status.PROCESSING and job.dest_id:
            moved = server.store.move_accepted(current, Reason.ACCEPTED.format(client=job.client), job.dest_id, to, reason, **changes)
        else:
            moved = server.store.move(current, to, reason, **changes)
        if moved:
            return
        current = server.store.get(job.id)


def become_unknown(server: Server, job: Job, reason: str) -> None:
    """Move a job to Unknown. The server keeps trying, so the job recovers without help."""
    if job.status in (Status.SUBMITTED, Status.RUNNING):
        server.store.move(job, Status.UNKNOWN, Reason.TRIED_AGAIN.format(reason=reason))


def payload_gone(server: Server, job: Job, reason: str) -> None:
    """The client answers but does not know the payload, so no process of it runs."""
    if job.kill_requested_at is not None and job.status is not Status.PROCESSING:
        server.store.move(job, Status.KILLED, Reason.KILLED_AND_GONE.format(reason=reason), cause=Cause.CANCELLED.value)
    else:
        new_attempt(server, job, reason)


def new_attempt(server: Server, job: Job, reason: str) -> None:
    """After an infrastructure failure: queue another attempt, or fail the job if none is left."""
    if attempts_left(job):
        changes: dict[str, Any] = {"attempt": job.attempt + 1, "client": None, "dest_id": None, "started_at": None}
        changes.update(dict.fromkeys(FIGURES))
        due = server.store.steady() + backoff_s(job.attempt)
        server.store.move(job, Status.QUEUED, Reason.ATTEMPT.format(attempt=job.attempt, reason=reason), not_before=due, **changes)
        crash_point("attempt.stored")
    else:
        text = Reason.NO_ATTEMPT_KILLED if job.kill_requested_at else Reason.NO_ATTEMPT_LEFT
        server.store.move(job, Status.FAILED, text.format(reason=reason, attempt=job.attempt), cause=Cause.INFRASTRUCTURE.value)


# == 7. Links ==  The server's calls to a client. Every call has time-outs, and its error says what the client may have received.

FOREIGN_PATIENCE_S = 3600.0  # answers without the joborch header are ignored for this long: then it may be a 2.2 client
SILENT_AFTER_S = 15.0  # if a client has not answered for this long, its jobs become Unknown
PACKING_HEADER = "X_Joborch_Packing"  # in a client's 503: the result is being packed, nothing is wrong
LOG_PART_BYTES = 1 * MIB  # of an output stream, at most, in one answer
SENDERS_PER_CLIENT = 3  # jobs that are sent to one client at once


class Link:
    """One client as the server sees it: how to call it, whether it answers, and which results wait there."""

    calls_in = False  # it calls the server: a plug-in has the subclass for that
    costs = False  # it is a cloud instance: a plug-in sets it

    def __init__(self, address: Address, data: DataFolder, clock: Clock, ca_file: str = "") -> None:
        self.address, self.data, self.clock, self.ca_file, self.name = address, data, clock, ca_file, address.name
        self.on_loopback = is_loopback(host_of(address.base_url or address.upload_url)[1])
        self.sessions: dict[str, Session | None] = {}  # by token; None: calls carry no proof
        self.opening, self.outdated = threading.Lock(), False  # outdated: joborch 0.1.0, which cannot prove its identity
        self.services, self.connections, self.lock = list[Service](), Connections(), threading.Lock()
        self.slots, self.memory, self.load, self.gpus = 1, cast("int | None", None), 0.0, cast("int | None", 0)  # see EventsReply
        self.job_slots = False  # a job takes one slot there, whatever its number of cores
        self.jobs: dict[int, LiveJob] = {}  # by job id: what is known of jobs at this client beside their rows
        self.sending = self.waiting = 0  # of these, how many a sender holds, and how many of those wait for the end
        self.ours = False  # it is joborch: an answer had its header
        self.protocol: ClientProtocol = (ClientProtocol if address.base_url else load_plugin("compat22").Protocol22)(self)
        self.heard_at: float | None = None  # monotonic
        self.silent_since = clock.monotonic()
        self.drained = False  # an operator stopped new jobs for it
        self.leaving = False  # it is no longer configured: it gets no jobs, and goes when it has none
        self.probing = False  # after a failure it gets one job at a time until it accepts one
        self.outage = Backoff(clock)  # after failed calls
        self.answers = True  # it has answered since its last failure
        self.problem = ""  # why it accepts no payload now, as the client reports
        self.problems, self.problems_seen = list[dict[str, Any]](), 0  # those that its /health shows; the number of this report
        self.ahead_s, self.wants_token = 0.0, False  # by how much its clock is ahead; whether its last failure is that it demands a token
        self.try_at = self.asked_at = float("inf")  # monotonic: when to call it despite the back-off, for a kill; when its poll began
        self.failed_at = self.ended_at = float("-inf")  # monotonic: its last failure, and the last end of a run there
        self.refusal, self.wrong_tokens = Backoff(clock), TokenRefusals(clock)  # after submits that it refused
        self.instance, self.since, self.offered = "", 0, frozenset[str]()  # `offered`: services that a client that calls in may serve
        self.start, self.copy_of = "", ""  # id of its process start; the client whose data folder it has a copy of
        self.instance_at = self.start_at = float("-inf")  # monotonic: when instance and start became known
        self.met = self.relist = False  # its instance was compared with the others' instances; its whole list must be requested again
        self.undecided: set[int] = set()  # ids of jobs that two clients report: decided when both lists are complete
        self.confirmed_ids: list[str] = []  # payload ids to confirm: their results are stored here
        self.listed: set[int] | None = None  # job ids that a first contact has listed so far; None if none is under way
        self.polls, self.quiet_until = Allowance(), 0.0  # monotonic: no warning about its answers before then
        self.callers = ThreadLimit(CALLS_A_CLIENT)  # limits calls on behalf of HTTP callers
        self.outbox: deque[Job] = deque()  # claimed for it, and not yet taken by a sender
        self.superseded_attempts: dict[str, Job] = {}  # by mark: attempts that the server replaced, but that still run here

    # -- its jobs --

    def of(self, job_id: int) -> LiveJob:
        """Return the record of a job."""
        return self.jobs.get(job_id) or self.jobs.setdefault(job_id, LiveJob())

    def hold(self, job_id: int) -> bool:
        """Begin the record of a job that a sender gets. Return False if a sender still holds it."""
        with self.lock:
            known = self.of(job_id)
            if not known.sending:
                self.jobs[job_id], self.sending = LiveJob(sending=True, end=known.end), self.sending + 1
            return not known.sending

    def release(self, job_id: int) -> None:
        """Note that no sender holds a job any more."""
        with self.lock:
            live = self.of(job_id)
            self.sending, self.waiting = self.sending - live.sending, self.waiting - live.waits
            live.sending = live.waits = False

    def reports(self) -> list[EndReport]:
        """Return the payloads that have ended here and whose results are not collected yet."""
        return [live.end for live in list(self.jobs.values()) if live.end is not None]

    def serves(self, service: Service) -> bool:
        """Tell whether it is a client of a service."""
        return any(address.name == self.name for address in service.addresses)

    def is_calm(self) -> bool:
        """Tell whether nothing can be due soon."""
        return False

    def waits_for_news(self) -> bool:
        """Tell whether news will come by themselves, so that there is nothing to ask for."""
        return False

    def token(self, service: str | None = None) -> str:
        """Return the token that this client must have: the one set for the service, or else the one in this user's token file.

        Without a service name, any service's token will do. The token file is only used for a client on this machine.
        """
        token = self.set_token(service)
        path = client_token_file() if self.on_loopback and not token else None
        try:  # read again each time: the client may start later
            return read_small_file(path).strip() if path else token
        except (OSError, ValueError):
            return ""

    def set_token(self, service: str | None) -> str:
        """Return the token that is set for a service, or for any of its services if the name is not one of them."""
        set_ones = self.set_tokens()
        return set_ones[service] if service in set_ones else next(filter(None, set_ones.values()), "")

    def set_tokens(self) -> dict[str | None, str]:
        return {service.name: service.token for service in self.services}

    def may_be_22(self) -> bool:
        """Tell whether all its services allow a 2.2 client, which cannot prove its identity."""
        return bool(self.services) and all(service.peer == "2.2" for service in self.services)

    def remedy(self, setting: str, lacking: Callable[[Service], bool]) -> str:
        """Return the full name of a setting for the first service that lacks it."""
        name = next((service.name.upper() for service in self.services if lacking(service)), "<NAME>")
        return f"SERVICE_{name}_{setting}"

    @property
    def client(self) -> str:
        """What identifies the client, however many URLs it has: its instance, or its name until the instance is known."""
        return f"instance {self.instance}" if self.protocol.has_events and self.instance and not self.copy_of else self.name

    def is_heard(self) -> bool:
        return self.heard_at is not None and not self.outage.failures

    def has_told_all(self) -> bool:
        """Tell whether its list of payloads is complete, or waiting for it is useless."""
        if self.protocol.has_events and self.is_heard():
            return self.since > 0 and self.listed is None
        return not self.protocol.has_events or self.silent_s() > SILENT_AFTER_S

    # -- health --

    def held(self) -> bool:
        """Tell whether the client has never answered, or is held back after a failure."""
        return self.heard_at is None or self.outage.waits()

    def heard(self) -> None:
        """Note that the client answered. Everything that waits for it is due at once."""
        if self.outage.failures:
            log.info("client %s answers again after %s", self.name, format_duration(self.clock.monotonic() - self.silent_since))
            for live in list(self.jobs.values()):
                live.resend_due = live.kill_due = 0.0
                if live.end is not None:
                    live.end.due = 0.0
        self.heard_at = self.silent_since = self.clock.monotonic()
        self.outage.worked()
        self.answers, self.try_at = True, float("inf")

    def failed(self, error: object) -> None:
        """Pause calls to the client, longer after each failure in a row. Calls that fail during the pause do not count again."""
        text = one_line(str(error))
        if text != self.outage.reason:
            start = start_command(self.address.base_url) if self.heard_at is None and text.endswith("reached: connection refused") else ""
            log.log(logging.INFO if start else logging.WARNING, "client %s: %s", self.name, start or text)
        self.failed_at, self.probing, self.answers, self.wants_token = self.clock.monotonic(), True, False, isinstance(error, Refused)
        if self.outage.waits():
            self.outage.reason = text
        else:
            self.outage.failed(text)

    def probe(self) -> bool:
        """Ask a client that failed whether it answers again, with a call that affects no job. Return whether it does."""
        try:
            self.protocol.probe()
            self.answers = True
        except Gone as error:
            log.debug("client %s: %s", self.name, error)  # it is a 2.2 client
        except (NothingSent, NoAnswer) as error:
            self.failed(error)
        return self.answers

    def refused(self, error: object, service: str = "") -> None:
        """Pause submits to a client that answers but refuses jobs; if it demands another token, only those of this service."""
        text, self.probing = one_line(str(error)), True
        self.wrong_tokens.failed(service, text) if isinstance(error, WrongToken) else self.refusal.failed(text)

    def took_one(self, service: str = "") -> None:
        self.heard()
        self.refusal.worked()
        self.wrong_tokens.worked(service)
        self.probing = False

    def takes_jobs(self) -> bool:
        """Tell whether it may get a new job now. It must have answered since its last failure."""
        return not self.drained and not self.leaving and not self.copy_of and self.answers and not self.problem and self.ready()

    def ready(self) -> bool:
        return not self.held() and not self.refusal.waits()

    def has_free_sender(self) -> bool:
        """Tell whether a job claimed for it now would be sent at once."""
        return self.sending - self.waiting < (1 if self.probing else SENDERS_PER_CLIENT)

    def why_not(self, service: str = "") -> str:
        """Return why it gets no jobs now, of one service or of all, as the end of a sentence; empty if it gets jobs."""
        if self.leaving or self.drained:
            return "is no longer configured" if self.leaving else "is drained: an operator stopped new jobs for it"
        if self.copy_of:
            return f"runs on a copy of the data folder of {self.copy_of}: stop it, and start it with an empty DATA_PATH"
        if self.takes_jobs() or self.wrong_tokens.reason(service):
            return self.wrong_tokens.reason(service)
        if self.outage.reason:
            return f"{self.outage.reason} ({format_duration(self.silent_s())} ago)"
        return self.problem or self.refusal.reason or "has not been called yet"

    def silent_s(self) -> float:
        return self.clock.monotonic() - self.silent_since

    def capacity(self, cpus: int, memory: int, jobs: int = 0, others: Sequence[Link] = (), gpus: int = 0) -> ClientCapacity:
        """Return its capacity for the scheduler, given the sums of cores, memory (MiB), jobs and GPUs that it has.

        Payloads that have ended and wait to be fetched use none. `others` are further URLs of the same client; their jobs count, too.
        """
        ended = [found for link in (self, *others) for found in link.reports()]
        taken, given = (jobs, sum(min(found.cpus, 1) for found in ended)) if self.job_slots else (cpus, sum(found.cpus for found in ended))
        free_memory = None if self.memory is None else self.memory - memory + sum(found.memory for found in ended)
        free_gpus = (self.gpus or 0) - gpus + sum(found.gpus for found in ended)
        now, is_22 = self.clock.monotonic(), not self.protocol.has_events
        state = (self.load, now - self.failed_at, now - self.ended_at < TURNING_S, is_22, cpus, self.job_slots, self.costs)
        return ClientCapacity(self.name, self.slots, self.slots - taken + given, self.memory, free_memory, *state, self.gpus, free_gpus)

    # -- limits on what it sends --

    def confirm(self, payload_id: str | None) -> None:
        """Let the next poll tell the client that it need not keep a result. The rest is found again at a first contact."""
        if payload_id and len(self.confirmed_ids) < SETTLED_LIMIT:
            self.confirmed_ids.append(payload_id)

    def note(self, text: str, level: int = logging.WARNING) -> None:
        """Log an oddity in its answers, at most once a minute: a faulty client must not fill the log."""
        if time.monotonic() >= self.quiet_until:
            self.quiet_until = time.monotonic() + 60
            log.log(level, "client %s %s", self.name, text)

    # -- proof --

    def look(self, made: socket.socket) -> None:
        """Raise NothingSent if a connection leads to another user of this machine. Called before the first byte is sent.

        If all its services have a token, the other user must prove that it knows it; a 2.2 client cannot.
        """
        try:
            port = made.getpeername()[1]
            if not is_loopback(made.getpeername()[0]):
                return
            uid = far_uid(made)
        except OSError as error:
            raise NothingSent(f"cannot be reached: {plain_cause(error)}") from error
        by_mac = bool(self.services) and all(self.set_tokens().values()) and not self.may_be_22()
        if is_own_user(uid) or by_mac:
            return
        self.sessions.clear()
        whose = "belongs to an unknown user" if uid is None else f"belongs to the user {uid}"
        remedy = "set " + self.remedy("TOKEN", lambda service: not service.token) + " to its token"
        raise NothingSent(
            f"is not called: its port {port} on this machine {whose}; stop the process that listens there, "
            f"or, if that user runs this client, {'run it as this user' if self.may_be_22() else remedy}"
        )

    def session(self, service: str | None, patience_s: float = HELLO_TIMEOUT_S) -> Session | None:
        """Return the session whose proofs this client's calls need, or None if they need no proof.

        Without a service name, any service's token will do. Raises NothingSent if the client must not be called.
        """
        if not self.protocol.can_prove and not self.may_be_22():
            raise NothingSent(self.no_joborch("it has no common base URL"))
        if self.heard_at is None:  # many clients may hang: do not let the first call to another one wait long for a thread
            patience_s = min(patience_s, 2.0 ** min(self.outage.failures, 10))
        names = [service] if service in self.set_tokens() else list(self.set_tokens()) or [None]
        trouble: NothingSent | None = None
        with self.opening:
            tokens = list(dict.fromkeys(map(self.token, names)))
            known = dict(self.sessions)  # a copy, because a failed call clears the table
            for token in sorted(tokens, key=lambda token: token not in known) if self.protocol.can_prove else []:
                try:
                    if token not in known:
                        self.sessions[token] = known[token] = self.open_session(service, token, patience_s)
                    return known[token]
                except NothingSent as error:
                    trouble = trouble or error
                except NoAnswer as error:  # /hello changes nothing, so a lost answer is harmless
                    trouble = trouble or NothingSent(str(error))
        if trouble is not None:
            raise trouble
        return None

    def open_session(self, service: str | None, token: str, patience_s: float) -> Session | None:
        """Open a session by calls that change nothing. Return None if the client need not prove its identity."""
        said = self.greet(patience_s)
        if said is None:
            return None
        is_set = bool(token) and token in self.set_tokens().values()
        if not token and not self.on_loopback and not self.may_be_22():
            setting = self.remedy("TOKEN", lambda each: each.name == service or (service is None and not each.token))
            raise NothingSent(f"is not called, because it cannot prove its identity: set {setting} to its token")
        if not token or not (said["proof"] or is_set):
            return None  # without a token, on loopback, `look` has checked the user
        return self.begin_session(link_key(token), said["nonce"], patience_s, service)

    def begin_session(self, key: bytes, nonce: str, patience_s: float, service: str | None = None) -> Session:
        """Return a session with a client that has proven that it knows the key. Raises NothingSent otherwise."""
        session, url = Session(key, nonce), f"{self.address.base_url}/hello"
        answer, proven = self.prove("GET", url, patience_s, session)
        text = read_some(answer, 4 * KIB)
        if not proven:
            refused = refused_text(answer.status, text, service)
            raise WrongToken(refused) if answer.status in (401, 403) else NothingSent(self.unproven(answer))
        return session

    def greet(self, patience_s: float) -> dict[str, Any] | None:
        """Call /hello, which reveals no secret. Return a joborch client's answer, or None for a 2.2 client. Raises NothingSent."""
        answer = self.exchange("GET", f"{self.address.base_url}/hello", patience_s)
        version, text = one_line(answer.headers.get(OURS_HEADER, ""), 40), read_some(answer, 4 * KIB)
        self.outdated = version.startswith("0.1.") and answer.status == 404
        if version and answer.status == 404 and not self.outdated:
            raise NothingSent("is not a joborch client, but perhaps a joborch server: correct SERVICE_<NAME>_CLIENTS")
        if self.outdated:
            raise NothingSent(
                f"runs joborch {version}, which cannot prove its identity: replace its joborch.pyz by version {__version__}; its jobs wait"
            )
        if version:
            self.ours = True
            return read_hello(answer.status, text)
        if self.ours and self.silent_s() < FOREIGN_PATIENCE_S:
            raise NothingSent(f"did not answer: another program answered in its place, with {answer.status}")
        if not 400 <= answer.status < 500:
            foreign = "sends an invalid answer: is it a joborch client?"
            raise NothingSent(refused_text(answer.status, text) if answer.status >= 500 else foreign)
        if not self.may_be_22():
            raise NothingSent(self.no_joborch(f"it answered {answer.status} to /hello"))
        self.protocol = load_plugin("compat22").Protocol22(self)
        log.info("client %s has no /events: it is polled, as a 2.2 client", self.name)
        return None

    def no_joborch(self, why: str) -> str:
        """Return the message about a client that cannot prove its identity, but must."""
        setting = self.remedy("PEER", lambda service: service.peer != "2.2")
        return f"cannot prove its identity, because {why}: set {setting}=2.2 if it is a 2.2 client"

    def unproven(self, answer: Reply) -> str:
        """Return the message about an answer without a valid proof."""
        if OURS_HEADER in answer.headers and MAC_HEADER not in answer.headers:
            why = "it has no token, so it cannot prove that it knows this one: set JOBORCH_TOKEN there"
        else:
            why = "set SERVICE_<NAME>_TOKEN to this client's token, or find out who listens there"
        what = f"a program without its token answered in its place, with {answer.status}, or changed its answer"
        return f"did not answer: {what}; {why}"

    def target_of(self, url: str) -> str:
        """Return the path and query of a URL as the client sees them, without the prefix that a gateway removes."""
        base = self.address.base_url
        return url[len(base) :] if url.startswith(base) else "/" + url.partition("://")[2].partition("/")[2]

    def prove(self, method: str, url: str, read_timeout_s: float, session: Session, **options: Any) -> tuple[Reply, bool]:
        """Make one call with a proof. Return the answer, and whether it is proven; an unproven answer closes the session."""
        headers, proofs = options.pop("headers", {}), list[Proof]()

        def proven() -> dict[str, str]:
            proofs.append(session.proof(method, self.target_of(url)))
            return {**headers, "Authorization": proofs[-1].authorization(headers, int(headers.get("Content-Length", 0)))}

        answer = self.exchange(method, url, read_timeout_s, headers=proven, **options)
        fits = proofs[-1].is_of_answer(answer.status, answer.headers)
        if not fits:
            self.sessions.clear()
        return answer, fits

    # -- calls --

    def call(self, method: str, url: str, read_timeout_s: float = READ_TIMEOUT_S, *, service: str | None = None, **options: Any) -> Reply:
        """Make one call for a service and return its answer; the caller reads the body.

        The call stops when the option `unwanted` returns True: nobody waits for the answer.
        Raises NothingSent if no byte of the request can have been sent, else NoAnswer.
        """
        could_prove = self.protocol.can_prove
        session = self.session(service, min(read_timeout_s, HELLO_TIMEOUT_S))
        if could_prove and not self.protocol.can_prove:
            raise NothingSent("has no /hello: from now on it is called as a 2.2 client")
        if session is None:
            headers = {**options.pop("headers", {}), **self.protocol.unproven_headers(service)}
            return self.its_own(self.exchange(method, url, read_timeout_s, headers=lambda: headers, **options))
        answer, proven = self.prove(method, url, read_timeout_s, session, **options)
        if not proven and answer.status == 401 and NONCE_HEADER in answer.headers:
            answer.close()
            answer, proven = self.call_again(method, url, read_timeout_s, service, **options)
        if not proven and answer.status == 413 and OURS_HEADER not in answer.headers:
            return answer  # from a gateway: the client certainly received nothing
        if not proven:
            answer.close()
            raise NoAnswer(self.unproven(answer))
        self.ours = True
        return answer

    def call_again(self, method: str, url: str, read_timeout_s: float, service: str | None, **options: Any) -> tuple[Reply, bool]:
        """Repeat a call to a client that has restarted. It may have carried out the first one, so each failure is NoAnswer."""
        if "body" in options:
            options["body"].rewind()
        try:
            session = self.session(service, min(read_timeout_s, HELLO_TIMEOUT_S))
            if session is None:
                raise NothingSent("was restarted and cannot prove its identity")
            return self.prove(method, url, read_timeout_s, session, **options)
        except NothingSent as error:
            raise NoAnswer(str(error)) from error

    def exchange(
        self,
        method: str,
        url: str,
        read_timeout_s: float,
        headers: Callable[[], Mapping[str, str]] = dict,
        body: FilesBody | None = None,
        unwanted: Callable[[], bool] | None = None,
    ) -> Reply:
        """Send one request and return the head of its answer. Raises NothingSent if no byte can have been sent, else NoAnswer.

        The other end may close a kept connection at the moment when it is used. A GET, which may be repeated, then takes another one.
        """
        connection, begun = self.connections.take(url), False
        is_kept = connection.sock is not None
        connection.bounds = Bounds(read_timeout_s, unwanted)
        try:
            (connection.sock or connection.open(self.look, self.ca_file, min(CONNECT_TIMEOUT_S, read_timeout_s))).settimeout(read_timeout_s)
            begun = True
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it hung up
                connection.send(method, "/" + url.partition("://")[2].partition("/")[2], {**headers(), OURS_HEADER: __version__}, body)
            return refuse_encoded(connection.answer(method))
        except CONNECTION_ERRORS as error:
            connection.close()
            if is_kept and method == "GET" and isinstance(error, ConnectionResetError):  # also RemoteDisconnected
                return self.exchange(method, url, read_timeout_s, headers, body, unwanted)
            self.sessions.clear()  # whoever answers next has to prove its identity
            if begun:
                raise NoAnswer(f"did not answer: {plain_cause(error)}") from error
            if isinstance(error, ssl.SSLCertVerificationError):
                raise NothingSent("cannot be reached: its TLS certificate is not trusted here; set JOBORCH_CA_FILE") from error
            raise NothingSent(f"cannot be reached: {plain_cause(error)}") from error
        except BaseException:
            connection.close()
            raise

    def its_own(self, answer: Reply) -> Reply:
        """Return `answer` if it is the client's. Raises NoAnswer if a gateway on the way answered in its place.

        A gateway's 413 is returned: it means that the client certainly received nothing.
        """
        if OURS_HEADER in answer.headers:
            self.ours = True
            if not self.protocol.can_prove and self.address.base_url and answer.status in (401, 403):  # joborch has replaced 2.2
                self.protocol = ClientProtocol(self)
                self.sessions.clear()
        elif answer.status == 413:
            return answer
        elif self.ours and self.silent_s() < FOREIGN_PATIENCE_S:
            answer.close()
            raise NoAnswer(f"did not answer: another program answered in its place, with {answer.status}")
        return answer

    def submit(
        self, job: Job, folder: Path, paths: Sequence[str], return_inputs: bool, wait_ms: int = 0, more: Sequence[Input] = ()
    ) -> tuple[str, Any]:
        """Send the files of one attempt. Return the payload's id, and its end if the client waited for it (`wait_ms`), else None.

        Raises NothingSent if the client certainly has no payload, NoAnswer if that is unknown, Rejected if it refuses for good.
        """
        body, checks = self.protocol.form(job, folder, paths, more)
        headers = {
            "Content-Type": f"multipart/form-data; boundary={body.boundary}",
            "Content-Length": str(len(body)),
            "X-Joborch-Job": str(job.id),
            "X-Joborch-Uuid": job.uuid,
            "X-Joborch-Attempt": str(job.attempt),
            "X-Joborch-Service": quote(job.service or ""),
            "X-Joborch-User": str(job.user_id),
            "X-Joborch-Cpus": str(job.cpus),
            **checks,
            **{f"X-Joborch-{name}": str(need) for name, need in (("Memory", job.memory), ("Gpus", job.gpus)) if need},
            **({"X-Joborch-Timeout": f"{job.timeout:.12g}"} if job.timeout else {}),
            **({} if return_inputs else {"X-Joborch-Return-Inputs": "0"}),
            **({"X-Joborch-Wait": str(wait_ms)} if wait_ms else {}),
        }
        answer = self.call("POST", self.address.upload_url, service=job.service, body=body, headers=headers)
        if answer.status == 413 and OURS_HEADER not in answer.headers:
            read_some(answer, KIB)
            remedy = "raise its limit (nginx: client_max_body_size 0), or send less"
            raise Rejected(f"a gateway in front of it refused {len(body):,} bytes (it answered 413): {remedy}")
        text = read_some(answer, 64 * KIB + (INLINE_BASE64_LIMIT if wait_ms else 0))  # a 2.2 client echoes all input after the id
        return read_submit_answer(answer.status, text), read_end(text) if wait_ms else None

    def events(self, wait_s: float, done: Sequence[str]) -> EventsReply:
        """Wait for changes at the client: one long poll for all its payloads.

        The client may delete the results of `done`. Raises Gone if it is a 2.2 client, which has no /events.
        """
        self.session(None)
        if not self.protocol.has_events:
            raise Gone("no /events")
        heard = self.events_of(self.call("GET", self.events_url(wait_s, done), read_timeout_s=wait_s + 10))
        heard.confirmed = len(done)
        return heard

    def events_url(self, wait_s: float, done: Sequence[str]) -> str:
        more = "&more=1" if self.listed is not None and self.since else ""
        query = f"since={self.since}&instance={self.instance}&wait={wait_s:g}&problems={self.problems_seen}&done={','.join(done)}{more}"
        return f"{self.address.base_url}/events?{query}"

    def events_of(self, answer: Reply) -> EventsReply:
        """Read a client's answer to /events. Raises NothingSent or NoAnswer if it cannot be used."""
        if answer.status != 200:
            raise NothingSent(refused_text(answer.status, read_some(answer, 64 * KIB)))
        try:
            with contextlib.closing(self.data.spool()) as spool:
                copy_some(answer, EVENTS_ANSWER_BYTES + 1, spool)
                # Objects take several times the memory of their text: only one large answer is read at a time.
                with BIG_ANSWER if spool.tell() > BIG_ANSWER_BYTES else contextlib.nullcontext():
                    spool.seek(0)
                    return read_events(spool.read())
        except (ValueError, KeyError, TypeError) as error:
            raise NothingSent("sends an invalid answer to /events: is it a joborch client?") from error

    def status(self, job: Job) -> dict[str, Any]:
        """Return a job's payload as the client shows it: `{"status": ...}`. Raises Gone if the client does not know it."""
        answer = self.call("GET", f"{self.address.download_url}/{job.dest_id}", service=job.service, headers=named(job))
        if answer.status == 200 and answer.headers.get("Content-Type", "").startswith(ZIP_TYPE):
            answer.close()
            return {"status": Status.COMPLETED.value}
        text = read_some(answer, MIB)
        if answer.status == 404:
            raise Gone(f"{self.name} no longer knows payload {job.dest_id}")
        if answer.status != 200:
            raise BadAnswer(refused_text(answer.status, text))
        try:
            said = clean_payload(read_answer(text))
        except ValueError as error:
            raise BadAnswer("sends an invalid answer to /retrieve") from error
        if said is None:
            raise BadAnswer("sends an invalid answer to /retrieve")
        return said

    def fetch(self, job: Job, into: Transfer, partial: bool = False, unwanted: Callable[[], bool] | None = None) -> None:
        """Fetch the ZIP of a payload; verify length and SHA-256 if the client sent them.

        A broken transfer resumes where it stopped if each call makes progress. Raises Gone if the client does not know the
        payload, and NoAnswer if the transfer broke: what arrived stays in `into` for the next try.
        """
        url = self.address.download_url + ("_partial" if partial else "") + f"/{job.dest_id}"
        small = 0
        while True:
            before, begun = into.size, time.monotonic()
            try:
                return self.fetch_rest(job, url, into, unwanted)
            except NoAnswer as error:
                least = max(1.0, SLOWEST_BYTES_S * (time.monotonic() - begun - 1))
                small += into.size - before < 64 * KIB
                if not into.tag or into.size - before < least or small > SMALL_PIECES or (unwanted and unwanted()):
                    raise
                log.warning("job %d: %s %s; it is resumed there", job.id, self.name, error)

    def fetch_rest(self, job: Job, url: str, into: Transfer, unwanted: Callable[[], bool] | None) -> None:
        """Request the missing rest of a ZIP once and add what arrives to `into`."""
        headers = {**named(job), **into.wanted()}
        answer = self.call("GET", url, service=job.service, headers=headers, unwanted=unwanted)
        if answer.status in (200, 206) and answer.headers.get("Content-Type", "").startswith(ZIP_TYPE):
            return take_rest(answer, into)
        text = read_some(answer, KIB)
        if answer.status == 404:
            raise Gone(f"{self.name} no longer knows payload {job.dest_id}")
        if answer.status == 200 and said_status(text) == Status.CLEANED.value:
            raise Gone(f"the result is missing at {self.name}: its files were removed there")
        if answer.status == 416:  # the result is now shorter than the part that is stored here
            into.begin()
        if answer.status == 503 and PACKING_HEADER.replace("_", "-") in answer.headers:
            raise NotPacked("is still packing the result")
        raise NoAnswer(refused_text(answer.status, text))

    def logs(self, job: Job, stream: str, offset: int, unwanted: Callable[[], bool] | None = None) -> tuple[bytes, int]:
        """Return a part of an output stream, and the offset after it (in bytes). Raises Gone if the client shows none."""
        answer, text = read_part(self, job, self.protocol.logs_url(job, stream, offset), unwanted)
        following = answer.headers.get("X-Next-Offset", "")
        if answer.status != 200 or not re.fullmatch(r"[0-9]{1,18}", following):
            raise NoAnswer(refused_text(answer.status, text))
        if int(following) < offset:
            raise NoAnswer("sends an invalid answer to /logs: its next offset is before the requested one")
        return text, int(following)

    def kill(self, job: Job) -> bool:
        """Ask the client to kill a payload. Return True if none of its processes runs, False if the kill is still under way."""
        url = f"{self.address.terminate_url}/{job.dest_id}"
        answer = self.call("POST", url, self.protocol.kill_timeout_s, service=job.service, headers=named(job))
        text = read_some(answer, KIB)
        if answer.status == 404:
            raise Gone(f"{self.name} no longer knows payload {job.dest_id}")
        if answer.status not in (200, 202):
            raise NoAnswer(refused_text(answer.status, text))
        return answer.status == 200


# == 8. Client protocol ==  What a client can do, and how a server calls it. A plug-in has the subclass for 2.2 clients.

KILL_TIMEOUT_S = 10.0  # for a client's answer to a kill request; the kill itself may take longer


class ClientProtocol:
    """How a server and one of our clients work together. The plug-in compat22 has a subclass for 2.2 clients.

    `Link.greet` and `Link.its_own` change the protocol of a link if another program answers at the client's URL.
    """

    can_prove = True  # it has /hello, and proves its answers
    has_events = True  # it reports its slots, its instance, and its payloads
    keeps_folders = True  # it stores a file below its path
    knows_keys = True  # it finds a payload by uuid and attempt, so a submit may be repeated
    kill_timeout_s = KILL_TIMEOUT_S

    def __init__(self, link: Link) -> None:
        self.link = link

    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """Return a lock for calls that must not overtake each other."""
        return contextlib.nullcontext()

    def unproven_headers(self, service: str | None) -> dict[str, str]:
        """Return headers to add to a call that carries no proof."""
        return {}

    def get_news(self, server: Server) -> bool:
        """Get what has changed at the client; tell whether to ask again at once. Raises NothingSent, NoAnswer or Gone."""
        return hear(server, self.link)

    def probe(self) -> None:
        """Check that the client answers, by a call that affects no job. Raises NothingSent, NoAnswer or Gone."""
        self.link.events(0, ())

    def form(self, job: Job, folder: Path, paths: Sequence[str], more: Sequence[Input]) -> tuple[FilesBody, dict[str, str]]:
        """Return the form with a job's files and `more`, and headers with digests. Raises Rejected if the client would lose files."""
        inputs = {"X-Joborch-Inputs": job.inputs_sha256} if job.inputs_sha256 else {}
        return FilesBody(folder, paths, True, job.inputs_sha256, more), {"X-Joborch-Digests": "1", **inputs}

    def accepted(self, server: Server, payload_id: str) -> None:
        """Note that the client accepted a payload, before its id is stored."""

    def logs_url(self, job: Job, stream: str, offset: int) -> str:
        """Return where a part of an output stream is read. Raises Gone if the client shows none."""
        return f"{self.link.address.base_url}/logs/{job.dest_id}?stream={stream}&offset={offset}"


def named(job: Job) -> dict[str, str]:
    """Return the header that names the attempt behind a payload id: a client with an empty data folder reuses ids."""
    return {"X-Joborch-Mark": job.mark}


# == 9. Answers ==  A client's answers are limited in size and time, and checked before they are used.


@dataclass
class EventsReply:
    """A client's answer to /events: its state, and the payloads that changed."""

    instance: str
    next: int
    slots: int
    payloads: list[dict[str, Any]]
    memory: int | None = None  # MiB
    load: float = 0.0  # percent
    job_slots: bool = False  # a job takes one slot, whatever its number of cores
    more: bool = False  # there are further pages
    size: int = field(default=0, compare=False)  # bytes of the answer
    confirmed: int = field(default=0, compare=False)  # how many results the request has confirmed
    problem: str = ""  # why it takes no payload now
    start: str = ""  # id of the client's process start
    problems: list[dict[str, Any]] = field(default_factory=list)  # see `clean_problem`
    problems_seen: int = 0
    at: float | None = None  # wall time there
    gpus: int | None = 0  # None if a batch system knows


@dataclass
class LiveJob:
    """All that is known of a job at a client beside its row. Each claim begins a new record; `forget_ended` drops the last one."""

    sending: bool = False  # a sender holds it: from before the claim until the outcome is stored
    waits: bool = False  # that sender waits for its end
    answer: tuple[str, bool] | None = None  # to its submit: its payload id, and whether an end came along
    resend_due: float = 0.0  # monotonic: when to send it again, if a lost answer ties it to this client
    note: str = ""  # what its payload waits for, as the client reports
    kill_due: float = 0.0  # monotonic: when to ask the client again to kill it
    end: EndReport | None = None  # until its result is collected
    rival: tuple[str, str] | None = None  # another client that also has this attempt, and its payload id there; see `sort_claim`


@dataclass
class EndReport:
    """A client's report that a payload has ended. It waits here until its result is collected."""

    job_id: int
    payload: dict[str, Any]
    due: float  # monotonic
    failures: int = 0
    taken: bool = False  # a thread is collecting it
    newer: EndReport | None = None  # a later report about the same job
    needs: int = 0  # bytes that did not fit on the disk; it is fetched again when there is room
    part: Transfer | None = None  # the part of its result that has arrived
    asked: int = 0  # how often the client answered that it is still packing the result
    pause_s: float = 0.0  # the pause before asking again
    cpus: int = 0  # slots that are free again
    memory: int = 0  # MiB
    gpus: int = 0
    at: float = field(default_factory=time.monotonic, compare=False)  # when it came


PAYLOAD_STATES = (Status.PREPARED, Status.RUNNING, *ENDED, Status.CLEANED)
ANSWER_VALUES = 50_000  # JSON values in one answer: 4 MiB of `[{},{},...` would become 110 MB of objects
EVENTS_PAGE, EVENTS_PAGE_BYTES = 1000, 4 * MIB  # limits for one answer of /events: payloads, and bytes of JSON
EVENTS_ANSWER_BYTES = EVENTS_PAGE_BYTES + 256 * KIB  # a page of /events, including everything around its payloads
INLINE_LIMIT_BYTES, INLINE_FILES, INLINE_PAYLOADS = 64 * KIB, 16, 20  # limits for results that are sent along with the report of their end
INLINE_BASE64_LIMIT = 4 * INLINE_LIMIT_BYTES  # a small result with its ZIP's directory, in base64
BIG_ANSWER_BYTES, BIG_ANSWER = 256 * KIB, threading.Lock()


def clean_payload(said: Any) -> dict[str, Any] | None:
    """Return a client's description of a payload with each field of the right type and size, or None if it is invalid.

    Invalid fields are omitted. `uuid`, `attempt` and `id` may be None; `reason` may be empty.
    """
    if not isinstance(said, dict) or not isinstance(said.get("status"), str):
        return None
    if said["status"] not in {state.value for state in PAYLOAD_STATES}:
        return None
    clean = {
        "started_at": number_in(said.get("started_at"), 0, 1e11),
        "ended_at": number_in(said.get("ended_at"), 0, 1e11),
        "exit_code": whole_in(said.get("exit_code"), -(2**31), 2**32),
        "signal": whole_in(said.get("signal"), 0, 255),
        "peak_memory": whole_in(said.get("peak_memory"), 0, 2**60),
        "cpu_time": number_in(said.get("cpu_time"), 0, 1e11),
        "archive": text_in(said.get("archive"), f"[A-Za-z0-9+/=]{{0,{INLINE_BASE64_LIMIT}}}"),
        "sha256": text_in(said.get("sha256"), "[0-9a-f]{64}"),
    }
    clean = {name: value for name, value in clean.items() if value is not None}
    if isinstance(said.get("cause"), str) and said["cause"] in {cause.value for cause in Cause}:
        clean["cause"] = said["cause"]
    if isinstance(said.get("ended_as"), str) and said["ended_as"] in {state.value for state in ENDED}:
        clean["ended_as"] = said["ended_as"]
    for name in ("reason", "ended_reason"):
        clean[name] = one_line(said[name][:2000], 1000) if isinstance(said.get(name), str) else ""
    number = said.get("id")
    clean["id"] = text_in(str(number) if type(number) is int else number, "[0-9]{1,18}")
    clean.update(status=said["status"], uuid=text_in(said.get("uuid"), r"[\w-]{1,64}"), attempt=whole_in(said.get("attempt"), 1, 2**31))
    return clean


def read_answer(text: bytes) -> Any:
    """Parse a client's JSON. Raises ValueError if it is invalid, or would take far more memory than its text."""
    if has_many_values(text):
        raise ValueError("too many values")
    return parse_json(text)


def has_many_values(text: bytes) -> bool:
    """Tell whether a JSON text has more than ANSWER_VALUES values; the content of strings does not count."""
    separators = (b",", b"[", b"{")
    count = sum(map(text.count, separators))
    if count <= ANSWER_VALUES:
        return False
    bare = text.replace(rb"\\", b"").replace(rb"\"", b"")
    if bare.count(b'"') > 4 * ANSWER_VALUES:
        return True
    inside = sum(sum(map(found[0].count, separators)) for found in re.finditer(rb'"[^"]*"', bare))
    return count - inside > ANSWER_VALUES


def read_events(text: bytes) -> EventsReply:
    """Parse a client's answer to /events. Raises ValueError, KeyError or TypeError if it is invalid."""
    if len(text) > EVENTS_ANSWER_BYTES or not text.isascii():
        raise ValueError("longer than a page, or not ASCII")
    said = read_answer(text)
    payloads, next_change = said["payloads"], whole_in(said["next"], 0, 2**63 - 1)
    slots, load = whole_in(said["slots"], 0, 10**6), number_in(said.get("load") or 0.0, -1e6, 1e6)
    memory, instance = whole_in(said.get("memory"), 0, 2**40), text_in(said["instance"], r"[\w.-]{1,64}")
    if next_change is None or slots is None or load is None or instance is None or memory != said.get("memory"):
        raise ValueError("invalid numbers")
    if not isinstance(payloads, list) or len(payloads) > EVENTS_PAGE or not all(isinstance(payload, dict) for payload in payloads):
        raise ValueError("invalid payloads")
    cleaned = [clean_payload(payload) or {"rubbish": reprlib.repr(payload)} for payload in payloads]
    heard = EventsReply(instance, next_change, slots, cleaned, memory, min(100.0, max(0.0, load)))
    heard.job_slots, heard.more, heard.size = said.get("job_slots") is True, said.get("more") is True, len(text)
    heard.gpus = None if said.get("gpus", 0) is None else whole_in(said.get("gpus"), 0, 1000) or 0  # earlier versions know none
    problem = said.get("problem")
    heard.problem = one_line(problem) if isinstance(problem, str) else ""
    heard.start = text_in(said.get("start"), "[0-9a-f]{1,64}") or ""
    problems = said.get("problems")
    heard.problems = [clean_problem(each) for each in problems[:PROBLEMS_TOLD]] if isinstance(problems, list) else []
    heard.problems_seen, heard.at = whole_in(said.get("problems_seen"), 0, 2**31) or 0, number_in(said.get("at"), 0, 1e11)
    return heard


def clean_problem(said: Any) -> dict[str, Any]:
    """Return a problem that a client reports, with each field of the right type and size."""
    said = said if isinstance(said, dict) else {}
    texts = {name: one_line(text) if isinstance(text := said.get(name), str) else "" for name in ("what", "remedy", "service")}
    return {"kind": text_in(said.get("kind"), "[a-z_]{1,40}") or "other", "since": number_in(said.get("since"), 0, 1e11), **texts}


def refused_text(status: int, body: bytes, service: str | None = None) -> str:
    """Describe an error answer in one sentence, which names the setting of this service if the token is the reason."""
    message: Any = None
    with contextlib.suppress(ValueError, AttributeError):
        message = read_answer(body).get("message")
    if status in (401, 403):
        return f"answered {status}: set SERVICE_{(service or '<NAME>').upper()}_TOKEN to the token that this client demands"
    return f"answered {status}" + (f": {one_line(message)}" if message and isinstance(message, str) else "")


def read_hello(status: int, text: bytes) -> dict[str, Any]:
    """Return a joborch client's answer to /hello: its `nonce`, and whether it has a token to prove (`proof`).

    Raises NothingSent for anything else.
    """
    if status != 200:
        raise NothingSent(refused_text(status, text))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = parse_json(text)
        if re.fullmatch("[0-9a-f]{32}", said["nonce"]):
            check_protocols(said.get("protocols"))
            return {"nonce": said["nonce"], "proof": said.get("proof") is not False}
    raise NothingSent("sends an invalid answer to /hello: is it a joborch client?")


def said_status(text: bytes) -> str | None:
    """Return the status in a client's answer about a payload, or None if there is none."""
    try:
        said = parse_json(text)
    except ValueError:
        return None
    return str(said.get("status")) if isinstance(said, dict) else None


def read_submit_answer(status: int, text: bytes) -> str:
    """Return the payload id in an answer to /submit, or raise the exception that the answer means."""
    if status in (200, 201):
        match = re.search(rb'"id"\s*:\s*([0-9]{1,18})\s*[,}]', text)  # with what follows: a truncated id would be another payload's
        if not match:
            raise NoAnswer("sent an invalid answer to /submit")
        return match[1].decode()
    if status in (400, 409, 413, 415, 422):
        raise Rejected(refused_text(status, text))
    if status in (401, 403, 404, 405, 429, 503, 507):
        raise (WrongToken if status in (401, 403) else Refused)(refused_text(status, text))
    raise NoAnswer(refused_text(status, text))


def read_end(text: bytes) -> Any:
    """Return what an answer to /submit says of the payload's end; None if it says nothing that can be read."""
    try:
        return read_answer(text).get("end")
    except (ValueError, AttributeError):
        return None


def read_part(link: Link, job: Job, url: str, unwanted: Callable[[], bool] | None = None) -> tuple[Reply, bytes]:
    """Ask a client about a payload's files; return the answer (200, 206, 400) and its body. Raises Gone if the client knows nothing."""
    answer = link.call("GET", url, read_timeout_s=10, service=job.service, headers=named(job), unwanted=unwanted)
    text = read_some(answer, 2 * LOG_PART_BYTES)
    if answer.status == 404:
        raise Gone(f"{link.name} no longer knows payload {job.dest_id}")
    if answer.status not in (200, 206, 400) or "Content-Length" not in answer.headers:
        raise NoAnswer(refused_text(answer.status, text))
    return answer, text


def receive(answer: Reply, into: Transfer) -> None:
    """Copy a response's body to a file. Raises DiskFull before the first byte if its known length does not fit."""
    length = answer.headers.get("Content-Length", "")
    try:
        if re.fullmatch("[0-9]{1,18}", length):
            into.expect(int(length))
        for chunk in iter(lambda: answer.piece(CHUNK_BYTES), b""):
            into.write(chunk)
    finally:
        answer.close()
        if into.promise is not None:
            into.promise.close()


def take_rest(answer: Reply, into: Transfer) -> None:
    """Copy a response's body to its place in a file. Raises NoAnswer if length or digest differ from its headers."""
    begin = f"bytes {into.size}-"
    if answer.status == 200:
        into.begin(answer.headers.get("ETag", ""))
    elif not answer.headers.get("Content-Range", "").startswith(begin):
        answer.close()
        into.begin()
        raise NoAnswer("answered with another part of the result than was requested")
    before = into.size
    receive(answer, into)
    promised = answer.headers.get("Content-Length")
    said = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", answer.headers.get("Repr-Digest", ""))
    if promised is None and said is None and "chunked" not in answer.headers.get("Transfer-Encoding", ""):
        into.begin()
        raise NoAnswer("the transfer broke: its headers are incomplete, without length and digest")
    if promised is not None and promised != str(into.size - before):
        raise NoAnswer(f"the transfer broke: {into.size - before} of {promised} bytes arrived")
    if said and said[1] != base64.b64encode(into.digest.digest()).decode():
        into.begin()
        raise NoAnswer("the transfer broke: what arrived does not match its digest")


SETTLED_LIMIT = 20_000  # payloads of one client whose results are not confirmed yet
SUPERSEDED_LIMIT = 1000  # superseded attempts of one client that are not killed yet
INLINE_KEPT_BYTES = 2 * MIB  # small results of one client that wait to be stored; further ones are fetched later
RESTLESS_MOVES = 100  # of one job
SMALL_PIECES = 20  # of one transfer that broke before 64 KiB had arrived
SYNC_AFTER_S = 5.0  # a result that nobody has fetched by then is written to the disk
CONFIRM_WITHIN_S = SYNC_AFTER_S / 2  # a client need not fsync results that are confirmed by then
DONE_AT_ONCE = 500  # payloads that one poll confirms
CALLS_A_CLIENT, CALLS_IN_ALL = 4, 12  # calls to clients at once on behalf of HTTP callers: to one client, to all


# == 10. News ==  Jobs move on by what clients report. A client is identified by its instance, whatever its URL.


def may_be_asked(link: Link) -> bool:
    """Tell whether `get_tick` may call a client: it has not failed, its back-off is over, or a kill was requested."""
    return not link.outage.failures or link.clock.monotonic() >= min(link.outage.until, link.try_at)


def get_tick(server: Server, link: Link) -> bool:
    """Get the changes at one client, by its protocol."""
    if not may_be_asked(link):
        return False
    link.asked_at = server.clock.monotonic()
    try:
        return link.protocol.get_news(server)
    except Gone:  # it is a 2.2 client: the next tick polls it
        return True
    except (NothingSent, NoAnswer) as error:
        fail_to_hear(server, link, error)
        return False
    finally:
        link.asked_at = float("inf")


def hear(server: Server, link: Link) -> bool:
    """Get the changes at one client by a long poll, and ask again at once. Raises NothingSent, NoAnswer or Gone."""
    if link.relist:
        link.relist, link.since = False, 0
        link.undecided.clear()
    fresh, asked_at = link.since == 0, server.clock.monotonic()
    done = link.confirmed_ids[:DONE_AT_ONCE]
    at_once = fresh or link.listed is not None or not link.answers
    heard = link.events(0 if at_once else poll_wait_s(server, link), done)
    crash_point("hear.answered")
    del link.confirmed_ids[: heard.confirmed]
    link.heard()
    take_in(server, link, heard, fresh, asked_at)
    if fresh:
        for name in ("send", "fetch", "kill"):
            server.wake(f"{name}:{link.name}")  # it is back
    if fresh or link.reports():
        server.dispatch()  # it may have room again
    server.stopping.wait(link.polls.take(1 + heard.size / (64 * KIB)))
    return True


EVENTS_WAIT_S = 10.0  # of a long poll at a client; a client that hangs is noticed 10 s later


def poll_wait_s(server: Server, link: Link) -> float:
    """Return how long a poll may wait for news: not long after ends that came with submits, which the next poll confirms."""
    if len(link.confirmed_ids) > DONE_AT_ONCE:
        return 0.0
    return min(EVENTS_WAIT_S, CONFIRM_WITHIN_S if server.clock.monotonic() - link.ended_at < EVENTS_WAIT_S else EVENTS_WAIT_S)


def fail_to_hear(server: Server, link: Link, error: Exception) -> None:
    """Pause calls to a client that did not answer. Call it more often if kills are requested there."""
    link.since = 0  # its first answer will list all its payloads
    link.failed(error)
    few = sum(map(is_silent, server.links.values())) <= SILENT_THREADS // 2  # else those that hang would take all threads
    soon = few or server.store.load(link.name).kills
    link.try_at = server.clock.monotonic() + LOOK_AGAIN_S if soon else float("inf")
    if link.outage.failures == 1:
        decide_again(server)


def take_in(server: Server, link: Link, heard: EventsReply, fresh: bool, asked_at: float = float("-inf")) -> None:
    """Apply a client's events. After the last page of a first contact, also look for jobs that the client did not list.

    `asked_at` (monotonic) is when the events were requested.
    """
    if link.instance not in ("", heard.instance):
        link.note("has a new database: its list of jobs is requested again", logging.INFO)
        for job in server.store.jobs(statements.AT_CLIENT, client=link.name):
            goes_on_elsewhere(server, link, job)
        link.instance, link.met, link.copy_of, link.since = heard.instance, False, "", 0
        return  # the next tick requests the whole list
    meet(server, link, heard, asked_at)
    link.slots, link.memory, link.load = heard.slots, heard.memory, heard.load
    link.job_slots, link.gpus, link.problem = heard.job_slots, heard.gpus, heard.problem
    link.problems, link.problems_seen = heard.problems, heard.problems_seen
    link.ahead_s = 0.0 if heard.at is None else heard.at - server.clock.wall()
    if fresh:
        link.listed = set()
    each(heard.payloads, functools.partial(report, server, link))  # if one fails, `since` stays, and the client reports it again
    link.since = max(heard.next, link.since)
    if link.listed is not None and not heard.more:
        listed, link.listed = link.listed, None
        for job in server.store.jobs(statements.AT_CLIENT, client=link.name):
            if job.dest_id and job.id not in listed:  # it should be there: ask about it
                note_end(server, link, EndReport(job.id, {"status": "?"}, 0.0))
        decide_again(server)


def meet(server: Server, link: Link, heard: EventsReply, asked_at: float) -> None:
    """Learn which client answers. It may have another URL as well, or run on a copy of another client's data folder.

    A restart changes a client's `start`, too; but two starts that answer in turn are two processes.
    """
    now, news = server.clock.monotonic(), not link.met or link.start != heard.start
    if not link.met:
        link.instance, link.instance_at, link.met = heard.instance, now, True
    if link.start != heard.start:
        link.start, link.start_at, link.copy_of = heard.start, now, ""
    known = [other for other in server.links.values() if other is not link and other.protocol.has_events]
    for other in [other for other in known if other.instance == link.instance]:
        if link.start and other.start and link.start != other.start:
            first, second = sorted((link, other), key=lambda each: each.instance_at)
            if link.start_at <= other.start_at < asked_at and not (first.copy_of or second.copy_of):
                second.copy_of = first.name
                log.error("client %s %s", second.name, second.why_not())
        elif news and not other.copy_of:
            log.warning("clients %s and %s are one client with two URLs: its slots are counted once", other.name, link.name)
        if news and link.client == other.client:
            link.drained = other.drained = link.drained or other.drained


def decide_again(server: Server) -> None:
    """Request the lists of clients with undecided jobs again, now that another client's list is complete or that client is silent."""
    for link in server.links.values():
        if link.undecided:
            link.relist = True


def report(server: Server, link: Link, said: Any) -> None:
    """Move a job on by its client's report of a payload."""
    payload = clean_payload(said)
    if payload is None or not payload["uuid"] or not payload["attempt"] or not payload["id"]:
        link.note(f"reports an invalid payload: {one_line(reprlib.repr(said))}")
        return
    job = server.store.job(statements.JOB_BY_UUID, uuid=payload["uuid"])
    if job is not None and job.client != link.name and job.attempt == payload["attempt"] and job.status in BUSY:
        job = with_its_client(server, link, job, payload)
    if job is None:
        return
    if job.attempt == payload["attempt"] and job.status in BUSY:
        report_of_current(server, link, job, payload)
    else:
        report_of_another(server, link, job, payload)


def report_of_current(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> None:
    """Move a job on by its client's report of the current attempt."""
    status = str(payload["status"])
    if link.listed is not None:
        link.listed.add(job.id)
    if contradicts(server, link, job, status):
        return
    accepted = with_payload_id(server, link, job, payload["id"])
    if accepted is None:
        return
    job = accepted
    is_alive = status in (Status.PREPARED.value, Status.RUNNING.value)
    link.of(job.id).note = payload["reason"] if is_alive else ""  # such as its place in a batch system
    if status == Status.RUNNING.value and job.status is not Status.RUNNING:
        server.store.move(job, Status.RUNNING, "", started_at=payload.get("started_at") or server.clock.wall())
        crash_point("hear.running")
    elif status == Status.PREPARED.value and job.status is Status.UNKNOWN:
        server.store.move(job, Status.SUBMITTED, Reason.ANSWERS_AGAIN.format(client=link.name))
    elif not is_alive:
        note_end(server, link, EndReport(job.id, dict(payload), 0.0, cpus=job.cpus, memory=job.memory or 0, gpus=job.gpus))


def report_of_another(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> None:
    """Apply a client's report of an attempt that has ended or was replaced: kill it, or confirm that it need not be kept.

    An attempt that is queued again is ignored: if it is sent to this client, its key finds the payload.
    """
    if payload["status"] not in (Status.PREPARED.value, Status.RUNNING.value):
        if job.status in OVER or payload["attempt"] != job.attempt:
            link.confirm(payload["id"])  # its result is stored here, or useless
        if job.status is Status.CLEANED and not job.reason and payload["status"] != Status.CLEANED.value:  # it was deleted on request
            server.plugins["privacy"].reported(job, link.name)
    elif payload["attempt"] < job.attempt or (payload["attempt"] == job.attempt and job.status in OVER):
        end_stray(server, link, job, payload)


def with_its_client(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> Job | None:
    """Handle a report of a job's current attempt from another client than its row names. Return the moved job, or None.

    If the client has a new URL, or its old URL is silent, the job moves to the new one. Otherwise both URLs report the same.
    """
    home = server.links.get(job.client or "")
    if link.copy_of or job.status is Status.PROCESSING or not may_have(server, link, job):
        return None
    if home is None or (home.outage.failures and home.instance in ("", link.instance) and not home.copy_of):
        return take_along(server, link, job)
    if home.instance == link.instance:
        return None  # one client with two URLs, or a copy of it
    if not home.is_heard() or not home.instance or not home.has_told_all():
        link.undecided.add(job.id)
    elif job.dest_id is None:
        return take_along(server, link, job)  # it is not known whether the other client got it
    else:
        claim_for(server, link, home, job, str(payload["id"]))
    return None


def claim_for(server: Server, link: Link, home: Link, job: Job, payload_id: str) -> None:
    """Two clients seem to have this attempt: let `fetch_tick` ask the one in the job's row. `sort_claim` then decides."""
    with home.lock:
        live = home.of(job.id)
        if live.end is not None and live.end.payload["status"] != "?":
            return
        live.rival = (link.name, payload_id)
        if live.end is not None and not live.end.taken:
            live.end = None  # so that it is asked at once
    note_end(server, home, EndReport(job.id, {"status": "?"}, 0.0))


def may_have(server: Server, link: Link, job: Job) -> bool:
    """Tell whether a client may have a job that it reports: it must be a client of the service, or prove the same token as those."""
    if link.calls_in:
        return job.service in link.offered
    own = server.services.get(job.service or "")
    return any(each.name == job.service or (own is not None and each.token == own.token) for each in link.services)


def take_along(server: Server, link: Link, job: Job) -> Job | None:
    """Move a job to another URL of its client. Return None if it has moved on meanwhile."""
    if not server.store.take_along(job, link.name):
        return None
    log.info("job %d: its client %s is reached as %s now", job.id, job.client, link.name)
    if job.kill_requested_at is not None:
        server.wake(f"kill:{link.name}")
    return server.store.get(job.id)


def goes_on_elsewhere(server: Server, link: Link, job: Job) -> bool:
    """Move a job to another URL of its client if that URL answers. Return whether it does."""
    others = [other for other in server.names_of(link)[1:] if other.is_heard() and may_have(server, other, job)]
    if not others or job.status is Status.PROCESSING:
        return False
    take_along(server, others[0], job)
    others[0].relist = True
    return True


def contradicts(server: Server, link: Link, job: Job, status: str) -> bool:
    """Tell whether a client's report would only move a job back and forth and fill its history.

    A payload that has ended does not run again. A job that has moved very often leaves Unknown at most once a minute.
    """
    if status not in (Status.PREPARED.value, Status.RUNNING.value):
        return False
    ended = link.of(job.id).end
    if ended is not None and ended.payload["status"] != "?":
        link.note(f"reports job {job.id} as {status} after it had ended")
        return True
    return job.moves > RESTLESS_MOVES and server.store.steady() - job.moved_at < 60


def with_payload_id(server: Server, link: Link, job: Job, payload_id: str) -> Job | None:
    """Store a payload id that a client reports before it answers the submit. Return None if the job has moved on."""
    current: Job | None = job
    while current is not None and current.dest_id is None:
        server.store.move(current, Status.SUBMITTED, Reason.FOUND_THERE.format(client=link.name), dest_id=payload_id)
        current = server.store.get(job.id)  # a sender may have moved it to Unknown meanwhile: try again from there
        if current is None or current.attempt != job.attempt or current.status not in BUSY:
            return None
    return current


def note_end(server: Server, link: Link, found: EndReport) -> None:
    """Note that a payload has ended, for the threads that collect results. If one of them has it, this report waits."""
    link.ended_at = server.clock.monotonic()
    with link.lock:
        if "archive" in found.payload and not has_room_for(found, link.reports()):
            del found.payload["archive"]
        live = link.of(found.job_id)
        earlier = live.end
        if earlier is not None and earlier.taken:
            earlier.newer = found
        else:
            if earlier is not None and earlier.payload["status"] == found.payload["status"]:
                found.failures, found.due = earlier.failures, earlier.due  # no news: keep its back-off
            found.part = earlier.part if earlier is not None else None  # keep what has arrived of the result
            live.end = found
    server.wake(f"fetch:{link.name}")


def has_room_for(found: EndReport, ended: Sequence[EndReport]) -> bool:
    """Tell whether a small result may be kept in memory until it is stored. If not, it is fetched later."""
    if len(ended) > EVENTS_PAGE:
        return False
    kept = sum(len(other.payload.get("archive", "")) for other in ended if other.job_id != found.job_id)
    return kept + len(found.payload["archive"]) <= INLINE_KEPT_BYTES


def end_stray(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> None:
    """Kill a payload of an attempt that was replaced, on a client that came back late."""
    superseded = job._replace(dest_id=str(payload["id"]), attempt=int(payload["attempt"]))
    if len(link.superseded_attempts) >= SUPERSEDED_LIMIT and superseded.mark not in link.superseded_attempts:
        return  # the next first contact will list it again
    link.note(f"still runs attempt {payload['attempt']} of job {job.id}, which was replaced: it is killed there")
    link.superseded_attempts[superseded.mark] = superseded
    server.wake(f"kill:{link.name}")


# == 11. Ends ==  Fetches results, carries out requested kills, and starts jobs of lost clients again.


def known_of_end(server: Server, job: Job, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return a client's report of how a payload ended, as changes of its job's row."""
    changes = {name: payload[name] for name in ("exit_code", "signal", "started_at", *FIGURES) if payload.get(name) is not None}
    return {**changes, **run_of(server, job, payload)}


def run_of(server: Server, job: Job, payload: Mapping[str, Any]) -> dict[str, float]:
    """Return the run time of a payload by its client's clock, as a change of its job's row; empty if the client does not report it.

    The user is charged for this time, so it is limited to the time since the upload.
    """
    started, ended = payload.get("started_at"), payload.get("ended_at")
    if started is None or ended is None:
        return {}
    return {"run_s": max(0.0, min(ended - started, server.store.steady() - job.arrived_at + CLOCK_TOLERANCE_S))}


def settle_cleaned(server: Server, link: Link, job: Job, payload: Mapping[str, Any]) -> None:
    """A client has removed an ended payload's files. A failure or kill remains one; for a lost result the job runs again."""
    why = payload.get("reason")
    removed = (Reason.CLIENT_CLEANED if why else Reason.CLIENT_HAS_NOTHING).format(client=link.name, reason=why)
    cause, ended_as = payload.get("cause"), payload.get("ended_as")
    reason = Reason.FAILED_AND_CLEANED.format(reason=payload.get("ended_reason") or Reason.RUN_FAILED, cleaned=removed)
    if cause in (Cause.USER.value, Cause.LIMIT.value):
        to = Status.INVALID if ended_as == Status.INVALID.value else Status.FAILED
        end_busy(server, job, to, reason, cause=cause, **known_of_end(server, job, payload))
    elif cause == Cause.CANCELLED.value and ended_as == Status.KILLED.value:
        end_busy(server, job, Status.KILLED, reason, cause=cause, **known_of_end(server, job, payload))
    else:
        payload_gone(server, job, removed)


def fetch_tick(server: Server, link: Link) -> bool:
    """Collect one job whose payload has ended. Return whether there was one."""
    now = server.clock.monotonic()
    with link.lock:
        due_now = (found for found in link.reports() if found.due <= now and not found.taken)
        waiting = [found for found in due_now if link.answers or "archive" in found.payload]
        if not waiting:
            return False
        # Results that came with the report first: they cost no call. Those that the client is still packing last.
        due = min(waiting, key=lambda found: ("archive" not in found.payload, found.asked))
        due.taken = True
    if len(waiting) > 1:
        server.wake(f"fetch:{link.name}")
    settled, job = False, cast("Job | None", None)
    try:
        with link.protocol.turn():
            job = server.store.get(due.job_id)
            settled = job is None or job.client != link.name or job.status not in BUSY or collect_end(server, link, job, due)
        crash_point("fetch.settled")
    finally:
        give_back(server, link, due, settled)
    if settled:
        current = server.store.get(job.id) if job and link.protocol.has_events else None
        if job and current and current.status in OVER and (current.client, current.dest_id) == (link.name, job.dest_id):
            link.confirm(job.dest_id)
    return True


def give_back(server: Server, link: Link, due: EndReport, settled: bool) -> None:
    """Drop a report that was processed, or keep it for later. A newer report replaces it."""
    with link.lock:
        if due.newer is not None:
            due.newer.part, due.part = due.part, None
            if not settled and due.newer.payload["status"] == due.payload["status"]:  # no news: keep the back-off
                due.newer.failures, due.newer.due = due.failures + 1, server.clock.monotonic() + backoff_s(due.failures + 1)
            link.of(due.job_id).end = due.newer
        elif settled:
            link.of(due.job_id).end = None
        else:
            due.failures, due.taken = due.failures + (not due.pause_s), False
            due.due = server.clock.monotonic() + (due.pause_s or backoff_s(due.failures))
    if settled:
        drop_part(due)
    if due.newer is not None:
        server.wake(f"fetch:{link.name}")


def collect_end(server: Server, link: Link, job: Job, found: EndReport) -> bool:
    """Fetch the files of an ended payload and move its job to its end state. Return False if this must be repeated."""
    found.pause_s = 0.0
    try:
        settle_as_told(server, link, job, found)
    except Gone as error:
        others = [other for other in server.links.values() if other is not link]
        if not all(other.has_told_all() and not (job.id in other.undecided and other.is_heard()) for other in others):
            return False  # another client may have it: one with a new URL
        count_no_more(found)
        sorted_out, current = sort_claim(server, link, job, is_here=False), server.store.get(job.id)
        if not sorted_out and current is not None and current.client == link.name:
            payload_gone(server, current, str(error))  # else it was moved meanwhile
    except ResultTooLarge as error:  # permanent: it would be as large next time
        drop_part(found)
        count_no_more(found)
        end_busy(server, job, Status.FAILED, str(error), cause=Cause.LIMIT.value, **known_of_end(server, job, found.payload))
    except (NothingSent, NoAnswer) as error:
        if found.part is not None and not found.part.wanted():
            drop_part(found)  # it cannot be resumed
        if not is_being_packed(found, error):
            become_unknown(server, job, Reason.NOT_FETCHED.format(client=link.name, error=error))
        return False
    except OSError as error:
        found.needs = error.needed if isinstance(error, DiskFull) else 0
        drop_part(found)  # after a failed write or fsync the content on disk is unknown, and others need the space
        why = error.strerror if isinstance(error, DiskFull) else os.strerror(error.errno or 0)
        become_unknown(server, job, Reason.NOT_STORED.format(error=why))
        return False
    server.plugins["metrics"].fetched(job, time.monotonic() - found.at)
    return True


def settle_as_told(server: Server, link: Link, job: Job, found: EndReport) -> None:
    """Act on the status of an ended payload."""
    if found.payload["status"] == "?":
        found.payload.update(link.status(job))
        sort_claim(server, link, job, is_here=True)
    status = found.payload["status"]
    if status in (Status.PREPARED.value, Status.RUNNING.value):
        return  # it has not ended; /events will report it
    if status == Status.COMPLETED.value:
        fetch_result(server, link, job, found)
    elif status == Status.CLEANED.value:
        count_no_more(found)
        settle_cleaned(server, link, job, found.payload)
    elif found.payload.get("cause") == Cause.INFRASTRUCTURE.value and attempts_left(job):
        count_no_more(found)
        used = job._replace(peak_memory=found.payload.get("peak_memory"), cpu_time=found.payload.get("cpu_time"))
        new_attempt(server, used, found.payload.get("reason") or Reason.CLIENT_FAILED.format(client=link.name))
    else:
        fetch_failure(server, link, job, found)


def sort_claim(server: Server, link: Link, job: Job, is_here: bool) -> bool:
    """Decide which of two clients has an attempt, by the answer of the one in the job's row.

    Return whether the job moves to the other one. If both have it, it is killed at the other one.
    """
    live = link.of(job.id)
    (name, payload_id), live.rival = live.rival or ("", ""), None
    other = server.links.get(name)
    if other is None:
        return False
    if is_here:
        end_stray(server, other, job, {"id": payload_id, "attempt": job.attempt})
        return False
    other.relist = True
    return take_along(server, other, job) is not None


PACK_ASKED_MOST = 1000  # requests for a result that is still being packed before its job becomes Unknown: over an hour


def is_being_packed(found: EndReport, error: Exception) -> bool:
    """Tell whether the client is still packing a result; if so, schedule the next request, for about an hour."""
    if not isinstance(error, NotPacked) or found.asked >= PACK_ASKED_MOST:
        return False
    found.asked, found.pause_s = found.asked + 1, min(5.0, 0.5 + 0.5 * found.asked)
    return True


def count_no_more(found: EndReport) -> None:
    """Stop counting an ended payload's slots as free, just before its job's row frees them: no slot must be free twice."""
    found.cpus = found.memory = found.gpus = 0


def fetch_result(server: Server, link: Link, job: Job, found: EndReport) -> None:
    """Store a result: file, digest, fsync, rename; then the row."""
    size, digest = store_archive(server, link, job, found, partial=False)
    count_no_more(found)
    payload = found.payload
    reason = payload.get("reason") or Reason.COMPLETED
    changes = {**known_of_end(server, job, payload), "exit_code": 0, "started_at": payload.get("started_at") or job.started_at}
    end_busy(server, job, Status.COMPLETED, reason, result_size=size, result_sha256=digest, **changes)


def inline_archive_of(payload: Mapping[str, Any]) -> bytes:
    """Return the ZIP that came with a payload's end report; empty if there is none, or if its digest is wrong."""
    try:
        data = base64.b64decode(str(payload.get("archive", "")))
    except ValueError:
        return b""
    return data if hashlib.sha256(data).hexdigest() == payload.get("sha256") else b""


def store_archive(server: Server, link: Link, job: Job, found: EndReport, partial: bool) -> tuple[int, str]:
    """Store a payload's ZIP; return its size in bytes and its SHA-256 (hex). Durable on return.

    If the transfer breaks, what has arrived stays with the report for the next try.
    """
    server.data.account.check(found.needs)  # do not fetch what would not fit
    if found.part is None:
        target = open(f"{server.data.tmp}/result-{secrets.token_hex(8)}", "x+b", buffering=0)  # noqa: SIM115 - closed by drop_part
        found.part = result_transfer(server.config, cast("IO[bytes]", target), Promise(server.data.account))
    part = found.part
    data = inline_archive_of(found.payload)
    if data:
        part.begin()
        part.write(data)
    else:
        link.fetch(job, part, partial)
    check_result(server.config, part)
    crash_point("fetch.received")
    os.fsync(part.target.fileno())
    crash_point("fetch.synced")
    os.rename(part.target.name, server.data.result(job.mark))
    crash_point("fetch.renamed")
    fsync_path(server.data.results)
    crash_point("fetch.durable")
    if part.size > 128 * KIB:  # it may have many files
        load_plugin("results").make_index(server, job.mark, part.digest.hexdigest())
    drop_part(found)
    return part.size, part.digest.hexdigest()


def result_transfer(config: Config, target: IO[bytes], promise: Promise | None = None) -> Transfer:
    """Return a Transfer that accepts a result: the largest ZIP within the limits, with output streams, names and headers."""
    largest = config.max_result_bytes * 33 // 32 + 2 * config.log_limit_bytes + config.max_result_files * KIB + MIB
    return Transfer(target, promise, largest, ResultLimits(config.max_result_bytes))


OUTPUT_STREAMS = ("stdout", "stderr")


def check_result(config: Config, part: Transfer) -> None:
    """Check the files in a large ZIP against the limits, whatever the client says. Raises ResultTooLarge."""
    limits, streams = ResultLimits(config.max_result_bytes * 33 // 32, config.max_zip_members), 0
    if part.size <= min(config.max_result_bytes, config.max_result_files * 2 * ZIP_CENTRAL.size):
        return
    with open(part.target.name, "rb") as file:
        try:
            size, count = 0, zip_directory(file)[2]
            for record in zip_records(file):
                if streams < len(OUTPUT_STREAMS) and record.comment.startswith(b"joborch stream "):
                    streams, size = streams + 1, size + max(0, record.packed_bytes - config.log_limit_bytes)
                else:
                    size += record.packed_bytes
        except ValueError:
            size, count = part.size, 0  # it is no ZIP
    if limits.broken_by(size, count):
        told = ResultLimits(config.max_result_bytes, config.max_result_files)
        raise ResultTooLarge(Reason.RESULT_HAS.format(too_much=told.broken_by(size, count)))


def drop_part(found: EndReport) -> None:
    """Drop a transfer: the result is stored, or the data is useless."""
    if found.part is not None:
        found.part.target.close()
        if found.part.promise is not None:
            found.part.promise.close()
        discard(Path(found.part.target.name))
        found.part = None


def fetch_failure(server: Server, link: Link, job: Job, found: EndReport) -> None:
    """Fetch the files of a failed payload, as far as possible, and move its job to its end state."""
    payload, to = found.payload, Status(found.payload["status"])
    size, digest, reason = None, None, payload.get("reason") or Reason.CLIENT_SAYS.format(status=to)
    try:
        size, digest = store_archive(server, link, job, found, partial=True)
    except Gone:
        log.info("job %d: %s no longer has its files; its end counts all the same", job.id, link.name)
    except ResultTooLarge as error:
        reason = Reason.NOT_KEPT.format(reason=reason, error=error)
        drop_part(found)
    count_no_more(found)
    cause = payload.get("cause") or (Cause.CANCELLED.value if to is Status.KILLED else Cause.USER.value)
    changes = known_of_end(server, job, payload)
    end_busy(server, job, to, reason, cause=cause, result_size=size, result_sha256=digest, **changes)


def may_kill(server: Server, link: Link) -> bool:
    """Tell whether `kill_tick` may have something to do."""
    return bool(link.superseded_attempts or server.store.load(link.name).kills) and not link.held()


def kill_tick(server: Server, link: Link) -> bool:
    """Ask a client to kill jobs and superseded attempts. Its events report when they have ended."""
    now = server.clock.monotonic()
    if link.held():
        return False
    for superseded in list(link.superseded_attempts.values()):
        try:
            link.kill(superseded)
        except (NothingSent, NoAnswer) as error:
            link.failed(error)
            return False
        except Gone:
            log.info("job %d: %s no longer has attempt %d", superseded.id, link.name, superseded.attempt)
        link.superseded_attempts.pop(superseded.mark, None)
    jobs = server.store.jobs(statements.KILLS_AT_CLIENT, client=link.name)
    for job in jobs:
        if link.of(job.id).kill_due > now:
            continue
        link.of(job.id).kill_due = now + 2.0
        try:
            link.kill(job)
            crash_point("kill.asked")
            link.heard()
        except Gone as error:
            payload_gone(server, job, str(error))
        except (NothingSent, NoAnswer) as error:
            link.of(job.id).kill_due = 0.0
            link.failed(error)
            return False
    return False


def watch_tick(server: Server) -> bool:
    """Handle what no event reports: silent clients, unreachable services, attempts that are due."""
    server.store.admit_due()
    busy = server.store.jobs(statements.ALL_BUSY)
    each(busy, functools.partial(judge, server))
    running = [job for job in busy if job.status is Status.RUNNING]
    each([job for job in running if job.cpus * (server.store.steady() - job.moved_at) > job.charged], server.store.charge_longer)
    each(server.services.values(), functools.partial(fail_unreachable, server))
    forget_ended(server)
    return False


def needs_watch(server: Server) -> bool:
    """Tell whether `watch_tick` may have something to do: delayed attempts, jobs at clients, clients that fail or are missing."""
    if server.store.has_delayed or server.deserted or next(server.store.runs(), None) is not None:
        return True
    is_any = any(link.jobs or link.outage.failures for link in server.links.values())
    return is_any or not all(map(server.links_of, server.services.values()))


def forget_ended(server: Server) -> None:
    """Drop the records of jobs that are no longer at a client."""
    known = [(link, job_id) for link in server.links.values() for job_id in list(link.jobs)]  # first: a job may get there meanwhile
    here = {(run.client, run.job_id) for run in server.store.runs()}
    for link, job_id in known:
        with link.lock:
            live = link.jobs[job_id]
            if (link.name, job_id) not in here and not live.sending and live.end is None:
                del link.jobs[job_id]


def judge(server: Server, job: Job) -> None:
    """Decide what happens to a job whose client is silent, by the length of the silence."""
    link = server.links.get(job.client or "")
    if link is None:
        since_start_s = server.clock.monotonic() - server.started
        if since_start_s > SILENT_AFTER_S:  # its client may be configured under another name
            judge_silence(server, job, Reason.NOT_CONFIGURED.format(client=job.client), since_start_s)
    elif job.status is Status.PROCESSING and not link.of(job.id).sending:
        sort_out(server, link, job)
    elif link.outage.failures and goes_on_elsewhere(server, link, job):
        return
    elif link.outage.failures and link.silent_s() > SILENT_AFTER_S:
        trouble = Reason.NOT_SENT.format(client=link.name, error=link.outage.reason)
        judge_silence(server, job, trouble, 0.0 if link.outdated else link.silent_s())


def sort_out(server: Server, link: Link, job: Job) -> None:
    """Continue with a job that was sent while the database could not be written."""
    answer = link.of(job.id).answer
    if answer is None:
        server.store.move(job, Status.UNKNOWN, Reason.ANSWER_NOT_STORED)
        server.wake(f"send:{link.name}")
        return
    store_accepted(server, link, job, answer[0])
    if answer[1]:
        ask_for_end(server, link, job)


def judge_silence(server: Server, job: Job, trouble: str, silent_s: float) -> None:
    """Make a silent client's job Unknown. After LOST_AFTER queue a new attempt, or fail the job."""
    if silent_s <= server.service(job).lost_after_s:
        if job.status in (Status.SUBMITTED, Status.RUNNING):
            become_unknown(server, job, trouble)
        return
    if job.status is Status.PROCESSING:
        server.store.move(job, Status.UNKNOWN, trouble)
        job = server.store.get(job.id) or job
    text = Reason.SILENT if job.kill_requested_at is None else Reason.SILENT_AND_KILLED
    new_attempt(server, job, text.format(trouble=trouble, duration=format_duration(silent_s)))


def fail_unreachable(server: Server, service: Service) -> None:
    """Fail the queued jobs of a service if none of its clients answered for UNREACHABLE_AFTER."""
    links = server.links_of(service)
    now = server.clock.monotonic()
    if links:
        server.deserted.pop(service.name, None)
    since = now if links else server.deserted.setdefault(service.name, now)
    if not links and now - since <= service.unreachable_after_s:
        return
    if any(not link.outage.failures or link.outdated or link.silent_s() <= service.unreachable_after_s for link in links):
        return
    before = server.store.steady() - service.unreachable_after_s
    for job in server.store.jobs(statements.QUEUED_OF_SERVICE, service=service.name, before=before):
        reason = Reason.UNREACHABLE.format(service=service.name, duration=format_duration(service.unreachable_after_s))
        server.store.move(job, Status.FAILED, reason, cause=Cause.INFRASTRUCTURE.value)


def is_silent(link: Link) -> bool:
    """Tell whether a client has never answered or failed at least twice in a row, so that calls to it may hang."""
    return link.heard_at is None or link.outage.failures > 1


def make_server_loops(server: Server) -> dict[str, Loop]:
    """Return the loops of a server, by name: those of each client, and dispatch, watch and clean."""
    loops = {name: loop for link in server.links.values() for name, loop in loops_of(server, link).items()}
    config = server.config
    own = (("dispatch", dispatch_tick, config.send_interval_s), ("watch", watch_tick, 1.0), ("clean", clean_tick, config.clean_interval_s))
    loops.update({name: Loop(name, functools.partial(tick, server), lambda: server.pool, period_s) for name, tick, period_s in own})
    loops["dispatch"].wanted = lambda: bool(services_queued(server))
    loops["watch"].wanted = functools.partial(needs_watch, server)
    return loops


def loops_of(server: Server, link: Link) -> dict[str, Loop]:
    """Return the loops of one client, by name: get, send, fetch and kill.

    All silent clients share one small pool of threads, so they never delay other clients.
    """
    get_s, send_s, loops = server.config.get_interval_s, server.config.send_interval_s, cast("dict[str, Loop]", {})

    def pool() -> Pool:
        return server.silent_pool if is_silent(link) else server.pool

    def add(name: str, tick: Callable[[Server, Link], bool], period_s: float, wanted: Callable[[], bool], most_runs: int = 1) -> None:
        full_name = f"{name}:{link.name}"
        loops[full_name] = Loop(full_name, functools.partial(tick, server, link), pool, period_s, most_runs, wanted, link.is_calm)

    add("get", get_tick, get_s, lambda: may_be_asked(link) and not link.waits_for_news())
    add("send", send_tick, send_s, functools.partial(may_send, server, link), SENDERS_PER_CLIENT + END_WAITERS)
    add("fetch", fetch_tick, get_s, lambda: bool(link.reports()), 3)
    add("kill", kill_tick, get_s, functools.partial(may_kill, server, link))
    return loops


# == 12. Waiting ==  Why a job waits, its place in the queue, and when it may start.


class QueueInfo(NamedTuple):
    """What a job waits for, its place in the queue (1 is next), and the expected wait in seconds; None if unknown."""

    waiting_for: str | None = None
    position: int | None = None
    wait_s: float | None = None


NEXT = QueueInfo("it is sent to a client now", 1)  # of a job that was claimed as soon as it was stored


def queue_info_of(server: Server, job: Job) -> QueueInfo:
    """Return the QueueInfo of a job; all None if it does not wait."""
    waits = Waits(server)
    text, service = waits.text_of(job), server.services.get(job.service or "")
    if service is None or not is_in_queue(job):
        return QueueInfo(text)
    facts, (places, _) = waits.facts_of(job, service), waits.clients_of(service)
    position = position_of(server, job, service, facts)
    run_s, size = mean_run_s(server, service), (job.cpus, job.memory, job.gpus)
    slots = sum(place.slots for place in places if place.could_run(*size))
    if position is None or run_s is None or not slots or any(place.queues for place in places):
        return QueueInfo(text, position)
    return QueueInfo(text, position, wait_estimate_s(position, facts, slots, run_s))


COUNTED_IN_LISTS = 100  # counting all jobs before each job of a page took two thirds of the time, with 1,000 queued jobs a user


def waiting_texts(server: Server, jobs: Iterable[Job]) -> list[str | None]:
    """Return what each of these jobs waits for, or None."""
    waits = Waits(server, count_to=COUNTED_IN_LISTS)
    return [waits.text_of(job) for job in jobs]


def is_in_queue(job: Job) -> bool:
    """Tell whether a job could be sent as soon as it is its turn."""
    return job.status is Status.QUEUED and not job.blocked and job.not_before is None


class Waits:
    """Why jobs wait, at one moment: what they have in common is looked up once."""

    def __init__(self, server: Server, count_to: int = 10_000) -> None:
        """With `count_to`, the jobs of the same user that come first are counted up to this number."""
        self.server, self.count_to, self.known = server, count_to, dict[Any, Any]()

    def once(self, key: Any, look: Callable[[], T]) -> T:
        if key not in self.known:
            self.known[key] = look()
        return cast(T, self.known[key])

    def text_of(self, job: Job) -> str | None:
        """Return what a job waits for, or None if it does not wait."""
        server = self.server
        if job.status is not Status.QUEUED:
            return waiting_on_client(server, job)
        service = server.services.get(job.service or "")
        if service is None:
            return f"service {job.service} is no longer configured"
        if job.blocked:
            return follows_text(server, job)
        if job.not_before is not None:
            left = max(0.0, job.not_before - server.store.steady())
            return f"attempt {job.attempt} starts in {format_duration(left)}: {job.reason}"
        if service.name in server.paused:
            return server.paused[service.name].text()
        places, troubles = self.clients_of(service)
        facts = self.facts_of(job, service)
        text = why_waiting(service.name, facts, troubles, places)
        at_quota = facts.runs_of_user >= facts.runs_per_user or facts.runs_of_service >= facts.max_runs
        more = "" if at_quota else self.once(("clouds", service.name), lambda: server.plugins["clouds"].why(service.name))
        return f"{text}; {more}" if more else text

    def clients_of(self, service: Service) -> tuple[list[ClientCapacity], dict[str, str]]:
        """Return the clients that take jobs of a service, and why others do not."""

        def look() -> tuple[list[ClientCapacity], dict[str, str]]:
            of_service = [link for link in self.server.links_of(service) if not link.wrong_tokens.reason(service.name)]
            links = one_each(link for link in of_service if link.takes_jobs()).values()
            return self.server.capacities_of(links), self.server.troubles(service)

        return self.once(service.name, look)

    def facts_of(self, job: Job, service: Service) -> QueueFacts:
        """Return the figures that decide when a queued job runs."""
        store, name, share = self.server.store, service.name, self.server.store.share(*job.pair)
        values = {"service": name, "user_id": job.user_id, "priority": job.priority, "id": job.id, "most": self.count_to}
        own = self.once(job.id, lambda: store.number(statements.QUEUED_BEFORE, **values))
        others = 0 if share.turn is None else self.once(job.pair, functools.partial(store.turns_before, name, share.turn))
        busy = store.line(name).busy
        size = (job.cpus, job.memory, self.count_to, job.gpus)
        return QueueFacts(len(share.runs), service.runs_per_user, busy, service.max_runs, own, others, *size)


def waiting_on_client(server: Server, job: Job) -> str | None:
    """Return what a job at a client waits for, or None."""
    link = server.links.get(job.client or "")
    if job.status is Status.UNKNOWN:
        return job.reason
    if job.status in BUSY and link and link.outage.reason:
        return f"{link.name} {link.outage.reason}"
    return link.of(job.id).note or None if link and job.status in BUSY else None


def follows_text(server: Server, job: Job) -> str:
    """Say which jobs a job must wait for: the id of the first, and how many others."""
    open_jobs = [found for found in map(server.store.get, ids_in(job.after_ids)) if found is not None and found.status not in OVER]
    if not open_jobs:
        return "the jobs that it follows have just ended"
    first = f"it follows job {open_jobs[0].id}, which is {open_jobs[0].status}"
    more = plural(len(open_jobs) - 1, "other job", "other jobs")
    return f"{first}, and {more}" if more else first


def position_of(server: Server, job: Job, service: Service, facts: QueueFacts) -> int | None:
    """Return a job's place in its service's queue, 1 being next; None beyond 10,000.

    With fifo and priority the place is exact. With share it is an estimate, which assumes that every waiting user has a job for
    each turn; it is never above the number of queued jobs.
    """
    if service.policy == "share":
        before = facts.users_before
        if facts.queued_before:
            before += facts.queued_before * server.store.users_queued(service.name)
            before = min(before, server.store.line(service.name).queued - 1)
    else:
        point_s = server.config.ageing_s if service.policy == "priority" else 0.0
        before = 0
        for row in server.store.read(statements.QUEUED_PRIORITIES, service=service.name):
            earlier = job.arrived_at + (row["priority"] - job.priority) * point_s
            before += server.store.number(statements.QUEUED_EARLIER, service=service.name, priority=row["priority"], before=earlier)
    return max(0, before) + 1 if before < 9_999 else None


# == 13. Client routes ==  The HTTP contract of the client, and the routes of both modes.


def payload_json(client: Client, job: Job) -> dict[str, Any]:
    """Return a payload as a 2.2 client shows it: always six fields."""
    first = (with_handle(client, job).handle or "").partition(" ")[0]
    pid = int(first) if job.status is Status.RUNNING and re.fullmatch(r"[0-9]{1,18}", first) else 0  # PBS says 4711.host
    killed = job.kill_requested_at is not None and job.kill_cause == Cause.CANCELLED.value
    return {"id": job.id, "input": {}, "status": shown_status(job).value, "loc": str(client.folder(job)), "pid": pid, "killed": killed}


def event_json(client: Client, job: Job) -> dict[str, Any]:
    """Return a payload as /events reports it to a joborch server."""
    said = {name: getattr(job, name) for name in EXAMPLE_EVENT}
    said["status"] = shown_status(job).value
    if job.status is Status.RUNNING:
        said["reason"] = client.payloads.known(job.id).waits
    if job.status is Status.CLEANED:  # `reason` says now why it was cleaned
        for row in client.store.read(statements.HISTORY_GET, id=job.id):
            if row["target"] in ENDED:
                said.update(ended_as=row["target"], ended_reason=row["reason"])
    return said


def known_payload(client: Client, request: Request, job_id: int) -> Job:
    """Return a payload. Raises HttpError 404, also if the caller means another attempt by this id."""
    job = known_job(client, request, job_id)
    meant = request.header("X-Joborch-Mark")
    if meant and meant != job.mark:
        raise HttpError(404, f"payload {job.id} belongs to another job: this client has a new database")
    return job


PAYLOAD_ID = ID._replace(help="the id of a payload", example=1)
MARK = Parameter(
    "X-Joborch-Mark",
    "header",
    "string",
    "uuid and attempt of the payload; 404 if the id belongs to another",
    "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0.1",
)


def read_uuid(text: str) -> str:
    """Return a UUID in lower case."""
    if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text.lower()):
        raise ValueError("give a UUID")
    return text.lower()


def read_limit(text: str) -> float:
    """Return the run time limit that a server sends, in seconds."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise ValueError("give seconds")
    return float(text)


def header(name: str, kind: str, meaning: str, example: Any, **more: Any) -> Parameter:
    """Declare a header of /submit."""
    return Parameter(f"X-Joborch-{name}", "header", kind, meaning, example, **more)


SUBMIT_HEADERS = (
    header("Job", "string", "the job's id at its server", "42", read=lambda text: one_line(text, 40)),
    header("Uuid", "string", "with the attempt, the key: a repeat returns the first payload", MARK.example[:36], read=read_uuid),
    header("Attempt", "integer", "number of the attempt", 1, least=1, most=1_000_000, default=1),
    header(
        "Service", "string", "the service, percent-encoded", "example",
        read=lambda text: one_line(unquote_to_bytes(text).decode("utf-8", "replace"), 200) or None,
    ),
    header("User", "integer", "the user", 1, least=SMALLEST, most=BIGGEST),
    header("Cpus", "integer", "cores it needs", 1, least=1, most=1_000_000, default=1),
    header("Memory", "integer", "memory it needs, in MiB", 2048, least=1, most=2**31),
    header("Gpus", "integer", "GPUs it needs", 1, least=0, most=1_000, default=0),
    header("Timeout", "number", "run time limit in seconds", 3600, least=0, read=read_limit),
    header("Inputs", "string", "the digest of all files, computed at the upload", "9f86d0..."),
    header("Digests", "string", "1: the digests follow the files; if they are missing, the transfer broke", "1"),
    header("Return-Inputs", "string", "0: the result omits inputs that the script left unchanged", "0"),
    header(
        "Wait", "integer", "milliseconds to wait for the end of a payload that starts at once: the answer then has it as `end`", 100,
        least=0, most=1000, default=0,
    ),
)  # fmt: skip


def submit_headers(request: Request) -> dict[str, Any]:
    """Return the values of the headers that a joborch server sends and a 2.2 server does not; HttpError 400."""
    return read_all(SUBMIT_HEADERS, {each.name: request.header(each.name) for each in SUBMIT_HEADERS})


def new_payload(said: Mapping[str, Any]) -> NewJob:
    """Return the row for a payload, from the headers of its submit."""
    return NewJob(
        uuid=said["X-Joborch-Uuid"] or new_uuid(),
        user_id=said["X-Joborch-User"],
        service=said["X-Joborch-Service"],
        cpus=said["X-Joborch-Cpus"],
        memory=said["X-Joborch-Memory"],
        gpus=said["X-Joborch-Gpus"],
        timeout=said["X-Joborch-Timeout"],
        return_inputs=0 if said["X-Joborch-Return-Inputs"] == "0" else 1,
        attempt=said["X-Joborch-Attempt"],
        remote_id=said["X-Joborch-Job"],
    )


PAYLOAD_FILE = Parameter("file", "form", "file", "the part's `name` is the relative path, its `filename` the base name", required=True)
TAKEN = "the payload is accepted; `end` is what /events says of one that has ended within X-Joborch-Wait, with `archive` and `sha256`"
SUBMIT_GIVES = {200: Gives(TAKEN, JSON_TYPE, EXAMPLE_PAYLOAD), 400: BAD, **RECEIVING}


@route("POST", "/submit", "client", who="operator", slow=True, takes=(PAYLOAD_FILE, *SUBMIT_HEADERS), gives=SUBMIT_GIVES)
def submit(client: Client, request: Request) -> Answer:
    """Accept the files of one payload; it runs as soon as a slot is free. With X-Joborch-Wait, the answer may have its end."""
    said = submit_headers(request)
    new, wait_s = new_payload(said), said["X-Joborch-Wait"] / 1000
    mark = f"{new.uuid}.{new.attempt}"
    job = client.store.job(statements.JOB_BY_MARK, uuid=new.uuid, attempt=new.attempt)
    if job is not None:
        tell_in_events(client, job.id)  # the answer that had its end was lost
        return Answer(payload_json(client, job))
    problem = problem_of(client, for_all=True)
    if problem:  # another client may be able to run it
        raise HttpError(503, problem, Retry_After="10")
    folder = client.data.tmp / f"submit-{secrets.token_hex(8)}"
    with receiving(client, folder, mark):
        (folder / "work").mkdir()
        form = received_form(request, folder / "work")
        if not new.return_inputs:
            remember_inputs(folder, form)
        crash_point("submit.received")
        client.store.check_identity()
        job, is_marked = place_payload(client, folder, new, is_quiet=wait_s > 0)
    crash_point("submit.stored")
    if is_marked:
        start_placed(client, job, wait_s)
    elif wait_s:
        await_end(client, request, job, wait_s)
    current = known_job(client, request, job.id)
    end = told_end(client, current) if wait_s else {}
    crash_point("submit.ended")
    return Answer({**payload_json(client, current), **end})


def await_end(client: Client, request: Request, job: Job, wait_s: float) -> None:
    """Wait for the end of a payload that others start as soon as a slot is free. Few callers wait: see `start_placed`."""
    crash_point("submit.waits")
    with client.submit_places.place() as parked:
        client.wait_until(lambda: over(client, job.id), wait_s if parked else 0.0, request.left, job.id)


def told_end(client: Client, job: Job) -> dict[str, Any]:
    """Return what the answer to a submit says of a payload's end: what /events would say, with its archive.

    It is empty if the payload has not ended by itself, or left too much: then /events tells it.
    """
    ended_by_itself = job.status is Status.COMPLETED or (job.status is Status.FAILED and job.cause == Cause.USER.value)
    archive = inline_archive(client, job) if ended_by_itself and job.id in client.store.core.quiet else {}
    if archive:
        return {"end": {**event_json(client, job), **archive}}
    tell_in_events(client, job.id)
    return {}


def tell_in_events(client: Client, job_id: int) -> None:
    """Let /events report a payload that it left to the answer of its submit."""
    if job_id in client.store.core.quiet:
        client.store.core.quiet.discard(job_id)
        client.store.tell(job_id)


def received_form(request: Request, work: Path) -> Form:
    """Receive a payload's files. Raises HttpError 400 if they are invalid; 503 for a joborch server, because then the transfer broke."""
    ours = bool(request.header("X-Joborch-Digests"))
    try:
        form = request.read_form(work, by_name=True)
        check_digests(form, ours)
        meant = request.header("X-Joborch-Inputs").lower()  # proven if the server is
        if meant and meant != inputs_digest({file.path: file.sha256 for file in form.files}):
            raise HttpError(503, "the transfer broke: the files that arrived are not those of the job", Retry_After="1")
        if not form.files:
            raise HttpError(400, "there is no file: send at least run.sh", "file")
    except HttpError as refusal:
        if ours and refusal.status == 400:
            raise HttpError(503, f"the transfer broke: {refusal.message}", Retry_After="1") from refusal
        raise
    return form


def check_digests(form: Form, wanted: bool) -> None:
    """Compare the files with the digests that a joborch server sent after them. HttpError 503 makes it send them again."""
    sent = form.fields.pop(DIGESTS_FIELD, None)
    if sent is None and wanted:
        raise HttpError(503, "the transfer broke: the digests did not arrive", Retry_After="1")
    try:
        digests = parse_json(sent) if sent is not None else {file.path: file.sha256 for file in form.files}
    except ValueError as error:
        raise HttpError(400, "the digests cannot be read") from error
    if digests != {file.path: file.sha256 for file in form.files}:
        raise HttpError(503, "the transfer broke: what arrived does not match its digests", Retry_After="1")


def remember_inputs(folder: Path, form: Form) -> None:
    """Note size and mtime of each input, so that the result can omit those that the script leaves unchanged."""
    states = {file.path: os.stat(folder / "work" / file.path) for file in form.files}
    lines = [json.dumps([path, state.st_size, state.st_mtime_ns]) + "\n" for path, state in states.items()]
    (folder / "inputs.json").write_text("".join(lines), encoding="utf-8")


def place_payload(client: Client, folder: Path, new: NewJob, is_quiet: bool) -> tuple[Job, bool]:
    """Move received files to their place, then store the row. If one attempt arrives twice, both calls get the same payload.

    Returns the payload, and whether the caller must start it: see `add_payload`.
    """
    place = client.data.job(f"{new.uuid}.{new.attempt}")
    with client.placing:  # files and row together
        job = client.store.job(statements.JOB_BY_MARK, uuid=new.uuid, attempt=new.attempt)
        if job is not None:
            discard(folder)
            return job, False
        discard(place)  # without a row, a crash left it: it never ran
        os.rename(folder, place)
        crash_point("submit.renamed")
        try:
            return add_payload(client, new, is_quiet)
        except BaseException:
            discard(place)
            raise


PACK_PATIENCE_S = 20.0  # how long a caller waits for a result to be packed


def asked_archive(client: Client, request: Request, job: Job) -> Archive:
    """Return a payload's archive. A joborch server waits only briefly: it fetches other results and asks again."""
    return packed_result(client, job, PACK_GLANCE_S if request.header("X-Joborch-Mark") else PACK_PATIENCE_S, request.left)


PACKING = Gives(
    "the archive is not packed yet; Retry-After says when to ask again", JSON_TYPE, {"message": "the result is being packed: try again"}
)
RETRIEVED = Gives("completed: the result as application/zip; else the payload with its status", JSON_TYPE, EXAMPLE_PAYLOAD)


@route(
    "GET",
    "/retrieve/<job_id>",
    "client",
    who="operator",
    slow=True,
    takes=(PAYLOAD_ID, MARK),
    gives={200: RETRIEVED, 400: BAD, 404: NOT_FOUND, 503: PACKING, **PARTS},
)
def retrieve(client: Client, request: Request, job_id: int) -> Answer:
    """Fetch the result of a payload, or its state."""
    job = known_payload(client, request, job_id)
    if job.status is Status.COMPLETED and (job.id, True) not in client.packings and not has_work(client.folder(job)):
        client.store.move(job, Status.CLEANED, Reason.WORK_REMOVED)
        job = known_payload(client, request, job_id)
    if job.status is not Status.COMPLETED:
        ours = event_json(client, job) if request.header("X-Joborch-Mark") else {}
        return Answer({**payload_json(client, job), **ours})
    return send_archive(client, request, job, f"payload-{job.id}.zip")


def send_archive(client: Client, request: Request, job: Job, filename: str) -> Answer:
    """Answer with a payload's archive, and note that it was fetched if the caller cannot confirm it."""
    archive = asked_archive(client, request, job)
    if job.status in ENDED and not request.header("X-Joborch-Mark"):  # a joborch server confirms it in /events, a 2.2 server cannot
        client.store.note(statements.JOB_FETCHED, id=job.id, now=client.clock.wall())
    return file_answer(request, archive, filename, {})


WORK_FOLDER = Gives("the work folder now, with the output streams", ZIP_TYPE)


@route(
    "GET",
    "/retrieve_partial/<job_id>",
    "client",
    who="operator",
    slow=True,
    takes=(PAYLOAD_ID, MARK),
    gives={200: WORK_FOLDER, 400: BAD, 404: NOT_FOUND, 503: PACKING, **PARTS},
)
def retrieve_partial(client: Client, request: Request, job_id: int) -> Answer:
    """Fetch the current work folder of a payload."""
    job = known_payload(client, request, job_id)
    if job.status is Status.CLEANED:
        raise HttpError(404, f"the files of payload {job.id} were cleaned")
    return send_archive(client, request, job, f"payload-{job.id}-partial.zip")


KILL_GIVES = {
    200: Gives("none of its processes runs", JSON_TYPE, {**EXAMPLE_PAYLOAD, "status": "Killed", "killed": True}),
    202: Gives("it is being stopped", JSON_TYPE, {**EXAMPLE_PAYLOAD, "status": "Running", "killed": True}),
    400: BAD,
    404: NOT_FOUND,
}


@route("POST", "/kill/<job_id>", "client", who="operator", takes=(PAYLOAD_ID, MARK), gives=KILL_GIVES)
def kill(client: Client, request: Request, job_id: int) -> Answer:
    """Stop a payload and everything it started. A joborch server gets its answer at once and the end by /events."""
    job = known_payload(client, request, job_id)
    if job.status not in OVER:
        client.store.request_kill(job.id, Cause.CANCELLED)
        crash_point("kill.wished")
        client.wake("end")
        if not request.header("X-Joborch-Mark"):
            wait_until_over(client, request, job)
        job = known_payload(client, request, job_id)
    return Answer(payload_json(client, job), 200 if job.status in OVER else 202)


def wait_until_over(client: Client, request: Request, job: Job) -> None:
    """Wait until a payload has ended, or a batch system has accepted the request to stop it, which may take long."""

    def noted() -> bool:
        return request.left() or (client.executor.is_batch and client.payloads.known(job.id).stubborn.failures > 0)

    with client.places.place() as parked:
        client.wait_until(lambda: over(client, job.id), WAIT_LIMIT_S if parked else 0.0, noted, job.id)


def over(node: Node, job_id: int) -> Job | None:
    """Return the job if it is over, else None."""
    job = node.store.get(job_id)
    return job if job is None or job.status in OVER else None


EVENTS_TAKES = (
    Parameter(
        "since",
        "query",
        "integer",
        "the `next` of your last answer; 0 requests all payloads whose results were not fetched",
        0,
        least=0,
        most=BIGGEST,
        default=0,
    ),
    Parameter("instance", "query", "string", "the `instance` of your last answer", "a1b2c3", default=""),
    WAIT._replace(help="wait for a change, for at most this many seconds", example=10, read=lambda text: read_wait(text, 3600.0)),
    Parameter(
        "more",
        "query",
        "string",
        "1: continue the list that since=0 began, if its last page said `more`",
        "1",
        choices=("0", "1"),
        default="0",
    ),
    Parameter(
        "problems", "query", "integer", "the `problems_seen` of your last answer: the wait ends if there is news", 0, least=0, most=2**31
    ),
    Parameter("done", "query", "string", "ids of payloads whose results you have: the client may delete them", "1,2", default=""),
)
EXAMPLE_EVENT = {
    "id": 1, "uuid": MARK.example[:36], "attempt": 1, "status": "Completed", "reason": "run.sh ended with exit status 0", "cause": None,
    "exit_code": 0, "signal": None, "started_at": 1795510800.0, "ended_at": 1795510803.5, "peak_memory": 52428800, "cpu_time": 3.25,
}  # fmt: skip
EXAMPLE_ROOM = {"slots": 2, "job_slots": False, "memory": 16000, "gpus": 0}
EXAMPLE_EVENTS = {
    "instance": "a1b2c3", "start": "5f0c3b9c8f1e4d2a", "next": 7, "more": False, "load": 12.5, **EXAMPLE_ROOM, "problem": None,
    "payloads": [EXAMPLE_EVENT], "problems": [], "problems_seen": 3, "at": 1795510803.6,
}  # fmt: skip
CHANGED = Gives("payloads that changed, one page; if `more` is true, request the next page", JSON_TYPE, EXAMPLE_EVENTS)
TOO_MANY = Gives("too many wait", JSON_TYPE, {"message": "too many callers wait here: try again"})


UNPROVEN = Gives(
    "the caller is not a server that proves its identity",
    JSON_TYPE,
    {"message": "the token is wrong, or the request was changed on its way"},
)
OLD_SERVER = Gives(
    "a server of joborch 0.1.0, which cannot prove its identity",
    JSON_TYPE,
    {"message": "this server cannot prove its identity: replace the server's joborch.pyz by version 1.0.0; its jobs wait"},
)
EVENTS_SETTLE_S = 0.03  # delay before a start is reported: short payloads are over by then


@route(
    "GET",
    "/events",
    "client",
    who="server",
    takes=EVENTS_TAKES,
    gives={200: CHANGED, 400: BAD, 401: UNPROVEN, 426: OLD_SERVER, 503: TOO_MANY},
)
def events(client: Client, request: Request, since: int, instance: str, wait: float, more: str, done: str, problems: int | None) -> Answer:
    """Wait for changes of payloads: one long poll serves all of a server's jobs here."""
    if instance == client.instance:
        confirm(client, done)
    elif instance:  # the server knew another instance: send it the whole list, at once
        since, wait = 0, 0.0
    news, health = News(client, since), client.plugins["health"]
    if since == 0 or more == "1":
        last = client.store.number(statements.CHANGED_LAST)  # before the list: a change in between is reported twice, but never lost
        found = client.store.jobs(statements.CHANGED_ALL, since=since)
        client.store.core.quiet.difference_update(job.id for job in found if job.status in ENDED)
        inline = 0
    else:
        with client.places.place() as parked:
            if not parked and wait:
                raise HttpError(503, "too many callers wait here: try again", Retry_After="1")
            found = client.wait_until(lambda: news.look() or health.nothing_new(problems), wait, request.left) or []
            if found and wait:
                client.wait_until(
                    lambda: any(job.status not in (Status.PREPARED, Status.RUNNING) for job in news.look()) or None,
                    EVENTS_SETTLE_S,
                    request.left,
                )
                found = news.look()
        last, inline = since if found else news.since, INLINE_PAYLOADS
    jobs, payloads = events_page(client, found, inline)
    is_more, told = len(jobs) < len(found), max((job.changed or 0 for job in jobs), default=since)
    said = {"instance": client.instance, "start": client.start_id, "next": told if is_more else max(told, last), "more": is_more}
    said.update(load=client.cpu_load(), problem=problem_of(client, for_all=True)[:1000] or None, **health.told())
    return Answer({**said, **room_json(client), "payloads": payloads})


class News:
    """The payloads that changed since a caller last asked, without those whose ends the answers to their submits tell."""

    def __init__(self, client: Client, since: int) -> None:
        self.client, self.since = client, since

    def look(self) -> list[Job]:
        """Return the changed payloads, the earliest change first, without quiet ones; quiet ones at the start are not read again."""
        found, quiet = self.client.store.jobs(statements.CHANGED_SINCE, since=self.since), self.client.store.core.quiet
        kept = [job for job in found if job.id not in quiet]
        for job in found:
            if job.id not in quiet:
                break
            self.since = job.changed or self.since
        return kept


def events_page(client: Client, jobs: Sequence[Job], inline: int) -> tuple[list[Job], list[dict[str, Any]]]:
    """Return the payloads that fit on a page, and their JSON; the first `inline` of them include small results."""
    told, payloads, room = list[Job](), list[dict[str, Any]](), EVENTS_PAGE_BYTES
    for job in jobs[:EVENTS_PAGE]:
        said = event_json(client, job)
        if inline and job.status in ENDED and job.fetched_at is None:
            said.update(inline_archive(client, job))
            inline -= 1
        room -= 1000 + 12 * len(said["reason"] or "") + len(said.get("archive", ""))  # a character takes at most 12 bytes
        if room < 0 and told:
            break
        told.append(job)
        payloads.append(said)
    return told, payloads


def room_json(client: Client) -> dict[str, Any]:
    """Return a client's capacity: cores, memory (MiB) and GPUs, or for a batch system the number of jobs."""
    gpus = len(client.local.gpus or ()) if client.local else None
    if client.executor.is_batch:
        return {"slots": client.config.slots, "job_slots": True, "memory": None, "gpus": gpus}
    return {"slots": client.config.slots, "job_slots": False, "memory": client.config.memory_bytes // MIB, "gpus": gpus}


def confirm(client: Client, done: str) -> None:
    """Note that a server has the results of these payloads, by ids separated by commas."""
    ids = [int(text) for text in done.split(",") if re.fullmatch(r"[0-9]{1,18}", text)]
    if ids:
        now = client.clock.wall()
        client.store.write(
            lambda db: [db.execute(statements.JOB_CONFIRMED, {"id": job_id, "now": now}).rowcount for job_id in ids], durable=False
        )
        crash_point("events.confirmed")
        client.store.core.quiet.difference_update(ids)
        drop_packings(client, ids)


EXAMPLE_HELLO = {"version": "1.0.0", "protocols": [1], "nonce": "5f0c3b9c8f1e4d2a9b7c6d5e4f3a2b1c", "proof": True}


@route("GET", "/hello", "client", who="anyone", gives={200: Gives("how a server proves its identity here", JSON_TYPE, EXAMPLE_HELLO)})
def hello(client: Client, request: Request) -> Answer:
    """Return the nonce of this start. With it, server and client prove that they have the same token."""
    said = {"version": __version__, "protocols": LINK_VERSIONS, "nonce": client.proofs.nonce, "proof": bool(client.tokens)}
    return Answer(said)


@route("GET", "/load", "client", who="anyone", gives={200: Gives("CPU use in percent: a bare number", JSON_TYPE, 12.5)})
def load(client: Client, request: Request) -> Answer:
    """Return the CPU use of this machine."""
    return Answer(client.cpu_load())


# -- both --


PONG = Gives("it answers", JSON_TYPE, {"message": "pong"})


@route("GET", "/", "server client", who="anyone", gives={200: PONG, 302: Gives("a browser is sent to a page")})
def ping(node: Node, request: Request) -> Answer:
    """Tell that the process answers."""
    if prefers_html(request.header("Accept")):
        return Answer(None, 302, {"Location": "/dashboard" if node.config.mode == "server" else "/swagger-ui/"})
    return Answer({"message": "pong"})


def prefers_html(accept: str) -> bool:
    """Tell whether an Accept header names text/html before anything else."""
    return accept.split(",")[0].split(";")[0].strip() == "text/html"


# == 14. Client ==  The client's loops start payloads, notice their end, kill them on request, and enforce their limits.

BEING_ENDED = "it is being stopped"  # how the note begins while a batch system takes its time to stop a payload
SUBMIT_WAITERS = 8  # submits that wait for the end of their payloads at once, of the 12 threads for small forms
LOOK_S = 10.0  # between two looks at payloads whose end a signal (SIGCHLD) reports
LATE_START_S = 1.0  # a payload that starts this long after it was marked has its start time stored
ENDING_THREADS = 32  # payloads that are killed at once: each may take all of JOBORCH_KILL_GRACE
PACKERS = 2  # large results that are packed at once


class Client(Node):
    """A client: its executor, and what it knows about its payloads apart from the rows."""

    def __init__(self, config: Config, store: Store, data: DataFolder, clock: Clock | None = None) -> None:
        super().__init__(config, store, data, clock)
        self.executor = make_executor(data, config)
        self.payloads = Payloads(self.clock, lambda: self.wake("end"))
        self.holds = Holds(self.clock)
        # A new database has a new instance: it tells servers that the payload ids they know are invalid.
        self.instance = str(store.read(statements.INSTANCE)[0]["instance"])
        self.start_id = secrets.token_hex(8)  # tells servers whether two clients of this instance are one process
        self.lock, self.placing = threading.Lock(), threading.Lock()  # for `packings`; for files and row of a payload together
        self.submit_places = ThreadLimit(SUBMIT_WAITERS)
        self.say_goodbye: Callable[[], object] = lambda: None  # to the servers that it calls
        self.starts_at_once = False  # whether a submit starts its payload if a slot is free: once the loops run
        self.limits = ResultLimits(config.max_result_bytes, config.max_result_files)
        self.packings: dict[tuple[int, bool], Any] = {}  # by payload id, and whether it has ended: archives that are packed or being packed
        self.packers, self.quick_packers, self.measurers = map(threading.BoundedSemaphore, (PACKERS, 1, PACKERS))
        # Whether rows of payloads run or wait, and whether some that run are to be killed; set by `run_tick`.
        self.has_rows = self.has_kills = True
        self.waits = self.needs_looks = True  # set by `run_tick`: whether it must look again without being woken, and at all payloads
        self.looked_at = float("-inf")  # monotonic: when it last looked at all
        self.holes = True  # the file system can punch holes, as far as we know
        self.measured = 0  # where `limit_tick` goes on among the running payloads
        self.troubled_at: float | None = None  # wall: since when nothing can be started for some service
        for name, tick, period_s, options in (
            ("run", run_tick, config.run_interval_s, {"wanted": functools.partial(needs_look, self)}),
            ("end", end_tick, config.run_interval_s, {"most_runs": ENDING_THREADS, "wanted": lambda: self.has_kills}),
            ("limit", limit_tick, config.run_interval_s, {"wanted": lambda: self.has_payloads}),
            ("sync", sync_tick, SYNC_AFTER_S, {}),
            ("clean", clean_tick, config.clean_interval_s, {}),
        ):
            self.loops[name] = Loop(name, functools.partial(tick, self), lambda: self.pool, period_s, **options)

    @property
    def local(self) -> LocalExecutor | None:
        """The local executor, which needs no handles to find its payloads, and can wait for them; None if another one runs payloads."""
        return self.executor if isinstance(self.executor, LocalExecutor) and not self.executor.is_batch else None

    @property
    def has_payloads(self) -> bool:
        """Tell whether payloads run or wait, also those that a submit has started since `run_tick` read the rows."""
        return self.has_rows or bool(self.payloads)

    def start(self) -> None:
        self.starts_at_once = self.local is not None
        super().start()

    def stop(self) -> None:
        """Store the time first: what stopped the client may have stopped payloads, too."""
        self.say_goodbye()
        try:
            (self.data.path / STOP_NOTE).touch()
        except OSError as error:
            log.warning("the time of the stop cannot be kept: %s", error)
        super().stop()


def needs_look(client: Client) -> bool:
    """Tell whether `run_tick` may find something that nobody wakes it for. The end of our own child is a signal (SIGCHLD)."""
    return client.executor.is_batch or (client.has_payloads and (client.waits or must_look_at_all(client)))


def must_look_at_all(client: Client) -> bool:
    """Tell whether `run_tick` must look at all payloads, because the executor does not name those that have ended, or not all."""
    return client.local is None or client.needs_looks or client.clock.monotonic() - client.looked_at > LOOK_S


def all_running(client: Client) -> list[Job]:
    """Return all payloads that run, and forget what is noted of others."""
    client.looked_at = client.clock.monotonic()
    noted = client.payloads.not_taken()  # before the rows: what is started now is in neither
    running = client.store.jobs(statements.PAYLOADS_IN, status=Status.RUNNING.value, limit=1_000_000)
    client.payloads.forget(noted.difference(job.id for job in running))  # another thread noted something just after their end
    return running


def just_ended(client: Client, local: LocalExecutor) -> list[Job]:
    """Return the running payloads that have ended, as the executor knows. The others are not looked at."""
    local.reap()
    found = [client.store.get(job_id) for job_id in sorted({*local.ended, *client.payloads.lingering()})]
    running = [job for job in found if job is not None and job.status is Status.RUNNING]
    local.ended.intersection_update(job.id for job in running)
    return running


def run_tick(client: Client) -> bool:
    """Finish payloads that ended, and start others on free slots. While stopping, leave both to the next start of the client."""
    if client.stopping.is_set():
        return False
    save_handles(client)
    local, looks_at_all = client.local, must_look_at_all(client)
    client.needs_looks = True  # if this tick fails
    everything = all_running(client) if local is None or looks_at_all else just_ended(client, local)
    # Not those that another thread starts or kills. Look that up before the handles: a thread that starts a payload leaves one.
    running = [with_handle(client, job) for job in [job for job in everything if not client.payloads.known(job.id).is_taken]]
    over = ended_of(client, [job for job in running if job.handle is not None])
    if local is not None and over:
        start_what_fits(client)  # before the results are looked at: no slot waits for that
    for job in over:
        crash_point("end.seen")
        if job.kill_cause is None:
            finish(client, job, over[job])
        crash_point("end.stored")
    start_again(client, [job for job in running if job.handle is None and job.kill_requested_at is None])  # it may take long
    needs_looks = bool(client.holds.held) or not (local and all(job in over or local.is_child(job) for job in running))
    waiting = client.store.number(statements.COUNT_IN, status=Status.PREPARED.value)
    count, kills = client.store.read(statements.RUNNING_COUNTS)[0]
    client.has_rows, client.has_kills = waiting + count > 0, kills > 0
    client.waits = bool(waiting or client.payloads.lingering() or (local and local.ended))
    if local is None or not over:
        start_what_fits(client)
    client.needs_looks = needs_looks
    return False


def ended_of(client: Client, started: Sequence[Job]) -> dict[Job, Outcome]:
    """Ask the executor about payloads. Return those that have ended, and how; they take no slot any more."""
    measured = {job.id: measuring.outcome for job in started if (measuring := client.payloads.known(job.id).measuring)}
    outcomes = {**client.executor.poll([job for job in started if job.id not in measured]), **measured}  # poll reports an end only once
    problem = client.executor.problem()
    client.holds.told(problem)
    problem_since(client, problem)
    for job in started:
        outcome = outcomes[job.id]
        if outcome.alive and job.kill_requested_at is None:
            if job.started_at is None and not outcome.waits:
                client.store.tell(job.id, started_at=client.clock.wall(), now=client.store.steady())
            set_wait_reason(client, job.id, problem or outcome.waits)
        if outcome.alive == client.payloads.known(job.id).lingers:
            client.payloads[job.id].lingers = not outcome.alive
    return {job: outcomes[job.id] for job in started if not outcomes[job.id].alive}


def set_wait_reason(client: Client, job_id: int, text: str) -> None:
    """Note what a payload waits for (empty: nothing). Report it to the server if it is new."""
    if client.payloads.known(job_id).waits != text:
        client.payloads[job_id].waits = text
        client.store.tell(job_id)


def forget(client: Client, job: Job) -> None:
    """Forget what is known of a payload that is over, and remove its TMPDIR."""
    client.payloads.pop(job.id, None)
    drop_scratch(client, job)


def shown_status(job: Job) -> Status:
    """Return a payload's status as servers see it: one that waits in a batch system's queue is Prepared."""
    return Status.PREPARED if job.status is Status.RUNNING and job.started_at is None else job.status


def problem_of(client: Client, for_all: bool = False) -> str:
    """Return why nothing can be started now for some service, or `for_all` services; an empty text if all is well."""
    held = client.holds.reasons(for_all)
    return client.plugins["drain"].reason or client.executor.problem() or (held[0] if held else "")


def problem_since(client: Client, problem: str) -> float | None:
    """Return when (wall time) the present problem began, or None if there is none. Each tick calls it with the current problem."""
    before = client.troubled_at
    if not problem and not client.holds.by_service:  # while a retry is under way, the problem is not over
        client.troubled_at = None
    elif client.troubled_at is None:
        client.troubled_at = client.clock.wall()
    if client.troubled_at != before:
        client.wake("health")  # so that a server hears of it at once
    return client.troubled_at if problem else None


def start_what_fits(client: Client) -> None:
    """Start payloads in the order of their arrival, as slots and memory allow. None overtakes one that must wait."""
    for job in client.store.jobs(statements.PAYLOADS_IN, status=Status.PREPARED.value, limit=client.config.slots):
        if not begin(client, job):
            break
    if client.executor.is_batch:
        start_held(client)


def has_room(client: Client, db: sqlite3.Connection, job: Job) -> bool:
    """Tell inside a transaction whether slots, memory and GPUs are free for a payload. One that asks for more than there is runs alone."""
    count, cpus, memory, gpus = db.execute(statements.RUNNING_NEEDS).fetchone()
    for job_id in client.payloads.lingering():
        row = db.execute(statements.JOB_GET, {"id": job_id}).fetchone()
        if row is not None and row["status"] == Status.RUNNING.value:
            count, cpus, memory, gpus = count - 1, cpus - row["cpus"], memory - (row["memory"] or 0), gpus - row["gpus"]
    if client.executor.is_batch:  # it counts the cores
        return bool(count < client.config.slots)
    fits = cpus + job.cpus <= client.config.slots and memory + (job.memory or 0) <= client.config.memory_bytes // MIB
    fits = fits and (not client.local or gpus + job.gpus <= len(client.local.gpus or ()))
    return bool(fits or not count)


def begin(client: Client, job: Job) -> bool:
    """Start one payload, or end it if it cannot run. Return False if there is no room for it."""
    work = client.data.job(job.mark) / "work"
    if not work.is_dir():
        reason = Reason.FILES_REMOVED.format(where="client")
        client.store.move(job, Status.FAILED, reason, cause=Cause.INFRASTRUCTURE.value)
        return True
    problem = why_not_runnable(work / "run.sh")
    if problem:
        client.store.move(job, Status.INVALID, problem, cause=Cause.USER.value)
        return True
    if not client.payloads.take(job.id):  # it is being killed
        return True
    try:
        return launch(client, job)
    finally:
        client.payloads.give_back(job.id)


def launch(client: Client, job: Job) -> bool:
    """Mark a payload as Running, and start it. Return False if there is no room for it or the client is stopping."""
    if client.stopping.is_set():
        return False
    # A job in a batch system survives a power failure of this machine, so the row must, too.
    is_batch = client.executor.is_batch
    started_at = None if is_batch else client.clock.wall()

    def mark(db: sqlite3.Connection) -> bool | None:
        return client.store.move(job, Status.RUNNING, "", is_batch, started_at=started_at) if has_room(client, db, job) else None

    marked = client.store.write(mark, durable=is_batch)
    if marked:
        start_marked(client, job._replace(status=Status.RUNNING, moved_at=client.store.steady()))
    return marked is not None


def start_marked(client: Client, job: Job) -> None:
    """Start a payload that was just marked as Running, unless others wait: then it takes its turn (see `start_held`)."""
    crash_point("run.marked")
    if has_others_before(client, job):
        client.holds.held[job.id] = Held(client.clock)
    else:
        start_on_executor(client, job)


def has_others_before(client: Client, job: Job) -> bool:
    """Tell whether payloads wait here that what runs them has refused."""
    return bool(client.holds.held or client.holds.of_all() or client.holds.of(job.service or "-"))


def add_payload(client: Client, new: NewJob, is_quiet: bool) -> tuple[Job, bool]:
    """Store a new payload. If it can start at once, it is Running in the same transaction, and the caller starts it: see `start_placed`.

    If `is_quiet`, /events does not report it: the caller does. Returns the payload, and whether it is to be started.
    """
    store = client.store
    can_start = client.starts_at_once and not why_not_runnable(client.data.job(f"{new.uuid}.{new.attempt}") / "work" / "run.sh")

    def add(db: sqlite3.Connection) -> tuple[Job, bool]:
        job = store.add(new, "submitted")
        store.core.after(lambda: None, functools.partial(forget_start, client, job.id))
        store.core.quiet.update({job.id} if is_quiet else ())
        first = db.execute(statements.FIRST_PREPARED).fetchone()[0] == job.id
        if client.local and not has_room(client, db, job):
            client.has_rows = client.waits = True
            return job, False  # whoever takes in the next end starts it
        if not (can_start and first) or client.stopping.is_set() or has_others_before(client, job):
            store.core.after(functools.partial(client.wake, "run"))
            return job, False
        client.payloads.take(job.id)  # before the COMMIT: other threads must not see it without its handle
        store.move(job, Status.RUNNING, "", started_at=client.clock.wall())
        return store.row(db, job.id), True

    return store.write(add, durable=False)


def forget_start(client: Client, job_id: int) -> None:
    """Forget a payload whose transaction was undone: another one may get its id."""
    client.store.core.quiet.discard(job_id)
    client.payloads.pop(job_id, None)


def start_placed(client: Client, job: Job, wait_s: float) -> None:
    """Start a payload that `add_payload` has marked as Running, and take in its end if that comes within `wait_s` seconds.

    Until then no other thread ends it: a kill waits. Few callers wait at once, so that they leave worker threads to others.
    """
    try:
        start_marked(client, job)
        with client.submit_places.place() if wait_s else contextlib.nullcontext() as parked:
            if parked:
                take_end(client, with_handle(client, job), wait_s)
    finally:
        client.payloads.give_back(job.id)


def take_end(client: Client, job: Job, wait_s: float) -> None:
    """Wait for the end of a payload, and move it on; what cannot be decided at once is left to the runner."""
    if not client.local or not client.local.wait(job, wait_s):
        client.wake("run")  # its end may have come just now
        return
    outcome = client.executor.poll([job])[job.id]
    crash_point("end.seen")
    lingers = not outcome.alive and not finish(client, job, outcome)
    if lingers:
        client.payloads[job.id].lingers = True
    if outcome.alive or lingers or client.store.read(statements.FIRST_PREPARED)[0][0] is not None:
        client.wake("run")
    crash_point("end.stored")


FIND_AGAIN_S = 2.0  # wait before retrying a payload that the batch system rejected or could not report on


def start_on_executor(client: Client, job: Job) -> bool:
    """Start a payload whose row says Running. Return True if the executor accepted it.

    If that is impossible now, it is tried again; if it can never run, the payload fails.
    """
    try:
        handle = client.executor.start(job)
    except SubmitRefused as error:
        client.holds.put_off(job, str(error))
    except BackendUnavailable as error:
        client.holds.held.pop(job.id, None)  # it is unknown whether the executor has it
        client.payloads[job.id].tried.failed(error, FIND_AGAIN_S)
        client.holds.hold("", str(error))
        set_wait_reason(client, job.id, str(error))
    except CannotRun as error:
        fail_to_start(client, job, str(error), Cause.LIMIT)
    except OSError as error:
        fail_to_start(client, job, Reason.NOT_STARTED.format(error=os.strerror(error.errno or 0)), Cause.INFRASTRUCTURE)
    else:
        crash_point("run.started")
        client.holds.taken(job)
        client.payloads[job.id].tried.worked()
        if client.executor.is_batch:
            log.info("payload %d is job %s of the batch system", job.id, handle)
        keep_handle(client, job, handle)
        crash_point("run.stored")
        return True
    return False


def keep_handle(client: Client, job: Job, handle: str) -> None:
    """Keep the handle of a payload that was started: in memory if `find` gets it again after a crash, else in its row.

    One that starts long after it was marked has its time begin now.
    """
    if not client.local or client.store.steady() - job.moved_at > LATE_START_S:
        client.payloads[job.id].unsaved = (handle, client.store.steady())
        save_handles(client)
    else:
        client.payloads[job.id].handle = handle


def with_handle(client: Client, job: Job) -> Job:
    """Return a payload with its handle, wherever that is kept."""
    handle = client.payloads.known(job.id).handle
    return job if handle is None else job._replace(handle=handle)


def fail_to_start(client: Client, job: Job, reason: str, cause: Cause) -> None:
    """Move a payload that could not be started to its end state."""
    forget(client, job)
    current = client.store.get(job.id)
    if current is not None and current.status is Status.RUNNING:
        client.store.move(current, Status.FAILED, reason, cause=cause.value)
        client.wake("run")  # its slot is free


def save_handles(client: Client) -> None:
    """Store the handles of started payloads. A StorageError stops the tick, so no payload is judged before that."""
    for job_id, payload in list(client.payloads.items()):
        if payload.unsaved is not None:
            handle, now = payload.unsaved
            client.store.note(statements.JOB_STARTED, id=job_id, handle=handle, now=now)
            payload.unsaved = None


def finish(client: Client, job: Job, outcome: Outcome, patient: bool = False) -> bool:
    """Move an ended payload to its end state, with a reason; return whether it was moved.

    If not `patient`, a large work folder delays that to a later tick.
    """
    folder = client.data.job(job.mark)
    try:
        client.executor.collect(job)
    except BackendUnavailable as error:
        set_wait_reason(client, job.id, f"its outputs are not available yet: {error}")
        return False  # a later tick tries again
    if outcome.cause is None and not has_work(folder):
        text = Reason.WORK_GONE if outcome.exit_status is None else Reason.WORK_GONE_EXIT
        outcome = dataclasses.replace(outcome, cause=Cause.INFRASTRUCTURE, reason=text.format(status=outcome.exit_status))
    bound_outputs(client, str(folder))
    too_much, left_out = too_much_left(client, job, outcome, patient) if outcome.cause is None else ("", 0)
    if too_much is None:
        return False
    started, ended = run_times(folder, job)
    changes: dict[str, Any] = {"started_at": started, "ended_at": ended, "exit_code": outcome.exit_status, **used_by(client, job)}
    if too_much:
        reason = Reason.RESULT_HAS_EXIT.format(too_much=too_much, status=outcome.exit_status)
        moved = client.store.move(job, Status.FAILED, reason, cause=Cause.LIMIT.value, **changes)
    elif outcome.cause is not None:
        to = Status.KILLED if outcome.cause is Cause.CANCELLED else Status.FAILED
        moved = client.store.move(job, to, outcome.reason or limit_reason(folder, job.timeout or 0), cause=outcome.cause.value, **changes)
    elif outcome.exit_status == 0:
        reason = Reason.COMPLETED_CHILDREN if outcome.children_left else Reason.COMPLETED
        moved = client.store.move(job, Status.COMPLETED, reason + left_out_text(left_out), **changes)
    else:
        status = outcome.exit_status or 0
        run_s = run_seconds(started, ended, client.store.steady() - job.moved_at)
        reason, number = failure_reason(folder, status, run_s) + left_out_text(left_out), status - 128 if is_signalled(status) else None
        moved = client.store.move(job, Status.FAILED, reason, cause=Cause.USER.value, signal=number, **changes)
    if moved:  # else a kill was requested meanwhile: end_tick decides how it ended
        forget(client, job)
    return moved


def used_by(client: Client, job: Job) -> dict[str, Any]:
    """Return what a payload that is over has used, as changes of its row; empty if it never started."""
    if job.status is not Status.RUNNING:
        return {}
    look = getattr(client.executor, "used", None)
    return dict(zip(FIGURES, look(job) if look else used_by_payload(client.data.job(job.mark))))


def end_tick(client: Client) -> bool:
    """Kill one payload for which that was requested. Return whether there was one."""
    job = take_for_ending(client)
    if job is None:
        return False
    try:
        folder = client.data.job(job.mark)
        begun = folder / f"ending.{job.attempt}"  # left by a crash during the kill: then the kill caused the exit status
        measuring = client.payloads.known(job.id).measuring
        outcome = measuring.outcome if measuring else client.executor.poll([job])[job.id] if job.status is Status.RUNNING else Outcome(True)
        if outcome.exit_status is not None and outcome.cause is not Cause.INFRASTRUCTURE and not begun.exists():  # it ended before the kill
            finish(client, job, outcome, patient=True)
            return True
        if job.status is Status.RUNNING:
            with contextlib.suppress(OSError):
                touch_below(folder, begun.name)
            crash_point("kill.begun")
            client.executor.cancel(job)
            crash_point("kill.ended")
            with contextlib.suppress(BackendUnavailable):  # its outputs are not worth waiting for
                client.executor.collect(job)
        if job.kill_cause == Cause.LIMIT.value:
            times: dict[str, Any] = {**dict(zip(("started_at", "ended_at"), run_times(folder, job))), **used_by(client, job)}
            client.store.move(job, Status.FAILED, limit_reason(folder, job.timeout or 0), cause=Cause.LIMIT.value, **times)
        else:
            client.store.move(job, Status.KILLED, Reason.KILLED, cause=Cause.CANCELLED.value, **used_by(client, job))
            crash_point("kill.stored")
        forget(client, job)
    except StillRunning as error:
        if client.payloads[job.id].stubborn.failed(error, client.config.run_interval_s):
            log.error("%s; it is tried again", error)
        if client.executor.is_batch:
            set_wait_reason(client, job.id, f"{BEING_ENDED}: {error}")
        return True  # there may be others
    finally:
        client.payloads.give_back(job.id)
    client.wake("run")
    return True


def take_for_ending(client: Client) -> Job | None:
    """Return a payload to kill that no other thread is killing and that was not tried a moment ago."""
    for status in (Status.RUNNING, Status.PREPARED):
        for job in client.store.jobs(statements.PAYLOADS_IN, status=status.value, limit=1_000_000):
            if job.kill_requested_at is None or not client.payloads.take(job.id, to_kill=True):
                continue
            current = client.store.get(job.id)  # read again: it may have got a handle since
            if current is not None and current.status not in OVER:
                return with_handle(client, current)
            client.payloads.give_back(job.id)
    return None


MEASURED_AT_ONCE = 200  # running payloads whose output streams are measured in one tick; a tick that measured 1,000 would take 8 ms


def limit_tick(client: Client) -> bool:
    """Enforce the limits of running payloads: run time, memory, processes, disk, and the size of output streams: many take turns."""
    now, rows = client.store.steady(), client.store.read(statements.RUNNING_LIMITS)
    too_much = client.local.over_limits({f"{row['uuid']}.{row['attempt']}": row["memory"] for row in rows}) if client.local else ()
    for job_id, uuid, attempt, timeout, moved_at, _ in rows:
        over = f"{uuid}.{attempt}" in too_much or (timeout and not client.executor.is_batch and now - moved_at > timeout)
        if over and client.store.request_kill(job_id, Cause.LIMIT):
            client.wake("end")
    count, first = min(len(rows), MEASURED_AT_ONCE), client.measured % max(1, len(rows))
    client.measured = first + count
    for _, uuid, attempt, *_ in (rows + rows)[first : first + count]:
        bound_outputs(client, f"{client.data.jobs}/{uuid}.{attempt}")
    return False


def start_held(client: Client) -> None:
    """Start the waiting payloads that are due, and note for the others why they wait."""
    client.holds.start(client.holds.due(waiting_here(client)), functools.partial(start_now, client))
    for job in waiting_here(client):
        reason = client.holds.reason_of(job)
        if reason:
            set_wait_reason(client, job.id, reason)


def waiting_here(client: Client) -> list[Job]:
    """Return the payloads that wait here, in the order of their arrival. Forget those that ended or were found meanwhile."""
    found = []
    for job_id in sorted(client.holds.held):
        job = client.store.get(job_id)
        if job is None or job.status is not Status.RUNNING or with_handle(client, job).handle is not None:
            client.holds.held.pop(job_id)
        elif job.kill_requested_at is None:
            found.append(job)
    return found


def start_now(client: Client, job: Job) -> bool:
    """Start a payload whose row says Running but that never started, unless a kill was requested. Return whether it started."""
    if not client.payloads.take(job.id):
        return False
    try:
        current = client.store.get(job.id)
        can_start = current is not None and current.status is Status.RUNNING and current.kill_requested_at is None
        return can_start and start_on_executor(client, cast(Job, current))
    finally:
        client.payloads.give_back(job.id)


def sync_tick(client: Client) -> bool:
    """Flush results that no server has fetched yet to the disk, with one call for all."""
    jobs = client.store.jobs(statements.UNSYNCED, before=client.store.steady() - SYNC_AFTER_S)
    if jobs:
        sync_file_system(client.data.jobs)
        crash_point("sync.done")
        client.store.write(lambda db: [db.execute(statements.JOB_SYNCED, {"id": job.id}).rowcount for job in jobs])
    return False


# == 15. Recovery ==  After a restart, or an answer that was lost, every payload is found again before anything is started a second time.


def check_executor(client: Client) -> None:
    """Raise ConfigError if payloads run that another executor started: this one would lose them."""
    note = client.data.path / "executor"
    before = note.read_text(encoding="utf-8").strip() if note.exists() else "local"
    running = client.store.number(statements.COUNT_IN, status=Status.RUNNING.value)
    if before != client.config.executor and running:
        remedy = f"start it with --executor {one_line(before, 40)} until they have ended, or give another DATA_PATH"
        raise ConfigError(
            f"JOBORCH_EXECUTOR is {client.config.executor!r}, but {running} payloads here were started by {before!r}: {remedy}"
        )
    if before != client.config.executor or not note.exists():
        write_atomic(note, client.config.executor.encode())


def recover_payloads(client: Client) -> None:
    """When a client starts: find the payloads that it started before, and start those that certainly never ran."""
    if client.store.is_new:
        end_orphans(client)
    if client.store.rebooted:
        distrust(client)
    running = client.store.jobs(statements.PAYLOADS_IN, status=Status.RUNNING.value, limit=1_000_000)
    start_again(client, [job for job in running if job.handle is None and job.kill_requested_at is None])
    if running:
        log.info("%d payloads were running when the client stopped: recovered", len(running))


def start_again(client: Client, cut_off: Sequence[Job]) -> None:
    """Find payloads that were started before a crash or a lost answer. Start those that certainly never were."""
    held = client.holds.held
    refused = {job.id for job in client.holds.due(waiting_here(client)) if held[job.id].failures}
    asked = [job for job in cut_off if (job.id in refused if job.id in held else not client.payloads.known(job.id).tried.waits())]
    if not asked or client.holds.of_all():
        return
    try:
        handles = client.executor.find(asked)
    except BackendUnavailable as error:
        client.holds.hold("", str(error))
        for job in asked:
            set_wait_reason(client, job.id, str(error))
        return
    for job in asked:
        handle = handles.get(job.mark)
        if handle:
            held.pop(job.id, None)
            if client.local:
                client.payloads[job.id].handle = handle
            else:
                client.store.note(statements.JOB_HANDLE, id=job.id, handle=handle)
        elif handle is not None:
            held.pop(job.id, None)
            text = "its submission was interrupted: the client waits to learn whether it succeeded"
            client.payloads[job.id].tried.failed(text, FIND_AGAIN_S)
            set_wait_reason(client, job.id, text)
        elif job.id not in held:
            if not client.payloads.known(job.id).tried.failures:
                log.warning("payload %d was stored as Running but never started: it is started now", job.id)
            held[job.id] = Held(client.clock)
    start_held(client)


def distrust(client: Client) -> None:
    """After a reboot, discard files and results that may not have reached the disk. The server tries those jobs again."""
    for job in client.store.jobs(statements.UNSYNCED, before=client.store.steady()):
        if job.status is Status.COMPLETED:  # a failed script remains a failure, even if its files are lost
            client.store.move(job, Status.CLEANED, Reason.REBOOTED_UNSYNCED)
    for job in client.store.jobs(statements.PAYLOADS_IN, status=Status.PREPARED.value, limit=1_000_000):
        client.store.move(job, Status.FAILED, Reason.REBOOTED_UNSYNCED, cause=Cause.INFRASTRUCTURE.value)
    running = client.store.jobs(statements.PAYLOADS_IN, status=Status.RUNNING.value, limit=1_000_000)
    for job in running if client.local else ():  # whatever its files say: they may not have reached the disk
        if job.handle is None and job.kill_requested_at is None:
            client.store.move(job, Status.FAILED, Reason.REBOOTED, cause=Cause.INFRASTRUCTURE.value)


def end_orphans(client: Client) -> None:
    """A new database does not have the payloads of an earlier run: kill and remove them."""
    client.executor.end_orphans([folder.name for folder in client.data.jobs.iterdir()])
    discard_payloads(client.data)


# == 16. Logs ==  A script's output can be read while it runs and as long as its files are kept.

TEXT_TYPE, EVENT_TYPE = "text/plain; charset=utf-8", "text/event-stream"
COMMENT_EVERY_S = 15.0  # in a quiet event stream: gateways give up after 60 s of silence
STREAM = Parameter(
    "stream", "query", "string", "which of the two (default: stdout)", "stderr", choices=OUTPUT_STREAMS, default=OUTPUT_STREAMS[0]
)
OFFSET = Parameter(
    "offset",
    "query",
    "integer",
    "how many bytes of the output you have: X-Next-Offset of the last answer",
    0,
    least=0,
    most=10**18,
    default=0,
)
FOLLOW = Parameter("follow", "query", "string", "1: continue until the job has ended", "1", choices=("0", "1"), default="0")
LOG_PART = Gives(
    "output from `offset` on, at most 1 MiB; X-Next-Offset says where the next part begins. With follow=1, everything until the job "
    "ends; with `Accept: text/event-stream` as events with the offset as id, comments in pauses, and a last event `end` with the status",
    TEXT_TYPE,
)
NO_OUTPUT = Gives("no job has this id, or its output is not available", JSON_TYPE, {"message": "the files of job 42 were cleaned"})


def bound_outputs(client: Client, folder: str) -> None:
    """Free the middle of a payload's output streams that are over their limit."""
    for stream in OUTPUT_STREAMS if client.holes else ():
        path = f"{folder}/{stream}"
        with contextlib.suppress(OSError):  # a first look is cheap: there may be thousands
            if os.lstat(path).st_size <= client.config.log_limit_bytes:
                continue
        try:
            punch_middle(Path(path), client.config.log_limit_bytes)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
                continue  # the wrapper has not created it yet, or the script has replaced it
            client.holes = False
            log.warning("output cannot be limited on this file system (%s): it is cut when it is read", error)


class LogPart(NamedTuple):
    """A part of an output stream: its bytes, and the offset after them."""

    text: bytes
    following: int


@route(
    "GET",
    "/logs/<job_id>",
    "client",
    who="operator",
    slow=True,
    takes=(PAYLOAD_ID, MARK, STREAM, OFFSET),
    gives={200: LOG_PART, 400: BAD, 404: NOT_FOUND},
)
def payload_logs(client: Client, request: Request, job_id: int, stream: str, offset: int) -> Answer:
    """Read a payload's output, also while it runs."""
    job = known_payload(client, request, job_id)
    part = LogPart(b"", offset)
    # OSError: it does not exist yet, or the script replaced it by something else.
    with contextlib.suppress(OSError), open_regular(client.folder(job), stream) as source:

        def read_at(begin: int, count: int) -> bytes:
            source.seek(begin)
            return source.read(count)

        kept = Stream(os.fstat(source.fileno()).st_size, client.config.log_limit_bytes)
        part = LogPart(*kept.part(read_at, offset, LOG_PART_BYTES))
    return Answer(part.text, 200, {"Content-Type": TEXT_TYPE, "X-Next-Offset": str(part.following)})


def stored_log(server: Server, job: Job, stream: str, offset: int) -> LogPart:
    """Read a part of an ended job's output from its result; empty if it never ran. Raises HttpError 404 if the ZIP is damaged."""
    if job.result_sha256 is None:
        return LogPart(b"", offset)
    with contextlib.closing(stored_archive(server, job).file) as file:
        try:
            return part_of_archive(file, stream, server.config.log_limit_bytes, offset)
        except ValueError as error:
            raise HttpError(404, f"the output of job {job.id} cannot be read: its client sent a damaged ZIP") from error


def part_of_archive(file: IO[bytes], stream: str, limit_bytes: int, offset: int) -> LogPart:
    """Read a part of an output stream from a ZIP; empty if it has no such member. Raises ValueError if the ZIP is invalid.

    The work is bounded by `limit_bytes` of output, whatever the ZIP claims: a client may have forged it.
    """
    for record in zip_records(file, commented=True):  # a client puts the streams first
        said = re.fullmatch(STREAM_COMMENT.format("([0-9]{1,18})", "([0-9]{1,18})").encode(), record.comment)
        if said and record.name.endswith(f"/{stream}".encode()):
            return part_of_member(file, record, Stream(int(said[1]), int(said[2])), limit_bytes, offset)
    return LogPart(b"", offset)  # a 2.2 client keeps no output


def part_of_member(file: IO[bytes], record: ZipRecord, kept: Stream, limit_bytes: int, offset: int) -> LogPart:
    """Read a part of an output stream from its member of a ZIP; `kept` says which bytes of the stream the member has.

    A negative `offset` counts from the end.
    """
    first, second = kept.gap
    shorter = second - first - len(kept.line(first)) if second > first else 0  # than the stream, after the gap
    if record.size != kept.size - shorter or record.size > limit_bytes + KIB:  # not as a client packs it, or over the limit here
        size = min(record.size, limit_bytes)
        kept, second, shorter = Stream(size, size), size, 0
    if offset < 0:
        offset = max(0, kept.size + offset)

    def read_at(begin: int, count: int) -> bytes:
        return read_member(file, record, begin if begin < second else begin - shorter, count)

    return LogPart(*kept.part(read_at, offset, LOG_PART_BYTES))


def job_log(server: Server, request: Request, job: Job, stream: str, offset: int) -> LogPart:
    """Read a part of a job's output from wherever it is now; of a job that has ended, a negative `offset` counts from the end.

    Raises HttpError 404 or 503 if it is not available.
    """
    if job.status is Status.CLEANED:
        raise HttpError(404, f"the files of job {job.id} were cleaned")
    link = server.links.get(job.client or "")
    if job.status in ENDED:
        return stored_log(server, job, stream, offset)
    if job.dest_id is None or link is None:
        return LogPart(b"", offset)  # it is not at a client yet
    try:
        with calling(server, request, link) as unwanted:
            return LogPart(*link.logs(job, stream, offset, unwanted))
    except Gone as error:
        raise HttpError(404, str(error)) from error
    except (NothingSent, NoAnswer) as error:
        raise HttpError(503, f"{link.name} {error}", Retry_After=str(COME_AGAIN_S)) from error


@route(
    "GET",
    "/jobs/<job_id>/logs",
    "server",
    who="user portal operator",
    slow=True,
    takes=(ID, STREAM, OFFSET, FOLLOW),
    gives={200: LOG_PART, 400: BAD, 404: NO_OUTPUT, 503: CLIENT_AWAY},
)
def job_logs(server: Server, request: Request, job_id: int, stream: str, offset: int, follow: str) -> Answer:
    """Read a job's output, live while it runs. With follow=1, read on until it has ended."""
    job = known_job(server, request, job_id)
    headers = {"Content-Type": TEXT_TYPE, "X-Job-Status": job.status.value}
    if follow == "1" and request.method == "GET":
        place = contextlib.ExitStack()
        if not place.enter_context(server.waiters.place()):
            raise HttpError(503, "too many callers wait here: try again", Retry_After=str(COME_AGAIN_S))
        headers.update(LIVE_HEADERS)
        if EVENT_TYPE not in request.header("Accept"):
            parts = followed_log(server, request, job, stream, offset, place)
            return Answer(LiveBody((part.text for part in parts), place), 200, headers)
        parts = followed_log(server, request, job, stream, request.resumed_at(offset), place)
        return Answer(LiveBody(log_events(server, job, parts), place), 200, {**headers, "Content-Type": EVENT_TYPE})
    part = job_log(server, request, job, stream, offset)
    return Answer(part.text, 200, {**headers, "X-Next-Offset": str(part.following)})


def followed_log(server: Server, request: Request, job: Job, stream: str, offset: int, place: contextlib.ExitStack) -> Iterator[LogPart]:
    """Yield a job's output until it has ended, and empty parts in pauses. A line announces a new attempt. Frees `place` at the end.

    Raises CutOff if the caller has left or the server stops: the output is complete only if the parts end without that.
    """
    pause_s, attempt = 0.1, job.attempt
    with place:
        while not server.stopping.wait(pause_s) and not request.left():
            current = server.store.get(job.id)
            if current is None:
                return
            if current.attempt != attempt:
                attempt, offset = current.attempt, 0
                yield LogPart(f"\n[joborch: attempt {attempt}]\n".encode(), 0)
            part = LogPart(b"", offset)
            with contextlib.suppress(HttpError):  # not available now, or never: wait for the job's end
                part = job_log(server, request, current, stream, offset)
            pause_s = 0.0 if part.text else min(1.0, max(0.1, pause_s * 1.5))
            offset = part.following
            yield part
            if current.status in OVER and not part.text:
                return
        raise CutOff


def log_events(server: Server, job: Job, parts: Iterator[LogPart]) -> Iterator[bytes]:
    """Yield output as server-sent events: the text in `data`, the offset after it as id; the last event is `end` with the status.

    Unlike plain text, events can have comments that keep a gateway from giving up. Carriage returns become line feeds, and
    bytes that are not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield b": output of the job\n\n"  # at once, because it sends the headers
    said_at = server.clock.monotonic()
    for part in parts:
        text = decoder.decode(part.text)
        if text:
            lines = "".join(f"data: {line}\n" for line in re.split("\r\n|\r|\n", text))
            yield f"id: {part.following - len(decoder.getstate()[0])}\n{lines}\n".encode()
        elif server.clock.monotonic() - said_at >= COMMENT_EVERY_S:
            yield b": quiet\n\n"
        else:
            yield b""
            continue
        said_at = server.clock.monotonic()
    ended = server.store.get(job.id)
    if ended is not None and ended.status in OVER:
        yield f"event: end\ndata: {ended.status}\n\n".encode()


# == 17. Results ==  A payload's files are packed once for all callers that request them.

QUICK_PACK = ResultLimits(16 * MIB, 1000)  # results up to this size do not wait behind larger ones


def pack_payload(client: Client, job: Job, wanted: Callable[[], bool] = lambda: True, limits: ResultLimits | None = None) -> Archive:
    """Pack a payload's work folder in its present state, with its output streams below `.joborch/`, within the limits.

    Raises OSError if the archive cannot be written, and GivenUp if it is no longer `wanted`.
    """

    def fill(packer: ZipPacker) -> None:
        packer.wanted, packer.limits = wanted, limits or client.limits
        packer.places, packer.mends = [work_path(client, job)], job.status in ENDED
        try:
            with opened_folder(client.folder(job)) as folder:
                fill_archive(client, job, packer, folder)
        except OSError as error:  # the script removed its folder, or replaced it by a link
            packer.leave_out(f"the payload's folder: {os.strerror(error.errno or 0)}")

    # With a fixed time for entries that have none, a payload always gives the same bytes, so a transfer can resume.
    return packed(client.data.spool, job.ended_at, fill)


def fill_archive(client: Client, job: Job, packer: ZipPacker, folder: int) -> None:
    """Pack a payload's files. Output streams come first, so they can be found without reading the rest."""
    work = open_work(folder)
    try:
        if work is not None:
            packer.choose_own(work)
        for stream in OUTPUT_STREAMS:
            try:
                kept, chunks = kept_output(folder, stream, client.config.log_limit_bytes)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    packer.leave_out(f"{packer.own}/{stream}: the script replaced it by something else")
                continue
            packer.add_chunks(stream, chunks, STREAM_COMMENT.format(kept.size, kept.limit), kept.size)
        if work is None:
            packer.leave_out("the work folder: the script removed it or replaced it by something else")
        else:
            whole = job.return_inputs or job.status is not Status.COMPLETED  # the inputs of a failed job help to explain the failure
            packer.add_open_folder(work, {} if whole else unchanged_inputs(folder))
    finally:
        if work is not None:
            os.close(work)


def open_work(folder: int) -> int | None:
    """Return a descriptor of a payload's work folder, or None if the script removed or replaced it."""
    try:
        give_rights(folder, "work")
        return open_folder(folder, "work", flags=os.O_RDONLY)
    except OSError:
        return None


class Measuring:
    """Measures a large work folder of an ended payload in a thread. `outcome` is kept until `too_much` is no longer None."""

    def __init__(self, client: Client, job: Job, outcome: Outcome) -> None:
        self.outcome, self.too_much, self.left_out = outcome, cast("str | None", None), 0
        threading.Thread(target=self.measure, args=(client, job), name=f"measure-{job.id}", daemon=True).start()

    def measure(self, client: Client, job: Job) -> None:
        found: str | None = ""
        try:
            with client.measurers:
                found, self.left_out = excess(client, job, client.limits)
        finally:
            self.too_much = found or ""
            client.wake("run")


def excess(client: Client, job: Job, limits: ResultLimits) -> tuple[str | None, int]:
    """Return by what a finished payload exceeds a limit (empty: by nothing), and how many entries its archive cannot hold.

    The text is None if the payload exceeds `limits`, but not the client's limits.
    """
    try:
        with opened_folder(client.data.job(job.mark)) as folder:
            give_rights(folder, "work")
            with opened_folder(folder, "work") as work:
                losses = Losses([path_of(work), work_path(client, job)])
                left = measure(work, limits, {} if job.return_inputs else unchanged_inputs(folder), losses)
    except OSError:
        return "", 0  # the folder is gone
    return client.limits.broken_by(*left) or (None if limits.broken_by(*left) else ""), losses.count


def work_path(client: Client, job: Job) -> bytes:
    """Return the path by which a payload's script may know its work folder."""
    return os.fsencode(os.path.abspath(client.folder(job) / "work"))


QUICK_MEASURE_FILES = 2000  # work folders with up to this many files are measured directly, larger ones in a thread


def too_much_left(client: Client, job: Job, outcome: Outcome, patient: bool) -> tuple[str | None, int]:
    """Like `excess`, but if not `patient`, the text is None while measuring takes longer than a tick may."""
    measuring = client.payloads.known(job.id).measuring
    if measuring and not patient:
        return measuring.too_much, measuring.left_out
    quick = client.limits._replace(files=min(QUICK_MEASURE_FILES, client.limits.files))
    found = excess(client, job, client.limits if patient else quick)
    if found[0] is None:
        client.payloads[job.id].measuring = Measuring(client, job, outcome)
    return found


PACKED_KEPT_S = 600.0  # how long a packed result is kept for repeated requests


class Packing:
    """The archive of a payload, made by one thread for all callers that request it meanwhile.

    The archive of an ended payload is kept for later callers. Packing stops when no caller waits any more.
    """

    def __init__(self, client: Client, job: Job, quick: bool) -> None:
        self.done, self.archive, self.error = threading.Event(), cast("Archive | None", None), cast("Exception | None", None)
        self.client, self.job, self.quick = client, job, quick
        self.passing = job.status not in ENDED  # a snapshot of a running payload, not to be reused
        self.readers, self.until = 0, 0.0  # callers that wait now; until when (monotonic) a caller that was sent away may return
        self.used_at = client.clock.monotonic()

    def start(self) -> None:
        threading.Thread(target=self.pack, name=f"pack-{self.job.id}", daemon=True).start()

    def wanted(self) -> bool:
        """Tell whether a caller waits for it, or may return for it."""
        return (self.readers > 0 or time.monotonic() < self.until) and not self.client.stopping.is_set()

    def pack(self) -> None:
        try:
            if self.quick:
                self.archive = self.pack_in_turn(self.client.quick_packers, QUICK_PACK)
            if self.archive is None or self.archive.cut:  # it has grown since it was measured
                self.quick = False
                self.archive = self.pack_in_turn(self.client.packers, self.client.limits)
        except (OSError, GivenUp) as error:
            self.error = error
        finally:
            self.done.set()
        while self.wanted() and (self.passing or self.error):
            self.client.stopping.wait(0.2)
        forget_packings(self.client)

    def pack_in_turn(self, place: threading.Semaphore, limits: ResultLimits) -> Archive:
        while not place.acquire(timeout=0.2):
            if not self.wanted():
                raise GivenUp("no caller waits for the archive any more")
        try:
            size, files = min(limits.size_bytes, self.client.limits.size_bytes), min(limits.files, self.client.limits.files)
            return pack_payload(self.client, self.job, self.wanted, ResultLimits(size, files))
        finally:
            place.release()

    def outdated(self) -> bool:
        """Tell whether it can be dropped: no caller waits for it, and none is expected."""
        if not self.done.is_set() or self.readers:
            return False
        if self.passing or self.archive is None or not self.archive.whole:
            return not self.wanted()
        return self.used_at < self.client.clock.monotonic() - PACKED_KEPT_S

    def opened(self) -> Archive:
        """Return the archive with a separate file position."""
        if self.error is not None or self.archive is None:
            raise self.error or OSError(errno.EIO, "the result could not be packed")
        return Archive(cast(Spool, self.archive.file).again(), self.archive.size, self.archive.sha256)

    def join(self, patience_s: float, left: Callable[[], bool]) -> None:
        """Wait until it is packed or the caller has left, at most `patience_s`. Few may wait for large ones: each holds a thread."""
        with self.client.pack_places.place() as free:
            deadline = time.monotonic() + (patience_s if free or self.quick else 0.0)
            while not self.done.wait(min(0.1, max(0.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline or left():
                    return


def forget_packings(client: Client) -> None:
    """Drop packed results that no caller has requested for a while."""
    with client.lock:
        for key, packing in list(client.packings.items()):
            if packing.outdated():
                del client.packings[key]
                if packing.archive is not None:
                    packing.archive.file.close()


def drop_packings(client: Client, job_ids: Iterable[int]) -> None:
    """Drop packed results that the server has stored."""
    for job_id in job_ids:
        packing = client.packings.get((job_id, True))
        if packing is not None:
            packing.passing, packing.until = True, 0.0
    forget_packings(client)


def take_packing(client: Client, job: Job) -> Packing:
    """Return the packing of a payload and count the caller as a reader. Raises HttpError 503 if too many wait to be packed."""
    forget_packings(client)
    key = (job.id, job.status in ENDED)
    quick = key in client.packings or is_quick(client, job)
    with client.lock:
        packing = client.packings.get(key)
        if packing is None:
            ahead = [other for other in client.packings.values() if not other.done.is_set() and other.quick == quick]
            if len(ahead) >= PACK_QUEUE:
                raise not_packed("many results wait to be packed")
            packing = client.packings[key] = Packing(client, job, quick)
            packing.readers += 1
            packing.start()
        else:
            packing.readers += 1
        packing.used_at = client.clock.monotonic()
        return packing


def is_quick(client: Client, job: Job) -> bool:
    """Tell whether a payload is small enough to be packed at once."""
    try:
        with opened_folder(client.folder(job), "work") as work:
            return not QUICK_PACK.broken_by(*measure(work, QUICK_PACK, {}))
    except OSError:
        return True  # there are no files


def not_packed(why: str) -> HttpError:
    """Return the error for a caller that comes before the archive is ready."""
    return HttpError(503, f"{why}: try again", Retry_After="5", **{PACKING_HEADER: "1"})


PACK_LEASE_S, PACK_LIVE_LEASE_S = 30.0, 5.0  # how long packing continues until a caller asks again: a result; a folder in use


def packed_result(client: Client, job: Job, patience_s: float, left: Callable[[], bool]) -> Archive:
    """Return the archive of a payload; `left` tells whether the caller has closed the connection.

    Raises HttpError 503 if it is not packed within `patience_s`.
    """
    packing, told = take_packing(client, job), False
    try:
        packing.join(patience_s, left)
        if not packing.done.is_set() or isinstance(packing.error, GivenUp):
            told = not left()
            raise not_packed("the result is being packed")
        return packing.opened()
    finally:
        with client.lock:
            # A server whose call broke will return for an ended payload. Set the lease before the reader goes, or packing would stop.
            if told or not (packing.passing or packing.done.is_set()):
                packing.until = time.monotonic() + (PACK_LIVE_LEASE_S if packing.passing else PACK_LEASE_S)
            packing.readers -= 1
            if not told and packing.done.is_set() and not packing.readers:
                packing.until = 0.0
        if packing.done.is_set():
            forget_packings(client)


def inline_archive(client: Client, job: Job) -> dict[str, str]:
    """Return a small result in base64 with its SHA-256, to save the server a call; empty if it is not small."""
    try:
        with opened_folder(client.folder(job)) as folder:
            if not is_small(folder):
                return {}
        archive = pack_payload(client, job, limits=ResultLimits(INLINE_LIMIT_BYTES, INLINE_FILES))
        with contextlib.closing(archive.file):
            if archive.cut:  # it has grown since
                return {}
            return {"archive": base64.b64encode(archive.file.read()).decode(), "sha256": archive.sha256}
    except OSError:
        return {}  # the server fetches it and gets the error


def is_small(folder: int) -> bool:
    """Tell whether a payload left only a few small files. Raises OSError if its folder cannot be read."""
    size = sum(os.stat(stream, dir_fd=folder, follow_symlinks=False).st_size for stream in OUTPUT_STREAMS)
    with opened_folder(folder, "work", flags=os.O_RDONLY) as work, os.scandir(work) as entries:
        for number, entry in enumerate(entries):
            if number >= INLINE_FILES or not entry.is_file(follow_symlinks=False):
                return False
            size += entry.stat(follow_symlinks=False).st_size
    return size <= INLINE_LIMIT_BYTES


# == 18. Cleaning ==  Files of jobs are deleted only here. Files that cannot be removed do not delay others.


def due_for_cleaning(node: Node, now: float) -> list[Job]:
    """Return some ended jobs whose files are due at `now` (steady), without those whose removal failed a short time ago."""
    age, is_client = node.config.max_age_s, node.config.mode == "client"
    kept_s = min(age, node.config.keep_fetched_s) if is_client else age
    moments = {
        "before": now - kept_s,
        "fetched_before": now - age,
        "unfetched_before": now - (4 * age if is_client else age),
        "confirmed_before": node.clock.wall() - kept_s,
    }
    jobs = node.store.cleanable(**moments, limit=500 + len(node.unremovable))  # the query returns unremovable ones first
    return [job for job in jobs if job.id not in node.unremovable or not node.unremovable[job.id].waits()]


def remove_files(node: Node, job: Job) -> None:
    """Remove all files of a job that is over. Raises OSError if some remain."""
    if node.config.mode == "client":
        remove_scratch(node.folder(job))
    remove_tree(node.folder(job))
    crash_point("clean.folder")
    remove_tree(node.data.result(job.mark))
    remove_tree(node.data.index(job.mark))  # last: see `make_index`


def clean_tick(node: Node) -> bool:
    """Clean jobs that ended long enough ago: files first, then the row. Also do other periodic work."""
    node.store.write(node.store.beat, durable=False)
    node.refused.report()
    node.program.restart_needed()  # logs it
    node.program.keep_copy()
    node.data.keep_reserve()
    now, more = node.store.steady(), False
    for job in due_for_cleaning(node, now):
        try:
            remove_files(node, job)
            crash_point("clean.files")
        except OSError as error:
            put_off(node, job, error)
            continue
        node.unremovable.pop(job.id, None)
        reason = Reason.CLEANED.format(duration=format_duration(max(0.0, now - job.moved_at)))
        more = node.store.move(job, Status.CLEANED, reason, row_reason=job.reason) or more
        crash_point("clean.stored")
    old = [row["id"] for row in node.store.read(statements.CLEANED_BEFORE, before=now - node.config.keep_rows_s)]
    if old:
        node.store.forget(old)
        crash_point("clean.forgotten")
    return more or bool(old)


def sweep(node: Node) -> None:
    """In the background, check the database and remove files without a row, which a crash left."""
    node.store.look_for_damage()
    for folder in (node.data.jobs, node.data.results):
        for path in folder.iterdir():
            if node.stopping.is_set():
                return
            if re.sub(r"[.]zip$", "", path.name) in node.data.receiving:
                continue
            job = row_of(node, path)  # after that check: an upload that has just finished has a row
            given_up = job is not None and folder == node.data.results and path.stem != job.mark
            if job is None or job.status is Status.CLEANED or given_up:
                try:
                    remove_tree(path)
                    log.info("%s belongs to no %s: removed", path.name, node.store.noun)
                except OSError as error:  # such as files of a container's user
                    log.warning("%s belongs to no %s and cannot be removed: %s", path.name, node.store.noun, error)
            elif node.config.mode == "client" and job.status in ENDED:
                remove_scratch(path)


def row_of(node: Node, path: Path) -> Job | None:
    """Return the job whose files are at `path`: `UUID`, `UUID.ATTEMPT.zip` on a server, `UUID.ATTEMPT` on a client."""
    job_uuid, _, rest = path.name.partition(".")
    if node.config.mode == "client" and rest.isdigit():
        return node.store.job(statements.JOB_BY_MARK, uuid=job_uuid, attempt=int(rest))
    return node.store.job(statements.JOB_BY_UUID, uuid=job_uuid)


@dataclass
class Unremovable(Backoff):
    """Files of an ended job that could not be removed: where they are, and their size."""

    folder: Path = Path()
    size_bytes: int = 0


UNREMOVABLE_FIRST_S, UNREMOVABLE_LAST_S = 60.0, 86400.0  # pauses from the third try on, each four times the one before


def put_off(node: Node, job: Job, error: OSError) -> None:
    """Try to remove a job's files again later, with growing pauses. The first failure is logged, later ones once a day."""
    folder = node.folder(job)
    known = node.unremovable.setdefault(job.id, Unremovable(node.clock, folder=folder))
    pause_s = min(UNREMOVABLE_FIRST_S * 4.0 ** min(known.failures - 1, 10), UNREMOVABLE_LAST_S) if known.failures else 0.0
    known.size_bytes = bytes_below(folder)
    known.failed(error, pause_s)
    if known.failures == 1 or pause_s == UNREMOVABLE_LAST_S:
        log.warning(
            "the files of %s %d cannot be removed: %s; remove %s as their owner or as root; other files are still removed",
            node.store.noun, job.id, error, folder,
        )  # fmt: skip


def unremovable_json(node: Node) -> dict[str, Any] | None:
    """Return how many files cannot be removed, with the remedy; None if there are none."""
    found = list(node.unremovable.values())
    if not found:
        return None
    size = sum(each.size_bytes for each in found)
    what = f"{node.store.noun}s" if len(found) > 1 else node.store.noun
    text = f"files of {len(found):,} ended {what} ({size_text(size)}) cannot be removed, as in {found[0].folder}"
    remedy = "they belong to another user, perhaps of a container: remove them as that user or as root"
    return {"count": len(found), "bytes": size, "message": f"{text}: {remedy}"}


def discard_payloads(data: DataFolder) -> None:
    """Remove the payloads of an earlier database, with their TMPDIR."""
    for folder in data.jobs.iterdir():
        try:
            remove_scratch(folder)
            remove_tree(folder)
        except OSError as error:
            log.warning("%s belongs to an earlier database and cannot be removed: %s", folder, error)


def scratch_of(folder: Path) -> list[str]:
    """Return where an attempt's TMPDIR may be on this machine: where `tmp` points, which its script can change, and in each base."""
    name = scratch_name(folder.name)
    places = [f"{base}/{name}" for base in scratch_bases(os.environ)]
    with contextlib.suppress(OSError):  # it is a folder, or gone
        place = os.readlink(folder / "tmp")
        if place.startswith("/") and place.rpartition("/")[2] == name:
            places.insert(0, place)
    return list(dict.fromkeys(places))


def remove_scratch(folder: Path, at_once: bool = True) -> bool:
    """Remove an attempt's TMPDIR if it is on this machine. If not `at_once`, keep it if it is not empty, and return False."""
    for place in scratch_of(folder):
        try:
            os.rmdir(place)
            continue
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and not at_once:
                return False
        try:
            if is_own(place, folder):
                remove_tree(Path(place))
        except OSError as error:
            log.warning("%s, the TMPDIR of %s, cannot be removed: %s", place, folder.name, error)
    return True


def drop_scratch(client: Client, job: Job) -> None:
    """Remove the TMPDIR of a payload that is over, in the background if it is not empty, because it may be large."""
    folder = client.data.job(job.mark)
    if not remove_scratch(folder, at_once=False):
        threading.Thread(target=remove_scratch, args=(folder,), name=f"scratch-{job.id}", daemon=True).start()


# == 19. Restore ==  A prepared restore is completed at the next start, and no id is assigned twice.


def folder_of(path: str) -> str:
    """Return the real path of the folder that a file is in."""
    return os.path.realpath(os.path.dirname(path))


def decided_restore(db_path: str) -> Path | None:
    """Return a restored database that is complete but not yet in place, or None."""
    folder, start = Path(folder_of(db_path)), f"{os.path.basename(db_path)}.restored-"
    return next((path for path in folder.iterdir() if path.name.startswith(start)), None) if folder.is_dir() else None


def finish_restore(db_path: str, data: DataFolder) -> tuple[Path | None, Path | None]:
    """Put a restored database in place and remove incomplete ones. Return the replaced database and the folder of files without a job.

    Both are None if there was nothing to do. Each step may be repeated after a crash.
    """
    for suffix in ("", "-wal", "-shm", "-journal"):
        discard(Path(f"{db_path}.restoring{suffix}"))
    ready = decided_restore(db_path)
    if ready is None:
        return None, None
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(ready))}?immutable=1", uri=True)) as db:
        known = {row[0] for row in db.execute(statements.ALL_UUIDS)}
    unclaimed = data.set_aside(lambda name: name.partition(".")[0] in known)
    crash_point("restore.files")
    kept = Path(f"{db_path}.replaced-{ready.name.rpartition('.restored-')[2]}")
    if os.path.exists(db_path) and not kept.exists():
        os.link(db_path, kept)
    crash_point("restore.kept")
    for suffix in ("-wal", "-shm"):  # of the old database
        with contextlib.suppress(FileNotFoundError):
            os.rename(db_path + suffix, f"{kept}{suffix}")
    fsync_path(folder_of(db_path))
    crash_point("restore.moved")
    os.replace(ready, db_path)
    fsync_path(folder_of(db_path))
    return kept if kept.exists() else None, unclaimed


# == 20. Commands ==  The commands. Each has an example, and its errors name the mistake and the remedy.

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def bound_memory() -> None:
    """Let all threads share two arenas of glibc's malloc(3): by default, each of sixty threads keeps its peak size."""
    m_arena_max = -8
    with contextlib.suppress(AttributeError):  # not in every C library
        libc().mallopt(m_arena_max, 2)


def hide_from_payloads() -> None:
    """Make this process undumpable (prctl(2)): payloads of the same user cannot read its memory, and no core file contains a token."""
    pr_set_dumpable = 4
    if libc().prctl(pr_set_dumpable, 0, 0, 0, 0) != 0:
        log.warning("this process cannot be made undumpable: payloads of the same user may read its token")


def close_at_exec() -> None:
    """Mark all descriptors above stderr close-on-exec: scripts do not get files that our parent left open."""
    close_range, cloexec, last = 436, 4, 2**32 - 1  # close_range(2), of Linux 5.11
    if libc().syscall(close_range, 3, ctypes.c_uint(last), cloexec) != 0:
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2:
                with contextlib.suppress(OSError):  # the descriptor of the listing itself
                    os.set_inheritable(descriptor, False)


def ensure_client_token(config: Config) -> Config:
    """Return the configuration with a token: the one that is set, or one that the first start creates in a file (mode 0600)."""
    if config.join:
        check_join(config)
    if config.token or config.allow_anonymous:
        return config
    path = token_place(config)
    if path is None:
        raise ConfigError(f"JOBORCH_TOKEN is not set and this user has no home folder to store one in: {token_remedy(config)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_mode & 0o077 and path.stat().st_uid == os.geteuid():
            path.chmod(0o600)  # weak_setups has warned about it
        if not path.exists() or not read_small_file(path).strip():
            write_atomic(path, (secrets.token_urlsafe(32) + "\n").encode(), 0o600)
            log.info("created a token for callers in %s", path)
        return dataclasses.replace(config, token=read_small_file(path).strip())
    except (OSError, ValueError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise ConfigError(f"the token file {path} cannot be used ({why}): {token_remedy(config)}") from error


def open_node(config: Config) -> Node:
    """Open the folders, lock and database of one process, and return its node. Raises ConfigError if one of them cannot be used."""
    check_certificates(config.ca_file)
    data = DataFolder(config.data_path)
    data.open()
    crash_point("start.locked")
    try:
        os.makedirs(os.path.dirname(config.db_path) or ".", exist_ok=True)
        data.lock_database(config.db_path)
    except OSError as error:
        raise ConfigError(f"DB_PATH is {config.db_path!r}: {os.strerror(error.errno or 0)}") from error
    if config.mode == "server":
        if decided_restore(config.db_path):
            log.warning("a restore of the database was interrupted and is completed now; the replaced database is kept next to it")
        finish_restore(config.db_path, data)
    store = Store(config.db_path, config.mode)
    data.keep_reserve()
    store.make_room = data.drop_reserve
    crash_point("start.opened")
    if config.mode == "client":
        client = Client(config, store, data)
        check_executor(client)
        recover_payloads(client)
        return client
    unclaimed = data.set_aside(lambda name: False) if store.is_new else None
    if unclaimed:
        log.warning("the database is new, but the data folder has files of jobs: they are kept in %s", unclaimed)
    server = Server(config, store, data)
    server.loops = make_server_loops(server)
    for job in store.jobs(statements.CUT_OFF_SENDING):  # the client is known, but not whether the job arrived there
        store.move(job, Status.UNKNOWN, Reason.SERVER_RESTARTED.format(client=job.client))
        crash_point("start.asked")
    return server


@contextlib.contextmanager
def telling_errors(config: Config) -> Iterator[None]:
    """Raise ConfigError in place of OSError, as when the disk is full."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"DATA_PATH is {config.data_path!r}: {os.strerror(error.errno or 0)}; nothing there is lost") from error


OTHER_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # reload, drain, none: by default each would kill the process


def import_what_will_be_needed(config: Config) -> None:
    """Import everything before listening: a newer release may replace these files while the process runs."""
    for name in ["difflib", "multipart", "uuid", *(["tarfile", "requests"] if config.executor == "dirac" else [])]:
        importlib.import_module(name)
    if config.mode == "server":
        load_plugin("uploads")
    if config.compat == "2.2" or any(service.peer == "2.2" for service in config.services.values()):
        load_plugin("compat22")


def put_off_signals() -> None:
    """Keep signals for the process that starts until `take_signals`; joborch.pyz does it even earlier."""
    signal.pthread_sigmask(signal.SIG_BLOCK, OTHER_SIGNALS)


def take_signals() -> int:
    """Return a pipe that gets the number of each signal from now on, and of those that were put off."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, *OTHER_SIGNALS):
        signal.signal(number, lambda *_: None)  # the pipe passes the number to listen_for_signals
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OTHER_SIGNALS)
    return wake_read


def serve(config: Config) -> int:
    """Run a server or client until INT or TERM. A client's payloads keep running, and the next start recovers them."""
    hide_from_payloads()
    close_at_exec()
    set_up_logging(config)
    bound_memory()
    if Program.archive and Program.archive[2]:
        log.info("starts are slow because joborch.pyz has no copy in the cache folder: %s", Program.archive[2])
    warn_of_weak_setups(config)
    if config.mode == "client":
        log.debug("variables that scripts do not get: %s", ", ".join(left_out(os.environ, config.pass_env)) or "none")
        config = ensure_client_token(config)
    for name in token_names(config):  # programs started later do not need them
        os.environ.pop(name, None)
    raise_file_limit()
    wake_read = take_signals()
    import_what_will_be_needed(config)
    with telling_errors(config):
        node = open_node(config)
    http_server = load_plugin("joining")(node) if config.join else make_http_server(node, make_app(node))
    node.start()
    threading.Thread(target=http_server.run, name="http", daemon=True).start()
    threading.Thread(target=sweep, args=(node,), name="sweep", daemon=True).start()
    greet(node, http_server)
    if isinstance(node, Client):
        threading.Thread(target=warn_of_problems, args=(node,), name="examine", daemon=True).start()
    with contextlib.suppress(AttributeError):
        libc().malloc_trim(0)  # compiling this module leaves about 20 MB of free memory behind
    try:
        listen_for_signals(node, wake_read)
    finally:
        node.stop()
        node.store.close()
        remove_socket_file(http_server)
        for number in OTHER_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # Python ends in a moment; until then one of them would kill it
    log.info("%s stopped", config.mode)
    return EXIT_DONE


def listening_at(http_server: Any) -> list[str]:
    """Return the URLs of a server, and the path of its Unix socket."""
    places = []
    for listener in list(http_server._map.values()):
        if hasattr(listener, "effective_port"):
            host, port = listener.effective_host, listener.effective_port
            places.append(str(port) if listener.family == socket.AF_UNIX else f"http://{url_host(host)}:{port}")
    return places


def greet(node: Node, http_server: Any) -> None:
    """Log where the process listens, and its services or slots."""
    config = node.config
    where = f"calls {config.join}" if config.join else "listens on " + " and ".join(listening_at(http_server))
    log.info("joborch %s %s %s (data in %s)", __version__, config.mode, where, config.data_path)
    tell_service_manager("READY=1")
    if isinstance(node, Server):
        if not any(name.startswith("SERVICE_") for name in config.sources):
            log.info("no SERVICE_* is set: a client at http://127.0.0.1:9000 serves the service example")
        for service in node.services.values():
            log.info("service %s: %s", service.name, service.text)
    else:
        where = " on this login node" if is_on_login_node(config) else ""
        log.info("runs up to %d payloads at once with the %s executor%s", config.slots, config.executor, where)
        for text in forgotten_executor(config):
            log.warning("%s", text)
        for line in () if config.join else lines_for_server(config):
            log.info("for the settings of its server: %s", line)


def warn_of_weak_setups(config: Config) -> None:
    """Log the configuration's warnings and whatever lets other users in. Raises ConfigError if it is too dangerous to start."""
    for warning in config.warnings:
        log.warning("%s", warning)
    for finding in weak_setups(config):
        if finding.good is False:
            raise ConfigError(finding.text)
        log.warning("%s", finding.text)


def warn_of_problems(client: Client) -> None:
    """Log what is wrong with a client's batch system before the first job hits it, or how far its payloads are isolated."""
    if client.local and client.local.sandbox:
        log.info("%s", client.local.sandbox.summary())
    for finding in client.executor.examine() if client.executor.is_batch else ():
        if finding.good is not True:
            log.warning("%s", finding.text)


def listen_for_signals(node: Node, wake_read: int) -> None:
    """Wait for INT or TERM. CHLD wakes the runner; a plug-in acts on OTHER_SIGNALS."""
    while True:
        select.select([wake_read], [], [])
        numbers = os.read(wake_read, 512)
        if signal.SIGINT in numbers or signal.SIGTERM in numbers:
            return
        for number in set(numbers).intersection(OTHER_SIGNALS):
            node.plugins["drain" if number == signal.SIGUSR1 else "reload"].signalled(number)
        if not (isinstance(node, Client) and node.local and node.local.is_end_awaited()):
            node.wake("run")


def bundled_packages() -> dict[str, str]:
    """Return the versions of the packages in use: those in joborch.pyz, or else the installed ones."""
    try:
        return dict(json.loads(own_file("bundled.json")))
    except OSError:
        pass  # it runs from a checkout, or was installed with pip
    from importlib import metadata

    found = {}
    for name in ("bottle", "waitress", "requests", "platformdirs", "multipart"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def command_version(as_json: bool) -> int:
    """Print the versions of joborch and everything it uses."""
    import platform

    said = {"joborch": __version__, "python": platform.python_version(), "sqlite": sqlite3.sqlite_version, **bundled_packages()}
    print(json.dumps(said) if as_json else "\n".join(f"{name} {version}" for name, version in said.items()))
    return EXIT_DONE


# -- the command line --


BACKUP_FILE: tuple[str, dict[str, Any]] = ("file", {"metavar": "FILE", "help": "the backup"})
KEEP: dict[str, Any] = {"metavar": "N", "type": int, "help": "FILE is a folder: add a backup there, and keep the newest N"}
DRY_RUN: dict[str, Any] = {"action": "store_true", "help": "list the jobs that came or moved since the backup, and change nothing"}
DRAIN: dict[str, Any] = {"action": "store_true", "help": "accept no more payloads, and stop when all results are fetched"}
CHECK: dict[str, Any] = {"metavar": "FILE", "help": "say what this file of settings would change in the running process"}
KEEP_RUNNING: dict[str, Any] = {"action": "store_true", "help": "leave both running"}
CLOUD_DEMO: dict[str, Any] = {"action": "store_true", "help": "show a pool of clients that grows and shrinks, on this machine"}
OWN_FLAGS = {  # of commands that run here, besides those of settings
    "backup": [BACKUP_FILE, ("--keep", KEEP)], "restore": [BACKUP_FILE, ("--dry-run", DRY_RUN)], "client": [("--drain", DRAIN)],
    "config": [("--check", CHECK)], "demo": [("--keep", KEEP_RUNNING), ("--cloud", CLOUD_DEMO)],
}  # fmt: skip


def make_parser(argv: Sequence[str] | None = None) -> Any:
    """Return the parser of the command line, with a flag for each setting of the commands that run here.

    Commands that `argv` lacks get no flags: adding them all would slow down every start.
    """
    parser, words = load_plugin("commands").make_parser(__version__)
    for name, word in words.items():
        if argv is not None and name not in argv:
            continue
        for flag, how in OWN_FLAGS.get(name, ()):
            word.add_argument(flag, **how)
        if name in ("server", "client", "config", "doctor", "backup", "restore"):
            add_setting_flags(word, name)
        if name in ("config", "doctor"):
            word.add_argument("mode", nargs="?", choices=("server", "client"), default="server", help="which settings (default: server)")
        if name in ("config", "doctor", "version"):
            word.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_setting_flags(word: argparse.ArgumentParser, mode: str) -> None:
    """Add the flags of a command's settings, from SETTINGS."""
    word.add_argument("--env-file", metavar="FILE", help="read NAME=VALUE lines from FILE; variables of the environment take precedence")
    for setting in SETTINGS:
        storage = mode in ("backup", "restore") and setting.field in ("data_path", "db_path")
        if storage or mode in ("config", "doctor") or mode in setting.modes.split():
            default = "" if not setting.default or "(default" in setting.help else f" (default: {setting.default})"
            text = f"{setting.help}{default} [{setting.name}]".replace("%", "%%")
            flag: Any = word.add_argument(setting.flag, dest=setting.field, metavar="VALUE", help=text)
            flag.example = "1" if setting.read is read_switch else ""  # for the error if the value is missing


def run_command(arguments: argparse.Namespace) -> int:
    """Run a command; return the exit status."""
    if arguments.command == "version":
        return command_version(arguments.json)
    if arguments.command == "demo":
        return int(load_plugin("admin").command_demo(arguments.keep, arguments.cloud))
    mode = arguments.mode if arguments.command in ("config", "doctor") else "client" if arguments.command == "client" else "server"
    config = load_config(mode, vars(arguments), os.environ)
    if arguments.command in ("server", "client"):
        return serve(config)
    admin = load_plugin("admin")
    if arguments.command == "config" and arguments.check:
        return int(load_plugin("joborch_plugins.reload").command_check(config, arguments.check, arguments.json))
    if arguments.command in ("backup", "restore"):
        file, is_backup = arguments.file, arguments.command == "backup"
        return int(
            admin.command_backup(config, file, arguments.keep) if is_backup else admin.command_restore(config, file, arguments.dry_run)
        )
    work = admin.command_doctor if arguments.command == "doctor" else admin.command_config
    return int(work(config, arguments.json))


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line. Exits with one line on stderr if it is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(argv)
    arguments: argparse.Namespace
    arguments, rest = parser.parse_known_args(argv)
    if not arguments.command:
        if rest:
            parser.unknown(rest[0], ("--version", "--help"))
    elif rest:
        (words,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        word: Any = words.choices[arguments.command]
        word.unknown(rest[0], word._option_string_actions)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see `joborch --help`."""
    if argv is None:  # as a program; before all else, because the environment may contain a token
        hide_from_payloads()
    commands = load_plugin("commands")
    words = sys.argv[1:] if argv is None else argv
    if argv is None:
        commands.use_utf8()
        if words[:1] in (["server"], ["client"]):
            put_off_signals()
    if commands.takes(words):
        return int(commands.main(words))
    try:
        try:
            return run_command(parse_command(argv))
        finally:
            sys.stdout.flush()  # here, where an error is still caught
    except BrokenPipeError:  # as in `joborch config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ConfigError as error:
        print(f"joborch: {error}", file=sys.stderr)
        return EXIT_USAGE
    except JoborchError as error:
        print(f"joborch: {error}", file=sys.stderr)
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        remedy = "run joborch.pyz, which has it, or pip install -r requirements.lock"
        print(f"joborch: the package {error.name} is missing: {remedy}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
