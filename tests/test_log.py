"""The log as programs read it: fields of JSON lines, one line for each request, no second time stamp in the journal."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import raw_exchange, raw_head
from world import Desk, Yard, ask, serving

import joborch
from joborch import Status


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """What a test sets up of the log goes with it."""
    root = logging.getLogger()
    saved, level = root.handlers[:], root.level
    yield
    root.handlers[:] = saved
    root.setLevel(level)


def log_to(stream: Any, monkeypatch: pytest.MonkeyPatch, node: joborch.Node, **settings: Any) -> None:
    """Log as a process with these settings does."""
    node.config = dataclasses.replace(node.config, **settings)
    monkeypatch.setattr(sys, "stderr", stream)
    joborch.set_up_logging(node.config)


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    """The lines that were logged, and nothing twice."""
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    stream.truncate(0)
    stream.seek(0)
    return said


def test_moves_have_fields(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    log_to(stream, monkeypatch, desk.server, log_format="json")
    job = desk.with_client(Status.SUBMITTED, user_id=7)
    known = {"job": job.id, "user": 7, "service": "example", "attempt": 1}
    moves = [each for each in records(stream) if "job" in each]
    assert [{name: each[name] for name in known} for each in moves] == [known] * len(moves)
    assert [each.get("client") for each in moves] == [None, desk.link.name]
    assert all({"at", "level", "message"} <= each.keys() for each in moves)


def test_a_clients_lines_have_both_ids(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    log_to(stream, monkeypatch, yard.client, log_format="json")
    job = yard.submit("true", X_Joborch_Job="4711", X_Joborch_User="7", X_Joborch_Service="example")
    first = records(stream)[0]
    assert (first["payload"], first["job"], first["user"], first["service"]) == (job.id, "4711", 7, "example")


def test_each_request_is_a_line_if_that_is_wanted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is refused before its body, and without what is in the query."""
    stream = io.StringIO()
    log_to(stream, monkeypatch, desk.server, log_format="json", token="sesame")
    ask(desk.server, "GET", "/jobs/1")
    assert records(stream) == []
    log_to(stream, monkeypatch, desk.server, access_log=True)
    ask(desk.server, "GET", "/jobs?name=secret")
    [line] = records(stream)
    assert (line["method"], line["path"], line["status"], line["caller"]) == ("GET", "/jobs", 200, "default")
    assert "secret" not in json.dumps(line) and line["ms"] >= 0
    desk.server.tokens = ("sesame",)
    with serving(desk.server) as url:
        port = int(url.rpartition(":")[2])
        assert b" 401 " in raw_exchange(port, raw_head("GET", "/jobs/77", port))
    [line] = [each for each in records(stream) if "path" in each]
    assert (line["path"], line["status"], line["caller"]) == ("/jobs/77", 401, None)


def test_the_journal_has_the_time_already(desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only if standard error leads there: the variable is inherited by those whose output goes elsewhere."""
    for of_journal in (True, False):
        with (tmp_path / "log").open("w+") as stream:
            state = os.fstat(stream.fileno())
            monkeypatch.setenv("JOURNAL_STREAM", f"{state.st_dev}:{state.st_ino}" if of_journal else "1:2")
            log_to(stream, monkeypatch, desk.server)
            joborch.log.info("hello")
            stream.seek(0)
            assert (stream.read() == "INFO    hello\n") is of_journal
