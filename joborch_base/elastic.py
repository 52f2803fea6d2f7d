"""Which cloud instances are wanted: a pure function of the queue, the instances, past times, cost and a clock.

1. What is known
2. Room for the jobs that wait
3. The decision
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from joborch_base.vocabulary import GIB, format_duration, plural

# == 1. What is known ==  Sizes, instances and demand, as the caller counts them; times are seconds of one clock.

EXPECTED = ("intended", "booting", "joined")  # states of instances that take jobs now or soon
BOOT_S = 120.0  # how long an instance boots on a cloud where none has joined yet
HOUR_S, HOUR_ENDS_S = 3600.0, 300.0  # a paid hour, and its end, in which an instance may be drained
ROUNDING = 1e-9


@dataclass(frozen=True)
class Size:
    """What one cloud offers: the size of its instances, their cost, and the limits of its settings."""

    cloud: str
    slots: int
    cpus: int
    memory: int | None  # bytes; None if unknown
    hourly_cost: float
    min: int
    max: int
    idle_s: float
    boot_limit_s: float
    daily_budget: float | None
    services: frozenset[str]
    paid_by_hour: bool = False

    def fits(self, demand: Demand) -> bool:
        """Tell whether an idle instance could run one of the jobs."""
        memory = self.memory is None or demand.memory is None or demand.memory <= self.memory
        return demand.service in self.services and demand.cpus <= min(self.slots, self.cpus) and memory


@dataclass(frozen=True)
class Instance:
    """One of this server's instances, as its row knows it."""

    uuid: str
    cloud: str
    state: str  # "intended", "booting", "joined", "draining" or "ending"
    made_at: float
    running: int  # payloads
    idle_since: float | None  # None while it runs payloads, and before it has joined
    silent: bool = False  # its client has joined, and does not answer now


@dataclass(frozen=True)
class Demand:
    """Jobs of one kind that could run now if there were slots: quotas are counted already."""

    service: str
    cpus: int
    memory: int | None  # bytes; None if a job does not say
    jobs: int
    waiting_since: float  # of the oldest

    def __str__(self) -> str:
        return f"{plural(self.jobs, 'job', 'jobs')} of {self.service}"


@dataclass(frozen=True)
class Wanted:
    """What to do now."""

    create: tuple[tuple[str, int], ...] = ()  # cloud, how many
    drain: tuple[str, ...] = ()  # uuids
    reasons: tuple[str, ...] = ()  # sentences: what is done or not done, and why
    waits: Mapping[str, str] = field(default_factory=dict)  # by service: why no instance is made for jobs that wait


# == 2. Room for the jobs that wait ==  What instances take now and soon, so that none is made for jobs that will start anyway.


