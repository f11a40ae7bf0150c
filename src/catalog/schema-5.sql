-- Checkpoints that were made without a backup. Those of backups are in the backups' manifests.
CREATE TABLE checkpoints (
    -- The name that no other domain has at the same time.
    domain      TEXT    NOT NULL,
    id          TEXT    NOT NULL,
    owner       INTEGER NOT NULL,
    name        TEXT,
    description TEXT,
    -- What is written from then on is recorded.
    time        INTEGER NOT NULL,
    -- making, made, or deleted: its bitmaps are to go from disks that come back.
    state       TEXT    NOT NULL,
    PRIMARY KEY (domain, id)
) STRICT;

CREATE INDEX checkpoints_by_id ON checkpoints (id);
CREATE INDEX checkpoints_by_owner ON checkpoints (owner);
