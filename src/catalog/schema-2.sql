-- Columns for lists and decisions. The manifest is authoritative for everything else.

ALTER TABLE backups RENAME TO former_backups;

CREATE TABLE backups (
    store             TEXT    NOT NULL,
    -- The directory's name in the store.
    domain            TEXT    NOT NULL,
    id                TEXT    NOT NULL,
    -- The number in the backup's D-Bus object path. Random, so that it does not reveal how many backups there are.
    object            INTEGER NOT NULL UNIQUE,
    -- The domain, as its job recorded it. For an imported backup, only as far as that grants no rights.
    domain_name       TEXT    NOT NULL,
    domain_source     TEXT    NOT NULL,
    domain_owner      INTEGER NOT NULL,
    domain_owner_name TEXT    NOT NULL,
    domain_uuid       TEXT,
    -- The direct bases, one a line.
    parents           TEXT    NOT NULL,
    -- The result of the last check of its files: '', 'missing' or 'damaged'; and the text.
    look_state        TEXT    NOT NULL DEFAULT '',
    look_problem      TEXT    NOT NULL DEFAULT '',
    -- The text of the damage that a check of the content found; '' is none.
    damage            TEXT    NOT NULL DEFAULT '',
    -- The text of the faults of its bases; '' is none.
    broken            TEXT    NOT NULL DEFAULT '',
    -- The removal has begun, and may be partial.
    removing          INTEGER NOT NULL DEFAULT 0,
    -- The last column, so that SQLite can read the others without it.
    manifest          TEXT    NOT NULL,
    PRIMARY KEY (store, domain, id)
) STRICT;

CREATE INDEX backups_by_id ON backups (id);

INSERT INTO backups (store, domain, id, object, domain_name, domain_source, domain_owner, domain_owner_name, domain_uuid,
        parents, manifest)
    SELECT former.store, former.domain, former.id, random(),
        coalesce(jobs.domain_name, former.manifest ->> '$.domain.name', former.domain),
        coalesce(jobs.domain_source, iif(former.domain = former.manifest ->> '$.domain.name', 'configured', 'registered')),
        -- No other record has the owner of a registered domain, so the backup belongs to no user.
        coalesce(jobs.domain_owner, iif(former.domain = former.manifest ->> '$.domain.name', 0, 4294967295)),
        coalesce(jobs.domain_owner_name, iif(former.domain = former.manifest ->> '$.domain.name', 'root', '4294967295')),
        coalesce(jobs.domain_uuid, former.manifest ->> '$.domain.uuid'),
        coalesce(
            (SELECT group_concat(parent, char(10)) FROM
                (SELECT DISTINCT disk.value ->> '$.parent.backup' AS parent FROM json_each(former.manifest, '$.disks') AS disk)
                WHERE parent IS NOT NULL),
            ''),
        former.manifest
    FROM former_backups AS former LEFT JOIN jobs ON jobs.backup_id = former.id
    WHERE json_valid(former.manifest);

DROP TABLE former_backups;
