-- The mark of each store. A directory with another mark, or none, is not that store.
CREATE TABLE store_marks (
    store TEXT PRIMARY KEY,
    mark  TEXT NOT NULL
) STRICT;
