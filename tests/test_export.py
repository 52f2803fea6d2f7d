"""What jobs have used: figures in `GET /jobs/ID`, and exports for accounting and simulations."""

from __future__ import annotations

import csv
import io
import json
import re
import tracemalloc
import wsgiref.util
from pathlib import Path
from typing import Any

import pytest
import simulate
from conftest import MakePair
from harness import submit, wait_status
from world import KNOWN_CALLER, Desk, ask, command, event, gated

import joborch
from joborch import Status, clean_payload
from joborch_base import statements
from joborch_base.executors import used_by_payload
from joborch_base.routes import Caller
from joborch_plugins import export, privacy

MIB = 1 << 20
BURN = "python3 -c 'import time; kept = b\"x\" * (300 << 20)\nwhile time.process_time() < 0.5: pass'"

# == Figures ==


def test_every_job_has_its_cpu_time_and_peak_memory(make_pair: MakePair) -> None:
    """Of its processes together, however it ends; of a payload that another process of the client started, the CPU time."""
    pair = make_pair().start()
    used = wait_status(pair.server, submit(pair.server, BURN), "Completed")
    assert 0.5 <= used["cpu_time"] < 60 and 300 * MIB <= used["peak_memory"] < 600 * MIB
    assert [(each["cpu_time"], each["peak_memory"]) for each in used["attempts"]] == [(used["cpu_time"], used["peak_memory"])]
    failed = wait_status(pair.server, submit(pair.server, "exit 3"), "Failed")
    assert 0 < failed["cpu_time"] < used["cpu_time"] and 0 < failed["peak_memory"] < 300 * MIB
    killed = submit(pair.server, f"touch begun; {gated(pair.folder / 'never')}")
    wait_status(pair.server, killed, "Running")
    assert pair.server.post(f"/terminate/{killed}").status_code == 200
    job = pair.server.job(killed)
    assert job["cpu_time"] > 0 and job["peak_memory"] > 0
    recovered = submit(pair.server, f"{gated(pair.folder / 'go')}; {BURN}")
    wait_status(pair.server, recovered, "Running")
    pair.client.kill()
    pair.client.start()
    (pair.folder / "go").touch()
    job = wait_status(pair.server, recovered, "Completed")
    assert job["cpu_time"] >= 0.5 and job["peak_memory"] is None
    assert next(csv.DictReader(io.StringIO(pair.server.get("/export").text)))["cpu_time"] == str(used["cpu_time"])
    assert "Peak memory" in pair.server.get(f"/dashboard/jobs/{killed}", headers={"Accept": "text/html"}).text


def test_a_new_attempt_begins_with_none(desk: Desk) -> None:
    """What the lost one has used stands with it."""
    job = desk.with_client(retries=2)
    job = desk.settle(job, status="Failed", cause="infrastructure", reason="lost", cpu_time=2.5, peak_memory=5 * MIB)
    assert (job.status, job.cpu_time, job.peak_memory) == (Status.QUEUED, None, None)
    (lost,) = ask(desk.server, "GET", f"/jobs/{job.id}").json["attempts"]
    assert (lost["cpu_time"], lost["peak_memory"]) == (2.5, 5 * MIB)


@pytest.mark.parametrize("said", [-1, True, "9", float("nan"), float("inf"), 1e300, None, []])
def test_figures_that_make_no_sense_are_left_out(said: Any, desk: Desk) -> None:
    clean = clean_payload(event(desk.with_client(), cpu_time=said, peak_memory=said))
    assert clean is not None and not {"cpu_time", "peak_memory"} & set(clean)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"0m0.001s 0m0.002s\n0m1.500s 61m2.250s\n", 3663.753),
        (b"0m0,001s 0m0,002s\n0m1,500s 0m2,250s\n", 3.753),  # a locale with another decimal point
        (b"0m0.001s 0m0.002s\n0m1.5", None),
        (b"", None),
        (b"x" * 1000, None),
        (b"peak 4000\npeak 9\npeak 5000\n0m0.001s 0m0.002s\n0m1.500s 0m2.250s\n", 3.753),
    ],
)
def test_what_the_shell_writes_of_its_time(text: bytes, seconds: float | None, tmp_path: Path) -> None:
    (tmp_path / "times").write_bytes(text)
    peak = 5000 * 1024 if b"peak" in text else None
    assert used_by_payload(tmp_path) == (peak, None if seconds is None else pytest.approx(seconds))
    (tmp_path / "times").unlink()
    (tmp_path / "times").symlink_to("/etc/passwd")
    assert used_by_payload(tmp_path) == (None, None)


# == Exports ==

BEGIN = 1.8e9


