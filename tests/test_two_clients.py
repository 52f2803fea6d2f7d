"""Several clients as real processes: jobs are spread over them, one that hangs or is drained holds up nobody, wide jobs get their turn."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakePair, MakeProcess
from harness import Pair, Process, submit, wait_for, wait_status
from world import clients_of, gated, held

Clients = tuple[Process, Process, Process]


@pytest.fixture(name="three")
def three_fixture(make_pair: MakePair, make_process: MakeProcess) -> Clients:
    """A server and two clients with two slots each, all of them heard."""
    second = make_process("client", {"JOBORCH_TOKEN": Pair.TOKEN, "JOBORCH_SLOTS": "2"})
    pair = make_pair(client={"JOBORCH_SLOTS": "2"})
    pair.server.settings.update(
        SERVICE_EXAMPLE_CLIENTS=f"{pair.client.url},{second.url}", SERVICE_EXAMPLE_RUNS_PER_USER="50", SERVICE_EXAMPLE_MAX_RUNS="50"
    )
    second.spawn()
    server = pair.start().server
    wait_for(lambda: all(client["slots"] == 2 for client in clients_of(server).values()), what="both clients")
    return server, pair.client, second


def name(client: Process) -> str:
    """What the server calls a client."""
    return client.url.rpartition("/")[2]


def test_jobs_are_spread_over_the_clients(three: Clients, tmp_path: Path) -> None:
    server, first, second = three
    numbers = held(server, tmp_path / "gate", 4)
    assert Counter(server.job(number)["client"] for number in numbers) == {name(first): 2, name(second): 2}
    waiting = server.job(submit(server, "true", user_id=2))
    assert waiting["waiting_for"] == "all 4 slots of 2 clients are in use"
    (tmp_path / "gate").touch()
    for number in (*numbers, waiting["id"]):
        wait_status(server, number, "Completed")


def test_a_client_that_hangs_holds_up_nobody(three: Clients) -> None:
    """It takes what was on its way to it; all others run at the other client, and nothing is lost once it goes on."""
    server, first, _ = three
    os.kill(first.pid, signal.SIGSTOP)
    try:
        numbers = [submit(server, "true", user_id=user) for user in range(12)]

        def settled() -> bool:
            jobs = [server.job(number) for number in numbers]
            return all(job["status"] == "Completed" or job["client"] == name(first) for job in jobs)

        wait_for(settled, what="all but those on the way to the client that hangs")
        stuck = [number for number in numbers if server.job(number)["status"] != "Completed"]
        assert len(stuck) <= 3
    finally:
        os.kill(first.pid, signal.SIGCONT)
    for number in numbers:
        assert wait_status(server, number, "Completed", limit_s=60)["attempt"] == 1


def test_a_client_that_is_gone_is_named_in_the_reason(three: Clients) -> None:
    server, first, second = three
    first.kill()
    number = submit(server, "true")
    assert wait_status(server, number, "Completed", limit_s=30)["client"] == name(second)
    second.kill()

    def reason() -> str:
        return str(server.job(waiting)["waiting_for"])

    waiting = submit(server, "true")
    wait_for(lambda: reason().startswith("no client for example takes jobs") and reason().count("connection refused") == 2, 30, "both")
    assert {bool(client["trouble"]) for client in clients_of(server).values()} == {True}
    second.start()
    wait_status(server, waiting, "Completed", limit_s=60)


def test_drain_and_resume(three: Clients, tmp_path: Path) -> None:
    """What runs goes on, nothing new is sent, not even by a server that was started again."""
    server, first, second = three
    running = held(server, tmp_path / "gate", 2)
    said = server.post(f"/clients/{name(first)}/drain")
    assert said.status_code == 200 and said.json()["drained"] is True
    server.kill()
    server.start()
    wait_for(lambda: clients_of(server)[name(second)]["slots"] == 2, what="the other one")
    numbers = [submit(server, "true", user_id=user) for user in range(4)]
    for number in numbers:
        assert wait_status(server, number, "Completed")["client"] == name(second)
    (tmp_path / "gate").touch()
    for number in running:
        wait_status(server, number, "Completed")
    server.post(f"/clients/{name(second)}/drain")
    waiting = submit(server, "true")
    assert server.job(waiting)["waiting_for"].count("is drained") == 2
    server.post(f"/clients/{name(first)}/resume")
    assert wait_status(server, waiting, "Completed")["client"] == name(first)


def test_a_wide_job_is_not_starved_by_narrow_ones(three: Clients, tmp_path: Path) -> None:
    """Narrow jobs come all the time; the wide one reserves a client, and runs alone there."""
    server, _, _ = three
    gates = [tmp_path / f"gate{number}" for number in range(4)]
    first_ones = [submit(server, gated(gate), user_id=1) for gate in gates]
    for number in first_ones:
        wait_status(server, number, "Running")
    wide = submit(server, "echo $JOBORCH_CPUS", user_id=2, cpus=2)
    narrow = [submit(server, "true", user_id=1) for _ in range(10)]
    text = server.job(wide)["waiting_for"]
    assert text == "all 4 slots of 2 clients are in use"
    for gate in gates[:3]:
        gate.touch()
    assert wait_status(server, wide, "Completed")["attempt"] == 1
    gates[3].touch()
    for number in (*first_ones, *narrow):
        wait_status(server, number, "Completed")
    too_wide = server.post("/upload", files={"file": ("run.sh", b"true")}, data={"user_id": "1", "service": "example", "cpus": "3"})
    assert too_wide.status_code == 400 and "has 2 slots" in too_wide.json()["message"]


def test_slots_are_cpus_at_the_client_too(make_pair: MakePair, tmp_path: Path) -> None:
    """Two jobs that ask for two of three slots run one after another."""
    pair = make_pair(client={"JOBORCH_SLOTS": "3"}).start()
    server = pair.server
    wait_for(lambda: server.get("/clients").json()["clients"][0]["slots"] == 3, what="the client")
    held(server, tmp_path / "gate", 1, cpus=2)
    other = submit(server, "true", user_id=2, cpus=2)
    quick = submit(server, "true", user_id=3, timeout=1)
    assert server.job(other)["status"] == "Queued"
    (tmp_path / "gate").touch()
    for number in (other, quick):
        wait_status(server, number, "Completed")


@pytest.mark.parametrize("kill", [lambda server: server.kill(), lambda server: None], ids=["restart", "no restart"])
def test_a_chain_of_jobs_runs_in_its_order(kill: Callable[[Process], None], three: Clients, tmp_path: Path) -> None:
    """Over the death of the server too; a chain that breaks says where."""
    server, _, _ = three
    log = tmp_path / "order"
    first = submit(server, f"{gated(tmp_path / 'gate')}; echo 1 >> {log}")
    second = submit(server, f"echo 2 >> {log}", after=first)
    third = submit(server, f"echo 3 >> {log}", after=f"{first},{second}")
    broken = submit(server, "exit 3", after=first)
    last = submit(server, f"echo 4 >> {log}", after=f"{third},{broken}")
    wait_status(server, first, "Running")
    kill(server)
    if server.process is not None and server.process.poll() is not None:
        server.start()
    (tmp_path / "gate").touch()
    wait_status(server, third, "Completed")
    assert log.read_text() == "1\n2\n3\n"
    ended = wait_status(server, last, "Invalid")
    assert (ended["reason"], ended["cause"]) == (f"job {broken}, which it follows, ended as Failed", "user")
    assert ended["after"] == sorted([third, broken])
