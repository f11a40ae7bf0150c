-- What the manifest of a backup will be when its new images are in place; '' while these are being made, and while those of
-- before are still there; nothing of one that stays as it is.
ALTER TABLE backups ADD COLUMN merging TEXT;
