"""The main job, end to end: upload, queue, send, run, fetch, download, against real processes and sockets."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    ENDED,
    EXAMPLE,
    NOBODY_UID,
    Archive,
    Pair,
    Process,
    alive,
    assert_error,
    disk_bytes,
    download,
    free_port,
    open_program,
    open_python,
    parse_answer,
    partial,
    paths_below,
    raw_exchange,
    raw_head,
    read_all,
    repr_digest,
    run_to_end,
    submit,
    upload,
    wait_for,
    wait_status,
)
from pythons import pythons

MIB = 1024 * 1024
UNTIL_GATE = 'while [ ! -e "{gate}" ]; do sleep 0.05; done'
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}(Z|\+00:00)")


def gated(gate: Path, before: str = "", after: str = "") -> str:
    """A script that goes on until somebody makes the file `gate`."""
    return f"{before}\n{UNTIL_GATE.format(gate=gate)}\n{after}\n"


def curl(*arguments: str, folder: Path = EXAMPLE) -> str:
    """What the real curl prints, run in `folder`."""
    command = ["curl", "-sS", "--max-time", "60", "--noproxy", "*", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def curl_code(*arguments: str) -> int:
    """The status code that curl saw."""
    return int(curl("-o", "/dev/null", "-w", "%{http_code}", *arguments))


# == The example, with curl, as in the reference's README ==


def check_example(url: str, destination: Path) -> int:
    """Send the example through with curl alone, word for word; return the job's id."""
    answer = curl(
        *("-F", "file=@run.sh", "-F", "file=@2oob.pdb", "-F", "user_id=1", "-F", "service=example"),
        f"{url}/upload",
    )
    job = json.loads(answer)
    assert {"id", "user_id", "service", "status", "loc", "dest_id", "message"} <= set(job)
    assert (job["user_id"], job["service"], job["status"], job["dest_id"]) == (1, "example", "Queued", "")
    wait_for(lambda: curl_code("-I", f"{url}/download/{job['id']}") != 202, 30, "HEAD other than 202")
    assert curl_code("-I", f"{url}/download/{job['id']}") == 200
    curl("-o", str(destination), f"{url}/download/{job['id']}")
    check_example_result(Archive(destination.read_bytes()))
    return int(job["id"])


def check_example_result(result: Archive) -> None:
    """The inputs came back as they were, with a table of the 36 known pairs and a line that says so."""
    assert result["2oob.pdb"] == (EXAMPLE / "2oob.pdb").read_bytes()
    assert result.own_files() == {"run.sh", "2oob.pdb", "contacts.tsv", "summary.txt"}
    assert result.text("summary.txt").startswith("2oob: 36 residue pairs of chains A and B lie within 5.5 Angstrom")
    assert len(result.text("contacts.tsv").splitlines()) == 1 + 36


def test_example_with_curl(pair: Pair, tmp_path: Path) -> None:
    """The reference's README against our server."""
    check_example(pair.server.url, tmp_path / "results.zip")


def test_quick_start_without_any_setting(tmp_path: Path) -> None:
    """`joborch.py server` and `client` with no setting at all serve `example` on ports 5000 and 9000."""
    for port in (5000, 9000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} of this machine is in use")
    none = dict.fromkeys(("PORT", "DATA_PATH", "JOBORCH_MIN_FREE", "JOBORCH_KILL_GRACE"))
    home = tmp_path / "home"
    server = Process("server", tmp_path / "server", none, home_folder=home, port=5000)
    client = Process("client", tmp_path / "client", none, home_folder=home, port=9000)
    try:
        server.start()  # First, so that it has to find the token of a client that starts later.
        client.start()
        number = check_example("http://127.0.0.1:5000", tmp_path / "results.zip")
        assert wait_status(server, number, "Completed")["result"]["size"] == (tmp_path / "results.zip").stat().st_size
        assert "example" in server.log
        tokens = [path for path in home.rglob("*") if path.is_file() and "token" in path.name]
        assert tokens, "the client made no token file"
        assert {path.stat().st_mode & 0o777 for path in tokens} == {0o600}
    finally:
        server.close()
        client.close()


def test_codes_of_every_state(pair: Pair, tmp_path: Path) -> None:
    """201 at the upload, 202 while it runs, 200 completed, 204 failed, 404 unknown; X-Job-Status beside each."""
    server, gate = pair.server, tmp_path / "gate"
    answer = upload(server, {"run.sh": gated(gate, after="echo done > out.txt").encode()})
    assert answer.status_code == 201
    number = answer.json()["id"]
    assert urllib.parse.urlparse(answer.headers["Location"]).path == f"/jobs/{number}"
    wait_status(server, number, "Running")
    for method in ("HEAD", "GET"):
        early = server.call(method, f"/download/{number}")
        assert (early.status_code, early.headers["X-Job-Status"]) == (202, "Running")
        assert int(early.headers["Retry-After"]) >= 0
    assert server.get(f"/download/{number}").json()["id"] == number
    assert server.head(f"/download/{number}").content == b""
    gate.touch()
    wait_status(server, number, "Completed")
    for method in ("HEAD", "GET"):
        late = server.call(method, f"/download/{number}")
        assert (late.status_code, late.headers["X-Job-Status"]) == (200, "Completed")
    failed = run_to_end(server, "exit 7")
    for method in ("HEAD", "GET"):
        answer = server.call(method, f"/download/{failed['id']}")
        assert (answer.status_code, answer.headers["X-Job-Status"], answer.content) == (204, "Failed", b"")
    assert server.head("/download/999999").status_code == 404
    assert_error(server.get("/download/999999"), 404, "999999")


def test_a_queued_job_answers_202_and_gives_its_inputs(make_process: MakeProcess) -> None:
    """A job whose client is away is queued: 202, a place in the queue, what it waits for, and its inputs on request."""
    wiring = {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}", "SERVICE_EXAMPLE_TOKEN": "t"}
    server = make_process("server", wiring).start()
    number = submit(server, "true", {"inputs/a.txt": b"A"})
    wait_for(lambda: server.job(number)["waiting_for"], what="a reason to wait")
    assert server.job(number)["status"] in ("Queued", "Processing")
    for method in ("HEAD", "GET"):
        assert server.call(method, f"/download/{number}").status_code == 202
    waiting = partial(server, number)
    assert waiting.own_files() == {"run.sh", "inputs/a.txt"}
    assert waiting["inputs/a.txt"] == b"A"


# == How scripts end ==


