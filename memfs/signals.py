"""The meaning of signals to a mounted memfs: none of them leaves a mount or a socket that nobody serves.

    INT, TERM, QUIT, ABRT, TRAP, SYS, PWR   unmount and end
    HUP                                     open the log file anew (logrotate); without one, the terminal is gone: end
    USR1                                    log the state
    KILL, SEGV, BUS, FPE, ILL               the default: nothing can be done about it, or only in C
    others, of which most would kill        nothing

It does not matter which of them are ignored when we are started, as a shell ignores INT and QUIT for what its script
sends to the background: a signal that is sent to us is meant for us.
"""

from __future__ import annotations

import enum
import operator
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from signal import Signals
from typing import Final

import trio

_ENDING: Final = frozenset({
    Signals.SIGINT, Signals.SIGTERM, Signals.SIGQUIT, Signals.SIGABRT, Signals.SIGTRAP, Signals.SIGSYS, Signals.SIGPWR,
})  # fmt: skip
_LEFT_ALONE: Final = frozenset({
    *(Signals.SIGKILL, Signals.SIGSTOP),
    *(Signals.SIGSEGV, Signals.SIGBUS, Signals.SIGFPE, Signals.SIGILL),
    *(Signals.SIGCHLD, Signals.SIGCONT, Signals.SIGURG, Signals.SIGWINCH),
    *(Signals.SIGTSTP, Signals.SIGTTIN, Signals.SIGTTOU),
})  # fmt: skip

_FORWARDED: Final = _ENDING | {Signals.SIGHUP, Signals.SIGUSR1}

#: A handler in C. One in Python, as trio's, is interrupted by the next signal, and many signals are a RecursionError.
_DO_NOTHING: Final = operator.is_


class Meaning(enum.Enum):
    """What a signal asks for."""

    END = enum.auto()
    REOPEN_LOG = enum.auto()
    LOG_STATE = enum.auto()


@contextmanager
def receiving(*, logs_to_file: bool) -> Iterator[AsyncIterator[tuple[Meaning, str]]]:
    """Receive signals within the block: their meanings and names. Afterwards they do nothing; we are ending then."""
    on_hangup = Meaning.END if _has_terminal() and not logs_to_file else Meaning.REOPEN_LOG
    meanings: dict[int, Meaning] = dict.fromkeys(_ENDING, Meaning.END)
    meanings |= {Signals.SIGHUP: on_hangup, Signals.SIGUSR1: Meaning.LOG_STATE}
    for number in signal.valid_signals() - _LEFT_ALONE - meanings.keys():  # to ignore one loses those that wait
        signal.signal(number, signal.SIG_IGN)
    ours, pythons = socket.socketpair()
    with ours, pythons:
        pythons.setblocking(False)
        trios = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        try:
            for meant in meanings:
                signal.signal(meant, _DO_NOTHING)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, meanings)  # a keeper's (`Forwarded.fork`)
            yield ((meanings[number], Signals(number).name) async for number in _numbers(ours))
        finally:
            for meant in meanings:
                signal.signal(meant, signal.SIG_IGN)
            signal.set_wakeup_fd(trios, warn_on_full_buffer=False)


class Forwarded:
    """Signals that a process without an event loop passes on to the one that it is the parent of.

    They do nothing but wait to be taken, and so do those that come while there is no child: they are the next one's.
    """

    def __init__(self) -> None:
        for number in signal.valid_signals() - _LEFT_ALONE:
            signal.signal(number, signal.SIG_IGN)
        self._ours, self._pythons = socket.socketpair()
        self._ours.setblocking(False)
        self._pythons.setblocking(False)
        signal.set_wakeup_fd(self._pythons.fileno(), warn_on_full_buffer=False)
        for number in (*_FORWARDED, Signals.SIGCHLD):
            signal.signal(number, _DO_NOTHING)

    def fileno(self) -> int:
        """Return the descriptor that is readable when there are some, or a child has ended."""
        return self._ours.fileno()

    def take(self) -> Iterator[tuple[int, bool]]:
        """Generate the numbers of those that have come, and whether each asks for the end."""
        try:
            numbers = self._ours.recv(4096)
        except BlockingIOError:
            return
        for number in dict.fromkeys(numbers):
            if number in _FORWARDED:
                yield number, number in _ENDING

    def fork(self) -> int:
        """Fork. In the child they wait until it can receive them (`receiving`), and those of the parent are not its."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
        try:
            pid = os.fork()
            if pid:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
                return pid
        except OSError:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
            raise
        signal.set_wakeup_fd(-1)
        self._ours.close()
        self._pythons.close()
        for number in (*_FORWARDED, Signals.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        return 0


async def _numbers(wakeups: socket.socket) -> AsyncIterator[int]:
    while True:
        await trio.lowlevel.wait_readable(wakeups)
        for number in dict.fromkeys(wakeups.recv(4096)):
            yield number


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