@pytest.fixture(name="site")
def site_fixture(desk: Desk) -> Desk:
    """A server with jobs of two services and users: two months, all ends, one that waits."""
    desk.restart(SERVICE_OTHER_CLIENTS="http://127.0.0.1:1")
    rows = [
        # user, service, name, end, created, wait, run, cpus
        (7, "example", "=1+1", "Completed", 0.0, 10.0, 100.0, 2),
        (8, "example", 'a "quoted", name', "Failed", 60.4, 30.0, 50.0, 1),
        (7, "other", None, "Killed", 90.0, None, None, 1),
        (8, "other", "ä\nb", "Completed", 40 * 86400.0, 0.0, 1.5, 1),
        (7, "example", None, None, 40 * 86400.0 + 5, None, None, 1),
    ]
    for user, service, name, end, created, wait_s, run_s, cpus in rows:
        job = desk.upload(user_id=user, service=service, name=name, cpus=cpus, memory=1000, timeout=200.5)
        started = None if wait_s is None else BEGIN + created + wait_s
        over = BEGIN + created + 20 if started is None else started + (run_s or 0)
        changes = {"id": job.id, "created": BEGIN + created, "started": started, "ended": over if end else None}
        if end:
            assert desk.store.move(job, Status("Killed"), "", cause="user")
        said = {**changes, "status": end or "Queued", "cpu": None if started is None else run_s, "peak": 64 * MIB if started else None}
        desk.store.write(lambda db, said=said: db.execute(UPDATE, said).rowcount)
    return desk


UPDATE = """
UPDATE jobs SET created_at = :created, started_at = :started, ended_at = :ended, status = :status, cpu_time = :cpu, peak_memory = :peak
 WHERE id = :id
"""


def exported(desk: Desk, query: str, caller: Caller = KNOWN_CALLER) -> str:
    """An export as a text."""
    said = ask(desk.server, "GET", f"/export?{query}", caller=caller)
    assert said.status == 200, said
    return said.body.decode()


def test_csv_for_accounting(site: Desk) -> None:
    rows = list(csv.DictReader(io.StringIO(exported(site, "format=csv"), newline="")))
    assert [int(row["id"]) for row in rows] == [1, 2, 3, 4, 5]
    first = rows[0]
    assert first["name"] == "'=1+1", "no spreadsheet takes it for a formula"
    assert [row["name"] for row in rows[1:4]] == ['a "quoted", name', "", "ä\nb"]
    figures = ("user_id", "service", "cpus", "wait_s", "run_s", "cpu_time", "peak_memory")
    assert [first[name] for name in figures] == ["7", "example", "2", "10.0", "100.0", "100.0", str(64 * MIB)]
    assert (rows[2]["wait_s"], rows[2]["run_s"], rows[4]["wait_s"], rows[4]["ended_at"]) == ("20.0", "0.0", "", "")
    within = exported(site, "since=2027-01-15T08:01:00Z&until=2027-02-01").splitlines()[1:]
    assert [line.split(",")[0] for line in within] == ["2", "3"]


def test_swf_to_the_letter(site: Desk, tmp_path: Path) -> None:
    """Version 2.2 of the format: header comments, 18 numbers a line, counted from 1, in the order of submission."""
    text = exported(site, "format=swf")
    comments = [line for line in text.splitlines() if line.startswith(";")]
    said = dict(re.fullmatch(r"; (\w+): (.*)", line).groups() for line in comments if not line.startswith("; Queue:"))  # type: ignore[union-attr]
    assert (said["Version"], said["MaxJobs"], said["MaxRecords"], said["UnixStartTime"]) == ("2.2", "4", "4", "1800000000")
    assert (said["Preemption"], said["StartTime"]) == ("No", "Fri Jan 15 08:00:00 UTC 2027")
    assert [line for line in comments if line.startswith("; Queue:")] == ["; Queue: 1 example", "; Queue: 2 other"]
    lines = [line.split() for line in text.splitlines() if not line.startswith(";")]
    assert [[float(word) for word in line] for line in lines] == [
        [1, 0, 10, 100, 2, 50, 32768, 2, 201, 512000, 1, 1, -1, -1, 1, -1, -1, -1],
        [2, 60, 30, 50, 1, 50, 65536, 1, 201, 1024000, 0, 2, -1, -1, 1, -1, -1, -1],
        [3, 90, 20, 0, -1, -1, -1, 1, 201, 1024000, 5, 1, -1, -1, 2, -1, -1, -1],
        [4, 40 * 86400, 0, 2, 1, 1.5, 65536, 1, 201, 1024000, 1, 2, -1, -1, 2, -1, -1, -1],
    ]
    assert all(re.fullmatch(r"-?[0-9]+", word) for line in lines for number, word in enumerate(line) if number != 5)


def test_the_simulation_reads_what_was_written(site: Desk, tmp_path: Path) -> None:
    (tmp_path / "trace.swf").write_text(exported(site, "format=swf"))
    trace = simulate.read_swf(tmp_path / "trace.swf")
    assert [(job.number, job.at, job.user, job.run_s, job.cpus, job.timeout) for job in trace] == [
        (1, 0, 1, 100, 2, 201), (2, 60, 2, 50, 1, 201), (3, 90, 1, 0, 1, 201), (4, 40 * 86400, 2, 2, 1, 201)
    ]  # fmt: skip
    assert simulate.main(["--trace", str(tmp_path / "trace.swf")]) == 0


