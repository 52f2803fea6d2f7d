"""SIGHUP: changed settings are taken while jobs of every state are under way, all of them or none."""

from __future__ import annotations

import bisect
import dataclasses
import json
import logging
import os
import random
import re
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair, MakeProcess
from harness import BOUNDARY, ENDED, Pair, Process, field_part, form, free_port, submit, wait_for, wait_status
from history import Expected, assert_proven, gather, mark_lines, read_log
from world import RESULT, Desk, Peer, Yard, ask, clients_of, command, event, events, held, zip_reply

import joborch
from joborch import Status, get_tick, load_config, send_tick, watch_tick
from joborch_base.threads import Loop
from joborch_plugins import reload

pytestmark = pytest.mark.usefixtures("no_long_polls")


class Office:
    """A server whose settings are in a file that a test writes anew."""

    def __init__(self, desk: Desk, path: Path, **settings: str) -> None:
        self.desk, self.server, self.path = desk, desk.server, path
        self.settings = {"SERVICE_EXAMPLE_CLIENTS": desk.environment["SERVICE_EXAMPLE_CLIENTS"], "SERVICE_EXAMPLE_TOKEN": "a-token"}
        fixed = {name: desk.environment[name] for name in ("DATA_PATH", "PORT", "JOBORCH_MIN_FREE")}
        self.write(**settings)
        self.server.config = load_config("server", {"env_file": str(path)}, fixed)
        self.plugin: reload.Reload = self.server.plugins["reload"]
        self.plugin.reload()

    def write(self, **settings: str | None) -> None:
        """Write the file with these settings besides the present ones; None takes one out."""
        self.settings = {name: text for name, text in {**self.settings, **settings}.items() if text is not None}
        self.path.write_text("".join(f"{name}={text}\n" for name, text in self.settings.items()))

    def reload(self, **settings: str | None) -> bool:
        self.write(**settings)
        return self.plugin.reload()

    def looks_after(self) -> None:
        """One tick of the loop that looks after what was removed."""
        reload.look_after(self.plugin, self.server)

    def state(self) -> Any:
        """What is in force."""
        config, store = self.server.config, self.server.store
        links = {name: (link, list(link.services), link.leaving) for name, link in self.server.links.items()}
        shares = [dict(layers.known) for layers in store.core.shares.maps]
        orders = {name: list(turns) for name, turns in store.core.shares.order.items()}
        return config, self.server.services, store.limits, store.sharing, links, shares, orders, set(self.server.loops)


