"""Answers that do not mislead: what was asked is what is answered, and what cannot be done is said at once, with the remedy."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from harness import (
    BASE,
    ENDED,
    NOBODY_UID,
    SOURCE,
    LinkCaller,
    Pair,
    assert_error,
    clean_environment,
    download,
    file_part,
    form,
    form_type,
    free_port,
    from_source,
    nothing_left,
    open_program,
    run_to_end,
    submit,
    upload,
    wait_for,
    wait_status,
)

from joborch_base.settings import load_config
from joborch_base.weak_setups import lines_for_server, start_command

PROMPT_S = 10  # "at once", on a busy machine


# == What is asked of a route ==


@pytest.mark.parametrize(
    ("method", "path", "name", "words"),
    [
        ("GET", "/jobs?user=7", "user", ["did you mean user_id?", "GET /jobs"]),
        ("GET", "/jobs?limit=5&statsu=Failed", "statsu", ["did you mean status?"]),
        ("HEAD", "/jobs?user=7", "user", []),
        ("GET", "/jobs/1?wiat=3", "wiat", ["did you mean wait?"]),
        ("GET", "/jobs/1/logs?strem=stderr", "strem", ["did you mean stream?"]),
        ("GET", "/download/1?wait=5", "wait", ["it takes none"]),
        ("POST", "/terminate/1?force=1", "force", ["it takes none"]),
        ("PUT", "/users/7?wieght=2", "wieght", ["did you mean weight?"]),
        ("GET", "/services?name=example", "name", ["it takes none"]),
        ("GET", "/health?verbose", "verbose", ["deep"]),
        ("GET", "/?x=1", "x", ["it takes none"]),
        ("GET", "/api-docs/openapi.json?v=2", "v", ["it takes none"]),
        ("GET", "/jobs?user_id=1&user_id=2", "user_id", ["2 times", "give it once"]),
        ("GET", "/jobs?=1", "''", []),
        ("GET", "/jobs?us%0Aer=1", "us er", []),
    ],
)
def test_a_parameter_that_is_not_known_is_refused(pair: Pair, method: str, path: str, name: str, words: list[str]) -> None:
    """Left out silently, `?user=7` would show everybody's jobs."""
    run_to_end(pair.server, "true")
    answer = pair.server.call(method, path)
    assert answer.status_code == 400
    if method != "HEAD":
        assert_error(answer, 400, name, *words)


def test_a_field_of_the_form_in_the_address(pair: Pair) -> None:
    answer = pair.server.post("/upload?user_id=1", data=b"x", headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert_error(answer, 400, "user_id does not belong in the URL", "-F user_id=")


def test_a_parameter_that_belongs_in_the_address(pair: Pair) -> None:
    answer = pair.server.call("PUT", "/users/7", data={"weight": "2"})
    assert_error(answer, 400, "weight is missing", "PUT /users/7?weight=2")


def test_a_client_refuses_it_too_but_not_of_a_server(pair: Pair) -> None:
    """A server that is newer than its client may ask for more than that one knows."""
    token = {"Authorization": f"Bearer {pair.TOKEN}"}
    for path in ("/logs/1?strem=stderr", "/load?x=1", "/health?x=1"):
        assert_error(pair.client.get(path, headers=token), 400, "is not a parameter of GET")
    newer = LinkCaller(pair.client).hello()
    assert newer.call("GET", "/events?since=0&room=1", headers={"X-Joborch": "9.9.9"}).status_code == 200


def test_every_route_says_that_it_may_refuse(pair: Pair) -> None:
    """400 is in the description of each, as a page that reads it expects."""
    document = pair.server.get("/api-docs/openapi.json").json()
    described = [operation for item in document["paths"].values() for operation in item.values()]
    assert len(described) > 15
    assert all("400" in operation["responses"] for operation in described)


# == Waiting ==


def test_waiting_for_a_job_that_has_ended(pair: Pair) -> None:
    """It is answered at once, whatever wait is asked for; more than may be waited is cut, never refused."""
    number = run_to_end(pair.server, "true")["id"]
    begun = time.monotonic()
    for wait in ("40", "60", "3600", "99999999999999", "0.5"):
        answer = pair.server.get(f"/jobs/{number}", params={"wait": wait})
        assert (answer.status_code, answer.json()["status"]) == (200, "Completed")
    assert time.monotonic() - begun < PROMPT_S


def test_waiting_for_the_end_of_a_job(pair: Pair) -> None:
    """Without `since` the moves before the end are no answer."""
    number = submit(pair.server, "until [ -e go ]; do sleep 0.05; done; exit 3")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(pair.server.get, f"/jobs/{number}?wait=40")
        wait_status(pair.server, number, "Running")
        answer = pair.server.get(f"/jobs/{number}", params={"wait": "0.2"})
        assert answer.json()["status"] == "Running", "so many seconds at most"
        assert not asked.done(), "it was told of a move before the end"
        (folder,) = [path for path in (pair.client.data / "jobs").iterdir() if path.name.startswith(pair.server.job(number)["uuid"])]
        (folder / "work" / "go").touch()
        assert asked.result(30).json()["status"] == "Failed"


def test_since_may_be_a_list(pair: Pair) -> None:
    """The answer comes when the status is none of these."""
    number = submit(pair.server, "until [ -e go ]; do sleep 0.05; done")
    running = pair.server.get(f"/jobs/{number}?wait=40&since=Queued,Processing,Submitted").json()
    assert running["status"] == "Running"
    begun = time.monotonic()
    assert pair.server.get(f"/jobs/{number}?wait=40&since=Queued,Submitted").json()["status"] == "Running"
    assert time.monotonic() - begun < PROMPT_S
    assert pair.server.get(f"/jobs/{number}?wait=0.3&since=Submitted,Running").json()["status"] == "Running"
    pair.server.post(f"/terminate/{number}")


@pytest.mark.parametrize(
    ("since", "words"),
    [
        ("Nowhere", ["Nowhere"]),
        ("Queued,Runing", ["did you mean Running?"]),
        ("queued", ["did you mean Queued?"]),
        ("", []),
        ("Queued,", []),
    ],
)
def test_since_that_cannot_be_meant(pair: Pair, since: str, words: list[str]) -> None:
    number = run_to_end(pair.server, "true")["id"]
    assert_error(pair.server.get(f"/jobs/{number}", params={"since": since}), 400, "since", "give one of Queued", *words)


# == run.sh ==


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["dock.sh"], ["there is no run.sh among dock.sh: rename it, as in -F 'file=@dock.sh;filename=run.sh'"]),
        (["myjob/run.sh", "myjob/data/a.txt"], ["myjob/run.sh", "leave the folder myjob out", "-F 'file=@myjob/run.sh;filename=run.sh'"]),
        (["a/run.sh", "b/run.sh"], ["among a/run.sh, b/run.sh", "-F file=@run.sh"]),
        (["a/run.sh", "b.txt"], ["rename a/run.sh"]),
        (["Run.sh", "a.txt"], ["rename Run.sh", "filename=run.sh"]),
        (["run.sh.txt", "a.txt"], ["rename run.sh.txt"]),
        (["tree.tar.gz"], ["among tree.tar.gz", "-F archive=@tree.tar.gz"]),
        (["job.zip"], ["among job.zip", "-F archive="]),
        (["a.txt", "b.txt", "c.txt", "d.txt"], ["among a.txt, b.txt, c.txt and 1 more: send a bash script of that name"]),
        (["it's;odd.sh"], ["rename it"]),
        (["run.sh/inner"], ["among run.sh/inner"]),
    ],
)
def test_files_without_run_sh(pair: Pair, names: list[str], words: list[str]) -> None:
    """They are refused at once, nothing is kept, and the message names what there is."""
    with nothing_left(pair.server):
        answer = upload(pair.server, dict.fromkeys(names, b"echo\n"))
        assert assert_error(answer, 400, *words)["field"] == "file"


