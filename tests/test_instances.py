"""A client is its instance, not its URL; what it ends, and how, is told once and believed everywhere."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import requests
from conftest import MakePair, MakeProcess
from harness import LinkCaller, Pair, Process, download, end_all_below, processes_below, program_text, submit, wait_for, wait_status
from proxy import Proxy
from world import Site, Yard, ask, clients_of, command, held

from joborch import Cause, DataFolder, Job, Outcome, Status, end_tick, run_tick, take_for_ending

LIMITS = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "50"}


def by_name(client: Process) -> str:
    """The client's URL with the machine's name in it, not its address."""
    return client.url.replace("127.0.0.1", "localhost")


def called(url: str) -> str:
    """What a server calls the client at a URL."""
    return url.partition("://")[2]


def attempts(job: dict[str, object]) -> tuple[object, object]:
    """How a job stands, and in which attempt."""
    return job["status"], job["attempt"]


@pytest.fixture(name="named_twice")
def named_twice_fixture(make_pair: MakePair) -> Pair:
    """A server whose two services reach one client, with two slots, each by another name; a third service has both."""
    pair = make_pair(server=LIMITS, client={"JOBORCH_SLOTS": "2"})
    other = by_name(pair.client)
    for service, urls in (("DOCKING", other), ("BOTH", f"{pair.client.url},{other}")):
        pair.server.settings.update({
            f"SERVICE_{service}_CLIENTS": urls, f"SERVICE_{service}_TOKEN": Pair.TOKEN, f"SERVICE_{service}_MAX_RUNS": "50",
            f"SERVICE_{service}_RUNS_PER_USER": "50",
        })  # fmt: skip
    pair.start()
    wait_for(lambda: all(client["instance"] for client in clients_of(pair.server).values()), what="both names")
    return pair


def test_two_names_of_one_client_end_no_job(named_twice: Pair, tmp_path: Path) -> None:
    server, gate = named_twice.server, tmp_path / "gate"
    jobs = [*held(server, gate, 1), *held(server, gate, 1, service="docking")]
    queued = submit(server, "echo done > out", service="both")
    gate.touch()
    for number in (*jobs, queued):
        assert attempts(wait_status(server, number, "Completed")) == ("Completed", 1)
    assert download(server, queued).text("out") == "done\n"


def test_its_slots_count_once(named_twice: Pair, tmp_path: Path) -> None:
    """Whichever service sends: the third job waits at the server, and says why."""
    server, gate = named_twice.server, tmp_path / "gate"
    jobs = [*held(server, gate, 1), *held(server, gate, 1, service="docking")]
    third = submit(server, "true", service="both")
    said = server.job(third)
    assert (said["status"], said["client"]) == ("Queued", None)
    assert said["waiting_for"] == f"all 2 slots of {called(named_twice.client.url)} are in use"
    assert [client["free"] for client in clients_of(server).values()] == [0, 0]
    gate.touch()
    for number in (*jobs, third):
        wait_status(server, number, "Completed")


def test_two_names_are_told(named_twice: Pair) -> None:
    server = named_twice.server
    first, second = called(named_twice.client.url), called(by_name(named_twice.client))
    clients = clients_of(server)
    assert clients[first]["same_client_as"] == [second]
    assert clients[second]["same_client_as"] == [first]
    assert "are one client with two URLs: its slots are counted once" in server.log
    drained = server.post(f"/clients/{second}/drain")
    assert drained.status_code == 200
    assert all(client["drained"] for client in clients_of(server).values())


def doctor(server: Process) -> str:
    """What `doctor server` says with a server's settings."""
    return command(server, "doctor", "server").stdout


def test_doctor_says_that_two_names_are_one_client(named_twice: Pair) -> None:
    first, second = called(named_twice.client.url), called(by_name(named_twice.client))
    assert f"{first} and {second} are one client" in doctor(named_twice.server)


