"""How much memory has changed sides: what `memfs metrics` counts, whether or not an owner was notified of it.

Memory is converted in one operation on two files, or by fallocate(2) and a punch of the guest-sealed one alone. In
either case the page map of that file shows it, so a conversion is a call after which the map has more pages, or fewer.
What is freed since the file ends or becomes smaller is none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol

#: Does as `Converted.during` of a file that is not guest-sealed
NO_CONVERSION: Final[AbstractContextManager[None]] = nullcontext()


class Counts(Protocol):
    """An account of a guest-sealed file."""

    pages: int  #: how many it has


class Converted:
    """The conversions of one backing, by direction, and the pages of all of them."""

    __slots__ = ("private", "private_pages", "shared", "shared_pages")

    def __init__(self) -> None:
        self.private = self.shared = 0  #: calls by which pages became private, and shared
        self.private_pages = self.shared_pages = 0

    def during(self, accounting: Counts) -> AbstractContextManager[None]:
        """Count what changes sides of a guest-sealed file within a with statement, also if it raises."""
        return _Counting(self, accounting)

    def add(self, pages: int) -> None:
        """Count a call that has made pages private, or, if it is negative, shared."""
        if pages > 0:
            self.private += 1
            self.private_pages += pages
        elif pages:
            self.shared += 1
            self.shared_pages -= pages

    def describe(self) -> dict[str, Any]:
        """Return it for `memfs stat`."""
        return {
            "private": {"count": self.private, "pages": self.private_pages},
            "shared": {"count": self.shared, "pages": self.shared_pages},
        }


class _Counting(AbstractContextManager[None]):
    __slots__ = ("_accounting", "_before", "_converted")

    def __init__(self, converted: Converted, accounting: Counts) -> None:
        self._converted: Final = converted
        self._accounting: Final = accounting
        self._before = 0

    def __enter__(self) -> None:
        self._before = self._accounting.pages

    def __exit__(self, *_: object) -> None:
        self._converted.add(self._accounting.pages - self._before)