def test_a_client_still_takes_files_without_run_sh(pair: Pair) -> None:
    """A 2.2 server sends them and counts on the status, not on a 400."""
    token = {"Authorization": f"Bearer {pair.TOKEN}"}
    body = form([file_part("dock.sh", b"echo\n")])
    payload = pair.client.post("/submit", data=body, headers={**form_type(), **token}).json()
    wait_for(lambda: pair.client.get(f"/retrieve/{payload['id']}", headers=token).json()["status"] == "Invalid")


PYTHON = b"#!/usr/bin/env python3\nimport os\nprint('hi')\n"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (b"#!/bin/bash\r\n\r\n# only\r\n", ["Windows line endings (CRLF)", "dos2unix"]),
        (PYTHON, ["run.sh begins with #!/usr/bin/env python3 but is run by bash", "put `python3 your.py` into run.sh"]),
        (b"#!/usr/bin/perl -w\n", ["begins with #!/usr/bin/perl -w", "`perl your.pl`"]),
        (b"#!/usr/bin/env -S A=1 Rscript --vanilla\n", ["`Rscript your.R`"]),
        (b"#! /bin/tcsh\n", ["`tcsh your-script`"]),
        (b"\x7fELF\x02\x01", ["is a program"]),
        (b"\xef\xbb\xbf#!/bin/bash\n", ["byte order mark"]),
        (b"#!/usr/bin/env python3\r\n", ["CRLF", "`python3 your.py`"]),
    ],
)
def test_a_script_that_bash_will_not_take_as_meant(pair: Pair, script: bytes, words: list[str]) -> None:
    """The answer to the upload says so, whatever becomes of it."""
    answer = upload(pair.server, {"run.sh": script}, crlf="keep")
    assert answer.status_code == 201
    said = " ".join(answer.json()["warnings"])
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    "first",
    ["#!/bin/bash", "#!/bin/sh -e", "#!/usr/bin/env bash", "#!/usr/bin/env -S bash -l", "#!/bin/bash-5", "#!", "echo"],
)
def test_a_script_for_a_shell_is_warned_of_nothing(pair: Pair, first: str) -> None:
    assert upload(pair.server, {"run.sh": f"{first}\n".encode()}).json()["warnings"] == []


def test_the_reason_of_a_python_script_says_it_too(pair: Pair) -> None:
    job = run_to_end(pair.server, PYTHON.decode())
    assert job["status"] == "Failed"
    assert "run.sh begins with #!/usr/bin/env python3 but is run by bash" in job["reason"]


