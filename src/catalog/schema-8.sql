-- The id of this service in its manifests: a UUID of version 4, created once.
CREATE TABLE service (id TEXT NOT NULL) STRICT;
INSERT INTO service (id) SELECT lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2)
    || '-' || substr('89ab', 1 + (random() & 3), 1) || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)));

-- The sequence number in a domain's directory; 0 if the manifest has none. Backups with 0 come first, sorted by id.
ALTER TABLE backups ADD COLUMN sequence INTEGER NOT NULL DEFAULT 0;
-- Keep rules apply to the backup although another or an unknown service created it.
ALTER TABLE backups ADD COLUMN adopted INTEGER NOT NULL DEFAULT 0;
-- So far the rules applied to all backups, and no manifest names a service yet.
UPDATE backups SET adopted = 1;

CREATE INDEX backups_by_making ON backups (store, domain, sequence, id);
-- By domain, independently of its name. See DOMAIN_KEY in the code.
CREATE INDEX backups_by_domain ON backups (
    store, iif(domain_source = 'configured', '', domain_owner || ':') || coalesce(':' || domain_uuid, domain_name)
);

UPDATE jobs SET plan = json_set(plan, '$.destination.Store.sequence', 0,
        '$.destination.Store.service', (SELECT id FROM service))
    WHERE json_valid(plan) AND json_type(plan, '$.destination.Store') = 'object';

-- A checkpoint belongs to the domain independently of its name.
UPDATE checkpoints SET domain = coalesce(
    (SELECT iif(domain_source = 'configured', '', domain_owner || ':') || ':' || domain_uuid FROM jobs
        WHERE iif(domain_source = 'configured', domain_name, domain_owner || ':' || domain_name) = checkpoints.domain
            AND domain_uuid IS NOT NULL
        ORDER BY id DESC LIMIT 1),
    domain);
