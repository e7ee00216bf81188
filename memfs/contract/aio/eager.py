"""Eager tasks: a coroutine is run immediately until it first waits, and becomes a task only then.

What does not wait costs neither a task nor an event-loop iteration, and is done before whatever comes next; what waits
holds up nobody. asyncio has this under the same name (asyncio.eager_task_factory).

trio cannot move a coroutine that has begun to another task: what it waits for knows the task, and its cancel scopes lie
on that task's stack. So it is done the other way round. A task that runs a loop (reading requests, say) runs the
handlers itself. When a handler waits, the task is that handler's from then on, and the loop goes on in a new task:

    async def loop(task: LoopTask) -> None:
        while not task.is_taken:
            request = await receive()
            await task.run(handle(request))

    run_loop(loop, nursery.start_soon)

Rejected: to predict whether a handler will wait (the prediction has to be kept true with all that it calls, and a wrong
one stops a handler in the middle); handlers that return a value or a coroutine (each caller handles both).
"""

from __future__ import annotations

import contextvars
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Final, TypeVar

import trio

_T = TypeVar("_T")


def _nothing() -> None:
    """Do nothing."""


class LoopTask:
    """A task that runs a loop until something that the loop runs waits.

    `scope` surrounds the loop: to cancel it cancels a handler that waits. Once the task `is_taken`, by such a handler,
    the loop goes on in another task and has to return in this one.
    """

    __slots__ = ("_go_on", "is_taken", "scope")

    def __init__(self, go_on: Callable[[], None]) -> None:
        self._go_on: Final = go_on
        self.scope: Final = trio.CancelScope()
        self.is_taken = False

    async def run(self, work: Coroutine[Any, Any, _T], waits: Callable[[], object] = _nothing) -> _T:
        """Run a coroutine and return its result. Raises what it raises.

        If it waits, the loop goes on in another task, and `waits` is called, once, before it waits.
        """
        try:
            trap = work.send(None)
        except StopIteration as end:
            result: _T = end.value
            return result
        waits()
        return await self.rest(work, trap)

    async def rest(self, work: Coroutine[Any, Any, _T], trap: object) -> _T:
        """Return the result of a coroutine that has begun, and asked the event loop for `trap`.

        It is for a loop that makes the first step itself, to save a call where most of what it runs does not wait.
        """
        if not self.is_taken:
            self.is_taken = True
            self._go_on()
        return await drive(work, trap)


def run_loop(loop: Callable[[LoopTask], Awaitable[None]], spawn: Callable[..., object]) -> None:
    """Run a loop as a task, and as another one each time that what it runs waits.

    `spawn` is like `nursery.start_soon`. Each task runs in a copy of the present context, not of the context of the
    handler that waits.
    """
    context = contextvars.copy_context()

    async def run() -> None:
        task = LoopTask(go_on)
        with task.scope:
            await loop(task)

    def go_on() -> None:
        context.run(spawn, run)

    go_on()


@types.coroutine
def drive(work: Coroutine[Any, Any, _T], trap: object) -> Generator[Any, Any, _T]:
    """Await the rest of a coroutine that has begun, and asked the event loop for `trap`."""
    try:
        while True:
            try:
                resumed_with = yield trap
            except BaseException as error:  # for the coroutine to handle
                trap = work.throw(error)
            else:
                try:
                    trap = work.send(resumed_with)
                finally:
                    del resumed_with  # if it is an exception, a cycle with its traceback
    except StopIteration as end:
        result: _T = end.value
        return result
