"""The executor `local`: starts, watches and kills payloads on this machine.

1. Local executor
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Callable

from joborch_base.data_folder import STOP_NOTE, DataFolder
from joborch_base.executors import (
    CHILDREN_FILE,
    Executor,
    Outcome,
    Process,
    bears_mark,
    become_subreaper,
    belonging,
    boot_id,
    first_file_limit_text,
    handicap,
    make_scratch,
    marked_below,
    passed_on,
    payload_environment,
    process_start,
    read_claim,
    read_exit,
    read_proc,
    scratch_bases,
    signal_all,
    tree_of,
    wrapper_text,
)
from joborch_base.files import is_full, state_below
from joborch_base.settings import BatchOptions, Config
from joborch_base.states import Cause, Job, Reason
from joborch_base.vocabulary import PLUGINS, ConfigError, Finding, StillRunning, crash_point, load_plugin, log, one_line

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


REST_S, TERM_S = 2.0, 0.5  # processes that a script left may exit by themselves, then get TERM, then KILL; the wrapper does the same
STOP_STATUSES = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)}
STOP_NEAR_S = 5.0  # between the end of a script and of its client, if one signal stopped both


class Child:
    """A process that this one has started."""

    def __init__(self, pid: int) -> None:
        self.pid, self.lock, self.ended = pid, threading.Lock(), False

    def has_ended(self) -> bool:
        """Tell whether it has ended, and reap it then. Only a known id: waitpid(-1) would steal those of other threads."""
        with self.lock:  # once it is reaped, its id may be another child's
            if not self.ended:
                try:
                    self.ended = os.waitpid(self.pid, os.WNOHANG) != (0, 0)
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


class LocalExecutor:
    """Runs payloads as processes of this machine. A handle is `pid start boot`: process ids are reused, boot ids are not."""

    is_batch = False

    def __init__(
        self,
        data: DataFolder,
        kill_grace_s: float,
        pass_env: Sequence[str] = (),
        options: Callable[[str | None], BatchOptions] = lambda service: BatchOptions(),
    ) -> None:
        self.data, self.kill_grace_s, self.options = data, kill_grace_s, options
        self.scratch_bases = scratch_bases(os.environ)
        self.boot, self.inherited = boot_id(), passed_on(os.environ, pass_env)
        self.children: dict[int, Child] = {}
        self.seen: set[str] = set()  # marks of attempts that this process saw running and that have no exit file yet
        self.own: set[str] = set()  # marks of attempts that this process started: their orphans become its children
        self.untidy: set[str] = set()  # marks of attempts that left processes running, which were killed
        self.resting: dict[str, float] = {}  # by mark, monotonic: since when the processes that an attempt left may exit by themselves
        self.reaps_orphans, self.engines = become_subreaper(), Engines(self.inherited)
        self.bash = shutil.which("bash", path=self.inherited.get("PATH")) or "/bin/bash"
        self.wrapper = wrapper_text(data, before_script=handicap(), file_limit=first_file_limit_text(), here=True)
        self.cancelled: set[str] = set()  # marks of attempts that are being killed now
        self.awaited: set[int] = set()  # process ids of wrappers that `wait` waits for
        self.unseen = False  # one that nobody waited for has ended since `is_end_awaited` was asked

    def start(self, job: Job) -> str:
        folder = self.data.job(job.mark)
        environment = payload_environment(job, folder, self.inherited, self.options(job.service).prelude)
        environment["TMPDIR"] = make_scratch(folder, self.scratch_bases)
        crash_point("run.prepared")
        # The wrapper's text, not its path, so nobody can replace the file.
        child = start_session([self.bash, "-c", self.wrapper, "joborch-wrapper", str(folder), str(job.attempt)], environment)
        self.children[child.pid] = child
        self.seen.add(job.mark)
        self.own.add(job.mark)
        return f"{child.pid} {process_start(child.pid) or 0} {self.boot}"

    def wait(self, job: Job, patience_s: float) -> bool:
        """Wait for the end of a payload that this process started; tell whether it has ended. Kernels before 5.3 cannot say."""
        pid = int((job.handle or "0").split(" ")[0])
        if not pid:
            return False  # it could not be started
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        except (OSError, AttributeError):
            return False
        self.awaited.add(pid)
        try:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(patience_s * 1000))
        finally:
            self.awaited.discard(pid)
            os.close(descriptor)

    def is_child(self, job: Job) -> bool:
        """Tell whether a payload's wrapper is a child of this process that has not ended, as far as it knows."""
        return int((job.handle or "0").split(" ")[0]) in self.children

    def is_end_awaited(self) -> bool:
        """Tell whether somebody waits for each payload that this process has started, so that the end of a child is no news.

        Asked after each end of a child: whichever thread has taken in that of another payload meanwhile, it is news.
        """
        unseen, self.unseen = self.unseen, False
        return not unseen and set(self.children) <= self.awaited

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
                outcomes[job.id] = dataclasses.replace(
                    outcomes[job.id], children_left=outcomes[job.id].children_left or job.mark in self.untidy
                )
                self.forget(job)
                if outcomes[job.id].children_left and self.engines.engines:
                    place = self.data.job(job.mark)
                    threading.Thread(target=self.engines.stop_mounting, args=(place,), name=f"engines-{job.id}", daemon=True).start()
        return outcomes

    def forget(self, job: Job) -> None:
        for marks in (self.seen, self.own, self.untidy):
            marks.discard(job.mark)
        self.resting.pop(job.mark, None)

    def reap(self) -> bool:
        """Reap children and orphans that have ended. Return whether other orphans are alive.

        The main thread starts only payloads, so any other child of it was orphaned by one.
        """
        for child in list(self.children.values()):
            if child.has_ended():
                self.unseen = self.unseen or child.pid not in self.awaited  # first: see is_end_awaited
                if self.children.get(child.pid) is child:  # another thread may have been quicker
                    self.children.pop(child.pid, None)
        if not self.reaps_orphans:
            return True  # there may be some
        alive = 0
        for pid in map(int, read_proc(CHILDREN_FILE).split()):
            if pid not in self.children:
                with contextlib.suppress(ChildProcessError):  # another thread was quicker
                    alive += os.waitpid(pid, os.WNOHANG) == (0, 0)
        return alive > 0

    def left_running(self, ended: Sequence[Job], orphans: bool) -> list[Job]:
        """Kill processes that these payloads left running. Return the payloads that had such processes.

        Processes in the script's session may exit by themselves for REST_S, then get TERM: they may still write output.
        """
        suspects = [job for job in ended if orphans or job.mark not in self.own]
        marked = marked_below(self.data.jobs) if suspects else set()
        left = []
        for job in suspects:
            wrapper = int((job.handle or "0").split(" ")[0])  # it may still be exiting
            processes = tree_of(job, self.data.job(job.mark), 0) if job.mark in marked else []
            processes = [process for process in processes if process.pid != wrapper]
            if not processes:
                continue
            left.append(job)
            rested_s = time.monotonic() - self.resting.setdefault(job.mark, time.monotonic())
            if rested_s < REST_S and any(process.session == wrapper for process in processes):
                continue
            self.untidy.add(job.mark)
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
            self.seen.add(job.mark)
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
            return self.stopped_by_others(job, folder, ended) or ended
        if not folder.is_dir() or folder.is_symlink():
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.FOLDER_REMOVED)
        if "ready" not in (read_claim(folder, job.attempt) or ""):
            if job.mark in marked_below(self.data.jobs):
                return Outcome(True)  # its wrapper is about to claim it, or a process outlived the wrapper
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.DISK_FULL if is_full(folder) else Reason.NO_WRAPPER)
        if job.mark not in self.seen:
            return Outcome(False, cause=Cause.INFRASTRUCTURE, reason=Reason.ENDED_WITH_CLIENT)
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
        with self.cancelling(job.mark):
            self.end_tree(job, self.data.job(job.mark), self.own_wrapper(job))

    @contextlib.contextmanager
    def cancelling(self, mark: str) -> Iterator[None]:
        """Count a kill under way: the more there are, the less often each of them reads all of /proc."""
        self.cancelled.add(mark)
        try:
            yield
        finally:
            self.cancelled.discard(mark)

    def end_tree(self, job: Job, folder: Path, pid: int) -> None:
        """Send TERM to all processes of a payload, and KILL after the grace time. Return when none is left, or raise StillRunning."""
        known = tree_of(job, folder, pid)
        signal_all(known, signal.SIGTERM)
        deadline = time.monotonic() + self.kill_grace_s
        while time.monotonic() < deadline and (found := self.still_there(job, folder, pid, known)):
            known = found
            pause_s = min(0.2, 0.02 * len(self.cancelled))
            time.sleep(pause_s - time.monotonic() % pause_s)  # all at the same time, to share a look
        for _ in range(200):
            if not self.still_there(job, folder, pid, known) and not self.still_there(job, folder, pid, known):
                self.forget(job)
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

    def problem(self) -> str:
        return ""

    def examine(self) -> Iterator[Finding]:
        bash = shutil.which("bash")
        yield Finding(bool(bash), f"scripts are run by {bash}" if bash else "there is no bash, which runs the scripts: install it")


def run_seconds(started: float | None, ended: float, passed_s: float) -> float:
    """Return how long a script ran in seconds, by the times of its files; `passed_s` if the clock was set meanwhile."""
    return ended - started if started is not None and 0 <= ended - started <= passed_s + 1 else max(0.0, passed_s)


def make_executor(data: DataFolder, config: Config) -> Executor:
    """Return the executor of a client. Raises ConfigError if JOBORCH_EXECUTOR does not name a usable one."""
    if config.executor == "local":
        return LocalExecutor(data, config.kill_grace_s, config.pass_env, config.batch_options)
    try:
        made: Executor = load_plugin(config.executor)(data, config)
    except (ImportError, AttributeError) as error:
        if config.executor in PLUGINS:
            raise
        remedy = "give local, slurm, dirac, or the package.module:Class of a class that Python can import (see PYTHONPATH)"
        raise ConfigError(f"JOBORCH_EXECUTOR is {config.executor!r}: {error}: {remedy}") from error
    return made
