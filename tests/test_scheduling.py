"""Whose turn it is, which client gets the job, who may try again, and what somebody is told who waits: pure functions.

They are tried on tables, on random figures, and as the rules of a machine that plays a whole site.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from world import BOUNDED, HandClock, a_service, heads, new_job

import joborch
from joborch import (
    BUSY,
    Candidate,
    Cause,
    ClientCapacity,
    QueueFacts,
    Run,
    ServiceQueue,
    Sharing,
    Status,
    Store,
    attempts_left,
    choose,
    wait_estimate_s,
    why_waiting,
)
from joborch_base.scheduling import NO_USE, Reservation, Waiting, cap_idle_credit, fits, rank_of, reserve, use_now, used

NOW, HALF_LIFE_S = 1_795_510_800.0, 6 * 3600.0
FOREVER = float("inf")

# == Use ==


@BOUNDED
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e5)), max_size=10), st.floats(0, 1e6))
def test_use_decays_by_its_half_life(runs: list[tuple[float, float]], later_s: float) -> None:
    """Each run counts half after a half-life, a quarter after two; in which order they are written down does not matter."""
    end, use = NOW + 1e6 + later_s, NO_USE
    for begin, slot_s in runs:
        use = used(use, slot_s, NOW + begin, HALF_LIFE_S)
    wanted = sum(slot_s * 2 ** (-(end - NOW - begin) / HALF_LIFE_S) for begin, slot_s in runs)
    assert use_now(use, end, HALF_LIFE_S) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@BOUNDED
@given(st.floats(0.01, 1e6), st.floats(0.01, 1e6), st.floats(0, 1e7))
def test_the_order_of_users_does_not_change_while_time_passes(one: float, other: float, later_s: float) -> None:
    """That is why a rank can stand in an index."""
    assume(abs(math.log2(one / other)) > 1e-6)
    ranks = [used(NO_USE, slot_s, NOW, HALF_LIFE_S) for slot_s in (one, other)]
    uses = [use_now(rank, NOW + later_s, HALF_LIFE_S) for rank in ranks]
    assert (ranks[0] < ranks[1]) == (one < other)
    assert (uses[0] < uses[1]) == (one < other) or uses[0] == uses[1]


@pytest.mark.parametrize("weight", [0.5, 1.0, 4.0])
def test_who_comes_back_has_no_more_credit_than_a_half_life(weight: float) -> None:
    level = used(NO_USE, 1000.0, NOW, HALF_LIFE_S)
    back = cap_idle_credit(NO_USE, weight, level)
    assert use_now(back, NOW, HALF_LIFE_S) == pytest.approx(500.0 * weight, rel=1e-6)
    more = used(NO_USE, 900.0 * weight, NOW, HALF_LIFE_S)
    assert cap_idle_credit(more, weight, level) == more, "who has used more than that keeps it"
    assert cap_idle_credit(NO_USE, weight, NO_USE) == NO_USE


def test_all_that_come_at_once_are_equal() -> None:
    """A newcomer is measured by the turn served last, not by the newcomer before: else the last of a crowd would be first."""
    level = used(NO_USE, 1000.0, NOW, HALF_LIFE_S)
    assert len({cap_idle_credit(NO_USE, 1.0, level) for _ in range(50)}) == 1


# == Turns ==

JOBS = st.lists(
    st.builds(Waiting, st.integers(1, 10**9), st.integers(-100, 100), st.floats(0, 1e6), st.just(1), st.none(), st.none()),
    min_size=1,
    max_size=8,
    unique_by=lambda job: job.job_id,
)


def in_order(jobs: Iterable[Waiting]) -> list[Waiting]:
    """Jobs as they arrive: with growing ids."""
    times = sorted(job.arrived_at for job in jobs)
    return [job._replace(job_id=number, arrived_at=at) for number, (job, at) in enumerate(zip(jobs, times), 1)]


@BOUNDED
@given(JOBS)
def test_within_a_user_it_is_priority_then_arrival(jobs: list[Waiting]) -> None:
    jobs = in_order(jobs)
    wanted = min(jobs, key=lambda job: (-job.priority, job.job_id))
    assert rank_of("share", jobs, 3.0, 60.0) == (3.0, wanted)
    assert rank_of("fifo", jobs, 3.0, 60.0) == (jobs[0].arrived_at, wanted), "whose job came first has the turn; which it is, is his matter"


@BOUNDED
@given(JOBS, st.floats(1, 600))
def test_with_ageing_nothing_starves(jobs: list[Waiting], ageing_s: float) -> None:
    """The bound: a job is overtaken only by those that come within (100 - priority) points of ageing after it."""
    order = sorted(in_order(jobs), key=lambda job: (rank_of("priority", [job], 0.0, ageing_s)[0], job.job_id))
    for earlier, later in itertools.combinations(order, 2):
        assert earlier.arrived_at - later.arrived_at <= (100 - later.priority) * ageing_s * (1 + 1e-9) <= 200 * ageing_s * (1 + 1e-9)
        if earlier.priority == later.priority:
            assert earlier.arrived_at <= later.arrived_at
    rank, first = rank_of("priority", in_order(jobs), 0.0, ageing_s)
    assert first == order[0] and rank == rank_of("priority", [first], 0.0, ageing_s)[0]


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_attempts(retries: int) -> None:
    """One more than the retries, and none for what shall end."""
    store = Store(":memory:", "server", HandClock())
    for attempt in (1, 2, 3, 4):
        job = store.add(new_job(retries=retries, attempt=attempt), "")
        assert attempts_left(job) is (attempt <= retries)
        store.request_kill(job.id, Cause.CANCELLED)
        ending = store.get(job.id)
        assert ending is not None and not attempts_left(ending)
    store.close()


# == Clients ==


def place(name: str = "a", slots: int = 4, free: int | None = None, **changes: Any) -> ClientCapacity:
    """A client with so many slots, all free unless said."""
    return ClientCapacity(name, slots, slots if free is None else free, **changes)


def line(*heads: Candidate, service: str = "s", clients: str = "ab", busy: float = 0.0, run_s: float | None = 60.0) -> ServiceQueue:
    """The line of one service at clients `a` and `b`."""
    return ServiceQueue(service, clients, busy, run_s, heads)


def no_runs(_: str) -> list[Run]:
    """Nothing runs anywhere."""
    return []


def chosen(lines: list[ServiceQueue], places: list[ClientCapacity], runs: dict[str, list[Run]] | None = None) -> tuple[int, str] | None:
    """Which job goes to which client."""
    found = choose(lines, places, lambda name: (runs or {}).get(name, []), NOW)
    return None if found is None else (found[0].job_id, found[1].name)


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([place("a", 4, 1), place("b", 4, 3)], "b"),
        ([place("a", 4, 2, load=80.0), place("b", 4, 2, load=20.0)], "b"),
        ([place("a", 4, 2, failed_s_ago=10.0), place("b", 4, 2, failed_s_ago=500.0)], "b"),
        ([place("b", 4, 2), place("a", 4, 2)], "a"),
        ([place("a", 4, 4, costs=True), place("b", 4, 1, costs=True)], "b"),  # the other one becomes idle, and is ended
        ([place("a", 4, 1, costs=True), place("b", 4, 1, load=80.0)], "b"),
        ([place("a", 4, 0), place("b", 1, 1, load=100.0, failed_s_ago=1.0)], "b"),
        ([place("a", 4, 4), place("c", 9, 9)], "a"),
        ([place("a", 4, 0), place("b", 4, 0)], None),
        ([place("a", 1, -3, queues=True), place("b", 4, 1)], "b"),
        ([place("a", 1, -3, queues=True), place("b", 4, 0)], "a"),
        ([], None),
    ],
)
def test_the_client_with_most_free_slots_gets_it(places: list[ClientCapacity], wanted: str | None) -> None:
    """Then the one with the least load, then the one whose last failure is longest ago; a 2.2 client where no slot is known to be free."""
    assert chosen([line(Candidate("s", 1))], places) == (wanted and (1, wanted))


@pytest.mark.parametrize(("run_s", "room"), [(None, 0), (60.0, 0), (0.41, 0), (0.2, 2), (0.1, 4), (0.01, 6), (0.0, 6)])
def test_only_work_of_a_moment_waits_at_a_client(run_s: float | None, room: int) -> None:
    """A newcomer's job stands behind what runs, and no more than 0.2 s of work."""
    assert place(slots=2, free=0, turning=True).room(run_s) == room
    assert place(slots=8, free=0, turning=True).room(0.01) == 16
    assert place(slots=2, free=0).room(run_s) == 0, "what runs there now takes longer than runs do"
    assert place(slots=2, free=1, turning=True).room(run_s, cpus=2) == 1, "it would wait there for two slots"


