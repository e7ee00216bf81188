"""Deadlines for others, which pass only while this process runs.

An owner has so many seconds to answer, or it is fenced. If the daemon itself stands still for longer than that
(SIGSTOP, a frozen cgroup, a virtual machine that is paused), then the owner most likely did so as well, and nobody
could have heard its answer. So the time is counted by a task that ticks for as long as there is a deadline: a tick that
comes late says that there was a standstill, and then all deadlines are given again, from their beginning.

Rejected: trio's deadlines (they expire before anything else runs after a standstill); CLOCK_BOOTTIME and the like (a
stopped process has no clock of its own).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

_TICK: Final = 0.05  # seconds
_STANDSTILL: Final = 0.2  # seconds that a tick comes late


class Deadlines:
    """The deadlines of an event loop. One for each `trio.run`: `Deadlines.here`."""

    def __init__(self) -> None:
        # By how many seconds they are: those that wait, the earliest first, and when that is over.
        self._waiting: Final[dict[float, dict[trio.CancelScope, float]]] = {}
        self._is_ticking = False

    @classmethod
    def here(cls) -> Deadlines:
        """Return those of the event loop that is running."""
        try:
            return _here.get()
        except LookupError:
            deadlines = cls()
            _here.set(deadlines)
            return deadlines

    @contextmanager
    def fail_after(self, seconds: float) -> Iterator[None]:
        """Raise trio.TooSlowError unless a block ends within so many seconds. It cannot be cancelled otherwise."""
        with trio.CancelScope(shield=True) as scope:
            self._add(scope, seconds)
            try:
                yield
            finally:
                self._remove(scope, seconds)
        if scope.cancelled_caught:
            raise trio.TooSlowError

    def _add(self, scope: trio.CancelScope, seconds: float) -> None:
        self._waiting.setdefault(seconds, {})[scope] = trio.current_time() + seconds
        if not self._is_ticking:
            self._is_ticking = True
            trio.lowlevel.spawn_system_task(self._tick)

    def _remove(self, scope: trio.CancelScope, seconds: float) -> None:
        waiting = self._waiting.get(seconds, {})
        waiting.pop(scope, None)
        if not waiting:
            self._waiting.pop(seconds, None)

    async def _tick(self) -> None:
        try:
            while self._waiting:
                first = min(next(iter(waiting.values())) for waiting in self._waiting.values())
                tick = min(first, trio.current_time() + _TICK)
                await trio.sleep_until(tick)
                now = trio.current_time()
                if now - tick > _STANDSTILL:
                    self._give_again(now)
                self._end_overdue(now)
        finally:
            self._is_ticking = False

    def _give_again(self, now: float) -> None:
        for seconds, waiting in self._waiting.items():
            for scope in waiting:
                waiting[scope] = now + seconds

    def _end_overdue(self, now: float) -> None:
        for waiting in self._waiting.values():
            for scope, until in waiting.items():
                if until > now:
                    break
                scope.cancel()


_here: trio.lowlevel.RunVar[Deadlines] = trio.lowlevel.RunVar("deadlines")
