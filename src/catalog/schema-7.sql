-- One versioned JSON value holds the state, instead of a column for each part of it. `step` repeats its first word for
-- conditions. Jobs that have not ended are recovered as if the host had restarted, because old records do not name
-- their boot.
ALTER TABLE jobs ADD COLUMN state TEXT NOT NULL DEFAULT '';

UPDATE jobs SET state = json_object('version', 1, 'boot', '00000000-0000-0000-0000-000000000000', 'state',
    CASE step
        WHEN 'ended' THEN json_object('ended', json_object('undone', NULL, 'files', json(files),
            'holds-poweroff', json(iif(holds_poweroff, 'true', 'false')), 'frozen-us', frozen))
        WHEN 'preparing' THEN 'preparing'
        WHEN 'writing' THEN json_object('writing', json_object('files', json(coalesce(files, '[]'))))
        ELSE json_object('starting', json_object('files', json(coalesce(files, '[]')), 'not_before', '1970-01-01T00:00:00Z',
            'holds_poweroff', json(iif(holds_poweroff, 'true', 'false'))))
    END);
UPDATE jobs SET step = 'starting' WHERE step IN ('running', 'judged', 'closed');

ALTER TABLE jobs DROP COLUMN files;
ALTER TABLE jobs DROP COLUMN instant;
ALTER TABLE jobs DROP COLUMN quiesced;
ALTER TABLE jobs DROP COLUMN verdict;
ALTER TABLE jobs DROP COLUMN holds_poweroff;
ALTER TABLE jobs DROP COLUMN frozen;
