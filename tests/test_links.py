"""What the server sends a client, and what it makes of each answer: has the client the job, has it not, or does nobody know?"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from harness import free_port
from hypothesis import assume, example, given
from hypothesis import strategies as st
from world import (
    BOUNDED,
    CONTENTS,
    NAMES,
    NONCE,
    Asked,
    HandClock,
    Peer,
    Trickle,
    a_service,
    changed,
    digest_of,
    fit,
    make_link,
    new_folder,
    new_job,
    on_disk,
    read_message,
    reply,
    serve_each,
    tried,
    zip_reply,
)

import joborch
from joborch import DataFolder, FilesBody, FormReader, Gone, Job, Link, NoAnswer, NothingSent, Rejected, Store, Transfer
from joborch_base.identity import link_key

# == A client that says what it is told to say ==


@pytest.fixture
def link(peer: Peer, data: DataFolder) -> Link:
    """A link to the peer."""
    return make_link(peer.url, data)


def proven_link(url: str, data: DataFolder) -> Link:
    """The same, to a client that has proven itself a moment ago."""
    made = make_link(url, data)
    made.sessions["a-token"] = joborch.Session(link_key("a-token"), NONCE)
    return made


@pytest.fixture
def job(data: DataFolder) -> Job:
    """A job with two files, that is payload 7 at its client."""
    store = Store(":memory:", "server", HandClock())
    made = store.add(new_job(service="é s", user_id=-3, cpus=2, memory=100, timeout=1.5), "uploaded")
    store.close()
    folder = data.job(made.uuid)
    (folder / "d").mkdir(parents=True)
    (folder / "run.sh").write_bytes(b"echo\n")
    (folder / "d/in put").write_bytes(b"\0" * 100)
    return changed(made, dest_id="7")


def submit(link: Link, job: Job) -> str:
    """Send the job's two files."""
    return link.submit(job, link.data.job(job.uuid), ["d/in put", "run.sh"], return_inputs=True)[0]


# == Bodies ==

ALL_NAMES = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=9), min_size=1, max_size=3
)


@BOUNDED
@given(
    st.dictionaries(
        NAMES | st.sampled_from(['quo"te', "%22", "back\\", 'a\\"b', "é/ö", "x" * 255, joborch.DIGESTS_FIELD]),
        CONTENTS,
        min_size=1,
        max_size=5,
    ),
    st.lists(st.integers(1, 300), max_size=5),
    st.booleans(),
)
@example({"a/" * 16 + "é" * 100: b""}, [1], True)
def test_a_body_is_as_long_as_it_says_and_is_read_back(files: dict[str, bytes], sizes: list[int], with_digests: bool) -> None:
    """Whatever the pieces in which it is read and in which it arrives."""
    assume(fit(list(files)))
    with new_folder() as folder:
        for name, content in files.items():
            (folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "out" / name).write_bytes(content)
        (folder / "in").mkdir()
        body = FilesBody(folder / "out", list(files), with_digests)
        assert body, "requests sends nothing for a body that is false"
        content = b"".join(iter(lambda: body.read(sizes[0] if sizes else -1), b""))
        assert len(content) == len(body)
        kind = f"multipart/form-data; boundary={body.boundary}"
        form = FormReader(folder / "in", by_name=True).read(Trickle(content, sizes), kind, len(content))
        assert on_disk(folder / "in") == files
        digests = {file.path: file.sha256 for file in form.files}
        assert digests == {name: hashlib.sha256(text).hexdigest() for name, text in files.items()}
        if with_digests:
            assert json.loads(form.fields.pop(joborch.DIGESTS_FIELD)) == digests
        assert form.fields == {}


def test_a_body_is_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as big:
        big.truncate(1 << 40)
    body = FilesBody(tmp_path, ["big"], with_digests=True)
    assert len(body) > 1 << 40
    assert [len(body.read(1 << 16)) for _ in range(3)] == [1 << 16] * 3
    assert len(body.read()) <= 2 * joborch.CHUNK_BYTES


