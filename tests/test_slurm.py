"""The Slurm executor: what Slurm says is judged by pure functions, and a real cluster runs the jobs of a user who is not root."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair
from harness import (
    NOBODY_UID,
    ROOT,
    JoinedPair,
    Pair,
    alive,
    download,
    end_all_below,
    need_backend,
    open_program,
    submit,
    wait_for,
    wait_status,
)
from hypothesis import given
from hypothesis import strategies as st
from world import USES_MEMORY, HandClock, files_with, new_job, reasons

import joborch
from joborch import BackendUnavailable, BatchOptions, CannotRun, Cause, ConfigError, Outcome, SubmitRefused
from joborch_plugins import slurm
from joborch_plugins.slurm import (
    SLURM_ENDS,
    SLURM_RUNS,
    SLURM_WAITS,
    SQUEUE_FIELDS,
    SlurmJob,
    SlurmTraces,
    parse_sacct,
    parse_squeue,
    read_sbatch_words,
    sbatch_options,
    slurm_error,
    slurm_name,
    slurm_outcome,
)

BACKEND = ROOT.parent / "shared" / "backends" / "slurm" / "cluster"
COMMANDS = ("sbatch", "squeue", "sacct", "scancel")
MARK = "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0.1"
NAME = slurm_name(MARK)
GRACE_S = 120.0


# == What Slurm says ==


def line(**cells: str) -> str:
    """A line as squeue prints it."""
    given = {"JobID": "17", "State": "PENDING", "RestartCnt": "0", "SubmitTime": "2026-11-26T14:02:05"}
    given.update(NodeList="", Reason="Resources", Name=NAME)
    return "".join(f"{({**given, **cells})[name]:<{width}}"[:width] for name, width in SQUEUE_FIELDS)


def test_squeue_is_read() -> None:
    """Ours by name, what others have is left out; of two of one name the one that has not ended counts."""
    text = "\n".join(
        [
            line(JobID="15", State="COMPLETED"),
            line(),
            line(JobID="18", State="COMPLETED"),
            line(JobID="19_4", Name="an array of somebody's | with 'words'"),
            line(JobID="20", Name="joborch-x", State="RUNNING", RestartCnt="2", NodeList="n[1-2]", Reason="None"),
            "",
        ]
    )
    assert parse_squeue(text) == {
        NAME: SlurmJob("17", "PENDING", 0, "2026-11-26T14:02:05", "Resources"),
        "joborch-x": SlurmJob("20", "RUNNING", 2, "2026-11-26T14:02:05", "None", "n[1-2]"),
    }


@pytest.mark.parametrize("text", ["Lorem ipsum", "<html>", line(JobID="x"), line(State="run ning"), "slurm_load_jobs error: what?"])
def test_garbage_of_squeue_is_no_news(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_squeue(text)


def test_a_name_that_breaks_its_line_hides_no_other() -> None:
    """Any script of the same user can submit such a job."""
    assert parse_squeue("\n".join([line(JobID="16", Name="two"), "lines", line()])) == parse_squeue(line())


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=100).map(str.strip))
def test_no_reason_moves_a_line(reason: str) -> None:
    assert parse_squeue(line(Reason=reason))[NAME].reason == reason


def test_sacct_is_read() -> None:
    """Recorded from Slurm 22.05 with slurmdbd: one that was cancelled, one that failed and whose name holds a bar."""
    recorded = "1|CANCELLED by 0|2026-11-26T20:03:44|joborch-aa.1\n2|FAILED|2026-11-26T20:03:44|joborch-b|b.1\n"
    assert parse_sacct(recorded + "rubbish\n3|FAILED|x|somebody else's\n") == {
        "joborch-aa.1": SlurmJob("1", "CANCELLED", 0, "2026-11-26T20:03:44", "by user 0"),
        "joborch-b|b.1": SlurmJob("2", "FAILED", 0, "2026-11-26T20:03:44", ""),
    }


FAILED = "sbatch: error: Batch job submission failed: "
TOO_MANY = (
    f"sbatch: error: AssocMaxSubmitJobLimit\n{FAILED}Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
TOO_WIDE = f"sbatch: error: CPU count per node can not be satisfied\n{FAILED}Requested node configuration is not available"


@pytest.mark.parametrize(
    ("command", "said", "kind"),
    [
        ("sbatch", f"{FAILED}Unable to contact slurm controller (connect failure)", BackendUnavailable),
        ("sbatch", f"{FAILED}Socket timed out on send/recv operation", BackendUnavailable),
        ("sbatch", f"{FAILED}Invalid partition name specified", SubmitRefused),
        ("sbatch", f"{FAILED}Invalid account or account/partition combination specified", SubmitRefused),
        ("sbatch", TOO_MANY, SubmitRefused),
        ("sbatch", TOO_MANY.replace("AssocMaxSubmitJobLimit", "QOSMaxSubmitJobPerUserLimit"), SubmitRefused),
        ("sbatch", TOO_MANY.replace("AssocMaxSubmitJobLimit", "QOSMaxCpuPerJobLimit"), CannotRun),
        ("sbatch", TOO_MANY.replace("AssocMaxSubmitJobLimit", "AssocMaxWallDurationPerJobLimit"), CannotRun),
        ("sbatch", TOO_MANY.replace("AssocMaxSubmitJobLimit", "QOSMinCpuNotSatisfied"), CannotRun),
        ("sbatch", "sbatch: error: Invalid --time specification", CannotRun),
        ("sbatch", 'sbatch: error: Invalid numeric value "0" for --cpus-per-task.', CannotRun),
        ("sbatch", "sbatch: unrecognized option '--foo=1'\nTry \"sbatch --help\" for more information", SubmitRefused),
        ("sbatch", TOO_WIDE, CannotRun),
        ("sbatch", f"{FAILED}Memory required by task is not available", CannotRun),
        ("sbatch", f"{FAILED}Requested topology configuration is not available", CannotRun),
        ("sbatch", f"{FAILED}Requested partition configuration not available now", SubmitRefused),
        ("sbatch", "sbatch: fatal: Could not establish a configuration source", BackendUnavailable),
        ("sbatch", f"{FAILED}Requested time limit is invalid (missing or exceeds some limit)", CannotRun),
        ("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", BackendUnavailable),
        ("squeue", "", BackendUnavailable),
    ],
)
def test_what_a_complaint_means(command: str, said: str, kind: type[Exception]) -> None:
    found = slurm_error(command, said)
    assert type(found) is kind
    assert str(found).startswith(("sbatch: ", "squeue: ", "Slurm refuses it: "))


# == What sbatch is told ==


def options_of(options: BatchOptions | None = None, folder: str = "/data/jobs/x", **fields: Any) -> list[str]:
    """The options for one job."""
    with closing(joborch.Store(":memory:", "client", HandClock())) as store:
        job = store.add(new_job(uuid=MARK[:-2], **fields), "submitted")
    return sbatch_options(job, options or BatchOptions(), Path(folder))


def test_a_job_overrides_cores_memory_and_time_and_nothing_else() -> None:
    words = {"partition": "short", "account": "acc", "qos": "high", "constraint": "gpu&ib", "gres": "gpu:1"}
    named = {f"slurm_{name}": word for name, word in words.items()}
    site = BatchOptions(**named, slurm_time_s=3600.0, slurm_args=("--nice=100", "--requeue"))
    assert options_of(site, cpus=4, memory=2048, timeout=61.0) == [
        "--parsable",
        "--export=ALL",
        "--no-requeue",
        "--propagate=NONE",
        "--partition=short",
        "--account=acc",
        "--qos=high",
        "--constraint=gpu&ib",
        "--gres=gpu:1",
        "--mem=2048M",
        "--time=2",
        "--cpus-per-task=4",
        f"--job-name={NAME}",
        "--chdir=/data/jobs/x",
        "--output=/data/jobs/x/slurm.1",
        "--nice=100",
        "--requeue",
    ]
    assert "--time=60" in options_of(site)
    assert "--propagate=NONE" not in options_of(BatchOptions(slurm_args=("--propagate=STACK",))), "a site knows better"
    assert not [word for word in options_of() if word.startswith(("--time", "--mem", "--partition"))]
    assert "--output=/100%%j/slurm.1" in options_of(folder="/100%j"), "a % of ours is none of Slurm's"


@given(st.floats(0.01, 1e7))
def test_no_minute_less_than_the_limit(timeout: float) -> None:
    minutes = int(next(word for word in options_of(timeout=timeout) if word.startswith("--time="))[len("--time=") :])
    assert timeout <= 60 * minutes < timeout + 60 + 1e-6
    assert minutes == math.ceil(timeout / 60)


OURS = ["--array=1-3", "--arr=1-3", "-a1-3", "-Jname", "--job-name=x", "--out=x", "--wrap=x", "run.sh", "--mem=1G", "-t5", "--time=5"]
OURS += ["-sa1-2", "-Oa1-2", "-vJx", "-sD/tmp", "-sW"]  # several short options in one word


@pytest.mark.parametrize("text", [*OURS, "--nice 5"])
def test_what_joborch_sets_itself_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"remove it|write --nice"):
        read_sbatch_words(text)
    with pytest.raises(ConfigError, match="SERVICE_DOCK_SLURM_ARGS"):
        joborch.load_config("client", {}, {"SERVICE_DOCK_SLURM_ARGS": text, "DATA_PATH": "/tmp"})


def test_what_a_site_may_add() -> None:
    assert read_sbatch_words("--nice=100 --exclusive --comment='two words' -n4 -s --mem-per-cpu=2G") == (
        *("--nice=100", "--exclusive", "--comment=two words", "-n4", "-s", "--mem-per-cpu=2G"),
    )
    config = joborch.load_config("client", {}, {"SERVICE_Dock_SLURM_PARTITION": "gpu", "DATA_PATH": "/tmp", "JOBORCH_EXECUTOR": "slurm"})
    assert (config.batch_options("DOCK").slurm_partition, config.batch_options("other"), config.slots) == ("gpu", BatchOptions(), 100)


# == What became of a job ==


def fate_of(state: str | None, restarts: int = 0, reason: str = "None", nodes: str = "", **traces: Any) -> Outcome:
    """Judge a job that Slurm says to be in `state` (None: it does not know it)."""
    known = None if state is None else SlurmJob("17", state, restarts, "2026-11-26T14:02:05", reason, nodes)
    usual = {"ended": None, "claimed": True, "begun": True, "claimed_before": True, "again": False, "words": "", "missed_s": 0.0}
    return slurm_outcome(known, SlurmTraces(**{**usual, "folder": Path("/shared/x"), **traces}), GRACE_S)


def test_states_that_are_known_are_of_one_kind() -> None:
    assert not SLURM_WAITS & SLURM_RUNS
    assert not (SLURM_WAITS | SLURM_RUNS) & set(SLURM_ENDS)


@pytest.mark.parametrize("state", sorted(SLURM_RUNS | {"SOMETHING_NEW", "LAUNCH_FAILED_LATER"}))
def test_what_runs_or_is_not_known_is_alive(state: str) -> None:
    assert fate_of(state, missed_s=1e9) == Outcome(True)


@pytest.mark.parametrize("state", sorted(SLURM_WAITS))
def test_what_waits_says_so_in_the_words_of_slurm(state: str) -> None:
    found = fate_of(state, reason="QOSMaxJobsPerUserLimit", claimed=False, claimed_before=False)
    assert found == Outcome(True, waits=f"Slurm: {state.lower()} since 2026-11-26 14:02, QOSMaxJobsPerUserLimit (job 17)")
    assert fate_of(state) == Outcome(True), "its wrapper has begun since Slurm was asked"


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("TIMEOUT", Cause.LIMIT),
        ("DEADLINE", Cause.LIMIT),
        ("OUT_OF_MEMORY", Cause.LIMIT),
        ("NODE_FAIL", Cause.INFRASTRUCTURE),
        ("BOOT_FAIL", Cause.INFRASTRUCTURE),
        ("PREEMPTED", Cause.INFRASTRUCTURE),
        ("CANCELLED", Cause.CANCELLED),
    ],
)
@pytest.mark.parametrize("ended", [None, Outcome(False, 143, told=True)])
def test_whose_doing_an_end_was(state: str, cause: Cause, ended: Outcome | None) -> None:
    """Also where the script had the time to end by the signal that Slurm sent it."""
    found = fate_of(state, ended=ended)
    assert (found.alive, found.cause, found.exit_status) == (False, cause, None)
    assert state in found.reason
    assert "job 17" in found.reason


def test_cancelled_by_nobody() -> None:
    """Seen where slurmctld came back from a kill -9 and gave an id out again: the node would not start it, and Slurm says CANCELLED."""
    traces = {"claimed": False, "begun": False, "claimed_before": False}
    unseen = fate_of("CANCELLED", nodes="n1", **traces)
    assert (unseen.alive, "waits for its exit file" in unseen.waits) == (True, True), "the claim may come to sight late"
    found = fate_of("CANCELLED", nodes="n1", missed_s=GRACE_S, **traces)
    assert (found.cause, "could not start it on n1" in found.reason) == (Cause.INFRASTRUCTURE, True)
    assert fate_of("CANCELLED", **traces).cause is Cause.CANCELLED, "while it was pending"


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED"])
def test_an_exit_file_is_waited_for(state: str) -> None:
    """On a network file system it may come late; a script whose wrapper was killed has none, nor one that never began."""
    assert fate_of(state, missed_s=GRACE_S - 1) == Outcome(True)
    killed = fate_of(state, missed_s=GRACE_S)
    assert (killed.alive, killed.cause) == (False, Cause.USER)
    blind = fate_of(state, missed_s=GRACE_S, claimed=False, begun=False, claimed_before=False, words="couldn't chdir")
    assert (blind.cause, "can the nodes see /shared/x?" in blind.reason, "couldn't chdir" in blind.reason) == (
        Cause.INFRASTRUCTURE,
        True,
        True,
    )
    told = Outcome(False, 3, told=True)
    assert fate_of(state, ended=told) == told, "somebody signalled the job, and Slurm knows nothing of it: it is the script's end"


def test_a_job_that_slurm_has_forgotten_has_not_failed() -> None:
    assert fate_of(None, missed_s=GRACE_S - 1) == Outcome(True)
    assert fate_of(None, missed_s=GRACE_S).cause is Cause.INFRASTRUCTURE
    assert fate_of(None, missed_s=GRACE_S, ended=Outcome(False, 143, told=True)).cause is Cause.INFRASTRUCTURE


def test_a_script_that_was_killed_may_have_been_killed_for_its_memory() -> None:
    """The kernel ends run.sh alone, and its wrapper lives: Slurm says whose doing it was."""
    killed = Outcome(False, 137)
    assert fate_of("RUNNING", ended=killed) == Outcome(True), "it is still to say so"
    assert fate_of("OUT_OF_MEMORY", ended=killed).cause is Cause.LIMIT
    assert fate_of("FAILED", ended=killed, words="slurmstepd: error: Detected 1 oom-kill event(s)").cause is Cause.LIMIT
    assert fate_of("FAILED", ended=killed) == fate_of(None, ended=killed) == killed


def test_a_second_run_is_another_attempt() -> None:
    """The exit file of the first is not taken for the second, and what began after Slurm was asked is no second run."""
    told = Outcome(False, 143, told=True)
    assert fate_of("PENDING", restarts=1, ended=told).cause is Cause.INFRASTRUCTURE
    assert fate_of("COMPLETED", restarts=1, ended=told, again=True).cause is Cause.INFRASTRUCTURE
    assert fate_of("PENDING", restarts=1, claimed_before=False) == Outcome(True)


def test_memory_that_ran_out_is_told_by_the_log_of_the_job() -> None:
    """Without cgroups Slurm says FAILED, and kills the wrapper too."""
    found = fate_of("FAILED", words="slurmstepd: error: Exceeded job memory limit")
    assert (found.cause, "Exceeded job memory limit" in found.reason) == (Cause.LIMIT, True)


# == A real cluster ==


class Cluster:
    """A Slurm of two nodes with a core each, and a folder of commands that a test can have lie."""

    def __init__(self, folder: Path) -> None:
        need_backend(BACKEND)
        self.folder, self.bin, self.calls = folder, folder / "bin", folder / "calls"
        self.configuration = folder / "slurm" / "etc" / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        self.bin.mkdir()
        self.calls.touch()
        self.calls.chmod(0o666)
        for name in COMMANDS:
            text = f"""#!/bin/sh
