"""Completion in real shells: what stands on the line after TAB."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import MakePair
from harness import Pair, submit, wait_status
from shell import Shell, screen
from world import gated

from joborch_plugins import commands, completion

SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
LOAD = {"bash": 'eval "$(joborch completion bash)"', "zsh": 'eval "$(joborch completion zsh)"', "fish": "joborch completion fish | source"}


@pytest.fixture(name="site")
def site_fixture(make_pair: MakePair, tmp_path: Path) -> Pair:
    """Two services; job 1 has ended, job 2 runs."""
    site = make_pair()
    site.server.settings.update({"SERVICE_DOCKING_CLIENTS": site.client.url, "SERVICE_DOCKING_TOKEN": Pair.TOKEN})
    site.start()
    assert submit(site.server, "true", user_id=42, name="first") == 1
    wait_status(site.server, 1, "Completed")
    assert submit(site.server, gated(tmp_path / "gate"), user_id=42, name="second") == 2
    return site


@pytest.fixture(name="shell")
def shell_fixture(site: Pair, tmp_path: Path) -> Shell:
    """A shell that finds `joborch` in its PATH, in a folder with one file."""
    shell = Shell(tmp_path / "here", site.server.url)
    program = shell.folder / "bin" / "joborch"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec " + " ".join(shell.program) + ' "$@"\n')
    program.chmod(0o755)
    shell.environment["PATH"] = f"{program.parent}:{shell.environment['PATH']}"
    (shell.folder / "unique-file.pdb").touch()
    return shell


@pytest.mark.parametrize("name", SHELLS)
def test_tab_completes(name: str, shell: Shell) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}")
    # PROMPT is zsh's and PS1 bash's; fish has a prompt of its own.
    with screen(shell, (100, 40), program=SHELLS[name], PS1="ready> ", PROMPT="ready> ") as shown:
        prompt = "~#" if name == "fish" and os.geteuid() == 0 else ">"  # fish has one of its own
        shown.until(prompt)
        shown.type(LOAD[name] + "; echo load''ed", "Enter")
        shown.until("loaded\n")

        def completes(typed: str, line: str) -> None:
            shown.type("-l", typed)
            shown.type("Tab")
            shown.until(line.rstrip())  # a terminal does not show the space at the end
            shown.type("C-u")  # and not C-c, which a shell may miss while it draws the line
            shown.type("clear", "Enter")
            shown.until(prompt, without="joborch")

        completes("joborch canc", "joborch cancel ")
        completes("joborch cancel ", "joborch cancel 2 ")
        completes("joborch retry ", "joborch retry 1 ")
        completes("joborch submit --servi", "joborch submit --service ")
        completes("joborch submit -s doc", "joborch submit -s docking ")
        completes("joborch list --status Comp", "joborch list --status Completed ")
        completes("joborch submit uni", "joborch submit unique-file.pdb ")
        completes("joborch submit -- joborch uni", "unique-file.pdb ")
        shown.type("-l", "joborch get ")
        shown.type("Tab", "Tab")
        shown.until("1", "2")
        if name != "bash":
            shown.until("first Completed", "second ")


def test_the_words_for_each_place(shell: Shell) -> None:
    """What is printed for the last word, as the scripts ask for it."""

    def words(*typed: str) -> list[str]:
        return [line.partition("\t")[0] for line in shell("completion", "--", *typed).splitlines()]

    assert words("") == list(commands.WORDS)
    assert words("wai") == ["wait"]
    assert words("get", "") == ["2", "1"]
    assert (words("wait", ""), words("retry", "")) == (["2"], ["1"])
    assert words("get", "--user", "43", "") == []
    assert words("ls", "--status", "=", "Failed,Ki") == ["Failed,Killed"]
    assert words("submit", "--after", "1,") == ["1,2", "1,1"]
    assert words("submit", "-s", "=") == ["docking", "example"]
    assert "--follow" in words("logs", "--")
    assert words("doctor", "") == ["server", "client"]
    assert words("server", "") == words("submit", "--", "") == words("nothing", "") == words("quota", "") == []
    assert dict(json.loads(shell("completion", "--json", "--", "cancel", "")))["2"].startswith("second ")
    assert json.loads(shell("completion", "--json", "fish")) == completion.SCRIPTS["fish"]
    assert "name the shell: bash, zsh or fish" in shell("completion", status=2)
    assert "'tcsh' is none of bash, zsh, fish" in shell("completion", "tcsh", status=2)


def test_a_server_that_does_not_answer_does_not_hold_the_shell(site: Pair, shell: Shell) -> None:
    os.kill(site.server.pid, signal.SIGSTOP)
    try:
        assert shell("completion", "--", "cancel", "") == ""
    finally:
        os.kill(site.server.pid, signal.SIGCONT)
    site.server.kill()
    assert "no server answers" in shell("completion", "--", "cancel", "", status=3), "the scripts drop what is on standard error"