def test_result_holds_what_the_script_left(pair: Pair) -> None:
    """New, changed and removed files arrive as the script left them, folders included."""
    script = "mkdir -p out/deep\nprintf new > out/deep/new.bin\nprintf changed > in/b.txt\nrm in/a.txt\n"
    job = run_to_end(pair.server, script, {"in/a.txt": b"a", "in/b.txt": b"b", "two words.txt": b"w"})
    assert job["status"] == "Completed", job
    assert (job["exit_code"], job["signal"], job["attempt"]) == (0, None, 1)
    result = download(pair.server, job["id"])
    assert result.own_files() == {"run.sh", "in/b.txt", "out/deep/new.bin", "two words.txt"}
    assert (result["in/b.txt"], result["out/deep/new.bin"], result["two words.txt"]) == (b"changed", b"new", b"w")


def test_result_without_unchanged_inputs(make_pair: MakePair) -> None:
    """RETURN_INPUTS=0: inputs that the script left as they were stay out; changed ones and new files come."""
    own = make_pair(server={"SERVICE_EXAMPLE_RETURN_INPUTS": "0"}).start()
    script = "echo more >> changed.txt; echo new > new.txt"
    job = run_to_end(own.server, script, {"in/same.bin": b"s" * 100_000, "changed.txt": b"1\n"})
    result = download(own.server, job["id"])
    assert result.own_files() == {"changed.txt", "new.txt"}
    assert result.text("changed.txt") == "1\nmore\n"


def test_failing_script(pair: Pair) -> None:
    """Failed with the exit code and a sentence; output, errors and files are there for the one who wonders why."""
    job = run_to_end(pair.server, "echo to-out; echo to-err >&2; echo kept > kept.txt; exit 3")
    assert (job["status"], job["exit_code"], job["signal"], job["cause"]) == ("Failed", 3, None, "user"), job
    assert "3" in job["reason"]
    assert [each["exit_code"] for each in job["attempts"]] == [3]
    rest = partial(pair.server, job["id"])
    assert (rest[".joborch/stdout"], rest[".joborch/stderr"]) == (b"to-out\n", b"to-err\n")
    assert rest["kept.txt"] == b"kept\n"


def test_script_ended_by_a_signal(pair: Pair) -> None:
    """A signal is told as a signal."""
    job = run_to_end(pair.server, "kill -SEGV $$")
    assert (job["status"], job["signal"], job["cause"]) == ("Failed", 11, "user"), job
    assert "11" in job["reason"] or "SEGV" in job["reason"]


def test_an_empty_script_is_invalid(pair: Pair) -> None:
    """Invalid, with the reason; 204 at the download. (Without any run.sh the upload is refused.)"""
    number = upload(pair.server, {"run.sh": b""}).json()["id"]
    job = wait_status(pair.server, number, *ENDED)
    assert (job["status"], job["cause"]) == ("Invalid", "user"), job
    assert "empty" in job["reason"]
    assert pair.server.head(f"/download/{number}").status_code == 204


def test_crlf_script_fails_and_says_why(pair: Pair) -> None:
    """A script from Windows fails, and the reason names its line endings."""
    job = run_to_end(pair.server, "#!/bin/bash\r\nif true; then\r\n  echo hello\r\nfi\r\n", crlf="keep")
    assert job["status"] == "Failed", job
    assert "CRLF" in job["reason"]


def test_script_without_shebang_or_final_newline(pair: Pair) -> None:
    """bash runs it all the same."""
    assert run_to_end(pair.server, "[[ -n $BASH_VERSION ]]")["status"] == "Completed"


def test_trap_of_the_reference_does_no_harm(pair: Pair) -> None:
    """A script written for 2.2 writes its exit file and ends as it says."""
    job = run_to_end(pair.server, "trap 'echo \"$?\" > .orchestrator.exit' EXIT\nexit 4\n")
    assert (job["status"], job["exit_code"]) == ("Failed", 4), job


def test_script_that_closes_its_output(pair: Pair) -> None:
    """Nothing hangs on the streams."""
    job = run_to_end(pair.server, "exec >&- 2>&- <&-\necho done > result.txt")
    assert job["status"] == "Completed", job
    assert download(pair.server, job["id"])["result.txt"] == b"done\n"


def test_script_that_kills_its_own_group(pair: Pair) -> None:
    """`kill -9 0` ends the script, not what watches it: one attempt, the signal known."""
    job = run_to_end(pair.server, "echo before > before.txt\nkill -9 0\nsleep 60")
    assert (job["status"], job["signal"], job["cause"], job["attempt"]) == ("Failed", 9, "user", 1), job
    assert partial(pair.server, job["id"])["before.txt"] == b"before\n"


def test_standard_input_is_empty(pair: Pair) -> None:
    """A script that reads its standard input meets its end, not a terminal."""
    job = run_to_end(pair.server, "cat > got.txt")
    assert job["status"] == "Completed", job
    assert download(pair.server, job["id"])["got.txt"] == b""


@pytest.mark.parametrize("where", ["upload", "service"])
def test_time_limit(pair: Pair, make_pair: MakePair, where: str) -> None:
    """Failed with cause `limit`, nothing of it runs on, its files are there."""
    own = pair
    if where == "service":
        own = make_pair(server={"SERVICE_EXAMPLE_TIMEOUT": "1"}).start()
    fields: dict[str, Any] = {"timeout": 1} if where == "upload" else {}
    job = run_to_end(own.server, "sleep 300 & echo $! > pid.txt; echo $$ >> pid.txt; wait", **fields)
    assert (job["status"], job["cause"], job["attempt"]) == ("Failed", "limit", 1), job
    pids = [int(line) for line in partial(own.server, job["id"]).text("pid.txt").split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if alive(pid)]


def test_history_tells_every_move(pair: Pair) -> None:
    """GET /jobs/ID shows each move with time, from, to and reason, and they join up."""
    job = run_to_end(pair.server, "true", name="a name", cpus=2, memory=64)
    moves = job["history"]
    assert [move["to"] for move in moves][-1] == "Completed"
    assert {"Queued", "Processing", "Submitted"} <= {move["from"] for move in moves} | {move["to"] for move in moves}
    assert all(before["to"] == after["from"] for before, after in zip(moves, moves[1:]))
    times = [job["created_at"], *[move["at"] for move in moves]]
    assert all(TIME.fullmatch(time) for time in times), times
    assert times == sorted(times)
    assert (job["name"], job["cpus"], job["memory"]) == ("a name", 2, 64)
    assert job["created_at"] <= job["started_at"] <= job["ended_at"]
    assert job["result"]["size"] > 0
    assert re.search(r"[0-9A-Za-z+/=]{43,64}", job["result"]["sha256"])


