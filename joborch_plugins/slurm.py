"""Executor `slurm`: payloads run as Slurm jobs. One query covers all of them, and the exit file outranks Slurm's report."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from joborch import (
    IDLE_LOOK_S,
    LOOK_AGAIN_S,
    BackendUnavailable,
    Backoff,
    BatchOptions,
    CannotRun,
    Cause,
    Clock,
    Config,
    ConfigError,
    DataFolder,
    Finding,
    Job,
    JoborchError,
    Outcome,
    Reason,
    StillRunning,
    SubmitRefused,
    crash_point,
    fits_one,
    format_duration,
    last_line,
    log,
    marked_below,
    node_environment,
    one_line,
    passed_on,
    read_claim,
    read_exit,
    with_first_file_limit,
    wrapper_text,
    write_atomic,
)

# == Slurm's words ==  Pure functions parse and judge the output of Slurm's commands; an unknown state counts as alive.

# States of squeue(1) and sacct(1). A state in none of these tables counts as running and is logged once.
SLURM_WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
SLURM_RUNS = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
SLURM_ENDS: Mapping[str, tuple[Cause | None, str]] = {  # the cause and the reason; None: the exit file decides
    "COMPLETED": (None, ""),
    "FAILED": (None, ""),
    "TIMEOUT": (Cause.LIMIT, "Slurm stopped it at its time limit"),
    "DEADLINE": (Cause.LIMIT, "Slurm stopped it at its deadline"),
    "OUT_OF_MEMORY": (Cause.LIMIT, "it was killed because it used more memory than it had requested"),
    "NODE_FAIL": (Cause.INFRASTRUCTURE, "the node that it ran on failed"),
    "BOOT_FAIL": (Cause.INFRASTRUCTURE, "its node could not be started"),
    "PREEMPTED": (Cause.INFRASTRUCTURE, "Slurm stopped it to start another job"),
    "REVOKED": (Cause.INFRASTRUCTURE, "another cluster of the federation started it"),
    "CANCELLED": (Cause.CANCELLED, "it was cancelled in Slurm, not by joborch"),
}
SLURM_AWAY = re.compile(  # messages of the commands if Slurm does not answer; all of these may be temporary
    r"unable to contact|timed out|connection|zero bytes|standby mode|authentication|credential|munge|temporarily|communication|try again"
    r"|configuration source|slurm\.conf|could not resolve",
    re.IGNORECASE,
)
SLURM_NEVER = re.compile(  # messages of sbatch about requests that no node or partition can satisfy
    r"requested node configuration is not available|time limit is invalid|can ?not be satisfied|more processors requested"
    r"|memory specification|memory required by task|node count specification|topology configuration|gres option unsupported"
    r"|generic resource \(gres\) specification"
    r"|invalid --(mem|time|cpus-per-task) specification|invalid numeric value .* for --(mem|time|cpus-per-task)",
    re.IGNORECASE,
)
SLURM_LIMIT = re.compile(r"\b(QOS|Assoc|Max)[A-Z]\w+")  # sbatch names the exceeded limit in a separate line
SLURM_SIZE_LIMIT = re.compile("(Max|Min).*(PerJob|PerNode)|^(QOS|Assoc)Min")  # on the size of a job, not the number of jobs
SLURM_TWO_MEMORIES = "mutually exclusive"  # of --mem, --mem-per-cpu and --mem-per-gpu
SLURM_MEMORY = re.compile(r"oom[-_ ]kill|memory limit|out of memory", re.IGNORECASE)
SLURM_COMMAND_S = 20.0  # without slurmctld, the commands would retry for ten minutes
SLURM_UNSURE_S = 60.0  # if sbatch got no answer, slurmctld may still accept the job for this long
SLURM_LINGER_S = 10.0  # how long Slurm may take to finish a job after its exit file was written
SLURM_LOOK_S = 0.3  # the pause between queries while a job is being cancelled
SQUEUE_FIELDS = (("JobID", 20), ("State", 20), ("RestartCnt", 10), ("SubmitTime", 24), ("NodeList", 40), ("Reason", 120), ("Name", 120))
SLURM_OWN_NAMES = re.compile(  # variables of an allocation that joborch may run in, or that turn one job into several
    "(SQUEUE|SACCT|SCANCEL|SALLOC|SRUN)_|SLURM_(?!CONF$|CONF_SERVER$|JWT$)|SBATCH_(ARRAY_INX|CLUSTERS|WAIT)$"
)
# sbatch exports all SLURM_* variables, even its login. With exec, it cannot be read from the wrapper's /proc either.
WITHOUT_JWT = '[ -z "$SLURM_JWT" ] || exec env -u SLURM_JWT bash "$0" "$@"\n'
KILLED_STATUS = 128 + signal.SIGKILL  # of a script that was killed, perhaps by the kernel when memory ran out


class SlurmJob(NamedTuple):
    """One job as Slurm reports it."""

    id: str
    state: str
    restarts: int
    submitted: str  # as in 2026-11-26T14:02:00, local time
    reason: str
    nodes: str = ""  # where it was started; empty if it never was, or if that is unknown


def slurm_name(mark: str) -> str:
    """Return an attempt's name in Slurm. Slurm reuses its ids; these names are unique."""
    return f"joborch-{mark}"


