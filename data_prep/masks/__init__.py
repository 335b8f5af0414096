"""Stage 2: mask recipes to mask shards."""
