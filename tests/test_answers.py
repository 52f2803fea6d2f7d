"""What a client says has bounds: bytes, objects, time and numbers; and callers of a client that hangs hold nobody up.

A malicious client is a `Liar`: it speaks the protocol, and lies byte by byte. It has no token, as nobody here has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import secrets
import signal
import socket
import socketserver
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Union
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import MakeProcess
from harness import Process, wait_for
from hypothesis import example, given, settings
from hypothesis import strategies as st
from world import BOUNDED, Desk, Yard, ask, changed, make_link, new_folder, new_job, tried

import joborch
from joborch import BadAnswer, DataFolder, EventsReply, Job, JoborchError, Link, NoAnswer, NothingSent, Status
from joborch_base import statements
from joborch_base.states import SERVER_MOVES

MIB = 1 << 20
MOST_MB = 150  # of memory, whatever a client answers
SOON_S = 8.0  # others get answers within a second; machines are slow now and then

# == A client that lies ==

Said = Union[bytes, Iterable[bytes]]


@dataclasses.dataclass
class Call:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


def head(status: str = "200 OK", **headers: Any) -> bytes:
    """Status line and headers of an answer; headers are named with underscores."""
    said = {"X-Joborch": "0.2.0", "Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return "\r\n".join([f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in said.items()), "", ""]).encode()


def whole(body: Any, status: str = "200 OK", **headers: Any) -> bytes:
    """A whole answer: JSON unless the body is bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(status, Content_Length=len(content), **headers) + content


class Liar:
    """A client on loopback, for a server of the same user; no token is set anywhere, so nothing is signed.

    It takes jobs and says that they run. `says` maps the beginning of a path to what is said instead, made anew for each call:
    bytes, or pieces of them that are sent one by one until the server hangs up.
    """

    def __init__(self, slots: int = 2) -> None:
        self.slots, self.instance = slots, secrets.token_hex(4)
        self.says: dict[str, Callable[[Call], Said]] = {}
        self.asked: list[Call] = []
        self.hung_up: list[str] = []  # paths whose answers the server did not take in to the end
        self.payloads: list[dict[str, Any]] = []
        self.closing = threading.Event()
        self.http = socketserver.ThreadingTCPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"liar": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """End it."""
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, call: Call) -> Said:
        """What is said to a call."""
        self.asked.append(call)
        for path, say in self.says.items():
            if call.path.startswith(path):
                return say(call)
        return self.honest(call)

    def honest(self, call: Call) -> bytes:
        """What a real client says, as far as these tests need one."""
        if call.path == "/hello":
            return whole({"version": "0.2.0", "nonce": secrets.token_hex(16)})
        if call.path == "/submit":
            self.payloads.append({
                "id": len(self.payloads) + 1, "uuid": call.headers["x-joborch-uuid"], "attempt": int(call.headers["x-joborch-attempt"]),
                "status": "Running", "reason": "", "cause": None, "started_at": time.time(),
            })  # fmt: skip
            return whole({"id": len(self.payloads), "input": {}, "status": "Prepared", "loc": "/", "pid": 0, "killed": False})
        if call.path == "/events":
            return self.events(call)
        return whole({"message": "no"}, "404 Not Found")

    def events(self, call: Call, **changes: Any) -> bytes:
        """The answer to /events: it waits for a new payload."""
        known = int(call.query["since"]) - 1
        end = time.monotonic() + float(call.query["wait"])
        while 0 <= known >= len(self.payloads) and time.monotonic() < end and not self.closing.wait(0.02):
            pass
        said = {"instance": self.instance, "next": len(self.payloads) + 1, "more": False, "load": 1.0, "slots": self.slots}
        return whole({**said, "memory": None, "payloads": self.payloads[max(0, known) :], **changes})


class _Handler(socketserver.StreamRequestHandler):
    """Reads requests and sends what the liar says."""

    liar: Liar

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while self.one():
                pass

    def one(self) -> bool:
        words = self.rfile.readline().decode("latin-1").split()
        if len(words) != 3:
            return False
        lines = iter(lambda: self.rfile.readline().decode("latin-1").strip(), "")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.rfile.read(int(headers.get("content-length", 0)))
        parts = urlsplit(words[1])
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        said = self.liar.answer(Call(words[0], parts.path, query, headers))
        if isinstance(said, bytes):
            self.wfile.write(said)
            return True
        try:
            for piece in said:
                if self.liar.closing.is_set():
                    return False
                self.wfile.write(piece)
        except OSError:
            self.liar.hung_up.append(parts.path)
        return False


@pytest.fixture(name="liar")
def liar_fixture() -> Iterator[Liar]:
    """A liar, closed with the test."""
    made = Liar()
    yield made
    made.close()


@pytest.fixture(name="liar_link")
def liar_link_fixture(liar: Liar, data: DataFolder) -> Link:
    """A link to it."""
    return link_to(liar, data)


def link_to(liar: Liar, data: DataFolder) -> Link:
    """A link without a token to a liar."""
    made = make_link(liar.url, data)
    made.services[:] = [dataclasses.replace(made.services[0], token="")]
    return made


@pytest.fixture(name="job")
def job_fixture(data: DataFolder) -> Job:
    """A job with one file, that is payload 7 at its client."""
    store = joborch.Store(":memory:", "server")
    made = store.add(new_job(), "uploaded")
    store.close()
    data.job(made.uuid).mkdir(parents=True)
    (data.job(made.uuid) / "run.sh").write_bytes(b"echo\n")
    return changed(made, dest_id="7")


# == What it may try ==

ENVELOPE = b'{"instance":"evil","next":1,"slots":1,"payloads":[%s]}'


