"""What payloads use: memory, processes, CPU time, and the size of their work folders; what is over a limit is named.

1. Usage
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from joborch_base.executors import Outcome, bears_mark, scratch_bases, scratch_name
from joborch_base.files import opened_folder, walk_open
from joborch_base.processes import all_stats, read_proc
from joborch_base.states import Cause, Reason
from joborch_base.vocabulary import KIB, size_text, sizes_text

# == 1. Usage ==  All running payloads are looked at together, once a second; if that takes long, less often.

PAGE_BYTES, TICKS_PER_S = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
LOOK_S = 1.0  # between two looks
MOST_AT_END = 10_000  # files of a work folder that are looked at when its script has ended; they take some 20 ms
SHARE = 20  # a look that takes long is followed by a pause of as many times its length: at most 5 % of a core


class Entry(NamedTuple):
    """What /proc says of one process (proc(5))."""

    parent: int
    session: int
    memory: int  # bytes in RAM, shared ones included
    threads: int
    start: str
    cpu: int  # in clock ticks, with those of children that have ended and that it waited for
    cpu_of_children: int


def all_entries() -> dict[int, Entry]:
    """Return every process that is not a zombie, by process id."""
    return {pid: entry_of(fields) for pid, fields in all_stats()}


def entry_of(fields: Sequence[str]) -> Entry:
    """Return what the fields of /proc/PID/stat say, from the state on."""
    own, children = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    return Entry(int(fields[1]), int(fields[3]), int(fields[21]) * PAGE_BYTES, int(fields[17]), fields[19], own + children, children)


# -- limits that the kernel holds, by bash's ulimit --

KERNEL_OF_NAMESPACES = (5, 14)  # since then, RLIMIT_NPROC counts the processes of each user namespace apart (user_namespaces(7))
OF_SANDBOX = 2  # processes of an isolated payload beside its wrapper and its script: see executors.is_of_sandbox


def process_limit_text(max_processes: int, isolation: str) -> str:
    """Return a line of shell that limits processes and threads of an isolated script; empty if that would count those of others.

    It leaves one more than allowed, which `Usage.look` sees. The kernel spares root; a lower limit of the site stays.
    """
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    counts = isolation == "user" or (isolation and found and (int(found[1]), int(found[2])) >= KERNEL_OF_NAMESPACES)
    return f"ulimit -u {max_processes + OF_SANDBOX + 1} 2>/dev/null\n" if max_processes and counts else ""


def file_limit_text(max_work_bytes: int) -> str:
    """Return a line of shell that limits the size of each file a script writes to just above that of its work folder.

    It is a soft limit: a script that needs a larger file elsewhere may raise it.
    """
    return f"ulimit -Sf {max_work_bytes // KIB + 1} 2>/dev/null; " if max_work_bytes else ""


class PayloadLimits(NamedTuple):
    """A running payload, and what it may use."""

    mark: str
    wrapper: int  # its process id; 0 if it is not known
    memory: int | None  # bytes
    cpu_s: float | None = None  # the CPU time that its control group has counted


class CpuTime:
    """Adds up the CPU time of one payload, look by look, also of processes that ended without a parent who waited for them.

    It may be less than what was used, as of processes that were never seen, but not more.
    """

    def __init__(self) -> None:
        self.lost = 0  # in clock ticks, as all here: of processes that are gone, and are in no count of the others yet
        self.seen: dict[tuple[int, str], Entry] = {}  # at the last look, by process id and start

    def add(self, entries: Mapping[int, Entry]) -> float:
        """Return what the payload has used so far, in seconds. `entries` are its processes."""
        now = {(pid, entry.start): entry for pid, entry in entries.items()}
        gone = sum(entry.cpu for key, entry in self.seen.items() if key not in now)
        inherited = sum(entry.cpu_of_children - self.seen[key].cpu_of_children for key, entry in now.items() if key in self.seen)
        self.lost = max(0, self.lost + gone - inherited)  # a parent may wait for a child long after that is gone
        self.seen = now
        return (self.lost + sum(entry.cpu for entry in now.values())) / TICKS_PER_S


def unshared_bytes(pids: Iterable[int], file_bytes: int = 0) -> int | None:
    """Return the memory of processes, each shared page counted once among those that share it; None if it cannot be read.

    `file_bytes` is what their own file systems in memory hold: what they have mapped of it counts once, too.
    """
    total = mapped = 0
    for pid in pids:
        try:
            text = read_proc(f"/proc/{pid}/smaps_rollup")
        except FileNotFoundError:
            if not os.path.exists("/proc/self/smaps_rollup"):
                return None  # a kernel before 4.14
            continue  # it ended
        except OSError:
            continue  # it ended, or changed its user
        found = {name: int(kib) * KIB for name, kib in re.findall(r"^(Pss|Pss_Shmem):\s+(\d+) kB", text, re.MULTILINE)}
        total += found.get("Pss", 0)
        mapped += found.get("Pss_Shmem", found.get("Pss", 0))  # kernels before 5.9 do not tell them apart
    return max(total, total - mapped + file_bytes)


def in_memory_files(pids: Iterable[int]) -> int:
    """Return how many bytes are in /dev/shm of isolated processes, and in /dev: these are no process's memory, but use as much.

    A script may have put links there, which are not followed.
    """
    outside, used = {os.stat(path).st_dev for path in ("/dev", "/dev/shm") if os.path.isdir(path)}, dict[int, int]()
    for pid in pids:
        for inner in ((), ("shm",)):
            with contextlib.suppress(OSError), opened_folder(f"/proc/{pid}/root/dev", *inner) as folder:  # it ended, or has none
                device = os.fstat(folder).st_dev
                if device not in outside and device not in used:
                    state = os.fstatvfs(folder)
                    used[device] = (state.f_blocks - state.f_bfree) * state.f_frsize
    return sum(used.values())


def folder_bytes(folder: str, most_files: float = math.inf) -> int:
    """Return what the files below a folder take on the disk, of `most_files` or a folder more; links are not followed."""
    total, seen = 0, 0
    with contextlib.suppress(OSError), opened_folder(*os.path.split(folder), flags=os.O_RDONLY) as root:
        for here, _, names, count in walk_open(root, sys.maxsize, lambda *_: None):  # what is removed, or closed by the script, is left out
            total, seen = total + os.fstat(here).st_blocks * 512, seen + count
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.stat(name, dir_fd=here, follow_symlinks=False).st_blocks * 512
            if seen >= most_files:
                break
    return total


class Usage:
    """Compares what the payloads of one client use with their limits. One thread calls `look`."""

    def __init__(self, jobs: Path, max_processes: int, max_work_bytes: int, max_cpu_time_s: float, is_isolated: bool) -> None:
        """`jobs` has the folders of all payloads; a limit of 0 means none."""
        self.jobs, self.max_processes, self.max_work_bytes, self.max_cpu_time_s = jobs, max_processes, max_work_bytes, max_cpu_time_s
        self.is_isolated = is_isolated
        self.not_its_own = 1 + (OF_SANDBOX if is_isolated else 0)  # the wrapper, and what isolates
        self.scratch_bases = scratch_bases(os.environ)
        self.due = 0.0  # monotonic: the next look
        self.peaks: dict[str, int] = {}  # by mark: the most memory in bytes that was seen of a payload
        self.cpu_times = defaultdict[str, CpuTime](CpuTime)  # by mark

    def most_inside(self) -> int:
        """Return how many processes and threads a payload may have without its wrapper; 0: no limit."""
        return self.max_processes + self.not_its_own - 1 if self.max_processes else 0

    def is_due(self, has_memory_limits: bool) -> bool:
        """Tell whether there are limits, and it is time for the next look."""
        has_limits = has_memory_limits or self.max_processes or self.max_work_bytes or self.max_cpu_time_s
        return bool(has_limits) and time.monotonic() >= self.due

    def look(self, payloads: Iterable[PayloadLimits]) -> dict[str, str]:
        """Return by mark what these payloads use too much of."""
        begun = time.monotonic()
        running = {payload.mark: payload for payload in payloads}
        self.peaks = {mark: peak for mark, peak in self.peaks.items() if mark in running}
        over: dict[str, str] = {}
        for mark in self.cpu_times.keys() - running.keys():
            del self.cpu_times[mark]
        counts = self.max_processes or self.max_cpu_time_s or any(payload.memory is not None for payload in running.values())
        for mark, pids, entries in self.members(running) if counts else ():
            limit = running[mark].memory
            files = in_memory_files(pids) if limit is not None and self.is_isolated else 0
            memory = sum(entries[pid].memory for pid in pids) + files
            if limit is not None and memory > limit:  # shared pages count more than once: look closely
                unshared = unshared_bytes(pids, files)
                memory = memory if unshared is None else unshared
                if memory > limit:
                    used, most = sizes_text(memory, limit)
                    over[mark] = Reason.OVER_MEMORY.format(used=used, limit=most)
            self.peaks[mark] = max(memory, self.peaks.get(mark, 0))
            count = sum(entries[pid].threads for pid in pids) - self.not_its_own
            if self.max_processes and count > self.max_processes:
                over.setdefault(mark, Reason.OVER_PROCESSES.format(used=count, limit=self.max_processes))
            if self.max_cpu_time_s:
                used_s = max(self.cpu_times[mark].add({pid: entries[pid] for pid in pids}), running[mark].cpu_s or 0.0)
                if reason := self.over_cpu_time(used_s):
                    over.setdefault(mark, reason)
        for mark in running if self.max_work_bytes else ():
            reason = self.over_work(mark)
            if reason:
                over.setdefault(mark, reason)
        now = time.monotonic()
        self.due = now + max(LOOK_S, SHARE * (now - begun))
        return over

    def over_cpu_time(self, used_s: float | None) -> str:
        """Return how much too much CPU time a payload has used; empty if it is within its limit, or there is none, or it is not known."""
        is_over = self.max_cpu_time_s and used_s is not None and used_s > self.max_cpu_time_s
        return Reason.OVER_CPU_TIME.format(used=used_s, limit=self.max_cpu_time_s) if is_over else ""

    def over_work(self, mark: str, most_files: float = math.inf) -> str:
        """Return how much too much is in the work folder and TMPDIR of a payload; empty if it is within its limit, or there is none."""
        if not self.max_work_bytes:
            return ""
        # By their names: a script can change the link `tmp` in its payload's folder.
        scratch = [f"{base}/{scratch_name(mark)}" for base in dict.fromkeys(self.scratch_bases)]
        size = sum(folder_bytes(place, most_files) for place in (f"{self.jobs}/{mark}/work", f"{self.jobs}/{mark}/tmp", *scratch))
        used, limit = sizes_text(size, self.max_work_bytes)
        return Reason.OVER_WORK.format(used=used, limit=limit) if size > self.max_work_bytes else ""

    def at_end(self, mark: str, ended: Outcome, over: str) -> Outcome:
        """Return how a payload ended, with what it used too much of, if it was not known before: `over`, or its work folder.

        That is not looked at again if there are many files: the caller, who has more to do than this, must not wait for them.
        """
        over = over or (self.over_work(mark, MOST_AT_END) if ended.cause is None else "")
        if not over and ended.cause is None and self.max_work_bytes and ended.exit_status == 128 + signal.SIGXFSZ:
            over = Reason.OVER_FILE.format(limit=size_text(self.max_work_bytes))
        reason = Reason.OVER_EXIT.format(over=over, status=ended.exit_status)
        return dataclasses.replace(ended, cause=Cause.LIMIT, reason=reason) if over else ended

    def members(self, running: Mapping[str, PayloadLimits]) -> Iterable[tuple[str, list[int], dict[int, Entry]]]:
        """Yield each payload with its processes: those of its wrapper's session, all their children, and orphans with its mark."""
        entries = all_entries()
        children, sessions = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
        for pid, entry in entries.items():
            children[entry.parent].append(pid)
            sessions[entry.session].append(pid)
        orphans = defaultdict[str, list[int]](list)
        wrappers = {payload.wrapper for payload in running.values()}
        for pid in {*children[os.getpid()], *children[1]} - wrappers:
            for mark in running:
                if bears_mark(pid, mark):
                    orphans[mark].append(pid)
        for mark, payload in running.items():
            found, following = set[int](), [*orphans[mark]]
            following += [payload.wrapper, *sessions[payload.wrapper]] if payload.wrapper else []
            while following:
                pid = following.pop()
                if pid in entries and pid not in found:
                    found.add(pid)
                    following += children[pid]
            yield mark, sorted(found), entries
