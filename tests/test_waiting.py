"""What callers ask of the queue and are told of it: priorities, jobs that follow others, limits, clients that are chosen and held back."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
from harness import BOUNDARY, field_part, file_part, form
from hypothesis import given
from hypothesis import strategies as st
from world import BOUNDED, Desk, Peer, Said, ask, reply, send_next, tried

import joborch
from joborch import BUSY, DataFolder, Job, Status
from joborch_base import statements
from joborch_base.states import as_job

pytestmark = pytest.mark.usefixtures("no_long_polls")


SENT = [reply(200, {"id": 7})]


@pytest.fixture(name="peers")
def peers_fixture() -> Iterator[list[Peer]]:
    """Three clients that take everything."""
    made = [Peer() for _ in range(3)]
    for peer in made:
        peer.says["/submit"] = SENT
    yield made
    for peer in made:
        peer.close()


@pytest.fixture(name="desk")
def desk_fixture(peers: list[Peer], data: DataFolder) -> Iterator[Desk]:
    """A server with the service `example` at two of them, `b` at the second and third; each has been heard and has two slots."""
    urls = [peer.url for peer in peers]
    made = Desk(data, ",".join(urls[:2]), SERVICE_B_CLIENTS=",".join(urls[1:]), JOBORCH_MIN_FREE="0", SERVICE_B_TOKEN="a-token")
    hear(made)
    yield made
    made.store.close()


def hear(desk: Desk) -> None:
    """All clients answer, and say that they have two slots."""
    for link in desk.server.links.values():
        link.heard()
        link.slots = 2
    links_of(desk)[1].load = 50.0  # so that the first is the better one where both are free


def links_of(desk: Desk) -> list[joborch.Link]:
    """The client of `example` alone, the one of both, the one of `b` alone."""
    example, b = (desk.server.services[name].addresses for name in ("example", "b"))
    return [desk.server.links[address.name] for address in (*example, b[1])]


def upload(desk: Desk, user_id: int = 1, service: str = "example", **fields: Any) -> Said:
    """POST /upload with further fields; no two at the same instant."""
    desk.clock.pass_s(0.001)
    texts = {"user_id": user_id, "service": service, **fields}
    parts = [file_part("run.sh", b"true"), *(field_part(name, str(value)) for name, value in texts.items())]
    return ask(desk.server, "POST", "/upload", form(parts), Content_Type=f"multipart/form-data; boundary={BOUNDARY}")


def uploaded(desk: Desk, *arguments: Any, **fields: Any) -> Job:
    """The job of an upload that is taken."""
    said = upload(desk, *arguments, **fields)
    assert said.status == 201, said.json
    job = desk.store.get(said.json["id"])
    assert job is not None
    return job


def send_all(desk: Desk) -> list[str]:
    """Let the dispatcher and all senders work until nothing is to be done; where each busy job is."""
    for _ in range(100):
        moved = joborch.dispatch_tick(desk.server)
        for link in desk.server.links.values():
            moved = joborch.send_tick(desk.server, link) or moved
        if not moved:
            break
    return [str(job.client) for job in desk.store.jobs("SELECT * FROM jobs ORDER BY id") if job.status in BUSY]


def end(desk: Desk, job: Job, to: Status = Status.COMPLETED, **changes: Any) -> None:
    """Let a job run and end."""
    steps = {Status.QUEUED: (Status.PROCESSING, Status.SUBMITTED, to), Status.SUBMITTED: (to,)}[desk[job].status]
    for step in steps:
        assert desk.store.move(desk[job], step, f"to {step}", **({**changes} if step is to else {}))


# == Fields of an upload ==


def test_priority_is_heeded_within_a_user(desk: Desk) -> None:
    low, high, first = uploaded(desk, priority=-5), uploaded(desk, priority=7), uploaded(desk, priority="+7")
    order = []
    for _ in range(3):
        joborch.dispatch_tick(desk.server)
        order += [job.id for link in desk.server.links.values() for job in link.outbox]
        for link in desk.server.links.values():
            joborch.send_tick(desk.server, link)
    assert order == [high.id, first.id, low.id]
    assert ask(desk.server, "GET", f"/jobs/{high.id}").json["priority"] == 7


@pytest.mark.parametrize("priority", ["101", "-101", "x", "1.5"])
def test_a_priority_that_cannot_be_used_is_refused(priority: str, desk: Desk) -> None:
    said = upload(desk, priority=priority)
    assert (said.status, said.json["field"]) == (400, "priority")
    assert "-100 to 100" in said.json["message"]


def test_a_job_waits_for_those_that_it_follows(desk: Desk) -> None:
    before = [uploaded(desk), uploaded(desk)]
    job = uploaded(desk, after=f" {before[1].id}, {before[0].id},")
    said = ask(desk.server, "GET", f"/jobs/{job.id}").json
    assert said["after"] == [job.id for job in before]
    assert said["waiting_for"] == f"it follows job {before[0].id}, which is Queued, and 1 other job"
    assert said["queue_position"] is None
    send_all(desk)
    assert desk[job].status is Status.QUEUED
    end(desk, before[1])
    assert ask(desk.server, "GET", f"/jobs/{job.id}").json["waiting_for"] == f"it follows job {before[0].id}, which is Submitted"
    end(desk, before[0])
    send_all(desk)
    assert desk[job].status is Status.SUBMITTED


@pytest.mark.parametrize("how", [Status.FAILED, Status.INVALID, Status.KILLED])
def test_a_chain_breaks_where_one_ends_badly(how: Status, desk: Desk) -> None:
    """Those that follow are Invalid, each with the reason; also what is uploaded afterwards."""
    first = uploaded(desk)
    second = uploaded(desk, after=first.id)
    third = uploaded(desk, after=f"{first.id},{second.id}")
    other = uploaded(desk)
    send_all(desk)
    end(desk, first, how)
    assert (desk[second].status, desk[second].cause) == (Status.INVALID, "user")
    assert desk[second].reason == f"job {first.id}, which it follows, ended as {how}"
    assert desk[third].status is Status.INVALID
    late = uploaded(desk, after=third.id)
    assert (late.status, late.reason) == (Status.INVALID, f"job {third.id}, which it follows, ended as Invalid")
    assert desk[other].status is Status.SUBMITTED


def test_a_long_chain_breaks_at_once(desk: Desk) -> None:
    """No depth of the interpreter's stack limits it."""
    first = job = desk.upload()
    for _ in range(1500):
        job = desk.store.add(joborch.NewJob(f"u{job.id}", 1, "example", after_ids=str(job.id)), "")
    desk.store.move(first, Status.KILLED, "")
    assert desk[job].status is Status.INVALID