def test_the_service_of_whose_limit_the_least_is_in_use_goes_first() -> None:
    lines = [line(Candidate("s", 1), busy=0.5), line(Candidate("t", 99), service="t", busy=0.1)]
    assert chosen(lines, [place()]) == (99, "a")
    assert chosen([lines[0]._replace(clients="x"), lines[1]], [place("x")]) == (1, "x"), "where it can be had"
    assert chosen([line(Candidate("s", 1)), line(Candidate("t", 2), service="t")], [place()]) == (1, "a")


def run(cpus: int, ends_at: float, memory: int = 0) -> Run:
    """A job at a client that ends then at the latest."""
    return Run(0, cpus, since=0.0, memory=memory, timeout=None if ends_at == FOREVER else ends_at)


WIDE = Candidate("s", 1, cpus=4)
RUNNING = [run(1, NOW + 100), run(1, NOW + 200), run(1, NOW + 300)]


@pytest.mark.parametrize(
    ("narrow", "wanted"),
    [
        (Candidate("s", 2, timeout=299.0), (2, "a")),
        (Candidate("s", 2, timeout=301.0), None),
        (Candidate("s", 2), None),
        (Candidate("s", 2, cpus=2, timeout=10.0), None),
    ],
)
def test_a_narrow_job_goes_before_a_wide_one_only_where_it_does_not_delay_it(narrow: Candidate, wanted: Any) -> None:
    """4 slots, 3 of them in use, the last for 300 s more: what ends before may use the free one."""
    assert chosen([line(WIDE, narrow)], [place(free=1)], {"a": RUNNING}) == wanted


