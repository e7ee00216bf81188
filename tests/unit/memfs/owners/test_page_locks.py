"""Counted page locks against a plain array of counts."""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from memfs.contract.units import PageRange
from memfs.owners.page_locks import MOST_RANGES, PageLocks
from tests.helpers import pages, raises

SPAN = 12


ranges = st.tuples(st.integers(0, SPAN - 1), st.integers(1, SPAN)).map(lambda r: pages(r[0], min(SPAN, r[0] + r[1])))


def first_locked(counts: npt.NDArray[np.int_], start: int, end: int) -> PageRange | None:
    """Return the first run of pages from `start` up to `end` that are locked."""
    locked = [page for page in range(start, end) if counts[page]]
    if not locked:
        return None
    stop = next((page for page in range(locked[0], end) if not counts[page]), end)
    return pages(locked[0], stop)


@given(st.lists(st.tuples(st.booleans(), ranges), max_size=30))
def test_locks_are_counted_page_by_page(steps: list[tuple[bool, PageRange]]) -> None:
    locks, counts = PageLocks(), np.zeros(SPAN, int)

    async def play() -> None:
        for is_lock, span in steps:
            if is_lock:
                locks.lock(span)
                counts[span.slice] += 1
            elif counts[span.slice].all():
                locks.unlock(span)
                counts[span.slice] -= 1
            else:
                with raises(errno.EINVAL):
                    locks.unlock(span)
            assert len(locks) == counts.sum()
            assert locks.first_of(pages(2, SPAN - 2)) == first_locked(counts, 2, SPAN - 2)
            assert [page for run in locks.runs() for page in range(run.start, run.end)] == np.flatnonzero(
                counts
            ).tolist()
            for page in range(SPAN):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await locks.wait_unlocked(pages(page, page + 1))
                assert scope.cancelled_caught == bool(counts[page])

    trio.run(play)


def test_locks_in_too_many_pieces_are_refused_and_those_there_are_let_go_of() -> None:
    """Every other page of a range, and then the range at once: that takes no longer than it should."""
    locks = PageLocks()
    number = 0
    while locks.headroom:
        locks.lock(pages(2 * number, 2 * number + 1))
        number += 1
    with raises(errno.ENOLCK):
        locks.lock(pages(0, 1))
    assert number == len(locks) >= MOST_RANGES - 1
    with raises(errno.EINVAL):
        locks.unlock(pages(0, 2 * number))
    assert len(locks) == number
    for page in range(0, 2 * number, 2):
        locks.unlock(pages(page, page + 1))
    assert (len(locks), locks.headroom) == (0, MOST_RANGES - 1)


async def test_who_waits_goes_on_with_the_last_unlock() -> None:
    locks = PageLocks()
    locks.lock(pages(0, 4))
    locks.lock(pages(3, 5))
    done = []

    async def wait(span: PageRange) -> None:
        await locks.wait_unlocked(span)
        done.append(span)

    async with trio.open_nursery() as nursery:
        for span in (pages(0, 1), pages(3, 4), pages(4, 9), pages(5, 9)):
            nursery.start_soon(wait, span)
        await wait_all_tasks_blocked()
        assert done == [pages(5, 9)]
        locks.unlock(pages(0, 4))
        await wait_all_tasks_blocked()
        assert done == [pages(5, 9), pages(0, 1)]
        locks.clear()
    assert len(locks) == 0


@given(st.lists(st.sets(st.integers(0, SPAN - 1), min_size=1), max_size=10))
def test_many_ranges_are_locked_as_one_after_the_other(steps: list[set[int]]) -> None:
    together, apart = PageLocks(), PageLocks()
    for step in steps:
        ranges = [pages(page, page + 1) for page in sorted(step)]
        together.lock(*ranges)
        for each in ranges:
            apart.lock(each)
        assert (together._edges, together._counts) == (apart._edges, apart._counts)
        assert len(together) == len(apart)
