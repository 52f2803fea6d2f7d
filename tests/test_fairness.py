"""Whoever has used nothing is next: whatever others were charged for, whatever failed, and whoever does not answer."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import socket
import socketserver
import threading
from collections import deque
from pathlib import Path

import pytest
from conftest import MakePair
from harness import Pair, Process, submit, wait_for, wait_status
from hypothesis import given, settings
from hypothesis import strategies as st
from world import Desk, HandClock, Peer, Yard, a_service, event, heads, new_job, reply

import joborch
from joborch import Cause, Job, Sharing, Status, Store
from joborch_base.scheduling import Pace, counted_s, use_now

HALF_LIFE_S = 6 * 3600.0

# == A newcomer ==

HOWS = ("ends", "fails", "killed", "never started", "lost", "lost unseen")


@dataclasses.dataclass
class Flood:
    """One user's endless jobs at a service with a few slots, played with a real store and a clock in the test's hand."""

    slots: int
    quota: int
    run_s: float
    guess_s: float  # how long a run takes, as the service believes at first; 0: it knows nothing
    chance: random.Random
    hows: tuple[str, ...]
    queue_s: float = 0.0  # what a batch system has a job wait for before it begins

    def __post_init__(self) -> None:
        self.clock = HandClock()
        self.numbers = itertools.count(1)
        self.open()
        self.ends: list[tuple[float, int]] = []
        self.began: dict[int, float] = {}
        if self.guess_s:
            self.store.write(lambda db: self.store.set_pace(db, "s", Pace(20, self.guess_s)))

    def open(self, path: str = ":memory:") -> None:
        """Make a store with the service."""
        self.store = Store(path, "server", self.clock)
        self.store.set_limits({"s": a_service("s", runs_per_user=self.quota, max_runs=self.slots)}, Sharing(half_life_s=HALF_LIFE_S))

    def upload(self, user_id: int, count: int = 1) -> int:
        """Jobs arrive; the id of the last."""
        return [self.store.add(new_job(user_id=user_id, service="s", retries=0), "").id for _ in range(count)][-1]

    def fill(self) -> None:
        """Send what fits, by turn."""
        while len(self.ends) < self.slots:
            waiting = heads(self.store, "s", 1)
            if not waiting:
                return
            job = self.store.claim(waiting[0].job_id, "a", 999)
            assert job is not None
            assert self.store.move(job, Status.SUBMITTED, "", dest_id="1")
            took_s = self.queue_s + self.run_s * self.chance.uniform(0.5, 1.0)
            self.ends.append((self.clock.now + took_s, job.id))
            self.began[job.id] = self.clock.now

    def step(self) -> int:
        """Let time go by until a run ends in some way; whose it was."""
        self.ends.sort()
        at, number = self.ends.pop(0)
        self.clock.now = max(self.clock.now, at)
        job = self.store.get(number)
        assert job is not None
        end(self.store, job, self.chance.choice(self.hows), (at - self.began[number]) - self.queue_s)
        self.fill()
        return int(job.user_id or 0)


def end(store: Store, job: Job, how: str, run_s: float) -> None:
    """Bring a submitted job to an end."""
    if how in ("ends", "fails"):
        to = Status.COMPLETED if how == "ends" else Status.FAILED
        assert store.move(job, to, "", started_at=1.0, run_s=run_s)
    elif how == "killed":
        assert store.move(job, Status.KILLED, "", cause=Cause.CANCELLED.value)
    elif how == "never started":
        assert store.move(job, Status.FAILED, "", cause=Cause.INFRASTRUCTURE.value)
    else:
        assert store.move(job, Status.UNKNOWN, "", started_at=1.0 if how == "lost" else None)
        current = store.get(job.id)
        assert current is not None
        assert store.move(current, Status.QUEUED, "", attempt=job.attempt + 1, client=None, dest_id=None, started_at=None)


@settings(deadline=None, max_examples=80)
@given(
    slots=st.integers(1, 4),
    quota=st.integers(1, 6),
    run_s=st.sampled_from([0.05, 0.2, 5.0, 300.0, 7200.0]),
    wrong=st.sampled_from([0.0, 0.001, 1.0, 1000.0]),
    before=st.integers(0, 30),
    hows=st.lists(st.sampled_from(HOWS), min_size=1, max_size=3),
    queue_s=st.sampled_from([0.0, 0.0, 3600.0, 2 * 86400.0]),
    seed=st.integers(0, 10**6),
)
def test_a_newcomer_with_one_job_waits_for_what_runs(
    slots: int, quota: int, run_s: float, wrong: float, before: int, hows: list[str], queue_s: float, seed: int
) -> None:
    """From the first job of a new server on, whatever was charged in advance, and however it was given back: he is next."""
    flood = Flood(slots, quota, run_s, wrong * run_s, random.Random(seed), tuple(hows), queue_s)
    flood.upload(1, 60)
    flood.fill()
    for _ in range(before):
        flood.step()
    newcomer = flood.upload(2)
    flood.fill()
    others = 0
    while newcomer not in flood.began:
        others += 1
        assert others <= slots, "more ended than ran when he came, and he was not next"
        flood.step()
    flood.store.close()


@settings(deadline=None, max_examples=40)
@given(
    first=st.sampled_from([0.2, 60.0, 7200.0]), idle_s=st.sampled_from([0.0, 60.0, 86400.0, 30 * 86400.0]),
    run_s=st.sampled_from([0.2, 60.0]), crowd=st.integers(2, 12), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_newcomers_one_after_another_each_wait_for_one_turn(first: float, idle_s: float, run_s: float, crowd: int, seed: int) -> None:
    """Also where those who came before them have used little, or were idle for so long that their use is nearly forgotten."""
    flood = Flood(2, 2, first, 1000 * first, random.Random(seed), HOWS)
    flood.upload(1, 20)
    flood.fill()
    while flood.ends:
        flood.step()
    flood.clock.pass_s(idle_s)
    flood.run_s = run_s
    flood.upload(1, 100)
    flood.fill()
    for user_id in range(2, 2 + crowd):
        flood.upload(user_id, 40)
        alone = flood.upload(1000 + user_id)
        flood.fill()
        for _ in range(4):  # what ran, and the one who came with him
            if alone not in flood.began:
                flood.step()
        assert alone in flood.began
    flood.store.close()


@pytest.mark.parametrize("when", [0, 1, 5])
def test_a_restart_changes_no_turn(when: int, tmp_path: Path) -> None:
    """What the ranks are made of is in the database."""
    flood = Flood(2, 2, 0.2, 0.0, random.Random(1), ("ends",))
    flood.store.close()
    flood.open(str(tmp_path / "db"))
    flood.upload(1, 30)
    flood.fill()
    for _ in range(when):
        flood.step()
    flood.store.close()
    flood.open(str(tmp_path / "db"))
    newcomer = flood.upload(2)
    assert [head.job_id for head in heads(flood.store, "s", 1)] == [newcomer]
    flood.step()
    flood.step()
    assert newcomer in flood.began
    flood.store.close()


def test_what_is_charged_in_advance_is_no_use() -> None:
    """While it runs it counts in whose turn it is; when it is over, only what it took is left of it."""
    flood = Flood(1, 1, 0.4, 400.0, random.Random(1), ("ends",))
    flood.upload(1, 3)
    flood.fill()
    turn = flood.store.share("s", 1).turn
    assert turn and use_now(turn.rank, flood.clock.now, HALF_LIFE_S) == pytest.approx(400.0)
    assert flood.store.used_slot_s("s", 1) == 0.0
    flood.step()
    assert 0.2 <= flood.store.used_slot_s("s", 1) <= 0.4
    flood.store.close()


def test_a_job_that_waits_for_days_in_a_batch_system_costs_what_it_ran() -> None:
    """Decay must not turn what was charged for others into something that is given back twice."""
    flood = Flood(50, 50, 10.0, 2000.0, random.Random(3), ("ends",), 5 * 86400.0)
    flood.upload(1, 50)
    flood.fill()
    while flood.ends:
        flood.step()
    assert 250 <= flood.store.used_slot_s("s", 1) <= 500
    flood.store.close()


@settings(deadline=None, max_examples=100)
@given(st.floats(0.001, 1e7), st.floats(60, 1e6))
def test_a_long_run_counts_as_if_it_had_been_charged_while_it_ran(run_s: float, half_life_s: float) -> None:
    """Between what its decay to the second would give and an eighth of a half-life more; a short one counts whole."""
    exact = half_life_s / math.log(2) * -math.expm1(-math.log(2) * run_s / half_life_s)
    assert exact * (1 - 1e-9) <= counted_s(run_s, half_life_s) <= exact * 2 ** (1 / 8) * (1 + 1e-9)
    if run_s < half_life_s / 8:
        assert counted_s(run_s, half_life_s) == run_s


def test_who_was_idle_for_long_does_not_keep_the_others_waiting_for_all_that_they_have_used() -> None:
    """His first run is next; from then on he has at least half of what the least of them has used."""
    flood = Flood(1, 1, 100.0, 0.0, random.Random(2), ("ends",))
    flood.upload(1, 400)
    flood.fill()
    for _ in range(40):
        flood.step()
    had = flood.store.used_slot_s("s", 1)
    flood.upload(2, 200)
    served = [flood.step() for _ in range(60)]
    assert served[1] == 2, "he is next"
    assert served.count(1) >= 15, "nor does he have all turns until he has used as much"
    assert flood.store.used_slot_s("s", 2) > had / 2
    flood.store.close()


def counts(server: Process, user_id: int) -> dict[str, int]:
    """How many jobs of a user are in each state."""
    found: dict[str, int] = {}
    for job in server.jobs(user_id=user_id):
        found[job["status"]] = found.get(job["status"], 0) + 1
    return found


def test_one_job_beside_a_flood_on_a_fresh_server(make_pair: MakePair) -> None:
    """The flood of 300 jobs on 4 slots goes on for half a minute; the newcomer's one job starts after what runs."""
    limits = {"SERVICE_EXAMPLE_RUNS_PER_USER": "50", "SERVICE_EXAMPLE_MAX_RUNS": "100"}
    pair = make_pair(server=limits, client={"JOBORCH_SLOTS": "4"}).start()
    for _ in range(300):
        submit(pair.server, "sleep 0.5", user_id=1)
    wait_for(
        lambda: counts(pair.server, 1).get("Completed", 0) >= 8, what="the first runs are over, for each of which a minute was charged"
    )
    newcomer = submit(pair.server, "true", user_id=2)
    queued = counts(pair.server, 1)["Queued"]
    assert queued > 60, "the flood is not over when he comes"
    wait_status(pair.server, newcomer, "Completed")
    begun = queued - counts(pair.server, 1)["Queued"]
    assert begun <= 16, f"{begun} jobs of the flood began while he waited"
    again = [submit(pair.server, "true", user_id=2) for _ in range(3)]
    queued = counts(pair.server, 1)["Queued"]
    for number in again:
        wait_status(pair.server, number, "Completed")
    assert queued - counts(pair.server, 1)["Queued"] <= 24, "nor is he put behind the flood once he has had a turn"


