"""All SQL of the program.

1. Statements
"""

from __future__ import annotations

from joborch_base.states import ATTEMPT, MOVABLE, NEW_COLUMNS

# == 1. Statements ==  All SQL of the program, as named constants. Every query uses an index.

SCHEMA_VERSION = 5

SCHEMA = """
BEGIN;
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, uuid TEXT NOT NULL, user_id INTEGER, service TEXT, name TEXT,
    status TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', cause TEXT, exit_code INTEGER, signal INTEGER,
    priority INTEGER NOT NULL DEFAULT 0, cpus INTEGER NOT NULL DEFAULT 1, memory INTEGER, timeout REAL,
    retries INTEGER NOT NULL DEFAULT 0, return_inputs INTEGER NOT NULL DEFAULT 1, attempt INTEGER NOT NULL DEFAULT 1,
    client TEXT, dest_id TEXT, remote_id TEXT, handle TEXT, idempotency_key TEXT, request_digest TEXT,
    result_size INTEGER, result_sha256 TEXT,
    created_at REAL NOT NULL, started_at REAL, ended_at REAL, not_before REAL, fetched_at REAL, kill_requested_at REAL, kill_cause TEXT,
    moves INTEGER NOT NULL DEFAULT 0, changed INTEGER, moved_at REAL NOT NULL DEFAULT 0, synced INTEGER NOT NULL DEFAULT 0,
    inputs_sha256 TEXT, after_ids TEXT NOT NULL DEFAULT '', blocked INTEGER NOT NULL DEFAULT 0,
    arrived_at REAL NOT NULL DEFAULT 0, charged REAL NOT NULL DEFAULT 0, ended_as TEXT, retry_of INTEGER,
    from_ids TEXT NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX jobs_uuid ON jobs(uuid, attempt);
CREATE UNIQUE INDEX jobs_key ON jobs(user_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_user ON jobs(user_id, id);
CREATE INDEX jobs_service ON jobs(service, id);
CREATE INDEX jobs_status ON jobs(status, id);
CREATE INDEX jobs_changed ON jobs(changed) WHERE changed IS NOT NULL;
CREATE INDEX jobs_delayed ON jobs(not_before) WHERE status = 'Queued' AND not_before IS NOT NULL;
CREATE INDEX jobs_queued ON jobs(service, user_id, priority DESC, id)
 WHERE status = 'Queued' AND not_before IS NULL AND blocked = 0;
CREATE INDEX jobs_line ON jobs(service, priority, arrived_at) WHERE status = 'Queued' AND not_before IS NULL AND blocked = 0;
CREATE INDEX jobs_waiting ON jobs(user_id) WHERE status = 'Queued';
CREATE INDEX jobs_client ON jobs(client, id, cpus, memory) WHERE status IN ('Processing', 'Submitted', 'Running', 'Unknown');
CREATE INDEX jobs_ended ON jobs(moved_at) WHERE status IN ('Completed', 'Failed', 'Invalid', 'Killed');
CREATE INDEX jobs_cleaned ON jobs(moved_at) WHERE status = 'Cleaned';
CREATE INDEX jobs_unfetched ON jobs(changed) WHERE changed IS NOT NULL AND fetched_at IS NULL;
CREATE INDEX jobs_unsynced ON jobs(id)
 WHERE synced = 0 AND changed IS NOT NULL AND fetched_at IS NULL AND status IN ('Completed', 'Failed', 'Invalid', 'Killed');
CREATE INDEX jobs_ended_as ON jobs(ended_as, id) WHERE status = 'Cleaned';
CREATE INDEX jobs_created ON jobs(created_at);
CREATE INDEX jobs_by_end ON jobs(ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX jobs_name ON jobs(name) WHERE name IS NOT NULL;
CREATE TABLE history (
    job_id INTEGER NOT NULL, number INTEGER NOT NULL, at REAL NOT NULL, source TEXT, target TEXT NOT NULL, reason TEXT NOT NULL,
    attempt INTEGER NOT NULL, seq INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job_id, number)
) WITHOUT ROWID;
CREATE INDEX history_seq ON history(seq);
CREATE TABLE feed (
    forgotten INTEGER NOT NULL, -- the last seq of a move that was deleted
    skipped INTEGER NOT NULL -- new moves get a seq above this
);
INSERT INTO feed VALUES (0, 0);
CREATE TABLE attempts (
    job_id INTEGER NOT NULL, attempt INTEGER NOT NULL, client TEXT, dest_id TEXT, started_at REAL, ended_at REAL,
    exit_code INTEGER, signal INTEGER, reason TEXT, cause TEXT,
    PRIMARY KEY (job_id, attempt)
) WITHOUT ROWID;
CREATE TABLE usage (
    service TEXT NOT NULL, user_id INTEGER NOT NULL, used REAL NOT NULL, runs INTEGER NOT NULL, mean_s REAL NOT NULL,
    PRIMARY KEY (service, user_id)
) WITHOUT ROWID;
CREATE INDEX usage_user ON usage(user_id);
CREATE TABLE pace (
    service TEXT PRIMARY KEY, level REAL NOT NULL, -- not used any more
    runs INTEGER NOT NULL, mean_s REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE users (user_id INTEGER PRIMARY KEY, weight REAL NOT NULL);
CREATE TABLE drained (client TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE dependencies (on_id INTEGER NOT NULL, job_id INTEGER NOT NULL, PRIMARY KEY (on_id, job_id)) WITHOUT ROWID;
CREATE INDEX dependencies_of ON dependencies(job_id);
CREATE TABLE results_needed (on_id INTEGER NOT NULL, job_id INTEGER NOT NULL, PRIMARY KEY (on_id, job_id)) WITHOUT ROWID;
CREATE INDEX results_needed_by ON results_needed(job_id);
CREATE TABLE turns_made (rules TEXT NOT NULL, half_life_s REAL NOT NULL); -- rules: not used any more
INSERT INTO turns_made VALUES ('', 0);
CREATE TABLE heartbeat (
    at REAL NOT NULL, instance TEXT NOT NULL, boot TEXT NOT NULL DEFAULT '', boot_s REAL NOT NULL DEFAULT 0, steady REAL NOT NULL DEFAULT 0
);
INSERT INTO heartbeat (at, instance) VALUES (0, lower(hex(randomblob(8))));
PRAGMA user_version = 5;
COMMIT;
"""

