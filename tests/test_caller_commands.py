"""The commands for people with jobs, typed into a terminal, a pipe and a script against a real server and client."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MakePair
from harness import EXAMPLE, ROOT, Pair, Process, free_port, submit, wait_for, wait_status
from proxy import Fault, Proxy
from pythons import pythons
from shell import Shell, one_by_one, outputs, seen, steady
from world import gated

from joborch_plugins import commands


@pytest.fixture(name="shell")
def shell_fixture(pair: Pair, tmp_path: Path) -> Shell:
    """A shell in front of the session's pair."""
    return Shell(tmp_path / "here", pair.server.url)


# == The way of a job ==


def test_a_chain_of_two_jobs(shell: Shell) -> None:
    """The second waits for the first and gets its result."""
    first = shell("submit", "--", "touch", "made-by-the-first").strip()
    second = shell("submit", "--from", first, "--wait", "--", "find", "from").splitlines()[0]
    assert f"from/{first}/made-by-the-first" in shell("logs", second).split()


def test_the_first_steps_in_a_pipe(shell: Shell) -> None:
    """Facts alone, one a line."""
    number = shell("submit", str(EXAMPLE / "run.sh"), str(EXAMPLE / "2oob.pdb"), "--name", "2oob").strip()
    assert number.isdigit()
    assert shell("wait", number) == f"{number}\tCompleted\trun.sh ended with exit status 0\n"
    assert shell("logs", number).startswith("2oob: 36 residue pairs")
    assert shell("get", number) == f"job-{number}\n"
    assert "36 residue pairs" in (shell.folder / f"job-{number}/summary.txt").read_text()
    assert shell("get", number, "summary.txt", "-o", "-").startswith("2oob: 36")
    assert shell("get", number, "summary.txt", "contacts.tsv") == "summary.txt\ncontacts.tsv\n"
    assert (shell.folder / "contacts.tsv").read_text().startswith("structure\t")
    assert f"{(EXAMPLE / '2oob.pdb').stat().st_size}\t2oob.pdb\n" in shell("get", number, "--list")
    assert shell("get", number, "--zip", "-o", "kept.zip") == "kept.zip\n"
    listed = shell("list", "-n", "1").split("\t")
    assert (listed[0], listed[1], listed[2]) == (number, "2oob", "Completed")
    assert sorted(path.name for path in shell.folder.iterdir()) == ["contacts.tsv", f"job-{number}", "kept.zip", "summary.txt"]


def test_one_line_for_the_whole_way(shell: Shell) -> None:
    number = shell("submit", str(EXAMPLE), "--wait", "--get", "out/deep").split()
    assert number[1] == "out/deep"
    assert "36 residue pairs" in (shell.folder / "out/deep/summary.txt").read_text()
    before = shell("list", "-n", "0").count("\n")
    assert "out/deep already exists: give the name of a new or empty folder" in shell("submit", str(EXAMPLE), "--get", "out/deep", status=2)
    assert shell("list", "-n", "0").count("\n") == before, "that is said before anything is sent"


def test_a_command_is_a_job(shell: Shell) -> None:
    (shell.folder / "a b.txt").write_text("x\n")
    number = shell("submit", "a b.txt", "--wait", "--", "sh", "-c", 'cat "a b.txt"; echo "$0 $1"', "it's", "--wait").strip()
    assert shell("logs", number) == "x\nit's --wait\n"


def test_the_first_path_is_the_script_if_none_is_called_so(shell: Shell) -> None:
    (shell.folder / "dock.sh").write_text("cat data >out\n")
    (shell.folder / "data").write_text("here\n")
    number = shell("submit", "dock.sh", "data", "--wait").strip()
    assert shell("get", number, "out", "-o", "-") == "here\n"


