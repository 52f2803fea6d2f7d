#!/usr/bin/env python3
"""Build joborch.pyz: joborch, the packages it runs on and its example, in one file that any Python from 3.9 on starts.

    python3 build_zipapp.py             build; prints the size in bytes and the SHA-256
    python3 build_zipapp.py --lock      renew the lock files first: the newest releases that Python 3.9 can run

The same sources and the same lock files give the same bytes, with every Python and on every machine:

- pip only fetches. Every wheel must have the digest that a lock file names, whether it comes from an index or from
  build/wheels, where it is kept for the next build. A wheel is a ZIP, so its members are taken from it directly,
  and nothing is installed.
- Deflate gives other bytes with every release of zlib, so nothing is deflated here: what a wheel brings stays packed
  as its maker packed it, and our own files are stored.
- Members are sorted by name, dated 1980-01-01, mode 0644, made "by Unix". The headers are written here, after
  APPNOTE 6.3.10, since what zipfile puts into them is its own affair.

Only Python source goes in, with the few data files named in DATA, and the licences of all of it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
SHEBANG = b"#!/usr/bin/env python3\n"
SOURCES = ("joborch.py", "LICENSE", "example/run.sh", "example/2oob.pdb")
PLUGINS = "joborch_plugins"  # all modules of this package, and the files of the page
MAIN = "zipapp_main.py"  # __main__.py of the archive
LOCK = "requirements.lock"  # what joborch runs on
BUILD_LOCK = "build.lock"  # of what the files of Swagger UI are taken from: `pip install joborch` does without
CACHE = "build/wheels"

# The files of Swagger UI, and where they go. Their package brings nothing else that we want; it would import Django.
SWAGGER_PACKAGE = "drf-spectacular-sidecar"
SWAGGER_WHEEL_FOLDER = "drf_spectacular_sidecar/static/drf_spectacular_sidecar/swagger-ui-dist/"
SWAGGER_FOLDER = f"{PLUGINS}/swagger-ui/"
SWAGGER_FILES = ("LICENSE", "favicon-32x32.png", "swagger-ui-bundle.js", "swagger-ui.css")
DATA = {SWAGGER_FOLDER + name for name in SWAGGER_FILES}
LEFT_OUT = re.compile(r"[^/]+\.(dist-info|data)/|drf_spectacular_sidecar/|.*/tests/")

LICENCE = re.compile(r"^(?P<package>[^/]+)\.dist-info/(?:.*/)?(?P<file>(?:LICEN[CS]E|NOTICE|COPYING|AUTHORS)[^/]*)$")
PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+) \\\n {4}--hash=sha256:(?P<sha256>[0-9a-f]{64})$", re.MULTILINE)
PURE = ["--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none", "--python-version=3.9"]

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
END_RECORD = struct.Struct("<4s4H2IH")
ZIP_VERSION = 20  # 2.0: deflate and folders
MADE_BY_UNIX = 3 << 8 | ZIP_VERSION
DATE_1980_01_01 = 1 << 5 | 1
MODE_0644 = 0o100644 << 16


class BuildError(Exception):
    """The archive cannot be built; the text names the cause and the remedy."""


class Pin(NamedTuple):
    """One package of the lock file: what is bundled, and the digest of its pure Python wheel."""

    name: str
    version: str
    sha256: str


class Member(NamedTuple):
    """One file of the archive, with its bytes as they lie there: packed by `method` (0 stored, 8 deflated)."""

    name: str
    method: int
    crc: int
    size: int
    packed: bytes


# == Wheels ==


def read_lock(text: str) -> list[Pin]:
    """The packages that a lock file pins. Raises BuildError for a line that is no pin, digest or comment."""
    rest = re.sub(r"^(#.*)?\n", "", PIN.sub("", text), flags=re.MULTILINE).strip()
    if rest:
        raise BuildError(f"lock file: {rest.splitlines()[0]!r} is no pin with a digest: run build_zipapp.py --lock")
    pins = [Pin(*match.group("name", "version", "sha256")) for match in PIN.finditer(text)]
    if not pins:
        raise BuildError("the lock file pins no package: run build_zipapp.py --lock")
    return pins


def write_lock(pins: Iterable[Pin]) -> str:
    """The text of a lock file, which pip reads as well. The reverse of `read_lock`."""
    head = "# What joborch.pyz bundles: pure Python wheels for Python 3.9. To renew: python3 build_zipapp.py --lock\n"
    return head + "".join(f"{pin.name}=={pin.version} \\\n    --hash=sha256:{pin.sha256}\n" for pin in sorted(pins))


def wheels_by_digest(folder: Path) -> dict[str, Path]:
    """The wheels in `folder` by their SHA-256, read from their bytes: a name proves nothing."""
    return {hashlib.sha256(wheel.read_bytes()).hexdigest(): wheel for wheel in folder.glob("*.whl")}


def pip_download(folder: Path, *arguments: str) -> None:
    """Let pip fetch pure Python wheels into `folder`. Raises BuildError with pip's own words if it cannot."""
    if importlib.util.find_spec("pip") is None:
        raise BuildError(f"{sys.executable} has no pip: run '{sys.executable} -m ensurepip', or install python3-pip")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *PURE]
    command = [*pip, f"--dest={folder}", *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = done.stdout.strip() or f"exit status {done.returncode}"
        raise BuildError(f"pip cannot fetch the packages: is the network there, or PIP_INDEX_URL to be set?\n{said}")


def fetch(pins: Iterable[Pin], cache: Path) -> list[Path]:
    """The wheels of `pins`, in their order, from `cache` where they are there already and through pip where not."""
    cache.mkdir(parents=True, exist_ok=True)
    have = wheels_by_digest(cache)
    missing = [pin for pin in pins if pin.sha256 not in have]
    if missing:
        # Fetched beside the cache and moved in whole, so that two builds at once never read half a wheel.
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            wanted = Path(fresh, "wanted.txt")
            wanted.write_text(write_lock(missing), encoding="ascii")
            pip_download(Path(fresh), "--no-deps", "--require-hashes", "-r", str(wanted))
            for wheel in Path(fresh).glob("*.whl"):
                wheel.replace(cache / wheel.name)
        have = wheels_by_digest(cache)
    lost = [pin.name for pin in pins if pin.sha256 not in have]
    if lost:
        raise BuildError(f"{cache} lacks {', '.join(lost)} as the lock file pins it: delete the folder and build again")
    return [have[pin.sha256] for pin in pins]


# == Members ==


def stored(name: str, content: bytes) -> Member:
    """A member that is kept as it is."""
    return Member(name, zipfile.ZIP_STORED, zlib.crc32(content), len(content), content)


def place(name: str) -> str | None:
    """Where the wheel's member `name` goes in the archive; None for what is left out."""
    licence = LICENCE.match(name)
    if licence:
        return f"licenses/{licence['package']}/{licence['file']}"
    if name.startswith(SWAGGER_WHEEL_FOLDER):
        file = name[len(SWAGGER_WHEEL_FOLDER) :]
        return SWAGGER_FOLDER + file if file in SWAGGER_FILES else None
    return name if name.endswith(".py") and not LEFT_OUT.match(name) else None


def packed_bytes(wheel: bytes, entry: zipfile.ZipInfo) -> bytes:
    """The bytes of `entry` as they lie in the wheel, still packed."""
    *_, name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(wheel, entry.header_offset)
    start = entry.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    return wheel[start : start + entry.compress_size]


def wheel_members(path: Path) -> Iterator[Member]:
    """What of a wheel goes into the archive. Raises BuildError for what is compiled or zipimport cannot read."""
    wheel = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith((".so", ".pyd", ".dll", ".dylib")):
                raise BuildError(f"{path.name} is not pure Python: {entry.filename}")
            name = place(entry.filename)
            if name is None:
                continue
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BuildError(f"{path.name}: zipimport cannot unpack {entry.filename}, method {entry.compress_type}")
            yield Member(name, entry.compress_type, entry.CRC, entry.file_size, packed_bytes(wheel, entry))


def source_file(source: Path, name: str) -> bytes:
    """One of joborch's own files. Raises BuildError if it is missing."""
    try:
        return (source / name).read_bytes()
    except FileNotFoundError:
        raise BuildError(f"{source / name} is missing: build from a whole copy of the repository") from None


def source_members(source: Path) -> Iterator[Member]:
    """joborch's own files below `source`, without hidden ones. Raises BuildError if one of SOURCES is missing."""
    plugins = source / PLUGINS
    files = [path.relative_to(source) for path in (*plugins.rglob("*.py"), *plugins.glob("page/**/*")) if path.is_file()]
    names = {file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)}
    for name in (*SOURCES, *names):
        yield stored(name, source_file(source, name))