@dataclass
class Room:
    """What one instance can still take. `used` tells whether it gets jobs of the queue."""

    size: Size
    slots: int
    memory: float  # bytes
    busy: float  # slots that will become free
    is_sure: bool = True  # it runs nothing and answers, so what seems free is free
    used: bool = False

    def places(self, demand: Demand) -> int:
        """Return how many of the jobs fit at once."""
        by_memory = math.inf if not demand.memory else self.memory // demand.memory
        return int(min(self.slots // demand.cpus, by_memory))

    def take(self, demand: Demand, left: float, starts: float) -> float:
        """Start jobs on the free slots, and return how many are left. Each slot takes `starts` of them, one after the other."""
        if not self.size.fits(demand):
            return left
        places = min(self.places(demand), math.ceil(left / starts - ROUNDING))
        if places > 0:
            self.used = True
            self.slots -= places * demand.cpus
            self.memory -= places * (demand.memory or 0)
        return max(0.0, left - places * starts)

    def turn_over(self, demand: Demand, left: float, starts: float) -> float:
        """Start jobs on the busy slots once they are free, and return how many are left. Each slot takes `starts` of them."""
        if not self.size.fits(demand):
            return left
        slots = min(self.busy, left * demand.cpus / starts)
        self.busy -= slots
        return max(0.0, left - slots / demand.cpus * starts)


def room_of(size: Size, instance: Instance | None = None) -> Room:
    """Return the room of an instance, or of a new one."""
    busy = min(instance.running, size.slots) if instance else 0
    memory = math.inf if size.memory is None else size.memory * (1 - busy / max(size.slots, 1))
    return Room(size, size.slots - busy, memory, busy, not busy and not (instance and instance.silent))


# == 3. The decision ==  One `Plan` goes through minimum, demand and idle instances, and notes why it does what.


def wanted_instances(
    now: float,
    demand: Sequence[Demand],
    free_slots_elsewhere: Mapping[str, int],
    sizes: Sequence[Size],
    instances: Sequence[Instance],
    spent_today: Mapping[str, float],
    held: Mapping[str, str],
    boot_s: Mapping[str, float],
    run_s: Mapping[str, float],
) -> Wanted:
    """Return which instances to create and to drain now, and why.

    `demand` is in the order of age. `free_slots_elsewhere` has, by service, the free slots of clients that are no instances;
    `spent_today` and `boot_s` (usual boot time) are by cloud, `held` says by cloud why none can be made now, and `run_s` has
    the mean run by service. What is not known may be missing.

    Up: the first job of an empty pool gets an instance at once. Others get one unless a slot will be free for them within
    the time that an instance boots. Each new instance has jobs to run, is within its cloud's maximum and budget, and is the
    cheapest that fits.
    Down: an idle instance is drained after `idle_s`, in the last minutes of its paid hour if hours are paid, and one at a
    time in each cloud. At the budget, busy ones are drained too, down to the minimum: their payloads end in peace.
    """
    plan = Plan(now, sizes, instances, spent_today, held, boot_s)
    plan.drain_removed()
    for size in sizes:
        if plan.is_over_budget(size):
            plan.drain(size, plan.joined(size.cloud), f"{size.cloud} has spent its {size.daily_budget:g} for today")
        plan.keep_minimum(size)
    for each in demand:
        plan.serve(each, free_slots_elsewhere.get(each.service, 0), run_s.get(each.service))
    for size in sizes:
        idle = [each for each in plan.joined(size.cloud) if plan.is_superfluous(each, size)]
        plan.drain(size, idle, f"it has been idle for {format_duration(size.idle_s)}")
    create = tuple((cloud, count) for cloud, count in plan.create.items() if count)
    return Wanted(create, tuple(plan.drained), tuple(plan.reasons), plan.waits)


class Plan:
    """One decision under way."""

    def __init__(
        self,
        now: float,
        sizes: Sequence[Size],
        instances: Sequence[Instance],
        spent: Mapping[str, float],
        held: Mapping[str, str],
        boot_s: Mapping[str, float],
    ) -> None:
        self.now, self.spent, self.held = now, spent, held
        self.sizes = {size.cloud: size for size in sizes}
        self.instances = instances
        self.boot_s = {size.cloud: boot_s.get(size.cloud, min(BOOT_S, size.boot_limit_s)) for size in sizes}
        known = [each for each in instances if each.cloud in self.sizes]
        self.rooms = {each.uuid: room_of(self.sizes[each.cloud], each) for each in known if each.state == "joined"}
        # A cloud that is held back may never make what it was asked for.
        coming = [each for each in known if each.state == "booting" or (each.state == "intended" and each.cloud not in held)]
        self.coming = [room_of(self.sizes[each.cloud]) for each in coming]
        self.free_elsewhere: dict[str, float] = {}
        self.create: Counter[str] = Counter()
        self.drained: list[str] = []
        self.reasons: list[str] = []
        self.waits: dict[str, str] = {}

    # -- up --

    def still_to_pay(self, size: Size, state: str) -> float:
        """Return what an instance costs at least from now on: it boots, and is idle for a while before it is drained."""
        if state in ("draining", "ending"):
            return 0.0
        if size.paid_by_hour:
            return size.hourly_cost if state == "intended" else 0.0
        boots = 0.0 if state == "joined" else self.boot_s[size.cloud]
        return size.hourly_cost * (boots + size.idle_s) / HOUR_S

    def why_none(self, size: Size) -> str:
        """Return why a cloud makes no more instances now; empty if it can make one."""
        cloud, made = size.cloud, self.create[size.cloud]
        existing, spent = [each for each in self.instances if each.cloud == cloud], self.spent.get(cloud, 0.0)
        if cloud in self.held:
            return f"{cloud} is held back: {self.held[cloud]}"
        if len(existing) + made >= size.max:
            return f"{cloud} has all of its {plural(size.max, 'instance', 'instances')}" if size.max else f"{cloud} may have no instance"
        if size.daily_budget is None or not size.hourly_cost:
            return ""
        reserved = sum(self.still_to_pay(size, each.state) for each in existing) + (made + 1) * self.still_to_pay(size, "intended")
        if spent + reserved <= size.daily_budget + ROUNDING and not self.is_over_budget(size):
            return ""
        return f"{cloud} has spent {spent:.2f} of {size.daily_budget:g} for today, and one more would exceed that"

    def make(self, size: Size) -> Room:
        """Plan one more instance, and return its room."""
        self.create[size.cloud] += 1
        self.coming.append(room_of(size))
        return self.coming[-1]

    def keep_minimum(self, size: Size) -> None:
        """Plan as many instances as a cloud must have, if it can make them."""
        missing, why = size.min - self.expected(size.cloud), ""
        for _ in range(missing):
            why = self.why_none(size)
            if why:
                self.reasons.append(f"{size.cloud} has fewer than its minimum of {size.min}: {why}")
                return
            self.make(size)
        if missing > 0:
            self.reasons.append(f"{size.cloud} gets {plural(missing, 'instance', 'instances')}: its minimum is {size.min}")

    def expected(self, cloud: str) -> int:
        """Return how many instances of a cloud take jobs now or soon, without those planned."""
        return sum(each.cloud == cloud and each.state in EXPECTED for each in self.instances)

    def serve(self, demand: Demand, free_elsewhere: int, run_s: float | None) -> None:
        """Find room for jobs: in what is free or becomes free soon, and for the rest in new instances, the cheapest first."""
        able = [size for size in self.sizes.values() if size.fits(demand)]
        if demand.jobs <= 0:
            return
        if not able:
            self.say_too_large(demand)
            return
        window_s = self.boot_s[min(able, key=lambda size: (size.hourly_cost, size.cloud)).cloud]
        turns = window_s / max(run_s, ROUNDING) if run_s is not None else 0.0
        starts, left = max(1.0, turns), float(demand.jobs)
        # Jobs that have waited for longer than a boot cannot use what seems free or will be, or they would run by now.
        hopeful = self.now - demand.waiting_since < window_s
        if hopeful:
            left = self.use_elsewhere(demand, left, free_elsewhere, starts)
        for room in self.rooms.values():
            if hopeful or room.is_sure:
                left = room.take(demand, left, starts)
        if hopeful and turns:
            for room in self.rooms.values():
                left = room.turn_over(demand, left, turns)
        for room in self.coming:
            left = room.take(demand, left, starts)
        if left <= ROUNDING:
            self.reasons.append(f"{demand} wait for slots that are free, or will be as soon as a new instance could be")
            return
        self.serve_by_new(demand, left, starts, able)

    def use_elsewhere(self, demand: Demand, left: float, free: int, starts: float) -> float:
        """Give jobs to the free slots of other clients, which jobs of one service share; return how many are left."""
        free_now = self.free_elsewhere.get(demand.service, float(max(0, free)))
        places = min(free_now // demand.cpus, math.ceil(left / starts - ROUNDING))
        self.free_elsewhere[demand.service] = free_now - places * demand.cpus
        return max(0.0, left - places * starts)

    def serve_by_new(self, demand: Demand, left: float, starts: float, able: Sequence[Size]) -> None:
        """Plan instances for the jobs that are left, on the cheapest clouds that can make them."""
        refused: dict[str, str] = {}
        made: Counter[str] = Counter()
        while left > ROUNDING and len(refused) < len(able):
            size = min((each for each in able if each.cloud not in refused), key=lambda each: cost_of(each, demand, left, starts))
            why = self.why_none(size)
            if why:
                refused[size.cloud] = why
                continue
            left = self.make(size).take(demand, left, starts)
            made[size.cloud] += 1
        for cloud, count in made.items():
            self.reasons.append(f"{cloud} gets {plural(count, 'instance', 'instances')}: {demand} wait")
        if left > ROUNDING:
            why = "; ".join(refused.values())
            self.waits.setdefault(demand.service, why)
            self.reasons.append(f"{plural(math.ceil(left - ROUNDING), 'job', 'jobs')} of {demand.service} wait: {why}")

    def say_too_large(self, demand: Demand) -> None:
        """Say that no cloud has instances of this size. A service that no cloud serves is none of their business."""
        serving = [size for size in self.sizes.values() if demand.service in size.services]
        if serving:
            memory = f" and {demand.memory / GIB:.1f} GiB of memory" if demand.memory else ""
            why = f"no cloud has instances with {plural(demand.cpus, 'slot', 'slots')}{memory} for it"
            self.waits.setdefault(demand.service, why)
            self.reasons.append(f"{demand} wait: {why}")

    # -- down --

    def joined(self, cloud: str) -> list[Instance]:
        """Return the instances of a cloud that take jobs."""
        return [each for each in self.instances if each.cloud == cloud and each.state == "joined"]

    def drain_removed(self) -> None:
        """Drain what runs nothing on clouds that are no longer in the settings."""
        for cloud in sorted({each.cloud for each in self.instances} - set(self.sizes)):
            for each in [each for each in self.joined(cloud) if not each.running][:1]:
                self.drained.append(each.uuid)
                self.reasons.append(f"instance {each.uuid} is drained: its cloud {cloud} is no longer in the settings")

    def drain(self, size: Size, found: Sequence[Instance], why: str) -> None:
        """Drain one of these instances, the least busy and longest idle, unless the minimum of its cloud needs it."""
        if not found:
            return
        if self.expected(size.cloud) <= size.min:
            self.reasons.append(f"{size.cloud} keeps its minimum of {plural(size.min, 'instance', 'instances')}")
            return
        one = min(found, key=lambda each: (each.running, math.inf if each.idle_since is None else each.idle_since, each.uuid))
        del self.rooms[one.uuid]
        self.drained.append(one.uuid)
        self.reasons.append(f"instance {one.uuid} of {size.cloud} is drained: {why}")

    def is_over_budget(self, size: Size) -> bool:
        """Tell whether a cloud has spent what it may today."""
        return size.daily_budget is not None and size.hourly_cost > 0 and self.spent.get(size.cloud, 0.0) >= size.daily_budget

    def is_superfluous(self, each: Instance, size: Size) -> bool:
        """Tell whether an instance has been idle for long enough, gets no job of the queue, and is not paid for any longer."""
        if each.running or each.idle_since is None or self.now - each.idle_since < size.idle_s:
            return False
        if self.is_over_budget(size) or self.create[size.cloud] or self.rooms[each.uuid].used:
            return False
        return not size.paid_by_hour or HOUR_S - (self.now - each.made_at) % HOUR_S <= HOUR_ENDS_S


def cost_of(size: Size, demand: Demand, left: float, starts: float) -> tuple[float, float, str]:
    """Return a sort key, cheapest first: what instances for all these jobs cost, then what one costs."""
    count = math.ceil(left / (max(1, room_of(size).places(demand)) * starts) - ROUNDING)
    return max(1, count) * size.hourly_cost, size.hourly_cost, size.cloud