def parse_squeue(text: str) -> dict[str, SlurmJob]:
    """Parse squeue's output in the format SQUEUE_FIELDS. Return joborch's jobs by name. Raises ValueError for garbage.

    Of several jobs with one name, the one that has not ended counts, else the last. A foreign job's name may break its line.
    """
    found: dict[str, SlurmJob] = {}
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and not any(re.match("[0-9]", line) for line in lines):
        raise ValueError(one_line(lines[0], 80))
    for line in lines:
        cells, at = [], 0
        for _, width in SQUEUE_FIELDS:
            cells.append(line[at : at + width].strip())
            at += width
        job_id, state, restarts, submitted, nodes, reason, name = cells
        if name.startswith("joborch-"):
            if not job_id.isdigit() or not re.fullmatch("[A-Z_]+", state):
                raise ValueError(one_line(line, 80))
            keep_slurm_job(found, name, SlurmJob(job_id, state, int(restarts) if restarts.isdigit() else 0, submitted, reason, nodes))
    return found


def parse_sacct(text: str) -> dict[str, SlurmJob]:
    """Parse `sacct --parsable2` (JobIDRaw, State, Submit, JobName). Return joborch's jobs by name; skip garbage."""
    found: dict[str, SlurmJob] = {}
    for line in text.splitlines():
        cells = line.split("|", 3)
        if len(cells) == 4 and cells[0].isdigit() and re.match("[A-Z_]+", cells[1]) and cells[3].startswith("joborch-"):
            state, _, who = cells[1].partition(" by ")  # as in "CANCELLED by 1000"
            keep_slurm_job(found, cells[3], SlurmJob(cells[0], state, 0, cells[2], f"by user {who}" if who else ""))
    return found


def keep_slurm_job(found: dict[str, SlurmJob], name: str, job: SlurmJob) -> None:
    """Add a job, unless a job with the same name that has not ended is known."""
    known = found.get(name)
    if known is None or known.state in SLURM_ENDS:
        found[name] = job


def slurm_error(command: str, said: str) -> JoborchError:
    """Return the exception for a command's error message."""
    words = [line for line in said.splitlines() if line.strip()]
    last = next((line for line in reversed(words) if "error" in line.lower()), words[0] if words else "it failed without a message")
    text = one_line(re.sub(r"^\w+: (error: |fatal: )?", "", last), 200)
    limit = SLURM_LIMIT.search(said)
    if limit and limit[0] not in text:
        text = f"{limit[0]}: {text}"
    if command == "sbatch" and (SLURM_NEVER.search(text) or (limit and SLURM_SIZE_LIMIT.search(limit[0]))):
        return CannotRun(f"Slurm refuses it: {text}")
    return BackendUnavailable(f"{command}: {text}") if command != "sbatch" or SLURM_AWAY.search(text) else SubmitRefused(f"sbatch: {text}")


