"""The words of the command line: what they print, with which status they end, and the one line that says what stands in the way."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeProcess
from harness import clean_environment, free_port, from_source, open_program, replace
from world import HandClock

import joborch
from joborch import ConfigError, JoborchError, Store
from joborch_base import statements
from joborch_plugins import admin, commands

WORDS = ("server", "client", "backup", "restore", "demo", "config", "doctor", "version")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That of a freshly logged-in user, with a home of the test's own; what commands change of the process is changed back."""
    for name in list(os.environ):
        if name.startswith(("JOBORCH_", "SERVICE_", "XDG_")) or name in ("PORT", "DB_PATH", "DATA_PATH", "MAX_AGE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    umask = os.umask(0o022)
    yield
    os.umask(umask)


def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """joborch as a process, to its end."""
    return subprocess.run(
        [*from_source(), *words],
        env={**clean_environment(Path(os.environ["HOME"])), **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )


def refused(*words: str, **settings: str) -> str:
    """The one line with which a start is refused; nothing listens, and the status is 2."""
    done = run(*words, **settings)
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)]
    assert done.returncode == 2, done
    assert len(lines) == 1 and lines[0].startswith("joborch: "), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return lines[0]


# == What is printed ==


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What --help prints."""
    if words:
        with pytest.raises(SystemExit) as caught:
            joborch.main([*words, "--help"])
        assert caught.value.code == 0
    else:
        assert joborch.main(["--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("word", WORDS)
def test_help_has_an_example_that_can_be_typed(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys, word)
    _, _, examples = text.partition("example:\n")
    lines = [line.strip() for line in examples.strip().splitlines()]
    assert lines
    for line in lines:
        words = line.split()
        typed = words[words.index("joborch") + 1 :]
        assert all("=" in setting for setting in words[: words.index("joborch")])
        assert typed[0] == word
        joborch.make_parser().parse_args(typed)


def test_help_lists_all_words_and_says_what_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys)
    assert set(WORDS) == {name for name, word in commands.WORDS.items() if not word.here}
    for word in commands.WORDS:
        assert re.search(rf"^ +{word}\s+\w", text, re.MULTILINE), word
    assert "joborch demo" in text


@pytest.mark.parametrize("word", ["server", "client"])
def test_every_setting_has_a_flag_with_its_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(helped(capsys, word).split())
    for setting in joborch.SETTINGS:
        if word in setting.modes.split():
            assert f"{setting.flag} VALUE" in text, setting.flag
            assert f"[{setting.name}]" in text
        else:
            assert setting.flag + " " not in text
    assert "--env-file" in text


def test_without_a_word_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert joborch.main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["serve"],
        ["server", "--slots", "3"],
        ["config", "both"],
        ["version", "x"],
        ["--port", "5"],
        ["client", "--slots"],
        ["config", "--nonsense"],
    ],
)
def test_wrong_use(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        joborch.main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert (said.startswith("joborch"), len(said.splitlines()), "--help" in said) == (True, 1, True), said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert joborch.main(["version"]) == 0
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["joborch"] == joborch.__version__
    assert lines["sqlite"] == sqlite3.sqlite_version
    assert {"python", "bottle", "waitress", "requests", "platformdirs", "multipart"} <= set(lines)
    assert joborch.main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == lines
    with pytest.raises(SystemExit) as caught:
        joborch.main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"joborch {joborch.__version__}\n")


def test_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("MAX_AGE=1h\n")
    monkeypatch.setenv("JOBORCH_SEND_INTERVAL", "2")
    words = ["config", "server", "--port", "0", "--env-file", str(tmp_path / "env")]
    assert joborch.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"PORT +0 +\(flag --port\)", lines[0])
    found = {line.split()[0]: line for line in lines}
    assert re.search(r" 3600 +\(--env-file\)$", found["MAX_AGE"])
    assert re.search(r" 2 +\(environment\)$", found["JOBORCH_SEND_INTERVAL"])
    assert re.search(r" 127\.0\.0\.1,::1 +\(default\)$", found["JOBORCH_HOST"])
    assert "JOBORCH_SLOTS" not in found, "a client's"
    assert "SERVICE_EXAMPLE_CLIENTS" in found
    assert joborch.main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["PORT"] == {"value": "0", "source": "flag --port"}
    assert set(said) == set(found)


def test_config_of_a_client(capsys: pytest.CaptureFixture[str]) -> None:
    assert joborch.main(["config", "client", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["PORT"]["value"] == "9000"
    assert "JOBORCH_SLOTS" in said
    assert not [name for name in said if name.startswith("SERVICE_")]
    assert "JOBORCH_COMPAT" not in said


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_config_warns_of_unknown_names(form: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBORCH_SLOT", "3")
    assert joborch.main(["config", *form]) == 0
    assert "JOBORCH_SLOT is not a setting (did you mean JOBORCH_SLOTS?)" in capsys.readouterr().err


def test_what_goes_to_a_pipe_is_plain() -> None:
    for words in (["version"], ["config"], ["--help"], ["config", "--help"]):
        done = run(*words)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout + done.stderr


# == How it ends ==


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("wrong"), 2), (JoborchError("failed"), 1), (KeyboardInterrupt(), 130)],
    ids=lambda value: type(value).__name__,
)
def test_exit_status(error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise error

    replace(monkeypatch, "run_command", fail)
    assert joborch.main(["version"]) == status
    said = capsys.readouterr().err
    assert said == ("" if status == 130 else f"joborch: {error}\n")


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        (("server",), {"PORT": "http"}, "PORT is 'http': give a whole number from 0 to 65535"),
        (("client", "--slots", "0"), {}, "--slots is '0': give a whole number from 1"),
        (("config", "--max-age", "soon"), {}, "--max-age is 'soon': give seconds"),
        (("server", "--env-file", "/none"), {}, "--env-file /none cannot be read"),
        (
            ("server",),
            {"SERVICE_A_DOWNLOAD_URL": "http://host:9000/get"},
            "SERVICE_A_UPLOAD_URL is missing: set it, as in http://host:9000",
        ),
        (("server", "--host", "0.0.0.0"), {}, "JOBORCH_ALLOW_ANONYMOUS=1"),
        (("server",), {"DB_PATH": ":memory:"}, "DB_PATH is ':memory:'"),
        (("server",), {"JOBORCH_TOKEN_FILE": "/none"}, "JOBORCH_TOKEN_FILE /none cannot be read"),
    ],
)
def test_a_wrong_setting_is_said_in_one_line(words: tuple[str, ...], settings: dict[str, str], said: str) -> None:
    assert said in refused(*words, **settings)


def test_a_port_in_use() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        for word in ("server", "client"):
            said = refused(word, PORT=port)
            assert f"PORT is {port}: cannot listen on 127.0.0.1:{port} (address already in use)" in said
            assert "another PORT" in said


@pytest.mark.parametrize("word", ["server", "client"])
def test_a_data_folder_that_cannot_be_made(word: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    said = refused(word, DATA_PATH=str(tmp_path / "file/data"))
    assert f"DATA_PATH is '{tmp_path}/file/data'" in said
    assert "give a folder that joborch may write to" in said


def test_a_data_folder_that_may_not_be_written(make_process: MakeProcess, open_folder: Path, pyz: Path, root: None) -> None:
    process = make_process("server", folder=open_folder / "own", program=open_program(open_folder, pyz), user=65534)
    process.data.chmod(0o555)
    os.chown(process.data, 0, 0)
    status, said = process.start_refused()
    assert status == 2
    assert "Permission denied; give a folder that joborch may write to" in said


def test_a_data_folder_that_holds_things_of_others(tmp_path: Path) -> None:
    """DATA_PATH=/var must not empty /var/tmp."""
    (tmp_path / "var/tmp").mkdir(parents=True)
    (tmp_path / "var/tmp/precious").write_bytes(b"x")
    said = refused("server", DATA_PATH=str(tmp_path / "var"))
    assert "'tmp' not made by joborch" in said
    assert (tmp_path / "var/tmp/precious").exists()


@pytest.mark.parametrize("word", ["server", "client"])
def test_a_database_of_a_newer_version(word: str, tmp_path: Path) -> None:
    Store(str(tmp_path / "db"), word).close()
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    said = refused(word, DB_PATH=str(tmp_path / "db"), DATA_PATH=str(tmp_path / "data"))
    assert f"DB_PATH '{tmp_path}/db' was created by a newer joborch (schema 99, this one knows {statements.SCHEMA_VERSION})" in said


def test_a_database_in_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert f"DB_PATH is '{tmp_path}/file/db'" in refused("server", DB_PATH=str(tmp_path / "file/db"), DATA_PATH=str(tmp_path / "data"))


@pytest.mark.parametrize("word", ["server", "client"])
def test_a_second_start_on_one_data_folder_is_refused_with_the_pid(word: str, make_process: MakeProcess) -> None:
    first = make_process(word).start()
    said = refused(word, DATA_PATH=str(first.data), PORT=str(free_port()))
    assert f"is in use by process {first.pid}: stop it, or use another folder" in said
    assert first.running()
    first.kill()
    first.start()


@pytest.mark.parametrize("word", ["server", "client"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_status_0(word: str, number: signal.Signals, make_process: MakeProcess) -> None:
    process = make_process(word).start()
    assert process.process is not None
    process.process.send_signal(number)
    assert process.process.wait(10) == 0
    assert f"{word} stopped" in process.log


def test_a_signal_that_comes_at_once_ends_it_too(make_process: MakeProcess) -> None:
    """Before it listens."""
    process = make_process("server").spawn()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM)


# == The client's token ==


def client_config(**settings: str) -> joborch.Config:
    """The configuration of a client."""
    return joborch.load_config("client", {}, settings)


def test_a_client_makes_its_token_once_and_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "joborch")
    made = joborch.ensure_client_token(client_config()).token
    file = joborch.client_token_file()
    assert file is not None
    assert len(made) >= 32
    assert file.read_text() == made + "\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert joborch.ensure_client_token(client_config()).token == made
    assert made not in caplog.text
    assert str(file) in caplog.text
    assert joborch.ensure_client_token(client_config(JOBORCH_TOKEN="own")).token == "own"
    assert joborch.ensure_client_token(client_config(JOBORCH_ALLOW_ANONYMOUS="1")).token == ""


def test_a_token_file_that_is_empty_gives_no_open_client() -> None:
    """A client runs what it is sent: without a token it must not start."""
    file = joborch.client_token_file()
    assert file is not None
    file.parent.mkdir(parents=True)
    for content in ("", "\n"):
        file.write_text(content)
        try:
            token = joborch.ensure_client_token(client_config()).token
        except ConfigError:
            continue
        assert token, "neither refused nor made anew"


def test_a_client_without_a_home_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_config_dir", lambda _: "~/.config/joborch")
    with pytest.raises(ConfigError, match="set JOBORCH_TOKEN"):
        joborch.ensure_client_token(client_config(DATA_PATH="/nowhere"))


def test_a_token_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / ".config").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be used"):
        joborch.ensure_client_token(client_config())


# == Logging ==


def logged(log_format: str, capsys: pytest.CaptureFixture[str], message: str, *values: Any, error: bool = False) -> str:
    """What a process with this format writes."""
    root = logging.getLogger()
    saved, level = root.handlers[:], root.level
    try:
        joborch.set_up_logging(dataclasses.replace(client_config(), log_format=log_format))
        try:
            raise ValueError("inner")
        except ValueError:
            joborch.log.info(message, *values, exc_info=error)
    finally:
        root.handlers[:] = saved
        root.setLevel(level)
    return capsys.readouterr().err


def test_a_log_line_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    said = logged("json", capsys, 'job %d "x"\n%s', 7, "é", error=True)
    (line,) = said.splitlines()
    record = json.loads(line)
    assert (record["level"], record["message"]) == ("info", 'job 7 "x"\né')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["at"])
    assert "ValueError: inner" in record["traceback"]


def test_a_log_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO +job 7\n", logged("text", capsys, "job %d", 7))


@pytest.mark.parametrize("reason", ["a\nINFO job 8 Queued -> Completed", "\x1b[2J", "\r", "\u2028"])
def test_no_reason_splits_a_log_line(reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "joborch")
    store = Store(str(tmp_path / "db"), "server", HandClock())
    job = store.add(joborch.NewJob("u", user_id=1, service="a"), "uploaded")
    store.move(job, joborch.Status.KILLED, reason)
    store.close()
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert "Queued -> Killed" in caplog.records[-1].getMessage()


# == The demo's parts ==


def test_free_ports_are_free_and_differ() -> None:
    ports = {admin.free_port() for _ in range(5)}
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_the_example_is_found() -> None:
    assert admin.example_file("run.sh").startswith(b"#!")
    assert b"ATOM" in admin.example_file("2oob.pdb")


def test_a_demo_that_cannot_start_shows_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    demo = admin.Demo(tmp_path)
    monkeypatch.setattr("sys.argv", ["/does/not/exist.py"])
    demo.start("server")
    with pytest.raises(JoborchError, match=r"the demo's server did not start; its log ends with:\n.*exist.py"):
        demo.wait_ready("server")
    demo.stop()
