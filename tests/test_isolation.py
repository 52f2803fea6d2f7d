"""JOBORCH_ISOLATION: payloads apart from each other and from their client, by whatever this machine has; never less than asked for."""

from __future__ import annotations

import functools
import grp
import os
import platform
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    ENDED,
    FIRST_UID,
    NOBODY_UID,
    ROOT,
    SCRIPT_UIDS,
    STRANGER_UID,
    Pair,
    Process,
    download,
    open_program,
    raw_exchange,
    replace,
    run_to_end,
    submit,
    wait_for,
    wait_status,
)
from world import Yard, doctor, load_config

import joborch
from joborch import ConfigError, DataFolder, Job, Status, run_tick
from joborch_base import processes
from joborch_base.executors import FIRST_INSIDE, all_processes, bears_mark, is_of_sandbox
from joborch_base.files import libc
from joborch_base.processes import leave_keyring, read_proc
from joborch_plugins import sandbox

pytestmark = pytest.mark.usefixtures("strangers_are_safe")

VALUES = ["process", "full", *(["user"] if os.geteuid() == 0 else [])]
UIDS = range(FIRST_UID, FIRST_UID + 48)  # of JOBORCH_ISOLATION=user


def isolated(value: str, **more: str) -> dict[str, str]:
    """The settings of a client with this isolation."""
    return {"JOBORCH_ISOLATION": value, **({"JOBORCH_UIDS": SCRIPT_UIDS} if value == "user" else {}), **more}


@pytest.fixture(name="yard", params=VALUES)
def yard_fixture(request: pytest.FixtureRequest, data: DataFolder) -> Iterator[Yard]:
    """A client in this process for each value."""
    made = Yard(data, **isolated(request.param))
    yield made
    made.close()


@pytest.fixture(name="own_users")
def own_users_fixture(data: DataFolder, root: None) -> Iterator[Yard]:
    """A client in this process that gives each script a user of its own."""
    made = Yard(data, **isolated("user"))
    yield made
    made.close()


READY, WAIT = "touch ready", "until [ -e go ]; do sleep 0.02; done"


def begun(yard: Yard, script: str) -> Job:
    """A payload that has come to READY; it ends WAIT where `let_go` is called."""
    job = yard.submit(script)
    run_tick(yard.client)
    wait_for((yard.folder(job) / "work/ready").exists, 60, "the script's start")
    return yard[job]


def let_go(yard: Yard, job: Job) -> None:
    """Let a script go on."""
    (yard.folder(job) / "work/go").touch()


def kill(yard: Yard, job: Job) -> None:
    """Terminate a payload."""
    yard.store.request_kill(job.id, joborch.Cause.CANCELLED)
    joborch.end_tick(yard.client)


def first_of(job: Job) -> int:
    """Process 1 of a payload's namespace."""
    return wait_for(lambda: next(filter(is_first, pids_of(job)), 0), 60, "process 1")


def pids_of(job: Job) -> list[int]:
    """The processes that bear a payload's mark."""
    return [process.pid for process in all_processes() if bears_mark(process.pid, job.mark)]


def is_first(pid: int) -> bool:
    """Whether a process is the first one of a namespace in ours."""
    return bool(re.search(r"^NSpid:\t\d+\t1$", read(pid, "status"), re.MULTILINE))


def read(pid: int, name: str) -> str:
    """A file of proc(5); empty if the process has ended."""
    try:
        return read_proc(f"/proc/{pid}/{name}")
    except OSError:
        return ""


# == What a script gives is what it gives without ==

