"""`joborch top` in a real terminal, in a pipe, and as JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from conftest import MakePair
from harness import ROOT, Pair, free_port, submit, wait_for, wait_status
from shell import Screen, Shell, screen
from world import gated


@pytest.fixture(name="site")
def site_fixture(make_pair: MakePair) -> Pair:
    """A server and client with nothing to do; a second client does not answer."""
    site = make_pair(client={"JOBORCH_SLOTS": "4"})
    site.server.settings["SERVICE_EXAMPLE_CLIENTS"] = f"{site.client.url},http://127.0.0.1:{free_port()}"
    return site.start()


@pytest.fixture(name="shell")
def shell_fixture(site: Pair, tmp_path: Path) -> Shell:
    return Shell(tmp_path / "here", site.server.url)


def steady(text: str, site: Pair) -> str:
    """A screen without what differs from run to run: times, load, addresses, slots of this machine, and how wide the columns are."""
    text = text.replace(site.client.url.removeprefix("http://"), "CLIENT").replace(site.server.url, "SERVER")
    text = re.sub(r"127\.0\.0\.1:\d+", "AWAY", text)
    text = re.sub(r"\d\d:\d\d:\d\d", "NOW", text)
    text = re.sub(r"cannot be reached.*", "cannot be reached", text)
    text = re.sub(r"\b\d+s\b", "TIME", text)
    text = re.sub(r"(\d+) of \d+ +(\d+) +\d+%", r"\1 of N  \2  CPU", text)
    return re.sub(r"(?<=\S) {2,}", "  ", text)


SCREEN = """\
NOW  SERVER  jobs of user 42

SERVICE  RUNNING  QUEUED  USERS  MEAN RUN
example  1 of 10  0  0

CLIENT  FREE SLOTS  JOBS  CPU
CLIENT  1 of N  1  CPU
AWAY  0  cannot be reached

  JOB  USER  SERVICE  NAME  STATUS  AGE
> 2  42  example  second  Queued  TIME
  1  42  example  first  Running  TIME  on CLIENT
