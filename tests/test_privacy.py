"""Deletion on request: nothing of a job is left on any disk but its figures, whatever dies or is away meanwhile."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import MakePair
from harness import JoinedPair, Pair, Process, file_part, program_text, submit, upload, wait_for, wait_status
from world import Desk, Peer, Yard, ask, command, event, files_with, gated, reply, submit_payload

import joborch
from joborch import Status
from joborch_base import statements
from joborch_plugins import privacy

SECRET = "xyzzy-of-a-patient"
LIMIT_S = 90.0
LEAVES = f"echo {SECRET}-out; echo {SECRET}-why >&2; echo {SECRET} > out; exit 3"


def where(process: Process) -> list[str]:
    """The files of a process in which the secret is, in their content or their name."""
    return files_with(process.data, SECRET)


def private_job(server: Process, script: str = LEAVES, **fields: Any) -> int:
    """A job with the secret in its name, its key, its files and, when it has ended, in its reason."""
    files = {"run.sh": script.encode(), f"{SECRET}.txt": SECRET.encode() * 100}
    answer = upload(server, files, name=f"{SECRET}-name", headers={"Idempotency-Key": f"{SECRET}-key"}, **fields)
    assert answer.status_code == 201, answer.text
    return int(answer.json()["id"])


def delete(server: Process, path: str) -> requests.Response:
    """DELETE of the server."""
    return requests.delete(f"{server.url}{path}", timeout=60)


def is_gone(pair: Pair, number: int) -> bool:
    """Whether a deletion is complete on both sides."""
    try:
        return delete(pair.server, f"/jobs/{number}").status_code == 200
    except requests.RequestException:
        return False


def assert_blank(job: dict[str, Any]) -> None:
    """A job in JSON has no text of its owner, and all of its figures."""
    assert SECRET not in json.dumps(job)
    assert (job["status"], job["name"], job["reason"], job["callback_url"], job["result"]) == ("Cleaned", None, "", None, None)
    assert {entry["reason"] for entry in job["history"]} <= {"", "deleted on request"}
    assert job["history"][-1]["reason"] == "deleted on request"
    assert job["user_id"] is not None and job["service"] == "example" and job["created_at"] and job["ended_at"] and job["cpus"] == 1


@pytest.mark.parametrize("kind", [Pair, JoinedPair])
def test_nothing_is_left_but_figures(kind: type[Pair], make_pair: MakePair) -> None:
    """Of a job that failed, one that has a result, and one that runs: on the disks of server and client."""
    pair = make_pair(kind=kind).start()
    failed, completed = private_job(pair.server, user_id=7), private_job(pair.server, LEAVES.replace("exit 3", "true"), user_id=8)
    wait_status(pair.server, failed, "Failed")
    wait_status(pair.server, completed, "Completed")
    assert SECRET in pair.server.job(failed)["reason"]
    running = private_job(pair.server, f"echo {SECRET}; {gated(pair.folder / 'never')}", user_id=9)
    wait_status(pair.server, running, "Running")
    assert where(pair.server) and where(pair.client)
    for number in (failed, completed, running):
        assert delete(pair.server, f"/jobs/{number}").status_code == 200
        assert_blank(pair.server.job(number))
    assert where(pair.server) == where(pair.client) == []
    job = pair.server.job(completed)
    assert job["ended_as"] == "Completed" and job["exit_code"] == 0 and job["cpu_time"] is not None and job["peak_memory"] > 0
    assert pair.server.job(running)["ended_as"] == "Killed"
    assert pair.server.get(f"/jobs/{completed}/files").status_code in (404, 410)
    assert delete(pair.server, f"/jobs/{completed}").json() == {"id": completed, "status": "Cleaned", "message": "deleted", "pending": []}
    assert private_job(pair.server, user_id=7) != failed, "its key is forgotten, too"
    lines = [json.loads(line) for line in (pair.server.data / "audit.jsonl").read_text().splitlines()]
    assert [line["call"] for line in lines].count(f"DELETE /jobs/{completed}") == 2


def test_a_client_that_is_away_does_it_later(make_pair: MakePair) -> None:
    pair = make_pair().start()
    number = private_job(pair.server)
    wait_status(pair.server, number, "Failed")
    name = pair.server.job(number)["client"]
    pair.client.kill()
    wait_for(lambda: not pair.server.get("/clients").json()["clients"][0]["reachable"], LIMIT_S, "the server notices")
    said = delete(pair.server, f"/jobs/{number}")
    assert (said.status_code, said.json()["pending"]) == (202, [name])
    assert said.json()["message"] == f"it is deleted at {name} as soon as that client answers"
    assert where(pair.server) == [] and where(pair.client) != []
    pair.server.kill()
    pair.client.start()
    pair.server.start()
    wait_for(lambda: where(pair.client) == [], LIMIT_S, "the client deletes it")
    wait_for(lambda: is_gone(pair, number), LIMIT_S, "the server knows")


OF_SERVER = ["erase.noted", "erase.files", "erase.blanked", "erase.asked", "erase.rewritten", "clean.folder"]
OF_CLIENT = ["erase.noted", "erase.files", "erase.blanked", "erase.rewritten", "clean.folder"]


def test_all_crash_points_are_tried() -> None:
    points = set(re.findall(r'crash_point\("(erase\.[\w.]+)"\)', program_text()))
    assert points <= {*OF_SERVER, *OF_CLIENT}


@pytest.mark.parametrize(("side", "point"), [*(("server", point) for point in OF_SERVER), *(("client", point) for point in OF_CLIENT)])
def test_killed_at_any_step_it_is_finished_after_the_next_start(side: str, point: str, make_pair: MakePair) -> None:
    pair = make_pair(**{side: {"JOBORCH_TEST_CRASH": point}}).start()
    number = private_job(pair.server)
    wait_status(pair.server, number, "Failed")
    process: Process = getattr(pair, side)
    try:
        delete(pair.server, f"/jobs/{number}")
    except requests.RequestException:
        assert side == "server"
    wait_for(lambda: not process.running(), LIMIT_S, f"the death of the {side} at {point}")
    process.settings["JOBORCH_TEST_CRASH"] = None
    process.start()
    wait_for(lambda: where(pair.server) == where(pair.client) == [], LIMIT_S, "nothing is left")
    wait_for(lambda: is_gone(pair, number), LIMIT_S, "the server knows")
    assert_blank(pair.server.job(number))


def test_all_jobs_of_a_user_and_no_others(make_pair: MakePair) -> None:
    pair = make_pair().start()
    own = [private_job(pair.server, user_id=7, service="example", priority=each) for each in range(1)]
    own += [submit(pair.server, f"echo {SECRET} >&2; exit 3", user_id=7, name=SECRET) for _ in range(3)]
    other = submit(pair.server, "echo kept >&2; exit 3", user_id=8, name="kept")
    for number in (*own, other):
        wait_status(pair.server, number, "Failed")
    done = command(pair.server, "delete-user", "7", "--server", pair.server.url)
    assert done.returncode == 2 and "Say so with --yes" in done.stderr
    done = command(pair.server, "delete-user", "7", "--yes", "--server", pair.server.url)
    assert (done.returncode, done.stdout) == (0, "user 7, 4 jobs: deleted\n"), done.stderr
    assert where(pair.server) == where(pair.client) == []
    for number in own:
        assert_blank(pair.server.job(number))
    kept = pair.server.job(other)
    assert (kept["status"], kept["name"]) == ("Failed", "kept")
    assert pair.server.get("/users/7").json()["services"][0]["runs"] == 4, "what the user has used is kept"
    done = command(pair.server, "delete", str(other), "--yes", "--json", "--server", pair.server.url)
    assert json.loads(done.stdout)[0]["message"] == "deleted", done.stderr


# == Tick by tick ==


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A desk has no loops: what is not done at once is done by the test."""
    monkeypatch.setattr(privacy, "WAIT_S", 0.0)


