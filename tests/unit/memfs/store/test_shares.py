"""Shares: nobody gets everything, however many there are, and there is always something left."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest

from memfs.store.shares import Pool
from tests.helpers import raises

ALICE, BOB, ROOT = 12001, 12002, 0


@pytest.fixture
def pool() -> Pool:
    return Pool("descriptors", 20_000, frozenset({ROOT}))


def take_all(pool: Pool, user: int) -> int:
    """Have a user take as many as it can."""
    with suppress(OSError):
        while True:
            pool.check(user)
            pool.take(user)
    return pool.of(user)


def test_user_gets_half_of_what_is_left_and_another_always_something(pool: Pool) -> None:
    before = pool.left
    for user in range(1, 10):
        taken = take_all(pool, user)
        assert 0 < taken <= before / 2
        before = pool.left
    with raises(errno.EMFILE, match="user 1 has [0-9]+ descriptors, and [0-9]+ are left for all"):
        pool.check(1)
    pool.check(10)


def test_something_is_left_to_root_whoever_else_comes(pool: Pool) -> None:
    for user in range(1, 2000):
        take_all(pool, user)
    with raises(errno.EMFILE):
        pool.check(3000)
    assert take_all_of(pool, ROOT, 500) == 500


def take_all_of(pool: Pool, user: int, count: int) -> int:
    for _ in range(count):
        pool.check(user)
        pool.take(user)
    return pool.of(user)


def test_what_is_given_back_can_be_taken(pool: Pool) -> None:
    taken = take_all(pool, ALICE)
    pool.give_back(ALICE)
    pool.check(ALICE)
    pool.take(ALICE)
    pool.give_back(ALICE, taken)
    assert (pool.of(ALICE), pool.used, pool.left) == (0, 0, 20_000)
    with pytest.raises(AssertionError, match="gives back 1 descriptors too many"):
        pool.give_back(ALICE)
