#!/usr/bin/env python3
"""What a policy would have made of a month: the program's own scheduling functions on a trace, without sleeping.

    python tests/simulate.py                       a synthetic month of 40,000 jobs: prints two tables
    python tests/simulate.py --plot docs/waits.svg the same, and draws the picture in docs/scheduling.md
    python tests/simulate.py --trace FILE.swf      any trace in the Standard Workload Format (Feitelson's archive)
    python tests/simulate.py --elastic             what waits cost: pools of fixed sizes, and cloud instances that come and go

Time is what the trace says: the next event is an arrival or an end. Who is next is decided by `rank_of`, `used`, `cap_idle_credit`,
`charge_in_advance` and `choose` of joborch.py, in the order in which the Store calls them; only the rows are kept in
dictionaries here, so that a month takes half a minute.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import math
import random
import re
import statistics
import sys
from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import joborch  # noqa: E402
from joborch import Candidate, ClientCapacity, Run, ServiceQueue, Sharing  # noqa: E402
from joborch_base.elastic import Demand, Instance, Size, wanted_instances  # noqa: E402
from joborch_base.scheduling import (  # noqa: E402
    TURN_S,
    Pace,
    Usage,
    Waiting,
    cap_idle_credit,
    charge_in_advance,
    counted_s,
    rank_of,
    used,
    with_open_runs,
    with_run,
)

POLICIES = ("share", "fifo", "priority")
EPOCH_S = 1.8e9  # what the server's clock would show: use is kept relative to it
CLASSES = ((0.01, "1 job"), (10, "2 to 10"), (100, "11 to 100"), (1000, "101 to 1,000"), (1e9, "more"))


@dataclass(frozen=True)
class Job:
    """One job of a trace: when it came (seconds), whose it is, how long it runs, and what it asks for."""

    number: int
    at: float
    user: int
    run_s: float
    cpus: int = 1
    memory: int | None = None
    timeout: float | None = None
    priority: int = 0


# == Traces ==


def synthetic_month(jobs: int = 40_000, days: float = 30.0, seed: int = 1) -> list[Job]:
    """A month as the site has them: few users send most jobs, in bursts, by day; most runs are short, some take hours.

    Users' totals follow a Zipf law, runs are log-normal (median 2 min, mean 12 min), every user has a level of his own; one
    job in twenty asks for 4 slots, one in ten has another priority, half of them have a time limit.
    """
    chance, found, numbers = random.Random(seed), list[Job](), itertools.count(1)
    users = 2_000
    weights = [1 / rank for rank in range(1, users + 1)]
    levels = [chance.lognormvariate(0, 0.7) for _ in range(users)]
    while len(found) < jobs:
        user = chance.choices(range(users), weights)[0]
        begin = chance.uniform(0, days * 86400)
        hour = begin / 3600 % 24
        if chance.random() > 0.3 + 0.7 * max(0.0, math.sin((hour - 7) / 24 * 2 * math.pi)):
            continue  # fewer come at night
        for _ in range(min(jobs - len(found), int(chance.paretovariate(1.1)), 600)):
            begin += chance.expovariate(1 / 3)
            run_s = min(levels[user] * chance.lognormvariate(math.log(120), 1.6), 86400.0)
            found.append(
                Job(
                    next(numbers), begin, user + 1, run_s, 4 if chance.random() < 0.05 else 1, None,
                    2 * run_s + 60 if chance.random() < 0.5 else None, chance.choice((-50, 50)) if chance.random() < 0.1 else 0,
                )
            )  # fmt: skip
    return sorted(found, key=lambda job: job.at)


def read_swf(path: Path) -> list[Job]:
    """A trace in the Standard Workload Format 2.2: 18 fields a line, `;` begins a comment, -1 means unknown.

    Fields used: 1 number, 2 submit time, 4 run time, 5 processors (8 where unknown), 9 requested time, 10 requested memory
    (KiB a processor), 12 user. Jobs that never ran, or on no processor, are left out.
    """
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        if not words or words[0].startswith(";"):
            continue
        number, at, run_s, cpus, asked_cpus, timeout, memory, user = (float(words[at - 1]) for at in (1, 2, 4, 5, 8, 9, 10, 12))
        cpus = cpus if cpus > 0 else asked_cpus
        if run_s >= 0 and cpus > 0:
            mib = int(memory * cpus / 1024) if memory > 0 else None
            limit = max(timeout, run_s) if timeout > 0 else None
            found.append(Job(int(number), at, int(user), run_s, int(cpus), mib, limit))
    return sorted(found, key=lambda job: (job.at, job.number))


# == A site ==


@dataclass
class User:
    """What the Store keeps of one user of one service."""

    queues: dict[int, deque[Job]] = field(default_factory=lambda: defaultdict(deque))  # by priority
    running: dict[int, joborch.Run] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)


class Site:
    """One service at some clients, as the Store and the dispatcher see it."""

    def __init__(self, policy: str, clients: Sequence[int], quota: int, sharing: Sharing, service: str = "s") -> None:
        self.policy, self.quota, self.sharing, self.service = policy, quota, sharing, service
        self.slots = {f"client{number}": slots for number, slots in enumerate(clients)}
        self.running: dict[str, dict[int, tuple[Job, float]]] = {name: {} for name in self.slots}
        self.users: dict[int, User] = defaultdict(User)
        self.pace = Pace()
        self.turns: list[tuple[float, int, int]] = []  # of users under quota: rank, head, user
        self.turn: dict[int, tuple[float, int, int]] = {}
        self.jobs: dict[int, Job] = {}
        self.charged: dict[int, float] = {}
        self.waits: dict[int, float] = {}
        self.order: list[int] = []
        self.heaviest, self.held_s, self.in_use_s, self.looked_at = 0, 0.0, 0.0, 0.0
        self.due = math.inf  # when the pool is looked at again: never, if it is fixed
        self.costs = False

    # -- what the Store does --

    def refresh(self, user_id: int, now: float) -> None:
        """Keep up the turns, as Store.update_rank does. A run counts as charged until it is over; the server charges for longer ones."""
        old = self.turn.pop(user_id, None)
        if old is not None:
            del self.turns[bisect_left(self.turns, old)]
        user = self.users[user_id]
        waiting = [waiting_of(queue[0]) for queue in user.queues.values() if queue]
        if waiting and len(user.running) < self.quota:
            use = with_open_runs(user.usage.use, [*user.running.values()], EPOCH_S + now, self.sharing.half_life_s)
            share = use - math.log2(self.sharing.weights.get(user_id, 1.0))
            rank, head = rank_of(self.policy, waiting, share, self.sharing.ageing_s)
            self.turn[user_id] = (rank, head.job_id, user_id)
            insort(self.turns, self.turn[user_id])

    def arrive(self, job: Job) -> None:
        """A job is uploaded: Store.add."""
        user = self.users[job.user]
        user.queues[job.priority].append(job)
        self.jobs[job.number] = job
        self.refresh(job.user, job.at)

    def claim(self, job: Job, client: str, now: float) -> None:
        """A job is sent: Store.claim."""
        user = self.users[job.user]
        user.queues[job.priority].remove(job)
        row: Any = job
        self.charged[job.number] = charge_in_advance(row, user.usage, self.pace, self.sharing.half_life_s)
        user.running[job.number] = joborch.Run(job.number, job.cpus, self.charged[job.number])
        self.running[client][job.number] = (job, now)
        self.waits[job.number] = now - job.at
        self.order.append(job.number)
        self.refresh(job.user, now)

    def end(self, job: Job, client: str, now: float) -> None:
        """A run is over: Store.account."""
        user = self.users[job.user]
        del self.charged[job.number]
        user.usage = with_run(user.usage, job.run_s)
        self.pace = with_run(self.pace, job.run_s)
        del user.running[job.number]
        del self.running[client][job.number]
        slot_s = job.cpus * counted_s(max(job.run_s, TURN_S), self.sharing.half_life_s)
        use = used(self.measured(job, now), slot_s, EPOCH_S + now, self.sharing.half_life_s)
        user.usage = user.usage._replace(use=use)
        self.refresh(job.user, now)

    def measured(self, job: Job, now: float) -> float:
        """The use of a job's user without the credit of having been idle for long: Store.without_old_credit."""
        use, weight = self.users[job.user].usage.use, self.sharing.weights.get(job.user, 1.0)
        if self.policy != "share" or job.run_s <= TURN_S or not any(self.users[job.user].queues.values()):
            return use
        levels = [next((rank for rank, _, user_id in self.turns if user_id != job.user), math.inf)]
        if cap_idle_credit(use, weight, levels[0]) == use:
            return use
        others = {other.user for jobs in self.running.values() for other, _ in jobs.values()} - {job.user}
        levels += [self.users[user_id].usage.use - math.log2(self.sharing.weights.get(user_id, 1.0)) for user_id in others]
        return use if min(levels) == math.inf else cap_idle_credit(use, weight, min(levels))

    def watch(self, now: float) -> None:
        """Count who holds the slots, as long as somebody else than the heaviest user waits."""
        if any(user_id != self.heaviest for _, _, user_id in self.turns[:2]):
            running = [job for jobs in self.running.values() for job, _ in jobs.values()]
            self.in_use_s += (now - self.looked_at) * sum(job.cpus for job in running)
            self.held_s += (now - self.looked_at) * sum(job.cpus for job in running if job.user == self.heaviest)
        self.looked_at = now

    def tick(self, now: float) -> None:
        """Look at the pool: there is nothing to do if it is fixed."""

    # -- what the dispatcher does --

    def places(self) -> list[ClientCapacity]:
        return [
            ClientCapacity(name, slots, slots - sum(job.cpus for job, _ in self.running[name].values()), costs=self.costs)
            for name, slots in self.slots.items()
        ]

    def heads(self) -> Iterator[Candidate]:
        for _, number, _ in self.turns[: joborch.CANDIDATES_LOOKED_AT]:
            job = self.jobs[number]
            yield Candidate(self.service, number, job.cpus, job.memory, job.timeout)

    def runs_at(self, client: str) -> list[Run]:
        return [
            Run(job.number, job.cpus, since=begun, memory=job.memory or 0, timeout=job.timeout)
            for job, begun in self.running[client].values()
        ]

    def next(self, now: float) -> tuple[Job, str] | None:
        """The dispatcher's choice: joborch.choose."""
        places = self.places()
        if not self.turns or not any(place.free > 0 for place in places):
            return None
        found = joborch.choose([ServiceQueue(self.service, self.slots, 0.0, None, self.heads())], places, self.runs_at, now)
        return None if found is None else (self.jobs[found[0].job_id], found[1].name)


