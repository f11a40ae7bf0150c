-- What the manifest of a backup will be when its new images are in place; nothing of one that stays as it is.
ALTER TABLE backups ADD COLUMN merging TEXT;
