"""The work of each command: its result as JSON values, and the same as text."""
