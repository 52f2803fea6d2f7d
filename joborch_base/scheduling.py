"""Whose turn it is, which client gets a job, and why a job waits: pure functions of rows and a clock.

1. Scheduling
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Callable, NamedTuple, TypeVar

from joborch_base.states import BUSY, Job, Status
from joborch_base.vocabulary import plural

# == 1. Scheduling ==  Pure functions of rows and a clock: whose turn it is, which client gets the job, and why a job waits.

NO_USE = float("-inf")  # log2(0)
CANDIDATES_LOOKED_AT = 100  # of one service, when its first jobs are too wide for the free slots
UNKNOWN_RUN_S = 60.0  # charged in advance for a run when the service has no earlier runs
TURN_S = 0.001  # the least cost of a turn: even jobs that take no time must not pass users who had no turn yet
TURNING_S = 1.0  # no job is sent ahead to a client that finished no run for this long
HANDOVER_S = 0.2  # how much work may queue at a client, so that its slots do not idle between two jobs
FULL_QUEUE_RETRY_S = 60


@dataclass(frozen=True)
class Sharing:
    """What turns depend on, apart from the rows and the services."""

    half_life_s: float = 6 * 3600.0
    ageing_s: float = 60.0
    weights: Mapping[int, float] = field(default_factory=dict)  # by user; weights in the store take precedence


class Waiting(NamedTuple):
    """A queued job, as the ranking sees it."""

    job_id: int
    priority: int
    arrived_at: float  # steady
    cpus: int
    memory: int | None  # MiB
    timeout: float | None  # seconds
    gpus: int = 0


class Usage(NamedTuple):
    """A user's past use of a service, as the base-2 logarithm of slot-seconds, and the mean length of the user's runs.

    It covers finished runs only. Running ones are added on the fly (`with_open_runs`), so nothing is ever refunded.
    A use u at time `now` is stored as log2(u) + now / half-life. Stored values never need an update: after one half-life a
    new slot-second counts twice as much as an old one, and the order of users does not change as time passes.
    """

    use: float = NO_USE
    runs: int = 0
    mean_s: float = 0.0


class Pace(NamedTuple):
    """The mean length of a service's runs."""

    runs: int = 0
    mean_s: float = 0.0


Mean = TypeVar("Mean", Usage, Pace)


def with_run(known: Mean, run_s: float) -> Mean:
    """Return a moving mean of about the last twenty runs, with one more run."""
    runs = known.runs + 1
    return known._replace(runs=runs, mean_s=known.mean_s + (run_s - known.mean_s) / min(runs, 20))


class Run(NamedTuple):
    """A job at a client: what its user is charged for it, and what it takes there."""

    job_id: int
    cpus: int
    charged: float = 0.0  # slot-seconds, in advance; more if it runs longer than that
    since: float | None = None  # steady; None before it starts
    timeout: float | None = None  # seconds
    memory: int = 0  # MiB
    client: str = ""
    killed: bool = False  # a kill is requested
    pinned: bool = False  # a lost answer ties it to the client
    gpus: int = 0

    def run_s(self, now: float) -> float:
        return 0.0 if self.since is None else max(0.0, now - self.since)

    def ends_at(self, now: float) -> float:
        """Return when it will have ended: infinity without a time limit, which counts from the start of the run."""
        return float("inf") if self.timeout is None else (now if self.since is None else self.since) + self.timeout


RUN_TAKES = slice(Run._fields.index("memory"), None)  # what of a Run counts at its client


class Turn(NamedTuple):
    """When a user is next in a service: turns sort in this order. Who has no free run left comes last."""

    at_quota: bool
    rank: float
    head: Waiting
    user_id: int

    def candidate(self, service: str) -> Candidate:
        return Candidate(service, self.head.job_id, self.head.cpus, self.head.memory, self.head.timeout, self.head.gpus)


class Share(NamedTuple):
    """A user's part in a service. `waiting` are the queued jobs that the rank depends on (see `rank_of`)."""

    usage: Usage = Usage()
    runs: tuple[Run, ...] = ()  # by job id
    waiting: tuple[Waiting, ...] = ()
    turn: Turn | None = None  # None if no job could run

    def run(self, job_id: int) -> Run | None:
        return next((run for run in self.runs if run.job_id == job_id), None)


