"""The thread that makes the file calls of a VMM.

A call that converts memory returns when KVM has acknowledged, which the event loop does; so another thread has to make
it, and the way there and back is part of what a guest waits for. A conversion is one call, handed over once, to a
thread that stays; meanwhile the event loop busy-polls for the notification that it is to acknowledge (poller.py), so
that it is awake when the thread comes back.

Measured, there and back with a call of nothing between: 39 us, of which the event loop's own two iterations are half;
`trio.to_thread.run_sync` 60 to 67, since it asks a limiter first, for one more iteration. Rejected as well:

- io_uring, whose kernel threads need neither the GIL nor a wake-up of ours: it has fallocate(2) and no ioctl(2), and is
  forbidden in many containers.
- A process that makes the calls, which has a GIL of its own: as fast as the thread, within what the machine varies, for
  20 ms and 8 MiB a VM and a second life to look after.
- An eventfd in the poller instead of trio's own wake-up: 33 us, for a descriptor with a lifetime of its own.
- To have the thread spin for the next call: 30 us, and a CPU that the guest could have.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Final, Generic, TypeVar, cast

import trio

from memfs.contract.aio.poller import Poller

_T = TypeVar("_T")


class FileCalls:
    """A thread that makes calls one after the other. It begins with the first, and ends with this object."""

    def __init__(self) -> None:
        self._calls: Final[queue.SimpleQueue[_Call[object] | None]] = queue.SimpleQueue()
        self._has_begun = False
        weakref.finalize(self, self._calls.put, None)

    async def call(self, function: Callable[[], _T]) -> _T:
        """Call a function in the thread, and return what it returns. Raises what it raises.

        What has begun cannot be cancelled.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._has_begun:
            threading.Thread(target=_make, args=(self._calls,), name="file calls", daemon=True).start()
            self._has_begun = True
        call = _Call(function)
        self._calls.put(cast("_Call[object]", call))
        Poller.here().expect()
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return call.result()


class _Call(Generic[_T]):
    """A call that the current task waits for."""

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function: Final = function
        self._task: Final = trio.lowlevel.current_task()
        self._token: Final = trio.lowlevel.current_trio_token()
        self._value: _T | None = None
        self._error: BaseException | None = None

    def make(self) -> None:
        """Make it, and wake the task."""
        try:
            self._value = self._function()
        except BaseException as error:  # the task's, whatever it is
            self._error = error
        self._token.run_sync_soon(trio.lowlevel.reschedule, self._task)

    def result(self) -> _T:
        """Return or raise what the function did."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # a cycle with its traceback
        return cast("_T", self._value)


def _make(calls: queue.SimpleQueue[_Call[object] | None]) -> None:
    while (call := calls.get()) is not None:
        call.make()
        del call  # while nothing is to be done, nothing of the last call is kept