def slurm_waits(job: SlurmJob) -> str:
    """Return why a job waits, in Slurm's words; constant while nothing changes."""
    reason = job.reason if job.reason not in ("", "None") else "no reason yet"
    return f"Slurm: {job.state.lower()} since {job.submitted[:16].replace('T', ' ')}, {reason} (job {job.id})"


def squeue_format() -> str:
    """Return squeue's output format."""
    return ",".join(f"{name}:{width}" for name, width in SQUEUE_FIELDS)


OWN_SBATCH_OPTIONS = (  # set by joborch, or incompatible with it; the site may set all others
    *("array", "begin", "chdir", "clusters", "cpus-per-task", "dependency", "error", "export", "export-file", "get-user-env", "gid"),
    *("help", "hold", "input", "job-name", "kill-on-invalid-dep", "mem", "open-mode", "output", "parsable", "quiet", "test-only"),
    *("time", "uid", "usage", "version", "wait", "wrap"),
)
SHORT_SBATCH_OPTION = re.compile("-([ACGLNnpqwxBS].+|[Oskv])")  # one, alone or with its value; several in one word are not parsed


def read_sbatch_words(text: str) -> tuple[str, ...]:
    """Return further options for sbatch, split as by a shell. Raises ValueError for options that joborch sets itself."""
    words = tuple(shlex.split(text))
    for word in words:
        if not re.match("--?[a-zA-Z]", word):
            raise ValueError(f"{word!r} is not an option: write --nice=100, and quote values with blanks")
        name = word[2:].partition("=")[0]  # getopt_long(3) allows abbreviations: --arr is --array
        ours = any(known.startswith(name) for known in OWN_SBATCH_OPTIONS)
        if ours if word.startswith("--") else not SHORT_SBATCH_OPTION.fullmatch(word):
            raise ValueError(f"joborch sets {word}, or it may hide an option that joborch sets: remove it, or write it as a long option")
    return words


def service_options(options: BatchOptions) -> dict[str, str]:
    """Return the sbatch options for every job of a service; unset options are empty."""
    return {name: getattr(options, f"slurm_{name}") for name in ("partition", "account", "qos", "constraint", "gres")}


def propagates(options: BatchOptions) -> bool:
    """Tell whether the site's options say which limits of the login node its jobs get."""
    return any(word.startswith("--prop") for word in options.slurm_args)


def sbatch_options(job: Job, options: BatchOptions, folder: Path) -> list[str]:
    """Return the sbatch options for one attempt. The job's own cpus, memory, gpus and timeout override its service's settings."""
    limit_s = job.timeout or options.slurm_time_s
    named = {
        **service_options(options),
        **({"gpus": str(job.gpus), **({"gres": ""} if options.slurm_gres.startswith("gpu") else {})} if job.gpus else {}),
        "mem": f"{job.memory}M" if job.memory else "",
        "time": str(math.ceil(limit_s / 60)) if limit_s else "",  # whole minutes; the wrapper enforces seconds
        "cpus-per-task": str(job.cpus),
        "job-name": slurm_name(job.mark),
        "chdir": str(folder),
        "output": str(folder / f"slurm.{job.attempt}").replace("%", "%%"),
    }
    # --no-requeue: if a node is lost, the server decides about another attempt.
    # --propagate=NONE: else jobs inherit the login node's limits (ulimit), such as CPU time (sbatch(1)).
    return [
        "--parsable",
        "--export=ALL",
        "--no-requeue",
        *(() if propagates(options) else ("--propagate=NONE",)),
        *(f"--{key}={value}" for key, value in named.items() if value),
        *options.slurm_args,
    ]