echo {name} >>{self.calls}
case $(cat {self.bin}/{name}.lie 2>/dev/null) in
    garbage) echo '<html>Lorem ipsum'; exit 0;;
    hang) exec sleep 600;;
    limit) echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2
           echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1;;
    slow) while [ $(cat {self.bin}/{name}.lie) = slow ]; do sleep 0.2; done;;
esac
exec {shutil.which(name)} "$@"
"""
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def start(self) -> Cluster:
        subprocess.run([str(BACKEND), "start", str(self.folder / "slurm")], check=True, timeout=60)
        return self

    def stop(self) -> None:
        subprocess.run([str(BACKEND), "stop", str(self.folder / "slurm")], check=True, timeout=60)
        end_all_below(self.folder)

    def lie(self, command: str, how: str) -> None:
        """Have a command answer garbage, hang, or be slow (until it is told otherwise); "" for the truth."""
        (self.bin / f"{command}.lie").write_text(how)

    def pid(self, daemon: str) -> int:
        return int((self.folder / "slurm" / "run" / f"{daemon}.pid").read_text())

    def kill(self, daemon: str, how: int = signal.SIGKILL) -> None:
        """End a daemon; after TERM, slurmctld remembers all it was told."""
        pid = self.pid(daemon)
        os.kill(pid, how)
        wait_for(lambda: not alive(pid), what=f"{daemon}'s end")

    def start_slurmctld(self, *options: str) -> None:
        """Start the controller again; with -c it has forgotten all jobs, and numbers from 1."""
        if "-c" in options:  # it would still go on after the last id that it had saved, which happens from time to time
            for saved in (self.folder / "slurm" / "state").glob("job_state*"):
                saved.unlink()
        subprocess.run(["slurmctld", "-f", str(self.configuration), *options], check=True, timeout=30)
        wait_for(self.both_up, 30, "both nodes")

    def both_up(self) -> bool:
        """Whether both nodes can run jobs, or do."""
        return self.run("sinfo", "-h", "-t", "idle,alloc,mix", "-o", "%D", check=False).strip() == "2"

    def run(self, *words: str, check: bool = True) -> str:
        """What a command says to root."""
        done = subprocess.run(["timeout", "10", *words], env=self.environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def jobs(self, mark: str) -> list[str]:
        """The ids of all jobs that an attempt has, or had a moment ago, in Slurm."""
        return self.run("squeue", "-h", "-t", "all", "-n", slurm_name(mark), "-o", "%i").split()

    def show(self, mark: str) -> dict[str, str]:
        """What scontrol says of the only job of an attempt."""
        (job_id,) = self.jobs(mark)
        return dict(word.partition("=")[::2] for word in self.run("scontrol", "-o", "show", "job", job_id).split())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster for all tests of this file, in a folder that every user can reach."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it starts the daemons of a Slurm cluster")
    folder = Path(tempfile.mkdtemp(prefix="joborch-slurm-"))
    folder.chmod(0o755)
    made = Cluster(folder)
    try:
        yield made.start()
    finally:
        made.stop()
        shutil.rmtree(folder)


LIMITS = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "100"}


def settings_of(cluster: Cluster) -> dict[str, str | None]:
    """The settings of a client that hands its jobs to the cluster."""
    return {
        "JOBORCH_EXECUTOR": "slurm",
        "JOBORCH_BATCH_INTERVAL": "0.5",
        "JOBORCH_VANISH_GRACE": "3",
        "SLURM_CONF": str(cluster.configuration),
        "PATH": f"{cluster.bin}:/usr/local/bin:/usr/bin:/bin",
    }


@pytest.fixture(name="slurm")
def make_slurm_pair(cluster: Cluster, make_pair: MakePair, open_folder: Path, pyz: Path) -> Iterator[Callable[..., Pair]]:
    """Makes a server and a client that hands its jobs to the cluster, both run by a user who is not root."""
    made: list[Pair] = []

    def make(server: dict[str, str | None] | None = None, **client: str | None) -> Pair:
        wishes, program = {**settings_of(cluster), **client}, open_program(open_folder, pyz)
        limits = {**LIMITS, **(server or {})}
        made.append(make_pair(folder=open_folder / f"pair{len(made)}", server=limits, client=wishes, user=NOBODY_UID, program=program))
        return made[-1]

    yield make
    for name in COMMANDS:
        cluster.lie(name, "")
    cluster.run("scancel", f"--user={NOBODY_UID}", check=False)
    wait_for(lambda: not cluster.run("squeue", "-h"), what="an empty cluster")


def mark_of(pair: Pair, number: int) -> str:
    job = pair.server.job(number)
    return f"{job['uuid']}.{job['attempt']}"


def gated(gate: Path) -> str:
    """A script that ends when a file appears."""
    return f"echo began; until [ -e {gate} ]; do sleep 0.05; done; echo done > result"


def begun(pair: Pair, number: int) -> None:
    """Wait until a script has begun."""
    wait_for(lambda: "began" in pair.server.get(f"/jobs/{number}/logs").text, 30, "the script's start")


def test_the_whole_way_as_an_ordinary_user(slurm: Callable[..., Pair], cluster: Cluster) -> None:
    """Upload, Slurm, result: files, streams, environment, what was asked for; the script's own failure is the script's."""
    pair = slurm(SERVICE_EXAMPLE_SLURM_PARTITION="main", SERVICE_EXAMPLE_SLURM_ARGS="--comment='of a test'").start()
    script = (
        USES_MEMORY
        + "id -u; cat in/a.txt >out.txt; echo $JOBORCH_ATTEMPT $JOBORCH_CPUS $SLURM_CPUS_PER_TASK >>out.txt; echo oops >&2; env >env"
    )
    number = submit(pair.server, script, {"in/a.txt": b"words\n"}, memory=600, timeout=90)
    failed = submit(pair.server, "echo no >&2; exit 7")
    job = wait_status(pair.server, number, "Completed", limit_s=60)
    found = download(pair.server, number)
    assert (found["out.txt"], found[".joborch/stdout"], found[".joborch/stderr"]) == (
        b"words\n1 1 1\n",
        f"{NOBODY_UID}\n".encode(),
        b"oops\n",
    )
    assert b"JOBORCH_TOKEN" not in found["env"]
    assert job["started_at"] > job["created_at"]
    assert 0 < job["cpu_time"] < 60 and 200 << 20 <= job["peak_memory"] < 400 << 20
    shown = cluster.show(mark_of(pair, number))
    assert (shown["Partition"], shown["TimeLimit"], shown["MinMemoryNode"], shown["Requeue"]) == ("main", "00:02:00", "600M", "0")
    assert shown["UserId"].endswith(f"({NOBODY_UID})")
    bad = wait_status(pair.server, failed, "Failed", limit_s=60)
    assert (bad["exit_code"], bad["cause"], bad["attempt"]) == (7, "user", 1)
    assert '"no"' in bad["reason"]
    health = pair.client.health()
    assert (health["executor"], health["slots"], health["job_slots"], health["problem"]) == ("slurm", 100, True, None)


def test_nothing_is_left_of_a_job_that_is_deleted(slurm: Callable[..., Pair], cluster: Cluster, open_folder: Path) -> None:
    """A running job, one that waits in Slurm, and one that has ended leave nothing on any disk, except Slurm's own records of an id."""
    pair, secret = slurm().start(), "xyzzy-of-a-patient"
    script = f"echo {secret} >out; echo {secret} >&2; echo {secret} >$TMPDIR/more; "
    ended = submit(pair.server, script + "exit 3", {f"{secret}.txt": secret.encode()}, name=secret)
    wait_status(pair.server, ended, "Failed", limit_s=90)
    running = submit(pair.server, script + gated(open_folder / "never"), {"in.txt": secret.encode()}, name=secret, cpus=1)
    begun(pair, running)
    place = (pair.client.data / "jobs" / mark_of(pair, running) / "tmp").readlink()
    cluster.run("scontrol", "update", "partition=main", "state=down")
    try:
        waiting = submit(pair.server, script, {"in.txt": secret.encode()}, name=secret)
        wait_for(lambda: cluster.jobs(mark_of(pair, waiting)), 60, "the job in Slurm")
        for number in (ended, running, waiting):
            mark = mark_of(pair, number)
            wait_for(lambda number=number: pair.server.call("DELETE", f"/jobs/{number}").status_code == 200, 90, "the end")
            assert (job := pair.server.job(number))["status"] == "Cleaned" and secret not in str(job)
            states = set(cluster.run("squeue", "-h", "-t", "all", "-n", slurm_name(mark), "-o", "%T").split())
            assert states <= {"CANCELLED", "FAILED", "COMPLETED"}, states
    finally:
        cluster.run("scontrol", "update", "partition=main", "state=up")
    assert pair.server.job(running)["ended_as"] == "Killed"
    for folder in (pair.server.data, pair.client.data, cluster.folder):
        assert files_with(folder, secret) == []
    assert not place.exists()


