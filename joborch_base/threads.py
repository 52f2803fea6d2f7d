"""Loops, and the pools of threads that run their ticks.

1. Loops
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Callable

from joborch_base.vocabulary import IDLE_LOOK_S, StorageError, format_duration, log, one_line

# == 1. Loops ==  A loop calls its tick, a plain function, when woken or when its period ends, in a thread of a pool.

SILENT_THREADS = 40  # for clients that do not answer: a call to each takes up to 10 s, every 30 s
CALM_S = 15.0  # the period of a loop while nothing of it can be due soon


class Bell:
    """Wakes the one thread that sleeps on it. A ring that comes before the sleep is not lost; several count as one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has rung already
            self.lock.release()

    def sleep(self, timeout_s: float) -> bool:
        """Sleep until it rings. Return whether it did."""
        return self.lock.acquire(timeout=timeout_s)


class Pool:
    """A pool of threads that start when they are needed and stop after they were idle for a while.

    The thread that became idle last gets the next work, so that few threads stay awake.
    """

    IDLE_S = 30.0

    def __init__(self, name: str, threads: int = sys.maxsize, waiting: int = sys.maxsize) -> None:
        """At most `threads` work at once, and at most `waiting` pieces of work wait for a thread."""
        self.name, self.most, self.most_waiting = name, threads, waiting
        self.lock, self.waiting = threading.Lock(), deque[Callable[[], object]]()
        self.threads, self.number, self.short, self.stopping = 0, 1, False, False
        self.ended = threading.Condition(self.lock)
        self.idle: list[Bell] = []  # of threads that sleep

    def add(self, work: Callable[[], object]) -> bool:
        """Queue a piece of work. Return False if too many wait already, or if there is no thread and none can be started."""
        with self.lock:
            if len(self.waiting) >= self.most_waiting:
                return False
            self.waiting.append(work)
            if self.idle:
                self.idle.pop().ring()
            elif self.threads < self.most and not self.stopping and not self.start_thread() and not self.threads:
                self.waiting.pop()
                return False
        return True

    def start_thread(self) -> bool:
        """Return whether a thread could be started. The caller holds the lock."""
        try:
            threading.Thread(target=self.work, name=f"{self.name}-{self.number}", daemon=True).start()
        except RuntimeError as error:
            if not self.short:
                log.error("%s: work waits, because no thread can be started: %s", self.name, error)
            self.short = True
            return False
        self.threads, self.number, self.short = self.threads + 1, self.number + 1, False
        return True

    def work(self) -> None:
        bell = Bell()
        while True:
            with self.lock:
                bell.sleep(0)  # it may have rung just after a sleep was over
                unused = bell in self.idle
                if unused:
                    self.idle.remove(bell)
                work = self.waiting.popleft() if self.waiting else None
                if work is None and (unused or self.stopping):
                    self.threads -= 1
                    return self.ended.notify_all()
                if work is None:
                    self.idle.append(bell)
            try:
                work() if work is not None else bell.sleep(self.IDLE_S)
            except Exception:
                log.exception("a request ended in an error")

    def stop(self, timeout_s: float = 0.0) -> None:
        """Stop the threads once no work waits. Do not wait more than `timeout_s` for busy ones."""
        with self.lock:
            self.stopping = True
            while self.idle:
                self.idle.pop().ring()
            self.ended.wait_for(lambda: not self.threads, timeout_s)


def stop_pools(pools: Collection[Pool], timeout_s: float) -> None:
    """Stop pools all at once. Do not wait more than `timeout_s` for busy threads."""
    deadline = time.monotonic() + timeout_s
    for pool in pools:
        pool.stop()
    for pool in pools:
        pool.stop(max(0.0, deadline - time.monotonic()))


