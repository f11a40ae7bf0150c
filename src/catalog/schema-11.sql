-- The name of the user who started the job, because a uid may later belong to another user. '' if the user has no
-- lasting name, and in older records.
ALTER TABLE jobs ADD COLUMN started_by_name TEXT NOT NULL DEFAULT '';
-- Size of an ended job in the history.
ALTER TABLE jobs ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET bytes = length(CAST(plan AS BLOB)) + length(CAST(state AS BLOB))
    + coalesce(length(CAST(disks AS BLOB)), 0) + coalesce(length(CAST(error AS BLOB)), 0) WHERE step = 'ended';

-- Each user has a separate history with its own limit. Jobs imported from stores belong to no user.
CREATE INDEX ended_jobs_by_user ON jobs (imported, started_by, end_time, id, bytes, left_in_qemu, left_on_disk, domain_source)
    WHERE step = 'ended';
