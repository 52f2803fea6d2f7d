"""The executor `local`: starts, watches and kills payloads on this machine.

1. Local executor
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional, cast

from joborch_base.cgroups import Groups
from joborch_base.data_folder import STOP_NOTE, DataFolder
from joborch_base.executors import (
    CHILDREN_FILE,
    Executor,
    Outcome,
    Process,
    Sandbox,
    bears_mark,
    become_subreaper,
    belonging,
    boot_id,
    first_file_limit_text,
    handicap,
    is_of_sandbox,
    is_untouched,
    make_scratch,
    marked_below,
    passed_on,
    payload_environment,
    process_start,
    read_claim,
    read_exit,
    scratch_bases,
    script_uid,
    signal_all,
    tree_of,
    used_by_payload,
    wrapper_text,
)
from joborch_base.files import is_full, open_regular, state_below, write_atomic
from joborch_base.processes import HOST_NETWORK, leave_keyring, note_host_network, read_proc
from joborch_base.settings import BatchOptions, Config
from joborch_base.states import LIMIT_NOTE, Cause, Job, Reason
from joborch_base.usage import PayloadLimits, Usage, file_limit_text, process_limit_text
from joborch_base.vocabulary import KIB, MIB, PLUGINS, ConfigError, Finding, StillRunning, crash_point, load_plugin, log, one_line, plural

# == 1. Local executor ==  Starts, watches and kills payloads on this machine: all processes of a payload, and no others.


class Engines:
    """The container engines of this machine. Their containers are not children of the payload and outlive its processes."""

    NAMES = ("docker", "podman")
    CALL_S, STOP_S = 5.0, 2  # limit of a call, plus the time it asks for; from TERM to KILL in a container
    AWAY_S = 60.0  # how long an engine that failed is not called again

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment, path = environment, environment.get("PATH")
        self.engines = [found for found in (shutil.which(name, path=path) for name in self.NAMES) if found]
        self.away_until: dict[str, float] = {}  # monotonic, by engine

    def stop_mounting(self, folder: Path) -> None:
        """Stop the containers that mount a payload's folder or something in it."""
        for engine in self.engines:
            if self.away_until.get(engine, 0.0) > time.monotonic():
                continue
            try:
                self.stop_in(engine, folder)
            except (OSError, subprocess.SubprocessError) as error:
                self.away_until[engine] = time.monotonic() + self.AWAY_S
                words = getattr(error, "stderr", None) or str(error).encode()
                log.info("%s cannot list containers of payloads: %s", engine, one_line(words.decode("utf-8", "replace"), 200))

    def stop_in(self, engine: str, folder: Path) -> None:
        """Stop those of one engine. Raises OSError or SubprocessError."""
        running = self.call(engine, "ps", "--quiet", "--no-trunc").split()
        if not running:
            return
        places = {str(folder), os.path.realpath(folder)}
        chosen = []
        for line in self.call(engine, "inspect", "--format", "{{.Id}}{{range .Mounts}}|{{.Source}}{{end}}", *running).splitlines():
            name, *sources = line.split("|")
            if any(source == place or source.startswith(f"{place}/") for source in sources for place in places):
                chosen.append(name)
        if chosen:
            log.info("containers that mount %s are stopped by %s: %s", folder.name, engine, ", ".join(chosen))
            self.call(engine, "stop", "-t", str(self.STOP_S), *chosen, more_s=self.STOP_S * len(chosen))

    def call(self, engine: str, *words: str, more_s: float = 0.0) -> str:
        done = subprocess.run(
            [engine, *words],
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=self.CALL_S + more_s,
            check=True,
        )
        return done.stdout.decode("utf-8", "replace")


NO_CORE = "ulimit -Sc 0; "  # else a crash leaves all memory of the script in its result; it may raise this limit
REST_S, TERM_S = 2.0, 0.5  # processes that a script left may exit by themselves, then get TERM, then KILL; the wrapper does the same
STOP_STATUSES = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)}
USED_KEPT = 1000  # so many ended payloads, at most, have their use in memory
STOP_NEAR_S = 5.0  # between the end of a script and of its client, if one signal stopped both


