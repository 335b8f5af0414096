"""Turn shards into batches."""