ENDS = {
    "exit 0": ("exit 0", Status.COMPLETED, 0, None),
    "exit 3": ("exit 3", Status.FAILED, 3, None),
    "a signal": ("kill -9 $$", Status.FAILED, 137, signal.SIGKILL),
    "a signal to all": ("setsid sleep 1000 & kill -9 -1; exit 5", Status.FAILED, 5, None),
    "a signal to its group": ("sleep 1000 & kill -TERM 0", Status.FAILED, 143, signal.SIGTERM),
    "whom it cannot end": ("kill -9 $PPID; kill -STOP $PPID; exit 4", Status.FAILED, 4, None),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_status_of_a_script_comes_through(end: str, yard: Yard) -> None:
    script, status, code, number = ENDS[end]
    job = yard.run(yard.submit(f"echo said; {script}"))
    assert (job.status, job.exit_code, job.signal) == (status, code, number), job.reason
    assert (yard.folder(job) / "stdout").read_text() == "said\n"


def test_a_filter_of_its_output_may_finish(yard: Yard) -> None:
    """`exec > >(tee log)`: what still drains the script's pipes has two seconds, and is not called left behind."""
    job = yard.run(yard.submit("exec > >(sleep 0.3; cat > log; cat log); echo words"))
    assert (job.status, job.reason) == (Status.COMPLETED, "run.sh ended with exit status 0")
    assert (yard.folder(job) / "work/log").read_text() == "words\n"


def test_a_script_sees_its_own_processes_alone(yard: Yard) -> None:
    job = yard.run(yard.submit("echo /proc/[0-9]* > seen; echo $PPID $$ > ids"))
    assert (yard.folder(job) / "work/ids").read_text() == "1 2\n"
    assert (yard.folder(job) / "work/seen").read_text() == "/proc/1 /proc/2\n"


def test_a_line_before_the_script_runs_inside(data: DataFolder) -> None:
    yard = Yard(data, JOBORCH_ISOLATION="process", SERVICE_EXAMPLE_PRELUDE="export WORD=$PPID")
    try:
        job = yard.run(yard.submit("echo $WORD > word", X_Joborch_Service="example"))
        assert (yard.folder(job) / "work/word").read_text() == "1\n", job.reason
    finally:
        yard.close()


# == Ends ==

SLEEPS = str(1_000_000 + os.getpid())  # seconds; nobody else's process has this argument
HIDES = f"env -i setsid bash -c '(cd /; exec 0<&- 1>&- 2>&-; exec setsid sleep {SLEEPS}) & exit' &"


def hidden() -> list[int]:
    """The processes that gave up all by which they could be found."""
    return [process.pid for process in all_processes() if read(process.pid, "cmdline") == f"sleep\0{SLEEPS}\0"]


@pytest.fixture
def nothing_hidden() -> Iterator[None]:
    """Ends what a fault let run on."""
    yield
    for pid in hidden():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("way", ["terminate", "exit", "restart", "the wrapper is gone"])
def test_what_gives_up_all_by_which_it_is_found_ends(way: str, yard: Yard, nothing_hidden: None) -> None:
    """Session, group, parent, environment, folder and streams: nothing of it survives its payload."""
    job = begun(yard, f"{HIDES}\n{READY}\n{WAIT}")
    wait_for(hidden, 60, "what hides")
    if way == "exit":
        let_go(yard, job)
    elif way == "restart":
        yard.restart()
        let_go(yard, job)
    elif way == "terminate":
        kill(yard, job)
        assert hidden() == []
    else:
        os.kill(int((yard[job].handle or "").split()[0]), signal.SIGKILL)
    wanted = {"terminate": Status.KILLED, "the wrapper is gone": Status.FAILED}.get(way, Status.COMPLETED)
    yard.until(job, wanted)
    assert hidden() == []
    if way == "the wrapper is gone":
        assert (yard[job].cause, "the wrapper was killed" in yard[job].reason) == ("infrastructure", True)
    elif way != "terminate":
        assert yard[job].reason.endswith("processes that it left running were killed")


@pytest.mark.parametrize("value", VALUES)
def test_a_script_gets_term_once_and_time_to_tidy_up(value: str, data: DataFolder) -> None:
    """Its handler ends by itself; what isolates it does not end before."""
    yard = Yard(data, **isolated(value, JOBORCH_KILL_GRACE="60"))
    try:
        job = begun(yard, f"trap 'echo told >> told; sleep 0.3; echo tidy >> told; exit 0' TERM\n{READY}\n{WAIT}")
        kill(yard, job)
        assert (yard.folder(job) / "work/told").read_text() == "told\ntidy\n"
        assert yard[job].status is Status.KILLED
    finally:
        yard.close()


def test_process_1_passes_term_on(yard: Yard) -> None:
    """To a script that somebody outside told by its first process alone."""
    job = begun(yard, f"trap 'echo told > told; exit 7' TERM\n{READY}\n{WAIT}")
    os.kill(first_of(job), signal.SIGTERM)
    yard.until(job, Status.FAILED)
    assert yard[job].exit_code == 7


def test_only_what_isolates_is_left_out_of_the_first_signal(yard: Yard) -> None:
    """The wrapper and the script get TERM; what starts the namespace, and process 1, do not."""
    job = begun(yard, f"{READY}\n{WAIT}")
    wrapper = int((yard[job].handle or "").split()[0])
    spared = [process for process in all_processes() if process.pid in pids_of(job) and is_of_sandbox(process, wrapper)]
    assert first_of(job) in {process.pid for process in spared}
    scripts = {pid for pid in pids_of(job) if read(pid, "cmdline").split("\0")[1:2] == ["./run.sh"]}
    assert scripts
    assert {wrapper, *scripts}.isdisjoint(process.pid for process in spared)
    assert len(spared) >= 2


def test_a_failure_of_what_isolates_is_not_the_scripts(data: DataFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where the kernel has no more namespaces: the server tries the job again."""
    yard = Yard(data, JOBORCH_ISOLATION="process")
    try:
        program = tmp_path / "unshare"
        program.write_text("#!/bin/sh\necho 'unshare: unshare failed: No space left on device' >&2\nexit 1\n")
        program.chmod(0o755)
        yard.client.executor.inherited["PATH"] = f"{tmp_path}:{os.environ['PATH']}"  # type: ignore[attr-defined]
        job = yard.run(yard.submit("exit 0"))
        assert (job.status, job.cause) == (Status.FAILED, "infrastructure")
        assert job.reason.endswith('failed, or was killed; last line of standard error: "unshare: unshare failed: No space left on device"')
    finally:
        yard.close()


def test_process_1_does_nothing_where_it_is_not_process_1(tmp_path: Path) -> None:
    """It would end all processes of its user. Here it is in a namespace, lest this ends those of the machine, but not the first one."""
    namespace = sandbox.process_words(client_config(JOBORCH_ISOLATION="process")).split()
    first = ["bash", "-c", FIRST_INSIDE.replace("@PROCESSES@", ""), "first", "touch", "done"]
    command = [*namespace, "sh", "-c", '"$@" 4>left; echo $?', "sh", *first]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (said.stdout, [path.name for path in tmp_path.iterdir()]) == ("1\n", ["left"]), said


# == Never less than what was asked for ==


def client_config(**changes: str) -> joborch.Config:
    """The settings of a client."""
    return load_config("client", {}, {"JOBORCH_TOKEN": "t", "DATA_PATH": "/nowhere", **changes})


@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_this_machine_cannot_give_stops_the_start(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And says what is missing: the program, or what the program says."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"JOBORCH_ISOLATION is '{value}', which is not possible here: there is no .*: install "):
        sandbox.make_sandbox(client_config(**isolated(value)))


def test_what_the_program_says_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program that fails at each start, as where user namespaces are forbidden."""
    program = tmp_path / "unshare"
    program.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"not possible here: unshare: unshare failed: Operation not permitted: .*docs/security\.md"):
        sandbox.make_sandbox(client_config(JOBORCH_ISOLATION="process"))


@pytest.mark.parametrize("executor", ["slurm", "dirac"])
def test_a_batch_system_isolates_its_jobs_itself(executor: str) -> None:
    with pytest.raises(ConfigError, match=f"JOBORCH_EXECUTOR is '{executor}': the site's batch system isolates its jobs itself"):
        client_config(JOBORCH_ISOLATION="process", JOBORCH_EXECUTOR=executor)


def test_the_start_says_what_none_means(pair: Pair) -> None:
    """In one line, with what this machine could do."""
    line = wait_for(lambda: re.search(r"INFO +JOBORCH_ISOLATION is none: .*; this machine can do .*", pair.client.log), 60, "the line")
    assert "stop their scripts" in line[0]


def test_doctor_tries_each_value(tmp_path: Path) -> None:
    code, found = doctor("client", tmp_path, JOBORCH_ISOLATION="process")
    texts = [finding["text"] for finding in found]
    assert code == 0
    assert any(text.startswith("JOBORCH_ISOLATION is process: all processes") for text in texts)
    assert "JOBORCH_ISOLATION=process works here" in texts


# == What the scripts of others can do ==

# What it can see, by the exit status of each.
LOOKS = {
    "read another's inputs": "cat ../../*/work/secret.txt | grep -q sequence",
    "see another's environment": "grep -qa JOBORCH_USER_ID=CHANGED /proc/[0-9]*/environ",
    "write its own exit file": "[ -w ../exit.json ]",
    "reach the client's port": "exec 3<>/dev/tcp/127.0.0.1/CLIENT",
    "reach the server's socket": "[ -S SOCKET ]",
    "read the home folder": "grep -q mine HOME/token",
    "read the client's token": "grep -q . HOME/.config/joborch/client-token",
    "read the client's database": "head -c 15 DATA/joborch.db | grep -q SQLite",
    "write to the client's database": "[ -s DATA/joborch.db ] && dd if=/dev/null of=DATA/joborch.db conv=notrunc",
    "signal the client": "kill -0 PID",
    "gain privileges": "! grep -q 'NoNewPrivs:.1' /proc/self/status",
    "write to the system": "[ -w /usr ] || touch /etc/joborch-test",
}
# What it does to the jobs of others; those are CHANGED, KILLED, and so on, by the user that each is of.
DEEDS = {
    "change another's result": "for d in ../../*/work; do [ ! -e $d/secret.txt ] || echo 'echo forged > result.txt' >> $d/run.sh; done",
    "kill another's script": "for p in /proc/[0-9]*; do ! grep -qa JOBORCH_USER_ID=KILLED $p/environ || kill -9 ${p#/proc/}; done",
    "end another's job at the server": "exec 3<>/dev/tcp/127.0.0.1/SERVER; printf '%s\\r\\n' 'POST /terminate/NUMBER HTTP/1.0' "
    "Host:127.0.0.1:SERVER Content-Length:0 '' >&3; cat <&3",
    "keep another's job from ending": """for e in /proc/[0-9]*/environ; do
    ! grep -qa JOBORCH_USER_ID=HELD $e || mark=$(tr '\\0' '\\n' < $e | grep -a ^JOBORCH_MARK=)
done
[ -n "$mark" ] || for d in ../../*/work; do [ ! -e $d/held.txt ] || mark=JOBORCH_MARK=$(basename $(dirname $d)); done
[ -z "$mark" ] || (setsid env $mark sleep 1000 &)""",
}
FORGED_END = """printf '{"status": 0, "left": 0, "told": 0, "limit": 0}' > ../x && mv ../x ../exit.json; exit 7"""
TAKE_PLACE = "kill -9 PID && exec /usr/bin/python3 taker.py CLIENT 60; /usr/bin/python3 taker.py CLIENT 1; true"
TAKER = """
import contextlib, socket, sys, time
end, listener = time.monotonic() + float(sys.argv[2]), None
while listener is None and time.monotonic() < end:
    with contextlib.suppress(OSError):
        listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while listener and time.monotonic() < end:
    listener.settimeout(1)
    with contextlib.suppress(OSError):
        line = listener.accept()[0]
        line.sendall(b"taken")
        line.close()
"""
FOR_NONE_ALONE = {
    *("see another's environment", "signal the client", "write to the system", "kill another's script", "keep another's job from ending"),
    "take the client's place",
}


TRY_ALL = """for number in 1 2 3 4 5 6 7 8; do
    (exec 3<>/dev/tcp/127.0.0.1/PORT; printf 'GET /jobs HTTP/1.0\\r\\nHost:127.0.0.1:PORT\\r\\n\\r\\n' >&3; (cat <&3 >answer.$number &) )
done
for try in $(seq 600); do
    [ "$(grep -l ^HTTP answer.* | wc -l)" = 8 ] && break
    sleep 0.1
done
cat answer.*
"""


@pytest.mark.parametrize("value", [value for value in VALUES if value != "process"])
def test_a_script_with_the_network_of_the_machine(value: str, make_pair: MakePair, open_folder: Path, pyz: Path, root: None) -> None:
    """The server is there, and refuses it; this user's own calls are answered meanwhile, and the start said so."""
    user = None if value == "user" else NOBODY_UID
    settings = isolated(value, JOBORCH_NETWORK="host", JOBORCH_SLOTS="2")
    pair = make_pair(folder=open_folder / "pair", client=settings, user=user, program=open_program(open_folder, pyz)).start()
    assert "JOBORCH_NETWORK is host: a server or client on this machine serves them only if they have a token" in pair.client.log
    held = submit(pair.server, "touch ready; until [ -e go ]; do sleep 0.1; done", user_id=1)
    wait_status(pair.server, held, "Running")
    job = run_to_end(pair.server, TRY_ALL.replace("PORT", str(pair.server.port)), user_id=2)
    said = download(pair.server, job["id"]).text(".joborch/stdout")
    assert said.count("HTTP/1.1 403") + said.count("HTTP/1.0 403") == 8, said
    assert "user_id" not in said
    assert pair.server.get("/jobs").json()["jobs"]


def test_processes_are_not_looked_at_without_such_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would cost each caller without a token milliseconds. What shows them is a note that no other user can have made."""
    looks: list[int] = []
    monkeypatch.setattr(processes, "all_stats", lambda: looks.append(1) or iter(()))
    note = Path(f"/dev/shm/joborch-{os.geteuid()}-host-network")
    processes.note_host_network()
    assert note.stat().st_uid == os.geteuid()
    note.unlink()
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER_UID)
    note = Path(f"/dev/shm/joborch-{STRANGER_UID}-host-network")
    assert not processes.is_scripts_socket(1) and not looks
    note.touch()
    assert not processes.is_scripts_socket(1) and looks
    with pytest.raises(PermissionError, match="belongs to another user"):
        processes.note_host_network()
    note.unlink()


def test_a_client_as_root_gives_scripts_the_network_only_with_users_of_their_own(root: None) -> None:
    """A server of another user cannot tell root's processes apart."""
    with pytest.raises(ConfigError, match="but scripts of a client as root are root to every server here: run the client as a user, or"):
        sandbox.make_sandbox(client_config(**isolated("full", JOBORCH_NETWORK="host")))


AS_USERS = [("none", NOBODY_UID), ("process", NOBODY_UID), ("full", NOBODY_UID), ("full", None), ("user", None)]


@pytest.mark.parametrize(("value", "user"), AS_USERS, ids=["none", "process", "full", "full, root", "user"])
def test_what_a_script_can_do_to_others(
    value: str, user: int | None, make_pair: MakePair, open_folder: Path, pyz: Path, root: None
) -> None:
    """Everything without isolation, which shows that the attacks work; nothing under `full` and `user`."""
    limits = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "100"}
    settings, program = isolated(value, JOBORCH_SLOTS="8"), open_program(open_folder, pyz)
    pair = make_pair(folder=open_folder / "pair", server=limits, client=settings, user=user, program=program).start()
    assert pair.client.home
    pair.client.home.joinpath("token").write_text("mine")
    own_token = pair.client.home / ".config/joborch/client-token"
    own_token.parent.mkdir(parents=True)
    own_token.write_text("a token")
    for path in (own_token, *own_token.parents[:2]):
        os.chown(path, user or 0, user or 0)
    if value == "full" and user:
        check_works(pair)
    works = attacks_that_work(pair, user or 0)
    everything = {*LOOKS, *DEEDS, "forge its own end", "take the client's place"} - ({"write to the system"} if user else set())
    assert works == {"none": everything, "process": everything - FOR_NONE_ALONE}.get(value, set())


