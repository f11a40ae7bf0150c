-- The generation of each store that the records are of: another one in the store means that they are not what it has.
CREATE TABLE store_generations (
    store      TEXT PRIMARY KEY,
    generation TEXT NOT NULL
) STRICT;

-- Nobody removes it: the store says so, too.
ALTER TABLE backups ADD COLUMN protected INTEGER NOT NULL DEFAULT 0;
