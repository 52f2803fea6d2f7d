"""Each problem is made for real: /health shows it, since when and what to do; and it is gone when it is over."""

from __future__ import annotations

import base64
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from harness import ROOT, Pair, Process, free_port, from_source, problems, submit, upload, wait_for, wait_status
from world import Disk, Yard, command

import joborch

PATIENCE_S = 90.0  # the machine may be busy; docs/operate.md has the times that are usual


def shown(process: Process, kind: str, **fields: str | None) -> dict[str, Any]:
    """Wait for a problem, and return it. It always says since when it stands and what to do."""
    begun = time.monotonic()
    (problem, *_) = wait_for(lambda: problems(process, kind, **fields), PATIENCE_S, f"the problem {kind}")
    print(f"{kind}: there after {time.monotonic() - begun:.1f} s")
    since = datetime.fromisoformat(problem["since"].replace("Z", "+00:00")).timestamp()
    assert since <= time.time() + 3600 and problem["what"] and problem["remedy"]
    assert process.health()["status"] in ("degraded", "error")
    return problem


def gone(process: Process, kind: str, **fields: str | None) -> None:
    """Wait until a problem is over."""
    begun = time.monotonic()
    wait_for(lambda: not problems(process, kind, **fields), PATIENCE_S, f"the end of the problem {kind}")
    print(f"{kind}: gone after {time.monotonic() - begun:.1f} s")


def all_well(process: Process) -> None:
    """Wait until there is no problem."""
    wait_for(lambda: (said := process.health())["status"] == "ok" and said["problems"] == [], PATIENCE_S, "no problem")


def name_of(client: Process) -> str:
    """How the server calls a client."""
    return f"127.0.0.1:{client.port}"


def test_a_client_that_is_gone(own_pair: Pair) -> None:
    """Its service can run nothing then: `deep=1` fails, for strangers too. All is well once it is back."""
    server, client = own_pair.server, own_pair.client
    all_well(server)
    assert server.get("/health?deep=1").status_code == 200
    client.kill()
    problem = shown(server, "client_gone")
    assert (problem["client"], problem["service"]) == (name_of(client), "example")
    assert "joborch client" in problem["remedy"]
    stopped = shown(server, "service_stopped", service="example")
    number = submit(server, "true")
    assert server.job(number)["waiting_for"].startswith("no client for example takes jobs: ")
    assert stopped["what"].startswith("no client for example takes jobs: "), "the job waits for it in the same words"
    assert server.get("/health").status_code == 200
    assert server.get("/health?deep=1").status_code == 503
    later = shown(server, "client_gone")
    assert later["since"] == problem["since"], "it is one problem"
    client.start()
    gone(server, "client_gone")
    gone(server, "service_stopped")
    all_well(server)
    assert wait_status(server, number, "Completed", limit_s=PATIENCE_S)


def test_a_client_that_hangs(own_pair: Pair) -> None:
    server, client = own_pair.server, own_pair.client
    all_well(server)
    os.kill(client.pid, signal.SIGSTOP)
    try:
        shown(server, "client_gone", client=name_of(client))
    finally:
        os.kill(client.pid, signal.SIGCONT)
    gone(server, "client_gone")


def test_a_client_that_demands_another_token(own_pair: Pair) -> None:
    server, client = own_pair.server, own_pair.client
    all_well(server)
    client.settings["JOBORCH_TOKEN"] = "another-token-for-tests-only"
    client.restart()
    problem = shown(server, "client_refuses", client=name_of(client))
    assert "SERVICE_EXAMPLE_TOKEN" in problem["remedy"] and "401" in problem["what"]
    client.settings["JOBORCH_TOKEN"] = Pair.TOKEN
    client.restart()
    gone(server, "client_refuses")


def test_a_client_that_demands_another_token_of_one_service(make_pair: MakePair) -> None:
    """Its other services go on; the jobs of this one wait with the name of its setting, and the service counts as stopped."""
    pair = make_pair()
    wrong = {"SERVICE_OTHER_CLIENTS": pair.client.url, "SERVICE_OTHER_TOKEN": "a-token-of-another-client"}
    pair.server.settings.update(wrong)
    server, client = pair.start().server, pair.client
    all_well(server)
    waits = submit(server, "true", service="other")
    problem = shown(server, "client_refuses", client=name_of(client), service="other")
    assert "SERVICE_OTHER_TOKEN" in problem["remedy"] and "401" in problem["what"]
    stopped = shown(server, "service_stopped", service="other")
    assert "answered 401: set SERVICE_OTHER_TOKEN" in stopped["what"]
    for _ in range(3):
        assert wait_status(server, submit(server, "true", service="example"), "Completed")
    assert "SERVICE_OTHER_TOKEN" in server.job(waits)["message"]
    assert {each["kind"] for each in server.health()["problems"]} == {"client_refuses", "service_stopped"}
    server.settings["SERVICE_OTHER_TOKEN"] = Pair.TOKEN
    server.restart()
    assert wait_status(server, waits, "Completed")["attempt"] == 1
    all_well(server)