def test_a_login_node_that_nobody_can_call(cluster: Cluster, open_folder: Path, pyz: Path) -> None:
    """The client calls its server. Both are killed while a script runs in Slurm: it is found again, and runs once."""
    gate, program = open_folder / "gate", open_program(open_folder, pyz)
    pair = JoinedPair(open_folder / "joined", LIMITS, settings_of(cluster), user=NOBODY_UID, program=program)
    try:
        pair.server.start()
        pair.joined.enrol()
        pair.client.start(60)
        assert (pair.joined.listed() or {})["slots"] == 100, "so many jobs may be in Slurm"
        number = submit(pair.server, f"echo started >>out.txt; cat in.txt >>out.txt; {gated(gate)}", {"in.txt": b"words\n"})
        wait_for(lambda: "began" in pair.server.get(f"/jobs/{number}/logs").text, 60, "the script's start")
        for process in (pair.client, pair.server):
            process.kill()
        pair.server.start(60)
        pair.client.spawn()
        gate.touch()
        job = wait_status(pair.server, number, "Completed", limit_s=90)
        assert (job["attempt"], job["client"], download(pair.server, number).text("out.txt")) == (1, "gpu", "started\nwords\n")
        assert len(cluster.jobs(mark_of(pair, number))) == 1
    finally:
        pair.close()