def test_what_was_completed_counts_also_after_its_files_were_cleaned(desk: Desk) -> None:
    done, failed = uploaded(desk), uploaded(desk)
    send_all(desk)
    end(desk, done)
    end(desk, failed, Status.FAILED)
    for job in (done, failed):
        desk.store.move(desk[job], Status.CLEANED, "")
    assert uploaded(desk, after=done.id).blocked == 0
    assert uploaded(desk, after=failed.id).status is Status.INVALID


@pytest.mark.parametrize("after", ["x", "1;2", "-1", "99999999999999999999", ",".join(map(str, range(1, 1002)))])
def test_what_is_no_list_of_jobs_is_refused(after: str, desk: Desk) -> None:
    said = upload(desk, after=after)
    assert (said.status, said.json["field"]) == (400, "after")


def test_jobs_that_are_not_there_or_not_yours_are_refused(desk: Desk) -> None:
    theirs = uploaded(desk, 2)
    for job_id in (theirs.id, 12345):
        said = upload(desk, 1, after=job_id)
        assert (said.status, said.json) == (400, {"message": f"after: user 1 has no job {job_id}", "field": "after"})
    assert len(list(desk.data.jobs.iterdir())) == 1, "nothing of it stays"


def test_too_many_queued_jobs_of_one_user_are_refused(desk: Desk) -> None:
    desk.restart(JOBORCH_MAX_QUEUED_PER_USER="2")
    uploaded(desk)
    uploaded(desk, service="b")
    said = upload(desk)
    assert (said.status, said.json["field"], said.headers["Retry-After"]) == (429, "user_id", "60")
    assert "user 1 has 2 jobs queued" in said.json["message"]
    uploaded(desk, 2)
    hear(desk)
    send_all(desk)
    uploaded(desk)


def test_what_no_client_could_ever_run_is_refused_with_the_largest(desk: Desk, peers: list[Peer]) -> None:
    links = links_of(desk)
    links[1].slots, links[1].memory = 8, 4096
    said = upload(desk, cpus=9)
    assert (said.status, said.json["field"]) == (400, "cpus")
    assert said.json["message"] == (
        f"no client for example is large enough: it needs 9 slots, and the largest, {links[1].name}, has 8 slots"
    )
    links[0].memory = 100
    said = upload(desk, memory=5000)
    assert (said.status, said.json["field"]) == (400, "memory")
    assert "8 slots and 4,096 MiB" in said.json["message"]
    links[0].heard_at = None
    uploaded(desk, cpus=9)  # who was never heard may be larger


# == Clients ==


