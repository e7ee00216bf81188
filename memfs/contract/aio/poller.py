"""A poller: one task per event loop that reads all connections, by calling the reader of each.

A task for each connection would cost, for each message, an event-loop iteration and a system call to wait for the next
one; and with a thousand connections every message is for another one.

A reader runs eagerly (eager.py): if it has to wait, the task becomes the reader's, and another task goes on polling. So
a reader holds up nobody, and one that does not wait costs nothing.

A conversion is a handful of small messages between processes that wait for each other. So a reader that expects another
message has the poller busy-poll for it (busy_poll.py), between the steps of other tasks, before it sleeps.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Coroutine
from typing import Any, Final

import trio

from memfs.contract.aio.busy_poll import BusyPoll
from memfs.contract.aio.eager import Turn, run_loop

#: Reads what there is to read, in a turn of the poller's. Returns whether another task has something to do because of
#: it. Raises nothing
Reader = Callable[[Turn], Coroutine[Any, Any, bool]]

_CALLS: Final = 32  # of readers before other tasks run in any case
_MAX_POLL: Final = 1200e-6  # seconds: as long as a VMM that converts much memory takes from one request to the next


class Poller:
    """All descriptors of an event loop that have readers. One for each `trio.run`: `Poller.here`."""

    def __init__(self, busy_poll: BusyPoll | None = None) -> None:
        self._epoll: Final = select.epoll()
        self._readers: Final[dict[int, Reader]] = {}
        self._is_reading = False
        self._busy_poll: Final = busy_poll or BusyPoll(_MAX_POLL)

    @classmethod
    def here(cls) -> Poller:
        """Return the poller of the event loop that is running."""
        try:
            return _here.get()
        except LookupError:
            poller = cls()
            _here.set(poller)
            return poller

    def read(self, fd: int, reader: Reader) -> None:
        """Call a reader whenever there is something to read from a descriptor, until `remove`. Raises OSError."""
        self._epoll.register(fd, select.EPOLLIN)
        self._readers[fd] = reader
        if not self._is_reading:
            self._is_reading = True
            run_loop(self._run, trio.lowlevel.spawn_system_task)

    def remove(self, fd: int) -> None:
        """Call a descriptor's reader no more, if it has one. To be called before the descriptor is closed."""
        if self._readers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def expect(self) -> None:
        """Busy-poll before sleeping next time: something else will probably come soon."""
        self._busy_poll.start()

    async def _run(self, turn: Turn) -> None:
        """Read until a reader has to wait."""
        while not turn.is_over:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            await self._read(turn)

    async def _read(self, turn: Turn) -> None:
        """Read until there is nothing more to read, and no more to be expected."""
        calls = 0  # of readers since other tasks ran
        while True:
            ready = self._epoll.poll(0, _CALLS)
            if ready:
                self._busy_poll.stop()
            elif not self._busy_poll.goes_on():
                return
            wakes = not ready
            for fd, _ in ready:
                reader = self._readers.get(fd)  # one before it may have had it removed
                if reader is not None:
                    wakes |= await reader(turn)
                    if turn.is_over:
                        return
            calls += len(ready)
            if wakes or calls >= _CALLS:
                await trio.lowlevel.checkpoint()
                calls = 0


_here: trio.lowlevel.RunVar[Poller] = trio.lowlevel.RunVar("poller")
