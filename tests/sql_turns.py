"""A store that also keeps turns as rows, as the program did before it kept them in memory: the reference for a comparison."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping
from typing import Any

from joborch import Job, Run, Service, Store
from joborch_base import statements
from joborch_base.scheduling import Share, Usage, Waiting, cap_idle_credit, rank_of, with_open_runs

BUSY = "status IN ('Processing', 'Submitted', 'Running', 'Unknown')"
TABLE = """
CREATE TABLE IF NOT EXISTS runnable_users (
    service TEXT NOT NULL, user_id INTEGER NOT NULL, at_quota INTEGER NOT NULL, rank REAL NOT NULL,
    head INTEGER NOT NULL, cpus INTEGER NOT NULL, memory INTEGER, timeout REAL, PRIMARY KEY (service, user_id)
) WITHOUT ROWID;
"""
RUNNABLE_SET = "INSERT OR REPLACE INTO runnable_users VALUES (:service, :user_id, :at_quota, :rank, :head, :cpus, :memory, :timeout)"
RUNNABLE_CLEAR = "DELETE FROM runnable_users WHERE service = :service AND user_id = :user_id"
RUNNABLE_GET = "SELECT 1 FROM runnable_users WHERE service = :service AND user_id = :user_id"
RUNNABLE = "SELECT service, at_quota, rank, head, cpus, memory, timeout, user_id FROM runnable_users ORDER BY service, at_quota, rank, head"
OPEN_RUNS = f"""
SELECT id, cpus, charged, CASE status WHEN 'Running' THEN moved_at END FROM jobs
 WHERE service = :service AND user_id = :user_id AND {BUSY} ORDER BY id
"""
OPEN_RUNS_OF_OTHERS = f"""
SELECT user_id, id, cpus, charged, CASE status WHEN 'Running' THEN moved_at END FROM jobs
 WHERE service = :service AND {BUSY} AND user_id <> :user_id ORDER BY id
"""
LEAST_RANK_OF_OTHERS = """
SELECT rank FROM runnable_users WHERE service = :service AND at_quota = 0 AND user_id <> :user_id ORDER BY rank LIMIT 1
"""
WEIGHT_GET = "SELECT weight FROM users WHERE user_id = :user_id"
SHARES = f"SELECT service, user_id, count(*), sum(charged) FROM jobs WHERE {BUSY} GROUP BY service, user_id ORDER BY service, user_id"
LOADS = f"""
SELECT client, count(*), sum(cpus), coalesce(sum(memory), 0), sum(kill_requested_at IS NOT NULL),
       sum(status = 'Unknown' AND dest_id IS NULL), sum(gpus)
  FROM jobs WHERE {BUSY} GROUP BY client ORDER BY client