def test_a_client_goes_on_at_a_new_address(make_pair: MakePair, tmp_path: Path) -> None:
    """The setting is edited and the server restarted: what runs goes on, what ended meanwhile is fetched."""
    pair, gate, other_gate = make_pair(server=LIMITS, client={"JOBORCH_SLOTS": "4"}).start(), tmp_path / "gate", tmp_path / "other"
    (running,), (ending,) = held(pair.server, gate, 1), held(pair.server, other_gate, 1)
    pair.server.kill()
    other_gate.touch()
    wait_for(lambda: pair.client.health()["running"] == 1, what="the end of the second")
    pair.server.settings["SERVICE_EXAMPLE_CLIENTS"] = by_name(pair.client)
    pair.server.start()
    assert attempts(wait_status(pair.server, ending, "Completed")) == ("Completed", 1)
    moved = wait_for(lambda: pair.server.job(running) if pair.server.job(running)["client"].startswith("localhost") else None)
    assert attempts(moved) == ("Running", 1)
    gate.touch()
    assert attempts(wait_status(pair.server, running, "Completed")) == ("Completed", 1)


@pytest.fixture(name="by_proxy")
def by_proxy_fixture(make_pair: MakePair) -> Iterator[tuple[Pair, Proxy]]:
    """A server that reaches its client through a port forward."""
    pair = make_pair(server={**LIMITS, "SERVICE_EXAMPLE_LOST_AFTER": "2"}, client={"JOBORCH_SLOTS": "4"})
    with Proxy(pair.client.port) as proxy:
        pair.server.settings["SERVICE_EXAMPLE_CLIENTS"] = proxy.url
        yield pair, proxy


def test_the_old_address_falls_silent(by_proxy: tuple[Pair, Proxy], tmp_path: Path) -> None:
    """Both addresses are listed: the jobs of the silent one go on under the other one's name."""
    pair, proxy = by_proxy
    pair.server.settings.update(SERVICE_EXAMPLE_CLIENTS=f"{proxy.url},{pair.client.url}", SERVICE_EXAMPLE_MAX_RUNS="50")
    pair.start()
    wait_for(lambda: all(client["instance"] for client in clients_of(pair.server).values()), what="both names")
    gates = [tmp_path / f"gate{number}" for number in range(4)]
    jobs = [number for gate in gates for number in held(pair.server, gate, 1)]
    proxy.close()
    wait_for(lambda: {pair.server.job(number)["client"] for number in jobs} == {called(pair.client.url)}, what="one name for all")
    assert pair.server.post(f"/terminate/{jobs[0]}").json()["status"] == "Killed"
    for gate in gates:
        gate.touch()
    for number in jobs[1:]:
        assert attempts(wait_status(pair.server, number, "Completed")) == ("Completed", 1)


def test_addresses_that_are_exchanged(make_pair: MakePair, make_process: MakeProcess, tmp_path: Path) -> None:
    """A client goes on at another's address, and another one at its own: each job goes on where it is."""
    second = make_process("client", {"JOBORCH_TOKEN": Pair.TOKEN, "JOBORCH_SLOTS": "2"})
    pair = make_pair(server=LIMITS, client={"JOBORCH_SLOTS": "2"})
    pair.server.settings["SERVICE_EXAMPLE_CLIENTS"] = f"{pair.client.url},{second.url}"
    second.spawn()
    pair.start()
    wait_for(lambda: all(client["slots"] == 2 for client in clients_of(pair.server).values()), what="both clients")
    jobs = held(pair.server, tmp_path / "gate", 4)
    before = {number: pair.server.job(number)["client"] for number in jobs}
    for process in (pair.server, pair.client, second):
        process.kill()
    pair.client.port, second.port = second.port, pair.client.port
    for process in (pair.server, pair.client, second):
        process.start()
    names = {called(pair.client.url): called(second.url), called(second.url): called(pair.client.url)}
    wait_for(lambda: all(pair.server.job(number)["client"] == names[before[number]] for number in jobs), what="the new names")
    (tmp_path / "gate").touch()
    for number in jobs:
        assert attempts(wait_status(pair.server, number, "Completed")) == ("Completed", 1)


