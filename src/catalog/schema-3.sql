-- How long the guest's file systems were frozen for the instant, in µs; 0 where they were not, or it is not known.
ALTER TABLE jobs ADD COLUMN frozen INTEGER NOT NULL DEFAULT 0;
