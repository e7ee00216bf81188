"""How many pages owners have allocated by themselves, where no kernel keeps a limit and the account must know.

An owner's descriptor of a backing file cannot be taken back, so a file that ever had an owner is looked at until it is
freed, and there may be very many. So nobody looks at all of them: each time that it is asked how much is in use, the
next few are counted, and the sum is of what each had when it was counted last. While there are few files that is exact.

Rejected: to forget a file when it is unregistered (its owner may have kept the descriptor, and allocate later); to
count all (each write of anybody would pay for what any user has ever registered).
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import Final, Protocol

_AT_ONCE: Final = 8  # files, each of which takes a system call


class Watched(Protocol):
    """A tracked file of which somebody else has a descriptor."""

    @property
    def stray_pages(self) -> int:
        """How many pages it has more than were reserved."""


class Strays:
    """The files that owners may allocate pages of, and a sum."""

    def __init__(self) -> None:
        self._counted: Final[OrderedDict[Watched, int]] = OrderedDict()  # the one to be counted next comes first
        self.pages = 0  #: that owners have allocated by themselves, as last counted

    def watch(self, file: Watched) -> None:
        """Have a file counted, now and later."""
        self._count(file)

    def unwatch(self, file: Watched) -> None:
        """Do not count it any more."""
        self.pages -= self._counted.pop(file, 0)

    def count(self) -> int:
        """Count the next few files, and return the sum."""
        for file in list(islice(self._counted, _AT_ONCE)):
            self._count(file)
        return self.pages

    def _count(self, file: Watched) -> None:
        pages = file.stray_pages
        self.pages += pages - self._counted.pop(file, 0)
        self._counted[file] = pages