# From each version of the schema to the next. 0.1.0 made version 3; earlier ones were never released.
MIGRATIONS = {
    3: """
BEGIN;
ALTER TABLE jobs ADD COLUMN ended_as TEXT;
ALTER TABLE jobs ADD COLUMN retry_of INTEGER;
ALTER TABLE jobs ADD COLUMN from_ids TEXT NOT NULL DEFAULT '';
CREATE TABLE results_needed (on_id INTEGER NOT NULL, job_id INTEGER NOT NULL, PRIMARY KEY (on_id, job_id)) WITHOUT ROWID;
CREATE INDEX results_needed_by ON results_needed(job_id);
DROP TABLE contenders;
DROP INDEX jobs_busy;
UPDATE jobs
   SET ended_as = (SELECT source FROM history WHERE job_id = jobs.id AND target = 'Cleaned' ORDER BY number DESC LIMIT 1),
       reason = coalesce((SELECT reason FROM history WHERE job_id = jobs.id AND target IN ('Completed', 'Failed', 'Invalid', 'Killed')
                           ORDER BY number DESC LIMIT 1), reason)
 WHERE status = 'Cleaned';
CREATE INDEX jobs_ended_as ON jobs(ended_as, id) WHERE status = 'Cleaned';
PRAGMA user_version = 4;
COMMIT;
""",
    4: """
BEGIN;
CREATE INDEX jobs_created ON jobs(created_at);
CREATE INDEX jobs_by_end ON jobs(ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX jobs_name ON jobs(name) WHERE name IS NOT NULL;
CREATE INDEX history_seq ON history(seq);
CREATE TABLE feed (
    forgotten INTEGER NOT NULL, -- the last seq of a move that was deleted
    skipped INTEGER NOT NULL -- new moves get a seq above this
);
INSERT INTO feed VALUES (0, 0);
PRAGMA user_version = 5;
COMMIT;
""",
}