def test_jobs_go_to_the_client_with_most_free_slots(desk: Desk) -> None:
    names = [link.name for link in links_of(desk)]
    for user_id in range(3):
        uploaded(desk, user_id)
    assert sorted(send_all(desk)) == sorted([names[0], names[1], names[0]])
    for user_id in range(9):
        uploaded(desk, user_id)
    assert sorted(send_all(desk)) == sorted([names[0], names[1]] * 2), "the rest waits here, where any client can take it"
    said = ask(desk.server, "GET", "/jobs?status=Queued&limit=1").json["jobs"][0]
    assert "all 4 slots of 2 clients are in use" in ask(desk.server, "GET", f"/jobs/{said['id']}").json["waiting_for"]


def test_one_client_serves_several_services(desk: Desk) -> None:
    """A long queue of one does not keep the other's job waiting: of whose limit less is in use, goes first."""
    for user_id in range(20):
        uploaded(desk, user_id)
    send_all(desk)
    job = uploaded(desk, 99, "b")
    _, both, third = links_of(desk)
    third.drained = True
    running = next(busy for busy in desk.store.jobs(statements.ALL_BUSY) if busy.client == both.name)
    end(desk, running)
    send_all(desk)
    assert desk[job].status is Status.SUBMITTED


def test_a_client_that_hangs_holds_up_nobody(desk: Desk) -> None:
    """Its senders are taken, so it gets nothing more; the other goes on."""
    first, second, _ = links_of(desk)
    first.slots = second.slots = 50
    assert all(first.hold(number) for number in (-1, -2, -3))
    for user_id in range(5):
        uploaded(desk, user_id)
    assert send_all(desk) == [second.name] * 5


def test_what_is_asked_again_takes_a_lane_like_every_other(desk: Desk) -> None:
    """Else a job would be claimed for a client all of whose senders wait for answers, while another could run it."""
    first, second, _ = links_of(desk)
    first.slots = 50
    lost = [uploaded(desk, user_id) for user_id in range(4)]
    for job in lost:
        assert desk.store.claim(job.id, first.name, 50)
        assert desk.store.move(desk[job], Status.UNKNOWN, "no answer")
    taken = [joborch.next_to_send(desk.server, first) for _ in range(3)]
    assert [job and job.id for job in taken] == [job.id for job in lost[:3]]
    assert not first.has_free_sender()
    new = uploaded(desk, 9)
    joborch.dispatch_tick(desk.server)
    assert [job.id for job in second.outbox] == [new.id]


def test_a_drained_client_gets_no_jobs_until_it_is_resumed(desk: Desk) -> None:
    first, second, _ = (link.name for link in links_of(desk))
    said = ask(desk.server, "POST", f"/clients/{first}/drain")
    assert (said.status, said.json["drained"], said.json["name"]) == (200, True, first)
    desk.restart()
    hear(desk)
    for user_id in range(3):
        uploaded(desk, user_id)
    assert send_all(desk) == [second] * 2, "a restart does not change it"
    assert ask(desk.server, "POST", f"/clients/{second}/drain").status == 200
    waiting = ask(desk.server, "GET", "/jobs/3").json["waiting_for"]
    assert waiting.startswith("no client for example takes jobs") and waiting.count("is drained") == 2
    assert ask(desk.server, "POST", f"/clients/{first}/resume").json["drained"] is False
    assert send_all(desk) == [second, second, first]
    for name in ("resume", "drain"):
        unknown = ask(desk.server, "POST", f"/clients/nobody:1/{name}")
        assert unknown.status == 404 and first in unknown.json["message"]


def test_a_client_below_a_path_can_be_drained(peers: list[Peer], data: DataFolder) -> None:
    desk = Desk(data, f"{peers[0].url}/a/b")
    name = desk.link.name
    assert name.endswith("/a/b")
    assert ask(desk.server, "POST", f"/clients/{name}/drain").json["drained"] is True
    desk.store.close()


def test_clients_and_services_are_shown(desk: Desk) -> None:
    first, second, third = links_of(desk)
    uploaded(desk)
    send_next(desk.server, first)
    desk.clock.pass_s(40)
    second.failed("cannot be reached: connection refused")
    clients = ask(desk.server, "GET", "/clients").json["clients"]
    clients.sort(key=lambda client: [first.name, second.name, third.name].index(client["name"]))
    assert [client["services"] for client in clients] == [["example"], ["b", "example"], ["b"]]
    assert [client["jobs"] for client in clients] == [1, 0, 0]
    assert [client["free"] for client in clients] == [1, 2, 2]
    assert clients[1]["trouble"] == "cannot be reached: connection refused (40 s ago)" and clients[1]["held_for_s"] > 0
    assert clients[0]["trouble"] == "" and clients[0]["last_seen"].endswith("Z")
    services = {service["name"]: service for service in ask(desk.server, "GET", "/services").json["services"]}
    assert {client["name"] for client in services["b"]["clients"]} == {second.name, third.name}
    assert (services["example"]["running"], services["example"]["queued"], services["example"]["policy"]) == (1, 0, "share")