def test_a_file_that_grows_while_it_is_sent_is_sent_as_it_was(tmp_path: Path) -> None:
    """The length was told before."""
    (tmp_path / "file").write_bytes(b"12345")
    body = FilesBody(tmp_path, ["file"], with_digests=True)
    with (tmp_path / "file").open("ab") as more:
        more.write(b"6789")
    content = b"".join(iter(body.read, b""))
    assert len(content) == len(body)
    assert b"12345\r\n" in content


# == Submitting ==


def test_submit_sends_all_that_the_client_needs(link: Link, peer: Peer, job: Job, tmp_path: Path) -> None:
    peer.says["/submit"] = [reply(200, {"id": 12, "input": {}})]
    assert submit(link, job) == "12"
    (asked,) = peer.asked
    form = FormReader(tmp_path, by_name=True).read(io.BytesIO(asked.body), asked.headers["Content-Type"], len(asked.body))
    assert {file.path: file.size for file in form.files} == {"run.sh": 5, "d/in put": 100}
    said = {name: value for name, value in asked.headers.items() if name.startswith("X-Joborch-")}
    assert said == {
        "X-Joborch-Job": str(job.id), "X-Joborch-Uuid": job.uuid, "X-Joborch-Attempt": "1", "X-Joborch-Service": "%C3%A9%20s",
        "X-Joborch-User": "-3", "X-Joborch-Cpus": "2", "X-Joborch-Memory": "100", "X-Joborch-Timeout": "1.5", "X-Joborch-Digests": "1",
    }  # fmt: skip
    assert asked.headers["Authorization"].startswith("Joborch nonce=")
    assert "a-token" not in str(asked)
    assert "chunked" not in asked.headers.get("Transfer-Encoding", "")


def test_a_22_client_gets_what_it_understands(link: Link, peer: Peer, job: Job) -> None:
    """No digests, which it would take for a file; a new connection for each call."""
    link.services = [a_service(token="a-token", peer="2.2")]
    link.protocol = joborch.load_plugin("compat22").Protocol22(link)
    peer.says["/submit"] = [reply(200, {"id": 1})]
    submit(link, job)
    assert joborch.DIGESTS_FIELD.encode() not in peer.asked[0].body
    assert peer.asked[0].headers["Connection"] == "close"


def test_a_client_is_replaced_by_another_program(link: Link, peer: Peer, job: Job) -> None:
    """First a 2.2 client answers, which has no /hello; then joborch, which asks for a proof. Each is called by its own protocol."""
    link.services = [a_service(peer="2.2")]
    peer.says["/hello"] = [reply(404)]
    with pytest.raises(Gone):
        link.events(0, ())
    assert not link.protocol.can_prove
    peer.says["/submit"] = [reply(200, {"id": 1})]
    assert submit(link, job) == "1"
    assert [asked.path for asked in peer.asked] == ["/hello", "/submit"]
    peer.says["/submit"] = [reply(401, X_Joborch="0.2.0")]
    with pytest.raises(NothingSent):
        submit(link, job)
    with pytest.raises(NothingSent, match="another program answered in its place"):
        submit(link, job)
    assert link.protocol.can_prove, "it does not become a 2.2 client again by an answer without the header"
    assert [asked.path for asked in peer.asked[2:]] == ["/submit", "/hello"]