def test_crlf_is_said_of_a_script_that_succeeds(pair: Pair) -> None:
    """bash ends with status 0 all the same, where no line of it is a command."""
    answer = upload(pair.server, {"run.sh": b"#!/bin/bash\r\ntrue #\r\n"}, crlf="keep")
    assert "CRLF" in answer.json()["warnings"][0]
    wait_status(pair.server, answer.json()["id"], "Completed")


# == Locks ==

WITHOUT_LOCKS = """
import fcntl, os, runpy, sys
number = int(sys.argv[1])
def lockf(*_):
    raise OSError(number, os.strerror(number))
fcntl.lockf = lockf
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_locks(number: int, folder: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    """Run joborch where locking fails with this errno, as on Lustre or NFS; return exit status and what it said."""
    environment = {**clean_environment(folder), "DATA_PATH": str(folder / "data"), "PORT": str(free_port()), **settings}
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(number), str(SOURCE), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("role", ["server", "client"])
def test_a_file_system_without_locks(number: int, role: str, tmp_path: Path) -> None:
    """It is not called a folder in use: nobody would ever find the process that uses it."""
    code, said = without_locks(number, tmp_path, role, JOBORCH_TOKEN="t")
    lines = [line for line in said.splitlines() if "WARNING" not in line]
    assert (code, "in use" in said, len(lines)) == (2, False, 1), said
    for words in ("DATA_PATH", "this file system has no locks", "another one", "-o flock"):
        assert words in said, said


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_holds(number: int, tmp_path: Path) -> None:
    code, said = without_locks(number, tmp_path, "server")
    assert (code, "in use by process" in said) == (2, True), said


def test_a_lock_that_fails_otherwise(tmp_path: Path) -> None:
    code, said = without_locks(errno.EIO, tmp_path, "server")
    assert (code, "in use" in said, "Input/output error" in said) == (2, False, True), said


@pytest.mark.parametrize("role", ["server", "client"])
def test_doctor_tries_a_lock(role: str, tmp_path: Path) -> None:
    """In the folder itself, and goes on to examine the rest."""
    code, said = without_locks(errno.ENOLCK, tmp_path, "doctor", role)
    assert code == 1
    assert f"PROBLEM DATA_PATH '{tmp_path}': this file system has no locks" in said, said
    assert " is free" in said and "Traceback" not in said


# == Signals ==


@pytest.mark.parametrize(
    ("role", "number"),
    [  # SIGUSR1 drains a client: see test_pauses.py
        *(("server", number) for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)),
        *(("client", number) for number in (signal.SIGHUP, signal.SIGUSR2)),
    ],
)
def test_a_signal_that_means_reload_ends_nobody(role: str, number: signal.Signals, make_process: MakeProcess) -> None:
    """A closed terminal and `kill -HUP` leave lines in the log, and TERM still ends it."""
    process = make_process(role, {"JOBORCH_TOKEN": "t", "SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    os.kill(process.pid, number)
    said = "reload: no setting has changed" if number == signal.SIGHUP else f"{number.name} is ignored"
    wait_for(lambda: said in process.log, what="a line in the log")
    assert process.get("/health", headers={"Authorization": "Bearer t"}).status_code == 200
    assert process.stop() == 0


# == The command line ==


def joborch_says(folder: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    """Exit status, output and errors of one command."""
    environment = {**clean_environment(folder), **settings}
    done = subprocess.run([*from_source(), *arguments], env=environment, capture_output=True, text=True, timeout=60, cwd=folder)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sevrer", "joborch: 'sevrer' is no command (did you mean server?)"),
        ("server --prot 1", "joborch server: --prot is not a flag (did you mean --port?)"),
        ("client --slot=2 --exekutor=slurm", "joborch client: --exekutor is not a flag (did you mean --executor?)"),
        ("config sever", "joborch config: 'sever' is none of server, client (did you mean server?)"),
        ("server --allow-anonymous", "joborch server: --allow-anonymous needs a value, as in --allow-anonymous 1"),
        ("server --port", "joborch server: --port needs a value"),
        ("demo now", "joborch demo: 'now' is one word too many"),
        ("--verison", "joborch: --verison is not a flag (did you mean --version?)"),
        ("backup", "joborch backup: the following arguments are required: FILE"),
    ],
)
def test_a_word_that_is_not_known(line: str, said: str, tmp_path: Path) -> None:
    """One line with the nearest that there is, instead of ten lines of usage."""
    code, out, errors = joborch_says(tmp_path, *line.split())
    assert (code, out, len(errors.splitlines())) == (2, "", 1), errors
    assert errors.startswith(said), errors
    assert "--help" in errors


@pytest.mark.parametrize("command", ["config", "--help", "server --help", "submit --help"])
def test_output_that_nobody_reads(command: str, tmp_path: Path) -> None:
    """As in `joborch config | head -n 0`: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*from_source(), *command.split()], env=clean_environment(tmp_path), stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_restore_with_a_relative_path(make_process: MakeProcess, tmp_path: Path) -> None:
    """It is done, and says so."""
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    number = submit(server, "true")
    data = {"DATA_PATH": "data", "DB_PATH": "jobs.db"}
    code, _, errors = joborch_says(tmp_path, "backup", "copy.db", DATA_PATH=str(server.data))
    assert code == 0, errors
    for _ in range(2):  # into nothing, and over a database
        code, out, errors = joborch_says(tmp_path, "restore", "copy.db", **data)
        assert (code, errors) == (0, ""), errors
        assert out.startswith(f"restored {tmp_path}/jobs.db from copy.db"), out
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.db")) as db:
        assert db.execute("SELECT id FROM jobs").fetchall() == [(number,)]


