"""Calls that may never return, made in threads that are not waited for.

A daemon may be stopped, and a system call on its mount cannot be given up; not even a signal's handler runs before it
returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Final, Generic, TypeVar

from memfs.cli.command import CommandError

_T = TypeVar("_T")

TIMEOUT: Final = 3.0  #: seconds
NO_ANSWER: Final = "does not answer (is it stopped?)"


class TimedCall(Generic[_T]):
    """Calls a function in a thread, which is at most one at a time, whether or not it ever returns."""

    def __init__(self, what: str, function: Callable[[], _T]) -> None:
        self._what: Final = what
        self._function: Final = function
        self._call: _Call[_T] | None = None
        self._is_late = False  # the call that is running has been waited for in vain

    def start(self) -> None:
        """Call it, unless a call is running."""
        if self._call is None:
            self._call = _Call(self._function)

    def result(self, deadline: float) -> _T:
        """Wait for what it returns, or raises; CommandError if it does not until a deadline (time.monotonic).

        A call is waited for once: if it has not returned then, the next time only whether it has by now is seen.
        """
        self.start()
        call = self._call
        assert call is not None
        call.join(0.0 if self._is_late else max(0.0, deadline - monotonic()))
        self._is_late = call.is_alive()
        if self._is_late:
            raise CommandError(f"{self._what}: {NO_ANSWER}")
        self._call = None
        if call.error is not None:
            raise call.error
        return call.outcome[0]

    def call(self) -> _T:
        """Call it and wait for what it returns, for a few seconds at most."""
        return self.result(monotonic() + TIMEOUT)


class _Call(threading.Thread, Generic[_T]):
    def __init__(self, function: Callable[[], _T]) -> None:
        super().__init__(daemon=True)
        self._function_called: Final = function
        self.outcome: list[_T] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Call the function."""
        try:
            self.outcome.append(self._function_called())
        except Exception as error:  # who waits for it raises it
            self.error = error
