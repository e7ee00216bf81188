"""Turns: how much the event loop does for one user before others have theirs.

One thread does everything, so what is done without a checkpoint holds up everybody. What is done is counted, in units
of work: a message or a request is one, some 30 us, and what looks at many things counts as more (`spend`). In an
event-loop iteration each user has a share, about a millisecond; what is beyond that waits for a later iteration, behind
what the same user has asked before, and holds up nobody else. With nobody else to be served, the next iteration comes
immediately, so a share costs a user nothing that others do not need.

Work is counted when it is done rather than foreseen. So nothing may do more at once than a share: what is longer is
done in parts that each `take` their turn.

Rejected: a clock (what a test cannot foresee, and a busy machine makes into noise); a task for each user (two
event-loop iterations for each request, of which most have the loop for themselves).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

import trio

SHARE: Final = 32  #: units that are done for a user in one event-loop iteration, about a millisecond


class _Iterations(trio.abc.Instrument):
    """Counts event-loop iterations."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


class Turns:
    """The shares of an event loop. One for each `trio.run`: `Turns.here`. A user is whatever can be hashed."""

    def __init__(self) -> None:
        self.total = 0  #: units of work that were ever done
        self._iterations: Final = _Iterations()
        self._iteration = 0  # in which `_spent` counts
        self._spent: Final[dict[Hashable, int]] = {}  # units, by user
        self._queues: Final[dict[Hashable, trio.Lock]] = {}  # of tasks that wait for their turn, by user
        trio.lowlevel.add_instrument(self._iterations)

    @classmethod
    def here(cls) -> Turns:
        """Return those of the event loop that is running."""
        try:
            return _here.get()
        except LookupError:
            turns = cls()
            _here.set(turns)
            return turns

    def spend(self, user: Hashable, units: int = 1) -> None:
        """Count work that was done, or is about to be done, for a user."""
        self._begin_iteration()
        self.total += units
        self._spent[user] = self._spent.get(user, 0) + units

    def has_share(self, user: Hashable) -> bool:
        """Return whether something is left of a user's share in this iteration."""
        self._begin_iteration()
        return self._spent.get(user, 0) < SHARE

    async def take(self, user: Hashable, units: int = 1) -> None:
        """Wait for a user's turn, behind others of the same user, and count work that is to be done then.

        Does not yield if something is left of its share.
        """
        queue = self._queues.get(user)
        if queue is None and self.has_share(user):
            self.spend(user, units)
            return
        if queue is None:
            queue = self._queues[user] = trio.Lock()
        try:
            async with queue:
                while not self.has_share(user):
                    await trio.lowlevel.checkpoint()
                self.spend(user, units)
        finally:
            if not queue.locked() and self._queues.get(user) is queue:
                del self._queues[user]

    def _begin_iteration(self) -> None:
        if self._iteration != self._iterations.count:
            self._iteration = self._iterations.count
            self._spent.clear()


_here: trio.lowlevel.RunVar[Turns] = trio.lowlevel.RunVar("turns")
