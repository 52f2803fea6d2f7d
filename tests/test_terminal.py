"""What a person sees of the commands that have no screen of their own, and what Ctrl-C does at each moment."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeProcess
from harness import ROOT, Pair, Process, submit, wait_status
from proxy import Fault, Proxy
from shell import Shell, one_by_one, outputs, seen, steady
from world import gated

CTRL_C = b"\x03"


@pytest.fixture(name="shell")
def shell_fixture(pair: Pair, tmp_path: Path) -> Shell:
    """A shell in front of the session's pair."""
    return Shell(tmp_path / "here", pair.server.url)


@pytest.fixture(name="line")
def line_fixture(pair: Pair) -> Iterator[Proxy]:
    """A line to the server of the session's pair, on which things go wrong."""
    with Proxy(pair.server.port) as line:
        yield line


# == Snapshots ==

REASON = 'run.sh ended with exit status 3 after TIME; last line of standard error: "no such chain"'
AWAY = "start one with `joborch server`, or name another with `joborch login URL`"
# A command; its exit status; what a terminal shows; what a pipe gets, if that differs. #1 is Completed, #2 Failed.
SCREENS = [
    ("logs #1", 0, "one\n", None),
    ("logs #2 --stderr", 0, "no such chain\n", None),
    ("logs #2 -f", 1, f"begun\njoborch: job #2 is Failed: {REASON}\n", None),
    ("logs #1-#2", 2, "joborch: name one job: #1-#2 are 2 jobs of yours\n", None),
    ("get #1 -o new", 0, "job #1: new\n", "new\n"),
    ("get #1 -o new", 2, "joborch: HERE/new already exists: give the name of a new or empty folder\n", None),
    ("get #1 #2 -o all", 1, f"job #1: all/job-#1\njoborch: job #2 is Failed: {REASON}; see joborch why #2\n",
     f"all/job-#1\njoborch: job #2 is Failed: {REASON}; see joborch why #2\n"),
    ("get #2 --partial --zip -o left.zip", 0, "job #2: left.zip\n", "left.zip\n"),
    ("get #1 deep/out.txt", 0, "out.txt\n", None),
    ("get #1 deep/out.txt -o -", 0, "x\n", None),
    ("get #1 deep/ou.txt", 2, "joborch: job #1 has no file 'deep/ou.txt' (did you mean deep/out.txt?): see joborch get #1 --list\n", None),
    ("get #1 --list", 0, "0 bytes  .joborch/stderr\n4 bytes  .joborch/stdout\n2 bytes  deep/out.txt\n63 bytes  run.sh\n",
     "0\t.joborch/stderr\n4\t.joborch/stdout\n2\tdeep/out.txt\n63\trun.sh\n"),
    ("get #1 run.sh deep/run.sh", 2, "joborch: several of these files would be run.sh here: fetch them one by one, each with -o\n", None),
    ("get #1 #2 --list", 2,
     "joborch: give one job with --list or with files of it, as in joborch get 42 summary.txt\n", None),
    ("cancel --name nobody", 0, "no job matches\n", ""),
    ("wait #1 #2", 1, f"job #1 (first) Completed: run.sh ended with exit status 0\njob #2 Failed: {REASON}\n",
     f"#1\tCompleted\trun.sh ended with exit status 0\n#2\tFailed\t{REASON}\n"),
    ("cancel #1", 0, "job #1 Completed: run.sh ended with exit status 0\n", "#1\tCompleted\trun.sh ended with exit status 0\n"),
    ("wait 99000000-99000009", 2, "joborch: no job from 99000000 to 99000009 is yours: see joborch list\n", None),
    ("logout", 0, "no login was stored\n", None),
    ("login URL", 0, "commands and scripts now call URL as user 42 (HERE/.config/joborch/login.json)\n", None),
    ("logout", 0, "HERE/.config/joborch/login.json is deleted\n", None),
    ("login http://127.0.0.1:1", 3, f"joborch: no server answers at http://HOST: {AWAY}\n", None),
    ("login nowhere", 2, "joborch: the server is 'nowhere': give its URL, as in http://HOST or unix:/run/joborch.sock\n", None),
    ("completion", 2, "joborch: name the shell: bash, zsh or fish\n", None),
]  # fmt: skip


