"""Weak set-ups: what lets other users of the machine in is refused or warned of at each start, and doctor names it with the remedy."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeProcess
from harness import STRANGER_UID, Process, free_port, open_program, wait_for

OWN_UID = 20001  # without a name, and the only one in its group
GOOD_TOKEN = "a-token-that-is-long-enough"
pytestmark = pytest.mark.usefixtures("root")


class Machine:
    """Makes folders and files of two users, and starts a joborch of the first one."""

    def __init__(self, folder: Path, make_process: MakeProcess, program: list[str]) -> None:
        self.folder, self.make_process, self.program = folder, make_process, program

    def make(self, name: str, owner: int, mode: int, content: str | None = None) -> Path:
        """A folder, or a file with some content."""
        path = self.folder / name
        if content is None:
            path.mkdir()
        else:
            path.write_text(content)
        os.chown(path, owner, owner)
        path.chmod(mode)
        return path

    def process(self, role: str = "client", **settings: Any) -> Process:
        """A joborch of the first user, not started."""
        given = (
            {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}", "SERVICE_EXAMPLE_TOKEN": GOOD_TOKEN} if role == "server" else {}
        )
        given = given or {"JOBORCH_EXECUTOR": "local"}  # said, or a machine with Slurm is asked about
        token = {"JOBORCH_TOKEN": GOOD_TOKEN} if role == "client" and "JOBORCH_TOKEN_FILE" not in settings else {}
        name = f"{role}{len(list(self.folder.iterdir()))}"
        return self.make_process(role, {**token, **given, **settings}, folder=self.folder / name, user=OWN_UID, program=self.program)

    def doctor(self, process: Process) -> list[tuple[bool | None, str]]:
        """What doctor finds about the settings of a process."""
        command = [*process.program, "doctor", process.role, "--json"]
        identity: dict[str, Any] = {"user": OWN_UID, "group": OWN_UID, "extra_groups": [], "cwd": "/"}
        done = subprocess.run(command, env=process.environment(), capture_output=True, text=True, check=False, **identity)
        return [(finding["good"], finding["text"]) for finding in json.loads(done.stdout)["findings"]]


@pytest.fixture
def machine(open_folder: Path, make_process: MakeProcess, pyz: Path) -> Machine:
    """A folder in which several users have something."""
    return Machine(open_folder, make_process, open_program(open_folder, pyz))


def refused(machine: Machine, process: Process, *words: str) -> None:
    """The start is refused in one line that has these words, and doctor calls the same a problem."""
    code, said = process.start_refused()
    assert (code, [word for word in words if word not in said]) == (2, []), said
    (line,) = [line for line in said.splitlines() if line.startswith("joborch: ")]
    assert (False, line.removeprefix("joborch: ")) in machine.doctor(process)


def warned(machine: Machine, process: Process, *words: str) -> None:
    """Doctor notes it, it starts, and a line of its log has these words."""
    notes = [text for good, text in machine.doctor(process) if good is None and all(word in text for word in words)]
    assert len(notes) == 1, machine.doctor(process)
    process.start()
    assert len([line for line in process.log.splitlines() if "WARNING" in line and notes[0] in line]) == 1, process.log


def silent(machine: Machine, process: Process) -> None:
    """It starts without a warning, and doctor has no more to say than of a token in the environment, or a client that is not up."""
    others = [text for good, text in machine.doctor(process) if good is not True and "in the environment" not in text]
    usual = ("is the client running", "JOBORCH_ISOLATION is none", "payloads have no control groups")  # said of every client
    assert not [text for text in others if not any(words in text for words in usual)]
    process.start()
    assert "WARNING" not in process.log.replace("WARNING client 127.0.0.1", "")


# == The data folder ==


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o2777])
def test_a_data_folder_of_another_user_is_refused(role: str, mode: int, machine: Machine) -> None:
    data = machine.make("scratch", STRANGER_UID, mode)
    refused(machine, machine.process(role, DATA_PATH=str(data)), f"DATA_PATH is '{data}'", f"belongs to user {STRANGER_UID}", "your own")
    assert list(data.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o2777, 0o707])
def test_a_folder_of_ours_is_closed_to_others(mode: int, machine: Machine) -> None:
    """With a warning where they are others, and not a word where the group is the user's own."""
    data = machine.make("data", OWN_UID, mode)
    process = machine.process(DATA_PATH=str(data))
    if mode & 0o002:
        warned(machine, process, f"'{data}'", f"writable by every user (mode {mode:04o})", "removes that permission")
    else:
        silent(machine, process)
    assert stat.S_IMODE(data.stat().st_mode) == mode & ~0o022