def test_an_array(shell: Shell) -> None:
    """Each knows its number; lines of the script keep theirs."""
    (shell.folder / "run.sh").write_text('#!/bin/bash\necho "$JOBORCH_ARRAY_INDEX line $LINENO"\n')
    numbers = shell("submit", "run.sh", "--array", "1-3,7", "--name", "many").split()
    assert len(numbers) == 4
    shell("wait", *numbers)  # no range: they are sent at once, and each takes the id of its arrival
    assert sorted(shell("logs", number) for number in numbers) == [f"{index} line 2\n" for index in (1, 2, 3, 7)]
    names = {line.split("\t")[1] for line in shell("list", "-n", "4").splitlines()}
    assert names == {f"many[{index}]" for index in (1, 2, 3, 7)}
    assert len(shell("get", *numbers, "-o", "all").splitlines()) == 4
    assert (shell.folder / f"all/job-{numbers[0]}/run.sh").exists()
    assert len(shell("get", *numbers, "-o", "all").splitlines()) == 0, "they are there already"
    assert [commands.with_index(text, 5) for text in ("", "a\nb", "#!x", "#!x\ny")] == [
        "export JOBORCH_ARRAY_INDEX=5;", "export JOBORCH_ARRAY_INDEX=5;a\nb", "#!x\nexport JOBORCH_ARRAY_INDEX=5;",
        "#!x\nexport JOBORCH_ARRAY_INDEX=5;y",
    ]  # fmt: skip


def test_the_same_key_is_the_same_job(shell: Shell) -> None:
    assert shell("submit", "--key", "a", "--", "true") == shell("submit", "--key", "a", "--", "true")


def test_how_a_job_ended_is_the_exit_status(shell: Shell) -> None:
    words = ("--", "bash", "-c", "echo left >out; echo 'no such chain' >&2; exit 7")
    said = shell("submit", "--wait", *words, status=1)
    number = said.split()[0]
    assert f"joborch: job {number} is Failed: run.sh ended with exit status 7 after" in said
    shell("submit", "--pass-status", *words, status=7)
    assert shell("wait", number, status=1).startswith(f"{number}\tFailed\trun.sh ended with exit status 7")
    assert "no such chain" in shell("logs", number, "--stderr")
    assert f"see joborch why {number}" in shell("get", number, status=1)
    assert shell("get", number, "--partial", "-o", "left") == "left\n"
    assert (shell.folder / "left/out").read_text() == "left\n"
    assert shell("logs", number, "--follow", status=1).startswith(f"joborch: job {number} is Failed")


def test_jobs_are_ended_by_id_range_name_and_state(pair: Pair, shell: Shell) -> None:
    numbers = [shell("submit", "--name", f"sleeper{place % 2}", "--", "sleep", "300").strip() for place in range(4)]
    others = submit(pair.server, "sleep 300", user_id=43)
    assert shell("cancel", numbers[0]) == f"{numbers[0]}\tKilled\tterminated on request\n"
    shell("cancel", "--name", "sleeper1")
    states = {line.split("\t")[0]: line.split("\t")[2] for line in shell("list").splitlines()}
    assert [states[number] for number in numbers] == ["Killed", "Killed", states[numbers[2]], "Killed"] and states[numbers[2]] != "Killed"
    shell("cancel", f"{numbers[0]}-{others}")
    assert pair.server.job(int(numbers[2]))["status"] == "Killed"
    assert pair.server.job(others)["status"] != "Killed", "a range means one's own jobs"
    pair.server.post(f"/terminate/{others}")
    assert "name the jobs" in shell("cancel", status=2)
    assert "name the jobs" in shell("cancel", numbers[0], "--name", "x", status=2)


def test_more_than_ten_are_not_ended_without_a_question(pair: Pair, shell: Shell) -> None:
    numbers = sorted(map(int, shell("submit", "--array", "1-12", "--name", "crowd", "--", "sleep", "300").split()))
    said = shell("cancel", "--name", "crowd", status=2)
    assert f"Stop 12 jobs ({numbers[0]}-{numbers[-1]})? Say so with --yes" in said
    status, written = shell.terminal(80, "cancel", "--name", "crowd", typed=b"n\n")
    assert (status, "nothing was done" in written) == (2, True)
    status, written = shell.terminal(80, "cancel", "--name", "crowd", typed=b"y\n")
    assert (status, len(re.findall(r"^job \d+ ", seen(written), re.MULTILINE))) == (0, 12), written
    for number in numbers:
        wait_status(pair.server, number, "Killed")
    assert shell("cancel", "--name", "crowd", "--yes") == ""


