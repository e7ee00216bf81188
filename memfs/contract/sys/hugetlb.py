"""The kernel's pools of huge pages: how many there are of a size, by sysfs (admin-guide/mm/hugetlbpage.rst).

A pool is the machine's, and so are its numbers: others take pages and give them back at any moment.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_POOLS: Final = Path("/sys/kernel/mm/hugepages")
_RETURNED_WITHIN: Final = 3  # seconds


class PoolError(Exception):
    """A pool cannot become larger; one sentence."""


class Pool:
    """The pool of pages of `page_size` bytes. Raises OSError (ENOENT: this kernel has none of that size)."""

    def __init__(self, page_size: int) -> None:
        self.page_size: Final = page_size
        self._directory: Final = _POOLS / f"hugepages-{page_size >> 10}kB"

    @property
    def setting(self) -> str:
        """The file by which root changes how many pages there are."""
        return str(self._directory / "nr_hugepages")

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return self._read("nr_hugepages")

    @property
    def free(self) -> int:
        """How many of them are in no file and no memory, reserved ones among them."""
        return self._read("free_hugepages")

    @property
    def reserved(self) -> int:
        """How many of the free ones are promised to somebody."""
        return self._read("resv_hugepages")

    @property
    def available(self) -> int:
        """How many pages can be had, those among them that the kernel may allocate on top (overcommit)."""
        return (
            self.free - self.reserved + max(0, self._read("nr_overcommit_hugepages") - self._read("surplus_hugepages"))
        )

    def has(self, count: int) -> bool:
        """Return whether so many pages can be had. Quick, if they are there."""
        return self.free - self.reserved >= count or self.available >= count

    @contextmanager
    def larger(self, count: int) -> Iterator[None]:
        """Have so many pages more in the pool, within a with statement: for those who measure or test, as root.

        Raises PoolError if they cannot be had.
        """
        try:
            self._add(count)
        except OSError as error:
            raise PoolError(f"no huge pages of {self.page_size >> 20} MiB: {error.strerror}") from error
        try:
            yield
        finally:
            self._add(-count)

    def _add(self, count: int) -> None:
        """Change how many pages there are, one process at a time. Raises OSError, PoolError, having changed nothing."""
        with open(self.setting, "r+") as setting:
            fcntl.flock(setting, fcntl.LOCK_EX)
            before, deadline = self.pages, time.monotonic() + _RETURNED_WITHIN
            self._set(before + count)
            while self.pages > before + count and time.monotonic() < deadline:  # some are still being given back
                time.sleep(0.02)
                self._set(before + count)
            if self.pages < before + count:
                self._set(before)
                raise PoolError(f"no memory for {count} more huge pages of {self.page_size >> 20} MiB")

    def _set(self, pages: int) -> None:
        Path(self.setting).write_text(str(max(0, pages)))

    def _read(self, name: str) -> int:
        fd = os.open(f"{self._directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)  # a third of what open() takes
        try:
            return int(os.read(fd, 32))
        finally:
            os.close(fd)


def pool_sizes() -> list[int]:
    """Return the sizes in bytes of which this kernel has huge pages, the smallest first."""
    names = os.listdir(_POOLS) if _POOLS.is_dir() else []
    return sorted(int(match[1]) << 10 for name in names if (match := re.fullmatch(r"hugepages-(\d+)kB", name)))