def test_a_group_of_others_loses_its_right(machine: Machine) -> None:
    data = machine.make("data", OWN_UID, 0o2775)
    os.chown(data, OWN_UID, 100)
    data.chmod(0o2775)
    warned(machine, machine.process(DATA_PATH=str(data)), "writable by a group (mode 2775)", "removes that permission")
    assert data.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(("name", "mode"), [("jobs", 0o755), ("wrapper.sh", 0o777), ("something", 0o777)])
def test_what_others_have_put_there_is_not_taken(name: str, mode: int, machine: Machine) -> None:
    """Even if the folder is closed to them now. It is left as it was."""
    data = machine.make("data", OWN_UID, mode)
    machine.make(f"data/{name}", STRANGER_UID, 0o777, None if name == "jobs" else "echo evil")
    refused(machine, machine.process(DATA_PATH=str(data)), f"contains '{name}' of user {STRANGER_UID}", "your own")
    assert stat.S_IMODE(data.stat().st_mode) == mode
    assert [path.name for path in data.iterdir()] == [name]


def test_a_folder_such_as_tmp(machine: Machine) -> None:
    """With the sticky bit, what others have there is theirs, unless it bears one of our names; its mode stays."""
    data = machine.make("tmp-like", 0, 0o1777)
    machine.make("tmp-like/theirs", STRANGER_UID, 0o777)
    silent(machine, process := machine.process(DATA_PATH=str(data)))
    assert stat.S_IMODE(data.stat().st_mode) == 0o1777
    process.kill()
    (data / "joborch.lock").unlink()
    machine.make("tmp-like/joborch.lock", STRANGER_UID, 0o666, "")
    refused(machine, machine.process(DATA_PATH=str(data)), "contains 'joborch.lock' of user")


def test_a_folder_of_root_that_all_may_write(machine: Machine) -> None:
    data = machine.make("data", 0, 0o777)
    refused(machine, machine.process(DATA_PATH=str(data)), "belongs to root and is writable by every user (mode 0777)")


@pytest.mark.parametrize("exists", [True, False])
def test_the_folders_above(exists: bool, machine: Machine) -> None:
    """All users may write without the sticky bit, a group may, or another user owns it: a warning. With the sticky bit: nothing."""
    cases = [(0, 0, 0o777), (0, 0, 0o1777), (0, 100, 0o775), (0, 100, 0o1775), (STRANGER_UID, 100, 0o777)]
    cases += [(STRANGER_UID, 100, 0o755)] if exists else []
    for number, (owner, group, mode) in enumerate(cases):
        above = machine.make(f"above{number}", owner, 0o755)
        if exists:
            machine.make(f"above{number}/data", OWN_UID, 0o700)
        os.chown(above, owner, group)
        above.chmod(mode)
        process = machine.process(DATA_PATH=str(above / "data"))
        if not exists and mode in (0o775, 0o1775):
            continue  # this user may not make it there
        if (owner, mode) == (STRANGER_UID, 0o755):
            warned(machine, process, f"DATA_PATH: '{above}' belongs to user {STRANGER_UID}")
        elif mode == 0o777:
            word = "belongs to user" if owner else "writable by every user (mode 0777)"
            warned(machine, process, f"DATA_PATH: '{above}' {word}" if owner else f"DATA_PATH: '{above}' is {word}")
        elif mode == 0o775:
            warned(machine, process, f"DATA_PATH: '{above}' is writable by a group (mode 0775)")
        else:
            silent(machine, process)


def test_links(machine: Machine) -> None:
    """The real folder is judged; a link of another user is refused, since he can point it elsewhere."""
    own, theirs = machine.make("own", OWN_UID, 0o755), machine.make("theirs", STRANGER_UID, 0o777)
    (own / "link").symlink_to(theirs)
    os.chown(own / "link", OWN_UID, OWN_UID, follow_symlinks=False)
    refused(machine, machine.process(DATA_PATH=str(own / "link")), f"'{own}/link', which belongs to user {STRANGER_UID}")
    data = machine.make("data", OWN_UID, 0o700)
    (machine.folder / "link").symlink_to(data)
    silent(machine, machine.process(DATA_PATH=str(machine.folder / "link")))
    os.chown(machine.folder / "link", STRANGER_UID, STRANGER_UID, follow_symlinks=False)
    refused(
        machine, machine.process(DATA_PATH=str(machine.folder / "link")), f"the link '{machine.folder}/link' belongs to user {STRANGER_UID}"
    )


