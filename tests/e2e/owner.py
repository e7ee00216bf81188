"""An owner for the tests: speaks the real protocol to a mounted memfs, and acknowledges when the test says so.

Runs in the tests' process, so it must never ask the mount anything itself: files are opened, and commands run, in
threads and child processes.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from memfs.contract.protocol.connection import Role
from memfs.contract.protocol.messages import Ack, Fenced, Hello, InvalidateEnd, Message, Register, Registered
from memfs.contract.protocol.peer import Incoming, Peer, PeerGone, close_all, open_connection


class Owner:
    """One connection."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.heard: list[Message] = []
        self.acknowledge = trio.Event()  # notifications wait for this
        self.acknowledge.set()
        self.arrived = trio.Event()  # set when something has come
        self.gone = trio.Event()

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:

            def hear(request: Incoming) -> None:
                self.heard.append(request.message)
                self.arrived.set()
                nursery.start_soon(self._acknowledge, request)

            try:
                await self.peer.serve(hear)
            finally:
                self.gone.set()
            nursery.cancel_scope.cancel()

    async def _acknowledge(self, request: Incoming) -> None:
        await self.acknowledge.wait()
        if not isinstance(request.message, InvalidateEnd | Fenced):
            with suppress(PeerGone):  # who is cut off may be told why before anything else
                await self.peer.reply(request.id, Ack())

    async def ask(self, message: Message, fds: list[int] | None = None) -> Message:
        """Send a request; the descriptors that come with the answer are closed."""
        reply = await self.peer.call(message, fds or [])
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
            reply = await self.peer.call(Register(), [fd])
        finally:
            await trio.to_thread.run_sync(os.close, fd)
        assert isinstance(reply.message, Registered), reply.message
        return reply.message, reply.fds


@asynccontextmanager
async def connected(path: Path, *, hello: bool = True) -> AsyncIterator[Owner]:
    """An owner, connected to a memfs's socket."""
    owner = Owner(Peer(await open_connection(str(path)), Role.OWNER))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(owner.serve)
        try:
            if hello:
                await owner.ask(Hello(name="test"))
            yield owner
        finally:
            owner.peer.close()
            nursery.cancel_scope.cancel()


async def shell(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a child process, without blocking the owner."""
    return await trio.run_process(
        [str(part) for part in command], cwd=cwd, check=False, capture_stdout=True, capture_stderr=True
    )
