"""The simulator decides as the program does: the same jobs in the same order as a real Store claims them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import simulate
from simulate import POLICIES, Job, Site
from simulate import simulate as play
from world import HandClock, a_service, heads, new_job

import joborch
from joborch import Candidate, ClientCapacity, Run, ServiceQueue, Sharing, Status, Store
from joborch_base import statements
from joborch_base.states import as_job

SLOTS, QUOTA = (2, 3), 2


def small_trace(seed: int) -> list[Job]:
    """Sixty jobs of five users, some wide, with limits and priorities."""
    chance, at, found = random.Random(seed), 0.0, []
    for number in range(1, 61):
        at += chance.expovariate(1 / 20)
        run_s = chance.uniform(1, 300)
        wide, limit = chance.choice((1, 1, 1, 2, 3)), chance.choice((None, run_s + 30))
        found.append(Job(number, at, chance.choice((1, 1, 1, 2, 3, 4, 5)), run_s, wide, None, limit, chance.choice((0, 0, 5, -5))))
    return found


def claimed_by_a_store(trace: list[Job], policy: str, weights: dict[int, float]) -> list[int]:
    """The order in which a real Store and `choose` let the jobs of a trace begin."""
    clock = HandClock(simulate.EPOCH_S)
    store = Store(":memory:", "server", clock)
    store.set_limits({"s": a_service("s", runs_per_user=QUOTA, max_runs=999, policy=policy)}, Sharing(weights=weights))
    slots = {f"client{number}": count for number, count in enumerate(SLOTS)}
    ends: list[tuple[float, int]] = []
    coming, order = list(trace), []
    while coming or ends:
        ending = bool(ends) and (not coming or min(ends)[0] <= coming[0].at)
        clock.now = simulate.EPOCH_S + (min(ends)[0] if ending else coming[0].at)
        now = clock.now - simulate.EPOCH_S
        if ending:
            ends.sort()
            _, number = ends.pop(0)
            job = as_job(store.read(statements.JOB_GET, id=number)[0])
            assert store.move(job, Status.COMPLETED, "", run_s=trace[number - 1].run_s)
        else:
            one = coming.pop(0)
            new = new_job(user_id=one.user, service="s", priority=one.priority, cpus=one.cpus, timeout=one.timeout)
            assert store.add(new, "").id == one.number
        while True:
            busy = store.jobs(statements.ALL_BUSY)
            places = [
                ClientCapacity(name, count, count - sum(job.cpus for job in busy if job.client == name)) for name, count in slots.items()
            ]
            candidates = [Candidate("s", head.job_id, head.cpus, None, head.timeout) for head in heads(store, "s")]
            runs = {
                name: [
                    Run(job.id, job.cpus, since=job.moved_at - simulate.EPOCH_S, timeout=job.timeout) for job in busy if job.client == name
                ]
                for name in slots
            }
            found = joborch.choose([ServiceQueue("s", slots, 0.0, None, candidates)], places, runs.__getitem__, now)
            if found is None:
                break
            job = store.claim(found[0].job_id, found[1].name, 999)  # type: ignore[assignment]
            assert store.move(job, Status.SUBMITTED, "")
            order.append(job.id)
            ends.append((now + trace[job.id - 1].run_s, job.id))
    store.close()
    return order


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(5))
def test_it_decides_as_a_real_store_does(seed: int, policy: str) -> None:
    trace, weights = small_trace(seed), {1: 0.5, 2: 3.0}
    site = play(trace, Site(policy, SLOTS, QUOTA, Sharing(weights=weights)))
    assert site.order == claimed_by_a_store(trace, policy, weights)
    assert sorted(site.order) == [job.number for job in trace], "every job ran once"


def test_with_shares_a_burst_does_not_hold_up_the_others() -> None:
    """What a policy is chosen for: one user sends 200 jobs, then ten others one each."""
    trace = [Job(number, 0.0, 1, 60.0) for number in range(1, 201)] + [Job(200 + user, 10.0, user, 60.0) for user in range(2, 12)]
    waits = {policy: play(trace, Site(policy, (2,), 99, Sharing())).waits for policy in POLICIES}
    longest = {policy: max(waits[policy][number] for number in range(202, 212)) for policy in POLICIES}
    assert longest["share"] <= 60 * (10 / 2 + 1)
    assert longest["fifo"] > 60 * 90


def test_a_trace_in_the_standard_workload_format(tmp_path: Path) -> None:
    """Version 2.2 (Feitelson): what never ran is left out, what is unknown is -1."""
    lines = [
        "; Computer: an example", "",
        "1 0 5 100 4 -1 -1 4 200 2048 1 7 -1 -1 -1 -1 -1 -1",
        "2 10 -1 -1 -1 -1 -1 1 60 -1 0 8 -1 -1 -1 -1 -1 -1",
        "3 5 0 30 -1 -1 -1 2 -1 -1 1 8 -1 -1 -1 -1 -1 -1",
    ]  # fmt: skip
    (tmp_path / "a.swf").write_text("\n".join(lines))
    assert simulate.read_swf(tmp_path / "a.swf") == [Job(1, 0.0, 7, 100.0, 4, 8, 200.0), Job(3, 5.0, 8, 30.0, 2, None, None)]


def test_the_synthetic_month_is_the_same_each_time_and_heavy_tailed() -> None:
    month = simulate.synthetic_month(3000)
    assert month == simulate.synthetic_month(3000) and len(month) == 3000
    assert simulate.synthetic_month(3000, seed=2) != month
    counts = Counter(job.user for job in month)
    assert sum(count for _, count in counts.most_common(len(counts) // 10)) > 1500, "a tenth of the users send more than half"
    runs = sorted(job.run_s for job in month)
    assert sum(runs) / len(runs) > 3 * runs[len(runs) // 2]


def test_the_tables_and_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--jobs", "300", "--clients", "4", "--plot", str(tmp_path / "plot.svg")]) == 0
    said = capsys.readouterr().out
    assert "300 jobs" in said
    assert all(said.count(f"| {policy} |") == 2 for policy in POLICIES)
    assert len(ElementTree.parse(tmp_path / "plot.svg").getroot()) > 10


def test_an_elastic_pool_runs_every_job_and_costs_less_than_a_fixed_one() -> None:
    trace = [job for job in simulate.synthetic_month(400, days=3.0) if job.cpus <= simulate.INSTANCE_SLOTS]
    found = simulate.pools(trace, quota=5, fixed_slots=(16,), idles_s=(600.0,))
    fixed, elastic = found
    assert len(fixed.waits) == len(elastic.waits) == len(trace)
    work_h = sum(job.cpus * job.run_s for job in trace) / 3600
    assert work_h <= elastic.cost < fixed.cost
    rows = simulate.pool_rows(found, work_h)
    assert [row[0] for row in rows] == ["fixed, 16 slots", elastic.name] and "elastic, idle 10 min" in simulate.comparison(found)
    assert len(ElementTree.fromstring(simulate.plot_cost(found))) > 10