def test_environment_of_the_script(pair: Pair) -> None:
    """The script knows its job, has a scratch folder outside the result, and sees no secret."""
    script = 'env -0 > env.txt\necho scratch > "$TMPDIR/scratch.txt"\npwd > pwd.txt\n'
    job = run_to_end(pair.server, script, user_id=42)
    assert job["status"] == "Completed", job
    result = download(pair.server, job["id"])
    seen = dict(line.split("=", 1) for line in result.text("env.txt").split("\0") if line)
    expected = {"JOBORCH_JOB_ID": str(job["id"]), "JOBORCH_ATTEMPT": "1"}
    expected |= {"JOBORCH_SERVICE": "example", "JOBORCH_USER_ID": "42"}
    assert {name: seen.get(name) for name in expected} == expected
    work = result.text("pwd.txt").strip()
    assert not (seen["TMPDIR"] + "/").startswith(work + "/")
    assert result.own_files() == {"run.sh", "env.txt", "pwd.txt"}
    assert not [name for name in seen if "TOKEN" in name or name.startswith("SERVICE_")]
    assert not [value for value in seen.values() if Pair.TOKEN in value]


def test_the_clients_own_environment_is_closed_to_scripts(make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """A script of the client's own user cannot read the client's environment (where its token stands) from /proc."""
    own = make_pair(folder=open_folder / "pair", user=NOBODY_UID, program=open_program(open_folder, pyz)).start()
    job = run_to_end(own.server, f"cat /proc/{own.client.pid}/environ > leaked.txt 2> refused.txt\ntrue")
    assert job["status"] == "Completed", job
    result = download(own.server, job["id"])
    assert (result["leaked.txt"], b"denied" in result["refused.txt"]) == (b"", True)


# == Ending jobs ==


def test_terminate_queued(make_process: MakeProcess) -> None:
    """A queued job is Killed at once, and terminating it again is harmless."""
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    number = submit(server, "true")
    for _ in range(2):
        answer = server.post(f"/terminate/{number}")
        assert (answer.status_code, answer.json()["id"], answer.json()["status"]) == (200, number, "Killed")
        assert answer.json()["message"]
    job = server.job(number)
    assert (job["status"], job["cause"]) == ("Killed", "cancelled")
    assert server.head(f"/download/{number}").status_code == 204
    assert_error(server.post("/terminate/999999"), 404)


def test_terminate_of_what_has_ended(pair: Pair) -> None:
    """409 with the job where it had ended in another way, and it stays as it was."""
    job = run_to_end(pair.server, "true")
    answer = pair.server.post(f"/terminate/{job['id']}")
    assert (answer.status_code, answer.json()["status"]) == (409, "Completed")
    assert pair.server.job(job["id"])["status"] == "Completed"


STUBBORN = """
trap '' TERM HUP INT
setsid bash -c 'trap "" TERM HUP; echo $$ > session.pid; while :; do sleep 1; done' &
( ( bash -c 'trap "" TERM HUP; echo $$ > orphan.pid; while :; do sleep 1; done' & ) )
echo $$ > self.pid
until [ -s session.pid ] && [ -s orphan.pid ]; do sleep 0.02; done
touch ready
while :; do sleep 1; done
"""


def test_terminate_ends_the_whole_tree(pair: Pair) -> None:
    """TERM ignored, a session of its own, a double fork: all gone when terminate answers 200."""
    number = submit(pair.server, STUBBORN)
    wait_status(pair.server, number, "Running")
    wait_for(lambda: "ready" in partial(pair.server, number).names(), what="the script ready")
    now = partial(pair.server, number)
    pids = [int(now.text(name)) for name in ("self.pid", "session.pid", "orphan.pid")]
    assert all(alive(pid) for pid in pids), pids
    answer = pair.server.post(f"/terminate/{number}")
    left = [pid for pid in pids if alive(pid)]
    assert (answer.status_code, answer.json()["status"], left) == (200, "Killed", [])
    job = pair.server.job(number)
    assert (job["status"], job["cause"]) == ("Killed", "cancelled")
    assert pair.server.post(f"/terminate/{number}").status_code == 200
    assert "ready" in partial(pair.server, number).names()


def test_terminate_gives_the_script_time_to_tidy_up(make_pair: MakePair) -> None:
    """TERM comes first: a script that handles it within the grace time ends in its own way, and is Killed."""
    own = make_pair(client={"JOBORCH_KILL_GRACE": "20"}).start()
    number = submit(own.server, "trap 'echo tidy > tidy.txt; exit 0' TERM\ntouch ready\nwhile :; do sleep 0.1; done")
    wait_status(own.server, number, "Running")
    wait_for(lambda: "ready" in partial(own.server, number).names(), what="the script ready")
    assert own.server.post(f"/terminate/{number}").status_code == 200
    assert own.server.job(number)["status"] == "Killed"
    assert partial(own.server, number)["tidy.txt"] == b"tidy\n"


# == Restarts ==


def test_restarts_of_the_server_while_jobs_run(own_pair: Pair, tmp_path: Path) -> None:
    """INT, TERM (within 2 s, payloads go on) and SIGKILL of the server: the job is found again and ran once."""
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    server = own_pair.server
    number = submit(server, gated(gate, before=f"echo $$ >> {runs}", after="echo done > out.txt"))
    wait_status(server, number, "Running")
    wait_for(lambda: runs.exists() and runs.read_text().strip(), what="the script's start")
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 20  # 2 s are promised; the rest is for a busy machine.
    assert alive(int(runs.read_text()))
    server.start()
    assert server.job(number)["status"] in ("Running", "Submitted", "Unknown")
    server.kill()
    gate.touch()
    server.start()
    job = wait_status(server, number, "Completed")
    assert (job["attempt"], len(runs.read_text().split())) == (1, 1)
    assert download(server, number)["out.txt"] == b"done\n"


@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_client_restarted_while_a_payload_runs(own_pair: Pair, tmp_path: Path, ending: str) -> None:
    """The payload goes on, is found again, and ran once."""
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    server, client = own_pair.server, own_pair.client
    number = submit(server, gated(gate, before=f"echo $$ >> {runs}", after="echo done > out.txt"))
    wait_for(lambda: runs.exists() and runs.read_text().strip(), what="the script's start")
    getattr(client, ending)()
    pid = int(runs.read_text())
    assert alive(pid)
    client.start()
    assert alive(pid)
    gate.touch()
    job = wait_status(server, number, "Completed", limit_s=60)
    assert (job["attempt"], job["exit_code"], len(runs.read_text().split())) == (1, 0, 1)
    assert download(server, number)["out.txt"] == b"done\n"


def test_client_that_is_silent_for_a_while(own_pair: Pair, tmp_path: Path) -> None:
    """Its running job is Unknown meanwhile (202, never an end), and Completed once a retry got through."""
    gate = tmp_path / "gate"
    server, client = own_pair.server, own_pair.client
    number = submit(server, gated(gate))
    wait_status(server, number, "Running")
    client.kill()
    assert wait_status(server, number, "Unknown", limit_s=40)["reason"]
    answer = server.head(f"/download/{number}")
    assert (answer.status_code, answer.headers["X-Job-Status"]) == (202, "Unknown")
    gate.touch()
    client.start()
    job = wait_status(server, number, "Completed", limit_s=60)
    assert job["attempt"] == 1
    assert "Unknown" in [move["from"] for move in job["history"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_wakes_everybody_who_waits(own_pair: Pair, tmp_path: Path, number: signal.Signals) -> None:
    """INT and TERM end a server at once although callers and its own long polls wait; the payload goes on."""
    pid_file = tmp_path / "pid"
    job = submit(own_pair.server, f"echo $$ > {pid_file}\nwhile :; do sleep 0.2; done")
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip(), what="the script's start")
    wait_status(own_pair.server, job, "Running")
    with closing(socket.create_connection(("127.0.0.1", own_pair.server.port), timeout=30)) as line:
        line.sendall(raw_head("GET", f"/jobs/{job}?wait=60&since=Running", own_pair.server.port))
        assert own_pair.server.get("/health").status_code == 200
        for process in (own_pair.server, own_pair.client):
            began = time.monotonic()
            os.kill(process.pid, number)
            assert process.process is not None
            assert process.process.wait(60) in (0, 130)
            assert time.monotonic() - began < 20  # 2 s are promised; the rest is for a busy machine.
    assert alive(int(pid_file.read_text()))


def test_payload_that_ended_while_the_client_was_dead(own_pair: Pair, tmp_path: Path) -> None:
    """Its exit status was kept beside its folder."""
    gate, done = tmp_path / "gate", tmp_path / "done"
    server, client = own_pair.server, own_pair.client
    number = submit(server, gated(gate, after=f"echo kept > out.txt; echo $$ > {done}; exit 5"))
    wait_status(server, number, "Running")
    client.kill()
    gate.touch()
    wait_for(lambda: done.exists() and done.read_text().strip(), what="the script's end")
    wait_for(lambda: not alive(int(done.read_text())), what="the script's process gone")
    client.start()
    job = wait_status(server, number, "Failed", limit_s=60)
    assert (job["exit_code"], job["attempt"], job["cause"]) == (5, 1, "user"), job
    assert partial(server, number)["out.txt"] == b"kept\n"


def test_upload_is_kept_when_the_server_is_killed_at_once(make_pair: MakePair) -> None:
    """What was answered with 201 is there after SIGKILL, and runs to its end."""
    own = make_pair().start()
    own.client.kill()
    numbers = [submit(own.server, f"echo {i} > out.txt") for i in range(5)]
    own.server.kill()
    own.client.start()
    own.server.start()
    for i, number in enumerate(numbers):
        assert wait_status(own.server, number, "Completed", limit_s=60)["attempt"] == 1
        assert download(own.server, number).text("out.txt") == f"{i}\n"


def test_second_start_on_the_same_data_folder(own_pair: Pair, make_process: MakeProcess) -> None:
    """Refused with the pid of the first, which goes on."""
    for first in (own_pair.server, own_pair.client):
        second = make_process(first.role, first.settings, folder=first.folder)
        second.log_path = first.folder / "second.log"
        code, said = second.start_refused()
        assert code not in (0, None)
        assert str(first.pid) in said, said
        assert "Traceback" not in said
        assert first.get("/health").status_code == 200


# == Quotas ==


def most_at_once(jobs: list[dict[str, Any]]) -> int:
    """The largest number of jobs that held a place at one instant, by their histories."""
    holding = {"Processing", "Submitted", "Running", "Unknown"}
    changes = []
    for job in jobs:
        for move in job["history"]:
            change = (move["to"] in holding) - (move["from"] in holding)
            changes.append((move["at"], change))
    held = most = 0
    for _, change in sorted(changes):  # At one millisecond, places are given up before they are taken.
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("settings", "users", "limit"),
    [
        ({"SERVICE_EXAMPLE_RUNS_PER_USER": "2"}, [1, 1, 1, 1, 1, 1], 2),
        ({"SERVICE_EXAMPLE_RUNS_PER_USER": "5", "SERVICE_EXAMPLE_MAX_RUNS": "3"}, [1, 1, 1, 2, 2, 2], 3),
    ],
    ids=["RUNS_PER_USER", "MAX_RUNS"],
)
def test_quota(make_pair: MakePair, tmp_path: Path, settings: dict[str, str], users: list[int], limit: int) -> None:
    """As many as the quota allows run, the next one waits and says why, and all run in the end."""
    gate = tmp_path / "gate"
    own = make_pair(server=settings, client={"JOBORCH_SLOTS": "8"}).start()
    numbers = [submit(own.server, gated(gate), user_id=user) for user in users]
    wait_for(lambda: len(own.server.jobs(status="Running")) == limit, what=f"{limit} jobs running")
    waiting = own.server.job(numbers[-1])
    assert waiting["status"] == "Queued"
    assert waiting["waiting_for"]
    assert waiting["queue_position"] >= 1
    gate.touch()
    jobs = [wait_status(own.server, number, "Completed") for number in numbers]
    assert most_at_once(jobs) == limit


def test_quota_of_one_user_leaves_others_alone(make_pair: MakePair, tmp_path: Path) -> None:
    """One user's full quota does not keep another user's job waiting."""
    gate = tmp_path / "gate"
    own = make_pair(server={"SERVICE_EXAMPLE_RUNS_PER_USER": "1"}, client={"JOBORCH_SLOTS": "4"}).start()
    held = [submit(own.server, gated(gate), user_id=1) for _ in range(3)]
    assert run_to_end(own.server, "true", user_id=2)["status"] == "Completed"
    assert len(own.server.jobs(user_id=1, status="Queued")) == 2
    gate.touch()
    assert {wait_status(own.server, number, "Completed")["status"] for number in held} == {"Completed"}


# == Idempotency ==


def test_idempotency_key(pair: Pair) -> None:
    """A repeat gets the first answer and starts nothing; other files or fields are refused; keys belong to a user."""
    key = {"Idempotency-Key": f"key-{time.monotonic_ns()}"}
    files = {"run.sh": b"true", "in.txt": b"1"}
    first = upload(pair.server, files, headers=key, user_id=71)
    assert first.status_code == 201
    wait_status(pair.server, first.json()["id"], "Completed")
    again = upload(pair.server, files, headers=key, user_id=71)
    assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])
    assert again.headers["Location"] == first.headers["Location"]
    with_curl = curl(
        *("-H", f"Idempotency-Key: {key['Idempotency-Key']}", "-F", "file=@-;filename=run.sh"),
        *("-F", "file=1;filename=in.txt", "-F", "user_id=71", "-F", "service=example", "-w", " %{http_code}"),
        f"{pair.server.url}/upload",
        folder=Path("/"),
    )
    assert with_curl.endswith(" 422"), "an empty run.sh is another body"
    assert_error(upload(pair.server, {**files, "in.txt": b"2"}, headers=key, user_id=71), 422, "Idempotency-Key")
    assert_error(upload(pair.server, files, headers=key, user_id=71, name="x"), 422, "Idempotency-Key")
    other_user = upload(pair.server, files, headers=key, user_id=72)
    assert other_user.status_code == 201
    assert other_user.json()["id"] != first.json()["id"]
    assert len(pair.server.jobs(user_id=71)) == 1


