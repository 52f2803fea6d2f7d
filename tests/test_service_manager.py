"""What happens around a running process: a service manager stops it, its archive is replaced, its folders go, strangers come."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import re
import select
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    ENDED,
    LIMIT_S,
    Pair,
    Process,
    alive,
    children,
    download,
    partial,
    post_form,
    problems,
    raw_exchange,
    raw_head,
    run_to_end,
    send_all,
    submit,
    wait_for,
    wait_status,
)
from world import Between

# == Stopped by a service manager ==


def ready(pair: Pair, script: str) -> int:
    """Submit a script, in which READY stands for a word to this test; return the job once it has come so far."""
    mark = pair.folder / f"ready-{time.monotonic_ns()}"
    number = submit(pair.server, script.replace("READY", f"echo > {mark}"))
    wait_for(mark.exists, what="the script to begin")
    return number


# The first attempt waits to be stopped; a later one runs to its end.
FIRST = '[ "$JOBORCH_ATTEMPT" = 1 ] || { echo whole > result; exit 0; }\n'
STOPPED = {
    "run.sh does not handle TERM": "READY; sleep 1000",
    "it ends with 0": "trap 'exit 0' TERM; echo half > result; READY; sleep 1000 & wait",
    "it ends with a code of its own": "trap 'exit 3' TERM; READY; sleep 1000 & wait",
    "what it calls ends": "set -e; trap : TERM; READY; sleep 1000",
    "it goes on and has half a result": "trap : TERM; READY; sleep 1000; echo half > result",
    "it is deaf, and killed": "trap '' TERM; READY; while :; do sleep 0.1; done",
}


@pytest.mark.parametrize("order", ["from the top", "from the bottom"])
@pytest.mark.parametrize("script", STOPPED.values(), ids=STOPPED)
def test_a_service_manager_that_stops_everything(script: str, order: str, own_pair: Pair) -> None:
    """TERM for the client and all that it started, then KILL for what is left, as systemd does by default: a new attempt."""
    number = ready(own_pair, FIRST + script)
    everything = [own_pair.client.pid, *children(own_pair.client.pid)]
    assert len(everything) > 2
    everything_in_order = everything if order == "from the top" else everything[::-1]
    for number_sent in (signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT):  # TERM has come to all before the first of them can end
        send_all(number_sent, everything_in_order)
    assert own_pair.client.process is not None
    own_pair.client.process.wait(LIMIT_S)
    deadline = time.monotonic() + 1.5
    wait_for(lambda: time.monotonic() > deadline or not any(map(alive, everything)), what="the end of all, or a short patience")
    send_all(signal.SIGKILL, everything)
    own_pair.client.start()
    job = wait_status(own_pair.server, number, "Completed")
    assert job["attempt"] == 2
    assert download(own_pair.server, number).text("result") == "whole\n"
    [first] = [each for each in job["attempts"] if each["attempt"] == 1]
    assert first["cause"] == "infrastructure"


def test_a_stop_that_spares_the_wrapper(own_pair: Pair) -> None:
    """A payload that dies of a TERM that nobody asked for just when its client is stopped was stopped with it."""
    number = ready(own_pair, FIRST + "READY; sleep 1000")
    script = [pid for pid in children(own_pair.client.pid) if b"./run.sh" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    os.kill(own_pair.client.pid, signal.SIGSTOP)  # it hears of the end only after it was stopped itself
    send_all(signal.SIGTERM, [*script, own_pair.client.pid])
    os.kill(own_pair.client.pid, signal.SIGCONT)
    assert own_pair.client.process is not None
    own_pair.client.process.wait(LIMIT_S)
    own_pair.client.start()
    assert wait_status(own_pair.server, number, "Completed")["attempt"] == 2


def test_the_reason_names_the_remedy(own_pair: Pair) -> None:
    """Where no attempt is left, the job says what happened and what to set."""
    number = submit(own_pair.server, "echo > ../begun; sleep 1000", retries=0)
    wait_status(own_pair.server, number, "Running")
    [mark] = wait_for(lambda: list(own_pair.client.data.glob("jobs/*/begun")), what="the script to begin")
    send_all(signal.SIGTERM, children(own_pair.client.pid))
    job = wait_status(own_pair.server, number, "Failed")
    assert job["cause"] == "infrastructure"
    assert "KillMode=process" in job["reason"], job["reason"]
    assert "143" in job["reason"]
    assert mark.name == "begun"


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "KILL"])
def test_a_signal_of_its_own_is_the_scripts_failure(name: str, pair: Pair) -> None:
    """Nobody else was told to end: the script did it, and is not run again."""
    job = run_to_end(pair.server, f"trap - INT; kill -{name} $$; sleep 1000")
    assert (job["status"], job["cause"], job["attempt"]) == ("Failed", "user", 1)


def test_a_script_that_killed_itself_while_its_client_was_away(own_pair: Pair) -> None:
    """It runs on after the client was stopped, and dies later of its own TERM: its own failure."""
    go = own_pair.folder / "go"
    number = ready(own_pair, f"READY; until [ -e {go} ]; do sleep 0.05; done; kill -TERM $$; sleep 1000")
    own_pair.client.stop()
    note = own_pair.client.data / "stopped"
    os.utime(note, (time.time() - 60, time.time() - 60))  # a minute ago
    go.touch()
    wait_for(lambda: any(path.read_text().strip() for path in own_pair.client.data.glob("jobs/*/exit.json")), what="the end of the script")
    own_pair.client.start()
    job = wait_status(own_pair.server, number, *ENDED)
    assert (job["status"], job["cause"], job["attempt"]) == ("Failed", "user", 1)


def test_a_terminated_job_is_killed_although_its_wrapper_was_told_to_end(own_pair: Pair) -> None:
    """Terminate tells the wrapper, too: that is no service manager."""
    number = ready(own_pair, "trap 'exit 0' TERM; READY; sleep 1000 & wait")
    assert own_pair.server.post(f"/terminate/{number}").status_code == 200
    assert own_pair.server.job(number)["status"] == "Killed"


# == The archive is replaced ==


def call_everything(process: Process) -> dict[str, int]:
    """Every route of a process, as a browser, with the token and without; return the codes of the first by path."""
    paths = json.loads(process.get("/api-docs/openapi.json").content)["paths"]
    codes = {}
    for path, methods in paths.items():
        told = re.sub(r"{name}", "swagger-ui-bundle.js", re.sub(r"{\w+_id}", "1", path))
        for method in methods:
            if method in ("get", "head"):
                codes[f"{method} {path}"] = process.call(method, told, headers={"Authorization": f"Bearer {Pair.TOKEN}"}).status_code
            process.call(method, told, headers={"Accept": "text/html"}, data=b"no form")
    raw_exchange(process.port, b"\x00\xff\r\n\r\n")
    raw_exchange(process.port, raw_head("GET", "/%ff", process.port, "Range: bytes=x", "Expect: 100-continue"))
    return codes


def do_everything(pair: Pair) -> None:
    """A whole job with its result and logs, one that is terminated, one that fails, uploads that are refused, and every route."""
    done = run_to_end(pair.server, "cat input; echo kept > result", {"input": b"in"})
    assert download(pair.server, done["id"]).text("result") == "kept\n"
    assert pair.server.get(f"/jobs/{done['id']}/logs?follow=1").text == "in"
    assert run_to_end(pair.server, "exit 3")["reason"].startswith("run.sh ended with exit status 3")
    number = ready(pair, "READY; sleep 1000")
    wait_status(pair.server, number, "Running")  # after short runs, the answer to a submit waits a moment for the end
    assert ".joborch/stdout" in partial(pair.server, number).names()
    assert pair.server.post(f"/terminate/{number}").status_code == 200
    assert post_form(pair.server, [b"no part"]).status_code == 400
    assert pair.server.get("/swagger-ui/swagger-ui.css").status_code == 200
    for process in (pair.server, pair.client):
        failed = {path: code for path, code in call_everything(process).items() if code >= 500}
        assert not failed, f"{failed}\n{process.log[-3000:]}"
        assert "Traceback" not in process.log


def overwrite(old: Path, new: bytes) -> None:
    """As `cp` and scp do: the same file gets another content."""
    old.write_bytes(new)


def put_in_place(old: Path, new: bytes) -> None:
    """As `mv` and rsync do: another file gets the name."""
    (old.parent / "new.pyz").write_bytes(new)
    (old.parent / "new.pyz").replace(old)


def remove(old: Path, new: bytes) -> None:
    """The file goes, and no other comes."""
    assert new
    old.unlink()


@pytest.mark.parametrize("change", [overwrite, put_in_place, remove])
def test_an_archive_that_is_replaced_while_it_runs(
    change: Callable[[Path, bytes], None], pyz: Path, make_pair: MakePair, tmp_path: Path
) -> None:
    """What was started goes on with all that it can do, and says that it should be started again."""
    archive = Path(shutil.copy(pyz, tmp_path / "joborch.pyz"))
    own = make_pair(program=[sys.executable, str(archive)]).start()
    assert own.server.health()["restart_needed"] is None
    change(archive, b"#!/usr/bin/env python3\n# of another size, and no ZIP at all\n")
    do_everything(own)
    for process in (own.server, own.client):
        for _ in range(3):
            assert "joborch.pyz was re" in process.health()["restart_needed"]
            (problem,) = problems(process, "program", client=None)
            assert "restart" in problem["remedy"] or "put it back" in problem["remedy"]
        assert process.log.count("joborch.pyz was re") == 1


def test_a_file_that_is_the_same_needs_no_restart(pyz: Path, make_process: MakeProcess, tmp_path: Path) -> None:
    """It was copied once more, or touched; and when the old one is put back, all is well again."""
    archive = Path(shutil.copy(pyz, tmp_path / "joborch.pyz"))
    process = make_process("server", program=[sys.executable, str(archive)]).start()
    put_in_place(archive, pyz.read_bytes())
    assert process.health()["restart_needed"] is None
    overwrite(archive, b"another")
    assert "restart it" in process.health()["restart_needed"]
    put_in_place(archive, pyz.read_bytes())
    assert process.health()["restart_needed"] is None


def test_strangers_hear_nothing_of_it(make_process: MakeProcess) -> None:
    process = make_process("client", {"JOBORCH_TOKEN": Pair.TOKEN}).start()
    assert "restart_needed" in process.health()
    assert set(process.get("/health").json()) == {"status", "database"}


def imported(log: str) -> list[str]:
    """The modules that a Python with -X importtime names."""
    return [line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")]


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl to make a certificate")
def test_nothing_is_imported_after_it_listens(pyz: Path, make_pair: MakePair, tmp_path: Path) -> None:
    """However it is installed: the files of its packages may be replaced while it runs. The link is under TLS."""
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(["openssl", "req", *words, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    own = make_pair(program=[sys.executable, "-X", "importtime", str(pyz)])
    middle = Between(own.client, context)
    own.server.settings.update({"SERVICE_EXAMPLE_CLIENTS": middle.url, "JOBORCH_CA_FILE": certificate})
    do_everything(own.start())
    middle.close()
    for process in (own.server, own.client):
        before, after = process.log.split("listens on")
        assert "joborch" in imported(before)
        assert imported(after) == []


# == The folder goes ==

AT_HOME = "case $PWD in */jobs/*.[0-9]/work) ;; *) exit 99 ;; esac\n"
GONE = {
    "the work folder": "rm -rf $PWD",
    "the work folder, and it fails": "rm -rf $PWD; exit 3",
    "the work folder, and another one comes": "W=$PWD; mv $W $W.old; mkdir $W; echo other > $W/result",
    "the work folder, and a link comes": "W=$PWD; mv $W $W.old; ln -s $W.old $W",
    "the payload's folder": "rm -rf ${PWD%/work}",
}


@pytest.mark.parametrize("script", GONE.values(), ids=GONE)
def test_a_folder_that_goes_while_the_script_runs(script: str, pair: Pair) -> None:
    """Nobody can tell whether the script or somebody else did it: it is tried again, and the reason says what is missing."""
    again = run_to_end(pair.server, f'{AT_HOME}if [ "$JOBORCH_ATTEMPT" = 1 ]; then {script}; exit; fi; echo whole > result')
    assert (again["status"], again["attempt"]) == ("Completed", 2)
    assert download(pair.server, again["id"]).text("result") == "whole\n"
    job = run_to_end(pair.server, AT_HOME + script, retries=0)
    assert (job["status"], job["cause"]) == ("Failed", "infrastructure")
    assert "folder was removed" in job["reason"]


def test_a_work_folder_that_somebody_else_removes(pair: Pair) -> None:
    go = pair.folder / "go-on"
    number = ready(pair, f"[ $JOBORCH_ATTEMPT = 2 ] || pwd > {go}.where; READY; until [ -e {go} ]; do sleep 0.02; done; true")
    shutil.rmtree(Path(f"{go}.where").read_text().strip())
    go.touch()
    assert wait_status(pair.server, number, "Completed")["attempt"] == 2


def test_an_ended_payloads_work_folder_that_goes_before_it_is_fetched(own_pair: Pair) -> None:
    """The result is lost with it: no empty one is taken for it."""
    go = own_pair.folder / "go-on"
    number = ready(own_pair, f"READY; until [ -e {go} ]; do sleep 0.02; done; [ $JOBORCH_ATTEMPT = 2 ] && echo whole > result; true")
    own_pair.server.kill()
    go.touch()
    wait_for(lambda: own_pair.client.health()["running"] == 0, what="the end of the payload")
    [work] = own_pair.client.data.glob("jobs/*/work")
    shutil.rmtree(work)
    own_pair.server.start()
    job = wait_status(own_pair.server, number, "Completed")
    assert job["attempt"] == 2
    assert download(own_pair.server, number).text("result") == "whole\n"


def test_a_data_folder_by_a_relative_path(make_pair: MakePair) -> None:
    """The wrapper looks for the folder that it began in, whatever the path that it was given."""
    own = make_pair(client={"DATA_PATH": "data"}).start()
    assert run_to_end(own.server, "cd /; true")["status"] == "Completed"


def test_a_script_that_takes_its_folders_rights_away(pair: Pair) -> None:
    """They are there, and that is what counts."""
    job = run_to_end(pair.server, f"{AT_HOME}echo kept > result; chmod 000 . ..")
    assert job["status"] == "Completed"
    assert download(pair.server, job["id"]).text("result") == "kept\n"


# == Strangers in the folder ==


class Shell:
    """An interactive shell that a person has opened in a folder, with a terminal and an environment of a login."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "-i"], dict(environment))
        self.said = b""
        self.ask("echo here-$((20 + 3))", "here-23")

    def ask(self, line: str, answer: str) -> None:
        """Type a line and wait for an answer; fails where the shell has ended (EIO) or stays silent."""
        os.write(self.terminal, line.encode() + b"\n")
        wait_for(lambda: self.reads(answer.encode()), what=f"the shell to say {answer}")

    def reads(self, answer: bytes) -> bool:
        if select.select([self.terminal], [], [], 0.1)[0]:
            self.said += os.read(self.terminal, 4096)
        return answer in self.said

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


