"""JOBORCH_ISOLATION: keeps the payloads of the executor `local` apart from each other, and from their client.

1. Values
2. Trial
3. Sandbox
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import grp
import os
import pwd
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Callable

from joborch import (
    LOCK_HELD,
    Config,
    ConfigError,
    DataFolder,
    Finding,
    client_token_file,
    last_line,
    log,
    one_line,
    passed_on,
    plural,
    read_exit,
    shown_value,
    wrapper_text,
)

# == 1. Values ==  What each value of JOBORCH_ISOLATION puts before the command that runs a script.

MEANING = {
    "none": "a script can change other users' files, stop their scripts, and do what this user can",
    "process": "all processes of a script end with it, and it sees no others; its files are not apart from those of others",
    "full": "a script sees its own files and the system's; the system's are read-only",
    "user": "a script sees its own files and the system's, which are read-only, and runs as a user of its own",
}


def process_words(config: Config) -> str:
    """Return the command that runs a script in a PID namespace (unshare(1)); root needs no user namespace for that.

    What is mounted later outside, as by an automounter, is seen inside, too.
    """
    user = "" if os.geteuid() == 0 else "--user --map-current-user "
    return f"unshare {user}--mount --propagation slave --pid --fork --kill-child --mount-proc"


SYSTEM = (  # what a script may read besides its own files, if this machine has it
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/sys", "/nix", "/gnu", "/snap"),
    *("/var/cache/fontconfig", "/var/lib/texmf", "/var/lib/ca-certificates"),
)
HIDDEN = ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")  # folders that are not there
RESOLVER = "/etc/resolv.conf"


def full_words(config: Config, more: Sequence[str] = (), last: str = "") -> str:
    """Return the command that runs a script in namespaces made by bwrap(1). Only the files that are listed here exist inside.

    `more` are further options, and `last` is the text of options that follow those for paths; the wrapper's `$6` has those for GPUs.
    /tmp is the payload's TMPDIR, and its home: so both are on the disk, limited, and removed with the payload.
    """
    shown = [path for path in SYSTEM if os.path.isdir(path)]
    words = ["bwrap", "--unshare-pid", "--unshare-ipc", "--as-pid-1", "--die-with-parent", "--cap-drop", "ALL", *more]
    words += [] if config.network == "host" else ["--unshare-net"]
    words += [word for path in shown for word in shown_words(path)]
    words += ["--proc", "/proc", "--dev", "/dev"]
    # The kernel lets user 0 change these without any privilege, among them core_pattern: a program that it runs outside, as root.
    words += ["--ro-bind", "/proc/sys", "/proc/sys"] if os.geteuid() == 0 else []
    if config.network == "host" and os.path.islink(RESOLVER) and os.path.exists(RESOLVER):  # often a link to /run
        words += ["--ro-bind", os.path.realpath(RESOLVER), os.path.realpath(RESOLVER)]
    read_only = ["/"]
    if is_below(config.data_path, shown):
        words += ["--tmpfs", config.data_path]
        read_only.append(config.data_path)
    words += [word for path in own_files(config) if is_below(path, shown) for word in ("--ro-bind", "/dev/null", os.path.realpath(path))]
    words += [word for name in HIDDEN for word in ("--unsetenv", name)]
    words += ["--setenv", "TMPDIR", "/tmp", "--setenv", "HOME", "/tmp"]
    after = []
    for path in config.bind:
        after += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    for path in config.bind_rw:
        after += ["--bind", path, path]
    locked = shlex.join(word for path in read_only for word in ("--remount-ro", path))
    return f'{shlex.join(words)} $6 --bind "$TMPDIR" /tmp {BIND_WORK} {shlex.join(after)} {last} {locked}'


def shown_words(path: str) -> tuple[str, str, str]:
    """Return the options that show a folder of the system; a link as one, because it costs less: /bin is often a link to /usr/bin."""
    is_link = os.path.islink(path) and is_below(path, ["/usr"]) and not os.path.isabs(os.readlink(path))
    return ("--symlink", os.readlink(path), path) if is_link else ("--ro-bind", path, path)


def user_words(config: Config) -> str:
    """Return the command that runs a script as `full` does, and as the user whose id is the wrapper's `$5`.

    Root makes the namespaces, so the machine need not let users make any. The capabilities are for the change of user and of the
    folder, and end with root's user id. That change also ends what --die-with-parent has set, so it is set again.
    """
    capabilities = ("CAP_SETUID", "CAP_SETGID", "CAP_DAC_READ_SEARCH")
    own = '--perms 1777 --tmpfs /dev/shm --ro-bind "$here/passwd" /etc/passwd --ro-bind "$here/group" /etc/group --chmod 0755 "$here"'
    opened = shlex.join(word for path in folders_made(config) for word in ("--chmod", "0755", path))
    full = full_words(config, [word for name in capabilities for word in ("--cap-add", name)], f"{own} {opened}")
    return f"{full} setpriv --reuid=$5 --regid=$5 --clear-groups --pdeathsig=KILL"


def folders_made(config: Config) -> list[str]:
    """Return the folders that bwrap makes as it binds paths into them, apart from the payload's own: they are closed to other users."""
    bound = [path for path in (*SYSTEM, *config.bind, *config.bind_rw) if os.path.isdir(path)]
    folders = {str(folder) for path in (*bound, config.data_path) for folder in Path(path).parents}
    made = [folder for folder in folders if folder not in ("/", "/tmp") and not is_below(folder, bound)]
    return [*made, config.data_path, f"{config.data_path}/jobs"]