def test_two_clients_stay_two(make_pair: MakePair, make_process: MakeProcess, tmp_path: Path) -> None:
    second = make_process("client", {"JOBORCH_TOKEN": Pair.TOKEN, "JOBORCH_SLOTS": "1"})
    pair = make_pair(server=LIMITS, client={"JOBORCH_SLOTS": "1"})
    pair.server.settings["SERVICE_EXAMPLE_CLIENTS"] = f"{pair.client.url},{second.url}"
    second.spawn()
    pair.start()
    jobs = held(pair.server, tmp_path / "gate", 2)
    clients = clients_of(pair.server).values()
    assert len({client["instance"] for client in clients}) == 2
    assert [client["same_client_as"] for client in clients] == [[], []]
    assert "one client" not in doctor(pair.server)
    (tmp_path / "gate").touch()
    for number in jobs:
        wait_status(pair.server, number, "Completed")


def test_a_copied_data_folder_is_noticed(make_pair: MakePair, make_process: MakeProcess, tmp_path: Path) -> None:
    """Two processes say that they are one instance: one of them gets no jobs, the log says why, and nothing that runs is ended."""
    second = make_process("client", {"JOBORCH_TOKEN": Pair.TOKEN, "JOBORCH_SLOTS": "1"})
    pair = make_pair(server=LIMITS, client={"JOBORCH_SLOTS": "1"})
    pair.client.start()
    pair.client.stop()
    shutil.copytree(pair.client.data, second.data, dirs_exist_ok=True)
    pair.server.settings["SERVICE_EXAMPLE_CLIENTS"] = f"{pair.client.url},{second.url}"
    pair.start()
    (running,) = held(pair.server, tmp_path / "gate", 1)
    second.start()
    trouble = wait_for(lambda: str(clients_of(pair.server)[called(second.url)]["trouble"]), what="what is said of the copy")
    wait_for(lambda: "copy of the data folder" in str(clients_of(pair.server)[called(second.url)]["trouble"]), what=f"not {trouble}")
    assert "copy of the data folder of " + called(pair.client.url) in pair.server.log
    assert "copies of one data folder" in doctor(pair.server)
    assert pair.server.job(running)["status"] == "Running"
    waiting = submit(pair.server, "true", user_id=2)
    assert pair.server.job(waiting)["status"] == "Queued", "the copy gets nothing"
    (tmp_path / "gate").touch()
    for number in (running, waiting):
        assert attempts(wait_status(pair.server, number, "Completed")) == ("Completed", 1)


# == What is to end ==

DEAF = "trap '' TERM; sleep 1000"  # it heeds no TERM, and nor does what it starts


def test_an_end_that_a_batch_system_only_notes_keeps_nobody_waiting(data: DataFolder) -> None:
    """DIRAC's pilot may take 45 minutes; the note says what is waited for, to a server of ours by /events."""
    site = Site(data)
    client = site.yard.client
    job = site.submit()
    site.tick()
    site.system.stubborn.add(job.id)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client, "POST", f"/kill/{job.id}")
        wait_for(lambda: site.yard[job].kill_requested_at is not None, what="the wish")
        end_tick(client)
        assert asked.result(timeout=20).status == 202
    assert site.told(job)[1].startswith("it is being stopped: ")
    site.yard.store.close()


def mark_of(server: Process, number: int) -> str:
    """What a job's attempt is called at its client."""
    job = server.job(number)
    return f"{job['uuid']}.{job['attempt']}"


