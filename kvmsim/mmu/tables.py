"""Where page tables live: an anonymous mapping in which table n is page n, so that a table is as large as a real one.

The address space is reserved once for as many tables as the largest VM could need, and costs nothing until a table is
used. So tables never move: a view of one stays true while others are allocated, and allocating one copies nothing. The
pages of freed tables are returned to the kernel, which is also what makes them zero again for their next use.

Table 0 is all zeros and stays so: a walk that comes to an absent entry goes on in table 0, and needs no branch.

Rejected: an array that grows by doubling (copies gigabytes under the MMU lock, and is half empty afterwards); one
Python object a table (a walk of many gfns at once is then no array look-up any more).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvmsim.arrays import Numbers, runs
from kvmsim.mmu.pte import ENTRIES, Ptes
from memfs.contract.sys.libc import MAP_NORESERVE
from memfs.contract.units import PAGE_SIZE

MAX_TABLES: Final = 1 << 23  #: enough for the 2**31 - 1 pages of the largest memslot, twice
NULL_TABLE: Final = 0
_MADVISE_FROM: Final = 8  # tables; fewer are cheaper to clear than to have faulted in again


class Tables:
    """Tables, allocated and freed. `entries`: shape (MAX_TABLES, 512), int64; `used`: shape (MAX_TABLES,), int32.

    `used` counts the present entries of each table; code that changes entries keeps it true.
    """

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._memory: Final = mmap.mmap(-1, MAX_TABLES * PAGE_SIZE, flags=flags)
        self._counts: Final = mmap.mmap(-1, MAX_TABLES * np.dtype(np.int32).itemsize, flags=flags)
        #: all entries of all tables in one row: entry i of table n is at n * 512 + i
        self.flat: Final[Ptes] = np.frombuffer(self._memory, np.int64)
        #: the same; one of these is read and written in a third of the time that numpy takes
        self.words: Final = memoryview(self._memory).cast("q")
        self.entries: Final[Ptes] = self.flat.reshape(MAX_TABLES, ENTRIES)
        self.used: Final[npt.NDArray[np.int32]] = np.frombuffer(self._counts, np.int32)
        self._next = NULL_TABLE + 1  # tables from here on were never used
        self._free: list[int] = []

    def __len__(self) -> int:
        """Return how many tables are in use."""
        return self._next - 1 - len(self._free)

    @property
    def nbytes(self) -> int:
        """How many bytes the tables in use take, with their counts."""
        return len(self) * (PAGE_SIZE + self.used.itemsize)

    @property
    def freed(self) -> Sequence[int]:
        """The numbers of tables that were in use and are not."""
        return tuple(self._free)

    def allocate(self, count: int) -> Numbers:
        """Allocate empty tables; neighbours if possible. Raises MemoryError, changing nothing."""
        reused = self._free[len(self._free) - min(count, len(self._free)) :]
        fresh = count - len(reused)
        if self._next + fresh > MAX_TABLES:
            raise MemoryError("more page tables than any VM needs")
        del self._free[len(self._free) - len(reused) :]
        numbers = np.empty(count, np.int64)
        numbers[: len(reused)] = reused[::-1]
        numbers[len(reused) :] = np.arange(self._next, self._next + fresh)
        self._next += fresh
        return numbers

    def allocate_one(self) -> int:
        """Allocate one empty table. Raises MemoryError, changing nothing."""
        return self._free.pop() if self._free else int(self.allocate(1)[0])

    def free_one(self, number: int) -> None:
        """Free a table that is empty."""
        self._free.append(number)

    def free(self, numbers: Numbers) -> None:
        """Free tables, whatever is in them."""
        ordered = np.sort(numbers)
        for start, end in runs(ordered):
            if end - start >= _MADVISE_FROM:
                self._memory.madvise(mmap.MADV_DONTNEED, start * PAGE_SIZE, (end - start) * PAGE_SIZE)
            else:
                self.entries[start:end] = 0
        self.used[numbers] = 0
        self._free.extend(ordered[::-1].tolist())
