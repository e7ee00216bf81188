"""Descriptors 0 to 2, of which everything takes for granted that they are standard input, output and error."""

from __future__ import annotations

import os
import sys


def fill_standard_descriptors() -> None:
    """Open /dev/null as those of the descriptors 0 to 2 that we were started without.

    Without, the next that is opened would be one of them: /dev/fuse or a file of somebody's, to which we then print.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:  # Python found it closed
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115
