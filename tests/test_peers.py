"""Sites may swap one for the other: our server drives a 2.2 client, a 2.2 server drives our client."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    ENDED,
    Archive,
    Process,
    alive,
    assert_error,
    download,
    field_part,
    form,
    form_type,
    free_port,
    nothing_left,
    partial,
    run_to_end,
    submit,
    upload,
    wait_for,
    wait_status,
)
from peers import TRAP, Client22, Server22


def test_the_peers_understand_each_other(tmp_path: Path) -> None:
    """The stand-ins are true to each other: folders are flattened, the trap is needed, ids begin at 1."""
    client = Client22(tmp_path / "client22").start()
    try:
        with closing(Server22(client.url)) as server:
            done = server.upload({"run.sh": f"{TRAP}\ncat 'a b.txt' > out.txt\n".encode(), "in put/a b.txt": b"content"})
            assert (done.dest_id, server.wait(done)) == (1, "Completed")
            assert Archive(done.result)["out.txt"] == b"content"
            assert server.wait(server.upload({"run.sh": f"{TRAP}\nexit 3\n".encode()})) == "Failed"
            assert server.wait(server.upload({"run.sh": b"true\n"})) == "Invalid"
            endless = server.upload({"run.sh": f"{TRAP}\nwhile :; do sleep 0.1; done\n".encode()})
            wait_for(lambda: endless.status == "Running", what="the script's start")
            server.terminate(endless)
            assert server.wait(endless) == "Killed"
    finally:
        client.stop()


# == Our server, a 2.2 client ==


@pytest.fixture
def client22(tmp_path: Path) -> Iterator[Client22]:
    """A 2.2 client."""
    client = Client22(tmp_path / "client22").start()
    yield client
    client.stop()


@pytest.fixture
def server(client22: Client22, make_process: MakeProcess) -> Process:
    """Our server, told of the 2.2 client by the three URLs of the reference."""
    urls: dict[str, str | None] = {
        "SERVICE_EXAMPLE_UPLOAD_URL": f"{client22.url}/submit",
        "SERVICE_EXAMPLE_DOWNLOAD_URL": f"{client22.url}/retrieve",
        "SERVICE_EXAMPLE_TERMINATE_URL": f"{client22.url}/kill",
    }
    return make_process("server", urls).start()


def test_job_through_a_22_client(server: Process) -> None:
    """Upload, run and download; the client's flattened folders are the result, as it sent it."""
    script = f"{TRAP}\nset -e\ncat 'two words.txt' a.txt > out.txt\n"
    job = run_to_end(server, script, {"two words.txt": b"two ", "inputs/a.txt": b"words"})
    assert job["status"] == "Completed", job
    result = download(server, job["id"])
    assert result["out.txt"] == b"two words"
    assert {"run.sh", "two words.txt", "a.txt", "out.txt"} <= result.names()
    assert job["dest_id"] == "1"


def test_big_input_through_a_22_client(server: Process, client22: Client22) -> None:
    """/submit echoes 3 MB as 10 MB of numbers: our server reads the part that holds the id."""
    content = bytes(range(256)) * 12_000
    job = run_to_end(server, f"{TRAP}\ncksum < big.bin > sum.txt\n", {"big.bin": content})
    assert job["status"] == "Completed", job
    assert download(server, job["id"])["big.bin"] == content
    assert client22.starts == 1


def test_failure_at_a_22_client(server: Process) -> None:
    """Failed, and what the client has of it is fetched all the same."""
    job = run_to_end(server, f"{TRAP}\necho kept > kept.txt\nexit 3\n")
    assert (job["status"], job["attempt"]) == ("Failed", 1), job
    assert server.head(f"/download/{job['id']}").status_code == 204
    assert partial(server, job["id"])["kept.txt"] == b"kept\n"


def test_script_without_the_trap_at_a_22_client(server: Process) -> None:
    """2.2 calls it Invalid; so do we, with a reason."""
    job = run_to_end(server, "echo no trap\n")
    assert job["status"] == "Invalid", job
    assert job["reason"]


