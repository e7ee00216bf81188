"""`python -m memfs`."""

from memfs.cli import main

main()
