"""How work on many pages is divided: what takes long is done in a thread, in chunks between which others are served.

The numbers are a compromise: a chunk costs a thread, and must not be noticed in how long others wait for the event loop
or for the end of an interrupted call, nor in how long the whole takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import trio

from memfs.contract.page_map import PageMap
from memfs.contract.units import PageRange, bytes_to_pages

LONG: Final = 8 << 20  #: bytes; the kernel takes 2 ms for that. Anything longer goes to a thread
LONG_PAGES: Final = bytes_to_pages(LONG)
CHUNK: Final = bytes_to_pages(256 << 20)  #: pages of a long range: 20 to 30 ms of the kernel's, in a thread
_MOST_CHUNKS: Final = 64  # of a file whose holes are not known: most of a huge one is holes


def to_free(pages: PageRange, page_map: PageMap | None, *, guest: bool) -> Iterator[PageRange]:
    """Divide a range that is to be freed into chunks that each take a moment; known holes are left out."""
    if page_map is None:
        yield from pages.chunks(max(CHUNK, -(-len(pages) // _MOST_CHUNKS)))
        return
    for run in page_map.runs(pages):
        yield from run.chunks(CHUNK if guest else LONG_PAGES)


async def system_call(call: Callable[[], object], nbytes: int) -> None:
    """Run a system call whose cost grows with `nbytes`: immediately if it is short, else in a thread."""
    if nbytes <= LONG:
        call()
    else:
        await trio.to_thread.run_sync(call)