@pytest.fixture(name="office")
def office_fixture(desk: Desk, tmp_path: Path) -> Iterator[Office]:
    made = Office(desk, tmp_path / "server.env")
    yield made
    made.server.pool.stop(20)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged about reloads since the last look."""
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("reload: ")]
    caplog.clear()
    return said


# == What changes ==


def test_each_change_is_a_line_with_the_old_and_the_new_value(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert office.reload(
        SERVICE_EXAMPLE_MAX_RUNS="20", SERVICE_EXAMPLE_POLICY="fifo", JOBORCH_WEIGHTS="7=2", MAX_AGE="1h", JOBORCH_MAX_UPLOAD="1G"
    )
    assert sorted(lines(caplog)[1:]) == [
        "reload: 5 changes",
        "reload: JOBORCH_MAX_UPLOAD: 10737418240 -> 1073741824 needs a restart",
        "reload: JOBORCH_WEIGHTS: - -> 7=2",
        "reload: MAX_AGE: 172800 -> 3600",
        "reload: SERVICE_EXAMPLE_MAX_RUNS: 10 -> 20",
        "reload: SERVICE_EXAMPLE_POLICY: share -> fifo",
    ]
    config, service = office.server.config, office.server.services["example"]
    assert (service.max_runs, service.policy, config.max_age_s, config.max_upload_bytes) == (20, "fifo", 3600.0, 10 * 1024**3)
    assert office.server.store.weight(7) == 2.0 and office.server.links_of(service)[0].services == [service]
    assert office.reload() and lines(caplog)[1:] == [
        "reload: JOBORCH_MAX_UPLOAD: 10737418240 -> 1073741824 needs a restart",
        "reload: 1 change",
    ], "it is named until the restart"
    assert office.reload(JOBORCH_WEIGHTS=None, JOBORCH_MAX_UPLOAD=None) and office.server.store.weight(7) == 1.0
    lines(caplog)
    assert office.reload() and lines(caplog)[1:] == ["reload: no setting has changed"]


def test_no_secret_is_logged(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert office.reload(SERVICE_EXAMPLE_TOKEN="another-token-of-a-client", JOBORCH_TOKEN="callers-have-this-token")
    assert "another-token" not in caplog.text and "callers-have" not in caplog.text
    assert "SERVICE_EXAMPLE_TOKEN: *** -> *** (another one)" in caplog.text
    assert office.server.tokens == ("callers-have-this-token",)
    assert office.desk.link.token("example") == "another-token-of-a-client"


WRONG = {
    "a value": ({"SERVICE_EXAMPLE_MAX_RUNS": "many"}, "SERVICE_EXAMPLE_MAX_RUNS is 'many'"),
    "a client without a URL": ({"SERVICE_NEW_CLIENTS": "gpu1"}, "SERVICE_NEW_CLIENTS is 'gpu1'"),
    "a token file that is not there": ({"SERVICE_EXAMPLE_TOKEN": None, "SERVICE_EXAMPLE_TOKEN_FILE": "/nowhere"}, "TOKEN_FILE /nowhere"),
    "a line": ({"SERVICE_EXAMPLE_TOKEN": '"open'}, "a quote is not closed"),
    "certificates that are not there": ({"JOBORCH_CA_FILE": "/nowhere"}, "JOBORCH_CA_FILE is '/nowhere'"),
}


@pytest.mark.parametrize(("settings", "why"), WRONG.values(), ids=WRONG)
def test_a_file_that_cannot_be_used_changes_nothing(
    settings: dict[str, str | None], why: str, office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    office.desk.upload()
    before = office.state()
    assert not office.reload(SERVICE_EXAMPLE_RUNS_PER_USER="1", JOBORCH_WEIGHTS="1=9", **settings)
    assert office.state() == before
    [said] = [line for line in lines(caplog) if "nothing was changed" in line]
    assert why in said


def settings_problem(office: Office) -> tuple[str, str] | None:
    """What /health says of the settings, and the remedy."""
    found = [each for each in ask(office.server, "GET", "/health").json["problems"] if each["kind"] == "settings"]
    return (found[0]["what"], found[0]["remedy"]) if found else None


def test_a_file_that_is_gone_changes_nothing(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    before = office.state()
    office.path.unlink()
    assert not office.plugin.reload()
    assert office.state() == before and f"{office.path} cannot be read: no such file or directory" in caplog.text
    assert settings_problem(office) == (
        f"the last reload changed nothing: --env-file {office.path} cannot be read: no such file or directory",
        "correct the settings, and reload again",
    )
    assert office.reload() and settings_problem(office) is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty, so it may be only half written"),
        (b"\xef\xbb\xbf\r\n \n", "is empty, so it may be only half written"),
        (b"SERVICE_EXAMPLE_MAX_RUNS=3\n# \xe9\n", "it is not text in UTF-8: byte 30 is 0xe9"),
        ("MAX_AGE=1h\n".encode("utf-16"), "it is not text in UTF-8"),
        (b"MAX_AGE=1h\n\0\0\0\n", "line 2: write NAME=VALUE"),
        (b"MAX_AGE=1h\nSERVICE_EXAM", "line 2: write NAME=VALUE"),
        (b"#" * 1_100_000, "it has more than 1024 KiB"),
        (None, "is empty, so it may be only half written"),
    ],
    ids=["empty", "blank", "latin-1", "utf-16", "zeros", "half a line", "huge", "a pipe"],
)
def test_a_file_that_is_half_written_or_no_text_changes_nothing(
    content: bytes | None, why: str, office: Office, caplog: pytest.LogCaptureFixture
) -> None:
    """Without this, a file that an editor has just emptied would remove all services, and uploads would be refused."""
    office.desk.upload()
    before = office.state()
    office.path.unlink()
    os.mkfifo(office.path) if content is None else office.path.write_bytes(content)
    assert not office.plugin.reload()
    assert office.state() == before
    [said] = [line for line in lines(caplog) if "nothing was changed" in line]
    assert why in said
    if content is not None and content.isascii() and len(content) < 1000:
        said = check(office, content.decode())
        assert said.status == 400 and why in said.json["message"], "the check says the same"
        assert office.state() == before


def test_a_token_cannot_go_together_with_what_decides_who_needs_none(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    """Else callers whom neither the old nor the new file admits were admitted until the restart."""
    open_door = {"JOBORCH_ALLOW_ANONYMOUS": "1", "JOBORCH_ALLOW_FROM": "192.0.2.0/24"}
    office.write(JOBORCH_TOKEN="callers-have-this-token", **open_door)
    arguments, environment = office.server.config.origin
    office.server.config = load_config("server", arguments, environment)
    assert office.reload()
    before = office.state()
    assert not office.reload(JOBORCH_TOKEN=None, **dict.fromkeys(open_door))
    assert office.state() == before and office.server.config.token == "callers-have-this-token"
    assert "cannot remove JOBORCH_TOKEN and change JOBORCH_ALLOW_ANONYMOUS, JOBORCH_ALLOW_FROM at once" in caplog.text
    assert office.reload(JOBORCH_TOKEN="another-token-of-callers", **dict.fromkeys(open_door))
    assert office.server.tokens == ("another-token-of-callers",)


def test_what_waits_for_a_restart_is_in_health(office: Office) -> None:
    assert settings_problem(office) is None
    assert office.reload(JOBORCH_MAX_UPLOAD="1G", JOBORCH_SEND_INTERVAL="2", MAX_AGE="1h")
    wanted = ("changed settings wait for a restart: JOBORCH_SEND_INTERVAL, JOBORCH_MAX_UPLOAD", "restart it: jobs continue")
    assert settings_problem(office) == wanted
    assert not office.reload(MAX_AGE="long")
    assert "MAX_AGE is 'long'" in (settings_problem(office) or ("",))[0]
    assert office.reload(MAX_AGE="1h") and settings_problem(office) == wanted
    assert office.reload(JOBORCH_MAX_UPLOAD=None, JOBORCH_SEND_INTERVAL=None) and settings_problem(office) is None


def test_lines_of_the_file_that_have_no_effect_are_named(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    """The environment wins; a name in small letters is none."""
    fixed = office.server.config.origin[1]
    assert office.reload(DATA_PATH="/elsewhere", PORT=fixed["PORT"], max_age="5", PATH="/bin", SERVICE_EXAMPLE_POLICY="fifo")
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "DATA_PATH in --env-file has no effect: the environment sets it" in warned
    assert "max_age is not a setting (did you mean MAX_AGE?)" in warned
    assert not [line for line in warned if line.startswith(("PORT", "PATH", "SERVICE"))]


def test_a_database_that_cannot_be_written_changes_nothing(office: Office) -> None:
    for user in (1, 2, 2):
        office.desk.upload(user_id=user)
    before, store = office.state(), office.server.store

    def refuse(action: int, name: str | None, *_: object) -> int:
        return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_TRANSACTION and name == "COMMIT" else sqlite3.SQLITE_OK

    store.db.set_authorizer(refuse)
    changes = {"SERVICE_EXAMPLE_CLIENTS": "http://other:9000", "SERVICE_NEW_CLIENTS": "http://new:9000", "JOBORCH_SHARE_HALF_LIFE": "1h"}
    assert not office.reload(**changes, JOBORCH_WEIGHTS="2=5")
    assert office.state() == before
    store.db.set_authorizer(lambda *_: sqlite3.SQLITE_OK)
    assert office.plugin.reload()
    assert set(office.server.services) == {"example", "new"}


# == Services and clients come and go, with jobs in every state ==


def test_a_removed_service_keeps_its_queued_jobs_and_they_say_why(office: Office, peer: Peer) -> None:
    """They wait with that reason; after UNREACHABLE_AFTER they fail, and what came back in time is sent."""
    desk, url = office.desk, office.settings["SERVICE_EXAMPLE_CLIENTS"]
    job, late = desk.upload(), desk.upload()
    new = {"SERVICE_NEW_CLIENTS": url, "SERVICE_NEW_TOKEN": "a-token"}
    assert office.reload(SERVICE_EXAMPLE_CLIENTS=None, SERVICE_EXAMPLE_TOKEN=None, **new)
    desk.link.heard()
    assert joborch.dispatch_tick(office.server) is False
    assert joborch.waiting_texts(office.server, [desk[job]]) == ["service example is no longer configured"]
    said = ask(office.server, "GET", f"/jobs/{job.id}").json
    assert (said["status"], said["message"]) == ("Queued", "service example is no longer configured")
    office.looks_after()
    desk.clock.pass_s(23 * 3600.0)
    office.looks_after()
    assert office.reload(SERVICE_EXAMPLE_CLIENTS=url, SERVICE_EXAMPLE_TOKEN="a-token")
    office.looks_after()
    desk.link.heard()
    assert joborch.dispatch_tick(office.server) and desk[job].status is Status.PROCESSING
    assert office.reload(SERVICE_EXAMPLE_CLIENTS=None, SERVICE_EXAMPLE_TOKEN=None)
    office.looks_after()
    desk.clock.pass_s(23 * 3600.0)
    office.looks_after()
    assert desk[late].status is Status.QUEUED, "the time begins anew"
    desk.clock.pass_s(2 * 3600.0)
    office.looks_after()
    failed = desk[late]
    assert (failed.status, failed.cause) == (Status.FAILED, "infrastructure")
    assert failed.reason == "service example has not been configured for 24 h"


@pytest.mark.parametrize("status", [Status.PROCESSING, Status.SUBMITTED, Status.RUNNING, Status.UNKNOWN])
def test_jobs_at_a_removed_client_end_there_and_then_it_goes(status: Status, office: Office, peer: Peer) -> None:
    desk, server = office.desk, office.server
    server.loops.update(joborch.make_server_loops(server))
    job, link, name = desk.with_client(status), desk.link, desk.link.name
    if status is Status.PROCESSING:  # claimed, and no sender has taken it yet
        link.outbox.append(job)
        assert link.hold(job.id)
    queued = desk.upload(user_id=2)
    assert office.reload(SERVICE_EXAMPLE_CLIENTS="http://127.0.0.1:1")
    assert link.leaving and link.why_not() == "is no longer configured" and set(server.links) == {name, "127.0.0.1:1"}
    link.heard()
    assert joborch.dispatch_tick(server) is False, "the new client is not heard yet, and the old one gets nothing"
    office.looks_after()
    assert name in server.links
    if status is Status.PROCESSING:
        assert send_tick(server, link)
        assert desk[job].status is Status.QUEUED and desk[job].client is None
    else:
        peer.says["/retrieve"] = [zip_reply(RESULT)]
        assert desk_settle(office, link, job).status is Status.COMPLETED
        office.looks_after()
        assert name in server.links, "its result is not confirmed yet"
        peer.says["/events"] = [events()]
        get_tick(server, link)
    assert [asked.path for asked in peer.asked if asked.path.startswith("/submit")] == []
    office.looks_after()
    assert set(server.links) == {"127.0.0.1:1"} and not any(loop.endswith(name) for loop in server.loops)
    assert desk[queued].status is Status.QUEUED


def desk_settle(office: Office, link: joborch.Link, job: joborch.Job) -> joborch.Job:
    """Hear from a client that a payload has ended, and fetch its result."""
    link.heard()
    joborch.report(office.server, link, event(job))
    assert joborch.fetch_tick(office.server, link)
    return office.desk[job]


def test_a_removed_client_that_stays_silent_loses_its_jobs_as_any_other(office: Office) -> None:
    desk = office.desk
    job, link = desk.with_client(), desk.link
    assert office.reload(SERVICE_EXAMPLE_CLIENTS="http://127.0.0.1:1")
    link.failed("does not answer")
    desk.clock.pass_s(20)
    watch_tick(office.server)
    assert desk[job].status is Status.UNKNOWN
    desk.clock.pass_s(3600)
    watch_tick(office.server)
    again = desk[job]
    assert (again.status, again.attempt, again.client) == (Status.QUEUED, 2, None)
    office.looks_after()
    assert set(office.server.links) == {"127.0.0.1:1"}


def test_a_client_that_comes_back_in_time_is_the_same(office: Office) -> None:
    desk = office.desk
    job, link = desk.with_client(), desk.link
    url = office.settings["SERVICE_EXAMPLE_CLIENTS"]
    assert office.reload(SERVICE_EXAMPLE_CLIENTS="http://127.0.0.1:1")
    assert office.reload(SERVICE_EXAMPLE_CLIENTS=url)
    assert office.server.links[link.name] is link and not link.leaving and link.takes_jobs()
    assert desk[job].status is Status.RUNNING


def test_another_scheme_needs_a_restart(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    """http and https lead to a client of the same name, whose connections are open."""
    url = office.settings["SERVICE_EXAMPLE_CLIENTS"]
    assert office.reload(SERVICE_EXAMPLE_CLIENTS=url.replace("http:", "https:"))
    assert f"{url} -> {url.replace('http:', 'https:')} needs a restart" in caplog.text
    assert office.desk.link.address.base_url == url


def test_loops_are_looked_at_as_soon_as_they_are_there() -> None:
    """The timer follows when the loops of a process are replaced."""
    pool, stopping, ticks = joborch.Pool("test"), threading.Event(), dict[str, threading.Semaphore]()

    def loop(name: str) -> Loop:
        ticks[name] = threading.Semaphore(0)

        def tick() -> bool:
            ticks[name].release()
            return False

        made = Loop(name, tick, lambda: pool, 0.02)
        made.start()
        return made

    known = [{"a": loop("a")}]
    timer = threading.Thread(target=joborch.keep_time, args=(lambda: known[0], stopping))
    timer.start()
    assert all(ticks["a"].acquire(timeout=60) for _ in range(3))
    known[0] = {"a": known[0]["a"], "b": loop("b")}
    for name in ("b", "a"):
        assert all(ticks[name].acquire(timeout=60) for _ in range(3))
    stopping.set()
    timer.join(60)
    for each in known[0].values():
        each.stop()
    pool.stop(60)


# == A client ==


def test_a_client_takes_slots_and_limits(yard: Yard, tmp_path: Path) -> None:
    file, client = tmp_path / "client.env", yard.client
    file.write_text("JOBORCH_SLOTS=7\nJOBORCH_MEMORY=3G\nJOBORCH_KILL_GRACE=5\nJOBORCH_MAX_RESULT=1M\nSERVICE_A_PRELUDE=module load gcc\n")
    fixed = {name: text for name, text in yard.environment.items() if name in ("DATA_PATH", "DB_PATH", "JOBORCH_TOKEN")}
    client.config = dataclasses.replace(client.config, env_file=str(file), origin=({"env_file": str(file)}, fixed))
    seen = client.plugins["health"].seen
    assert client.plugins["reload"].reload()
    assert (joborch.room_json(client)["slots"], joborch.room_json(client)["memory"]) == (7, 3072)
    assert client.limits.size_bytes == 1024**2
    assert client.executor.kill_grace_s == 5.0  # type: ignore[attr-defined]
    assert client.executor.options("a").prelude == "module load gcc"  # type: ignore[attr-defined]
    assert client.plugins["health"].seen > seen, "servers that wait for news hear of it"
    file.write_text("JOBORCH_SLOTS=none\n")
    assert not client.plugins["reload"].reload()
    assert client.config.slots == 7


# == The check ==


def check(office: Office, text: str) -> Any:
    """What the route says of a file's text."""
    body = form([field_part("settings", text)])
    return ask(office.server, "POST", "/settings/check", body, Content_Type=f"multipart/form-data; boundary={BOUNDARY}")