def attacks_that_work(pair: Pair, user: int) -> set[str]:
    """What one user's script can do to those of others, to the client and to the server."""
    client, server = pair.client, pair.server
    first = 1_000_000 + 10 * os.getpid()  # nobody else's script on this machine is of these users
    users = {name: str(first + number) for number, name in enumerate(("CHANGED", "KILLED", "ENDED", "HELD"))}
    script = "until [ -e done ]; do sleep 0.1; done\n"
    files = {"CHANGED": {"secret.txt": b"sequence of another user"}, "HELD": {"held.txt": b""}}
    victims = {name: submit(server, script, files.get(name), user_id=int(number)) for name, number in users.items()}
    for number in victims.values():
        wait_status(server, number, "Running")
    facts: dict[str, object] = {"SERVER": server.port, "CLIENT": client.port, "PID": client.pid, "HOME": client.home, "DATA": client.data}
    facts |= {"SOCKET": f"/tmp/joborch-{user}/joborch-{server.port}.sock", "NUMBER": victims["ENDED"], **users}

    def run(text: str, files: dict[str, bytes] | None = None) -> int:
        return submit(server, re.sub("|".join(facts), lambda found: str(facts[found[0]]), text), files, user_id=first - 1)

    looks = [f"( {look} ) > /dev/null 2>> errors && echo {name!r}" for name, look in LOOKS.items()]
    deeds = [f"( {deed}\n) > /dev/null 2>> errors" for deed in DEEDS.values()]
    attacker = wait_status(server, run("\n".join([*looks, *deeds, "true"])), *ENDED)
    assert attacker["status"] == "Completed", attacker["reason"]
    works = set(download(server, attacker["id"]).text(".joborch/stdout").split("\n")) - {""}
    states = {name: server.job(number)["status"] for name, number in victims.items()}
    works |= {"kill another's script"} if states["KILLED"] == "Failed" else set()
    works |= {"end another's job at the server"} if states["ENDED"] == "Killed" else set()
    for name in users:
        if states[name] == "Running":
            (client.data / "jobs" / f"{server.job(victims[name])['uuid']}.1" / "work/done").touch()
            ended = wait_status(server, victims[name], "Completed")
            works |= {"keep another's job from ending"} if ended["reason"] != "run.sh ended with exit status 0" else set()
    works |= {"change another's result"} if "result.txt" in download(server, victims["CHANGED"]).names() else set()
    forged = wait_status(server, run(FORGED_END), *ENDED)
    works |= {"forge its own end"} if forged["status"] == "Completed" else set()
    taker = run(TAKE_PLACE, {"taker.py": TAKER.encode()})
    wait_for(lambda: not client.running() or server.job(taker)["status"] in ENDED, 90, "the end of the client, or of the attack")
    if client.running():
        assert client.get("/health").json()["status"] == "ok"
        return works
    wait_for(lambda: said_at(client.port) == b"taken", 60, "another who listens there")
    return works | {"take the client's place"}


