"""Keys that are pressed on a terminal, one by one, as `memfs top` reads them."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_SEQUENCES: Final = {"\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down", "\x1b": "escape"}
_NAMES: Final = {"\t": "tab", "\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace"}


@contextmanager
def unbuffered() -> Iterator[None]:
    """Have keys arrive as they are pressed, and unseen, also after a stop; in the end, as before."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    continued = signal.signal(signal.SIGCONT, lambda *_: tty.setcbreak(fd))
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, continued)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def pressed(seconds: float) -> list[str]:
    """Return which keys are pressed within so many seconds: characters, or names of keys. Soon, once one is.

    Raises EOFError when the terminal is gone.
    """
    fd = sys.stdin.fileno()
    if not select.select([fd], [], [], max(0.0, seconds))[0]:
        return []
    data = os.read(fd, 256)
    if not data:
        raise EOFError
    text = data.decode(errors="ignore")
    if text in _SEQUENCES:
        return [_SEQUENCES[text]]
    return [_NAMES.get(key, key) for key in text if key.isprintable() or key in _NAMES]