def test_in_a_user_namespace(machine: Machine) -> None:
    """There the machine's root is a user without a name: folders above that belong to it are no reason to warn."""
    process = machine.process()
    process.program = ["unshare", "--user", "--map-root-user", *process.program]
    process.start()
    lines = [line for line in process.log.splitlines() if "copy in the cache" not in line]  # that is made by nobody here
    assert not [line for line in lines if "belongs to" in line]
    assert "writable" not in process.log


def test_the_database_elsewhere(machine: Machine) -> None:
    """Its folder and file are judged as the data folder is."""
    theirs = machine.make("theirs", STRANGER_UID, 0o777)
    refused(machine, machine.process("server", DB_PATH=str(theirs / "x.db")), f"DB_PATH: '{theirs}' belongs to user {STRANGER_UID}")
    shared = machine.make("shared", 0, 0o1777)
    machine.make("shared/x.db", STRANGER_UID, 0o666, "")
    refused(machine, machine.process("server", DB_PATH=str(shared / "x.db")), f"which belongs to user {STRANGER_UID}")
    silent(machine, machine.process("server", DB_PATH=str(shared / "y.db")))


def test_a_restore_looks_too(machine: Machine) -> None:
    data = machine.make("scratch", STRANGER_UID, 0o777)
    process = machine.process("server", DATA_PATH=str(data))
    process.role, process.arguments = "restore", [str(machine.folder / "backup.db")]
    code, said = process.start_refused()
    assert (code, "belongs to user" in said) == (2, True), said


# == Token files ==


@pytest.mark.parametrize("role", ["client", "server"])
def test_token_files(role: str, machine: Machine) -> None:
    """Readable by others: a warning at each start. Of another user, or writable: refused. Of root for our group, or ours alone: fine."""
    name = "JOBORCH_TOKEN_FILE" if role == "client" else "SERVICE_EXAMPLE_TOKEN_FILE"
    wrong: list[tuple[int, int, int, str]] = [
        (OWN_UID, OWN_UID, 0o644, "is readable by others (mode 0644): chmod 600"),
        (OWN_UID, 100, 0o640, "is readable by others (mode 0640)"),
        (0, 0, 0o444, "is readable by others (mode 0444)"),
        (STRANGER_UID, STRANGER_UID, 0o644, f"belongs to user {STRANGER_UID}"),
        (OWN_UID, OWN_UID, 0o666, "is writable by every user (mode 0666)"),
    ]
    good = [(OWN_UID, OWN_UID, 0o600), (OWN_UID, OWN_UID, 0o400), (OWN_UID, OWN_UID, 0o640), (0, OWN_UID, 0o440)]
    for number, (owner, group, mode, *said) in enumerate([*wrong, *good]):
        file = machine.make(f"token{number}", owner, mode, GOOD_TOKEN + "\n")
        os.chown(file, owner, group)
        process = machine.process(role, **{name: str(file), "SERVICE_EXAMPLE_TOKEN": None})
        if not said:
            silent(machine, process)
        elif "readable" in said[0]:
            warned(machine, process, f"{name} {file} {said[0]}")
            process.stop()
            process.start()
            assert process.log.count(f"{name} {file} {said[0]}") == 2
        else:
            refused(machine, process, f"{name} {file} {said[0]}")
        assert stat.S_IMODE(file.stat().st_mode) == mode, "the files of others' making are left as they are"


def test_the_clients_own_token_is_closed_again(machine: Machine) -> None:
    """With a warning, once; one that another user owns is refused."""
    process = machine.process(JOBORCH_TOKEN=None)
    process.start()
    assert process.home is not None
    file = process.home / ".config/joborch/client-token"
    process.stop()
    file.chmod(0o644)
    warned(machine, process, f"the client's token file {file} is readable by others (mode 0644)", "remove the file to get a new one")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    process.stop()
    process.start()
    assert process.log.count("is readable by others") == 1
    process.stop()
    os.chown(file, STRANGER_UID, STRANGER_UID)
    file.chmod(0o644)
    refused(machine, process, f"the client's token file {file} belongs to user {STRANGER_UID}")


def test_a_folder_of_tokens_that_others_may_write(machine: Machine) -> None:
    folder = machine.make("open", 0, 0o777)
    file = machine.make("open/token", OWN_UID, 0o600, GOOD_TOKEN)
    refused(machine, machine.process(JOBORCH_TOKEN_FILE=str(file)), f"JOBORCH_TOKEN_FILE's folder: '{folder}' is writable by every user")


