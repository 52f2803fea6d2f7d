"""The wrapper and the local executor: one start an attempt, found again after a crash, ended with all its processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import alive, processes_below, replace, wait_for
from hypothesis import example, given
from hypothesis import strategies as st
from world import AT_HOME, BOUNDED, HandClock, changed, end_payloads, new_job, soon, together

import joborch
from joborch import Cause, DataFolder, Job, LocalExecutor, Outcome, StillRunning, Store, read_exit
from joborch_base.executors import (
    CHILDREN_FILE,
    PASSED_ON,
    Process,
    ProcessTable,
    all_processes,
    bears_mark,
    boot_id,
    fits_one,
    is_own_setting,
    marks_of,
    payload_environment,
    process_start,
    signal_all,
    tree_of,
)
from joborch_base.local import start_session

pytestmark = pytest.mark.usefixtures("strangers_are_safe")


GRACE_S = 0.5


class Bench:
    """Payloads in a data folder, and the executor that runs them."""

    def __init__(self, folder: DataFolder) -> None:
        self.data = folder
        self.store = Store(":memory:", "client", HandClock())
        self.executor = LocalExecutor(folder, GRACE_S)

    def payload(self, script: str | None, **changes: Any) -> Job:
        """A payload whose files are in place."""
        job = self.store.add(new_job(**changes), "submitted")
        work = self.data.job(job.mark) / "work"
        work.mkdir(parents=True)
        if script is not None:
            (work / "run.sh").write_text(AT_HOME + script)
        return job

    def start(self, script: str, **changes: Any) -> Job:
        """A payload that was started, with its handle."""
        job = self.payload(script, **changes)
        return changed(job, handle=self.executor.start(job))

    def folder(self, job: Job) -> Path:
        """Where a payload's files, streams and exit file are."""
        return self.data.job(job.mark)

    def end(self, job: Job) -> Outcome:
        """Wait for the wrapper to end; return what the executor says then."""
        self.wait(job)
        return self.executor.poll([job])[job.id]

    def wait(self, job: Job) -> None:
        """Wait for the wrapper in the handle to end."""
        child = self.executor.children.get(int((job.handle or "").split()[0]))
        if child is not None:
            wait_for(child.has_ended, 30, "the end of the wrapper")

    def run(self, script: str, **changes: Any) -> tuple[Job, Outcome]:
        """Run a script to its end."""
        job = self.start(script, **changes)
        return job, self.end(job)

    def signalled(self, script: str) -> Job:
        """A running payload that has come to READY in its script; at BLOCK it waits for ever."""
        job = self.payload(script.replace("READY", "echo > $OUR/ready").replace("BLOCK", "exec 3<> $OUR/go; read -u 3"))
        script_file = self.folder(job) / "work/run.sh"
        script_file.write_text(f"export OUR={self.folder(job)}\n{script_file.read_text()}")
        for name in ("ready", "go"):
            os.mkfifo(self.folder(job) / name)
        job = changed(job, handle=self.executor.start(job))
        (self.folder(job) / "ready").read_text()
        return job


@pytest.fixture(name="bench")
def bench_fixture(data: DataFolder) -> Iterator[Bench]:
    """A bench; what it started is ended."""
    made = Bench(data)
    yield made
    end_payloads(data.path)
    for child in made.executor.children.values():
        wait_for(child.has_ended, 30, "the end of the wrapper")
    made.store.close()


def wrapped(bench: Bench, job: Job, more: Sequence[str] = (), **options: Any) -> subprocess.Popen[bytes]:
    """The wrapper as a process of this test."""
    command = ["bash", "-c", bench.executor.wrapper, "joborch-wrapper", str(bench.folder(job)), str(job.attempt), *more]
    return subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, **options)


# == The wrapper ==


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("true", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("no-such-command", 127),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("kill -9 0", 137),
        ("set -e; false; echo never", 1),
        ("trap 'echo \"$?\" > .orchestrator.exit' EXIT; exit 4", 4),
        ("exec >&- 2>&-; exit 5", 5),
        ("chmod 000 .; chmod 000 ..; exit 6", 6),
        ("kill -STOP 0; exit 7", 7),
    ],
)
def test_exit_status(script: str, status: int, bench: Bench) -> None:
    """Whatever the script does to itself; one that is stopped is waited for until it goes on and ends."""
    job = bench.start(script)
    if "STOP" in script:
        wait_for(lambda: "T" in states_below(bench.folder(job)), what="the script to stop")
        for pid in processes_below(bench.folder(job)):
            os.kill(pid, signal.SIGCONT)
    assert bench.end(job) == Outcome(False, status, False)


def states_below(folder: Path) -> set[str]:
    """The states (proc(5)) of the processes that work below a folder."""
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in processes_below(folder)}