↑↓ choose  l log  c cancel  s status  a all users  / filter  q quit"""


def test_the_site_seen_in_a_terminal(make_pair: MakePair, tmp_path: Path) -> None:
    """At 80 columns, at 200, and when the window changes; without colour as well."""
    site = make_pair(client={"JOBORCH_SLOTS": "2"})
    site.server.settings["SERVICE_EXAMPLE_CLIENTS"] = f"{site.client.url},http://127.0.0.1:{free_port()}"
    site.start()
    shell, gate = Shell(tmp_path / "here", site.server.url), tmp_path / "gate"
    assert submit(site.server, f"echo begun; {gated(gate)}", user_id=42, name="first") == 1
    wait_status(site.server, 1, "Running")
    assert submit(site.server, "true", user_id=42, name="second", after="1") == 2

    def looks(shown: Screen, columns: int) -> None:
        text = shown.until("Running", "cannot be reached", "1 of 2 ", "q quit")
        wait_for(lambda: max(map(len, shown.text().splitlines())) <= columns)
        cut = re.sub(r"(second\s+Queued\s+TIME).*", r"\1", steady(text, site))
        assert cut == SCREEN

    for size in ((80, 24), (200, 50)):
        with screen(shell, size, "top") as shown:
            looks(shown, size[0])
            shown.tmux("resize-window", "-x", "120", "-y", "12")
            wait_for(lambda shown=shown: len(shown.text().splitlines()) <= 12 and "q quit" in shown.text())
            shown.tmux("resize-window", "-x", str(size[0]), "-y", str(size[1]))
            looks(shown, size[0])
            assert shown.flags() == "1 0 0"
            shown.type("q")
            assert "status=0 icanon echo" in shown.until("status=")
            assert shown.flags() == "0 1 1"
    for settings, found in (({}, True), ({"NO_COLOR": "1"}, False)):
        with screen(shell, (80, 24), "top", **settings) as shown:
            shown.until("Running", "q quit")
            assert ("\x1b[" in shown.tmux("capture-pane", "-p", "-e")) is found
    gate.touch()


def test_keys_choose_filter_follow_and_cancel(site: Pair, shell: Shell, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    for name in ("quince", "pear", "quail"):
        submit(site.server, f"echo juice of {name}; printf 'a\\033[31m\\n'; {gated(gate)}; echo done", user_id=42, name=name)
    submit(site.server, "true", user_id=43, name="nobody")
    with screen(shell, (100, 30), "top") as shown:
        shown.until("> 3 ", "quince", without="nobody")
        shown.type("a")
        shown.until("jobs of all users", "nobody")
        shown.type("s")
        shown.until("jobs of all users, Running", without="nobody")
        for _ in range(4):
            shown.type("s")
        shown.until("nobody")
        shown.type("/")
        shown.type("x", "BSpace", "Q", "u")
        shown.until("filter: Qu", "quail", "quince", without="pear")
        shown.type("Enter")
        shown.until("with 'Qu'", "q quit")
        shown.type("Down")
        shown.until("> 1 ")
        shown.type("c")
        shown.until("stop job 1 (quince)? [y/N]")
        shown.type("n")
        shown.until("q quit")
        shown.type("Up", "c", "y")
        shown.until("job 3 is Killed")
        wait_status(site.server, 3, "Killed")
        shown.type("c")
        shown.until("job 3 is Killed")
        shown.type("/", "Escape")
        shown.until("pear", without="with 'Qu'")
        shown.type("/", "p", "e", "a", "r", "Enter", "l")
        shown.until("output of job 2; Ctrl-C leads back", "juice of pear", "a�[31m")
        shown.type("C-c")
        shown.until("job 2 continues", "> 2 ")
        shown.type("l")
        shown.until("juice of pear\na")
        gate.touch()
        shown.until("done\njob 2 is Completed; Enter leads back")
        shown.type("Enter")
        shown.until("> 2 ", "Completed", "q quit")
        shown.type("/", "z", "Enter", "c", "l", "Down")
        shown.until("no jobs", "q quit")
        shown.type("q")
        shown.until("status=0 icanon echo")


def pid_of(shell: Shell) -> int:
    """The process of `top` with this home."""
    home = f"HOME={shell.environment['HOME']}".encode()

    def found() -> int:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words, environment = (path / "cmdline").read_bytes().split(b"\0"), (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[-2:] == [b"top", b""] and b"python" in words[0] and home in environment:
                return int(path.name)
        return 0

    return wait_for(found)


@pytest.mark.parametrize(("how", "status"), [("C-c", "130"), ("TERM", "143"), ("HUP", "129"), ("crash", "1")])
def test_the_terminal_is_as_before(how: str, status: str, site: Pair, shell: Shell) -> None:
    crash = "from joborch_plugins import commands, top; top.story = lambda facts: 1 / (facts['name'] != 'bad'); "
    crash += "import sys; sys.path[0] = ''; sys.exit(commands.main(['top']))"
    program = [sys.executable, "-c", crash, "top"] if how == "crash" else None
    submit(site.server, "true", user_id=42, name="good")
    with screen(shell, (80, 24), *([] if program else ["top"]), program=program, PYTHONPATH=str(ROOT)) as shown:
        if not program:
            shown.until("good", "q quit")
        if how == "C-c":
            shown.type("C-c")
        elif how == "crash":
            submit(site.server, "true", user_id=42, name="bad")
        else:
            os.kill(pid_of(shell), getattr(signal, f"SIG{how}"))
        text = shown.until(f"status={status} icanon echo")
        assert shown.flags() == "0 1 1"
        assert ("ZeroDivisionError" in text) is (how == "crash")


def test_it_can_be_stopped_and_continued(site: Pair, shell: Shell) -> None:
    """By Ctrl-Z and fg in a shell."""
    submit(site.server, "true", user_id=42, name="good")
    with screen(shell, (80, 24), program=["bash", "--norc", "-i"], PS1="ready> ") as shown:
        shown.until("ready>")
        shown.type(" ".join([*shell.program, "top"]), "Enter")
        shown.until("good", "q quit")
        shown.type("C-z")
        shown.until("Stopped", "ready> ")
        assert shown.flags() == "0 1 1"
        shown.type("fg", "Enter")
        shown.until("good", "q quit")
        assert shown.flags() == "1 0 0"
        shown.type("q")
        shown.until("ready>", without="q quit")


def test_a_server_that_hangs_does_not_hold_it(site: Pair, shell: Shell) -> None:
    with screen(shell, (80, 24), "top") as shown:
        shown.until("q quit")
        os.kill(site.server.pid, signal.SIGSTOP)
        try:
            shown.type("a", "q")  # it asks again, and is not answered
            assert "status=0 icanon echo" in shown.until("status=")
        finally:
            os.kill(site.server.pid, signal.SIGCONT)


def test_a_server_that_is_away_meanwhile(site: Pair, shell: Shell) -> None:
    submit(site.server, "true", user_id=42, name="good")
    with screen(shell, (100, 24), "top") as shown:
        shown.until("good", "q quit")
        site.server.kill()
        shown.until("good", f"no server answers at {site.server.url}")
        site.server.start()
        shown.until("good", "q quit")
        site.server.kill()
        shown.until("no server answers")
        shown.type("q")
        shown.until("status=0")


def test_a_pipe_and_json_get_one_look(site: Pair, shell: Shell) -> None:
    number = submit(site.server, "true", user_id=42, name="a name")
    wait_status(site.server, number, "Completed")
    rows = [line.split("\t") for line in shell("top").splitlines()]
    assert [row[0] for row in rows] == ["service", "client", "client", "job"]
    assert rows[0][1:4] == ["example", "0 of 10", "0"]
    assert rows[3][1:6] == [str(number), "42", "example", "a name", "Completed"]
    said = json.loads(shell("top", "--json"))
    assert (said["services"], len(said["clients"])) == (site.server.get("/services").json()["services"], 2) or said["services"]
    assert [job["id"] for job in said["jobs"]] == [number]
    assert json.loads(shell("top", "--json", "--user", "5"))["jobs"] == []
    assert json.loads(shell("top", "--json", "--user", "5", "--all"))["jobs"] == said["jobs"]
    assert shell.terminal(80, "top", TERM="dumb")[1].startswith("service\t")


def test_it_shows_the_figures_of_the_web_page(site: Pair, shell: Shell, tmp_path: Path) -> None:
    """With a job that runs, one that waits and one that has ended: services, slots, and the states of the jobs."""
    gate = tmp_path / "gate"
    wait_status(site.server, submit(site.server, "true", user_id=42), "Completed")
    running = submit(site.server, gated(gate), user_id=42)
    wait_status(site.server, running, "Running")
    submit(site.server, "true", user_id=42, cpus=4)
    wait_for(lambda: site.server.get("/services").json()["services"][0]["queued"] == 1, what="a job that waits for four cores")

    def cells(path: str, name: str) -> dict[str, str]:
        page = site.server.get(f"/dashboard{path}").text
        (row,) = [row for row in re.findall(r"<tr>(.*?)</tr>", page) if name in row and "<td" in row]
        return {title: re.sub(r"<[^>]*>", "", text) for title, text in re.findall(r'<td data-label="([^"]*)">(.*?)</td>', row)}

    rows = [line.split("\t") for line in shell("top").splitlines()]
    (service,) = [row[1:] for row in rows if row[0] == "service"]
    shown = cells("", "service=example")
    assert [shown[title] for title in ("Service", "Running", "Queued", "Users waiting")] == service[:4]
    (client,) = [row[1:] for row in rows if row[1] == site.client.url.removeprefix("http://")]
    (used, slots) = re.findall(r'aria-label="(\d+) of (\d+) in use"', site.server.get("/dashboard").text)[0]
    assert client[1] == f"{int(slots) - int(used)} of {slots}"
    for row in rows:
        if row[0] == "job":
            assert cells("/jobs", f'/jobs/{row[1]}"')["Status"] == row[5]
    gate.touch()