def test_the_environment_goes_by_the_same_list(slurm: Callable[..., Pair]) -> None:
    """What sbatch exports is what a local script would get: neither secrets nor the settings of the client."""
    wishes = {"PGPASS": "secret", "OMP_NUM_THREADS": "3", "MYLAB_X": "1", "JOBORCH_PASS_ENV": "MYLAB_*", "SBATCH_COMMENT": "by the site"}
    pair = slurm(SLURM_JOB_ID="999999", SQUEUE_FORMAT="%x", **wishes).start()
    job = wait_status(pair.server, submit(pair.server, "env -0 > env.bin"), "Completed", limit_s=60)
    seen = dict(line.split("=", 1) for line in download(pair.server, job["id"]).text("env.bin").split("\0") if line)
    assert (seen["OMP_NUM_THREADS"], seen["MYLAB_X"], seen["JOBORCH_JOB_ID"]) == ("3", "1", str(job["id"]))
    assert not {"PGPASS", "SQUEUE_FORMAT", "JOBORCH_TOKEN", "JOBORCH_PASS_ENV", "PORT", "DATA_PATH"} & set(seen)
    assert seen["SLURM_JOB_ID"] != "999999", "the allocation that a client runs in is not its jobs'"


def test_a_job_waits_for_what_slurm_says(slurm: Callable[..., Pair], cluster: Cluster, open_folder: Path) -> None:
    """Two nodes with a core each: the third job is pending, its server says why; it is ended there, as one that runs is, steps and all."""
    pair, gate = slurm().start(), open_folder / "gate"
    running = [submit(pair.server, gated(gate)) for _ in range(2)]
    for number in running:
        begun(pair, number)
    third = submit(pair.server, f"echo ran >{open_folder}/ran", user_id=2)
    pattern = r"Slurm: pending since 20\d\d-\d\d-\d\d \d\d:\d\d, (Resources|Priority) \(job \d+\)"  # Slurm may think for a moment before
    wait_for(lambda: re.fullmatch(pattern, str(pair.server.job(third)["waiting_for"])), 30, "a reason")
    assert pair.server.job(third)["status"] == "Submitted"
    assert pair.client.health()["waiting"] == 1
    begin = time.monotonic()
    assert pair.server.post(f"/terminate/{third}").json()["status"] == "Killed"
    assert time.monotonic() - begin < 10
    assert cluster.show(mark_of(pair, third))["JobState"] == "CANCELLED"
    assert pair.server.job(third)["started_at"] is None
    script = "trap : TERM; srun --overlap sleep 300 & sleep 300 & echo began; wait; wait"
    gate.touch()
    stepping = submit(pair.server, script)
    begun(pair, stepping)
    assert pair.server.post(f"/terminate/{stepping}").json()["status"] == "Killed"
    assert cluster.show(mark_of(pair, stepping))["JobState"] == "CANCELLED"
    left = ["pgrep", "-u", str(NOBODY_UID), "-f", "sleep 300"]
    wait_for(lambda: not subprocess.run(left, capture_output=True, check=False).stdout, what="nothing left of it")
    for number in running:
        wait_status(pair.server, number, "Completed", limit_s=30)
    assert not (open_folder / "ran").exists()