class Child:
    """A process that this one has started."""

    def __init__(self, pid: int) -> None:
        self.pid, self.lock, self.ended, self.job_id = pid, threading.Lock(), False, 0
        self.mark, self.used = "", cast(Optional[resource.struct_rusage], None)
        self.is_awaited = False  # a thread is in `LocalExecutor.wait` for it

    def has_ended(self) -> bool:
        """Tell whether it has ended, and reap it then. Only a known id: waitpid(-1) would steal those of other threads."""
        with self.lock:  # once it is reaped, its id may be another child's
            if not self.ended:
                try:
                    pid, _, used = os.wait4(self.pid, os.WNOHANG)
                    self.ended, self.used = pid != 0, used
                except ChildProcessError:
                    self.ended = True
            return self.ended


def start_session(command: list[str | bytes], environment: Mapping[str, str]) -> Child:
    """Start a program by its path, in a session of its own and without streams. Raises OSError.

    posix_spawn(3) takes a third of the CPU of subprocess.Popen, and a sixth of the time. Like Popen, it undoes Python's ignoring of
    two signals. All other descriptors are close-on-exec (close_at_exec).
    """
    streams = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    try:
        signals = (signal.SIGPIPE, signal.SIGXFSZ)
        return Child(os.posix_spawn(command[0], command, environment, file_actions=streams, setsid=True, setsigdef=signals))
    except NotImplementedError:  # this Python was built for a C library without it (glibc before 2.26)
        null = subprocess.DEVNULL
        started = subprocess.Popen(command, env=environment, stdin=null, stdout=null, stderr=null, close_fds=False, start_new_session=True)
        started.returncode = 0  # it must not be reaped by Popen
        return Child(started.pid)


def start_without_keys(command: list[str | bytes], environment: Mapping[str, str]) -> Child:
    """Do what `start_session` does, without this client's keys. In a thread of its own, because no thread gets its keyring back."""
    with ThreadPoolExecutor(1, initializer=leave_keyring) as thread:
        return thread.submit(start_session, command, environment).result()


GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
GPU_NOTE, CORE_NOTE = "gpus", "cores"  # files in a payload's folder with the ids of its GPUs, and of the cores that it has to itself
NVIDIA_SMI_S = 30.0  # without its daemon, it may load the driver first


