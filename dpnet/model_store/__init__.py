"""Find a trained generator on storage and read its weights."""