def test_what_is_to_spare_beside_a_wide_job_is_free_for_all() -> None:
    wide = Candidate("s", 1, cpus=3)
    assert reserve(wide, place(slots=6, free=2), RUNNING, NOW) == Reservation(NOW + 100, 0, FOREVER)
    assert reserve(wide, place(slots=6, free=1), [run(4, NOW + 9)], NOW) == Reservation(NOW + 9, 2, FOREVER)
    assert chosen([line(wide, Candidate("s", 2))], [place(slots=6, free=1)], {"a": [run(4, NOW + 9)]}) == (2, "a")


def test_where_nobody_knows_when_runs_end_all_that_becomes_free_is_kept() -> None:
    endless = [run(1, FOREVER)] * 3
    assert chosen([line(WIDE, Candidate("s", 2, timeout=1.0))], [place(free=1)], {"a": endless}) is None
    assert chosen([line(WIDE, Candidate("s", 2))], [place(free=1), place("b", 4, 2)], {"a": endless, "b": endless}) == (2, "a"), "b is kept"


def test_a_wide_job_is_not_passed_by_another_service() -> None:
    """Once the turn of its service has come: the slots are kept against all."""
    lines = [line(WIDE), line(Candidate("t", 2), service="t", busy=0.5)]
    assert chosen(lines, [place(free=1)], {"a": [run(1, FOREVER)] * 3}) is None


def test_what_no_client_here_could_run_holds_up_nobody() -> None:
    assert chosen([line(Candidate("s", 1, cpus=9), Candidate("s", 2))], [place(free=1)]) == (2, "a")
    assert chosen([line(Candidate("s", 1, memory=500), Candidate("s", 2))], [place(memory=400, free_memory=400)]) == (2, "a")


@pytest.mark.parametrize(("free_memory", "wanted"), [(None, (1, "a")), (500, (1, "a")), (499, None)])
def test_memory_is_matched(free_memory: int | None, wanted: Any) -> None:
    known = None if free_memory is None else 1000
    assert chosen([line(Candidate("s", 1, memory=500))], [place(memory=known, free_memory=free_memory)]) == wanted


def test_a_slot_of_a_batch_system_takes_a_job_of_any_size() -> None:
    """However many cores and how much memory it asks for: what there is, the batch system knows."""
    batch = place(slots=2, free=1, memory=None, free_memory=None)._replace(job_slots=True)
    assert chosen([line(Candidate("s", 1, cpus=64, memory=10**6))], [batch]) == (1, "a")
    assert chosen([line(Candidate("s", 1, cpus=64))], [batch._replace(free=0)]) is None
    assert joborch.too_large_text("s", 64, 10**6, [batch]) == ""