LOGIN = {"HOME": "/root", "PATH": os.environ["PATH"], "TERM": "dumb"}


@contextlib.contextmanager
def strangers(folder: Path) -> Iterator[None]:
    """A shell with a command in the background, one with an empty environment, and an editor without a terminal; all live on."""
    shells = [Shell(folder, LOGIN), Shell(folder, {})]
    shells[0].ask("sleep 1000 & echo started-$((20 + 4))", "started-24")
    editor = subprocess.Popen(
        ["bash", "-c", "trap '' HUP; while :; do sleep 0.1; done"], cwd=folder, env={**LOGIN, "PWD": str(folder)}, start_new_session=True
    )
    try:
        yield
        assert editor.poll() is None, "the editor was ended"
        for shell in shells:
            shell.ask("echo alive-$((20 + 5)) $(jobs)", "alive-25")
        assert b"Terminated" not in shells[0].said + shells[1].said
        assert b"Killed" not in shells[0].said + shells[1].said
    finally:
        for shell in shells:
            shell.close()
        os.killpg(editor.pid, signal.SIGKILL)
        editor.wait()


@pytest.fixture(autouse=True)
def orphans_go_to_process_1() -> None:
    """Other tests make this process the one that orphans go to (PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


def terminate(pair: Pair, number: int) -> None:
    """Have a job killed; it may take a moment where the client has just come back."""
    assert pair.server.post(f"/terminate/{number}").status_code in (200, 202)
    wait_status(pair.server, number, "Killed")


def work_of(pair: Pair) -> Path:
    """The one work folder of a client."""
    [work] = pair.client.data.glob("jobs/*/work")
    return work


@pytest.mark.parametrize("restarted", [False, True])
def test_a_persons_processes_in_the_folder_are_left_alone(restarted: bool, own_pair: Pair) -> None:
    """A job is terminated in whose folder somebody stands, before and after a restart of the client."""
    number = ready(own_pair, "setsid sleep 1000 & READY; sleep 1000")
    with strangers(work_of(own_pair)):
        if restarted:
            own_pair.client.kill()
            own_pair.client.start()
        terminate(own_pair, number)


def test_a_job_ends_while_a_person_stands_in_its_folder(own_pair: Pair) -> None:
    """It does not wait for that person, and says nothing of something that it left running."""
    go = own_pair.folder / "go-on"
    number = ready(own_pair, f"(setsid true &); READY; until [ -e {go} ]; do sleep 0.02; done; true")
    with strangers(work_of(own_pair)):
        go.touch()
        job = wait_status(own_pair.server, number, "Completed")
        assert job["reason"] == "run.sh ended with exit status 0"


def test_a_client_with_a_new_database_spares_strangers(own_pair: Pair) -> None:
    """It ends what an earlier one left, and nobody else."""
    ready(own_pair, "env -i setsid /bin/sleep 1000 & READY; sleep 1000")
    left = children(own_pair.client.pid)
    work = work_of(own_pair)
    own_pair.server.kill()
    with strangers(work):
        own_pair.client.kill()
        for path in own_pair.client.data.glob("joborch.db*"):
            path.unlink()
        own_pair.client.start()
        wait_for(lambda: not any(map(alive, left)), what="the end of all processes of the payload")
    assert not work.exists()


HIDDEN = {
    "its environment emptied": "(env -i setsid /bin/sleep 1000 &)",
    "without the mark": "(env -u JOBORCH_MARK setsid sleep 1000 &)",
    "deaf, with a home of its own": "env -i HOME=/x setsid /bin/bash -c \"trap '' TERM; while :; do /bin/sleep 0.1; done\" & sleep 0.1",
}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("script", HIDDEN.values(), ids=HIDDEN)
def test_processes_that_hide_are_ended_with_their_payload(script: str, restarted: bool, own_pair: Pair) -> None:
    """A session of its own and no mark: the folder of an orphan, and the parents of the others, tell whose it is."""
    number = ready(own_pair, f"{script}\nREADY; sleep 1000")
    left = wait_for(lambda: [pid for pid in children(own_pair.client.pid) if sleeps(pid)], what="the process that hides")
    if restarted:
        own_pair.client.kill()
        own_pair.client.start()
    terminate(own_pair, number)
    assert not any(map(alive, left))


def sleeps(pid: int) -> bool:
    """Whether a process is one of those that hide: it has no mark."""
    with contextlib.suppress(OSError):
        return b"JOBORCH_MARK" not in Path(f"/proc/{pid}/environ").read_bytes()
    return False


# == Writers in the background ==

# Each has little to do after the script's end: on a busy machine 300 calls of `date` would take longer than the two seconds.
STAMP = 'while IFS= read -r line; do echo "$(date +%T) $line"; done | tee log.txt'
WRITERS = {
    "a filter": f"exec > >({STAMP}) 2>&1",
    "a filter that is slow": "exec > >(sleep 0.3; cat > log.txt)",
    "a filter in a script with job control": f"set -m; exec > >({STAMP}) 2>&1",
    "a writer by &": "(sleep 0.3; echo RESULT 42 > log.txt) &",
}


@pytest.mark.parametrize("script", WRITERS.values(), ids=WRITERS)
def test_what_is_written_in_the_background_arrives(script: str, pair: Pair) -> None:
    """Whatever of the script's own still writes at its end has two seconds, and nothing is said of it."""
    job = run_to_end(pair.server, f"{script}\nfor i in 1 2 3 4 5; do echo step $i; done; echo RESULT 42")
    assert (job["status"], job["reason"]) == ("Completed", "run.sh ended with exit status 0")
    assert "RESULT 42" in download(pair.server, job["id"]).text("log.txt")