def test_limits_are_kept_to_the_second(slurm: Callable[..., Pair]) -> None:
    """Slurm knows minutes; the wrapper knows seconds, and kills what ignores TERM."""
    pair = slurm().start()
    number = submit(pair.server, "trap 'echo last words >&2' TERM; while :; do read -t 0.2 <> <(:); done", timeout=2)
    job = wait_status(pair.server, number, "Failed", limit_s=60)
    assert (job["cause"], job["attempt"]) == ("limit", 1)
    assert "time limit of 2.0 s" in job["reason"]
    assert "last words" in job["reason"]


def test_what_no_node_has_is_refused_and_what_is_wrong_here_waits(slurm: Callable[..., Pair]) -> None:
    """More memory than any node has: the job has failed. A partition that is not there is the site's mistake: the job waits and says so."""
    pair = slurm(SERVICE_OTHER_SLURM_PARTITION="nowhere", server={"SERVICE_OTHER_CLIENTS": "x", "SERVICE_OTHER_TOKEN": Pair.TOKEN})
    pair.server.settings["SERVICE_OTHER_CLIENTS"] = pair.client.url
    pair.start()
    wait_for(lambda: "WARNING sbatch would refuse jobs of other" in pair.client.log, what="a warning at the start")
    wide = wait_status(pair.server, submit(pair.server, "true", memory=1_000_000), "Failed", limit_s=30)
    assert (wide["cause"], "Slurm refuses it" in wide["reason"]) == ("limit", True)
    waits = submit(pair.server, "true", service="other")
    wait_for(lambda: "Invalid partition name" in reasons(pair.server.job(waits)), 30, "a reason")
    assert pair.server.job(waits)["status"] == "Submitted"
    wait_status(pair.server, submit(pair.server, "true"), "Completed", limit_s=30)
    pair.client.settings["SERVICE_OTHER_SLURM_PARTITION"] = "main"
    pair.client.restart()
    assert wait_status(pair.server, waits, "Completed", limit_s=60)["attempt"] == 1


def test_one_kind_of_memory_beside_another(slurm: Callable[..., Pair]) -> None:
    """`memory` of a job, where the site's settings say --mem-per-cpu: it can never run, and says why; the others do not wait for it."""
    pair = slurm(SERVICE_EXAMPLE_SLURM_ARGS="--mem-per-cpu=50").start()
    numbers = [submit(pair.server, "true", memory=memory) for memory in (100, None, 100, None)]
    for number in numbers[1::2]:
        wait_status(pair.server, number, "Completed", limit_s=30)
    for number in numbers[::2]:
        job = wait_status(pair.server, number, "Failed", limit_s=30)
        assert (job["cause"], job["attempt"]) == ("limit", 1)
        assert "mutually exclusive" in job["reason"] and "SERVICE_EXAMPLE_SLURM_ARGS" in job["reason"]


