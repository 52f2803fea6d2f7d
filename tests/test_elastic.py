"""Which cloud instances are wanted: up for the work that waits, down when idle, within quota, budget and maximum, without flapping."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joborch_base.elastic import BOOT_S, EXPECTED, Demand, Instance, Size, Wanted, wanted_instances

GIB = 1 << 30
UNI = Size("uni", 4, 4, 8 * GIB, 0.4, 0, 10, 600.0, 900.0, None, frozenset({"docking", "md"}))
BIG = dataclasses.replace(UNI, cloud="big", slots=16, cpus=16, memory=64 * GIB, hourly_cost=1.2)
NOW = 1_000_000.0


def decide(demand: Any = (), instances: Any = (), sizes: Any = (UNI,), **facts: Any) -> Wanted:
    """The decision, with what a test does not care about left out."""
    known: dict[str, Any] = {"free_slots_elsewhere": {}, "spent_today": {}, "held": {}, "boot_s": {}, "run_s": {}, "now": NOW} | facts
    return wanted_instances(demand=demand, sizes=sizes, instances=instances, **known)


def jobs(count: int, service: str = "docking", cpus: int = 1, memory: int | None = None, waited_s: float = 1.0) -> Demand:
    return Demand(service, cpus, memory, count, NOW - waited_s)


def instance(
    uuid: str, state: str = "joined", running: int = 0, idle_s: float | None = None, age_s: float = 7200.0, **more: Any
) -> Instance:
    return Instance(uuid, more.get("cloud", "uni"), state, NOW - age_s, running, None if idle_s is None else NOW - idle_s)


# == Up ==


def test_the_first_job_of_an_empty_pool_gets_an_instance_at_once() -> None:
    found = decide([jobs(1, waited_s=0.0)], run_s={"docking": 0.01})
    assert (found.create, found.drain, found.waits) == ((("uni", 1),), (), {})
    assert found.reasons == ("uni gets 1 instance: 1 job of docking wait",)


def test_nothing_waits_and_nothing_is_made() -> None:
    assert decide() == Wanted()
    assert decide([jobs(0)]) == Wanted()


@pytest.mark.parametrize(("count", "run_s", "made"), [(9, None, 3), (9, 3600.0, 3), (50, BOOT_S / 10, 2), (40, BOOT_S / 10, 1)])
def test_as_many_as_the_work_fills(count: int, run_s: float | None, made: int) -> None:
    """Jobs of unknown or long runs get a slot each; short ones share a slot for as long as another instance would boot."""
    known: Mapping[str, float] = {} if run_s is None else {"docking": run_s}
    assert decide([jobs(count)], run_s=known).create == (("uni", made),)


def test_jobs_that_an_instance_takes_soon_get_no_other() -> None:
    """Whether it is only meant, boots, is idle, or will end short payloads."""
    for state in ("intended", "booting"):
        assert decide([jobs(4)], [instance("a", state)]).create == ()
        assert decide([jobs(5)], [instance("a", state)]).create == (("uni", 1),)
    assert decide([jobs(4, waited_s=9999.0)], [instance("a", idle_s=1.0)]).create == ()
    busy = [instance("a", running=4)]
    assert decide([jobs(4)], busy, run_s={"docking": 60.0}).create == ()
    assert decide([jobs(4)], busy, run_s={"docking": 36000.0}).create == (("uni", 1),)
    assert decide([jobs(4, waited_s=9999.0)], busy, run_s={"docking": 60.0}).create == (("uni", 1),), "they do not end"


def test_what_goes_away_is_no_room() -> None:
    for state in ("draining", "ending"):
        assert decide([jobs(1)], [instance("a", state)]).create == (("uni", 1),)


def test_free_slots_elsewhere_come_first_unless_the_jobs_cannot_use_them() -> None:
    elsewhere = {"docking": 3}
    assert decide([jobs(3)], free_slots_elsewhere=elsewhere).create == ()
    assert decide([jobs(2), jobs(2)], free_slots_elsewhere=elsewhere).create == (("uni", 1),)
    assert decide([jobs(3, waited_s=9999.0)], free_slots_elsewhere=elsewhere).create == (("uni", 1),)


def test_a_wide_payload_may_fill_an_instance_that_looks_free() -> None:
    """One payload can take all slots: jobs that wait for longer than a boot are not told that there is room."""
    wide = [instance("a", running=1)]
    assert decide([jobs(1)], wide).create == ()
    assert decide([jobs(1, waited_s=9999.0)], wide).create == (("uni", 1),)


@pytest.mark.parametrize(
    ("wanted", "made"),
    [
        (jobs(1), {"uni": 1}),
        (jobs(1, cpus=8), {"big": 1}),
        (jobs(1, memory=9 * GIB), {"big": 1}),
        (jobs(8), {"uni": 2}),
        (jobs(40), {"big": 2, "uni": 2}),
    ],
    ids=str,
)
def test_the_cheapest_that_fits(wanted: Demand, made: dict[str, int]) -> None:
    """By cores and memory; a large one only for as many jobs as make it the cheaper one."""
    assert dict(decide([wanted], sizes=(BIG, UNI)).create) == made


def test_memory_bounds_how_many_jobs_share_an_instance() -> None:
    assert decide([jobs(4, memory=4 * GIB)]).create == (("uni", 2),)


@pytest.mark.parametrize(
    ("changes", "facts", "said"),
    [
        ({"max": 2}, {}, "uni has all of its 2 instances"),
        ({"max": 0}, {}, "uni may have no instance"),
        ({}, {"held": {"uni": "its quota is reached"}}, "uni is held back: its quota is reached"),
        ({"daily_budget": 0.2}, {"spent_today": {"uni": 0.15}}, "uni has spent 0.15 of 0.2 for today, and one more would exceed that"),
    ],
)
def test_the_next_cloud_takes_over(changes: dict[str, Any], facts: dict[str, Any], said: str) -> None:
    """When one is full, held back or out of budget; without another, the jobs learn why they wait."""
    full = dataclasses.replace(UNI, **changes)
    there = [instance("a", running=4), instance("b", running=4)] if "max" in changes else []
    both = decide([jobs(2)], there, sizes=(full, BIG), **facts)
    assert (both.create, both.waits) == ((("big", 1),), {})
    alone = decide([jobs(2)], there, sizes=(full,), **facts)
    assert (alone.create, alone.waits) == ((), {"docking": said})
    assert f"2 jobs of docking wait: {said}" in alone.reasons


def test_jobs_that_no_cloud_can_run() -> None:
    found = decide([jobs(2, cpus=64, memory=GIB)])
    assert (found.create, found.waits) == ((), {"docking": "no cloud has instances with 64 slots and 1.0 GiB of memory for it"})
    assert decide([jobs(2, service="other")]) == Wanted(), "a service that no cloud serves"


def test_the_minimum_is_kept_unless_there_is_no_money() -> None:
    two = dataclasses.replace(UNI, min=2, daily_budget=1.0)
    assert decide(sizes=(two,)).create == (("uni", 2),)
    assert decide([jobs(8)], sizes=(two,)).create == (("uni", 2),), "the minimum has room for the jobs"
    assert decide(instances=[instance("a", idle_s=9999.0), instance("b")], sizes=(two,)).drain == ()
    poor = decide(instances=[instance("a", idle_s=9999.0)], sizes=(two,), spent_today={"uni": 1.0})
    assert (poor.create, poor.drain) == ((), ())
    assert "uni has fewer than its minimum of 2: uni has spent 1.00 of 1 for today, and one more would exceed that" in poor.reasons


# == Down ==


def test_the_longest_idle_is_drained_first_one_at_a_time() -> None:
    there = [instance("a", idle_s=700.0), instance("b", idle_s=800.0), instance("c", running=1), instance("d", idle_s=10.0)]
    found = decide(instances=there)
    assert (found.drain, found.reasons) == (("b",), ("instance b of uni is drained: it has been idle for 10 min",))
    assert decide(instances=there[2:]).drain == ()


def test_an_idle_instance_stays_for_jobs_that_fit_it() -> None:
    idle = [instance("a", idle_s=700.0)]
    assert decide([jobs(1)], idle) == Wanted(
        reasons=("1 job of docking wait for slots that are free, or will be as soon as a new instance could be",)
    )
    assert decide([jobs(1, service="other")], idle).drain == ("a",)


@pytest.mark.parametrize(("age_s", "drained"), [(3200, False), (3301, True), (3599, True), (3601, False), (7000, True)])
def test_a_paid_hour_is_used(age_s: float, drained: bool) -> None:
    hours = dataclasses.replace(UNI, paid_by_hour=True)
    assert bool(decide(instances=[instance("a", idle_s=700.0, age_s=age_s)], sizes=(hours,)).drain) is drained


def test_at_the_budget_busy_instances_are_drained_too() -> None:
    """Down to the minimum: their payloads end in peace, and what has none goes first."""
    poor = dataclasses.replace(UNI, daily_budget=5.0, min=1)
    there = [instance("a", running=2), instance("b", running=1), instance("c", idle_s=1.0)]
    spent = {"uni": 5.0}
    assert decide([jobs(9)], there, (poor,), spent_today=spent).drain == ("c",)
    assert decide([jobs(9)], there[:2], (poor,), spent_today=spent).drain == ("b",)
    assert decide([jobs(9)], there[:1], (poor,), spent_today=spent).drain == ()


def test_instances_of_a_cloud_that_left_the_settings() -> None:
    gone = [instance("a", cloud="old", running=1), instance("b", cloud="old", idle_s=1.0), instance("c", "booting", cloud="old")]
    found = decide(instances=gone)
    assert (found.drain, found.reasons) == (("b",), ("instance b is drained: its cloud old is no longer in the settings",))


def test_a_clock_that_was_set_back_ends_nothing() -> None:
    assert decide(instances=[instance("a", idle_s=-86400.0, age_s=-86400.0)]).drain == ()


# == What always holds ==

CLOUDS = ("a", "b", "gone")
SIZES = st.builds(
    Size, st.sampled_from(CLOUDS[:2]), st.integers(1, 8), st.integers(1, 8), st.none() | st.integers(1, 8).map(lambda n: n * GIB),
    st.floats(0, 2), st.integers(0, 3), st.integers(0, 6), st.sampled_from((60.0, 600.0)), st.just(900.0), st.none() | st.floats(0, 5),
    st.frozensets(st.sampled_from(("docking", "md"))), st.booleans(),
)  # fmt: skip
INSTANCES = st.builds(
    Instance, st.uuids().map(str), st.sampled_from(CLOUDS), st.sampled_from((*EXPECTED, "draining", "ending")),
    st.floats(NOW - 1e5, NOW + 1e5), st.integers(0, 9), st.none() | st.floats(NOW - 5000, NOW + 100),
)  # fmt: skip
DEMAND = st.builds(
    Demand, st.sampled_from(("docking", "md", "other")), st.integers(1, 9), st.none() | st.integers(0, 9).map(lambda n: n * GIB),
    st.integers(0, 60), st.floats(NOW - 5000, NOW + 100),
)  # fmt: skip
BY_CLOUD = st.dictionaries(st.sampled_from(CLOUDS), st.floats(0, 6))
FACTS = st.fixed_dictionaries(
    {
        "demand": st.lists(DEMAND, max_size=4),
        "instances": st.lists(INSTANCES, max_size=8, unique_by=lambda each: each.uuid),
        "sizes": st.lists(SIZES, max_size=2, unique_by=lambda each: each.cloud),
        "free_slots_elsewhere": st.dictionaries(st.sampled_from(("docking", "md")), st.integers(-2, 9)),
        "spent_today": BY_CLOUD,
        "held": st.dictionaries(st.sampled_from(CLOUDS), st.just("it does not answer")),
        "boot_s": st.dictionaries(st.sampled_from(CLOUDS), st.floats(0, 600)),
        "run_s": st.dictionaries(st.sampled_from(("docking", "md")), st.floats(0, 1e5)),
    }
)


@given(facts=FACTS)
@settings(max_examples=200, deadline=None)
def test_limits_hold_whatever_is_asked(facts: dict[str, Any]) -> None:
    found = decide(**facts)
    made, sizes = Counter(dict(found.create)), {size.cloud: size for size in facts["sizes"]}
    instances = {each.uuid: each for each in facts["instances"]}
    for cloud, count in made.items():
        size, there = sizes[cloud], [each for each in instances.values() if each.cloud == cloud]
        assert count > 0 and len(there) + count <= size.max
        assert cloud not in facts["held"]
        wasted = 0.0 if size.paid_by_hour else (facts["boot_s"].get(cloud, BOOT_S) + size.idle_s) / 3600 - 1
        if size.daily_budget is not None:
            assert facts["spent_today"].get(cloud, 0.0) + count * size.hourly_cost * (1 + wasted) <= size.daily_budget + 1e-6
        filling = sum(each.jobs for each in facts["demand"] if size.fits(each))
        minimum = max(0, size.min - sum(each.state in EXPECTED for each in there))
        assert count <= max(minimum, minimum + filling), "each has a job to run, or belongs to the minimum"
    drained = Counter(instances[uuid].cloud for uuid in found.drain)
    assert all(count == 1 for count in drained.values())
    for each in map(instances.__getitem__, found.drain):
        size, spent = sizes.get(each.cloud), facts["spent_today"].get(each.cloud, 0.0)
        poor = size is not None and size.daily_budget is not None and spent >= size.daily_budget
        assert each.state == "joined" and (not each.running or poor)
        assert size is None or sum(one.cloud == each.cloud and one.state in EXPECTED for one in instances.values()) > size.min
        assert not made[each.cloud]
    assert len(found.reasons) >= len(made) + len(found.drain)


@given(facts=FACTS, rounds=st.just(8))
@settings(max_examples=150, deadline=None)
def test_what_was_decided_is_not_decided_again(facts: dict[str, Any], rounds: int) -> None:
    """No flapping: with the new instances there, the same facts create no more, and drain none of the new ones.

    Several kinds of jobs may be spread over several clouds in another way the next time. Even then it soon comes to rest.
    """
    decided = decide(**facts)
    for number in range(rounds):
        new = [
            Instance(f"{number} {cloud} {count}", cloud, "intended", NOW, 0, None)
            for cloud, many in decided.create
            for count in range(many)
        ]
        kept = [dataclasses.replace(each, state="draining") if each.uuid in decided.drain else each for each in facts["instances"]]
        facts["instances"] = [*kept, *new]
        decided = decide(**facts)
        assert not {each.uuid for each in new} & set(decided.drain)
        if len(facts["demand"]) <= 1 or len(facts["sizes"]) <= 1:
            assert decided.create == ()
    assert decided.create == ()


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 4000), st.floats(1, 2000)), min_size=1, max_size=12),
    boot_s=st.floats(1, 300), idle_s=st.floats(60, 900),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_pool_grows_and_goes_and_every_job_runs(arrivals: list[tuple[float, float]], boot_s: float, idle_s: float) -> None:
    """Played in steps of 10 s: no payload is cut, no instance goes before it was idle for its time, and at last none is left."""
    size = dataclasses.replace(UNI, slots=2, cpus=2, idle_s=idle_s, max=20)
    waiting, coming = list[float](), sorted(arrivals)
    pool: dict[str, list[float]] = {}  # the ends of its payloads
    joins: dict[str, float] = {}
    idle: dict[str, float] = {}
    runs: list[float] = []
    most, now = 0, 0.0
    while now < 20_000 and (coming or waiting or pool):
        waiting += [run_s for at, run_s in coming if at <= now]
        coming = [each for each in coming if each[0] > now]
        for name in [each for each in pool if joins[each] <= now]:
            pool[name] = [end for end in pool[name] if end > now]
            while waiting and len(pool[name]) < 2:
                runs.append(waiting[0])
                pool[name].append(now + waiting.pop(0))
            idle[name] = idle.get(name, now) if not pool[name] else math.inf
            idle = {key: at for key, at in idle.items() if at < math.inf}
        there = [
            Instance(each, "uni", "joined" if joins[each] <= now else "booting", joins[each] - boot_s, len(pool[each]), idle.get(each))
            for each in pool
        ]
        demand = [Demand("docking", 1, None, len(waiting), now)] if waiting else []
        run_s = {"docking": sum(runs) / len(runs)} if runs else {}
        found = wanted_instances(now, demand, {}, [size], there, {}, {}, {"uni": boot_s}, run_s)
        for uuid in found.drain:
            assert not pool.pop(uuid) and now - idle.pop(uuid) >= idle_s
        for _, count in found.create:
            for _ in range(count):
                joins[name := f"{len(joins)}"] = now + boot_s
                pool[name] = []
        most, now = max(most, len(pool)), now + 10.0
    assert sorted(runs) == sorted(run_s for _, run_s in arrivals)
    assert 1 <= most <= len(arrivals) and not pool
