"""Benchmarks of `tests/bench.py` with long queues: restart, backlog, fairness, and a real Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from bench_base import (
    NOOP,
    REPOSITORY,
    SETTLE_S,
    BenchError,
    Caller,
    Measure,
    Place,
    end,
    environment,
    peak_rss_mb,
    percentile,
    request,
    temporary_folder,
    upload_request,
    wait_until,
    write_files,
)
from bench_site import (
    TOKEN,
    Site,
    job_rate,
    running_site,
    upload_all,
    wait_s_of,
    wait_until_completed,
    wait_until_one_runs,
)

SLURM_INTERVAL_S = 10  # JOBORCH_BATCH_INTERVAL as it is by default
RUNNING_LIMIT_S = 600


def copy_rows(db: sqlite3.Connection, table: str, where: str, count: int, changes: dict[str, str]) -> None:
    """Insert the row `t` of a table that `where` finds so many times more, for n from 2; `changes` are columns as SQL of t and n."""
    names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    copied = ", ".join(changes.get(name, f"t.{name}") for name in names)
    numbers = "WITH RECURSIVE numbers(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM numbers WHERE n <= ?)"
    db.execute(f"{numbers} INSERT INTO {table} SELECT {copied} FROM {table} t, numbers WHERE {where}", [count])


def multiply_job(site: Site, count: int) -> None:
    """Let the only job of a server that is stopped be there so many times: row, history, result and folder."""
    data = site.folder / "server"
    (result,), (folder,) = (data / "results").iterdir(), (data / "jobs").iterdir()
    with contextlib.closing(sqlite3.connect(data / "joborch.db")) as db, db:
        copy_rows(db, "jobs", "t.id = 1", count, {"id": "n", "uuid": "'copy-' || n"})
        copy_rows(db, "history", "t.job_id = 1", count, {"job_id": "n", "seq": "t.seq + n"})
    content = result.read_bytes()
    for number in range(2, count + 2):
        result.with_name(f"copy-{number}.1.zip").write_bytes(content)
        folder.with_name(f"copy-{number}").mkdir()


def restart(place: Place, size: int) -> Iterator[Measure]:
    """The start of a server with many ended jobs, and of a client with many running payloads; one of these ended meanwhile."""
    with running_site(place) as site:
        with Caller(site.port) as caller:
            wait_until_completed(caller, caller.ask(upload_request(NOOP)).json())
        end(site.processes["server"])
        multiply_job(site, size)
        begin = time.perf_counter()
        site.start("server")
        yield Measure("server, ended jobs", (time.perf_counter() - begin) * 1000, "ms")
    payloads = max(10, size // 100)
    slots = {"JOBORCH_SLOTS": str(payloads)}
    with running_site(place, slots) as site:
        upload_all(site.port, [site.held_upload()] * payloads)
        wait_until(lambda: site.held_starts() == payloads, RUNNING_LIMIT_S, f"{payloads} payloads run")
        site.processes["client"].kill()
        site.processes["client"].wait()
        site.release(1)
        time.sleep(SETTLE_S)
        begin = time.perf_counter()
        site.start("client", **slots)
        yield Measure("client, running payloads, first /health", (time.perf_counter() - begin) * 1000, "ms")
        with Caller(site.ports["client"]) as caller:
            wait_until(lambda: running_payloads(caller) == payloads - 1, RUNNING_LIMIT_S, "the client knows its payloads again")
        yield Measure("client, running payloads, all taken up", (time.perf_counter() - begin) * 1000, "ms")


def running_payloads(caller: Caller) -> int:
    """How many payloads the client says that it runs."""
    return int(caller.ask(request("GET", "/health", f"Authorization: Bearer {TOKEN}\r\n")).json()["running"])


def queue_up(site: Site, count: int, users: int, with_files: int) -> None:
    """Let the only job of a server that is stopped be queued so many times, by so many users; the first have files."""
    data = site.folder / "server"
    (folder,) = (data / "jobs").iterdir()
    queued = {
        "id": "n", "uuid": "printf('%08x-0000-4000-8000-000000000000', n)", "user_id": f"n % {users} + 1", "status": "'Queued'",
        "reason": "'uploaded'", "moves": "1",
        "arrived_at": "t.arrived_at + n * 0.001", "exit_code": "NULL", "client": "NULL", "dest_id": "NULL", "started_at": "NULL",
        "ended_at": "NULL", "result_size": "NULL", "result_sha256": "NULL", "charged": "0",
    }  # fmt: skip
    with contextlib.closing(sqlite3.connect(data / "joborch.db")) as db, db:
        copy_rows(db, "jobs", "t.id = 1", count, queued)
        copy_rows(db, "history", "t.job_id = 1 AND t.number = 1", count, {"job_id": "n", "seq": "t.seq + n"})
    for number in range(2, min(count, with_files) + 2):
        shutil.copytree(folder, folder.with_name(f"{number:08x}-0000-4000-8000-000000000000"))


def one_job_done(site: Site, script: bytes) -> None:
    """Let one job of the site run, and end its server."""
    with Caller(site.port) as caller:
        wait_until_completed(caller, caller.ask(upload_request({**NOOP, "run.sh": script})).json())
    end(site.processes["server"])


DECISIONS = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import joborch
data, clients, count = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
urls = ",".join(f"http://127.0.0.1:{10000 + number}" for number in range(clients))
limits = {"SERVICE_BENCH_RUNS_PER_USER": "1000000", "SERVICE_BENCH_MAX_RUNS": "1000000"}
config = joborch.load_config("server", {}, {"DATA_PATH": data, "SERVICE_BENCH_CLIENTS": urls, **limits})
server = joborch.Server(config, joborch.Store(config.db_path, "server"), joborch.DataFolder(data))
for link in server.links.values():
    link.heard()
    link.slots = 2
def place_one():
    begin = time.perf_counter()
    assert joborch.next_placement(server)
    decided = time.perf_counter()
    assert joborch.dispatch_tick(server)
    placed = time.perf_counter()
    link, job = next((link, link.outbox.pop()) for link in server.links.values() if link.outbox)
    link.release(job.id)
    return job, decided - begin, placed - decided
running = [place_one()[0] for _ in range(2 * clients - 1)]
times = []
for number in range(count):
    job, *took = place_one()
    times.append(took)
    running.append(job)
    job = running.pop(0)
    for status in (joborch.Status.SUBMITTED, joborch.Status.COMPLETED):
        server.store.move(server.store.get(job.id), status, "", run_s=0.1)
json.dump(times, sys.stdout)
"""


