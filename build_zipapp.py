#!/usr/bin/env python3
"""Build joborch.pyz: joborch, the packages it needs and its example, in one file that runs with Python 3.9 or later.

    python3 build_zipapp.py                 build; prints the size in bytes and the SHA-256
    python3 build_zipapp.py --sbom FILE     also write what is in it, as CycloneDX 1.6 in JSON
    python3 build_zipapp.py --lock          first update the lock files to the newest releases that Python 3.9 can run

The same sources and lock files give the same bytes, with every Python and on every machine:

- pip only downloads. Every wheel must have the digest in a lock file, whether it comes from an index or from
  build/wheels, where it is kept for the next build. A wheel is a ZIP, so its members are copied from it directly,
  and nothing is installed.
- Deflate gives different bytes with each release of zlib, so nothing is deflated here: members of a wheel stay packed
  as they are, and our own files are stored.
- Members are sorted by name, dated 1980-01-01, mode 0644, made "by Unix". The headers are written here (APPNOTE 6.3.10),
  because those of zipfile may change.

The archive has only Python source, the few data files in DATA, and all licences.
"""

from __future__ import annotations

import argparse
import ast
import email.parser
import hashlib
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent
SHEBANG = b"#!/usr/bin/env python3\n"
VERSION_FILE = "joborch_base/vocabulary.py"
SOURCES = ("joborch.py", VERSION_FILE, "LICENSE", "example/run.sh", "example/2oob.pdb")
PLUGINS = "joborch_plugins"  # all modules of this package, and the files of the page
BASE = "joborch_base"  # all modules of this package
MAIN = "zipapp_main.py"  # __main__.py of the archive
LOCK = "requirements.lock"  # the packages that joborch needs
BUILD_LOCK = "build.lock"  # the package with the files of Swagger UI, which `pip install joborch` does not need
CACHE = "build/wheels"

# The files of Swagger UI, and where they go. Nothing else of their package is used; it would import Django.
SWAGGER_PACKAGE = "drf-spectacular-sidecar"
SWAGGER_WHEEL_FOLDER = "drf_spectacular_sidecar/static/drf_spectacular_sidecar/swagger-ui-dist/"
SWAGGER_FOLDER = f"{PLUGINS}/swagger-ui/"
SWAGGER_FILES = ("LICENSE", "favicon-32x32.png", "swagger-ui-bundle.js", "swagger-ui.css")
DATA = {SWAGGER_FOLDER + name for name in SWAGGER_FILES} | {"certifi/cacert.pem"}  # requests needs it when it is imported
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
    """One package of a lock file, and the digest of its pure Python wheel."""

    name: str
    version: str
    sha256: str


class Member(NamedTuple):
    """One file of the archive, with its bytes packed by `method` (0 stored, 8 deflated)."""

    name: str
    method: int
    crc: int
    size: int
    packed: bytes


# == Wheels ==


def read_lock(text: str) -> list[Pin]:
    """Return the packages that a lock file pins. Raises BuildError for a line that is not a pin, digest or comment."""
    rest = re.sub(r"^(#.*)?\n", "", PIN.sub("", text), flags=re.MULTILINE).strip()
    if rest:
        raise BuildError(f"lock file: {rest.splitlines()[0]!r} is not a pin with a digest: run build_zipapp.py --lock")
    pins = [Pin(*match.group("name", "version", "sha256")) for match in PIN.finditer(text)]
    if not pins:
        raise BuildError("the lock file pins no package: run build_zipapp.py --lock")
    return pins


def write_lock(pins: Iterable[Pin]) -> str:
    """Return the text of a lock file, which pip can read, too. The reverse of `read_lock`."""
    head = "# What joborch.pyz bundles: pure Python wheels for Python 3.9. To renew: python3 build_zipapp.py --lock\n"
    return head + "".join(f"{pin.name}=={pin.version} \\\n    --hash=sha256:{pin.sha256}\n" for pin in sorted(pins))


def wheels_by_digest(folder: Path) -> dict[str, Path]:
    """Return the wheels in `folder` by their SHA-256: a file's name proves nothing."""
    return {hashlib.sha256(wheel.read_bytes()).hexdigest(): wheel for wheel in folder.glob("*.whl")}