ACCEPTED = reply(200, {"id": 123, "input": {"run.sh": [1, 2, 3]}, "status": "Prepared"})


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (ACCEPTED, "123"),
        (reply(201, {"id": 123}), "123"),
        (reply(200, b' {\n "id" : 123 }'), "123"),
        (reply(200, {"status": "Prepared", "id": 123}), "123"),
        (reply(200, b"<html>"), NoAnswer),
        (reply(200, {}), NoAnswer),
        (reply(200, {"id": None}), NoAnswer),
        (reply(200, {"id": "x"}), NoAnswer),
        (reply(200, b"[" * 100_000), NoAnswer),
        (reply(500), NoAnswer),
        (reply(502, b"<html>bad gateway"), NoAnswer),
        (reply(302, b"", Location="http://127.0.0.1:1/"), NoAnswer),
        *[(reply(status), Rejected) for status in (400, 409, 413, 415, 422)],
        *[(reply(status), joborch.Refused) for status in (404, 405, 429, 503, 507)],
        *[(reply(status), joborch.WrongToken) for status in (401, 403)],
        (b"", NoAnswer),
        (b"rubbish\r\n\r\n", NoAnswer),
        (b"HTTP/1.1 200", NoAnswer),
        (ACCEPTED[:60], NoAnswer),
        (ACCEPTED[: ACCEPTED.index(b"123") + 1], NoAnswer),
        (ACCEPTED[: ACCEPTED.index(b"123") + 3], NoAnswer),
    ],
)
def test_what_an_answer_to_submit_means(said: bytes, wanted: Any, link: Link, peer: Peer, job: Job) -> None:
    """An id; or: it has it not, it never will, nobody knows. A redirection is not followed with the files."""
    peer.says["/submit"] = [said]
    got = tried_to_submit(link, job)
    assert got == wanted if isinstance(wanted, str) else type(got) is wanted, got


def tried_to_submit(link: Link, job: Job) -> str | joborch.JoborchError:
    """The payload's id, or what the sender makes of the failure: an error of the line counts as no answer."""
    try:
        return submit(link, job)
    except OSError as error:
        return NoAnswer(str(error))
    except joborch.JoborchError as error:
        return error


CHUNKED = (
    b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n9\r\n{"id": 12\r\n3\r\n3, \r\nb\r\n"input": 1}\r\n0\r\n\r\n'
)


@pytest.mark.parametrize("cut", [None, CHUNKED.index(b"\r\n3\r\n"), CHUNKED.index(b"3, \r\n")])
def test_an_id_that_comes_in_two_pieces(cut: int | None, link: Link, peer: Peer, job: Job) -> None:
    """Half an id is that of another payload."""
    peer.says["/submit"] = [CHUNKED[:cut]]
    got = tried_to_submit(link, job)
    assert got == "123" if cut is None else type(got) is NoAnswer, got


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (b"", "it hung up without an answer"),
        (b"HTTP/1.1 200 OK", "it ended too early"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json", "it ended too early"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n", "it ended too early"),
        (b"rubbish\r\n\r\n", "the answer is not HTTP (BadStatusLine)"),
        (b"HTTP/1.1 20 OK\r\n\r\n", "the answer is not HTTP (BadStatusLine)"),
        (b"HTTP/2 200 OK\r\n\r\n", "the answer is not HTTP (UnknownProtocol)"),
        (b"HTTP/1.1 200 OK\r\n" + 101 * b"X-A: b\r\n" + b"\r\n", "the answer is not HTTP (HTTPException)"),
        (b"HTTP/1.1 200 OK\r\nX-A: " + 80_000 * b"a" + b"\r\n\r\n", ""),  # the head, or its line, is too long
        (5000 * b"HTTP/1.1 100 Continue\r\n\r\n", "its answer has endless headers or frames"),
    ],
    ids=[
        "nothing",
        "a cut status",
        "a cut header",
        "no end",
        "rubbish",
        "short status",
        "HTTP/2",
        "many headers",
        "long header",
        "endless continue",
    ],
)
def test_an_answer_with_a_damaged_head_is_none(head: bytes, why: str, link: Link, peer: Peer, job: Job) -> None:
    """The client may have received the request all the same."""
    peer.says["/submit"] = [head]
    with pytest.raises(NoAnswer) as caught:
        submit(link, job)
    assert why in str(caught.value)


def test_a_head_that_is_written_in_another_way(link: Link, peer: Peer, job: Job) -> None:
    """A gateway may change the case of names and the space around values, and send an empty reason phrase."""
    body = b'{"id": 12}'
    peer.says["/submit"] = [b"HTTP/1.1 200 \r\ncontent-LENGTH:   %d \r\nX-Empty:\r\n\r\n" % len(body) + body + b"more than that"]
    assert submit(link, job) == "12"


