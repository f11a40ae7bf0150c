-- The mark of each store: a directory that has another one, or none, is not that store.
CREATE TABLE store_marks (
    store TEXT PRIMARY KEY,
    mark  TEXT NOT NULL
) STRICT;