JOB_ADD = "INSERT INTO jobs (" + ", ".join(NEW_COLUMNS) + ") VALUES (:" + ", :".join(NEW_COLUMNS) + ")"
JOB_MOVE = (
    "UPDATE jobs SET status = :to, reason = :reason, ended_as = :ended_as, moves = moves + 1, changed = :changed, moved_at = :moved_at, "
    + ", ".join(name + " = :" + name for name in MOVABLE)
    + " WHERE id = :id AND status = :source AND attempt = :expected AND (:any_wish OR kill_requested_at IS :kill_requested_at)"
)
JOB_GET = "SELECT * FROM jobs WHERE id = :id"
JOB_BY_UUID = "SELECT * FROM jobs WHERE uuid = :uuid ORDER BY attempt DESC LIMIT 1"
JOB_BY_MARK = "SELECT * FROM jobs WHERE uuid = :uuid AND attempt = :attempt"
JOB_BY_KEY = "SELECT * FROM jobs WHERE user_id = :user_id AND idempotency_key = :idempotency_key"
JOB_STATUS = "SELECT status FROM jobs WHERE id = :id"
JOB_HANDLE = "UPDATE jobs SET handle = :handle WHERE id = :id"
JOB_STARTED = "UPDATE jobs SET handle = :handle, moved_at = :now WHERE id = :id"
PAYLOAD_TOLD = "UPDATE jobs SET changed = :changed WHERE id = :id AND status NOT IN ('Prepared', 'Cleaned')"
PAYLOAD_BEGUN = "UPDATE jobs SET changed = :changed, started_at = :started_at, moved_at = :now WHERE id = :id AND status = 'Running'"
JOB_FETCHED = """
UPDATE jobs SET fetched_at = :now
 WHERE id = :id AND fetched_at IS NULL AND status IN ('Completed', 'Failed', 'Invalid', 'Killed', 'Cleaned')
"""
JOB_CONFIRMED = """
UPDATE jobs SET fetched_at = :now, synced = 2
 WHERE id = :id AND synced < 2 AND status IN ('Completed', 'Failed', 'Invalid', 'Killed', 'Cleaned')
"""
JOB_ADMIT = "UPDATE jobs SET not_before = NULL WHERE id = :id AND status = 'Queued'"
JOB_CLIENT = """
UPDATE jobs SET client = :to
 WHERE id = :id AND client = :source AND attempt = :attempt AND status IN ('Submitted', 'Running', 'Unknown')
"""
KILL_WISH = """
UPDATE jobs SET kill_requested_at = :now, kill_cause = :cause
 WHERE id = :id AND kill_requested_at IS NULL AND status IN ('Queued', 'Processing', 'Submitted', 'Prepared', 'Running', 'Unknown')
"""
HISTORY_ADD = """
INSERT INTO history (job_id, number, at, source, target, reason, attempt, seq)
SELECT id, moves, :now, :source, :to, :reason, attempt, :seq FROM jobs WHERE id = :id
"""
LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM history"
FEED_GET = "SELECT forgotten, skipped FROM feed"
FEED_FORGET = "UPDATE feed SET forgotten = max(forgotten, coalesce((SELECT max(seq) FROM history WHERE job_id = :id), 0))"
FEED_SKIP = "UPDATE feed SET skipped = :seq"
# `:statuses` is None, or names between slashes, as in /Failed/Killed/.
OF_JOB = """
   (:user_id IS NULL OR user_id = :user_id) AND (:service IS NULL OR service = :service)
   AND (:name IS NULL OR name >= :name AND name < :name || char(1114111))"""