def test_what_is_seen_in_terminals_of_two_widths_and_in_a_pipe(pair: Pair, tmp_path: Path) -> None:
    """The same at 80 columns in colour, at 200 without, and in a pipe without what only a person needs."""
    shells = [Shell(tmp_path / name, pair.server.url) for name in ("narrow", "wide", "pipe")]
    good = shells[0]("submit", "--wait", "--name", "first", "--", "sh", "-c", "mkdir deep; echo x >deep/out.txt; echo one").strip()
    bad = shells[0]("submit", "--", "sh", "-c", "echo begun; echo no such chain >&2; exit 3").strip()
    shells[0]("wait", bad, status=1)
    typed = [words.replace("#1", good).replace("#2", bad).replace("URL", pair.server.url) for words, *_ in SCREENS]
    for shell in shells:
        shell.program = one_by_one([sys.executable], ROOT, typed)
    narrow, wide, done = shells[0].terminal(80)[1], shells[1].terminal(200, NO_COLOR="1")[1], shells[2].run()
    assert "\x1b[3" not in wide + done.stdout + done.stderr
    in_pipes = [(ran, said + error) for (ran, said), (_, error) in zip(outputs(done.stdout), outputs(done.stderr))]
    for shell, said in zip(shells, (outputs(seen(narrow)), outputs(seen(wide)), in_pipes)):
        for (ran, text), words, (_, status, in_terminal, in_pipe) in zip(said, typed, SCREENS):
            wanted = in_terminal if in_pipe is None or shell is not shells[2] else in_pipe
            plain = re.sub("^ +", "", text.replace(str(shell.folder), "HERE").replace(pair.server.url, "URL"), flags=re.MULTILINE)
            assert (ran, steady(plain)) == (f"{words} {status}", wanted.replace("#1", good).replace("#2", bad))
        assert len(said) == len(SCREENS) + 1
    assert re.search("\x1b\\[32mCompleted.*\n.*\x1b\\[31mFailed", narrow)


def test_output_as_json(shell: Shell) -> None:
    """An object; one a line where it is followed."""
    number = shell("submit", "--wait", "--", "sh", "-c", "echo one; printf '\\303 two'; echo three >&2").strip()
    whole = {"id": int(number), "stream": "stdout", "text": "one\n� two"}
    assert json.loads(shell("logs", number, "--json")) == whole
    parts = [json.loads(line) for line in shell("logs", number, "--follow", "--json").splitlines()]
    assert {**parts[0], "text": "".join(part["text"] for part in parts)} == whole
    assert json.loads(shell("logs", number, "--json", "--stderr")) == {"id": int(number), "stream": "stderr", "text": "three\n"}


def test_a_token_that_is_not_typed(make_process: MakeProcess, tmp_path: Path) -> None:
    """Ctrl-C at the question leaves the terminal and the login as they were."""
    guarded: Process = make_process("server", {"JOBORCH_TOKEN": "a-token-for-callers-only", "JOBORCH_SOCKET": "none"}).start()
    shell = Shell(tmp_path / "here", "")
    del shell.environment["JOBORCH_SERVER"]
    status, written = shell.terminal(80, "login", guarded.url, typed=CTRL_C, answers="token for")
    assert (status, seen(written).splitlines()[-1]) == (130, "joborch: interrupted")
    assert not (shell.folder / ".config/joborch/login.json").exists()


# == Ctrl-C ==


