"""Files that nobody refers to any more: large ones are freed in chunks, one after the other, beside everything else.

Freeing a gibibyte takes the kernel a tenth of a second, and it does that wherever the last reference goes: when a name
is removed, a handle is closed or an owner dies. In the event loop that would hold up everybody. So a large file is
emptied first (pages.py does that in threads), and closing it is then nothing.

Until then its memory is in use, which on tmpfs it is not when unlink(2) has returned. So statfs(2) counts what is being
freed as free, and callers that need the space wait in `drain`: an allocation that found none, and open(2) for writing
while more is being freed than there is. Only a program that has a file open already, and writes to it in passthrough
mode, may find no space for that moment.

The kernel forgets a file after unlink(2) has returned, and may send other requests first. So a file that loses its
last name and that nobody has open is expected to come, but only for a moment from then on: a file may be kept for as
long as somebody likes in ways of which no FUSE server is notified (O_PATH), and then it is as one that is open.

Rejected: that statfs(2) waits (whoever removes files without end has everybody's wait; and what it would wait for, it
can say immediately).
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Final, Protocol

import trio
from trio.lowlevel import ParkingLot

log = logging.getLogger(__name__)

_EXPECTED_WITHIN: Final = 0.1  # seconds: many times what the kernel takes to forget


class Freeable(Protocol):
    """A file that nobody refers to any more."""

    @property
    def pages(self) -> int:
        """How many pages it has left."""

    async def empty(self) -> None:
        """Free its memory in chunks. Raises OSError if it cannot be."""

    def close(self) -> None:
        """Free what is left of it."""


class Reaper:
    """The files of one backing that are being freed, in the order in which they came.

    `run` frees them; while it does not run no file is taken.
    """

    def __init__(self) -> None:
        self._files: Final[deque[tuple[Freeable, int]]] = deque()  # and their pages; the first is being emptied
        self._pages = 0  # of all of them, as they were when they came
        self._expected: Final[dict[Freeable, tuple[float, int]]] = {}  # until when, and pages; the oldest first
        self._expected_pages = 0  # of all of them
        self._freed = 0  # how many files, ever
        self._arrival: Final = ParkingLot()  # `run` waits for a file to be taken
        self._change: Final = ParkingLot()  # `drain` waits for a file to be freed, or not to be expected any more
        self._is_running = False

    @property
    def is_idle(self) -> bool:
        """Whether no file is being freed, nor expected."""
        self._forget_overdue()
        return not self._files and not self._expected

    @property
    def pages(self) -> int:
        """How many pages are being freed, or expected to be. Costs the same however many files there are."""
        self._forget_overdue()
        if not self._files:
            return self._expected_pages
        first, pages = self._files[0]
        return self._expected_pages + self._pages - pages + first.pages

    def expect(self, file: Freeable, pages: int) -> None:
        """Expect a file, which has so many pages, to come soon, for a moment."""
        if self._is_running:
            self.forget(file)
            self._expected[file] = trio.current_time() + _EXPECTED_WITHIN, pages
            self._expected_pages += pages

    def forget(self, file: Freeable) -> None:
        """Do not expect a file any more."""
        expected = self._expected.pop(file, None)
        if expected is not None:
            self._expected_pages -= expected[1]
            self._change.unpark_all()

    def _forget_overdue(self) -> None:
        """Do not expect any more what has not come in time: somebody keeps it."""
        while self._expected:
            file, (until, _) = next(iter(self._expected.items()))
            if until > trio.current_time():
                return
            self.forget(file)

    def take(self, file: Freeable, pages: int) -> bool:
        """Free a file, which has so many pages, from now on. Returns whether that is possible."""
        if self._is_running:
            self._files.append((file, pages))
            self._pages += pages
            self._arrival.unpark_all()
            self.forget(file)
        return self._is_running

    async def drain(self) -> bool:
        """Wait until the files are freed that are expected or being freed now. Returns whether any were.

        Files that come meanwhile are not waited for: programs that go on removing files must not hold up the caller.
        Since the wait has an end, signals do not interrupt it: on tmpfs nothing would have been waited for.
        """
        self._forget_overdue()
        have_come = False
        with trio.CancelScope(shield=True):
            if self._expected:
                last_expected = next(reversed(self._expected))
                with trio.move_on_at(self._expected[last_expected][0]):
                    while last_expected in self._expected:  # those before it are not expected for longer
                        await self._change.park()
                    have_come = True
            last = self._freed + len(self._files)
            have_come |= self._freed < last
            while self._freed < last:
                await self._change.park()
        return have_come

    async def run(self) -> None:
        """Free what is taken, until cancelled; then what is left is freed immediately."""
        self._is_running = True
        try:
            while True:
                while self._files:
                    try:
                        await self._files[0][0].empty()
                    except OSError as error:
                        log.warning("a large file is freed in one piece: %s", error.strerror)
                    self._close_first()
                await self._arrival.park()
        finally:
            self._is_running = False
            while self._files:
                self._close_first()

    def _close_first(self) -> None:
        file, pages = self._files.popleft()
        self._pages -= pages
        file.close()
        self._freed += 1
        self._change.unpark_all()