def check_works(pair: Pair) -> None:
    """What works outside works for a plain user as well, who has user namespaces inside."""
    job = run_to_end(pair.server, works_script("/usr"), INPUTS)
    outputs = download(pair.server, job["id"])
    for number, name in enumerate(WORKS):
        if name != "a prefix with an activate script" and shutil.which(PROGRAMS.get(name, "sh")):
            said = outputs.text(f"{number}.out")
            assert said and "failed" not in said, (name, said)


def said_at(port: int) -> bytes:
    """What somebody who listens there says unasked."""
    try:
        return raw_exchange(port, b"")
    except ConnectionRefusedError:
        return b""


# == What works outside works inside ==

PYTHON_POOL = """
import multiprocessing, multiprocessing.shared_memory, socket, tempfile
def count(lock, value):
    for _ in range(100):
        with lock:
            value[0] = (value[0] + 1) % 256
if __name__ == "__main__":
    with multiprocessing.Pool(3) as pool:
        print(sum(pool.map(abs, range(-100, 100))))
    memory, lock = multiprocessing.shared_memory.SharedMemory(create=True, size=1), multiprocessing.Lock()
    workers = [multiprocessing.Process(target=count, args=(lock, memory.buf)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(memory.buf[0])
    memory.close()
    memory.unlink()
    listener = socket.create_server(("127.0.0.1", 0))
    socket.create_connection(listener.getsockname()).close()
    with tempfile.NamedTemporaryFile() as file:
        print(file.name.startswith(tempfile.gettempdir()))
"""
PYTHON_MPI = """
import ctypes
mpi = ctypes.CDLL("libmpich.so.12")
world, integer, add = 0x44000000, 0x4C000405, 0x58000003  # mpi.h of MPICH
rank, total = ctypes.c_int(), ctypes.c_int()
mpi.MPI_Init(None, None)
mpi.MPI_Comm_rank(world, ctypes.byref(rank))
mpi.MPI_Allreduce(ctypes.byref(ctypes.c_int(rank.value + 1)), ctypes.byref(total), 1, integer, add, world)
print(f"rank {rank.value}: {total.value}", flush=True)
mpi.MPI_Finalize()
"""
LUA_MODULE = 'setenv("TOOL_HOME", "/opt/tool")\nprepend_path("PATH", "/opt/tool/bin")\n'
INPUTS = {"pool.py": PYTHON_POOL.encode(), "mpi.py": PYTHON_MPI.encode(), "modules/tool/1.0.lua": LUA_MODULE.encode()}
WORKS = {
    "Python's multiprocessing, loopback and temporary files": "/usr/bin/python3 pool.py",
    "MPI on one machine": "mpirun.mpich -n 2 /usr/bin/python3 mpi.py | sort",
    "shared memory": "echo word > /dev/shm/joborch-$$ && cat /dev/shm/joborch-$$ && rm /dev/shm/joborch-$$",
    "environment modules": "chmod -R a+rX . && . /usr/share/lmod/lmod/init/bash && module use $PWD/modules && module load tool "
    "&& echo $TOOL_HOME ${PATH%%:*}",
    "a prefix with an activate script": ". PREFIX/bin/activate && python -c 'import tool, sys; print(tool.NAME, sys.prefix)' && tool",
    "containers without root": "mkdir place && unshare --user --map-root-user --mount "
    "sh -c 'mount --bind /usr place && ls -d place/bin && id -u'",
    "Apptainer": "apptainer --version",
    "time zones": "date -d @0 +%Z%z; TZ=Europe/Paris date -d @0 +%Z%z; md5sum < /etc/localtime",
    "locales": "locale -a; LC_ALL=C.UTF-8 locale charmap; printf '\\xc3\\xa9' | LC_ALL=C.UTF-8 wc -m",
    "fonts": "fc-list | sort; fc-match sans",
    "users and names": "whoami | wc -w; id -gn | wc -w; getent passwd $(id -u) | wc -l; echo ~ | wc -w; hostname; getent hosts localhost",
    "name servers": "cat /etc/resolv.conf /etc/nsswitch.conf",
    "devices": "head -c 4 /dev/urandom | wc -c; echo lost > /dev/null; [ -c /dev/full ] && echo full",
    "streams by name": "echo word > /dev/stdout",
    "a home to write to": "cd && touch .joborch-test && rm .joborch-test && echo done",
}


