-- The backup's manifest after a merge in progress. '' while the new images are being created and while the old images
-- still exist; NULL without a merge.
ALTER TABLE backups ADD COLUMN merging TEXT;
