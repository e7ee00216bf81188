"""Threads: what takes long without the event loop is done in one, and of those each user has a share.

A thread that allocates or looks at memory takes all of a CPU, and there are few of those. trio lends its threads to who
asks first: with 40 long fallocates of one user under way, another user's would wait for them. So what a user has beyond
its share waits for that user's threads and for nobody else's.

For whom something is done is a context variable, as the number of the request is (logs.py): code that works on pages,
in whichever task, need not pass it on. It is asked for only when a thread is needed, since to know which user a process
is may take longer than most requests.

Rejected: a share for each file (a user has as many as it likes); a thread for each call (a user would have hundreds,
and a machine has an end).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable
from contextvars import ContextVar, Token
from typing import Final, TypeVar

import trio

#: of one user: while they all compute, there are CPUs left for the event loop and for others
THREADS: Final = max(1, min(16, (os.cpu_count() or 1) // 2))

_T = TypeVar("_T")

#: says which user the present task works for; None: nobody but the process itself
_user: ContextVar[Callable[[], Hashable]] = ContextVar("user", default=lambda: None)


class NoThread(OSError):
    """EAGAIN: the machine, or a limit, lets memfs have no more threads."""

    def __init__(self) -> None:
        super().__init__(errno.EAGAIN, "memfs can have no thread for that")


class working_for:
    """The user whose threads are taken within the block, and in tasks that it starts. `user` is asked when it counts.

    >>> with working_for(lambda: "alice"):
    ...     current_user()
    'alice'
    """

    __slots__ = ("_token", "_user")
    _token: Token[Callable[[], Hashable]]

    def __init__(self, user: Callable[[], Hashable]) -> None:
        self._user: Final = user

    def __enter__(self) -> None:
        self._token = _user.set(self._user)

    def __exit__(self, *_: object) -> None:
        _user.reset(self._token)


def current_user() -> Hashable:
    """Return the user that the present task works for; None if that is the process itself."""
    return _user.get()()


class Threads:
    """The shares of an event loop. One for each `trio.run`: `Threads.here`."""

    def __init__(self) -> None:
        self.shares: Final[dict[Hashable, trio.CapacityLimiter]] = {}  #: by user that has any, or waits for one

    @classmethod
    def here(cls) -> Threads:
        """Return those of the event loop that is running."""
        try:
            return _here.get()
        except LookupError:
            threads = cls()
            _here.set(threads)
            return threads

    async def run(self, function: Callable[[], _T]) -> _T:
        """Run a function in a thread of the user that the task works for, and return what it returns.

        Can be cancelled while it waits for a thread, and then not any more. Raises NoThread, and what the function
        raises.
        """
        user = current_user()
        share = self.shares.setdefault(user, trio.CapacityLimiter(THREADS))
        try:
            failure = await trio.to_thread.run_sync(_call, function, result := list[_T](), limiter=share)
        except RuntimeError as error:  # Python's for EAGAIN
            raise NoThread from error
        finally:
            if not share.borrowed_tokens and not share.statistics().tasks_waiting:
                self.shares.pop(user, None)
        if failure is None:
            return result[0]
        try:
            raise failure
        finally:
            del failure  # which knows this frame now


def _call(function: Callable[[], _T], result: list[_T]) -> OSError | None:
    """Call a function for its result. Returns its error, without the thread's frames: they are in cycles of trio's."""
    try:
        result.append(function())
    except OSError as error:
        return error.with_traceback(None)
    return None


_here: trio.lowlevel.RunVar[Threads] = trio.lowlevel.RunVar("threads")