def works_script(prefix: Path | str) -> str:
    """A script in which all these commands write to files of their own."""
    commands = [command.replace("PREFIX", str(prefix)) for command in WORKS.values()]
    return "\n".join(
        [*(f'( {command} ) > {number}.out 2>&1 || echo "failed: $?" >> {number}.out' for number, command in enumerate(commands)), "true"]
    )


PROGRAMS = {
    "MPI on one machine": "mpirun.mpich",
    "fonts": "fc-list",
    "Apptainer": "apptainer",
}  # others are on every Debian, or in its base


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix as conda makes them, beside the system: an interpreter, a library, a program, and a script that activates it."""
    folder = tmp_path_factory.mktemp("prefix") / "env"
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", folder], check=True)
    (library,) = folder.glob("lib/python3*/site-packages")
    (library / "tool.py").write_text("NAME = 'tool'\n")
    (folder / "bin/tool").write_text(f"#!{folder}/bin/python\nimport tool\nprint('program', tool.NAME)\n")
    (folder / "bin/tool").chmod(0o755)
    return folder


@pytest.fixture(scope="module", name="said_by")
def said_by_fixture(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Callable[[str], dict[str, str]]:
    """What all these commands write with a value of JOBORCH_ISOLATION, by name: run once, in one script."""

    @functools.lru_cache
    def said(value: str) -> dict[str, str]:
        folder = DataFolder(str(tmp_path_factory.mktemp("works") / "data"))
        umask, temporary = os.umask(0o022), tempfile.tempdir  # open() changes both
        folder.open()
        yard = Yard(folder, **isolated(value, JOBORCH_BIND=str(prefix)))
        try:
            job = yard.run(yard.submit(works_script(prefix), INPUTS))
            assert job.status is Status.COMPLETED, job.reason
            return {name: (yard.folder(job) / f"work/{number}.out").read_text() for number, name in enumerate(WORKS)}
        finally:
            yard.close()
            folder.lock.close()
            os.umask(umask)
            tempfile.tempdir = temporary

    return said


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("value", VALUES)
def test_what_works_outside_works_inside(value: str, name: str, said_by: Callable[[str], dict[str, str]]) -> None:
    program = PROGRAMS.get(name)
    if program and not shutil.which(program):
        pytest.skip(f"needs {program}")
    if name == "containers without root" and (value, os.geteuid()) == ("full", 0):
        pytest.skip("root without privileges may not make such a namespace: see the next test")
    outside = said_by("none")[name]
    assert outside and "failed" not in outside, outside
    assert said_by(value)[name] == outside


# == Paths that scripts see besides their own ==


def test_further_paths(data: DataFolder, tmp_path: Path) -> None:
    """One to read and one to write to; nothing beside them is there."""
    for name in ("read", "write", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    paths = {"JOBORCH_BIND": f"{tmp_path}/read/", "JOBORCH_BIND_RW": f"{tmp_path}/write"}
    yard = Yard(data, JOBORCH_ISOLATION="full", **paths)
    try:
        script = f"cd {tmp_path}; cat read/file; echo new > write/new; ! touch read/new && ! [ -e other ] && echo right"
        job = yard.run(yard.submit(script))
        assert (yard.folder(job) / "stdout").read_text() == "readright\n"
        assert ((tmp_path / "write/new").read_text(), (tmp_path / "read/new").exists()) == ("new\n", False)
    finally:
        yard.close()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing", "which does not exist: create it, or remove it from JOBORCH_BIND"),
        ("link", "which is a link, or below one: give"),
        ("data/jobs", "which is in DATA_PATH"),
        ("", "which contains what scripts must not see"),
        ("/tmp", "which contains what scripts must not see"),
        ("relative", "give absolute paths separated by commas"),
    ],
)
def test_a_path_that_cannot_be_shown(path: str, said: str, data: DataFolder, tmp_path: Path) -> None:
    """One line that names it, before anything is started."""
    (tmp_path / "link").symlink_to(tmp_path)
    given = path if path in ("/tmp", "relative") else f"{tmp_path}/{path}"
    with pytest.raises(ConfigError, match=re.escape(said)):
        sandbox.make_sandbox(client_config(DATA_PATH=str(data.path), JOBORCH_ISOLATION="full", JOBORCH_BIND=given))


def test_settings_of_a_value_without_it_are_named() -> None:
    warnings = client_config(JOBORCH_BIND="/usr", JOBORCH_UIDS="28001-28002", JOBORCH_ISOLATION="process").warnings
    assert "JOBORCH_BIND has no effect: JOBORCH_ISOLATION is process, not full or user" in warnings
    assert "JOBORCH_UIDS has no effect: JOBORCH_ISOLATION is process, not user" in warnings


# == What the kernel gives to user 0, or to whoever inherits it ==

CHANGEABLE = """
find /proc/sys /proc/irq /proc/bus /proc/fs /proc/acpi /proc/scsi /proc/sysrq-trigger /proc/mtrr /sys -type f -perm /222 2>/dev/null |
while read -r file; do
    { exec 3>>"$file"; } 2>/dev/null && echo "$file" && exec 3>&-
