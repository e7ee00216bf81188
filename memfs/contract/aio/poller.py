"""Where the connections of an event loop are read, by one task that calls whoever a message is for.

A task for each connection would cost, for each message, a turn of the loop and a system call to wait for the next one;
and with a thousand connections every message is another one's.

A conversion is a handful of small messages between processes that wait for each other. To sleep and be woken takes
longer than most answers do, above all on another CPU, which goes idle meanwhile and is woken through the hypervisor. So
whoever expects another message has this task look for it, between the turns of other tasks, before it sleeps.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

import trio

#: Called when there is something to read. Returns whether a task has something to do because of it
Reader = Callable[[], bool]

_CALLS = 32  # of readers before tasks get a turn in any case


class Poller:
    """All descriptors of an event loop that have readers. One for each `trio.run`: `Poller.here`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Reader] = {}
        self._is_reading = False
        self._stay_until = 0.0  # by time.perf_counter

    @classmethod
    def here(cls) -> Poller:
        """That of the event loop which is running."""
        try:
            return _here.get()
        except LookupError:
            poller = cls()
            _here.set(poller)
            return poller

    def read(self, fd: int, reader: Reader) -> None:
        """Whenever there is something to read from a descriptor, call who reads it. Until `remove`; raises OSError."""
        self._epoll.register(fd, select.EPOLLIN)
        self._readers[fd] = reader
        if not self._is_reading:
            self._is_reading = True
            trio.lowlevel.spawn_system_task(self._run)

    def remove(self, fd: int) -> None:
        """Call nobody any more; there need not be anybody. To be called before the descriptor is closed."""
        if self._readers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def stay(self, seconds: float) -> None:
        """Something else will probably come so soon: look for it before sleeping."""
        self._stay_until = time.perf_counter() + seconds

    async def _run(self) -> None:
        """Read, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            calls = 0  # of readers since tasks had a turn
            while True:
                ready = self._epoll.poll(0, _CALLS)
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


_here: trio.lowlevel.RunVar[Poller] = trio.lowlevel.RunVar("poller")
