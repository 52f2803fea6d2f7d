"""Jobs that get the results of other jobs: `inputs_from`, over HTTP against running processes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePair
from harness import (
    Pair,
    Process,
    assert_error,
    download,
    field_part,
    file_part,
    form,
    form_type,
    nothing_left,
    run_to_end,
    submit,
    upload,
    wait_for,
    wait_status,
)
from world import gated, held

MAKES = """mkdir -p deep/er
echo first > deep/er/out.txt
printf '#!/bin/bash\\necho tool\\n' > tool; chmod 750 tool
ln -s deep/er/out.txt link; ln -s link chain; ln -s deep folder; ln -s nowhere lost
"""
TAKES = "find from -type f | sort > listed; from/{0}/tool > said; cat from/{0}/chain >> said"


def test_the_result_of_one_job_is_an_input_of_another(pair: Pair) -> None:
    """Its files lie in from/ID/ with their permissions; a link to one of them is that file; the answer says what it waits for."""
    gate = pair.folder / "gate-of-inputs"
    first = submit(pair.server, gated(gate) + "\n" + MAKES)
    answer = upload(pair.server, {"run.sh": TAKES.format(first).encode()}, inputs_from=f" {first} ")
    second = answer.json()
    assert (answer.status_code, second["inputs_from"], second["after"]) == (201, [first], [first])
    assert str(first) in pair.server.get(f"/jobs/{second['id']}").json()["waiting_for"]
    gate.touch()
    job = wait_status(pair.server, second["id"], "Completed", limit_s=90)
    result = download(pair.server, job["id"])
    assert result.text("said") == "tool\nfirst\n"
    names = {name.removeprefix(f"from/{first}/") for name in result.text("listed").split()}
    assert names >= {"chain", "deep/er/out.txt", "link", "run.sh", "tool", ".joborch/stdout"}
    assert not names & {"folder", "lost"}
    assert not list(Path(job["loc"]).rglob("from")), "the server made a copy"
    third = run_to_end(pair.server, f"cmp from/{first}/tool from/{job['id']}/from/{first}/tool", inputs_from=f"{job['id']},{first}")
    assert third["status"] == "Completed", third["reason"]


def test_what_cannot_be_an_input(pair: Pair) -> None:
    """Another user's job, one that does not exist, and one that failed are refused at once, and so is a file in the way."""
    good, bad = run_to_end(pair.server, "true")["id"], run_to_end(pair.server, "exit 3")["id"]
    with nothing_left(pair.server):
        for user, number, words in ((2, good, "has no job"), (1, 10**9, "has no job"), (1, bad, "ended as Failed and has no result")):
            said = assert_error(upload(pair.server, {"run.sh": b"true"}, user_id=user, inputs_from=number), 400, words)
            assert said["field"] == "inputs_from"
        assert_error(upload(pair.server, {"run.sh": b"true"}, inputs_from="one"), 400, "as in 41,42")
        for name in ("from/x", f"from/{good}/tool", "from"):
            assert_error(upload(pair.server, {"run.sh": b"true", name: b""}, inputs_from=good), 400, "the folder from/")


def test_a_job_whose_input_fails_later_says_so(pair: Pair) -> None:
    gate = pair.folder / "gate-of-failure"
    first = submit(pair.server, gated(gate) + "\nexit 4")
    second = submit(pair.server, "true", inputs_from=first)
    gate.touch()
    job = wait_status(pair.server, second, "Invalid", limit_s=90)
    assert f"job {first}, which it follows, ended as Failed" in job["reason"]


def patch_member(path: Path) -> None:
    """Change the data of a ZIP's member."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("numbers")
    data = bytearray(path.read_bytes())
    at = entry.header_offset + 30 + len("numbers") + entry.compress_size // 2
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"none"), patch_member])
def test_a_result_that_is_lost_or_damaged(make_pair: MakePair, damage: Callable[[Path], Any]) -> None:
    """The job fails with a reason that names the other one; it never runs with other inputs."""
    pair = make_pair().start()
    first = run_to_end(pair.server, "seq 100000 > numbers")["id"]
    gate = pair.folder / "gate"
    (blocking,) = held(pair.server, gate, 1)
    second = submit(pair.server, "true", inputs_from=f"{first}", after=blocking)
    (stored,) = (pair.server.data / "results").glob(f"{pair.server.get(f'/jobs/{first}').json()['uuid']}*")
    damage(stored)
    gate.touch()
    job = wait_status(pair.server, second, "Failed", limit_s=90)
    assert (job["cause"], f"result of job {first}" in job["reason"]) == ("infrastructure", True), job


@pytest.fixture
def forgetful(make_pair: MakePair) -> Pair:
    """A pair whose server deletes files a second after the end."""
    return make_pair(server={"MAX_AGE": "1s", "JOBORCH_CLEAN_INTERVAL": "1s"}).start()


def test_results_that_are_needed_are_kept(forgetful: Pair) -> None:
    """The cleaner deletes what no job needs any more; a restart changes nothing; then a retry is refused."""
    server, gate, start = forgetful.server, forgetful.folder / "gate", forgetful.folder / "start"
    blocking, first = submit(server, gated(gate)), submit(server, f"{gated(start)}\necho kept > out.txt")
    second = submit(server, f"cp from/{first}/out.txt .", inputs_from=first, after=blocking)
    start.touch()
    wait_for(lambda: status_of(server, first) == "Completed", 90)
    wait_until_cleaned(server, submit(server, "true"))  # the cleaner has looked at all that ended before it
    server.restart()
    wait_until_cleaned(server, submit(server, "true"))
    assert status_of(server, first) == "Completed"
    assert_error(upload(server, {"run.sh": b"true"}, inputs_from=first), 400, "is deleted, or about to be")
    gate.touch()
    wait_for(lambda: server.job(second)["ended_as"], 90)
    assert server.job(second)["ended_as"] == "Completed"
    wait_until_cleaned(server, first)
    assert_error(upload(server, {"run.sh": b"true"}, inputs_from=first), 400, "is deleted")


def status_of(server: Process, number: int) -> str:
    return str(server.job(number)["status"])


def wait_until_cleaned(server: Process, number: int) -> None:
    wait_for(lambda: status_of(server, number) == "Cleaned", 90)


def test_a_retry_gets_the_same_results(pair: Pair) -> None:
    """It says so; with other inputs it gets those; if a result is gone it is refused with 410."""
    first, other = run_to_end(pair.server, "echo 1 > out")["id"], run_to_end(pair.server, "echo 2 > out")["id"]
    job = run_to_end(pair.server, "cat from/*/out > said", inputs_from=first)
    again = pair.server.post(f"/jobs/{job['id']}/retry").json()
    assert (again["inputs_from"], again["retry_of"]) == ([first], job["id"])
    wait_status(pair.server, again["id"], "Completed")
    assert download(pair.server, again["id"]).text("said") == "1\n"
    body = form([field_part("inputs_from", f"{other}"), field_part("after", ""), file_part("more", b"")])
    changed = pair.server.post(f"/jobs/{job['id']}/retry", data=body, headers=form_type()).json()
    assert changed["inputs_from"] == [other]
    wait_status(pair.server, changed["id"], "Completed")
    assert download(pair.server, changed["id"]).text("said") == "2\n"