def test_jobs_are_run_again(shell: Shell) -> None:
    """By id, and all that failed; the new ids are printed."""
    numbers = [shell("submit", "--wait", "--user", "44", "--name", name, "--", name, status=status).split()[0]
               for name, status in (("true", 0), ("false", 1), ("false", 1))]  # fmt: skip
    (again,) = shell("retry", numbers[0]).split()
    assert shell("wait", again).startswith(f"{again}\tCompleted")
    several = shell("retry", "--user", "44", "--failed").split()
    assert len(several) == 2
    assert all("Failed" in line for line in shell("wait", *several, status=1).splitlines())
    (said,) = json.loads(shell("retry", numbers[1], "--json"))
    assert (said["name"], said["user_id"]) == ("false", 44)
    shell("wait", str(said["id"]), status=1)
    status, written = shell.terminal(80, "retry", numbers[0])
    assert status == 0
    assert re.fullmatch(rf"job {numbers[0]} is queued again as job \d+\n", seen(written))
    assert "name the jobs" in shell("retry", status=2)


def test_lists_are_chosen_by_state_and_time(shell: Shell) -> None:
    good = shell("submit", "--wait", "--name", "listed-good", "--", "true").strip()
    bad = shell("submit", "--", "false").strip()
    shell("wait", bad, status=1)

    def listed(*words: str) -> list[str]:
        return [line.split("\t")[0] for line in shell("list", *words).splitlines()]

    assert listed("--status", "failed", "-n", "1") == [bad]
    assert listed("--status", "failed,completed", "-n", "2") == [bad, good]
    assert {good, bad} <= set(listed("--today", "-n", "0")) & set(listed("--since", "1h", "-n", "0"))
    assert listed("--since", "2099-01-01") == []
    assert listed("--user", "987654") == []
    assert (listed("--name", "listed-"), listed("--name", "listed-", "--status", "killed,failed")) == ([good], [])
    assert listed("--since", "999999999d", "--name", "listed-") == [good]
    assert set(listed("-n", "0")) <= set(listed("--all", "-n", "0"))
    shell("list", "--since", "2020-02-30T25:99", "--json")


def test_json_is_the_server_s_own(shell: Shell) -> None:
    (job,) = json.loads(shell("submit", "--json", "--wait", "--name", "j", "--", "true"))
    assert (job["status"], job["name"], job["user_id"]) == ("Completed", "j", 42)
    number = str(job["id"])
    for words in (("list", "-n", "1"), ("wait", number), ("cancel", number)):
        (said,) = json.loads(shell(*words, "--json"))
        assert (said["id"], said["status"]) == (job["id"], "Completed")
    assert json.loads(shell("why", number, "--json"))["history"][-1]["to"] == "Completed"
    assert json.loads(shell("get", number, "--json")) == [{"id": job["id"], "path": f"job-{number}"}]
    (script,) = [row for row in json.loads(shell("get", number, "--list", "--json")) if row["path"] == "run.sh"]
    assert (script["size"], script["mode"], script["sha256"]) == (17, "100700", hashlib.sha256(b"#!/bin/bash\ntrue\n").hexdigest())
    assert json.loads(shell("get", number, "run.sh", "--json")) == [{"id": job["id"], "path": "run.sh"}]
    quota = json.loads(shell("quota", "--json"))
    assert quota["user_id"] == 42
    assert quota["services"][0]["runs_per_user"] == 50
    assert json.loads(shell("list", "--user", "987654", "--json")) == []


# == What a person sees ==


def test_a_job_seen_in_a_terminal(shell: Shell) -> None:
    status, written = shell.terminal(80, "submit", str(EXAMPLE), "--name", "2oob", "--wait", "--get", "out")
    (number,) = re.findall(r"service example: (\d+)", written)
    assert status == 0
    assert steady(seen(written), int(number)) == (
        "1 job queued for service example: #1\njob #1 (2oob) Completed: run.sh ended with exit status 0\njob #1: out\n"
    )
    assert f"job {number} (2oob) \x1b[32mCompleted\x1b[0m" in written
    assert f"\r\x1b[Kjob {number} " in written, "one line says meanwhile how it stands"
    _, plain = shell.terminal(80, "wait", number, NO_COLOR="1")
    assert "\x1b[32m" not in plain and "Completed" in plain