def test_a_service_whose_clients_are_drained(own_pair: Pair) -> None:
    """It is not the client that has a problem then; what to do is to resume it."""
    server = own_pair.server
    all_well(server)
    server.post(f"/clients/{name_of(own_pair.client)}/drain")
    problem = shown(server, "service_stopped")
    assert "is drained" in problem["what"] and problem["remedy"].endswith("/resume")
    assert len(server.health()["problems"]) == 1
    server.post(f"/clients/{name_of(own_pair.client)}/resume")
    all_well(server)


@pytest.fixture
def disk(root: None, tmp_path: Path) -> Iterator[Disk]:
    """A small disk."""
    made = Disk(tmp_path / "disk", "size=24m")
    yield made
    made.close()


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_disk_that_is_full(role: str, disk: Disk, make_pair: MakePair) -> None:
    """The log has one line on it. A full client is a problem of its server, too: its service can run nothing."""
    pair = make_pair(**{role: {"DATA_PATH": str(disk.path / "data"), "JOBORCH_MIN_FREE": "4M"}}).start()
    process: Process = getattr(pair, role)
    all_well(pair.server)
    disk.fill(256)
    problem = shown(process, "disk_full", client=None)
    assert "JOBORCH_MIN_FREE" in problem["remedy"] and "MiB free" in problem["what"]
    assert process.get("/health?deep=1").status_code == 503
    assert process.log.count("uploads are refused: ") == 1
    if role == "server":
        assert upload(pair.server, {"run.sh": b"true"}).status_code == 507
    else:
        shown(pair.server, "disk_full", client=name_of(pair.client))
        shown(pair.server, "service_stopped")
    disk.free()
    gone(process, "disk_full")
    all_well(pair.server)


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_disk_that_takes_no_file_although_it_has_room(role: str, root: None, tmp_path: Path, make_pair: MakePair) -> None:
    """Its inodes are used up, as a quota may be: it is full all the same, and the log says why in one line."""
    disk = Disk(tmp_path / "disk", "size=64m,nr_inodes=600")
    try:
        pair = make_pair(**{role: {"DATA_PATH": str(disk.path / "data"), "DB_PATH": str(tmp_path / "elsewhere.db")}}).start()
        process: Process = getattr(pair, role)
        all_well(pair.server)
        names = count()

        def full(of: Process, client: str | None = None) -> list[dict[str, Any]]:
            with suppress(OSError):  # again and again: somebody may have deleted a file meanwhile
                while True:
                    (disk.path / f"filler-{next(names)}").touch()
            return problems(of, "disk_full", client=client)

        (problem, *_) = wait_for(lambda: full(process), PATIENCE_S, "a disk without inodes")
        assert "inodes or a quota" in problem["what"] and "delete files" in problem["remedy"] and problem["since"]
        wait_for(lambda: full(process) and process.get("/health?deep=1").status_code == 503, PATIENCE_S, "503")
        assert f"{disk.path / 'data'} takes no file, although" in process.log
        if role == "server":
            wait_for(lambda: full(process) and upload(process, {"run.sh": b"true"}).status_code == 507, PATIENCE_S, "507")
        else:
            wait_for(lambda: full(pair.server, name_of(pair.client)), PATIENCE_S, "the problem at the server")
        disk.free()
        gone(process, "disk_full")
        all_well(pair.server)
    finally:
        pair.close()
        disk.close()


def test_a_disk_that_became_read_only(root: None, tmp_path: Path, make_pair: MakePair) -> None:
    """As after an error of the hardware, while the database is elsewhere: a problem of its own, which stops uploads."""
    disk = Disk(tmp_path / "disk", "size=64m")
    try:
        pair = make_pair(server={"DATA_PATH": str(disk.path / "data"), "DB_PATH": str(tmp_path / "elsewhere.db")}).start()
        all_well(pair.server)
        command = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk.path / "data" / "tmp")]
        subprocess.run(command, check=True)
        problem = shown(pair.server, "disk", client=None)
        assert "Read-only file system" in problem["what"] and problem["what"].startswith("uploads are refused: ")
        assert pair.server.get("/health?deep=1").status_code == 503
        subprocess.run(["umount", str(disk.path / "data" / "tmp")], check=True)
        gone(pair.server, "disk")
        all_well(pair.server)
    finally:
        pair.close()
        disk.close()


