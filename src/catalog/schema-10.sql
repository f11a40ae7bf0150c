-- The generation of each store that the records describe. If the store has another one, its content differs from them.
CREATE TABLE store_generations (
    store      TEXT PRIMARY KEY,
    generation TEXT NOT NULL
) STRICT;

-- The backup must not be removed. The store has the same mark.
ALTER TABLE backups ADD COLUMN protected INTEGER NOT NULL DEFAULT 0;
