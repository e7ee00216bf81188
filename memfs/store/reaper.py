"""Large files that nobody has any more: emptied in pieces, one after the other, beside everything else.

To free a gibibyte takes the kernel a tenth of a second, and it does that wherever the last reference goes: when a name
is removed, a handle is closed or an owner dies. In the event loop that would hold up everybody. So a large file is
emptied first (file.py does that in threads), and closing it is then nothing.

Until then its memory is in use, which on tmpfs it is not when unlink(2) has returned. So whom that concerns waits
(`settled`): who asks how much there is (statfs(2)), who finds no room to allocate, and who opens a file to write to
while more is being freed than there is. Only who has one open already, and writes to it past us, may find no room for
that moment.

The kernel forgets a file after unlink(2) has returned, and may ask for other things first. So a file that loses its
last name and that nobody has open is expected, and waiting for what is being freed begins with waiting for that; not
for long, since it may be kept in ways that no FUSE server hears of (O_PATH).
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Final, Protocol

import trio

log = logging.getLogger(__name__)

_PATIENCE: Final = 0.1  # seconds: many times what the kernel takes to forget


class Freeable(Protocol):
    """A file that nobody has any more."""

    @property
    def pages(self) -> int:
        """How many it has left."""

    async def empty(self) -> None:
        """Free its memory in pieces. Raises OSError if it cannot be."""

    def close(self) -> None:
        """Free what there is of it."""


class Reaper:
    """The files of one backing that are being freed. `run` does it; without it nothing is taken."""

    def __init__(self) -> None:
        self._files: Final[deque[Freeable]] = deque()  # the first is being emptied
        self._expected: Final[set[Freeable]] = set()
        self._came = trio.Event()  # replaced when one of those has
        self._arrived = trio.Event()
        self._settled = trio.Event()  # replaced when something comes
        self._is_running = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being freed, nor expected."""
        return not self._files and not self._expected

    @property
    def pages(self) -> int:
        """How many are being freed, or expected."""
        return sum(file.pages for file in (*self._files, *self._expected))

    def expect(self, file: Freeable) -> None:
        """A large file will probably come soon."""
        if self._is_running:
            self._expected.add(file)

    def forget(self, file: Freeable) -> None:
        """It came, or will not."""
        if file in self._expected:
            self._expected.remove(file)
            self._came.set()
            self._came = trio.Event()

    def take(self, file: Freeable) -> bool:
        """Free a file from now on. Returns whether that is possible."""
        if self._is_running:
            self._files.append(file)
            self._settled = trio.Event()
            self._arrived.set()
            self.forget(file)
        return self._is_running

    async def settled(self) -> bool:
        """Wait until nothing is being freed. Returns whether anything was."""
        with trio.move_on_after(_PATIENCE):
            while self._expected:
                await self._came.wait()
        if not self._files:
            return False
        await self._settled.wait()
        return True

    async def run(self) -> None:
        """Free what comes. When cancelled, what is left is closed at once."""
        self._is_running = True
        try:
            while True:
                await self._arrived.wait()
                self._arrived = trio.Event()
                while self._files:
                    try:
                        await self._files[0].empty()
                    except OSError as error:
                        log.warning("a large file is freed in one piece: %s", error.strerror)
                    self._files.popleft().close()
                self._settled.set()
        finally:
            self._is_running = False
            while self._files:
                self._files.popleft().close()
            self._settled.set()