done >changeable
true
"""


def test_a_script_cannot_change_the_kernel(yard: Yard) -> None:
    """As by core_pattern, a program that the kernel runs outside as root: user 0 may change it without any privilege."""
    if yard.client.config.isolation == "process":
        pytest.skip("protects no files")
    job = yard.run(yard.submit(CHANGEABLE))
    assert job.status is Status.COMPLETED, job.reason
    assert (yard.folder(job) / "work/changeable").read_text() == ""


KEYS = {"x86_64": (248, 250), "aarch64": (217, 219)}  # the numbers of add_key(2) and keyctl(2)
KEY, OF_SESSION, SEARCH = b"joborch-test-key", -3, 10  # see keyrings(7)
FIND_KEY = f"""/usr/bin/python3 - >found <<'END'
import ctypes
print(ctypes.CDLL(None).syscall({KEYS.get(platform.machine(), (0, 0))[1]}, {SEARCH}, {OF_SESSION}, b"user", {KEY!r}, 0) > 0)
END
"""


@pytest.mark.skipif(platform.machine() not in KEYS, reason="the numbers of system calls differ by machine")
def test_a_script_has_no_keys_of_its_client(yard: Yard) -> None:
    """As a Kerberos ticket in the session keyring, which every process inherits. Where it has this user's files, it has the keys, too."""

    def run() -> Job:
        if libc().syscall(KEYS[platform.machine()][0], b"user", KEY, b"secret", 6, OF_SESSION) < 0:
            pytest.skip("needs keyrings in the kernel")
        return yard.run(yard.submit(FIND_KEY))

    with ThreadPoolExecutor(1, initializer=leave_keyring) as thread:  # these tests keep their own keyring
        job = thread.submit(run).result()
    assert job.status is Status.COMPLETED, job.reason
    assert (yard.folder(job) / "work/found").read_text() == f"{yard.client.config.isolation == 'process'}\n"


