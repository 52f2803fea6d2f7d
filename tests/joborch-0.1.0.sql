-- A server's database as joborch 0.1.0 left it (commit b219a64): its own Store made these rows.
PRAGMA user_version = 3;
BEGIN TRANSACTION;
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
INSERT INTO "attempts" VALUES(5,1,'127.0.0.1:9000','4',1795510939.0,1795510959.0,NULL,NULL,'the client lost it','infrastructure');
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
INSERT INTO "contenders" VALUES('example',1,0,8.31298167700954800281e+04,6,2,512,60.0);
CREATE TABLE dependencies (
    on_id INTEGER NOT NULL,
    job_id INTEGER NOT NULL,
    PRIMARY KEY (on_id, job_id)
) WITHOUT ROWID;
INSERT INTO "dependencies" VALUES(6,7);
CREATE TABLE drained (client TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE heartbeat (
    at REAL NOT NULL,
    instance TEXT NOT NULL,
    boot TEXT NOT NULL DEFAULT '',
    boot_s REAL NOT NULL DEFAULT 0,
    steady REAL NOT NULL DEFAULT 0
);
INSERT INTO "heartbeat" VALUES(1795510927.0,'bbbe3d337b8cbcd5','boot-1',1127.0,1795510927.0);
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
INSERT INTO "history" VALUES(1,1,1795510801.0,NULL,'Queued','uploaded',1,1795510801000000);
INSERT INTO "history" VALUES(1,2,1795510802.0,'Queued','Processing','claimed for 127.0.0.1:9000',1,1795510802000000);
INSERT INTO "history" VALUES(1,3,1795510812.0,'Processing','Submitted','accepted',1,1795510812000000);
INSERT INTO "history" VALUES(1,4,1795510822.0,'Submitted','Running','running',1,1795510822000000);
INSERT INTO "history" VALUES(1,5,1795510832.0,'Running','Completed','exit status 0',1,1795510832000000);
INSERT INTO "history" VALUES(2,1,1795510833.0,NULL,'Queued','uploaded',1,1795510833000000);
INSERT INTO "history" VALUES(2,2,1795510834.0,'Queued','Processing','claimed for 127.0.0.1:9000',1,1795510834000000);
INSERT INTO "history" VALUES(2,3,1795510844.0,'Processing','Submitted','accepted',1,1795510844000000);
INSERT INTO "history" VALUES(2,4,1795510854.0,'Submitted','Running','running',1,1795510854000000);
INSERT INTO "history" VALUES(2,5,1795510864.0,'Running','Failed','exit status 3',1,1795510864000000);
INSERT INTO "history" VALUES(2,6,1795510874.0,'Failed','Cleaned','2 days after it ended',1,1795510874000000);
INSERT INTO "history" VALUES(3,1,1795510875.0,NULL,'Queued','uploaded',1,1795510875000000);
INSERT INTO "history" VALUES(3,2,1795510876.0,'Queued','Processing','claimed for 127.0.0.1:9000',1,1795510876000000);
INSERT INTO "history" VALUES(3,3,1795510886.0,'Processing','Submitted','accepted',1,1795510886000000);
INSERT INTO "history" VALUES(3,4,1795510896.0,'Submitted','Running','running',1,1795510896000000);
INSERT INTO "history" VALUES(3,5,1795510906.0,'Running','Completed','exit status 0',1,1795510906000000);
INSERT INTO "history" VALUES(3,6,1795510916.0,'Completed','Cleaned','2 days after it ended',1,1795510916000000);
INSERT INTO "history" VALUES(4,1,1795510917.0,NULL,'Queued','uploaded',1,1795510917000000);
INSERT INTO "history" VALUES(4,2,1795510927.0,'Queued','Killed','terminated before it was sent',1,1795510927000000);
INSERT INTO "history" VALUES(5,1,1795510928.0,NULL,'Queued','uploaded',1,1795510928000000);
INSERT INTO "history" VALUES(5,2,1795510929.0,'Queued','Processing','claimed for 127.0.0.1:9000',1,1795510929000000);
INSERT INTO "history" VALUES(5,3,1795510939.0,'Processing','Submitted','accepted',1,1795510939000000);
INSERT INTO "history" VALUES(5,4,1795510949.0,'Submitted','Running','running',1,1795510949000000);
INSERT INTO "history" VALUES(5,5,1795510959.0,'Running','Queued','the client lost it',2,1795510959000000);
INSERT INTO "history" VALUES(5,6,1795510960.0,'Queued','Processing','claimed for 127.0.0.1:9000',2,1795510960000000);
INSERT INTO "history" VALUES(5,7,1795510970.0,'Processing','Submitted','accepted',2,1795510970000000);
INSERT INTO "history" VALUES(5,8,1795510980.0,'Submitted','Running','running',2,1795510980000000);
INSERT INTO "history" VALUES(6,1,1795510981.0,NULL,'Queued','uploaded',1,1795510981000000);
INSERT INTO "history" VALUES(7,1,1795510982.0,NULL,'Queued','uploaded',1,1795510982000000);
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
INSERT INTO "jobs" VALUES(1,'00000000-0000-4000-8000-000000000001',1,'example','done','Completed','exit status 0',NULL,0,NULL,0,1,NULL,NULL,2,1,1,'127.0.0.1:9000','1',NULL,NULL,NULL,NULL,1234,'abababababababababababababababababababababababababababababababab',1795510801.0,1795510812.0,1795510832.0,NULL,NULL,NULL,NULL,5,NULL,1795510832.0,0,NULL,'',0,1795510801.0,10.0);
INSERT INTO "jobs" VALUES(2,'00000000-0000-4000-8000-000000000002',2,'example','cleaned failed','Cleaned','2 days after it ended','user',3,NULL,0,1,NULL,NULL,2,1,1,'127.0.0.1:9000','2',NULL,NULL,NULL,NULL,NULL,NULL,1795510833.0,1795510844.0,1795510864.0,NULL,NULL,NULL,NULL,6,NULL,1795510874.0,0,NULL,'',0,1795510833.0,10.0);
INSERT INTO "jobs" VALUES(3,'00000000-0000-4000-8000-000000000003',1,'example','cleaned completed','Cleaned','2 days after it ended',NULL,0,NULL,0,1,NULL,NULL,2,1,1,'127.0.0.1:9000','3',NULL,NULL,NULL,NULL,9,'cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd',1795510875.0,1795510886.0,1795510906.0,NULL,NULL,NULL,NULL,6,NULL,1795510916.0,0,NULL,'',0,1795510875.0,10.0);
INSERT INTO "jobs" VALUES(4,'00000000-0000-4000-8000-000000000004',1,'example','killed','Killed','terminated before it was sent','cancelled',NULL,NULL,0,1,NULL,NULL,2,1,1,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1795510917.0,NULL,1795510927.0,NULL,NULL,NULL,NULL,2,NULL,1795510927.0,0,NULL,'',0,1795510917.0,0.0);
INSERT INTO "jobs" VALUES(5,'00000000-0000-4000-8000-000000000005',2,'example','second attempt','Running','running',NULL,NULL,NULL,0,1,NULL,NULL,2,1,2,'127.0.0.1:9000','5',NULL,NULL,NULL,NULL,NULL,NULL,1795510928.0,1795510970.0,NULL,NULL,NULL,NULL,NULL,8,NULL,1795510980.0,0,NULL,'',0,1795510928.0,60.0);
INSERT INTO "jobs" VALUES(6,'00000000-0000-4000-8000-000000000006',1,'example','waits','Queued','uploaded',NULL,NULL,NULL,3,2,512,60.0,2,1,1,NULL,NULL,NULL,NULL,'k1','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd',NULL,NULL,1795510981.0,NULL,NULL,NULL,NULL,NULL,NULL,1,NULL,1795510981.0,0,NULL,'',0,1795510981.0,0.0);
INSERT INTO "jobs" VALUES(7,'00000000-0000-4000-8000-000000000007',1,'example','follows','Queued','uploaded',NULL,NULL,NULL,0,1,NULL,NULL,2,1,1,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,1795510982.0,NULL,NULL,NULL,NULL,NULL,NULL,1,NULL,1795510982.0,0,NULL,'6',1,1795510982.0,0.0);
CREATE TABLE pace (
    service TEXT PRIMARY KEY,
    level REAL NOT NULL,
    runs INTEGER NOT NULL,
    mean_s REAL NOT NULL
) WITHOUT ROWID;
INSERT INTO "pace" VALUES('example',8.31298187383471668017e+04,0,0.0);
CREATE TABLE turns_made (rules TEXT NOT NULL, half_life_s REAL NOT NULL);
INSERT INTO "turns_made" VALUES('[[["example", 5, "share"]], 21600.0, 60.0, []]',21600.0);
CREATE TABLE usage (
    service TEXT NOT NULL,
    user_id INTEGER NOT NULL,
    used REAL NOT NULL,
    runs INTEGER NOT NULL,
    mean_s REAL NOT NULL,
    PRIMARY KEY (service, user_id)
) WITHOUT ROWID;
INSERT INTO "usage" VALUES('example',1,8.31298167700954800281e+04,0,0.0);
INSERT INTO "usage" VALUES('example',2,83131.8266935021,0,0.0);
CREATE TABLE users (user_id INTEGER PRIMARY KEY, weight REAL NOT NULL);
INSERT INTO "users" VALUES(7,2.0);
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
CREATE INDEX contenders_turn ON contenders(service, at_quota, rank, head);
CREATE INDEX usage_user ON usage(user_id);
CREATE INDEX dependencies_of ON dependencies(job_id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',7);
COMMIT;