def test_what_does_not_end_has_term_then_kill(pair: Pair) -> None:
    script = (
        "(trap 'echo tidy > tidied; exit' TERM; while :; do sleep 0.05; done) & (trap '' TERM; while :; do sleep 0.05; done) & sleep 0.2"
    )

    def is_tidied() -> bool:
        begun = time.monotonic()
        job = run_to_end(pair.server, script)
        assert time.monotonic() - begun > 2
        assert job["reason"] == "run.sh ended with exit status 0; processes that it left running were killed"
        return "tidied" in download(pair.server, job["id"]).names()

    assert any(is_tidied() for _ in range(5)), "TERM comes half a second before KILL; a busy machine may take that long to deliver it"


def ran_s(job: dict[str, Any]) -> float:
    """From its start to its end, in seconds."""
    start, end = (datetime.fromisoformat(job[name].replace("Z", "+00:00")).timestamp() for name in ("started_at", "ended_at"))
    return end - start


def test_a_job_that_leaves_nothing_does_not_wait(pair: Pair) -> None:
    """Nor does one whose background processes have ended: all stay below the two seconds that others have."""
    for script in ("true", "sleep 0.01 & sleep 0.01 & wait", "(sleep 0.05 &) ; sleep 0.1"):
        assert any(ran_s(run_to_end(pair.server, script)) < 1.9 for _ in range(5)), script  # a machine may stand still during some of them