@dataclass(frozen=True)
class SlurmTraces:
    """What joborch knows about an attempt apart from Slurm's report."""

    ended: Outcome | None  # by the exit file
    claimed: bool  # the wrapper has started
    begun: bool  # and was about to start the script
    claimed_before: bool  # it had started before the last query
    folder: Path
    again: bool = False  # a second wrapper started and stopped at once
    words: str = ""  # the last line that Slurm wrote to the job's log
    missed_s: float = 0.0  # how long joborch has waited for the exit file
    removed: bool = False  # the folder is gone


def slurm_outcome(job: SlurmJob | None, traces: SlurmTraces, grace_s: float) -> Outcome:
    """Judge an attempt by Slurm's report (None if Slurm does not know it) and by its traces.

    A clear exit file is judged before; here it only tells how a script ended that got a signal.
    """
    state, cause, what = job.state if job else "", *SLURM_ENDS.get(job.state if job else "", (None, ""))
    if job is not None and state in SLURM_WAITS:
        if job.restarts and traces.claimed_before:
            return requeued(job)
        return Outcome(True, waits="" if traces.claimed else slurm_waits(job))
    if job is not None and state not in SLURM_ENDS:
        return Outcome(True)
    if cause is Cause.CANCELLED and job is not None and job.nodes and not traces.claimed:
        # Not by a person: after a crash, slurmctld cancels jobs that its nodes had before, or that it cannot launch.
        failed = Outcome(False, cause=Cause.INFRASTRUCTURE, reason=f"Slurm could not start it on {job.nodes} (job {job.id}: {state})")
        return unseen(traces) if traces.missed_s < grace_s else failed
    if cause is not None and job is not None:
        more = "; ".join(part for part in (job.reason if cause is Cause.CANCELLED and job.reason != "None" else "", traces.words) if part)
        return Outcome(False, cause=cause, reason=f"{what} (job {job.id}: {state}{'; ' if more else ''}{more})")
    if SLURM_MEMORY.search(traces.words):
        return Outcome(False, cause=Cause.LIMIT, reason=f'it used more memory than it had requested; Slurm: "{traces.words}"')
    if traces.again:
        return requeued(job)
    if traces.ended is not None and (job is not None or not traces.ended.told):
        return traces.ended
    return unseen(traces) if traces.missed_s < grace_s else without_exit_file(job, traces, grace_s)


def unseen(traces: SlurmTraces) -> Outcome:
    """Return the outcome of an attempt that has disappeared: it may be over, so joborch waits for its exit file."""
    return Outcome(True, waits="" if traces.claimed else "Slurm no longer lists it: the client waits for its exit file")


def requeued(job: SlurmJob | None) -> Outcome:
    """Return the outcome of an attempt that Slurm requeued."""
    where = f" (job {job.id})" if job else ""
    return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=f"Slurm stopped and requeued it{where}: an attempt runs only once")


def without_exit_file(job: SlurmJob | None, traces: SlurmTraces, grace_s: float) -> Outcome:
    """Judge an attempt that is over but has no exit file."""
    waited = f"no exit file appeared within {format_duration(grace_s)}"
    if traces.removed:
        return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.FOLDER_REMOVED)
    if job is None:
        reason = (
            f"Slurm no longer knows the job, and {waited if traces.ended is None else 'it got a signal to stop from an unknown sender'}"
        )
        return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=reason)
    said = f'; Slurm: "{traces.words}"' if traces.words else ""
    if traces.begun:
        killed = "the wrapper was killed, by the script, by another process, or because memory was short"
        reason = f"Slurm reports {job.state} (job {job.id}), and {waited}: {killed}"
        return Outcome(False, cause=Cause.USER, reason=reason + said)
    reason = f"Slurm reports {job.state} (job {job.id}), but the script never started: can the nodes see {traces.folder}?"
    return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=reason + said)


# == Slurm ==  One query covers all jobs. The exit file outranks Slurm's report, and jobs are found by name, never by id alone.