BIND_WORK = '--bind "$here/work" "$here/work" --chdir "$here/work"'  # variables of the wrapper


def own_files(config: Config) -> list[str]:
    """Return the files of this client that a script must not read, and that may be in a folder of the system, as /etc."""
    token = client_token_file()
    files = (config.token_file, config.env_file, config.dirac_credentials, str(token or ""), config.db_path)
    return [path for path in map(os.path.expanduser, files) if os.path.isfile(path)]


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Tell whether a path is one of these folders, or in one of them, after all links."""
    real = os.path.realpath(path)
    return any(os.path.commonpath((real, os.path.realpath(folder))) == os.path.realpath(folder) for folder in folders)


NOT_TO_BIND = ("/proc", "/dev", "/tmp", "/run", "/sys")  # these are new inside, or hold the sockets of servers


def check_paths(config: Config) -> None:
    """Raise ConfigError if a path of JOBORCH_BIND or JOBORCH_BIND_RW cannot be shown to scripts."""
    own = (config.data_path, os.path.expanduser("~"), *own_files(config))
    for name, paths in (("JOBORCH_BIND", config.bind), ("JOBORCH_BIND_RW", config.bind_rw)):
        for path in paths:
            real, what = os.path.realpath(path), f"{name} has {path!r}"
            if not os.path.exists(path):
                raise ConfigError(f"{what}, which does not exist: create it, or remove it from {name}")
            if real != path:
                raise ConfigError(f"{what}, which is a link, or below one: give {real!r} instead")
            if path in NOT_TO_BIND or any(is_below(place, [path]) for place in own):
                raise ConfigError(f"{what}, which contains what scripts must not see, as this client's own files: give folders below it")
            if is_below(path, [config.data_path]):
                raise ConfigError(f"{what}, which is in DATA_PATH: move it elsewhere")


WORDS: dict[str, Callable[[Config], str]] = {"process": process_words, "full": full_words, "user": user_words}
PROGRAMS = {  # each with what it is part of
    "process": {"unshare": "util-linux 2.36 or later"},
    "full": {"bwrap": "bubblewrap 0.4 or later"},
    "user": {"bwrap": "bubblewrap 0.5 or later", "setpriv": "util-linux 2.33 or later"},
}


# -- GPUs --

GPU_FILE = "/dev/nvidia"  # and a number: one for each GPU
GPU_COMMON = ("/dev/nvidia[!0-9]*", "/dev/dri", "/dev/kfd", "/dev/dxg")  # for all of them
GPU_FACTS = "/proc/driver/nvidia/gpus"  # of NVIDIA's driver: a folder for each GPU, in the order of nvidia-smi


def gpu_words(gpus: Sequence[str] | None) -> tuple[str, list[str]]:
    """Return the options of bwrap(1) that show the device files of these GPUs, and the names that programs know them by inside.

    None means all of this machine. What is not told apart by files, as MIG devices, has the files of all GPUs.
    """
    files = found(f"{GPU_FILE}[0-9]*")
    names, chosen = list(gpus or ()), files
    if gpus is not None:
        known = [known_gpu(gpu) for gpu in gpus]
        own = [f"{GPU_FILE}{minor}" for minor, _ in known]
        if set(own) <= set(files):
            # CUDA counts the GPUs that it sees, so a number means another one inside; an id does not.
            names, chosen = [uuid or gpu for gpu, (_, uuid) in zip(gpus, known)], own
    shown = [*chosen, *found(*GPU_COMMON)]
    return " ".join(f"--dev-bind {path} {path}" for path in shown), names


def found(*patterns: str) -> list[str]:
    """Return the paths that match one of these patterns."""
    return [path for pattern in patterns for path in sorted(glob.glob(pattern))]


def known_gpu(gpu: str) -> tuple[str, str]:
    """Return the number in a GPU's device file, and its id; empty for what is not known. `gpu` is a number of nvidia-smi, or an id."""
    facts = [gpu_facts(folder) for folder in sorted(glob.glob(f"{GPU_FACTS}/*"))]
    for number, (minor, uuid) in enumerate(facts):
        if gpu == str(number) or (uuid and uuid.startswith(gpu)):
            return minor, uuid
    return ("" if facts or not gpu.isdigit() else gpu), ""


