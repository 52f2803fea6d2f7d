"""Chaos: a server, two clients, bad lines between them, and jobs of known outcome; everything that can go wrong does, at random.

    python tests/chaos.py --minutes 10 --seed 7            # the server calls the clients
    python tests/chaos.py --minutes 10 --seed 7 --joined   # the clients call the server, as from behind a firewall

Processes die by SIGKILL, at crash points, or stand still; lines cut, stall, flip and deliver twice; the server's disk is
full for a while and its database locked; the clock of each process jumps by hours. Users go on all the time: they repeat
an upload that was not answered under the same key, terminate, follow, and compare every result with what it must be.
At the end the faults stop, every job must come to its end, and the history checker proves the rest. Ends with 0, or with
1 where there is a fault; the same seed makes the same jobs and the same faults, though not at the same statements.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from harness import (
    ENDED,
    LIMIT_S,
    JoinedClient,
    Process,
    end_all_below,
    field_part,
    file_part,
    form,
    form_type,
    free_port,
    program_text,
    wait_for,
)
from history import Expected, Quota, Reading, assert_proven, gather, mark_lines, read_marks
from proxy import Fault, Proxy

TOKEN = "a-token-for-tests-only"
LIMITS = Quota(4, 10)
LOST_AFTER_S = 20.0
PAYLOAD = b"PAYLOAD:"
POINTS = sorted(set(re.findall(r'crash_point\("([\w.]+)"\)', program_text())))
BETWEEN_MACHINES = ("cut_request", "cut_answer", "lost_answer", "reset", "stall", "drip", "garbage", "rubbish", "duplicate")
TO_USERS = ("cut_request", "cut_answer", "lost_answer", "reset", "stall", "drip", "garbage", "duplicate")
SKEW_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
static const volatile long *offset;                       /* seconds, in a file that the test writes */
__attribute__((constructor)) static void look(void) {
    const char *path = getenv("CHAOS_SKEW");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *page = file < 0 ? MAP_FAILED : mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) offset = page;
    if (file >= 0) close(file);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (offset && clock == CLOCK_REALTIME) now->tv_sec += *offset;
    return result;
}
"""


def sha256(content: bytes) -> str:
    """The digest of a member of a result."""
    return hashlib.sha256(content).hexdigest()


# == Jobs of known outcome ==


@dataclass
class Wish:
    """A job that a user wants: its script and data, and how it must end."""

    kind: str
    script: str
    data: bytes
    expected: Expected
    timeout: float | None = None
    terminate_after_s: float | None = None


COMPLETED = ["Completed"]
AT_LAST = 30  # retries: more infrastructure failures than a run can bring


def make_wish(chance: random.Random) -> Wish:
    """A job of a random kind."""
    data = PAYLOAD + chance.randbytes(chance.choice([10, 1000, 70_000, 400_000]))
    kept = {"data": sha256(data)}
    kind = chance.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    return KINDS[kind][1](chance, kind, data, kept)


def quick(chance: random.Random, kind: str, data: bytes, kept: dict[str, str]) -> Wish:
    text = f"{chance.random()}"
    return Wish(kind, f"echo {text} > out", data, Expected(ends=COMPLETED, members={**kept, "out": sha256(f"{text}\n".encode())}))


def big(chance: random.Random, kind: str, data: bytes, kept: dict[str, str]) -> Wish:
    times = chance.randint(2, 6)
    script = f"for n in {' '.join(map(str, range(times)))}; do cat data >> copy; done"
    return Wish(kind, script, data, Expected(ends=COMPLETED, members={**kept, "copy": sha256(data * times)}))


def slow(chance: random.Random, kind: str, data: bytes, kept: dict[str, str]) -> Wish:
    script = f"echo begun; sleep {chance.uniform(0.5, 12):.2f}; echo done > out"
    return Wish(kind, script, data, Expected(ends=COMPLETED, members={**kept, "out": sha256(b"done\n")}))


def many(chance: random.Random, kind: str, data: bytes, kept: dict[str, str]) -> Wish:
    count = chance.randint(20, 100)
    script = f"mkdir -p a/b; for n in {{1..{count}}}; do echo $n > a/b/$n; done"
    made = {f"a/b/{number}": sha256(f"{number}\n".encode()) for number in range(1, count + 1)}
    return Wish(kind, script, data, Expected(ends=COMPLETED, members={**kept, **made}))