def waiting_of(job: Job) -> Waiting:
    """A queued job as `rank_of` takes it."""
    return Waiting(job.number, job.priority, EPOCH_S + job.at, job.cpus, job.memory, job.timeout)


@dataclass
class Machine:
    """A cloud instance of the simulation, which is a client from `joins_at` on."""

    made_at: float
    joins_at: float
    idle_since: float | None = None
    draining: bool = False


class Elastic(Site):
    """A site whose clients are instances of one cloud, as `wanted_instances` asks for them."""

    def __init__(self, policy: str, size: Size, boot_s: float, quota: int, sharing: Sharing, interval_s: float = 10.0) -> None:
        super().__init__(policy, (), quota, sharing)
        self.size, self.boot_s, self.interval_s = size, boot_s, interval_s
        self.machines: dict[str, Machine] = {}
        self.made, self.slot_s, self.most, self.costs = 0, 0.0, 0, True

    def look_soon(self, now: float) -> None:
        """Look at the pool at the next interval."""
        self.due = min(self.due, math.ceil(now / self.interval_s) * self.interval_s)

    def arrive(self, job: Job) -> None:
        super().arrive(job)
        self.look_soon(job.at)

    def claim(self, job: Job, client: str, now: float) -> None:
        super().claim(job, client, now)
        self.machines[client].idle_since = None

    def end(self, job: Job, client: str, now: float) -> None:
        super().end(job, client, now)
        if not self.running[client]:
            self.machines[client].idle_since = now
        self.look_soon(now)

    def demand(self) -> list[Demand]:
        """Return the jobs that could run if there were slots: of each user as many as the quota lets run."""
        found: dict[int, list[Job]] = defaultdict(list)
        for _, _, user_id in self.turns:
            user = self.users[user_id]
            queued = itertools.chain.from_iterable(user.queues[priority] for priority in sorted(user.queues, reverse=True))
            for job in itertools.islice(queued, self.quota - len(user.running)):
                found[job.cpus].append(job)
        groups = [Demand(self.service, cpus, None, len(jobs), min(job.at for job in jobs)) for cpus, jobs in found.items()]
        return sorted(groups, key=lambda group: group.waiting_since)

    def tick(self, now: float) -> None:
        """Let instances join and end, and do what `wanted_instances` says."""
        for name, machine in list(self.machines.items()):
            if machine.draining and not self.running[name]:
                self.slot_s += self.size.slots * (now - machine.made_at)
                del self.machines[name]
            elif machine.joins_at <= now and name not in self.running:
                self.slots[name], self.running[name], machine.idle_since = self.size.slots, {}, now
        wanted = wanted_instances(
            now, self.demand(), {}, [self.size], self.instances(), {}, {}, {self.size.cloud: self.boot_s},
            {self.service: self.pace.mean_s} if self.pace.runs else {},
        )  # fmt: skip
        for _, count in wanted.create:
            for _ in range(count):
                self.made += 1
                self.machines[f"cloud{self.made}"] = Machine(now, now + self.boot_s)
        for name in wanted.drain:
            self.machines[name].draining = True
            del self.slots[name]
        self.most = max(self.most, len(self.machines))
        self.due = self.next_due(now)

    def instances(self) -> list[Instance]:
        """Return the instances as the rows of a server have them."""
        return [
            Instance(
                name, self.size.cloud, "draining" if each.draining else "joined" if name in self.slots else "booting",
                each.made_at, len(self.running.get(name, ())), each.idle_since,
            )
            for name, each in self.machines.items()
        ]  # fmt: skip

    def next_due(self, now: float) -> float:
        """Return when something will have changed: most intervals of a month need no look."""
        times = [60.0 + now] if self.turns else []
        for name, each in self.machines.items():
            if each.draining and not self.running[name]:
                times.append(now)
            elif name not in self.running:
                times.append(each.joins_at)
            elif each.idle_since is not None:
                times.append(each.idle_since + self.size.idle_s)
        return max(now + self.interval_s, math.ceil(min(times) / self.interval_s) * self.interval_s) if times else math.inf


