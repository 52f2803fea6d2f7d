"""Clouds: the server makes clients in them when jobs wait, and ends them when these are done.

A row is written before a cloud is asked for an instance, and it is the row that decides: an instance without one is ended, and
a row without an instance is ended, too. What a call that failed has done is looked up by the tags that each instance has.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from joborch import (
    AT_CLIENT,
    BIGGEST,
    INSTANCE,
    JSON_TYPE,
    SMALLEST,
    Answer,
    Backoff,
    ClientCapacity,
    Cloud,
    ConfigError,
    Demand,
    Gives,
    HttpError,
    Instance,
    JoborchError,
    Link,
    Loop,
    Move,
    Node,
    Parameter,
    Pause,
    Reason,
    Request,
    Server,
    Size,
    Status,
    Wanted,
    crash_point,
    format_duration,
    load_plugin,
    log,
    new_uuid,
    one_line,
    payload_gone,
    plural,
    rfc3339,
    route,
    statements,
    wanted_instances,
)

NEWS_S = 1.0  # how often new jobs may lead to a new decision, besides those of each interval
UNKNOWN_S = 60.0  # how long an instance that a cloud may have created is looked for
REFUSED_S = 60.0  # how long a cloud is not asked again for instances after it refused one
LONGEST_S = 3600.0  # the same after many instances in a row that did not join
ENDED_SHOWN = 20  # instances that have ended, in GET /clouds
USERS_SHOWN = 20  # users whose jobs have cost most, in GET /clouds
DAY_S = 86400.0
SILENT_S = 60.0  # how long jobs hope for the slots of an instance whose client does not answer
POLLS_WITHIN_S = 5.0  # of the answer to a poll, a client polls again
UNLISTED = "{cloud} does not list the instance {name}, whose client calls, so it is kept"
ALL_CLOUDS = "all clouds"  # in the table `paused`; no service can have this name
MEMORY_LEFT = 0.92  # of an instance's memory, after what its kernel and system take
SLOW_BOOTS = 50  # ended instances whose boot times count
TOKEN_TEXT = re.compile(r"joborch_[0-9A-Za-z]{20,}")


class Row(NamedTuple):
    """A row of the table `instances`. Times are steady."""

    uuid: str
    name: str  # of its client and token
    cloud: str
    state: str
    node: str | None
    made_at: float
    asked_at: float | None
    joined_at: float | None
    ended_at: float | None
    hourly_cost: float
    by_hour: int
    cost: float  # once it has ended
    reason: str
    console: str

    def cost_between(self, begin: float, end: float) -> float:
        """Return what it costs between two times: from when the cloud was asked for it until it is gone; nothing if it was never made."""
        if self.node is None and self.ended_at is not None:
            return 0.0
        start, stop = max(self.asked_at or end, begin), min(self.ended_at or end, end)
        hours = max(0.0, stop - start) / 3600
        return self.hourly_cost * (math.ceil(hours) if self.by_hour else hours)


@dataclass
class Spent:
    """What was spent, in the currency of HOURLY_COST: in all, and today (UTC)."""

    in_all: float = 0.0
    today: float = 0.0

    def add(self, in_all: float, today: float) -> None:
        self.in_all, self.today = self.in_all + in_all, self.today + today

    def json(self) -> dict[str, float]:
        return {"spent_today": round(self.today, 4), "spent": round(self.in_all, 4)}


class Bill:
    """What the clouds have cost, by cloud, by cloud and service, and by user.

    A run costs its share of its instance's time: seconds x cores / slots. What is left is unassigned: boots, idle slots, runs
    that were lost with their instance, and the rest of a paid hour.
    """

    def __init__(self, clouds: Clouds) -> None:
        today, in_all = clouds.spent_today(), clouds.spent()
        self.clouds = {name: Spent(in_all.get(name, 0.0), today.get(name, 0.0)) for name in clouds.sites}
        self.services: dict[tuple[str, str], Spent] = {}
        self.users: dict[int, Spent] = {}
        for cloud, service, user_id, *spent in clouds.shares():
            if cloud in self.clouds:
                self.services.setdefault((cloud, service), Spent()).add(*spent)
                self.users.setdefault(user_id, Spent()).add(*spent)

    def of_services(self, cloud: str) -> dict[str, Spent]:
        """Return what the services have cost in a cloud."""
        return {service: spent for (name, service), spent in sorted(self.services.items()) if name == cloud}

    def unassigned(self, cloud: str) -> Spent:
        """Return what a cloud has cost beyond the runs there."""
        left, runs = self.clouds[cloud], self.of_services(cloud).values()
        return Spent(max(0.0, left.in_all - sum(each.in_all for each in runs)), max(0.0, left.today - sum(each.today for each in runs)))

    def dearest(self, user_id: int | None) -> tuple[list[tuple[int, Spent]], list[Spent]]:
        """Return the users whose jobs have cost most, or one user, and what the others have cost."""
        users = sorted(self.users.items(), key=lambda pair: (-pair[1].in_all, pair[0]))
        if user_id is not None:
            users.sort(key=lambda pair: pair[0] != user_id)
        count = USERS_SHOWN if user_id is None else int(user_id in self.users)
        return users[:count], [spent for _, spent in users[count:]]


class Missing(NamedTuple):
    """An instance that a cloud does not list."""

    lists: int  # in a row that lacked it
    since: float  # monotonic: the first of them
    calls: bool = False  # its client has called since, so that it is somewhere


class Site:
    """One cloud as the server knows it."""

    def __init__(self, cloud: Cloud, server: Server) -> None:
        self.cloud, self.server = cloud, server
        self.provider: Any = load_plugin("joborch_plugins.cloud_providers:make_provider")(cloud, server.config)
        self.outage, self.refusal = Backoff(server.clock), Backoff(server.clock)  # no answers; no new instances
        self.size: tuple[int, int | None] | None = None  # cores, bytes; None: not known yet
        self.strangers: dict[str, float] = {}  # by node: since when one with our tag has had no row (monotonic)
        self.missing: dict[str, Missing] = {}  # by uuid: instances that the last list lacked
        self.listed_at = float("-inf")  # monotonic

    def held(self) -> str:
        """Return why the cloud gets no requests for new instances now; empty if it does."""
        if self.outage.failures:
            return self.outage.reason
        return self.refusal.reason if self.refusal.waits() else ""

    def failed(self, error: Exception) -> None:
        """Pause calls after one that failed."""
        if self.outage.failed(one_line(str(error), 300)):
            log.warning("cloud %s: %s", self.cloud.name, self.outage.reason)
            self.server.wake("clouds")  # another cloud may take over, and jobs learn why they wait

    def refused(self, why: str, longer: bool = False) -> None:
        """Ask for no new instances for a while; `longer` after each failure in a row that has cost money."""
        pause_s = min(REFUSED_S * 2**self.refusal.failures, LONGEST_S) if longer else REFUSED_S
        if self.refusal.failed(one_line(why, 300), pause_s):
            log.warning("cloud %s: %s", self.cloud.name, self.refusal.reason)
            self.server.wake("clouds")


class Clouds:
    """The clouds of a server."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.sites: dict[str, Site] = {}
        self.idle_since: dict[str, float] = {}  # by uuid: steady
        self.planned_at = float("-inf")  # monotonic
        self.wanted = Wanted()
        self.boot_s: dict[str, float] = {}
        self.program: tuple[bytes, str] | None = None  # joborch.pyz, and its SHA-256
        self.past: tuple[int, list[tuple[Any, ...]]] | None = None  # today, and what runs have cost on the days before

    @property
    def server(self) -> Server:
        assert isinstance(self.node, Server)
        return self.node

    @property
    def stopped(self) -> str:
        """Return why no instances are made at all; empty if they are."""
        pause = self.server.paused.get(ALL_CLOUDS)
        if pause is None:
            return ""
        return f"all instances were ended by {pause.caller} at {rfc3339(pause.at)}, and none is made until `joborch clouds --resume`"

    def start(self) -> None:
        """Look after the instances that the database has, if clouds are set. Raises ConfigError if there is no joborch.pyz."""
        if self.node.config.clouds:
            self.archive()
        interval_s = self.node.config.scale_interval_s
        self.node.loops["clouds"] = Loop("clouds", self.tick, lambda: self.node.pool, interval_s, wanted=self.is_wanted)

    def is_wanted(self) -> bool:
        return bool(self.node.config.clouds or self.sites)

    def committed(self, moves: Sequence[Move]) -> None:
        """Decide at once when the first jobs are queued. The costs of past days change when a run ends that began then."""
        if any(move.run_s is not None and move.run_s >= self.node.clock.wall() % DAY_S for move in moves):
            self.past = None
        if not self.is_wanted() or self.node.clock.monotonic() - self.planned_at < NEWS_S:
            return
        if any(move.to is Status.QUEUED and self.serves(move.job.service or "") for move in moves):
            self.node.wake("clouds")

    def serves(self, service: str) -> bool:
        """Tell whether a cloud can make clients for a service."""
        return any(cloud.most and cloud.serves(service) for cloud in self.node.config.clouds.values())

    # -- rows --

    def rows(self) -> list[Row]:
        """Return the instances that have not ended, the oldest first."""
        return [Row(*row) for row in self.node.store.read(statements.INSTANCES_LIVE)]

    def row(self, uuid: str) -> Row | None:
        found = self.node.store.read(statements.INSTANCE_GET, uuid=uuid)
        return Row(*found[0]) if found else None

    def change(self, row: Row, **changes: Any) -> Row:
        """Store a change of an instance durably, unless its state has changed meanwhile; return what is known then."""
        new = row._replace(**changes)
        if "state" in changes:
            log.info("instance %s %s -> %s%s", row.name, row.state, new.state, f": {new.reason}" if new.reason else "")
        done = self.node.store.write(lambda db: db.execute(statements.INSTANCE_SET, {**new._asdict(), "known": row.state}).rowcount)
        return new if done else self.row(row.uuid) or row

    def link(self, row: Row) -> Link | None:
        return self.server.links.get(row.name)

    def silent_s(self, row: Row) -> float:
        """Return for how long the client of an instance has not answered; 0 if it answers."""
        link = self.link(row)
        if link is None:  # since a start of this server it has not called
            return self.node.clock.monotonic() - self.node.started
        return 0.0 if link.is_heard() else link.silent_s()

    # -- the decision --

    def tick(self) -> bool:
        """Follow the settings, note which instances have joined, and decide what is made and ended."""
        self.planned_at = self.node.clock.monotonic()
        self.follow_settings()
        for row in self.rows():
            self.look_at(row)
        for row in self.ended(ENDED_SHOWN):
            self.start_again(row)
        self.wanted = self.plan()
        for cloud, count in self.wanted.create:
            for _ in range(count):
                self.intend(self.node.config.clouds[cloud])
        for uuid in self.wanted.drain:
            idle = self.row(uuid)
            if idle is not None and idle.state == "joined":
                self.drain(idle, "no job needs it")
        for name in self.sites:
            self.node.wake(f"cloud {name}")
        self.forget_old()
        return False

    def follow_settings(self) -> None:
        """Know the clouds of the settings; one that was removed is known until its last instance has ended."""
        clouds, live = self.node.config.clouds, {row.cloud for row in self.rows()}
        for name, cloud in clouds.items():
            site = self.sites.get(name)
            if site is None or site.cloud != cloud:
                self.sites[name] = Site(cloud, self.server)
        self.sites = {name: site for name, site in self.sites.items() if name in clouds or name in live}
        with self.server.plugins["reload"].lock:  # it replaces the table of loops, too
            known, wanted = self.node.loops, {f"cloud {name}": name for name in self.sites}
            old = {name for name in known if name.startswith("cloud ")} - wanted.keys()
            new = {loop: self.loop_of(loop, name) for loop, name in wanted.items() if loop not in known}
            if new or old:
                for name in old:
                    known[name].stop()
                self.node.loops = {**{name: loop for name, loop in known.items() if name not in old}, **new}
                for loop in new.values():
                    loop.start()

    def loop_of(self, name: str, cloud: str) -> Loop:
        """Return the loop of a cloud, which only `tick` wakes. A cloud that hangs delays no other."""
        tick = functools.partial(self.cloud_tick, cloud)
        return Loop(name, tick, lambda: self.node.silent_pool, self.node.config.scale_interval_s, wanted=lambda: False)

    def look_at(self, row: Row) -> None:
        """Note what has become of an instance: it has joined, took too long to, or has no jobs any more."""
        now, link = self.node.store.steady(), self.link(row)
        cloud = self.sites[row.cloud].cloud if row.cloud in self.sites else None
        jobs = self.node.store.load(row.name).jobs
        if link is not None:
            link.costs = True  # jobs go to other clients first
        if jobs or row.joined_at is None or (link is not None and link.reports()):
            self.idle_since.pop(row.uuid, None)
        else:
            self.idle_since.setdefault(row.uuid, now)
        if row.state == "booting" and link is not None and link.is_heard():
            self.change(row, state="joined", joined_at=now)
            crash_point("cloud.joined")
            if row.cloud in self.sites:
                self.sites[row.cloud].refusal.worked()
        elif row.state == "booting" and cloud is not None and now - (row.asked_at or row.made_at) > cloud.boot_limit_s:
            row = self.end(row, f"it did not join within {format_duration(cloud.boot_limit_s)}")
            self.sites[row.cloud].refused(f"instance {row.name}: {row.reason}; see its console log in GET /clouds", longer=True)
        elif row.state == "joined" and not jobs and cloud is not None and self.silent_s(row) > cloud.boot_limit_s:
            self.end(row, f"its client has not answered for {format_duration(cloud.boot_limit_s)}")
        elif row.state == "joined" and link is not None and link.drained:  # by an operator, or a crash cut `drain` off
            self.change(row, state="draining", reason="it was drained")
        elif row.state == "draining" and link is not None and not link.drained:  # an operator wants it again
            self.change(row, state="joined", reason="")
        elif row.state == "draining" and not jobs and (link is None or not (link.reports() or link.sending)):
            self.end(row, row.reason)

    def plan(self) -> Wanted:
        """Return what is to be done now; nothing is changed."""
        unknown = "the size of its instances is not known yet"
        held = {name: self.stopped or site.held() or ("" if site.size else unknown) for name, site in self.sites.items()}
        return wanted_instances(
            self.node.store.steady(),
            list(self.demand()),
            self.free_slots(),
            [size_of(site, self.server) for name, site in self.sites.items() if name in self.node.config.clouds],
            [self.instance(row) for row in self.rows()],
            self.spent_today(),
            {name: why for name, why in held.items() if why},
            self.boot_times(),
            {name: pace.mean_s for name in self.server.services if (pace := self.node.store.line(name).pace).runs},
        )

    def instance(self, row: Row) -> Instance:
        """Return an instance as the decision sees it."""
        jobs, is_silent = self.node.store.load(row.name).jobs, row.state == "joined" and self.silent_s(row) > SILENT_S
        return Instance(row.uuid, row.cloud, row.state, row.made_at, jobs, self.idle_since.get(row.uuid), is_silent)

    def demand(self) -> Iterator[Demand]:
        """Yield the jobs that could run now if there were slots, by service, cores and memory, the oldest first."""
        found: dict[tuple[str, int, int | None], Demand] = {}
        for service in self.server.services.values():
            if not self.serves(service.name) or service.name in self.server.paused:
                continue
            left = service.max_runs - self.node.store.line(service.name).busy
            for turn in list(itertools.islice(self.node.store.turns(service.name), max(0, left))):
                if left <= 0 or turn.at_quota:
                    break
                most = min(left, service.runs_per_user - len(self.node.store.share(service.name, turn.user_id).runs))
                rows = self.node.store.read(statements.QUEUED_HEADS, service=service.name, user_id=turn.user_id, limit=max(0, most))
                left -= len(rows)
                for cpus, memory, arrived_at in rows:
                    key = (service.name, cpus, memory)
                    known = found.get(key, Demand(*key, 0, arrived_at))
                    found[key] = Demand(*key, known.jobs + 1, min(known.waiting_since, arrived_at))
        for (name, cpus, memory), each in sorted(found.items(), key=lambda pair: pair[1].waiting_since):
            yield Demand(name, cpus, None if memory is None else memory << 20, each.jobs, each.waiting_since)

    def free_slots(self) -> dict[str, int]:
        """Return the free slots of clients that are no instances, by service."""
        own = {row.name for row in self.rows()}
        links = [link for link in self.server.links.values() if link.name not in own and link.takes_jobs()]
        places = dict(zip((link.name for link in links), self.server.capacities_of(links)))
        return {
            service.name: sum(max(0, places[link.name].free) for link in self.server.links_of(service) if link.name in places)
            for service in self.server.services.values()
        }

    def boot_times(self) -> dict[str, float]:
        """Return how long instances have taken to join of late, by cloud, in seconds."""
        times: dict[str, list[float]] = {}
        for row in (*self.rows(), *self.ended(SLOW_BOOTS)):
            if row.joined_at is not None and row.asked_at is not None:
                times.setdefault(row.cloud, []).append(row.joined_at - row.asked_at)
        return {name: sum(each) / len(each) for name, each in times.items()}

    # -- cost --

    def ended(self, limit: int, since: float = 0.0) -> list[Row]:
        return [Row(*row) for row in self.node.store.read(statements.INSTANCES_ENDED, since=since, limit=limit)]

    def midnight(self) -> float:
        """Return when this day (UTC) began, in steady time."""
        return float(self.node.store.steady() - self.node.clock.wall() % DAY_S)

    def spent_today(self) -> dict[str, float]:
        """Return what instances have cost since midnight (UTC), by cloud."""
        now, begin, costs = self.node.store.steady(), self.midnight(), dict[str, float]()
        for row in (*self.rows(), *self.ended(100_000, begin)):
            costs[row.cloud] = costs.get(row.cloud, 0.0) + row.cost_between(begin, now)
        return costs

    def spent(self) -> dict[str, float]:
        """Return what instances have cost in all, by cloud."""
        costs = {str(row["cloud"]): float(row["cost"] or 0) for row in self.node.store.read(statements.INSTANCES_COST)}
        for row in self.rows():
            costs[row.cloud] = costs.get(row.cloud, 0.0) + row.cost_between(0, self.node.store.steady())
        return costs

    def hourly_share(self, row: Row, cpus: int) -> float:
        """Return what a run with so many cores costs an hour on an instance."""
        link, site = self.link(row), self.sites.get(row.cloud)
        offered = link.slots if link is not None and link.is_heard() else size_of(site, self.server).slots if site is not None else 1
        return row.hourly_cost * min(1.0, cpus / max(1, offered))

    def moved(self, db: sqlite3.Connection, move: Move) -> None:
        """Note what a run on an instance has cost, inside the transaction that ends it."""
        job = move.job
        if move.run_s is None or not job.client or not self.is_wanted():
            return
        for found in db.execute(statements.INSTANCE_OF_CLIENT, {"client": job.client}):
            row, now = Row(*found), self.node.clock.wall()
            begin = now - min(move.run_s, self.node.store.steady() - (row.joined_at or row.made_at))
            for day in range(int(begin // DAY_S), int(now // DAY_S) + 1):
                hours = (min(now, (day + 1) * DAY_S) - max(begin, day * DAY_S)) / 3600
                values = {"day": day, "cloud": row.cloud, "service": job.service, "user_id": job.user_id}
                db.execute(statements.CLOUD_COST_ADD, {**values, "cost": hours * self.hourly_share(row, job.cpus)})

    def shares(self) -> Iterator[tuple[str, str, int, float, float]]:
        """Yield what runs have cost: cloud, service, user, in all, and today. Those that go on count with the time until now."""
        today = int(self.node.clock.wall() // DAY_S)
        if self.past is None or self.past[0] != today:
            self.past = today, list(map(tuple, self.node.store.read(statements.CLOUD_COSTS_BEFORE, today=today)))
        yield from ((*key, spent, 0.0) for *key, spent in self.past[1])
        yield from ((*key, spent, spent) for *key, spent in self.node.store.read(statements.CLOUD_COSTS_TODAY, today=today))
        now, midnight = self.node.store.steady(), self.midnight()
        for row in self.rows():
            for job in self.node.store.jobs(AT_CLIENT, client=row.name) if self.node.store.load(row.name).jobs else ():
                if job.status is Status.RUNNING:
                    share, (service, user_id) = self.hourly_share(row, job.cpus) / 3600, job.pair
                    yield row.cloud, service, user_id, share * (now - job.moved_at), share * (now - max(job.moved_at, midnight))

    def bill(self) -> Bill:
        return Bill(self)

    # -- what is decided --

    def intend(self, cloud: Cloud) -> None:
        """Write down that an instance is to be made."""
        uuid = new_uuid()
        row = {"uuid": uuid, "name": f"{cloud.name}-{uuid[:12]}", "cloud": cloud.name, "made_at": self.node.store.steady()}
        row.update(hourly_cost=cloud.hourly_cost, by_hour=int(cloud.paid_by_hour))
        self.node.store.write(lambda db: db.execute(statements.INSTANCE_ADD, row).rowcount)
        log.info("instance %s is intended", row["name"])
        crash_point("cloud.intended")

    def drain(self, row: Row, why: str) -> None:
        """Give an instance no more jobs; it is ended when it has none."""
        link, values = self.link(row), {"client": row.name, "at": self.node.clock.wall()}
        if link is not None:
            self.server.drain(link, True)
        else:
            self.node.store.write(lambda db: db.execute(statements.DRAINED_SET, values).rowcount)
        crash_point("cloud.drained")
        self.change(row, state="draining", reason=why)

    def end(self, row: Row, why: str) -> Row:
        """Let an instance be ended: its token is revoked, and its cloud is asked until it is gone."""
        self.node.token_store.revoke(row.name)
        return self.change(row, state="ending", reason=why)

    def gone(self, row: Row, why: str) -> None:
        """Note that an instance is no more, and start its jobs again."""
        self.node.token_store.revoke(row.name)
        now = self.node.store.steady()
        cost = row._replace(ended_at=now).cost_between(0, now)
        row = self.change(row, state="ended", ended_at=now, cost=cost, reason=row.reason or why)
        crash_point("cloud.gone")
        self.node.store.write(lambda db: db.execute(statements.DRAINED_CLEAR, {"client": row.name}).rowcount)
        self.idle_since.pop(row.uuid, None)
        self.start_again(row)

    def start_again(self, row: Row) -> None:
        """Start the jobs again that an instance had which is no more, apart from those that a sender still holds."""
        link = self.link(row)
        for job in self.node.store.jobs(AT_CLIENT, client=row.name) if self.node.store.load(row.name).jobs else ():
            if link is None or not link.of(job.id).sending:
                payload_gone(self.server, job, Reason.INSTANCE_GONE.format(client=row.name, reason=row.reason))

    def forget(self, row: Row) -> None:
        """Forget an instance that its cloud has refused: it never was."""
        self.node.token_store.revoke(row.name)
        self.node.store.write(lambda db: db.execute(statements.INSTANCE_FORGET, {"uuid": row.uuid}).rowcount)

    def forget_old(self) -> None:
        before = self.node.store.steady() - self.node.config.keep_rows_s
        if self.ended(1) and self.node.store.read(statements.INSTANCES_OLD, before=before):
            day = int((self.node.clock.wall() - self.node.config.keep_rows_s) // DAY_S)
            self.node.store.write(lambda db: db.execute(statements.INSTANCES_FORGET, {"before": before}).rowcount)
            self.node.store.write(lambda db: db.execute(statements.CLOUD_COSTS_FORGET, {"day": day}).rowcount)
            self.past = None

    # -- one cloud: its calls may take long, so each has a loop of its own --

    def cloud_tick(self, name: str) -> bool:
        """Compare a cloud's list with the rows, and make and end what they say."""
        site = self.sites.get(name)
        if site is None or site.outage.waits():
            return False
        try:
            if site.size is None:
                site.size = site.provider.size()
                self.node.wake("clouds")
            for row in self.rows():
                if row.cloud == name and row.state == "intended" and row.asked_at is None:
                    self.create(site, row)
            self.compare(site, site.provider.nodes())
            site.outage.worked()
        except JoborchError as error:
            site.failed(error)
        except Exception as error:  # noqa: BLE001 - a class of the site's own may have faults
            log.error("cloud %s: an error", name, exc_info=True)
            site.failed(JoborchError(f"an error in joborch or in the class of the cloud: {type(error).__name__}: {error}"))
        return False

    def create(self, site: Site, row: Row) -> None:
        """Ask a cloud for an instance. If it is not known whether it made one, the row says so, and the next list tells."""
        if self.stopped or site.refusal.waits():
            self.forget(row)
            return
        self.node.token_store.revoke(row.name)  # of a try that was cut off
        names = ",".join(service.name for service in self.server.services.values() if site.cloud.serves(service.name))
        token = self.node.token_store.add(row.name, "client", names, None, site.cloud.boot_limit_s, once=True)
        script = load_plugin("joborch_plugins.cloud_providers:user_data")(
            self.server.config, site.cloud, row.name, token, self.archive()[1]
        )
        row = self.change(row, asked_at=self.node.store.steady())
        if row.state != "intended":  # an operator has ended all meanwhile
            return
        crash_point("cloud.asked")
        try:
            node = site.provider.create(f"joborch-{row.name}", row.uuid, self.identity(), script)
        except JoborchError as error:
            if getattr(error, "kind", "unknown") == "unknown":
                raise
            self.forget(row)
            site.refused(str(error))
            return
        crash_point("cloud.created")
        self.change(row, state="booting", node=node)

    def identity(self) -> str:
        """Return what identifies this server in tags: the id of its database."""
        return str(self.node.store.read(INSTANCE)[0][0])

    def compare(self, site: Site, nodes: Sequence[Any]) -> None:
        """Bring the rows of a cloud in line with its list, and end what no row knows."""
        identity, now = self.identity(), self.node.clock.monotonic()
        nodes = [node for node in nodes if node.state != "gone" and node.server in ("", identity)]
        rows = {row.uuid: row for row in self.rows() if row.cloud == site.cloud.name}
        for row in rows.values():
            known = [node for node in nodes if row.uuid in (node.client, node.token) or node.id == row.node]
            known.sort(key=lambda node: node.id != row.node)
            self.compare_one(site, row, known[0] if known else None)
            for twin in known[1:]:
                log.warning("cloud %s has made instance %s twice: %s is ended", site.cloud.name, row.name, twin.id)
                site.provider.destroy(twin)
        # One without both tags may be anybody's, unless a row knows what it has.
        strangers = [node for node in nodes if node.client not in rows and node.token not in rows]
        site.strangers = {node.id: site.strangers.get(node.id, now) for node in strangers}
        for node in strangers:
            ended = self.row(node.client or node.token)
            if ended is None and not (node.client and node.server):
                continue
            if ended is not None or now - site.strangers[node.id] >= self.node.config.orphan_grace_s:
                why = "its row has ended" if ended is not None else "no row knows it"
                log.warning("cloud %s: instance %s (%s) is ended: %s", site.cloud.name, node.name, node.id, why)
                site.provider.destroy(node)

    def compare_one(self, site: Site, row: Row, node: Any) -> None:
        """Bring one row in line with what its cloud lists."""
        if node is None:
            self.look_for(site, row)
            return
        site.missing.pop(row.uuid, None)
        if row.state == "intended":
            row = self.change(row, state="booting", node=node.id)
        if node.state == "error":
            why = f"the cloud reports an error: {one_line(node.fault, 200)}" if node.fault else "the cloud reports an error"
            if row.state != "ending":
                site.refused(why, longer=True)
                row = self.end(row, why)
        elif node.state == "stopped" and row.state in ("booting", "joined", "draining"):
            row = self.end(row, "it has stopped")
        if row.state == "ending":
            self.destroy(site, row, node)

    def look_for(self, site: Site, row: Row) -> None:
        """Note that an instance is not in the list. A list may lag behind, so twice it must be missing.

        It may also be the list of another project or region, or lack a page: an instance whose client calls meanwhile is there.
        """
        asked_s_ago, now = self.node.store.steady() - (row.asked_at or float("inf")), self.node.clock.monotonic()
        if row.state == "intended" and asked_s_ago < UNKNOWN_S:
            return
        before = site.missing.get(row.uuid, Missing(0, now))
        site.missing[row.uuid] = missing = before._replace(lists=before.lists + 1)
        calls = getattr(self.link(row), "calls", None)
        if calls is not None and row.state != "ending":
            calls.ring()  # a client that lives polls again at once
            if calls.polled_at > before.since:
                site.missing[row.uuid] = Missing(0, now, True)
                if not before.calls:
                    log.warning("cloud %s", UNLISTED.format(cloud=site.cloud.name, name=row.name))
                return
            if calls.is_here() and now - before.since < POLLS_WITHIN_S:
                return
        if row.state == "ending" or missing.lists >= 2:
            del site.missing[row.uuid]
            self.gone(row, "the cloud does not have it any more" if row.node else "the cloud has not made it")

    def destroy(self, site: Site, row: Row, node: Any) -> None:
        """Ask a cloud to end an instance; the list tells when it is gone. One that did not join leaves its console log."""
        if row.joined_at is None and not row.console and row.reason.startswith("it did not join"):
            try:
                console = TOKEN_TEXT.sub("joborch_...", site.provider.console(node))
            except JoborchError as error:
                console = f"(the console log cannot be read: {one_line(str(error), 200)})"
            row = self.change(row, console=console or "(the console log is empty)")
        crash_point("cloud.ending")
        site.provider.destroy(node)
        crash_point("cloud.destroyed")

    # -- the program for instances --

    def archive(self) -> tuple[bytes, str]:
        """Return joborch.pyz and its SHA-256. Raises ConfigError if this process does not run from one, and there is none."""
        if self.program is None:
            program = self.node.program
            path = Path(program.path)
            path = path if program.archive else path.with_name("joborch.pyz")
            try:
                data = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"CLOUD_... needs joborch.pyz for instances, and {path} cannot be read: start it from one") from error
            import hashlib

            self.program = (data, hashlib.sha256(data).hexdigest())
        return self.program

    # -- what others show --

    def why(self, service: str) -> str:
        """Return what jobs of a service that wait for a slot can expect of the clouds; empty if nothing."""
        if not self.serves(service):
            return ""
        clouds = {name for name, cloud in self.node.config.clouds.items() if cloud.serves(service)}
        coming = [row for row in self.rows() if row.cloud in clouds and row.state in ("intended", "booting")]
        if coming:
            since = format_duration(max(0.0, self.node.store.steady() - coming[0].made_at))
            text = f"{plural(len(coming), 'instance boots', 'instances boot')} in {coming[0].cloud} since {since}"
            held = self.sites[coming[0].cloud].held() if coming[0].cloud in self.sites else ""
            return f"{text}, and {coming[0].cloud} is held back: {held}" if held else text
        return self.wanted.waits.get(service, "")

    def capacities(self, service: str) -> list[ClientCapacity]:
        """Return new instances for a service, as clients: how large its jobs may be."""
        sites = [site for site in self.sites.values() if site.cloud.most and site.cloud.serves(service) and site.size]
        sizes = [size_of(site, self.server) for site in sites]
        return [ClientCapacity(size.cloud, size.slots, size.slots, size.memory and size.memory >> 20) for size in sizes]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield why clouds make no instances, each with the remedy."""
        if self.stopped and self.sites:
            yield self.stopped, "make instances again with `joborch clouds --resume`"
        for name, site in self.sites.items():
            if site.held():
                yield f"cloud {name}: {site.held()}", f"see `joborch clouds`, and the settings CLOUD_{name.upper()}_..."
            unlisted = [row.name for row in self.rows() if row.uuid in site.missing and site.missing[row.uuid].calls]
            if unlisted:
                prefix = f"CLOUD_{name.upper()}_"
                text = UNLISTED.format(cloud=name, name=unlisted[0]) + f" ({len(unlisted)} in all)" * (len(unlisted) > 1)
                yield f"cloud {text}", f"check {prefix}CREDENTIALS, {prefix}REGION and {prefix}ENDPOINT: were they changed?"
        left = [row for row in self.rows() if row.cloud not in self.sites]
        for name in sorted({row.cloud for row in left}):
            found = [row.name for row in left if row.cloud == name]
            text = f"{plural(len(found), 'instance is', 'instances are')} in the cloud {name}, which is no longer in the settings"
            yield f"{text}: {', '.join(found[:5])}", f"set CLOUD_{name.upper()}_... again until they have ended"


def size_of(site: Site, server: Server) -> Size:
    """Return what a cloud offers, as the decision sees it."""
    cloud, (cores, memory) = site.cloud, site.size or (1, None)
    slots = cloud.slots or max(1, cores)
    memory = memory and int(memory * MEMORY_LEFT)
    services = frozenset(name for name in server.services if cloud.serves(name))
    return Size(
        cloud.name, slots, slots, memory, cloud.hourly_cost, cloud.least, cloud.most, cloud.idle_s, cloud.boot_limit_s,
        cloud.daily_budget, services, cloud.paid_by_hour,
    )  # fmt: skip


# == Routes ==

NO_CLOUDS = Gives("no clouds are set", JSON_TYPE, {"message": "this server has no clouds: set CLOUD_<NAME>_PROVIDER"})
PROGRAM = {200: Gives("joborch.pyz", "application/octet-stream"), 404: NO_CLOUDS}


@route("GET", "/joborch.pyz", "server", who="anyone", gives=PROGRAM)
def program(server: Server, request: Request) -> Answer:
    """Fetch the program that this server runs: an instance in a cloud does, and checks its SHA-256."""
    if not server.config.clouds:
        raise HttpError(404, "this server has no clouds: set CLOUD_<NAME>_PROVIDER")
    data, digest = server.plugins["clouds"].archive()
    return Answer(data, 200, {"Content-Type": "application/octet-stream", "ETag": f'"{digest}"'})


EXAMPLE_INSTANCE = {
    "uuid": "8f14e45f-ceea-467f-a83c-0e6a2bd2a1f0", "name": "lab-8f14e45f-cee", "state": "joined", "node": "i-0123", "jobs": 2,
    "made_at": "2026-11-24T09:00:00.000Z", "joined_at": "2026-11-24T09:01:10.000Z", "ended_at": None, "cost": 0.12, "reason": "",
    "console": None,
}  # fmt: skip
EXAMPLE_CLOUD = {
    "name": "lab", "provider": "openstack", "services": ["docking"], "slots": 4, "memory": 7536, "min": 0, "max": 10,
    "hourly_cost": 0.12, "daily_budget": 5.0, "spent_today": 1.32, "spent": 40.1, "unassigned_today": 0.12, "unassigned": 4.1,
    "by_service": [{"service": "docking", "spent_today": 1.2, "spent": 36.0}], "held": None, "instances": [EXAMPLE_INSTANCE],
}  # fmt: skip
EXAMPLE_CLOUDS: Mapping[str, Any] = {
    "clouds": [EXAMPLE_CLOUD], "by_user": [{"user_id": 7, "spent_today": 0.9, "spent": 21.0}],
    "other_users": {"users": 3, "spent_today": 0.3, "spent": 15.0}, "ended": [], "stopped": None,
    "plan": {"create": {"lab": 1}, "drain": [], "reasons": ["lab gets 1 instance: 3 jobs of docking wait"]},
}  # fmt: skip
CLOUDS = {200: Gives("clouds, their instances and costs; `plan` is what the next look would do", JSON_TYPE, EXAMPLE_CLOUDS)}


def instance_json(clouds: Clouds, row: Row) -> dict[str, Any]:
    """Return an instance in JSON."""
    store = clouds.node.store
    said: dict[str, Any] = {name: getattr(row, name) for name in ("uuid", "name", "state", "node", "reason")}
    offset_s = clouds.node.clock.wall() - store.steady()
    for name in ("made_at", "joined_at", "ended_at"):
        at = getattr(row, name)
        said[name] = None if at is None else rfc3339(at + offset_s)
    said.update(jobs=store.load(row.name).jobs, console=row.console or None)
    said["cost"] = round(row.cost if row.state == "ended" else row.cost_between(0, store.steady()), 4)
    return {name: said[name] for name in EXAMPLE_INSTANCE}


def cloud_json(clouds: Clouds, site: Site, rows: Iterable[Row], bill: Bill) -> dict[str, Any]:
    """Return a cloud in JSON."""
    cloud, size, unassigned = site.cloud, size_of(site, clouds.server), bill.unassigned(site.cloud.name).json()
    return {
        "name": cloud.name, "provider": cloud.provider, "services": sorted(size.services), "slots": size.slots,
        "memory": size.memory and size.memory >> 20, "min": cloud.least, "max": cloud.most, "hourly_cost": cloud.hourly_cost,
        "daily_budget": cloud.daily_budget, **bill.clouds[cloud.name].json(),
        "unassigned_today": unassigned["spent_today"], "unassigned": unassigned["spent"],
        "by_service": [{"service": name, **spent.json()} for name, spent in bill.of_services(cloud.name).items()],
        "held": clouds.stopped or site.held() or None,
        "instances": [instance_json(clouds, row) for row in rows if row.cloud == cloud.name],
    }  # fmt: skip


def clouds_json(clouds: Clouds, user_id: int | None = None) -> dict[str, Any]:
    """Return all clouds in JSON, with what the next look would do, and with the costs of one user or of those with the highest."""
    rows, bill, plan = clouds.rows(), clouds.bill(), clouds.plan()
    names = {row.uuid: row.name for row in rows}
    users, others = bill.dearest(user_id)
    rest = Spent(sum(each.in_all for each in others), sum(each.today for each in others))
    return {
        "clouds": [cloud_json(clouds, site, rows, bill) for name, site in clouds.sites.items() if name in bill.clouds],
        "by_user": [{"user_id": number, **spent.json()} for number, spent in users],
        "other_users": {"users": len(others), **rest.json()} if others else None,
        "ended": [instance_json(clouds, row) for row in clouds.ended(ENDED_SHOWN)],
        "stopped": clouds.stopped or None,
        "plan": {"create": dict(plan.create), "drain": [names[uuid] for uuid in plan.drain], "reasons": [*plan.reasons]},
    }


COSTS_OF = "only this user in `by_user` (default: those 20 whose jobs have cost most)"
OF_USER = Parameter("user_id", "query", "integer", COSTS_OF, 7, least=SMALLEST, most=BIGGEST)


@route("GET", "/clouds", "server", who="reader operator", takes=(OF_USER,), gives=CLOUDS)
def show_clouds(server: Server, request: Request, user_id: int | None) -> Answer:
    """Show the clouds: their instances, what these cost, and what would be made and ended next, and why. Console logs: to operators."""
    said = clouds_json(server.plugins["clouds"], user_id)
    if request.caller is None or request.caller.role != "operator":  # lines of the site's user data may print anything
        for each in (*said["ended"], *(instance for cloud in said["clouds"] for instance in cloud["instances"])):
            each["console"] = None
    return Answer(said)


def set_stop(server: Server, pause: Pause | None) -> None:
    """Store that no instances are made, or that they are again; both also count after a restart."""
    load_plugin("joborch_plugins.pauses:store_pause")(server, ALL_CLOUDS, pause)
    log.info("%s", server.plugins["clouds"].stopped or "instances of clouds are made again")


@route("POST", "/clouds/end-all", "server", who="operator", gives=CLOUDS)
def end_all(server: Server, request: Request) -> Answer:
    """End all instances now, and make none until POST /clouds/resume, also after a restart. Jobs that run there start again elsewhere."""
    clouds, caller = server.plugins["clouds"], request.caller.name if request.caller else "an operator"
    set_stop(server, Pause(ALL_CLOUDS, server.clock.wall(), caller, ""))
    for row in clouds.rows():
        if row.state != "ending":
            clouds.end(row, "an operator has ended all instances")
    server.wake("clouds")
    return Answer(clouds_json(clouds))


@route("POST", "/clouds/resume", "server", who="operator", gives=CLOUDS)
def resume_clouds(server: Server, request: Request) -> Answer:
    """Make instances again, after POST /clouds/end-all."""
    set_stop(server, None)
    server.wake("clouds")
    return Answer(clouds_json(server.plugins["clouds"]))