def main_module(source: Path) -> bytes:
    """`__main__.py` of the archive, which knows the version: `--version` need not import the program."""
    version = re.search(r'^__version__ = "[^"]+"$', source_file(source, "joborch.py").decode("utf-8"), re.MULTILINE)
    if version is None:
        raise BuildError("joborch.py has no line '__version__ = \"...\"'")
    main, count = re.subn(rb"(?m)^VERSION = .*$", version[0].replace("__version__", "VERSION").encode("ascii"), source_file(source, MAIN))
    if count != 1:
        raise BuildError(f"{MAIN} has not one line 'VERSION = ...'")
    return main


def members(source: Path, pins: Iterable[Pin], wheels: Iterable[Path]) -> dict[str, Member]:
    """All members by name. Raises BuildError if two files claim one name."""
    bundled = json.dumps({pin.name: pin.version for pin in pins}, indent=1, sort_keys=True) + "\n"
    found = [stored("__main__.py", main_module(source)), stored("bundled.json", bundled.encode("ascii")), *source_members(source)]
    for wheel in wheels:
        found += wheel_members(wheel)
    by_name = {member.name: member for member in found}
    if len(by_name) < len(found):
        raise BuildError(f"{len(found) - len(by_name)} files of the locked packages have the name of another")
    lacking = DATA - by_name.keys()
    if lacking:
        raise BuildError(f"the package of {BUILD_LOCK} lacks {', '.join(sorted(lacking))}: pin a release that brings them")
    return by_name


