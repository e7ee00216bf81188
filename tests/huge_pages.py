"""Real huge pages for tests: the machine's pool is made larger for as long as a test runs, and then as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from memfs.contract.sys.hugetlb import Pool, PoolError
from memfs.contract.sys.libc import fallocate

SIZE_2M, SIZE_1G = 2 << 20, 1 << 30
_MFD_HUGE_SHIFT = 26  # linux/memfd.h


@contextmanager
def huge_pages(count: int, size: int = SIZE_2M) -> Iterator[Pool]:
    """Have so many pages in the pool to be had, and no more. Skips the test that is running where there are none."""
    pool = Pool(size)
    with ExitStack() as resources:
        try:
            resources.enter_context(pool.larger(count))
            resources.enter_context(taken_but(pool, count))
        except PoolError as error:
            pytest.skip(str(error))
        yield pool


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
