"""A command on a terminal of 80 columns and 24 lines, whose keys a test presses."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Sequence

from .conftest import STOP_TIMEOUT


class Terminal:
    """A command that runs on a terminal within a with statement."""

    def __init__(self, command: Sequence[str]) -> None:
        self.shown = b""  #: all that the command has written
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
                os.environ.update(TERM="xterm-256color")
                os.environ.pop("COLUMNS", None)
                os.execvp(command[0], list(command))
            finally:
                os._exit(127)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)  # a hangup, if it still runs
        if self._pid:
            os.waitpid(self._pid, 0)

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, words: str) -> bytes:
        """Return what is written up to words, from now on."""
        start, deadline = len(self.shown), time.monotonic() + STOP_TIMEOUT
        while words.encode() not in self.shown[start:]:
            left = deadline - time.monotonic()
            assert left > 0, f"{words!r} is not in {self.shown[start:]!r}"
            if select.select([self._fd], [], [], left)[0]:
                self.shown += os.read(self._fd, 1 << 16)
        return self.shown[start:]

    def end(self) -> int:
        """Return its exit code when it has ended."""
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline:
            try:
                if not (more := os.read(self._fd, 1 << 16)):
                    break
                self.shown += more
            except OSError:  # EIO: nobody has it open any more
                break
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)
