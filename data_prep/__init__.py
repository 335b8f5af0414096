"""Turn photos and mask recipes into verified shards."""
