"""The entries of a directory in the order of their cookies: a reader goes on anywhere, without a list of its own.

A cookie only grows, so entries come in at the end. They lie in blocks of bounded length: to enter, to remove and to
find one costs a search and the moving of at most one block, however large the directory is. Linux's directories in
memory are ordered by cookies as well (fs/libfs.c: simple_offset), in a maple tree.

Rejected: a snapshot for each open directory (8 bytes a name, for as many descriptors as somebody likes); the order of
the dict of names (it cannot be entered in the middle).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Final, Generic, Protocol, TypeVar

_BLOCK: Final = 512  # entries; to move them takes less than to find one


class HasCookie(Protocol):
    """An entry."""

    @property
    def cookie(self) -> int:
        """Its place in the order."""


_Entry = TypeVar("_Entry", bound=HasCookie)


def _cookie(entry: HasCookie) -> int:
    return entry.cookie


def _first_cookie(block: list[_Entry]) -> int:
    return block[0].cookie


class CookieOrder(Generic[_Entry]):
    """Entries by ascending cookies."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: Final[list[list[_Entry]]] = []  # none is empty

    def append(self, entry: _Entry) -> None:
        """Enter an entry whose cookie is the largest."""
        if not self._blocks or len(self._blocks[-1]) >= _BLOCK:
            self._blocks.append([])
        self._blocks[-1].append(entry)

    def extend(self, entries: Sequence[_Entry]) -> None:
        """Enter entries, in their order, where there are none."""
        assert not self._blocks
        self._blocks.extend(list(entries[first : first + _BLOCK]) for first in range(0, len(entries), _BLOCK))

    def remove(self, entry: _Entry) -> None:
        """Remove an entry that is there."""
        number = bisect.bisect_right(self._blocks, entry.cookie, key=_first_cookie) - 1
        block = self._blocks[number]
        place = bisect.bisect_left(block, entry.cookie, key=_cookie)
        assert block[place] is entry, "an entry is not where its cookie says"
        del block[place]
        if not block:
            del self._blocks[number]

    def below(self, cookie: int) -> Iterator[_Entry]:
        """Generate the entries with smaller cookies, the newest first. Nothing may be changed meanwhile."""
        number = bisect.bisect_left(self._blocks, cookie, key=_first_cookie) - 1
        if number < 0:
            return
        last = self._blocks[number]
        yield from reversed(last[: bisect.bisect_left(last, cookie, key=_cookie)])
        for earlier in range(number - 1, -1, -1):
            yield from reversed(self._blocks[earlier])

    def newest_first(self) -> Iterator[_Entry]:
        """Generate all entries, the newest first. Nothing may be changed meanwhile."""
        for block in reversed(self._blocks):
            yield from reversed(block)