def decision_times_ms(site: Site, clients: int, count: int) -> tuple[list[float], list[float]]:
    """How long one decision takes at a stopped server's database: to choose job and client; and to choose again and claim."""
    modules = site.place.program.parent
    if site.place.program.suffix == ".pyz":
        modules = site.folder / "program"
        with zipfile.ZipFile(site.place.program) as archive:
            archive.extractall(modules)
    words = [site.place.python, "-c", DECISIONS, str(modules), str(site.folder / "server"), str(clients), str(count)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(site.folder), check=False)
    if done.returncode:
        raise BenchError(f"no decisions: {done.stderr.strip().splitlines()[-1]}")
    times = json.loads(done.stdout)
    return [pair[0] * 1000 for pair in times], [pair[1] * 1000 for pair in times]


def look_times_ms(port: int, job_id: int) -> dict[str, float]:
    """Medians of what callers ask most, in ms."""
    wanted = {
        "GET /jobs": request("GET", "/jobs?limit=100"),
        "GET /jobs of a user": request("GET", "/jobs?limit=1&user_id=7&status=Queued"),
        "GET /jobs of the last day, of a user": request("GET", "/jobs?limit=100&user_id=7&since=1d"),
        "GET /jobs, 50,000 rows without a match": request("GET", "/jobs?status=Queued&cause=user"),
        "GET /jobs by name": request("GET", "/jobs?name=nobody"),
        "GET /changes, the first 1,000": request("GET", "/changes?after=0&limit=1000"),
        "GET /jobs/ID": request("GET", f"/jobs/{job_id}"),
        "HEAD /download/ID": request("HEAD", f"/download/{job_id}"),
    }
    found = {}
    with Caller(port) as caller:
        for name, text in wanted.items():
            times = []
            for _ in range(50):
                begin = time.perf_counter()
                caller.ask(text)
                times.append((time.perf_counter() - begin) * 1000)
            found[name] = statistics.median(times)
    return found


@contextlib.contextmanager
def backlogged_site(place: Place, size: int, users: int) -> Iterator[Site]:
    """A site with so many jobs queued, whose server is stopped; its turns are made."""
    with running_site(place) as site:
        one_job_done(site, NOOP["run.sh"])
        end(site.processes["client"])
        queue_up(site, size, users, with_files=1000)
        site.start("server")
        end(site.processes["server"])
        yield site


BACKLOG_USERS, BACKLOG_SMALL, BACKLOG_CLIENTS = 1000, 1000, 100


