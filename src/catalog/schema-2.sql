-- What lists and decisions need of a backup beside its manifest, which stays the truth for all else.

ALTER TABLE backups RENAME TO former_backups;

CREATE TABLE backups (
    store             TEXT    NOT NULL,
    -- The directory's name in the store.
    domain            TEXT    NOT NULL,
    id                TEXT    NOT NULL,
    -- Names the backup's object. Random: it tells nobody how many there are.
    object            INTEGER NOT NULL UNIQUE,
    -- Whose it is, as of its job; of one that was found in a store, as far as that gives nobody a right.
    domain_name       TEXT    NOT NULL,
    domain_source     TEXT    NOT NULL,
    domain_owner      INTEGER NOT NULL,
    domain_owner_name TEXT    NOT NULL,
    domain_uuid       TEXT,
    -- The backups that it lies on, a line each.
    parents           TEXT    NOT NULL,
    -- What the last look at its files found: '', 'missing' or 'damaged'; and in words.
    look_state        TEXT    NOT NULL DEFAULT '',
    look_problem      TEXT    NOT NULL DEFAULT '',
    -- What a check of its content found, in words; '' is nothing.
    damage            TEXT    NOT NULL DEFAULT '',
    -- Why it is of no use though nothing is wrong with itself: what is wrong with those that it lies on.
    broken            TEXT    NOT NULL DEFAULT '',
    -- It is to go, and may have gone in part.
    removing          INTEGER NOT NULL DEFAULT 0,
    -- Last, so that the others can be read without it.
    manifest          TEXT    NOT NULL,
    PRIMARY KEY (store, domain, id)
) STRICT;

CREATE INDEX backups_by_id ON backups (id);

INSERT INTO backups (store, domain, id, object, domain_name, domain_source, domain_owner, domain_owner_name, domain_uuid,
        parents, manifest)
    SELECT former.store, former.domain, former.id, random(),
        coalesce(jobs.domain_name, former.manifest ->> '$.domain.name', former.domain),
        coalesce(jobs.domain_source, iif(former.domain = former.manifest ->> '$.domain.name', 'configured', 'registered')),
        -- Of a registered domain nothing else tells the owner: it is nobody's here.
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
