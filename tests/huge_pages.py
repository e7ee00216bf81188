"""Real huge pages for tests: the machine's pool is made larger for as long as a test runs, and then as it was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memfs.contract.sys.hugetlb import Pool

SIZE_2M, SIZE_1G = 2 << 20, 1 << 30
_RETURNED_WITHIN = 3  # seconds


@contextmanager
def huge_pages(count: int, size: int = SIZE_2M) -> Iterator[Pool]:
    """Have at least so many pages more in the pool. Skips the test that is running where they cannot be had."""
    pool = Pool(size)
    try:
        before, wanted = pool.pages, pool.available + count
        setting = Path(pool.setting)
        setting.write_text(str(before + count))
    except OSError as error:
        pytest.skip(f"no huge pages of {size >> 20} MiB: {error.strerror}")
    try:
        if pool.available < wanted:
            pytest.skip(f"the machine has no memory for {count} more huge pages of {size >> 20} MiB")
        yield pool
    finally:
        deadline = time.monotonic() + _RETURNED_WITHIN
        setting.write_text(str(before))
        while pool.pages > before and time.monotonic() < deadline:  # some are still being given back
            time.sleep(0.02)
            setting.write_text(str(before))
