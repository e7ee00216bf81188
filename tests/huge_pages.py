"""Real huge pages for tests: the machine's pool is made larger for as long as a test runs, and then as it was.

There is one pool, and tests count what is free in it, so those of other processes wait for it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from memfs.contract.sys.hugetlb import Pool, PoolError
from memfs.contract.sys.libc import fallocate

SIZE_2M, SIZE_1G = 2 << 20, 1 << 30
_MFD_HUGE_SHIFT = 26  # linux/memfd.h
_ours: set[int] = set()  # page sizes of the pools that this process has


@contextmanager
def huge_pages(count: int, size: int = SIZE_2M) -> Iterator[Pool]:
    """Have so many pages in the pool to be had, and no more. Skips the test that is running where there are none."""
    pool = Pool(size)
    with ExitStack() as resources:
        try:
            resources.enter_context(_alone(pool))
            resources.enter_context(pool.larger(count))
            resources.enter_context(taken_but(pool, count))
        except (PoolError, OSError) as error:
            pytest.skip(str(error))
        yield pool


@contextmanager
def _alone(pool: Pool) -> Iterator[None]:
    """Have a pool for this process; one that has it already may take it again."""
    if pool.page_size in _ours:
        yield
        return
    directory = os.open(os.path.dirname(pool.setting), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        _ours.add(pool.page_size)
        yield
    finally:
        _ours.discard(pool.page_size)
        os.close(directory)


@contextmanager
def taken_but(pool: Pool, count: int) -> Iterator[None]:
    """Take all pages that can be had but so many."""
    flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | (pool.page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
    fd = os.memfd_create("taken", flags)
    try:
        if pool.available > count:
            fallocate(fd, 0, 0, (pool.available - count) * pool.page_size)
        yield
    finally:
        os.close(fd)
