-- A user is a uid together with a name, because the uid may later belong to another user. Records of the domains that
-- users registered store both. This index has the expression DOMAIN_KEY of the code.
DROP INDEX backups_by_domain;
CREATE INDEX backups_by_domain ON backups (
    store,
    iif(domain_source = 'configured', '', domain_owner || ':' || domain_owner_name || ':')
        || coalesce(':' || domain_uuid, domain_name)
);

-- The name of the checkpoint's owner. For older checkpoints it is derived if the other records name exactly one user
-- with that uid. Otherwise it is '', and the checkpoint belongs to no user.
ALTER TABLE checkpoints ADD COLUMN owner_name TEXT NOT NULL DEFAULT '';
UPDATE checkpoints SET owner_name = coalesce(
    iif(owner = 0, 'root', (SELECT iif(count(*) = 1, min(name), '') FROM (
        SELECT domain_owner_name AS name FROM jobs WHERE domain_source = 'registered' AND domain_owner = checkpoints.owner
        UNION
        SELECT domain_owner_name FROM backups WHERE domain_source = 'registered' AND domain_owner = checkpoints.owner))),
    '');
UPDATE checkpoints SET domain = owner || ':' || owner_name || substr(domain, length(owner) + 1)
    WHERE substr(domain, 1, length(owner) + 1) = owner || ':';
DROP INDEX checkpoints_by_owner;
CREATE INDEX checkpoints_by_owner ON checkpoints (owner, owner_name);