def test_a_job_that_follows_another_names_it(desk: Desk) -> None:
    first = desk.upload()
    second = desk.upload(after_ids=str(first.id))
    desk.store.write(lambda db: db.execute(statements.DEPENDENCY_ADD, {"on_id": first.id, "job_id": second.id}).rowcount)
    assert desk.store.move(first, Status.KILLED, "", cause="user") and desk[second].status is Status.INVALID
    lines = [line.split() for line in exported(desk, "format=swf").splitlines() if not line.startswith(";")]
    assert [line[16] for line in lines] == ["-1", "1"]


def test_sums_by_service_and_month(site: Desk) -> None:
    months = json.loads(exported(site, "format=summary"))["months"]
    assert [(each["month"], each["service"], each["jobs"]) for each in months] == [
        ("2027-01", "example", 2), ("2027-01", "other", 1), ("2027-02", "example", 1), ("2027-02", "other", 1)
    ]  # fmt: skip
    first = months[0]
    assert (first["completed"], first["failed"], first["killed"], first["users"]) == (1, 1, 0, 2)
    assert (first["slot_s"], first["cpu_s"], first["mean_wait_s"], first["longest_wait_s"], first["mean_run_s"]) == (250, 150, 20, 30, 75)
    assert (months[2]["mean_wait_s"], months[2]["slot_s"]) == (None, 0)


def test_each_caller_gets_what_it_may_see(site: Desk) -> None:
    seen = {
        "user": (Caller("ward", "token", "user", (), 7), ["1", "3", "5"]),
        "portal": (Caller("portal", "token", "portal", ("other",)), ["3", "4"]),
        "reader": (Caller("eye", "token", "reader"), ["1", "2", "3", "4", "5"]),
    }
    for caller, ids in seen.values():
        rows = csv.DictReader(io.StringIO(exported(site, "", caller), newline=""))
        assert [row["id"] for row in rows] == ids
    own = json.loads(exported(site, "format=summary", seen["user"][0]))["months"]
    assert sum(each["jobs"] for each in own) == 3
    assert ask(site.server, "GET", "/export?user_id=8", caller=seen["user"][0]).status == 404
    assert ask(site.server, "GET", "/export?format=xml").status == 400


def test_figures_of_deleted_jobs_stay(site: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "WAIT_S", 0.0)
    before = [exported(site, f"format={kind}") for kind in ("swf", "summary")]
    assert ask(site.server, "DELETE", "/jobs/1").status == 200 and ask(site.server, "DELETE", "/jobs/2").status == 200
    assert [exported(site, f"format={kind}") for kind in ("swf", "summary")] == before
    assert "quoted" not in exported(site, "format=csv")


@pytest.mark.parametrize("kind", ["csv", "swf"])
def test_an_export_takes_no_more_memory_if_it_is_longer(kind: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads and sends a page at a time. The order of pages is that of uploads, also if many came at the same moment."""
    monkeypatch.setattr(export, "PAGE_ROWS", 250)
    job = desk.upload()
    assert desk.store.move(job, Status.KILLED, "", cause="user")

    def peak(count: int) -> int:
        desk.store.write(lambda db: db.execute(COPY, {"count": count}).rowcount)
        tracemalloc.start()
        chunks = ask_parts(desk, f"/export?format={kind}")
        rows, size = 0, 0
        for chunk in chunks:
            rows, size = rows + chunk.count(b"\n"), size + len(chunk)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows >= count and size > 30 * count
        return found

    short = peak(2_000)
    assert peak(8_000) < 1.5 * short


COPY = """
WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < :count)
INSERT INTO jobs (uuid, user_id, service, status, created_at, ended_at)
SELECT lower(hex(randomblob(16))), 7, 'example', 'Killed', created_at + n / 1000, created_at + n / 1000 FROM number, jobs WHERE id = 1
"""


def ask_parts(desk: Desk, path: str) -> Any:
    """The parts of an answer as they come."""
    environ: dict[str, Any] = {"PATH_INFO": "/export", "QUERY_STRING": path.partition("?")[2], "joborch.caller": KNOWN_CALLER}
    wsgiref.util.setup_testing_defaults(environ)
    return joborch.make_app(desk.server)(environ, lambda status, said, _=None: None)


def test_from_the_command_line(make_pair: MakePair) -> None:
    pair = make_pair().start()
    number = submit(pair.server, "true", user_id=7)
    wait_status(pair.server, number, "Completed")

    def run(*words: str) -> str:
        done = command(pair.server, "export", *words, "--server", pair.server.url)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--csv").splitlines()[1].startswith(f"{number},7,example,")
    assert run("--swf", "--since", "1d").startswith("; Version: 2.2\n")
    assert run("--csv", "--user", "8").count("\n") == 1
    assert run("--summary").split("\t")[1:4] == ["example", "1", "1"]
    assert json.loads(run("--json"))[0]["jobs"] == 1