def test_a_submit_limit(slurm: Callable[..., Pair], cluster: Cluster) -> None:
    """What waits for it is Killed at once when asked, and what remains begins in the order in which it came."""
    pair = slurm().start()
    cluster.lie("sbatch", "limit")
    numbers: list[int] = []
    for _ in range(5):
        numbers.append(submit(pair.server, "true"))
        wait_for(lambda: "AssocMaxSubmitJobLimit" in str(pair.server.job(numbers[-1])["message"]), 30, "a reason")
    killed = numbers.pop(1)
    answer = pair.server.post(f"/terminate/{killed}")
    assert (answer.status_code, pair.server.job(killed)["status"]) == (200, "Killed")
    cluster.lie("sbatch", "")
    for number in numbers:
        wait_status(pair.server, number, "Completed", limit_s=90)
    begun = [int(found) for found in re.findall(r"payload (\d+) is job \d+ of", pair.client.log)]
    assert begun == sorted(begun) and len(begun) == len(numbers), "in the order in which they came"


@pytest.mark.parametrize("point", ["run.marked", "slurm.submitted"])
def test_the_client_is_killed_while_it_submits(point: str, slurm: Callable[..., Pair], cluster: Cluster, open_folder: Path) -> None:
    """Before sbatch, or between its answer and the stored handle: the job is in Slurm once, and runs once."""
    pair = slurm(JOBORCH_TEST_CRASH=point).start()
    assert pair.client.process is not None
    number = submit(pair.server, f"echo ran >>{open_folder}/ran; echo done > result")
    pair.client.process.wait(30)
    pair.client.settings["JOBORCH_TEST_CRASH"] = None
    pair.client.start()
    assert wait_status(pair.server, number, "Completed", limit_s=60)["attempt"] == 1
    assert len(cluster.jobs(mark_of(pair, number))) == 1
    assert (pair.client.data / "jobs" / mark_of(pair, number) / "work" / "result").exists()


def test_the_client_is_killed_while_sbatch_is_under_way(slurm: Callable[..., Pair], cluster: Cluster) -> None:
    """sbatch outlives it, and Slurm does not know the job yet: that is waited for, and the job is submitted once."""
    pair, old = slurm(), cluster.calls.read_text().split()
    pair.start()
    wait_for(lambda: "sacct" in cluster.calls.read_text().split()[len(old) :], what="the end of its look at Slurm")
    cluster.lie("sbatch", "slow")
    before = cluster.calls.read_text().split().count("sbatch")
    number = submit(pair.server, "echo done > result")
    wait_for(lambda: cluster.calls.read_text().split().count("sbatch") > before, what="the payload handed over")
    pair.client.kill()
    pair.client.start()
    wait_for(lambda: "waits to learn whether it succeeded" in str(pair.server.job(number)["waiting_for"]), 90, "the reason")
    cluster.lie("sbatch", "")
    assert wait_status(pair.server, number, "Completed", limit_s=60)["attempt"] == 1
    assert len(cluster.jobs(mark_of(pair, number))) == 1


def test_somebody_else_cancels_it(slurm: Callable[..., Pair], cluster: Cluster, open_folder: Path) -> None:
    pair = slurm().start()
    number = submit(pair.server, gated(open_folder / "gate"))
    begun(pair, number)
    cluster.run("scancel", *cluster.jobs(mark_of(pair, number)))
    job = wait_status(pair.server, number, "Killed", limit_s=30)
    assert (job["cause"], "not by joborch" in job["reason"], job["attempt"]) == ("cancelled", True, 1)


def test_slurm_runs_it_a_second_time(slurm: Callable[..., Pair], cluster: Cluster, open_folder: Path) -> None:
    """Where a site lets it: the script, which was ended, is not run again under the same attempt, and its exit status is nobody's."""
    pair, gate = slurm(SERVICE_EXAMPLE_SLURM_ARGS="--requeue").start(), open_folder / "gate"
    number = submit(pair.server, gated(gate))
    begun(pair, number)
    first = mark_of(pair, number)
    cluster.run("scontrol", "requeue", *cluster.jobs(first))
    wait_for(lambda: pair.server.job(number)["attempt"] == 2, 30, "a second attempt")
    gate.touch()
    job = wait_status(pair.server, number, "Completed", limit_s=60)
    assert "stopped and requeued it" in job["attempts"][0]["reason"]
    assert (pair.client.data / "jobs" / first / "stdout").read_text() == "began\n"


def test_a_node_is_lost(slurm: Callable[..., Pair], cluster: Cluster, open_folder: Path) -> None:
    """NODE_FAIL: another attempt, on the node that is left, or when one comes back."""
    pair, gate = slurm().start(), open_folder / "gate"
    number = submit(pair.server, gated(gate))
    begun(pair, number)
    node = cluster.show(mark_of(pair, number))["NodeList"]
    cluster.kill(f"slurmd.{node}")
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    wait_for(lambda: pair.server.job(number)["attempt"] == 2, 30, "a second attempt")
    subprocess.run(["slurmd", "-f", str(cluster.configuration), "-N", node], check=True)
    wait_for(cluster.both_up, 30, "both nodes")
    gate.touch()
    job = wait_status(pair.server, number, "Completed", limit_s=60)
    assert (job["attempts"][0]["cause"], "NODE_FAIL" in job["attempts"][0]["reason"]) == ("infrastructure", True)


def test_slurmctld_dies_and_forgets(slurm: Callable[..., Pair], cluster: Cluster, open_folder: Path) -> None:
    """Its ids are given out again, to jobs of the same user: those are neither read nor cancelled, and ours is tried again.

    What ran to its end meanwhile has its exit file, and is Completed though Slurm knows nothing of it; also after the client was away.
    """
    pair, gate = slurm().start(), open_folder / "gate"
    ran, lost = submit(pair.server, gated(gate)), submit(pair.server, f"until [ -e {gate}2 ]; do sleep 0.05; done", user_id=2)
    begun(pair, ran)
    (old_id,) = wait_for(lambda: cluster.jobs(mark_of(pair, lost)), what="the second job in Slurm")
    pair.client.kill()
    cluster.kill("slurmctld")
    gate.touch()
    try:
        wait_for(lambda: joborch.read_exit(pair.client.data / "jobs" / mark_of(pair, ran)), what="the first job's end")
    finally:
        cluster.start_slurmctld("-c")
    theirs = ["setpriv", f"--reuid={NOBODY_UID}", "--clear-groups", "sbatch", "--parsable", "--hold", "--chdir=/", "--wrap=true"]
    given = [cluster.run(*theirs).strip() for _ in range(int(old_id))]
    assert old_id in given
    pair.client.start()
    assert wait_status(pair.server, ran, "Completed", limit_s=60)["attempt"] == 1
    (open_folder / "gate2").touch()
    job = wait_status(pair.server, lost, "Completed", limit_s=60)
    assert (job["attempt"], job["attempts"][0]["cause"]) == (2, "infrastructure")
    assert "no longer knows the job" in job["attempts"][0]["reason"]
    states = dict(line.split() for line in cluster.run("squeue", "-h", "-o", "%i %T").splitlines())
    assert {job_id: states[job_id] for job_id in given} == dict.fromkeys(given, "PENDING")


