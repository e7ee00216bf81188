"""Which users hold which regular files, by an open handle or a registration, and what that takes of the daemon's.

A held file takes a descriptor. One that is tracked, or may become so while it is held (a handle that cannot be mapped
does not keep it from being guest-sealed), may take a page map as well, which is two more and address space. A user is
charged for each file that it holds, once; a file that two users hold is charged to both, so that none of them pays
when the other lets go. How much a user may have, store/shares.py says.

Where a file takes a descriptor as long as it exists (memfds), half of the descriptors are for that (memfd_backing.py).
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Hashable
from typing import Final

from memfs.contract.page_map import MOST_MAPS
from memfs.store.shares import Pool

log = logging.getLogger(__name__)

_OWN: Final = 64  # descriptors that the daemon needs for itself, and for what takes a moment
_OF_MAP: Final = 2  # descriptors


class Holdings:
    """The holdings of a mount, and what they are of."""

    def __init__(self, descriptors: Pool, page_maps: Pool) -> None:
        self.descriptors: Final = descriptors
        self.page_maps: Final = page_maps
        self._held: Final[dict[tuple[Hashable, int], list[int]]] = {}  # how often, and how many page maps

    @classmethod
    def of_process(cls, files_take: int = 0) -> Holdings:
        """Return those of what this process may have, of which files may take so many descriptors that nobody holds."""
        trusted = frozenset({0, os.geteuid()})
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        in_use = len(os.listdir("/proc/self/fd")) + _OWN
        descriptors = Pool("descriptors", max(0, limit - files_take - in_use), trusted)
        return cls(descriptors, Pool("page maps", MOST_MAPS, trusted))

    def hold(self, user: Hashable, ino: int, *, maps: bool) -> None:
        """Charge a user that holds a file. `maps`: it may take a page map. Raises OSError(EMFILE), changing nothing."""
        held = self._held.get((user, ino))
        if held is not None and maps <= held[1]:
            held[0] += 1
            return
        try:
            self.descriptors.check(user)
            if maps:
                self.page_maps.check(user)
        except OSError as error:
            log.warning("a file is not opened: %s", error.strerror)
            raise
        self.take(user, ino, maps=maps)

    def take(self, user: Hashable, ino: int, *, maps: bool) -> None:
        """Charge a user for what it has been granted: it stays so, whatever others have by now."""
        held = self._held.get((user, ino))
        if held is None:
            held = self._held[user, ino] = [0, 0]
            self.descriptors.take(user)
        if maps > held[1]:
            held[1] = 1
            self.descriptors.take(user, _OF_MAP)
            self.page_maps.take(user)
        held[0] += 1

    def release(self, user: Hashable, ino: int) -> None:
        """Undo one `hold`."""
        held = self._held[user, ino]
        held[0] -= 1
        if not held[0]:
            del self._held[user, ino]
            self.descriptors.give_back(user, 1 + _OF_MAP * held[1])
            if held[1]:
                self.page_maps.give_back(user)

    def check(self) -> None:
        """Raise AssertionError on the first broken invariant."""
        maps = sum(maps for _, maps in self._held.values())
        assert self.page_maps.used == maps, f"{maps} page maps held, {self.page_maps.used} counted"
        files = len(self._held) + _OF_MAP * maps
        assert self.descriptors.used >= files, f"{files} descriptors held, {self.descriptors.used} counted"