def find_gpus() -> tuple[str, ...]:
    """Return the GPUs that `nvidia-smi -L` lists, by their numbers."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ()
    try:
        done = subprocess.run([program, "-L"], stdin=subprocess.DEVNULL, capture_output=True, timeout=NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no GPUs are offered, because nvidia-smi failed: %s; set JOBORCH_GPUS", one_line(str(error), 200))
        return ()
    return tuple(re.findall(r"^GPU ([0-9]{1,4}):", done.stdout.decode("utf-8", "replace"), re.MULTILINE))


def noted(folder: Path, name: str) -> tuple[str, ...]:
    """Return the ids in a note of a payload that was started before: GPU_NOTE or CORE_NOTE."""
    try:
        with open_regular(folder, name) as file:
            return tuple(filter(None, file.read(4096).decode("ascii", "replace").split(",")))
    except OSError:
        return ()  # it has none


@contextlib.contextmanager
def on_cores(cores: Collection[str]) -> Iterator[None]:
    """Meanwhile, let this thread, and the processes that it starts, run on these cores alone; if there are none, wherever it may."""
    before = os.sched_getaffinity(0)
    try:
        with contextlib.suppress(OSError):  # they were taken from this client a moment ago: then its script is not pinned
            os.sched_setaffinity(0, set(map(int, cores)) or before)
        yield
    finally:
        with contextlib.suppress(OSError):  # all were taken: then the kernel has chosen others
            os.sched_setaffinity(0, before)


@dataclass
class Attempt:
    """What this process knows of an attempt that has not ended."""

    is_seen: bool = False  # it saw the attempt running
    is_own: bool = False  # it started the attempt: its orphans become children of this process
    is_untidy: bool = False  # the attempt left processes running, which were killed
    is_cancelled: bool = False  # it is being killed now
    uid: int = 0  # the user id of its script alone; 0 if that is the client's
    gpus: tuple[str, ...] = ()  # the ids of its GPUs
    cores: tuple[str, ...] = ()  # those that it is pinned to
    rests_since: float | None = None  # monotonic: since when the processes that it left may exit by themselves


class LocalExecutor:
    """Runs payloads as processes of this machine. A handle is `pid start boot`: process ids are reused, boot ids are not."""

    is_batch = False

    def __init__(
        self,
        data: DataFolder,
        kill_grace_s: float,
        pass_env: Sequence[str] = (),
        options: Callable[[str | None], BatchOptions] = lambda service: BatchOptions(),
        sandbox: Sandbox | None = None,
        max_processes: int = 0,
        max_work_bytes: int = 0,
        max_cpu_time_s: float = 0.0,
        gpus: Sequence[str] | None = None,
        pins_cpus: bool = False,
    ) -> None:
        """`gpus` are the ids of the GPUs that it gives to payloads; None: it leaves it to scripts which they use."""
        self.data, self.kill_grace_s, self.options, self.sandbox = data, kill_grace_s, options, sandbox
        self.scratch_bases = scratch_bases(os.environ)
        self.boot, self.inherited = boot_id(), passed_on(os.environ, pass_env)
        self.children: dict[int, Child] = {}
        self.starting = threading.Lock()  # held until a new child is among the children: else it might be taken for an orphan
        self.ended: set[int] = set()  # ids of payloads whose wrapper has ended, until `poll` has judged them
        self.attempts = defaultdict[str, Attempt](Attempt)  # by mark
        self.reaps_orphans, self.engines = become_subreaper(), Engines(self.inherited)
        self.bash = shutil.which("bash", path=self.inherited.get("PATH")) or "/bin/bash"
        self.inside = sandbox.inside if sandbox else ""
        self.begin = start_without_keys if sandbox and sandbox.isolation in ("full", "user") else start_session
        self.usage = Usage(data.jobs, max_processes, max_work_bytes, max_cpu_time_s, bool(self.inside))
        self.marked = dict([HOST_NETWORK]) if sandbox and sandbox.has_host_network else {}  # what shows a server whose calls these are
        self.groups = Groups()
        before, process_limit = self.groups.entry_text() + handicap() + NO_CORE + file_limit_text(max_work_bytes), ""
        if self.inside and sandbox:
            process_limit = process_limit_text(max_processes, sandbox.isolation)
        self.wrapper = wrapper_text(data, "", before, first_file_limit_text(), True, self.inside, process_limit)
        self.uids, self.gpus, self.taking = sandbox.uids if sandbox else range(0), gpus, threading.Lock()
        self.pins_cpus = pins_cpus
        for mark in marked_below(data.jobs) if self.uids or gpus or pins_cpus else ():  # an earlier process of this client started them
            folder = data.job(mark)
            self.attempts[mark] = Attempt(uid=script_uid(folder) or 0, gpus=noted(folder, GPU_NOTE), cores=noted(folder, CORE_NOTE))
        self.ended_used: dict[str, tuple[int, float | None]] = {}  # by mark: see `used`
        self.unseen = False  # one that nobody waited for has ended since `is_end_awaited` was asked

    def start(self, job: Job) -> str:
        folder = self.data.job(job.mark)
        environment = payload_environment(job, folder, self.inherited, self.options(job.service).prelude)
        if self.marked:
            note_host_network()
        environment.update(self.marked)
        environment["TMPDIR"] = make_scratch(folder, self.scratch_bases)
        # The wrapper's text, not its path, so nobody can replace the file.
        command: list[str | bytes] = [self.bash, "-c", self.wrapper, "joborch-wrapper", str(folder), str(job.attempt)]
        try:
            attempt = self.take(job, folder)
            ids: Sequence[str] | None = attempt.gpus if self.gpus is not None else None
            if self.sandbox:
                if attempt.uid:
                    self.sandbox.give(folder, environment["TMPDIR"], attempt.uid)
                devices, ids = self.sandbox.gpus(ids)
                command += ["", "", str(attempt.uid), devices]
            if self.gpus is not None:
                environment.update(dict.fromkeys(GPU_VARIABLES, ",".join(ids or ())))
            self.groups.make(job.mark, (job.memory or 0) * MIB, self.usage.most_inside(), job.cpus)
            crash_point("run.prepared")
            with self.starting, on_cores(attempt.cores) if attempt.cores else contextlib.nullcontext():
                child = self.begin(command, environment)
                child.job_id, child.mark, self.children[child.pid] = job.id, job.mark, child
        except OSError:
            self.attempts.pop(job.mark, None)
            self.groups.remove_group(job.mark)
            raise
        attempt.is_seen = attempt.is_own = True
        return f"{child.pid} {process_start(child.pid) or 0} {self.boot}"

    def take(self, job: Job, folder: Path) -> Attempt:
        """Take for an attempt what no other has while it runs: a user id, its GPUs and its cores. Later processes find the latter noted.

        Raises OSError if there is not enough, as while payloads do not end after KILL. Cores are not worth that: without, it has all.
        """
        with self.taking:
            others = [attempt for mark, attempt in list(self.attempts.items()) if mark != job.mark]
            uids, gpus = {each.uid for each in others}, {gpu for each in others for gpu in each.gpus}
            uid, free = next((uid for uid in self.uids if uid not in uids), 0), [gpu for gpu in self.gpus or () if gpu not in gpus]
            if (self.uids and not uid) or len(free) < job.gpus:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            taken = {core for each in others for core in each.cores}
            cores = [str(core) for core in sorted(os.sched_getaffinity(0)) if str(core) not in taken] if self.pins_cpus else []
            cores = cores[: job.cpus] if len(cores) >= job.cpus else []
            attempt = self.attempts[job.mark] = Attempt(uid=uid, gpus=tuple(free[: job.gpus]), cores=tuple(cores))
        for name, ids in ((GPU_NOTE, attempt.gpus), (CORE_NOTE, attempt.cores)):
            if ids:
                (folder / name).write_text(",".join(ids), encoding="ascii")
        return attempt

    def over_limits(self, memory: Mapping[str, int | None]) -> list[str]:
        """Return the marks of payloads that use too much. `memory` has the MiB that each payload may use, by mark; None: no limit.

        What they use too much of is written to LIMIT_NOTE in their folders first, because the kill that follows reads it there.
        """
        if not self.usage.is_due(any(memory.values())):
            return []
        payloads = []
        for mark, mib in memory.items():
            first = (read_claim(self.data.job(mark), int(mark.rpartition(".")[2])) or "").split("\n")[0]
            wrapper = int(first) if re.fullmatch("[0-9]{1,10}", first) else 0
            cpu_s = self.groups.cpu_s(mark) if self.usage.max_cpu_time_s else None
            payloads.append(PayloadLimits(mark, wrapper, mib and mib * MIB, cpu_s))
        over = self.usage.look(payloads)
        over.update({mark: reason for mark in memory if (reason := self.groups.over(mark, self.usage.max_processes))})
        for mark, reason in over.items():
            with contextlib.suppress(OSError):  # on a full disk the reason has no figures
                write_atomic(self.data.job(mark) / LIMIT_NOTE, reason.encode(), follow=False)
        return list(over)

    def wait(self, job: Job, patience_s: float) -> bool:
        """Wait for the end of a payload that this process started; tell whether it has ended. Kernels before 5.3 cannot say."""
        pid = int((job.handle or "0").split(" ")[0])
        child = self.children.get(pid)
        if child is None:
            return pid > 0  # else it could not be started
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        except (OSError, AttributeError):
            return False
        child.is_awaited = True
        try:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(patience_s * 1000))
        finally:
            child.is_awaited = False
            os.close(descriptor)

    def is_child(self, job: Job) -> bool:
        """Tell whether a payload's wrapper is a child of this process that has not ended, or has ended and is in `ended`."""
        return job.id in self.ended or int((job.handle or "0").split(" ")[0]) in self.children

    def is_end_awaited(self) -> bool:
        """Tell whether somebody waits for each payload that this process has started, so that the end of a child is no news.

        Asked after each end of a child: whichever thread has taken in that of another payload meanwhile, it is news.
        """
        unseen, self.unseen = self.unseen, False
        return not unseen and all(child.is_awaited for child in list(self.children.values()))

    def find(self, jobs: Sequence[Job]) -> dict[str, str]:
        handles = {}
        for job in jobs:
            pid = self.claimed_pid(job)
            if pid is not None:
                ours = pid and bears_mark(pid, job.mark)
                handles[job.mark] = f"{pid} {process_start(pid) or 0} {self.boot}" if ours else f"0 0 {self.boot}"
        return handles

    def claimed_pid(self, job: Job) -> int | None:
        """Return the process id in the wrapper's claim; 0 if it has none, None if there is no claim."""
        said = read_claim(self.data.job(job.mark), job.attempt)
        first = (said or "").split("\n")[0]
        return None if said is None else int(first) if re.fullmatch("[0-9]{1,10}", first) else 0

    def poll(self, jobs: Sequence[Job]) -> dict[int, Outcome]:
        """Return the outcomes. Processes that an ended payload left are killed first; until then it counts as alive."""
        orphans = self.reap()
        outcomes = {job.id: self.outcome(job) for job in jobs}
        ended = [job for job in jobs if not outcomes[job.id].alive]
        for job in self.left_running(ended, orphans):
            outcomes[job.id] = Outcome(True)
        for job in ended:
            if not outcomes[job.id].alive:
                self.ended.discard(job.id)
                attempt = self.attempts.pop(job.mark, Attempt())
                self.drop_group(job.mark)
                left = outcomes[job.id].children_left or attempt.is_untidy
                outcomes[job.id] = dataclasses.replace(outcomes[job.id], children_left=left)
                if outcomes[job.id].children_left and self.engines.engines:
                    place = self.data.job(job.mark)
                    threading.Thread(target=self.engines.stop_mounting, args=(place,), name=f"engines-{job.id}", daemon=True).start()
        return outcomes

    def reap(self) -> bool:
        """Reap children and orphans that have ended. Return whether other orphans are alive.

        The main thread starts only payloads, so any other child of it was orphaned by one.
        """
        for child in self.children_that_ended():
            self.unseen = self.unseen or not child.is_awaited  # first: see is_end_awaited
            self.ended.add(child.job_id)
            self.keep_used(child)
            if self.children.get(child.pid) is child:  # another thread may have been quicker
                self.children.pop(child.pid, None)
        if not self.reaps_orphans:
            return True  # there may be some
        alive = 0
        with self.starting:
            for pid in map(int, read_proc(CHILDREN_FILE).split()):
                if pid not in self.children:
                    with contextlib.suppress(ChildProcessError):  # another thread was quicker
                        alive += os.waitpid(pid, os.WNOHANG) == (0, 0)
        return alive > 0

    def children_that_ended(self) -> list[Child]:
        """Return the children that have ended. The kernel names one after the other; if it names a stranger, all are asked."""
        with contextlib.suppress(ChildProcessError):  # there is none
            while said := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):  # it stays a zombie until `has_ended`
                named = self.children.get(said.si_pid)
                for child in [named] if named else list(self.children.values()):
                    child.has_ended()
                if named is None:
                    break
        return [child for child in list(self.children.values()) if child.ended]

    def keep_used(self, child: Child) -> None:
        """Keep what an ended payload has used, for a while: its end may be stored later."""
        if child.used is not None and child.mark not in self.ended_used:
            cpu_s = child.used.ru_utime + child.used.ru_stime
            self.ended_used[child.mark] = (child.used.ru_maxrss * KIB, round(cpu_s, 3))
            while len(self.ended_used) > USED_KEPT:
                self.ended_used.pop(next(iter(self.ended_used)), None)

    def drop_group(self, mark: str) -> None:
        """Remove the control group of a payload that is over; what it counted is more exact than what is known otherwise."""
        peak, cpu_s = self.groups.remove_group(mark)
        if cpu_s is not None:
            self.ended_used[mark] = (peak or self.ended_used.get(mark, (0, None))[0], round(cpu_s, 3))

    def used(self, job: Job) -> tuple[int | None, float | None]:
        """Return peak memory (bytes) and CPU time (seconds) of a payload that is over, or None for what is not known.

        Memory is that of its largest process or, if its memory is limited, the largest sum that was seen of all its processes. Of
        a payload that an earlier process of this client started, or that was asked about before, only the CPU time is known, unless
        its memory is limited.
        """
        memory, cpu_s = self.ended_used.pop(job.mark, (0, None))
        peak = max(memory, self.usage.peaks.get(job.mark, 0))
        return peak or None, used_by_payload(self.data.job(job.mark))[1] if cpu_s is None else cpu_s

    def cpu_s_of(self, job: Job) -> float | None:
        """Return the CPU time of a payload whose wrapper has ended, in seconds; None if it is not known, or not limited."""
        if not self.usage.max_cpu_time_s:
            return None
        kept = self.ended_used.get(job.mark, (0, None))[1]
        return self.groups.cpu_s(job.mark) or kept or used_by_payload(self.data.job(job.mark))[1]

    def left_running(self, ended: Sequence[Job], orphans: bool) -> list[Job]:
        """Kill processes that these payloads left running. Return the payloads that had such processes.

        Processes in the script's session may exit by themselves for REST_S, then get TERM: they may still write output.
        """
        suspects = [job for job in ended if orphans or not self.attempts[job.mark].is_own or self.groups.is_populated(job.mark)]
        marked = marked_below(self.data.jobs) if suspects else set()
        left = []
        for job in suspects:
            wrapper = int((job.handle or "0").split(" ")[0])  # it may still be exiting
            processes = tree_of(job, self.data.job(job.mark), 0) if job.mark in marked else []
            processes = [process for process in processes if process.pid != wrapper]
            if not processes and not self.groups.kill(job.mark):
                continue
            left.append(job)
            attempt, now = self.attempts[job.mark], time.monotonic()
            attempt.rests_since = now if attempt.rests_since is None else attempt.rests_since
            rested_s = now - attempt.rests_since
            if rested_s < REST_S and any(process.session == wrapper for process in processes):
                continue
            attempt.is_untidy = True
            if rested_s < REST_S + TERM_S and any(process.session == wrapper for process in processes):
                signal_all(processes, signal.SIGTERM)
                continue
            signal_all(processes, signal.SIGSTOP)  # stopped processes cannot fork faster than we look
            signal_all(processes, signal.SIGKILL)
        return left

    def outcome(self, job: Job) -> Outcome:
        pid, start, boot = (job.handle or f"0 0 {self.boot}").split(" ")
        if boot != self.boot:  # an exit file proves nothing: the script's files may not have reached the disk
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.REBOOTED)
        if int(pid) in self.children or (int(pid) and process_start(int(pid)) == start):
            self.attempts[job.mark].is_seen = True
            return Outcome(True)  # whatever the exit file says: the script may have forged it
        return self.outcome_without_wrapper(job, self.data.job(job.mark))

    def outcome_without_wrapper(self, job: Job, folder: Path) -> Outcome:
        """Judge a payload if the wrapper in its handle is gone."""
        claimed = self.claimed_pid(job)
        # The handle may name a second wrapper, which stopped because the first has the claim.
        if claimed and bears_mark(claimed, job.mark):
            return Outcome(True)
        ended = read_exit(folder)
        if ended:
            over = self.groups.over(job.mark, self.usage.max_processes) or self.usage.over_cpu_time(self.cpu_s_of(job))
            return self.stopped_by_others(job, folder, ended) or self.usage.at_end(job.mark, ended, over)
        if not folder.is_dir() or folder.is_symlink():
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.FOLDER_REMOVED)
        if "ready" not in (read_claim(folder, job.attempt) or ""):
            if job.mark in marked_below(self.data.jobs):
                return Outcome(True)  # its wrapper is about to claim it, or a process outlived the wrapper
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.DISK_FULL if is_full(folder) else Reason.NO_WRAPPER)
        if not self.attempts[job.mark].is_seen:
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.ENDED_WITH_CLIENT)
        if self.inside and is_untouched(folder):  # its script cannot have killed it
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.WRAPPER_GONE)
        return Outcome(False, cause=Cause.USER, reason=Reason.WRAPPER_KILLED)

    def stopped_by_others(self, job: Job, folder: Path, ended: Outcome) -> Outcome | None:
        """Return the outcome of a payload that was stopped from outside joborch, as by a service manager; else None.

        The exit status does not matter, not even 0: a script that handles TERM leaves an incomplete result.
        """
        alone = not ended.told
        if (alone and ended.exit_status not in STOP_STATUSES) or (folder / f"ending.{job.attempt}").exists():
            return None  # not stopped, or stopped by the client
        if alone and not self.ended_with_client(folder):
            return None  # the script sent the signal to itself
        how = Reason.STOPPED_WITH_CLIENT if alone else Reason.STOPPED_WITH_WRAPPER
        return dataclasses.replace(ended, cause=Cause.INFRASTRUCTURE, reason=how.format(status=ended.exit_status))

    def ended_with_client(self, folder: Path) -> bool:
        """Tell whether a script ended just when a client on this data folder was stopped."""
        try:
            stopped_at = os.stat(self.data.path / STOP_NOTE).st_mtime
            return abs(state_below(folder, "exit.json").st_mtime - stopped_at) <= STOP_NEAR_S
        except OSError:
            return False  # no client was ever stopped here

    def own_wrapper(self, job: Job) -> int:
        """Return the process id (and session) of an attempt's wrapper; 0 if it is unknown or another process has that id now."""
        pid, start, boot = (job.handle or f"0 0 {self.boot}").split(" ")
        if boot != self.boot:
            return 0
        if pid == "0":
            claimed = self.claimed_pid(job) or 0
            return claimed if claimed and bears_mark(claimed, job.mark) else 0
        # The kernel reuses no id while its session has members: if the leader is gone, the rest belongs to the attempt.
        return int(pid) if process_start(int(pid)) in (None, start) else 0

    def cancel(self, job: Job) -> None:
        attempt = self.attempts[job.mark]
        attempt.is_cancelled = True
        try:
            self.end_tree(job, self.data.job(job.mark), self.own_wrapper(job))
        finally:
            attempt.is_cancelled = False

    def end_tree(self, job: Job, folder: Path, pid: int) -> None:
        """Send TERM to all processes of a payload, and KILL after the grace time. Return when none is left, or raise StillRunning."""
        known = tree_of(job, folder, pid)
        # Not what isolates it: some versions of it end on TERM, and with them the script, at once.
        signal_all([process for process in known if not (self.inside and is_of_sandbox(process, pid))], signal.SIGTERM)
        deadline = time.monotonic() + self.kill_grace_s
        while time.monotonic() < deadline and (found := self.still_there(job, folder, pid, known)):
            known = found
            kills = sum(attempt.is_cancelled for attempt in list(self.attempts.values()))
            pause_s = min(0.2, 0.02 * max(1, kills))  # the more there are, the less often each of them reads all of /proc
            time.sleep(pause_s - time.monotonic() % pause_s)  # all at the same time, to share a look
        for _ in range(200):
            self.groups.kill(job.mark)
            if not self.still_there(job, folder, pid, known) and not self.still_there(job, folder, pid, known):
                self.attempts.pop(job.mark, None)
                self.drop_group(job.mark)
                self.engines.stop_mounting(folder)
                return
            # Stop them first, or they could fork faster than we look.
            known = tree_of(job, folder, pid, known)
            signal_all(known, signal.SIGSTOP)
            known = tree_of(job, folder, pid, known)
            signal_all(known, signal.SIGKILL)
            time.sleep(0.01)
        raise StillRunning(f"payload {job.id}: its processes do not end after KILL")

    def still_there(self, job: Job, folder: Path, pid: int, known: Collection[Process]) -> list[Process]:
        self.reap()
        return tree_of(job, folder, pid, known)

    def collect(self, job: Job) -> None:
        """Do nothing: the outputs are on this machine."""

    def end_orphans(self, marks: Sequence[str]) -> None:
        signal_all(belonging(set(map(os.fsencode, marks)), self.data.jobs), signal.SIGKILL)
        for mark in marks:
            self.groups.kill(mark)
            self.groups.remove_group(mark)

    def problem(self) -> str:
        return ""

    def examine(self) -> Iterator[Finding]:
        bash = shutil.which("bash")
        yield Finding(bool(bash), f"scripts are run by {bash}" if bash else "there is no bash, which runs the scripts: install it")
        if self.gpus is not None:
            yield Finding(True, f"scripts may request {plural(len(self.gpus), 'GPU', 'GPUs')}: {', '.join(self.gpus) or 'none'}")
        yield Finding(True if self.groups.parent else None, self.groups.summary())
        yield from self.sandbox.examine() if self.sandbox else ()