def simulate(trace: Sequence[Job], site: Site) -> Site:
    """Play a trace: arrivals, ends and looks at the pool in their order, and after each all that can begin."""
    ends: list[tuple[float, int, str]] = []
    coming, demand = deque(trace), Counter[int]()
    for job in trace:
        demand[job.user] += int(job.cpus * job.run_s)
    site.heaviest = demand.most_common(1)[0][0] if trace else 0
    while coming or ends or site.due < math.inf:
        arrival, end = coming[0].at if coming else math.inf, ends[0][0] if ends else math.inf
        if site.due < min(arrival, end):
            now = site.due
            site.watch(now)
            site.tick(now)
        elif end <= arrival:
            now, number, client = heapq.heappop(ends)
            site.watch(now)
            site.end(site.jobs[number], client, now)
        else:
            job = coming.popleft()
            now = job.at
            site.watch(now)
            site.arrive(job)
        while True:
            found = site.next(now)
            if found is None:
                break
            site.claim(*found, now)
            heapq.heappush(ends, (now + found[0].run_s, found[0].number, found[1]))
    return site


# == Figures ==


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which a part of all lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def slowdown(job: Job, wait_s: float) -> float:
    """(wait + run) / run, runs below 10 s taken as 10 s: the bounded slowdown of the literature (Feitelson 2001)."""
    return max(1.0, (wait_s + job.run_s) / max(job.run_s, 10.0))