# == Settings ==


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("JOBORCH_HOSTS=a.org", "JOBORCH_HOSTS", "a.org"),
        ('JOBORCH_HOSTS="a.org,b.org"', "JOBORCH_HOSTS", "a.org,b.org"),
        ("export JOBORCH_HOSTS='a.org'", "JOBORCH_HOSTS", "a.org"),
        ("JOBORCH_HOSTS = a.org   # our own", "JOBORCH_HOSTS", "a.org"),
        ('JOBORCH_HOSTS="a.org" # our own', "JOBORCH_HOSTS", "a.org"),
        ("JOBORCH_HOSTS='a # b'", "JOBORCH_HOSTS", "a # b"),
        (r'JOBORCH_HOSTS="a \"b\" \\ \$c"', "JOBORCH_HOSTS", r'a "b" \ $c'),
        ("JOBORCH_HOSTS=a#b", "JOBORCH_HOSTS", "a#b"),
        ("""JOBORCH_HOSTS="a"'b'c""", "JOBORCH_HOSTS", "abc"),
        ("JOBORCH_HOSTS=a b", "JOBORCH_HOSTS", "a b"),
        ('\ufeffJOBORCH_HOSTS="a"\r', "JOBORCH_HOSTS", "a"),
        ('SERVICE_EXAMPLE_CLIENTS="http://127.0.0.1:9000" # comment', "SERVICE_EXAMPLE_CLIENTS", "http://127.0.0.1:9000"),
    ],
)
def test_a_line_of_an_environment_file(line: str, name: str, value: str, tmp_path: Path) -> None:
    """It is read as systemd and shells read it."""
    (tmp_path / "env").write_bytes(f"{line}\n\n# a comment\n; another\n".encode())
    code, out, errors = joborch_says(tmp_path, "config", "--json", "--env-file", "env")
    assert code == 0, errors
    assert json.loads(out)[name] == {"value": value, "source": "--env-file"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('JOBORCH_HOSTS="a', ["line 1", "JOBORCH_HOSTS", "a quote is not closed"]),
        ("export JOBORCH_HOSTS", ["line 1", "write NAME=VALUE"]),
        ("SERVICE_X_CLIENTS=ftp://gpu1", ["SERVICE_X_CLIENTS is 'ftp://gpu1'"]),
        ("SERVICE_X_UPLOAD_URL=http://a/submit\nSERVICE_X_DOWNLOAD_URL=b", ["SERVICE_X_DOWNLOAD_URL is 'b'"]),
    ],
)
def test_a_line_that_cannot_be_meant(line: str, words: list[str], tmp_path: Path) -> None:
    """What is shown is what somebody typed."""
    (tmp_path / "env").write_text(line + "\n")
    code, _, errors = joborch_says(tmp_path, "config", "--env-file", "env")
    assert (code, len(errors.splitlines()), "/submit" in errors) == (2, 1, False), errors
    for word in words:
        assert word in errors


@pytest.mark.parametrize(
    ("name", "text", "warned"),
    [
        ("MAX_AGE", "48", True),
        ("MAX_AGE", "48s", False),
        ("MAX_AGE", "48h", False),
        ("MAX_AGE", "172800", False),
        ("MAX_AGE", "0", False),
        ("JOBORCH_KEEP_ROWS", "365", True),
        ("SERVICE_EXAMPLE_UNREACHABLE_AFTER", "24", True),
        ("SERVICE_EXAMPLE_TIMEOUT", "30", False),
        ("JOBORCH_KILL_GRACE", "5", False),
    ],
)
def test_a_time_of_a_few_seconds_is_asked_about(name: str, text: str, warned: bool, tmp_path: Path) -> None:
    """Results that go after 48 seconds are seldom meant, and were deleted without a word."""
    code, _, errors = joborch_says(tmp_path, "config", **{name: text})
    assert code == 0
    assert (f"{name} is {text}: did you mean {text} seconds? Write {text}s if you did, else {text}h or {text}d" in errors) is warned


def test_a_setting_of_the_reference_with_our_prefix(tmp_path: Path) -> None:
    assert "JOBORCH_PORT is not a setting (did you mean PORT?)" in joborch_says(tmp_path, "config", JOBORCH_PORT="1")[2]


def test_variables_of_clouds_that_are_not_meant_for_it(tmp_path: Path) -> None:
    """Google's containers set CLOUD_SDK_VERSION. A mistyped setting, and any unknown one of a cloud that has others, gets its warning."""
    assert "CLOUD_SDK" not in joborch_says(tmp_path, "config", CLOUD_SDK_VERSION="528.0.0")[2]
    assert "(did you mean PROVIDER?)" in joborch_says(tmp_path, "config", CLOUD_NOVA_PROVIDERS="openstack")[2]
    said = joborch_says(tmp_path, "config", CLOUD_NOVA_SIZE="small", CLOUD_NOVA_COLOUR="red")[2]
    assert "CLOUD_NOVA_COLOUR is not a setting of a cloud" in said


