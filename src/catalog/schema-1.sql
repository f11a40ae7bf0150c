-- Times are in µs since 1970. Words are those of the D-Bus interface where it has them.

CREATE TABLE jobs (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    -- The backup's name in a store, in file names and in QEMU; never reused.
    backup_id         TEXT    NOT NULL UNIQUE,
    domain_name       TEXT    NOT NULL,
    domain_source     TEXT    NOT NULL,
    domain_owner      INTEGER NOT NULL,
    domain_owner_name TEXT    NOT NULL,
    domain_uuid       TEXT,
    started_by        INTEGER NOT NULL,
    start_time        INTEGER NOT NULL,
    -- The plan, as JSON.
    plan              TEXT    NOT NULL,
    -- Bytes a second for all disks together; 0 is unlimited.
    speed             INTEGER NOT NULL,
    -- The state: preparing, writing, starting, running, judged, closed, ended.
    step              TEXT    NOT NULL,
    cancel_requested  INTEGER NOT NULL DEFAULT 0,
    -- The guest's power-off is delayed until the end.
    holds_poweroff    INTEGER NOT NULL DEFAULT 0,
    -- From 'writing' on: the identities of the target files, as JSON.
    files             TEXT,
    -- From 'starting' on: the point in time of the images, and whether the guest was frozen then.
    instant           INTEGER,
    quiesced          INTEGER,
    -- From 'judged' on: the outcome in QEMU, as JSON.
    verdict           TEXT,
    -- From 'ended' on.
    end_time          INTEGER,
    result            TEXT,
    error             TEXT,
    disks             TEXT,
    -- The job may have residue in its QEMU, or at its targets.
    left_in_qemu      INTEGER NOT NULL DEFAULT 1,
    left_on_disk      INTEGER NOT NULL DEFAULT 1,
    -- The job was imported from a store. Its starter and domain are as the store records, and grant no rights.
    imported          INTEGER NOT NULL DEFAULT 0
) STRICT;

-- The few jobs that a restart has to recover.
CREATE INDEX unsettled_jobs ON jobs (id) WHERE step <> 'ended' OR left_in_qemu OR left_on_disk;

-- All columns of the list, so that rows with their plans need not be read.
CREATE INDEX ended_jobs ON jobs (
    id, result, started_by, imported, domain_name, domain_source, domain_owner, domain_owner_name, domain_uuid
) WHERE step = 'ended';

-- The oldest jobs are deleted first.
CREATE INDEX ended_jobs_by_time ON jobs (end_time, id) WHERE step = 'ended';

CREATE TABLE backups (
    store    TEXT NOT NULL,
    -- The directory's name in the store.
    domain   TEXT NOT NULL,
    id       TEXT NOT NULL,
    manifest TEXT NOT NULL,
    PRIMARY KEY (store, domain, id)
) STRICT;
