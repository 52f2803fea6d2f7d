"""A person's shell: types commands into a pipe or a terminal, and reads what is on the screen."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import tempfile
import termios
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import clean_environment, from_source, wait_for

# Runs commands in one process, which takes a tenth of the time, and then a script, if one is named. In a pipe both streams say
# where each command ends, in a terminal its screen.
ONE_BY_ONE = """
import json, runpy, sys
sys.path.insert(0, sys.argv[1])
from joborch_plugins import commands
for words in json.loads(sys.argv[2]):
    status = commands.main(words)
    for stream in {sys.stdout, sys.stderr} if not sys.stdout.isatty() else {sys.stdout}:
        print("$", " ".join(words), status, file=stream, flush=True)
sys.argv = sys.argv[3:]
if sys.argv:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def one_by_one(python: Sequence[str], joborch: Path, typed: Iterable[str], *script: str) -> list[str]:
    """The command that runs these commands, each without `joborch`, and then this script."""
    return [*python, "-c", ONE_BY_ONE, str(joborch), json.dumps([words.split() for words in typed]), *script]


def outputs(text: str) -> list[tuple[str, str]]:
    """What each command wrote, with its words and its status; at the end what the script wrote."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    return list(zip([*parts[1::2], ""], parts[::2]))


class Shell:
    """A person's shell in a folder of its own: user 42 at one server."""

    def __init__(self, folder: Path, url: str, program: list[str] | None = None) -> None:
        self.folder, self.program = folder, program or from_source()
        folder.mkdir(exist_ok=True)
        self.environment = {**clean_environment(folder), "JOBORCH_SERVER": url, "JOBORCH_USER": "42", "TERM": "xterm"}

    def __call__(self, *words: str, status: int = 0, **settings: str) -> str:
        """Type a command into a pipe; return what it printed, after checking how it ended and that nothing else was said."""
        done = self.run(*words, **settings)
        assert done.returncode == status, (words, done)
        assert "\x1b" not in done.stdout + done.stderr and "Traceback" not in done.stderr
        assert status or not done.stderr, done.stderr
        return done.stdout if not status else done.stdout + done.stderr

    def run(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command = [*self.program, *words]
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
        )

    def spawn(self, *words: str) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [*self.program, *words], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def terminal(
        self, columns: int, *words: str, typed: bytes = b"", answers: str = "", when: Callable[[], bool] = lambda: True, **settings: str
    ) -> tuple[int, str]:
        """Type a command into a terminal; return how it ended and all that it wrote there.

        What is typed answers this question, once `when` returns True.
        """
        outer, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        environment = {**self.environment, **settings}
        command = ["setsid", "--ctty", *self.program, *words]  # the terminal's own session: Ctrl-C is for it
        process = subprocess.Popen(command, cwd=self.folder, env=environment, stdin=inner, stdout=inner, stderr=inner)
        os.close(inner)
        written = b""
        while True:
            if typed and answers.encode() in written and when():
                os.write(outer, typed)
                typed = b""
            if typed and not select.select([outer], [], [], 0.05)[0]:
                continue
            try:
                written += os.read(outer, 65536)
            except OSError:  # EIO: the other end is closed
                break
        os.close(outer)
        return process.wait(60), written.decode().replace("\r\n", "\n")


class Screen:
    """A terminal that a program runs in, as tmux shows it."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    def tmux(self, *words: str) -> str:
        """Run a command of tmux."""
        command = ["tmux", "-S", str(self.socket), "-f", "/dev/null", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    def type(self, *keys: str) -> None:
        """Press keys, as tmux names them."""
        self.tmux("send-keys", *keys)

    def text(self) -> str:
        """What is on the screen now."""
        return self.tmux("capture-pane", "-p").rstrip("\n")

    def until(self, *texts: str, without: str = "\0") -> str:
        """Wait until all these texts are on the screen; return the screen."""
        shown = ""

        def complete() -> bool:
            nonlocal shown
            shown = self.text()
            return all(text in shown for text in texts) and without not in shown

        try:
            wait_for(complete)
        except BaseException:
            print(shown)
            raise
        return shown

    def flags(self) -> str:
        """Whether the other screen is used, the cursor shown, and lines are wrapped."""
        return self.tmux("display-message", "-p", "#{alternate_on} #{cursor_flag} #{wrap_flag}").strip()


# Says how the program ended, and whether the terminal is in its usual modes.
MODES = """stty -a | tr -d ';' | tr ' ' '\\n' | grep -Ex -- '-?(icanon|echo)' | tr '\\n' ' '"""
REPORT = f'trap : INT; "$@"; echo "status=$? $({MODES})"; exec sleep 1000'


@contextmanager
def screen(shell: Shell, size: tuple[int, int], *words: str, program: list[str] | None = None, **settings: str) -> Iterator[Screen]:
    """Run a command in a terminal of this many columns and lines. When it has ended, `status=...` is on the screen."""
    if shutil.which("tmux") is None:
        pytest.skip("a terminal to look at needs tmux")
    folder = Path(tempfile.mkdtemp(prefix="jt-", dir="/tmp"))  # the path of a socket is short
    shown = Screen(folder / "s")
    environment = {**shell.environment, "TERM": "screen", **settings}
    command = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), "sh", "-c", REPORT, "-"]
    typed = shlex.join(["cd", str(shell.folder)]) + " && exec " + shlex.join([*command, *(program or shell.program), *words])
    try:
        shown.tmux("new-session", "-d", "-x", str(size[0]), "-y", str(size[1]), typed)
        yield shown
    finally:
        subprocess.run(["tmux", "-S", str(shown.socket), "kill-server"], capture_output=True)
        shutil.rmtree(folder)


def seen(written: str) -> str:
    """What stands on the screen in the end: a line that was taken away is gone, and colours are not seen."""
    lines = [line.rpartition("\r\x1b[K")[2] for line in written.split("\n")]
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines))


def steady(text: str, *numbers: int) -> str:
    """A text with these job ids as #1, #2..., and times and places as they are in every run."""
    text = re.sub(r"127\.0\.0\.1:\d+", "HOST", text)
    text = re.sub(r"\b\d+(\.\d+)?( s\b|s\b|m\b)", "TIME", text)  # before the ids: 0.2 s has a 2 that is none
    for place, number in enumerate(numbers, 1):
        text = re.sub(rf"\b{number}\b", f"#{place}", text)
    return re.sub(r" +\n", "\n", re.sub(r"(?<=\S) {2,}", "  ", text))