def test_ctrl_c_while_a_job_is_sent(pair: Pair, line: Proxy, tmp_path: Path) -> None:
    """Nothing is queued, and the same command sends it."""
    shell = Shell(tmp_path / "here", line.url)
    (shell.folder / "large").write_bytes(b"x" * 80_000_000)
    line.plant(Fault("stall", "POST /upload", after=20_000_000, seconds=90, where="request"))
    words = ("submit", "large", "--user", "911", "--wait", "--", "true")
    status, written = shell.terminal(120, *words, typed=CTRL_C, when=lambda: any(each.request_bytes > 10_000_000 for each in line.seen))
    assert status == 130
    assert seen(written).splitlines()[-1] == "joborch: interrupted: the job was not queued; the same command sends it again"
    assert pair.server.jobs(user_id=911) == []
    line.calm()
    assert shell.terminal(120, *words)[0] == 0


def test_ctrl_c_while_a_job_is_waited_for(shell: Shell, tmp_path: Path) -> None:
    """At each of the three ways to wait; the job continues, and what is said can be typed."""
    gate = tmp_path / "gate"
    status, written = shell.terminal(200, "submit", "--wait", "--", "sh", "-c", gated(gate), typed=CTRL_C, answers="Running")
    (number,) = re.findall(r"service example: (\d+)", written)
    said = f"joborch: interrupted: job {number} continues; `joborch wait {number}` waits for it, `joborch cancel {number}` stops it"
    assert (status, seen(written).splitlines()[-1]) == (130, said)
    for words, hint in (
        (("wait", number), f"the jobs continue; `joborch wait {number}` waits again"),
        (("get", number, "-o", "a b"), f"`joborch get {number} -o 'a b'` resumes"),
    ):
        status, written = shell.terminal(200, *words, typed=CTRL_C, answers="Running")
        assert (status, seen(written)) == (130, f"joborch: interrupted: {hint}\n")
    gate.touch()
    assert shell("wait", number).startswith(f"{number}\tCompleted")
    assert shell("get", number, "-o", "a b") == "a b\n"


def test_ctrl_c_while_output_is_followed(pair: Pair, shell: Shell, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    number = submit(pair.server, f"echo begun >&2; {gated(gate)}; echo done >&2", user_id=42)
    status, written = shell.terminal(200, "logs", str(number), "-f", "--stderr", typed=CTRL_C, answers="begun")
    hint = f"the job continues; `joborch logs {number} -f --stderr` follows it again"
    assert (status, seen(written)) == (130, f"begun\n^C\njoborch: interrupted: {hint}\n")
    gate.touch()
    assert shell("logs", str(number), "-f", "--stderr") == "begun\ndone\n"


def part_bytes(folder: Path) -> int:
    """How much of what is fetched into this folder has arrived."""
    return sum(path.stat().st_size for path in folder.glob("*.part"))


def test_ctrl_c_while_results_are_fetched(pair: Pair, line: Proxy, tmp_path: Path) -> None:
    """The whole, as a folder or a ZIP, and one file: the next command goes on, and nothing half stands under a name."""
    shell = Shell(tmp_path / "here", line.url)
    number = submit(pair.server, "head -c 6000000 /dev/urandom >big", user_id=42)
    wait_status(pair.server, number, "Completed")
    for words, target, route in (
        (("get", str(number)), f"job-{number}", "GET /download"),
        (("get", str(number), "--zip"), f"job-{number}.zip", "GET /download"),
        (("get", str(number), "big"), "big", "GET /jobs/[0-9]+/files/big"),
    ):
        line.calm()
        line.plant(Fault("stall", route, after=3_000_000, seconds=90))
        status, written = shell.terminal(200, *words, typed=CTRL_C, when=lambda: part_bytes(shell.folder) > 1_500_000)
        assert (status, seen(written).splitlines()[-1]) == (130, f"joborch: interrupted: `joborch {' '.join(words)}` resumes")
        assert not (shell.folder / target).exists()
        status, written = shell.terminal(200, *words)
        assert (status, seen(written)) == (0, f"{target}\n" if len(words) == 3 and words[2] == "big" else f"job {number}: {target}\n")
        assert int(line.find(route)[-1].headers["range"][6:-1]) > 1_000_000
        assert [path.name for path in shell.folder.iterdir() if path.name.endswith(".part")] == []
