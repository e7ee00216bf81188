"""Shares of what there is only so much of: descriptors, page maps, what is remembered of the page cache.

A fixed quota for each user would either waste most of it, or let a few users take all. So a user may take more for as
long as it has less than is left for everybody else: alone, it gets to half; a second one gets to half of the rest, and
so on, so that there is always something left, however much others would like to have. A small rest is left to root
and to the user that the daemon runs as, to whom no share applies: they could end the daemon anyway.

The error is EMFILE, which inotify(7) and others have for what is limited by user: to close some of one's own helps.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable
from typing import Final

_REST: Final = 32  # of how much one is left


class Pool:
    """So many of a kind, `what` they are, and who has how many. `trusted` users have no limit but the size."""

    def __init__(self, what: str, size: int, trusted: frozenset[int] = frozenset()) -> None:
        self.what: Final = what
        self.size: Final = size
        self.used = 0  #: by all
        self._trusted: Final = trusted
        self._users: Final[dict[Hashable, int]] = {}  # how many each has, if any

    @property
    def left(self) -> int:
        """How many nobody has."""
        return max(0, self.size - self.used)

    def of(self, user: Hashable) -> int:
        """Return how many a user has."""
        return self._users.get(user, 0)

    def room(self, user: Hashable) -> int:
        """Return how many more a user may take, one after the other."""
        if user in self._trusted:
            return self.left
        return max(0, (self.left - self.size // _REST - self.of(user) + 1) // 2)

    def check(self, user: Hashable) -> None:
        """Raise OSError(EMFILE) if a user has its share, unless it is `trusted`."""
        if user not in self._trusted and not self.room(user):
            said = f"user {user} has {self.of(user)} {self.what}, and {self.left} are left for all"
            raise OSError(errno.EMFILE, said)

    def take(self, user: Hashable, count: int = 1) -> None:
        """Count what a user has taken."""
        self.used += count
        self._users[user] = self._users.get(user, 0) + count

    def give_back(self, user: Hashable, count: int = 1) -> None:
        """Undo `take`."""
        self.used -= count
        left = self._users.get(user, 0) - count
        assert left >= 0, f"user {user} gives back {count} {self.what} too many"
        if left:
            self._users[user] = left
        else:
            del self._users[user]
