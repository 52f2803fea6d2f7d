"""What is kept of each caller's calls: who stopped a job, the audit log, and the limits of each user."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harness import BOUNDARY, field_part, file_part, form
from world import Desk, HandClock, Said, ask

from joborch import Cause, HttpError, Status, Store
from joborch_base import statements
from joborch_base.access import UploadPace
from joborch_base.routes import Caller
from joborch_base.states import with_caller

PORTAL = Caller("portal-1", "token", "portal")
TYPE = f"multipart/form-data; boundary={BOUNDARY}"
RELEASED = Path(__file__).parent / "joborch-0.1.0.sql"


def upload(desk: Desk, content: bytes = b"true", user: int = 1, caller: Caller = PORTAL, **headers: str) -> Said:
    """POST /upload with a script."""
    body = form([file_part("run.sh", content), field_part("user_id", str(user)), field_part("service", "example")])
    return ask(desk.server, "POST", "/upload", body, caller=caller, Content_Type=TYPE, **headers)


# == Who stopped a job ==


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("terminated on request", "terminated by portal-1"),
        ("terminated on request; its client is gone", "terminated by portal-1; its client is gone"),
        ("terminated before it was sent", "terminated by portal-1 before it was sent"),
        ("the client says Killed", "the client says Killed; terminated by portal-1"),
    ],
)
def test_a_reason_names_who_asked(reason: str, said: str) -> None:
    assert with_caller(reason, "portal-1") == said


@pytest.mark.parametrize(
    ("caller", "said"),
    [
        (PORTAL, "terminated by portal-1 before it was sent"),
        (PORTAL._replace(proof="session"), "terminated by portal-1 before it was sent"),
        (Caller("default", "token"), "terminated before it was sent"),
        (Caller("uid 1000", "same user"), "terminated before it was sent"),
    ],
)
def test_the_history_says_who_stopped_a_job(caller: Caller, said: str, desk: Desk) -> None:
    job = desk.upload()
    assert ask(desk.server, "POST", f"/terminate/{job.id}", caller=caller).json["message"] == said
    assert [move["reason"] for move in ask(desk.server, "GET", f"/jobs/{job.id}").json["history"]] == ["uploaded", said]


def test_the_first_who_asked_is_named_also_after_a_restart(desk: Desk) -> None:
    """The request outlives the server, until the client has done it."""
    job = desk.with_client(Status.RUNNING)
    for name in ("first", "second"):
        desk.store.request_kill(job.id, Cause.CANCELLED, name)
    desk.restart()
    ended = desk.settle(desk[job], status="Killed", reason="terminated on request", cause="cancelled")
    assert (ended.status, ended.reason) == (Status.KILLED, "terminated by first")


# == The audit log ==


def lines(desk: Desk) -> list[dict[str, Any]]:
    """The lines of the audit log."""
    path = desk.data.path / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_each_call_that_changes_something_has_a_line(desk: Desk) -> None:
    number = upload(desk).json["id"]
    ask(desk.server, "GET", f"/jobs/{number}", caller=PORTAL)
    ask(desk.server, "POST", f"/terminate/{number}", caller=PORTAL)
    ask(desk.server, "POST", "/terminate/99", caller=PORTAL)
    ask(desk.server, "PUT", "/users/7?weight=2")
    token = ask(desk.server, "POST", "/tokens?name=x&role=reader").json["token"]
    found = lines(desk)
    assert [(each["caller"], each["role"], each["call"], each["status"], each.get("id")) for each in found] == [
        ("portal-1", "portal", "POST /upload", 201, number),
        ("portal-1", "portal", f"POST /terminate/{number}", 200, number),
        ("default", "operator", "PUT /users/7?weight=2", 200, None),
        ("default", "operator", "POST /tokens?name=x&role=reader", 201, None),
    ]
    assert all(set(each) >= {"at", "proof", "from"} for each in found) and found[0]["user_id"] == 1
    path = desk.data.path / "audit.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600 and token not in path.read_text()


def test_the_log_may_be_moved_away_or_switched_off(desk: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    upload(desk)
    (desk.data.path / "audit.jsonl").rename(tmp_path / "old")
    upload(desk)
    assert len(lines(desk)) == 1 and len((tmp_path / "old").read_text().splitlines()) == 1
    desk.restart(JOBORCH_AUDIT_LOG="0")
    upload(desk)
    assert len(lines(desk)) == 1
    desk.restart(JOBORCH_AUDIT_LOG=str(tmp_path / "none" / "audit"))
    assert [upload(desk).status for _ in range(3)] == [201] * 3, "jobs go on"
    failures = [record.getMessage() for record in caplog.records if "audit" in record.getMessage()]
    assert failures == [f"the audit log {tmp_path}/none/audit cannot be written: no such file or directory"], "once"


def test_what_a_caller_writes_stays_one_line(desk: Desk) -> None:
    ask(desk.server, "POST", "/tokens?name=x&role=reader&days=%0a")
    ask(desk.server, "DELETE", "/tokens/a\nb\u202e")
    ask(desk.server, "POST", "/tokens?name=x&role=reader&days=5%00")
    ask(desk.server, "POST", "/clients/a\nb/drain")
    assert all("\n" not in each["call"] for each in lines(desk))


# == Limits of each user ==


def test_a_user_may_store_so_much(desk: Desk) -> None:
    """Inputs and results count until they are cleaned; other users are not concerned."""
    desk.restart(JOBORCH_MAX_STORED_PER_USER="1K")
    first = upload(desk, b"#" * 600).json["id"]
    said = upload(desk, b"#" * 500)
    assert (said.status, said.json["field"]) == (507, "user_id")
    assert said.json["message"] == (
        "user 1 has 600 bytes stored, this job has 500 bytes, and the limit is 1.0 KiB (JOBORCH_MAX_STORED_PER_USER): "
        "results are deleted 2 days after their end"
    )
    assert upload(desk, b"#" * 500, user=2).status == 201
    assert len(list(desk.data.jobs.iterdir())) == 2, "what was refused left no file"
    assert ask(desk.server, "POST", f"/jobs/{first}/retry").status == 507, "a copy counts as much"
    job = desk.store.get(first)
    assert job is not None and desk.store.move(job, Status.KILLED, "")
    ended = desk.store.get(first)
    assert ended is not None and desk.store.move(ended, Status.CLEANED, "")
    assert upload(desk, b"#" * 500).status == 201


def test_results_count_too(desk: Desk) -> None:
    desk.restart(JOBORCH_MAX_STORED_PER_USER="1K")
    job = desk.with_client(Status.RUNNING)
    assert desk.store.move(desk[job], Status.COMPLETED, "", result_size=1020, result_sha256="0" * 64)
    assert upload(desk).status == 201, "4 bytes fit"
    assert upload(desk).status == 507


def test_two_uploads_at_once_do_not_both_get_the_last_bytes(desk: Desk) -> None:
    desk.restart(JOBORCH_MAX_STORED_PER_USER="1K")
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(upload(desk, b"#" * 600).status)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(codes) == [201, 507, 507, 507]


def test_a_user_may_upload_so_often(desk: Desk) -> None:
    desk.restart(JOBORCH_UPLOADS_PER_MINUTE="2")
    first = upload(desk, Idempotency_Key="k").json["id"]
    assert upload(desk).status == 201
    said = upload(desk)
    assert (said.status, said.json["field"], int(said.headers["Retry-After"])) == (429, "user_id", 60)
    assert said.json["message"] == "user 1 has sent 2 jobs in the last minute (JOBORCH_UPLOADS_PER_MINUTE): try again in 60 s"
    assert ask(desk.server, "POST", f"/jobs/{first}/retry").status == 429
    assert upload(desk, Idempotency_Key="k").json["id"] == first, "a repeat starts nothing, and counts for nothing"
    assert upload(desk, user=2).status == 201
    desk.clock.pass_s(60)
    assert upload(desk).status == 201


def test_users_who_are_quiet_are_forgotten() -> None:
    clock = HandClock()
    pace = UploadPace(clock)
    for user in range(10_001):
        pace.take(user, 1)
    clock.pass_s(61)
    pace.take(-1, 1)
    assert [*pace.sent] == [-1]
    with pytest.raises(HttpError, match="has sent 1 job in the last minute"):
        pace.take(-1, 1)
    pace.take(-1, 0)


# == Older databases ==


@pytest.mark.parametrize("cut_off", [False, True])
def test_an_older_database_is_brought_on(cut_off: bool, tmp_path: Path) -> None:
    """Whoever is killed in the last migration leaves the database as it was."""
    with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as db:
        db.executescript(RELEASED.read_text())
        for older in range(3, statements.SCHEMA_VERSION - 1):
            db.executescript(statements.MIGRATIONS[older])
    if cut_off:
        with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as db:
            db.executescript(statements.MIGRATIONS[statements.SCHEMA_VERSION - 1].replace("COMMIT;", ""))
    store = Store(str(tmp_path / "db"), "server", HandClock())
    job = store.get(1)
    assert job is not None and (job.inputs_size, job.kill_by) == (None, None)
    assert store.number(statements.STORED_OF_USER, user_id=job.user_id) >= 0
    store.close()
