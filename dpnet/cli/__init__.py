"""The command `dpnet`."""