def untidy(chance: random.Random, kind: str, data: bytes, kept: dict[str, str]) -> Wish:
    left = chance.choice(["sleep 600 &", "setsid sleep 600 &", "(setsid bash -c 'sleep 600 & sleep 600 &' &)"])
    return Wish(kind, f"{left}\necho out > out", data, Expected(ends=COMPLETED, members={**kept, "out": sha256(b"out\n")}))


def failing(chance: random.Random, kind: str, data: bytes, kept: dict[str, str]) -> Wish:
    how = chance.choice(["exit 3", "false; exit", "kill -9 $$", "kill -9 0", "no-such-command"])
    return Wish(kind, f"sleep 0.{chance.randint(0, 9)}; {how}", data, Expected(ends=["Failed"], causes=["user"]))


def suicidal(chance: random.Random, kind: str, data: bytes, kept: dict[str, str]) -> Wish:
    """It kills its own wrapper. Where no client looked on, that is taken for a failure of the machine, and runs again."""
    return Wish(kind, "sleep 1; kill -9 $PPID; sleep 600", data, Expected(ends=["Failed"], causes=["user"]))


def late(chance: random.Random, kind: str, data: bytes, kept: dict[str, str]) -> Wish:
    how = chance.choice(["sleep 600", "trap '' TERM; sleep 600; sleep 600", "setsid sleep 600 & wait"])
    return Wish(kind, how, data, Expected(ends=["Failed"], causes=["limit"]), timeout=1.5)


def unwanted(chance: random.Random, kind: str, data: bytes, kept: dict[str, str]) -> Wish:
    how = chance.choice(["sleep 600", "trap '' TERM; sleep 600; sleep 600", "setsid sleep 600 & setsid sleep 600"])
    wanted = Expected(ends=["Killed", "Failed"], causes=["cancelled", "infrastructure"])
    return Wish(kind, how, data, wanted, terminate_after_s=chance.uniform(0, 6))


KINDS: dict[str, tuple[int, Callable[[random.Random, str, bytes, dict[str, str]], Wish]]] = {
    "quick": (8, quick), "big": (4, big), "slow": (4, slow), "many": (1, many), "untidy": (2, untidy),
    "failing": (2, failing), "suicidal": (1, suicidal), "late": (1, late), "unwanted": (2, unwanted),
}  # fmt: skip


# == The world ==


@dataclass
class Member:
    """A process of the world, which is started again after it has died."""

    process: Process
    skew: Path
    again_at: float = 0.0
    stopped: bool = False
    deaths: collections.Counter[str] = field(default_factory=collections.Counter)

    def start(self, point: str | None = None) -> None:
        """Start it; with `point`, it dies there."""
        self.process.settings["JOBORCH_TEST_CRASH"] = point
        self.process.spawn()

    def kill(self, why: str) -> None:
        """End it by SIGKILL."""
        if self.process.running():
            self.process.process.kill()  # type: ignore[union-attr]
            self.deaths[why] += 1

    def stop(self, number: signal.Signals) -> None:
        """Let it stand still (SIGSTOP), or go on (SIGCONT)."""
        if self.process.running():
            self.process.process.send_signal(number)  # type: ignore[union-attr]
            self.stopped = number == signal.SIGSTOP

    def set_clock(self, seconds: int) -> None:
        """Set its clock off by so many seconds."""
        with self.skew.open("r+b") as file:
            file.write(struct.pack("l", seconds))