def ended(desk: Desk, **changes: Any) -> joborch.Job:
    """A job of a desk that has ended, with a secret in its reason."""
    job = desk.upload(name=SECRET, **changes)
    assert desk.store.move(job, Status.FAILED, f"{SECRET}: because", cause="user")
    return desk[job]


def test_files_that_cannot_be_removed_now(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts stay until the files are gone. The answer says that the deletion is not complete."""
    job = ended(desk)

    def fails(*_: object) -> None:
        raise OSError(5, "it is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(privacy, "remove_files", fails)
        said = ask(desk.server, "DELETE", f"/jobs/{job.id}")
    assert (said.status, said.json["message"]) == (202, "its files are being deleted")
    assert desk[job].name == SECRET
    desk.clock.pass_s(2 * joborch.UNREMOVABLE_LAST_S)
    assert ask(desk.server, "DELETE", f"/jobs/{job.id}").status == 200
    assert desk[job].name is None and not desk.server.unremovable


def test_webhooks_are_forgotten(desk: Desk) -> None:
    """Those that are not delivered are not sent any more: their bodies have the job's texts."""
    desk.restart(JOBORCH_CALLBACK_HOSTS="127.0.0.1")
    job = ended(desk, callback_url="http://127.0.0.1:9/hook")
    assert desk.store.number(statements.DELIVERIES_OPEN) == 1
    assert ask(desk.server, "DELETE", f"/jobs/{job.id}").status == 200
    assert desk.store.number("SELECT count(*) FROM deliveries") == 0
    changes = ask(desk.server, "GET", f"/changes?after=0&ids={job.id}").body.decode()
    assert SECRET not in changes and "deleted on request" in changes


def test_a_2_2_client_is_not_asked(desk22: Desk) -> None:
    """The history says so."""
    desk, job = desk22, desk22.with_client()
    assert desk.store.move(desk[job], Status.FAILED, SECRET, cause="user")
    assert ask(desk.server, "DELETE", f"/jobs/{job.id}").status == 200
    assert f"deleted on request; {desk.link.name} cannot do that" in desk.reasons(job)


def test_a_client_that_is_too_old_is_asked_once(desk: Desk, peer: Peer) -> None:
    """It has no such route, and removes its files by its own settings."""
    job = desk.with_client()
    assert desk.store.move(desk[job], Status.FAILED, SECRET, cause="user")
    peer.says["/payloads"] = [reply(404, {"message": "there is no DELETE /payloads"})]
    assert ask(desk.server, "DELETE", f"/jobs/{job.id}").status == 200
    assert [asked.method for asked in peer.asked if asked.path.startswith("/payloads")] == ["DELETE"]


def test_a_payload_that_is_reported_later_is_deleted_there(desk: Desk) -> None:
    """A client was silent for long, so its job was given up and then deleted. Its payload is reported after that."""
    job = desk.with_client()
    assert desk.store.move(desk[job], Status.KILLED, SECRET, cause="cancelled")
    desk.link.heard()
    assert ask(desk.server, "DELETE", f"/jobs/{job.id}").status in (200, 202)
    desk.store.write(lambda db: db.execute("DELETE FROM erasures").rowcount)
    joborch.report(desk.server, desk.link, event(desk[job], status="Failed", reason=SECRET))
    assert desk.server.plugins["privacy"].left_of(job.id) == [desk.link.name]
    assert SECRET not in desk.reasons(job)


def test_a_payload_that_is_running_is_stopped_and_then_deleted(yard: Yard) -> None:
    """A client answers that it is not done, and goes on by itself."""
    said = submit_payload(yard.client, [file_part("run.sh", b"sleep 600")], X_Joborch_Uuid="8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0")
    assert said.status == 200, said
    uuid = yard.store.jobs(statements.PAYLOADS_IN, status="Prepared", limit=9)[0].uuid
    yard.client.stopping.set()  # a wait comes back at once
    said = ask(yard.client, "DELETE", f"/payloads/{uuid}")
    assert (said.status, said.json["left"]) == (202, 1)
    yard.client.stopping.clear()
    assert joborch.end_tick(yard.client)
    yard.client.plugins["privacy"].do_now()
    assert ask(yard.client, "DELETE", f"/payloads/{uuid}").json == {"uuid": uuid, "payloads": 1, "left": 0}
    assert not list(yard.data.jobs.iterdir())
    unknown = "00000000-0000-0000-0000-000000000000"
    assert ask(yard.client, "DELETE", f"/payloads/{unknown}").json == {"uuid": unknown, "payloads": 0, "left": 0}
    assert ask(yard.client, "DELETE", "/payloads/..").status in (400, 404)


# == Overwriting ==


def texts_in_file(store: joborch.Store) -> bytes:
    """All bytes of a database and its log."""
    files = [Path(f"{store.path}{end}") for end in ("", "-wal")]
    return b"".join(file.read_bytes() for file in files if file.exists())


def churn(db: sqlite3.Connection, numbers: Iterable[int], chance: random.Random) -> None:
    """Add jobs, and let rows grow and pages split as when jobs run side by side; each text begins with its job's own word."""
    known: list[int] = []
    for number in numbers:
        word = f"secret{number:06d}x"
        db.execute(ADD_JOB, (number, f"{chance.getrandbits(128):032x}", number % 97, word + "n" * chance.randrange(40), word + "key"))
        known.append(number)
        for each in chance.sample(known[-200:], min(3, len(known))):
            reason = f"secret{each:06d}x" + "w" * chance.randrange(200)
            db.execute("UPDATE jobs SET reason = ?, ended_at = 2.0, moves = moves + 1 WHERE id = ?", (reason, each))
            db.execute("INSERT INTO history SELECT id, moves, 1, 'a', 'b', reason, 1, ? FROM jobs WHERE id = ?", (number, each))
            db.execute("INSERT OR REPLACE INTO attempts (job_id, attempt, reason) VALUES (?, 1, ?)", (each, reason))


ADD_JOB = """
INSERT INTO jobs (id, uuid, user_id, name, idempotency_key, service, status, created_at) VALUES (?, ?, ?, ?, ?, 'example', 'Failed', 1)
"""


def test_no_copy_is_left_in_unused_parts(desk: Desk) -> None:
    """SQLite leaves copies of rows there when it splits pages."""
    chance, store, plugin = random.Random(7), desk.store, desk.server.plugins["privacy"]
    store.write(lambda db: churn(db, range(1000, 3000), chance))
    gone = [number for number in range(1000, 3000) if number % 10 == 3]
    plugin.note(gone)
    while plugin.erase_here():
        pass
    assert any(f"secret{number:06d}x".encode() in texts_in_file(store) for number in gone), "there is something to overwrite"
    plugin.do_now()
    assert store.number(statements.REMNANTS) == 0 and not plugin.wanted
    content = texts_in_file(store)
    assert [number for number in gone if f"secret{number:06d}x".encode() in content] == []
    kept = [number for number in range(1000, 3000) if number not in set(gone)]
    assert {job.id for job in store.jobs("SELECT * FROM jobs WHERE name LIKE 'secret%'")} == set(kept)
    assert [row[0] for row in store.read("PRAGMA integrity_check")] == ["ok"]


def test_a_large_database_is_rewritten_at_a_quiet_moment(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is when no job comes or moves, because these would have to wait. No caller waits for that moment; there is one a day at most."""
    monkeypatch.setattr(privacy, "SMALL_BYTES", 0)
    plugin = desk.server.plugins["privacy"]

    def delete_one() -> int:
        job = ended(desk)
        assert ask(desk.server, "DELETE", f"/jobs/{job.id}").status == 200
        assert desk.store.number(statements.REMNANTS) == job.id and plugin.wanted
        return job.id

    first = delete_one()
    desk.clock.pass_s(privacy.QUIET_S - 10)
    later = ended(desk)
    desk.clock.pass_s(privacy.QUIET_S - 10)
    plugin.do_now()
    assert desk.store.number(statements.REMNANTS) == first, "a job moved less than a minute ago"
    desk.clock.pass_s(20)
    plugin.do_now()
    assert desk.store.number(statements.REMNANTS) == 0 and not plugin.wanted
    second = delete_one()
    desk.clock.pass_s(privacy.DAY_S - 60)
    plugin.do_now()
    assert desk.store.number(statements.REMNANTS) == second, "once a day"
    assert ask(desk.server, "DELETE", f"/jobs/{later.id}").status == 200
    desk.clock.pass_s(120)
    plugin.do_now()
    assert desk.store.number(statements.REMNANTS) == 0 and not plugin.wanted
    assert SECRET.encode() not in texts_in_file(desk.store)


def test_without_a_quiet_moment_a_large_database_is_rewritten_after_a_day(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "SMALL_BYTES", 0)
    plugin, looks = desk.server.plugins["privacy"], 0
    assert ask(desk.server, "DELETE", f"/jobs/{ended(desk).id}").status == 200
    while desk.store.number(statements.REMNANTS):
        desk.clock.pass_s(privacy.DAY_S / 20)
        desk.upload()
        plugin.do_now()
        looks += 1
    assert looks in (20, 21)
    assert SECRET.encode() not in texts_in_file(desk.store)


def test_overwriting_waits_for_a_reader_of_older_rows(desk: Desk) -> None:
    """It is done when the reader has finished. Only this step does without SQLite's patience with readers."""
    store, plugin = desk.store, desk.server.plugins["privacy"]
    reader = store.reader()
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM jobs").fetchone()
    job = ended(desk)
    assert ask(desk.server, "DELETE", f"/jobs/{job.id}").status == 200
    assert store.db.execute("PRAGMA busy_timeout").fetchone()[0] == 10_000
    assert store.number(statements.REMNANTS) == job.id and plugin.wanted and plugin.tick() is False
    reader.close()
    plugin.do_now()
    assert store.number(statements.REMNANTS) == 0 and SECRET.encode() not in texts_in_file(store)