def test_two_files_of_one_base_name_for_a_22_client(server: Process, client22: Client22) -> None:
    """It would lose one of them: Invalid with that reason, and nothing was run."""
    number = submit(server, f"{TRAP}\ntrue\n", {"a/same.txt": b"1", "b/same.txt": b"2"})
    job = wait_status(server, number, *ENDED)
    assert job["status"] == "Invalid", job
    assert "same.txt" in job["reason"]
    assert client22.starts == 0


def test_results_of_other_jobs_for_a_22_client(server: Process) -> None:
    """The folder from/ID/ would not arrive: an upload says so, and so does a retry."""
    first = run_to_end(server, f"{TRAP}\necho 1 > out\n")["id"]
    with nothing_left(server):
        said = assert_error(upload(server, {"run.sh": b"true"}, inputs_from=first), 400, "2.2 client", "flattens folders")
        assert said["field"] == "inputs_from"
        body = form([field_part("inputs_from", f"{first}")])
        assert_error(server.post(f"/jobs/{first}/retry", data=body, headers=form_type()), 400, "2.2 client")


def test_results_of_other_jobs_for_a_22_client_that_comes_later(make_pair: MakePair, tmp_path: Path) -> None:
    """Nobody knew it when the job was uploaded: the job is Invalid with that reason, and was not run there."""
    port = free_port()
    pair = make_pair(server={"SERVICE_LATER_CLIENTS": f"http://127.0.0.1:{port}", "SERVICE_LATER_PEER": "2.2"}).start()
    first = run_to_end(pair.server, "echo 1 > out")["id"]
    number = submit(pair.server, f"{TRAP}\ntrue\n", service="later", inputs_from=first)
    client = Client22(tmp_path / "client22", port).start()
    try:
        job = wait_status(pair.server, number, "Invalid", limit_s=90)
        assert "flattens folders" in job["reason"], job
        assert client.starts == 0
    finally:
        client.stop()


def test_terminate_at_a_22_client(server: Process, client22: Client22, tmp_path: Path) -> None:
    """/kill answers before the process is gone: 200 Killed comes only once the client says so."""
    pid_file = tmp_path / "pid"
    script = f"{TRAP}\necho $$ > {pid_file}\nfor i in $(seq 1000); do sleep 0.1; done\n"
    number = submit(server, script)
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip(), what="the script's start")
    wait_status(server, number, "Running", "Submitted")
    answer = server.post(f"/terminate/{number}")
    assert answer.status_code in (200, 202)
    job = wait_status(server, number, "Killed")
    assert client22.find(1).status == "Killed"  # type: ignore[union-attr]
    wait_for(lambda: not alive(int(pid_file.read_text())), what="the process gone")
    assert job["cause"] == "cancelled"
    assert ("POST", "/kill/1") in client22.asked


def test_polls_of_a_22_client_are_gentle(server: Process, client22: Client22, tmp_path: Path) -> None:
    """At most some five requests a second and job; what it lacks is asked for seldom."""
    gate = tmp_path / "gate"
    number = submit(server, f"{TRAP}\nwhile [ ! -e {gate} ]; do sleep 0.05; done\n")
    wait_status(server, number, "Running")
    began, before = time.monotonic(), len(client22.asked)
    wait_for(lambda: time.monotonic() - began > 3, what="three seconds of polling")
    asked = client22.asked[before:]
    assert len([path for _, path in asked if path.startswith("/retrieve")]) <= 5 * 3 + 3, asked
    assert len([path for _, path in asked if not path.startswith("/retrieve")]) <= 6, asked
    gate.touch()
    wait_status(server, number, "Completed")


