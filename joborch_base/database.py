"""The connection that writes, the schema and its versions, and steady time.

1. Database
2. Files of databases
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import heapq
import os
import re
import sqlite3
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, Generic, Optional, TypeVar, cast
from urllib.parse import quote

from joborch_base import statements
from joborch_base.files import discard, fsync_path
from joborch_base.scheduling import Line, Load, Share, Turn
from joborch_base.statements import SCHEMA_VERSION
from joborch_base.states import Move
from joborch_base.threads import Bell
from joborch_base.vocabulary import Clock, ConfigError, StorageError, T, crash_point, log, one_line, size_text, time_stamp

# == 1. Database ==  One connection writes; threads that wait for it share a transaction. Ages are counted in steady time.

K = TypeVar("K")
V = TypeVar("V")

READERS_KEPT = 8  # idle read connections to keep
DECISIONS_AT_ONCE = 8  # claims in one transaction, so that its callers wait for few


class Message:
    """A piece of work for the core, and its outcome."""

    def __init__(self, work: Callable[[sqlite3.Connection], Any], durable: bool) -> None:
        self.work, self.durable = work, durable
        self.done, self.value, self.error = False, None, cast(Optional[BaseException], None)


class Waiter:
    """A caller that waits until `look` finds something in the rows of one job, of several, or of any job if `jobs` is None."""

    def __init__(self, look: Callable[[], Any], jobs: int | frozenset[int] | None) -> None:
        self.look, self.bell = look, Bell()
        self.jobs = frozenset((jobs,)) if isinstance(jobs, int) else jobs
        self.found, self.error = cast(Any, None), cast(Optional[Exception], None)

    def look_again(self) -> None:
        """Look, and wake the caller if that finds something or fails."""
        try:
            self.found = self.look()
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            self.error = error
        if self.found is not None or self.error is not None:
            self.bell.ring()

    def take(self) -> Any:
        """Return what was found, or else look now. Raises the error of `look`."""
        if self.error is not None:
            raise self.error
        return self.look() if self.found is None else self.found


def is_fatal(error: BaseException) -> bool:
    """Tell whether an error ends the whole transaction: the disk, or a lock."""
    return isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError)


class Layers(Generic[K, V]):
    """A map of two layers: what the current transaction changes, which only that transaction sees, and what is committed.

    Records are never changed, only replaced, so readers need no lock.
    """

    def __init__(self) -> None:
        self.changes: dict[K, V] = {}
        self.known: dict[K, V] = {}

    def get(self, key: K, is_inside: bool) -> V | None:
        """Return a record as the current transaction sees it, or as the others do."""
        found = self.changes.get(key) if is_inside else None
        return self.known.get(key) if found is None else found


class Shares:
    """What turns depend on and who has one, in memory: it always follows from the rows.

    A COMMIT brings the changes of the transaction down to what is known, a rollback drops them.
    """

    def __init__(self) -> None:
        self.users = Layers[tuple[str, int], Share]()  # by service and user; only those with jobs that run or could
        self.lines = Layers[str, Line]()  # by service
        self.loads = Layers[str, Load]()  # by client
        self.weights = Layers[int, float]()  # by user; others have 1
        self.maps: tuple[Layers[Any, Any], ...] = (self.users, self.lines, self.loads, self.weights)
        self.order: dict[str, list[Turn]] = {}  # by service: all turns, sorted
        self.running: dict[str, set[int]] = {}  # by service: users with jobs at clients

    def copy_changes(self) -> list[dict[Any, Any]]:
        return [dict(layers.changes) for layers in self.maps]

    def back_to(self, changes: Sequence[dict[Any, Any]] = ({}, {}, {}, {})) -> None:
        """Forget what the transaction has changed, or all but some earlier changes."""
        for layers, kept in zip(self.maps, changes):
            if layers.changes or kept:
                layers.changes = dict(kept)

    def commit(self) -> None:
        """Let everybody see the changes of the transaction."""
        known = self.users.known
        for pair, share in self.users.changes.items():
            before = known.get(pair, NO_SHARE)
            if share.turn != before.turn:
                self.move_turn(pair[0], before.turn, share.turn)
            running = self.running.setdefault(pair[0], set())
            (running.add if share.runs else running.discard)(pair[1])
            if not (share.runs or share.waiting):
                known.pop(pair, None)
        self.users.changes = {pair: share for pair, share in self.users.changes.items() if share.runs or share.waiting}
        for layers in self.maps:
            layers.known.update(layers.changes)
        self.back_to()

    def move_turn(self, service: str, before: Turn | None, after: Turn | None) -> None:
        order = self.order.setdefault(service, [])
        if before is not None:
            del order[bisect.bisect_left(order, before)]
        if after is not None:
            bisect.insort(order, after)

    def turns(self, service: str) -> Iterator[Turn]:
        """Return the turns of all users who have a free run, as the current transaction sees them."""
        if not self.users.changes:
            return iter(self.order.get(service, ()))
        changed = {pair[1]: share.turn for pair, share in self.users.changes.items() if pair[0] == service}
        kept = (turn for turn in self.order.get(service, ()) if turn.user_id not in changed)
        return heapq.merge(kept, sorted(turn for turn in changed.values() if turn is not None))


NO_SHARE, NO_LINE, NO_LOAD = Share(), Line(), Load()


class Core:
    """Runs all changes of rows, one transaction after another, and afterwards looks for callers that wait.

    The calling thread runs the transaction. Work that arrives meanwhile shares the next transaction, and so an fsync. A separate
    thread would cost a hand-over for each call: see docs/benchmarks.md, "The hot path". Inside, work uses only SQLite and memory:
    no file, no socket, no process, no sleep. Its reads see what the transaction has written.
    """

    def __init__(self, db: sqlite3.Connection, beat: Callable[[sqlite3.Connection], None], is_time: Callable[[], bool]) -> None:
        """`beat` stores the time, in the first transaction for which `is_time` returns True."""
        self.db, self.beat, self.is_time = db, beat, is_time
        self.lock, self.owner = threading.Lock(), 0  # held for a transaction, by the thread with this id
        self.inbox, self.waiters = deque[Message](), set[Waiter]()
        self.moved: set[int] = set()  # the jobs that the current transaction moves
        self.moves: list[Move] = []  # in the current transaction, for `committed`
        self.committed: Callable[[Sequence[Move]], object] = lambda moves: None  # called after the COMMIT
        self.quiet: set[int] = set()  # jobs whose moves the answer to a submit reports: they do not wake callers that wait for any job
        self.synchronous = ""
        self.propose: Callable[[], Callable[[], bool] | None] = lambda: None  # see `decide`
        self.undecided = False  # the rows have changed, so a new decision may be possible
        self.outcomes: list[tuple[Callable[[], object], Callable[[], object]]] = []  # what to call after a COMMIT, and after a failure
        self.shares = Shares()

    def call(self, work: Callable[[sqlite3.Connection], T], durable: bool) -> T:
        """Run `work` in a transaction and return its value; if `durable`, it is on disk then. Inside a transaction, run it at once.

        If `work` raises, only its own part is rolled back. Raises StorageError if the database cannot be written.
        """
        if self.is_inside():
            return work(self.db)
        message, following = Message(work, durable), list[Callable[[], object]]()
        self.inbox.append(message)
        with self.inside():
            if not message.done:
                following = self.commit_waiting()
        self.carry_out(following)
        if message.error is not None:
            raise message.error
        return cast(T, message.value)

    def settle(self) -> None:
        """Decide now, because something other than the rows has changed."""
        with self.inside():
            self.undecided = True
            following = self.commit_waiting()
        self.carry_out(following)

    @staticmethod
    def carry_out(following: Iterable[Callable[[], object]]) -> None:
        """Do what follows from a COMMIT, all of it: none of it is the caller's alone."""
        for follow in following:
            try:
                follow()
            except Exception:
                log.exception("an error in what follows from a transaction")

    def after(self, done: Callable[[], object], failed: Callable[[], object] = lambda: None) -> None:
        """Call `done` outside the core after the COMMIT of the current transaction, or `failed` if it is rolled back."""
        self.outcomes.append((done, failed))

    def is_inside(self) -> bool:
        """Tell whether this thread is inside the core now."""
        return self.owner == threading.get_ident()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Enter the core for the block: one thread at a time."""
        with self.lock:
            self.owner = threading.get_ident()
            try:
                yield
            finally:
                self.owner = 0

    @contextlib.contextmanager
    def watching(self, look: Callable[[], Any], jobs: int | frozenset[int] | None) -> Iterator[Waiter]:
        """During the block, look for a caller after each commit that moved the job or one of the jobs; any job if `jobs` is None."""
        waiter = Waiter(look, jobs)
        self.waiters.add(waiter)
        try:
            yield waiter
        finally:
            self.waiters.discard(waiter)

    def wake_all(self) -> None:
        for waiter in list(self.waiters):
            waiter.bell.ring()

    def commit_waiting(self) -> list[Callable[[], object]]:
        """Run and commit all waiting work in one transaction, then look for waiting callers.

        Decisions that are left over, or that need a durable transaction, get a separate one. Return what to call outside the core.
        """
        following = list[Callable[[], object]]()
        while self.inbox or self.undecided:
            batch = [self.inbox.popleft() for _ in range(len(self.inbox))]
            try:
                self.transact(batch)
            except BaseException as error:  # noqa: BLE001 - every waiting thread gets it
                log.debug("a transaction for %d callers failed: %s", len(batch), error)  # dispatch_tick repeats lost decisions
                self.roll_back(is_storage=isinstance(error, sqlite3.Error))
                for message in batch:
                    message.error = self.why_not(error, alone=len(batch) == 1)
            for message in batch:
                message.done = True
            following += [done for done, _ in self.outcomes]
            self.outcomes.clear()
            if self.moves:
                following.append(functools.partial(self.committed, self.moves))
                self.moves = []
            self.look_around()
        return following

    def look_around(self) -> None:
        """Look for callers that wait for a job that has moved."""
        moved, self.moved = self.moved, set()
        is_news = not moved <= self.quiet
        for waiter in list(self.waiters) if moved else ():
            if is_news if waiter.jobs is None else not waiter.jobs.isdisjoint(moved):
                waiter.look_again()

    def transact(self, batch: Sequence[Message]) -> None:
        """Run all of this work in one transaction, and the decisions that it makes possible."""
        durable = any(message.durable for message in batch)
        if batch:
            self.begin("FULL" if durable else "NORMAL")
        if len(batch) == 1:
            batch[0].value = batch[0].work(self.db)
        else:
            for message in batch:
                self.run(message)
        if self.undecided and (durable or not batch):
            self.decide()
        if not self.db.in_transaction:
            return
        if self.is_time():
            self.beat(self.db)
        crash_point("commit.begun")
        self.db.execute("COMMIT")
        self.shares.commit()
        crash_point("commit.done")

    def begin(self, level: str) -> None:
        """Begin a transaction. With FULL it is on disk when its COMMIT returns."""
        self.set_synchronous(level)
        self.db.execute("BEGIN IMMEDIATE")

    def decide(self) -> None:
        """Carry out what `propose` proposes, as long as that changes the rows.

        An error here loses only the decisions of this transaction, not the callers' work.
        """
        try:
            for _ in range(DECISIONS_AT_ONCE):
                self.undecided = False
                step = self.propose()
                if step is None:
                    return
                if not self.db.in_transaction:
                    self.begin("FULL")
                self.savepoint(step)
                if not self.undecided:  # it was refused
                    return
        except Exception as error:
            if is_fatal(error):
                raise
            self.undecided = False
            log.exception("an error while deciding which job is sent")

    def savepoint(self, work: Callable[[], T]) -> T:
        """Run work, and roll its part back if it raises."""
        self.db.execute("SAVEPOINT part")
        known, moves, changes = len(self.outcomes), len(self.moves), self.shares.copy_changes()
        try:
            value = work()
        except Exception as error:
            if not is_fatal(error):
                self.db.execute("ROLLBACK TO part")
                self.db.execute("RELEASE part")
                self.forget_outcomes(known)
                self.shares.back_to(changes)
                del self.moves[moves:]
            raise
        self.db.execute("RELEASE part")
        return value

    def forget_outcomes(self, known: int) -> None:
        """Call the `failed` of all outcomes except the first `known`, and forget them."""
        for _, failed in self.outcomes[known:]:
            failed()
        del self.outcomes[known:]

    def roll_back(self, is_storage: bool) -> None:
        self.moved.clear()
        self.moves.clear()
        self.forget_outcomes(0)
        self.shares.back_to()
        self.undecided = False  # the changes of rows are undone
        with contextlib.suppress(sqlite3.Error):  # closed or gone: nothing to roll back
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if is_storage:
                # A failed COMMIT may leave complete frames in the WAL, which recovery would apply: overwrite them.
                self.beat(self.db)

    @staticmethod
    def why_not(error: BaseException, alone: bool) -> BaseException:
        """Return the error for a thread whose transaction failed: its own if it was alone in it, else a StorageError."""
        return error if alone and not is_fatal(error) else StorageError(f"the database cannot be written: {error}")

    def run(self, message: Message) -> None:
        """Run one of several pieces of work: if it raises, only its own part is rolled back."""
        try:
            message.value = self.savepoint(lambda: message.work(self.db))
        except Exception as error:
            if is_fatal(error):
                raise
            message.error = error

    def set_synchronous(self, level: str) -> None:
        if level != self.synchronous:
            self.db.execute("PRAGMA synchronous = FULL" if level == "FULL" else "PRAGMA synchronous = NORMAL")
            self.synchronous = level


CHECK_PATIENCE_S = 0.5  # how long a start waits for the database check, which then goes on in the background
HEARTBEAT_S = 60.0  # how often steady time is saved: after a reboot it continues from the last saved value


class Database:
    """The database of one process.

    The core owns the connection that writes. Other threads read through a few more; the last one used is taken first, because it
    has the statements prepared. A database in memory or on a network file system, where WAL has no shared memory, has only one.
    """

    def __init__(self, path: str, mode: str, clock: Clock | None = None, is_copy: bool = False) -> None:
        """Open the database. One with an older schema is brought up to date; unless it `is_copy`, a copy of the older one is kept."""
        self.path, self.mode, self.clock, self.is_copy = path, mode, clock or Clock(), is_copy
        self.alone = path == ":memory:" or on_network(path)
        self.readers: list[sqlite3.Connection] = []  # idle ones
        self.damage = ""
        self.make_room: Callable[[], bool] = lambda: False  # frees space on a full disk; returns whether it did
        try:
            self.db = self.connect()
            with contextlib.ExitStack() as on_error:
                on_error.callback(self.db.close)
                self.prepare()
                on_error.pop_all()
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_CORRUPT" or "malformed" in str(error):
                self.refuse_damaged(str(error))
            raise ConfigError(f"DB_PATH {path!r} cannot be opened ({error}): {self.way_in()}") from error

    def prepare(self) -> None:
        """Check and migrate the database, and continue steady time. Raises ConfigError, or sqlite3.Error."""
        found = damage_of(self.db, CHECK_PATIENCE_S)
        self.checked = found is not None  # whether the check finished in time
        self.refuse_damaged(found)
        self.migrate()
        self.set_steady()
        self.core = Core(self.db, self.beat, lambda: self.steady() - self.beaten_at > HEARTBEAT_S)
        self.last_change = int(self.db.execute(statements.CHANGED_LAST).fetchone()[0])
        self.identity = None if self.path == ":memory:" else os.stat(self.path)[stat.ST_INO]

    def way_in(self) -> str:
        """Return what to do if the database cannot be opened: often somebody started joborch as root, which now owns its files."""
        for path in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
            if os.path.isfile(path) and not os.access(path, os.R_OK | os.W_OK):
                return f"{path} belongs to user id {os.stat(path).st_uid}; let user id {os.geteuid()}, who runs this, read and write it"
        or_restore = ", or restore a backup: joborch restore BACKUP" if self.mode == "server" else ""
        return f"give a file that joborch created, or a new one{or_restore}"

    def refuse_damaged(self, damage: str | None) -> None:
        if damage:
            raise ConfigError(f"DB_PATH {self.path!r} is damaged ({one_line(damage, 120)}): {self.way_out()}")

    def way_out(self) -> str:
        if self.mode == "server":
            return "restore a backup with: joborch restore BACKUP"
        return "move it away: the server starts new attempts of the jobs that ran here"

    def look_for_damage(self) -> None:
        """Check the whole database in the background, unless the start did. A damaged database accepts no more jobs."""
        if self.checked:
            return
        with contextlib.closing(self.reader()) as db:
            self.damage = damage_of(db) or ""
        if self.damage:
            log.error("the database is damaged: %s; stop this %s, and %s", self.damage, self.mode, self.way_out())

    def connect(self, mode: str = "rwc") -> sqlite3.Connection:
        address = self.path if self.path == ":memory:" else f"file:{quote(os.path.abspath(self.path))}?mode={mode}"
        db = sqlite3.connect(address, uri=self.path != ":memory:", timeout=10, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        if self.alone:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA journal_size_limit = 67108864")
        return db

    def migrate(self) -> None:
        """Create the schema or bring it up to date. Raises ConfigError if this program does not know it."""
        version = int(self.db.execute("PRAGMA user_version").fetchone()[0])
        self.is_new = version == 0
        if version > statements.SCHEMA_VERSION:
            which = f"(schema {version}, this one knows {SCHEMA_VERSION})"
            raise ConfigError(f"DB_PATH {self.path!r} was created by a newer joborch {which}: run that version, or {self.way_back()}")
        if 0 < version < min(statements.MIGRATIONS):
            raise ConfigError(f"DB_PATH {self.path!r} was created by an unreleased joborch (schema {version}): give another file")
        if self.is_new:
            self.db.executescript(statements.SCHEMA)
            return
        has_copy = version < statements.SCHEMA_VERSION and not self.is_copy and self.path != ":memory:"
        copy = self.keep_older(version) if has_copy else None
        for older in range(version, statements.SCHEMA_VERSION):
            try:
                self.db.executescript(statements.MIGRATIONS[older])
            except sqlite3.Error:
                # Nothing was migrated. If a service manager tries it every two seconds, the copies would fill the disk.
                if copy and older == version and self.db.in_transaction:
                    discard(copy)
                raise

    def keep_older(self, version: int) -> Path:
        """Keep a copy of the database for the older version of joborch, and return it. Raises ConfigError if there is no room for it."""
        copy = Path(f"{self.path}.schema-{version}-{time_stamp()}")
        fresh = Path(f"{self.path}.schema-{version}.part")
        discard(fresh)  # a killed start may have left it
        try:
            self.refuse_damaged(copy_to(self.db, fresh))
            os.rename(fresh, copy)
            fsync_path(copy.parent)
        except (sqlite3.Error, OSError) as error:
            size = size_text(os.path.getsize(self.path))
            remedy = f"free {size} on that disk, or start the older version again"
            raise ConfigError(f"{copy} cannot be written ({error}), and the database is not migrated without it: {remedy}") from error
        log.info("the database moves from schema %d to %d; %s is a copy for the older version", version, statements.SCHEMA_VERSION, copy)
        return copy

    def way_back(self) -> str:
        """Return how to use this version again although a newer one has migrated the database."""
        if self.mode == "client":
            return "stop it by `joborch client --drain`, and start this one with an empty DATA_PATH"
        name = os.path.basename(self.path) + ".schema-"
        copies = list[tuple[str, Path]]()
        for path in Path(os.path.dirname(self.path) or ".").iterdir():
            found = re.fullmatch(re.escape(name) + r"(\d+)-(\d{8}-\d{6})", path.name)
            if found and int(found[1]) <= statements.SCHEMA_VERSION:
                copies.append((found[2], path))
        if not copies:
            return "give another file"
        return f"go back to the copy from before: joborch restore {max(copies)[1]} (with --dry-run it lists what came since)"

    def set_steady(self) -> None:
        """Continue steady time where the last process left it: by the clock of this boot, or by wall time after a reboot."""
        at, boot, boot_s, steady = self.db.execute(statements.LAST_HEARTBEAT).fetchone()
        now_boot, now_s = self.clock.boot()
        self.rebooted = boot not in ("", now_boot)  # what was not synced before that may be lost
        if boot != now_boot:
            # It is 0 in a new database, so it begins as wall time. Moves can be later than the last heartbeat, at most by its period.
            boot_s, steady = now_s, steady + max(HEARTBEAT_S if boot else 0.0, self.clock.wall() - at)
        self.steady_offset = float(steady - boot_s)
        self.beat(self.db)

    def steady(self) -> float:
        """Return the time in seconds for ages and delays. It began as wall time, but setting the clock does not change it."""
        return self.clock.boot()[1] + self.steady_offset

    def beat(self, db: sqlite3.Connection) -> None:
        """Store the value from which steady time continues after a reboot."""
        boot, boot_s = self.clock.boot()
        self.beaten_at = boot_s + self.steady_offset
        db.execute(statements.HEARTBEAT, {"at": self.clock.wall(), "boot": boot, "boot_s": boot_s, "steady": self.beaten_at})

    def close(self) -> None:
        """Close the writing connection. Readers keep theirs: closing one during a query crashes the process."""
        with self.core.inside():
            self.db.close()

    def read(self, sql: str, **values: Any) -> list[sqlite3.Row]:
        """Return all rows of a query. Raises StorageError if the database cannot be read."""
        try:
            if self.core.is_inside():
                return self.db.execute(sql, values).fetchall()
            if self.alone:
                with self.core.inside():
                    return self.db.execute(sql, values).fetchall()
            try:
                db = self.readers.pop()
            except IndexError:
                db = self.reader()
            try:
                return db.execute(sql, values).fetchall()
            finally:
                if len(self.readers) < READERS_KEPT:
                    self.readers.append(db)
                else:
                    db.close()
        except sqlite3.Error as error:
            raise StorageError(f"the database cannot be read: {error}") from error

    def reader(self) -> sqlite3.Connection:
        db = self.connect("rw")  # rw: does not create a new file if the file was removed
        db.execute("PRAGMA query_only = 1")
        db.execute("PRAGMA wal_autocheckpoint = 0")  # only the writer checkpoints
        return db

    def number(self, sql: str, **values: Any) -> int:
        """Return the single number of a query; None counts as 0."""
        return int(self.read(sql, **values)[0][0] or 0)

    def write(self, work: Callable[[sqlite3.Connection], T], durable: bool = True) -> T:
        """Like Core.call, but on a full disk free space and try once more."""
        try:
            return self.core.call(work, durable)
        except StorageError as error:
            if "full" not in str(error) or not self.make_room():
                raise
            return self.core.call(work, durable)

    def check(self) -> None:
        """Raise StorageError if the database cannot be read and written, or its file was removed."""
        self.write(self.beat, durable=False)
        self.check_identity()

    def check_identity(self) -> None:
        """Raise StorageError if the database is damaged, or its file was removed: writes would be lost."""
        if self.damage:
            raise StorageError(f"the database is damaged: {self.damage}")
        if self.identity is not None:
            try:
                gone = os.stat(self.path)[stat.ST_INO] != self.identity
            except OSError:
                gone = True
            if gone:
                raise StorageError("the database file was removed or replaced while the program ran: restart it")


# == 2. Files of databases ==  Copies, damage, and where a file is.


def copy_to(db: sqlite3.Connection, target: Path) -> str:
    """Copy a database as of one moment to a new plain file, and make it durable. Return what is wrong with the copy, or "".

    Raises FileExistsError for a file that is there, sqlite3.Error or OSError. A copy that is incomplete or damaged is removed.
    """
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    damage: str | None = "incomplete"
    try:
        with contextlib.closing(sqlite3.connect(target)) as new:
            db.backup(new)  # in one step, which does not block writers
            new.execute("PRAGMA journal_mode = DELETE")  # one plain file
            damage = damage_of(new)
        fsync_path(target)
    finally:
        if damage:
            discard(target)
    return damage or ""


def damage_of(db: sqlite3.Connection, patience_s: float | None = None) -> str | None:
    """Return what is wrong with a database: empty if nothing is, None if the check took longer than `patience_s`."""
    deadline = None if patience_s is None else time.monotonic() + patience_s
    db.set_progress_handler(lambda: deadline is not None and time.monotonic() > deadline, 10_000)
    try:
        said = db.execute(statements.DAMAGE).fetchone()[0]
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            return None
        raise
    except sqlite3.DatabaseError as error:  # too damaged to be checked
        return str(error)
    finally:
        db.set_progress_handler(None, 0)
    return "" if said == "ok" else str(said)


def on_network(path: str) -> bool:
    """Tell whether a path is on a network file system, by the longest mount point in /proc/mounts."""
    kinds = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "afs", "fuse.sshfs", "9p", "panfs", "orangefs")
    real, best, kind = os.path.realpath(path), "", ""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in mounts:
        _, point, found = line.split(" ")[:3]
        if (real + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, kind = point, found
    return kind.startswith(kinds)