# == Locales and Pythons ==


def test_a_locale_that_is_not_utf_8(make_pair: MakePair, tmp_path: Path) -> None:
    """Names of files arrive as they are, whatever the locale of server and client: not `the digests differ` for ever."""
    if shutil.which("localedef") is None:
        pytest.skip("there is no localedef to make a locale with")
    made = tmp_path / "locales" / "en_US.ISO-8859-1"
    made.parent.mkdir()
    done = subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(made)], capture_output=True)
    if done.returncode > 1:
        pytest.skip("localedef cannot make en_US.ISO-8859-1 here")
    latin = {"LOCPATH": str(made.parent), "LC_ALL": made.name, "PYTHONUTF8": None}
    pair = make_pair(server=latin, client=latin).start()
    answer = upload(pair.server, {"run.sh": b"cat h*.txt > ergebnis-\xc3\xbc.txt", "häagen.txt": b"hallo\n"})
    job = wait_status(pair.server, answer.json()["id"], *ENDED)
    assert job["status"] == "Completed", job
    assert download(pair.server, job["id"])["ergebnis-ü.txt"] == b"hallo\n"


def main_of(pyz: Path) -> str:
    with zipfile.ZipFile(pyz) as archive:
        return archive.read("__main__.py").decode()


def test_an_old_python_gets_one_line(pyz: Path) -> None:
    """Python 3.6 can parse what stands before the first import, and is told what it lacks."""
    text = main_of(pyz)
    ast.parse(text, feature_version=(3, 6))
    for version in ((3, 6, 15), (3, 8, 19)):
        fake = f"import sys\nsys.version_info = {version}\nexec(compile({text!r}, '__main__.py', 'exec'))"
        done = subprocess.run([sys.executable, "-c", fake], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
        assert done.stderr.startswith(f"joborch needs Python 3.9 or later, and this is {'.'.join(map(str, version))}: ")


def test_a_real_old_python_gets_one_line(pyz: Path) -> None:
    folder = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    names = [*(f"python3.{minor}" for minor in (6, 7, 8)), *map(str, folder.glob("3.[678].*/bin/python3"))]
    check = "import sys; sys.exit(sys.version_info >= (3, 9))"
    old = [name for name in names if shutil.which(name) and subprocess.run([name, "-c", check], capture_output=True).returncode == 0]
    if not old:
        pytest.skip("there is no Python below 3.9 here")
    done = subprocess.run([old[0], str(pyz), "client"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines()), "needs Python 3.9" in done.stderr) == (2, 1, True), done.stderr


def test_the_module_alone_says_it_too() -> None:
    """By 3.8, which can parse it; the check is the first thing that its own modules do, and before it there are only imports."""
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 8))
    first = next(number for number, node in enumerate(tree.body) if "joborch_base" in ast.unparse(node) and not isinstance(node, ast.Expr))
    assert all(isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom)) for node in tree.body[: first + 1])
    tree = ast.parse(next(path for path in BASE if path.stem == "__init__").read_text(), feature_version=(3, 8))
    checks = [number for number, node in enumerate(tree.body) if isinstance(node, ast.If) and "version_info" in ast.unparse(node.test)]
    assert checks, "no check of the version"
    before = tree.body[: checks[0]]
    assert all(isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom)) for node in before)


# == After cleaning ==


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, dict[str, dict[str, Any]]]]:
    """A pair whose jobs are cleaned soon after their end, and jobs as they were before that, by how they ended."""
    settings = {"MAX_AGE": "3s", "JOBORCH_CLEAN_INTERVAL": "0.2"}
    pair = Pair(tmp_path_factory.mktemp("cleaned"), settings, settings)
    try:
        pair.start()
        ended = {"Completed": run_to_end(pair.server, "true"), "Failed": run_to_end(pair.server, "echo no disk >&2; exit 3", user_id=7)}
        number = submit(pair.server, "sleep 60")
        wait_status(pair.server, number, "Running")
        pair.server.post(f"/terminate/{number}")
        ended["Killed"] = pair.server.job(number)
        ended["Invalid"] = run_to_end(pair.server, "")
        for status, job in ended.items():
            assert (job["status"], job["ended_as"]) == (status, status)
            wait_for(lambda: pair.server.job(job["id"])["status"] == "Cleaned", what="cleaning")  # noqa: B023 - called at once
        yield pair, ended
    finally:
        pair.close()


@pytest.mark.parametrize("status", ["Completed", "Failed", "Killed", "Invalid"])
def test_a_cleaned_job_keeps_how_it_ended(cleaned: tuple[Pair, dict[str, dict[str, Any]]], status: str) -> None:
    """In its own answer and in lists; that it was cleaned is in its history."""
    pair, ended = cleaned
    before, now = ended[status], pair.server.job(ended[status]["id"])
    (row,) = [job for job in pair.server.jobs() if job["id"] == now["id"]]
    for said in (now, row):
        assert (said["status"], said["ended_as"]) == ("Cleaned", status)
        for name in ("reason", "cause", "exit_code", "signal", "ended_at"):
            assert said[name] == before[name], name
    assert (now["history"][-1]["to"], "after it ended" in now["history"][-1]["reason"]) == ("Cleaned", True)