def test_22_client_that_forgot_everything(make_process: MakeProcess, tmp_path: Path) -> None:
    """It restarted and numbers from 1 again: no job takes another job's result, both get a result of their own."""
    first = Client22(tmp_path / "client22").start()
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": first.url, "SERVICE_EXAMPLE_PEER": "2.2"}).start()
    gate = tmp_path / "gate"
    waits = f"{TRAP}\nwhile [ ! -e {gate} ]; do sleep 0.05; done\n"
    one = submit(server, f"{waits}echo one > out.txt\n", user_id=1)
    wait_status(server, one, "Running")
    first.stop()
    second = Client22(tmp_path / "client22", first.port).start()
    try:
        two = submit(server, f"{waits}echo two > out.txt\n", user_id=2)
        wait_for(lambda: len(second.payloads) == 2, 40, "both jobs sent to the new client")
        gate.touch()
        for number, word in ((one, "one"), (two, "two")):
            wait_status(server, number, "Completed", limit_s=40)
            assert download(server, number).text("out.txt") == f"{word}\n"
        moves = [f"{each['at'][17:23]} {each['to']}: {each['reason']}" for each in server.job(one)["history"]]
        assert server.job(one)["attempt"] == 2, "\n".join(moves)
    finally:
        second.stop()


def test_22_client_that_closes_connections_late(make_process: MakeProcess, tmp_path: Path) -> None:
    """A call that takes its last connection would be lost."""
    client = Client22(tmp_path / "client22")
    client.closes_late_s = 5.0
    client.start()
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": client.url, "SERVICE_EXAMPLE_PEER": "2.2"}).start()
    try:
        for number in [submit(server, f"{TRAP}\ntrue\n", user_id=user) for user in range(3)]:
            wait_status(server, number, "Completed")
            assert server.job(number)["attempt"] == 1
    finally:
        client.stop()


def test_22_client_that_comes_later(make_process: MakeProcess, tmp_path: Path) -> None:
    """A job waits for a client that is away, says so, and runs when it comes."""
    port = free_port()
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{port}", "SERVICE_EXAMPLE_PEER": "2.2"}).start()
    number = submit(server, f"{TRAP}\ntrue\n")
    wait_for(lambda: server.job(number)["waiting_for"], what="a reason to wait")
    client = Client22(tmp_path / "client22", port).start()
    try:
        assert wait_status(server, number, "Completed", limit_s=60)["attempt"] == 1
        assert client.starts == 1
    finally:
        client.stop()


def test_22_client_met_after_the_program_is_gone(pyz: Path, make_process: MakeProcess, tmp_path: Path) -> None:
    """A server that may meet one has imported all that it needs, so it survives that joborch.pyz and its copy are removed."""
    archive, port = Path(shutil.copy(pyz, tmp_path / "joborch.pyz")), free_port()
    settings: dict[str, str | None] = {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{port}", "SERVICE_EXAMPLE_PEER": "2.2"}
    server = make_process("server", settings, program=[sys.executable, str(archive)]).start()
    assert server.home is not None
    shutil.rmtree(server.home / ".cache")
    archive.unlink()
    number = submit(server, f"{TRAP}\necho kept > out.txt\n")
    client = Client22(tmp_path / "client22", port).start()
    try:
        wait_status(server, number, "Completed", limit_s=60)
        assert download(server, number).text("out.txt") == "kept\n"
        assert "Traceback" not in server.log
    finally:
        client.stop()


# == A 2.2 server, our client ==


@pytest.fixture
def client(make_process: MakeProcess) -> Process:
    """Our client, which serves callers without a token knowingly."""
    return make_process("client", {"JOBORCH_ALLOW_ANONYMOUS": "1", "JOBORCH_SLOTS": "4"}).start()


@pytest.fixture
def server22(client: Process) -> Iterator[Server22]:
    """A 2.2 server that sends to it."""
    server = Server22(client.url)
    yield server
    server.close()


def test_22_server_runs_a_job(server22: Server22) -> None:
    """Names with blanks, folders, percent signs, umlauts; two files of one base name: all arrive under their paths."""
    names = "'two words.txt' inputs/same.txt 'other place/same.txt' 'ein ä.txt' '100%.txt'"
    files = {
        "run.sh": f"set -e\ncat {names} > out.txt\n".encode(),
        "two words.txt": b"1",
        "inputs/same.txt": b"2",
        "other place/same.txt": b"3",
        "ein ä.txt": b"4",
        "100%.txt": b"5",
    }
    job = server22.upload(files)
    assert server22.wait(job) == "Completed", job.statuses
    result = Archive(job.result)
    assert result["out.txt"] == b"12345"
    assert set(files) <= result.names()
    assert set(job.statuses) <= {"Prepared", "Running", "Completed"}


@pytest.mark.parametrize("script", [b"exit 3\n", f"{TRAP}\nexit 3\n".encode()], ids=["plain", "with the trap"])
def test_22_server_sees_a_failure(server22: Server22, script: bytes) -> None:
    """Failed, with or without the trap of the reference."""
    assert server22.wait(server22.upload({"run.sh": script})) == "Failed"


def test_22_server_sees_what_cannot_run(server22: Server22) -> None:
    """No run.sh, or an empty one: Invalid."""
    assert server22.wait(server22.upload({"other.txt": b"x"})) == "Invalid"
    assert server22.wait(server22.upload({"run.sh": b""})) == "Invalid"


def test_22_server_kills(server22: Server22, tmp_path: Path) -> None:
    """200 once nothing of it runs; the status is Killed; again is harmless."""
    pid_file = tmp_path / "pid"
    job = server22.upload({"run.sh": f"trap '' TERM\necho $$ > {pid_file}\nwhile :; do sleep 0.1; done\n".encode()})
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip(), what="the script's start")
    server22.terminate(job)
    assert not alive(int(pid_file.read_text()))
    assert server22.wait(job) == "Killed"
    server22.terminate(job)
    assert server22.session.post(f"{server22.client_url}/kill/12345", timeout=10).status_code == 404


