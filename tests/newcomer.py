"""Reads the shell lines of the documents, and types them as a person would who follows them."""

from __future__ import annotations

import re
import subprocess
import sys
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
    assert found, f"the page has no section {title!r}"
    return found[1]


class Block(NamedTuple):
    """One ```sh block: its lines without blank ones and pure comments, and why no test runs it (empty: one does)."""

    lines: list[str]
    not_run: str


def all_blocks(markdown: str) -> list[Block]:
    """All ```sh blocks. A comment `<!-- not run: WHY -->` above one says why it is not run."""
    found = re.findall(r"^(?:<!-- not run: ([^\n]+) -->\n)?```sh\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    return [Block([line for line in text.splitlines() if line.strip() and not line.startswith("#")], why) for why, text in found]


def shell_blocks(markdown: str) -> list[list[str]]:
    """The lines of each ```sh block that is run."""
    return [block.lines for block in all_blocks(markdown) if not block.not_run]


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
    """Types the lines of a page in terminals that open in `folder`; waits as a person would.

    `joborch` is a command there, as if pip had installed it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        home = folder / "home"
        home.mkdir(exist_ok=True)
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "joborch").write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/joborch.pyz "$@"\n')
        (programs / "joborch").chmod(0o755)
        # Sockets are files, so a network of its own does not keep them apart: without a folder of its own, this server would share
        # the path of its socket with any other on the same port, and the commands would call whichever came last.
        runtime = folder / "run"
        runtime.mkdir(mode=0o700, exist_ok=True)
        environment = clean_environment(home)
        self.environment = {**environment, "PATH": f"{programs}:{environment['PATH']}", "XDG_RUNTIME_DIR": str(runtime)}
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
        """Type a line that ends; ask for a state again while the answer is 202, as long as the page says that it may be."""
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
