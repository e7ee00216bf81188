"""How work on many pages is cut up: what takes long is done in a thread, in pieces between which others get a turn.

The numbers are a compromise: a piece costs a thread and must not be noticed by who waits for the event loop or for the
end of an interrupted call, nor in how long the whole takes.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar

import trio

from memfs.contract.page_map import PageMap
from memfs.contract.units import PageRange, bytes_to_pages

_T = TypeVar("_T")

LONG: Final = 8 << 20  #: bytes; the kernel takes 2 ms for that. Anything longer goes to a thread
LONG_PAGES: Final = bytes_to_pages(LONG)
PIECE: Final = bytes_to_pages(256 << 20)  #: pages of a long range: 20 to 30 ms of the kernel's, in a thread
_MOST_PIECES: Final = 64  # of a file whose holes are not known: most of a huge one is holes


def to_free(pages: PageRange, page_map: PageMap | None, *, guest: bool) -> Iterator[PageRange]:
    """What to free of a range, in pieces that each take a moment."""
    if page_map is None:
        yield from pages.chunks(max(PIECE, -(-len(pages) // _MOST_PIECES)))
        return
    for run in page_map.runs(pages):
        yield from run.chunks(PIECE if guest else LONG_PAGES)


async def system_call(call: Callable[[], object], nbytes: int) -> None:
    """Run a system call whose cost grows with `nbytes`: at once if it is short, else in a thread."""
    if nbytes <= LONG:
        call()
    else:
        await trio.to_thread.run_sync(call)


def run_now(work: Coroutine[Any, Any, _T]) -> _T:
    """Run what does not wait for anything: a task of its own would cost two more turns of the event loop."""
    try:
        work.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    work.close()
    raise AssertionError("it waited")