HEADS = st.builds(
    Candidate,
    st.sampled_from("st"),
    st.integers(1, 10**6),
    st.integers(1, 5),
    st.none() | st.integers(1, 900),
    st.none() | st.floats(1, 1000),
)
PLACES = st.lists(
    st.builds(
        lambda name, slots, taken, memory: ClientCapacity(name, slots, slots - min(taken, slots), memory, memory and memory // 2),
        st.sampled_from("abc"), st.integers(1, 6), st.integers(0, 6), st.none() | st.integers(1, 1000),
    ),
    max_size=3,
    unique_by=lambda place: place.name,
)  # fmt: skip
RUNS = st.lists(st.builds(run, st.integers(1, 3), st.just(FOREVER) | st.floats(NOW, NOW + 1000), st.integers(0, 500)), max_size=4)


@BOUNDED
@given(st.lists(HEADS, max_size=6, unique_by=lambda head: head.job_id), PLACES, RUNS)
def test_a_choice_fits_is_the_same_again_and_leaves_no_slot_idle(
    heads: list[Candidate], places: list[ClientCapacity], runs: list[Run]
) -> None:
    """Work conserving: where nothing is chosen, every job that fits somewhere is held up by a wide one that stands before it."""
    lines = [ServiceQueue(name, "abc", 0.0, None, [head for head in heads if head.service == name]) for name in "st"]
    found, again = (choose(lines, places, lambda _: runs, NOW) for _ in range(2))
    assert found == again
    is_batch = [head for one in lines for head in one.heads]
    fitting = [head for head in is_batch if any(fits(head, place, None, None, NOW) for place in places)]
    if found is None:
        for head in fitting:
            before = is_batch[: is_batch.index(head)]
            assert any(other not in fitting and any(place.could_run(other.cpus, other.memory) for place in places) for other in before)
    else:
        assert fits(found[0], found[1], None, None, NOW)
        if is_batch[0] in fitting:
            assert found[0] == is_batch[0], "the first goes first"


@BOUNDED
@given(st.integers(2, 6), st.integers(0, 3), RUNS, HEADS)
def test_a_reservation_is_not_put_off_by_who_goes_first(cpus: int, free: int, runs: list[Run], other: Candidate) -> None:
    """Whoever it lets pass, there is room for the wide job at the time for which it is kept."""
    at, wide = ClientCapacity("a", 20, free, 5000, 2000), Candidate("s", 1, cpus, 500)
    kept = reserve(wide, at, runs, NOW)
    if kept.until < FOREVER and kept.lets(other, NOW) and fits(other, at, None, None, NOW):
        other_ends = FOREVER if other.timeout is None else NOW + other.timeout
        ended = [each for each in [*runs, run(other.cpus, other_ends, other.memory or 0)] if each.ends_at(NOW) <= kept.until]
        assert free - other.cpus + sum(run.cpus for run in ended) >= cpus
        assert 2000 - (other.memory or 0) + sum(run.memory for run in ended) >= 500


# == A whole site ==


class Site(RuleBasedStateMachine):
    """Users with weights, jobs that come and end at random, at a store of its own: what is served is what each is due."""

    @initialize(policy=st.sampled_from(["share", "fifo", "priority"]), slots=st.integers(1, 4))
    def begin(self, policy: str, slots: int) -> None:
        """A service with one client."""
        self.clock, self.slots = HandClock(), slots
        self.store = Store(":memory:", "server", self.clock)
        self.store.set_limits({"s": a_service("s", runs_per_user=2, max_runs=3, policy=policy)})
        self.policy = policy

    @rule(user_id=st.integers(1, 3), priority=st.integers(-2, 2), count=st.integers(1, 3))
    def upload(self, user_id: int, priority: int, count: int) -> None:
        """Jobs arrive."""
        for _ in range(count):
            self.clock.pass_s(0.5)
            self.store.add(new_job(user_id=user_id, service="s", priority=priority), "")
        self.fill()

    @rule(data=st.data(), seconds=st.floats(0.1, 500))
    def end(self, data: st.DataObject, seconds: float) -> None:
        """A run ends after a while."""
        self.clock.pass_s(seconds)
        busy = [job for job in self.jobs() if job.status in BUSY]
        if busy:
            job = data.draw(st.sampled_from(busy))
            self.store.move(job, Status.SUBMITTED, "")
            current = self.store.get(job.id)
            assert current and self.store.move(current, Status.COMPLETED, "", started_at=1.0, run_s=seconds)
        self.fill()

    def jobs(self) -> list[joborch.Job]:
        return self.store.jobs("SELECT * FROM jobs ORDER BY id")

    def fill(self) -> None:
        """Claim as the dispatcher does, until nothing can be sent."""
        while True:
            busy = Counter(job.user_id for job in self.jobs() if job.status in BUSY)
            candidates = [Candidate("s", head.job_id, head.cpus) for head in heads(self.store, "s")] if sum(busy.values()) < 3 else []
            found = choose([line(*candidates, run_s=None)], [place("a", self.slots, self.slots - sum(busy.values()))], no_runs, 0.0)
            if found is None:
                return
            own = [job for job in self.jobs() if job.status is Status.QUEUED]
            claimed = self.store.claim(found[0].job_id, "a", self.slots)
            assert claimed is not None
            before = [job for job in own if job.user_id == claimed.user_id]
            if self.policy != "priority":
                assert claimed.id == min(before, key=lambda job: (-job.priority, job.id)).id, "within a user order is kept"
            if self.policy == "fifo":
                open_users = [job for job in own if busy[job.user_id] < 2]
                assert claimed.user_id == min(open_users, key=lambda job: job.id).user_id, "who came first has the turn"
            if self.policy == "priority":
                open_jobs = [job for job in own if busy[job.user_id] < 2]
                assert claimed.id == min(open_jobs, key=lambda job: (job.arrived_at / 60 - job.priority, job.id)).id

    @invariant()
    def no_slot_is_idle_while_a_job_could_run(self) -> None:
        """Work conserving: what waits is held up by a limit."""
        if not hasattr(self, "store"):
            return
        busy = Counter(job.user_id for job in self.jobs() if job.status in BUSY)
        assert sum(busy.values()) <= min(3, self.slots) and max(busy.values(), default=0) <= 2
        if sum(busy.values()) < min(3, self.slots):
            assert not [job for job in self.jobs() if job.status is Status.QUEUED and busy[job.user_id] < 2]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


TestSite = Site.TestCase
TestSite.settings = settings(deadline=None, max_examples=20, stateful_step_count=20)


def served(weights: dict[int, float], run_s: float, rounds: int, slots: int = 2) -> Counter[int]:
    """How many runs each of some users gets, all with work at all times, of runs that take so long."""
    clock = HandClock()
    store = Store(":memory:", "server", clock)
    store.set_limits({"s": a_service("s", runs_per_user=99, max_runs=99)}, Sharing(weights=weights))
    for user_id in weights:
        for _ in range(3):
            store.add(new_job(user_id=user_id, service="s"), "")
    got = Counter[int]()
    for _ in range(rounds):
        running = []
        for _ in range(slots):
            (head,) = heads(store, "s", 1)
            job = store.claim(head.job_id, "a", 99)
            assert job is not None and job.user_id is not None
            running.append(job)
            got[job.user_id] += 1
            store.add(new_job(user_id=job.user_id, service="s"), "")
        clock.pass_s(run_s)
        for job in running:
            store.move(job, Status.SUBMITTED, "")
            current = store.get(job.id)
            assert current and store.move(current, Status.COMPLETED, "", run_s=run_s)
    store.close()
    return got


@pytest.mark.parametrize("run_s", [1.0, 60.0, 3600.0])
@pytest.mark.parametrize("weights", [{1: 1.0, 2: 1.0}, {1: 1.0, 2: 3.0}, {1: 0.5, 2: 1.0, 3: 2.5}])
def test_shares_converge_to_the_weights(weights: dict[int, float], run_s: float) -> None:
    got, whole = served(weights, run_s, 120), sum(weights.values())
    for user_id, weight in weights.items():
        assert got[user_id] / 240 == pytest.approx(weight / whole, abs=0.05), got


def test_a_burst_cannot_win_twice() -> None:
    """The slots that a user has just got count at once: the next goes to the other, long before the first runs have ended."""
    assert served({1: 1.0, 2: 1.0}, 60.0, 1, slots=4) == Counter({1: 2, 2: 2})


# == What somebody is told ==

FREE, DOWN = {"gpu1:9000": ""}, {"gpu1:9000": "cannot be reached (3 min ago)"}
EMPTY, BUSY_PLACE = [place("gpu1:9000", 2)], [place("gpu1:9000", 2, 0)]


@pytest.mark.parametrize(
    ("facts", "troubles", "places", "wanted"),
    [
        (QueueFacts(0, 5, 0, 10, 0), FREE, EMPTY, "it is next for a free slot at a client for s"),
        (QueueFacts(0, 5, 0, 10, 1), FREE, EMPTY, "it waits for its turn: 1 of your jobs is ahead of it"),
        (QueueFacts(0, 5, 2, 10, 2, 7), FREE, BUSY_PLACE,
         "all 2 slots of gpu1:9000 are in use and 2 of your jobs and 7 other users' turns are ahead of it"),
        (QueueFacts(0, 5, 2, 10, 0, 1), FREE, [place("x", 1, 0)], "the only slot of x is in use and 1 other user's turn is ahead of it"),
        (QueueFacts(0, 5, 2, 10, 0), FREE, [place("x", 2, 0), place("y", 3, 0)], "all 5 slots of 2 clients are in use"),
        (QueueFacts(5, 5, 5, 10, 3), FREE, EMPTY, "5 of your 5 runs for s are in use and 3 of your jobs are ahead of it"),
        (QueueFacts(6, 5, 6, 10, 0), FREE, EMPTY, "6 of your 5 runs for s are in use"),
        (QueueFacts(5, 5, 5, 10, 10_000), FREE, EMPTY,
         "5 of your 5 runs for s are in use and 10,000 or more of your jobs are ahead of it"),
        (QueueFacts(0, 5, 0, 10, 150, counted_to=100), FREE, EMPTY, "it waits for its turn: 100 or more of your jobs are ahead of it"),
        (QueueFacts(4, 5, 10, 10, 0), FREE, EMPTY, "all 10 runs of s are in use"),
        (QueueFacts(5, 5, 10, 10, 0), DOWN, [],
         "5 of your 5 runs for s are in use; no client for s takes jobs: gpu1:9000 cannot be reached (3 min ago)"),
        (QueueFacts(4, 5, 10, 10, 1), {"x": "is drained"}, [],
         "all 10 runs of s are in use and 1 of your jobs is ahead of it; no client for s takes jobs: x is drained"),
        (QueueFacts(5, 5, 5, 10, 0), {**DOWN, "gpu2:9000": ""}, EMPTY, "5 of your 5 runs for s are in use"),
        (QueueFacts(0, 5, 0, 10, 0), DOWN, [], "no client for s takes jobs: gpu1:9000 cannot be reached (3 min ago)"),
        (QueueFacts(0, 5, 0, 10, 0), {**DOWN, "gpu2:9000": ""}, EMPTY, "it is next for a free slot at a client for s"),
        (QueueFacts(0, 5, 0, 10, 0), {}, [], "no client for s takes jobs: none has joined this server for it"),
        (QueueFacts(0, 5, 0, 10, 0, 0, 4), FREE, EMPTY,
         "no client for s is large enough: it needs 4 slots, and the largest, gpu1:9000, has 2 slots"),
        (QueueFacts(0, 5, 0, 10, 0, 0, 1, 900), FREE, [place("x", 2, memory=500)],
         "no client for s is large enough: it needs 1 slot and 900 MiB of memory, and the largest, x, has 2 slots and 500 MiB of memory"),
        (QueueFacts(0, 5, 1, 10, 0, 0, 2), FREE, [place("x", 2, 1)],
         "it needs 2 slots at once: x has 1 of 2 free and reserves freed slots for it"),
        (QueueFacts(0, 5, 0, 10, 0, gpus=2), FREE, EMPTY, "no client has 2 GPUs: those for s have none"),
        (QueueFacts(0, 5, 0, 10, 0, gpus=3), FREE, [place("x", 2, gpus=2, free_gpus=2), place("y")],
         "no client has 3 GPUs: those for s have at most 2"),
        (QueueFacts(0, 5, 0, 10, 0, 0, 4, gpus=1), FREE, [place("x", 2, gpus=2, free_gpus=2), place("y", 8)],
         "no client for s is large enough: it needs 4 slots, and the largest, x, has 2 slots, of those with 1 GPU"),
        (QueueFacts(0, 5, 0, 10, 0, gpus=1), FREE, [place("y"), place("x", 2, gpus=1, free_gpus=0)], "it needs 1 GPU: x has 0 of 1 free"),
        (QueueFacts(0, 5, 0, 10, 0, gpus=2), FREE, [place("x", 2, gpus=4, free_gpus=1)],
         "it needs 2 GPUs at once: x has 1 of 4 free and reserves freed GPUs for it"),
    ],
)  # fmt: skip
def test_what_a_job_waits_for(facts: QueueFacts, troubles: dict[str, str], places: list[ClientCapacity], wanted: str) -> None:
    assert why_waiting("s", facts, troubles, places) == wanted


STANDINGS = st.builds(QueueFacts, *[st.integers(0, 9), st.integers(1, 5)] * 2, st.integers(0, 9), st.integers(0, 3), st.integers(1, 3))


@BOUNDED
@given(STANDINGS, st.dictionaries(st.sampled_from(["a:1", "b:2"]), st.sampled_from(["", "is away"])), PLACES)
def test_it_is_called_next_only_where_nothing_binds(facts: QueueFacts, troubles: dict[str, str], places: list[ClientCapacity]) -> None:
    text = why_waiting("s", facts, troubles, places)
    bound = facts.runs_of_user >= facts.runs_per_user or facts.runs_of_service >= facts.max_runs
    away = bool(troubles) and all(troubles.values())
    taken = bool(places) and all(place.free < facts.cpus for place in places)
    before = facts.queued_before + facts.users_before
    if text.startswith("it is next"):
        assert not bound and not away and not taken and not before
    assert text.isprintable()


@pytest.mark.parametrize(
    ("position", "facts", "slots", "wanted"),
    [
        (1, QueueFacts(0, 5, 0, 10, 0), 2, 0.0),
        (2, QueueFacts(0, 5, 0, 10, 1), 2, 0.0),
        (3, QueueFacts(0, 5, 0, 10, 2), 2, 60.0),
        (1, QueueFacts(0, 5, 2, 10, 0), 2, 60.0),
        (3, QueueFacts(0, 5, 2, 10, 0), 2, 120.0),
        (1, QueueFacts(5, 5, 5, 10, 0), 8, 60.0),
        (7, QueueFacts(5, 5, 5, 10, 6), 100, 120.0),
        (11, QueueFacts(0, 5, 10, 10, 0), 100, 120.0),
    ],
)
def test_how_long_a_job_waits(position: int, facts: QueueFacts, slots: int, wanted: float) -> None:
    """Rounds of runs of a minute: as many at once as slots and limits let."""
    assert wait_estimate_s(position, facts, slots, 60.0) == wanted


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.34, "0.3 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (119, "119 s"),
        (180, "3 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (172800, "2 days"),
    ],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert joborch.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("wall", "text"),
    [(0.0, "1970-01-01T00:00:00.000Z"), (1795510800.1239, "2026-11-24T09:00:00.123Z"), (1e-7, "1970-01-01T00:00:00.000Z"), (None, None)],
)
def test_times_as_rfc_3339_has_them(wall: float | None, text: str | None) -> None:
    assert joborch.rfc3339(wall) == text


@BOUNDED
@given(st.text(), st.integers(4, 50))
def test_one_line_is_safe_in_logs_and_headers(text: str, limit: int) -> None:
    line = joborch.one_line(text, limit)
    assert line.isprintable()
    assert len(line) <= limit
    assert line == text.strip() or not text.isprintable() or len(text) > limit


def test_the_nearest_word() -> None:
    assert joborch.nearest("usr_id", ["user_id", "service"]) == " (did you mean user_id?)"
    assert joborch.nearest("zzz", ["user_id", "service"]) == joborch.nearest("x", []) == ""


def test_a_refusal_is_an_answer_with_a_field_and_headers() -> None:
    answer = joborch.Answer.of(joborch.HttpError(429, "too many", "user_id", Retry_After="5"))
    assert (answer.body, answer.status, answer.headers) == ({"message": "too many", "field": "user_id"}, 429, {"Retry-After": "5"})
    assert joborch.Answer.of(joborch.HttpError(404, "none")).body == {"message": "none"}