def gpu_facts(folder: str) -> tuple[str, str]:
    """Return the number in the device file, and the id, of a GPU that NVIDIA's driver describes."""
    try:
        text = Path(folder, "information").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    minor, uuid = (re.search(rf"^{name}:\s*([\w-]+)\s*$", text, re.MULTILINE) for name in ("Device Minor", "GPU UUID"))
    return minor[1] if minor else "", uuid[1] if uuid else ""


# -- users --

SUBORDINATE = {"user": "/etc/subuid", "group": "/etc/subgid"}  # ids that belong to users of containers: NAME:FIRST:COUNT


def why_not_free(uids: range) -> str:
    """Return which of these user and group ids somebody has; empty if nobody has one."""
    for kind, find in (("user", pwd.getpwuid), ("group", grp.getgrgid)):
        for number in uids:
            with contextlib.suppress(KeyError):
                return f"{number} is the id of the {kind} {find(number)[0]!r}"
        for name, first, last in subordinate_ids(SUBORDINATE[kind]):
            if first <= uids[-1] and uids[0] <= last:
                return f"{SUBORDINATE[kind]} gives {first}-{last} to {name!r}"
    return ""


def subordinate_ids(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield the owners of a file of subuid(5), each with the first and the last of the ids."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if found := re.fullmatch(r"([^:]+):([0-9]{1,10}):([0-9]{1,10})", line.strip()):
                yield found[1], int(found[2]), int(found[2]) + int(found[3]) - 1


def check_uids(config: Config) -> None:
    """Raise ConfigError if this client cannot run each script as a user of its own."""
    what = "JOBORCH_ISOLATION is 'user'"
    if os.geteuid() != 0:
        raise ConfigError(f"{what}, which needs root: run the client as root, or give full, which needs no privilege")
    if not config.uids:
        raise ConfigError(f"{what}: set JOBORCH_UIDS to user ids that nobody has, as in 20001-{20000 + max(config.slots, 64)}")
    given = f"JOBORCH_UIDS is {shown_value(config.uids)}"
    if len(config.uids) < config.slots:
        raise ConfigError(f"{given}, {plural(len(config.uids), 'id', 'ids')} for {config.slots} slots: give at least one for each slot")
    if reason := why_not_free(config.uids):
        raise ConfigError(f"{given}, but {reason}: give ids that nobody has")


UIDS_FILE = "/run/joborch/uids"  # of root; /run is empty after a boot


def hold_uids(uids: range) -> IO[bytes] | None:
    """Lock these user ids on this machine until the file that is returned is closed. Raises ConfigError if another client has some.

    The bytes of one file stand for all ids, so the kernel finds out whether two ranges overlap (fcntl(2)). None: no such file.
    """
    try:
        os.makedirs(os.path.dirname(UIDS_FILE), 0o700, exist_ok=True)
        file = open(os.open(UIDS_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "rb+", buffering=0)  # noqa: SIM115 - held
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, len(uids), uids[0])
        return file
    except OSError as error:
        if error.errno in LOCK_HELD:
            text = f"JOBORCH_UIDS is {shown_value(uids)}, but another client on this machine has some of these ids"
            raise ConfigError(f"{text}: give each client a range of its own") from error
        log.warning("no other client may use the ids of JOBORCH_UIDS, but that cannot be checked: %s", error)
        return None


def give_payload(folder: Path, scratch: str, uid: int) -> None:
    """Give a user what the script in a payload's folder may write to, and the files that name this user. Raises OSError.

    The work folder comes last: its owner tells whose the payload is (script_uid).
    """
    for name, line in (("passwd", f"joborch{uid}:x:{uid}:{uid}::/tmp:/bin/bash\n"), ("group", f"joborch{uid}:x:{uid}:\n")):
        path = folder / name
        path.write_bytes(Path("/etc", name).read_bytes().rstrip(b"\n") + b"\n" + line.encode())
        path.chmod(0o644)
    for name in ("stdout", "stderr"):  # a script may open /dev/stdout
        os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        os.chown(folder / name, uid, uid)
    os.chown(scratch, uid, uid)
    for place, folders, files in os.walk(folder / "work", topdown=False):
        for name in (*folders, *files):
            os.chown(f"{place}/{name}", uid, uid, follow_symlinks=False)
    os.chown(folder / "work", uid, uid)


# == 2. Trial ==  What this machine can do is tried with a real payload, not guessed.

TRIAL_S = 30.0  # limit of a trial; it takes some 20 ms
TRIAL_UID = 20001  # if JOBORCH_UIDS is not set
TRIAL = "[ $PPID = 1 ] && echo fine > $PWD/result"


def why_not(config: Config, isolation: str) -> str:
    """Return why a payload cannot run with this isolation, with the remedy; empty if it can."""
    for program, package in PROGRAMS[isolation].items():
        if not shutil.which(program):
            return f"there is no {program}: install {package}"
    uid = 0
    if isolation == "user":
        if os.geteuid() != 0:
            return "it needs root"
        uid = config.uids[0] if config.uids else TRIAL_UID
    with tempfile.TemporaryDirectory(prefix="joborch-trial-") as name:
        config, folder = dataclasses.replace(config, data_path=name), Path(name) / "jobs/trial.1"
        work, scratch = folder / "work", folder / "tmp"
        for place in (work, scratch):
            place.mkdir(parents=True)
        (work / "run.sh").write_text(TRIAL, encoding="ascii")
        data = DataFolder(name)
        data.umask = 0o077
        text = wrapper_text(data, here=True, inside=WORDS[isolation](config))
        command: list[str | bytes] = ["bash", "-c", text, "joborch-wrapper", str(folder), "1", "", "", str(uid)]
        environment = {**passed_on(os.environ), "TMPDIR": str(scratch)}
        try:
            if uid:
                give_payload(folder, str(scratch), uid)
            subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TRIAL_S, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return one_line(str(error))
        outcome = read_exit(folder)
        if outcome and outcome.exit_status == 0 and (work / "result").exists():
            return ""
        said = last_line(folder / "stderr") or "the script of the trial ended without a result"
    return f"{said}: {missing(' and '.join(PROGRAMS[isolation].values()))}"


SWITCHES = (  # in /proc/sys: a value that forbids user namespaces to users without privileges, and how to allow them
    ("user/max_user_namespaces", "0", "set the sysctl user.max_user_namespaces to 10000"),
    ("kernel/unprivileged_userns_clone", "0", "set the sysctl kernel.unprivileged_userns_clone to 1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "set the sysctl kernel.apparmor_restrict_unprivileged_userns to 0"),
)


def missing(package: str) -> str:
    """Return what this machine lacks for namespaces, as the remedy."""
    for name, value, remedy in SWITCHES if os.geteuid() != 0 else ():
        try:
            if Path("/proc/sys", name).read_text(encoding="ascii").strip() == value:
                return f"user namespaces are switched off: {remedy}"
        except OSError:
            continue  # this kernel has no such switch
    return f"this needs {package} and a machine, or a container, that may make namespaces: see docs/security.md"


# == 3. Sandbox ==  The value that was asked for, or no start: never less.


class PayloadSandbox:
    """How the payloads of a client are isolated: see joborch_base.executors.Sandbox."""

    def __init__(self, config: Config) -> None:
        self.config, self.isolation = config, config.isolation
        self.inside = WORDS[self.isolation](config) if self.isolation in WORDS else ""
        self.has_host_network = self.isolation in ("full", "user") and config.network == "host"
        self.uids = config.uids if self.isolation == "user" else range(0)
        self.all_gpus = gpu_words(None)[0] if self.isolation in ("full", "user") else ""

    give = staticmethod(give_payload)

    def hold(self) -> None:
        self.held = hold_uids(self.uids) if self.uids else None

    def gpus(self, ids: Sequence[str] | None) -> tuple[str, Sequence[str]]:
        if ids and self.isolation in ("full", "user"):
            return gpu_words(ids)
        return self.all_gpus if ids is None else "", ids or ()

    def check(self) -> None:
        """Raise ConfigError if this machine cannot isolate payloads in this way."""
        if self.isolation in ("full", "user"):
            check_paths(self.config)
        if self.isolation == "user":
            check_uids(self.config)
        elif self.has_host_network and os.geteuid() == 0:
            remedy = "run the client as a user, or give JOBORCH_ISOLATION=user"
            raise ConfigError(f"JOBORCH_NETWORK is 'host', but scripts of a client as root are root to every server here: {remedy}")
        reason = self.inside and why_not(self.config, self.isolation)
        if reason:
            raise ConfigError(f"JOBORCH_ISOLATION is {self.isolation!r}, which is not possible here: {reason}")

    def summary(self) -> str:
        """Return in one line what the isolation means and, if there is none, which values are possible here."""
        text = f"JOBORCH_ISOLATION is {self.isolation}: {MEANING[self.isolation]}"
        if self.has_host_network:
            text += "; JOBORCH_NETWORK is host: a server or client on this machine serves them only if they have a token"
        if self.inside:
            return text
        possible = [value for value in WORDS if not why_not(self.config, value)]
        return f"{text}; this machine can do {' and '.join(possible) or 'no better'}"

    def examine(self) -> Iterator[Finding]:
        yield Finding(True if self.inside else None, self.summary())
        for value in WORDS:
            reason = why_not(self.config, value)
            yield Finding(True, f"JOBORCH_ISOLATION={value} " + (f"is not possible here: {reason}" if reason else "works here"))


def make_sandbox(config: Config) -> PayloadSandbox:
    """Return the sandbox of a client. Raises ConfigError if this machine cannot do what is asked for."""
    made = PayloadSandbox(config)
    made.check()
    return made