@pytest.mark.parametrize("more", [{}, {"user_id": 7}, {"service": "example"}])
def test_failed_jobs_are_found_after_cleaning(cleaned: tuple[Pair, dict[str, dict[str, Any]]], more: dict[str, Any]) -> None:
    pair, ended = cleaned
    assert [job["id"] for job in pair.server.jobs(status="Failed", **more)] == [ended["Failed"]["id"]]
    assert "no disk" in pair.server.jobs(status="Failed", **more)[0]["reason"]


def test_pages_of_cleaned_and_others(cleaned: tuple[Pair, dict[str, dict[str, Any]]]) -> None:
    """Newest first, each once, whichever of the two it is in."""
    pair, ended = cleaned
    assert {job["id"] for job in pair.server.jobs(status="Cleaned")} >= {job["id"] for job in ended.values()}
    fresh = [run_to_end(pair.server, "exit 1")["id"] for _ in range(3)]
    found, before = [], 2**62
    while before:
        page = pair.server.get(f"/jobs?status=Failed&limit=1&before={before}").json()
        found += [job["id"] for job in page["jobs"]]
        before = page["next"]
    assert found == [*reversed(fresh), ended["Failed"]["id"]]


def test_a_job_that_has_not_ended_has_no_end(pair: Pair) -> None:
    number = submit(pair.server, "until [ -e go ]; do sleep 0.05; done")
    assert pair.server.job(number)["ended_as"] is None
    pair.server.post(f"/terminate/{number}")


def test_what_0_1_0_cleaned(make_process: MakeProcess) -> None:
    """Its end is taken from its history."""
    url = f"http://127.0.0.1:{free_port()}"
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": url, "JOBORCH_KEEP_ROWS": "36500d"})
    with contextlib.closing(sqlite3.connect(server.data / "joborch.db")) as db:
        db.executescript((Path(__file__).parent / "joborch-0.1.0.sql").read_text())
    (server.data / "joborch.lock").touch()
    server.start()
    (job,) = server.jobs(status="Failed")
    assert (job["name"], job["status"], job["ended_as"], job["reason"]) == ("cleaned failed", "Cleaned", "Failed", "exit status 3")


# == Fields of an upload ==


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("90", 90), ("1.5h", 5400), ("2d", 172800), ("30d", 2_592_000), ("1234567", 1_234_567)]
)
def test_a_time_limit_with_its_unit(pair: Pair, text: str, seconds: float) -> None:
    """And a long one reaches the client as it is: 30 days were written 2.592e+06, and refused there."""
    number = submit(pair.server, "true", timeout=text)
    assert pair.server.job(number)["timeout"] == seconds
    wait_status(pair.server, number, "Completed")


@pytest.mark.parametrize(
    ("text", "mib"), [("1G", 1024), ("512M", 512), ("300", 300), ("2048K", 2), ("1K", 1), ("1GiB", 1024), ("1g", 1024)]
)
def test_memory_with_its_unit(pair: Pair, text: str, mib: int) -> None:
    """A number alone is MiB."""
    number = submit(pair.server, 'echo "$JOBORCH_MEMORY"', memory=text)
    assert pair.server.job(number)["memory"] == mib
    wait_status(pair.server, number, "Completed")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"timeout": "soon"}, ["timeout is 'soon'", "90m"]),
        ({"timeout": "0"}, ["timeout is '0'", "above 0"]),
        ({"timeout": "99999d"}, ["timeout is '99999d'"]),
        ({"memory": "lots"}, ["memory is 'lots'", "8192 or 8G"]),
        ({"memory": "0G"}, ["memory is '0G'", "at least 1"]),
        ({"memory": "-1"}, ["memory is '-1'"]),
        ({"user_id": "alice"}, ["user_id is 'alice'", "the number that the user has in your system"]),
        ({"user_id": "9" * 30}, ["user_id is '9", "give a whole number from"]),
    ],
)
def test_a_field_that_cannot_be_meant(pair: Pair, fields: dict[str, str], words: list[str]) -> None:
    assert_error(upload(pair.server, {"run.sh": b"true"}, **fields), 400, *words)


# == Errors ==


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/job/1", "/jobs/1"), ("/jobs/", "/jobs"), ("/downlod/7", "/download/7"), ("/helth", "/health"), ("/job/1/log", "/jobs/1/logs"),
        ("/jobs/1/file", "/jobs/1/files"), ("/jobs/1/file/a.txt", "/jobs/1/files/a.txt"),
        ("/jobs/1/stdout", ""), ("/x" * 50, ""),
    ],
)  # fmt: skip
def test_a_path_that_is_almost_one(pair: Pair, path: str, meant: str) -> None:
    said = assert_error(pair.server.get(path), 404, "there is nothing at")["message"]
    assert (f"(did you mean {meant}?)" in said) if meant else "did you mean" not in said


@pytest.mark.parametrize("target", ["/jobs?user_id=alice", "/users/alice", "/changes?user_id=x", "/export?user_id=x", "/changes?after=x"])
def test_a_number_without_bounds_names_none(pair: Pair, target: str) -> None:
    """From -9223372036854775808 to 9223372036854775807 is what nobody needs to know."""
    assert "92233" not in assert_error(pair.server.get(target), 400, "give a whole number, as in ")["message"]


