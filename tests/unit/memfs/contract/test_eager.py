"""Eager tasks: what does not wait is done at once and in order, what waits gets the task, and the loop another one."""

from __future__ import annotations

import contextvars
import gc
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from memfs.contract.aio.eager import LoopTask, run_loop

number: contextvars.ContextVar[int] = contextvars.ContextVar("number", default=0)


class Requests:
    """A loop that takes requests from a list; each names a handler that waits, or one that does not."""

    def __init__(self, *handlers: Callable[[], Awaitable[str]]) -> None:
        self.handlers = list(handlers)
        self.answers: list[str] = []
        self.tasks: list[trio.lowlevel.Task] = []
        self.loop_tasks: list[LoopTask] = []
        self.waited = 0
        self.contexts: list[int] = []

    async def loop(self, task: LoopTask) -> None:
        self.tasks.append(trio.lowlevel.current_task())
        self.contexts.append(number.get())
        self.loop_tasks.append(task)
        while self.handlers and not task.is_taken:
            self.answers.append(await task.run(self._answer(self.handlers.pop(0)), self._waits))

    async def _answer(self, handler: Callable[[], Awaitable[str]]) -> str:
        number.set(number.get() + 1)
        return await handler()

    def _waits(self) -> None:
        self.waited += 1


async def at_once() -> str:
    return "at once"


async def test_what_does_not_wait_costs_no_task_and_no_iteration(nursery: trio.Nursery) -> None:
    requests = Requests(at_once, at_once, at_once)
    run_loop(requests.loop, nursery.start_soon)
    await trio.lowlevel.checkpoint()  # trio runs the tasks of an iteration in any order
    await trio.lowlevel.checkpoint()
    assert requests.answers == ["at once"] * 3
    assert (len(requests.tasks), requests.waited, requests.loop_tasks[0].is_taken) == (1, 0, False)


async def test_loop_goes_on_in_another_task_while_a_handler_waits(nursery: trio.Nursery) -> None:
    event = trio.Event()

    async def later() -> str:
        with trio.CancelScope():
            await event.wait()
            await trio.lowlevel.checkpoint()
        return "later"

    requests = Requests(at_once, later, at_once, later)
    run_loop(requests.loop, nursery.start_soon)
    await wait_all_tasks_blocked()
    assert requests.answers == ["at once", "at once"]
    assert [task.is_taken for task in requests.loop_tasks] == [True, True, False]
    assert requests.waited == 2, "once for each that waits, however often it does"
    assert requests.contexts == [0, 0, 0], "a task does not begin in the context of what waits"
    event.set()
    await wait_all_tasks_blocked()
    assert requests.answers == ["at once", "at once", "later", "later"]
    assert len({id(task) for task in requests.tasks}) == 3


async def test_exception_is_raised_whether_it_waited_or_not(nursery: trio.Nursery) -> None:
    caught = []

    async def fail(waits: bool) -> None:
        if waits:
            await trio.lowlevel.checkpoint()
        raise LookupError(waits)

    async def loop(task: LoopTask) -> None:
        for waits in (False, True):
            with pytest.raises(LookupError) as raised:
                await task.run(fail(waits))
            caught.append((raised.value.args[0], task.is_taken))

    run_once(loop, nursery)
    await wait_all_tasks_blocked()
    assert caught == [(False, False), (True, True)]


async def test_cancelling_the_scope_cancels_who_waits_and_not_the_loop(nursery: trio.Nursery) -> None:
    cleaned_up = []

    async def never() -> str:
        try:
            await trio.sleep_forever()
        finally:
            cleaned_up.append(True)
        raise AssertionError

    requests = Requests(never, at_once)
    run_loop(requests.loop, nursery.start_soon)
    await wait_all_tasks_blocked()
    requests.loop_tasks[0].scope.cancel()
    await wait_all_tasks_blocked()
    assert cleaned_up == [True]
    assert (requests.answers, requests.loop_tasks[0].scope.cancelled_caught) == (["at once"], True)
    assert not requests.loop_tasks[1].scope.cancel_called


async def test_loop_may_run_more_after_one_that_waited(nursery: trio.Nursery) -> None:
    """Cleaning up, for example; that begins no further task."""
    begun, done = [], []

    async def waits() -> int:
        await trio.lowlevel.checkpoint()
        return 1

    async def loop(task: LoopTask) -> None:
        begun.append(task)
        if len(begun) == 1:
            done.extend([await task.run(waits()), await task.run(waits())])

    run_loop(loop, nursery.start_soon)
    await wait_all_tasks_blocked()
    assert (len(begun), done) == (2, [1, 1])


def run_once(loop: Callable[[LoopTask], Awaitable[None]], nursery: trio.Nursery) -> None:
    """Run the first task of a loop only."""
    begun: list[LoopTask] = []

    async def first(task: LoopTask) -> None:
        if not begun:
            begun.append(task)
            await loop(task)

    run_loop(first, nursery.start_soon)


async def test_what_was_cancelled_is_not_left_to_the_garbage_collector(nursery: trio.Nursery) -> None:
    class Held:
        """Something of the handler's."""

    def held() -> int:
        return sum(isinstance(each, Held) for each in gc.get_objects())

    async def holds() -> str:
        here = Held()
        await trio.sleep_forever()
        return str(here)

    requests = Requests(holds)
    gc.disable()
    try:
        run_loop(requests.loop, nursery.start_soon)
        await wait_all_tasks_blocked()
        assert held() == 1
        requests.loop_tasks[0].scope.cancel()
        await wait_all_tasks_blocked()
        assert held() == 0
    finally:
        gc.enable()
