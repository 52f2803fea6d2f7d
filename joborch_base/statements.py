"""All SQL of the program.

1. Schema
2. Statements
"""

from __future__ import annotations

from joborch_base.states import ATTEMPT, MOVABLE, NEW_COLUMNS

# == 1. Schema ==  The tables of a new database, and how an older one gets them.

SCHEMA_VERSION = 11

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
    from_ids TEXT NOT NULL DEFAULT '', callback_url TEXT, inputs_size INTEGER, kill_by TEXT,
    gpus INTEGER NOT NULL DEFAULT 0,
    peak_memory INTEGER, cpu_time REAL
);
CREATE UNIQUE INDEX jobs_uuid ON jobs(uuid, attempt);
CREATE UNIQUE INDEX jobs_key ON jobs(user_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_user ON jobs(user_id, id);
CREATE INDEX jobs_stored ON jobs(user_id) WHERE status <> 'Cleaned';
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
    exit_code INTEGER, signal INTEGER, reason TEXT, cause TEXT, peak_memory INTEGER, cpu_time REAL,
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
CREATE TABLE paused (service TEXT PRIMARY KEY, at REAL NOT NULL, caller TEXT NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE dependencies (on_id INTEGER NOT NULL, job_id INTEGER NOT NULL, PRIMARY KEY (on_id, job_id)) WITHOUT ROWID;
CREATE INDEX dependencies_of ON dependencies(job_id);
CREATE TABLE results_needed (on_id INTEGER NOT NULL, job_id INTEGER NOT NULL, PRIMARY KEY (on_id, job_id)) WITHOUT ROWID;
CREATE INDEX results_needed_by ON results_needed(job_id);
CREATE TABLE deliveries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job_id INTEGER NOT NULL, webhook_id TEXT NOT NULL, status TEXT NOT NULL,
    receiver TEXT NOT NULL, -- scheme, host and port
    body TEXT NOT NULL, at REAL NOT NULL,
    began REAL NOT NULL, -- steady time from which three days count
    due REAL, -- steady time of the next attempt; NULL: it follows an earlier one of its job, or is over
    failures INTEGER NOT NULL DEFAULT 0, -- in a row
    attempts INTEGER NOT NULL DEFAULT 0, tries TEXT NOT NULL DEFAULT '[]', -- the last attempts, as JSON
    outcome TEXT -- delivered, failed or gone; NULL: pending
);
CREATE INDEX deliveries_job ON deliveries(job_id, id);
CREATE INDEX deliveries_open ON deliveries(job_id, id) WHERE outcome IS NULL;
CREATE INDEX deliveries_due ON deliveries(receiver, due) WHERE due IS NOT NULL;
CREATE TABLE turns_made (rules TEXT NOT NULL, half_life_s REAL NOT NULL); -- rules: not used any more
INSERT INTO turns_made VALUES ('', 0);
CREATE TABLE heartbeat (
    at REAL NOT NULL, instance TEXT NOT NULL, boot TEXT NOT NULL DEFAULT '', boot_s REAL NOT NULL DEFAULT 0, steady REAL NOT NULL DEFAULT 0
);
INSERT INTO heartbeat (at, instance) VALUES (0, lower(hex(randomblob(8))));
CREATE TABLE tokens (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, services TEXT NOT NULL, -- separated by commas
    user_id INTEGER, digest TEXT NOT NULL, -- SHA-256 of its text
    key TEXT, -- of a client: the key of its link, in hex
    created_at REAL NOT NULL, expires_at REAL, instance TEXT, -- of the client that has it
    once INTEGER NOT NULL DEFAULT 0 -- 1: its client must replace it before it can do anything else
) WITHOUT ROWID;
CREATE TABLE instances (
    uuid TEXT PRIMARY KEY, name TEXT NOT NULL, -- of its client and token
    cloud TEXT NOT NULL, state TEXT NOT NULL, -- intended, booting, joined, draining, ending or ended
    node TEXT, -- its id in the cloud, once known
    made_at REAL NOT NULL, asked_at REAL, joined_at REAL, ended_at REAL, -- steady; asked_at: when the cloud was asked to create it
    hourly_cost REAL NOT NULL, by_hour INTEGER NOT NULL, cost REAL NOT NULL DEFAULT 0, -- once it has ended
    reason TEXT NOT NULL, console TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX instances_live ON instances(uuid) WHERE state <> 'ended';
CREATE INDEX instances_ended ON instances(ended_at) WHERE state = 'ended';
CREATE TABLE erasures ( -- jobs that are to be deleted, until that is done; quick_check of SQLite 3.40 needs this order of columns
    client TEXT NOT NULL, -- where something is left to do: at this client, or here if it is empty
    job_id INTEGER NOT NULL,
    PRIMARY KEY (client, job_id)
) WITHOUT ROWID;
CREATE INDEX erasures_job ON erasures(job_id);
CREATE TABLE remnants (job_id INTEGER PRIMARY KEY); -- deleted jobs whose texts may be in unused parts of this file
CREATE TABLE cloud_costs ( -- what runs on instances have cost; idle and boot time is what `instances` has beyond that
    day INTEGER NOT NULL, -- since 1970, UTC
    cloud TEXT NOT NULL, service TEXT NOT NULL, user_id INTEGER NOT NULL, cost REAL NOT NULL,
    PRIMARY KEY (day, cloud, service, user_id)
) WITHOUT ROWID;
PRAGMA user_version = 11;
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
    5: """
BEGIN;
CREATE TABLE tokens (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, services TEXT NOT NULL, -- separated by commas
    user_id INTEGER, digest TEXT NOT NULL, -- SHA-256 of its text
    key TEXT, -- of a client: the key of its link, in hex
    created_at REAL NOT NULL, expires_at REAL, instance TEXT -- of the client that has it
) WITHOUT ROWID;
ALTER TABLE jobs ADD COLUMN callback_url TEXT;
CREATE TABLE deliveries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job_id INTEGER NOT NULL, webhook_id TEXT NOT NULL, status TEXT NOT NULL,
    receiver TEXT NOT NULL, -- scheme, host and port
    body TEXT NOT NULL, at REAL NOT NULL,
    began REAL NOT NULL, -- steady time from which three days count
    due REAL, -- steady time of the next attempt; NULL: it follows an earlier one of its job, or is over
    failures INTEGER NOT NULL DEFAULT 0, -- in a row
    attempts INTEGER NOT NULL DEFAULT 0, tries TEXT NOT NULL DEFAULT '[]', -- the last attempts, as JSON
    outcome TEXT -- delivered, failed or gone; NULL: pending
);
CREATE INDEX deliveries_job ON deliveries(job_id, id);
CREATE INDEX deliveries_open ON deliveries(job_id, id) WHERE outcome IS NULL;
CREATE INDEX deliveries_due ON deliveries(receiver, due) WHERE due IS NOT NULL;
PRAGMA user_version = 6;
COMMIT;
""",
    6: """
BEGIN;
CREATE TABLE paused (service TEXT PRIMARY KEY, at REAL NOT NULL, caller TEXT NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version = 7;
COMMIT;
""",
    7: """
BEGIN;
ALTER TABLE jobs ADD COLUMN inputs_size INTEGER;
ALTER TABLE jobs ADD COLUMN kill_by TEXT;
CREATE INDEX jobs_stored ON jobs(user_id) WHERE status <> 'Cleaned';
PRAGMA user_version = 8;
COMMIT;
""",
    8: """
BEGIN;
ALTER TABLE tokens ADD COLUMN once INTEGER NOT NULL DEFAULT 0;
CREATE TABLE instances (
    uuid TEXT PRIMARY KEY, name TEXT NOT NULL, -- of its client and token
    cloud TEXT NOT NULL, state TEXT NOT NULL, -- intended, booting, joined, draining, ending or ended
    node TEXT, -- its id in the cloud, once known
    made_at REAL NOT NULL, asked_at REAL, joined_at REAL, ended_at REAL, -- steady; asked_at: when the cloud was asked to create it
    hourly_cost REAL NOT NULL, by_hour INTEGER NOT NULL, cost REAL NOT NULL DEFAULT 0, -- once it has ended
    reason TEXT NOT NULL, console TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX instances_live ON instances(uuid) WHERE state <> 'ended';
CREATE INDEX instances_ended ON instances(ended_at) WHERE state = 'ended';
ALTER TABLE jobs ADD COLUMN gpus INTEGER NOT NULL DEFAULT 0;
PRAGMA user_version = 9;
COMMIT;
""",
    9: """
BEGIN;
ALTER TABLE jobs ADD COLUMN peak_memory INTEGER;
ALTER TABLE jobs ADD COLUMN cpu_time REAL;
ALTER TABLE attempts ADD COLUMN peak_memory INTEGER;
ALTER TABLE attempts ADD COLUMN cpu_time REAL;
CREATE TABLE erasures ( -- jobs that are to be deleted, until that is done; quick_check of SQLite 3.40 needs this order of columns
    client TEXT NOT NULL, -- where something is left to do: at this client, or here if it is empty
    job_id INTEGER NOT NULL,
    PRIMARY KEY (client, job_id)
) WITHOUT ROWID;
CREATE INDEX erasures_job ON erasures(job_id);
CREATE TABLE remnants (job_id INTEGER PRIMARY KEY); -- deleted jobs whose texts may be in unused parts of this file
PRAGMA user_version = 10;
COMMIT;
""",
    10: """
BEGIN;
CREATE TABLE cloud_costs ( -- what runs on instances have cost; idle and boot time is what `instances` has beyond that
    day INTEGER NOT NULL, -- since 1970, UTC
    cloud TEXT NOT NULL, service TEXT NOT NULL, user_id INTEGER NOT NULL, cost REAL NOT NULL,
    PRIMARY KEY (day, cloud, service, user_id)
) WITHOUT ROWID;
PRAGMA user_version = 11;
COMMIT;
""",
}

# == 2. Statements ==  All other SQL of the program, as named constants. Every query uses an index.

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
JOB_ADMIT = "UPDATE jobs SET not_before = NULL WHERE id = :id AND status = 'Queued' AND not_before IS NOT NULL"
JOB_CLIENT = """
UPDATE jobs SET client = :to
 WHERE id = :id AND client = :source AND attempt = :attempt AND status IN ('Submitted', 'Running', 'Unknown')
"""
KILL_WISH = """
UPDATE jobs SET kill_requested_at = :now, kill_cause = :cause, kill_by = :by
 WHERE id = :id AND kill_requested_at IS NULL AND status IN ('Queued', 'Processing', 'Submitted', 'Prepared', 'Running', 'Unknown')
"""
KILLED_BY = "SELECT kill_by FROM jobs WHERE id = :id AND kill_by IS NOT NULL"
STORED_OF_USER = """
SELECT coalesce(sum(coalesce(inputs_size, 0) + coalesce(result_size, 0)), 0) FROM jobs INDEXED BY jobs_stored
 WHERE user_id = :user_id AND status <> 'Cleaned'
"""
HISTORY_ADD = """
INSERT INTO history (job_id, number, at, source, target, reason, attempt, seq)
SELECT id, moves, :now, :source, :to, :reason, attempt, :seq FROM jobs WHERE id = :id
"""
LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM history"
FEED_GET = "SELECT forgotten, skipped FROM feed"
FEED_FORGET = "UPDATE feed SET forgotten = max(forgotten, coalesce((SELECT max(seq) FROM history WHERE job_id = :id), 0))"
FEED_SKIP = "UPDATE feed SET skipped = :seq"
# `:statuses` and `:services` are None, or names between slashes, as in /Failed/Killed/.
OF_JOB = """
   (:user_id IS NULL OR user_id = :user_id) AND (:service IS NULL OR service = :service)
   AND (:services IS NULL OR instr(:services, '/' || service || '/'))
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
SELECT id, priority, arrived_at, cpus, memory, timeout, gpus FROM jobs INDEXED BY jobs_queued
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
) SELECT jobs.id, jobs.priority, arrived_at, cpus, memory, timeout, gpus FROM level JOIN jobs ON jobs.id = level.id
"""
QUEUED_BEFORE = """
SELECT (SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_queued
         WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
           AND priority > :priority LIMIT :most))
     + (SELECT count(*) FROM (SELECT 1 FROM jobs INDEXED BY jobs_queued
         WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
           AND priority = :priority AND id < :id LIMIT :most))
"""
QUEUED_IN_SERVICE = """
SELECT count(*) FROM jobs INDEXED BY jobs_line WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0
"""
IS_IN_QUEUE = "SELECT 1 FROM jobs WHERE id = :id AND status = 'Queued' AND not_before IS NULL AND blocked = 0"
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
QUEUED_SERVICES = """
WITH RECURSIVE waiting(service) AS (
    SELECT * FROM (SELECT service FROM jobs INDEXED BY jobs_queued
                    WHERE service > '' AND status = 'Queued' AND not_before IS NULL AND blocked = 0 ORDER BY service LIMIT 1)
    UNION ALL
    SELECT (SELECT j.service FROM jobs j INDEXED BY jobs_queued
             WHERE j.service > waiting.service AND j.status = 'Queued' AND j.not_before IS NULL AND j.blocked = 0
             ORDER BY j.service LIMIT 1)
      FROM waiting WHERE waiting.service IS NOT NULL
) SELECT service FROM waiting WHERE service IS NOT NULL
"""
QUEUED_OF_SERVICE = """
SELECT * FROM jobs INDEXED BY jobs_queued
 WHERE service = :service AND status = 'Queued' AND not_before IS NULL AND blocked = 0 AND moved_at < :before
 ORDER BY user_id, priority DESC, id LIMIT 1000
"""
DELAYED_FIRST = """
SELECT id, not_before FROM jobs INDEXED BY jobs_delayed
 WHERE status = 'Queued' AND not_before IS NOT NULL ORDER BY not_before LIMIT 1000
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
PAUSED_ALL = "SELECT service, at, caller, reason FROM paused"
PAUSED_SET = "INSERT OR REPLACE INTO paused (service, at, caller, reason) VALUES (:service, :at, :caller, :reason)"
PAUSED_CLEAR = "DELETE FROM paused WHERE service = :service"
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
RUNNING_LIMITS = """
SELECT id, uuid, attempt, timeout, moved_at, memory FROM jobs INDEXED BY jobs_status WHERE status = 'Running' ORDER BY id
"""
RUNNING_NEEDS = """
SELECT count(*), coalesce(sum(cpus), 0), coalesce(sum(memory), 0), coalesce(sum(gpus), 0)
  FROM jobs INDEXED BY jobs_status WHERE status = 'Running'
"""
RUNNING_COUNTS = "SELECT count(*), count(kill_requested_at) FROM jobs INDEXED BY jobs_status WHERE status = 'Running'"
FIRST_PREPARED = "SELECT min(id) FROM jobs INDEXED BY jobs_status WHERE status = 'Prepared'"
UNFETCHED = """
SELECT count(*) FROM jobs INDEXED BY jobs_unfetched
 WHERE changed IS NOT NULL AND fetched_at IS NULL AND status IN ('Completed', 'Failed', 'Invalid', 'Killed')
"""
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
FORGET_DELIVERIES = "DELETE FROM deliveries WHERE job_id = :id"
FORGET = (
    FEED_FORGET,
    FORGET_HISTORY,
    FORGET_ATTEMPTS,
    FORGET_DELIVERIES,
    "DELETE FROM erasures WHERE job_id = :id",
    DEPENDENCIES_FORGET,
    RESULTS_NEEDED_FORGET,
    FORGET_JOB,
)  # all of a job
DELIVERY_ADD = """
INSERT INTO deliveries (job_id, webhook_id, status, receiver, body, at, began, due)
VALUES (:job_id, :webhook_id, :status, :receiver, :body, :at, :now,
        CASE WHEN EXISTS (SELECT 1 FROM deliveries WHERE job_id = :job_id AND outcome IS NULL) THEN NULL ELSE :now END)
"""
DELIVERY_NEXT = """
SELECT deliveries.*, callback_url FROM deliveries INDEXED BY deliveries_due CROSS JOIN jobs ON jobs.id = job_id
 WHERE receiver = :receiver AND due IS NOT NULL ORDER BY due LIMIT :limit
"""
DELIVERY_NOTE = """
UPDATE deliveries SET due = :due, failures = :failures, attempts = attempts + 1, tries = :tries, outcome = :outcome
 WHERE id = :id AND outcome IS NULL
"""
DELIVERIES_GONE = "UPDATE deliveries SET due = NULL, outcome = 'gone' WHERE job_id = :job_id AND outcome IS NULL"
DELIVERY_FOLLOWS = """
UPDATE deliveries SET due = :now, began = :now
 WHERE id = (SELECT min(id) FROM deliveries INDEXED BY deliveries_open WHERE job_id = :job_id AND outcome IS NULL)
"""
DELIVERIES_ENDED = "SELECT count(*) FROM deliveries INDEXED BY deliveries_job WHERE job_id = :job_id AND outcome IS NOT NULL"
DELIVERIES_AGAIN = "UPDATE deliveries SET due = NULL, failures = 0, outcome = NULL WHERE job_id = :job_id"
DELIVERIES_OF_JOB = "SELECT * FROM deliveries INDEXED BY deliveries_job WHERE job_id = :job_id ORDER BY id"
DELIVERIES_OPEN = "SELECT count(*) FROM deliveries INDEXED BY deliveries_open WHERE outcome IS NULL"
DELIVERIES_RECEIVERS = """
WITH RECURSIVE known(receiver) AS (
    SELECT min(receiver) FROM deliveries INDEXED BY deliveries_due WHERE due IS NOT NULL
    UNION ALL
    SELECT (SELECT min(d.receiver) FROM deliveries d INDEXED BY deliveries_due WHERE d.due IS NOT NULL AND d.receiver > known.receiver)
      FROM known WHERE known.receiver IS NOT NULL
) SELECT receiver FROM known WHERE receiver IS NOT NULL
"""
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
  FROM (SELECT service, created_at, not_before, blocked FROM jobs INDEXED BY jobs_status WHERE status = 'Queued' ORDER BY id LIMIT 10000)
 WHERE not_before IS NULL AND blocked = 0 GROUP BY service
"""
USERS_WITH_JOBS = """
SELECT user_id FROM (SELECT user_id FROM usage ORDER BY used DESC LIMIT :limit)
 UNION ALL
SELECT user_id FROM (SELECT user_id FROM jobs INDEXED BY jobs_status WHERE status = 'Queued' ORDER BY id LIMIT 1000)
"""
TOKEN_ALL = "SELECT name, role, services, user_id, digest, key, created_at, expires_at, instance, once FROM tokens"
TOKEN_ADD = """
INSERT INTO tokens (name, role, services, user_id, digest, key, created_at, expires_at, instance, once)
VALUES (:name, :role, :services, :user_id, :digest, :key, :created_at, :expires_at, :instance, :once)
"""
TOKEN_RENEW = "UPDATE tokens SET digest = :digest, key = :key, expires_at = NULL, once = 0 WHERE name = :name AND once = 1"
TOKEN_BIND = "UPDATE tokens SET instance = :instance WHERE name = :name AND instance IS NULL"
TOKEN_REVOKE = "DELETE FROM tokens WHERE name = :name"
INSTANCE_COLUMNS = "uuid, name, cloud, state, node, made_at, asked_at, joined_at, ended_at, hourly_cost, by_hour, cost, reason, console"
INSTANCES_LIVE = "SELECT " + INSTANCE_COLUMNS + " FROM instances INDEXED BY instances_live WHERE state <> 'ended' ORDER BY made_at, uuid"
INSTANCES_ENDED = (
    "SELECT " + INSTANCE_COLUMNS + " FROM instances INDEXED BY instances_ended"
    " WHERE state = 'ended' AND ended_at >= :since ORDER BY ended_at DESC LIMIT :limit"
)
INSTANCE_GET = "SELECT " + INSTANCE_COLUMNS + " FROM instances WHERE uuid = :uuid"
INSTANCE_ADD = """
INSERT INTO instances (uuid, name, cloud, state, made_at, hourly_cost, by_hour, reason, console)
VALUES (:uuid, :name, :cloud, 'intended', :made_at, :hourly_cost, :by_hour, '', '')
"""
INSTANCE_SET = """
UPDATE instances SET state = :state, node = :node, asked_at = :asked_at, joined_at = :joined_at, ended_at = :ended_at,
 cost = :cost, reason = :reason, console = :console WHERE uuid = :uuid AND state = :known
"""
INSTANCE_FORGET = "DELETE FROM instances WHERE uuid = :uuid"
INSTANCES_FORGET = "DELETE FROM instances WHERE state = 'ended' AND ended_at < :before"
INSTANCES_OLD = "SELECT uuid FROM instances INDEXED BY instances_ended WHERE state = 'ended' AND ended_at < :before LIMIT 1"
INSTANCE_OF_CLIENT = (
    "SELECT " + INSTANCE_COLUMNS + " FROM instances"
    " WHERE uuid >= substr(:client, -12) AND uuid < substr(:client, -12) || 'g' AND name = :client"
)  # the name of its client ends with the first 12 characters of its uuid
CLOUD_COST_ADD = """
INSERT INTO cloud_costs (day, cloud, service, user_id, cost) VALUES (:day, :cloud, :service, :user_id, :cost)
    ON CONFLICT (day, cloud, service, user_id) DO UPDATE SET cost = cost + excluded.cost
"""
CLOUD_COSTS_TODAY = "SELECT cloud, service, user_id, cost FROM cloud_costs WHERE day = :today"
CLOUD_COSTS_BEFORE = "SELECT cloud, service, user_id, sum(cost) FROM cloud_costs WHERE day < :today GROUP BY cloud, service, user_id"
CLOUD_COSTS_FORGET = "DELETE FROM cloud_costs WHERE day < :day"
INSTANCES_COST = "SELECT cloud, sum(cost) AS cost FROM instances INDEXED BY instances_ended WHERE state = 'ended' GROUP BY cloud"
QUEUED_HEADS = """
SELECT cpus, memory, arrived_at FROM jobs INDEXED BY jobs_queued
 WHERE service = :service AND user_id = :user_id AND status = 'Queued' AND not_before IS NULL AND blocked = 0
 ORDER BY priority DESC, id LIMIT :limit
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
# What a restore changes. Databases of all schemas have these columns.
JOBS_COMPARED = "SELECT id, uuid, user_id, service, status, moves FROM jobs ORDER BY id"
JOB_COMPARED = "SELECT uuid, status, moves FROM jobs WHERE id = :id"
DAMAGE = "PRAGMA quick_check(1)"
# Exports: pages of EXPORT_PAGE end at the row that EXPORT_BOUND finds.
EXPORT_SPAN = """
  FROM jobs INDEXED BY jobs_created WHERE created_at >= :at AND created_at < :until AND (created_at > :at OR id > :after)"""
EXPORT_BOUND = "SELECT created_at, id" + EXPORT_SPAN + " ORDER BY created_at, id LIMIT 1 OFFSET :skip"
EXPORT_PAGE = (
    """
SELECT id, user_id, service, name, status, ended_as, cause, exit_code, signal, priority, cpus, memory, timeout, created_at, started_at,
       ended_at, cpu_time, peak_memory, attempt, client, inputs_size, result_size, retry_of, after_ids"""
    + EXPORT_SPAN
    + " AND (created_at < :to_at OR created_at = :to_at AND id <= :to_id) AND"
    + OF_JOB
    + " ORDER BY created_at, id"
)
OF_EXPORT = " FROM jobs INDEXED BY jobs_created WHERE created_at >= :since AND created_at < :until AND" + OF_JOB
EXPORT_FACTS = (
    "SELECT count(*) AS jobs, min(created_at) AS first, max(ended_at) AS last"
    + OF_EXPORT
    + " AND coalesce(ended_as, status) IN ('Completed', 'Failed', 'Invalid', 'Killed')"
)
EXPORT_SERVICES = """
WITH RECURSIVE known(service) AS (
    SELECT min(service) FROM jobs INDEXED BY jobs_service WHERE service > ''
    UNION ALL
    SELECT (SELECT min(j.service) FROM jobs j INDEXED BY jobs_service WHERE j.service > known.service)
      FROM known WHERE known.service IS NOT NULL
) SELECT service FROM known WHERE service IS NOT NULL
"""
EXPORT_SUMMARY = (
    """
SELECT service, strftime('%Y-%m', created_at, 'unixepoch') AS month, count(*) AS jobs,
       sum(coalesce(ended_as, status) = 'Completed') AS completed, sum(coalesce(ended_as, status) IN ('Failed', 'Invalid')) AS failed,
       sum(coalesce(ended_as, status) = 'Killed') AS killed, count(DISTINCT user_id) AS users,
       coalesce(sum(cpus * max(0, ended_at - started_at)), 0) AS slot_s, coalesce(sum(cpu_time), 0) AS cpu_s,
       avg(max(0, coalesce(started_at, ended_at) - created_at)) AS mean_wait_s,
       max(max(0, coalesce(started_at, ended_at) - created_at)) AS longest_wait_s, avg(max(0, ended_at - started_at)) AS mean_run_s"""
    + OF_EXPORT
    + " GROUP BY month, service ORDER BY month, service"
)
# Deletion of jobs on request: see joborch_plugins/privacy.py. The figures that accounting needs stay.
ERASURE_ADD = "INSERT OR IGNORE INTO erasures (job_id, client) VALUES (:id, :client)"
IDS_TO_ERASE = """
SELECT id FROM jobs INDEXED BY jobs_user
 WHERE user_id = :user_id AND NOT EXISTS (SELECT 1 FROM erasures INDEXED BY erasures_job WHERE job_id = jobs.id)
   AND NOT EXISTS (SELECT 1 FROM history WHERE job_id = jobs.id AND target = 'Cleaned' AND reason LIKE :erased) ORDER BY id
"""
ERASURES_AT = "SELECT job_id FROM erasures WHERE client = :client ORDER BY job_id LIMIT :limit"
ERASURES_LIVE = """
SELECT jobs.* FROM erasures CROSS JOIN jobs ON jobs.id = job_id
 WHERE erasures.client = '' AND status IN ('Queued', 'Processing', 'Submitted', 'Prepared', 'Running', 'Unknown')
   AND (kill_requested_at IS NULL OR status = 'Queued') ORDER BY job_id LIMIT :limit
"""
ERASURES_DUE = """
SELECT jobs.* FROM erasures CROSS JOIN jobs ON jobs.id = job_id
 WHERE erasures.client = '' AND status IN ('Completed', 'Failed', 'Invalid', 'Killed', 'Cleaned') ORDER BY job_id LIMIT :limit
"""
ERASURES_OF_JOB = "SELECT client FROM erasures INDEXED BY erasures_job WHERE job_id = :id ORDER BY client"
ERASURES_COUNT_OF_USER = """
SELECT count(DISTINCT job_id) FROM erasures CROSS JOIN jobs ON jobs.id = job_id WHERE user_id = :user_id
"""
ERASURE_CLIENTS = "SELECT DISTINCT client FROM erasures ORDER BY client"
ERASURE_DONE = "DELETE FROM erasures WHERE job_id = :id AND client = :client"
COUNT_OF_USER = "SELECT count(*) FROM jobs INDEXED BY jobs_user WHERE user_id = :user_id"
CLIENTS_OF_JOB = """
SELECT client FROM attempts WHERE job_id = :id AND client IS NOT NULL
 UNION ALL
SELECT client FROM jobs WHERE id = :id AND client IS NOT NULL
"""
ERASE_JOB = """
UPDATE jobs SET name = NULL, reason = '', callback_url = NULL, idempotency_key = NULL, request_digest = NULL, inputs_sha256 = NULL,
       result_sha256 = NULL, kill_by = NULL
 WHERE id = :id AND status = 'Cleaned'
"""
ERASE_HISTORY = "UPDATE history SET reason = '' WHERE job_id = :id AND target <> 'Cleaned'"
ERASE_ATTEMPTS = "UPDATE attempts SET reason = '' WHERE job_id = :id"
ERASE = (ERASE_HISTORY, ERASE_ATTEMPTS, FORGET_DELIVERIES, "INSERT OR IGNORE INTO remnants (job_id) VALUES (:id)")  # all texts of a job
PAYLOADS_OF_JOB = "SELECT * FROM jobs WHERE uuid = :uuid ORDER BY attempt"
REMNANTS = "SELECT coalesce(max(job_id), 0) FROM remnants"
REMNANTS_COUNT = "SELECT count(*) FROM remnants"
REMNANTS_ALL = "SELECT job_id FROM remnants"
REMNANT_OF = "SELECT job_id FROM remnants WHERE job_id = :id"
REMNANT_OF_USER = "SELECT job_id FROM remnants CROSS JOIN jobs ON jobs.id = job_id WHERE user_id = :user_id LIMIT 1"
REMNANT_GONE = "DELETE FROM remnants WHERE job_id = :id"
SECURE_DELETE = "PRAGMA secure_delete = ON"
CHECKPOINT_ALL = "PRAGMA wal_checkpoint(TRUNCATE)"
CHECKPOINT = "PRAGMA wal_checkpoint(PASSIVE)"
REWRITE = "VACUUM"
PATIENCE, NO_PATIENCE = "PRAGMA busy_timeout = 10000", "PRAGMA busy_timeout = 0"