def test_all_that_shall_end_is_ended_at_once(make_pair: MakePair) -> None:
    """None waits for another one's grace time, and the client is not taken for one that fails."""
    pair = make_pair(
        server={**LIMITS, "SERVICE_EXAMPLE_RUNS_PER_USER": "50"}, client={"JOBORCH_SLOTS": "31", "JOBORCH_KILL_GRACE": "600"}
    ).start()
    numbers = [submit(pair.server, DEAF) for _ in range(30)]
    for number in numbers:
        wait_status(pair.server, number, "Running")
    folders = [pair.client.data / "jobs" / mark_of(pair.server, number) for number in numbers]
    with ThreadPoolExecutor(len(numbers)) as pool:
        answers = [pool.submit(requests.post, f"{pair.server.url}/terminate/{number}", timeout=120) for number in numbers]
        wait_for(lambda: all((folder / "ending.1").exists() for folder in folders), what="the end of all has begun")
        assert pair.client.health()["running"] == 30
        other = wait_status(pair.server, submit(pair.server, "sleep 1000"), "Running")["id"]
        assert pair.server.post(f"/terminate/{other}").status_code in (200, 202), "with many callers not each one is let wait"
        wait_status(pair.server, other, "Killed")
        for folder in folders:
            end_all_below(folder)
        assert {answer.result().status_code for answer in answers} <= {200, 202}
    for number in numbers:
        assert wait_status(pair.server, number, "Killed")["cause"] == "cancelled"
    (client,) = clients_of(pair.server).values()
    assert (client["trouble"], client["reachable"]) == ("", True)


def test_only_a_22_server_is_kept_waiting_for_an_end(make_process: MakeProcess) -> None:
    client = make_process("client", {"JOBORCH_TOKEN": Pair.TOKEN, "JOBORCH_KILL_GRACE": "600"}).start()
    files, plain = {"file": ("run.sh", DEAF)}, {"Authorization": f"Bearer {Pair.TOKEN}"}
    payload = client.post("/submit", files=files, headers=plain).json()["id"]
    wait_for(lambda: processes_below(Path(client.get(f"/retrieve/{payload}", headers=plain).json()["loc"])), what="its start")
    folder = Path(client.get(f"/retrieve/{payload}", headers=plain).json()["loc"])
    link = LinkCaller(client).hello()
    ours = link.call("POST", f"/kill/{payload}", headers={"X-Joborch-Mark": folder.name}, timeout=20)
    assert (ours.status_code, ours.json()["killed"]) == (202, True)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(requests.post, f"{client.url}/kill/{payload}", headers=plain, timeout=120)
        wait_for((folder / "ending.1").exists, what="the end has begun")
        end_all_below(folder)
        assert (theirs.result().status_code, theirs.result().json()["status"]) == (200, "Killed")


def away(pair: Pair) -> float:
    """Have the client away until its back-off is long; return how long it is held back now."""
    pair.client.kill()

    def long() -> float:
        (client,) = clients_of(pair.server).values()
        return float(str(client["held_for_s"])) if float(str(client["held_for_s"])) > 6 else 0.0

    return wait_for(long, 60, "a long back-off")


def test_a_terminate_tries_a_client_that_is_back(own_pair: Pair, tmp_path: Path) -> None:
    (number,) = held(own_pair.server, tmp_path / "gate", 1)
    held_s, begun = away(own_pair), time.monotonic()
    own_pair.client.start()
    answer = own_pair.server.post(f"/terminate/{number}")
    assert (answer.status_code, answer.json()["status"]) == (200, "Killed")
    assert time.monotonic() - begun < held_s


def test_a_client_where_something_is_to_end_is_tried_often(own_pair: Pair, tmp_path: Path) -> None:
    """It comes back after the terminate, and long before its back-off is over."""
    (number,) = held(own_pair.server, tmp_path / "gate", 1)
    held_s, begun = away(own_pair), time.monotonic()
    assert own_pair.server.post(f"/terminate/{number}").status_code == 202
    own_pair.client.start()
    wait_status(own_pair.server, number, "Killed")
    assert time.monotonic() - begun < held_s


# == How it ended ==


