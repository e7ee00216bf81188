"""The lock of a file: in order, one at a time, and cancelled waiters neither have it nor keep it from others."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.lock import Lock


async def test_one_at_a_time_and_in_order() -> None:
    lock, order = Lock(), list[int]()

    async def use(number: int) -> None:
        await lock.acquire()
        order.append(number)
        await trio.lowlevel.checkpoint()
        assert order[-1] == number, "somebody else had it meanwhile"
        lock.release()

    await lock.acquire()
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(use, number)
            await wait_all_tasks_blocked()
        assert order == []
        lock.release()
    assert order == [0, 1, 2, 3, 4]
    await lock.acquire()  # it is free
    lock.release()


async def test_free_lock_does_not_yield() -> None:
    lock, ran = Lock(), list[str]()
    async with trio.open_nursery() as nursery:

        async def other() -> None:
            ran.append("other")

        nursery.start_soon(other)
        await lock.acquire()
        lock.release()
        assert ran == []


async def test_cancelled_waiters_are_passed_over() -> None:
    """Also one that was given the lock in the same moment: it has it then, and releases it."""
    lock, had = Lock(), list[int]()

    async def use(number: int, scope: trio.CancelScope) -> None:
        with scope:
            await lock.acquire()
            had.append(number)
            lock.release()

    await lock.acquire()
    async with trio.open_nursery() as nursery:
        scopes = [trio.CancelScope() for _ in range(3)]
        for number, scope in enumerate(scopes):
            nursery.start_soon(use, number, scope)
            await wait_all_tasks_blocked()
        scopes[0].cancel()
        await wait_all_tasks_blocked()
        lock.release()
        scopes[1].cancel()
    assert had == [1, 2]
    await lock.acquire()
    lock.release()
