"""How a command of `kvmsim` ends: its exit code, and the sentence on standard error.

Only a byte that is not as it was stored is a failure of integrity, and has an exit code of its own. Whatever else ends
a run says nothing of what was stored until then: a file that was truncated, a mount that is full, memfs that is gone.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Final, NoReturn

from memfs.contract.terminal import printable
from memfs.contract.units import PAGE_SIZE

WRONG_BYTE: Final = 3  #: the exit code; 1 is for whatever else went wrong, 2 for wrong usage


class RunEnded(Exception):
    """The guest cannot go on, and no byte was wrong: one sentence."""


class Interrupted(Exception):
    """A signal has ended the run, of which the results have been printed."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.number: Final = number


def sentence_of(error: Exception) -> str:
    """Return what is wrong, with the file if one is known, and what to do about a mount that is full."""
    if not isinstance(error, OSError):
        return printable(error)
    where = f"{printable(error.filename)}: " if error.filename else ""
    return f"{where}{printable(error.strerror or error)}{_more_space(error)}"


def _more_space(error: OSError) -> str:
    if error.errno != errno.ENOSPC or not error.filename:
        return ""
    try:
        is_huge = os.stat(error.filename).st_blksize > PAGE_SIZE
    except OSError:  # it is gone meanwhile
        is_huge = False
    if is_huge:
        return "; raise size= (memfs remount), or the pool of huge pages (hugetlbfs: nr_hugepages), or use less --mem"
    return "; raise size= (memfs remount), or use less --mem"


def end_by_signal(number: int) -> NoReturn:
    """End as a signal has it: SIGINT with exit code 130, SIGTERM by the signal itself, which a shell calls 143."""
    sys.stdout.flush()
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(128 + number)
