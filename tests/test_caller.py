"""The library for scripts, against real servers and clients: nothing is sent twice, lost, or believed that was damaged on the way."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import MakePair
from harness import EXAMPLE, LIMIT_S, ROOT, Pair, Process, clean_environment, free_port, nothing_left, wait_for, wait_status
from newcomer import section
from proxy import Fault, Proxy
from world import gated

import joborch
from joborch_plugins import caller
from joborch_plugins.caller import Damaged, JobFailed, Jobs, JobsError, Refused, ServerUnreachable


@pytest.fixture(name="jobs")
def jobs_fixture(pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Jobs:
    """The jobs of user 7 at the server of the session's pair."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [name for name in os.environ if name.startswith("JOBORCH_")]:
        monkeypatch.delenv(name)
    return Jobs(pair.server.url, user=7, patience_s=10)


@pytest.fixture(name="line")
def line_fixture(pair: Pair) -> Iterator[Proxy]:
    """A bad line to that server."""
    with Proxy(pair.server.port) as line:
        yield line


def over(line: Proxy, **options: float) -> Jobs:
    """The jobs of user 7, asked over a bad line."""
    return Jobs(line.url, user=7, **{"patience_s": 10, **options})  # type: ignore[arg-type]


def ids(jobs: Jobs) -> list[int]:
    """All jobs of the user."""
    return [job.id for job in jobs.list(limit=None)]


# == What is sent ==


def test_the_first_steps(jobs: Jobs) -> None:
    """From `joborch` itself, as a script has it."""
    assert joborch.Jobs is Jobs
    job = jobs.submit([EXAMPLE / "run.sh", str(EXAMPLE / "2oob.pdb")], name="2oob", cpus=1)
    assert (job.status in ("Queued", "Processing", "Submitted", "Running"), job.facts["user_id"], job.facts["name"]) == (True, 7, "2oob")
    assert b"36 residue pairs" in job.read("summary.txt")
    assert (job.status, job.ended, job.reason) == ("Completed", True, job.facts["reason"])
    assert {"run.sh", "2oob.pdb", "summary.txt", "contacts.tsv"} <= {entry["path"] for entry in job.files()}
    assert "36 residue pairs" in job.logs()
    assert repr(job) == f"<Job {job.id} Completed>"


def test_a_folder_arrives_as_it_is(jobs: Jobs, tmp_path: Path) -> None:
    """Names with anything in them that a POSIX name can have, links followed, tools executable."""
    folder = tmp_path / "tree"
    names = ['a "b" %22.txt', "ä ö\\ü.txt", "deep/er/x;y=1.txt", ".hidden", "-rf", "deep/filename*=utf-8''z"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "tool").write_text("#!/bin/sh\necho used\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data").write_text("linked")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "run.sh").write_text("./tool >out; find . -type f ! -name out | sort >names\n")
    job = jobs.submit(folder).check()
    assert job.read("out") == b"used\n"
    target = job.unpack(tmp_path / "result")
    for name in names:
        assert (target / name).read_text() == name
    assert (target / "link/data").read_text() == "linked"


def test_texts_and_bytes_are_files_too(jobs: Jobs) -> None:
    job = jobs.submit({"in.txt": "täxt\n", "in.bin": b"\0\xff", "sub/pdb": EXAMPLE / "2oob.pdb"}, script="cat in.* sub/pdb >out")
    assert job.read("out") == b"\0\xff" + "täxt\n".encode() + (EXAMPLE / "2oob.pdb").read_bytes()


def test_values_are_given_as_python_has_them(jobs: Jobs) -> None:
    """Lists, jobs, spans and times; what the server does not know is a warning, once."""
    first, second = (jobs.submit({}, script="echo x >x") for _ in range(2))
    job = jobs.submit({}, script="ls from/*/x", inputs_from=[first, second.id], after=first, timeout=datetime.timedelta(minutes=5))
    assert (job.facts["timeout"], job.facts["inputs_from"], job.facts["after"]) == (300.0, [first.id, second.id], [first.id, second.id])
    assert job.check().logs().split() == [f"from/{each.id}/x" for each in (first, second)]
    an_hour_ago = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=1)
    for since in (an_hour_ago, an_hour_ago.astimezone(), an_hour_ago.astimezone().replace(tzinfo=None), an_hour_ago.date()):
        assert job.id in [each.id for each in jobs.list(since=since, ids=[job, first.id])]
    assert [*jobs.list(since=an_hour_ago + datetime.timedelta(hours=2))] == []
    with pytest.warns(UserWarning, match=r"field 'timout' is not known and was ignored \(did you mean timeout\?\)") as caught:
        assert len([*jobs.map("true", [{"a": "1"}, {"a": "2"}], timout="5m")]) == 2
    assert {Path(warning.filename).name for warning in caught} <= {"thread.py", "test_caller.py"}
    with pytest.warns(UserWarning, match="timout"):
        job.retry(timout="5m").cancel()