def test_uploads_that_the_disk_has_no_room_for(make_process: MakeProcess) -> None:
    """The log says so and what to do, once for many of them."""
    settings = {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}", "JOBORCH_MIN_FREE": "900000G"}
    server = make_process("server", settings).start()
    for _ in range(5):
        assert_error(upload(server, {"run.sh": b"true"}), 507, "try again later", "operator", "JOBORCH_MIN_FREE")
    lines = [line for line in server.log.splitlines() if "uploads are refused" in line]
    assert len(lines) == 1, lines
    for words in ("WARNING", str(server.data), "MiB free", "JOBORCH_MIN_FREE", "free space"):
        assert words in lines[0]
    assert "Traceback" not in server.log


def test_an_internal_error_is_found_in_the_log(make_process: MakeProcess) -> None:
    """By the number that the caller got."""
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    shutil.rmtree(server.data / "jobs")
    (server.data / "jobs").symlink_to("jobs")  # ELOOP, which is no trouble of a disk
    said = assert_error(upload(server, {"run.sh": b"true"}), 500, "internal error", "log of this server")["message"]
    (number,) = re.findall("internal error ([0-9a-f]{8})", said)
    assert number in server.log


def test_a_client_that_was_not_started_yet(make_process: MakeProcess) -> None:
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    port = server.settings["SERVICE_EXAMPLE_CLIENTS"].rpartition(":")[2]  # type: ignore[union-attr]
    wait_for(lambda: f"client 127.0.0.1:{port}: has not been started yet: start it with `joborch client --port {port}`" in server.log)
    assert "connection refused" not in server.log and "WARNING client" not in server.log


# == What a client says of itself ==


def test_since_when_a_client_has_a_problem(make_process: MakeProcess, tmp_path: Path) -> None:
    """As RFC 3339, beside what it is; null while all is well."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo"):
        (tools / name).write_text("#!/bin/sh\nexit 0\n")
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    settings = {"JOBORCH_TOKEN": "t", "JOBORCH_EXECUTOR": "slurm", "PATH": path, "JOBORCH_BATCH_INTERVAL": "0.2"}
    client = make_process("client", settings).start()
    token = {"Authorization": "Bearer t"}
    assert client.get("/health", headers=token).json()["problem_since"] is None
    begun = time.time()
    for tool in tools.iterdir():
        tool.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    client.post("/submit", data=form([file_part("run.sh", b"true")]), headers={**form_type(), **token})
    said = wait_for(lambda: (health := client.get("/health", headers=token).json())["problem"] and health)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["problem_since"])
    at = datetime.fromisoformat(said["problem_since"].replace("Z", "+00:00")).timestamp()
    assert begun - 1 <= at <= time.time() + 1
    wait_for(lambda: client.log.count("Unable to contact") > 0)
    later = wait_for(lambda: (health := client.get("/health", headers=token).json())["problem"] and health)
    assert later["problem_since"] == said["problem_since"], "it is one problem"


# == Doctor, tokens and the start ==


def doctor_says(folder: Path, role: str, **settings: str) -> tuple[int, str]:
    """Exit status and output of `joborch doctor`."""
    chosen = {"PORT": str(free_port()), "DATA_PATH": str(folder / "data"), **settings}
    code, out, errors = joborch_says(folder, "doctor", role, **chosen)
    assert errors == ""
    return code, out


def test_a_home_that_cannot_be_written(root: None, open_folder: Path, pyz: Path) -> None:
    """`doctor` finds it before the start does, both name the remedy, and with that the client starts."""
    home, data = open_folder / "home", open_folder / "data"
    home.mkdir()
    data.mkdir()
    os.chown(data, NOBODY_UID, NOBODY_UID)
    program = open_program(open_folder, pyz)
    base = {**clean_environment(home), "DATA_PATH": str(data), "PORT": str(free_port()), "JOBORCH_MIN_FREE": "1M"}
    as_nobody: dict[str, Any] = {"user": NOBODY_UID, "group": NOBODY_UID, "extra_groups": [], "cwd": open_folder}

    def say(*words: str, **settings: str) -> tuple[int, str]:
        environment = {**base, **settings}
        done = subprocess.run([*program, *words], env=environment, capture_output=True, text=True, timeout=60, **as_nobody)
        return done.returncode, done.stdout + done.stderr

    remedy = f"set JOBORCH_TOKEN_FILE={data}/token to create one there, or set JOBORCH_TOKEN"
    code, said = say("doctor", "client")
    assert (code, "PROBLEM the token file" in said, remedy in said) == (1, True, True), said
    code, said = say("client")
    said = "".join(line for line in said.splitlines(keepends=True) if "copy in the cache" not in line)
    assert (code, len(said.splitlines()), remedy in said) == (2, 1, True), said
    assert "token" not in say("doctor", "client", JOBORCH_TOKEN_FILE=f"{data}/token")[1]
    environment = {**base, "JOBORCH_TOKEN_FILE": f"{data}/token"}
    with subprocess.Popen([*program, "client"], env=environment, stderr=subprocess.PIPE, text=True, **as_nobody) as client:
        try:
            wait_for(lambda: (data / "token").exists() and len((data / "token").read_text()) > 20)
            assert (data / "token").stat().st_mode & 0o777 == 0o600
        finally:
            client.terminate()


def test_doctor_knows_ipv6(make_process: MakeProcess, tmp_path: Path) -> None:
    """A free port is free there, too, and a server that listens there is found."""
    if not Path("/proc/net/if_inet6").exists() or not Path("/proc/net/if_inet6").read_text():
        pytest.skip("this machine has no IPv6")
    assert " is free" in doctor_says(tmp_path, "client", JOBORCH_HOST="::1", JOBORCH_TOKEN="t")[1]
    client = make_process("client", {"JOBORCH_HOST": "::1", "JOBORCH_TOKEN": "t"})
    client.spawn()
    wait_for(lambda: f"listens on http://[::1]:{client.port}" in client.log)
    same = {"PORT": str(client.port), "DATA_PATH": str(client.data), "JOBORCH_HOST": "::1", "JOBORCH_TOKEN": "t"}
    assert f"a client runs on port {client.port}" in doctor_says(tmp_path, "client", **same)[1]


def test_doctor_names_a_joborch_that_has_the_port(pair: Pair, tmp_path: Path) -> None:
    code, said = doctor_says(tmp_path, "server", PORT=str(pair.server.port), SERVICE_EXAMPLE_CLIENTS=pair.client.url)
    assert (code, "a joborch server with another data folder listens there" in said) == (1, True), said


def test_sbatch_beside_the_local_executor(make_process: MakeProcess, tmp_path: Path) -> None:
    """Payloads would take all cores of a login node: `doctor` and the start ask whether that is meant, unless somebody says so."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text("#!/bin/sh\n")
    (tools / "sbatch").chmod(0o755)
    path = {"PATH": f"{tools}:{os.environ['PATH']}", "JOBORCH_TOKEN": "t"}
    question = "this machine has sbatch: payloads would run on this login node; did you mean JOBORCH_EXECUTOR=slurm?"
    assert f"note    {question}" in doctor_says(tmp_path, "client", **path)[1]
    assert question not in doctor_says(tmp_path, "client", JOBORCH_EXECUTOR="local", **path)[1]
    assert question not in doctor_says(tmp_path, "server", **path)[1]
    client = make_process("client", dict(path)).start()
    wait_for(lambda: question in client.log)
    client.settings["JOBORCH_EXECUTOR"] = "local"
    client.restart()
    wait_for(lambda: " payloads at once with the local executor on this login node\n" in client.log.rpartition("stopped\n")[2])
    assert client.log.count(question) == 1