def class_of(count: int) -> str:
    """How much a user sends in all."""
    return next(name for most, name in CLASSES if count <= max(most, 1))


def figures(name: str, trace: Sequence[Job], site: Site) -> list[str]:
    """One row a policy: waits and slowdowns of all jobs."""
    waits = [site.waits[job.number] for job in trace]
    slow = [slowdown(job, site.waits[job.number]) for job in trace]
    cells = [statistics.mean(waits), *(percentile(waits, part) for part in (0.5, 0.95, 0.99)), max(waits)]
    held = f"{site.held_s / site.in_use_s:.0%}" if site.in_use_s else ""
    slows = [f"{percentile(slow, 0.5):.1f}", f"{percentile(slow, 0.95):,.0f}"]
    return [name, *(f"{cell / 60:,.1f}" for cell in cells), *slows, held]


def by_class(trace: Sequence[Job], site: Site) -> dict[str, float]:
    """The wait of 95 of 100 jobs in minutes, by how many jobs a user sends: who pays for a burst."""
    counts, waits = Counter(job.user for job in trace), defaultdict(list)
    for job in trace:
        waits[class_of(counts[job.user])].append(site.waits[job.number])
    return {name: percentile(waits[name], 0.95) / 60 for _, name in CLASSES if waits[name]}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)])


