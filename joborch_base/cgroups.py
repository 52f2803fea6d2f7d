"""Control groups of payloads (cgroup v2, cgroups(7)), if this client may make some.

1. Control groups
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from joborch_base.states import Reason
from joborch_base.vocabulary import log, size_text

# == 1. Control groups ==  The kernel counts what a payload uses, holds its limits, and ends all of its processes at once.

# They stand beside the group of this client, in one that somebody has delegated: systemd marks that (Delegate=, DelegateSubgroup=).
# The client's own group would not do: a group with processes cannot divide its memory, and a service manager could not start the
# client again there while payloads run.
DELEGATED = ("user.delegate", "trusted.delegate")  # extended attributes with the value 1 (systemd's CGROUP_DELEGATION)
CONTROLLERS = ("cpu", "memory", "pids")
CPU_PERIOD_US = 100_000  # of cpu.max, as the kernel has it
KILL_S = 5.0  # limit of the wait for the end of all processes after the kernel was told to kill them


def own_group() -> Path | None:
    """Return the folder of this process's group; None if cgroup v2 is not mounted."""
    text = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape")
    found = re.search(r"^0::(/.*)$", text, re.MULTILINE)
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines() if found else ():
        fields = line.split()
        root, place, kind = fields[3], fields[4], fields[fields.index("-") + 1]
        if found and kind == "cgroup2" and (found[1] + "/").startswith(root.rstrip("/") + "/"):
            return Path(place, os.path.relpath(found[1], root))
    return None


def delegated_group() -> tuple[Path | None, str]:
    """Return the group in which this client may make others; else None, and why there is none."""
    try:
        own = own_group()
        parent = own.parent if own else None
        if parent is None or not any(is_marked(parent, name) for name in DELEGATED):
            return None, "no control group is delegated to this client (systemd: Delegate=yes and DelegateSubgroup=client)"
        if not all(os.access(path, os.W_OK) for path in (parent, parent / "cgroup.procs", parent / "cgroup.subtree_control")):
            return None, f"this user may not change the control group {parent}"
        if (parent / "cgroup.procs").read_text(encoding="ascii"):
            return None, f"the control group {parent} has processes of its own"
    except (OSError, ValueError) as error:
        return None, str(error)
    return parent, ""


def is_marked(group: Path, name: str) -> bool:
    """Tell whether a group is delegated, by an extended attribute."""
    try:
        return os.getxattr(group, name) == b"1"
    except OSError:
        return False  # not set, or this user may not read it


class Groups:
    """The control groups of a client's payloads, each named by the payload's mark, so that a later process of the client finds them."""

    def __init__(self) -> None:
        self.parent, self.why_not = delegated_group()
        self.controllers: list[str] = []
        for name in CONTROLLERS if self.parent else ():
            with contextlib.suppress(OSError):  # not delegated, or in use by a hierarchy of cgroup v1
                Path(f"{self.parent}/cgroup.subtree_control").write_text(f"+{name}", encoding="ascii")
                self.controllers.append(name)

    def summary(self) -> str:
        """Return in one line what they do here."""
        if not self.parent:
            return f"payloads have no control groups: {self.why_not}; what they use is looked at once a second"
        held = f", which holds their limits of {', '.join(self.controllers)}" if self.controllers else " without limits"
        return f"each payload has a control group in {self.parent}{held}"

    def of(self, mark: str) -> Path | None:
        """Return the group of a payload, if it has one."""
        group = self.parent / f"joborch-{mark}" if self.parent else None
        return group if group and group.is_dir() else None

    def entry_text(self) -> str:
        """Return a line of shell of the wrapper by which a script enters its group, if that was made."""
        return f'{{ echo 0 >"{self.parent}/joborch-${{here##*/}}/cgroup.procs"; }} 2>/dev/null; ' if self.parent else ""

    def make(self, mark: str, memory_bytes: int, processes: int, cores: int) -> None:
        """Make the group of a payload with its limits (0: no limit). Without one, what it uses is looked at, as elsewhere."""
        if not self.parent:
            return
        group = self.parent / f"joborch-{mark}"
        try:
            self.fill(group, memory_bytes, processes, cores)
        except OSError as error:
            log.warning("payload %s has no control group: %s", mark, error)

    def fill(self, group: Path, memory_bytes: int, processes: int, cores: int) -> None:
        group.mkdir(exist_ok=True)
        for name, limit in (("cpu", cores and f"{cores * CPU_PERIOD_US} {CPU_PERIOD_US}"), ("memory", memory_bytes), ("pids", processes)):
            if limit and name in self.controllers:
                (group / f"{name}.max").write_text(str(limit), encoding="ascii")
        with contextlib.suppress(OSError):  # no limit of memory, or a machine without swap: else the script would slow it down
            (group / "memory.swap.max").write_text("0" if memory_bytes else "max", encoding="ascii")

    def over(self, mark: str, max_processes: int) -> str:
        """Return the limit at which the kernel has stopped a payload; empty if it has not."""
        group = self.of(mark)
        if group and number(group / "memory.events", r"^oom (\d+)$"):
            return Reason.OVER_MEMORY.format(used="all", limit=size_text(number(group / "memory.max") or 0))
        refused = bool(group and number(group / "pids.events", r"^max (\d+)$"))
        return Reason.OVER_PROCESSES.format(used=max_processes + 1, limit=max_processes) if refused else ""

    def cpu_s(self, mark: str) -> float | None:
        """Return the CPU time that a payload's group has used; None if it has none."""
        group = self.of(mark)
        used_us = number(group / "cpu.stat", r"^usage_usec (\d+)$") if group else None
        return None if used_us is None else used_us / 1e6

    def is_populated(self, mark: str) -> bool:
        """Tell whether a process of a payload's script runs, by its group."""
        group = self.of(mark)
        return bool(group and number(group / "cgroup.events", r"^populated (\d+)$"))

    def kill(self, mark: str) -> bool:
        """Kill all processes in a payload's group; return whether there were some. Kernels before 5.14 cannot."""
        group = self.of(mark)
        if not group or not self.is_populated(mark):
            return False
        try:
            (group / "cgroup.kill").write_text("1", encoding="ascii")
        except OSError as error:
            log.debug("control group %s: %s", group, error)
            return False
        end = time.monotonic() + KILL_S
        while self.is_populated(mark) and time.monotonic() < end:
            time.sleep(0.005)
        return True

    def remove_group(self, mark: str) -> tuple[int | None, float | None]:
        """Remove the group of a payload that is over; return its peak memory (bytes) and CPU time (seconds), None for what is unknown."""
        group = self.of(mark)
        if not group:
            return None, None
        peak, cpu_s = number(group / "memory.peak"), self.cpu_s(mark)
        for place, _, _ in os.walk(group, topdown=False):  # a script may have made groups in it
            with contextlib.suppress(OSError):  # removed by another thread
                os.rmdir(place)
        return peak, cpu_s


def number(path: Path, pattern: str = r"^(\d+)$") -> int | None:
    """Return the number that a file of a control group has; None if there is none, as where its controller is missing."""
    try:
        found = re.search(pattern, path.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