"""
QUEUED = "SELECT service, count(*) AS queued FROM jobs WHERE status = 'Queued' AND not_before IS NULL AND blocked = 0 GROUP BY service"
LINES = f"SELECT service, count(*) FROM jobs WHERE {BUSY} GROUP BY service ORDER BY service"


class SqlStore(Store):
    """It decides as a Store does, and keeps a table `runnable_users` by SQL alone, from the rows."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.db.executescript(TABLE)

    def usage_in(self, db: sqlite3.Connection, pair: Mapping[str, Any]) -> Usage:
        row = db.execute(statements.USAGE_GET, pair).fetchone()
        return Usage(*row) if row else Usage()

    def weight_in(self, db: sqlite3.Connection, user_id: int | None) -> float:
        row = db.execute(WEIGHT_GET, {"user_id": user_id}).fetchone()
        return float(row[0]) if row else self.sharing.weights.get(user_id or 0, 1.0)

    def update_turn(self, db: sqlite3.Connection, pair: tuple[str, int], is_queue: bool) -> None:
        """Keep both."""
        super().update_turn(db, pair, is_queue)
        self.update_row(db, self.limits[pair[0]], {"service": pair[0], "user_id": pair[1]})

    def update_row(self, db: sqlite3.Connection, service: Service, pair: Mapping[str, Any]) -> None:
        """Write a user's row of `runnable_users`."""
        sql = statements.WAITING_FIRST if service.policy == "share" else statements.WAITING_BY_PRIORITY
        waiting = [Waiting(*row) for row in db.execute(sql, pair)]
        if not waiting:
            db.execute(RUNNABLE_CLEAR, pair)
            return
        runs = [Run(*row) for row in db.execute(OPEN_RUNS, pair)]
        use = with_open_runs(self.usage_in(db, pair).use, runs, self.steady(), self.sharing.half_life_s)
        share_rank = use - math.log2(self.weight_in(db, pair["user_id"]))
        rank, head = rank_of(service.policy, waiting, share_rank, self.sharing.ageing_s)
        values = {"at_quota": len(runs) >= service.runs_per_user, "rank": rank, "head": head.job_id, "cpus": head.cpus}
        db.execute(RUNNABLE_SET, {**pair, **values, "memory": head.memory, "timeout": head.timeout})

    def make_turns(self, db: sqlite3.Connection) -> None:
        """Compute both anew, as at a start."""
        db.execute("DELETE FROM runnable_users")
        super().make_turns(db)

    def without_old_credit(self, job: Job, share: Share) -> float:
        """Compare the result with that of SQL."""
        found, by_sql = super().without_old_credit(job, share), self.credit_by_sql(self.db, job)
        assert found == by_sql, (job, found, by_sql)
        return found

    def credit_by_sql(self, db: sqlite3.Connection, job: Job) -> float:
        """What Store.without_old_credit returns, from rows."""
        pair = {"service": job.service, "user_id": job.user_id}
        service, weight, use = self.limits.get(job.service or ""), self.weight_in(db, job.user_id), self.usage_in(db, pair).use
        row, now, half_life_s = db.execute(LEAST_RANK_OF_OTHERS, pair).fetchone(), self.steady(), self.sharing.half_life_s
        level = math.inf if row is None else float(row[0])
        if service is None or service.policy != "share" or db.execute(RUNNABLE_GET, pair).fetchone() is None:
            return use
        if cap_idle_credit(use, weight, level) == use:
            return use
        runs: dict[int, list[Run]] = {}
        for user_id, *run in db.execute(OPEN_RUNS_OF_OTHERS, pair):
            runs.setdefault(user_id, []).append(Run(*run))
        for user_id, open_runs in runs.items():
            theirs = self.usage_in(db, {"service": job.service, "user_id": user_id}).use
            had = with_open_runs(theirs, open_runs, now, half_life_s, in_advance=False)
            level = min(level, had - math.log2(self.weight_in(db, user_id)))
        return use if level == math.inf else cap_idle_credit(use, weight, level)

    def compare(self) -> None:
        """Assert that what is in memory is what the rows say: turns, uses, runs, loads."""
        shares = self.core.shares
        assert not any(layers.changes for layers in shares.maps), "changes that were neither committed nor dropped"
        turns = [
            (name, turn.at_quota, turn.rank, turn.head.job_id, turn.head.cpus, turn.head.memory, turn.head.timeout, turn.user_id)
            for name in sorted(shares.order)
            for turn in shares.order[name]
        ]
        assert turns == [tuple(row) for row in self.read(RUNNABLE)]
        for (service, user_id), share in shares.users.known.items():
            assert share.usage == self.usage_in(self.db, {"service": service, "user_id": user_id})
            assert share.runs or share.waiting, "nothing is kept of who has no jobs"
        runs = {pair: share.runs for pair, share in sorted(shares.users.known.items()) if share.runs}
        found = [(*pair, len(mine), sum(run.charged for run in mine)) for pair, mine in runs.items()]
        assert found == [tuple(row) for row in self.read(SHARES)]
        assert {pair: {*users} for pair, users in shares.running.items() if users} == {
            name: {user_id for service, user_id in runs if service == name} for name, _ in runs
        }
        loads = [(name, *load) for name, load in sorted(shares.loads.known.items()) if load.jobs]
        assert loads == [tuple(row) for row in self.read(LOADS)]
        assert [(name, line.busy) for name, line in sorted(shares.lines.known.items()) if line.busy] == [
            tuple(row) for row in self.read(LINES)
        ]
        assert {name: line.queued for name, line in shares.lines.known.items() if line.queued and name in self.limits} == {
            row["service"]: row["queued"] for row in self.read(QUEUED) if row["service"] in self.limits
        }