def packed(kind: str) -> bytes:
    """64 MiB of JSON as some KB."""
    unit, count = b",{}" * 2**18, 80
    packer = zlib.compressobj(9, zlib.DEFLATED, {"gzip": 31, "deflate": 15}[kind])
    text = packer.compress(b'{"instance":"evil","next":1,"slots":1,"payloads":[{}')
    text += b"".join(packer.compress(unit) for _ in range(count)) + packer.compress(b"]}") + packer.flush()
    return head(Content_Encoding=kind, Content_Length=len(text)) + text


def filled(unit: bytes, size: int = 4 * MIB) -> bytes:
    """An answer of `size` bytes, full of one value."""
    return whole(ENVELOPE % (unit[:-1] + unit[-1:].join([b"", *[unit[:-1]] * (size // len(unit) - 1)])))


def endless(piece: bytes, begin: bytes = b"", pause_s: float = 0.0) -> Callable[[Call], Iterator[bytes]]:
    """Something that never ends."""

    def said(_: Call) -> Iterator[bytes]:
        yield begin
        for one in itertools.repeat(piece):
            time.sleep(pause_s)
            yield one

    return said


def once(said: bytes) -> Callable[[Call], bytes]:
    """The same for every call."""
    return lambda _: said


CHUNKED = head(Transfer_Encoding="chunked")
PAYLOAD = {"id": 7, "uuid": "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0", "attempt": 1, "status": "Completed", "reason": ""}
ATTACKS: dict[str, Callable[[], Callable[[Call], Said]]] = {
    "gzip": lambda: once(packed("gzip")),
    "deflate": lambda: once(packed("deflate")),
    "empty objects": lambda: once(filled(b"{},")),
    "objects of one": lambda: once(filled(b'{"":0},')),
    "lists": lambda: once(filled(b"[],")),
    "numbers": lambda: once(filled(b"1.5,")),
    "texts": lambda: once(filled(b'"ab",')),
    "nested": lambda: once(filled(b"[" * 900 + b"]" * 900 + b",")),
    "one long number": lambda: once(filled(b"1" * (4 * MIB - 1000) + b",")),
    "a long text with one wide character": lambda: once(filled(b'{"status":"\\ud83d\\ude00' + b"a" * (4 * MIB - 2000) + b'"},')),
    "long texts in a thousand payloads": lambda: once(whole({
        "instance": "evil", "next": 5, "slots": 1, "payloads": [{**PAYLOAD, "reason": "," * 3500, "archive": "A" * 500}] * 1000,
    })),
    "a hundred MiB": lambda: endless(b"{}," * 2**14, head(Content_Length=100 * MIB) + ENVELOPE[:-3]),
    "an endless body": lambda: endless(b"{}," * 2**14, head(Connection="close") + ENVELOPE[:-3]),
    "an endless body in small chunks": lambda: endless(b"2\r\n{}\r\n1\r\n,\r\n" * 2**10, CHUNKED),
    "long chunk extensions": lambda: endless(b"1;" + b"x" * 60_000 + b"\r\n,\r\n", CHUNKED),
    "an endless trailer": lambda: endless(b"X: y\r\n" * 2**10, CHUNKED + b"0\r\n"),
    "endless headers": lambda: endless(b"X-A: " + b"a" * 1000 + b"\r\n", b"HTTP/1.1 200 OK\r\n"),
    "an endless header": lambda: endless(b"a" * 2**16, b"HTTP/1.1 200 OK\r\nX: "),
    "ninety long headers": lambda: once(b"HTTP/1.1 200 OK\r\n" + (b"X: " + b"a" * 65_000 + b"\r\n") * 90 + b"\r\n"),
    "a long status line": lambda: endless(b"a" * 2**16, b"HTTP/1.1 200 "),
    "100 Continue for ever": lambda: endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "redirects": lambda: once(head("302 Found", Location="/events?since=0&wait=0&instance=&done=", Content_Length=0)),
    "a long error": lambda: once(filled(b"{},").replace(b"200 OK", b"503 No", 1)),
    "no HTTP": lambda: endless(os.urandom(MIB)),
}  # fmt: skip
# What is read: little is kept of it.
HARMLESS = {"long texts in a thousand payloads": 1000, "a long text with one wide character": 0}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_beyond_all_bounds_is_given_up_soon(name: str, liar: Liar, liar_link: Link) -> None:
    liar.says["/events"] = ATTACKS[name]()
    begun = time.monotonic()
    got = tried(lambda: liar_link.events(0, []), JoborchError)
    if name in HARMLESS:
        assert isinstance(got, EventsReply), got
        assert max(len(payload.get("reason", "")) for payload in got.payloads) == HARMLESS[name]
    else:
        assert isinstance(got, (NoAnswer, NothingSent)), got
    assert time.monotonic() - begun < 30, "though it would go on for ever"


def test_an_encoded_answer_is_refused_with_a_sentence(liar: Liar, liar_link: Link) -> None:
    """And none is asked for; `identity` is no encoding."""
    liar.says["/events"] = once(packed("gzip"))
    with pytest.raises(BadAnswer, match=r"Content-Encoding 'gzip': switch off compression in the proxy before it"):
        liar_link.events(0, [])
    assert liar.asked[-1].headers["accept-encoding"] == "identity"
    del liar.says["/events"]
    liar.says["/events"] = lambda call: liar.events(call).replace(b"Content-Type", b"Content-Encoding: identity\r\nContent-Type", 1)
    assert liar_link.events(0, []).instance == liar.instance


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "br", "identity, gzip", "x"])
def test_nothing_of_a_client_is_unpacked(coding: str, liar: Liar, liar_link: Link, job: Job) -> None:
    """Neither results nor output nor the answer to a submit."""
    content = whole(gzip.compress(b"PK" * 1000), Content_Encoding=coding).replace(b"application/json", b"application/zip")
    liar.says.update(dict.fromkeys(("/retrieve", "/logs", "/kill", "/submit"), once(content)))
    target = joborch.Transfer(contextlib.nullcontext())  # type: ignore[arg-type]
    folder = liar_link.data.job(job.uuid)
    for call in (
        lambda: liar_link.fetch(job, target),
        lambda: liar_link.logs(job, "stdout", 0),
        lambda: liar_link.status(job),
        lambda: liar_link.kill(job),
        lambda: liar_link.submit(job, folder, ["run.sh"], True)[0],
    ):
        with pytest.raises(BadAnswer):
            call()


@pytest.mark.parametrize(
    "said",
    [
        endless(b"", pause_s=0.02),
        endless(b"H", pause_s=0.02),
        endless(b"X: y\r\n", b"HTTP/1.1 200 OK\r\n", 0.05),
        endless(b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.05),
        endless(b"x", head(Content_Length=1000), 0.05),
        endless(b"1\r\nx\r\n", CHUNKED, 0.05),
        endless(b"X: y\r\n", CHUNKED + b"0\r\n", 0.05),
    ],
)
def test_an_answer_that_never_ends_costs_a_bounded_time(said: Callable[[Call], Said], liar: Liar, liar_link: Link) -> None:
    """Each byte comes before the read time-out, and there is always another one."""
    liar.says["/x"] = said
    begun = time.monotonic()
    with pytest.raises(NoAnswer, match=r"timed out|takes too long"):
        joborch.read_some(liar_link.call("GET", f"{liar.url}/x", 0.5), 10_000)
    assert time.monotonic() - begun < 15


def test_what_nobody_waits_for_is_given_up(liar: Liar, liar_link: Link) -> None:
    """Before the first byte as well as after it; long before the read time-out."""
    for said in (endless(b"", pause_s=0.02), endless(b"x", head(Content_Length=10_000), 0.05)):
        liar.says["/x"] = said
        begun = time.monotonic()
        with pytest.raises(NoAnswer, match="no caller waits"):
            joborch.read_some(liar_link.call("GET", f"{liar.url}/x", 60, unwanted=lambda: True), 10_000)
        assert time.monotonic() - begun < 15


def test_a_connection_is_used_again_with_its_own_time(liar: Liar, liar_link: Link) -> None:
    """What one call would bear is not what the next one does."""
    for patience_s in (5.0, 0.3, 5.0):
        assert liar_link.call("GET", f"{liar.url}/hello", patience_s).status == 200
        liar_link.events(0, [])
    assert len({call.path for call in liar.asked}) == 2


# == Numbers and types ==

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([10**30, -1, 2**63, 10**400, "\ud800", "Completed", "Running", "\0", "9" * 5000, [], {}, ["x"], {"a": {"b": []}}]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
PAYLOAD_FIELDS = (
    "ended_as",
    "ended_reason",
    "id",
    "uuid",
    "attempt",
    "status",
    "reason",
    "cause",
    "exit_code",
    "signal",
    "started_at",
    "ended_at",
    "peak_memory",
    "cpu_time",
    "archive",
    "sha256",
)
STATUSES = [status.value for status in Status]


def said_payload(uuids: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """A payload in which any field may be anything."""
    usual: dict[str, st.SearchStrategy[Any]] = {
        "id": st.integers(1, 20), "uuid": st.sampled_from(uuids), "attempt": st.integers(1, 2), "status": st.sampled_from(STATUSES),
        "reason": st.text(max_size=20), "cause": st.sampled_from([None, "user", "infrastructure", "limit"]),
    }  # fmt: skip
    fields = {name: usual.get(name, st.none()) | JSON for name in PAYLOAD_FIELDS}
    return st.fixed_dictionaries({}, optional=fields)


def said_events(uuids: list[str]) -> st.SearchStrategy[Any]:
    """An answer to /events in which any field may be anything."""
    usual: dict[str, st.SearchStrategy[Any]] = {
        "instance": st.just("i"), "next": st.integers(0, 100), "slots": st.integers(0, 5), "memory": st.none() | st.integers(0, 10**6),
        "load": st.floats(0, 100), "job_slots": st.booleans(), "more": st.booleans(),
        "payloads": st.lists(said_payload(uuids) | JSON, max_size=4),
    }  # fmt: skip
    known = st.fixed_dictionaries({name: value | value | value | JSON for name, value in usual.items()})
    return known | JSON


def numbers_of(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from numbers_of(inner)
    elif isinstance(value, (int, float)):
        yield value


def refuse(name: str) -> Any:
    """JSON has no NaN and no Infinity."""
    raise AssertionError(f"{name} in an answer of the server")


UUIDS = ["8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0", "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f1"]


@BOUNDED
@given(said_events(UUIDS), st.booleans())
@example({"instance": "i", "next": 1, "slots": 1, "payloads": [{"status": ["x"]}]}, True)
@example({"instance": "i", "next": 1, "slots": 1, "payloads": [], "load": float("nan")}, True)
@example({"instance": "i", "next": True, "slots": 1, "payloads": []}, True)
@example({"instance": "i", "next": 1, "slots": 10**400, "payloads": []}, True)
def test_events_are_read_or_refused(said: Any, escaped: bool) -> None:
    """Whatever comes: ours in the right types and ranges, or one of the errors that get_tick knows."""
    with contextlib.suppress(UnicodeEncodeError):
        text = json.dumps(said, ensure_ascii=escaped).encode()
        got = tried(lambda: joborch.read_events(text), Exception)  # type: ignore[type-var]
        if not isinstance(got, EventsReply):
            assert isinstance(got, (ValueError, KeyError, TypeError)), got
            return
        values = [got.next, got.slots, got.memory or 0, got.load]
        assert all(type(value) in (int, float) and math.isfinite(value) and 0 <= value < 2**63 for value in values), got
        for payload in got.payloads:
            assert_clean(payload)
            assert "rubbish" in payload or joborch.clean_payload(payload) == payload, "read once more, it is the same"


def assert_clean(payload: dict[str, Any]) -> None:
    """Each field of a payload has its type and a bound."""
    if "rubbish" in payload:
        assert set(payload) == {"rubbish"}
        assert len(payload["rubbish"]) < 1000
        return
    assert payload["status"] in STATUSES
    kinds = {"started_at": (int, float), "ended_at": (int, float), "exit_code": int, "signal": int, "attempt": int}
    kinds.update(peak_memory=int, cpu_time=(int, float))
    for name, value in payload.items():
        assert name in PAYLOAD_FIELDS
        if value is not None:
            assert isinstance(value, kinds.get(name, str)), (name, value)  # type: ignore[arg-type]
            assert not isinstance(value, bool)
            assert isinstance(value, str) or -(2**31) <= value < (2**60 + 1 if name == "peak_memory" else 1e11)
            assert not isinstance(value, str) or value.isprintable()


@BOUNDED
@given(said_payload(UUIDS) | JSON)
@example({"status": ["x"]})
@example({"status": {}})
@example({"status": "Cleaned", "ended_as": ["Failed"], "ended_reason": 7})
@example({"status": "Completed", "exit_code": 10**30, "signal": True, "started_at": float("inf"), "id": True, "uuid": "\ud800"})
def test_a_payload_is_read_or_refused(said: Any) -> None:
    got = joborch.clean_payload(said)
    if got is not None:
        assert_clean(got)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1" * 5000, "[" * 100_000])
def test_json_of_a_peer_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        joborch.parse_json(text)


@BOUNDED
@given(st.integers(0, 3), st.text(st.sampled_from('a,[{\\"é'), max_size=200), st.integers(1, 40))
def test_values_are_counted_outside_texts(extra: int, text: str, count: int) -> None:
    """A script's last words may be made of commas: its client is believed all the same."""
    said = json.dumps([{"reason": text * 20, "n": 0}] * count, separators=(",", ":")).encode()
    values = 2 * count + count + 1 - 1  # commas and brackets
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joborch, "ANSWER_VALUES", values + extra)
        assert not joborch.has_many_values(said)
        patch.setattr(joborch, "ANSWER_VALUES", values - 1 - extra)
        assert joborch.has_many_values(said)


def test_a_run_is_no_longer_than_its_job_is_here(data: DataFolder, liar: Liar) -> None:
    """Its user is charged for it: a client must not take his turns for years."""
    desk = Desk(data, liar.url, SERVICE_EXAMPLE_TOKEN="")
    job = desk.with_client(Status.RUNNING)
    desk.clock.pass_s(100)
    run = joborch.run_of(desk.server, desk[job], {"started_at": 5.0, "ended_at": 5e10})
    assert run == {"run_s": 100 + joborch.CLOCK_TOLERANCE_S}
    assert joborch.run_of(desk.server, desk[job], {"started_at": 50.0, "ended_at": 5.0}) == {"run_s": 0.0}
    desk.store.close()


# == A server among liars ==


def memory_mb(process: Process) -> int:
    """The most memory that a process ever had (VmHWM)."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) // 1024


class World:
    """A server with a client that is true, and others that lie; nobody has a token."""

    def __init__(self, make_process: MakeProcess, liars: list[Liar], **changes: str) -> None:
        self.client = make_process("client", {"JOBORCH_ALLOW_ANONYMOUS": "1", "JOBORCH_SLOTS": "4"})
        self.liars, self.slowest_s = liars, 0.0
        services = {"SERVICE_TRUE_CLIENTS": self.client.url, "SERVICE_EXAMPLE_CLIENTS": ",".join(liar.url for liar in liars)}
        self.server = make_process("server", {**services, **changes})
        self.client.start()
        self.server.start()

    def upload(self, service: str = "example", script: str = "echo hi", user: int = 1) -> int:
        """Upload a job; its id."""
        files = {"file": ("run.sh", script)}
        said = self.server.post("/upload", data={"user_id": user, "service": service}, files=files)
        assert said.status_code == 201, said.text
        return int(said.json()["id"])

    def running(self) -> int:
        """A job that runs at a liar, as it says."""
        job = self.upload()
        wait_for(lambda: self.server.job(job)["status"] == "Running", what="the job to run")
        return job

    def troubles(self) -> dict[str, str]:
        """Why each client gets no jobs now, by name."""
        return {client["name"]: client["trouble"] for client in self.server.get("/clients").json()["clients"]}

    def others_go_on(self) -> None:
        """Another user's job comes through, and /health answers, soon."""
        begun = time.monotonic()
        job = self.upload("true", user=2)
        while self.server.job(job)["status"] != "Completed":
            self.healthy()
            assert time.monotonic() - begun < 6 * SOON_S, self.server.job(job)
        assert self.server.get(f"/download/{job}").status_code == 200

    def healthy(self) -> None:
        """/health, /clients, /services and /jobs answer soon, in JSON without NaN."""
        for path in ("/health", "/clients", "/services", "/jobs"):
            begun = time.monotonic()
            said = self.server.get(path, timeout=SOON_S)
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
            assert said.status_code == 200, said.text
            assert all(map(math.isfinite, numbers_of(json.loads(said.text, parse_constant=refuse))))


def test_no_answer_of_a_client_eats_the_server(make_process: MakeProcess) -> None:
    """All that it may try, from as many clients at once, again and again."""
    names = [*ATTACKS, "empty objects", "objects of one", "a long text with one wide character", "gzip"]
    liars = [Liar() for _ in names]
    for name, liar in zip(names, liars):
        liar.says["/events"] = ATTACKS[name]()
    with contextlib.ExitStack() as stack:
        for liar in liars:
            stack.callback(liar.close)
        world = World(make_process, liars)

        def asked_again() -> bool:
            world.others_go_on()
            return all(len([call for call in liar.asked if call.path == "/events"]) >= 3 for liar in liars)

        wait_for(asked_again, 100, "each liar to be asked three times")
        assert memory_mb(world.server) < MOST_MB
        print(f"memory {memory_mb(world.server)} MB, slowest look {world.slowest_s:.2f} s, log {len(world.server.log)} bytes")
        assert len(world.server.log) < 200_000
        assert "Traceback" not in world.server.log


def test_a_client_that_has_jobs_eats_nothing_either(make_process: MakeProcess, liar: Liar) -> None:
    """Each time it says that they ended, or run again, with the largest results that come along, and of attempts that never were."""
    liar.slots = 40
    world = World(make_process, [liar], SERVICE_EXAMPLE_RUNS_PER_USER="50", SERVICE_EXAMPLE_MAX_RUNS="50")
    for _ in range(20):
        world.upload()
    wait_for(lambda: len(liar.payloads) == 20, what="the jobs to come")
    turn = itertools.count(1)

    def lie(call: Call) -> bytes:
        number = next(turn)
        real = [
            {**one, "status": ("Completed", "Running", "Failed", "Prepared")[number % 4], "reason": "x" * 3000, "archive": "A" * 150_000}
            for one in liar.payloads
        ]
        late = [{**liar.payloads[0], "attempt": 1, "id": number * 1000 + other, "status": "Completed"} for other in range(400)]
        never = [{**liar.payloads[0], "attempt": -other, "id": 10**17 + other, "status": "Running"} for other in range(400)]
        return liar.events(Call("GET", "/events", {"since": "0", "wait": "0"}, {}), next=number, payloads=[*real, *late, *never])

    liar.says["/events"] = lie
    wait_for(lambda: world.others_go_on() or next(turn) > 60, 100, "the liar to be asked sixty times")
    assert memory_mb(world.server) < MOST_MB
    print(f"memory {memory_mb(world.server)} MB, slowest look {world.slowest_s:.2f} s, log {len(world.server.log)} bytes")
    assert len(world.server.log) < 200_000
    assert "Traceback" not in world.server.log
    assert all(len(world.server.job(job["id"])["history"]) < 100 for job in world.server.jobs(service="example"))


def test_a_client_that_answers_at_once_for_ever_is_slowed_down(make_process: MakeProcess, liar: Liar) -> None:
    """A poll that says nothing costs little, and there are not many of them."""
    world = World(make_process, [liar])
    liar.says["/events"] = lambda call: liar.events(Call("GET", "/events", {"since": "0", "wait": "0"}, {}))
    wait_for(lambda: len(liar.asked) > 250, what="it to use up what it may")
    begun, before = time.monotonic(), len(liar.asked)
    while time.monotonic() - begun < 3:
        world.others_go_on()
    assert (len(liar.asked) - before) / (time.monotonic() - begun) < 80
    assert "Traceback" not in world.server.log


def test_numbers_that_are_none_never_reach_a_caller(make_process: MakeProcess) -> None:
    """NaN, 1e400, true, ids of 10^30, a status that is a list: each held back or left out, and said in a word."""
    fields = [
        b'"load":NaN', b'"load":1e400', b'"load":-Infinity', b'"slots":true', b'"slots":1e3', b'"slots":' + b"1" * 400, b'"memory":NaN',
        b'"next":1e400', b'"next":99999999999999999999', b'"memory":false', b'"payloads":[{"status":["x"]}]',
        b'"payloads":[{"status":{"a":[]},"started_at":NaN}]', b'"payloads":[' + b"[" * 500 + b"]" * 500 + b"]",
    ]  # fmt: skip
    usual = b'"instance":"i","next":1,"slots":1,"memory":null,"payloads":[],"load":1'
    liars = [Liar() for _ in fields]
    with contextlib.ExitStack() as stack:
        for liar, extra in zip(liars, fields):
            stack.callback(liar.close)
            liar.says["/events"] = once(whole(b"{" + usual + b"," + extra + b"}"))
        world = World(make_process, liars)
        wait_for(lambda: all(len(liar.asked) > 2 for liar in liars), what="all to be asked")
        world.others_go_on()
        said = {client["name"]: client for client in world.server.get("/clients").json()["clients"]}
        held = [not said[urlsplit(liar.url).netloc]["reachable"] for liar in liars]
        assert held == [b'["x"]' not in extra for extra in fields], "of a payload that is rubbish, nothing but that is wrong"
        assert "Traceback" not in world.server.log
        assert "TypeError" not in world.server.log


# == Pages ==


def fill(yard: Yard, count: int, reason: str = "", status: str = "Completed") -> None:
    """Give a client so many payloads that were not fetched, as rows alone."""
    first = yard.store.add(new_job(service=None, user_id=None), "")
    row = yard.store.read("SELECT * FROM jobs WHERE id = :id", id=first.id)[0]
    whole_row = dict(row)
    columns, places = ", ".join(whole_row), ", ".join(f":{name}" for name in whole_row)
    begin = yard.store.last_change

    def insert(db: Any) -> int:
        values = [
            {**whole_row, "id": first.id + number, "uuid": f"u-{number}", "status": status, "changed": begin + number, "reason": reason}
            for number in range(1, count)
        ]
        db.executemany(f"INSERT INTO jobs ({columns}) VALUES ({places})", values)
        return 1

    yard.store.write(insert)
    yard.store.last_change += count


def test_a_first_contact_comes_in_pages(yard: Yard) -> None:
    """Of a thousand payloads each; together they are all that was not fetched, each told once."""
    fill(yard, 2500)
    pages, since, more = list[Any](), 0, ""
    while not pages or pages[-1]["more"]:
        pages.append(yard.events(f"since={since}{more}"))
        since, more = pages[-1]["next"], "&more=1"
    assert [len(page["payloads"]) for page in pages] == [1000, 1000, 500]
    ids = [payload["id"] for page in pages for payload in page["payloads"]]
    assert len(set(ids)) == len(ids) == 2500
    assert not any("archive" in payload for page in pages for payload in page["payloads"])
    assert yard.events(f"since={since}")["payloads"] == []


def test_changes_come_in_pages_too(yard: Yard) -> None:
    since = yard.events()["next"]
    fill(yard, 1500)
    first = yard.events(f"since={since}&wait=5")
    then = yard.events(f"since={first['next']}&wait=5")
    assert [(len(page["payloads"]), page["more"]) for page in (first, then)] == [(1000, True), (499, False)], "Prepared is no news"


def test_a_page_has_a_length_too(yard: Yard) -> None:
    """Reasons are texts of scripts; the widest of them leave room for fewer payloads, never for none."""
    fill(yard, 900, reason="\U0001f600" * 1000)
    said = ask(yard.client, "GET", "/events?since=0", Authorization="Bearer t")
    assert len(said.body) < joborch.EVENTS_PAGE_BYTES
    assert said.json["more"]
    assert len(said.json["payloads"]) > 100
    assert joborch.read_events(said.body).more


def test_who_knew_another_instance_begins_the_list_anew(yard: Yard) -> None:
    fill(yard, 1200)
    said = yard.events("since=900&more=1&instance=another")
    assert (len(said["payloads"]), said["payloads"][0]["id"], said["more"]) == (1000, 1, True)


def test_who_is_lost_is_judged_after_the_last_page(data: DataFolder, liar: Liar) -> None:
    """A job that only the second page names is not lost, and one that none names is asked for."""
    desk = Desk(data, liar.url, SERVICE_EXAMPLE_TOKEN="")
    jobs = [desk.with_client(Status.RUNNING) for _ in range(3)]
    for number, job in enumerate(jobs):
        liar.payloads.append({"id": 7 + number, "uuid": job.uuid, "attempt": 1, "status": "Running"})
    lost = liar.payloads.pop()

    def page(call: Call) -> bytes:
        since = int(call.query["since"])
        assert (call.query.get("more") == "1") is (0 < since <= 2)
        shown = liar.payloads[since : since + 1]
        said = {"instance": "i", "next": min(since + 1, 3), "slots": 2, "more": since < 2}
        return whole({**said, "payloads": shown})

    liar.says["/events"] = page
    for _ in range(2):
        assert joborch.get_tick(desk.server, desk.link)
        assert not desk.link.reports()
    assert joborch.get_tick(desk.server, desk.link)
    assert [found.job_id for found in desk.link.reports()] == [jobs[2].id], lost
    assert joborch.get_tick(desk.server, desk.link), "and now it is asked for what changes"
    desk.store.close()


def test_a_server_takes_in_a_hundred_thousand_payloads(make_process: MakeProcess, liar: Liar) -> None:
    """Page by page, while others go on; what it confirms meanwhile is bounded."""
    world = World(make_process, [liar])
    job = world.running()
    liar.instance, count = "another", 100_000
    pages: list[int] = []

    def page(call: Call) -> bytes:
        since = int(call.query["since"])
        if since > count or call.query["instance"] not in ("", "another"):
            return liar.events(Call("GET", "/events", {"since": "9", "wait": call.query["wait"]}, {}), next=max(since, 1), payloads=[])
        pages.append(since)
        real = [liar.payloads[0]] if since + 1000 > count else []
        others = [{**PAYLOAD, "id": since + number} for number in range(1, 1000)]
        said = {"instance": "another", "next": since + 1000 + (since == 0), "slots": 2, "more": since + 1000 <= count}
        return whole({**said, "payloads": [*others, *real]})

    liar.says["/events"] = page
    wait_for(lambda: world.others_go_on() or (pages and pages[-1] + 1000 > count), 100, "the last page to be asked for")
    world.others_go_on()
    assert world.server.job(job)["status"] == "Running"
    assert memory_mb(world.server) < MOST_MB


# == Calls that go on to a client ==


def ask_for(server: Process, path: str) -> socket.socket:
    """Send a request and do not wait for its answer."""
    line = socket.create_connection(("127.0.0.1", server.port))
    line.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return line


def status_of(line: socket.socket) -> int:
    """The status code of an answer that has come; 0 if none has."""
    line.setblocking(False)
    try:
        return int(line.recv(9 + 3, socket.MSG_PEEK)[9:] or 0)
    except BlockingIOError:
        return 0


def test_callers_of_a_client_that_hangs_hold_nobody_up(make_process: MakeProcess) -> None:
    """A few of them wait, the others get 503 at once; uploads, other clients' jobs and /health go on."""
    hangs = make_process("client", {"JOBORCH_ALLOW_ANONYMOUS": "1"}).start()
    liar = Liar()
    world = World(make_process, [liar], SERVICE_EXAMPLE_CLIENTS=hangs.url)
    job = world.upload(script="sleep 300")
    wait_for(lambda: world.server.job(job)["status"] == "Running", what="the job to run")
    paths = [path.format(job) for path in ("/download_partial/{}", "/jobs/{}/logs", "/jobs/{}/logs?follow=1")]
    hangs.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
    try:
        lines = {path: [ask_for(world.server, path) for _ in range(60)] for path in paths}
        wait_for(lambda: all(any(map(status_of, lines[path])) for path in paths[:2]), what="some to be answered")
        for _ in range(3):
            world.others_go_on()
        codes = {path: [status_of(line) for line in lines[path]] for path in paths}
        assert sum(codes[path].count(0) for path in paths[:2]) <= joborch.CALLS_A_CLIENT
        assert all(codes[path].count(503) >= 60 - joborch.CALLS_A_CLIENT for path in paths[:2])
        assert set(codes[paths[2]]) <= {0, 200, 503}
        wait_for(lambda: world.troubles()[urlsplit(hangs.url).netloc], what="its silence to be noticed")
        for path in paths:
            begun = time.monotonic()
            said = world.server.get(path.partition("?")[0])
            assert (said.status_code, said.headers["Retry-After"]) == (503, str(joborch.COME_AGAIN_S))
            assert "did not answer" in said.json()["message"]
            assert time.monotonic() - begun < SOON_S
        for line in itertools.chain(*lines.values()):
            line.close()
    finally:
        hangs.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        liar.close()
    wait_for(lambda: world.server.get(f"/jobs/{job}/logs").status_code == 200, what="the client to be asked again")
    assert world.server.get(f"/download_partial/{job}").status_code == 200


def test_a_caller_who_left_gives_his_place_back(make_process: MakeProcess, liar: Liar) -> None:
    """Though the client would let him wait for a minute."""
    world = World(make_process, [liar])
    job = world.running()
    liar.says["/retrieve_partial"] = endless(b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.05)

    def told_to_come_again() -> bool:
        lines.append(ask_for(world.server, f"/download_partial/{job}"))
        return wait_for(lambda: status_of(lines[-1]) or sum(not status_of(line) for line in lines) <= joborch.CALLS_A_CLIENT) == 503

    lines: list[socket.socket] = []
    wait_for(told_to_come_again, what="all places to be taken")
    for line in lines:
        line.close()
    wait_for(lambda: len(liar.hung_up) == joborch.CALLS_A_CLIENT, what="the calls to be given up")
    liar.says["/retrieve_partial"] = once(whole(b"PK", Content_Type="application/zip"))
    wait_for(lambda: world.server.get(f"/download_partial/{job}").status_code == 200, what="a place to be free")


def test_a_follower_holds_no_place_while_nothing_is_written(make_process: MakeProcess, liar: Liar) -> None:
    """Twenty follow jobs of one client; a partial download finds a place there at once."""
    world = World(make_process, [liar])
    job = world.running()
    text = head(Content_Length=0, X_Next_Offset=0, Content_Type="text/plain")
    liar.says["/logs"] = once(text)
    liar.says["/retrieve_partial"] = once(whole(b"PK", Content_Type="application/zip"))
    lines = [ask_for(world.server, f"/jobs/{job}/logs?follow=1") for _ in range(20)]
    wait_for(lambda: all(status_of(line) in (0, 200) for line in lines) and len(liar.asked) > 40, what="all to be followed")
    codes = [world.server.get(f"/download_partial/{job}").status_code for _ in range(20)]
    assert codes.count(200) > 10, codes
    for line in lines:
        line.close()


# == Words that are well-formed lies ==


class Liars:
    """Two clients of one server: the second says anything about any job, and the first is true."""

    def __init__(self, folder: DataFolder) -> None:
        self.desk = Desk(folder, "http://127.0.0.1:1,http://127.0.0.1:2", SERVICE_EXAMPLE_TOKEN="", SERVICE_EXAMPLE_RUNS_PER_USER="9")
        self.true, self.false = self.desk.server.links.values()
        self.desk.server.wake = lambda name: None  # type: ignore[method-assign]
        self.jobs = [self.at(self.true, to) for to in (Status.SUBMITTED, Status.RUNNING, Status.UNKNOWN)]
        self.jobs += [self.at(self.false, to) for to in (Status.SUBMITTED, Status.RUNNING, Status.UNKNOWN, Status.PROCESSING)]
        self.jobs += [self.desk.upload()]

    def at(self, link: Link, to: Status) -> Job:
        """A job in one of the states of quotas at one client, as payload 7, 8, ..."""
        desk = self.desk
        job = desk.upload()
        assert desk.store.claim(job.id, link.name, 100)
        link.heard()
        if to is not Status.PROCESSING:
            assert desk.store.move(desk[job], Status.SUBMITTED, "", dest_id=str(6 + job.id))
        if to in (Status.RUNNING, Status.UNKNOWN):
            assert desk.store.move(desk[job], to, "")
        return desk[job]

    def untouched(self) -> list[Job]:
        """The rows that the second client has no say in."""
        return [self.desk[job] for job in self.jobs if job.client != self.false.name]

    def check(self) -> None:
        """No job of the first client has moved, each history is legal, and what is remembered is bounded."""
        for job in self.jobs:
            rows = self.desk.store.read(statements.HISTORY_GET, id=job.id)
            moves = [(Status(row["source"]), Status(row["target"])) for row in rows if row["source"]]
            legal = {(source, target) for source, target, _ in SERVER_MOVES}
            assert set(moves) <= legal
            assert self.desk[job].status is (moves[-1][1] if moves else Status.QUEUED)
        here = {job.id for job in self.jobs if job.client == self.false.name}
        assert set(self.false.jobs) <= here
        assert len(self.false.superseded_attempts) <= joborch.SUPERSEDED_LIMIT
        assert len(self.false.confirmed_ids) <= joborch.SETTLED_LIMIT
        assert all(superseded.attempt <= 1 for superseded in self.false.superseded_attempts.values())


@contextlib.contextmanager
def two_clients() -> Iterator[Liars]:
    """A server with two clients, for one example; what it changes of the process is changed back."""
    with new_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", None)
        umask = os.umask(0o022)
        data = DataFolder(str(folder / "data"))
        data.open()
        liars = Liars(data)
        try:
            yield liars
        finally:
            liars.desk.store.close()
            data.lock.close()
            os.umask(umask)


def lies(count: int) -> st.SearchStrategy[list[list[tuple[int, dict[str, Any]]]]]:
    """Polls: each says something well-formed of some of the jobs, by their places in a list."""
    payload = st.fixed_dictionaries({
        "id": st.integers(1, 20), "attempt": st.sampled_from([1, 1, 1, 2, 3, 10**6]), "status": st.sampled_from(STATUSES),
        "reason": st.sampled_from(["", "why"]), "cause": st.sampled_from([None, "user", "infrastructure", "limit", "cancelled"]),
        "exit_code": st.none() | st.integers(-5, 300), "signal": st.none() | st.integers(0, 70),
        "started_at": st.none() | st.floats(0, 1e10), "ended_at": st.none() | st.floats(0, 1e10),
    })  # fmt: skip
    return st.lists(st.lists(st.tuples(st.integers(0, count - 1), payload), max_size=5), min_size=1, max_size=6)


@settings(BOUNDED, max_examples=60)
@given(lies(8), st.lists(st.booleans(), min_size=6, max_size=6))
def test_lies_of_one_client_move_no_job_of_another(polls: list[list[tuple[int, dict[str, Any]]]], fresh: list[bool]) -> None:
    """Ids of others' jobs, wrong attempts, ends before starts, ends said twice: legal moves alone, and no exception."""
    with two_clients() as liars:
        before = liars.untouched()
        for number, poll in enumerate(polls):
            payloads = [{**payload, "uuid": liars.jobs[place].uuid} for place, payload in poll]
            heard = joborch.read_events(json.dumps({"instance": "i", "next": number, "slots": 2, "payloads": payloads}).encode())
            joborch.take_in(liars.desk.server, liars.false, heard, fresh[number])
            assert liars.untouched() == before
            liars.check()
        for _ in range(8):
            joborch.fetch_tick(liars.desk.server, liars.false)  # nobody listens there: it is tried again
        assert liars.untouched() == before
        liars.check()


@settings(BOUNDED, max_examples=60)
@given(said_events(UUIDS))
def test_a_tick_bears_whatever_is_said(said: Any) -> None:
    """Also of jobs that are there: no exception but those of a store or a disk."""
    text = json.dumps(said)
    if not isinstance(tried(lambda: joborch.read_events(text.encode()), Exception), EventsReply):
        return
    with two_clients() as liars:
        heard = joborch.read_events(text.replace(UUIDS[0], liars.jobs[1].uuid).replace(UUIDS[1], liars.jobs[4].uuid).encode())
        before = liars.untouched()
        got = tried(lambda: joborch.take_in(liars.desk.server, liars.false, heard, False), Exception)
        assert got is None, got
        assert liars.untouched() == before
        liars.check()
        for listing in (joborch.show_clients, joborch.show_services):
            json.dumps(listing(liars.desk.server, joborch.Request({})).body, allow_nan=False)


@BOUNDED
@given(said_payload(UUIDS) | JSON)
def test_a_status_is_a_payload_or_an_error(said: Any) -> None:
    """The answer to /retrieve, read by the client's own words."""
    got = tried(lambda: joborch.clean_payload(joborch.read_answer(json.dumps(said).encode())), ValueError)
    if isinstance(got, dict):
        assert_clean(got)


def test_a_result_that_never_ends_is_left_for_later(make_process: MakeProcess, liar: Liar) -> None:
    """It costs a sender of that client alone: its other calls and others' jobs go on."""
    world = World(make_process, [liar])
    job = world.running()
    liar.says["/retrieve"] = endless(b"x", head(Content_Type="application/zip", Content_Length=10**9, ETag='"t"'), 0.05)
    liar.payloads.append({**liar.payloads[0], "status": "Completed", "ended_at": time.time()})
    wait_for(lambda: any(call.path.startswith("/retrieve") for call in liar.asked), what="the result to be asked for")
    world.others_go_on()
    assert world.server.job(job)["status"] == "Running"
    assert world.server.get(f"/jobs/{job}").status_code == 200


def test_a_transfer_of_a_byte_a_call_is_left_for_later(liar: Liar, liar_link: Link, job: Job) -> None:
    """It goes on where it broke, but not for ever."""

    def one_byte(call: Call) -> Iterator[bytes]:
        begin = int(call.headers.get("range", "bytes=0-")[6:-1])
        said = {"Content_Range": f"bytes {begin}-999999/1000000", "Content_Length": 10**6, "ETag": '"t"', "Content_Type": "application/zip"}
        yield head("206 Partial Content" if begin else "200 OK", **said) + b"x"

    liar.says["/retrieve"] = one_byte
    with io.BytesIO() as spool:
        into = joborch.Transfer(spool)
        with pytest.raises(NoAnswer, match="broke"):
            liar_link.fetch(job, into)
        assert 1 < into.size <= len(liar.asked) <= joborch.SMALL_PIECES + 2


def test_a_job_is_not_moved_to_and_fro_for_ever() -> None:
    """Each move is a row on the disk, and a line of the log."""
    with two_clients() as liars:
        desk, job = liars.desk, liars.jobs[4]
        for _ in range(3 * joborch.RESTLESS_MOVES):
            said = {"id": 11, "uuid": job.uuid, "attempt": 1, "status": "Running"}
            joborch.report(desk.server, liars.false, said)
            joborch.become_unknown(desk.server, desk[job], "its client is silent")
        assert joborch.RESTLESS_MOVES < desk[job].moves < joborch.RESTLESS_MOVES + 5
        desk.clock.pass_s(61)
        joborch.report(desk.server, liars.false, said)
        assert desk[job].status is Status.RUNNING, "it is believed once a minute"


def test_what_is_to_be_confirmed_is_bounded() -> None:
    """A client may report without end that payloads have ended which the server does not need."""
    with two_clients() as liars:
        over = liars.jobs[3]
        assert liars.desk.store.move(over, Status.FAILED, "", cause="user")
        for number in range(joborch.SETTLED_LIMIT + 100):
            joborch.report_of_another(
                liars.desk.server, liars.false, liars.desk[over], {"id": str(number), "attempt": 1, "status": "Failed"}
            )
        assert len(liars.false.confirmed_ids) == joborch.SETTLED_LIMIT


def test_terminate_does_not_wait_for_a_client_that_falls_silent(make_process: MakeProcess, liar: Liar) -> None:
    """It answered when the call came; the answer comes once it is known that it does not any more."""
    world = World(make_process, [liar])
    job = world.running()
    liar.says["/kill"] = endless(b"HTTP/1.1 100 Continue\r\n\r\n", pause_s=0.05)
    liar.says["/events"] = once(whole({"message": "no"}, "503 Service Unavailable"))
    begun = time.monotonic()
    said = world.server.post(f"/terminate/{job}")
    assert said.status_code == 202
    assert "as soon as" in said.json()["message"]
    assert time.monotonic() - begun < 30
