"""A poller: one task per event loop that reads all connections, by calling the reader of each.

A task for each connection would cost, for each message, an event-loop iteration and a system call to wait for the next
one; and with a thousand connections every message is for another one.

A reader runs eagerly (eager.py): if it has to wait, the task becomes the reader's, and another task goes on polling. So
a reader holds up nobody, and one that does not wait costs nothing.

Messages are read one from each descriptor, in turns by user: whose turn was the longest ago comes first, however many
descriptors another user has. When as much work is done as is one user's share (turns.py), other tasks run.

A conversion is a handful of small messages between processes that wait for each other. So a reader that expects another
message has the poller busy-poll for it (busy_poll.py), between the steps of other tasks, before it sleeps. Between two
steps it looks twice, before and after other processes may have had the CPU: an event-loop iteration takes longer than
most of what is done because of a message.
"""

from __future__ import annotations

import itertools
import select
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from memfs.contract.aio.busy_poll import BusyPoll
from memfs.contract.aio.eager import LoopTask, run_loop
from memfs.contract.aio.turns import SHARE, Turns

#: Reads what there is to read, in the poller's task. Returns whether another task has something to do because of
#: it. Raises nothing
Reader = Callable[[LoopTask], Coroutine[Any, Any, bool]]

_EVENTS: Final = 256  # at which the poller looks at once
_MAX_POLL: Final = 1200e-6  # seconds: as long as a VMM that converts much memory takes from one request to the next


@dataclass(slots=True, eq=False)
class _User:
    """Whoever has descriptors."""

    name: Hashable
    descriptors: int = 0
    last_turn: int = 0  # the number of it


class Poller:
    """All descriptors of an event loop that have readers. One for each `trio.run`: `Poller.here`."""

    def __init__(self, busy_poll: BusyPoll | None = None) -> None:
        self._epoll: Final = select.epoll()
        self._readers: Final[dict[int, tuple[Reader, _User]]] = {}
        self._users: Final[dict[Hashable, _User]] = {}
        self._turn = 0  # how many readers were called
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

    def read(self, fd: int, reader: Reader, user: Hashable = None) -> None:
        """Call a reader whenever there is something to read from a descriptor, until `remove`. Raises OSError.

        `user` is whose turn that is.
        """
        self._epoll.register(fd, select.EPOLLIN)
        known = self._users.setdefault(user, _User(user))
        known.descriptors += 1
        self._readers[fd] = reader, known
        if not self._is_reading:
            self._is_reading = True
            run_loop(self._run, trio.lowlevel.spawn_system_task)

    def remove(self, fd: int) -> None:
        """Call a descriptor's reader no more, if it has one. To be called before the descriptor is closed."""
        reader = self._readers.pop(fd, None)
        if reader is not None:
            self._epoll.unregister(fd)
            _, user = reader
            user.descriptors -= 1
            if not user.descriptors:
                del self._users[user.name]

    def expect(self) -> None:
        """Busy-poll before sleeping next time: something else will probably come soon."""
        self._busy_poll.start()

    async def _run(self, task: LoopTask) -> None:
        """Read until a reader has to wait."""
        while not task.is_taken:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            await self._read(task)

    async def _read(self, task: LoopTask) -> None:
        """Read until there is nothing more to read, and no more to be expected."""
        turns = Turns.here()
        begun = turns.total  # when other tasks ran last
        while True:
            self._busy_poll.yield_first()
            events = self._epoll.poll(0, _EVENTS)
            if not events:
                if not self._busy_poll.goes_on():
                    return
                events = self._epoll.poll(0, _EVENTS)  # other processes have had the CPU
            if not events:
                await trio.lowlevel.checkpoint()
                begun = turns.total
                continue
            self._busy_poll.stop()
            wakes = False
            for fd in self._in_turn(events):
                reader, user = self._readers.get(fd, (None, None))  # one before it may have had it removed
                if reader is None or user is None:
                    continue
                self._turn += 1
                user.last_turn = self._turn
                turns.spend(user.name)
                wakes |= await reader(task)
                if task.is_taken:
                    return
                if turns.total - begun >= SHARE:
                    break
            if wakes or turns.total - begun >= SHARE:
                await trio.lowlevel.checkpoint()
                begun = turns.total

    def _in_turn(self, events: Sequence[tuple[int, int]]) -> list[int]:
        """Return the descriptors that are ready in the order of their users' turns: one of each, then a second."""
        if len(events) == 1:
            return [events[0][0]]
        theirs: dict[_User, list[int]] = {}
        for fd, _ in events:
            theirs.setdefault(self._readers[fd][1], []).append(fd)
        in_order = [theirs[user] for user in sorted(theirs, key=lambda user: user.last_turn)]
        return [fd for turn in itertools.zip_longest(*in_order) for fd in turn if fd is not None]


_here: trio.lowlevel.RunVar[Poller] = trio.lowlevel.RunVar("poller")