def test_idempotency_key_with_another_boundary(pair: Pair, tmp_path: Path) -> None:
    """The same files and fields from curl and from us are one request, whatever the boundary."""
    key = f"key-{time.monotonic_ns()}"
    (tmp_path / "run.sh").write_bytes(b"true")
    first = upload(pair.server, {"run.sh": b"true"}, headers={"Idempotency-Key": key}, user_id=73)
    again = curl(
        *("-H", f"Idempotency-Key: {key}", "-F", "file=@run.sh", "-F", "user_id=73", "-F", "service=example"),
        f"{pair.server.url}/upload",
        folder=tmp_path,
    )
    assert json.loads(again)["id"] == first.json()["id"]


def test_idempotency_key_at_the_same_time(pair: Pair) -> None:
    """Ten repeats side by side make one job."""
    from concurrent.futures import ThreadPoolExecutor

    key = {"Idempotency-Key": f"key-{time.monotonic_ns()}"}
    with ThreadPoolExecutor(10) as pool:
        calls = [pool.submit(upload, pair.server, {"run.sh": b"true"}, headers=key, user_id=74) for _ in range(10)]
    answers = [call.result() for call in calls]
    made = {answer.json()["id"] for answer in answers if answer.status_code == 201}
    assert len(made) == 1, [(answer.status_code, answer.text) for answer in answers]
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert [job["id"] for job in pair.server.jobs(user_id=74)] == list(made)


