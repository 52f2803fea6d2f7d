"""The log of a server or client: lines for people, or one JSON object each; and notices to systemd.

1. Log
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from typing import Any

from joborch_base.settings import Config
from joborch_base.vocabulary import log, rfc3339

# == 1. Log ==  Everything goes to standard error.


class JsonLines(logging.Formatter):
    """Formats records as one JSON object per line: at, level, message, and the fields that the line is about (see `job_fields`)."""

    def format(self, record: logging.LogRecord) -> str:
        said = {"at": rfc3339(record.created), "level": record.levelname.lower(), "message": record.getMessage()}
        said.update(getattr(record, "fields", {}))
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


def set_up_logging(config: Config) -> None:
    """Log to standard error, as text or as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    moment = "" if is_journal(sys.stderr) else "%(asctime)s "
    plain = logging.Formatter(f"{moment}%(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S")
    handler.setFormatter(JsonLines() if config.log_format == "json" else plain)
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    # No format has these, and a line costs half without them (Python's logging HOWTO, "Optimization").
    logging._srcfile, logging.logThreads, logging.logMultiprocessing, logging.logProcesses = None, False, False, False
    logging.getLogger("waitress").setLevel(logging.WARNING)  # callers that leave are not worth a line


def is_journal(stream: Any) -> bool:
    """Tell whether a stream leads to systemd's journal, which stores the time of each line (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        state = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{state.st_dev}:{state.st_ino}"


def job_fields(noun: str, job: Any, **more: Any) -> dict[str, dict[str, Any]]:
    """Return what a line about a job has as fields in JSON, for `extra`. A client's line has its own id as `payload`."""
    ids = {"job": job.id} if noun == "job" else {"payload": job.id, "job": job.remote_id}
    fields = {**ids, "user": job.user_id, "service": job.service, "client": job.client, "attempt": job.attempt, **more}
    return {"fields": {name: value for name, value in fields.items() if value is not None}}


def tell_service_manager(text: str) -> None:
    """Tell systemd about this process, as in READY=1 (sd_notify(3)), if NOTIFY_SOCKET says where."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notes:
            notes.connect("\0" + path[1:] if path.startswith("@") else path)
            notes.send(text.encode())
    except OSError as error:
        log.warning("the service manager cannot be notified of %s: %s", text, error)
