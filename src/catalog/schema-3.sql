-- How long the guest's file systems were frozen, in µs; 0 if they were not, or if it is unknown.
ALTER TABLE jobs ADD COLUMN frozen INTEGER NOT NULL DEFAULT 0;
