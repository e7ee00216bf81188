"""Real huge pages for tests: the machine's pool is made larger for as long as a test runs, and then as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from memfs.contract.sys.hugetlb import Pool, PoolError

SIZE_2M, SIZE_1G = 2 << 20, 1 << 30


@contextmanager
def huge_pages(count: int, size: int = SIZE_2M) -> Iterator[Pool]:
    """Have so many pages more in the pool. Skips the test that is running where they cannot be had."""
    pool = Pool(size)
    try:
        more = pool.larger(count)
        more.__enter__()
    except PoolError as error:
        pytest.skip(str(error))
    try:
        yield pool
    finally:
        more.__exit__(None, None, None)
