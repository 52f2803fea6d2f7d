"""What /proc says of the processes of this machine (proc(5)).

1. Processes
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator

from joborch_base.files import libc
from joborch_base.vocabulary import log

# == 1. Processes ==  Lists processes, and tells whether one of a script holds a socket.


def read_proc(path: str) -> str:
    """Return the text of a file of proc(5). Raises OSError. Path.read_text takes twice as long."""
    with open(path, "rb", buffering=0) as file:
        return file.readall().decode("utf-8", "surrogateescape")


def all_stats() -> Iterator[tuple[int, list[str]]]:
    """Yield the process id of every process that is not a zombie, and its fields in /proc/PID/stat from the state on (proc(5))."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            text = read_proc(f"/proc/{name}/stat")
        except OSError:
            continue  # it ended
        fields = text.rpartition(")")[2].split()
        if fields[0] not in ("Z", "X"):
            yield int(name), fields


KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}  # the number of keyctl(2), by machine
JOIN_SESSION_KEYRING = 1


def leave_keyring() -> None:
    """Give this thread, and what it starts, a new session keyring (keyrings(7)). Scripts get no keys of the old one, as Kerberos tickets.

    A kernel or a container without keyrings refuses this call to a script as well, so only a full quota matters.
    """
    number = KEYCTL.get(os.uname().machine)
    if number and libc().syscall(number, JOIN_SESSION_KEYRING, None) < 0 and ctypes.get_errno() == errno.EDQUOT:
        log.warning(
            "a script can use the keys of this client, because this user may have no more keyrings: raise kernel.keys.maxkeys (sysctl)"
        )


HOST_NETWORK = ("JOBORCH_NETWORK", "host")  # in the environment of isolated payloads that have the network of this machine


def host_network_note() -> str:
    """Return the path of the file that exists since a client of this user on this machine has started such a payload.

    /dev/shm, because other places differ between processes of one user: XDG_RUNTIME_DIR by login, /tmp by PrivateTmp of systemd.
    """
    return f"/dev/shm/joborch-{os.geteuid()}-host-network"


def note_host_network() -> None:
    """Note that there are such payloads, before one starts. Raises OSError, also if the note belongs to another user."""
    path = host_network_note()
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        if os.fstat(number).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"{path} belongs to another user, who could remove it: remove it first")
    finally:
        os.close(number)


def is_scripts_socket(inode: int) -> bool:
    """Tell whether a script that is isolated, but has this machine's network, may hold a TCP socket of this user.

    A look at all processes takes milliseconds, so it is spared where no such script can be: without the note, and for root, whose
    scripts have users of their own.

    Its wrapper shows in its environment which payload it runs; a script cannot change that, and its processes stay below their
    wrapper, because process 1 of their namespace takes over orphans. They may come and go faster than one looks. So while there are
    such scripts, another process must be seen to hold the socket.
    """
    if os.geteuid() == 0 or (os.path.isdir("/dev/shm") and not os.path.lexists(host_network_note())):
        return False
    own = {pid: int(fields[1]) for pid, fields in all_stats() if is_own_process(pid)}
    children = defaultdict[int, list[int]](list)
    for pid, parent in own.items():
        children[parent].append(pid)
    scripts, following = set[int](), [pid for pid in own if has_host_network(pid)]
    while following:
        pid = following.pop()
        if pid not in scripts:
            scripts.add(pid)
            following += children[pid]
    return bool(scripts) and (holds(scripts, inode) or not holds(own.keys() - scripts, inode))


def is_own_process(pid: int) -> bool:
    """Tell whether a process is of this user."""
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except OSError:
        return False  # it ended


def has_host_network(pid: int) -> bool:
    """Tell whether a process belongs to an isolated payload that has the network of this machine, by its environment."""
    try:
        environment = "\0" + read_proc(f"/proc/{pid}/environ")
    except OSError:
        return False  # it ended, or hides it
    return f"\0{'='.join(HOST_NETWORK)}\0" in environment and "\0JOBORCH_MARK=" in environment


def holds(pids: Iterable[int], inode: int) -> bool:
    """Tell whether one of these processes holds a socket."""
    wanted = f"socket:[{inode}]"
    for pid in pids:
        with contextlib.suppress(OSError):  # it ended, or hides it
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):  # closed
                    if os.readlink(f"/proc/{pid}/fd/{number}") == wanted:
                        return True
    return False