def test_of_an_endless_echo_only_the_beginning_is_read(link: Link, peer: Peer, job: Job) -> None:
    """A 2.2 client echoes every byte of the input as a number."""
    peer.says["/submit"] = [b'HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{"id": 123, "input": {"run.sh": [' + b"1, " * 100_000]
    assert submit(link, job) == "123"


@BOUNDED
@given(st.integers(0, 10**12), st.sampled_from([", ", "}", " }", "\n,"]), st.integers(0, 40))
def test_an_id_is_read_whole_or_not_at_all(number: int, after: str, cut: int) -> None:
    text = f'{{"id": {number}{after}'.encode()
    got = tried(lambda: joborch.read_submit_answer(200, text[:cut]), NoAnswer)
    assert isinstance(got, NoAnswer) or got == str(number), (text[:cut], got)
    if cut >= len(text):
        assert got == str(number)


def test_a_client_that_is_not_there_has_nothing(peer: Peer, job: Job, data: DataFolder) -> None:
    for url in (f"http://127.0.0.1:{free_port()}", "http://no-such-host.invalid:9000"):
        with pytest.raises(NothingSent, match=r"cannot be reached: (connection refused|its name is not known)"):
            submit(make_link(url, data), job)


def test_a_client_that_hangs_may_have_it(link: Link, peer: Peer, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joborch.Link.call, "__defaults__", (0.2,))
    link.session(None)
    peer.silent.set()
    with pytest.raises(NoAnswer, match="did not answer"):
        submit(link, job)


