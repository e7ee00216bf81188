"""An owner for the tests: speaks the real protocol to a mounted memfs, and acknowledges when the test says so.

Runs in the tests' process, so it must never ask the mount anything itself: files are opened, and commands run, in
threads and child processes.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from memfs.contract.protocol.client import Client, StoreGone
from memfs.contract.protocol.client import connect as connect_client
from memfs.contract.protocol.messages import Message, Notification, Register, Registered, Request
from memfs.contract.protocol.peer import close_all

__all__ = ["Owner", "StoreGone", "connected", "shell"]


class Owner:
    """One connection."""

    client: Client

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.acknowledge = trio.Event()  # notifications wait for this
        self.acknowledge.set()
        self.arrived = trio.Event()  # set when something has come
        self.gone = trio.Event()

    async def hear(self, message: Notification) -> None:
        self.heard.append(message)
        self.arrived.set()
        await self.acknowledge.wait()

    async def hear_the_end(self) -> None:
        await self.client.ended.wait()
        if self.client.fenced is not None:
            self.heard.append(self.client.fenced)
        self.gone.set()

    async def ask(self, message: Request, fds: list[int] | None = None) -> Message:
        """Send a request; the descriptors that come with the answer are closed."""
        reply = await self.client.request(message, fds or [])
        close_all(reply.fds)
        return reply.message

    async def register(self, path: Path, flags: int = os.O_RDWR) -> Message:
        """Register the file at a path."""
        fd = await trio.to_thread.run_sync(os.open, path, flags)
        try:
            return await self.ask(Register(), [fd])
        finally:
            await trio.to_thread.run_sync(os.close, fd)

    async def registered(self, path: Path) -> tuple[Registered, tuple[int, ...]]:
        """Register, and keep the descriptors."""
        fd = await trio.to_thread.run_sync(os.open, path, os.O_RDWR)
        try:
            return await self.client.register(fd)
        finally:
            await trio.to_thread.run_sync(os.close, fd)


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Owner]:
    """An owner, connected to a memfs's socket."""
    owner = Owner()

    async def hear(message: Notification) -> None:
        await owner.hear(message)

    async with connect_client(str(path), "test", hear) as owner.client, trio.open_nursery() as nursery:
        nursery.start_soon(owner.hear_the_end)
        yield owner
        nursery.cancel_scope.cancel()


async def shell(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a child process, without blocking the owner."""
    return await trio.run_process(
        [str(part) for part in command], cwd=cwd, check=False, capture_stdout=True, capture_stderr=True
    )
