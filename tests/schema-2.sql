-- The schema as versions before priorities and shares made it: what a site's database may look like before this program opens it.
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
    inputs_sha256 TEXT
);
CREATE UNIQUE INDEX jobs_uuid ON jobs(uuid, attempt);
CREATE UNIQUE INDEX jobs_key ON jobs(user_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_user ON jobs(user_id, id);
CREATE INDEX jobs_service ON jobs(service, id);
CREATE INDEX jobs_status ON jobs(status, id);
CREATE INDEX jobs_changed ON jobs(changed) WHERE changed IS NOT NULL;
CREATE INDEX jobs_queued ON jobs(service, user_id, id) WHERE status = 'Queued' AND not_before IS NULL;
CREATE INDEX jobs_delayed ON jobs(not_before) WHERE status = 'Queued' AND not_before IS NOT NULL;
CREATE INDEX jobs_busy ON jobs(service, user_id) WHERE status IN ('Processing', 'Submitted', 'Running', 'Unknown');
CREATE INDEX jobs_client ON jobs(client, id) WHERE status IN ('Processing', 'Submitted', 'Running', 'Unknown');
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
CREATE TABLE eligible (
    service TEXT NOT NULL,
    head INTEGER NOT NULL,
    user_id INTEGER NOT NULL,
    PRIMARY KEY (service, head)
) WITHOUT ROWID;
CREATE UNIQUE INDEX eligible_user ON eligible(service, user_id);
CREATE TABLE heartbeat (
    at REAL NOT NULL,
    instance TEXT NOT NULL,
    boot TEXT NOT NULL DEFAULT '',
    boot_s REAL NOT NULL DEFAULT 0,
    steady REAL NOT NULL DEFAULT 0
);
INSERT INTO heartbeat (at, instance) VALUES (0, lower(hex(randomblob(8))));
PRAGMA user_version = 2;
