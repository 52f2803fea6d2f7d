"""Answers that do not mislead: what was asked is what is answered, and what cannot be done is said at once, with the remedy."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import (
    Pair,
    assert_error,
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
        ("GET", "/health?verbose", "verbose", ["it takes none"]),
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
    assert_error(answer, 400, "user_id does not belong in the address", "-F user_id=")


def test_a_parameter_that_belongs_in_the_address(pair: Pair) -> None:
    answer = pair.server.call("PUT", "/users/7", data={"weight": "2"})
    assert_error(answer, 400, "weight is missing", "PUT /users/7?weight=2")


def test_a_client_refuses_it_too_but_not_of_a_server(pair: Pair) -> None:
    """A server that is newer than its client may ask for more than that one knows."""
    token = {"Authorization": f"Bearer {pair.TOKEN}"}
    for path in ("/events?snce=0", "/logs/1?strem=stderr", "/load?x=1", "/health?x=1"):
        assert_error(pair.client.get(path, headers=token), 400, "is not a parameter of GET")
    answer = pair.client.get("/events?since=0&room=1", headers={**token, "X-Joborch": "9.9.9"})
    assert answer.status_code == 200


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
        (["tree.tar.gz"], ["among tree.tar.gz", "not unpacked"]),
        (["job.zip"], ["among job.zip", "not unpacked"]),
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
        (b"#!/bin/bash\r\n\r\n# only\r\n", ["Windows line ends (CRLF)", "dos2unix"]),
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
    answer = upload(pair.server, {"run.sh": script})
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
    answer = upload(pair.server, {"run.sh": b"#!/bin/bash\r\ntrue #\r\n"})
    assert "CRLF" in answer.json()["warnings"][0]
    wait_status(pair.server, answer.json()["id"], "Completed")