# == Nobody answers ==


def moves(server: Process, number: int) -> list[str]:
    """The states that a job has been in."""
    return [str(step["to"]) for step in server.job(number)["history"]]


@pytest.mark.parametrize("how", ["gone", "another token", "somebody else"])
def test_a_job_stays_queued_while_no_client_answers(how: str, make_pair: MakePair) -> None:
    """It is the poll that finds out when one does; the job says meanwhile what is the matter."""
    pair = make_pair().start()
    wait_status(pair.server, submit(pair.server, "true"), "Completed")
    pair.client.stop()
    if how == "another token":
        pair.client.settings["JOBORCH_TOKEN"] = "quite-another-token-for-tests"
        pair.client.start()
    if how == "somebody else":
        stranger = Process("server", pair.folder / "stranger", port=pair.client.port)
        stranger.start()
    link = lambda: pair.server.get("/clients").json()["clients"][0]  # noqa: E731
    wait_for(lambda: not link()["reachable"], what="the server has noticed")
    number = submit(pair.server, "true")
    for _ in range(2):  # it is asked again and again
        wait_for(lambda: link()["held_for_s"] > 0, what="it is held back")
        wait_for(lambda: link()["held_for_s"] == 0, what="it is asked again")
    job = pair.server.job(number)
    assert moves(pair.server, number) == ["Queued"], job["history"]
    assert job["waiting_for"].startswith("no client for example takes jobs")
    if how == "somebody else":
        stranger.close()
    elif pair.client.running():
        pair.client.stop()
    pair.client.settings["JOBORCH_TOKEN"] = Pair.TOKEN
    pair.client.start()
    wait_status(pair.server, number, "Completed", limit_s=60)
    assert moves(pair.server, number).count("Queued") == 1