# == A user for each script ==

WHO = "id -u > who; grep -E '^(Cap(Prm|Eff|Amb)|Groups|NoNewPrivs)' /proc/self/status > rights"


def test_a_script_runs_as_a_user_of_its_own(own_users: Yard) -> None:
    """Without privileges and groups; what it made, whatever its mode, is fetched, and removed by the cleaner."""
    script = f"{WHO}; echo more >> data; mkdir -p shut/in; echo kept > shut/in/file; chmod 000 data shut/in shut; touch $TMPDIR/rest"
    job = own_users.run(own_users.submit(script, {"data": b"given\n", "folder/data": b""}))
    assert job.status is Status.COMPLETED, job.reason
    folder = own_users.folder(job)
    assert int((folder / "work/who").read_text()) == folder.joinpath("work/who").stat().st_uid == UIDS[0]
    assert folder.stat().st_uid == (folder / "exit.json").stat().st_uid == 0
    rights = dict(line.split(":") for line in (folder / "work/rights").read_text().splitlines())
    assert {name: text.strip(" \t0") for name, text in rights.items()} == dict.fromkeys(rights, "") | {"NoNewPrivs": "1"}
    with own_users.zip(job) as archive:
        assert (archive.read("data"), archive.read("shut/in/file")) == (b"given\nmore\n", b"kept\n")
    own_users.clock.pass_s(10 * own_users.client.config.max_age_s)
    joborch.clean_tick(own_users.client)
    assert list(own_users.data.jobs.iterdir()) == []


def test_no_two_scripts_have_one_user(own_users: Yard) -> None:
    """Also if the client was restarted; an id is taken again when its script has ended."""

    def uid_of(job: Job) -> int:
        return (own_users.folder(job) / "work").stat().st_uid

    first = begun(own_users, f"{READY}\n{WAIT}")
    own_users.restart()
    second = begun(own_users, f"{READY}\n{WAIT}")
    assert (uid_of(first), uid_of(second)) == (UIDS[0], UIDS[1])
    let_go(own_users, first)
    own_users.until(first, Status.COMPLETED)
    third = begun(own_users, f"{READY}\n{WAIT}")
    assert uid_of(third) == UIDS[0]
    for job in (second, third):
        kill(own_users, job)


def test_a_script_that_asks_for_all_processes_leaves_others_theirs(own_users: Yard) -> None:
    """It signals all that it may, and its user is not that of another script."""
    victim = begun(own_users, f"{READY}\n{WAIT}")
    assert own_users.run(own_users.submit("kill -9 -1; exit 0")).status in (Status.COMPLETED, Status.FAILED)
    assert own_users[victim].status is Status.RUNNING
    let_go(own_users, victim)
    own_users.until(victim, Status.COMPLETED)


def test_what_was_interrupted_before_the_start_is_given_anew(own_users: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client dies when it has given the files away, and starts the payload again with whatever id is free then."""
    job = own_users.submit(f"{WHO}; echo word > $TMPDIR/file")
    with monkeypatch.context() as patched:
        replace(patched, "start_session", died)
        with pytest.raises(Died):
            run_tick(own_users.client)
    own_users.restart()
    other = begun(own_users, f"{READY}\n{WAIT}")
    own_users.until(job, Status.COMPLETED)
    assert int((own_users.folder(job) / "work/who").read_text()) != (own_users.folder(other) / "work").stat().st_uid
    kill(own_users, other)


class Died(BaseException):
    """What happens instead of a start."""


def died(*_: object) -> None:
    """The client dies."""
    raise Died


@pytest.mark.parametrize(
    ("uids", "said"),
    [
        ("", "set JOBORCH_UIDS to user ids that nobody has, as in 20001-"),
        ("28001", "give the first and the last of at most 4,096 user ids"),
        ("28001-28000", "give the first and the last"),
        ("0-64", "give the first and the last"),
        ("28001-99999", "give the first and the last"),
        ("4294967290-4294967295", "give the first and the last"),
        ("28001-x", "give the first and the last"),
        ("28001-28001", "JOBORCH_UIDS is 28001-28001, 1 id for 2 slots: give at least one for each slot"),
        (f"{NOBODY_UID - 3}-{NOBODY_UID}", f"but {NOBODY_UID} is the id of the user 'nobody': give ids that nobody has"),
        ("28050-28060", "gives 28060-28069 to 'somebody': give ids that nobody has"),
        ("28069-28080", "gives 28060-28069 to 'somebody': give ids that nobody has"),
    ],
)
def test_a_range_that_cannot_be_used(uids: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: None) -> None:
    """One line at the start."""
    (tmp_path / "subuid").write_text("# comment\nsomebody:28060:10\nbroken\n")
    monkeypatch.setitem(sandbox.SUBORDINATE, "user", str(tmp_path / "subuid"))
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        sandbox.make_sandbox(client_config(JOBORCH_ISOLATION="user", JOBORCH_SLOTS="2", JOBORCH_UIDS=uids))
    assert "\n" not in str(caught.value)


def test_ids_of_groups_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's user has a group of the same number."""
    path = tmp_path / "subgid"
    path.write_text("somebody:28060:10\n")
    monkeypatch.setitem(sandbox.SUBORDINATE, "group", str(path))
    monkeypatch.setitem(sandbox.SUBORDINATE, "user", "/nowhere")
    assert sandbox.why_not_free(range(28050, 28061)) == f"{path} gives 28060-28069 to 'somebody'"
    assert sandbox.why_not_free(range(28070, 28080)) == ""
    users = {user.pw_uid for user in pwd.getpwall()}
    group = next(group for group in grp.getgrall() if group.gr_gid not in users)
    assert sandbox.why_not_free(range(group.gr_gid, group.gr_gid + 1)) == f"{group.gr_gid} is the id of the group {group.gr_name!r}"


def test_two_clients_have_no_user_in_common(make_process: MakeProcess, root: None) -> None:
    """Ranges that touch are two, ranges that overlap are none; they are free when their client ends, however it ends."""
    first, last = FIRST_UID, FIRST_UID + 47

    def client(uids: str) -> Process:
        return make_process("client", isolated("user", JOBORCH_SLOTS="2", JOBORCH_UIDS=uids))

    holder, other = client(f"{first + 10}-{first + 20}").start(), client(f"{first + 20}-{last}")
    code, said = other.start_refused()
    assert code == 2 and "Traceback" not in said
    line = f"JOBORCH_UIDS is {first + 20}-{last}, but another client on this machine has some of these ids: give each client a range of"
    assert line in said
    client(f"{first}-{first + 9}").start()
    holder.kill()
    other.start()


def test_where_no_lock_can_be_kept_the_log_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sandbox, "UIDS_FILE", "/proc/self/nowhere/uids")
    assert sandbox.hold_uids(UIDS) is None
    assert "no other client may use the ids of JOBORCH_UIDS, but that cannot be checked" in caplog.text