def test_a_stopped_script_costs_no_processor(bench: Bench) -> None:
    job = bench.start("kill -STOP $$")
    pid = int((job.handle or "").split()[0])
    wait_for(lambda: "T" in states_below(bench.folder(job)), what="the script to stop")

    def switches() -> list[int]:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return [int(line.split()[1]) for line in lines if "ctxt_switches" in line]

    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S", what="the wrapper to sleep")

    def is_idle() -> bool:
        before = switches()
        bench.executor.poll([job])
        return switches() == before

    wait_for(is_idle, what="the wrapper to wait for the end, not in circles")


def test_streams_work_folder_and_what_the_script_sees(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.setenv("PORT", "9000")
    monkeypatch.setenv("KEPT", "é 1")
    bench.executor = LocalExecutor(bench.data, GRACE_S, ["KEPT"])
    job, outcome = bench.run(
        "echo out; echo err >&2; cat; pwd; umask; env", user_id=7, service="s", remote_id="42", cpus=3, memory=100, attempt=2
    )
    assert outcome.exit_status == 0
    folder = bench.folder(job)
    assert (folder / "stderr").read_text() == "err\n"
    first, where, umask, *lines = (folder / "stdout").read_text().splitlines()
    assert (first, where) == ("out", str(folder / "work"))
    assert int(umask, 8) == bench.data.umask, "the script's umask is the one the client was started with"
    seen = dict(line.split("=", 1) for line in lines)
    assert {name: value for name, value in seen.items() if name.startswith("JOBORCH")} == {
        "JOBORCH_JOB_ID": "42", "JOBORCH_ATTEMPT": "2", "JOBORCH_SERVICE": "s", "JOBORCH_USER_ID": "7", "JOBORCH_CPUS": "3",
        "JOBORCH_MEMORY": "100", "JOBORCH_GPUS": "0", "JOBORCH_MARK": job.mark,
    }  # fmt: skip
    assert (folder / "tmp").readlink() == Path(seen["TMPDIR"]), "a short path, to which tmp in the payload's folder leads"
    assert Path(seen["TMPDIR"]).is_dir()
    assert seen["KEPT"] == "é 1"
    assert not {"MY_TOKEN", "PORT"} & set(seen)
    assert sorted(path.name for path in (folder / "work").iterdir()) == ["run.sh"], "only the script's own is in the result"


def test_an_attempt_is_claimed_by_one_wrapper(bench: Bench) -> None:
    """Ten at once for the same attempt: the script runs once; another attempt has a claim of its own."""
    job = bench.payload("echo ran >> ../../count-$JOBORCH_ATTEMPT")
    others = [wrapped(bench, job, env={**os.environ, "JOBORCH_ATTEMPT": "1"}) for _ in range(10)]
    for other in others:
        assert other.wait(30) == 0
    assert (bench.data.jobs / "count-1").read_text() == "ran\n"
    winner = bench.executor.claimed_pid(job)
    assert winner in [other.pid for other in others]
    assert read_exit(bench.folder(job)) == Outcome(False, 0, False)


def test_a_wrapper_survives_what_is_sent_to_it(bench: Bench) -> None:
    """TERM, INT and HUP reach the script, if it is told; the wrapper stays to write down how it ended."""
    job = bench.signalled("trap 'echo got it; exit 9' TERM\nsleep 1000 &\nREADY\nwait")
    pid = int((job.handle or "").split()[0])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert bench.executor.poll([job])[job.id] == Outcome(True)
    signal_all([process for process in tree_of(job, bench.folder(job), pid) if process.pid != pid], signal.SIGTERM)
    assert bench.end(job).exit_status == 9
    assert (bench.folder(job) / "stdout").read_text() == "got it\n"


AS_IT_WAKES = r"""
// Sends a signal to a process that leads a session, as the wrapper does, whenever it has just learnt of a child's end.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

pid_t waitpid(pid_t pid, int *status, int options) {
    static pid_t (*real)(pid_t, int *, int);
    if (!real) real = (pid_t (*)(pid_t, int *, int)) dlsym(RTLD_NEXT, "waitpid");
    pid_t found = real(pid, status, options);
    if (found > 0 && getsid(0) == getpid()) raise(atoi(getenv("AS_IT_WAKES")));
    return found;
}
"""


def test_no_signal_to_the_wrapper_spoils_the_status(bench: Bench, tmp_path: Path) -> None:
    """bash's `wait` forgets the status of a child if a signal comes just as the child ends."""
    (tmp_path / "wakes.c").write_text(AS_IT_WAKES)
    library = str(tmp_path / "wakes.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, str(tmp_path / "wakes.c"), "-ldl"], check=True)
    for number in (signal.SIGUSR1, signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        bench.executor.inherited = {**bench.executor.inherited, "LD_PRELOAD": library, "AS_IT_WAKES": str(int(number))}
        for script, status in (("exit 0", 0), ("exit 3", 3), ("sleep 0.1; exit 4", 4)):
            job, _ = bench.run(script)
            told = number not in (signal.SIGUSR1, signal.SIGALRM) and signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
            assert read_exit(bench.folder(job)) == Outcome(False, status, told=told), number


@pytest.mark.parametrize(("is_deaf", "status"), [(False, 143), (True, 137)])
def test_a_wrapper_keeps_a_time_limit_if_nobody_else_does(is_deaf: bool, status: int, bench: Bench) -> None:
    """TERM at the limit, and KILL for a script that goes on: it inherits that TERM is ignored."""
    job = bench.payload("for n in {1..1000}; do sleep 1; done")
    deaf = (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)) if is_deaf else None
    assert wrapped(bench, job, more=("0.1", "0.2"), preexec_fn=deaf).wait(60) == status
    assert read_exit(bench.folder(job)) == Outcome(False, status, cause=Cause.LIMIT)
    assert not processes_below(bench.folder(job))


def test_signals_are_not_ignored_in_the_script(bench: Bench) -> None:
    """What a parent ignores its children ignore too, and could never be ended gently."""
    job, _ = bench.run("grep SigIgn /proc/self/status")
    ignored = int((bench.folder(job) / "stdout").read_text().split()[1], 16)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            assert not ignored >> (number - 1) & 1, number.name


def test_what_the_script_leaves_running_is_ended(bench: Bench) -> None:
    job, outcome = bench.run("sleep 1000 & disown; exit 0")
    assert outcome == Outcome(False, 0, True)
    wait_for(lambda: not processes_below(bench.folder(job)), what="the rest of its group to end")


def ended_tidily(bench: Bench, job: Job) -> Outcome:
    """What became of a payload, once nothing of it is left: as long as something runs, it counts as alive."""
    wait_for(lambda: not bench.executor.poll([job])[job.id].alive or None, what="the end of the payload")
    assert not processes_below(bench.folder(job))
    assert job.mark not in joborch.marked_below(bench.data.jobs)
    return read_exit(bench.folder(job)) or Outcome(False)


LEFT = {
    "a session of its own": "setsid sleep 1000 &",
    "a daemon": "(setsid bash -c 'sleep 1000 & sleep 1000 &' &) ; sleep 0.05",
    "elsewhere": "(cd /; setsid sleep 1000 &)",
    "without its environment": "(setsid env -i sleep 1000 &)",
    "one that forks": "setsid bash -c 'for n in {1..40}; do sleep 1000 & done; wait' & sleep 0.05",
    "deaf": "setsid bash -c 'trap \"\" TERM HUP; sleep 1000; sleep 1000' & sleep 0.05",
}


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_what_left_the_scripts_group_is_ended_too(left: str, adopted: bool, bench: Bench) -> None:
    """Also where the client was started again meanwhile, and the orphans are not its own."""
    job = bench.start(f"{left}\nexit 0")
    wait_for(lambda: read_exit(bench.folder(job)), what="the end of the script")
    if adopted:
        bench.executor.attempts[job.mark].is_own = False
    outcomes: list[Outcome] = []
    wait_for(lambda: outcomes.append(bench.executor.poll([job])[job.id]) or not outcomes[-1].alive, what="the end of the payload")
    assert outcomes[-1] == Outcome(False, 0, True), "and it says so"
    assert not processes_below(bench.folder(job))
    assert job.mark not in joborch.marked_below(bench.data.jobs)
    assert not bench.executor.attempts


def test_what_another_payload_has_orphaned_is_left_alone(bench: Bench) -> None:
    other = bench.signalled("(setsid sleep 1000 &); READY; BLOCK")
    _, outcome = bench.run("exit 0")
    assert outcome == Outcome(False, 0, False)
    assert bench.executor.reap(), "there is an orphan"
    assert other.mark in joborch.marked_below(bench.data.jobs)
    assert bench.executor.poll([other])[other.id].alive
    bench.executor.cancel(other)
    assert other.mark not in joborch.marked_below(bench.data.jobs)


@pytest.mark.parametrize("script", ["kill -9 $PPID; sleep 1000", "setsid sleep 1000 & kill -9 $PPID; sleep 1000"])
def test_what_outlives_its_wrapper_is_ended(script: str, bench: Bench) -> None:
    job = bench.start(script)
    bench.executor.poll([job])
    bench.end(job)
    outcomes: list[Outcome] = []
    wait_for(lambda: outcomes.append(bench.executor.poll([job])[job.id]) or not outcomes[-1].alive, what="the end of the payload")
    assert (outcomes[-1].cause, outcomes[-1].children_left) == (Cause.USER, True), "we looked on: it was the script"
    assert job.mark not in joborch.marked_below(bench.data.jobs)


def test_orphans_that_ended_are_not_left_as_zombies(bench: Bench) -> None:
    """They are our children: nobody else takes in their ends."""
    bench.run("for n in 1 2 3; do (setsid true &); done; sleep 0.1")

    def zombies() -> list[int]:
        bench.executor.reap()
        return [pid for pid in map(int, Path(CHILDREN_FILE).read_text().split()) if not alive(pid)]

    wait_for(lambda: not zombies(), what="no zombie")


def test_without_a_list_of_children_every_process_is_looked_at(bench: Bench) -> None:
    """Some kernels have no /proc/PID/task/TID/children."""
    bench.executor.reaps_orphans = False
    job = bench.start("setsid sleep 1000 &")
    bench.end(job)
    assert ended_tidily(bench, job).exit_status == 0


def test_a_folder_that_went_before_the_wrapper_came(bench: Bench) -> None:
    job = bench.payload("true")
    joborch.remove_tree(bench.folder(job))
    assert wrapped(bench, job).wait(30) == 1
    assert bench.executor.poll([job])[job.id].cause is Cause.INFRASTRUCTURE


# == What it left ==


@given(st.integers(0, 255), st.booleans(), st.integers(0, 60))
@example(0, False, 0)
@BOUNDED
def test_an_exit_file_counts_when_it_is_whole(status: int, left: bool, cut: int) -> None:
    """The wrapper writes it in one go into a place of blanks; a crash may leave any beginning of it."""
    text = f'{{"status": {status}, "left": {left:d}}}'
    folder = Path(os.environ.get("TMPDIR") or "/tmp") / f"joborch-test-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        (folder / "exit.json").write_text(text[:cut].ljust(60))
        assert read_exit(folder) == (Outcome(False, status, left) if cut >= len(text) else None)
        (folder / "exit.json").write_text(text[:cut])
        assert read_exit(folder) == (Outcome(False, status, left) if cut >= len(text) else None)
    finally:
        joborch.remove_tree(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 60, b"\xff\xfe", b"[]", b"3", b"null", b'{"status": null, "left": 0}', b'{"left": 0}', b"{" * 200]
)
def test_rubbish_in_an_exit_file_is_no_end(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_bytes(content)
    assert read_exit(tmp_path) is None
    assert read_exit(tmp_path / "none") is None


@pytest.mark.parametrize("made", ["mkdir", "mkfifo", "ln -s /dev/zero", "ln -s exit.json", "ln -s ..", "touch"])
def test_a_script_that_puts_something_else_in_the_exit_files_place(made: str, bench: Bench) -> None:
    """One payload must not stop the runner of all."""
    hostile = bench.start(f"rm -f ../exit.json; {made} ../exit.json; exit 0")
    bench.wait(hostile)
    other = bench.start("exit 3")
    bench.wait(other)
    outcomes = soon(lambda: bench.executor.poll([hostile, other]), bench.folder(hostile))
    assert isinstance(outcomes, dict), outcomes
    assert outcomes[other.id] == Outcome(False, 3, False)
    assert not outcomes[hostile.id].alive


def test_a_script_that_takes_the_rights_of_its_folders(bench: Bench) -> None:
    job, _ = bench.run("chmod 000 .. . ../exit.json; exit 3")
    bench.executor.poll([job])
    assert bench.executor.poll([job])[job.id] == Outcome(False, 3, False)


# == Fates ==


def test_alive_until_the_wrapper_has_ended(bench: Bench) -> None:
    job = bench.signalled("READY\nBLOCK")
    assert bench.executor.poll([job])[job.id] == Outcome(True)
    assert LocalExecutor(bench.data, 0).poll([job])[job.id] == Outcome(True), "for a client that was started again, too"


def test_an_exit_file_counts_when_the_wrapper_is_gone(bench: Bench) -> None:
    """A script can write one as well as the wrapper, and go on."""
    job = bench.signalled("""echo '{"status": 0, "left": 0}' > ../exit.json; READY; BLOCK""")
    assert bench.executor.poll([job])[job.id] == Outcome(True)
    assert LocalExecutor(bench.data, 0).poll([job])[job.id] == Outcome(True)


def test_the_exit_file_outranks_a_process_id(bench: Bench) -> None:
    """Process ids are used again, files are not."""
    job = bench.payload("true")
    (bench.folder(job) / "exit.json").write_text('{"status": 4, "left": 0}')
    for handle in (None, f"{os.getpid()} 1 {bench.executor.boot}"):
        outcome = bench.executor.poll([changed(job, handle=handle)])[job.id]
        assert outcome == Outcome(False, 4, False)


def test_a_number_that_another_process_has_now_is_not_the_payload(bench: Bench) -> None:
    job = bench.payload("true")
    (bench.folder(job) / "started.1").write_text(f"{os.getpid()}\n")
    handle = f"{os.getpid()} 1 {bench.executor.boot}"
    assert not bench.executor.poll([changed(job, handle=handle)])[job.id].alive


@pytest.mark.parametrize(
    ("what", "cause", "word"),
    [
        ("reboot", Cause.INFRASTRUCTURE, "restarted"),
        ("folder", Cause.INFRASTRUCTURE, "folder was removed"),
        ("wrapper", Cause.USER, "killed"),
        ("claim", Cause.INFRASTRUCTURE, ""),
        ("empty claim", Cause.INFRASTRUCTURE, ""),
        ("full disk", Cause.INFRASTRUCTURE, "disk is full: the script was not started"),
        ("no ready", Cause.INFRASTRUCTURE, "was not started"),
        ("restart", Cause.INFRASTRUCTURE, "while it did not run"),
    ],
)
def test_a_payload_that_is_gone_without_an_exit_file(
    what: str, cause: Cause, word: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the script's own doing: its failure. By that of the machine: another attempt."""
    job = bench.signalled("READY\nBLOCK")
    pid = int((job.handle or "").split()[0])
    signal_all(tree_of(job, bench.folder(job), pid), signal.SIGKILL)
    bench.wait(job)
    folder, executor = bench.folder(job), bench.executor
    if what == "reboot":
        job = changed(job, handle=f"{pid} 1 another-boot")
    elif what == "folder":
        joborch.remove_tree(folder)
    elif what == "claim":
        (folder / "started.1").unlink()
    elif what == "empty claim":
        (folder / "started.1").write_bytes(b"")
        executor = LocalExecutor(bench.data, 0)
    elif what in ("full disk", "no ready"):
        (folder / "started.1").write_text(f"{pid}\n")
        replace(monkeypatch, "is_full", lambda _: what == "full disk")
    elif what == "restart":
        executor = LocalExecutor(bench.data, 0)
    # As long as something of it dies, it counts as alive.
    outcome = wait_for(lambda: next((found for found in executor.poll([job]).values() if not found.alive), None), what="its end")
    assert (outcome.alive, outcome.exit_status, outcome.cause) == (False, None, cause)
    assert word in outcome.reason


def test_threads_that_look_at_once_do_not_trip_over_each_other(bench: Bench) -> None:
    """The runner polls, and so does everybody who ends a payload; both may see that a child has ended."""
    both = threading.Barrier(2)

    class Ended:
        pid, is_awaited, job_id, mark, used = 4_000_000, False, 1, "1.1", None

        def has_ended(self) -> bool:
            """It is asked if the kernel names the child of somebody else."""
            return True

        @property
        def ended(self) -> bool:
            """Both threads are here before either goes on."""
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(2)
            return True

    bench.executor.children[Ended.pid] = Ended()  # type: ignore[assignment]
    together(2, lambda _: bench.executor.poll([]))
    assert bench.executor.children == {}


def test_the_end_of_a_stranger_hides_none_of_ours(bench: Bench) -> None:
    """Another part of the program has a child that it has not waited for: the kernel may name that one, again and again."""
    with subprocess.Popen(["true"]) as stranger:
        os.waitid(os.P_PID, stranger.pid, os.WEXITED | os.WNOWAIT)
        job = bench.start("exit 0")
        os.waitid(os.P_PID, int((job.handle or "").split()[0]), os.WEXITED | os.WNOWAIT)
        assert not bench.executor.poll([job])[job.id].alive


@pytest.mark.parametrize("c_library", ["new", "old"])
def test_a_wrapper_leads_a_session_and_ignores_no_signal_of_python(c_library: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ignores SIGPIPE and SIGXFSZ. One that was built for an old C library cannot start a session by posix_spawn."""

    def refuse(*_: Any, **__: Any) -> int:
        raise NotImplementedError

    if c_library == "old":
        monkeypatch.setattr(os, "posix_spawn", refuse)
    job, outcome = bench.run("grep SigIgn /proc/$$/status; cut -d' ' -f6 /proc/$$/stat; readlink /proc/$PPID/fd/[0-2]")
    assert outcome == Outcome(False, 0, False)
    ignored, session, *streams = (bench.folder(job) / "stdout").read_text().splitlines()
    assert int(ignored.split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0
    assert session == (job.handle or "").split()[0]
    assert streams == 3 * ["/dev/null"]


def test_a_program_that_is_not_there_cannot_be_started() -> None:
    with pytest.raises(FileNotFoundError):
        start_session(["/nowhere/bash"], {})


# == Found again ==


def test_find_tells_what_was_started_from_what_never_ran(bench: Bench) -> None:
    never, running, ended = bench.payload("true"), bench.signalled("READY\nBLOCK"), bench.run("true")[0]
    cut_off = [changed(job, handle=None) for job in (never, running, ended)]
    found = LocalExecutor(bench.data, 0).find(cut_off)
    assert set(found) == {running.mark, ended.mark}
    assert found[running.mark] == running.handle
    outcomes = LocalExecutor(bench.data, 0).poll([changed(job, handle=found.get(job.mark)) for job in (running, ended)])
    assert outcomes == {running.id: Outcome(True), ended.id: Outcome(False, 0, False)}


@pytest.mark.parametrize("claim", ["", "\n", "12 34", "x", "-1", "\x00\x00", pytest.param(str(os.getpid()), id="this process")])
def test_find_is_not_misled_by_a_claim(claim: str, bench: Bench) -> None:
    """It was claimed, so it must not be started again; whose number that is has to be seen."""
    job = bench.payload("true")
    (bench.folder(job) / "started.1").write_text(claim)
    handle = bench.executor.find([job])[job.mark]
    assert not bench.executor.poll([changed(job, handle=handle)])[job.id].alive


def test_a_second_start_of_an_attempt_finds_the_first(bench: Bench) -> None:
    """A crash between start and handle, and a start that was too much: the script has run once, and is still seen."""
    job = bench.signalled("echo ran >> ../../count\nREADY\nBLOCK")
    second = changed(job, handle=bench.executor.start(job))
    bench.wait(second)
    assert bench.executor.poll([second])[job.id] == Outcome(True)
    bench.executor.cancel(second)
    assert (bench.data.jobs / "count").read_text() == "ran\n"
    assert not processes_below(bench.data.path)


# == Ended as a whole ==

TREES = {
    "obedient": "READY\nBLOCK",
    "deaf": "trap '' TERM\nREADY\nBLOCK",
    "own session": "setsid bash -c 'READY; BLOCK' & wait",
    "own session, deaf": "setsid bash -c \"trap '' TERM; READY; BLOCK\" & wait",
    "daemon": "(setsid bash -c '(READY; BLOCK) &' &)\nBLOCK",
    "elsewhere": "(cd /; setsid bash -c '(READY; BLOCK) &' &)\nBLOCK",
    "elsewhere, without its environment": "setsid env -i OUR=$OUR bash -c 'cd /; ((BLOCK) &); READY; BLOCK' & wait",
    "many": "for i in 1 2 3 4 5; do (setsid bash -c 'BLOCK' &) & done; set +m; wait; READY; BLOCK",
    "stopped": "(kill -STOP $BASHPID) &\nREADY\nBLOCK",
}


@pytest.mark.parametrize("tree", TREES)
def test_cancel_returns_when_nothing_runs_any_more(tree: str, bench: Bench) -> None:
    job, bystander = bench.signalled(TREES[tree]), bench.signalled("READY\nBLOCK")
    go = bench.folder(job) / "go"
    others = wait_for(lambda: [process.pid for process in all_processes() if holds_open(process.pid, go)], what="it to block")
    bench.executor.cancel(job)
    left = [pid for pid in others if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes of the payload that ran on"
    assert not processes_below(bench.folder(job))
    assert not bench.executor.poll([job])[job.id].alive
    bench.executor.cancel(job)
    assert bench.executor.poll([bystander])[bystander.id] == Outcome(True)


def holds_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open: what it is called and where it works does not matter."""
    try:
        return any(entry.readlink() == path for entry in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def test_cancel_lets_the_script_tidy_up(bench: Bench) -> None:
    job = bench.signalled("trap 'echo tidy > tidied; exit 0' TERM\nsleep 1000 &\nREADY\nwait")
    bench.executor.kill_grace_s = 30
    bench.executor.cancel(job)
    assert (bench.folder(job) / "work/tidied").read_text() == "tidy\n"


def test_cancel_of_what_never_ran_or_is_not_known(bench: Bench) -> None:
    """No handle, or one whose number another payload's wrapper has now: nobody is signalled (see `strangers_are_safe`)."""
    job, bystander = bench.payload("true"), bench.signalled("READY\nBLOCK")
    stranger = (bystander.handle or "").split()[0]
    for handle in (None, f"0 0 {bench.executor.boot}", f"{stranger} 1 {bench.executor.boot}", f"{stranger} 1 another-boot"):
        bench.executor.cancel(changed(job, handle=handle))
    (bench.folder(job) / "started.1").write_text(f"{stranger}\n")
    bench.executor.cancel(job)
    assert bench.executor.poll([bystander])[bystander.id] == Outcome(True)


def test_cancel_says_so_where_something_does_not_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.payload("true")
    replace(monkeypatch, "signal_all", lambda *_: None)
    replace(monkeypatch, "tree_of", lambda *_: [Process(4_000_000, 1, 4_000_000, 4_000_000, "1")])
    monkeypatch.setattr(joborch.time, "sleep", lambda _: None)
    bench.executor.kill_grace_s = 0
    with pytest.raises(StillRunning, match=f"payload {job.id}"):
        bench.executor.cancel(job)


def test_process_1_and_kernel_threads_are_nobodys(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers process 1 and what is brought in from outside have session and group 0."""
    figures = [(1, 0, 0, 0), (2, 0, 0, 0), (50, 1, 0, 0), (60, 1, 60, 60), (61, 60, 60, 60)]
    machine = [Process(*each, start="1") for each in figures]
    replace(monkeypatch, "all_processes", lambda: machine)
    job = bench.payload("true")
    assert tree_of(job, bench.folder(job), 0) == []
    assert {process.pid for process in tree_of(job, bench.folder(job), 60)} == {60, 61}
    replace(monkeypatch, "bears_mark", lambda pid, *_: pid == 50)  # an operator's shell, in the folder to look
    assert tree_of(job, bench.folder(job), 0) == []


def test_a_tree_is_all_that_hangs_together(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By session, by group, by parent; strangers, and we ourselves, are not of it."""
    own = os.getpid()
    figures = [(own, 1, 5, 5), (100, own, 100, 100), (101, 100, 101, 100), (102, 101, 102, 102), (103, 1, 102, 102), (104, 103, 104, 104)]
    machine = [Process(*each, start="1") for each in [*figures, (200, 1, 200, 200)]]
    replace(monkeypatch, "all_processes", lambda: machine)
    job = bench.payload("true")
    assert {process.pid for process in tree_of(job, bench.folder(job), 100)} == {100, 101, 102, 103, 104}


# == Processes ==


def test_threads_share_a_look_at_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Thirty kills at once must not read /proc thirty times; but no look is shared that began before somebody asked."""
    looks, begun, go = list[int](), threading.Semaphore(0), threading.Semaphore(0)

    def look() -> list[Process]:
        looks.append(len(looks) + 1)
        number = looks[-1]
        begun.release()
        assert go.acquire(timeout=20)
        return [Process(10 + number, 2, 2, 2, "1")]

    replace(monkeypatch, "all_processes", look)
    table, got = ProcessTable(tmp_path), list[int]()

    def ask() -> None:
        got.append(table.look()[0][0].pid)

    first, others = threading.Thread(target=ask), [threading.Thread(target=ask) for _ in range(30)]
    first.start()
    assert begun.acquire(timeout=20)
    for thread in others:
        thread.start()
    wait_for(lambda: len(table.changed._waiters) == 30, what="all to wait for the next look")  # type: ignore[attr-defined]
    go.release()
    assert begun.acquire(timeout=20)
    go.release()
    for thread in (first, *others):
        thread.join(20)
    assert got == [11] + [12] * 30
    assert looks == [1, 2]


def test_a_look_that_failed_is_taken_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers: list[Any] = [OSError(24, "too many open files"), [Process(7, 2, 2, 2, "1")]]

    def look() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    replace(monkeypatch, "all_processes", look)
    table = ProcessTable(tmp_path)
    with pytest.raises(OSError, match="too many open files"):
        table.look()
    assert [process.pid for process, _ in table.look()] == [7]


def test_processes_are_known_by_number_and_start() -> None:
    own = next(process for process in all_processes() if process.pid == os.getpid())
    assert own == Process(os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0), process_start(os.getpid()) or "")
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) is None, "a zombie runs no more"
    assert child.pid not in [process.pid for process in all_processes()]
    child.wait()
    assert process_start(child.pid) is None


def test_a_name_with_brackets_and_blanks_hides_nothing(tmp_path: Path) -> None:
    odd = tmp_path / ") S 1 1 ("
    odd.symlink_to("/bin/cat")
    with subprocess.Popen([str(odd)], stdin=subprocess.PIPE) as child:
        found = next(process for process in all_processes() if process.pid == child.pid)
        assert (found.parent, found.session) == (os.getpid(), os.getsid(0))
        child.communicate()


def test_a_mark_is_seen_in_the_environment_and_in_the_folder_of_orphans(tmp_path: Path) -> None:
    """A folder alone is no proof: whoever has a home or a terminal is somebody else. (A child of this process counts as orphan.)"""
    inside = tmp_path / "uuid.1"
    inside.mkdir()
    (tmp_path / "uuid.10").mkdir()
    for environment, where, wanted in (
        ({"JOBORCH_MARK": "uuid.1"}, "/", ["uuid.1"]),
        ({"JOBORCH_MARK": "uuid.10"}, "/", ["uuid.10"]),
        ({"OTHER_JOBORCH_MARK": "uuid.1"}, "/", []),
        ({"JOBORCH_MARK": "uuid.1", "HOME": "/"}, str(tmp_path / "uuid.10"), ["uuid.1"]),
        ({}, str(inside), ["uuid.1"]),
        ({"JOBORCH_ATTEMPT": "1", "HOME": "/"}, str(inside), ["uuid.1"]),
        ({"HOME": "/"}, str(inside), []),
        ({"INVOCATION_ID": "1"}, str(inside), []),
        ({}, str(tmp_path / "uuid.10"), ["uuid.10"]),
        ({}, str(tmp_path), []),
    ):
        with subprocess.Popen(["/bin/cat"], env=environment, cwd=where, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin and child.stdout
            child.stdin.write(b"it runs\n")
            child.stdin.flush()
            child.stdout.readline()
            process = Process(child.pid, os.getpid(), child.pid, child.pid, "1")
            assert list(map(os.fsdecode, marks_of(process, tmp_path))) == wanted, (environment, where)
            if "JOBORCH_MARK" not in environment:
                assert marks_of(dataclasses.replace(process, terminal=1), tmp_path) == []
                assert marks_of(dataclasses.replace(process, parent=os.getppid()), tmp_path) == [], "its parent lives"
            assert bears_mark(child.pid, "uuid.1") is (environment.get("JOBORCH_MARK") == "uuid.1")
            child.communicate()
    assert marks_of(process, tmp_path) == [], "it has ended"


def test_signalling_what_has_ended_is_fine() -> None:
    child = subprocess.Popen(["true"], start_new_session=True)
    child.wait()
    signal_all([Process(child.pid, 1, child.pid, child.pid, "1")], signal.SIGTERM)


def test_the_boot_is_the_same_all_the_time() -> None:
    assert boot_id() == boot_id()
    assert len(boot_id()) > 30
    assert " " not in boot_id(), "it is the last word of a handle"


OWN_NAME = st.sampled_from(["JOBORCH_X", "SERVICE_A_TOKEN", "JOBORCH_TOKEN", "PORT", "MAX_AGE"])


@BOUNDED
@given(st.dictionaries(st.text(st.characters(exclude_characters="=\0", exclude_categories=["Cs"]), min_size=1), st.just("v")), OWN_NAME)
def test_what_is_not_listed_is_not_passed_on(environment: dict[str, str], own: str) -> None:
    """Names at random, of those that are on no list; with `*` all pass but joborch's own. What the script sees beside it is ours."""
    store = Store(":memory:", "client", HandClock())
    job = store.add(new_job(user_id=None, service=None), "")
    store.close()
    for more in ([], ["*"]):
        inherited = joborch.passed_on({**environment, own: "hidden"}, more)
        assert "hidden" not in inherited.values()
        strange = {name for name in environment if not (is_own_setting(name) or fits_one(PASSED_ON)(name))}
        assert strange & set(inherited) == (strange if more else set())
    seen = payload_environment(job, Path("/f"), {"PATH": "/bin", "TMPDIR": "/elsewhere"})
    words = ("JOB_ID", "ATTEMPT", "SERVICE", "USER_ID", "CPUS", "MEMORY", "GPUS", "MARK")
    assert set(seen) == {"PATH", "TMPDIR", *(f"JOBORCH_{word}" for word in words)}
    assert (seen["JOBORCH_JOB_ID"], seen["JOBORCH_USER_ID"], seen["JOBORCH_MEMORY"]) == (str(job.id), "", "")
    assert (seen["PATH"], seen["TMPDIR"]) == ("/bin", "/f/tmp")


def test_every_executor_of_the_table_keeps_the_seam(bench: Bench) -> None:
    given = {"data_path": str(bench.data.path)}
    for name in ("local", "slurm", "dirac"):
        config = joborch.load_config("client", {**given, "executor": name}, {"JOBORCH_DIRAC_URL": "http://127.0.0.1:1"})
        made = joborch.make_executor(bench.data, config)
        assert isinstance(made.is_batch, bool)
        for method in ("start", "find", "poll", "cancel", "collect", "end_orphans", "problem", "examine"):
            assert callable(getattr(made, method)), f"{name} lacks {method}"


def test_fates_are_in_json_what_the_wrapper_says(bench: Bench) -> None:
    job, _ = bench.run("exit 200")
    assert json.loads((bench.folder(job) / "exit.json").read_text()) == {"status": 200, "left": 0, "told": 0, "limit": 0}


def test_a_signal_that_comes_just_as_the_script_ends(bench: Bench) -> None:
    jobs = [bench.start("kill -TERM $PPID; exit 3") for _ in range(60)]
    outcomes = [bench.end(job) for job in jobs]
    assert {outcome.exit_status for outcome in outcomes} == {3}
    assert all(outcome.told and not outcome.alive and outcome.cause is Cause.INFRASTRUCTURE for outcome in outcomes), (
        "it was stopped from outside"
    )
