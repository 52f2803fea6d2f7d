"""Reads the README's shell lines, and types them as a person would who follows it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from harness import LIMIT_S, clean_environment, wait_for

PORTS = {"server": 5000, "client": 9000}
# A line that keeps running in its terminal.
STARTS = re.compile(r"([A-Z_]+=\S+ )*python3 joborch\.pyz (?P<role>server|client)( --env-file \S+)?$")


def section(markdown: str, title: str) -> str:
    """The text below the heading `## title`, up to the next heading of its rank."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", markdown, re.MULTILINE | re.DOTALL)
    assert found, f"the README has no section {title!r}"
    return found[1]


def shell_blocks(markdown: str) -> list[list[str]]:
    """The shell lines of each ```sh block, without blank lines and pure comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    return [[line for line in block.splitlines() if line.strip() and not line.startswith("#")] for block in blocks]


class Typed(NamedTuple):
    """One line that was typed: its exit status (None: it runs on), and all that it wrote to the terminal, each time."""

    line: str
    status: int | None
    outputs: list[str]


def answers(port: int) -> bool:
    """Whether the process on `port` is up."""
    with suppress(OSError):
        return urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    return False


class Newcomer:
    """Types the lines of the README in terminals that open in `folder`; waits as a person would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = clean_environment(folder / "home")
        self.running: list[subprocess.Popen[bytes]] = []

    def type_all(self, blocks: list[list[str]]) -> Iterator[Typed]:
        """Type all lines, in a new terminal where the last one is taken; end what still runs at the last."""
        here = self.folder
        try:
            for line in (line for block in blocks for line in block):
                if line.startswith("cd "):
                    here = here / line[len("cd ") :]
                elif STARTS.match(line):
                    yield self.start(line, here)
                    here = self.folder
                else:
                    yield self.type_one(line, here)
        finally:
            for process in self.running:
                process.terminate()
            statuses = [process.wait(LIMIT_S) for process in self.running]
        yield Typed("Ctrl-C", max(statuses, default=0), [])

    def start(self, line: str, here: Path) -> Typed:
        """Type a line that runs on, and wait until it answers."""
        log_path = self.folder / f"terminal{len(self.running)}.log"
        with log_path.open("wb") as log:
            command = ["bash", "-c", f"exec env {line}"]
            self.running.append(subprocess.Popen(command, cwd=here, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        started = STARTS.match(line)
        assert started, line
        role = started["role"]
        wait_for(lambda: answers(PORTS[role]), what=f"an answer of the {role}")
        return Typed(line, self.running[-1].poll(), [log_path.read_text()])

    def type_one(self, line: str, here: Path) -> Typed:
        """Type a line that ends; ask for a state again while the answer is 202, as long as the README says that it may be."""
        outputs: list[str] = []
        deadline = time.monotonic() + LIMIT_S
        while True:
            done = subprocess.run(
                ["bash", "-c", line], cwd=here, env=self.environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=90,
            )  # fmt: skip
            outputs.append(done.stdout + done.stderr)
            waits = "# 202" in line and " 202 " in done.stdout.partition("\n")[0] and time.monotonic() < deadline
            if not waits:
                return Typed(line, done.returncode, outputs)
            time.sleep(0.1)
