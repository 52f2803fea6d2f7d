"""What every executor does: the wrapper that starts a payload once, the exit file, what a script inherits, and what a client knows of it.

1. Executors
2. Inheritance
3. Payloads
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import re
import resource
import shlex
import stat
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Protocol, cast

from joborch_base.data_folder import DataFolder
from joborch_base.files import give_rights, libc, open_regular, state_below
from joborch_base.processes import all_stats, read_proc
from joborch_base.settings import SETTINGS
from joborch_base.states import Cause, Job, Reason, last_words
from joborch_base.vocabulary import KIB, Backoff, Clock, Finding, kernel_boot_id, log, one_line, parse_json

# == 1. Executors ==  Every executor starts an attempt at most once, finds it after a crash, and kills all of its processes.

# The same wrapper runs a payload everywhere. $1 is the payload's folder, $2 the attempt. If the batch system does not enforce
# the time limit, $3 is that limit and $4 the time from TERM to KILL, both in seconds.
# It claims the attempt with a file that only one process can create, and starts run.sh in a separate process group, so that
# `kill 0` in run.sh does not reach the wrapper (bash has job control without a terminal, dash does not). Afterwards it writes
# exit.json next to the work folder: the exit status, and whether the wrapper got a signal to stop (run.sh may have got it, too).
# Everything that a full disk could break is done before `ready` is written to the claim: without `ready` the script never began.
WRAPPER = r"""#!/bin/bash
# joborch: runs one attempt of one payload. Usage: bash wrapper.sh FOLDER ATTEMPT [LIMIT_S GRACE_S]
@FIRST@umask @UMASK@@FILES@
cd "$1" || exit 1
here=$PWD                                          # $1 may be relative
set -C                                             # > fails if the file exists (O_EXCL): a second wrapper stops here
echo $$ 2>/dev/null >"started.$2" || { : 2>/dev/null >"again.$2"; exit 0; }
set +C
set -m
told=0 over=0
trap told=1 TERM INT HUP                           # a handler, not '': children inherit ignored signals
trap : ALRM USR1 USR2 QUIT PIPE XCPU               # a batch system's warnings (sbatch --signal=B:USR1@60) must not kill the wrapper
trap over=1 VTALRM                                 # from the timer below
@SCRATCH@printf '%80s' '' >exit.json || exit 1               # reserve its disk space before the script can fill the disk
# and open it and the others: the script may remove the permissions of its folders, or replace them by links
exec 9<>exit.json 6<exit.json 7>>stdout 8>>stderr 3>times || exit 1
cd work || exit 1
prelude=$JOBORCH_PRELUDE login=
unset JOBORCH_PRELUDE
IFS= read -r -n 250 first 2>/dev/null <run.sh
case $first in '#!'*bash*[[:space:]]-*)
    pattern='^#!.*bash([[:space:]].*)?[[:space:]](-[[:alpha:]]*l[[:alpha:]]*|--login)([[:space:]]|$)'
    [[ $first =~ $pattern ]] && login=--login
esac
command=(@INSIDE@bash $login ./run.sh)
if [ -n "$prelude" ]; then                          # in the script's own shell: it may define functions
    then='eval "$1"; [ $? -eq 0 ] || echo "joborch: the line before the script (SERVICE_..._PRELUDE) failed: $1" >&2; shift; . ./run.sh'
    command=(@INSIDE@bash --login -c "$then" ./run.sh "$prelude")
fi
echo ready >>"../started.$2" || exit 1
if [ -n "$3" ]; then
    {
        sleep "$3"
        until read -r group <&5; do sleep 0.1; exec 5<../exit.json; done
        kill -VTALRM $$; kill -TERM -- -$group; sleep "$4"; kill -KILL -- -$group
    } 5<../exit.json >/dev/null 2>&1 3>&- 6<&- 7>&- 8>&- 9>&- &
    timer=$!
fi
@METER@# In the foreground: a signal to the wrapper would interrupt `wait`, and bash may lose the status of a child that ends just then.
# So `$!` does not say its process group, and the child writes it to exit.json, which is read at the end.
(echo $BASHPID 1<>../exit.json; @BEFORE@exec "${command[@]}") </dev/null >&7 2>&8 3>&- 6<&- 7>&- 8>&- 9>&-
status=$?
read -r group <&6
[ "$group" -gt 1 ] 2>/dev/null || group=           # the script wrote something else there
if [ $status -gt 128 ] && kill -0 $group; then     # somebody suspended run.sh: wait until it goes on and ends
    exec 5<> <(:)                                  # nothing to read: a pause without a process, at whose end bash would forget run.sh
    while kill -0 $group; do read -r -t 1 <&5; [ $? -gt 128 ] || sleep 1; done
    wait $group; status=$?
