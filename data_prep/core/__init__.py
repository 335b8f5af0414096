"""Hold what every package uses: errors, digests, progress, lease, stage, pool, storage."""