# == Downloads ==


@pytest.fixture(scope="module")
def completed(pair: Pair) -> tuple[str, bytes]:
    """The path of a completed job's download, and its bytes."""
    job = run_to_end(pair.server, "head -c 300000 /dev/urandom > random.bin")
    path = f"/download/{job['id']}"
    return path, pair.server.get(path).content


def test_download_headers(pair: Pair, completed: tuple[str, bytes]) -> None:
    """HEAD and GET bear the same: length, ETag, ranges, digest, a name for the file."""
    path, content = completed
    for method in ("GET", "HEAD"):
        headers = pair.server.call(method, path).headers
        assert headers["Content-Type"] == "application/zip"
        assert int(headers["Content-Length"]) == len(content)
        assert headers["Accept-Ranges"] == "bytes"
        assert headers["Repr-Digest"] == repr_digest(content)
        assert re.fullmatch(r'"[!#-~]+"', headers["ETag"])
        assert re.match(r"attachment; *filename=", headers["Content-Disposition"])
    job = pair.server.job(int(path.rpartition("/")[2]))
    assert job["result"]["size"] == len(content)


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=1000-", slice(1000, None)),
        ("bytes=-5", slice(-5, None)),
        ("bytes=10-99999999999", slice(10, None)),
        ("bytes=-99999999999", slice(0, None)),
    ],
)
def test_ranges(pair: Pair, completed: tuple[str, bytes], asked: str, part: slice) -> None:
    """206 with the bytes that were asked for; the digest stays the whole file's."""
    path, content = completed
    answer = pair.server.get(path, headers={"Range": asked})
    start, stop, _ = part.indices(len(content))
    assert (answer.status_code, answer.content) == (206, content[part])
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(content)}"
    assert answer.headers["Repr-Digest"] == repr_digest(content)


def test_range_that_cannot_be(pair: Pair, completed: tuple[str, bytes]) -> None:
    """Beyond the end: 416 with the length. Not a range at all: left aside."""
    path, content = completed
    answer = pair.server.get(path, headers={"Range": f"bytes={len(content)}-"})
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{len(content)}")
    for odd in ("bytes=9-2", "bytes=a-b", "lines=1-2", "bytes=-"):
        answer = pair.server.get(path, headers={"Range": odd})
        assert (answer.status_code, len(answer.content)) == (200, len(content)), odd


def test_conditional_downloads(pair: Pair, completed: tuple[str, bytes]) -> None:
    """If-Range picks part or whole, If-None-Match spares the transfer."""
    path, content = completed
    tag = pair.server.head(path).headers["ETag"]
    same = pair.server.get(path, headers={"Range": "bytes=0-9", "If-Range": tag})
    other = pair.server.get(path, headers={"Range": "bytes=0-9", "If-Range": '"another"'})
    assert (same.status_code, other.status_code, len(other.content)) == (206, 200, len(content))
    for condition in (tag, "*", f'"another", {tag}', f"W/{tag}"):
        for method in ("GET", "HEAD"):
            answer = pair.server.call(method, path, headers={"If-None-Match": condition})
            assert (answer.status_code, answer.content) == (304, b""), condition
            assert answer.headers["ETag"] == tag
    assert pair.server.get(path, headers={"If-None-Match": '"another"'}).status_code == 200


def test_curl_resumes_a_download(pair: Pair, completed: tuple[str, bytes], tmp_path: Path) -> None:
    """`curl -C -` goes on where a broken transfer ended."""
    path, content = completed
    (tmp_path / "half.zip").write_bytes(content[:1000])
    curl("-C", "-", "-o", "half.zip", pair.server.url + path, folder=tmp_path)
    assert (tmp_path / "half.zip").read_bytes() == content


# == GET /jobs ==