def test_the_route_says_what_a_reload_would_do(office: Office) -> None:
    before = office.state()
    text = (
        office.path.read_text()
        + "SERVICE_EXAMPLE_MAX_RUNS=20\nPORT=1\nSERVICE_NEW_CLIENTS=http://h:1\nSERVICE_OPEN_MAX_RUNS=4\nJOBORCH_SLOT=1\n"
    )
    said = check(office, text)
    assert said.status == 200, said
    changes = {change["name"]: (change["before"], change["after"], change["taken"]) for change in said.json["changes"]}
    assert changes == {
        "SERVICE_EXAMPLE_MAX_RUNS": ("10", "20", True),
        "service new": ("", "h:1 (per user 5, in all 10)", True),
        "service open": ("", "clients that join (per user 5, in all 4)", True),
    }, "PORT is set in the environment, which wins"
    assert said.json["warnings"] == [
        "JOBORCH_SLOT is not a setting (did you mean JOBORCH_SLOTS?)",
        "PORT in --env-file has no effect: the environment sets it",
    ]
    said = check(office, "MAX_AGE=long")
    assert (said.status, said.json["field"]) == (400, "settings") and "MAX_AGE is 'long'" in said.json["message"]
    assert office.state() == before and office.desk.quiet()


# == Real processes ==