def pip_download(folder: Path, *arguments: str) -> None:
    """Let pip download pure Python wheels to `folder`. Raises BuildError with pip's message if it cannot."""
    if importlib.util.find_spec("pip") is None:
        raise BuildError(f"{sys.executable} has no pip: run '{sys.executable} -m ensurepip', or install python3-pip")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *PURE]
    command = [*pip, f"--dest={folder}", *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        said = done.stdout.strip() or f"exit status {done.returncode}"
        raise BuildError(f"pip cannot download the packages: check the network, or set PIP_INDEX_URL\n{said}")


def fetch(pins: Iterable[Pin], cache: Path) -> list[Path]:
    """Return the wheels of `pins`, in their order, from `cache` or through pip."""
    cache.mkdir(parents=True, exist_ok=True)
    have = wheels_by_digest(cache)
    missing = [pin for pin in pins if pin.sha256 not in have]
    if missing:
        # Download to a separate folder and move whole files, so that a concurrent build never reads half a wheel.
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
    """Return a member that is stored without compression."""
    return Member(name, zipfile.ZIP_STORED, zlib.crc32(content), len(content), content)


def place(name: str) -> str | None:
    """Return the name in the archive of a wheel's member `name`, or None if it is omitted."""
    licence = LICENCE.match(name)
    if licence:
        return f"licenses/{licence['package']}/{licence['file']}"
    if name.startswith(SWAGGER_WHEEL_FOLDER):
        file = name[len(SWAGGER_WHEEL_FOLDER) :]
        return SWAGGER_FOLDER + file if file in SWAGGER_FILES else None
    return name if (name.endswith(".py") or name in DATA) and not LEFT_OUT.match(name) else None


def packed_bytes(wheel: bytes, entry: zipfile.ZipInfo) -> bytes:
    """Return the packed bytes of `entry` in the wheel."""
    *_, name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(wheel, entry.header_offset)
    start = entry.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    return wheel[start : start + entry.compress_size]


def wheel_members(path: Path) -> Iterator[Member]:
    """Yield the members of a wheel for the archive. Raises BuildError for compiled code, or what zipimport cannot read."""
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
    """Return one of joborch's own files. Raises BuildError if it is missing."""
    try:
        return (source / name).read_bytes()
    except FileNotFoundError:
        raise BuildError(f"{source / name} is missing: build from a whole copy of the repository") from None


def source_members(source: Path) -> Iterator[Member]:
    """Yield joborch's own files below `source`, without hidden ones. Raises BuildError if one of SOURCES is missing."""
    plugins, base = source / PLUGINS, source / BASE
    files = [
        path.relative_to(source) for path in (*base.glob("*.py"), *plugins.rglob("*.py"), *plugins.glob("page/**/*")) if path.is_file()
    ]
    names = {file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)}
    for name in dict.fromkeys((*SOURCES, *sorted(names))):
        yield stored(name, source_file(source, name))


def version_of(source: Path) -> str:
    """Return the version of joborch. Raises BuildError if its source has none."""
    found = re.search(r'^__version__ = "([^"\\]+)"$', source_file(source, VERSION_FILE).decode("utf-8"), re.MULTILINE)
    if found is None:
        raise BuildError(f"{VERSION_FILE} has no line '__version__ = \"...\"'")
    return found[1]


def main_module(source: Path) -> bytes:
    """Return `__main__.py` of the archive with the version in it, so `--version` need not import the program."""
    main, count = re.subn(rb"(?m)^VERSION = .*$", f'VERSION = "{version_of(source)}"'.encode("ascii"), source_file(source, MAIN))
    if count != 1:
        raise BuildError(f"{MAIN} must have exactly one line 'VERSION = ...'")
    return main


def members(source: Path, pins: Iterable[Pin], wheels: Iterable[Path]) -> dict[str, Member]:
    """Return all members by name. Raises BuildError if two files have the same name."""
    bundled = json.dumps({pin.name: pin.version for pin in pins}, indent=1, sort_keys=True) + "\n"
    found = [stored("__main__.py", main_module(source)), stored("bundled.json", bundled.encode("ascii")), *source_members(source)]
    for wheel in wheels:
        found += wheel_members(wheel)
    by_name = {member.name: member for member in found}
    if len(by_name) < len(found):
        raise BuildError(f"{len(found) - len(by_name)} files of the locked packages have the same name as another")
    lacking = DATA - by_name.keys()
    if lacking:
        raise BuildError(f"the locked packages lack {', '.join(sorted(lacking))}: pin releases that have them")
    return by_name


# == Archive ==


def archive_bytes(by_name: Mapping[str, Member]) -> bytes:
    """Return the archive: a shebang line, then a ZIP whose offsets count from the start of the file (APPNOTE 6.3.10, 4.3)."""
    body, directory = bytearray(SHEBANG), bytearray()
    for _, member in sorted(by_name.items()):
        name = member.name.encode("ascii")  # other names would need a flag
        facts = (0, member.method, 0, DATE_1980_01_01, member.crc, len(member.packed), member.size, len(name), 0)
        directory += CENTRAL_HEADER.pack(b"PK\1\2", MADE_BY_UNIX, ZIP_VERSION, *facts, 0, 0, 0, MODE_0644, len(body))
        directory += name
        body += LOCAL_HEADER.pack(b"PK\3\4", ZIP_VERSION, *facts) + name + member.packed
    count = len(by_name)
    end = END_RECORD.pack(b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0)
    return bytes(body + directory + end)


def locked(source: Path) -> list[Pin]:
    """Return all packages that go into the archive."""
    return [pin for lock in (LOCK, BUILD_LOCK) for pin in read_lock(source_file(source, lock).decode("ascii"))]


