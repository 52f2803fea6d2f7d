"""The start of joborch.pyz, where it is packed as `__main__.py`: unpack the archive once, and run the copy with its byte code.

Compiling the program takes ten times longer than starting it. So the first start unpacks the archive into the user's cache
folder, under the SHA-256 of the archive, and compiles it. Every start checks who could change that folder and runs from it.
If there is no such folder and none can be created, the program runs from the archive.

Python 3.6 must be able to parse this file, because it is still the `python3` of many machines.
"""

import sys

if sys.version_info < (3, 9):  # noqa: UP036
    import shutil

    newer = [name for name in (f"python3.{minor}" for minor in range(15, 8, -1)) if shutil.which(name)]
    remedy = f"try {newer[0]}" if newer else "try python3.11, or `module load python`"
    this = ".".join(map(str, sys.version_info[:3]))
    sys.stderr.write(f"joborch needs Python 3.9 or later, and this is {this}: {remedy}\n")
    sys.exit(2)

import ctypes
import gc
import os
import signal

if __name__ == "__main__":
    if sys.argv[1:2] in (["server"], ["client"]):  # a reload or a drain at the start would kill it: they wait (see take_signals)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))
    # PR_SET_DUMPABLE, before anything that takes time: the environment may hold a token.
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)

VERSION = "unknown"  # build_zipapp.py writes the version of joborch here

DAY_S = 24 * 60 * 60
KEEP_S = 30 * DAY_S  # a copy that was not used for this long is removed
OWN = ("__main__.py", "licenses/")  # what stays in the archive


class Member:
    """One file of the archive: the offset of its local header, how it is packed, and its size."""

    def __init__(self, entry: bytes) -> None:
        self.method = int.from_bytes(entry[10:12], "little")
        self.crc = int.from_bytes(entry[16:20], "little")
        self.packed_bytes = int.from_bytes(entry[20:24], "little")
        self.size = int.from_bytes(entry[24:28], "little")
        self.offset = int.from_bytes(entry[42:46], "little")


def directory(archive: bytes) -> "dict[str, Member]":
    """Return the files of an archive by name (APPNOTE 6.3.10, 4.3.12). Importing zipfile would take too long."""
    found = {}
    at = int.from_bytes(archive[-6:-2], "little")
    while archive[at : at + 4] == b"PK\1\2":
        name_end = at + 46 + int.from_bytes(archive[at + 28 : at + 30], "little")
        name = archive[at + 46 : name_end].decode("ascii")
        if not name.startswith(OWN):
            found[name] = Member(archive[at : at + 46])
        at = name_end  # build_zipapp.py writes neither extra fields nor comments
    if "joborch.py" not in found:
        raise ValueError("the archive is damaged")
    return found


def content(archive: bytes, member: Member) -> bytes:
    """Return a file of the archive, unpacked. Raises ValueError if it is damaged."""
    import zlib

    lengths = archive[member.offset + 26 : member.offset + 30]
    start = member.offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    data = archive[start : start + member.packed_bytes]
    if member.method == 8:
        try:
            data = zlib.decompress(data, -15)
        except zlib.error:
            data = b""
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise ValueError("the archive is damaged")
    return data


def check_owner(folder: str, own: int) -> None:
    """Raise PermissionError if another user can replace `folder` or its content, or that of the folders above it.

    The first `own` of these folders and all others must belong to root or this user, and nobody else may write to them. The
    others may also be sticky like /tmp, or writable by a group without other members. Symbolic links are resolved first.
    """
    folder = os.path.realpath(folder)
    while True:
        state = os.lstat(folder)
        sticky = state.st_mode & 0o1000 and own <= 0
        if state.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{folder} belongs to user {state.st_uid}")
        if state.st_mode & 0o002 and not sticky:
            raise PermissionError(f"{folder} is writable by every user")
        if state.st_mode & 0o020 and not sticky and (own > 0 or not is_private_group(state.st_gid)):
            raise PermissionError(f"{folder} is writable by a group")
        if folder == os.path.dirname(folder):
            return
        folder, own = os.path.dirname(folder), own - 1


def is_private_group(gid: int) -> bool:
    """Tell whether a group has no other members than this user and root. With one group per user, folders may be group-writable."""
    if gid == 0 or gid != os.getegid():
        return gid == 0
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return gid == os.geteuid()
    return user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


def cache_folder() -> str:
    """Return the folder for all copies: `joborch` in the user's cache folder (XDG Base Directory Specification).

    Raises OSError if the user has none.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        raise FileNotFoundError("this user has no home folder")
    return os.path.join(cache, "joborch")


def make_folder(folder: str) -> None:
    """Create a folder and its parent, closed to others, unless they exist. Raises PermissionError in another user's folder."""
    for each in (os.path.dirname(folder), folder):
        if not os.path.isdir(each):
            check_owner(os.path.dirname(each), own=0)
            try:
                os.mkdir(each, 0o700)
            except FileExistsError:
                pass  # another start was faster
    check_owner(folder, own=1)