def test_a_database_that_is_slow(own_pair: Pair) -> None:
    """Another program has locked it: /health answers all the same, and knows why nothing else is written."""
    server = own_pair.server
    all_well(server)
    with closing(sqlite3.connect(server.data / "joborch.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        problem = shown(server, "database")
        assert "database" in problem["what"] and "locks this file" in problem["remedy"]
        other.execute("ROLLBACK")
    gone(server, "database")
    all_well(server)


def test_a_database_whose_file_is_gone(own_pair: Pair) -> None:
    """That is an error, as ever: 503. When the file is put back, all is well."""
    server = own_pair.server
    all_well(server)
    file = server.data / "joborch.db"
    file.rename(file.with_suffix(".away"))
    wait_for(lambda: server.get("/health").status_code == 503, PATIENCE_S, "503")
    assert server.get("/health").json()["database"] == "error"
    assert "was removed or replaced" in shown(server, "database")["what"]
    file.with_suffix(".away").rename(file)
    all_well(server)


def test_a_client_whose_clock_is_off(make_pair: MakePair, tmp_path: Path) -> None:
    """Somebody sets it while the server waits for news: that ends the wait."""
    off = tmp_path / "off"
    off.write_text("0")
    pair = make_pair()
    pair.client.program = [sys.executable, str(ROOT / "tests" / "other_clock.py"), str(off)]
    pair.start()
    all_well(pair.server)
    off.write_text("-7200")
    problem = shown(pair.server, "clock", client=name_of(pair.client))
    assert "behind" in problem["what"] and "NTP" in problem["remedy"]
    off.write_text("0")
    gone(pair.server, "clock")
    all_well(pair.server)


SLURM_COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo")


def test_slurm_is_away_while_nothing_runs(make_pair: MakePair, tmp_path: Path) -> None:
    """Its commands say so, as Slurm's own do. The server hears of it, and of its end, without a job."""
    tools = tmp_path / "tools"
    tools.mkdir()

    def let_them_say(script: str) -> None:
        for name in SLURM_COMMANDS:
            (tools / f"{name}.new").write_text(f"#!/bin/sh\n{script}\n")
            (tools / f"{name}.new").chmod(0o755)
            (tools / f"{name}.new").rename(tools / name)

    let_them_say("exit 0")
    path = f"{tools}:{os.environ['PATH']}"
    pair = make_pair(client={"JOBORCH_EXECUTOR": "slurm", "PATH": path, "JOBORCH_BATCH_INTERVAL": "0.5"})
    pair.client.program = from_source(IDLE_LOOK_S=1.0)
    pair.start()
    all_well(pair.server)
    let_them_say("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert "Unable to contact" in shown(pair.client, "backend")["what"]
    assert "Unable to contact" in shown(pair.server, "backend", client=name_of(pair.client))["what"]
    shown(pair.server, "service_stopped")
    let_them_say("exit 0")
    gone(pair.client, "backend")
    all_well(pair.server)


def test_a_batch_system_is_asked_often_enough(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, /health shows within 5 s that it is away: the pause between two questions is shorter, and a change is shown at once."""
    config, woken = yard.client.config, list[str]()
    assert max(joborch.IDLE_LOOK_S, config.batch_interval_s) + config.run_interval_s < 5
    monkeypatch.setattr(yard.client, "wake", woken.append)
    for trouble in ("Slurm is away", "Slurm is away", "", ""):
        joborch.problem_since(yard.client, trouble)
    assert woken == ["health", "health"]


def login_that_ends_in(seconds: float) -> str:
    """What `dirac login` stores: an access token for an hour, and a refresh token that ends then."""
    claims = base64.urlsafe_b64encode(json.dumps({"exp": int(time.time() + seconds), "sub": "x:y"}).encode()).decode().rstrip("=")
    token = f"e30.{claims}.x"
    return json.dumps({"access_token": token, "refresh_token": token, "expires_on": int(time.time() + 3600)})


def test_a_login_that_ends_within_a_day(make_pair: MakePair, tmp_path: Path) -> None:
    """Nobody listens where DIRAC should be, which is a problem of its own. After a new login one of the two is over."""
    credentials = tmp_path / "credentials.json"
    credentials.write_text(login_that_ends_in(3 * 3600))
    credentials.chmod(0o600)
    client = {
        "JOBORCH_EXECUTOR": "dirac",
        "JOBORCH_DIRAC_URL": f"http://127.0.0.1:{free_port()}",
        "JOBORCH_DIRAC_CREDENTIALS": str(credentials),
        "JOBORCH_BATCH_INTERVAL": "0.5",
    }
    pair = make_pair(client=client).start()
    problem = shown(pair.server, "login", client=name_of(pair.client))
    assert "dirac" in problem["what"] and "log in again" in problem["remedy"]
    shown(pair.server, "backend", client=name_of(pair.client))
    credentials.write_text(login_that_ends_in(30 * 24 * 3600))
    gone(pair.server, "login")
    assert pair.client.log.count("WARNING the login for dirac ends in") == 1


def test_what_strangers_see(make_process: MakeProcess) -> None:
    """Whether all is well, and nothing else."""
    server = make_process("server", {"JOBORCH_TOKEN": "t" * 20, "SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    shown(server, "client_gone")
    assert server.get("/health").json() == {"status": "degraded", "database": "ok"}
    assert server.get("/health?deep=1").status_code == 503
    assert server.get("/health?deep=2").status_code == 400
    assert server.get("/metrics").status_code == 401


def test_doctor_says_what_a_running_server_says(own_pair: Pair) -> None:
    all_well(own_pair.server)
    own_pair.client.kill()
    problem = shown(own_pair.server, "client_gone")
    done = command(own_pair.server, "doctor", "server")
    assert done.returncode == 1
    assert "no client for example takes jobs: " in done.stdout and problem["remedy"] in done.stdout, done.stdout