OF_MOVE = (
    OF_JOB
    + """
   AND (:statuses IS NULL OR instr(:statuses, '/' || target || '/'))
   AND (:cause IS NULL OR cause = :cause AND target IN ('Completed', 'Failed', 'Invalid', 'Killed'))
   AND (:since IS NULL OR at >= :since) AND (:until IS NULL OR at < :until)"""
)
MOVE_COLUMNS = """ seq, at, job_id AS id, user_id, service, source, target, history.reason,
       CASE WHEN target IN ('Completed', 'Failed', 'Invalid', 'Killed') THEN cause END AS cause
"""
CHANGES = (
    "SELECT"
    + MOVE_COLUMNS
    + "FROM history INDEXED BY history_seq CROSS JOIN jobs ON jobs.id = job_id WHERE seq > :after AND seq <= :last AND"
    + OF_MOVE
    + " ORDER BY seq LIMIT :limit"
)
CHANGES_OF_JOB = (
    "SELECT"
    + MOVE_COLUMNS
    + "FROM history CROSS JOIN jobs ON jobs.id = job_id WHERE job_id = :id AND seq > :after AND seq <= :last AND"
    + OF_MOVE
)
CHANGES_BOUND = "SELECT seq FROM history INDEXED BY history_seq WHERE seq > :after ORDER BY seq LIMIT 1 OFFSET :skip"
ENDS_AFTER = """
SELECT seq, job_id FROM history INDEXED BY history_seq
 WHERE seq > :after AND target IN ('Completed', 'Failed', 'Invalid', 'Killed') ORDER BY seq
"""
HISTORY_GET = "SELECT at, source, target, reason, attempt FROM history WHERE job_id = :id ORDER BY number"
ATTEMPT_ADD = "INSERT OR REPLACE INTO attempts (job_id, " + ", ".join(ATTEMPT) + ") VALUES (:id, :" + ", :".join(ATTEMPT) + ")"
ATTEMPTS_GET = "SELECT " + ", ".join(ATTEMPT) + " FROM attempts WHERE job_id = :id ORDER BY attempt"
AT_CLIENT = """
SELECT * FROM jobs INDEXED BY jobs_client
 WHERE client = :client AND status IN ('Processing', 'Submitted', 'Running', 'Unknown') ORDER BY id
"""
ALL_BUSY = "SELECT * FROM jobs INDEXED BY jobs_client WHERE status IN ('Processing', 'Submitted', 'Running', 'Unknown') ORDER BY client, id"
PINNED_AT_CLIENT = """
SELECT * FROM jobs INDEXED BY jobs_client
 WHERE client = :client AND status IN ('Processing', 'Submitted', 'Running', 'Unknown') AND status = 'Unknown' AND dest_id IS NULL
 ORDER BY id
"""
KILLS_AT_CLIENT = """
SELECT * FROM jobs INDEXED BY jobs_client
 WHERE client = :client AND status IN ('Processing', 'Submitted', 'Running', 'Unknown')
   AND kill_requested_at IS NOT NULL AND dest_id IS NOT NULL ORDER BY id
"""
CUT_OFF_SENDING = "SELECT * FROM jobs INDEXED BY jobs_status WHERE status = 'Processing'"
WAITING_FIRST = """
SELECT id, priority, arrived_at, cpus, memory, timeout FROM jobs INDEXED BY jobs_queued
 WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
 ORDER BY priority DESC, id LIMIT 1
"""
WAITING_BY_PRIORITY = """
WITH RECURSIVE level(priority, id) AS (
    SELECT * FROM (SELECT priority, id FROM jobs INDEXED BY jobs_queued
                    WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
                    ORDER BY priority DESC, id LIMIT 1)
    UNION ALL
    SELECT (SELECT j.priority FROM jobs j INDEXED BY jobs_queued
             WHERE j.service = :service AND j.user_id = :user_id AND j.status = 'Queued' AND j.not_before IS NULL AND j.blocked = 0
               AND j.priority < level.priority ORDER BY j.priority DESC, j.id LIMIT 1),
           (SELECT j.id FROM jobs j INDEXED BY jobs_queued
             WHERE j.service = :service AND j.user_id = :user_id AND j.status = 'Queued' AND j.not_before IS NULL AND j.blocked = 0
               AND j.priority < level.priority ORDER BY j.priority DESC, j.id LIMIT 1)
      FROM level WHERE level.priority IS NOT NULL
) SELECT jobs.id, jobs.priority, arrived_at, cpus, memory, timeout FROM level JOIN jobs ON jobs.id = level.id
"""
QUEUED_BEFORE = """
SELECT (SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_queued
         WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
           AND priority > :priority LIMIT 10000))
     + (SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_queued
         WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
           AND priority = :priority AND id < :id LIMIT 10000))
"""
QUEUED_IN_SERVICE = """
SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_line
 WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0 LIMIT 10000)
"""
QUEUED_PRIORITIES = """
WITH RECURSIVE level(priority) AS (
    SELECT * FROM (SELECT priority FROM jobs INDEXED BY jobs_line
                    WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0
                    ORDER BY priority LIMIT 1)
    UNION ALL
    SELECT (SELECT j.priority FROM jobs j INDEXED BY jobs_line
             WHERE j.service = :service AND j.status = 'Queued' AND j.not_before IS NULL AND j.blocked = 0
               AND j.priority > level.priority ORDER BY j.priority LIMIT 1)
      FROM level WHERE level.priority IS NOT NULL
) SELECT priority FROM level WHERE priority IS NOT NULL
"""
QUEUED_EARLIER = """
SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_line
 WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0
   AND priority = :priority AND arrived_at < :before LIMIT 10000)
"""
QUEUED_OF_USER = """
SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_waiting WHERE user_id = :user_id AND status = 'Queued' LIMIT :limit)
"""
QUEUED_USERS = """
WITH RECURSIVE waiting(user_id) AS (
    SELECT * FROM (SELECT user_id FROM jobs INDEXED BY jobs_queued
                    WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0 ORDER BY user_id LIMIT 1)
    UNION ALL
    SELECT (SELECT j.user_id FROM jobs j INDEXED BY jobs_queued
             WHERE j.service = :service AND j.status = 'Queued' AND j.not_before IS NULL AND j.blocked = 0
               AND j.user_id > waiting.user_id ORDER BY j.user_id LIMIT 1)
      FROM waiting WHERE waiting.user_id IS NOT NULL
) SELECT user_id FROM waiting WHERE user_id IS NOT NULL
"""
QUEUED_OF_SERVICE = """
SELECT * FROM jobs INDEXED BY jobs_queued
 WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0 AND moved_at < :before
 ORDER BY user_id, priority DESC, id LIMIT 1000
"""
DELAYED_DUE = """
SELECT id FROM jobs INDEXED BY jobs_delayed
 WHERE status = 'Queued' AND not_before IS NOT NULL AND not_before <= :now LIMIT 1000
"""
USAGE_GET = "SELECT used, runs, mean_s FROM usage WHERE service = :service AND user_id = :user_id"
USAGE_SET = "INSERT OR REPLACE INTO usage (service, user_id, used, runs, mean_s) VALUES (:service, :user_id, :use, :runs, :mean_s)"
USAGE_OF_USER = "SELECT service, used, runs, mean_s FROM usage INDEXED BY usage_user WHERE user_id = :user_id"
USAGE_ALL = "SELECT service, user_id, used, runs, mean_s FROM usage"
PACE_ALL = "SELECT service, runs, mean_s FROM pace"
PACE_SET = "INSERT OR REPLACE INTO pace (service, level, runs, mean_s) VALUES (:service, 0, :runs, :mean_s)"
JOB_CHARGE_SET = "UPDATE jobs SET charged = :charged WHERE id = :id"
JOB_CHARGE = "UPDATE jobs SET charged = :charged WHERE id = :id AND attempt = :attempt AND status = :status AND charged < :charged"
WEIGHT_ALL = "SELECT user_id, weight FROM users"
WEIGHT_SET = "INSERT OR REPLACE INTO users (user_id, weight) VALUES (:user_id, :weight)"
DRAINED_ALL = "SELECT client, at FROM drained"
DRAINED_SET = "INSERT OR IGNORE INTO drained (client, at) VALUES (:client, :at)"
DRAINED_CLEAR = "DELETE FROM drained WHERE client = :client"
DEPENDENCY_ADD = "INSERT OR IGNORE INTO dependencies (on_id, job_id) VALUES (:on_id, :job_id)"
DEPENDENTS = """
SELECT jobs.* FROM dependencies JOIN jobs ON jobs.id = dependencies.job_id
 WHERE dependencies.on_id = :on_id AND jobs.status = 'Queued' ORDER BY dependencies.job_id
"""
RESULT_NEEDED_ADD = "INSERT OR IGNORE INTO results_needed (on_id, job_id) VALUES (:on_id, :job_id)"
RESULTS_NEEDED_FORGET = "DELETE FROM results_needed WHERE job_id = :id"
DEPENDENTS_FORGET = "DELETE FROM dependencies WHERE on_id = :on_id"
DEPENDENCIES_FORGET = "DELETE FROM dependencies WHERE job_id = :id"
JOB_UNBLOCK = "UPDATE jobs SET blocked = blocked - 1 WHERE id = :id AND status = 'Queued' AND blocked > 0"
WAS_COMPLETED = "SELECT 1 FROM history WHERE job_id = :id AND target = 'Completed' LIMIT 1"
TURNS_MADE = "SELECT half_life_s FROM turns_made"
TURNS_MADE_BY = "UPDATE turns_made SET half_life_s = :half_life_s"
PAYLOADS_IN = "SELECT * FROM jobs INDEXED BY jobs_status WHERE status = :status ORDER BY id LIMIT :limit"
RUNNING_LIMITS = "SELECT id, uuid, attempt, timeout, moved_at FROM jobs INDEXED BY jobs_status WHERE status = 'Running' ORDER BY id"
RUNNING_NEEDS = (
    "SELECT count(*), coalesce(sum(cpus), 0), coalesce(sum(memory), 0) FROM jobs INDEXED BY jobs_status WHERE status = 'Running'"
)
FIRST_PREPARED = "SELECT min(id) FROM jobs INDEXED BY jobs_status WHERE status = 'Prepared'"
COUNT_IN = "SELECT count(*) FROM jobs INDEXED BY jobs_status WHERE status = :status"
COUNT_LIVE = """
SELECT coalesce(service, '') AS service, status, count(*) AS jobs FROM jobs INDEXED BY jobs_status
 WHERE status IN ('Queued', 'Prepared', 'Processing', 'Submitted', 'Running', 'Unknown') GROUP BY 1, 2
"""  # once after a start; of a million jobs it takes a second
QUEUED_OLDEST = """
SELECT arrived_at FROM jobs INDEXED BY jobs_line
 WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0 AND priority = :priority
 ORDER BY arrived_at LIMIT 1
"""
CHANGED_SINCE = """
SELECT * FROM jobs INDEXED BY jobs_changed WHERE changed IS NOT NULL AND changed > :since AND status <> 'Prepared'
 ORDER BY changed LIMIT 1001
"""  # a page of /events, and one more that tells whether there is another page
CHANGED_ALL = """
SELECT * FROM jobs INDEXED BY jobs_unfetched
 WHERE changed IS NOT NULL AND changed > :since AND fetched_at IS NULL AND status <> 'Cleaned' ORDER BY changed LIMIT 1001
"""
CHANGED_LAST = "SELECT coalesce(max(changed), 1) FROM jobs INDEXED BY jobs_changed WHERE changed IS NOT NULL"
ENDED_BEFORE = """
SELECT * FROM jobs INDEXED BY jobs_ended
 WHERE status IN ('Completed', 'Failed', 'Invalid', 'Killed') AND moved_at < :before
   AND (
    moved_at < :unfetched_before
    OR fetched_at IS NOT NULL AND (moved_at < :fetched_before OR synced = 2 AND fetched_at < :confirmed_before)
   )
   AND NOT EXISTS (
    SELECT 1 FROM results_needed CROSS JOIN jobs AS other ON other.id = results_needed.job_id
     WHERE results_needed.on_id = jobs.id AND other.status IN ('Queued', 'Processing', 'Submitted', 'Running', 'Unknown')
   ) ORDER BY moved_at LIMIT :limit
"""  # moved_at is steady time, fetched_at that of the wall clock
CLEANED_BEFORE = "SELECT id FROM jobs INDEXED BY jobs_cleaned WHERE status = 'Cleaned' AND moved_at < :before LIMIT 500"
FORGET_JOB = "DELETE FROM jobs WHERE id = :id"
FORGET_HISTORY = "DELETE FROM history WHERE job_id = :id"
FORGET_ATTEMPTS = "DELETE FROM attempts WHERE job_id = :id"
OF_ROW = (
    OF_JOB
    + """
   AND (:statuses IS NULL OR instr(:statuses, '/' || status || '/') OR instr(:statuses, '/' || ended_as || '/'))
   AND (:cause IS NULL OR cause = :cause)"""
)
CREATED_WITHIN = " AND (:since IS NULL OR created_at >= :since) AND (:until IS NULL OR created_at < :until)"
ENDED_WITHIN = " AND (:since IS NULL OR ended_at >= :since) AND (:until IS NULL OR ended_at < :until)"
NEWEST = " AND id < :before AND id >= :floor AND" + OF_ROW + CREATED_WITHIN + " ORDER BY id DESC LIMIT :limit"
SKIPPING = " AND id < :before ORDER BY id DESC LIMIT 1 OFFSET :skip"
# Pairs of a page of jobs, and of the id at which it has examined as many rows as it may.
JOBS_PAGE = "SELECT * FROM jobs NOT INDEXED WHERE TRUE" + NEWEST
JOBS_BOUND = "SELECT id FROM jobs NOT INDEXED WHERE TRUE" + SKIPPING
JOBS_PAGE_OF_USER = "SELECT * FROM jobs INDEXED BY jobs_user WHERE user_id = :user_id" + NEWEST
JOBS_BOUND_OF_USER = "SELECT id FROM jobs INDEXED BY jobs_user WHERE user_id = :user_id" + SKIPPING
JOBS_PAGE_OF_SERVICE = "SELECT * FROM jobs INDEXED BY jobs_service WHERE service = :service" + NEWEST
JOBS_BOUND_OF_SERVICE = "SELECT id FROM jobs INDEXED BY jobs_service WHERE service = :service" + SKIPPING
JOBS_PAGE_IN_STATUS = "SELECT * FROM jobs INDEXED BY jobs_status WHERE status = :status" + NEWEST
JOBS_BOUND_IN_STATUS = "SELECT id FROM jobs INDEXED BY jobs_status WHERE status = :status" + SKIPPING
JOBS_PAGE_CLEANED = "SELECT * FROM jobs INDEXED BY jobs_ended_as WHERE status = 'Cleaned' AND ended_as = :status" + NEWEST
JOBS_BOUND_CLEANED = "SELECT id FROM jobs INDEXED BY jobs_ended_as WHERE status = 'Cleaned' AND ended_as = :status" + SKIPPING
JOBS_PAGE_NAMED = (
    """
SELECT * FROM jobs INDEXED BY jobs_name WHERE name IS NOT NULL AND name >= :name AND name < :name || char(1114111)
"""
    + NEWEST
)
JOBS_NAMED = """
SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_name
 WHERE name IS NOT NULL AND name >= :name AND name < :name || char(1114111) LIMIT :limit)
"""
JOB_IF = "SELECT * FROM jobs WHERE id = :id AND" + OF_ROW + CREATED_WITHIN
JOB_IF_ENDED = "SELECT * FROM jobs WHERE id = :id AND ended_at IS NOT NULL AND" + OF_ROW + ENDED_WITHIN
BY_END = """
  FROM jobs INDEXED BY jobs_by_end
 WHERE ended_at IS NOT NULL AND ended_at < :until AND ended_at >= :since
   AND ended_at <= :ended_before AND (ended_at < :ended_before OR id < :before)"""
