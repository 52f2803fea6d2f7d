"""What `joborch login` stores: for this user alone, and a token for one server alone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import MakeProcess
from harness import Pair, Process, free_port
from shell import Shell, seen

from joborch_plugins.caller import DEFAULT_SERVER, Jobs, JobsError, stored_login

TOKEN = "a-token-for-callers-only"


@pytest.fixture(name="guarded")
def guarded_fixture(make_process: MakeProcess) -> Process:
    """A server that wants a token."""
    return make_process("server", {"JOBORCH_TOKEN": TOKEN, "JOBORCH_SOCKET": "none"}).start()


@pytest.fixture(name="shell")
def shell_fixture(tmp_path: Path) -> Shell:
    """The shell of somebody who has set nothing."""
    shell = Shell(tmp_path / "home", "")
    del shell.environment["JOBORCH_SERVER"], shell.environment["JOBORCH_USER"]
    return shell


def stored(shell: Shell) -> Path:
    """The file of the login."""
    return shell.folder / ".config/joborch/login.json"


def test_login_stores_server_token_and_user(guarded: Process, shell: Shell) -> None:
    assert "`joborch login URL` stores a token" in shell("list", status=2, JOBORCH_SERVER=guarded.url)
    said = shell("login", f"{guarded.url}/", "--user", "7", JOBORCH_TOKEN=TOKEN)
    assert said == f"commands and scripts now call {guarded.url} as user 7 ({stored(shell)})\n"
    assert stored(shell).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in stored(shell).parent.iterdir()] == ["login.json"]
    assert shell("list") == ""
    assert json.loads(shell("quota", "--json"))["user_id"] == 7
    assert json.loads(shell("quota", "--json", "--user", "8"))["user_id"] == 8
    assert json.loads(shell("quota", "--json", JOBORCH_USER="9"))["user_id"] == 9
    assert json.loads(shell("login", guarded.url, "--json", JOBORCH_TOKEN=TOKEN))["user_id"] == 7, "with a new token, perhaps"
    shell("login", guarded.url, "--user", str(os.getuid()), JOBORCH_TOKEN=TOKEN)
    assert json.loads(stored(shell).read_text())["user"] is None
    assert json.loads(shell("quota", "--json"))["user_id"] == os.getuid()
    assert json.loads(shell("logout", "--json")) == {"path": str(stored(shell)), "deleted": True}
    assert (shell("logout"), stored(shell).exists()) == ("no login was stored\n", False)
    shell("list", status=2, JOBORCH_SERVER=guarded.url)


def test_the_token_is_typed_or_piped_in(guarded: Process, shell: Shell) -> None:
    status, written = shell.terminal(80, "login", guarded.url, typed=TOKEN.encode() + b"\n", answers=f"token for {guarded.url}: ")
    assert (status, seen(written).splitlines()[-1].startswith("commands and scripts now call")) == (0, True), written
    assert TOKEN not in written.partition("token for")[2], "what is typed is not shown"
    shell("list")
    shell("logout")
    command = [*shell.program, "login", guarded.url]
    piped = subprocess.run(command, cwd=shell.folder, env=shell.environment, input=f"{TOKEN}\n", capture_output=True, text=True, timeout=90)
    assert (piped.returncode, piped.stderr) == (0, "")
    shell("list")


def test_what_does_not_work_is_not_stored(guarded: Process, shell: Shell) -> None:
    assert f"the server wants a token: pipe it in, as in joborch login {guarded.url} <token-file" in shell("login", guarded.url, status=2)
    shell("login", guarded.url, status=2, JOBORCH_TOKEN="another")
    shell("login", f"http://127.0.0.1:{free_port()}", status=3)
    assert "give its URL" in shell("login", "somewhere", status=2)
    assert "required: URL" in shell("login", status=2)
    assert not stored(shell).exists()


def test_the_token_goes_to_its_server_alone(guarded: Process, pair: Pair, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell("login", guarded.url, "--user", "7", JOBORCH_TOKEN=TOKEN)
    for name, value in {**dict.fromkeys([name for name in os.environ if name.startswith("JOBORCH_")]), **shell.environment}.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert Jobs().server.headers["Authorization"] == Jobs(guarded.url).server.headers["Authorization"] == f"Bearer {TOKEN}"
    elsewhere = Jobs(pair.server.url)
    assert ("Authorization" in elsewhere.server.headers, elsewhere.user) == (False, os.getuid())
    monkeypatch.setenv("JOBORCH_TOKEN", "another")
    assert Jobs().server.headers["Authorization"] == "Bearer another"


def test_a_login_by_a_socket(own_pair: Pair, shell: Shell) -> None:
    """It works from any folder."""
    (path,) = Path(f"/tmp/joborch-{os.getuid()}").glob(f"joborch-{own_pair.server.port}.sock")
    (shell.folder / "here.sock").symlink_to(path)
    shell("login", "unix:here.sock")
    assert json.loads(stored(shell).read_text())["server"] == f"unix:{shell.folder}/here.sock"
    shell.folder = Path("/")
    assert shell("list") == ""


def test_a_login_that_cannot_be_trusted(pair: Pair, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(shell.folder / ".config"))
    assert stored_login("").server == DEFAULT_SERVER
    stored(shell).parent.mkdir(parents=True)
    for text, said in (
        ('{"server": "http://h", "token": "t", "user": null}', "is open to other users"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
    ):
        stored(shell).write_text(text)
        stored(shell).chmod(0o644 if "open" in said else 0o600)
        with pytest.raises(JobsError, match=said):
            stored_login("")
    assert f"{stored(shell)} is damaged: run joborch login again" in shell("list", status=2)
    shell("login", pair.server.url)
    assert shell("list") == ""


@pytest.mark.usefixtures("root")
def test_another_user_s_login_does_not_count(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write it could send the files of jobs elsewhere."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(shell.folder / ".config"))
    stored(shell).parent.mkdir(parents=True)
    stored(shell).write_text('{"server": "http://h", "token": "t", "user": null}')
    stored(shell).chmod(0o600)
    os.chown(stored(shell), 12345, 12345)
    with pytest.raises(JobsError, match="is open to other users"):
        stored_login("")


def test_without_a_home_there_is_no_login(pair: Pair, shell: Shell) -> None:
    shell.environment.update(HOME="nowhere", XDG_CONFIG_HOME="")
    assert "there is no home folder to store it in: set JOBORCH_SERVER" in shell("login", pair.server.url, status=2)
    shell("list", JOBORCH_SERVER=pair.server.url)
