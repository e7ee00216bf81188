"""Conversions by fallocate(2) of both files, where memfs has no single operation for them (EOPNOTSUPP).

That is where the shared file is mapped through the kernel's page cache. What a mapping has stored there has to be
written, and its pages have to go; the kernel does that when a hole is punched, for whoever punches it.

    to private   allocate in the private file, then punch a hole into the shared one
    to shared    punch a hole into the shared file, which is stale, then into the private one, then allocate

In this order a conversion for which there is no space destroys nothing, and no page is on both sides in the end. Where
there is no space for both sides at once, pages change places: first those get private memory that have no content to
lose, from what is left; then those that have, piece by piece, each from what is punched for it. If that fails, somebody
else took the space at that moment, which two system calls cannot exclude; nothing else destroys content.

All functions block: not for the event loop, which has to acknowledge what they cause.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import suppress

from kvmsim.vmm.around import without
from memfs.contract.sparse import data_pages
from memfs.contract.sys.libc import FALLOC_FL_KEEP_SIZE, PUNCH_HOLE, fallocate
from memfs.contract.units import PageRange


def to_private(shared: int, private: int, ranges: Iterable[PageRange]) -> None:
    """Make what is shared of ranges private. Raises OSError; what came before it is converted."""
    for pages in ranges:
        for run in without(pages, list(data_pages(private, pages))):
            try:
                _allocate(private, run)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                _change_places(shared, private, run)
            else:
                _punch(shared, run)


def to_shared(shared: int, private: int, ranges: Iterable[PageRange]) -> None:
    """Make what is private of ranges shared. Raises OSError; what came before it is converted."""
    for pages in ranges:
        for run in list(data_pages(private, pages)):
            _punch(shared, run)
            _punch(private, run)
            with suppress(OSError):  # somebody else took the space: it is shared, and a store will find none
                _allocate(shared, run)


def _change_places(shared: int, private: int, run: PageRange) -> None:
    """Make pages private of a range that has no space on both sides at once. Raises OSError(ENOSPC)."""
    full = list(data_pages(shared, run))
    allocated: list[PageRange] = []
    try:
        for part in without(run, full):  # memory that nothing was written to
            _punch(shared, part)
            _allocate(private, part)
            allocated.append(part)
    except OSError:
        for part in allocated:
            _punch(private, part)
        raise
    for part in full:
        _punch(shared, part)
        _allocate(private, part)


def _allocate(fd: int, pages: PageRange) -> None:
    fallocate(fd, FALLOC_FL_KEEP_SIZE, pages.offset, pages.nbytes)


def _punch(fd: int, pages: PageRange) -> None:
    fallocate(fd, PUNCH_HOLE, pages.offset, pages.nbytes)
