"""How work on many pages is divided: what takes long is done in a thread, in chunks between which others are served.

The numbers are a compromise: a chunk costs a thread, and must not be noticed in how long others wait for the event loop
or for the end of an interrupted call, nor in how long the whole takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from memfs.contract.aio.threads import Threads, current_user
from memfs.contract.aio.turns import SHARE, Turns
from memfs.contract.page_map import PageMap
from memfs.contract.units import MAX_OFFSET, ByteOffset, PageIndex, PageRange, bytes_to_pages, page_floor

LONG: Final = 4 << 20  #: bytes; the kernel takes a millisecond for that. Anything longer goes to a thread
LONG_PAGES: Final = bytes_to_pages(LONG)
CHUNK: Final = bytes_to_pages(256 << 20)  #: pages of a long range: 20 to 30 ms of the kernel's, in a thread
_UNIT: Final = LONG // SHARE  # bytes of a system call that count as a unit of work
SHORT: Final = _UNIT - 1  #: bytes of which allocating or freeing costs hardly more than the system call
SHORT_PAGES: Final = bytes_to_pages(SHORT)
END: Final = page_floor(ByteOffset(MAX_OFFSET))  #: of all pages that a file of whatever size can have, and be freed
_MOST_CHUNKS: Final = 64  # of a file whose holes are not known: most of a huge one is holes


def to_free(
    pages: PageRange, page_map: PageMap | None, end_of_file: PageIndex, *, guest: bool, granule: int = 1
) -> Iterator[PageRange]:
    """Divide a range that is to be freed into chunks that each take a moment; known holes are left out.

    `granule`: a huge page's, in pages, so that none is divided. Past the end of a file whose holes are not known there
    is seldom anything (FALLOC_FL_KEEP_SIZE), and no end: that is one chunk.
    """
    if page_map is None:
        if pages.start < end_of_file:
            within = PageRange(pages.start, min(pages.end, end_of_file))
            size = max(CHUNK, -(-len(within) // _MOST_CHUNKS))
            yield from within.chunks(-(-size // granule) * granule)
        if end_of_file < pages.end:
            yield PageRange(max(pages.start, end_of_file), pages.end)
        return
    for run in page_map.runs(pages):
        yield from run.chunks(max(CHUNK, granule) if guest else LONG_PAGES)


def count(nbytes: int) -> None:
    """Count the work of a system call that allocated or freed so much."""
    if nbytes >= _UNIT:
        Turns.here().spend(current_user(), nbytes // _UNIT)


async def turn(nbytes: int) -> None:
    """Wait for the turn of whom a system call is for, that is about to allocate or free so much, and count its work."""
    if nbytes >= _UNIT:
        await Turns.here().take(current_user(), nbytes // _UNIT)


async def system_call(call: Callable[[], object], nbytes: int) -> None:
    """Run a system call whose cost grows with `nbytes`: immediately if it is short, else in a thread of its user's."""
    if nbytes <= LONG:
        await turn(nbytes)
        call()
    else:
        await Threads.here().run(call)