def test_22_server_sees_no_passing_status(client: Process, server22: Server22, tmp_path: Path) -> None:
    """A restart of the client in between shows as silence, never as a status that ends the polling."""
    gate = tmp_path / "gate"
    job = server22.upload({"run.sh": f"while [ ! -e {gate} ]; do sleep 0.05; done\necho done > out.txt\n".encode()})
    wait_for(lambda: job.status == "Running", what="the script's start")
    client.kill()
    client.start()
    seen = len(job.statuses)
    wait_for(lambda: len(job.statuses) > seen + 1, what="two more polls")
    gate.touch()
    assert server22.wait(job) == "Completed", job.statuses
    assert set(job.statuses) <= {"Prepared", "Running", "Completed"}
    assert Archive(job.result)["out.txt"] == b"done\n"


def test_22_servers_partial_result(server22: Server22, tmp_path: Path) -> None:
    """/retrieve_partial is a ZIP of the folder now."""
    job = server22.upload({"run.sh": b"echo early > early.txt\nwhile :; do sleep 0.1; done\n"})
    address = f"{server22.client_url}/retrieve_partial/{job.dest_id}"

    def early() -> bool:
        answer = server22.session.get(address, timeout=10)
        assert answer.status_code == 200
        return "early.txt" in Archive(answer.content).names()

    wait_for(early, what="the first file")
    server22.terminate(job)


def test_memory_database_of_the_reference(make_process: MakeProcess) -> None:
    """With DB_PATH=:memory: our client starts from 1 after a restart, as 2.2 does, and ends what it left running."""
    settings: dict[str, str | None] = {"JOBORCH_ALLOW_ANONYMOUS": "1", "DB_PATH": ":memory:"}
    client = make_process("client", settings).start()
    with closing(Server22(client.url)) as server22:
        job = server22.upload({"run.sh": b"echo $$ > pid.txt\nexec sleep 1000\n"})
        assert job.dest_id == 1
        pid = wait_for(lambda: pid_in_partial(server22, job.dest_id), what="the script's start")
        client.kill()
        assert alive(pid)
        client.start()
        wait_for(lambda: not alive(pid), what="the orphan ended")
        again = server22.upload({"run.sh": b"true\n"})
        assert again.dest_id == 1
        assert server22.wait(again) == "Completed"


def pid_in_partial(server22: Server22, number: int) -> int:
    """The pid that the script wrote, or 0."""
    answer = server22.session.get(f"{server22.client_url}/retrieve_partial/{number}", timeout=10)
    archive = Archive(answer.content)
    text = archive.text("pid.txt").strip() if "pid.txt" in archive.names() else ""
    return int(text or 0)
