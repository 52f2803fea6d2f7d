"""What it costs if a client calls its server, beside the direct way in the same run; and many clients that wait for calls."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from bench_base import HOST, NOOP, REPOSITORY, BenchError, Caller, Measure, Place, memory_mb, request, upload_request, usage, wait_until
from bench_site import Site, job_rate, new_site, running_site, wait_until_completed, warm_up

IDLE_CLIENTS = 500
IDLE_S = 60.0
CALLED_WITHIN_S = 120.0

# == One client ==


class JoinedSite(Site):
    """A site whose clients call the server."""

    def settings(self, name: str) -> dict[str, str]:
        """The settings of a process: only the server has an address."""
        found = super().settings(name)
        if name == "server":
            return {**found, "SERVICE_BENCH_CLIENTS": ""}
        return {**found, "JOBORCH_JOIN": self.url("server"), "JOBORCH_TOKEN": token(self, name)}


def token(site: Site, name: str) -> str:
    """A new token for a client of this name."""
    with Caller(site.port) as caller:
        answer = caller.ask(request("POST", f"/tokens?name={name}&role=client&services=bench"))
    if answer.status != 201:
        raise BenchError(f"POST /tokens answered {answer.status}")
    return str(answer.json()["token"])


@contextlib.contextmanager
def joined_site(place: Place) -> Iterator[Site]:
    """A site with all its processes up, and its client waiting for calls."""
    with new_site(place, kind=JoinedSite) as site:
        site.start("server")
        site.start("client", ready=False)
        wait_until(lambda: all_called(site, 1), CALLED_WITHIN_S, "the client calls")
        yield site


def all_called(site: Site, count: int) -> bool:
    """Whether so many clients have called."""
    with Caller(site.port) as caller:
        return sum(bool(client["reachable"]) for client in caller.get("/clients")["clients"]) >= count


def times_ms(site: Site, count: int) -> list[float]:
    """How long each no-op job takes, one after another."""
    times = []
    with Caller(site.port) as caller:
        for _ in range(count):
            begin = time.perf_counter()
            wait_until_completed(caller, caller.ask(upload_request(NOOP)).json())
            times.append((time.perf_counter() - begin) * 1000)
    return times


def joined(place: Place, size: int) -> Iterator[Measure]:
    """Latency and throughput of no-op jobs by both ways, in turns; then clients that only wait."""
    with running_site(place) as direct, joined_site(place) as calling:
        warm_up(direct)
        warm_up(calling)
        direct_ms, calling_ms = list[float](), list[float]()
        for _ in range(4):  # in turns, because the machine is not equally quick at all times
            direct_ms += times_ms(direct, size // 8)
            calling_ms += times_ms(calling, size // 8)
        yield Measure("latency, median", statistics.median(calling_ms), "ms", statistics.median(direct_ms))
    with running_site(place) as direct:
        warm_up(direct)
        _, bare = job_rate(direct.port, size)
    with joined_site(place) as calling:
        warm_up(calling)
        _, rate = job_rate(calling.port, size)
    yield Measure("throughput", rate, "jobs/s", bare)
    yield from many_idle(place, IDLE_CLIENTS if size >= 1000 else IDLE_CLIENTS // 10)


# == Many clients ==


class Idle(threading.Thread):
    """A client without jobs, by the program's own code for calls: it answers /hello and the first /events, and then only waits."""

    wait_s = 600  # of a poll

    def __init__(self, url: str, secret: str, number: int) -> None:
        super().__init__(daemon=True)
        from joborch_base.identity import ProofReader
        from joborch_plugins.joining import Exchanges

        self.exchanges, self.reader, self.number = Exchanges(url, secret, ""), ProofReader((secret,)), number
        self.stopping = False

    def run(self) -> None:
        from joborch import JoborchError

        with contextlib.suppress(JoborchError):  # the server is stopped first
            self.call()

    def call(self) -> None:
        """Ask for calls, and answer those that can be answered now."""
        from joborch_base.calls import frame, read_frames

        offer = {"instance": f"idle-{self.number}", "start": "0" * 16}
        said = json.loads(self.exchanges.ask("POST", "/join", json.dumps(offer).encode()).body)
        session, after = said["session"], said["after"]
        while not self.stopping:
            heard = self.exchanges.ask("GET", f"/join/calls?session={session}&after={after}&wait={self.wait_s}", b"", self.wait_s + 100.0)
            for said, _ in read_frames(heard.body):
                after = said["number"]
                text = self.answer(said["call"]) if "call" in said else None
                if text:
                    done = frame({"number": after, "at": 0, "end": True}, text)
                    self.exchanges.ask("POST", f"/join/answers?session={session}&after={after}&wait=0", done)

    def answer(self, call: dict[str, Any]) -> bytes | None:
        """What a client answers; None while there is no news."""
        import hashlib

        from joborch_base.archives import repr_digest
        from joborch_base.calls import answer_head

        said: dict[str, Any] = {"version": "0.2.0", "nonce": self.reader.nonce, "proof": True}
        if call["target"].startswith("/events"):
            if "wait=0&" not in call["target"]:
                return None
            said = {"instance": f"idle-{self.number}", "start": "0" * 16, "next": 1, "slots": 1, "payloads": [], "more": False}
        cgi = {name.upper().replace("-", "_"): text for name, text in call["headers"].items()}
        proof = self.reader.accept(cgi, call["method"], call["target"], 0) if "AUTHORIZATION" in cgi else None
        body = json.dumps(said).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("X-Joborch", "0.2.0")]
        return answer_head(proof, 200, [*headers, ("Repr-Digest", repr_digest(hashlib.sha256(body).hexdigest()))]) + body


def many_idle(place: Place, count: int) -> Iterator[Measure]:
    """What so many clients that wait for calls cost the server."""
    sys.path.insert(0, str(REPOSITORY))  # as a command, only tests/ is searched
    threading.stack_size(256 << 10)
    with new_site(place, kind=JoinedSite) as site:
        site.start("server")
        pid = site.processes["server"].pid
        before_mb = memory_mb(pid)[1]
        clients = [Idle(f"http://{HOST}:{site.port}", token(site, f"idle-{number}"), number) for number in range(count)]
        for client in clients:
            client.start()
        wait_until(lambda: all_called(site, count), CALLED_WITHIN_S, f"{count} clients call")
        time.sleep(15)  # as after a last job: then nothing is due soon
        before = usage(pid)
        time.sleep(IDLE_S)
        yield Measure(f"CPU of the server, {count} idle clients", usage(pid).since(before).cpu_s / IDLE_S * 100, "% of a core")
        yield Measure(f"memory of the server, {count} idle clients", memory_mb(pid)[1], "MB", before_mb)
        for client in clients:
            client.stopping = True