def test_inputs_that_are_none(jobs: Jobs) -> None:
    with pytest.raises(JobsError, match=r"7 is no file: give paths, or a mapping from names to contents, as in \{'number.txt': '1'\}"):
        next(jobs.map("true", [7]))
    for content in (None, 7, bytearray(b"x")):
        with pytest.raises(JobsError, match=r"the content of a is of type \w+: give a text, bytes or a Path"):
            jobs.submit({"run.sh": "true", "a": content})  # type: ignore[dict-item]


def test_what_cannot_be_sent(jobs: Jobs, tmp_path: Path) -> None:
    """It is said before anything is sent."""
    before = ids(jobs)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "again").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to("/none")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "fifo").touch()
    said = {
        "none": "none cannot be read: no such file",
        "fifo": "fifo is neither a file nor a folder",
        "loop": "is a link to a folder above it",
        "dangling": "dangling cannot be read",
    }
    for name, words in said.items():
        with pytest.raises(JobsError, match=words):
            jobs.submit(tmp_path / name)
    with pytest.raises(JobsError, match=r"would both be run\.sh"):
        jobs.submit([EXAMPLE / "run.sh", EXAMPLE])
    assert ids(jobs) == before


def test_a_file_that_changes_while_it_is_sent(jobs: Jobs, tmp_path: Path) -> None:
    """Shorter or longer than it was: nothing is left on the server."""
    before, big = ids(jobs), tmp_path / "big"
    for size in (2_000_000, 4_000_000):
        big.write_bytes(b"x" * 3_000_000)
        form = caller.Upload({"run.sh": b"true", "big": big}, {"user_id": 7, "service": "example"})
        os.truncate(big, size)
        with pytest.raises(Damaged, match="big changed while it was sent"):
            jobs.server.ask("POST", "/upload", {}, form)
    assert ids(jobs) == before


def test_refusals_name_the_field(jobs: Jobs, tmp_path: Path) -> None:
    for call, status, field, words in (
        (lambda: jobs.submit({"a": b""}), 400, "file", "there is no run.sh among a"),
        (lambda: jobs.submit({}, script="true", priority=1000), 400, "priority", "-100 to 100"),
        (lambda: jobs.submit({}, "nowhere", script="true"), 400, "service", "give one of example"),
        (lambda: jobs.job(10**9), 404, None, "no job has the id"),
        (lambda: list(jobs.list(nonsense=1)), 400, "nonsense", "is not a parameter"),
    ):
        with pytest.raises(Refused, match=words) as caught:
            call()
        assert (caught.value.status, caught.value.field) == (status, field)


def test_an_answer_before_the_end_of_the_upload(make_pair: object, tmp_path: Path, make_process: object) -> None:
    """Too large by its length alone: the refusal is heard although the server closes the line."""
    server = make_process("server", {"JOBORCH_MAX_UPLOAD": "1M"}).start()  # type: ignore[operator]
    with (tmp_path / "big").open("wb") as file:
        file.truncate(300_000_000)
    with pytest.raises(Refused, match="JOBORCH_MAX_UPLOAD") as caught:
        Jobs(server.url, user=7, service="example", patience_s=0).submit({"run.sh": b"true", "big": tmp_path / "big"})
    assert caught.value.status == 413


@pytest.mark.parametrize("kind", ["lost_answer", "cut_request", "cut_answer", "garbage", "reset"])
def test_an_upload_that_is_cut_makes_one_job(kind: str, line: Proxy, jobs: Jobs) -> None:
    before = ids(jobs)
    fault = line.plant(Fault(kind, "POST /upload", after=50, times=2))
    job = over(line).submit({"x": b"x" * 3_000_000}, script="true", service="example")
    assert fault.left == 0
    assert [each for each in ids(jobs) if each not in before] == [job.id]


def test_an_idle_connection_that_the_server_closed(jobs: Jobs) -> None:
    """It is opened again without patience."""
    hasty = Jobs(jobs.server.url, user=7, patience_s=0)
    job = hasty.submit({}, script="true").check()
    hasty.server.kept.connection.sock.shutdown(socket.SHUT_RDWR)
    assert hasty.job(job.id).status == "Completed"


