"""Turns: in one event-loop iteration each user has a share, whatever the others ask for."""

from __future__ import annotations

from collections.abc import Hashable

import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.turns import SHARE, Turns


async def test_nobody_waits_for_a_turn_within_its_share() -> None:
    turns = Turns.here()
    steps = turns.take("one", SHARE - 1)
    try:
        steps.send(None)
    except StopIteration:
        assert turns.has_share("one")
    else:
        raise AssertionError("it waits")
    turns.spend("one")
    assert (turns.has_share("one"), turns.has_share("another"), turns.total) == (False, True, SHARE)
    await trio.lowlevel.checkpoint()
    assert turns.has_share("one")


async def test_many_tasks_of_a_user_do_no_more_in_an_iteration_than_its_share() -> None:
    """And those of another user have theirs in the same iteration."""
    turns, done = Turns.here(), list[tuple[Hashable, int]]()
    iteration = 0

    async def work(user: str) -> None:
        for _ in range(10):
            await turns.take(user, SHARE // 2)
            done.append((user, iteration))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(work, "many")
        nursery.start_soon(work, "one")
        while len(done) < 510:
            iteration += 1
            await trio.lowlevel.checkpoint()
    last_of_one = max(at for user, at in done if user == "one")
    assert last_of_one <= 30
    for each in range(iteration + 1):
        # an iteration of the event loop may lie across two of the ones counted here
        assert sum(at == each for user, at in done if user == "many") <= 4


async def test_turns_of_a_user_come_in_the_order_in_which_they_were_asked_for() -> None:
    turns, done = Turns.here(), list[int]()

    async def work(number: int) -> None:
        await turns.take("one", SHARE)
        done.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(work, number)
            await wait_all_tasks_blocked() if number == 0 else None
    assert sorted(done) == list(range(5))
    assert not turns._queues