def test_wait_answers_as_soon_as_the_status_differs(pair: Pair, tmp_path: Path) -> None:
    """?wait&since holds the answer back until then, or for so many seconds; without `since`: the status now."""
    gate = tmp_path / "gate"
    number = submit(pair.server, gated(gate))
    job = wait_status(pair.server, number, "Running")
    for query in ({"wait": "0.5", "since": "Running"}, {"wait": "0.5"}):
        began = time.monotonic()
        assert pair.server.get(f"/jobs/{number}", params=query).json()["status"] == "Running"
        assert time.monotonic() - began >= 0.45
    began = time.monotonic()
    assert pair.server.get(f"/jobs/{number}", params={"wait": "60", "since": "Queued"}).json()["status"] == "Running"
    assert time.monotonic() - began < 20
    gate.touch()
    while job["status"] == "Running":
        job = pair.server.get(f"/jobs/{number}", params={"wait": "60", "since": "Running"}).json()
    assert time.monotonic() - began < 40
    wait_status(pair.server, number, "Completed")
    for odd in ({"wait": "soon"}, {"wait": "-1"}, {"wait": "nan"}, {"wait": "1", "since": "Nowhere"}):
        assert_error(pair.server.get(f"/jobs/{number}", params=odd), 400, *(odd if "since" not in odd else ["since"]))


def test_waiters_do_not_keep_others_waiting(make_process: MakeProcess) -> None:
    """A hundred callers wait at once: some are parked, the others get their answer with Retry-After, uploads go on."""
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    number = submit(server, "true")
    status = server.job(number)["status"]
    lines = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(100)]
    for line in lines:
        line.sendall(raw_head("GET", f"/jobs/{number}?wait=6&since={status}", server.port))
    began = time.monotonic()
    assert upload(server, {"run.sh": b"true"}, timeout=None).status_code == 201
    assert time.monotonic() - began < 10
    at_once = len([line for line in lines if select.select([line], [], [], 0.1)[0]])
    answers = [parse_answer(read_all(line)) for line in lines]
    assert {code for code, _, _ in answers} == {200}
    assert 0 < len([headers for _, headers, _ in answers if "retry-after" in headers]) < 100
    assert 0 < at_once < 100
    for line in lines:
        line.close()


def test_list_filters(pair: Pair) -> None:
    """By user, service and status, newest first."""
    good = [run_to_end(pair.server, "true", user_id=81)["id"] for _ in range(2)]
    bad = run_to_end(pair.server, "false", user_id=81)["id"]
    assert [job["id"] for job in pair.server.jobs(user_id=81)] == [bad, *reversed(good)]
    assert [job["id"] for job in pair.server.jobs(user_id=81, status="Failed")] == [bad]
    assert [job["id"] for job in pair.server.jobs(user_id=81, service="example", status="Completed")] == good[::-1]
    assert pair.server.jobs(user_id=80) == []


def test_list_pages(pair: Pair) -> None:
    """Pages by `limit` and `before`; `next` leads through all of them, and is null at the end."""
    made = [run_to_end(pair.server, "true", user_id=82)["id"] for _ in range(5)]
    seen, query = [], {"user_id": "82", "limit": "2"}
    for _ in range(4):
        page = pair.server.get("/jobs", params=query).json()
        assert set(page) == {"jobs", "next"}
        seen += [job["id"] for job in page["jobs"]]
        if page["next"] is None:
            break
        assert len(page["jobs"]) == 2
        query["before"] = str(page["next"])
    assert seen == made[::-1]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=-1",
        "before=x",
        "before=-1",
        "user_id=me",
        "status=Nowhere",
        "limit=" + "9" * 30,
    ],
)
def test_list_refuses_what_it_cannot_use(pair: Pair, query: str) -> None:
    """400, and the message names the parameter."""
    assert_error(pair.server.get(f"/jobs?{query}"), 400, query.partition("=")[0])


def test_unknown_field_is_named_in_warnings(pair: Pair) -> None:
    """A field that is not known is left out and named, with the nearest known name."""
    answer = upload(pair.server, {"run.sh": b"true"}, timeoutt=5, something_else="x")
    assert answer.status_code == 201
    warnings = answer.json()["warnings"]
    assert any("timeoutt" in each and re.search(r"\btimeout\b", each) for each in warnings), warnings
    assert any("something_else" in each for each in warnings), warnings
    assert not upload(pair.server, {"run.sh": b"true"}).json().get("warnings")


def test_compat_2_2(make_pair: MakePair) -> None:
    """With JOBORCH_COMPAT=2.2 GET answers 200 with id, status, message until the ZIP is there; HEAD keeps its codes."""
    own = make_pair(server={"JOBORCH_COMPAT": "2.2"}).start()
    failed = run_to_end(own.server, "exit 3")
    answer = own.server.get(f"/download/{failed['id']}")
    assert answer.status_code == 200
    assert answer.json() == {"id": failed["id"], "status": "Failed", "message": failed["reason"]}
    assert own.server.head(f"/download/{failed['id']}").status_code == 204
    completed = run_to_end(own.server, "true")
    assert download(own.server, completed["id"]).own_files() == {"run.sh"}
    own.client.kill()
    queued = own.server.get(f"/download/{submit(own.server, 'true')}")
    assert (queued.status_code, set(queued.json())) == (200, {"id", "status", "message"})
    assert own.server.get("/download/99999").status_code == 404


def test_terminate_while_the_client_is_away(own_pair: Pair, tmp_path: Path) -> None:
    """202, never Killed while it may run; ended when the client is back."""
    pid_file = tmp_path / "pid"
    number = submit(own_pair.server, f"echo $$ > {pid_file}\nwhile :; do sleep 0.2; done")
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip(), what="the script's start")
    wait_status(own_pair.server, number, "Running")
    own_pair.client.kill()
    answer = own_pair.server.post(f"/terminate/{number}")
    assert answer.status_code == 202
    assert answer.json()["status"] != "Killed"
    assert alive(int(pid_file.read_text()))
    own_pair.client.start()
    assert wait_status(own_pair.server, number, "Killed", limit_s=60)["cause"] == "cancelled"
    assert not alive(int(pid_file.read_text()))


# == Odd results ==

ODD = """
mkdir sub
ln -s run.sh inside-link
ln -s ../run.sh sub/up-inside
ln -s /etc/hostname absolute-link
ln -s ../../../../../../../etc/hostname outside-link
ln -s /etc folder-link
ln -s nowhere dangling
ln -s loop-a loop-b; ln -s loop-b loop-a
mkfifo pipe
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("sock")' 2>/dev/null || mkfifo sock
[ "$(id -u)" != 0 ] || mknod device c 1 5
printf latin > $'caf\\xe9.txt'
printf utf8 > 'naïve ☃.txt'
printf back > 'back\\slash.txt'
printf line > $'two\\nlines.txt'
printf zip > output.zip
: > empty
mkdir empty-folder
"""


@pytest.fixture(scope="module")
def odd(pair: Pair) -> Archive:
    """The result of a script that leaves everything but plain files."""
    job = run_to_end(pair.server, ODD)
    assert job["status"] == "Completed", job
    return download(pair.server, job["id"])


