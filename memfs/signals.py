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
from collections.abc import AsyncIterator, Callable, Iterator
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
    for number in signal.valid_signals() - _LEFT_ALONE:
        signal.signal(number, signal.SIG_IGN)
    ours, pythons = socket.socketpair()
    with ours, pythons:
        pythons.setblocking(False)
        trios = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        try:
            for meant in meanings:
                signal.signal(meant, _DO_NOTHING)
            yield ((meanings[number], Signals(number).name) async for number in _numbers(ours))
        finally:
            for meant in meanings:
                signal.signal(meant, signal.SIG_IGN)
            signal.set_wakeup_fd(trios, warn_on_full_buffer=False)


def forward_to(forward: Callable[..., None]) -> None:
    """Pass signals on from now on: `forward` is called with the number, and `ends`: whether it asks for the end.

    Those that mean nothing are ignored, from now on.
    """

    def receive(number: int, _: object) -> None:
        forward(number, ends=number in _ENDING)

    for number in signal.valid_signals() - _LEFT_ALONE:
        signal.signal(number, signal.SIG_IGN)
    for number in (*_ENDING, Signals.SIGHUP, Signals.SIGUSR1):
        signal.signal(number, receive)


def undo_forwarding() -> None:
    """Have the signals that were forwarded do what they do by default, in a process that was forked."""
    for number in (*_ENDING, Signals.SIGHUP, Signals.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


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
