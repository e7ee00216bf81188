"""All inodes by number. Those from before are built when somebody asks for them.

There may be very many, and a successor of a process that has died is waited for. So what was written down of an
ordinary file (records.py) stays in the log until the file is looked up, and takes no memory of the daemon's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from memfs.tree.inode import Ino, Inode


def _nobody(ino: Ino) -> Inode:
    raise KeyError(ino)


class Inodes(dict[Ino, Inode]):
    """Inodes by number. As a dict it is of those that are built, but that what is asked for by [] is built."""

    def __init__(self) -> None:
        super().__init__()
        self._unbuilt: dict[Ino, None] = {}
        self._build: Callable[[Ino], Inode] = _nobody

    def add_unbuilt(self, inos: dict[Ino, None], build: Callable[[Ino], Inode]) -> None:
        """Have some more, which `build` makes when they are asked for."""
        self._unbuilt, self._build = inos, build

    def __missing__(self, ino: Ino) -> Inode:
        if ino not in self._unbuilt:
            raise KeyError(ino)
        self[ino] = inode = self._build(ino)
        del self._unbuilt[ino]
        return inode

    def find(self, ino: int) -> Inode | None:
        """Return one of them, built or not; None if there is none of that number."""
        try:
            return self[Ino(ino)]
        except KeyError:
            return None

    @property
    def count(self) -> int:
        """How many there are, built or not."""
        return len(self) + len(self._unbuilt)

    @property
    def numbers(self) -> Iterable[Ino]:
        """The numbers of all, built or not."""
        return chain(self, self._unbuilt)

    def all(self) -> Iterator[Inode]:
        """Generate all of them, and build what is not built when it comes to that."""
        yield from list(self.values())
        while self._unbuilt:
            yield self[next(iter(self._unbuilt))]

    def clear(self) -> None:
        """Forget all."""
        self._unbuilt = {}
        super().clear()