@pytest.mark.parametrize(
    ("settings", "host", "file"),
    [
        ({}, "127.0.0.1", "{home}/.config/joborch/client-token"),
        ({"JOBORCH_HOST": "127.0.0.1", "JOBORCH_TOKEN_FILE": "{home}/own"}, "127.0.0.1", "{home}/own"),
        ({"JOBORCH_HOST": "0.0.0.0", "JOBORCH_TOKEN": "a-token-of-20-letters"}, socket.gethostname(), "(a file with"),
    ],
    ids=["defaults", "a file", "open"],
)
def test_a_client_says_what_its_server_has_to_know(settings: dict[str, str], host: str, file: str, make_process: MakeProcess) -> None:
    """Two lines to copy into the server's settings; and they work."""
    client = make_process("client")
    home = str(client.home)
    client.settings.update({name: value.replace("{home}", home) for name, value in settings.items()})
    client.start()
    wait_for(lambda: "SERVICE_EXAMPLE_TOKEN_FILE" in client.log, what="the lines")
    said = dict(re.findall(r"for the settings of its server: (\w+)=(.*)", client.log))
    assert said["SERVICE_EXAMPLE_CLIENTS"] == f"http://{host}:{client.port}"
    assert said["SERVICE_EXAMPLE_TOKEN_FILE"].startswith(file.replace("{home}", home))
    if "JOBORCH_TOKEN" not in settings:
        server = make_process("server", {**said}).start()
        assert run_to_end(server, "true")["status"] == "Completed"


def test_lines_for_both_sides_name_hosts_and_ports() -> None:
    """As the settings and the command line write them."""
    config = load_config("client", {}, {"JOBORCH_HOST": "127.0.0.1,::1", "PORT": "9000", "JOBORCH_ALLOW_ANONYMOUS": "1"})
    assert lines_for_server(config) == ["SERVICE_EXAMPLE_CLIENTS=http://127.0.0.1:9000"]
    config = load_config("client", {}, {"JOBORCH_HOST": "::1", "PORT": "9001", "JOBORCH_TOKEN_FILE": "/t"})
    assert lines_for_server(dataclasses.replace(config, token="t")) == [
        "SERVICE_EXAMPLE_CLIENTS=http://[::1]:9001", "SERVICE_EXAMPLE_TOKEN_FILE=/t",
    ]  # fmt: skip
    begin = "has not been started yet: start it with "
    assert start_command("http://127.0.0.1:9000") == begin + "`joborch client`"
    assert start_command("http://gpu1:9001/prefix") == begin + "`joborch client --host gpu1 --port 9001` on gpu1"
    assert start_command("https://gpu1") == begin + "`joborch client --host gpu1 --port 443` on gpu1"
    assert start_command("http://[::1]:9000") == begin + "`joborch client`"
    assert start_command("") == ""
