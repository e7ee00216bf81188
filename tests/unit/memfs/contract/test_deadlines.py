"""Deadlines that pass only while this process runs."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from memfs.contract.aio.deadlines import Deadlines


async def test_block_that_ends_in_time_is_left_alone(autojump_clock: MockClock) -> None:
    with Deadlines.here().fail_after(1):
        await trio.sleep(0.9)
    await trio.sleep(10)
    assert not Deadlines.here()._is_ticking


async def test_block_that_does_not_is_ended_however_many_there_are(autojump_clock: MockClock) -> None:
    ended = dict[float, float]()

    async def wait(seconds: float) -> None:
        with pytest.raises(trio.TooSlowError), Deadlines.here().fail_after(seconds):
            await trio.sleep_forever()
        ended[seconds] = trio.current_time()

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for seconds in (3.0, 0.1, 1.0):
            nursery.start_soon(wait, seconds)
    for seconds, at in ended.items():
        assert seconds <= at - began <= seconds + 0.1
    assert not Deadlines.here()._waiting


async def test_deadline_that_passed_in_a_standstill_is_given_again(mock_clock: MockClock) -> None:
    ended = False

    async def wait() -> None:
        nonlocal ended
        with pytest.raises(trio.TooSlowError), Deadlines.here().fail_after(5):
            await trio.sleep_forever()
        ended = True

    async def run_for(seconds: float) -> None:
        for _ in range(round(seconds / 0.05)):
            mock_clock.jump(0.05001)
            await wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await run_for(4)
        mock_clock.jump(1000)  # nothing ran meanwhile
        await wait_all_tasks_blocked()
        assert not ended
        await run_for(4.5)
        assert not ended
        await run_for(1)
        assert ended
