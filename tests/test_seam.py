"""What a client makes of an executor whose payloads wait in a line: with one whose answers a test chooses.

That Slurm and DIRAC answer so is shown in test_slurm.py and test_dirac.py, against the real systems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from world import Site, ask

import joborch
from joborch import BackendUnavailable, CannotRun, Cause, ConfigError, DataFolder, Outcome, Status, SubmitRefused, end_tick

ALIVE = Outcome(True)


@pytest.fixture
def site(data: DataFolder) -> Iterator[Site]:
    made = Site(data)
    yield made
    made.yard.store.close()


def test_what_waits_is_prepared_for_servers_and_says_why(site: Site) -> None:
    """It runs when the system says so; each is told once, in /events."""
    job = site.submit()
    site.tick()
    site.tick()
    assert site.told(job) == ("Prepared", "in line")
    changed = site.yard[job].changed
    site.tick()
    assert site.yard[job].changed == changed, "no news"
    assert ask(site.yard.client, "GET", f"/retrieve/{job.id}").json["status"] == "Prepared"
    assert ask(site.yard.client, "GET", "/health").json["waiting"] == 1
    site.system.outcomes[job.id] = ALIVE
    site.tick()
    assert site.told(job) == ("Running", "")
    assert site.yard[job].started_at is not None
    assert ask(site.yard.client, "GET", "/health").json["running"] == 1
    site.system.trouble = "the login has ended"
    site.tick()
    assert site.told(job) == ("Running", "the login has ended")
    site.system.trouble = ""
    site.tick()
    assert site.told(job) == ("Running", "")


def test_a_slot_is_a_job(site: Site) -> None:
    """Whatever cores and memory it asks for."""
    jobs = [site.submit(X_Joborch_Cpus="64", X_Joborch_Memory="1000000") for _ in range(7)]
    site.tick()
    assert site.system.has == [job.id for job in jobs[:5]]
    events = ask(site.yard.client, "GET", "/events?since=0").json
    assert (events["slots"], events["job_slots"], events["memory"]) == (5, True, None)


def test_its_time_limit_is_the_systems_affair(site: Site) -> None:
    """Waiting is not running."""
    job = site.submit(X_Joborch_Timeout="5")
    site.tick()
    site.tick(3600)
    joborch.limit_tick(site.yard.client)
    assert site.yard[job].kill_requested_at is None


@pytest.mark.parametrize("error", [BackendUnavailable("away"), SubmitRefused("no such partition")])
def test_what_is_not_taken_waits_and_keeps_nobody_else_waiting(error: Exception, site: Site) -> None:
    """One that the system never takes is tried again and again; the others of its service get their turns."""
    bad, *others = [site.submit() for _ in range(4)]
    site.system.refuses[bad.id] = error
    site.tick()
    assert site.told(bad) == ("Prepared", str(error))
    for _ in range(60):
        site.tick(1.0)
    assert sorted(site.system.has) == [job.id for job in others], "each of them, and once"
    assert site.told(bad) == ("Prepared", str(error))
    site.system.refuses.clear()
    for _ in range(40):
        site.tick(1.0)
    assert site.system.has[-1] == bad.id


def test_new_payloads_are_refused_only_where_nothing_at_all_is_started(site: Site) -> None:
    """Where a service is held, the others of this client go on."""
    held = site.submit()
    site.system.refuses[held.id] = SubmitRefused("no such account")
    site.tick()
    assert "no such account" in ask(site.yard.client, "GET", "/health").json["problem"]
    other = site.submit(X_Joborch_Service="other")
    site.tick(0.1)
    assert other.id in site.system.has
    site.system.trouble = "slurmctld is away"
    with pytest.raises(AssertionError, match="503"):
        site.submit()


def test_what_can_never_run_has_failed(site: Site) -> None:
    job = site.submit()
    site.system.refuses[job.id] = CannotRun("no node has so much")
    site.tick()
    found = site.yard[job]
    assert (found.status, found.cause, found.reason) == (Status.FAILED, "limit", "no node has so much")


def test_a_start_that_was_cut_off_is_looked_for(site: Site) -> None:
    """What the system has is not submitted again; what nobody can tell of is waited for; what it has not is started."""
    had, unclear, lost = jobs = [site.submit() for _ in range(3)]
    for job in jobs:
        assert site.yard.store.move(job, Status.RUNNING, "")
    site.system.has.append(had.id)
    site.system.unclear.add(unclear.id)
    site.restart()
    site.tick()
    assert site.system.has == [had.id, lost.id]
    assert site.yard[had].handle == str(100 + had.id)
    assert (site.yard[unclear].handle, "waits to learn whether it succeeded" in site.told(unclear)[1]) == (None, True)
    site.system.unclear.clear()
    site.tick(5.0)
    assert site.system.has == [had.id, lost.id, unclear.id]


def test_nothing_is_started_while_nobody_can_tell(site: Site) -> None:
    job = site.submit()
    assert site.yard.store.move(job, Status.RUNNING, "")
    site.system.trouble = "away"
    site.restart()
    for _ in range(10):
        site.tick(10.0)
    assert site.system.has == []
    assert site.told(job) == ("Prepared", "away")
    site.system.trouble = ""
    site.tick(60.0)
    assert site.system.has == [job.id]


def test_what_shall_end_is_not_started(site: Site) -> None:
    """Neither in the tick that found it cut off, nor while somebody is just ending it."""
    job, other = site.submit(), site.submit()
    for each in (job, other):
        assert site.yard.store.move(each, Status.RUNNING, "")
    site.yard.store.request_kill(job.id, Cause.CANCELLED)
    assert site.yard.client.payloads.take(other.id)
    joborch.start_again(site.yard.client, [site.yard[job]._replace(kill_requested_at=None), site.yard[other]])
    assert site.system.has == []


def test_one_that_does_not_end_keeps_no_other_from_ending(site: Site) -> None:
    """DIRAC only notes a kill: it is asked again later, and the others meanwhile."""
    first, second = site.submit(), site.submit()
    site.tick()
    site.system.stubborn.add(first.id)
    for job in (first, second):
        site.yard.store.request_kill(job.id, Cause.CANCELLED)
    while end_tick(site.yard.client):
        pass
    assert site.system.cancelled == [first.id, second.id]
    assert [site.yard[job].status for job in (first, second)] == [Status.RUNNING, Status.KILLED]
    site.tick()
    assert site.told(first) == ("Prepared", "it is being stopped: only noted")
    site.system.stubborn.clear()
    site.yard.clock.pass_s(1.0)
    while end_tick(site.yard.client):
        pass
    assert site.yard[first].status is Status.KILLED


def test_outputs_that_cannot_be_had_yet_are_waited_for(site: Site) -> None:
    job = site.submit()
    site.tick()
    site.system.outcomes[job.id], site.system.collects = Outcome(False, 0), BackendUnavailable("the store is away")
    site.tick()
    assert site.yard[job].status is Status.RUNNING
    assert "the store is away" in site.told(job)[1]
    site.system.collects = None
    site.tick()
    assert site.yard[job].status is Status.COMPLETED


@pytest.mark.parametrize(
    ("outcome", "status", "cause", "reason"),
    [
        (Outcome(False, cause=Cause.CANCELLED, reason="somebody did"), Status.KILLED, "cancelled", "somebody did"),
        (Outcome(False, 143, cause=Cause.LIMIT), Status.FAILED, "limit", "run.sh was stopped at its time limit of 5.0 s"),
        (Outcome(False, 137, cause=Cause.LIMIT, reason="memory"), Status.FAILED, "limit", "memory"),
        (Outcome(False, cause=Cause.INFRASTRUCTURE, reason="the node"), Status.FAILED, "infrastructure", "the node"),
    ],
)
def test_how_it_ended(outcome: Outcome, status: Status, cause: str, reason: str, site: Site) -> None:
    job = site.submit(X_Joborch_Timeout="5")
    site.tick()
    site.system.outcomes[job.id] = outcome
    site.tick()
    found = site.yard[job]
    assert (found.status, found.cause, found.reason, found.exit_code) == (status, cause, reason, outcome.exit_status)
    assert found.started_at is None, "it never began, as far as anybody knows"


def test_a_mark_outlives_a_power_failure(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's job does: so what says that it may be there is on the disk before it is handed over."""
    durable: list[bool] = []
    write = site.yard.store.write

    def noted(change: Any, durable_now: bool = True, **more: Any) -> Any:
        durable.append(more.get("durable", durable_now))
        return write(change, more.get("durable", durable_now))

    job = site.submit()
    monkeypatch.setattr(site.yard.store, "write", noted)
    monkeypatch.setattr(site.system, "start", lambda _: "7" if durable[-1] else pytest.fail("handed over before it was on the disk"))
    site.tick()
    assert site.yard[job].handle == "7"


