"""What leaves a flat nursery."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.nurseries import open_flat_nursery


async def fail(error: Exception) -> None:
    raise error


async def fail_when_cancelled(error: Exception) -> None:
    try:
        await trio.sleep_forever()
    finally:
        raise error


async def around(block: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    """Run a block within a flat nursery in which another task sleeps."""
    async with open_flat_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        await wait_all_tasks_blocked()
        await block(nursery)


async def test_exception_of_a_task_leaves_as_it_is() -> None:
    cause, error = KeyError("cause"), LookupError("a task")
    error.__cause__ = cause

    async def block(nursery: trio.Nursery) -> None:
        nursery.start_soon(fail, error)

    with pytest.raises(LookupError) as raised:
        await around(block)
    assert raised.value is error
    assert (error.__cause__, error.__context__) == (cause, None)


async def test_exception_of_the_block_ends_the_tasks() -> None:
    error = LookupError("the block")
    with pytest.raises(LookupError) as raised:
        await around(lambda _: fail(error))
    assert raised.value is error


async def test_first_of_several_leaves() -> None:
    errors = [LookupError(str(number)) for number in range(3)]

    async def block(nursery: trio.Nursery) -> None:
        nursery.start_soon(fail_when_cancelled, errors[1])
        nursery.start_soon(fail_when_cancelled, errors[2])
        await wait_all_tasks_blocked()
        await around(lambda _: fail(errors[0]))

    with pytest.raises(LookupError) as raised:
        await around(block)
    assert raised.value is errors[0]


async def test_cancellation_from_outside_remains_one() -> None:
    with trio.CancelScope() as scope:

        async def block(_: trio.Nursery) -> None:
            scope.cancel()
            await trio.sleep_forever()

        await around(block)
    assert scope.cancelled_caught


async def test_exception_counts_more_than_the_cancellation_it_came_with() -> None:
    error = LookupError("while it was cancelled")
    with trio.CancelScope() as scope:

        async def block(nursery: trio.Nursery) -> None:
            nursery.start_soon(fail_when_cancelled, error)
            await wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()

        with pytest.raises(LookupError) as raised:
            await around(block)
    assert raised.value is error


async def test_block_that_ends_well_leaves_nothing() -> None:
    async with open_flat_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        nursery.cancel_scope.cancel()