fi 2>/dev/null
set +m
[ -z "$3" ] || kill -KILL -- -$timer 2>/dev/null
@METERED@runs() {                                           # is a process of run.sh's group alive? Zombies do not count
    local file line
    for file in /proc/[0-9]*/stat; do
        { read -r line <"$file"; } 2>/dev/null || continue
        set -- ${line##*) }
        [ "$3" != "$group" ] || [ "$1" = Z ] || [ "$1" = X ] || return 0
    done
    return 1
}
rest() {                                           # let remaining processes exit by themselves, for these seconds
    for pause; do
        runs && [ $told$over = 00 ] || return 0
        sleep $pause 3>&- 7>&- 8>&- 9>&-
    done
}
left=0
if [ -n "$group" ] && kill -0 -- -$group; then             # filters as in `exec > >(tee log)`, and background processes
    rest 0.02 0.05 0.1 0.2 0.3 0.3 0.3 0.3 0.43
    runs && left=1 && kill -TERM -- -$group && rest 0.1 0.2 0.2
    kill -KILL -- -$group
fi 2>/dev/null
@LEFT@[ $status -le 128 ] || [ $told$over != 00 ] || sleep 0.3  # a signal to the whole session may reach run.sh before the wrapper
gone=                                              # set if the work folder was removed or replaced
there() { [ "$here/work" -ef /proc/$$/cwd ]; }
there || { [ -x "$here" ] || chmod u+x "$here"; there; } 2>/dev/null || gone=', "gone": 1'
times >&3 2>/dev/null                              # CPU time of this shell and of all that it waited for
printf '{"status": %d, "left": %d, "told": %d, "limit": %d%s}' $status $left $told $over "$gone$cut" >&9
shopt -s nullglob dotglob
set -- "$TMPDIR"/*                                 # if TMPDIR is empty, the client removes it: that saves a process here
case $TMPDIR in */jo-*) [ $# -eq 0 ] || rm -rf -- "$TMPDIR";; esac
exit $status
"""
# On another machine, the wrapper creates TMPDIR: a short path on the node, or else `tmp` in the payload's folder.
NODE_SCRATCH = r"""name=${JOBORCH_MARK//-/} scratch=$PWD/tmp
name=jo-${name:0:12}.$2
for base in "${TMPDIR%/}" /tmp; do
    [ "${base:0:1}" = / ] && [ ${#base} -le @LONGEST@ ] && mkdir -m 700 "$base/$name" 2>/dev/null && scratch=$base/$name && break
done
if [ "$scratch" = "$PWD/tmp" ]; then mkdir -p tmp; else ln -sfn "$scratch" tmp; fi 2>/dev/null
export TMPDIR=$scratch
"""
# There it also measures how much memory processes use (VmHWM of proc(5), in KiB), because it cannot ask for that afterwards: of itself
# and all that it started, at growing intervals. Each new peak is a line in `times`; few of them, so the file stays small.
NODE_METER = r"""measure() {
    local at file line text
    pids=($$)
    for ((at = 0; at < ${#pids[@]}; at++)); do
        for file in /proc/${pids[at]}/task/*/children; do
            line=
            read -r line <$file
            pids+=($line)
        done
        read -r -d '' text </proc/${pids[at]}/status
        [[ $text =~ VmHWM:[[:space:]]*([0-9]+) ]] && [ ${BASH_REMATCH[1]} -gt $((peak + peak / 32)) ] || continue
        peak=${BASH_REMATCH[1]}
        echo peak $peak >&3
    done
}
{
    peak=0
    exec 5<> <(:)                                  # nothing to read: a pause without a process
    for pause in 0.05 0.1 0.2 0.3 0.5 1 2; do measure; read -r -t $pause -u 5; done
    while kill -0 $$; do measure; read -r -t $((5 + ${#pids[@]} / 20)) -u 5; done
} >/dev/null 2>&1 6<&- 7>&- 8>&- 9>&- &
meter=$!
disown
"""
NODE_METERED = "kill -KILL -- -$meter 2>/dev/null\n"
# Process 1 of a payload's PID namespace: it runs the command in its arguments, and everything inside ends with it. It passes TERM
# on to run.sh, as the wrapper cannot. As in the wrapper, processes of the script's session may exit by themselves, then get TERM.
# It forks once, because the script may use up its processes; `read` from descriptor 4, a pipe that stays empty, is its
# sleep. What it writes there at its end tells the wrapper whether processes were left, and that the isolation did not fail before.
FIRST_INSIDE = r"""[ $$ -eq 1 ] || exit 1                           # else `kill -1` would reach all processes of this user
@PROCESSES@end=tidy
trap 'kill -TERM -- -$pid 2>/dev/null' TERM INT HUP
set -m
"$@" 4>&- &
pid=$!
set +m
while :; do
    wait $pid; status=$?
    kill -0 $pid 2>/dev/null || break
done
wait $pid 2>/dev/null; last=$?
[ $last -eq 127 ] || [ $last -lt 0 ] || status=$last
runs() {                                           # is a process alive whose session is like $1? 0: inherited from the wrapper
    local session=$1 file line
    for file in /proc/[0-9]*/stat; do
        [ $file != /proc/1/stat ] && { read -r line <$file; } 2>/dev/null || continue
        set -- ${line##*) }
        [[ $1 = [ZX] || $4 != $session ]] || return 0
    done
    return 1
}
rest() { for pause; do runs 0 || return; read -r -t $pause -u 4; done; }
if runs '*'; then
    rest 0.02 0.05 0.1 0.2 0.3 0.3 0.3 0.3 0.43
    runs '*' && { runs 0 && kill -TERM -1 && rest 0.1 0.2 0.2; end=left; }
fi 2>/dev/null
echo $end >&4
exit $status
"""
# Since bash 5.1 a short here-string is a pipe, which costs no process; before, it is a file.
OPEN_LEFT = "exec 4<<<''; read -r -u 4; exec 4<>/dev/fd/4; [ -p /dev/fd/4 ] || exec 4<> <(:)\n"
READ_LEFT = """read -r -t 1 -u 4 end
case $end in left) left=1;; tidy) ;; *) cut=', "cut": 1';; esac
"""
SCRATCH_BASE_BYTES = 40  # a socket's path has at most 107 bytes (unix(7)); Python's multiprocessing adds 32, other programs more

CHILDREN_FILE = f"/proc/self/task/{os.getpid()}/children"  # of the main thread, which gets the orphans (proc(5))


@dataclass(frozen=True)
class Outcome:
    """The state of a started payload: `alive`, perhaps with `waits`, or how it ended."""

    alive: bool
    exit_status: int | None = None  # as in the shell: 128 plus the signal's number if a signal killed it
    children_left: bool = False
    cause: Cause | None = None  # set if there is no exit status, or if the script did not cause the end
    reason: str = ""
    told: bool = False  # the wrapper got a signal to stop, and perhaps run.sh, too
    waits: str = ""  # why it has not started, in the batch system's words; constant while nothing changes


class Executor(Protocol):
    """The interface of everything that runs payloads. Several threads call it. A handle is a text that outlives the client's process.

    One that works with somebody's login also has `login_valid_until()`, which returns seconds since 1970, or None if unknown.
    One that knows what payloads have used has `used(job)`, which returns peak memory in bytes and CPU time in seconds, or None
    for what is unknown, of a payload that is over. One that keeps copies of a payload's files elsewhere has `erase(job)`, which
    deletes them, may be repeated, and raises BackendUnavailable.
    """

    is_batch: bool
    """True if payloads may wait after the start, time limits are enforced elsewhere, and each job takes one slot."""

    def start(self, job: Job) -> str:
        """Start the attempt and return its handle. The row says Running before this is called.

        Raises OSError if it cannot be started now, CannotRun if it never can, and BackendUnavailable if that is unknown: then
        the client calls `find` before it starts the attempt again.
        """

    def find(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Return the handles, by mark, of attempts whose start was interrupted. Attempts that are missing never ran.

        An empty handle means: not known yet. Raises BackendUnavailable if nothing is known about any attempt.
        """

    def poll(self, jobs: Sequence[Job]) -> dict[int, Outcome]:
        """Return the outcome of these payloads, by id, with one call to a batch system. If that does not answer, all count as alive."""

    def cancel(self, job: Job) -> None:
        """Kill the payload; return when none of its processes runs, or raise StillRunning. May be repeated."""

    def collect(self, job: Job) -> None:
        """Fetch the outputs into the payload's folder, unless it is shared. After BackendUnavailable the caller tries again."""

    def end_orphans(self, marks: Sequence[str]) -> None:
        """Kill attempts that are no longer in any database."""

    def problem(self) -> str:
        """Return why it cannot work now and since when; an empty text if all is well."""

    def examine(self) -> Iterator[Finding]:
        """Yield findings for `joborch doctor`, without starting a job."""


class Sandbox(Protocol):
    """What keeps the payloads of this machine apart from each other, and from their client. Used by the executor `local`."""

    isolation: str
    """The value of JOBORCH_ISOLATION."""

    inside: str
    """Words of shell that run the command after them inside; empty if payloads are not isolated."""

    has_host_network: bool
    """Scripts have the network of this machine, and no other files of this user."""

    uids: range
    """The user ids of scripts, one for each that runs; empty if all run as this client's user. The wrapper has it as `$5`."""

    def hold(self) -> None:
        """Take the user ids, which no other client on this machine may have, until this process ends. Raises ConfigError."""

    def give(self, folder: Path, scratch: str, uid: int) -> None:
        """Give what a script may write to, in its payload's folder and its TMPDIR, to its user. Raises OSError."""

    def gpus(self, ids: Sequence[str] | None) -> tuple[str, Sequence[str]]:
        """Return what shows a script the device files of these GPUs alone, the wrapper's `$6`, and their names inside. None: all GPUs."""

    def summary(self) -> str:
        """Return in one line what this isolation means; if there is none, also what this machine could do."""

    def examine(self) -> Iterator[Finding]:
        """Yield the same, and what this machine can do; each is tried with a payload."""


def read_exit(folder: Path) -> Outcome | None:
    """Return the outcome in the wrapper's exit file, or None if the file is missing or incomplete."""
    try:
        with open_regular(folder, "exit.json") as file:
            said = parse_json(file.read(400))
        status, cause = said["status"], Cause.LIMIT if said.get("limit") else None
        fits = type(status) is int and 0 <= status < 256
        reason = one_line(str(said.get("reason", "")), 200)
        if said.get("gone") and cause is None and fits:
            cause, reason = Cause.INFRASTRUCTURE, Reason.WORK_GONE_EXIT.format(status=status)
        if said.get("cut") and cause is None and fits:
            cause, reason = Cause.INFRASTRUCTURE, Reason.ISOLATION_FAILED.format(words=last_words(folder))
        return Outcome(False, status, bool(said["left"]), cause, reason, told=bool(said.get("told"))) if fits else None
    except PermissionError:
        with contextlib.suppress(OSError):
            give_rights(folder)  # the script removed the folder's permissions; the next call succeeds
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # missing, incomplete, or replaced by the script


def is_untouched(folder: Path) -> bool:
    """Tell whether a payload's exit file is as the wrapper left it at the start: reserved, with the id of a process group."""
    try:
        with open_regular(folder, "exit.json") as file:
            return bool(re.fullmatch(rb"(?=.{80}$)([0-9]+\n)? *", file.read(400), re.DOTALL))
    except OSError:
        return False


def why_not_runnable(script: Path) -> str:
    """Return why a payload's run.sh cannot be run, or an empty text."""
    if not script.is_file():
        return Reason.NO_SCRIPT
    if script.stat().st_size == 0:
        return Reason.EMPTY_SCRIPT
    return ""


def run_times(folder: Path, job: Job) -> tuple[float | None, float]:
    """Return when a payload started and ended: the times of the wrapper's files, or of the clock if they are gone.

    The start is None if it never started: its claim is missing, or empty because it only fences the attempt.
    """
    if job.started_at is None and not read_claim(folder, job.attempt):
        return None, time.time()
    times = []
    for name in (f"started.{job.attempt}", "exit.json"):
        try:
            times.append(state_below(folder, name).st_mtime)
        except OSError:
            times.append(job.started_at or time.time() if not times else time.time())
    return times[0], max(times)


def used_by_payload(folder: Path) -> tuple[int | None, float | None]:
    """Return peak memory in bytes and CPU time in seconds of a payload, as its wrapper wrote them; None if missing or invalid."""
    try:
        with open_regular(folder, "times") as file:
            text = file.read(64 * KIB)
    except OSError:
        return None, None
    peaks = [int(kib) * KIB for kib in re.findall(rb"^peak ([0-9]{1,12})$", text, re.MULTILINE)]
    found = re.findall(rb"([0-9]{1,8})m([0-9]{1,2})[.,]([0-9]{3})s", text)
    cpu_s = sum(60 * int(minutes) + int(seconds) + int(ms) / 1000 for minutes, seconds, ms in found) if len(found) == 4 else None
    return max(peaks, default=None), cpu_s


def boot_id() -> str:
    """Return a unique id of this boot and of this container (by the start of its process 1)."""
    return f"{kernel_boot_id()}.{process_start(1) or 0}"


def process_start(pid: int) -> str | None:
    """Return when a process started (clock ticks since boot, field 22 of proc(5)), or None if it is gone or a zombie."""
    try:
        text = read_proc(f"/proc/{pid}/stat")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


@dataclass(frozen=True)
class Process:
    """One process, as /proc shows it."""

    pid: int
    parent: int
    group: int
    session: int
    start: str
    terminal: int = 0  # 0: none


def all_processes() -> list[Process]:
    """Return every process that is not a zombie."""
    return [Process(pid, int(fields[1]), int(fields[2]), int(fields[3]), fields[19], int(fields[4])) for pid, fields in all_stats()]


def bears_mark(pid: int, mark: str) -> bool:
    """Tell whether a process has an attempt's key in its environment."""
    try:
        return f"\0JOBORCH_MARK={mark}\0" in "\0" + read_proc(f"/proc/{pid}/environ")
    except OSError:
        return False  # it ended, or belongs to another user


def marks_of(process: Process, jobs: Path) -> list[bytes]:
    """Return the marks of the payloads below `jobs` that a process belongs to, judged by this process alone; mostly none.

    A mark in its environment is proof. A working folder below `jobs` is not: a person may be there with a shell or an
    editor. It counts only for an orphan without a terminal whose environment was emptied.
    """
    try:
        environment = b"\0" + Path(f"/proc/{process.pid}/environ").read_bytes()
        marks = re.findall(rb"\0JOBORCH_MARK=([^\0]+)(?=\0)", environment)
        # People's processes have a HOME, systemd's services an INVOCATION_ID.
        others = re.search(rb"\0(HOME|INVOCATION_ID)=", environment) and b"\0JOBORCH_ATTEMPT=" not in environment
        if marks or others or process.terminal:
            return marks
        where, place = os.readlink(f"/proc/{process.pid}/cwd".encode()), os.fsencode(jobs) + b"/"
        return [where[len(place) :].split(b"/")[0]] if where.startswith(place) and is_orphan(process) else []
    except OSError:
        return []  # it ended, or belongs to another user


def is_orphan(process: Process) -> bool:
    """Tell whether a process was taken over by this client, by process 1, or by a user's systemd."""
    if process.parent in (1, os.getpid()):
        return True
    return read_proc(f"/proc/{process.parent}/comm") == "systemd\n"


class ProcessTable:
    """All processes, each with the marks of payloads below `jobs`. Threads that ask at the same time share one look at /proc."""

    def __init__(self, jobs: Path) -> None:
        self.jobs, self.changed, self.begun, self.done = jobs, threading.Condition(), 0, 0
        self.found: list[tuple[Process, list[bytes]]] = []

    def look(self) -> list[tuple[Process, list[bytes]]]:
        """Return what was found by a look that began after this call."""
        with self.changed:
            next_look = self.begun + 1
            while self.done < next_look and self.begun > self.done:
                self.changed.wait()
            if self.done >= next_look:
                return self.found
            self.begun += 1
        found: list[tuple[Process, list[bytes]]] | None = None
        try:
            # Process 1 and kernel threads may have session and group 0, which belong to no payload.
            everything = [process for process in all_processes() if process.pid != 1 and process.group != 0]
            found = [(process, marks_of(process, self.jobs)) for process in everything]
            return found
        finally:
            with self.changed:
                if found is None:
                    self.begun = self.done  # those who wait look themselves
                else:
                    self.done, self.found = self.begun, found
                self.changed.notify_all()


process_table = functools.lru_cache(maxsize=8)(ProcessTable)


def tree_of(job: Job, folder: Path, wrapper_pid: int, known: Collection[Process] = ()) -> list[Process]:
    """Return all running processes of an attempt, including those `known` from an earlier call: their parents may be gone."""
    return belonging({os.fsencode(job.mark)}, folder.parent, wrapper_pid, known)


def belonging(marks: set[bytes], jobs: Path, session: int = 0, known: Collection[Process] = ()) -> list[Process]:
    """Return all processes of these attempts: by mark (see `marks_of`) or session, and then by parent and group."""
    looked = process_table(jobs).look()
    everything, before = [process for process, _ in looked], {(process.pid, process.start) for process in known}
    found = {
        process.pid
        for process, its_marks in looked
        if process.session == session != 0 or (process.pid, process.start) in before or not marks.isdisjoint(its_marks)
    }
    grown = -1
    while grown != len(found):
        grown = len(found)
        groups = {process.group for process in everything if process.pid in found}
        found |= {process.pid for process in everything if process.parent in found or process.group in groups}
    return [process for process in everything if process.pid in found and process.pid != os.getpid()]


def marked_below(jobs: Path) -> set[str]:
    """Return the marks of all payloads below `jobs` that have a running process, with one pass over /proc."""
    return {os.fsdecode(mark) for process in all_processes() for mark in marks_of(process, jobs)}


def become_subreaper() -> bool:
    """Adopt the processes that payloads orphan (prctl(2)), to find them without reading all of /proc. Return whether that works."""
    pr_set_child_subreaper = 36
    return bool(libc().prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0 and os.path.exists(CHILDREN_FILE))


def is_of_sandbox(process: Process, wrapper_pid: int) -> bool:
    """Tell whether a process of an isolated payload is neither its wrapper nor started by its script.

    That is what starts the namespace, and process 1 in it (NSpid in proc(5) has the process ids in all nested namespaces).
    """
    try:
        ids = re.search(r"^NSpid:\s*(.*)", read_proc(f"/proc/{process.pid}/status"), re.MULTILINE)
    except OSError:
        return False  # it has ended
    inner = ids[1].split()[1:] if ids else []
    return inner == ["1"] if inner else process.pid != wrapper_pid


def signal_all(processes: Iterable[Process], number: int) -> None:
    """Send a signal to each of these processes; one that has ended is fine."""
    for process in processes:
        # ProcessLookupError: it has ended. PermissionError: it has changed its user.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)


OOM_HANDICAP = 500  # in thousandths of all memory: if that runs out, the kernel kills a script before the client or server


def handicap() -> str:
    """Return a shell line that makes the kernel kill the script first if memory runs out (proc(5)). It needs no privilege."""
    own = int(Path("/proc/self/oom_score_adj").read_text(encoding="ascii"))
    return f"echo {min(1000, own + OOM_HANDICAP)} 2>/dev/null >/proc/self/oom_score_adj; "


def wrapper_text(
    data: DataFolder,
    first: str = "",
    before_script: str = "",
    file_limit: str = "",
    here: bool = False,
    inside: str = "",
    process_limit: str = "",
) -> bytes:
    """Return the wrapper with this process's original umask and, if `file_limit` is given, a soft limit of open files.

    It runs `first` at its start and `before_script` just before the script, which `inside` runs (see Sandbox.inside). Inside,
    `process_limit` comes first.
    Unless it runs `here`, it makes TMPDIR itself, and measures the memory of the payload.
    """
    scratch = "" if here else NODE_SCRATCH.replace("@LONGEST@", str(SCRATCH_BASE_BYTES))
    meter, metered = ("", "") if here else (NODE_METER, NODE_METERED)
    files = f"; ulimit -Sn {file_limit}" if file_limit else ""
    if inside:
        text = FIRST_INSIDE.replace("@PROCESSES@", process_limit)
        first, inside = first + OPEN_LEFT, f"{inside} bash -c {shlex.quote(text)} joborch-first "
    text = WRAPPER.replace("@METER@", meter).replace("@METERED@", metered).replace("@FILES@", files).replace("@FIRST@", first)
    text = text.replace("@UMASK@", f"{data.umask:04o}")
    text = text.replace("@BEFORE@", before_script).replace("@SCRATCH@", scratch).replace("@LEFT@", READ_LEFT if inside else "")
    return text.replace("@INSIDE@", inside).encode()


# -- scratch: what a script's TMPDIR is --


def scratch_bases(environment: Mapping[str, str]) -> list[str]:
    """Return the folders in which TMPDIR may be created: the site's TMPDIR, and /tmp."""
    bases = (environment.get("TMPDIR", "").rstrip("/"), "/tmp")
    return [base for base in bases if base.startswith("/") and len(os.fsencode(base)) <= SCRATCH_BASE_BYTES]


def scratch_name(mark: str) -> str:
    """Return the unique name of an attempt's TMPDIR."""
    job_uuid, _, attempt = mark.partition(".")
    return f"jo-{job_uuid.replace('-', '')[:12]}.{attempt}"


def make_scratch(folder: Path, bases: Sequence[str]) -> str:
    """Create an attempt's TMPDIR in one of `bases` and link `tmp` in the payload's folder to it. If that fails, use `tmp` itself."""
    note = folder / "tmp"
    for base in bases:
        place = f"{base}/{scratch_name(folder.name)}"
        try:
            if not is_own_scratch(place, folder):
                os.mkdir(place, 0o700)
            if note.is_symlink():
                note.unlink()  # from before a crash; the site's TMPDIR may have changed since
            os.symlink(place, note)
            return place
        except OSError as error:
            log.debug("no TMPDIR in %s: %s", base, error)
    if note.is_symlink():
        note.unlink()
    note.mkdir(exist_ok=True)
    return str(note)


def is_own_scratch(place: str, folder: Path) -> bool:
    """Tell whether this is a folder, not a link, that belongs to this user or to that of the script in a payload's `folder`."""
    try:
        return stat.S_ISDIR(os.lstat(place).st_mode) and is_own(place, folder)
    except OSError:
        return False


def is_own(place: str, folder: Path) -> bool:
    """Tell whether a path belongs to this user or to that of the script in a payload's `folder`. Raises OSError."""
    return os.lstat(place).st_uid in (os.geteuid(), script_uid(folder))


def script_uid(folder: Path) -> int | None:
    """Return the user id that a payload's script has, or got at an interrupted start; None if its work folder is gone."""
    try:
        return state_below(folder, "work").st_uid
    except OSError:
        return None


def read_claim(folder: Path, attempt: int) -> str | None:
    """Return the wrapper's claim: its process id, and `ready` once the script can start. None if there is no claim."""
    try:
        with open_regular(folder, f"started.{attempt}") as file:
            return file.read(40).decode("ascii", "replace")
    except FileNotFoundError:
        return None
    except OSError:
        return ""  # the script replaced it


# == 2. Inheritance ==  A script gets only the listed variables of its client, so no secret reaches it by accident.

# Passed on to every script. JOBORCH_PASS_ENV adds names; joborch's own settings are never passed on.
PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "TERM", "LANG", "LANGUAGE", "LC_*", "TZ", "LOCPATH", "LOCALE_ARCHIVE"),
    *("XDG_*_HOME", "XDG_*_DIRS", "XDG_RUNTIME_DIR", "SCRATCH", "WORK", "PROJECT"),
    # Environment Modules and Lmod, and what loaded modules have set
    *("MODULE*PATH", "MODULE*HOME", "MODULERCFILE", "MODULES_*", "__MODULES_*", "*_modshare", "*_modquar", "__modquar_*"),
    *("LOADEDMODULES", "_LMFILES_", "LMOD_*", "__LMOD_*", "_ModuleTable*", "BASH_ENV", "ENV", "FPATH", "BASH_FUNC_*"),
    *("EASYBUILD_*", "EBROOT*", "EBVERSION*", "EBDEVEL*", "EBEXTS*", "SPACK_*", "CRAY*", "PE_*", "PE_ENV", "GUIX_*"),
    *("CONDA_*", "_CE_*", "MAMBA_*", "VIRTUAL_ENV", "NIX_PATH", "NIX_PROFILES"),
    # libraries, and packages of programming languages
    *("LD_LIBRARY_PATH", "LD_RUN_PATH", "LD_PRELOAD", "LIBRARY_PATH", "CPATH", "*_INCLUDE_PATH", "MANPATH", "INFOPATH", "PKG_CONFIG_PATH"),
    *("CC", "CXX", "FC", "F77", "F90", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "PERL5LIB", "PERLLIB"),
    *("R_LIBS*", "R_HOME", "JULIA_*", "CLASSPATH", "GEM_HOME", "GEM_PATH", "RUBYLIB", "LUA_PATH", "LUA_CPATH", "TCLLIBPATH"),
    # accelerators, threads, MPI
    *("CUDA_*", "NVIDIA_*", "NCCL_*", "ROCR_*", "ROCM_*", "HIP_*", "HSA_*", "ZE_*", "ONEAPI_*", "SYCL_*", "GPU_DEVICE_ORDINAL"),
    *("OMP_*", "MKL_*", "OPENBLAS_*", "BLIS_*", "KMP_*", "GOMP_*", "NUMEXPR_*", "I_MPI_*", "OMPI_*", "PRTE_*", "MPICH_*", "UCX_*", "FI_*"),
    # batch systems and containers
    *("SLURM_*", "SBATCH_*", "PBS_*", "LSB_*", "APPTAINER_*", "SINGULARITY_*"),
    # the network
    *("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NIX_SSL_CERT_FILE", "GIT_SSL_CAINFO", "X509_CERT_DIR"),
)
PLACES = re.compile(r"\w+_(HOME|ROOT|DIR|PATH|PREFIX|BIN|LIB|INC|INCLUDE)")  # environment modules use such names; passed on if it is a path
# A family such as CONDA_* may include secrets, and the URL of a proxy a password: these are passed on only by JOBORCH_PASS_ENV.
SECRET_NAMES = re.compile(
    r"PASS|SECRET|TOKEN|CREDENTIAL|AUTH|LOGIN|USERNAME|COOKIE|JWT|_KEY$|(API|ACCESS|PRIVATE)_?KEY|^(APPTAINER|SINGULARITY)_ENV$",
    re.IGNORECASE,
)
LOGIN_IN_URL = re.compile(r"//[^/\s@]*@|^[^/\s@]*:[^/\s@]*@")


def fits_one(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a name matches one of these patterns, in which `*` matches any text."""
    rule = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns) or r"(?!)")
    return lambda name: bool(rule.match(name))


def is_own_setting(name: str) -> bool:
    """Tell whether a variable is a setting of joborch: the client's PORT and tokens are not for scripts."""
    return name.startswith(("JOBORCH_", "SERVICE_")) or any(name == setting.name for setting in SETTINGS)


def passed_on(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """Return the part of the client's environment that scripts get: what PASSED_ON and `more` (JOBORCH_PASS_ENV) list."""
    listed, wanted, plain = fits_one(PASSED_ON), fits_one(more), {name for name in PASSED_ON if "*" not in name}

    def is_passed(name: str, value: str) -> bool:
        if is_own_setting(name) or wanted(name):
            return not is_own_setting(name)
        if name in plain or name.startswith("BASH_FUNC_"):
            return not ("proxy" in name.lower() and LOGIN_IN_URL.search(value))
        known = listed(name) or (PLACES.fullmatch(name) and value.startswith("/"))
        return bool(known) and not SECRET_NAMES.search(name) and not LOGIN_IN_URL.search(value)

    return {name: value for name, value in environment.items() if is_passed(name, value)}


def left_out(environment: Mapping[str, str], more: Sequence[str]) -> list[str]:
    """Return the sorted names of the variables that scripts do not get, without joborch's own."""
    kept = passed_on(environment, more)
    return sorted(name for name in environment if name not in kept and not is_own_setting(name))


def payload_environment(job: Job, folder: Path, inherited: Mapping[str, str], prelude: str = "") -> dict[str, str]:
    """Return the wrapper's environment: inherited variables, those of the job, and the commands to run before the script."""
    ours = {
        "JOBORCH_JOB_ID": job.remote_id or str(job.id),
        "JOBORCH_ATTEMPT": str(job.attempt),
        "JOBORCH_SERVICE": job.service or "",
        "JOBORCH_USER_ID": "" if job.user_id is None else str(job.user_id),
        "JOBORCH_CPUS": str(job.cpus),
        "JOBORCH_MEMORY": "" if job.memory is None else str(job.memory),
        "JOBORCH_GPUS": str(job.gpus),
        "JOBORCH_MARK": job.mark,
        "TMPDIR": str(folder / "tmp"),
    }
    return {**inherited, **ours, **({"JOBORCH_PRELUDE": prelude} if prelude else {})}


def node_environment(job: Job, inherited: Mapping[str, str], prelude: str) -> dict[str, str]:
    """Return the wrapper's environment on another machine, without TMPDIR, which the wrapper sets there."""
    words = payload_environment(job, Path(), {}, prelude)
    del words["TMPDIR"]
    return {**inherited, **words}


@functools.lru_cache(maxsize=1)
def first_file_limit() -> tuple[int, int]:
    """Return the soft and hard limit of open files at the start of this process; payloads get the same."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def raise_file_limit() -> None:
    """Raise the soft limit of open files, usually 1,024, to the hard one: each connection needs a file."""
    most = 65_536  # even without a hard limit, because some programs loop over all possible descriptors
    soft, hard = first_file_limit()
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit of open files stays at %d: it cannot be raised to %d (%s)", soft, wanted, error)


def first_file_limit_text() -> str:
    """Return the first soft limit of open files for `ulimit -Sn`; empty if it was not raised."""
    soft = first_file_limit()[0]
    return "" if soft == resource.getrlimit(resource.RLIMIT_NOFILE)[0] else str(soft)


def with_first_file_limit(command: Sequence[str]) -> list[str]:
    """Return a command that runs with the first limit of open files: sbatch(1) passes its limit on to jobs."""
    limit = first_file_limit_text()
    return ["sh", "-c", f'ulimit -Sn {limit}; exec "$0" "$@"', *command] if limit else list(command)


# == 3. Payloads ==  What a client knows of its payloads apart from their rows, and which of them its executor gets now.


class Payload:
    """What a client knows of a payload that is not over, apart from its row."""

    def __init__(self, clock: Clock) -> None:
        self.waits = ""  # what it waits for, if it has not started
        self.is_taken = False  # a thread starts or kills it: no other thread may. `Payloads.lock` guards this and the next one
        self.kill_waits = False  # it is to be killed once that thread has given it back
        self.handle: str | None = None  # one that is not stored, because a wrapper's claim replaces it
        self.unsaved: tuple[str, float] | None = None  # handle and start time (steady) that could not be stored yet
        self.tried = Backoff(clock)  # its start may or may not have succeeded
        self.stubborn = Backoff(clock)  # it does not end although it was killed
        self.measuring: Any = None  # it has ended, and its large work folder is being measured
        self.lingers = False  # it has ended, but is still Running because not all is known of its end


class Payloads(dict[int, Payload]):
    """What is known of payloads beside their rows, by job id. `payloads[job_id]` is made when it is first needed."""

    def __init__(self, clock: Clock, wake_killers: Callable[[], object]) -> None:
        super().__init__()
        self.clock, self.wake_killers, self.lock = clock, wake_killers, threading.Lock()

    def __missing__(self, job_id: int) -> Payload:
        return self.setdefault(job_id, Payload(self.clock))

    def known(self, job_id: int) -> Payload:
        """Return what is known of a payload, to read it."""
        return self.get(job_id) or Payload(self.clock)

    def take(self, job_id: int, to_kill: bool = False) -> bool:
        """Keep other threads from starting or killing a payload. Return False if one has it, or if it was killed in vain a moment ago."""
        with self.lock:
            payload = self[job_id]
            free = not payload.is_taken and not (to_kill and payload.stubborn.waits())
            payload.kill_waits = payload.kill_waits or (to_kill and payload.is_taken)
            payload.is_taken = payload.is_taken or free
        return free

    def give_back(self, job_id: int) -> None:
        """Let other threads start or kill a payload again, and wake them if it was to be killed meanwhile."""
        with self.lock:
            payload = self.known(job_id)
            kill_waits, payload.is_taken, payload.kill_waits = payload.kill_waits, False, False
        if kill_waits:
            self.wake_killers()

    def not_taken(self) -> set[int]:
        """Return the ids of the payloads that no thread has taken."""
        return {job_id for job_id, payload in list(self.items()) if not payload.is_taken}

    def forget(self, job_ids: Iterable[int]) -> None:
        """Forget payloads that are over, unless a thread has taken them meanwhile."""
        with self.lock:
            for job_id in job_ids:
                if not self.known(job_id).is_taken:
                    self.pop(job_id, None)

    def lingering(self) -> list[int]:
        """Return the ids of the payloads that have ended but are still Running."""
        return [job_id for job_id, payload in list(self.items()) if payload.lingers]


@dataclass
class Held(Backoff):
    """A payload that waits at the client: the executor refused it, or has not been asked yet."""

    tried_at: float = float("-inf")  # monotonic
    passed: bool = False  # others were accepted after it was refused: the problem is this payload


TRY_AGAIN_S = 1.0  # the shortest pause before a refused operation is tried again


class Holds:
    """Decides which payloads the executor gets now: in each service the longest waiting first. No service waits for another."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.trouble = clock, ""  # the problem of the executor at the last tick
        self.by_service: dict[str, Backoff] = {}  # "" for all
        self.held: dict[int, Held] = {}  # by payload id: Running by their row, but certainly not at the executor

    def told(self, trouble: str) -> None:
        """Note what the executor says of itself. As soon as a batch system is back, what waited for it goes on."""
        if self.trouble and not trouble:
            self.by_service.pop("", None)
        self.trouble = trouble

    def of(self, key: str) -> Backoff | None:
        hold = self.by_service.get(key)
        return hold if hold and hold.waits() else None

    def of_all(self) -> Backoff | None:
        """Return what keeps every payload from being started now, or None."""
        return self.of("")

    def reasons(self, for_all: bool) -> list[str]:
        """Return why payloads wait. With `for_all` only reasons that affect every service, else also those of services and payloads."""
        held = [hold.reason for key, hold in list(self.by_service.items()) if self.of(key) and not (for_all and key)]
        return held if for_all else held + [one.reason for one in list(self.held.values()) if one.reason]

    def reason_of(self, job: Job) -> str:
        away, hold = self.of_all(), self.of(job.service or "-")
        return away.reason if away else self.held[job.id].reason or (hold.reason if hold else "")

    def hold(self, key: str, reason: str) -> None:
        """Pause starts of one service, or of all if `key` is empty; longer after each failure in a row."""
        if key and self.of(key):
            return  # an extra try because others arrived must not prolong the pause
        if self.by_service.setdefault(key, Backoff(self.clock)).failed(reason):
            log.warning("no payload%s is started: %s", f" of {key}" if key else "", reason)

    def put_off(self, job: Job, reason: str) -> None:
        """Note that the executor refused a payload. It is tried again, with growing pauses."""
        held = self.held.setdefault(job.id, Held(self.clock))
        if held.failed(reason):
            log.warning("payload %d is not accepted: %s", job.id, reason)
        held.tried_at = self.clock.monotonic()

    def taken(self, job: Job) -> None:
        self.by_service.pop("", None)
        self.by_service.pop(job.service or "-", None)
        self.held.pop(job.id, None)

    def due(self, waiting: Sequence[Job]) -> list[Job]:
        """Return those of the waiting payloads, given in the order of their arrival, that may be tried now."""
        services = dict.fromkeys(job.service for job in waiting)
        if self.of_all():
            return []
        return [job for service in services for job in self.due_of([job for job in waiting if job.service == service])]

    def due_of(self, waiting: Sequence[Job]) -> list[Job]:
        """Return the payloads of one service that may be tried now: all of them as soon as the first one may be.

        A payload that was refused while others were accepted waits separately.
        """
        together = [job for job in waiting if not self.held[job.id].passed]
        alone = [job for job in waiting if self.held[job.id].passed and not self.held[job.id].waits()][:1]
        first = self.held[together[0].id] if together else Held(self.clock)
        others_came = any(not self.held[job.id].failures for job in together)
        early = self.clock.monotonic() < first.tried_at + TRY_AGAIN_S or (not others_came and first.waits())
        held = not others_came and self.of(waiting[0].service or "-")
        return alone if first.failures and (early or held) else together + alone

    def start(self, due: Sequence[Job], start: Callable[[Job], bool]) -> None:
        for service in dict.fromkeys(job.service for job in due):
            self.start_in_turn([job for job in due if job.service == service], start)

    def start_in_turn(self, due: Sequence[Job], start: Callable[[Job], bool]) -> None:
        """Start one service's payloads in order. If one is refused, try the one that has not been tried for the longest time.

        If that one is accepted, the problem is the first payload. If not, the service is paused.
        """
        waiting, refused = list(due), cast("list[Held]", [])
        while waiting and len(refused) < 2 and not self.of_all():
            job = min(waiting, key=lambda job: (self.held[job.id].tried_at, job.id)) if refused else waiting[0]
            waiting.remove(job)
            held = self.held[job.id]
            before = held.failures
            if start(job):
                for other in refused:
                    other.passed = True
                refused.clear()
            elif held.failures > before and not held.passed:
                refused.append(held)
        if len(refused) == 2:
            self.hold(due[0].service or "-", refused[1].reason)
