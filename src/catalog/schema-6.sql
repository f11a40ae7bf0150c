-- The plan of a job that writes to a store names the domain's directory there.
UPDATE jobs SET plan = json_set(plan, '$.destination.Store.directory', coalesce(
        (SELECT backups.domain FROM backups
            WHERE backups.id = jobs.backup_id AND backups.store = jobs.plan ->> '$.destination.Store.name'),
        iif(domain_source = 'configured', domain_name, domain_owner || ':' || domain_name)))
    WHERE json_valid(plan) AND json_type(plan, '$.destination.Store') = 'object';