class Line(NamedTuple):
    """The load of a service: how many of its jobs are at clients, how long they take, and how many could run."""

    busy: int = 0
    pace: Pace = Pace()
    queued: int = 0  # as `jobs_line` counts them


class Load(NamedTuple):
    """What the server's jobs take at a client."""

    jobs: int = 0
    cpus: int = 0
    memory: int = 0  # MiB
    kills: int = 0
    pinned: int = 0
    gpus: int = 0

    def plus(self, run: Run, count: int) -> Load:
        """Return the load with a run more, or with one fewer if `count` is -1."""
        taken = (1, run.cpus, run.memory, run.killed, run.pinned, run.gpus)
        return Load(*(total + count * each for total, each in zip(self, taken)))


def used(use: float, slot_s: float, now: float, half_life_s: float) -> float:
    """Return a use (see Usage) increased by `slot_s` slot-seconds at time `now`."""
    if slot_s <= 0:
        return use
    term = now / half_life_s + math.log2(slot_s)
    return max(use, term) + math.log2(1 + 2.0 ** (min(use, term) - max(use, term)))


def counted_s(run_s: float, half_life_s: float) -> float:
    """Return how many seconds of a run count now: each eighth of a half-life counts less than the one after it."""
    step_s, fade = half_life_s / 8, 2.0 ** (-1 / 8)
    whole = min(run_s // step_s, 1000.0)
    return float(step_s * (1 - fade**whole) / (1 - fade) + (run_s - whole * step_s) * fade**whole)


def with_open_runs(use: float, runs: Collection[Run], now: float, half_life_s: float, in_advance: bool = True) -> float:
    """Return a use plus its open runs: everything that was charged in advance, or only the time they have run."""
    had = sum(run.cpus * counted_s(run.run_s(now), half_life_s) for run in runs)
    ahead = sum(max(0.0, run.charged - run.cpus * run.run_s(now)) for run in runs) if in_advance else 0.0
    return used(use, had + ahead, now, half_life_s)


def use_now(use: float, now: float, half_life_s: float) -> float:
    """Convert a use (see Usage) to slot-seconds at time `now`."""
    return float(2.0 ** min(use - now / half_life_s, 1000.0))


def charge_in_advance(job: Job, usage: Usage, pace: Pace, half_life_s: float) -> float:
    """Return the slot-seconds that a job is charged when it starts, so that running jobs count at once.

    The estimate is the mean run of the user, else of the service. Longer runs are charged as they go on.
    """
    expected = usage.mean_s if usage.runs else pace.mean_s if pace.runs else UNKNOWN_RUN_S
    return job.cpus * min(expected, job.timeout or expected, half_life_s / 8)


def cap_idle_credit(use: float, weight: float, level: float) -> float:
    """Return the use of a user who comes back after a pause: at most one half-life of credit over the other active users.

    `level` is the least use by weight among those. The cap is applied when a run ends and the user has more jobs, not when a
    job arrives: a newcomer goes ahead of everyone with more use until the first run has been charged.
    """
    return max(use, level - 1 + math.log2(weight))


def rank_of(policy: str, waiting: Sequence[Waiting], share_rank: float, ageing_s: float) -> tuple[float, Waiting]:
    """Return a user's rank for a service (the lowest goes next), and the job to run.

    `waiting` holds the first job of each priority; the policy `share` needs only the highest. Ranks do not change as time
    passes. The policy `priority` is one queue for all users, in which a point of priority is worth `ageing_s` seconds of
    waiting. So only jobs that arrive within (100 - priority) * `ageing_s` of a job can overtake it: 200 minutes at most.
    """
    if policy == "priority":
        first = min(waiting, key=lambda job: (job.arrived_at / ageing_s - job.priority, job.job_id))
        return first.arrived_at / ageing_s - first.priority, first
    highest = min(waiting, key=lambda job: (-job.priority, job.job_id))
    return min(job.arrived_at for job in waiting) if policy == "fifo" else share_rank, highest


def run_of_job(job: Job) -> Run | None:
    """Return what is kept in memory of a job at a client; None of another job."""
    if job.status not in BUSY:
        return None
    since = job.moved_at if job.status is Status.RUNNING else None
    marks = (job.kill_requested_at is not None, job.status is Status.UNKNOWN and job.dest_id is None)
    return Run(job.id, job.cpus, job.charged, since, job.timeout, job.memory or 0, job.client or "", *marks, job.gpus)


# -- which client gets a job --


class Candidate(NamedTuple):
    """The first queued job of a user who is below the quota: what a service could run next."""

    service: str
    job_id: int
    cpus: int = 1
    memory: int | None = None  # MiB
    timeout: float | None = None  # seconds
    gpus: int = 0


class ServiceQueue(NamedTuple):
    """The candidates of one service in the order of their turns, its clients, and its load."""

    service: str
    clients: Collection[str]
    busy: float  # the part of its max_runs that is in use, 0 to 1
    run_s: float | None  # the mean run, if known
    heads: Iterable[Candidate]


class ClientCapacity(NamedTuple):
    """A client that takes jobs now, as the scheduler sees it."""

    name: str
    slots: int
    free: int  # slots; negative if jobs queue there
    memory: int | None = None  # MiB; None if the client does not say
    free_memory: int | None = None
    load: float = 0.0  # percent
    failed_s_ago: float = float("inf")
    turning: bool = False  # a run ended there less than TURNING_S ago
    queues: bool = False  # a 2.2 client: it does not report its slots, and queues jobs by itself
    taken: int = 0  # slots of all its jobs, including those that have ended
    job_slots: bool = False  # it feeds a batch system: one slot holds one job, whatever number of cores it needs
    costs: bool = False  # a cloud instance, which is ended when it is idle
    gpus: int | None = 0  # None if the batch system knows
    free_gpus: int = 0

    def wanted(self, cpus: int) -> int:
        """Return how many slots a job occupies here."""
        return 1 if self.job_slots else cpus

    def has_gpus(self, gpus: int, free: bool = False) -> bool:
        """Tell whether there are so many GPUs, or so many `free` ones. A 2.2 client knows none."""
        return not gpus or self.gpus is None or gpus <= (self.free_gpus if free else self.gpus)

    def could_run(self, cpus: int, memory: int | None, gpus: int = 0) -> bool:
        """Tell whether a job of this size would fit on an idle client."""
        if not self.has_gpus(gpus):
            return False
        return self.queues or (self.wanted(cpus) <= self.slots and (memory is None or self.memory is None or memory <= self.memory))

    def room(self, run_s: float | None, cpus: int = 1) -> int:
        """Return how many slots a job may use: the free ones, and for short runs a few more, so that no slot idles.

        Jobs sent ahead amount to at most HANDOVER_S of work, so they delay a newcomer's job no longer. Nothing is sent ahead if
        no run ended lately, nor a job that needs several slots at once: both could wait there for long.
        """
        if self.queues:
            return 1 << 30
        if not self.turning or run_s is None or cpus > 1:
            return self.free
        return self.free + min(max(2 * self.slots, 6), int(HANDOVER_S * self.slots / max(run_s, 1e-3)))

    def preference(self) -> tuple[bool, float, float, float, str]:
        """Return a sort key, best client first: most free slots, lowest load, longest time since a failure.

        Cloud instances come last, and those with the fewest free slots first, so that others become idle and can be ended.
        """
        return (self.costs, self.free if self.costs else -self.free, self.load, -self.failed_s_ago, self.name)


class Reservation(NamedTuple):
    """A client that is reserved for a wide job until it can start; `cpus`, `memory` and `gpus` are what other jobs may use meanwhile."""

    until: float  # steady; the latest start of the wide job, infinity if unknown
    cpus: int
    memory: float
    gpus: float = 0

    def lets(self, head: Candidate, now: float) -> bool:
        """Tell whether another job may run first: it ends before `until`, or fits into the spare part (EASY backfilling)."""
        ends_before = head.timeout is not None and now + head.timeout <= self.until < float("inf")
        return ends_before or (head.cpus <= self.cpus and (head.memory or 0) <= self.memory and head.gpus <= self.gpus)


def reserve(candidate: Candidate, client: ClientCapacity, runs: Iterable[Run], now: float) -> Reservation:
    """Return the latest time at which a client will have room for a job, and what else will be free then.

    If that depends on a run without a time limit, nothing else is free: everything that becomes free is kept for the job. If it
    waits for GPUs alone, what it needs besides them is kept.
    """
    wanted, free, until = client.wanted(candidate.cpus), client.free, 0.0
    memory = float("inf") if client.free_memory is None else float(client.free_memory)
    gpus = float("inf") if client.gpus is None else float(client.free_gpus)
    spare = (free - wanted, memory - (candidate.memory or 0))
    endless = Reservation(float("inf"), *(spare if min(spare) >= 0 else (0, 0)))
    for run in sorted(runs, key=lambda run: run.ends_at(now)):
        if free >= wanted and memory >= (candidate.memory or 0) and gpus >= candidate.gpus:
            break
        free, memory, gpus, until = free + client.wanted(run.cpus), memory + run.memory, gpus + run.gpus, run.ends_at(now)
    if until == float("inf") or free < wanted:
        return endless
    return Reservation(until, free - wanted, memory - (candidate.memory or 0), gpus - candidate.gpus)


def fits(candidate: Candidate, client: ClientCapacity, run_s: float | None, reserved: Reservation | None, now: float) -> bool:
    """Tell whether a job can be sent to a client now."""
    memory_fits = candidate.memory is None or client.free_memory is None or candidate.memory <= client.free_memory
    wanted = client.wanted(candidate.cpus)
    if wanted > client.room(run_s, wanted) or not (memory_fits or client.queues) or not client.has_gpus(candidate.gpus, free=True):
        return False
    return reserved is None or reserved.lets(candidate, now)


def choose(
    queues: Sequence[ServiceQueue], clients: Sequence[ClientCapacity], runs_at: Callable[[str], Iterable[Run]], now: float
) -> tuple[Candidate, ClientCapacity] | None:
    """Return the next job and the client that gets it, or None if nothing can be sent now.

    The service that uses the smallest part of its limit goes first; within a service, turns decide. The first job that is too
    wide for the free slots reserves the client that can start it earliest; other jobs pass it only if they do not delay it.
    """
    reserved: dict[str, Reservation] = {}
    for queue in sorted(queues, key=lambda queue: queue.busy):
        able = [client for client in clients if client.name in queue.clients]
        if not any(client.room(queue.run_s) > 0 for client in able):
            continue
        one_waits = False
        for candidate in queue.heads:
            fitting = [client for client in able if fits(candidate, client, queue.run_s, reserved.get(client.name), now)]
            if fitting:
                return candidate, min(fitting, key=ClientCapacity.preference)
            size = (candidate.cpus, candidate.memory, candidate.gpus)
            large = [each for each in able if each.could_run(*size) and each.name not in reserved]
            if large and not one_waits:
                one_waits = True
                starts = {client.name: reserve(candidate, client, runs_at(client.name), now) for client in large}
                best = min(large, key=lambda client: (starts[client.name].until, *client.preference()))
                reserved[best.name] = starts[best.name]
    return None


# -- why a job waits --


class QueueFacts(NamedTuple):
    """The figures that decide when a queued job runs."""

    runs_of_user: int
    runs_per_user: int
    runs_of_service: int
    max_runs: int
    queued_before: int  # of the same user
    users_before: int = 0  # whose turn comes first
    cpus: int = 1
    memory: int | None = None  # MiB
    counted_to: int = 10_000  # jobs of the same user
    gpus: int = 0

    def before(self, with_others: bool = True) -> str:
        """Return what is ahead of the job, as a clause; empty if nothing is."""
        jobs = plural(self.queued_before, "of your jobs", "of your jobs", self.counted_to)
        users = plural(self.users_before if with_others else 0, "other user's turn", "other users' turns", 10_000)
        parts = [part for part in (jobs, users) if part]
        verb = "is" if len(parts) == 1 and parts[0].startswith("1 ") else "are"
        return f"{' and '.join(parts)} {verb} ahead of it" if parts else ""


def join_clauses(text: str, more: str, joint: str = " and ") -> str:
    """Join two clauses; `more` may be empty."""
    return f"{text}{joint}{more}" if more else text


def attempts_left(job: Job) -> bool:
    """Tell whether the job may be tried again after an infrastructure failure."""
    return job.attempt <= job.retries and job.kill_requested_at is None


def needs(cpus: int, memory: int | None) -> str:
    """Return a job's size in words: `2 slots and 4,096 MiB of memory`."""
    return plural(cpus, "slot", "slots") + (f" and {memory:,} MiB of memory" if memory else "")


def too_large_text(service: str, cpus: int, memory: int | None, places: Collection[ClientCapacity], gpus: int = 0) -> str:
    """Return why no client of a service could ever run a job of this size; empty if one could, or if none is known."""
    if not places or any(place.could_run(cpus, memory, gpus) for place in places):
        return ""
    equipped = [place for place in places if place.has_gpus(gpus)]
    if not equipped:
        most = max(place.gpus or 0 for place in places)
        return f"no client has {plural(gpus, 'GPU', 'GPUs')}: those for {service} have {f'at most {most}' if most else 'none'}"
    if gpus:
        reason = too_large_text(service, cpus, memory, equipped)
        return f"{reason}, of those with {plural(gpus, 'GPU', 'GPUs')}" if reason else ""
    largest = max(places, key=lambda place: (place.slots >= cpus, place.slots, place.memory or 0))
    has = needs(largest.slots, largest.memory if memory else None)
    return f"no client for {service} is large enough: it needs {needs(cpus, memory)}, and the largest, {largest.name}, has {has}"


def no_client_text(service: str, troubles: Mapping[str, str]) -> str:
    """Say that no client of a service takes jobs, and why."""
    said = [f"{name} {why}" for name, why in troubles.items()] or ["none has joined this server for it"]
    more = [f"and {plural(len(said) - 3, 'other', 'others')} (GET /clients)"] if len(said) > 4 else []
    return f"no client for {service} takes jobs: " + "; ".join(said[:3] + more if more else said)


def why_waiting(service: str, facts: QueueFacts, troubles: Mapping[str, str], places: Collection[ClientCapacity]) -> str:
    """Return what a queued job waits for, as one sentence.

    `troubles` says, by client, why it takes no jobs now (empty if it does); `places` are the clients that do.
    """
    stopped = no_client_text(service, troubles) if (troubles or not places) and all(troubles.values()) else ""
    if facts.runs_of_user >= facts.runs_per_user:
        text = f"{facts.runs_of_user} of your {facts.runs_per_user} runs for {service} are in use"
        return join_clauses(join_clauses(text, facts.before(with_others=False)), stopped, "; ")
    if facts.runs_of_service >= facts.max_runs:
        return join_clauses(join_clauses(f"all {facts.max_runs} runs of {service} are in use", facts.before()), stopped, "; ")
    if stopped:
        return stopped
    too_large = too_large_text(service, facts.cpus, facts.memory, places, facts.gpus)
    if too_large:
        return too_large
    if places and all(place.free <= 0 and not place.queues for place in places):
        slots, names = sum(place.slots for place in places), sorted(place.name for place in places)
        where, taken = names[0] if len(names) == 1 else f"{len(names)} clients", "the only slot" if slots == 1 else f"all {slots} slots"
        return join_clauses(f"{taken} of {where} {'is' if slots == 1 else 'are'} in use", facts.before())
    if facts.before():
        return f"it waits for its turn: {facts.before()}"
    if places and not any(place.queues or place.free >= place.wanted(facts.cpus) for place in places):
        best = max(places, key=lambda place: (place.could_run(facts.cpus, facts.memory, facts.gpus), place.free))
        has = f"{best.name} has {max(0, best.free)} of {best.slots} free and reserves freed slots for it"
        return f"it needs {needs(facts.cpus, None)} at once: {has}"
    if places and not any(place.has_gpus(facts.gpus, free=True) for place in places):
        best = max(places, key=lambda place: (place.has_gpus(facts.gpus), place.free_gpus))
        has = f"{best.name} has {max(0, best.free_gpus)} of {best.gpus} free"
        several = (" at once", " and reserves freed GPUs for it") if facts.gpus > 1 else ("", "")
        return f"it needs {plural(facts.gpus, 'GPU', 'GPUs')}{several[0]}: {has}{several[1]}"
    return f"it is next for a free slot at a client for {service}"


def wait_estimate_s(position: int, facts: QueueFacts, slots: int, run_s: float) -> float:
    """Estimate the seconds until a queued job starts, in rounds of `run_s`, the mean of past runs.

    `position` is the job's place in the service's queue, from 1. It waits for the longer of two: the rounds that the jobs
    ahead take with `slots` and max_runs, and the rounds that its user's own jobs take with runs_per_user.
    """
    at_once = max(1, min(slots, facts.max_runs))
    free = max(0, at_once - facts.runs_of_service)
    rounds = max(0, position - free + at_once - 1) // at_once
    own_free = max(0, facts.runs_per_user - facts.runs_of_user)
    own_rounds = max(0, facts.queued_before + 1 - own_free + facts.runs_per_user - 1) // facts.runs_per_user
    return max(rounds, own_rounds) * run_s