class World:
    """A server with a proxy before it, two clients with a proxy between each and the server, and users.

    `joined`: the clients call the server; else it calls them.
    """

    def __init__(self, folder: Path, seed: int, joined: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.chance, self.seed, self.joined = folder, random.Random(seed), seed, joined
        self.marks = folder / "marks"
        self.library = build_skew(folder)
        self.disk = mount_small_disk(folder / "server")
        port = free_port()
        ends = [port if joined else free_port() for _ in range(2)]  # where the lines lead
        self.lines = [Proxy(end) for end in ends]
        wiring = {
            "SERVICE_EXAMPLE_CLIENTS": "" if joined else ",".join(line.url for line in self.lines),
            "SERVICE_EXAMPLE_TOKEN": "" if joined else TOKEN,
            "SERVICE_EXAMPLE_RUNS_PER_USER": str(LIMITS.runs_per_user),
            "SERVICE_EXAMPLE_MAX_RUNS": str(LIMITS.max_runs),
            "SERVICE_EXAMPLE_LOST_AFTER": str(LOST_AFTER_S),
        }
        self.server = self.member("server", "server", port, wiring)
        self.clients = [self.client(number, line, end) for number, (line, end) in enumerate(zip(self.lines, ends), 1)]
        self.door = Proxy(self.server.process.port)
        self.members = [self.server, *self.clients]
        self.stop_faults, self.stop_all = threading.Event(), threading.Event()
        self.expected: dict[int, Expected] = {}
        self.terminated: set[int] = set()
        self.ends: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.reading, self.readings_lost = Reading([], 0), 0
        self.lock = threading.Lock()

    def client(self, number: int, line: Proxy, end: int) -> Member:
        """A client behind a line."""
        own = {"JOBORCH_JOIN": line.url} if self.joined else {"JOBORCH_TOKEN": TOKEN}
        return self.member("client", f"client{number}", free_port() if self.joined else end, {"JOBORCH_SLOTS": "4", **own})

    def member(self, role: str, name: str, port: int, settings: dict[str, str]) -> Member:
        """A process with a clock of its own."""
        skew = self.folder / f"{name}.skew"
        skew.write_bytes(struct.pack("l", 0))
        clock = {"LD_PRELOAD": str(self.library), "CHAOS_SKEW": str(skew)} if self.library else {}
        quick_ends = {"JOBORCH_KILL_GRACE": "0.3", "MAX_AGE": "120", "JOBORCH_CLEAN_INTERVAL": "1", "JOBORCH_MIN_FREE": "2M"}
        chosen = {**quick_ends, **settings, **clock}
        if "JOBORCH_JOIN" in settings:
            return Member(JoinedClient(self.folder / name, self.server.process, name, chosen, port=port), skew)
        return Member(Process(role, self.folder / name, chosen, port=port), skew)

    # -- what goes wrong --

    def keep(self) -> None:
        """Start again who has died, after a while; sometimes only to die at a crash point."""
        chance = random.Random(self.seed + 1)
        while not self.stop_all.wait(0.05):
            for member in self.members:
                if member.process.process is None or member.process.running():
                    continue
                if not member.again_at:
                    member.again_at = time.monotonic() + chance.choice([0, 0.2, 1.5])
                    if member.process.process.returncode not in (-signal.SIGKILL, 0):
                        self.wrong.append(
                            f"{member.process.role} ended with {member.process.process.returncode}: {member.process.log[-800:]}"
                        )
                if time.monotonic() >= member.again_at:
                    member.again_at = 0.0
                    point = None
                    if not self.stop_faults.is_set() and chance.random() < 0.4:
                        point = f"{chance.choice(POINTS)}:{chance.choice([1, 1, 2, 5])}"
                        member.deaths["started to die at a crash point"] += 1
                    member.start(point)

    def hurt(self) -> None:
        """Let one thing go wrong after the other."""
        harms = [self.kill] * 5 + [self.kill_all, self.stand_still, self.be_away, self.bad_lines, self.bad_lines, self.bad_lines]
        harms += [self.new_address] * self.joined
        harms += [self.flip, self.no_line, self.fill_disk, self.lock_database, self.lie_about_time, self.lie_about_time]
        while not self.stop_faults.wait(self.chance.uniform(0.2, 2.5)):
            self.chance.choice(harms)()

    def kill(self) -> None:
        self.chance.choice(self.members).kill("killed")

    def kill_all(self) -> None:
        for member in self.chance.sample(self.members, self.chance.choice([2, 3])):
            member.kill("killed together")

    def stand_still(self) -> None:
        self.hold(self.chance.choice(self.members), self.chance.uniform(0.5, 4), "stood still")

    def be_away(self) -> None:
        """So long that its jobs are tried elsewhere; then it comes back with them."""
        if self.chance.random() < 0.25:
            self.hold(self.chance.choice(self.clients), LOST_AFTER_S + 8, "stood still beyond LOST_AFTER")

    def hold(self, member: Member, seconds: float, what: str) -> None:
        if not member.stopped:
            self.faults[what] += 1
            member.stop(signal.SIGSTOP)
            self.later(seconds, lambda: member.stop(signal.SIGCONT))

    def bad_lines(self) -> None:
        """A line is bad for a while."""
        line = self.chance.choice([self.door, *self.lines])
        kinds = TO_USERS if line is self.door else BETWEEN_MACHINES
        line.scatter(self.chance.randrange(1 << 30), self.chance.choice([0.05, 0.3, 0.8]), kinds, longest_s=2.0)
        self.later(self.chance.uniform(0.5, 5), line.calm)

    def flip(self) -> None:
        """Bits of files change on their way, there or back."""
        there, back = ("POST /submit", "GET /retrieve") if not self.joined else ("POST /join/answers", "(GET|POST) /join/")
        for line in self.lines:
            line.plant(Fault("flip_request", there, at="PAYLOAD:" if not self.joined else "", bit=self.chance.randrange(8)))
            line.plant(Fault("flip_answer", back, after=self.chance.random(), bit=self.chance.randrange(8)))

    def no_line(self) -> None:
        line = self.chance.choice(self.lines)
        line.plant(Fault("refuse", seconds=self.chance.uniform(0.2, 3)))
        line.drop()

    def new_address(self) -> None:
        """The address of a client changes: all its connections are gone."""
        self.faults["new address"] += 1
        self.chance.choice(self.lines).drop()

    def fill_disk(self) -> None:
        """The server's disk is full for a while."""
        if self.disk:
            self.faults["full disk"] += 1
            filler = self.folder / "server" / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(b"x" * (1 << 20)) == 1 << 20:
                    pass
            self.later(self.chance.uniform(0.5, 3), lambda: filler.unlink(missing_ok=True))

    def lock_database(self) -> None:
        """Another process holds the database of one of them."""
        path = self.chance.choice(self.members).process.data / "joborch.db"
        if path.exists():
            self.faults["locked database"] += 1
            threading.Thread(target=hold_lock, args=(path, self.chance.uniform(0.2, 3)), daemon=True).start()

    def lie_about_time(self) -> None:
        """The clock of one of them is set, by hours."""
        if self.library:
            self.faults["clock set"] += 1
            self.chance.choice(self.members).set_clock(self.chance.choice([-100, -5, -1, 1, 5, 100]) * 3600)

    def later(self, seconds: float, work: Callable[[], object]) -> None:
        """Do something later, or as soon as the faults end."""

        def run() -> None:
            self.stop_faults.wait(seconds)
            work()

        threading.Thread(target=run, daemon=True).start()

    def heal(self) -> None:
        """Nothing goes wrong any more; who died at a crash point is started once more."""
        self.stop_faults.set()
        time.sleep(0.2)  # what was to be undone later is undone by now
        for line in (self.door, *self.lines):
            line.calm()
        (self.folder / "server" / "filler").unlink(missing_ok=True)
        for member in self.members:
            member.stop(signal.SIGCONT)
            member.set_clock(0)
            if member.process.settings["JOBORCH_TEST_CRASH"]:
                member.kill("restarted at the end")

    # -- what users do --

    def ask(self, method: str, path: str, **options: Any) -> requests.Response | None:
        """One request through the door; None where no answer came, or half of one."""
        try:
            answer = requests.request(method, self.door.url + path, timeout=20, **options)
        except requests.RequestException:
            return None
        if answer.headers.get("Content-Type", "").startswith("application/json"):
            try:
                answer.json()
            except requests.JSONDecodeError:
                return None
        return answer if "Content-Length" in answer.headers or answer.status_code == 204 else None

    def use(self, user_id: int, until: float) -> None:
        """Be a user: a few jobs at a time, each looked after until its end."""
        chance = random.Random(self.seed * 1000 + user_id)
        number, waiting = 0, cast_jobs()
        while not self.stop_all.is_set() and (time.monotonic() < until or waiting):
            if len(waiting) < 5 and time.monotonic() < until:
                number += 1
                wish = make_wish(chance)
                job = self.upload(user_id, f"key-{number}", wish)
                if job is not None:
                    waiting[job] = (wish, time.monotonic())
            for job, (wish, since) in list(waiting.items()):
                if wish.terminate_after_s is not None and time.monotonic() > since + wish.terminate_after_s:
                    self.ask("POST", f"/terminate/{job}")
                if self.has_ended(job, wish):
                    del waiting[job]
            self.stop_all.wait(0.1)

    def read(self) -> None:
        """Be a portal that reads all moves, and is sometimes killed before it has kept a page: it goes on at the `next` it kept."""
        chance = random.Random(self.seed - 1)
        while not self.stop_all.is_set():
            answer = self.ask("GET", f"/changes?after={self.reading.following}&wait=2&limit={chance.choice([1, 20, 1000])}")
            if answer is None or answer.status_code != 200 or not answer.headers.get("Content-Type"):
                if answer is not None and answer.status_code not in (200, 503):
                    self.wrong.append(f"changes: {answer.status_code} {answer.text[:300]}")
                self.stop_all.wait(0.2)
            elif chance.random() < 0.1:
                self.readings_lost += 1
            else:
                said = answer.json()
                moves = [(each["seq"], each["id"], each["from"], each["to"]) for each in said["changes"]]
                self.reading = Reading([*self.reading.seen, *moves], said["next"])

    def upload(self, user_id: int, key: str, wish: Wish) -> int | None:
        """Upload until it is answered with 201."""
        parts = [file_part("run.sh", (mark_lines(self.marks) + wish.script + "\n").encode()), file_part("data", wish.data)]
        fields = {"user_id": user_id, "service": "example", "retries": AT_LAST, **({"timeout": wish.timeout} if wish.timeout else {})}
        body = form([*parts, *(field_part(name, str(value)) for name, value in fields.items())])
        while not self.stop_all.is_set():
            answer = self.ask("POST", "/upload", data=body, headers={**form_type(), "Idempotency-Key": key})
            if answer is not None and answer.status_code == 201 and answer.headers.get("Content-Type"):
                job = int(answer.json()["id"])
                with self.lock:
                    self.expected[job] = wish.expected
                    if wish.terminate_after_s is not None:
                        self.terminated.add(job)
                return job
            if answer is not None and answer.status_code not in (201, 503, 507):
                self.wrong.append(f"upload: {answer.status_code} {answer.text[:300]}")
            self.stop_all.wait(0.3)
        return None

    def has_ended(self, job: int, wish: Wish) -> bool:
        """Whether a job is over; then its result is compared."""
        answer = self.ask("GET", f"/jobs/{job}")
        if answer is None or answer.status_code != 200:
            if answer is not None and answer.status_code != 503:
                self.wrong.append(f"job {job}: {answer.status_code} {answer.text[:300]}")
            return False
        said = answer.json() if answer.headers.get("Content-Type") else {"status": ""}
        if said["status"] not in ENDED:
            return False
        if said["status"] == "Completed" and not self.result_fits(job, wish):
            return False
        with self.lock:
            self.ends[f"{wish.kind}: {said['status']}"] += 1
        return True

    def result_fits(self, job: int, wish: Wish) -> bool:
        """Whether the result could be downloaded; one that is not as it should be is a fault."""
        answer = self.ask("GET", f"/download/{job}")
        if answer is None or answer.status_code == 503:
            return False
        if answer.status_code != 200:
            self.wrong.append(f"job {job}: its download answers {answer.status_code}")
            return True
        try:
            with zipfile.ZipFile(io.BytesIO(answer.content)) as result:
                for name, digest in wish.expected.members.items():
                    if sha256(result.read(name)) != digest:
                        self.wrong.append(f"job {job}: {name} is not what the script wrote")
        except (zipfile.BadZipFile, KeyError) as error:
            if len(answer.content) == int(answer.headers.get("Content-Length", -1)):
                self.wrong.append(f"job {job}: its download is no such ZIP: {error}")
            return False
        return True

    # -- the whole --

    def run(self, minutes: float, users: int = 4) -> None:
        """Let users and faults have their way for so long, then let all come to its end, and prove it."""
        for line in (self.door, *self.lines):
            line.start()
        self.server.start()
        if self.joined:
            wait_for(self.server.process._healthy, LIMIT_S, "the server")
        for client in self.clients:
            if isinstance(client.process, JoinedClient):
                client.process.enrol()
            client.start()
        until = time.monotonic() + 60 * minutes
        work = [threading.Thread(target=self.use, args=(user_id, until), daemon=True) for user_id in range(1, users + 1)]
        helpers = [threading.Thread(target=each, daemon=True) for each in (self.keep, self.hurt, self.read)]
        for thread in (*helpers, *work):
            thread.start()
        time.sleep(60 * minutes)
        self.heal()
        helpers[1].join(30)
        self.heal()  # what the last harm has begun
        deadline = time.monotonic() + 180
        for thread in work:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in work):
            self.wrong.append("180 s after the last fault there are still jobs that have not ended")
        self.stop_all.set()
        helpers[2].join(60)

    def prove(self) -> None:
        """Let the history checker look at what is left. AssertionError says what is wrong."""
        assert_proven(
            gather(
                self.server.process.data / "joborch.db",
                clients={f"client{number}": member.process.data / "joborch.db" for number, member in enumerate(self.clients, 1)},
                marks=[self.marks],
                results=self.server.process.data / "results",
                expected=self.expected,
                quotas={"example": LIMITS},
                terminated=self.terminated,
                reading=self.reading,
            )
        )
        assert not self.wrong, "\n".join(self.wrong[:20])

    def report(self) -> Iterator[str]:
        """What happened, one line each."""
        begun = [mark for mark in read_marks(self.marks) if mark.what == "start"]
        with contextlib.closing(sqlite3.connect(self.server.process.data / "joborch.db")) as db:
            attempts = db.execute("SELECT count(*) FROM attempts").fetchone()[0]
        logs = "".join(member.process.log for member in self.members)
        yield f"jobs: {len(self.expected)}; starts: {len(begun)}; further attempts: {attempts}"
        yield f"moves that a reader of /changes saw: {len(self.reading.seen)}; pages that it lost: {self.readings_lost}"
        yield "ends: " + ", ".join(f"{what} {count}" for what, count in sorted(self.ends.items()))
        for member in self.members:
            yield f"{member.process.folder.name}: " + (
                ", ".join(f"{why} {count}" for why, count in member.deaths.items()) or "never killed"
            )
        lines = sum((line.counts() for line in (self.door, *self.lines)), collections.Counter[str]())
        yield "lines: " + ", ".join(f"{kind} {count}" for kind, count in sorted(lines.items()))
        yield "others: " + ", ".join(f"{what} {count}" for what, count in sorted(self.faults.items()))
        yield f"transfers gone on with: {logs.count('it is resumed there')}; asked for again: {logs.count('it is tried again')}"

    def close(self) -> None:
        """End all."""
        self.stop_faults.set()
        self.stop_all.set()
        for member in self.members:
            member.stop(signal.SIGCONT)
            member.process.close()
        for line in (self.door, *self.lines):
            line.close()
        end_all_below(self.folder)
        if self.disk:
            subprocess.run(["umount", "--lazy", str(self.folder / "server")], check=False)


