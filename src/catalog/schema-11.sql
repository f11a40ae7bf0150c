-- The name of the user who started a job, because a number is given to another user sooner or later; '' where it has none
-- that lasts, and in records of before.
ALTER TABLE jobs ADD COLUMN started_by_name TEXT NOT NULL DEFAULT '';
-- How much of the history an ended job takes.
ALTER TABLE jobs ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET bytes = length(CAST(plan AS BLOB)) + length(CAST(state AS BLOB))
    + coalesce(length(CAST(disks AS BLOB)), 0) + coalesce(length(CAST(error AS BLOB)), 0) WHERE step = 'ended';

-- The history is each user's own, and so is its limit. What was found in stores is no user's.
CREATE INDEX ended_jobs_by_user ON jobs (imported, started_by, end_time, id, bytes, left_in_qemu, left_on_disk, domain_source)
    WHERE step = 'ended';