def test_slurm_is_away(slurm: Callable[..., Pair], cluster: Cluster, open_folder: Path) -> None:
    """What runs ends and is fetched all the same; what comes waits, is told why, and goes on by itself, once."""
    pair, gate = slurm().start(), open_folder / "gate"
    number = submit(pair.server, gated(gate))
    begun(pair, number)
    cluster.kill("slurmctld", signal.SIGTERM)
    try:
        gate.touch()
        wait_status(pair.server, number, "Completed")
        later = submit(pair.server, "echo ran")
        wait_for(lambda: "slurm" in str(pair.server.job(later)["waiting_for"]).lower(), 30, "a reason")
        problem = wait_for(lambda: pair.client.health()["problem"], what="the problem")
        assert "Slurm: " in problem or "sbatch: " in problem
    finally:
        cluster.start_slurmctld()
    job = wait_status(pair.server, later, "Completed", limit_s=60)
    assert job["attempt"] == 1
    assert len(job["history"]) <= 7, "it is sent once more before the client says that it takes none, and then stays Queued"
    wait_for(lambda: pair.client.health()["problem"] is None, what="no problem")


def test_one_question_for_all_jobs(slurm: Callable[..., Pair], cluster: Cluster) -> None:
    """However many there are; and an answer that is garbage loses none of them."""
    pair, old = slurm(), cluster.calls.read_text().split()
    pair.start()
    wait_for(lambda: "sacct" in cluster.calls.read_text().split()[len(old) :], what="the end of its look at Slurm")
    before, begin = cluster.calls.read_text().split(), time.monotonic()
    numbers = [submit(pair.server, "sleep 0.2") for _ in range(12)]
    cluster.lie("squeue", "garbage")
    assert "invalid answer" in wait_for(lambda: pair.client.health()["problem"], 30, "the problem")
    cluster.lie("squeue", "")
    for number in numbers:
        assert wait_status(pair.server, number, "Completed", limit_s=60)["attempt"] == 1
    calls = cluster.calls.read_text().split()[len(before) :]
    assert calls.count("sbatch") == 12
    assert calls.count("squeue") <= (time.monotonic() - begin) / 0.5 + 2
    assert calls.count("sacct") <= 1


# == The executor itself ==


@pytest.fixture
def executor(cluster: Cluster, data: joborch.DataFolder, monkeypatch: pytest.MonkeyPatch) -> slurm.SlurmExecutor:
    """An executor of this process; its commands give up after a second."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
    monkeypatch.setenv("PATH", f"{cluster.bin}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "SLURM_COMMAND_S", 1.0)
    wishes = {"JOBORCH_BATCH_INTERVAL": "0.05", "JOBORCH_VANISH_GRACE": "2", "DATA_PATH": str(data.path), "JOBORCH_KILL_GRACE": "5"}
    return slurm.SlurmExecutor(data, joborch.load_config("client", {}, wishes))


def payload(data: joborch.DataFolder, script: str) -> joborch.Job:
    """A payload whose files are in place."""
    with closing(joborch.Store(":memory:", "client", HandClock())) as store:
        job = store.add(new_job(), "submitted")
    work = data.job(job.mark) / "work"
    work.mkdir(parents=True)
    (work / "run.sh").write_text(script)
    return job


def ended(executor: slurm.SlurmExecutor, job: joborch.Job) -> Outcome:
    """Wait for a payload's end."""
    return wait_for(lambda: (outcome := executor.poll([job])[job.id]).alive is False and outcome, 30, "the end")


def test_an_exit_file_that_comes_late(executor: slurm.SlurmExecutor, data: joborch.DataFolder) -> None:
    """Slurm says COMPLETED, and the file system shows the file a moment later."""
    job = payload(data, "exit 5")
    job = job._replace(handle=executor.start(job))
    place = data.job(job.mark) / "exit.json"
    wait_for(lambda: joborch.read_exit(place.parent), what="the exit file")
    place.rename(place.with_suffix(".late"))
    wait_for(lambda: executor.look(0.0) and executor.known[slurm_name(job.mark)].state == "FAILED", what="Slurm's word")
    assert executor.poll([job])[job.id] == Outcome(True)
    place.with_suffix(".late").rename(place)
    assert ended(executor, job) == Outcome(False, 5)


def test_a_wrapper_that_was_killed(executor: slurm.SlurmExecutor, data: joborch.DataFolder) -> None:
    """No exit file, and Slurm knows no reason: after a while it counts as the script's own doing."""
    job = payload(data, "kill -9 $PPID; sleep 1")
    job = job._replace(handle=executor.start(job))
    found = ended(executor, job)
    assert (found.cause, "the wrapper was killed" in found.reason) == (Cause.USER, True)


def test_a_folder_that_the_script_removes(executor: slurm.SlurmExecutor, data: joborch.DataFolder) -> None:
    """It ends all the same, and says so: no claim can be taken there, and none is needed."""
    job = payload(data, 'cd /; rm -rf "${OLDPWD%/work}"')
    job = job._replace(handle=executor.start(job))
    found = ended(executor, job)
    assert (found.cause, found.reason) == (Cause.INFRASTRUCTURE, "the payload's folder was removed while the script ran")


