-- The schema as versions before ended_as made it: what a site's database may look like before this program opens it.
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    uuid TEXT NOT NULL,
    user_id INTEGER,
    service TEXT,
    name TEXT,
    status TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    cause TEXT,
    exit_code INTEGER,
    signal INTEGER,
    priority INTEGER NOT NULL DEFAULT 0,
    cpus INTEGER NOT NULL DEFAULT 1,
    memory INTEGER,
    timeout REAL,
    retries INTEGER NOT NULL DEFAULT 0,
    return_inputs INTEGER NOT NULL DEFAULT 1,
    attempt INTEGER NOT NULL DEFAULT 1,
    client TEXT,
    dest_id TEXT,
    remote_id TEXT,
    handle TEXT,
    idempotency_key TEXT,
    request_digest TEXT,
    result_size INTEGER,
    result_sha256 TEXT,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    not_before REAL,
    fetched_at REAL,
    kill_requested_at REAL,
    kill_cause TEXT,
    moves INTEGER NOT NULL DEFAULT 0,
    changed INTEGER,
    moved_at REAL NOT NULL DEFAULT 0,
    synced INTEGER NOT NULL DEFAULT 0,
    inputs_sha256 TEXT,
    after_ids TEXT NOT NULL DEFAULT '',
    blocked INTEGER NOT NULL DEFAULT 0,
    arrived_at REAL NOT NULL DEFAULT 0,
    charged REAL NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX jobs_uuid ON jobs(uuid, attempt);
CREATE UNIQUE INDEX jobs_key ON jobs(user_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_user ON jobs(user_id, id);
CREATE INDEX jobs_service ON jobs(service, id);
CREATE INDEX jobs_status ON jobs(status, id);
CREATE INDEX jobs_changed ON jobs(changed) WHERE changed IS NOT NULL;
CREATE INDEX jobs_delayed ON jobs(not_before) WHERE status = 'Queued' AND not_before IS NOT NULL;
CREATE INDEX jobs_busy ON jobs(service, user_id) WHERE status IN ('Processing', 'Submitted', 'Running', 'Unknown');
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
CREATE TABLE history (
    job_id INTEGER NOT NULL,
    number INTEGER NOT NULL,
    at REAL NOT NULL,
    source TEXT,
    target TEXT NOT NULL,
    reason TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    seq INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job_id, number)
) WITHOUT ROWID;
CREATE TABLE attempts (
    job_id INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    client TEXT,
    dest_id TEXT,
    started_at REAL,
    ended_at REAL,
    exit_code INTEGER,
    signal INTEGER,
    reason TEXT,
    cause TEXT,
    PRIMARY KEY (job_id, attempt)
) WITHOUT ROWID;
CREATE TABLE contenders (
    service TEXT NOT NULL,
    user_id INTEGER NOT NULL,
    at_quota INTEGER NOT NULL,
    rank REAL NOT NULL,
    head INTEGER NOT NULL,
    cpus INTEGER NOT NULL,
    memory INTEGER,
    timeout REAL,
    PRIMARY KEY (service, user_id)
) WITHOUT ROWID;
CREATE INDEX contenders_turn ON contenders(service, at_quota, rank, head);
CREATE TABLE usage (
    service TEXT NOT NULL,
    user_id INTEGER NOT NULL,
    used REAL NOT NULL,
    runs INTEGER NOT NULL,
    mean_s REAL NOT NULL,
    PRIMARY KEY (service, user_id)
) WITHOUT ROWID;
CREATE INDEX usage_user ON usage(user_id);
CREATE TABLE pace (
    service TEXT PRIMARY KEY,
    level REAL NOT NULL,
    runs INTEGER NOT NULL,
    mean_s REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE users (user_id INTEGER PRIMARY KEY, weight REAL NOT NULL);
CREATE TABLE drained (client TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE dependencies (
    on_id INTEGER NOT NULL,
    job_id INTEGER NOT NULL,
    PRIMARY KEY (on_id, job_id)
) WITHOUT ROWID;
CREATE INDEX dependencies_of ON dependencies(job_id);
CREATE TABLE turns_made (rules TEXT NOT NULL, half_life_s REAL NOT NULL);
INSERT INTO turns_made VALUES ('', 0);
CREATE TABLE heartbeat (
    at REAL NOT NULL,
    instance TEXT NOT NULL,
    boot TEXT NOT NULL DEFAULT '',
    boot_s REAL NOT NULL DEFAULT 0,
    steady REAL NOT NULL DEFAULT 0
);
INSERT INTO heartbeat (at, instance) VALUES (0, lower(hex(randomblob(8))));
PRAGMA user_version = 3;
