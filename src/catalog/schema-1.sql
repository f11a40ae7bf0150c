-- Times are in µs since 1970. Words are those of the interface where it has them.

CREATE TABLE jobs (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    -- The backup's name in a store, in file names and in QEMU; never another's.
    backup_id         TEXT    NOT NULL UNIQUE,
    domain_name       TEXT    NOT NULL,
    domain_source     TEXT    NOT NULL,
    domain_owner      INTEGER NOT NULL,
    domain_owner_name TEXT    NOT NULL,
    domain_uuid       TEXT,
    started_by        INTEGER NOT NULL,
    start_time        INTEGER NOT NULL,
    -- What is done, as JSON.
    plan              TEXT    NOT NULL,
    -- Bytes a second, all disks together; 0 is unlimited.
    speed             INTEGER NOT NULL,
    -- How far it is: preparing, writing, starting, running, judged, closed, ended.
    step              TEXT    NOT NULL,
    cancel_requested  INTEGER NOT NULL DEFAULT 0,
    -- The guest's power-off is held back until the end.
    holds_poweroff    INTEGER NOT NULL DEFAULT 0,
    -- From 'writing' on: which files the targets are, as JSON.
    files             TEXT,
    -- From 'starting' on: the instant that the images show, and whether the guest was frozen at it.
    instant           INTEGER,
    quiesced          INTEGER,
    -- From 'judged' on: what became of it in QEMU, as JSON.
    verdict           TEXT,
    -- From 'ended' on.
    end_time          INTEGER,
    result            TEXT,
    error             TEXT,
    disks             TEXT,
    -- Something of it may still be in its QEMU, or at its places.
    left_in_qemu      INTEGER NOT NULL DEFAULT 1,
    left_on_disk      INTEGER NOT NULL DEFAULT 1,
    -- It was found in a store. Who started it and whose domain it was is as the store says, and gives nobody a right.
    imported          INTEGER NOT NULL DEFAULT 0
) STRICT;

-- The few that a restart has work with.
CREATE INDEX unsettled_jobs ON jobs (id) WHERE step <> 'ended' OR left_in_qemu OR left_on_disk;

-- All that a list tells, so that rows with their plans need not be read.
CREATE INDEX ended_jobs ON jobs (
    id, result, started_by, imported, domain_name, domain_source, domain_owner, domain_owner_name, domain_uuid
) WHERE step = 'ended';

-- The oldest are forgotten first.
CREATE INDEX ended_jobs_by_time ON jobs (end_time, id) WHERE step = 'ended';

CREATE TABLE backups (
    store    TEXT NOT NULL,
    -- The directory's name in the store.
    domain   TEXT NOT NULL,
    id       TEXT NOT NULL,
    manifest TEXT NOT NULL,
    PRIMARY KEY (store, domain, id)
) STRICT;