def write_executable(target: Path, content: bytes) -> None:
    """Write `content` to `target` atomically: a process that runs the old archive keeps it."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.chmod(0o755)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def build(source: Path, target: Path, cache: Path) -> str:
    """Build the archive of `source` at `target`, with wheels kept in `cache`; return its SHA-256 in hexadecimal."""
    pins = locked(source)
    content = archive_bytes(members(source, pins, fetch(pins, cache)))
    write_executable(target, content)
    return hashlib.sha256(content).hexdigest()


# == Bill of materials ==  As CycloneDX 1.6 (ECMA-424). The same archive has the same one: no time, and an id made from its digest.


def licences(wheel: Path) -> list[dict[str, Any]]:
    """Return the licences that a wheel's metadata names."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        said = email.parser.BytesParser().parsebytes(archive.read(name), headersonly=True)
    if said["License-Expression"]:
        return [{"expression": said["License-Expression"]}]
    classified = [text.rpartition(" :: ")[2] for text in said.get_all("Classifier", []) if text.startswith("License :: ")]
    short = [said["License"]] if said["License"] and "\n" not in said["License"] else []
    return [{"license": {"name": name}} for name in classified or short]


def component(pin: Pin, wheel: Path) -> dict[str, Any]:
    """Return a bundled package as a component."""
    address = f"pkg:pypi/{pin.name}@{pin.version}"
    return {
        "type": "library",
        "bom-ref": address,
        "name": pin.name,
        "version": pin.version,
        **({"description": "only the files of Swagger UI are bundled"} if pin.name == SWAGGER_PACKAGE else {}),
        "hashes": [{"alg": "SHA-256", "content": pin.sha256}],
        "licenses": licences(wheel),
        "purl": address,
    }


def bill_of_materials(version: str, sha256: str, pins: Iterable[Pin], wheels: Iterable[Path]) -> str:
    """Return what is in the archive with this digest, as CycloneDX in JSON."""
    components = [component(pin, wheel) for pin, wheel in sorted(zip(pins, wheels))]
    own = {
        "type": "application",
        "bom-ref": "joborch",
        "name": "joborch",
        "version": version,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
        "licenses": [{"license": {"id": "MIT"}}],
    }
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'joborch.pyz?sha256={sha256}')}",
        "version": 1,
        "metadata": {"component": own},
        "components": components,
        "dependencies": [{"ref": "joborch", "dependsOn": [each["bom-ref"] for each in components]}],
    }
    return json.dumps(bill, indent=2, sort_keys=True) + "\n"


# == Lock file ==


def direct_dependencies(pyproject: str) -> list[str]:
    """Return the requirements in pyproject.toml's `dependencies`, which must be a list of strings over several lines."""
    # Python 3.9 has no TOML reader, but such a list reads the same in TOML and in Python.
    found = re.search(r"^dependencies = (\[.*?^\])", pyproject, re.MULTILINE | re.DOTALL)
    if found is None:
        raise BuildError("pyproject.toml has no 'dependencies = [' with its closing bracket on a separate line")
    return [str(requirement) for requirement in ast.literal_eval(found[1])]


def newest(*requirements: str) -> list[Pin]:
    """Return the newest releases of packages and their dependencies that Python 3.9 can run."""
    with tempfile.TemporaryDirectory() as fresh:
        pip_download(Path(fresh), *requirements)
        found = [(digest, wheel.name.split("-")) for digest, wheel in wheels_by_digest(Path(fresh)).items()]
    return [Pin(name.replace("_", "-").lower(), version, digest) for digest, (name, version, *_) in found]


def renew_locks(source: Path) -> None:
    """Pin the newest releases of all dependencies, and of the package with Swagger UI's files."""
    wanted = direct_dependencies((source / "pyproject.toml").read_text(encoding="utf-8"))
    (source / LOCK).write_text(write_lock(newest(*wanted)), encoding="ascii")
    (source / BUILD_LOCK).write_text(write_lock(newest("--no-deps", SWAGGER_PACKAGE)), encoding="ascii")


def main() -> int:
    """Build the archive, with --lock after updating the lock files. Return 0 if it was written, else 1."""
    parser = argparse.ArgumentParser(description="Build joborch.pyz.", epilog="Example: python3 build_zipapp.py")
    parser.add_argument("--output", type=Path, default=ROOT / "joborch.pyz", metavar="FILE", help="the archive")
    parser.add_argument("--sbom", type=Path, metavar="FILE", help="also write a bill of materials: CycloneDX 1.6 in JSON")
    parser.add_argument("--lock", action="store_true", help=f"update {LOCK} and {BUILD_LOCK} first, from pyproject.toml")
    arguments = parser.parse_args()
    try:
        if arguments.lock:
            renew_locks(ROOT)
        digest = build(ROOT, arguments.output, ROOT / CACHE)
        if arguments.sbom:
            pins = locked(ROOT)
            arguments.sbom.write_text(bill_of_materials(version_of(ROOT), digest, pins, fetch(pins, ROOT / CACHE)), encoding="ascii")
    except BuildError as error:
        print(f"build_zipapp.py: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output.name}: {arguments.output.stat().st_size} bytes, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