class SlurmExecutor:
    """Runs payloads with sbatch, squeue, sacct and scancel. A handle is Slurm's id; jobs are found by their name.

    slurmctld may lose accepted jobs and reuse their ids, so an id alone is never trusted or cancelled.
    """

    is_batch = True

    def __init__(self, data: DataFolder, config: Config) -> None:
        """Raises ConfigError if sbatch cannot handle the path of the data folder."""
        if "\\" in str(data.path):
            raise ConfigError(f"DATA_PATH is {str(data.path)!r}: Slurm does not keep backslashes; give a folder without one")
        self.data, self.config = data, config
        self.wrapper = data.path / "wrapper.sh"
        write_atomic(self.wrapper, wrapper_text(data, first="" if fits_one(config.pass_env)("SLURM_JWT") else WITHOUT_JWT))
        kept = {name: text for name, text in passed_on(os.environ, config.pass_env).items() if not SLURM_OWN_NAMES.match(name)}
        login = {name: os.environ[name] for name in ("SLURM_JWT",) if name in os.environ}  # only for Slurm's commands
        self.inherited = {**kept, **login, "SLURM_TIME_FORMAT": "standard"}
        self.lock = threading.Lock()
        self.known: dict[str, SlurmJob] = {}  # by name, as of the last query
        self.looked_at = float("-inf")  # monotonic
        self.watched: dict[str, Job] = {}  # by mark
        self.claimed: set[str] = set()  # marks of attempts whose wrapper had started before the last query
        self.handed_at: dict[str, float] = {}  # by mark, monotonic
        self.unsure: dict[str, float] = {}  # by mark, monotonic: sbatch got no answer
        self.missed: dict[str, float] = {}  # by mark, monotonic: since when it has been over without an exit file
        self.leaving: dict[str, float] = {}  # by mark, monotonic: when its exit file was seen; Slurm should end the job soon
        self.strange: set[str] = set()  # unknown states that were logged
        self.accounting = True
        self.outage = Backoff(Clock())

    # -- commands --

    def command(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """Return what a command of Slurm prints. Raises BackendUnavailable, and for sbatch SubmitRefused or CannotRun."""
        # timeout(1) still works if joborch is killed.
        limited = with_first_file_limit(["timeout", "-k", "5", f"{SLURM_COMMAND_S:g}", *words])
        try:
            done = subprocess.run(
                limited,
                env=dict(environment or self.inherited),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SLURM_COMMAND_S + 20,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BackendUnavailable(f"{words[0]} did not answer") from None
        except OSError as error:
            raise BackendUnavailable(f"{words[0]} cannot be run by timeout(1): {os.strerror(error.errno or 0)}") from error
        if done.returncode in (124, 137):
            raise BackendUnavailable(f"{words[0]} did not answer within {format_duration(SLURM_COMMAND_S)}")
        if done.returncode == 127:
            raise BackendUnavailable(f"there is no {words[0]} in PATH: is Slurm installed here?")
        if done.returncode:
            raise slurm_error(words[0], done.stderr.decode("utf-8", "replace"))
        return done.stdout.decode("utf-8", "replace")

    def away(self, error: BackendUnavailable) -> None:
        """Note that Slurm does not answer. It is asked again soon: /health must not show for long what is over."""
        if self.outage.failed(error, LOOK_AGAIN_S):
            log.warning("Slurm: %s", error)

    def back(self) -> None:
        """Note that Slurm answers."""
        if self.outage.reason:
            log.info("Slurm answers again after %s", format_duration(max(0.0, time.time() - self.outage.since)))
        self.outage.worked()

    def problem(self) -> str:
        trouble, since = self.outage.reason, time.strftime("%H:%M:%S", time.localtime(self.outage.since))
        return f"Slurm: {trouble} (since {since})" if trouble else ""

    def look(self, max_age_s: float) -> bool:
        """Query all of joborch's jobs at once, unless that was just done. Return True if the data is that recent."""
        with self.lock:
            now = time.monotonic()
            if now - self.looked_at <= max_age_s:
                return True
            if self.outage.waits():
                return False
            claimed = {job.mark for job in list(self.watched.values()) if read_claim(self.data.job(job.mark), job.attempt) is not None}
            try:
                known = self.ask()
            except BackendUnavailable as error:
                self.away(error)
                return False
            self.known, self.looked_at, self.claimed = known, now, claimed
            self.back()
            return True

    def ask(self) -> dict[str, SlurmJob]:
        """Return joborch's jobs in Slurm by name: from one squeue, and one sacct if squeue no longer knows some of them."""
        said = self.command("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", f"--Format={squeue_format()}")
        try:
            known = parse_squeue(said)
        except ValueError as error:
            raise BackendUnavailable(f"squeue prints an invalid answer: {error}") from error
        missing = [job.handle for mark, job in list(self.watched.items()) if slurm_name(mark) not in known and (job.handle or "0") != "0"]
        if missing and self.accounting:
            known = {**self.accounted(cast("list[str]", missing)), **known}
        return known

    def accounted(self, ids: Sequence[str]) -> dict[str, SlurmJob]:
        """Return these jobs by name from Slurm's accounting; empty if there is no accounting."""
        try:
            fields = "--format=JobIDRaw,State,Submit,JobName"
            return parse_sacct(self.command("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(ids)}", fields))
        except BackendUnavailable as error:
            if "disabled" in str(error) or "there is no sacct" in str(error):
                self.accounting = False
                log.info("Slurm has no accounting here (%s): jobs that it has forgotten are judged only by exit files", error)
            else:
                log.debug("%s", error)
            return {}

    # -- the executor's interface --

    def start(self, job: Job) -> str:
        folder = self.data.job(job.mark)
        crash_point("run.prepared")
        limit = [f"{job.timeout:.3f}", f"{self.config.kill_grace_s:.3f}"] if job.timeout else []
        words = ["sbatch", *sbatch_options(job, self.config.batch_options(job.service), folder), str(self.wrapper)]
        environment = node_environment(job, self.inherited, self.config.batch_options(job.service).prelude)
        try:
            said = self.command(*words, str(folder), str(job.attempt), *limit, environment=environment).strip().partition(";")[0]
            if not said.isdigit():
                raise BackendUnavailable(f"sbatch prints an invalid answer: {one_line(said, 80)}")
        except CannotRun:
            self.forget([job])
            raise
        except SubmitRefused as error:
            if job.memory and SLURM_TWO_MEMORIES in str(error):
                named = f"SERVICE_{(job.service or '').upper()}_SLURM_ARGS sets another one, so upload it without `memory`"
                raise CannotRun(f"Slurm refuses it: {str(error).partition(': ')[2]} {named}") from error
            raise
        except BackendUnavailable as error:
            if "unable to contact" not in str(error).lower():
                self.unsure[job.mark] = time.monotonic()
            self.away(error)
            raise
        crash_point("slurm.submitted")
        self.handed_at[job.mark] = time.monotonic()
        return said

    def find(self, jobs: Sequence[Job]) -> dict[str, str]:
        self.watched.update((job.mark, job) for job in jobs)
        if not self.look(0.0):
            raise BackendUnavailable(self.problem() or "Slurm was queried a moment ago: try again")
        handles = {}
        for job in jobs:
            known = self.known.get(slurm_name(job.mark))
            if known is not None or read_claim(self.data.job(job.mark), job.attempt) is not None:
                handles[job.mark] = known.id if known else "0"
            elif time.monotonic() - self.unsure.get(job.mark, float("-inf")) < SLURM_UNSURE_S:
                handles[job.mark] = ""  # slurmctld may still accept it
        missing = {job.mark for job in jobs} - set(handles)
        under_way = missing & marked_below(self.data.jobs) if missing else set()  # an sbatch that a crash interrupted
        return {**handles, **dict.fromkeys(under_way, "")}

    def poll(self, jobs: Sequence[Job]) -> dict[int, Outcome]:
        outcomes = {job.id: read_exit(self.data.job(job.mark)) for job in jobs}
        unclear = [job for job in jobs if (found := outcomes[job.id]) is None or found.told or found.exit_status == KILLED_STATUS]
        self.watched.update((job.mark, job) for job in unclear)
        away = bool(self.outage.reason)  # if nothing runs, too, joborch must notice that Slurm is away, or back
        idle_s = max(IDLE_LOOK_S, self.config.batch_interval_s)
        if unclear or away or self.leaving or time.monotonic() - self.looked_at > idle_s:
            self.look(min(LOOK_AGAIN_S, self.config.batch_interval_s) if away else self.config.batch_interval_s)
            self.end_what_lingers()
        claims = {job.id: read_claim(self.data.job(job.mark), job.attempt) for job in unclear}
        judged = {job.id: self.outcome(job, outcomes[job.id], claims[job.id]) for job in unclear}
        given_up = [job for job in unclear if judged[job.id].cause is Cause.INFRASTRUCTURE]
        for job in given_up:
            if not self.fence(job) and claims[job.id] is None:
                judged[job.id] = Outcome(True)  # it has just started
        if given_up:
            self.scancel([job.mark for job in given_up if not judged[job.id].alive])
        ended = [job for job in jobs if not (judged.get(job.id) or cast(Outcome, outcomes[job.id])).alive]
        self.forget(ended)
        self.leaving.update((job.mark, time.monotonic()) for job in ended if job.mark not in self.leaving)
        return {**cast("dict[int, Outcome]", outcomes), **judged}

    def end_what_lingers(self) -> None:
        """Cancel jobs that Slurm still has some time after their exit file: the script forged it, or Slurm would rerun the job."""
        looked = {mark for mark, seen in list(self.leaving.items()) if seen + SLURM_LINGER_S < self.looked_at}
        active = [mark for mark in looked if self.known.get(slurm_name(mark), SlurmJob("", "COMPLETED", 0, "", "")).state not in SLURM_ENDS]
        if active:
            log.warning("Slurm: %d jobs still run although their exit file was written: they are cancelled", len(active))
            self.scancel(active)
        for mark in looked:
            self.leaving.pop(mark, None)

    def forget(self, jobs: Iterable[Job]) -> None:
        """Forget attempts that are over."""
        tables: tuple[dict[str, Any], ...] = (self.watched, self.handed_at, self.unsure, self.missed)
        for job in jobs:
            for table in tables:
                table.pop(job.mark, None)

    def outcome(self, job: Job, ended: Outcome | None, claim: str | None) -> Outcome:
        """Judge an attempt without a clear exit file; `claim` is its wrapper's claim as just read."""
        known, folder = self.known.get(slurm_name(job.mark)), self.data.job(job.mark)
        if known is None and self.looked_at <= self.handed_at.get(job.mark, float("-inf")):
            return Outcome(True, waits="" if claim is not None else f"Slurm: submitted (job {job.handle})")
        if known is not None and known.state not in self.strange | SLURM_WAITS | SLURM_RUNS | set(SLURM_ENDS):
            self.strange.add(known.state)
            log.warning("Slurm reports the unknown state %s for job %s: it counts as running", known.state, known.id)
        traces = SlurmTraces(ended, claim is not None, "ready" in (claim or ""), job.mark in self.claimed, folder)
        if known is not None and known.state not in SLURM_ENDS:
            self.missed.pop(job.mark, None)
        else:
            traces = self.traced(job, traces)
        return slurm_outcome(known, traces, self.config.vanish_grace_s)

    def traced(self, job: Job, traces: SlurmTraces) -> SlurmTraces:
        """Add the traces that matter only when an attempt is over, such as the last line of its log."""
        now, folder = time.monotonic(), traces.folder
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes a network file system refresh its cache (nfs(5): attribute caching)
        again, words = (folder / f"again.{job.attempt}").exists(), last_line(folder / f"slurm.{job.attempt}")
        missed_s = now - self.missed.setdefault(job.mark, now)
        return dataclasses.replace(traces, again=again, words=words, missed_s=missed_s, removed=not folder.is_dir())

    def fence(self, job: Job) -> bool:
        """Take the claim of an attempt. Return True if it had not started: then it never will, whatever Slurm does."""
        try:
            os.close(os.open(self.data.job(job.mark) / f"started.{job.attempt}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            return True
        except FileNotFoundError:
            return True  # without its folder, the wrapper exits at once
        except OSError:
            return False

    def scancel(self, marks: Sequence[str]) -> None:
        """Ask Slurm to cancel attempts by name: an old id may belong to another job now, a name never."""
        for at in range(0, len(marks), 100):
            names = ",".join(map(slurm_name, marks[at : at + 100]))
            try:
                self.command("scancel", f"--user={os.getuid()}", f"--name={names}")
            except BackendUnavailable as error:
                log.warning("Slurm: %s", error)

    def cancel(self, job: Job) -> None:
        self.watched.setdefault(job.mark, job)
        never = self.fence(job)
        if not (never and self.outage.reason):
            self.scancel([job.mark])
        asked = time.monotonic()
        while not (never and self.outage.reason) and not self.is_over(job, asked):
            if time.monotonic() > asked + self.config.kill_grace_s:
                raise StillRunning(f"payload {job.id}: {self.problem() or 'Slurm is cancelling it'}")
            time.sleep(SLURM_LOOK_S)
        self.forget([job])

    def is_over(self, job: Job, asked: float) -> bool:
        """Tell whether a query after `asked` (monotonic) showed that no process of an attempt runs."""
        if not self.look(SLURM_LOOK_S) or self.looked_at < asked:
            return False
        known = self.known.get(slurm_name(job.mark))
        return known is None or known.state in SLURM_ENDS

    def collect(self, job: Job) -> None:
        """Do nothing: the nodes share the folder's file system, so the outputs are there."""

    def end_orphans(self, marks: Sequence[str]) -> None:
        self.scancel(marks)

    def examine(self) -> Iterator[Finding]:
        try:
            yield Finding(True, f"{self.command('sbatch', '--version').strip()} is installed")
            parse_squeue(self.command("squeue", "--noheader", f"--user={os.getuid()}", f"--Format={squeue_format()}"))
            yield Finding(True, "slurmctld answers squeue")
        except (BackendUnavailable, ValueError) as error:
            missing = "there is no" in str(error) or "configuration source" in str(error)
            remedy = "load Slurm's module, or set PATH and SLURM_CONF" if missing else "is slurmctld up? Ask the cluster's administrators"
            yield Finding(False, f"{error}; {remedy}")
            return
        for service in sorted(self.config.batch) or [""]:
            yield self.examine_service(service)
        self.accounted(["1"])
        yield Finding(
            True, f"Slurm's accounting is {'on' if self.accounting else 'off: jobs that Slurm has forgotten are judged by exit files'}"
        )

    def examine_service(self, service: str) -> Finding:
        """Ask sbatch whether it would accept a job of a service, without submitting one."""
        name = f"jobs of {service}" if service else "jobs"
        wishes = self.config.batch_options(service)
        options = {key: value for key, value in service_options(wishes).items() if value}
        try:
            words = [f"--{key}={value}" for key, value in options.items()] + list(wishes.slurm_args)
            self.command("sbatch", "--test-only", *words, "--wrap=true")
        except JoborchError as error:
            named = [f"SERVICE_{service.upper()}_SLURM_{key.upper()}" for key in (*options, *(["args"] if wishes.slurm_args else []))]
            return Finding(False, f"sbatch would refuse {name}: {error}; check {', '.join(named) or 'SBATCH_... variables'}")
        return Finding(True, f"sbatch would accept {name}" + "".join(f", {key} {value}" for key, value in options.items()))