def test_links_are_stored_as_links_and_only_inside(odd: Archive) -> None:
    """A link that stays inside arrives as a link; no other is followed or packed."""
    assert {name: odd[name] for name in ("inside-link", "sub/up-inside")} == {
        "inside-link": b"run.sh",
        "sub/up-inside": b"../run.sh",
    }
    assert all(odd.is_link(name) for name in ("inside-link", "sub/up-inside"))
    left_out = odd.text(".joborch/left-out.txt")
    for name in ("absolute-link", "outside-link", "folder-link"):
        assert name not in odd.names()
        assert name in left_out
    hostname = Path("/etc/hostname").read_bytes() if Path("/etc/hostname").exists() else b"\0"
    assert not [name for name in odd.names() if odd[name] == hostname and hostname.strip()]
    for name in ("loop-a", "loop-b", "dangling"):
        assert (name in odd.names() and odd.is_link(name)) or name in left_out


def test_pipes_sockets_and_devices_are_left_out_and_named(odd: Archive) -> None:
    """Nothing hangs on them, and nobody wonders where they went."""
    left_out = odd.text(".joborch/left-out.txt")
    for name in ("pipe", "sock", *(["device"] if os.geteuid() == 0 else [])):
        assert name not in odd.names()
        assert name in left_out


def test_odd_names_arrive(odd: Archive) -> None:
    """Names that are not UTF-8 come as they are or percent-encoded; the script's own output.zip is a file like any."""
    contents = {odd[name]: name for name in odd.own_files() if not odd.is_link(name)}
    assert {b"latin", b"utf8", b"back", b"line", b"zip", b""} <= set(contents)
    assert contents[b"latin"] in ("caf%E9.txt", "caf\udce9.txt")
    assert contents[b"utf8"] == "naïve ☃.txt"
    assert contents[b"zip"] == "output.zip"
    assert not [name for name in odd.names() if name.startswith("/") or ".." in name.split("/")]


def test_a_folder_of_the_scripts_own_called_joborch(pair: Pair) -> None:
    """It does not hide what we add, nothing is packed twice, and nothing of it is lost without a word."""
    script = "mkdir .joborch; echo mine > .joborch/stdout; echo too > .joborch/left-out.txt; mkfifo pipe; echo real"
    job = run_to_end(pair.server, script)
    assert job["status"] == "Completed", job
    for archive in (download(pair.server, job["id"]), partial(pair.server, job["id"])):
        contents = [archive[name] for name in archive.names()]
        assert b"mine\n" in contents
        assert b"too\n" in contents
        assert [text for text in contents if b"pipe" in text and text != script.encode()]
    assert b"real\n" in [archive[name] for name in partial(pair.server, job["id"]).names()]


