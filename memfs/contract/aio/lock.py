"""A lock for what most callers find free, and which many thousands of files have.

trio.Lock notes who has it, to tell those who wait when that task has ended without releasing it, and that takes as long
as what most do while they have the lock. Here it is always released by a with statement, so nobody has to be told.
"""

from __future__ import annotations

import trio


class Lock:
    """A lock that waiting tasks get in the order in which they came. Within a task it cannot be had twice."""

    __slots__ = ("_is_taken", "_waiting")

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: trio.lowlevel.ParkingLot | None = None  # that of a lock which nobody ever waited for

    @property
    def is_taken(self) -> bool:
        """Whether a task has it."""
        return self._is_taken

    async def acquire(self) -> None:
        """Take the lock. Yields only if another task has it; cancelled, it is not taken."""
        if not self._is_taken:
            self._is_taken = True
            return
        self._waiting = self._waiting or trio.lowlevel.ParkingLot()
        await self._waiting.park()  # who releases it leaves it taken, for us

    def release(self) -> None:
        """Give the lock to who has waited longest, if anybody does."""
        if self._waiting:
            self._waiting.unpark()
        else:
            self._is_taken = False