COLOURS = {"share": "#1b6ca8", "fifo": "#c8553d", "priority": "#5a8f29"}


def plot_waits(curves: dict[str, list[float]]) -> str:
    """Return an SVG of the share of all jobs that have started after a given wait: the further to the left, the better."""
    width, height, left, bottom = 640, 320, 60, 40
    least, most = 1.0, max(max(waits) for waits in curves.values())
    x_of = lambda wait: left + (width - left - 20) * math.log(max(wait, least) / least) / math.log(most / least)  # noqa: E731
    y_of = lambda part: 20 + (height - 20 - bottom) * (1 - part)  # noqa: E731
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for label, seconds in (("1 s", 1), ("10 s", 10), ("1 min", 60), ("10 min", 600), ("1 h", 3600), ("10 h", 36000), ("4 days", 345600)):
        if seconds <= most:
            parts.append(f'<path d="M{x_of(seconds):.1f} 20V{height - bottom}" stroke="#ddd"/>')
            parts.append(f'<text x="{x_of(seconds):.1f}" y="{height - bottom + 16}" text-anchor="middle">{label}</text>')
    for part in (0.0, 0.5, 0.9, 1.0):
        parts.append(f'<path d="M{left} {y_of(part):.1f}H{width - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y_of(part) + 4:.1f}" text-anchor="end">{part:.0%}</text>')
    for number, (name, waits) in enumerate(curves.items()):
        ordered = sorted(waits)
        points = [(ordered[min(len(ordered) - 1, len(ordered) * step // 400)], step / 400) for step in range(401)]
        path = "L".join(f"{x_of(wait):.1f} {y_of(part):.1f}" for wait, part in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 12}" y="{40 + 18 * number}" fill="{COLOURS[name]}">{name}</text>')
    middle, said = (left + width) / 2, "wait before the start, and the share of all jobs that waited no longer"
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{said}</text></svg>')
    return "\n".join(parts) + "\n"


# == Cost ==  Pools of fixed sizes, and instances that come and go, on the same trace.

FIXED_SLOTS = (16, 24, 32, 48, 64)
IDLES_S = (60.0, 600.0, 3600.0)
INSTANCE_SLOTS, BOOT_S, MOST_SLOTS = 4, 120.0, 128


@dataclass(frozen=True)
class Pool:
    """What a pool cost (slot-hours), and how long jobs waited (seconds)."""

    name: str
    is_fixed: bool
    cost: float
    waits: tuple[float, ...]

    @property
    def mean_s(self) -> float:
        return statistics.mean(self.waits)


def pools(trace: Sequence[Job], quota: int, fixed_slots: Sequence[int] = FIXED_SLOTS, idles_s: Sequence[float] = IDLES_S) -> list[Pool]:
    """Play the trace by shares with fixed pools of instances, and with elastic ones that differ in how long they stay idle."""
    span_h = (max(job.at + job.run_s for job in trace) - trace[0].at) / 3600
    found = []
    for slots in fixed_slots:
        site = simulate(trace, Site("share", [INSTANCE_SLOTS] * (slots // INSTANCE_SLOTS), quota, Sharing()))
        found.append(Pool(f"fixed, {slots} slots", True, slots * span_h, tuple(site.waits.values())))
    for idle_s in idles_s:
        size = Size(
            "cloud", INSTANCE_SLOTS, INSTANCE_SLOTS, None, 1.0, 0, MOST_SLOTS // INSTANCE_SLOTS, idle_s, 900.0, None, frozenset({"s"})
        )
        elastic = Elastic("share", size, BOOT_S, quota, Sharing())
        simulate(trace, elastic)
        name = f"elastic, idle {idle_s / 60:.0f} min, up to {elastic.most * INSTANCE_SLOTS} slots"
        found.append(Pool(name, False, elastic.slot_s / 3600, tuple(elastic.waits.values())))
    return found


def pool_rows(found: Sequence[Pool], work_h: float) -> list[list[str]]:
    """One row a pool: its cost, how much of it was work, and waits in minutes."""
    rows = []
    for pool in found:
        waits = [pool.mean_s, *(percentile(pool.waits, part) for part in (0.5, 0.95, 0.99)), max(pool.waits)]
        rows.append([pool.name, f"{pool.cost:,.0f}", f"{work_h / pool.cost:.0%}", *(f"{wait / 60:,.1f}" for wait in waits)])
    return rows


def comparison(found: Sequence[Pool]) -> str:
    """Compare the elastic pools with the smallest fixed pool that is as good as the largest one, up to 5 % of the mean wait."""
    fixed = [pool for pool in found if pool.is_fixed]
    good = min((pool for pool in fixed if pool.mean_s <= 1.05 * min(each.mean_s for each in fixed)), key=lambda pool: pool.cost)
    return "\n".join(
        f"{pool.name}: mean wait {pool.mean_s / good.mean_s:.2f} times and cost {pool.cost / good.cost:.2f} times those of {good.name}"
        for pool in found
        if not pool.is_fixed
    )


def plot_cost(found: Sequence[Pool]) -> str:
    """Return an SVG of cost against mean wait: the further to the lower left, the better."""
    width, height, left, bottom = 640, 320, 70, 40
    costs, waits = [pool.cost for pool in found], [pool.mean_s / 60 for pool in found]
    low, high = math.log(min(waits) * 0.8), math.log(max(waits) * 1.25)
    x_of = lambda cost: left + (width - left - 30) * cost / max(costs)  # noqa: E731
    y_of = lambda wait: height - bottom - (height - 20 - bottom) * (math.log(wait) - low) / (high - low)  # noqa: E731
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for wait in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000):
        if low <= math.log(wait) <= high:
            parts.append(f'<path d="M{left} {y_of(wait):.1f}H{width - 30}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 8}" y="{y_of(wait) + 4:.1f}" text-anchor="end">{wait:,} min</text>')
    for part in range(5):
        cost = max(costs) * part / 4
        parts.append(f'<path d="M{x_of(cost):.1f} 20V{height - bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x_of(cost):.1f}" y="{height - bottom + 16}" text-anchor="middle">{cost / 1000:,.0f}k</text>')
    line = "L".join(f"{x_of(pool.cost):.1f} {y_of(pool.mean_s / 60):.1f}" for pool in found if pool.is_fixed)
    parts.append(f'<path d="M{line}" fill="none" stroke="{COLOURS["fifo"]}" stroke-width="2"/>')
    places = itertools.cycle((("end", -8), ("middle", 16), ("start", -8)))  # those of elastic pools are close together
    for pool in found:
        colour, (anchor, below) = COLOURS["fifo" if pool.is_fixed else "share"], ("middle", -8) if pool.is_fixed else next(places)
        x, y, text = x_of(pool.cost), y_of(pool.mean_s / 60), re.sub("fixed, |elastic, |, up to.*", "", pool.name)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + below:.1f}" fill="{colour}" text-anchor="{anchor}">{text}</text>')
    for number, (name, colour) in enumerate((("fixed pools", COLOURS["fifo"]), ("elastic pools", COLOURS["share"]))):
        parts.append(f'<text x="{width - 40}" y="{40 + 18 * number}" fill="{colour}" text-anchor="end">{name}</text>')
    middle, said = (left + width) / 2, "slot-hours paid for in the month, and the mean wait of a job"
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{said}</text></svg>')
    return "\n".join(parts) + "\n"


# == Main ==


def main(words: Sequence[str] | None = None) -> int:
    """Play the trace by each policy, print the tables, and write the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", type=Path, help="a trace in the Standard Workload Format (default: a synthetic month)")
    parser.add_argument("--jobs", type=int, default=40_000, help="jobs of the synthetic month")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", default="8,8", help="slots of each client, separated by commas")
    parser.add_argument("--quota", type=int, default=5, help="runs of one user at once")
    parser.add_argument("--plot", type=Path, help="write the plot of waits, or of cost against waits, to this file (SVG)")
    parser.add_argument("--elastic", action="store_true", help="compare fixed pools with cloud instances that come and go")
    options = parser.parse_args(words)
    trace = read_swf(options.trace) if options.trace else synthetic_month(options.jobs, seed=options.seed)
    clients = [int(word) for word in options.clients.split(",")]
    fitting = [job for job in trace if job.cpus <= max(clients)]
    span = max(job.at + job.run_s for job in fitting) - fitting[0].at
    load = sum(job.cpus * job.run_s for job in fitting) / span / sum(clients)
    print(
        f"{len(fitting):,} jobs of {len({job.user for job in fitting}):,} users in {span / 86400:.1f} days, {sum(clients)} slots, "
        f"load {load:.0%}; {len(trace) - len(fitting)} are wider than any client and left out\n"
    )
    if options.elastic:
        return compare_pools(fitting, options.quota, options.plot)
    play = functools.partial(simulate, fitting)
    sites = {policy: play(Site(policy, clients, options.quota, Sharing())) for policy in POLICIES}
    heads = ["policy", "mean wait, min", "median", "p95", "p99", "longest", "slowdown, median", "p95", "heaviest user"]
    print(table(heads, [figures(policy, fitting, site) for policy, site in sites.items()]) + "\n")
    classes = {policy: by_class(fitting, site) for policy, site in sites.items()}
    names = list(classes["share"])
    print("95 of 100 jobs wait no longer than (min), by how many jobs their user sends:\n")
    print(table(["policy", *names], [[policy, *(f"{found[name]:.1f}" for name in names)] for policy, found in classes.items()]))
    if options.plot:
        options.plot.write_text(plot_waits({policy: list(site.waits.values()) for policy, site in sites.items()}))
    return 0


def compare_pools(trace: Sequence[Job], quota: int, plot: Path | None) -> int:
    """Print what fixed and elastic pools cost, and how long jobs wait; write the plot."""
    found = pools([job for job in trace if job.cpus <= INSTANCE_SLOTS], quota)
    work_h = sum(job.cpus * job.run_s for job in trace if job.cpus <= INSTANCE_SLOTS) / 3600
    heads = ["pool", "slot-hours", "of them work", "mean wait, min", "median", "p95", "p99", "longest"]
    print(table(heads, pool_rows(found, work_h)) + "\n\n" + comparison(found))
    if plot:
        plot.write_text(plot_cost(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