def test_result_unpacks_with_unzip_tools(odd: Archive, tmp_path: Path) -> None:
    """Python's own extractor stays inside the folder that it was given."""
    odd.zip.extractall(tmp_path / "out")
    assert (tmp_path / "out" / "run.sh").read_text() == ODD
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_unreadable_files_and_closed_folders(make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """A script that takes rights away, even from its own folder: what can be read arrives, the rest is named."""
    own = make_pair(folder=open_folder / "pair", user=NOBODY_UID, program=open_program(open_folder, pyz)).start()
    close = "echo b > closed.txt; chmod 0 closed.txt; mkdir shut; echo c > shut/c; chmod 0 shut; chmod 0 ."
    job = run_to_end(own.server, f"echo a > kept.txt; {close}")
    assert job["status"] == "Completed", job
    result = download(own.server, job["id"])
    assert result["kept.txt"] == b"a\n"
    left_out = result.text(".joborch/left-out.txt") if ".joborch/left-out.txt" in result.names() else ""
    for name, content in (("closed.txt", b"b\n"), ("shut/c", b"c\n")):
        assert result[name] == content if name in result.names() else name.split("/")[0] in left_out


def test_folders_that_take_all_rights_away_are_cleaned(make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """The cleaner gets rid of them too, on both sides, after MAX_AGE from their end."""
    brief = {"MAX_AGE": "1", "JOBORCH_CLEAN_INTERVAL": "1"}
    program = open_program(open_folder, pyz)
    own = make_pair(folder=open_folder / "pair", user=NOBODY_UID, program=program, server=brief, client=brief).start()
    number = submit(own.server, "mkdir -p a/b; touch a/b/marker; chmod 0 a/b a .")
    wait_status(own.server, number, "Completed", "Cleaned")
    wait_for(lambda: own.server.job(number)["status"] == "Cleaned", 30, "the job cleaned")
    assert own.server.head(f"/download/{number}").status_code == 204
    assert own.server.get(f"/download_partial/{number}").status_code == 404
    assert not [path for path in paths_below(own.server.data) if path.name == "run.sh"]
    wait_for(lambda: not [path for path in paths_below(own.client.data) if path.name == "marker"], 30, "the client's folder cleaned")


def test_cleaner_leaves_what_has_not_ended(make_pair: MakePair, tmp_path: Path) -> None:
    """A job that runs longer than MAX_AGE is not touched, whatever its folder's age."""
    brief = {"MAX_AGE": "1", "JOBORCH_CLEAN_INTERVAL": "0.2"}
    gate = tmp_path / "gate"
    own = make_pair(server=brief, client=brief).start()
    long = submit(own.server, gated(gate, after="echo done > out.txt"))
    wait_status(own.server, long, "Running")
    short = submit(own.server, "true")
    wait_for(lambda: own.server.job(short)["status"] == "Cleaned", 30, "a later job cleaned")
    assert own.server.job(long)["status"] == "Running"
    assert "run.sh" in partial(own.server, long).names()
    gate.touch()
    wait_for(lambda: own.server.job(long)["status"] in ENDED, 30, "the end of the long job")
    assert "Completed" in [move["to"] for move in own.server.job(long)["history"]]


# == Output streams ==


def check_bounded(stream: bytes, written: int, limit: int) -> None:
    """Head, one line that says how much is left out, tail."""
    assert len(stream) <= limit + 1024
    assert stream.startswith(b"HEAD\n")
    assert stream.endswith(b"TAIL\n")
    lines = [line for line in re.split(rb"\n", stream) if line.strip(b"x\0") and line not in (b"HEAD", b"TAIL")]
    assert len(lines) == 1, lines
    numbers = [int(digits.replace(b",", b"")) for digits in re.findall(rb"\d[\d,]*", lines[0])]
    kept = len(stream) - len(lines[0].strip(b"x"))
    assert any(abs(written - kept - number) <= 2 for number in numbers), (written, kept, lines[0])
    assert b"\0" not in stream


def test_a_gibibyte_of_output(pair: Pair) -> None:
    """Kept bounded on the disk: the first and the last half of JOBORCH_LOG_LIMIT, and what is between is counted."""
    before = disk_bytes(pair.folder)
    script = "echo HEAD; head -c 1073741824 /dev/zero | tr '\\0' x; echo; echo TAIL; echo small >&2"
    job = run_to_end(pair.server, script, user_id=90)
    assert job["status"] == "Completed", job
    streams = partial(pair.server, job["id"])
    check_bounded(streams[".joborch/stdout"], 1073741824 + 11, MIB)
    assert streams[".joborch/stderr"] == b"small\n"
    wait_for(lambda: disk_bytes(pair.folder) - before < 4 * MIB, what="the middle gone from the disk")


def test_output_is_bounded_while_the_script_runs(pair: Pair, tmp_path: Path) -> None:
    """A script that goes on writing for days does not fill the disk: the middle goes while it runs."""
    gate = tmp_path / "gate"
    before = disk_bytes(pair.client.folder)
    script = gated(gate, before="echo HEAD; head -c 33554432 /dev/zero | tr '\\0' x; echo; echo TAIL; touch written")
    number = submit(pair.server, script)
    wait_status(pair.server, number, "Running")
    wait_for(lambda: "written" in partial(pair.server, number).names(), what="the output written")
    wait_for(lambda: disk_bytes(pair.client.folder) - before < 4 * MIB, what="the middle gone from the disk")
    check_bounded(partial(pair.server, number)[".joborch/stdout"], 33554432 + 11, MIB)
    gate.touch()
    wait_status(pair.server, number, "Completed")


# == The .pyz ==


def pyz_job(own: Pair) -> None:
    """A job through both ends, its result, and the page of documents out of the archive."""
    check_example(own.server.url, own.folder / "results.zip")
    assert own.server.get("/swagger-ui/").status_code == 200
    assert own.server.get("/api-docs/openapi.json").json()["openapi"].startswith("3.1")


@pytest.mark.parametrize("version", list(pythons()))
def test_pyz_on_every_python(make_pair: MakePair, pyz: Path, version: str) -> None:
    """The archive alone, with nothing installed, on each CPython of this machine."""
    pyz_job(make_pair(program=[str(pythons()[version]), str(pyz)]).start())


def test_python_3_9_is_there() -> None:
    """The oldest Python that is promised is among those tried."""
    assert any(version.startswith("3.9") for version in pythons()), sorted(pythons())


def test_pyz_from_a_read_only_folder_with_spaces_without_a_home(make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """As a user without a home, from a folder that it cannot write in and whose name has blanks."""
    place = open_folder / "read only place"
    place.mkdir()
    shutil.copy(pyz, place)
    (place / pyz.name).chmod(0o444)
    place.chmod(0o555)
    program = [open_python(), str(place / pyz.name)]
    own = make_pair(folder=open_folder / "data of pair", user=NOBODY_UID, home=False, program=program).start()
    assert Path(f"/proc/{own.server.pid}").stat().st_uid in (NOBODY_UID, 0)  # 0 where it made itself undumpable.
    pyz_job(own)
    assert sorted(path.name for path in place.iterdir()) == [pyz.name]


def test_without_a_home_and_without_data_path(make_process: MakeProcess, open_folder: Path, pyz: Path, root: None) -> None:
    """A uid that no account belongs to, without HOME: it says that DATA_PATH is to be set, and makes no `~` folder."""
    program = open_program(open_folder, pyz)
    folder = open_folder / "server"
    server = make_process("server", {"DATA_PATH": None}, folder=folder, home=False, user=4_242_424, program=program)
    code, said = server.start_refused()
    assert code == 2
    assert "DATA_PATH" in said
    assert "Traceback" not in said
    assert not [path for path in paths_below(open_folder) if path.name.startswith("~")]


# == Ends that speak HTTP as they should ==


def test_ping_and_health(pair: Pair) -> None:
    """`/`, /health of both, /load of the client."""
    for process in (pair.server, pair.client):
        assert process.get("/").json() == {"message": "pong"}
        health = process.get("/health").json()
        assert (health["status"], health["database"]) == ("ok", "ok")
    assert {"version", "executor", "slots", "running", "queued"} <= set(pair.client.health())
    load = pair.client.get("/load").json()
    assert isinstance(load, (int, float))
    assert 0 <= load <= 100
    services = pair.server.get("/services").json()
    assert "example" in json.dumps(services)


def test_requests_on_one_line_stay_apart(pair: Pair) -> None:
    """Two requests sent at once over one connection get two answers, in order."""
    one = f"GET /jobs/999998 HTTP/1.1\r\nHost: 127.0.0.1:{pair.server.port}\r\n"
    received = raw_exchange(pair.server.port, (one + "\r\n" + one + "Connection: close\r\n\r\n").encode())
    assert received.count(b"HTTP/1.1 404") == 2


def test_upload_in_chunks(pair: Pair, tmp_path: Path) -> None:
    """A caller that does not know the length beforehand: its job runs, or it is told that a length is needed."""
    (tmp_path / "run.sh").write_text("true")
    answer = curl(
        *("-H", "Transfer-Encoding: chunked", "-F", "file=@run.sh", "-F", "user_id=1", "-F", "service=example"),
        *("-w", "\n%{http_code}", f"{pair.server.url}/upload"),
        folder=tmp_path,
    )
    body, _, code = answer.rpartition("\n")
    assert code in ("201", "411")
    if code == "201":
        assert wait_status(pair.server, json.loads(body)["id"], "Completed")["exit_code"] == 0
    else:
        assert "Content-Length" in json.loads(body)["message"]


def test_expect_100_continue(pair: Pair, tmp_path: Path) -> None:
    """curl's way with large bodies: it asks first, is told to go on, and the job runs."""
    (tmp_path / "run.sh").write_text("cmp <(head -c 3000000 /dev/zero) big.bin")
    (tmp_path / "big.bin").write_bytes(bytes(3_000_000))
    answer = curl(
        *("-v", "-H", "Expect: 100-continue", "--expect100-timeout", "30", "--stderr", "-", "-F", "file=@run.sh"),
        *("-F", "file=@big.bin", "-F", "user_id=1", "-F", "service=example", f"{pair.server.url}/upload"),
        folder=tmp_path,
    )
    assert "HTTP/1.1 100" in answer
    number = int(re.search(r'"id": ?(\d+)', answer).group(1))  # type: ignore[union-attr]
    assert wait_status(pair.server, number, "Completed")["exit_code"] == 0