def test_users_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY_UID)
    with pytest.raises(ConfigError, match="which needs root: run the client as root, or give full"):
        sandbox.make_sandbox(client_config(**isolated("user")))


# == The case that made this ==

CASE = ROOT.parent / "shared/cases/security/17-payloads-are-not-apart.py"
CASES = {"none": FIRST_UID + 60, "process": FIRST_UID + 61, "full": FIRST_UID + 62, "user": 0}  # by whom: it kills clients of its user
CASE_UIDS = f"{FIRST_UID + 48}-{FIRST_UID + 59}"
LAUNCHER = """import os, sys
os.environ.update({settings})
os.execv(sys.executable, [sys.executable, {program!r}, *sys.argv[1:]])
"""
Case = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture(scope="module", name="case")
def case_fixture(pyz: Path) -> Iterator[Case]:
    """Starts the case with a value of JOBORCH_ISOLATION."""
    folder = Path(tempfile.mkdtemp(prefix="joborch-open-"))
    folder.chmod(0o755)
    _, program = open_program(folder, pyz)
    started: list[subprocess.Popen[str]] = []

    def start(value: str) -> subprocess.Popen[str]:
        place = folder / f"{value}{len(started)}"
        place.mkdir()
        common = (CASE.parent / "common.py").read_text()
        text = re.sub(r"^VICTIM, .*", f"VICTIM, MALLORY = {CASES[value]}, {STRANGER_UID}", common, flags=re.MULTILINE)
        assert text != common
        # Beside other tests, a server may not start within 20 s, least of all a nice one.
        text = re.sub(r"^os\.nice\(.*", "", text, flags=re.MULTILINE).replace("seconds=20,", "seconds=120,")
        assert "os.nice" not in text and "seconds=120," in text
        (place / "common.py").write_text(text)
        script = Path(shutil.copy(CASE, place))
        settings = {"JOBORCH_ISOLATION": value, **({"JOBORCH_UIDS": CASE_UIDS} if value == "user" else {})}
        (place / "joborch.pyz").write_text(LAUNCHER.format(settings=settings, program=program))
        command = [sys.executable, str(script), str(place / "joborch.pyz")]
        started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=60)
    shutil.rmtree(folder)


@pytest.fixture(scope="module", autouse=True)
def running(request: pytest.FixtureRequest) -> dict[str, subprocess.Popen[str]]:
    """The case with each value, started with the first test of this file: it mostly waits, for a minute."""
    wanted = any(item.name.startswith("test_the_case") for item in request.session.items)
    if not wanted or os.geteuid() != 0 or not CASE.exists():
        return {}
    start: Case = request.getfixturevalue("case")
    return {value: start(value) for value in CASES}


@pytest.mark.timeout(900)  # if the machine stands still, and the case is tried again
@pytest.mark.parametrize("value", CASES)
def test_the_case_that_showed_what_scripts_can_do(value: str, running: dict[str, subprocess.Popen[str]], case: Case, root: None) -> None:
    """`none` shows that it can. A machine that stands still for seconds looks like a success, so it is tried again: a hole stays one."""
    if not CASE.exists():
        pytest.skip(f"{CASE} is missing: lay the folder `shared` beside the repository to run it")
    always = {"read another user's inputs", "end as Completed with exit status 7", "read the client's token"}
    prevented = {"kill another user's script", "keep another user's job from ending", "kill the client", "take the client's place"}
    for number in range(3):
        said = (case(value) if number else running[value]).communicate(timeout=300)[0]
        works = set(re.findall(r"^CAN +([^(,\n]*[^(,\n ])", said, re.MULTILINE))
        if {"none": works >= always, "process": works >= always and not works & prevented}.get(value, "safe: 0 of 10" in said):
            return
        print(said)
    pytest.fail(said)