# == Archive ==


def archive_bytes(by_name: Mapping[str, Member]) -> bytes:
    """The archive: a shebang line, then a ZIP whose offsets count from the start of the file (APPNOTE 6.3.10, 4.3)."""
    body, directory = bytearray(SHEBANG), bytearray()
    for _, member in sorted(by_name.items()):
        name = member.name.encode("ascii")  # other names would need a flag, and we have none
        facts = (0, member.method, 0, DATE_1980_01_01, member.crc, len(member.packed), member.size, len(name), 0)
        directory += CENTRAL_HEADER.pack(b"PK\1\2", MADE_BY_UNIX, ZIP_VERSION, *facts, 0, 0, 0, MODE_0644, len(body))
        directory += name
        body += LOCAL_HEADER.pack(b"PK\3\4", ZIP_VERSION, *facts) + name + member.packed
    count = len(by_name)
    end = END_RECORD.pack(b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    return bytes(body + directory + end)


def write_executable(target: Path, content: bytes) -> None:
    """Put `content` at `target` in one step: whoever runs the old archive meanwhile keeps the old one whole."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.chmod(0o755)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def build(source: Path, target: Path, cache: Path) -> str:
    """Build the archive of `source` at `target`, with wheels kept in `cache`; return its SHA-256 in hexadecimal."""
    pins = [pin for lock in (LOCK, BUILD_LOCK) for pin in read_lock(source_file(source, lock).decode("ascii"))]
    content = archive_bytes(members(source, pins, fetch(pins, cache)))
    write_executable(target, content)
    return hashlib.sha256(content).hexdigest()


# == Lock file ==


def direct_dependencies(pyproject: str) -> list[str]:
    """The requirements in pyproject.toml's `dependencies`, which must be a list of strings over several lines."""
    # Python 3.9 has no TOML reader, but such a list reads the same in TOML and in Python.
    found = re.search(r"^dependencies = (\[.*?^\])", pyproject, re.MULTILINE | re.DOTALL)
    if found is None:
        raise BuildError("pyproject.toml has no 'dependencies = [' with its closing bracket on a line of its own")
    return [str(requirement) for requirement in ast.literal_eval(found[1])]


def newest(*requirements: str) -> list[Pin]:
    """The newest releases that Python 3.9 can run, of packages and of what these need."""
    with tempfile.TemporaryDirectory() as fresh:
        pip_download(Path(fresh), *requirements)
        found = [(digest, wheel.name.split("-")) for digest, wheel in wheels_by_digest(Path(fresh)).items()]
    return [Pin(name.replace("_", "-").lower(), version, digest) for digest, (name, version, *_) in found]


def renew_locks(source: Path) -> None:
    """Pin the newest releases of the direct dependencies, of what these need, and of the package with Swagger UI's files."""
    wanted = direct_dependencies((source / "pyproject.toml").read_text(encoding="utf-8"))
    (source / LOCK).write_text(write_lock(newest(*wanted)), encoding="ascii")
    (source / BUILD_LOCK).write_text(write_lock(newest("--no-deps", SWAGGER_PACKAGE)), encoding="ascii")


def main() -> int:
    """Build, after renewing the lock file if asked to; 0 when the archive is written, 1 when it cannot be."""
    parser = argparse.ArgumentParser(description="Build joborch.pyz.", epilog="Example: python3 build_zipapp.py")
    parser.add_argument("--output", type=Path, default=ROOT / "joborch.pyz", metavar="FILE", help="the archive")
    parser.add_argument("--lock", action="store_true", help=f"renew {LOCK} and {BUILD_LOCK} first, from pyproject.toml")
    arguments = parser.parse_args()
    try:
        if arguments.lock:
            renew_locks(ROOT)
        digest = build(ROOT, arguments.output, ROOT / CACHE)
    except BuildError as error:
        print(f"build_zipapp.py: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output.name}: {arguments.output.stat().st_size} bytes, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