@pytest.fixture(name="site")
def site_fixture(make_pair: MakePair, make_process: MakeProcess, tmp_path: Path) -> tuple[Process, Process, Process, Path]:
    """A server with its settings in a file, its client, and another client that it does not know yet."""
    second = make_process("client", {"JOBORCH_TOKEN": Pair.TOKEN, "JOBORCH_SLOTS": "2"})
    file = tmp_path / "server.env"
    unset = {"SERVICE_EXAMPLE_CLIENTS": None, "SERVICE_EXAMPLE_TOKEN": None}
    pair = make_pair(server=unset, client={"JOBORCH_SLOTS": "2"})
    pair.server.arguments = ["--env-file", str(file)]
    file.write_text(f"SERVICE_EXAMPLE_CLIENTS={pair.client.url}\nSERVICE_EXAMPLE_TOKEN={Pair.TOKEN}\nSERVICE_EXAMPLE_RUNS_PER_USER=9\n")
    second.spawn()
    pair.start()
    return pair.server, pair.client, second, file


def test_a_client_is_replaced_while_jobs_run(site: tuple[Process, Process, Process, Path], tmp_path: Path) -> None:
    """By HUP: what runs at the old one ends there, all the rest goes to the new one, and no job is lost or run twice."""
    server, first, second, file = site
    running = held(server, tmp_path / "gate", 2)
    queued = [submit(server, "true", user_id=user) for user in (1, 2, 3)]
    text = file.read_text().replace(first.url, second.url)
    checked = tmp_path / "new.env"
    checked.write_text(text + "JOBORCH_MAX_UPLOAD=2G\n")
    done = command(server, "config", "--check", str(checked), "--json")
    changes = json.loads(done.stdout)["changes"]
    assert [(change["name"], change["taken"]) for change in changes] == [
        ("JOBORCH_MAX_UPLOAD", False), ("SERVICE_EXAMPLE_CLIENTS", True),
    ], done.stderr  # fmt: skip
    file.write_text(text + "JOBORCH_LOG=warning\n")
    os.kill(server.pid, signal.SIGHUP)
    wait_for(lambda: "reload: 2 changes" in server.log, 60, "the reload")
    assert f"SERVICE_EXAMPLE_CLIENTS: {first.url} -> {second.url}" in server.log and "JOBORCH_LOG: info -> warning" in server.log
    names = [process.url.rpartition("/")[2] for process in (first, second)]
    for number in queued:
        assert wait_status(server, number, "Completed", limit_s=60)["client"] == names[1]
    (tmp_path / "gate").touch()
    for number in running:
        job = wait_status(server, number, "Completed", limit_s=60)
        assert (job["client"], job["attempt"]) == (names[0], 1)
    wait_for(lambda: set(clients_of(server)) == {names[1]}, 60, "the end of the removed client's link")
    assert " INFO " not in server.log.partition("reload: 2 changes\n")[2]