LIST_80 = """\
ID  NAME  STATUS  AGE
#2  2oob  Failed  TIME  run.sh ended with exit status 3 after TIME; la…
#1  a name ∆  Completed  TIME
"""
LIST_200 = """\
ID  NAME  STATUS  AGE
#2  2oob  Failed  TIME  run.sh ended with exit status 3 after TIME; last line of standard error: "no such chain in the structure"
#1  a name ∆  Completed  TIME
"""
WHY = """\
job #1 (2oob) of service example: Failed on HOST, ran TIME, ended TIME ago
  why:  run.sh ended with exit status 3 after TIME; last line of standard error: "no such chain in the structure"
  cause:  user (the script or its input)
  last lines of its output:
    | half a line
    | no such chain in the structure
  to do:  correct it and submit it again; `joborch get #1 --partial` fetches its files
"""
WHY_WAITS = """\
job #1 of service example: Queued
  waits for:  it waits for #2 to complete
  to do:  `joborch wait #1` waits for it, `joborch quota` shows what you use
"""
QUOTA = """\
user 77: 0 jobs queued
SERVICE  YOU RUN  ALL RUN  FREE FOR YOU  SO FAR  YOUR TURN
example  0 of 5  0 of 10  5  0 runs, TIME  no job of yours waits
"""


def test_lists_fit_the_terminal(make_pair: MakePair, tmp_path: Path) -> None:
    own = make_pair().start()
    shell = Shell(tmp_path / "here", own.server.url)
    good = int(shell("submit", "--wait", "--name", "a name ∆", "--", "true"))
    script = "echo half a line >&2; echo 'no such chain in the structure' >&2; exit 3"
    bad = int(shell("submit", "--name", "2oob", "--", "bash", "-c", script))
    shell("wait", str(bad), status=1)
    for columns, wanted in ((80, LIST_80), (200, LIST_200)):
        status, written = shell.terminal(columns, "list")
        text = seen(written)
        assert (status, max(map(len, text.splitlines())) <= columns) == (0, True)
        cut = steady(text, good, bad)
        assert re.sub(r"; la.*…", "; la…", cut) == wanted
    assert "\x1b[31mFailed" in written
    assert "\x1b" not in shell.terminal(80, "list", NO_COLOR="1")[1]
    assert steady(seen(shell.terminal(200, "why", str(bad))[1]), bad) == WHY
    assert steady(seen(shell.terminal(80, "quota", "--user", "77")[1])) == QUOTA
    gate = tmp_path / "gate"
    first = submit(own.server, gated(gate), user_id=42)
    after = int(shell("submit", "--after", str(first), "--", "true"))
    said = steady(seen(shell.terminal(200, "why", str(after))[1]), after, first)
    assert re.sub(r"waits for: .*", "waits for:  it waits for #2 to complete", said) == WHY_WAITS
    assert str(first) in shell("list", "--status", "Queued")
    gate.touch()
    assert seen(shell.terminal(80, "list", "--user", "77")[1]) == "no jobs of user 77; --all shows those of all users\n"


def test_control_characters_do_not_reach_the_terminal(shell: Shell) -> None:
    """What a script leaves as its last words may try to play with it."""
    number = shell("submit", "--", "bash", "-c", r"printf 'a\e[2Jb\a\n' >&2; exit 1").strip()
    shell("wait", number, status=1)
    _, written = shell.terminal(200, "why", number, NO_COLOR="1")
    assert "\x1b" not in written and "a�[2Jb�" in written


# == What goes wrong ==