# == The trouble of one job ==


class Gateway(socketserver.ThreadingTCPServer):
    """What stands before a client, as nginx does: one request a connection, and none whose body is too large for it."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, target: int, limit_bytes: int) -> None:
        super().__init__(("127.0.0.1", 0), GatewayCall)
        self.target, self.limit_bytes, self.refused = target, limit_bytes, 0


class GatewayCall(socketserver.StreamRequestHandler):
    """One connection."""

    server: Gateway

    def handle(self) -> None:
        """Forward a request and its answer, or refuse it by its length."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return
            head += line
        length = int((re.findall(rb"(?i)content-length: *(\d+)", head) or [b"0"])[0])
        if length > self.server.limit_bytes:
            self.server.refused += 1
            self.wfile.write(
                b"HTTP/1.1 413 Request Entity Too Large\r\nServer: nginx\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>"
            )
            self.rfile.read(length)  # lingering_close
            return
        with socket.create_connection(("127.0.0.1", self.server.target)) as line:
            line.sendall(re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n" + self.rfile.read(length))
            answer = b"".join(iter(lambda: line.recv(65536), b""))
            if b"\r\nconnection: close" not in answer.partition(b"\r\n\r\n")[0].lower():  # else a caller may use the connection again
                answer = answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            self.wfile.write(answer)


def test_what_a_gateway_does_not_let_through_holds_up_nobody(make_pair: MakePair) -> None:
    """It says that the client got nothing of the job: this one ends with the reason, and the others go on."""
    pair = make_pair()
    with Gateway(pair.client.port, 100_000) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        pair.server.settings["SERVICE_EXAMPLE_CLIENTS"] = f"http://127.0.0.1:{gateway.server_address[1]}"
        pair.start()
        wait_status(pair.server, submit(pair.server, "true"), "Completed")
        large = submit(pair.server, "true", {"data": bytes(300_000)}, user_id=1)
        small = [submit(pair.server, "true", user_id=user_id) for user_id in (1, 1, 2)]
        for number in small:
            wait_status(pair.server, number, "Completed")
        job = wait_status(pair.server, large, "Invalid")
        assert "413" in job["reason"] and "gateway" in job["reason"] and "client_max_body_size" in job["reason"]
        assert gateway.refused == 1
        wait_for(lambda: pair.server.get("/clients").json()["clients"][0]["trouble"] == "", what="a client without trouble")
        pair.server.stop()
        gateway.shutdown()


# == What is kept in mind ==


def sizes(*owners: object) -> dict[str, int]:
    """How much each container of these objects holds."""
    found = {}
    for owner in owners:
        for name, value in vars(owner).items():
            if isinstance(value, (dict, set, list, deque)):
                found[f"{type(owner).__name__}.{name}"] = len(value)
    return found


def test_a_client_keeps_nothing_in_mind_of_payloads_that_were_ended(yard: Yard) -> None:
    """Killed while they run, before they start, at their time limit; Failed, Completed: it is all the same after each round."""
    client = yard.client
    before = sizes(client, client.executor, client.holds, client.store, client.store.core)
    for _ in range(3):
        jobs = [yard.submit("sleep 600"), yard.submit("sleep 600", X_Joborch_Timeout="5"), yard.submit("sleep 600")]
        joborch.run_tick(client)
        yard.store.request_kill(jobs[0].id, Cause.CANCELLED)
        yard.store.request_kill(jobs[1].id, Cause.LIMIT)
        yard.store.request_kill(jobs[2].id, Cause.CANCELLED)
        while joborch.end_tick(client):
            pass
        assert {yard[job].status for job in jobs} == {Status.KILLED, Status.FAILED}
        for script in ("true", "false", "kill -9 $PPID"):
            yard.run(yard.submit(script))
        client.executor.poll([])
        joborch.run_tick(client)
        after = sizes(client, client.executor, client.holds, client.store, client.store.core)
        assert after == before


def test_a_server_keeps_nothing_in_mind_of_jobs_that_were_ended(data: joborch.DataFolder, peer: Peer) -> None:
    """However they ended: at their client, on request, lost there, or while nobody answered."""
    desk = Desk(data, peer.url)
    server, link = desk.server, desk.link
    before = sizes(server, link, desk.store, desk.store.core)
    for number in range(3):
        jobs = [desk.with_client(Status.RUNNING, retries=0) for _ in range(4)]
        for job in jobs:
            joborch.report(server, link, event(job, status="Running", reason="Slurm: pending"))
        assert sum(bool(live.note) for live in link.jobs.values()) == 4
        for job in jobs[:2]:
            desk.store.request_kill(job.id, Cause.CANCELLED)
        peer.says["/kill/7"] = [reply(200, {}), reply(404, {})]
        joborch.kill_tick(server, link)
        assert sum(live.kill_due > 0 for live in link.jobs.values()) == 2
        joborch.payload_gone(server, desk[jobs[0]], "gone")
        joborch.payload_gone(server, desk[jobs[2]], "gone")
        for job in (jobs[1], jobs[3]):
            joborch.report(server, link, event(job, status="Failed", reason=f"{number}"))
            peer.says["/retrieve_partial/7"] = [reply(404, {})]
            while joborch.fetch_tick(server, link):
                pass
        assert all(desk[job].status in joborch.OVER for job in jobs)
        link.confirmed_ids.clear()
        joborch.kill_tick(server, link)
        joborch.watch_tick(server)
        after = {**sizes(server, link, desk.store, desk.store.core), "Link.sessions": 0}  # one for each token
        assert after == {**before, "Link.sessions": 0}
    desk.store.close()