@dataclass(eq=False)
class Loop:
    """Runs `tick` in a thread of a pool: at once when woken or while a tick returns True (more to do), else every `period_s`.

    If a tick raises, the error is logged and the next tick runs a period later.
    """

    name: str
    tick: Callable[[], bool]
    pool: Callable[[], Pool]  # asked before each tick, because a client that hangs moves to another pool
    period_s: float
    most_runs: int = 1  # ticks at once; a further one starts if the loop is woken while all others are busy
    wanted: Callable[[], bool] = lambda: True  # whether to tick after a period; the timer calls it, so it must not block
    calm: Callable[[], bool] = lambda: False  # whether the timer may look every CALM_S only

    def __post_init__(self) -> None:
        self.lock, self.calls, self.runs, self.started, self.trouble = threading.Lock(), 0, 0, False, ""
        self.errors, self.late_s = 0, 0.0  # ticks that raised; how late the timer last looked at it

    def start(self) -> None:
        self.started = True
        self.wake()

    def stop(self) -> None:
        self.started = False

    def wake(self) -> None:
        """Tick now. If `most_runs` ticks run already, one of them runs again afterwards."""
        with self.lock:
            self.calls = min(self.calls + 1, self.most_runs)
            if self.runs == self.most_runs or not self.started:
                return
            self.runs += 1
        self.go_on(self.pool())

    def look(self) -> None:
        """Tick after a period, if no tick is running and there may be something to do."""
        if not self.runs and (self.calls or self.trouble or self.wanted()):
            self.wake()

    def pause_s(self) -> float:
        """Return when the timer looks again, in seconds."""
        return max(self.period_s, CALM_S) if self.calm() else self.period_s

    def go_on(self, pool: Pool) -> None:
        if not pool.add(functools.partial(self.run, pool)):
            with self.lock:
                self.runs -= 1  # the next `look` tries again

    def run(self, pool: Pool) -> None:
        """Tick in a thread of `pool` while there is something to do, or until another pool has to take over."""
        while self.pool() is pool:
            with self.lock:
                self.calls = max(0, self.calls - 1)
            more = self.started and self.tick_once()
            with self.lock:
                if not self.started or not (more or self.calls):
                    self.runs -= 1
                    return
        self.go_on(self.pool())

    def tick_once(self) -> bool:
        """Return whether there may be more to do. Errors are logged."""
        try:
            more = self.tick()
            self.trouble = ""
        except Exception as error:  # noqa: BLE001 - logged; the loop goes on
            self.errors += 1
            self.complain(error)
            return False
        return more

    def complain(self, error: Exception) -> None:
        """Log an error of a tick, once as long as it stays the same; a bug is logged with its traceback."""
        text = one_line(f"{type(error).__name__}: {error}")
        if text == self.trouble or not self.started:  # when stopping, the store may close before the last tick is done
            return
        self.trouble = text
        known = isinstance(error, (StorageError, OSError))
        said = str(error) if known else text
        log.error("%s: %s; it is tried again every %s", self.name, said, format_duration(self.period_s), exc_info=None if known else error)


def keep_time(loops: Callable[[], Mapping[str, Loop]], stopping: threading.Event) -> None:
    """The timer of all loops of a process: look at each loop after each of its periods, until `stopping`.

    `loops` returns them by name; it returns another mapping as soon as there are others.
    """
    known, due = loops(), timetable(loops(), {}, time.monotonic())
    while not stopping.wait(max(0.0, due[0][0] - time.monotonic()) if due else IDLE_LOOK_S):
        now = time.monotonic()
        if loops() is not known:
            known = loops()
            due = timetable(known, {loop.name: at for at, _, loop in due}, now)
        while due and due[0][0] <= now:
            at, number, loop = due[0]
            loop.late_s = now - at
            loop.look()
            heapq.heapreplace(due, (next_look(now, loop.pause_s()), number, loop))


def next_look(now: float, pause_s: float) -> float:
    """Return when to look at a loop again: at a multiple of its pause, so that one wake-up of the timer serves all that have the same."""
    multiple = (now // pause_s + 1) * pause_s
    return multiple if multiple > now else now + pause_s  # it is rounded


def timetable(loops: Mapping[str, Loop], due: Mapping[str, float], now: float) -> list[tuple[float, int, Loop]]:
    """Return a heap of when to look at each loop (monotonic): as in `due`, or a period from now."""
    table = [(due.get(loop.name, now + loop.period_s), number, loop) for number, loop in enumerate(list(loops.values()))]
    heapq.heapify(table)
    return table


class Allowance:
    """Allows as many polls as a busy client needs, and slows down a client that always answers at once."""

    burst, per_s = 200.0, 50.0

    def __init__(self) -> None:
        self.left, self.at = self.burst, time.monotonic()

    def take(self, amount: float) -> float:
        """Use a part of the allowance. Return how many seconds to pause if it is overdrawn."""
        now = time.monotonic()
        self.left, self.at = min(self.burst, self.left + (now - self.at) * self.per_s) - amount, now
        return max(0.0, -self.left / self.per_s)


class ThreadLimit:
    """Limits how many threads do something at once.

    Callers that would wait get a place at once or not at all (`place`), so that uploads never starve. Threads that compute wait for
    their place (`with limit:`), because more at once would only contend for the GIL, and leave it while they sleep (`stepped_out`).
    """

    def __init__(self, places: int) -> None:
        self.free, self.mine = threading.Semaphore(places), threading.local()

    @contextlib.contextmanager
    def place(self) -> Iterator[bool]:
        """Take a place for the block. Yields False if all are taken."""
        taken = self.free.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self.free.release()

    def __enter__(self) -> None:
        self.free.acquire()
        self.mine.inside = True

    def __exit__(self, *_: object) -> None:
        self.mine.inside = False
        self.free.release()

    @contextlib.contextmanager
    def stepped_out(self) -> Iterator[None]:
        """Give up this thread's place during the block, if it has one."""
        inside = getattr(self.mine, "inside", False)
        if inside:
            self.__exit__()
        try:
            yield
        finally:
            if inside:
                self.__enter__()