def test_a_script_that_forges_its_exit_file(
    executor: slurm.SlurmExecutor, data: joborch.DataFolder, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is believed, and what runs on in Slurm is ended."""
    monkeypatch.setattr(slurm, "SLURM_LINGER_S", 1.0)
    job = payload(data, """cd ..; rm exit.json; echo '{"status": 0, "left": 0}' > exit.json; sleep 300""")
    job = job._replace(handle=executor.start(job))
    assert ended(executor, job).exit_status == 0

    def over() -> bool:
        executor.poll([])
        return "CANCELLED" in cluster.run("squeue", "-h", "-t", "all", "-n", slurm_name(job.mark), "-o", "%T")

    wait_for(over, what="its end in Slurm")


@pytest.mark.parametrize("warning", ["USR1", "USR2", "QUIT", "ALRM", "XCPU"])
def test_a_warning_to_the_wrapper_ends_nothing(warning: str, executor: slurm.SlurmExecutor, data: joborch.DataFolder) -> None:
    """As by --signal=B:USR1@60, or by a script that means itself: its own end counts, and no limit was reached."""
    job = payload(data, f"kill -{warning} $PPID; sleep 0.2; exit 5")
    job = job._replace(handle=executor.start(job))
    assert ended(executor, job) == Outcome(False, 5)


def test_a_folder_that_slurm_would_not_find_is_refused(tmp_path: Path) -> None:
    data = joborch.DataFolder(str(tmp_path / "a\\b"))
    with pytest.raises(ConfigError, match="backslash"):
        slurm.SlurmExecutor(data, joborch.load_config("client", {}, {"DATA_PATH": str(data.path)}))


def test_too_much_memory(executor: slurm.SlurmExecutor, data: joborch.DataFolder) -> None:
    """Slurm ends it, wrapper and all; whose doing that was stands in the job's own log."""
    script = "exec python3 -c 'import time; x = bytearray(300 << 20); time.sleep(60)'"
    job = payload(data, script)._replace(memory=50)
    job = job._replace(handle=executor.start(job))
    found = ended(executor, job)
    assert (found.cause, "memory" in found.reason) == (Cause.LIMIT, True), found


def test_a_command_that_hangs(executor: slurm.SlurmExecutor, data: joborch.DataFolder, cluster: Cluster) -> None:
    """It is ended after a while; where that was sbatch nobody knows whether Slurm has the job: it is not submitted again at once."""
    job = payload(data, "true")
    try:
        cluster.lie("sbatch", "hang")
        with pytest.raises(BackendUnavailable, match="did not answer within"):
            executor.start(job)
        cluster.lie("squeue", "hang")
        assert executor.poll([job])[job.id].alive
        assert "sbatch did not answer" in executor.problem()
    finally:
        cluster.lie("sbatch", "")
        cluster.lie("squeue", "")
    wait_for(lambda: executor.look(0.0), what="an answer")
    assert executor.find([job]) == {job.mark: ""}, "nobody can tell yet"
    executor.unsure.clear()
    assert executor.find([job]) == {}


def test_that_slurm_is_back_is_seen_without_a_job_to_ask_for(executor: slurm.SlurmExecutor) -> None:
    """Else the client would refuse all jobs for ever."""
    executor.away(BackendUnavailable("squeue did not answer"))
    wait_for(lambda: executor.poll([]) or not executor.problem(), what="no problem")


def test_what_begins_while_it_is_given_up_is_not_given_up(
    executor: slurm.SlurmExecutor, data: joborch.DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm has forgotten it, no trace of it is seen, and its wrapper claims it just now."""
    job = payload(data, "true")._replace(handle="4711")
    executor.look(0.0)
    executor.missed[job.mark] = float("-inf")
    fence = executor.fence

    def late(job: joborch.Job) -> bool:
        (data.job(job.mark) / f"started.{job.attempt}").write_text("1\nready\n")
        return fence(job)

    monkeypatch.setattr(executor, "fence", late)
    assert executor.poll([job])[job.id].alive


def test_what_is_given_up_never_begins(executor: slurm.SlurmExecutor, data: joborch.DataFolder) -> None:
    """An attempt that was cancelled while nobody knew whether Slurm has it loses its claim, whenever Slurm starts it."""
    job = payload(data, "echo ran > ran")
    executor.cancel(job)
    job = job._replace(handle=executor.start(job))
    wait_for(lambda: executor.look(0.0) and executor.known[slurm_name(job.mark)].state == "COMPLETED", what="Slurm's word")
    assert not (data.job(job.mark) / "work" / "ran").exists()


def test_what_waits_is_ended_at_once_while_slurm_is_away(executor: slurm.SlurmExecutor, data: joborch.DataFolder, cluster: Cluster) -> None:
    """Its claim is taken: whatever Slurm does with it later, the script never begins."""
    job = payload(data, "echo ran > ran")
    for command in ("squeue", "scancel"):
        cluster.lie(command, "hang")
    begin = time.monotonic()
    executor.cancel(job)
    assert time.monotonic() - begin < 5
    for command in ("squeue", "scancel"):
        cluster.lie(command, "")


def test_no_slurm_here(executor: slurm.SlurmExecutor, data: joborch.DataFolder, tmp_path: Path) -> None:
    executor.inherited["PATH"] = str(tmp_path)
    (tmp_path / "timeout").symlink_to("/usr/bin/timeout")
    with pytest.raises(BackendUnavailable, match="there is no sbatch in PATH"):
        executor.start(payload(data, "true"))


def test_doctor_knows_slurm(cluster: Cluster, executor: slurm.SlurmExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, would take jobs of each service, and why not; nothing is submitted."""
    before = cluster.run("squeue", "-h", "-t", "all")
    found = list(executor.examine())
    assert all(finding.good for finding in found), found
    assert "slurm-wlm 22.05" in found[0].text
    assert "accounting is off" in found[-1].text
    wrong = {"docking": BatchOptions(slurm_partition="nowhere"), "example": BatchOptions(slurm_partition="main")}
    executor.config = dataclasses.replace(executor.config, batch=wrong)
    texts = [finding.text for finding in executor.examine() if not finding.good]
    refused = "sbatch would refuse jobs of docking: sbatch: invalid partition specified: nowhere"
    assert texts == [f"{refused}; check SERVICE_DOCKING_SLURM_PARTITION"]
    odd = {"docking": BatchOptions(slurm_partition="main", slurm_args=("--nonsense",))}
    executor.config = dataclasses.replace(executor.config, batch=odd)
    (text,) = [finding.text for finding in executor.examine() if not finding.good]
    assert "unrecognized option '--nonsense'; check SERVICE_DOCKING_SLURM_PARTITION, SERVICE_DOCKING_SLURM_ARGS" in text
    executor.config = dataclasses.replace(executor.config, batch={})
    cluster.lie("squeue", "garbage")
    assert [finding.good for finding in executor.examine()] == [True, False]
    cluster.lie("squeue", "")
    assert cluster.run("squeue", "-h", "-t", "all") == before