def reloaded(server: Process, file: Path, text: str) -> str:
    """Write the settings, send HUP, and return the last line about it."""
    ends = r"reload: (?:no setting has changed|nothing was changed|\d+ changes?\b).*"
    before = len(re.findall(ends, server.log))
    file.write_text(text)
    os.kill(server.pid, signal.SIGHUP)
    return str(wait_for(lambda: re.findall(ends, server.log)[before:], 60, "the reload")[-1])


def position(server: Process) -> int:
    """Where /changes is now."""
    return int(server.get("/changes", params={"limit": 1000}).json()["next"])


def test_many_reloads_while_jobs_of_every_state_are_under_way(site: tuple[Process, Process, Process, Path], tmp_path: Path) -> None:
    """Clients, the service, quotas and weights change again and again, files that cannot be used among them, and jobs come and go.

    None is lost or run twice, and none is claimed for a client that is not configured.
    """
    server, *clients, file = site
    start = file.read_text().partition("\n")[2]
    names = {process.url.rpartition("/")[2]: process for process in clients}
    marks, luck, nobody = tmp_path / "marks", random.Random(7), f"http://127.0.0.1:{free_port()}"
    expected, terminated = dict[int, Expected](), list[int]()

    def settings(of: Sequence[str]) -> str:
        """A file with these clients, other weights and other quotas; without a client there is no service."""
        more = f"JOBORCH_WEIGHTS=1={luck.randint(1, 9)}\nSERVICE_OTHER_CLIENTS={nobody}\n"
        limits = f"SERVICE_EXAMPLE_MAX_RUNS={luck.randint(2, 9)}\nSERVICE_EXAMPLE_POLICY={luck.choice(['share', 'fifo', 'priority'])}\n"
        urls = ",".join(names[name].url for name in of)
        return more + (f"SERVICE_EXAMPLE_CLIENTS={urls}\n{start}{limits}" if of else "")

    def send(script: str, end: str, **fields: object) -> int:
        number = submit(server, mark_lines(marks) + script, **fields)
        expected[number] = Expected(ends=[end], most_attempts=1)
        return number

    first, second = names
    steps: list[tuple[list[str], bool]] = [([first], True)]  # which clients are configured, and whether the file could be used
    bounds = [position(server)]
    for of in ([second], [first, second], [], [first], None, [second], [], [second, first], None, [first], [first, second]):
        for user in (1, 2, 3):
            if steps[-1][0]:
                send("sleep 0.2", "Completed", user_id=user)
        if steps[-1][0]:
            terminated.append(send("sleep 600", "Killed", user_id=4))
            assert server.post(f"/terminate/{terminated[-1]}").status_code in (200, 202)
        said = reloaded(server, file, settings([first]) + "SERVICE_EXAMPLE_MAX_RUNS=many\n" if of is None else settings(of))
        assert ("nothing was changed" in said) is (of is None)
        steps.append((steps[-1][0] if of is None else of, of is not None))
        bounds.append(position(server))
    for number, wanted in expected.items():
        assert wait_status(server, number, *ENDED, limit_s=90)["status"] in wanted.ends
    assert_proven(
        gather(
            server.data / "joborch.db",
            clients={process.folder.name: process.data / "joborch.db" for process in clients},
            marks=[marks],
            results=server.data / "results",
            expected=expected,
            terminated=terminated,
        )
    )
    bounds.append(position(server))
    claims = [move for moves in read_log(server.data / "joborch.db").moves.values() for move in moves if move.target == "Processing"]
    assert len(claims) >= len(expected) - len(terminated)
    for claim in claims:
        step = max(0, bisect.bisect_left(bounds, claim.seq or 0) - 1)
        allowed = {*steps[step][0], *steps[min(step + 1, len(steps) - 1)][0]}
        assert claim.reason.removeprefix("claimed for ") in allowed, (claim, steps[step : step + 2])