@pytest.mark.parametrize(
    ("script", "fields", "wanted", "reason"),
    [
        ("exit 3", {}, ("Failed", "user", 1), "exit status 3"),
        ("sleep 1000", {"timeout": 1}, ("Failed", "limit", 1), "time limit"),
        ("echo done > out", {}, ("Completed", None, 2), ""),
    ],
)
def test_what_a_client_cleaned_while_the_server_was_away(
    script: str, fields: dict[str, int], wanted: tuple[object, ...], reason: str, make_pair: MakePair, tmp_path: Path
) -> None:
    """How a script failed stands, though its files are gone; a result that is lost is made again."""
    pair = make_pair(client={"MAX_AGE": "1", "JOBORCH_CLEAN_INTERVAL": "0.2"}).start()
    first = f"[ -e {tmp_path}/again ] || until [ -e {tmp_path}/gate ]; do sleep 0.05; done; touch {tmp_path}/again; "
    number = submit(pair.server, first + script, **fields)
    wait_status(pair.server, number, "Running")
    folder = pair.client.data / "jobs" / mark_of(pair.server, number)
    pair.server.kill()
    (tmp_path / "gate").touch()
    wait_for(lambda: not folder.exists(), what="the folder is cleaned")
    pair.server.start()
    job = wait_status(pair.server, number, "Completed", "Failed")
    assert (job["status"], job["cause"], job["attempt"]) == wanted
    assert reason in job["reason"]
    if job["attempt"] == 1:
        assert "no longer has its files" in job["reason"]


def test_an_end_is_judged_by_a_row_that_knows_of_the_kill(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill comes between the look at the rows and the look at the processes: what it ended is Killed, not Failed by its script."""
    job = yard.submit("READY; sleep 1000")
    run_tick(yard.client)
    yard.ready(job)
    real, killed = yard.client.executor.poll, []

    def poll(jobs: Sequence[Job]) -> dict[int, Outcome]:
        if jobs and not killed:
            killed.append(yard.store.request_kill(job.id, Cause.CANCELLED))
            ending = take_for_ending(yard.client)
            assert ending
            (yard.folder(job) / "ending.1").touch()
            yard.client.executor.cancel(ending)
            yard.client.payloads.give_back(job.id)
        return real(jobs)

    monkeypatch.setattr(yard.client.executor, "poll", poll)
    yard.client.needs_looks = True  # at all that run, as from time to time
    run_tick(yard.client)
    assert killed == [True]
    end_tick(yard.client)
    assert (yard[job.id].status, yard[job.id].cause) == (Status.KILLED, "cancelled")


POINTS = sorted(set(re.findall(r'crash_point\("(restore\.\w+)"\)', program_text())))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_a_crash_in_a_restore(point: str, again: bool, own_pair: Pair, tmp_path: Path) -> None:
    """The server has all of the old database, its WAL too, or all of the backup; each job that it knows has its files."""
    server, backup = own_pair.server, str(tmp_path / "backup.db")
    before = wait_status(server, submit(server, "echo 1 > out"), "Completed")["id"]
    assert command(server, "backup", backup).returncode == 0
    later = wait_status(server, submit(server, "echo 2 > out"), "Completed")["id"]
    server.kill()
    assert (server.data / "joborch.db-wal").stat().st_size > 0, "what came last is in the WAL alone"
    server.settings["JOBORCH_TEST_CRASH"] = point
    assert command(server, "restore", backup).returncode == -signal.SIGKILL
    server.settings["JOBORCH_TEST_CRASH"] = None
    if again:
        assert command(server, "restore", backup).returncode == 0
    server.start()
    jobs = {job["id"] for job in server.jobs()}
    assert jobs == ({before, later} if point == "restore.copied" and not again else {before})
    for number, text in ((before, "1\n"), (later, "2\n")):
        if number in jobs:
            assert download(server, number).text("out") == text
    assert not list(server.data.glob("*.restor*")), "nothing is left half done"
    kept = list(server.data.glob("joborch.db.replaced-*[0-9a-f]"))
    rows = [{row[0] for row in closing_rows(path)} for path in kept]
    assert jobs == {before, later} or {before, later} in rows, "the old database is kept, with what was in its WAL"


def closing_rows(path: Path) -> list[tuple[int]]:
    """The ids of the jobs in a database."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT id FROM jobs").fetchall()
