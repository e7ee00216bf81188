"""Where the memory of the one process is: program, heap, mappings and stack, in this order, virtual address being gpa.

All of guest memory is there and private from the start, so to map and unmap is to keep account, and to hand out zeros:
what was used before is emptied when it is handed out again.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Final

from memfs.contract.units import PAGE_SIZE, Gpa

STACK: Final = 1 << 20  #: bytes
#: What a program is to have besides itself, at the least: heap, mappings and stack
ROOM: Final = STACK + (3 << 20)
_PIECE: Final = 1 << 20  # bytes that are emptied at a time

Store = Callable[[Gpa, bytes], Awaitable[None]]


def page_up(number: int) -> int:
    """Return a number of bytes, rounded up to whole pages."""
    return -(-number // PAGE_SIZE) * PAGE_SIZE


class AddressSpace:
    """The address space of a program that ends at `end`, in `size` bytes of memory, which `store` stores to."""

    def __init__(self, end: int, size: int, store: Store) -> None:
        self._store: Final = store
        self.heap_start: Final = page_up(end)
        self.stack_top: Final = size - size % PAGE_SIZE
        self._heap_end = self.heap_start
        self._top: Final = self.stack_top - STACK
        self._fresh = (self.heap_start, self._top)  # what was never handed out, so that it is empty
        self._mapped: list[tuple[int, int]] = []  # half-open, in order

    async def brk(self, address: int) -> int:
        """Move the end of the heap, if it can be there; return where it is."""
        if self.heap_start <= address <= self._lowest_mapped():
            if address > self._heap_end:
                await self._empty(page_up(self._heap_end), page_up(address))
                self._fresh = (max(self._fresh[0], page_up(address)), self._fresh[1])
            self._heap_end = address
        return self._heap_end

    def _lowest_mapped(self) -> int:
        return self._mapped[0][0] if self._mapped else self._top

    async def map(self, size: int, fixed: int | None = None) -> int:
        """Map so many bytes of zeros; return where. `fixed`: there, over what is there. Raises OSError(ENOMEM)."""
        size = page_up(size)
        if not size:
            raise OSError(errno.EINVAL, "a mapping of nothing")
        start = self._gap(size) if fixed is None else fixed
        if start % PAGE_SIZE or start < page_up(self._heap_end) or start + size > self._top:
            raise OSError(errno.ENOMEM, "no memory there")
        self.unmap(start, size)
        self._mapped.append((start, start + size))
        self._mapped.sort()
        await self._empty(start, start + size)
        self._fresh = (self._fresh[0], min(self._fresh[1], start))
        return start

    def _gap(self, size: int) -> int:
        """Return the highest place for a mapping. Raises OSError(ENOMEM)."""
        above = self._top
        for start, end in reversed(self._mapped):
            if above - end >= size:
                break
            above = start
        if above - size < page_up(self._heap_end):
            raise OSError(errno.ENOMEM, "guest memory is full")
        return above - size

    def unmap(self, start: int, size: int) -> None:
        """Unmap a range. Raises OSError(EINVAL) if it does not begin with a page."""
        end = start + page_up(size)
        if start % PAGE_SIZE or end <= start:
            raise OSError(errno.EINVAL, "not a range of pages")
        parts = [(first, last) for first, last in self._mapped if last <= start or first >= end]
        for first, last in self._mapped:
            if first < start < last:
                parts.append((first, start))
            if first < end < last:
                parts.append((end, last))
        self._mapped = sorted(parts)

    async def _empty(self, start: int, end: int) -> None:
        """Empty what of a range may have been used."""
        for first, last in ((start, min(end, self._fresh[0])), (max(start, self._fresh[1]), end)):
            for at in range(first, last, _PIECE):
                await self._store(Gpa(at), bytes(min(_PIECE, last - at)))
