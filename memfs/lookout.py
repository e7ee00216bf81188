"""Where the sockets of an event loop are read, and looking for work a moment longer before the process sleeps.

A conversion is a handful of small messages between processes that wait for each other. To sleep and be woken takes
longer than most answers do, above all on another CPU, which goes idle meanwhile and is woken through the hypervisor. So
who knows that something is about to come looks for it first, for about as long as that takes.

While it looks nothing else of its process runs. So it looks for everything that could come, on any socket of the event
loop it runs in, and whatever comes first ends it; and who has threads at work does not look at all.

For the same reason one task reads all connections, and calls whoever a message is for: a task for each would cost, for
each message, a turn of the loop and a system call to wait for the next one, and with a thousand connections every
message is another one's.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable

import trio

#: Called when there is something to read. Returns whether a task has something to do because of it
Reader = Callable[[], bool]

_CALLS = 32  # of readers before tasks get a turn in any case


class Lookout:
    """All descriptors of an event loop through which work comes. One for each `trio.run`: `Lookout.here`."""

    def __init__(self) -> None:
        self._all = select.epoll()
        self._read = select.epoll()  # those that have readers
        self._readers: dict[int, Reader] = {}
        self._is_reading = False
        self._stay_until = 0.0  # by time.perf_counter

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
        self._all.register(fd, select.EPOLLIN)

    def read(self, fd: int, reader: Reader | None) -> None:
        """Whenever there is something to read from a descriptor, call who reads it; None: nobody for now."""
        if reader is None:
            del self._readers[fd]
            self._read.unregister(fd)
            return
        self._readers[fd] = reader
        self._read.register(fd, select.EPOLLIN)
        if not self._is_reading:
            self._is_reading = True
            trio.lowlevel.spawn_system_task(self._run)

    def remove(self, fd: int) -> None:
        """Do not look at it any more. To be called before it is closed; afterwards there is nothing left to do."""
        self._readers.pop(fd, None)
        for epoll in (self._all, self._read):
            with contextlib.suppress(OSError):
                epoll.unregister(fd)

    def look(self, seconds: float) -> bool:
        """Wait without sleeping until something can be read. Whether that happened in time."""
        return _look(self._all, seconds)

    def stay(self, seconds: float) -> None:
        """Something else will probably come so soon: who reads is to look for it before it sleeps."""
        self._stay_until = time.perf_counter() + seconds

    async def _run(self) -> None:
        """Read, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._read.fileno())
            calls = 0  # of readers since tasks had a turn
            while True:
                ready = self._read.poll(0, _CALLS)
                turn = not ready
                for fd, _ in ready:
                    reader = self._readers.get(fd)  # one before it may have had it removed
                    turn |= reader is not None and reader()
                calls += len(ready)
                if not ready and time.perf_counter() >= self._stay_until:
                    break
                if turn or calls >= _CALLS:
                    await trio.lowlevel.checkpoint()
                    calls = 0
                if not ready:
                    os.sched_yield()


def _look(epoll: select.epoll, seconds: float) -> bool:
    deadline = time.perf_counter() + seconds
    while not epoll.poll(0, 1):
        if time.perf_counter() >= deadline:
            return False
        os.sched_yield()
    return True


_here: trio.lowlevel.RunVar[Lookout] = trio.lowlevel.RunVar("lookout")