def test_an_env_file_with_a_token(machine: Machine) -> None:
    """It is a token file, too, if a token is in it."""
    file = machine.make("settings", OWN_UID, 0o644, f"JOBORCH_TOKEN={GOOD_TOKEN}\n")
    process = machine.process(JOBORCH_TOKEN=None)
    process.arguments = ["--env-file", str(file)]
    process.start()
    assert f"--env-file {file} is readable by others (mode 0644)" in process.log
    file.write_text("JOBORCH_LOG=info\n")
    other = machine.process()
    other.arguments = ["--env-file", str(file)]
    other.start()
    assert "readable" not in other.log


def test_secrets_of_a_container_are_fine(machine: Machine) -> None:
    """An engine shows them in /run/secrets, readable by all in the container, or as the user of the host who owns them."""
    shell = f"""
mount -t tmpfs none /run && mkdir /run/secrets && echo {GOOD_TOKEN} >/run/secrets/token && chmod 444 /run/secrets/token || exit 1
chown {STRANGER_UID} /run/secrets/token && exec setpriv --reuid={OWN_UID} --regid={OWN_UID} --clear-groups "$@"
"""
    process = machine.process(JOBORCH_TOKEN_FILE="/run/secrets/token")
    process.program = ["unshare", "--mount", "bash", "-c", shell, "starter", *process.program]
    process.user = None
    process.start()
    assert "WARNING" not in process.log


def test_the_login_of_dirac(machine: Machine) -> None:
    """Its file holds tokens as well."""
    settings = {"JOBORCH_EXECUTOR": "dirac", "JOBORCH_DIRAC_URL": "http://127.0.0.1:9"}
    file = machine.make("credentials.json", OWN_UID, 0o644, "{}")
    found = machine.doctor(machine.process(JOBORCH_DIRAC_CREDENTIALS=str(file), **settings))
    assert any(good is None and f"JOBORCH_DIRAC_CREDENTIALS {file} is readable by others" in text for good, text in found)
    os.chown(file, STRANGER_UID, STRANGER_UID)
    refused(machine, machine.process(JOBORCH_DIRAC_CREDENTIALS=str(file), **settings), f"{file} belongs to user {STRANGER_UID}")


# == Tokens, and root ==


def test_short_tokens(machine: Machine) -> None:
    """A warning, which says whether other machines can try."""
    short = {"JOBORCH_TOKEN": f"{GOOD_TOKEN},fifteen-letters"}
    warned(machine, machine.process(**short), "JOBORCH_TOKEN has a token of 15 characters: use at least 16", "token_urlsafe")
    warned(machine, machine.process(JOBORCH_HOST="0.0.0.0", **short), "JOBORCH_TOKEN has a token of 15 characters", "0.0.0.0 lets other")
    silent(machine, machine.process(JOBORCH_HOST="0.0.0.0", JOBORCH_TOKEN="sixteen-letters-"))
    far = {"SERVICE_EXAMPLE_CLIENTS": "http://192.0.2.1:9000", "SERVICE_EXAMPLE_TOKEN": "short"}
    process = machine.process("server", **far).start()
    assert "SERVICE_EXAMPLE_TOKEN has 5 characters: use at least 16" in process.log
    assert "short" not in process.log.replace("SERVICE_EXAMPLE_TOKEN", "")


def test_a_token_as_a_flag_shows_in_ps(machine: Machine) -> None:
    process = machine.process(JOBORCH_TOKEN=None)
    process.arguments = ["--token", GOOD_TOKEN]
    process.start()
    assert "every user of this machine can see with ps: set JOBORCH_TOKEN_FILE" in process.log
    assert GOOD_TOKEN not in process.log


@pytest.mark.parametrize("role", ["client", "server"])
def test_root_is_warned_of(role: str, make_process: MakeProcess, tmp_path: Path) -> None:
    process = make_process(role, {"JOBORCH_TOKEN": GOOD_TOKEN}).start()
    assert f"WARNING this {role} runs as root" in process.log


def test_a_usual_set_up_is_silent(machine: Machine) -> None:
    """As a user with a home of mode 0755 and the token that the client makes: not a warning, and jobs run."""
    client = machine.process(JOBORCH_TOKEN=None)
    assert client.home is not None
    client.home.chmod(0o755)
    client.start()
    server = machine.process("server", SERVICE_EXAMPLE_TOKEN=None, SERVICE_EXAMPLE_CLIENTS=client.url)
    server.home = client.home
    server.start()
    wait_for(lambda: server.get("/health").status_code == 200)
    assert "WARNING" not in client.log
    assert "WARNING" not in server.log
    assert server.user == OWN_UID
