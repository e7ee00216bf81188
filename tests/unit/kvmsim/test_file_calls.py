"""The thread of a VMM's file calls: one after the other, whatever comes of them, and none that is lost."""

from __future__ import annotations

import errno
import gc
import os
import threading

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from kvmsim.vmm.file_calls import FileCalls
from tests.helpers import raises


async def test_calls_are_made_in_another_thread_that_stays() -> None:
    calls = FileCalls()
    first = await calls.call(threading.get_ident)
    assert first != threading.get_ident()
    assert [await calls.call(threading.get_ident) for _ in range(3)] == [first] * 3
    assert await calls.call(list) == []


async def test_error_is_the_caller_s_and_the_next_call_is_made() -> None:
    calls = FileCalls()
    with raises(errno.EBADF):
        await calls.call(lambda: os.fstat(-1))
    with pytest.raises(SystemExit):
        await calls.call(lambda: exit())  # whatever it raises
    assert await calls.call(lambda: 5) == 5


async def test_event_loop_goes_on_meanwhile() -> None:
    calls, may = FileCalls(), threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(calls.call, may.wait)
        await wait_all_tasks_blocked()
        may.set()


async def test_call_that_has_begun_is_waited_for_when_cancelled() -> None:
    calls, may, made = FileCalls(), threading.Event(), []

    def make() -> None:
        may.wait()
        made.append(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(calls.call, make)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        may.set()
    assert made == [1]
    with trio.CancelScope() as scope:
        scope.cancel()
        await calls.call(make)
    assert scope.cancelled_caught
    assert made == [1], "it had not begun"


async def test_thread_begins_with_the_first_call_and_ends_with_its_object() -> None:
    before = set(threading.enumerate())
    calls = FileCalls()
    assert set(threading.enumerate()) <= before, "a VMM that converts nothing has no thread"
    thread = await calls.call(threading.current_thread)
    assert thread not in before
    del calls
    gc.collect()
    await trio.to_thread.run_sync(thread.join, 10)
    assert not thread.is_alive()
