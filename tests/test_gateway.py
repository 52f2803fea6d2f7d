"""Behind a real nginx with its defaults (`proxy_pass` alone): live output arrives as it is written, and waiting works."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from conftest import MakeProcess
from harness import Pair, free_port, from_source, submit, upload, wait_status
from world import GATEWAY_TOKEN, Gateway

import joborch

PATIENCE_S = 4  # longer than the pause between two comments, shorter than the longest wait
HURRIED = from_source(COMMENT_EVERY_S=PATIENCE_S / 2, WAIT_LIMIT_S=2.5 * PATIENCE_S)
NGINX_PATIENCE_S = 60


def test_nginx_is_more_patient_than_joborch_is_silent() -> None:
    """By a margin: the other tests of this file play the same with shorter times."""
    assert max(2 * joborch.COMMENT_EVERY_S, joborch.WAIT_LIMIT_S) <= NGINX_PATIENCE_S - 10


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, Gateway]]:
    """A pair and an nginx before its server."""
    folder = tmp_path_factory.mktemp("behind")
    pair = Pair(folder, {"JOBORCH_TOKEN": "sesame"}, program=HURRIED)
    pair.server.api.headers.update(GATEWAY_TOKEN)
    gateway = None
    try:
        pair.start()
        gateway = Gateway(folder / "nginx", pair.server, PATIENCE_S)
        yield pair, gateway
    finally:
        if gateway is not None:
            gateway.close()
        pair.close()


def gated(gate: Path, rest: str = "") -> str:
    return f"echo line 1\nuntil [ -e {gate} ]; do sleep 0.05; done\necho line 2\n{rest}"


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_output_arrives_as_it_is_written(behind: tuple[Pair, Gateway], tmp_path: Path, accept: str) -> None:
    """While the script runs, not when it has ended."""
    pair, gateway = behind
    number, gate = submit(pair.server, gated(tmp_path / "gate")), tmp_path / "gate"
    with gateway.get(gateway.port, f"/jobs/{number}/logs?follow=1", headers={"Accept": accept}, stream=True) as answer:
        lines = answer.iter_lines(chunk_size=1)
        assert any(b"line 1" in line for line in lines)
        assert pair.server.job(number)["status"] == "Running"
        gate.touch()
        rest = list(lines)
    assert any(b"line 2" in line for line in rest), rest
    assert accept == "*/*" or rest[-3:] == [b"event: end", b"data: Completed", b""], rest


def test_a_quiet_script_and_a_long_wait(behind: tuple[Pair, Gateway], tmp_path: Path) -> None:
    """An event stream outlives a silence that nginx does not; a wait of any length ends before nginx gives up."""
    pair, gateway = behind
    number, gate = submit(pair.server, gated(tmp_path / "gate")), tmp_path / "gate"
    wait_status(pair.server, number, "Running")
    with ThreadPoolExecutor(1) as pool:
        events = pool.submit(gateway.get, gateway.hasty, f"/jobs/{number}/logs?follow=1", headers={"Accept": "text/event-stream"})
        waited = gateway.get(gateway.port, f"/jobs/{number}?wait=3600")  # longer than PATIENCE_S
        assert (waited.status_code, waited.json()["status"]) == (200, "Running")
        gate.touch()
        answer = events.result(60)
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.text.count(": quiet\n\n") >= 2
    assert answer.text.endswith("data: line 2\ndata: \n\nevent: end\ndata: Completed\n\n"), answer.text
    assert "id: 7\ndata: line 1\n" in answer.text, answer.text


def test_a_plain_text_that_was_cut_goes_on(behind: tuple[Pair, Gateway], tmp_path: Path) -> None:
    """What was written before the silence is there, nothing was added to it, and `offset` gives the rest."""
    pair, gateway = behind
    number, gate = submit(pair.server, gated(tmp_path / "gate")), tmp_path / "gate"
    got = b""
    with gateway.get(gateway.hasty, f"/jobs/{number}/logs?follow=1", stream=True) as answer:
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        try:
            for chunk in answer.iter_content(1):
                got += chunk
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            assert pair.server.job(number)["status"] == "Running"
    assert got == b"line 1\n"
    gate.touch()
    assert gateway.get(gateway.port, f"/jobs/{number}/logs?follow=1&offset={len(got)}").content == b"line 2\n"


def test_events_go_on_where_they_broke(behind: tuple[Pair, Gateway]) -> None:
    """By the id of the last event; characters stay whole, and odd bytes hold nothing up."""
    pair, gateway = behind
    number = submit(pair.server, r"printf 'a\xc3'; sleep 0.4; printf '\xbcb\rc\n\xff\n'")
    ask = {"Accept": "text/event-stream"}
    text = gateway.get(gateway.port, f"/jobs/{number}/logs?follow=1", headers=ask).content.decode()
    said = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert "".join(said[:-1]).startswith("aüb") and "\ufffd" in text, text
    (last, *_) = [line[4:] for line in reversed(text.splitlines()) if line.startswith("id: ")]
    assert last == "9"
    again = gateway.get(gateway.port, f"/jobs/{number}/logs?follow=1", headers={**ask, "Last-Event-ID": "7"}).content.decode()
    assert "id: 9\ndata: \ufffd\ndata: \n\n" in again, again
    assert "aüb" not in again


def test_only_followed_output_is_not_buffered(make_process: MakeProcess) -> None:
    """Everything else a gateway may keep until it is whole."""
    server = make_process("server", {"SERVICE_EXAMPLE_CLIENTS": f"http://127.0.0.1:{free_port()}"}).start()
    number = upload(server, {"run.sh": b"true"}).json()["id"]
    assert "X-Accel-Buffering" not in server.get(f"/jobs/{number}/logs").headers
    server.post(f"/terminate/{number}")
    assert server.get(f"/jobs/{number}/logs?follow=1").headers["X-Accel-Buffering"] == "no"
