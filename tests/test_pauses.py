"""A paused service takes uploads and sends none; a draining client takes no payloads, and ends when nothing is left to fetch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import MakePair
from harness import submit, wait_for, wait_status
from world import Desk, Yard, ask, command, gated, submit_payload

import joborch
from joborch import Status

pytestmark = pytest.mark.usefixtures("no_long_polls")


# == Pause ==


def test_a_paused_service_takes_uploads_and_sends_none(desk: Desk) -> None:
    """Jobs say who paused it, when and why; those at clients go on; a restart changes nothing."""
    running = desk.with_client()
    said = ask(desk.server, "POST", "/services/example/pause?reason=the+disk+is+slow")
    assert said.status == 200 and said.json["paused"].endswith(" by default: the disk is slow")
    job = desk.upload()
    for _ in range(2):
        desk.link.heard()
        desk.link.slots = 5
        assert joborch.dispatch_tick(desk.server) is False
        assert desk[job].status is Status.QUEUED
        message = ask(desk.server, "GET", f"/jobs/{job.id}").json["waiting_for"]
        assert message == said.json["paused"] == ask(desk.server, "GET", "/services").json["services"][0]["paused"]
        desk.restart()
    assert desk[running].status is Status.RUNNING
    assert ask(desk.server, "POST", "/services/Example/resume").json["paused"] is None
    desk.link.heard()
    desk.link.slots = 5
    assert joborch.dispatch_tick(desk.server) and desk[job].status is Status.PROCESSING
    desk.restart()
    assert desk.server.paused == {}


def test_a_service_that_is_not_known(desk: Desk) -> None:
    for action in ("pause", "resume"):
        said = ask(desk.server, "POST", f"/services/exmple/{action}")
        assert (said.status, said.json["message"]) == (404, "no service is called exmple: give one of example")


def test_a_paused_service_that_is_removed_can_be_resumed(desk: Desk) -> None:
    assert ask(desk.server, "POST", "/services/example/pause").status == 200
    desk.server.services = {}
    assert ask(desk.server, "POST", "/services/example/resume").json == {"name": "example", "paused": None}


def test_a_pause_that_cannot_be_stored_is_none(desk: Desk) -> None:
    desk.store.db.execute("DROP TABLE paused")
    assert ask(desk.server, "POST", "/services/example/pause").status == 503
    assert desk.server.paused == {}


# == Drain ==


def test_a_draining_client_takes_nothing_and_says_so(yard: Yard) -> None:
    before = yard.submit("true", X_Joborch_Uuid="8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0")
    yard.client.plugins["drain"].begin()
    said = submit_payload(yard.client, [])
    assert said.status == 503 and "is draining" in said.json["message"]
    again = submit_payload(yard.client, [], X_Joborch_Uuid=before.uuid)
    assert (again.status, again.json["id"]) == (200, before.id), "a submit whose answer was lost"
    assert "is draining" in yard.events()["problem"]
    assert ask(yard.client, "GET", "/health").json["problems"] == []


@pytest.mark.parametrize("by_signal", [True, False], ids=["SIGUSR1", "--drain"])
def test_a_client_ends_when_its_last_result_is_fetched(by_signal: bool, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair().start()
    number = submit(pair.server, gated(tmp_path / "gate"))
    wait_status(pair.server, number, "Running")
    if by_signal:
        os.kill(pair.client.pid, signal.SIGUSR1)
    else:
        pair.client.stop()
        pair.client.arguments = ["--drain"]
        pair.client.start()
    wait_for(lambda: "drain: 1 to finish, 0 to be fetched" in pair.client.log, 60, "the client to drain")
    paused = command(pair.server, "pause", "example", "--reason", "maintenance", "--server", pair.server.url)
    assert paused.returncode == 0 and paused.stdout.endswith(": maintenance\n"), paused.stderr
    waiting = submit(pair.server, "true")
    (tmp_path / "gate").touch()
    assert wait_status(pair.server, number, "Completed", limit_s=60)["attempt"] == 1
    assert pair.client.process is not None and pair.client.process.wait(60) == 0
    pair.client.arguments = []
    pair.client.start()
    assert command(pair.server, "resume", "example", "--server", pair.server.url).stdout == "service example is resumed\n"
    assert wait_status(pair.server, waiting, "Completed", limit_s=60)["attempt"] == 1
