"""`joborch doctor`: what would stand in the way is named with its remedy, what is well is said to be, and nothing is changed."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeProcess
from harness import NOBODY_UID, Pair, free_port
from world import doctor


def problems(found: list[dict[str, Any]]) -> list[str]:
    return [finding["text"] for finding in found if finding["good"] is False]


def test_all_is_well(pair: Pair, tmp_path: Path) -> None:
    """Of a pair that runs: the client answers, takes the token, and has the same time. Nothing is left behind."""
    code, found = doctor("server", tmp_path, **pair.server.settings)
    assert (code, problems(found)) == (0, [])
    assert any(f"service example: 127.0.0.1:{pair.client.port} answers (local)" in finding["text"] for finding in found)
    assert not list(tmp_path.iterdir())
    code, found = doctor("client", tmp_path, PORT=str(pair.client.port), DATA_PATH=str(pair.client.data))
    assert (code, [finding["text"] for finding in found if "runs on port" in finding["text"]]) == (
        0,
        [f"a client runs on port {pair.client.port}"],
    )


def test_a_client_that_does_not_let_us_in(pair: Pair, tmp_path: Path) -> None:
    code, found = doctor("server", tmp_path, SERVICE_EXAMPLE_CLIENTS=pair.client.url, SERVICE_EXAMPLE_TOKEN="wrong")
    (problem,) = problems(found)
    assert (code, "refuses this server" in problem, "set SERVICE_EXAMPLE_TOKEN" in problem) == (1, True, True)


@pytest.mark.parametrize("what", ["nobody", "rubbish"])
def test_a_client_that_is_not_there(what: str, tmp_path: Path) -> None:
    """Nobody listens, or somebody who speaks no HTTP."""
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1] if what == "rubbish" else free_port()
        if what == "rubbish":
            other.listen(1)
        code, found = doctor("server", tmp_path, SERVICE_X_CLIENTS=f"http://127.0.0.1:{port}", SERVICE_X_TOKEN="t")
    (problem,) = problems(found)
    assert code == 1
    assert f"service x: 127.0.0.1:{port}: " in problem
    assert "is it up" in problem or "is the client running" in problem


def test_a_port_that_is_taken(make_process: MakeProcess, pair: Pair, tmp_path: Path) -> None:
    """By a server where a client is to be, or by another client: of another user, or with another folder."""
    code, found = doctor("client", tmp_path, PORT=str(pair.client.port))
    assert (code, f"cannot listen on 127.0.0.1:{pair.client.port} (address already in use)" in problems(found)[0]) == (1, True)
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    code, found = doctor("client", tmp_path, PORT=str(server.port))
    (problem,) = problems(found)
    there = "a joborch server with another data folder listens there"
    assert (code, problem) == (1, f"port {server.port} cannot be used: {there}; set PORT, or stop it")


def test_a_folder_that_is_full_or_not_ours(tmp_path: Path) -> None:
    code, found = doctor("client", tmp_path, JOBORCH_MIN_FREE="999999G")
    assert (code, "free space, or set DATA_PATH" in problems(found)[0]) == (1, True)
    (tmp_path / "file").touch()
    code, found = doctor("client", tmp_path, DATA_PATH=str(tmp_path / "file" / "data"))
    assert (code, "is not writable" in problems(found)[0]) == (1, True)


def test_dirac_without_url_or_login(tmp_path: Path) -> None:
    """Each is a problem among the others, with its remedy."""
    code, found = doctor("client", tmp_path, JOBORCH_EXECUTOR="dirac")
    assert (code, "JOBORCH_DIRAC_URL is not set" in problems(found)[0]) == (1, True)
    url = {"JOBORCH_EXECUTOR": "dirac", "JOBORCH_DIRAC_URL": "http://127.0.0.1:1"}
    code, found = doctor("client", tmp_path, **url)
    assert (code, "log in with `dirac login`" in problems(found)[0]) == (1, True)
    code, found = doctor("client", tmp_path, **url, SERVICE_DOCK_DIRAC_JDL="Executable = 1")
    assert (code, problems(found)[0].startswith("SERVICE_DOCK_DIRAC_JDL sets Executable: remove it")) == (1, True)


def test_settings_without_effect_are_named(tmp_path: Path) -> None:
    code, found = doctor("client", tmp_path, SERVICE_DOCK_SLURM_PARTITION="gpu")
    assert (code, [finding["text"] for finding in found if "have no effect: JOBORCH_EXECUTOR is local" in finding["text"]]) != (0, [])


def test_no_slurm_here(tmp_path: Path) -> None:
    (tmp_path / "timeout").symlink_to("/usr/bin/timeout")
    code, found = doctor("client", tmp_path, JOBORCH_EXECUTOR="slurm", PATH=str(tmp_path))
    assert (code, "is Slurm installed here" in problems(found)[0]) == (1, True)


def test_as_another_user(open_folder: Path, pyz: Path, root: None) -> None:
    """A folder of somebody else."""
    (open_folder / "data").mkdir(mode=0o700)
    copy = open_folder / "joborch.pyz"
    copy.write_bytes(pyz.read_bytes())
    command = ["/usr/bin/python3", str(copy), "doctor", "client", "--data-path", str(open_folder / "data")]
    identity: dict[str, Any] = {"user": NOBODY_UID, "group": NOBODY_UID, "extra_groups": [], "cwd": "/"}
    environment = {"HOME": str(open_folder), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **identity)
    assert done.returncode == 1
    assert "PROBLEM " in done.stdout
    assert "is not writable (Permission denied)" in done.stdout