def backlog(place: Place, size: int) -> Iterator[Measure]:
    """A long queue: what a decision, a start and a look cost beside a queue of 1,000; and the same with 100,000 users and 100 clients."""
    decisions, looks = {}, {}
    for count in (BACKLOG_SMALL, size):
        with backlogged_site(place, count, BACKLOG_USERS) as site:
            begin = time.perf_counter()
            site.start("server")
            restarted = (time.perf_counter() - begin) * 1000
            looks[count] = look_times_ms(site.port, count // 2)
            if count == size:
                yield Measure("restart", restarted, "ms")
                yield Measure("peak RSS, server", peak_rss_mb(site.processes["server"].pid), "MB")
            end(site.processes["server"])
            decisions[count] = decision_times_ms(site, 1, 300)
    for number, name in enumerate(("choose", "choose and claim")):
        few, many = decisions[BACKLOG_SMALL][number], decisions[size][number]
        yield Measure(f"{name}, median", statistics.median(many), "ms", statistics.median(few))
        yield Measure(f"{name}, p99", percentile(many, 99), "ms", percentile(few, 99))
    for name, value in looks[size].items():
        yield Measure(name, value, "ms", looks[BACKLOG_SMALL][name])
    with backlogged_site(place, size, size // 10) as site:
        many, _ = decision_times_ms(site, BACKLOG_CLIENTS, 300)
    yield Measure("choose, 100 clients, a tenth as many users as jobs, median", statistics.median(many), "ms")
    yield Measure("the same, p99", percentile(many, 99), "ms")


FAIR_OTHERS, FAIR_RUN_S, FAIR_SLOTS = 50, 0.25, 2


def fairness(place: Place, size: int) -> Iterator[Measure]:
    """One user's long queue, and others who come with one job each: first one after another, then all at once."""
    script = f"sleep {FAIR_RUN_S}\n".encode()
    wanted = [upload_request({**NOOP, "run.sh": script}, user=1000 + number) for number in range(2 * FAIR_OTHERS)]
    with running_site(place) as site:
        one_job_done(site, script)
        end(site.processes["client"])
        queue_up(site, size, 1, with_files=2000)
        site.start("client", JOBORCH_SLOTS=str(FAIR_SLOTS))
        site.start("server")
        with Caller(site.port) as caller:
            wait_until_one_runs(caller)
            time.sleep(SETTLE_S)
            before, begin = len(caller.get("/jobs?status=Completed&limit=1000")["jobs"]), time.perf_counter()
            time.sleep(20 * FAIR_RUN_S)
            done = len(caller.get("/jobs?status=Completed&limit=1000")["jobs"]) - before
            job_s = FAIR_SLOTS * (time.perf_counter() - begin) / done
            alone = [wait_s_of(wait_until_completed(caller, caller.ask(text).json())) for text in wanted[:FAIR_OTHERS]]
            time.sleep(SETTLE_S)
            ids = upload_all(site.port, wanted[FAIR_OTHERS:])
            together = [wait_s_of(wait_until_completed(caller, caller.get(f"/jobs/{job_id}"))) for job_id in ids]
    yield Measure("job time", job_s * 1000, "ms", FAIR_RUN_S * 1000)
    yield Measure("one after another, median", statistics.median(alone) / job_s, "job times")
    yield Measure("one after another, p90", percentile(alone, 90) / job_s, "job times")
    yield Measure("at once, median", statistics.median(together) / job_s, "job times")
    yield Measure("at once, the last", max(together) / job_s, "job times")


SLURM_CLUSTER = REPOSITORY.parent / "shared" / "backends" / "slurm" / "cluster"
SLURM_COMMANDS = ("sbatch", "squeue", "sacct", "scancel")


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A real Slurm of two nodes; yields the settings with which commands reach it, each call of them a line in `calls`."""
    (folder / "bin").mkdir()
    for name in SLURM_COMMANDS:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\necho {name} >>{folder}/calls\nexec {shutil.which(name)} "$@"\n')
        script.chmod(0o755)
    (folder / "calls").touch()
    subprocess.run([str(SLURM_CLUSTER), "start", str(folder / "slurm")], check=True, timeout=60)
    try:
        yield {"SLURM_CONF": str(folder / "slurm/etc/slurm.conf"), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    finally:
        subprocess.run([str(SLURM_CLUSTER), "stop", str(folder / "slurm")], check=True, timeout=60)


def bare_sbatch_rate(folder: Path, count: int, settings: dict[str, str]) -> float:
    """Jobs a second of a loop of sbatch, until the last of them has left the queue."""
    write_files(folder, NOOP)
    known, begin = {**os.environ, **settings}, time.perf_counter()
    for _ in range(count):
        submit = ["/usr/bin/sbatch", "--parsable", "--output=/dev/null", "--wrap=bash run.sh"]
        subprocess.run(submit, cwd=folder, env=known, check=True, stdout=subprocess.DEVNULL)
    while subprocess.run(["/usr/bin/squeue", "-h", "-o", "%i"], env=known, check=True, capture_output=True).stdout:
        time.sleep(0.1)
    return count / (time.perf_counter() - begin)


def slurm(place: Place, size: int) -> Iterator[Measure]:
    """No-op jobs through the Slurm executor against a real slurmctld, and a bare loop of sbatch; the cluster drains some 4 a second."""
    with temporary_folder(place) as folder, slurm_cluster(folder) as settings:
        bare = bare_sbatch_rate(folder / "bare", size, settings)
        begin = time.perf_counter()
        with running_site(place, {"JOBORCH_EXECUTOR": "slurm", **settings}) as site:
            _, jobs = job_rate(site.port, size)
        calls = (folder / "calls").read_text().split()
        intervals = (time.perf_counter() - begin) / SLURM_INTERVAL_S
    yield Measure("jobs", jobs, "jobs/s", bare)
    yield Measure("sbatch calls a job", calls.count("sbatch") / size, "")
    yield Measure("squeue and sacct calls an interval", (calls.count("squeue") + calls.count("sacct")) / intervals, "")