# == Containers ==

# Containers are files that hold the folder that they mount; all calls are written down.
ENGINE = """#!/bin/bash
here=$(dirname "$(realpath "$0")")
echo "$*" >> "$here/calls"
[ ! -e "$here/fails" ] || { echo "cannot connect" >&2; exit 1; }
case $1 in
    ps) cd "$here/containers"; ls ;;
    inspect) cd "$here/containers"; for id in "${@:4}"; do [ ! -e "$id" ] || echo "$id|/elsewhere|$(cat "$id")"; done ;;
    stop) cd "$here/containers"; rm "${@:4}" ;;
esac
"""


class Engine:
    """A stand-in for docker or podman in a folder that comes first in a client's PATH."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.containers = folder, folder / "containers"
        self.containers.mkdir(parents=True)
        (folder / name).write_text(ENGINE)
        (folder / name).chmod(0o755)
        self.path = f"{folder}:/usr/bin:/bin"

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def names(self) -> set[str]:
        return {path.name for path in self.containers.iterdir()}


@pytest.fixture(name="engine", params=["docker", "podman"])
def engine_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    return Engine(tmp_path / "engine", request.param)


def test_containers_of_a_terminated_job_are_stopped(engine: Engine, make_pair: MakePair) -> None:
    """Those that mount its work folder or something in it; nobody else's. A job that just ends asks no engine."""
    own = make_pair(client={"PATH": engine.path}).start()
    (engine.containers / "foreign").write_text("/srv/data")
    assert run_to_end(own.server, "true")["status"] == "Completed"
    assert engine.calls() == []
    (engine.containers / "neighbour").write_text(f"{own.client.data}/jobs")
    number = ready(own, f"mkdir d; echo $PWD > {engine.containers}/one; echo $PWD/d > {engine.containers}/two; READY; sleep 1000")
    (engine.containers / "tenth").write_text(f"{folder_of(own, number)}0/work")
    terminate(own, number)
    assert engine.names() == {"foreign", "neighbour", "tenth"}


def folder_of(pair: Pair, number: int) -> Path:
    """The folder of a job's first attempt."""
    return pair.client.data / "jobs" / f"{pair.server.job(number)['uuid']}.1"


def test_containers_of_a_job_that_left_something_running(engine: Engine, make_pair: MakePair) -> None:
    own = make_pair(client={"PATH": engine.path}).start()
    job = run_to_end(own.server, f"echo $PWD > {engine.containers}/one; sleep 1000 &")
    assert "processes that it left running were killed" in job["reason"]
    wait_for(lambda: engine.names() == set(), what="the end of the container")


def test_an_engine_that_is_away_keeps_no_kill_waiting(engine: Engine, make_pair: MakePair) -> None:
    """It is asked once, and not again for each of the next kills; the log says why."""
    own = make_pair(client={"PATH": engine.path}).start()
    (engine.folder / "fails").touch()
    for _ in range(3):
        terminate(own, ready(own, "READY; sleep 1000"))
    assert len(engine.calls()) == 1
    assert own.client.log.count("cannot connect") == 1
