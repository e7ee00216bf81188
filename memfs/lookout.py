"""Looking for work a moment longer before the process sleeps.

A conversion is a handful of small messages between processes that wait for each other. To sleep and be woken takes
longer than most answers do, above all on another CPU, which goes idle meanwhile and is woken through the hypervisor. So
who knows that something is about to come looks for it first, for about as long as that takes.

While it looks nothing else of its process runs. So it looks for everything that could come, on any socket of the event
loop it runs in, and whatever comes first ends it; and who has threads at work does not look at all.
"""

from __future__ import annotations

import contextlib
import os
import select
import time

import trio


class Lookout:
    """All descriptors of an event loop through which work comes. One for each `trio.run`: `Lookout.here`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()

    @classmethod
    def here(cls) -> Lookout:
        """That of the event loop which is running."""
        try:
            return _here.get()
        except LookupError:
            lookout = cls()
            _here.set(lookout)
            return lookout

    def add(self, fd: int) -> None:
        """Look at a descriptor, too, until `remove`."""
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Do not look at it any more. To be called before it is closed; afterwards there is nothing left to do."""
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    def look(self, seconds: float) -> bool:
        """Wait without sleeping until something can be read. Whether that happened in time."""
        deadline = time.perf_counter() + seconds
        while not self._epoll.poll(0, 1):
            if time.perf_counter() >= deadline:
                return False
            os.sched_yield()
        return True


_here: trio.lowlevel.RunVar[Lookout] = trio.lowlevel.RunVar("lookout")


def has_threads_at_work() -> bool:
    """Whether a thread of this event loop is doing something, whose end is worth more than what may come."""
    return trio.to_thread.current_default_thread_limiter().borrowed_tokens > 0
