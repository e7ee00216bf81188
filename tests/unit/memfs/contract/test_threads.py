"""Threads: one user's are not another's."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.threads import THREADS, Threads, current_user, working_for
from tests.helpers import raises

ALICE, BOB = 12001, 12002


async def run_for(user: int, function: Callable[[], object]) -> object:
    with working_for(lambda: user):
        return await Threads.here().run(function)


async def test_threads_of_one_user_leave_others_theirs() -> None:
    ends, begun = threading.Event(), list[int]()

    def wait() -> None:
        begun.append(1)
        ends.wait()

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(run_for, ALICE, wait)
        await wait_all_tasks_blocked(0.05)
        assert len(begun) == THREADS
        assert await run_for(BOB, lambda: 7) == 7
        ends.set()
    assert len(begun) == 100
    assert not Threads.here().shares


async def test_tasks_that_a_task_starts_work_for_the_same_user() -> None:
    seen = list[object]()

    async def see() -> None:
        seen.append(current_user())

    async with trio.open_nursery() as nursery:
        with working_for(lambda: ALICE):
            nursery.start_soon(see)
        nursery.start_soon(see)
    assert set(seen) == {ALICE, None}


async def test_without_a_thread_it_is_eagain(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_sync(*arguments: object, **options: object) -> object:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("trio.to_thread.run_sync", run_sync)
    with raises(errno.EAGAIN, match="memfs can have no thread for that"):
        await Threads.here().run(os.getpid)
    assert not Threads.here().shares