JOBS_PAGE_BY_END = (
    "SELECT *"
    + BY_END
    + " AND ended_at >= :ended_floor AND (ended_at > :ended_floor OR id >= :floor) AND"
    + OF_ROW
    + " ORDER BY ended_at DESC, id DESC LIMIT :limit"
)
JOBS_BOUND_BY_END = "SELECT ended_at, id" + BY_END + " ORDER BY ended_at DESC, id DESC LIMIT 1 OFFSET :skip"
# Ids rise with `created_at`, unless the clock was set back. So the first rows of a time span give the bounds of its ids.
CREATED_FIRST = """
SELECT min(id) FROM (SELECT id FROM jobs INDEXED BY jobs_created WHERE created_at >= :since ORDER BY created_at LIMIT 1000)
"""
CREATED_LAST = """
SELECT max(id) FROM (SELECT id FROM jobs INDEXED BY jobs_created WHERE created_at < :until ORDER BY created_at DESC LIMIT 1000)
"""
# For the charts of the web page. They examine the newest 20,000 jobs, so that they take as long whatever the number of jobs.
NEWEST_SUBMITTED = """
SELECT CAST((created_at - :since) / :step_s AS INTEGER) AS step, count(*) AS jobs, avg(started_at - created_at) AS wait_s
  FROM (SELECT created_at, started_at FROM jobs ORDER BY id DESC LIMIT 20000) WHERE created_at >= :since GROUP BY step
"""
NEWEST_ENDED = """
SELECT CAST((at - :since) / :step_s AS INTEGER) AS step, ended, count(*) AS jobs
  FROM (SELECT coalesce(ended_as, status) AS ended, CASE status WHEN 'Cleaned' THEN ended_at ELSE moved_at + :steady_began END AS at
          FROM jobs ORDER BY id DESC LIMIT 20000)
 WHERE ended IN ('Completed', 'Failed', 'Invalid', 'Killed') AND at >= :since GROUP BY step, ended
"""
NEWEST_FAILURES = """
SELECT reason, count(*) AS jobs, max(id) AS newest
  FROM (SELECT id, reason, coalesce(ended_as, status) AS ended,
               CASE status WHEN 'Cleaned' THEN ended_at ELSE moved_at + :steady_began END AS at
          FROM jobs ORDER BY id DESC LIMIT 20000)
 WHERE ended IN ('Failed', 'Invalid') AND at >= :since GROUP BY reason ORDER BY jobs DESC, newest DESC LIMIT 20
"""
OLDEST_QUEUED = """
SELECT service, min(created_at) AS created_at
  FROM (SELECT service, created_at FROM jobs INDEXED BY jobs_status WHERE status = 'Queued' ORDER BY id LIMIT 10000) GROUP BY service
"""
USERS_WITH_JOBS = """
SELECT user_id FROM (SELECT user_id FROM usage ORDER BY used DESC LIMIT :limit)
 UNION ALL
SELECT user_id FROM (SELECT user_id FROM jobs INDEXED BY jobs_status WHERE status = 'Queued' ORDER BY id LIMIT 1000)
"""
UNSYNCED = """
SELECT * FROM jobs INDEXED BY jobs_unsynced
 WHERE synced = 0 AND changed IS NOT NULL AND fetched_at IS NULL AND status IN ('Completed', 'Failed', 'Invalid', 'Killed')
   AND moved_at <= :before ORDER BY id
"""
JOB_SYNCED = "UPDATE jobs SET synced = 1 WHERE id = :id AND synced = 0"
HEARTBEAT = "UPDATE heartbeat SET at = :at, boot = :boot, boot_s = :boot_s, steady = :steady"
LAST_HEARTBEAT = "SELECT at, boot, boot_s, steady FROM heartbeat"
INSTANCE = "SELECT instance FROM heartbeat"
NEW_INSTANCE = "UPDATE heartbeat SET instance = lower(hex(randomblob(8)))"
LAST_ID = "SELECT seq FROM sqlite_sequence WHERE name = 'jobs'"
SKIP_IDS = "INSERT OR REPLACE INTO sqlite_sequence (rowid, name, seq) VALUES (1, 'jobs', :last)"
ALL_UUIDS = "SELECT uuid FROM jobs"
DAMAGE = "PRAGMA quick_check(1)"
