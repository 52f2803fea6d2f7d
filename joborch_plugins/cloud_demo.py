"""A stand-in for a cloud, for `joborch demo --cloud`: its instances are processes on this machine that run the user data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from joborch import Cloud, Config, load_plugin

# Whatever happens to the server, its instances end: it holds the other end of their standard input, which they wait for.
INSTANCE = '(sh "$1" </dev/null; kill -KILL 0) & read -r _; kill -KILL 0'
NOT_INHERITED = ("JOBORCH_", "SERVICE_", "CLOUD_", "DATA_PATH", "DB_PATH", "PORT", "MAX_AGE")
CORES, CONSOLE_BYTES = 2, 16 * 1024


class LocalCloud:
    """A provider as those of cloud_providers.py: instances are known to this object alone, and end with its process."""

    def __init__(self, cloud: Cloud, config: Config) -> None:
        self.cloud, self.folder = cloud, Path(config.data_path) / "instances"
        self.made: dict[str, tuple[Any, subprocess.Popen[bytes]]] = {}  # by id

    def size(self) -> tuple[int, int | None]:
        """Return the cores and the memory (bytes) of an instance."""
        return self.cloud.slots or CORES, None

    def create(self, name: str, uuid: str, server: str, script: str) -> str:
        """Start an instance, and return its id. Raises OSError."""
        home = self.folder / name
        home.mkdir(parents=True, mode=0o700)
        # An instance of a cloud switches itself off in the end. This machine must stay on.
        (home / "user-data").write_text(script.replace("poweroff", ":"), encoding="utf-8")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
        path = os.pathsep.join((str(Path(sys.executable).parent), kept.get("PATH", os.defpath)))
        cache = kept.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # so that the program is unpacked once for all
        with open(home / "console.log", "wb") as console:
            process = subprocess.Popen(
                ["sh", "-c", INSTANCE, "instance", "user-data"], env={**kept, "PATH": path, "HOME": str(home), "XDG_CACHE_HOME": cache},
                cwd=home, stdin=subprocess.PIPE, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip
        node = load_plugin("joborch_plugins.cloud_providers:Node")(name, name, "running", uuid, server)
        self.made[name] = (node, process)
        return name

    def nodes(self) -> list[Any]:
        """Return the instances that have not been destroyed."""
        return [node if process.poll() is None else node._replace(state="stopped") for node, process in [*self.made.values()]]

    def destroy(self, node: Any) -> None:
        """End an instance, and remove its files."""
        _, process = self.made.pop(node.id)
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        shutil.rmtree(self.folder / node.name, ignore_errors=True)

    def console(self, node: Any) -> str:
        """Return the end of what an instance has printed."""
        console = Path(self.folder, str(node.name), "console.log")
        return console.read_text(encoding="utf-8", errors="replace")[-CONSOLE_BYTES:]