def cast_jobs() -> dict[int, tuple[Wish, float]]:
    """No job yet."""
    return {}


def hold_lock(path: Path, seconds: float) -> None:
    """Hold a database for a while, as another process would."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path, timeout=1, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        db.execute("ROLLBACK")


def build_skew(folder: Path) -> Path | None:
    """Build the library that sets a process's clock off; None where there is no compiler."""
    if shutil.which("gcc") is None:
        print("no gcc: the clocks stay as they are", file=sys.stderr)
        return None
    (folder / "skew.c").write_text(SKEW_SOURCE)
    library = folder / "skew.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "skew.c"), "-ldl"], check=True)
    return library


def mount_small_disk(folder: Path) -> bool:
    """Give the server a disk of its own that can be filled; False for who is not root."""
    folder.mkdir()
    if os.geteuid() != 0:
        print("not root: no disk is filled", file=sys.stderr)
        return False
    return subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder)], check=False).returncode == 0


def chaos(folder: Path, minutes: float, seed: int, joined: bool = False) -> list[str]:
    """Run once, and return the report; AssertionError where something is not as promised."""
    world = World(folder, seed, joined)
    try:
        world.run(minutes)
        for member in world.members:
            member.process.stop()
        world.prove()
        return list(world.report())
    except AssertionError:
        shutil.copytree(folder / "server", folder / "server-kept", symlinks=True, ignore_dangling_symlinks=True)  # its disk goes
        raise
    finally:
        world.close()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="tests/chaos.py", description="Let everything go wrong at random, and prove that nothing is lost."
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="of jobs and faults (default: 1)")
    parser.add_argument("--joined", action="store_true", help="the clients call the server")
    parser.add_argument("--keep", action="store_true", help="leave the folder with logs and databases")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="joborch-chaos-"))
    print(f"chaos: {chosen.minutes:g} min, seed {chosen.seed}{', clients that call in' if chosen.joined else ''}", flush=True)
    try:
        print("\n".join(chaos(folder, chosen.minutes, chosen.seed, chosen.joined)))
    except AssertionError as error:
        print(f"NOT AS PROMISED (files in {folder}):\n{error}")
        return 1
    if not chosen.keep:
        shutil.rmtree(folder, ignore_errors=True)
    print("history checker: no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
