"""The options of each command; the standard library only, so that `--help` answers at once."""