def test_no_executor_takes_up_what_another_started(site: Site) -> None:
    """It could only lose it: a start is refused while something runs, and says with which to start."""
    client = site.yard.client
    joborch.check_executor(client)
    job = site.submit()
    site.tick()
    client.config = dataclasses.replace(client.config, executor="slurm")
    with pytest.raises(ConfigError, match="1 payloads here were started by 'local': start it with --executor local"):
        joborch.check_executor(client)
    site.system.outcomes[job.id] = Outcome(False, 0)
    site.tick()
    joborch.check_executor(client)
    assert (site.yard.data.path / "executor").read_text() == "slurm"


# == What a batch system does not take ==


def test_what_was_held_begins_with_who_has_waited_longest(site: Site) -> None:
    """A submit limit is reached, more come meanwhile, and some of them were never even tried: when it is over, the first is first."""
    limit = SubmitRefused("AssocMaxSubmitJobLimit")
    jobs = []
    site.system.limit = 0
    for _ in range(5):
        jobs.append(site.submit())
        site.tick(0.3)
    assert site.system.has == []
    for _ in range(30):
        site.tick(1.0)
    assert {site.told(job) for job in jobs} == {("Prepared", str(limit))}
    assert site.system.tries < 60, "with each that comes the first is tried again, and nobody else but those that never were"
    for most in (1, 2, 4, 5):
        site.system.limit = most
        for _ in range(35):
            site.tick(1.0)
        assert site.system.has == [job.id for job in jobs[:most]]