def signals_until(process: Process, over: Callable[[], Any]) -> None:
    """Send HUP without a pause until a condition holds."""
    while not over():
        assert process.process is not None
        if process.process.poll() is None:
            os.kill(process.pid, signal.SIGHUP)


def survives_hup(process: Process) -> bool:
    """Whether a process keeps HUP for later, or takes it."""
    masks = re.findall(r"^Sig(?:Blk|Cgt):\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGHUP - 1) & 1 for mask in masks)


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_reload_while_it_starts_or_stops_kills_nothing(role: str, pyz: Path, make_process: MakeProcess, tmp_path: Path) -> None:
    """What comes early is done after the start; what comes late is too late."""
    file = tmp_path / "env"
    file.write_text("MAX_AGE=1h\n")
    process = make_process(role, program=[sys.executable, str(pyz)], arguments=["--env-file", str(file)])
    process.spawn()
    wait_for(lambda: survives_hup(process), 60, "a process that is prepared for HUP")
    signals_until(process, process._healthy)
    wait_for(lambda: "reload: no setting has changed" in process.log, 60, "the reload")
    assert process.process is not None
    process.process.terminate()
    signals_until(process, lambda: process.process is not None and process.process.poll() is not None)
    assert process.process.returncode == 0, process.log[-2000:]


def test_a_quota_below_what_runs_ends_nothing(site: tuple[Process, Process, Process, Path], tmp_path: Path) -> None:
    """What is too much runs on; the next job comes when there is room by the new quota."""
    server, _, _, file = site
    running = held(server, tmp_path / "gate", 2)
    said = reloaded(server, file, file.read_text().replace("RUNS_PER_USER=9", "RUNS_PER_USER=1"))
    assert said == "reload: 1 change"
    waits = submit(server, "true")
    (tmp_path / "gate").touch()
    for number in (*running, waits):
        assert wait_status(server, number, "Completed", limit_s=60)["attempt"] == 1
    moves = read_log(server.data / "joborch.db").moves
    ends = [move.at for number in running for move in moves[number] if move.target == "Completed"]
    assert min(move.at for move in moves[waits] if move.target == "Processing") >= max(ends)


def test_the_token_of_a_client_is_replaced_while_a_job_runs(site: tuple[Process, Process, Process, Path], tmp_path: Path) -> None:
    """First at the client, which takes both; then at the server; then the old one is taken back. No process is restarted."""
    server, client, _, file = site
    own = tmp_path / "client.env"
    own.write_text(f"JOBORCH_TOKEN={Pair.TOKEN}\n")
    client.stop()
    del client.settings["JOBORCH_TOKEN"]
    client.arguments = ["--env-file", str(own)]
    client.start()
    [running] = held(server, tmp_path / "gate", 1)
    new = "another-token-of-this-client"
    assert reloaded(client, own, f"JOBORCH_TOKEN={Pair.TOKEN},{new}\n") == "reload: 1 change"
    assert reloaded(server, file, file.read_text().replace(Pair.TOKEN, new)) == "reload: 1 change"
    assert wait_status(server, submit(server, "true", user_id=2), "Completed", limit_s=60)
    assert reloaded(client, own, f"JOBORCH_TOKEN={new}\n") == "reload: 1 change"
    (tmp_path / "gate").touch()
    assert wait_status(server, running, "Completed", limit_s=60)["attempt"] == 1
    assert client.get("/events", headers={"Authorization": f"Bearer {Pair.TOKEN}"}).status_code in (401, 403)
    assert Pair.TOKEN not in client.log + server.log and new not in client.log + server.log


def test_config_check_without_a_server_compares_with_the_defaults(make_process: MakeProcess, tmp_path: Path) -> None:
    process, file = make_process("server"), tmp_path / "server.env"
    file.write_text("SERVICE_DOCKING_CLIENTS=http://gpu1:9000\nMAX_AGE=2d\nJOBORCH_AGEING=2m\n")
    done = command(process, "config", "--check", str(file))
    assert done.returncode == 0, done.stderr
    assert "service docking: - -> gpu1:9000 (per user 5, in all 10)\n" in done.stdout
    assert "JOBORCH_AGEING: 60 -> 120\n" in done.stdout and "MAX_AGE" not in done.stdout
    assert "differs from the defaults" in done.stderr
    file.write_text("MAX_AGE=long\n")
    done = command(process, "config", "--check", str(file))
    assert done.returncode == 2 and "MAX_AGE is 'long'" in done.stderr