# == Users ==


def test_weights_are_set_by_callers_and_settings(desk: Desk) -> None:
    desk.restart(JOBORCH_WEIGHTS="7=2, 8=0.5")
    said = ask(desk.server, "GET", "/users/7").json
    assert (said["user_id"], said["weight"], said["queued"]) == (7, 2.0, 0)
    assert [(each["name"], each["runs"]) for each in said["services"]] == [("b", 0), ("example", 0)]
    assert ask(desk.server, "PUT", "/users/7?weight=3").json["weight"] == 3.0
    desk.restart()
    assert [ask(desk.server, "GET", f"/users/{user}").json["weight"] for user in (7, 8, -9)] == [3.0, 0.5, 1.0]
    hear(desk)
    for user_id in (7, 8):
        end(desk, uploaded(desk, user_id), run_s=10.0)
        uploaded(desk, user_id)
    said = [ask(desk.server, "GET", f"/users/{user}").json["services"][-1] for user in (7, 8)]
    assert [each["used_slot_s"] for each in said] == pytest.approx([10.0, 10.0])
    assert [each["turns_before"] for each in said] == [0, 1], "the same use counts six times as much with a sixth of the weight"
    assert ask(desk.server, "PUT", "/users/8?weight=100").json["services"][-1]["turns_before"] == 0, "at once"


@pytest.mark.parametrize("weight", ["", "0", "-1", "nan", "x", "1e9", "1000001"])
def test_what_is_no_weight_is_refused(weight: str, desk: Desk) -> None:
    said = ask(desk.server, "PUT", f"/users/7?weight={weight}")
    assert (said.status, said.json["field"]) == (400, "weight")


@pytest.mark.parametrize("user_id", ["x", "1.5", "99999999999999999999"])
def test_what_is_no_user_is_refused(user_id: str, desk: Desk) -> None:
    for method, query in (("GET", ""), ("PUT", "?weight=1")):
        assert ask(desk.server, method, f"/users/{user_id}{query}").status == 400


# == Places and times ==


@pytest.mark.parametrize("policy", ["share", "fifo", "priority"])
def test_places_in_the_line(policy: str, desk: Desk) -> None:
    """The first is 1; who comes later stands behind, but where his turn comes first."""
    desk.restart(SERVICE_EXAMPLE_POLICY=policy)
    jobs = [uploaded(desk, user_id, priority=priority) for user_id, priority in ((1, 0), (1, 0), (2, 0), (3, 5))]
    places = [ask(desk.server, "GET", f"/jobs/{job.id}").json["queue_position"] for job in jobs]
    assert places == {"share": [1, 4, 2, 3], "fifo": [1, 2, 3, 4], "priority": [2, 3, 4, 1]}[policy]


def test_when_a_job_may_start_is_told_from_past_runs_and_not_invented(desk: Desk) -> None:
    assert uploaded(desk) and ask(desk.server, "GET", "/jobs/1").json["estimated_start"] is None, "nothing has run yet"
    end(desk, desk[as_job(desk.store.read("SELECT * FROM jobs WHERE id = 1")[0])], run_s=120.0)
    jobs = [uploaded(desk, user_id) for user_id in range(10, 20)]
    starts = [ask(desk.server, "GET", f"/jobs/{job.id}").json["estimated_start"] for job in jobs]
    now = desk.clock.wall()
    rounds = [(number // 4) * 120.0 for number in range(10)]
    assert starts == [joborch.rfc3339(now + wait_s) for wait_s in rounds], "four slots, two minutes a round"
    for link in desk.server.links.values():
        link.drained = True
    assert ask(desk.server, "GET", f"/jobs/{jobs[0].id}").json["estimated_start"] is None, "nobody takes it now"


@BOUNDED
@given(st.text(max_size=20), st.text(max_size=20))
def test_whatever_is_written_as_a_field_is_answered(priority: str, after: str) -> None:
    """A refusal that names it, or a value."""
    for name, text in (("priority", priority), ("after", after)):
        found = tried(functools.partial(joborch.FORM_FIELDS[name].value, text), joborch.HttpError)
        if isinstance(found, joborch.HttpError):
            assert (found.status, found.field) == (400, name) and found.message.isprintable()
