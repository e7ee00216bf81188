"""The command line of memfs."""
