"""Stage 1: raw photos to image shards."""