def test_the_limit_ends_while_another_comes(site: Site) -> None:
    first = site.submit()
    site.system.limit = 0
    site.tick()
    for _ in range(20):
        site.tick(1.0)
    site.system.limit = 9
    second = site.submit()
    for _ in range(4):
        site.tick(0.5)
    assert site.system.has == [first.id, second.id]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_trouble_of_some_holds_up_nobody(count: int, data: joborch.DataFolder) -> None:
    """Whatever the batch system has against some payloads, the next one begins within seconds, and so do those after it."""
    site = Site(data, slots=50)
    bad = [site.submit() for _ in range(count)]
    site.system.refuses = {job.id: SubmitRefused("Unspecified error") for job in bad}
    for _ in range(200):
        site.tick(1.0)
    for round_ in range(5):
        good = [site.submit() for _ in range(3)]
        for _ in range(6 if round_ == 0 else 3):
            site.tick(1.0)
        assert {job.id for job in good} <= set(site.system.has)
    for job in bad:
        site.yard.store.request_kill(job.id, Cause.CANCELLED)
        joborch.end_tick(site.yard.client)
        assert site.yard[job].status is Status.KILLED, "at once"
    site.tick(60.0)
    assert not site.yard.client.holds.held and not set(site.system.has) & {job.id for job in bad}
    site.yard.store.close()