def write_file(path: str, data: bytes) -> None:
    """Write a file atomically and durably: readers, also after a crash, see either the old or the new content."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    partial = f"{path}.{os.urandom(8).hex()}"
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def is_whole(path: str, member: Member) -> bool:
    """Tell whether a file of the copy exists with its full size: a crash of the machine or a clean-up may have removed it."""
    try:
        return os.stat(path).st_size == member.size
    except FileNotFoundError:
        return False


def fill(folder: str, archive: bytes, members: "dict[str, Member]") -> None:
    """Write the files of the archive that `folder` lacks."""
    for name, member in members.items():
        path = os.path.join(folder, name)
        if not is_whole(path, member):
            write_file(path, content(archive, member))


def unpack(folder: str, archive: bytes, members: "dict[str, Member]") -> None:
    """Create `folder` with all files of the archive, in one step. Of two concurrent starts, the first one wins."""
    import shutil

    make_folder(os.path.dirname(folder))
    partial = os.path.join(os.path.dirname(folder), f".{os.urandom(16).hex()}")
    os.mkdir(partial, 0o700)
    try:
        fill(partial, archive, members)
        os.rename(partial, folder)
    except OSError:
        if not os.path.isdir(folder):
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sweep(os.path.dirname(folder), os.path.basename(folder))


def sweep(folder: str, keep: str) -> None:
    """Remove copies of other versions, and leftovers of killed starts, that were not used for 30 days."""
    import shutil
    import time

    def is_old(path: str) -> bool:
        return os.lstat(path).st_mtime < time.time() - KEEP_S

    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        gone = os.path.join(folder, f".{os.urandom(16).hex()}")
        try:
            if name != keep and (len(name) == 64 or name.startswith(".")) and is_old(path):
                os.rename(path, gone)
                if is_old(gone):
                    shutil.rmtree(gone, ignore_errors=True)
                else:
                    os.rename(gone, path)  # it was started meanwhile
        except OSError:
            continue  # another start was faster


def touch(folder: str) -> None:
    """Touch the copy once a day, so that other starts keep it. The program does the same while it runs."""
    import time

    try:
        if os.stat(folder).st_mtime < time.time() - DAY_S:
            os.utime(folder)
    except OSError:
        pass  # read-only: then nobody removes it either


def byte_code(path: str) -> str:
    """Return where this Python looks for the byte code of a file."""
    from importlib.util import cache_from_source

    return cache_from_source(path)


def compile_all(folder: str, names: "list[str]") -> None:
    """Write the byte code of all modules for this Python. That of joborch.py is last: if it exists, all do.

    Python does not compare it with its source (unchecked hash, PEP 552), because neither of them changes.
    """
    import marshal
    import warnings
    from importlib.util import MAGIC_NUMBER, source_hash

    for name in sorted(names, key=lambda name: (name == "joborch.py", name)):
        path = os.path.join(folder, name)
        with open(path, "rb") as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code = compile(source, path, "exec", dont_inherit=True)
            except SyntaxError:
                continue  # a module of a package for newer versions of Python
        write_file(byte_code(path), MAGIC_NUMBER + b"\1\0\0\0" + source_hash(source) + marshal.dumps(code))


def ready_copy(archive: bytes, digest: str) -> str:
    """Return the folder with the copy of this archive; create it if it is missing. Raises OSError if it cannot be trusted."""
    folder = os.path.join(cache_folder(), digest)
    members = directory(archive)
    umask = os.umask(0o077)
    try:
        if not os.path.isdir(folder):
            unpack(folder, archive, members)
        check_owner(folder, own=2)
        touch(folder)
        fill(folder, archive, members)
        if not os.path.exists(byte_code(os.path.join(folder, "joborch.py"))):
            try:
                compile_all(folder, [name for name in members if name.endswith(".py")])
            except OSError:
                pass  # a full disk: Python compiles in memory
    finally:
        os.umask(umask)
    return folder


def copy_in_memory(archive: bytes) -> str:
    """Return the path of a copy of the archive in memory. Raises OSError if this kernel cannot do that, or without /proc."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this Python cannot create files in memory")
    copy = os.memfd_create("joborch.pyz")
    with open(copy, "wb", closefd=False) as file:
        file.write(archive)
    os.stat(f"/proc/self/fd/{copy}")
    return f"/proc/self/fd/{copy}"


def choose_copy(path: str) -> "tuple[str, bytes, str]":
    """Make Python import the program from its copy in the cache or, for a server or client without one, from memory.

    Return the path of the archive, its SHA-256 and why there is no copy.
    """
    import hashlib

    with open(path, "rb") as file:
        archive = file.read()
    digest = hashlib.sha256(archive)
    try:
        sys.path[0] = ready_copy(archive, digest.hexdigest())
    except (OSError, ValueError) as error:
        if {"server", "client"}.intersection(sys.argv[1:]):
            try:  # a newer file may replace the archive while the process runs
                sys.path[0] = copy_in_memory(archive)
            except OSError:
                pass  # it runs from the archive
        return path, digest.digest(), str(error)
    return path, digest.digest(), ""


def main() -> int:
    """Run the program."""
    if sys.argv[1:] == ["--version"]:
        print(f"joborch {VERSION}")
        return 0
    path = os.path.abspath(os.path.dirname(__file__))
    archive = choose_copy(path) if os.path.isfile(path) else None  # else it was unpacked by hand
    sys.dont_write_bytecode = True  # on a full disk Python would write half a file and fail on it at every later start
    gc.disable()  # an import creates almost no garbage; collecting would take a tenth of the time
    from joborch_plugins import commands

    if commands.takes(sys.argv[1:]):  # a command for people with jobs does without the program
        gc.enable()
        commands.use_utf8()
        return commands.main(sys.argv[1:])
    import joborch

    gc.enable()
    joborch.Program.archive = archive
    return joborch.main()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while it starts: later the command says how to continue
        sys.stderr.write("joborch: interrupted\n")
        sys.exit(130)
