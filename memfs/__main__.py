"""`python -m memfs`."""

from memfs.cli.main import main

main()
