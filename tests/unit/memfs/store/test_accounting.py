"""A file's account: how much can be written, and what is kept of a page map that nobody uses."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from memfs.contract.page_ranges import PageRanges
from memfs.contract.units import PAGE_SIZE, ByteOffset
from memfs.store.accounting import Accounting
from memfs.store.memfd_backing import MemfdBacking
from tests.helpers import at, one, pages

LIMIT = 1 << 11  # pages


@pytest.fixture
def backing() -> Iterator[MemfdBacking]:
    backing = MemfdBacking(LIMIT * PAGE_SIZE)
    yield backing
    backing.close()


@pytest.fixture
def account(backing: MemfdBacking) -> Iterator[Accounting]:
    account = Accounting(backing, "test")
    yield account
    account.close()
    assert backing.free_pages == LIMIT


def allocate(account: Accounting, *ranges: tuple[int, int]) -> None:
    for each in ranges:
        with account.reserve(pages(*each)) as reservation:
            reservation.commit(pages(*each))


def test_as_much_can_be_written_as_there_are_free_pages(backing: MemfdBacking, account: Accounting) -> None:
    other = Accounting(backing, "other")
    allocate(other, (0, LIMIT - 7))
    allocate(account, (2, 4))  # five are free, and of a write from page 1 on, 1, 4, 5, 6 and 7 are absent
    for offset, length, expected in (
        (at(1), 5 * PAGE_SIZE, 5 * PAGE_SIZE),
        (at(1), 7 * PAGE_SIZE, 7 * PAGE_SIZE),
        (at(1), 7 * PAGE_SIZE + 1, 7 * PAGE_SIZE),
        (at(1), 100 * PAGE_SIZE, 7 * PAGE_SIZE),
        (ByteOffset(at(1) + 100), 100 * PAGE_SIZE, 7 * PAGE_SIZE - 100),
        (at(2), 2 * PAGE_SIZE, 2 * PAGE_SIZE),
        (at(100), 5 * PAGE_SIZE, 5 * PAGE_SIZE),
        (at(100), 6 * PAGE_SIZE, 5 * PAGE_SIZE),
    ):
        assert account.space_for(offset, length) == expected, (offset, length)
    allocate(other, (LIMIT, LIMIT + 5))
    assert account.space_for(at(2), 3 * PAGE_SIZE) == 2 * PAGE_SIZE
    assert account.space_for(at(4), PAGE_SIZE) == 0
    other.close()


@pytest.mark.parametrize("runs", [0, 1, 256, 257])
def test_map_that_nobody_uses_is_kept_as_runs_if_they_are_few(backing: MemfdBacking, runs: int) -> None:
    account = Accounting(backing, "sparse")
    gc.collect()  # what tests before this one have left open
    before = descriptors()
    for number in range(runs):
        allocate(account, (2 * number, 2 * number + 1))
    account.put_away()
    assert (descriptors() == before) is (runs <= 256)
    assert list(account.page_map.runs(pages(0, LIMIT))) == [one(2 * number) for number in range(runs)]
    account.close()
    assert backing.free_pages == LIMIT


def test_to_free_holes_allocates_no_map(account: Accounting) -> None:
    allocate(account, (0, 1))
    before = account.page_map.nbytes
    for number in range(1, 20):
        account.forget(pages(number << 12, (number << 12) + 1))
    account.forget(PageRanges.of([pages(number << 12, (number << 12) + 1) for number in range(20, 40)]))
    assert account.page_map.nbytes == before
    account.forget()
    assert account.pages == 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
