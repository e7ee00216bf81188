"""Who serves a guest's serial port: what it sends goes to one descriptor, and what comes from another is typed.

Each of them may have nobody at its other end who reads or writes (a terminal after Ctrl-S, a full pipe), so system
calls wait in threads, and only the task that asked for them waits. A descriptor that another program has made
non-blocking stays so, since it is that program's as well; then it is waited for here.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from trio.lowlevel import ParkingLot, current_trio_token, wait_readable, wait_writable

from kvmsim.guests.uart import Uart
from memfs.contract.aio.nurseries import open_flat_nursery


class Console:
    """A serial port between two descriptors. `set_irq` as for `Uart`. Made in the event loop."""

    def __init__(self, set_irq: Callable[[bool], None], read_fd: int = 0, write_fd: int = 1) -> None:
        self._read_fd: Final = read_fd
        self._write_fd: Final = write_fd
        self._token: Final = current_trio_token()
        self._changes: Final = ParkingLot()
        self._is_ending = False
        self.uart: Final = Uart(set_irq, self._changed)

    def _changed(self) -> None:
        self._token.run_sync_soon(self._changes.unpark_all, idempotent=True)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Serve the port within an async with statement. In the end, what the guest has sent is written.

        Also if the guest has died, for that may be why. Raises OSError if a descriptor cannot be read or written.
        """
        failure: Exception | None = None
        async with open_flat_nursery() as nursery:
            nursery.start_soon(self._print)
            try:
                async with open_flat_nursery() as typing:
                    typing.start_soon(self._type)
                    yield
                    typing.cancel_scope.cancel()
            except Exception as error:
                failure = error
            self._is_ending = True
            self._changes.unpark_all()
        if failure is not None:
            raise failure

    async def _type(self) -> None:
        """Have the guest receive what comes, until that ends, and no faster than it reads."""
        while True:
            while not (room := self.uart.room):
                await self._changes.park()
            data: bytes = await _call(wait_readable, os.read, self._read_fd, room)
            if not data:
                return
            self.uart.receive(data)

    async def _print(self) -> None:
        """Write what the guest sends, until it has ended and all is written."""
        while True:
            rest = self.uart.take_to_send()
            if not rest and self._is_ending:
                return
            if not rest:
                await self._changes.park()
            while rest:
                rest = rest[await _call(wait_writable, os.write, self._write_fd, rest) :]


async def _call(wait: Callable[[int], Any], call: Callable[..., Any], fd: int, argument: object) -> Any:
    """Read from a descriptor, or write to it, in a thread; if this is cancelled, nobody waits for it any more."""
    while True:
        try:
            return await trio.to_thread.run_sync(call, fd, argument, abandon_on_cancel=True)
        except BlockingIOError:
            await wait(fd)
