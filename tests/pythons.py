"""The Pythons of this machine that joborch must run on: CPython 3.9 to 3.13."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
PROBE_LIMIT_S = 20
# A virtual environment is passed over: it would lend the tests' packages to the program.
PROBE = """
import platform, sqlite3, ssl, sys, zlib
if platform.python_implementation() == "CPython" and sys.prefix == sys.base_prefix:
    print("%d.%d" % sys.version_info[:2])
"""


def candidates(version: str) -> Iterator[Path]:
    """Files that may be the Python of this version: those in PATH first, then pyenv's, newest patch release first."""
    for folder in os.get_exec_path():
        yield Path(folder, f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path("~/.pyenv").expanduser())
    patches = [path for path in pyenv.glob(f"versions/{version}.*") if path.name.rpartition(".")[2].isdigit()]
    for patch in sorted(patches, key=lambda path: int(path.name.rpartition(".")[2]), reverse=True):
        yield patch / "bin" / f"python{version}"


def answers(python: Path, version: str) -> bool:
    """Whether `python` runs (a pyenv shim may not), is this version of CPython and has what joborch imports."""
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == version


@functools.cache
def pythons() -> dict[str, Path]:
    """The first Python of each version that answers, by version ("3.9"); what this machine lacks is left out."""
    found = {}
    for version in VERSIONS:
        python = next((path for path in candidates(version) if path.is_file() and answers(path, version)), None)
        if python:
            found[version] = python
    return found


if __name__ == "__main__":
    for version, python in pythons().items():
        print(version, python)
