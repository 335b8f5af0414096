"""Write, read and check tar shards and their indexes."""