WRONG = [
    (("submit",), 2, "there is nothing to send: name files or a folder, or a command, as in joborch submit -- echo hello"),
    (("submit", "none"), 2, "none cannot be read: no such file or directory"),
    (("submit", str(EXAMPLE / "2oob.pdb")), 2, "there is no run.sh among 2oob.pdb: name the script first"),
    (("submit", str(EXAMPLE), "--", "true"), 2, "there are a run.sh and a command after --: send only one of them"),
    (("submit", "--memory", "much", "--", "true"), 2, "memory is 'much': give MiB, or a number with M or G"),
    (("submit", "-s", "exmaple", "--", "true"), 2, "service 'exmaple' is not known: give one of example"),
    (("submit", "--array", "a-b", "--", "true"), 2, "--array: 'a-b' is no list of numbers: give one, as in 1-20, 1-20:5 or 1,3,5-9; see"),
    (("submit", "--array", "5-1", "--", "true"), 2, "--array: 5-1 has no numbers: give the smaller one first, as in 1-5; see"),
    (("submit", "--array", "1-1000000", "--", "true"), 2, "1-1000000 has more than 100,000 numbers: send several smaller arrays"),
    (("submit", "--nmae", "x", "--", "true"), 2, "--nmae is not a flag (did you mean --name?); see joborch submit --help"),
    (("wait", "9-5"), 2, "9-5 is no range of jobs: give the smaller id first"),
    (("wait", "all"), 2, "'all' is not a job: give its id, as in 42, or several, as in 5-9"),
    (("wait", "99999999"), 2, "no job has the id 99999999"),
    (("wait",), 2, "the following arguments are required: ID"),
    (("get", "summary.txt"), 2, "name the job first, as in joborch get 42 summary.txt"),
    (("list", "--since", "yesterday"), 2, "'yesterday' is no time: give an age or a date, as in 2d or 2026-11-28"),
    (("list", "--status", "faild"), 2, "'Faild' is no status (did you mean Failed?)"),
    (("list", "--user", "alice"), 2, "--user: 'alice' is no whole number; see joborch list --help"),
    (("list", "--limit=-4"), 2, "'-4' is no number of jobs: give one, as in 20, or 0 for all"),
    (("submit", "--", "echo", "\r\n"), 2, "convert it, for example with dos2unix, or add --crlf fix"),
    (("list", "x"), 2, "'x' is one word too many"),
    (("--json", "list"), 2, "--json comes after the command, as in joborch list --json"),
    (("--server=http://127.0.0.1:1", "client"), 2, "--server comes after the command, as in joborch client --server"),
    (("wait", "1,x"), 2, "'x' is not a job"),
    (("lsit",), 2, "'lsit' is no command (did you mean list?); see joborch --help"),
    (("list", "--server", "localhost:5000"), 2, "the server is 'localhost:5000': give its URL, as in http://127.0.0.1:5000"),
]