# == Which server ==


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    port = free_port()
    for url, words in (
        (f"http://127.0.0.1:{port}", f"no server answers at http://127.0.0.1:{port}: start one with `joborch server`"),
        (f"unix:{tmp_path}/none.sock", "no server answers at unix:"),
        ("http://no-such-host.invalid:5000", "is not known here"),
    ):
        began = time.monotonic()
        with pytest.raises(ServerUnreachable, match=words):
            Jobs(url, user=7, patience_s=0).job(1)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("url", ["localhost:5000", "ftp://x", "http://", "http://a:99999", "http://me:secret@host", "http://a/?x=1"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(JobsError, match="the server is"):
        Jobs(url)


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl to make a certificate")
def test_a_certificate_that_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the setting for the authority, and what is wrong with that."""
    words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "own", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(["openssl", "req", *words], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own", tmp_path / "key")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as line, context.wrap_socket(line, server_side=True) as inner:
                inner.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ServerUnreachable, match=r"certificate of https://.* is not trusted here \(self.signed.*\): .* JOBORCH_CA_FILE"):
            list(Jobs(url, user=7, patience_s=0).list())
    for content in (None, "", "no certificate"):
        monkeypatch.setenv("JOBORCH_CA_FILE", str(tmp_path / "ca"))
        if content is not None:
            (tmp_path / "ca").write_text(content)
        with pytest.raises(JobsError, match=r"JOBORCH_CA_FILE .*/ca cannot be used \(.+\): give a file with certificates"):
            list(Jobs(url, user=7, patience_s=0).list())


def test_a_token_that_is_none_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not shown."""
    for token in ("two words", "a\nb", "caf\xe9", "\u20ac"):
        monkeypatch.setenv("JOBORCH_TOKEN", token)
        with pytest.raises(JobsError, match=r"^the token has a blank, a line end or another character") as caught:
            Jobs("http://127.0.0.1:1")
        assert token not in str(caught.value)


def test_a_client_is_no_server(pair: Pair) -> None:
    with pytest.raises(Refused, match="there is nothing at /jobs: this is a client, so call its server instead"):
        list(Jobs(pair.client.url, "", user=7).list())


def test_something_else_listens_there(line: Proxy, pair: Pair) -> None:
    """A gateway's page is no answer; one that says 502 is asked again."""
    line.plant(Fault("rubbish", "GET /jobs/1", times=0))
    with pytest.raises(ServerUnreachable, match="does not answer like a joborch server"):
        over(line).job(1)
    line.calm()
    line.plant(Fault("rubbish", "GET /jobs", status=502))
    list(over(line).list(limit=1))
    line.plant(Fault("rubbish", "GET /jobs", status=502, times=0))
    with pytest.raises(Refused, match="the server, or a gateway in front of it, answered 502"):
        list(over(line, patience_s=0).list(limit=1))


def test_the_socket_is_found_and_a_stale_one_is_passed_by(make_pair: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody else can listen there; the socket of a server that was killed is not the end."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)
    port = free_port()
    path, url = tmp_path / "run" / f"joborch-{port}.sock", f"http://127.0.0.1:{port}"
    with closing(socket.socket(socket.AF_UNIX)) as live:
        live.bind(str(path))
        live.listen()
        found = caller.Server(url, "", 0)
        assert found.path == str(path)
        assert caller.Server(url, "token", 0).path == "", "a token goes to whoever is named"
        (tmp_path / "run").chmod(0o777)
        assert caller.Server(url, "", 0).path == "", "others could have put it there"
        (tmp_path / "run").chmod(0o700)
    assert caller.Server(url, "", 0).path == "", "its server was killed"
    with closing(socket.create_server(("127.0.0.1", port))) as listener:
        connection = found.connect()
        assert listener.accept()[0] is not None and found.path == ""
        connection.close()


def test_over_the_unix_socket(pair: Pair) -> None:
    jobs = Jobs(f"unix:/tmp/joborch-{os.getuid()}/joborch-{pair.server.port}.sock", user=7)
    assert jobs.submit({}, script="echo out").check().logs() == "out\n"


def test_a_token(make_process: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = make_process("server", {"JOBORCH_TOKEN": "right-right-right-right"}).start()  # type: ignore[operator]
    for name in ("JOBORCH_TOKEN", "JOBORCH_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Refused, match="the token is wrong"):
        Jobs(server.url, "wrong").job(1)
    (tmp_path / "token").write_text("right-right-right-right\n")
    monkeypatch.setenv("JOBORCH_TOKEN_FILE", str(tmp_path / "token"))
    assert list(Jobs(server.url).list()) == []
    monkeypatch.setenv("JOBORCH_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(JobsError, match=r"JOBORCH_TOKEN_FILE .*none cannot be read"):
        Jobs(server.url)
    monkeypatch.setenv("JOBORCH_TOKEN", "right-right-right-right,another")
    assert list(Jobs(server.url).list()) == []


def test_who_the_user_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Jobs().user == os.getuid()
    monkeypatch.setenv("JOBORCH_USER", "-5")
    assert Jobs().user == -5
    assert Jobs(user=0).user == 0
    monkeypatch.setenv("JOBORCH_USER", "alice")
    with pytest.raises(JobsError, match="JOBORCH_USER is 'alice': give the whole number of a user"):
        Jobs()


# == Waiting ==


def test_a_job_that_fails(jobs: Jobs) -> None:
    """The error has the reason, the exit code and the last words; what the job left can still be read."""
    job = jobs.submit({}, script="echo half >out; echo 'no such chain' >&2; exit 3")
    with pytest.raises(JobFailed, match=f"job {job.id} is Failed: .*exit status 3.*no such chain") as caught:
        job.read("out")
    assert (caught.value.exit_code, caught.value.cause, caught.value.job, caught.value.logs()) == (3, "user", job, "no such chain\n")
    assert job.read("out", partial=True) == b"half\n"
    with pytest.raises(FileNotFoundError, match="has no file 'other'"):
        job.read("other", partial=True)


def test_a_running_job_can_be_looked_into_and_ended(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.submit({}, script="echo begun | tee so-far; sleep 300")
    wait_for(lambda: job.logs() == "begun\n")
    assert job.read("so-far", partial=True) == b"begun\n"
    assert (job.unpack(tmp_path / "now", partial=True) / "so-far").read_text() == "begun\n"
    with pytest.raises(TimeoutError, match=f"job {job.id} is still Running after 0.1 s"):
        job.wait(0.1)
    assert job.cancel().status == "Killed"
    assert job.cancel().status == "Killed"
    assert jobs.submit({}, script="true").check().cancel().status == "Completed"


@pytest.mark.parametrize("at_once", [caller.IDS_AT_ONCE, 3])
def test_many_are_waited_for_in_the_order_of_their_ends(at_once: int, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if one request cannot ask for all of them."""
    monkeypatch.setattr(caller, "IDS_AT_ONCE", at_once)
    gates = [tmp_path / f"gate{number}" for number in range(8)]
    several = [jobs.submit({}, script=gated(gate)) for gate in gates]
    seen: list[int] = []
    with pytest.raises(TimeoutError, match="8 jobs have not ended"):
        jobs.wait(several, 0.3)
    gates[5].touch()
    for job in jobs.as_ended(several):
        seen.append(job.id)
        assert job.status == "Completed"
        if len(seen) == 1:
            for gate in gates:
                gate.touch()
    assert seen[0] == several[5].id
    assert sorted(seen) == [job.id for job in several]


def test_one_request_waits_for_many_jobs(jobs: Jobs, line: Proxy, tmp_path: Path) -> None:
    """The server answers when one has ended; nothing is asked for each job."""
    several = [over(line).submit({}, script=gated(tmp_path / f"gate{number}")) for number in range(4)]
    (tmp_path / "gate2").touch()
    waiting = over(line).as_ended(several)
    assert next(waiting).id == several[2].id
    asked = [exchange.request for exchange in line.find("GET /jobs")]
    assert asked and all(re.match(r"GET /jobs\?ids=[0-9,]+&limit=4&wait=45\.0&", each) for each in asked), asked
    for number in range(4):
        (tmp_path / f"gate{number}").touch()
    assert {job.id for job in waiting} == {job.id for job in several} - {several[2].id}


def test_a_wait_for_a_job_that_does_not_exist_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    """And for no time: the others may run for days."""
    job = jobs.submit({}, script=gated(tmp_path / "gate"))
    missing = caller.Job(jobs.server, {**job.facts, "id": 10**9})
    with pytest.raises(Refused, match="no job has the id") as caught:
        jobs.wait([job, missing])
    assert caught.value.status == 404
    (tmp_path / "gate").touch()


def test_lists_are_filtered_by_the_server(jobs: Jobs, line: Proxy) -> None:
    """One request gives what fits, and no more."""
    made = [jobs.submit({}, script=f"exit {number}", name=f"filtered-{number}").wait() for number in range(3)]
    found = list(over(line).list(status=["Failed", "Killed"], name="filtered", since="1h", ids=[job.id for job in made]))
    assert [job.id for job in found] == [made[2].id, made[1].id]
    assert len(line.find("GET /jobs")) == 1


def test_the_output_is_followed_to_its_end(jobs: Jobs) -> None:
    script = "for i in 1 2 3; do echo line $i; sleep 0.3; done; printf 'no newline ä'; echo wrong >&2"
    assert "".join(jobs.submit({}, script=script).follow()) == "line 1\nline 2\nline 3\nno newline ä"
    assert "".join(jobs.submit({}, script=script).follow("stderr")) == "wrong\n"
    assert list(jobs.submit({}, script="true").check().follow()) == []


def test_waiting_and_following_go_on_over_a_restart_of_the_server(own_pair: Pair, tmp_path: Path) -> None:
    """Each line comes once."""
    server, gate, troubles = own_pair.server, tmp_path / "gate", []
    jobs = Jobs(server.url, user=7, patience_s=LIMIT_S)
    job = jobs.submit({}, script=f"echo one; {gated(gate)}; echo two")
    other = Jobs(server.url, user=7, patience_s=LIMIT_S)
    other.server.on_trouble = troubles.append
    ended: list[str] = []
    waiter = threading.Thread(target=lambda: ended.append(other.job(job.id).wait().status))
    waiter.start()
    lines = job.follow()
    assert next(lines) == "one\n"
    server.kill()
    restarted = threading.Timer(1, lambda: (server.start(), gate.touch()))
    restarted.start()
    assert list(lines) == ["two\n"]
    waiter.join(LIMIT_S)
    restarted.join()
    assert (job.status, ended) == ("Completed", ["Completed"])
    assert any("no server answers at" in trouble for trouble in troubles)


# == Once more ==


def test_a_job_is_run_again_with_the_same_files_and_fields(jobs: Jobs, pair: Pair) -> None:
    """Whatever state it is in; the first one stays as it is, and the files of both go their own ways."""
    files = {"a": b"1", "deep/er/b": b"2", "tool": b"#!/bin/sh\necho used\n"}
    script = "cat a deep/er/b >out; ./tool; echo changed >a; exit 3"
    job = jobs.submit(files, script=script, name="first", priority=7, timeout="10m", cpus=2, memory="1G", retries=0).wait()
    before = dict(job.refresh().facts)
    again = job.retry()
    assert again.id != job.id
    for name in ("user_id", "service", "name", "priority", "timeout", "cpus", "memory", "gpus", "retries", "after"):
        assert again.facts[name] == before[name], name
    assert (again.wait().status, again.read("out", partial=True), again.logs()) == ("Failed", b"12", "used\n")
    assert job.refresh().facts == before
    third = again.retry("key")
    assert (third.id, again.retry("key").id) == (third.id, third.id)
    with pytest.raises(Refused, match="was used for job") as caught:
        job.retry("key")
    assert caught.value.status == 422
    assert third.wait().read("out", partial=True) == b"12"
    running = jobs.submit({}, script="echo $JOBORCH_JOB_ID; sleep 300")
    other = running.retry()
    running.cancel()
    wait_for(lambda: other.logs() == f"{other.id}\n")
    other.cancel()
    with pytest.raises(Refused, match="no job has the id") as caught:
        caller.Job(jobs.server, {"id": 10**9, "status": "Failed"}).retry()
    assert caught.value.status == 404


def test_a_retry_with_other_fields_and_files(jobs: Jobs) -> None:
    job = jobs.submit({"a": b"1", "b": b"2"}, script="cat a b > out", memory="1G").wait()
    again = job.retry(files={"b": b"3"}, name="again", memory="2G")
    assert (again.facts["retry_of"], again.facts["name"], again.facts["memory"]) == (job.id, "again", 2048)
    assert (again.check().read("out"), job.read("out")) == (b"13", b"12")


def test_permissions_of_files_are_kept(jobs: Jobs, tmp_path: Path) -> None:
    """A form has none; names of any length and empty files arrive all the same."""
    names = {"tool": 0o750, "plain": 0o640, "deep/" + "n" * 200 + "/\N{SNOWMAN}": 0o600, "empty": 0o644}
    for name, mode in names.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if name == "empty" else b"echo used")
        path.chmod(mode)
    (tmp_path / "run.sh").write_text("stat -c '%a %n' tool plain deep/*/* empty > modes; ./tool")
    job = jobs.submit(tmp_path).check()
    assert (job.read("modes").decode(), job.logs()) == ("".join(f"{mode:o} {name}\n" for name, mode in names.items()), "used\n")
    other = jobs.submit({"tool": tmp_path / "tool", "text": "#!/bin/sh\necho text"}, script="./tool && ./text").check()
    assert other.logs() == "used\ntext\n"


def test_a_job_gets_the_result_of_another(jobs: Jobs) -> None:
    first = jobs.submit({}, script="echo first > out")
    assert jobs.submit({}, script=f"cat from/{first.id}/out", inputs_from=first.id).check().logs() == "first\n"


def test_a_job_whose_files_are_gone_is_not_run_again(make_pair: MakePair, tmp_path: Path) -> None:
    own = make_pair(server={"MAX_AGE": "1", "JOBORCH_CLEAN_INTERVAL": "0.2"}).start()
    jobs = Jobs(own.server.url, user=7)
    job = jobs.submit({}, script="true").wait()
    wait_for(lambda: own.server.job(job.id)["status"] == "Cleaned")
    with nothing_left(own.server), pytest.raises(Refused, match="are deleted: upload them again") as caught:
        job.retry()
    assert caught.value.status == 410


def test_a_job_that_was_queued_again_is_on_the_disk(own_pair: Pair) -> None:
    """What was answered is on the disk."""
    jobs = Jobs(own_pair.server.url, user=7)
    own_pair.client.stop()
    job = jobs.submit({"a": b"kept"}, script="cat a >out")
    again = job.retry()
    job.cancel()
    own_pair.server.kill()
    own_pair.server.start()
    own_pair.client.start()
    assert again.refresh().read("out") == b"kept"


# == Results ==


def result_of(jobs: Jobs, size: int = 3_000_000) -> tuple[caller.Job, bytes]:
    """A job with a large result that cannot be packed smaller, and that as a ZIP."""
    job = jobs.submit(
        {}, script=f"head -c {size} /dev/urandom >big; echo small >small; mkdir -p d/e; echo x >d/e/x; ln -s e/x d/link"
    ).check()
    with jobs.server.open("GET", f"/download/{job.id}") as answer:
        return job, answer.read()


READERS: dict[str, Callable[[Jobs, int], object]] = {
    "GET /jobs/": lambda far, number: far.job(number).status,
    "GET /jobs[?]": lambda far, number: [job.id for job in far.list(ids=[number])],
    "GET /jobs/[0-9]+/files/": lambda far, number: far.job(number).read("small"),
    "GET /jobs/[0-9]+/logs": lambda far, number: far.job(number).logs(),
    "GET /jobs/[0-9]+/logs.*follow": lambda far, number: "".join(far.job(number).follow()),
    "GET /export": lambda far, number: b"".join(far.export()).splitlines()[0],
    "POST /jobs/[0-9]+/retry": lambda far, number: far.job(number).retry("the same key").id,
}


@pytest.mark.parametrize("match", READERS)
def test_an_answer_whose_head_is_cut_is_asked_for_again(
    match: str, line: Proxy, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any byte of it. http.client takes such a head for a whole one: then an answer without a length would be complete, but empty."""
    monkeypatch.setattr(caller, "FIRST_PAUSE_S", 0.0)
    job = jobs.submit({}, script="echo small >small; cat small").check()
    wanted = READERS[match](jobs, job.id)
    for length in (*range(0, 40, 4), *range(40, 500, 60)):
        line.plant(Fault("cut_answer", match, after=length))
        try:
            assert READERS[match](over(line), job.id) == wanted, length
        except ServerUnreachable:
            assert (match, length > 100) == ("GET /export", True), "what is printed already cannot be called back"
    assert line.counts()["cut_answer"] > 14


@pytest.mark.parametrize("seed", range(4))
def test_a_result_that_is_cut_at_any_byte_goes_on_there(seed: int, line: Proxy, jobs: Jobs, tmp_path: Path) -> None:
    """Within one call as well as by the next: nothing is fetched twice."""
    job, whole = result_of(jobs)
    choose = random.Random(seed)
    hasty, target = over(line, patience_s=0).job(job.id), tmp_path / "r.zip"
    for _ in range(3):
        line.plant(Fault(choose.choice(["cut_answer", "reset"]), "GET /download", after=choose.randrange(500, 900_000)))
    tries = 0
    while not target.exists():
        try:
            tries += 1
            hasty.result(target)
        except ServerUnreachable:
            assert tries < 6
    assert target.read_bytes() == whole
    fetched = sum(exchange.answer_bytes for exchange in line.find("GET /download"))
    assert fetched < len(whole) + 4 * 2_000_000, "what was there is not fetched again"
    assert [path.name for path in tmp_path.iterdir()] == ["r.zip"]


def test_a_damaged_result_is_fetched_again_and_then_refused(line: Proxy, jobs: Jobs, tmp_path: Path) -> None:
    job, whole = result_of(jobs)
    fault = line.plant(Fault("flip_answer", "GET /download", after=0.5))
    assert over(line).job(job.id).result(tmp_path / "a.zip").read_bytes() == whole
    assert fault.left == 0
    line.plant(Fault("flip_answer", "GET /download", after=0.5, times=0))
    with pytest.raises(Damaged, match="arrived damaged"):
        over(line).job(job.id).result(tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()


def test_a_process_that_is_killed_while_it_fetches(line: Proxy, jobs: Jobs, tmp_path: Path) -> None:
    """The next one goes on with what is there."""
    job, whole = result_of(jobs)
    line.plant(Fault("stall", "GET /download", after=1_500_000, seconds=60))
    code = f"from joborch import Jobs; Jobs({line.url!r}).job({job.id}).result('r.zip')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(lambda: [path for path in tmp_path.iterdir() if path.stat().st_size > 500_000])
    with pytest.raises(JobsError, match="another process fetches job"):
        job.result(tmp_path / "r.zip")
    process.kill()
    process.wait()
    before = next(tmp_path.iterdir()).stat().st_size
    line.calm()
    assert over(line).job(job.id).result(tmp_path / "r.zip").read_bytes() == whole
    assert line.find("GET /download")[-1].headers["range"] == f"bytes={before}-"


def test_one_file_is_read_without_the_rest(line: Proxy, jobs: Jobs) -> None:
    job, whole = result_of(jobs, 20_000_000)
    far = over(line).job(job.id)
    assert far.read("small") == b"small\n"
    assert [row["path"] for row in far.files()] == [".joborch/stderr", ".joborch/stdout", "big", "d/e/x", "d/link", "run.sh", "small"]
    assert sum(exchange.answer_bytes for exchange in line.find("GET /")) < 1_000_000 < len(whole)
    with pytest.raises(FileNotFoundError, match=r"d/link' of job [0-9]+ is a symbolic link to 'e/x'"):
        far.read("d/link")


@pytest.mark.parametrize("after", [0, 100, 700, 1_000_000, 2_999_000])
def test_one_file_that_is_cut_goes_on_there(after: int, line: Proxy, jobs: Jobs) -> None:
    """Cut twice, before the first byte of the answer or anywhere in it: the rest is fetched, and the whole is verified."""
    job, whole = result_of(jobs)
    content = zipfile.ZipFile(io.BytesIO(whole)).read("big")
    for _ in range(2):
        line.plant(Fault("cut_answer", "GET /jobs/[0-9]+/files/big", after=after))
    assert over(line).job(job.id).read("big") == content
    ranges = [exchange.headers.get("range", "bytes=0-") for exchange in line.find("GET /jobs/[0-9]+/files/big")]
    assert len(ranges) == 3
    assert after < 1_000_000 or all(int(text[6:-1]) > after / 2 for text in ranges[1:]), "what was there is not fetched again"


@pytest.mark.parametrize("seed", range(3))
def test_one_file_that_is_cut_at_any_byte_goes_on_in_a_later_call(seed: int, line: Proxy, jobs: Jobs, tmp_path: Path) -> None:
    """Nothing is fetched twice, and a file of the same name from another folder is another file."""
    job, whole = result_of(jobs)
    content = zipfile.ZipFile(io.BytesIO(whole)).read("big")
    choose = random.Random(seed)
    for _ in range(3):
        line.plant(Fault(choose.choice(["cut_answer", "reset"]), "GET /jobs/[0-9]+/files/big", after=choose.randrange(100, 900_000)))
    tries, target = 0, tmp_path / "f"
    while not target.exists():
        tries += 1
        assert tries < 6
        with contextlib.suppress(ServerUnreachable):
            assert over(line, patience_s=0).job(job.id).save("big", target) == target
        if tries == 1:
            assert over(line).job(job.id).save("d/e/x", target).read_bytes() == b"x\n"
            target.unlink()
    assert target.read_bytes() == content
    fetched = sum(exchange.answer_bytes for exchange in line.find("GET /jobs/[0-9]+/files/big"))
    assert fetched < len(content) + 4 * 2_000_000, "what was there is not fetched again"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_an_earlier_call_left_of_one_file_is_verified(line: Proxy, jobs: Jobs, tmp_path: Path) -> None:
    """Whether it is complete, damaged or too long; what cannot be resumed is not kept."""
    job, whole = result_of(jobs)
    content, target = zipfile.ZipFile(io.BytesIO(whole)).read("big"), tmp_path / "f"
    line.plant(Fault("cut_answer", "GET /jobs/[0-9]+/files/big", after=1_000_000))
    far = over(line, patience_s=0).job(job.id)
    with pytest.raises(ServerUnreachable):
        far.save("big", target)
    (part,) = tmp_path.iterdir()
    assert 0 < part.stat().st_size <= 1_000_000
    part.write_bytes(content)
    assert far.save("big", target).read_bytes() == content
    assert line.find("GET /jobs/[0-9]+/files/big")[-1].headers["range"] == f"bytes={len(content) - 1}-"
    for wrong in (b"y" * 1000, content + b"y" * 10):
        target.unlink()
        part.write_bytes(wrong)
        with pytest.raises(Damaged, match="try again"):
            far.save("big", target)
        assert far.save("big", target).read_bytes() == content
    with pytest.raises(FileNotFoundError):
        far.save("none", tmp_path / "none")
    running = jobs.submit({}, script="head -c 1000000 /dev/zero >big; sleep 300")
    wait_for(lambda: any(row["path"] == "big" and row["size"] == 1_000_000 for row in running.files(partial=True)))
    line.plant(Fault("cut_answer", "GET /jobs/[0-9]+/files/big", after=1000))
    with pytest.raises(ServerUnreachable):
        over(line, patience_s=0).job(running.id).save("big", tmp_path / "live", partial=True)
    running.cancel()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_one_file_that_is_changed_on_the_way_is_refused(line: Proxy, jobs: Jobs) -> None:
    job, _ = result_of(jobs)
    line.plant(Fault("flip_answer", "GET /jobs/[0-9]+/files/big", after=1_500_000))
    with pytest.raises(Damaged, match="CRC-32 differs"):
        over(line).job(job.id).read("big")


def test_a_result_is_unpacked_in_one_step(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.submit(
        {}, script="echo x >x; chmod 640 x; touch -d 2020-02-02T02:02:02 x; mkdir -p empty d; ln -s ../x d/l; printf '#!' >t; chmod +x t"
    )
    target = job.unpack(tmp_path / "new" / "out")
    assert (target / "d" / "l").readlink() == Path("../x")
    assert (target / "d" / "l").read_text() == "x\n"
    assert (target / "empty").is_dir()
    assert os.access(target / "t", os.X_OK) and not os.access(target / "x", os.X_OK)
    assert stat.S_IMODE((target / "x").stat().st_mode) == 0o640
    assert time.localtime((target / "x").stat().st_mtime)[:5] == (2020, 2, 2, 2, 2)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="out already exists: give the name of a new or empty folder"):
        job.unpack(target)
    (tmp_path / "empty").mkdir()
    job.unpack(tmp_path / "empty")


def test_names_of_every_kind_arrive(jobs: Jobs, tmp_path: Path) -> None:
    """Each file by itself and all of them as a folder: what a script may call a file can be fetched under that name."""
    names = ["a\nb", "\na", "a\n", "a\rb", "\x1b[31m", " ", "...", "-rf", "%2e%2e", "q?#&=+%41", "\u202ea", "a\\b", "n" * 255, "é" * 127]
    names += ["d" * 255 + "/" + "n" * 255]
    script = "".join(
        f"mkdir -p -- {shlex.quote(str(Path(name).parent))}; echo {at} >./{shlex.quote(name)}\n" for at, name in enumerate(names)
    )
    job = jobs.submit({}, script=script).check()
    assert {entry["path"] for entry in job.files()} >= set(names)
    for at, name in enumerate(names):
        place = tmp_path / "one" / Path(name).name
        place.parent.mkdir(exist_ok=True)
        assert (job.read(name), job.save(name, place).read_bytes()) == (b"%d\n" % at, b"%d\n" % at)
    target = tmp_path / ("t" * 255)
    job.unpack(target)
    assert [(target / name).read_bytes() for name in names] == [b"%d\n" % at for at in range(len(names))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "t" * 255]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted({Path(name).name for name in names})


@pytest.mark.parametrize(
    ("name", "link"),
    [("../x", ""), ("/etc/x", ""), ("a/../../x", ""), ("a//x", ""), ("l", "/etc/passwd"), ("l", "../x"), ("d/l", "../../x"), ("l", "..")],
)
def test_a_result_that_would_lead_elsewhere_is_not_unpacked(name: str, link: str, tmp_path: Path) -> None:
    """Whoever made it: nothing is written outside, and nothing is left."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("good", "x")
        entry = zipfile.ZipInfo(name)
        entry.external_attr = (stat.S_IFLNK if link else stat.S_IFREG) << 16
        made.writestr(entry, link or "x")
    (tmp_path / "r.zip").write_bytes(archive.getvalue())
    with pytest.raises(Damaged, match="leads out of the folder"):
        caller.unpack_as(str(tmp_path / "r.zip"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["r.zip"]


# == Many jobs ==


def test_a_script_over_many_inputs(jobs: Jobs, tmp_path: Path) -> None:
    """Results come as they end, failed ones too; the same key goes on with the jobs that there are, other inputs are new ones."""
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(str(number))
    script = "sum=$(cat [0-9]*.txt); [ $sum != 5 ] || exit 1; echo $((sum * sum)) >square"
    inputs = sorted(tmp_path.iterdir())
    before = set(ids(jobs))
    found = {job.input: job for job in jobs.map(script, inputs, key="squares")}
    assert sorted(found) == inputs
    assert found[tmp_path / "5.txt"].status == "Failed"
    squares = {path.stem: int(job.read("square")) for path, job in found.items() if job.status == "Completed"}
    assert squares == {str(number): number**2 for number in range(12) if number != 5}
    assert len(set(ids(jobs)) - before) == 12
    (tmp_path / "12.txt").write_text("12")
    again = list(jobs.map(script, sorted(tmp_path.iterdir()), key="squares"))
    assert len(set(ids(jobs)) - before) == 13
    assert {job.id for job in found.values()} < {job.id for job in again}
    twice = [job.id for job in jobs.map("true", [{"a": b"1"}, {"a": b"1"}], key="twice")]
    assert len(set(twice)) == 2, "the same input twice is meant"
    assert sorted(job.id for job in jobs.map("true", [{"a": b"1"}, {"a": b"1"}], key="twice")) == sorted(twice)
    assert {job.id for job in jobs.map("true", [{"a": b"1"}], key="twice", priority=1)}.isdisjoint(twice)


def test_the_example_is_killed_and_started_again_and_runs_nothing_twice(own_pair: Pair, tmp_path: Path) -> None:
    """At several moments of its life."""
    server: Process = own_pair.server
    structures = tmp_path / "structures"
    structures.mkdir()
    for number in range(30):
        (structures / f"s{number:02}.pdb").write_text(f"REMARK {number}\n" + (EXAMPLE / "2oob.pdb").read_text())
    environment = {**clean_environment(tmp_path), "PYTHONPATH": str(ROOT), "JOBORCH_SERVER": server.url}
    command = [sys.executable, str(EXAMPLE / "map.py"), str(structures)]
    for jobs_before in (1, 12):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        wait_for(lambda count=jobs_before: len(server.jobs()) >= count)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(line.partition(":")[0] for line in done.stdout.splitlines()) == [f"s{number:02}.pdb" for number in range(30)]
    jobs = server.jobs()
    assert len(jobs) == 30
    assert all(wait_status(server, job["id"], "Completed")["attempt"] == 1 for job in jobs)


def test_the_document_s_examples_run(pair: Pair, tmp_path: Path) -> None:
    """Those of docs/use.md, one after the other, in a folder that has the example."""
    page = section((ROOT / "docs/use.md").read_text(), "From Python")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "example").symlink_to(EXAMPLE)
    environment = {**clean_environment(tmp_path), "PYTHONPATH": str(ROOT), "JOBORCH_SERVER": pair.server.url, "JOBORCH_USER": "7"}
    done = subprocess.run(
        [sys.executable, "-c", "".join(blocks)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("36 residue pairs") == 2
    assert "36 residue pairs" in (tmp_path / "results/2oob/summary.txt").read_text()


def test_the_example_is_as_short_as_it_is_said_to_be() -> None:
    code = (EXAMPLE / "map.py").read_text().partition("from joborch import Jobs\n")[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 5


def test_the_library_needs_the_standard_library_alone(tmp_path: Path) -> None:
    """Without the rest of joborch, and without what it imports only where it is used."""
    code = "import sys; before = set(sys.modules); import joborch_plugins.caller; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & {"joborch", "requests", "zipfile", "tempfile", "shutil", "concurrent.futures", "sqlite3", "logging"}
