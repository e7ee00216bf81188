"""The names of files whose inode numbers are known, as far as who asks may see them.

The state of a mount has numbers: an inode has many names, or none. So directories are read, a bounded number of entries
with each look, until all that is wanted has a name; and again after a while, if something has none. Directories are
held open only while they are read, links are not followed, and what is mounted on the mount is not entered.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Set
from time import monotonic
from typing import Final

from memfs.contract.on_memfs import locate

_MOST_ENTRIES: Final = 512  # of a look, or those of one directory
_MOST_OF_ONE: Final = 10_000  # entries of a directory
_AGAIN: Final = 5.0  # seconds, before all is read again


class Names:
    """The names on one mount."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint: Final = mountpoint
        self._paths: Final[dict[int, str]] = {}
        self._left: Final[deque[str]] = deque()
        self._next_walk = 0.0

    def look(self, wanted: Set[int]) -> dict[int, str]:
        """Return paths of inodes, as far as they are known by now. Blocking. Raises OSError."""
        for ino in self._paths.keys() - wanted:
            del self._paths[ino]
        missing = wanted - self._paths.keys()
        if missing and not self._left and monotonic() >= self._next_walk:
            self._left.append(self._mountpoint)
            self._next_walk = monotonic() + _AGAIN
        entries = 0
        while missing and self._left and entries < _MOST_ENTRIES:
            entries += self._read(self._left.popleft(), missing)
        if not missing:
            self._left.clear()
        return dict(self._paths)

    def _read(self, directory: str, missing: set[int]) -> int:
        """Read a directory, and return how many entries it has, or were looked at."""
        count = 1
        try:
            with locate(directory, last_link=directory == self._mountpoint) as found:
                fd = os.open(f"/proc/self/fd/{found.fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # not ours to read, or gone
            return count
        try:
            with os.scandir(fd) as listing:
                for count, entry in enumerate(listing, 1):
                    path = os.path.join(directory, entry.name)
                    if entry.inode() in missing:
                        self._paths[entry.inode()] = path
                        missing.discard(entry.inode())
                    if count >= _MOST_OF_ONE or not missing:
                        break
                    if entry.is_dir(follow_symlinks=False) and not os.path.ismount(path):
                        self._left.append(path)
        except OSError:
            pass
        finally:
            os.close(fd)
        return count