def test_a_client_that_hangs_up_while_it_is_sent(job: Job, data: DataFolder) -> None:
    """Bytes went out: nobody knows, though most clients will have thrown them away."""
    with (data.job(job.uuid) / "run.sh").open("wb") as big:
        big.truncate(50 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            line, _ = listener.accept()
            line.recv(1000)
            line.close()

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(NoAnswer, match="did not answer"):
            submit(proven_link(f"http://127.0.0.1:{listener.getsockname()[1]}", data), job)


RUBBISH = b"this is no record of TLS, neither at the beginning nor later on " * 2


def answer_with_rubbish(listener: socket.socket, context: ssl.SSLContext) -> None:
    """Take one connection and the beginning of a request under TLS, and answer with rubbish."""
    line, _ = listener.accept()
    with contextlib.suppress(OSError), line, context.wrap_socket(line, server_side=True) as safe:
        safe.recv(100)
        os.write(safe.fileno(), RUBBISH)
        safe.recv(100)


@pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl to make a certificate")
def test_a_line_that_fails_under_tls(job: Job, data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of TLS says nothing about when it came: once bytes of the request went out, nobody knows."""
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(["openssl", "req", *words, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer_with_rubbish, args=(listener, context), daemon=True).start()
        got = tried_to_submit(proven_link(f"https://127.0.0.1:{listener.getsockname()[1]}", data), job)
    assert type(got) is NoAnswer, got


# == Asking, fetching, ending ==

EVENTS = {"instance": "i", "next": 7, "slots": 2, "payloads": []}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (reply(200, EVENTS), joborch.EventsReply("i", 7, 2, [])),
        (reply(404), NothingSent),
        (reply(401), NothingSent),
        (reply(500), NothingSent),
        (reply(503, {"message": "too many callers wait here"}), NothingSent),
        (reply(200, b"<html>"), NothingSent),
        (reply(200, b"\xff"), NothingSent),
        (reply(200, []), NothingSent),
        (reply(200, {**EVENTS, "next": "x"}), NothingSent),
        (reply(200, {**EVENTS, "next": None}), NothingSent),
        (reply(200, b'{"instance": 1, "next": 1e999, "slots": 1, "payloads": []}'), NothingSent),
        (reply(200, {**EVENTS, "payloads": {"a": 1}}), NothingSent),
        (reply(200, {**EVENTS, "payloads": [1]}), NothingSent),
        (reply(200, {**EVENTS, "payloads": None}), NothingSent),
        (reply(200, b"[" * 100_000), NothingSent),
        (reply(200, EVENTS)[:-5], NoAnswer),
        (b"", NoAnswer),
    ],
)
def test_events(said: bytes, wanted: Any, link: Link, peer: Peer) -> None:
    peer.says["/events"] = [said]
    link.since, link.instance = 3, "b"
    got = tried(lambda: link.events(1.5, ["4", "5"]), joborch.JoborchError)
    assert got == wanted if isinstance(wanted, joborch.EventsReply) else type(got) is wanted, got
    assert peer.asked[0].path == "/events?since=3&instance=b&wait=1.5&problems=0&done=4,5"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (reply(200, {"id": 7, "status": "Running"}), {"id": 7, "status": "Running"}),
        (zip_reply(b"PK"), {"status": "Completed"}),
        (reply(404), Gone),
        (reply(500), NoAnswer),
        (reply(200, b"<html>"), NoAnswer),
        (reply(200, 3), NoAnswer),
        (reply(200, {}), NoAnswer),
        (reply(200, {"status": 3}), NoAnswer),
        (reply(200, {"status": "Dancing"}), NoAnswer),
        (reply(200, b"[" * 100_000), NoAnswer),
        (reply(200, {"status": "Running"})[:-3], NoAnswer),
        (b"", NoAnswer),
    ],
)
def test_status(said: bytes, wanted: Any, link: Link, peer: Peer, job: Job) -> None:
    """A state that nobody knows is no state."""
    peer.says["/retrieve/7"] = [said]
    got = tried(lambda: link.status(job), joborch.JoborchError)
    if isinstance(wanted, dict):
        fits = isinstance(got, dict) and all(got.get(name) == value for name, value in wanted.items() if name != "id")
    else:
        fits = isinstance(got, wanted)
    assert fits, got
    assert peer.asked[0].headers["X-Joborch-Mark"] == job.mark


RESULT = b"PK" + bytes(range(256)) * 20


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (zip_reply(RESULT, Repr_Digest=digest_of(RESULT)), None),
        (zip_reply(RESULT, Repr_Digest=f"md5=:AAAA:, {digest_of(RESULT)}"), None),
        (zip_reply(RESULT), None),
        (zip_reply(RESULT, Content_Length=""), NoAnswer),
        (zip_reply(RESULT, Content_Length="", Repr_Digest=digest_of(RESULT)), None),
        (zip_reply(RESULT, Repr_Digest=digest_of(RESULT + b"x")), NoAnswer),
        (zip_reply(RESULT, Repr_Digest="sha-256=:abc:"), NoAnswer),
        (zip_reply(RESULT, Repr_Digest=digest_of(RESULT), Content_Length="")[:-1], NoAnswer),
        (zip_reply(RESULT)[:-1], NoAnswer),
        (zip_reply(RESULT)[:-5000], NoAnswer),
        (zip_reply(RESULT, Content_Length="x"), NoAnswer),
        (reply(200, {"status": "Running"}), NoAnswer),
        (reply(404), Gone),
        (reply(503), NoAnswer),
        (b"", NoAnswer),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_fetch(said: bytes, wanted: Any, partial: bool, link: Link, peer: Peer, job: Job) -> None:
    """What came is what was sent, or it is fetched again."""
    peer.says["/retrieve_partial/7" if partial else "/retrieve/7"] = [said]
    target = io.BytesIO()
    into = Transfer(target)
    got = tried(lambda: link.fetch(job, into, partial), joborch.JoborchError)
    if wanted is None:
        assert (into.size, into.digest.hexdigest()) == (len(RESULT), hashlib.sha256(RESULT).hexdigest())
        assert target.getvalue() == RESULT
    else:
        assert type(got) is wanted, got


def piece(begin: int, content: bytes, tag: str = '"t"', **headers: str) -> bytes:
    """The answer to a Range: `content`, which begins at byte `begin`."""
    span = {"Content_Range": f"bytes {begin}-{begin + len(content) - 1}/{len(RESULT)}", "ETag": tag, "Repr_Digest": digest_of(RESULT)}
    return zip_reply(content, **{**span, **headers}).replace(b"200", b"206", 1)


BROKEN = zip_reply(RESULT, ETag='"t"', Repr_Digest=digest_of(RESULT))[:-5000]
CAME = len(RESULT) - 5000


@pytest.mark.parametrize(
    ("then", "asked"),
    [
        ([piece(CAME, RESULT[CAME:])], [CAME]),
        ([piece(CAME, RESULT[CAME:])[:-100], piece(CAME + 4900, RESULT[-100:])], [CAME, CAME + 4900]),
        ([zip_reply(RESULT, ETag='"u"', Repr_Digest=digest_of(RESULT))], [CAME]),  # it is another file by now
        ([zip_reply(RESULT)], [CAME]),  # it does not know ranges
    ],
)
def test_a_broken_transfer_goes_on_where_it_broke(then: list[bytes], asked: list[int], link: Link, peer: Peer, job: Job) -> None:
    peer.says["/retrieve/7"] = [BROKEN, *then]
    target = io.BytesIO()
    into = Transfer(target)
    link.fetch(job, into)
    assert (target.getvalue(), into.digest.hexdigest()) == (RESULT, hashlib.sha256(RESULT).hexdigest())
    first, *others = [call.headers for call in peer.asked]
    assert "Range" not in first
    assert [(call["Range"], call["If-Range"]) for call in others] == [(f"bytes={begin}-", '"t"') for begin in asked]


@pytest.mark.parametrize(
    ("then", "left"),
    [
        ([b""], CAME),  # nothing more comes now: what came is kept for the next time
        ([reply(503)], CAME),
        ([piece(CAME, b"\0" * 5000)], 0),  # the digest says that it is another
        ([piece(0, RESULT)], 0),  # another part than was asked for
        ([reply(416)], 0),
    ],
)
def test_a_transfer_that_does_not_go_on(then: list[bytes], left: int, link: Link, peer: Peer, job: Job) -> None:
    """The next time it goes on, or begins anew where what came is of no use."""
    peer.says["/retrieve/7"] = [BROKEN, *then, piece(CAME, RESULT[CAME:]) if left else zip_reply(RESULT)]
    target = io.BytesIO()
    into = Transfer(target)
    with pytest.raises(NoAnswer):
        link.fetch(job, into)
    assert into.size == left == len(target.getvalue())
    link.fetch(job, into)
    assert target.getvalue() == RESULT


def test_what_broke_and_has_no_tag_begins_anew(link: Link, peer: Peer, job: Job) -> None:
    """A 2.2 client has no tags: nobody knows whether what it packs next is the same file."""
    peer.says["/retrieve/7"] = [zip_reply(RESULT)[:-5000], zip_reply(RESULT)]
    target = io.BytesIO()
    into = Transfer(target)
    with pytest.raises(NoAnswer):
        link.fetch(job, into)
    link.fetch(job, into)
    assert target.getvalue() == RESULT
    assert ["Range" in call.headers for call in peer.asked] == [False, False]


def test_a_file_that_becomes_shorter_while_it_is_sent(link: Link, peer: Peer, job: Job, data: DataFolder) -> None:
    """The length was told before: the client must not wait for the rest, nor take anything else for it."""
    folder = data.job(job.uuid)
    (folder / "run.sh").write_bytes(b"x" * 100)
    body = FilesBody(folder, ["run.sh"], with_digests=True)
    (folder / "run.sh").write_bytes(b"x" * 99)
    with pytest.raises(OSError, match="became shorter"):
        b"".join(iter(body.read, b""))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_of_ours_is_no_fault_of_the_client(number: int, link: Link, peer: Peer, job: Job) -> None:
    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(number, "full")

    peer.says["/retrieve/7"] = [zip_reply(RESULT)]
    with pytest.raises(OSError, match="full") as caught:
        link.fetch(job, Transfer(Full()))
    assert caught.value.errno == number


@pytest.mark.parametrize(
    ("said", "wanted"),
    [(reply(200), True), (reply(202), False), (reply(404), Gone), (reply(500), NoAnswer), (reply(401), NoAnswer), (b"", NoAnswer)],
)
def test_kill(said: bytes, wanted: Any, link: Link, peer: Peer, job: Job) -> None:
    peer.says["/kill/7"] = [said]
    got = tried(lambda: link.kill(job), joborch.JoborchError)
    assert got is wanted or type(got) is wanted
    assert (peer.asked[0].method, peer.asked[0].headers["X-Joborch-Mark"]) == ("POST", job.mark)


def test_any_answer_to_a_ping_will_do(link: Link, peer: Peer) -> None:
    link.services = [a_service(peer="2.2")]
    link.protocol = joborch.load_plugin("compat22").Protocol22(link)
    link.probe()
    assert link.answers
    peer.says["/"] = [b""]
    assert not link.probe()
    assert [asked.path for asked in peer.asked] == ["/", "/"]


def test_a_wrong_token_is_told_with_its_remedy(link: Link, peer: Peer, job: Job) -> None:
    peer.says["/submit"] = [reply(401, {"message": "the token is wrong"})]
    with pytest.raises(NothingSent, match="SERVICE_<NAME>_TOKEN"):
        submit(link, job)


def test_the_token_is_read_again_each_time(peer: Peer, data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a service's setting, else what a client of this user wrote down: it may start later."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    link = make_link(peer.url, data)
    link.services = [a_service(token=""), a_service("b", token="")]
    assert link.token() == ""
    file = joborch.client_token_file()
    assert file is not None
    file.parent.mkdir(parents=True)
    file.write_text("of-the-client\n")
    assert link.token() == "of-the-client"
    link.services.append(a_service("c", token="of-a-service"))
    assert link.token() == "of-a-service"


# == Health ==


@BOUNDED
@given(st.integers(1, 10**6))
def test_back_off_doubles_to_half_a_minute(failures: int) -> None:
    """1 s at first, 30 s at most, with jitter."""
    plain = min(30.0, 2.0 ** min(failures - 1, 5))
    waits = {joborch.backoff_s(failures) for _ in range(20)}
    assert all(plain / 2 <= wait <= min(30.0, plain * 1.5) for wait in waits), waits
    assert len(waits) > 1, "without jitter all come back at once"


def test_a_link_is_held_back_after_failures_and_free_when_it_is_heard(link: Link) -> None:
    clock = link.clock
    assert isinstance(clock, HandClock)
    assert link.held(), "it was never heard"
    link.heard()
    assert not link.held()
    holds = []
    begun = clock.monotonic()
    for number in range(1, 9):
        for _ in range(5):
            link.failed("no\nanswer")
            assert link.held()
        assert link.outage.failures == number, "all calls that were under way fail at once: that is one failure"
        holds.append(link.outage.until - clock.monotonic())
        clock.pass_s(holds[-1] + 0.001)
        assert not link.held(), "it is tried again"
    assert link.outage.reason == "no answer"
    assert 0.5 <= holds[0] <= 1.5 and 15 <= holds[-1] <= 45
    assert link.silent_s() == clock.monotonic() - begun
    link.heard()
    assert (link.outage.failures, link.outage.reason, link.silent_s(), link.held()) == (0, "", 0, False)


def test_room(link: Link) -> None:
    """What its jobs ask for is taken, and what has ended and is to be fetched is free again."""
    link.slots, link.memory = 4, 1000
    assert (link.capacity(3, 600).free, link.capacity(3, 600).free_memory) == (1, 400)
    end = link.of(1).end = joborch.EndReport(1, {}, 0.0, cpus=2, memory=100)
    assert (link.capacity(3, 600).free, link.capacity(3, 600).free_memory) == (3, 500)
    link.memory = None
    assert link.capacity(3, 600).free_memory is None
    link.job_slots = True
    assert (link.capacity(64, 0, 3).free, link.capacity(64, 0, 3).job_slots) == (2, True), "3 jobs, of which one has ended"
    end.cpus = 0
    assert link.capacity(64, 0, 3).free == 1, "its row has let the slot go"


def test_after_a_failure_it_gets_one_job_until_it_has_taken_one(link: Link) -> None:
    assert link.has_free_sender()
    assert link.hold(1) and link.hold(2)
    assert link.has_free_sender(), "there are three senders"
    link.failed("connection refused")
    link.heard()
    assert not link.has_free_sender(), "it answers again: that it takes jobs is to be seen"
    link.release(1)
    link.release(2)
    assert link.has_free_sender()
    link.took_one()
    assert link.hold(1) and link.hold(2)
    assert link.has_free_sender()
    link.refused("503")
    assert not link.has_free_sender()


def test_a_drained_client_gets_no_jobs(link: Link) -> None:
    link.heard()
    assert link.takes_jobs() and not link.why_not()
    link.drained = True
    assert not link.takes_jobs() and link.why_not().startswith("is drained")


def test_causes_are_said_in_plain_words() -> None:
    """The names of Python's exceptions tell an operator nothing."""
    causes = {
        ConnectionRefusedError(errno.ECONNREFUSED, "x"): "connection refused",
        socket.gaierror(socket.EAI_NONAME, "x"): "its name is not known",
        socket.timeout("timed out"): "timed out",
        ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1)"): "TLS failed: no reason given",
        http.client.IncompleteRead(b"x" * 7, 9): "it ended too early",
        http.client.RemoteDisconnected("Remote end closed"): "it hung up without an answer",
        http.client.BadStatusLine("rubbish"): "the answer is not HTTP (BadStatusLine)",
        ValueError("Went\nround"): "went round",
        ValueError(): "valueError",
    }
    assert {error: joborch.plain_cause(error) for error in causes} == causes


@pytest.mark.parametrize("body", [b"", b"[]", b'"x"', b"\xff", b'{"message": 3}', b'{"message": "a\\nb"}', b"[" * 100_000])
def test_refusals_are_one_sentence(body: bytes) -> None:
    assert joborch.refused_text(500, body).isprintable()
    assert joborch.refused_text(500, body).startswith("answered 500")


# == Connections that a gateway closes without saying so ==


class Forgetful(Peer):
    """Keeps each connection open after an answer, and closes it at the moment when the next request comes, as some gateways do."""

    def __init__(self) -> None:
        super().__init__()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.second: list[bytes] = []  # the first line of each request that was the second one on its connection
        threading.Thread(target=serve_each, args=(self.listener, self.serve), daemon=True).start()

    def serve(self, line: socket.socket) -> None:
        with contextlib.closing(line):
            head, body, rest = read_message(line, b"")
            method, path, _ = head[0].decode().split()
            headers = dict(each.decode().split(": ", 1) for each in head[1:])
            said = self.answer_to(Asked(method, path, headers, body))
            line.sendall(said.replace(b"Connection: close", b"Connection: keep-alive"))
            self.second.append(read_message(line, rest)[0][0])


def test_a_get_goes_on_where_a_kept_connection_was_just_closed(data: DataFolder, job: Job) -> None:
    """Nothing is wrong with the client. What is not certain to be harmless twice is not repeated."""
    peer = Forgetful()
    with contextlib.closing(peer), contextlib.closing(peer.listener):
        peer.says = {"/retrieve": [reply(200, {"id": 7, "status": "Running"})], "/kill": [reply(200, {})]}
        link = make_link(peer.url, data)
        for _ in range(5):
            assert link.status(job)["status"] == "Running"
        assert b"GET /retrieve/7 HTTP/1.1" in peer.second
        assert isinstance(tried(lambda: link.kill(job), NoAnswer), NoAnswer)