@pytest.mark.parametrize(("words", "status", "said"), WRONG, ids=lambda value: " ".join(value)[-30:] if isinstance(value, tuple) else "")
def test_an_error_is_one_line_with_the_remedy(words: tuple[str, ...], status: int, said: str, shell: Shell) -> None:
    done = shell.run(*words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (status, "", 1), done
    assert re.match(r"joborch( \w+)?: ", done.stderr)
    assert said in done.stderr


@pytest.mark.parametrize("words", [("list",), ("submit", "--", "true"), ("wait", "1"), ("get", "1"), ("quota",), ("cancel", "1")])
def test_no_server_is_there(words: tuple[str, ...], shell: Shell) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    assert f"joborch: no server answers at {url}: start one with `joborch server`" in shell(*words, status=3, JOBORCH_SERVER=url)
    assert time.monotonic() - began < 20


def test_a_reader_that_has_seen_enough(shell: Shell) -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$@" | head -c 1', "-", *shell.program, "list", "--all", "-n", "0"],
        cwd=shell.folder, env=shell.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""


def test_a_wait_that_is_interrupted_says_how_to_go_on(shell: Shell) -> None:
    number = shell("submit", "--", "sleep", "300").strip()
    waiting = shell.spawn("wait", number)
    wait_for(lambda: any("socket:" in os.path.realpath(path) for path in Path(f"/proc/{waiting.pid}/fd").iterdir()))
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert f"interrupted: the jobs continue; `joborch wait {number}` waits again" in said
    shell("cancel", number)


def test_an_array_that_is_interrupted_names_what_was_sent(pair: Pair, tmp_path: Path) -> None:
    with Proxy(pair.server.port) as line:
        shell = Shell(tmp_path / "here", line.url)
        line.plant(Fault("drip", "POST /upload", times=0, seconds=0.2))
        sending = shell.spawn("submit", "--array", "1-500", "--name", "cutoff", "--", "true")
        wait_for(lambda: len(line.find("POST /upload")) > 20)
        sending.send_signal(signal.SIGINT)
        out, said = sending.communicate(timeout=30)
    assert (sending.returncode, out) == (130, "")
    (count, ids) = re.findall(r"(\d+) of 500 jobs are queued: `joborch cancel ([\d -]+)` stops them", said)[0]
    listed = [job["id"] for job in pair.server.jobs(user_id=42) if (job["name"] or "").startswith("cutoff")]
    assert len(listed) == int(count) < 500
    own = Shell(tmp_path / "own", pair.server.url)
    ended = own("cancel", *ids.split(), "--yes")
    assert sorted(int(line.split("\t")[0]) for line in ended.splitlines()) == sorted(listed)


def test_an_array_whose_uploads_hang_can_be_broken_off(pair: Pair, tmp_path: Path) -> None:
    """The first Ctrl-C waits for the uploads that have begun, and says so. The second breaks them off."""
    with Proxy(pair.server.port) as line:
        shell = Shell(tmp_path / "here", line.url)
        line.plant(Fault("drip", "POST /upload", times=0, seconds=0.2))
        sending = shell.spawn("submit", "--array", "1-500", "--name", "broken", "--", "true")
        wait_for(lambda: len(line.find("POST /upload")) > 20)
        line.calm()
        line.plant(Fault("stall", "POST /upload", times=0, after=10, seconds=600))
        wait_for(lambda: line.counts()["stall"] >= 8)
        sending.send_signal(signal.SIGINT)
        assert sending.stderr is not None
        assert sending.stderr.readline() == "joborch: it finishes what has begun; Ctrl-C breaks that off\n"
        sending.send_signal(signal.SIGINT)
        out, said = sending.communicate(timeout=60)
    assert (sending.returncode, out) == (130, "")
    (count,) = re.findall(r"(\d+) of 500 jobs are queued: `joborch cancel [\d -]+` stops them; `joborch list` shows", said)
    listed = [job["id"] for job in pair.server.jobs(user_id=42) if (job["name"] or "").startswith("broken")]
    assert 0 < int(count) <= len(listed) <= int(count) + 8
    Shell(tmp_path / "own", pair.server.url)("cancel", "--name", "broken", "--yes")


def test_ctrl_c_before_the_first_upload_of_an_array_sends_no_more(pair: Pair, tmp_path: Path) -> None:
    """It may come while the jobs are only handed to the threads that send them: the rest must not be sent while the program ends."""
    program = (
        "import sys, concurrent.futures.thread as pools; sys.path.insert(0, sys.argv[1])\n"
        "class Pool(pools.ThreadPoolExecutor):\n"
        "    def submit(self, *given):\n"
        "        self.count = getattr(self, 'count', 0) + 1\n"
        "        if self.count == 200: raise KeyboardInterrupt\n"
        "        return super().submit(*given)\n"
        "import concurrent.futures; concurrent.futures.ThreadPoolExecutor = Pool\n"
        "from joborch_plugins import commands; sys.exit(commands.main(sys.argv[2:]))\n"
    )
    shell = Shell(tmp_path / "here", pair.server.url, [sys.executable, "-c", program, str(ROOT)])
    said = shell("submit", "--array", "1-500", "--name", "early", "--", "true", status=130)
    own = Shell(tmp_path / "own", pair.server.url)
    queued = own("list", "-n", "0", "--name", "early").splitlines()
    assert len(queued) < 199 and f"interrupted: {len(queued)} of 500 jobs are queued" in said
    own("cancel", "--name", "early", "--yes")


def test_the_numbers_of_an_array() -> None:
    assert commands.read_indexes("1-10:3") == [1, 4, 7, 10]
    assert commands.read_indexes("7, 1-3,2") == [1, 2, 3, 7]
    assert len(commands.read_indexes("1-100000")) == 100_000
    for text in ("1-3:0", "3-1", "1-99999,200000-200001", "", "1,", "-1", "1-2-3", "1:2", "a"):
        with pytest.raises(argparse.ArgumentTypeError):
            commands.read_indexes(text)


def test_waiting_and_following_go_on_over_a_restart(own_pair: Pair, tmp_path: Path) -> None:
    """Of the server and of the client."""
    server: Process = own_pair.server
    gate = tmp_path / "gate"
    number = submit(server, f"echo one; {gated(gate)}; echo two", user_id=42)
    wait_status(server, number, "Running")
    with Proxy(server.port) as line:
        shell = Shell(tmp_path / "here", line.url)
        waiting, following = shell.spawn("wait", str(number)), shell.spawn("logs", str(number), "-f")
        assert following.stdout is not None and following.stdout.readline() == "one\n"
        wait_for(lambda: line.find(r"GET /jobs.*wait="), what="the wait, for which the server has answered once")
        server.kill()
        own_pair.client.kill()
        time.sleep(0.5)
        server.start()
        own_pair.client.start()
        gate.touch()
        out, said = waiting.communicate(timeout=60)
        assert (waiting.returncode, out) == (0, f"{number}\tCompleted\trun.sh ended with exit status 0\n"), said
        out, said = following.communicate(timeout=60)
        assert (following.returncode, out) == (0, "two\n"), said


def test_a_get_that_is_cut_goes_on(pair: Pair, tmp_path: Path) -> None:
    """By Ctrl-C; nothing half stands under the name of the result."""
    with Proxy(pair.server.port) as line:
        shell = Shell(tmp_path / "here", line.url)
        number = shell("submit", "--wait", "--", "sh", "-c", "head -c 5000000 /dev/urandom >big").strip()
        line.plant(Fault("stall", "GET /download", after=2_000_000, seconds=60))
        fetching = shell.spawn("get", number)
        wait_for(lambda: [path for path in shell.folder.iterdir() if path.name.endswith(".part") and path.stat().st_size > 1_000_000])
        fetching.send_signal(signal.SIGINT)
        _, said = fetching.communicate(timeout=30)
        assert fetching.returncode == 130
        assert f"interrupted: `joborch get {number}` resumes" in said
        assert not (shell.folder / f"job-{number}").exists()
        assert shell("get", number) == f"job-{number}\n"
        assert int(line.find("GET /download")[-1].headers["range"][6:-1]) > 1_000_000
    assert [path.name for path in shell.folder.iterdir()] == [f"job-{number}"]
    assert (shell.folder / f"job-{number}/big").stat().st_size == 5_000_000


def test_a_long_transfer_shows_how_far_it_is(pair: Pair, tmp_path: Path) -> None:
    with Proxy(pair.server.port) as line:
        shell = Shell(tmp_path / "here", line.url)
        (shell.folder / "big").write_bytes(b"x" * 80_000_000)
        line.plant(Fault("stall", "POST /upload", after=20_000_000, seconds=2, goes_on=True, where="request"))
        status, written = shell.terminal(80, "submit", "big", "--wait", "--", "true")
        assert status == 0
        assert re.search(r"\r\x1b\[Ksent \d+\.\d MiB of 76\.3 MiB \(\d\d%\)", written)


# == Where it runs ==


def test_every_word_has_examples_that_can_be_typed() -> None:
    for name, word in commands.WORDS.items():
        if word.here:
            for line in word.examples.splitlines():
                plain = re.sub(r'eval "\$\((.*)\)"', r"\1", re.split(r" [<>|]", line)[0])
                typed = re.sub(r"'[^']*'", "X", plain).split()
                assert typed[:2] == ["joborch", name]
                commands.parse(typed[1:])


def test_a_name_that_cannot_be_sent_is_named_as_the_user_knows_it(shell: Shell) -> None:
    """The command sends a folder with a program as a tar. The message names the file in the folder, not the tar."""
    (shell.folder / "tree").mkdir()
    for name in ("run.sh", "a\nb"):
        (shell.folder / "tree" / name).write_text("true\n")
        (shell.folder / "tree" / name).chmod(0o755)
    said = shell("submit", "tree", status=2)
    assert said == "joborch: file name 'a b' contains a control character: use printable ones\n"


def test_the_help_names_all_commands(shell: Shell) -> None:
    text = shell("--help")
    for name in commands.WORDS:
        assert re.search(rf"^ +{name}\s+\w", text, re.MULTILINE), name  # argparse puts the help of a long name on the next line
    assert shell("submit", "--help").startswith("usage: joborch submit")
    assert shell("ls", "--user", "7654321", "--json") == "[]\n"
    assert shell("help") == text


@pytest.mark.parametrize("version", pythons())
def test_every_python_has_the_commands(version: str, pyz: Path, pair: Pair, tmp_path: Path) -> None:
    """Each of them and the library's example, from the archive alone, without a home, in a folder that cannot be written."""
    python = [str(pythons()[version]), "-W", "error"]
    shell, name = Shell(tmp_path / "here", pair.server.url, [*python, str(pyz)]), f"with-{version}"
    shell.environment.update(HOME="nowhere", XDG_CACHE_HOME="", XDG_CONFIG_HOME="")  # without HOME it would be that of this user
    shell.folder = Path("/proc")
    number = shell("submit", str(EXAMPLE), "--wait", "--name", name).strip()
    assert shell("get", number, status=2).startswith("joborch: /proc cannot be written: ")
    here = str(tmp_path)
    typed = {
        f"list --name {name}": f"{number}\t{name}\tCompleted\t", f"wait {number}": f"{number}\tCompleted\t",
        f"logs {number}": "2oob: 36 residue pairs", f"logs {number} -f": "2oob: 36 residue pairs",
        f"get {number} -o {here}/out": f"{here}/out\n", f"get {number} summary.txt -o {here}/one": f"{here}/one\n",
        f"get {number} summary.txt -o -": "2oob: 36", f"why {number}": f"job {number} ({name}) of service example: Completed",
        f"retry {number}": "", f"cancel --name {name}": "", "quota": "example\t", "top": "service\texample\t",
        "completion bash": "_joborch", f"login {pair.server.url}": "", "logout": "no login was stored\n",
        "pause example": "", "resume example": "", "clouds": "", "token list": "",
    }  # fmt: skip
    shell.program = one_by_one(python, pyz, typed, str(EXAMPLE / "map.py"), str(EXAMPLE))
    done = shell.run()
    assert done.returncode == 0, done
    said = outputs(done.stdout)
    assert [ran for ran, _ in said] == [*(f"{words} {2 if words.startswith('login') else 0}" for words in typed), ""]
    for (ran, output), wanted in zip(said, [*typed.values(), "2oob.pdb: 2oob: 36 residue pairs"]):
        assert output.startswith(wanted), ran
    errors = {ran: output for ran, output in outputs(done.stderr) if output}
    assert [ran.split()[0] for ran in errors] == ["login"] and "there is no home folder" in next(iter(errors.values()))
    assert (tmp_path / "out/summary.txt").read_text() == (tmp_path / "one").read_text()


def test_ctrl_c_while_it_starts(pyz: Path, shell: Shell) -> None:
    """No traceback, also before the command knows what it is to do."""
    (shell.folder / "argparse.py").write_text("raise KeyboardInterrupt\n")
    shell.program = [sys.executable, str(pyz)]
    assert shell("list", status=130, PYTHONPATH=str(shell.folder)) == "joborch: interrupted\n"


def test_the_commands_do_without_the_program(pyz: Path, pair: Pair, tmp_path: Path) -> None:
    shell = Shell(tmp_path / "here", pair.server.url, [sys.executable, "-X", "importtime", str(pyz)])
    shell.run("list")
    for words in (("list",), ("--help",), ("why", "1")):
        done = shell.run(*words)
        loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
        assert "joborch_plugins.commands" in loaded
        assert not {"joborch", "sqlite3", "requests", "bottle", "logging", "zipfile", "concurrent.futures"} & loaded


def test_many_jobs_are_sent_at_once(shell: Shell) -> None:
    """What bounds it is the server's disk."""
    numbers = shell("submit", "--array", "1-200", "--name", "quick", "--", "true").split()
    assert len(set(numbers)) == 200
    shell("cancel", "--name", "quick", "--yes")


def test_installed_with_pip_it_is_the_same() -> None:
    """The script that pip makes starts here."""
    assert 'joborch = "joborch_plugins.commands:start"' in (ROOT / "pyproject.toml").read_text()