def run_seconds(started: float | None, ended: float, passed_s: float) -> float:
    """Return how long a script ran in seconds, by the times of its files; `passed_s` if the clock was set meanwhile."""
    return ended - started if started is not None and 0 <= ended - started <= passed_s + 1 else max(0.0, passed_s)


def make_executor(data: DataFolder, config: Config) -> Executor:
    """Return the executor of a client. Raises ConfigError if that, or JOBORCH_ISOLATION, is not possible here."""
    if config.executor == "local":
        sandbox, limits = load_plugin("sandbox")(config), (config.max_processes, config.max_work_bytes, config.max_cpu_time_s)
        if data.path == Path(config.data_path):  # else this is `doctor`, beside a client that may be running
            sandbox.hold()
        gpus = config.gpus if config.gpus is not None else find_gpus() or None
        return LocalExecutor(data, config.kill_grace_s, config.pass_env, config.batch_options, sandbox, *limits, gpus, config.pins_cpus)
    try:
        made: Executor = load_plugin(config.executor)(data, config)
    except (ImportError, AttributeError) as error:
        if config.executor in PLUGINS:
            raise
        remedy = "give local, slurm, dirac, or the package.module:Class of a class that Python can import (see PYTHONPATH)"
        raise ConfigError(f"JOBORCH_EXECUTOR is {config.executor!r}: {error}: {remedy}") from error
    return made
