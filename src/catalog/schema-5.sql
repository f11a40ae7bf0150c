-- Checkpoints without a backup. Those of backups are in the backups' manifests.
CREATE TABLE checkpoints (
    -- The domain's unique name.
    domain      TEXT    NOT NULL,
    id          TEXT    NOT NULL,
    owner       INTEGER NOT NULL,
    name        TEXT,
    description TEXT,
    -- The point in time from which changes are recorded.
    time        INTEGER NOT NULL,
    -- making, made, or deleted. The bitmaps of deleted ones are removed from disks that reappear.
    state       TEXT    NOT NULL,
    PRIMARY KEY (domain, id)
) STRICT;

CREATE INDEX checkpoints_by_id ON checkpoints (id);
CREATE INDEX checkpoints_by_owner ON checkpoints (owner);
